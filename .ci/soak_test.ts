/**
 * The executable's loop in real time: stopped and continued, its clock moved, logins that appear and die, a thousand
 * homes at once, twenty thousand attempts in a row, and how often it wakes. Nearly all of that is waiting, so all of it
 * waits at the same time; only the sweep, whose seconds count, runs before and by itself.
 *
 * @module
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { DatabaseSync } from "node:sqlite";
import { authJson, type Behaviour, type MockOptions, startMockServer } from "../mock_server.ts";
import {
  attempt,
  built,
  given,
  inode,
  launch,
  pause,
  repo,
  type Running,
  statOf,
  textOf,
  tokenIn,
  until,
} from "./tools.ts";

const SECOND = 1000;
const DAY = 86_400;
const PROMPT = { seconds: 60 }; // what "within a minute" is
const QUIET_SECONDS = 91; // two steps of the loop, and some
const ATTEMPTS = 20_000;
const IN_FLIGHT = 8;

const scratch = await Deno.makeTempDir({ prefix: "soak_" });
addEventListener("unload", () => Deno.removeSync(scratch, { recursive: true }));
const sleep = (seconds: number) => pause(seconds * SECOND);
const tool = (...argv: string[]) => launch(argv, { PATH: given("PATH", "") }, { seconds: 600 });

// Homes and processes ------------------------------------------------------------------------------------------------

function home(text?: string): string {
  const dir = Deno.makeTempDirSync({ dir: scratch });
  if (text !== undefined) write(dir, text);
  return dir;
}

/** As the Codex CLI logs in: a new file in the old one's place. */
function write(dir: string, text: string): void {
  Deno.writeTextFileSync(`${dir}/new`, text, { mode: 0o600 });
  Deno.renameSync(`${dir}/new`, `${dir}/auth.json`);
}

/** A login that no server knows, and so calls dead. */
const dead = () =>
  authJson({ id_token: "", access_token: "", refresh_token: `rt_${crypto.randomUUID()}` }, new Date(0));

/** What the status file says of the last attempt, "" where there was none. */
const outcome = (dir: string): string =>
  JSON.parse(attempt(() => textOf(`${dir}/auth_refresh_status.json`)) ?? "{}").watchdog_last_outcome ?? "";

/** A server, and watchdogs over logins of its. */
type Field = Awaited<ReturnType<typeof enter>>;

async function enter(options: MockOptions = {}) {
  const stack = new AsyncDisposableStack();
  const mock = stack.adopt(await startMockServer(options), (mock) => mock.close());
  /** The text of a login of this server; negative seconds give an expired one, which is due at once. */
  const login = (accessTokenSeconds: number) => authJson(mock.login({ accessTokenSeconds }));
  const watch = (args: string[], more: Record<string, string> = {}): Running =>
    stack.use(launch([built, ...args], { CODEX_REFRESH_TOKEN_URL_OVERRIDE: mock.url, ...more }, { seconds: 600 }));
  /** Homes of each kind in turn: fresh, due, broken, dead, not a ChatGPT login, without any. */
  const mixed = (count: number): string[] => {
    const kinds = [
      () => login(10 * DAY),
      () => login(-DAY),
      () => "{",
      dead,
      () => '{"auth_mode":"apikey","OPENAI_API_KEY":"sk-none"}',
      () => undefined,
    ];
    return Array.from({ length: count }, (_, index) => home(kinds[index % kinds.length]!()));
  };
  const leave = (what: () => void) => stack.defer(what);
  return { mock, login, watch, mixed, leave, [Symbol.asyncDispose]: () => stack.disposeAsync() };
}

/** Runs at once, beside all the others, and is judged when its turn comes, with what it found out below its name. */
function scenario(name: string, body: (field: Field) => Promise<string | void>, options?: MockOptions): void {
  const run = async () => {
    await using field = await enter(options);
    return await body(field);
  };
  const done = run();
  done.catch(() => {}); // the test below tells
  const fn = async (t: Deno.TestContext) => {
    const found = await done;
    if (found) await t.step(found, () => {});
  };
  Deno.test({ name, fn, sanitizeOps: false, sanitizeResources: false });
}

