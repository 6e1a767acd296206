/**
 * `make bench`: what it costs, beside two floors of the same engine, a program that does nothing and one that imports the
 * three modules that nobody who reads a file does without, and beside the tools that a shell script starts for each step.
 * Prints two Markdown tables. Wants hyperfine and GNU time; python3, curl and zstd where they are there. REFERENCE may name
 * a script to compare with, BEFORE an executable of an earlier version.
 *
 * @module
 */
import { fileURLToPath } from "node:url";
import { authJson, startMockServer } from "../mock_server.ts";
import { median } from "./tools.ts";

const MODES = {
  bare: { title: "does nothing", args: [] as string[], code: 0 },
  version: { title: "`--version`", args: ["--version"], code: 0 },
  nothing: { title: "`--once`, nothing to do", args: ["--once"], code: 1 },
  health: { title: "`--health`", args: ["--health"], code: 0 },
  refresh: { title: "`--once`, refreshing", args: ["--once"], code: 0 },
};
type Mode = keyof typeof MODES;

/** `files` are what has to be on the disk. */
type Program = { name: string; argv: string[]; files: string[]; modes: Mode[]; floors: Program[] };
type Timed = { program: Program; mode: Mode; seconds: number[]; peaks: number[] };

const ROUNDS = 8;
const RUNS = 10;
const WAIT_SECONDS = 8;
const DAY = 24 * 3600;
const WAIT = "if (process.argv.length > 2) setTimeout(() => {}, 3_600_000);\n";
const FLOORS = {
  empty: WAIT,
  imports: `import * as fs from "node:fs";
import * as path from "node:path";
import * as buffer from "node:buffer";
globalThis.used = [fs, path, buffer];
${WAIT}`,
};

const root = fileURLToPath(new URL("..", import.meta.url));
const given = (name: string, preset: string) => Deno.env.get(name) || preset;
const [deno, bun, node] = [given("CAR_DENO", Deno.execPath()), given("CAR_BUN", "bun"), given("CAR_NODE", "node")];
const bundle = given("CAR_BUNDLE", `${root}dist/refresh.js`);
const [reference, before] = [given("REFERENCE", ""), given("BEFORE", "")];

const scratch = await Deno.makeTempDir({ prefix: "codex_bench_" });
const memory = `${scratch}/memory`;
const mock = await startMockServer();

// Neither a proxy nor a setting of the caller's may get in between, nor make's own variables into the make below.
const foreign = /proxy|^CODEX_|^CAR_|^SSL_CERT|^MAKE|^MFLAGS/i;
const env = {
  ...Object.fromEntries(Object.entries(Deno.env.toObject()).filter(([name]) => !foreign.test(name))),
  CODEX_HOME: `${memory}/home`,
  CODEX_REFRESH_TOKEN_URL_OVERRIDE: mock.url,
  CODEX_PYTHON: "/usr/bin/python3",
  TMPDIR: memory,
};
const options = { env, clearEnv: true, cwd: scratch, stdin: "null" } as const;

async function run(...[command = "", ...args]: string[]): Promise<{ code: number; out: string; err: string }> {
  const { code, stdout, stderr } = await new Deno.Command(command, { ...options, args }).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes).trim();
  return { code, out: text(stdout), err: text(stderr) };
}
const shell = async (script: string, ...args: string[]) => (await run("sh", "-c", script, "sh", ...args)).out;
const has = async (tool: string) => await shell('command -v "$1"', tool) !== "";

/** Compiles by the Makefile's own rule, so with its very flags; null, or why it did not work. */
async function compile(engine: string, source: string, to: string): Promise<string | null> {
  const set = [`ENGINE=${engine}`, `DENO=${deno}`, `BUN=${bun}`, `BUNDLE=${source}`, `EXE=${to}`];
  const { code, err } = await run("make", "-s", "-C", root, "-o", "dist/engine", "-o", source, ...set, to);
  return code === 0 ? null : err.split("\n")[0] ?? "";
}

/** Before each run a login is put in place: the fresh one, or one of a pool, since none can be redeemed twice. */
const PREPARE = `cd "$0"; [ $1 = refresh ] || exec cp fresh.json home/auth.json
for login in pool/*; do exec mv "$login" home/auth.json; done`;
const prepare = (mode: Mode) => ["sh", "-c", PREPARE, memory, mode];

