use super::*;

fn fresh() -> (TempDir, SqliteStore) {
    let dir = dir();
    let store = SqliteStore::open(dir.path()).unwrap();
    (dir, store)
}

/// What a store says after it was closed and opened again: what is on disk, not in a cache.
fn reloaded(dir: &TempDir, store: SqliteStore) -> (SqliteStore, Loaded) {
    drop(store);
    let store = SqliteStore::open(dir.path()).unwrap();
    let loaded = store.load(1000).unwrap();
    (store, loaded)
}

fn refused(store: &SqliteStore, batch: Vec<Change>, words: &str) {
    match commit(store, batch) {
        Err(StoreError::Constraint { words: said }) => assert!(said.contains(words), "{said}"),
        other => panic!("{words}: {other:?}"),
    }
}

#[test]
fn a_new_record_is_empty_and_keeps_its_id() {
    let (dir, store) = fresh();
    let first = store.load(10).unwrap();
    assert_eq!(
        first.next,
        crate::store::Next { job: 1, volume: 1, disk: 1, mapping: 1, operation: 1, snapshot: 1, epoch: 1 }
    );
    assert!(first.jobs.is_empty() && first.disks.is_empty() && first.loose.is_empty() && first.history.is_empty());
    let (_store, again) = reloaded(&dir, store);
    assert_eq!(again, first);
    let (_dir, other) = fresh();
    assert_ne!(other.load(0).unwrap().record, first.record);
}

#[test]
fn job_changes_are_there_after_a_restart() {
    let (dir, store) = fresh();
    put(&store, vec![job_add(1, "a"), job_add(2, "b")]);
    put(&store, vec![Change::JobVmName { row: JobRow(1), vm_name: "srv-ä".into(), at: at(50) }]);
    put(&store, vec![Change::JobHold { row: JobRow(2), hold: true, at: at(60) }]);
    let (store, loaded) = reloaded(&dir, store);
    let job = |row, name: &str, vm_name: &str, hold, vm_name_at, hold_at| crate::store::JobLoaded {
        row: JobRow(row),
        id: JobId::parse(name).unwrap(),
        vm_name: vm_name.into(),
        hold,
        created: at(row),
        vm_name_at,
        hold_at,
    };
    assert_eq!(loaded.jobs, [job(1, "a", "srv-ä", false, at(50), at(1)), job(2, "b", "", true, at(2), at(60))]);
    put(&store, vec![Change::JobHold { row: JobRow(2), hold: false, at: at(61) }]);
    let (_store, loaded) = reloaded(&dir, store);
    assert!(!loaded.jobs[1].hold);
}

#[test]
fn a_forgotten_jobs_name_is_free_and_its_row_is_not() {
    let (dir, store) = fresh();
    put(&store, vec![job_add(1, "a"), Change::JobForget { row: JobRow(1), at: at(5) }]);
    refused(&store, vec![Change::JobForget { row: JobRow(1), at: at(6) }], "job 1");
    refused(&store, vec![Change::JobHold { row: JobRow(1), hold: true, at: at(6) }], "job 1");
    refused(&store, vec![job_add(1, "b")], "job 1");
    put(&store, vec![job_add(2, "a")]);
    refused(&store, vec![job_add(3, "a")], "jobs.name");
    let (_store, loaded) = reloaded(&dir, store);
    assert_eq!(loaded.jobs.iter().map(|j| j.row).collect::<Vec<_>>(), [JobRow(2)]);
    assert_eq!(loaded.next.job, 3);
}

#[test]
fn a_job_that_owns_a_volume_is_not_forgotten() {
    let (_dir, store) = fresh();
    put(&store, vec![job_add(1, "a"), volume_add(1), disk_add(1, 1, "d0", 1, 1)]);
    refused(&store, vec![Change::JobForget { row: JobRow(1), at: at(6) }], "still owns");
    put(&store, vec![Change::DiskEnd { row: DiskRow(1) }, Change::JobForget { row: JobRow(1), at: at(6) }]);
    put(&store, vec![job_add(2, "b")]);
    refused(&store, vec![disk_add(2, 1, "d0", 1, 2)], "no job 1");
}

