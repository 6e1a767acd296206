/**
 * The executable and the real Codex CLI on one login, as it was when it rewrote auth.json in place and as it is today: what
 * either of them stores, the other one uses, and where both refresh at the same moment nothing is lost. `CAR_EXE` names
 * another executable than the one that `make` builds.
 *
 * Codex comes from npm, once, into an ignored folder. Nothing else here leaves this machine: the token endpoint is the
 * mock server, the model is below.
 *
 * @module
 */
import { assert, assertEquals } from "@std/assert";
import { Buffer } from "node:buffer";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { resolve } from "node:path";
import { authJson, type MockServer, startMockServer, type Tokens } from "../mock_server.ts";

const TODAY = "0.169.0";
const VERSIONS = ["0.130.0", TODAY];
const ROUNDS = 20;
const LIMIT_SECONDS = 60; // for any process: one that hangs fails its test

const repo = resolve(import.meta.dirname!, "..");
const tools = resolve(repo, ".tools");
const exe = resolve(
  Deno.env.get("CAR_EXE") ?? resolve(repo, "dist/codex_auth_refresh"),
);
const codex: Record<string, string> = {};
for (const version of VERSIONS) codex[version] = await installCodex(version);
const ROOT = Deno.uid() === 0;
const [SOMEBODY, AS_SOMEBODY] = [65534, ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]];

// Processes -----------------------------------------------------------------

interface Finished {
  code: number;
  /** Both streams, for the messages of the tests. */
  output: string;
}

/** Runs a program to its end, and for no longer than it may take. */
async function run(
  program: string,
  args: string[],
  options: Pick<Deno.CommandOptions, "cwd" | "env" | "clearEnv"> = {},
  seconds = LIMIT_SECONDS,
): Promise<Finished> {
  const streams = { stdin: "null", stdout: "piped", stderr: "piped" } as const;
  const child = new Deno.Command(program, { ...options, ...streams, args })
    .spawn();
  let limit: ReturnType<typeof setTimeout> | undefined;
  const hanging = new Promise<never>((_, reject) => {
    limit = setTimeout(() => {
      child.kill("SIGKILL");
      reject(new Error(`no end after ${seconds} s: ${program} ${args[0]}`));
    }, seconds * 1000);
  });
  // The race, since children of a killed child may keep its output open.
  const ended = await Promise.race([child.output(), hanging]);
  clearTimeout(limit);
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return { code: ended.code, output: text(ended.stdout) + text(ended.stderr) };
}

/** Codex's native program: it starts faster than the Node.js wrapper. */
async function installCodex(version: string): Promise<string> {
  const prefix = resolve(tools, `codex@${version}`);
  const cpu = Deno.build.arch === "aarch64" ? "arm64" : "x64";
  const name = `@openai/codex-${Deno.build.os}-${cpu}`;
  const vendor = resolve(prefix, "node_modules", name, "vendor");
  const find = async (): Promise<string | undefined> => {
    try {
      for await (const target of Deno.readDir(vendor)) {
        for (const place of ["bin/codex", "codex/codex"]) {
          const program = resolve(vendor, target.name, place);
          const { output } = await run(program, ["--version"]).catch(() => ({ output: "" }));
          if (output.trim() === `codex-cli ${version}`) return program;
        }
      }
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
    }
  };
  const there = await find();
  if (there) return there;
  await Deno.mkdir(prefix, { recursive: true });
  const wanted = `@openai/codex@${version}`;
  const npm = ["install", "--prefix", prefix, "--ignore-scripts", wanted];
  const { output } = await run("npm", npm, {}, 300)
    .catch((error) => ({ output: String(error) }));
  const installed = await find();
  if (installed) return installed;
  throw new Error(`npm could not install ${wanted}:\n${output}`);
}

// The model -----------------------------------------------------------------

function expired(accessToken: string): boolean {
  const payload = Buffer.from(accessToken.split(".")[1] ?? "", "base64url");
  return JSON.parse(payload.toString()).exp * 1000 <= Date.now();
}

