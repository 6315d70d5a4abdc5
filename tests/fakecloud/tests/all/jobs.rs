//! Jobs: ids, queues, moments, ends (section 3, 4.2, 4.3).

use std::time::Duration;

use fakecloud::{Effect, FakeCloud, Fault, Kind, Moment, NewVm, Options};

use crate::client::{PATIENCE, attach, call, create, done, ended, failed, refused};

const OURS: &str = "11111111-2222-4333-8444-555566667777";

fn cloud() -> FakeCloud {
    FakeCloud::start(Options::default()).unwrap()
}

/// Starts an attach to the host that stops at `moment`; the job's id when it is there.
fn held(cloud: &FakeCloud, command: &str, moment: Moment, params: &[(&str, &str)]) -> String {
    cloud.fault(Fault::new(command, Kind::JobHangs(moment)));
    let job = call(cloud, command, params)["jobid"].as_str().unwrap().to_owned();
    assert!(cloud.wait_for(PATIENCE, |c| c.held_jobs().contains(&job)));
    job
}

fn shown(cloud: &FakeCloud, id: &str) -> serde_json::Value {
    call(cloud, "listVolumes", &[("id", id)])["volume"][0].clone()
}

#[test]
fn an_attach_shows_its_moments_one_after_the_other() {
    for (moment, state, attached) in [
        (Moment::Queued, "Ready", false),
        (Moment::Working, "Attaching", false),
        (Moment::Done, "Attaching", false),
        (Moment::Recorded, "Attaching", true),
        (Moment::Closing, "Ready", true),
    ] {
        let cloud = cloud();
        let id = cloud.add_volume("v", 1 << 20).unwrap();
        let job = held(&cloud, "attachVolume", moment, &[("id", &id), ("virtualmachineid", &cloud.host())]);
        let volume = shown(&cloud, &id);
        assert_eq!(volume["state"], state, "{moment:?}");
        for field in ["virtualmachineid", "deviceid", "attached"] {
            assert_eq!(volume.get(field).is_some(), attached, "{moment:?}: {field}");
        }
        assert_eq!((&volume["jobid"], &volume["jobstatus"]), (&job.as_str().into(), &0.into()), "{moment:?}");
        assert_eq!(call(&cloud, "queryAsyncJobResult", &[("jobid", &job)])["jobstatus"], 0);
        assert_eq!(call(&cloud, "listAsyncJobs", &[])["asyncjobs"][0]["jobid"], job);
        cloud.release_jobs();
        assert_eq!(ended(&cloud, &job)["jobstatus"], 1);
        assert_eq!(shown(&cloud, &id)["deviceid"], 1);
        assert!(shown(&cloud, &id).get("jobid").is_none());
        assert_eq!(call(&cloud, "listAsyncJobs", &[]), serde_json::json!({}));
    }
}

#[test]
fn a_detach_shows_nothing_but_its_job_until_all_fields_go_together() {
    for (moment, attached) in [(Moment::Working, true), (Moment::Done, true), (Moment::Recorded, false)] {
        let cloud = cloud();
        let id = create(&cloud, "v", "1");
        attach(&cloud, &id);
        let job = held(&cloud, "detachVolume", moment, &[("id", &id)]);
        let volume = shown(&cloud, &id);
        assert_eq!((&volume["state"], &volume["jobid"]), (&"Ready".into(), &job.as_str().into()));
        for field in ["virtualmachineid", "deviceid", "attached"] {
            assert_eq!(volume.get(field).is_some(), attached, "{moment:?}: {field}");
        }
        cloud.release_jobs();
        assert_eq!(ended(&cloud, &job)["jobstatus"], 1);
    }
}

#[test]
fn jobs_of_one_vm_run_one_at_a_time_in_the_order_of_their_calls() {
    let other = NewVm::new("other");
    let vm = other.id.clone();
    let cloud = FakeCloud::start(Options { vms: vec![other], ..Options::default() }).unwrap();
    let ids: Vec<_> = (0..4).map(|n| create(&cloud, &format!("v{n}"), "1")).collect();
    let first = held(&cloud, "attachVolume", Moment::Working, &[("id", &ids[0]), ("virtualmachineid", &cloud.host())]);
    let more = |n: usize, vm: &str| {
        let accepted = call(&cloud, "attachVolume", &[("id", &ids[n]), ("virtualmachineid", vm)]);
        accepted["jobid"].as_str().unwrap().to_owned()
    };
    let (second, third) = (more(1, &cloud.host()), more(2, &cloud.host()));
    // Another VM's queue is not held up.
    assert_eq!(ended(&cloud, &more(3, &vm))["jobstatus"], 1);
    assert!(!cloud.job(&second).unwrap().done() && !cloud.job(&third).unwrap().done());
    assert_eq!(shown(&cloud, &ids[1])["jobid"], second, "a queued attach is visible before the volume changes");
    assert_eq!(shown(&cloud, &ids[1])["state"], "Allocated");
    cloud.release_jobs();
    for job in [&first, &second, &third] {
        assert_eq!(ended(&cloud, job)["jobstatus"], 1);
    }
    let order: Vec<_> = cloud.log().into_iter().filter(|d| d.effect == Effect::Attached).map(|d| d.volume).collect();
    assert_eq!(order, [&ids[3], &ids[0], &ids[1], &ids[2]].map(String::clone));
    assert_eq!([0, 1, 2].map(|n| cloud.volume(&ids[n]).unwrap().device_id), [Some(1), Some(2), Some(4)]);
}

