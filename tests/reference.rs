//! contrib/man/*.5.md against the code: what the pages list is what is built.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::Write;

use volfs::command::Place;
use volfs::config::Cli;
use volfs::model::{Status, Verb};

const CLOUDSTACK: &str = include_str!("../contrib/man/volfs-cloudstack.5.md");
const PAGE: &str = include_str!("../contrib/man/volfs.5.md");

fn section(name: &str) -> &'static str {
    let start = PAGE.find(&format!("\n# {name}\n")).unwrap_or_else(|| panic!("no section {name}")) + 1;
    let rest = &PAGE[start..];
    rest[1..].find("\n# ").map_or(rest, |end| &rest[..end + 1])
}

fn numbers(letter: char) -> BTreeSet<u32> {
    PAGE.lines()
        .filter_map(|l| l.strip_prefix("**").or_else(|| l.strip_prefix("| "))?.strip_prefix(letter))
        .filter_map(|l| l.split(['*', ' ']).next()?.parse().ok())
        .collect()
}

#[test]
fn every_number_of_the_contract_is_there_once() {
    for (letter, most) in [('R', 10), ('V', 8), ('C', 14), ('X', 10), ('E', 14), ('D', 5)] {
        assert_eq!(numbers(letter), (1..=most).collect(), "{letter}");
    }
}

#[test]
fn the_commands_are_those_that_the_parser_takes() {
    let commands = section("COMMANDS");
    for (place, title) in [(Place::Job, "At a job:"), (Place::Volume, "At a volume:"), (Place::Root, "At the root:")] {
        let (_, after) = commands.split_once(title).unwrap();
        let listed: Vec<&str> = after
            .trim_start()
            .lines()
            .map_while(|l| l.strip_prefix("    ").or(l.starts_with(char::is_alphabetic).then_some(l)))
            .collect();
        let taken: Vec<&str> = place.verbs().iter().filter_map(|v| place.usage(*v)).collect();
        assert_eq!(listed, taken, "{title}");
    }
}

#[test]
fn the_default_deadlines_are_those_of_the_code() {
    for verb in Verb::ALL {
        let seconds = verb.default_timeout().map(|t| t.as_secs());
        let expected = match verb {
            Verb::Resize | Verb::Delete => Some(3600),
            Verb::Snapshot | Verb::Revert | Verb::Destroy => None,
            // "snapshots, revert, destroy none": the page says which; delete-snapshot is a snapshot's.
            Verb::DeleteSnapshot => seconds,
            _ => Some(300),
        };
        assert_eq!(seconds, expected, "{verb}");
    }
    assert!(
        section("COMMANDS")
            .contains("3600 s for resize and delete, none for snapshot, revert and destroy, 300 s for the rest")
    );
    assert!(section("COMMANDS").contains(&volfs::command::LONGEST_TIMEOUT.to_string()));
    assert!(section("COMMANDS").contains(&format!("{} bytes", volfs::command::LONGEST)));
}

#[test]
fn every_status_word_is_there() {
    let words: BTreeSet<&str> = section("STATUS")
        .lines()
        .filter_map(|l| l.split('|').nth(2))
        .flat_map(|c| c.split(','))
        .map(str::trim)
        .collect();
    for status in Status::ALL {
        assert!(words.contains(status.as_str()), "{status}");
    }
}

#[test]
fn every_configuration_key_is_there_with_its_default() {
    let args = ["volfs", "mount", "--config", "/dev/null"].map(OsString::from);
    let (_, config) = Cli::from_args(args).unwrap();
    let table = section("CONFIGURATION");
    let listed: BTreeSet<&str> = table
        .lines()
        .filter_map(|l| l.strip_prefix("| ")?.split(" |").next())
        .filter(|k| !k.is_empty() && *k != "key" && !k.starts_with('|'))
        .collect();
    let known: BTreeSet<&str> = config.settings.iter().map(|s| s.name).collect();
    assert_eq!(listed, known);
    for (key, default) in [("state_dir", "/var/lib/volfs"), ("loop.trash_keep", "604800"), ("history", "10000")] {
        let row = table.lines().find(|l| l.starts_with(&format!("| {key} |"))).unwrap();
        let value = &config.settings.iter().find(|s| s.name == key).unwrap().value;
        assert!(row.contains(default) && value.starts_with(default), "{key}: {row} {value}");
    }
}

#[test]
fn every_key_of_the_cloudstack_provider_is_there_with_its_default() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "provider = \"cloudstack\"").unwrap();
    let path = file.path().to_str().unwrap();
    let (_, config) = Cli::from_args(["volfs", "mount", "--config", path].map(OsString::from)).unwrap();
    let listed: BTreeSet<&str> =
        CLOUDSTACK.lines().filter_map(|l| l.strip_prefix("| cloudstack.")?.split(" |").next()).collect();
    let settings: Vec<_> =
        config.settings.iter().filter_map(|s| Some((s.name.strip_prefix("cloudstack.")?, &s.value))).collect();
    assert_eq!(listed, settings.iter().map(|(name, _)| *name).collect());
    for (key, value) in settings.iter().filter(|(key, _)| *key != "credentials") {
        let row = CLOUDSTACK.lines().find(|l| l.starts_with(&format!("| cloudstack.{key} |"))).unwrap();
        let default = row.split(" | ").nth(1).unwrap();
        assert_eq!(default, value.trim_end_matches(" s"), "{key}");
    }
}

#[test]
fn every_command_of_the_cloud_that_is_needed_is_there() {
    let (_, after) = CLOUDSTACK.split_once("# PERMISSIONS").unwrap();
    let listed: BTreeSet<&str> =
        after.lines().filter_map(|l| l.strip_prefix("    ")).flat_map(str::split_whitespace).collect();
    assert_eq!(listed, volfs::cloud::cloudstack::commands().collect());
}

#[test]
fn every_tag_that_volfs_puts_on_a_volume_is_in_the_page() {
    let source = include_str!("../src/cloud/cloudstack/rows.rs");
    let page = include_str!("../contrib/man/volfs-cloudstack.5.md");
    let tags: Vec<&str> = source
        .lines()
        .filter(|line| line.starts_with("pub(super) const TAG"))
        .filter_map(|line| line.split('"').nth(1))
        .collect();
    assert!(tags.len() >= 5, "{tags:?}");
    for tag in tags {
        assert!(page.lines().any(|line| line.starts_with(&format!("| {tag} |"))), "{tag}");
    }
}
