//! Volumes: 2.1, 2.3 to 2.7, 2.10.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{may, shown, volume_known};
use crate::answer::{Failure, Refusal};
use crate::api::Call;
use crate::fault::Kind;
use crate::options::{Offering, uuid};
use crate::params::invalid;
use crate::state::{Effect, GIB, Vm, Volume, World};
use crate::time;
use crate::work::{Work, remove};

/// `custom.diskoffering.size.min`, GiB.
pub(super) const SMALLEST: u64 = 1;
/// `custom.diskoffering.size.max`, GiB.
pub(super) const LARGEST: u64 = 1024;
/// `storage.max.volume.size`, GiB.
const MOST: u64 = 2000;

const DETACHED: &str = "Please specify a volume that is not attached to any VM.";
const SNAPSHOTS: &str = "There are snapshot operations in progress on the volume, unable to delete it";
const RUNNING_OR_STOPPED: &str = "Please specify a VM that is either running or stopped.";

pub(super) fn list(call: &Call<'_>) -> Result<Value, Refusal> {
    let world = call.core.world.lock();
    let stale = call.kinds.iter().find_map(|k| match k {
        Kind::Stale(view) => Some(view),
        _ => None,
    });
    let volumes = stale.map_or(&world.volumes, |view| &view.volumes);
    let ids = call.ids(volume_known(&world))?;
    let vm = call.known("virtualmachineid", |id| world.vms.contains_key(id))?;
    let zone = call.known("zoneid", |id| world.zones.iter().any(|z| z.id == id))?;
    let offering = call.known("diskofferingid", |id| world.offerings.iter().any(|o| o.id == id))?;
    let tags = call.params.tags()?;
    let is = |name: &str, value: &str| call.params.get(name).is_none_or(|wanted| wanted.eq_ignore_ascii_case(value));
    let lower = |text: &str| text.to_lowercase();
    let mut all: Vec<_> = volumes
        .values()
        .filter(|v| {
            call.sees(*v)
                && (v.exists() || call.account.admin)
                && ids.as_ref().is_none_or(|ids| ids.contains(&v.id.as_str()))
                && vm.is_none_or(|vm| v.vm.as_deref() == Some(vm) && v.state != "Destroy")
                && zone.is_none_or(|zone| v.zone == zone)
                && offering.is_none_or(|o| v.offering.as_deref() == Some(o))
                && is("name", &v.name)
                && is("state", &v.state)
                && call.params.get("type").is_none_or(|t| lower(&v.kind).contains(&lower(t)))
                && call
                    .params
                    .get("keyword")
                    .is_none_or(|k| [&v.name, &v.kind, &v.state].iter().any(|text| lower(text).contains(&lower(k))))
                && tags.iter().all(|(key, value)| {
                    v.tags.get(key).is_some_and(|found| value.as_ref().is_none_or(|wanted| wanted == found))
                })
        })
        .collect();
    // Newest first, by second; among equals no order is promised.
    let turn = if call.core.rules.unstable_order { world.requests.len() } else { 0 };
    let among_equals = |v: &Volume| if turn % 2 == 0 { u64::MAX - v.number } else { v.number };
    all.sort_by_key(|v| (std::cmp::Reverse(v.created), among_equals(v)));
    let no_tags = call.has(|k| matches!(k, Kind::TagsHidden));
    let one = |v: &Volume| {
        let mut shown = shown::volume(&world, v, call.account.admin, stale);
        if no_tags {
            shown["tags"] = json!([]);
        }
        shown
    };
    call.list("volume", all.into_iter().map(one).collect())
}

