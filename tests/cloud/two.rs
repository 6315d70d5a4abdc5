//! Two daemons on one cloud, each with a record of its own: neither touches what the other owns, and
//! a record that is not of this host, or not of this day, touches nothing that is not its own any more.
//!
//! Both VMs' disks are loop devices of this machine, so each of them is proved to be its own host.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use fakecloud::{FakeCloud, GIB, LoopHypervisor, NewVm, Options};

use crate::common::{Volfs, have};
use crate::site::{MARK, Site};

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const EBUSY: i32 = 16;
const EROFS: i32 = 30;

/// The second host beside the first.
struct Two {
    site: Site,
    second: Volfs,
}

fn two() -> Two {
    let (mut options, other) = (Options::default(), NewVm::new("second-host"));
    options.hypervisor = Box::new(LoopHypervisor::new([options.host.id.clone(), other.id.clone()]));
    options.vms.push(other.clone());
    let site = Site::with(options, &[]);
    let mut second = site.beside(&other.id, &[], "");
    second.launch();
    Two { site, second }
}

/// What the cloud's book says of a volume but for the time: what nobody else may change.
type Book = (String, String, u64, Option<String>, BTreeMap<String, String>);

fn book(cloud: &FakeCloud, id: &str) -> Book {
    let volume = cloud.volume(id).unwrap();
    (volume.name, volume.state, volume.size, volume.vm, volume.tags)
}

fn books(cloud: &FakeCloud, ids: &[String]) -> Vec<Book> {
    ids.iter().map(|id| book(cloud, id)).collect()
}

/// The record that a volume's mark names.
fn record(cloud: &FakeCloud, id: &str) -> String {
    let volume = cloud.volume(id).unwrap();
    volume.tags[MARK].split('/').next().unwrap().to_owned()
}

fn control(id: &str) -> String {
    format!("volumes/{id}/control")
}

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(copied.success(), "cp -a {} {}", from.display(), to.display());
}

/// Every command that changes a volume, with its own name in it where it must be.
fn verbs(id: &str) -> Vec<String> {
    let plain = ["attach", "detach", "resize 3G", "disk other", "move k"];
    let named = ["delete", "release"].map(|verb| format!("{verb} {id}"));
    plain.into_iter().map(str::to_owned).chain(named).collect()
}

#[test]
fn neither_daemons_verbs_touch_what_the_other_owns() {
    let Two { site, second } = two();
    let ours = site.job("j", &["a", "b"], "1G");
    let theirs = second.job("j", &["a", "b"], "1G");
    assert_eq!(site.disk("j", "a", "attach"), 0, "{}", site.volfs.log());
    let before = books(&site.cloud, &ours);
    for id in &ours {
        assert_eq!(second.write("jobs/j/control", &format!("claim {id} c")), EBUSY, "{}", second.log());
        assert_eq!(second.write(control(id), "delete"), ENOENT, "there is no way to it");
    }
    // What is of a whole job is of its own volumes, though the other's job has the same name.
    assert_eq!(second.write("jobs/j/control", "attach"), 0, "{}", second.log());
    assert_eq!(second.write("jobs/j/disks/a/control", "resize 2G"), 0, "{}", second.log());
    assert_eq!(second.write("jobs/j/control", "detach"), 0, "{}", second.log());
    fs::create_dir(second.path("jobs/k")).unwrap();
    assert_eq!(second.write("jobs/j/disks/b/control", "move k"), 0, "{}", second.log());
    assert_eq!(second.write("jobs/j/control", "destroy j"), 0, "{}", second.log());
    assert_eq!(second.write("control", "reconcile"), 0);
    assert_eq!(site.volfs.write("control", "reconcile"), 0);
    assert_eq!(books(&site.cloud, &ours), before);
    assert_eq!(site.value("j", "a", "status"), "attached");
    assert_eq!(site.value("j", "b", "status"), "detached");
    assert_eq!(site.cloud.volume(&theirs[0]).unwrap().state, "Destroy");
    assert_eq!(second.value(format!("volumes/{}/status", theirs[1])), "detached");
}

