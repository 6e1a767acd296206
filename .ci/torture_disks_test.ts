/**
 * What the executable makes of disks that are full or broken, of mounts that refuse, of writers that were cut off, and of
 * what somebody else put beside auth.json; and whether a token ever shows where it must not.
 *
 * @module
 */
import { assert, assertEquals, assertMatch, assertThrows } from "@std/assert";
import { authJson, type Behaviour } from "../mock_server.ts";
import {
  ALL_AT_ONCE,
  callsOf,
  type Case,
  cases,
  DOCUMENTED,
  IN_PLACE,
  inode,
  leakIn,
  pause,
  piecesOf,
  REMAINS,
  Scene,
  statOf,
  type Step,
  strace,
  table,
  textOf,
  tokenIn,
  UNPRIVILEGED,
  until,
} from "./scene.ts";

const rows = <T, Row>(from: Record<string, T>, row: (value: T) => Row): Record<string, Row> =>
  Object.fromEntries(Object.entries(from).map(([what, value]) => [what, row(value)]));

const byNobody = () => UNPRIVILEGED;
const NOBODYS = "chown -R 65534:65534 home";

/** What cannot be renamed over, for CODEX_AUTH_IN_PLACE; disk/auth.json is the same file. */
const PINNED = {
  "a mount point from another file system": "disk disk; mount --bind disk/auth.json home/auth.json",
  "a file with a second hard link": "mkdir disk; ln home/auth.json disk",
};

const modeOf = (path: string) => {
  const { uid, mode } = Deno.statSync(path);
  return `${uid} ${((mode ?? 0) & 0o777).toString(8)}`;
};

// What is found beside auth.json --------------------------------------------------------------------------------------

/** A journal with the answer for the token in auth.json, as a run left it that was killed. */
const leftBehind = async (scene: Scene) => scene.write(await scene.redeem(), scene.journal());

const afterwards = (command: string) => async (scene: Scene) => {
  await leftBehind(scene);
  scene.sh(command);
};

cases(
  "a journal is rolled forward whatever link or owner of ours it has",
  rows({
    "a second hard link": 'ln "$journal" second',
    "root's, auth.json somebody else's": `${NOBODYS}; chown 0:0 "$journal"`,
    "of auth.json's owner, who is not root": NOBODYS,
  }, (command): Case => ({
    arrange: afterwards(command),
    ends: "rolled forward",
    then({ home, auth }, said) {
      assertEquals(modeOf(auth), `${Deno.statSync(home).uid} 600`, said);
      assertEquals(Deno.statSync(auth).nlink, 1, said);
    },
  })),
);

table("what is no journal of ours is neither read nor deleted, and named", {
  "a stranger's": 'chown 4321 "$journal"',
  "a stranger's, half replaced": 'mv "$journal" "$journal.new"; chown 4321 "$journal.new"',
  "a stranger's, for another token": 'mv "$journal" "$another"; chown 4321 "$another"',
  "a pipe": 'rm "$journal"; mkfifo "$journal"',
  "a folder": 'rm "$journal"; mkdir "$journal"',
}, async (command) => {
  await using scene = await Scene.open();
  await scene.do(afterwards(command));
  const path = scene.pending();
  const before = inode(path);
  const watch = ["strace", "-f", "-o", scene.trace, "-P", path, "-P", `${scene.root}/outside`];
  const { code, said } = await scene.once({}, watch);
  assertEquals([code, scene.asked], [2, []], said);
  assertMatch(scene.status, /^fail:preflight /);
  assert(said.includes(path), said);
  scene.assertTheirs(said);
  assertEquals(inode(scene.pending()), before, said);
  assertEquals(callsOf(textOf(scene.trace)).filter(({ name }) => /^(open|p?read)/.test(name)), []);
});

Deno.test("what an earlier run wrote is not taken for durable: a fresh file of it is synced, and then takes its place", async () => {
  await using scene = await Scene.open();
  const path = scene.journal();
  await leftBehind(scene);
  const before = inode(path);
  const { code, said } = await scene.once({}, ["strace", "-f", "-y", "-o", scene.trace]);
  assertEquals(code, 0, said);
  scene.assertRefreshed(said, []);
  const calls = callsOf(textOf(scene.trace));
  const find = (call: RegExp, ...paths: string[]) => {
    const at = calls.findIndex(({ text }) => call.test(text) && paths.every((each) => text.includes(each)));
    assert(at >= 0, `no ${call} of ${paths}`);
    return at;
  };
  const renamed = find(/^rename/, `"${path}"`);
  const [, fresh = ""] = /"(.*?)"/.exec(calls[renamed]!.text) ?? [];
  const [written, synced] = [find(/^p?write/, `<${fresh}>`), find(/^f(data)?sync/, `<${fresh}>`)];
  assert(written < synced && synced < renamed && renamed < find(/^rename/, `"${path}"`, `"${scene.auth}"`), said);
  const touched = calls.slice(0, renamed).filter(({ text }) =>
    text.includes(`"${path}"`) || text.includes(`<${path}>`)
  );
  const changes = /^(unlink|rename|p?write|ftruncate|truncate)|O_(WRONLY|RDWR|TRUNC)/;
  assertEquals(touched.filter(({ text }) => changes.test(text)), [], "it stays as it is until then");
  assert(inode(scene.auth) !== before, said);
});

