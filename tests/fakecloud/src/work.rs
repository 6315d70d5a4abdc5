//! What the jobs do, step by step.

use serde_json::{Value, json};

use crate::answer::Failure;
use crate::commands::shown;
use crate::fault::Moment;
use crate::run::{Run, Stop};
use crate::state::{Effect, Volume, World};
use crate::tagging::Tagging;
use crate::time;

/// The work of one job. Ids are UUIDs of rows that were there when it was accepted.
#[derive(Debug, Clone)]
pub(crate) enum Work {
    /// createVolume without a snapshot has nothing left to do; with one it copies.
    Create {
        volume: String,
        snapshot: Option<String>,
    },
    /// `device_id` as asked for.
    Attach {
        volume: String,
        vm: String,
        device_id: Option<u32>,
    },
    /// `vm` is that of the time of the call, and nobody looks again (2.4).
    Detach {
        volume: String,
        vm: String,
    },
    /// Bytes.
    Resize {
        volume: String,
        size: u64,
    },
    Destroy {
        volume: String,
        expunge: bool,
    },
    Update {
        volume: String,
        name: Option<String>,
        protected: Option<bool>,
    },
    Snapshot {
        snapshot: String,
        volume: String,
    },
    DeleteSnapshot {
        snapshot: String,
    },
    Revert {
        snapshot: String,
        volume: String,
    },
    Tag(Tagging<String>),
    Untag(Tagging<Option<String>>),
}

impl Work {
    /// Does it; the job's result.
    pub fn steps(&self, run: &Run) -> Result<Value, Stop> {
        match self {
            Work::Create { volume, snapshot } => create(run, volume, snapshot.as_deref()),
            Work::Attach { volume, vm, device_id } => attach(run, volume, vm, *device_id),
            Work::Detach { volume, vm } => detach(run, volume, vm),
            Work::Resize { volume, size } => resize(run, volume, *size),
            Work::Destroy { volume, expunge } => destroy(run, volume, *expunge),
            Work::Update { volume, name, protected } => update(run, volume, name.as_deref(), *protected),
            Work::Snapshot { snapshot, volume } => take_snapshot(run, snapshot, volume),
            Work::DeleteSnapshot { snapshot } => delete_snapshot(run, snapshot),
            Work::Revert { snapshot, volume } => revert(run, snapshot, volume),
            Work::Tag(tagging) => tagging.create(run),
            Work::Untag(tagging) => tagging.delete(run),
        }
    }

    /// Takes back a passing state after a failure (#8394): what was done stays done.
    pub fn reset(&self, world: &mut World) {
        let (volume, passing): (_, &[&str]) = match self {
            Work::Attach { volume, .. } => (volume, &["Creating", "Attaching"]),
            Work::Create { volume, .. } => (volume, &["Creating"]),
            Work::Resize { volume, .. } => (volume, &["Resizing"]),
            Work::Snapshot { volume, .. } => (volume, &["Snapshotting"]),
            Work::Revert { volume, .. } => (volume, &["RevertSnapshotting"]),
            Work::Destroy { volume, .. } => (volume, &["Expunging"]),
            _ => return,
        };
        if let Work::Snapshot { snapshot, .. } = self
            && let Some(snapshot) = world.snapshots.get_mut(snapshot)
            && snapshot.state != "BackedUp"
        {
            snapshot.state = "Error".into();
        }
        if let Some(volume) = world.volumes.get_mut(volume)
            && passing.contains(&volume.state.as_str())
        {
            volume.state = match volume.state.as_str() {
                "Creating" => "Allocated",
                "Expunging" => "Destroy",
                _ => "Ready",
            }
            .into();
        }
    }
}

pub(crate) fn gone(volume: &str) -> Failure {
    Failure::parameter(format!("Unable to find volume with ID: {volume}"))
}

fn io(what: &str) -> impl Fn(std::io::Error) -> Stop {
    move |e| Failure::internal(format!("{what}: {e}")).into()
}

