use super::*;
use crate::fs::testing::{Asked, HOST, OTHER_VM, add_snapshot, add_volume, edit, operation, snap, vm, vol, world};
use crate::model::{OpId, SnapRow, Verb};

fn asked() -> Asked {
    Asked::new(world())
}

#[test]
fn the_root_holds_what_the_contract_names() {
    let names = asked().names("").unwrap();
    let expected = "control devices error events exports health history jobs limits metrics operations problems \
                    table unclaimed version vms volumes";
    assert_eq!(names.join(" "), expected);
}

#[test]
fn a_job_holds_what_the_contract_names() {
    let a = asked();
    assert_eq!(a.names("jobs").unwrap(), ["a", "b"]);
    let expected = "control disks error history hold status table vm_name volumes";
    assert_eq!(a.names("jobs/a").unwrap().join(" "), expected);
    assert_eq!(a.names("jobs/a/disks").unwrap(), ["disk-2000", "disk-2001"]);
    assert_eq!(a.names("jobs/a/volumes").unwrap(), [vol(1).to_string(), vol(2).to_string()]);
}

#[test]
fn a_volume_holds_what_the_contract_names_and_block_only_with_a_device() {
    let a = asked();
    let without = "cloud_state control device device_id error history holders incarnation info.json name owner serial \
                   size snapshots status vm";
    assert_eq!(a.names(&format!("jobs/a/volumes/{}", vol(2))).unwrap().join(" "), without);
    let with = a.names(&format!("jobs/a/volumes/{}", vol(1))).unwrap().join(" ");
    assert_eq!(with, without.replacen("cloud_state", "block cloud_state", 1));
}

#[test]
fn what_is_listed_is_found_as_the_same_node_and_nothing_else_is() {
    let a = asked();
    let mut dirs = vec![(String::new(), Node::ROOT)];
    let mut seen = 0;
    while let Some((path, dir)) = dirs.pop() {
        if matches!(dir, Node::Vm(_)) && path.ends_with(&vm(HOST).to_string()) {
            continue;
        }
        let entries = list(&a.view(), dir).unwrap();
        assert_eq!((entries[0].name.as_str(), entries[0].node), (".", dir));
        assert_eq!(entries[1].name, "..");
        assert_eq!(lookup(&a.view(), dir, "no-such-name"), Err(Errno::ENOENT), "{path}");
        assert!(entries[2..].is_sorted_by(|a, b| a.name < b.name), "{path}");
        for entry in &entries[2..] {
            seen += 1;
            let node = lookup(&a.view(), dir, &entry.name).unwrap();
            assert_eq!(node, entry.node, "{path}/{}", entry.name);
            let (time, _) = meta(&a.view(), node).unwrap();
            assert!(time.is_none_or(|t| t.0 > 0));
            match node.kind() {
                Kind::Dir => {
                    let back = list(&a.view(), node);
                    if let Ok(back) = back {
                        assert_eq!(back[1].node, dir, "{path}/{}/..", entry.name);
                    }
                    dirs.push((format!("{path}/{}", entry.name), node));
                }
                Kind::Link => {
                    // Every symlink leads to a directory that is there.
                    let target = link(&a.view(), node).unwrap();
                    let mut at: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
                    for part in target.split('/') {
                        if part == ".." { at.pop().map(|_| ()).unwrap() } else { at.push(part) }
                    }
                    assert_eq!(a.find(&at.join("/")).unwrap().kind(), Kind::Dir, "{path}/{} -> {target}", entry.name);
                }
                Kind::File | Kind::Block => {}
            }
        }
    }
    assert!(seen > 90, "{seen}");
}

#[test]
fn events_lists_nothing_and_its_streams_are_found() {
    let a = asked();
    assert_eq!(a.names("events").unwrap(), [""; 0]);
    assert_eq!(a.find("events/all"), Ok(Node::Root(RootFile::EventsAll)));
    assert_eq!(a.find("events/a"), Ok(Node::Job(JobRow(1), JobFile::Events)));
    assert_eq!(a.find("events/nobody"), Err(Errno::ENOENT));
}

#[test]
fn symlinks_lead_to_the_one_place_of_a_volume() {
    let a = asked();
    let target = |path: &str| link(&a.view(), a.find(path).unwrap()).unwrap();
    assert_eq!(target(&format!("volumes/{}", vol(1))), format!("../jobs/a/volumes/{}", vol(1)));
    assert_eq!(target(&format!("volumes/{}", vol(4))), format!("../unclaimed/{}", vol(4)));
    assert_eq!(target("devices/loop7"), format!("../jobs/a/volumes/{}", vol(1)));
    assert_eq!(target("devices/loop9"), format!("../unclaimed/{}", vol(4)));
    assert_eq!(target("jobs/a/disks/disk-2001"), format!("../volumes/{}", vol(2)));
    let of_vm = format!("vms/{}", vm(OTHER_VM));
    assert_eq!(target(&format!("{of_vm}/{}", vol(3))), format!("../../jobs/b/volumes/{}", vol(3)));
    assert_eq!(target(&format!("{of_vm}/{}", vol(4))), format!("../../unclaimed/{}", vol(4)));
}

