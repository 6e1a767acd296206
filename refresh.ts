#!/usr/bin/env -S deno run --allow-read --allow-write --allow-env --allow-net --allow-sys=uid
/**
 * codex_auth_refresh keeps the Codex CLI's ChatGPT login alive while nobody uses it.
 *
 * The Codex CLI refreshes `$CODEX_HOME/auth.json` only when it is used. A workspace that sits idle for more than eight
 * days loses its login, and a human has to sign in again. This program looks at the file from time to time, redeems the
 * refresh token before it is too late and stores the answer.
 *
 * Refresh tokens are single use. Whoever redeems one and does not store the answer has destroyed the login, and of two
 * processes that redeem the same one the second is locked out. Most of what follows is about these two sentences:
 *
 *   (before them)   what all of them use: tokens that cannot be printed, the log, files, disks that hang
 *   configuration   what the environment says
 *   decide          text and clock in, verdict out
 *   post            the one request, the only part that touches the network
 *   apply           lock, proof, store, roll-forward: the only part that writes auth.json
 *   status          what the last attempt left, and how people, probes and scrapers see it
 *   attempt         the four in a row
 *   loop            when to look next, for one home or a thousand
 *   main            the command line
 *
 * @module
 */
import { Buffer } from "node:buffer";
import * as fs from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import process from "node:process";
import type { DatabaseSync } from "node:sqlite";
import { parseArgs, promisify } from "node:util";
import { decodeBase64Url as untypedDecodeBase64Url } from "@std/encoding/base64url";
import { parse as parseToml } from "@std/toml/parse";

export const VERSION = "1.0.0";

const decodeBase64Url: (text: string) => Uint8Array = untypedDecodeBase64Url;
const fsync = promisify(fs.fsync);
/**
 * A module of the engine when it is first needed: an import would be loaded every time. The function, too, is looked up
 * late: Deno takes two milliseconds to make it.
 */
const builtin = ((name: string) => process.getBuiltinModule(name)) as typeof process.getBuiltinModule;
const versions: Readonly<Record<string, string | undefined>> = process.versions;
const ENGINE = versions.deno !== undefined ? "deno" : versions.bun !== undefined ? "bun" : "node";
const SECOND = 1000;
const MINUTE = 60 * SECOND;
/** Milliseconds for measuring how long something takes, whatever happens to the clock on the wall. */
const uptime = () => performance.now();

// What is tuned, and why it is what it is.
const TRY_MS = 30 * SECOND; // a request, body included, as the reference had it
const ALL_TRIES_MS = 60 * SECOND; // all requests of an attempt: a repeat works for a short while or not at all
const PROBE_AFTER_MS = 5 * SECOND; // an answer that takes that long may be one that cannot come
const MAX_ANSWER_BYTES = 1 << 20; // answers seen have six kilobytes
const ROOM_BYTES = 128 << 10; // what the journal keeps free for one
const MAX_FILE_BYTES = 16 << 20; // an auth.json has a few kilobytes; whatever is larger is none
const LOCK_WAIT_MS = 180 * SECOND; // longer than an attempt with all its tries and a slow disk
const PLACES = 8; // attempts at a time that hold a lock, a journal and a connection
const TORN_MS = 0.5 * SECOND; // a Codex CLI that truncates and then writes is done by then
const WRITER_MS = 5 * SECOND; // the same once an answer waits: a slow writer is not taken for a dead one
const LOOK_AGAIN_MS = 3 * SECOND; // the Codex CLI may take that long to write what it got for the token that we were refused
const LONGEST_LIFE_MS = 10 * 365 * 24 * 60 * MINUTE; // an `exp` beyond is in the wrong unit, or of a clock gone wrong
const REMEMBERED = 128; // tokens that the last net knows
const STEP_MS = 45 * SECOND; // the longest sleep: a new login is noticed within a minute
const EXEC_MS = 60 * SECOND; // what the operator's command may take
const EXEC_STOP_MS = 5 * SECOND; // the same once a SIGTERM has come
const MAX_OUTPUT = 16 << 10; // how much of what it prints goes into the log
const MAX_LINES = 4096; // of the log that wait for a pipe that blocks: a thousand homes have two thousand to say
const HUNG_MS = 10 * SECOND; // a disk that takes longer to say whether a file is there does not answer
const FIRST_BACKOFF_MS = 5 * SECOND; // doubles with each failure, up to the interval

// ── what every section uses ──────────────────────────────────────────────────────────────────────────────────────────
// Tokens that cannot be printed by accident and the log, files and their errors, disks that hang, sleep.

/**
 * A token by itself. Printed, interpolated, inspected, serialised or thrown it shows `[redacted]`; only `post` and `apply`
 * open it. The latest values, those in documents too, are remembered: a last net for one that comes back from outside, in
 * an answer say.
 */
export class Secret {
  static #recent: string[] = [];
  readonly #value: string;

