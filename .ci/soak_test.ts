/**
 * The executable's loop in real time: stopped and continued, its clock moved, logins that appear and die, a thousand
 * homes at once, twenty thousand attempts in a row, and what it costs to wait. Nearly all of that is waiting, so all of
 * it waits at the same time; only the sweeps, whose seconds count, run before and by themselves.
 *
 * @module
 */
import { assert, assertEquals } from "@std/assert";
import { join, resolve } from "node:path";
import { DatabaseSync } from "node:sqlite";
import { authJson, type Behaviour, type MockOptions, type MockServer, startMockServer } from "../mock_server.ts";

const EXE = Deno.env.get("CAR_EXE") ?? resolve(import.meta.dirname!, "../dist/codex_auth_refresh");
const SECOND = 1000;
const DAY = 86_400;
const PROMPT = 60; // seconds: what "within a minute" is
const SWEEPS = [1, 10, 100, 1000];
const IDLE_SECONDS = 65;
const QUIET_SECONDS = 91; // two steps of the loop, and some
const ATTEMPTS = 20_000;
const IN_FLIGHT = 8;

const scratch = await Deno.makeTempDir({ prefix: "soak_" });
addEventListener("unload", () => Deno.removeSync(scratch, { recursive: true }));
const sleep = (seconds: number) => new Promise<void>((resolve) => setTimeout(resolve, seconds * SECOND));

/** Until `found` is true; an error that says what was waited for if that takes too long. */
async function until(what: string, seconds: number, found: () => boolean): Promise<number> {
  const began = performance.now();
  const passed = () => (performance.now() - began) / SECOND;
  for (; !found(); await sleep(0.02)) assert(passed() < seconds, `not within ${seconds} s: ${what}`);
  return passed();
}

// Homes and processes ------------------------------------------------------------------------------------------------

function home(name: string, text?: string): string {
  const dir = join(scratch, name);
  Deno.mkdirSync(dir, { recursive: true });
  if (text !== undefined) write(dir, text);
  return dir;
}

/** As the Codex CLI logs in: a new file in the old one's place. */
function write(dir: string, text: string): void {
  Deno.writeTextFileSync(join(dir, "new"), text, { mode: 0o600 });
  Deno.renameSync(join(dir, "new"), join(dir, "auth.json"));
}

/** The text of a login of this server; negative seconds give an expired one, which is due at once. */
const login = (mock: MockServer, accessTokenSeconds: number) => authJson(mock.login({ accessTokenSeconds }));
/** A login that the server knows nothing of, and so calls dead. */
const dead = () =>
  authJson({ id_token: "", access_token: "", refresh_token: `rt_${crypto.randomUUID()}` }, new Date(0));

/** Homes of each kind in turn: fresh, due, broken, dead, not a ChatGPT login, without any. */
function mixed(mock: MockServer, name: string, count: number): string[] {
  const kinds: (() => string | undefined)[] = [
    () => login(mock, 10 * DAY),
    () => login(mock, -DAY),
    () => "{",
    dead,
    () => '{"auth_mode":"apikey","OPENAI_API_KEY":"sk-none"}',
    () => undefined,
  ];
  return Array.from({ length: count }, (_, index) => home(`${name}/${index}`, kinds[index % kinds.length]!()));
}

/** null where it throws. */
function attempt<T>(what: () => T): T | null {
  try {
    return what();
  } catch {
    return null;
  }
}

/** What the status file says of the last attempt, "" where there was none. */
const outcome = (dir: string): string =>
  JSON.parse(attempt(() => Deno.readTextFileSync(join(dir, "auth_refresh_status.json"))) ?? "{}")
    .watchdog_last_outcome ?? "";

/** A watchdog at work. */
class Watchdog implements AsyncDisposable {
  readonly lines: string[] = [];
  readonly child: Deno.ChildProcess;
  readonly #read: Promise<void>;

