/**
 * What the proofs of storing share: a login nine days old, in a home of its own, with the server that issued it;
 * processes that work on it, disks that fail it; tables of cases; and judging what became of the login, by the server's
 * ledger and the disk alone. Wants Linux; most of those who use it also root, strace and the right to mount.
 *
 * @module
 */
import { assertEquals, assertMatch } from "@std/assert";
import { createHash } from "node:crypto";
import { dirname } from "node:path";
import { authJson, type MockServer, startMockServer, type Tokens } from "../mock_server.ts";
import {
  attempt,
  built,
  type Ended,
  given,
  launch,
  type Running,
  statOf,
  table,
  textOf,
  tokenIn,
  until,
} from "./tools.ts";

export * from "./tools.ts";
export const ALL_AT_ONCE = 256; // where nearly all of it is waiting
export const NOBODY = 65534;
export const UNPRIVILEGED = ["setpriv", `--reuid=${NOBODY}`, `--regid=${NOBODY}`, "--clear-groups", "--"];
export const IN_PLACE = { CODEX_AUTH_IN_PLACE: "1" };

/** A copy that an unprivileged user can start wherever the original lies. */
export const exe = `${Deno.makeTempDirSync({ prefix: "scene_exe_" })}/codex_auth_refresh`;
Deno.copyFileSync(built, exe);
for (const path of [exe, dirname(exe)]) Deno.chmodSync(path, 0o755);
globalThis.addEventListener("unload", () => Deno.removeSync(dirname(exe), { recursive: true }));

// What may be said ----------------------------------------------------------------------------------------------------

