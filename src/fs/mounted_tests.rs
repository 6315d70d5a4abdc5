//! The handlers through a real mount, over a fake engine that does what the test says.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::mount::{Options, Serving, serve};
use super::testing::*;
use crate::engine::{Left, Submitted, Ticket};
use crate::error::Error;
use crate::model::*;

/// The longest wait for what must come.
const SOON: Duration = Duration::from_secs(20);

struct Mount {
    dir: tempfile::TempDir,
    serving: Option<Serving>,
    fake: Arc<Fake>,
}

impl Mount {
    fn new() -> Self {
        let fake = Fake::new();
        let dir = tempfile::Builder::new().prefix("volfs-fs-").tempdir().unwrap();
        let options = Options { mountpoint: dir.path().into(), ..Options::default() };
        let serving = Some(serve(fake.clone(), options, None, None).unwrap());
        Self { dir, serving, fake }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn v(&self, n: u128, file: &str) -> PathBuf {
        self.at("volumes").join(vol(n).to_string()).join(file)
    }

    /// Has the next commands answered with these tickets, and tells when each was submitted.
    fn answer(&self, tickets: Vec<Ticket>, deadline: Option<Duration>) -> Receiver<()> {
        let (tell, told) = channel();
        let tickets = parking_lot::Mutex::new(tickets.into_iter());
        *self.fake.answer.lock() = Some(Box::new(move |_, _, _, _| {
            let ticket = tickets.lock().next().unwrap();
            let _ = tell.send(());
            Submitted { ticket, deadline, op: None, fence: None }
        }));
        told
    }

    fn shell(&self, script: &str) -> Shell {
        let mut command = Command::new("sh");
        command.args(["-c", script]).env("R", self.dir.path()).stdin(Stdio::null());
        Shell(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// Runs to the end: status, and what it printed on both.
    fn run(&self, script: &str) -> (i32, String) {
        self.shell(script).ended()
    }

    fn waiting(&self) -> usize {
        self.serving.as_ref().unwrap().waiting()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.stop();
        }
    }
}

struct Shell(Child);

impl Shell {
    fn ended(mut self) -> (i32, String) {
        let mut text = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        self.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        (self.0.wait().unwrap().code().unwrap_or(-1), text)
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn code<T>(result: std::io::Result<T>) -> i32 {
    result.map(|_| 0).unwrap_or_else(|e| e.raw_os_error().unwrap())
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

fn busy() -> Ticket {
    Ticket::done(Err(Error::InFlight { running: "attach".into(), id: OpId(1), object: "it".into() }))
}

#[test]
fn a_command_is_one_write_by_any_tool_and_its_errno_the_outcome() {
    let m = Mount::new();
    let all = [
        "echo attach > $R/jobs/a/control",
        "echo attach >> $R/jobs/a/control",
        "printf attach > $R/jobs/a/control",
        "echo attach | tee $R/jobs/a/control >/dev/null",
        "echo attach | dd of=$R/jobs/a/control status=none",
        "f=$(mktemp); echo attach > $f; cp $f $R/jobs/a/control; s=$?; rm $f; exit $s",
    ];
    for script in all {
        let told = m.answer(vec![Ticket::done(Ok(()))], None);
        assert_eq!(m.run(script), (0, String::new()), "{script}");
        told.try_recv().unwrap();
    }
    m.answer(vec![busy()], None);
    assert_eq!(code(fs::write(m.at("jobs/a/control"), "attach\n")), libc::EBUSY);
    // Nothing of this reaches the engine.
    *m.fake.answer.lock() = Some(Box::new(|_, _, _, _| panic!("a command was submitted")));
    for bad in ["atach\n", "attach\nattach\n", "\n", "attach colour=red", &" ".repeat(5000)] {
        assert_eq!(code(fs::write(m.at("jobs/a/control"), bad)), libc::EINVAL, "{bad:.20}");
    }
    let failures = m.fake.failures.lock();
    assert_eq!(failures.len(), 5);
    assert!(failures.iter().all(|(target, _, _)| *target == crate::engine::Target::Job(JobRow(1))));
    assert_eq!(failures[0].1, "atach");
}

#[test]
fn truncation_and_times_do_nothing_and_generic_commands_are_refused() {
    let m = Mount::new();
    *m.fake.answer.lock() = Some(Box::new(|_, _, _, _| panic!("a command was submitted")));
    for script in
        [": > $R/jobs/a/control", ": > $R/jobs/a/vm_name", "truncate -s 0 $R/jobs/a/hold", "touch $R/jobs/a/control"]
    {
        assert_eq!(m.run(script), (0, String::new()), "{script}");
    }
    let control = m.at("jobs/a/control");
    assert_eq!(code(fs::set_permissions(&control, fs::Permissions::from_mode(0o777))), libc::EPERM);
    assert_eq!(code(std::os::unix::fs::chown(&control, Some(1), None)), libc::EPERM);
    assert_eq!(code(fs::remove_file(&control)), libc::EPERM);
    assert_eq!(code(fs::rename(&control, m.at("jobs/a/status"))), libc::EPERM);
    assert_eq!(code(fs::rename(m.at("jobs/a"), m.at("jobs/c"))), libc::EPERM);
    assert_eq!(code(fs::hard_link(&control, m.at("jobs/a/x"))), libc::EPERM);
    assert_eq!(code(std::os::unix::fs::symlink("x", m.at("jobs/a/x"))), libc::EPERM);
    assert_eq!(code(File::create(m.at("jobs/a/x"))), libc::EPERM);
    assert_eq!(code(fs::create_dir(m.at("jobs/a/volumes/x"))), libc::EPERM);
    assert_eq!(code(fs::remove_dir(m.at(&format!("jobs/a/volumes/{}", vol(1))))), libc::EPERM);
    // Root passes the kernel's check of the mode, and is refused all the same.
    assert_eq!(code(OpenOptions::new().write(true).open(m.at("jobs/a/status"))), libc::EACCES);
    assert_eq!(code(OpenOptions::new().write(true).truncate(true).open(m.at("health"))), libc::EACCES);
    assert_eq!(code(OpenOptions::new().read(true).custom_flags(libc::O_TRUNC).open(m.at("health"))), libc::EACCES);
    assert_ne!(m.run("rm -rf $R/jobs $R/volumes").0, 0);
    assert_eq!(fs::read_dir(m.at("jobs/a/volumes")).unwrap().count(), 2);
}

#[test]
fn jobs_are_made_and_forgotten_by_mkdir_and_rmdir() {
    let m = Mount::new();
    fs::create_dir(m.at("jobs/new")).unwrap();
    assert_eq!(read(&m.at("jobs/new/status")), "idle\n");
    assert_eq!(code(fs::create_dir(m.at("jobs/new"))), libc::EEXIST);
    assert_eq!(code(fs::create_dir(m.at("jobs/a b"))), libc::EINVAL);
    assert_eq!(code(fs::remove_dir(m.at("jobs/a"))), libc::ENOTEMPTY);
    let mut held = OpenOptions::new().write(true).open(m.at("jobs/new/control")).unwrap();
    let mut status = File::open(m.at("jobs/new/status")).unwrap();
    fs::remove_dir(m.at("jobs/new")).unwrap();
    assert_eq!(code(fs::metadata(m.at("jobs/new"))), libc::ENOENT);
    // Held open, it is not the next job's.
    fs::create_dir(m.at("jobs/new")).unwrap();
    m.fake.change(|w| {
        let job = (*w.jobs.remove(&JobRow(3)).unwrap()).clone();
        w.job_rows.insert(job.id.clone(), JobRow(30));
        w.jobs.insert(JobRow(30), Arc::new(crate::engine::world::Job { row: JobRow(30), ..job }));
    });
    assert_eq!(code(held.write(b"attach\n")), libc::ENODEV);
    assert_eq!(code(status.read(&mut [0; 10])), libc::ENODEV);
    // What is not committed in a second is EIO.
    *m.fake.job_ticket.lock() = Some(Ticket::default());
    let began = Instant::now();
    assert_eq!(code(fs::create_dir(m.at("jobs/slow"))), libc::EIO);
    assert!(began.elapsed() >= Duration::from_millis(900));
}

#[test]
fn vm_name_and_hold_are_set_by_a_write() {
    let m = Mount::new();
    fs::write(m.at("jobs/a/vm_name"), "web 01\n").unwrap();
    assert_eq!(read(&m.at("jobs/a/vm_name")), "web 01\n");
    assert_eq!(code(fs::write(m.at("jobs/a/vm_name"), "a\nb\n")), libc::EINVAL);
    fs::write(m.at("jobs/a/hold"), "1\n").unwrap();
    assert_eq!(read(&m.at("jobs/a/hold")), "1\n");
    assert_eq!(code(fs::write(m.at("jobs/a/hold"), "2\n")), libc::EINVAL);
    fs::write(m.at("jobs/a/hold"), "0").unwrap();
    assert_eq!(read(&m.at("jobs/a/hold")), "0\n");
}

#[test]
fn while_a_command_waits_another_is_answered_and_the_tree_answers() {
    let m = Mount::new();
    let first = Ticket::default();
    let told = m.answer(vec![first.clone(), busy()], None);
    let waiting = m.shell("echo attach > $R/jobs/a/control");
    told.recv_timeout(SOON).unwrap();
    // Through `>`, by a shell: its own node, or it would sleep until the first is answered.
    let (status, said) = m.run("echo detach > $R/jobs/a/control");
    assert_eq!(status, 1, "{said}");
    assert_eq!(read(&m.at("jobs/a/status")), "idle detached=1 attached=1\n");
    assert_eq!(m.run("ls -lR $R/jobs $R/volumes $R/operations >/dev/null").0, 0);
    first.complete(Ok(()));
    assert_eq!(waiting.ended(), (0, String::new()));
    assert_eq!(m.waiting(), 0);
}

#[test]
fn sigkill_ends_a_wait_and_the_engine_is_told() {
    let m = Mount::new();
    let ticket = Ticket::default();
    let told = m.answer(vec![ticket.clone()], None);
    // `exec`: the shell itself would only be the parent.
    let mut shell = m.shell("exec dd of=$R/jobs/a/control status=none <<E\nattach\nE");
    told.recv_timeout(SOON).unwrap();
    let began = Instant::now();
    shell.0.kill().unwrap();
    shell.0.wait().unwrap();
    assert!(began.elapsed() < SOON);
    assert_eq!(*m.fake.left.lock(), [Left::Interrupted]);
    // Its outcome finds nobody, and nothing breaks.
    ticket.complete(Ok(()));
    assert_eq!(read(&m.at("jobs/a/hold")), "0\n");
}

#[test]
fn the_deadline_ends_a_wait() {
    let m = Mount::new();
    let most = Duration::from_millis(100);
    let _told = m.answer(vec![Ticket::default()], Some(most));
    assert_eq!(code(fs::write(m.at("jobs/a/control"), "attach\n")), libc::ETIMEDOUT);
    assert_eq!(*m.fake.left.lock(), [Left::TimedOut(most)]);
}

#[test]
fn hundreds_wait_at_once_each_on_its_own() {
    const MANY: usize = 300;
    let m = Mount::new();
    let ticket = Ticket::default();
    let told = m.answer(vec![ticket.clone(); MANY + 1], None);
    std::thread::scope(|scope| {
        let writers: Vec<_> =
            (0..MANY).map(|_| scope.spawn(|| fs::write(m.at("jobs/a/control"), "attach\n"))).collect();
        (0..MANY).for_each(|_| told.recv_timeout(SOON).unwrap());
        assert_eq!(read(&m.at("version")), super::render::VERSION);
        ticket.complete(Ok(()));
        writers.into_iter().for_each(|w| w.join().unwrap().unwrap());
    });
    assert_eq!(m.waiting(), 0);
}

#[test]
fn a_value_is_never_torn_and_a_read_from_the_beginning_shows_the_present() {
    let m = Mount::new();
    let path = m.v(1, "name");
    let name = |text: &'static str| m.fake.change(|w| edit(w, 11, |v| v.name = text.into()));
    name("first");
    let mut file = File::open(&path).unwrap();
    let mut one = [0u8; 1];
    let mut text = Vec::new();
    while file.read(&mut one).unwrap() == 1 {
        text.push(one[0]);
        name(if text.len() % 2 == 0 { "another" } else { "a third one" });
    }
    assert_eq!(text, b"first\n");
    file.rewind().unwrap();
    let mut again = String::new();
    file.read_to_string(&mut again).unwrap();
    assert_eq!(again, read(&path));
    assert_eq!(fs::metadata(&path).unwrap().len(), again.len() as u64);
    // Opened before, read after: never older than the read of another.
    let mut early = File::open(&path).unwrap();
    name("newest");
    let mut text = String::new();
    early.read_to_string(&mut text).unwrap();
    assert_eq!(text, "newest\n");
}

#[test]
fn a_device_that_is_gone_fails_the_open_and_a_reread() {
    let m = Mount::new();
    let mut file = File::open(m.v(1, "device")).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "/dev/loop7\n");
    assert_eq!(read(&m.v(1, "incarnation")), format!("{} 47\n", boot()));
    m.fake.gone.lock().push(MapRow(7));
    file.rewind().unwrap();
    assert_eq!(code(file.read(&mut [0; 20])), libc::ENODEV);
    assert_eq!(code(File::open(m.v(1, "device"))), libc::ENODEV);
    assert_eq!(code(File::open(m.v(1, "incarnation"))), libc::ENODEV);
    assert_eq!(code(File::open(m.v(2, "device"))), libc::ENODEV);
    let (status, _) = m.run(&format!("set -e; x=$(cat $R/volumes/{}/device); echo went on", vol(1)));
    assert_ne!(status, 0);
}

#[test]
fn block_is_the_device_by_number_and_another_node_for_each_mapping() {
    let m = Mount::new();
    let dev =
        |path: &Path| fs::metadata(path).map(|meta| (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev())));
    let (block, export) = (m.v(1, "block"), m.at(&format!("exports/{}", vol(1))));
    assert!(fs::metadata(&block).unwrap().file_type().is_block_device());
    assert_eq!((dev(&block).unwrap(), dev(&export).unwrap()), ((7, 7), (7, 7)));
    let held = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&block).unwrap();
    // Detached and attached again: a new mapping, another device, minor above 8 bits.
    m.fake.change(|w| {
        w.by_mapping.remove(&MapRow(7));
        w.by_device.clear();
        attach(w, 11, 300, "loop300");
    });
    assert_eq!(dev(&block).unwrap(), (7, 300), "the kernel keeps a node's number for ever");
    assert_eq!(dev(&export).unwrap(), (7, 300));
    assert_eq!(code(held.metadata()), libc::ENODEV, "the old node has ended");
    assert_eq!(code(File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&held)))), libc::ENODEV);
}

