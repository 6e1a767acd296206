/**
 * A login is never lost and never redeemed twice: the executable is killed at each of its system calls and at random
 * moments, meets a failing disk at each call that touches a file, comes in crowds, and writes beside others who write.
 * `CAR_EXE` names another executable than the one that `make` builds. Wants Linux, strace and root.
 *
 * @module
 */
import { assert, assertEquals } from "@std/assert";
import { createHash } from "node:crypto";
import { resolve } from "node:path";
import { DatabaseSync } from "node:sqlite";
import { setTimeout as pause } from "node:timers/promises";
import { authJson, type MockServer, startMockServer } from "../mock_server.ts";

const exe = Deno.env.get("CAR_EXE") ?? resolve(import.meta.dirname!, "../dist/codex_auth_refresh");
const LIMIT_MS = 100_000; // for any process and any wait: whatever hangs fails its test
const LANES = 2; // how many of the thousands of short runs go on side by side

// A login, and who works on it --------------------------------------------------------------------

/** A home with a login nine days old, its access token expired, and the server that it came from. */
interface Scene extends AsyncDisposable {
  readonly dir: string;
  readonly auth: string; // the path of auth.json
  readonly before: string; // what it holds at first
  readonly oldest: string; // the refresh token in it
  readonly server: MockServer;
  env?: string[]; // further variables, as NAME=value
}

async function staleLogin(shared?: MockServer): Promise<Scene> {
  const dir = await Deno.makeTempDir({ prefix: "torture_" });
  const server = shared ?? await startMockServer();
  const tokens = server.login({ accessTokenSeconds: -3600 });
  const before = authJson(tokens, new Date(Date.now() - 9 * 86_400_000));
  const auth = `${dir}/auth.json`;
  await Deno.writeTextFile(auth, before, { mode: 0o600 });
  const end = async () => {
    if (!shared) await server.close();
    await Deno.remove(dir, { recursive: true });
  };
  return { dir, auth, before, oldest: tokens.refresh_token, server, [Symbol.asyncDispose]: end };
}

interface Process {
  readonly ended: Promise<{ code: number; signal: string | null; said: string }>;
  /** What it wrote to stderr so far. */
  stderr(): string;
  /** Resolves once stderr has matched so many times, or at the end. */
  said(pattern: RegExp, times?: number): Promise<void>;
  kill(signal: Deno.Signal): void;
}

/** Starts a program in an environment with nothing in it but the server's address. */
function start([program, ...args]: string[], server: MockServer): Process {
  const env = { PATH: Deno.env.get("PATH") ?? "", HOME: "/nonexistent", CODEX_REFRESH_TOKEN_URL_OVERRIDE: server.url };
  const streams = { stdin: "null", stdout: "null", stderr: "piped" } as const;
  const child = new Deno.Command(program!, { args, env, clearEnv: true, ...streams }).spawn();
  const kill = (signal: Deno.Signal) => {
    try {
      child.kill(signal);
    } catch {
      // It has ended.
    }
  };
  let text = "";
  const waiting = new Set<() => void>();
  const read = async () => {
    for await (const chunk of child.stderr.pipeThrough(new TextDecoderStream())) {
      text += chunk;
      waiting.forEach((look) => look());
    }
  };
  const limit = setTimeout(() => kill("SIGKILL"), LIMIT_MS);
  const ended = Promise.all([child.status, read()]).then(([{ code, signal }]) => {
    clearTimeout(limit);
    return { code, signal, said: text };
  });
  const said = async (pattern: RegExp, times = 1) => {
    const { promise, resolve } = Promise.withResolvers<void>();
    const look = () => text.split(pattern).length > times && resolve();
    look();
    waiting.add(look);
    await Promise.race([promise, ended]);
    waiting.delete(look);
  };
  return { ended, stderr: () => text, said, kill };
}

const once = ({ dir, env = [] }: Scene) => [...(env.length > 0 ? ["env", ...env] : []), exe, "--once", dir];

/** One attempt to its end, under strace where flags for it are given. */
function run(scene: Scene, ...strace: string[]) {
  return start(strace.length > 0 ? ["strace", "-f", ...strace, ...once(scene)] : once(scene), scene.server).ended;
}

function tokenIn(text: string): string {
  return JSON.parse(text).tokens.refresh_token;
}

/** The names of the home's files that hold `token`. */
function filesWith(token: string, { dir }: Scene): string[] {
  const names = [...Deno.readDirSync(dir)].filter(({ isFile }) => isFile).map(({ name }) => name);
  return names.filter((name) => Deno.readTextFileSync(`${dir}/${name}`).includes(token));
}

