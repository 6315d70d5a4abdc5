use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};

use super::*;

/// What is in a directory, names and contents, but for the lock, which says who looked last.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| !p.ends_with("lock"))
        .map(|p| (p.clone(), fs::read(&p).unwrap_or_default()))
        .collect()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Opening must answer Unusable naming `path`, with `words`, and leave the directory as it was.
fn unusable(dir: &Path, path: &Path, words: &str) {
    let before = contents(dir);
    let check = |result: Result<SqliteStore, StoreError>| match result {
        Err(e @ StoreError::Unusable { .. }) => {
            let said = e.to_string();
            assert!(said.contains(words) && said.starts_with(path.to_str().unwrap()), "{said}");
        }
        other => panic!("{words}: {other:?}"),
    };
    check(SqliteStore::open(dir));
    check(SqliteStore::open(dir));
    assert_eq!(contents(dir), before, "{words}");
}

fn record() -> (TempDir, PathBuf) {
    let dir = dir();
    let store = SqliteStore::open(dir.path()).unwrap();
    put(&store, vec![job_add(1, "a"), volume_add(1), disk_add(1, 1, "d0", 1, 1), begin(1), done(1)]);
    drop(store);
    let db = dir.path().join("volfs.db");
    (dir, db)
}

fn sql(db: &Path, text: &str) {
    let conn = Connection::open(db).unwrap();
    conn.pragma_update(None, "foreign_keys", 0).unwrap();
    conn.execute_batch(text).unwrap();
}

#[test]
fn what_is_made_is_private() {
    let top = dir();
    let state = top.path().join("a b?%23/state");
    let store = SqliteStore::open(&state).unwrap();
    put(&store, vec![job_add(1, "a")]);
    assert_eq!(mode(&state), 0o700);
    for name in ["volfs.db", "volfs.db-wal", "volfs.db-shm", "lock", "high-water"] {
        assert_eq!(mode(&state.join(name)), 0o600, "{name}");
    }
    assert_eq!(contents(&state).len(), 5, "with the reserve and the high-water mark");
    drop(store);
    fs::set_permissions(state.join("volfs.db"), fs::Permissions::from_mode(0o644)).unwrap();
    let store = SqliteStore::open(&state).unwrap();
    assert_eq!(mode(&state.join("volfs.db")), 0o600);
    drop(store);
    assert_eq!(contents(&state).len(), 3, "the WAL is folded back at the end");
}

#[test]
fn a_directory_of_something_else_is_refused_and_not_touched() {
    let dir = dir();
    fs::write(dir.path().join("photo.jpg"), "x").unwrap();
    unusable(dir.path(), dir.path(), "photo.jpg");
    assert!(!dir.path().join("lock").exists());
    let file = dir.path().join("photo.jpg");
    assert!(matches!(SqliteStore::open(&file), Err(StoreError::Unusable { .. })));
}

#[test]
fn a_directory_of_ours_or_an_empty_one_is_taken() {
    for entry in ["lost+found", "loop", "trash", "lock"] {
        let dir = dir();
        if entry == "lock" {
            fs::write(dir.path().join(entry), "pid 1 (x)\n").unwrap();
            fs::write(dir.path().join("notes"), "").unwrap();
        } else {
            fs::create_dir(dir.path().join(entry)).unwrap();
        }
        drop(SqliteStore::open(dir.path()).unwrap());
    }
}

#[test]
fn a_directory_that_others_can_write_is_refused() {
    let dir = dir();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    unusable(dir.path(), dir.path(), "others can write to it (mode 1777)");
}

#[test]
fn a_second_opener_is_told_who_has_it() {
    let dir = dir();
    let store = SqliteStore::open(dir.path()).unwrap();
    let Err(StoreError::Locked { path, holder }) = SqliteStore::open(dir.path()) else { panic!("it was opened twice") };
    assert_eq!(path, dir.path().join("lock").to_str().unwrap());
    assert!(holder.starts_with(&format!("pid {} (", std::process::id())), "{holder}");
    put(&store, vec![job_add(1, "a")]);
    drop(store);
    drop(SqliteStore::open(dir.path()).unwrap());
}

/// A child between fork and exec has one.
#[test]
fn a_copy_of_its_descriptor_does_not_keep_the_lock() {
    let dir = dir();
    let lock = StateLock::take(dir.path()).unwrap();
    let _copy = lock.0.try_clone().unwrap();
    drop(lock);
    StateLock::take(dir.path()).unwrap();
}

#[test]
fn a_file_that_is_no_database_is_refused() {
    let dir = dir();
    let db = dir.path().join("volfs.db");
    fs::write(&db, "hello").unwrap();
    unusable(dir.path(), &db, "not an SQLite database");
    fs::write(&db, [7u8; 8192]).unwrap();
    unusable(dir.path(), &db, "not an SQLite database");
    fs::write(&db, "").unwrap();
    unusable(dir.path(), &db, "it is empty");
    fs::remove_file(&db).unwrap();
    fs::create_dir(&db).unwrap();
    unusable(dir.path(), &db, "not a regular file");
}