/** Sizes in KiB, `cpu` in milliseconds, wake-ups by thread. */
function taken(pid: number) {
  const read = (path: string) => textOf(`/proc/${pid}/${path}`);
  const field = (text: string, name: string) => Number(RegExp(`^${name}:\\s+(\\d+)`, "m").exec(text)?.[1] ?? 0);
  const memory = read("smaps_rollup");
  const threads = [...Deno.readDirSync(`/proc/${pid}/task`)].flatMap(({ name }) =>
    attempt(() => read(`task/${name}/status`)) ?? [] // it may have ended meanwhile
  );
  const nameOf = (status: string) => `${/^Name:\t(.*)/.exec(status)?.[1]} ${field(status, "Pid")}`;
  // After the name, which may hold spaces: fields 14 and 15 of proc(5), user and system time in hundredths of a second.
  const ticks = read("stat").replace(/^.*\) /s, "").split(" ").slice(11, 13);
  return {
    anonymous: field(memory, "Anonymous"),
    files: [...Deno.readDirSync(`/proc/${pid}/fd`)].length,
    cpu: ticks.reduce((sum, each) => sum + 10 * Number(each), 0),
    wakeups: new Map(threads.map((status) => [nameOf(status), field(status, "voluntary_ctxt_switches")])),
  };
}

// A thousand homes ---------------------------------------------------------------------------------------------------

/** Runs before all else and by itself, since its seconds count. */
async function sweep() {
  let [now, most, hangs] = [0, 0, 0];
  const field = await enter({ onAnswer: (seen) => void (seen.behaviour === "hang" || now--) });
  const { mock } = field;
  const slow = field.login(-DAY);
  const [hanging, ...others] = [home(slow), ...field.mixed(999)];
  mock.onRequest = () => {
    const hang = hangs === 0 && mock.lastRequestBody().includes(tokenIn(slow));
    hang ? hangs++ : now++;
    most = Math.max(most, now + hangs);
    mock.next(hang ? { kind: "hang" } : { kind: "delay", milliseconds: 20 });
  };
  const dog = field.watch([hanging!, ...others]);
  const waiting = new Set(others);
  const looked = () => {
    for (const dir of waiting) if (outcome(dir) !== "") waiting.delete(dir);
    return waiting.size === 0;
  };
  const seconds = await until(looked, "a sweep", { seconds: 120, every: 20 });
  return { field, dog, hanging: hanging!, seconds, inFlight: () => most };
}

const swept = await sweep();

scenario("a thousand homes, one of them hanging, are all looked after in one sweep", async () => {
  const { field, dog, hanging, seconds, inFlight } = swept;
  // The one that hangs is given up after half a minute, asked again, and answered.
  await until(() => outcome(hanging) === "refreshed", "the hanging one", { seconds: 120, every: 20 });
  assert(taken(dog.pid).files < 64, "files left open");
  await field[Symbol.asyncDispose]();
  assert(inFlight() <= IN_FLIGHT, `${inFlight()} requests in flight`);
  return `in ${seconds.toFixed(1)} s, at most ${inFlight()} requests in flight`;
});

// Real time ----------------------------------------------------------------------------------------------------------

scenario("a process that was stopped over its deadline acts as soon as it goes on", async ({ mock, login, watch }) => {
  const dog = watch([home(login(14_400 + 6))]);
  await dog.said(/next check in \d s/);
  dog.kill("SIGSTOP");
  await sleep(8);
  assertEquals(mock.requests.length, 0);
  dog.kill("SIGCONT");
  return `refreshed ${(await dog.said(/refresh: ok/, PROMPT)).toFixed(2)} s after SIGCONT`;
});