// The first run is killed where it renames the answer onto auth.json, each later one there or at its first rename.
table("killed at a rename again and again it piles nothing up, and stores the answer in the end", {
  "auth.json is as it was": false,
  "auth.json changes each time": true,
}, async (changes) => {
  await using scene = await Scene.open();
  for (let round = 0; round < 12; round++) {
    if (changes) scene.meanwhile((scene) => scene.write(scene.withField("during")));
    const at = round % 2 === 0 ? [scene.journal()] : [];
    const { signal, said } = await scene.once({}, strace(scene, "/^rename:signal=KILL", ...at));
    assertEquals([signal, scene.asked], ["SIGKILL", ["redeemed"]], said);
    assert(scene.journals().length <= 2, `${scene.journals()} after round ${round}`);
    if (changes) scene.write(scene.withField(`round_${round}`));
  }
  const ended = await scene.once();
  scene.assertEnded("rolled forward", ended, ["redeemed"]);
  if (changes) assertEquals(JSON.parse(textOf(scene.auth)).round_11, [1, "kept"], ended.said);
});

// What is found in the place of auth.json -----------------------------------------------------------------------------

cases("what is no file in the place of auth.json is neither waited for nor touched", {
  ...rows({
    "a folder": "rm home/auth.json; mkdir home/auth.json",
    "a pipe": "rm home/auth.json; mkfifo home/auth.json",
    "an endless device": "ln -sf /dev/zero home/auth.json",
    "a link to itself": "ln -sf auth.json home/auth.json",
    "a link to nowhere": "ln -sf nowhere/else home/auth.json",
  }, (arrange): Case => ({
    arrange,
    ends: "nothing to do",
    then: ({ status }) => assertMatch(status, /^skip(:no_auth_json)? (unreadable:E\w+|no_auth_json)$/),
  })),
  "a file that only others may read": {
    arrange: "chown 65534:65534 home",
    under: byNobody,
    ends: "nothing to do",
    then: ({ status }) => assertEquals(status, "skip unreadable:EACCES"),
  },
});

table("a home that cannot be one, or cannot be entered, is a line and no crash", {
  "a link to itself": "loop",
  "in a folder that cannot be entered": "locked/home",
  "a file": "home/auth.json",
  "in a file": "home/auth.json/x",
  "too long a name": "x".repeat(300),
  "nowhere": "nowhere",
}, async (home) => {
  await using scene = await Scene.open();
  scene.sh("ln -s loop loop; mkdir -p locked/home; chmod 700 locked");
  for (const mode of ["--once", "--status"]) {
    const { code, said } = await scene.start([mode, `${scene.root}/${home}`], {}, UNPRIVILEGED).ended;
    assertMatch(said, DOCUMENTED);
    assert([0, 1, 2, 64].includes(code), said);
  }
});

Deno.test("of two homes with one auth.json, whichever is first, one refreshes it", async () => {
  await using scene = await Scene.open();
  scene.sh("mkdir other; ln -s ../home/auth.json other");
  const homes = [scene.home, `${scene.root}/other`];
  const { code, said } = await scene.start(["--once", ...homes]).ended;
  assertEquals(code, 0, said);
  scene.assertRefreshed(said);
  const outcomes = homes.map((home) => JSON.parse(textOf(`${home}/auth_refresh_status.json`)).watchdog_last_outcome);
  assertEquals(outcomes.sort(), ["refreshed", "skip"], said);
});

// Writers while the answer is on its way ------------------------------------------------------------------------------

/** How somebody takes a second and a half to write another login into auth.json, which they have truncated. */
const SLOW: Record<string, (file: Deno.FsFile, text: string) => Promise<void>> = {
  async "all of it at the end"(file, text) {
    await pause(1500);
    file.writeSync(new TextEncoder().encode(text));
  },
  async "a byte at a time"(file, text) {
    for (const byte of new TextEncoder().encode(text)) {
      file.writeSync(new Uint8Array([byte]));
      await pause(1500 / text.length);
    }
  },
};