#[test]
fn control_is_read_copied_and_keeps_its_inode_number() {
    let m = Mount::new();
    let control = m.at("jobs/a/control");
    assert_eq!(fs::metadata(&control).unwrap().ino(), fs::metadata(&control).unwrap().ino());
    let copy = tempfile::NamedTempFile::new().unwrap();
    let (status, said) = m.run(&format!("cp $R/jobs/a/control {}", copy.path().display()));
    assert_eq!((status, said.as_str()), (0, ""));
    let text = read(copy.path());
    assert!(text.starts_with('#') && text.contains("\nattach:\tallowed\n"), "{text}");
    assert_eq!(fs::metadata(&control).unwrap().len(), text.len() as u64);
    // As an editor writes it back.
    assert_eq!(code(fs::write(&control, text)), libc::EINVAL);
}

#[test]
fn events_gives_lines_as_they_come_and_a_signal_ends_the_wait() {
    let m = Mount::new();
    let push = |job: Option<JobRow>| {
        m.fake.events.push(job, |seq| format!("{{\"seq\":{seq}}}\n"));
        m.fake.events.wake();
    };
    push(None);
    let mut all = File::open(m.at("events/all")).unwrap();
    let mut quick = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(m.at("events/a")).unwrap();
    assert_eq!(code(quick.read(&mut [0; 100])), libc::EAGAIN);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut buffer = [0; 100];
            let n = all.read(&mut buffer).unwrap();
            String::from_utf8(buffer[..n].into()).unwrap()
        });
        while m.waiting() == 0 {
            std::thread::yield_now();
        }
        push(None);
        assert_eq!(reader.join().unwrap(), "{\"seq\":1}\n", "from the moment of open");
    });
    push(Some(JobRow(1)));
    let mut buffer = [0; 100];
    assert_eq!(quick.read(&mut buffer).unwrap(), "{\"seq\":2}\n".len(), "the job's only");
    let mut cat = m.shell("exec cat $R/events/all");
    while m.waiting() == 0 {
        std::thread::yield_now();
    }
    cat.0.kill().unwrap();
    cat.0.wait().unwrap();
    assert_eq!(m.waiting(), 0);
    // A job that is forgotten ends its stream.
    let mut of_job = File::open(m.at("events/b")).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| of_job.read(&mut [0; 100]).unwrap());
        while m.waiting() == 0 {
            std::thread::yield_now();
        }
        m.fake.change(|w| {
            w.jobs.remove(&JobRow(2));
        });
        assert_eq!(reader.join().unwrap(), 0);
    });
}

