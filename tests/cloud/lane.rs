//! One operation and a cloud of its own, with a volume for each time that it is given; and the judges:
//! the fake's book and the kernel.

use std::any::Any;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use fakecloud::{Effect, GIB, NewVm, Options, Volume};

use crate::site::{MARK, Site};

const ENOENT: i32 = 2;
const EEXIST: i32 = 17;

/// Seconds of a call's deadline here.
pub const DEADLINE: u64 = 8;

/// An operation, and the one of its commands that the fault takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Create,
    CreateMarks,
    CreateRenames,
    Claim,
    Attach,
    AttachThere,
    Detach,
    DetachThere,
    Resize,
    Delete,
    Release,
    MoveUnmarks,
    MoveMarks,
    RenameUnmarks,
    RenameMarks,
}
use Op::*;

/// All of them.
pub const OPS: [Op; 15] = [
    Create,
    CreateMarks,
    CreateRenames,
    Claim,
    Attach,
    AttachThere,
    Detach,
    DetachThere,
    Resize,
    Delete,
    Release,
    MoveUnmarks,
    MoveMarks,
    RenameUnmarks,
    RenameMarks,
];

impl Op {
    pub fn command(self) -> &'static str {
        match self {
            Create => "createVolume",
            CreateMarks | Claim | MoveMarks | RenameMarks => "createTags",
            CreateRenames => "updateVolume",
            Attach | AttachThere => "attachVolume",
            Detach | DetachThere => "detachVolume",
            Resize => "resizeVolume",
            Delete => "destroyVolume",
            Release | MoveUnmarks | RenameUnmarks => "deleteTags",
        }
    }

    pub fn makes(self) -> bool {
        matches!(self, Create | CreateMarks | CreateRenames)
    }

    /// What counts as done, where a count tells.
    pub fn effect(self) -> Option<Effect> {
        match self {
            Create | CreateMarks | CreateRenames => Some(Effect::Created),
            Claim => Some(Effect::Tagged),
            Attach | AttachThere => Some(Effect::Attached),
            Detach | DetachThere => Some(Effect::Detached),
            Resize => Some(Effect::Resized),
            Delete => Some(Effect::Destroyed),
            Release => Some(Effect::Untagged),
            MoveUnmarks | MoveMarks | RenameUnmarks | RenameMarks => None,
        }
    }

    /// What the command says when it was done before.
    pub fn again(self) -> i32 {
        match self {
            Create | CreateMarks | CreateRenames | Claim => EEXIST,
            Delete | Release => ENOENT,
            _ => 0,
        }
    }
}

/// One operation's cloud, with a volume for each fault.
pub struct Lane {
    pub op: Op,
    /// Whether the server takes job ids of ours.
    pub own: bool,
    pub site: Site,
    pub other: String,
    pub ids: Vec<String>,
}

impl Lane {
    /// A lane for so many times; the daemon can be killed at these points, each armed by a file of its
    /// name in [`Lane::arms`].
    pub fn new(op: Op, own: bool, count: usize, points: &[&str]) -> Lane {
        let other = NewVm { most_disks: 100, ..NewVm::stopped("other") };
        let mut options = Options { custom_job_ids: own, job_delay: Duration::from_millis(5), ..Options::default() };
        options.host.most_disks = 100;
        options.vms.push(other.clone());
        // Without ids of ours this time is all that a job of tags is waited for, on a busy machine too.
        let late = if own { 1 } else { 3 };
        // A lane whose daemon is killed waits for no deadline: there it only says that the machine is busy.
        let timeout = if points.is_empty() { DEADLINE } else { 30 };
        let more = format!("late_answers = {late}\ntimeout = {timeout}\nmost_disks = 100\n");
        let mut site = Site::prepare(options.loops(), &[], &more).without_rounds();
        let arms = site.volfs.scratch("arms");
        fs::create_dir(&arms).unwrap();
        let each: Vec<_> = points.iter().map(|name| format!("{name}=kill:{}/{name}", arms.display())).collect();
        site.volfs.set_env(&[("VOLFS_FAILPOINTS", &each.join(";"))]);
        site.volfs.launch();
        for job in ["j", "k"] {
            site.volfs.make_job(job);
        }
        // What the server makes of our job ids is known from the first job on.
        site.job("k", &["first"], "1G");
        let ids = match op {
            op if op.makes() => vec![String::new(); count],
            Claim => (0..count).map(|n| site.cloud.add_volume(&format!("theirs-{n}"), GIB).unwrap()).collect(),
            _ => made(&site, count),
        };
        match op {
            Detach => site.volfs.bring("jobs/j/control", "attach"),
            DetachThere => site.volfs.bring("jobs/j/control", &format!("attach vm={}", other.id)),
            _ => {}
        }
        Lane { op, own, site, other: other.id, ids }
    }

    /// Where a file arms a point.
    pub fn arms(&self) -> PathBuf {
        self.site.volfs.scratch("arms")
    }

    /// The control of the n-th time.
    pub fn path(&self, n: usize) -> String {
        match self.op {
            op if op.makes() => "jobs/j/control".into(),
            Claim => "jobs/j/control".into(),
            _ => format!("volumes/{}/control", self.ids[n]),
        }
    }

