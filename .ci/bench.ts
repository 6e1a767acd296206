/**
 * `make bench`: what it costs, beside programs that do nothing and the tools that a shell script starts for each step.
 * Prints a Markdown table. Wants hyperfine; GNU time, zstd, python3 and curl where they are there. REFERENCE may name a
 * script to compare with, CODEX_PYTHON the python3 that it takes.
 *
 * @module
 */
import { fileURLToPath } from "node:url";
import { authJson, startMockServer } from "../mock_server.ts";

const MODES = {
  bare: { title: "does nothing", args: [] as string[], code: 0 },
  nothing: { title: "`--once`, nothing to do", args: ["--once"], code: 1 },
  refresh: { title: "`--once`, refreshing", args: ["--once"], code: 0 },
  health: { title: "`--health`", args: ["--health"], code: 0 },
};
type Mode = keyof typeof MODES;

/** `floor` does nothing under the same engine; `files` are what has to be on the disk. */
type Program = { name: string; argv: string[]; files: string[]; modes: Mode[]; floor?: Program };
type Timed = { program: Program; mode: Mode; seconds: number[]; peaks: number[] };

const ROUNDS = 8;
const RUNS = 10;
const WAIT_SECONDS = 8;
const DAY = 24 * 3600;

const root = fileURLToPath(new URL("..", import.meta.url));
const given = (name: string, preset: string) => Deno.env.get(name) || preset;
const [deno, bun] = [given("CAR_DENO", Deno.execPath()), given("CAR_BUN", "bun")];
const bundle = given("CAR_BUNDLE", `${root}dist/refresh.js`);
const python = given("CODEX_PYTHON", "/usr/bin/python3");
const reference = given("REFERENCE", "");

const scratch = await Deno.makeTempDir({ prefix: "codex_bench_" });
const mock = await startMockServer();

