//! The kernel's side of an attachment: which loop device has a volume's file, binding, unbinding.
//!
//! Only devices whose backing path could be ours are opened: an open by us disturbs another
//! daemon's test for users. The path proposes, device and inode decide (kernel fact 15).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::model::{DiskIdentity, VolumeId};
use crate::sys::{self, LO_FLAGS_AUTOCLEAR, LoopInfo64};

/// How long a detach waits for somebody who opened the device in passing (udev, a scanner).
const PASSING_USERS: Duration = Duration::from_millis(1500);
/// How long the kernel may take after the last close.
const LAST_CLOSE: Duration = Duration::from_millis(20);
/// How often the kernel is asked meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(4);
/// How long an attach tries to win a free device against others.
const WIN_A_DEVICE: Duration = Duration::from_secs(10);

/// A loop device that has a volume's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Binding {
    pub number: u32,
    /// It carries the volume's tag: this provider made it.
    pub ours: bool,
    /// Its unbinding has begun: it takes no openers any more and ends with the last of them.
    pub ending: bool,
    /// Somebody asked that it be cleared at its last close.
    pub autoclear: bool,
    path: Vec<u8>,
    diskseq: Option<String>,
}

impl Binding {
    pub fn name(&self) -> String {
        format!("loop{}", self.number)
    }

    fn sys(&self) -> PathBuf {
        PathBuf::from(format!("/sys/block/loop{}", self.number))
    }

    /// Whether it is that binding of the device; always true where the kernel does not number them.
    pub fn is(&self, seq: u64) -> bool {
        self.diskseq.as_ref().is_none_or(|text| text.trim().parse() == Ok(seq))
    }

    /// Whether this very binding has ended: unbound, or another one has its number.
    fn gone(&self) -> bool {
        backing(&self.sys()).as_deref() != Some(&self.path[..]) || diskseq(&self.sys()) != self.diskseq
    }
}

fn diskseq(sys: &Path) -> Option<String> {
    // Kernels before 5.15 have none.
    fs::read_to_string(sys.join("diskseq")).ok()
}

fn backing(sys: &Path) -> Option<Vec<u8>> {
    // Fails on an unbound device: the directory `loop` is there only while it is bound.
    let mut path = fs::read(sys.join("loop/backing_file")).ok()?;
    if path.last() == Some(&b'\n') {
        path.pop();
    }
    Some(path)
}

/// Every loop device that may have a file of `dir`, with the path the kernel shows. Opens none.
pub(super) fn candidates(dir: &Path) -> io::Result<Vec<(u32, Vec<u8>)>> {
    let mut below = dir.as_os_str().as_bytes().to_vec();
    below.push(b'/');
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(number) = name.to_str().and_then(|n| n.strip_prefix("loop")).and_then(|n| n.parse().ok()) else {
            continue;
        };
        let Some(path) = backing(&entry.path()) else { continue };
        // Through another mount the same file has another path, but the same last two names.
        let file = path.strip_suffix(b" (deleted)").unwrap_or(&path);
        if path.starts_with(&below) || file.ends_with(b"/data.img") {
            found.push((number, path));
        }
    }
    Ok(found)
}

/// The devices that have this volume's file, confirmed by device and inode.
pub(super) fn bindings(dir: &Path, volume: VolumeId, data: &Path) -> io::Result<Vec<Binding>> {
    confirm(candidates(dir)?, volume, data)
}

/// As [`bindings`], from a list of candidates taken before.
pub(super) fn confirm(candidates: Vec<(u32, Vec<u8>)>, volume: VolumeId, data: &Path) -> io::Result<Vec<Binding>> {
    let file = fs::symlink_metadata(data)?;
    let suffix = format!("/{volume}/data.img");
    let mut found = Vec::new();
    for (number, path) in candidates {
        let plain = path.strip_suffix(b" (deleted)").unwrap_or(&path);
        if !plain.ends_with(suffix.as_bytes()) {
            continue;
        }
        let sys = PathBuf::from(format!("/sys/block/loop{number}"));
        let seq = diskseq(&sys);
        let mut binding = Binding { number, ours: false, ending: false, autoclear: false, path, diskseq: seq };
        let _passing = sys::passing();
        match open(number) {
            Ok(device) => match sys::loop_status(device.as_fd()) {
                Ok(info) if (info.lo_device, info.lo_inode) == (file.dev(), file.ino()) => {
                    binding.ours = info.file_name() == DiskIdentity::loop_tag(volume);
                    binding.autoclear = info.lo_flags & LO_FLAGS_AUTOCLEAR != 0;
                }
                Ok(_) => continue,
                Err(e) if e.raw_os_error() == Some(libc::ENXIO) => {
                    // It is ending, or ended between the two looks.
                    if binding.gone() {
                        continue;
                    }
                    binding.ending = true;
                }
                Err(e) => return Err(e),
            },
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENXIO | libc::ENOENT | libc::ENODEV)) => {
                if binding.gone() {
                    continue;
                }
                if e.raw_os_error() != Some(libc::ENXIO) {
                    return Err(e);
                }
                binding.ending = true;
            }
            Err(e) => return Err(e),
        }
        found.push(binding);
    }
    Ok(found)
}