impl Run {
    /// Changes the volume's row under the lock and tells everybody.
    fn change<T>(&self, id: &str, change: impl FnOnce(&mut Volume) -> Result<T, Failure>) -> Result<T, Stop> {
        let mut world = self.core.world.lock();
        let volume = world.volumes.get_mut(id).filter(|v| v.exists()).ok_or_else(|| gone(id))?;
        let result = change(volume)?;
        self.core.tell(&mut world);
        Ok(result)
    }

    fn state(&self, id: &str, state: &str) -> Result<(), Stop> {
        self.change(id, |volume| {
            volume.state = state.into();
            Ok(())
        })
    }

    fn record(&self, effect: Effect, volume: &str) {
        let mut world = self.core.world.lock();
        world.record(effect, volume, self.by_admin);
        self.core.tell(&mut world);
    }

    /// `{"volume":…}`, written while the job is still open, as seen in #6492.
    fn result(&self, id: &str) -> Result<Value, Stop> {
        let world = self.core.world.lock();
        let volume = world.volumes.get(id).ok_or_else(|| gone(id))?;
        let mut shown = shown::volume(&world, volume, false, None);
        shown["jobid"] = self.id.as_str().into();
        shown["jobstatus"] = 0.into();
        Ok(json!({ "volume": shown }))
    }
}

fn create(run: &Run, volume: &str, snapshot: Option<&str>) -> Result<Value, Stop> {
    run.at(Moment::Working)?;
    run.last(1.0)?;
    if let Some(snapshot) = snapshot {
        run.state(volume, "Creating")?;
        let size = run.change(volume, |v| Ok(v.size))?;
        run.core.storage.put_back(snapshot, volume).map_err(io("copying the snapshot"))?;
        run.core.storage.resize(volume, size).map_err(io("sizing the volume"))?;
        run.state(volume, "Ready")?;
    }
    run.at(Moment::Done)?;
    run.at(Moment::Recorded)?;
    run.at(Moment::Closing)?;
    run.result(volume)
}

fn attach(run: &Run, id: &str, vm_id: &str, asked: Option<u32>) -> Result<Value, Stop> {
    let (device_id, fresh, running, words) = {
        let world = run.core.world.lock();
        let volume = world.volumes.get(id).filter(|v| v.exists()).ok_or_else(|| gone(id))?;
        let vm = world.vms.get(vm_id).ok_or_else(|| Failure::parameter("Please specify a valid User VM."))?;
        if let Some(on) = volume.vm.as_ref().and_then(|on| world.vms.get(on)) {
            let (name, on) = (&volume.name, &on.name);
            return Err(Failure::internal(format!("volume: {name} is already attached to a VM: {on}")).into());
        }
        if volume.state != "Ready" && volume.state != "Allocated" {
            let (name, state) = (&volume.name, &volume.state);
            let text = format!("Volume: {name} is in {state}. It should be in Ready or Allocated state");
            return Err(Failure::internal(text).into());
        }
        let device_id = device_id(&world, vm, asked)?;
        let words = format!("Failed to attach volume {} to VM {}", volume.name, vm.name);
        (device_id, volume.state == "Allocated", vm.state == "Running", words)
    };
    if fresh {
        run.state(id, "Creating")?;
        run.last(0.5)?;
        let size = run.change(id, |v| Ok(v.size))?;
        run.core.storage.make(id, size).map_err(io("making the volume"))?;
    }
    run.state(id, if running { "Attaching" } else { "Ready" })?;
    run.at(Moment::Working)?;
    run.last(if fresh { 0.5 } else { 1.0 })?;
    run.core.plug(id, vm_id, device_id).map_err(|text| Failure::internal(format!("{words}; {text}")))?;
    run.at(Moment::Done)?;
    run.change(id, |volume| {
        volume.vm = Some(vm_id.to_owned());
        volume.device_id = Some(device_id);
        volume.attached = Some(time::now());
        if device_id == 0 {
            volume.kind = "ROOT".into();
        }
        Ok(())
    })?;
    run.record(Effect::Attached, id);
    run.at(Moment::Recorded)?;
    run.state(id, "Ready")?;
    run.at(Moment::Closing)?;
    run.result(id)
}

