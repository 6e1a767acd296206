/**
 * Ten thousand bad inputs: half of them files in the place of auth.json, half of them answers, damaged in every way that
 * a text can be. What has to come of each is said by another reader of JSON than the program's.
 *
 * @module
 */
import { assert, assertEquals, assertMatch } from "@std/assert";
import { Buffer } from "node:buffer";
import { jwt, type MockServer, startMockServer, type Tokens } from "../mock_server.ts";
import { attempt, readSettings } from "../refresh.ts";
import { DOCUMENTED, each, exe, leakIn, LIMIT_MS, piecesOf, random, Scene, textOf } from "./scene.ts";

const INPUTS = 10_000;
const SEED = 20_260_131;

class Dice {
  readonly next: () => number;
  constructor(seed: number) {
    this.next = random(seed);
  }
  below(limit: number): number {
    return Math.floor(this.next() * limit);
  }
  chance(percent: number): boolean {
    return this.next() * 100 < percent;
  }
  one<T>(of: readonly T[]): T {
    return of[this.below(of.length)]!;
  }
}

// Reading JSON --------------------------------------------------------------------------------------------------------

/** JSON as this file reads it: the last of equal names counts, numbers stay text. */
type Json = null | boolean | string | Digits | Json[] | { [name: string]: Json };
class Digits {
  constructor(readonly text: string) {}
}

const isObject = (value: Json | undefined): value is { [name: string]: Json } =>
  typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof Digits);
const isString = (value: Json | undefined): value is string => typeof value === "string" && value !== "";
const membersOf = (value: Json | undefined) => isObject(value) ? value : {};
const memberOf = (value: Json | undefined, name: string): Json | undefined =>
  isObject(value) && Object.hasOwn(value, name) ? value[name] : undefined;

/** A reader to compare by, which takes each number for a list with its text in it. undefined for what is not JSON. */
function readJson(bytes: Uint8Array): Json | undefined {
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    JSON.parse(text);
    const marked = text.replace(
      /"[^"\\]*(?:\\.[^"\\]*)*"|-?\d[\d.eE+-]*/g,
      (token) => token.startsWith('"') ? token : `["${MARK}","${token}"]`,
    );
    return JSON.parse(marked, (_, value) => value?.[0] === MARK ? new Digits(value[1]) : value);
  } catch {
    return undefined;
  }
}

const MARK = crypto.randomUUID(); // in no input

const levelsOf = (value: Json): number =>
  isObject(value) || Array.isArray(value) ? 1 + Math.max(0, ...Object.values(value).map(levelsOf)) : 0;

/** One text for equal values, whatever the order of names. */
function canonical(value: Json): string {
  if (value instanceof Digits) return `#${value.text}`;
  if (Array.isArray(value)) return `[${value.map(canonical)}]`;
  if (!isObject(value)) return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}:${canonical(each)}`).sort()}}`;
}

// Bad inputs ----------------------------------------------------------------------------------------------------------

const QUOTED = [
  "",
  "x",
  "\\u0000",
  "\\ud800",
  "\\udc00\\ud800",
  "\\ud83d\\ude00",
  "\u{1f600}",
  "\u2028",
  '\\"\\\\\\/\\b',
];
const NAMES = ["__proto__", "constructor", "toJSON", "prototype", "hasOwnProperty", "toString", "then", "rawJSON", "0"];
const NUMBERS = [
  "0",
  "-0",
  "1.0",
  "1e400",
  "-1E-400",
  "123456789012345678901234567890",
  "0.1000000000000000055",
  "1e5",
];
const MEMBERS = ["auth_mode", "OPENAI_API_KEY", "tokens", "last_refresh", "refresh_token", "error", "code"];

/** A JSON text of any kind. */
function anything(dice: Dice, levels = 4): string {
  const kind = dice.below(levels > 0 ? 10 : 7);
  if (kind < 2) return dice.one(NUMBERS);
  if (kind < 3) return dice.one(["null", "true", "false"]);
  if (kind < 6) return `"${dice.one([...QUOTED, ...NAMES, "2026-02-30T00:00:00Z", "e30.e30.", "a.b.c"])}"`;
  if (kind < 7) {
    if (dice.chance(80)) return `"${"A".repeat(dice.one([100, 10_000, 300_000]))}"`;
    const depth = dice.one([20, 100, 200, 1000]);
    const [open, close] = dice.one([["[", "]"], ['{"":', "}"]]) as [string, string];
    return open.repeat(depth) + "0" + close.repeat(depth);
  }
  const items = Array.from({ length: dice.below(4) }, () => anything(dice, levels - 1));
  if (kind < 8) return `[${items}]`;
  return `{${items.map((item) => `"${dice.one([...QUOTED, ...NAMES, ...MEMBERS])}":${item}`)}}`;
}

