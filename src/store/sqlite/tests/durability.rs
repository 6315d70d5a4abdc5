use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::pin::{Pin, pin};
use std::task::Poll;

use futures_util::future::join_all;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::*;
use crate::store::sqlite::writer::commit_group;

/// An operation that takes about `bytes` in the record.
fn big(id: i64, bytes: usize) -> Change {
    Change::OpBegin(Box::new(OpRow { detail: "x".repeat(bytes), ..op(id) }))
}

fn operations(store: &SqliteStore) -> Vec<i64> {
    store.load(0).unwrap().unfinished.iter().map(|o| o.id.0).collect()
}

/// Polls once, and says whether there is no outcome yet.
async fn pending<F: Future + Unpin>(future: &mut F) -> bool {
    std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut *future).poll(cx).is_pending())).await
}

/// Holds the database's write lock, so that what is committed meanwhile queues up.
fn blocked(store: &SqliteStore, batches: Vec<Vec<Change>>) -> Vec<Result<(), StoreError>> {
    let blocker = Connection::open(store.path()).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    runtime().block_on(async {
        let mut all = pin!(join_all(batches.into_iter().map(|b| store.commit(b))));
        assert!(pending(&mut all).await);
        blocker.execute_batch("ROLLBACK").unwrap();
        all.await
    })
}

#[test]
fn concurrent_commits_share_a_transaction() {
    let dir = dir();
    let store = SqliteStore::open(dir.path()).unwrap();
    let results = blocked(&store, (1..=100).map(|n| vec![begin(n)]).collect());
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    // The first may have been taken alone before the others came.
    assert!(store.transactions() <= 2, "{}", store.transactions());
    assert_eq!(operations(&store), (1..=100).collect::<Vec<_>>());
}

#[test]
fn a_failing_batch_takes_nobody_with_it() {
    let dir = dir();
    let store = SqliteStore::open(dir.path()).unwrap();
    let batches = vec![vec![begin(1)], vec![begin(2), begin(1)], vec![begin(3)], vec![done(9)], vec![begin(2)]];
    let results = blocked(&store, batches);
    let failed: Vec<_> = results.iter().map(|r| matches!(r, Err(StoreError::Constraint { .. }))).collect();
    assert_eq!(failed, [false, true, false, true, false], "{results:?}");
    assert_eq!(operations(&store), [1, 2, 3]);
}

#[test]
fn a_commit_is_done_although_its_caller_went_away() {
    let dir = dir();
    let store = SqliteStore::open(dir.path()).unwrap();
    runtime().block_on(async {
        let mut first = Box::pin(store.commit(vec![begin(1)]));
        pending(&mut first).await;
    });
    drop(store);
    assert_eq!(operations(&SqliteStore::open(dir.path()).unwrap()), [1]);
}

#[test]
fn a_busy_database_is_an_error_and_no_hang() {
    let dir = dir();
    let store = SqliteStore::open(dir.path()).unwrap();
    let blocker = Connection::open(store.path()).unwrap();
    blocker.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert!(matches!(commit(&store, vec![begin(1)]), Err(StoreError::Failed { .. })));
    blocker.execute_batch("ROLLBACK").unwrap();
    put(&store, vec![begin(1)]);
}

