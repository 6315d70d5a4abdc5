//! The canary: at the loudest log, with calls that fail and calls that succeed, the keys and what was
//! signed with them are nowhere that anybody can read.

use std::fs;
use std::process::Command;

use fakecloud::{Fault, Kind, Options};

use crate::common::everything;
use crate::site::{Site, write_keys};

fn holds(bytes: &[u8], word: &str) -> bool {
    bytes.windows(word.len()).any(|w| w.eq_ignore_ascii_case(word.as_bytes()))
}

#[test]
fn predecessor_120_122_no_key_and_nothing_signed_is_in_log_tree_state_or_process_list() {
    let site = Site::with(Options::with_loops(), &[("VOLFS_LOG", "trace")]);
    site.job("j", &["d", "e"], "1G");
    assert_eq!(site.disk("j", "d", "attach"), 0);
    let echo = format!("of {} with secret {}", site.cloud.key(), site.cloud.secret());
    for kind in [
        Kind::Error { code: 530, cs: 4250, text: format!("refused {echo} signature=abc") },
        Kind::DropBefore,
        Kind::Html { status: 502, acted: false },
        Kind::Garbage,
        Kind::Truncated,
    ] {
        site.cloud.fault(Fault::new("attachVolume", kind));
        site.disk("j", "e", "attach timeout=5");
        site.disk("j", "e", "detach timeout=5");
    }
    // Keys that are not taken: the longest sentence of all, and a file that changes twice.
    let (key, secret) = (site.cloud.key(), site.cloud.secret());
    write_keys(&site.keys_file(), &site.cloud.endpoint(), &key, "canary-of-a-wrong-secret");
    assert_ne!(site.volfs.write("control", "reconcile timeout=10"), 0);
    write_keys(&site.keys_file(), &site.cloud.endpoint(), &key, &secret);
    assert_eq!(site.volfs.write("control", "reconcile"), 0, "{}", site.volfs.log());

    let mut all = vec![("the log".into(), site.volfs.log().into_bytes())];
    everything(&site.volfs.root(), &mut all);
    everything(&site.volfs.state(), &mut all);
    let pid = site.volfs.pid().to_string();
    for file in ["cmdline", "environ"] {
        all.push((file.into(), fs::read(format!("/proc/{pid}/{file}")).unwrap()));
    }
    all.push(("ps".into(), Command::new("ps").args(["eww", "-o", "args", "-p", &pid]).output().unwrap().stdout));
    assert!(all.iter().any(|(path, _)| path.ends_with("info.json")), "the tree was read");
    assert!(holds(&all[0].1, "attachVolume"), "the log is that of the calls");
    for (path, bytes) in &all {
        for word in [key.as_str(), secret.as_str(), "canary-of-a-wrong-secret", "signature="] {
            assert!(!holds(bytes, word), "{} holds {word:?}", path.display());
        }
    }
    assert!(site.cloud.requests().iter().all(|r| r.method == "POST"), "a GET's URL ends in the logs of others");
}
