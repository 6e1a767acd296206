/**
 * The scheduler against years of trouble, and against itself in ten thousand copies. `decide`, `judge` and `schedule`
 * are the real ones; only the clock and chance are made up, and chance is seeded. What the loop does around them, steps
 * of 45 s by the wall clock and a look at the file's identity at each, is modelled as events; between two events
 * nothing changes, so a second in between needs no look to be judged.
 *
 * @module
 */
import { assert, assertEquals } from "@std/assert";
import { decide, judge, type Known, type Read, schedule } from "../refresh.ts";
import { random as chance, table } from "./tools.ts";

const SECOND = 1000;
const MINUTE = 60 * SECOND;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;
const YEAR = 365 * DAY;
const START = Date.UTC(2026, 0, 1);
const STEP = 45 * SECOND; // the loop's longest sleep
const PROMPT = MINUTE + 2 * SECOND; // to act within a minute, a request's second at either end

const YEARS = 2000;
const COPIES = 10_000;
const SETTINGS = { intervalSeconds: 21_600, marginSeconds: 14_400, staleSeconds: 604_800 };
const INTERVAL = SETTINGS.intervalSeconds * SECOND;

/** A watchdog: when it looks next, and what it keeps in mind meanwhile. */
interface Rule {
  readonly schedule: typeof schedule;
  /** Whether a token that was called dead is known to be dead, restarts included. */
  readonly remembers: boolean;
  /** Whether it goes by the wall clock and the file, or sleeps to the end whatever happens. */
  readonly attentive: boolean;
}

const OURS: Rule = { schedule, remembers: true, attentive: true };
const later: Rule["schedule"] = (known, _settings, now) => ({
  at: known.outcome === "start" ? now : now + INTERVAL,
  why: "six hours",
});
const REFERENCE: Rule = { schedule: later, remembers: false, attentive: false };

// A year -------------------------------------------------------------------------------------------------------------

type Trouble = "silence" | "error" | "storm" | "portal";
type Happening =
  | { at: number; kind: "outage"; trouble: Trouble; until: number }
  | { at: number; kind: "suspend" | "restart"; until: number }
  | { at: number; kind: "jump"; by: number }
  | { at: number; kind: "codex" | "login" | "death" };

/** What became of a year. Moments and spans are milliseconds. */
interface Year {
  requests: number;
  /** What the requests must not exceed: see {@link allowed}. */
  bound: number;
  /** Sends of a token after the endpoint had called it dead. */
  deadSends: number;
  /** Access token expired, endpoint within reach: in all, and the longest stretch. */
  expired: number;
  longest: number;
  /** The longest that was not the backoff's doing: after `d` of trouble it may take 1.5 × (d + 5 s). */
  inexcusable: number;
  /** The least that a request came too early after a Retry-After, 0 where none did. */
  early: number;
}

/** A year's troubles, in order. */
function troubles(random: () => number): Happening[] {
  const found: Happening[] = [];
  const moments = (mean: number) => Array.from({ length: random() * 2 * mean + 0.5 | 0 }, () => random() * YEAR);
  const span = (least: number, most: number) => least * (most / least) ** random();
  const pick = <T>(...all: T[]) => all[random() * all.length | 0] as T;
  for (const at of moments(6)) {
    const trouble = pick<Trouble>("silence", "error", "storm", "portal");
    found.push({ at, kind: "outage", trouble, until: at + span(MINUTE, 21 * DAY) });
  }
  for (const at of moments(20)) found.push({ at, kind: "suspend", until: at + span(MINUTE, 5 * DAY) });
  for (const at of moments(20)) found.push({ at, kind: "restart", until: at + span(SECOND, HOUR) });
  for (const at of moments(2)) {
    const by = pick(-DAY, DAY);
    found.push({ at, kind: "jump", by }, { at: at + span(MINUTE, 2 * DAY), kind: "jump", by: -by });
  }
  for (const at of moments(20)) found.push({ at, kind: "codex" });
  for (const at of moments(3)) found.push({ at, kind: "login" });
  for (const at of moments(2)) found.push({ at, kind: "death" }, { at: at + span(HOUR, 14 * DAY), kind: "login" });
  return found.sort((one, other) => one.at - other.at);
}

/**
 * The stated number of requests. Two refreshes lie half of a token's life apart; failures in a row double their distance
 * from 5 s on, 13 of them until it is the interval, then one an interval. Whatever disturbs (an outage, a restart, a jump,
 * a write to the file) may start that anew: 14 each. And while the clock is so far ahead that every new token looks due,
 * one a minute.
 */