fn poll(file: &File, timeout_ms: i64) -> PollFlags {
    let mut fds = [PollFd::new(file, PollFlags::PRI)];
    let timeout = rustix::event::Timespec { tv_sec: timeout_ms / 1000, tv_nsec: timeout_ms % 1000 * 1_000_000 };
    rustix::event::poll(&mut fds, Some(&timeout)).unwrap();
    fds[0].revents()
}

#[test]
fn poll_wakes_when_the_value_differs_from_what_was_read_and_not_before() {
    let m = Mount::new();
    let mut file = File::open(m.v(1, "status")).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(poll(&file, 0), PollFlags::empty());
    std::thread::scope(|scope| {
        let poller = scope.spawn(|| poll(&file, 20_000));
        // Another value's change wakes nobody.
        m.fake.change(|w| edit(w, 11, |v| v.name = "other".into()));
        m.fake.change(|w| edit(w, 11, |v| v.base = Status::Lost));
        assert_eq!(poller.join().unwrap(), PollFlags::PRI | PollFlags::ERR);
    });
    assert_eq!(poll(&file, 0), PollFlags::PRI | PollFlags::ERR, "until it is read");
    file.rewind().unwrap();
    text.clear();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "lost\n");
    assert_eq!(poll(&file, 0), PollFlags::empty());
}

