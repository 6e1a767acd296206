/**
 * The executable and the real Codex CLI on one login, as it was when it rewrote auth.json in place and as it is today: what
 * either of them stores, the other one uses, and where both refresh at the same moment nothing is lost.
 *
 * Codex comes from npm, once, into an ignored folder. Nothing else here leaves this machine: the token endpoint is the
 * mock server, the model is below.
 *
 * @module
 */
import { assert, assertEquals } from "@std/assert";
import { Buffer } from "node:buffer";
import {
  attempt,
  type Ended,
  inode,
  launch,
  NOBODY,
  pause,
  repo,
  Scene,
  strace,
  textOf,
  UNPRIVILEGED,
} from "./scene.ts";

const TODAY = "0.169.0";
const VERSIONS = ["0.130.0", TODAY];
const ROUNDS = 20;
const ROOT = Deno.uid() === 0;

/** Codex's native program: it starts faster than the Node.js wrapper. */
async function installCodex(version: string): Promise<string> {
  const prefix = `${repo}/.tools/codex@${version}`;
  const cpu = Deno.build.arch === "aarch64" ? "arm64" : "x64";
  const vendor = `${prefix}/node_modules/@openai/codex-${Deno.build.os}-${cpu}/vendor`;
  const run = (argv: string[]) => launch(argv, Deno.env.toObject(), { seconds: 300 }).ended;
  const find = async () => {
    for (const { name } of attempt(() => [...Deno.readDirSync(vendor)]) ?? []) {
      const program = [`${vendor}/${name}/bin/codex`, `${vendor}/${name}/codex/codex`].find(inode);
      if (program && (await run([program, "--version"])).output.trim() === `codex-cli ${version}`) return program;
    }
  };
  const there = await find();
  if (there !== undefined) return there;
  Deno.mkdirSync(prefix, { recursive: true });
  const wanted = `@openai/codex@${version}`;
  const { output } = await run(["npm", "install", "--prefix", prefix, "--ignore-scripts", wanted]);
  return await find() ?? assert(false, `npm could not install ${wanted}:\n${output}`) as never;
}

const codex = Object.fromEntries(await Promise.all(VERSIONS.map(async (name) => [name, await installCodex(name)])));
const scratch = `${repo}/.tools/scratch`; // Codex warns of homes in /tmp
Deno.mkdirSync(scratch, { recursive: true });

/** What the model says in a turn. */
const HELLO = [
  { type: "response.created", response: { id: "turn" } },
  {
    type: "response.output_item.done",
    output_index: 0,
    item: { type: "message", id: "item", role: "assistant", content: [{ type: "output_text", text: "hello" }] },
  },
  {
    type: "response.completed",
    response: { id: "turn", usage: { input_tokens: 1, output_tokens: 1, total_tokens: 2 } },
  },
].map((event) => `event: ${event.type}\ndata: ${JSON.stringify(event)}\n\n`).join("");

function expired(accessToken: string): boolean {
  const payload = Buffer.from(accessToken.split(".")[1] ?? "", "base64url");
  return JSON.parse(payload.toString()).exp * 1000 <= Date.now();
}