scenario("a clock that is moved by a day, either way, delays nothing", async ({ mock, login, watch }) => {
  const library = ["x86_64", "aarch64"]
    .map((cpu) => `/usr/lib/${cpu}-linux-gnu/faketime/libfaketime.so.1`).find(inode);
  if (library === undefined) return "not moved, for want of Debian's libfaketime";
  const control = `${scratch}/clock`;
  const set = (offset: string) => Deno.writeTextFileSync(control, offset);
  set("+0d");
  const fake = {
    LD_PRELOAD: library,
    FAKETIME_TIMESTAMP_FILE: control,
    FAKETIME_NO_CACHE: "1",
    FAKETIME_DONT_FAKE_MONOTONIC: "1",
    NO_FAKE_STAT: "1",
  };
  const ahead = watch([home(login(DAY))], fake);
  const back = watch([home(login(10 * DAY))], { ...fake, CODEX_AUTH_REFRESH_INTERVAL_SECONDS: "20" });
  await Promise.all([ahead, back].map((dog) => dog.said(/next check in/)));
  assertEquals(mock.requests.length, 0);
  set("+1d");
  const forth = ahead.said(/refresh: ok/, PROMPT);
  await back.said(/next check in/, { ...PROMPT, from: back.stderr().length }); // both have seen the new time
  const seconds = await forth;
  set("+0d");
  const early = await back.said(/no-op/, { seconds: 22 + PROMPT.seconds, from: back.stderr().length });
  return `a day ahead: refreshed after ${seconds.toFixed(1)} s; a day back: a wait of 20 s took ${early.toFixed(1)} s`;
});

/** strace that has all calls on a home take four minutes, like those on a mount whose server is gone. */
const hanging = (dir: string): string[] => {
  const paths = ["-P", dir, "-P", `${dir}/auth.json`];
  return ["strace", "-f", "-o", "/dev/null", ...paths, "-e", "inject=all:delay_enter=240s"];
};

/** What strace holds it keeps from the parent: so whether anything is left of the process itself. */
const isOver = (pid: number) =>
  (/^State:\t(.)/m.exec(attempt(() => textOf(`/proc/${pid}/status`)) ?? "")?.[1] ?? "Z") === "Z";

scenario("a home whose disk hangs holds up neither another home nor the end", async ({ login, watch }) => {
  if (Deno.uid() !== 0) return "not tried, for want of root to strace with";
  const [hung, well] = [home(login(3)), home(login(3))];
  const often = { CODEX_AUTH_REFRESH_INTERVAL_SECONDS: "1", CODEX_AUTH_SAFETY_MARGIN_SECONDS: "0" };
  const dog = watch([hung, well], often);
  await dog.said(RegExp(`${hung}\\] refresh: ok`));
  const strace = tool(...hanging(hung), "-p", `${dog.pid}`);
  await dog.said(RegExp(`the disk under ${hung} does not answer`), PROMPT);
  await dog.said(RegExp(`${well}\\] refresh: ok`), { ...PROMPT, from: dog.stderr().length });
  dog.kill("SIGTERM");
  const seconds = await until(() => isOver(dog.pid), "the end", PROMPT);
  strace.kill("SIGKILL");
  assertEquals((await dog.ended).code, 0);
  await strace.ended;
  return `ended ${seconds.toFixed(0)} s after a SIGTERM`;
}, { accessTokenSeconds: 3 });

scenario("a disk that hung for a while delays a refresh by no more than a minute", async ({ login, watch }) => {
  if (Deno.uid() !== 0) return "not tried, for want of root to strace with";
  const dir = home(login(14_400 + 20));
  const dog = watch([dir]);
  await dog.said(/next check in/);
  const strace = tool(...hanging(dir), "-p", `${dog.pid}`);
  await sleep(145); // a backoff would have got longer than a minute by then
  strace.kill("SIGKILL");
  await strace.ended;
  return `refreshed ${(await dog.said(/refresh: ok/, PROMPT)).toFixed(0)} s after it went on`;
});

const node = [given("CAR_NODE", "node"), given("CAR_BUNDLE", `${repo}/dist/refresh.js`)];
const leave = "read write env net sys=uid".split(" ").map((what) => `--allow-${what}`);
const FORMS = {
  executable: [built],
  node,
  source: [Deno.execPath(), "run", "--quiet", ...leave, `${repo}/refresh.ts`],
};

