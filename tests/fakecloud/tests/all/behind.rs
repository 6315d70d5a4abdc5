//! What goes on behind the client's back, with a hypervisor that only writes down.

use std::sync::Arc;
use std::time::Duration;

use fakecloud::{DeviceFault, Effect, FakeCloud, Fault, Hypervisor, Identity, Kind, NewVm, Options, Plug};
use parking_lot::Mutex;

use crate::client::{PATIENCE, attach, call, create, done, ended, failed};

/// Remembers what is plugged.
pub struct Recorder {
    vm: String,
    plugged: Arc<Mutex<Vec<Plug>>>,
}

impl Recorder {
    pub fn new(vm: &str) -> Self {
        Recorder { vm: vm.to_owned(), plugged: Arc::default() }
    }

    pub fn plugged(&self) -> Arc<Mutex<Vec<Plug>>> {
        Arc::clone(&self.plugged)
    }
}

impl Hypervisor for Recorder {
    fn serves(&self, vm: &str) -> bool {
        vm == self.vm
    }

    fn plug(&self, disk: &Plug) -> Result<(), String> {
        self.plugged.lock().push(disk.clone());
        Ok(())
    }

    fn unplug(&self, disk: &Plug) -> Result<(), String> {
        self.plugged.lock().retain(|p| p.key != disk.key);
        Ok(())
    }

    fn resized(&self, disk: &Plug) -> Result<(), String> {
        self.plugged.lock().iter_mut().filter(|p| p.key == disk.key).for_each(|p| p.size = disk.size);
        Ok(())
    }
}

fn cloud() -> (FakeCloud, Arc<Mutex<Vec<Plug>>>) {
    let host = NewVm::new("host");
    let hypervisor = Box::new(Recorder::new(&host.id));
    let plugged = hypervisor.plugged();
    let vms = vec![NewVm::new("other")];
    (FakeCloud::start(Options { host, hypervisor, vms, ..Options::default() }).unwrap(), plugged)
}

#[test]
fn the_hosts_root_disk_is_plugged_from_the_start_and_others_never() {
    let (cloud, plugged) = cloud();
    let root = cloud.on_vm(&cloud.host())[0].clone();
    assert_eq!((root.device_id, root.kind.as_str()), (Some(0), "ROOT"));
    let there: Vec<_> = plugged.lock().iter().map(|p| p.volume.clone()).collect();
    assert_eq!(there, [root.id]);
}

#[test]
fn a_device_comes_late_when_told_wrongly_named_short_or_twice() {
    let (cloud, plugged) = cloud();
    let of = |id: &str| plugged.lock().iter().filter(|p| p.volume == id).cloned().collect::<Vec<_>>();
    let with = |fault: DeviceFault| {
        let id = create(&cloud, "v", "1");
        cloud.device_fault(&id, fault);
        attach(&cloud, &id);
        id
    };
    let late = with(DeviceFault::Late(Duration::from_millis(50)));
    assert!(cloud.wait_for(PATIENCE, |c| c.effects(Effect::Plugged, Some(&late)) == 1));
    let held = with(DeviceFault::Held);
    assert!(of(&held).is_empty());
    cloud.let_device_come(&held).unwrap();
    assert_eq!(of(&held).len(), 1);
    let named = with(DeviceFault::Known(Identity::Text("something".into())));
    assert_eq!(of(&named)[0].identity.serial(), "something");
    let short = with(DeviceFault::Size(512));
    assert_eq!(of(&short)[0].size, 512);
    let twice = with(DeviceFault::Twin);
    let [one, two] = &of(&twice)[..] else { panic!("{:?}", of(&twice)) };
    assert_eq!(one.identity, two.identity);
    for id in [late, held, named, short, twice] {
        done(&cloud, "detachVolume", &[("id", &id)]);
        assert!(of(&id).is_empty());
    }
    assert_eq!(plugged.lock().len(), 1, "the root disk alone");
}

#[test]
fn a_device_that_never_came_does_not_come_after_its_detach() {
    let (cloud, plugged) = cloud();
    let id = create(&cloud, "v", "1");
    cloud.device_fault(&id, DeviceFault::Held);
    attach(&cloud, &id);
    done(&cloud, "detachVolume", &[("id", &id)]);
    cloud.let_device_come(&id).unwrap();
    assert_eq!(plugged.lock().len(), 1);
}

#[test]
fn a_guest_that_keeps_its_disk_fails_the_detach_in_the_agents_words() {
    let (cloud, plugged) = cloud();
    let id = create(&cloud, "v", "1");
    attach(&cloud, &id);
    cloud.device_fault(&id, DeviceFault::Stuck);
    let (code, text) = failed(&cloud, "detachVolume", &[("id", &id)]);
    assert!(code == 530 && text.contains("Failed to detach volume v from VM host; Could not detach"), "{text}");
    assert!(cloud.volume(&id).unwrap().vm.is_some() && plugged.lock().len() == 2);
    cloud.device_fault(&id, None);
    done(&cloud, "detachVolume", &[("id", &id)]);
    assert_eq!(plugged.lock().len(), 1);
}