/// 2.5: the row is made in the request, before `customjobid` is looked at.
pub(super) fn create(call: &Call<'_>) -> Result<Value, Refusal> {
    let mut world = call.core.world.lock();
    let snapshot = call.known("snapshotid", |id| world.snapshots.contains_key(id))?;
    let asked = call.params.number::<u64>(call.command, "size")?;
    call.known("zoneid", |id| world.zones.iter().any(|z| z.id == id))?;
    let (offering, zone, bytes) = match snapshot {
        Some(id) => of_snapshot(&world, id, asked)?,
        None => {
            let id = call.known("diskofferingid", |id| world.offerings.iter().any(|o| o.id == id))?;
            let offering = id.and_then(|id| world.offerings.iter().find(|o| o.id == id));
            let offering = offering.ok_or_else(|| {
                Refusal::parameter("Missing parameter(s),either a positive volume size or a snapshot id must be passed")
            })?;
            let size = size(offering, asked)?;
            let zone = call.params.get("zoneid");
            let zone = zone.ok_or_else(|| Refusal::parameter("Please provide a valid zone ID."))?;
            (Some(offering.id.clone()), zone.to_owned(), size * GIB + call.core.rules.extra_bytes)
        }
    };
    if let Some(closed) = world.zones.iter().find(|z| z.id == zone && z.state != "Enabled") {
        return Err(Refusal::denied(format!(
            "Cannot perform this operation, Zone is currently disabled: {}",
            closed.name
        )));
    }
    let project = call.params.get("projectid").map(str::to_owned);
    if project.as_ref().is_some_and(|p| !call.account.admin && !call.account.projects.contains(p)) {
        return Err(Refusal::denied("Account is not a member of the project"));
    }
    let account = &call.account.name;
    let has = world.volumes.values().filter(|v| v.account == *account && v.exists()).count();
    let most = world.accounts.iter().find(|a| a.name == *account).and_then(|a| a.most_volumes);
    if most.is_some_and(|most| has >= most) {
        let text = format!(
            "Maximum amount of resources of Type = 'volume' for Account Name = {account} in Domain Id = 1 is exceeded: Account Resource Limit = {}, Current Account Resource Amount = {has}, Requested Resource Amount = 1.",
            most.unwrap_or(0)
        );
        return Err(Refusal::new(535, 4370, text));
    }
    let number = world.number();
    let id = world.next_ids.pop_front().unwrap_or_else(uuid);
    let name = call.params.get("name").map_or_else(|| format!("VOL-{number}"), str::to_owned);
    let volume = Volume {
        id: id.clone(),
        number,
        name,
        size: bytes,
        state: "Allocated".into(),
        kind: "DATADISK".into(),
        zone,
        offering,
        account: account.clone(),
        project,
        vm: None,
        device_id: None,
        attached: None,
        created: time::now(),
        tags: BTreeMap::new(),
        protected: false,
        hidden: false,
    };
    world.volumes.insert(id.clone(), volume);
    world.record(Effect::Created, &id, false);
    let work = Work::Create { volume: id.clone(), snapshot: snapshot.map(str::to_owned) };
    let job = call.submit(&mut world, Some(("Volume", &id)), None, Ok(work))?;
    Ok(json!({"id": id, "jobid": job}))
}

/// Offering, zone and bytes of a volume made from a snapshot.
fn of_snapshot(world: &World, id: &str, asked: Option<u64>) -> Result<(Option<String>, String, u64), Refusal> {
    let snapshot = world.snapshots.get(id).filter(|s| s.state == "BackedUp").ok_or_else(|| {
        Refusal::parameter(format!(
            "Snapshot id={id} is not in BackedUp state yet and can't be used for volume creation"
        ))
    })?;
    let source = world.volumes.get(&snapshot.volume).ok_or_else(|| Refusal::internal("the snapshot has no volume"))?;
    let bytes = asked.map_or(snapshot.size, |gib| gib.saturating_mul(GIB));
    if bytes < snapshot.size {
        return Err(Refusal::parameter("Invalid size for volume creation: below the snapshot's size"));
    }
    Ok((source.offering.clone(), source.zone.clone(), bytes))
}

/// GiB of a new volume.
fn size(offering: &Offering, asked: Option<u64>) -> Result<u64, Refusal> {
    let size = match (offering.size, asked) {
        (None, None) => {
            return Err(Refusal::parameter("This disk offering requires a custom size specified"));
        }
        (Some(_), Some(_)) => return Err(Refusal::parameter("This disk offering does not allow custom size")),
        (Some(size), None) => return Ok(size),
        (None, Some(size)) => size,
    };
    if !(SMALLEST..=LARGEST).contains(&size) {
        return Err(Refusal::parameter(format!(
            "Volume size: {size} GB is out of allowed range. Min: {SMALLEST}. Max: {LARGEST}"
        )));
    }
    if size > MOST {
        return Err(Refusal::parameter(format!(
            "Requested volume size is {size}, but the maximum size allowed is {MOST}."
        )));
    }
    Ok(size)
}

