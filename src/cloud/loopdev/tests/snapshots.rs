//! Snapshots as copies of files: what they hold, what a crash or a full disk leaves of them.

use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;
use crate::cloud::CloudSnapshot;
use crate::model::{SnapshotId, SnapshotName};

pub fn named(name: &str) -> SnapshotName {
    SnapshotName::parse(name).unwrap()
}

pub async fn only(cloud: &LoopCloud, volume: VolumeId) -> SnapshotId {
    let all = cloud.snapshots(volume).await.unwrap();
    assert_eq!(all.len(), 1, "{all:?}");
    all[0].id
}

async fn take(cloud: &LoopCloud, volume: VolumeId, name: &str) -> CloudSnapshot {
    cloud.snapshot(&call(), volume, &named(name)).await.unwrap()
}

fn write(store: &Store, volume: VolumeId, bytes: &[u8], at: u64) {
    let file = OpenOptions::new().write(true).open(store.file(volume, "data.img")).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

fn bytes(store: &Store, volume: VolumeId) -> Vec<u8> {
    fs::read(store.file(volume, "data.img")).unwrap()
}

/// The names in a volume's `snapshots`, those of a crash included.
fn names(store: &Store, volume: VolumeId) -> Vec<String> {
    let Ok(entries) = fs::read_dir(store.file(volume, "snapshots")) else { return Vec::new() };
    entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn a_snapshot_holds_the_bytes_and_the_holes_of_its_moment_and_a_revert_brings_them_back() {
    let store = Store::new();
    let cloud = store.open();
    let v = cloud.create(&call(), &new(64 * MIB)).await.unwrap().id;
    for at in [0, 5 * MIB + 7, 64 * MIB - 4] {
        write(&store, v, b"then", at);
    }
    let was = bytes(&store, v);
    let taken = take(&cloud, v, "s").await;
    assert_eq!((taken.name.as_str(), taken.state.as_str(), taken.ready, taken.size), ("s", "Ready", true, 64 * MIB));
    assert!(taken.created.is_some());
    let file = store.file(v, "snapshots").join(taken.id.to_string()).join("data.img");
    assert_eq!(fs::read(&file).unwrap(), was);
    assert!(fs::metadata(&file).unwrap().blocks() * 512 < 2 * MIB, "holes stay holes");
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600);

    write(&store, v, b"now", 0);
    write(&store, v, b"where a hole was", 32 * MIB);
    cloud.resize(&call(), v, 65 * MIB).await.unwrap();
    let later = bytes(&store, v);
    let larger = take(&cloud, v, "larger").await;
    cloud.exchange_mark(&call(), v, Some(label(1).mark), Some(&label(9))).await.unwrap();
    for (snapshot, expected) in [(&taken, &was), (&larger, &later), (&taken, &was)] {
        cloud.revert(&call(), v, snapshot.id).await.unwrap();
        assert!(bytes(&store, v) == *expected, "{}", snapshot.name);
        let found = cloud.find(v).await.unwrap().unwrap();
        assert_eq!((found.size, found.mark), (expected.len() as u64, Some(label(9).mark)), "{}", snapshot.name);
        assert_eq!(store.meta(v)["size"], expected.len(), "{}", snapshot.name);
        // Its files are its own: what is written now changes no snapshot.
        write(&store, v, b"written after the revert", 0);
    }
    cloud.resize(&call(), v, 65 * MIB).await.unwrap();
    assert!(bytes(&store, v)[(64 * MIB) as usize..].iter().all(|b| *b == 0), "growth shows nothing of before");
    // As a disk of this host.
    cloud.revert(&call(), v, taken.id).await.unwrap();
    cloud.attach(&call(), v, store.host(), None).await.unwrap();
    assert_eq!(why(cloud.revert(&call(), v, taken.id).await), Refusal::Conflict);
    let mut head = [0; 4];
    File::open(store.node(v)).unwrap().read_exact(&mut head).unwrap();
    assert_eq!(&head, b"then");
}

#[tokio::test]
async fn the_same_call_takes_one_and_a_repeated_one_of_each_verb_is_success() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    let call = call();
    assert_eq!(cloud.find_snapshot(v, call.fence()).await.unwrap(), None);
    let taken = cloud.snapshot(&call, v, &named("s")).await.unwrap();
    write(&store, v, b"later", 0);
    assert_eq!(cloud.snapshot(&call, v, &named("s")).await.unwrap(), taken);
    assert_eq!(cloud.find_snapshot(v, call.fence()).await.unwrap().as_ref(), Some(&taken));
    assert_eq!(cloud.snapshots(v).await.unwrap(), std::slice::from_ref(&taken));
    for _ in 0..2 {
        cloud.revert(&call, v, taken.id).await.unwrap();
        assert!(bytes(&store, v).iter().all(|b| *b == 0));
    }
    for _ in 0..2 {
        cloud.delete_snapshot(&call, v, taken.id).await.unwrap();
        assert_eq!((cloud.snapshots(v).await.unwrap(), names(&store, v)), (vec![], vec![]));
    }
    assert_eq!(why(cloud.revert(&call, v, taken.id).await), Refusal::Other);
    let nobody = VolumeId::random();
    assert_eq!(why(cloud.snapshot(&call, nobody, &named("s")).await), Refusal::NoVolume);
    assert_eq!(why(cloud.revert(&call, nobody, taken.id).await), Refusal::NoVolume);
    assert_eq!(cloud.snapshots(nobody).await.unwrap(), []);
    cloud.delete_snapshot(&call, nobody, taken.id).await.unwrap();
}