  constructor(mock: MockServer, args: string[], more: Record<string, string> = {}) {
    const env = { CODEX_REFRESH_TOKEN_URL_OVERRIDE: mock.url, ...more };
    const streams = { stdin: "null", stdout: "null", stderr: "piped" } as const;
    this.child = new Deno.Command(EXE, { args, clearEnv: true, env, ...streams }).spawn();
    this.#read = this.#collect();
  }
  async #collect() {
    let rest = "";
    for await (const text of this.child.stderr.pipeThrough(new TextDecoderStream())) {
      const lines = (rest + text).split("\n");
      rest = lines.pop() ?? "";
      this.lines.push(...lines);
    }
  }
  /** Seconds until a line says so, lines of before `from` aside. */
  async says(pattern: RegExp, seconds: number, from = 0): Promise<number> {
    try {
      return await until(`${pattern}`, seconds, () => this.lines.slice(from).some((line) => pattern.test(line)));
    } catch (error) {
      throw new Error(`${(error as Error).message}, but:\n${this.lines.slice(-12).join("\n")}`);
    }
  }
  async [Symbol.asyncDispose]() {
    this.child.kill("SIGTERM");
    const hard = setTimeout(() => this.child.kill("SIGKILL"), 10 * SECOND);
    await this.child.status;
    clearTimeout(hard);
    await this.#read;
  }
}

/** Sizes in KiB, `cpu` in milliseconds, wake-ups by thread. */
function taken(pid: number) {
  const read = (path: string) => Deno.readTextFileSync(`/proc/${pid}/${path}`);
  const field = (text: string, name: string) => Number(RegExp(`^${name}:\\s+(\\d+)`, "m").exec(text)?.[1] ?? 0);
  const memory = read("smaps_rollup");
  const wakeups: Record<string, number> = {};
  for (const { name } of Deno.readDirSync(`/proc/${pid}/task`)) {
    try {
      const thread = name === `${pid}` ? "main" : `${read(`task/${name}/comm`).trim()} ${name}`;
      wakeups[thread] = field(read(`task/${name}/status`), "voluntary_ctxt_switches");
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error; // a thread that has ended meanwhile
    }
  }
  // After the name, which may hold spaces: fields 14 and 15 of proc(5), user and system time in hundredths of a second.
  const ticks = read("stat").replace(/^.*\) /s, "").split(" ").slice(11, 13);
  return {
    resident: field(memory, "Rss"),
    anonymous: field(memory, "Anonymous"),
    files: [...Deno.readDirSync(`/proc/${pid}/fd`)].length,
    cpu: ticks.reduce((sum, each) => sum + 10 * Number(each), 0),
    wakeups,
  };
}

/** Runs at once, beside all the others, and is judged when its turn comes. */
function scenario(name: string, body: () => Promise<void>): void {
  const done = body();
  done.catch(() => {}); // the test below tells
  Deno.test({ name, fn: () => done, sanitizeOps: false, sanitizeResources: false });
}

async function server(options: MockOptions = {}): Promise<MockServer & AsyncDisposable> {
  const mock = await startMockServer(options);
  return Object.assign(mock, { [Symbol.asyncDispose]: () => mock.close() });
}

// A thousand homes ---------------------------------------------------------------------------------------------------

async function sweep(count: number) {
  let [now, most, hangs] = [0, 0, 0];
  const mock = await server({ onAnswer: (seen) => void (seen.behaviour === "hang" || now--) });
  const homes = mixed(mock, `${count}`, count);
  const hanging = count === 1000 ? home(`${count}/hanging`, login(mock, -DAY)) : "";
  if (hanging) homes[0] = hanging;
  const slow = hanging && JSON.parse(Deno.readTextFileSync(join(hanging, "auth.json"))).tokens.refresh_token;
  mock.onRequest = () => {
    const hang = hangs === 0 && slow !== "" && mock.lastRequestBody().includes(slow);
    hang ? hangs++ : now++;
    most = Math.max(most, now + hangs);
    mock.next(hang ? { kind: "hang" } : { kind: "delay", milliseconds: 20 });
  };
  const dog = new Watchdog(mock, homes);
  const waiting = new Set(homes.filter((dir) => dir !== hanging));
  const seconds = await until(`a sweep of ${count} homes`, 2 * PROMPT, () => {
    for (const dir of waiting) if (outcome(dir) !== "") waiting.delete(dir);
    return waiting.size === 0;
  });
  return { dog, homes, mock, hanging, seconds, inFlight: () => most };
}

const sweeps: Awaited<ReturnType<typeof sweep>>[] = [];
for (const count of SWEEPS) sweeps.push(await sweep(count));