#[test]
fn of_two_attaches_of_one_volume_the_second_loses_in_its_job() {
    let other = NewVm::new("other");
    let vm = other.id.clone();
    let cloud = FakeCloud::start(Options { vms: vec![other], ..Options::default() }).unwrap();
    let id = create(&cloud, "v", "1");
    let first = held(&cloud, "attachVolume", Moment::Queued, &[("id", &id), ("virtualmachineid", &cloud.host())]);
    let second = call(&cloud, "attachVolume", &[("id", &id), ("virtualmachineid", &cloud.host())]);
    cloud.release_jobs();
    assert_eq!(ended(&cloud, &first)["jobstatus"], 1);
    let second = ended(&cloud, second["jobid"].as_str().unwrap());
    assert_eq!(second["jobresultcode"], 530);
    assert!(second["jobresult"]["errortext"].as_str().unwrap().contains("is already attached to a VM"));
    assert_eq!(failed(&cloud, "attachVolume", &[("id", &id), ("virtualmachineid", &vm)]).0, 431);
    assert_eq!(cloud.effects(Effect::Attached, Some(&id)), 1);
}

#[test]
fn a_detach_keeps_the_vm_of_its_call_and_clears_whatever_it_finds() {
    // #14214: a late detach for A clears the attachment to B.
    let other = NewVm::new("other");
    let vm = other.id.clone();
    let cloud = FakeCloud::start(Options { vms: vec![other], ..Options::default() }).unwrap();
    let id = create(&cloud, "v", "1");
    attach(&cloud, &id);
    let late = held(&cloud, "detachVolume", Moment::Queued, &[("id", &id)]);
    cloud.admin_detach(&id).unwrap();
    done(&cloud, "attachVolume", &[("id", &id), ("virtualmachineid", &vm)]);
    cloud.release_jobs();
    assert_eq!(ended(&cloud, &late)["jobstatus"], 1);
    assert_eq!(cloud.volume(&id).unwrap().vm, None);
}

#[test]
fn a_job_has_the_callers_id_and_never_twice() {
    let cloud = cloud();
    let id = create(&cloud, "v", "1");
    let host = cloud.host();
    let params = [("id", id.as_str()), ("virtualmachineid", &host), ("customjobid", OURS)];
    let job = held(&cloud, "attachVolume", Moment::Working, &params);
    assert_eq!(job, OURS);
    assert_eq!(
        refused(&cloud, "attachVolume", &params),
        (431, format!("UUID: {OURS} already exists so can't create/update with custom id"))
    );
    cloud.release_jobs();
    assert_eq!(ended(&cloud, OURS)["jobstatus"], 1);
    assert_eq!(refused(&cloud, "attachVolume", &params).0, 530);
    let upper = [("id", id.as_str()), ("customjobid", "AAAAAAAA-2222-4333-8444-555566667777")];
    assert_eq!(refused(&cloud, "detachVolume", &upper).0, 431);
    assert_eq!(cloud.effects(Effect::Attached, Some(&id)), 1);
}

#[test]
fn a_refused_job_id_leaves_the_volume_of_its_creation_behind() {
    let cloud = cloud();
    let (zone, offering) = (cloud.zones()[0].id.clone(), cloud.offerings()[0].id.clone());
    let params = [("zoneid", zone.as_str()), ("diskofferingid", &offering), ("size", "1"), ("customjobid", OURS)];
    done(&cloud, "createVolume", &params);
    refused(&cloud, "createVolume", &params);
    assert_eq!(cloud.data_volumes().len(), 2);
}

