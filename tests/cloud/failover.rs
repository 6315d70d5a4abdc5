//! The scripts of a failover test over the cloud: its snapshots, its root disks, its refusals.

use std::os::unix::fs::FileExt;

use fakecloud::{Fault, Kind, NewVm, Options};

use crate::common::{PATIENCE, Said};
use crate::site::Site;

const DISKS: [&str; 2] = ["os", "data"];
const SCRIPTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/scripts");

struct Stage {
    site: Site,
    ids: Vec<String>,
    vm: String,
}

impl Stage {
    /// A job of two attached disks, and a stopped VM.
    fn new(root_disk: bool) -> Self {
        let mut options = Options::with_loops();
        let vm = NewVm { root_disk, ..NewVm::stopped("test-vm") };
        options.vms.push(vm.clone());
        let site = Site::with(options, &[]);
        let ids = site.job("j", &DISKS, "1G");
        let stage = Stage { site, ids, vm: vm.id };
        assert_eq!(stage.site.volfs.write("jobs/j/control", "attach"), 0, "{}", stage.site.volfs.log());
        stage
    }

    fn sh(&self, script: &str) -> Said {
        self.site.volfs.sh(&format!("JOB=j TEST_VM={} OS_DISK=os exec sh {script}", self.vm))
    }

    #[track_caller]
    fn ok(&self, name: &str) -> String {
        let said = self.sh(&format!("{SCRIPTS}/{name}"));
        assert_eq!(said.status, 0, "{name}: {said:?}\n{}", self.site.volfs.log());
        said.out
    }

    fn write(&self, text: &str) {
        for disk in DISKS {
            self.site.volfs.ok(&format!(
                "printf '{text} {disk}' | dd of=$R/jobs/j/disks/{disk}/block conv=notrunc,fsync status=none"
            ));
        }
    }

    /// The test VM runs, and writes to all of the job's disks that it has.
    fn vm_writes(&self) {
        self.site.cloud.set_vm_state(&self.vm, "Running").unwrap();
        for id in self.site.cloud.on_vm(&self.vm).into_iter().map(|v| v.id).filter(|id| self.ids.contains(id)) {
            let file = std::fs::OpenOptions::new().write(true).open(self.site.cloud.file(&id)).unwrap();
            file.write_all_at(b"by the test VM, at length", 0).unwrap();
        }
        self.site.cloud.set_vm_state(&self.vm, "Stopped").unwrap();
    }

    #[track_caller]
    fn is_home(&self, text: &str, at: &str) {
        let site = &self.site;
        assert_eq!(site.volfs.value("jobs/j/status"), "idle attached=2", "{at}: {}", site.volfs.log());
        for disk in DISKS {
            let expected = format!("{text} {disk}");
            let head = site.volfs.ok(&format!("head -c {} $R/jobs/j/disks/{disk}/block", expected.len()));
            assert_eq!(head, expected, "{at}: {}", site.volfs.log());
        }
        let live = site.cloud.snapshots().iter().filter(|s| s.state == "BackedUp").count();
        assert_eq!((live, site.volfs.ok("ls $R/jobs")), (0, "j".into()), "{at}");
    }
}

#[test]
fn predecessor_98_the_failover_scripts_bring_every_volume_home_with_its_bytes() {
    let stage = Stage::new(false);
    stage.write("before");
    for _ in 0..2 {
        assert_eq!(stage.ok("test-failover"), "");
        assert_eq!(stage.site.cloud.on_vm(&stage.vm).len(), 2);
    }
    stage.vm_writes();
    for _ in 0..2 {
        assert_eq!(stage.ok("rollback-failover"), "");
        assert!(stage.site.cloud.wait_for(PATIENCE, |cloud| cloud.on_vm(&stage.vm).is_empty()));
        stage.is_home("before", "after all of it");
    }
}

#[test]
fn predecessor_98_killed_where_something_was_just_done_the_cloud_ends_as_before() {
    let stage = Stage::new(false);
    let text = std::fs::read_to_string(format!("{SCRIPTS}/test-failover")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let after = |what: &str| lines.iter().position(|l| l.trim_start().starts_with(what)).unwrap() + 1;
    for (n, line) in ["mkdir", "tell detach", "tell \"snapshot", "echo \"$TEST_VM\"", "tell \"attach vm=$TEST_VM root"]
        .map(after)
        .into_iter()
        .chain([lines.len() - 1])
        .enumerate()
    {
        let before = format!("round{n}");
        stage.write(&before);
        let mut cut = lines.clone();
        cut.insert(line, "kill -9 $$");
        let path = stage.site.volfs.scratch("cut");
        std::fs::write(&path, cut.join("\n")).unwrap();
        let at = format!("killed after {:?}", lines[line - 1]);
        assert_eq!(stage.sh(&path.display().to_string()).status, -9, "{at}");
        stage.vm_writes();
        assert_eq!(stage.ok("rollback-failover"), "", "{at}");
        stage.is_home(&before, &at);
    }
}

#[test]
fn predecessor_98_a_snapshot_that_fails_hands_nothing_over() {
    let stage = Stage::new(false);
    stage.write("before");
    let refuses = Kind::JobFails { at: fakecloud::Moment::Working, code: 530, text: "no room for a snapshot".into() };
    stage.site.cloud.fault(Fault::new("createSnapshot", refuses));
    let said = stage.sh(&format!("{SCRIPTS}/test-failover"));
    assert!(said.status != 0 && said.err.contains("no room for a snapshot"), "{said:?}");
    assert!(stage.site.cloud.on_vm(&stage.vm).is_empty());
    stage.is_home("before", "after a failed snapshot");
}

#[test]
fn predecessor_98_a_revert_of_which_nobody_knows_the_end_is_done_again() {
    let stage = Stage::new(false);
    stage.write("before");
    stage.ok("test-failover");
    stage.vm_writes();
    stage.site.cloud.fault(Fault::new("revertSnapshot", Kind::JobLost));
    let said = stage.sh(&format!("{SCRIPTS}/rollback-failover"));
    assert_ne!(said.status, 0, "it does not guess: {said:?}");
    assert_eq!(stage.ok("rollback-failover"), "");
    stage.is_home("before", "after a second run");
}

#[test]
fn a_vms_own_root_disk_is_replaced_by_the_jobs() {
    let stage = Stage::new(true);
    stage.write("before");
    let own = stage.site.cloud.on_vm(&stage.vm).remove(0).id;
    assert_ne!(stage.sh(&format!("{SCRIPTS}/test-failover")).status, 0, "its place is taken");
    stage.is_home("before", "refused");
    for _ in 0..2 {
        assert_eq!(stage.ok("replace-root"), "");
        assert_eq!(stage.site.cloud.on_vm(&stage.vm).len(), 2);
        assert!(!stage.site.cloud.volume(&own).is_some_and(|v| v.exists() && v.state != "Destroy"));
        assert_eq!(stage.site.value("j", "os", "device_id"), "0");
    }
    stage.vm_writes();
    assert_eq!(stage.ok("rollback-failover"), "");
    stage.is_home("before", "after all of it");
}