#[test]
fn epoll_wakes_edge_triggered_once_a_change() {
    let m = Mount::new();
    let mut file = File::open(m.at("jobs/a/status")).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    use rustix::event::epoll::{EventData, EventFlags};
    let flags = EventFlags::PRI | EventFlags::ET;
    rustix::event::epoll::add(&epoll, &file, EventData::new_u64(1), flags).unwrap();
    let wait = |most: Duration| {
        let timeout = rustix::event::Timespec::try_from(most).unwrap();
        let mut events = Vec::with_capacity(4);
        let n = rustix::event::epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout));
        n.unwrap()
    };
    assert_eq!(wait(Duration::ZERO), 0);
    for (n, status) in [Status::Lost, Status::Missing, Status::Attached].into_iter().enumerate() {
        m.fake.change(|w| edit(w, 11, |v| v.base = status));
        assert_eq!(wait(SOON), 1, "change {n}");
        assert_eq!(wait(Duration::ZERO), 0, "not twice");
        file.rewind().unwrap();
        text.clear();
        file.read_to_string(&mut text).unwrap();
        assert!(text.contains(status.as_str()), "{text}");
    }
}

#[test]
fn holders_is_answered_when_the_walk_is_done_and_others_meanwhile() {
    let m = Mount::new();
    let ticket = Ticket::default();
    m.fake.holders.lock().insert(DiskRow(11), ticket.clone());
    let path = m.v(1, "holders");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(&path));
        while m.waiting() == 0 {
            std::thread::yield_now();
        }
        assert_eq!(read(&m.v(1, "status")), "attached\n");
        let dd = Holder { kind: HolderKind::Open, pid: Some(4711), name: "dd".into() };
        ticket.complete(Ok(Arc::new(vec![dd])));
        assert_eq!(reader.join().unwrap(), "kind\tpid\tcommand\nopen\t4711\tdd\n");
    });
    let last = "kind\tpid\tcommand\nopen\t4711\tdd\n".len();
    assert_eq!(fs::metadata(&path).unwrap().len(), last as u64, "of the last rendering");
    assert_eq!(read(&m.v(2, "holders")), "kind\tpid\tcommand\n");
    let mut file = File::open(&path).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    m.fake.holders.lock().clear();
    file.rewind().unwrap();
    text.clear();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "kind\tpid\tcommand\n", "a re-read asks again");
}

