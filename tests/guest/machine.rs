//! One emulated virtual machine, from its process to its hot-plugged disks.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use serde_json::json;

use crate::KERNEL_DIR;
use crate::agent::{Agent, Running, Said};
use crate::initramfs;
use crate::qmp::Qmp;

/// Longest time a guest is waited for: ten times what an idle machine with two cores needs.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// As CloudStack's `wait.detach.device`, which is 10 s, for an emulated processor.
const UNPLUG_WITHIN: Duration = Duration::from_secs(30);
/// Slots of the PCI bus, or targets of the SCSI controller, for disks that are there from the start:
/// below are the machine's own devices.
const COLD: u32 = 8;
/// The last slot of the PCI bus. Hot-plugged disks are placed from here downwards, so that the kernel
/// finds them in the opposite order when it boots: names that are kept over a boot are seen to be wrong.
const HOT: u32 = 31;
/// Machines at once: each keeps a core busy while it boots.
const MOST: usize = 2;

/// How disks are attached. CloudStack takes the bus of the VM's first disk for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    VirtioBlk,
    VirtioScsi,
}

/// The right to run a machine.
struct Turn;

static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

impl Turn {
    fn wait() -> Self {
        let mut running = RUNNING.lock();
        while *running >= MOST {
            ENDED.wait(&mut running);
        }
        *running += 1;
        Turn
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *RUNNING.lock() -= 1;
        ENDED.notify_one();
    }
}

/// A machine and all that belongs to it; gone when it is dropped.
pub struct Machine {
    bus: Bus,
    process: Mutex<Child>,
    qmp: Qmp,
    agent: Agent,
    /// Which plugged disk has which slot.
    slots: Mutex<HashMap<String, u32>>,
    booted: AtomicBool,
    dir: tempfile::TempDir,
    _turn: Turn,
}