#[test]
fn an_orphan_takes_its_target_name_from_the_next_attach() {
    let (cloud, _) = cloud();
    let (orphan, id) = (create(&cloud, "orphan", "1"), create(&cloud, "v", "1"));
    cloud.plug_device(&orphan, &cloud.host(), 1).unwrap();
    let (code, text) = failed(&cloud, "attachVolume", &[("id", &id), ("virtualmachineid", &cloud.host())]);
    assert!(code == 530 && text.contains("target 'vdb' duplicated"), "{text}");
    assert_eq!(cloud.volume(&id).unwrap().state, "Ready");
    cloud.pull_device(&orphan).unwrap();
    attach(&cloud, &id);
}

#[test]
fn an_administrator_attaches_and_detaches_without_being_counted() {
    let (cloud, plugged) = cloud();
    let id = create(&cloud, "v", "1");
    cloud.admin_attach(&id, &cloud.host()).unwrap();
    assert_eq!(plugged.lock().len(), 2);
    cloud.admin_detach(&id).unwrap();
    let job = cloud.admin_attach_job(&id, &cloud.host()).unwrap();
    assert!(cloud.wait_for(PATIENCE, |c| c.job(&job).unwrap().done()));
    assert_eq!(plugged.lock().len(), 2);
    let job = cloud.admin_detach_job(&id).unwrap();
    assert!(cloud.wait_for(PATIENCE, |c| c.job(&job).unwrap().done()));
    assert_eq!(plugged.lock().len(), 1);
    assert_eq!((cloud.effects(Effect::Attached, None), cloud.effects(Effect::Detached, None)), (0, 0));
    assert_eq!(cloud.log().iter().filter(|d| d.effect == Effect::Attached && d.by_admin).count(), 2);
}

#[test]
fn a_stopped_vm_has_no_devices_and_gets_them_back() {
    let (cloud, plugged) = cloud();
    let id = create(&cloud, "v", "1");
    attach(&cloud, &id);
    cloud.set_vm_state(&cloud.host(), "Stopped").unwrap();
    assert!(plugged.lock().is_empty());
    let other = create(&cloud, "w", "1");
    attach(&cloud, &other);
    assert!(plugged.lock().is_empty(), "a change of the books only");
    cloud.set_vm_state(&cloud.host(), "Running").unwrap();
    assert_eq!(plugged.lock().len(), 3);
}

#[test]
fn a_stale_list_shows_an_earlier_moment_as_often_as_it_was_told() {
    let (cloud, _) = cloud();
    let id = create(&cloud, "v", "1");
    let before = cloud.view();
    attach(&cloud, &id);
    cloud.fault(Fault::new("listVolumes", Kind::Stale(before)).times(2));
    let attached = || call(&cloud, "listVolumes", &[("id", &id)])["volume"][0].get("virtualmachineid").is_some();
    assert_eq!([attached(), attached(), attached()], [false, false, true]);
    assert!(call(&cloud, "listVolumes", &[("virtualmachineid", &cloud.host())])["count"] == 2);
}

#[test]
fn what_is_out_of_sight_is_not_listed() {
    let (cloud, _) = cloud();
    let id = create(&cloud, "v", "1");
    cloud.hide_volume(&id, true).unwrap();
    assert_eq!(call(&cloud, "listVolumes", &[("id", &id)]), serde_json::json!({}));
    cloud.hide_vm(&cloud.host(), true).unwrap();
    assert_eq!(call(&cloud, "listVirtualMachines", &[("id", &cloud.host())]), serde_json::json!({}));
    cloud.rename(&id, "w").unwrap();
    cloud.hide_volume(&id, false).unwrap();
    assert_eq!(call(&cloud, "listVolumes", &[("name", "w")])["count"], 1);
}

#[test]
fn a_chosen_id_is_the_next_volumes() {
    let (cloud, _) = cloud();
    // One prefix of 20 digits.
    let ids = ["3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f", "3c9a6f0e-5b7d-4e1a-8f22-ffffffffffff"];
    cloud.next_volume_ids(&ids);
    assert_eq!([create(&cloud, "a", "1"), create(&cloud, "b", "1")], ids);
}

#[test]
fn a_wait_is_woken_by_what_it_waits_for_and_gives_up_in_time() {
    let (cloud, _) = cloud();
    let id = create(&cloud, "v", "1");
    let waiter = std::thread::spawn({
        let (cloud, id) = (cloud.clone(), id.clone());
        move || cloud.wait_for(PATIENCE, |c| c.volume(&id).unwrap().device_id == Some(1))
    });
    let job = call(&cloud, "attachVolume", &[("id", &id), ("virtualmachineid", &cloud.host())]);
    ended(&cloud, job["jobid"].as_str().unwrap());
    assert!(waiter.join().unwrap());
    assert!(!cloud.wait_for(Duration::from_millis(10), |_| false));
}
