//! The kernel's own uevents, by netlink: no udevd needed (kernel fact 17).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use tokio::sync::broadcast::Sender;

use super::{DeviceChange, EVERYTHING};

/// Multicast group of the kernel's own messages; 2 is udevd's.
const KERNEL_GROUP: u32 = 1;
/// Queue for a burst; a message is about 300 bytes, so this holds some 50 000.
const QUEUE_BYTES: usize = 64 << 20;
/// The kernel's messages are at most 2 KiB of environment and a header.
const MESSAGE_BYTES: usize = 16 << 10;
/// Wait before a broken socket is opened again.
const REOPEN: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The thread that hears uevents; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Listener {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Listens from before this returns: what happens afterwards is heard.
    pub(super) fn start(changes: Sender<DeviceChange>) -> io::Result<Self> {
        let socket = open(QUEUE_BYTES)?;
        let stop = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let heard = Arc::clone(&stop);
        let thread =
            std::thread::Builder::new().name("uevents".into()).spawn(move || listen(socket, &heard, &changes))?;
        Ok(Listener { stop, thread: Some(thread) })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = rustix::io::write(&*self.stop, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "the uevent thread cannot be told to stop");
            return;
        }
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            tracing::error!("the uevent thread had panicked");
        }
    }
}

fn open(queue: usize) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(netlink::KOBJECT_UEVENT),
    )?;
    // Past the system's limit takes CAP_NET_ADMIN; without it as much as everybody may have.
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, queue).is_err() {
        rustix::net::sockopt::set_socket_recv_buffer_size(&socket, queue)?;
    }
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
    Ok(socket)
}

/// Nobody listening is no failure: a later receiver sees what comes then.
fn tell(changes: &Sender<DeviceChange>, change: DeviceChange) {
    drop(changes.send(change));
}

fn everything() -> DeviceChange {
    DeviceChange { name: EVERYTHING.into(), action: "change".into() }
}

fn listen(mut socket: OwnedFd, stop: &OwnedFd, changes: &Sender<DeviceChange>) {
    loop {
        match drain(&socket, stop, changes) {
            Ok(()) => return,
            Err(error) => {
                tracing::error!(%error, "uevents cannot be read; opening the socket again");
                tell(changes, everything());
            }
        }
        let mut wait = [PollFd::new(stop, PollFlags::IN)];
        if !matches!(rustix::event::poll(&mut wait, Some(&REOPEN)), Ok(0) | Err(Errno::INTR)) {
            return;
        }
        match open(QUEUE_BYTES) {
            Ok(new) => {
                socket = new;
                tell(changes, everything());
            }
            Err(error) => tracing::error!(%error, "the uevent socket cannot be opened"),
        }
    }
}

