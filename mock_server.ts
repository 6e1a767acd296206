/**
 * A stand-in for OpenAI's OAuth token endpoint, for tests, demos and curious
 * hands. It keeps the one rule that makes refreshing delicate, that a refresh
 * token can be redeemed once, and it can be told to misbehave in most of the
 * ways in which servers and networks do. It runs under Deno and under Bun, by
 * itself (see `--help`) or inside a test:
 *
 * ```ts
 * const mock = await startMockServer();
 * const { refresh_token } = mock.login();
 * mock.next({ kind: "reset", ledger: "after" });
 * // ... let the program under test send refresh_token to mock.url ...
 * mock.redeemed(refresh_token); // 1: spent, though the answer was lost
 * await mock.close();
 * ```
 *
 * @module
 */
import { Buffer } from "node:buffer";
import { randomBytes, randomUUID } from "node:crypto";
import { once } from "node:events";
import { writeFile } from "node:fs/promises";
import * as http from "node:http";
import * as https from "node:https";
import type { AddressInfo, Socket } from "node:net";
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "@std/cli/parse-args";

// ── vocabulary ───────────────────────────────────────────────────────────────────────────────────
// What a test says to the server, and what it hears back. A `Behaviour` takes
// the place of the ordinary answer. Each says, beside what happens to the
// connection, whether the ledger moves: a token that was spent without its
// answer arriving is the case that all the others lead up to.

/** The three tokens of a login, under the names that auth.json gives them. */
export interface Tokens {
  id_token: string;
  access_token: string;
  refresh_token: string;
}

/** How to start a server. */
export interface MockOptions {
  port?: number; // 0, the default: a free one
  hostname?: string; // 127.0.0.1 by default
  accessTokenSeconds?: number; // life of issued ones, ten days by default
  tls?: { cert: string; key: string }; // PEM; with it the server speaks https
  acceptAny?: boolean; // take an unknown refresh token for a login
  onAnswer?: (seen: Seen) => void; // an answer begins, or is withheld for good
}

/** An answer of the test's own making. */
export interface Canned {
  status?: number; // 200 by default
  headers?: Record<string, string>;
  contentType?: string; // application/json by default
  body?: string | Uint8Array; // an error object by default
  code?: string; // its error code, and where in the object that stands
  shape?: "error.code" | "error" | "code";
  redeem?: boolean; // spend the token all the same
}

/** What a request gets instead of the ordinary answer. */
export type Behaviour =
  | (Canned & { kind: "status"; status: number })
  | (Canned & { kind: "raw"; body: string | Uint8Array })
  /** 429; the value is a number of seconds or an HTTP date. */
  | { kind: "retry_after"; value: string }
  /** No answer, until either side closes. */
  | { kind: "hang" }
  /** The ordinary answer, its body byte by byte. */
  | { kind: "drip"; millisecondsPerByte: number }
  /** The ordinary answer, late; the ledger moves when the request arrives. */
  | { kind: "delay"; milliseconds: number }
  /** The connection is reset, before or after the token was redeemed. */
  | { kind: "reset"; ledger: "before" | "after" }
  /** Redeemed; the connection ends halfway through the promised length. */
  | { kind: "truncated" }
  /** Redeemed; all of the body comes, less than the promised length, and half a second later the connection ends. */
  | { kind: "unfinished" }
  /** Redeemed; complete as HTTP, but the JSON breaks off halfway. */
  | { kind: "cut_json" }
  /** 200 and a page for people. */
  | { kind: "html" }
  /** 200 and a body that never ends. */
  | { kind: "endless" }
  /** 307 by default, which asks the client to send its token elsewhere. */
  | { kind: "redirect"; location: string; status?: number }
  /** Redeemed; fields of the answer overridden, `undefined` drops one. */
  | { kind: "fields"; fields: Record<string, unknown> };

/** One request as the server saw it, without any token. */
export interface Seen {
  at: number; // when its body had arrived, in milliseconds since the epoch
  connection: number; // which of the server's connections it came by, counted from 1
  method: string;
  path: string; // without the query
  headers: Record<string, string>;
  refreshToken: string; // "[redacted]", or "" where there was none
  client_id: string;
  grant_type: string;
  behaviour: Behaviour["kind"] | null; // what replaced the ordinary answer
  status: number | null; // null where there is no answer (yet)
  /** What the ledger made of it; "other" where it was not asked. */
  outcome: "redeemed" | "reused" | "unknown" | "repeated" | "other";
}

