//! No verb, script or option takes away by age, by a pattern of names, or whatever is in no job: each
//! of them names one object by its own name. The grammar, the scripts, the command line, and what
//! stays when everything else goes.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "tree/bring.rs"]
mod bring;
#[path = "tree/common.rs"]
mod common;
#[path = "tree/whole.rs"]
mod whole;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::CommandFactory;
use libc::EINVAL;
use volfs::command::{Place, parse};
use volfs::config::Cli;
use volfs::model::{Verb, VolumeId};

use bring::{FOREIGN, edit_meta, foreign_volume, meta, stored};
use common::Volfs;
use whole::Picture;

/// What a verb may take away, and by which word of its own it must be told so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    Nothing,
    /// The very volume below which `control` stands, by its uuid.
    Volume,
    /// The very job, by its name.
    Job,
    /// One snapshot of ours, by its name.
    Snapshot,
}

/// A new verb is to be judged here before it can be built in.
fn takes(verb: Verb) -> Takes {
    match verb {
        Verb::Delete | Verb::Release => Takes::Volume,
        Verb::Destroy => Takes::Job,
        Verb::Revert | Verb::DeleteSnapshot => Takes::Snapshot,
        // Whose a volume is, where it is, what it is called, and what is looked at or stopped.
        Verb::Create | Verb::Claim | Verb::Attach | Verb::Detach | Verb::Resize | Verb::Snapshot | Verb::Move => {
            Takes::Nothing
        }
        Verb::Disk | Verb::Reconcile | Verb::Cancel | Verb::Abandon | Verb::Mkdir | Verb::Set => Takes::Nothing,
        // Of a job that owns nothing.
        Verb::Rmdir => Takes::Nothing,
        #[allow(unreachable_patterns)]
        other => panic!("`{other}` is new: what does it take away, and which name does it repeat?"),
    }
}

/// Words that name no object of any kind.
const NO_NAMES: [&str; 16] =
    ["", "*", "?", "**", "/", ".", "..", "../x", "./x", "a*", "*a", "[a-z]", "{a,b}", "%", "a b", "a\nb"];

const PLACES: [(Place, &str); 3] = [(Place::Root, "the root"), (Place::Job, "a job"), (Place::Volume, "a volume")];

#[test]
fn a_verb_that_takes_away_has_a_name_that_it_must_repeat_and_no_choice_of_objects() {
    for (place, at) in PLACES {
        for verb in place.verbs() {
            let usage = place.usage(*verb).unwrap();
            let name = match takes(*verb) {
                Takes::Nothing => continue,
                Takes::Volume => "UUID",
                Takes::Job => "JOB",
                Takes::Snapshot => "NAME",
            };
            assert_eq!(usage.split(' ').nth(1), Some(name), "{at}: {usage}");
            assert!(place != Place::Root, "{usage}: what takes away stands in its object's own directory");
            for choice in ["older", "age", "before", "match", "all", "like", "unclaimed", "pattern", "since", "except"]
            {
                for word in [choice.to_owned(), format!("{choice}=1"), format!("--{choice}")] {
                    let one = VolumeId::random();
                    for text in
                        [format!("{verb} {word}=x"), format!("{verb} {one} {word}"), format!("{verb} {one} x {word}")]
                    {
                        assert!(parse(text.as_bytes(), place).is_err(), "{at} takes `{text}`");
                    }
                }
            }
        }
    }
}

