//! The shipped scripts over the cloud: run, run again, and killed in between.

use std::fs;
use std::process::{Command, Stdio};

use fakecloud::{Effect, NewVm, Options};

use crate::common::{SHELLS, Said, killed_copies, said_of, shipped};
use crate::site::{MARK, Site};

fn run(site: &Site, shell: &[&str], script: &std::path::Path, env: &[(&str, &str)], args: &[&str]) -> Said {
    let mut command = Command::new(shell[0]);
    command.args(&shell[1..]).arg(script).args(args).env("VOLFS", site.volfs.root()).envs(env.iter().copied());
    said_of(command.current_dir(site.volfs.scratch("")).stdin(Stdio::null()).output().unwrap())
}

#[track_caller]
fn ok(site: &Site, shell: &[&str], name: &str, env: &[(&str, &str)], args: &[&str]) -> Said {
    let said = run(site, shell, &shipped(name), env, args);
    assert_eq!(said.status, 0, "{name} in {shell:?}: {said:?}\n{}", site.volfs.log());
    said
}

/// Kills the script after each of its lines, and runs it again after each kill.
#[track_caller]
fn killed_and_again(site: &Site, name: &str, args: &[&str], mut env: impl FnMut(usize) -> Vec<(&'static str, String)>) {
    for (n, (line, text)) in killed_copies(name).into_iter().enumerate() {
        let shell = SHELLS[n % SHELLS.len()];
        let own = env(n);
        let env: Vec<_> = own.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let path = site.volfs.scratch("killed");
        fs::write(&path, text).unwrap();
        let said = run(site, shell, &path, &env, args);
        assert!(matches!(said.status, 0 | -9), "{name} killed after line {line}: {said:?}\n{}", site.volfs.log());
        ok(site, shell, name, &env, args);
    }
}

#[test]
fn predecessor_69_a_job_is_provisioned_and_cleaned_up_by_scripts_that_are_killed_everywhere() {
    let site = Site::start();
    fs::write(site.volfs.scratch("image"), vec![b'a'; 1 << 16]).unwrap();
    let other = site.job("other", &["d"], "1G");
    let disks = ["os=1G=image", "data=1G"];
    killed_and_again(&site, "provision", &disks, |_| vec![("JOB", "j".into()), ("VM_NAME", "web1".into())]);
    assert_eq!(site.cloud.calls("createVolume"), 3, "each disk once");
    assert_eq!(site.volfs.value("jobs/j/status"), "idle attached=2");
    assert_eq!(site.volfs.ok("head -c 4 $R/jobs/j/disks/os/block"), "aaaa");
    let device = site.value("j", "os", "device");
    let said = ok(&site, &["dash"], "where", &[], &[&device]);
    let id = site.volfs.ok("readlink $R/jobs/j/disks/os").replace("../volumes/", "");
    assert!(said.out.ends_with(&format!("\tjobs/j/volumes/{id}\n")), "{said:?}");

    killed_and_again(&site, "hand-over", &[], |n| {
        vec![("JOB", format!("j{n}")), ("NEW", format!("j{}", n + 1))]
            .into_iter()
            .map(|(k, v)| (k, if v == "j0" { "j".into() } else { v }))
            .collect()
    });
    let last = format!("j{}", killed_copies("hand-over").len());
    assert_eq!(site.volfs.value(format!("jobs/{last}/status")), "idle attached=2");

    // What is shown, and no more, goes.
    let calls = site.cloud.calls("destroyVolume");
    assert_eq!(run(&site, &["dash"], &shipped("cleanup-failed-job"), &[("JOB", &last)], &[]).status, 1);
    assert_eq!(site.cloud.calls("destroyVolume"), calls);
    killed_and_again(&site, "cleanup-failed-job", &["--yes"], |_| vec![("JOB", last.clone())]);
    assert!(!site.volfs.path(format!("jobs/{last}")).exists());
    assert_eq!(site.cloud.effects(Effect::Created, None), 3);
    let left = site.cloud.volume(&other[0]).unwrap();
    assert!(left.exists() && left.state != "Destroy", "{left:?}");
    assert_eq!(site.value("other", "d", "status"), "detached");
    assert_eq!(site.cloud.volume(&id).unwrap().state, "Destroy", "recoverable");
}

#[test]
fn c8_a_failover_is_committed_to_the_vm_that_has_every_volume_and_to_no_other() {
    let mut options = Options::with_loops();
    let vms = ["live", "elsewhere"].map(NewVm::stopped);
    options.vms.extend(vms.iter().cloned());
    let site = Site::with(options, &[]);
    let ids = site.job("j", &["os", "data"], "1G");
    let (live, elsewhere) = (&vms[0].id, &vms[1].id);
    assert_eq!(site.disk("j", "os", &format!("attach vm={live}")), 0, "{}", site.volfs.log());
    assert_eq!(site.disk("j", "data", &format!("attach vm={elsewhere}")), 0);
    let marked = || ids.iter().filter(|id| site.cloud.volume(id).unwrap().tags.contains_key(MARK)).count();
    for (vm, in_the_way) in [(live, &ids[1]), (elsewhere, &ids[0])] {
        let said = run(&site, &["dash"], &shipped("commit-failover"), &[("JOB", "j"), ("VM", vm)], &[]);
        assert_eq!((said.status, marked()), (1, 2), "{said:?}");
        assert!(said.err.contains(in_the_way), "{said:?}");
    }
    assert_eq!(site.disk("j", "data", &format!("detach vm={elsewhere}")), 0);
    assert_eq!(site.disk("j", "data", &format!("attach vm={live}")), 0);
    site.cloud.set_vm_state(live, "Running").unwrap();
    let detached = site.cloud.effects(Effect::Detached, None);
    killed_and_again(&site, "commit-failover", &[], |_| vec![("JOB", "j".into()), ("VM", live.clone())]);
    assert!(!site.volfs.path("jobs/j").exists());
    assert_eq!((marked(), site.cloud.effects(Effect::Detached, None)), (0, detached), "they only changed their owner");
    assert!(ids.iter().all(|id| site.cloud.volume(id).unwrap().vm.as_ref() == Some(live)));
}
