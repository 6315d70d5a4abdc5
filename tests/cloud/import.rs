//! Volumes that `volfs import` brought in, over a cloud: marked where they are, and by one host only.

use std::fs;

use fakecloud::{Effect, GIB, LoopHypervisor, NewVm, Options};

use crate::common::{Volfs, said_of};
use crate::site::{MARK, Site};

/// What a dump says of a job with these disks.
fn dump(volfs: &Volfs, disks: &[(&str, &str)]) -> String {
    let mut text = String::from(
        "-- MariaDB dump 10.19\nINSERT INTO `replication_jobs` (`id`, `source_vm_name`, `status`) VALUES ('j','web1','ready');\n",
    );
    for (n, (disk, volume)) in disks.iter().enumerate() {
        let n = n + 1;
        text += &format!(
            "INSERT INTO `ossea_volumes` (`id`, `volume_id`, `volume_name`, `size_gb`) VALUES ({n},'{volume}','v{n}',1);\n\
             INSERT INTO `vm_disks` (`id`, `job_id`, `disk_id`, `ossea_volume_id`) VALUES ({n},'j','{disk}',{n});\n\
             INSERT INTO `device_mappings` (`volume_uuid`, `device_path`) VALUES ('{volume}','/dev/vdz');\n"
        );
    }
    text += "-- Dump completed on 2026-11-01  0:00:00\n";
    let path = volfs.scratch("dump.sql");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[track_caller]
fn import(volfs: &Volfs, disks: &[(&str, &str)]) {
    let dump = dump(volfs, disks);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_volfs"));
    command.arg("--state-dir").arg(volfs.state()).arg("--config").arg(volfs.scratch("config.toml"));
    let said = said_of(command.args(["import", &dump]).output().unwrap());
    assert_eq!(said.status, 0, "{said:?}");
}

#[test]
fn v7_what_was_imported_is_marked_where_it_is_and_nothing_of_it_is_moved() {
    let (mut options, other) = (Options::with_loops(), NewVm::new("its-new-vm"));
    options.vms.push(other.clone());
    let mut site = Site::prepare(options, &[], "");
    let [here, there, free, lone] = ["here", "there", "free", "lone"].map(|n| site.cloud.add_volume(n, GIB).unwrap());
    site.cloud.admin_attach(&here, &site.cloud.host()).unwrap();
    site.cloud.admin_attach(&there, &other.id).unwrap();
    // Somebody else's mark is nobody's but theirs.
    let theirs = "0a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a/7";
    site.cloud.set_tag(&lone, MARK, theirs).unwrap();
    let device = site.in_kernel(&here);
    let id = site.cloud.volume(&there).unwrap().device_id;
    import(&site.volfs, &[("d0", &here), ("d1", &there), ("d2", &free), ("d3", &lone)]);
    let done = site.cloud.log().len();
    site.volfs.launch();
    let status = |disk: &str| site.value("j", disk, "status");
    site.volfs
        .until("the marks", || ["d0", "d1", "d2", "d3"].map(status) == ["attached", "remote", "detached", "conflict"]);
    for volume in [&here, &there, &free] {
        assert_eq!(site.volfs.value(format!("volumes/{volume}/owner")), site.cloud.volume(volume).unwrap().tags[MARK]);
    }
    assert_eq!(site.cloud.volume(&lone).unwrap().tags[MARK], theirs);
    assert_eq!((site.in_kernel(&here), site.cloud.volume(&there).unwrap().device_id), (device.clone(), id));
    assert!(site.value("j", "d0", "device").ends_with(&device[0]), "{device:?}");
    let effects: Vec<Effect> = site.cloud.log().split_off(done).into_iter().map(|d| d.effect).collect();
    assert_eq!(effects, [Effect::Tagged; 3], "volfs did nothing but mark");
    // From now on they are volumes like any other, and the fourth is not.
    assert_eq!(site.disk("j", "d0", "detach"), 0, "{}", site.volfs.log());
    assert_eq!(site.disk("j", "d2", "attach"), 0, "{}", site.volfs.log());
    assert_ne!(site.volfs.write("jobs/j/control", "destroy j"), 0);
    assert!([&here, &there, &free, &lone].iter().all(|v| site.cloud.volume(v).is_some_and(|v| v.state != "Destroy")));
}

#[test]
fn of_two_hosts_that_import_one_volume_one_has_it_and_the_other_a_conflict() {
    let (mut options, other) = (Options::default(), NewVm::new("second-host"));
    options.hypervisor = Box::new(LoopHypervisor::new([options.host.id.clone(), other.id.clone()]));
    options.vms.push(other.clone());
    let mut site = Site::prepare(options, &[], "");
    let mut second = site.beside(&other.id, &[], "");
    let names: Vec<String> = (0..6).map(|n| format!("d{n}")).collect();
    let volumes: Vec<String> = names.iter().map(|n| site.cloud.add_volume(n, GIB).unwrap()).collect();
    let disks: Vec<(&str, &str)> = names.iter().map(String::as_str).zip(volumes.iter().map(String::as_str)).collect();
    import(&site.volfs, &disks);
    import(&second, &disks);
    second.launch();
    site.volfs.launch();
    let hosts = [&site.volfs, &second];
    for (disk, volume) in &disks {
        let shown = || hosts.map(|host| host.value(format!("jobs/j/disks/{disk}/status")));
        site.volfs.until("one owner and one conflict", || {
            let mut shown = shown();
            shown.sort();
            shown == ["conflict", "detached"]
        });
        let winner = usize::from(shown()[0] == "conflict");
        let mark = || site.cloud.volume(volume).unwrap().tags[MARK].clone();
        let won = mark();
        for host in hosts {
            assert_eq!(host.value(format!("volumes/{volume}/owner")), won);
        }
        let loser = hosts[1 - winner];
        for command in ["attach", &format!("delete {volume}")] {
            let errno = loser.write(format!("volumes/{volume}/control"), command);
            assert!([libc::EPERM, libc::EBUSY].contains(&errno), "{command}: errno {errno}");
        }
        assert_eq!(
            loser.write(format!("volumes/{volume}/control"), &format!("release {volume}")),
            0,
            "{}",
            loser.log()
        );
        assert_eq!(mark(), won);
        assert!(site.in_kernel(volume).is_empty());
    }
}