#[test]
fn a_race_of_two_claims_has_one_winner() {
    const ROUNDS: usize = 12;
    let Two { site, second } = two();
    for volfs in [&site.volfs, &second] {
        fs::create_dir(volfs.path("jobs/j")).unwrap();
    }
    let records: Vec<String> =
        [&site.volfs, &second].map(|v| record(&site.cloud, &v.job("j", &["own"], "1G")[0])).into();
    for round in 0..ROUNDS {
        let id = site.cloud.add_volume(&format!("loot-{round}"), GIB).unwrap();
        let claim = format!("claim {id} d{round}");
        let errnos: Vec<i32> = std::thread::scope(|scope| {
            let all: Vec<_> = [&site.volfs, &second]
                .into_iter()
                .map(|volfs| (volfs.path("jobs/j/control"), claim.clone()))
                .map(|(path, text)| {
                    scope.spawn(move || fs::write(path, text).map_or_else(|e| e.raw_os_error().unwrap(), |()| 0))
                })
                .collect();
            all.into_iter().map(|writer| writer.join().unwrap()).collect()
        });
        let winner = match errnos[..] {
            [0, EBUSY | EPERM] => 0,
            [EBUSY | EPERM, 0] => 1,
            _ => panic!("round {round}: {errnos:?}\n{}\n{}", site.volfs.log(), second.log()),
        };
        assert_eq!(record(&site.cloud, &id), records[winner], "round {round}: the mark is the winner's");
        for (n, volfs) in [&site.volfs, &second].into_iter().enumerate() {
            assert_eq!(volfs.path(format!("jobs/j/disks/d{round}")).is_symlink(), n == winner, "round {round}");
        }
        let volfs = [&site.volfs, &second][winner];
        assert_eq!(volfs.value(format!("jobs/j/disks/d{round}/status")), "detached", "round {round}");
    }
}

#[test]
fn from_takes_over_and_the_losers_verbs_have_no_effect() {
    let Two { site, second } = two();
    fs::create_dir(second.path("jobs/j")).unwrap();
    fs::create_dir(site.volfs.path("jobs/k")).unwrap();
    let ids = site.job("j", &["a", "b"], "1G");
    let from = record(&site.cloud, &ids[0]);
    for (n, id) in ids.iter().enumerate() {
        let claim = format!("claim {id} d{n} from={from}");
        if have(&["python3"]) {
            assert_ne!(second.write_as(1000, 1000, "jobs/j/control", &claim), 0, "root only");
        }
        assert_eq!(second.write("jobs/j/control", &claim), 0, "{}", second.log());
        assert_eq!(second.value(format!("jobs/j/disks/d{n}/status")), "detached");
    }
    let before = books(&site.cloud, &ids);
    // The first one is not told; each command finds out by itself, or knows by then.
    for verb in verbs(&ids[0]).iter().filter(|verb| !verb.starts_with("release")) {
        let errno = site.volfs.write(control(&ids[0]), verb);
        assert!(matches!(errno, EPERM | EBUSY), "{verb}: {errno}\n{}", site.volfs.log());
        assert_eq!(site.value("j", "a", "status"), "conflict", "{verb}");
    }
    assert_eq!(site.volfs.write(control(&ids[1]), &format!("delete {}", ids[1])), EPERM, "the first to find out");
    assert_eq!(site.volfs.write("jobs/j/control", "destroy j"), EBUSY, "{}", site.volfs.log());
    let owner = site.value("j", "a", "owner");
    assert_eq!(Some(&owner), site.cloud.volume(&ids[0]).unwrap().tags.get(MARK), "whose it is now");
    // Its end in the loser's record leaves the winner's mark.
    assert_eq!(site.volfs.write(control(&ids[0]), &format!("release {}", ids[0])), 0, "{}", site.volfs.log());
    assert_eq!(books(&site.cloud, &ids), before);
    assert_eq!(second.write("jobs/j/disks/d0/control", "attach"), 0, "{}", second.log());
}

