/**
 * What the executable makes of disks that are full or broken, of writers that were cut off, and of
 * input that nobody should have to read; and whether a token ever shows where it must not. `CAR_EXE`
 * is its absolute path. Needs root, strace and the right to mount.
 *
 * Everything happens in scratch folders of its own, against mock servers in this process. A server
 * answers when the test lets it: what a test does `meanwhile` happens after the request has arrived
 * and before its answer leaves, which is where a login is at stake.
 *
 * @module
 */
import { assert, assertEquals, assertMatch, assertThrows } from "@std/assert";
import { Buffer } from "node:buffer";
import { createHash } from "node:crypto";
import { DatabaseSync } from "node:sqlite";
import { authJson, type Behaviour, jwt, type MockServer, startMockServer, type Tokens } from "../mock_server.ts";
import { attempt, readSettings } from "../refresh.ts";

const LIMIT_MS = 100_000; // for any process and any condition
const NOBODY = 65534;
const UNPRIVILEGED = ["setpriv", `--reuid=${NOBODY}`, `--regid=${NOBODY}`, "--clear-groups", "--"];
const IN_PLACE = { CODEX_AUTH_IN_PLACE: "1" };

// A copy that an unprivileged user can start wherever the original lies.
const exe = `${Deno.makeTempDirSync({ prefix: "torture_exe_" })}/codex_auth_refresh`;
Deno.copyFileSync(Deno.env.get("CAR_EXE") ?? "dist/codex_auth_refresh", exe);
for (const path of [exe, exe.replace(/\/[^/]*$/, "")]) Deno.chmodSync(path, 0o755);
globalThis.addEventListener("unload", () => Deno.removeSync(exe.replace(/\/[^/]*$/, ""), { recursive: true }));

// Tools ---------------------------------------------------------------------

/** Runs a shell command to its end; the arguments are $1, $2 … */
function sh(command: string, ...args: string[]): string {
  const { success, stdout, stderr } = new Deno.Command("sh", { args: ["-c", command, "sh", ...args] }).outputSync();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  if (!success) throw new Error(`${command} [${args}]: ${text(stderr)}`);
  return text(stdout);
}

const pause = (milliseconds: number) => new Promise<void>((resolve) => setTimeout(resolve, milliseconds));

async function until(condition: () => boolean, what: string) {
  for (const end = Date.now() + LIMIT_MS; !condition();) {
    if (Date.now() > end) throw new Error(`never: ${what}`);
    await pause(10);
  }
}

/** The same where nothing else may happen in between. */
function block(condition: () => boolean, what: string) {
  const clock = new Int32Array(new SharedArrayBuffer(4));
  for (const end = Date.now() + LIMIT_MS; !condition();) {
    if (Date.now() > end) throw new Error(`never: ${what}`);
    Atomics.wait(clock, 0, 0, 5);
  }
}

/** Checks all cases at once; a failure names its case. */
async function each<T>(cases: readonly T[], check: (value: T) => Promise<void>, name = JSON.stringify) {
  const results = await Promise.allSettled(cases.map(check));
  results.forEach((result, index) => {
    if (result.status === "rejected") throw new Error(`case ${name(cases[index])}`, { cause: result.reason });
  });
}

const textOf = (path: string) => Deno.readTextFileSync(path);
const journalsIn = (folder: string) =>
  [...Deno.readDirSync(folder)].map(({ name }) => name).filter((name) => /^\.auth\.json\./.test(name));
const inode = (path: string) => {
  try {
    return Deno.lstatSync(path).ino;
  } catch {
    return null;
  }
};

interface Ended {
  code: number;
  signal: string | null;
  said: string;
  printed: string;
}

interface Running {
  pid: number;
  kill(signal: Deno.Signal): void;
  ended: Promise<Ended>;
}

/** One login, nine days old and expired, in a home of its own, and the server that issued it. */
class Scene implements AsyncDisposable {
  readonly root = Deno.makeTempDirSync({ prefix: "torture_" });
  readonly home = `${this.root}/home`;
  readonly auth = `${this.home}/auth.json`;
  readonly old: Tokens;
  /** auth.json as it was. Its number must come out as it went in. */
  readonly text: string;
  readonly #undo: (() => void)[] = [];
  #failure: unknown;

  private constructor(readonly mock: MockServer) {
    this.old = mock.login({ accessTokenSeconds: -3600 });
    this.text = authJson(this.old, new Date(Date.now() - 9 * 86_400_000)).replace("{", '{"kept":1.0e2,');
    Deno.chmodSync(this.root, 0o755);
    Deno.mkdirSync(this.home, { mode: 0o755 });
    this.write();
  }

  static async open(): Promise<Scene> {
    return new Scene(await startMockServer());
  }

  async [Symbol.asyncDispose]() {
    for (const step of this.#undo.reverse()) step();
    await this.mock.close();
    Deno.removeSync(this.root, { recursive: true });
  }

  /** What has to be taken back, whatever happens. */
  undo(command: string, ...args: string[]) {
    this.#undo.push(() => sh(command, ...args));
  }

  write(path = this.auth, text = this.text) {
    Deno.writeTextFileSync(path, text, { mode: 0o600 });
  }

  mount(...args: string[]) {
    sh('mount "$@"', ...args);
    this.undo('umount "$1"', args.at(-1)!);
  }

  /** A small file system in a folder of this scene, the home as a rule. */
  tmpfs(folder = this.home, options = "size=1m") {
    Deno.mkdirSync(folder, { recursive: true });
    this.mount("-t", "tmpfs", "-o", options, "none", folder);
    Deno.chmodSync(folder, 0o755);
    this.write(`${folder}/auth.json`);
  }

  immutable(path: string) {
    sh('chattr +i "$1"', path);
    this.undo('chattr -i "$1"', path);
  }

  /** The journal, by the refresh token that its answer is for. */
  journal(token = this.old.refresh_token): string {
    const fingerprint = createHash("sha256").update(token).digest("hex").slice(0, 16);
    return `${this.home}/.auth.json.${fingerprint}.tmp`;
  }

  /** It, and what is about to replace it. */
  get candidates(): string[] {
    return [this.journal(), `${this.journal()}.new`];
  }

  /** What an earlier run left when it was killed with the answer written: the token is spent. */
  async redeem(): Promise<Tokens> {
    const { client_id, grant_type } = { client_id: "x", grant_type: "refresh_token" };
    const body = JSON.stringify({ client_id, grant_type, refresh_token: this.old.refresh_token });
    const answer = await fetch(this.mock.url, { method: "POST", body });
    this.mock.requests.pop();
    return await answer.json();
  }

  /** Happens between the request and its answer. */
  meanwhile(action: () => void) {
    this.mock.onRequest = () => {
      this.mock.onRequest = undefined;
      try {
        action();
      } catch (error) {
        this.#failure = error;
      }
    };
  }

  start(args: string[], env: Record<string, string> = {}, under: string[] = []): Running {
    const [program = "", ...rest] = [...under, exe, ...args];
    const { PATH = "" } = Deno.env.toObject();
    const variables = { PATH, CODEX_HOME: this.home, CODEX_REFRESH_TOKEN_URL_OVERRIDE: this.mock.url, ...env };
    const streams = { stdin: "null", stdout: "piped", stderr: "piped" } as const;
    const child = new Deno.Command(program, { args: rest, clearEnv: true, env: variables, ...streams }).spawn();
    const limit = setTimeout(() => child.kill("SIGKILL"), LIMIT_MS);
    const ended = child.output().then(({ code, signal, stdout, stderr }): Ended => {
      clearTimeout(limit);
      if (this.#failure) throw this.#failure;
      const [printed, said] = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes));
      return { code, signal, said: said ?? "", printed: printed ?? "" };
    });
    ended.catch(() => {}); // whoever waits for it is told
    return { pid: child.pid, kill: (signal) => child.kill(signal), ended };
  }

  once(env: Record<string, string> = {}, under: string[] = []): Promise<Ended> {
    return this.start(["--once"], env, under).ended;
  }

  /** The outcome and detail in the status file, or "" where there is none. */
  get status(): string {
    try {
      const { watchdog_last_outcome, detail } = JSON.parse(textOf(`${this.home}/auth_refresh_status.json`));
      return `${watchdog_last_outcome} ${detail}`;
    } catch {
      return "";
    }
  }

  get journals(): string[] {
    return journalsIn(this.home);
  }

  /** The one that there is in the middle of an attempt. */
  pending(folder = this.home): string {
    const [name, another] = journalsIn(folder);
    if (name === undefined || another !== undefined) throw new Error(`not one journal in ${folder}`);
    return `${folder}/${name}`;
  }

  /** The newest tokens, every other field, nothing left beside it. */
  assertRefreshed(said: string, path = this.auth) {
    const text = textOf(path);
    assertEquals(JSON.parse(text).tokens.refresh_token, this.mock.newest(this.old.refresh_token), said);
    assertEquals(this.mock.state(this.old.refresh_token), "spent", said);
    assertMatch(text, /"kept": ?1\.0e2/, said);
    assertEquals(this.journals, [], said);
  }

  /** No request, auth.json as it was, nothing left beside it. */
  assertUntouched(said: string, text = this.text) {
    assertEquals(this.mock.requests.length, 0, said);
    assertEquals(textOf(this.auth), text, said);
    assertEquals(this.journals, [], said);
  }
}

/** strace, which injects one fault into the calls that touch one of these paths, from the start of a process on … */
const strace = (paths: string[], ...inject: string[]) => [
  ...["strace", "-f", "-o", "/dev/null", ...inject],
  ...paths.flatMap((path) => ["-P", path]),
];

/** … or from now on. */
function attach({ pid }: Running, log: string, ...args: string[]) {
  const options = { stdin: "null", stdout: "null", stderr: "null" } as const;
  const tracer = new Deno.Command("strace", { args: ["-f", "-o", log, ...args, "-p", `${pid}`], ...options }).spawn();
  const traced = ({ name }: Deno.DirEntry) =>
    textOf(`/proc/${pid}/task/${name}/status`).includes(`TracerPid:\t${tracer.pid}\n`);
  block(() => [...Deno.readDirSync(`/proc/${pid}/task`)].every(traced), "strace is attached");
  return tracer.status;
}

