//! Devices of the host VM as loop devices of this machine.

use fakecloud::loops::loops_tagged;
use fakecloud::{FakeCloud, Options};

use crate::client::{attach, create, done};

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
    assert!(tagged(&id).is_empty());
    attach(&cloud, &id);
    assert_eq!(tagged(&id).len(), 1);
    drop(cloud);
    assert!(tagged(&id).is_empty() && tagged(&root).is_empty());
}

#[test]
fn no_process_shows_a_descriptor_of_a_plugged_device() {
    if !have_loops() {
        return;
    }
    let cloud = FakeCloud::start(Options::with_loops()).unwrap();
    let name = tagged(&cloud.volumes()[0].id).remove(0);
    let node = std::path::PathBuf::from(format!("/dev/{name}"));
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        assert_ne!(std::fs::read_link(entry.path()).unwrap_or_default(), node);
    }
}
