//! Scenarios in which the daemon that volfs replaces failed; the numbers are those of
//! `reference/predecessor-failures.md`. Those that other tests play by another name are not here.

use std::collections::BTreeSet;
use std::fs;

use super::common::{Volfs, finish};

fn names(volfs: &Volfs, below: &str) -> BTreeSet<String> {
    fs::read_dir(volfs.path(below)).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

/// The volume's own file, as the kernel shows it behind a device path.
fn backing(device: &str) -> String {
    let name = device.strip_prefix("/dev/").unwrap();
    fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).unwrap().trim_end().to_owned()
}

#[test]
fn predecessor_1_eight_volumes_attached_by_eight_processes_have_eight_right_devices() {
    let volfs = Volfs::start();
    let disks = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let uuids = volfs.job("j", &disks, "1M");
    let shells: Vec<_> = disks
        .iter()
        .map(|d| volfs.sh_spawn(&["dash"], &format!("echo attach > $R/jobs/j/disks/{d}/control")))
        .collect();
    for shell in shells {
        let said = finish(shell);
        assert_eq!(said.status, 0, "{said:?}");
    }
    let mut devices = BTreeSet::new();
    for uuid in &uuids {
        let device = volfs.value(format!("volumes/{uuid}/device"));
        assert!(backing(&device).contains(uuid), "{device} is not {uuid}'s");
        let link = fs::read_link(volfs.path(device.replacen("/dev/", "devices/", 1))).unwrap();
        assert!(link.ends_with(uuid), "{}", link.display());
        devices.insert(device);
    }
    assert_eq!((devices.len(), names(&volfs, "devices").len()), (8, 8));
}

#[test]
fn predecessor_3_4_a_volume_never_gets_the_device_of_one_attached_meanwhile() {
    let hold = tempfile::NamedTempFile::new().unwrap();
    // Both are bound before either is looked for: all events are there before the first is handled.
    let point = format!("attach.after-call=wait:{}", hold.path().display());
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &point)], "");
    let uuids = volfs.job("j", &["a", "b", "c", "d"], "1M");
    let shell = volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/j/control");
    volfs.until("four bound devices", || volfs.loops().len() == 4);
    drop(hold);
    assert_eq!(finish(shell).status, 0, "{}", volfs.log());
    for uuid in &uuids {
        assert!(backing(&volfs.value(format!("volumes/{uuid}/device"))).contains(uuid));
    }
}

#[test]
fn predecessor_8_devices_that_change_places_while_the_daemon_is_down_are_right_at_the_first_read() {
    let mut volfs = Volfs::start();
    let uuids = volfs.job("j", &["a", "b"], "1M");
    assert_eq!(volfs.write("jobs/j/control", "attach"), 0);
    let device = |volfs: &Volfs, uuid: &String| volfs.value(format!("volumes/{uuid}/device"));
    let before: Vec<String> = uuids.iter().map(|u| device(&volfs, u)).collect();
    assert_eq!(volfs.terminate().0, 0);
    // The other way round, by hand, with the tags that the provider gives.
    for (uuid, device) in uuids.iter().zip(&before) {
        assert!(std::process::Command::new("losetup").args(["-d", device]).status().unwrap().success());
        volfs.until("an unbound device", || !volfs.loops().iter().any(|l| format!("/dev/{l}") == *device));
        let _ = uuid;
    }
    volfs.launch();
    for uuid in &uuids {
        let read = volfs.read(format!("volumes/{uuid}/device"));
        assert_eq!(read, Err(libc::ENODEV), "a path after its device is gone");
        assert_eq!(volfs.value(format!("volumes/{uuid}/status")), "lost");
    }
    assert_eq!(volfs.write("jobs/j/control", "detach"), 0, "{}", volfs.log());
    // In the other order.
    for disk in ["b", "a"] {
        assert_eq!(volfs.write(format!("jobs/j/disks/{disk}/control"), "attach"), 0, "{}", volfs.log());
    }
    for uuid in &uuids {
        assert!(backing(&device(&volfs, uuid)).contains(uuid));
    }
}

#[test]
fn predecessor_16_a_device_pulled_behind_our_back_is_gone_at_the_next_read() {
    let volfs = Volfs::start();
    let uuid = volfs.job("j", &["d"], "1M").remove(0);
    assert_eq!(volfs.write("jobs/j/control", "attach"), 0);
    let device = volfs.value("jobs/j/disks/d/device");
    // The pin keeps a loop device bound until it is let go; only then is it pulled.
    assert!(std::process::Command::new("losetup").args(["-d", &device]).status().unwrap().success());
    assert_eq!(volfs.value("jobs/j/disks/d/device"), device, "it is there as long as it is pinned");
    assert!(backing(&device).contains(&uuid));
    assert_eq!(volfs.write("jobs/j/control", "detach"), 0, "{}", volfs.log());
    assert_eq!(volfs.read("jobs/j/disks/d/device"), Err(libc::ENODEV));
}

