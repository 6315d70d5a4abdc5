//! contrib/coming-from-the-http-daemon.md: each line on the right of its tables is run in dash as the
//! page has it, over a real mount, and what it says or does is looked at.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};

use crate::bring::*;
use crate::common::{Said, Volfs, finish, said_of};
use crate::scripts::QUIET;

const PAGE: &str = include_str!("../../contrib/coming-from-the-http-daemon.md");

/// A line of the page, what is done before it, and what must hold after it, as scripts under `set -eu`.
/// There is a job with disk-2000 (UUID) attached here as DEV and disk-2001 detached. OUT is what the
/// line printed. While the file G exists an attach stops before its call, a deletion after it; while
/// F exists a deletion fails.
const LINES: &[(&str, &str, &str)] = &[
    // Calls
    ("echo \"create disk-2002 $SIZE\" > $J/control", "", "is \"$SIZE\" \"$(cat $D/disk-2002/size)\""),
    (
        "echo \"create disk-2002 $SIZE name=web1 data\" > $J/control",
        "",
        "is 'web1 data' \"$(cat $D/disk-2002/name)\"; is \"$SIZE\" \"$(cat $D/disk-2002/size)\"",
    ),
    ("echo attach > $V/control", AWAY, "is attached \"$(cat $V/status)\"; [ -b $V/block ]"),
    ("echo attach > $J/control", AWAY, "is 'idle attached=2' \"$(cat $J/status)\""),
    ("echo \"attach nowait\" > $V/control", AWAY, "settle; is attached \"$(cat $V/status)\""),
    ("echo \"attach vm=$VM\" > $V/control", AWAY, "is remote \"$(cat $V/status)\"; is $VM \"$(cat $V/vm)\""),
    ("echo \"attach vm=$VM root\" > $V/control", AWAY, "is $VM \"$(cat $V/vm)\"; is 0 \"$(cat $V/device_id)\""),
    (
        "echo detach > $V/control",
        "",
        "is detached \"$(cat $V/status)\"; [ ! -e $R/exports/$UUID ]; [ ! -e $R/devices/$DEV ]",
    ),
    ("echo \"detach vm=$VM\" > $V/control", ON_VM, "is detached \"$(cat $V/status)\""),
    ("echo \"delete $UUID\" > $V/control", AWAY, "[ ! -e $V ]; [ ! -e $D/disk-2000 ]; [ -e $D/disk-2001 ]"),
    ("cat $V/info.json", "", "has \"\\\"uuid\\\":\\\"$UUID\\\"\"; has '\"status\":\"attached\"'"),
    ("cat $V/status", "", "is attached \"$OUT\"; echo detach > $V/control; is detached \"$(cat $V/status)\""),
    ("cat $V/device", "", "is /dev/$DEV \"$OUT\"; echo detach > $V/control; fails cat $V/device"),
    ("readlink $R/devices/$DEV", "", "is ../jobs/$JOB/volumes/$UUID \"$OUT\""),
    ("ls $R/vms/$VM", ON_VM_AND_SEEN, "is $UUID \"$OUT\""),
    ("echo \"reconcile vm=$VM\" > $R/control && ls $R/vms/$VM", ON_VM, "is $UUID \"$OUT\""),
    ("cat $R/operations/$ID", "", "has \"\\\"id\\\":$ID\"; has '\"command\":\"attach'"),
    ("cat $R/history", "", "has \"attach\t$JOB\tdisk-2000\t$UUID\tdone\""),
    ("cat $V/history", "", "has \"create\t$JOB\tdisk-2000\t$UUID\tdone\"; has \"attach\t$JOB\""),
    (
        "grep -w failed $R/history",
        "echo detach > $V/control; : > $F; fails put \"delete $UUID\" $V/control; rm $F",
        "has \"delete\t$JOB\tdisk-2000\t$UUID\tfailed\"",
    ),
    (
        "echo \"detach vm=$VM\" > $J/control && echo attach > $J/control",
        "echo detach > $J/control; echo \"attach vm=$VM\" > $J/control",
        "is 'idle attached=2' \"$(cat $J/status)\"; echo \"reconcile vm=$VM\" > $R/control; is '' \"$(ls $R/vms/$VM)\"",
    ),
    (SNAPSHOT, AWAY, "[ -f $V/snapshots/before-test ]; [ -f $D/disk-2001/snapshots/before-test ]; unsnap"),
    ("ls $J/volumes/*/snapshots", SNAPPED, "is 2 \"$(printf '%s\\n' \"$OUT\" | grep -c before-test)\"; unsnap"),
    ("cat $V/snapshots/before-test", SNAPPED, "has '\"ours\":true'; unsnap"),
    (REVERT, SNAPPED_AND_WRITTEN, "unsnap; echo attach > $V/control; is '' \"$(head -c 5 $V/block | tr -d '\\0')\""),
    (DELETE_SNAPSHOT, SNAPPED, "is '' \"$(ls $V/snapshots)\"; echo \"destroy $JOB\" > $J/control"),
    ("ls $R/exports/$UUID", "", "[ -b \"$OUT\" ]; echo detach > $V/control; fails ls $R/exports/$UUID"),
    ("ls $R/exports", "", "has $UUID; echo detach > $V/control; fails grep -x $UUID $R/exports"),
    ("echo reconcile > $R/control", GONE, "is remote \"$(cat $V/status)\"; is $VM \"$(cat $V/vm)\""),
    ("cat $R/health", "", "has 'cloud ok'; has 'store ok'"),
    ("cat $R/metrics", "", "has volfs_build_info"),
    // Queries
    ("ls -l $R/devices", "", "has \"$DEV -> ../jobs/$JOB/volumes/$UUID\""),
    ("cat $J/table", "", "has \"$JOB\tdisk-2000\t$UUID\t\"; has \"$JOB\tdisk-2001\t$OTHER\t\"; has \"/dev/$DEV\""),
    ("cat $R/table", "", "has \"$JOB\tdisk-2000\t$UUID\t\"; has \"$JOB\tdisk-2001\t$OTHER\t\""),
    ("ls $D", "", "is \"disk-2000 disk-2001\" \"$(echo $OUT)\""),
    ("readlink $D/disk-2000", "", "is ../volumes/$UUID \"$OUT\""),
    ("readlink $R/volumes/$UUID", "", "is ../jobs/$JOB/volumes/$UUID \"$OUT\""),
    ("cat $V/owner", "", "printf '%s\\n' \"$OUT\" | grep -qxE '[0-9a-f-]{36}/[0-9]+'"),
    ("cat $J/status", "", "is 'idle detached=1 attached=1' \"$OUT\""),
    ("cat $J/vm_name", "", "is web1 \"$OUT\""),
    ("echo web2 > $J/vm_name", "", "is web2 \"$(cat $J/vm_name)\""),
    ("grep -lx web1 $R/jobs/*/vm_name", "", "has $J/vm_name"),
    ("mkdir $J", "echo \"destroy $JOB\" > $J/control", "is idle \"$(cat $J/status)\""),
    ("cat $V/vm", ON_VM, "is $VM \"$OUT\""),
    ("cat $V/device_id", "echo detach > $V/control; echo \"attach vm=$VM device_id=5\" > $V/control", "is 5 \"$OUT\""),
    ("cat $V/size", "", "is 1048576 \"$OUT\""),
    ("tail -n 10 $R/history", "", "has \"attach\t$JOB\tdisk-2000\t$UUID\tdone\""),
    ("cat $R/problems", NOT_OURS, "has $UUID; has conflict"),
    ("ls $R/unclaimed", RELEASED, "has $UUID"),
    ("cat $R/unclaimed/$UUID/reason", RELEASED, "has 'in no job'"),
    ("cat $R/limits", "", "has \"used\tmost\"; has '1\t256'"),
    ("head -n 1 $R/events/$JOB", "", "has '{'; has $JOB"),
    // Clean-up, and repairs
    ("echo \"destroy $JOB\" > $J/control", "", "[ ! -e $J ]; [ ! -e $V ]; [ ! -e $R/devices/$DEV ]"),
    (
        "echo cancel > $J/control",
        ": > $G; echo \"destroy $JOB nowait\" > $J/control; until [ ! -d $S/$UUID ] || [ ! -d $S/$OTHER ]; do :; done",
        "rm $G; settle; is 1 \"$(ls $J/volumes | wc -l)\"",
    ),
    ("echo 1 > $J/hold", "", "fails put \"destroy $JOB\" $J/control; [ -e $V ]; echo 0 > $J/hold"),
    ("rmdir $J", "mkdir $R/jobs/$NEW; echo \"move $NEW\" > $J/control", "[ ! -e $J ]; [ -e $V ]"),
    ("grep \"delete.*$UUID\" $R/history", DELETED, "has 'recoverable until '"),
    ("echo \"release $UUID\" > $V/control", AWAY, "[ ! -e $D/disk-2000 ]; [ -d $S/$UUID ]"),
    ("echo \"claim $UUID disk-2000\" > $J/control", RELEASED, "is ../volumes/$UUID \"$(readlink $D/disk-2000)\""),
    (
        "echo \"move $NEW\" > $J/control",
        "mkdir $R/jobs/$NEW",
        "is idle \"$(cat $J/status)\"; is ../volumes/$UUID \"$(readlink $R/jobs/$NEW/disks/disk-2000)\"",
    ),
    (
        "echo \"move $NEW\" > $V/control",
        "mkdir $R/jobs/$NEW",
        "is ../volumes/$UUID \"$(readlink $R/jobs/$NEW/disks/disk-2000)\"; [ -e $D/disk-2001 ]",
    ),
    ("echo \"disk disk-0\" > $V/control", "", "is ../volumes/$UUID \"$(readlink $D/disk-0)\"; [ ! -e $D/disk-2000 ]"),
    ("echo reconcile > $V/control", GONE, "is remote \"$(cat $V/status)\"; is $VM \"$(cat $V/vm)\""),
    ("echo \"cancel $ID\" > $R/control", HANGING, "rm $G; settle; is detached \"$(cat $V/status)\""),
    (
        "echo \"abandon $ID\" > $R/control",
        HANGING,
        "is unknown \"$(cat $V/status)\"; rm $G; echo reconcile > $V/control; is detached \"$(cat $V/status)\"",
    ),
    ("cat $V/error", "fails put 'resize 1' $V/control", "has EINVAL; has 'cannot shrink'"),
    ("cat $V/holders", "", "has \"kind\tpid\tcommand\""),
    ("volfs backup $FILE", "", "[ -s $FILE ]"),
];