/** auth.json holds the newest token, no other file does, and no token was sent that had been spent before. */
function assertRefreshed(scene: Scene, said: string, asked = ["redeemed"]) {
  const { server, oldest, auth } = scene;
  assertEquals(server.requests.map(({ outcome }) => outcome), asked, said);
  assertEquals(server.state(oldest), "spent", said);
  assertEquals(tokenIn(Deno.readTextFileSync(auth)), server.newest(oldest), said);
  assertEquals(filesWith(server.newest(oldest), scene), ["auth.json"], said);
}

/** The moment in which the next request reaches the server, and with it the moments of all later ones. */
function nextRequest(server: MockServer): Promise<void> {
  const limit = pause(LIMIT_MS, undefined, { ref: false }).then(() => {
    throw new Error("no request");
  });
  return Promise.race([new Promise<void>((go) => server.onRequest = () => go()), limit]);
}

async function until(condition: () => boolean): Promise<void> {
  for (const limit = Date.now() + LIMIT_MS; !condition(); await pause(2)) {
    assert(Date.now() < limit, `never: ${condition}`);
  }
}

/** Does the same with each item, a few at a time. */
async function each<T>(items: Iterable<T>, what: (item: T) => Promise<void>): Promise<void> {
  const rest = items[Symbol.iterator]();
  const lane = async () => {
    for (let next = rest.next(); !next.done; next = rest.next()) await what(next.value);
  };
  await Promise.all(Array.from({ length: LANES }, lane));
}

