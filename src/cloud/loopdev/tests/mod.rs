//! On real loop devices. Each test has a store of its own; its guard unbinds what is left.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use super::device::Binding;
use super::*;
use crate::model::{DiskName, JobId, RecordId};
use crate::sys;

mod faults;
mod fuzz;
mod snapshots;

const MIB: u64 = 1 << 20;

struct Store {
    _dir: tempfile::TempDir,
    options: LoopOptions,
}

impl Store {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(dir.path()).unwrap().join("store");
        Self { _dir: dir, options: LoopOptions::new(path, BootId::random(), VmId::random()) }
    }

    fn open(&self) -> Arc<LoopCloud> {
        LoopCloud::open(self.options.clone()).unwrap()
    }

    fn host(&self) -> VmId {
        self.options.host
    }

    fn file(&self, volume: VolumeId, name: &str) -> PathBuf {
        self.options.dir.join("volumes").join(volume.to_string()).join(name)
    }

    fn meta(&self, volume: VolumeId) -> serde_json::Value {
        serde_json::from_slice(&fs::read(self.file(volume, "meta.json")).unwrap()).unwrap()
    }

    /// Writes metadata as a crash, or a hand, leaves it.
    fn edit(&self, volume: VolumeId, change: impl FnOnce(&mut serde_json::Value)) {
        let mut meta = self.meta(volume);
        change(&mut meta);
        let beside = self.file(volume, "edited");
        fs::write(&beside, serde_json::to_vec(&meta).unwrap()).unwrap();
        fs::rename(beside, self.file(volume, "meta.json")).unwrap();
    }

    fn bindings(&self, volume: VolumeId) -> Vec<Binding> {
        device::bindings(&self.options.dir, volume, &self.file(volume, "data.img")).unwrap()
    }

    /// The one device the volume is bound to.
    fn node(&self, volume: VolumeId) -> PathBuf {
        let bound = self.bindings(volume);
        assert_eq!(bound.len(), 1, "{bound:?}");
        assert!(bound[0].ours && !bound[0].ending && !bound[0].autoclear, "{bound:?}");
        PathBuf::from("/dev").join(bound[0].name())
    }

    /// Binds a file of the store as an operator would, without our tag.
    fn bind_by_hand(&self, volume: VolumeId) {
        let file = OpenOptions::new().read(true).write(true).open(self.file(volume, "data.img")).unwrap();
        let control = File::open("/dev/loop-control").unwrap();
        loop {
            let n = sys::loop_get_free(control.as_fd()).unwrap();
            let device = OpenOptions::new().read(true).write(true).open(format!("/dev/loop{n}")).unwrap();
            match sys::loop_configure(device.as_fd(), &file, 512, sys::LoopInfo64::zeroed()) {
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => continue,
                done => return done.unwrap(),
            }
        }
    }

    fn unbind_all(&self) {
        let below = format!("{}/", self.options.dir.display());
        for (n, path) in device::candidates(&self.options.dir).unwrap_or_default() {
            if path.starts_with(below.as_bytes())
                && let Ok(device) = File::open(format!("/dev/loop{n}"))
            {
                // Its backing file is below our own directory: it is ours to clear.
                let _ = sys::loop_clear(device.as_fd());
            }
        }
    }

    /// Runs one verb in a process of its own with failpoints set.
    fn child(&self, points: &str, verb: &str, volume: VolumeId) -> ExitStatus {
        let o = &self.options;
        let words = format!("{verb}|{}|{volume}|{}|{}", o.dir.display(), o.boot, o.host);
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "cloud::loopdev::tests::run_as_child", "--nocapture", "--quiet"])
            .env("VOLFS_FAILPOINTS", points)
            .env("VOLFS_LOOP_CHILD", words)
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap()
    }

    fn killed(&self, point: &str, verb: &str, volume: VolumeId) {
        let status = self.child(&format!("{point}=kill"), verb, volume);
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{point}: {status}");
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.unbind_all();
    }
}

fn label(epoch: u64) -> Label {
    Label {
        mark: Mark { record: RecordId(uuid::Uuid::from_u128(7)), epoch },
        job: JobId::parse("job").unwrap(),
        disk: DiskName::parse("disk").unwrap(),
    }
}

