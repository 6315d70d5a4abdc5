use proptest::prelude::*;

use super::*;

const U: &str = "2aff4799-1111-4222-8333-444455556666";

fn ok(text: &str, place: Place) -> Action {
    match parse(text.as_bytes(), place) {
        Ok(command) => command.action,
        Err(e) => panic!("{text:?}: {e}"),
    }
}

fn sentence(text: &str, place: Place) -> String {
    let error = match parse(text.as_bytes(), place) {
        Err(e) => e,
        Ok(c) => panic!("{text:?} was taken as {c:?}"),
    };
    assert_eq!(error.errno(), crate::error::Errno::EINVAL, "{text:?}: {error}");
    error.to_string()
}

#[test]
fn every_usage_line_is_one_the_parser_takes() {
    for place in [Place::Root, Place::Job, Place::Volume] {
        for verb in Verb::ALL {
            assert_eq!(place.usage(verb).is_some(), place.verbs().contains(&verb), "{verb} at {place:?}");
            let Some(usage) = place.usage(verb) else { continue };
            let full = usage
                .replace("[vm=UUID] [root | device_id=N]", &format!("vm={U} device_id=5"))
                .replace("UUID or name", "z1")
                .replace("name=...", "name=a b")
                .replace("UUID", U)
                .replace("RECORD", U)
                .replace("SIZE", "4G")
                .replace(['[', ']'], "");
            let full = if verb == Verb::Cancel || verb == Verb::Abandon { full.replace("ID", "7") } else { full };
            assert_eq!(ok(&full, place).verb(), verb, "{full}");
        }
    }
}

#[test]
fn a_verb_is_taken_only_where_it_belongs_and_in_lower_case() {
    assert!(sentence("resize 4G", Place::Job).contains("belongs into a volume's control"));
    assert!(sentence("create d 4G", Place::Volume).contains("belongs into a job's control"));
    assert!(sentence("abandon 4", Place::Job).contains("belongs into the root's control"));
    assert!(sentence("Attach", Place::Volume).contains("write it as `attach`"));
    assert!(sentence("mkdir x", Place::Root).contains("here are reconcile, cancel, abandon"));
    assert!(sentence("frobnicate", Place::Root).contains("`frobnicate`"));
}

#[test]
fn blanks_and_newlines_around_a_command_do_not_matter() {
    let plain = ok("attach", Place::Volume);
    for text in ["attach\n", "attach\n\n", " attach ", "\tattach\t\n", "\nattach", "attach \n \n"] {
        assert_eq!(ok(text, Place::Volume), plain, "{text:?}");
    }
    assert_eq!(ok("create\td \t 4G", Place::Job), ok("create d 4G", Place::Job));
}

#[test]
fn anything_but_one_line_of_text_is_refused() {
    for text in
        ["", "\n", " \t\n", "attach\ndetach", "attach\0", "att\x1bach", "attach\r\n", "# attach", "#", "a\u{85}"]
    {
        sentence(text, Place::Volume);
    }
    assert!(sentence("attach\ndetach\n", Place::Volume).contains("`detach`"));
    assert!(sentence("attach\r\n", Place::Volume).contains("`\\r`"));
    let error = parse(b"attach \xff", Place::Volume).unwrap_err();
    assert!(error.to_string().contains("byte 8"), "{error}");
}

#[test]
fn a_command_ends_at_4096_bytes() {
    let fill = |n: usize| format!("create d 1 name={}", "x".repeat(n - 16));
    assert_eq!(fill(4096).len(), 4096);
    ok(&fill(4096), Place::Job);
    assert!(sentence(&fill(4097), Place::Job).contains("4097"));
    assert!(sentence(&format!("attach {}", "x".repeat(4000)), Place::Volume).len() < 400);
    assert!(sentence(&format!("disk {}", "x".repeat(4000)), Place::Volume).len() < 400);
}