for (
  const [what, command] of Object.entries({
    "an attempt": [built, "--once"],
    "the status": [built, "--status"],
    "an attempt under Node.js": [...node, "--once"],
    "the loop, which a SIGHUP does not end either": [built],
  })
) {
  scenario(`a disk that hangs from the start does not hold up ${what}`, async ({ mock, login, leave }) => {
    if (Deno.uid() !== 0) return "not tried, for want of root to strace with";
    const [hung, well] = [home(login(DAY)), home(login(-DAY))];
    const run = launch([...hanging(hung), ...command, hung, well], {
      PATH: given("PATH", ""),
      CODEX_REFRESH_TOKEN_URL_OVERRIDE: mock.url,
    });
    const children = () => attempt(() => textOf(`/proc/${run.pid}/task/${run.pid}/children`).trim()) ?? "";
    await until(() => children() !== "", "the program runs");
    const pid = Number(children().split(" ")[0]);
    leave(() => void attempt(() => Deno.kill(pid, "SIGKILL")));
    if (command.length === 1) {
      await run.said(/watchdog: starting/);
      Deno.kill(pid, "SIGHUP");
      await run.said(RegExp(`${well}\\] refresh: ok`));
      Deno.kill(pid, "SIGTERM");
    }
    const seconds = await until(() => isOver(pid), "the end", PROMPT);
    run.kill("SIGKILL");
    const { output } = await run.ended;
    assertMatch(output, /on a disk that does not answer|the disk under \S+ does not answer/);
    assertMatch(output, RegExp(`${well}\\] refresh: ok|the access token expired 1 d ago`));
    return `it took ${seconds.toFixed(0)} s`;
  });
}

/** A network in which packets go out and nothing comes back. */
const SILENT = `ip link set lo up && ip tuntap add dev silent mode tun && ip addr add 10.0.0.1/24 dev silent &&
  ip link set silent up && exec "$0" "$@"`;

for (const [form, command] of Object.entries(FORMS)) {
  scenario(`an endpoint that swallows packets is asked once, and the token not called spent (${form})`, async () => {
    if (Deno.uid() !== 0) return "not tried, for want of root to make such a network with";
    const dir = home(dead());
    const { code, said } = await launch(["unshare", "-n", "sh", "-c", SILENT, ...command, "--once", dir], {
      PATH: given("PATH", ""),
      CODEX_REFRESH_TOKEN_URL_OVERRIDE: "http://10.0.0.2/oauth/token",
      CODEX_AUTH_ALLOW_HTTP: "1",
    }).ended;
    assertEquals(code, 2, said);
    assertMatch(said, /^.*refresh: starting.*\n.*transient failure \(http=000\): no connection.*\n$/);
  });
}

scenario("a command of the operator's has a minute, and is then ended with its children", async ({ login, watch }) => {
  const [dir, pid] = [home(login(-DAY)), `${scratch}/slow_command_pid`];
  const dog = watch(["--exec", `sleep 999 & echo $! >${pid}; wait`, dir]);
  const seconds = await dog.said(/exec: event=refreshed failed \(it did not end in time\)/, { seconds: 70 });
  assert(seconds > 55, `${seconds} s`);
  await until(() => statOf(`/proc/${textOf(pid).trim()}`) === null, "its child is gone", { seconds: 10 });
});

scenario("a login that appears is noticed within a minute, in whatever state its home was waiting", async (field) => {
  const { mock, login, watch } = field;
  const first = login(-DAY);
  const homes = { none: home(), absent: `${scratch}/not/yet`, spent: home(dead()), portal: home(first) };
  mock.onRequest = () => {
    if (mock.lastRequestBody().includes(tokenIn(first))) mock.next({ kind: "status", status: 401 });
  };
  const dog = watch(Object.values(homes));
  for (const dir of [homes.spent, homes.portal]) await dog.said(RegExp(`${dir}\\] next check in`));
  assertEquals(mock.requests.length, 2);
  Deno.mkdirSync(homes.absent, { recursive: true });
  for (const dir of Object.values(homes)) write(dir, login(-DAY));
  const delays = Object.entries(homes).map(async ([name, dir]) =>
    `${name} ${(await dog.said(RegExp(`${dir}\\] refresh: ok`), PROMPT)).toFixed(0)} s`
  );
  const found = `used after: ${(await Promise.all(delays)).join(", ")}`;
  assertEquals(mock.requests.filter(({ outcome }) => outcome === "unknown").length, 1, "a dead token sent again");
  assertEquals(mock.requests.length, 6);
  return found;
});