#[test]
fn a_database_of_something_else_is_refused() {
    let dir = dir();
    let db = dir.path().join("volfs.db");
    sql(&db, "PRAGMA application_id = 7; PRAGMA user_version = 1; CREATE TABLE t (x)");
    unusable(dir.path(), &db, "of something else (application id 7)");
}

#[test]
fn a_newer_record_is_left_to_its_own_volfs() {
    let (dir, db) = record();
    sql(&db, "PRAGMA user_version = 2");
    unusable(dir.path(), &db, "a newer volfs made it (schema 2");
    sql(&db, "PRAGMA user_version = 0");
    unusable(dir.path(), &db, "schema number is 0");
}

/// A newer volfs that crashed: the number is in the WAL only, and nothing may be folded back.
#[test]
fn a_newer_record_is_noticed_in_its_wal_too() {
    let (dir, db) = record();
    let other = super::dir();
    let conn = Connection::open(&db).unwrap();
    conn.execute_batch("PRAGMA user_version = 2; CREATE TABLE next (x)").unwrap();
    for name in ["volfs.db", "volfs.db-wal"] {
        fs::copy(dir.path().join(name), other.path().join(name)).unwrap();
    }
    let copy = other.path().join("volfs.db");
    let before = (fs::read(&copy).unwrap(), fs::read(other.path().join("volfs.db-wal")).unwrap());
    let e = SqliteStore::open(other.path()).unwrap_err().to_string();
    assert!(e.contains("a newer volfs made it (schema 2"), "{e}");
    assert_eq!((fs::read(&copy).unwrap(), fs::read(other.path().join("volfs.db-wal")).unwrap()), before);
}

#[test]
fn a_damaged_record_is_refused() {
    let (dir, db) = record();
    let whole = fs::read(&db).unwrap();
    let page = usize::from(u16::from_be_bytes([whole[16], whole[17]]));
    for n in 1..whole.len() / page {
        let mut bytes = whole.clone();
        bytes[n * page..(n + 1) * page].fill(0x5a);
        fs::write(&db, &bytes).unwrap();
        unusable(dir.path(), &db, "restore it from a backup");
    }
    fs::write(&db, &whole[..whole.len() - page]).unwrap();
    unusable(dir.path(), &db, "restore it from a backup");
    fs::write(&db, &whole).unwrap();
    drop(SqliteStore::open(dir.path()).unwrap());
}

#[test]
fn a_record_that_somebody_edited_is_refused_with_the_place() {
    let (dir, db) = record();
    let whole = fs::read(&db).unwrap();
    sql(&db, "UPDATE vm_disks SET ossea_volume_id = 9");
    unusable(dir.path(), &db, "row 1 of vm_disks names a row of ossea_volumes");
    fs::write(&db, &whole).unwrap();
    sql(&db, "DROP INDEX jobs_live_name");
    unusable(dir.path(), &db, "its index jobs_live_name is not that of schema 1");
    fs::write(&db, &whole).unwrap();
    sql(&db, "CREATE INDEX my_own ON jobs (vm_name)");
    drop(SqliteStore::open(dir.path()).unwrap());
    // What no constraint catches and our words do not know is noticed when it is read.
    fs::write(&db, &whole).unwrap();
    sql(&db, "UPDATE ossea_volumes SET volume_id = upper(volume_id)");
    let e = SqliteStore::open(dir.path()).unwrap().load(0).unwrap_err().to_string();
    assert!(e.contains("volume_id is \"2AFF"), "{e}");
}