type Member = [name: string, text: string];

/** An object of these members after up to three accidents. */
function broken(dice: Dice, members: readonly Member[]): string {
  const list = [...members];
  for (let left = dice.below(4); left > 0; left--) {
    const at = dice.below(list.length + 1);
    const [name = ""] = list[at] ?? [];
    const added = dice.one([...QUOTED, ...NAMES, ...NAMES, ...MEMBERS]);
    if (dice.chance(50)) list.splice(at, 0, [added, anything(dice)]);
    else if (dice.chance(30)) list.splice(at, 1);
    else if (dice.chance(60)) list.splice(at, 1, [name, anything(dice)]);
    else list.push(dice.one(list.length > 0 ? list : members)); // the same once more
  }
  const space = dice.one(["", " ", "\n\t", "\r\n"]);
  return `{${list.map(([name, text]) => `${space}"${name}"${space}:${space}${text}`).join(`${space},`)}${space}}`;
}

/** The bytes of a text, every third time damaged. */
function damaged(dice: Dice, text: string): Uint8Array {
  const bytes = new TextEncoder().encode(text);
  if (!dice.chance(33)) return bytes;
  const at = dice.below(bytes.length);
  const insert = (...inserted: number[]) => new Uint8Array([...bytes.slice(0, at), ...inserted, ...bytes.slice(at)]);
  return dice.one<() => Uint8Array>([
    () => bytes.slice(0, at),
    () => new Uint8Array(dice.one([0, 0, bytes.length])),
    () => bytes.with(at, bytes[at]! ^ 1 << dice.below(8)),
    () => insert(0),
    () => insert(dice.below(256)),
    () => insert(0xff),
    () => insert(0xed, 0xa0, 0x80), // a surrogate, which UTF-8 has not
    () => insert(0xc0, 0xaf), // longer than it need be
    () => insert(0xf0, 0x9f, 0x98, 0x80),
    () => new Uint8Array([0xef, 0xbb, 0xbf, ...bytes]),
    () => new Uint8Array([0xff, 0xfe, ...[...bytes].flatMap((byte) => [byte, 0])]),
    () => new Uint8Array([...bytes, ...bytes]),
    () => new TextEncoder().encode("[".repeat(500_000)),
    () => new TextEncoder().encode(`[${text}]`),
    () => new TextEncoder().encode(`${text}${dice.one(["\n\n", "\0", ",", "}", "//", "\u00a0"])}`),
    () => new TextEncoder().encode(dice.one([" ", "\n", "null", "true", '"x"', "7", "NaN", "undefined", "<html>"])),
  ])();
}

const LOGIN = { id_token: jwt({ exp: 1 }), access_token: jwt({ exp: 1 }), refresh_token: "rt_0123456789_of_the_file" };
const quoted = (tokens: object): Member[] =>
  Object.entries(tokens).map(([name, value]): Member => [name, JSON.stringify(value)]);

// What has to come of them --------------------------------------------------------------------------------------------

interface Tried {
  outcome: string;
  /** All that was logged, and the status file. */
  said: string;
}

/** Looks at a home, as the executable does or inside this process, which is faster. */
async function look(home: string, url: string, throughExe: boolean): Promise<Tried> {
  const variables = { CODEX_REFRESH_TOKEN_URL_OVERRIDE: url };
  const status = `${home}/auth_refresh_status.json`;
  let said = "";
  if (throughExe) {
    const command = new Deno.Command(exe, { args: ["--once", home], env: variables, clearEnv: true, stdin: "null" });
    const { code, stderr } = await command.output();
    said = new TextDecoder().decode(stderr);
    assertMatch(said, DOCUMENTED);
    const { watchdog_last_outcome: outcome } = JSON.parse(textOf(status));
    const codes = { refreshed: 0, superseded: 1, skip: 1, "fail:permanent": 3 };
    const known = Object.entries(codes).find(([start]) => outcome.startsWith(start));
    assertEquals(code, known?.[1] ?? 2, said);
  } else {
    const context = {
      settings: readSettings(variables),
      log: (_level: string, _event: string, text: string) =>
        void (said += `[codex_auth_refresh 1970-01-01T00:00:00Z] ${text}\n`),
      force: false,
      stop: new AbortController().signal,
      giveUpAt: (since: number) => since,
      clock: Date,
    };
    await attempt({ dir: home, status }, context);
    assertMatch(said, DOCUMENTED);
  }
  const { watchdog_last_outcome: outcome, detail } = JSON.parse(textOf(status));
  return { outcome: detail === null || !outcome.startsWith("skip") ? outcome : `${outcome} ${detail}`, said };
}

