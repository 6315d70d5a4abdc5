//! Devices of the host VM as loop devices of this machine.

use fakecloud::loops::loops_tagged;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use fakecloud::{DeviceFault, FakeCloud, Identity, Options};

use crate::client::{PATIENCE, attach, create, done};

/// Whether this machine lets us make loop devices; says so when it does not.
pub fn have_loops() -> bool {
    let root = rustix::process::geteuid().is_root();
    let there = root && std::fs::exists("/dev/loop-control").unwrap_or(false);
    if !there {
        eprintln!("skipped: {}: no loop devices for us here", std::thread::current().name().unwrap_or_default());
    }
    there
}

fn tagged(id: &str) -> Vec<String> {
    loops_tagged(&format!("volfs:{id}")).unwrap()
}

/// Waits until no device carries the id: whoever looks at all devices, as other tests do, keeps one
/// for a moment.
#[track_caller]
fn gone(id: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !tagged(id).is_empty() {
        assert!(Instant::now() < deadline, "the device of {id} is still there");
        // Bounded pacing of the look, not a wait.
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn an_attached_volume_is_a_loop_device_until_it_is_detached_and_the_cloud_leaves_none() {
    if !have_loops() {
        return;
    }
    let cloud = FakeCloud::start(Options::with_loops()).unwrap();
    let root = cloud.volumes()[0].id.clone();
    assert_eq!(tagged(&root).len(), 1, "the host's own disk is there from the start");
    let id = create(&cloud, "one", "1");
    assert!(tagged(&id).is_empty());
    attach(&cloud, &id);
    let names = tagged(&id);
    assert_eq!(names.len(), 1);
    let sectors = std::fs::read_to_string(format!("/sys/block/{}/size", names[0])).unwrap();
    assert_eq!(sectors.trim(), "2097152");
    done(&cloud, "resizeVolume", &[("id", &id), ("size", "3")]);
    let sectors = std::fs::read_to_string(format!("/sys/block/{}/size", names[0])).unwrap();
    assert_eq!(sectors.trim(), "6291456");
    done(&cloud, "detachVolume", &[("id", &id)]);
    gone(&id);
    attach(&cloud, &id);
    assert_eq!(tagged(&id).len(), 1);
    drop(cloud);
    gone(&id);
    gone(&root);
}

#[test]
fn a_plugged_device_has_no_user_that_a_look_at_processes_would_find() {
    if !have_loops() {
        return;
    }
    let cloud = FakeCloud::start(Options::with_loops()).unwrap();
    let name = tagged(&cloud.volumes()[0].id).remove(0);
    let node = std::path::PathBuf::from(format!("/dev/{name}"));
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        assert_ne!(std::fs::read_link(entry.path()).unwrap_or_default(), node);
    }
    // Nor is it in anybody's exclusive use.
    OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&node).unwrap();
}

#[test]
fn a_faulty_device_is_known_by_something_else_or_short_or_there_twice() {
    if !have_loops() {
        return;
    }
    let cloud = FakeCloud::start(Options::with_loops()).unwrap();
    let with = |fault: DeviceFault| {
        let id = create(&cloud, "v", "1");
        cloud.device_fault(&id, fault);
        attach(&cloud, &id);
        id
    };
    let other = "3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f".to_owned();
    let id = with(DeviceFault::Known(Identity::Volume(other.clone())));
    assert!(tagged(&id).is_empty() && tagged(&other).len() == 1);
    let id = with(DeviceFault::Size(1 << 20));
    let name = tagged(&id).remove(0);
    assert_eq!(std::fs::read_to_string(format!("/sys/block/{name}/size")).unwrap().trim(), "2048");
    let id = with(DeviceFault::Twin);
    assert_eq!(tagged(&id).len(), 2);
    done(&cloud, "detachVolume", &[("id", &id)]);
    gone(&id);
    let id = with(DeviceFault::Held);
    assert!(tagged(&id).is_empty());
    cloud.let_device_come(&id).unwrap();
    assert_eq!(tagged(&id).len(), 1);
}

#[test]
fn what_is_written_to_the_device_is_in_the_file_after_the_detach_and_whoever_has_it_open_keeps_it() {
    if !have_loops() {
        return;
    }
    let cloud = FakeCloud::start(Options::with_loops()).unwrap();
    let id = create(&cloud, "v", "1");
    attach(&cloud, &id);
    let node = format!("/dev/{}", tagged(&id).remove(0));
    let device = OpenOptions::new().read(true).write(true).open(&node).unwrap();
    device.write_all_at(b"through the device", 1 << 20).unwrap();
    done(&cloud, "detachVolume", &[("id", &id)]);
    let mut found = [0; 18];
    File::open(cloud.file(&id)).unwrap().read_exact_at(&mut found, 1 << 20).unwrap();
    assert_eq!(&found, b"through the device");
    assert_eq!(tagged(&id).len(), 1, "it is open here");
    drop(device);
    gone(&id);
}