/** One login, and a Codex that uses it too. */
class Shared extends Scene {
  codex = "";
  override env = { HOME: this.home };
  /** What Codex sent to the model, turn by turn. */
  readonly bearers: string[] = [];
  /** A turn gets one word, or 401 for an expired token; all else gets 404. */
  readonly #model = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen() {} }, async (request) => {
    await request.text();
    if (new URL(request.url).pathname !== "/v1/responses") return new Response(null, { status: 404 });
    const bearer = request.headers.get("authorization")?.replace(/^Bearer /, "") ?? "";
    this.bearers.push(bearer);
    if (!bearer || expired(bearer)) return new Response(null, { status: 401 });
    return new Response(HELLO, { headers: { "content-type": "text/event-stream" } });
  });

  override get parent() {
    return scratch;
  }

  override async [Symbol.asyncDispose]() {
    await this.#model.shutdown();
    await super[Symbol.asyncDispose]();
  }

  refresh(...flags: string[]): Promise<Ended> {
    return this.start(["--once", ...flags]).ended;
  }

  /** One turn of Codex, without the services that it asks along the way. */
  turn(under: string[] = []): Promise<Ended> {
    const url = `http://127.0.0.1:${this.#model.addr.port}`;
    const settings = [
      `chatgpt_base_url="${url}/backend-api"`,
      'model_provider="m"',
      'model_providers.m.name="m"',
      `model_providers.m.base_url="${url}/v1"`,
      'model_providers.m.wire_api="responses"',
      "model_providers.m.requires_openai_auth=true",
      "analytics.enabled=false",
      "features.apps=false",
      "features.plugins=false",
    ].flatMap((setting) => ["-c", setting]);
    const flags = ["--skip-git-repo-check", "--ephemeral"];
    return this.run([...under, this.codex, "exec", ...flags, ...settings, "hi"], {}, this.home).ended;
  }

  get accessToken(): string {
    return JSON.parse(textOf(this.auth)).tokens.access_token;
  }

  /** Who sent which refresh request, and what became of it. */
  override get asked(): string[] {
    return this.mock.requests.map(({ headers, outcome }) => {
      const theirs = headers["user-agent"]?.startsWith("codex_exec/");
      return `${theirs ? "codex" : "we"}: ${outcome}`;
    });
  }

  override assertNewest(said: string) {
    super.assertNewest(said);
    assert(!expired(this.accessToken), said);
  }

  /** We refresh. */
  async refreshes(...flags: string[]) {
    const { code, output } = await this.refresh(...flags);
    assertEquals(code, 0, output);
    this.assertNewest(output);
  }

  /** Codex goes on, with the token that is in auth.json then. */
  async goesOn(under?: string[]) {
    const { code, output } = await this.turn(under);
    assertEquals(code, 0, output);
    assertEquals(this.bearers.at(-1), this.accessToken, output);
    this.assertNewest(output);
  }
}

async function withCodex(version: string, body: (scene: Shared) => Promise<unknown>) {
  await using scene = await Shared.open();
  scene.codex = codex[version];
  await body(scene);
}

for (const version of VERSIONS) {
  const test = (name: string, body: (scene: Shared) => Promise<void>) =>
    Deno.test(`${name} (Codex ${version})`, () => withCodex(version, body));

  test("after our refresh Codex says that it is logged in", async (scene) => {
    await scene.refreshes();
    const { code, output } = await scene.run([scene.codex, "login", "status"], {}, scene.home).ended;
    assertEquals(code, 0, output);
    assert(output.includes("Logged in using ChatGPT"), output);
  });

  test("after our refresh a turn sends our token and asks for none", async (scene) => {
    await scene.refreshes();
    await scene.goesOn();
    assertEquals([scene.bearers.length, scene.asked], [1, ["we: redeemed"]]);
  });

  test("without our refresh the same turn asks, once, and stores it; then we find nothing to do", async (scene) => {
    await scene.goesOn();
    assertEquals((await scene.refresh()).code, 1);
    assertEquals([scene.bearers.length, scene.asked], [1, ["codex: redeemed"]]);
  });
}

/** In turn: side by side; we first; Codex first; side by side, answered late. */
function race(scene: Shared, round: number, under: string[]): Promise<[Ended, Ended]> {
  const order = round % 4;
  const { promise: asked, resolve: go } = Promise.withResolvers<void>();
  scene.mock.onRequest = () => go();
  // The first answer is late enough for the second one to ask meanwhile.
  if (order > 0) scene.mock.next({ kind: "delay", milliseconds: 300 + 20 * round });
  // Codex takes longer to start. Side by side, our start moves on from round to round, across the moments in which Codex
  // reads, asks and writes.
  const now = Promise.resolve();
  const we = order === 1 ? now : order === 2 ? asked : pause(25 * round);
  const they = order === 1 ? asked : now;
  return Promise.all([ // whoever ends without having asked holds up nobody
    we.then(() => scene.refresh()).finally(go),
    they.then(() => scene.turn(under)).finally(go),
  ]);
}

