//! The smallest client: one signed POST on a connection of its own.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use fakecloud::FakeCloud;
use fakecloud::sign::{escape, sha1};
use serde_json::Value;

/// Longest time anything here is waited for.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Status and body of one POST, not signed.
pub fn send(cloud: &FakeCloud, form: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(cloud.address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!(
        "POST /client/api HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n{form}",
        form.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let Some((head, body)) = answer.split_once("\r\n\r\n") else { return (0, answer) };
    (head[9..12].parse().unwrap(), body.to_owned())
}

/// The signed form of a command.
pub fn form(cloud: &FakeCloud, command: &str, params: &[(&str, &str)]) -> String {
    let key = cloud.key();
    let common = [("apiKey", key.as_str()), ("response", "json"), ("command", command)];
    let mut all: Vec<_> = common.iter().chain(params).map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    all.push(("signature".into(), sha1(&all, &cloud.secret())));
    let pairs: Vec<_> = all.iter().map(|(n, v)| format!("{}={}", escape(n), escape(v))).collect();
    pairs.join("&")
}

/// Status, and the object inside the one key.
pub fn try_call(cloud: &FakeCloud, command: &str, params: &[(&str, &str)]) -> (u16, Value) {
    let (status, body) = send(cloud, &form(cloud, command, params));
    let value: Value = serde_json::from_str(&body).unwrap_or_else(|e| panic!("{command}: {status} {body}: {e}"));
    let inner = value.as_object().and_then(|o| o.values().next()).cloned().unwrap();
    (status, inner)
}

/// A call that must succeed.
#[track_caller]
pub fn call(cloud: &FakeCloud, command: &str, params: &[(&str, &str)]) -> Value {
    let (status, inner) = try_call(cloud, command, params);
    assert_eq!(status, 200, "{command} {params:?}: {inner}");
    inner
}

/// The job of an async call when it is final.
#[track_caller]
pub fn job(cloud: &FakeCloud, command: &str, params: &[(&str, &str)]) -> Value {
    let accepted = call(cloud, command, params);
    ended(cloud, accepted["jobid"].as_str().unwrap())
}

/// A job when it is final.
#[track_caller]
pub fn ended(cloud: &FakeCloud, id: &str) -> Value {
    assert!(cloud.wait_for(PATIENCE, |c| c.job(id).is_some_and(|j| j.done())), "job {id} does not end");
    call(cloud, "queryAsyncJobResult", &[("jobid", id)])
}

/// A job that must succeed; its result.
#[track_caller]
pub fn done(cloud: &FakeCloud, command: &str, params: &[(&str, &str)]) -> Value {
    let job = job(cloud, command, params);
    assert_eq!(job["jobstatus"], 1, "{command} {params:?}: {job}");
    job["jobresult"].clone()
}

/// Code and text of a job that must fail.
#[track_caller]
pub fn failed(cloud: &FakeCloud, command: &str, params: &[(&str, &str)]) -> (u64, String) {
    let job = job(cloud, command, params);
    assert_eq!(job["jobstatus"], 2, "{command} {params:?}: {job}");
    let text = job["jobresult"]["errortext"].as_str().unwrap_or_default().to_owned();
    (job["jobresultcode"].as_u64().unwrap(), text)
}

/// Errorcode and text of a call that must be refused.
#[track_caller]
pub fn refused(cloud: &FakeCloud, command: &str, params: &[(&str, &str)]) -> (u16, String) {
    let (status, inner) = try_call(cloud, command, params);
    assert_eq!(inner["errorcode"], status, "{command} {params:?}: {inner}");
    assert_ne!(status, 200, "{command} {params:?}: {inner}");
    (status, inner["errortext"].as_str().unwrap().to_owned())
}

/// A new volume of the customised offering; its id.
#[track_caller]
pub fn create(cloud: &FakeCloud, name: &str, gib: &str) -> String {
    let (zone, offering) = (cloud.zones()[0].id.clone(), cloud.offerings()[0].id.clone());
    let params = [("name", name), ("zoneid", &zone), ("diskofferingid", &offering), ("size", gib)];
    let result = done(cloud, "createVolume", &params);
    result["volume"]["id"].as_str().unwrap().to_owned()
}

/// Attaches to the host and waits.
#[track_caller]
pub fn attach(cloud: &FakeCloud, volume: &str) -> Value {
    done(cloud, "attachVolume", &[("id", volume), ("virtualmachineid", &cloud.host())])["volume"].clone()
}
