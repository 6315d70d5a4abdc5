//! The promise: shells that wait, read and follow events, and the daemon killed twenty times.

use std::collections::BTreeMap;
use std::fs;
use std::process::Child;
use std::time::{Duration, Instant};

use crate::common::{Volfs, finish};
use crate::{kept, next_after};

/// Random numbers of one seed (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % most
    }
}

fn seed() -> u64 {
    let given = std::env::var("VOLFS_SEED").ok().and_then(|s| s.parse().ok());
    given.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64 | 1
    })
}

/// Events as `cat` has written them: numbers without gap or repeat, and the ends by command.
fn events(text: &str) -> BTreeMap<String, usize> {
    let mut ends = BTreeMap::new();
    let mut last = None;
    for line in text.lines() {
        let event: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line:?}"));
        let seq = event["seq"].as_u64().unwrap_or_else(|| panic!("no number, or events were lost: {line}"));
        assert!(last.is_none_or(|last| seq == last + 1), "{seq} after {last:?}");
        last = Some(seq);
        if event["event"] == "end" && event["outcome"] == "done" {
            let key = format!("{} {}", event["command"].as_str().unwrap(), event["disk"].as_str().unwrap_or("-"));
            *ends.entry(key).or_default() += 1;
        }
    }
    ends
}

/// Twenty kills, each of a daemon that serves, after a random time of up to `most`.
fn kill_twenty_times(volfs: &Volfs, random: &mut Random, most: Duration) {
    for _ in 0..20 {
        let after = Duration::from_micros(random.below(most.as_micros() as u64));
        // The pause is the random moment itself, not a wait for something.
        std::thread::sleep(after);
        next_after(volfs, volfs.kill_kept());
    }
}

/// Shells that read what must never be wrong, until a file says stop.
fn readers(volfs: &Volfs, count: usize, no_resend: bool) -> Vec<Child> {
    // Where nothing is sent again, a read that was in a handler is EIO; a wrong value is never right.
    let error = if no_resend { "continue" } else { "exit 9" };
    let script = format!(
        "n=0; while [ -e config.toml ] && [ ! -e stop ]; do
            s=$(cat $R/jobs/a/disks/fixed/device) || {error}
            [ \"$s\" = \"$DEVICE\" ] || {{ echo \"device is $s\"; exit 8; }}
            s=$(cat $R/jobs/a/disks/d$1/status) || {error}
            case $s in attached|detached|attaching|detaching|unknown) ;; *) echo \"status is $s\"; exit 7;; esac
            n=$((n+1))
        done; echo $n"
    );
    let device = volfs.value("jobs/a/disks/fixed/device");
    (0..count)
        .map(|n| {
            let script = format!("DEVICE={device}; set -- {}; {script}", n % 10);
            volfs.sh_spawn(&[["bash", "dash"][n % 2]], &script)
        })
        .collect()
}

fn storm(no_resend: bool) {
    let hold = "wait:HOLD".to_owned();
    let mut volfs = kept(&[], no_resend);
    let held = volfs.scratch("hold");
    let points = ["attach.before-call", "detach.before-call"];
    let mut all: Vec<String> =
        points.iter().map(|point| format!("{point}={}", hold.replace("HOLD", held.to_str().unwrap()))).collect();
    if no_resend {
        all.push("keep.no-resend=fail".into());
    }
    volfs.set_env(&[("VOLFS_FAILPOINTS", &all.join(";"))]);
    volfs.launch();
    let disks: Vec<String> = (0..100).map(|n| format!("d{n}")).chain(["fixed".into()]).collect();
    volfs.job("a", &disks.iter().map(String::as_str).collect::<Vec<_>>(), "1M");
    for disk in disks[50..].iter() {
        assert_eq!(volfs.write(format!("jobs/a/disks/{disk}/control"), "attach"), 0);
    }
    let follower = volfs.sh_spawn(&["dash"], "exec cat $R/events/all > events");
    let follows = || {
        fs::read_dir(format!("/proc/{}/fd", follower.id())).is_ok_and(|fds| {
            fds.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.ends_with("events/all")))
        })
    };
    volfs.until("a follower", follows);
    fs::write(&held, "").unwrap();
    let parked: Vec<Child> = (0..100)
        .map(|n| {
            let verb = if n < 50 { "attach" } else { "detach" };
            let shell: &[&str] = [&["bash"] as &[&str], &["dash"], &["busybox", "sh"]][n % 3];
            volfs.sh_spawn(shell, &format!("set -e; echo {verb} > $R/jobs/a/disks/d{n}/control"))
        })
        .collect();
    let readers = readers(&volfs, 50, no_resend);
    let running =
        || volfs.read("jobs/a/status").is_ok_and(|s| s.contains("attaching=50") && s.contains("detaching=50"));
    volfs.until("a hundred that wait", running);
    let seed = seed();
    println!("seed {seed}");
    kill_twenty_times(&volfs, &mut Random(seed), Duration::from_millis(400));
    fs::remove_file(&held).unwrap();
    for (n, shell) in parked.into_iter().enumerate() {
        let said = finish(shell);
        assert_eq!((said.status, said.err.as_str()), (0, ""), "shell {n}, seed {seed}: {said:?}\n{}", volfs.log());
    }
    fs::write(volfs.scratch("stop"), "").unwrap();
    let mut reads = 0;
    for reader in readers {
        let said = finish(reader);
        assert_eq!(said.status, 0, "seed {seed}: {said:?}");
        reads += said.out.trim().parse::<usize>().unwrap();
    }
    assert!(reads > 50, "{reads} rounds of 50 readers");
    for n in 0..100 {
        let status = if n < 50 { "attached" } else { "detached" };
        assert_eq!(volfs.value(format!("jobs/a/disks/d{n}/status")), status, "disk d{n}");
    }
    assert_eq!(volfs.loops().len(), 51, "what is attached, once each");
    // One effect for each command that was waited for, and the stream told it once.
    let ended = |text: &str| {
        events(text)
            .iter()
            .filter(|(key, _)| key.starts_with("attach d") || key.starts_with("detach d"))
            .map(|(_, n)| *n)
            .collect::<Vec<_>>()
    };
    if no_resend {
        // A read that waits for an event is EIO there; a reader opens the stream again.
        assert_ne!(finish(follower).status, 0);
        println!("20 kills, 100 parked commands, {reads} rounds of reading, resending off");
        return;
    }
    volfs.until("the last event", || {
        ended(&fs::read_to_string(volfs.scratch("events")).unwrap_or_default()).len() == 100
    });
    let all = ended(&fs::read_to_string(volfs.scratch("events")).unwrap());
    assert!(all.iter().all(|n| *n == 1), "{all:?}");
    let mut follower = follower;
    follower.kill().unwrap();
    follower.wait().unwrap();
    println!("20 kills, 100 parked commands, {reads} rounds of reading, resending on");
}