const AWAY: &str = "echo detach > $V/control";
const ON_VM: &str = "echo detach > $V/control; echo \"attach vm=$VM\" > $V/control";
const ON_VM_AND_SEEN: &str =
    "echo detach > $V/control; echo \"attach vm=$VM\" > $V/control; echo \"reconcile vm=$VM\" > $R/control";
const RELEASED: &str =
    "echo detach > $V/control; echo \"attach vm=$VM\" > $V/control; echo \"release $UUID\" > $V/control";
const DELETED: &str = "echo detach > $V/control; echo \"delete $UUID\" > $V/control";
/// Attached to another VM behind volfs's back.
const GONE: &str = "echo detach > $V/control
    change 's/\"attached\": null/\"attached\": {\"vm\": \"'$VM'\", \"device_id\": 5}/'; is detached \"$(cat $V/status)\"";
/// It has another owner's mark in the cloud.
const NOT_OURS: &str = "echo detach > $V/control
    change 's#\"mark\": \"[^\"]*#\"mark\": \"5ea1ed00-0000-4000-8000-000000000001/7#'; put reconcile $V/control || :";
const HANGING: &str = "echo detach > $V/control; : > $G; echo \"attach nowait\" > $V/control";
const SNAPSHOT: &str = "echo \"snapshot before-test\" > $J/control";
const REVERT: &str = "echo \"revert before-test\" > $J/control";
const DELETE_SNAPSHOT: &str = "echo \"delete-snapshot before-test\" > $J/control";
const SNAPPED: &str = "echo detach > $J/control; echo \"snapshot before-test\" > $J/control";
const SNAPPED_AND_WRITTEN: &str = "echo detach > $J/control; echo \"snapshot before-test\" > $J/control
    echo attach > $V/control; printf later | dd of=$V/block conv=notrunc,fsync status=none; echo detach > $V/control";

