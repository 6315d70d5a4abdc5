use std::collections::BTreeSet;
use std::io::{self, Read};

use super::lexer::{Lexer, Token};
use super::*;
use crate::model::{DiskName, DiskRow, JobId, JobRow, RecordId, Status, Timestamp, VolumeId, VolumeRow};
use crate::store::{DiskLoaded, JobLoaded, Loaded, Next};

/// With a binary column, as it comes.
const BEFORE: &[u8] = include_bytes!("../../tests/corpus/dump/before");
const AFTER: &str = include_str!("../../tests/corpus/dump/after");
const ODD: &str = include_str!("../../tests/corpus/dump/odd");

/// Gives the bytes in two pieces, or in pieces of one length.
struct Pieces<'a> {
    bytes: &'a [u8],
    first: usize,
    rest: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = if self.first > 0 { std::mem::take(&mut self.first) } else { self.rest };
        let n = most.min(into.len()).min(self.bytes.len());
        let (now, later) = self.bytes.split_at(n);
        into[..n].copy_from_slice(now);
        self.bytes = later;
        Ok(n)
    }
}

fn tokens(input: impl Read) -> Vec<(Token, String)> {
    let mut lexer = Lexer::new(input);
    let mut all = Vec::new();
    loop {
        let token = lexer.next().unwrap();
        if token == Token::End {
            return all;
        }
        all.push((token, String::from_utf8_lossy(&lexer.text).into_owned()));
    }
}

fn whole() -> Choice {
    Choice { whole: true, database: None }
}

fn read_text(text: &str) -> Result<Dump, Refused> {
    read(text.as_bytes(), &Choice::default())
}

/// A complete dump of these statements.
fn framed(statements: &str) -> String {
    format!("-- MariaDB dump 10.19\n{statements}\n-- Dump completed\n")
}

fn id(digit: char) -> VolumeId {
    let run = |n| digit.to_string().repeat(n);
    VolumeId::parse(&format!("{}-{}-4{}-8{}-{}", run(8), run(4), run(3), run(3), run(12))).unwrap()
}

/// A dump of rows in the columns of the generation before.
fn rows(jobs: &str, volumes: &str, disks: &str) -> Dump {
    let insert = |table: &str, columns: &str, rows: &str| match rows {
        "" => String::new(),
        rows => format!("INSERT INTO {table} ({columns}) VALUES {rows};\n"),
    };
    let text = [
        insert("replication_jobs", "id,source_vm_name", jobs),
        insert("ossea_volumes", "id,volume_id,volume_name,size_gb", volumes),
        insert("vm_disks", "id,job_id,disk_id,ossea_volume_id,cloudstack_volume_uuid", disks),
    ];
    read_text(&framed(&text.concat())).unwrap()
}

fn volumes(digits: &str) -> String {
    let row = |(n, digit): (usize, char)| format!("({},'{}','v{digit}',1)", n + 1, id(digit));
    digits.chars().enumerate().map(row).collect::<Vec<_>>().join(",")
}

fn places(plan: &Plan) -> Vec<(String, VolumeId)> {
    let placed = plan.volumes.iter().filter_map(|v| Some((v.place.as_ref()?, v.id)));
    placed.map(|((job, disk), id)| (format!("{job}/{disk}"), id)).collect()
}

fn in_none(plan: &Plan) -> BTreeSet<VolumeId> {
    plan.volumes.iter().filter(|v| v.place.is_none()).map(|v| v.id).collect()
}

fn kinds(plan: &Plan) -> Vec<Kind> {
    plan.doubts.iter().map(|d| d.kind).collect()
}

#[track_caller]
fn said(plan: &Plan, kind: Kind, words: &[&str]) {
    let all = |d: &&Doubt| words.iter().all(|w| d.sentence.contains(w) || d.remedy.contains(w));
    assert!(plan.doubts.iter().filter(|d| d.kind == kind).any(|d| all(&d)), "{kind:?} {words:?}: {:#?}", plan.doubts);
}

