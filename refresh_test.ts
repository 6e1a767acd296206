/**
 * Tests of refresh.ts, in its own order. First the pure functions, then the whole program: one table of scenarios, each
 * driven four ways, as source under Deno, as bundle under Bun and under Node.js, and as executable, against the mock server.
 *
 * `make test` runs them all; `CAR_ONLY=words` only the scenarios whose names hold these words.
 *
 * @module
 */
import * as untyped from "@std/assert";
import { Buffer } from "node:buffer";
import { createHash } from "node:crypto";
import * as fs from "node:fs";
import * as net from "node:net";
import { join } from "node:path";
import { DatabaseSync } from "node:sqlite";
import { setTimeout as sleep } from "node:timers/promises";
import { gzipSync } from "node:zlib";
import { authJson, type Behaviour, jwt, type MockOptions, startMockServer } from "./mock_server.ts";
import * as car from "./refresh.ts";

const assert: (value: unknown, message?: string) => asserts value = untyped.assert;
const assertEquals: <T>(actual: T, expected: T, message?: string) => void = untyped.assertEquals;
const assertMatch: (actual: string, expected: RegExp, message?: string) => void = untyped.assertMatch;
const assertThrows: (act: () => unknown, kind: new (message: string) => Error) => Error = untyped.assertThrows;
const assertRejects: (act: () => Promise<unknown>, kind: new (message: string) => Error) => Promise<Error> =
  untyped.assertRejects;

const [HOUR, DAY] = [3600, 86400];
const NOW = Date.parse("2026-01-31T12:00:00Z");
type Fields = Record<string, unknown>;
/** What a log line begins with. */
const PREFIX = /^\[codex_auth_refresh \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\] /;

const scratch = fs.realpathSync(await Deno.makeTempDir({ prefix: "codex_auth_refresh_test_" }));
fs.chmodSync(scratch, 0o755);
globalThis.addEventListener("unload", () => fs.rmSync(scratch, { recursive: true, force: true }));

/** Numbers from [0, 1) that are the same in every run. */
function seeded(seed: number): () => number {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let bits = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), 61 | bits);
    return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
  };
}

// ── what every section uses ──────────────────────────────────────────────────────────────────────

Deno.test("a token shows itself to nobody", () => {
  const value = "rt_very-secret-value-0123456789";
  const secret = new car.Secret(value);
  const thrown = assertThrows(() => {
    throw new Error(`no luck with ${secret}`);
  }, Error);
  const shown = [`${secret}`, "" + secret, String(secret), JSON.stringify({ secret }), JSON.stringify([secret])];
  shown.push(Deno.inspect(secret), Deno.inspect({ deep: [secret] }), thrown.message, String(Object.values(secret)));
  for (const text of shown) assert(!text.includes("very-secret"), text);
  for (const text of shown.slice(0, 7)) assertMatch(text, /\[redacted\]/);
  assertEquals(secret.open(), value);
  assertEquals(car.Secret.redact(`a ${value} b ${value}`), "a [redacted] b [redacted]");
  for (let other = 0; other < 127; other++) new car.Secret(`another-token-${other}`);
  new car.Secret(value); // seen again, so not the oldest any more
  for (let other = 0; other < 127; other++) new car.Secret(`a-further-token-${other}`);
  assertEquals(car.Secret.redact(value), "[redacted]");
  assertEquals(secret.fingerprint(), createHash("sha256").update(value).digest("hex").slice(0, 16));
  const said = ["secret-va", "secret-v", `x${value}x`, "secret-vx"];
  assertEquals(said.map((word) => car.Secret.isShownBy(word)), [true, false, true, false]);
  const code = "very-secret-value".replaceAll("-", "_");
  new car.Secret(`rt_${code}_0123456789`);
  assertMatch(JSON.stringify(car.judge(401, JSON.stringify({ error: { code } }), null, NOW)), /"code":null/);
});

Deno.test("a log line is one line, names its home where there are several, and what it tells forges no field", () => {
  const home = { dir: "/x\ny", status: "" };
  const log = (format: "text" | "json", many: boolean, text: string) => {
    const lines: string[] = [];
    car.logTo((line) => lines.push(line), format, home, many)("warning", "tested", text);
    assertEquals(lines.length, 1);
    return lines[0] ?? "";
  };
  new car.Secret("rt_that-is-logged");
  const rows: [string, string][] = [["a\nb\u2028c\x1b[2J", "a?b?c?[2J"], ["x rt_that-is-logged", "x [redacted]"]];
  for (const [text, shown] of rows) {
    assertEquals(log("text", false, text).replace(PREFIX, ""), shown);
    assertEquals(log("text", true, text).replace(PREFIX, ""), `[/x?y] ${shown}`);
  }
  const message = "refresh: x (http=200 rotated=a,b) level=forged event=forged home=forged time=0 message=forged";
  const { time, ...fields } = JSON.parse(log("json", true, message)) as Fields;
  assert(Math.abs(Date.parse(String(time)) - Date.now()) < 60_000, String(time));
  const own = { level: "warning", event: "tested", home: home.dir, message };
  assertEquals(fields, { http: "200", rotated: "a,b", ...own });
});

// ── configuration ────────────────────────────────────────────────────────────────────────────────

const URL_NAME = "CODEX_REFRESH_TOKEN_URL_OVERRIDE";
const SECONDS: [string, "intervalSeconds" | "marginSeconds" | "staleSeconds", number, number][] = [
  ["CODEX_AUTH_REFRESH_INTERVAL_SECONDS", "intervalSeconds", 21600, 1],
  ["CODEX_AUTH_SAFETY_MARGIN_SECONDS", "marginSeconds", 14400, 0],
  ["CODEX_AUTH_STALE_AFTER_SECONDS", "staleSeconds", 604800, 1],
];

/** Values that a variable must not have, and a word of what is allowed instead. */
const BAD_VALUES: [string, string[], string][] = [
  ["CODEX_AUTH_REFRESH_INTERVAL_SECONDS", ["0", "-1", "1.5", "1e3", "6h", " 5", "0x10", "9".repeat(20)], "at least 1"],
  ["CODEX_AUTH_SAFETY_MARGIN_SECONDS", ["-1", "0.5", "four", "+1", "NaN"], "at least 0"],
  ["CODEX_AUTH_STALE_AFTER_SECONDS", ["0", "-604800", "7d", "Infinity"], "at least 1"],
  [URL_NAME, [
    "nonsense",
    "ftp://127.0.0.1/",
    "http://example.com/token",
    "http://127.0.0.1.example.com/",
    "http://a.localhost/",
  ], "https"],
  ["CODEX_AUTH_ALLOW_HTTP", ["yes", "true", "2"], "1"],
  ["CODEX_AUTH_IN_PLACE", ["yes", "on"], "1"],
  ["CODEX_AUTH_LOG_FORMAT", ["yaml", "JSON"], "text or json"],
  ["CODEX_CA_CERTIFICATE", [join(scratch, "no-such.pem"), scratch], "PEM"],
  ["SSL_CERT_FILE", [join(scratch, "no-such.pem")], "PEM"],
  ["HTTPS_PROXY", ["http://", "ftp://127.0.0.1:21"], "proxy"],
  ["ALL_PROXY", ["socks5://127.0.0.1:1080"], "proxy"],
];

Deno.test("settings have their defaults, and a variable set to the empty string counts as unset", () => {
  for (const env of [{}, Object.fromEntries(BAD_VALUES.map(([name]) => [name, ""]))]) {
    const settings = car.readSettings(env);
    for (const [, field, preset] of SECONDS) assertEquals(settings[field], preset);
    assertEquals(settings.url.href, "https://auth.openai.com/oauth/token");
    assertEquals([settings.caFile, settings.inPlace, settings.logFormat], [null, false, "text"]);
  }
});

Deno.test("settings are read from the environment", () => {
  const pem = join(scratch, "roots.pem");
  fs.writeFileSync(pem, "-----BEGIN CERTIFICATE-----\n");
  for (const [name, field, , least] of SECONDS) {
    assertEquals(car.readSettings({ [name]: String(least) })[field], least);
    assertEquals(car.readSettings({ [name]: "2592000" })[field], 2592000);
  }
  for (const url of ["https://example.com/a?b=c", "http://localhost:1/", "http://127.9.9.9/x", "http://[::1]:8080/"]) {
    assertEquals(car.readSettings({ [URL_NAME]: url }).url.href, url);
  }
  const plain = "http://mock:8787/oauth/token";
  assertEquals(car.readSettings({ [URL_NAME]: plain, CODEX_AUTH_ALLOW_HTTP: "1" }).url.href, plain);
  assert(car.readSettings({ CODEX_AUTH_IN_PLACE: "1" }).inPlace);
  assertEquals(car.readSettings({ CODEX_AUTH_LOG_FORMAT: "json" }).logFormat, "json");
  assertEquals(car.readSettings({ SSL_CERT_FILE: pem }).caFile?.path, pem);
  const both = car.readSettings({ SSL_CERT_FILE: join(scratch, "ignored.pem"), CODEX_CA_CERTIFICATE: pem });
  assertEquals(both.caFile, { name: "CODEX_CA_CERTIFICATE", path: pem });
});

Deno.test("a bad value is one line that names the variable, the value and what is allowed", () => {
  for (const [name, values, allowed] of BAD_VALUES) {
    for (const value of values) {
      const { message } = assertThrows(() => car.readSettings({ [name]: value }), car.UsageError);
      for (const part of [name, value, allowed]) assert(message.includes(part), `${message}: no ${part}`);
      assertEquals(message.split("\n").length, 1);
    }
  }
});

Deno.test("a password in a URL is refused and not repeated", () => {
  for (const start of ["https://", "https:", "https:/", "https:\\\\", "https://a\n"]) {
    const act = () => car.readSettings({ [URL_NAME]: `${start}me:swordfish@example.com/` });
    const { message } = assertThrows(act, car.UsageError);
    assert(message.includes(URL_NAME) && !message.includes("swordfish"), message);
  }
  const { message } = assertThrows(() => car.readSettings({ https_proxy: "ftp://me:swordfish@a" }), car.UsageError);
  assert(message.includes("https_proxy") && !message.includes("swordfish"), message);
});

Deno.test("the proxy is the one that curl would take", () => {
  const [small, capital] = ["http://small.example:1/", "http://capital.example:2/"];
  const [https, http] = ["https://example.com/token", "http://127.0.0.1:9/token"];
  const rows: [Record<string, string>, string, string | undefined][] = [
    [{}, https, undefined],
    [{ https_proxy: small, HTTPS_PROXY: capital }, https, small],
    [{ HTTPS_PROXY: capital, ALL_PROXY: small }, https, capital],
    [{ https_proxy: "", HTTPS_PROXY: capital }, https, capital],
    [{ all_proxy: small, ALL_PROXY: capital }, https, small],
    [{ ALL_PROXY: capital }, http, capital],
    [{ HTTPS_PROXY: capital, http_proxy: small }, http, small],
    [{ HTTP_PROXY: capital }, http, undefined],
    [{ https_proxy: "small.example:1" }, https, small],
    [{ https_proxy: "me:pass@small.example:1" }, https, "http://me:pass@small.example:1/"],
    [
      { https_proxy: "http://DOM\\me:50%off%41@small.example:1" },
      https,
      "http://DOM%5cme:50%25off%41@small.example:1/",
    ],
    [{ https_proxy: small, no_proxy: "example.com" }, https, undefined],
    [{ https_proxy: "ftp://ignored", no_proxy: "example.com" }, https, undefined],
  ];
  for (const [env, url, proxy] of rows) {
    assertEquals(car.readSettings({ ...env, [URL_NAME]: url }).proxy?.href, proxy, JSON.stringify(env));
  }
});

Deno.test("NO_PROXY is read as curl reads it", () => {
  const yes: [string, string][] = [["a.example.com", "example.com"], ["a.example.com", ".Example.COM."], [
    "a.b",
    "x a.b",
  ]];
  yes.push(["a.b", "x,\ta.b"], ["a.b.", "a.b"], ["a.b", " * "], ["10.1.2.3", "10.1.2.3"], ["10.1.2.3", "10.0.0.0/8"]);
  yes.push(["[::1]", "::1"], ["[::1]", "[::1]"], ["[fd00::5]", "fd00::/8"]);
  const no: [string, string][] = [["a.b", ""], ["a.b", "*,x"], ["a.b", "*.b"], ["aexample.com", "example.com"], [
    "a.b",
    "b.a",
  ]];
  no.push(["10.1.2.3", "2.3"], ["10.1.2.3", "11.0.0.0/8"], ["10.1.2.3", "10.0.0.0/64"], ["10.1.2.3", "fd00::/8"], [
    "a.b",
    ",",
  ]);
  for (const [host, list] of yes) assert(car.bypassesProxy(host, { no_proxy: list }), `${host} in ${list}`);
  for (const [host, list] of no) assert(!car.bypassesProxy(host, { NO_PROXY: list }), `${host} in ${list}`);
  assert(!car.bypassesProxy("a.b", { no_proxy: "x", NO_PROXY: "a.b" }));
});

Deno.test("a file of further roots holds certificates, whatever stands around them", () => {
  const [file, root] = [join(scratch, "further.pem"), TLS === undefined ? null : fs.readFileSync(pem("root"), "utf8")];
  const read = (text: string) => {
    fs.writeFileSync(file, text);
    return car.readRoots({ caFile: { name: "SSL_CERT_FILE", path: file } });
  };
  assertEquals(car.readRoots({ caFile: null }), []);
  const broken = "-----BEGIN CERTIFICATE-----\nbm8=\n-----END CERTIFICATE-----\n";
  for (const text of ["", "no certificate", broken, (root ?? "") + broken]) {
    const { message } = assertThrows(() => read(text), Error);
    assert(message.startsWith(`SSL_CERT_FILE=${file}: `), message);
  }
  if (root === null) return;
  const text = `# ours\r\n${root}\n${root}`;
  assertEquals(read(text).map((each) => each.replace(/\s/g, "")), [root, root].map((each) => each.replace(/\s/g, "")));
});

Deno.test("homes come from the arguments, else CODEX_HOME, else HOME, else the fixed place", async () => {
  const dirs = async (names: string[], env: Record<string, string>) =>
    (await car.readHomes(names, env)).map(({ dir }) => dir);
  assertEquals(await dirs(["/x/a", "/x/b"], { CODEX_HOME: "/x/c", HOME: "/x/d" }), ["/x/a", "/x/b"]);
  assertEquals(await dirs([], { CODEX_HOME: "/x/c", HOME: "/x/d" }), ["/x/c"]);
  assertEquals(await dirs([], { CODEX_HOME: "", HOME: "/x/d" }), ["/x/d/.codex"]);
  assertEquals(await dirs([], { HOME: "" }), ["/home/agent/.codex"]);
  assertEquals(await dirs([], {}), ["/home/agent/.codex"]);
  assertEquals([await dirs([], { CODEX_HOME: "~/a", HOME: "/x/d" }), await dirs(["~"], { HOME: "/x/d" })], [
    ["/x/d/a"],
    ["/x/d"],
  ]);
  for (const bad of ["/x/a\r", '"/x/a"', "'/x/a'", "/x/\ufffd"]) {
    const { message } = await assertRejects(() => car.readHomes([], { CODEX_HOME: bad }), car.UsageError);
    assert(message.startsWith(`CODEX_HOME=${JSON.stringify(bad)}: `), message);
  }
  for (const bad of ["", join(scratch, "roots.pem")]) {
    await assertRejects(() => car.readHomes([bad], {}), car.UsageError);
  }
});

Deno.test("a home that is named twice is one, by whatever path", async () => {
  const [real, link] = [join(scratch, "named"), join(scratch, "link")];
  fs.mkdirSync(real);
  fs.symlinkSync(real, link);
  const names = [real, `${real}/`, `${scratch}/x/../named`, link, join(scratch, "absent"), join(link, "../absent")];
  assertEquals((await car.readHomes(names, {})).map(({ dir }) => dir), [real, join(scratch, "absent")]);
});

// ── decide ───────────────────────────────────────────────────────────────────────────────────────

const SETTINGS = { marginSeconds: 14400, staleSeconds: 604800, intervalSeconds: 21600 };
const ago = (seconds: number) => new Date(NOW - seconds * 1000).toISOString();
const expiring = (seconds: number) => jwt({ exp: NOW / 1000 + seconds });

/** The verdict's text, or the reasons to refresh, for a login with these changes. */
function verdict(change: Fields, tokens: Fields = {}, force = false): string {
  const fresh = { access_token: expiring(10 * DAY), refresh_token: "rt_decide", ...tokens };
  const document: Fields = { auth_mode: "chatgpt", tokens: fresh, last_refresh: ago(60), ...change };
  return verdictOn({ kind: "whole", text: "", document }, force);
}

function verdictOn(read: car.Read, force = true): string {
  const verdict = car.decide(read, NOW, SETTINGS, force);
  return verdict.due ? `refresh ${verdict.reasons}` : `skip ${verdict.text}`;
}

Deno.test("every verdict has its text", () => {
  for (const kind of ["absent", "empty"] as const) assertEquals(verdictOn({ kind }), "skip no_auth_json");
  assertEquals(verdictOn({ kind: "unreadable", error: "EIO", torn: false }), "skip unreadable:EIO");
  const aged = "last_refresh_age=777600s>=604800s";
  const rows: [Fields, Fields, string][] = [
    [{ auth_mode: "apikey" }, {}, "skip auth_mode=apikey"],
    [{ auth_mode: "ApiKey" }, {}, "skip auth_mode=apikey"],
    [{ auth_mode: "Of ours" }, {}, "skip auth_mode=of ours"],
    [{ auth_mode: "forged\nline" }, {}, "skip auth_mode=unknown"],
    [{ auth_mode: "CHATGPT" }, {}, `skip fresh exp_in=${10 * DAY}s age=60s`],
    [{ auth_mode: "ChatGPT_Auth_Tokens" }, {}, `skip fresh exp_in=${10 * DAY}s age=60s`],
    [{ auth_mode: undefined, OPENAI_API_KEY: "sk-1" }, {}, "skip auth_mode=none"],
    [{ auth_mode: null, OPENAI_API_KEY: "sk-1" }, {}, "skip auth_mode=none"],
    [{ auth_mode: undefined, personal_access_token: "at-1" }, {}, "skip auth_mode=none"],
    [{ auth_mode: undefined, bedrock_api_key: { key: "k" } }, {}, "skip auth_mode=none"],
    [{ auth_mode: "", bedrock_access_keys: { id: "k" } }, {}, "skip auth_mode=none"],
    [{ auth_mode: undefined, agent_identity: { id: "a" } }, {}, `skip fresh exp_in=${10 * DAY}s age=60s`],
    [{ auth_mode: undefined, bedrock_api_key: null }, {}, `skip fresh exp_in=${10 * DAY}s age=60s`],
    [{ auth_mode: undefined }, {}, `skip fresh exp_in=${10 * DAY}s age=60s`],
    [{ auth_mode: undefined, OPENAI_API_KEY: null }, {}, `skip fresh exp_in=${10 * DAY}s age=60s`],
    [{ tokens: undefined }, {}, "skip no_refresh_token"],
    [{ tokens: null }, {}, "skip no_refresh_token"],
    [{ tokens: ["rt"] }, {}, "skip no_refresh_token"],
    [{}, { refresh_token: "" }, "skip no_refresh_token"],
    [{}, { refresh_token: 5 }, "skip no_refresh_token"],
    [{ last_refresh: ago(604799) }, {}, `skip fresh exp_in=${10 * DAY}s age=604799s`],
    [{ last_refresh: ago(604800) }, {}, "refresh last_refresh_age=604800s>=604800s"],
    [{}, { access_token: expiring(14401) }, "skip fresh exp_in=14401s age=60s"],
    [{}, { access_token: expiring(14400) }, "refresh exp_in=14400s<=14400s"],
    [{}, { access_token: expiring(-5) }, "refresh exp_in=-5s<=14400s"],
    [{ last_refresh: ago(9 * DAY) }, { access_token: expiring(0) }, `refresh exp_in=0s<=14400s,${aged}`],
    [{ last_refresh: "yesterday" }, {}, `skip fresh exp_in=${10 * DAY}s age=unknowns`],
    [{ last_refresh: 5 }, {}, `skip fresh exp_in=${10 * DAY}s age=unknowns`],
    [{ last_refresh: ago(-299) }, {}, `skip fresh exp_in=${10 * DAY}s age=0s`],
    [{ last_refresh: ago(-300) }, {}, `skip fresh exp_in=${10 * DAY}s age=0s`],
    [{ last_refresh: ago(-301) }, {}, `skip fresh exp_in=${10 * DAY}s age=unknowns`],
    [{}, { access_token: "opaque" }, "skip fresh exp_in=unknowns age=60s"],
    [{}, { access_token: jwt({ exp: "soon" }) }, "skip fresh exp_in=unknowns age=60s"],
    [{}, { access_token: jwt({ exp: 1e300 }) }, "skip fresh exp_in=unknowns age=60s"],
    [{}, { access_token: expiring(3650 * DAY) }, `skip fresh exp_in=${3650 * DAY}s age=60s`],
    [{}, { access_token: expiring(3650 * DAY + 1) }, "skip fresh exp_in=unknowns age=60s"],
    [{}, { access_token: jwt({ exp: -1e300 }) }, "skip fresh exp_in=unknowns age=60s"],
    [{ last_refresh: null }, { access_token: null }, "refresh unparseable_metadata"],
    [{ last_refresh: ago(-DAY) }, { access_token: 7 }, "refresh unparseable_metadata"],
  ];
  for (const [change, tokens, text] of rows) assertEquals(verdict(change, tokens), text);
  const strange = ["chatgptAuthTokens", "personalAccessToken", "bedrockApiKey", "bedrockAccessKeys", "agentIdentity"];
  for (const auth_mode of strange) {
    assertEquals(verdict({ auth_mode, last_refresh: ago(9 * DAY) }), `skip auth_mode=${auth_mode.toLowerCase()}`);
  }
  assertEquals(verdict({}, {}, true), "refresh forced");
  assertEquals(verdict({ auth_mode: "apikey" }, {}, true), "skip auth_mode=apikey");
  // Where something is due anyway, that is the reason.
  assertEquals(verdict({ last_refresh: ago(9 * DAY) }, {}, true), `refresh ${aged}`);
  assertEquals(verdict({ last_refresh: null }, { access_token: null }, true), "refresh unparseable_metadata");
});

