/**
 * What the long proofs share: waiting for what has to come, tables of cases, chance that is the same in every run, and
 * processes whose log is read while they run. `CAR_EXE` names another executable than the one that `make` builds.
 *
 * @module
 */
import { resolve } from "node:path";
import { setTimeout as pause } from "node:timers/promises";

export { pause };
export const LIMIT_MS = 100_000; // for any process and any wait: whatever hangs fails its test
export const LANES = 2; // how many of the thousands of short runs go on side by side

export const repo = resolve(import.meta.dirname!, "..");
export const given = (name: string, preset: string) => Deno.env.get(name) || preset;
export const built = given("CAR_EXE", `${repo}/dist/codex_auth_refresh`);

export interface Patience {
  readonly seconds?: number;
  /** Milliseconds between two looks. */
  readonly every?: number;
}

/** How many seconds it took until a condition held. */
export async function until(
  condition: () => boolean | Promise<boolean>,
  what: string | (() => string) = `${condition}`,
  { seconds = LIMIT_MS / 1000, every = 2 }: Patience = {},
): Promise<number> {
  const began = performance.now();
  const passed = () => (performance.now() - began) / 1000;
  for (; !await condition(); await pause(every)) {
    if (passed() >= seconds) throw new Error(`not within ${seconds} s: ${typeof what === "string" ? what : what()}`);
  }
  return passed();
}

export const textOf = (path: string) => Deno.readTextFileSync(path);
export const tokenIn = (text: string): string => JSON.parse(text).tokens.refresh_token;

/** null where it throws. */
export function attempt<T>(what: () => T): T | null {
  try {
    return what();
  } catch {
    return null;
  }
}

/** What is at a path itself, links not followed; null where nothing is. */
export const statOf = (path: string, look = Deno.lstatSync): Deno.FileInfo | null => attempt(() => look(path));
export const inode = (path: string) => statOf(path)?.ino ?? null;

export function median(numbers: number[]): number {
  return numbers.toSorted((one, other) => one - other)[numbers.length >> 1] ?? NaN;
}

/** The same numbers from [0, 1) in every run (mulberry32). */
export function random(seed: number): () => number {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Does the same with each item, a few at a time. */
export async function each<T>(items: Iterable<T>, what: (item: T) => Promise<unknown>, lanes = LANES): Promise<void> {
  const rest = items[Symbol.iterator]();
  const lane = async () => {
    for (let next = rest.next(); !next.done; next = rest.next()) await what(next.value);
  };
  await Promise.all(Array.from({ length: lanes }, lane));
}

/** A test of many cases, a few at a time; each is a step of its own, with what it found out behind its name. */
export function table<Row>(
  name: string,
  rows: Record<string, Row>,
  check: (row: Row) => string | void | Promise<string | void>,
  lanes = LANES,
): void {
  Deno.test(name, async (t) => {
    const results = new Map<string, PromiseSettledResult<string | void>>();
    await each(Object.entries(rows), async ([what, row]) => {
      const [result] = await Promise.allSettled([Promise.try(check, row)]);
      results.set(what, result);
    }, lanes);
    for (const [what, result] of results) {
      const found = result.status === "fulfilled" && result.value ? `: ${result.value}` : "";
      await t.step(what + found, () => {
        if (result.status === "rejected") throw result.reason;
      });
    }
  });
}

// Processes -----------------------------------------------------------------------------------------------------------

export interface Ended {
  readonly code: number;
  readonly signal: string | null;
  readonly said: string;
  readonly printed: string;
  /** Both of them. */
  readonly output: string;
}

export interface Running extends AsyncDisposable {
  readonly pid: number;
  /** Its end, which is not before that of all who write to its streams. */
  readonly ended: Promise<Ended>;
  /** What it wrote to stderr so far. */
  stderr(): string;
  /** Resolves, with the seconds that it took, once stderr has matched so many times, what came before `from` aside. */
  said(pattern: RegExp, how?: Patience & { times?: number; from?: number }): Promise<number>;
  kill(signal: Deno.Signal): void;
}

/** Starts a program with nothing in its environment but what is given. */
export function launch(
  [program = "", ...args]: string[],
  env: Record<string, string>,
  { cwd, seconds = LIMIT_MS / 1000 }: { cwd?: string; seconds?: number } = {},
): Running {
  const streams = { stdin: "null", stdout: "piped", stderr: "piped" } as const;
  const child = new Deno.Command(program, { args, env, clearEnv: true, cwd, ...streams }).spawn();
  const kill = (signal: Deno.Signal) => void attempt(() => child.kill(signal)); // it may have ended
  let text = "";
  const read = async () => {
    for await (const chunk of child.stderr.pipeThrough(new TextDecoderStream())) text += chunk;
  };
  // Not just killed: its children may keep the streams open.
  const { promise: hanging, reject } = Promise.withResolvers<never>();
  const limit = setTimeout(() => {
    kill("SIGKILL");
    reject(new Error(`no end after ${seconds} s: ${program} ${args[0]}\n${text}`));
  }, seconds * 1000);
  const all = Promise.all([child.status, new Response(child.stdout).text(), read()]);
  const ended = Promise.race([all, hanging]).then(([{ code, signal }, printed]) => {
    clearTimeout(limit);
    return { code, signal, said: text, printed, output: printed + text };
  });
  ended.catch(() => {}); // told to whoever waits for it
  const said: Running["said"] = (pattern, { times = 1, from = 0, ...patience } = {}) =>
    until(
      () => text.slice(from).split(pattern).length > times,
      () => `${pattern}, but:\n${text.slice(-2000)}`,
      patience,
    );
  const end = async () => {
    kill("SIGTERM");
    const hard = setTimeout(() => kill("SIGKILL"), 10_000);
    await ended.finally(() => clearTimeout(hard));
  };
  return { pid: child.pid, ended, stderr: () => text, said, kill, [Symbol.asyncDispose]: end };
}
