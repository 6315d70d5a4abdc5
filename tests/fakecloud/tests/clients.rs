//! Clients that others wrote, against the fake cloud: where they and we read CloudStack differently,
//! one of us is wrong. They are the Python packages `cs` and `apache-libcloud` in a virtual
//! environment that `.ci/run` makes: `$VOLFS_CLIENTS_VENV`, or `clients-venv` in the target directory.

// A helper of tests that cannot go on is a failed test.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use fakecloud::{Effect, FakeCloud, Options};

fn python() -> Option<PathBuf> {
    let default = || Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("clients-venv").into_os_string();
    let venv = std::env::var_os("VOLFS_CLIENTS_VENV").unwrap_or_else(default);
    let python = Path::new(&venv).join("bin/python");
    if python.exists() {
        return Some(python);
    }
    let test = std::thread::current();
    let line = format!(
        "skipped: {}: this machine lacks the clients in {} (.ci/run installs them)\n",
        test.name().unwrap_or("a test"),
        venv.display()
    );
    // Straight to the descriptor: the line is to be seen of a test that passes, too.
    let _ = std::io::stderr().write_all(line.as_bytes());
    None
}

/// Runs a script; what it did is then asked of the cloud.
fn run(cloud: &FakeCloud, script: &str, args: &[&str]) -> bool {
    let Some(python) = python() else { return false };
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    let output = Command::new(python)
        .arg("-I")
        .arg(scripts.join(script))
        .args(args)
        .env_clear()
        .env("LC_ALL", "C.UTF-8")
        .env("ENDPOINT", cloud.endpoint())
        .env("KEY", cloud.key())
        .env("SECRET", cloud.secret())
        .env("HOST", cloud.host())
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    let last: Vec<_> = cloud.requests().into_iter().rev().take(3).collect();
    assert!(output.status.success(), "{script} {args:?}: {}\n{words}\nlast requests: {last:#?}", output.status);
    true
}

/// A client's whole life of volumes had just these effects.
fn effects(cloud: &FakeCloud, created: usize) {
    let count = |effect| cloud.effects(effect, None);
    assert_eq!(count(Effect::Created), created);
    assert_eq!(count(Effect::Expunged), created);
    for effect in [Effect::Attached, Effect::Detached, Effect::Resized, Effect::SnapshotTaken, Effect::SnapshotDeleted]
    {
        assert_eq!(count(effect), 1, "{effect:?}");
    }
    assert!(cloud.data_volumes().is_empty());
}

#[test]
fn cs_by_post_lives_through_all_of_it() {
    let options = Options { enforce_post: true, page_size: 500, ..Options::default() };
    let cloud = FakeCloud::start(options).unwrap();
    if run(&cloud, "with_cs.py", &["post"]) {
        effects(&cloud, 5);
    }
}

#[test]
fn cs_by_get_lives_through_all_of_it() {
    let cloud = FakeCloud::start(Options::default()).unwrap();
    if run(&cloud, "with_cs.py", &["get"]) {
        effects(&cloud, 5);
    }
}

#[test]
fn libcloud_lives_through_all_of_it() {
    let cloud = FakeCloud::start(Options::default()).unwrap();
    if run(&cloud, "with_libcloud.py", &[]) {
        effects(&cloud, 1);
    }
}
