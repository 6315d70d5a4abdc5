//! Churn: 64 volumes, 200 shells of mixed commands, an adversary on the loop devices, and a daemon
//! that is killed every few seconds. In rounds: 200 shells with their scripts, one or two kills, an
//! end in peace, and the same oracle as after each random kill.
//!
//! Readers and shells check what only they can see: bytes read from `block` between two equal readings
//! of `incarnation` are that volume's own (S1), however the adversary has bound junk meanwhile.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use volfs::sys::{self, LoopInfo64};

use super::common::{PATIENCE, Volfs, finish};
use super::kill::bind;
use super::oracle;
use super::{Dice, count, figures, seed};

const JOBS: usize = 8;
const DISKS: usize = 8;
const SHELLS: usize = 200;
const COMMANDS: usize = 6;
/// Threads that read beside the shells.
const READERS: u64 = 2;
/// Junk that is bound at a time.
const JUNK: usize = 4;
/// Longest that a round's shells may take.
const ROUND: Duration = Duration::from_secs(120);

/// What a churn goes over.
pub struct Ground {
    /// Jobs `j0`, `j1` and so on.
    pub jobs: usize,
    /// The volumes, whose first bytes are their own ids.
    pub uuids: Vec<String>,
    pub shells: usize,
    /// Where shells write of what must not be.
    pub wrong: PathBuf,
}

/// What has happened.
#[derive(Default)]
pub struct Sums {
    pub rounds: usize,
    pub kills: usize,
    pub done: usize,
    pub refused: usize,
    pub right: usize,
    pub slowest: Duration,
}