#[test]
fn a_size_is_bytes_or_powers_of_1024() {
    for (text, bytes) in
        [("1", 1), ("4096", 4096), ("1K", 1 << 10), ("3M", 3 << 20), ("40G", 40 << 30), ("2T", 2 << 40)]
    {
        assert_eq!(size(text).unwrap(), bytes);
    }
    assert_eq!(size("9223372036854775807").unwrap(), LARGEST_SIZE);
    for bad in ["", "0", "0G", "K", "4k", "4GB", "4 G", "-1", "+1", "1.5G", "0x10", "9223372036854775808", "8388608T"] {
        assert!(size(bad).is_err(), "{bad}");
    }
    assert!(size("16777217T").is_err(), "2^64 + 2^40 wraps to 1T without a check");
    assert!(sentence("create d 4k", Place::Job).contains("K, M, G or T"));
}

#[test]
fn name_takes_the_rest_of_the_line() {
    let Action::Create { name, zone, .. } = ok("create d 4G zone=z name= root = of  db timeout=5 nowait ", Place::Job)
    else {
        panic!("not create")
    };
    assert_eq!(name.as_deref(), Some("root = of  db timeout=5 nowait"));
    assert_eq!(zone.as_deref(), Some("z"));
    sentence("create d 4G name=", Place::Job);
    sentence("create d 4G name=a\tb", Place::Job);
    assert!(sentence("attach name=x", Place::Volume).contains("`name=`"));
}

#[test]
fn waiting_is_said_with_every_verb() {
    let c = parse(b"attach timeout=30 nowait", Place::Volume).unwrap();
    assert_eq!((c.timeout, c.nowait), (Some(Duration::from_secs(30)), true));
    let c = parse(b"destroy j timeout=0", Place::Job).unwrap();
    assert_eq!((c.timeout, c.nowait), (Some(Duration::ZERO), false));
    assert_eq!(parse(b"reconcile", Place::Root).unwrap().timeout, None);
    parse(b"cancel 3 timeout=315360000", Place::Root).unwrap();
    for bad in ["timeout=315360001", "timeout=-1", "timeout=1.5", "timeout=", "timeout=5s", "timeout=1 timeout=1"] {
        sentence(&format!("attach {bad}"), Place::Volume);
    }
    sentence("attach nowait nowait", Place::Volume);
}

#[test]
fn what_a_verb_does_not_take_is_named() {
    for (text, word) in [
        ("attach vim=3", "`vim=`"),
        ("attach force", "`force`"),
        ("detach root", "`root`"),
        ("resize 4G 5G", "`5G`"),
        ("resize", "SIZE is missing"),
        ("delete", "UUID is missing"),
        ("reconcile vm=2aff4799-1111-4222-8333-444455556666", "`vm=`"),
        ("attach vm=", "`vm=`"),
        ("attach vm=a vm=b", "twice"),
        ("attach =", "`=`"),
    ] {
        assert!(sentence(text, Place::Volume).contains(word), "{text}: {}", sentence(text, Place::Volume));
    }
    for text in
        ["attach root vm=2aff4799-1111-4222-8333-444455556666", "attach device_id=4", "detach force", "cancel 4"]
    {
        sentence(text, Place::Job);
    }
    for text in ["cancel", "cancel 0", "cancel -1", "cancel 9223372036854775808", "abandon x"] {
        sentence(text, Place::Root);
    }
}

#[test]
fn a_slot_is_root_of_another_vm_or_a_number_but_0_and_3() {
    let vm = VmId::parse(U).unwrap();
    assert_eq!(
        ok(&format!("attach root vm={U}"), Place::Volume),
        Action::Attach { vm: Some(vm), slot: Some(Slot::Root) }
    );
    assert_eq!(ok("attach device_id=4", Place::Volume), Action::Attach { vm: None, slot: Some(Slot::Id(4)) });
    assert!(sentence("attach root", Place::Volume).contains("vm="));
    assert!(sentence("attach device_id=0", Place::Volume).contains("`root`"));
    assert!(sentence("attach device_id=3", Place::Volume).contains("CD"));
    for bad in ["device_id=4294967296", "device_id=x", "device_id=+1", &format!("root device_id=4 vm={U}")] {
        sentence(&format!("attach {bad}"), Place::Volume);
    }
}