/** A running server. */
export interface MockServer {
  /** The token endpoint: `http(s)://host:port/oauth/token`. */
  readonly url: string;
  readonly port: number;
  /** A new login; negative seconds give an expired access token. */
  login(options?: { accessTokenSeconds?: number }): Tokens;
  /** The newest refresh token of this one's login, or "" where unknown. */
  newest(token: string): string;
  /** How often this refresh token was redeemed: never or once. */
  redeemed(token: string): number;
  state(token: string): "unspent" | "spent" | "unknown";
  /** Queues behaviours; each POST to the token endpoint takes one. */
  next(...behaviours: Behaviour[]): void;
  /** For every POST that finds the queue empty; null ends it. */
  always(behaviour: Behaviour | null): void;
  readonly requests: Seen[];
  /** Every token of the ledger, for tests that look for leaks. */
  readonly secrets: string[];
  /** The body of the latest POST to the token endpoint, token and all. */
  lastRequestBody(): string;
  /** How long a spent token still gets the same answer again: 0 by default. */
  graceMilliseconds: number;
  /** Called when a body has arrived, before the ledger moves; the answer waits for what it returns. */
  onRequest?: (seen: Seen) => void | Promise<void>;
  /** Ends every connection, hanging ones too, and every timer. */
  close(): Promise<void>;
}

// ── tokens ───────────────────────────────────────────────────────────────────────────────────────
// Nobody verifies a signature here, but clients do decode what they are given:
// the Codex CLI reads the plan and the account from the id token, and everybody
// reads `exp`. So the tokens are real JWTs in all but the signature.

const ACCOUNT_ID = "00000000-0000-4000-8000-000000000001";

/** A JWT with this payload; its third part signs nothing. */
export function jwt(payload: Record<string, unknown>): string {
  return [{ alg: "RS256", typ: "JWT" }, payload, "unsigned"]
    .map((part) => Buffer.from(JSON.stringify(part)).toString("base64url"))
    .join(".");
}

function issueTokens(accessTokenSeconds: number): Tokens {
  const now = Math.floor(Date.now() / 1000);
  const account = { chatgpt_plan_type: "pro", chatgpt_account_id: ACCOUNT_ID };
  const token = (seconds: number, claims: Record<string, unknown>) =>
    jwt({
      ...claims,
      "https://api.openai.com/auth": account,
      iat: now + Math.min(seconds, 0), // never issued after it expired
      exp: now + seconds,
      jti: randomUUID(), // no two are alike, even within a second
    });
  return {
    id_token: token(3600, { email: "user@example.com" }),
    access_token: token(accessTokenSeconds, {}),
    refresh_token: `rt_${randomBytes(36).toString("base64url")}`,
  };
}

/** The text of an auth.json as the Codex CLI writes it. */
export function authJson(tokens: Tokens, lastRefresh = new Date()): string {
  const document = {
    auth_mode: "chatgpt",
    OPENAI_API_KEY: null,
    tokens: { ...tokens, account_id: ACCOUNT_ID },
    last_refresh: lastRefresh.toISOString(),
  };
  return JSON.stringify(document, null, 2) + "\n";
}

// ── answers ──────────────────────────────────────────────────────────────────────────────────────
// Errors look like those of OpenAI's API, and a spent token gets its very
// words. The two other shapes are where other OAuth servers, and gateways in
// front of them, put the code.

const MESSAGES: Record<string, string> = {
  refresh_token_reused:
    "Your refresh token has already been used to generate a new access token. Please try signing in again.",
  refresh_token_invalidated: "Your refresh token is not valid any more. Please try signing in again.",
  refresh_token_expired: "Your refresh token has expired. Please try signing in again.",
};

function errorBody(code = "", shape: Canned["shape"] = "error.code"): string {
  const message = MESSAGES[code] ?? "The request was refused.";
  const type = "invalid_request_error";
  const shapes = {
    "error.code": { error: { message, type, param: null, code: code || null } },
    "error": { error: code, error_description: message },
    "code": { code, message },
  };
  return JSON.stringify(shapes[shape]);
}

// ── server ───────────────────────────────────────────────────────────────────────────────────────
// The ledger maps each refresh token to the login that it belongs to and, once
// it is spent, to what it was redeemed for. It is only touched synchronously,
// so no two requests can spend one token. A request is read to its end and
// recorded; then the behaviour whose turn it is, if any, decides the answer.

const MAX_REQUEST_BYTES = 1 << 20;

interface Entry {
  login: { newest: string };
  spent?: { at: number; tokens: Tokens };
}

