//! `volfs check` with the CloudStack provider: each part that fails is said in its own line, and the
//! cloud is only looked at.

use std::collections::BTreeSet;
use std::process::Command;

use fakecloud::{Fault, Kind, NewVm, Offering, Options, Zone};

use crate::common::{Said, said_of};
use crate::site::{Site, write_keys};

/// Runs `volfs check` with the site's configuration.
fn check(site: &Site) -> Said {
    let volfs = &site.volfs;
    let mut command = Command::new(env!("CARGO_BIN_EXE_volfs"));
    command.arg("--state-dir").arg(volfs.state()).arg("--config").arg(volfs.scratch("config.toml"));
    said_of(command.arg("check").arg(volfs.root()).output().unwrap())
}

/// The line about a part, from its first word on.
#[track_caller]
fn line<'a>(said: &'a Said, name: &str) -> &'a str {
    let of =
        |line: &&str| ["ok      ", "warning ", "MISSING "].iter().any(|w| line.starts_with(&format!("{w}{name}: ")));
    let mut lines = said.out.lines().filter(of);
    let found = lines.next().unwrap_or_else(|| panic!("no line {name}: {said:?}"));
    assert_eq!(lines.next(), None, "one line each: {said:?}");
    found
}

#[track_caller]
fn expect(said: &Said, name: &str, begins: &str, holds: &[&str]) {
    let found = line(said, name);
    assert!(found.starts_with(begins), "{found}");
    for words in holds {
        assert!(found.contains(words), "{words:?} is not in: {found}");
    }
}

fn prepared(options: Options, more: &str) -> Site {
    Site::prepare(options, &[], more)
}

#[test]
fn check_finds_everything_there_and_changes_nothing() {
    let site = prepared(Options::with_loops(), "");
    site.cloud.set_dated(true);
    let said = check(&site);
    assert_eq!(said.status, 0, "{said:?}");
    expect(&said, "endpoint", "ok", &[&site.cloud.endpoint(), "4.22.0.0"]);
    expect(&said, "keys", "ok", &["taken", "named in the configuration"]);
    expect(&said, "clock", "ok", &[" s ", "of the one here"]);
    expect(&said, "permissions", "ok", &["createTags"]);
    expect(&said, "zone", "ok", &[&site.cloud.zones()[0].id, "that of this host"]);
    expect(&said, "offering", "ok", &[&site.cloud.offerings()[0].id, "any size"]);
    expect(&said, "this VM", "ok", &[&site.cloud.host(), "configuration", "its root disk is here"]);
    expect(&said, "device slots", "ok", &["0 of 32"]);
    expect(&said, "hypervisor", "ok", &["KVM"]);
    for name in ["VM snapshots", "backups", "snapshot policies"] {
        expect(&said, name, "ok", &[]);
    }
    assert!(!said.out.contains("warning") && !said.out.contains("MISSING"), "{}", said.out);
    let asked: BTreeSet<String> = site.cloud.requests().into_iter().map(|r| r.command).collect();
    assert!(asked.iter().all(|command| command.starts_with("list")), "only looked: {asked:?}");
    assert!(!said.out.contains(&site.cloud.secret()) && !said.out.contains(&site.cloud.key()));
    assert!(!site.volfs.state().exists(), "and nothing was made here");
}

#[test]
fn check_asks_for_the_permission_of_every_command_that_the_daemon_sends() {
    let site = Site::start();
    let id = &site.job("j", &["d"], "1G")[0];
    for command in ["attach", "snapshot s", "resize 2G", "detach", "revert s", "delete-snapshot s"] {
        assert_eq!(site.disk("j", "d", command), 0, "{command}: {}", site.volfs.log());
    }
    assert_eq!(site.disk("j", "d", "disk e"), 0);
    assert_eq!(site.disk("j", "e", &format!("delete {id}")), 0, "{}", site.volfs.log());
    let sent: BTreeSet<String> = site.cloud.requests().into_iter().map(|r| r.command).collect();
    let known: BTreeSet<String> = volfs::cloud::cloudstack::commands().map(str::to_owned).collect();
    assert_eq!(sent.difference(&known).collect::<Vec<_>>(), Vec::<&String>::new());
}

#[test]
fn check_names_each_command_that_the_role_forbids() {
    let mut options = Options::with_loops();
    options.accounts[0].forbidden = ["createTags", "attachVolume"].map(str::to_owned).into();
    let said = check(&prepared(options, ""));
    assert_eq!(said.status, 1);
    expect(&said, "permission createTags", "MISSING", &["role"]);
    expect(&said, "permission attachVolume", "MISSING", &["role"]);
    assert_eq!(said.out.matches("MISSING").count(), 2, "{}", said.out);
    assert!(!said.out.contains(" permissions: "), "{}", said.out);

    let mut options = Options::with_loops();
    options.accounts[0].forbidden = vec!["listApis".into()];
    let said = check(&prepared(options, ""));
    assert_eq!(said.status, 0, "nothing is known to be missing: {said:?}");
    expect(&said, "permissions", "warning", &["cannot be told", "listApis"]);
}

#[test]
fn check_stays_below_the_rate_limit() {
    let mut options = Options::with_loops();
    options.rate_limit = Some(10);
    let site = prepared(options, "");
    let said = check(&site);
    assert_eq!(said.status, 0, "{said:?}");
    expect(&said, "permissions", "ok", &[]);
    assert!(site.cloud.requests().iter().all(|r| r.command != "listApis" || r.params.contains_key("name")));
}