/// Words for what is done before and looked at after.
const WORDS: &str = r#"set -eu
is() { [ "$1" = "$2" ] || { echo "not $1 but $2" >&2; exit 1; }; }
has() { case $OUT in *"$1"*) ;; *) echo "no $1 in $OUT" >&2; exit 1 ;; esac; }
fails() { if "$@" > /dev/null 2>&1; then echo "succeeds: $*" >&2; exit 1; fi; }
put() { echo "$1" > "$2"; }
change() { sed "$1" $S/$UUID/meta.json > $S/$UUID/edited; mv $S/$UUID/edited $S/$UUID/meta.json; }
settle() { while case $(cat $J/status) in busy*) ;; *) false ;; esac; do :; done; }
unsnap() { echo "delete-snapshot before-test" > $J/control; }
"#;

/// The lines of the tables below a heading, or of all.
fn page(heading: &str) -> Vec<&'static str> {
    let start = PAGE.find(heading).unwrap_or_else(|| panic!("no {heading:?}")) + heading.len();
    let end = PAGE[start..].find("\n## ").map_or(PAGE.len(), |n| start + n);
    let rows = PAGE[start..end].lines().filter(|l| l.starts_with('|') && !l.starts_with("|---"));
    let rows = rows.filter(|l| *l != "| before | now |");
    rows.map(|row| {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        assert_eq!(cells.len(), 2, "{row}");
        let line = cells[1].strip_prefix('`').and_then(|l| l.strip_suffix('`'));
        line.filter(|l| !l.contains('`')).unwrap_or_else(|| panic!("no line that could be run: {row}"))
    })
    .collect()
}

