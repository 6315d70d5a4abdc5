use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::fs::testing::Fake;

fn status(own: u64, shared: u64, blocked: u64, ignored: u64) -> Vec<u8> {
    format!(
        "Name:\tsh SigPnd:\t00000000000000ff\nUmask:\t0022\nThreads:\t1\nSigQ:\t0/1\nSigPnd:\t{own:016x}\n\
         ShdPnd:\t{shared:016x}\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t0000000000000000\n"
    )
    .into_bytes()
}

#[test]
fn a_pending_signal_counts_unless_blocked_ignored_or_harmless() {
    let (int, kill) = (bit(libc::SIGINT), bit(libc::SIGKILL));
    assert_eq!(pending(&status(0, 0, 0, 0)), Some(false), "a name is no field");
    assert_eq!(pending(&status(int, 0, 0, 0)), Some(true));
    assert_eq!(pending(&status(0, kill, 0, 0)), Some(true));
    assert_eq!(pending(&status(int, 0, int, 0)), Some(false));
    assert_eq!(pending(&status(0, int, 0, int)), Some(false));
    for harmless in [libc::SIGCHLD, libc::SIGCONT, libc::SIGURG, libc::SIGWINCH] {
        assert_eq!(pending(&status(bit(harmless), 0, 0, 0)), Some(false));
        assert_eq!(pending(&status(bit(harmless), int, 0, 0)), Some(true));
    }
    let all = status(int, 0, 0, 0);
    assert_eq!(pending(&all[..all.len() - 30]), None, "no verdict on half a file");
}

#[test]
fn this_thread_has_no_signal_and_a_thread_that_is_gone_is_noticed() {
    let mut buffer = vec![0; 64];
    let tid = u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
    assert!(!interrupted(tid, &mut buffer), "and a small buffer grows");
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let pid = child.id();
    child.wait().unwrap();
    assert!(interrupted(pid, &mut buffer));
}

fn parked(pid: u32, most: Option<Duration>) -> (Parked, Receiver<Errno>) {
    let (tx, rx) = channel();
    (
        Parked { reply: Reply::Test(tx), waits: Waits::Commit, pid, most, node: 5, kept: crate::kept::Kept::nothing() },
        rx,
    )
}

fn waiters() -> Waiters {
    Waiters::start(Fake::new(), None).unwrap()
}

/// A child that goes with its test.
struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const SOON: Duration = Duration::from_secs(20);

fn tid() -> u32 {
    u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap()
}

#[test]
fn whoever_takes_a_request_out_answers_it_and_nobody_else_does() {
    let waiters = waiters();
    let (p, rx) = parked(tid(), None);
    let key = waiters.park(p);
    assert!(waiters.waits(key) && waiters.node_waits(5));
    waiters.take(key).unwrap().reply.error(Errno::EBUSY);
    assert!(waiters.take(key).is_none() && !waiters.node_waits(5));
    waiters.shut_down();
    assert_eq!(rx.recv_timeout(SOON), Ok(Errno::EBUSY));
    assert!(rx.recv().is_err(), "answered once");
}

#[test]
fn a_deadline_ends_a_wait() {
    let waiters = waiters();
    let (p, rx) = parked(tid(), Some(Duration::from_millis(1)));
    waiters.park(p);
    assert_eq!(rx.recv_timeout(SOON), Ok(Errno::EIO));
    assert_eq!(waiters.len(), 0);
}

#[test]
fn a_pending_signal_ends_a_wait_and_a_harmless_one_does_not() {
    let waiters = waiters();
    // A stopped child keeps what is sent to it pending.
    let child = Child(std::process::Command::new("sleep").arg("1000").spawn().unwrap());
    let pid = rustix::process::Pid::from_child(&child.0);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::UNTRACED).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::WINCH).unwrap();
    let (p, rx) = parked(child.0.id(), None);
    let key = waiters.park(p);
    // Another's deadline that began later: by then the watcher has looked at the first.
    let (other, other_rx) = parked(tid(), Some(LOOK_EVERY * 2));
    waiters.park(other);
    other_rx.recv_timeout(SOON).unwrap();
    assert!(waiters.waits(key), "WINCH does not end it");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(rx.recv_timeout(SOON), Ok(Errno::EINTR));
}

#[test]
fn shutdown_answers_all_and_what_comes_later_at_once() {
    let waiters = waiters();
    let (p, rx) = parked(tid(), None);
    waiters.park(p);
    waiters.shut_down();
    assert_eq!(rx.recv_timeout(SOON), Ok(Errno::ESHUTDOWN));
    let (p, rx) = parked(tid(), None);
    let key = waiters.park(p);
    assert_eq!(rx.recv_timeout(SOON), Ok(Errno::ESHUTDOWN));
    assert!(waiters.take(key).is_none());
}

#[test]
fn an_unseen_caller_has_a_deadline_and_an_administrators_limit_is_kept() {
    let waiters = Waiters::start(Fake::new(), Some(Duration::from_secs(7))).unwrap();
    let (p, _rx) = parked(0, None);
    let unseen = waiters.park(p);
    assert_eq!(waiters.shared.state.lock().slots[&unseen].most, Some(Duration::from_secs(7)));
    let waiters = Waiters::start(Fake::new(), None).unwrap();
    let (p, _rx) = parked(0, Some(Duration::from_secs(3600)));
    let unseen = waiters.park(p);
    assert_eq!(waiters.shared.state.lock().slots[&unseen].most, Some(UNSEEN_MOST));
    let (p, _rx) = parked(tid(), None);
    let seen = waiters.park(p);
    assert_eq!(waiters.shared.state.lock().slots[&seen].most, None);
}

#[test]
fn a_parked_command_takes_less_than_a_kilobyte() {
    // Beside the values themselves: the caller's name (at most 16 bytes), the ticket, its list and
    // its callback (two words and a key), each as the allocator rounds it.
    const ALLOCATED: usize = 64 + 256;
    let fixed = size_of::<(u64, Slot)>() + size_of::<(u64, u32)>() + size_of::<CommandWait>();
    assert!(fixed + ALLOCATED <= 1024, "{fixed}");
}
