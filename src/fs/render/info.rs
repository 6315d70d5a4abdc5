//! `info.json` and `operations/ID`: one JSON object on one line.

use serde_json::{Value, json};

use super::super::tree::View;
use crate::engine::world::{ErrorText, HistoryRow, Operation, Snapshot, Volume};
use crate::model::{Caller, Mark, Timestamp};

fn time(at: Timestamp) -> String {
    at.to_string()
}

fn caller(c: &Caller) -> Value {
    json!({ "uid": c.uid, "gid": c.gid, "pid": c.pid, "command": c.comm })
}

fn error(e: &ErrorText) -> Value {
    json!({
        "time": time(e.at),
        "verb": &*e.verb,
        "pid": e.pid,
        "errno": e.error.errno().name(),
        "sentence": e.error.to_string(),
    })
}

fn history(h: &HistoryRow) -> Value {
    json!({
        "time": time(h.at),
        "id": h.op,
        "operation": h.verb.as_str(),
        "job": h.job.as_ref().map(|j| j.as_str()),
        "disk": h.disk.as_ref().map(|d| d.as_str()),
        "outcome": h.outcome.as_str(),
        "sentence": &*h.sentence,
        "milliseconds": h.took_ms,
        "caller": caller(&h.caller),
    })
}

fn operation_value(op: &Operation) -> Value {
    let ended = op.ended.as_ref().map(
        |(outcome, sentence, at)| json!({ "time": time(*at), "outcome": outcome.as_str(), "sentence": &**sentence }),
    );
    json!({
        "id": op.id,
        "fence": op.fence,
        "operation": op.verb.as_str(),
        "command": &*op.command,
        "job": op.job.as_ref().map(|(_, id)| id.as_str()),
        "disk": op.disk.as_ref().map(|d| d.as_str()),
        "uuid": op.volume,
        "parent": op.parent,
        "step": &*op.step,
        "began": time(op.began),
        "callers": op.joined,
        "caller": caller(&op.caller),
        "ended": ended,
    })
}

/// `operations/ID`.
pub fn operation(op: &Operation) -> String {
    format!("{}\n", operation_value(op))
}

fn snapshot_value(s: &Snapshot) -> Value {
    json!({
        "name": s.name.as_str(),
        "id": s.id,
        "ours": s.row.is_some(),
        "state": (!s.state.is_empty()).then_some(&*s.state),
        "size": (s.size > 0).then_some(s.size),
        "created": s.created.map(time),
    })
}

/// `snapshots/NAME`: as last seen. What the cloud has not told is null.
pub fn snapshot(s: &Snapshot) -> String {
    format!("{}\n", snapshot_value(s))
}

/// `info.json`: as last verified, one consistent snapshot.
pub fn volume(view: &View<'_>, v: &Volume) -> String {
    let world = view.world;
    let device = v.device().map(|m| {
        json!({
            "path": format!("/dev/{}", m.name),
            "number": m.dev.to_string(),
            "boot": m.incarnation.boot,
            "diskseq": m.incarnation.diskseq,
            "size": m.size,
            "since": time(m.at),
        })
    });
    let running = v.running.and_then(|r| world.operations.get(&r.op)).map(|op| operation_value(op));
    let info = json!({
        "uuid": v.uuid,
        "job": view.job(v.job).ok().map(|j| j.id.to_string()),
        "disk": v.disk.as_str(),
        "status": v.status().as_str(),
        "settled_status": v.base.as_str(),
        "why": v.why.as_deref(),
        "device": device,
        "vm": v.vm,
        "device_id": v.device_id,
        "name": &*v.name,
        "size": v.size,
        "serial": &*v.serial,
        "cloud_state": &*v.cloud_state,
        "owner": &*v.owner,
        "mark": (!v.imported()).then(|| Mark { record: world.record, epoch: v.epoch }.to_string()),
        "operation": running,
        "error": v.error.as_deref().map(error),
        "history": v.history.iter().map(|h| history(h)).collect::<Vec<_>>(),
        "snapshots": v.snapshots.iter().map(snapshot_value).collect::<Vec<_>>(),
        "owned_since": time(v.times.owned),
        "status_since": time(v.times.status),
        "seen": time(world.at),
        "version": world.seq,
    });
    format!("{info}\n")
}