/**
 * Codex asks without a lock. Whoever comes second is told that the token was used; Codex may well end its turn over that.
 * What counts is the file afterwards, and that either of them can go on from it.
 */
for (const [version, other] of [["0.130.0", false], [TODAY, false], [TODAY, true]] as const) {
  const who = other ? ", whose user is not ours, as we are root" : "";
  const ignore = other && !ROOT;
  const tried = ignore ? ": not tried" : "";
  const name = `in a race with Codex ${version}${who} no login is lost, nobody locked out${tried}`;
  const [owner, under] = other ? [NOBODY, UNPRIVILEGED] : [Deno.uid(), []];
  Deno.test({ name, ignore }, async () => {
    const courses: Record<string, number> = {};
    for (let round = 0; round < ROUNDS; round++) {
      await withCodex(version, async (scene) => {
        if (other) { for (const path of [scene.home, scene.auth]) Deno.chownSync(path, owner, owner); }
        const [ours, theirs] = await race(scene, round, under);
        const [outcome = ""] = scene.status.split(" ");
        const course = `${scene.asked.join(", ")} -> ${outcome}`;
        const said = `round ${round}: ${course}\n${ours.output}\n${theirs.output}`;
        courses[course] = (courses[course] ?? 0) + 1;
        scene.assertNewest(said);
        const codes: Record<string, number> = { refreshed: 0, skip: 1, superseded: 1 };
        assertEquals(ours.code, codes[outcome], said);

        await scene.refreshes("--force");
        await scene.goesOn(under);
        assertEquals(scene.asked.at(-1), "we: redeemed");
        const { uid, mode } = Deno.statSync(scene.auth);
        assertEquals([uid, (mode ?? 0) & 0o777], [owner, 0o600]);
      });
    }
    console.log(courses);
    for (const winner of ["we", "codex"]) {
      const won = Object.keys(courses).some((course) => course.startsWith(`${winner}: redeemed`));
      assert(won, `${winner} never came first`);
    }
  });
}

/** Whether what Codex writes before it renames it is there. */
const dropped = ({ home }: Scene) => [...Deno.readDirSync(home)].some(({ name }) => /^\.auth-\w{6}$/.test(name));

for (const [call, calls] of [["fsync", "fsync"], ["rename", "rename,renameat,renameat2"]]) {
  const name =
    `the answer that Codex ${TODAY} leaves when it is killed at its ${call} is rescued, and its next turn works`;
  Deno.test({ name: ROOT ? name : `${name}: not tried`, ignore: !ROOT }, async () => {
    // Codex makes such calls on other files too: the first that leaves the file behind is the one.
    for (let nth = 1, found = false; !found; nth++) {
      assert(nth < 40, "no such call leaves a file behind");
      await withCodex(TODAY, async (scene) => {
        const killed = await scene.turn(strace(scene, `${calls}:signal=KILL:when=${nth}`));
        found = dropped(scene) && scene.look() === scene.text;
        if (!found) return;
        assertEquals(scene.mock.state(scene.old.refresh_token), "spent", killed.output);
        await scene.refreshes();
        assertEquals([scene.status, dropped(scene)], ["refreshed rescued", false]);
        await scene.goesOn();
      });
    }
  });
}

Deno.test(`what we warn of is true: Codex ${TODAY} loses the login of a hard-linked auth.json`, () =>
  withCodex(TODAY, async (scene) => {
    Deno.linkSync(scene.auth, `${scene.home}/second`);
    const { output } = await scene.start(["--status"]).ended;
    assert(/auth\.json has a second hard link/.test(output), output);
    await scene.turn();
    assertEquals(scene.asked[0], "codex: redeemed");
    assertEquals([scene.look(), scene.mock.state(scene.old.refresh_token)], [scene.text, "spent"]);
  }));