#[test]
fn killed_twenty_times_no_waiting_shell_sees_an_error_and_no_reader_a_wrong_value() {
    storm(false);
}

#[test]
fn the_same_where_the_kernel_sends_nothing_again() {
    storm(true);
}

/// Shells that never pause, so that a kill finds every moment of an operation.
fn work(no_resend: bool) {
    const ROUNDS: usize = 6;
    let mut volfs = kept(&[], no_resend);
    volfs.launch();
    let disks: Vec<String> = (0..8).map(|n| format!("d{n}")).collect();
    volfs.job("a", &disks.iter().map(String::as_str).collect::<Vec<_>>(), "1M");
    let follower = volfs.sh_spawn(&["dash"], "exec cat $R/events/all > events");
    // A request that had no operation yet is EIO where it is not sent again, and then nothing was done.
    let give = if no_resend { "until echo $1 2>/dev/null > $C; do :; done 2>/dev/null" } else { "echo $1 > $C" };
    let workers: Vec<Child> = (0..8)
        .map(|n| {
            let script = format!(
                "set -e; C=$R/jobs/a/disks/d{n}/control; i=0
                give() {{ {give}; }}
                while [ $i -lt {ROUNDS} ]; do give attach; give detach; i=$((i+1)); done"
            );
            volfs.sh_spawn(&[["bash", "dash"][n % 2]], &script)
        })
        .collect();
    let seed = seed();
    println!("seed {seed}");
    let mut random = Random(seed);
    let began = Instant::now();
    let mut kills = 0;
    let busy = |workers: &[Child]| {
        workers.iter().any(|w| fs::read_to_string(format!("/proc/{}/stat", w.id())).is_ok_and(|s| !s.contains(") Z ")))
    };
    while busy(&workers) {
        assert!(began.elapsed() < Duration::from_secs(120), "they do not end\n{}", volfs.log());
        // Every eighth daemon lives long enough for the keeper to count anew.
        let least = if kills % 8 == 7 { 1_100_000 } else { 0 };
        std::thread::sleep(Duration::from_micros(least + random.below(400_000)));
        next_after(&volfs, volfs.kill_kept());
        kills += 1;
    }
    for (n, worker) in workers.into_iter().enumerate() {
        let said = finish(worker);
        assert_eq!(
            (said.status, said.err.as_str()),
            (0, ""),
            "worker {n}, seed {seed}: {}\n{}",
            volfs.value(format!("jobs/a/disks/d{n}/error")),
            volfs.log()
        );
    }
    assert!(volfs.loops().is_empty(), "{:?}", volfs.loops());
    for disk in &disks {
        for verb in ["attach", "detach"] {
            let all = crate::outcomes(&volfs, verb, disk);
            let done = all.iter().filter(|o| *o == "done").count();
            let rest: Vec<_> = all.iter().filter(|o| *o != "done" && *o != "interrupted").collect();
            assert_eq!((done, rest.len()), (ROUNDS, 0), "{disk} {verb}, seed {seed}: {all:?}\n{}", volfs.log());
        }
    }
    let text = fs::read_to_string(volfs.scratch("events")).unwrap();
    // Also where its reader was cut off: what it had was in order.
    events(&text[..text.rfind('\n').map_or(0, |at| at + 1)]);
    let mut follower = follower;
    follower.kill().unwrap();
    follower.wait().unwrap();
    println!("{kills} kills, {} commands, resending {}", 8 * 2 * ROUNDS, if no_resend { "off" } else { "on" });
}

#[test]
fn killed_at_any_moment_of_an_operation_each_command_has_one_effect_and_its_true_outcome() {
    work(false);
}

#[test]
fn at_any_moment_also_where_the_kernel_sends_nothing_again() {
    work(true);
}