#[test]
fn a_wrong_name_a_part_of_one_or_a_pattern_is_einval_and_nothing_is_changed() {
    let volfs = Volfs::start_with(&[], "reconcile_interval = 3600\n");
    let uuids = volfs.job("a-job", &["d", "e"], "1M");
    let others = volfs.job("a-job-2", &["d"], "1M");
    let one = &uuids[0];
    let before = all(&volfs, &["a-job", "a-job-2"], &[uuids.clone(), others.clone()].concat());
    let (upper, partial, bare) = (one.to_uppercase(), one[..8].to_owned(), one.replace('-', ""));
    let pattern = format!("{}*", &one[..8]);
    for (place, control) in
        [(Place::Volume, format!("volumes/{one}/control")), (Place::Job, "jobs/a-job/control".into())]
    {
        for verb in place.verbs() {
            let mut wrong: Vec<&str> = NO_NAMES.to_vec();
            match takes(*verb) {
                Takes::Nothing => continue,
                Takes::Volume => wrong.extend(
                    [&upper, &partial, &bare, &pattern, &uuids[1], &others[0], "d", "a-job"].map(|w| w as &str),
                ),
                Takes::Job => wrong.extend(["a-job-2", "a-jo", "a-job*", "A-JOB", "d", one]),
                // Any other word is the name of a snapshot that there may be.
                Takes::Snapshot => {}
            }
            for word in wrong {
                // Nothing and then the right name is the right name.
                let more = if word.is_empty() { "* " } else { "" };
                for text in [format!("{verb} {word}"), format!("{verb} {more}{word} {one}")] {
                    assert_eq!(volfs.write(&control, &text), EINVAL, "{text:?}");
                }
            }
        }
    }
    before.is_still(&all(&volfs, &["a-job", "a-job-2"], &[uuids, others].concat()), "wrong names");
}

/// The picture, but for the places that tell of refusals.
fn all(volfs: &Volfs, jobs: &[&str], uuids: &[String]) -> Picture {
    let told = |at: &str| at.ends_with("/error") || at.ends_with("/info.json");
    Picture::with_loops(volfs, jobs, uuids).without(told)
}

fn scripts(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => scripts(&path, found),
            false => found.push(path),
        }
    }
}

/// What is wrong with a script, a line each.
fn sweeps(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let taking: Vec<&str> = Verb::ALL.iter().filter(|v| takes(**v) != Takes::Nothing).map(|v| v.as_str()).collect();
    let code: Vec<String> = text.lines().map(without_comment).collect();
    let tells = |line: &str| words(line).any(|w| taking.contains(&w));
    let takes_away = code.iter().any(|line| tells(line));
    // The name that scripts give their own job's disks.
    let disks = if text.contains("D=$J/disks") { "$J/disks/" } else { "$D/" };
    for (n, line) in code.iter().enumerate() {
        let mut wrong = |what: String| found.push(format!("line {}: {what}: {line}", n + 1));
        for word in words(line) {
            const SWEEPING: [&str; 14] = [
                "find", "xargs", "-delete", "-mtime", "-mmin", "-ctime", "-atime", "-newer", "-older", "-name",
                "parallel", "eval", "curl", "sqlite3",
            ];
            if SWEEPING.contains(&word) {
                wrong(format!("`{word}` chooses objects, or goes past the tree"));
            }
            // `rm` of a file that the script made itself names it; nothing below the tree is removed so.
            if word == "rm" && (line.contains("-r") || line.contains("$R") || line.contains("$J")) {
                wrong("`rm` of more than a file of its own".into());
            }
        }
        // Expansions of a value's own text are no globs.
        let plain = without_expansions(line);
        let globs = plain.split([' ', '\t', ';', '(', ')']).filter(|w| w.contains('/') && w.contains(['*', '?', '[']));
        for glob in globs.filter(|_| takes_away) {
            let start = glob.replace(['"', '\''], "").replace("$D/", disks);
            if !start.starts_with("$J/") {
                wrong(format!("`{glob}` reaches beyond the script's own job, $J"));
            }
        }
        if tells(line) && words(line).skip_while(|w| !taking.contains(w)).nth(1).is_some_and(|w| w.contains(['*', '?']))
        {
            wrong("a name that takes away is written out".into());
        }
    }
    found
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split([' ', '\t', '"', '\'', ';', '(', ')', '{', '}', '|', '&']).filter(|w| !w.is_empty())
}