scenario("a thousand homes, one of them hanging, are all looked after in one sweep", async () => {
  const table: Record<string, Record<string, number | string>> = {};
  const [bash, nap] = await shellLoop();
  const costs = sweeps.map(async ({ dog, homes, hanging, seconds }) => {
    // The one that hangs is given up after half a minute, asked again, and answered.
    if (hanging) await until("the hanging one", 2 * PROMPT, () => outcome(hanging) === "refreshed");
    await sleep(5);
    const before = taken(dog.child.pid);
    await sleep(IDLE_SECONDS);
    const after = taken(dog.child.pid);
    table[homes.length] = {
      "sweep, s": +seconds.toFixed(2),
      "resident, MiB": Math.round(after.resident / 1024),
      "anonymous, MiB": +(after.anonymous / 1024).toFixed(1),
      "files": after.files,
      "CPU s/day": +((after.cpu - before.cpu) / SECOND * DAY / IDLE_SECONDS).toFixed(0),
      "as many shell loops: anonymous, MiB": +(homes.length * (bash + nap) / 1024).toFixed(1),
    };
  });
  await Promise.all(costs);
  console.log(
    `homes in one process; CPU of ${IDLE_SECONDS} s in steps of 10 ms, ${DAY / 100 / IDLE_SECONDS | 0} s a day`,
  );
  console.table(table);
  const most = Math.max(...sweeps.map(({ inFlight }) => inFlight()));
  console.log(`at most ${most} requests in flight`);
  for (const { dog, homes, mock } of sweeps) {
    assert(homes.every((dir) => outcome(dir) !== ""), "a home without an outcome");
    assert(taken(dog.child.pid).files < 64, "files left open");
    await dog[Symbol.asyncDispose]();
    await mock.close();
  }
  assert(most <= IN_FLIGHT, `${most} requests in flight`);
});

/** Anonymous memory in KiB of bash in a loop, and of its sleep. */
async function shellLoop(): Promise<[number, number]> {
  const script = "while :; do sleep 21600 & echo $!; wait; done";
  const shell = new Deno.Command("bash", { args: ["-c", script], stdout: "piped" }).spawn();
  const { value } = await shell.stdout.getReader().read();
  const nap = Number(new TextDecoder().decode(value));
  await until("sleep", 10, () => Deno.readTextFileSync(`/proc/${nap}/comm`) === "sleep\n");
  const sizes: [number, number] = [taken(shell.pid).anonymous, taken(nap).anonymous];
  for (const pid of [shell.pid, nap]) Deno.kill(pid, "SIGKILL");
  await shell.status;
  return sizes;
}

// Real time ----------------------------------------------------------------------------------------------------------

scenario("a process that was stopped over its deadline acts as soon as it goes on", async () => {
  await using mock = await server();
  await using dog = new Watchdog(mock, [home("stopped", login(mock, 14_400 + 6))]);
  await dog.says(/next check in \d s/, 10);
  dog.child.kill("SIGSTOP");
  await sleep(8);
  assertEquals(mock.requests.length, 0);
  dog.child.kill("SIGCONT");
  console.log(`SIGCONT: refreshed after ${(await dog.says(/refresh: ok/, PROMPT)).toFixed(2)} s`);
});

scenario("a clock that is moved by a day, either way, delays nothing", async () => {
  const library = ["x86_64", "aarch64"].map((cpu) => `/usr/lib/${cpu}-linux-gnu/faketime/libfaketime.so.1`)
    .find((path) => attempt(() => Deno.statSync(path)) !== null);
  if (library === undefined) return console.log("clock: not moved, for want of Debian's libfaketime");
  await using mock = await server();
  const control = join(scratch, "clock");
  const set = (offset: string) => Deno.writeTextFileSync(control, offset);
  set("+0d");
  const fake = {
    LD_PRELOAD: library,
    FAKETIME_TIMESTAMP_FILE: control,
    FAKETIME_NO_CACHE: "1",
    FAKETIME_DONT_FAKE_MONOTONIC: "1",
    NO_FAKE_STAT: "1",
  };
  await using ahead = new Watchdog(mock, [home("ahead", login(mock, DAY))], fake);
  const short = { ...fake, CODEX_AUTH_REFRESH_INTERVAL_SECONDS: "20" };
  await using back = new Watchdog(mock, [home("back", login(mock, 10 * DAY))], short);
  await Promise.all([ahead, back].map((dog) => dog.says(/next check in/, 10)));
  assertEquals(mock.requests.length, 0);
  set("+1d");
  const forth = ahead.says(/refresh: ok/, PROMPT);
  await back.says(/next check in/, PROMPT, back.lines.length); // both have seen the new time
  const seconds = await forth;
  set("+0d");
  const early = await back.says(/no-op/, 22 + PROMPT, back.lines.length);
  console.log(
    `clock a day ahead: refreshed after ${seconds.toFixed(1)} s; a day back: a wait of 20 s took ${early.toFixed(1)} s`,
  );
});