/// A tmpfs of its own, unmounted whatever happens.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new() -> Self {
        Self::of(c"size=1m,mode=0700")
    }

    fn of(size: &std::ffi::CStr) -> Self {
        let dir = dir();
        mount("volfs-test", dir.path(), "tmpfs", MountFlags::empty(), size).unwrap();
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // The directory below is removed after this; nobody could do more about an error.
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

fn full(result: &Result<(), StoreError>) -> bool {
    matches!(result, Err(StoreError::Full { .. }))
}

#[test]
fn on_a_full_disk_the_reserve_lets_a_detach_be_journaled_and_recorded_but_no_attach() {
    let disk = SmallDisk::of(c"size=8m,mode=0700");
    let store = SqliteStore::open(disk.0.path()).unwrap();
    put(&store, vec![begin(1)]);
    let mut file = fs::File::create(disk.0.path().join("filler")).unwrap();
    while file.write(&[0; 4096]).is_ok() {}
    // What was allocated in the WAL already still takes a few.
    let mut id = 2;
    while commit(&store, vec![begin(id)]).is_ok() {
        id += 1;
    }
    assert!(full(&commit(&store, vec![begin(id + 1)])), "an attach must not use the reserve");
    let mut detach = op(id + 2);
    detach.verb = Verb::Detach;
    assert_eq!(commit(&store, vec![Change::OpBegin(Box::new(detach))]), Ok(()));
    assert_eq!(commit(&store, vec![done(id + 2)]), Ok(()));
}

#[test]
fn a_full_disk_is_said_so_and_forgotten_when_there_is_room() {
    let disk = SmallDisk::new();
    let store = SqliteStore::open(disk.0.path()).unwrap();
    put(&store, vec![begin(1)]);
    let filler = disk.0.path().join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    while file.write(&[0; 4096]).is_ok() {}
    // Both are in one transaction, whose COMMIT fails.
    let results = blocked(&store, vec![vec![big(2, 40_000)], vec![begin(3)]]);
    assert!(full(&results[0]), "{results:?}");
    assert_eq!(operations(&store).contains(&3), results[1].is_ok(), "{results:?}");
    assert!(full(&commit(&store, vec![big(4, 40_000)])));
    assert!(!operations(&store).contains(&2) && !operations(&store).contains(&4));
    fs::remove_file(&filler).unwrap();
    drop(file);
    put(&store, vec![big(4, 40_000)]);
    put(&store, vec![big(2, 40_000)]);
    let wanted = operations(&store);
    drop(store);
    assert_eq!(operations(&SqliteStore::open(disk.0.path()).unwrap()), wanted);
}

#[test]
fn a_statement_that_finds_no_room_fails_its_own_batch_only() {
    let dir = dir();
    drop(SqliteStore::open(dir.path()).unwrap());
    let conn = crate::store::sqlite::opening::connect(&dir.path().join("volfs.db")).unwrap();
    let pages: i64 = conn.pragma_query_value(None, "page_count", |r| r.get(0)).unwrap();
    let limit = |n: i64| conn.pragma_update_and_check(None, "max_page_count", n, |r| r.get::<_, i64>(0)).unwrap();
    assert_eq!(limit(pages + 2), pages + 2);
    let count = AtomicU64::new(0);
    let results = commit_group(&conn, &[vec![begin(1)], vec![begin(2), big(3, 100_000)], vec![begin(4)]], &count);
    assert!(results[0].is_ok() && full(&results[1]) && results[2].is_ok(), "{results:?}");
    limit(1 << 30);
    assert_eq!(commit_group(&conn, &[vec![big(3, 100_000)]], &count), [Ok(())]);
    drop(conn);
    assert_eq!(operations(&SqliteStore::open(dir.path()).unwrap()), [1, 3, 4]);
}

#[test]
#[ignore = "run by a_write_error_is_said_so_and_forgotten_when_it_is_gone"]
fn child_with_failing_writes() {
    let Some(state) = given() else { return };
    let store = SqliteStore::open(&state).unwrap();
    put(&store, vec![begin(1)]);
    let length = fs::metadata(state.join("volfs.db-wal")).unwrap().len();
    let was = getrlimit(Resource::Fsize);
    // From here on no file of this process can grow beyond this; the write fails with EFBIG.
    setrlimit(Resource::Fsize, Rlimit { current: Some(length + 100), maximum: was.maximum }).unwrap();
    let results = blocked(&store, vec![vec![begin(2)], vec![begin(3)]]);
    let alone = commit(&store, vec![begin(4)]);
    setrlimit(Resource::Fsize, was).unwrap();
    assert!(results.iter().all(|r| matches!(r, Err(StoreError::Failed { .. }))), "{results:?}");
    assert!(matches!(alone, Err(StoreError::Failed { .. })), "{alone:?}");
    assert_eq!(store.transactions(), 1);
    assert_eq!(operations(&store), [1]);
    put(&store, vec![begin(4)]);
}

#[test]
fn a_write_error_is_said_so_and_forgotten_when_it_is_gone() {
    let dir = dir();
    let run = child("durability::child_with_failing_writes", dir.path());
    // A shell ignores SIGXFSZ for it, which would end the process before EFBIG is seen.
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""]).arg(run.get_program()).args(run.get_args());
    let out = shell.env("VOLFS_TEST_STATE", dir.path()).output().unwrap();
    assert!(out.status.success(), "{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert_eq!(operations(&SqliteStore::open(dir.path()).unwrap()), [1, 4]);
}

#[test]
#[ignore = "run by what_was_acknowledged_survives_a_kill"]
fn child_that_commits_until_killed() {
    let Some(state) = given() else { return };
    let store = SqliteStore::open(&state).unwrap();
    for n in 1.. {
        put(&store, vec![begin(n)]);
        println!("\nacknowledged {n}");
    }
}

