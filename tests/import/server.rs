//! A MariaDB server for this test process: private directory and socket, no network, gone with it.

use std::fs;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use crate::common::have;

/// A slow machine, many tests at once.
const STARTING: Duration = Duration::from_secs(120);

/// Before the second link was dropped.
const BEFORE: &str = include_str!("before.sql");
/// What the old project did to drop it.
const TO_AFTER: &str = "ALTER TABLE vm_disks DROP FOREIGN KEY fk_vm_disks_device;
    ALTER TABLE vm_disks DROP COLUMN cloudstack_volume_uuid;";
/// Back to the names of its beginning.
const TO_OLDEST: &str = "ALTER TABLE vm_disks DROP FOREIGN KEY fk_vm_disks_device;
    ALTER TABLE vm_disks CHANGE vmdk_path vm_dk_path varchar(500) DEFAULT NULL;
    ALTER TABLE device_mappings CHANGE volume_uuid volume_id varchar(64) NOT NULL;
    ALTER TABLE ossea_volumes CHANGE volume_name name varchar(255) NOT NULL, CHANGE status state varchar(50);
    ALTER TABLE volume_operations CHANGE type operation varchar(20), CHANGE status state varchar(20);";

struct Server {
    dir: PathBuf,
    socket: PathBuf,
}

/// What is to be ended and removed when this process ends; statics are not dropped.
static RUNNING: Mutex<Option<(Child, PathBuf)>> = Mutex::new(None);

extern "C" fn end() {
    if let Ok(mut running) = RUNNING.lock()
        && let Some((mut child, dir)) = running.take()
    {
        let _ = child.kill();
        let _ = child.wait();
        let _ = fs::remove_dir_all(dir);
    }
}

fn start() -> Server {
    let dir = tempfile::Builder::new().prefix("volfs-mariadb-").tempdir().unwrap().keep();
    let (data, socket, log) = (dir.join("data"), dir.join("s"), dir.join("log"));
    let made = Command::new("mariadb-install-db")
        .args(["--no-defaults", "--user=root", "--auth-root-authentication-method=normal", "--skip-test-db"])
        .arg(format!("--datadir={}", data.display()))
        .output()
        .unwrap();
    assert!(made.status.success(), "mariadb-install-db: {}", String::from_utf8_lossy(&made.stdout));
    let mut command = Command::new("mariadbd");
    command
        .args(["--no-defaults", "--user=root", "--skip-networking", "--innodb-flush-log-at-trx-commit=0"])
        .args(["--innodb-buffer-pool-size=16M", "--performance-schema=off", "--max-allowed-packet=64M"])
        .arg(format!("--datadir={}", data.display()))
        .arg(format!("--socket={}", socket.display()))
        .arg(format!("--pid-file={}", dir.join("pid").display()))
        .stdin(Stdio::null())
        .stdout(fs::File::create(&log).unwrap())
        .stderr(fs::OpenOptions::new().append(true).open(&log).unwrap());
    // A test run that is killed takes its server with it. The signal comes when the thread that started
    // the process ends, and that of a test ends with the test: this one never does.
    // SAFETY: prctl with PR_SET_PDEATHSIG is async-signal-safe and touches no memory of ours.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    let (started, child) = mpsc::channel();
    std::thread::spawn(move || {
        started.send(command.spawn()).unwrap();
        loop {
            std::thread::park();
        }
    });
    let child = child.recv().unwrap().unwrap();
    *RUNNING.lock().unwrap() = Some((child, dir.clone()));
    // SAFETY: registers a function that takes nothing and may run once the tests are over.
    assert_eq!(unsafe { libc::atexit(end) }, 0);
    let server = Server { dir, socket };
    let began = Instant::now();
    // Its socket is there a moment before it answers, and nothing else says when.
    while !server.client(&[]).args(["-e", "SELECT 1"]).output().unwrap().status.success() {
        let log = || fs::read_to_string(&log).unwrap_or_default();
        assert!(began.elapsed() < STARTING, "mariadbd does not answer:\n{}", log());
        let ended = RUNNING.lock().unwrap().as_mut().unwrap().0.try_wait().unwrap();
        assert!(ended.is_none(), "mariadbd ended: {ended:?}\n{}", log());
        std::thread::sleep(Duration::from_millis(50));
    }
    server
}

impl Server {
    fn client(&self, args: &[&str]) -> Command {
        let mut command = Command::new("mariadb");
        command.args(["--no-defaults", "-uroot", "--default-character-set=utf8mb4"]);
        command.arg("-S").arg(&self.socket).args(args);
        command
    }
}

/// The generations of the old schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schema {
    Oldest,
    Before,
    After,
}

/// A database with the old schema and rows in it.
pub struct Old {
    server: &'static Server,
    pub name: String,
}

impl Old {
    /// A new one; `None` where this machine has no server, which is said.
    pub fn make(schema: Schema) -> Option<Old> {
        static SERVER: OnceLock<Server> = OnceLock::new();
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        if !have(&["mariadbd", "mariadb-install-db", "mariadb", "mariadb-dump"]) {
            return None;
        }
        let server = SERVER.get_or_init(start);
        let name = format!("old_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let old = Old { server, name };
        old.sql_in("", &format!("CREATE DATABASE {} CHARACTER SET utf8mb4", old.name));
        old.sql(BEFORE);
        match schema {
            Schema::Before => {}
            Schema::After => old.sql(TO_AFTER),
            Schema::Oldest => old.sql(TO_OLDEST),
        }
        Some(old)
    }

    /// Runs statements in it.
    #[track_caller]
    pub fn sql(&self, text: &str) {
        self.sql_in(&self.name, text);
    }

    #[track_caller]
    fn sql_in(&self, database: &str, text: &str) {
        let mut child = self.server.client(&[database]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// What `mariadb-dump` says with these options; the database's own name stands for `DB`.
    #[track_caller]
    pub fn dump(&self, options: &[&str]) -> Vec<u8> {
        let mut command = Command::new("mariadb-dump");
        command.args(["--no-defaults", "-uroot"]).arg("-S").arg(&self.server.socket);
        command.args(options.iter().map(|o| if *o == "DB" { &self.name } else { *o }));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{options:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    /// A plain dump in a file of its own.
    pub fn dumped(&self) -> PathBuf {
        self.file("dump.sql", &self.dump(&["DB"]))
    }

    /// A file with these bytes, for as long as the server is there.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.server.dir.join(format!("{}-{name}", self.name));
        fs::write(&path, bytes).unwrap();
        path
    }
}

/// The volfs program with a state directory and a configuration file.
pub fn volfs(state: &Path, config: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volfs"));
    command.arg("--state-dir").arg(state).arg("--config").arg(config);
    command
}
