//! Tags as a compare-and-set (2.17).

use fakecloud::{Account, Effect, FakeCloud, Fault, Kind, Options};
use serde_json::json;

use crate::client::{call, create, done, failed};

fn tags<'a>(id: &'a str, key: &'a str, value: &'a str) -> Vec<(&'a str, &'a str)> {
    vec![("resourceids", id), ("resourcetype", "Volume"), ("tags[0].key", key), ("tags[0].value", value)]
}

#[test]
fn a_key_is_unique_and_goes_only_with_its_value() {
    let cloud = FakeCloud::start(Options::default()).unwrap();
    let id = create(&cloud, "v", "1");
    done(&cloud, "createTags", &tags(&id, "volfs", "me/1"));
    let (code, text) = failed(&cloud, "createTags", &tags(&id, "volfs", "you/1"));
    assert_eq!((code, text), (530, format!("tag volfs already on Volume with id {id}")));
    assert_eq!(failed(&cloud, "deleteTags", &tags(&id, "volfs", "you/1")), (530, "Failed to delete tags".into()));
    let shown = call(&cloud, "listVolumes", &tags(&id, "volfs", "me/1")[2..]);
    assert_eq!(shown["volume"][0]["tags"][0]["value"], "me/1");
    assert_eq!(call(&cloud, "listTags", &[("resourceid", &id)])["tag"][0]["key"], "volfs");
    done(&cloud, "deleteTags", &tags(&id, "volfs", "me/1"));
    assert_eq!(call(&cloud, "listVolumes", &tags(&id, "volfs", "me/1")[2..]), json!({}));
    assert_eq!((cloud.effects(Effect::Tagged, Some(&id)), cloud.effects(Effect::Untagged, Some(&id))), (1, 1));
}

#[test]
fn of_several_tags_all_are_set_or_none() {
    let cloud = FakeCloud::start(Options::default()).unwrap();
    let id = create(&cloud, "v", "1");
    cloud.set_tag(&id, "b", "1").unwrap();
    let mut params = tags(&id, "a", "1");
    params.extend([("tags[1].key", "B"), ("tags[1].value", "2")]);
    assert_eq!(failed(&cloud, "createTags", &params).0, 530, "keys do not differ by case");
    assert_eq!(cloud.volume(&id).unwrap().tags.len(), 1);
    done(&cloud, "deleteTags", &[("resourceids", &id), ("resourcetype", "volume")]);
    assert!(cloud.volume(&id).unwrap().tags.is_empty());
}

#[test]
fn an_unknown_or_foreign_resource_fails_in_the_job() {
    let options = Options { accounts: vec![Account::new("one"), Account::new("other")], ..Options::default() };
    let cloud = FakeCloud::start(options).unwrap();
    let id = create(&cloud, "v", "1");
    assert_eq!(failed(&cloud, "createTags", &tags("nothing", "k", "v")).0, 431);
    cloud.change_volume(&id, |v| v.account = "other".into()).unwrap();
    assert_eq!(failed(&cloud, "createTags", &tags(&id, "k", "v")).0, 530);
}

#[test]
fn tags_can_be_hidden() {
    let cloud = FakeCloud::start(Options::default()).unwrap();
    let id = create(&cloud, "v", "1");
    cloud.set_tag(&id, "k", "v").unwrap();
    cloud.fault(Fault::new("listVolumes", Kind::TagsHidden));
    let shown = || call(&cloud, "listVolumes", &[("id", &id)])["volume"][0]["tags"].as_array().unwrap().len();
    assert_eq!([shown(), shown()], [0, 1]);
}