#[test]
fn no_path_in_one_job_leads_to_anothers_volume() {
    let a = asked();
    assert_eq!(a.find(&format!("jobs/a/volumes/{}", vol(3))), Err(Errno::ENOENT));
    assert_eq!(a.find("jobs/a/disks/data"), Err(Errno::ENOENT));
    assert_eq!(a.find(&format!("jobs/a/volumes/{}", vol(4))), Err(Errno::ENOENT), "unclaimed");
    let upper = vol(1).to_string().to_uppercase();
    assert_eq!(a.find(&format!("jobs/a/volumes/{upper}")), Err(Errno::ENOENT), "one spelling");
}

#[test]
fn a_stale_view_of_a_vm_is_no_empty_directory() {
    let a = asked();
    assert_eq!(a.names(&format!("vms/{}", vm(HOST))), Err(Errno::EHOSTUNREACH));
    assert_eq!(a.find(&format!("vms/{}/{}", vm(HOST), vol(1))), Err(Errno::EHOSTUNREACH));
    assert_eq!(a.find(&format!("vms/{}", vm(1))), Err(Errno::ENOENT), "no command named it");
}

#[test]
fn a_volume_of_a_vm_is_listed_even_if_nothing_else_knows_it() {
    let mut w = world();
    w.unclaimed.clear();
    let a = Asked::new(w);
    let names = a.names(&format!("vms/{}", vm(OTHER_VM))).unwrap();
    assert_eq!(names, [vol(3).to_string(), vol(4).to_string()]);
}

#[test]
fn block_and_exports_are_the_mapping_and_end_with_it() {
    let a = asked();
    let block = a.find(&format!("jobs/a/volumes/{}/block", vol(1))).unwrap();
    let export = a.find(&format!("exports/{}", vol(1))).unwrap();
    assert_eq!(block, Node::Mapping(MapRow(7), MapFile::Block));
    assert_eq!(export, Node::Mapping(MapRow(7), MapFile::Export));
    let (_, device) = meta(&a.view(), block).unwrap();
    assert_eq!(device, Some(DevNo { major: 7, minor: 7 }));
    assert_eq!(a.names("exports").unwrap(), [vol(1).to_string()]);
    // The kernel no longer has it: the snapshot alone is not believed.
    a.fake.gone.lock().push(MapRow(7));
    assert_eq!(meta(&a.view(), block), Err(Errno::ENODEV));
    assert_eq!(meta(&a.view(), export), Err(Errno::ENODEV));
    assert_eq!(a.find(&format!("jobs/a/volumes/{}/block", vol(1))), Err(Errno::ENOENT));
    assert_eq!(a.names("exports").unwrap(), [""; 0]);
    assert_eq!(a.find(&format!("exports/{}", vol(1))), Err(Errno::ENOENT));
}

#[test]
fn while_detaching_the_device_is_withdrawn_from_the_first_moment() {
    let mut w = world();
    edit(&mut w, 11, |v| {
        v.running = Some(crate::engine::world::Running { op: OpId(1), verb: Verb::Detach, withdrawn: true })
    });
    let a = Asked::new(w);
    assert_eq!(a.find(&format!("jobs/a/volumes/{}/block", vol(1))), Err(Errno::ENOENT));
    assert_eq!(a.names("exports").unwrap(), [""; 0]);
    assert_eq!(meta(&a.view(), Node::Mapping(MapRow(7), MapFile::Block)), Err(Errno::ENODEV));
    assert_eq!(a.text(&format!("jobs/a/volumes/{}/device", vol(1))), Err(Errno::ENODEV));
}

#[test]
fn what_was_released_moved_or_forgotten_is_stale() {
    let mut w = world();
    // vol(2) moved to job b: a new ownership row.
    w.volumes.remove(&DiskRow(12));
    add_volume(&mut w, 14, 2, "disk-2001", vol(2));
    w.jobs.remove(&JobRow(9));
    let a = Asked::new(w);
    for node in [
        Node::Volume(DiskRow(12), VolumeFile::Dir),
        Node::Volume(DiskRow(12), VolumeFile::Status),
        Node::Control(Target::Volume(DiskRow(12)), 3),
        Node::Job(JobRow(9), JobFile::Status),
        Node::Control(Target::Job(JobRow(9)), 3),
        Node::Operation(OpId(9)),
        Node::Unclaimed(Hash40::of(vol(9).0), UnclaimedFile::Dir),
    ] {
        assert_eq!(meta(&a.view(), node), Err(Errno::ESTALE), "{node:?}");
    }
    assert_eq!(lookup(&a.view(), Node::Volume(DiskRow(12), VolumeFile::Dir), "status"), Err(Errno::ESTALE));
    assert_eq!(list(&a.view(), Node::Volume(DiskRow(12), VolumeFile::Dir)), Err(Errno::ESTALE));
    assert!(a.find(&format!("jobs/b/volumes/{}/status", vol(2))).is_ok());
}