#[test]
fn a_read_only_file_is_refused() {
    let (dir, db) = record();
    fs::set_permissions(&db, fs::Permissions::from_mode(0o400)).unwrap();
    unusable(dir.path(), &db, "it is read-only (mode 0400)");
    assert_eq!(mode(&db), 0o400);
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        // It may not be mounted any more; there is nobody to tell otherwise.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn a_record_on_a_read_only_mount_is_refused_and_can_be_read() {
    let (dir, db) = record();
    mount_bind(&db, &db).unwrap();
    let mounted = Mounted(db.clone());
    mount_remount(&db, MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
    unusable(dir.path(), &db, "it cannot be written");
    drop(mounted);

    mount_bind(dir.path(), dir.path()).unwrap();
    let _mounted = Mounted(dir.path().to_owned());
    mount_remount(dir.path(), MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
    let e = SqliteStore::open(dir.path()).unwrap_err().to_string();
    assert!(e.contains("Read-only file system"), "{e}");
    let store = SqliteStore::open_read_only(dir.path()).unwrap();
    assert_eq!(store.load(9).unwrap().disks.len(), 1);
}

#[test]
fn a_wal_without_its_database_is_not_replayed_into_a_new_one() {
    let (dir, db) = record();
    let wal = dir.path().join("volfs.db-wal");
    fs::rename(&db, &wal).unwrap();
    unusable(dir.path(), &wal, "belongs to a volfs.db that is not there");
}

#[test]
fn a_creation_that_a_crash_cut_short_starts_again() {
    let dir = dir();
    fs::write(dir.path().join("volfs.db.new"), "half").unwrap();
    drop(SqliteStore::open(dir.path()).unwrap());
    assert_eq!(contents(dir.path()).len(), 3);
}

static NEXT: &[M<'static>] = &[
    M::up(include_str!("../v1.sql")).foreign_key_check(),
    M::up("ALTER TABLE jobs ADD COLUMN note TEXT NOT NULL DEFAULT 'none'").foreign_key_check(),
];

#[test]
fn an_older_record_is_brought_forward_with_its_data() {
    let (dir, db) = record();
    let before = SqliteStore::open(dir.path()).unwrap().load(9).unwrap();
    let store = SqliteStore::open_with(dir.path(), 10, NEXT).unwrap();
    assert_eq!(store.load(9).unwrap(), before);
    // Already in the file, not in the WAL alone.
    assert_eq!(fs::read(&db).unwrap()[60..64], [0, 0, 0, 2]);
    put(&store, vec![job_add(2, "b")]);
    drop(store);
    unusable(dir.path(), &db, "a newer volfs made it (schema 2");
    let conn = Connection::open(&db).unwrap();
    let notes: i64 = conn.query_row("SELECT count(*) FROM jobs WHERE note = 'none'", [], |r| r.get(0)).unwrap();
    assert_eq!(notes, 2);
    drop(conn);
    drop(SqliteStore::open_with(dir.path(), 10, NEXT).unwrap());
}

#[test]
fn a_migration_that_fails_leaves_the_old_record() {
    static BROKEN: &[M<'static>] =
        &[M::up(include_str!("../v1.sql")).foreign_key_check(), M::up("ALTER TABLE jobs ADD COLUMN x TEXT; OOPS")];
    let (dir, _db) = record();
    let before = SqliteStore::open(dir.path()).unwrap().load(9).unwrap();
    assert!(matches!(SqliteStore::open_with(dir.path(), 10, BROKEN), Err(StoreError::Failed { .. })));
    assert_eq!(SqliteStore::open(dir.path()).unwrap().load(9).unwrap(), before);
}

#[test]
fn a_reader_sees_what_the_daemon_commits_and_changes_nothing() {
    let dir = dir();
    let store = SqliteStore::open(dir.path()).unwrap();
    put(&store, vec![job_add(1, "a")]);
    let reader = SqliteStore::open_read_only(dir.path()).unwrap();
    assert_eq!(reader.load(9).unwrap(), store.load(9).unwrap());
    put(&store, vec![job_add(2, "b")]);
    assert_eq!(reader.load(9).unwrap().jobs.len(), 2);
    assert_eq!(commit(&reader, vec![job_add(3, "c")]), Err(StoreError::Failed { words: "opened read-only".into() }));
    // As root does with sqlite3.
    let conn = Connection::open_with_flags(store.path(), rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    let jobs: i64 = conn.query_row("SELECT count(*) FROM jobs", [], |r| r.get(0)).unwrap();
    assert_eq!(jobs, 2);
    drop(store);
    assert_eq!(reader.load(9).unwrap().jobs.len(), 2);
    drop((reader, conn));
    assert_eq!(SqliteStore::open_read_only(dir.path()).unwrap().load(9).unwrap().jobs.len(), 2);
}

#[test]
fn a_reader_refuses_what_is_no_record_of_its_version() {
    let refused = |dir: &TempDir, words: &str| match SqliteStore::open_read_only(dir.path()) {
        Err(StoreError::Unusable { words: said, .. }) => assert!(said.contains(words), "{said}"),
        other => panic!("{words}: {other:?}"),
    };
    let (dir, db) = record();
    sql(&db, "PRAGMA user_version = 2");
    refused(&dir, "a newer volfs made it");
    sql(&db, "PRAGMA user_version = 1; PRAGMA application_id = 9");
    refused(&dir, "of something else");
    drop(dir);
    let dir = super::dir();
    fs::write(dir.path().join("volfs.db"), [7u8; 8192]).unwrap();
    refused(&dir, "not a database");
}

#[test]
fn a_reader_makes_no_record() {
    let dir = dir();
    assert!(matches!(SqliteStore::open_read_only(dir.path()), Err(StoreError::Unusable { .. })));
    assert!(matches!(SqliteStore::open_read_only(&dir.path().join("no")), Err(StoreError::Unusable { .. })));
    assert!(contents(dir.path()).is_empty());
}

#[test]
fn the_writing_connection_is_as_durable_as_it_says() {
    let (_dir, db) = record();
    let conn = super::super::opening::connect(&db).unwrap();
    let pragma = |name: &str| conn.pragma_query_value(None, name, |r| r.get::<_, rusqlite::types::Value>(0)).unwrap();
    assert_eq!(pragma("journal_mode"), "wal".to_owned().into());
    assert_eq!(pragma("synchronous"), 2i64.into());
    assert_eq!(pragma("foreign_keys"), 1i64.into());
    assert!(rusqlite::version_number() >= 3_051_003, "{}", rusqlite::version());
}