function allowed(life: number, happenings: readonly Happening[]): number {
  let [ahead, offset, since] = [0, 0, 0];
  for (const each of happenings) {
    if (each.kind !== "jump") continue;
    if (offset > 0) ahead += each.at - since;
    [offset, since] = [offset + each.by, each.at];
  }
  if (offset > 0) ahead += Math.max(0, YEAR - since);
  const minutes = life <= 3 * DAY ? ahead / MINUTE : 0;
  return Math.ceil(2 * YEAR / life + YEAR / INTERVAL + 14 * (happenings.length + 1) + minutes);
}

function simulate(rule: Rule, seed: number): Year {
  const random = chance(seed);
  const life = HOUR * 240 ** (seed % 8 === 0 ? random() / 4 : Math.cbrt(random())); // 1 h to 10 days, mostly days
  const queue = troubles(random);
  const bound = allowed(life, queue);
  const year: Year = { requests: 0, bound, deadSends: 0, expired: 0, longest: 0, inexcusable: 0, early: 0 };
  // The world: true time, how far the machine's clock is off, what the endpoint would say, what the file holds.
  let [now, offset, outageUntil, login, expires] = [0, 0, 0, 0, 0];
  let trouble: Trouble | null = null;
  let [alive, called] = [true, false];
  let file: Read = { kind: "absent" };
  let [refreshed, seen]: [number, Record<string, ReturnType<typeof decide>>] = [0, {}];
  // The watchdog: whether it runs, when it looks by its own clock, what it knows and what it has yet to notice.
  let [up, restarted, written] = [true, false, false];
  let [resumes, at, failures, rejected, noticeAt, setBack] = [0, 0, 0, 0, Infinity, 0];
  // The judge: the stretch in hand, how long a failure excuses it, what Retry-After asked for.
  let [stretch, excused, failing, asked] = [0, PROMPT, 0, 0];

  const clock = () => START + now + offset;
  // What `decide` says of one file changes at three moments only: between them it is not asked again.
  const look = () => {
    const [left, age] = [Math.trunc((expires - now - offset) / SECOND), Math.trunc((clock() - refreshed) / SECOND)];
    const key = `${left <= SETTINGS.marginSeconds} ${age >= SETTINGS.staleSeconds} ${age < -300}`;
    return seen[key] ??= decide(file, clock(), SETTINGS);
  };
  const plan = (outcome: Known["outcome"], due = false, retryAfterMs: number | null = null) => {
    const known = { outcome, due, credential: look().credential, failures, retryAfterMs };
    at = rule.schedule(known, SETTINGS, clock(), random()).at;
  };
  const observe = (outcome: "start" | "changed") => plan(outcome, look().due);
  const excuse = (wait: number) => excused = Math.max(excused, now + wait + PROMPT);
  const disturb = () => {
    noticeAt = Math.min(noticeAt, now + random() * STEP);
    excuse(0);
  };

  const issue = () => {
    const exp = Math.floor((START + now + life) / SECOND);
    expires = exp * SECOND - START;
    login++;
    [refreshed, seen] = [clock(), {}];
    [alive, called] = [true, false];
    const tokens = { access_token: `e30.${btoa(JSON.stringify({ exp }))}.x`, refresh_token: `rt_${login}` };
    const document = { auth_mode: "chatgpt", tokens, last_refresh: new Date(clock()).toISOString() };
    file = { kind: "whole", text: "", document };
  };
  /** What the endpoint says, through the real judgement; null for new tokens. */
  const ask = () => {
    year.requests++;
    if (now < asked) year.early = Math.max(year.early, asked - now);
    if (trouble === "silence") return judge(0, "", null, clock());
    if (trouble === "error") return judge(503, "<html>", null, clock());
    if (trouble === "portal") return judge(401, "<html>", null, clock());
    if (trouble === "storm") {
      const seconds = Math.round(10 * 10_000 ** random());
      const date = random() < 0.5 ? new Date(START + now + seconds * SECOND).toUTCString() : null;
      // A date means what the machine's clock makes of it: only a clock that is right can be held to it.
      if (date === null || offset === 0) asked = now + Math.min(INTERVAL, (seconds - 1) * SECOND);
      return judge(429, "", date ?? `${seconds}`, clock());
    }
    if (alive) return issue(), null;
    if (called) year.deadSends++;
    called = true;
    return judge(401, '{"error":{"code":"refresh_token_reused"}}', null, clock());
  };
  const attempt = () => {
    const sent = login;
    const due = look().due;
    const known = rule.remembers && rejected === sent;
    const answer = due && !known ? ask() : null;
    advance(now + SECOND);
    if (answer?.kind === "transient") {
      if (failures++ === 0) failing = now;
      plan("fail:transient_000", false, answer.retryAfterMs);
      const longest = Math.max(now - failing + 5 * SECOND, answer.retryAfterMs ?? 0);
      return excuse(1.5 * Math.min(INTERVAL, longest));
    }
    failures = 0;
    if (!due) return plan("skip");
    if (answer === null && !known) return plan("refreshed");
    if (answer?.kind === "permanent" && answer.code !== null) rejected = sent;
    plan("fail:permanent_401");
    excuse(1.1 * INTERVAL);
  };

  /** Lets time pass in which nothing changes, and judges every second of it. */
  const advance = (to: number) => {
    // Expired by whatever clock: a wrong one may fool the watchdog, and must not fool the judge.
    const from = Math.max(now, expires, expires - offset);
    const judged = up && trouble === null && alive;
    if (!judged || from > now) stretch = 0;
    if (judged && from < to) {
      stretch += to - from;
      year.expired += to - from;
      year.longest = Math.max(year.longest, stretch);
      year.inexcusable = Math.max(year.inexcusable, Math.min(stretch, to - excused));
    }
    now = Math.max(now, to);
  };

  const happen = (each: Happening) => {
    if (each.kind === "outage") {
      if (trouble === null) [trouble, outageUntil] = [each.trouble, each.until];
    } else if (each.kind === "jump") {
      offset += each.by;
      setBack += Math.max(0, -each.by);
      if (!rule.attentive) at += each.by; // a shell's sleep goes by no clock that can be set
      asked = 0;
      disturb();
    } else if (each.kind === "death") alive = false;
    else if (each.kind === "login" || each.kind === "codex" && trouble === null && alive) {
      issue();
      written = true;
      disturb();
    } else if (each.kind === "suspend" || each.kind === "restart") {
      // A shell's sleep stands still with the machine.
      if (!rule.attentive) at += Math.max(0, each.until - Math.max(now, resumes));
      restarted ||= each.kind === "restart";
      [up, resumes] = [false, Math.max(resumes, each.until)];
    }
  };
  const resume = () => {
    up = true;
    disturb();
    if (!restarted) return;
    [restarted, written, failures, asked, noticeAt, setBack] = [false, false, 0, 0, Infinity, 0];
    observe("start");
  };
  const notice = () => {
    noticeAt = Infinity;
    if (!rule.attentive) return;
    at -= setBack; // a clock that was set back does not lengthen a wait
    if (written && clock() < at) observe("changed");
    if (written) asked = 0;
    [setBack, written] = [0, false];
  };

  issue();
  observe("start");
  for (let index = 0; now < YEAR && year.requests <= 2 * year.bound;) {
    const next = queue[index];
    const due = at - START - offset;
    // A deadline that a jump or a suspend left behind is seen at the next step.
    const acts = rule.attentive && due < now && noticeAt < Infinity ? noticeAt : Math.max(now, due);
    const own = up ? Math.min(noticeAt, acts) : resumes;
    advance(Math.min(next?.at ?? YEAR, trouble === null ? YEAR : outageUntil, own, YEAR));
    if (next !== undefined && next.at <= now) index++, happen(next);
    else if (trouble !== null && outageUntil <= now) trouble = null;
    else if (own > now) continue;
    else if (!up) resume();
    else if (noticeAt < Infinity) notice();
    else attempt();
  }
  return year;
}