#[test]
fn a_snapshot_is_a_file_of_its_volume_under_an_id_of_its_own_and_ends_as_stale() {
    let a = asked();
    let dir = format!("jobs/a/volumes/{}/snapshots", vol(1));
    assert_eq!(a.names(&dir).unwrap(), ["before-test", "daily"]);
    let ours = a.find(&format!("{dir}/before-test")).unwrap();
    let foreign = a.find(&format!("{dir}/daily")).unwrap();
    assert_eq!((ours, foreign), (Node::Snapshot(SnapRow(31)), Node::ForeignSnapshot(Hash40::of(snap(32).0))));
    for node in [ours, foreign] {
        assert_eq!((node.kind(), node.mode(), Node::parse(node.id())), (Kind::File, 0o444, Some(node)));
        assert_eq!(meta(&a.view(), node), Ok((Some(crate::fs::testing::at(21)), None)));
    }
    for none in ["daily2", ".", "a b", &snap(31).to_string()] {
        assert_eq!(a.find(&format!("{dir}/{none}")), Err(Errno::ENOENT), "{none}");
    }
    assert_eq!(a.names(&format!("jobs/a/volumes/{}/snapshots", vol(2))).unwrap(), [""; 0]);
    assert_eq!(lookup(&a.view(), Node::Volume(DiskRow(99), VolumeFile::Snapshots), "daily"), Err(Errno::ESTALE));
    // Deleted, and another taken of the same name: it is another file.
    let mut w = world();
    edit(&mut w, 11, |v| {
        v.snapshots = Default::default();
        v.times.snapshots = crate::fs::testing::at(50);
    });
    w.snapshots.clear();
    w.foreign_snapshots.clear();
    add_snapshot(&mut w, 11, 33, "before-test", true);
    add_snapshot(&mut w, 11, 34, "a-neighbour", true);
    add_snapshot(&mut w, 11, 35, "daily", false);
    add_snapshot(&mut w, 11, 36, "another", false);
    let a = Asked::new(w);
    for node in [ours, foreign] {
        assert_eq!(meta(&a.view(), node), Err(Errno::ESTALE));
    }
    assert_eq!(a.find(&format!("{dir}/before-test")), Ok(Node::Snapshot(SnapRow(33))));
    for (name, n) in [("before-test", 33), ("a-neighbour", 34), ("daily", 35), ("another", 36)] {
        let text = a.text(&format!("{dir}/{name}")).unwrap();
        assert!(text.contains(&snap(n).to_string()) && text.contains(name), "{name}: {text}");
    }
    let (time, _) = meta(&a.view(), a.find(&dir).unwrap()).unwrap();
    assert_eq!(time, Some(crate::fs::testing::at(50)));
}

#[test]
fn operations_are_found_by_their_number_and_listed_by_it() {
    let mut w = world();
    for id in [2, 9, 10, 100] {
        w.operations.insert(OpId(id), Arc::new(operation(id, Verb::Attach)));
    }
    let a = Asked::new(w);
    assert_eq!(a.names("operations").unwrap(), ["2", "9", "10", "100"]);
    assert_eq!(a.find("operations/9"), Ok(Node::Operation(OpId(9))));
    for none in ["09", "+9", "3", "x"] {
        assert_eq!(a.find(&format!("operations/{none}")), Err(Errno::ENOENT));
    }
}

#[test]
fn modes_are_those_of_the_contract() {
    let a = asked();
    let v = format!("jobs/a/volumes/{}", vol(1));
    for (path, mode) in [
        ("", 0o755),
        ("jobs", 0o775),
        ("jobs/a", 0o755),
        ("jobs/a/volumes", 0o755),
        ("control", 0o664),
        ("jobs/a/control", 0o664),
        ("jobs/a/vm_name", 0o664),
        ("jobs/a/hold", 0o664),
        ("jobs/a/status", 0o444),
        ("events/all", 0o444),
        (&format!("{v}/control"), 0o664),
        (&format!("{v}/block"), 0o660),
        (&format!("exports/{}", vol(1)), 0o660),
        (&format!("{v}/device"), 0o444),
    ] {
        assert_eq!(a.find(path).unwrap().mode(), mode, "{path}");
    }
}

#[test]
fn an_export_template_holds_the_uuid_once() {
    for bad in ["", "disk", "{uuid}{uuid}", "a/{uuid}", ".{uuid}", "{job}-{uuid}", "a b{uuid}"] {
        assert!(ExportNames::parse(bad).is_err(), "{bad}");
    }
    let names = ExportNames::parse("vol-{uuid}.raw").unwrap();
    assert_eq!(names.volume(&names.name(vol(1))), Some(vol(1)));
    assert_eq!(names.volume(&vol(1).to_string()), None);
    assert_eq!(names.volume("vol-.raw"), None);
}