#[test]
fn a_disk_is_loaded_with_its_volume_and_mapping() {
    let (dir, store) = fresh();
    put(&store, vec![job_add(1, "a"), volume_add(7), disk_add(3, 1, "d0", 7, 42)]);
    let (store, loaded) = reloaded(&dir, store);
    let mut disk = crate::store::DiskLoaded {
        row: DiskRow(3),
        job: JobRow(1),
        disk: DiskName::parse("d0").unwrap(),
        epoch: 42,
        at: at(3),
        volume: vol(7),
        name: "volume 7".into(),
        size: 1 << 30,
        serial: String::new(),
        cloud_state: String::new(),
        device_id: None,
        status: Status::Unknown,
        status_at: at(7),
        mapping: None,
    };
    assert_eq!(loaded.disks, [disk.clone()]);
    assert_eq!((loaded.next.disk, loaded.next.volume, loaded.next.epoch), (4, 8, 43));
    assert_eq!(loaded.volume_rows, [(vol(7), VolumeRow(7))]);
    let map = mapping(5, 7, "loop3", 99);
    put(
        &store,
        vec![
            Change::VolumeFacts {
                volume: vol(7),
                name: "new name".into(),
                size: 2 << 30,
                serial: "2aff".into(),
                cloud_state: "Ready".into(),
                device_id: Some(4),
            },
            Change::VolumeStatus { volume: vol(7), status: Status::Attached, at: at(70) },
            Change::DiskRename { row: DiskRow(3), disk: DiskName::parse("root").unwrap(), at: at(71) },
            Change::MappingSet(map.clone()),
        ],
    );
    let (store, loaded) = reloaded(&dir, store);
    disk.name = "new name".into();
    disk.size = 2 << 30;
    disk.serial = "2aff".into();
    disk.cloud_state = "Ready".into();
    disk.device_id = Some(4);
    (disk.status, disk.status_at) = (Status::Attached, at(70));
    (disk.disk, disk.at) = (DiskName::parse("root").unwrap(), at(71));
    disk.mapping = Some(map);
    assert_eq!(loaded.disks, [disk.clone()]);

    let elsewhere = MappingRow { row: MapRow(6), volume: vol(7), vm: vm(9), device: None, at: at(80) };
    put(&store, vec![Change::MappingSet(elsewhere.clone())]);
    let (store, loaded) = reloaded(&dir, store);
    assert_eq!(loaded.disks[0].mapping, Some(elsewhere));
    assert_eq!(loaded.next.mapping, 7);
    put(&store, vec![Change::MappingEnd { volume: vol(7) }, Change::MappingEnd { volume: vol(7) }]);
    let (_store, loaded) = reloaded(&dir, store);
    assert_eq!(loaded.disks[0].mapping, None);
    assert_eq!(loaded.next.mapping, 7, "a row id is not given twice, also when its row is gone");
}

#[test]
fn every_settled_status_is_taken_and_no_other() {
    let (_dir, store) = fresh();
    put(&store, vec![job_add(1, "a"), volume_add(1), disk_add(1, 1, "d0", 1, 1)]);
    for status in Status::ALL {
        let change = vec![Change::VolumeStatus { volume: vol(1), status, at: at(9) }];
        if status.in_flight() {
            refused(&store, change, "status");
        } else {
            put(&store, change);
            assert_eq!(store.load(0).unwrap().disks[0].status, status);
        }
    }
}

#[test]
fn every_verb_and_outcome_is_taken() {
    let (dir, store) = fresh();
    let mut wanted = Vec::new();
    for (n, verb) in (1..).zip(Verb::ALL) {
        wanted.push((OpRow { verb, ended: Some((Outcome::Done, "x".into(), at(1))), ..op(n) }, None));
    }
    for (n, outcome) in (100..).zip(Outcome::ALL) {
        wanted.push((OpRow { ended: Some((outcome, "why".into(), at(200))), ..op(n) }, None));
    }
    put(&store, wanted.iter().map(|(o, _)| Change::OpBegin(Box::new(o.clone()))).collect());
    let (_store, loaded) = reloaded(&dir, store);
    assert_eq!(loaded.history, wanted);
}

#[test]
fn an_operation_goes_from_begun_to_history() {
    let (dir, store) = fresh();
    let mut wanted = OpRow {
        verb: Verb::Create,
        job: Some(JobRow(1)),
        disk: Some(DiskName::parse("d0").unwrap()),
        parent: Some(OpId(4)),
        detail: r#"{"epoch":3}"#.into(),
        ..op(5)
    };
    put(&store, vec![job_add(1, "a"), Change::OpBegin(Box::new(wanted.clone()))]);
    let (store, loaded) = reloaded(&dir, store);
    assert_eq!(loaded.unfinished, [wanted.clone()]);
    assert!(loaded.history.is_empty());
    assert_eq!(loaded.next.operation, 6);
    put(
        &store,
        vec![
            Change::OpStep { id: OpId(5), step: "asked".into(), detail: "{1}".into() },
            volume_add(1),
            Change::OpVolume { id: OpId(5), volume: vol(1) },
        ],
    );
    (wanted.step, wanted.detail, wanted.volume) = ("asked".into(), "{1}".into(), Some(vol(1)));
    let (store, loaded) = reloaded(&dir, store);
    assert_eq!(loaded.unfinished, [wanted.clone()]);
    let end = |outcome| Change::OpEnd { id: OpId(5), outcome, sentence: "no".into(), at: at(9) };
    put(&store, vec![end(Outcome::Failed)]);
    refused(&store, vec![end(Outcome::Done)], "has ended");
    refused(&store, vec![Change::OpStep { id: OpId(5), step: "x".into(), detail: "".into() }], "has ended");
    wanted.ended = Some((Outcome::Failed, "no".into(), at(9)));
    let (_store, loaded) = reloaded(&dir, store);
    assert!(loaded.unfinished.is_empty());
    assert_eq!(loaded.history, [(wanted, Some(JobId::parse("a").unwrap()))]);
}