/// 2.3. Access is checked in the request, all else in the job.
pub(super) fn attach(call: &Call<'_>) -> Result<Value, Refusal> {
    let mut world = call.core.world.lock();
    let id = call.known("id", volume_known(&world))?.map(str::to_owned);
    let id = id.ok_or_else(|| call.need("id").err().unwrap_or_else(|| invalid(call.command, "id", "")))?;
    let vm = call.own("virtualmachineid", |id| world.vms.get(id))?;
    let volume = call.own("id", |id| world.volumes.get(id))?;
    let device_id = call.params.number(call.command, "deviceid")?;
    let vm_id = vm.id.clone();
    let work = may_attach(&world, volume, vm, device_id);
    let queue = Some(vm_id.clone());
    let work = work.map(|()| Work::Attach { volume: id.clone(), vm: vm_id, device_id });
    let job = call.submit(&mut world, Some(("Volume", &id)), queue, work)?;
    Ok(json!({ "jobid": job }))
}

/// The refusals before queueing, in order.
fn may_attach(world: &World, volume: &Volume, vm: &Vm, device_id: Option<u32>) -> Result<(), Failure> {
    let refuse = |text: &str| Err(Failure::parameter(text));
    if !volume.exists() {
        return refuse("Please specify a volume with the valid type: ROOT or DATADISK");
    }
    if volume.vm.is_some() {
        return refuse(DETACHED);
    }
    if matches!(volume.state.as_str(), "Destroy" | "Expunging") {
        return refuse("Please specify a volume that is not destroyed.");
    }
    if !matches!(volume.state.as_str(), "Allocated" | "Ready" | "Uploaded") {
        return refuse("Volume state must be in Allocated, Ready or in Uploaded state");
    }
    if vm.state == "Destroyed" || vm.state == "Expunging" {
        return refuse("Please specify a valid User VM.");
    }
    if vm.state != "Running" && vm.state != "Stopped" {
        return refuse(RUNNING_OR_STOPPED);
    }
    if vm.zone != volume.zone {
        return refuse("Please specify a VM that is in the same zone as the volume.");
    }
    if device_id == Some(0) {
        if vm.state != "Stopped" {
            return refuse("Root volume attach is allowed only when VM is in stopped state");
        }
        if world.on_vm(&vm.id).any(|v| v.device_id == Some(0)) {
            return refuse("Vm already has root volume attached to it");
        }
    }
    let data = world.on_vm(&vm.id).filter(|v| v.kind == "DATADISK").count();
    if device_id != Some(0) && data >= vm.most_disks as usize {
        return Err(Failure::parameter(format!(
            "The specified VM already has the maximum number of data disks ({}) attached. Please specify another VM.",
            vm.most_disks
        )));
    }
    if vm.vm_snapshots > 0 {
        return refuse("Unable to attach volume to VM, please specify a VM that does not have VM snapshots");
    }
    if vm.backups {
        return refuse("Unable to attach volume, please specify a VM that does not have any backups");
    }
    Ok(())
}

/// 2.4. By id nothing is checked in the request, not even whose the volume is.
pub(super) fn detach(call: &Call<'_>) -> Result<Value, Refusal> {
    let mut world = call.core.world.lock();
    let id = call.known("id", volume_known(&world))?;
    let vm = call.known("virtualmachineid", |id| world.vms.contains_key(id))?;
    let device_id = call.params.number::<u32>(call.command, "deviceid")?;
    let (instance, work) = match (id, vm, device_id) {
        (Some(id), None, None) => {
            let volume = world.volumes.get(id).ok_or_else(|| invalid(call.command, "id", id))?;
            let work = may_detach(call, &world, volume);
            (Some(("Volume", id)), work.map(|vm| (vm.clone(), Work::Detach { volume: id.to_owned(), vm })))
        }
        // The found volume's id is not stored before the work is queued: the worker gets none.
        (None, Some(vm), Some(device_id)) => {
            let there = world.on_vm(vm).any(|v| v.device_id == Some(device_id));
            let text = if there { "Unable to find volume with ID: null" } else { "Index 0 out of bounds for length 0" };
            (None, Err(Failure::internal(text)))
        }
        _ => {
            let text = "Please provide either a volume id, or a tuple(device id, instance id)";
            (None, Err(Failure::parameter(text)))
        }
    };
    let (queue, work) = match work {
        Ok((vm, work)) => (Some(vm), Ok(work)),
        Err(failure) => (None, Err(failure)),
    };
    let job = call.submit(&mut world, instance, queue, work)?;
    Ok(json!({ "jobid": job }))
}