/** A few runs of each, again and again, so that what else the machine does hits all of them alike. */
async function measure(all: Timed[]): Promise<void> {
  const command = ({ program, mode }: Timed) => [...program.argv, ...MODES[mode].args];
  const quote = (argv: string[]) => argv.map((arg) => `'${arg}'`).join(" ");
  const each = all.flatMap((timed) => ["--prepare", quote(prepare(timed.mode)), quote(command(timed))]);
  const json = `${scratch}/hyperfine.json`;
  for (let round = 0; round < ROUNDS; round++) {
    for (let login = 0; login < all.filter(({ mode }) => mode === "refresh").length * (RUNS + 2); login++) {
      const tokens = mock.login({ accessTokenSeconds: DAY });
      const text = authJson(tokens, new Date(Date.now() - 9 * DAY * 1000));
      await Deno.writeTextFile(`${memory}/pool/${round}_${login}`, text);
    }
    const { code, err } = await run("hyperfine", "-N", "-i", "-w1", `-r${RUNS}`, "--export-json", json, ...each);
    if (code !== 0) throw new Error(err);
    const { results } = JSON.parse(await Deno.readTextFile(json));
    for (const [index, timed] of all.entries()) {
      const { times, exit_codes } = results[index] as { times: number[]; exit_codes: number[] };
      const [ended] = exit_codes.filter((code) => code !== MODES[timed.mode].code);
      if (ended !== undefined) throw new Error(`${quote(command(timed))}: ended with exit ${ended}`);
      timed.seconds.push(...times);
      await run(...prepare(timed.mode));
      const { err } = await run("/usr/bin/time", "-f%M", ...command(timed)).catch(() => ({ err: "" }));
      timed.peaks.push((Number(err.split("\n").at(-1)) || NaN) * 1024);
    }
  }
}

/**
 * Resident and anonymous bytes of a process that waits, and of its children. Its files are taken out of the page cache
 * before, to be read by the page as after a start from an image: a mapped page counts with those around it that are cached.
 */
async function waiting([command = "", ...args]: string[], files: string[]): Promise<[number, number]> {
  for (const file of files) await shell('sync "$1"; dd if="$1" iflag=nocache count=0 2>&-', file);
  await run(...prepare("nothing"));
  // A script that is ended leaves its `sleep` behind: that has to end by itself.
  const interval = command === "bash" ? 2 * WAIT_SECONDS : 21600;
  const own = { ...env, CODEX_AUTH_REFRESH_INTERVAL_SECONDS: String(interval) };
  const child = new Deno.Command(command, { ...options, args, env: own, stdout: "null", stderr: "null" }).spawn();
  await new Promise((resolve) => setTimeout(resolve, WAIT_SECONDS * 1000));
  const family = "for p in $1 $(cat /proc/$1/task/$1/children); do cat /proc/$p/smaps_rollup; done";
  const maps = await shell(family, String(child.pid));
  child.kill();
  await child.status;
  const sum = (field: string) =>
    1024 * [...maps.matchAll(new RegExp(`^${field}: *(\\d+)`, "gm"))].reduce((sum, [, kB]) => sum + Number(kB), 0);
  return [sum("Rss"), sum("Anonymous")];
}

const sizeOf = (files: string[]) => files.reduce((sum, file) => sum + Deno.statSync(file).size, 0);
const MB = (bytes: number, digits = 1) => `${(bytes / 1e6).toFixed(digits)} MB`;
const MiB = (bytes: number) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;
const ratio = (one: number, other: number) => `${(one / other).toFixed(2)} ×`;
const table = (...rows: string[][]) =>
  console.log(
    [rows[0]!, rows[0]!.map(() => "---"), ...rows.slice(1)].map((row) => `| ${row.join(" | ")} |\n`).join(""),
  );

if (!await has("hyperfine")) throw new Error("hyperfine is not on PATH; in Debian it is a package of that name");
const notes: string[] = [];
await Deno.mkdir(memory);
// What a disk takes for its fsync is not ours.
const mounted = await run("mount", "-t", "tmpfs", "none", memory);
if (mounted.code !== 0) notes.push(`The homes are on no memory disk: ${mounted.err}`);
globalThis.addEventListener("unload", () => {
  new Deno.Command("umount", { args: [memory], stderr: "null" }).outputSync();
  Deno.removeSync(scratch, { recursive: true });
});
for (const folder of ["home", "pool"]) await Deno.mkdir(`${memory}/${folder}`);
await Deno.writeTextFile(`${memory}/fresh.json`, authJson(mock.login()));

const ours: Program[] = [];
/** A form of the program with its floors; `form` makes one of a script. */
async function add(
  name: string,
  script: string,
  form: (script: string, as: string) => Promise<Omit<Program, "name" | "modes" | "floors">>,
) {
  const floors: Program[] = [];
  for (const [floor, text] of Object.entries(FLOORS)) {
    const source = `${scratch}/${floor}.mjs`;
    await Deno.writeTextFile(source, text);
    const title = floor === "empty" ? name : `${name}, three imports`;
    floors.push({ name: title, modes: ["bare"], floors: [], ...await form(source, floor) });
  }
  ours.push({ name, modes: ["version", "nothing", "health", "refresh"], floors, ...await form(script, "program") });
}
for (const engine of ["Bun", "Deno"]) {
  const form = async (script: string, as: string) => {
    const [built, file] = [`${scratch}/built`, `${scratch}/${as}_${engine}`];
    const failed = await compile(engine.toLowerCase(), script, built);
    if (failed !== null) throw new Error(failed);
    await shell('cp "$1" "$2" && rm "$1"', built, file); // as installed: how a file was written shows in how fast it is mapped
    return { argv: [file], files: [file] };
  };
  await add(`${engine} executable`, bundle, form).catch(({ message }) =>
    notes.push(`No ${engine} executable could be built here: ${message}`)
  );
}
const permissions = (await Deno.readTextFile(`${root}refresh.ts`)).split("\n", 1)[0]?.match(/--allow-\S+/g) ?? [];
const under = (...engine: string[]) => (script: string) =>
  Promise.resolve({ argv: [...engine, script], files: [engine[0]!, script] });