#[test]
fn who_stands_in_a_volume_that_moved_gets_estale() {
    let m = Mount::new();
    let dir = File::open(m.at(&format!("jobs/a/volumes/{}", vol(2)))).unwrap();
    let control = OpenOptions::new().write(true).open(m.v(2, "control")).unwrap();
    m.fake.change(|w| {
        w.volumes.remove(&DiskRow(12));
        edit_job(w, 1, |j| {
            j.disks.remove(&disk("disk-2001"));
        });
        add_volume(w, 99, 2, "disk-2001", vol(2));
    });
    let from = |file: &str| rustix::fs::openat(&dir, file, rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty());
    assert_eq!(from("status").unwrap_err(), rustix::io::Errno::STALE);
    assert_eq!(code((&control).write(b"attach\n")), libc::ENODEV);
    assert_eq!(read(&m.v(2, "status")), "detached\n", "its path leads to the new owner");
}

#[test]
fn the_end_answers_who_waits_and_leaves_no_mount() {
    let mut m = Mount::new();
    let told = m.answer(vec![Ticket::default()], None);
    let waiting = m.shell("echo attach > $R/jobs/a/control");
    let standing = m.shell("cd $R/jobs/a; echo in >&2; exec sleep 1000");
    told.recv_timeout(SOON).unwrap();
    let began = Instant::now();
    let serving = m.serving.take().unwrap();
    let mut ended = serving.ended();
    serving.stop();
    assert!(began.elapsed() < SOON, "a shell that stands inside does not hold it");
    let (status, said) = waiting.ended();
    assert!(status != 0 && !said.is_empty());
    assert!(fs::read_dir(m.dir.path()).unwrap().next().is_none(), "the empty directory below");
    drop(standing);
    let rt = tokio::runtime::Builder::new_current_thread().build().unwrap();
    rt.block_on(ended.wait_for(Option::is_some)).unwrap();
}