scenario("a home whose disk hangs holds up neither another home nor the end", async () => {
  if (Deno.uid() !== 0) return console.log("disk that hangs: not tried, for want of root to strace with");
  await using mock = await server({ accessTokenSeconds: 3 });
  const [hung, well] = [home("hung", login(mock, 3)), home("well", login(mock, 3))] as const;
  const often = { CODEX_AUTH_REFRESH_INTERVAL_SECONDS: "1", CODEX_AUTH_SAFETY_MARGIN_SECONDS: "0" };
  const dog = new Watchdog(mock, [hung, well], often);
  await dog.says(RegExp(`${hung}\\] refresh: ok`), 20);
  // Calls on these two paths take four minutes, like those on a mount whose server is gone.
  const paths = [hung, join(hung, "auth.json")].flatMap((path) => ["-P", path]);
  const flags = ["-f", "-p", `${dog.child.pid}`, ...paths, "-e", "inject=all:delay_enter=240s", "-o", "/dev/null"];
  const strace = new Deno.Command("strace", { args: flags, stderr: "null" }).spawn();
  await dog.says(RegExp(`the disk under ${hung} does not answer`), PROMPT);
  await dog.says(RegExp(`${well}\\] refresh: ok`), PROMPT, dog.lines.length);
  dog.child.kill("SIGTERM");
  // What strace holds it keeps from the parent, and so is let go once there is nothing left of the process.
  const state = () =>
    /^State:\t(.)/m.exec(attempt(() => Deno.readTextFileSync(`/proc/${dog.child.pid}/status`)) ?? "")?.[1];
  const seconds = await until("the end", PROMPT, () => state() === "Z" || state() === undefined);
  strace.kill("SIGKILL");
  assertEquals((await dog.child.status).code, 0);
  await strace.status;
  console.log(`a disk that hangs: ended ${seconds.toFixed(0)} s after a SIGTERM`);
});

scenario("a command of the operator's has a minute, and is then ended with its children", async () => {
  await using mock = await server();
  const [dir, pid] = [home("slow_command", login(mock, -DAY)), join(scratch, "slow_command_pid")];
  await using dog = new Watchdog(mock, ["--exec", `sleep 999 & echo $! >${pid}; wait`, dir]);
  const seconds = await dog.says(/exec: event=refreshed failed \(it did not end in time\)/, 70);
  assert(seconds > 55, `${seconds} s`);
  await until(
    "its child is gone",
    10,
    () => attempt(() => Deno.statSync(`/proc/${Deno.readTextFileSync(pid).trim()}`)) === null,
  );
});

scenario("a login that appears is noticed within a minute, in whatever state its home was waiting", async () => {
  await using mock = await server();
  const none = home("none");
  const absent = join(scratch, "not", "yet");
  const spent = home("spent", dead());
  const portal = home("portal", login(mock, -DAY));
  mock.onRequest = () => {
    if (mock.lastRequestBody().includes(first)) mock.next({ kind: "status", status: 401 });
  };
  const first = JSON.parse(Deno.readTextFileSync(join(portal, "auth.json"))).tokens.refresh_token;
  await using dog = new Watchdog(mock, [none, absent, spent, portal]);
  for (const dir of [spent, portal]) await dog.says(RegExp(`${dir}\\] next check in`), 20);
  assertEquals(mock.requests.length, 2);
  Deno.mkdirSync(absent, { recursive: true });
  const homes = { none, absent, spent, portal };
  for (const dir of Object.values(homes)) write(dir, login(mock, -DAY));
  const delays = Object.entries(homes).map(async ([name, dir]) =>
    `${name} ${(await dog.says(RegExp(`${dir}\\] refresh: ok`), PROMPT)).toFixed(0)} s`
  );
  console.log(`a new login is used after: ${(await Promise.all(delays)).join(", ")}`);
  assertEquals(mock.requests.filter(({ outcome }) => outcome === "unknown").length, 1, "a dead token sent again");
  assertEquals(mock.requests.length, 6);
});

scenario("a login is noticed within a minute also where another home wakes the loop in between", async () => {
  await using mock = await server();
  const none = home("beside");
  await using dog = new Watchdog(mock, [none, home("busy", login(mock, 14_400 + 37))]);
  await dog.says(/busy\] next check in/, 10);
  await sleep(2);
  write(none, login(mock, -DAY));
  const seconds = await dog.says(/beside\] refresh: ok/, 2 * PROMPT);
  console.log(`beside another home: a new login is used after ${seconds.toFixed(0)} s`);
  assert(seconds <= PROMPT, `${seconds} s`);
});