#[test]
fn history_outlives_its_objects_and_is_bounded_from_the_old_end() {
    let (dir, store) = fresh();
    let disk = DiskName::parse("d0").unwrap();
    let about = OpRow { job: Some(JobRow(1)), volume: Some(vol(1)), disk: Some(disk.clone()), ..op(1) };
    put(&store, vec![job_add(1, "a"), volume_add(1), disk_add(1, 1, "d0", 1, 1), Change::OpBegin(Box::new(about))]);
    put(
        &store,
        vec![
            done(1),
            Change::DiskEnd { row: DiskRow(1) },
            Change::VolumeGone { volume: vol(1), at: at(9) },
            Change::JobForget { row: JobRow(1), at: at(9) },
            begin(2),
            done(2),
            begin(3),
        ],
    );
    let (store, loaded) = reloaded(&dir, store);
    let (old, name) = &loaded.history[0];
    assert_eq!((old.volume, &old.disk, name), (Some(vol(1)), &Some(disk), &Some(JobId::parse("a").unwrap())));
    assert!(loaded.jobs.is_empty() && loaded.disks.is_empty() && loaded.loose.is_empty());
    let ids = |n| store.load(n).unwrap().history.iter().map(|(o, _)| o.id.0).collect::<Vec<_>>();
    assert_eq!(ids(2), [1, 2]);
    assert_eq!(ids(1), [2]);
    assert_eq!(ids(0), [0i64; 0]);
}

#[test]
fn a_volume_that_returns_keeps_its_row_and_none_of_its_facts() {
    let (dir, store) = fresh();
    put(&store, vec![job_add(1, "a"), volume_add(1), disk_add(1, 1, "d0", 1, 1)]);
    put(
        &store,
        vec![
            Change::VolumeStatus { volume: vol(1), status: Status::Detached, at: at(3) },
            Change::DiskEnd { row: DiskRow(1) },
        ],
    );
    let (store, loaded) = reloaded(&dir, store);
    assert_eq!(loaded.loose, [vol(1)], "released");
    put(&store, vec![Change::VolumeGone { volume: vol(1), at: at(4) }]);
    let (store, loaded) = reloaded(&dir, store);
    assert!(loaded.loose.is_empty());
    assert_eq!(loaded.volume_rows, [(vol(1), VolumeRow(1))]);
    refused(&store, vec![disk_add(2, 1, "d0", 1, 2)], "no volume");
    put(
        &store,
        vec![
            Change::VolumeAdd { row: VolumeRow(77), volume: vol(1), name: "back".into(), size: 5, at: at(90) },
            disk_add(2, 1, "d0", 1, 2),
        ],
    );
    let (_store, loaded) = reloaded(&dir, store);
    assert_eq!(loaded.volume_rows, [(vol(1), VolumeRow(1))]);
    let disk = &loaded.disks[0];
    assert_eq!((disk.name.as_str(), disk.size, disk.status, disk.status_at), ("back", 5, Status::Unknown, at(90)));
}

#[test]
fn a_volume_has_one_owner_and_a_disk_name_one_volume() {
    let (_dir, store) = fresh();
    put(&store, vec![job_add(1, "a"), job_add(2, "b"), volume_add(1), volume_add(2), disk_add(1, 1, "d0", 1, 1)]);
    refused(&store, vec![disk_add(2, 2, "d0", 1, 2)], "vm_disks.ossea_volume_id");
    refused(&store, vec![disk_add(2, 1, "d1", 1, 2)], "vm_disks.ossea_volume_id");
    refused(&store, vec![disk_add(2, 1, "d0", 2, 2)], "vm_disks.job_id, vm_disks.disk_name");
    put(&store, vec![disk_add(2, 2, "d0", 2, 2)]);
    // A move: the ownership ends and begins in one batch.
    put(&store, vec![Change::DiskEnd { row: DiskRow(1) }, disk_add(3, 2, "d1", 1, 3)]);
    let owners: Vec<_> = store.load(0).unwrap().disks.iter().map(|d| (d.row.0, d.job.0, d.volume)).collect();
    assert_eq!(owners, [(2, 2, vol(2)), (3, 2, vol(1))]);
}

