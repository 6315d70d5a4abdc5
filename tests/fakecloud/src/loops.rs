//! A hypervisor whose guest is this very machine: a plugged disk is a loop device.
//!
//! Each plugged device is kept open by a descriptor that lies *in flight* in a socket pair: sent and
//! never received. A descriptor in the process's table would be found by whoever walks `/proc` for
//! the device's users, and the program under test would refuse to detach because of us. The devices
//! are bound with `LO_FLAGS_AUTOCLEAR`, so that they end with the last opener: at an unplug, at the
//! end of the cloud, and when the process is killed.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};

use crate::hypervisor::{Hypervisor, Plug};

// linux/loop.h
const LOOP_SET_STATUS64: libc::c_ulong = 0x4C04;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4C07;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// How long a free device is fought for against others on the machine.
const WIN_A_DEVICE: Duration = Duration::from_secs(10);

/// `struct loop_info64`: its integers in order, then the two names and the key.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

impl Info {
    fn zeroed() -> Self {
        // SAFETY: integers and arrays of integers only; all-zero is a value of them.
        unsafe { std::mem::zeroed() }
    }
}

fn ioctl<T>(device: &File, request: libc::c_ulong, argument: *mut T) -> io::Result<libc::c_int> {
    // SAFETY: each caller passes a pointer to the type that its request reads or writes, alive
    // for the call, or null where the request takes none.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request as _, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A loop device of ours.
struct Plugged {
    number: u32,
    /// The end that the descriptor waits at. Closing both ends closes it.
    held: (OwnedFd, OwnedFd),
}

/// Disks of some VMs as loop devices of this machine.
///
/// Needs root and `/dev/loop-control`. What a disk is known by is in `lo_file_name`. Whoever else
/// has a device open keeps it after an unplug until it closes it.
pub struct LoopHypervisor {
    vms: Vec<String>,
    plugged: Mutex<HashMap<u64, Plugged>>,
}

impl LoopHypervisor {
    /// Serves the VMs of these ids.
    pub fn new(vms: impl IntoIterator<Item = impl Into<String>>) -> Self {
        LoopHypervisor { vms: vms.into_iter().map(Into::into).collect(), plugged: Mutex::default() }
    }
}

impl Hypervisor for LoopHypervisor {
    fn serves(&self, vm: &str) -> bool {
        self.vms.iter().any(|id| id == vm)
    }

    fn plug(&self, disk: &Plug) -> Result<(), String> {
        let plugged = bind(disk).and_then(|(number, device)| Ok(Plugged { number, held: in_flight(&device)? }));
        let plugged = plugged.map_err(|e| format!("binding {} to a loop device: {e}", disk.path.display()))?;
        self.plugged.lock().insert(disk.key, plugged);
        Ok(())
    }

    fn unplug(&self, disk: &Plug) -> Result<(), String> {
        let Some(plugged) = self.plugged.lock().remove(&disk.key) else { return Ok(()) };
        // Received and closed here rather than with its sockets, whose clearing up the kernel may put off.
        let device = land(&plugged.held.1).map_err(|e| format!("taking back /dev/loop{}: {e}", plugged.number))?;
        device.sync_all().map_err(|e| format!("flushing /dev/loop{}: {e}", plugged.number))?;
        // Somebody may have taken the flag away meanwhile (losetup can).
        autoclear(&device).map_err(|e| format!("releasing /dev/loop{}: {e}", plugged.number))
    }

    fn resized(&self, disk: &Plug) -> Result<(), String> {
        let plugged = self.plugged.lock();
        let Some(plugged) = plugged.get(&disk.key) else { return Ok(()) };
        // While ours is in flight the number cannot be anybody else's.
        let resize = || {
            let device = OpenOptions::new().read(true).open(format!("/dev/loop{}", plugged.number))?;
            ioctl(&device, LOOP_SET_CAPACITY, std::ptr::null_mut::<()>()).map(drop)
        };
        resize().map_err(|e| format!("telling /dev/loop{} its size: {e}", plugged.number))
    }

    fn end(&self) {
        self.plugged.lock().drain().for_each(|(_, plugged)| {
            if let Ok(device) = land(&plugged.held.1) {
                let _ = autoclear(&device);
            }
        });
    }
}

impl Drop for LoopHypervisor {
    fn drop(&mut self) {
        self.end();
    }
}

/// Binds the file to a free device. `LOOP_CTL_GET_FREE` reserves nothing: others may win it first.
fn bind(disk: &Plug) -> io::Result<(u32, File)> {
    let backing = OpenOptions::new().read(true).write(true).open(&disk.path)?;
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    let mut info = Info::zeroed();
    let tag = disk.identity.loop_tag();
    let length = tag.len().min(63);
    info.file_name[..length].copy_from_slice(&tag.as_bytes()[..length]);
    info.flags = LO_FLAGS_AUTOCLEAR;
    // A fault may show another size. A limit above the file's size would show the file's.
    if disk.size < backing.metadata()?.len() {
        info.size_limit = disk.size;
    }
    let fd = u32::try_from(backing.as_fd().as_raw_fd()).map_err(io::Error::other)?;
    let mut config = Config { fd, block_size: 512, info, reserved: [0; 8] };
    let deadline = Instant::now() + WIN_A_DEVICE;
    loop {
        let number = ioctl(&control, LOOP_CTL_GET_FREE, std::ptr::null_mut::<()>())?;
        let number = u32::try_from(number).map_err(io::Error::other)?;
        let bound = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/dev/loop{number}"))
            .and_then(|device| ioctl(&device, LOOP_CONFIGURE, &raw mut config).map(|_| device));
        match bound {
            Ok(device) => return Ok((number, device)),
            Err(e) if taken(&e) && Instant::now() < deadline => {}
            Err(e) => return Err(e),
        }
    }
}

fn taken(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENXIO | libc::ENOENT))
}