#[test]
fn a_server_that_does_not_take_job_ids_gives_its_own() {
    let without = FakeCloud::start(Options { custom_job_ids: false, ..Options::default() }).unwrap();
    let with = cloud();
    with.fault(Fault::new("detachVolume", Kind::OwnJobId));
    for cloud in [without, with] {
        let job = call(&cloud, "detachVolume", &[("customjobid", OURS)]);
        assert_ne!(job["jobid"], OURS);
        assert_eq!(refused(&cloud, "queryAsyncJobResult", &[("jobid", OURS)]).0, 431);
    }
}

#[test]
fn a_restart_ends_a_job_without_a_result_and_resets_the_state_but_not_the_device() {
    let host = NewVm::new("host");
    let hypervisor = Box::new(crate::behind::Recorder::new(&host.id));
    let plugged = hypervisor.plugged();
    let cloud = FakeCloud::start(Options { host, hypervisor, ..Options::default() }).unwrap();
    for (moment, there, attached) in
        [(Moment::Working, false, false), (Moment::Done, true, false), (Moment::Recorded, true, true)]
    {
        let id = create(&cloud, "v", "1");
        cloud.fault(Fault::new("attachVolume", Kind::ServerRestart(moment)));
        let accepted = call(&cloud, "attachVolume", &[("id", &id), ("virtualmachineid", &cloud.host())]);
        let job = ended(&cloud, accepted["jobid"].as_str().unwrap());
        assert_eq!((&job["jobstatus"], &job["jobresultcode"]), (&2.into(), &530.into()), "{moment:?}");
        assert!(job.get("jobresult").is_none());
        let volume = cloud.volume(&id).unwrap();
        assert_eq!((volume.state.as_str(), volume.vm.is_some()), ("Ready", attached), "{moment:?}");
        assert_eq!(plugged.lock().iter().any(|p| p.volume == id), there, "{moment:?}");
        cloud.admin_detach(&id).unwrap();
        cloud.pull_device(&id).unwrap();
    }
}

#[test]
fn a_restarted_server_ends_all_its_jobs_queued_ones_too() {
    let cloud = cloud();
    let ids: Vec<_> = (0..2).map(|n| create(&cloud, &format!("v{n}"), "1")).collect();
    let host = cloud.host();
    let first = held(&cloud, "attachVolume", Moment::Working, &[("id", &ids[0]), ("virtualmachineid", &host)]);
    let second = call(&cloud, "attachVolume", &[("id", &ids[1]), ("virtualmachineid", &host)]);
    cloud.restart_server();
    for job in [first.as_str(), second["jobid"].as_str().unwrap()] {
        let job = ended(&cloud, job);
        assert_eq!((&job["jobresultcode"], job.get("jobresult")), (&530.into(), None));
    }
    assert_eq!(cloud.effects(Effect::Attached, None), 0);
    // Creating goes back to Allocated.
    assert_eq!(cloud.volume(&ids[1]).unwrap().state, "Allocated");
    attach(&cloud, &ids[1]);
}

#[test]
fn a_job_fails_before_or_after_its_effect() {
    let cloud = cloud();
    for (at, effects) in [(Moment::Working, 0), (Moment::Recorded, 1)] {
        let id = create(&cloud, "v", "1");
        cloud.fault(Fault::new("attachVolume", Kind::JobFails { at, code: 530, text: "due to: timed out".into() }));
        let found = failed(&cloud, "attachVolume", &[("id", &id), ("virtualmachineid", &cloud.host())]);
        assert_eq!(found, (530, "due to: timed out".into()));
        assert_eq!(cloud.effects(Effect::Attached, Some(&id)), effects, "{at:?}");
        assert_eq!(cloud.volume(&id).unwrap().state, "Ready", "{at:?}");
    }
}

#[test]
fn a_lost_job_is_unknown_and_goes_on() {
    let cloud = cloud();
    let id = create(&cloud, "v", "1");
    cloud.fault(Fault::new("attachVolume", Kind::JobLost));
    let accepted = call(&cloud, "attachVolume", &[("id", &id), ("virtualmachineid", &cloud.host())]);
    let job = accepted["jobid"].as_str().unwrap();
    let (code, text) = refused(&cloud, "queryAsyncJobResult", &[("jobid", job)]);
    assert!(code == 431 && text.contains("Invalid parameter jobid"), "{code} {text}");
    assert!(cloud.wait_for(PATIENCE, |c| c.effects(Effect::Attached, Some(&id)) == 1));
}

#[test]
fn a_job_takes_as_long_as_its_command_is_told_to() {
    let cloud = cloud();
    let id = create(&cloud, "v", "1");
    cloud.set_delay("attachVolume", Duration::from_millis(300));
    let began = std::time::Instant::now();
    attach(&cloud, &id);
    assert!(began.elapsed() >= Duration::from_millis(300));
}