#[test]
fn an_unmount_from_outside_is_reported_and_anothers_mount_is_left_alone() {
    let mut m = Mount::new();
    let serving = m.serving.take().unwrap();
    rustix::mount::unmount(m.dir.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    let rt = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut ended = serving.ended();
    rt.block_on(ended.wait_for(Option::is_some)).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("volfs-test", m.dir.path(), "tmpfs", flags, None).unwrap();
    fs::write(m.at("theirs"), "").unwrap();
    serving.stop();
    let stays = m.at("theirs").exists();
    rustix::mount::unmount(m.dir.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(stays);
}

#[test]
fn snapshots_are_files_that_come_and_go_and_one_that_is_gone_is_stale() {
    let m = Mount::new();
    let (status, said) = m.run(&format!("cd $R/jobs/a/volumes/{} && ls snapshots && cat snapshots/daily", vol(1)));
    assert_eq!(status, 0, "{said}");
    assert!(said.starts_with("before-test\ndaily\n{") && said.contains("\"ours\":false"), "{said}");
    let dir = File::open(m.v(1, "snapshots")).unwrap();
    let path = m.v(1, "snapshots/before-test");
    assert_eq!(fs::metadata(&path).unwrap().len(), read(&path).len() as u64);
    assert_eq!(code(fs::remove_file(&path)), libc::EPERM, "r5: no generic command deletes one");
    let open = File::open(&path).unwrap();
    m.fake.change(|w| {
        edit(w, 11, |v| v.snapshots = Default::default());
        w.snapshots.clear();
        w.foreign_snapshots.clear();
        add_snapshot(w, 11, 33, "later", true);
    });
    assert_eq!(code(open.metadata()), libc::ESTALE);
    assert_eq!(code(fs::read(&path)), libc::ENOENT);
    let at = rustix::fs::openat(&dir, "later", rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty());
    assert!(at.is_ok(), "the directory is the volume's as before");
}

#[test]
fn every_tool_that_walks_the_tree_ends_well() {
    let m = Mount::new();
    // The one view that cannot be told, and the one device that is not there, are errors by contract.
    m.fake.change(|w| {
        w.vms.remove(&vm(HOST));
        attach(w, 12, 8, "loop8");
        attach(w, 13, 9, "loop10");
    });
    for script in [
        "find $R -ls",
        "grep -r attached $R --exclude=block --exclude-dir=exports",
        "tar cf - -C $R . | tar tf -",
        "du -a $R; cat $R/table $R/metrics",
    ] {
        let (status, said) = m.run(script);
        assert_eq!(status, 0, "{script}\n{said}");
        assert!(said.lines().count() > 3, "{script}\n{said}");
    }
    // Sizes are exact, so an archive holds every value whole.
    for file in ["jobs/a/table", "jobs/a/status", "metrics"] {
        let (status, said) = m.run(&format!("tar cf - -C $R {file} | tar xOf -"));
        assert_eq!((status, said), (0, read(&m.at(file))));
    }
}
