//! What there is besides volumes: VMs, zones, offerings, abilities, events.

use serde_json::{Value, json};

use super::{ALL, shown};
use crate::answer::Refusal;
use crate::api::Call;
use crate::time;

/// listVirtualMachines (2.2): `name` is exact, as in 4.22's code.
pub(super) fn vms(call: &Call<'_>) -> Result<Value, Refusal> {
    let world = call.core.world.lock();
    let ids = call.ids(|id| world.vms.contains_key(id))?;
    call.known("zoneid", |id| world.zones.iter().any(|z| z.id == id))?;
    let is = |name: &str, value: &str| call.params.get(name).is_none_or(|wanted| wanted.eq_ignore_ascii_case(value));
    let details = call.params.list("details").is_none_or(|d| d.iter().any(|d| *d == "all" || *d == "servoff"));
    let all = world.vms.values().filter(|vm| {
        call.sees(*vm)
            && ids.as_ref().is_none_or(|ids| ids.contains(&vm.id.as_str()))
            && is("name", &vm.name)
            && is("state", &vm.state)
            && is("zoneid", &vm.zone)
            && is("hypervisor", &vm.hypervisor)
            && call.params.get("keyword").is_none_or(|k| vm.name.contains(k))
    });
    let admin = call.account.admin;
    call.list("virtualmachine", all.map(|vm| shown::vm(&world, vm, admin, details)).collect())
}

/// A list of what this cloud has none of.
pub(super) fn nothing(call: &Call<'_>) -> Result<Value, Refusal> {
    call.list("nothing", Vec::new())
}

/// listVMSnapshot: as many as were put there.
pub(super) fn vm_snapshots(call: &Call<'_>) -> Result<Value, Refusal> {
    let world = call.core.world.lock();
    let vm_id = call.known("virtualmachineid", |id| world.vms.contains_key(id))?;
    let of = world.vms.values().filter(|vm| call.sees(*vm) && vm_id.is_none_or(|id| id == vm.id));
    let one = |vm: &crate::state::Vm, n: u32| {
        let name = format!("{}_VS_{n}", vm.name);
        json!({"id": vm.id, "name": name, "virtualmachineid": vm.id, "state": "Ready", "type": "Disk"})
    };
    call.list("vmSnapshot", of.flat_map(|vm| (0..vm.vm_snapshots).map(move |n| one(vm, n))).collect())
}

/// listSnapshotPolicies of a volume: as many as were put there.
pub(super) fn snapshot_policies(call: &Call<'_>) -> Result<Value, Refusal> {
    let world = call.core.world.lock();
    let volume = call.own("volumeid", |id| world.volumes.get(id))?;
    let count = world.snapshot_policies.get(&volume.id).copied().unwrap_or(0);
    let one = |n: u32| {
        let id = format!("00000000-0000-4000-8000-{n:012}");
        json!({"id": id, "volumeid": volume.id, "intervaltype": n, "maxsnaps": 8})
    };
    call.list("snapshotpolicy", (0..count).map(one).collect())
}

/// listZones (2.14).
pub(super) fn zones(call: &Call<'_>) -> Result<Value, Refusal> {
    let world = call.core.world.lock();
    let id = call.known("id", |id| world.zones.iter().any(|z| z.id == id))?;
    let name = call.params.get("name");
    let all = world.zones.iter().filter(|z| id.is_none_or(|id| id == z.id) && name.is_none_or(|n| n == z.name));
    let one = |z: &crate::options::Zone| {
        json!({
            "id": z.id,
            "name": z.name,
            "allocationstate": z.state,
            "localstorageenabled": false,
            "networktype": "Advanced",
            "securitygroupsenabled": false,
        })
    };
    call.list("zone", all.map(one).collect())
}

/// listDiskOfferings (2.13).
pub(super) fn offerings(call: &Call<'_>) -> Result<Value, Refusal> {
    let world = call.core.world.lock();
    let id = call.known("id", |id| world.offerings.iter().any(|o| o.id == id))?;
    let name = call.params.get("name");
    let all = world.offerings.iter().filter(|o| id.is_none_or(|id| id == o.id) && name.is_none_or(|n| n == o.name));
    let one = |o: &crate::options::Offering| {
        json!({
            "id": o.id,
            "name": o.name,
            "displaytext": o.name,
            // 0 for a customised one.
            "disksize": o.size.unwrap_or(0),
            "iscustomized": o.size.is_none(),
            "storagetype": o.storage,
            "disksizestrictness": o.strict,
            "encrypt": false,
            "provisioningtype": "thin",
            "state": "Active",
        })
    };
    call.list("diskoffering", all.map(one).collect())
}

/// listCapabilities (2.15).
pub(super) fn capabilities(call: &Call<'_>) -> Result<Value, Refusal> {
    let mut all = json!({
        "cloudstackversion": call.core.rules.version,
        "allowuserexpungerecovervolume": true,
        "customdiskofferingminsize": super::volumes::SMALLEST,
        "customdiskofferingmaxsize": super::volumes::LARGEST,
        "kvmsnapshotenabled": true,
        "securitygroupsenabled": false,
        "userpublictemplateenabled": true,
    });
    if let Some(most) = call.core.rules.rate_limit {
        all["apilimitmax"] = most.into();
        all["apilimitinterval"] = 1.into();
    }
    Ok(json!({ "capability": all }))
}

/// listApis (2.16): what the caller's role may call. Counts once per name against the limit (1.8).
pub(super) fn apis(call: &Call<'_>) -> Result<Value, Refusal> {
    let name = call.params.get("name");
    let found: Vec<_> = ALL
        .iter()
        .filter(|c| !call.account.forbidden.iter().any(|f| f == c.name) && name.is_none_or(|n| n == c.name))
        .map(|c| json!({"name": c.name, "isasync": c.is_async, "description": "", "params": [], "response": []}))
        .collect();
    if found.is_empty()
        && let Some(name) = name
    {
        return Err(Refusal::internal(format!("no api {name} is there for this role")));
    }
    let mut world = call.core.world.lock();
    if let Some(window) = world.windows.get_mut(&call.account.name) {
        window.1 = window.1.saturating_add(u32::try_from(found.len()).unwrap_or(u32::MAX));
    }
    drop(world);
    Ok(json!({"count": found.len(), "api": found}))
}

/// listEvents (2.17), newest first.
pub(super) fn events(call: &Call<'_>) -> Result<Value, Refusal> {
    let world = call.core.world.lock();
    let is = |name: &str, value: &str| call.params.get(name).is_none_or(|wanted| wanted == value);
    let all = world.events.iter().rev().filter(|e| {
        (e.account == call.account.name || call.account.admin)
            && is("type", e.kind)
            && is("level", e.level)
            && is("resourceid", &e.resource)
    });
    let one = |e: &crate::state::Event| {
        json!({
            "id": e.id,
            "type": e.kind,
            "level": e.level,
            "description": e.words,
            "resourceid": e.resource,
            "account": e.account,
            "created": time::text(e.created),
        })
    };
    call.list("event", all.map(one).collect())
}
