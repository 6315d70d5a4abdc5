//! What waiting for a cloud costs: `cargo bench --bench cloudstack`, as root, a few minutes.
//!
//! Over the fake cloud, whose volumes become loop devices here, through the real mount. Three
//! numbers of one run: how long after the cloud's success (and the device) a caller has it, beside a
//! client that asks every two seconds; sixteen volumes by one command, beside the cloud's own serial
//! time; requests of an idle daemon. Exits with 1 when a goal is missed.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use fakecloud::{FakeCloud, Options};

#[path = "../tests/tree/common.rs"]
mod common;
#[path = "../tests/cloud/site.rs"]
mod site;

use site::Site;

/// How long the cloud works on each job: about the shortest that is seen on an idle KVM cloud.
const JOB: Duration = Duration::from_secs(3);
/// What clients do that know no better.
const FIXED_POLL: Duration = Duration::from_secs(2);
const ATTACHES: usize = 15;
const AT_ONCE: usize = 16;
/// Shorter jobs for the sixteen, or the bench would take a minute more.
const SHORT_JOB: Duration = Duration::from_millis(500);
const IDLE_VOLUMES: usize = 20;
const INTERVALS: u32 = 6;

fn main() -> ExitCode {
    let mut met = true;
    let mut say = |what: &str, value: String, goal: Option<(f64, f64)>| {
        let verdict = match goal {
            Some((value, most)) if value > most => {
                met = false;
                format!("  MISSED: at most {most}")
            }
            Some((_, most)) => format!("  (at most {most})"),
            None => String::new(),
        };
        println!("{what:64} {value:>10}{verdict}");
    };
    reaction(&mut say);
    sixteen(&mut say);
    idle(&mut say);
    if met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

type Say<'a> = &'a mut dyn FnMut(&str, String, Option<(f64, f64)>);

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn open_jobs(cloud: &FakeCloud) -> usize {
    cloud.jobs().iter().filter(|job| !job.done()).count()
}

/// The moment at which the next job of this kind is final, from a thread that waits for it.
fn final_moment(cloud: &FakeCloud, command: &'static str) -> std::thread::JoinHandle<Instant> {
    let cloud = cloud.clone();
    let count =
        move |cloud: &FakeCloud| cloud.jobs().iter().filter(|j| j.command.contains(command) && j.done()).count();
    let before = count(&cloud);
    std::thread::spawn(move || {
        assert!(cloud.wait_for(JOB * 20, |cloud| count(cloud) > before), "no {command} ended");
        Instant::now()
    })
}

fn reaction(say: Say<'_>) {
    let site = Site::start();
    site.job("j", &["d"], "1G");
    let (mut ours, mut whole) = (Vec::new(), Vec::new());
    for n in 0..ATTACHES {
        // The job's length is no multiple of anybody's interval.
        site.cloud.set_delay("attachVolume", JOB + Duration::from_millis(137) * n as u32);
        let end = final_moment(&site.cloud, "ttachVolume");
        let began = Instant::now();
        assert_eq!(site.disk("j", "d", "attach"), 0, "{}", site.volfs.log());
        whole.push(began.elapsed());
        let back = Instant::now();
        ours.push(back.saturating_duration_since(end.join().unwrap()));
        assert_eq!(site.disk("j", "d", "detach"), 0, "{}", site.volfs.log());
    }
    // The same jobs, seen by a client that asks every two seconds from the submit on.
    let fixed: Vec<Duration> = (0..ATTACHES)
        .map(|n| {
            let job = JOB + Duration::from_millis(137) * n as u32;
            let polls = job.as_secs_f64() / FIXED_POLL.as_secs_f64();
            Duration::from_secs_f64(polls.ceil() * FIXED_POLL.as_secs_f64()) - job
        })
        .collect();
    let mean = |all: &[Duration]| all.iter().sum::<Duration>() / all.len() as u32;
    say(
        "from the job's success to `attach` returning, median, ms",
        format!("{:.1}", ms(median(ours.clone()))),
        Some((ms(median(ours.clone())), 50.0)),
    );
    say("the same, mean, ms", format!("{:.1}", ms(mean(&ours))), None);
    say("the same with a fixed poll of 2 s, by arithmetic, mean, ms", format!("{:.0}", ms(mean(&fixed))), None);
    say("`attach` in all, with a job of 3 to 5 s, median, ms", format!("{:.0}", ms(median(whole))), None);
}

fn sixteen(say: Say<'_>) {
    let site = Site::start();
    let names: Vec<String> = (0..AT_ONCE).map(|n| format!("d{n}")).collect();
    let disks: Vec<&str> = names.iter().map(String::as_str).collect();
    site.job("j", &disks, "1G");
    // The cloud's own serial time: the same number of jobs, one at a time, by itself.
    site.cloud.set_delay("attachVolume", SHORT_JOB);
    let began = Instant::now();
    assert_eq!(site.volfs.write("jobs/j/control", "attach"), 0, "{}", site.volfs.log());
    let took = began.elapsed();
    let attached =
        site.cloud.log().iter().filter(|d| d.effect == fakecloud::Effect::Attached).map(|d| d.at).collect::<Vec<_>>();
    // Between the first and the last effect lie fifteen jobs; the first one's own time is added.
    let serial =
        attached[attached.len() - 1].duration_since(attached[0]).mul_f64(AT_ONCE as f64 / (AT_ONCE - 1) as f64);
    let ratio = took.as_secs_f64() / serial.as_secs_f64();
    say("16 volumes by one `attach` ÷ the cloud's serial time", format!("{ratio:.2}"), Some((ratio, 1.2)));
    let books = SHORT_JOB * AT_ONCE as u32;
    say("the same ÷ 16 jobs of 0.5 s, by arithmetic", format!("{:.2}", took.as_secs_f64() / books.as_secs_f64()), None);
    assert_eq!(open_jobs(&site.cloud), 0);
}

fn idle(say: Say<'_>) {
    let site = Site::with(Options::with_loops(), &[]);
    let names: Vec<String> = (0..IDLE_VOLUMES).map(|n| format!("d{n}")).collect();
    let disks: Vec<&str> = names.iter().map(String::as_str).collect();
    site.job("j", &disks, "1G");
    assert_eq!(site.volfs.write("jobs/j/control", "attach"), 0, "{}", site.volfs.log());
    // Whole intervals, begun after what the attach itself asks for.
    let rounds = |site: &Site| {
        let metrics = site.volfs.read("metrics").unwrap();
        let line = metrics.lines().find(|l| l.starts_with("volfs_reconcile")).unwrap_or_default().to_owned();
        line.rsplit(' ').next().unwrap_or_default().parse::<f64>().unwrap_or(0.0)
    };
    let wait = |past: f64| site.volfs.until("a round", || rounds(&site) > past);
    wait(rounds(&site));
    site.cloud.clear_log();
    let first = rounds(&site);
    for n in 0..INTERVALS {
        wait(first + f64::from(n));
    }
    let per = site.cloud.all_calls() as f64 / (rounds(&site) - first);
    say("idle, 20 volumes on this VM: requests an interval", format!("{per:.2}"), Some((per, 2.0)));
}
