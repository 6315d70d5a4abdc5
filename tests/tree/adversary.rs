//! Somebody clears, re-binds and renames loop devices behind the daemon's back, while readers read
//! `device` and open `block`: no successful open is of a disk that is not that volume's.
//!
//! The oracle trusts nothing of volfs: it asks the descriptor that it got (LOOP_GET_STATUS64,
//! BLKGETDISKSEQ) for backing file, tag and sequence number. What can be told apart from a defect:
//! - a path read from `device` may be another disk's when it is opened, if a detach came in between;
//!   `incarnation`, equal before and after, says that none did;
//! - an open of `block` that the kernel has begun may end after a detach that came in between; the
//!   driver counts its detaches.
//!
//! Only devices whose backing file is in this test's directory are touched; a device cannot change
//! its file while the adversary has it open (a clear with two openers waits for the last close).

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use volfs::sys::{self, LoopInfo64};

use super::common::{PATIENCE, Volfs};

/// Between looks at how far the others are.
const PACE: Duration = Duration::from_millis(1);
const PATTERN: &[u8] = b"not one bit of this is junk";

struct Victim {
    uuid: String,
    data: PathBuf,
    /// Device and inode of its file.
    file: (u64, u64),
    /// Odd while the driver detaches.
    detaching: AtomicU64,
}

struct Scene<'a> {
    volfs: &'a Volfs,
    victims: Vec<Victim>,
    junk: Vec<PathBuf>,
    /// Whether the daemon holds what it serves.
    pinned: bool,
    over: AtomicBool,
    reads: AtomicUsize,
    /// The driver's, done.
    commands: AtomicUsize,
    opened: AtomicUsize,
    raced: AtomicUsize,
    empty: AtomicUsize,
    attached: AtomicUsize,
    detached: AtomicUsize,
    stolen: AtomicUsize,
    wrong: parking_lot::Mutex<Vec<String>>,
}

/// xorshift64: the threads' timing is the larger chance anyway.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

fn open(path: impl AsRef<std::path::Path>) -> std::io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

fn tag(uuid: &str) -> String {
    format!("volfs:{uuid}")
}