/** Starts a server; it listens when the promise resolves. */
export async function startMockServer(options: MockOptions = {}): Promise<MockServer> {
  const { hostname = "127.0.0.1", accessTokenSeconds = 864_000 } = options;
  const ledger = new Map<string, Entry>();
  const queue: Behaviour[] = [];
  const sockets = new Map<Socket, number>();
  const closing = new AbortController();
  let standing: Behaviour | null = null;
  let lastBody = "";
  let connections = 0;

  function enter(token: string, login: Entry["login"]): Entry {
    const entry = { login };
    login.newest = token;
    ledger.set(token, entry);
    mock.secrets.push(token);
    return entry;
  }

  function issue(seconds = accessTokenSeconds, login = { newest: "" }): Tokens {
    const tokens = issueTokens(seconds);
    enter(tokens.refresh_token, login);
    mock.secrets.push(tokens.id_token, tokens.access_token);
    return tokens;
  }

  /** What a server in good health answers; only here are tokens spent. */
  function redeem(seen: Seen, token: string): { status: number; body: string } {
    if (seen.grant_type !== "refresh_token" || !token) {
      return { status: 400, body: errorBody("invalid_request") };
    }
    const entry = ledger.get(token) ?? (options.acceptAny ? enter(token, { newest: "" }) : undefined);
    if (!entry) {
      seen.outcome = "unknown";
      return { status: 401, body: errorBody("refresh_token_invalidated") };
    }
    const now = Date.now();
    if (entry.spent && now - entry.spent.at >= mock.graceMilliseconds) {
      seen.outcome = "reused";
      return { status: 401, body: errorBody("refresh_token_reused") };
    }
    seen.outcome = entry.spent ? "repeated" : "redeemed";
    entry.spent ??= { at: now, tokens: issue(undefined, entry.login) };
    return { status: 200, body: JSON.stringify(entry.spent.tokens) };
  }

  async function answer(seen: Seen, token: string, behaviour: Behaviour | null, response: http.ServerResponse) {
    const ordinary = () => redeem(seen, token);
    const record = (status: number | null) => {
      seen.status = status;
      options.onAnswer?.(seen);
    };
    const head = ({ status = 200, ...answer }: Canned) => {
      const body = answer.body ?? errorBody(answer.code, answer.shape);
      record(status);
      response.writeHead(status, {
        "content-type": answer.contentType ?? "application/json",
        "content-length": Buffer.byteLength(body),
        ...answer.headers,
      });
      return body;
    };
    // Head and body leave in one write.
    const send = (answer: Canned) => void response.end(head(answer));
    const pause = (milliseconds: number) => sleep(milliseconds, true, closing).catch(() => false);

    switch (behaviour?.kind) {
      case undefined:
        return send(ordinary());
      case "status":
      case "raw":
        if (behaviour.redeem) ordinary();
        return send(behaviour);
      case "retry_after":
        return send({ status: 429, code: "rate_limit_exceeded", headers: { "retry-after": behaviour.value } });
      case "redirect":
        return send({ status: behaviour.status ?? 307, headers: { location: behaviour.location }, body: "" });
      case "html":
        return send({ body: "<!doctype html><title>Sign in</title>", contentType: "text/html" });
      case "fields": {
        const { status, body } = ordinary();
        const fields = status === 200 ? behaviour.fields : {};
        return send({ status, body: JSON.stringify({ ...JSON.parse(body), ...fields }) });
      }
      case "cut_json": {
        const { status, body } = ordinary();
        return send({ status, body: body.slice(0, body.length / 2) });
      }
      case "truncated": {
        const whole = ordinary();
        const half = whole.body.slice(0, whole.body.length / 2);
        head(whole);
        return void response.write(half, () => response.socket?.destroy());
      }
      case "unfinished": {
        const whole = ordinary();
        head({ ...whole, headers: { "content-length": String(Buffer.byteLength(whole.body) + 9) } });
        response.write(whole.body);
        if (await pause(500)) response.socket?.destroy();
        return;
      }
      case "delay": {
        const late = ordinary();
        if (await pause(behaviour.milliseconds)) send(late);
        return;
      }
      case "drip": {
        const slow = ordinary();
        head(slow);
        for (const byte of slow.body) {
          response.write(byte);
          const open = await pause(behaviour.millisecondsPerByte);
          if (!open || response.destroyed) return;
        }
        return void response.end();
      }
      case "endless": {
        const block = "x".repeat(1 << 16);
        const pour = () => {
          while (!response.destroyed && response.write(block));
        };
        record(200);
        response.writeHead(200, { "content-type": "application/json" });
        response.on("drain", pour).write('{"access_token":"');
        return pour();
      }
      case "hang":
        return record(null);
      case "reset":
        if (behaviour.ledger === "after") ordinary();
        record(null);
        // Neither engine can reset TLS: there the connection just ends.
        if (options.tls) response.socket?.destroy();
        else response.socket?.resetAndDestroy();
    }
  }

  async function serve(request: http.IncomingMessage, response: http.ServerResponse) {
    const chunks: Uint8Array[] = [];
    let size = 0;
    try {
      // What is too long is read on, though not kept: a client that is still
      // sending would see a reset instead of the refusal.
      for await (const chunk of request as AsyncIterable<Uint8Array>) {
        size += chunk.length;
        if (size <= MAX_REQUEST_BYTES) chunks.push(chunk);
      }
    } catch {
      return; // the client left in the middle of its request
    }
    const text = Buffer.concat(chunks).toString();
    const fields = objectIn(text);
    const token = String(fields.refresh_token ?? "");
    const headers = Object.entries(request.headers).map(([name, value]) => {
      return [name, /authorization|cookie/.test(name) ? "[redacted]" : String(value)];
    });
    const seen: Seen = {
      at: Date.now(),
      connection: sockets.get(request.socket) ?? 0,
      method: request.method ?? "",
      path: (request.url ?? "").replace(/\?.*/, ""),
      headers: Object.fromEntries(headers),
      refreshToken: token && "[redacted]",
      client_id: String(fields.client_id ?? ""),
      grant_type: String(fields.grant_type ?? ""),
      behaviour: null,
      status: null,
      outcome: "other",
    };
    if (seen.path.startsWith("/mock/")) return control(seen, text, response);
    mock.requests.push(seen);

    let refused = 0;
    if (!/^\/$|\/oauth\/token$/.test(seen.path)) refused = 404;
    else if (seen.method !== "POST") refused = 405;
    else if (size > MAX_REQUEST_BYTES) refused = 413;
    if (refused) return answer(seen, "", { kind: "status", status: refused }, response);
    lastBody = text;
    const ready = mock.onRequest?.(seen);
    // Taken in the same turn: what is queued in onRequest is for this request, and for no other that comes beside it.
    const behaviour = queue.shift() ?? standing;
    seen.behaviour = behaviour?.kind ?? null;
    await ready;
    return answer(seen, token, behaviour, response);
  }

  /** `next`, `always` and `requests`, for other processes. */
  function control(seen: Seen, text: string, response: http.ServerResponse) {
    try {
      const what = `${seen.method} ${seen.path}`;
      if (what === "GET /mock/requests") {
        response.write(JSON.stringify(mock.requests));
      } else if (what === "POST /mock/next") {
        mock.next(parseBehaviour(text));
      } else if (what === "POST /mock/always") {
        mock.always(text.trim() === "null" ? null : parseBehaviour(text));
      } else {
        response.statusCode = 404;
      }
    } catch (error) {
      response.writeHead(400).write(String(error));
    }
    response.end("\n");
  }

  const server = options.tls ? https.createServer(options.tls, serve) : http.createServer(serve);
  server.on("connection", (socket) => {
    sockets.set(socket, ++connections);
    socket.once("close", () => sockets.delete(socket));
  });
  server.listen(options.port ?? 0, hostname);
  await once(server, "listening");
  const closed = once(server, "close");

  const { port } = server.address() as AddressInfo;
  const scheme = options.tls ? "https" : "http";
  const host = hostname.includes(":") ? `[${hostname}]` : hostname;
  const mock: MockServer = {
    url: `${scheme}://${host}:${port}/oauth/token`,
    port,
    requests: [],
    secrets: [],
    graceMilliseconds: 0,
    login: (how) => issue(how?.accessTokenSeconds),
    newest: (token) => ledger.get(token)?.login.newest ?? "",
    redeemed: (token) => ledger.get(token)?.spent ? 1 : 0,
    state(token) {
      if (!ledger.has(token)) return "unknown";
      return mock.redeemed(token) ? "spent" : "unspent";
    },
    next: (...behaviours) => void queue.push(...behaviours),
    always: (behaviour) => void (standing = behaviour),
    lastRequestBody: () => lastBody,
    async close() {
      closing.abort();
      server.close();
      // closeAllConnections() would miss those that are still shaking hands.
      for (const socket of sockets.keys()) socket.destroy();
      await closed;
    },
  };
  return mock;
}