/** A turn gets one word, or 401 for an expired token; all else gets 404. */
async function startModel(bearers: string[]): Promise<Server> {
  const content = [{ type: "output_text", text: "hello" }];
  const item = { type: "message", id: "item", role: "assistant", content };
  const usage = { input_tokens: 1, output_tokens: 1, total_tokens: 2 };
  const events = [
    { type: "response.created", response: { id: "turn" } },
    { type: "response.output_item.done", output_index: 0, item },
    { type: "response.completed", response: { id: "turn", usage } },
  ];
  const server = createServer((request, response) => {
    request.resume();
    if (request.url !== "/v1/responses") return response.writeHead(404).end();
    const bearer = request.headers.authorization?.replace(/^Bearer /, "") ?? "";
    bearers.push(bearer);
    if (!bearer || expired(bearer)) return response.writeHead(401).end();
    response.writeHead(200, { "content-type": "text/event-stream" });
    response.end(
      events.map((event) => `event: ${event.type}\ndata: ${JSON.stringify(event)}\n\n`).join(""),
    );
  });
  await new Promise<void>((go) => server.listen(0, "127.0.0.1", go));
  return server;
}

// One login, and who uses it ------------------------------------------------

/** A login nine days old, with an expired access token, in a fresh home. */
async function withStaleLogin(version: string, test: (scene: Scene) => Promise<void>) {
  const parent = resolve(tools, "scratch"); // Codex warns of homes in /tmp
  await Deno.mkdir(parent, { recursive: true });
  const home = await Deno.makeTempDir({ dir: parent, prefix: "interop_" });
  const endpoint = await startMockServer();
  const bearers: string[] = [];
  const model = await startModel(bearers);
  try {
    const old = endpoint.login({ accessTokenSeconds: -3600 });
    const text = authJson(old, new Date(Date.now() - 9 * 86_400_000));
    await Deno.writeTextFile(`${home}/auth.json`, text, { mode: 0o600 });
    const { port } = model.address() as AddressInfo;
    const url = `http://127.0.0.1:${port}`;
    await test(new Scene(codex[version] ?? "", home, endpoint, url, old.refresh_token, bearers));
  } finally {
    await endpoint.close();
    model.closeAllConnections();
    await new Promise((closed) => model.close(closed));
    await Deno.remove(home, { recursive: true });
  }
}

class Scene {
  /** What goes before the client's command line. */
  under: string[] = [];

  constructor(
    readonly codex: string,
    readonly home: string,
    readonly endpoint: MockServer,
    readonly modelUrl: string,
    /** The refresh token that the login began with. */
    readonly oldest: string,
    /** What Codex sent to the model, turn by turn. */
    readonly bearers: string[],
  ) {}

  /** In an environment with nothing in it but what both of them need. */
  run(program: string, args: string[]): Promise<Finished> {
    const env = {
      PATH: Deno.env.get("PATH") ?? "",
      HOME: this.home,
      CODEX_HOME: this.home,
      CODEX_REFRESH_TOKEN_URL_OVERRIDE: this.endpoint.url,
    };
    return run(program, args, { cwd: this.home, env, clearEnv: true });
  }

  refresh(...flags: string[]): Promise<Finished> {
    return this.run(exe, ["--once", ...flags]);
  }

  /** One turn of Codex, without the services that it asks along the way. */
  turn(): Promise<Finished> {
    const settings = [
      `chatgpt_base_url="${this.modelUrl}/backend-api"`,
      'model_provider="m"',
      'model_providers.m.name="m"',
      `model_providers.m.base_url="${this.modelUrl}/v1"`,
      'model_providers.m.wire_api="responses"',
      "model_providers.m.requires_openai_auth=true",
      "analytics.enabled=false",
      "features.apps=false",
      "features.plugins=false",
    ].flatMap((setting) => ["-c", setting]);
    const flags = ["--skip-git-repo-check", "--ephemeral"];
    const [program = "", ...args] = [...this.under, this.codex, "exec", ...flags, ...settings, "hi"];
    return this.run(program, args);
  }