const HEADINGS: [&str; 3] = ["\n## Calls\n", "\n## Queries\n", "\n## Clean-up, and repairs\n"];

#[test]
fn predecessor_78_each_line_of_the_page_is_tried_and_each_trial_is_a_line_of_the_page() {
    let on_page: BTreeSet<_> = HEADINGS.iter().flat_map(|h| page(h)).collect();
    let tried: BTreeSet<_> = LINES.iter().map(|(line, ..)| *line).collect();
    assert_eq!(on_page, tried);
    assert_eq!(tried.len(), LINES.len(), "each once");
    assert_eq!(PAGE.matches("\n## ").count(), HEADINGS.len(), "a part of the page that is not tried");
}

/// One job of the shared mount, and the words that stand for its parts.
struct World<'a> {
    volfs: &'a Volfs,
    env: Vec<(&'static str, String)>,
    job: String,
    new: String,
}

impl<'a> World<'a> {
    fn new(volfs: &'a Volfs, n: usize) -> Self {
        let (job, new) = (format!("job-{n}"), format!("new-{n}"));
        let uuids = volfs.job(&job, &["disk-2000", "disk-2001"], "1M");
        assert_eq!(volfs.write(format!("jobs/{job}/disks/disk-2000/control"), "attach"), 0, "{}", volfs.log());
        assert_eq!(volfs.write(format!("jobs/{job}/vm_name"), "web1\n"), 0);
        let at = |below: String| volfs.path(below).display().to_string();
        let scratch = |name: &str| volfs.scratch(name).display().to_string();
        let device = of(volfs, &uuids[0], "device");
        let programs = std::path::Path::new(env!("CARGO_BIN_EXE_volfs")).parent().unwrap();
        let env = vec![
            ("R", volfs.root().display().to_string()),
            ("J", at(format!("jobs/{job}"))),
            ("D", at(format!("jobs/{job}/disks"))),
            ("V", at(format!("volumes/{}", uuids[0]))),
            ("JOB", job.clone()),
            ("NEW", new.clone()),
            ("UUID", uuids[0].clone()),
            ("OTHER", uuids[1].clone()),
            ("DEV", device.strip_prefix("/dev/").unwrap().to_owned()),
            ("VM", volfs::model::VmId::random().to_string()),
            ("SIZE", "1048576".into()),
            ("FILE", scratch(&format!("backup-{n}"))),
            ("G", scratch("gate")),
            ("F", scratch("fail")),
            ("S", volfs.state().join("loop/volumes").display().to_string()),
            ("VOLFS_STATE_DIR", volfs.state().display().to_string()),
            ("PATH", format!("{}:{}", programs.display(), std::env::var("PATH").unwrap())),
        ];
        World { volfs, env, job, new }
    }