fn new(size: u64) -> NewVolume {
    NewVolume { size, name: "a name".into(), offering: None, zone: None, label: label(1) }
}

fn call_with(fence: Fence) -> Call {
    Call::new(fence, |_| ())
}

fn call() -> Call {
    call_with(Fence::random())
}

/// A creation whose volume has this id.
fn call_making(volume: VolumeId) -> Call {
    // The map is its own inverse.
    call_with(Fence(look::id_for(Fence(volume.0)).0))
}

fn why<T: std::fmt::Debug>(result: Result<T, CloudError>) -> Refusal {
    match result {
        Err(CloudError::Refused { why, words }) => {
            assert!(!words.is_empty());
            why
        }
        other => panic!("not refused: {other:?}"),
    }
}

fn unreachable<T: std::fmt::Debug>(result: Result<T, CloudError>) -> String {
    match result {
        Err(CloudError::Unreachable { words }) => words,
        other => panic!("not unreachable: {other:?}"),
    }
}

fn ambiguous<T: std::fmt::Debug>(result: Result<T, CloudError>) -> String {
    match result {
        Err(CloudError::Ambiguous { words }) => words,
        other => panic!("not ambiguous: {other:?}"),
    }
}

async fn made(cloud: &LoopCloud) -> VolumeId {
    cloud.create(&call(), &new(MIB)).await.unwrap().id
}

async fn at(cloud: &LoopCloud, volume: VolumeId) -> Option<VmId> {
    cloud.find(volume).await.unwrap().unwrap().attached.map(|a| a.vm)
}

/// Not a test of its own: what [`Store::child`] runs.
#[test]
fn run_as_child() {
    let Ok(words) = std::env::var("VOLFS_LOOP_CHILD") else { return };
    let words: Vec<&str> = words.split('|').collect();
    let volume = VolumeId::parse(words[2]).unwrap();
    let host = VmId::parse(words[4]).unwrap();
    let options = LoopOptions::new(words[1].into(), BootId::parse(words[3]).unwrap(), host);
    let cloud = LoopCloud::open(options).unwrap();
    let run = async {
        match words[0] {
            "create" => cloud.create(&call_making(volume), &new(MIB)).await.map(drop),
            "attach" => cloud.attach(&call(), volume, host, None).await,
            "detach" => cloud.detach(&call(), volume, host, false).await,
            "resize" => cloud.resize(&call(), volume, 2 * MIB).await.map(drop),
            "delete" => cloud.delete(&call(), volume, false).await.map(drop),
            "snapshot" => cloud.snapshot(&call(), volume, &snapshots::named("s")).await.map(drop),
            "revert" => cloud.revert(&call(), volume, snapshots::only(&cloud, volume).await).await,
            "delete-snapshot" => cloud.delete_snapshot(&call(), volume, snapshots::only(&cloud, volume).await).await,
            "mark" => cloud.exchange_mark(&call(), volume, Some(label(1).mark), Some(&label(2))).await,
            other => panic!("{other}"),
        }
    };
    let outcome = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(run);
    let code = match outcome {
        Ok(()) => 0,
        Err(CloudError::Refused { .. }) => 10,
        Err(CloudError::Unreachable { .. }) => 11,
        Err(CloudError::Ambiguous { .. }) => 12,
    };
    std::process::exit(code);
}

#[tokio::test]
async fn a_volume_is_never_smaller_than_asked_and_carries_its_mark_from_the_start() {
    let store = Store::new();
    let cloud = store.open();
    let asked = NewVolume { size: 1000, ..new(0) };
    let fence = Fence::random();
    let volume = cloud.create(&call_with(fence), &asked).await.unwrap();
    assert_eq!((volume.size, volume.mark, volume.attached), (1024, Some(label(1).mark), None));
    assert_eq!((volume.name.as_str(), volume.state.as_str(), &volume.carries_host), ("a name", "Allocated", &None));
    assert_eq!(fs::metadata(store.file(volume.id, "data.img")).unwrap().len(), 1024);
    assert_eq!(cloud.find(volume.id).await.unwrap().as_ref(), Some(&volume));
    assert_eq!(cloud.find_created(fence).await.unwrap().as_ref(), Some(&volume));
    assert_eq!(cloud.find_created(Fence::random()).await.unwrap(), None);
    assert_eq!(cloud.find(VolumeId::random()).await.unwrap(), None);
    assert_eq!(why(cloud.create(&call(), &new(0)).await), Refusal::Other);
    assert_eq!(
        why(cloud.create(&call(), &NewVolume { zone: Some("z".into()), ..new(512) }).await),
        Refusal::Unsupported
    );
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&store.options.dir).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_fence_makes_one_volume_however_often_and_at_once() {
    let store = Store::new();
    let cloud = store.open();
    let (call, asked) = (call(), new(MIB));
    let tasks: Vec<_> = (0..16)
        .map(|_| {
            let (cloud, call, asked) = (cloud.clone(), call.clone(), asked.clone());
            tokio::spawn(async move { cloud.create(&call, &asked).await.unwrap().id })
        })
        .collect();
    let ids: HashSet<VolumeId> = futures_util::future::join_all(tasks).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(ids.len(), 1);
    let names: Vec<_> = fs::read_dir(store.options.dir.join("volumes")).unwrap().collect();
    assert_eq!(names.len(), 1, "{names:?}");
}