const slowRows = Object.entries({ ...PINNED, "a file": ":" }).flatMap(([where, arrange]) =>
  Object.entries(SLOW).map(([how, write]): [string, Case] => [`one that is slow: ${how}, into ${where}`, {
    arrange,
    meanwhile(scene) {
      const other = authJson({ ...scene.mock.login(), id_token: "", access_token: "" }).trimEnd();
      const file = Deno.openSync(scene.auth, { write: true, truncate: true });
      const done = write(file, other).then(() => scene.theirs = other);
      scene.later(done.finally(() => file.close()));
    },
    env: IN_PLACE,
    ends: "superseded",
  }])
);

cases("a writer that dies while the answer is on its way does not take it along, one that is slow keeps its login", {
  ...rows(REMAINS, (torn): Case => ({ meanwhile: (scene) => scene.write(torn), ends: "refreshed" })),
  "one that is done before the store": {
    meanwhile(scene) {
      const other = scene.otherLogin();
      scene.write("");
      scene.later(pause(150).then(() => scene.write(other)));
    },
    ends: "superseded",
  },
  ...Object.fromEntries(slowRows),
}, ALL_AT_ONCE);

// The disk fails after the request ------------------------------------------------------------------------------------

/** So many numbers, 100 levels deep: compact, each takes two bytes; indented, over two hundred. */
const nested = (count: number) => `{"deep":${"[".repeat(100) + Array(count).fill(1) + "]".repeat(100)},`;

/** Ends what keeps an answer from being stored, once there was a try. */
function endAfter(scene: Scene, tried: () => boolean, end: Step) {
  const ending = until(tried, "the first try has failed").then(() => {
    scene.assertTheirs(scene.running.stderr());
    return scene.do(end);
  });
  scene.later(ending);
}

/** An answer larger than any room that is reserved for it comes when the disk is full; then there is room again. */
const large: Case = {
  arrange(scene) {
    scene.sh("disk home");
    scene.mock.next({ kind: "fields", fields: { access_token: "a".repeat(300_000) } });
  },
  meanwhile(scene) {
    scene.sh("fill home");
    endAfter(scene, () => scene.status.startsWith("fail:store the disk is full"), "rm home/fill");
  },
  ends: "refreshed",
};

cases("an answer that the disk does not take at once is written again, and not lost", {
  // A short write cannot be injected honestly: strace can return a smaller number, but not write that much. A limit on
  // the size of files makes the kernel itself take a part, and then nothing until it is lifted.
  "of which it takes only a part": {
    under: () => ["sh", "-c", 'trap "" XFSZ; exec "$@"', "sh"],
    meanwhile(scene) {
      const first = scene.pending();
      const before = inode(first);
      scene.sh('prlimit --pid "$pid" --fsize=300:unlimited');
      endAfter(scene, () => inode(first) !== before, 'prlimit --pid "$pid" --fsize=unlimited:unlimited');
    },
    ends: "refreshed",
  },
  "to a fresh file, after a failed fsync": {
    meanwhile: (scene) => scene.attach("inject=fsync,fdatasync:error=EIO", scene.pending()),
    ends: "refreshed",
    then: ({ trace }, said) => assertEquals(textOf(trace).match(/sync.*INJECTED/g)?.length, 1, said),
  },
  "to an auth.json that is rewritten in place, after a failed fsync": {
    arrange: PINNED["a file with a second hard link"],
    meanwhile: (scene) => scene.attach("inject=fsync,fdatasync:error=EIO:when=1", scene.auth),
    env: IN_PLACE,
    ends: "refreshed",
    then({ trace }) {
      const calls = callsOf(textOf(trace)).filter(({ name }) => /^(ftruncate|p?write|f(data)?sync)/.test(name));
      const copied = "ftruncate p?write(64)? (ftruncate )?f(data)?sync";
      assertMatch(calls.map(({ name }) => name).join(" "), new RegExp(`^${copied}( ${copied})+$`), textOf(trace));
    },
  },
  "whose rename fails ten times": {
    meanwhile: (scene) => scene.write(scene.withField("theirs")),
    under: (scene) => strace(scene, "/^rename:error=EIO:when=1..10", scene.journal()),
    ends: "refreshed",
    then({ auth, trace }) {
      assertEquals(JSON.parse(textOf(auth)).theirs, [1, "kept"]);
      assertEquals(textOf(trace).match(/INJECTED/g)?.length, 10);
    },
  },
  "larger than the room, when the disk is full": large,
  "larger than the room, when the disk is full, the loop": { ...large, loop: true },
}, ALL_AT_ONCE);