    fn dash(&self, script: &str) -> Command {
        let mut command = Command::new("timeout");
        command.args(["120", "dash", "-c", script]).envs(self.env.iter().map(|(k, v)| (*k, v.as_str())));
        command.current_dir(self.volfs.scratch("")).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, script: &str) -> Said {
        said_of(self.dash(script).output().unwrap())
    }

    /// The operation in flight, or else the last one of disk-2000.
    fn operation(&self) -> String {
        let history = self.volfs.read(format!("jobs/{}/disks/disk-2000/history", self.job)).unwrap_or_default();
        let info = self.volfs.read(format!("jobs/{}/disks/disk-2000/info.json", self.job)).unwrap_or_default();
        let info: serde_json::Value = serde_json::from_str(&info).unwrap_or_default();
        let in_flight = info["operation"]["id"].as_u64().map(|id| id.to_string());
        let last = || history.lines().last().and_then(|l| l.split('\t').nth(10)).unwrap_or_default().to_owned();
        in_flight.unwrap_or_else(last)
    }

    fn line(&self, line: &str) -> Said {
        let mut child = self.dash(line).spawn().unwrap();
        if line.contains("events/") {
            // It waits for a change: here is one, until it has heard of it.
            let control = format!("jobs/{}/disks/disk-2001/control", self.job);
            let verbs = ["attach", "detach"].into_iter().cycle();
            for verb in verbs.take_while(|_| child.try_wait().unwrap().is_none()) {
                assert_eq!(self.volfs.write(&control, verb), 0, "{}", self.volfs.log());
            }
        }
        finish(child)
    }

    fn end(self) {
        for job in [&self.job, &self.new] {
            // What is left of it goes with the mount; only its devices are wanted back now.
            let _ = self.volfs.write(format!("jobs/{job}/control"), "detach");
        }
    }
}

fn try_lines(heading: &str) {
    let mut volfs = Volfs::prepare(&[], QUIET);
    let (gate, fail) = (volfs.scratch("gate"), volfs.scratch("fail"));
    let points = format!(
        "attach.journaled=wait:{gate};delete.after-call=wait:{gate};loop.delete.before=fail:{}",
        fail.display(),
        gate = gate.display()
    );
    volfs.set_env(&[("VOLFS_FAILPOINTS", &points)]);
    volfs.launch();
    let lines: BTreeSet<_> = page(heading).into_iter().collect();
    for (n, line) in lines.into_iter().enumerate() {
        let mut world = World::new(&volfs, n);
        let (_, before, after) = LINES.iter().find(|(l, ..)| *l == line).unwrap_or_else(|| panic!("untried: {line}"));
        let made = world.run(&format!("{WORDS}{before}"));
        assert_eq!(made.status, 0, "before `{line}`: {made:?}\n{}", volfs.log());
        world.env.push(("ID", world.operation()));
        let said = world.line(&format!("set -eu\n{line}"));
        assert_eq!(said.status, 0, "`{line}`: {said:?}\n{}", volfs.log());
        world.env.push(("OUT", said.out.trim_end_matches('\n').to_owned()));
        let looked = world.run(&format!("{WORDS}{after}"));
        assert_eq!(looked.status, 0, "after `{line}`: {looked:?}, which said {said:?}\n{}", volfs.log());
        fs::metadata(&gate).expect_err("a gate left closed");
        world.end();
    }
}

#[test]
fn predecessor_78_each_call_of_the_daemon_has_its_line() {
    try_lines(HEADINGS[0]);
}

#[test]
fn predecessor_78_each_query_has_its_line() {
    try_lines(HEADINGS[1]);
}

#[test]
fn predecessor_78_each_step_of_cleaning_up_has_its_line() {
    try_lines(HEADINGS[2]);
}