/** What has to come of an auth.json: the rules for deciding, by another reader. */
function verdictOf(bytes: Uint8Array): RegExp {
  if (bytes.length === 0) return /^skip:no_auth_json/;
  const document = readJson(bytes);
  if (!isObject(document) || levelsOf(document) > 127) return /^skip unreadable:\w+$/;
  const mode = memberOf(document, "auth_mode") ?? null; // nesting beyond 127 the Codex CLI does not read either
  const key = memberOf(document, "OPENAI_API_KEY") ?? null;
  if (mode === "" || mode === null && key === "") return /^(refreshed|skip (no_refresh_token|auth_mode=none))$/;
  if (mode !== null && typeof mode !== "string") return /^skip unreadable:TypeError$/;
  if (mode === null ? key !== null : !/^chatgpt(_auth_tokens)?$/i.test(mode)) return /^skip auth_mode=[\w.-]+$/;
  return isString(memberOf(memberOf(document, "tokens"), "refresh_token")) ? /^refreshed$/ : /^skip no_refresh_token$/;
}

/** Which tokens of an answer are to be kept. */
function usableOf(answer: Json | undefined): (keyof Tokens)[] {
  return (["id_token", "access_token", "refresh_token"] as const).filter((name) => {
    const value = memberOf(answer, name);
    if (!isString(value) || !value.isWellFormed() || value.includes("\ufffd")) return false; // no UTF-8
    const [header, payload = "", signature] = value.split(".");
    const decodes = /^[\w-]+$/.test(payload) && payload.length % 4 !== 1 &&
      isObject(readJson(Buffer.from(payload, "base64url")));
    return name !== "id_token" || Boolean(header && signature && decodes);
  });
}

/** auth.json with tokens of an answer in it, compared in every other field. */
function assertCarried(before: Json | undefined, tokens: Record<string, Json>, bytes: Uint8Array, what: string) {
  const after = membersOf(readJson(bytes));
  const now = memberOf(after, "last_refresh") ?? null;
  assert(typeof now === "string" && Math.abs(Date.now() - Date.parse(now)) < LIMIT_MS && now.endsWith("Z"), what);
  const carried = { ...membersOf(memberOf(before, "tokens")), ...tokens };
  assertEquals(canonical(after), canonical({ ...membersOf(before), last_refresh: now, tokens: carried }), what);
}

/** Runs numbered cases, so many at a time. */
async function numbered(count: number, width: number, run: (index: number, lane: number) => Promise<void>) {
  let index = 0;
  await each(Array(width).keys(), async (lane) => {
    while (index < count) await run(index++, lane);
  }, width);
}