#[test]
fn a_literal_is_read_in_each_of_its_spellings() {
    for (text, token, meant) in [
        (r"'a\'b'", Token::Text, "a'b"),
        ("'a''b'", Token::Text, "a'b"),
        (r"'\0\n\Z\\\%'", Token::Text, "\0\n\u{1a}\\%"),
        ("''", Token::Text, ""),
        ("x'4142'", Token::Text, "AB"),
        ("0x4142", Token::Text, "AB"),
        ("0xA", Token::Text, "\n"),
        ("b'101'", Token::Number, "5"),
        ("0b11", Token::Number, "3"),
        ("N'n'", Token::Text, "n"),
        ("1.5e-7", Token::Number, "1.5e-7"),
        (".5", Token::Number, ".5"),
        ("`a``b\\`", Token::Quoted, "a`b\\"),
        (r#""a""b\"c""#, Token::Quoted, "a\"b\"c"),
        ("NULL", Token::Word, "NULL"),
        ("/* c * c */ x -- y", Token::Word, "x"),
        ("/*!40101 x */ # y", Token::Word, "x"),
        ("/*M!100200 x*/", Token::Word, "x"),
        ("/*M!999999\\- no 'token */ x", Token::Word, "x"),
        ("\u{feff}x", Token::Word, "x"),
    ] {
        assert_eq!(tokens(text.as_bytes()), [(token, meant.to_owned())], "{text}");
    }
    assert_eq!(tokens(&b"1--1"[..]).len(), 4, "two signs are no comment without a blank behind them");
}

#[test]
fn a_dump_reads_the_same_wherever_its_chunks_end() {
    for text in [AFTER, ODD] {
        let plain = read_text(text).unwrap();
        let seen = tokens(text.as_bytes());
        for first in 1..text.len() {
            let pieces = Pieces { bytes: text.as_bytes(), first, rest: usize::MAX };
            assert_eq!(tokens(pieces), seen, "split at {first}");
        }
        for rest in [1, 2, 3, 7] {
            let pieces = Pieces { bytes: text.as_bytes(), first: 0, rest };
            assert_eq!(read(pieces, &Choice::default()).unwrap(), plain, "pieces of {rest}");
        }
    }
}

#[test]
fn a_dump_cut_anywhere_is_refused() {
    for text in [AFTER, ODD] {
        let end = text.find("-- Dump completed").unwrap() + "-- Dump completed".len();
        for n in 1..end {
            let refused = read(&text.as_bytes()[..n], &Choice::default()).unwrap_err();
            assert!(refused.words.contains("cut") || refused.words.contains("--whole"), "{n}: {refused}");
        }
        assert!(read(&text.as_bytes()[..end], &Choice::default()).is_ok());
        // What comes behind the last line is another dump's, and is cut as that.
        let two = format!("{text}INSERT INTO a VALUES (1);\n");
        assert!(read_text(&two).unwrap_err().words.contains("cut"));
    }
}

#[test]
fn a_dump_without_comments_is_taken_only_on_somebodys_word_and_never_cut() {
    let text = "INSERT INTO vm_disks (id) VALUES (1);\nINSERT INTO vm_disks (id) VALUES (2);";
    assert!(read_text(text).unwrap_err().words.contains("--whole"));
    assert_eq!(read(text.as_bytes(), &whole()).unwrap().tables.disks.len(), 2);
    let first = text.find('\n').unwrap();
    for n in (1..text.len()).filter(|n| !(first..=first + 1).contains(n)) {
        assert!(read(&text.as_bytes()[..n], &whole()).unwrap_err().words.contains("cut"), "{n}");
    }
    // A header that somebody vouches for is still that of a dump that ends otherwise.
    let headed = format!("-- MariaDB dump 10.19\n{text}");
    assert!(read(headed.as_bytes(), &whole()).unwrap_err().words.contains("cut"));
}

#[test]
fn what_no_dump_program_writes_is_refused_with_its_place_and_without_its_values() {
    let long = format!("INSERT INTO vm_disks (job_id) VALUES ('{}');", "s3cret".repeat(1000));
    for (text, words) in [
        ("UPDATE vm_disks SET job_id = 's3cret';", "no other SQL"),
        ("DELETE FROM vm_disks;", "no other SQL"),
        ("\u{1}\u{2}", "no SQL"),
        ("INSERT INTO vm_disks VALUES ('s3cret');", "--complete-insert"),
        ("INSERT INTO vm_disks (id, job_id) VALUES ('s3cret');", "2 values"),
        ("INSERT INTO vm_disks (id) VALUES ('s3cret',2);", "1 values"),
        ("INSERT INTO vm_disks (id) VALUES (f('s3cret'));", "column id"),
        ("INSERT INTO vm_disks (id) SELECT 's3cret';", "VALUES"),
        ("INSERT INTO vm_disks (id) VALUES (1) ON DUPLICATE KEY UPDATE id = 's3cret';", "another row"),
        ("CREATE TABLE vm_disks (id int); CREATE TABLE vm_disks (id int);", "twice"),
        ("CREATE TABLE vm_disks (id int; SET a = 1;", "too early"),
        ("SET sql_mode = 'A,NO_BACKSLASH_ESCAPES';", "NO_BACKSLASH_ESCAPES"),
        (&long, "4096 bytes"),
        ("INSERT INTO other VALUES (1);", "none of its tables"),
    ] {
        let refused = read_text(&framed(text)).unwrap_err().to_string();
        assert!(refused.contains(words) && !refused.contains("s3cret"), "{text}: {refused}");
        assert!(refused.starts_with("line 2, byte ") || words == "none of its tables", "{refused}");
    }
    let second = read_text(&framed("SET a = 1;\nINSERT INTO vm_disks (id) VALUES (f());")).unwrap_err();
    assert!(second.to_string().starts_with("line 3, byte 68: table vm_disks: column id"), "{second}");
}

#[test]
fn a_value_that_is_not_kept_may_be_as_long_as_it_likes() {
    let long = "x".repeat(3 << 20);
    let text = framed(&format!("INSERT INTO vm_disks (api_key, id) VALUES ('{long}', 7), ('{long}\\'', 8);"));
    let dump = read_text(&text).unwrap();
    assert_eq!(dump.tables.disks.iter().map(|d| d.row.as_deref()).collect::<Vec<_>>(), [Some("7"), Some("8")]);
    assert!(!format!("{dump:?}").contains("xxx"));
}

#[test]
fn a_dump_of_several_databases_wants_one_of_them_named() {
    let each = |name: &str, n: u32| format!("USE `{name}`;\nINSERT INTO vm_disks (id) VALUES ({n});\n");
    let text = framed(&format!("{}{}USE `mysql`;\nINSERT INTO user VALUES (1);\n", each("one", 1), each("two", 2)));
    let refused = read_text(&text).unwrap_err().words;
    assert!(refused.contains("one, two") && refused.contains("--database"), "{refused}");
    let of = |name: &str| read(text.as_bytes(), &Choice { whole: false, database: Some(name.into()) });
    assert_eq!(of("two").unwrap().tables.disks[0].row.as_deref(), Some("2"));
    assert!(of("mysql").unwrap_err().words.contains("one, two"));
    // A table may be behind its database's name instead.
    let text = framed("INSERT INTO a.vm_disks (id) VALUES (1); INSERT INTO `b`.`vm_disks` (id) VALUES (2);");
    assert!(read_text(&text).unwrap_err().words.contains("a, b"));
}

#[test]
fn a_volume_on_which_every_row_agrees_goes_into_its_job_once() {
    let one = id('1');
    let dump = rows(
        "('j','VM one'),('k','')",
        &volumes("12"),
        &format!("(1,'j','disk-2000',1,'{one}'),(2,'j','disk-2000',1,NULL),(3,'k','disk-2000',2,'')"),
    );
    let plan = decide(&dump.tables, JobBy::Job, None);
    assert_eq!(places(&plan), [("j/disk-2000".into(), one), ("k/disk-2000".into(), id('2'))]);
    assert_eq!(
        plan.jobs.iter().map(|j| (j.id.as_str(), &*j.vm_name)).collect::<Vec<_>>(),
        [("j", "VM one"), ("k", "")]
    );
    assert!(plan.doubts.is_empty(), "{:?}", plan.doubts);
    assert_eq!(plan.volumes[0].size, 1 << 30);
}

#[test]
fn predecessor_61_both_volumes_of_a_stale_link_are_claimed_by_nobody() {
    let dump = rows(
        "('pgtest2',''),('pgwin','')",
        &volumes("123"),
        &format!(
            "(1,'pgtest2','disk-2000',1,'{}'),(2,'pgwin','disk-2000',2,NULL),(3,'pgwin','disk-2001',3,NULL)",
            id('2')
        ),
    );
    let plan = decide(&dump.tables, JobBy::Job, None);
    assert_eq!(places(&plan), [("pgwin/disk-2001".into(), id('3'))]);
    assert_eq!(in_none(&plan), [id('1'), id('2')].into());
    let (one, two) = (id('1').to_string(), id('2').to_string());
    said(&plan, Kind::LinksDiffer, &["pgtest2/disk-2000", &one, &two, "jobs/pgtest2/control"]);
    let line = format!("echo \"claim {two} disk-2000\" > jobs/pgwin/control");
    said(&plan, Kind::TwoPlaces, &["pgtest2/disk-2000 and for pgwin/disk-2000", &line]);
}

#[test]
fn each_contradiction_and_each_gap_has_a_rule_and_a_line() {
    let five = id('5');
    let dump = rows(
        "('j',''),('k',''),('bad/name','')",
        &format!(
            "{},(7,'nonsense','',1),(8,'{}','',1),(9,NULL,'',1)",
            volumes("123456"),
            id('a').to_string().to_uppercase()
        ),
        &format!(
            "(1,'j','a',1,NULL),(2,'k','a',1,NULL),(3,'j','b',2,NULL),(4,'j','b',3,NULL),(5,'j','c',NULL,'{five}'),\
             (6,NULL,'d',4,NULL),(7,'nowhere','e',6,NULL),(8,'j','f',99,NULL),(9,'j','g',NULL,NULL),(10,'j','h h',8,NULL),\
             (11,'bad/name','i',7,NULL),(12,'k','z',99,'{}')",
            id('b')
        ),
    );
    let plan = decide(&dump.tables, JobBy::Job, None);
    let a = id('a');
    assert_eq!(places(&plan), [(format!("j/{a}"), a)]);
    assert_eq!(in_none(&plan), "123456b".chars().map(id).collect());
    let (one, two, four, six) = (id('1').to_string(), id('2').to_string(), id('4').to_string(), id('6').to_string());
    said(&plan, Kind::TwoPlaces, &[&one, "j/a and for k/a"]);
    said(&plan, Kind::TwoVolumes, &["j/b", &two, &id('3').to_string()]);
    said(&plan, Kind::OldLinkOnly, &["j/c", &five.to_string(), "alone"]);
    said(&plan, Kind::OldLinkOnly, &["k/z", &id('b').to_string(), "leads nowhere"]);
    said(&plan, Kind::NoJob, &[&four, "--job-by context"]);
    said(&plan, Kind::JobMissing, &[&six, "\"nowhere\""]);
    said(&plan, Kind::Dangling, &["row 8 of vm_disks", "99"]);
    said(&plan, Kind::NoVolume, &["j/g"]);
    said(&plan, Kind::BadDisk, &["\"h h\"", "echo \"disk NAME\""]);
    said(&plan, Kind::BadVolume, &["row 7", "nonsense"]);
    said(&plan, Kind::BadVolume, &["row 9", "empty"]);
    said(&plan, Kind::BadJob, &["bad/name", "1 to 191"]);
    said(&plan, Kind::Normalised, &[&a.to_string(), "AAAAAAAA"]);
    assert!(plan.doubts.iter().all(|d| !d.remedy.is_empty()));
}

#[test]
fn an_old_link_that_cannot_be_read_does_not_agree() {
    let dump = rows("('j','')", &volumes("1"), "(1,'j','a',1,'pending')");
    let plan = decide(&dump.tables, JobBy::Job, None);
    assert_eq!(in_none(&plan), [id('1')].into());
    said(&plan, Kind::LinksDiffer, &["j/a", &id('1').to_string()]);
}

#[test]
fn a_row_id_that_names_two_volumes_gives_neither() {
    let dump = rows("('j','')", &format!("(1,'{}','',1),(1,'{}','',1)", id('1'), id('2')), "(1,'j','a',1,NULL)");
    let plan = decide(&dump.tables, JobBy::Job, None);
    assert_eq!(in_none(&plan), [id('1'), id('2')].into());
    said(&plan, Kind::LinksDiffer, &["j/a"]);
}

#[test]
fn by_contexts_the_jobs_of_one_vm_are_one() {
    let text = framed(&format!(
        "INSERT INTO replication_jobs (id,vm_context_id) VALUES ('j1','c'),('j2',NULL),('j3',NULL),('j4','c'),('x',NULL);
         INSERT INTO vm_replication_contexts (context_id,vm_name) VALUES ('c','VM'),('d','E'),('x','X');
         INSERT INTO ossea_volumes (id,volume_id) VALUES (1,'{}'),(2,'{}'),(3,'{}'),(4,'{}'),(5,'{}'),(6,'{}');
         INSERT INTO vm_disks (id,job_id,vm_context_id,disk_id,ossea_volume_id) VALUES (1,'j1','c','a',1),(2,'j2','c','a',1),
           (3,'j3',NULL,'b',2),(4,'j4',NULL,'c',3),(5,'j4','d','d',4),(6,'j4','lost','e',5),(7,'x',NULL,'f',6),(8,NULL,NULL,'g',NULL);",
        id('1'), id('2'), id('3'), id('4'), id('5'), id('6'),
    ));
    let dump = read_text(&text).unwrap();
    let plan = decide(&dump.tables, JobBy::Context, None);
    let of = |place: &str, digit| (place.to_owned(), id(digit));
    assert_eq!(places(&plan), [of("c/a", '1'), of("c/c", '3'), of("j3/b", '2')]);
    let names: Vec<_> = plan.jobs.iter().map(|j| (j.id.as_str(), &*j.vm_name)).collect();
    assert_eq!(names, [("c", "VM"), ("d", "E"), ("j3", ""), ("x", "X")]);
    said(&plan, Kind::NoContext, &["j3"]);
    said(&plan, Kind::ContextsDiffer, &["\"d\"", "\"c\"", &id('4').to_string()]);
    said(&plan, Kind::ContextsDiffer, &["\"lost\"", &id('5').to_string()]);
    said(&plan, Kind::NameTwice, &["\"x\"", &id('6').to_string()]);
    // By jobs the same volume is in two of them.
    assert!(kinds(&decide(&dump.tables, JobBy::Job, None)).contains(&Kind::TwoPlaces));
}

/// A record with one job and these volumes in it.
fn record(job: &str, owned: &[(&str, VolumeId)], loose: &[VolumeId], gone: &[VolumeId]) -> Loaded {
    let at = Timestamp(0);
    let row = JobRow(1);
    let known: Vec<_> = owned.iter().map(|(_, v)| v).chain(loose).chain(gone).copied().collect();
    Loaded {
        record: RecordId::random(),
        jobs: vec![JobLoaded {
            row,
            id: JobId::parse(job).unwrap(),
            vm_name: String::new(),
            hold: false,
            created: at,
            vm_name_at: at,
            hold_at: at,
        }],
        disks: (1..)
            .zip(owned)
            .map(|(n, (disk, volume))| DiskLoaded {
                row: DiskRow(n),
                job: row,
                disk: DiskName::parse(disk).unwrap(),
                epoch: 0,
                at,
                volume: *volume,
                name: String::new(),
                size: 0,
                serial: String::new(),
                cloud_state: String::new(),
                device_id: None,
                status: Status::Unknown,
                status_at: at,
                mapping: None,
            })
            .collect(),
        snapshots: Vec::new(),
        loose: loose.to_vec(),
        volume_rows: known.into_iter().zip((1..).map(VolumeRow)).collect(),
        unfinished: Vec::new(),
        history: Vec::new(),
        next: Next { job: 2, volume: 9, disk: 9, mapping: 1, operation: 1, snapshot: 1, epoch: 1 },
    }
}

#[test]
fn what_the_record_has_already_stays_as_it_is() {
    let dump = rows(
        "('j','VM'),('k','')",
        &volumes("123456"),
        "(1,'j','a',1,NULL),(2,'j','b',2,NULL),(3,'j','c',3,NULL),(4,'j','d',4,NULL),(5,'k','e',5,NULL),(6,'j','f',6,NULL)",
    );
    let record = record("j", &[("a", id('1')), ("z", id('2')), ("f", id('9'))], &[id('3')], &[id('4')]);
    let plan = decide(&dump.tables, JobBy::Job, Some(&record));
    assert_eq!(places(&plan), [("k/e".into(), id('5'))]);
    assert_eq!(in_none(&plan), [id('6')].into());
    assert_eq!(plan.jobs.iter().map(|j| j.id.as_str()).collect::<Vec<_>>(), ["k"], "the record's job keeps its name");
    assert_eq!(plan.unchanged, 4);
    said(&plan, Kind::Elsewhere, &["j/z", "j/b"]);
    said(&plan, Kind::KnownAlready, &[&id('3').to_string(), "jobs/j/control"]);
    said(&plan, Kind::Gone, &[&id('4').to_string()]);
    said(&plan, Kind::DiskTaken, &["j/f", &id('9').to_string()]);
}

#[test]
fn an_operation_in_flight_is_history_where_its_volume_is_new_and_a_line_where_it_names_none() {
    let dump = read(BEFORE, &Choice::default()).unwrap();
    let plan = decide(&dump.tables, JobBy::Job, None);
    let seen: Vec<_> = plan.unended.iter().map(|op| (&*op.old_id, op.verb.as_str(), op.volume)).collect();
    assert_eq!(seen, [("op-1", "attach", VolumeId::parse("33333333-3333-4333-8333-333333333333").unwrap())]);
    said(&plan, Kind::Unended, &["op-2", "create", "pending"]);
    assert!(!plan.doubts.iter().any(|d| d.sentence.contains("op-3")));
}

#[test]
fn no_dump_panics_the_import_or_gives_one_volume_or_one_place_twice() {
    crate::fuzz::fuzz("dump", 2_000, |bytes| {
        for choice in [Choice::default(), whole()] {
            let Ok(dump) = read(bytes, &choice) else { continue };
            for by in [JobBy::Job, JobBy::Context] {
                let plan = decide(&dump.tables, by, None);
                let ids: BTreeSet<_> = plan.volumes.iter().map(|v| v.id).collect();
                assert_eq!(ids.len(), plan.volumes.len());
                let places = places(&plan);
                let slots: BTreeSet<_> = places.iter().map(|(place, _)| place).collect();
                assert_eq!(slots.len(), places.len());
                for volume in plan.volumes.iter() {
                    let job = volume.place.as_ref().map(|(job, _)| job);
                    assert!(job.is_none_or(|job| plan.jobs.iter().any(|j| j.id == *job)));
                }
                for line in Report::of(&dump, &plan, true).lines() {
                    assert!(!line.chars().any(char::is_control), "{line:?}");
                }
            }
            return true;
        }
        false
    });
}