/** The JSON object in a text, or an empty one. */
function objectIn(text: string): Record<string, unknown> {
  try {
    return Object(JSON.parse(text));
  } catch {
    return {};
  }
}

// ── program ──────────────────────────────────────────────────────────────────────────────────────
// The same server by itself. Its address is the one line on stdout, for scripts
// to read; each request is a line on stderr. Behaviours come as JSON, from the
// command line or over HTTP, and are measured against the examples.

const EXAMPLES: Behaviour[] = [
  { kind: "status", status: 503 },
  { kind: "raw", body: "" },
  { kind: "retry_after", value: "30" },
  { kind: "hang" },
  { kind: "drip", millisecondsPerByte: 10 },
  { kind: "delay", milliseconds: 5000 },
  { kind: "reset", ledger: "after" },
  { kind: "truncated" },
  { kind: "unfinished" },
  { kind: "cut_json" },
  { kind: "html" },
  { kind: "endless" },
  { kind: "redirect", location: "http://127.0.0.1:9/" },
  { kind: "fields", fields: { refresh_token: null } },
];

const HELP = `\
A stand-in for OpenAI's OAuth token endpoint.

  --port N                   8787 by default, 0 for a free one
  --host ADDRESS             127.0.0.1 by default
  --access-token-seconds N   life of issued access tokens, 864000 by default
  --accept-any               take any refresh token, once
  --next BEHAVIOUR           for one request; may be repeated
  --always BEHAVIOUR         for all others
  --write-login FILE         a new auth.json with a login of this server,
  --login-age SECONDS        refreshed so long ago: 777600 by default

While it runs, POST /mock/next and POST /mock/always take a BEHAVIOUR too (null
ends "always"), and GET /mock/requests tells what was asked. The BEHAVIOURs:

${EXAMPLES.map((example) => `  ${JSON.stringify(example)}`).join("\n")}`;

