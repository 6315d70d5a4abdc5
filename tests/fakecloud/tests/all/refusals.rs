//! What is refused, where, and in which words (2.3 to 2.7).

use fakecloud::{FakeCloud, GIB, NewVm, Options, Zone};

use crate::client::{attach, call, create, done, failed, job, refused};

/// A cloud with a stopped VM besides the host, and that VM's id.
fn cloud() -> (FakeCloud, String) {
    let other = NewVm::stopped("other");
    let id = other.id.clone();
    let zones = vec![Zone::new("zone-1"), Zone::new("zone-2")];
    (FakeCloud::start(Options { vms: vec![other], zones, ..Options::default() }).unwrap(), id)
}

fn refuses_attach(cloud: &FakeCloud, volume: &str, vm: &str, code: u64, begins: &str) {
    let (found, text) = failed(cloud, "attachVolume", &[("id", volume), ("virtualmachineid", vm)]);
    assert!(found == code && text.starts_with(begins), "{found} {text:?} is not {code} {begins:?}");
}

#[test]
fn an_attach_is_refused_for_the_volumes_state_and_the_vms() {
    let (cloud, other) = cloud();
    let (host, id) = (cloud.host(), create(&cloud, "v", "1"));
    for state in ["Migrating", "Starting"] {
        cloud.set_vm_state(&host, state).unwrap();
        refuses_attach(&cloud, &id, &host, 431, "Please specify a VM that is either running or stopped.");
    }
    cloud.set_vm_state(&host, "Running").unwrap();
    cloud.set_vm_snapshots(&host, 1).unwrap();
    refuses_attach(&cloud, &id, &host, 431, "Unable to attach volume to VM, please specify a VM that does not have VM");
    assert_eq!(call(&cloud, "listVMSnapshot", &[("virtualmachineid", &host)])["count"], 1);
    cloud.set_vm_snapshots(&host, 0).unwrap();
    cloud.change_vm(&host, |vm| vm.backups = true).unwrap();
    refuses_attach(
        &cloud,
        &id,
        &host,
        431,
        "Unable to attach volume, please specify a VM that does not have any backups",
    );
    cloud.change_vm(&host, |vm| vm.backups = false).unwrap();
    cloud.admin_destroy(&id, true).unwrap();
    refuses_attach(&cloud, &id, &host, 431, "Please specify a volume with the valid type");
    let id = cloud.add_volume("ready", GIB).unwrap();
    cloud.start_snapshot(&id).unwrap();
    refuses_attach(&cloud, &id, &host, 431, "Volume state must be in Allocated, Ready or in Uploaded state");
    let id = cloud.add_volume("gone", GIB).unwrap();
    cloud.admin_destroy(&id, false).unwrap();
    refuses_attach(&cloud, &id, &host, 431, "Please specify a volume that is not destroyed.");
    let id = cloud.add_volume("elsewhere", GIB).unwrap();
    cloud.admin_attach(&id, &other).unwrap();
    refuses_attach(&cloud, &id, &host, 431, "Please specify a volume that is not attached to any VM.");
    assert_eq!(cloud.volume(&id).unwrap().vm, Some(other));
}

#[test]
fn another_zones_volume_is_refused() {
    let (cloud, _) = cloud();
    let id = create(&cloud, "v", "1");
    let zone = cloud.zones()[1].id.clone();
    cloud.change_volume(&id, |v| v.zone = zone).unwrap();
    refuses_attach(&cloud, &id, &cloud.host(), 431, "Please specify a VM that is in the same zone as the volume.");
}

#[test]
fn device_ids_are_the_lowest_free_ones_without_0_and_3() {
    let (cloud, _) = cloud();
    let host = cloud.host();
    let ids: Vec<_> = (0..4).map(|n| create(&cloud, &format!("v{n}"), "1")).collect();
    let got: Vec<_> = ids.iter().map(|id| attach(&cloud, id)["deviceid"].as_u64().unwrap()).collect();
    assert_eq!(got, [1, 2, 4, 5]);
    done(&cloud, "detachVolume", &[("id", &ids[1])]);
    assert_eq!(attach(&cloud, &ids[1])["deviceid"], 2);
    done(&cloud, "detachVolume", &[("id", &ids[0])]);
    let asked = |device: &str| {
        failed(&cloud, "attachVolume", &[("id", &ids[0]), ("virtualmachineid", &host), ("deviceid", device)])
    };
    assert_eq!(asked("3"), (530, "deviceId should be 0,1,2,4-33".into()));
    assert_eq!(asked("34").0, 530);
    assert!(asked("2").1.starts_with("deviceId 2 is used by vol v1 on vm migration-host"));
    assert!(asked("0").1.contains("stopped"));
}

