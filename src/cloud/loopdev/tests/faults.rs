//! Stores that are missing, foreign or damaged, crashes, and measuring.

use super::*;

#[tokio::test]
async fn a_store_that_is_not_there_is_unreachable_and_never_empty() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    let asked = Survey { volumes: vec![v], vms: vec![store.host()], ..Survey::default() };
    let away = store.options.dir.with_extension("away");
    fs::rename(&store.options.dir, &away).unwrap();
    for _ in 0..2 {
        unreachable(cloud.find(v).await);
        unreachable(cloud.find(VolumeId::random()).await);
        unreachable(cloud.find_created(Fence::random()).await);
        unreachable(cloud.survey(&asked).await);
        unreachable(cloud.survey(&Survey { volumes: vec![v], ..Survey::default() }).await);
        unreachable(cloud.create(&call(), &new(MIB)).await);
        unreachable(cloud.attach(&call(), v, store.host(), None).await);
        unreachable(cloud.detach(&call(), v, store.host(), false).await);
        unreachable(cloud.resize(&call(), v, MIB).await);
        unreachable(cloud.delete(&call(), v, true).await);
        unreachable(cloud.exchange_mark(&call(), v, None, None).await);
        unreachable(cloud.vm(store.host()).await);
        unreachable(cloud.vm(VmId::random()).await);
        // And so is an empty or another store in its place.
        if !store.options.dir.exists() {
            let other = Store::new();
            other.open();
            fs::rename(&other.options.dir, &store.options.dir).unwrap();
        }
    }
    fs::remove_dir_all(&store.options.dir).unwrap();
    fs::rename(&away, &store.options.dir).unwrap();
    assert!(cloud.find(v).await.unwrap().is_some());
}

