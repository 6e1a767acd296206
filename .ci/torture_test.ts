/**
 * A login is never lost and never redeemed twice: the executable is killed at each of its system calls, meets a failing
 * disk at each call that touches a file, finds what killed runs left, comes in crowds, and writes beside others who write.
 *
 * @module
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { DatabaseSync } from "node:sqlite";
import {
  ALL_AT_ONCE,
  attempt,
  type Call,
  callsOf,
  cases,
  each,
  type Ending,
  IN_PLACE,
  inode,
  LIMIT_MS,
  median,
  pause,
  REMAINS,
  Scene,
  type Step,
  strace,
  table,
  textOf,
  tokenIn,
  until,
} from "./scene.ts";

// Crashes -------------------------------------------------------------------------------------------------------------

/** What a crash left: the old token unspent; the answer on the disk; or neither, since it came in the gap. */
type Fate = "before" | "survived" | "gap";

/**
 * Judges what a crash left, by the ledger and the disk alone, and starts again. In the gap the answer died with the
 * process. Servers that accept a repeat save even that, so there the next start has to ask again.
 */
async function recover(scene: Scene, said: string): Promise<Fate> {
  const { mock, old, asked } = scene;
  const spent = mock.state(old.refresh_token) === "spent";
  const fate = !spent ? "before" : scene.filesWith(scene.newest).length > 0 ? "survived" : "gap";
  if (fate !== "survived") scene.assertTheirs(said);
  mock.graceMilliseconds = fate === "gap" ? Infinity : 0;
  const again = await scene.once();
  const all = `${said}\nthen: ${again.code} ${again.said}`;
  assert(again.code === 0 || again.code === 1, all);
  const more = { before: ["redeemed"], survived: [], gap: ["repeated"] };
  scene.assertRefreshed(all, [...asked, ...more[fate]]);
  return fate;
}

