use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicU64;

use tempfile::TempDir;

use super::*;
use crate::model::{
    BootId, Caller, DevNo, DiskName, DiskRow, Fence, Incarnation, JobId, JobRow, MapRow, OpId, Outcome, SnapRow,
    SnapshotId, SnapshotName, Status, Timestamp, Verb, VmId, VolumeId, VolumeRow,
};
use crate::store::{MappedDevice, MappingRow, OpRow, SnapshotLoaded};

mod changes;
mod durability;
mod opening;
mod shape;

fn dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn commit(store: &SqliteStore, batch: Vec<Change>) -> Result<(), StoreError> {
    runtime().block_on(store.commit(batch))
}

fn put(store: &SqliteStore, batch: Vec<Change>) {
    commit(store, batch).unwrap();
}

fn at(n: i64) -> Timestamp {
    Timestamp(1_700_000_000_000 + n)
}

/// A volume id that says its number.
fn vol(n: u128) -> VolumeId {
    VolumeId(uuid::Uuid::from_u128(0x2aff_4799_0000_4000_8000_0000_0000_0000 + n))
}

fn vm(n: u128) -> VmId {
    VmId(uuid::Uuid::from_u128(0xffff_4799_0000_4000_8000_0000_0000_0000 + n))
}

fn boot() -> BootId {
    BootId(uuid::Uuid::from_u128(0xb007_0000_0000_4000_8000_0000_0000_0001))
}

fn job_add(row: i64, name: &str) -> Change {
    Change::JobAdd { row: JobRow(row), id: JobId::parse(name).unwrap(), at: at(row) }
}

fn volume_add(n: i64) -> Change {
    let volume = vol(u128::try_from(n).unwrap());
    Change::VolumeAdd { row: VolumeRow(n), volume, name: format!("volume {n}"), size: 1 << 30, at: at(n) }
}

fn disk_add(row: i64, job: i64, disk: &str, volume: u128, epoch: u64) -> Change {
    let disk = DiskName::parse(disk).unwrap();
    Change::DiskAdd { row: DiskRow(row), job: JobRow(job), disk, volume: vol(volume), epoch, at: at(row) }
}

fn op(id: i64) -> OpRow {
    OpRow {
        id: OpId(id),
        fence: Fence::random(),
        verb: Verb::Attach,
        command: "attach timeout=5".into(),
        job: None,
        volume: None,
        disk: None,
        parent: None,
        detail: "{}".into(),
        step: "begun".into(),
        caller: Caller { uid: 1000, gid: 100, pid: 4711, comm: "bash".into() },
        host: vm(0),
        boot: boot(),
        began: at(id),
        ended: None,
    }
}

fn begin(id: i64) -> Change {
    Change::OpBegin(Box::new(op(id)))
}

fn done(id: i64) -> Change {
    Change::OpEnd { id: OpId(id), outcome: Outcome::Done, sentence: String::new(), at: at(id) }
}

fn mapping(row: i64, volume: u128, name: &str, diskseq: u64) -> MappingRow {
    let device = MappedDevice {
        name: name.into(),
        dev: DevNo { major: 7, minor: 3 },
        incarnation: Incarnation { boot: boot(), diskseq },
        size: 1 << 30,
    };
    MappingRow { row: MapRow(row), volume: vol(volume), vm: vm(0), device: Some(device), at: at(row) }
}

/// Runs one test of this binary, marked `ignore`, in a process of its own.
fn child(test: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", &format!("store::sqlite::tests::{test}"), "--ignored", "--nocapture"])
        .env("VOLFS_TEST_STATE", dir)
        .env_remove("VOLFS_FAILPOINTS")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

/// The state directory a [`child`] was given; none in a run of all ignored tests.
fn given() -> Option<std::path::PathBuf> {
    std::env::var_os("VOLFS_TEST_STATE").map(Into::into)
}