impl Scene<'_> {
    fn reader(&self, seed: u64, most: usize) {
        let mut dice = Dice(seed);
        while !(self.over.load(SeqCst) || self.reads.fetch_add(1, SeqCst) >= most && self.eventful(most)) {
            let victim = &self.victims[dice.below(self.victims.len())];
            if let Err(words) = self.look(victim, dice.below(3)) {
                self.wrong.lock().push(words);
                self.over.store(true, SeqCst);
            }
        }
    }

    /// Whether enough has happened for the reads to mean something.
    fn eventful(&self, reads: usize) -> bool {
        self.opened.load(SeqCst) > reads / 50 && self.attached.load(SeqCst) > 8 && self.detached.load(SeqCst) > 8
    }

    fn incarnation(&self, victim: &Victim) -> Option<String> {
        self.volfs.read(format!("volumes/{}/incarnation", victim.uuid)).ok()
    }

    fn look(&self, victim: &Victim, way: usize) -> Result<(), String> {
        let detaching = victim.detaching.load(SeqCst);
        let before = self.incarnation(victim);
        let path = match way {
            0 => match self.volfs.read(format!("volumes/{}/device", victim.uuid)) {
                Ok(path) => PathBuf::from(path.trim_end()),
                Err(_) => return Ok(()),
            },
            1 => self.volfs.path(format!("volumes/{}/block", victim.uuid)),
            _ => self.volfs.path(format!("exports/{}", victim.uuid)),
        };
        let Ok(file) = open(&path) else { return Ok(()) };
        self.opened.fetch_add(1, SeqCst);
        let Ok(seq) = sys::disk_seq(file.as_fd()) else { return Err(format!("{} is no disk", path.display())) };
        let mut unbound = false;
        let found = match sys::loop_status(file.as_fd()) {
            Ok(info) if (info.lo_device, info.lo_inode) == victim.file && info.file_name() == tag(&victim.uuid) => None,
            Ok(info) => Some(format!("inode {} tag {:?}", info.lo_inode, info.file_name())),
            // No disk at all, so nothing is read or written by mistake. While the mapping stands its pin makes
            // that impossible; it may end (the adversary's clear was seen) between the kernel's GETATTR of the
            // node and its open of the device.
            Err(e) if self.pinned => {
                unbound = e.raw_os_error() == Some(libc::ENXIO);
                Some(e.to_string())
            }
            Err(_) => {
                self.empty.fetch_add(1, SeqCst);
                return Ok(());
            }
        };
        let after = self.incarnation(victim);
        let same = before.is_some() && before == after;
        let undisturbed = detaching.is_multiple_of(2) && victim.detaching.load(SeqCst) == detaching;
        if let Some(found) = found {
            if if way == 0 || unbound { same } else { undisturbed } {
                let inode = victim.file.1;
                return Err(format!("{} of {} (inode {inode}) opened {found}", path.display(), victim.uuid));
            }
            self.raced.fetch_add(1, SeqCst);
        }
        let told = before.as_deref().and_then(|b| b.split_whitespace().last()?.parse::<u64>().ok());
        if same && told != Some(seq) {
            return Err(format!("{}: incarnation {before:?} throughout, but diskseq {seq}", path.display()));
        }
        Ok(())
    }

    fn driver(&self, seed: u64) {
        let mut dice = Dice(seed);
        while !self.over.load(SeqCst) {
            let victim = &self.victims[dice.below(self.victims.len())];
            let control = format!("volumes/{}/control", victim.uuid);
            match self.volfs.value(format!("volumes/{}/status", victim.uuid)).as_str() {
                status if status == "lost" || (status == "attached" && dice.below(8) == 0) => {
                    victim.detaching.fetch_add(1, SeqCst);
                    let errno = self.volfs.write(&control, "detach");
                    victim.detaching.fetch_add(1, SeqCst);
                    self.detached.fetch_add(usize::from(errno == 0), SeqCst);
                }
                "detached" => {
                    let errno = self.volfs.write(&control, "attach timeout=1");
                    self.attached.fetch_add(usize::from(errno == 0), SeqCst);
                    if errno == libc::ETIMEDOUT {
                        // Lost in between: an attach waits for its device to come back (X1).
                        self.cancel(&victim.uuid);
                    }
                }
                "attached" => {}
                // Whatever the adversary has made of it: looked at again.
                _ => drop(self.volfs.write(&control, "reconcile")),
            }
            self.commands.fetch_add(1, SeqCst);
        }
    }

    fn cancel(&self, uuid: &str) {
        for entry in fs::read_dir(self.volfs.path("operations")).unwrap().flatten() {
            let id = entry.file_name().into_string().unwrap();
            let text = self.volfs.read(format!("operations/{id}")).unwrap_or_default();
            if text.contains("\"ended\":null") && text.contains(uuid) {
                // Ended meanwhile: ENOENT.
                let _ = self.volfs.write("control", &format!("cancel {id}"));
            }
        }
    }

    /// This test's own bound devices: name, whether it is junk.
    fn bound(&self) -> Vec<(String, bool)> {
        let junk = |name: &String| {
            let text = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).unwrap_or_default();
            let text = text.trim_end();
            (!text.is_empty()).then(|| self.junk.iter().any(|j| text == j.to_str().unwrap()))
        };
        self.volfs.loops().into_iter().filter_map(|name| junk(&name).map(|j| (name, j))).collect()
    }

    /// The device with what it has, if that is this test's; it stays so while the file is open.
    fn ours(&self, name: &str, junk: bool) -> Option<(File, LoopInfo64)> {
        let device = open(format!("/dev/{name}")).ok()?;
        let info = sys::loop_status(device.as_fd()).ok()?;
        let is =
            |path: &PathBuf| fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (info.lo_device, info.lo_inode));
        let own = if junk { self.junk.iter().any(is) } else { self.victims.iter().any(|v| is(&v.data)) };
        own.then_some((device, info))
    }

    fn any_tag(&self, dice: &mut Dice) -> String {
        match dice.below(4 * self.victims.len()) {
            n if n < self.victims.len() => tag(&self.victims[n].uuid),
            n => format!("junk-{n}"),
        }
    }

    fn bind_junk(&self, name: &str, dice: &mut Dice) -> bool {
        let backing = OpenOptions::new().read(true).write(true).open(&self.junk[dice.below(self.junk.len())]).unwrap();
        let mut info = LoopInfo64::zeroed();
        info.set_file_name(&self.any_tag(dice));
        // Bound to somebody's file: EBUSY, and theirs.
        let device = OpenOptions::new().read(true).write(true).open(format!("/dev/{name}"));
        device.is_ok_and(|device| sys::loop_configure(device.as_fd(), &backing, 512, info).is_ok())
    }

    fn adversary(&self, seed: u64) {
        let mut dice = Dice(seed);
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control").unwrap();
        while !self.over.load(SeqCst) {
            // The driver needs some peace to attach anything at all: as many of its commands, or as
            // many reads, however long these take.
            let (commands, reads) = (self.commands.load(SeqCst), self.reads.load(SeqCst));
            let (some, many) = (dice.below(5), dice.below(400));
            while self.commands.load(SeqCst) < commands + some
                && self.reads.load(SeqCst) < reads + many
                && !self.over.load(SeqCst)
            {
                std::thread::park_timeout(PACE);
            }
            let bound = self.bound();
            let (junk, real): (Vec<_>, Vec<_>) = bound.into_iter().partition(|b| b.1);
            if let Some((name, _)) = (!real.is_empty()).then(|| &real[dice.below(real.len())])
                && let Some((device, _)) = self.ours(name, false)
            {
                // With another opener it only asks for a clear at the last close.
                let _ = sys::loop_clear(device.as_fd());
                drop(device);
                if self.bind_junk(name, &mut dice) {
                    self.stolen.fetch_add(1, SeqCst);
                }
            }
            if junk.len() < 2
                && let Ok(free) = sys::loop_get_free(control.as_fd())
            {
                self.bind_junk(&format!("loop{free}"), &mut dice);
            }
            for (name, _) in junk {
                let Some((device, mut info)) = self.ours(&name, true) else { continue };
                if dice.below(3) == 0 {
                    info.set_file_name(&self.any_tag(&mut dice));
                    let _ = sys::loop_set_status(device.as_fd(), &info);
                } else {
                    let _ = sys::loop_clear(device.as_fd());
                }
            }
        }
        self.clear_junk();
    }

    fn clear_junk(&self) {
        for (name, junk) in self.bound() {
            if junk && let Some((device, _)) = self.ours(&name, true) {
                let _ = sys::loop_clear(device.as_fd());
            }
        }
    }
}