/// The refusals before queueing, in order; the VM of this moment.
fn may_detach(call: &Call<'_>, world: &World, volume: &Volume) -> Result<String, Failure> {
    if !volume.exists() {
        return Err(Failure::parameter(format!("Unable to find volume with ID: {}", volume.number)));
    }
    if !may(&call.account, volume) {
        return Err(Failure::internal("Acct does not have permission to operate with resource Volume"));
    }
    let vm = volume.vm.as_ref().and_then(|vm| world.vms.get(vm));
    let vm = vm.ok_or_else(|| Failure::parameter("The specified volume is not attached to a VM."))?;
    if !matches!(vm.state.as_str(), "Running" | "Stopped" | "Destroyed") {
        return Err(Failure::parameter(RUNNING_OR_STOPPED));
    }
    if volume.device_id == Some(0) && vm.state != "Stopped" {
        return Err(Failure::parameter("Root volume detach is allowed only when VM is in stopped state"));
    }
    if vm.vm_snapshots > 0 {
        let text = "Unable to detach volume, please specify a VM that does not have VM snapshots";
        return Err(Failure::parameter(text));
    }
    if vm.backups {
        let text = "Unable to detach volume, cannot detach volume from a VM that has backups. First remove the VM \
                    from the backup offering.";
        return Err(Failure::parameter(text));
    }
    Ok(vm.id.clone())
}

/// 2.7.
pub(super) fn resize(call: &Call<'_>) -> Result<Value, Refusal> {
    let mut world = call.core.world.lock();
    let volume = call.own("id", |id| world.volumes.get(id))?.clone();
    let asked = call.params.number::<u64>(call.command, "size")?;
    call.known("diskofferingid", |id| world.offerings.iter().any(|o| o.id == id))?;
    let work = may_resize(&world, &volume, asked, call.params.flag("shrinkok"));
    let extra = call.core.rules.extra_bytes;
    let work = work.map(|gib| Work::Resize { volume: volume.id.clone(), size: gib * GIB + extra });
    let job = call.submit(&mut world, Some(("Volume", &volume.id)), volume.vm.clone(), work)?;
    Ok(json!({ "jobid": job }))
}

fn may_resize(world: &World, volume: &Volume, asked: Option<u64>, shrink: bool) -> Result<u64, Failure> {
    if !volume.exists() {
        return Err(Failure::parameter(format!("No such volume {}", volume.number)));
    }
    if volume.state != "Ready" && volume.state != "Allocated" {
        return Err(Failure::parameter(format!(
            "Volume should be in ready or allocated state before attempting a resize. Volume {} state is: {}.",
            volume.name, volume.state
        )));
    }
    let offering = world.offerings.iter().find(|o| volume.offering.as_ref() == Some(&o.id));
    if offering.is_some_and(|o| o.size.is_some()) {
        return Err(Failure::parameter(format!(
            "Failed to resize volume {}: its disk size is strictly fixed by the offering; a new customised offering is \
             needed",
            volume.name
        )));
    }
    let gib = asked.ok_or_else(|| Failure::parameter("The new size has to be given"))?;
    if !(SMALLEST..=LARGEST).contains(&gib) {
        return Err(Failure::parameter(format!(
            "Volume size: {gib} GB is out of allowed range. Min: {SMALLEST}. Max: {LARGEST}"
        )));
    }
    if gib * GIB < volume.size && !shrink {
        return Err(Failure::parameter(
            "Going from existing size to a smaller one would shrink the volume. Need to sign off by supplying the \
             shrinkok parameter with value of true.",
        ));
    }
    let busy = |s: &crate::state::Snapshot| {
        s.volume == volume.id && matches!(s.state.as_str(), "Creating" | "CreatedOnPrimary" | "BackingUp")
    };
    if world.snapshots.values().any(busy) {
        return Err(Failure::internal(
            "There is/are unbacked up snapshot(s) on this volume, resize volume is not permitted, please try again later.",
        ));
    }
    Ok(gib)
}