/** What is wrong with a year, in words. */
function faults(year: Year): string[] {
  const found: [boolean, string][] = [
    [year.longest > 1.5 * INTERVAL + PROMPT, "expired for longer than the longest backoff"],
    [year.inexcusable > 0, "expired for longer than its failures excuse"],
    [year.requests > year.bound, "more requests than stated"],
    [year.deadSends > 0, "a dead token sent again"],
    [year.early > 0, "asked before Retry-After"],
  ];
  return found.flatMap(([wrong, text]) => wrong ? [text] : []);
}

function years(rule: Rule, count: number) {
  const all = Array.from({ length: count }, (_, seed) => simulate(rule, seed));
  const mean = (of: (year: Year) => number) => all.reduce((sum, year) => sum + of(year), 0) / count;
  const most = (of: (year: Year) => number) => Math.max(...all.map(of));
  return {
    faults: [...new Set(all.flatMap(faults))],
    row: {
      "hours expired a year": +mean(({ expired }) => expired / HOUR).toFixed(2),
      "longest, h": +most(({ longest }) => longest / HOUR).toFixed(2),
      "unexcused, h": +most(({ inexcusable }) => inexcusable / HOUR).toFixed(2),
      "requests a year": Math.round(mean(({ requests }) => requests)),
      "of those allowed": `${Math.round(100 * most(({ requests, bound }) => requests / bound))} %`,
      "dead-token sends": +mean(({ deadSends }) => deadSends).toFixed(1),
    },
  };
}