Deno.test("whatever stands in auth.json gets a verdict, and a word from it cannot forge a log line", () => {
  const random = seeded(1);
  const odd = [null, 0, 1e308, "", "forged\n[codex_auth_refresh", [], {}, [[]], true, "odd-\ud800", "odd.not.jwt"];
  const pick = () => odd[Math.floor(random() * odd.length)];
  for (let round = 0; round < 2000; round++) {
    const change: Fields = { auth_mode: pick(), OPENAI_API_KEY: pick(), last_refresh: pick(), tokens: pick() };
    if (random() < 0.7) delete change.tokens;
    if (random() < 0.7) change.auth_mode = "chatgpt";
    assertMatch(verdict(change, { access_token: pick(), refresh_token: pick() }), /^(refresh|skip) [ -~]+$/);
  }
});

Deno.test("timestamps are RFC 3339 with up to nine digits, and without a zone they are UTC", () => {
  const good: [string, string][] = [
    ["2026-01-31T12:00:00Z", "2026-01-31T12:00:00.000Z"],
    ["2026-01-31T12:00:00", "2026-01-31T12:00:00.000Z"],
    ["2026-01-31t12:00:00z", "2026-01-31T12:00:00.000Z"],
    ["2026-01-31 12:00:00", "2026-01-31T12:00:00.000Z"],
    ["2026-01-31T12:00:00.5Z", "2026-01-31T12:00:00.500Z"],
    ["2026-01-31T12:00:00.123456789Z", "2026-01-31T12:00:00.123Z"],
    ["2026-01-31T12:00:00.123456", "2026-01-31T12:00:00.123Z"],
    ["2026-01-31T12:00:00+02:00", "2026-01-31T10:00:00.000Z"],
    ["2026-01-31T12:00:00.000000-05:30", "2026-01-31T17:30:00.000Z"],
    ["2024-02-29T00:00:00Z", "2024-02-29T00:00:00.000Z"],
  ];
  for (const [text, moment] of good) assertEquals(car.parseTimestamp(text), Date.parse(moment), text);
  const bad = ["", "now", "2026-01-31", "2026-02-30T12:00:00Z", "2026-13-01T12:00:00Z", "2026-01-31T25:00:00Z"];
  bad.push("1769860800", "2026-01-31T12:00:00.1234567890Z", "2026-01-31T12:00:00 UTC", "2026-01-31T12:00:00+0200");
  bad.push("2026-01-31  12:00:00Z", "2026-01-31_12:00:00Z", "2026-01-31T12:00:00 Z", " 2026-01-31T12:00:00Z");
  for (const text of bad) assertEquals(car.parseTimestamp(text), null, text);
});

Deno.test("a token's claims are read with and without padding, and whatever is no JWT has none", () => {
  const encode = (text: string | Uint8Array) => Buffer.from(text).toString("base64url");
  for (const claims of [{ exp: 1 }, { exp: 12, a: "ü" }, { exp: 123, "?": ">>>???" }]) {
    const payload = encode(JSON.stringify(claims));
    const padded = payload + "=".repeat((4 - payload.length % 4) % 4);
    for (const each of [payload, padded]) assertEquals(car.claimsOf(`h.${each}.s`), claims as Fields);
  }
  const bad = ["", "a", "a.b", "a.b.c", "..", `h.${encode("[1]")}.s`, `h.${encode("null")}.s`, "h.!!!.s", "h.\ud800.s"];
  bad.push(`h.${encode(new Uint8Array([...Buffer.from('{"a":"'), 0xff, ...Buffer.from('"}')]))}.s`);
  for (const text of bad) assertEquals(car.claimsOf(text), null, text);
});

Deno.test("JSON comes out as it went in, numbers to the letter", () => {
  const text = '{"a":1.0e2,"b":[12345678901234567890123,"1.10"],"c":-0.0,"d":1E400,"__proto__":{"e":1.10}}';
  assertEquals(JSON.stringify(car.parseExact(text)), text);
  assertEquals(JSON.stringify(car.parseExact('{"a":1,"b":2,"a":3.0}')), '{"a":3.0,"b":2}');
  assertEquals("e" in {}, false);
  const nested = (depth: number) => "[".repeat(depth) + "]".repeat(depth);
  assertEquals(JSON.stringify(car.parseExact(nested(127))), nested(127));
  assertThrows(() => car.parseExact(nested(128)), RangeError);
  for (const text of ["", "{", "{}x", "\ufeff{}", "01"]) assertThrows(() => car.parseExact(text), SyntaxError);
});

// ── post ─────────────────────────────────────────────────────────────────────────────────────────

const DEAD_CODES = [
  ...["refresh_token_expired", "refresh_token_reused", "refresh_token_invalidated", "invalid_grant"],
  ...["app_session_expired", "app_session_terminated", "invalid_refresh_token", "token_expired"],
];
const ID_TOKEN = jwt({ email: "user@example.com" });

Deno.test("every answer is judged by its status and its error code, wherever that stands", () => {
  const judge = (status: number, body: unknown) =>
    car.judge(status, typeof body === "string" ? body : JSON.stringify(body), null, NOW);
  const all = (statuses: number[], body: unknown, kind: car.Answer["kind"]) => {
    for (const status of statuses) assertEquals(judge(status, body).kind, kind, `${status} ${JSON.stringify(body)}`);
  };
  for (const code of DEAD_CODES) {
    const shout = code.toUpperCase();
    for (const body of [{ error: { code } }, { error: code }, { code }, { error: { code: null }, code: shout }]) {
      all([302, 400, 401, 403, 422, 499, 500, 503], body, "permanent");
      const answer = judge(400, body);
      assertEquals(answer.kind === "permanent" && answer.code, code);
    }
  }
  for (const body of ["", "<html>", "null", "[]", { error: "server_error" }, { error: { code: 5 } }, '{"code":']) {
    const answer = judge(401, body);
    assert(answer.kind === "permanent" && !DEAD_CODES.includes(answer.code ?? ""));
    all([300, 307, 400, 403, 404, 408, 429, 500, 599], body, "transient");
  }
  const useless = ["", "<!doctype html>", '{"access_token":"a', "null", "[]", '"a"', "5", {}, { access_token: "" }];
  for (const body of useless) all([200, 201, 204, 299], body, "useless");
  all([200, 201, 299], { id_token: ID_TOKEN, access_token: "an-access-token", scope: "x" }, "granted");
});

Deno.test("each token of an answer is judged by itself", () => {
  const rows: [Fields, string, string][] = [
    [{ id_token: ID_TOKEN, refresh_token: "rt_new" }, "id_token,refresh_token", ""],
    [{ refresh_token: "rt_new" }, "refresh_token", ""],
    [{ access_token: "an-access-token", id_token: null }, "access_token", ""],
    [{ id_token: "no.jwt", access_token: "", refresh_token: "rt_new" }, "refresh_token", "id_token,access_token"],
    [{ id_token: {}, access_token: [], refresh_token: "rt_new" }, "refresh_token", "id_token,access_token"],
    [{ id_token: "h.W10.s", access_token: "an-access-token" }, "access_token", "id_token"],
    [{ id_token: "h.!!!.s", access_token: "an-access-token" }, "access_token", "id_token"],
    [{ access_token: "alone-\ud800", refresh_token: 5, id_token: ID_TOKEN }, "id_token", "access_token,refresh_token"],
  ];
  for (const [fields, usable, unusable] of rows) {
    const answer = car.judge(200, JSON.stringify(fields), null, NOW);
    assert(answer.kind === "granted");
    assertEquals([Object.keys(answer.grant.tokens).join(), answer.unusable.join()], [usable, unusable]);
    assertEquals(Date.parse(answer.grant.lastRefresh), NOW);
  }
});

Deno.test("Retry-After is seconds or a date, and anything else is nothing", () => {
  const rows: [string | null, number | null][] = [[null, null], ["0", 0], ["120", 120_000], ["", null], ["soon", null]];
  rows.push([new Date(NOW + 90_000).toUTCString(), 90_000], [new Date(NOW - 90_000).toUTCString(), 0]);
  rows.push(["Sat Jan 31 12:01:30 2026", 90_000], ["1.5", null]);
  for (const [value, wait] of rows) assertEquals(car.parseRetryAfter(value, NOW), wait, String(value));
  const answer = car.judge(429, "", "7", NOW);
  assertEquals(answer.kind === "transient" && answer.retryAfterMs, 7000);
});

// ── apply ────────────────────────────────────────────────────────────────────────────────────────

Deno.test("a file is read as what it is, and what it holds of tokens is known to the log from then on", () => {
  const path = join(scratch, "read.json");
  const kind = (text: string | Uint8Array) => {
    fs.writeFileSync(path, text);
    const read = car.readAuth(path);
    return read.kind === "unreadable" ? `${read.error}${read.torn ? " torn" : ""}` : read.kind;
  };
  assertEquals(car.readAuth(join(path, "absent")), { kind: "absent" });
  const rows: [string | Uint8Array, string][] = [["", "empty"], ["{}", "whole"], ["{", "SyntaxError torn"]];
  rows.push(["[]", "TypeError torn"], ["\ufeff{}", "SyntaxError torn"], [
    new Uint8Array([123, 255, 125]),
    "TypeError torn",
  ]);
  for (const [text, expected] of rows) {
    assertEquals(kind(text).replace(/^ERR_\w+/, "TypeError"), expected, String(text));
  }
  assertEquals(car.readAuth(scratch), { kind: "unreadable", error: "EISDIR", torn: false });
  fs.writeFileSync(path, "");
  for (const [size, error, torn] of [[16 << 20, "SyntaxError", true], [(16 << 20) + 1, "EFBIG", false]] as const) {
    fs.truncateSync(path, size); // takes no room
    assertEquals(car.readAuth(path), { kind: "unreadable", error, torn });
  }
  const tokens = {
    id_token: jwt({ email: "read@example.com" }),
    access_token: "access-that-was-read",
    refresh_token: "rt_read",
  };
  assertEquals(kind(JSON.stringify({ tokens })), "whole");
  assertEquals(car.Secret.redact(`${tokens.id_token} ${tokens.access_token}`), "[redacted] [redacted]");
});

Deno.test("journals are told from other people's files, half replaced ones included", () => {
  const dir = join(scratch, "journals");
  fs.mkdirSync(dir);
  const [one, two, three] = ["0123456789abcdef", "fedcba9876543210", "00000000ffffffff"];
  const ours = [`.auth.json.${one}.tmp`, `.auth.json.${one}.tmp.new`, `.auth.json.${two}.tmp`];
  ours.push(`.auth.json.${three}.tmp.new`);
  const others = ["auth.json", `.auth.json.${one}`, `.auth.json.${one}0.tmp`, `.x.${one}.tmp`, ".auth.json.tmp"];
  others.push(`.auth.json.${one}.tmp.news`, `.auth.json.${one.toUpperCase()}.tmp`, `auth.json.${one}.tmp`);
  for (const name of [...ours, ...others]) fs.writeFileSync(join(dir, name), "");
  assertEquals(car.findJournals(join(dir, "auth.json")).sort(), [three, one, two]);
  assertEquals(car.findJournals(join(dir, "absent", "auth.json")), []);
});

Deno.test("an answer goes where the token lies that it was given for, or nothing whole, and nowhere else", () => {
  const [sent, given, other] = ["rt_that-was-sent", "rt_that-was-given", "rt_of-somebody-else"];
  const document = (refresh_token: string | null, last_refresh: string | null, more: Fields = {}): Fields => (
    { ...more, tokens: { access_token: `access_${refresh_token}`, refresh_token }, last_refresh }
  );
  const whole = (of: Fields, text = JSON.stringify(of)): car.Read => (
    { kind: "whole", text, document: car.parseExact(text) as Fields }
  );
  const [earlier, later] = ["2026-01-31T11:00:00Z", "2026-01-31T11:30:00Z"];
  const shown = (of: Fields) => JSON.stringify(of, null, 2);
  const rotated = document(given, later, { of: "the answer" });
  const same = { ...document(sent, later), tokens: { access_token: "access_new", refresh_token: sent } };
  const apiKey: car.Read = whole({ auth_mode: "apikey", OPENAI_API_KEY: "sk" });
  const odd = '{ "n": 1.0e2, "tokens": {"refresh_token": "rt_that-was-given"} }\n';

  const rows: [what: string, seen: car.Read, answer: Fields, wanted: string | null][] = [
    ["the token that was sent", whole(document(sent, earlier)), rotated, shown(document(given, later))],
    ["it, and other fields", whole(document(sent, null, { x: 1 })), rotated, shown(document(given, later, { x: 1 }))],
    ["nothing", { kind: "empty" }, rotated, shown(rotated)],
    ["half of something", { kind: "unreadable", error: "SyntaxError", torn: true }, rotated, shown(rotated)],
    ["the answer's token", whole({}, odd), rotated, odd],
    ["another token", whole(document(other, earlier)), rotated, null],
    ["no token", whole(document(null, earlier)), rotated, null],
    ["another kind of login", apiKey, rotated, null],
    ["it is gone", { kind: "absent" }, rotated, null],
    ["it cannot be read", { kind: "unreadable", error: "EIO", torn: false }, rotated, null],
    // An endpoint that leaves the refresh token as it is.
    ["the token, sent and given", whole(document(sent, earlier)), same, shown(same)],
    ["done before", whole(same), same, shown(same)],
    ["refreshed since", whole(document(sent, "2026-01-31T11:30:01Z")), same, null],
    ["a moment to come, so none", whole(document(sent, "2026-01-31T12:06:00Z")), same, shown(same)],
    ["no moment", whole(document(sent, null)), same, shown(same)],
  ];
  for (const [what, seen, answer, wanted] of rows) {
    assertEquals(car.merge(seen, answer, fingerprint(sent), NOW), wanted, what);
  }
  const exact = whole({}, `{"n":1.0e2,"tokens":{"refresh_token":"${sent}","account_id":12345678901234567890}}`);
  assertEquals(JSON.parse(car.merge(exact, rotated, fingerprint(sent), NOW) ?? "").tokens.refresh_token, given);
  assertMatch(car.merge(exact, rotated, fingerprint(sent), NOW) ?? "", /"n": 1\.0e2,[^]*12345678901234567890/);
});

// ── status ───────────────────────────────────────────────────────────────────────────────────────

Deno.test("a field of the status file that is missing or of the wrong type is as if never written", () => {
  const path = join(scratch, "status.json");
  const blank = car.readStatus(path);
  assertEquals([blank.last_refresh, blank.last_refresh_age_seconds, blank.consecutive_failures], ["", -1, 0]);
  assertEquals([blank.detail, blank.next_run_iso, blank.last_success_iso], [null, null, null]);
  const odd = {
    last_refresh: 5,
    last_refresh_age_seconds: "1",
    consecutive_failures: 1.5,
    detail: {},
    next_run_iso: 1,
  };
  for (const text of ["", "{", "[]", "null", "5", JSON.stringify(odd)]) {
    fs.writeFileSync(path, text);
    assertEquals(car.readStatus(path), blank, text);
  }
  fs.writeFileSync(path, JSON.stringify({ ...odd, detail: "kept", consecutive_failures: 4, runs_total: -1, more: 1 }));
  assertEquals(car.readStatus(path), { ...blank, detail: "kept", consecutive_failures: 4 });
  fs.writeFileSync(path, JSON.stringify({ detail: "\x1b[2Jno\nescapes" }));
  assertEquals(car.readStatus(path).detail, "?[2Jno?escapes");
});

/** How a home stands: a login with these tokens, last refreshed so long ago, and what the status file says. */
function viewOf(status: Partial<car.Status>, tokens: Fields = {}, change: Fields = {}, odd: string[] = []): car.View {
  const document = {
    auth_mode: "chatgpt",
    tokens: { access_token: expiring(2 * DAY), refresh_token: "rt_view", ...tokens },
    last_refresh: ago(5 * DAY),
    ...change,
  };
  const settings = car.readSettings({});
  const whole = { ...car.readStatus(join(scratch, "none")), ...status };
  return car.view("/x", { kind: "whole", text: "", document }, whole, odd, NOW, settings);
}

Deno.test("a home is unhealthy for a dead login, an expired token, an unreadable file or a watchdog that is down", () => {
  const ran = (seconds: number, more: Partial<car.Status> = {}): Partial<car.Status> => ({
    watchdog_last_outcome: "skip",
    watchdog_last_run_iso: ago(seconds),
    next_run_iso: ago(seconds - 21600),
    ...more,
  });
  const dead = { rejected_refresh_token_sha256: new car.Secret("rt_view").fingerprint() };
  const permanent = { watchdog_last_outcome: "fail:permanent_401", detail: "refresh_token_reused" } as const;
  const failed = { watchdog_last_outcome: "fail:transient_503", detail: "busy" } as const;
  const login = "log in again: CODEX_HOME=/x codex login (with --device-auth where there is no browser)";
  const refused = "the endpoint refused the login (fail:permanent_401, refresh_token_reused)";
  const buried = "the login is dead, the endpoint refuses its refresh token";
  const expired = { access_token: expiring(-7200) };
  const key = { auth_mode: "apikey" };
  const rows: [car.View, car.View["state"], string, string | null][] = [
    [viewOf(ran(60)), "healthy", "fresh", null],
    [
      viewOf(ran(60, failed)),
      "healthy",
      "the last run failed (fail:transient_503), the access token is still good",
      null,
    ],
    [viewOf({}), "healthy", "fresh", "start the watchdog, it has never run here"],
    [viewOf(ran(60, permanent)), "unhealthy", refused, login],
    [
      viewOf(ran(60, { ...permanent, detail: null })),
      "unhealthy",
      "the endpoint refused the login (fail:permanent_401, no code)",
      login,
    ],
    // A login that is newer than the failure has nothing to do with it.
    [viewOf(ran(60, permanent), {}, { last_refresh: ago(30) }), "healthy", "fresh", null],
    [viewOf(ran(60, dead)), "unhealthy", buried, login],
    [
      viewOf(ran(60, { ...permanent, ...dead })),
      "unhealthy",
      `${buried} (fail:permanent_401, refresh_token_reused)`,
      login,
    ],
    [viewOf(ran(60, { ...failed, ...dead })), "unhealthy", buried, login],
    // Nor has one that no run has seen yet, however old it is.
    [viewOf(ran(60, { ...permanent, rejected_refresh_token_sha256: "0".repeat(16) })), "healthy", "fresh", null],
    [
      viewOf(ran(60, failed), expired),
      "unhealthy",
      "the access token expired 2 h ago, and the last run failed (fail:transient_503)",
      null,
    ],
    [viewOf({}, expired), "unhealthy", "the access token expired 2 h ago", "start the watchdog, it has never run here"],
    [
      viewOf(ran(21600 + 301)),
      "unhealthy",
      "the watchdog last ran 6 h 5 min ago and is overdue",
      "start the watchdog, it is down or stuck",
    ],
    [viewOf(ran(21600 + 299)), "healthy", "fresh", null],
    // Where the next run is far away by plan, nothing is down.
    [viewOf(ran(DAY, { next_run_iso: ago(-DAY) })), "healthy", "fresh", null],
    [
      viewOf(ran(2 * 21600 + 1, { next_run_iso: null })),
      "healthy",
      "fresh",
      "start the watchdog, it last ran 12 h ago",
    ],
    [viewOf(ran(30 * DAY), {}, key), "inert", "no ChatGPT login, so nothing to keep alive (auth_mode=apikey)", null],
    [viewOf(ran(60), { refresh_token: "" }), "inert", "no refresh token, so nothing to keep alive", null],
  ];
  for (const [view, ...expected] of rows) assertEquals([view.state, view.reason, view.advice], expected, view.reason);
  const look = (read: car.Read) =>
    car.view("/x", read, car.readStatus(join(scratch, "none")), [], NOW, car.readSettings({}));
  assertEquals([look({ kind: "absent" }).state, look({ kind: "empty" }).reason], ["inert", "no login yet"]);
  const unreadable = { kind: "unreadable", torn: false } as const;
  assertEquals(look({ ...unreadable, error: "EACCES" }).advice, "make it readable for this user, or run as its owner");
  const { state, reason, advice } = look({ ...unreadable, error: "SyntaxError" });
  assertEquals([state, reason, advice], [
    "unhealthy",
    "auth.json holds no JSON, or begins with a byte order mark (unreadable:SyntaxError)",
    login,
  ]);
});