#[test]
fn a_disks_incarnation_is_one_volumes_alone() {
    let (_dir, store) = fresh();
    put(&store, vec![volume_add(1), volume_add(2), Change::MappingSet(mapping(1, 1, "loop3", 9))]);
    refused(&store, vec![Change::MappingSet(mapping(2, 2, "loop3", 9))], "device_mappings");
    put(&store, vec![Change::MappingSet(mapping(2, 2, "loop3", 10))]);
}

fn snapshot_add(row: i64, volume: u128, name: &str) -> Change {
    Change::SnapshotAdd {
        row: SnapRow(row),
        volume: vol(volume),
        snapshot: SnapshotId(uuid::Uuid::from_u128(0x5a00 + u128::try_from(row).unwrap())),
        name: SnapshotName::parse(name).unwrap(),
        size: 1 << 30,
        created: at(row),
    }
}

#[test]
fn a_snapshots_name_is_its_volumes_alone_while_it_is_there_and_its_row_is_never_used_again() {
    let (dir, store) = fresh();
    put(&store, vec![volume_add(1), volume_add(2), snapshot_add(1, 1, "s"), snapshot_add(2, 2, "s")]);
    refused(&store, vec![snapshot_add(3, 1, "s")], "volume_snapshots.name");
    let (store, loaded) = reloaded(&dir, store);
    let first = SnapshotLoaded {
        row: SnapRow(1),
        volume: vol(1),
        snapshot: SnapshotId(uuid::Uuid::from_u128(0x5a01)),
        name: SnapshotName::parse("s").unwrap(),
        size: 1 << 30,
        created: at(1),
    };
    assert_eq!((loaded.snapshots.len(), &loaded.snapshots[0]), (2, &first), "also of volumes in no job");
    put(&store, vec![Change::SnapshotGone { row: SnapRow(1), at: at(5) }]);
    // Seen gone by a look and by its own operation.
    put(&store, vec![Change::SnapshotGone { row: SnapRow(1), at: at(6) }]);
    refused(&store, vec![snapshot_add(1, 1, "s")], "volume_snapshots.id");
    put(&store, vec![snapshot_add(3, 1, "s")]);
    let (store, loaded) = reloaded(&dir, store);
    assert_eq!(loaded.snapshots.iter().map(|s| s.row).collect::<Vec<_>>(), [SnapRow(2), SnapRow(3)]);
    assert_eq!(loaded.next.snapshot, 4);
    drop(store);
    let conn = rusqlite::Connection::open(dir.path().join("volfs.db")).unwrap();
    let gone: i64 = conn.query_row("SELECT deleted_at FROM volume_snapshots WHERE id = 1", [], |r| r.get(0)).unwrap();
    assert_eq!(gone, at(5).0, "kept, with the time it was first seen gone");
}

#[test]
fn a_change_to_what_is_not_there_is_refused() {
    let (_dir, store) = fresh();
    put(&store, vec![job_add(1, "a")]);
    let name = DiskName::parse("x").unwrap();
    for change in [
        Change::JobForget { row: JobRow(9), at: at(1) },
        Change::JobVmName { row: JobRow(9), vm_name: "x".into(), at: at(1) },
        Change::JobHold { row: JobRow(9), hold: true, at: at(1) },
        Change::VolumeFacts {
            volume: vol(9),
            name: "x".into(),
            size: 1,
            serial: "".into(),
            cloud_state: "".into(),
            device_id: None,
        },
        Change::VolumeStatus { volume: vol(9), status: Status::Detached, at: at(1) },
        Change::VolumeGone { volume: vol(9), at: at(1) },
        disk_add(1, 1, "d0", 9, 1),
        Change::DiskRename { row: DiskRow(9), disk: name, at: at(1) },
        Change::DiskEnd { row: DiskRow(9) },
        Change::MappingSet(mapping(1, 9, "loop1", 1)),
        Change::OpBegin(Box::new(OpRow { volume: Some(vol(9)), ..op(1) })),
        Change::OpBegin(Box::new(OpRow { job: Some(JobRow(9)), ..op(1) })),
        Change::OpStep { id: OpId(9), step: "x".into(), detail: "".into() },
        done(9),
        Change::OpVolume { id: OpId(9), volume: vol(9) },
        snapshot_add(1, 9, "s"),
        Change::SnapshotGone { row: SnapRow(9), at: at(1) },
        Change::VolumeAdd { row: VolumeRow(1), volume: vol(1), name: "x".into(), size: u64::MAX, at: at(1) },
    ] {
        let shown = format!("{change:?}");
        let before = store.load(10).unwrap();
        assert!(matches!(commit(&store, vec![change]), Err(StoreError::Constraint { .. })), "{shown}");
        assert_eq!(store.load(10).unwrap(), before, "{shown}");
    }
}