impl Ground {
    /// So many jobs with so many disks.
    pub fn lay(volfs: &Volfs, jobs: usize, disks: usize, size: &str, shells: usize) -> Ground {
        let names: Vec<String> = (0..disks).map(|d| format!("d{d}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let uuids = (0..jobs).flat_map(|job| volfs.job(&format!("j{job}"), &names, size)).collect();
        Ground { jobs, uuids, shells, wrong: volfs.scratch("wrong") }
    }

    /// Writes each volume's id into its first bytes, in the files that hold them.
    pub fn mark(&self, data: impl Fn(&String) -> PathBuf) -> Vec<PathBuf> {
        let files: Vec<PathBuf> = self.uuids.iter().map(data).collect();
        for (uuid, file) in self.uuids.iter().zip(&files) {
            OpenOptions::new().write(true).open(file).unwrap().write_all_at(uuid.as_bytes(), 0).unwrap();
        }
        files
    }

    /// No shell has read another disk's bytes, and every volume still has its own.
    pub fn bytes(&self, volfs: &Volfs, files: &[PathBuf], at: &str) {
        let found = fs::read_to_string(&self.wrong).unwrap_or_default();
        assert!(found.is_empty(), "{at}: bytes of another disk:\n{found}\n{}", volfs.log());
        for (uuid, file) in self.uuids.iter().zip(files) {
            let mut head = [0; 36];
            File::open(file).unwrap().read_exact_at(&mut head, 0).unwrap();
            assert_eq!(head, uuid.as_bytes(), "{at}: the first bytes of {uuid}");
        }
    }

    /// Shells with their scripts, and a SIGKILL at one or two moments. `strike` is what else goes on,
    /// every few milliseconds until then.
    pub fn round(
        &self,
        volfs: &mut Volfs,
        dice: &mut Dice,
        sums: &mut Sums,
        mut strike: impl FnMut(&Volfs, &mut Dice),
    ) {
        sums.rounds += 1;
        let scripts: Vec<String> = (0..self.shells).map(|_| self.script(dice)).collect();
        // Behind the adversary and the readers, who would wait for two hundred others otherwise.
        let shell = &["nice", "-n", "15", "dash"];
        let shells: Vec<_> = scripts.iter().map(|text| volfs.sh_spawn(shell, text)).collect();
        let moments: Vec<Duration> =
            (0..1 + dice.below(2)).map(|_| dice.spread(Duration::from_secs(1), Duration::from_secs(6))).collect();
        let tempers = dice.throw();
        let (began, root, over, right) = (Instant::now(), volfs.root(), AtomicBool::new(false), AtomicUsize::new(0));
        let said = std::thread::scope(|threads| {
            let _over = Over(&over);
            for n in 0..READERS {
                let (root, over, right) = (&root, &over, &right);
                threads.spawn(move || {
                    let mut dice = Dice::new(tempers ^ n);
                    while !over.load(SeqCst) {
                        right.fetch_add(usize::from(self.look(root, dice.one::<String>(&self.uuids))), SeqCst);
                        // The shells are to have some of the machine, too.
                        std::thread::park_timeout(Duration::from_millis(1));
                    }
                });
            }
            let ended = threads.spawn(|| shells.into_iter().map(finish).collect::<Vec<_>>());
            for moment in moments {
                let from = Instant::now();
                let mut dice = Dice::new(tempers ^ sums.kills as u64);
                while from.elapsed() < moment && !ended.is_finished() {
                    strike(volfs, &mut dice);
                    std::thread::park_timeout(Duration::from_millis(40));
                }
                volfs.kill();
                sums.kills += 1;
                volfs.launch();
            }
            while !ended.is_finished() {
                assert!(began.elapsed() < ROUND, "round {}: shells hang\n{}", sums.rounds, volfs.log());
                std::thread::park_timeout(Duration::from_millis(5));
            }
            ended.join().unwrap()
        });
        sums.right += right.load(SeqCst);
        for said in said {
            sums.done += said.out.lines().filter(|l| *l == "s 0").count();
            sums.refused += said.out.lines().filter(|l| l.starts_with("s ") && *l != "s 0").count();
            sums.right += said.out.lines().filter(|l| *l == "right").count();
        }
    }

    /// Opens `block`, between two readings of `incarnation`, and reads what is there: whether that was the
    /// volume's own (S1).
    fn look(&self, root: &Path, uuid: &str) -> bool {
        let volume = root.join("volumes").join(uuid);
        let incarnation = || fs::read_to_string(volume.join("incarnation")).ok();
        let Some(before) = incarnation() else { return false };
        let open = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(volume.join("block"));
        let mut head = [0; 36];
        if open.and_then(|block| block.read_exact_at(&mut head, 0)).is_err() || incarnation().as_ref() != Some(&before)
        {
            return false;
        }
        if head != uuid.as_bytes() {
            let mut wrong = OpenOptions::new().create(true).append(true).open(&self.wrong).unwrap();
            writeln!(wrong, "{uuid} {}: {:?}", before.trim_end(), String::from_utf8_lossy(&head)).unwrap();
        }
        head == uuid.as_bytes()
    }

    /// Whether another round is to come: a busy machine gets more time, until enough has happened to
    /// mean something.
    pub fn more(&self, sums: &Sums, began: Instant, time: Duration) -> bool {
        began.elapsed() < time || (self.little(sums) && began.elapsed() < 4 * time)
    }

    /// Whether too little has happened.
    pub fn little(&self, sums: &Sums) -> bool {
        sums.done <= self.shells || sums.right == 0
    }

    /// One shell's commands. An error is an answer here, and so is a tree that is away for a moment.
    fn script(&self, dice: &mut Dice) -> String {
        script(dice, &self.uuids, self.jobs, self.wrong.to_str().unwrap())
    }
}

/// Tells readers that it is over, also when a round fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

impl Sums {
    /// In words.
    pub fn words(&self, ground: &Ground) -> String {
        format!(
            "{} volumes, {} rounds of {} shells, {} kills, {} commands done, {} refused or cut off, {} reads right, at \
             peace within {:?}",
            ground.uuids.len(),
            self.rounds,
            ground.shells,
            self.kills,
            self.done,
            self.refused,
            self.right,
            self.slowest
        )
    }
}

fn script(dice: &mut Dice, uuids: &[String], jobs: usize, wrong: &str) -> String {
    let mut text = String::from(
        // While the tree is away for a moment no command is wasted on it.
        "exec 2> /dev/null\n\
         here() { n=0; until [ -e \"$R/version\" ] || [ $n -ge 100 ]; do n=$((n + 1)); sleep 0.1; done; }\n",
    );
    for _ in 0..COMMANDS {
        let uuid = dice.one(uuids);
        let (job, other) = (dice.below(jobs), dice.below(jobs));
        let v = format!("$R/volumes/{uuid}");
        let line = match dice.below(28) {
            0 => format!("echo attach timeout=3 > $R/jobs/j{job}/control"),
            1 => format!("echo detach timeout=3 > $R/jobs/j{job}/control"),
            // What the adversary has unbound is given up first: an attach would wait for it to come back.
            2..=8 => format!(
                "case $(cat {v}/status) in lost) echo detach timeout=3 > {v}/control;; \
                 detached) echo attach timeout=3 > {v}/control;; *) false;; esac"
            ),
            9..=12 => format!("echo detach timeout=3 > {v}/control"),
            13 => format!("echo move j{other} > {v}/control"),
            14 => format!("echo disk n{} > {v}/control", dice.below(1000)),
            15 => format!("echo resize {}M timeout=3 > {v}/control", 1 + dice.below(3)),
            16 => format!("echo reconcile timeout=3 > {v}/control"),
            17 => format!("echo vm{} > $R/jobs/j{job}/vm_name", dice.below(100)),
            18 => format!("echo attach nowait > {v}/control"),
            19 => "cat $R/table $R/problems $R/health > /dev/null".into(),
            _ => format!(
                "a=$(cat {v}/incarnation) && h=$(head -c 36 {v}/block) && b=$(cat {v}/incarnation) && \
                 [ \"$a\" = \"$b\" ] && [ -n \"$h\" ] && {{ [ \"$h\" = {uuid} ] && echo right || \
                 echo \"{uuid} $a: $h\" >> {wrong}; }}"
            ),
        };
        writeln!(text, "here; {line}; echo \"s $?\"").unwrap();
    }
    text
}

/// Binds junk, takes devices over, and forges tags: only of this test's own files.
struct Adversary<'a> {
    data: &'a [PathBuf],
    junk: &'a [PathBuf],
    tags: &'a [String],
}

impl Adversary<'_> {
    /// The device, held open so that it keeps its file, if that is one of these.
    fn ours(&self, name: &str, of: &[PathBuf]) -> Option<(File, LoopInfo64)> {
        let device = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(format!("/dev/{name}")).ok()?;
        let info = sys::loop_status(device.as_fd()).ok()?;
        let is = |p: &PathBuf| fs::metadata(p).is_ok_and(|m| (m.dev(), m.ino()) == (info.lo_device, info.lo_inode));
        of.iter().any(is).then_some((device, info))
    }