#[test]
fn a_directory_of_somebody_else_is_not_taken() {
    let store = Store::new();
    fs::create_dir(&store.options.dir).unwrap();
    fs::write(store.options.dir.join("letter.txt"), "dear").unwrap();
    let open = LoopCloud::open(store.options.clone()).map(drop);
    assert!(unreachable(open).contains("not a loop store"));
    assert_eq!(fs::read_dir(&store.options.dir).unwrap().count(), 1);
    fs::write(
        store.options.dir.join("provider.json"),
        format!(r#"{{"provider":"volfs-loop","version":99,"instance":"{}"}}"#, VolumeId::random()),
    )
    .unwrap();
    assert!(unreachable(LoopCloud::open(store.options.clone()).map(drop)).contains("version 99"));
}

#[tokio::test]
async fn a_damaged_volume_names_its_file_and_hides_no_other() {
    let store = Store::new();
    let cloud = store.open();
    let (good, bad) = (made(&cloud).await, made(&cloud).await);
    let path = store.file(bad, "meta.json");
    let sound = fs::read(&path).unwrap();
    let record = Some(label(1).mark.record);
    let other_id = String::from_utf8(sound.clone()).unwrap().replace(&bad.to_string(), &good.to_string());
    for damage in [Some(&b"{\"id\":"[..]), Some(&b""[..]), Some(other_id.as_bytes()), None] {
        match damage {
            Some(bytes) => fs::write(&path, bytes).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let name = path.display().to_string();
        assert!(ambiguous(cloud.find(bad).await).contains(&name));
        assert!(ambiguous(cloud.attach(&call(), bad, store.host(), None).await).contains(&name));
        assert!(ambiguous(cloud.detach(&call(), bad, store.host(), false).await).contains(&name));
        assert!(ambiguous(cloud.delete(&call(), bad, true).await).contains(&name));
        let by_id = Survey { volumes: vec![good, bad], ..Survey::default() };
        assert!(ambiguous(cloud.survey(&by_id).await).contains(&name));
        let by_vm = Survey { vms: vec![VmId::random()], ..Survey::default() };
        assert!(ambiguous(cloud.survey(&by_vm).await).contains(&name));
        let others = Survey { volumes: vec![good], vms: vec![store.host()], record, ..Survey::default() };
        assert_eq!(cloud.survey(&others).await.unwrap().iter().map(|v| v.id).collect::<Vec<_>>(), [good]);
        made(&cloud).await;
        let ids: Vec<_> =
            cloud.survey(&others).await.unwrap().into_iter().map(|v| v.id).filter(|v| *v != good).collect();
        for id in ids {
            cloud.delete(&call(), id, true).await.unwrap();
        }
        cloud.attach(&call(), good, store.host(), None).await.unwrap();
        cloud.detach(&call(), good, store.host(), false).await.unwrap();
        store.open();
    }
    fs::write(&path, sound).unwrap();
    assert!(cloud.find(bad).await.unwrap().is_some());
    OpenOptions::new().write(true).open(store.file(bad, "data.img")).unwrap().set_len(512).unwrap();
    assert!(ambiguous(cloud.find(bad).await).contains("data.img"));
}

#[tokio::test]
async fn fields_of_a_newer_version_survive_a_change() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    store.edit(v, |m| m["later"] = serde_json::json!({"a": [1, 2]}));
    cloud.exchange_mark(&call(), v, Some(label(1).mark), None).await.unwrap();
    assert_eq!(store.meta(v)["later"], serde_json::json!({"a": [1, 2]}));
}

#[tokio::test]
async fn a_survey_shows_what_was_asked_for_and_changes_behind_our_back() {
    let store = Store::new();
    // Everything is remembered at once.
    let cloud = LoopCloud::open_caching(store.options.clone(), Duration::ZERO).unwrap();
    let (a, b, c, d) = (made(&cloud).await, made(&cloud).await, made(&cloud).await, made(&cloud).await);
    let (vm, record) = (VmId::random(), RecordId::random());
    cloud.attach(&call(), a, vm, None).await.unwrap();
    let theirs = Label { mark: Mark { record, epoch: 5 }, ..label(1) };
    cloud.exchange_mark(&call(), b, Some(label(1).mark), Some(&theirs)).await.unwrap();
    let asked =
        Survey { volumes: vec![c, VolumeId::random(), c], vms: vec![vm], record: Some(record), ..Survey::default() };
    let ids = async || {
        let mut ids: Vec<_> = cloud.survey(&asked).await.unwrap().into_iter().map(|v| v.id).collect();
        ids.sort();
        ids
    };
    let sorted = |mut ids: Vec<VolumeId>| {
        ids.sort();
        ids
    };
    assert_eq!(ids().await, sorted(vec![a, b, c]));
    assert_eq!(cloud.survey(&Survey { volumes: vec![d, d], ..Survey::default() }).await.unwrap().len(), 1);
    store.edit(a, |m| m["attached"]["vm"] = serde_json::json!(VmId::random()));
    assert_eq!(ids().await, sorted(vec![b, c]));
    store.edit(d, |m| m["mark"] = serde_json::json!(theirs.mark.to_string()));
    assert_eq!(ids().await, sorted(vec![b, c, d]));
    fs::write(store.file(d, "meta.json"), "{}").unwrap();
    assert!(ambiguous(cloud.survey(&asked).await).contains("meta.json"));
}

#[tokio::test]
async fn a_crash_at_any_point_leaves_a_settled_truth() {
    let store = Store::new();
    let host = store.host();
    let made_by_child = VolumeId::random();
    for (point, there) in [("loop.create.before", false), ("loop.create.built", false), ("loop.create.after", true)] {
        store.killed(point, "create", made_by_child);
        assert_eq!(store.open().find(made_by_child).await.unwrap().is_some(), there, "{point}");
        let left = fs::read_dir(store.options.dir.join("volumes")).unwrap().count();
        assert_eq!(left, usize::from(there), "{point}");
    }
    let v = made_by_child;
    let watcher = store.open();
    for (point, attached) in [
        ("loop.attach.before", false),
        ("loop.attach.intent", false),
        ("loop.attach.bound", true),
        ("loop.attach.after", true),
    ] {
        store.killed(point, "attach", v);
        let expected = attached.then_some(host);
        assert_eq!(at(&watcher, v).await, expected, "{point}: before recovery");
        assert_eq!(store.bindings(v).len(), usize::from(attached), "{point}");
        let cloud = store.open();
        assert_eq!(at(&cloud, v).await, expected, "{point}");
        assert_eq!(store.meta(v)["intent"], serde_json::Value::Null, "{point}");
        cloud.attach(&call(), v, host, None).await.unwrap();
        store.node(v);
        cloud.detach(&call(), v, host, false).await.unwrap();
    }
    for (point, attached) in [
        ("loop.detach.before", true),
        ("loop.detach.intent", true),
        ("loop.detach.cleared", false),
        ("loop.detach.after", false),
    ] {
        watcher.attach(&call(), v, host, None).await.unwrap();
        store.killed(point, "detach", v);
        let expected = attached.then_some(host);
        assert_eq!(at(&watcher, v).await, expected, "{point}: before recovery");
        let cloud = store.open();
        assert_eq!(at(&cloud, v).await, expected, "{point}");
        assert_eq!(store.meta(v)["intent"], serde_json::Value::Null, "{point}");
        assert_eq!(store.bindings(v).len(), usize::from(attached), "{point}");
        cloud.detach(&call(), v, host, false).await.unwrap();
        assert_eq!(store.bindings(v), []);
    }
    watcher.attach(&call(), v, host, None).await.unwrap();
    for (point, size) in [
        ("loop.resize.before", MIB),
        ("loop.resize.intent", 2 * MIB),
        ("loop.resize.grown", 2 * MIB),
        ("loop.resize.after", 2 * MIB),
    ] {
        // Each from one MiB again, as nobody but a test would make it.
        let device = store.node(v);
        OpenOptions::new().write(true).open(store.file(v, "data.img")).unwrap().set_len(MIB).unwrap();
        store.edit(v, |m| m["size"] = serde_json::json!(MIB));
        sys::loop_set_capacity(File::open(&device).unwrap().as_fd()).unwrap();
        store.killed(point, "resize", v);
        let cloud = store.open();
        let found = cloud.find(v).await.unwrap().unwrap();
        assert_eq!(
            (found.size, sys::disk_size(File::open(&device).unwrap().as_fd()).unwrap()),
            (size, size),
            "{point}"
        );
        assert_eq!(cloud.resize(&call(), v, 2 * MIB).await.unwrap(), 2 * MIB);
    }
    watcher.detach(&call(), v, host, false).await.unwrap();
    for (point, epoch) in [("loop.mark.before", 1), ("loop.mark.after", 2)] {
        store.killed(point, "mark", v);
        assert_eq!(watcher.find(v).await.unwrap().unwrap().mark, Some(label(epoch).mark), "{point}");
    }
    for (point, there) in [("loop.delete.before", true), ("loop.delete.after", false)] {
        store.killed(point, "delete", v);
        assert_eq!(watcher.find(v).await.unwrap().is_some(), there, "{point}");
    }
}

#[tokio::test]
async fn a_crash_within_the_test_for_users_is_taken_back_at_the_next_start() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    cloud.attach(&call(), v, store.host(), None).await.unwrap();
    let node = store.node(v);
    let user = File::open(&node).unwrap();
    store.killed("loop.detach.flagged", "detach", v);
    assert!(store.bindings(v)[0].autoclear);
    let cloud = store.open();
    assert_eq!(store.node(v), node);
    drop(user);
    assert_eq!(store.node(v), node);
    assert_eq!(at(&cloud, v).await, Some(store.host()));
    // Without a user the killed process's own close ends it, and that is a finished detach.
    store.killed("loop.detach.flagged", "detach", v);
    assert_eq!(at(&store.open(), v).await, None);
}