#[test]
fn a_batch_is_there_as_a_whole_or_not_at_all() {
    let (dir, store) = fresh();
    refused(&store, vec![job_add(1, "a"), volume_add(1), begin(1), job_add(2, "a")], "JobAdd");
    let (store, loaded) = reloaded(&dir, store);
    assert!(loaded.jobs.is_empty() && loaded.volume_rows.is_empty() && loaded.unfinished.is_empty());
    put(&store, vec![]);
    put(&store, vec![job_add(1, "a")]);
}

#[test]
fn the_epoch_outlives_its_ownership() {
    let (dir, store) = fresh();
    put(&store, vec![job_add(1, "a"), volume_add(1), disk_add(1, 1, "d0", 1, 17)]);
    put(&store, vec![Change::DiskEnd { row: DiskRow(1) }, disk_add(2, 1, "d0", 1, 9)]);
    let (_store, loaded) = reloaded(&dir, store);
    assert_eq!((loaded.next.epoch, loaded.next.disk), (18, 3));
}

#[test]
fn an_imported_ownership_gets_its_epoch_once_and_for_good() {
    let (dir, store) = fresh();
    put(&store, vec![job_add(1, "a"), volume_add(1), disk_add(1, 1, "d0", 1, 0)]);
    let marked = |row, epoch| vec![Change::DiskMarked { row: DiskRow(row), epoch }];
    for (row, epoch) in [(1, 0), (2, 7)] {
        assert!(matches!(commit(&store, marked(row, epoch)), Err(StoreError::Constraint { .. })), "{row} {epoch}");
    }
    let (store, loaded) = reloaded(&dir, store);
    assert_eq!((loaded.disks[0].epoch, loaded.next.epoch), (0, 1));
    put(&store, marked(1, 7));
    assert!(commit(&store, marked(1, 8)).is_err(), "a mark is given up by its verbs only");
    let (_store, loaded) = reloaded(&dir, store);
    assert_eq!((loaded.disks[0].epoch, loaded.next.epoch), (7, 8));
}

/// A mark with an epoch that the record does not know to have given makes it a copy: also where the
/// operation that it was given to failed and was dropped from the history since.
#[test]
fn an_epoch_is_given_when_its_operation_begins_and_for_good() {
    let (dir, store) = fresh();
    let given = OpRow { detail: r#"{"epoch":41}"#.into(), ..op(1) };
    put(&store, vec![Change::OpBegin(Box::new(given)), done(1), begin(2), done(2), begin(3), done(3)]);
    drop(store);
    drop(SqliteStore::open_keeping(dir.path(), 1).unwrap());
    let loaded = SqliteStore::open(dir.path()).unwrap().load(9).unwrap();
    assert_eq!((loaded.history.len(), loaded.next.epoch), (1, 42));
}

#[test]
fn retention_drops_old_operations_and_never_unfinished_ones_or_their_parts() {
    let dir = dir();
    let store = SqliteStore::open_keeping(dir.path(), 20).unwrap();
    put(&store, vec![begin(1), begin(2), done(2)]);
    put(&store, vec![Change::OpBegin(Box::new(OpRow { parent: Some(OpId(1)), ..op(3) })), done(3)]);
    for n in 10..60 {
        put(&store, vec![begin(n), done(n)]);
    }
    let loaded = store.load(1000).unwrap();
    assert_eq!(loaded.unfinished.len(), 1);
    let ids: Vec<_> = loaded.history.iter().map(|(o, _)| o.id.0).collect();
    assert!(ids.len() <= 23 && ids[0] == 3 && ids[1] >= 37 && ids.ends_with(&[58, 59]), "{ids:?}");
    drop(store);
    let store = SqliteStore::open_keeping(dir.path(), 5).unwrap();
    let ids: Vec<_> = store.load(1000).unwrap().history.iter().map(|(o, _)| o.id.0).collect();
    assert_eq!(ids, [3, 55, 56, 57, 58, 59]);
    assert_eq!(store.load(0).unwrap().next.operation, 60);
}
