//! Churn over a cloud: the same shells and kills, and a cloud that drops, delays, refuses and restarts
//! at random. The oracle is the cloud's own book and the kernel.

use std::time::{Duration, Instant};

use fakecloud::{FakeCloud, Fault, Kind, Moment, Options};

use super::churn::{Ground, Sums, peace};
use super::common::PATIENCE;
use super::site::{MARK, Site};
use super::{Dice, count, figures, seed};

const CALLS: [&str; 8] = [
    "*",
    "listVolumes",
    "attachVolume",
    "detachVolume",
    "resizeVolume",
    "createTags",
    "deleteTags",
    "queryAsyncJobResult",
];

/// One fault of the next call of some kind.
fn fault(dice: &mut Dice) -> Fault {
    let moments = [Moment::Queued, Moment::Working, Moment::Done, Moment::Recorded, Moment::Closing];
    let moment = *dice.one(&moments);
    let late = Duration::from_millis(50 + dice.below(1500) as u64);
    let error = |code, cs, text: &str| Kind::Error { code, cs, text: text.into() };
    let kind = match dice.below(16) {
        0 => Kind::DropBefore,
        1 => Kind::DropAfter,
        2 | 3 => Kind::DelayBefore(late),
        4 | 5 => Kind::DelayAfter(late),
        6 => Kind::Html { status: 502, acted: dice.below(2) == 0 },
        7 => Kind::Maintenance,
        8 => Kind::Truncated,
        9 => Kind::Garbage,
        10 => Kind::Unauthorized,
        11 => Kind::RateLimited(50),
        12 => error(530, 4250, "this is not to be"),
        13 => Kind::JobLost,
        14 => Kind::ServerRestart(moment),
        // Before anything is done: a job that fails half-way leaves what only an administrator can mend.
        _ => Kind::JobFails { at: Moment::Queued, code: 530, text: "the hypervisor does not like it".into() },
    };
    Fault::new(dice.one::<&str>(&CALLS), kind)
}

/// Statuses that are not what the cloud's book and the kernel say.
fn contradictions(site: &Site, ground: &Ground) -> Vec<String> {
    let of = |uuid: &String| {
        let shown = site.volfs.read(format!("volumes/{uuid}/status")).unwrap_or_default();
        let mark = site.cloud.volume(uuid).and_then(|v| v.tags.get(MARK).cloned()).unwrap_or_default();
        let truth = site.truth(uuid, &mark);
        (mark.is_empty() || shown.trim_end() != truth).then(|| format!("{uuid}: {shown:?}, {truth}, mark {mark:?}"))
    };
    ground.uuids.iter().filter_map(of).collect()
}

fn strike(cloud: &FakeCloud, dice: &mut Dice, faults: &mut usize) {
    if dice.below(4) == 0 {
        cloud.fault(fault(dice));
        *faults += 1;
    }
}

#[test]
fn churn_of_shells_kills_and_a_cloud_that_fails_ends_consistent() {
    let (seconds, seed) = (count("VOLFS_CHURN_SECONDS", 15, 3600), seed());
    println!("seed {seed}");
    let mut dice = Dice::new(seed);
    let mut options = Options { job_delay: Duration::from_millis(5), ..Options::default() };
    options.host.most_disks = 100;
    let mut site = Site::prepare(options.loops(), &[], "timeout = 4\nmost_disks = 100\n");
    site.volfs.launch();
    let ground = Ground::lay(&site.volfs, 4, 4, "1G", 60);
    // A volume's bytes are there from its first attach.
    for job in 0..ground.jobs {
        site.volfs.bring(format!("jobs/j{job}/control"), "attach");
    }
    let (cloud, files) = (site.cloud.clone(), ground.mark(|uuid| site.cloud.file(uuid)));
    let (mut sums, mut faults) = (Sums::default(), 0);
    let began = Instant::now();
    while ground.more(&sums, began, Duration::from_secs(seconds as u64)) {
        ground.round(&mut site.volfs, &mut dice, &mut sums, |_, dice| strike(&cloud, dice, &mut faults));
        let at = format!("round {}, seed {seed}", sums.rounds);
        cloud.clear_faults();
        ground.bytes(&site.volfs, &files, &at);
        let ended = Instant::now();
        // A late answer may come after a look: what disagrees is looked at again.
        let mut wrong = Vec::new();
        while ended.elapsed() < 2 * PATIENCE {
            peace(&site.volfs);
            wrong = contradictions(&site, &ground);
            if wrong.is_empty() {
                break;
            }
        }
        assert!(wrong.is_empty(), "{at}: {wrong:#?}\n{}", site.volfs.log());
        assert_eq!(site.orphans(), [""; 0], "{at}: made, there, and not shown");
        sums.slowest = sums.slowest.max(ended.elapsed());
    }
    let words = format!("{}, {faults} faults", sums.words(&ground));
    figures("churn over a cloud", seed, began.elapsed(), &words);
    assert!(!ground.little(&sums), "too little happened: {words}");
}
