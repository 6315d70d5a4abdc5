//! Snapshots of volumes (2.8).

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{shown, volume_known};
use crate::answer::{Failure, Refusal};
use crate::api::Call;
use crate::options::uuid;
use crate::state::{Snapshot, World};
use crate::time;
use crate::work::Work;

/// States in which a snapshot still works on its volume.
const ACTIVE: &[&str] = &["Allocated", "Creating", "CreatedOnPrimary", "BackingUp", "Copying"];

/// The row is made in the request; only one at a time on a VM (2.8).
pub(super) fn create(call: &Call<'_>) -> Result<Value, Refusal> {
    let mut world = call.core.world.lock();
    let volume = call.own("volumeid", |id| world.volumes.get(id))?.clone();
    if !volume.exists() || volume.state == "Destroy" {
        return Err(Refusal::parameter("Snapshot creation failed due to volume is not found or destroyed"));
    }
    if volume.state == "Allocated" {
        let name = &volume.name;
        return Err(Refusal::parameter(format!(
            "VolumeId: {name} is not in Ready state but Allocated. Cannot take snapshot: please attach this volume to a VM before create snapshot for it"
        )));
    }
    if volume.state != "Ready" {
        let (name, state) = (&volume.name, &volume.state);
        return Err(Refusal::parameter(format!(
            "VolumeId: {name} is not in Ready state but {state}. Cannot take snapshot."
        )));
    }
    if let Some(vm) = &volume.vm
        && active_on(&world, vm)
    {
        return Err(Refusal::parameter(
            "There is other active snapshot tasks on the instance to which the volume is attached, please try again later",
        ));
    }
    let id = uuid();
    let name = call.params.get("name").map_or_else(|| format!("{}_{}", volume.name, time::now()), str::to_owned);
    let snapshot = Snapshot {
        id: id.clone(),
        volume: volume.id.clone(),
        name,
        state: "Allocated".into(),
        size: volume.size,
        created: time::now(),
        account: volume.account.clone(),
        tags: call.params.tags()?.into_iter().map(|(k, v)| (k, v.unwrap_or_default())).collect::<BTreeMap<_, _>>(),
    };
    world.snapshots.insert(id.clone(), snapshot);
    let work = Work::Snapshot { snapshot: id.clone(), volume: volume.id.clone() };
    let job = call.submit(&mut world, Some(("Snapshot", &id)), volume.vm.clone(), Ok(work));
    let job = job.inspect_err(|_| drop(world.snapshots.remove(&id)))?;
    Ok(json!({"id": id, "jobid": job}))
}

/// Whether a snapshot runs on a volume of this VM.
pub(crate) fn active_on(world: &World, vm: &str) -> bool {
    let on = |s: &&Snapshot| world.volumes.get(&s.volume).is_some_and(|v| v.vm.as_deref() == Some(vm));
    world.snapshots.values().filter(on).any(|s| ACTIVE.contains(&s.state.as_str()))
}

pub(super) fn delete(call: &Call<'_>) -> Result<Value, Refusal> {
    let mut world = call.core.world.lock();
    let snapshot = call.own("id", |id| world.snapshots.get(id))?;
    let id = snapshot.id.clone();
    let work = match snapshot.state.as_str() {
        "Destroyed" => Err(Failure::parameter(format!("Snapshot with id {id} is already destroyed"))),
        state if ACTIVE.contains(&state) => {
            Err(Failure::parameter(format!("Can't delete snapshotshot {id} due to it is in {state} Status")))
        }
        _ => Ok(Work::DeleteSnapshot { snapshot: id.clone() }),
    };
    let job = call.submit(&mut world, Some(("Snapshot", &id)), None, work)?;
    Ok(json!({ "jobid": job }))
}

pub(super) fn revert(call: &Call<'_>) -> Result<Value, Refusal> {
    let mut world = call.core.world.lock();
    let snapshot = call.own("id", |id| world.snapshots.get(id))?;
    let (id, volume_id) = (snapshot.id.clone(), snapshot.volume.clone());
    let volume = world.volumes.get(&volume_id).filter(|v| v.exists());
    let vm = volume.and_then(|v| v.vm.as_ref()).and_then(|vm| world.vms.get(vm));
    let work = match volume {
        None => Err(Failure::parameter("unable to find the volume of the snapshot")),
        Some(_) if snapshot.state != "BackedUp" => {
            Err(Failure::parameter("Snapshot is not in BackedUp state and cannot be reverted to"))
        }
        Some(v) if v.state != "Ready" => {
            Err(Failure::parameter("Can't revert the volume to a snapshot as it is not in Ready state"))
        }
        Some(_) if vm.is_some_and(|vm| !matches!(vm.state.as_str(), "Stopped" | "Shutdown")) => {
            Err(Failure::parameter("The VM the specified disk is attached to is not in the shutdown state."))
        }
        Some(_) if vm.is_some_and(|vm| vm.vm_snapshots > 0) => {
            Err(Failure::parameter("Unable to revert volume snapshot: the VM has VM snapshots"))
        }
        Some(_) => Ok(Work::Revert { snapshot: id.clone(), volume: volume_id }),
    };
    let queue = vm.map(|vm| vm.id.clone());
    let job = call.submit(&mut world, Some(("Snapshot", &id)), queue, work)?;
    Ok(json!({ "jobid": job }))
}

pub(super) fn list(call: &Call<'_>) -> Result<Value, Refusal> {
    let world = call.core.world.lock();
    let ids = call.ids(|id| world.snapshots.contains_key(id))?;
    let volume = call.known("volumeid", volume_known(&world))?;
    let name = call.params.get("name");
    let mut all: Vec<_> = world
        .snapshots
        .values()
        .filter(|s| {
            call.sees(*s)
                && s.state != "Destroyed"
                && ids.as_ref().is_none_or(|ids| ids.contains(&s.id.as_str()))
                && volume.is_none_or(|v| v == s.volume)
                && name.is_none_or(|n| n == s.name)
        })
        .collect();
    all.sort_by_key(|s| std::cmp::Reverse(s.created));
    call.list("snapshot", all.into_iter().map(|s| shown::snapshot(&world, s)).collect())
}
