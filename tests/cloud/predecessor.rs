//! Scenarios of reference/predecessor-failures.md over a cloud; numbers are that page's.
//!
//! | number | where it is played |
//! |---|---|
//! | 2, 6, 7, 9, 11, 13 | `identity` |
//! | 16, 17 | `drift`, 17 by its number in `side_by_side` |
//! | 17, 28, 32, 33, 34, 42, 57, 58 | `side_by_side` |
//! | 21, 23, 38, 40, 97, 125 | `answers` |
//! | 22 | `main_job` |
//! | 27, 43 | `killed` |
//! | 98, 102 | `snapshots` |
//! | 120, 122 | `secrets`; 121 in the client's own tests |
//! | 1, 8 | in the guest too: eight at once, and names changed by a boot |
//! | 1, 3, 4, 8, 16, 18, 20, 29, 55 | `tests/tree/predecessor.rs`, on loop devices |
//! | 51 | `tests/tree/in_use.rs`, and in the guest |
//! | 61, 63, 66, 76, 98 | `tests/tree/scripts.rs`, on loop devices |
//!
//! 14 has no test of its number (a size is read from sysfs, never by opening), nor has 46 (the list
//! of ended operations is bounded in the engine's tests).

use fakecloud::{DeviceFault, Effect, Fault, Kind, NewVm, Options};

use crate::common::Volfs;
use crate::site::{Site, write_keys};

const EBUSY: i32 = 16;
const ENOENT: i32 = 2;
const EINVAL: i32 = 22;
const EREMOTEIO: i32 = 121;
const EDQUOT: i32 = 122;
const ETIMEDOUT: i32 = 110;

#[test]
fn predecessor_24_two_sources_of_keys_are_a_start_up_error_that_names_both() {
    let site = Site::prepare(Options::with_loops(), &[], "");
    let other =
        [("CLOUDSTACK_ENDPOINT", "http://127.0.0.1:9/client/api"), ("CLOUDSTACK_KEY", "k"), ("CLOUDSTACK_SECRET", "s")];
    let mut volfs: Volfs = site.beside(&site.cloud.host(), &other, "");
    let words = volfs.try_launch().unwrap_err();
    assert!(
        words.contains("CLOUDSTACK_ENDPOINT") && words.contains(&site.keys_file().display().to_string()),
        "{words}"
    );
    assert_eq!(site.cloud.all_calls(), 0);
}

#[test]
fn predecessor_30_an_attach_here_again_makes_no_job_and_one_elsewhere_is_refused_by_name() {
    let mut options = Options::with_loops();
    let vm = NewVm::new("other");
    options.vms.push(vm.clone());
    let site = Site::with(options, &[]);
    site.job("j", &["d", "r"], "1G");
    assert_eq!(site.disk("j", "d", "attach"), 0);
    assert_eq!(site.disk("j", "d", "attach"), 0);
    assert_eq!(site.cloud.calls("attachVolume"), 1);
    assert_eq!(site.disk("j", "r", &format!("attach vm={}", vm.id)), 0);
    assert_eq!(site.disk("j", "r", "attach"), EBUSY);
    assert!(site.value("j", "r", "error").contains(&vm.id));
    assert_eq!(site.value("j", "r", "status"), "remote");
    assert!(site.volfs.read("jobs/j/disks/r/device").is_err());
}

#[test]
fn predecessor_35_ten_failed_polls_are_no_failed_job() {
    let site = Site::start();
    let id = &site.job("j", &["d"], "1G")[0];
    for kind in [Kind::DropBefore, Kind::Html { status: 502, acted: false }, Kind::Garbage] {
        site.cloud.fault(Fault::new("queryAsyncJobResult", kind).times(3));
    }
    let text = "of the database".into();
    site.cloud.fault(Fault::new("queryAsyncJobResult", Kind::Error { code: 530, cs: 4250, text }));
    assert_eq!(site.disk("j", "d", "attach"), 0, "{}", site.volfs.log());
    assert_eq!(site.cloud.effects(Effect::Attached, Some(id)), 1);
    assert_eq!(site.cloud.calls("attachVolume"), 1);
}