impl Machine {
    /// A machine that has power but has not begun to boot, so that it finds the disks plugged until
    /// [`Machine::boot`] there from the start. `uuid` is its id, as CloudStack gives its own to a domain.
    pub fn new(uuid: &str, bus: Bus) -> Self {
        let turn = Turn::wait();
        let dir = tempfile::Builder::new().prefix("volfs-guest-").tempdir().unwrap();
        let initramfs = dir.path().join("initramfs");
        initramfs::write(&initramfs, Path::new(env!("CARGO_BIN_EXE_volfs")));
        let (agent, agent_end) = UnixStream::pair().unwrap();
        let (control, control_end) = UnixStream::pair().unwrap();
        let ends = [agent_end.as_raw_fd(), control_end.as_raw_fd()];
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-machine", "pc", "-accel", "tcg,thread=multi", "-smp", "1", "-m", "512", "-S"]);
        qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-uuid", uuid]);
        qemu.args(["-smbios", "type=1,manufacturer=Apache Software Foundation,product=CloudStack KVM Hypervisor"]);
        qemu.arg("-kernel").arg(Path::new(KERNEL_DIR).join("kernel")).arg("-initrd").arg(&initramfs);
        // The check of the timer is a matter of luck where the emulated processor gets little time.
        qemu.args(["-append", "console=ttyS0 quiet panic=-1 no_timer_check"]);
        qemu.arg("-serial").arg(format!("file:{}", dir.path().join("console").display()));
        qemu.args(["-chardev", &format!("socket,id=agent,fd={}", ends[0]), "-serial", "chardev:agent"]);
        qemu.args(["-chardev", &format!("socket,id=control,fd={}", ends[1]), "-mon", "chardev=control,mode=control"]);
        qemu.args(["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]);
        if bus == Bus::VirtioScsi {
            qemu.args(["-device", "virtio-scsi-pci,id=scsi"]);
        }
        let words = fs::File::create(dir.path().join("qemu")).unwrap();
        qemu.stdin(Stdio::null()).stdout(words.try_clone().unwrap()).stderr(words);
        // SAFETY: prctl and fcntl are async-signal-safe; the descriptors are open until after the spawn.
        unsafe {
            qemu.pre_exec(move || {
                // A test run that is killed takes its machines with it.
                let mut result = libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                for fd in ends {
                    result |= libc::fcntl(fd, libc::F_SETFD, 0);
                }
                if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
            });
        }
        let process = Mutex::new(qemu.spawn().unwrap());
        // From here on an end of QEMU is the end of both connections.
        drop((agent_end, control_end));
        let (qmp, agent, slots) = (Qmp::new(control), Agent::new(agent), Mutex::default());
        let booted = AtomicBool::new(false);
        let machine = Machine { bus, process, qmp, agent, slots, booted, dir, _turn: turn };
        machine.must("qmp_capabilities", json!({}));
        machine
    }

    /// Lets the guest boot, and waits for its agent.
    pub fn boot(&self) {
        self.must("cont", json!({}));
        self.booted.store(true, Ordering::SeqCst);
        assert!(self.agent.ready(PATIENCE), "the guest did not boot in {PATIENCE:?}\n{}", self.words());
    }

    /// Pulls the reset line: what the guest had in memory is gone, the disks stay. Scripts that ran are
    /// not answered.
    pub fn reset(&self) {
        self.agent.forget();
        // A kernel that panics reboots, which ends the machine but for this moment.
        self.must("set-action", json!({"reboot": "reset"}));
        self.must("system_reset", json!({}));
        assert!(self.agent.ready(PATIENCE), "the guest did not boot again in {PATIENCE:?}\n{}", self.words());
        self.must("set-action", json!({"reboot": "shutdown"}));
    }

    /// Ends the machine at once.
    pub fn off(&self) {
        let mut process = self.process.lock();
        let _ = process.kill();
        let _ = process.wait();
    }

    /// A free slot for a disk.
    fn place(&self, id: &str) -> Result<u32, String> {
        let mut slots = self.slots.lock();
        let taken: HashSet<u32> = slots.values().copied().collect();
        let free = |slot: &u32| !taken.contains(slot);
        let slot = match self.booted.load(Ordering::SeqCst) {
            false => (COLD..=HOT).find(free),
            true => (COLD..=HOT).rev().find(free),
        };
        // libvirt's words.
        let slot = slot.ok_or("internal error: No more available PCI slots")?;
        slots.insert(id.to_owned(), slot);
        Ok(slot)
    }

    /// What QEMU and the guest's kernel printed: for the words of a failure.
    pub fn words(&self) -> String {
        let read = |name| fs::read(self.dir.path().join(name)).unwrap_or_default();
        let text = |name| String::from_utf8_lossy(&read(name)).into_owned();
        format!("--- QEMU:\n{}--- the guest's console:\n{}", text("qemu"), text("console"))
    }

    /// A QMP command that cannot be refused.
    fn must(&self, command: &str, arguments: serde_json::Value) {
        if let Err(words) = self.qmp.execute(command, arguments) {
            panic!("{words}\n{}", self.words());
        }
    }

    /// Starts a script in the guest's shell; others may run beside it.
    pub fn start(&self, script: &str) -> Running<'_> {
        self.agent.start(script)
    }

    /// Runs a script in the guest's shell to its end.
    #[track_caller]
    pub fn run(&self, script: &str) -> Said {
        let said = self.start(script).said(PATIENCE);
        said.unwrap_or_else(|| panic!("`{script}` did not end in {PATIENCE:?}\n{}", self.words()))
    }

    /// A script that must succeed; its output without the last newline.
    #[track_caller]
    pub fn ok(&self, script: &str) -> String {
        let said = self.run(script);
        assert_eq!(said.status, 0, "`{script}`: {}\n{}", said.out, self.words());
        said.out.trim_end_matches('\n').to_owned()
    }

    /// Plugs a disk whose bytes are the file's first `size`; the error is QEMU's sentence. Answers when
    /// QEMU has taken it: the guest sees it later.
    pub fn plug(&self, id: &str, file: &Path, size: u64, serial: &str) -> Result<(), String> {
        let there = fs::metadata(file).map_err(|e| format!("{}: {e}", file.display()))?.len();
        // Shared storage has no locks of its own: one volume may be plugged twice.
        let image = json!({"driver": "file", "filename": file, "locking": "off"});
        let mut node = json!({"driver": "raw", "node-name": id, "file": image});
        // Said only where it is not the file's own: a node whose size was said cannot grow.
        if size != there {
            node["size"] = size.into();
        }
        self.qmp.execute("blockdev-add", node)?;
        let slot = self.place(id);
        let added = slot.and_then(|slot| {
            let mut device = json!({"id": id, "drive": id, "serial": serial});
            match self.bus {
                Bus::VirtioBlk => {
                    device["driver"] = "virtio-blk-pci".into();
                    device["addr"] = format!("{slot:x}").into();
                }
                Bus::VirtioScsi => {
                    device["driver"] = "scsi-hd".into();
                    device["bus"] = "scsi.0".into();
                    device["scsi-id"] = slot.into();
                }
            }
            self.qmp.execute("device_add", device)
        });
        added.map(drop).inspect_err(|_| self.forget(id))
    }

    /// What is left of a disk whose device is not there.
    fn forget(&self, id: &str) {
        self.slots.lock().remove(id);
        let _ = self.qmp.execute("blockdev-del", json!({"node-name": id}));
    }

    /// Asks the guest to give a disk back and waits until it has. A disk that is not there is success.
    pub fn unplug(&self, id: &str) -> Result<(), String> {
        match self.qmp.execute("device_del", json!({"id": id})) {
            // The request of an earlier call that was not waited for to its end.
            Err(words) if words.contains("in the process of unplug") => {}
            Err(words) if words.contains("not found") => return Ok(()),
            other => drop(other?),
        }
        let gone = |e: &serde_json::Value| e["event"] == "DEVICE_DELETED" && e["data"]["device"] == id;
        if !self.qmp.event(UNPLUG_WITHIN, gone) {
            // The words of CloudStack's agent.
            return Err(format!(
                "Could not detach volume after sending the command and waiting for [{}] milliseconds. Probably the VM \
                 does not support the sent detach command or the device is busy at the moment. Try again in a couple \
                 of minutes.",
                UNPLUG_WITHIN.as_millis()
            ));
        }
        self.forget(id);
        Ok(())
    }

    /// Shows the guest another size of a plugged disk.
    pub fn resize(&self, id: &str, size: u64) -> Result<(), String> {
        self.qmp.execute("block_resize", json!({"node-name": id, "size": size})).map(drop)
    }
}

impl Drop for Machine {
    /// The process first: its end is what the readers of both connections wait for.
    fn drop(&mut self) {
        self.off();
    }
}
