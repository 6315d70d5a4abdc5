//! A volfs of its own for each test: state, mount point and process in one temporary place, and
//! gone with the test, also when it fails.

// Each module of tests uses the part it needs.
#![allow(dead_code)]

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use volfs::model::{Status, edge_is_documented};

/// The three shells of the contract.
pub const SHELLS: Shells = Shells;

/// Those of the three that this machine has; one that is missing is said to be skipped.
#[derive(Clone, Copy)]
pub struct Shells;

type Shell = &'static [&'static str];

fn shells() -> &'static [Shell] {
    static HERE: LazyLock<Vec<Shell>> = LazyLock::new(|| {
        let all: [Shell; 3] = [&["bash"], &["dash"], &["busybox", "sh"]];
        all.into_iter().filter(|shell| have(&shell[..1])).collect()
    });
    &HERE
}

impl std::ops::Deref for Shells {
    type Target = [Shell];

    fn deref(&self) -> &[Shell] {
        shells()
    }
}

impl IntoIterator for Shells {
    type Item = Shell;
    type IntoIter = std::iter::Copied<std::slice::Iter<'static, Shell>>;

    fn into_iter(self) -> Self::IntoIter {
        shells().iter().copied()
    }
}

/// Whether this machine has the programs; says in one line what is skipped for want of which.
pub fn have(programs: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = |program: &&&str| std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    let missing: Vec<_> = programs.iter().filter(|program| !there(program)).collect();
    if missing.is_empty() {
        return true;
    }
    let test = std::thread::current();
    // Straight to the descriptor: the line is to be seen of a test that passes, too.
    let line =
        format!("skipped: {}: this machine lacks {missing:?} (.ci/run installs it)\n", test.name().unwrap_or("a test"));
    let _ = io::stderr().write_all(line.as_bytes());
    false
}

/// A script that operators get.
pub fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/scripts").join(name)
}

/// For each line of a shipped script that does something, a copy that is killed after it.
pub fn killed_copies(name: &str) -> Vec<(usize, String)> {
    let text = fs::read_to_string(shipped(name)).unwrap();
    let lines: Vec<_> = text.lines().collect();
    let first = lines.iter().position(|l| *l == "set -eu").unwrap();
    let copy = |n: usize| {
        let cut = [&lines[..=n], &["kill -9 $$"], &lines[n + 1..]].concat();
        (n + 1, cut.join("\n") + "\n")
    };
    // An empty line does nothing, and between the lines of one command there is no place.
    (first..lines.len()).filter(|n| !lines[*n].is_empty()).map(copy).collect()
}

/// Longest time anything here is waited for.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A running volfs.
pub struct Volfs {
    dir: tempfile::TempDir,
    child: Option<Child>,
    env: Vec<(String, String)>,
    args: Vec<String>,
    keeper: bool,
    program: PathBuf,
}

/// What a shell command printed, and its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    pub status: i32,
    pub out: String,
    pub err: String,
}

impl Volfs {
    /// Starts one with nothing in it.
    pub fn start() -> Self {
        Self::start_with(&[], "")
    }

    /// Starts one with environment variables (failpoints among them) and a configuration file.
    pub fn start_with(env: &[(&str, &str)], config: &str) -> Self {
        let mut volfs = Self::prepare(env, config);
        volfs.launch();
        volfs
    }

    /// Everything but the daemon.
    pub fn prepare(env: &[(&str, &str)], config: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("volfs-test-").tempdir().expect("a temporary directory");
        fs::create_dir(dir.path().join("mnt")).unwrap();
        fs::write(dir.path().join("config.toml"), config).unwrap();
        let env = env.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let program = env!("CARGO_BIN_EXE_volfs").into();
        Volfs { dir, child: None, env, args: Vec::new(), keeper: false, program }
    }

    /// With a keeper in front of the daemon, as users have it. Without one the process that a test
    /// starts, kills and waits for is the daemon itself.
    pub fn with_keeper(mut self) -> Self {
        self.keeper = true;
        self
    }

