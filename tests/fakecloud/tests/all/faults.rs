//! Faults on the wire.

use std::time::{Duration, Instant};

use fakecloud::{Effect, FakeCloud, Fault, Kind, Options};
use serde_json::Value;

use crate::client::{call, create, form, refused, send, try_call};

fn cloud() -> FakeCloud {
    FakeCloud::start(Options::default()).unwrap()
}

/// A createVolume that fails by this kind; what came back, and how many volumes there are then.
fn creation(cloud: &FakeCloud, kind: Kind) -> (u16, String, usize) {
    cloud.clear_log();
    cloud.fault(Fault::new("createVolume", kind));
    let (zone, offering) = (cloud.zones()[0].id.clone(), cloud.offerings()[0].id.clone());
    let params = [("zoneid", zone.as_str()), ("diskofferingid", &offering), ("size", "1")];
    let (status, body) = send(cloud, &form(cloud, "createVolume", &params));
    assert_eq!(cloud.calls("createVolume"), 1);
    (status, body, cloud.effects(Effect::Created, None))
}

#[test]
fn a_connection_is_dropped_before_or_after_the_act() {
    let cloud = cloud();
    assert_eq!(creation(&cloud, Kind::DropBefore), (0, String::new(), 0));
    assert_eq!(creation(&cloud, Kind::DropAfter), (0, String::new(), 1));
    create(&cloud, "then all is well", "1");
}

#[test]
fn a_proxy_answers_in_html_whether_or_not_the_act_was_done() {
    let cloud = cloud();
    for (acted, made) in [(false, 0), (true, 1)] {
        let (status, body, found) = creation(&cloud, Kind::Html { status: 502, acted });
        assert!(status == 502 && body.starts_with("<html>") && found == made, "{status} {body} {found}");
    }
}

#[test]
fn half_of_an_answer_and_no_answer_at_all_come_after_the_act() {
    let cloud = cloud();
    let (status, body, made) = creation(&cloud, Kind::Truncated);
    assert!(status == 200 && !body.is_empty() && made == 1);
    assert!(serde_json::from_str::<Value>(&body).is_err(), "{body}");
    let (status, body, made) = creation(&cloud, Kind::Garbage);
    assert!(status == 200 && made == 1);
    assert!(serde_json::from_str::<Value>(&body).is_err(), "{body}");
}

#[test]
fn errors_are_given_in_the_servers_shape_and_nothing_is_done() {
    let cloud = cloud();
    let own = Kind::Error { code: 533, cs: 4250, text: "no capacity".into() };
    for (kind, code, words) in [
        (Kind::Maintenance, 503, "Maintenance"),
        (Kind::Unauthorized, 401, "signature"),
        (Kind::RateLimited(250), 429, "please retry after [250] ms."),
        (own, 533, "no capacity"),
    ] {
        let (status, body, made) = creation(&cloud, kind);
        let answer: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, made), (code, 0));
        assert_eq!(answer["createvolumeresponse"]["errorcode"], code);
        assert!(answer["createvolumeresponse"]["errortext"].as_str().unwrap().contains(words), "{body}");
    }
}

#[test]
fn delays_come_before_or_after_the_act() {
    let cloud = cloud();
    let time = Duration::from_millis(100);
    for kind in [Kind::DelayBefore(time), Kind::DelayAfter(time)] {
        let began = Instant::now();
        assert_eq!(creation(&cloud, kind).0, 200);
        assert!(began.elapsed() >= time);
    }
}

#[test]
fn rules_count_their_own_requests_and_go_when_they_are_used_up() {
    let cloud = cloud();
    cloud.fault(Fault::new("listZones", Kind::Unauthorized).skip(1).times(2));
    cloud.fault(Fault::new("*", Kind::Maintenance).skip(3));
    let statuses: Vec<_> = (0..6).map(|_| try_call(&cloud, "listZones", &[]).0).collect();
    assert_eq!(statuses, [200, 401, 401, 200, 200, 503]);
    cloud.fault(Fault::new("listZones", Kind::Unauthorized).forever());
    assert_eq!(refused(&cloud, "listZones", &[]).0, 401);
    cloud.clear_faults();
    call(&cloud, "listZones", &[]);
}

#[test]
fn kinds_work_together() {
    let cloud = cloud();
    let id = create(&cloud, "v", "1");
    cloud.fault(Fault::new("attachVolume", Kind::All(vec![Kind::JobLost, Kind::DropAfter])));
    let (status, _) = send(&cloud, &form(&cloud, "attachVolume", &[("id", &id), ("virtualmachineid", &cloud.host())]));
    assert_eq!(status, 0);
    let job = cloud.jobs().into_iter().find(|j| j.command == "attachVolume").unwrap();
    assert_eq!(refused(&cloud, "queryAsyncJobResult", &[("jobid", &job.id)]).0, 431);
}

#[test]
fn an_order_that_changes_between_calls_shows_what_a_page_hides() {
    let cloud = FakeCloud::start(Options { unstable_order: true, ..Options::default() }).unwrap();
    for n in 0..4 {
        create(&cloud, &format!("v{n}"), "1");
    }
    let names = || {
        let list = call(&cloud, "listVolumes", &[("keyword", "v")]);
        list["volume"].as_array().unwrap().iter().map(|v| v["name"].to_string()).collect::<Vec<_>>()
    };
    let (one, two) = (names(), names());
    let (mut a, mut b) = (one.clone(), two.clone());
    a.sort();
    b.sort();
    assert!(one != two && a == b, "{one:?} {two:?}");
}