#[tokio::test]
async fn attach_and_detach_here_are_real_and_repeatable() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    for _ in 0..2 {
        cloud.attach(&call(), v, store.host(), None).await.unwrap();
        let node = store.node(v);
        assert_eq!(sys::disk_size(File::open(&node).unwrap().as_fd()).unwrap(), MIB);
        let found = cloud.find(v).await.unwrap().unwrap();
        let attached = found.attached.unwrap();
        assert_eq!((attached.vm, attached.device_id, found.state.as_str()), (store.host(), Some(1), "Ready"));
    }
    for _ in 0..2 {
        cloud.detach(&call(), v, store.host(), false).await.unwrap();
        assert_eq!(store.bindings(v), []);
        assert_eq!(at(&cloud, v).await, None);
    }
    assert_eq!(why(cloud.detach(&call(), v, store.host(), true).await), Refusal::Unsupported);
    assert_eq!(why(cloud.attach(&call(), VolumeId::random(), store.host(), None).await), Refusal::NoVolume);
}

#[tokio::test]
async fn what_was_written_just_before_a_detach_is_in_the_file() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    cloud.attach(&call(), v, store.host(), None).await.unwrap();
    let node = store.node(v);
    let binding = store.bindings(v).remove(0);
    // Between our flush and our question somebody writes and closes: as we have it open, that close
    // is not the last one and flushes nothing.
    let unbound = device::unbind(&binding, &store.file(v, "data.img"), |point| {
        if point == "loop.detach.flushed" {
            OpenOptions::new().write(true).open(&node).unwrap().write_all(&[0x58; 65536]).unwrap();
        }
    });
    assert!(matches!(unbound, Ok(device::Unbound::Gone)), "{unbound:?}");
    let mut bytes = vec![0; 65536];
    File::open(store.file(v, "data.img")).unwrap().read_exact(&mut bytes).unwrap();
    assert!(bytes.iter().all(|b| *b == 0x58));
}