/// Opens `/dev/loopN` and makes sure that it is that device.
fn open(number: u32) -> io::Result<File> {
    // Reading is enough for the loop ioctls, and a read-only close makes no udev event.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(format!("/dev/loop{number}"))?;
    let found = file.metadata()?;
    let wanted = fs::read_to_string(format!("/sys/block/loop{number}/dev"))?;
    let is = format!("{}:{}", rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
    if !found.file_type().is_block_device() || is != wanted.trim_end() {
        return Err(io::Error::other(format!("/dev/loop{number} is not the device of that name")));
    }
    Ok(file)
}

/// Binds a volume's file to a free loop device. Answers its number.
pub(super) fn bind(volume: VolumeId, data: &Path) -> io::Result<u32> {
    let backing = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(data)?;
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    let mut info = LoopInfo64::zeroed();
    info.set_file_name(&DiskIdentity::loop_tag(volume));
    let deadline = Instant::now() + WIN_A_DEVICE;
    loop {
        let number = sys::loop_get_free(control.as_fd())?;
        let node = OpenOptions::new().read(true).write(true).open(format!("/dev/loop{number}"));
        match node.and_then(|device| sys::loop_configure(device.as_fd(), &backing, 512, info)) {
            Ok(()) => return Ok(number),
            // Somebody else won it (or has removed it since). It is not ours: only ask for another one.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::ENXIO)) && Instant::now() < deadline => {}
            Err(e) => return Err(e),
        }
    }
}

/// How an unbinding ended.
#[derive(Debug)]
pub(super) enum Unbound {
    /// It is gone.
    Gone,
    /// Somebody has it open; it is as before.
    InUse,
    /// Its unbinding goes on until whoever has it closes it; it cannot be called back.
    Ending,
    /// Written data could not be flushed; it is as before.
    NotFlushed(io::Error),
}

/// Unbinds a device if nobody else has it open, else leaves it as it was.
///
/// It asks for "clear at the last close" and closes: whoever has it then keeps it. `LOOP_CLR_FD`
/// is not used: with us as its only opener it fails all I/O from that moment, and pages that a
/// writer dirtied and closed just before are lost at our close (measured on 6.18); the last close
/// of a device still bound writes them out. `reached` is told the failpoints passed.
pub(super) fn unbind(binding: &Binding, data: &Path, mut reached: impl FnMut(&str)) -> io::Result<Unbound> {
    if let Some(device) = open_bound(binding, data)? {
        if let Err(e) = device.sync_all() {
            return Ok(Unbound::NotFlushed(e));
        }
        reached("loop.detach.flushed");
        set_autoclear(&device, true)?;
        reached("loop.detach.flagged");
        let _alone = sys::alone();
        drop(device);
        if wait_gone(binding, LAST_CLOSE) {
            return Ok(Unbound::Gone);
        }
    }
    if wait_gone(binding, PASSING_USERS) {
        return Ok(Unbound::Gone);
    }
    if undo_autoclear(binding, data)? {
        return Ok(Unbound::InUse);
    }
    Ok(if binding.gone() { Unbound::Gone } else { Unbound::Ending })
}

/// Takes back "clear at the last close". False when the device is gone or cannot be called back.
pub(super) fn undo_autoclear(binding: &Binding, data: &Path) -> io::Result<bool> {
    let Some(device) = open_bound(binding, data)? else { return Ok(false) };
    set_autoclear(&device, false)?;
    Ok(true)
}

fn wait_gone(binding: &Binding, at_most: Duration) -> bool {
    let deadline = Instant::now() + at_most;
    loop {
        if binding.gone() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Opens the device if it still has this very file; `None` if it has not, or takes no openers.
fn open_bound(binding: &Binding, data: &Path) -> io::Result<Option<File>> {
    let file = fs::symlink_metadata(data)?;
    let device = match open(binding.number) {
        Ok(device) => device,
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
        Err(e) => return Err(e),
    };
    match sys::loop_status(device.as_fd()) {
        Ok(info) if (info.lo_device, info.lo_inode) == (file.dev(), file.ino()) => Ok(Some(device)),
        Ok(_) => Ok(None),
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(e) => Err(e),
    }
}

fn set_autoclear(device: &File, on: bool) -> io::Result<()> {
    let mut info = sys::loop_status(device.as_fd())?;
    info.lo_flags = if on { info.lo_flags | LO_FLAGS_AUTOCLEAR } else { info.lo_flags & !LO_FLAGS_AUTOCLEAR };
    sys::loop_set_status(device.as_fd(), &info)
}

/// Has the device take its file's present size.
pub(super) fn take_size(binding: &Binding, data: &Path) -> io::Result<()> {
    match open_bound(binding, data)? {
        Some(device) => sys::loop_set_capacity(device.as_fd()),
        None => Ok(()),
    }
}