// A fleet ------------------------------------------------------------------------------------------------------------

/**
 * Copies that start in the same second on logins alike, with an endpoint that is out for a while first. Says how many of
 * them get their new tokens in the same second, at the most.
 */
function fleet({ lifeLeft, age }: { lifeLeft: number; age: number }, outage: number, randomOf: typeof chance): number {
  const seconds = new Map<number, number>();
  const credential = { expiresMs: START + lifeLeft, lastRefreshMs: START - age };
  const isDue = (now: number) =>
    credential.expiresMs - now <= SETTINGS.marginSeconds * SECOND ||
    now - credential.lastRefreshMs >= SETTINGS.staleSeconds * SECOND;
  for (let copy = 0; copy < COPIES; copy++) {
    const random = randomOf(copy);
    let known: Known = { outcome: "start", due: isDue(START), credential, failures: 0, retryAfterMs: null };
    for (let [now, done] = [START, false]; !done;) {
      now = Math.max(now, schedule(known, SETTINGS, now, random()).at);
      done = isDue(now) && now >= START + outage;
      const second = Math.floor((now - START) / SECOND);
      if (done) seconds.set(second, (seconds.get(second) ?? 0) + 1);
      else if (!isDue(now)) known = { ...known, outcome: "skip" };
      else known = { ...known, outcome: "fail:transient_503", failures: known.failures + 1 };
    }
  }
  return Math.max(...seconds.values());
}

// Tests --------------------------------------------------------------------------------------------------------------

Deno.test(`in ${YEARS} years of trouble no token stays expired, none is sent dead, and nobody is flooded`, () => {
  const ours = years(OURS, YEARS);
  const reference = years(REFERENCE, YEARS / 10);
  console.table({ "this program": ours.row, "six hours' sleep": reference.row });
  assertEquals(ours.faults, []);
  for (const fault of ["expired for longer than its failures excuse", "a dead token sent again"]) {
    assert(reference.faults.includes(fault), `the control passed: ${fault}`);
  }
});

const told = (change: (known: Known) => Partial<Known>): Partial<Rule> => ({
  schedule: (known, ...rest) => schedule({ ...known, ...change(known) }, ...rest),
});
const uncapped: Rule["schedule"] = (known, settings, ...rest) => {
  const intervalSeconds = known.outcome.startsWith("fail:transient") ? 1e7 : settings.intervalSeconds;
  return schedule(known, { ...settings, intervalSeconds }, ...rest);
};

table<[rule: Partial<Rule>, fault: string]>("each judgement of a year catches the rule that breaks it", {
  "backoff without a cap": [{ schedule: uncapped }, "expired for longer than the longest backoff"],
  "backoff that starts at the cap": [
    told(({ failures }) => ({ failures: 60 * Math.sign(failures) })),
    "expired for longer than its failures excuse",
  ],
  "backoff that does not grow": [
    told(({ failures }) => ({ failures: Math.sign(failures) })),
    "more requests than stated",
  ],
  "no floor after a success": [
    told(({ outcome }) => ({ outcome: outcome === "refreshed" ? "superseded" : outcome })),
    "more requests than stated",
  ],
  "Retry-After ignored": [told(() => ({ retryAfterMs: null })), "asked before Retry-After"],
  "no memory of dead tokens": [{ remembers: false }, "a dead token sent again"],
  "deaf to the file and the clock": [{ attentive: false }, "expired for longer than its failures excuse"],
}, ([rule, fault]) => {
  const found = years({ ...OURS, ...rule }, 32).faults;
  assert(found.includes(fault), `not caught by "${fault}"`);
  return found.join("; ");
});

const fresh = { lifeLeft: 10 * DAY, age: 0 };
const due = { lifeLeft: 2 * DAY, age: 8 * DAY };
const expired = { lifeLeft: -HOUR, age: 11 * DAY };

table<[login: typeof due, outage: number, bound: number]>(`of ${COPIES} copies at once few ask in the same second`, {
  "restarted, due": [due, 0, COPIES / 40],
  "logged in together, a week on": [fresh, 0, COPIES / 40],
  "back after an hour, due": [due, HOUR, COPIES / 200],
  "back after an hour, expired": [expired, HOUR, COPIES / 200],
  "restarted, expired (at once, as meant)": [expired, 0, COPIES],
}, ([login, outage, bound]) => {
  const [jitter, none] = [fleet(login, outage, chance), fleet(login, outage, () => () => 0)];
  assert(jitter <= bound, `${jitter} in one second, more than ${bound}`);
  assertEquals(none, COPIES, "spread by something other than chance");
  return `at most ${jitter}, without the jitter ${none}`;
});