/** The same numbers from [0, 1) in every run (mulberry32). */
function random(seed: number): () => number {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

function median(numbers: number[]): number {
  return numbers.toSorted((one, other) => one - other)[numbers.length >> 1] ?? NaN;
}

// Crashes -----------------------------------------------------------------------------------------

/** What a crash left: the old token unspent; the answer on the disk; or neither, since it came in the gap. */
type Fate = "before" | "survived" | "gap";

/**
 * Judges what a crash left, by the ledger and the disk alone, and starts again. In the gap the answer died with the
 * process. Servers that accept a repeat save even that, so there the next start has to ask again.
 */
async function recover(scene: Scene, said: string): Promise<Fate> {
  const { server, oldest, auth, before } = scene;
  const spent = server.state(oldest) === "spent";
  const fate = !spent ? "before" : filesWith(server.newest(oldest), scene).length > 0 ? "survived" : "gap";
  if (fate !== "survived") assertEquals(Deno.readTextFileSync(auth), before, said);
  server.graceMilliseconds = fate === "gap" ? Infinity : 0;
  const asked = server.requests.map(({ outcome }) => outcome);
  const again = await run(scene);
  const all = `${said}\nthen: ${again.code} ${again.said}`;
  assert(again.code === 0 || again.code === 1, all);
  const more = { before: ["redeemed"], survived: [], gap: ["repeated"] };
  assertRefreshed(scene, all, [...asked, ...more[fate]]);
  return fate;
}

// strace counts the calls of each thread by itself, and so cannot kill at the n-th of them all. This can.
const libc = Deno.dlopen("libc.so.6", {
  ptrace: { parameters: ["i32", "i32", "usize", "usize"], result: "isize" },
  ask: { name: "ptrace", parameters: ["i32", "i32", "usize", "buffer"], result: "isize" },
  waitpid: { parameters: ["i32", "buffer", "i32"], result: "i32", nonblocking: true },
}).symbols;
const PTRACE = { SYSCALL: 24, SEIZE: 0x4206, GET_SYSCALL_INFO: 0x420e };
const OPTIONS = 0x01n | 0x08n | 0x10n | 0x100000n; // TRACESYSGOOD, TRACECLONE, TRACEEXEC, EXITKILL
const EXEC = 4; // the event
const SYSCALL_STOP = 0x85;
const WALL = 0x40000000;

/** Kills an attempt where any thread enters its `nth` system call, counted over all threads, from the first on. */
async function killAt(nth: number, scene: Scene): Promise<{ calls: number; said: string }> {
  const held = 'setsid sh -c \'kill -STOP $$; exec "$@"\' - "$@" & echo pid $! >&2; wait $!';
  const shell = start(["sh", "-c", held, "-", ...once(scene)], scene.server);
  await shell.said(/^pid \d+\n/);
  const pid = Number(/^pid (\d+)/.exec(shell.stderr())?.[1]);
  await until(() => / T /.test(Deno.readTextFileSync(`/proc/${pid}/stat`)));
  assertEquals(libc.ptrace(PTRACE.SEIZE, pid, 0n, OPTIONS), 0n, "ptrace: not root?");
  Deno.kill(pid, "SIGCONT");
  const limit = setTimeout(() => Deno.kill(pid, "SIGKILL"), LIMIT_MS);
  let calls = NaN;
  const status = new Int32Array(1);
  // It is a process group of its own, so that one call waits for all of its threads, those too that the kill overtakes.
  for (let thread = 0; (thread = await libc.waitpid(-pid, status, WALL)) > 0;) {
    const [kind, stop, event] = [status[0]! & 0xff, (status[0]! >> 8) & 0xff, status[0]! >> 16];
    if (kind !== 0x7f) continue; // it has ended
    if (event === EXEC) calls = 0;
    if (stop === SYSCALL_STOP) {
      const info = new Uint8Array(88);
      libc.ask(PTRACE.GET_SYSCALL_INFO, thread, BigInt(info.length), info);
      const entered = info[0] === 1;
      if (entered && ++calls === nth) Deno.kill(pid, "SIGKILL");
    }
    const signal = event === 0 && stop !== SYSCALL_STOP ? stop : 0;
    libc.ptrace(PTRACE.SYSCALL, thread, 0n, BigInt(signal));
  }
  clearTimeout(limit);
  return { calls, said: (await shell.ended).said };
}

/** A system call as strace shows it. */
interface Call {
  readonly thread: string;
  readonly name: string;
  readonly text: string;
  /** Touches a file, rather than memory, a thread, a socket or the clock. */
  readonly file: boolean;
}

/** The calls of one attempt, in the order in which they began, with what each returned where that took no waiting. */
async function traceOnce(scene: Scene): Promise<Call[]> {
  const log = `${scene.dir}.strace`;
  const { code, said } = await run(scene, "-y", "-s", "32", "-o", log);
  assertEquals(code, 0, said);
  const text = await Deno.readTextFile(log);
  await Deno.remove(log);
  return [...text.matchAll(/^(\d+) +(\w+)\((.*)$/gm)].map(([, thread = "", name = "", text = ""]) => {
    const file = /^(\d+<\/|AT_FDCWD|"\/)/.test(text) && !/^(execve|getcwd)$/.test(name);
    return { thread, name, text, file };
  });
}

/** Where to inject: at the `nth` call of that name in any thread, of those that touch `path` where one is given. */
interface Point {
  readonly call: Call;
  readonly nth: number;
  readonly path?: string;
}

/**
 * The points of a trace, and the calls that none of them is. strace counts for each thread by itself, so "the second
 * fsync" is that of the thread that comes to its second one first, and the others' hide behind it. Files are touched by
 * several threads; there the path tells them apart.
 */
function pointsOf(calls: readonly Call[], paths: readonly string[]): { points: Point[]; hidden: Call[] } {
  const found = new Map<Call, Point>();
  for (const path of [undefined, ...paths]) {
    const count = new Map<string, number>();
    const taken = new Set<string>();
    for (const call of calls) {
      if (path !== undefined && !call.text.includes(`<${path}>`) && !call.text.includes(`"${path}"`)) continue;
      const own = `${call.thread} ${call.name}`;
      const nth = (count.get(own) ?? 0) + 1;
      count.set(own, nth);
      if (taken.has(`${call.name} ${nth}`)) continue;
      taken.add(`${call.name} ${nth}`);
      if (!found.has(call)) found.set(call, { call, nth, path });
    }
  }
  return { points: [...found.values()], hidden: calls.filter((call) => !found.has(call)) };
}

/** The journal of an attempt, named after the token that it sends. What replaces it has `.new` behind that. */
function journalOf({ dir, oldest }: Scene): string {
  return `${dir}/.auth.json.${createHash("sha256").update(oldest).digest("hex").slice(0, 16)}.tmp`;
}

/**
 * A trace in which every call that touches a file is a point of its own, and what is to be found in it. Which helper
 * thread makes which fsync is chance, so that may take a few traces.
 */
async function study() {
  for (let tries = 1;; tries++) {
    const studied = await studyOnce();
    const lost = studied.hidden.filter(({ file }) => file).map(({ name, text }) => `${name}(${text}`);
    if (lost.length === 0) return studied;
    if (tries === 50) assertEquals(lost, []);
  }
}

async function studyOnce() {
  await using scene = await staleLogin();
  const calls = await traceOnce(scene);
  const journal = journalOf(scene);
  const isWrite = ({ name, text }: Call) => /^p?write/.test(name) && text.includes(`<${journal}>`);
  const first = calls.findIndex((call, index) => index > 0 && call.text.includes(scene.dir));
  const sent = calls.findIndex(({ name, text }) => /^(send|write)/.test(name) && text.includes("POST /"));
  const stored = calls.findIndex((call, index) => index > sent && isWrite(call));
  const read = calls.findLastIndex(({ name, text }, index) =>
    index < stored && /^(recv|read)/.test(name) && /<(socket|TCP)/.test(text)
  );
  assert(first > 0 && sent > first && read > sent && stored > read, `${first} ${sent} ${read} ${stored}`);
  const { points, hidden } = pointsOf(calls, [scene.dir, journal, `${journal}.new`]);
  return { scene, calls, journal, first, read, stored, points, hidden };
}

/** Runs an attempt in which one call fails, in a fresh scene. */
async function fail(point: Point, error: string, studied: Awaited<ReturnType<typeof study>>) {
  await using scene = await staleLogin();
  const { call: { name, text }, nth } = point;
  const path = point.path?.replace(studied.journal, journalOf(scene)).replace(studied.scene.dir, scene.dir);
  const filter = path === undefined ? [] : ["-P", path];
  const { code, said } = await run(
    scene,
    ...["-qq", ...filter, "-e", `trace=${name}`, "-e", `inject=${name}:error=${error}:when=${nth}`],
  );
  const story = `${error} at ${name}(${text} (number ${nth}): ${code} ${said}`;
  return { fate: await recover(scene, story), story, met: said.includes("(INJECTED)") };
}

Deno.test("from the answer to its write no call of ours is in the way, and the disk has it before the rename", async (t) => {
  const { scene, calls, journal, read, stored } = await study();
  const between = calls.slice(read + 1, stored);
  const ours = between.filter(({ file, text }) => file || /^\d+<pipe:/.test(text));
  assertEquals(ours.map(({ name, text }) => `${name}(${text}`), []);
  const find = (name: RegExp, text: string, from: number) => {
    const at = calls.findIndex((call, index) => index > from && name.test(call.name) && call.text.includes(text));
    assert(at > 0, `no ${name} of ${text}`);
    return at;
  };
  const laid = find(/^rename/, `"${journal}"`, find(/^f(data)?sync$/, `<${journal}.new>`, 0));
  const proven = find(/^f(data)?sync$/, `<${scene.dir}>`, laid);
  assert(proven < read, "the room for the answer is on the disk before the token is spent");
  const synced = find(/^f(data)?sync$/, `<${journal}>`, stored);
  const renamed = find(/^rename/, `"${scene.auth}"`, 0);
  assert(synced < renamed, "the answer is on the disk before it gets its name");
  find(/^f(data)?sync$/, `<${scene.dir}>`, renamed);

  // The window by the clock, with nothing traced but the calls at its two ends.
  const windows: number[] = [];
  for (let round = 0; round < 15; round++) {
    await using scene = await staleLogin();
    const log = `${scene.dir}.strace`;
    const few = "trace=/^(recv|read$|pwrite|write$)";
    await run(scene, "--seccomp-bpf", "-y", "-ttt", "-T", "-s", "16", "-e", few, "-o", log);
    const lines = (await Deno.readTextFile(log)).split("\n");
    await Deno.remove(log);
    const isAnswer = (line: string) => line.includes("HTTP/1.1 200");
    const after = lines.slice(lines.findIndex(isAnswer));
    const write = after.find((line) => line.includes(`<${journalOf(scene)}>`)) ?? "";
    const end = (line = "") => Number(line.split(/ +/)[1]) + Number(/<([\d.]+)>$/.exec(line)?.[1] ?? 0);
    windows.push((end(write) - end(after[0])) * 1000);
  }
  const window = median(windows).toFixed(2);
  await t.step(
    `${between.length} calls and ${window} ms from the answer to its write (median of ${windows.length})`,
    () => assert(between.length < 30 && Number(window) < 50),
  );
});

Deno.test("killed at any system call it loses nothing but in the gap", async (t) => {
  const fates: Record<Fate, number> = { before: 0, survived: 0, gap: 0 };
  let finished = 0;
  // No two attempts make quite the same calls, so it is over when ten of them came to their end.
  const numbers = function* () {
    for (let nth = 1; finished < 10; nth++) yield nth;
  };
  await each(numbers(), async (nth) => {
    await using scene = await staleLogin();
    const { calls, said } = await killAt(nth, scene);
    const fate = await recover(scene, `killed at call ${nth}: ${said}`);
    if (calls < nth) finished++;
    else fates[fate]++;
  });
  const { before, survived, gap } = fates;
  await t.step(
    `killed at each of ${before + survived + gap} system calls: ${survived} survived, ` +
      `${before} before the request was answered, ${gap} in the gap`,
    () => assert(survived > 50 && before > 100 && gap > 0 && gap < 60),
  );
});

/** What a run may leave that is killed once it has its answer; each gets the answer's document. */
const LEFT: Record<string, (scene: Scene, answer: string) => void> = {
  "a journal"(scene, answer) {
    Deno.writeTextFileSync(journalOf(scene), answer + "\n".repeat(1 << 17));
  },
  "a journal that was being replaced"(scene, answer) {
    Deno.writeTextFileSync(journalOf(scene), answer);
    Deno.writeTextFileSync(`${journalOf(scene)}.new`, answer.slice(0, 99));
  },
  "a journal that never got its name"(scene, answer) {
    Deno.writeTextFileSync(journalOf(scene), answer.slice(0, 99));
    Deno.writeTextFileSync(`${journalOf(scene)}.new`, answer);
  },
  "a journal of a file that is rewritten in place"(scene, answer) {
    Deno.writeTextFileSync(journalOf(scene), answer);
    Deno.mkdirSync(`${scene.dir}/sub`);
    Deno.linkSync(scene.auth, `${scene.dir}/sub/link`);
    scene.env = ["CODEX_AUTH_IN_PLACE=1"];
  },
};

Deno.test("killed at any system call while it finishes what a killed run left it loses nothing", async (t) => {
  const { first } = await studyOnce();
  for (const [what, leave] of Object.entries(LEFT)) {
    let [finished, killed] = [0, 0];
    const numbers = function* () {
      for (let nth = first - 10; finished < 4; nth++) yield nth; // before that it only starts
    };
    await each(numbers(), async (nth) => {
      await using scene = await staleLogin();
      const body = JSON.stringify({ client_id: "x", grant_type: "refresh_token", refresh_token: scene.oldest });
      const answer = await fetch(scene.server.url, { method: "POST", body });
      leave(scene, authJson(await answer.json()));
      const { calls, said } = await killAt(nth, scene);
      const fate = await recover(scene, `${what}, killed at call ${nth}: ${said}`);
      assertEquals(fate, "survived", said);
      if (calls < nth) finished++;
      else killed++;
    });
    await t.step(`${what}: killed at each of ${killed} system calls`, () => assert(killed > 50));
  }
});

Deno.test("one error of the disk, at any call, costs nothing", async (t) => {
  const studied = await study();
  const { calls, first, points } = studied;
  const touching = points.filter(({ call }) => call.file && calls.indexOf(call) >= first);
  const errors = ["ENOSPC", "EIO", "EACCES"];
  const all = touching.flatMap((point) => errors.map((error) => ({ point, error })));
  let missed = 0;
  const fates: Record<Fate, number> = { before: 0, survived: 0, gap: 0 };
  await each(all, async ({ point, error }) => {
    const { fate, story, met } = await fail(point, error, studied);
    fates[fate]++;
    if (!met) missed++;
    assert(fate !== "gap", `lost: ${story}`);
  });
  const { before, survived } = fates;
  await t.step(
    `${errors} at ${touching.length} calls: ${survived} stored, ${before} before the request, none lost ` +
      `(${missed} were not met)`,
    () => assert(survived > 100 && before > 50 && missed < all.length / 10),
  );
});

Deno.test("killed 300 times at random moments it loses nothing but in the gap", async (t) => {
  const durations: number[] = [];
  await each(Array(10), async () => {
    await using scene = await staleLogin();
    const began = performance.now();
    await run(scene);
    durations.push(performance.now() - began);
  });
  const whole = 1.1 * median(durations);
  const next = random(1);
  const fates: Record<Fate, number> = { before: 0, survived: 0, gap: 0 };
  let killed = 0;
  const delays = function* () {
    while (killed < 300) yield whole * next();
  };
  await each(delays(), async (delay) => {
    await using scene = await staleLogin();
    const process = start(once(scene), scene.server);
    await pause(delay);
    process.kill("SIGKILL");
    const { signal, said } = await process.ended;
    const fate = await recover(scene, `killed after ${delay} ms: ${said}`);
    if (signal === null) return; // it had come to its end
    killed++;
    fates[fate]++;
  });
  const { before, survived, gap } = fates;
  await t.step(
    `killed ${killed} times within ${whole.toFixed()} ms: ${survived} survived, ` +
      `${before} before the request was answered, ${gap} in the gap`,
    () => assert(before > 30 && survived > 10 && gap < 60),
  );
});

// Crowds ------------------------------------------------------------------------------------------

const CROWD = 20;

/** Copies of `--once`, the last one under strace: it tells when it is refused the lock. */
function crowd(scene: Scene, count: number) {
  const strace = ["strace", "-f", "-qq", "-e", "trace=fcntl", "-e", "status=failed"];
  const copies = Array.from({ length: count - 1 }, () => start(once(scene), scene.server));
  const watched = start([...strace, ...once(scene)], scene.server);
  const refused = (times: number) => watched.said(/EAGAIN/, times);
  const codes = async () => {
    const ended = await Promise.all([...copies, watched].map(({ ended }) => ended));
    const said = ended.map(({ code, said }) => `${code} ${said}`).join("\n");
    return { codes: ended.map(({ code }) => code), said };
  };
  return { refused, codes };
}

Deno.test("twenty attempts and two loops at once redeem a token once, in each of 20 rounds", async () => {
  for (let round = 0; round < 20; round++) {
    await using scene = await staleLogin();
    const loops = [1, 2].map(() => start([exe, scene.dir], scene.server));
    const { codes, said } = await crowd(scene, CROWD).codes();
    await Promise.all(loops.map((loop) => loop.said(/next check in/)));
    loops.forEach((loop) => loop.kill("SIGTERM"));
    const ends = await Promise.all(loops.map(({ ended }) => ended));
    const all = [said, ...ends.map(({ said }) => said)].join("\n");
    assertEquals(ends.map(({ code }) => code), [0, 0], all);
    assertEquals(codes.filter((code) => code !== 0 && code !== 1), [], all);
    assertRefreshed(scene, all);
  }
});

Deno.test("a crowd whose lock holder is killed goes on at once", async (t) => {
  const waits: number[] = [];
  for (let round = 0; round < 5; round++) {
    await using scene = await staleLogin();
    const { server } = scene;
    server.next({ kind: "hang" }); // nothing is redeemed, and the holder waits
    const asked = nextRequest(server);
    const holder = start(once(scene), server);
    await asked;
    const waiting = crowd(scene, CROWD);
    await waiting.refused(3);
    assertEquals(server.requests.length, 1);
    const again = nextRequest(server);
    holder.kill("SIGKILL");
    const killed = performance.now();
    await again;
    waits.push(performance.now() - killed);
    const { codes, said } = await waiting.codes();
    assertEquals(codes.toSorted(), [0, ...Array(CROWD - 1).fill(1)], said);
    assertRefreshed(scene, said, ["other", "redeemed"]);
    await holder.ended;
  }
  await t.step(
    `the next request came ${median(waits).toFixed()} ms after the kill (median of ${waits.length})`,
    () => assert(Math.max(...waits) < 1000, `${waits}`),
  );
});

Deno.test("an attempt that was frozen for longer than it waits for an answer takes the one that is there", async () => {
  await using scene = await staleLogin();
  const { server } = scene;
  server.next({ kind: "delay", milliseconds: 500 }); // redeemed at once; the answer finds a stopped process
  const asked = nextRequest(server);
  const process = start(once(scene), server);
  await asked;
  process.kill("SIGSTOP"); // as a paused container, a frozen cgroup or a suspended machine
  await pause(32_000);
  process.kill("SIGCONT");
  const { code, said } = await process.ended;
  assertEquals(code, 0, said);
  assertRefreshed(scene, said);
});

Deno.test("a crowd whose lock holder is stopped waits, and goes on after it", async () => {
  await using scene = await staleLogin();
  const { server } = scene;
  server.next({ kind: "delay", milliseconds: 500 }); // redeemed at once; the answer finds the holder stopped
  const asked = nextRequest(server);
  const holder = start(once(scene), server);
  await asked;
  holder.kill("SIGSTOP");
  const waiting = crowd(scene, CROWD);
  const over = waiting.codes().then(() => true);
  await until(() => server.requests[0]?.status === 200);
  await waiting.refused(20);
  assertEquals(server.requests.length, 1);
  assertEquals(await Promise.race([over, Promise.resolve(false)]), false, "nobody gives up");
  holder.kill("SIGCONT");
  const { code, said } = await holder.ended;
  const { codes, said: others } = await waiting.codes();
  assertEquals(code, 0, said);
  assertEquals(codes, Array(CROWD).fill(1), others);
  assertRefreshed(scene, others);
});

// Waiting for the lock ----------------------------------------------------------------------------

/** Holds a lock file as another copy would, until it is closed. */
function hold(path: string): DatabaseSync {
  const database = new DatabaseSync(path);
  database.exec("BEGIN EXCLUSIVE");
  return database;
}

/** An attempt that finds the lock held, once it has been refused it a few times. */
async function waiter(scene: Scene, ...strace: string[]) {
  const shell = ["sh", "-c", 'echo pid $$ >&2; exec "$@"', "-", ...once(scene)];
  const watch = [
    "strace",
    "-f",
    "-qq",
    "-e",
    "trace=fcntl,openat",
    "-e",
    "status=failed",
    "-P",
    `${scene.dir}/auth_refresh.lock`,
  ];
  const process = start([...watch, ...strace, ...shell], scene.server);
  const refused = (times: number) => process.said(/fcntl.*EAGAIN/, times);
  await refused(3);
  return { process, refused, pid: Number(/pid (\d+)/.exec(process.stderr())?.[1]) };
}

Deno.test("a SIGTERM ends the wait for the lock at once, without a request", async () => {
  await using scene = await staleLogin();
  const { server, auth, dir, before } = scene;
  const lock = hold(`${dir}/auth_refresh.lock`);
  const { process, pid } = await waiter(scene);
  const limit = setTimeout(() => Deno.kill(pid, "SIGKILL"), 2000);
  Deno.kill(pid, "SIGTERM");
  const { code, signal, said } = await process.ended;
  clearTimeout(limit);
  lock.close();
  assertEquals([code, signal, server.requests.length], [2, null, 0], said);
  assertEquals(Deno.readTextFileSync(auth), before, said);
});

Deno.test("a login that comes while an attempt waits for the lock is not its to redeem, stale or not", async () => {
  await using scene = await staleLogin();
  const { server, auth, dir } = scene;
  const lock = hold(`${dir}/auth_refresh.lock`);
  const { process } = await waiter(scene);
  const theirs = authJson(server.login({ accessTokenSeconds: -3600 }), new Date(0));
  Deno.writeTextFileSync(auth, theirs);
  lock.close();
  const { code, said } = await process.ended;
  assertEquals([code, server.requests.length], [1, 0], said);
  assert(said.includes("superseded"), said);
  assertEquals(Deno.readTextFileSync(auth), theirs, said);
});

// The lock file is replaced, by one that a later copy holds, between the waiter's opening and its locking of the old one.
Deno.test("an attempt that gets a lock whose file was replaced goes on waiting", async () => {
  await using scene = await staleLogin();
  const { server, dir } = scene;
  const path = `${dir}/auth_refresh.lock`;
  const [first, later] = [hold(path), hold(`${path}.later`)];
  const { process, refused, pid } = await waiter(scene, "-e", "inject=openat:delay_exit=200000");
  const opened = () =>
    [...Deno.readDirSync(`/proc/${pid}/fd`)].some(({ name }) => {
      try {
        return Deno.readLinkSync(`/proc/${pid}/fd/${name}`) === path;
      } catch {
        return false; // closed meanwhile
      }
    });
  await until(() => !opened());
  await until(opened);
  Deno.renameSync(`${path}.later`, path);
  first.close();
  const times = process.stderr().split(/fcntl.*EAGAIN/).length - 1;
  await refused(times + 2);
  assertEquals(server.requests.length, 0, process.stderr());
  later.close();
  const { code, said } = await process.ended;
  assertEquals(code, 0, said);
  assertRefreshed(scene, said);
});

// Other writers -----------------------------------------------------------------------------------

/** Another login, of the same server. */
const otherLogin = ({ server }: Scene) => authJson(server.login());

/** The same login with another field in it. */
const otherField = ({ before }: Scene) => JSON.stringify({ ...JSON.parse(before), theirs: [1.0, "kept"] }, null, 2);

/** What must hold in the end if somebody else wrote `theirs`. */
async function assertMerged(scene: Scene, process: Process, theirs: string) {
  const { server, oldest, auth } = scene;
  const { code, said } = await process.ended;
  const text = Deno.readTextFileSync(auth);
  if (tokenIn(theirs) === oldest) {
    assertEquals(code, 0, said);
    assertRefreshed(scene, said);
    assertEquals(JSON.parse(text).theirs, JSON.parse(theirs).theirs, said);
  } else {
    assertEquals(code, 1, said);
    assertEquals(text, theirs, said);
    assert(said.includes("superseded"), said);
  }
  assertEquals(filesWith(server.newest(oldest), scene).filter((name) => name !== "auth.json"), [], said);
  assertEquals(filesWith(oldest, scene), [], said);
  assertEquals(server.requests.length, 1, said);
}

for (const [what, write] of Object.entries({ "another login": otherLogin, "another field": otherField })) {
  Deno.test(`${what} that comes while the request is out stays`, async () => {
    await using scene = await staleLogin();
    const theirs = write(scene);
    scene.server.next({ kind: "delay", milliseconds: 200 });
    scene.server.onRequest = () => Deno.writeTextFileSync(scene.auth, theirs);
    await assertMerged(scene, start(once(scene), scene.server), theirs);
  });
}

Deno.test("a login that takes auth.json's place right after our rename stays", async () => {
  await using scene = await staleLogin();
  const { server, auth } = scene;
  const theirs = otherLogin(scene);
  const { ino } = Deno.statSync(auth);
  const slow = ["-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:delay_enter=300000"];
  const process = start(["strace", "-f", "-qq", ...slow, ...once(scene)], server);
  await until(() => Deno.statSync(auth).ino !== ino); // now the folder is synced
  Deno.writeTextFileSync(`${auth}.theirs`, theirs, { mode: 0o600 });
  Deno.renameSync(`${auth}.theirs`, auth);
  await assertMerged(scene, process, theirs);
  assertEquals([...Deno.readDirSync(scene.dir)].filter(({ name }) => /\.(tmp|new)$/.test(name)), []);
});

/** What is done while the proof waits for the disk, and what comes of it. */
const DURING_THE_PROOF: Record<string, { act(scene: Scene): string; code: number; says: string }> = {
  "another login": {
    act(scene) {
      const theirs = otherLogin(scene);
      Deno.writeTextFileSync(scene.auth, theirs);
      return theirs;
    },
    code: 1,
    says: "superseded",
  },
  "the loss of the lock file": {
    act({ dir, before }) {
      Deno.removeSync(`${dir}/auth_refresh.lock`);
      return before;
    },
    code: 2,
    says: "auth_refresh.lock was removed or replaced while it was held",
  },
};

for (const [what, { act, code, says }] of Object.entries(DURING_THE_PROOF)) {
  Deno.test(`${what} while it is proven that an answer could be stored stops the request`, async () => {
    await using scene = await staleLogin();
    const { server, auth, dir } = scene;
    const journal = journalOf(scene);
    const slow = ["-e", "trace=fsync", "-e", "inject=fsync:delay_enter=800000:when=1", "-P", `${journal}.new`];
    const process = start(["strace", "-f", "-qq", ...slow, ...once(scene)], server);
    const room = (path: string) => {
      try {
        return Deno.statSync(path).size;
      } catch {
        return 0; // not there, or not any more
      }
    };
    await until(() => room(`${journal}.new`) > 0); // written; now it is synced
    const left = act(scene);
    assert(room(`${journal}.new`) > 0, "too late: the proof is over");
    const ended = await process.ended;
    assertEquals([ended.code, server.requests.length], [code, 0], ended.said);
    assert(ended.said.includes(says), ended.said);
    assertEquals(Deno.readTextFileSync(auth), left, ended.said);
    assertEquals(room(`${journal}.new`) + room(journal), 0, ended.said);
    const { watchdog_last_outcome } = JSON.parse(Deno.readTextFileSync(`${dir}/auth_refresh_status.json`));
    assertEquals(watchdog_last_outcome, code === 1 ? "superseded" : "fail:preflight", ended.said);
  });
}

Deno.test("a logout that comes while the request is out stays one", async () => {
  await using scene = await staleLogin();
  const { server, auth } = scene;
  server.next({ kind: "delay", milliseconds: 200 });
  server.onRequest = () => Deno.removeSync(auth);
  const { code, said } = await run(scene);
  assertEquals(code, 1, said);
  assert(said.includes("superseded"), said);
  assertEquals(filesWith(server.newest(scene.oldest), scene), [], said);
  assertEquals([...Deno.readDirSync(scene.dir)].filter(({ name }) => name === "auth.json"), [], said);
});

// Two homes ---------------------------------------------------------------------------------------

Deno.test("while one home waits for its lock another's answer is stored at once", async (t) => {
  await using elsewhere = await startMockServer().then((server) =>
    Object.assign(server, { [Symbol.asyncDispose]: server.close })
  );
  await using scene = await staleLogin();
  await using other = await staleLogin(scene.server);
  const { server } = scene;
  elsewhere.next({ kind: "hang" });
  const held = nextRequest(elsewhere);
  const holder = start(once(scene), elsewhere);
  await held;
  server.next({ kind: "delay", milliseconds: 1000 }); // the first home is at its lock by then
  const loop = start([exe, scene.dir, other.dir], server);
  await until(() => server.requests[0]?.status === 200);
  const answered = performance.now();
  await until(() => Deno.readTextFileSync(other.auth).includes(server.newest(other.oldest)));
  const wait = performance.now() - answered;
  assertEquals(Deno.readTextFileSync(scene.auth), scene.before);
  assertEquals(server.requests.length, 1);
  holder.kill("SIGKILL");
  await until(() => server.requests.length === 2);
  await loop.said(/next check in/, 2);
  loop.kill("SIGTERM");
  const { code, said } = await loop.ended;
  assertEquals(code, 0, said);
  for (const each of [scene, other]) assertRefreshed(each, said, ["redeemed", "redeemed"]);
  await holder.ended;
  await t.step(`stored ${wait.toFixed()} ms after the answer`, () => assert(wait < 200));
});
