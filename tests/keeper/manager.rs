//! A service manager as keeper: systemd's protocol, spoken by the test.

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::common::{PATIENCE, Volfs, finish};

/// One datagram: its lines, and its descriptor.
fn hear(socket: &UnixDatagram) -> (String, Option<OwnedFd>) {
    let mut text = [0u8; 4096];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got =
        recvmsg(socket, &mut [std::io::IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    (String::from_utf8(text[..got.bytes].to_vec()).unwrap(), fds.next())
}

/// Starts the daemon as a unit of Type=notify with these stored descriptors.
fn start(volfs: &Volfs, notify: &std::path::Path, stored: &[(String, OwnedFd)]) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(volfs.scratch("log")).unwrap();
    let mut command = volfs.command();
    command.env("NOTIFY_SOCKET", notify).stderr(log).stdout(Stdio::null());
    let names: Vec<&str> = stored.iter().map(|(name, _)| name.as_str()).collect();
    let mut wrapped = Command::new("dash");
    wrapped.args(["-c", "LISTEN_PID=$$ exec \"$@\"", "dash"]).arg(command.get_program()).args(command.get_args());
    wrapped.envs(command.get_envs().filter_map(|(k, v)| Some((k, v?)))).stdin(Stdio::null()).stdout(Stdio::null());
    wrapped.stderr(fs::OpenOptions::new().append(true).open(volfs.scratch("log")).unwrap());
    if !stored.is_empty() {
        wrapped.env("LISTEN_FDS", stored.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
    }
    let numbers: Vec<i32> = stored.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
    // SAFETY: between fork and exec only dup2 and fcntl, which are async-signal-safe; from 100 on no
    // number is one of those that are to be set.
    unsafe {
        wrapped.pre_exec(move || {
            let high: Vec<i32> = numbers.iter().map(|fd| libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, 100)).collect();
            for (n, fd) in (3..).zip(high) {
                if libc::dup2(fd, n) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    wrapped.spawn().unwrap()
}

#[test]
fn a_service_managers_store_keeps_the_mount_and_a_clean_stop_empties_it() {
    let mut volfs = Volfs::prepare(&[], "");
    let held = volfs.scratch("hold");
    volfs.set_env(&[("VOLFS_FAILPOINTS", &format!("attach.before-call=wait:{}", held.display()))]);
    let notify = volfs.scratch("notify");
    let socket = UnixDatagram::bind(&notify).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut daemon = start(&volfs, &notify, &[]);
    let mut stored = Vec::new();
    for name in ["volfs-fuse", "volfs-memory"] {
        let (text, fd) = hear(&socket);
        assert!(text.contains("FDSTORE=1") && text.contains(&format!("FDNAME={name}")), "{text}\n{}", volfs.log());
        stored.push((name.to_owned(), fd.unwrap()));
    }
    assert_eq!(hear(&socket).0, "READY=1\n");
    volfs.job("a", &["d"], "1M");
    fs::write(&held, "").unwrap();
    let parked = volfs.sh_spawn(&["dash"], "echo attach > $R/jobs/a/disks/d/control");
    volfs.until("a parked attach", || volfs.read("jobs/a/status").is_ok_and(|s| s.contains("attaching=1")));
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let mut daemon = start(&volfs, &notify, &stored);
    assert_eq!(hear(&socket).0, "READY=1\n", "{}", volfs.log());
    fs::remove_file(&held).unwrap();
    assert_eq!(finish(parked).status, 0, "{}", volfs.log());
    assert_eq!(volfs.value("jobs/a/disks/d/status"), "attached");
    // SAFETY: kill(2) takes no pointers; the pid is our own child, not yet waited for.
    unsafe { libc::kill(daemon.id() as i32, libc::SIGTERM) };
    let removed = [hear(&socket).0, hear(&socket).0].concat();
    assert!(removed.contains("FDSTOREREMOVE=1") && removed.contains("volfs-fuse") && removed.contains("volfs-memory"));
    assert!(daemon.wait().unwrap().success());
    drop(stored);
    let mut text = String::new();
    fs::File::open("/proc/self/mountinfo").unwrap().read_to_string(&mut text).unwrap();
    assert!(!text.contains(volfs.root().to_str().unwrap()));
}