scenario("an interval of thirty days sleeps, and SIGHUP looks at once", async () => {
  await using mock = await server();
  const env = { CODEX_AUTH_REFRESH_INTERVAL_SECONDS: `${30 * DAY}`, CODEX_AUTH_STALE_AFTER_SECONDS: `${90 * DAY}` };
  await using dog = new Watchdog(mock, [home("long", login(mock, 90 * DAY))], env);
  await dog.says(/next check in 3\d d/, 10);
  await sleep(2);
  const [lines, before] = [dog.lines.length, taken(dog.child.pid)];
  await sleep(50);
  const after = taken(dog.child.pid);
  assertEquals([dog.lines.length, mock.requests.length], [lines, 0]);
  assert(after.cpu - before.cpu < SECOND, "it spins");
  dog.child.kill("SIGHUP");
  const seconds = await dog.says(/no-op: fresh/, PROMPT, lines);
  console.log(
    `interval of 30 days: ${after.cpu - before.cpu} ms of CPU in 50 s; SIGHUP looks after ${seconds.toFixed(2)} s`,
  );
});

scenario("a login that is not ours to refresh is waited out, and SIGTERM ends it", async () => {
  await using mock = await server();
  const document = { ...JSON.parse(login(mock, -DAY)), auth_mode: "apikey" };
  await using dog = new Watchdog(mock, [home("inert", JSON.stringify(document))]);
  await dog.says(/no-op: auth_mode=apikey/, 10);
  await sleep(3);
  assert(dog.lines.length <= 6, `${dog.lines.length} lines in three seconds`);
});

scenario("an endpoint that never answers is given up after a minute and two requests", async () => {
  await using mock = await server();
  mock.always({ kind: "hang" });
  const dir = home("hangs", login(mock, -DAY));
  const began = performance.now();
  const { code } = await new Watchdog(mock, ["--once", dir]).child.status;
  const seconds = (performance.now() - began) / SECOND;
  assertEquals([code, outcome(dir), mock.requests.length], [2, "fail:transient_000", 2]);
  console.log(`an endpoint that never answers: given up after ${seconds.toFixed(1)} s`);
  assert(seconds >= 58 && seconds <= 70, `${seconds} s`);
});

scenario("an answer whose body drips is cut off after half a minute, though it moves", async () => {
  await using mock = await server();
  mock.graceMilliseconds = Infinity;
  mock.next({ kind: "drip", millisecondsPerByte: 100 }); // over a minute for all of it
  const dir = home("drips", login(mock, -DAY));
  const { code } = await new Watchdog(mock, ["--once", dir]).child.status;
  const [first, second] = mock.requests;
  const seconds = ((second?.at ?? NaN) - (first?.at ?? NaN)) / SECOND - 1; // and a second's pause
  assertEquals([code, outcome(dir), mock.requests.length], [0, "refreshed", 2]);
  console.log(`a body that drips: cut off after ${seconds.toFixed(1)} s`);
  assert(seconds >= 29.5 && seconds <= 34, `${seconds} s`);
});

scenario("a lock that is never free is waited for three minutes, without a request", async () => {
  await using mock = await server();
  const dir = home("locked", login(mock, -DAY));
  const lock = new DatabaseSync(join(dir, "auth_refresh.lock"));
  lock.exec("BEGIN EXCLUSIVE");
  const began = performance.now();
  const { code } = await new Watchdog(mock, ["--once", dir]).child.status;
  const seconds = (performance.now() - began) / SECOND;
  lock.close();
  assertEquals([code, outcome(dir), mock.requests.length], [2, "fail:locked", 0]);
  console.log(`a lock that is never free: given up after ${seconds.toFixed(1)} s`);
  assert(seconds >= 175 && seconds <= 190, `${seconds} s`);
});

// A soak -------------------------------------------------------------------------------------------------------------