cases("the reserved room holds the answer when the disk fills up before it arrives", {
  "an ordinary document": { arrange: "disk home", meanwhile: "fill home", says: /refresh: ok/, ends: "refreshed" },
  "one that grows a lot when it is indented": {
    arrange(scene) {
      scene.sh("disk home size=2m");
      scene.write(scene.text.replace("{", nested(3000)));
    },
    meanwhile: "fill home",
    ends: "refreshed",
    then: ({ auth }) => assert(Deno.statSync(auth).size > 500_000, "it has grown"),
  },
});

table("a journal that is removed or replaced by hand is made again", {
  "removed": null,
  "replaced by a document": "{}",
  "replaced by something else": "not JSON",
}, async (impostor) => {
  await using scene = await Scene.open();
  scene.meanwhile(() => {
    const path = scene.pending();
    Deno.removeSync(path);
    if (impostor !== null) scene.write(impostor, path);
  });
  const { code, said } = await scene.once();
  assertEquals(code, 0, said);
  assertEquals(tokenIn(textOf(scene.auth)), scene.newest, said);
  assert(scene.journals().length <= (impostor === null ? 0 : 1), said);
});

/** A log that goes into a pipe, of which something becomes between the request and its answer. */
const logTo = (start: string, meanwhile: (reader: Deno.FsFile, scene: Scene) => void): Case => {
  const readers = new Map<Scene, Deno.FsFile>();
  return {
    arrange(scene) {
      scene.sh("mkfifo log");
      readers.set(scene, Deno.openSync(`${scene.root}/log`, { read: true, write: true }));
    },
    meanwhile: (scene) => meanwhile(readers.get(scene)!, scene),
    under: ({ root }) => ["sh", "-c", `log="${root}/log"; ${start}`, "sh"],
    ends: "refreshed",
  };
};
const closed = logTo('exec "$@" 2>"$log"', (reader) => reader.close());
const full = logTo('exec 3<>"$log"; exec "$@" 2>&3 3>&-', (reader, scene) => {
  scene.sh("dd if=/dev/zero of=log bs=4k count=99 oflag=nonblock 2>&- || true");
  reader.close();
});

cases("a log pipe that is closed or full in the middle of an attempt does not stop it", {
  "closed, --once": closed,
  "closed, the loop": { ...closed, loop: true },
  "full, --once": full,
  "full, the loop": { ...full, loop: true },
});

/** What keeps an answer from being stored, what ends that, and whether the status can be written meanwhile. */
interface Obstacle {
  arrange?: string;
  begin: string;
  end: string;
  shows: boolean;
}

const IMMUTABLE: Obstacle = { begin: "chattr +i home", end: "chattr -i home", shows: false };

/** What is written to such a mount is lost as soon as the container ends. */
const REPLACED_OUTSIDE: Obstacle = {
  arrange: "cp -p home/auth.json outside; mount --bind outside home/auth.json",
  begin: "cp -p home/auth.json new; mv new outside",
  end: "umount home/auth.json",
  shows: true,
};

/** Tries for a minute, says where the answer is, and stores it at the next start. */
async function givesUp(args: string[], { arrange = ":", begin, end, shows }: Obstacle) {
  const started = Date.now();
  await using scene = await Scene.open();
  await scene.do(arrange);
  const asked = scene.meanwhile(begin);
  const running = scene.start(args, IN_PLACE);
  await asked;
  const answered = Date.now();
  if (shows) await until(() => scene.status.startsWith("fail:store"), "the status tells");
  assert(Date.now() - answered < 5000, "the status tells at once");
  if (args.length === 0) running.kill("SIGTERM");
  const { code, said } = await running.ended;
  await scene.settled();
  assert(Date.now() - started > 55_000, said);
  assertEquals(code, args.length === 0 ? 0 : 2, said);
  const kept = scene.pending();
  assert(said.includes(`${kept}: do not delete it`), said);
  assert(textOf(kept).includes(scene.newest), said);
  assertEquals(scene.status, shows ? `fail:store ${/not stored: (.*)/.exec(said)?.[1]}` : "", said);
  assert(!said.includes("refresh: ok"), said);
  scene.assertTheirs(said);
  await scene.do(end);
  scene.assertEnded("rolled forward", await scene.once(IN_PLACE), ["redeemed"]);
}