#[tokio::test]
async fn failpoints_answer_in_the_three_kinds() {
    let store = Store::new();
    let v = VolumeId::random();
    assert_eq!(store.child("loop.refuse=fail", "create", v).code(), Some(10));
    assert_eq!(store.child("loop.unreachable=fail", "create", v).code(), Some(11));
    assert_eq!(store.open().find(v).await.unwrap(), None);
    assert_eq!(store.child("loop.ambiguous=fail", "create", v).code(), Some(12));
    assert!(store.open().find(v).await.unwrap().is_some());
    assert_eq!(store.child("loop.attach.bound=fail", "attach", v).code(), Some(12));
    assert_eq!(store.child("", "attach", v).code(), Some(0));
    store.node(v);
}

/// `cargo test --release ten_thousand -- --ignored --nocapture` tells the times.
#[tokio::test]
#[ignore = "makes 10 000 volumes: for measuring"]
async fn ten_thousand_volumes_are_surveyed() {
    let store = Store::new();
    let cloud = store.open();
    let mut ids = Vec::new();
    for n in 0..10_000u64 {
        let id = VolumeId::random();
        let dir = store.options.dir.join("volumes").join(id.to_string());
        fs::create_dir(&dir).unwrap();
        File::create(dir.join("data.img")).unwrap().set_len(MIB).unwrap();
        let meta =
            serde_json::json!({"id": id, "name": format!("v{n}"), "size": MIB, "mark": label(1).mark.to_string()});
        fs::write(dir.join("meta.json"), serde_json::to_vec_pretty(&meta).unwrap()).unwrap();
        ids.push(id);
    }
    let by_record = Survey { record: Some(label(1).mark.record), ..Survey::default() };
    let by_id = Survey { volumes: ids.clone(), ..Survey::default() };
    for (what, survey) in [("record, fresh files", &by_record), ("ids", &by_id)] {
        let start = std::time::Instant::now();
        assert_eq!(cloud.survey(survey).await.unwrap().len(), 10_000);
        println!("{what}: {:?}", start.elapsed());
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    for what in ["record, first", "record, again"] {
        let start = std::time::Instant::now();
        assert_eq!(cloud.survey(&by_record).await.unwrap().len(), 10_000);
        println!("{what}: {:?}", start.elapsed());
    }
    let start = std::time::Instant::now();
    cloud.attach(&call(), ids[0], store.host(), None).await.unwrap();
    println!("attach: {:?}", start.elapsed());
    let start = std::time::Instant::now();
    cloud.detach(&call(), ids[0], store.host(), false).await.unwrap();
    println!("detach: {:?}", start.elapsed());
    let start = std::time::Instant::now();
    store.open();
    println!("open: {:?}", start.elapsed());
}

#[tokio::test]
async fn a_new_volume_reads_as_zeroes() {
    let store = Store::new();
    let cloud = store.open();
    let v = made(&cloud).await;
    cloud.attach(&call(), v, store.host(), None).await.unwrap();
    let mut device = OpenOptions::new().read(true).write(true).open(store.node(v)).unwrap();
    device.write_all(&[0xff; 4096]).unwrap();
    device.sync_all().unwrap();
    drop(device);
    cloud.detach(&call(), v, store.host(), false).await.unwrap();
    cloud.delete(&call(), v, true).await.unwrap();
    let w = made(&cloud).await;
    cloud.attach(&call(), w, store.host(), None).await.unwrap();
    let mut device = File::open(store.node(w)).unwrap();
    let mut bytes = Vec::new();
    device.seek(SeekFrom::Start(0)).unwrap();
    device.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, MIB);
    assert!(bytes.iter().all(|b| *b == 0));
}