  get tokens(): Tokens {
    return JSON.parse(Deno.readTextFileSync(`${this.home}/auth.json`)).tokens;
  }

  get status(): { watchdog_last_outcome: string; detail: string | null } {
    return JSON.parse(Deno.readTextFileSync(`${this.home}/auth_refresh_status.json`));
  }

  /** Who sent which refresh request, and what became of it. */
  get asked(): string[] {
    return this.endpoint.requests.map(({ headers, outcome }) => {
      const theirs = headers["user-agent"]?.startsWith("codex_exec/");
      return `${theirs ? "codex" : "we"}: ${outcome}`;
    });
  }

  /** auth.json holds the newest tokens, and not those that it began with. */
  assertRefreshed(said: string) {
    const { access_token, refresh_token } = this.tokens;
    assertEquals(this.endpoint.state(this.oldest), "spent", said);
    assertEquals(refresh_token, this.endpoint.newest(this.oldest), said);
    assert(!expired(access_token), said);
  }
}

// Tests ---------------------------------------------------------------------

for (const version of VERSIONS) {
  const test = (name: string, body: (scene: Scene) => Promise<void>) =>
    Deno.test(`${name} (Codex ${version})`, () => withStaleLogin(version, body));

  test("after our refresh Codex says that it is logged in", async (scene) => {
    const ours = await scene.refresh();
    assertEquals(ours.code, 0, ours.output);
    scene.assertRefreshed(ours.output);
    const { code, output } = await scene.run(scene.codex, ["login", "status"]);
    assertEquals(code, 0, output);
    assert(output.includes("Logged in using ChatGPT"), output);
  });

  test("after our refresh a turn sends our token and asks for none", async (scene) => {
    const ours = await scene.refresh();
    assertEquals(ours.code, 0, ours.output);
    scene.assertRefreshed(ours.output);
    const turn = await scene.turn();
    assertEquals(turn.code, 0, turn.output);
    assertEquals(scene.bearers, [scene.tokens.access_token]);
    assertEquals(scene.asked, ["we: redeemed"]);
  });

  test("without our refresh the same turn asks, once, and stores it; then we find nothing to do", async (scene) => {
    const turn = await scene.turn();
    assertEquals(turn.code, 0, turn.output);
    scene.assertRefreshed(turn.output);
    assertEquals(scene.bearers, [scene.tokens.access_token]);
    assertEquals((await scene.refresh()).code, 1);
    assertEquals(scene.asked, ["codex: redeemed"]);
  });
}

/**
 * Codex asks without a lock. Whoever comes second is told that the token was used; Codex may well end its turn over that.
 * What counts is the file afterwards, and that either of them can go on from it.
 */
for (const [version, other] of [["0.130.0", false], [TODAY, false], [TODAY, true]] as const) {
  const who = other ? ", whose user is not ours, as we are root" : "";
  const ignore = other && !ROOT;
  const name = `in a race with Codex ${version}${who} no login is lost, nobody locked out${
    ignore ? ": not tried" : ""
  }`;
  Deno.test({ name, ignore }, async () => {
    const courses: Record<string, number> = {};
    for (let round = 0; round < ROUNDS; round++) {
      await withStaleLogin(version, async (scene) => {
        if (other) {
          scene.under = AS_SOMEBODY;
          for (const path of [scene.home, `${scene.home}/auth.json`]) Deno.chownSync(path, SOMEBODY, SOMEBODY);
        }
        const [ours, theirs] = await race(scene, round);
        const course = `${scene.asked.join(", ")} -> ${scene.status.watchdog_last_outcome}`;
        const said = `round ${round}: ${course}\n${ours.output}\n${theirs.output}`;
        courses[course] = (courses[course] ?? 0) + 1;
        scene.assertRefreshed(said);
        const codes: Record<string, number> = { refreshed: 0, skip: 1, superseded: 1 };
        assertEquals(ours.code, codes[scene.status.watchdog_last_outcome], said);

        const forced = await scene.refresh("--force");
        assertEquals(forced.code, 0, forced.output);
        scene.assertRefreshed(forced.output);
        const turn = await scene.turn();
        assertEquals(turn.code, 0, turn.output);
        assertEquals(scene.bearers.at(-1), scene.tokens.access_token);
        assertEquals(scene.asked.at(-1), "we: redeemed");
        const { uid, mode } = Deno.statSync(`${scene.home}/auth.json`);
        assertEquals([uid, (mode ?? 0) & 0o777], [other ? SOMEBODY : Deno.uid(), 0o600]);
      });
    }
    console.log(courses);
    for (const winner of ["we", "codex"]) {
      const won = Object.keys(courses).some((course) => course.startsWith(`${winner}: redeemed`));
      assert(won, `${winner} never came first`);
    }
  });
}