#[test]
fn a_full_vm_says_how_many_disks_it_has() {
    let (cloud, _) = cloud();
    cloud.change_vm(&cloud.host(), |vm| vm.most_disks = 2).unwrap();
    for n in 0..2 {
        attach(&cloud, &create(&cloud, &format!("v{n}"), "1"));
    }
    let id = create(&cloud, "v2", "1");
    refuses_attach(
        &cloud,
        &id,
        &cloud.host(),
        431,
        "The specified VM already has the maximum number of data disks (2)",
    );
}

#[test]
fn a_root_disk_goes_to_device_0_of_a_stopped_vm_without_one() {
    let other = NewVm { root_disk: false, ..NewVm::stopped("other") };
    let vm = other.id.clone();
    let cloud = FakeCloud::start(Options { vms: vec![other], ..Options::default() }).unwrap();
    let id = create(&cloud, "root", "1");
    let params = [("id", id.as_str()), ("virtualmachineid", &vm), ("deviceid", "0")];
    let shown = done(&cloud, "attachVolume", &params);
    assert_eq!((&shown["volume"]["type"], &shown["volume"]["deviceid"]), (&"ROOT".into(), &0.into()));
    let second = create(&cloud, "second", "1");
    let params = [("id", second.as_str()), ("virtualmachineid", &vm), ("deviceid", "0")];
    assert_eq!(failed(&cloud, "attachVolume", &params).1, "Vm already has root volume attached to it");
    done(&cloud, "detachVolume", &[("id", &id)]);
    assert_eq!(cloud.volume(&id).unwrap().kind, "DATADISK");
}

#[test]
fn a_detach_takes_an_id_alone_and_refuses_in_the_job() {
    let (cloud, _) = cloud();
    let (host, id) = (cloud.host(), create(&cloud, "v", "1"));
    assert_eq!(
        failed(&cloud, "detachVolume", &[("id", &id)]),
        (431, "The specified volume is not attached to a VM.".into())
    );
    attach(&cloud, &id);
    let tuple = "Please provide either a volume id, or a tuple(device id, instance id)";
    for params in [vec![("id", id.as_str()), ("virtualmachineid", &host)], vec![("deviceid", "1")], vec![]] {
        assert_eq!(failed(&cloud, "detachVolume", &params), (431, tuple.into()), "{params:?}");
    }
    // The worker gets no id.
    assert_eq!(failed(&cloud, "detachVolume", &[("virtualmachineid", &host), ("deviceid", "1")]).0, 530);
    cloud.set_vm_snapshots(&host, 1).unwrap();
    assert!(failed(&cloud, "detachVolume", &[("id", &id)]).1.contains("VM snapshots"));
    cloud.set_vm_snapshots(&host, 0).unwrap();
    let root = cloud.on_vm(&host)[0].id.clone();
    assert!(failed(&cloud, "detachVolume", &[("id", &root)]).1.starts_with("Root volume detach"));
    cloud.change_volume(&id, |v| v.account = "somebody".into()).unwrap();
    assert_eq!(failed(&cloud, "detachVolume", &[("id", &id)]).0, 530, "permission, in the job");
    assert!(cloud.volume(&id).unwrap().vm.is_some());
}

#[test]
fn a_creation_is_refused_in_the_request_and_leaves_nothing() {
    let (cloud, _) = cloud();
    let zone = cloud.zones()[0].id.clone();
    let [custom, fixed] = [0, 1].map(|n| cloud.offerings()[n].id.clone());
    let refuses = |params: &[(&str, &str)]| refused(&cloud, "createVolume", params);
    assert_eq!(
        refuses(&[("zoneid", &zone), ("diskofferingid", &custom)]).1,
        "This disk offering requires a custom size specified"
    );
    assert_eq!(
        refuses(&[("zoneid", &zone), ("diskofferingid", &fixed), ("size", "1")]).1,
        "This disk offering does not allow custom size"
    );
    assert!(
        refuses(&[("zoneid", &zone), ("diskofferingid", &custom), ("size", "1025")]).1.contains("Min: 1. Max: 1024")
    );
    assert_eq!(refuses(&[("diskofferingid", &custom), ("size", "1")]).0, 431);
    cloud.set_quota(Some(1));
    let (code, text) = refuses(&[("zoneid", &zone), ("diskofferingid", &custom), ("size", "1")]);
    assert!(code == 535 && text.contains("'volume'") && text.contains("is exceeded"), "{code} {text}");
    assert!(cloud.data_volumes().is_empty());
    cloud.set_quota(None);
    let made = done(&cloud, "createVolume", &[("zoneid", &zone), ("diskofferingid", &fixed)]);
    assert_eq!(made["volume"]["size"], 5 * GIB);
}