Deno.test("a view tells what the tokens say, and warns of a login that is not looked after", () => {
  const account = { chatgpt_plan_type: "pro", chatgpt_account_id: "acc-1" };
  const id_token = jwt({ email: "user@example.com", "https://api.openai.com/auth": account });
  const access_token = jwt({ iat: NOW / 1000 - DAY, exp: NOW / 1000 + 3 * DAY });
  const view = viewOf({}, { id_token, access_token });
  assertEquals([view.plan, view.account_id, view.last_refresh], ["pro", "acc-1", ago(5 * DAY)]);
  assertEquals([view.access_token_remaining_seconds, view.access_token_lifetime_seconds], [3 * DAY, 4 * DAY]);
  assertEquals([view.last_refresh_age_seconds, view.warnings, "email" in view], [5 * DAY, [], false]);
  assertMatch(viewOf({}, {}, {}, ["an oddity"]).warnings.join(), /an oddity/);
  assertMatch(
    viewOf({}, {}, { auth_mode: "apikey" }).warnings.join(),
    /auth_mode=apikey, so the refresh token is not used/,
  );
});

Deno.test("a configuration that keeps logins elsewhere is told of, the managed one before all", () => {
  const [dir, etc] = [join(scratch, "store"), join(scratch, "etc")];
  const files = [join(etc, "managed_config.toml"), join(dir, "config.toml"), join(etc, "config.toml")];
  const rows: [texts: (string | null)[], auth: boolean, says: RegExp | null][] = [
    [[null, null, null], true, null],
    [
      [null, "", 'cli_auth_credentials_store = "keyring"'],
      true,
      /^the machine's config\.toml keeps logins in "keyring"/,
    ],
    [[null, 'cli_auth_credentials_store = "file"', 'cli_auth_credentials_store = "keyring"'], true, null],
    [
      ['cli_auth_credentials_store = "ephemeral"', 'cli_auth_credentials_store = "file"', null],
      true,
      /^the managed configuration .*"ephemeral"/,
    ],
    [[null, "'cli_auth_credentials_store' = 'auto' # x", null], true, null],
    [[null, 'cli_auth_credentials_store = "auto"', null], false, /"auto": the login may be in the system's keyring/],
    [[null, "[x]\ncli_auth_credentials_store = 'keyring'", null], true, null],
    [[null, 'a = """\ncli_auth_credentials_store = "keyring"\n"""', null], true, null],
    [[null, "cli_auth_credentials_store = 5", null], true, /keeps logins in "\?"/],
    [[null, "cli_auth_credentials_store = ", null], true, /^config\.toml is no TOML/],
  ];
  for (const [texts, auth, says] of rows) {
    for (const each of [dir, etc]) fs.rmSync(each, { recursive: true, force: true }), fs.mkdirSync(each);
    texts.forEach((text, index) => text !== null && fs.writeFileSync(files[index] ?? "", text));
    if (auth) fs.writeFileSync(join(dir, "auth.json"), "{}");
    const told = car.oddities({ dir, status: "" }, etc);
    assertEquals(told.length, says === null ? 0 : 1, `${texts}: ${told}`);
    if (says !== null) assertMatch(told[0] ?? "", says);
  }
});

Deno.test("an auth.json in which today's Codex CLI would lose a login is told of", async () => {
  const dir = join(scratch, "hard_linked");
  fs.mkdirSync(dir);
  const told = () => car.oddities({ dir, status: "" }, join(scratch, "none"));
  fs.writeFileSync(join(dir, "auth.json"), "{}");
  assertEquals(await told(), []);
  fs.linkSync(join(dir, "auth.json"), join(dir, "second"));
  assertMatch((await told()).join(), /^auth\.json has a second hard link, where .* loses the login: remove the link$/);
});

Deno.test("metrics are Prometheus text, with a home's name however odd", () => {
  const views = [viewOf({ watchdog_last_outcome: "skip", runs_total: 7 }), { ...viewOf({}), home: 'a"b\\c\nd' }];
  const text = car.showMetrics(views);
  for (const line of text.trimEnd().split("\n")) {
    assertMatch(line, /^(# (HELP|TYPE) codex_auth_refresh_\w+ .+|codex_auth_refresh_\w+\{home="[^\n]*"\} -?[\d.e+]+)$/);
  }
  for (
    const line of [
      'codex_auth_refresh_healthy{home="/x"} 1',
      'codex_auth_refresh_healthy{home="a\\"b\\\\c\\nd"} 1',
      'codex_auth_refresh_runs_total{home="/x"} 7',
      'codex_auth_refresh_last_outcome{home="/x",outcome="skip"} 1',
      `codex_auth_refresh_access_token_expiry_timestamp_seconds{home="/x"} ${NOW / 1000 + 2 * DAY}`,
    ]
  ) assert(text.split("\n").includes(line), `no ${line} in ${text}`);
  for (const name of new Set(text.match(/^codex_\w+/gm))) {
    const type = name.endsWith("_total") ? "counter" : "gauge";
    assertEquals([...text.matchAll(new RegExp(`^# (HELP|TYPE) ${name} `, "gm"))].length, 2);
    assert(text.includes(`# TYPE ${name} ${type}\n`), name);
  }
});

// ── attempt ──────────────────────────────────────────────────────────────────────────────────────

Deno.test("outcomes have their exit codes, and of several homes the worst one counts", () => {
  const all: car.Outcome[] = ["refreshed", "skip", "skip:no_auth_json", "superseded", "fail:preflight", "fail:store"];
  all.push("fail:apply_response", "fail:locked", "fail:transient_000", "fail:permanent_400", "fail:permanent_401");
  assertEquals<number[]>(all.map(car.exitCode), [0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]);
  const several: [number[], number][] = [[[0, 1, 2, 3], 3], [[0, 2, 1], 2], [[1, 0, 1], 0], [[1, 1], 1], [[0], 0]];
  for (const [all, worst] of several) assertEquals(car.worstExit(all), worst);
});

// ── loop ─────────────────────────────────────────────────────────────────────────────────────────

/** Seconds until the next look. Expiry, age and Retry-After are in seconds, failures are in a row. */
function wait(
  outcome: car.Known["outcome"],
  more: { exp?: number; age?: number; failures?: number; after?: number; due?: boolean; random?: number } = {},
  settings: Partial<typeof SETTINGS> = {},
): number {
  const { exp, age, failures = 0, after, due = false, random = 0 } = more;
  const credential = {
    expiresMs: exp === undefined ? null : NOW + exp * 1000,
    lastRefreshMs: age === undefined ? null : NOW - age * 1000,
  };
  const known = { outcome, due, credential, failures, retryAfterMs: after === undefined ? null : after * 1000 };
  const { at, why } = car.schedule(known, { ...SETTINGS, ...settings }, NOW, random);
  assert(why !== "");
  return (at - NOW) / 1000;
}
const LATEST = 1 - 2 ** -53;
const assertNear = (actual: number, expected: number) =>
  assert(Math.abs(actual - expected) < 0.01, `${actual} is not ${expected}`);

Deno.test("the next look is at the interval, at the margin or when last_refresh gets stale, whichever is first", () => {
  const month = 30 * DAY;
  assertNear(wait("skip", { exp: 10 * DAY, age: 60 }), 21600);
  assertNear(wait("skip", { exp: 10 * DAY, age: 60 }, { intervalSeconds: 3600 }), 3600);
  assertNear(wait("skip", { exp: 14460, age: 60 }), 60);
  assertNear(wait("skip", { exp: 10 * DAY, age: 604710 }), 90);
  assertNear(wait("skip", { exp: 14600, age: 604700 }), 100);
  assertNear(wait("skip"), 21600);
  assertNear(wait("refreshed", { exp: 10 * DAY, age: 0 }), 21600);
  assertNear(wait("skip:no_auth_json"), 21600);
  assertNear(wait("skip", { exp: 100 * DAY }, { intervalSeconds: month }), month);
  assertNear(wait("fail:permanent_401", { exp: -5 }, { intervalSeconds: month }), month);
});

Deno.test("a planned wait carries a jitter of up to a tenth, never past the middle of the margin", () => {
  for (const random of [0.1, 0.5, LATEST]) {
    assertNear(wait("skip", { exp: 10 * DAY, age: 60, random }), 21600 * (1 + random / 10));
    assertNear(wait("skip", { exp: 10 * DAY, age: 604700, random }), 100 * (1 + random / 10));
    assertNear(wait("fail:permanent_400", { exp: -9, random }), 21600 * (1 + random / 10));
    assertNear(wait("skip:no_auth_json", { random }), 21600 * (1 + random / 10));
    assertNear(wait("skip", { exp: 1000, age: 60, random }, { marginSeconds: 10 }), Math.min(995, 990 + 99 * random));
  }
});

Deno.test("tokens that live for less than the margin do not make it spin", () => {
  for (const random of [0, 0.5, LATEST]) {
    const next = wait("refreshed", { exp: HOUR, age: 0, random });
    assertNear(next, HOUR / 2 * (1 + random / 10));
    assert(wait("refreshed", { exp: 4, age: 0, random }) >= 60);
    assert(wait("refreshed", { exp: -60, age: 0, random }) >= 60);
    assert(wait("refreshed", { exp: 2, age: 0, random }, { intervalSeconds: 1, marginSeconds: 0 }) >= 1);
    assert(wait("refreshed", { exp: 10 * DAY, age: 604805, random }) >= 60);
  }
});

Deno.test("a transient failure backs off from 5 s, twice as long each time, up to the interval and half of it", () => {
  for (const random of [0, 0.5, LATEST]) {
    for (let failures = 1; failures < 80; failures++) {
      const bare = Math.min(21600, 5 * 2 ** (failures - 1));
      assertNear(wait("fail:transient_503", { exp: -5, failures, random }), bare * (1 + random / 2));
    }
    assertNear(wait("fail:store", { failures: 1, random }, { intervalSeconds: 2 }), 2 * (1 + random / 2));
    for (const outcome of ["fail:preflight", "fail:locked", "fail:apply_response", "fail:transient_000"] as const) {
      assertNear(wait(outcome, { exp: HOUR, failures: 3, random }), 20 * (1 + random / 2));
    }
  }
});

Deno.test("a file that the disk does not let us read is tried again like a failure", () => {
  for (const random of [0, LATEST]) {
    assertNear(wait("unreadable", { failures: 1, random }), 5 * (1 + random / 2));
    assertNear(wait("unreadable", { failures: 30, random }), 21600 * (1 + random / 2));
  }
});

Deno.test("a login that somebody else has just refreshed is not spent before half of its life, or the interval", () => {
  for (const outcome of ["changed", "superseded"] as const) {
    assertNear(wait(outcome, { exp: HOUR - 60, age: 60, due: true }), HOUR / 2 - 60);
    assertNear(wait(outcome, { exp: 30 * DAY, age: 60, due: true }), 21600);
    assert(wait(outcome, { exp: HOUR, age: 2 * HOUR, due: true, random: LATEST }) <= 60);
    assertNear(wait(outcome, { exp: -60, age: HOUR, due: true }), 0);
  }
  assertNear(wait("changed", { exp: 10 * DAY, age: 60 }), 0);
});

Deno.test("Retry-After is obeyed within the interval", () => {
  for (const random of [0, LATEST]) {
    const rows: [number, number, number][] = [[1, 3600, 3600], [9, 1, 1280], [1, 10 * DAY, 21600], [
      1,
      Infinity,
      21600,
    ]];
    for (const [failures, after, bare] of rows) {
      assertNear(wait("fail:transient_429", { failures, after, random }), bare * (1 + random / 2));
    }
  }
});

Deno.test("a start on a token that is due but good is spread over a minute, on any other it is at once", () => {
  for (const random of [0, 0.5, LATEST]) {
    assertNear(wait("start", { exp: HOUR, age: 60, due: true, random }), 60 * random);
    assertNear(wait("start", { exp: -1, due: true, random }), 0);
    assertNear(wait("start", { due: true, random }), 0);
    assertNear(wait("start", { exp: 10 * DAY, age: 60, random }), 0);
    assert(wait("start", { exp: 10, due: true, random }) <= 10);
  }
});

Deno.test("the next look is never in the past, past the expiry or later than the interval allows", () => {
  const random = seeded(7);
  const outcomes: car.Outcome[] = ["refreshed", "skip", "skip:no_auth_json", "superseded", "fail:preflight"];
  outcomes.push("fail:transient_500", "fail:permanent_401", "fail:store", "fail:locked");
  const maybe = (size: number) => random() < 0.2 ? undefined : Math.round((random() - 0.3) * 10 ** (random() * size));
  for (let round = 0; round < 20_000; round++) {
    const outcome = outcomes[round % outcomes.length] ?? "skip";
    const [exp, age, after] = [maybe(7), maybe(7), maybe(6)];
    const [intervalSeconds, marginSeconds] = [Math.ceil(10 ** (random() * 6.5)), Math.floor(10 ** (random() * 5))];
    const more = { exp, age, after, failures: Math.ceil(random() * 99), random: random() };
    const next = wait(outcome, more, { intervalSeconds, marginSeconds });
    const longest = Math.max(intervalSeconds * 1.5, outcome === "refreshed" ? exp ?? 0 : 0);
    const told = `${outcome} ${next} ${JSON.stringify(more)}`;
    assert(next >= 0 && next < longest + 0.01, told);
    if (outcome === "refreshed") assert(next >= Math.min(60, intervalSeconds), told);
    const good = outcome === "skip" && (exp ?? 0) > marginSeconds && (age ?? 0) < SETTINGS.staleSeconds;
    if (good || outcome === "refreshed" && (exp ?? 0) > 60) assert(next <= (exp ?? 0), told);
  }
});

Deno.test("durations are told in the two largest units", () => {
  const rows: [number, string][] = [[0, "0 s"], [-5, "0 s"], [59.4, "59 s"], [61, "1 min 1 s"], [3599, "59 min 59 s"]];
  rows.push([3660, "1 h 1 min"], [21480, "5 h 58 min"], [30 * DAY + 7200, "30 d 2 h"]);
  for (const [seconds, text] of rows) assertEquals(car.humanize(seconds * 1000), text);
});

const RARE = { CODEX_AUTH_REFRESH_INTERVAL_SECONDS: "2592000", CODEX_AUTH_STALE_AFTER_SECONDS: "31536000" };

/** The loop on some homes in this process, whose clock is set forward by one of its steps with each call of `step`. */
class Loop {
  readonly lines: string[] = [];
  readonly homes: { dir: string; auth: string; login: ReturnType<Mock["login"]> }[];
  onLine: (line: string) => void = () => {};
  hangUp = () => {};
  /** How long it has been going to sleep, in milliseconds, the last time. */
  nap = 0;

  constructor(readonly mock: Mock, name: string, ...expiries: number[]) {
    this.homes = expiries.map((accessTokenSeconds, index) => {
      const dir = join(scratch, `${name}${index}`);
      const login = mock.login({ accessTokenSeconds });
      fs.mkdirSync(dir);
      fs.writeFileSync(join(dir, "auth.json"), authJson(login));
      return { dir, auth: join(dir, "auth.json"), login };
    });
  }
  count = (index: number, pattern: RegExp) =>
    this.lines.filter((line) => line.startsWith(`${index} `) && pattern.test(line.slice(2))).length;
  said = (index: number, pattern: RegExp, times = 1) =>
    until(`${pattern} ${times} times in\n${this.lines.join("\n")}`, () => this.count(index, pattern) >= times);

  async run(act: (step: () => void) => Promise<void>): Promise<void> {
    const sleepers = new Set<() => void>();
    let passed = 0;
    const clock: car.Clock = {
      now: () => Date.now() + passed,
      uptime: () => performance.now() + passed,
      random: () => 0.5,
      sleep: (milliseconds, signal = new AbortController().signal) => {
        const woken = new AbortController();
        if (milliseconds > 1000) sleepers.add(() => woken.abort());
        if (milliseconds > 0) this.nap = milliseconds;
        return car.CLOCK.sleep(milliseconds, AbortSignal.any([signal, woken.signal]));
      },
    };
    const stop = new AbortController();
    try {
      const settings = car.readSettings({ ...RARE, [URL_NAME]: this.mock.url });
      const homes = await car.readHomes(this.homes.map(({ dir }) => dir), {});
      const logOf = (home: car.Home): car.Log => (_level, _event, text) => {
        this.lines.push(`${homes.indexOf(home)} ${text}`);
        this.onLine(text);
      };
      const looped = car.loop(homes, settings, logOf, stop.signal, (look) => this.hangUp = look, clock);
      await act(() => {
        passed += 46_000;
        sleepers.forEach((wake) => wake());
        sleepers.clear();
      });
      stop.abort();
      await looped;
    } finally {
      stop.abort();
      await this.mock.close();
    }
  }
}

Deno.test("a plan is in the status file at the start, and a touch changes none while the token is not accepted", async () => {
  const mock = await startMockServer();
  const loop = new Loop(mock, "touched", HOUR, 300 * DAY);
  const [refused, other] = loop.homes;
  assert(refused && other);
  mock.next({ kind: "retry_after", value: "999999" });
  await loop.run(async (step) => {
    await loop.said(0, /^next check in 30 s \(spread\)$/);
    await loop.said(1, /^next check/);
    const { next_run_iso, runs_total } = car.readStatus(join(refused.dir, STATUS_NAME));
    const wait = Date.parse(String(next_run_iso)) - Date.now();
    assert(runs_total === 0 && wait > 0 && wait <= 30_000, `${wait}`);
    step();
    await loop.said(0, /^next check in 1\d d .*\(the endpoint asked to wait\)$/);
    fs.utimesSync(refused.auth, 0, 0);
    fs.writeFileSync(other.auth, authJson(mock.login({ accessTokenSeconds: 300 * DAY })));
    step();
    await loop.said(1, /^no-op: fresh/, 2); // homes are looked at in turn
    assertEquals([loop.count(0, /^next check/), mock.requests.length], [2, 1]);
    fs.writeFileSync(refused.auth, authJson(mock.login({ accessTokenSeconds: -HOUR })));
    step();
    await loop.said(0, /^refresh: ok /);
  });
});

Deno.test("a login that is written in the last moment of an attempt is noticed at the next step", async () => {
  const mock = await startMockServer();
  const loop = new Loop(mock, "last", 300 * DAY);
  const login = mock.login({ accessTokenSeconds: -HOUR });
  loop.onLine = (line) => {
    if (!line.startsWith("next check")) return;
    fs.writeFileSync(loop.homes[0]?.auth ?? "", authJson(login));
    loop.onLine = () => {};
  };
  await loop.run(async (step) => {
    await loop.said(0, /^next check/);
    step();
    await loop.said(0, /^refresh: ok /);
    assertEquals(mock.redeemed(login.refresh_token), 1);
  });
});

Deno.test("a look once a minute does not put off what is planned before the next one", async () => {
  const loop = new Loop(await startMockServer(), "planned", 14_400 + 60);
  await loop.run(async (step) => {
    await loop.said(0, /^next check in 1 min/);
    step();
    await until("it sleeps until the plan", () => loop.nap < 20_000);
  });
});

Deno.test("a SIGHUP while a request is out makes one further look", async () => {
  const mock = await startMockServer();
  const loop = new Loop(mock, "hung_up", -HOUR);
  mock.onRequest = () => loop.hangUp();
  await loop.run(async (step) => {
    await loop.said(0, /^next check/, 2);
    step();
    const told = loop.lines.map((line) => line.slice(2).replace(/ (\(|in |exp_in).*/, ""));
    assertEquals(told, ["refresh: starting", "refresh: ok", "next check", "no-op: fresh", "next check"]);
  });
});

// ── the whole program ────────────────────────────────────────────────────────────────────────────

const given = (name: string): string => {
  const value = Deno.env.get(name);
  if (value) return value;
  throw new Error(`${name} is not set: start these tests with make test, which builds what they drive`);
};
const [DENO, BUN, NODE, BUNDLE, EXE] = ["DENO", "BUN", "NODE", "BUNDLE", "EXE"].map((name) => given(`CAR_${name}`)) as [
  string,
  ...string[],
];
const SOURCE = join(import.meta.dirname ?? ".", "refresh.ts");
const ALLOWED = ["--allow-read", "--allow-write", "--allow-env", "--allow-net", "--allow-sys=uid", "--allow-run"];
const FORMS: Record<string, string[]> = {
  source: [DENO, "run", "--no-prompt", ...ALLOWED, SOURCE],
  bundle: [String(BUN), String(BUNDLE)],
  node: [String(NODE), String(BUNDLE)],
  executable: [String(EXE)],
};
const { denoDir } = JSON.parse(output(DENO, "info", "--json")) as { denoDir: string };
/** All that the program finds in its environment beside what a scenario sets. */
const SPARE = { PATH: Deno.env.get("PATH") ?? "", DENO_DIR: denoDir, DENO_NO_UPDATE_CHECK: "1" };

const fingerprint = (token: string) => createHash("sha256").update(token).digest("hex").slice(0, 16);

/** What a helper program prints. */
function output(program: string, ...args: string[]): string {
  const { success, stdout, stderr } = new Deno.Command(program, { args }).outputSync();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  if (!success) throw new Error(`${program} ${args.join(" ")}: ${text(stderr)}`);
  return text(stdout);
}

/** Whether there is such a program, and it succeeds. */
function works(program: string, ...args: string[]): boolean {
  try {
    output(program, ...args);
    return true;
  } catch {
    return false;
  }
}

/** Waits for a condition, and for no longer than it may take. */
async function until(what: string, holds: () => boolean, seconds = 40): Promise<void> {
  for (const end = Date.now() + seconds * 1000; !holds(); await sleep(10)) {
    if (Date.now() > end) throw new Error(`not within ${seconds} s: ${what}`);
  }
}

/** A started program. */
class Run {
  stdout = "";
  stderr = "";
  /** The exit code, or the signal that killed it. */
  readonly ended: Promise<number | Deno.Signal>;
  readonly #child: Deno.ChildProcess;

  constructor(readonly command: string[], cwd: string, env: Record<string, string>) {
    const [program = "", ...args] = command;
    const streams = { stdin: "null", stdout: "piped", stderr: "piped", clearEnv: true } as const;
    const child = this.#child = new Deno.Command(program, { args, cwd, env, ...streams }).spawn();
    const drain = async (stream: ReadableStream<Uint8Array>, add: (text: string) => void) => {
      for await (const text of stream.pipeThrough(new TextDecoderStream())) add(text);
    };
    const limit = setTimeout(() => this.kill("SIGKILL"), 60_000);
    const out = drain(child.stdout, (text) => this.stdout += text);
    const log = drain(child.stderr, (text) => this.stderr += text);
    const ended = Promise.all([child.status, out, log]).finally(() => clearTimeout(limit));
    this.ended = ended.then(([{ code, signal }]) => signal ?? code);
  }
  get pid(): number {
    return this.#child.pid;
  }
  kill(signal: Deno.Signal): void {
    try {
      this.#child.kill(signal);
    } catch {
      // Ended already.
    }
  }
  get lines(): string[] {
    return this.stderr.split("\n").slice(0, -1);
  }
  /** The lines of the log without their time stamps. */
  get messages(): string[] {
    return this.lines.map((line) => line.replace(PREFIX, ""));
  }
  says(pattern: string | RegExp): boolean {
    return typeof pattern === "string" ? this.messages.includes(pattern) : this.count(pattern) > 0;
  }
  count = (pattern: RegExp): number => this.messages.filter((line) => pattern.test(line)).length;
  said = (pattern: RegExp, times = 1): Promise<void> => until(String(pattern), () => this.count(pattern) >= times);
}

interface Scenario {
  /** What a user may rely on, as a sentence. */
  name: string;
  /** The access token's expiry and the login's age, in seconds: by default an hour gone, and nine days. */
  expires?: number;
  age?: number;
  /** Changes auth.json before it is written; `file` is another text altogether, null is none. */
  edit?: (document: Fields & { tokens: Fields }) => void;
  file?: string | Uint8Array | null;
  prepare?: (stage: Stage) => void | Promise<void>;
  mock?: MockOptions;
  answers?: Behaviour[];
  env?: Record<string, string>;
  args?: string[];
  /** What one run of the program must come to; with `run` the scenario sees to all of it. */
  exit?: number;
  outcome?: string;
  detail?: string | null;
  says?: (string | RegExp)[];
  requests?: number;
  after?: (stage: Stage, run: Run) => void | Promise<void>;
  run?: (stage: Stage) => Promise<void>;
  forms?: string[];
  skip?: boolean;
}

/** A scratch home with a login, a token endpoint, and the program in one of its forms. */
class Stage {
  readonly home: string;
  readonly auth: string;
  readonly login: ReturnType<Mock["login"]>;
  readonly env: Record<string, string>;
  readonly runs: Run[] = [];
  readonly secrets: string[] = [];

  constructor(
    readonly dir: string,
    readonly form: string,
    readonly mock: Mock,
    { expires = -HOUR, age = 9 * DAY, edit, file, env, answers = [] }: Scenario,
  ) {
    this.home = join(dir, "home");
    this.auth = join(this.home, "auth.json");
    fs.mkdirSync(this.home);
    this.login = mock.login({ accessTokenSeconds: expires });
    const document = JSON.parse(authJson(this.login, new Date(Date.now() - age * 1000))) as Fields & { tokens: Fields };
    edit?.(document);
    this.secrets.push(...[document.tokens.access_token, document.tokens.refresh_token].map(String));
    if (file !== null) fs.writeFileSync(this.auth, file ?? JSON.stringify(document, null, 2) + "\n", { mode: 0o600 });
    this.env = { ...SPARE, HOME: dir, CODEX_HOME: this.home, [URL_NAME]: mock.url, ...env };
    mock.next(...answers);
    for (const answer of answers) {
      if (answer.kind === "fields") this.secrets.push(...Object.values(answer.fields).map(String));
    }
  }
  start(...args: string[]): Run {
    return this.spawn([...FORMS[this.form] ?? [], ...args]);
  }
  spawn(command: string[], env: Record<string, string> = {}): Run {
    const run = new Run(command, this.dir, { ...this.env, ...env });
    this.runs.push(run);
    return run;
  }
  text(path = this.auth): string | null {
    return fs.statSync(path, { throwIfNoEntry: false })?.isFile() ? fs.readFileSync(path, "utf8") : null;
  }
  tokens = (path = this.auth): Fields => (JSON.parse(this.text(path) ?? "{}") as { tokens: Fields }).tokens;
  status(home = this.home): Fields {
    return JSON.parse(this.text(join(home, STATUS_NAME)) ?? "null");
  }
  /** Whether auth.json holds the newest refresh token that the endpoint issued for this login. */
  isNewest = (path = this.auth): boolean => {
    const newest = this.mock.newest(this.login.refresh_token);
    return newest !== this.login.refresh_token && this.tokens(path).refresh_token === newest;
  };
  /** Another home beside the first one, with a login of its own. */
  plant(name: string, expires = -HOUR, age = 9 * DAY) {
    const home = join(this.dir, name);
    const auth = join(home, "auth.json");
    const login = this.mock.login({ accessTokenSeconds: expires });
    fs.mkdirSync(home, { recursive: true });
    fs.writeFileSync(auth, authJson(login, new Date(Date.now() - age * 1000)), { mode: 0o600 });
    return { home, auth, login };
  }
  /** A journal, as a run leaves it that is killed between the answer and the end of its storing. */
  leave(text: (tokens: Fields) => string, sent = this.login.refresh_token, replaced = ""): Fields {
    const tokens = { ...this.mock.login() };
    const path = join(this.home, `.auth.json.${fingerprint(sent)}.tmp${replaced}`);
    fs.writeFileSync(path, text(tokens), { mode: 0o600 });
    return tokens;
  }
  /** Sees a run to its end; `ending` is its exit code and outcome. */
  async expect(run: Run, ending: string): Promise<void> {
    assertEquals(`${await run.ended} ${this.status().watchdog_last_outcome}`, ending, run.stderr);
  }
  async once(ending: string, ...args: string[]): Promise<Run> {
    const run = this.start("--once", ...args);
    await this.expect(run, ending);
    return run;
  }
  temporaries(): string[] {
    return fs.readdirSync(this.home).filter((name) => /\.(tmp|new)$/.test(name));
  }
}
type Mock = Awaited<ReturnType<typeof startMockServer>>;

const STATUS_TYPES: Record<string, RegExp> = {
  last_refresh: /^"[^"]*"$/,
  last_refresh_age_seconds: /^(-1|\d+)$/,
  watchdog_last_outcome: /^"[a-z:_0-9]+"$/,
  watchdog_last_run_iso: /^"\d{4}-\d\d-\d\dT[0-9:.]+Z"$/,
  detail: /^(null|".*")$/,
  access_token_expires_iso: /^(null|"[0-9T:.-]+Z")$/,
  next_run_iso: /^(null|"[0-9T:.-]+Z")$/,
  last_success_iso: /^(null|"[0-9T:.-]+Z")$/,
  consecutive_failures: /^\d+$/,
  watchdog_version: /^"\d+\.\d+\.\d+"$/,
};
const ANOTHER = "rt_of-another-login";
const STATUS_NAME = "auth_refresh_status.json";
const mode = (path: string) => (fs.statSync(path).mode & 0o7777).toString(8);

/** One run, and what must hold after any. */
async function runOnce(stage: Stage, scenario: Scenario): Promise<void> {
  const { args = ["--once"], exit = 0, outcome, detail, says = [], requests } = scenario;
  const [before, listing] = [stage.text(), fs.readdirSync(stage.home)];
  const run = stage.start(...args);
  assertEquals(await run.ended, exit, run.stderr + run.stdout);
  for (const each of says) {
    const pattern = typeof each === "string" ? each.replaceAll("{auth}", stage.auth) : each;
    assert(run.says(pattern), `no ${pattern} in ${run.stderr}`);
  }
  const asked = requests ?? (exit === 0 || exit === 3 ? 1 : exit === 2 ? null : 0);
  if (asked !== null) assertEquals(stage.mock.requests.length, asked, run.stderr);
  if (exit === 64) {
    assertEquals(run.lines.length, 1, run.stderr);
    assertEquals(fs.readdirSync(stage.home), listing);
  }
  if (exit !== 0) assertEquals(stage.text(), before, "auth.json was touched");
  else if (args.includes("--once")) assertEquals(mode(stage.auth), "600");
  if (outcome !== undefined) {
    const status = stage.status();
    assertEquals(status.watchdog_last_outcome, outcome, run.stderr);
    if (detail !== undefined) assertEquals(status.detail, detail);
    assertEquals(status.watchdog_version, car.VERSION);
    const ran = Date.parse(String(status.watchdog_last_run_iso));
    assert(Math.abs(ran - Date.now()) < 60_000, `${status.watchdog_last_run_iso}`);
    for (const [name, type] of Object.entries(STATUS_TYPES)) assertMatch(JSON.stringify(status[name]), type, name);
    if (exit === 0) assertEquals(status.last_refresh, (JSON.parse(stage.text() ?? "") as Fields).last_refresh);
    assertEquals(mode(join(stage.home, STATUS_NAME)), "600");
  }
  assertEquals(stage.temporaries(), [], "a journal is left");
  await scenario.after?.(stage, run);
}

/** Nine characters in a row of any token are a leak, wherever they are printed or written. */
function assertNoLeak(stage: Stage): void {
  const parts = new Set<string>();
  for (const secret of new Set([ANOTHER, ...stage.secrets, ...stage.mock.secrets])) {
    for (let start = 0; start + 9 <= secret.length; start++) parts.add(secret.slice(start, start + 9));
  }
  const printed = stage.runs.flatMap(({ stdout, stderr }) => [stdout, stderr]);
  const files = fs.readdirSync(stage.dir, { recursive: true, encoding: "utf8" });
  const others = files.filter((name) => !/(auth\.json|\.auth-\w+|second|elsewhere\.json|\.tmp|\.new)$/.test(name));
  assert(stage.runs.length > 0, "nothing was started");
  for (const text of [...printed, ...others.map((name) => stage.text(join(stage.dir, name)) ?? "")]) {
    for (let start = 0; start + 9 <= text.length; start++) {
      assert(!parts.has(text.slice(start, start + 9)), `a part of a token in: ${text}`);
    }
  }
}

async function perform(scenario: Scenario, form: string, dir: string): Promise<void> {
  fs.mkdirSync(dir);
  const mock = await startMockServer(scenario.mock);
  const stage = new Stage(dir, form, mock, scenario);
  try {
    await scenario.prepare?.(stage);
    await (scenario.run?.(stage) ?? runOnce(stage, scenario));
    for (const run of stage.runs) {
      const wrong = run.lines.filter((line) => !PREFIX.test(line) && !/^(codex_auth_refresh: |\{.*\}$)/.test(line));
      assertEquals(wrong, [], "not a log line");
      if (!run.command.some((word) => /^(--(status|health|metrics|help|version)|-[hV])$/.test(word))) {
        assertEquals(run.stdout, "");
      }
    }
    assertNoLeak(stage);
  } finally {
    for (const run of stage.runs) run.kill("SIGKILL");
    await Promise.all(stage.runs.map(({ ended }) => ended));
    await mock.close();
  }
}

// A private root and a leaf for this machine, signed by it.
const pem = (name: string) => join(scratch, `${name}.pem`);
function makeCertificates(): MockOptions["tls"] {
  const openssl = (command: string) => output("openssl", ...command.split(" "));
  if (!works("openssl", "version")) return undefined; // then what needs certificates is skipped
  const key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout";
  fs.writeFileSync(pem("names"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n");
  openssl(`req -x509 ${key} ${pem("root_key")} -out ${pem("root")} -days 2 -subj /CN=root`);
  openssl(`req ${key} ${pem("key")} -out ${pem("request")} -subj /CN=localhost`);
  const signing = `-CA ${pem("root")} -CAkey ${pem("root_key")} -CAcreateserial -extfile ${pem("names")}`;
  openssl(`x509 -req -in ${pem("request")} -out ${pem("leaf")} -days 2 ${signing}`);
  return { cert: fs.readFileSync(pem("leaf"), "utf8"), key: fs.readFileSync(pem("key"), "utf8") };
}

// ── scenarios ────────────────────────────────────────────────────────────────────────────────────

type Options = Partial<Scenario>;
type Check = (stage: Stage, run: Run) => void;
/** One `--once`; `ending` is its exit code and outcome. */
const ends = (name: string, ending: string, options: Options = {}, after?: Check): Scenario => {
  const [exit, outcome] = ending.split(" ");
  return { name, exit: Number(exit), outcome, ...options, ...(after && { after }) };
};
type Play = (stage: Stage) => Promise<void>;
const drive = (name: string, options: Options, run: Play): Scenario => ({ name, ...options, run });
const newest: Check = (stage) => assert(stage.isNewest());
const status = (status: number, code?: string): Behaviour => ({ kind: "status", status, code });
const late = (milliseconds: number): Behaviour => ({ kind: "delay", milliseconds });
const lost = (ledger: "before" | "after"): Behaviour => ({ kind: "reset", ledger });
const FRESH = { expires: 10 * DAY, age: 60 };

/** Nothing to do: no lock, no request, no file but the status. */
const skips = (name: string, text: string | RegExp, options: Options = {}): Scenario =>
  ends(name, "1 skip", { says: [text], ...options }, ({ home }, { messages }) => {
    assertEquals(messages.filter((line) => line.startsWith("refresh")), []);
    assertEquals(fs.readdirSync(home).filter((name) => name !== "auth.json"), [STATUS_NAME]);
  });
const NONE = { outcome: "skip:no_auth_json", detail: "no_auth_json" };
const ABSENT = "skip: {auth} absent or empty (no chatgpt-subscription auth in this workspace)";
const KEY = { auth_mode: undefined, OPENAI_API_KEY: "sk-an-api-key" };

const DECIDE: Scenario[] = [
  skips("no auth.json is nothing to do", ABSENT, { ...NONE, file: null }),
  skips("an empty auth.json is nothing to do", ABSENT, { ...NONE, file: "" }),
  skips("broken JSON is unreadable", "no-op: unreadable:SyntaxError", { file: '{"tokens":' }),
  skips("JSON that is a list is unreadable", "no-op: unreadable:TypeError", { file: "[1]" }),
  skips("what begins with a byte order mark is warned of", /^\S+auth\.json holds no JSON.*: log in again: /m, {
    file: "\ufeff{}",
  }),
  skips("a link to nowhere is warned of", /auth\.json is a symbolic link to a file that does not exist/, {
    ...NONE,
    file: null,
    prepare: ({ auth }) => fs.symlinkSync("nowhere", auth),
  }),
  skips("a directory in auth.json's place is warned of", /^\S+auth\.json is a directory.*: remove it, and mount/m, {
    file: null,
    prepare: ({ auth }) => fs.mkdirSync(auth),
  }),
  skips("bytes that are no text are unreadable", /^no-op: unreadable:\w+$/, { file: new Uint8Array([123, 255, 125]) }),
  skips("an API key is left alone", "no-op: auth_mode=apikey", { edit: (it) => it.auth_mode = "ApiKey" }),
  skips("an API key without a mode is left alone", "no-op: auth_mode=none", { edit: (it) => Object.assign(it, KEY) }),
  skips("no refresh token is nothing to do", "no-op: no_refresh_token", { edit: (it) => it.tokens.refresh_token = "" }),
  skips("an auth.json that is far too large is unreadable", "no-op: unreadable:EFBIG", {
    prepare: ({ auth }) => fs.truncateSync(auth, 2 ** 24 + 1),
  }),
  skips("a time without a zone is UTC, wherever we are", /^no-op: fresh exp_in=\d+s age=\d\ds$/, {
    ...FRESH,
    env: { TZ: "Asia/Tokyo" },
    edit: (it) => it.last_refresh = String(it.last_refresh).replace("Z", ""),
  }),
  skips("a fresh login is left alone", /^no-op: fresh exp_in=86(4000|3\d{3})s age=\d\ds$/, FRESH),
  ends("a login near its expiry is refreshed", "0 refreshed", {
    expires: HOUR,
    age: 9,
    detail: null,
    says: [/=exp_in=3\d{3}s<=14400s\)/],
  }),
  ends("an old login is refreshed", "0 refreshed", { expires: DAY, says: [/=last_refresh_age=7776\d\ds>=604800s\)$/] }),
  ends("a login that tells nothing of its age is refreshed", "0 refreshed", {
    edit: (it) => Object.assign(it, { last_refresh: "?" }).tokens.access_token = "opaque-access-token",
    says: [/=unparseable_metadata\)$/],
  }),
  ends("a fresh login is refreshed by force", "0 refreshed", { ...FRESH, args: ["--once", "--force"] }, newest),
];

const answered = (name: string, answer: Behaviour, ending: string) =>
  ends(name, ending, { answers: [answer], requests: 1 });
const useless = (name: string, answer: Behaviour) => answered(name, answer, "2 fail:apply_response");
const refused = (name: string, status: number, code: string, shape: "error.code" | "error" | "code"): Scenario => ({
  ...answered(name, { kind: "status", status, code, shape }, `3 fail:permanent_${status}`),
  detail: code.toLowerCase(),
  says: [new RegExp(`PERMANENT FAILURE \\(http=${status}.*log in again`)],
});
/** An answer with other fields; these tokens stay as they were. */
const rotates = (name: string, fields: Fields, ...kept: string[]): Scenario => ({
  ...answered(name, { kind: "fields", fields }, "0 refreshed"),
  after({ login, tokens }, run) {
    const held = tokens();
    for (const [token, old] of Object.entries(login)) assertEquals(held[token] === old, kept.includes(token), token);
    if (kept.length > 0 && Object.values(fields)[0] !== undefined) assert(run.says(/unusable=/), run.stderr);
  },
});
/** No connection, so the token cannot be spent: one try, which the log tells in two lines, its start and its end. */
const unreachable = (name: string, options: Options): Scenario =>
  ends(name, "2 fail:transient_000", { requests: 0, ...options }, (_, { lines }) => {
    assertEquals(lines.length, 2, lines.join("\n"));
  });
/** A port of loopback that refuses: a connection of ours to the mock has it, so nobody else can listen there. */
async function refusingPort({ mock }: Stage): Promise<number> {
  const socket = net.connect(mock.port, "127.0.0.1").on("error", () => {}); // it ends with the mock
  await new Promise<void>((done) => void socket.once("connect", done));
  return socket.localPort ?? 0;
}
/** Redeems a refresh token behind the program's back. */
async function spend(stage: Stage, refresh_token: string): Promise<void> {
  const body = JSON.stringify({ grant_type: "refresh_token", refresh_token });
  await (await fetch(stage.mock.url, { method: "POST", body })).body?.cancel();
}
/** Becomes true when somebody reads the file: its access time is so old that even a careful file system renews it. */
function readLater(path: string): () => boolean {
  fs.utimesSync(path, 0, new Date());
  return () => fs.statSync(path).atimeMs > 0;
}
const TELLS_READS = (() => {
  const path = join(scratch, "told");
  fs.writeFileSync(path, "x");
  const told = readLater(path);
  fs.readFileSync(path);
  return told();
})();
const MOUNTS = works("unshare", "--mount", "mount", "-t", "tmpfs", "none", scratch);
/** The answer to the first request waits until this is called. */
function hold({ mock }: Stage): () => void {
  const { promise, resolve } = Promise.withResolvers<void>();
  mock.onRequest = () => mock.requests.length === 1 ? promise : undefined;
  return resolve;
}
const LONG_TOKEN = "access-token-of-a-long-answer";
/** An answer of so many bytes, whose last one is the brace that closes it. */
const long = (name: string, size: number, ending: string): Scenario =>
  ends(name, ending, {
    answers: [{ kind: "raw", body: `{"access_token":"${LONG_TOKEN}"`.padEnd(size - 1) + "}" }],
    requests: 1,
  }, (stage) => {
    stage.secrets.push(LONG_TOKEN);
    assertEquals(stage.tokens().access_token === LONG_TOKEN, ending === "0 refreshed");
  });
const grace = { prepare: ({ mock }: Stage) => void (mock.graceMilliseconds = 60_000) };
const STARTING = /^refresh: starting \(.*reasons=exp_in=-36\d\ds<=14400s,last_refresh_age=7776\d\ds>=604800s\)$/;
const TLS = makeCertificates();
const ROOTS = { CODEX_CA_CERTIFICATE: pem("root") };
const tls = (env: Record<string, string>): Options => ({ env, mock: { tls: TLS }, skip: TLS === undefined });
const TAKES_USER = Object.keys(FORMS).filter((form) => form !== "node");
/** Over TLS, through a CONNECT proxy where `tunnels` is 1, else past it. */
const proxied = (
  name: string,
  tunnels: number,
  env: Record<string, string>,
  variable = "HTTPS_PROXY",
  user = "",
  sent = "",
) =>
  drive(name, tls({ ...ROOTS, ...env }), async (stage) => {
    const asked: string[] = [];
    const proxy = net.createServer((socket) => {
      socket.on("error", () => {}).once("data", (head) => {
        const [, host = "", port] = /^CONNECT ([^:]+):(\d+) /.exec(String(head)) ?? [];
        const [, login = ""] = /^proxy-authorization: basic (\S+)/im.exec(String(head)) ?? [];
        asked.push(`${Buffer.from(login, "base64")}@${host}:${port}`);
        const server = net.connect(Number(port), host).on("error", () => socket.destroy());
        socket.write("HTTP/1.1 200 OK\r\n\r\n");
        socket.pipe(server).pipe(socket);
      });
    });
    await new Promise<void>((done) => void proxy.listen(0, "127.0.0.1", done));
    if (variable !== "HTTPS_PROXY") stage.env.HTTPS_PROXY = "http://127.0.0.1:1";
    stage.env[variable] = `http://${user}127.0.0.1:${(proxy.address() as net.AddressInfo).port}`;
    stage.env[URL_NAME] = `https://localhost:${stage.mock.port}/oauth/token`;
    await stage.once("0 refreshed");
    proxy.close();
    assertEquals(asked, Array(tunnels).fill(`${sent}@localhost:${stage.mock.port}`));
  });

const POST: Scenario[] = [
  ends("a refresh is one request in the Codex CLI's own shape", "0 refreshed", {
    prepare: ({ env }) => void (env[URL_NAME] += "?key=swordfish"),
    says: [STARTING],
  }, (stage, run) => {
    newest(stage, run);
    assert(run.stderr.includes(`(endpoint=${stage.mock.url} `) && !run.stderr.includes("swordfish"), run.stderr);
    const { refresh_token } = stage.login;
    const body = { client_id: "app_EMoamEEZ73f0CkXaXp7hrann", grant_type: "refresh_token", refresh_token };
    assertEquals<Fields>(JSON.parse(stage.mock.lastRequestBody()), body);
    const { method, headers } = stage.mock.requests[0] ?? { headers: {} as Record<string, string> };
    assertEquals([method, headers["content-type"]], ["POST", "application/json"]);
    assertEquals(headers["user-agent"], `codex_auth_refresh/${car.VERSION}`);
    assertEquals(headers["accept-encoding"], "identity");
  }),
  drive("the client id is the one that the Codex CLI is told to present", {
    env: { CODEX_APP_SERVER_LOGIN_CLIENT_ID: "app_of ours" },
  }, async (stage) => {
    await stage.once("0 refreshed");
    assertEquals((JSON.parse(stage.mock.lastRequestBody()) as Fields).client_id, "app_of ours");
  }),
  ...Object.entries({ "": 0, ", though its trailer is cut off": 4 }).map(([cut, bytes]) =>
    drive(`an answer that is compressed all the same is read${cut}`, {}, async (stage) => {
      const tokens = stage.mock.login();
      const body = gzipSync(JSON.stringify(tokens));
      stage.mock.next({
        kind: "raw",
        body: body.subarray(0, body.length - bytes),
        headers: { "content-encoding": "GZIP" },
      });
      await stage.once("0 refreshed");
      assertEquals(stage.tokens(), { ...stage.tokens(), ...tokens });
    })
  ),
  rotates("tokens that are all usable are all stored", { scope: "openid" }),
  rotates("an id_token that is no JWT is left out", { id_token: "not-a-jwt-at-all" }, "id_token"),
  rotates("a token that is no Unicode text is left out", { access_token: "surrogate-\ud800-alone" }, "access_token"),
  rotates("a token that is missing is left as it was", { refresh_token: undefined }, "refresh_token"),
  rotates("a new refresh_token is kept beside rubbish", { id_token: 5, access_token: {} }, "id_token", "access_token"),
  useless("a page for people instead of tokens is worth another try", { kind: "html" }),
  useless("an answer that breaks off is worth another try", { kind: "cut_json" }),
  useless("an answer that is no object is worth another try", { kind: "raw", body: "[]" }),
  useless("an answer without a token is worth another try", { kind: "raw", body: '{"access_token":""}', status: 201 }),
  useless("an endless answer is cut off", { kind: "endless" }),
  long("a mebibyte of an answer is read", 2 ** 20, "0 refreshed"),
  long("more than a mebibyte of an answer is not", 2 ** 20 + 1, "2 fail:apply_response"),
  refused("a spent token needs a new login", 401, "refresh_token_reused", "error.code"),
  refused("an expired token needs a new login", 400, "refresh_token_expired", "error.code"),
  refused("an invalidated token needs a new login", 403, "refresh_token_invalidated", "code"),
  refused("an invalid grant needs a new login", 400, "invalid_grant", "error"),
  answered("a 400 for another reason is worth another try", status(400), "2 fail:transient_400"),
  refused("a token is dead at any status", 503, "REFRESH_TOKEN_REUSED", "error.code"),
  refused("a token of an ended session needs a new login", 400, "app_session_terminated", "error.code"),
  answered("a 500 is worth another try", status(500, "server_error"), "2 fail:transient_500"),
  answered("a server in trouble is worth another try", status(503), "2 fail:transient_503"),
  answered("too many requests are worth another try", { kind: "retry_after", value: "9" }, "2 fail:transient_429"),
  drive("a redirect receives nothing", {}, async (stage) => {
    const other = await startMockServer();
    for (const status of [302, 307, 308]) {
      stage.mock.next({ kind: "redirect", location: other.url, status });
      await stage.once(`2 fail:transient_${status}`);
    }
    await other.close();
    assertEquals([stage.mock.requests.length, other.requests.length], [3, 0]);
  }),
  unreachable("a refused connection is not tried again at once", {
    prepare: async (stage) => void (stage.env[URL_NAME] = `http://127.0.0.1:${await refusingPort(stage)}/`),
  }),
  unreachable("a proxy that refuses connections is not tried again at once", {
    prepare: async (stage) => void (stage.env.http_proxy = `http://127.0.0.1:${await refusingPort(stage)}/`),
  }),
  unreachable("a host that does not resolve is not tried again at once", {
    env: { [URL_NAME]: "https://no-such-host.invalid/token" },
  }),
  ends("a refusal is one though its body got lost", "3 fail:permanent_401", {
    prepare: async (stage) => {
      await spend(stage, stage.login.refresh_token);
      stage.mock.next({ kind: "truncated" });
    },
    requests: 2,
    detail: null,
  }),
  ends("a lost answer is asked for again", "0 refreshed", { ...grace, answers: [lost("after")], requests: 2 }, newest),
  ends("a lost answer is asked for again whatever the endpoint is called", "0 refreshed", {
    ...grace,
    answers: [lost("after")],
    requests: 2,
    prepare: (stage) => {
      grace.prepare(stage);
      stage.env[URL_NAME] += "?proxy=tunnel";
    },
  }, newest),
  ends("an answer that broke off is asked for again, twice if need be", "0 refreshed", {
    ...grace,
    answers: [{ kind: "truncated" }, lost("before")],
    requests: 3,
  }, newest),
  ends("tokens that came whole are stored, whatever breaks behind them", "0 refreshed", {
    answers: [{ kind: "unfinished" }],
    requests: 1,
  }, newest),
  drive("a lost answer is not asked for again, and no failure, where somebody else has logged in meanwhile", {
    answers: [lost("before")],
  }, async (stage) => {
    const run = stage.start("--once");
    await run.said(/again in 1 s/);
    logsIn(stage, run);
    await stage.expect(run, "1 superseded");
    isAnother(stage, run);
    assertEquals(stage.mock.requests.length, 1);
  }),
  ends("an error code that repeats the token is not repeated", "2 fail:transient_400", {
    prepare: (stage) => stage.mock.next(status(400, stage.login.refresh_token.slice(3, 35))),
  }),
  ends("BUN_CONFIG_VERBOSE_FETCH shows no token", "0 refreshed", { env: { BUN_CONFIG_VERBOSE_FETCH: "curl" } }, newest),
  ends("an answer that is lost for good needs a new login", "3 fail:permanent_401", {
    answers: [lost("after")],
    requests: 2,
    detail: "refresh_token_reused",
  }),
  ends("a connection that breaks three times is worth another try later", "2 fail:transient_000", {
    answers: [lost("before"), lost("before"), lost("before")],
    requests: 3,
  }),
  unreachable("a certificate of an unknown root is refused, and not tried again at once", tls({})),
  unreachable("NODE_TLS_REJECT_UNAUTHORIZED=0 switches no check of certificates off", {
    ...tls({ NODE_TLS_REJECT_UNAUTHORIZED: "0" }),
  }),
  ends("a root in CODEX_CA_CERTIFICATE is trusted", "0 refreshed", tls(ROOTS)),
  ends("a root in SSL_CERT_FILE is trusted", "0 refreshed", tls({ SSL_CERT_FILE: pem("root") })),
  ends("a file of roots without one is refused before the token is spent", "2 fail:preflight", {
    ...tls({ CODEX_CA_CERTIFICATE: pem("key") }),
    requests: 0,
    says: [/^refresh: not started: CODEX_CA_CERTIFICATE=.*key\.pem: holds no PEM certificate$/],
  }),
  proxied("HTTPS_PROXY is used", 1, {}),
  proxied("NO_PROXY with the host's name goes past the proxy", 0, { NO_PROXY: "localhost" }),
  proxied("NO_PROXY with an asterisk goes past the proxy", 0, { NO_PROXY: "*" }),
  proxied("https_proxy goes before HTTPS_PROXY", 1, {}, "https_proxy"),
  // Node.js sends a user only with a password.
  { ...proxied("a proxy may name a user", 1, {}, "https_proxy", "user@", "user:"), forms: TAKES_USER },
  proxied(
    "a proxy's user and password are sent as curl sends them",
    1,
    {},
    "https_proxy",
    "DOM\\me:50%of%66@",
    "DOM\\me:50%off",
  ),
  drive("HTTP_PROXY is not read, and http_proxy is", { env: { NODE_USE_ENV_PROXY: "1" } }, async (stage) => {
    const other = await startMockServer({ acceptAny: true });
    stage.env.HTTP_PROXY = `http://127.0.0.1:${other.port}`;
    await stage.once("0 refreshed");
    assertEquals([stage.mock.requests.length, other.requests.length], [1, 0]);
    stage.env.http_proxy = stage.env.HTTP_PROXY;
    if (stage.form === "node") return await other.close(); // asks for a tunnel, which the other is none for
    await stage.once("0 refreshed", "--force");
    assertEquals([stage.mock.requests.length, other.requests.length], [1, 1]);
    await other.close();
  }),
];

// Root sees no missing permission, so some scenarios are for somebody else.
const ROOT = Deno.uid() === 0;
const NOBODY = ROOT ? ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"] : [];
const unprivileged = (name: string, says: RegExp, skip: boolean, prepare: (stage: Stage) => void): Scenario =>
  drive(name, { forms: startable, skip }, async (stage) => {
    if (ROOT) belong(stage);
    prepare(stage);
    const before = stage.text();
    const run = stage.spawn([...NOBODY, ...FORMS[stage.form] ?? [], "--once"]);
    assertEquals(await run.ended, 2, run.stderr);
    assert(run.says(says), run.stderr);
    assertEquals([stage.mock.requests.length, stage.text()], [0, before]);
  });
const startable = Object.keys(FORMS).filter((form) => {
  const [program = "", ...args] = [...NOBODY, ...FORMS[form] ?? [], "--version"];
  try {
    return new Deno.Command(program, { args, cwd: "/", env: { DENO_DIR: denoDir } }).outputSync().success;
  } catch {
    return false;
  }
});
const belong = ({ home, auth }: Stage) => [home, auth].forEach((path) => fs.chownSync(path, 65534, 65534));

/** Somebody else writes auth.json while the request is out. */
const meanwhile = (name: string, ending: string, change: Check, after: Check, answers: Behaviour[] = []): Scenario =>
  drive(name, { answers }, async (stage) => {
    stage.mock.onRequest = () => change(stage, run);
    const run = stage.start("--once");
    await stage.expect(run, ending);
    assertEquals(stage.mock.requests.length, 1);
    after(stage, run);
  });
const another = (stage: Stage) => authJson({ ...stage.login, refresh_token: ANOTHER }, new Date(0));
const logsIn: Check = (stage) => fs.writeFileSync(stage.auth, another(stage));
const isAnother: Check = (stage) => assertEquals(stage.text(), another(stage));
const whole = (tokens: Fields) => JSON.stringify({ auth_mode: "chatgpt", tokens, last_refresh: ago(0) });
const inPlace = { CODEX_AUTH_IN_PLACE: "1" };
const holds = (stage: Stage, tokens: Fields) => {
  assertEquals(stage.tokens().refresh_token, tokens.refresh_token);
  assertEquals(stage.temporaries(), []);
};

const APPLY: Scenario[] = [
  drive("every field that is not ours is kept, numbers to the letter, in a file that takes the old one's place", {
    edit: (it) => Object.assign(it.tokens, { more: [{ deep: null }], last: "ü\u2028" }),
  }, async (stage) => {
    const numbers = '"big": 12345678901234567890123, "__proto__": {"exact": [1.0e2, -0.0]},';
    const text = (stage.text() ?? "").replace('"tokens"', `${numbers} "tokens"`);
    fs.writeFileSync(stage.auth, text);
    const { ino } = fs.statSync(stage.auth);
    await stage.once("0 refreshed");
    const [before, after] = [JSON.parse(text), JSON.parse(stage.text() ?? "")] as {
      tokens: Fields;
      last_refresh: string;
    }[];
    assert(before && after && stage.isNewest());
    const { id_token, access_token, refresh_token } = after.tokens;
    const tokens = { ...before.tokens, id_token, access_token, refresh_token };
    assertEquals(after, { ...before, tokens, last_refresh: after.last_refresh });
    const kept = /"big": ?12345678901234567890123,\s*"__proto__": ?\{\s*"exact": ?\[\s*1\.0e2,\s*-0\.0\s*\]/;
    assertMatch(stage.text() ?? "", kept);
    assertMatch(after.last_refresh, /Z$/);
    assert(Math.abs(Date.parse(after.last_refresh) - Date.now()) < 60_000, after.last_refresh);
    assert(fs.statSync(stage.auth).ino !== ino, "rewritten in place");
    // Nothing is left of the room that was kept for the answer.
    assert(stage.text()?.endsWith("}") && fs.statSync(stage.auth).size < 16 << 10);
  }),
  // Not as source: what Deno keeps in its cache meanwhile would have these modes too.
  drive(
    "only the owner can read what is written, whatever the umask",
    { forms: ["bundle", "executable"] },
    async (stage) => {
      for (const umask of ["0777", "0"]) {
        const run = stage.spawn([
          "sh",
          "-c",
          `umask ${umask}; exec "$@"`,
          "sh",
          ...FORMS[stage.form] ?? [],
          "--once",
          "--force",
        ]);
        await stage.expect(run, "0 refreshed");
        for (const name of fs.readdirSync(stage.home)) {
          assertEquals(
            mode(join(stage.home, name)),
            "600",
            `${umask} ${name}`,
          );
        }
        assertEquals(fs.readdirSync(stage.home).length, 3);
        fs.rmSync(join(stage.home, STATUS_NAME));
        fs.rmSync(join(stage.home, "auth_refresh.lock"));
      }
    },
  ),
  drive("an auth.json that is a symbolic link stays one", {}, async (stage) => {
    const real = join(stage.dir, "elsewhere.json");
    fs.renameSync(stage.auth, real);
    fs.symlinkSync(real, stage.auth);
    await stage.once("0 refreshed");
    assert(fs.lstatSync(stage.auth).isSymbolicLink() && stage.isNewest(real));
  }),
  drive("a file with a second hard link is refused, or rewritten in place where that is allowed", {}, async (stage) => {
    const second = join(stage.dir, "second");
    fs.linkSync(stage.auth, second);
    const run = await stage.once("2 fail:preflight");
    assert(run.says(/hard link/) && stage.mock.requests.length === 0, run.stderr);
    Object.assign(stage.env, inPlace);
    await stage.once("0 refreshed");
    assert(fs.statSync(stage.auth).nlink === 2 && stage.isNewest(second));
  }),
  drive("a file that can be replaced is not rewritten in place though allowed", { env: inPlace }, async (stage) => {
    const { ino } = fs.statSync(stage.auth);
    await stage.once("0 refreshed");
    assert(fs.statSync(stage.auth).ino !== ino && stage.isNewest());
  }),
  unprivileged(
    "a folder without write permission is refused before the token is spent",
    /auth_refresh\.lock: no permission/,
    false,
    ({ home }) => {
      fs.chmodSync(home, 0o555);
    },
  ),
  unprivileged("somebody else's file is refused before the token is spent", /belongs to user 0/, !ROOT, ({ auth }) => {
    fs.chownSync(auth, 0, 0);
    fs.chmodSync(auth, 0o666);
  }),
  drive("somebody else's file that may be written is rewritten in place where that is allowed", {
    forms: startable,
    skip: !ROOT,
    env: inPlace,
  }, async (stage) => {
    belong(stage);
    fs.chownSync(stage.auth, 0, 65534);
    fs.chmodSync(stage.auth, 0o660);
    await stage.expect(stage.spawn([...NOBODY, ...FORMS[stage.form] ?? [], "--once"]), "0 refreshed");
    const { uid, gid } = fs.statSync(stage.auth);
    assertEquals([uid, gid, mode(stage.auth), stage.isNewest(), stage.temporaries()], [0, 65534, "660", true, []]);
  }),
  ends("what root writes is the login's owner's, and a lock file of root's becomes it", "0 refreshed", {
    prepare: (stage) => {
      belong(stage);
      fs.writeFileSync(join(stage.home, "auth_refresh.lock"), "", { mode: 0o600 });
    },
    skip: !ROOT,
  }, ({ home }) => {
    const names = fs.readdirSync(home);
    assertEquals(names.sort(), ["auth.json", "auth_refresh.lock", STATUS_NAME]);
    for (const name of names) assertEquals(fs.statSync(join(home, name)).uid, 65534, name);
  }),
  drive("the Codex CLI's locks are left to it, also while the request is out", {
    skip: !fs.existsSync("/proc/locks"),
  }, async (stage) => {
    const inode = (path: string) => fs.statSync(path).ino;
    const theirs = ["auth.lock", "auth.json.lock"].map((name, size) => {
      const path = join(stage.home, name);
      fs.writeFileSync(path, "x".repeat(size), { mode: 0o640 });
      if (ROOT) fs.chownSync(path, 65534, 65534);
      return path;
    });
    // Whatever changes owner, mode, size or name shows in the moment of the last change.
    const state = () =>
      theirs.map((path) => {
        const { ino, uid, gid, mode, size, ctimeMs } = fs.statSync(path);
        return [ino, uid, gid, mode, size, ctimeMs];
      });
    const before = state();
    let locked: number[] = []; // by flock or fcntl, by whomever
    stage.mock.onRequest = () => {
      locked = fs.readFileSync("/proc/locks", "utf8").split("\n").map((line) =>
        Number(/:(\d+) \d+ \S+$/.exec(line)?.[1])
      );
    };
    await stage.once("0 refreshed");
    assert(locked.includes(inode(join(stage.home, "auth_refresh.lock"))), String(locked));
    assertEquals(theirs.filter((path) => locked.includes(inode(path))), []);
    assertEquals(state(), before);
    for (const path of theirs) fs.rmSync(path);
    await stage.once("0 refreshed", "--force");
    assertEquals(theirs.filter((path) => fs.existsSync(path)), []);
  }),
  meanwhile("a login made while the request is out is left alone", "1 superseded", logsIn, isAnother),
  meanwhile(
    "a login made within three seconds after a refusal outlives it",
    "1 superseded",
    (stage, run) => {
      setTimeout(() => logsIn(stage, run), 2500);
    },
    isAnother,
    [status(401, "refresh_token_reused")],
  ),
  meanwhile("a logout while the request is out stays one", "1 superseded", ({ auth }) => fs.rmSync(auth), (stage) => {
    assertEquals([stage.text(), stage.temporaries()], [null, []]);
  }),
  meanwhile(
    "a file that is written anew under another name while the request is out gets the answer",
    "0 refreshed",
    (it) => {
      const text = it.text() ?? "";
      fs.rmSync(it.auth);
      setTimeout(() => fs.writeFileSync(it.auth, text), 1500);
    },
    newest,
  ),
  meanwhile("a field that is written while the request is out is kept", "0 refreshed", (it) => {
    fs.writeFileSync(it.auth, (it.text() ?? "").replace('"tokens"', '"later": 1.00, "tokens"'));
  }, (stage) => assert(stage.isNewest() && stage.text()?.includes("1.00"))),
  meanwhile(
    "a file that its writer left empty gets the answer",
    "0 refreshed",
    ({ auth }) => fs.truncateSync(auth),
    newest,
  ),
  drive("an answer that a killed run left is stored without a request", FRESH, async (stage) => {
    const tokens = stage.leave(whole);
    await stage.once("0 refreshed");
    holds(stage, tokens);
    assertEquals([stage.status().detail, stage.mock.requests.length], ["rolled_forward", 0]);
    assertEquals((JSON.parse(stage.text() ?? "") as Fields).last_refresh, ago(0));
  }),
  drive("an answer that a killed run left replaces an empty auth.json", { file: "" }, async (stage) => {
    const tokens = stage.leave(whole);
    await stage.once("0 refreshed");
    holds(stage, tokens);
  }),
  drive("an answer that a killed run left goes where there is another login by now, or none", FRESH, async (stage) => {
    stage.leave(whole, ANOTHER);
    await stage.once("1 skip");
    holds(stage, { ...stage.login });
    fs.rmSync(stage.auth);
    stage.leave(whole);
    await stage.once("1 skip:no_auth_json");
    assertEquals(stage.temporaries(), []);
  }),
  drive("an answer that a killed run left goes where auth.json was refreshed later without a new refresh token", {
    expires: 10 * DAY,
    age: 60,
  }, async (stage) => {
    const before = stage.text();
    stage.leave((tokens) => {
      const { refresh_token } = stage.login;
      return JSON.stringify({
        auth_mode: "chatgpt",
        tokens: { ...tokens, refresh_token },
        last_refresh: ago(300 * DAY),
      });
    });
    await stage.once("1 skip");
    assertEquals([stage.text(), stage.temporaries()], [before, []]);
  }),
  drive("an answer that a killed run left is stored from whichever file is whole", FRESH, async (stage) => {
    stage.leave(() => "\n".repeat(4096));
    const tokens = stage.leave(whole, undefined, ".new");
    await stage.once("0 refreshed");
    holds(stage, tokens);
    assertEquals([stage.temporaries(), stage.mock.requests.length], [[], 0]);
  }),
  drive("a symbolic link in a journal's place is not followed, and named", FRESH, async (stage) => {
    const [before, real] = [stage.text(), join(stage.dir, "elsewhere.json")];
    stage.leave(whole);
    const planted = join(stage.home, stage.temporaries()[0] ?? "");
    fs.renameSync(planted, real);
    fs.symlinkSync(real, planted);
    const run = await stage.once("2 fail:preflight");
    assert(run.stderr.includes(`${planted} has the name of a journal`), run.stderr);
    assertEquals([stage.text(), fs.readlinkSync(planted), fs.existsSync(real)], [before, real, true]);
    assertEquals(stage.mock.requests.length, 0);
  }),
  drive("what a killed Codex CLI left is rescued when the endpoint calls the token spent", {}, async (stage) => {
    const path = join(stage.home, ".auth-a1B2c3");
    await spend(stage, stage.login.refresh_token);
    const answer = { ...stage.login, refresh_token: stage.mock.newest(stage.login.refresh_token) };
    fs.writeFileSync(path, authJson(answer, new Date(Date.now() - 60_000)), { mode: 0o600 });
    fs.writeFileSync(join(stage.home, ".auth-older1"), another(stage)); // is left alone
    const document = JSON.parse(stage.text() ?? "") as Fields;
    fs.writeFileSync(stage.auth, JSON.stringify({ ...document, more: 1 }));
    const run = await stage.once("0 refreshed");
    assert(run.says("refresh: ok (rescued from .auth-a1B2c3)"), run.stderr);
    assertEquals([stage.status().detail, stage.isNewest(), fs.existsSync(path)], ["rescued", true, false]);
    assertEquals([(JSON.parse(stage.text() ?? "") as Fields).more, stage.temporaries()], [1, []]);
    assert(fs.existsSync(join(stage.home, ".auth-older1")));
    await stage.once("0 refreshed", "--force");
  }),
  drive("what a killed Codex CLI cannot have left for this login is not touched", {
    answers: [status(401, "refresh_token_reused")],
  }, async (stage) => {
    const put = (name: string, text: string) => fs.writeFileSync(join(stage.home, `.auth-${name}`), text);
    const [own, later] = [stage.login, new Date()];
    const other = { ...own, refresh_token: ANOTHER };
    put("accoun", authJson(other, later).replace(/"account_id": "[^"]*"/, '"account_id": "another"'));
    put("older1", authJson(other, new Date(0)));
    put("sameRT", authJson(own, later));
    put("noTOKN", "{}");
    put("torn01", authJson(other, later).slice(0, -40));
    put("zeros1", "\0".repeat(1 << 20));
    put("longer7", authJson(other, later));
    fs.symlinkSync(join(stage.home, ".auth-longer7"), join(stage.home, ".auth-linked"));
    output("mkfifo", join(stage.home, ".auth-fifo01"));
    fs.mkdirSync(join(stage.home, ".auth-folder"));
    if (ROOT) {
      put("strang", authJson(other, later));
      fs.chownSync(join(stage.home, ".auth-strang"), 65534, 65534);
    }
    const left = () => fs.readdirSync(stage.home).filter((name) => name.startsWith(".auth-")).sort();
    const [before, names] = [stage.text(), left()];
    const run = await stage.once("3 fail:permanent_401");
    assertEquals([stage.text(), left(), run.lines.length], [before, names, 2], run.stderr);
  }),
  ends(
    "an answer without a refresh token is stored though auth.json was written by a clock ahead of ours",
    "0 refreshed",
    {
      age: -120,
      answers: [{ kind: "fields", fields: { refresh_token: undefined } }],
      requests: 1,
    },
    ({ login, tokens }) => assert(tokens().access_token !== login.access_token),
  ),
  ends("a journal that holds no answer is removed", "0 refreshed", {
    prepare: (stage) => void stage.leave(() => "\n".repeat(4096)),
  }, newest),
  drive("five that find one stale login send one request, though what comes of it is due as well", {
    mock: { accessTokenSeconds: HOUR },
    answers: [late(1000)], // the others try the lock four times a second
    skip: !TELLS_READS,
  }, async (stage) => {
    const lock = new DatabaseSync(join(stage.home, "auth_refresh.lock"));
    lock.exec("BEGIN EXCLUSIVE");
    // A home for each, with one auth.json: who has read its own status file has found the login stale before.
    const started = [...Object.values(FORMS), FORMS[stage.form] ?? []].map((form, index) => {
      const home = join(stage.dir, `home${index}`);
      fs.mkdirSync(home);
      fs.symlinkSync(stage.auth, join(home, "auth.json"));
      fs.writeFileSync(join(home, STATUS_NAME), "{}");
      const read = readLater(join(home, STATUS_NAME));
      return { home, read, run: stage.spawn([...form, "--once", home]) };
    });
    await until("all have found it stale", () => started.every(({ read }) => read()));
    lock.close();
    const ended = await Promise.all(started.map(async ({ home, run }) => {
      return `${await run.ended} ${stage.status(home).watchdog_last_outcome}`;
    }));
    assertEquals(ended.sort(), ["0 refreshed", ...Array(4).fill("1 superseded")]);
    assert(stage.mock.requests.length === 1 && stage.isNewest());
  }),
  drive("five that start together on one dead login send one request", {
    answers: Array(5).fill(status(401, "refresh_token_expired")),
  }, async (stage) => {
    const forms = [...Object.values(FORMS), FORMS[stage.form] ?? []];
    const runs = forms.map((form) => stage.spawn([...form, "--once"]));
    assertEquals(await Promise.all(runs.map(({ ended }) => ended)), [3, 3, 3, 3, 3]);
    assertEquals(stage.mock.requests.length, 1);
  }),
];

const STATUS: Scenario[] = [
  drive("the status file says what auth.json says, after failures too", {
    answers: [status(503), { kind: "html" }],
  }, async (stage) => {
    const { last_refresh } = JSON.parse(stage.text() ?? "") as Fields;
    const says = (...names: string[]) => names.map((name) => stage.status()[name]);
    const totals = () => says("runs_total", "refreshes_total", "failures_total");
    await stage.once("2 fail:transient_503");
    assertEquals(says("last_refresh", "consecutive_failures", "last_success_iso"), [last_refresh, 1, null]);
    assertEquals(totals(), [1, 0, 1]);
    const age = Number(stage.status().last_refresh_age_seconds);
    assert(age >= 9 * DAY && age < 9 * DAY + 60, `${age}`);
    const { exp } = car.claimsOf(stage.login.access_token) ?? {};
    assertEquals(stage.status().access_token_expires_iso, new Date(Number(exp) * 1000).toISOString());
    await stage.once("2 fail:apply_response");
    assertEquals([...says("last_refresh", "consecutive_failures"), totals()], [last_refresh, 2, [2, 0, 2]]);
    await stage.once("0 refreshed");
    assertEquals([...says("consecutive_failures", "last_refresh_age_seconds"), totals()], [0, 0, [3, 1, 2]]);
    const [success] = says("last_success_iso");
    await stage.once("1 skip");
    assertEquals(totals(), [4, 1, 2]);
    assert(says("last_success_iso")[0] === success && Date.parse(String(success)) > Date.now() - 60_000);
  }),
  drive("one run leaves the loop's next_run_iso alone", FRESH, async (stage) => {
    const next_run_iso = "2030-01-01T00:00:00.000Z";
    fs.writeFileSync(join(stage.home, STATUS_NAME), JSON.stringify({ next_run_iso }));
    await stage.once("1 skip");
    assertEquals(stage.status().next_run_iso, next_run_iso);
  }),
  drive("what is left of writing the status file is removed when it is older than a minute", FRESH, async (stage) => {
    const [old, young] = [90, 30].map((seconds) => {
      const name = `.${STATUS_NAME}.1.${seconds}.tmp`;
      fs.writeFileSync(join(stage.home, name), "");
      fs.utimesSync(join(stage.home, name), new Date(), new Date(Date.now() - seconds * 1000));
      return name;
    });
    await stage.once("1 skip");
    assertEquals([stage.temporaries(), stage.temporaries().includes(String(old))], [[young], false]);
  }),
  drive("a status file that cannot be written is a line of the log and no failure", {}, async (stage) => {
    fs.mkdirSync(join(stage.home, STATUS_NAME));
    const run = stage.start("--once");
    assertEquals([await run.ended, stage.isNewest(), stage.temporaries()], [0, true, []], run.stderr);
    assertEquals(run.count(/^status: \/.*: cannot be written \(\w+\)$/), 1, run.stderr);
  }),
  drive("--status and --health wait for a writer who is in the middle of it", {
    ...FRESH,
    skip: !TELLS_READS,
  }, async (stage) => {
    const text = stage.text() ?? "";
    for (
      const [mode, says] of [["--status", /: healthy, fresh\n/], [
        "--health",
        /^\nhealthy: DIR\/home: fresh\n$/,
      ]] as const
    ) {
      fs.writeFileSync(stage.auth, text.slice(0, 99));
      const read = readLater(stage.auth);
      const run = stage.start(mode);
      await until("a look at what is not whole", read);
      fs.writeFileSync(stage.auth, text);
      assertEquals(await run.ended, 0, run.stdout + run.stderr);
      assertMatch(shown(stage, run.stdout), says);
    }
  }),
  drive("--status warns of an auth.json that is a mount of its own", { ...FRESH, skip: !MOUNTS }, async (stage) => {
    const mount = 'mount -t tmpfs none "$0" && cp "$1" "$0" && mount --bind "$0/auth.json" "$1" && shift && exec "$@"';
    const disk = join(stage.dir, "disk");
    fs.mkdirSync(disk);
    const form = FORMS[stage.form] ?? [];
    const run = stage.spawn(["unshare", "--mount", "sh", "-c", mount, disk, stage.auth, ...form, "--status"]);
    assertEquals(await run.ended, 0, run.stderr);
    assertMatch(
      shown(stage, run.stdout),
      /warning: auth\.json is a mount of its own, .*: mount its directory instead\n/,
    );
  }),
  drive("a home that does not exist is not created", {}, async (stage) => {
    const run = stage.start("--once", join(stage.dir, "absent", "home"));
    assertEquals([await run.ended, fs.existsSync(join(stage.dir, "absent"))], [1, false], run.stderr);
  }),
];

const PIPES = {
  "closed": 'exec "$@" 2>&-',
  "without a reader": 'mkfifo "$0"; exec 9<>"$0" 8>"$0" 9<&-; exec "$@" 2>&8',
  "full": 'mkfifo "$0"; exec 9<>"$0"; dd if=/dev/zero of="$0" oflag=nonblock bs=4096 2>/dev/null; exec "$@" 2>"$0"',
};
const ATTEMPT: Scenario[] = [
  drive("a dead token is not sent again, unless forced, until somebody has logged in", {
    answers: [status(401, "refresh_token_expired"), status(401, "refresh_token_expired")],
  }, async (stage) => {
    const rejected = () => stage.status().rejected_refresh_token_sha256;
    for (const [requests, ...flags] of [[1], [1], [2, "--force"], [2]] as [number, ...string[]][]) {
      await stage.once("3 fail:permanent_401", ...flags);
      assertEquals([stage.mock.requests.length, stage.status().detail], [requests, "refresh_token_expired"]);
      // What is not sent does not fail once more.
      assertEquals([stage.status().consecutive_failures, stage.status().failures_total], [requests, requests]);
      assertEquals(rejected(), fingerprint(stage.login.refresh_token));
    }
    fs.writeFileSync(stage.auth, authJson(stage.mock.login({ accessTokenSeconds: 10 * DAY })));
    await stage.once("1 skip");
    assertEquals(rejected(), null);
    fs.writeFileSync(stage.auth, authJson(stage.mock.login(), new Date(0)));
    await stage.once("0 refreshed");
  }),
  drive("a token that was called dead is not any more once it was redeemed, though it stays the same", {
    answers: [status(401, "invalid_grant"), { kind: "fields", fields: { refresh_token: undefined } }],
  }, async (stage) => {
    await stage.once("3 fail:permanent_401");
    await stage.once("0 refreshed", "--force");
    assertEquals(stage.tokens().refresh_token, stage.login.refresh_token);
    assertEquals(stage.status().rejected_refresh_token_sha256, null);
  }),
  drive("a 401 without a code does not make the token a dead one", { answers: [status(401)] }, async (stage) => {
    await stage.once("3 fail:permanent_401");
    await stage.once("0 refreshed");
  }),
  drive("of several homes the worst outcome counts, and log lines name them", {}, async (stage) => {
    const [fresh, linked, dead] = [stage.plant("fresh", 10 * DAY, 60).home, stage.plant("linked"), stage.plant("dead")];
    fs.linkSync(linked.auth, join(stage.dir, "second"));
    await spend(stage, dead.login.refresh_token);
    const rows: [number, ...string[]][] = [[1, fresh, stage.plant("a", 9 * DAY, 60).home], [0, fresh, stage.home]];
    rows.push([2, fresh, stage.plant("b").home, linked.home], [3, linked.home, dead.home, stage.plant("c").home]);
    for (const [exit, ...homes] of rows) {
      const run = stage.start("--once", ...homes);
      assertEquals(await run.ended, exit, run.stderr);
      for (const home of homes) assert(run.stderr.includes(` [${home}] `), run.stderr);
    }
  }),
  drive("a home that is named twice, once through a symbolic link, is refreshed once", {}, async (stage) => {
    fs.symlinkSync(stage.home, join(stage.dir, "link"));
    await stage.once("0 refreshed", stage.home, join(stage.dir, "link"), "link/../home/");
    assertEquals(stage.mock.requests.length, 1);
  }),
  ...Object.entries(PIPES).map(([what, script]) =>
    drive(`a log pipe that is ${what} does not stop an attempt`, {}, async (stage) => {
      const command = ["sh", "-c", script, join(stage.dir, "pipe"), ...FORMS[stage.form] ?? [], "--once"];
      assertEquals([await stage.spawn(command).ended, stage.isNewest()], [0, true]);
    })
  ),
  drive("a log file is added to, whoever else writes into it", {}, async (stage) => {
    const [log, form] = [join(stage.dir, "log"), FORMS[stage.form] ?? []];
    // With -A Deno may open what is behind stderr.
    const command = stage.form === "source" ? [DENO, "run", "-A", SOURCE] : form;
    const run = stage.spawn(["sh", "-c", '{ echo first; "$@"; echo last; } >"$0" 2>&1', log, ...command, "--once"]);
    assertEquals([await run.ended, stage.isNewest()], [0, true]);
    const lines = (stage.text(log) ?? "").split("\n").map((line) => line.replace(PREFIX, "").split(" (")[0]);
    assertEquals(lines, ["first", "refresh: starting", "refresh: ok", "last", ""]);
  }),
];

/** A loop, which must end well on SIGTERM when the scenario is through. */
type Watch = (stage: Stage, run: Run) => Promise<void>;
const loops = (name: string, options: Options, watch: Watch, ...homes: string[]): Scenario =>
  drive(name, options, async (stage) => {
    const loop = stage.start(...homes);
    await watch(stage, loop);
    loop.kill("SIGTERM");
    assertEquals(await loop.ended, 0, loop.stderr);
  });
const env = { CODEX_AUTH_REFRESH_INTERVAL_SECONDS: "1", CODEX_AUTH_SAFETY_MARGIN_SECONDS: "0" };
const RARELY = { env: RARE, expires: 300 * DAY, age: 60 };
const IN_A_MONTH = /^next check in 3[0-3] d/;

/** Signals that would end a process that does not take them. */
const ENDING = [
  ...["SIGTERM", "SIGINT", "SIGQUIT", "SIGABRT", "SIGALRM", "SIGVTALRM"] as const,
  ...["SIGPROF", "SIGUSR2", "SIGIO", "SIGXCPU", "SIGXFSZ"] as const,
];

/** A command that notes what it is told, and what it notes. */
const NOTE =
  'echo "$CODEX_AUTH_EVENT $CODEX_AUTH_OUTCOME $CODEX_AUTH_REASON, $CODEX_AUTH_ADVICE" >>told; env >environment';
const told = (stage: Stage): string[] => (stage.text(join(stage.dir, "told")) ?? "").split("\n").slice(0, -1);
const EXEC: Scenario[] = [
  drive("the operator's command is told of a refresh and of each change, once", {}, async (stage) => {
    await stage.once("0 refreshed", "--exec", NOTE);
    await stage.once("1 skip", "--exec", NOTE);
    assertEquals(told(stage), ["refreshed refreshed fresh, "]);
    assert(stage.text(join(stage.dir, "environment"))?.includes(`CODEX_HOME=${stage.home}\n`));
    await spend(stage, String(stage.tokens().refresh_token));
    await stage.once("3 fail:permanent_401", "--force", "--exec", NOTE);
    await stage.once("3 fail:permanent_401", "--force", "--exec", NOTE);
    assertEquals(told(stage).length, 2);
    assertMatch(told(stage)[1] ?? "", /^unhealthy fail:permanent_401 the login is dead, .*, log in again: CODEX_HOME=/);
    fs.rmSync(stage.auth); // which is no recovery
    await stage.once("1 skip:no_auth_json", "--exec", NOTE);
    fs.writeFileSync(stage.auth, authJson(stage.mock.login({ accessTokenSeconds: 10 * DAY })));
    await stage.once("1 skip", "--exec", NOTE);
    await stage.once("1 skip", "--exec", NOTE);
    assertEquals(told(stage).slice(2), ["recovered skip fresh, "]);
  }),
  drive("what the operator's command failed at is told again, also by the loop", {}, async (stage) => {
    const run = await stage.once("0 refreshed", "--exec", "exit 7");
    assert(run.says("exec: event=refreshed failed (exit 7), it is told again at the next attempt"), run.stderr);
    const loop = stage.start("--exec", `echo "it is $CODEX_AUTH_EVENT"; echo >&2; ${NOTE}`);
    await loop.said(/^exec: event=refreshed ok$/);
    loop.kill("SIGTERM");
    assertEquals([await loop.ended, told(stage)], [0, ["refreshed skip fresh, "]], loop.stderr);
    assert(loop.says(/^exec: it is refreshed$/) && loop.count(/^exec: /) === 2, loop.stderr);
  }),
  ...Object.entries({
    "cannot be found": ["/nonexistent/command", /^exec: event=refreshed failed \(exit 127\)/],
    "kills its process group": ["kill 0; sleep 9", /^exec: event=refreshed failed \(SIGTERM\)/],
    "prints tokens": ['cat "$CODEX_HOME/auth.json"', /^exec: .*"refresh_token": "\[redacted\]"/],
    "prints a megabyte": ["yes $(printf %0999d) | head -c 1000000", /^exec: and more, 1000000 characters/],
  }).map(([what, [command = "", says = ""]]) =>
    ends(`a command of the operator's that ${what} costs nothing`, "0 refreshed", {
      args: ["--once", "--exec", String(command)],
      says: [says],
    }, (stage, run) => assert(stage.isNewest() && run.stderr.length < 20_000))
  ),
  loops(
    "a command of the operator's that hangs delays no refresh",
    {
      env,
      mock: { accessTokenSeconds: 2 },
    },
    async (_, run) => await run.said(/^refresh: ok /, 3),
    "--exec",
    "sleep 99",
  ),
  drive("a SIGTERM ends a command that hangs, with its children, after five seconds", {}, async (stage) => {
    const run = stage.start("--exec", "sleep 99 & echo $! >child; echo $$ >parent; wait");
    const pids = () => ["child", "parent"].map((name) => stage.text(join(stage.dir, name))?.trim() ?? "");
    await until("it runs", () => pids().every((pid) => pid !== ""));
    run.kill("SIGTERM");
    assertEquals(await run.ended, 0, run.stderr);
    assert(run.says(/^exec: event=refreshed failed \(it did not end in time\)/), run.stderr);
    await until("both are gone", () => pids().every((pid) => !fs.existsSync(`/proc/${pid}`)));
  }),
  drive("what the operator's command leaves running does not fail it", {}, async (stage) => {
    const run = await stage.once("0 refreshed", "--exec", "sleep 99 & echo $! >left");
    Deno.kill(Number(stage.text(join(stage.dir, "left"))));
    assert(run.says(/^exec: event=refreshed ok$/), run.stderr);
  }),
  drive("a token between what the operator's command says to stdout and to stderr stays one", {}, async (stage) => {
    const token = `sed -n 's/.*"refresh_token": "\\(.*\\)".*/\\1/p' "$CODEX_HOME/auth.json"`;
    const command = `t=$(${token}); printf "%.9s" "$t"; sleep 1; echo between >&2; sleep 1; echo "\${t#?????????}"`;
    const run = await stage.once("0 refreshed", "--exec", command);
    assert(run.says(/^exec: \[redacted\]$/) && run.says(/^exec: between$/), run.stderr);
  }),
  drive(
    "what the operator's command prints is redacted however many homes were looked at meanwhile",
    {},
    async (stage) => {
      const others = Array.from({ length: 50 }, (_, index) => stage.plant(`other${index}`, 10 * DAY, 60).home);
      const command = 'until [ -e go ]; do sleep 0.1; done; cat "$CODEX_HOME/auth.json"';
      const run = stage.start("--exec", command, stage.home, ...others);
      await run.said(/ refresh: ok /);
      await run.said(/ no-op: fresh /, 50);
      run.kill("SIGHUP");
      await run.said(/ no-op: fresh /, 101);
      fs.writeFileSync(join(stage.dir, "go"), "");
      await run.said(/ exec: event=refreshed ok$/);
      assert(run.says(/ exec: .*"refresh_token": "\[redacted\]"/), run.stderr);
      run.kill("SIGTERM");
      assertEquals(await run.ended, 0, run.stderr);
    },
  ),
  drive("eight of the operator's commands run at a time, the others after them", {}, async (stage) => {
    const homes = Array.from({ length: 10 }, (_, index) => stage.plant(`many${index}`).home);
    const command = "[ -e go ] && echo late >>told || echo early >>told; until [ -e go ]; do sleep 0.1; done";
    const run = stage.start("--once", "--exec", command, ...homes);
    await run.said(/ refresh: ok /, 10);
    await until("eight run", () => told(stage).length >= 8);
    fs.writeFileSync(join(stage.dir, "go"), "");
    assertEquals(await run.ended, 0, run.stderr);
    assertEquals(told(stage), [...Array(8).fill("early"), "late", "late"]);
  }),
  drive("a command for which there are no descriptors costs nothing", { ...FRESH, forms: ["node"] }, async (stage) => {
    const run = stage.start("--exec", NOTE);
    await run.said(/^next check/);
    const open = new Set(fs.readdirSync(`/proc/${run.pid}/fd`).map(Number));
    let limit = 0;
    for (let free = 0; free < 4; limit++) if (!open.has(limit)) free++; // enough for a look, not for a command
    output("prlimit", "--pid", String(run.pid), `--nofile=${limit}`);
    fs.writeFileSync(stage.auth, "{");
    run.kill("SIGHUP");
    await run.said(/^exec: event=unhealthy failed \(EMFILE\)/);
    run.kill("SIGTERM");
    assertEquals(await run.ended, 0, run.stderr);
  }),
  drive("a SIGTERM waits for the command in hand, and starts no other", {}, async (stage) => {
    await stage.once("0 refreshed");
    await spend(stage, String(stage.tokens().refresh_token));
    await stage.once("3 fail:permanent_401", "--force");
    const run = stage.start("--once", "--exec", 'echo "$CODEX_AUTH_EVENT" >>told; sleep 99');
    await until("it runs", () => told(stage).length > 0);
    run.kill("SIGTERM");
    assertEquals([await run.ended, told(stage)], [1, ["refreshed"]], run.stderr);
  }),
  drive("each change is told once where no status file can be written", {}, async (stage) => {
    fs.mkdirSync(join(stage.home, "auth_refresh_status.json"));
    const run = stage.start("--exec", NOTE);
    await run.said(/^exec: event=refreshed ok$/);
    run.kill("SIGHUP");
    await run.said(/^no-op: fresh/);
    const dead = stage.mock.login({ accessTokenSeconds: -DAY });
    await spend(stage, dead.refresh_token);
    fs.writeFileSync(stage.auth, authJson(dead));
    run.kill("SIGHUP");
    await run.said(/^exec: event=unhealthy ok$/);
    run.kill("SIGTERM");
    assertEquals(await run.ended, 0, run.stderr);
    assertEquals(told(stage).map((line) => line.split(" ")[0]), ["refreshed", "unhealthy"]);
  }),
  drive("of ten homes three that die at once are told of, each by its name", {}, async (stage) => {
    const planted = Array.from({ length: 10 }, (_, index) => stage.plant(`many${index}`));
    for (const { login } of planted.slice(0, 3)) await spend(stage, login.refresh_token);
    const run = stage.start(
      "--once",
      "--exec",
      'echo "$CODEX_AUTH_EVENT $CODEX_HOME" >>told',
      ...planted.map(({ home }) => home),
    );
    assertEquals(await run.ended, 3, run.stderr);
    const wanted = planted.map(({ home }, index) => `${index < 3 ? "unhealthy" : "refreshed"} ${home}`);
    assertEquals(told(stage).sort(), wanted.sort());
  }),
  drive("Deno without leave to run a program says what it needs", { forms: ["source"] }, async (stage) => {
    const [program = "", ...args] = FORMS.source ?? [];
    const run = stage.spawn([program, ...args.filter((flag) => flag !== "--allow-run"), "--once", "--exec", "true"]);
    assertEquals([await run.ended, run.lines.length, stage.mock.requests.length], [64, 1, 0], run.stderr);
    assertMatch(run.stderr, /--exec needs Deno's permission to run a program: --allow-run/);
  }),
];

const LOOP: Scenario[] = [
  loops("the loop refreshes again and again", { env, mock: { accessTokenSeconds: 2 } }, async (stage, run) => {
    await run.said(/^refresh: ok /, 3);
    assert(Date.parse(String(stage.status().next_run_iso)) > Date.now() - 60_000);
    assert(stage.mock.requests.every(({ outcome }) => outcome === "redeemed"));
    // No connection is used twice: on one that turns out dead an engine may repeat the request by itself.
    const connections = stage.mock.requests.map(({ connection }) => connection);
    assertEquals(new Set(connections).size, connections.length);
  }),
  drive("a home whose answer hangs holds up no other", {}, async (stage) => {
    const release = hold(stage);
    const run = stage.start(stage.home, stage.plant("other").home);
    await run.said(/ refresh: ok /);
    assertEquals(stage.mock.requests.map(({ status }) => status), [null, 200]);
    run.kill("SIGTERM");
    release();
    assertEquals(await run.ended, 0, run.stderr);
    assert(run.count(/ refresh: ok /) === 2 && stage.isNewest());
  }),
  drive("homes that wait for one of the eight places are planned, not overdue", {}, async (stage) => {
    const { promise, resolve } = Promise.withResolvers<void>();
    stage.mock.onRequest = () => promise;
    const homes = Array.from({ length: 10 }, (_, index) => stage.plant(`many${index}`).home);
    const run = stage.start(...homes);
    const waiting = () => homes.filter((home) => Date.parse(String(stage.status(home)?.next_run_iso)) > Date.now());
    await until("eight are asked for, two wait", () => stage.mock.requests.length === 8 && waiting().length === 2);
    resolve();
    await run.said(/ refresh: ok /, 10);
    run.kill("SIGTERM");
    assertEquals(await run.ended, 0, run.stderr);
  }),
  loops("the loop backs off from failure to failure, and begins anew after a success", {
    env,
    mock: { accessTokenSeconds: 1 },
    answers: [status(503), status(502), status(503), { kind: "fields", fields: {} }, status(500)],
  }, async (stage, run) => {
    await run.said(/^next check/, 5);
    const plans = run.messages.flatMap((line) => /^next check in [12] s \((.*)\)$/.exec(line)?.[1] ?? []);
    const [one, two, three] = [1, 2, 3].map((failures) => `backoff after failure ${failures}`);
    assertEquals<unknown[]>(plans.slice(0, 5), [one, two, three, "token enters its margin", one]);
    assertEquals(stage.mock.requests.length, 5);
  }),
  loops("the loop does as the endpoint's Retry-After says", {
    env: { CODEX_AUTH_REFRESH_INTERVAL_SECONDS: "3600" },
    answers: [{ kind: "retry_after", value: "9" }],
  }, async (_, run) => await run.said(/^next check in (9|1[0-4]) s \(the endpoint asked to wait\)$/)),
  ...[true, false].map((remembers) =>
    loops(
      `the loop repeats that a login is dead without sending it${
        remembers ? "" : ", with no status file to remember it"
      }`,
      {
        env,
        answers: [status(400, "invalid_grant")],
        prepare: ({ home }) => remembers ? undefined : fs.mkdirSync(join(home, STATUS_NAME)),
      },
      async (stage, run) => {
        await run.said(/PERMANENT FAILURE/, 2);
        assertEquals(stage.mock.requests.length, 1);
        fs.writeFileSync(stage.auth, authJson(stage.mock.login(), new Date(0)));
        await run.said(/^refresh: ok /);
      },
    )
  ),
  loops("the loop sends a token again after a 401 without a code", { env, answers: [status(401)] }, async (_, run) => {
    await run.said(/^refresh: ok /);
  }),
  loops("the loop waits for a home that does not exist yet", { env }, async (stage, run) => {
    await run.said(/^skip: .* absent or empty/);
    assertEquals(fs.existsSync(join(stage.dir, "later")), false);
    stage.plant("later");
    await run.said(/^refresh: ok /);
  }, "later"),
  ...Object.entries({ fresh: FRESH, "due but good": { expires: HOUR, age: 60 } }).map(([what, login]) =>
    loops(`an answer that a killed run left is stored at once by a loop on a login that is ${what}`, {
      ...login,
      prepare: (stage) => void stage.leave(whole),
    }, async (stage, run) => {
      await run.said(/^refresh: ok \(rolled forward\)$/);
      assertEquals([run.lines.length >= 2, run.messages[1]], [true, "refresh: ok (rolled forward)"]);
      await until("the status is written", () => stage.status()?.watchdog_last_outcome === "refreshed");
      assertEquals([stage.temporaries(), stage.mock.requests.length], [[], 0]);
    })
  ),
  drive("a file that cannot be read is tried again by and by", { ...FRESH, env, forms: startable }, async (stage) => {
    if (ROOT) belong(stage);
    fs.chmodSync(stage.auth, 0);
    const run = stage.spawn([...NOBODY, ...FORMS[stage.form] ?? []]);
    await run.said(/^next check in \d s \(backoff after failure 2\)$/);
    assert(run.says("no-op: unreadable:EACCES"), run.stderr);
    fs.chmodSync(stage.auth, 0o600);
    await run.said(/^no-op: fresh /);
    await run.said(/^next check in 1 s \(interval\)$/);
    run.kill("SIGTERM");
    assertEquals(await run.ended, 0, run.stderr);
  }),
  loops("SIGHUP makes the loop look now, though it looks once a month", RARELY, async (stage, run) => {
    await run.said(IN_A_MONTH); // which is said before it is written
    await until("a status file", () => stage.text(join(stage.home, STATUS_NAME)) !== null);
    const days = (Date.parse(String(stage.status().next_run_iso)) - Date.now()) / 1000 / DAY;
    assert(days > 29.9 && days < 33.1, `${days}`);
    run.kill("SIGHUP");
    await run.said(IN_A_MONTH, 2);
    assertEquals(run.count(/^no-op: fresh /), 2);
  }),
  ...[0, 99].map((length) =>
    loops(
      `a file that is ${length ? "cut off" : "empty"} while it is rewritten is read again`,
      { ...RARELY, skip: !TELLS_READS },
      async (stage, run) => {
        await run.said(IN_A_MONTH);
        const text = stage.text() ?? "";
        fs.writeFileSync(stage.auth, text.slice(0, length));
        const read = readLater(stage.auth);
        run.kill("SIGHUP");
        await until("a look at what is not whole", read);
        fs.writeFileSync(stage.auth, text);
        await run.said(IN_A_MONTH, 2);
        assertEquals(run.count(/^no-op: fresh /), 2, run.stderr);
      },
    )
  ),
  ...([["SIGTERM", "--once"], ["SIGHUP", "--once"], ["SIGTERM"], ["SIGQUIT"]] as [Deno.Signal, ...string[]][]).map((
    [signal, ...flags],
  ) =>
    drive(
      `${signal} while a request is out ends ${flags[0] ?? "the loop"} when the answer is stored, others too`,
      {},
      async (
        stage,
      ) => {
        const release = hold(stage);
        const run = stage.start(...flags);
        await until("a request", () => stage.mock.requests.length === 1);
        run.kill(signal);
        await run.said(new RegExp(signal));
        // Under `deno run` it would open Deno's debugger, which says so.
        const all = [...ENDING, "SIGHUP", ...stage.form === "source" ? [] : ["SIGUSR1" as const]] as const;
        for (const further of all) run.kill(further);
        release();
        await stage.expect(run, "0 refreshed");
        assert(stage.isNewest() && stage.mock.requests.length === 1);
      },
    )
  ),
  drive("SIGTERM ends the pause before a lost answer is asked for again, and it is not", {
    answers: [lost("before"), lost("before")],
  }, async (stage) => {
    const run = stage.start("--once");
    await run.said(/again in 4 s/);
    const since = Date.now();
    run.kill("SIGTERM");
    assertEquals([await run.ended, stage.mock.requests.length], [2, 2]);
    assert(Date.now() - since < 3500, "the pause took its time");
  }),
];

const printed = (name: string, args: string[], check: (text: string, stage: Stage) => void): Scenario =>
  drive(name, {}, async (stage) => {
    const before = fs.readdirSync(stage.home);
    const run = stage.start(...args);
    assertEquals([await run.ended, run.stderr], [0, ""]);
    assertEquals([fs.readdirSync(stage.home), stage.mock.requests.length], [before, 0]);
    check(run.stdout, stage);
  });
/** What `--status` prints, without the line breaks that a long path makes, and the path. */
const shown = ({ dir }: Stage, text: string) => `\n${text.replace(/\n {4}/g, " ").replaceAll(dir, "DIR")}`;
/** The status file of a home that was refreshed two hours ago, and is looked at again in three. */
function writeRun(home: string): void {
  const iso = (seconds: number) => new Date(Date.now() + seconds * 1000).toISOString();
  const [ran, next_run_iso] = [iso(-2 * HOUR - 330), iso(6 * HOUR + 19 * 60 + 59)];
  const totals = { runs_total: 7, refreshes_total: 5, failures_total: 2 };
  const run = { watchdog_last_outcome: "refreshed", watchdog_last_run_iso: ran, last_success_iso: ran, next_run_iso };
  fs.writeFileSync(join(home, STATUS_NAME), JSON.stringify({ ...run, ...totals }));
}
const NEVER_RUN = `
DIR/home: unhealthy, the access token expired 1 h ago

  login         plan pro, account 00000000-0000-4000-8000-000000000001
  access token  [--------------------] expired
  last refresh  9 d ago
  to do: start the watchdog, it has never run here
`;
const ALL_RIGHT = `
DIR/home: healthy, fresh

  login         plan pro, account 00000000-0000-4000-8000-000000000001
  access token  [##########----------] 5 d left
  last refresh  2 h 30 min ago
  last run      2 h 5 min ago, refreshed
  next run      in 6 h 19 min
`;
const THREE_HOMES = `
state     home                 access token     last run        next run
unhealthy …-login-that-expired expired          never           -
  the access token expired 1 h ago
  to do: start the watchdog, it has never run here
healthy   …e-that-is-all-right 10 d left        2 h 5 min ago   in 6 h 19 min
no login  …e-without-any-login -                never           -
`;
const HAS_SCRIPT = works("script", "--version");
const FLAGS = ["--once", "--force", "--status", "--json", "--verbose", "--health", "--metrics", "--listen", "--exec"];
FLAGS.push("--help", "-h", "--version", "-V");
const VARIABLES = [
  ...BAD_VALUES.map(([name]) => name).filter((name) => name !== "HTTPS_PROXY"),
  "CODEX_HOME",
  "CODEX_APP_SERVER_LOGIN_CLIENT_ID",
  "https_proxy",
];
const MISTAKES = [["--onse"], ["--once", "-x"], ["--once=false"], ["--force"], ["--json"], ["--once", "--status"], [
  "",
]];
MISTAKES.push(["--on\nse"], ["--_"], ["-_"], ["-h5"], ["--h"], ["--no-once"], ["--listen="], [
  "--once",
  "--force=1",
]);
MISTAKES.push(["--listen=[::1"], ["--listen=[::1:80"], ["--listen=host name:1"], ["--listen=::1:80"]);
MISTAKES.push(["--listen"], ["--listen", "here"], ["--listen=1.2.3.4:65536"], ["--listen", "80", "--once"]);
MISTAKES.push(["--exec"], ["--once", "--exec", ""], ["--health", "--exec", "true"]);
MISTAKES.push(["--status", "--json", "--verbose"], ["--health", "--metrics"], ["--once", "--verbose"]);
const TRAPS = {
  ".env": "CODEX_AUTH_LOG_FORMAT=evil\n",
  "bunfig.toml": 'preload = ["./evil.ts"]\n',
  "evil.ts": 'require("node:fs").writeFileSync("evil", ""); process.exit(7);\n',
  ...Object.fromEntries(["package.json", "tsconfig.json", "deno.json"].map((name) => [name, "{ broken"])),
};

const MAIN: Scenario[] = [
  printed("the help names every flag and every variable", ["--help"], (text) => {
    for (const word of [...FLAGS, ...VARIABLES]) assert(text.includes(word), `no ${word}`);
  }),
  printed("the help and the README have the same flags, variables, defaults and exit codes", ["--help"], (text) => {
    const readme = fs.readFileSync(new URL("README.md", import.meta.url), "utf8");
    const page = /^## Settings and exit codes$([^]*?)^## /m.exec(readme)?.[1] ?? "";
    // Of each row of the tables and of each line of the help: names, and a default.
    const rows = page.split("\n").filter((line) => line.startsWith("| "))
      .map((line) => line.replaceAll("`", "").split("|").map((cell) => cell.trim()))
      .map(([, names = "", value = ""]) => [names, value]);
    const lines = [...text.matchAll(/^ {2}(\S.*?)(?: {2,}(.*))?$/gm)]
      .map(([, names = "", rest = ""]) => [names, / {2,}(.*)$/.exec(rest)?.[1] ?? ""]);
    const collect = (pairs: string[][]) =>
      pairs.flatMap(([names = "", value]) => {
        if (/^\d+$/.test(names)) return [`exit ${names}`];
        if (names.startsWith("-")) return names.match(/--?\w+/g) ?? [];
        return /^[A-Za-z]+_\w+(, \w+)*$/.test(names) ? names.split(", ").map((name) => `${name}=${value}`) : [];
      }).sort();
    assertEquals(collect(rows), collect(lines));
    assert(collect(rows).length >= FLAGS.length + VARIABLES.length + 5);
    for (const said of [/\/home\/agent\/.codex/, /With several homes: .*/]) {
      assert(page.includes(said.exec(text)?.[0] ?? "?"), String(said));
    }
  }),
  printed("the version names the engine", ["--version"], (text) => {
    assertMatch(text, /^codex_auth_refresh \d+\.\d+\.\d+ \((bun|deno|node) [\d.]+\)\n$/);
  }),
  drive("a Node.js that is too old or has no SQLite is a mistake, in one line", { forms: ["node"] }, async (stage) => {
    const found = new Deno.Command("node", { args: ["-p", "process.versions.node"] }).outputSync().stdout;
    const old = parseInt(new TextDecoder().decode(found)) < 24 ? [["node", String(BUNDLE)]] : [];
    for (const command of [[String(NODE), "--no-experimental-sqlite", String(BUNDLE)], ...old]) {
      const run = stage.spawn([...command, "--once"]);
      assertEquals([await run.ended, run.lines.length, run.stdout], [64, 1, ""], run.stderr);
      assertMatch(run.stderr, /needs Node\.js 24 or newer, with node:sqlite; this is \d+/);
    }
    assertEquals(fs.readdirSync(stage.home), ["auth.json"]);
  }),
  printed("the status asks nobody and changes nothing", ["--status"], (text, stage) => {
    assertEquals(shown(stage, text), NEVER_RUN);
  }),
  drive("--status tells people how a home stands", {
    age: 2 * HOUR + 1830,
    edit: (it) => {
      const now = Math.floor(Date.now() / 1000);
      it.tokens.access_token = jwt({ iat: now - 5 * DAY, exp: now + 5 * DAY + 1800 });
    },
  }, async (stage) => {
    writeRun(stage.home);
    const run = stage.start("--status");
    assertEquals([await run.ended, run.stderr], [0, ""]);
    assertEquals(shown(stage, run.stdout), ALL_RIGHT);
  }),
  drive("--status tells people how several homes stand, the worst first", {}, async (stage) => {
    const none = join(stage.dir, "a-home-without-any-login");
    fs.mkdirSync(none);
    const good = stage.plant("a-home-that-is-all-right", 10 * DAY + 1800, 60).home;
    writeRun(good);
    const run = stage.start("--status", none, good, stage.plant("a-home-with-a-login-that-expired").home);
    assertEquals([await run.ended, run.stderr], [0, ""]);
    assertEquals(shown(stage, run.stdout), THREE_HOMES);
  }),
  drive("--status has colours on a terminal, but with NO_COLOR", { ...FRESH, skip: !HAS_SCRIPT }, async (stage) => {
    const command = FORMS[stage.form]?.map((word) => `'${word}'`).join(" ");
    const line = "DIR/home: healthy, fresh";
    const rows: [Record<string, string>, string][] = [[{}, `^[32m${line}^[0m`], [{ NO_COLOR: "1" }, line]];
    for (const [env, state] of rows) {
      const run = stage.spawn(["sh", "-c", 'script -qec "$0 $1" /dev/null', String(command), "--status"], env);
      assertEquals(await run.ended, 0, run.stdout);
      const [, first, ...others] = shown(stage, run.stdout.replaceAll("\r", "")).replaceAll("\x1b", "^").split("\n");
      assertEquals([first, others.some((line) => line.includes("^"))], [state, false]);
    }
  }),
  printed("the status comes as JSON for machines", ["--status", "--json"], (text, stage) => {
    const status = JSON.parse(text) as Fields;
    assertEquals(status.last_refresh, (JSON.parse(stage.text() ?? "") as Fields).last_refresh);
    assert(Number(status.last_refresh_age_seconds) >= 9 * DAY);
  }),
  ...MISTAKES.map((args) => ({ name: `it is a mistake to say ${JSON.stringify(args.join(" "))}`, args, exit: 64 })),
  drive("what comes after -- is a home", {}, async (stage) => {
    const { home } = stage.plant("--once");
    await stage.start("--once", "--", "--once", "true").ended;
    assertEquals([stage.status(home).watchdog_last_outcome, stage.mock.requests.length], ["refreshed", 1]);
  }),
  drive(
    "--health is one line, and its exit code tells",
    { ...FRESH, answers: [status(401, "invalid_grant")] },
    async (stage) => {
      const health = async (exit: number, line: RegExp, ...homes: string[]) => {
        const run = stage.start("--health", ...homes);
        assertEquals([await run.ended, run.stderr], [exit, ""]);
        assertMatch(run.stdout, line);
      };
      await health(0, /^healthy: \/[^\n]*: fresh\n$/);
      const odd = stage.plant("odd\nname", 10 * DAY, 60).home;
      await health(0, /^healthy: 0 of 2 homes unhealthy; [^\n]*\n$/, odd, stage.home);
      await stage.once("3 fail:permanent_401", "--force");
      await health(1, /^unhealthy: [^\n]*: the login is dead, [^\n]* \(fail:permanent_401, invalid_grant\)\n$/);
      await health(1, /^unhealthy: 1 of 2 homes unhealthy; [^\n]*\n$/, odd, stage.home);
      await stage.once("1 skip"); // fresh, and yet dead
      await health(1, /the login is dead, the endpoint refuses its refresh token\n$/);
      fs.writeFileSync(stage.auth, "{");
      await health(1, /auth\.json holds no JSON[^\n]* \(unreadable:SyntaxError\)\n$/);
      fs.writeFileSync(stage.auth, "");
      await health(0, /no login yet\n$/);
    },
  ),
  drive(
    "--status fits into 80 columns, has no colours in a pipe, and shows the e-mail address when asked",
    {},
    async (stage) => {
      fs.writeFileSync(join(stage.home, "config.toml"), 'cli_auth_credentials_store = "keyring"\n[x]\n');
      await stage.once("0 refreshed");
      const { home } = stage.plant("second", 10 * DAY, 60);
      for (const args of [[], ["--verbose"], [stage.home, home]]) {
        const run = stage.start("--status", ...args);
        assertEquals([await run.ended, run.stderr], [0, ""]);
        assert(run.stdout.includes("keyring") && !run.stdout.includes("\x1b"), run.stdout);
        assertEquals(run.stdout.includes("user@example.com"), args[0] === "--verbose", run.stdout);
        const words = run.stdout.split("\n").filter((line) =>
          line.length > 80 && /\s\S/.test(line.slice(80).replace(/^\S+/, ""))
        );
        assertEquals(words, []);
      }
    },
  ),
  drive(
    "what cannot be printed is a failure",
    { forms: fs.existsSync("/dev/full") ? undefined : [] },
    async (stage) => {
      for (const mode of ["--status", "--metrics", "--help"]) {
        const run = stage.spawn(["sh", "-c", 'exec "$@" >/dev/full', "sh", ...FORMS[stage.form] ?? [], mode]);
        assertEquals([await run.ended, run.lines.length], [2, 1], run.stderr);
        assertMatch(run.stderr, /^codex_auth_refresh: stdout: the disk is full/);
      }
    },
  ),
  drive("a reader of stdout that has gone is no failure", {}, async (stage) => {
    const gone = 'mkfifo "$0"; exec 9<>"$0" 8>"$0" 9<&-; exec "$@" >&8';
    for (const mode of ["--status", "--metrics", "--help"]) {
      const command = ["sh", "-c", gone, join(stage.dir, `pipe${mode}`), ...FORMS[stage.form] ?? [], mode];
      const run = stage.spawn(command);
      assertEquals([await run.ended, run.stderr], [0, ""], mode);
    }
  }),
  drive("a home whose folder cannot be entered does not stop another", { forms: startable }, async (stage) => {
    if (ROOT) belong(stage);
    const locked = join(stage.dir, "locked");
    fs.mkdirSync(locked, { mode: 0 });
    const run = stage.spawn([...NOBODY, ...FORMS[stage.form] ?? [], "--once", join(locked, "home"), stage.home]);
    await stage.expect(run, "0 refreshed");
    assert(run.says(`[${join(locked, "home")}] no-op: unreadable:EACCES`) && stage.isNewest(), run.stderr);
    fs.chmodSync(locked, 0o755);
  }),
  drive("a slow reader of a pipe that does not block gets all of it", {}, async (stage) => {
    const homes = Array.from({ length: 150 }, (_, index) => join(stage.dir, `home${index}`));
    // dd leaves the pipe as one that does not block.
    const slow = '{ dd if=/dev/null oflag=nonblock 2>&-; "$@" || echo failed; } | { sleep 1; cat >all; }';
    const run = stage.spawn(["sh", "-c", slow, "sh", ...FORMS[stage.form] ?? [], "--status", "--json", ...homes]);
    assertEquals(await run.ended, 0, run.stderr);
    assertEquals((JSON.parse(stage.text(join(stage.dir, "all")) ?? "") as unknown[]).length, 150);
  }),
  drive("--listen answers three paths beside the loop, and tells no path but the home's", FRESH, async (stage) => {
    fs.linkSync(stage.auth, join(stage.dir, "second"));
    const run = stage.start("--listen", "0", stage.home);
    await run.said(/^listening on 127\.0\.0\.1 port \d+$/);
    const [, port] = /port (\d+)/.exec(run.stderr) ?? [];
    const ask = async (path: string, method = "GET") => {
      const answer = await fetch(`http://127.0.0.1:${port}${path}`, { method });
      return { status: answer.status, text: await answer.text() };
    };
    await run.said(/^next check/);
    assertEquals((await ask("/healthz")).status, 200);
    assertMatch((await ask("/metrics")).text, /^codex_auth_refresh_healthy\{home=".*"\} 1$/m);
    assertEquals((JSON.parse((await ask("/status?x")).text) as Fields).home, stage.home);
    for (const path of ["/", "/auth.json", "/status/", "//status"]) assertEquals((await ask(path)).status, 404, path);
    assertEquals((await ask("/status", "POST")).status, 405);
    for (const path of ["/healthz", "/metrics", "/status"]) {
      const head = await ask(path, "HEAD");
      assertEquals([head.status, head.text], [200, ""], path);
    }
    fs.writeFileSync(stage.auth, authJson(stage.mock.login({ accessTokenSeconds: -5 }), new Date(0)));
    run.kill("SIGHUP");
    await run.said(/second hard link/);
    await run.said(/^next check .*backoff/);
    assertEquals((await ask("/healthz")).status, 503);
    const told = await ask("/status");
    assert(/"watchdog_last_outcome": "fail:preflight"/.test(told.text) && !told.text.includes(stage.auth), told.text);
    run.kill("SIGTERM");
    assertEquals(await run.ended, 0, run.stderr);
  }),
  drive("a home that does not exist is a warning", {}, async (stage) => {
    const absent = join(stage.dir, "absent");
    const run = stage.start(absent);
    await run.said(/^next check/);
    assert(run.says(/absent: the folder does not exist$/m) && !fs.existsSync(absent), run.stderr);
    run.kill("SIGTERM");
    assertEquals(await run.ended, 0, run.stderr);
    const status = stage.start("--status", absent);
    assertEquals(await status.ended, 0);
    assertMatch(status.stdout, /warning: the folder does not exist/);
  }),
  drive("a port that is in use may be free at the next start", FRESH, async (stage) => {
    const taken = net.createServer();
    await new Promise<void>((go) => taken.listen(0, "127.0.0.1", go));
    const { port } = taken.address() as net.AddressInfo;
    const run = stage.start("--listen", `${port}`);
    assertEquals(await run.ended, 2, run.stderr);
    assert(run.says(/EADDRINUSE/), run.stderr);
    taken.close();
  }),
  drive("it is a mistake to name a file in place of a home", {}, async (stage) => {
    const run = stage.start("--once", stage.auth);
    assertEquals([await run.ended, run.lines.length], [64, 1], run.stderr);
    assert(run.stderr.includes(stage.auth), run.stderr);
  }),
  drive("a bad value of any variable is one line that names it, and touches nothing", {}, async (stage) => {
    const before = [stage.text(), ...fs.readdirSync(stage.home)];
    for (const [name, [value = ""], allowed] of BAD_VALUES) {
      const run = stage.spawn([...FORMS[stage.form] ?? [], "--once"], {
        [URL_NAME]: "https://127.0.0.1:1/",
        [name]: value,
      });
      assertEquals([await run.ended, run.lines.length], [64, 1], run.stderr);
      for (const part of [name, value, allowed]) assert(run.stderr.includes(part), run.stderr);
    }
    assertEquals([stage.text(), ...fs.readdirSync(stage.home)], before);
  }),
  ends(
    "log lines come as JSON for machines",
    "0 refreshed",
    { env: { CODEX_AUTH_LOG_FORMAT: "json" } },
    (_, { lines }) => {
      const objects = lines.map((line) => JSON.parse(line) as Fields);
      assertEquals(objects.map(({ level }) => level), ["info", "info"]);
      const keys = objects.map((each) => Object.keys(each).sort().join(" "));
      assertEquals(keys, [
        "endpoint event home level message reasons time",
        "event home http level message rotated time",
      ]);
      for (const { time, message } of objects) assert(Date.parse(String(time)) > 0 && message !== "");
      assertMatch(String(objects[0]?.reasons), /^exp_in=-36\d\ds<=14400s,last_refresh_age=7776\d\ds>=604800s$/);
      assertEquals([objects[1]?.http, objects[1]?.rotated], ["200", "id_token,access_token,refresh_token"]);
    },
  ),
  drive(
    "the executable is no other program, whatever it finds in the folder or the environment that it is started in",
    { forms: ["executable"] },
    async (stage) => {
      for (const [name, text] of Object.entries(TRAPS)) fs.writeFileSync(join(stage.dir, name), text);
      await stage.once("0 refreshed");
      const preload = { BUN_OPTIONS: "--preload ./evil.ts", BUN_INSPECT_PRELOAD: "./evil.ts" };
      for (const [name, value] of Object.entries({ BUN_BE_BUN: "1", BUN_INSPECT: "127.0.0.1:0/", ...preload })) {
        await stage.expect(
          stage.spawn([...FORMS[stage.form] ?? [], "--once", "--force"], { [name]: value }),
          "0 refreshed",
        );
      }
      assertEquals(stage.mock.requests.length, 5);
      assertEquals(fs.existsSync(join(stage.dir, "evil")), false);
    },
  ),
];

const SCENARIOS: Scenario[] = [DECIDE, POST, APPLY, STATUS, ATTEMPT, EXEC, LOOP, MAIN].flat();

const ONLY = Deno.env.get("CAR_ONLY") ?? "";
// Scenarios run side by side, so nothing can tell whose a resource is.
const UNWATCHED = { sanitizeOps: false, sanitizeResources: false, sanitizeExit: false };
Deno.test({
  name: "the program, in its four forms",
  ...UNWATCHED,
  async fn(test) {
    const wanted = SCENARIOS.filter(({ name }) => name.includes(ONLY));
    const left = wanted.flatMap((scenario) => Object.keys(FORMS).map((form) => ({ scenario, form })));
    assertEquals(new Set(wanted.map(({ name }) => name)).size, wanted.length, "two scenarios of one name");
    const work = async () => {
      for (let next = left.shift(); next !== undefined; next = left.shift()) {
        const { scenario, form } = next;
        const dir = join(scratch, `${SCENARIOS.indexOf(scenario)}_${form}`);
        const fn = () => perform(scenario, form, dir);
        const ignore = scenario.skip || scenario.forms?.includes(form) === false;
        const name = `${scenario.name} (${form}${ignore ? ": skipped, it cannot be tried here" : ""})`;
        await test.step({ name, ignore, fn, ...UNWATCHED });
      }
    };
    await Promise.all(Array.from({ length: 8 }, work));
  },
});