table(
  "while an answer cannot be stored it is kept beside auth.json: tried again, and not given up too early",
  {
    "after a minute --once gives up": () => givesUp(["--once"], IMMUTABLE),
    "after a SIGTERM and a minute the loop gives up": () => givesUp([], IMMUTABLE),
    "a mount whose file was replaced outside meanwhile is no place for an answer": () =>
      givesUp(["--once"], REPLACED_OUTSIDE),
  },
  (run) => run(),
  ALL_AT_ONCE,
);

// The disk refuses before the request ---------------------------------------------------------------------------------

/** Where an answer could not be stored: what the message says, how it comes about, who runs into it. */
interface Refused {
  because: RegExp;
  arrange?: Step;
  under?: (scene: Scene) => string[];
  mute?: true;
}

const failing = (inject: string) => (scene: Scene) => strace(scene, inject);

const REFUSED: Record<string, Refused> = {
  "a disk that is full to the last block": { because: /full/, arrange: "disk home; fill home", mute: true },
  "a disk with two blocks left": {
    because: /full/,
    arrange: "disk home; head -c 8192 /dev/zero >home/spare; fill home; rm home/spare",
  },
  "a disk that has no room for another file": {
    because: /full/,
    arrange: "disk home size=1m,nr_inodes=8; cd home; touch 1 2 3 4 5 6 7 8 2>&- || true",
    mute: true,
  },
  "a symlink onto a disk that is full": {
    because: /full/,
    arrange: "disk disk; fill disk; ln -sf ../disk/auth.json home/auth.json",
  },
  "a disk quota that is used up, as the file system tells when it has to write": {
    because: /quota/,
    under: failing("fsync,fdatasync:error=EDQUOT"),
  },
  "a disk that cannot write the file": { because: /I\/O error/, under: failing("fsync,fdatasync:error=EIO") },
  "a disk that cannot write the directory": {
    because: /I\/O error/,
    under: (scene) => strace(scene, "fsync,fdatasync:error=EIO", scene.home),
  },
  "a read-only disk": { because: /read-only/, arrange: "disk home; mount -o remount,ro home", mute: true },
  "a file without write permission": {
    because: /permission/,
    arrange: `${NOBODYS}; chmod 400 home/auth.json`,
    under: byNobody,
  },
  "a file of somebody else that all may read": {
    because: /belongs to user 0|permission/,
    arrange: "chown 65534:65534 home; chmod 644 home/auth.json",
    under: byNobody,
  },
  "a lock of somebody else": {
    because: /auth_refresh\.lock|permission/,
    arrange: `${NOBODYS}; install -m 600 /dev/null home/auth_refresh.lock`,
    under: byNobody,
  },
  "a lock of our own that may only be read": {
    because: /auth_refresh\.lock cannot be locked/,
    arrange: `install -m 444 /dev/null home/auth_refresh.lock; ${NOBODYS}`,
    under: byNobody,
  },
  "a lock of somebody else that all may read": {
    because: /auth_refresh\.lock cannot be locked: no permission, it is user 0's/,
    arrange: `${NOBODYS}; install -m 644 /dev/null home/auth_refresh.lock`,
    under: byNobody,
  },
  "an immutable lock": {
    because: /auth_refresh\.lock cannot be locked/,
    arrange: "touch home/auth_refresh.lock; chattr +i home/auth_refresh.lock",
  },
  "a folder in the lock's place": { because: /auth_refresh\.lock/, arrange: "mkdir home/auth_refresh.lock" },
  "an immutable file": { because: /immutable/, arrange: "chattr +i home/auth.json" },
  "an immutable directory": { because: /immutable/, arrange: "chattr +i home", mute: true },
  "a file that would pass the limit once it is indented": {
    because: /too large/,
    arrange: (scene) => scene.write(scene.text.replace("{", nested(90_000))),
  },
  "a mount point from another file system": {
    because: /mount point.*Mount the directory.*CODEX_AUTH_IN_PLACE=1/,
    arrange: PINNED["a mount point from another file system"],
  },
  "a read-only mount point from the same file system": {
    because: /read-only/,
    arrange: `${REPLACED_OUTSIDE.arrange}; mount -o remount,bind,ro home/auth.json`,
  },
  "a mount point whose file was replaced outside": {
    because: /replaced outside.*Mount the directory/,
    arrange: `${REPLACED_OUTSIDE.arrange}; ${REPLACED_OUTSIDE.begin}`,
  },
  "a mount that knows no rename": {
    because: /does not support.*rename.*\(E\w*NOTSUP\)/,
    under: failing("/^rename:error=EOPNOTSUPP"),
    mute: true,
  },
  "a mount that permits no rename": {
    because: /not permitted.*its mount refuse renames \(EPERM\)/,
    under: failing("/^rename:error=EPERM"),
    mute: true,
  },
  "a mount that permits no change of owner, where there has to be one": {
    because: /its mount refuses to make it user 65534's, run as that user \(EPERM\)/,
    arrange: NOBODYS,
    under: failing("/chown:error=EPERM"),
    mute: true,
  },
  "a mount that permits no change of mode, where there has to be one": {
    because: /its mount refuses mode 0600 \(EPERM\)/,
    under: (scene) => ["sh", "-c", 'umask 0277; exec "$@"', "sh", ...failing("/chmod:error=EPERM")(scene)],
    mute: true,
  },
};