#[test]
fn names_are_not_unique_and_a_repeat_makes_a_second_volume() {
    let (cloud, _) = cloud();
    let (one, two) = (create(&cloud, "same", "1"), create(&cloud, "same", "1"));
    assert_ne!(one, two);
    assert_eq!(call(&cloud, "listVolumes", &[("name", "same")])["count"], 2);
    assert_eq!(call(&cloud, "listVolumes", &[("ids", &format!("{one},{two}"))])["count"], 2);
}

#[test]
fn a_resize_grows_and_refuses_the_rest() {
    let (cloud, _) = cloud();
    let id = create(&cloud, "v", "2");
    assert_eq!(done(&cloud, "resizeVolume", &[("id", &id), ("size", "4")])["volume"]["size"], 4 * GIB);
    assert!(failed(&cloud, "resizeVolume", &[("id", &id), ("size", "1")]).1.contains("shrinkok"));
    cloud.change_volume(&id, |v| v.state = "Migrating".into()).unwrap();
    assert_eq!(failed(&cloud, "resizeVolume", &[("id", &id), ("size", "5")]).0, 431);
    let fixed = cloud.offerings()[1].id.clone();
    cloud.change_volume(&id, |v| (v.state, v.offering) = ("Ready".into(), Some(fixed))).unwrap();
    assert!(failed(&cloud, "resizeVolume", &[("id", &id), ("size", "5")]).1.contains("fixed"));
}

#[test]
fn only_a_free_volume_is_destroyed_and_a_destroyed_one_comes_back() {
    let (cloud, _) = cloud();
    let id = create(&cloud, "v", "1");
    attach(&cloud, &id);
    let attached = "Please specify a volume that is not attached to any VM.";
    assert_eq!(failed(&cloud, "destroyVolume", &[("id", &id)]), (431, attached.into()));
    assert_eq!(refused(&cloud, "deleteVolume", &[("id", &id)]), (431, attached.into()));
    done(&cloud, "detachVolume", &[("id", &id)]);
    done(&cloud, "updateVolume", &[("id", &id), ("deleteprotection", "true")]);
    assert!(failed(&cloud, "destroyVolume", &[("id", &id)]).1.contains("has delete protection enabled"));
    done(&cloud, "updateVolume", &[("id", &id), ("deleteprotection", "false")]);
    done(&cloud, "destroyVolume", &[("id", &id)]);
    let listed = call(&cloud, "listVolumes", &[("id", &id)]);
    assert_eq!((&listed["volume"][0]["state"], &listed["volume"][0]["destroyed"]), (&"Destroy".into(), &true.into()));
    call(&cloud, "recoverVolume", &[("id", &id)]);
    assert_eq!(cloud.volume(&id).unwrap().state, "Ready");
    assert_eq!(refused(&cloud, "recoverVolume", &[("id", &id)]).0, 431);
    assert_eq!(call(&cloud, "deleteVolume", &[("id", &id)])["success"], true);
    assert_eq!(call(&cloud, "listVolumes", &[("id", &id)]), serde_json::json!({}));
    assert_eq!(job(&cloud, "destroyVolume", &[("id", &id)])["jobresultcode"], 431);
}

#[test]
fn a_plain_user_changes_only_a_volumes_name() {
    let (cloud, _) = cloud();
    let id = create(&cloud, "v", "1");
    assert_eq!(done(&cloud, "updateVolume", &[("id", &id), ("name", "w")])["volume"]["name"], "w");
    assert_eq!(failed(&cloud, "updateVolume", &[("id", &id), ("state", "Ready")]).0, 431);
}
