use super::*;

fn again(memory: &Memory) -> (Memory, Left) {
    Memory::open(memory.file.try_clone().unwrap()).unwrap()
}

fn asked(unique: u64, command: Option<&[u8]>) -> Asked {
    Asked {
        unique,
        node: 1 << 62,
        uid: 1000,
        gid: 100,
        pid: 4711,
        since: 5,
        fence: command.map(|_| Uuid::from_u128(unique.into())),
        command: command.map(<[u8]>::to_vec),
        waits: false,
    }
}

fn left(memory: &Memory) -> Vec<Asked> {
    again(memory).1.requests.into_iter().map(|(_, asked)| asked).collect()
}

#[test]
fn what_was_not_answered_is_there_for_the_next_and_what_was_is_not() {
    let memory = Arc::new(Memory::create().unwrap());
    let long = vec![b'x'; 5000];
    let all = [asked(2, Some(b"attach\n")), asked(4, None), asked(6, Some(&long)), asked(8, Some(b""))];
    let mut kept: Vec<Kept> = all.iter().map(|one| memory.ask(one)).collect();
    assert_eq!(left(&memory), all);
    drop(kept.remove(1));
    assert_eq!(left(&memory), [all[0].clone(), all[2].clone(), all[3].clone()]);
    kept[0].joined(Uuid::from_u128(99));
    kept[0].waits();
    let first = &left(&memory)[0];
    assert_eq!((first.fence, first.waits), (Some(Uuid::from_u128(99)), true));
    // The next daemon uses free places only, and frees those that it answers.
    let (next, found) = again(&memory);
    let next = Arc::new(next);
    let more = next.ask(&asked(10, None));
    assert_eq!(left(&next).len(), 4);
    drop(next.kept(found.requests[0].0));
    assert_eq!(left(&next).iter().map(|a| a.unique).collect::<Vec<_>>(), [10, 6, 8]);
    drop(more);
    std::mem::forget(kept);
}

#[test]
fn a_request_that_was_sent_again_is_known_by_its_first_number() {
    let memory = Arc::new(Memory::create().unwrap());
    let _kept = memory.ask(&asked(2 | 1 << 63, None));
    assert_eq!(left(&memory)[0].unique, 2);
}

#[test]
fn more_requests_than_places_are_answered_and_not_kept() {
    let mut places = Places::new(&BTreeSet::new(), 0, 2);
    assert_eq!((places.take(), places.take(), places.take()), (Some((0, true)), Some((1, true)), None));
    places.free.insert(0);
    assert_eq!(places.take(), Some((0, false)));
}

#[test]
fn a_handle_means_the_same_to_the_next() {
    let memory = Memory::create().unwrap();
    let place = |given| Place { given, position: given + 1, skip: given + 2 };
    let stream = Open { node: 7, place: place(10), before: place(4), poll: Some(3), ..Open::default() };
    let value = Open { node: 8, hash: 1, length: 2, ..Open::default() };
    let (a, b) = (memory.open_handle(&stream), memory.open_handle(&Open::default()));
    memory.set_handle(b, &value);
    assert_eq!(again(&memory).1.handles, [(a, stream), (b, value)]);
    memory.close_handle(a);
    let (next, found) = again(&memory);
    assert_eq!(found.handles, [(b, value)]);
    let c = next.open_handle(&value);
    // No two that are open have one number: each has a place of its own.
    assert_eq!((c & (HANDLES - 1), b & (HANDLES - 1)), (a & (HANDLES - 1), 1));
}

#[test]
fn events_go_on_in_order() {
    let memory = Memory::create().unwrap();
    for seq in 0..EVENTS + 3 {
        memory.event(seq, (seq % 2 == 0).then_some(5), &format!("{{\"n\":{seq}}}\n"));
    }
    memory.event(EVENTS + 3, None, &"x".repeat(40_000));
    let events = again(&memory).1.events;
    assert_eq!((events.len() as u64, events[0].seq), (EVENTS, 4));
    let last = &events[events.len() - 2];
    assert_eq!((last.job, last.line.as_str()), (Some(5), "{\"n\":4098}\n"));
    assert_eq!(events[events.len() - 1].line, "{\"lost\":1}\n");
}

#[test]
fn the_connections_facts_are_kept_and_who_serves() {
    let memory = Memory::create().unwrap();
    assert_eq!(again(&memory).1.connection, None);
    let facts = Connection {
        mountpoint: "/run/volfs".into(),
        device: "0:52".into(),
        offered: u64::MAX,
        asked: 1,
        options: "allow_other".into(),
        resends: true,
    };
    memory.connected(&facts).unwrap();
    memory.serving(12);
    memory.serving(12);
    memory.serials_below(77);
    let (who, connection) = Memory::who(&memory.file).unwrap();
    assert_eq!((who.keeper, who.daemon, who.starts), (12, std::process::id(), 2));
    let left = again(&memory).1;
    assert_eq!((left.connection, left.serial, connection), (Some(facts.clone()), 77, Some(facts.clone())));
    let long = Connection { mountpoint: "/x".repeat(4000).into(), ..facts };
    assert!(memory.connected(&long).is_err());
}

#[test]
fn what_is_no_memory_of_ours_is_refused() {
    let file = File::from(memfd_create("other", MemfdFlags::CLOEXEC).unwrap());
    assert!(Memory::open(file.try_clone().unwrap()).is_err());
    file.set_len(LENGTH).unwrap();
    assert!(Memory::open(file.try_clone().unwrap()).is_err());
    file.write_all_at(&bytes(&[MAGIC, LAYOUT + 1]), 0).unwrap();
    let words = Memory::open(file).err().unwrap().to_string();
    assert!(words.contains("another version"), "{words}");
}
