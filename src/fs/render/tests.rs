use std::sync::Arc;

use super::*;
use crate::engine::world::{Counters, Running};
use crate::fs::testing::*;
use crate::model::{Caller, HolderKind, Mark, OpId, Outcome, Verb};

fn of(world: World, path: &str) -> String {
    Asked::new(world).text(path).unwrap()
}

fn v1(file: &str) -> String {
    format!("jobs/a/volumes/{}/{file}", vol(1))
}

#[test]
fn every_value_of_a_volume_is_one_line() {
    let a = Asked::new(world());
    let say = |file: &str| a.text(&v1(file)).unwrap();
    assert_eq!(say("status"), "attached\n");
    assert_eq!(say("device"), "/dev/loop7\n");
    assert_eq!(say("incarnation"), format!("{} 47\n", boot()));
    assert_eq!(say("name"), "a volume\n");
    assert_eq!(say("size"), "1073741824\n");
    assert_eq!(say("vm"), format!("{}\n", vm(HOST)));
    assert_eq!(say("device_id"), "\n");
    assert_eq!(say("serial"), "\n");
    assert_eq!(say("cloud_state"), "Ready\n");
    assert_eq!(say("owner"), "\n");
    assert_eq!(say("error"), "\n");
    assert_eq!(a.text("jobs/a/hold").unwrap(), "0\n");
    assert_eq!(a.text("jobs/a/vm_name").unwrap(), "\n");
    assert_eq!(a.text("version").unwrap(), format!("volfs {} abi 1\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_device_is_what_the_kernel_says_and_not_what_was_published() {
    let a = Asked::new(world());
    a.fake.gone.lock().push(crate::model::MapRow(7));
    assert_eq!(a.text(&v1("device")), Err(Errno::ENODEV));
    assert_eq!(a.text(&v1("incarnation")), Err(Errno::ENODEV));
    let detached = format!("jobs/a/volumes/{}/device", vol(2));
    assert_eq!(a.text(&detached), Err(Errno::ENODEV));
    assert_eq!(size(&a.view(), a.find(&detached).unwrap()), Ok(0));
    assert_eq!(size(&a.view(), a.find(&v1("device")).unwrap()), Ok("/dev/loop7\n".len()));
}

#[test]
fn foreign_names_stay_one_cell() {
    assert_eq!(escape("a\tb\nc\\d\x7f"), "a\\011b\\012c\\134d\\177");
    assert_eq!(escape("grüße"), "grüße");
    assert_eq!(escape("\u{85}"), "\\302\\205", "each byte of a control character");
    assert_eq!(cell(""), "-");
    let a = Asked::new(world());
    assert_eq!(a.text(&format!("unclaimed/{}/name", vol(4))).unwrap(), "foreign\\011name\\134x\n");
}

#[test]
fn st_size_is_the_length_of_every_file() {
    let mut w = world();
    w.operations.insert(OpId(4), Arc::new(operation(4, Verb::Attach)));
    let a = Asked::new(w);
    let mut paths = vec!["operations/4".to_owned(), v1("info.json"), v1("history"), v1("control")];
    for dir in ["", "jobs/a", &format!("unclaimed/{}", vol(4)), &v1(""), &v1("snapshots")] {
        paths.extend(a.names(dir).unwrap().iter().map(|n| format!("{dir}/{n}")));
    }
    let mut seen = 0;
    for path in paths {
        let node = a.find(&path).unwrap();
        let holders = matches!(node, Node::Volume(_, VolumeFile::Holders));
        if node.kind() == crate::fs::tree::Kind::File && !holders {
            seen += 1;
            let text = text(&a.view(), node).unwrap();
            assert_eq!(size(&a.view(), node), Ok(text.len()), "{path}");
            assert!(text.ends_with('\n'), "{path}");
        }
    }
    assert!(seen > 35, "{seen}");
}

#[test]
fn a_jobs_status_counts_its_volumes() {
    let mut w = world();
    assert_eq!(of(w.clone(), "jobs/a/status"), "idle detached=1 attached=1\n");
    edit(&mut w, 12, |v| v.base = Status::Lost);
    assert_eq!(of(w.clone(), "jobs/a/status"), "degraded attached=1 lost=1\n");
    edit(&mut w, 12, |v| v.base = Status::Detached);
    w.operations.insert(OpId(8), Arc::new(operation(8, Verb::Create)));
    w.operations.insert(OpId(9), Arc::new(operation(9, Verb::Claim)));
    edit_job(&mut w, 1, |j| {
        j.creating.insert(disk("new"), OpId(8));
        j.creating.insert(disk("taken"), OpId(9));
    });
    assert_eq!(of(w.clone(), "jobs/a/status"), "busy detached=1 creating=1 attached=1\n");
    edit(&mut w, 11, |v| v.running = Some(Running { op: OpId(7), verb: Verb::Detach, withdrawn: true }));
    assert_eq!(of(w, "jobs/a/status"), "busy detached=1 creating=1 detaching=1\n");
    let mut w = empty_world();
    add_job(&mut w, 1, "a");
    assert_eq!(of(w, "jobs/a/status"), "idle\n");
}

#[test]
fn the_table_has_a_row_a_volume_and_dashes_for_nothing() {
    let mut w = world();
    edit_job(&mut w, 1, |j| {
        j.creating.insert(disk("a-new-one"), OpId(8));
    });
    let rows = [
        "job\tdisk\tuuid\tname\tstatus\tdevice\tvm\tsize\n".to_owned(),
        "a\ta-new-one\t-\t-\tcreating\t-\t-\t-\n".to_owned(),
        format!("a\tdisk-2000\t{}\ta volume\tattached\t/dev/loop7\t{}\t1073741824\n", vol(1), vm(HOST)),
        format!("a\tdisk-2001\t{}\ta volume\tdetached\t-\t-\t1073741824\n", vol(2)),
        format!("b\tdata\t{}\ta volume\tdetached\t-\t-\t1073741824\n", vol(3)),
    ];
    assert_eq!(of(w.clone(), "jobs/a/table"), rows[..4].concat());
    assert_eq!(of(w, "table"), rows.concat());
}

#[test]
fn history_says_who_did_what_and_how_it_ended() {
    let mut w = world();
    w.history.push_back(Arc::new(history_row(Verb::Detach, Outcome::Failed)));
    let text = of(w, "history");
    let (header, row) = text.trim_end().split_once('\n').unwrap();
    assert!(header.starts_with("time\toperation\tjob\tdisk\tuuid\toutcome\tseconds\tuid\tpid\tcommand"));
    let expected = format!("{}\tdetach\ta\t-\t{}\tfailed\t1.234\t0\t4711\tsh\t5\t-", at(7), vol(1));
    assert_eq!(row, expected);
    assert_eq!(header.split('\t').count(), row.split('\t').count());
}

fn failure(error: Error) -> Option<Arc<ErrorText>> {
    Some(Arc::new(ErrorText { at: at(8), verb: "attach".into(), pid: 99, error }))
}

#[test]
fn error_has_time_verb_pid_errno_and_a_sentence_a_line() {
    let mut w = world();
    w.error = failure(Error::NoSuchVm { vm: vm(1) });
    let expected = format!("{} attach pid 99 ENOENT: the cloud knows no VM {}\n", at(8), vm(1));
    assert_eq!(of(w.clone(), "error"), expected);
    let lines = vec![
        (disk("d1"), Error::CannotForce { volume: vol(1) }),
        (disk("d2"), Error::CloudRefused { what: "it".into(), words: "two\nlines".into() }),
    ];
    w.error = failure(Error::Several { lines });
    let text = of(w, "error");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3);
    assert!(lines[0].starts_with(&format!("{} attach pid 99 EBUSY: d1: this provider", at(8))), "{}", lines[0]);
    assert!(lines[1].contains("EREMOTEIO: d2: the cloud refused it: two"), "{}", lines[1]);
    assert!(lines[2].ends_with("EREMOTEIO: lines"), "{}", lines[2]);
}

#[test]
fn health_begins_with_the_worst_of_its_components() {
    let mut w = world();
    assert_eq!(of(w.clone(), "health"), "ok\ncloud ok\nstore ok\ndevices ok\nreconciler ok\n");
    w.health.cloud = Component::Degraded("slow".into());
    assert!(of(w.clone(), "health").starts_with("degraded\ncloud degraded: slow\nstore ok\n"));
    w.health.store = Component::Down("no\nspace".into());
    assert!(of(w, "health").starts_with("down\ncloud degraded: slow\nstore down: no\\012space\n"));
}

#[test]
fn problems_names_what_is_not_in_order_and_is_a_header_when_all_is() {
    let mut w = world();
    w.vms.clear();
    let good = "object\tsince\twhat\twhy\tremedy\n";
    assert_eq!(of(w.clone(), "problems"), good);
    w.health.cloud = Component::Down("no route".into());
    w.error = failure(Error::NoSuchVm { vm: vm(1) });
    for (row, status) in [(11, Status::Lost), (12, Status::Missing), (13, Status::Conflict)] {
        edit(&mut w, row, |v| v.base = status);
    }
    edit(&mut w, 13, |v| v.why = Some("two devices".into()));
    edit(&mut w, 12, |v| v.history = Arc::new(vec![Arc::new(history_row(Verb::Delete, Outcome::Interrupted))]));
    edit_job(&mut w, 2, |j| {
        j.error = failure(Error::Several { lines: vec![(disk("a"), Error::Stale), (disk("b"), Error::Stale)] })
    });
    let record = w.record;
    let mut marked = (*w.unclaimed[&vol(4)]).clone();
    let mut cloud = (*marked.cloud).clone();
    cloud.mark = Some(Mark { record, epoch: 1 });
    marked.cloud = Arc::new(cloud);
    w.unclaimed.insert(vol(4), Arc::new(marked));
    let text = of(w, "problems");
    assert!(text.starts_with(good));
    for line in text.lines() {
        assert_eq!(line.split('\t').count(), 5, "{line}");
        assert!(line.split('\t').all(|c| !c.is_empty() && c != "-"), "{line}");
    }
    let whats: Vec<&str> = text.lines().skip(1).map(|l| l.split('\t').nth(2).unwrap()).collect();
    let expected = [
        "down",
        "attach failed (ENOENT)",
        "attach failed (ESTALE)",
        "lost",
        "missing",
        "delete interrupted",
        "conflict",
        "marked",
    ];
    assert_eq!(whats, expected);
    assert!(text.contains("two devices"));
}

#[test]
fn control_says_what_is_allowed_and_can_never_be_a_command() {
    let a = Asked::new(world());
    let mut verbs = Vec::new();
    for path in ["control".to_owned(), "jobs/a/control".into(), v1("control")] {
        let text = a.text(&path).unwrap();
        assert!(text.starts_with('#') && text.lines().count() > 1, "{text}");
        assert!(text.lines().skip(1).all(|l| l.ends_with("\tallowed") || l.contains("\tno: ")), "{text}");
        verbs.push(
            text.lines().skip(1).map(|l| l.split(":\t").next().unwrap().to_owned()).collect::<Vec<_>>().join(" "),
        );
        for place in [crate::command::Place::Root, crate::command::Place::Job, crate::command::Place::Volume] {
            assert!(crate::command::parse(text.as_bytes(), place).is_err());
            for line in text.lines() {
                assert!(crate::command::parse(line.as_bytes(), place).is_err(), "{line}");
            }
        }
    }
    assert_eq!(verbs[0], "reconcile cancel abandon");
    assert_eq!(verbs[1], "create claim attach detach snapshot revert delete-snapshot move destroy cancel");
    assert_eq!(verbs[2], "attach detach resize snapshot revert delete-snapshot delete release move disk reconcile");
    assert!(a.text(&v1("control")).unwrap().contains("revert:\tno: not\\012now\n"), "a reason is one line");
}

#[test]
fn info_json_holds_everything_and_the_operations_step() {
    let mut w = world();
    w.operations.insert(OpId(7), Arc::new(operation(7, Verb::Resize)));
    edit(&mut w, 11, |v| {
        v.running = Some(Running { op: OpId(7), verb: Verb::Resize, withdrawn: false });
        v.name = "quo\"te\n".into();
        v.error = failure(Error::Stale);
        v.history = Arc::new(vec![Arc::new(history_row(Verb::Attach, Outcome::Done))]);
    });
    let text = of(w.clone(), &v1("info.json"));
    assert_eq!(text.matches('\n').count(), 1, "one line");
    let info: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(info["uuid"], vol(1).to_string());
    assert_eq!((info["job"].as_str(), info["disk"].as_str()), (Some("a"), Some("disk-2000")));
    assert_eq!((info["status"].as_str(), info["settled_status"].as_str()), (Some("resizing"), Some("attached")));
    assert_eq!(info["device"]["path"], "/dev/loop7");
    assert_eq!(info["device"]["diskseq"], 47);
    assert_eq!(info["operation"]["step"], "waits for the cloud");
    assert_eq!(info["error"]["errno"], "ESTALE");
    assert_eq!(info["history"][0]["outcome"], "done");
    assert_eq!(info["name"], "quo\"te\n");
    assert_eq!(info["size"], 1u64 << 30);
    let op: serde_json::Value = serde_json::from_str(&of(w, "operations/7")).unwrap();
    assert_eq!(op, info["operation"]);
    assert_eq!(op["caller"]["pid"], 4711);
    assert!(op["ended"].is_null());
}

#[test]
fn a_snapshot_is_one_line_of_json_the_same_as_in_info_json_and_null_is_what_was_not_told() {
    let w = world();
    let info: serde_json::Value = serde_json::from_str(&of(w.clone(), &v1("info.json"))).unwrap();
    let mut all = Vec::new();
    for name in ["before-test", "daily"] {
        let text = of(w.clone(), &v1(&format!("snapshots/{name}")));
        assert_eq!(text.matches('\n').count(), 1, "{text}");
        all.push(serde_json::from_str::<serde_json::Value>(&text).unwrap());
    }
    assert_eq!(info["snapshots"], serde_json::Value::Array(all.clone()));
    let expected = serde_json::json!({"name": "before-test", "id": snap(31), "ours": true, "state": "BackedUp",
        "size": 1u64 << 30, "created": "2023-11-14T22:13:20Z"});
    assert_eq!(all[0], expected);
    let expected = serde_json::json!({"name": "daily", "id": snap(32), "ours": false, "state": null, "size": null,
        "created": null});
    assert_eq!(all[1], expected);
}

#[test]
fn control_asks_with_a_snapshots_name_that_is_there_and_with_one_that_is_free() {
    let a = Asked::new(world());
    for path in [v1("control"), "jobs/a/control".into()] {
        a.text(&path).unwrap();
        let asked = std::mem::take(&mut *a.fake.asked.lock());
        let spelled: Vec<String> = asked.iter().map(crate::command::spell).collect();
        for expected in ["snapshot new-1", "revert before-test", "delete-snapshot before-test"] {
            assert!(spelled.iter().any(|s| s == expected), "{path}: {spelled:?}");
        }
    }
}

#[test]
fn limits_counts_this_vms_disks_those_of_no_job_included() {
    let mut w = world();
    assert_eq!(of(w.clone(), "limits"), "used\tmost\n1\t28\n");
    let mut other = (*w.unclaimed[&vol(4)]).clone();
    let mut cloud = (*other.cloud).clone();
    cloud.attached = Some(crate::cloud::Attachment { vm: w.host, device_id: Some(0) });
    other.cloud = Arc::new(cloud);
    w.unclaimed.insert(vol(4), Arc::new(other));
    assert_eq!(of(w, "limits"), "used\tmost\n2\t28\n");
}

#[test]
fn holders_is_a_table() {
    let dd = Holder { kind: HolderKind::Open, pid: Some(4711), name: "d\td".into() };
    let dm = Holder { kind: HolderKind::Holder, pid: None, name: "dm-3".into() };
    assert_eq!(holders(&[dd, dm]), "kind\tpid\tcommand\nopen\t4711\td\\011d\nholder\t-\tdm-3\n");
    assert_eq!(holders(&[]), "kind\tpid\tcommand\n");
}

/// The text format's grammar, as far as we use it: every sample belongs to the family above it.
#[test]
fn metrics_are_well_formed() {
    let mut w = world();
    w.operations.insert(OpId(7), Arc::new(operation(7, Verb::Resize)));
    let mut counters = Counters { forced: 2, ..Counters::default() };
    counters.operations.insert((Verb::Attach, "done"), 5);
    counters.refusals.insert("EBUSY", 3);
    w.counters = counters;
    let text = of(w, "metrics");
    let name_ok = |n: &str| n.starts_with("volfs_") && n.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    let (mut family, mut kind) = ("", "");
    let (mut families, mut samples) = (std::collections::HashSet::new(), std::collections::HashSet::new());
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').unwrap();
            assert!(name_ok(name) && !words.is_empty(), "{line}");
            assert!(families.insert(name.to_owned()), "one family each: {line}");
            family = name;
        } else if let Some(of) = line.strip_prefix("# TYPE ") {
            let (name, k) = of.split_once(' ').unwrap();
            assert_eq!(name, family);
            assert_eq!(k == "counter", name.ends_with("_total"), "{line}");
            kind = k;
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert_eq!(series.split('{').next().unwrap(), family, "{line}");
            assert!(["gauge", "counter"].contains(&kind));
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(samples.insert(series.to_owned()), "one sample each: {line}");
        }
    }
    for sample in [
        "volfs_volumes{status=\"attached\"} 1",
        "volfs_operations_total{verb=\"attach\",outcome=\"done\"} 5",
        "volfs_refusals_total{errno=\"EBUSY\"} 3",
        "volfs_operations_in_flight{verb=\"resize\"} 1",
        "volfs_forced_detaches_total 2",
        "volfs_component_state{component=\"cloud\",state=\"ok\"} 1",
    ] {
        assert!(text.lines().any(|l| l == sample), "{sample}\n{text}");
    }
}

#[test]
fn a_callers_name_cannot_break_a_row() {
    let mut w = world();
    let mut row = history_row(Verb::Attach, Outcome::Done);
    row.caller = Arc::new(Caller { comm: "x\ny\tz".into(), ..root() });
    w.history.push_back(Arc::new(row));
    assert!(of(w, "history").contains("\tx\\012y\\011z\t"));
}
