//! Who is let in, and in what shapes answers come (section 1).

use std::io::{Read, Write};
use std::net::TcpStream;

use fakecloud::sign::{escape, sha1, sha512};
use fakecloud::{Account, FakeCloud, Offering, Options, Signatures, Zone};
use serde_json::{Value, json};

use crate::client::{PATIENCE, call, create, form, refused, send, try_call};

const UNVERIFIED: &str = "unable to verify user credentials and/or request signature";

fn cloud() -> FakeCloud {
    FakeCloud::start(Options::default()).unwrap()
}

/// A request as `cs` and volfs send it, `seconds` before its expiry.
fn expiring(cloud: &FakeCloud, expires: &str) -> (u16, Value) {
    try_call(cloud, "listZones", &[("signatureVersion", "3"), ("expires", expires)])
}

fn get(cloud: &FakeCloud, query: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(cloud.address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET /client/api?{query} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

#[test]
fn a_request_without_a_right_signature_is_not_let_in() {
    let cloud = cloud();
    let right = form(&cloud, "listZones", &[]);
    assert_eq!(send(&cloud, &right).0, 200);
    for wrong in [
        right.replace("signature=", "signature=A"),
        format!("{right}&name=more"),
        format!("{right}&name=a&name=a"),
        right.replace("signature", "sig"),
        right.replace(&cloud.key(), "nobody"),
        "command=listZones".into(),
    ] {
        let (status, body) = send(&cloud, &wrong);
        assert_eq!(status, 401, "{wrong}");
        let answer: Value = serde_json::from_str(&body).unwrap();
        let inner = json!({"uuidList": [], "errorcode": 401, "cserrorcode": 9999, "errortext": UNVERIFIED});
        assert_eq!(answer, json!({"listzonesresponse": inner}));
    }
    // Even where both are signed.
    assert_eq!(refused(&cloud, "listZones", &[("name", "a"), ("name", "a")]).0, 401);
}

#[test]
fn names_are_taken_in_any_case_but_the_command_is_not() {
    let cloud = cloud();
    assert_eq!(call(&cloud, "listZones", &[("NAME", "zone-1")])["count"], 1);
    let (status, body) = send(&cloud, &form(&cloud, "listzones", &[]));
    assert_eq!(status, 401);
    assert!(body.starts_with("{\"errorresponse\":"), "{body}");
}

#[test]
fn no_command_is_432() {
    let cloud = cloud();
    let (status, body) = send(&cloud, "response=json");
    assert_eq!(status, 432);
    assert!(body.starts_with("{\"errorresponse\":"), "{body}");
}

#[test]
fn expiry_counts_with_version_3_only_and_against_the_servers_clock() {
    let cloud = cloud();
    assert_eq!(expiring(&cloud, "2099-02-03T04:05:06+0000").0, 200);
    assert_eq!(expiring(&cloud, "2099-02-03T04:05:06Z").0, 200);
    for past in ["2020-02-03T04:05:06+0000", "rubbish"] {
        assert_eq!(expiring(&cloud, past).0, 401, "{past}");
        assert_eq!(try_call(&cloud, "listZones", &[("expires", past)]).0, 200, "{past}");
    }
    // A century ahead.
    cloud.set_clock(100 * 366 * 86400);
    assert_eq!(expiring(&cloud, "2099-02-03T04:05:06+0000").0, 401);
}

#[test]
fn under_enforcement_changes_come_by_post_and_expire_soon() {
    let cloud = FakeCloud::start(Options { enforce_post: true, ..Options::default() }).unwrap();
    let (status, body) = get(&cloud, &form(&cloud, "createVolume", &[]));
    assert_eq!(status, 400);
    assert!(body.contains("State changing command createVolume needs to be sent using POST request"), "{body}");
    assert_eq!(try_call(&cloud, "listZones", &[]).0, 401, "version 3 is needed");
    assert_eq!(expiring(&cloud, "2099-02-03T04:05:06+0000").0, 401, "too far ahead");
}

#[test]
fn a_get_is_answered_as_a_post_is() {
    let cloud = cloud();
    let (status, body) = get(&cloud, &form(&cloud, "listZones", &[("name", "no such")]));
    assert_eq!((status, body.as_str()), (200, "{\"listzonesresponse\":{}}"));
    assert_eq!(cloud.requests()[0].method, "GET");
}

#[test]
fn only_the_hash_that_a_server_takes_lets_in() {
    let cloud = cloud();
    let params = |hash: fn(&[(String, String)], &str) -> String| {
        let pairs = [("apiKey", cloud.key()), ("command", "listZones".into()), ("response", "json".into())];
        let mut all = pairs.map(|(n, v)| (n.to_owned(), v)).to_vec();
        all.push(("signature".into(), hash(&all, &cloud.secret())));
        let pairs: Vec<_> = all.iter().map(|(n, v)| format!("{n}={}", escape(v))).collect();
        pairs.join("&")
    };
    for (taken, by_sha1, by_sha512) in
        [(Signatures::Sha1, 200, 401), (Signatures::Sha512, 401, 200), (Signatures::Either, 200, 200)]
    {
        cloud.set_signatures(taken);
        let found = (send(&cloud, &params(sha1)).0, send(&cloud, &params(sha512)).0);
        assert_eq!(found, (by_sha1, by_sha512), "{taken:?}");
    }
}

#[test]
fn a_role_that_forbids_a_command_says_so() {
    let mut account = Account::new("small");
    account.forbidden = vec!["createTags".into()];
    let cloud = FakeCloud::start(Options { accounts: vec![account], ..Options::default() }).unwrap();
    let (code, text) = refused(&cloud, "createTags", &[]);
    assert_eq!(code, 401);
    assert_eq!(text, "The given command 'createTags' either does not exist, is not available for user.");
    assert_eq!(refused(&cloud, "listApis", &[("name", "createTags")]).0, 530);
}

#[test]
fn the_limit_refuses_with_the_time_to_wait_in_its_text() {
    let cloud = FakeCloud::start(Options { rate_limit: Some(2), ..Options::default() }).unwrap();
    // Three calls within one window of a second, whenever it began.
    let limited = (0..100).map(|_| try_call(&cloud, "listZones", &[])).find(|(status, _)| *status == 429);
    let (_, inner) = limited.expect("a refusal");
    assert_eq!(inner["cserrorcode"], 4545);
    let text = inner["errortext"].as_str().unwrap();
    let ms: u64 = text.split(['[', ']']).nth(1).unwrap().parse().unwrap();
    assert!((1..=1000).contains(&ms), "{text}");
}

#[test]
fn a_control_character_is_refused() {
    assert_eq!(refused(&cloud(), "listZones", &[("name", "a\u{1}b")]).0, 431);
    assert_eq!(try_call(&cloud(), "listZones", &[("name", "a\nb")]).0, 200);
}

#[test]
fn what_jetty_refuses_is_no_json() {
    let cloud = cloud();
    let (status, body) = get(&cloud, &"x".repeat(9000));
    assert_eq!(status, 431);
    assert!(body.starts_with("<html>"), "{body}");
}

#[test]
fn volumes_come_in_pages_newest_first_and_count_is_the_total() {
    let cloud = FakeCloud::start(Options { page_size: 4, ..Options::default() }).unwrap();
    let made: Vec<_> = (0..5).map(|n| create(&cloud, &format!("v{n}"), "1")).collect();
    let shown = |params: &[(&str, &str)]| {
        let all = [&[("type", "DATADISK")], params].concat();
        let list = call(&cloud, "listVolumes", &all);
        let ids = list["volume"].as_array().into_iter().flatten().map(|v| v["id"].as_str().unwrap().to_owned());
        (list["count"].clone(), ids.collect::<Vec<_>>())
    };
    let (count, first) = shown(&[]);
    assert_eq!((count, first.len()), (json!(5), 4), "the first rows, and nothing says that there are more but count");
    let pages = [shown(&[("page", "1"), ("pagesize", "3")]).1, shown(&[("page", "2"), ("pagesize", "3")]).1].concat();
    let mut sorted = pages.clone();
    sorted.sort();
    let mut all = made;
    all.sort();
    assert_eq!(sorted, all);
    assert_eq!(
        call(&cloud, "listVolumes", &[("type", "DATADISK"), ("page", "3"), ("pagesize", "3")]),
        json!({"count": 5})
    );
    let (_, text) = refused(&cloud, "listVolumes", &[("page", "1"), ("pagesize", "5")]);
    assert_eq!(text, "Page size can't exceed max allowed page size value: 4");
}

#[test]
fn the_log_has_every_parameter_and_no_secret() {
    let cloud = cloud();
    call(&cloud, "listVolumes", &[("name", "x y")]);
    let log = cloud.requests();
    assert_eq!((cloud.calls("listVolumes"), log[0].status), (1, 200));
    assert_eq!(log[0].params["name"], "x y");
    let text = format!("{log:?}");
    assert!(!text.contains(&cloud.key()) && !text.to_lowercase().contains("signature"), "{text}");
}

#[test]
fn a_volume_is_seen_by_its_account_and_a_projects_only_when_asked_for() {
    let (mut one, other) = (Account::new("one"), Account::new("other"));
    let project = "7d6a6cf0-0000-4000-8000-000000000001";
    one.projects = vec![project.into()];
    let options = Options { accounts: vec![one, other], ..Options::default() };
    let cloud = FakeCloud::start(options).unwrap();
    let id = create(&cloud, "mine", "1");
    cloud.change_volume(&id, |v| v.project = Some(project.into())).unwrap();
    assert_eq!(call(&cloud, "listVolumes", &[("type", "DATADISK")]), json!({}));
    assert_eq!(call(&cloud, "listVolumes", &[("projectid", project)])["count"], 1);
    assert_eq!(call(&cloud, "listVolumes", &[("type", "DATADISK"), ("projectid", "-1")])["count"], 1);
    cloud.change_volume(&id, |v| (v.project, v.account) = (None, "other".into())).unwrap();
    assert_eq!(call(&cloud, "listVolumes", &[("id", &id)]), json!({}));
    assert_eq!(refused(&cloud, "attachVolume", &[("id", &id), ("virtualmachineid", &cloud.host())]).0, 531);
}

#[test]
fn zones_offerings_and_abilities_are_as_they_were_set_up() {
    let options = Options {
        zones: vec![Zone::new("a"), Zone::new("b")],
        offerings: vec![Offering::custom("c"), Offering::fixed("f", 5)],
        version: "4.19.1.0".into(),
        ..Options::default()
    };
    let cloud = FakeCloud::start(options).unwrap();
    assert_eq!(call(&cloud, "listZones", &[("name", "b")])["zone"][0]["id"], cloud.zones()[1].id);
    let offerings = call(&cloud, "listDiskOfferings", &[]);
    assert_eq!(offerings["diskoffering"][1]["disksize"], 5);
    assert_eq!(offerings["diskoffering"][0]["iscustomized"], true);
    assert_eq!(call(&cloud, "listCapabilities", &[])["capability"]["cloudstackversion"], "4.19.1.0");
    assert_eq!(call(&cloud, "listApis", &[("name", "attachVolume")])["api"][0]["isasync"], true);
    let vm = call(&cloud, "listVirtualMachines", &[("id", &cloud.host()), ("details", "min")]);
    assert_eq!(vm["virtualmachine"][0]["state"], "Running");
    assert!(vm["virtualmachine"][0].get("details").is_none());
}