/** Fills a file system to the last block. */
const fill = (folder: string) => sh('cat /dev/zero >"$1" 2>&- || true', `${folder}/fill`);

/** Log lines and nothing else: no stack trace, nothing that JavaScript prints of itself. */
const DOCUMENTED =
  /^((\[codex_auth_refresh [-\dT:]+Z\]|codex_auth_refresh:) (?!.*(undefined|\[object|NaN| {4}at ))\P{Cc}+\n)*$/u;

// Cut-off writers -----------------------------------------------------------

/** What is left of a document whose writer died: nothing, a part, or blocks that were never written. */
const REMAINS = [
  "",
  "{",
  authJson({ id_token: "", access_token: "", refresh_token: "x" }).slice(0, 99),
  "\n\n",
  "\0\0",
];

Deno.test("an auth.json whose writer died is left alone, and nothing is asked", async () => {
  await each(REMAINS, async (torn) => {
    await using scene = await Scene.open();
    scene.write(scene.auth, torn);
    const { code, said } = await scene.once();
    assertEquals(code, 1, said);
    assertMatch(scene.status, torn ? /^skip unreadable:\w+Error$/ : /^skip:no_auth_json/);
    scene.assertUntouched(said, torn);
  });
});

Deno.test("a journal replaces an auth.json whose writer died, without a request", async () => {
  await each(REMAINS, async (torn) => {
    await using scene = await Scene.open();
    const fresh = await scene.redeem();
    scene.write(scene.journal(), scene.text.replace(scene.old.refresh_token, fresh.refresh_token));
    scene.write(scene.auth, torn);
    const { code, said } = await scene.once();
    assertEquals([code, scene.status, scene.mock.requests.length], [0, "refreshed rolled_forward", 0], said);
    scene.assertRefreshed(said);
  });
});

Deno.test("a journal carries its tokens over into an auth.json that changed elsewhere", async () => {
  await using scene = await Scene.open();
  const fresh = await scene.redeem();
  scene.write(scene.journal(), scene.text.replace(scene.old.refresh_token, fresh.refresh_token));
  scene.write(scene.auth, scene.text.replace("{", '{"added":2,'));
  const { code, said } = await scene.once();
  assertEquals([code, scene.status, scene.mock.requests.length], [0, "refreshed rolled_forward", 0], said);
  scene.assertRefreshed(said);
  assertEquals(JSON.parse(textOf(scene.auth)).added, 2);
});

Deno.test("a journal that is torn, foreign or without its auth.json is removed", async (t) => {
  const whole = (scene: Scene) => scene.text.replace(scene.old.refresh_token, "rt_of_another_login");
  const cases: Record<string, (scene: Scene) => void> = {
    "empty": (scene) => scene.write(scene.journal(), ""),
    "the reserved room": (scene) => scene.write(scene.journal(), "\n".repeat(1 << 17)),
    "torn": (scene) => scene.write(scene.journal(), whole(scene).slice(0, 700)),
    "another login's": (scene) => scene.write(scene.journal("another"), whole(scene)),
    "after a logout": (scene) => {
      scene.write(scene.journal(), whole(scene));
      Deno.removeSync(scene.auth);
    },
  };
  for (const [name, arrange] of Object.entries(cases)) {
    await t.step(name, async () => {
      await using scene = await Scene.open();
      arrange(scene);
      const loggedOut = inode(scene.auth) === null;
      const { code, said } = await scene.once();
      assertEquals(code, loggedOut ? 1 : 0, said);
      assertEquals(scene.journals, [], said);
      if (loggedOut) assertEquals(inode(scene.auth), null, said);
      else scene.assertRefreshed(said);
    });
  }
});

Deno.test("a journal that is torn, or its torn replacement, does not hide the whole one", async () => {
  for (const [torn, whole] of [["", ".new"], [".new", ""]]) {
    await using scene = await Scene.open();
    const fresh = await scene.redeem();
    scene.write(scene.journal() + torn, "{");
    scene.write(scene.journal() + whole, scene.text.replace(scene.old.refresh_token, fresh.refresh_token));
    const { code, said } = await scene.once();
    assertEquals([code, scene.mock.requests.length], [0, 0], said);
    scene.assertRefreshed(said);
  }
});

/** A journal, as we write it, with the answer for the token in auth.json, which is spent. */
async function leftBehind(scene: Scene, path = scene.journal()): Promise<string> {
  const fresh = await scene.redeem();
  scene.write(path, authJson(fresh).replace("{", '{\n  "kept": 1.0e2,').trimEnd());
  return path;
}

Deno.test("a journal is rolled forward whatever link or owner of ours it has", async (t) => {
  const cases: Record<string, (scene: Scene, path: string) => void> = {
    "a second hard link": (scene, path) => Deno.linkSync(path, `${scene.root}/second`),
    "root's, auth.json somebody else's": (scene) => nobody(scene.home, scene.auth),
    "of auth.json's owner, who is not root": (scene, path) => nobody(scene.home, scene.auth, path),
  };
  for (const [name, arrange] of Object.entries(cases)) {
    await t.step(name, async () => {
      await using scene = await Scene.open();
      arrange(scene, await leftBehind(scene));
      const { code, said } = await scene.once();
      assertEquals([code, scene.status, scene.mock.requests.length], [0, "refreshed rolled_forward", 0], said);
      scene.assertRefreshed(said);
      const { uid, mode, nlink } = Deno.statSync(scene.auth);
      assertEquals([uid, (mode ?? 0) & 0o777, nlink], [Deno.statSync(scene.home).uid, 0o600, 1], said);
    });
  }
});

/** Neither root nor whoever owns auth.json. */
const STRANGER = 4321;

/** What lies in a journal's place and is none of ours: `make` puts it there instead of the journal. */
const FOREIGN: Record<string, (path: string, scene: Scene) => void> = {
  "a stranger's": (path) => Deno.chownSync(path, STRANGER, STRANGER),
  "a stranger's, half replaced"(path) {
    Deno.renameSync(path, `${path}.new`);
    Deno.chownSync(`${path}.new`, STRANGER, STRANGER);
  },
  "a stranger's, for another token"(path, scene) {
    Deno.renameSync(path, scene.journal("another"));
    Deno.chownSync(scene.journal("another"), STRANGER, STRANGER);
  },
  "a symlink"(path, scene) {
    Deno.renameSync(path, `${scene.root}/outside`);
    Deno.symlinkSync("../outside", path);
  },
  "a pipe"(path) {
    Deno.removeSync(path);
    sh('mkfifo "$1"', path);
  },
  "a folder"(path) {
    Deno.removeSync(path);
    Deno.mkdirSync(path);
  },
};

Deno.test("what is no journal of ours is neither read nor deleted, and named", async (t) => {
  for (const [name, make] of Object.entries(FOREIGN)) {
    await t.step(name, async () => {
      await using scene = await Scene.open();
      make(await leftBehind(scene), scene);
      const path = scene.pending();
      const before = inode(path);
      const log = `${scene.root}/trace`;
      const { code, said } = await scene.once({}, [
        "strace",
        "-f",
        "-o",
        log,
        "-P",
        path,
        "-P",
        `${scene.root}/outside`,
      ]);
      assertEquals([code, scene.mock.requests.length], [2, 0], said);
      assertMatch(scene.status, /^fail:preflight /);
      assert(said.includes(path), said);
      assertEquals([textOf(scene.auth), inode(scene.pending())], [scene.text, before], said);
      assertEquals(callsOf(textOf(log)).filter((call) => /^(open|read|p?read)/.test(call)), []);
    });
  }
});

// The sync of an earlier run may have failed: what it lost only a new file brings back, not a further sync.
Deno.test("a journal of an earlier run is written anew, and stays until that is done", async () => {
  await using scene = await Scene.open();
  const path = await leftBehind(scene);
  const log = `${scene.root}/trace`;
  const { code, said } = await scene.once({}, ["strace", "-f", "-y", "-o", log, "-P", path, "-P", `${path}.new`]);
  assertEquals(code, 0, said);
  const done = callsOf(textOf(log)).filter((call) => /^(p?write|f(data)?sync|rename|unlink)\w*\(.* = [^-]/.test(call));
  const steps = done.map((call) => {
    const files = call.matchAll(/auth\.json(?:\.\w+\.tmp)?(\.new)?(?=[">])/g);
    const names = [...files].map(([file, next]) => next ? "new" : file === "auth.json" ? file : "journal");
    return [/^p?[a-z]+/.exec(call), ...names].join(" ");
  });
  assertEquals(steps, ["pwrite new", "fsync new", "rename new journal", "rename journal auth.json"], said);
  scene.assertRefreshed(said);
});

// The first run is killed where it renames the journal onto auth.json, each later one there or where it replaces the journal.
Deno.test("killed at its rename again and again it piles nothing up, and stores the answer in the end", async () => {
  await each(["auth.json is as it was", "auth.json changes each time"], async (how) => {
    await using scene = await Scene.open();
    const changes = how.includes("changes");
    for (let round = 0; round < 12; round++) {
      if (changes) scene.meanwhile(() => scene.write(scene.auth, scene.text.replace("{", `{"during":0,`)));
      const paths = round % 2 === 0 ? [scene.journal()] : [`${scene.journal()}.new`];
      const { signal, said } = await scene.once({}, strace(paths, "-e", "inject=/^rename:signal=KILL"));
      assertEquals([signal, scene.mock.requests.length], ["SIGKILL", 1], said);
      const { length } = scene.journals;
      assertEquals(length, round % 2 === 0 ? 1 : 2, `${length} journals after round ${round}`);
      if (changes) scene.write(scene.auth, scene.text.replace("{", `{"round":${round},`));
    }
    const { code, said } = await scene.once();
    assertEquals([code, scene.status, scene.mock.requests.length], [0, "refreshed rolled_forward", 1], said);
    scene.assertRefreshed(said);
    if (changes) assertEquals(JSON.parse(textOf(scene.auth)).round, 11, said);
  });
});

Deno.test("what is no file in the place of auth.json is neither waited for nor touched", async (t) => {
  const cases: Record<string, string> = {
    "a folder": 'mkdir "$1"',
    "a pipe": 'mkfifo "$1"',
    "an endless device": 'ln -s /dev/zero "$1"',
    "a link to itself": 'ln -s auth.json "$1"',
    "a link to nowhere": 'ln -s nowhere/else "$1"',
  };
  for (const [name, command] of Object.entries(cases)) {
    await t.step(name, async () => {
      await using scene = await Scene.open();
      Deno.removeSync(scene.auth);
      sh(command, scene.auth);
      const before = inode(scene.auth);
      const { code, said } = await scene.once();
      assertEquals([code, scene.mock.requests.length, inode(scene.auth)], [1, 0, before], said);
      assertMatch(scene.status, /^skip(:no_auth_json)? (unreadable:E\w+|no_auth_json)$/);
    });
  }
});

Deno.test("a home that cannot be one, or cannot be entered, is a line and no crash", async () => {
  await using scene = await Scene.open();
  Deno.symlinkSync("loop", `${scene.root}/loop`);
  Deno.mkdirSync(`${scene.root}/locked/home`, { recursive: true });
  Deno.chmodSync(`${scene.root}/locked`, 0o700);
  const homes = ["loop", "locked/home", "home/auth.json", "home/auth.json/x", "x".repeat(300), "nowhere"];
  for (const args of [["--once"], ["--status"]]) {
    await each(homes, async (home) => {
      const { code, said } = await scene.start([...args, `${scene.root}/${home}`], {}, UNPRIVILEGED).ended;
      assertMatch(said, DOCUMENTED);
      assert([0, 1, 2, 64].includes(code), said);
    });
  }
});

Deno.test("a writer that dies while the answer is on its way does not take it along", async () => {
  await each(REMAINS, async (torn) => {
    await using scene = await Scene.open();
    scene.meanwhile(() => scene.write(scene.auth, torn));
    const { code, said } = await scene.once();
    assertEquals(code, 0, said);
    scene.assertRefreshed(said);
  });
});

Deno.test("a writer that is only slow while the answer is on its way keeps its login", async () => {
  await using scene = await Scene.open();
  const other = authJson(scene.mock.login());
  let done = Promise.resolve();
  scene.meanwhile(() => {
    scene.write(scene.auth, "");
    done = pause(150).then(() => scene.write(scene.auth, other));
  });
  const { code, said } = await scene.once();
  await done;
  assertEquals([code, scene.status.split(" ")[0], textOf(scene.auth)], [1, "superseded", other], said);
  assertEquals(scene.journals, [], said);
});

/** How somebody takes a second and a half to write another login into auth.json, which they have truncated. */
const SLOW: Record<string, (file: Deno.FsFile, text: string) => Promise<void>> = {
  async "all of it at the end"(file, text) {
    await pause(1500);
    file.writeSync(new TextEncoder().encode(text));
  },
  async "a byte at a time"(file, text) {
    for (const byte of new TextEncoder().encode(text)) {
      file.writeSync(new Uint8Array([byte]));
      await pause(1500 / text.length);
    }
  },
};

Deno.test("a writer that is slower than we wait before the store keeps its login too", async () => {
  const pins = { "under a rename": () => {}, "in place": PINNED["a second hard link"]! };
  const cases = Object.entries(pins).flatMap(([where, pin]) =>
    Object.entries(SLOW).map(([how, write]) => ({ where, pin, how, write }))
  );
  await each(cases, async ({ pin, write }) => {
    await using scene = await Scene.open();
    pin(scene);
    const other = authJson({ ...scene.mock.login(), id_token: "", access_token: "" }).trimEnd();
    let done: Promise<void> | null = null;
    scene.meanwhile(() => {
      const file = Deno.openSync(scene.auth, { write: true, truncate: true });
      done = write(file, other).finally(() => file.close());
    });
    const { code, said } = await scene.once(IN_PLACE);
    assert(done !== null, said);
    await done;
    assertEquals([code, scene.status.split(" ")[0], textOf(scene.auth)], [1, "superseded", other], said);
    assertEquals(scene.journals, [], said);
  }, ({ where, how }) => `${where}, ${how}`);
});

// A short write cannot be injected honestly: strace can return a smaller number, but not write that much. A limit on
// the size of files makes the kernel itself take a part, and then nothing until it is lifted.
Deno.test("an answer of which the disk takes only a part is written again until it is whole", async () => {
  await using scene = await Scene.open();
  let first = "";
  let before: number | null = null;
  const running = scene.start(["--once"], {}, ["sh", "-c", 'trap "" XFSZ; exec "$@"', "sh"]);
  scene.meanwhile(() => {
    first = scene.pending();
    before = inode(first);
    sh('prlimit --pid "$1" --fsize=300:unlimited', `${running.pid}`);
  });
  await until(() => before !== null && inode(first) !== before, "the first try has failed");
  assertEquals(textOf(scene.auth), scene.text);
  sh('prlimit --pid "$1" --fsize=unlimited:unlimited', `${running.pid}`);
  const { code, said } = await running.ended;
  assertEquals(code, 0, said);
  scene.assertRefreshed(said);
});

Deno.test("after a failed fsync the answer is written again, to a fresh file", async () => {
  await using scene = await Scene.open();
  const log = `${scene.root}/trace`;
  const running = scene.start(["--once"]);
  let traced: Promise<unknown> = Promise.resolve();
  scene.meanwhile(() => {
    const faults = ["-e", "inject=fsync,fdatasync:error=EIO", "-P", scene.pending()];
    traced = attach(running, log, ...faults);
  });
  const { code, said } = await running.ended;
  await traced;
  const { length } = textOf(log).match(/f(data)?sync\(.*INJECTED|sync resumed.*INJECTED/g) ?? [];
  assertEquals([code, length], [0, 1], said);
  scene.assertRefreshed(said);
});

Deno.test("after a failed fsync an auth.json that is rewritten in place is written again", async () => {
  await using scene = await Scene.open();
  PINNED["a second hard link"]!(scene);
  const log = `${scene.root}/trace`;
  const running = scene.start(["--once"], IN_PLACE);
  let traced: Promise<unknown> = Promise.resolve();
  scene.meanwhile(() => {
    traced = attach(running, log, "-e", "inject=fsync,fdatasync:error=EIO:when=1", "-P", scene.auth);
  });
  const { code, said } = await running.ended;
  await traced;
  const calls = callsOf(textOf(log)).flatMap((call) => /^(ftruncate|p?write|f(?:data)?sync)/.exec(call)?.[1] ?? []);
  const copied = "ftruncate p?write (ftruncate )?f(data)?sync";
  assertMatch(calls.join(" "), new RegExp(`^${copied}( ${copied})+$`), textOf(log));
  assertEquals(code, 0, said);
  scene.assertRefreshed(said);
});

Deno.test("a journal that is removed or replaced by hand is made again", async () => {
  for (const impostor of [null, "{}", "not JSON"]) {
    await using scene = await Scene.open();
    scene.meanwhile(() => {
      const path = scene.pending();
      Deno.removeSync(path);
      if (impostor !== null) scene.write(path, impostor);
    });
    const { code, said } = await scene.once();
    assertEquals(code, 0, said);
    assertEquals(JSON.parse(textOf(scene.auth)).tokens.refresh_token, scene.mock.newest(scene.old.refresh_token));
    assert(scene.journals.length <= (impostor === null ? 0 : 1), said);
  }
});

Deno.test("a log pipe that is closed or full in the middle of an attempt does not stop it", async (t) => {
  const cases: Record<string, string> = {
    "closed": 'exec "$@" 2>"$FIFO"',
    "full": 'exec 3<>"$FIFO"; exec "$@" 2>&3 3>&-',
  };
  for (const [name, start] of Object.entries(cases)) {
    for (const args of [["--once"], []]) {
      await t.step(`${name}, ${args[0] ?? "the loop"}`, async () => {
        await using scene = await Scene.open();
        const fifo = `${scene.root}/log`;
        sh('mkfifo "$1"', fifo);
        const reader = name === "closed" ? Deno.openSync(fifo, { read: true, write: true }) : null;
        const running = scene.start(args, { FIFO: fifo }, ["sh", "-c", start, "sh"]);
        scene.meanwhile(() => {
          if (reader !== null) reader.close();
          else sh('dd if=/dev/zero of="$1" bs=4k count=99 oflag=nonblock 2>&- || true', fifo);
        });
        if (args.length === 0) {
          await until(() => scene.status.startsWith("refreshed"), "the loop has refreshed");
          running.kill("SIGTERM");
        }
        const { code } = await running.ended;
        assertEquals(code, 0);
        scene.assertRefreshed(scene.status);
      });
    }
  }
});

Deno.test("a home that is named twice, once through a symlink, is one", async () => {
  await using scene = await Scene.open();
  Deno.symlinkSync("home", `${scene.root}/link`);
  const names = [scene.home, `${scene.root}/link`, `${scene.root}/link/../home/`];
  const { code, said } = await scene.start(["--once", ...names]).ended;
  assertEquals([code, scene.mock.requests.length, said.trim().split("\n").length], [0, 1, 2], said);
  scene.assertRefreshed(said);
});

Deno.test("two homes whose auth.json is one file take turns on it", async () => {
  await using scene = await Scene.open();
  const other = `${scene.root}/other`;
  Deno.mkdirSync(other);
  Deno.symlinkSync("../home/auth.json", `${other}/auth.json`);
  const { code, said } = await scene.start(["--once", scene.home, other]).ended;
  assertEquals([code, scene.mock.requests.length], [0, 1], said);
  scene.assertRefreshed(said);
});

Deno.test("a home that waits for its lock does not hold up another one's answer", async () => {
  await using scene = await Scene.open();
  const free = `${scene.root}/free`;
  const tokens = scene.mock.login({ accessTokenSeconds: -3600 });
  Deno.mkdirSync(free);
  scene.write(`${free}/auth.json`, authJson(tokens));
  const lock = new DatabaseSync(`${scene.home}/auth_refresh.lock`);
  lock.exec("BEGIN EXCLUSIVE");
  const running = scene.start(["--once", scene.home, free]);
  const stored = () => JSON.parse(textOf(`${free}/auth.json`)).tokens.refresh_token;
  await until(() => stored() !== tokens.refresh_token, "the free one has its answer");
  assertEquals([stored(), textOf(scene.auth)], [scene.mock.newest(tokens.refresh_token), scene.text]);
  lock.close();
  const { code, said } = await running.ended;
  assertEquals(code, 0, said);
  scene.assertRefreshed(said);
});

// Full and broken disks -----------------------------------------------------

/** Where an answer could not be stored: how it comes about, what the message says, who runs into it. */
interface Refused {
  because: RegExp;
  arrange(scene: Scene): void;
  under?: (scene: Scene) => string[];
}

/** So many numbers, 100 levels deep: compact, each takes two bytes; indented, over two hundred. */
const nested = (count: number) => "[".repeat(100) + Array(count).fill(1) + "]".repeat(100);

const nobody = (...paths: string[]) => paths.forEach((path) => Deno.chownSync(path, NOBODY, NOBODY));

const REFUSED: Record<string, Refused> = {
  "a disk that is full to the last block": {
    because: /full/,
    arrange(scene) {
      scene.tmpfs();
      fill(scene.home);
    },
  },
  "a disk with two blocks left": {
    because: /full/,
    arrange(scene) {
      scene.tmpfs();
      scene.write(`${scene.home}/spare`, "x".repeat(8192));
      fill(scene.home);
      Deno.removeSync(`${scene.home}/spare`);
    },
  },
  "a disk that has no room for another file": {
    because: /full/,
    arrange(scene) {
      scene.tmpfs(scene.home, "size=1m,nr_inodes=8");
      sh('cd "$1"; touch 1 2 3 4 5 6 7 8 2>&- || true', scene.home);
    },
  },
  "a disk quota that is used up, as the file system tells when it has to write": {
    because: /quota/,
    arrange() {},
    under: (scene) => strace(scene.candidates, "-e", "inject=fsync,fdatasync:error=EDQUOT"),
  },
  "a disk that cannot write the file": {
    because: /I\/O error/,
    arrange() {},
    under: (scene) => strace(scene.candidates, "-e", "inject=fsync,fdatasync:error=EIO"),
  },
  "a disk that cannot write the directory": {
    because: /I\/O error/,
    arrange() {},
    under: (scene) => strace([scene.home], "-e", "inject=fsync,fdatasync:error=EIO"),
  },
  "a read-only disk": {
    because: /read-only/,
    arrange(scene) {
      scene.tmpfs();
      sh('mount -o remount,ro "$1"', scene.home);
    },
  },
  "a directory without write permission": {
    because: /permission/,
    arrange: (scene) => nobody(scene.auth),
    under: () => UNPRIVILEGED,
  },
  "a file without write permission": {
    because: /permission/,
    arrange(scene) {
      nobody(scene.home, scene.auth);
      Deno.chmodSync(scene.auth, 0o400);
    },
    under: () => UNPRIVILEGED,
  },
  "a file of somebody else, though all may write to it": {
    because: /belongs to user 0/,
    arrange(scene) {
      nobody(scene.home);
      Deno.chmodSync(scene.auth, 0o666);
    },
    under: () => UNPRIVILEGED,
  },
  "a file of somebody else that all may read": {
    because: /belongs to user 0|permission/,
    arrange(scene) {
      nobody(scene.home);
      Deno.chmodSync(scene.auth, 0o644);
    },
    under: () => UNPRIVILEGED,
  },
  "a lock of somebody else": {
    because: /auth_refresh\.lock|permission/,
    arrange(scene) {
      nobody(scene.home, scene.auth);
      scene.write(`${scene.home}/auth_refresh.lock`, "");
    },
    under: () => UNPRIVILEGED,
  },
  "a lock of our own that may only be read": {
    because: /auth_refresh\.lock cannot be locked/,
    arrange(scene) {
      scene.write(`${scene.home}/auth_refresh.lock`, "");
      Deno.chmodSync(`${scene.home}/auth_refresh.lock`, 0o444);
      nobody(scene.home, scene.auth, `${scene.home}/auth_refresh.lock`);
    },
    under: () => UNPRIVILEGED,
  },
  "a lock of somebody else that all may read": {
    because: /auth_refresh\.lock cannot be locked: no permission, it is user 0's/,
    arrange(scene) {
      nobody(scene.home, scene.auth);
      scene.write(`${scene.home}/auth_refresh.lock`, "");
      Deno.chmodSync(`${scene.home}/auth_refresh.lock`, 0o644);
    },
    under: () => UNPRIVILEGED,
  },
  "an immutable lock": {
    because: /auth_refresh\.lock cannot be locked/,
    arrange(scene) {
      scene.write(`${scene.home}/auth_refresh.lock`, "");
      scene.immutable(`${scene.home}/auth_refresh.lock`);
    },
  },
  "a folder in the lock's place": {
    because: /auth_refresh\.lock/,
    arrange: (scene) => Deno.mkdirSync(`${scene.home}/auth_refresh.lock`),
  },
  "an immutable file": {
    because: /immutable/,
    arrange: (scene) => scene.immutable(scene.auth),
  },
  "an immutable directory": {
    because: /immutable/,
    arrange: (scene) => scene.immutable(scene.home),
  },
  "a file that would pass the limit once it is indented": {
    because: /too large/,
    arrange: (scene) => scene.write(scene.auth, scene.text.replace("{", `{"deep":${nested(90_000)},`)),
  },
  "a mount point from another file system": {
    because: /mount point.*Mount the directory.*CODEX_AUTH_IN_PLACE=1/,
    arrange(scene) {
      scene.tmpfs(`${scene.root}/disk`);
      scene.mount("--bind", `${scene.root}/disk/auth.json`, scene.auth);
    },
  },
  "a read-only mount point from the same file system": {
    because: /read-only/,
    arrange(scene) {
      scene.write(`${scene.root}/outside`);
      scene.mount("--bind", `${scene.root}/outside`, scene.auth);
      sh('mount -o remount,bind,ro "$1"', scene.auth);
    },
  },
  "a mount point whose file was replaced outside": {
    because: /replaced outside.*Mount the directory/,
    arrange(scene) {
      const outside = `${scene.root}/outside`;
      scene.write(outside);
      scene.mount("--bind", outside, scene.auth);
      scene.write(`${outside}.new`);
      Deno.renameSync(`${outside}.new`, outside);
    },
  },
  "a second hard link": {
    because: /hard link.*CODEX_AUTH_IN_PLACE=1/,
    arrange: (scene) => Deno.linkSync(scene.auth, `${scene.root}/second`),
  },
  "a symlink onto a disk that is full": {
    because: /full/,
    arrange(scene) {
      scene.tmpfs(`${scene.root}/disk`);
      fill(`${scene.root}/disk`);
      Deno.removeSync(scene.auth);
      Deno.symlinkSync("../disk/auth.json", scene.auth);
    },
  },
};

Deno.test("no token is spent where its answer cannot be stored, and the message names the cause", async (t) => {
  for (const [name, { because, arrange, under }] of Object.entries(REFUSED)) {
    await t.step(name, async () => {
      await using scene = await Scene.open();
      arrange(scene);
      const before = textOf(scene.auth);
      const { code, said } = await scene.once({}, under?.(scene));
      assertEquals(code, 2, said);
      const [line = ""] = said.match(/.*not started.*/) ?? [];
      assertMatch(line, because);
      if (scene.status) assertMatch(scene.status, /^fail:preflight /);
      scene.assertUntouched(said, before);
    });
  }
});

Deno.test("in an append-only directory, where nothing can be renamed, no token is spent", async () => {
  await using scene = await Scene.open();
  sh('chattr +a "$1"', scene.home);
  scene.undo('chattr -a "$1"', scene.home);
  const { code, said } = await scene.once();
  assertEquals([code, scene.mock.requests.length, textOf(scene.auth)], [2, 0, scene.text], said);
  assertMatch(said, /not started.*not permitted/);
  // What was tried there could not be removed. It is as soon as that is possible.
  sh('chattr -a "$1"', scene.home);
  const next = await scene.once();
  assertEquals(next.code, 0, next.said);
  scene.assertRefreshed(next.said);
});

Deno.test("a file that only others may read is no login of ours", async () => {
  await using scene = await Scene.open();
  nobody(scene.home);
  const { code, said } = await scene.once({}, UNPRIVILEGED);
  assertEquals([code, scene.status], [1, "skip unreadable:EACCES"], said);
  scene.assertUntouched(said);
});

Deno.test("a full disk leaves the loop waiting, and it goes on as soon as there is room", async () => {
  await using scene = await Scene.open();
  scene.tmpfs();
  fill(scene.home);
  const log = `${scene.root}/log`;
  const env = { CODEX_AUTH_REFRESH_INTERVAL_SECONDS: "1", LOG: log };
  const running = scene.start([], env, ["sh", "-c", 'exec "$@" 2>"$LOG"', "sh"]);
  await until(() => inode(log) !== null && /not started.*full/.test(textOf(log)), "the loop has said so");
  assertEquals(scene.mock.requests.length, 0);
  Deno.removeSync(`${scene.home}/fill`);
  await until(() => scene.status.startsWith("refreshed"), "the loop has refreshed");
  running.kill("SIGTERM");
  const { code } = await running.ended;
  assertEquals(code, 0, textOf(log));
  scene.assertRefreshed(textOf(log));
});

Deno.test("an auth.json that is a symlink stays one, and everything is kept beside the real one", async () => {
  await using scene = await Scene.open();
  scene.tmpfs(`${scene.root}/disk`);
  Deno.removeSync(scene.auth);
  Deno.symlinkSync("../disk/auth.json", scene.auth);
  let there = false;
  scene.meanwhile(() => there = inode(scene.pending(`${scene.root}/disk`)) !== null);
  const { code, said } = await scene.once();
  assertEquals([code, there, Deno.readLinkSync(scene.auth)], [0, true, "../disk/auth.json"], said);
  assert(inode(`${scene.root}/disk/auth_refresh.lock`) !== null && inode(`${scene.home}/auth_refresh.lock`) === null);
  scene.assertRefreshed(said);
});

Deno.test("a mount point that cannot be seen beforehand is rewritten in place", async () => {
  await using scene = await Scene.open();
  scene.write(`${scene.root}/outside`);
  scene.mount("--bind", `${scene.root}/outside`, scene.auth);
  const before = inode(scene.auth);
  const { code, said } = await scene.once();
  assertEquals([code, inode(scene.auth)], [0, before], said);
  scene.assertRefreshed(said);
});

/** What cannot be renamed over, for CODEX_AUTH_IN_PLACE: each gives the file's other path. */
const PINNED: Record<string, (scene: Scene) => string> = {
  "a mount point from another file system"(scene) {
    scene.tmpfs(`${scene.root}/disk`);
    scene.mount("--bind", `${scene.root}/disk/auth.json`, scene.auth);
    return `${scene.root}/disk/auth.json`;
  },
  "a second hard link"(scene) {
    Deno.linkSync(scene.auth, `${scene.root}/second`);
    return `${scene.root}/second`;
  },
};

Deno.test("with CODEX_AUTH_IN_PLACE=1 it is rewritten in place, and the journal removed", async (t) => {
  for (const [name, pin] of Object.entries(PINNED)) {
    await t.step(name, async () => {
      await using scene = await Scene.open();
      const other = pin(scene);
      const before = inode(scene.auth);
      const { code, said } = await scene.once(IN_PLACE);
      assertEquals([code, inode(scene.auth), inode(other)], [0, before, before], said);
      scene.assertRefreshed(said);
      scene.assertRefreshed(said, other);
    });
  }
});

Deno.test("with CODEX_AUTH_IN_PLACE=1 a file of somebody else that we may write keeps its owner and mode", async () => {
  await using scene = await Scene.open();
  nobody(scene.home);
  Deno.chmodSync(scene.auth, 0o666);
  const { ino, uid, mode } = Deno.statSync(scene.auth);
  const { code, said } = await scene.once(IN_PLACE, UNPRIVILEGED);
  const now = Deno.statSync(scene.auth);
  assertEquals([code, now.ino, now.uid, now.mode], [0, ino, uid, mode], said);
  scene.assertRefreshed(said);
});

Deno.test("CODEX_AUTH_IN_PLACE=1 changes nothing for a file that can be replaced", async () => {
  await using scene = await Scene.open();
  const before = inode(scene.auth);
  const { code, said } = await scene.once(IN_PLACE);
  assertEquals(code, 0, said);
  assert(inode(scene.auth) !== before);
  scene.assertRefreshed(said);
});

// Each call that changes auth.json happens once, in the rewrite; `lost` is what the disk then had of it.
Deno.test("a rewrite in place that is killed halfway is finished by the next start", async () => {
  const whole = (text: string) => text;
  const moments: [calls: string, lost: (text: string) => string][] = [
    ["ftruncate", whole],
    ["write,pwrite64", whole],
    ["fsync,fdatasync", whole],
    ["fsync,fdatasync", (text) => text.slice(0, text.length / 2)],
    ["unlink,unlinkat", whole],
  ];
  const cases = Object.values(PINNED).flatMap((pin) => moments.map(([calls, lost]) => ({ pin, calls, lost })));
  await each(cases, async ({ pin, calls, lost }) => {
    await using scene = await Scene.open();
    const other = pin(scene);
    const running = scene.start(["--once"], IN_PLACE);
    let traced: Promise<unknown> = Promise.resolve();
    scene.meanwhile(() => {
      const path = calls.startsWith("unlink") ? scene.pending() : scene.auth;
      traced = attach(running, "/dev/null", "-e", `inject=${calls}:signal=KILL`, "-P", path);
    });
    const killed = await running.ended;
    await traced;
    assertEquals([killed.signal, scene.mock.requests.length], ["SIGKILL", 1], killed.said);
    // Cut off, it must not look whole: else the next start would believe it and remove the journal.
    if (calls.includes("write")) assertThrows(() => JSON.parse(textOf(scene.auth)), SyntaxError);
    scene.write(scene.auth, lost(textOf(scene.auth)));
    const { code, said } = await scene.once(IN_PLACE);
    assertEquals([code, scene.status, scene.mock.requests.length], [0, "refreshed rolled_forward", 1], said);
    scene.assertRefreshed(said);
    scene.assertRefreshed(said, other);
  }, ({ pin, calls }) => `${pin.name}, ${calls}`);
});

Deno.test("the reserved room holds the answer when the disk fills up before it arrives", async () => {
  await using scene = await Scene.open();
  scene.tmpfs();
  scene.meanwhile(() => fill(scene.home));
  const { code, said } = await scene.once();
  assertEquals(code, 0, said);
  assertMatch(said, /refresh: ok/);
  scene.assertRefreshed(said);
});

Deno.test("the reserved room holds a document that grows a lot when it is indented", async () => {
  await using scene = await Scene.open();
  scene.tmpfs(scene.home, "size=2m");
  scene.write(scene.auth, scene.text.replace("{", `{"deep":${nested(3000)},`));
  scene.meanwhile(() => fill(scene.home));
  const { code, said } = await scene.once();
  assertEquals(code, 0, said);
  scene.assertRefreshed(said);
  assert(Deno.statSync(scene.auth).size > 500_000, "it has grown");
});

Deno.test("nothing of the reserved room is left in auth.json", async (t) => {
  const ROOM = "\n".repeat(1 << 17);
  const cases: Record<string, (scene: Scene) => Promise<unknown>> = {
    "after a refresh": () => Promise.resolve(),
    "after another field came meanwhile": (scene) =>
      Promise.resolve(scene.meanwhile(() => scene.write(scene.auth, scene.text.replace("{", '{"theirs":1,')))),
    "after a kill between the answer and the cut, and a writer that died": async (scene) => {
      const path = await leftBehind(scene);
      scene.write(path, textOf(path) + ROOM);
      scene.write(scene.auth, "");
    },
  };
  for (const [name, arrange] of Object.entries(cases)) {
    await t.step(name, async () => {
      await using scene = await Scene.open();
      await arrange(scene);
      const { code, said } = await scene.once();
      assertEquals(code, 0, said);
      scene.assertRefreshed(said);
      assert(textOf(scene.auth).endsWith("}"), said);
      assert(Deno.statSync(scene.auth).size < 16 << 10, said);
    });
  }
});

/** An answer larger than any room that is reserved for it. */
const LARGE: Behaviour = { kind: "fields", fields: { access_token: "a".repeat(300_000) } };

Deno.test("an answer that is larger than the room waits for the disk, and is not lost", async (t) => {
  for (const args of [["--once"], []]) {
    await t.step(args[0] ?? "the loop", async () => {
      await using scene = await Scene.open();
      scene.tmpfs();
      scene.mock.next(LARGE);
      scene.meanwhile(() => fill(scene.home));
      const running = scene.start(args);
      await until(() => scene.status.startsWith("fail:store the disk is full"), "the first try has failed");
      assertEquals(textOf(scene.auth), scene.text);
      Deno.removeSync(`${scene.home}/fill`);
      await until(() => scene.status.startsWith("refreshed"), "the answer is stored");
      if (args.length === 0) running.kill("SIGTERM");
      const { code, said } = await running.ended;
      assertEquals([code, scene.mock.requests.length], [0, 1], said);
      scene.assertRefreshed(said);
    });
  }
});

/** What keeps an answer from being stored, and what ends that. */
interface Obstacle {
  arrange?(scene: Scene): void;
  begin(scene: Scene): void;
  end(scene: Scene): void;
  /** Whether the status can be written meanwhile. */
  shows: boolean;
}

const IMMUTABLE: Obstacle = {
  begin: (scene) => scene.immutable(scene.home),
  end: (scene) => sh('chattr -i "$1"', scene.home),
  shows: false,
};

/** What is written to such a mount is lost as soon as the container ends. */
const REPLACED_OUTSIDE: Obstacle = {
  arrange(scene) {
    scene.write(`${scene.root}/outside`);
    sh('mount --bind "$1" "$2"', `${scene.root}/outside`, scene.auth);
    scene.undo('umount "$1" 2>&- || true', scene.auth);
  },
  begin(scene) {
    scene.write(`${scene.root}/new`);
    Deno.renameSync(`${scene.root}/new`, `${scene.root}/outside`);
  },
  end: (scene) => sh('umount "$1"', scene.auth),
  shows: true,
};

/** Tries for a minute, says where the answer is, and stores it at the next start. */
async function givesUp(args: string[], { arrange, begin, end, shows }: Obstacle) {
  const started = Date.now();
  await using scene = await Scene.open();
  arrange?.(scene);
  let asked = Infinity;
  scene.meanwhile(() => {
    begin(scene);
    asked = Date.now();
  });
  const running = scene.start(args, IN_PLACE);
  await until(() => asked < Infinity, "the request");
  if (shows) await until(() => scene.status.startsWith("fail:store"), "the status tells");
  assert(Date.now() - asked < 5000, "the status tells at once");
  if (args.length === 0) running.kill("SIGTERM");
  const { code, said } = await running.ended;
  assert(Date.now() - started > 55_000, said);
  assertEquals(code, args.length === 0 ? 0 : 2, said);
  const [kept = ""] = scene.journals;
  const told = shows ? `fail:store ${/not stored: (.*)/.exec(said)?.[1]}` : "";
  assert(said.includes(`${scene.home}/${kept}: do not delete it`), said);
  assert(textOf(`${scene.home}/${kept}`).includes(scene.mock.newest(scene.old.refresh_token)), said);
  assertEquals(scene.status, told, said);
  assert(!said.includes("refresh: ok"), said);
  assertEquals(textOf(scene.auth), scene.text);
  end(scene);
  const next = await scene.once(IN_PLACE);
  assertEquals([next.code, scene.status, scene.mock.requests.length], [0, "refreshed rolled_forward", 1], next.said);
  scene.assertRefreshed(said);
}

/** Ten failures take half a minute. */
async function renamedAtLast() {
  await using scene = await Scene.open();
  scene.meanwhile(() => scene.write(scene.auth, scene.text.replace("{", '{"theirs":1,')));
  const { code, said } = await scene.once({}, strace([scene.journal()], "-e", "inject=/^rename:error=EIO:when=1..10"));
  assertEquals([code, scene.mock.requests.length], [0, 1], said);
  scene.assertRefreshed(said);
  assertEquals(JSON.parse(textOf(scene.auth)).theirs, 1);
}

/** All of it waiting, so all of it at the same time. */
const PERSISTENT: Record<string, () => Promise<void>> = {
  "after a minute --once gives up": () => givesUp(["--once"], IMMUTABLE),
  "after a SIGTERM and a minute the loop gives up": () => givesUp([], IMMUTABLE),
  "a mount whose file was replaced outside meanwhile is no place for an answer": () =>
    givesUp(["--once"], REPLACED_OUTSIDE),
  "a rename that fails ten times leaves nothing behind": renamedAtLast,
};

Deno.test("while an answer cannot be stored it is kept in its journal: tried again, and not given up too early", () =>
  each(Object.entries(PERSISTENT), ([, run]) => run(), ([name]) => name));

Deno.test("what root writes belongs to the owner of auth.json", async () => {
  await using scene = await Scene.open();
  nobody(scene.home, scene.auth);
  const owner = (path: string) => {
    const { uid, gid, mode } = Deno.statSync(path);
    return [uid, gid, (mode ?? 0) & 0o777];
  };
  let journal: unknown;
  scene.meanwhile(() => journal = owner(scene.pending()));
  const { code, said } = await scene.once();
  assertEquals(code, 0, said);
  const ours = [NOBODY, NOBODY, 0o600];
  assertEquals(journal, ours);
  for (const name of ["auth.json", "auth_refresh.lock", "auth_refresh_status.json"]) {
    assertEquals(owner(`${scene.home}/${name}`), ours, name);
  }
  const next = await scene.start(["--once", "--force"], {}, UNPRIVILEGED).ended;
  assertEquals(next.code, 0, next.said);
  scene.assertRefreshed(next.said);
});

// No leak -------------------------------------------------------------------

/** Every piece of nine characters of these secrets. */
function piecesOf(secrets: readonly string[]): Set<string> {
  const pieces = new Set<string>();
  for (const secret of secrets) {
    for (let start = 0; start + 9 <= secret.length; start++) pieces.add(secret.slice(start, start + 9));
  }
  return pieces;
}

/** The first of these pieces in a text. */
function leakIn(text: string, pieces: ReadonlySet<string>): string | null {
  for (const [run] of text.matchAll(/[\w.-]{9,}/g)) {
    for (let start = 0; start + 9 <= run.length; start++) {
      if (pieces.has(run.slice(start, start + 9))) return run.slice(start, start + 9);
    }
  }
  return null;
}

/** The calls of a trace; those that strace tore apart at a switch of threads are whole again. */
function callsOf(trace: string): string[] {
  const begun = new Map<string, string>();
  const calls = trace.split("\n").flatMap((line) => {
    const [, thread = "", call = ""] = /^(\d+) +(.*)$/.exec(line) ?? [];
    if (call.endsWith(" <unfinished ...>")) {
      begun.set(thread, call.slice(0, -" <unfinished ...>".length));
      return [];
    }
    const [, rest] = /^<\.\.\. \w+ resumed>(.*)$/.exec(call) ?? [];
    const start = begun.get(thread) ?? "";
    if (rest !== undefined) begun.delete(thread);
    return [rest === undefined ? call : start + rest];
  });
  return [...calls, ...begun.values()];
}

interface Path {
  args?: string[];
  behaviours?: (scene: Scene) => Behaviour[];
  arrange?: (scene: Scene) => void;
  meanwhile?: (scene: Scene) => void;
  env?: Record<string, string>;
  ends: number;
}

const refused = (status: number, code: string): Behaviour => ({ kind: "status", status, code });
/** An answer that says again what it was sent, in each place that a log line might quote. */
const echo = (status: number, token: string): Behaviour => ({
  kind: "raw",
  status,
  headers: { location: `https://example.com/${token}`, "retry-after": token, "x-request-id": token },
  body: JSON.stringify({ error: { code: token, message: token, type: token }, code: token, [token]: token }),
});

const PATHS: Record<string, Path> = {
  "a refresh": { ends: 0 },
  "a refresh in JSON": { env: { CODEX_AUTH_LOG_FORMAT: "json" }, ends: 0 },
  "a forced one": { args: ["--once", "--force"], ends: 0 },
  "the loop": { args: [], ends: 0 },
  "--status": { args: ["--status"], ends: 0 },
  "--status --json": { args: ["--status", "--json"], ends: 0 },
  "--status --verbose": { args: ["--status", "--verbose"], ends: 0 },
  "--health": { args: ["--health"], ends: 1 },
  "--metrics": { args: ["--metrics"], ends: 0 },
  "a token in the arguments' place": { args: ["--onse"], ends: 64 },
  "nothing due": { arrange: (scene) => scene.write(scene.auth, authJson(scene.mock.login())), ends: 1 },
  "a torn file": { arrange: (scene) => scene.write(scene.auth, scene.text.slice(0, -9)), ends: 1 },
  "tokens where they do not belong": {
    arrange(scene) {
      const { refresh_token, access_token } = scene.old;
      const document = { auth_mode: refresh_token, last_refresh: access_token, tokens: scene.old };
      scene.write(scene.auth, JSON.stringify(document));
    },
    ends: 1,
  },
  "a dead token": { behaviours: () => [refused(401, "refresh_token_reused")], ends: 3 },
  "no answer but an error": { behaviours: () => [refused(503, "overloaded")], ends: 2 },
  "a page": { behaviours: () => [{ kind: "html" }], ends: 2 },
  "half an answer": { behaviours: () => [{ kind: "cut_json" }], ends: 2 },
  "an answer that gets lost": { behaviours: () => [{ kind: "reset", ledger: "after" }, refused(500, "x")], ends: 2 },
  "no server": { env: { CODEX_REFRESH_TOKEN_URL_OVERRIDE: "http://127.0.0.1:1/" }, ends: 2 },
  "unusable tokens": {
    behaviours: ({ old }) => [{ kind: "fields", fields: { id_token: `${old.refresh_token}.x`, access_token: 7 } }],
    ends: 0,
  },
  ...Object.fromEntries([200, 307, 400, 401, 429].flatMap((status): [string, Path][] => [
    [`${status} with the token in it`, {
      behaviours: ({ old }) => [echo(status, old.refresh_token)],
      ends: status === 401 ? 3 : 2,
    }],
    [`${status} with a piece of the token in it`, {
      behaviours: ({ old }) => [echo(status, old.refresh_token.slice(3, 33))],
      ends: status === 401 ? 3 : 2,
    }],
  ])),
  "no preflight": { arrange: (scene) => Deno.linkSync(scene.auth, `${scene.root}/second`), ends: 2 },
  "in place": { arrange: (scene) => Deno.linkSync(scene.auth, `${scene.home}/auth.json.2`), env: IN_PLACE, ends: 0 },
  "another login meanwhile": { meanwhile: (scene) => scene.write(scene.auth, authJson(scene.mock.login())), ends: 1 },
  "other fields meanwhile": {
    meanwhile: (scene) => scene.write(scene.auth, scene.text.replace(/{/, '{"a":0,')),
    ends: 0,
  },
  "a journal removed meanwhile": { meanwhile: (scene) => Deno.removeSync(scene.pending()), ends: 0 },
};

Deno.test("no piece of a token gets anywhere but into auth.json, its journal and the socket", async (t) => {
  const umask = Deno.umask(0);
  try {
    for (const [name, path] of Object.entries(PATHS)) await t.step(name, () => traceOf(path));
  } finally {
    Deno.umask(umask);
  }
});

async function traceOf({ args = ["--once"], behaviours, arrange, meanwhile, env, ends }: Path) {
  await using scene = await Scene.open();
  const log = `${scene.root}/trace`;
  arrange?.(scene);
  scene.mock.next(...behaviours?.(scene) ?? []);
  let shown = "";
  const running = scene.start(args, env, ["strace", "-f", "-yy", "-s", "100000", "-o", log]);
  const child = () => textOf(`/proc/${running.pid}/task/${running.pid}/children`).trim().split(" ")[0];
  scene.meanwhile(() => {
    shown = ["cmdline", "environ", "comm"].map((file) => textOf(`/proc/${child()}/${file}`)).join();
    meanwhile?.(scene);
  });
  if (args.length === 0) {
    await until(() => scene.status.startsWith("refreshed"), "the loop has refreshed");
    Deno.kill(Number(child()), "SIGTERM");
  }
  const { code, said, printed } = await running.ended;
  assertEquals(code, ends, said);
  if (!env?.CODEX_AUTH_LOG_FORMAT) assertMatch(said, DOCUMENTED);

  const pieces = piecesOf(scene.mock.secrets);
  for (const text of [said, printed, shown]) assertEquals(leakIn(text, pieces), null, text);
  const ours = `${scene.home}/(auth\\.json|\\.auth\\.json\\.[0-9a-f]{16}\\.tmp(\\.new)?)`;
  const allowed = new RegExp(`^\\w+\\(\\d+<(${ours}|TCP:\\[\\S+:${scene.mock.port}\\])>`);
  const calls = callsOf(textOf(log));
  for (const call of calls.filter((call) => !allowed.test(call))) assertEquals(leakIn(call, pieces), null, call);
  // What is seen here is what there was: tokens were read at all, and sent wherever there was an answer.
  if (ends !== 64) assert(calls.some((call) => allowed.test(call) && leakIn(call, pieces)));

  const created = calls.filter((call) => /^(open|openat|openat2|creat)\(.*(O_CREAT|O_TMPFILE)/.test(call));
  for (const call of created.filter((call) => call.includes("O_EXCL"))) assertMatch(call, /, 0600\) += /);
  const journals = created.filter((call) => /\/\.auth\.json\.[^"/]*"/.test(call));
  for (const call of journals) assertMatch(call, /O_EXCL.*, 0600\) += /);
  if (scene.mock.requests.length > 0) assert(journals.length > 0, "none is seen, though no request goes without one");
  for (const call of created) assertMatch(call, new RegExp(`"${scene.home}/[^/]+"|"/dev/`));
  for (const call of calls) assert(!/^f?chmod/.test(call) || /, 0?600\) += /.test(call), call);
  for (const { name } of Deno.readDirSync(scene.home)) {
    if (name !== "auth.json") assertEquals((Deno.statSync(`${scene.home}/${name}`).mode ?? 0) & 0o077, 0, name);
    if (!name.startsWith("auth.json")) assertEquals(leakIn(textOf(`${scene.home}/${name}`), pieces), null, name);
  }
}

// Ten thousand bad inputs ---------------------------------------------------

const INPUTS = 10_000;
const SEED = 20_260_131;

/** The same throws in every run (mulberry32). */
class Dice {
  constructor(private state: number) {}
  next(): number {
    this.state = this.state + 0x6D2B79F5 | 0;
    let mixed = Math.imul(this.state ^ this.state >>> 15, 1 | this.state);
    mixed = mixed + Math.imul(mixed ^ mixed >>> 7, 61 | mixed) ^ mixed;
    return ((mixed ^ mixed >>> 14) >>> 0) / 2 ** 32;
  }
  below(limit: number): number {
    return Math.floor(this.next() * limit);
  }
  chance(percent: number): boolean {
    return this.next() * 100 < percent;
  }
  one<T>(of: readonly T[]): T {
    return of[this.below(of.length)]!;
  }
}

/** JSON as this file reads it: objects are Maps, the last of equal names counts, numbers stay text. */
type Json = null | boolean | string | Digits | Json[] | Map<string, Json>;
class Digits {
  constructor(readonly text: string) {}
}

/** A reader of its own, to compare by. undefined for what is not JSON. */
function readJson(bytes: Uint8Array): Json | undefined {
  let at = 0;
  const take = (pattern: RegExp): string => {
    pattern.lastIndex = at;
    const [found] = pattern.exec(text) ?? [];
    if (found === undefined) throw new SyntaxError(`at ${at}`);
    at += found.length;
    return found;
  };
  const space = /[ \t\n\r]*/y;
  const string = (): string => JSON.parse(take(/"[^"\\]*(?:\\.[^"\\]*)*"/y));
  const list = (end: string, item: () => void) => {
    at++;
    take(space);
    for (let first = true; text[at] !== end; first = false) {
      if (!first) take(/,[ \t\n\r]*/y);
      item();
      take(space);
    }
    at++;
  };
  const value = (levels: number): Json => {
    if (levels === 0) throw new RangeError();
    if (text[at] === '"') return string();
    if (text[at] === "[") {
      const items: Json[] = [];
      list("]", () => items.push(value(levels - 1)));
      return items;
    }
    if (text[at] === "{") {
      const members = new Map<string, Json>();
      list("}", () => {
        const name = string();
        take(/[ \t\n\r]*:[ \t\n\r]*/y);
        members.set(name, value(levels - 1));
      });
      return members;
    }
    const word = take(/true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?/y);
    return word === "null" ? null : word === "true" ? true : word === "false" ? false : new Digits(word);
  };
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    take(space);
    const whole = value(2000);
    take(space);
    return at === text.length ? whole : undefined;
  } catch {
    return undefined;
  }
}

const levelsOf = (value: Json): number =>
  value instanceof Map || Array.isArray(value) ? 1 + Math.max(0, ...[...value.values()].map(levelsOf)) : 0;

/** One text for equal values, whatever the order of names. */
function canonical(value: Json): string {
  if (value instanceof Digits) return `#${value.text}`;
  if (Array.isArray(value)) return `[${value.map(canonical)}]`;
  if (!(value instanceof Map)) return JSON.stringify(value);
  return `{${[...value].map(([name, each]) => `${JSON.stringify(name)}:${canonical(each)}`).sort()}}`;
}

const QUOTED = [
  "",
  "x",
  "\\u0000",
  "\\ud800",
  "\\udc00\\ud800",
  "\\ud83d\\ude00",
  "\u{1f600}",
  "\u2028",
  '\\"\\\\\\/\\b',
];
const NAMES = ["__proto__", "constructor", "toJSON", "prototype", "hasOwnProperty", "toString", "then", "rawJSON", "0"];
const NUMBERS = [
  "0",
  "-0",
  "1.0",
  "1e400",
  "-1E-400",
  "123456789012345678901234567890",
  "0.1000000000000000055",
  "1e5",
];
const MEMBERS = ["auth_mode", "OPENAI_API_KEY", "tokens", "last_refresh", "refresh_token", "error", "code"];

/** A JSON text of any kind. */
function anything(dice: Dice, levels = 4): string {
  const kind = dice.below(levels > 0 ? 10 : 7);
  if (kind < 2) return dice.one(NUMBERS);
  if (kind < 3) return dice.one(["null", "true", "false"]);
  if (kind < 6) return `"${dice.one([...QUOTED, ...NAMES, "2026-02-30T00:00:00Z", "e30.e30.", "a.b.c"])}"`;
  if (kind < 7) {
    if (dice.chance(80)) return `"${"A".repeat(dice.one([100, 10_000, 300_000]))}"`;
    const depth = dice.one([20, 100, 200, 1000]);
    const [open, close] = dice.one([["[", "]"], ['{"":', "}"]]) as [string, string];
    return open.repeat(depth) + "0" + close.repeat(depth);
  }
  const items = Array.from({ length: dice.below(4) }, () => anything(dice, levels - 1));
  if (kind < 8) return `[${items}]`;
  return `{${items.map((item) => `"${dice.one([...QUOTED, ...NAMES, ...MEMBERS])}":${item}`)}}`;
}

type Member = [name: string, text: string];

/** An object of these members after up to three accidents. */
function broken(dice: Dice, members: readonly Member[]): string {
  const list = [...members];
  for (let left = dice.below(4); left > 0; left--) {
    const at = dice.below(list.length + 1);
    const [name = ""] = list[at] ?? [];
    const added = dice.one([...QUOTED, ...NAMES, ...NAMES, ...MEMBERS]);
    if (dice.chance(50)) list.splice(at, 0, [added, anything(dice)]);
    else if (dice.chance(30)) list.splice(at, 1);
    else if (dice.chance(60)) list.splice(at, 1, [name, anything(dice)]);
    else list.push(dice.one(list.length > 0 ? list : members)); // the same once more
  }
  const space = dice.one(["", " ", "\n\t", "\r\n"]);
  return `{${list.map(([name, text]) => `${space}"${name}"${space}:${space}${text}`).join(`${space},`)}${space}}`;
}

/** The bytes of a text, every third time damaged. */
function damaged(dice: Dice, text: string): Uint8Array {
  const bytes = new TextEncoder().encode(text);
  if (!dice.chance(33)) return bytes;
  const at = dice.below(bytes.length);
  const insert = (...inserted: number[]) => new Uint8Array([...bytes.slice(0, at), ...inserted, ...bytes.slice(at)]);
  return dice.one<() => Uint8Array>([
    () => bytes.slice(0, at),
    () => new Uint8Array(dice.one([0, 0, bytes.length])),
    () => bytes.with(at, bytes[at]! ^ 1 << dice.below(8)),
    () => insert(0),
    () => insert(dice.below(256)),
    () => insert(0xff),
    () => insert(0xed, 0xa0, 0x80), // a surrogate, which UTF-8 has not
    () => insert(0xc0, 0xaf), // longer than it need be
    () => insert(0xf0, 0x9f, 0x98, 0x80),
    () => new Uint8Array([0xef, 0xbb, 0xbf, ...bytes]),
    () => new Uint8Array([0xff, 0xfe, ...[...bytes].flatMap((byte) => [byte, 0])]),
    () => new Uint8Array([...bytes, ...bytes]),
    () => new TextEncoder().encode("[".repeat(500_000)),
    () => new TextEncoder().encode(`[${text}]`),
    () => new TextEncoder().encode(`${text}${dice.one(["\n\n", "\0", ",", "}", "//", "\u00a0"])}`),
    () => new TextEncoder().encode(dice.one([" ", "\n", "null", "true", '"x"', "7", "NaN", "undefined", "<html>"])),
  ])();
}

const LOGIN = { id_token: jwt({ exp: 1 }), access_token: jwt({ exp: 1 }), refresh_token: "rt_0123456789_of_the_file" };
const quoted = (tokens: object): Member[] =>
  Object.entries(tokens).map(([name, value]): Member => [name, JSON.stringify(value)]);
const membersOf = (value: Json | undefined): Map<string, Json> => value instanceof Map ? value : new Map();
const memberOf = (value: Json | undefined, name: string): Json | undefined => membersOf(value).get(name);
const isString = (value: Json | undefined): value is string => typeof value === "string" && value !== "";

interface Tried {
  outcome: string;
  /** All that was logged, and the status file. */
  said: string;
}

/** Looks at a home, as the executable does or inside this process, which is faster. */
async function look(home: string, url: string, throughExe: boolean): Promise<Tried> {
  const variables = { CODEX_REFRESH_TOKEN_URL_OVERRIDE: url };
  const status = `${home}/auth_refresh_status.json`;
  let said = "";
  if (throughExe) {
    const command = new Deno.Command(exe, { args: ["--once", home], env: variables, clearEnv: true, stdin: "null" });
    const { code, stderr } = await command.output();
    said = new TextDecoder().decode(stderr);
    assertMatch(said, DOCUMENTED);
    const { watchdog_last_outcome: outcome } = JSON.parse(textOf(status));
    const codes = { refreshed: 0, superseded: 1, skip: 1, "fail:permanent": 3 };
    const known = Object.entries(codes).find(([start]) => outcome.startsWith(start));
    assertEquals(code, known?.[1] ?? 2, said);
  } else {
    const context = {
      settings: readSettings(variables),
      log: (_level: string, _event: string, text: string) =>
        void (said += `[codex_auth_refresh 1970-01-01T00:00:00Z] ${text}\n`),
      force: false,
      stop: new AbortController().signal,
      patience: (since: number) => since,
      rejected: null,
      now: Date.now,
    };
    await attempt({ dir: home, status }, context);
    assertMatch(said, DOCUMENTED);
  }
  const { watchdog_last_outcome: outcome, detail } = JSON.parse(textOf(status));
  return { outcome: detail === null || !outcome.startsWith("skip") ? outcome : `${outcome} ${detail}`, said };
}

/** What has to come of an auth.json: the rules for deciding, by another reader. */
function verdictOf(bytes: Uint8Array): RegExp {
  if (bytes.length === 0) return /^skip:no_auth_json/;
  const document = readJson(bytes);
  if (!(document instanceof Map) || levelsOf(document) > 127) return /^skip unreadable:\w+$/;
  const mode = document.get("auth_mode") ?? null; // nesting beyond 127 the Codex CLI does not read either
  const key = document.get("OPENAI_API_KEY") ?? null;
  if (mode === "" || mode === null && key === "") return /^(refreshed|skip (no_refresh_token|auth_mode=none))$/;
  if (mode !== null && typeof mode !== "string") return /^skip unreadable:TypeError$/;
  if (mode === null ? key !== null : !/^chatgpt(_auth_tokens)?$/i.test(mode)) return /^skip auth_mode=[\w.-]+$/;
  return isString(memberOf(document.get("tokens"), "refresh_token")) ? /^refreshed$/ : /^skip no_refresh_token$/;
}

/** Which tokens of an answer are to be kept. */
function usableOf(answer: Json | undefined): (keyof Tokens)[] {
  return (["id_token", "access_token", "refresh_token"] as const).filter((name) => {
    const value = memberOf(answer, name);
    if (!isString(value) || !value.isWellFormed() || value.includes("\ufffd")) return false; // no UTF-8
    const [header, payload = "", signature] = value.split(".");
    const decodes = /^[\w-]+$/.test(payload) && payload.length % 4 !== 1 &&
      readJson(Buffer.from(payload, "base64url")) instanceof Map;
    return name !== "id_token" || Boolean(header && signature && decodes);
  });
}

/** auth.json with tokens of an answer in it, compared in every other field. */
function assertCarried(before: Json | undefined, tokens: Map<string, Json>, bytes: Uint8Array, what: string) {
  const after = membersOf(readJson(bytes));
  const now = after.get("last_refresh") ?? null;
  assert(typeof now === "string" && Math.abs(Date.now() - Date.parse(now)) < LIMIT_MS && now.endsWith("Z"), what);
  const wanted = new Map([...membersOf(before), ["last_refresh", now]]);
  wanted.set("tokens", new Map([...membersOf(memberOf(before, "tokens")), ...tokens]));
  assertEquals(canonical(after), canonical(wanted), what);
}

/** Runs numbered cases, so many at a time. */
async function numbered(count: number, width: number, run: (index: number, lane: number) => Promise<void>) {
  let index = 0;
  await each(Array.from({ length: width }, (_, lane) => lane), async (lane) => {
    while (index < count) await run(index++, lane);
  });
}

Deno.test("ten thousand bad inputs: a documented outcome each, no crash, no field lost, no token shown", async () => {
  const root = Deno.makeTempDirSync({ prefix: "torture_inputs_" });
  sh('mount -t tmpfs none "$1"', root);
  const [files, ...lanes] = await Promise.all(
    Array.from({ length: 9 }, () => startMockServer({ acceptAny: true })),
  ) as [MockServer, ...MockServer[]];
  const outcomes: Record<string, number> = {};
  const hidden = piecesOf(Object.values(LOGIN));
  const half = INPUTS / 2;
  const check = async (index: number, bytes: Uint8Array, url: string) => {
    const home = `${root}/${index}`;
    Deno.mkdirSync(home);
    Deno.writeFileSync(`${home}/auth.json`, bytes, { mode: 0o600 });
    const { outcome, said } = await look(home, url, index % 50 === 0);
    const kind = outcome.replace(/ .*|_\d+$/, "");
    outcomes[kind] = (outcomes[kind] ?? 0) + 1;
    const shown = said + textOf(`${home}/auth_refresh_status.json`);
    assertEquals(leakIn(shown, hidden), null, shown);
    const after = Deno.readFileSync(`${home}/auth.json`);
    if (outcome !== "refreshed") assert(Buffer.from(bytes).equals(after), said);
    for (const { name } of Deno.readDirSync(home)) assert(!name.endsWith(".tmp"), name);
    Deno.removeSync(home, { recursive: true });
    return { outcome, said, after };
  };

  const brokenFile = async (index: number) => {
    const dice = new Dice(SEED + index);
    const tokens = dice.chance(70)
      ? broken(dice, [...quoted(LOGIN), ["account_id", '"x"']])
      : broken(dice, quoted(LOGIN));
    const mode = dice.one(['"chatgpt"', '"chatgpt"', '"ChatGPT"', '"CHATGPT_AUTH_TOKENS"', "null"]);
    const members: Member[] = [
      ["auth_mode", mode],
      ["OPENAI_API_KEY", "null"],
      ["tokens", tokens],
      ["last_refresh", '"2020-01-01T00:00:00Z"'],
    ];
    const bytes = damaged(dice, broken(dice, members));
    const { outcome, said, after } = await check(index, bytes, files.url);
    assertMatch(outcome, verdictOf(bytes), `input ${index}: ${said}`);
    if (outcome !== "refreshed") return;
    const before = readJson(bytes);
    const fresh = files.newest(String(memberOf(memberOf(before, "tokens"), "refresh_token")));
    const stored = memberOf(readJson(after), "tokens");
    const issued = ["id_token", "access_token", "refresh_token"].map((name): [string, Json] => {
      const token = String(memberOf(stored, name));
      assert(files.secrets.includes(token), said);
      return [name, token];
    });
    assertEquals(memberOf(stored, "refresh_token"), fresh, said);
    assertCarried(before, new Map(issued), after, `input ${index}`);
  };

  const file = new TextEncoder().encode(
    `{"__proto__":{"x":1},"toJSON":1e400,"tokens":{${quoted(LOGIN).map(([name, text]) => `"${name}":${text}`)}}}`,
  );
  const brokenAnswer = async (index: number, lane: number) => {
    const dice = new Dice(SEED + index);
    const mock = lanes[lane]!;
    const success = dice.chance(70);
    const dead = !success && dice.chance(2); // each takes three seconds: it waits for another writer
    const status = success ? dice.one([200, 200, 200, 200, 201, 202, 299]) : dice.one(
      dead ? [401, 400, 403] : [300, 301, 307, 308, 400, 403, 404, 409, 418, 429, 451, 499, 500, 502, 503, 599],
    );
    const tokens = { ...LOGIN, id_token: jwt({ exp: 2 }), access_token: "new_access", refresh_token: "new_refresh" };
    const shape = dice.one(['{"error":{"code":CODE}}', '{"error":CODE}', '{"code":CODE}']);
    const body = success
      ? damaged(dice, broken(dice, [...quoted(tokens), ["token_type", '"Bearer"'], ["expires_in", "1e3"]]))
      : dead
      ? new TextEncoder().encode(shape.replace("CODE", '"invalid_grant"'))
      : damaged(dice, shape.replace("CODE", anything(dice)));
    const retry = dice.one(["0", "-1", "1e9", "9".repeat(400), "Wed, 21 Oct 2015 07:28:00 GMT", "soon"]);
    const headers = { location: "http://127.0.0.1:1/", "retry-after": retry };
    mock.next({ kind: "raw", status, body, headers, contentType: dice.one(["application/json", "text/html", "x"]) });
    const { outcome, said, after } = await check(index, file, mock.url);

    const answer = readJson(new TextEncoder().encode(new TextDecoder().decode(body.subarray(0, 1 << 20))));
    const usable = usableOf(answer);
    const wanted = success
      ? usable.length > 0 ? "refreshed" : "fail:apply_response"
      : `fail:${dead ? "permanent" : "transient"}_${status}`;
    assertEquals(outcome, wanted, `input ${index}: ${said}`);
    if (outcome !== "refreshed") return;
    const kept = usable.map((name): [string, Json] => [name, memberOf(answer, name)!]);
    assertCarried(readJson(file), new Map(kept), after, `input ${index}`);
  };

  try {
    for (const mock of [files, ...lanes]) mock.graceMilliseconds = Infinity; // many files hold the same token
    await each([
      () => numbered(half, 256, brokenFile),
      () => numbered(half, lanes.length, (index, lane) => brokenAnswer(half + index, lane)),
    ], (run) => run());
    console.log(outcomes);
    for (const kind of ["refreshed", "skip", "skip:no_auth_json", "fail:apply_response", "fail:transient"]) {
      assert((outcomes[kind] ?? 0) > 50, kind);
    }
  } finally {
    await Promise.all([files, ...lanes].map((mock) => mock.close()));
    sh('umount "$1"', root);
    Deno.removeSync(root);
  }
});
