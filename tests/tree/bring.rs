//! Brings volumes into each status for real, from outside: the provider's own files, loop devices
//! bound by hand, a killed daemon.

// Each module of tests uses the part it needs.
#![allow(dead_code)]

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use volfs::sys;

use crate::common::Volfs;

/// A volume's directory in the tree.
pub fn dir(job: &str, uuid: &str) -> String {
    format!("jobs/{job}/volumes/{uuid}")
}

/// One value of a volume.
#[track_caller]
pub fn of(volfs: &Volfs, uuid: &str, file: &str) -> String {
    volfs.value(format!("volumes/{uuid}/{file}"))
}

/// A volume's directory in the provider's store.
pub fn stored(volfs: &Volfs, uuid: &str) -> PathBuf {
    volfs.state().join("loop/volumes").join(uuid)
}

/// The provider's metadata of a volume.
pub fn meta(volfs: &Volfs, uuid: &str) -> Value {
    serde_json::from_slice(&fs::read(stored(volfs, uuid).join("meta.json")).unwrap()).unwrap()
}

/// Changes it behind volfs's back, whole, as the provider does.
pub fn edit_meta(volfs: &Volfs, uuid: &str, edit: impl FnOnce(&mut Value)) {
    let mut value = meta(volfs, uuid);
    edit(&mut value);
    let (path, new) = (stored(volfs, uuid).join("meta.json"), stored(volfs, uuid).join("edited"));
    fs::write(&new, value.to_string()).unwrap();
    fs::rename(new, path).unwrap();
}

/// Says in the provider's metadata that the volume is attached to this host.
pub fn say_attached_here(volfs: &Volfs, uuid: &str) {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned();
    let host = host(volfs);
    edit_meta(volfs, uuid, |m| m["attached"] = json!({"vm": host, "device_id": 77, "boot": boot}));
}

/// This host's id, as the loop provider makes it; of the machine, so asked for once.
pub fn host(volfs: &Volfs) -> String {
    static HOST: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    let ask = || {
        let uuid = &volfs.job("whose-host", &["d"], "1M")[0];
        assert_eq!(volfs.write("jobs/whose-host/control", "attach"), 0, "{}", volfs.log());
        let host = of(volfs, uuid, "vm");
        assert_eq!(volfs.write("jobs/whose-host/control", "destroy whose-host"), 0, "{}", volfs.log());
        host
    };
    HOST.get_or_init(ask).clone()
}

/// Another record's mark.
pub const FOREIGN: &str = "5ea1ed00-0000-4000-8000-000000000001/7";

/// A volume in the provider's store that volfs has not made.
pub fn foreign_volume(volfs: &Volfs, mark: Option<&str>) -> String {
    let uuid = volfs::model::VolumeId::random().to_string();
    let dir = stored(volfs, &uuid);
    fs::create_dir(&dir).unwrap();
    File::create(dir.join("data.img")).unwrap().set_len(1 << 20).unwrap();
    let meta = json!({"id": uuid, "name": "by hand", "size": 1 << 20, "mark": mark});
    fs::write(dir.join("meta.json"), meta.to_string()).unwrap();
    uuid
}

/// A loop device bound by hand with a volume's tag; unbound when dropped.
pub struct Bound {
    /// Kernel name.
    pub name: String,
}

impl Bound {
    /// Binds `file` as that volume.
    pub fn new(uuid: &str, file: &Path) -> Self {
        let backing = OpenOptions::new().read(true).write(true).open(file).unwrap();
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control").unwrap();
        for _ in 0..1000 {
            let mut info = sys::LoopInfo64::zeroed();
            info.set_file_name(&format!("volfs:{uuid}"));
            let number = sys::loop_get_free(control.as_fd()).unwrap();
            let path = format!("/dev/loop{number}");
            let Ok(device) = OpenOptions::new().read(true).write(true).open(&path) else { continue };
            // Others bind too: whoever is second asks for another one.
            if sys::loop_configure(device.as_fd(), &backing, 512, info).is_ok() {
                return Bound { name: format!("loop{number}") };
            }
        }
        panic!("no free loop device");
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Ok(device) = File::open(format!("/dev/{}", self.name)) {
            // Gone already is what is wanted.
            let _ = sys::loop_clear(device.as_fd());
        }
    }
}

/// Unbinds every loop device of a test's directory; the daemon must be dead.
pub fn pull_all(volfs: &Volfs) {
    for name in volfs.loops() {
        let device = File::open(format!("/dev/{name}")).unwrap();
        sys::loop_clear(device.as_fd()).unwrap();
    }
    volfs.until("end of the loop devices", || volfs.loops().is_empty());
}

/// A reader of `events/all` from now on.
pub struct Listener {
    file: File,
    text: String,
}

impl Listener {
    pub fn open(volfs: &Volfs) -> Self {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(volfs.path("events/all")).unwrap();
        Listener { file, text: String::new() }
    }

    /// Waits for a line that `fits`.
    #[track_caller]
    pub fn hear(&mut self, volfs: &Volfs, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let mut found = None;
        volfs.until(what, || {
            let mut buffer = [0; 65536];
            while let Ok(n) = self.file.read(&mut buffer) {
                if n == 0 {
                    break;
                }
                self.text.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
            }
            found = self.text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()).find(|v| fits(v));
            found.is_some()
        });
        found.unwrap()
    }

    /// Waits for a volume's change to that status.
    #[track_caller]
    pub fn hear_status(&mut self, volfs: &Volfs, uuid: &str, to: &str) {
        self.hear(volfs, &format!("event of {uuid} to {to}"), |v| v["volume"] == uuid && v["to"] == to);
    }
}

/// The number of the one operation in flight whose command starts so.
#[track_caller]
pub fn running(volfs: &Volfs, command: &str) -> String {
    let mut found = None;
    volfs.until(&format!("`{command}` in flight"), || {
        let ids = fs::read_dir(volfs.path("operations")).unwrap().flatten().map(|e| e.file_name());
        found = ids.into_iter().map(|id| id.into_string().unwrap()).find(|id| {
            let op = volfs.read(format!("operations/{id}")).unwrap_or_default();
            let op: Value = serde_json::from_str(&op).unwrap_or_default();
            op["ended"].is_null() && op["command"].as_str().is_some_and(|c| c.starts_with(command))
        });
        found.is_some()
    });
    found.unwrap()
}

/// A file while which a failpoint holds; removed when dropped.
pub struct Hold(pub PathBuf);

impl Hold {
    pub fn at(path: PathBuf) -> Self {
        File::create(&path).unwrap();
        Hold(path)
    }

    pub fn release(self) {}
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Already removed is released.
        let _ = fs::remove_file(&self.0);
    }
}

/// A place for a failpoint's file, known before the daemon starts.
pub struct Gate(pub tempfile::TempDir);

impl Gate {
    pub fn new() -> Self {
        Gate(tempfile::Builder::new().prefix("volfs-gate-").tempdir().unwrap())
    }

    pub fn path(&self) -> PathBuf {
        self.0.path().join("hold")
    }

    /// `NAME=wait:PATH`.
    pub fn wait(&self, point: &str) -> String {
        format!("{point}=wait:{}", self.path().display())
    }

    pub fn close(&self) -> Hold {
        Hold::at(self.path())
    }
}
