//! C12 over the cloud: of three jobs one is destroyed, and nothing of the others, nor of what is in
//! no job, is changed: in the cloud's books, on its disks, in the kernel, in the record, in the tree.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;

use fakecloud::{Fault, Kind, Moment, Options};
use libc::{EBUSY, EHOSTUNREACH, EREMOTEIO, ETIMEDOUT};

use crate::site::{MARK, Site};
use crate::whole::Picture;

const B: &str = "pgtest2";
const OTHERS: [&str; 2] = ["pgtest", "pgtest22"];
const DISKS: [&str; 2] = ["disk-2000", "disk-2001"];

/// Three jobs, and volumes of nobody and of another record with names like theirs.
struct Yard {
    site: Site,
    others: Vec<String>,
    loose: Vec<String>,
}

impl Yard {
    fn new(points: &str, more: &str) -> Self {
        let env = [("VOLFS_FAILPOINTS", points)];
        let mut site = Site::prepare(Options::with_loops(), &env, more).without_rounds();
        site.volfs.launch();
        let mut yard = Yard { site, others: Vec::new(), loose: Vec::new() };
        for name in OTHERS {
            let made = yard.made(name);
            yard.others.extend(made);
        }
        for mark in [None, Some("5ea1ed00-0000-4000-8000-000000000001/7")] {
            let id = yard.site.cloud.add_volume("pgtest2-disk-2000", 1 << 30).unwrap();
            if let Some(mark) = mark {
                yard.site.cloud.set_tag(&id, MARK, mark).unwrap();
                yard.site.cloud.set_tag(&id, "volfs-job", B).unwrap();
            }
            yard.loose.push(id);
        }
        yard
    }

    /// A job whose first disk is attached, with its own id in its first bytes.
    fn made(&self, job: &str) -> Vec<String> {
        let ids = self.site.job(job, &DISKS, "1G");
        assert_eq!(self.site.disk(job, DISKS[0], "attach"), 0, "{}", self.site.volfs.log());
        self.site.volfs.ok(&format!("printf %s {} | dd of=$R/volumes/{}/block conv=fsync status=none", ids[0], ids[0]));
        ids
    }

    /// What the cloud and the kernel have of these.
    fn in_the_cloud(&self, ids: &[String], picture: &mut Picture) {
        let cloud = &self.site.cloud;
        for id in ids {
            picture.put(format!("cloud {id}"), format!("{:?}", cloud.volume(id)));
            let effects = cloud.log().iter().filter(|done| done.volume == *id).count();
            picture.put(format!("cloud effects {id}"), effects.to_string());
            let snapshots: Vec<_> = cloud.snapshots().into_iter().filter(|s| s.volume == *id).collect();
            picture.put(format!("cloud snapshots {id}"), format!("{snapshots:?}"));
            let plugs: Vec<_> = cloud.devices().into_iter().filter(|plug| plug.volume == *id).collect();
            picture.put(format!("cloud devices {id}"), format!("{plugs:?}"));
            // Sparse, and large: its length, what of it is written and when, and how it begins.
            let file = fs::File::open(cloud.file(id)).and_then(|file| {
                let (facts, mut head) = (file.metadata()?, Vec::new());
                file.take(65536).read_to_end(&mut head)?;
                let moment = (facts.mtime(), facts.mtime_nsec());
                Ok((facts.ino(), facts.len(), facts.blocks(), moment, String::from_utf8_lossy(&head).into_owned()))
            });
            picture.put(format!("cloud file {id}"), format!("{:?}", file.ok()));
            picture.loops(id, &cloud.file(id));
        }
    }

    fn picture(&self) -> Picture {
        let mut picture = Picture::of(&self.site.volfs, &OTHERS, &self.others);
        self.in_the_cloud(&self.others, &mut picture);
        self.in_the_cloud(&self.loose, &mut picture);
        picture
    }

    fn cloud_of(&self, ids: &[String]) -> Picture {
        let mut picture = Picture::default();
        // Its volumes and everybody's: a picture of few says nothing.
        self.in_the_cloud(ids, &mut picture);
        self.in_the_cloud(&self.others, &mut picture);
        picture
    }

    fn destroy(&self, more: &str) -> i32 {
        self.site.volfs.write(format!("jobs/{B}/control"), &format!("destroy {B}{more}"))
    }

    fn error(&self) -> String {
        self.site.volfs.read(format!("jobs/{B}/error")).unwrap()
    }

    fn there(&self, id: &str) -> bool {
        self.site.cloud.volume(id).is_some_and(|v| v.exists() && v.state != "Destroy")
    }

    /// What of these exists is shown in the job and carries our mark; what does not is not shown.
    #[track_caller]
    fn is_whole(&self, ids: &[String], at: &str) -> usize {
        for id in ids {
            let shown = self.site.volfs.path(format!("jobs/{B}/volumes/{id}")).exists();
            assert_eq!(self.there(id), shown, "{at}: {id} is forgotten, or shown and gone");
            if shown {
                let owner = self.site.volfs.value(format!("volumes/{id}/owner"));
                assert_eq!(self.site.cloud.volume(id).unwrap().tags.get(MARK), Some(&owner), "{at}");
            }
        }
        ids.iter().filter(|id| self.there(id)).count()
    }

    #[track_caller]
    fn is_destroyed(&self, ids: &[String], before: &Picture) {
        assert!(!self.site.volfs.path(format!("jobs/{B}")).exists());
        assert_eq!(self.is_whole(ids, "destroyed"), 0);
        assert!(ids.iter().all(|id| self.site.in_kernel(id).is_empty()));
        before.is_still(&self.picture(), "destroyed");
    }
}