#[test]
fn names_that_are_words_of_the_language_can_be_said() {
    assert_eq!(ok("destroy nowait", Place::Job), Action::Destroy { job: JobId::parse("nowait").unwrap() });
    assert_eq!(
        ok("snapshot crash crash", Place::Volume),
        Action::Snapshot { name: SnapshotName::parse("crash").unwrap(), crash: true }
    );
    let c = parse(format!("claim {U} nowait").as_bytes(), Place::Job).unwrap();
    assert!(c.nowait && matches!(c.action, Action::Claim { disk: None, .. }), "{c:?}");
}

#[test]
fn ids_have_one_spelling_in_commands_too() {
    for text in [
        "delete 2AFF4799-1111-4222-8333-444455556666",
        "release 2aff4799111142228333444455556666",
        "delete ../x",
        "attach vm=x",
        "move .hidden",
        "disk a/b",
        "move a=b",
    ] {
        sentence(text, Place::Volume);
    }
    sentence("create d 4G offering=gold", Place::Job);
}

fn text(pattern: &str) -> impl Strategy<Value = String> {
    proptest::string::string_regex(pattern).unwrap()
}

fn uuid_text() -> impl Strategy<Value = String> {
    any::<u128>().prop_map(|n| uuid::Uuid::from_u128(n).hyphenated().to_string())
}

fn action(place: Place) -> BoxedStrategy<Action> {
    use proptest::option::of;
    let volume = || uuid_text().prop_map(|t| VolumeId::parse(&t).unwrap());
    let vm = || of(uuid_text().prop_map(|t| VmId::parse(&t).unwrap()));
    let disk = || text("[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}").prop_map(|t| DiskName::parse(&t).unwrap());
    let snap = || text("[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}|crash|nowait").prop_map(|t| SnapshotName::parse(&t).unwrap());
    let job = || text("[A-Za-z0-9_-][A-Za-z0-9._-]{0,190}|nowait").prop_map(|t| JobId::parse(&t).unwrap());
    let sizes = || 1..=LARGEST_SIZE;
    let op = || (1..=i64::MAX).prop_map(OpId);
    let slot = (vm(), of(prop_oneof![Just(Slot::Root), (4u32..).prop_map(Slot::Id), Just(Slot::Id(1))]))
        .prop_map(|(vm, slot)| if vm.is_none() && slot == Some(Slot::Root) { (vm, None) } else { (vm, slot) });
    let both = prop_oneof![
        (snap(), any::<bool>()).prop_map(|(name, crash)| Action::Snapshot { name, crash }),
        snap().prop_map(|name| Action::Revert { name }),
        snap().prop_map(|name| Action::DeleteSnapshot { name }),
        job().prop_map(|job| Action::Move { job }),
    ];
    match place {
        Place::Root => prop_oneof![
            vm().prop_map(|vm| Action::Reconcile { vm }),
            op().prop_map(|id| Action::Cancel { id: Some(id) }),
            op().prop_map(|id| Action::Abandon { id }),
        ]
        .boxed(),
        Place::Job => prop_oneof![
            (
                disk(),
                sizes(),
                of(uuid_text()),
                of(text("[^ \\t\\pC]{1,20}")),
                of(text("[^ \\pC]([^\\pC]{0,30}[^ \\pC])?"))
            )
                .prop_map(|(disk, size, offering, zone, name)| Action::Create {
                    disk,
                    size,
                    offering,
                    zone,
                    name
                }),
            // `claim UUID nowait` is the flag, never a disk of that name.
            (volume(), of(disk().prop_filter("the flag", |d| d.as_str() != "nowait")), of(uuid_text())).prop_map(
                |(volume, disk, from)| Action::Claim { volume, disk, from: from.map(|t| RecordId::parse(&t).unwrap()) }
            ),
            vm().prop_map(|vm| Action::Attach { vm, slot: None }),
            vm().prop_map(|vm| Action::Detach { vm, force: false }),
            job().prop_map(|job| Action::Destroy { job }),
            Just(Action::Cancel { id: None }),
            both,
        ]
        .boxed(),
        Place::Volume => prop_oneof![
            slot.prop_map(|(vm, slot)| Action::Attach { vm, slot }),
            (vm(), any::<bool>()).prop_map(|(vm, force)| Action::Detach { vm, force }),
            sizes().prop_map(|size| Action::Resize { size }),
            (volume(), any::<bool>()).prop_map(|(volume, expunge)| Action::Delete { volume, expunge }),
            volume().prop_map(|volume| Action::Release { volume }),
            disk().prop_map(|name| Action::Disk { name }),
            Just(Action::Reconcile { vm: None }),
            both,
        ]
        .boxed(),
    }
}