/// Passes changes on until told to stop.
fn drain(socket: &OwnedFd, stop: &OwnedFd, changes: &Sender<DeviceChange>) -> io::Result<()> {
    let mut buffer = vec![0u8; MESSAGE_BYTES];
    loop {
        let mut ready = [PollFd::new(stop, PollFlags::IN), PollFd::new(socket, PollFlags::IN)];
        match rustix::event::poll(&mut ready, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        if !ready[0].revents().is_empty() {
            return Ok(());
        }
        match rustix::net::recvfrom(socket, &mut buffer[..], RecvFlags::empty()) {
            Ok((n, _, from)) => {
                // Root in any program can send to the group; only the kernel has port 0.
                let kernel = from.and_then(|a| SocketAddrNetlink::try_from(a).ok()).is_some_and(|a| a.pid() == 0);
                if let Some(change) = kernel.then(|| parse(&buffer[..n])).flatten() {
                    tell(changes, change);
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::NOBUFS) => {
                tracing::warn!("uevents were lost: looking at every device again");
                tell(changes, everything());
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// Reads one message: `ACTION@DEVPATH`, then `KEY=VALUE`, each ended by a NUL. `None` for what is
/// no whole disk: other subsystems, partitions, and bytes that are no uevent.
pub(super) fn parse(message: &[u8]) -> Option<DeviceChange> {
    let mut fields = message.split(|b| *b == 0);
    let header = std::str::from_utf8(fields.next()?).ok()?;
    let (action, path) = header.split_once('@')?;
    let value = |key: &str| {
        let mut found = message.split(|b| *b == 0).skip(1).filter_map(|f| f.strip_prefix(key.as_bytes()));
        found.next()
    };
    if value("SUBSYSTEM=")? != b"block" || value("DEVTYPE=").is_some_and(|t| t != b"disk") {
        return None;
    }
    let (_, name) = path.rsplit_once('/')?;
    let plain = |s: &str| !s.is_empty() && s.len() < 256 && s.bytes().all(|b| b.is_ascii_graphic());
    if !plain(action) || !plain(name) || name == "." || name == ".." {
        return None;
    }
    Some(DeviceChange { name: name.into(), action: action.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(parts: &[&str]) -> Vec<u8> {
        parts.iter().flat_map(|p| p.bytes().chain([0])).collect()
    }

    #[test]
    fn a_disk_is_told_by_its_kernel_name() {
        let got = parse(&message(&[
            "add@/devices/pci0000:00/0000:00:05.0/virtio3/block/vdb",
            "ACTION=add",
            "DEVPATH=/devices/pci0000:00/0000:00:05.0/virtio3/block/vdb",
            "SUBSYSTEM=block",
            "DEVNAME=vdb",
            "DEVTYPE=disk",
            "DISKSEQ=9",
            "SEQNUM=812",
        ]));
        assert_eq!(got, Some(DeviceChange { name: "vdb".into(), action: "add".into() }));
    }

    #[test]
    fn other_subsystems_partitions_udevd_and_garbage_are_no_disks() {
        for parts in [
            &["add@/devices/virtual/net/lo", "SUBSYSTEM=net"][..],
            &["add@/devices/x/block/vdb/vdb1", "SUBSYSTEM=block", "DEVTYPE=partition"],
            &["libudev", "SUBSYSTEM=block"],
            &["add@/devices/virtual/block/loop1"],
            &["add@loop1", "SUBSYSTEM=block"],
            &["add@/devices/", "SUBSYSTEM=block"],
            &["add@/devices/..", "SUBSYSTEM=block"],
            &["add@/devices/a b", "SUBSYSTEM=block"],
            &["@/devices/loop1", "SUBSYSTEM=block"],
            &[""],
        ] {
            assert_eq!(parse(&message(parts)), None, "{parts:?}");
        }
        assert_eq!(parse(b"add@/devices/\xff\0SUBSYSTEM=block\0"), None);
        assert_eq!(parse(b""), None);
    }

    #[test]
    fn lost_messages_mean_look_at_everything() {
        let socket = open(0).unwrap();
        let device = crate::devices::tests::Loop::bind(1 << 20);
        for _ in 0..100 {
            std::fs::write(format!("/sys/block/{}/uevent", device.name), "change").unwrap();
        }
        let stop = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        let (changes, mut heard) = tokio::sync::broadcast::channel(1024);
        let listener = {
            let stop = Arc::clone(&stop);
            Listener {
                stop: Arc::clone(&stop),
                thread: Some(std::thread::spawn(move || listen(socket, &stop, &changes))),
            }
        };
        while heard.blocking_recv().unwrap() != everything() {}
        drop(listener);
        while heard.blocking_recv().is_ok() {}
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_no_name_leaves_its_directory(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let with_header = [b"add@/", &bytes[..], b"\0SUBSYSTEM=block\0"].concat();
            for change in [parse(&bytes), parse(&with_header)].into_iter().flatten() {
                prop_assert!(!change.name.contains('/') && &*change.name != ".." && !change.name.is_empty());
            }
        }
    }
}
