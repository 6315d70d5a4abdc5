//! What others do to our volumes behind volfs's back is seen within an interval, and at once by
//! `reconcile`; a cloud that is away makes nobody guess; an idle daemon asks little.

use std::fs;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use fakecloud::{DeviceFault, Fault, GIB, Kind, NewVm, Options};

use crate::site::{MARK, Site};

const EHOSTUNREACH: i32 = 113;
/// `reconcile_interval` of a site.
const INTERVAL: Duration = Duration::from_secs(5);
/// What a busy machine may add to it.
const SLACK: Duration = Duration::from_secs(10);

/// A cloud with a further, stopped VM; a second look at what is absent comes at once.
fn site(more: &str) -> (Site, String) {
    let mut options = Options::with_loops();
    let other = NewVm::stopped("other");
    options.vms.push(other.clone());
    let mut site = Site::prepare(options, &[("VOLFS_FAILPOINTS", "reconcile.no-gap=fail")], more);
    site.volfs.launch();
    (site, other.id)
}

fn status(site: &Site, id: &str) -> String {
    site.volfs.value(format!("volumes/{id}/status"))
}

/// Waits longer than [`crate::common::PATIENCE`].
#[track_caller]
fn until(site: &Site, what: &str, within: Duration, mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < within, "no {what} in {within:?}\n{}", site.volfs.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn v4_v5_v6_v8_what_others_did_is_shown_by_reconcile_at_once() {
    let (site, other) = site("");
    let disks = ["here", "there", "lost", "away", "destroyed", "expunged", "unmarked", "remarked", "steady"];
    let ids = site.job("j", &disks, "1G");
    let id = |disk: &str| ids[disks.iter().position(|d| *d == disk).unwrap()].as_str();
    assert_eq!(site.disk("j", "away", "attach"), 0, "{}", site.volfs.log());
    let marks: Vec<_> = ids.iter().map(|id| site.cloud.volume(id).unwrap().tags[MARK].clone()).collect();
    let foreign = "3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f/7";
    let host = site.cloud.host();
    let mut events = fs::OpenOptions::new();
    let mut events = events.read(true).custom_flags(libc::O_NONBLOCK).open(site.volfs.path("events/all")).unwrap();

    site.cloud.admin_attach(id("here"), &host).unwrap();
    site.cloud.admin_attach(id("there"), &other).unwrap();
    site.cloud.device_fault(id("lost"), DeviceFault::Held);
    site.cloud.admin_attach(id("lost"), &host).unwrap();
    site.cloud.admin_detach(id("away")).unwrap();
    site.cloud.admin_destroy(id("destroyed"), false).unwrap();
    site.cloud.admin_destroy(id("expunged"), true).unwrap();
    site.cloud.remove_tag(id("unmarked"), MARK).unwrap();
    site.cloud.set_tag(id("remarked"), MARK, foreign).unwrap();
    let loose = site.cloud.add_volume("somebody's", GIB).unwrap();
    site.cloud.admin_attach(&loose, &host).unwrap();

    // Two are in conflict: not all is settled.
    assert_eq!(site.volfs.write("control", "reconcile"), EHOSTUNREACH);
    let expected = [
        ("here", "attached"),
        ("there", "remote"),
        ("lost", "lost"),
        ("destroyed", "missing"),
        ("expunged", "missing"),
        ("unmarked", "conflict"),
        ("remarked", "conflict"),
        ("steady", "detached"),
    ];
    for (disk, word) in expected {
        assert_eq!(site.value("j", disk, "status"), word, "{disk}: {}", site.volfs.log());
    }
    // Its device ends with volfs's own descriptor, which it gives back when it sees that.
    site.volfs.until("detached", || site.value("j", "away", "status") == "detached");
    for (n, disk) in disks.iter().enumerate().filter(|(_, d)| !["destroyed", "expunged"].contains(d)) {
        let truth = site.truth(&ids[n], &marks[n]);
        assert_eq!(site.value("j", disk, "status"), truth, "{disk}");
    }
    assert_eq!(site.value("j", "there", "vm"), other);
    assert_eq!(site.value("j", "remarked", "owner"), foreign);
    let problems = site.volfs.read("problems").unwrap();
    for disk in ["lost", "destroyed", "expunged", "unmarked", "remarked"] {
        assert!(problems.contains(id(disk)), "{disk} is no problem: {problems}");
    }
    for disk in ["here", "there", "steady"] {
        assert!(!problems.contains(id(disk)), "{disk} is a problem: {problems}");
    }
    let reason = site.volfs.value(format!("unclaimed/{loose}/reason"));
    assert_eq!(reason, "attached to this host, in no job");
    assert_eq!(site.volfs.value(format!("unclaimed/{loose}/device")), format!("/dev/{}", site.in_kernel(&loose)[0]));

    let mut seen = String::new();
    let mut buffer = [0; 65536];
    site.volfs.until("an event of each", || {
        let n = events.read(&mut buffer).unwrap_or(0);
        seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
        let told = |disk: &&str, event: &str| seen.lines().any(|l| l.contains(event) && l.contains(id(disk)));
        // What is missing is in doubt first, and changes its status by that.
        ["here", "there", "lost", "away", "unmarked", "remarked"].iter().all(|d| told(d, "\"drift\""))
            && ["destroyed", "expunged"].iter().all(|d| told(d, "\"missing\""))
    });

    // Put right behind its back as well, all is well again.
    site.cloud.let_device_come(id("lost")).unwrap();
    site.cloud.set_tag(id("unmarked"), MARK, &marks[6]).unwrap();
    site.cloud.set_tag(id("remarked"), MARK, &marks[7]).unwrap();
    site.cloud.admin_detach(id("there")).unwrap();
    assert_eq!(site.volfs.write("control", "reconcile"), 0, "{}", site.volfs.log());
    for (disk, word) in
        [("lost", "attached"), ("unmarked", "detached"), ("remarked", "detached"), ("there", "detached")]
    {
        assert_eq!(site.value("j", disk, "status"), word, "{disk}");
    }
    for disk in ["destroyed", "expunged"] {
        assert_eq!(site.disk("j", disk, &format!("delete {}", id(disk))), 0, "dropped: {}", site.volfs.log());
    }
}

#[test]
fn drift_is_seen_within_an_interval_without_being_asked_for() {
    let (site, other) = site("");
    let ids = site.job("j", &["there", "gone", "remarked", "here"], "1G");
    site.cloud.admin_attach(&ids[0], &other).unwrap();
    site.cloud.admin_destroy(&ids[1], false).unwrap();
    site.cloud.remove_tag(&ids[2], MARK).unwrap();
    site.cloud.admin_attach(&ids[3], &site.cloud.host()).unwrap();
    let began = Instant::now();
    for (id, word) in ids.iter().zip(["remote", "missing", "conflict", "attached"]) {
        until(&site, word, INTERVAL + SLACK, || status(&site, id) == word);
    }
    assert!(began.elapsed() < INTERVAL + SLACK, "{:?}", began.elapsed());
}

#[test]
fn v6_an_absence_is_not_believed_where_the_credentials_do_not_see_our_own_vm() {
    let (site, _) = site("");
    let id = &site.job("j", &["d"], "1G")[0];
    site.cloud.hide_volume(id, true).unwrap();
    site.cloud.hide_vm(&site.cloud.host(), true).unwrap();
    for _ in 0..2 {
        assert_eq!(site.volfs.write("control", "reconcile"), EHOSTUNREACH);
        assert_eq!(status(&site, id), "unknown");
    }
    // Another's project, say: our VM is seen, the volume is not.
    site.cloud.hide_vm(&site.cloud.host(), false).unwrap();
    assert_eq!(site.volfs.write("control", "reconcile"), 0, "{}", site.volfs.log());
    assert_eq!(status(&site, id), "missing");
    site.cloud.hide_volume(id, false).unwrap();
    assert_eq!(site.volfs.write("control", "reconcile"), 0);
    assert_eq!(status(&site, id), "detached");
}

#[test]
fn r3_v7_a_cloud_that_is_away_for_three_intervals_is_guessed_about_by_nobody_and_devices_are_served() {
    let (site, other) = site("timeout = 3\n");
    let ids = site.job("j", &["here", "free", "there"], "1G");
    assert_eq!(site.disk("j", "here", "attach"), 0, "{}", site.volfs.log());
    assert_eq!(site.disk("j", "there", &format!("attach vm={other}")), 0, "{}", site.volfs.log());
    assert_eq!(site.volfs.write("control", &format!("reconcile vm={other}")), 0);
    let listing =
        || fs::read_dir(site.volfs.path(format!("vms/{other}"))).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    assert_eq!(listing().unwrap().len(), 2, "its root disk and ours");
    site.volfs.ok("printf abcdef | dd of=$R/jobs/j/disks/here/block conv=notrunc,fsync status=none");
    let incarnation = site.value("j", "here", "incarnation");

    site.cloud.fault(Fault::new("*", Kind::DropBefore).forever());
    let began = Instant::now();
    let away = INTERVAL * 3;
    until(&site, "unknown", away * 3 + SLACK, || {
        status(&site, &ids[1]) == "unknown" && status(&site, &ids[2]) == "unknown"
    });
    assert!(began.elapsed() >= away - INTERVAL, "given up after {:?}", began.elapsed());
    until(&site, "EHOSTUNREACH", away + SLACK, || {
        listing().is_err_and(|error| error.raw_os_error() == Some(EHOSTUNREACH))
    });
    assert_eq!(site.value("j", "here", "status"), "attached");
    assert_eq!(site.value("j", "here", "incarnation"), incarnation);
    assert_eq!(site.volfs.ok("dd if=$R/jobs/j/disks/here/block bs=6 count=1 status=none"), "abcdef");
    assert!(site.volfs.read("health").unwrap().starts_with("degraded\n"));
    assert_eq!(site.disk("j", "free", "attach"), EHOSTUNREACH);

    site.cloud.clear_faults();
    until(&site, "detached", INTERVAL + SLACK, || status(&site, &ids[1]) == "detached");
    until(&site, "remote", INTERVAL + SLACK, || status(&site, &ids[2]) == "remote");
    until(&site, "its listing", INTERVAL + SLACK, || listing().is_ok_and(|all| all.len() == 2));
    assert_eq!(site.value("j", "here", "incarnation"), incarnation);
    assert!(site.volfs.read("health").unwrap().starts_with("ok\n"));
}

#[test]
fn c1_a_late_twin_of_a_create_shows_in_unclaimed_and_is_never_deleted() {
    let (site, _) = site("timeout = 3\nlate_answers = 1\n");
    fs::create_dir(site.volfs.path("jobs/j")).unwrap();
    // Longer than the call's deadline, two questions for its job, and the time of late answers.
    site.cloud.fault(Fault::new("createVolume", Kind::DelayBefore(Duration::from_secs(12))));
    assert_eq!(site.volfs.write("jobs/j/control", "create d 1G"), EHOSTUNREACH, "{}", site.volfs.log());
    assert_eq!(site.cloud.data_volumes().len(), 0, "it is not late enough");
    assert_eq!(site.volfs.write("jobs/j/control", "create d 1G"), 0, "{}", site.volfs.log());
    site.until("the late one", |c| c.data_volumes().len() == 2);
    let own = fs::read_link(site.volfs.path("jobs/j/disks/d")).unwrap();
    let own = own.file_name().unwrap().to_str().unwrap().to_owned();
    let twin = site.cloud.data_volumes().into_iter().find(|v| v.id != own).unwrap();
    assert_eq!(site.volfs.write("control", "reconcile"), 0, "{}", site.volfs.log());
    let reason = site.volfs.value(format!("unclaimed/{}/reason", twin.id));
    assert_eq!(reason, "made by a create whose answer never came, in no job");
    assert_eq!(site.orphans(), [""; 0]);
    assert_eq!(site.cloud.volume(&twin.id).unwrap(), twin, "left as it is");
    assert_eq!(site.value("j", "d", "status"), "detached");
    // It can be taken, as any volume.
    assert_eq!(site.volfs.write("jobs/j/control", &format!("claim {} e", twin.id)), 0, "{}", site.volfs.log());
    assert_eq!(site.cloud.calls("destroyVolume") + site.cloud.calls("deleteVolume"), 0);
}

/// Rounds of reconciling so far, by volfs's own count.
fn rounds(site: &Site) -> u64 {
    let metrics = site.volfs.read("metrics").unwrap();
    let line =
        metrics.lines().find(|l| l.starts_with("volfs_reconcile") && !l.starts_with('#')).expect("a count of rounds");
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn an_idle_daemon_with_twenty_volumes_asks_at_most_twice_an_interval() {
    const ROUNDS: u64 = 3;
    let (site, _) = site("");
    let disks: Vec<String> = (0..20).map(|n| format!("d{n}")).collect();
    site.job("j", &disks.iter().map(String::as_str).collect::<Vec<_>>(), "1G");
    assert_eq!(site.volfs.write("jobs/j/control", "attach"), 0, "{}", site.volfs.log());
    let first = rounds(&site);
    until(&site, "a round", INTERVAL + SLACK, || rounds(&site) > first);
    let (from, calls, began) = (rounds(&site), site.cloud.all_calls(), Instant::now());
    until(&site, "further rounds", (INTERVAL + SLACK) * 3, || rounds(&site) >= from + ROUNDS);
    let (made, asked) = (rounds(&site) - from, site.cloud.all_calls() - calls);
    assert!(began.elapsed() >= INTERVAL * 2, "rounds come {:?} apart", began.elapsed() / 3);
    assert!(asked as u64 <= 2 * made, "{asked} requests in {made} rounds");
    assert!(asked as u64 >= made, "it does look");
}
