//! Snapshots (2.8).

use std::os::unix::fs::FileExt;

use fakecloud::loops::write_behind;
use fakecloud::{Effect, FakeCloud, Fault, GIB, Kind, Moment, Options};

use crate::client::{PATIENCE, attach, call, create, done, ended, failed, refused};

fn cloud() -> FakeCloud {
    FakeCloud::start(Options::default()).unwrap()
}

#[test]
fn a_snapshot_brings_back_the_bytes_of_its_moment() {
    let cloud = cloud();
    let id = create(&cloud, "v", "1");
    let (code, text) = refused(&cloud, "createSnapshot", &[("volumeid", &id)]);
    assert!(code == 431 && text.contains("please attach this volume to a VM before"), "{text}");
    attach(&cloud, &id);
    write_behind(&cloud.file(&id), 4096, b"before").unwrap();
    let taken = done(&cloud, "createSnapshot", &[("volumeid", &id), ("name", "s")]);
    let snapshot = taken["snapshot"]["id"].as_str().unwrap();
    assert_eq!(
        (&taken["snapshot"]["state"], &taken["snapshot"]["volumeid"]),
        (&"BackedUp".into(), &id.as_str().into())
    );
    write_behind(&cloud.file(&id), 4096, b"after!").unwrap();
    let (_, text) = failed(&cloud, "revertSnapshot", &[("id", snapshot)]);
    assert_eq!(text, "The VM the specified disk is attached to is not in the shutdown state.");
    done(&cloud, "detachVolume", &[("id", &id)]);
    done(&cloud, "resizeVolume", &[("id", &id), ("size", "2")]);
    done(&cloud, "revertSnapshot", &[("id", snapshot)]);
    let mut found = [0; 6];
    std::fs::File::open(cloud.file(&id)).unwrap().read_exact_at(&mut found, 4096).unwrap();
    assert_eq!((&found, cloud.volume(&id).unwrap().size), (b"before", GIB));
    let zone = cloud.zones()[0].id.clone();
    let copy = done(&cloud, "createVolume", &[("snapshotid", snapshot), ("zoneid", &zone), ("name", "copy")]);
    let copy = copy["volume"]["id"].as_str().unwrap();
    std::fs::File::open(cloud.file(copy)).unwrap().read_exact_at(&mut found, 4096).unwrap();
    assert_eq!(&found, b"before");
    assert_eq!(done(&cloud, "deleteSnapshot", &[("id", snapshot)])["success"], true);
    assert!(failed(&cloud, "deleteSnapshot", &[("id", snapshot)]).1.contains("already destroyed"));
    assert_eq!(call(&cloud, "listSnapshots", &[("volumeid", &id)]), serde_json::json!({}));
    assert_eq!(cloud.effects(Effect::Reverted, Some(&id)), 1);
}

#[test]
fn a_running_snapshot_stands_in_the_way_of_others_of_its_vm_and_of_a_deletion() {
    let cloud = cloud();
    let (one, two) = (create(&cloud, "one", "1"), create(&cloud, "two", "1"));
    attach(&cloud, &one);
    attach(&cloud, &two);
    cloud.fault(Fault::new("createSnapshot", Kind::JobHangs(Moment::Working)));
    let job = call(&cloud, "createSnapshot", &[("volumeid", &one)])["jobid"].as_str().unwrap().to_owned();
    assert!(cloud.wait_for(PATIENCE, |c| c.held_jobs().contains(&job)));
    let (code, text) = refused(&cloud, "createSnapshot", &[("volumeid", &two)]);
    assert!(code == 431 && text.starts_with("There is other active snapshot tasks on the instance"), "{text}");
    // It holds the VM's queue.
    let detach = call(&cloud, "detachVolume", &[("id", &two)])["jobid"].as_str().unwrap().to_owned();
    assert_eq!(call(&cloud, "queryAsyncJobResult", &[("jobid", &detach)])["jobstatus"], 0);
    assert_eq!(cloud.volume(&one).unwrap().state, "Snapshotting");
    cloud.release_jobs();
    assert_eq!(ended(&cloud, &job)["jobstatus"], 1);
    assert_eq!(ended(&cloud, &detach)["jobstatus"], 1);
    let snapshot = cloud.start_snapshot(&two).unwrap();
    let (_, text) = failed(&cloud, "destroyVolume", &[("id", &two)]);
    assert_eq!(text, "There are snapshot operations in progress on the volume, unable to delete it");
    cloud.end_snapshot(&snapshot).unwrap();
    done(&cloud, "destroyVolume", &[("id", &two)]);
}