/// Plays the scene with these failpoints; answers what was wrong.
fn play(failpoints: &str, reads: usize, at_most: Duration) -> (Volfs, Vec<String>) {
    let volfs = Volfs::start_with(&[("VOLFS_FAILPOINTS", failpoints)], "");
    let uuids = volfs.job("j", &["a", "b", "c"], "1M");
    let victim = |uuid: String| {
        let data = volfs.state().join("loop/volumes").join(&uuid).join("data.img");
        let mut bytes = fs::read(&data).unwrap();
        bytes[..PATTERN.len()].copy_from_slice(PATTERN);
        fs::write(&data, bytes).unwrap();
        let meta = fs::metadata(&data).unwrap();
        Victim { uuid, data, file: (meta.dev(), meta.ino()), detaching: AtomicU64::new(0) }
    };
    let victims = uuids.into_iter().map(victim).collect();
    let junk = (0..3).map(|n| volfs.scratch(&format!("junk{n}"))).collect::<Vec<_>>();
    for path in &junk {
        fs::write(path, vec![b'J'; 1 << 20]).unwrap();
    }
    let scene = Scene {
        volfs: &volfs,
        victims,
        junk,
        pinned: failpoints.is_empty(),
        over: AtomicBool::new(false),
        reads: AtomicUsize::new(0),
        commands: AtomicUsize::new(0),
        opened: AtomicUsize::new(0),
        raced: AtomicUsize::new(0),
        empty: AtomicUsize::new(0),
        attached: AtomicUsize::new(0),
        detached: AtomicUsize::new(0),
        stolen: AtomicUsize::new(0),
        wrong: parking_lot::Mutex::new(Vec::new()),
    };
    let began = Instant::now();
    std::thread::scope(|threads| {
        let scene = &scene;
        threads.spawn(|| scene.adversary(0x1234_5678_9abc_def1));
        threads.spawn(|| scene.driver(0x0fed_cba9_8765_4321));
        let readers: Vec<_> = (1..=3).map(|n| threads.spawn(move || scene.reader(n * 0x9e37_79b9, reads))).collect();
        while readers.iter().any(|r| !r.is_finished()) && began.elapsed() < at_most {
            std::thread::park_timeout(PACE);
        }
        scene.over.store(true, SeqCst);
    });
    scene.clear_junk();
    let of = |n: &AtomicUsize| n.load(SeqCst);
    let counts = format!(
        "{} reads, {} opened, {} raced with a detach, {} were unbound, {} attached, {} detached, {} devices taken over, {:?}",
        of(&scene.reads),
        of(&scene.opened),
        of(&scene.raced),
        of(&scene.empty),
        of(&scene.attached),
        of(&scene.detached),
        of(&scene.stolen),
        began.elapsed()
    );
    println!("{counts}");
    let wrong = std::mem::take(&mut *scene.wrong.lock());
    if wrong.is_empty() && failpoints.is_empty() {
        assert!(of(&scene.reads) >= reads && scene.eventful(reads), "too slow: {counts}\n{}", volfs.log());
    }
    (volfs, wrong)
}

