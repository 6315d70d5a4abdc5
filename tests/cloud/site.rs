//! A cloud of its own for each test, with a volfs that is a VM of it: volumes attached to this host
//! become loop devices of this machine.

#![allow(dead_code)]

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use fakecloud::{Effect, FakeCloud, Options};

use crate::common::{PATIENCE, Volfs};

/// The tag that is the owner's mark.
pub const MARK: &str = "volfs";

/// The cloud, and the daemon on its host.
pub struct Site {
    pub volfs: Volfs,
    pub cloud: FakeCloud,
    keys: tempfile::TempDir,
}

impl Site {
    /// With loop devices and nothing else special.
    pub fn start() -> Self {
        Self::with(Options::with_loops(), &[])
    }

    /// With this cloud, and this environment of the daemon.
    pub fn with(options: Options, env: &[(&str, &str)]) -> Self {
        let mut site = Self::prepare(options, env, "");
        site.volfs.launch();
        site
    }

    /// Everything but the daemon; `more` goes into the table `[cloudstack]`.
    pub fn prepare(options: Options, env: &[(&str, &str)], more: &str) -> Self {
        let cloud = FakeCloud::start(options).expect("a fake cloud");
        let keys = tempfile::tempdir().unwrap();
        write_keys(&keys.path().join("keys"), &cloud.endpoint(), &cloud.key(), &cloud.secret());
        let volfs = Volfs::prepare(env, &config(&cloud, keys.path(), &cloud.host(), more));
        Site { volfs, cloud, keys }
    }

    /// Before the launch: no round comes by itself, so that what a fault shows is seen by the command
    /// it is meant for.
    pub fn without_rounds(self) -> Self {
        let path = self.volfs.scratch("config.toml");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(INTERVAL), "{text}");
        fs::write(&path, text.replace(INTERVAL, "reconcile_interval = 3600")).unwrap();
        self
    }

    /// A further daemon on the same cloud, on the VM `host`; its disks are not this machine's.
    pub fn beside(&self, host: &str, env: &[(&str, &str)], more: &str) -> Volfs {
        Volfs::prepare(env, &config(&self.cloud, self.keys.path(), host, more))
    }

    /// The file of the keys.
    pub fn keys_file(&self) -> std::path::PathBuf {
        self.keys.path().join("keys")
    }

    /// Another configuration for the next start: `more`, and another offering than the custom one.
    pub fn configure(&self, more: &str, offering: Option<&str>) {
        let mut text = config(&self.cloud, self.keys.path(), &self.cloud.host(), more);
        if let Some(id) = offering {
            text = text.replace(&custom(&self.cloud), id);
        }
        fs::write(self.volfs.scratch("config.toml"), text).unwrap();
    }

    /// The same as at first, but on the VM `host`.
    pub fn configure_host(&self, host: &str) {
        let text = config(&self.cloud, self.keys.path(), host, "");
        fs::write(self.volfs.scratch("config.toml"), text).unwrap();
    }

    /// A job with new disks of `size`, detached; their ids in order.
    #[track_caller]
    pub fn job(&self, job: &str, disks: &[&str], size: &str) -> Vec<String> {
        self.volfs.job(job, disks, size)
    }

    /// One write to a disk's control; the errno.
    pub fn disk(&self, job: &str, disk: &str, command: &str) -> i32 {
        self.volfs.write(format!("jobs/{job}/disks/{disk}/control"), command)
    }

    /// A disk's value.
    #[track_caller]
    pub fn value(&self, job: &str, disk: &str, file: &str) -> String {
        self.volfs.value(format!("jobs/{job}/disks/{disk}/{file}"))
    }

    /// Loop devices of this machine that have the volume's file: what the kernel really shows of it.
    pub fn in_kernel(&self, id: &str) -> Vec<String> {
        bound_to(&self.cloud.file(id))
    }

    /// The status that a volume with this mark must have, by the fake's own books and the kernel: no
    /// word of volfs's is in it. `gone` where there is no such volume.
    pub fn truth(&self, id: &str, mark: &str) -> &'static str {
        let Some(volume) = self.cloud.volume(id).filter(|v| !matches!(v.state.as_str(), "Destroy" | "Expunged")) else {
            return "gone";
        };
        if volume.tags.get(MARK).map(String::as_str) != Some(mark) {
            return "conflict";
        }
        match (volume.vm.as_deref(), self.in_kernel(id).len()) {
            (Some(vm), 1) if vm == self.cloud.host() => "attached",
            (Some(vm), 0) if vm == self.cloud.host() => "lost",
            (Some(_), 0) => "remote",
            (None, 0) => "detached",
            _ => "conflict",
        }
    }

    /// Volumes that requests have made, that are still there, and that volfs shows nowhere.
    pub fn orphans(&self) -> Vec<String> {
        let made = self.cloud.log().into_iter().filter(|d| d.effect == Effect::Created && !d.by_admin);
        let there = |id: &String| self.cloud.volume(id).is_some_and(|v| v.exists() && v.state != "Destroy");
        made.map(|d| d.volume).filter(there).filter(|id| !self.volfs.path(format!("volumes/{id}")).exists()).collect()
    }

    /// Waits until the cloud is so.
    #[track_caller]
    pub fn until(&self, what: &str, condition: impl FnMut(&FakeCloud) -> bool) {
        assert!(self.cloud.wait_for(PATIENCE, condition), "never: {what}\n{}", self.volfs.log());
    }
}

/// Seconds between rounds in these tests.
const INTERVAL: &str = "reconcile_interval = 5";

/// Writes the file of the keys as volfs wants it.
pub fn write_keys(path: &Path, endpoint: &str, key: &str, secret: &str) {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path).unwrap();
    write!(file, "[cloudstack]\nendpoint = {endpoint}\nkey = {key}\nsecret = {secret}\n").unwrap();
}

/// Loop devices whose backing file is this one.
pub fn bound_to(file: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block").unwrap().flatten() {
        let backing = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if Path::new(backing.trim_end()) == file {
            found.push(entry.file_name().into_string().unwrap());
        }
    }
    found
}

fn custom(cloud: &FakeCloud) -> String {
    cloud.offerings().into_iter().find(|o| o.name == "custom").expect("a custom offering").id
}

fn config(cloud: &FakeCloud, keys: &Path, host: &str, more: &str) -> String {
    // A test's own word counts.
    let late = if more.contains("late_answers") { "" } else { "late_answers = 2\n" };
    format!(
        "provider = \"cloudstack\"\n{INTERVAL}\n[cloudstack]\ncredentials = \"{}/keys\"\nhost = \"{host}\"\n\
         offering = \"{}\"\nsignature = \"sha1\"\n{late}{more}\n",
        keys.display(),
        custom(cloud)
    )
}
