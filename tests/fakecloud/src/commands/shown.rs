//! Rows as lists and job results show them.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::state::{Snapshot, Vm, Volume, World};
use crate::time;

fn tags(tags: &BTreeMap<String, String>, kind: &str, id: &str, account: &str) -> Value {
    let one = |(key, value): (&String, &String)| json!({"key": key, "value": value, "resourcetype": kind, "resourceid": id, "account": account, "domain": "ROOT"});
    tags.iter().map(one).collect()
}

/// A volume (2.1), with the pending job that it shows.
pub(crate) fn volume(world: &World, volume: &Volume, admin: bool, pending: Option<&str>) -> Value {
    let zone = world.zones.iter().find(|z| z.id == volume.zone);
    let mut shown = json!({
        "id": volume.id,
        "name": volume.name,
        "zoneid": volume.zone,
        "zonename": zone.map(|z| z.name.as_str()).unwrap_or_default(),
        "type": volume.kind,
        "size": volume.size,
        "state": volume.state,
        "destroyed": volume.state == "Destroy",
        "created": time::text(volume.created),
        "account": volume.account,
        "domain": "ROOT",
        "domainid": DOMAIN,
        "provisioningtype": "thin",
        "isextractable": true,
        "quiescevm": false,
        "supportsstoragesnapshot": false,
        "deleteprotection": volume.protected,
        "tags": tags(&volume.tags, "Volume", &volume.id, &volume.account),
    });
    if let Some(offering) = world.offerings.iter().find(|o| volume.offering.as_ref() == Some(&o.id)) {
        shown["diskofferingid"] = offering.id.as_str().into();
        shown["diskofferingname"] = offering.name.as_str().into();
        shown["diskofferingdisplaytext"] = offering.name.as_str().into();
        shown["storagetype"] = offering.storage.as_str().into();
    }
    if let Some(project) = &volume.project {
        shown["projectid"] = project.as_str().into();
    }
    // A volume in Destroy never shows its VM.
    if let Some(vm) = volume.vm.as_ref().filter(|_| volume.state != "Destroy") {
        shown["virtualmachineid"] = vm.as_str().into();
        if let Some(vm) = world.vms.get(vm) {
            shown["vmname"] = vm.name.as_str().into();
            shown["vmdisplayname"] = vm.name.as_str().into();
            shown["vmstate"] = vm.state.as_str().into();
            shown["vmtype"] = "User".into();
        }
        if let Some(device_id) = volume.device_id {
            shown["deviceid"] = device_id.into();
        }
        if let Some(attached) = volume.attached {
            shown["attached"] = time::text(attached).into();
        }
    }
    if let Some(job) = pending {
        shown["jobid"] = job.into();
        shown["jobstatus"] = 0.into();
    }
    if admin {
        shown["hypervisor"] = "KVM".into();
        shown["path"] = volume.id.as_str().into();
        shown["storage"] = "primary-1".into();
    }
    shown
}

/// The one domain.
const DOMAIN: &str = "00000000-0000-4000-8000-0000000000d0";

/// A VM (2.2).
pub(crate) fn vm(world: &World, vm: &Vm, admin: bool, details: bool) -> Value {
    let zone = world.zones.iter().find(|z| z.id == vm.zone);
    let mut shown = json!({
        "id": vm.id,
        "name": vm.name,
        "displayname": vm.name,
        "state": vm.state,
        "zoneid": vm.zone,
        "zonename": zone.map(|z| z.name.as_str()).unwrap_or_default(),
        "hypervisor": vm.hypervisor,
        "account": vm.account,
        "domain": "ROOT",
        "domainid": DOMAIN,
        "created": time::text(0),
        "haenable": false,
        "nic": [],
        "securitygroup": [],
        "affinitygroup": [],
        "tags": [],
    });
    if let Some(project) = &vm.project {
        shown["projectid"] = project.as_str().into();
    }
    if details {
        if vm.backups {
            shown["backupofferingid"] = "00000000-0000-4000-8000-0000000000b0".into();
            shown["backupofferingname"] = "nightly".into();
        }
        shown["details"] = json!({"rootDiskController": "virtio", "dataDiskController": "virtio"});
        shown["rootdeviceid"] = 0.into();
        shown["rootdevicetype"] = "ROOT".into();
    }
    if admin {
        shown["instancename"] = format!("i-2-{}-VM", vm.number).into();
        shown["hostname"] = "kvm-1".into();
    }
    shown
}

/// A snapshot (2.8).
pub(crate) fn snapshot(world: &World, snapshot: &Snapshot) -> Value {
    let volume = world.volumes.get(&snapshot.volume);
    let mut shown = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "volumeid": snapshot.volume,
        "volumename": volume.map(|v| v.name.as_str()).unwrap_or_default(),
        "volumetype": volume.map(|v| v.kind.as_str()).unwrap_or_default(),
        "state": snapshot.state,
        "snapshottype": "MANUAL",
        "intervaltype": "MANUAL",
        "created": time::text(snapshot.created),
        "account": snapshot.account,
        "domain": "ROOT",
        "domainid": DOMAIN,
        "virtualsize": snapshot.size,
        "revertable": true,
        "tags": tags(&snapshot.tags, "Snapshot", &snapshot.id, &snapshot.account),
    });
    if snapshot.state == "BackedUp" {
        shown["physicalsize"] = snapshot.size.into();
    }
    shown
}
