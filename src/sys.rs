//! Kernel interfaces that no crate wraps: block and loop ioctls. Constants are those of
//! `linux/fs.h` and `linux/loop.h`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

const BLKGETDISKSEQ: libc::c_ulong = 0x8008_1280;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_SET_STATUS64: libc::c_ulong = 0x4C04;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4C07;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;

/// `LO_FLAGS_AUTOCLEAR`: cleared when the last opener closes.
pub const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// How long [`alone`] waits for looks that have begun.
const ALONE_WITHIN: Duration = Duration::from_millis(200);

/// Who opens a loop device only to look at it, in this process.
static PASSING: RwLock<()> = RwLock::new(());

/// To be held over opening, asking and closing a loop device in passing. A hundred commands that begin
/// at once look at every device; on a busy machine each of them may be put aside with one open.
pub fn passing() -> RwLockReadGuard<'static, ()> {
    PASSING.read()
}

/// Meanwhile no look of this process has a loop device open: its last close can be waited for. Not to
/// be held for long, as every look waits; and not waited for long, as a look may hang in a dead device.
pub fn alone() -> Option<RwLockWriteGuard<'static, ()>> {
    PASSING.try_write_for(ALONE_WITHIN)
}

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct LoopInfo64 {
    pub lo_device: u64,
    pub lo_inode: u64,
    pub lo_rdevice: u64,
    pub lo_offset: u64,
    pub lo_sizelimit: u64,
    pub lo_number: u32,
    pub lo_encrypt_type: u32,
    pub lo_encrypt_key_size: u32,
    pub lo_flags: u32,
    pub lo_file_name: [u8; 64],
    pub lo_crypt_name: [u8; 64],
    pub lo_encrypt_key: [u8; 32],
    pub lo_init: [u64; 2],
}

impl LoopInfo64 {
    /// All zero.
    pub fn zeroed() -> Self {
        // SAFETY: the struct is plain integers and arrays of them; all-zero is a valid value.
        unsafe { std::mem::zeroed() }
    }

    /// `lo_file_name` as text, up to its first NUL.
    pub fn file_name(&self) -> String {
        let end = self.lo_file_name.iter().position(|b| *b == 0).unwrap_or(64);
        String::from_utf8_lossy(&self.lo_file_name[..end]).into_owned()
    }

    /// Stores `text` in `lo_file_name`; it must be shorter than 64 bytes.
    pub fn set_file_name(&mut self, text: &str) {
        let bytes = text.as_bytes();
        let n = bytes.len().min(63);
        self.lo_file_name = [0; 64];
        self.lo_file_name[..n].copy_from_slice(&bytes[..n]);
    }
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The disk's sequence number (Linux 5.15 and later).
pub fn disk_seq(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut value = 0u64;
    // SAFETY: BLKGETDISKSEQ writes one u64 through the pointer, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETDISKSEQ as _, &mut value) })?;
    Ok(value)
}

/// The device's size in bytes.
pub fn disk_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut value = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 through the pointer, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64 as _, &mut value) })?;
    Ok(value)
}

/// A loop device's state; ENXIO when nothing is bound. Worker threads only (kernel fact 14).
pub fn loop_status(fd: BorrowedFd<'_>) -> io::Result<LoopInfo64> {
    let mut info = LoopInfo64::zeroed();
    // SAFETY: LOOP_GET_STATUS64 writes one loop_info64 through the pointer, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), LOOP_GET_STATUS64 as _, &mut info) })?;
    Ok(info)
}

/// Changes a bound loop device's flags and names.
pub fn loop_set_status(fd: BorrowedFd<'_>, info: &LoopInfo64) -> io::Result<()> {
    // SAFETY: LOOP_SET_STATUS64 reads one loop_info64 through the pointer, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), LOOP_SET_STATUS64 as _, info) })?;
    Ok(())
}

/// Binds `backing` with `info` at once; EBUSY if the device is bound already.
pub fn loop_configure(device: BorrowedFd<'_>, backing: &File, block_size: u32, info: LoopInfo64) -> io::Result<()> {
    let fd = u32::try_from(backing.as_fd().as_raw_fd()).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    let config = LoopConfig { fd, block_size, info, reserved: [0; 8] };
    // SAFETY: LOOP_CONFIGURE reads one loop_config through the pointer, which outlives the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &config) })?;
    Ok(())
}

/// Asks for the unbinding; with other openers it only sets AUTOCLEAR and answers 0 (kernel fact 14).
pub fn loop_clear(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: LOOP_CLR_FD takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD as _, 0) })?;
    Ok(())
}

/// Has the loop device take its backing file's present size.
pub fn loop_set_capacity(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: LOOP_SET_CAPACITY takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_CAPACITY as _, 0) })?;
    Ok(())
}

/// The number of a loop device that was free a moment ago: nothing is reserved (kernel fact 13).
pub fn loop_get_free(control: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: LOOP_CTL_GET_FREE takes no argument and answers a number.
    let n = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) })?;
    u32::try_from(n).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}