/// A `#` that starts a word starts a comment; here-documents and quotes with ` #` are read as one, too.
fn without_comment(line: &str) -> String {
    match line.trim_start().starts_with('#') {
        true => String::new(),
        false => line.split(" #").next().unwrap_or_default().to_owned(),
    }
}

fn without_expansions(line: &str) -> String {
    let (mut plain, mut rest) = (String::new(), line);
    while let Some((before, after)) = rest.split_once("${") {
        plain.push_str(before);
        plain.push_str("$x");
        rest = after.split_once('}').map_or("", |(_, after)| after);
    }
    plain + rest
}

#[test]
fn no_script_chooses_what_it_takes_away() {
    let mut found = Vec::new();
    scripts(&Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib"), &mut found);
    found.retain(|path| fs::read(path).is_ok_and(|bytes| bytes.starts_with(b"#!")));
    assert!(found.len() > 4, "the scripts were not found: {found:?}");
    let wrong: Vec<String> = found
        .iter()
        .flat_map(|path| {
            sweeps(&fs::read_to_string(path).unwrap()).into_iter().map(move |w| format!("{}: {w}", path.display()))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_script_that_sweeps_is_found_out() {
    for bad in [
        "find \"$R/jobs\" -mtime +7",
        "for j in \"$R\"/jobs/*; do echo \"destroy ${j##*/}\" > \"$j/control\"; done",
        "for j in $R/jobs/old-*\ndo\n echo \"destroy ${j##*/}\" > $j/control\ndone",
        "ls $R/jobs | xargs -n1 sh -c 'echo'",
        "for u in \"$R\"/unclaimed/*; do echo \"release ${u##*/}\"; done",
        "rm -rf \"$J\"",
        "echo \"destroy *\" > $J/control",
    ] {
        assert!(!sweeps(bad).is_empty(), "{bad}");
    }
    for good in [
        "echo \"destroy $JOB\" > \"$J/control\"",
        "for v in \"$J\"/volumes/*; do echo \"release ${v##*/}\" > \"$v/control\"; done",
        "# find -delete was how it used to be",
    ] {
        assert_eq!(sweeps(good), Vec::<String>::new(), "{good}");
    }
}

/// Words of an option or subcommand that would take away.
const TAKING_OPTIONS: [&str; 18] = [
    "delete",
    "destroy",
    "remove",
    "purge",
    "prune",
    "clean",
    "cleanup",
    "sweep",
    "gc",
    "collect",
    "expire",
    "expunge",
    "older",
    "age",
    "orphans",
    "unclaimed",
    "wipe",
    "drop",
];

/// The names of all subcommands and options below, with the way to them.
fn names(command: &clap::Command, path: &str, found: &mut Vec<(String, String)>) {
    for argument in command.get_arguments() {
        found.push((path.to_owned(), argument.get_id().as_str().to_owned()));
        found.extend(argument.get_long().map(|name| (path.to_owned(), name.to_owned())));
    }
    for below in command.get_subcommands() {
        found.push((path.to_owned(), below.get_name().to_owned()));
        names(below, &format!("{path} {}", below.get_name()), found);
    }
}

fn takes_away(name: &str) -> bool {
    name.split(['-', '_']).any(|word| TAKING_OPTIONS.contains(&word.to_lowercase().as_str()))
}

#[test]
fn the_command_line_has_no_option_that_takes_away() {
    let mut cli = Cli::command();
    cli.build();
    let mut found = Vec::new();
    names(&cli, "volfs", &mut found);
    assert!(found.len() > 20, "{found:?}");
    found.retain(|(_, name)| takes_away(name));
    assert!(found.is_empty(), "{found:?}");
    // And as a user is told of them.
    for below in cli.get_subcommands().filter(|below| below.get_name() != "help") {
        let said = Command::new(env!("CARGO_BIN_EXE_volfs")).args([below.get_name(), "--help"]).output().unwrap();
        let text = String::from_utf8(said.stdout).unwrap();
        assert!(said.status.success() && text.contains("--state-dir"), "{}: {text}", below.get_name());
        for option in text.split([' ', '\n', ',', '[', '=']).filter(|word| word.starts_with("--")) {
            assert!(!takes_away(option), "{} {option}", below.get_name());
        }
    }
}

/// Volumes and files of the provider's store that are in no job: nobody's, another record's, ours but
/// given up, old, with names like those of jobs; and what somebody has put into the trash.
fn loose(volfs: &Volfs) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for mark in [None, Some(FOREIGN)] {
        let uuid = foreign_volume(volfs, mark);
        edit_meta(volfs, &uuid, |meta| meta["name"] = "doomed-d".into());
        paths.push(stored(volfs, &uuid));
    }
    // Our own mark, in no job: of an operation that is long past.
    let ours = foreign_volume(volfs, None);
    let epoch = volfs.job("keeps", &["k"], "1M");
    let mark = meta(volfs, &epoch[0])["mark"].clone();
    assert_eq!(volfs.write("jobs/keeps/control", "destroy keeps"), 0, "{}", volfs.log());
    edit_meta(volfs, &ours, |meta| meta["mark"] = mark);
    paths.push(stored(volfs, &ours));
    let trash = volfs.state().join("loop/trash");
    for name in ["somebodys", "doomed-d.1", "x.0"] {
        fs::create_dir(trash.join(name)).unwrap();
        paths.push(trash.join(name));
    }
    for path in &paths {
        fs::write(path.join("note"), "kept").unwrap();
        assert!(
            Command::new("touch")
                .args(["-d", "1990-01-01"])
                .arg(path.join("note"))
                .arg(path)
                .status()
                .unwrap()
                .success()
        );
    }
    paths
}

fn picture(volfs: &Volfs, paths: &[PathBuf]) -> Picture {
    let mut picture = Picture::default();
    for path in paths {
        picture.walk(&volfs.state(), path);
    }
    picture
}

#[test]
fn what_is_in_no_job_stays_through_rounds_restarts_retention_and_the_end_of_everything_else() {
    let config = "reconcile_interval = 1\nhistory = 1\n[loop]\ntrash_keep = 0\n";
    let mut volfs = Volfs::start_with(&[], config);
    let paths = loose(&volfs);
    let before = picture(&volfs, &paths);
    let rounds = |volfs: &Volfs| -> u64 {
        let text = volfs.read("metrics").unwrap();
        let line =
            text.lines().find(|l| l.starts_with("volfs_reconcile") && !l.starts_with('#')).expect("a count of rounds");
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    for start in 0..2 {
        let uuids = volfs.job("doomed", &["d", "e"], "1M");
        assert_eq!(volfs.write(format!("volumes/{}/control", uuids[0]), "attach"), 0, "{}", volfs.log());
        assert_eq!(volfs.write("control", "reconcile"), 0, "{}", volfs.log());
        // Listed, and without a `control`: there is nothing to be done to it.
        let ours = paths[2].file_name().unwrap().to_str().unwrap();
        volfs.until("the one with our mark", || volfs.path(format!("unclaimed/{ours}")).exists());
        assert!(!volfs.path(format!("unclaimed/{ours}/control")).exists());
        assert_eq!(volfs.write("jobs/doomed/control", "destroy doomed"), 0, "{}", volfs.log());
        assert!(uuids.iter().all(|uuid| !stored(&volfs, uuid).exists()));
        let past = rounds(&volfs);
        volfs.until("two more rounds", || rounds(&volfs) >= past + 2);
        before.is_still(&picture(&volfs, &paths), &format!("start {start}"));
        assert_eq!(volfs.terminate().0, 0);
        volfs.launch();
        before.is_still(&picture(&volfs, &paths), "started again");
    }
    assert_eq!(volfs.ok("ls $R/jobs"), "");
}