    fn strike(&self, volfs: &Volfs, dice: &mut Dice) {
        let all = volfs.loops();
        let Some(name) = (!all.is_empty()).then(|| dice.one(&all).clone()) else { return };
        if let Some((device, mut info)) = self.ours(&name, self.junk) {
            if dice.below(2) == 0 {
                info.set_file_name(dice.one::<String>(self.tags));
                let _ = sys::loop_set_status(device.as_fd(), &info);
            } else {
                let _ = sys::loop_clear(device.as_fd());
            }
        } else if let Some((device, _)) = self.ours(&name, self.data) {
            // With another opener it only asks for a clear at the last close.
            let _ = sys::loop_clear(device.as_fd());
            drop(device);
            self.take(&name, dice);
        }
        let junk = |name: &String| {
            let file = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).unwrap_or_default();
            self.junk.iter().any(|path| file.trim_end() == path.to_str().unwrap())
        };
        if volfs.loops().iter().filter(|name| junk(name)).count() < JUNK {
            bind(dice.one(self.junk), dice.one::<String>(self.tags));
        }
    }

    /// Binds junk where a volume has just been, often under its name.
    fn take(&self, name: &str, dice: &mut Dice) {
        let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
        let (Ok(device), backing) =
            (open(Path::new(&format!("/dev/{name}"))), open(dice.one::<PathBuf>(self.junk)).unwrap())
        else {
            return;
        };
        let mut info = LoopInfo64::zeroed();
        info.set_file_name(dice.one::<String>(self.tags));
        // Bound to somebody's file: EBUSY, and theirs.
        let _ = sys::loop_configure(device.as_fd(), &backing, 512, info);
    }

    fn leave(&self, volfs: &Volfs) {
        for name in volfs.loops() {
            if let Some((device, _)) = self.ours(&name, self.junk) {
                let _ = sys::loop_clear(device.as_fd());
            }
        }
    }
}

