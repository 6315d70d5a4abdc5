//! createTags, deleteTags, listTags (2.17): keys are unique per resource.
//!
//! Beyond the page, from `TaggedResourceManagerImpl`, `CreateTagsCmd` and `DeleteTagsCmd`: the ids are
//! plain strings to the request, so that unknown ones and foreign ones fail in the job; the job names
//! no resource, so that no volume shows it; deleteTags compares keys and values regardless of case,
//! and with nothing to delete it fails with 530.

use serde_json::{Value, json};

use crate::answer::Refusal;
use crate::api::Call;
use crate::tagging::Tagging;
use crate::work::Work;

/// Longest key and value.
const LONGEST: usize = 255;

/// The type, and the ids as sent.
fn resources(call: &Call<'_>) -> Result<(String, Vec<String>), Refusal> {
    let kind = call.need("resourcetype")?.to_owned();
    call.need("resourceids")?;
    let ids = call.params.list("resourceids").unwrap_or_default();
    Ok((kind, ids.into_iter().map(str::to_owned).collect()))
}

pub(super) fn create(call: &Call<'_>) -> Result<Value, Refusal> {
    let (kind, resources) = resources(call)?;
    let mut tags = Vec::new();
    for (key, value) in call.params.tags()? {
        let value = value.unwrap_or_default();
        if key.chars().count() > LONGEST || value.chars().count() > LONGEST {
            return Err(Refusal::parameter(format!("Length of the tag {key} is above {LONGEST}")));
        }
        tags.push((key, value));
    }
    if tags.is_empty() {
        call.need("tags")?;
    }
    let work = Work::Tag(Tagging { caller: call.account.clone(), kind, resources, tags });
    let job = call.submit(&mut call.core.world.lock(), None, None, Ok(work))?;
    Ok(json!({ "jobid": job }))
}

pub(super) fn delete(call: &Call<'_>) -> Result<Value, Refusal> {
    let (kind, resources) = resources(call)?;
    let work = Work::Untag(Tagging { caller: call.account.clone(), kind, resources, tags: call.params.tags()? });
    let job = call.submit(&mut call.core.world.lock(), None, None, Ok(work))?;
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