#[test]
fn predecessor_18_20_a_detaching_or_remote_volume_has_no_device_and_scripts_stop() {
    let hold = tempfile::NamedTempFile::new().unwrap();
    let point = format!("detach.after-call=wait:{}", hold.path().display());
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &point)], "");
    let uuid = volfs.job("j", &["d"], "1M").remove(0);
    assert_eq!(volfs.write("jobs/j/control", "attach"), 0);
    let shell = volfs.sh_spawn(&["dash"], "echo detach > $R/jobs/j/disks/d/control");
    volfs.until("a detach in flight", || volfs.value("jobs/j/disks/d/status") == "detaching");
    assert_eq!(volfs.read("jobs/j/disks/d/device"), Err(libc::ENODEV));
    drop(hold);
    assert_eq!(finish(shell).status, 0);
    assert!(volfs.loops().is_empty(), "done before the node was gone");
    let vm = "11111111-2222-3333-4444-555555555555";
    assert_eq!(volfs.write("jobs/j/disks/d/control", &format!("attach vm={vm}")), 0, "{}", volfs.log());
    assert_eq!(volfs.value("jobs/j/disks/d/status"), "remote");
    assert_eq!(volfs.value("jobs/j/disks/d/vm"), vm);
    assert_eq!(volfs.write("control", &format!("reconcile vm={vm}")), 0, "{}", volfs.log());
    assert_eq!(names(&volfs, &format!("vms/{vm}")), [uuid].into());
    let script = r#"set -e; d=$(cat $R/jobs/j/disks/d/device); echo "dd of=$d" "#;
    for shell in super::common::SHELLS {
        let said = volfs.sh_in(shell, script);
        assert!(said.status != 0 && said.out.is_empty(), "{said:?}");
    }
}

#[test]
fn predecessor_29_30_an_attach_twice_is_one_and_of_an_attached_volume_is_success() {
    let hold = tempfile::NamedTempFile::new().unwrap();
    let point = format!("attach.before-call=wait:{}", hold.path().display());
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &point)], "");
    volfs.job("j", &["d"], "1M");
    let spawn = || volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/j/disks/d/control");
    let shells = [spawn(), spawn()];
    let joined = || {
        let all = names(&volfs, "operations").into_iter().map(|id| volfs.read(format!("operations/{id}")));
        all.flatten().any(|op| op.contains("\"callers\":2"))
    };
    volfs.until("a second caller", joined);
    assert_eq!(volfs.write("jobs/j/disks/d/control", "detach"), libc::EBUSY);
    drop(hold);
    for shell in shells {
        assert_eq!(finish(shell).status, 0);
    }
    let rows = |volfs: &Volfs| volfs.read("history").unwrap().lines().filter(|l| l.contains("\tattach\t")).count();
    assert_eq!(rows(&volfs), 1, "two operations");
    assert_eq!(volfs.write("jobs/j/disks/d/control", "attach"), 0);
    assert_eq!((rows(&volfs), volfs.loops().len()), (1, 1));
    let vm = "11111111-2222-3333-4444-555555555555";
    assert_eq!(volfs.write("jobs/j/disks/d/control", &format!("attach vm={vm}")), libc::EBUSY);
}

#[test]
fn predecessor_43_a_restart_with_ten_operations_in_flight_ends_in_time_and_all_settle() {
    let hold = tempfile::NamedTempFile::new().unwrap();
    let point = format!("attach.before-call=wait:{}", hold.path().display());
    let mut volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", &point)], "");
    let own: Vec<String> = (0..10).map(|n| format!("d{n}")).collect();
    volfs.job("j", &own.iter().map(String::as_str).collect::<Vec<_>>(), "1M");
    assert_eq!(volfs.write("jobs/j/control", "attach nowait"), 0);
    volfs.until("ten operations", || volfs.value("jobs/j/status").contains("attaching=10"));
    let (code, took) = volfs.terminate();
    assert!(code == 0 && took.as_secs() < 5, "{code} {took:?}");
    drop(hold);
    volfs.set_env(&[]);
    volfs.launch();
    volfs.until("settled operations", || volfs.value("jobs/j/status") == "idle detached=10");
    assert_eq!(volfs.write("jobs/j/control", "attach"), 0);
}