  constructor(value: string) {
    this.#value = value;
    // Anything as short as a word would garble every line.
    if (value.length > 8) {
      Secret.#recent = [...Secret.#recent.filter((each) => each !== value).slice(1 - REMEMBERED), value];
    }
  }
  /** Replaces every token that is known by now. */
  static redact(text: string): string {
    return Secret.#recent.reduce((rest, value) => rest.replaceAll(value, "[redacted]"), text);
  }
  /** Whether a word holds a token that is known by now, or is a piece of one of more than eight characters. */
  static isShownBy(word: string): boolean {
    return Secret.#recent.some((value) => word.includes(value) || word.length > 8 && value.includes(word));
  }
  /** The value itself, for the request's body and for auth.json. */
  open = (): string => this.#value;
  /** The start of its SHA-256: tells tokens apart and gives none away. */
  fingerprint = (): string =>
    builtin("node:crypto").createHash("sha256").update(this.#value).digest("hex").slice(0, 16);
  toString = (): string => "[redacted]";
  toJSON = this.toString;
  [Symbol.for("nodejs.util.inspect.custom")](): string {
    return "[redacted]";
  }
  [Symbol.for("Deno.customInspect")](): string {
    return "[redacted]";
  }
}

/** A word that somebody else wrote, if it is harmless enough to repeat: letters, where digits may be a piece of a token. */
function tame(word: unknown, form = /^[a-z_]{1,40}$/i): string | null {
  return typeof word === "string" && form.test(word) && !Secret.isShownBy(word) ? word : null;
}

/** No control characters or line separators: a file name may hold a line break, a log line may not. */
function oneLine(text: string): string {
  return text.replace(/[^ -~\xa0-\u2027\u202a-\uffff]/g, "?");
}

export type Log = (level: "info" | "warning" | "error", event: string, text: string) => void;

/** A log for one home; where there are several, each line names its home. */
export function logTo(
  write: (line: string) => void,
  format: Settings["logFormat"],
  home: Home | null,
  many: boolean,
): Log {
  return (level, event, text) => {
    const time = new Date().toISOString().replace(/\.\d+Z$/, "Z");
    const message = oneLine(Secret.redact(text));
    const name = home !== null && many ? `[${oneLine(home.dir)}] ` : "";
    if (format === "text") return write(`[codex_auth_refresh ${time}] ${name}${message}`);
    const pairs = [...message.matchAll(/(?<=[ (]|^)([a-z_]+)=([^\s()]+)/g)].map(([, key, value]) => [key, value]);
    write(JSON.stringify({ ...Object.fromEntries(pairs), time, level, event, home: home?.dir ?? null, message }));
  };
}

async function sleep(milliseconds: number, signal?: AbortSignal): Promise<void> {
  await builtin("node:timers/promises").setTimeout(milliseconds, undefined, { signal }).catch(() => {}); // woken
}

/** A system error's code, else the error's class: what a log line may say of it. */
function errorName(error: unknown): string {
  const { code, name } = error as { code?: unknown; name?: unknown };
  const word = [code, name].find((word) => typeof word === "string" && /^\w+$/.test(word)) as string | undefined;
  return word === "EOPNOTSUPP" ? "ENOTSUP" : word ?? "Error"; // Linux has one number for both, and engines either name
}

class DiskError extends Error {
  constructor(readonly code: string) {
    super(code);
  }
}

/** Why no token is spent here, as a sentence for the operator. */
class CannotStart extends Error {}

/** For what may fail, where that is all there is to know: null then. */
function quietly<T>(call: () => T): T | null {
  try {
    return call();
  } catch {
    return null;
  }
}

/** What there is at a path; null where nothing is, or nothing to be seen. */
function statOf(path: string, look: (path: string) => fs.Stats = fs.statSync): fs.Stats | null {
  return quietly(() => look(path));
}

/** All of a regular file. Throws a {@link DiskError} for anything else. */
function readBytes(path: string, flags = 0): Uint8Array {
  // O_NONBLOCK: a FIFO in this place must not hang us.
  const fd = fs.openSync(path, fs.constants.O_RDONLY | fs.constants.O_NONBLOCK | flags);
  try {
    const stat = fs.fstatSync(fd);
    if (!stat.isFile()) throw new DiskError(stat.isDirectory() ? "EISDIR" : "EFTYPE");
    if (stat.size > MAX_FILE_BYTES) throw new DiskError("EFBIG");
    return fs.readFileSync(fd);
  } finally {
    closeQuietly(fd);
  }
}

function readText(path: string): string | null {
  return quietly(() => new TextDecoder().decode(readBytes(path)));
}

/** What cannot be removed is gone already, or for the next attempt to find. */
function removeQuietly(path: string): void {
  quietly(() => fs.unlinkSync(path));
}

/** What matters was fsynced before; an error of close() has nothing to add. */
function closeQuietly(fd: number): void {
  quietly(() => fs.closeSync(fd));
}

/**
 * The path with symlinks resolved, as far as it exists. Bun does not find what is renamed over in that very moment, so that
 * a second look is needed.
 */
function realPath(path: string, again = true): string {
  try {
    return fs.realpathSync(path);
  } catch {
    if (again && fs.existsSync(path)) return realPath(path, false);
    return dirname(path) === path ? path : join(realPath(dirname(path)), basename(path));
  }
}

/** Calls on the disks of homes that have not returned yet. */
const outstanding = new Map<string, Promise<boolean>>();

/**
 * Whether a home's disk answers. A call on a network mount that hangs can be neither waited for nor taken back, and would
 * stop the whole process: so another thread makes one first. It keeps that thread, of which engines have few.
 */
async function diskAnswers(dir: string): Promise<boolean> {
  const done = () => outstanding.delete(dir);
  const call = outstanding.get(dir) ?? fs.promises.stat(join(dir, "auth.json")).then(done, done);
  outstanding.set(dir, call);
  const late = new AbortController();
  const answered = await Promise.race([call.then(() => true), sleep(HUNG_MS, late.signal).then(() => false)]);
  late.abort();
  return answered;
}

/** The same, and tells of one that does not. */
async function reaches({ dir }: Home, log: Log): Promise<boolean> {
  const answered = await diskAnswers(dir);
  if (!answered) log("error", "disk_hangs", `the disk under ${dir} does not answer, it is left alone`);
  return answered;
}

// ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────────
// Everything comes from the environment and is checked before anything is touched. A variable that is set to the empty
// string counts as unset; a bad value is one clear line and exit code 64.

/** The client id that the Codex CLI presents (codex-rs/login/src/auth/manager.rs, CLIENT_ID). */
const DEFAULT_CLIENT_ID = "app_EMoamEEZ73f0CkXaXp7hrann";
const DEFAULT_URL = "https://auth.openai.com/oauth/token";

/** What the environment decides. Durations are whole seconds; `caFile` is read when a request is due. */
export interface Settings {
  readonly intervalSeconds: number;
  readonly marginSeconds: number;
  readonly staleSeconds: number;
  readonly url: URL;
  readonly clientId: string;
  readonly proxy: URL | null;
  readonly caFile: { readonly name: string; readonly path: string } | null;
  readonly inPlace: boolean;
  readonly logFormat: "text" | "json";
}

/** A mistake of the caller: one line, exit code 64. */
export class UsageError extends Error {}

type Environment = Readonly<Record<string, string | undefined>>;

/** Reads the settings; throws a {@link UsageError} that names the variable, the value and what is allowed. */
export function readSettings(env: Environment): Settings {
  const bad = (name: string, value: string, allowed: string) =>
    new UsageError(`${name}=${JSON.stringify(value)}: must be ${allowed}`);
  const seconds = (name: string, preset: number, least: number) => {
    const value = env[name] || String(preset);
    if (/^[0-9]+$/.test(value) && Number.isSafeInteger(+value) && +value >= least) return +value;
    throw bad(name, value, `a whole number of seconds, at least ${least}`);
  };
  const oneOf = <T extends string>(name: string, ...allowed: T[]): T => {
    const value = env[name] || allowed[0];
    const found = allowed.find((each) => each === value);
    if (found === undefined) throw bad(name, value ?? "", allowed.join(" or "));
    return found;
  };
  const url = (name: string, value: string, allowed: string, test: (url: URL) => boolean): URL => {
    const parsed = URL.canParse(value) ? new URL(value) : null;
    if (parsed === null || !test(parsed)) throw bad(name, value.replace(/^.*@/s, "…@"), allowed); // no password
    return parsed;
  };

  const allowHttp = oneOf("CODEX_AUTH_ALLOW_HTTP", "0", "1") === "1";
  const endpoint = url(
    "CODEX_REFRESH_TOKEN_URL_OVERRIDE",
    env.CODEX_REFRESH_TOKEN_URL_OVERRIDE || DEFAULT_URL,
    "an https URL without user and password, or http to a loopback host (CODEX_AUTH_ALLOW_HTTP=1: to any)",
    ({ username, password, protocol, hostname }) =>
      username + password === "" &&
      (protocol === "https:" || protocol === "http:" && (allowHttp || isLoopback(hostname))),
  );
  const proxyName = proxyNames(endpoint).find((name) => env[name] && !bypassesProxy(endpoint.hostname, env));
  const isProxy = ({ protocol }: URL) => /^https?:$/.test(protocol);
  const caName = env.CODEX_CA_CERTIFICATE ? "CODEX_CA_CERTIFICATE" : "SSL_CERT_FILE";
  const caPath = env[caName];
  if (caPath && readText(caPath) === null) throw bad(caName, caPath, "a PEM file with root certificates");
  return {
    intervalSeconds: seconds("CODEX_AUTH_REFRESH_INTERVAL_SECONDS", 21600, 1),
    marginSeconds: seconds("CODEX_AUTH_SAFETY_MARGIN_SECONDS", 14400, 0),
    staleSeconds: seconds("CODEX_AUTH_STALE_AFTER_SECONDS", 604800, 1),
    url: endpoint,
    clientId: env.CODEX_APP_SERVER_LOGIN_CLIENT_ID || DEFAULT_CLIENT_ID,
    proxy: proxyName ? url(proxyName, proxyUrl(env[proxyName] ?? ""), "the URL of an http proxy", isProxy) : null,
    caFile: caPath ? { name: caName, path: caPath } : null,
    inPlace: oneOf("CODEX_AUTH_IN_PLACE", "0", "1") === "1",
    logFormat: oneOf("CODEX_AUTH_LOG_FORMAT", "text", "json"),
  };
}

function isLoopback(host: string): boolean {
  return host === "localhost" || host === "[::1]" || /^127(\.\d+){3}$/.test(host);
}

/**
 * The variables in which curl looks for the proxy to an endpoint, the first that is set. HTTP_PROXY is none of them: a
 * web server hands it to its programs from a header of the request.
 */
function proxyNames({ protocol }: URL): string[] {
  return [...(protocol === "https:" ? ["https_proxy", "HTTPS_PROXY"] : ["http_proxy"]), "all_proxy", "ALL_PROXY"];
}

/** A proxy's URL, http where it names none; a bare percent sign and a backslash in user and password are themselves. */
function proxyUrl(text: string): string {
  const [, scheme = "http://", login, rest = ""] = /^([a-z0-9]+:\/\/)?(?:(.*)@)?(.*)$/is.exec(text) ?? [];
  if (login === undefined) return scheme + rest;
  const plain = login.replace(/%(?![0-9a-f]{2})/gi, "%25").replaceAll("\\", "%5c");
  return `${scheme}${plain}@${rest}`;
}

/** Whether NO_PROXY names a host, as curl reads it: an asterisk alone, domains, addresses and networks. */
export function bypassesProxy(hostname: string, env: Environment): boolean {
  const list = (env.no_proxy || env.NO_PROXY || "").trim().toLowerCase();
  if (list === "" || list === "*") return list === "*";
  const { BlockList, isIP } = builtin("node:net");
  const family = (address: string) => isIP(address) === 6 ? "ipv6" : "ipv4";
  const host = hostname.replace(/^\[|\]$|\.$/g, "");
  return list.split(/[\s,]+/).some((entry) => {
    const [name = "", bits] = entry.replace(/^\.|\.$|[[\]]/g, "").split("/");
    if (name === host || name !== "" && !isIP(host) && host.endsWith(`.${name}`)) return true;
    if (!isIP(host) || !isIP(name) || !/^\d{1,3}$/.test(bits ?? "") || Number(bits) > (isIP(name) === 6 ? 128 : 32)) {
      return false;
    }
    const network = new BlockList();
    network.addSubnet(name, Number(bits), family(name));
    return network.check(host, family(host));
  });
}

/** One CODEX_HOME as it was named, and its status file. */
export interface Home {
  readonly dir: string;
  readonly status: string;
}

/** The homes to look after: the arguments, else CODEX_HOME, else the Codex CLI's default. One named twice is one. */
export async function readHomes(names: readonly string[], env: Environment): Promise<Home[]> {
  const preset = env.CODEX_HOME || (env.HOME ? join(env.HOME, ".codex") : "/home/agent/.codex");
  const all = (names.length > 0 ? names : [preset]).map(async (name): Promise<[real: string, home: Home]> => {
    if (name === "") throw new UsageError("an empty CODEX_HOME argument");
    const dir = resolve(name.replace(/^~(?=\/|$)/, env.HOME || "~")); // no shell has expanded it
    const home = { dir, status: join(dir, STATUS_FILE) };
    if (names.length > 1 && !await diskAnswers(dir)) return [dir, home];
    const found = statOf(dir);
    if (found?.isDirectory() === false) {
      throw new UsageError(`${dir}: not a directory; name the folder that holds auth.json`);
    }
    if (found === null && /[\p{Cc}\ufffd]|^(["']).*\1$/su.test(name)) {
      throw new UsageError(`CODEX_HOME=${JSON.stringify(name)}: must be a path, without quotes or control characters`);
    }
    return [realPath(dir), home];
  });
  const homes = new Map<string, Home>();
  for (const [real, home] of await Promise.all(all)) if (!homes.has(real)) homes.set(real, home);
  return [...homes.values()];
}

// ── decide ───────────────────────────────────────────────────────────────────────────────────────────────────────────
// Is the login due? Pure: what was read and the clock go in, a verdict comes out. Nothing here throws, whatever the file
// holds; what does not parse is unknown.

type JsonObject = Record<string, unknown>;

/** What a look at auth.json found. `torn`: its content is at fault, a writer may be at work. */
export type Read =
  | { readonly kind: "absent" | "empty" }
  | { readonly kind: "unreadable"; readonly error: string; readonly torn: boolean }
  | { readonly kind: "whole"; readonly text: string; readonly document: JsonObject };

/** What auth.json says of the login. Moments are milliseconds since 1970, null where unknown. */
export interface Credential {
  /** `last_refresh` to the letter, "" where there is none. */
  readonly lastRefresh: string;
  readonly lastRefreshMs: number | null;
  readonly expiresMs: number | null;
  readonly refreshToken: Secret | null;
}

export type Verdict = { readonly credential: Credential } & (Skip | Refresh);

interface Skip {
  readonly due: false;
  readonly why: "absent" | "unreadable" | "other mode" | "no token" | "fresh";
  /** The same for the log. */
  readonly text: string;
  /** Why auth.json cannot be read. `blocked`: not for its content, so that another look may succeed. */
  readonly error: string | null;
  readonly blocked: boolean;
}

interface Refresh {
  readonly due: true;
  readonly reasons: string;
  readonly token: Secret;
  readonly document: JsonObject;
}

type Rule = Pick<Settings, "marginSeconds" | "staleSeconds">;

/**
 * The verdict on a login; `force` asks even where it is fresh. The rule is the Codex CLI's own, applied earlier by the
 * margins in `settings` (is_stale_for_proactive_refresh in codex-rs/login/src/auth/manager.rs: access token expired, or
 * last_refresh eight days old).
 */
export function decide(read: Read, nowMs: number, { marginSeconds, staleSeconds }: Rule, force = false): Verdict {
  const document = read.kind === "whole" ? read.document : {};
  const credential = credentialOf(document, nowMs);
  const { lastRefreshMs, expiresMs, refreshToken: token } = credential;
  const skip = (why: Skip["why"], text: string, error: string | null = null, blocked = false): Verdict => (
    { credential, due: false, why, text, error, blocked }
  );
  const unreadable = (error: string, blocked: boolean) => skip("unreadable", `unreadable:${error}`, error, blocked);
  if (read.kind === "unreadable") return unreadable(read.error, !read.torn);
  if (read.kind !== "whole") return skip("absent", "no_auth_json");
  const mode = document.auth_mode ?? "";
  if (typeof mode !== "string") return unreadable("TypeError", false);
  // Logins from before auth_mode existed are ChatGPT's unless they hold another credential (AuthDotJson::resolved_mode in
  // codex-rs/login/src/auth/manager.rs).
  const others = ["OPENAI_API_KEY", "personal_access_token", "bedrock_api_key", "bedrock_access_keys"];
  if (mode === "" && others.some((name) => (document[name] ?? null) !== null)) {
    return skip("other mode", "auth_mode=none");
  }
  const modes = ["", "chatgpt", "chatgpt_auth_tokens"];
  if (!modes.includes(mode.toLowerCase())) {
    const shown = tame(mode, /^[ -~]{1,40}$/)?.toLowerCase() ?? "unknown";
    return skip("other mode", `auth_mode=${shown}`);
  }
  if (token === null) return skip("no token", "no_refresh_token");

  const exp = expiresMs === null ? null : Math.trunc((expiresMs - nowMs) / SECOND);
  const age = ageSeconds(lastRefreshMs, nowMs);
  const reasons: string[] = [];
  if (exp !== null && exp <= marginSeconds) reasons.push(`exp_in=${exp}s<=${marginSeconds}s`);
  if (age !== null && age >= staleSeconds) reasons.push(`last_refresh_age=${age}s>=${staleSeconds}s`);
  if (exp === null && age === null) reasons.push("unparseable_metadata");
  if (force && reasons.length === 0) reasons.push("forced");
  if (reasons.length === 0) return skip("fresh", `fresh exp_in=${exp ?? "unknown"}s age=${age ?? "unknown"}s`);
  return { credential, due: true, reasons: reasons.join(","), token, document };
}

function ageSeconds(ms: number | null, nowMs: number): number | null {
  return ms === null ? null : Math.max(0, Math.trunc((nowMs - ms) / SECOND));
}

function credentialOf(document: JsonObject, nowMs: number): Credential {
  const tokens = tokensOf(document);
  const text = typeof document.last_refresh === "string" ? document.last_refresh : "";
  const refreshed = parseTimestamp(text);
  return {
    lastRefresh: refreshed !== null || text.length <= 40 ? Secret.redact(text) : "",
    lastRefreshMs: refreshed !== null && refreshed <= nowMs + 5 * MINUTE ? refreshed : null,
    expiresMs: expiryOf(tokens.access_token ?? "", nowMs),
    refreshToken: tokens.refresh_token === undefined ? null : new Secret(tokens.refresh_token),
  };
}

const TOKEN_NAMES = ["id_token", "access_token", "refresh_token"] as const;
type TokenName = typeof TOKEN_NAMES[number];

/** The tokens of an auth.json: the strings among them that are not empty. */
function tokensOf({ tokens }: JsonObject): Partial<Record<TokenName, string>> {
  const pairs = TOKEN_NAMES.map((name) => [name, isObject(tokens) ? tokens[name] : null] as const);
  return Object.fromEntries(pairs.filter(([, value]) => typeof value === "string" && value !== ""));
}

function isObject(value: unknown): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value) && !isRawJSON(value);
}

/** Milliseconds since 1970 of an RFC 3339 timestamp, nine fractional digits at most, no zone meaning UTC; else null. */
export function parseTimestamp(text: string): number | null {
  const form = /^(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:[Zz]|([+-]\d\d:\d\d))?$/;
  const [whole, day, time, fraction = "", zone = "Z"] = form.exec(text) ?? [];
  const local = Date.parse(`${day}T${time}Z`);
  // Date.parse rolls the 30th of February over; such a date is none.
  if (whole === undefined || iso(local)?.startsWith(`${day}T${time}`) !== true) return null;
  const moment = Date.parse(`${day}T${time}.${fraction.padEnd(3, "0").slice(0, 3)}${zone}`);
  return Number.isNaN(moment) ? null : moment;
}

/** The claims of a JWT, unverified; null where it is none. */
export function claimsOf(jwt: string): JsonObject | null {
  const [, payload] = /^[^.]*\.([\w-]+)=*\./.exec(jwt) ?? [];
  if (payload === undefined) return null;
  const decode = () => new TextDecoder("utf-8", { fatal: true }).decode(decodeBase64Url(payload));
  const claims: unknown = quietly(() => JSON.parse(decode()));
  return isObject(claims) ? claims : null;
}

/** What OpenAI's tokens say of plan and account. */
function openaiClaims(jwt: string): JsonObject {
  const claims = claimsOf(jwt)?.["https://api.openai.com/auth"];
  return isObject(claims) ? claims : {};
}

/** The account that a login is for, null where it does not say. */
function accountOf(document: JsonObject): string | null {
  const { account_id } = isObject(document.tokens) ? document.tokens : {};
  const account = account_id ?? openaiClaims(tokensOf(document).id_token ?? "").chatgpt_account_id;
  return typeof account === "string" && account !== "" ? account : null;
}

/** The moment in which an access token dies, in milliseconds: `exp` of RFC 7519, 4.1.4. Null for one that cannot be meant. */
function expiryOf(accessToken: string, nowMs: number): number | null {
  const exp = claimsOf(accessToken)?.exp;
  const ms = typeof exp === "number" ? exp * SECOND : null;
  return iso(ms) === null || ms === null || ms - nowMs > LONGEST_LIFE_MS ? null : ms;
}

/** ISO 8601 in UTC; null for what a Date cannot hold. */
function iso(ms: number | null): string | null {
  return ms !== null && Math.abs(ms) <= 8.64e15 ? new Date(ms).toISOString() : null;
}

const { rawJSON, isRawJSON } = JSON as unknown as {
  rawJSON: (text: string) => unknown;
  isRawJSON: (value: unknown) => boolean;
};

/**
 * JSON with its numbers to the letter: `1.0e2` and twenty digits come out as they went in. Throws a SyntaxError, or a
 * RangeError for what nests deeper than the Codex CLI reads (serde_json: 128 levels).
 */
export function parseExact(text: string): unknown {
  const keep = (_key: string, value: unknown, context?: { source: string }) =>
    typeof value === "number" && context !== undefined ? rawJSON(context.source) : value;
  const nests = (value: unknown, levels: number): boolean =>
    typeof value !== "object" || value === null || isRawJSON(value) ||
    levels > 0 && Object.values(value).every((each) => nests(each, levels - 1));
  const value: unknown = JSON.parse(text, keep as (key: string, value: unknown) => unknown);
  if (!nests(value, 127)) throw new RangeError("nested too deeply");
  return value;
}

// ── post ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
// One POST in the shape that the Codex CLI uses; what comes back is judged here and nowhere else. A redirect is an answer
// like any other: following it would carry the token to another host.

/** The new tokens of an answer, and the moment that auth.json will name as last_refresh. */
export interface Grant {
  readonly tokens: Readonly<Partial<Record<TokenName, Secret>>>;
  readonly lastRefresh: string;
}

/**
 * What came of a request. `status` is 0 where no answer came at all; `lost` means that the request may have gone out
 * and its answer got lost, so that the token may be spent.
 */
export type Answer =
  | { readonly kind: "granted"; readonly status: number; readonly grant: Grant; readonly unusable: TokenName[] }
  | { readonly kind: "useless"; readonly status: number; readonly detail: string }
  | { readonly kind: "permanent"; readonly status: number; readonly code: string | null }
  | {
    readonly kind: "transient";
    readonly status: number;
    readonly detail: string;
    readonly retryAfterMs: number | null;
    readonly lost: boolean;
  };

/**
 * Error codes that say that a refresh token will never work again, in any case and at any status: the Codex CLI's four
 * (classify_refresh_token_failure in codex-rs/login/src/auth/manager.rs), and what else the server ends logins with.
 */
const DEAD_CODES = [
  "refresh_token_expired",
  "refresh_token_reused",
  "refresh_token_invalidated",
  "invalid_grant",
  "app_session_expired",
  "app_session_terminated",
  "invalid_refresh_token",
  "token_expired",
];

type Endpoint = Pick<Settings, "url" | "proxy" | "clientId">;

function isDead(answer: Answer): boolean {
  return answer.kind === "permanent" && answer.code !== null && DEAD_CODES.includes(answer.code);
}

/**
 * Further root certificates, PEM, one each; around them the file may hold anything. Throws a {@link CannotStart} where they
 * cannot be read, since then no server could be trusted.
 */
export function readRoots({ caFile }: Pick<Settings, "caFile">): string[] {
  if (caFile === null) return [];
  const { X509Certificate } = builtin("node:crypto");
  const fail = (why: string) => new CannotStart(`${caFile.name}=${caFile.path}: ${why}`);
  const text = readText(caFile.path) ?? "";
  const roots = text.match(/-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----/g);
  if (roots === null) throw fail(text === "" ? "cannot be read, or is empty" : "holds no PEM certificate");
  try {
    for (const root of roots) new X509Certificate(root);
  } catch {
    throw fail("holds a certificate that cannot be read");
  }
  return roots;
}

/**
 * What fetch takes beyond the standard's options; each engine ignores the other's. TLS is verified whatever the
 * environment says, and no connection is used twice: an engine may silently repeat a request on one that turns out dead.
 */
function engineOptions({ proxy }: Endpoint, roots: string[]): { options: object; close(): void } {
  const close = () => {};
  if (ENGINE === "deno") {
    try {
      const login = [proxy?.username ?? "", proxy?.password ?? ""];
      const [username = "", password = ""] = login.map((part) => decodeURIComponent(part));
      const basicAuth = username + password === "" ? {} : { basicAuth: { username, password } };
      const through = proxy === null ? {} : { proxy: { url: proxy.origin, ...basicAuth } };
      const client = Deno.createHttpClient({ caCerts: roots, poolMaxIdlePerHost: 0, http2: false, ...through });
      return { options: { client }, close: () => client.close() };
    } catch (error) {
      throw new CannotStart(`no TLS client could be set up: ${(error as Error).message}`);
    }
  }
  // Bun and Node.js take roots instead of their own, not beside them.
  const all = () => [...builtin("node:tls").rootCertificates, ...roots];
  if (ENGINE === "bun") {
    const tls = { rejectUnauthorized: true, ...(roots.length === 0 ? {} : { ca: all() }) };
    const through = proxy === null ? {} : { proxy: proxy.href };
    // Verbose, which a variable can ask for, shows the token; of what it decompresses, all is lost with a cut trailer.
    return { options: { keepalive: false, verbose: false, decompress: false, tls, ...through }, close };
  }
  const [tls, http] = [builtin("node:tls"), builtin("node:http")] as { [name: string]: unknown }[];
  const set = (what: string, since: string, call: unknown, value: unknown) => {
    if (typeof call !== "function") throw new CannotStart(`${what} need Node.js ${since}, this is ${versions.node}`);
    call(value);
  };
  if (roots.length > 0) set("further roots", "24.5", tls?.setDefaultCACertificates, all());
  // Where there is none that has to be said as well: NODE_USE_ENV_PROXY has it read the environment by itself.
  const href = proxy?.href ?? "http://none.invalid";
  const proxies = { http_proxy: href, https_proxy: href, no_proxy: proxy === null ? "*" : "" };
  if (proxy !== null || "setGlobalProxyFromEnv" in builtin("node:http")) {
    set("proxies", "24.14", http?.setGlobalProxyFromEnv, proxies);
  }
  return { options: {}, close };
}

/**
 * Redeems a refresh token: 30 s a try, 60 s for all. Where a connection broke or timed out after the request may have
 * gone out, the same token is sent again after about 1 s and 4 s: its answer is lost, but servers commonly accept a
 * repeat for a short while. `stop` ends that: the try in hand is finished, no further one is started. So does `still`,
 * where auth.json holds another token by now. Throws a {@link CannotStart} before anything is sent.
 */
export async function post(
  token: Secret,
  to: Endpoint,
  roots: string[],
  stop: AbortSignal,
  still: () => Promise<boolean>,
  log: Log,
): Promise<Answer> {
  const { options, close } = engineOptions(to, roots);
  const deadline = uptime() + ALL_TRIES_MS;
  const once = () => postOnce(token, to, options, Math.min(TRY_MS, Math.max(1, deadline - uptime())));
  try {
    for (const pause of [1 * SECOND, 4 * SECOND]) {
      const answer = await once();
      const again = answer.kind === "transient" && answer.lost && uptime() + pause < deadline;
      if (!again || stop.aborted) return answer;
      const why = "the token may be spent, and some servers accept a repeat";
      log("warning", "answer_lost", `refresh: ${answer.detail}; sending it again in ${pause / SECOND} s: ${why}`);
      await sleep(pause, stop);
      if (stop.aborted || !await still()) return answer;
    }
    return await once();
  } finally {
    close();
  }
}

async function postOnce(
  token: Secret,
  { url, proxy, clientId }: Endpoint,
  options: object,
  milliseconds: number,
): Promise<Answer> {
  let response: Response | null = null;
  let body = "";
  const judged = ({ status, headers }: Response): Answer => {
    new Secret(token.open()); // an error code that repeats it is not repeated
    return judge(status, body, headers.get("retry-after"), Date.now());
  };
  // Counted in steps: a process that was frozen meanwhile first reads the answer that waits for it.
  const timeout = new AbortController();
  let [left, ticked] = [milliseconds, uptime()];
  let probe = null as Probe | null;
  const timer = setInterval(() => {
    left -= Math.min(1000, uptime() - ticked);
    ticked = uptime();
    if (milliseconds - left >= PROBE_AFTER_MS) probe ??= probeConnection(proxy ?? url);
    if (left <= 0) timeout.abort(new DOMException("no answer in time", "TimeoutError"));
  }, 500);
  try {
    response = await fetch(url, {
      method: "POST",
      headers: {
        "content-type": "application/json",
        "user-agent": `codex_auth_refresh/${VERSION}`,
        "connection": "close",
        "accept-encoding": "identity", // what is compressed is lost with its trailer
      },
      body: JSON.stringify({ client_id: clientId, grant_type: "refresh_token", refresh_token: token.open() }),
      redirect: "manual",
      signal: timeout.signal,
      ...options,
    });
    for await (const text of readBody(response)) body += text;
    return judged(response);
  } catch (error) {
    // A refusal whose body got lost is still a refusal, and tokens that came whole are granted, whatever broke behind them.
    const answer = response === null ? null : judged(response);
    if (answer?.kind === "granted" || answer !== null && response?.ok === false) return answer;
    const { detail, sent } = describeFailure(error);
    const swallowed = timeout.signal.aborted && probe !== null && !probe.connected && response === null;
    return {
      kind: "transient",
      status: 0,
      detail: swallowed ? "no connection: nothing answers at that address" : detail,
      retryAfterMs: null,
      lost: response !== null || sent && !swallowed,
    };
  } finally {
    clearInterval(timer);
    probe?.end();
  }
}

interface Probe {
  readonly connected: boolean;
  end(): void;
}

/**
 * Whether connections are taken there at all. No engine tells whether a request that timed out had one. Where packets are
 * swallowed it hardly went out, and a repeat would not either.
 */
function probeConnection({ hostname, port, protocol }: URL): Probe {
  const host = hostname.replace(/^\[|\]$/g, "");
  const socket = builtin("node:net").connect({ host, port: Number(port) || (protocol === "https:" ? 443 : 80) });
  const probe = { connected: false, end: () => void socket.destroy() };
  socket.on("connect", () => probe.connected = true).on("error", () => {});
  return probe;
}

/** The text of an answer as it comes, up to the limit. */
async function* readBody({ body, headers }: Response): AsyncGenerator<string> {
  const decoder = new TextDecoder();
  let left = MAX_ANSWER_BYTES;
  // Asked for none, Deno leaves it to us what a server compresses all the same, and so does Bun, told to.
  const [packing] = /gzip$|^deflate$/.exec(headers.get("content-encoding")?.toLowerCase() ?? "") ?? [];
  const packed = ENGINE !== "node" && packing !== undefined;
  const plain = packed ? body?.pipeThrough(new DecompressionStream(packing as "gzip")) : body;
  for await (const bytes of plain ?? []) {
    yield decoder.decode(bytes.subarray(0, left), { stream: true });
    left -= bytes.length;
    if (left <= 0) break; // which cancels the stream
  }
  yield decoder.decode();
}

/** What an answer means. `retryAfter` is the header's value, `nowMs` the clock for its date form. */
export function judge(status: number, body: string, retryAfter: string | null, nowMs: number): Answer {
  const useless = (detail: string): Answer => ({ kind: "useless", status, detail });
  let parsed: unknown;
  try {
    parsed = JSON.parse(body);
  } catch {
    parsed = undefined;
  }
  const fields = isObject(parsed) ? parsed : {};
  if (status >= 200 && status <= 299) {
    if (parsed === undefined) return useless("the answer is not JSON");
    if (!isObject(parsed)) return useless("the answer is not an object");
    const given = TOKEN_NAMES.filter((name) => (fields[name] ?? null) !== null);
    const usable = given.filter((name) => isUsable(name, fields[name]));
    if (usable.length === 0) return useless("the answer holds no usable token");
    const tokens = Object.fromEntries(usable.map((name) => [name, new Secret(String(fields[name]))]));
    const unusable = given.filter((name) => !usable.includes(name));
    return { kind: "granted", status, grant: { tokens, lastRefresh: iso(nowMs) ?? "" }, unusable };
  }
  // The code stands in error.code, in error itself, or in code.
  const { error } = fields;
  const words = [isObject(error) ? error.code : error, fields.code];
  const dead = DEAD_CODES.find((code) => words.some((word) => typeof word === "string" && word.toLowerCase() === code));
  const code = dead ?? words.map((word) => tame(word)).find((word) => word !== null) ?? null;
  if (status === 401 || dead !== undefined) return { kind: "permanent", status, code };
  const detail = code ?? `the endpoint answered ${status}`;
  return { kind: "transient", status, detail, retryAfterMs: parseRetryAfter(retryAfter, nowMs), lost: false };
}

/**
 * Whether the Codex CLI can read a token back: a non-empty string that survived UTF-8, and will. An id_token must also decode
 * (parse_chatgpt_jwt_claims in codex-rs/login/src/token_data.rs: three parts that are not empty, no padding).
 */
function isUsable(name: TokenName, value: unknown): boolean {
  if (typeof value !== "string" || value === "" || !value.isWellFormed() || value.includes("\ufffd")) return false;
  return name !== "id_token" || /^[^.]+\.[^.=]+\.[^.]+/.test(value) && claimsOf(value) !== null;
}

/** Milliseconds to wait, from Retry-After's seconds or date (RFC 9110, 10.2.3); null where unclear. */
export function parseRetryAfter(value: string | null, nowMs: number): number | null {
  if (value === null) return null;
  if (/^\d+$/.test(value)) return Number(value) * SECOND;
  const date = /[a-z]/i.test(value) ? Date.parse(/GMT$/.test(value) ? value : `${value} GMT`) : NaN; // asctime has no zone
  return Number.isNaN(date) ? null : Math.max(0, date - nowMs);
}

/** Failures of fetch in the engines' words, the first that matches: what it means, and whether the request may have gone. */
const FAILURES: [words: RegExp, detail: string, sent: boolean][] = [
  [/ECONNREFUSED|Connection refused/i, "connection refused", false],
  [/FailedToOpenSocket|ports? .*blocked/i, "no connection could be opened", false],
  [/ENOTFOUND|EAI_|dns error|failed to lookup/i, "the host name does not resolve", false],
  [/TUNNEL|proxy/i, "the proxy did not connect", false],
  [/CERT|SIGNATURE|ALTNAME|UnknownIssuer/i, "TLS: certificate refused", false],
  [/client error \(Connect\)|CONNECT_TIMEOUT|EHOSTUNREACH|ENETUNREACH/i, "no connection", false],
  [/TimeoutError/, "no answer in time", true],
  [/ECONNRESET|reset|closed|SendRequest|reading a body|EPIPE/i, "the connection broke", true],
];

function describeFailure(error: unknown): { detail: string; sent: boolean } {
  type Failure = { name?: string; message?: string; code?: unknown };
  const { name, message, code, cause } = error as Failure & { cause?: Failure };
  const words = `${name} ${code ?? cause?.code} ${message} ${cause?.message}`;
  const text = words.replace(/https?:\S+/g, ""); // Deno names the URL, which may hold any word
  const [, detail, sent] = FAILURES.find(([pattern]) => pattern.test(text)) ?? [];
  return { detail: detail ?? tame(code ?? cause?.code) ?? tame(name) ?? "unknown error", sent: sent ?? true };
}

// ── apply ────────────────────────────────────────────────────────────────────────────────────────────────────────────
// The only part that writes auth.json. A lock keeps copies of this program apart. Before a token is spent a journal is
// laid beside auth.json: a file with room for the answer, made in every step that storing takes. The answer goes into it
// first of all, as the whole new document; from then on `settle` brings it into auth.json, however often it is
// interrupted: it is what stores, what tries again and what rolls forward.
//
//   the journal holds   auth.json holds                       what becomes of it
//   no whole document   anything                              removes the journal: no answer has come
//   an answer           the token it was given for            carries the answer over, and keeps every other field
//   an answer           nothing, or is cut off, for 5 s       stores the journal's document: the writer died
//   an answer           the answer's token                    done before: makes sure that it is on the disk
//   an answer           another token, or is gone for 5 s     leaves it alone: somebody logged in, out or refreshed

/** Reads and classifies a file, once. */
export function readAuth(path: string, flags = 0): Read {
  let bytes: Uint8Array;
  try {
    bytes = readBytes(path, flags);
  } catch (error) {
    const code = errorName(error);
    return ["ENOENT", "ENOTDIR"].includes(code) ? { kind: "absent" } : { kind: "unreadable", error: code, torn: false };
  }
  if (bytes.length === 0) return { kind: "empty" };
  try {
    // The Codex CLI takes neither invalid UTF-8 nor a byte order mark.
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    const document = parseExact(text);
    if (!isObject(document)) return { kind: "unreadable", error: "TypeError", torn: true };
    for (const value of Object.values(tokensOf(document))) new Secret(value); // known to the log from here on
    return { kind: "whole", text, document };
  } catch (error) {
    return { kind: "unreadable", error: errorName(error), torn: true };
  }
}

/**
 * Reads auth.json until it is whole, or the patience is at its end: older Codex CLIs truncate it and then write it, and a
 * look in between finds it empty or cut off.
 */
async function readSettled(path: string, patience = TORN_MS, unfinished = isTorn): Promise<Read> {
  let read = readAuth(path);
  for (let times = patience / 100; times > 0 && unfinished(read); times--) {
    await sleep(100);
    read = readAuth(path);
  }
  return read;
}

function isTorn(read: Read): boolean {
  return read.kind === "empty" || read.kind === "unreadable" && read.torn;
}

function isSame(one: Read, other: Read): boolean {
  return one.kind === other.kind && (one.kind !== "whole" || other.kind === "whole" && one.text === other.text);
}

/** The fingerprint of the refresh token in a file, null where there is none. */
function fingerprintIn(read: Read): string | null {
  return read.kind === "whole" ? fingerprintOf(read.document) : null;
}

function fingerprintOf(document: JsonObject): string | null {
  const { refresh_token } = tokensOf(document);
  return refresh_token === undefined ? null : new Secret(refresh_token).fingerprint();
}

/** The real auth.json of a home; `owner` is set only for root, who alone can give files away. */
interface Target {
  readonly path: string;
  readonly owner: { readonly uid: number; readonly gid: number } | null;
}

function locate(home: Home): Target {
  const path = realPath(join(home.dir, "auth.json"));
  const stat = process.getuid?.() === 0 ? statOf(path) ?? statOf(dirname(path)) : null;
  return { path, owner: stat === null ? null : { uid: stat.uid, gid: stat.gid } };
}

// The lock: an exclusive SQLite transaction, never committed, on an empty file beside auth.json. The kernel holds it and
// it dies with its holder, so that there is nothing to break, no pid and no clock to trust. auth.lock and auth.json.lock
// are the Codex CLI's, and left to it: where flock and POSIX locks are one (NFS, macOS), a lock of ours on them would
// make it throw an answer away.

/** A home's turn. It takes one of few places, which it may give back early. */
interface Lock {
  giveWay(): void;
  /** Whether the path still names the file that we locked. */
  holds(): boolean;
  release(): void;
}

const lockOf = (path: string) => join(dirname(path), "auth_refresh.lock");

/** So many at a time, the others in a queue. */
class Places {
  readonly #queue: (() => void)[] = [];
  constructor(public free: number) {}
  get waiting(): number {
    return this.#queue.length;
  }
  /** Waits for a place; what is returned gives it back, once. */
  async take(): Promise<() => void> {
    if (this.free > 0) this.free--;
    else await new Promise<void>((go) => this.#queue.push(go));
    let held = true;
    return () => {
      if (!held) return;
      held = false;
      const next = this.#queue.shift();
      if (next === undefined) this.free++;
      else next();
    };
  }
}

const places = new Places(PLACES);
/** The operator's commands: a hundred at once would take the memory that the watchdog has. */
const commands = new Places(PLACES);

/** Takes a home's turn; null where it was not to be had within 180 s, or before `stop`. Throws what the disk throws. */
async function takeLock(target: Target, stop: AbortSignal): Promise<Lock | null> {
  let deadline = Infinity;
  while (!stop.aborted) {
    const giveWay = await places.take();
    deadline = Math.min(deadline, uptime() + LOCK_WAIT_MS);
    let lock: Lock | null = null;
    try {
      lock = tryLock(target, giveWay);
    } finally {
      if (lock === null) giveWay();
    }
    if (lock !== null || uptime() >= deadline) return lock;
    await sleep(50 + 200 * Math.random(), stop);
  }
  return null;
}

/** The lock, if it is free. */
function tryLock({ path: auth, owner }: Target, giveWay: () => void): Lock | null {
  const path = lockOf(auth);
  try {
    fs.closeSync(createPrivate(path, owner));
  } catch (error) {
    // Once it exists nothing but SQLite may open it: closing another descriptor of ours would give the lock away, since
    // POSIX locks belong to the process.
    if (errorName(error) !== "EEXIST") throw error;
  }
  const before = fs.lstatSync(path);
  if (!before.isFile()) throw new CannotStart(`${path} is not a file`);
  if (owner !== null && before.uid !== owner.uid && before.nlink === 1) fs.lchownSync(path, owner.uid, owner.gid);
  // A file that was replaced meanwhile is one that nobody else will find.
  const holds = () => {
    const now = statOf(path, fs.lstatSync);
    return now?.ino === before.ino && now.dev === before.dev;
  };
  let database: DatabaseSync | null = null;
  let locked = false;
  try {
    database = new (builtin("node:sqlite").DatabaseSync)(path, { timeout: 0 });
    database.exec("PRAGMA journal_mode=MEMORY"); // nothing is ever written, so no journal beside it either
    database.exec("BEGIN EXCLUSIVE");
    database.exec("CREATE TABLE held (x)"); // fails where SQLite could open it for reading only: then the lock is shared
    locked = holds();
    return locked ? { giveWay, holds, release: () => (giveWay(), database?.close()) } : null;
  } catch (error) {
    const why = (error as Error).message;
    if (why.includes("database is locked")) return null;
    const cause = mayActFor(before.uid) ? why : `no permission, it is user ${before.uid}'s`;
    throw new CannotStart(`${path} cannot be locked: ${cause}`);
  } finally {
    if (!locked) database?.close();
  }
}

// Files that are there whole or not at all.

/** Creates a file that nobody else can read, not for an instant. Fails where it exists. */
function createPrivate(path: string, owner: Target["owner"]): number {
  const { O_RDWR, O_CREAT, O_EXCL } = fs.constants;
  const fd = fs.openSync(path, O_RDWR | O_CREAT | O_EXCL, 0o600);
  try {
    const { mode, uid, gid } = fs.fstatSync(fd);
    // Only what is to be changed: some mounts (SMB, root-squashed NFS) refuse both, whatever they are asked for.
    if ((mode & 0o777) !== 0o600) insist(() => fs.fchmodSync(fd, 0o600), `${path}: its mount refuses mode 0600`);
    if (owner !== null && (uid !== owner.uid || gid !== owner.gid)) {
      const why = `${path}: its mount refuses to make it user ${owner.uid}'s, run as that user`;
      insist(() => fs.fchownSync(fd, owner.uid, owner.gid), why);
    }
    return fd;
  } catch (error) {
    closeQuietly(fd);
    removeQuietly(path);
    throw error;
  }
}

function insist(change: () => void, why: string): void {
  try {
    change();
  } catch (error) {
    throw new CannotStart(`${why} (${errorName(error)})`);
  }
}

/** Puts content into a file from its start, and onto the disk. */
async function writeThrough(fd: number, content: string): Promise<void> {
  const length = writeAll(fd, content);
  fs.ftruncateSync(fd, length);
  await fsync(fd);
}

/** writeSync may stop short without an error; this does not. */
function writeAll(fd: number, text: string): number {
  const bytes = Buffer.from(text);
  for (let done = 0; done < bytes.length;) {
    const count = fs.writeSync(fd, bytes, done, bytes.length - done, done);
    if (count <= 0) throw new DiskError("EIO");
    done += count;
  }
  return bytes.length;
}

async function syncDirectory(path: string): Promise<void> {
  const fd = fs.openSync(dirname(path), fs.constants.O_RDONLY);
  try {
    await fsync(fd);
  } catch (error) {
    // Some network file systems cannot sync a directory, and say so.
    if (!["EINVAL", "ENOTSUP"].includes(errorName(error))) throw error;
  } finally {
    closeQuietly(fd);
  }
}

// The journal. Its name carries the fingerprint of the refresh token whose answer it is for; beside auth.json it is the
// only place where tokens are.

interface Journal {
  readonly target: Target;
  readonly fingerprint: string;
  readonly path: string;
  /** What is about to replace it. */
  readonly next: string;
}

function journalOf(target: Target, fingerprint: string): Journal {
  const path = join(dirname(target.path), `.${basename(target.path)}.${fingerprint}.tmp`);
  return { target, fingerprint, path, next: `${path}.new` };
}

/** The fingerprints of the journals beside an auth.json. Throws what the disk throws. */
export function findJournals(path: string): string[] {
  const start = `.${basename(path)}.`;
  const names = fs.existsSync(dirname(path)) ? fs.readdirSync(dirname(path)) : [];
  const rests = names.filter((name) => name.startsWith(start)).map((name) => name.slice(start.length));
  return [...new Set(rests.flatMap((rest) => /^([0-9a-f]{16})\.tmp(?:\.new)?$/.exec(rest)?.[1] ?? []))];
}

/**
 * Gives a journal this content: it is on the disk when this returns, and no file is open while it is renamed. Always a
 * fresh file: what an earlier fsync could not do, a further one may only claim.
 */
async function replaceFile(journal: Journal, content: string): Promise<void> {
  const { path, next, target } = journal;
  try {
    const fd = createPrivate(next, target.owner);
    try {
      await writeThrough(fd, content);
    } finally {
      closeQuietly(fd);
    }
    fs.renameSync(next, path);
    await syncDirectory(path);
  } catch (error) {
    quietly(() => keepOneAnswer(journal)); // else the next try does
    throw error;
  }
}

/** What is left where a journal could not be replaced: one file that holds an answer, if there is one, and its room. */
function keepOneAnswer({ path, next }: Journal): void {
  const isAnswer = (each: string) => fingerprintIn(readJournal(each)) !== null;
  if (isAnswer(path)) removeQuietly(next);
  else if (isAnswer(next)) fs.renameSync(next, path);
  else removeJournal({ path, next });
}

const readJournal = (path: string) => readAuth(path, fs.constants.O_NOFOLLOW);

function removeJournal({ path, next }: Pick<Journal, "path" | "next">): void {
  removeQuietly(next);
  removeQuietly(path);
}

// The proof, before the token is spent.

/**
 * Proves that an answer can be stored, by laying the journal, open for writing: newlines enough to hold it, since JSON
 * followed by them still parses. Throws a {@link CannotStart} that names the cause.
 */
async function prove(journal: Journal, size: number, inPlace: boolean): Promise<number> {
  const { path } = journal.target;
  const refuse = (why: string): never => {
    throw new CannotStart(`${path} ${why}`);
  };
  try {
    const { uid } = fs.statSync(path);
    if (!mayActFor(uid) && !inPlace) {
      const why = `what user ${process.getuid?.()} writes the Codex CLI could not read. Run as its owner`;
      refuse(`belongs to user ${uid}, and ${why}, or, where you may write to it, set CODEX_AUTH_IN_PLACE=1`);
    }
    // Opening for writing, without truncating, shows what is read-only or immutable, and brings a file of an image's lower
    // layer up, so that its device is its directory's.
    fs.closeSync(fs.openSync(path, fs.constants.O_RDWR));
    const { nlink } = fs.statSync(path);
    const instead = "Mount the directory instead of the file";
    if (nlink === 0) refuse(`was replaced outside of this mount and has lost its name. ${instead}`);
    if (nlink > 1 && !inPlace) {
      refuse("has a second hard link, which a rename would cut off. Remove that, or set CODEX_AUTH_IN_PLACE=1");
    }
    if (!inPlace && !isReplaceable(path)) {
      refuse(`is a mount point of its own and cannot be renamed over. ${instead}, or set CODEX_AUTH_IN_PLACE=1`);
    }
    if (size > MAX_FILE_BYTES) refuse(`is too large: with the answer it would have ${size} bytes`);
    await replaceFile(journal, "\n".repeat(size));
    return fs.openSync(journal.path, fs.constants.O_RDWR | fs.constants.O_NOFOLLOW);
  } catch (error) {
    removeJournal(journal);
    throw error instanceof CannotStart ? error : new CannotStart(`${path}: ${describeDisk(error)}`);
  }
}

/** Whether we are root or that user. */
function mayActFor(uid: number): boolean {
  return [0, uid].includes(process.getuid?.() ?? 0);
}

/** Whether a rename may take the file's place: not for a mount point, one of several hard links, or another user's. */
function isReplaceable(path: string): boolean {
  const { uid, nlink, dev } = fs.statSync(path);
  return nlink === 1 && dev === fs.statSync(dirname(path)).dev && mayActFor(uid);
}

const DISK_ERRORS: Readonly<Record<string, string>> = {
  EROFS: "the file system is read-only",
  ENOSPC: "the disk is full",
  EDQUOT: "the disk quota is used up",
  EACCES: "no permission to write",
  EPERM: "not permitted, it may be immutable, its directory append-only, or its mount refuse renames",
  EEXIST: "not permitted, its directory may be append-only",
  ENOTSUP: "its mount does not support a step of the storing, a rename for example",
  EIO: "the disk reports an I/O error",
  ESTALE: "it was replaced outside of its mount; mount the directory instead of the file",
};

function describeDisk(error: unknown): string {
  if (error instanceof CannotStart) return error.message;
  const code = errorName(error);
  return code in DISK_ERRORS ? `${DISK_ERRORS[code]} (${code})` : `cannot be written (${code})`;
}

// The store, after it.

/** How long to try to store, and whom to tell of what stands in the way. */
interface Perseverance {
  readonly inPlace: boolean;
  /** The moment to give up at, in milliseconds of uptime; asked anew after each failure. */
  readonly giveUpAt: () => number;
  /** Called when the storing fails, each time: a disk may be broken for long. */
  readonly onFailure: (error: unknown) => void;
}

type Stored = "stored" | "superseded";

/** An answer that could not be stored in time: why, and where it lies, as a sentence for the operator. */
class NotStored extends Error {}

/**
 * Stores the answer that auth.json, as it was read, has been given. The first thing that happens here is its write into
 * the journal: until it is there a SIGKILL costs the login, so nothing may come before it. Throws a {@link NotStored}.
 */
async function store(
  journal: Journal,
  room: number,
  document: JsonObject,
  { tokens, lastRefresh }: Grant,
  how: Perseverance,
): Promise<Stored> {
  const opened = Object.entries(tokens).map(([name, secret]) => [name, secret.open()]);
  const answer = granted(document, Object.fromEntries(opened), lastRefresh);
  const content = render(answer);
  let durable: string | null = content;
  try {
    await writeThrough(room, content);
  } catch {
    durable = null;
  } finally {
    closeQuietly(room);
  }
  return await persevere(journal, answer, durable, how);
}

/** Settles a journal until it works or the time is up. After a failure nothing is taken for durable. */
async function persevere(
  journal: Journal,
  answer: JsonObject,
  durable: string | null,
  { inPlace, giveUpAt, onFailure }: Perseverance,
): Promise<Stored> {
  for (let pause = 250;; pause = Math.min(2 * pause, 5 * SECOND)) {
    try {
      return await settle(journal, answer, durable, inPlace);
    } catch (error) {
      durable = null;
      onFailure(error);
      if (uptime() >= giveUpAt()) throw new NotStored(`${describeDisk(error)}. ${whereKept(journal, answer)}`);
      await sleep(pause);
    }
  }
}

function whereKept({ target, path, next }: Journal, answer: JsonObject): string {
  const tokens = (document: JsonObject) => JSON.stringify(tokensOf(document));
  const kept = [target.path, path, next].find((each) => {
    const read = readJournal(each);
    return read.kind === "whole" && tokens(read.document) === tokens(answer);
  });
  if (kept === target.path) return "The new tokens are in auth.json, but the disk has not confirmed them";
  if (kept !== undefined) return `The new tokens are in ${kept}: do not delete it, the next attempt stores them`;
  return "No file is known to hold the new tokens: if the next attempt fails too, log in again";
}

/** Settles the journals that earlier runs left. Whether there was an answer among them that auth.json has got now. */
async function rollForward(target: Target, how: Perseverance): Promise<boolean> {
  let stored = false;
  for (const fingerprint of findJournals(target.path)) {
    const journal = journalOf(target, fingerprint);
    for (const path of [journal.path, journal.next]) assertOurs(path, target);
    keepOneAnswer(journal);
    const left = readJournal(journal.path);
    if (left.kind === "whole" && await persevere(journal, left.document, null, how) === "stored") stored = true;
  }
  return stored;
}

/** Whether a file is a plain one of ours or of auth.json's owner: what anybody else has put there must not get in. */
function isOurs(path: string, { owner }: Target): boolean {
  const stat = fs.lstatSync(path, { throwIfNoEntry: false });
  return stat?.isFile() === true && [process.getuid?.() ?? stat.uid, owner?.uid].includes(stat.uid);
}

function assertOurs(path: string, target: Target): void {
  if (fs.lstatSync(path, { throwIfNoEntry: false }) === undefined) return;
  if (!isOurs(path, target)) {
    throw new CannotStart(
      `${path} has the name of a journal of this program, but is another user's: if a run of this program left it, give it to auth.json's owner, else remove it`,
    );
  }
  const read = readJournal(path);
  if (read.kind === "unreadable" && !read.torn) throw new CannotStart(`${path} cannot be read (${read.error})`);
}

/**
 * Settles the answer that a Codex CLI left which was killed between its fsync and its rename: the latest `.auth-XXXXXX`
 * beside auth.json that has the same account, another refresh token and a later last_refresh
 * (codex-rs/login/src/auth/storage.rs). Where it came from, null where there is none.
 */
async function rescue(journal: Journal, how: Perseverance): Promise<{ from: string; stored: Stored } | null> {
  const { target, fingerprint } = journal;
  const seen = await readSettled(target.path);
  if (seen.kind !== "whole" || accountOf(seen.document) === null) return null;
  const { document } = seen;
  const names = fs.readdirSync(dirname(target.path)).filter((name) => /^\.auth-[0-9A-Za-z]{6}$/.test(name));
  const paths = names.map((name) => join(dirname(target.path), name)).filter((path) => isOurs(path, target));
  const left = paths.flatMap((path) => {
    const read = readJournal(path);
    return read.kind === "whole" ? [{ path, answer: read.document }] : [];
  }).filter(({ answer }) =>
    accountOf(answer) === accountOf(document) && ![null, fingerprint].includes(fingerprintOf(answer)) &&
    refreshedAt(answer) > refreshedAt(document)
  );
  const [last] = left.sort((one, other) => refreshedAt(other.answer) - refreshedAt(one.answer));
  if (last === undefined) return null;
  const stored = await persevere(journal, last.answer, null, how);
  if (stored === "stored") removeQuietly(last.path);
  return { from: basename(last.path), stored };
}

/**
 * Brings an answer, as a whole document, into auth.json, from wherever an earlier try was interrupted; see the table
 * above. `durable` is what the journal is known to hold, on the disk. Throws what the disk throws.
 */
async function settle(journal: Journal, answer: JsonObject, durable: string | null, inPlace: boolean): Promise<Stored> {
  const { path } = journal.target;
  for (;;) {
    // Some writers unlink what they write anew.
    const seen = await readSettled(path, WRITER_MS, (read) => isTorn(read) || read.kind === "absent");
    if (seen.kind === "unreadable" && !seen.torn) throw new DiskError(seen.error);
    const wanted = merge(seen, answer, journal.fingerprint, Date.now());
    if (wanted === null) {
      removeJournal(journal);
      return "superseded";
    }
    if (wanted !== durable || !contains(journal.path, wanted)) {
      await replaceFile(journal, wanted);
      durable = wanted;
    }
    // From this look to the rename nothing waits.
    if (!isSame(readAuth(path), seen)) continue;
    await publish(journal, wanted, inPlace);
    if (!contains(path, wanted)) continue; // somebody wrote at the same time
    removeJournal(journal);
    return "stored";
  }
}

/**
 * What auth.json should hold, given what it holds and the answer to the token with this fingerprint; null where it is to
 * be left alone. The table above, but for its first row. Where the endpoint has not given a new refresh token, auth.json
 * may have been refreshed since, as its last_refresh tells.
 */
export function merge(seen: Read, answer: JsonObject, fingerprint: string, nowMs: number): string | null {
  if (isTorn(seen)) return render(answer);
  if (seen.kind !== "whole") return null;
  const [current, given] = [fingerprintIn(seen), fingerprintOf(answer)];
  if (current === fingerprint) {
    if (given === fingerprint && refreshedAt(seen.document, nowMs) > refreshedAt(answer, nowMs)) return null;
    return render(granted(seen.document, tokensOf(answer), answer.last_refresh));
  }
  return current !== null && current === given ? seen.text : null;
}

function refreshedAt(document: JsonObject, nowMs = Date.now()): number {
  return credentialOf(document, nowMs).lastRefreshMs ?? 0;
}

/** auth.json with new tokens, every other field as it was. */
function granted(document: JsonObject, tokens: Partial<Record<TokenName, string>>, last_refresh: unknown): JsonObject {
  return { ...document, tokens: { ...(isObject(document.tokens) ? document.tokens : {}), ...tokens }, last_refresh };
}

function render(document: JsonObject): string {
  return JSON.stringify(document, null, 2);
}

/** Whether a file holds this text, to the letter. */
function contains(path: string, text: string): boolean {
  const read = readJournal(path);
  return read.kind === "whole" && read.text === text;
}

/** Gives the journal auth.json's name, or copies it where it cannot have that. Begins without waiting. */
async function publish(journal: Journal, content: string, inPlace: boolean): Promise<void> {
  const { path } = journal.target;
  if (fs.statSync(path).nlink === 0) throw new DiskError("ESTALE");
  if (!inPlace || isReplaceable(path)) {
    try {
      fs.renameSync(journal.path, path);
      return await syncDirectory(path);
    } catch (error) {
      // A mount point that st_dev did not show, say. The answer is in hand: better in place than lost.
      if (!["EBUSY", "ENOTSUP"].includes(errorName(error))) throw error;
    }
  }
  const fd = fs.openSync(path, fs.constants.O_WRONLY | fs.constants.O_NOFOLLOW);
  try {
    fs.ftruncateSync(fd, 0); // first, so that a copy that is cut off never parses: the journal is what finishes it
    await writeThrough(fd, content);
  } finally {
    closeQuietly(fd);
  }
}

// ── status ───────────────────────────────────────────────────────────────────────────────────────────────────────────
// What the last attempt left: auth_refresh_status.json in the home, never a token in it. Every attempt replaces it
// atomically and carries over what it does not itself know. The views for people, probes and scrapers read it, and
// auth.json; they write nothing.

const STATUS_FILE = "auth_refresh_status.json";

export type Outcome =
  | "refreshed"
  | "skip"
  | "skip:no_auth_json"
  | "superseded"
  | "fail:preflight"
  | "fail:apply_response"
  | "fail:store"
  | "fail:locked"
  | `fail:transient_${string}`
  | `fail:permanent_${number}`;

/** The status file; its names are an interface. Values here stand for what was never written. */
const NO_STATUS = {
  /** auth.json's `last_refresh` to the letter, and its age at the time of the run. */
  last_refresh: "",
  last_refresh_age_seconds: -1,
  watchdog_last_outcome: "" as Outcome | "",
  watchdog_last_run_iso: "",
  /** The reason behind the outcome, or the server's error code. */
  detail: null as string | null,
  access_token_expires_iso: null as string | null,
  /** When the loop looks next. */
  next_run_iso: null as string | null,
  /** The last time that this program refreshed the login. */
  last_success_iso: null as string | null,
  consecutive_failures: 0,
  runs_total: 0,
  refreshes_total: 0,
  failures_total: 0,
  /** The start of the SHA-256 of a refresh token that the server called dead. */
  rejected_refresh_token_sha256: null as string | null,
  /** What the operator's command was last told of: the state, and the `last_success_iso` of a refresh. */
  told_state: null as "healthy" | "unhealthy" | null,
  told_success_iso: null as string | null,
  watchdog_version: "",
};
export type Status = typeof NO_STATUS;

/** What could not be written, by the status file's path: this process goes by it until that works again. */
const unwritten = new Map<string, Status>();

/** Reads the status file; a field that is missing or of another type is as if never written. */
export function readStatus(path: string): Status {
  const kept = unwritten.get(path);
  if (kept !== undefined) return kept;
  const read = readAuth(path);
  const fields = read.kind === "whole" ? JSON.parse(read.text) as JsonObject : {};
  const fits = ([name, preset]: [string, unknown]) =>
    typeof preset === "number"
      ? Number.isSafeInteger(fields[name]) && Number(fields[name]) >= preset
      : typeof fields[name] === "string";
  const value = (field: unknown) => typeof field === "string" ? oneLine(field) : field;
  const known = Object.entries(NO_STATUS).filter(fits).map(([name]) => [name, value(fields[name])]);
  return { ...NO_STATUS, ...Object.fromEntries(known) };
}

/** What auth.json says, in the status file's fields. */
function describeCredential({ lastRefresh, lastRefreshMs, expiresMs }: Credential, nowMs: number): Partial<Status> {
  return {
    last_refresh: lastRefresh,
    last_refresh_age_seconds: ageSeconds(lastRefreshMs, nowMs) ?? -1,
    access_token_expires_iso: iso(expiresMs),
  };
}

/**
 * Replaces the status file by what it says now with a change applied. A home that does not exist is not created. An
 * error is a log line and no more: the login matters, not this file.
 */
function writeStatus(home: Home, log: Log, change: (now: Status) => Partial<Status>): void {
  const start = `.${STATUS_FILE}.`;
  const temporary = join(home.dir, `${start}${process.pid}.${Math.random().toString(36).slice(2)}.tmp`);
  const now = readStatus(home.status);
  const status = { ...now, ...change(now), watchdog_version: VERSION };
  try {
    if (!fs.existsSync(home.dir)) return;
    for (const name of fs.readdirSync(home.dir).filter((name) => name.startsWith(start))) {
      const left = fs.lstatSync(join(home.dir, name), { throwIfNoEntry: false });
      if (left !== undefined && Date.now() - left.mtimeMs > MINUTE) removeQuietly(join(home.dir, name));
    }
    const fd = createPrivate(temporary, locate(home).owner);
    try {
      writeAll(fd, JSON.stringify(status, null, 2) + "\n");
    } finally {
      closeQuietly(fd);
    }
    fs.renameSync(temporary, home.status);
    unwritten.delete(home.status);
  } catch (error) {
    removeQuietly(temporary);
    unwritten.set(home.status, status);
    log("warning", "status_failed", `status: ${home.status}: ${describeDisk(error)}`);
  }
}

/** How one home stands; what `--json` prints, field by field. */
export interface View extends Status {
  readonly home: string;
  /** inert: nothing here that could be refreshed, and nothing wrong with that. */
  readonly state: "unhealthy" | "healthy" | "inert";
  /** In words, outcomes and codes behind them in brackets. */
  readonly reason: string;
  /** What to do about it; null where there is nothing to do. */
  readonly advice: string | null;
  readonly warnings: readonly string[];
  readonly plan: string | null;
  readonly account_id: string | null;
  /** Only with `--verbose`. */
  readonly email?: string;
  readonly access_token_remaining_seconds: number | null;
  readonly access_token_lifetime_seconds: number | null;
}

/** A view from what was read: auth.json, the status file, and what is odd about the home. Pure. */
export function view(home: string, read: Read, status: Status, odd: string[], nowMs: number, settings: Settings): View {
  const verdict = decide(read, nowMs, settings);
  const { expiresMs, lastRefreshMs, refreshToken } = verdict.credential;
  const { id_token = "", access_token = "" } = read.kind === "whole" ? tokensOf(read.document) : {};
  const { chatgpt_plan_type, chatgpt_account_id } = openaiClaims(id_token);
  const issued = claimsOf(access_token)?.iat;
  const fromMs = typeof issued === "number" ? issued * SECOND : lastRefreshMs;
  const seconds = (from: number | null) =>
    expiresMs === null || from === null ? null : Math.trunc((expiresMs - from) / SECOND);
  const unused = !verdict.due && verdict.why === "other mode" && refreshToken !== null ? verdict.text : null;
  return {
    home,
    ...diagnose(home, verdict, status, nowMs, settings),
    warnings: [...odd, ...(unused === null ? [] : [`${unused}, so the refresh token is not used`])],
    plan: tame(chatgpt_plan_type),
    account_id: tame(chatgpt_account_id, /^[0-9a-z-]{1,40}$/i),
    access_token_remaining_seconds: seconds(nowMs),
    access_token_lifetime_seconds: seconds(fromMs),
    ...status,
    ...describeCredential(verdict.credential, nowMs),
  };
}

/** What an operator does about a dead login, fit for a shell. */
function loginAdvice(home: string): string {
  const quoted = /[^\w@%+=:,./-]/.test(home) ? `'${home.replaceAll("'", "'\\''")}'` : home;
  return `log in again: CODEX_HOME=${quoted} codex login (with --device-auth where there is no browser)`;
}

/** What is wrong with an auth.json that cannot be read, in words, and what helps. */
function describeUnreadable(home: string, error: string): { what: string; help: string } {
  const [what, help] = OBSTACLES[error] ?? ["cannot be read", "look at the disk"];
  return { what, help: help ?? loginAdvice(home) };
}

const OBSTACLES: Readonly<Record<string, readonly [what: string, help?: string]>> = {
  EISDIR: ["is a directory, made of a missing mount source perhaps", "remove it, and mount the folder of auth.json"],
  ELOOP: ["is a symbolic link that leads back to itself", "remove it, and log in"],
  EACCES: ["may not be read by this user", "make it readable for this user, or run as its owner"],
  EFTYPE: ["is no plain file", "remove it, and log in"],
  ETIMEDOUT: ["is on a disk that does not answer", "see to that disk"],
  EFBIG: ["is too large to be a login"],
  SyntaxError: ["holds no JSON, or begins with a byte order mark"],
  TypeError: ["holds no JSON object, or no UTF-8"],
  RangeError: ["nests deeper than the Codex CLI reads"],
};

/** The state of a home, why, and what to do. */
function diagnose(
  home: string,
  verdict: Verdict,
  { watchdog_last_outcome: outcome, rejected_refresh_token_sha256: rejected, detail, ...status }: Status,
  nowMs: number,
  { intervalSeconds }: Settings,
): Pick<View, "state" | "reason" | "advice"> {
  const { expiresMs, lastRefreshMs, refreshToken } = verdict.credential;
  const [why, text] = verdict.due ? ["due", "a refresh is due"] : [verdict.why, verdict.text];
  const unhealthy = (reason: string, advice: string | null) => ({ state: "unhealthy", reason, advice }) as const;
  const inert = (reason: string) => ({ state: "inert", reason, advice: null }) as const;
  const lastRun = parseTimestamp(status.watchdog_last_run_iso);
  const nextRun = parseTimestamp(status.next_run_iso ?? "");
  const ran = lastRun === null ? "has never run here" : `last ran ${humanize(nowMs - lastRun)} ago`;
  const planned = nextRun !== null && nextRun > nowMs;
  const down = !planned && (lastRun === null || nowMs - lastRun > 2 * intervalSeconds * SECOND);
  const start = down ? `start the watchdog, it ${ran}` : null;

  if (why === "absent") return inert("no login yet");
  if (why === "no token") return inert("no refresh token, so nothing to keep alive");
  if (why === "other mode") return inert(`no ChatGPT login, so nothing to keep alive (${text})`);
  if (nextRun !== null && nowMs > nextRun + 5 * MINUTE && (lastRun ?? 0) < nextRun) {
    return unhealthy(`the watchdog ${ran} and is overdue`, "start the watchdog, it is down or stuck");
  }
  if (!verdict.due && verdict.error !== null) {
    const { what, help } = describeUnreadable(home, verdict.error);
    return unhealthy(`auth.json ${what} (${text})`, help);
  }
  // A login that is newer than the failure has nothing to do with it.
  const dead = rejected !== null && rejected === refreshToken?.fingerprint();
  const newer = !dead && (rejected !== null || (lastRefreshMs ?? 0) > (lastRun ?? 0));
  const failed = outcome.startsWith("fail:") && !newer;
  const permanent = failed && outcome.startsWith("fail:permanent_");
  if (dead || permanent) {
    const code = permanent ? ` (${outcome}, ${detail ?? "no code"})` : "";
    const what = dead ? "the login is dead, the endpoint refuses its refresh token" : "the endpoint refused the login";
    return unhealthy(what + code, loginAdvice(home));
  }
  const trouble = failed ? `, and the last run failed (${outcome})` : "";
  if (expiresMs !== null && expiresMs <= nowMs) {
    return unhealthy(`the access token expired ${humanize(nowMs - expiresMs)} ago${trouble}`, start);
  }
  const reason = failed ? `the last run failed (${outcome}), the access token is still good` : null;
  return { state: "healthy", reason: reason ?? (verdict.due ? text : "fresh"), advice: start };
}

/** The views of all homes, the worst first. `guarded`: a disk that hangs must not hold up the rest. */
async function viewAll(
  homes: readonly Home[],
  settings: Settings,
  verbose: boolean,
  guarded: boolean,
): Promise<View[]> {
  const views = await Promise.all(homes.map(async (home) => {
    const hangs = guarded && !await diskAnswers(home.dir);
    const read: Read = hangs
      ? { kind: "unreadable", error: "ETIMEDOUT", torn: false }
      : await readSettled(locate(home).path);
    const [status, odd] = hangs ? [NO_STATUS, []] : [readStatus(home.status), oddities(home)];
    const shown = view(oneLine(home.dir), read, status, odd, Date.now(), settings);
    const email = claimsOf(read.kind === "whole" ? tokensOf(read.document).id_token ?? "" : "")?.email;
    return verbose && typeof email === "string" ? { ...shown, email: oneLine(email) } : shown;
  }));
  const rank = ({ state }: View) => ["unhealthy", "healthy", "inert"].indexOf(state);
  return views.sort((one, other) => rank(one) - rank(other));
}

/** What is odd about a home, whatever its auth.json holds. `etc` is where the machine's own configuration lies. */
export function oddities(home: Home, etc = "/etc/codex"): string[] {
  if (statOf(home.dir) === null) return ["the folder does not exist"];
  const auth = join(home.dir, "auth.json");
  const absent = statOf(auth) === null && readAuth(auth).kind === "absent";
  const dangling = absent && statOf(auth, fs.lstatSync)?.isSymbolicLink() === true;
  return [
    dangling ? "auth.json is a symbolic link to a file that does not exist: bring that back, or remove it" : null,
    oddPlace(locate(home).path),
    oddStore(home, etc, absent),
  ].filter((each) => each !== null);
}

/** A file that cannot be renamed over: whoever lets today's Codex CLI refresh it loses the login. */
function oddPlace(path: string): string | null {
  const [file, folder] = [statOf(path), statOf(dirname(path))];
  if (!file?.isFile()) return null;
  const where = "where the Codex CLI (0.169 at least) cannot store what it redeems, and loses the login";
  if (file.nlink > 1) return `auth.json has a second hard link, ${where}: remove the link`;
  return file.dev === folder?.dev ? null : `auth.json is a mount of its own, ${where}: mount its directory instead`;
}

/**
 * What is odd about where the Codex CLI keeps logins: `cli_auth_credentials_store` of the managed configuration, else of the
 * home's, else of the machine's (codex-rs/config/src/types.rs, AuthCredentialsStoreMode).
 */
function oddStore(home: Home, etc: string, absent: boolean): string | null {
  const files = {
    "the managed configuration": join(etc, "managed_config.toml"),
    "config.toml": join(home.dir, "config.toml"),
    "the machine's config.toml": join(etc, "config.toml"),
  };
  for (const [place, path] of Object.entries(files)) {
    const text = readText(path);
    if (text === null) continue;
    let store: unknown;
    try {
      store = (parseToml(text) as JsonObject).cli_auth_credentials_store;
    } catch {
      return `${place} is no TOML, so it is not known where logins are kept`;
    }
    if (store === undefined) continue;
    const elsewhere = `${place} keeps logins in "${tame(store) ?? "?"}", where this program does not look`;
    if (store === "auto") return absent ? `${place} says "auto": the login may be in the system's keyring` : null;
    return store === "file" ? null : elsewhere;
  }
  return null;
}

/** The fields of a view as people see them; null for a row that has nothing to say. */
const ROWS: Readonly<Record<string, (view: View, nowMs: number) => string | null>> = {
  "login": ({ plan, account_id, email }) =>
    [plan && `plan ${plan}`, account_id && `account ${account_id}`, email].filter((part) => part).join(", ") || null,
  "access token": (it) => timeLeft(it) && `[${bar(it)}] ${timeLeft(it)}`,
  "last refresh": (it, nowMs) => when(it.last_refresh, nowMs),
  "last run": (it, nowMs) => {
    const moment = when(it.watchdog_last_run_iso, nowMs);
    return moment && `${moment}, ${outcomeInWords(it)}`;
  },
  "failures": (it) => it.consecutive_failures === 0 ? null : `${it.consecutive_failures} in a row`,
  "next run": (it, nowMs) => when(it.next_run_iso, nowMs),
};

/** The same as Prometheus has them; NaN for a sample that there is not. */
const FAMILIES: readonly [name: string, help: string, value: (view: View) => number][] = [
  ["healthy", "Whether the login is in order, or there is none.", (it) => Number(it.state !== "unhealthy")],
  ["access_token_expiry_timestamp_seconds", "Access token's expiry.", (it) => seconds(it.access_token_expires_iso)],
  ["last_refresh_timestamp_seconds", "auth.json's last_refresh.", (it) => seconds(it.last_refresh)],
  ["last_run_timestamp_seconds", "The last attempt.", (it) => seconds(it.watchdog_last_run_iso)],
  ["last_success_timestamp_seconds", "The last refresh of this program.", (it) => seconds(it.last_success_iso)],
  ["next_run_timestamp_seconds", "The next planned attempt.", (it) => seconds(it.next_run_iso)],
  ["last_outcome", "The last attempt's outcome.", (it) => it.watchdog_last_outcome === "" ? NaN : 1],
  ["consecutive_failures", "Failed attempts in a row.", (it) => it.consecutive_failures],
  ["runs_total", "Attempts.", (it) => it.runs_total],
  ["refreshes_total", "Attempts that refreshed the login.", (it) => it.refreshes_total],
  ["failures_total", "Attempts that failed.", (it) => it.failures_total],
];

function outcomeInWords({ watchdog_last_outcome: outcome, detail }: View): string {
  if (outcome.startsWith("fail:")) return `failed (${outcome}): ${detail ?? "no code"}`;
  return outcome.startsWith("skip") ? "nothing to do" : outcome === "superseded" ? "found another login" : outcome;
}

function seconds(iso: string | null): number {
  return (parseTimestamp(iso ?? "") ?? NaN) / SECOND;
}

function when(iso: string | null, nowMs: number): string | null {
  const ms = parseTimestamp(iso ?? "");
  if (ms === null) return null;
  return ms > nowMs ? `in ${humanize(ms - nowMs)}` : `${humanize(nowMs - ms)} ago`;
}

function timeLeft({ access_token_remaining_seconds: left }: View): string | null {
  return left === null ? null : left > 0 ? `${humanize(left * SECOND)} left` : "expired";
}

function bar({ access_token_lifetime_seconds: life, access_token_remaining_seconds: left }: View): string {
  const share = life === null || left === null || life <= 0 ? 0 : Math.min(1, Math.max(0, left / life));
  return "#".repeat(Math.round(20 * share)).padEnd(20, "-");
}

/** One line for probes. */
function showHealth(views: readonly View[]): string {
  const sick = views.filter(({ state }) => state === "unhealthy");
  const [first] = sick.length > 0 ? sick : views;
  const count = views.length > 1 ? `${sick.length} of ${views.length} homes unhealthy; ` : "";
  const why = [first?.reason, ...first?.warnings ?? []].join("; ");
  return `${sick.length > 0 ? "unhealthy" : "healthy"}: ${count}${first?.home}: ${why}\n`;
}

/** For people, within 80 columns: one home in full, several as a table. */
function showStatus(views: readonly View[], colour: boolean, nowMs: number): string {
  const paint = ({ state }: View, text: string) =>
    colour ? `\x1b[${{ unhealthy: 31, healthy: 32, inert: 33 }[state]}m${text}\x1b[0m` : text;
  const wrap = (text: string) => text.replace(/(?=.{77})(.{1,76})\s/g, "$1\n    ");
  const lines = (texts: string[]) => texts.map((text) => `  ${wrap(text)}\n`).join("");
  const notes = ({ warnings, advice }: View) => [
    ...warnings.map((each) => `warning: ${each}`),
    ...(advice === null ? [] : [`to do: ${advice}`]),
  ];
  const fit = (text: string, width: number) =>
    text.length < width ? text.padEnd(width) : `…${text.slice(text.length - width + 2)} `;

  if (views.length > 1) {
    const row = (cells: string[]) =>
      cells.map((cell, index) => fit(cell, [10, 21, 17, 16, 16][index] ?? 0)).join("").trimEnd();
    const rows = views.map((each) => {
      const { state, home, reason, watchdog_last_run_iso: last, next_run_iso: next } = each;
      const word = state === "inert" ? "no login" : state;
      const cells = [word, home, timeLeft(each) ?? "-", when(last, nowMs) ?? "never", when(next, nowMs) ?? "-"];
      return `${paint(each, row(cells))}\n${lines([...(state === "unhealthy" ? [reason] : []), ...notes(each)])}`;
    });
    return `${row(["state", "home", "access token", "last run", "next run"])}\n${rows.join("")}`;
  }
  return views.map((each) => {
    const headline = `${each.home}: ${each.state === "inert" ? "" : `${each.state}, `}${each.reason}`;
    const rows = Object.entries(ROWS).flatMap(([label, text]) => {
      const shown = text(each, nowMs);
      return shown === null ? [] : [`${label.padEnd(14)}${shown}`];
    });
    const gap = rows.length > 0 ? "\n" : "";
    return `${paint(each, wrap(headline))}\n${gap}${lines([...rows, ...notes(each)])}`;
  }).join("");
}

/** Prometheus text (exposition format 0.0.4): gauges from the files, counters from the status file. */
export function showMetrics(views: readonly View[]): string {
  const quote = (text: string) => `"${text.replace(/[\\"]/g, "\\$&").replace(/\n/g, "\\n")}"`;
  return FAMILIES.map(([family, help, value]) => {
    const name = `codex_auth_refresh_${family}`;
    const samples = views.filter((each) => !Number.isNaN(value(each))).map((each) => {
      const outcome = family === "last_outcome" ? `,outcome=${quote(each.watchdog_last_outcome)}` : "";
      return `${name}{home=${quote(each.home)}${outcome}} ${value(each)}\n`;
    });
    const type = family.endsWith("_total") ? "counter" : "gauge";
    return samples.length === 0 ? "" : `# HELP ${name} ${help}\n# TYPE ${name} ${type}\n${samples.join("")}`;
  }).join("");
}

/** For machines: one object, or a list where there are several homes. */
function showJson(views: readonly View[]): string {
  return JSON.stringify(views.length === 1 ? views[0] : views, null, 2) + "\n";
}

// ── attempt ──────────────────────────────────────────────────────────────────────────────────────────────────────────
// The four in a row: decide, post, apply, status. An attempt with nothing to do takes no lock, makes no connection and
// starts nothing. Everything that can fail ends in an outcome, never in a throw.

/** How an attempt ended: what the status keeps, what the scheduler goes by, and what the log is told. */
export interface Ending {
  readonly outcome: Outcome;
  readonly detail: string | null;
  readonly lines: readonly Parameters<Log>[];
  readonly retryAfterMs?: number | null;
  /** The fingerprint of a refresh token that is known to be dead. */
  readonly rejected?: string | null;
  /** Where a dead token was not sent again: no try, so not one more failure. */
  readonly untried?: true;
  /** What auth.json said, where nothing was done about it. */
  readonly verdict?: Verdict;
}

/** What an attempt needs beside its home. */
export interface Context {
  readonly settings: Settings;
  readonly log: Log;
  readonly force: boolean;
  /** Aborted by SIGTERM: what is in hand is finished, nothing further is started. */
  readonly stop: AbortSignal;
  /** Until when an answer that came at `since` is tried to be stored; both are milliseconds of uptime. */
  readonly giveUpAt: (since: number) => number;
  readonly clock: Pick<Clock, "now">;
}

/** The same under the lock. */
interface Held extends Context {
  readonly home: Home;
  readonly target: Target;
  readonly lock: Lock;
}

/** Exit code of an outcome: 0 refreshed, 1 nothing to do, 2 worth another try, 3 log in again. */
export function exitCode(outcome: Outcome): 0 | 1 | 2 | 3 {
  if (outcome === "refreshed") return 0;
  if (outcome === "superseded" || outcome.startsWith("skip")) return 1;
  return outcome.startsWith("fail:permanent_") ? 3 : 2;
}

/** With several homes: 3 if any is 3, else 2 if any is 2, else 0 if any is 0, else 1. */
export function worstExit(codes: readonly number[]): number {
  return [3, 2, 0].find((code) => codes.includes(code)) ?? 1;
}

/**
 * One attempt on one home, its status file included. `next` plans the loop's next look, in milliseconds; a single run
 * has none and leaves that field alone. null where `stop` came before anything was begun.
 */
export async function attempt(
  home: Home,
  context: Context,
  next?: (ending: Ending, verdict: Verdict) => number,
): Promise<Ending | null> {
  const { settings, log, force, stop, clock } = context;
  const target = locate(home);
  const end = async (ending: Ending | null): Promise<Ending | null> => {
    if (ending === null) return null;
    for (const line of ending.lines) log(...line);
    const verdict = ending.verdict ?? decide(await readSettled(target.path), clock.now(), settings);
    record(home, ending, verdict, log, clock.now(), next?.(ending, verdict));
    return ending;
  };
  let lock: Lock | null = null;
  try {
    const verdict = decide(await readSettled(target.path), clock.now(), settings, force);
    const blocked = !verdict.due && verdict.blocked; // then nothing can be settled either
    if (blocked || findJournals(target.path).length === 0) {
      if (!verdict.due) return await end(skipped(verdict, target.path, home));
      const dead = knownDead(home, force, verdict.token);
      if (dead !== null) return await end(dead);
    }
    if (next !== undefined && places.free === 0) {
      // Whoever looks at the status meanwhile must not take us for stuck.
      const rounds = Math.ceil((places.waiting + 1) / PLACES);
      writeStatus(home, log, () => ({ next_run_iso: iso(clock.now() + rounds * ALL_TRIES_MS) }));
    }
    lock = await takeLock(target, stop);
    if (lock !== null) {
      return await end(await attemptLocked({ ...context, home, target, lock }, verdict.due ? verdict.token : null));
    }
    const holder = "another copy holds it, or the file system has no locks";
    const why = `${lockOf(target.path)} was not to be had within ${LOCK_WAIT_MS / SECOND} s: ${holder}`;
    return stop.aborted ? null : await end(failed("fail:locked", "locked", "not started", why));
  } catch (error) {
    if (error instanceof NotStored) {
      return await end(failed("fail:store", "store_failed", "redeemed, but not stored", error.message));
    }
    const { path = target.path } = error as NodeJS.ErrnoException;
    const why = error instanceof CannotStart ? error.message : `${path}: ${describeDisk(error)}`;
    return await end(failed("fail:preflight", "preflight_failed", "not started", why));
  } finally {
    // Not before the status is written: whoever waits for the lock must not send a token that it calls dead.
    lock?.release();
  }
}

/** What is done under the lock. `expected` is the refresh token that was due before it was taken. */
async function attemptLocked(held: Held, expected: Secret | null): Promise<Ending | null> {
  const { home, target, settings, force, stop, clock } = held;
  if (await rollForward(target, perseverance(held))) return refreshed("rolled forward", "rolled_forward");
  const verdict = decide(await readSettled(target.path), clock.now(), settings, force);
  if (!verdict.due) return skipped(verdict, target.path, home);
  if (expected !== null && expected.fingerprint() !== verdict.token.fingerprint()) return SUPERSEDED;
  const dead = knownDead(home, force, verdict.token);
  if (dead !== null || stop.aborted) return dead;
  return await redeem(held, verdict);
}

/** Spends the refresh token and stores what it brings: proof, request, store. */
async function redeem(held: Held, { token, document, reasons, credential }: Verdict & Refresh): Promise<Ending | null> {
  const { home, target, lock, settings, log, force, stop, clock } = held;
  const sent = token.fingerprint();
  const roots = readRoots(settings);
  const journal = journalOf(target, sent);
  const room = await prove(journal, Buffer.byteLength(render(document)) + ROOM_BYTES, settings.inPlace);
  let answer: Answer | null = null;
  try {
    // Proving may have taken its time, and neither the Codex CLI nor whoever removes a lock file waits for us.
    const again = await readSettled(target.path);
    if (stop.aborted) return null;
    if (!lock.holds()) throw new CannotStart(`${lockOf(target.path)} was removed or replaced while it was held`);
    if (fingerprintIn(again) !== sent) {
      const now = decide(again, clock.now(), settings, force);
      const unknown = again.kind === "empty" || again.kind === "unreadable";
      return unknown && !now.due ? skipped(now, target.path, home) : SUPERSEDED;
    }
    const endpoint = settings.url.origin + settings.url.pathname;
    log("info", "refresh_started", `refresh: starting (endpoint=${endpoint} reasons=${reasons})`);
    const still = async () => lock.holds() && fingerprintIn(await readSettled(target.path)) === sent;
    answer = await post(token, settings, roots, stop, still, log);
    if (answer.kind === "granted") {
      const { grant, status, unusable } = answer;
      // Not before what it replaces, which a clock ahead of ours may have written: it would pass for an older one.
      const lastRefresh = iso(Math.max(Date.parse(grant.lastRefresh), credential.lastRefreshMs ?? 0)) ?? "";
      const stored = await store(journal, room, document, { ...grant, lastRefresh }, perseverance(held));
      if (stored === "superseded") return SUPERSEDED;
      const left = unusable.length > 0 ? ` unusable=${unusable.join(",")}` : "";
      return refreshed(`http=${status} rotated=${Object.keys(grant.tokens).join(",")}${left}`);
    }
  } finally {
    if (answer?.kind !== "granted") {
      closeQuietly(room);
      removeJournal(journal);
    }
  }
  lock.giveWay(); // no request of ours is out any more
  if (await movesOn(target.path, sent, answer.kind === "permanent" ? LOOK_AGAIN_MS : 0)) return SUPERSEDED;
  const rescued = isDead(answer) ? await rescue(journal, perseverance(held)) : null;
  if (rescued?.stored === "superseded") return SUPERSEDED;
  if (rescued !== null) return refreshed(`rescued from ${rescued.from}`, "rescued");
  return refused(answer, sent, home);
}

/** Whether auth.json holds another refresh token, or is gone, by now or within this time. */
async function movesOn(path: string, sent: string, milliseconds: number): Promise<boolean> {
  for (const until = uptime() + milliseconds;; await sleep(100)) {
    const now = await readSettled(path);
    if (now.kind === "absent" || now.kind === "whole" && fingerprintIn(now) !== sent) return true;
    if (uptime() >= until) return false;
  }
}

/**
 * How an answer that is in hand is stored. Where it cannot be yet, other homes go on, the status tells of it each minute
 * and the log once.
 */
function perseverance({ home, lock, settings, log, giveUpAt }: Held): Perseverance {
  const since = uptime();
  let [told, logged] = [-Infinity, false];
  const onFailure = (error: unknown) => {
    lock.giveWay();
    const detail = `${describeDisk(error)}; the answer is stored as soon as that is over`;
    if (uptime() - told > MINUTE) {
      const now = iso(Date.now()) ?? "";
      writeStatus(home, log, () => ({ watchdog_last_outcome: "fail:store", watchdog_last_run_iso: now, detail }));
      told = uptime();
    }
    if (logged || uptime() - since <= MINUTE) return;
    log("error", "store_delayed", `refresh: redeemed, not stored yet: ${detail}`);
    logged = true;
  };
  return { inPlace: settings.inPlace, giveUpAt: () => giveUpAt(since), onFailure };
}

// The endings.

const SUPERSEDED: Ending = {
  outcome: "superseded",
  detail: "auth.json holds another login by now",
  lines: [["info", "superseded", "refresh: superseded, auth.json holds another login by now; left alone"]],
};

function refreshed(how: string, detail: string | null = null): Ending {
  return { outcome: "refreshed", detail, lines: [["info", "refreshed", `refresh: ok (${how})`]] };
}

function failed(outcome: Outcome, event: string, what: string, why: string): Ending {
  return { outcome, detail: why, lines: [["error", event, `refresh: ${what}: ${why}`]] };
}

function skipped(verdict: Verdict & Skip, path: string, home: Home): Ending {
  const { why, text, error, credential } = verdict;
  const absent = `skip: ${path} absent or empty (no chatgpt-subscription auth in this workspace)`;
  const lines: Parameters<Log>[] = [
    why === "absent" ? ["info", "no_auth_json", absent] : ["info", "no_op", `no-op: ${text}`],
  ];
  if (error !== null) {
    const { what, help } = describeUnreadable(home.dir, error);
    lines.push(["warning", "unreadable", `${path} ${what}: ${help}`]);
  }
  if (why === "other mode" && credential.refreshToken !== null) {
    lines.push(["warning", "ignored_token", "there is a refresh token, which logins of this auth_mode do not use"]);
  }
  return { outcome: why === "absent" ? "skip:no_auth_json" : "skip", detail: text, lines, verdict };
}

function permanent(home: Home, status: string | number, code: string, why: string): Parameters<Log> {
  const remedy = `An operator must ${loginAdvice(home.dir)}`;
  return ["error", "permanent", `refresh: PERMANENT FAILURE (http=${status} code=${code}) — ${why}. ${remedy}`];
}

/** The ending for a token that the server has called dead before: it is not sent again, unless by force. */
function knownDead(home: Home, force: boolean, token: Secret): Ending | null {
  const { rejected_refresh_token_sha256: rejected, watchdog_last_outcome: last, detail } = readStatus(home.status);
  if (force || rejected !== token.fingerprint()) return null;
  const outcome = last.startsWith("fail:permanent_") ? last as Outcome : "fail:permanent_401";
  const code = DEAD_CODES.find((each) => each === detail) ?? "rejected_before";
  const status = outcome.slice("fail:permanent_".length);
  const lines = [permanent(home, status, code, "known to be dead, not sent again")];
  return { outcome, detail: code, lines, rejected, untried: true };
}

/** The ending for what is no new token; `sent` is the fingerprint of the refresh token. */
function refused(answer: Exclude<Answer, { kind: "granted" }>, sent: string, home: Home): Ending {
  const http = String(answer.status).padStart(3, "0");
  if (answer.kind === "permanent") {
    const code = answer.code ?? "none, a proxy may have answered";
    const lines = [permanent(home, http, code, "refresh_token rejected")];
    const rejected = isDead(answer) ? sent : null;
    return { outcome: `fail:permanent_${answer.status}`, detail: answer.code, lines, rejected };
  }
  if (answer.kind === "useless") {
    return failed("fail:apply_response", "apply_failed", `apply_response failed (http=${http})`, answer.detail);
  }
  const { detail, retryAfterMs } = answer;
  const text = `refresh: transient failure (http=${http}): ${detail}; worth another try`;
  return { outcome: `fail:transient_${http}`, detail, lines: [["warning", "transient", text]], retryAfterMs };
}

/** Writes an ending, and the moment of the next look, to the status file. */
function record(home: Home, ending: Ending, { credential }: Verdict, log: Log, nowMs: number, nextMs?: number): void {
  const { outcome, detail, untried = false, rejected = null } = ending;
  const [hasFailed, done] = [!untried && exitCode(outcome) >= 2, outcome === "refreshed"];
  writeStatus(home, log, ({ rejected_refresh_token_sha256: remembered, ...before }) => {
    // What is known to be dead is remembered for as long as no other token is there.
    const { refreshToken } = credential;
    const gone = remembered !== null && refreshToken !== null && remembered !== refreshToken.fingerprint();
    return {
      ...describeCredential(credential, nowMs),
      watchdog_last_outcome: outcome,
      watchdog_last_run_iso: iso(nowMs) ?? "",
      detail: detail === null ? null : oneLine(Secret.redact(detail)),
      consecutive_failures: untried || hasFailed ? before.consecutive_failures + Number(hasFailed) : 0,
      runs_total: before.runs_total + 1,
      refreshes_total: before.refreshes_total + Number(done),
      failures_total: before.failures_total + Number(hasFailed),
      ...(nextMs === undefined ? {} : { next_run_iso: iso(nextMs) }),
      ...(done ? { last_success_iso: iso(nowMs) } : {}),
      ...(done || gone || rejected !== null ? { rejected_refresh_token_sha256: rejected } : {}),
    };
  });
}

// Telling the operator: a command of theirs runs after a refresh and when a home's state changes. It runs beside all the
// rest and holds no lock, so that nothing that it does delays a refresh.

/** What there is to tell of a home, each with the fields of the status file that remember that it was told. */
export function news({ state, last_success_iso, told_state, told_success_iso }: View): [Event, Partial<Status>][] {
  const now = state === "unhealthy" ? "unhealthy" : "healthy";
  const all: [boolean, Event, Partial<Status>][] = [
    [last_success_iso !== told_success_iso, "refreshed", { told_success_iso: last_success_iso }],
    // A home without a login is no better off than before: that is told once there is one that lives.
    [state !== "inert" && now !== (told_state ?? "healthy"), now === "unhealthy" ? now : "recovered", {
      told_state: now,
    }],
  ];
  return all.flatMap(([isNew, event, told]) => isNew ? [[event, told]] : []);
}

type Event = "refreshed" | "unhealthy" | "recovered";

/**
 * Has the operator's command told of whatever is new about a home, one thing after the other. What it fails at is told
 * again after the next attempt. `stop` leaves it 5 s.
 */
function teller(command: string | null, env: Environment, settings: Settings, stop: AbortSignal) {
  const busy = new Map<string, Promise<void>>();
  const tell = async (command: string, home: Home, log: Log) => {
    const waits = commands.free === 0;
    const done = await commands.take();
    try {
      // After a SIGTERM there is no time for those that waited: the next start tells.
      if (!(stop.aborted && waits)) await tellAll(command, home, log);
    } finally {
      done();
    }
  };
  const tellAll = async (command: string, home: Home, log: Log) => {
    for (const seen = new Set<string>(); !stop.aborted || seen.size === 0;) {
      const read = await readSettled(locate(home).path);
      const stands = view(home.dir, read, readStatus(home.status), [], Date.now(), settings);
      const [event, change] = news(stands).find(([event]) => !seen.has(event)) ?? [];
      if (event === undefined) return;
      seen.add(event);
      const told = {
        CODEX_AUTH_EVENT: event,
        CODEX_HOME: home.dir,
        CODEX_AUTH_OUTCOME: stands.watchdog_last_outcome,
        CODEX_AUTH_REASON: stands.reason,
        CODEX_AUTH_ADVICE: stands.advice ?? "",
      };
      const known = () => void readAuth(locate(home).path); // other homes' tokens may have displaced this one's
      const failure = await runCommand(command, { ...env, ...told }, stop, log, known);
      if (failure === null) {
        log("info", "told", `exec: event=${event} ok`);
        writeStatus(home, log, () => change ?? {});
      } else log("error", "not_told", `exec: event=${event} failed (${failure}), it is told again at the next attempt`);
    }
  };
  return {
    tell(home: Home, log: Log): void {
      if (command === null || busy.has(home.dir)) return;
      busy.set(home.dir, tell(command, home, log).finally(() => busy.delete(home.dir)));
    },
    told: () => Promise.all(busy.values()),
  };
}

/** Runs the operator's command, for 60 s at most, then ends it with its children. Null, or why it failed. */
async function runCommand(
  command: string,
  env: Environment,
  stop: AbortSignal,
  log: Log,
  beforeOutput: () => void,
): Promise<string | null> {
  const [program, ...args] = fs.existsSync("/bin/sh") ? ["/bin/sh", "-c", command] as const : [command] as const;
  const late = "it did not end in time";
  try {
    // A process group of its own, which can be ended whole.
    const child = builtin("node:child_process").spawn(program, args, {
      env,
      detached: true,
      stdio: ["ignore", "pipe", "pipe"],
    });
    const broken = new Promise<string>((resolve) => child.on("error", (error) => resolve(errorName(error))));
    if (child.pid === undefined) return await broken; // Node.js leaves it without streams then
    const outputs = [child.stdout, child.stderr].map((stream) => {
      const output = { stream, text: "", length: 0 };
      stream.setEncoding("utf8").on("data", (text: string) => {
        output.text += text.slice(0, MAX_OUTPUT - output.text.length);
        output.length += text.length;
      });
      return output;
    });
    const ended = new Promise<string | null>((resolve) => {
      broken.then(resolve);
      child.on("exit", (code, signal) => {
        const end = () => resolve(code === 0 ? null : signal ?? `exit ${code}`);
        child.on("close", end);
        sleep(SECOND).then(end); // something that it started, and that goes on, may hold its output
      });
    });
    const limit = sleep(EXEC_MS, stop).then(() => stop.aborted ? sleep(EXEC_STOP_MS) : undefined).then(() => late);
    const failure = await Promise.race([ended, limit]);
    if (failure === late && child.pid !== undefined) process.kill(-child.pid, "SIGKILL");
    beforeOutput();
    for (const { stream, text, length } of outputs) {
      stream.destroy();
      // Cut off, the last line might end in a piece of a token.
      const lines = Secret.redact(text).split("\n").slice(0, length > text.length ? -1 : undefined);
      for (const line of lines.filter((line) => line.trim() !== "")) {
        log("info", "exec", `exec: ${line.slice(0, 1000)}`);
      }
      if (length > text.length) log("info", "exec", `exec: and more, ${length} characters in all`);
    }
    return failure;
  } catch (error) {
    return errorName(error);
  }
}

// ── loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
// When to look next is one pure function of what is known, the clock and a random number. Around it stands one timer for
// all homes: short steps by the wall clock, so that neither a suspended machine nor a long interval oversleeps, and a
// look at each auth.json's identity at least once a minute.

/** What the scheduler goes by. */
export interface Known {
  /**
   * The last outcome; "start" before the first, "changed" when somebody else wrote auth.json, "unreadable" where the disk
   * did not let us read it.
   */
  readonly outcome: Outcome | "start" | "changed" | "unreadable";
  /** Whether a refresh is due by the rule of {@link decide}; matters where somebody else has written auth.json. */
  readonly due: boolean;
  readonly credential: Pick<Credential, "expiresMs" | "lastRefreshMs">;
  /** Failures in a row, this one included. */
  readonly failures: number;
  readonly retryAfterMs: number | null;
}

/**
 * The next moment to look, in milliseconds since 1970, and why. `random` is from [0, 1). Pure. A planned wait carries a
 * jitter of up to a tenth of itself, a backoff of up to half, always added, so that a fleet that starts together or finds
 * the endpoint back does not ask together.
 */
export function schedule(
  { outcome, due, credential: { expiresMs, lastRefreshMs }, failures, retryAfterMs }: Known,
  settings: Pick<Settings, "intervalSeconds" | "marginSeconds" | "staleSeconds">,
  nowMs: number,
  random: number,
): { at: number; why: string } {
  const interval = settings.intervalSeconds * SECOND;
  const alive = expiresMs !== null && expiresMs > nowMs;
  const middle = alive ? expiresMs - settings.marginSeconds * SECOND / 2 : Infinity;
  // The jitter goes past the middle of the margin only where the wait itself does, and never past the expiry.
  const planned = (at: number, why: string) => {
    const latest = at < middle || !alive ? middle : expiresMs;
    return { at: Math.max(at, Math.min(latest, at + 0.1 * random * (at - nowMs))), why };
  };

  if (outcome.startsWith("fail:permanent_")) return planned(nowMs + interval, "waiting for a new login");
  if (outcome === "unreadable" || outcome.startsWith("fail:")) {
    const backoff = Math.min(interval, FIRST_BACKOFF_MS * 2 ** (failures - 1));
    const asked = Math.min(interval, retryAfterMs ?? 0);
    const why = asked > backoff ? "the endpoint asked to wait" : `backoff after failure ${failures}`;
    return { at: nowMs + Math.max(backoff, asked) * (1 + 0.5 * random), why };
  }
  if (outcome === "start" || outcome === "changed" || due && outcome === "superseded") {
    if (!due || !alive) return { at: nowMs, why: outcome }; // an attempt asks nobody then, or cannot wait
    // Whoever wrote a new login has just refreshed it: it is not ours to spend before half of its life.
    const half = outcome !== "start" && lastRefreshMs !== null ? (lastRefreshMs + expiresMs) / 2 : nowMs;
    if (half > nowMs + interval) return planned(nowMs + interval, "interval");
    if (half > nowMs) return { at: half, why: "half of the token's life" };
    return { at: Math.min(expiresMs, nowMs + random * Math.min(MINUTE, interval)), why: "spread" };
  }
  if (outcome === "skip:no_auth_json") return planned(nowMs + interval, "waiting for a login");

  const margin = expiresMs === null ? Infinity : expiresMs - settings.marginSeconds * SECOND;
  const stale = lastRefreshMs === null ? Infinity : lastRefreshMs + settings.staleSeconds * SECOND;
  if (Math.min(margin, stale) > nowMs + interval) return planned(nowMs + interval, "interval");
  if (outcome === "skip" && Math.min(margin, stale) <= nowMs) return planned(nowMs + interval, "nothing to refresh");
  // Tokens that live for less than the margin are always due: without a floor that would spin.
  const success = outcome === "refreshed";
  const floor = success ? nowMs + Math.min(MINUTE, interval) : nowMs;
  const half = success && expiresMs !== null ? (nowMs + expiresMs) / 2 : nowMs;
  const [entersMargin, getsStale] = [Math.max(margin, floor, half), Math.max(stale, floor)];
  if (entersMargin <= getsStale) return planned(entersMargin, "token enters its margin");
  return planned(getsStale, "last_refresh gets stale");
}

/** `5 h 58 min`, for people. */
export function humanize(milliseconds: number): string {
  const seconds = Math.max(0, Math.round(milliseconds / SECOND));
  const units: [number, string][] = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const first = units.findIndex(([size]) => seconds >= size);
  const parts = units.map(([size, name], index) => {
    const bigger = units[index - 1]?.[0] ?? Infinity;
    return `${Math.floor(seconds % bigger / size)} ${name}`;
  });
  return first < 0 ? "0 s" : parts.slice(first, first + 2).filter((part) => !part.startsWith("0 ")).join(" ");
}

/** What the loop goes by; tests and simulations bring their own. */
export interface Clock {
  /** Milliseconds since 1970. */
  readonly now: () => number;
  /** Milliseconds that have passed, whatever happens to the clock on the wall. */
  readonly uptime: () => number;
  /** Chance, from [0, 1). */
  readonly random: () => number;
  readonly sleep: (milliseconds: number, signal?: AbortSignal) => Promise<void>;
}
export const CLOCK: Clock = { now: Date.now, uptime, random: Math.random, sleep };

/**
 * One home in the loop. `at` is when to look, 0 meaning now and Infinity that nothing is planned yet; `identity` is what
 * auth.json was at the last look, "" before the first.
 */
interface Watch {
  readonly home: Home;
  readonly log: Log;
  busy: boolean;
  at: number;
  identity: string;
  /** Whether a SIGHUP came while an attempt was under way. */
  hungUp: boolean;
  failures: number;
  /** The fingerprint of the refresh token that the endpoint has not accepted: another look at it changes no plan. */
  askedInVain: string | null;
}

/** What the homes of a loop share. */
interface Shared extends Omit<Context, "log"> {
  readonly clock: Clock;
  /** Called after each attempt. */
  readonly done: (home: Home, log: Log) => void;
}

/** Plans the next look at a home, tells of it, and returns its moment. */
function plan(watch: Watch, known: Omit<Known, "failures">, { settings, clock }: Shared): number {
  const now = clock.now();
  const { at, why } = schedule({ ...known, failures: watch.failures }, settings, now, clock.random());
  if (at > now) watch.log("info", "next", `next check in ${humanize(at - now)} (${why})`);
  return watch.at = at;
}

/** Plans without an attempt: at the start, and when somebody else has written auth.json. */
function look(watch: Watch, outcome: "start" | "changed", shared: Shared): void {
  watch.identity = identify(watch.home);
  const { path } = locate(watch.home);
  const verdict = decide(readAuth(path), shared.clock.now(), shared.settings);
  const due = verdict.due && !hasJournals(path);
  if (due && outcome === "changed" && watch.askedInVain === verdict.token.fingerprint()) return;
  const at = plan(watch, { outcome, due, credential: verdict.credential, retryAfterMs: null }, shared);
  if (at > shared.clock.now()) writeStatus(watch.home, watch.log, () => ({ next_run_iso: iso(at) }));
}

/** What is to be done about a home now: an attempt where it is due, else a look at whether somebody else wrote auth.json. */
async function visit(watch: Watch, isDue: boolean, shared: Shared): Promise<void> {
  [watch.busy, watch.hungUp] = [true, false];
  if (!await reaches(watch.home, watch.log)) {
    watch.at = Math.max(watch.at, shared.clock.now() + STEP_MS); // a later plan stands, what is due is tried at each step
  } else if (isDue) await run(watch, shared);
  else if (identify(watch.home) !== watch.identity) look(watch, watch.identity === "" ? "start" : "changed", shared);
  watch.busy = false;
  if (watch.hungUp) watch.at = 0;
}

/** One attempt on a home, and the plan that follows from it. */
async function run(watch: Watch, shared: Shared): Promise<void> {
  const { home, log } = watch;
  const before = identify(home);
  const ending = await attempt(home, { ...shared, log }, ({ outcome, retryAfterMs = null }, verdict) => {
    const { due, credential } = verdict;
    const unreadable = !verdict.due && verdict.blocked && outcome === "skip";
    const asked = /^fail:(transient|permanent|apply)/.test(outcome) && identify(home) === before;
    watch.failures = unreadable || exitCode(outcome) === 2 ? watch.failures + 1 : 0;
    watch.askedInVain = asked ? credential.refreshToken?.fingerprint() ?? null : null;
    return plan(watch, { outcome: unreadable ? "unreadable" : outcome, due, credential, retryAfterMs }, shared);
  });
  // What was written while we looked was not ours unless we refreshed: the next step sees the difference.
  watch.identity = ending?.outcome === "refreshed" ? identify(home) : before;
  shared.done(home, log);
}

/**
 * Watches for ever; returns after `stop` is aborted and what was in hand is finished. `onHangUp` is given a function
 * that makes every home look now.
 */
export async function loop(
  homes: readonly Home[],
  settings: Settings,
  logOf: (home: Home) => Log,
  stop: AbortSignal,
  onHangUp: (look: () => void) => void,
  clock: Clock,
  done: (home: Home, log: Log) => void = () => {},
): Promise<void> {
  const idle = { busy: false, at: Infinity, identity: "", hungUp: false, failures: 0, askedInVain: null };
  const watches = homes.map((home): Watch => ({ home, log: logOf(home), ...idle }));
  const running = new Set<Promise<void>>();
  let alarm = new AbortController();
  // While it lives the loop never gives up on an answer; after a SIGTERM it has another minute.
  let stoppedAt = Infinity;
  stop.addEventListener("abort", () => {
    stoppedAt = uptime();
    alarm.abort();
  });
  onHangUp(() => {
    for (const watch of watches) [watch.at, watch.hungUp] = [0, true];
    alarm.abort();
  });
  const shared: Shared = { settings, stop, giveUpAt: () => stoppedAt + MINUTE, force: false, clock, done };

  let [wall, up, looked, next] = [clock.now(), clock.uptime(), -Infinity, Infinity];
  while (!stop.aborted) {
    const now = clock.now();
    const setBackBy = clock.uptime() - up - (now - wall); // what the wall clock lags behind the time that has passed
    const wasSetBack = setBackBy > SECOND;
    const isStep = wasSetBack || clock.uptime() - looked >= STEP_MS;
    [wall, up] = [now, clock.uptime()];
    if (isStep) looked = up;
    for (const watch of watches) {
      if (wasSetBack) setBack(watch, setBackBy, now);
      if (watch.busy || now < watch.at && !isStep) continue;
      const visited = visit(watch, now >= watch.at, shared).finally(() => {
        running.delete(visited);
        if (watch.at < next) alarm.abort();
      });
      running.add(visited);
    }
    alarm = new AbortController();
    next = Math.min(...watches.map((watch) => watch.busy ? Infinity : watch.at));
    await clock.sleep(Math.max(0, Math.min(looked + STEP_MS - clock.uptime(), next - clock.now())), alarm.signal);
    await clock.sleep(0); // lets a signal in that has come, before anything further is begun
  }
  await Promise.all(running);
}

/** A clock that was set back must not make a planned wait longer. */
function setBack(watch: Watch, milliseconds: number, now: number): void {
  watch.at -= milliseconds;
  const hangs = outstanding.has(watch.home.dir);
  if (watch.at > now && !hangs) writeStatus(watch.home, watch.log, () => ({ next_run_iso: iso(watch.at) }));
}

function hasJournals(path: string): boolean {
  return quietly(() => findJournals(path).length > 0) ?? true; // what fails is for an attempt to say
}

/** What changes when auth.json is written, replaced or made readable; no more than a stat. */
function identify(home: Home): string {
  try {
    const { dev, ino, size, mtimeMs, ctimeMs } = fs.statSync(join(home.dir, "auth.json"));
    return [dev, ino, size, mtimeMs, ctimeMs].join(":");
  } catch (error) {
    return errorName(error);
  }
}

// ── main ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
// The command line. Logs go to stderr; stdout carries only what was asked for.

const HELP = `codex_auth_refresh keeps the Codex CLI's ChatGPT login alive while nobody uses it: it redeems the refresh
token in auth.json before the login gets too old, and stores the answer so that it is not lost.

Usage:
  codex_auth_refresh [--listen ADDR:PORT] [--exec COMMAND] [CODEX_HOME ...]    watch for ever
  codex_auth_refresh --once [--force] [--exec COMMAND] [CODEX_HOME ...]        one attempt
  codex_auth_refresh --status [--json | --verbose] [CODEX_HOME ...]            how it stands
  codex_auth_refresh --health | --metrics [CODEX_HOME ...]                     for probes and scrapers

Flags:
  --listen ADDR:PORT  also answer GET /healthz, /metrics and /status; PORT alone is on loopback
  --exec COMMAND      run this by /bin/sh after a refresh and when the state changes, 60 s at most; it finds
                      CODEX_AUTH_EVENT (refreshed, unhealthy, recovered), CODEX_HOME, CODEX_AUTH_OUTCOME,
                      CODEX_AUTH_REASON and CODEX_AUTH_ADVICE in its environment
  --once              one attempt; the exit code tells how it ended
  --force             with --once: ask even where the token is fresh, or known to be dead
  --status            the credential, the last run, the next one, and what to do where something is wrong
  --json              with --status: for machines
  --verbose           with --status: the e-mail address too
  --health            one line, exit 0 where all is well, 1 where not
  --metrics           Prometheus text
  -h, --help          this text
  -V, --version       version and engine

Variables (one that is set to the empty string counts as unset):
  CODEX_HOME                           the home, where none is given       $HOME/.codex
  CODEX_AUTH_REFRESH_INTERVAL_SECONDS  look at least this often            21600 (6 hours)
  CODEX_AUTH_SAFETY_MARGIN_SECONDS     refresh this long before expiry     14400 (4 hours)
  CODEX_AUTH_STALE_AFTER_SECONDS       refresh when last refreshed before  604800 (7 days)
  CODEX_REFRESH_TOKEN_URL_OVERRIDE     the endpoint   ${DEFAULT_URL}
  CODEX_APP_SERVER_LOGIN_CLIENT_ID     the client id of the request       the Codex CLI's
  CODEX_AUTH_ALLOW_HTTP                1: http also to hosts other than loopback
  CODEX_CA_CERTIFICATE, SSL_CERT_FILE  PEM file of further roots; the first that is set
  https_proxy, http_proxy, ALL_PROXY, NO_PROXY
                                       as curl reads them: small or capital, but HTTP_PROXY not
  CODEX_AUTH_IN_PLACE                  1: rewrite an auth.json that cannot be renamed over (a mount
                                       point of its own, a second hard link) in place, journalled
  CODEX_AUTH_LOG_FORMAT                text or json                        text
  NO_COLOR                             anything: no colours in --status
  With neither CODEX_HOME nor HOME the home is /home/agent/.codex.

Exit codes of --once:
  0   refreshed
  1   nothing to do: fresh, no login to refresh, or somebody else has just refreshed it
  2   transient failure, worth another try
  3   permanent failure: an operator must log in again
  64  usage or configuration error, before anything was touched
  With several homes: 3 if any is 3, else 2 if any is 2, else 0 if any is 0, else 1.

Files:
  auth.json                 the login; replaced atomically, every field that is not ours kept
  auth_refresh.lock         empty; copies of this program take turns on it
  .auth.json.*.tmp          an answer on its way into auth.json: do not delete it
  auth_refresh_status.json  what the last attempt left, never a token

Examples:
  codex_auth_refresh --once || [ $? -eq 1 ] || echo "look at the login"
  codex_auth_refresh &
  CODEX_AUTH_REFRESH_INTERVAL_SECONDS=3600 codex_auth_refresh /srv/homes/*/.codex
`;

/**
 * Whatever would end the process while an answer is on its way, and can be caught; beside SIGHUP, and what an engine takes
 * for itself or crashes with (SIGPWR, SIGTRAP, SIGSYS).
 */
const ENDING_SIGNALS: NodeJS.Signals[] = [
  ...["SIGTERM", "SIGINT", "SIGQUIT", "SIGABRT", "SIGALRM", "SIGVTALRM"] as const,
  ...["SIGPROF", "SIGUSR1", "SIGUSR2", "SIGIO", "SIGXCPU", "SIGXFSZ"] as const,
];

const MODES = ["once", "status", "health", "metrics"] as const;
const SWITCH = { type: "boolean", default: false } as const;
const FLAGS = {
  once: SWITCH,
  force: SWITCH,
  status: SWITCH,
  json: SWITCH,
  verbose: SWITCH,
  health: SWITCH,
  metrics: SWITCH,
  help: { ...SWITCH, short: "h" },
  version: { ...SWITCH, short: "V" },
  listen: { type: "string" },
  exec: { type: "string" },
} as const;

function parse(args: readonly string[]) {
  try {
    return parseArgs({ args: [...args], options: FLAGS, allowPositionals: true });
  } catch (error) {
    throw new UsageError((error as Error).message.replace(/\. To specify.*/s, "").replaceAll("\n", " "));
  }
}

function readArguments(args: readonly string[]) {
  const { values: parsed, positionals: homes } = parse(args);
  const { once, status, force, json, verbose, listen, exec } = parsed;
  const [mode, ...further] = MODES.filter((mode) => parsed[mode]);
  const mistakes: [is: boolean, text: string][] = [
    [further.length > 0, `--${[mode, ...further].join(" and --")} exclude each other`],
    [force && !once, "--force goes with --once"],
    [(json || verbose) && !status, "--json and --verbose go with --status"],
    [json && verbose, "--json and --verbose exclude each other"],
    [exec === "", "--exec: must be a command"],
    [exec !== undefined && !once && mode !== undefined, `--exec does not go with --${mode}`],
    [listen !== undefined && mode !== undefined, `--listen does not go with --${mode}`],
  ];
  for (const [is, text] of mistakes) if (is) throw new UsageError(text);
  return { ...parsed, homes };
}

/**
 * A sink for log lines that never stops an attempt: a line that a closed or full pipe does not take is dropped.
 * `settled` resolves when nothing is on its way any more, or after a moment.
 */
function openLog(): { write: (line: string) => void; settled: () => Promise<void> } {
  let fd = 2;
  let blocks = ENGINE === "deno";
  try {
    const stat = fs.fstatSync(2);
    blocks = !stat.isFile();
    // A description of our own for the same pipe or terminal: it does not block, and leaves the others' as it is.
    if (!blocks || stat.isSocket()) throw new Error("needs none, or cannot have one");
    fd = fs.openSync("/proc/self/fd/2", fs.constants.O_WRONLY | fs.constants.O_NONBLOCK);
    blocks = false;
  } catch {
    // Then as it is; where it may block, in the background.
  }
  const lines: string[] = [];
  let drained: Promise<unknown> = Promise.resolve();
  const drain = async () => {
    for (let line = lines[0]; line !== undefined; line = lines[0]) {
      await writeInBackground(Buffer.from(line)).catch(() => {}); // dropped
      lines.shift();
    }
  };
  const write = (text: string) => {
    const line = `${text}\n`;
    try {
      if (!blocks) fs.writeSync(fd, line);
      else if (lines.length < MAX_LINES && lines.push(line) === 1) drained = drain();
    } catch {
      // Dropped.
    }
  };
  return { write, settled: async () => lines.length > 0 ? void await Promise.race([drained, sleep(200)]) : undefined };
}

function writeInBackground(bytes: Uint8Array): Promise<unknown> {
  if (ENGINE === "deno") return Deno.stderr.write(bytes);
  return new Promise((resolve) => fs.write(2, bytes, resolve));
}

async function print(text: string): Promise<number> {
  for (let bytes = Buffer.from(text); bytes.length > 0;) {
    try {
      // A pipe takes so much whole or not at all; of more, Deno does not tell how much of it was taken.
      bytes = bytes.subarray(fs.writeSync(1, bytes.subarray(0, 4096)));
    } catch (error) {
      if (errorName(error) === "EPIPE") break; // whoever asked has gone
      if (errorName(error) !== "EAGAIN") throw new Error(`stdout: ${describeDisk(error)}`);
      await sleep(10);
    }
  }
  return 0;
}

async function main(args: readonly string[], env: Environment): Promise<number> {
  const { write, settled } = openLog();
  try {
    return await start(args, env, write);
  } catch (error) {
    const usage = error instanceof UsageError;
    const why = oneLine(Secret.redact(String((error as Error).message)));
    write(`codex_auth_refresh: ${why}${usage ? " (see --help)" : ""}`);
    return usage ? 64 : 2;
  } finally {
    await settled();
  }
}

/** Where we run as a script of Node.js it may be too old, and would fail in the middle of things. */
function checkEngine(): void {
  if (ENGINE !== "node") return;
  process.removeAllListeners("warning"); // node:sqlite is called experimental, on stderr
  delete process.env.NODE_TLS_REJECT_UNAUTHORIZED;
  if (parseInt(versions.node ?? "") >= 24 && builtin("node:module").isBuiltin("node:sqlite")) return;
  throw new UsageError(`needs Node.js 24 or newer, with node:sqlite; this is ${versions.node}`);
}

async function start(args: readonly string[], env: Environment, write: (line: string) => void): Promise<number> {
  checkEngine();
  const flags = readArguments(args);
  if (flags.help) return print(HELP);
  if (flags.version) return print(`codex_auth_refresh ${VERSION} (${ENGINE} ${versions[ENGINE]})\n`);
  const settings = readSettings(env);
  const homes = await readHomes(flags.homes, env);
  const address = flags.listen === undefined ? null : readAddress(flags.listen);
  if (flags.exec !== undefined && ENGINE === "deno") {
    const { state } = await Deno.permissions.request({ name: "run" });
    if (state !== "granted") throw new UsageError("--exec needs Deno's permission to run a program: --allow-run");
  }
  const guarded = homes.length > 1 || flags.listen !== undefined;
  const views = () => viewAll(homes, settings, flags.verbose, guarded);
  if (flags.status || flags.health || flags.metrics) return await show(flags, await views(), !env.NO_COLOR);

  const logOf = (home: Home | null) => logTo(write, settings.logFormat, home, homes.length > 1);
  const log = logOf(null);
  const warn = (home: Home) => {
    for (const each of oddities(home)) log("warning", "odd_home", `${home.dir}: ${each}`);
  };
  // With --once a terminal that closes must not cost an answer either.
  const stop = stopOn(flags.once ? [...ENDING_SIGNALS, "SIGHUP"] : ENDING_SIGNALS, log);
  const inherited = { ...env };
  // What they say is in the settings; each engine would read them its own way.
  for (const name of Object.keys(inherited)) if (/^(https?|all|no)_proxy$/i.test(name)) delete process.env[name];
  const { tell, told } = teller(flags.exec ?? null, inherited, settings, stop);
  if (flags.once) {
    const giveUpAt = (since: number) => since + MINUTE;
    const context = { settings, force: flags.force, stop, giveUpAt, clock: CLOCK };
    const codes = homes.map(async (home) => {
      const log = logOf(home);
      if (guarded && !await reaches(home, log)) return 2;
      const ending = await attempt(home, { ...context, log });
      tell(home, log);
      // A login that is not in auth.json may be where we do not look.
      if (ending?.outcome === "skip:no_auth_json") warn(home);
      return ending === null ? 2 : exitCode(ending.outcome);
    });
    const code = worstExit(await Promise.all(codes));
    await told();
    return code;
  }
  let hangUp = () => {}; // the loop looks anyway as it begins
  process.on("SIGHUP", () => hangUp());
  const { intervalSeconds: interval, marginSeconds: margin, staleSeconds: stale } = settings;
  const seconds = `interval=${interval}s safety_margin=${margin}s stale_after=${stale}s`;
  log("info", "started", `watchdog: starting (${seconds} codex_home=${homes.map(({ dir }) => dir).join(",")})`);
  // Of a home that does not answer the loop itself tells.
  await Promise.all(homes.map(async (home) => await diskAnswers(home.dir) && warn(home)));
  if (address !== null) {
    const port = await listen(address, views, stop);
    log("info", "listening", `listening on ${address.host} port ${port}`);
  }
  await loop(homes, settings, logOf, stop, (look) => hangUp = look, CLOCK, tell);
  await told();
  return 0;
}

/** Prints what was asked for by a mode that only looks; its exit code. */
async function show(flags: ReturnType<typeof readArguments>, views: View[], colours: boolean): Promise<number> {
  if (flags.json) return await print(showJson(views));
  if (flags.status) return await print(showStatus(views, colours && builtin("node:tty").isatty(1), Date.now()));
  if (flags.metrics) return await print(showMetrics(views));
  await print(showHealth(views));
  return Number(views.some(({ state }) => state === "unhealthy"));
}

/** Aborted by the first of these signals. */
function stopOn(signals: readonly NodeJS.Signals[], log: Log): AbortSignal {
  const stopping = new AbortController();
  for (const signal of signals) {
    process.on(signal, () => {
      if (!stopping.signal.aborted) log("info", "stopping", `watchdog: ${signal}, finishing what is in hand`);
      stopping.abort();
    });
  }
  return stopping.signal;
}

/** ADDR:PORT, or PORT alone, which is one on loopback. */
function readAddress(text: string): { host: string; port: number } {
  const [, v6, name, port = ""] = /^(?:\[([0-9a-f:.]+)\]:|([\w.-]*):)?(\d+)$/i.exec(text) ?? [];
  if (port === "" || Number(port) > 65535) throw new UsageError(`--listen ${text}: must be ADDR:PORT, or PORT`);
  return { host: v6 || name || "127.0.0.1", port: Number(port) };
}

/** Answers `/healthz`, `/metrics` and `/status` over HTTP, and nothing else. Resolves to the port once it listens. */
async function listen(
  { host, port }: { host: string; port: number },
  views: () => Promise<View[]>,
  stop: AbortSignal,
): Promise<number> {
  const { createServer } = builtin("node:http");
  const server = createServer(async (request, response) => {
    const answer = (status: number, type: string, body: string) =>
      response.writeHead(status, { "content-type": type, "cache-control": "no-store" }).end(body);
    const path = request.url?.split("?")[0];
    if (!["/healthz", "/metrics", "/status"].includes(path ?? "")) return answer(404, "text/plain", "not found\n");
    if (!/^(GET|HEAD)$/.test(request.method ?? "")) return answer(405, "text/plain", "GET only\n");
    const all = await views();
    if (path === "/metrics") return answer(200, "text/plain; version=0.0.4; charset=utf-8", showMetrics(all));
    if (path === "/status") return answer(200, "application/json", showJson(all.map(withoutPaths)));
    return answer(all.some(({ state }) => state === "unhealthy") ? 503 : 200, "text/plain", showHealth(all));
  });
  await new Promise<void>((resolve, reject) => {
    server.on("error", (error) => {
      const why = `--listen ${host}:${port}: ${errorName(error)}`;
      // An address that is taken, or not there yet, may be had at the next start.
      reject(why.includes("EADDR") ? new Error(why) : new UsageError(why));
    });
    server.listen(port, host, resolve);
  });
  stop.addEventListener("abort", () => {
    server.close();
    server.closeAllConnections();
  });
  const address = server.address();
  return typeof address === "object" && address !== null ? address.port : port;
}

/** What may be told over the network: no path but the home's name. */
function withoutPaths(each: View): View {
  const told = !/^fail:(preflight|store|locked)$/.test(each.watchdog_last_outcome);
  return told ? each : { ...each, detail: null, advice: each.advice && "see codex_auth_refresh --status" };
}

// Older Node.js does not say, but is to be told that it is too old.
if (import.meta.main !== false) {
  const code = await main(process.argv.slice(2), process.env);
  // Node.js would wait for its threads, one of which may wait for a disk for ever.
  if (ENGINE === "node" && outstanding.size > 0) process.kill(process.pid, "SIGKILL");
  process.exit(code);
}
