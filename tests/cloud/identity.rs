//! Devices that come late, wrong, twice or never, and one that the guest does not let go.

use std::time::Duration;

use fakecloud::{DeviceFault, Effect, Identity};

use crate::common::finish;
use crate::site::Site;

const EPERM: i32 = 1;
const EBUSY: i32 = 16;
const ENODEV: i32 = 19;
const ENOTUNIQ: i32 = 76;
const ETIMEDOUT: i32 = 110;

/// A detached volume whose devices will have this fault.
fn faulty(fault: DeviceFault) -> (Site, String) {
    let site = Site::start();
    let id = site.job("j", &["d"], "1G").remove(0);
    site.cloud.device_fault(&id, fault);
    (site, id)
}

fn device(site: &Site) -> Result<String, i32> {
    site.volfs.read("jobs/j/disks/d/device")
}

#[test]
fn predecessor_13_a_late_device_is_waited_for_and_a_repeated_attach_joins() {
    let (site, id) = faulty(DeviceFault::Held);
    assert_eq!(site.disk("j", "d", "attach timeout=1"), ETIMEDOUT);
    assert_eq!((site.value("j", "d", "status"), device(&site)), ("attaching".into(), Err(ENODEV)));
    assert_eq!(site.disk("j", "d", "detach timeout=1"), EBUSY, "the attach goes on");
    let joined = site.volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/j/disks/d/control");
    site.cloud.let_device_come(&id).unwrap();
    assert_eq!(finish(joined).status, 0, "{}", site.volfs.log());
    assert_eq!(site.value("j", "d", "status"), "attached");
    assert_eq!(site.cloud.effects(Effect::Attached, Some(&id)), 1);
}

#[test]
fn predecessor_06_a_device_that_never_comes_is_never_attached_and_the_volume_can_be_detached() {
    let (site, id) = faulty(DeviceFault::Held);
    let op = {
        assert_eq!(site.disk("j", "d", "attach timeout=1"), ETIMEDOUT);
        site.volfs.ok("ls $R/operations | tail -n 1")
    };
    assert_eq!(device(&site), Err(ENODEV));
    assert_eq!(site.volfs.write("control", &format!("cancel {op}")), 0);
    site.volfs.until("an end", || site.value("j", "d", "status") == "lost");
    assert_eq!(device(&site), Err(ENODEV));
    assert_eq!(site.disk("j", "d", "detach"), 0, "{}", site.volfs.log());
    assert_eq!(site.value("j", "d", "status"), "detached");
    assert_eq!(site.cloud.volume(&id).unwrap().vm, None);
}

#[test]
fn predecessor_11_a_disk_with_another_identity_or_none_is_not_the_volumes() {
    let other = Identity::Volume("3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f".into());
    for identity in [Identity::Empty, Identity::Text("vol".into()), other] {
        let (site, id) = faulty(DeviceFault::Known(identity.clone()));
        assert_eq!(site.disk("j", "d", "attach timeout=2"), ETIMEDOUT, "{identity:?}");
        assert_eq!((site.value("j", "d", "status"), device(&site)), ("attaching".into(), Err(ENODEV)), "{identity:?}");
        // The host's own root disk is the only one that is known.
        let links = site.volfs.ok("ls $R/exports; for d in $R/devices/*; do readlink $d; done");
        assert!(links.starts_with("../unclaimed/") && !links.contains(&id), "{identity:?}: {links}");
    }
}

#[test]
fn predecessor_07_a_right_identity_with_a_wrong_size_is_a_conflict_and_no_match() {
    let (site, id) = faulty(DeviceFault::Size((1 << 30) - 512));
    assert_eq!(site.disk("j", "d", "attach"), EPERM, "{}", site.volfs.log());
    assert_eq!((site.value("j", "d", "status"), device(&site)), ("conflict".into(), Err(ENODEV)));
    let words = site.volfs.read("jobs/j/disks/d/error").unwrap();
    assert!(words.contains("1073741312 bytes, the cloud says 1073741824"), "{words}");
    // Put right behind volfs's back, it is served.
    site.cloud.device_fault(&id, None);
    site.cloud.admin_detach(&id).unwrap();
    site.cloud.admin_attach(&id, &site.cloud.host()).unwrap();
    site.volfs.until("the right device", || site.value("j", "d", "status") == "attached");
}

#[test]
fn e14_two_devices_of_one_identity_are_an_error_and_not_a_choice() {
    let (site, _) = faulty(DeviceFault::Twin);
    assert_eq!(site.disk("j", "d", "attach"), ENOTUNIQ, "{}", site.volfs.log());
    assert_eq!((site.value("j", "d", "status"), device(&site)), ("conflict".into(), Err(ENODEV)));
    assert_eq!(site.disk("j", "d", "attach"), EBUSY);
}

#[test]
fn predecessor_09_volumes_whose_ids_begin_alike_stay_distinct() {
    let site = Site::start();
    let ids = ["3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f", "3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e60"];
    site.cloud.next_volume_ids(&ids);
    assert_eq!(site.job("j", &["a", "b"], "1G"), ids);
    assert_eq!(site.volfs.write("jobs/j/control", "attach"), 0, "{}", site.volfs.log());
    for (disk, id) in ["a", "b"].iter().zip(ids) {
        let device = site.value("j", disk, "device");
        let name = device.strip_prefix("/dev/").unwrap();
        assert_eq!(site.in_kernel(id), [name], "{disk}");
        assert!(site.volfs.ok(&format!("readlink $R/devices/{name}")).ends_with(id));
    }
}

#[test]
fn predecessor_02_a_device_that_comes_after_the_clouds_success_is_taken_at_once() {
    let (site, _) = faulty(DeviceFault::Late(Duration::from_millis(700)));
    assert_eq!(site.disk("j", "d", "attach"), 0, "{}", site.volfs.log());
    assert_eq!(site.value("j", "d", "status"), "attached");
}

#[test]
fn s5_a_detach_that_the_guest_does_not_let_happen_is_tried_again_and_withdraws_the_device_meanwhile() {
    let site = Site::start();
    let id = site.job("j", &["d"], "1G").remove(0);
    assert_eq!(site.disk("j", "d", "attach"), 0);
    site.cloud.device_fault(&id, DeviceFault::Stuck);
    let going = site.volfs.sh_spawn(&["dash"], "echo detach > $R/jobs/j/disks/d/control");
    let says = |what: &str| site.volfs.read("jobs/j/disks/d/info.json").unwrap().contains(what);
    site.volfs.until("what it waits for", || says("refuses for now") && says("Could not detach volume"));
    assert_eq!((site.value("j", "d", "status"), device(&site)), ("detaching".into(), Err(ENODEV)));
    // Cancelled, it is as it was.
    let op = site.volfs.ok("ls $R/operations | tail -n 1");
    assert_eq!(site.volfs.write("control", &format!("cancel {op}")), 0);
    assert_ne!(finish(going).status, 0);
    assert_eq!(site.value("j", "d", "status"), "attached", "{}", site.volfs.log());
    site.cloud.device_fault(&id, None);
    assert_eq!(site.disk("j", "d", "detach"), 0, "{}", site.volfs.log());
    assert_eq!(site.cloud.effects(Effect::Detached, Some(&id)), 1);
}