Deno.test("ten thousand bad inputs: a documented outcome each, no crash, no field lost, no token shown", async () => {
  await using scene = await Scene.open();
  scene.sh("disk homes size=1g");
  const [files, ...lanes] = await Promise.all(
    Array.from({ length: 9 }, () => startMockServer({ acceptAny: true })),
  ) as [MockServer, ...MockServer[]];
  const outcomes: Record<string, number> = {};
  const hidden = piecesOf(Object.values(LOGIN));
  const half = INPUTS / 2;
  const check = async (index: number, bytes: Uint8Array, url: string) => {
    const home = `${scene.root}/homes/${index}`;
    Deno.mkdirSync(home);
    Deno.writeFileSync(`${home}/auth.json`, bytes, { mode: 0o600 });
    const { outcome, said } = await look(home, url, index % 50 === 0);
    const kind = outcome.replace(/ .*|_\d+$/, "");
    outcomes[kind] = (outcomes[kind] ?? 0) + 1;
    const shown = said + textOf(`${home}/auth_refresh_status.json`);
    assertEquals(leakIn(shown, hidden), null, shown);
    const after = Deno.readFileSync(`${home}/auth.json`);
    if (outcome !== "refreshed") assert(Buffer.from(bytes).equals(after), said);
    for (const { name } of Deno.readDirSync(home)) assert(!name.endsWith(".tmp"), name);
    Deno.removeSync(home, { recursive: true });
    return { outcome, said, after };
  };

  const brokenFile = async (index: number) => {
    const dice = new Dice(SEED + index);
    const tokens = dice.chance(70)
      ? broken(dice, [...quoted(LOGIN), ["account_id", '"x"']])
      : broken(dice, quoted(LOGIN));
    const mode = dice.one(['"chatgpt"', '"chatgpt"', '"ChatGPT"', '"CHATGPT_AUTH_TOKENS"', "null"]);
    const members: Member[] = [
      ["auth_mode", mode],
      ["OPENAI_API_KEY", "null"],
      ["tokens", tokens],
      ["last_refresh", '"2020-01-01T00:00:00Z"'],
    ];
    const bytes = damaged(dice, broken(dice, members));
    const { outcome, said, after } = await check(index, bytes, files.url);
    assertMatch(outcome, verdictOf(bytes), `input ${index}: ${said}`);
    if (outcome !== "refreshed") return;
    const before = readJson(bytes);
    const fresh = files.newest(String(memberOf(memberOf(before, "tokens"), "refresh_token")));
    const stored = memberOf(readJson(after), "tokens");
    const issued = ["id_token", "access_token", "refresh_token"].map((name): [string, Json] => {
      const token = String(memberOf(stored, name));
      assert(files.secrets.includes(token), said);
      return [name, token];
    });
    assertEquals(memberOf(stored, "refresh_token"), fresh, said);
    assertCarried(before, Object.fromEntries(issued), after, `input ${index}`);
  };

  const file = new TextEncoder().encode(
    `{"__proto__":{"x":1},"toJSON":1e400,"tokens":{${quoted(LOGIN).map(([name, text]) => `"${name}":${text}`)}}}`,
  );
  const brokenAnswer = async (index: number, lane: number) => {
    const dice = new Dice(SEED + index);
    const mock = lanes[lane]!;
    const success = dice.chance(70);
    const dead = !success && dice.chance(2); // each takes three seconds: it waits for another writer
    const status = success ? dice.one([200, 200, 200, 200, 201, 202, 299]) : dice.one(
      dead ? [401, 400, 403] : [300, 301, 307, 308, 400, 403, 404, 409, 418, 429, 451, 499, 500, 502, 503, 599],
    );
    const tokens = { ...LOGIN, id_token: jwt({ exp: 2 }), access_token: "new_access", refresh_token: "new_refresh" };
    const shape = dice.one(['{"error":{"code":CODE}}', '{"error":CODE}', '{"code":CODE}']);
    const body = success
      ? damaged(dice, broken(dice, [...quoted(tokens), ["token_type", '"Bearer"'], ["expires_in", "1e3"]]))
      : dead
      ? new TextEncoder().encode(shape.replace("CODE", '"invalid_grant"'))
      : damaged(dice, shape.replace("CODE", anything(dice)));
    const retry = dice.one(["0", "-1", "1e9", "9".repeat(400), "Wed, 21 Oct 2015 07:28:00 GMT", "soon"]);
    const headers = { location: "http://127.0.0.1:1/", "retry-after": retry };
    mock.next({ kind: "raw", status, body, headers, contentType: dice.one(["application/json", "text/html", "x"]) });
    const { outcome, said, after } = await check(index, file, mock.url);

    const answer = readJson(new TextEncoder().encode(new TextDecoder().decode(body.subarray(0, 1 << 20))));
    const usable = usableOf(answer);
    const wanted = success
      ? usable.length > 0 ? "refreshed" : "fail:apply_response"
      : `fail:${dead ? "permanent" : "transient"}_${status}`;
    assertEquals(outcome, wanted, `input ${index}: ${said}`);
    if (outcome !== "refreshed") return;
    const kept = usable.map((name): [string, Json] => [name, memberOf(answer, name)!]);
    assertCarried(readJson(file), Object.fromEntries(kept), after, `input ${index}`);
  };

  try {
    for (const mock of [files, ...lanes]) mock.graceMilliseconds = Infinity; // many files hold the same token
    await each([
      () => numbered(half, 256, brokenFile),
      () => numbered(half, lanes.length, (index, lane) => brokenAnswer(half + index, lane)),
    ], (run) => run());
    console.log(outcomes);
    for (const kind of ["refreshed", "skip", "skip:no_auth_json", "fail:apply_response", "fail:transient"]) {
      assert((outcomes[kind] ?? 0) > 50, kind);
    }
  } finally {
    await Promise.all([files, ...lanes].map((mock) => mock.close()));
  }
});