/// 2.3: 0, 1, 2, 4 … max+1; the lowest free from 1 when none is asked for.
fn device_id(world: &World, vm: &crate::state::Vm, asked: Option<u32>) -> Result<u32, Failure> {
    let Some(asked) = asked else {
        let full = || Failure::internal(format!("All device Ids are used by vm {}", vm.name));
        return world.free_device_id(vm).ok_or_else(full);
    };
    if asked == 3 || asked > vm.most_disks + 1 {
        return Err(Failure::internal(format!("deviceId should be 0,1,2,4-{}", vm.most_disks + 1)));
    }
    match world.on_vm(&vm.id).find(|v| v.device_id == Some(asked)) {
        Some(by) => Err(Failure::internal(format!("deviceId {asked} is used by vol {} on vm {}", by.name, vm.name))),
        None => Ok(asked),
    }
}

fn detach(run: &Run, id: &str, vm_id: &str) -> Result<Value, Stop> {
    let words = {
        let world = run.core.world.lock();
        let volume = world.volumes.get(id).filter(|v| v.exists()).ok_or_else(|| gone(id))?;
        let vm = world.vms.get(vm_id).map(|vm| vm.name.clone()).unwrap_or_default();
        format!("Failed to detach volume {} from VM {vm}", volume.name)
    };
    run.at(Moment::Working)?;
    run.last(1.0)?;
    run.core.unplug(id, vm_id).map_err(|text| Failure::internal(format!("{words}; {text}")))?;
    run.at(Moment::Done)?;
    let was = run.change(id, |volume| {
        let was = volume.vm.take();
        volume.device_id = None;
        volume.attached = None;
        volume.kind = "DATADISK".into();
        Ok(was)
    })?;
    if was.is_some() {
        run.record(Effect::Detached, id);
    }
    run.at(Moment::Recorded)?;
    run.at(Moment::Closing)?;
    run.result(id)
}

fn resize(run: &Run, id: &str, size: u64) -> Result<Value, Stop> {
    let (was, words) = run.change(id, |volume| {
        if volume.state != "Ready" && volume.state != "Allocated" {
            let text = format!(
                "Volume should be in ready or allocated state before attempting a resize. Volume {} state is: {}.",
                volume.name, volume.state
            );
            return Err(Failure::parameter(text));
        }
        let was = volume.state.clone();
        if was == "Ready" {
            volume.state = "Resizing".into();
        }
        Ok((was, format!("Failed to resize volume {}", volume.name)))
    })?;
    run.at(Moment::Working)?;
    run.last(1.0)?;
    if was == "Ready" {
        run.core.storage.resize(id, size).map_err(io("resizing the volume"))?;
        run.core.resize_devices(id, size).map_err(|text| Failure::internal(format!("{words}: {text}")))?;
    }
    run.at(Moment::Done)?;
    run.change(id, |volume| {
        volume.size = size;
        Ok(())
    })?;
    run.record(Effect::Resized, id);
    run.at(Moment::Recorded)?;
    run.state(id, &was)?;
    run.at(Moment::Closing)?;
    run.result(id)
}

fn destroy(run: &Run, id: &str, expunge: bool) -> Result<Value, Stop> {
    run.at(Moment::Working)?;
    run.last(1.0)?;
    remove(run.core.as_ref(), id, expunge, run.by_admin)?;
    run.at(Moment::Done)?;
    run.at(Moment::Recorded)?;
    run.at(Moment::Closing)?;
    run.result(id)
}

/// To Destroy, or away for good. An Allocated volume can only go for good (2.6).
pub(crate) fn remove(core: &crate::core::Core, id: &str, expunge: bool, by_admin: bool) -> Result<(), Failure> {
    let mut world = core.world.lock();
    let volume = world.volumes.get_mut(id).filter(|v| v.exists()).ok_or_else(|| gone(id))?;
    let expunge = expunge || volume.state == "Allocated";
    let first = volume.state != "Destroy";
    volume.state = if expunge { "Expunged" } else { "Destroy" }.into();
    (volume.vm, volume.device_id, volume.attached) = (None, None, None);
    if first {
        world.record(Effect::Destroyed, id, by_admin);
    }
    if expunge {
        world.record(Effect::Expunged, id, by_admin);
        core.storage.remove(id).map_err(|e| Failure::internal(format!("Failed to expunge the volume {id}: {e}")))?;
    }
    core.tell(&mut world);
    Ok(())
}