scenario("a login is noticed within a minute also where another home wakes the loop in between", async (field) => {
  const [none, busy] = [home(), home(field.login(14_400 + 37))];
  const dog = field.watch([none, busy]);
  await dog.said(RegExp(`${busy}\\] next check in`));
  await sleep(2);
  write(none, field.login(-DAY));
  return `used after ${(await dog.said(RegExp(`${none}\\] refresh: ok`), PROMPT)).toFixed(0)} s`;
});

scenario("an interval of thirty days sleeps, and SIGHUP looks at once", async ({ mock, login, watch }) => {
  const env = { CODEX_AUTH_REFRESH_INTERVAL_SECONDS: `${30 * DAY}`, CODEX_AUTH_STALE_AFTER_SECONDS: `${90 * DAY}` };
  const dog = watch([home(login(90 * DAY))], env);
  await dog.said(/next check in 3\d d/);
  await sleep(2);
  const [log, before] = [dog.stderr(), taken(dog.pid)];
  await sleep(50);
  const after = taken(dog.pid);
  assertEquals([dog.stderr(), mock.requests.length], [log, 0]);
  assert(after.cpu - before.cpu < SECOND, "it spins");
  dog.kill("SIGHUP");
  const seconds = await dog.said(/no-op: fresh/, { ...PROMPT, from: log.length });
  return `${after.cpu - before.cpu} ms of CPU in 50 s; SIGHUP looks after ${seconds.toFixed(2)} s`;
});

scenario("a login that is not ours to refresh is waited out, and SIGTERM ends it", async ({ login, watch }) => {
  const dog = watch([home(JSON.stringify({ ...JSON.parse(login(-DAY)), auth_mode: "apikey" }))]);
  await dog.said(/no-op: auth_mode=apikey/);
  await sleep(3);
  const lines = dog.stderr().split("\n").length - 1;
  assert(lines <= 6, `${lines} lines in three seconds`);
  dog.kill("SIGTERM");
  assertEquals((await dog.ended).code, 0);
});

/** What `--once` waits for and gives up: how that ends, after how many requests, and how many seconds it may take. */
interface Patient {
  arrange(field: Field, dir: string): void;
  ends: [code: number, outcome: string, requests: number];
  takes: [least: number, most: number];
}

const GIVEN_UP: Record<string, Patient> = {
  "an endpoint that never answers is given up after a minute and two requests": {
    arrange: ({ mock }) => mock.always({ kind: "hang" }),
    ends: [2, "fail:transient_000", 2],
    takes: [58, 70],
  },
  "an answer whose body drips is cut off after half a minute, though it moves": {
    arrange({ mock }) {
      mock.graceMilliseconds = Infinity;
      mock.next({ kind: "drip", millisecondsPerByte: 100 }); // over a minute for all of it
    },
    ends: [0, "refreshed", 2],
    takes: [31, 36], // with the pause of a second
  },
  "a lock that is never free is waited for three minutes, without a request": {
    arrange({ leave }, dir) {
      const lock = new DatabaseSync(`${dir}/auth_refresh.lock`);
      lock.exec("BEGIN EXCLUSIVE");
      leave(() => lock.close());
    },
    ends: [2, "fail:locked", 0],
    takes: [175, 190],
  },
};

for (const [name, { arrange, ends, takes: [least, most] }] of Object.entries(GIVEN_UP)) {
  scenario(name, async (field) => {
    const dir = home(field.login(-DAY));
    arrange(field, dir);
    const began = performance.now();
    const { code } = await field.watch(["--once", dir]).ended;
    const seconds = (performance.now() - began) / SECOND;
    assertEquals([code, outcome(dir), field.mock.requests.length], ends);
    assert(seconds >= least && seconds <= most, `${seconds} s`);
    return `after ${seconds.toFixed(1)} s`;
  });
}