#[test]
fn check_says_that_no_cloud_answers_and_what_answers_instead() {
    let site = prepared(Options::with_loops(), "timeout = 3");
    site.cloud.fault(Fault::new("*", Kind::Html { status: 502, acted: false }).forever());
    let said = check(&site);
    assert_eq!(said.status, 1);
    expect(&said, "endpoint", "MISSING", &[&site.cloud.endpoint(), "HTML"]);
    for none in ["keys: ", "clock: ", "zone: "] {
        assert!(!said.out.contains(&format!(" {none}")), "nothing more can be told: {}", said.out);
    }
    // A port on which nobody listens: this one was ours a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let gone = format!("http://127.0.0.1:{port}/client/api");
    write_keys(&site.keys_file(), &gone, "k", "s");
    expect(&check(&site), "endpoint", "MISSING", &[&gone, "no connection"]);
}

#[test]
fn check_says_that_keys_are_wrong_and_that_it_may_be_the_clock() {
    let site = prepared(Options::with_loops(), "");
    write_keys(&site.keys_file(), &site.cloud.endpoint(), &site.cloud.key(), "wrong");
    let said = check(&site);
    assert_eq!(said.status, 1);
    expect(&said, "endpoint", "ok", &[]);
    expect(&said, "keys", "MISSING", &["keys", "clock", "unable to verify"]);
    expect(&said, "clock", "warning", &["no Date", "cannot be told"]);
    assert!(!said.out.contains(" zone: "), "{}", said.out);
    std::fs::remove_file(site.keys_file()).unwrap();
    let said = check(&site);
    assert_eq!(said.status, 1);
    expect(&said, "keys", "MISSING", &[&site.keys_file().display().to_string()]);
}

#[test]
fn check_measures_the_clock_where_an_answer_has_a_date() {
    let site = prepared(Options::with_loops(), "");
    site.cloud.set_dated(true);
    site.cloud.set_clock(120);
    let said = check(&site);
    assert_eq!(said.status, 0, "{said:?}");
    assert!(line(&said, "clock").starts_with("warning"), "{}", said.out);
    assert!(line(&said, "clock").contains("s ahead"), "{}", said.out);
    site.cloud.set_clock(3600);
    let said = check(&site);
    assert_eq!(said.status, 1);
    expect(&said, "clock", "MISSING", &["s ahead", "NTP"]);
    expect(&said, "keys", "MISSING", &["Date there"]);
}

#[test]
fn check_says_that_zone_or_offering_are_none_or_not_one() {
    let mut options = Options::with_loops();
    options.zones = ["north", "south", "south"].map(Zone::new).into();
    options.offerings.push(Offering::fixed("small", 1));
    let small = options.offerings[2].id.clone();
    let zone = options.zones[0].id.clone();
    let site = prepared(options, "zone = \"south\"");
    let said = check(&site);
    assert_eq!(said.status, 1);
    expect(&said, "zone", "MISSING", &["two zones are named south"]);
    site.configure(&format!("zone = \"{zone}\""), Some(&small));
    let said = check(&site);
    assert_eq!(said.status, 0, "{said:?}");
    expect(&said, "zone", "ok", &[&zone, "configuration"]);
    expect(&said, "offering", "ok", &["1 GiB and no other size"]);
    site.configure("zone = \"west\"", Some("11111111-2222-4333-8444-555566667777"));
    let said = check(&site);
    expect(&said, "zone", "MISSING", &["no zone west"]);
    expect(&said, "offering", "MISSING", &["11111111-2222-4333-8444-555566667777"]);
    assert!(said.err.contains("2 of the parts above are missing"), "{said:?}");
}

#[test]
fn check_says_that_this_is_another_vm_or_one_that_nobody_knows() {
    let mut options = Options::with_loops();
    let other = NewVm::new("other");
    options.vms.push(other.clone());
    let site = prepared(options, "");
    site.configure_host(&other.id);
    let said = check(&site);
    assert_eq!(said.status, 1);
    expect(&said, "this VM", "MISSING", &[&other.id, "configuration", "no disk here carries its identity"]);
    let nobody = "11111111-2222-4333-8444-555566667777";
    site.configure_host(nobody);
    let said = check(&site);
    assert_eq!(said.status, 1);
    expect(&said, "this VM", "MISSING", &[nobody, "the cloud shows no volume of VM"]);
}

#[test]
fn check_warns_of_all_that_is_in_the_way_of_attaching() {
    let mut options = Options::with_loops();
    options.host.hypervisor = "VMware".into();
    let site = prepared(options, "most_disks = 1");
    let host = site.cloud.host();
    let volume = site.cloud.add_volume("data", 1 << 30).unwrap();
    site.cloud.admin_attach(&volume, &host).unwrap();
    site.cloud.set_snapshot_policies(&volume, 1).unwrap();
    site.cloud.change_vm(&host, |vm| (vm.vm_snapshots, vm.backups) = (1, true)).unwrap();
    let said = check(&site);
    assert_eq!(said.status, 0, "warnings are no failure: {said:?}");
    expect(&said, "device slots", "warning", &["1 of 1"]);
    expect(&said, "hypervisor", "warning", &["VMware", "KVM"]);
    expect(&said, "VM snapshots", "warning", &["migration-host_VS_0", "refused"]);
    expect(&said, "backups", "warning", &["nightly", "backup.enable.attach.detach.of.volumes"]);
    expect(&said, "snapshot policies", "warning", &[&volume]);
}