#[test]
fn what_was_acknowledged_survives_a_kill() {
    let dir = dir();
    let mut running = child("durability::child_that_commits_until_killed", dir.path()).spawn().unwrap();
    let lines = BufReader::new(running.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut told = lines.filter_map(|l| l.strip_prefix("acknowledged ").map(|n| n.parse::<i64>().unwrap()));
    let reached = told.by_ref().find(|n| *n == 50);
    running.kill().unwrap();
    running.wait().unwrap();
    assert_eq!(reached, Some(50));
    let last = told.last().unwrap_or(50);
    let found = operations(&SqliteStore::open(dir.path()).unwrap());
    // One more may be durable whose acknowledgement was not printed.
    assert!(found == (1..=last).collect::<Vec<_>>() || found == (1..=last + 1).collect::<Vec<_>>(), "{last} {found:?}");
}

#[test]
#[ignore = "run by the tests of failpoints"]
fn child_that_commits_once() {
    let Some(state) = given() else { return };
    let store = SqliteStore::open(&state).unwrap();
    match commit(&store, vec![begin(1)]) {
        Ok(()) => println!("\nok"),
        Err(e) => println!("\n{e}"),
    }
}

/// What one commit said with this failpoint, and the operations found afterwards.
fn with_failpoint(points: &str) -> (String, Vec<i64>) {
    let dir = dir();
    let mut run = child("durability::child_that_commits_once", dir.path());
    let out = run.env("VOLFS_FAILPOINTS", points).output().unwrap();
    let said = String::from_utf8(out.stdout).unwrap();
    let said = said.lines().find(|l| *l == "ok" || l.contains("failpoint")).unwrap_or("killed").to_owned();
    (said, operations(&SqliteStore::open(dir.path()).unwrap()))
}

#[test]
fn a_kill_before_the_commit_leaves_nothing_and_after_it_everything() {
    assert_eq!(with_failpoint(""), ("ok".into(), vec![1]));
    assert_eq!(with_failpoint("store.before-commit=kill"), ("killed".into(), vec![]));
    assert_eq!(with_failpoint("store.after-commit=kill"), ("killed".into(), vec![1]));
}

#[test]
fn a_failpoint_fails_the_commit_and_leaves_nothing() {
    let (said, found) = with_failpoint("store.before-commit=fail");
    assert_eq!((said.as_str(), found), ("failpoint store.before-commit", vec![]));
    let (said, found) = with_failpoint("store.fail=fail");
    assert_eq!((said.as_str(), found), ("the disk is full: failpoint store.fail", vec![]));
}

/// Prints microseconds a commit; `VOLFS_TEST_STATE` names a directory on the disk to measure.
#[test]
#[ignore = "a measurement, run by hand"]
fn measure() {
    let Some(state) = given() else { return };
    let dir = tempfile::tempdir_in(state).unwrap();
    let store = SqliteStore::open(dir.path()).unwrap();
    let rounds = 400i64;
    runtime().block_on(async {
        let start = std::time::Instant::now();
        for n in 1..=rounds {
            store.commit(vec![begin(n)]).await.unwrap();
        }
        let alone = start.elapsed().as_micros() / u128::try_from(rounds).unwrap();
        let (start, before) = (std::time::Instant::now(), store.transactions());
        for n in 0..rounds {
            join_all((0..50).map(|k| store.commit(vec![begin(1000 + n * 50 + k)]))).await;
        }
        let batches = u128::try_from(rounds * 50).unwrap();
        println!(
            "\nalone {alone} µs; with 50 at once {} µs a batch, {} transactions for {batches}",
            start.elapsed().as_micros() / batches,
            store.transactions() - before,
        );
    });
}

/// Makes every fsync of this thread fail with EIO, for the rest of its life.
fn no_more_fsync() {
    let stmt = |code: u32, jt, jf, k: u32| libc::sock_filter { code: u16::try_from(code).unwrap(), jt, jf, k };
    let number = |n: libc::c_long| u32::try_from(n).unwrap();
    let fail = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EIO).unwrap();
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let mut code = [
        stmt(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        stmt(equal, 2, 0, number(libc::SYS_fsync)),
        stmt(equal, 1, 0, number(libc::SYS_fdatasync)),
        stmt(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        stmt(libc::BPF_RET | libc::BPF_K, 0, 0, fail),
    ];
    let program = libc::sock_fprog { len: 5, filter: code.as_mut_ptr() };
    // SAFETY: both calls touch this thread's own attributes only; the kernel copies the filter out
    // of `program` and `code`, which outlive the call.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
    };
    assert!(done, "{}", std::io::Error::last_os_error());
}

/// The frames of such a commit are in the WAL, whole; a power cut then must not make them true.
#[test]
fn a_commit_whose_fsync_failed_is_not_there_after_a_crash() {
    let (dir, copy) = (dir(), dir());
    drop(SqliteStore::open(dir.path()).unwrap());
    let from = dir.path().to_owned();
    let results = std::thread::spawn(move || {
        let conn = crate::store::sqlite::opening::connect(&from.join("volfs.db")).unwrap();
        let count = AtomicU64::new(0);
        let first = commit_group(&conn, &[vec![begin(1)]], &count);
        no_more_fsync();
        (first, commit_group(&conn, &[vec![begin(2)]], &count), conn)
    });
    let (first, second, conn) = results.join().unwrap();
    assert_eq!(first, [Ok(())]);
    assert!(matches!(second[..], [Err(StoreError::Failed { .. })]), "{second:?}");
    for name in ["volfs.db", "volfs.db-wal"] {
        fs::copy(dir.path().join(name), copy.path().join(name)).unwrap();
    }
    assert_eq!(operations(&SqliteStore::open(copy.path()).unwrap()), [1]);
    let count = AtomicU64::new(0);
    assert_eq!(commit_group(&conn, &[vec![begin(3)]], &count), [Ok(())]);
    drop(conn);
    assert_eq!(operations(&SqliteStore::open(dir.path()).unwrap()), [1, 3]);
}