fn autoclear(device: &File) -> io::Result<()> {
    let mut info = Info::zeroed();
    ioctl(device, LOOP_GET_STATUS64, &raw mut info)?;
    if info.flags & LO_FLAGS_AUTOCLEAR == 0 {
        info.flags |= LO_FLAGS_AUTOCLEAR;
        ioctl(device, LOOP_SET_STATUS64, &raw mut info)?;
    }
    Ok(())
}

/// Puts a descriptor in flight: the first end sent it, the second never received it.
fn in_flight(device: &File) -> io::Result<(OwnedFd, OwnedFd)> {
    let ends = rustix::net::socketpair(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [device.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for one descriptor"));
    }
    rustix::net::sendmsg(&ends.0, &[io::IoSlice::new(b"d")], &mut control, SendFlags::empty())?;
    Ok(ends)
}

/// Receives the descriptor that [`in_flight`] sent.
fn land(end: &OwnedFd) -> io::Result<File> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    rustix::net::recvmsg(end, &mut [io::IoSliceMut::new(&mut byte)], &mut control, flags)?;
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.next().and_then(|mut fds| fds.next());
    fd.map(File::from).ok_or_else(|| io::Error::other("the descriptor in flight is gone"))
}

/// The loop devices that carry this tag now, as kernel names: for tests that look from outside.
///
/// # Errors
/// `/sys/block` or a device could not be read.
pub fn loops_tagged(tag: &str) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !name.starts_with("loop") || !fs::exists(format!("/sys/block/{name}/loop"))? {
            continue;
        }
        let Ok(device) = OpenOptions::new().read(true).open(format!("/dev/{name}")) else { continue };
        let mut info = Info::zeroed();
        if ioctl(&device, LOOP_GET_STATUS64, &raw mut info).is_err() {
            continue;
        }
        let end = info.file_name.iter().position(|b| *b == 0).unwrap_or(64);
        if &info.file_name[..end] == tag.as_bytes() {
            found.push(name);
        }
    }
    Ok(found)
}

/// Writes bytes into a volume's file from the host's side, past any device over it.
///
/// # Errors
/// Those of the file.
pub fn write_behind(path: &std::path::Path, at: u64, bytes: &[u8]) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.write_all_at(bytes, at)?;
    file.sync_all()
}