/** The name of what Codex writes before it renames it, where that is there. */
const dropped = ({ home }: Scene) =>
  [...Deno.readDirSync(home)].map(({ name }) => name).find((name) => /^\.auth-\w{6}$/.test(name));

for (const call of ["fsync", "rename"]) {
  const name =
    `the answer that Codex ${TODAY} leaves when it is killed at its ${call} is rescued, and its next turn works`;
  Deno.test({ name: ROOT ? name : `${name}: not tried`, ignore: !ROOT }, async () => {
    // Codex makes such calls on other files too: the first that leaves the file behind is the one.
    for (let nth = 1, found = false; !found; nth++) {
      assert(nth < 40, "no such call leaves a file behind");
      await withStaleLogin(TODAY, async (scene) => {
        const calls = call === "rename" ? "rename,renameat,renameat2" : call;
        scene.under = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", `inject=${calls}:signal=KILL:when=${nth}`];
        const killed = await scene.turn();
        found = dropped(scene) !== undefined && scene.tokens.refresh_token === scene.oldest;
        if (!found) return;
        assertEquals(scene.endpoint.state(scene.oldest), "spent", killed.output);
        scene.under = [];
        const ours = await scene.refresh();
        assertEquals(ours.code, 0, ours.output);
        assertEquals([scene.status.detail, dropped(scene)], ["rescued", undefined], ours.output);
        scene.assertRefreshed(ours.output);
        const turn = await scene.turn();
        assertEquals(turn.code, 0, turn.output);
        assertEquals(scene.bearers.at(-1), scene.tokens.access_token);
      });
    }
  });
}

Deno.test(`what we warn of is true: Codex ${TODAY} loses the login of a hard-linked auth.json`, () =>
  withStaleLogin(TODAY, async (scene) => {
    await Deno.link(`${scene.home}/auth.json`, `${scene.home}/second`);
    const { output } = await scene.run(exe, ["--status"]);
    assert(/auth\.json has a second hard link/.test(output), output);
    await scene.turn();
    assertEquals(scene.asked[0], "codex: redeemed");
    assertEquals([scene.tokens.refresh_token, scene.endpoint.state(scene.oldest)], [scene.oldest, "spent"]);
  }));

/** In turn: side by side; we first; Codex first; side by side, answered late. */
function race(scene: Scene, round: number): Promise<[Finished, Finished]> {
  const order = round % 4;
  const { promise: asked, resolve: go } = Promise.withResolvers<void>();
  scene.endpoint.onRequest = () => go();
  // The first answer is late enough for the second one to ask meanwhile.
  const milliseconds = 300 + 20 * round;
  if (order > 0) scene.endpoint.next({ kind: "delay", milliseconds });
  // Codex takes longer to start. Side by side, our start moves on from round to
  // round, across the moments in which Codex reads, asks and writes.
  const now = Promise.resolve();
  const shifted = () => new Promise((start) => setTimeout(start, 25 * round));
  const we = order === 1 ? now : order === 2 ? asked : shifted();
  const they = order === 1 ? asked : now;
  return Promise.all([ // whoever ends without having asked holds up nobody
    we.then(() => scene.refresh()).finally(go),
    they.then(() => scene.turn()).finally(go),
  ]);
}