await add("Deno, from source", `${root}refresh.ts`, under(deno, "run", "--quiet", ...permissions));
await add("Node.js, from the bundle", bundle, under(node));

const others: Program[] = [];
const other = (name: string, argv: string[], ...modes: Mode[]) =>
  others.push({ name, argv, files: [], modes, floors: [] });
const asked = `http://127.0.0.1:${mock.port}/mock/next`;
if (await has(env.CODEX_PYTHON)) other("`python3 -c pass`", [env.CODEX_PYTHON, "-c", "pass"], "bare");
if (await has("curl")) other("`curl` to the mock server", ["curl", "-s", "-d{}", asked], "bare");
if (before) other("the earlier executable", [before], "version", "nothing", "health", "refresh");
if (reference) other("the script", ["bash", reference], "nothing", "refresh");
else notes.push("No script to compare with: REFERENCE is not set.");

const all = [...ours.flatMap((program) => [...program.floors, program]), ...others];
const timed = all.flatMap((program) => program.modes.map((mode): Timed => ({ program, mode, seconds: [], peaks: [] })));
await measure(timed);

const cpu = await shell("sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1") || Deno.build.arch;
console.log(
  `${new Date().toISOString().slice(0, 10)}, ${cpu}, ${navigator.hardwareConcurrency} cores, Linux ${Deno.osRelease()}.
Medians of ${
    ROUNDS * RUNS
  } runs, in ${ROUNDS} rounds of all; ratios are those of the medians. The mock server shares the cores.
Floors: programs of the same engine, one empty, one that imports node:fs, node:path and node:buffer.
`,
);
const rows = Object.entries(MODES).flatMap(([mode, { title }]) => {
  const those = timed.filter((each) => each.mode === mode);
  const rival = those.find(({ program }) => program.argv[1] === reference);
  return those.map(({ program, seconds, peaks }) => {
    const floors = program.floors.map((floor) => timed.find((each) => each.program === floor)!);
    const toFloors = ["", ""].map((none, index) =>
      floors[index] ? ratio(median(seconds), median(floors[index].seconds)) : none
    );
    const toScript = rival && rival.program !== program
      ? `1 : ${(median(rival.seconds) / median(seconds)).toFixed(1)}`
      : "";
    return [
      title,
      program.name,
      `${(median(seconds) * 1000).toFixed(1)} ms`,
      ...toFloors,
      toScript,
      MiB(median(peaks)),
    ];
  });
});
table(
  ["", "program", "time", "to the empty floor", "to the three imports", "to the script", "memory at most"],
  ...rows,
);

const sizes = [["program", "size", "above the three imports", `waiting for ${WAIT_SECONDS} s`, "to the empty floor"]];
for (const { name, argv, files, floors } of [...ours, ...others.filter(({ modes }) => modes.includes("nothing"))]) {
  const [empty, imports] = floors;
  const packed = await shell('cat "$@" | gzip -9 | wc -c', ...files);
  const [resident, anonymous] = await waiting(argv, files);
  const [least, leastAnonymous] = empty ? await waiting([...empty.argv, "wait"], empty.files) : [NaN, NaN];
  sizes.push([
    name,
    files.length > 0 ? `${MB(sizeOf(files))}, ${MB(Number(packed))} by \`gzip -9\`` : "",
    imports ? `+${MB(sizeOf(files) - sizeOf(imports.files), 2)}` : "",
    `${MiB(resident)}, ${MiB(anonymous)} anonymous`,
    empty ? `${ratio(resident, least)}, ${ratio(anonymous, leastAnonymous)}` : "",
  ]);
}
for (const count of [10, 100, 1000]) {
  const homes = Array.from({ length: count }, (_, index) => `${memory}/homes/${index}`);
  for (const home of homes) {
    await Deno.mkdir(home, { recursive: true });
    await Deno.copyFile(`${memory}/fresh.json`, `${home}/auth.json`);
  }
  const { name, argv, files } = ours[0]!;
  const [resident, anonymous] = await waiting([...argv, ...homes], files);
  sizes.push([`${name}, ${count} homes`, "", "", `${MiB(resident)}, ${MiB(anonymous)} anonymous`, ""]);
}
table(...sizes);
for (const note of notes) console.log(note);

await mock.close();