fn any_place() -> impl Strategy<Value = Place> {
    prop_oneof![Just(Place::Root), Just(Place::Job), Just(Place::Volume)]
}

proptest! {
    #[test]
    fn what_spell_writes_parse_reads_back(
        (place, action) in any_place().prop_flat_map(|p| (Just(p), action(p))),
        wait in proptest::option::of(0..=LONGEST_TIMEOUT),
        nowait: bool,
    ) {
        let spelled = spell(&action);
        let named = matches!(&action, Action::Create { name: Some(_), .. });
        let flags = match (wait, nowait) {
            _ if named => String::new(),
            (None, false) => String::new(),
            (None, true) => " nowait".into(),
            (Some(s), false) => format!(" timeout={s}"),
            (Some(s), true) => format!(" nowait timeout={s}"),
        };
        let read = parse(format!("{spelled}{flags}\n").as_bytes(), place).map_err(|e| TestCaseError::fail(format!("{spelled}: {e}")))?;
        prop_assert_eq!(&read.action, &action, "{}", spelled);
        prop_assert_eq!(spell(&read.action), spelled);
        if !named {
            prop_assert_eq!(read.timeout, wait.map(Duration::from_secs));
            prop_assert_eq!(read.nowait, nowait);
        }
    }

    #[test]
    fn no_bytes_make_parse_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), place in any_place()) {
        let _ = parse(&bytes, place);
    }

    #[test]
    fn no_text_near_a_command_makes_parse_panic_or_read_back_differently(
        line in "(attach|create|claim|detach|delete|cancel|snapshot)([ \t](d|4G|9T|vm=|name=é =|timeout=0?|root|force|nowait|device_id=[0-9]+|2aff4799-1111-4222-8333-444455556666)){0,5}\n?",
        place in any_place(),
    ) {
        if let Ok(command) = parse(line.as_bytes(), place) {
            let again = parse(spell(&command.action).as_bytes(), place).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(again.action, command.action);
        } else if let Err(error) = parse(line.as_bytes(), place) {
            prop_assert_eq!(error.errno(), crate::error::Errno::EINVAL);
        }
    }
}

#[test]
fn any_bytes_are_a_command_that_reads_back_or_a_short_sentence() {
    crate::fuzz::fuzz("command", 10_000, |bytes| {
        let mut taken = false;
        for place in [Place::Root, Place::Job, Place::Volume] {
            match parse(bytes, place) {
                Ok(command) => {
                    let spelled = spell(&command.action);
                    let again = parse(spelled.as_bytes(), place).unwrap_or_else(|e| panic!("`{spelled}`: {e}"));
                    assert_eq!(again, Command { action: command.action, timeout: None, nowait: false }, "{spelled}");
                    taken = true;
                }
                Err(e) => {
                    let words = e.to_string();
                    assert_eq!(e.errno(), crate::error::Errno::EINVAL, "{words}");
                    assert!(words.len() < 1000 && !words.contains(['\n', '\0', '\r']), "{words:?}");
                }
            }
        }
        taken
    });
}
