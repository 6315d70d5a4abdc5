//! The life of a volume.

use fakecloud::{Effect, FakeCloud, GIB, Options};

use crate::client::{attach, call, create, done, failed, refused};

fn cloud() -> FakeCloud {
    FakeCloud::start(Options::default()).unwrap()
}

#[test]
fn a_volume_is_created_attached_detached_and_destroyed() {
    let cloud = cloud();
    let id = create(&cloud, "one", "2");
    let made = cloud.volume(&id).unwrap();
    assert_eq!((made.name.as_str(), made.size, made.state.as_str()), ("one", 2 * GIB, "Allocated"));
    let shown = attach(&cloud, &id);
    assert_eq!(shown["deviceid"], 1);
    assert_eq!(shown["jobstatus"], 0, "the inner status is that of the open job");
    let listed = call(&cloud, "listVolumes", &[("virtualmachineid", &cloud.host()), ("type", "DATADISK")]);
    assert_eq!(listed["count"], 1);
    assert_eq!(listed["volume"][0]["virtualmachineid"], cloud.host());
    assert_eq!(listed["volume"][0]["state"], "Ready");
    assert!(listed["volume"][0].get("jobid").is_none());
    done(&cloud, "detachVolume", &[("id", &id)]);
    let listed = call(&cloud, "listVolumes", &[("id", &id)]);
    assert!(listed["volume"][0].get("deviceid").is_none() && listed["volume"][0].get("virtualmachineid").is_none());
    done(&cloud, "destroyVolume", &[("id", &id), ("expunge", "true")]);
    assert_eq!(call(&cloud, "listVolumes", &[("id", &id)]), serde_json::json!({}));
    for effect in [Effect::Created, Effect::Attached, Effect::Detached, Effect::Expunged] {
        assert_eq!(cloud.effects(effect, Some(&id)), 1, "{effect:?}");
    }
}

#[test]
fn what_was_attached_is_refused_in_the_job_and_what_is_unknown_in_the_request() {
    let cloud = cloud();
    let id = create(&cloud, "one", "1");
    attach(&cloud, &id);
    let (code, text) = failed(&cloud, "attachVolume", &[("id", &id), ("virtualmachineid", &cloud.host())]);
    assert_eq!((code, text.as_str()), (431, "Please specify a volume that is not attached to any VM."));
    let nobody = "3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f";
    let (code, text) = refused(&cloud, "attachVolume", &[("id", nobody), ("virtualmachineid", &cloud.host())]);
    assert_eq!(code, 431);
    assert!(text.contains(&format!("Invalid parameter id value={nobody}")), "{text}");
}