function parseBehaviour(text: string): Behaviour {
  const given = objectIn(text);
  const example = EXAMPLES.find(({ kind }) => kind === given.kind);
  const fits = example && Object.entries(example).every(([name, value]) => typeof given[name] === typeof value);
  if (!fits) throw new Error(`not a behaviour: ${text}`);
  return given as unknown as Behaviour;
}

interface Flags {
  port: number;
  host: string;
  "access-token-seconds": number;
  "accept-any": boolean;
  next: string[];
  always?: string;
  "write-login"?: string;
  "login-age": number;
  help: boolean;
}

function readFlags(args: string[]): Flags {
  const numbers = { port: 8787, "access-token-seconds": 864_000, "login-age": 777_600 };
  const flags: Record<string, unknown> = parseArgs(args, {
    string: [...Object.keys(numbers), "host", "next", "always", "write-login"],
    boolean: ["accept-any", "help"],
    collect: ["next"],
    alias: { help: "h" },
    default: { ...numbers, host: "127.0.0.1" },
    unknown: (argument: string) => {
      throw new Error(`unknown argument: ${argument}`);
    },
  });
  for (const [name, value] of Object.entries(flags)) {
    if (value === "") throw new Error(`--${name} wants a value`);
    if (!(name in numbers)) continue;
    flags[name] = Number(value);
    if (!Number.isInteger(flags[name])) throw new Error(`--${name} wants a whole number: ${value}`);
  }
  return flags as unknown as Flags;
}

function logAnswer({ method, path, outcome, status, behaviour }: Seen) {
  const now = new Date().toISOString().replace(/\.\d+/, "");
  const words = [method, path, outcome, status ?? "-", behaviour ?? ""];
  console.error(`[mock_server ${now}] ${words.join(" ").trimEnd()}`);
}

async function main() {
  const flags = readFlags(process.argv.slice(2));
  if (flags.help) return console.log(HELP);
  const { "access-token-seconds": life, "login-age": age } = flags;
  const next = flags.next.map(parseBehaviour);
  const always = flags.always ? parseBehaviour(flags.always) : null;

  const mock = await startMockServer({
    port: flags.port,
    hostname: flags.host,
    accessTokenSeconds: life,
    acceptAny: flags["accept-any"],
    onAnswer: logAnswer,
  });
  mock.next(...next);
  mock.always(always);
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    process.once(signal, () => mock.close().then(() => process.exit(0)));
  }
  const file = flags["write-login"];
  if (file) {
    const tokens = mock.login({ accessTokenSeconds: life - age });
    const text = authJson(tokens, new Date(Date.now() - age * 1000));
    // Never over another file: it could hold somebody's real login.
    await writeFile(file, text, { flag: "wx", mode: 0o600 });
  }
  console.log(mock.url);
}

if (import.meta.main) {
  await main().catch((error: Error) => {
    console.error(`mock_server: ${error.message}`);
    process.exit(64);
  });
}