    /// The command of the n-th time.
    pub fn text(&self, n: usize) -> String {
        let id = &self.ids[n];
        match self.op {
            Create | CreateMarks | CreateRenames => format!("create d{n} 1G"),
            Claim => format!("claim {id} d{n}"),
            Attach => "attach".into(),
            AttachThere => format!("attach vm={}", self.other),
            Detach => "detach".into(),
            DetachThere => format!("detach vm={}", self.other),
            Resize => "resize 2G".into(),
            Delete => format!("delete {id}"),
            Release => format!("release {id}"),
            MoveUnmarks | MoveMarks => "move k".into(),
            RenameUnmarks | RenameMarks => format!("disk e{n}"),
        }
    }

    /// Gives it; the errno.
    pub fn give(&self, n: usize) -> i32 {
        self.site.volfs.write(self.path(n), &self.text(n))
    }

    /// How often it was done, in the fake's book.
    pub fn effects(&self, n: usize) -> usize {
        let id = Some(self.ids[n].as_str()).filter(|_| !self.op.makes());
        match self.op.effect() {
            Some(effect) => self.site.cloud.effects(effect, id),
            None => usize::from(self.reached(n)),
        }
    }

    /// Whether it is as the command wants it.
    pub fn reached(&self, n: usize) -> bool {
        let disk = format!("d{n}");
        let Some(volume) = self.volume(n) else { return self.op == Delete };
        let tag = |key: &str| volume.tags.get(key).map(String::as_str);
        let here = || self.site.in_kernel(&volume.id).len();
        match self.op {
            Create | CreateMarks | CreateRenames | Claim => tag("volfs-disk") == Some(&disk),
            Attach => volume.vm.as_deref() == Some(&self.site.cloud.host()) && here() == 1,
            AttachThere => volume.vm.as_deref() == Some(&self.other),
            Detach => volume.vm.is_none() && here() == 0,
            DetachThere => volume.vm.is_none(),
            Resize => volume.size == 2 * GIB,
            Delete => matches!(volume.state.as_str(), "Destroy" | "Expunged"),
            Release => tag(MARK).is_none(),
            MoveUnmarks | MoveMarks => tag("volfs-job") == Some("k"),
            RenameUnmarks | RenameMarks => tag("volfs-disk") == Some(&format!("e{n}")),
        }
    }

    /// The cell's volume in the cloud's book: for what is made, the one that its disk is.
    pub fn volume(&self, n: usize) -> Option<Volume> {
        if self.op.makes() {
            let link = fs::read_link(self.site.volfs.path(format!("jobs/j/disks/d{n}"))).ok()?;
            return self.site.cloud.volume(link.file_name()?.to_str()?);
        }
        self.site.cloud.volume(&self.ids[n])
    }

    /// What volfs shows is so, after one `reconcile` at most.
    pub fn shown(&self, n: usize, mark: &str) {
        let Some(id) = self.volume(n).map(|v| v.id) else { return };
        let status = || self.site.volfs.read(format!("volumes/{id}/status")).map(|s| s.trim_end().to_owned());
        let owned = || self.site.volfs.path(format!("volumes/{id}/control")).exists();
        if !owned() {
            return;
        }
        let mark = match self.site.cloud.volume(&id).and_then(|v| v.tags.get(MARK).cloned()) {
            // Only its epoch may have risen; what had none has ours.
            Some(found) if mark.is_empty() || found.split('/').next() == mark.split('/').next() => found,
            _ => mark.to_owned(),
        };
        let truth = self.site.truth(&id, &mark);
        if status().as_deref() != Ok(truth) {
            self.site.volfs.write(format!("volumes/{id}/control"), "reconcile");
            assert_eq!(status().as_deref(), Ok(truth), "after a reconcile");
        }
        assert_ne!(truth, "gone", "it is shown, and gone");
    }

    /// Whatever was made is shown, after one `reconcile` at most.
    pub fn orphans(&self) {
        if self.op.makes() && !self.site.orphans().is_empty() {
            self.site.volfs.write("control", "reconcile");
            assert_eq!(self.site.orphans(), [""; 0], "made, there, and not shown");
        }
    }

    /// The sentence beside the control.
    pub fn error(&self, n: usize) -> String {
        self.site.volfs.read(self.path(n).replace("control", "error")).unwrap_or_default()
    }
}

/// `count` disks in job j, made side by side.
fn made(site: &Site, count: usize) -> Vec<String> {
    let disks: Vec<String> = (0..count).map(|n| format!("d{n}")).collect();
    std::thread::scope(|scope| {
        for some in disks.chunks(6) {
            scope.spawn(|| site.job("j", &some.iter().map(String::as_str).collect::<Vec<_>>(), "1G"));
        }
    });
    let link = |disk: &String| fs::read_link(site.volfs.path(format!("jobs/j/disks/{disk}"))).unwrap();
    disks.iter().map(|disk| link(disk).file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

/// What a test that panicked said.
pub fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    panic.downcast_ref::<String>().cloned().or(text).unwrap_or_default()
}
