//! Every numbered rule and row of `man 5 volfs` has a test that names it, no test names a number
//! that the page lacks, and tests through the mount say by their first word what they prove.

// In helpers of tests, too.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

const PAGE: &str = include_str!("../contrib/man/volfs.5.md");
const LETTERS: &str = "RVCXED";

/// First words of tests through the mount that prove something beside the numbers.
const PREFIXES: [&str; 9] =
    ["trap_", "wait_", "crash_", "in_use_", "predecessor_", "mount_", "bad_input_", "adversary_", "model_"];

/// A source file: its path below the crate, and its text.
type Source = (String, String);

/// `R4`, `C11`: a letter of the contract and a number without a leading zero.
fn number(word: &str) -> Option<String> {
    let mut chars = word.chars();
    let letter = chars.next()?.to_ascii_uppercase();
    let digits = chars.as_str();
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
    (LETTERS.contains(letter) && plain).then(|| format!("{letter}{digits}"))
}

/// The numbers that the page defines: at the start of a paragraph (`**R1**`) or of a table's row.
fn defined(page: &str) -> BTreeSet<String> {
    let start = |line: &'_ str| line.strip_prefix("**").or_else(|| line.strip_prefix("| ")).map(str::to_owned);
    let word = |rest: String| rest.split(['*', ' ']).next().map(str::to_owned);
    page.lines()
        .filter_map(start)
        .filter_map(word)
        .filter(|w| !w.starts_with(char::is_lowercase))
        .filter_map(|w| number(&w))
        .collect()
}

/// The names of a file's tests. One that is ignored proves nothing and is none.
fn tests(text: &str) -> Vec<String> {
    let (mut is_test, mut ignored, mut found) = (false, false, Vec::new());
    for line in text.lines().map(str::trim_start) {
        if line.starts_with("#[") {
            is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
            ignored |= line.starts_with("#[ignore");
        } else if !line.starts_with("//") && !line.is_empty() {
            let name = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ");
            let name = name.and_then(|n| n.split(['(', '<']).next());
            found.extend(name.filter(|_| is_test && !ignored).map(str::to_owned));
            (is_test, ignored) = (false, false);
        }
    }
    found
}

/// The numbers that a test's name begins with.
fn named(test: &str) -> Vec<String> {
    test.split('_').map_while(|word| number(word).filter(|_| word.starts_with(char::is_lowercase))).collect()
}

/// What is not as it should be, a line each.
fn complaints(page: &str, sources: &[Source]) -> Vec<String> {
    let defined = defined(page);
    let mut proved: BTreeMap<String, String> = BTreeMap::new();
    let mut found = Vec::new();
    for (path, text) in sources {
        for test in tests(text) {
            let numbers = named(&test);
            for number in &numbers {
                if !defined.contains(number) {
                    found.push(format!("{path}: {test} names {number}, which the page has not"));
                }
                proved.entry(number.clone()).or_insert_with(|| test.clone());
            }
            let said = !numbers.is_empty() || PREFIXES.iter().any(|p| test.starts_with(p));
            if path.starts_with("tests/tree/") && !said {
                found.push(format!("{path}: {test} begins with neither a number nor one of {PREFIXES:?}"));
            }
        }
    }
    found.extend(defined.iter().filter(|n| !proved.contains_key(*n)).map(|n| format!("{n} has no test")));
    found
}

fn sources(below: &str, into: &mut Vec<Source>) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(below);
    for entry in fs::read_dir(&dir).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{below}/{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            sources(&path, into);
        } else if path.ends_with(".rs") {
            into.push((path, fs::read_to_string(entry.path()).unwrap()));
        }
    }
}

fn all_sources() -> Vec<Source> {
    let mut all = Vec::new();
    sources("src", &mut all);
    sources("tests", &mut all);
    all
}

#[test]
fn every_number_has_a_test_and_every_test_its_word() {
    let found = complaints(PAGE, &all_sources());
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn the_check_sees_the_page_and_the_tests_there_are() {
    let all = defined(PAGE);
    for first_and_last in ["R1", "R10", "V1", "V8", "C1", "C14", "X1", "X10", "E1", "E14", "D1", "D5"] {
        assert!(all.contains(first_and_last), "{first_and_last} not in {all:?}");
    }
    assert_eq!(all.len(), 10 + 8 + 14 + 10 + 14 + 5, "{all:?}");
    let attributes: usize = all_sources()
        .iter()
        .map(|(_, t)| t.matches("\n    #[test]\n").count() + t.matches("\n#[test]\n").count())
        .sum();
    let seen: usize = all_sources().iter().map(|(_, t)| tests(t).len()).sum();
    assert!(attributes > 100 && seen >= attributes, "{seen} tests seen, {attributes} attributes");
}

#[test]
fn the_check_fails_for_each_thing_it_is_there_for() {
    const SMALL: &str = "**R1** One value.\n| C11 | *attach* |\n| errno | no number |\nR2 in a sentence\n";
    let check = |path: &str, text: &str| complaints(SMALL, &[(path.into(), text.into())]);
    let whole = "#[test]\nfn r1_c11_all() {}\n";
    assert_eq!(check("tests/tree/a.rs", whole), [""; 0]);
    assert_eq!(check("src/a.rs", "#[tokio::test(start_paused = true)]\nasync fn r1_c11_all() {}\n"), [""; 0]);

    assert_eq!(check("src/a.rs", "#[test]\nfn r1_one() {}\n"), ["C11 has no test"]);
    assert_eq!(check("src/a.rs", "fn r1_c11_no_test() {}\n"), ["C11 has no test", "R1 has no test"]);
    assert_eq!(check("src/a.rs", "// #[test]\nfn r1_c11_all() {}\n").len(), 2);
    assert_eq!(check("src/a.rs", "#[test]\n#[ignore]\nfn r1_c11_all() {}\n").len(), 2);
    assert_eq!(check("src/a.rs", "#[test]\nfn r1_then_c11() {}\n"), ["C11 has no test"]);
    assert_eq!(
        check("src/a.rs", "#[test]\nfn r1_c1_c11_() {}\n"),
        ["src/a.rs: r1_c1_c11_ names C1, which the page has not"]
    );
    let other = format!("{whole}#[test]\nfn r2_of_a_sentence() {{}}\n");
    assert_eq!(check("src/a.rs", &other), ["src/a.rs: r2_of_a_sentence names R2, which the page has not"]);
    let wordless = format!("{whole}#[test]\nfn it_works() {{}}\n");
    assert_eq!(check("src/a.rs", &wordless), [""; 0]);
    assert_eq!(check("tests/tree/a.rs", &wordless).len(), 1);
    assert_eq!(check("tests/tree/a.rs", &wordless.replace("it_", "wait_it_")), [""; 0]);
}