    /// Another program than the one just built.
    pub fn set_program(&mut self, program: &Path) {
        self.program = program.to_owned();
    }

    /// Replaces the environment for the next [`Volfs::launch`].
    pub fn set_env(&mut self, env: &[(&str, &str)]) {
        self.env = env.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    }

    /// Further arguments for the next [`Volfs::launch`], e.g. `--read-only`.
    pub fn set_args(&mut self, args: &[&str]) {
        self.args = args.iter().map(|a| a.to_string()).collect();
    }

    /// The daemon's command line.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--state-dir")
            .arg(self.state())
            .arg("--config")
            .arg(self.dir.path().join("config.toml"))
            .args(&self.args)
            .arg("mount")
            .arg(self.root())
            .args((!self.keeper).then_some("--no-keeper"))
            .env("VOLFS_STATUS_EDGES", self.edges_file())
            .envs(self.env.iter().map(|(k, v)| (k.as_str(), v.as_str())))
            .stdin(Stdio::null());
        command
    }

    /// Starts the daemon and waits until the tree answers.
    pub fn launch(&mut self) {
        if let Err(words) = self.try_launch() {
            panic!("volfs did not start: {words}\n{}", self.log());
        }
    }

    /// The same, with the daemon's sentence if it does not start.
    pub fn try_launch(&mut self) -> Result<(), String> {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let mut command = self.command();
        // The child says `ready` on stdout when the tree answers, or why it does not start.
        command.arg("--background-child").stdout(Stdio::piped()).stderr(log);
        // A test run that is killed takes its daemons with it.
        // SAFETY: prctl with PR_SET_PDEATHSIG is async-signal-safe and touches no memory of ours.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let mut child = command.spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        let mut line = Vec::new();
        let mut byte = [0u8; 1];
        while out.read(&mut byte).unwrap_or(0) == 1 && byte[0] != b'\n' {
            line.push(byte[0]);
        }
        if line == b"ready" {
            self.child = Some(child);
            return Ok(());
        }
        let _ = child.wait();
        Err(String::from_utf8_lossy(&line).into_owned())
    }

    /// The mount point.
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// The state directory.
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// A place for a test's own files.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path below the mount point.
    pub fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.root().join(below)
    }

    /// The daemon's pid.
    pub fn pid(&self) -> i32 {
        self.child.as_ref().expect("a running daemon").id() as i32
    }

    /// The daemon's pid below its keeper, once it has one.
    pub fn kept_pid(&self) -> Option<i32> {
        let keeper = self.pid();
        let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap_or_default();
        children.split_whitespace().next().and_then(|pid| pid.parse().ok())
    }

    /// SIGKILL to the daemon below its keeper; its pid.
    pub fn kill_kept(&self) -> i32 {
        loop {
            // None for a moment, while the keeper starts the next.
            if let Some(pid) = self.kept_pid() {
                // SAFETY: kill(2) takes no pointers; the pid is the keeper's child, which only it waits for:
                // a zombie at worst.
                assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
                return pid;
            }
            std::thread::yield_now();
        }
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Runs a script in one shell with `$R` the mount point, standing outside the tree.
    pub fn sh_in(&self, shell: &[&str], script: &str) -> Said {
        said_of(self.shell(shell, script).output().unwrap())
    }

    /// The same in dash, the most common `/bin/sh`.
    pub fn sh(&self, script: &str) -> Said {
        self.sh_in(&["dash"], script)
    }

    /// Starts a script without waiting for it.
    pub fn sh_spawn(&self, shell: &[&str], script: &str) -> Child {
        self.shell(shell, script).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn shell(&self, shell: &[&str], script: &str) -> Command {
        let mut command = Command::new(shell[0]);
        command.args(&shell[1..]).arg("-c").arg(script).env("R", self.root()).env("VOLFS", self.root());
        command.current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    /// A script that must succeed; its output without the last newline.
    #[track_caller]
    pub fn ok(&self, script: &str) -> String {
        let said = self.sh(script);
        assert_eq!(said.status, 0, "`{script}` failed: {said:?}\n{}", self.log());
        said.out.trim_end_matches('\n').to_owned()
    }

    /// One write(2) of a command; the errno it ended with, 0 for success.
    pub fn write(&self, below: impl AsRef<Path>, text: &str) -> i32 {
        let open = fs::OpenOptions::new().write(true).open(self.path(below));
        match open.and_then(|mut file| file.write(text.as_bytes())) {
            Ok(n) => {
                assert_eq!(n, text.len(), "a short count");
                0
            }
            Err(error) => error.raw_os_error().unwrap_or(-1),
        }
    }

    /// As [`Volfs::write`], as another user.
    pub fn write_as(&self, uid: u32, gid: u32, below: impl AsRef<Path>, text: &str) -> i32 {
        let script = r#"import os,sys
try:
    f=os.open(sys.argv[1],os.O_WRONLY); os.write(f,sys.argv[2].encode()); sys.exit(0)
except OSError as e: sys.exit(e.errno)"#;
        let mut command = Command::new("python3");
        command.arg("-c").arg(script).arg(self.path(below)).arg(text).uid(uid).gid(gid).current_dir("/");
        command.env("PATH", "/usr/bin:/bin:/usr/local/bin");
        command.status().unwrap().code().unwrap_or(-1)
    }

    /// A file's text, or the errno.
    pub fn read(&self, below: impl AsRef<Path>) -> Result<String, i32> {
        let errno = |e: io::Error| e.raw_os_error().unwrap_or(-1);
        let mut file =
            fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(self.path(below)).map_err(errno)?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(errno)?;
        Ok(text)
    }

    /// A value without its newline; panics if it cannot be read.
    #[track_caller]
    pub fn value(&self, below: impl AsRef<Path>) -> String {
        let below = below.as_ref();
        let text =
            self.read(below).unwrap_or_else(|errno| panic!("{}: errno {errno}\n{}", below.display(), self.log()));
        text.strip_suffix('\n').unwrap_or_else(|| panic!("{}: no newline in {text:?}", below.display())).to_owned()
    }

    /// A job, if it is not there. On a busy machine a commit may not be told within the second that a
    /// mkdir waits for it: EIO, nothing happened, and it is made again.
    #[track_caller]
    pub fn make_job(&self, job: &str) {
        let path = self.path(format!("jobs/{job}"));
        self.until("job", || match fs::create_dir(&path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => true,
            Err(error) if error.raw_os_error() == Some(libc::EIO) => false,
            Err(error) => panic!("{}: {error}\n{}", path.display(), self.log()),
        });
    }

    /// A command that the rest of a test stands on. On a busy machine a cloud may not be heard in time
    /// (EHOSTUNREACH): the command is given again, and may find that it was done.
    #[track_caller]
    pub fn bring(&self, control: impl AsRef<Path>, command: &str) {
        let control = control.as_ref();
        let mut again = false;
        self.until(command, || match self.write(control, command) {
            0 => true,
            libc::EEXIST if again => true,
            libc::EHOSTUNREACH => {
                again = true;
                false
            }
            errno => panic!("{}: {command}: errno {errno}\n{}", control.display(), self.log()),
        });
    }

    /// A job with detached disks of `size`; answers their uuids in order.
    #[track_caller]
    pub fn job(&self, job: &str, disks: &[&str], size: &str) -> Vec<String> {
        self.make_job(job);
        let make = |disk: &&str| {
            self.bring(format!("jobs/{job}/control"), &format!("create {disk} {size}"));
            let link = fs::read_link(self.path(format!("jobs/{job}/disks/{disk}"))).unwrap();
            link.file_name().unwrap().to_str().unwrap().to_owned()
        };
        disks.iter().map(make).collect()
    }

    /// Waits until `done` holds, woken by the tree's own events; panics after [`PATIENCE`].
    #[track_caller]
    pub fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let began = Instant::now();
        while !done() {
            assert!(began.elapsed() < PATIENCE, "no {what} in {PATIENCE:?}\n{}", self.log());
            std::thread::yield_now();
            // Bounded pacing of the look, not a wait: `done` decides.
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// SIGKILL, and the dead mount left behind.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Waits for the daemon to end by itself; its exit status, or -signal.
    pub fn wait(&mut self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        let status = self.child.take().expect("a running daemon").wait().unwrap();
        status.code().unwrap_or_else(|| -status.signal().unwrap_or(0))
    }

    /// SIGTERM, and how long the end took.
    pub fn terminate(&mut self) -> (i32, Duration) {
        let began = Instant::now();
        // SAFETY: kill(2) takes no pointers; the pid is our own child, not yet waited for.
        unsafe { libc::kill(self.pid(), libc::SIGTERM) };
        (self.wait(), began.elapsed())
    }

    fn edges_file(&self) -> PathBuf {
        self.dir.path().join("edges")
    }

    /// Each change of a volume's status since the first start: from, to.
    pub fn edges(&self) -> Vec<(Status, Status)> {
        let text = fs::read_to_string(self.edges_file()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let edge = |(n, line): (usize, &&str)| {
            let mut words = line.split(' ').skip(1).map(Status::parse);
            let edge = words.next().flatten().zip(words.next().flatten());
            // The last line of a daemon that was killed may be half a one; an empty line is a start.
            let last = lines.get(n + 1).is_none_or(|next| next.is_empty());
            assert!(edge.is_some() || last, "no edge: {line:?}");
            edge
        };
        lines.iter().enumerate().filter(|(_, line)| !line.is_empty()).filter_map(edge).collect()
    }

    /// Loop devices whose backing file is in this test's directory.
    pub fn loops(&self) -> Vec<String> {
        loops_below(self.dir.path())
    }
}

/// A tmpfs. At its end the loop devices over it go first: without its mount the kernel shows their
/// files below no directory, and nobody would find them again.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts one there, with these options.
    pub fn mount(at: &Path, options: &std::ffi::CStr) -> Self {
        fs::create_dir_all(at).unwrap();
        rustix::mount::mount("volfs-test", at, "tmpfs", rustix::mount::MountFlags::empty(), options).unwrap();
        Tmpfs(at.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        unbind_below(&self.0);
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Lets go of every loop device whose backing file is below `dir`.
fn unbind_below(dir: &Path) {
    for name in loops_below(dir) {
        let _ = Command::new("losetup").arg("-d").arg(format!("/dev/{name}")).stderr(Stdio::null()).status();
    }
}

/// Kernel names of loop devices whose backing file is below `dir`.
pub fn loops_below(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block").unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let backing = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if Path::new(backing.trim_end()).starts_with(dir) {
            found.push(name);
        }
    }
    found
}

/// What a finished command said.
pub fn said_of(output: Output) -> Said {
    use std::os::unix::process::ExitStatusExt;
    Said {
        status: output.status.code().unwrap_or_else(|| -output.status.signal().unwrap_or(0)),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// What a spawned script said in the end.
pub fn finish(child: Child) -> Said {
    said_of(child.wait_with_output().unwrap())
}

impl Drop for Volfs {
    fn drop(&mut self) {
        if self.child.is_some() {
            let _ = self.terminate();
        }
        let _ = Command::new("umount").arg("-l").arg(self.root()).stderr(Stdio::null()).status();
        unbind_below(self.dir.path());
        // L9, in every test with a daemon; one that has failed already has its own words.
        if !std::thread::panicking() {
            let edges = self.edges();
            let wrong: Vec<_> = edges.iter().filter(|(from, to)| !edge_is_documented(*from, *to)).collect();
            assert!(wrong.is_empty(), "l9: edges that the contract does not have: {wrong:?}\n{}", self.log());
        }
    }
}

/// Every file below that can be read, with its bytes. Links, devices and streams are left out.
pub fn everything(below: &Path, found: &mut Vec<(PathBuf, Vec<u8>)>) {
    for entry in fs::read_dir(below).into_iter().flatten().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            everything(&path, found);
        } else if kind.is_file() {
            // A value that cannot be told has no bytes.
            found.extend(fs::read(&path).ok().map(|bytes| (path, bytes)));
        }
    }
}