/** Counts fates, and tells of them. */
function tally() {
  const fates: Record<Fate, number> = { before: 0, survived: 0, gap: 0 };
  const told = () =>
    `${fates.survived} survived, ${fates.before} before the request was answered, ${fates.gap} in the gap`;
  return { fates, told };
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
  const shell = scene.start(["--once"], {}, ["sh", "-c", held, "-"]);
  await shell.said(/^pid \d+\n/);
  const pid = Number(/^pid (\d+)/.exec(shell.stderr())?.[1]);
  await until(() => / T /.test(textOf(`/proc/${pid}/stat`)));
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

/**
 * Kills attempts at each system call from the `first` on, each in a scene of its own. No two attempts make quite the same
 * calls, so it is over when so many of them came to their end.
 */
async function killEverywhere(first: number, ends: number, arrange: (scene: Scene) => Promise<unknown>) {
  const { fates, told } = tally();
  let finished = 0;
  const numbers = function* () {
    for (let nth = first; finished < ends; nth++) yield nth;
  };
  await each(numbers(), async (nth) => {
    await using scene = await Scene.open();
    await arrange(scene);
    const { calls, said } = await killAt(nth, scene);
    const fate = await recover(scene, `killed at call ${nth}: ${said}`);
    if (calls < nth) finished++;
    else fates[fate]++;
  });
  const killed = fates.before + fates.survived + fates.gap;
  return { ...fates, killed, told: `killed at each of ${killed} system calls: ${told()}` };
}

/** The calls of one attempt, and those among them that matter. */
async function study() {
  await using scene = await Scene.open();
  const { code, said } = await scene.once({}, ["strace", "-f", "-y", "-s", "32", "-o", scene.trace]);
  assertEquals(code, 0, said);
  const calls = callsOf(textOf(scene.trace));
  const find = (name: RegExp, text: string, from = 0) => {
    const at = calls.findIndex((call, index) => index > from && name.test(call.name) && call.text.includes(text));
    assert(at > 0, `no ${name} of ${text}`);
    return at;
  };
  const first = find(/./, scene.home);
  const sent = find(/^(send|write)/, "POST /", first);
  const stored = find(/^p?write/, `<${scene.home}/`, sent);
  const read = calls.findLastIndex(({ name, text }, index) =>
    index < stored && /^(recv|read)/.test(name) && /<(socket|TCP)/.test(text)
  );
  assert(read > sent, `${first} ${sent} ${read} ${stored}`);
  return { scene, calls, find, first, sent, read, stored };
}

/** Touches a file, rather than memory, a thread, a socket or the clock. */
const isOfFile = ({ name, text }: Call) => /^\w+\((\d+<\/|AT_FDCWD|"\/)/.test(text) && !/^(execve|getcwd)$/.test(name);

Deno.test("from the answer to its write no call of ours is in the way, and the disk has it before the rename", async (t) => {
  const { scene, calls, find, sent, read, stored } = await study();
  // Without what the engine looks up of itself: it may collect its garbage at any time.
  const between = calls.slice(read + 1, stored).filter(({ text }) => !/[<"]\/proc\/(self|\d+)\/statm[>"]/.test(text));
  const ours = between.filter((call) => isOfFile(call) || /^\w+\(\d+<pipe:/.test(call.text));
  assertEquals(ours.map(({ text }) => text), []);
  const [, room = ""] = /<(.*?)>/.exec(calls[stored]!.text) ?? [];
  const laid = find(/^rename/, `"${room}"`);
  const [, fresh = ""] = /"(.*?)"/.exec(calls[laid]!.text) ?? [];
  assert(find(/^f(data)?sync$/, `<${fresh}>`) < laid, "the room for the answer is on the disk before it gets its name");
  assert(find(/^f(data)?sync$/, `<${scene.home}>`, laid) < sent, "and both are before the token is spent");
  const renamed = find(/^rename/, `"${scene.auth}"`);
  assert(find(/^f(data)?sync$/, `<${room}>`, stored) < renamed, "the answer is on the disk before it gets its name");
  find(/^f(data)?sync$/, `<${scene.home}>`, renamed);
  const { length } = between.filter(({ thread }) => thread === calls[stored]!.thread);
  await t.step(`${length} calls of its thread from the answer to its write`, () => assert(length < 30));
});

Deno.test("killed at any system call it loses nothing but in the gap", async (t) => {
  const { before, survived, gap, told } = await killEverywhere(1, 10, async () => {});
  await t.step(told, () => assert(survived > 50 && before > 100 && gap > 0 && gap < 60));
});

Deno.test("one error of the disk, at any call, costs nothing", async (t) => {
  const { calls, first } = await study();
  const touching = calls.slice(first).filter(isOfFile);
  // strace counts the calls of a name for each thread by itself: that a file is told apart gets at those of which another
  // thread has had as many before.
  const begun = (name: string) => calls.slice(0, first).filter((call) => call.name === name).length;
  const paths: ((scene: Scene) => string[])[] = [
    () => [],
    (scene) => [scene.home],
    (scene) => [scene.journal()],
    (scene) => [`${scene.journal()}.new`],
  ];
  const series = [...new Set(touching.map(({ name }) => name))].flatMap((name) =>
    paths.flatMap((path) => ["ENOSPC", "EIO", "EACCES"].map((error) => ({ name, path, error })))
  );
  const { fates, told } = tally();
  await each(series, async ({ name, path, error }) => {
    for (let nth = path === paths[0] ? 1 + begun(name) : 1, met = true; met; nth++) {
      await using scene = await Scene.open();
      const { code, said } = await scene.once({}, strace(scene, `${name}:error=${error}:when=${nth}`, ...path(scene)));
      met = textOf(scene.trace).includes("(INJECTED)");
      const story = `${error} at ${name} (number ${nth}) of ${path(scene)}: ${code} ${said}`;
      const fate = await recover(scene, story);
      if (met) fates[fate]++;
      assert(fate !== "gap", `lost: ${story}`);
    }
  });
  const errors = fates.survived + fates.before;
  await t.step(
    `${errors} errors at ${touching.length} calls: ${told()}`,
    () => assert(errors > 3 * touching.length && fates.survived > 100 && fates.before > 50),
  );
});

// What killed runs left -----------------------------------------------------------------------------------------------

/** Files beside auth.json that a run left which was killed, given the answer's document. */
interface Left {
  readonly leave: (scene: Scene, answer: string) => void;
  /** Whether the answer is among them, and whether one had come. */
  readonly kept: boolean;
  readonly spent: boolean;
}

const ROOM = "\n".repeat(1 << 17);
const half = (text: string) => text.slice(0, text.length / 2);
const left = (kept: boolean, spent: boolean, leave: Left["leave"]): Left => ({ kept, spent, leave });

const LEFT: Record<string, Left> = {
  "nothing": left(false, false, () => {}),
  "a journal without a byte": left(false, false, (scene) => scene.write("", scene.journal())),
  "room only": left(false, false, (scene) => scene.write(ROOM, scene.journal())),
  "room that never got its name": left(false, false, (scene) => scene.write(ROOM, `${scene.journal()}.new`)),
  "half an answer": left(false, true, (scene, answer) => scene.write(half(answer) + ROOM, scene.journal())),
  "an answer with room behind it": left(true, true, (scene, answer) => scene.write(answer + ROOM, scene.journal())),
  "a whole answer": left(true, true, (scene, answer) => scene.write(answer, scene.journal())),
  "an answer that was being replaced": left(true, true, (scene, answer) => {
    scene.write(answer, scene.journal());
    scene.write(half(answer), `${scene.journal()}.new`);
  }),
  "an answer that never got its name": left(true, true, (scene, answer) => {
    scene.write(half(answer), scene.journal());
    scene.write(answer, `${scene.journal()}.new`);
  }),
};

/** An auth.json as the next start finds it: how that ends, beside an answer or without one, and what is said of a skip. */
interface Found {
  readonly make: Step;
  readonly ends: [withAnswer: Ending, without: Ending];
  readonly skips?: RegExp;
}

const cutOff = ([what, text]: [string, string]): [string, Found] => [what, {
  make: (scene) => scene.write(text),
  ends: ["rolled forward", "nothing to do"],
  skips: text === "" ? /^skip:no_auth_json/ : /^skip unreadable:\w+Error$/,
}];

const FOUND: Record<string, Found> = {
  "whole": { make: ":", ends: ["rolled forward", "refreshed"] },
  "with another field": {
    make: (scene) => scene.write(scene.withField("added")),
    ends: ["rolled forward", "refreshed"],
  },
  ...Object.fromEntries(Object.entries(REMAINS).map(cutOff)),
  "absent": {
    make: "rm home/auth.json",
    ends: ["nothing to do", "nothing to do"],
    skips: /^skip:no_auth_json/,
  },
  "of another login": {
    make: (scene) => scene.write(scene.otherLogin()),
    ends: ["nothing to do", "nothing to do"],
    skips: /^skip fresh/,
  },
  "of another login, slow to be written": {
    make(scene) {
      const other = scene.otherLogin();
      scene.write("");
      scene.later(pause(2500).then(() => scene.write(other)));
    },
    ends: ["nothing to do", "nothing to do"],
    skips: /^skip/,
  },
};

/** No live token is lost and no dead one kept, and nothing is left beside auth.json. */
function assertClean(scene: Scene, said: string) {
  const kept = scene.look().match(/rt_[\w-]{48}/g) ?? [];
  assertEquals(kept.map((token) => scene.mock.state(token)), kept.map(() => "unspent"), said);
  const names = [...Deno.readDirSync(scene.home)].map(({ name }) => name);
  assertEquals(names.filter((name) => !/^auth(\.json|_refresh\.lock|_refresh_status\.json)$/.test(name)), [], said);
}

const beside = Object.entries(FOUND).flatMap(([auth, found]) =>
  Object.entries(LEFT).map(([what, left]) => [`auth.json ${auth} beside ${what}`, { found, left }] as const)
);

table("whatever a killed run left, the next one loses no login and asks no second time", {
  ...Object.fromEntries(beside),
}, async ({ found, left: { leave, kept, spent } }) => {
  await using scene = await Scene.open();
  scene.mock.graceMilliseconds = Infinity; // what is asked again is seen to be
  leave(scene, spent ? await scene.redeem() : "");
  await scene.do(found.make);
  const { theirs } = scene;
  const ended = await scene.once();
  const ending = found.ends[kept ? 0 : 1];
  scene.assertEnded(ending, ended, ending === "refreshed" && spent ? ["repeated"] : undefined);
  assertClean(scene, ended.said);
  if (ending === "nothing to do") assertMatch(scene.status, found.skips!, ended.said);
  const added = theirs.includes('"added"') ? [1, "kept"] : undefined;
  if (ended.code === 0) assertEquals(JSON.parse(textOf(scene.auth)).added, added, ended.said);
}, 16);

table("a journal is of no use for another login, which is due itself", LEFT, async ({ leave, spent }) => {
  await using scene = await Scene.open();
  leave(scene, spent ? await scene.redeem() : "");
  scene.write(scene.otherLogin({ accessTokenSeconds: -5 }));
  const token = tokenIn(scene.theirs);
  const { code, said } = await scene.once();
  assertEquals([code, scene.status, scene.asked], [0, "refreshed null", ["redeemed"]], said);
  assertEquals([scene.mock.state(token), tokenIn(textOf(scene.auth))], ["spent", scene.mock.newest(token)], said);
  assertClean(scene, said);
});

Deno.test("killed at any system call while it finishes what a killed run left it loses nothing", async (t) => {
  const { first } = await study();
  for (const [what, { kept, leave }] of Object.entries(LEFT)) {
    if (!kept) continue;
    const inPlace = what === "a whole answer";
    const { survived, killed, told } = await killEverywhere(first - 10, 4, async (scene) => { // before that it only starts
      leave(scene, await scene.redeem());
      if (!inPlace) return;
      scene.env = IN_PLACE;
      Deno.linkSync(scene.auth, `${scene.root}/second`);
    });
    await t.step(`${what}${inPlace ? ", in place" : ""}: ${told}`, () => {
      assertEquals(survived, killed);
      assert(killed > 50);
    });
  }
});

// Crowds --------------------------------------------------------------------------------------------------------------

const CROWD = 20;

/** Copies of `--once`, the last one under strace: it tells when it is refused the lock. */
function crowd(scene: Scene, count = CROWD) {
  const watch = ["strace", "-f", "-qq", "-e", "trace=fcntl", "-e", "status=failed"];
  const copies = Array.from({ length: count - 1 }, () => scene.start());
  const watched = scene.start(["--once"], {}, watch);
  const refused = (times: number) => watched.said(/EAGAIN/, { times });
  const codes = async () => {
    const ended = await Promise.all([...copies, watched].map(({ ended }) => ended));
    const said = ended.map(({ code, said }) => `${code} ${said}`).join("\n");
    return { codes: ended.map(({ code }) => code), said };
  };
  return { refused, codes };
}

Deno.test("twenty attempts and two loops at once redeem a token once, in each of 20 rounds", async () => {
  for (let round = 0; round < 20; round++) {
    await using scene = await Scene.open();
    const loops = [1, 2].map(() => scene.start([]));
    const { codes, said } = await crowd(scene).codes();
    await Promise.all(loops.map((loop) => loop.said(/next check in/)));
    loops.forEach((loop) => loop.kill("SIGTERM"));
    const ends = await Promise.all(loops.map(({ ended }) => ended));
    const all = [said, ...ends.map(({ said }) => said)].join("\n");
    assertEquals(ends.map(({ code }) => code), [0, 0], all);
    assertEquals(codes.filter((code) => code !== 0 && code !== 1), [], all);
    scene.assertRefreshed(all);
  }
});

Deno.test("a crowd whose lock holder is killed goes on at once", async (t) => {
  const waits: number[] = [];
  for (let round = 0; round < 5; round++) {
    await using scene = await Scene.open();
    scene.mock.next({ kind: "hang" }); // nothing is redeemed, and the holder waits
    const asked = scene.meanwhile();
    const holder = scene.start();
    await asked;
    const waiting = crowd(scene);
    await waiting.refused(3);
    assertEquals(scene.asked.length, 1);
    const again = scene.meanwhile();
    holder.kill("SIGKILL");
    const killed = performance.now();
    await again;
    waits.push(performance.now() - killed);
    const { codes, said } = await waiting.codes();
    assertEquals(codes.toSorted(), [0, ...Array(CROWD - 1).fill(1)], said);
    scene.assertRefreshed(said, ["other", "redeemed"]);
    await holder.ended;
  }
  await t.step(
    `the next request came ${median(waits).toFixed()} ms after the kill (median of ${waits.length})`,
    () => assert(Math.max(...waits) < 1000, `${waits}`),
  );
});

/** How an attempt is stopped whose token is redeemed, as a paused container or a suspended machine, and goes on. */
const STOPPED: Record<string, (scene: Scene) => Promise<void>> = {
  "for longer than it waits for an answer": () => pause(32_000),
  async "with a crowd behind it, which waits"(scene) {
    const waiting = crowd(scene);
    const over = waiting.codes().then(() => true);
    await until(() => scene.mock.requests[0]?.status === 200);
    await waiting.refused(20);
    assertEquals(scene.asked.length, 1);
    assertEquals(await Promise.race([over, Promise.resolve(false)]), false, "nobody gives up");
    scene.later(waiting.codes().then(({ codes, said }) => assertEquals(codes, Array(CROWD).fill(1), said)));
  },
};

table("an attempt that is stopped takes the answer that is there when it goes on", STOPPED, async (meanwhile) => {
  await using scene = await Scene.open();
  scene.mock.next({ kind: "delay", milliseconds: 500 }); // the answer finds a stopped process
  const asked = scene.meanwhile();
  const process = scene.start();
  await asked;
  process.kill("SIGSTOP");
  await meanwhile(scene);
  process.kill("SIGCONT");
  const { code, said } = await process.ended;
  await scene.settled();
  assertEquals(code, 0, said);
  scene.assertRefreshed(said);
});

// Waiting for the lock ------------------------------------------------------------------------------------------------

/** Holds a lock file as another copy would, until it is closed. */
function hold(path: string): DatabaseSync {
  const database = new DatabaseSync(path);
  database.exec("BEGIN EXCLUSIVE");
  return database;
}

/** An attempt that finds the lock held, once it has been refused it a few times. */
async function waiter(scene: Scene, ...inject: string[]) {
  const watch = "strace -f -qq -e trace=fcntl,openat -e status=failed -P".split(" ");
  const shell = ["sh", "-c", 'echo pid $$ >&2; exec "$@"', "-"];
  const process = scene.start(["--once"], {}, [...watch, `${scene.home}/auth_refresh.lock`, ...inject, ...shell]);
  const refused = (times: number) => process.said(/fcntl.*EAGAIN/, { times });
  await refused(3);
  return { process, refused, pid: Number(/pid (\d+)/.exec(process.stderr())?.[1]) };
}

Deno.test("a SIGTERM ends the wait for the lock at once, without a request", async () => {
  await using scene = await Scene.open();
  const lock = hold(`${scene.home}/auth_refresh.lock`);
  const { process, pid } = await waiter(scene);
  const limit = setTimeout(() => Deno.kill(pid, "SIGKILL"), 2000);
  Deno.kill(pid, "SIGTERM");
  const { code, signal, said } = await process.ended;
  clearTimeout(limit);
  lock.close();
  assertEquals([code, signal, scene.asked], [2, null, []], said);
  scene.assertTheirs(said);
});

Deno.test("a login that comes while an attempt waits for the lock is not its to redeem, stale or not", async () => {
  await using scene = await Scene.open();
  const lock = hold(`${scene.home}/auth_refresh.lock`);
  const { process } = await waiter(scene);
  scene.write(scene.otherLogin({ accessTokenSeconds: -3600 }));
  lock.close();
  scene.assertEnded("superseded", await process.ended, []);
});

// The lock file is replaced, by one that a later copy holds, between the waiter's opening and its locking of the old one.
Deno.test("an attempt that gets a lock whose file was replaced goes on waiting", async () => {
  await using scene = await Scene.open();
  const path = `${scene.home}/auth_refresh.lock`;
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
  assertEquals(scene.asked, [], process.stderr());
  later.close();
  scene.assertEnded("refreshed", await process.ended);
});

table("while one home waits for its lock another's answer is stored at once", {
  "--once": ["--once"],
  "the loop": [],
}, async (args) => {
  await using scene = await Scene.open();
  await using other = await Scene.open(scene.mock);
  const { mock } = scene;
  const lock = hold(`${scene.home}/auth_refresh.lock`);
  mock.next({ kind: "delay", milliseconds: 1000 }); // the first home is at its lock by then
  const process = scene.start([...args, scene.home, other.home]);
  await until(() => mock.requests[0]?.status === 200);
  const answered = performance.now();
  await until(() => textOf(other.auth).includes(other.newest));
  const wait = performance.now() - answered;
  scene.assertTheirs(process.stderr());
  assertEquals(mock.requests.length, 1);
  lock.close();
  await until(() => [scene, other].every(({ status }) => status.startsWith("refreshed")));
  if (args.length === 0) process.kill("SIGTERM");
  const { code, said } = await process.ended;
  assertEquals(code, 0, said);
  for (const each of [scene, other]) each.assertRefreshed(said, ["redeemed", "redeemed"]);
  assert(wait < 200, `${wait} ms`);
  return `stored ${wait.toFixed()} ms after the answer`;
}, 1);

// Other writers -------------------------------------------------------------------------------------------------------

/** A disk that is slow to sync the home, while somebody else waits for a moment to act. */
const slowly = (scene: Scene) => strace(scene, "fsync,fdatasync:delay_enter=300000", scene.home);

/** Does something as soon as a condition holds. */
const when = (scene: Scene, condition: () => boolean, act: () => void) => scene.later(until(condition).then(act));

/** While it is proven that an answer could be stored: room for it is there, and no request. */
const duringTheProof = (scene: Scene, act: () => void) =>
  when(scene, () => scene.asked.length === 0 && scene.journals().length > 0, act);

cases("whatever somebody else writes meanwhile stays", {
  "another login in auth.json's place right after the rename": {
    arrange(scene) {
      const before = inode(scene.auth);
      when(scene, () => inode(scene.auth) !== before, () => { // now the folder is synced
        scene.theirs = scene.otherLogin();
        scene.write(scene.theirs, `${scene.root}/theirs`);
        Deno.renameSync(`${scene.root}/theirs`, scene.auth);
      });
    },
    under: slowly,
    ends: "superseded",
  },
  "another login once the answer, carried over, is about to be renamed": {
    arrange(scene) {
      const carried = () => attempt(() => textOf(scene.journal()))?.includes('"theirs"') === true;
      when(scene, carried, () => scene.write(scene.otherLogin())); // now the folder is synced
    },
    meanwhile: (scene) => scene.write(scene.withField("theirs")),
    under: slowly,
    ends: "superseded",
  },
}, ALL_AT_ONCE);

table(
  "what happens while it is proven that an answer could be stored stops the request",
  {
    "another login": {
      act: (scene: Scene) => scene.write(scene.otherLogin()),
      ends: "superseded",
      says: "superseded",
    },
    "the loss of the lock file": {
      act: (scene: Scene) => Deno.removeSync(`${scene.home}/auth_refresh.lock`),
      ends: "not started",
      says: "auth_refresh.lock was removed or replaced while it was held",
    },
  } as const,
  async ({ act, ends, says }) => {
    await using scene = await Scene.open();
    duringTheProof(scene, () => act(scene));
    const ended = await scene.once({}, slowly(scene));
    scene.assertEnded(ends, ended, []);
    assert(ended.said.includes(says), ended.said);
  },
);

Deno.test("a SIGTERM while it is proven that an answer could be stored leaves the token unspent", async () => {
  await using scene = await Scene.open();
  duringTheProof(scene, () => {
    const { pid } = scene.running; // strace's
    Deno.kill(Number(textOf(`/proc/${pid}/task/${pid}/children`).split(" ")[0]), "SIGTERM");
  });
  const { code, said } = await scene.once({}, slowly(scene));
  assertEquals([code, scene.asked, scene.journals()], [2, [], []], said);
  scene.assertTheirs(said);
});

table(
  "a look at auth.json that fails for want of descriptors is not taken for another login",
  Object.fromEntries(Array.from({ length: 16 }, (_, index) => [`the ${index + 1}. one`, index + 1])),
  async (nth) => {
    await using scene = await Scene.open();
    const { said } = await scene.once({}, strace(scene, `openat:error=EMFILE:when=${nth}`, scene.auth));
    assert(!said.includes("superseded"), said);
    await scene.once();
    assertEquals([tokenIn(textOf(scene.auth)), scene.asked], [scene.newest, ["redeemed"]], said);
    return said.includes("EMFILE") ? "told" : undefined;
  },
);