cases(
  "no token is spent where its answer cannot be stored, and the message names the cause",
  rows(REFUSED, ({ because, ...row }): Case => ({
    ...row,
    ends: "not started",
    says: new RegExp(`not started: .*(${because.source})`),
  })),
);

Deno.test("in an append-only directory, where nothing can be renamed, no token is spent", async () => {
  await using scene = await Scene.open();
  await scene.do("chattr +a home");
  const { code, said } = await scene.once();
  assertEquals([code, scene.asked], [2, []], said);
  scene.assertTheirs(said);
  assertMatch(said, /not started.*not permitted/);
  // What was tried there could not be removed. It is as soon as that is possible.
  await scene.do("chattr -a home");
  scene.assertEnded("refreshed", await scene.once());
});

Deno.test("a full disk leaves the loop waiting, and it goes on as soon as there is room", async () => {
  await using scene = await Scene.open();
  await scene.do("disk home; fill home");
  const running = scene.start([], { CODEX_AUTH_REFRESH_INTERVAL_SECONDS: "1" });
  await running.said(/not started.*full/);
  assertEquals(scene.asked, []);
  await scene.do("rm home/fill");
  await until(() => scene.status.startsWith("refreshed"), "the loop has refreshed");
  running.kill("SIGTERM");
  scene.assertEnded("refreshed", await running.ended);
});

// How it is stored ----------------------------------------------------------------------------------------------------

const inPlace = ({ auth, before }: Scene, said: string) => assertEquals(inode(auth), before?.ino, said);

const refusing = (inject: string): Case => ({
  meanwhile: (scene) => scene.attach(`inject=${inject}`),
  ends: "refreshed",
  says: /refresh: ok/,
  then: inPlace,
});

cases("what a mount refuses, and what was so already, does not keep an answer from being stored", {
  "every rename, from the answer on: not supported": { ...refusing("/^rename:error=EOPNOTSUPP"), mute: true },
  "the rename onto a mount point that could not be seen": {
    arrange: REPLACED_OUTSIDE.arrange,
    ends: "refreshed",
    then: inPlace,
  },
  "modes and owners, which are right already": {
    under: failing("/chmod|chown:error=EPERM"),
    ends: "refreshed",
  },
  "the fsync of a directory: not known": {
    under: (scene) => strace(scene, "fsync,fdatasync:error=EINVAL", scene.home),
    ends: "refreshed",
  },
  "modes and owners, which are right already, by a user": {
    arrange: NOBODYS,
    under: (scene) => [...strace(scene, "/chmod|chown:error=EPERM"), ...UNPRIVILEGED],
    ends: "refreshed",
  },
});

cases("it is stored under a rename wherever that is possible, in place elsewhere, and belongs to whom it did", {
  ...rows(PINNED, (arrange): Case => ({
    arrange,
    env: IN_PLACE,
    ends: "refreshed",
    then(scene, said) {
      inPlace(scene, said);
      assertEquals(textOf(`${scene.root}/disk/auth.json`), textOf(scene.auth), said);
    },
  })),
  "a symlink, which stays one: everything is kept beside the real file": {
    arrange: "disk disk; ln -sf ../disk/auth.json home/auth.json",
    meanwhile: ({ root }) => assertEquals(Deno.readDirSync(`${root}/disk`).toArray().length, 3, "a journal and a lock"),
    ends: "refreshed",
    then({ auth, root, home, journals }) {
      assertEquals([Deno.readLinkSync(auth), journals(`${root}/disk`)], ["../disk/auth.json", []]);
      assert(statOf(`${root}/disk/auth_refresh.lock`) !== null && statOf(`${home}/auth_refresh.lock`) === null);
    },
  },
  "somebody else's, by root": {
    arrange: NOBODYS,
    meanwhile: (scene) => assertEquals(modeOf(scene.pending()), "65534 600"),
    ends: "refreshed",
    async then(scene) {
      for (const name of ["auth.json", "auth_refresh.lock", "auth_refresh_status.json"]) {
        assertEquals(modeOf(`${scene.home}/${name}`), "65534 600", name);
      }
      const next = await scene.start(["--once", "--force"], {}, UNPRIVILEGED).ended;
      scene.assertEnded("refreshed", next, ["redeemed", "redeemed"]);
    },
  },
});