#[test]
fn adversary_no_open_of_device_or_block_is_another_disk() {
    let long = std::env::var("VOLFS_LONG").is_ok_and(|v| v == "1");
    let (reads, at_most) = if long { (1_000_000, PATIENCE * 120) } else { (20_000, PATIENCE * 10) };
    let (volfs, wrong) = play("", reads, at_most);
    assert_eq!(wrong, [] as [String; 0], "{}", volfs.log());
    // Once it is over, all ends well, and the data is what it was. What is lost is given up first.
    // The kernel unbinds the last junk at its last close, which may be another daemon's look: until
    // then `reconcile` is right to say that a conflict stands.
    volfs.until("settled end", || volfs.write("control", "reconcile") == 0);
    for disk in ["a", "b", "c"] {
        assert_eq!(volfs.write(format!("jobs/j/disks/{disk}/control"), "detach"), 0, "{}", volfs.log());
        assert_eq!(volfs.write(format!("jobs/j/disks/{disk}/control"), "attach"), 0, "{}", volfs.log());
        let head = volfs.ok(&format!("head -c {} $R/jobs/j/disks/{disk}/block", PATTERN.len()));
        assert_eq!(head.as_bytes(), PATTERN);
    }
    assert_eq!(volfs.write("jobs/j/control", "detach"), 0, "{}", volfs.log());
    assert_eq!(volfs.loops(), [] as [String; 0]);
}

#[test]
fn adversary_without_pin_and_check_the_oracle_sees_wrong_disks() {
    let (volfs, wrong) = play("devices.no-pin=fail;engine.no-check=fail", usize::MAX, PATIENCE);
    assert!(!wrong.is_empty(), "the oracle cannot see what it is for\n{}", volfs.log());
    println!("{wrong:?}");
}
