//! A cloud of its own for each test, with a volfs that is a VM of it: volumes attached to this host
//! become loop devices of this machine.

#![allow(dead_code)]

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use fakecloud::{FakeCloud, Options};

use crate::common::{PATIENCE, Volfs};

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

    /// Waits until the cloud is so.
    #[track_caller]
    pub fn until(&self, what: &str, condition: impl FnMut(&FakeCloud) -> bool) {
        assert!(self.cloud.wait_for(PATIENCE, condition), "never: {what}\n{}", self.volfs.log());
    }
}

/// Writes the file of the keys as volfs wants it.
pub fn write_keys(path: &Path, endpoint: &str, key: &str, secret: &str) {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path).unwrap();
    write!(file, "[cloudstack]\nendpoint = {endpoint}\nkey = {key}\nsecret = {secret}\n").unwrap();
}

fn custom(cloud: &FakeCloud) -> String {
    cloud.offerings().into_iter().find(|o| o.name == "custom").expect("a custom offering").id
}

fn config(cloud: &FakeCloud, keys: &Path, host: &str, more: &str) -> String {
    format!(
        "provider = \"cloudstack\"\nreconcile_interval = 5\n[cloudstack]\ncredentials = \"{}/keys\"\nhost = \"{host}\"\n\
         offering = \"{}\"\nsignature = \"sha1\"\nlate_answers = 2\n{more}\n",
        keys.display(),
        custom(cloud)
    )
}