// Neither a proxy nor a setting of the caller's may get in between, nor make's own variables into the make below.
const foreign = /proxy|^CODEX_|^CAR_|^SSL_CERT|^MAKE|^MFLAGS/i;
const env = {
  ...Object.fromEntries(Object.entries(Deno.env.toObject()).filter(([name]) => !foreign.test(name))),
  CODEX_HOME: `${scratch}/home`,
  CODEX_REFRESH_TOKEN_URL_OVERRIDE: mock.url,
  CODEX_PYTHON: python,
  TMPDIR: scratch,
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
const prepare = (mode: Mode) => ["sh", "-c", PREPARE, scratch, mode];

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
      await Deno.writeTextFile(`${scratch}/pool/${round}_${login}`, text);
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
 * Puts a file into the page cache as a whole, or takes it out, to be read again by the page as it is after a start from
 * an image. A mapped page counts as resident together with those around it that are cached.
 */
const cache = (file: string, whole: boolean) =>
  shell(whole ? 'cat "$1" >/dev/null' : 'sync "$1"; dd if="$1" iflag=nocache count=0 2>&-', file);

/** Resident and anonymous bytes of a process that waits, and of its children. */
async function waiting([command = "", ...args]: string[]): Promise<number[]> {
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
  return ["Rss", "Anonymous"].map((field) =>
    1024 * [...maps.matchAll(new RegExp(`^${field}: *(\\d+)`, "gm"))].reduce((sum, [, kB]) => sum + Number(kB), 0)
  );
}

const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
const sigma = (values: number[]) => Math.sqrt(mean(values.map((value) => (value - mean(values)) ** 2)));
const median = (values: number[]) => values.toSorted((a, b) => a - b)[values.length >> 1] ?? NaN;
const ms = (seconds: number) => (seconds * 1000).toFixed(1);
const MB = (bytes: number, digits = 1) => `${(bytes / 1e6).toFixed(digits)} MB`;
const MiB = (bytes: number) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;
const ratio = (one: number, other: number) => `${(one / other).toFixed(2)} ×`;

if (!await has("hyperfine")) throw new Error("hyperfine is not on PATH; in Debian it is a package of that name");
for (const folder of ["home", "pool"]) await Deno.mkdir(`${scratch}/${folder}`);
await Deno.writeTextFile(`${scratch}/fresh.json`, authJson(mock.login()));
const idle = `${scratch}/idle.js`;
await Deno.writeTextFile(idle, "if (process.argv.length > 2) setTimeout(() => {}, 3_600_000);\n");

const notes: string[] = [];
const ours: Program[] = [];
const add = (name: string, argv: string[], files: string[], floor: Pick<Program, "argv" | "files">) =>
  ours.push({ name, argv, files, modes: ["nothing", "refresh", "health"], floor: { name, modes: ["bare"], ...floor } });
for (const engine of ["Bun", "Deno"]) {
  const [program, floor] = [`${scratch}/program_${engine}`, `${scratch}/idle_${engine}`];
  const make = (from: string, to: string) => compile(engine.toLowerCase(), from, to);
  const failed = await make(bundle, program) ?? await make(idle, floor);
  if (failed !== null) notes.push(`No ${engine} executable could be built here: ${failed}`);
  else add(`${engine} executable`, [program], [program], { argv: [floor], files: [floor] });
}
const permissions = (await Deno.readTextFile(`${root}refresh.ts`)).split("\n", 1)[0]?.match(/--allow-\S+/g) ?? [];
const [source, script] = [[deno, "run", "--quiet", ...permissions], `${root}refresh.ts`];
add("Deno, from source", [...source, script], [deno, script], { argv: [...source, idle], files: [deno, idle] });
const floors = ours.flatMap(({ floor }) => floor ?? []);

const others: Program[] = [];
const other = (name: string, argv: string[], ...modes: Mode[]) => others.push({ name, argv, files: [], modes });
const asked = `http://127.0.0.1:${mock.port}/mock/next`;
if (await has(python)) other("`python3 -c pass`", [python, "-c", "pass"], "bare");
if (await has("curl")) other("`curl` to the mock server", ["curl", "-s", "-d{}", asked], "bare");
if (reference) other("the script", ["bash", reference], "nothing", "refresh");
else notes.push("No script to compare with: REFERENCE is not set.");

for (const { files } of [...floors, ...ours]) for (const file of files) await cache(file, true);
const timed = [...floors, ...ours, ...others].flatMap((program) =>
  program.modes.map((mode): Timed => ({ program, mode, seconds: [], peaks: [] }))
);
await measure(timed);

const rows = [["", "program", "mean ± σ", "to its floor", "to the script", "memory", "to its floor"]];
rows.push(rows[0]?.map(() => "---") ?? []);
for (const mode of Object.keys(MODES) as Mode[]) {
  const rival = timed.find((each) => each.mode === mode && each.program.argv[0] === "bash");
  for (const { program, seconds, peaks } of timed.filter((each) => each.mode === mode)) {
    const floor = timed.find((each) => each.program === program.floor);
    rows.push([
      MODES[mode].title,
      program.name,
      `${ms(mean(seconds))} ± ${ms(sigma(seconds))} ms`,
      floor ? ratio(median(seconds), median(floor.seconds)) : "",
      rival && rival.program !== program ? `1 : ${(median(rival.seconds) / median(seconds)).toFixed(1)}` : "",
      `${MiB(median(peaks))} at most`,
      floor ? ratio(median(peaks), median(floor.peaks)) : "",
    ]);
  }
}
for (const { name, argv, files, floor } of [...ours, ...others.filter(({ argv }) => argv[0] === "bash")]) {
  for (const whole of floor ? [false, true] : [true]) {
    for (const file of [...files, ...floor?.files ?? []]) await cache(file, whole);
    const [resident = 0, anonymous = 0] = await waiting(argv);
    const [least = NaN, leastAnonymous = NaN] = floor ? await waiting([...floor.argv, "wait"]) : [];
    const memory = `${MiB(resident)}, ${MiB(anonymous)} anonymous`;
    const more = floor ? `${ratio(resident, least)}, ${ratio(anonymous, leastAnonymous)}` : "";
    rows.push([`waiting${whole ? "" : ", read by the page"}`, name, "", "", "", memory, more]);
  }
}
const packers = ["cat", "gzip -9", ...await has("zstd") ? ["zstd -9"] : []];
for (const { name, files, floor } of ours) {
  const sizes = await Promise.all(packers.map((packer) => shell(`cat "$@" | ${packer} | wc -c`, ...files)));
  const text = sizes.map((size, index) => `${MB(Number(size))}${index ? ` by \`${packers[index]}\`` : ""}`).join(", ");
  const more = Number(sizes[0]) - Number(await shell('cat "$@" | wc -c', ...floor?.files ?? []));
  rows.push(["size", name, text, `+${MB(more, 2)}`, "", "", ""]);
}

const version = (...argv: string[]) => shell('"$@" 2>&1 | sed "s/ (.*//; q"', ...argv);
const tools = [await version(python, "-V"), await version("curl", "-V"), await version("bash", "--version")];
const versions = [`Deno ${Deno.version.deno}`, `Bun ${await version(bun, "-v")}`, ...tools];
const cpu = await shell("sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1") || Deno.build.arch;
const machine = `${cpu}, ${navigator.hardwareConcurrency} cores, Linux ${Deno.osRelease()}`;
console.log(`${new Date().toISOString().slice(0, 10)}, ${machine}, ${versions.join(", ")}.
${ROUNDS * RUNS} runs of each, in ${ROUNDS} rounds; ratios are those of the medians. The mock server shares the cores.
Floor: a program that does nothing, by the same engine. Executables are in the page cache as a whole, where it does not
say "read by the page". Waiting: after ${WAIT_SECONDS} s.\n`);
for (const row of rows) console.log(`| ${row.join(" | ")} |`);
for (const note of notes) console.log(`\n${note}`);

await mock.close();
await Deno.remove(scratch, { recursive: true });