fn update(run: &Run, id: &str, name: Option<&str>, protected: Option<bool>) -> Result<Value, Stop> {
    run.at(Moment::Working)?;
    run.last(1.0)?;
    run.at(Moment::Done)?;
    run.change(id, |volume| {
        if let Some(name) = name {
            volume.name = name.to_owned();
        }
        volume.protected = protected.unwrap_or(volume.protected);
        Ok(())
    })?;
    if name.is_some() {
        run.record(Effect::Renamed, id);
    }
    run.at(Moment::Recorded)?;
    run.at(Moment::Closing)?;
    run.result(id)
}

fn snapshot_state(run: &Run, id: &str, state: &str) -> Result<(), Stop> {
    let mut world = run.core.world.lock();
    let snapshot = world.snapshots.get_mut(id).ok_or_else(|| Failure::parameter("unable to find a snapshot"))?;
    snapshot.state = state.into();
    run.core.tell(&mut world);
    Ok(())
}

fn snapshot_result(run: &Run, id: &str) -> Result<Value, Stop> {
    let world = run.core.world.lock();
    let snapshot = world.snapshots.get(id).ok_or_else(|| Failure::parameter("unable to find a snapshot"))?;
    Ok(json!({ "snapshot": shown::snapshot(&world, snapshot) }))
}

fn take_snapshot(run: &Run, snapshot: &str, volume: &str) -> Result<Value, Stop> {
    run.change(volume, |volume| {
        if volume.state != "Ready" {
            let (name, state) = (&volume.name, &volume.state);
            return Err(Failure::parameter(format!(
                "VolumeId: {name} is not in Ready state but {state}. Cannot take snapshot."
            )));
        }
        volume.state = "Snapshotting".into();
        Ok(())
    })?;
    snapshot_state(run, snapshot, "BackingUp")?;
    run.at(Moment::Working)?;
    run.last(1.0)?;
    run.core.storage.take(volume, snapshot).map_err(io("copying the volume"))?;
    run.at(Moment::Done)?;
    snapshot_state(run, snapshot, "BackedUp")?;
    run.record(Effect::SnapshotTaken, volume);
    run.at(Moment::Recorded)?;
    run.state(volume, "Ready")?;
    run.at(Moment::Closing)?;
    snapshot_result(run, snapshot)
}

fn delete_snapshot(run: &Run, id: &str) -> Result<Value, Stop> {
    run.at(Moment::Working)?;
    run.last(1.0)?;
    let volume = {
        let world = run.core.world.lock();
        let snapshot = world.snapshots.get(id).filter(|s| s.state != "Destroyed");
        let text = || Failure::parameter(format!("Snapshot with id {id} is already destroyed"));
        snapshot.ok_or_else(text)?.volume.clone()
    };
    run.core.storage.remove_snapshot(id).map_err(io("deleting the snapshot"))?;
    run.at(Moment::Done)?;
    snapshot_state(run, id, "Destroyed")?;
    run.record(Effect::SnapshotDeleted, &volume);
    run.at(Moment::Recorded)?;
    run.at(Moment::Closing)?;
    Ok(json!({"success": true}))
}

fn revert(run: &Run, snapshot: &str, volume: &str) -> Result<Value, Stop> {
    let size = {
        let world = run.core.world.lock();
        world.snapshots.get(snapshot).map(|s| s.size).unwrap_or_default()
    };
    run.state(volume, "RevertSnapshotting")?;
    run.at(Moment::Working)?;
    run.last(1.0)?;
    run.core.storage.put_back(snapshot, volume).map_err(io("copying the snapshot back"))?;
    run.at(Moment::Done)?;
    run.change(volume, |volume| {
        volume.size = size;
        Ok(())
    })?;
    run.record(Effect::Reverted, volume);
    run.at(Moment::Recorded)?;
    run.state(volume, "Ready")?;
    run.at(Moment::Closing)?;
    snapshot_result(run, snapshot)
}