#[test]
fn a_record_started_under_another_vm_id_changes_nothing() {
    let Two { mut site, mut second } = two();
    let ids = site.job("j", &["a", "b"], "1G");
    fs::create_dir(site.volfs.path("jobs/k")).unwrap();
    assert_eq!(site.disk("j", "a", "attach"), 0);
    second.terminate();
    site.volfs.kill();
    copy(&site.volfs.state(), &second.state());
    second.launch();
    let before = (books(&site.cloud, &ids), site.cloud.log().len());
    for id in &ids {
        for verb in verbs(id) {
            assert_eq!(second.write(control(id), &verb), EROFS, "{verb}: {}", second.log());
        }
    }
    for command in ["create d 1G", "attach", "detach", "destroy j", "move k"] {
        assert_eq!(second.write("jobs/j/control", command), EROFS, "{command}");
    }
    assert_eq!(fs::create_dir(second.path("jobs/new")).unwrap_err().raw_os_error(), Some(EROFS));
    let health = second.read("health").unwrap();
    assert!(health.contains("read-only: the record was made on"), "{health}");
    assert_eq!((books(&site.cloud, &ids), site.cloud.log().len()), before);
    // The one whose record it is goes on.
    site.volfs.launch();
    assert_eq!(site.value("j", "a", "status"), "attached");
    assert_eq!(site.disk("j", "a", "detach"), 0, "{}", site.volfs.log());
}

#[test]
fn e7_a_record_of_another_vm_makes_health_down_and_says_whose_it_is() {
    let Two { mut site, mut second } = two();
    second.terminate();
    site.volfs.kill();
    copy(&site.volfs.state(), &second.state());
    second.launch();
    let health = second.read("health").unwrap();
    assert!(
        health.starts_with("down\n") && health.contains("it is a copy") && health.contains(&site.cloud.host()),
        "{health}"
    );
}

#[test]
fn an_older_record_put_back_has_no_effect_on_what_it_does_not_own_any_more() {
    let Two { mut site, second } = two();
    fs::create_dir(second.path("jobs/j")).unwrap();
    fs::create_dir(site.volfs.path("jobs/k")).unwrap();
    let ids = site.job("j", &["released", "moved", "deleted", "taken", "again"], "1G");
    let from = record(&site.cloud, &ids[0]);
    site.volfs.terminate();
    let old = site.volfs.scratch("old");
    copy(&site.volfs.state(), &old);
    site.volfs.launch();
    assert_eq!(site.disk("j", "released", &format!("release {}", ids[0])), 0);
    assert_eq!(site.disk("j", "moved", "move k"), 0);
    assert_eq!(site.disk("j", "deleted", &format!("delete {}", ids[2])), 0);
    assert_eq!(second.write("jobs/j/control", &format!("claim {} t from={from}", ids[3])), 0);
    // Released, and claimed by the other one.
    assert_eq!(site.disk("j", "again", &format!("release {}", ids[4])), 0);
    assert_eq!(second.write("jobs/j/control", &format!("claim {} r", ids[4])), 0);
    site.volfs.kill();
    copy(&old, &site.volfs.state());
    site.volfs.launch();
    let before = (books(&site.cloud, &ids), site.cloud.log().len());
    for id in &ids {
        for verb in verbs(id).iter().filter(|verb| !verb.starts_with("release") && !verb.starts_with("disk")) {
            site.volfs.write(control(id), verb);
        }
    }
    for command in ["attach", "detach", "destroy j"] {
        site.volfs.write("jobs/j/control", command);
    }
    for id in &ids {
        site.volfs.write(control(id), &format!("release {id}"));
    }
    site.volfs.write("control", "reconcile");
    assert_eq!((books(&site.cloud, &ids), site.cloud.log().len()), before, "{}", site.volfs.log());
    for disk in ["t", "r"] {
        assert_eq!(second.write(format!("jobs/j/disks/{disk}/control"), "attach"), 0, "{}", second.log());
    }
}
