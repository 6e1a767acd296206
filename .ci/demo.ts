/**
 * `make demo`: the whole story in a scratch home, against a mock server. It
 * prints each command as one would type it, runs it, says what its exit code
 * means, and fails where anything is not as it says.
 *
 * @module
 */
import { createHash } from "node:crypto";
import { fileURLToPath } from "node:url";
import { authJson, startMockServer, type Tokens } from "../mock_server.ts";

const exe = Deno.env.get("CAR_EXE") ?? fileURLToPath(new URL("../dist/codex_auth_refresh", import.meta.url));
const DAY = 24 * 3600;
const TOKENS = ["id_token", "access_token", "refresh_token"] as const;

const colour = Deno.stdout.isTerminal() && !Deno.env.get("NO_COLOR");
const paint = (code: number, text: string) => colour ? `\x1b[${code}m${text}\x1b[0m` : text;
const heading = (text: string) => console.log(`\n${paint(1, `── ${text} ${"─".repeat(74 - text.length)}`)}`);
const prompt = (command: string) => console.log(`${paint(2, "$")} ${paint(36, command)}`);
const say = (text: string) => console.log(paint(32, `  → ${text}`));

/** Names what went wrong, and no values: these may be tokens. */
function check(holds: boolean, otherwise: string) {
  if (!holds) throw new Error(otherwise);
}

const started = Date.now();
const scratch = await Deno.makeTempDir({ prefix: "codex_demo_" });
const home = `${scratch}/.codex`;
const auth = `${home}/auth.json`;
const mock = await startMockServer();
const set = { CODEX_HOME: home, CODEX_REFRESH_TOKEN_URL_OVERRIDE: mock.url };

// Nothing else of the caller's environment: a proxy in it would get between the program and the mock server.
const kept = ["TERM", "NO_COLOR", "COLUMNS"].map((name) => [name, Deno.env.get(name)]).filter(([, value]) => value);
const env = { ...Object.fromEntries(kept), ...set };

/** Runs the program in front of everybody; the exit code must be the expected one, which then is explained. */
async function run(flag: string, expected: number, meaning = "") {
  prompt(`codex_auth_refresh ${flag}`);
  const { code } = await new Deno.Command(exe, { args: [flag], env, clearEnv: true, stdin: "null" }).spawn().status;
  check(code === expected, `${flag} ended with exit ${code} instead of ${expected}`);
  if (meaning) say(`exit ${code}: ${meaning}`);
}

/** A login of the mock server that was last refreshed nine days ago; its access token has a day left. */
async function writeOldLogin(): Promise<Tokens> {
  const tokens = mock.login({ accessTokenSeconds: DAY });
  await Deno.writeTextFile(auth, authJson(tokens, new Date(Date.now() - 9 * DAY * 1000)), { mode: 0o600 });
  return tokens;
}

/** Shows which tokens changed and none of them: by the start of each one's SHA-256. */
function compare(before: Tokens, after: Tokens) {
  const start = (token: string) => createHash("sha256").update(token).digest("hex").slice(0, 12);
  console.log("  SHA-256 of     before            after");
  for (const name of TOKENS) {
    check(after[name] !== before[name], `the ${name} was not rotated`);
    console.log(`  ${name.padEnd(14)} ${start(before[name])}…  →  ${start(after[name])}…`);
  }
}

async function tell() {
  heading("A login that nobody used for nine days");
  for (const [name, value] of Object.entries(set)) prompt(`export ${name}=${value}`);
  say("a scratch home, and a mock server in place of OpenAI's endpoint");
  await Deno.mkdir(home, { mode: 0o700 });
  const old = await writeOldLogin();
  await run("--status", 0);

  heading("Refresh it");
  prompt("cp $CODEX_HOME/auth.json backup.json");
  const backup = await Deno.readTextFile(auth);
  await run("--once", 0, "refreshed. The refresh token was redeemed, the answer is stored.");
  const fresh = JSON.parse(await Deno.readTextFile(auth));
  compare(old, fresh.tokens);
  check(mock.redeemed(old.refresh_token) === 1, "the old refresh token was not redeemed");
  check(fresh.tokens.refresh_token === mock.newest(old.refresh_token), "the newest refresh token was not stored");
  check(Date.parse(fresh.last_refresh) >= started, "last_refresh was not set");
  for (const name of TOKENS) fresh.tokens[name] = old[name];
  fresh.last_refresh = JSON.parse(backup).last_refresh;
  check(JSON.stringify(fresh) === JSON.stringify(JSON.parse(backup)), "another field of auth.json changed");
  check(((await Deno.stat(auth)).mode ?? 0) % 0o1000 === 0o600, "auth.json is not private any more");
  say("three new tokens, every other field as it was, mode still 0600");
  await run("--status", 0);

  heading("Once more");
  await run("--once", 1, "nothing to do. The login is fresh, so nothing was sent.");
  check(mock.requests.length === 1, "something was sent");

  heading("A backup comes back, with a refresh token that is spent");
  prompt("cp backup.json $CODEX_HOME/auth.json");
  await Deno.writeTextFile(auth, backup);
  await run("--once", 3, "permanent failure. The token works only once: somebody must log in again.");
  check(await Deno.readTextFile(auth) === backup, "auth.json was touched");

  heading("A new login, and the endpoint is gone");
  const other = await writeOldLogin();
  await mock.close();
  await run("--once", 2, "transient failure. Nothing was spent, another try may work.");
  check(mock.state(other.refresh_token) === "unspent", "the refresh token was spent");
  check((await Deno.readTextFile(auth)).includes(other.refresh_token), "the login is gone");
}

try {
  await tell();
  console.log(`\nAll exit codes as documented, in ${((Date.now() - started) / 1000).toFixed(1)} s.`);
} catch (error) {
  console.error(`demo: ${(error as Error).message}`);
  Deno.exitCode = 1;
} finally {
  await mock.close().catch(() => {});
  await Deno.remove(scratch, { recursive: true });
}
