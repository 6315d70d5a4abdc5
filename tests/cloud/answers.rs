//! Scenarios of reference/predecessor-failures.md about what the cloud answers, or does not.

use std::time::Duration;

use fakecloud::{Effect, Fault, Kind, Options, Zone};

use crate::site::Site;

const EBUSY: i32 = 16;
const EREMOTEIO: i32 = 121;

#[test]
fn predecessor_21_the_device_id_is_the_clouds_after_each_attach() {
    let site = Site::start();
    let ids = site.job("j", &["a", "b", "c"], "1G");
    for (disk, id) in ["a", "b", "c"].iter().zip(&ids) {
        assert_eq!(site.disk("j", disk, "attach"), 0, "{}", site.volfs.log());
        let cloud = site.cloud.volume(id).unwrap();
        assert_eq!(site.value("j", disk, "device_id"), cloud.device_id.unwrap().to_string());
    }
    // 0 is the root disk and 3 the CD: the third data disk is 4.
    assert_eq!(site.value("j", "c", "device_id"), "4");
    assert_eq!(site.disk("j", "c", "detach"), 0);
    assert_eq!(site.disk("j", "c", "attach device_id=7"), 0, "{}", site.volfs.log());
    assert_eq!(site.value("j", "c", "device_id"), "7");
    assert_eq!(site.disk("j", "c", "detach"), 0);
    assert_eq!(site.disk("j", "c", "attach device_id=1"), EBUSY, "it is taken");
    assert_eq!((site.value("j", "c", "status"), site.value("j", "c", "device_id")), ("detached".into(), String::new()));
}

#[test]
fn predecessor_23_whichever_call_fails_the_status_is_never_wrong() {
    let site = Site::start();
    let id = site.job("j", &["d"], "1G").remove(0);
    for command in ["attach", "detach"] {
        // As many positions as an undisturbed run has calls, and one more.
        for position in 0..8 {
            let before = if command == "attach" { "detached" } else { "attached" };
            assert_eq!(site.value("j", "d", "status"), before);
            site.cloud.fault(Fault::new("*", Kind::DropBefore).skip(position).times(3));
            let errno = site.disk("j", "d", command);
            site.cloud.clear_faults();
            let status = site.value("j", "d", "status");
            let attached = site.cloud.volume(&id).unwrap().vm.is_some();
            let right = if attached { "attached" } else { "detached" };
            assert!(status == right || status == "unknown", "{command} at {position}: {errno} {status}, is {right}");
            assert_eq!(site.disk("j", "d", "reconcile"), 0, "{command} at {position}: {}", site.volfs.log());
            assert_eq!(site.value("j", "d", "status"), right, "{command} at {position}");
            assert_eq!(site.disk("j", "d", command), 0, "{command} at {position}: {}", site.volfs.log());
            let back = if command == "attach" { "detach" } else { "attach" };
            assert_eq!(site.disk("j", "d", back), 0, "{command} at {position}: {}", site.volfs.log());
        }
        assert_eq!(site.disk("j", "d", command), 0);
    }
}

#[test]
fn predecessor_38_sizes_are_bytes_rounded_up_and_what_the_cloud_made_counts() {
    let mut options = Options::with_loops();
    options.extra_bytes = 1 << 20;
    let site = Site::with(options, &[]);
    let id = site.job("j", &["d"], "1900M").remove(0);
    let made = site.cloud.volume(&id).unwrap().size;
    assert!(made >= 2 << 30);
    assert_eq!(site.value("j", "d", "size"), made.to_string());
    assert_eq!(site.disk("j", "d", "attach"), 0, "{}", site.volfs.log());
    assert_eq!(site.volfs.ok("blockdev --getsize64 $R/jobs/j/disks/d/block"), made.to_string());
}

#[test]
fn predecessor_40_a_zone_is_taken_by_id_and_by_name_and_two_of_one_name_are_reported() {
    let mut options = Options::with_loops();
    options.zones.extend([Zone::new("other"), Zone::new("twin"), Zone::new("twin")]);
    let zones = options.zones.clone();
    let site = Site::with(options, &[]);
    std::fs::create_dir(site.volfs.path("jobs/j")).unwrap();
    let create = |disk: &str, zone: &str| site.volfs.write("jobs/j/control", &format!("create {disk} 1G zone={zone}"));
    assert_eq!(create("by-id", &zones[1].id), 0, "{}", site.volfs.log());
    assert_eq!(create("by-name", "other"), 0, "{}", site.volfs.log());
    assert_eq!(create("none", "nowhere"), EREMOTEIO);
    assert_eq!(create("twin", "twin"), EREMOTEIO);
    let words = site.volfs.read("jobs/j/error").unwrap();
    assert!(words.contains("two zones are named twin") && words.contains(&zones[2].id), "{words}");
    assert_eq!(site.cloud.effects(Effect::Created, None), 2);
}

#[test]
fn predecessor_125_health_says_within_an_interval_that_the_cloud_is_away_and_that_it_is_back() {
    let site = Site::start();
    let first = |site: &Site| site.volfs.read("health").unwrap().lines().next().unwrap_or_default().to_owned();
    assert_eq!(first(&site), "ok");
    site.cloud.fault(Fault::new("*", Kind::DropBefore).forever());
    site.volfs.until("degraded", || first(&site) == "degraded");
    let words = site.volfs.read("health").unwrap();
    assert!(words.lines().any(|line| line.starts_with("cloud degraded")), "{words}");
    site.cloud.clear_faults();
    site.volfs.until("ok again", || first(&site) == "ok");
}

#[test]
fn predecessor_97_a_job_of_no_time_and_a_long_one_end_with_the_cloud_and_not_before() {
    let site = Site::start();
    let id = site.job("j", &["d"], "1G").remove(0);
    for delay in [Duration::ZERO, Duration::from_secs(3)] {
        site.cloud.set_delay("attachVolume", delay);
        let began = std::time::Instant::now();
        assert_eq!(site.disk("j", "d", "attach"), 0, "{}", site.volfs.log());
        assert!(began.elapsed() >= delay, "{delay:?}");
        assert!(site.cloud.jobs().iter().all(fakecloud::Job::done), "{delay:?}");
        assert!(site.cloud.volume(&id).unwrap().vm.is_some(), "{delay:?}");
        assert_eq!(site.disk("j", "d", "detach"), 0);
    }
}