#[tokio::test]
async fn a_volume_with_snapshots_is_not_deleted_and_its_files_stay() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    let taken = take(&cloud, v, "theirs").await;
    for expunge in [false, true] {
        let refused = cloud.delete(&call(), v, expunge).await;
        assert!(refused.as_ref().unwrap_err().to_string().contains(&format!("theirs ({})", taken.id)));
        assert_eq!(why(refused), Refusal::Conflict);
    }
    assert_eq!(cloud.snapshots(v).await.unwrap(), std::slice::from_ref(&taken));
    cloud.delete_snapshot(&call(), v, taken.id).await.unwrap();
    cloud.delete(&call(), v, true).await.unwrap();
    assert_eq!(cloud.find(v).await.unwrap(), None);
}

#[tokio::test]
async fn a_damaged_snapshot_is_shown_as_one_and_hides_no_other() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    write(&store, v, b"before", 0);
    let (good, bad) = (take(&cloud, v, "good").await, take(&cloud, v, "bad").await);
    let file = |name: &str| store.file(v, "snapshots").join(bad.id.to_string()).join(name);
    let damage: [&dyn Fn(); 3] = [
        &|| OpenOptions::new().write(true).open(file("data.img")).unwrap().set_len(512).unwrap(),
        &|| fs::write(file("meta.json"), "{").unwrap(),
        &|| fs::remove_file(file("meta.json")).unwrap(),
    ];
    for spoil in damage {
        spoil();
        let all = cloud.snapshots(v).await.unwrap();
        assert_eq!(all.len(), 2);
        assert!(all.contains(&good));
        assert!(all.iter().any(|s| s.id == bad.id && !s.ready && s.state == "Damaged"), "{all:?}");
        assert_eq!(why(cloud.revert(&call(), v, bad.id).await), Refusal::Other);
        assert!(bytes(&store, v).starts_with(b"before"));
    }
    // What somebody else has put there is not ours to remove.
    fs::write(store.file(v, "snapshots").join("README"), "theirs").unwrap();
    cloud.delete_snapshot(&call(), v, bad.id).await.unwrap();
    store.open();
    assert_eq!(cloud.snapshots(v).await.unwrap(), [good]);
    assert_eq!(names(&store, v).len(), 2);
}

#[tokio::test]
async fn what_is_written_to_while_it_is_copied_is_taken_of_one_moment_or_refused() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    cloud.attach(&call(), v, store.host(), None).await.unwrap();
    let node = OpenOptions::new().write(true).open(store.node(v)).unwrap();
    let to = store.options.dir.join("copy");
    let copy = |tries_with_writes: u32| {
        File::create(&to).unwrap().set_len(MIB).unwrap();
        let was = bytes(&store, v);
        let mut tries = 0;
        let result = cloud.inner.copy_still(v, &to, MIB, || {
            tries += 1;
            if tries <= tries_with_writes {
                node.write_all_at(&[tries as u8; 4096], 0).unwrap();
                node.sync_all().unwrap();
            }
        });
        (result, was, tries)
    };
    let other = File::create(store.options.dir.join("other")).unwrap();
    let clones = rustix::fs::ioctl_ficlone(&other, File::open(store.file(v, "data.img")).unwrap()).is_ok();
    let (result, was, tries) = copy(100);
    match clones {
        // A clone is of one moment, whoever writes.
        true => assert!(result.is_ok() && tries == 1 && fs::read(&to).unwrap() == was),
        false => assert_eq!(why(result), Refusal::InUse),
    }
    let (result, was, tries) = copy(1);
    result.unwrap();
    let expected = if clones { was } else { bytes(&store, v) };
    assert!(fs::read(&to).unwrap() == expected && tries == if clones { 1 } else { 2 });
    drop(node);
    cloud.detach(&call(), v, store.host(), false).await.unwrap();
}