#[test]
fn predecessor_36_after_its_callers_deadline_an_opposite_command_waits_its_turn() {
    let site = Site::start();
    let id = &site.job("j", &["d"], "1G")[0];
    site.cloud.device_fault(id, DeviceFault::Held);
    assert_eq!(site.disk("j", "d", "attach timeout=2"), ETIMEDOUT);
    assert_eq!(site.value("j", "d", "status"), "attaching");
    assert_eq!(site.disk("j", "d", "detach"), EBUSY);
    site.cloud.let_device_come(id).unwrap();
    assert_eq!(site.disk("j", "d", "attach"), 0, "{}", site.volfs.log());
    assert_eq!(site.cloud.calls("attachVolume"), 1);
}

#[test]
fn predecessor_39_commands_that_make_no_sense_reach_no_cloud() {
    let site = Site::start();
    site.volfs.ok("mkdir $R/jobs/j");
    for bad in ["create", "create d", "create d 0", "create d x", "create a/b 1G", "attach vm=", "{}", "claim nobody"] {
        assert_eq!(site.volfs.write("jobs/j/control", bad), EINVAL, "{bad}");
    }
    assert_eq!(site.cloud.calls("createVolume") + site.cloud.calls("attachVolume"), 0);
    assert!(site.cloud.data_volumes().is_empty());
}

#[test]
fn predecessor_41_a_create_whose_first_answer_was_lost_makes_one_volume() {
    let site = Site::start();
    site.volfs.ok("mkdir $R/jobs/j");
    site.cloud.fault(Fault::new("createVolume", Kind::DropAfter));
    assert_eq!(site.volfs.write("jobs/j/control", "create d 1G"), 0, "{}", site.volfs.log());
    assert_eq!(site.volfs.write("jobs/j/control", "create d 1G"), 17);
    assert_eq!(site.cloud.effects(Effect::Created, None), 1);
    assert_eq!(site.cloud.data_volumes().len(), 1);
}

#[test]
fn predecessor_56_the_hosts_own_root_disk_can_neither_be_claimed_nor_reached() {
    let site = Site::start();
    let root = site.cloud.on_vm(&site.cloud.host())[0].id.clone();
    site.volfs.ok("mkdir $R/jobs/j");
    assert_eq!(site.volfs.write("jobs/j/control", &format!("claim {root}")), 1);
    for verb in ["detach force".to_owned(), format!("delete {root}")] {
        assert_eq!(site.volfs.write(format!("jobs/j/volumes/{root}/control"), &verb), ENOENT);
    }
    assert_eq!(site.cloud.on_vm(&site.cloud.host())[0].id, root);
}

#[test]
fn predecessor_137_138_refusals_come_apart_and_leave_nothing_half_done() {
    let site = Site::start();
    site.job("j", &["d"], "1G");
    site.cloud.set_quota(Some(1));
    assert_eq!(site.volfs.write("jobs/j/control", "create e 1G"), EDQUOT);
    site.cloud.set_vm_snapshots(&site.cloud.host(), 1).unwrap();
    assert_eq!(site.disk("j", "d", "attach"), EREMOTEIO);
    assert!(site.value("j", "d", "error").contains("VM snapshots"), "{}", site.value("j", "d", "error"));
    assert_eq!(site.value("j", "d", "status"), "detached");
    assert_eq!(site.cloud.data_volumes().len(), 1);
}

#[test]
fn predecessor_123_changed_keys_are_used_at_once_and_what_runs_goes_on() {
    let site = Site::start();
    let id = &site.job("j", &["d", "e"], "1G")[0];
    site.cloud.device_fault(id, DeviceFault::Held);
    assert_eq!(site.disk("j", "d", "attach nowait"), 0);
    site.until("attach", |cloud| cloud.effects(Effect::Attached, Some(id)) == 1);
    site.cloud.change_account("migration", |account| account.secret = "another-secret".into()).unwrap();
    write_keys(&site.keys_file(), &site.cloud.endpoint(), &site.cloud.key(), "another-secret");
    assert_eq!(site.disk("j", "e", "attach"), 0, "{}", site.volfs.log());
    site.cloud.let_device_come(id).unwrap();
    assert_eq!(site.disk("j", "d", "attach"), 0, "{}", site.volfs.log());
    assert_eq!(site.cloud.calls("attachVolume"), 2);
}
