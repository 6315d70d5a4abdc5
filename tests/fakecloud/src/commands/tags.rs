//! createTags, deleteTags, listTags (2.17): keys are unique per resource.

use serde_json::{Value, json};

use super::may;
use crate::answer::Refusal;
use crate::api::Call;
use crate::params::invalid;
use crate::state::World;
use crate::work::Work;

/// Longest value.
const LONGEST: usize = 255;

/// The resources named, all of them known and this account's.
fn resources(call: &Call<'_>, world: &World) -> Result<(&'static str, Vec<String>), Refusal> {
    let kind = call.need("resourcetype")?;
    let kind = ["Volume", "Snapshot"]
        .into_iter()
        .find(|k| k.eq_ignore_ascii_case(kind))
        .ok_or_else(|| Refusal::parameter(format!("Invalid resource type: {kind}")))?;
    call.need("resourceids")?;
    let ids: Vec<_> = call.params.list("resourceids").unwrap_or_default().into_iter().map(str::to_owned).collect();
    for id in &ids {
        let allowed = match kind {
            "Volume" => world.volumes.get(id).map(|v| may(&call.account, v)),
            _ => world.snapshots.get(id).map(|s| may(&call.account, s)),
        };
        match allowed {
            None => return Err(invalid(call.command, "resourceids", id)),
            Some(false) => return Err(Refusal::denied("Acct does not have permission to operate with resource")),
            Some(true) => {}
        }
    }
    Ok((kind, ids))
}

pub(super) fn create(call: &Call<'_>) -> Result<Value, Refusal> {
    let mut world = call.core.world.lock();
    let (kind, ids) = resources(call, &world)?;
    let mut tags = Vec::new();
    for (key, value) in call.params.tags()? {
        let value = value.unwrap_or_default();
        if key.is_empty() || value.is_empty() || key.chars().count() > LONGEST || value.chars().count() > LONGEST {
            return Err(Refusal::parameter(format!("Value for the key {key} is either null or too long")));
        }
        tags.push((key, value));
    }
    if tags.is_empty() {
        call.need("tags")?;
    }
    let first = ids.first().cloned().unwrap_or_default();
    let job = call.submit(&mut world, Some((kind, &first)), None, Ok(Work::Tag { resources: ids, tags }))?;
    Ok(json!({ "jobid": job }))
}

pub(super) fn delete(call: &Call<'_>) -> Result<Value, Refusal> {
    let mut world = call.core.world.lock();
    let (kind, ids) = resources(call, &world)?;
    let tags = call.params.tags()?;
    let first = ids.first().cloned().unwrap_or_default();
    let job = call.submit(&mut world, Some((kind, &first)), None, Ok(Work::Untag { resources: ids, tags }))?;
    Ok(json!({ "jobid": job }))
}

pub(super) fn list(call: &Call<'_>) -> Result<Value, Refusal> {
    let world = call.core.world.lock();
    let wanted = |name: &str, value: &str| call.params.get(name).is_none_or(|w| w.eq_ignore_ascii_case(value));
    let volumes = world.volumes.values().filter(|v| v.exists() && call.sees(*v));
    let volumes = volumes.map(|v| ("Volume", &v.id, &v.account, &v.tags));
    let snapshots = world.snapshots.values().filter(|s| s.state != "Destroyed" && call.sees(*s));
    let snapshots = snapshots.map(|s| ("Snapshot", &s.id, &s.account, &s.tags));
    let mut all = Vec::new();
    for (kind, id, account, tags) in volumes.chain(snapshots) {
        if !wanted("resourcetype", kind) || !wanted("resourceid", id) {
            continue;
        }
        for (key, value) in tags.iter().filter(|(k, v)| wanted("key", k) && wanted("value", v)) {
            all.push(json!({
                "key": key, "value": value, "resourcetype": kind, "resourceid": id, "account": account,
                "domain": "ROOT",
            }));
        }
    }
    call.list("tag", all)
}