#[test]
fn predecessor_47_another_time_zone_changes_no_time() {
    let mut volfs = Volfs::start();
    volfs.job("j", &["d"], "1M");
    let times = |volfs: &Volfs| {
        let text = volfs.read("history").unwrap();
        text.lines().skip(1).map(|l| l.split('\t').take(2).map(str::to_owned).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    let before = times(&volfs);
    assert_eq!(volfs.terminate().0, 0);
    volfs.set_env(&[("TZ", "Pacific/Auckland")]);
    volfs.launch();
    assert_eq!(times(&volfs), before);
    assert!(before.len() == 2 && before.iter().all(|row| row[0].ends_with('Z')), "{before:?}");
}

#[test]
fn predecessor_41_48_49_repeated_equal_and_concurrent_updates_lose_nothing() {
    let volfs = Volfs::start();
    volfs.job("j", &["d"], "1M");
    for _ in 0..20 {
        assert_eq!(volfs.write("jobs/j/vm_name", "same"), 0);
        assert_eq!(volfs.write("jobs/j/hold", "0"), 0);
    }
    assert_eq!(volfs.write("jobs/j/control", "create d 1M"), libc::EEXIST);
    let stored = || fs::read_dir(volfs.state().join("loop/volumes")).unwrap().count();
    assert_eq!(stored(), 1);
    std::thread::scope(|threads| {
        threads.spawn(|| (0..50).for_each(|n| assert_eq!(volfs.write("jobs/j/vm_name", &format!("vm-{n}")), 0)));
        threads.spawn(|| {
            (0..51).for_each(|n| assert_eq!(volfs.write("jobs/j/hold", if n % 2 == 0 { "1" } else { "0" }), 0))
        });
    });
    assert_eq!((volfs.value("jobs/j/vm_name"), volfs.value("jobs/j/hold")), ("vm-49".into(), "1".into()));
}

#[test]
fn predecessor_55_a_deleted_volume_is_nowhere_and_one_gone_behind_our_back_is_not_attached() {
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", "reconcile.no-gap=fail")], "");
    let uuids = volfs.job("j", &["a", "b"], "1M");
    assert_eq!(volfs.write(format!("volumes/{}/control", uuids[0]), &format!("delete {}", uuids[0])), 0);
    let said = volfs.sh("find $R -name '*'\"$U\"'*' 2>/dev/null");
    let left = said.out.lines().filter(|l| l.contains(&uuids[0])).count();
    assert_eq!(left, 0, "{said:?}");
    fs::remove_dir_all(volfs.state().join("loop/volumes").join(&uuids[1])).unwrap();
    let attach = volfs.write("jobs/j/disks/b/control", "attach");
    assert_eq!(attach, libc::ENOENT, "{}", volfs.log());
    volfs.until("a missing volume", || {
        // A look a round; the second one is believed.
        let _ = volfs.write("jobs/j/disks/b/control", "reconcile");
        volfs.value("jobs/j/disks/b/status") == "missing"
    });
    assert_eq!(volfs.write("jobs/j/disks/b/control", "attach"), libc::ENOENT);
}

#[test]
fn predecessor_56_no_verb_reaches_a_volume_in_no_job() {
    let volfs = Volfs::start();
    let uuid = volfs.job("j", &["d"], "1M").remove(0);
    volfs.job("k", &[], "1M");
    assert_eq!(volfs.write(format!("volumes/{uuid}/control"), &format!("release {uuid}")), 0);
    for verb in [format!("delete {uuid}"), "detach".into(), "attach".into(), format!("release {uuid}")] {
        for path in [
            format!("volumes/{uuid}/control"),
            format!("jobs/k/volumes/{uuid}/control"),
            format!("unclaimed/{uuid}/control"),
        ] {
            assert_eq!(volfs.write(&path, &verb), libc::ENOENT, "{path} {verb}");
        }
    }
    assert_eq!(volfs.write("jobs/k/control", "destroy k"), 0);
    assert!(volfs.state().join("loop/volumes").join(&uuid).exists());
}

#[test]
fn predecessor_131_135_139_reverse_lookup_forgetting_and_one_version() {
    let volfs = Volfs::start();
    let uuid = volfs.job("j", &["d"], "1M").remove(0);
    assert_eq!(volfs.write("jobs/j/control", "attach"), 0);
    let device = volfs.value("jobs/j/disks/d/device");
    let link = fs::read_link(volfs.path(device.replacen("/dev/", "devices/", 1))).unwrap();
    assert!(link.ends_with(format!("jobs/j/volumes/{uuid}")), "{}", link.display());
    assert_eq!(fs::remove_dir(volfs.path("jobs/j")).unwrap_err().raw_os_error(), Some(libc::ENOTEMPTY));
    assert_eq!(volfs.value("jobs/j/disks/d/device"), device);
    assert!(volfs.read("version").unwrap().contains(env!("CARGO_PKG_VERSION")));
    let said = volfs.sh(&format!("{} --version", env!("CARGO_BIN_EXE_volfs")));
    assert!(said.out.contains(env!("CARGO_PKG_VERSION")), "{said:?}");
}