/** Log lines and nothing else: no stack trace, nothing that JavaScript prints of itself. */
export const DOCUMENTED =
  /^((\[codex_auth_refresh [-\dT:]+Z\]|codex_auth_refresh:) (?!.*(undefined|\[object|NaN| {4}at ))\P{Cc}+\n)*$/u;

/** Every piece of nine characters of these secrets. */
export function piecesOf(secrets: readonly string[]): Set<string> {
  const pieces = new Set<string>();
  for (const secret of secrets) {
    for (let start = 0; start + 9 <= secret.length; start++) pieces.add(secret.slice(start, start + 9));
  }
  return pieces;
}

/** The first of these pieces in a text. */
export function leakIn(text: string, pieces: ReadonlySet<string>): string | null {
  for (const [run] of text.matchAll(/[\w.-]{9,}/g)) {
    for (let start = 0; start + 9 <= run.length; start++) {
      if (pieces.has(run.slice(start, start + 9))) return run.slice(start, start + 9);
    }
  }
  return null;
}

// Tracing -------------------------------------------------------------------------------------------------------------

/** strace, which injects a fault into the calls that touch one of these paths, or any. */
export const strace = (scene: Scene, inject: string, ...paths: string[]) => [
  ...["strace", "-f", "-qq", "-o", scene.trace, "-e", `inject=${inject}`],
  ...paths.flatMap((path) => ["-P", path]),
];

/** A system call as strace shows it. */
export interface Call {
  readonly thread: string;
  readonly name: string;
  /** All of it, from the name to what it returned. */
  readonly text: string;
}

/** The calls of a trace in the order in which they began; those that a switch of threads tore apart are whole again. */
export function callsOf(trace: string): Call[] {
  const calls: { thread: string; name: string; text: string }[] = [];
  const begun = new Map<string, { text: string }>();
  for (const [, thread = "", text = ""] of trace.matchAll(/^(\d+) +(.*)$/gm)) {
    const [, name] = /^(\w+)\(/.exec(text) ?? [];
    const [, rest] = /^<\.\.\. \w+ resumed>(.*)$/.exec(text) ?? [];
    const unfinished = begun.get(thread);
    if (rest !== undefined && unfinished !== undefined) unfinished.text += rest;
    if (name === undefined) continue;
    const call = { thread, name, text: text.replace(/ <unfinished \.\.\.>$/, "") };
    if (call.text !== text) begun.set(thread, call);
    calls.push(call);
  }
  return calls;
}

// A login, and who works on it ----------------------------------------------------------------------------------------

/** A shell command, or what needs more than one. */
export type Step = string | ((scene: Scene) => unknown);

const SHELL = `set -e
disk() {
  cp -p home/auth.json . && mkdir -p "$1" && mount -t tmpfs -o "\${2:-size=1m}" none "$1"
  chmod 755 "$1" && cp -p auth.json "$1"
}
fill() {
  cat /dev/zero >"$1/fill" 2>&- || true
}
`;

/** How a run may end: its exit code, outcome and detail, and what the server makes of the requests. */
const ENDINGS = {
  "refreshed": { code: 0, status: /^refreshed null$/, asked: ["redeemed"] },
  "rolled forward": { code: 0, status: /^refreshed rolled_forward$/, asked: [] },
  "superseded": { code: 1, status: /^superseded /, asked: ["redeemed"] },
  "nothing to do": { code: 1, status: /^skip/, asked: [] },
  "not started": { code: 2, status: /^fail:preflight /, asked: [] },
} as const;
export type Ending = keyof typeof ENDINGS;

/**
 * One login, expired, in a home of its own, and the server that issued it. The server answers when the test lets it: what
 * a test does `meanwhile` happens after the request has arrived and before its answer leaves, which is where a login is
 * at stake.
 */
export class Scene implements AsyncDisposable {
  readonly root = Deno.makeTempDirSync({ dir: this.parent, prefix: "scene_" });
  readonly home = `${this.root}/home`;
  readonly auth = `${this.home}/auth.json`;
  readonly trace = `${this.root}/trace`;
  readonly old: Tokens;
  /** auth.json as it was. Its number must come out as it went in. */
  readonly text: string;
  /** Variables for each process. */
  env: Record<string, string> = {};
  /** auth.json as somebody other than the program left it. */
  theirs: string;
  /** What it was before the program started, links not followed. */
  before: Deno.FileInfo | null = null;
  #running: Running | null = null;
  #failure: unknown;
  #dispose: () => unknown = () => {};
  #disks = false;
  readonly #later: Promise<unknown>[] = [];

  constructor(readonly mock: MockServer) {
    this.old = mock.login({ accessTokenSeconds: -3600 });
    this.text = authJson(this.old, new Date(Date.now() - 9 * 86_400_000)).replace("{", '{"kept":1.0e2,');
    Deno.chmodSync(this.root, 0o755);
    Deno.mkdirSync(this.home, { mode: 0o755 });
    this.theirs = this.text;
    this.write(this.text);
  }

  /** A scene with a server of its own, unless it shares another one's. */
  static async open<Kind extends Scene>(this: new (mock: MockServer) => Kind, shared?: MockServer): Promise<Kind> {
    const scene = new this(shared ?? await startMockServer());
    if (shared === undefined) scene.#dispose = scene.mock.close;
    return scene;
  }

  /** Where its folder is made; undefined is where the system has such. */
  get parent(): string | undefined {
    return undefined;
  }

  async [Symbol.asyncDispose]() {
    await this.#dispose();
    const unmount = 'chattr -R -ia . 2>&- || true; grep -o " $PWD/[^ ]*" /proc/mounts | sort -r | xargs -r -n 1 umount';
    if (this.#disks) this.sh(unmount);
    Deno.removeSync(this.root, { recursive: true });
  }

  /** What goes on by itself and has to be over before the end is judged. */
  later(promise: Promise<unknown>) {
    promise.catch((error) => this.#failure = error);
    this.#later.push(promise);
  }

  // The disk.

  write(text: string, path = this.auth) {
    Deno.writeTextFileSync(path, text, { mode: 0o600 });
    if (path === this.auth) this.theirs = text;
  }

  /**
   * Runs a command in the folder in which the home is: `disk` mounts a small one with auth.json in it, `fill` leaves it
   * no block. What it mounts and makes immutable is taken back in the end.
   */
  sh(command: string) {
    this.#disks = true;
    const env = {
      home: this.home,
      journal: this.journal(),
      another: this.journal("another"),
      pid: `${this.#running?.pid}`,
    };
    const { success, stderr } = new Deno.Command("sh", { args: ["-c", SHELL + command], env, cwd: this.root })
      .outputSync();
    if (!success) throw new Error(`${command}: ${new TextDecoder().decode(stderr)}`);
  }

  /** What somebody does to the home who is not the program. */
  async do(step: Step) {
    await (typeof step === "string" ? this.sh(step) : step(this));
    this.theirs = this.look();
  }

  /** What auth.json holds; where it is no file, what else there is. */
  look(): string {
    const found = statOf(this.auth);
    const isFile = found?.isFile || found?.isSymlink && statOf(this.auth, Deno.statSync)?.isFile;
    return isFile ? textOf(this.auth) : `inode ${found?.ino}`;
  }

  /** auth.json with one more field. */
  withField(name: string): string {
    return this.text.replace("{", `{"${name}":[1.0,"kept"],`);
  }

  /** Another login, of the same server. */
  otherLogin(how?: { accessTokenSeconds: number }): string {
    return authJson(this.mock.login(how)).trimEnd();
  }

  /** The journal by the refresh token that its answer is for. */
  journal(token = this.old.refresh_token): string {
    const fingerprint = createHash("sha256").update(token).digest("hex").slice(0, 16);
    return `${this.home}/.auth.json.${fingerprint}.tmp`;
  }

  /** The names of the journals, and of what is about to replace one. */
  journals = (folder = this.home): string[] =>
    [...Deno.readDirSync(folder)].map(({ name }) => name).filter((name) => /^\.auth\.json\./.test(name));

  /** The journal that there is in the middle of an attempt. */
  pending(folder = this.home): string {
    const [name, another] = this.journals(folder);
    if (name === undefined || another !== undefined) throw new Error(`not one journal in ${folder}`);
    return `${folder}/${name}`;
  }

  /** The names of the home's files that hold `token`. */
  filesWith(token: string): string[] {
    const names = [...Deno.readDirSync(this.home)].filter(({ isFile }) => isFile).map(({ name }) => name);
    return names.filter((name) => textOf(`${this.home}/${name}`).includes(token));
  }

  // The server.

  /** Spends the token, as an earlier run did that was killed: the document that it had to store. */
  async redeem(): Promise<string> {
    const grant = { client_id: "x", grant_type: "refresh_token", refresh_token: this.old.refresh_token };
    const answer = await fetch(this.mock.url, { method: "POST", body: JSON.stringify(grant) });
    this.mock.requests.pop();
    return authJson(await answer.json()).replace("{", '{\n  "kept": 1.0e2,').trimEnd();
  }

  get newest(): string {
    return this.mock.newest(this.old.refresh_token);
  }

  /** What the server made of each request. */
  get asked(): string[] {
    return this.mock.requests.map(({ outcome }) => outcome);
  }

  /** Resolves when the next request is there; it and its answer wait for what is done then. */
  meanwhile(step: Step = () => {}): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    this.mock.onRequest = async () => {
      this.mock.onRequest = undefined;
      await this.do(step).catch((error) => this.#failure = error);
      resolve();
    };
    return promise;
  }

  // Processes.

  start(args = ["--once"], env: Record<string, string> = {}, under: string[] = []): Running {
    return this.run([...under, exe, ...args], env);
  }

  /** Any program, in the environment that ours has. */
  run(argv: string[], env: Record<string, string> = {}, cwd?: string): Running {
    const preset = {
      PATH: given("PATH", ""),
      CODEX_HOME: this.home,
      CODEX_REFRESH_TOKEN_URL_OVERRIDE: this.mock.url,
    };
    this.before = statOf(this.auth);
    return this.#running = launch(argv, { ...preset, ...this.env, ...env }, { cwd });
  }

  /** One attempt to its end. */
  async once(env: Record<string, string> = {}, under: string[] = []): Promise<Ended> {
    const ended = await this.start(["--once"], env, under).ended;
    await this.settled();
    return ended;
  }

  get running(): Running {
    if (this.#running === null) throw new Error("nothing was started");
    return this.#running;
  }

  async settled() {
    await Promise.allSettled(this.#later);
    if (this.#failure) throw this.#failure;
  }

  /** A fault that strace injects into what is running, from now on. */
  async attach(inject: string, ...paths: string[]) {
    const { pid } = this.running;
    const args = ["-f", "-o", this.trace, "-e", inject, ...paths.flatMap((path) => ["-P", path]), "-p", `${pid}`];
    const streams = { stdin: "null", stdout: "null", stderr: "null" } as const;
    const tracer = new Deno.Command("strace", { args, ...streams }).spawn();
    const traced = ({ name }: Deno.DirEntry) =>
      textOf(`/proc/${pid}/task/${name}/status`).includes(`TracerPid:\t${tracer.pid}\n`);
    this.later(tracer.status);
    await until(() => [...Deno.readDirSync(`/proc/${pid}/task`)].every(traced), "strace is attached");
  }

  // What became of it.

  /** The outcome and detail in the status file, or "" where there is none. */
  get status(): string {
    const status = attempt(() => JSON.parse(textOf(`${this.home}/auth_refresh_status.json`)));
    return status === null ? "" : `${status.watchdog_last_outcome} ${status.detail}`;
  }

  /** The login was refreshed, and what came of it is stored. */
  assertNewest(said: string, path = this.auth) {
    assertEquals(this.mock.state(this.old.refresh_token), "spent", said);
    assertEquals(tokenIn(textOf(path)), this.newest, said);
  }

  /** The newest tokens and every other field, in auth.json alone; and no token was sent that had been spent before. */
  assertRefreshed(said: string, asked: readonly string[] = ["redeemed"], path = this.auth) {
    const text = textOf(path);
    assertEquals(this.asked, asked, said);
    this.assertNewest(said, path);
    assertMatch(text, /"kept": ?1\.0e2/, said);
    assertEquals(text, text.trim(), `nothing is left of the room: ${said}`);
    assertEquals(this.journals(), [], said);
    assertEquals(this.filesWith(this.newest).filter((name) => name !== "auth.json"), [], said);
    assertEquals(this.filesWith(this.old.refresh_token), [], said);
  }

  /** auth.json is as somebody else left it. */
  assertTheirs(said: string) {
    assertEquals(this.look(), this.theirs, said);
  }

  /** The end of a run: exit code, status, requests, auth.json and what is beside it. */
  assertEnded(ending: Ending, { code, said }: Ended, asked?: readonly string[], mute = false) {
    const expected = ENDINGS[ending];
    assertEquals(code, expected.code, said);
    assertMatch(this.status, mute ? /^$/ : expected.status, said);
    if (expected.code === 0) return this.assertRefreshed(said, asked ?? expected.asked);
    assertEquals(this.asked, asked ?? expected.asked, said);
    this.assertTheirs(said);
    assertEquals(this.journals(), [], said);
  }
}

/** What is left of a document whose writer died: nothing, a part, or blocks that were never written. */
export const REMAINS = {
  "empty": "",
  "torn at its start": "{",
  "torn in a token": authJson({ id_token: "", access_token: "", refresh_token: "x" }).slice(0, 99),
  "of line ends": "\n\n",
  "of blocks that were never written": "\0\0",
};

/** A run, and how it ends. */
export interface Case {
  arrange?: Step;
  /** Between the request and its answer. */
  meanwhile?: Step;
  /** Not once, but until it has refreshed. */
  loop?: boolean;
  env?: Record<string, string>;
  under?: (scene: Scene) => string[];
  ends: Ending;
  /** In one line of the log. */
  says?: RegExp;
  /** Where not even the status can be written. */
  mute?: true;
  then?(scene: Scene, said: string): unknown;
}

async function prove(row: Case): Promise<void> {
  await using scene = await Scene.open();
  await scene.do(row.arrange ?? (() => {}));
  if (row.meanwhile !== undefined) scene.meanwhile(row.meanwhile);
  const args = row.loop ? [] : ["--once"];
  const running = scene.start(args, row.env, row.under?.(scene));
  if (row.loop) {
    await Promise.race([running.ended, until(() => scene.status.startsWith("refreshed"), "the loop has refreshed")]);
    running.kill("SIGTERM");
  }
  const ended = await running.ended;
  await scene.settled();
  scene.assertEnded(row.ends, ended, undefined, row.mute);
  if (row.says !== undefined) assertMatch(ended.said, row.says);
  await row.then?.(scene, ended.said);
}

/** A test of runs, each in a scene of its own. */
export const cases = (name: string, rows: Record<string, Case>, lanes?: number) => table(name, rows, prove, lanes);