scenario(`${ATTEMPTS} attempts of every kind leave memory and open files where they were`, async () => {
  await using mock = await server({ accessTokenSeconds: 2 }); // short lives: due again a second after each refresh
  const answers: (Behaviour | null)[] = [
    ...Array.from({ length: 6 }, () => null),
    ...[500, 503, 404, 401].map((status): Behaviour => ({ kind: "status", status })),
    { kind: "retry_after", value: "1" },
    { kind: "retry_after", value: new Date(0).toUTCString() },
    { kind: "html" },
    { kind: "raw", body: "[]" },
    { kind: "redirect", location: "http://127.0.0.1:9/" },
    { kind: "fields", fields: { id_token: undefined } },
  ];
  let asked = 0;
  mock.onRequest = () => mock.always(answers[asked++ % answers.length] ?? null);
  const homes = mixed(mock, "soak", 300);
  const began = performance.now();
  // With the memory of this machine the engine would put off collecting its garbage for longer than the test lasts. What
  // counts is what is left after a collection: the least in each thousand, beginning after the first.
  const env = { CODEX_AUTH_REFRESH_INTERVAL_SECONDS: "1", BUN_JSC_forceRAMSize: "50000000" };
  await using dog = new Watchdog(mock, homes, env);
  const samples: ReturnType<typeof taken>[] = [];
  for (let [lines, attempts] = [0, 0]; attempts < ATTEMPTS; await sleep(0.05)) {
    for (; lines < dog.lines.length; lines++) if (dog.lines[lines]?.includes("next check in")) attempts++;
    assert(performance.now() - began < 240 * SECOND, `${attempts} attempts only`);
    if (attempts < 1000) continue;
    const [thousand, now] = [Math.floor(attempts / 1000) - 1, taken(dog.child.pid)];
    if (now.anonymous < (samples[thousand]?.anonymous ?? Infinity)) samples[thousand] = now;
  }
  const outcomes = Map.groupBy(homes, outcome);
  const [first, last] = [samples[0]!, samples.at(-1)!];
  console.log(`${ATTEMPTS} attempts in ${((performance.now() - began) / SECOND).toFixed(0)} s, ${asked} requests;`);
  console.log(`ended with ${[...outcomes].map(([name, all]) => `${all.length} ${name}`).join(", ")}`);
  console.log(`anonymous MiB by thousand: ${samples.map((it) => (it.anonymous / 1024).toFixed(1)).join(" ")}`);
  console.log(`open files by thousand: ${samples.map((it) => it.files).join(" ")}`);
  assert(last.anonymous - first.anonymous <= 4096, `anonymous memory grew by ${last.anonymous - first.anonymous} KiB`);
  assert(last.files <= first.files + IN_FLIGHT, "open files grew"); // some are in hand at any moment
});

// Idling -------------------------------------------------------------------------------------------------------------

scenario("one home that waits wakes its loop no more than twice a minute", async () => {
  await using mock = await server();
  await using dog = new Watchdog(mock, [home("idle", login(mock, 10 * DAY))]);
  await using traced = new Watchdog(mock, [home("traced", login(mock, 10 * DAY))]);
  await Promise.all([dog, traced].map((each) => each.says(/next check in/, 10)));
  await sleep(30); // the engine's own tidying after the start
  const args = ["-f", "-qq", "-p", `${traced.child.pid}`, "-o", join(scratch, "calls")];
  const strace = attempt(() => new Deno.Command("strace", { args, stdout: "null", stderr: "null" }).spawn());
  const before = taken(dog.child.pid);
  await sleep(QUIET_SECONDS);
  const after = taken(dog.child.pid);
  const minute = (count: number) => (count * 60 / QUIET_SECONDS).toFixed(1);
  const threads = Object.entries(after.wakeups).map(([name, count]) =>
    `${name.replace(/ \d+$/, "")} ${minute(count - (before.wakeups[name] ?? 0))}`
  );
  console.log(`idle: wake-ups a minute by thread, the engine's own included: ${threads.join(", ")}`);
  console.log(`idle: ${((after.cpu - before.cpu) * DAY / QUIET_SECONDS / SECOND).toFixed(0)} s of CPU a day`);
  if (strace === null) return console.log("idle: system calls not counted, for want of strace");
  strace.kill("SIGINT");
  await strace.status;
  const calls = Deno.readTextFileSync(join(scratch, "calls")).split("\n").filter((line) => line !== "");
  const own = calls.filter((line) => line.includes("auth.json")).length;
  const polls = calls.filter((line) => line.startsWith(`${traced.child.pid} `) && /epoll_\w+.*= 0$/.test(line)).length;
  console.log(`idle: a minute ${minute(calls.length)} system calls, ${minute(polls)} timers, ${minute(own)} own looks`);
  assert(own > 0 && own <= 2 * Math.ceil(QUIET_SECONDS / 60), `${own} looks in ${QUIET_SECONDS} s`);
});