// Each call that changes auth.json happens once, in the rewrite; `lost` is what the disk then had of it.
const whole = (text: string) => text;
const MOMENTS: [calls: string, lost: (text: string) => string][] = [
  ["ftruncate", whole],
  ["write,pwrite64", whole],
  ["fsync,fdatasync", whole],
  ["fsync,fdatasync", (text) => text.slice(0, text.length / 2)],
  ["unlink,unlinkat", whole],
];
const halfway = Object.entries(PINNED).flatMap(([where, arrange]) =>
  MOMENTS.map((
    [calls, lost],
  ) => [`at ${calls} of ${where}, ${lost.name || "half"} on the disk`, { arrange, calls, lost }])
);

table("a rewrite in place that is killed halfway is finished by the next start", {
  ...Object.fromEntries(halfway) as Record<string, { arrange: string; calls: string; lost: typeof whole }>,
}, async ({ arrange, calls, lost }) => {
  await using scene = await Scene.open();
  await scene.do(arrange);
  scene.meanwhile(() =>
    scene.attach(`inject=${calls}:signal=KILL`, calls.startsWith("unlink") ? scene.pending() : scene.auth)
  );
  const killed = await scene.once(IN_PLACE);
  assertEquals([killed.signal, scene.asked], ["SIGKILL", ["redeemed"]], killed.said);
  // Cut off, it must not look whole: else the next start would believe it and remove the journal.
  if (calls.includes("write")) assertThrows(() => JSON.parse(textOf(scene.auth)), SyntaxError);
  scene.write(lost(textOf(scene.auth)));
  const ended = await scene.once(IN_PLACE);
  scene.assertEnded("rolled forward", ended, ["redeemed"]);
  assertEquals(textOf(`${scene.root}/disk/auth.json`), textOf(scene.auth), ended.said);
}, ALL_AT_ONCE);

// No leak -------------------------------------------------------------------------------------------------------------

interface Path {
  args?: string[];
  behaviours?: (scene: Scene) => Behaviour[];
  arrange?: Step;
  meanwhile?: Step;
  env?: Record<string, string>;
  ends: number;
}

const refused = (status: number, code: string): Behaviour => ({ kind: "status", status, code });
/** An answer that says again what it was sent, in each place that a log line might quote. */
const echo = (status: number, token: string): Behaviour => ({
  kind: "raw",
  status,
  headers: { location: `https://example.com/${token}`, "retry-after": token, "x-request-id": token },
  body: JSON.stringify({ error: { code: token, message: token, type: token }, code: token, [token]: token }),
});