// A soak -------------------------------------------------------------------------------------------------------------

scenario(`${ATTEMPTS} attempts of every kind leave memory and open files where they were`, async (field) => {
  const { mock, watch } = field;
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
  const homes = field.mixed(300);
  const began = performance.now();
  const passed = () => (performance.now() - began) / SECOND;
  // With the memory of this machine the engine would put off collecting its garbage for longer than the test lasts. What
  // counts is what is left after a collection: the least in each thousand, beginning after the first.
  const dog = watch(homes, { CODEX_AUTH_REFRESH_INTERVAL_SECONDS: "1", BUN_JSC_forceRAMSize: "50000000" });
  const samples: ReturnType<typeof taken>[] = [];
  for (let [read, attempts] = [0, 0]; attempts < ATTEMPTS; await sleep(0.05)) {
    const log = dog.stderr().slice(read, dog.stderr().lastIndexOf("\n") + 1);
    read += log.length;
    attempts += log.split("next check in").length - 1;
    assert(passed() < 240, `${attempts} attempts only`);
    if (attempts < 1000) continue;
    const [thousand, now] = [Math.floor(attempts / 1000) - 1, taken(dog.pid)];
    if (now.anonymous < (samples[thousand]?.anonymous ?? Infinity)) samples[thousand] = now;
  }
  const outcomes = Map.groupBy(homes, outcome);
  const [first, last] = [samples[0]!, samples.at(-1)!];
  console.log(`${ATTEMPTS} attempts in ${passed().toFixed(0)} s, ${asked} requests;`);
  console.log(`ended with ${[...outcomes].map(([name, all]) => `${all.length} ${name}`).join(", ")}`);
  console.log(`anonymous MiB by thousand: ${samples.map((it) => (it.anonymous / 1024).toFixed(1)).join(" ")}`);
  console.log(`open files by thousand: ${samples.map((it) => it.files).join(" ")}`);
  assert(last.anonymous - first.anonymous <= 4096, `anonymous memory grew by ${last.anonymous - first.anonymous} KiB`);
  assert(last.files <= first.files + IN_FLIGHT, "open files grew"); // some are in hand at any moment
}, { accessTokenSeconds: 2 }); // due again a second after each refresh

// Idling -------------------------------------------------------------------------------------------------------------

scenario("one home that waits wakes its loop no more than twice a minute", async ({ login, watch }) => {
  const [dog, traced] = [watch([home(login(10 * DAY))]), watch([home(login(10 * DAY))])];
  await Promise.all([dog, traced].map((each) => each.said(/next check in/)));
  await sleep(30); // the engine's own tidying after the start
  const strace = attempt(() => tool("strace", "-f", "-qq", "-p", `${traced.pid}`, "-o", `${scratch}/calls`));
  const before = taken(dog.pid);
  await sleep(QUIET_SECONDS);
  const after = taken(dog.pid);
  const minute = (count: number) => (count * 60 / QUIET_SECONDS).toFixed(1);
  const threads = [...after.wakeups].map(([name, count]) =>
    `${name.replace(/ \d+$/, "")} ${minute(count - (before.wakeups.get(name) ?? 0))}`
  );
  console.log(`idle: wake-ups a minute by thread, the engine's own included: ${threads.join(", ")}`);
  console.log(`idle: ${((after.cpu - before.cpu) * DAY / QUIET_SECONDS / SECOND).toFixed(0)} s of CPU a day`);
  if (strace === null) return "system calls not counted, for want of strace";
  strace.kill("SIGINT");
  await strace.ended;
  const calls = textOf(`${scratch}/calls`).split("\n").filter((line) => line !== "");
  const own = calls.filter((line) => line.includes("auth.json")).length;
  const polls = calls.filter((line) => line.startsWith(`${traced.pid} `) && /epoll_\w+.*= 0$/.test(line)).length;
  assert(own > 0 && own <= 2 * Math.ceil(QUIET_SECONDS / 60), `${own} looks in ${QUIET_SECONDS} s`);
  return `a minute ${minute(calls.length)} system calls, ${minute(polls)} timers, ${minute(own)} own looks`;
});