struct Tmpfs(PathBuf);

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[tokio::test]
async fn on_a_full_filesystem_detach_and_release_still_work() {
    // Dropped in the reverse order: the store unbinds its devices before its filesystem goes.
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().canonicalize().unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", &point, "tmpfs", flags, Some(c"size=4m")).unwrap();
    let _mounted = Tmpfs(point.clone());
    let mut store = Store::new();
    store.options.dir = point.join("store");
    let cloud = store.open();
    let (a, b) = (made(&cloud).await, made(&cloud).await);
    cloud.attach(&call(), a, store.host(), None).await.unwrap();
    let mut filler = File::create(point.join("filler")).unwrap();
    let full = std::iter::repeat_with(|| filler.write_all(&[1; 4096])).find_map(Result::err).unwrap();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(why(cloud.attach(&call(), b, store.host(), None).await), Refusal::Capacity);
    assert_eq!(why(cloud.create(&call(), &new(MIB)).await), Refusal::Capacity);
    assert_eq!((at(&cloud, b).await, store.bindings(b)), (None, vec![]));
    cloud.detach(&call(), a, store.host(), false).await.unwrap();
    cloud.exchange_mark(&call(), a, Some(label(1).mark), None).await.unwrap();
    let found = cloud.find(a).await.unwrap().unwrap();
    assert_eq!((found.attached, found.mark), (None, None));
    assert_eq!(store.bindings(a), []);
    fs::remove_file(point.join("filler")).unwrap();
    cloud.delete(&call(), a, true).await.unwrap();
    assert_eq!(fs::metadata(store.options.dir.join("reserve")).unwrap().len(), 256 * 1024);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_attaches_at_once_get_devices_and_numbers_of_their_own() {
    let store = Store::new();
    let cloud = store.open();
    let mut ids = Vec::new();
    for _ in 0..64 {
        ids.push(made(&cloud).await);
    }
    let all = |verb: &'static str| {
        let tasks: Vec<_> = ids
            .iter()
            .map(|v| {
                let (cloud, v, host) = (cloud.clone(), *v, store.host());
                tokio::spawn(async move {
                    match verb {
                        "attach" => cloud.attach(&call(), v, host, None).await,
                        _ => cloud.detach(&call(), v, host, false).await,
                    }
                })
            })
            .collect();
        futures_util::future::join_all(tasks)
    };
    assert!(all("attach").await.into_iter().all(|r| r.unwrap().is_ok()));
    let nodes: HashSet<PathBuf> = ids.iter().map(|v| store.node(*v)).collect();
    assert_eq!(nodes.len(), 64);
    let asked = Survey { vms: vec![store.host()], ..Survey::default() };
    let mut numbers: Vec<u32> =
        cloud.survey(&asked).await.unwrap().iter().map(|v| v.attached.unwrap().device_id.unwrap()).collect();
    numbers.sort();
    let expected: Vec<u32> = (1..=65).filter(|n| *n != 3).collect();
    assert_eq!(numbers, expected);
    assert!(all("detach").await.into_iter().all(|r| r.unwrap().is_ok()));
    assert!(ids.iter().all(|v| store.bindings(*v).is_empty()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_volume_attached_many_times_at_once_is_bound_once() {
    let store = Store::new();
    let cloud = store.open();
    let second_daemon = store.open();
    let v = made(&cloud).await;
    let tasks: Vec<_> = (0..16)
        .map(|n| {
            let (cloud, host) = (if n % 2 == 0 { cloud.clone() } else { second_daemon.clone() }, store.host());
            tokio::spawn(async move { cloud.attach(&call(), v, host, None).await })
        })
        .collect();
    assert!(futures_util::future::join_all(tasks).await.into_iter().all(|r| r.unwrap().is_ok()));
    store.node(v);
}

#[tokio::test]
async fn a_file_bound_by_hand_is_neither_bound_again_nor_unbound_nor_deleted() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    store.bind_by_hand(v);
    assert_eq!(why(cloud.attach(&call(), v, store.host(), None).await), Refusal::Conflict);
    assert_eq!(why(cloud.attach(&call(), v, VmId::random(), None).await), Refusal::Conflict);
    assert_eq!(why(cloud.detach(&call(), v, store.host(), false).await), Refusal::Conflict);
    assert_eq!(why(cloud.delete(&call(), v, false).await), Refusal::Conflict);
    assert_eq!(store.bindings(v).len(), 1);
    assert_eq!(at(&cloud, v).await, None);
}

#[tokio::test]
async fn detach_of_a_device_somebody_has_open_changes_nothing() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    cloud.attach(&call(), v, store.host(), None).await.unwrap();
    let before = store.meta(v);
    let node = store.node(v);
    let mut user = OpenOptions::new().read(true).write(true).open(&node).unwrap();
    assert_eq!(why(cloud.detach(&call(), v, store.host(), false).await), Refusal::InUse);
    assert_eq!((store.meta(v), store.node(v)), (before, node.clone()));
    user.write_all(&[1; 4096]).unwrap();
    user.sync_all().unwrap();
    // With AUTOCLEAR left on, this close would unbind it.
    drop(user);
    assert_eq!(store.node(v), node);
    assert_eq!(at(&cloud, v).await, Some(store.host()));
    cloud.detach(&call(), v, store.host(), false).await.unwrap();
    assert_eq!(store.bindings(v), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn detach_outlasts_somebody_who_opened_it_in_passing() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    cloud.attach(&call(), v, store.host(), None).await.unwrap();
    let user = File::open(store.node(v)).unwrap();
    let task = {
        let (cloud, host) = (cloud.clone(), store.host());
        tokio::spawn(async move { cloud.detach(&call(), v, host, false).await })
    };
    // The detach has begun its test when it has asked for the clearing.
    while !store.bindings(v).iter().any(|b| b.autoclear) {
        tokio::task::yield_now().await;
    }
    drop(user);
    task.await.unwrap().unwrap();
    assert_eq!(store.bindings(v), []);
}

#[tokio::test]
async fn slots_are_lowest_free_or_as_asked() {
    let store = Store::new();
    let cloud = store.open();
    let (a, b, c) = (made(&cloud).await, made(&cloud).await, made(&cloud).await);
    let vm = VmId::random();
    cloud.attach(&call(), a, vm, Some(Slot::Id(1))).await.unwrap();
    cloud.attach(&call(), a, vm, Some(Slot::Id(1))).await.unwrap();
    assert_eq!(why(cloud.attach(&call(), a, vm, Some(Slot::Id(2))).await), Refusal::Conflict);
    assert_eq!(why(cloud.attach(&call(), b, vm, Some(Slot::Id(1))).await), Refusal::Conflict);
    assert_eq!(why(cloud.attach(&call(), b, vm, Some(Slot::Id(3))).await), Refusal::Other);
    cloud.attach(&call(), b, vm, Some(Slot::Id(2))).await.unwrap();
    cloud.attach(&call(), c, vm, None).await.unwrap();
    assert_eq!(cloud.find(c).await.unwrap().unwrap().attached.unwrap().device_id, Some(4));
    assert_eq!(why(cloud.attach(&call(), c, VmId::random(), None).await), Refusal::Conflict);
    assert_eq!(why(cloud.attach(&call(), c, store.host(), None).await), Refusal::Conflict);
    cloud.detach(&call(), c, VmId::random(), false).await.unwrap();
    assert_eq!(at(&cloud, c).await, Some(vm));
    cloud.detach(&call(), c, vm, true).await.unwrap();
    assert_eq!(at(&cloud, c).await, None);
}

#[tokio::test]
async fn the_root_disk_goes_only_to_a_stopped_vm_that_has_none() {
    let store = Store::new();
    let cloud = store.open();
    let (a, b) = (made(&cloud).await, made(&cloud).await);
    let vm = VmId::random();
    assert_eq!(cloud.vm(store.host()).await.unwrap(), Some(VmFacts { running: true, has_root: true }));
    assert_eq!(cloud.vm(vm).await.unwrap(), Some(VmFacts { running: false, has_root: false }));
    assert_eq!(why(cloud.attach(&call(), a, store.host(), Some(Slot::Root)).await), Refusal::Conflict);
    let file = store.options.dir.join("vms").join(format!("{vm}.json"));
    fs::write(&file, r#"{"running":true,"note":"kept"}"#).unwrap();
    assert_eq!(why(cloud.attach(&call(), a, vm, Some(Slot::Root)).await), Refusal::Conflict);
    fs::write(&file, r#"{"running":false}"#).unwrap();
    cloud.attach(&call(), a, vm, Some(Slot::Root)).await.unwrap();
    assert_eq!(cloud.vm(vm).await.unwrap(), Some(VmFacts { running: false, has_root: true }));
    assert_eq!(why(cloud.attach(&call(), b, vm, Some(Slot::Root)).await), Refusal::Conflict);
    fs::write(&file, "nonsense").unwrap();
    assert!(ambiguous(cloud.vm(vm).await).contains(&vm.to_string()));
    let other = VmId::random();
    cloud.attach(&call(), b, other, None).await.unwrap();
    assert!(store.options.dir.join("vms").join(format!("{other}.json")).exists());
}

#[tokio::test]
async fn no_more_disks_here_than_the_host_takes() {
    let mut store = Store::new();
    store.options.most_disks = 1;
    let cloud = store.open();
    let (a, b) = (made(&cloud).await, made(&cloud).await);
    cloud.attach(&call(), a, store.host(), None).await.unwrap();
    assert_eq!(why(cloud.attach(&call(), b, store.host(), None).await), Refusal::Other);
    assert_eq!(store.bindings(b), []);
    cloud.detach(&call(), a, store.host(), false).await.unwrap();
    cloud.attach(&call(), b, store.host(), None).await.unwrap();
}

#[tokio::test]
async fn a_reboot_detaches_here_and_nowhere_else() {
    let mut store = Store::new();
    let cloud = store.open();
    let (a, b, vm) = (made(&cloud).await, made(&cloud).await, VmId::random());
    cloud.attach(&call(), a, store.host(), None).await.unwrap();
    cloud.attach(&call(), b, vm, None).await.unwrap();
    store.unbind_all();
    // Told as attached: that the kernel has lost the device is another one's business.
    assert_eq!(at(&cloud, a).await, Some(store.host()));
    store.options.boot = BootId::random();
    let cloud = store.open();
    assert_eq!((at(&cloud, a).await, at(&cloud, b).await), (None, Some(vm)));
    cloud.detach(&call(), a, store.host(), false).await.unwrap();
    assert_eq!(store.meta(a)["attached"], serde_json::Value::Null);
    cloud.attach(&call(), a, store.host(), None).await.unwrap();
    store.node(a);
}

#[tokio::test]
async fn a_lost_device_comes_back_by_attach_and_is_forgotten_by_detach() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    cloud.attach(&call(), v, store.host(), None).await.unwrap();
    store.unbind_all();
    cloud.attach(&call(), v, store.host(), None).await.unwrap();
    store.node(v);
    store.unbind_all();
    cloud.detach(&call(), v, store.host(), false).await.unwrap();
    assert_eq!(at(&cloud, v).await, None);
}

#[tokio::test]
async fn growing_reaches_the_device_and_shrinking_is_refused() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    cloud.attach(&call(), v, store.host(), None).await.unwrap();
    for _ in 0..2 {
        assert_eq!(cloud.resize(&call(), v, 2 * MIB - 1).await.unwrap(), 2 * MIB);
        assert_eq!(sys::disk_size(File::open(store.node(v)).unwrap().as_fd()).unwrap(), 2 * MIB);
    }
    assert_eq!(why(cloud.resize(&call(), v, MIB).await), Refusal::Other);
    // Half done: the file has grown, the device has not.
    OpenOptions::new().write(true).open(store.file(v, "data.img")).unwrap().set_len(3 * MIB).unwrap();
    assert_eq!(cloud.resize(&call(), v, 3 * MIB).await.unwrap(), 3 * MIB);
    assert_eq!(sys::disk_size(File::open(store.node(v)).unwrap().as_fd()).unwrap(), 3 * MIB);
    assert_eq!(cloud.find(v).await.unwrap().unwrap().size, 3 * MIB);
}

#[tokio::test]
async fn capacity_counts_every_volume_and_the_trash() {
    let mut store = Store::new();
    store.options.capacity = Some(3 * MIB);
    let cloud = store.open();
    let a = made(&cloud).await;
    made(&cloud).await;
    assert_eq!(why(cloud.create(&call(), &new(2 * MIB)).await), Refusal::Capacity);
    assert_eq!(why(cloud.resize(&call(), a, 3 * MIB).await), Refusal::Capacity);
    assert_eq!(cloud.find(a).await.unwrap().unwrap().size, MIB);
    cloud.delete(&call(), a, false).await.unwrap();
    assert_eq!(why(cloud.create(&call(), &new(2 * MIB)).await), Refusal::Capacity);
    cloud.delete(&call(), a, true).await.unwrap();
    cloud.create(&call(), &new(2 * MIB)).await.unwrap();
    assert_eq!(why(cloud.create(&call(), &new(1 << 60)).await), Refusal::Capacity);
    let names: Vec<_> =
        fs::read_dir(store.options.dir.join("volumes")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[tokio::test]
async fn a_volume_larger_than_the_filesystem_has_free_is_refused() {
    let store = Store::new();
    let cloud = store.open();
    assert_eq!(why(cloud.create(&call(), &new(1 << 60)).await), Refusal::Capacity);
    assert_eq!(why(cloud.create(&call(), &new(u64::MAX)).await), Refusal::Capacity);
    let v = made(&cloud).await;
    assert_eq!(why(cloud.resize(&call(), v, 1 << 60).await), Refusal::Capacity);
    assert_eq!(store.meta(v)["intent"], serde_json::Value::Null);
}

#[tokio::test]
async fn a_mark_changes_only_from_the_one_expected() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    let (one, two) = (label(1), label(2));
    assert_eq!(why(cloud.exchange_mark(&call(), v, None, Some(&two)).await), Refusal::Mark(Some(one.mark)));
    for _ in 0..2 {
        cloud.exchange_mark(&call(), v, Some(one.mark), Some(&two)).await.unwrap();
    }
    assert_eq!(cloud.find(v).await.unwrap().unwrap().mark, Some(two.mark));
    let renamed = Label { disk: DiskName::parse("other").unwrap(), ..label(2) };
    cloud.exchange_mark(&call(), v, Some(two.mark), Some(&renamed)).await.unwrap();
    assert_eq!(store.meta(v)["disk"], "other");
    for _ in 0..2 {
        cloud.exchange_mark(&call(), v, Some(two.mark), None).await.unwrap();
    }
    assert_eq!(why(cloud.exchange_mark(&call(), v, Some(two.mark), Some(&one)).await), Refusal::Mark(None));
    cloud.exchange_mark(&call(), v, None, Some(&one)).await.unwrap();
    assert_eq!(store.meta(v)["mark"], one.mark.to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_who_claim_one_volume_one_gets_it() {
    let store = Store::new();
    let (cloud, second_daemon) = (store.open(), store.open());
    let v = made(&cloud).await;
    cloud.exchange_mark(&call(), v, Some(label(1).mark), None).await.unwrap();
    let tasks: Vec<_> = (10..26)
        .map(|epoch| {
            let cloud = if epoch % 2 == 0 { cloud.clone() } else { second_daemon.clone() };
            tokio::spawn(async move { cloud.exchange_mark(&call(), v, None, Some(&label(epoch))).await.is_ok() })
        })
        .collect();
    let won = futures_util::future::join_all(tasks).await.into_iter().filter(|r| *r.as_ref().unwrap()).count();
    assert_eq!(won, 1);
}

#[tokio::test]
async fn a_deleted_volume_is_kept_for_a_while_and_expunge_is_for_good() {
    let mut store = Store::new();
    let cloud = store.open();
    let (a, b) = (made(&cloud).await, made(&cloud).await);
    cloud.attach(&call(), a, store.host(), None).await.unwrap();
    assert_eq!(why(cloud.delete(&call(), a, true).await), Refusal::Conflict);
    cloud.detach(&call(), a, store.host(), false).await.unwrap();
    cloud.attach(&call(), a, VmId::random(), None).await.unwrap();
    assert_eq!(why(cloud.delete(&call(), a, false).await), Refusal::Conflict);
    store.edit(a, |m| m["attached"] = serde_json::Value::Null);
    let earliest = Timestamp::from(std::time::SystemTime::now()).plus(store.options.trash_keep);
    let until = cloud.delete(&call(), a, false).await.unwrap().unwrap();
    assert!(until >= earliest);
    assert_eq!(cloud.delete(&call(), a, false).await.unwrap(), Some(until));
    assert_eq!(cloud.find(a).await.unwrap(), None);
    let trash = || fs::read_dir(store.options.dir.join("trash")).unwrap().count();
    assert_eq!(trash(), 1);
    assert_eq!(cloud.delete(&call(), b, true).await.unwrap(), None);
    assert_eq!(trash(), 1);
    assert_eq!(cloud.delete(&call(), a, true).await.unwrap(), None);
    assert_eq!(trash(), 0);
    assert_eq!(cloud.delete(&call(), VolumeId::random(), false).await.unwrap(), None);
    let c = made(&cloud).await;
    cloud.delete(&call(), c, false).await.unwrap();
    assert_eq!(trash(), 1);
    let kept = store.options.dir.join("trash/not-ours");
    fs::create_dir(&kept).unwrap();
    store.options.trash_keep = Duration::ZERO;
    store.open();
    assert_eq!(fs::read_dir(store.options.dir.join("trash")).unwrap().count(), 1);
    assert!(kept.exists());
}

#[tokio::test]
async fn a_protected_volume_says_so_and_is_not_deleted() {
    let mut store = Store::new();
    let v = made(&store.open()).await;
    store.options.protect.push(v);
    let cloud = store.open();
    assert!(cloud.find(v).await.unwrap().unwrap().carries_host.unwrap().contains("protected"));
    assert_eq!(why(cloud.delete(&call(), v, false).await), Refusal::Conflict);
}