/// What stands in the way of every kind of removal (2.6).
fn may_remove(world: &World, volume: &Volume) -> Result<(), String> {
    if !volume.exists() {
        return Err(format!("Unable to find volume with ID: {}", volume.number));
    }
    if volume.protected {
        let (id, name) = (&volume.id, &volume.name);
        return Err(format!("Volume [id = {id}, name = {name}] has delete protection enabled and cannot be deleted."));
    }
    if volume.vm.is_some() {
        return Err(DETACHED.into());
    }
    let busy = |s: &crate::state::Snapshot| {
        s.volume == volume.id && matches!(s.state.as_str(), "Creating" | "CreatedOnPrimary" | "BackingUp")
    };
    if volume.state == "Snapshotting" || world.snapshots.values().any(busy) {
        return Err(SNAPSHOTS.into());
    }
    if !matches!(volume.state.as_str(), "Allocated" | "Ready" | "Uploaded" | "Destroy" | "Creating") {
        return Err(format!("Please specify a volume that is not in state {}", volume.state));
    }
    Ok(())
}

/// 2.6: destroys and expunges in the request.
pub(super) fn delete(call: &Call<'_>) -> Result<Value, Refusal> {
    let (id, delay) = {
        let world = call.core.world.lock();
        let volume = call.own("id", |id| world.volumes.get(id))?;
        may_remove(&world, volume).map_err(Refusal::parameter)?;
        (volume.id.clone(), world.delay(call.command))
    };
    let _ = call.core.wait(&mut call.core.world.lock(), delay);
    remove(call.core, &id, true, false).map_err(|f| Refusal::new(f.code, 4250, f.text))?;
    Ok(json!({"success": true}))
}

/// 2.6.
pub(super) fn destroy(call: &Call<'_>) -> Result<Value, Refusal> {
    let mut world = call.core.world.lock();
    let volume = call.own("id", |id| world.volumes.get(id))?;
    let id = volume.id.clone();
    let expunge = call.params.flag("expunge");
    let work = may_remove(&world, volume).map_err(Failure::parameter);
    let work = work.map(|()| Work::Destroy { volume: id.clone(), expunge });
    let job = call.submit(&mut world, Some(("Volume", &id)), None, work)?;
    Ok(json!({ "jobid": job }))
}

/// 2.6: from Destroy back to Ready, in the request.
pub(super) fn recover(call: &Call<'_>) -> Result<Value, Refusal> {
    let mut world = call.core.world.lock();
    let volume = call.own("id", |id| world.volumes.get(id))?;
    if volume.state != "Destroy" {
        let text = "Please specify a volume in Destroy state.";
        return Err(Refusal::parameter(text));
    }
    let id = volume.id.clone();
    if let Some(volume) = world.volumes.get_mut(&id) {
        volume.state = "Ready".into();
    }
    world.record(Effect::Recovered, &id, false);
    call.core.tell(&mut world);
    let volume = world.volumes.get(&id).map(|v| shown::volume(&world, v, call.account.admin, None));
    Ok(json!({ "volume": volume }))
}

/// 2.10.
pub(super) fn update(call: &Call<'_>) -> Result<Value, Refusal> {
    let mut world = call.core.world.lock();
    let volume = call.own("id", |id| world.volumes.get(id))?;
    let id = volume.id.clone();
    let of_admins = ["path", "chaininfo", "state", "storageid", "displayvolume", "customid"];
    let work = if !call.account.admin && of_admins.iter().any(|name| call.params.get(name).is_some()) {
        let text = "The domain admin and normal user are not allowed to update volume except volume name & delete \
                    protection";
        Err(Failure::parameter(text))
    } else if !volume.exists() {
        Err(Failure::parameter("The volume id doesn't exist"))
    } else {
        let protected = call.params.get("deleteprotection").map(|v| v.eq_ignore_ascii_case("true"));
        Ok(Work::Update { volume: id.clone(), name: call.params.get("name").map(str::to_owned), protected })
    };
    let job = call.submit(&mut world, Some(("Volume", &id)), None, work)?;
    Ok(json!({ "jobid": job }))
}