#[tokio::test]
async fn crash_of_a_snapshots_work_at_every_step_leaves_all_or_nothing_of_it() {
    for (point, verb, done) in [
        ("loop.snapshot.before", "snapshot", false),
        ("loop.snapshot.copied", "snapshot", false),
        ("loop.snapshot.built", "snapshot", false),
        ("loop.snapshot.after", "snapshot", true),
        ("loop.revert.before", "revert", false),
        ("loop.revert.copied", "revert", false),
        ("loop.revert.promised", "revert", false),
        ("loop.revert.replaced", "revert", true),
        ("loop.revert.after", "revert", true),
        ("loop.delete-snapshot.before", "delete-snapshot", false),
        ("loop.delete-snapshot.renamed", "delete-snapshot", true),
        ("loop.delete-snapshot.after", "delete-snapshot", true),
    ] {
        // The volume has grown since, or was larger then.
        for grows in [true, false] {
            let store = Store::new();
            let cloud = store.open();
            let v = made(&cloud).await;
            write(&store, v, b"before", 0);
            if verb != "snapshot" {
                if grows {
                    take(&cloud, v, "s").await;
                    cloud.resize(&call(), v, 2 * MIB).await.unwrap();
                } else {
                    let small = take(&cloud, v, "small").await.id;
                    cloud.resize(&call(), v, 2 * MIB).await.unwrap();
                    take(&cloud, v, "s").await;
                    cloud.revert(&call(), v, small).await.unwrap();
                    cloud.delete_snapshot(&call(), v, small).await.unwrap();
                }
                write(&store, v, b"later!", 0);
            }
            let length = bytes(&store, v).len() as u64;
            store.killed(point, verb, v);
            let cloud = store.open();
            assert!(names(&store, v).iter().all(|name| !name.starts_with('.')), "{point}: {:?}", names(&store, v));
            let there = if verb == "snapshot" { done } else { verb == "revert" || !done };
            assert_eq!(cloud.snapshots(v).await.unwrap().len(), usize::from(there), "{point}");
            let (size, content) = match (verb, done) {
                ("revert", true) => (if grows { MIB } else { 2 * MIB }, b"before"),
                ("snapshot", _) => (MIB, b"before"),
                _ => (length, b"later!"),
            };
            let found = cloud.find(v).await.unwrap().unwrap();
            assert_eq!((found.size, found.attached, found.mark), (size, None, Some(label(1).mark)), "{point}");
            assert!(bytes(&store, v).starts_with(content), "{point}");
            // And the next one does all of it.
            match verb {
                "snapshot" => drop(take(&cloud, v, "again").await),
                "revert" => cloud.revert(&call(), v, only(&cloud, v).await).await.unwrap(),
                _ if there => cloud.delete_snapshot(&call(), v, only(&cloud, v).await).await.unwrap(),
                _ => {}
            }
            cloud.attach(&call(), v, store.host(), None).await.unwrap();
            cloud.detach(&call(), v, store.host(), false).await.unwrap();
        }
    }
}

#[tokio::test]
async fn on_a_full_filesystem_a_snapshot_and_a_revert_are_refused_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().canonicalize().unwrap();
    rustix::mount::mount("tmpfs", &point, "tmpfs", rustix::mount::MountFlags::empty(), Some(c"size=8m")).unwrap();
    let _mounted = Tmpfs(point.clone());
    let mut store = Store::new();
    store.options.dir = point.join("store");
    let cloud = store.open();
    let v = made(&cloud).await;
    write(&store, v, &vec![1; MIB as usize], 0);
    let taken = take(&cloud, v, "s").await;
    write(&store, v, &vec![2; MIB as usize], 0);
    let mut filler = File::create(point.join("filler")).unwrap();
    std::iter::repeat_with(|| filler.write_all(&[1; 4096])).find_map(Result::err).unwrap();
    assert_eq!(why(cloud.snapshot(&call(), v, &named("t")).await), Refusal::Capacity);
    assert_eq!(why(cloud.revert(&call(), v, taken.id).await), Refusal::Capacity);
    assert_eq!(names(&store, v), [taken.id.to_string()]);
    assert!(bytes(&store, v) == vec![2; MIB as usize]);
    // Deleting gives back.
    cloud.delete_snapshot(&call(), v, taken.id).await.unwrap();
    take(&cloud, v, "t").await;
}

#[tokio::test]
async fn snapshots_count_as_capacity() {
    let mut store = Store::new();
    store.options.capacity = Some(3 * MIB);
    let cloud = store.open();
    let v = made(&cloud).await;
    let first = take(&cloud, v, "a").await;
    take(&cloud, v, "b").await;
    assert_eq!(why(cloud.snapshot(&call(), v, &named("c")).await), Refusal::Capacity);
    assert_eq!(why(cloud.create(&call(), &new(512)).await), Refusal::Capacity);
    // Going back needs no more than it ends with.
    cloud.revert(&call(), v, first.id).await.unwrap();
    cloud.delete_snapshot(&call(), v, first.id).await.unwrap();
    made(&cloud).await;
}