/// Ends what waits for a device that the adversary has taken, gives up what is lost, looks again at
/// the rest, until all agree.
pub fn peace(volfs: &Volfs) {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        let mut open = 0;
        for entry in fs::read_dir(volfs.path("operations")).unwrap().flatten() {
            let id = entry.file_name().into_string().unwrap();
            if volfs.read(format!("operations/{id}")).is_ok_and(|text| text.contains("\"ended\":null")) {
                open += 1;
                let _ = volfs.write("control", &format!("cancel {id} timeout=5"));
            }
        }
        let _ = volfs.write("control", "reconcile timeout=5");
        let table = volfs.read("table").unwrap_or_default();
        for row in table.lines().skip(1).map(|l| l.split('\t').collect::<Vec<_>>()) {
            let verb = match row[4] {
                "lost" => "detach",
                "conflict" | "unknown" => "reconcile",
                _ => continue,
            };
            open += 1;
            let _ = volfs.write(format!("volumes/{}/control", row[2]), &format!("{verb} timeout=5"));
        }
        if open == 0 {
            break;
        }
    }
}

#[test]
fn churn_of_shells_kills_and_an_adversary_ends_consistent() {
    let (seconds, seed) = (count("VOLFS_CHURN_SECONDS", 30, 3600), seed());
    println!("seed {seed}");
    let mut dice = Dice::new(seed);
    let mut volfs = Volfs::start_with(&[], "reconcile_interval = 1\n");
    let ground = Ground::lay(&volfs, JOBS, DISKS, "1M", SHELLS);
    let volumes = volfs.state().join("loop/volumes");
    let data = ground.mark(|uuid| volumes.join(uuid).join("data.img"));
    let junk: Vec<PathBuf> = (0..3).map(|n| volfs.scratch(&format!("junk{n}"))).collect();
    for path in &junk {
        fs::write(path, vec![b'J'; 1 << 20]).unwrap();
    }
    let mut tags: Vec<String> = ground.uuids.iter().map(|u| format!("volfs:{u}")).collect();
    tags.extend((0..tags.len()).map(|n| format!("junk-{n}")));
    let adversary = Adversary { data: &data, junk: &junk, tags: &tags };
    let (mut sums, mut strikes) = (Sums::default(), 0);
    let began = Instant::now();
    while ground.more(&sums, began, Duration::from_secs(seconds as u64)) {
        ground.round(&mut volfs, &mut dice, &mut sums, |volfs, dice| {
            adversary.strike(volfs, dice);
            strikes += 1;
        });
        let at = format!("round {}, seed {seed}", sums.rounds);
        adversary.leave(&volfs);
        ground.bytes(&volfs, &data, &at);
        let ended = Instant::now();
        peace(&volfs);
        let (view, _) = oracle::settled_but(&volfs, PATIENCE, &at, true);
        sums.slowest = sums.slowest.max(ended.elapsed());
        let have: BTreeSet<&String> = view.owned.keys().collect();
        assert_eq!(have, ground.uuids.iter().collect(), "{at}: volumes of the record");
    }
    let words = format!("{}, {strikes} strikes", sums.words(&ground));
    figures("churn", seed, began.elapsed(), &words);
    assert!(!ground.little(&sums), "too little happened: {words}");
}
