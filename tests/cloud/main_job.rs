//! The main job: create, attach, write, detach, hand over, delete; and who this host is.

use std::fs;
use std::io::Read;

use fakecloud::{Effect, NewVm, Options};

use crate::site::Site;

const EROFS: i32 = 30;

#[test]
fn c1_c3_c4_a_volume_is_made_attached_written_detached_and_attached_again() {
    let site = Site::start();
    let id = &site.job("j", &["root-disk"], "1900M")[0];
    let made = site.cloud.volume(id).unwrap();
    assert_eq!(made.size, 2 << 30, "rounded up to GiB, never down");
    assert_eq!(site.value("j", "root-disk", "size"), (2u64 << 30).to_string());
    assert_eq!(made.name, "j-root-disk");
    assert_eq!(site.disk("j", "root-disk", "attach"), 0, "{}", site.volfs.log());
    assert_eq!(site.value("j", "root-disk", "status"), "attached");
    assert_eq!(site.value("j", "root-disk", "device_id"), "1");
    site.volfs.ok("printf abcdef | dd of=$R/jobs/j/disks/root-disk/block conv=notrunc,fsync status=none");
    assert_eq!(site.disk("j", "root-disk", "detach"), 0, "{}", site.volfs.log());
    assert_eq!(site.value("j", "root-disk", "status"), "detached");
    assert!(site.volfs.read("jobs/j/disks/root-disk/device").is_err());
    let mut written = [0; 6];
    fs::File::open(site.cloud.file(id)).unwrap().read_exact(&mut written).unwrap();
    assert_eq!(&written, b"abcdef");
    assert_eq!(site.disk("j", "root-disk", "attach"), 0);
    assert_eq!(site.volfs.ok("dd if=$R/jobs/j/disks/root-disk/block bs=6 count=1 status=none"), "abcdef");
    assert_eq!(site.disk("j", "root-disk", "detach"), 0);
    assert_eq!(site.disk("j", "root-disk", &format!("delete {id}")), 0, "{}", site.volfs.log());
    assert_eq!(site.cloud.volume(id).unwrap().state, "Destroy", "recoverable");
    assert_eq!(site.cloud.effects(Effect::Attached, Some(id)), 2);
    assert_eq!(site.cloud.effects(Effect::Detached, Some(id)), 2);
}

#[test]
fn c3_another_vm_gets_a_root_disk_and_data_disks_and_gives_them_back_only_when_it_is_stopped() {
    let mut options = Options::with_loops();
    let vm = NewVm { root_disk: false, ..NewVm::stopped("target") };
    options.vms.push(vm.clone());
    let site = Site::with(options, &[]);
    let ids = site.job("j", &["os", "data"], "1G");
    assert_eq!(site.disk("j", "os", &format!("attach vm={} root", vm.id)), 0, "{}", site.volfs.log());
    assert_eq!(site.disk("j", "data", &format!("attach vm={}", vm.id)), 0);
    assert_eq!(site.value("j", "os", "status"), "remote");
    assert_eq!(site.value("j", "os", "device_id"), "0");
    let mut listed: Vec<String> = site
        .volfs
        .ok(&format!("echo reconcile vm={} > $R/control; ls $R/vms/{}", vm.id, vm.id))
        .lines()
        .map(str::to_owned)
        .collect();
    listed.sort();
    let mut all = ids.clone();
    all.sort();
    assert_eq!(listed, all);
    site.cloud.set_vm_state(&vm.id, "Running").unwrap();
    assert_eq!(site.disk("j", "data", &format!("detach vm={}", vm.id)), 16);
    site.cloud.set_vm_state(&vm.id, "Stopped").unwrap();
    assert_eq!(site.volfs.write("jobs/j/control", &format!("detach vm={}", vm.id)), 0, "{}", site.volfs.log());
    assert!(site.cloud.on_vm(&vm.id).is_empty());
}

#[test]
fn predecessor_22_a_host_that_is_not_the_vm_it_is_said_to_be_changes_nothing_and_health_says_why() {
    let mut options = Options::with_loops();
    let other = NewVm::new("other");
    options.vms.push(other.clone());
    let site = Site::prepare(options, &[], "");
    let mut volfs = site.beside(&other.id, &[], "");
    volfs.launch();
    fs::create_dir(volfs.path("jobs/j")).unwrap();
    let before = site.cloud.all_calls();
    assert_eq!(volfs.write("jobs/j/control", "create d 1G"), EROFS, "{}", volfs.log());
    assert_eq!(site.cloud.calls("createVolume"), 0);
    assert!(site.cloud.all_calls() - before <= 3, "it looked, at most");
    let health = volfs.read("health").unwrap();
    assert!(health.starts_with("down\n") && health.contains("no disk here carries its identity"), "{health}");
    assert!(volfs.read("jobs/j/error").unwrap().contains(&other.id));
}