const PATHS: Record<string, Path> = {
  "a refresh": { ends: 0 },
  "a refresh in JSON": { env: { CODEX_AUTH_LOG_FORMAT: "json" }, ends: 0 },
  "a forced one": { args: ["--once", "--force"], ends: 0 },
  "the loop": { args: [], ends: 0 },
  "--status": { args: ["--status"], ends: 0 },
  "--status --json": { args: ["--status", "--json"], ends: 0 },
  "--status --verbose": { args: ["--status", "--verbose"], ends: 0 },
  "--health": { args: ["--health"], ends: 1 },
  "--metrics": { args: ["--metrics"], ends: 0 },
  "a token in the arguments' place": { args: ["--onse"], ends: 64 },
  "nothing due": { arrange: (scene) => scene.write(scene.otherLogin()), ends: 1 },
  "a torn file": { arrange: (scene) => scene.write(scene.text.slice(0, -9)), ends: 1 },
  "tokens where they do not belong": {
    arrange(scene) {
      const { refresh_token, access_token } = scene.old;
      const document = { auth_mode: refresh_token, last_refresh: access_token, tokens: scene.old };
      scene.write(JSON.stringify(document));
    },
    ends: 1,
  },
  "a dead token": { behaviours: () => [refused(401, "refresh_token_reused")], ends: 3 },
  "no answer but an error": { behaviours: () => [refused(503, "overloaded")], ends: 2 },
  "a page": { behaviours: () => [{ kind: "html" }], ends: 2 },
  "half an answer": { behaviours: () => [{ kind: "cut_json" }], ends: 2 },
  "an answer that gets lost": { behaviours: () => [{ kind: "reset", ledger: "after" }, refused(500, "x")], ends: 2 },
  "no server": { env: { CODEX_REFRESH_TOKEN_URL_OVERRIDE: "http://127.0.0.1:1/" }, ends: 2 },
  "unusable tokens": {
    behaviours: ({ old }) => [{ kind: "fields", fields: { id_token: `${old.refresh_token}.x`, access_token: 7 } }],
    ends: 0,
  },
  ...Object.fromEntries([200, 307, 400, 401, 429].flatMap((status): [string, Path][] => [
    [`${status} with the token in it`, {
      behaviours: ({ old }) => [echo(status, old.refresh_token)],
      ends: status === 401 ? 3 : 2,
    }],
    [`${status} with a piece of the token in it`, {
      behaviours: ({ old }) => [echo(status, old.refresh_token.slice(3, 33))],
      ends: status === 401 ? 3 : 2,
    }],
  ])),
  "no preflight": { arrange: "ln home/auth.json second", ends: 2 },
  "in place": { arrange: "ln home/auth.json home/auth.json.2", env: IN_PLACE, ends: 0 },
  "another login meanwhile": { meanwhile: (scene) => scene.write(scene.otherLogin()), ends: 1 },
  "other fields meanwhile": {
    meanwhile: (scene) => scene.write(scene.text.replace(/{/, '{"a":0,')),
    ends: 0,
  },
  "a journal removed meanwhile": { meanwhile: (scene) => Deno.removeSync(scene.pending()), ends: 0 },
};

table("no piece of a token gets anywhere but into auth.json, its journal and the socket", PATHS, traceOf);

async function traceOf({ args = ["--once"], behaviours, arrange, meanwhile, env, ends }: Path) {
  await using scene = await Scene.open();
  await scene.do(arrange ?? ":");
  scene.mock.next(...behaviours?.(scene) ?? []);
  let shown = "";
  const traced = ["strace", "-f", "-yy", "-s", "100000", "-o", scene.trace];
  const running = scene.start(args, env, ["sh", "-c", 'umask 0; exec "$@"', "sh", ...traced]);
  const child = () => textOf(`/proc/${running.pid}/task/${running.pid}/children`).trim().split(" ")[0];
  scene.meanwhile(() => {
    shown = ["cmdline", "environ", "comm"].map((file) => textOf(`/proc/${child()}/${file}`)).join();
    return scene.do(meanwhile ?? ":");
  });
  if (args.length === 0) {
    await until(() => scene.status.startsWith("refreshed"), "the loop has refreshed");
    Deno.kill(Number(child()), "SIGTERM");
  }
  const { code, said, printed } = await running.ended;
  await scene.settled();
  assertEquals(code, ends, said);
  if (!env?.CODEX_AUTH_LOG_FORMAT) assertMatch(said, DOCUMENTED);

  const pieces = piecesOf(scene.mock.secrets);
  for (const text of [said, printed, shown]) assertEquals(leakIn(text, pieces), null, text);
  const ours = `${scene.home}/(auth\\.json|\\.auth\\.json\\.[0-9a-f]{16}\\.tmp(\\.new)?)`;
  const allowed = new RegExp(`^\\w+\\(\\d+<(${ours}|TCP:\\[\\S+:${scene.mock.port}\\])>`);
  const calls = callsOf(textOf(scene.trace)).map(({ text }) => text);
  for (const call of calls.filter((call) => !allowed.test(call))) assertEquals(leakIn(call, pieces), null, call);
  // What is seen here is what there was: tokens were read at all, and sent wherever there was an answer.
  if (ends !== 64) assert(calls.some((call) => allowed.test(call) && leakIn(call, pieces)));

  const created = calls.filter((call) => /^(open|openat|openat2|creat)\(.*(O_CREAT|O_TMPFILE)/.test(call));
  for (const call of created.filter((call) => call.includes("O_EXCL"))) assertMatch(call, /, 0600\) += /);
  const journals = created.filter((call) => /\/\.auth\.json\.[^"/]*"/.test(call));
  for (const call of journals) assertMatch(call, /O_EXCL.*, 0600\) += /);
  if (scene.mock.requests.length > 0) assert(journals.length > 0, "none is seen, though no request goes without one");
  for (const call of created) assertMatch(call, new RegExp(`"${scene.home}/[^/]+"|"/dev/`));
  for (const call of calls) assert(!/^f?chmod/.test(call) || /, 0?600\) += /.test(call), call);
  for (const { name } of Deno.readDirSync(scene.home)) {
    if (name !== "auth.json") assertEquals((Deno.statSync(`${scene.home}/${name}`).mode ?? 0) & 0o077, 0, name);
    if (!name.startsWith("auth.json")) assertEquals(leakIn(textOf(`${scene.home}/${name}`), pieces), null, name);
  }
}