#[test]
fn c12_with_the_cloud_down_nothing_is_changed_and_repeating_finishes() {
    let yard = Yard::new("", "timeout = 5\n");
    let cloud = &yard.site.cloud;
    let ids = yard.made(B);
    let (before, of_b) = (yard.picture(), yard.cloud_of(&ids));
    for kind in [Kind::DropBefore, Kind::Html { status: 503, acted: false }] {
        cloud.fault(Fault::new("*", kind.clone()).forever());
        assert_eq!(yard.destroy(""), EHOSTUNREACH, "{kind:?}: {}", yard.error());
        cloud.clear_faults();
        of_b.is_still(&yard.cloud_of(&ids), "the cloud is down");
        before.is_still(&yard.picture(), "the cloud is down");
        assert_eq!(yard.is_whole(&ids, "the cloud is down"), 2);
    }
    // Its hypervisor will not let go: stopped, and nothing is deleted.
    let words = "the hypervisor does not like it";
    cloud.fault(Fault::new("detachVolume", Kind::JobFails { at: Moment::Queued, code: 530, text: words.into() }));
    assert_eq!(yard.destroy(""), EREMOTEIO);
    assert!(yard.error().contains("disk-2000: ") && yard.error().contains(words), "{}", yard.error());
    assert_eq!(yard.is_whole(&ids, "refused"), 2);
    before.is_still(&yard.picture(), "refused");
    // In maintenance it says itself that it will be back: that is waited for, and nothing is done meanwhile.
    let of_b = yard.cloud_of(&ids);
    cloud.fault(Fault::new("*", Kind::Maintenance).forever());
    assert_eq!(yard.destroy(" timeout=1"), ETIMEDOUT);
    of_b.is_still(&yard.cloud_of(&ids), "in maintenance");
    cloud.clear_faults();
    yard.site.volfs.until("the end of the destroy", || !yard.site.volfs.path(format!("jobs/{B}")).exists());
    yard.is_destroyed(&ids, &before);
}

#[test]
fn c12_killed_half_way_it_leaves_the_others_and_what_is_left_of_its_own() {
    let arms = tempfile::tempdir().unwrap();
    let steps = [("cloudstack.submitted", 1, 2), ("delete.after-call", 1, 1), ("destroy.between", 2, 1)];
    let points: Vec<String> =
        steps.iter().map(|(point, ..)| format!("{point}=kill:{}/{point}", arms.path().display())).collect();
    let mut yard = Yard::new(&points.join(";"), "");
    for (point, hit, left) in steps {
        let ids = yard.made(B);
        let before = yard.picture();
        fs::write(arms.path().join(point), hit.to_string()).unwrap();
        assert_ne!(yard.destroy(""), 0, "{point}: never reached");
        assert_eq!(yard.site.volfs.wait(), -libc::SIGKILL, "{}", yard.site.volfs.log());
        fs::remove_file(arms.path().join(point)).unwrap();
        yard.site.volfs.launch();
        let volfs = &yard.site.volfs;
        let settled = || !volfs.ok("cat $R/operations/*").contains("\"ended\":null");
        volfs.until(&format!("settled operation: {point}"), settled);
        volfs.until(&format!("settled status: {point}"), || !volfs.read("table").unwrap().contains("\tunknown\t"));
        before.is_still(&yard.picture(), point);
        assert_eq!(yard.is_whole(&ids, point), left);
        assert_eq!(yard.destroy(""), 0, "{point}: repeated\n{}", yard.site.volfs.log());
        yard.is_destroyed(&ids, &before);
    }
}

#[test]
fn x10_a_volume_that_was_out_of_sight_and_is_back_is_not_forgotten() {
    let yard = Yard::new("reconcile.no-gap=fail", "");
    let (cloud, volfs) = (&yard.site.cloud, &yard.site.volfs);
    let ids = yard.made(B);
    let before = yard.picture();
    cloud.hide_volume(&ids[1], true).unwrap();
    let is_missing = || {
        assert_eq!(yard.site.disk(B, DISKS[1], "reconcile"), 0, "{}", volfs.log());
        assert_eq!(yard.site.value(B, DISKS[1], "status"), "missing");
    };
    is_missing();
    let deleted = || ids.iter().filter(|id| !yard.there(id)).count();
    // Keys that do not see this host itself see no volume either.
    cloud.hide_vm(&cloud.host(), true).unwrap();
    let delete = format!("delete {}", ids[1]);
    assert_eq!(yard.site.disk(B, DISKS[1], &delete), EHOSTUNREACH, "{}", volfs.log());
    cloud.hide_vm(&cloud.host(), false).unwrap();
    is_missing();
    cloud.hide_volume(&ids[1], false).unwrap();
    assert_eq!((yard.destroy(""), deleted()), (EBUSY, 0), "{}", yard.error());
    assert!(yard.error().contains(&ids[1]) && yard.error().contains("the cloud shows it again"), "{}", yard.error());
    before.is_still(&yard.picture(), "refused");
    volfs.until("a look at it", || yard.site.value(B, DISKS[1], "status") == "detached");
    assert_eq!(yard.destroy(""), 0, "{}", volfs.log());
    yard.is_destroyed(&ids, &before);
    assert_eq!(cloud.calls("destroyVolume"), 2, "both are deleted, and none only forgotten");
}
