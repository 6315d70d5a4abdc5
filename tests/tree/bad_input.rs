//! What must be refused: malformed commands and ids, a configuration or a record that is not right,
//! a full disk. A refusal names what is wrong and changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::common::{Tmpfs, Volfs};

/// Bytes for a fuzzed command: words of the grammar, out of order, cut, doubled, and noise.
struct Fuzz(u64);

impl Fuzz {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }

    fn word(&mut self) -> Vec<u8> {
        const WORDS: [&str; 16] = [
            "create",
            "attach",
            "detach",
            "resize",
            "4M",
            "-1",
            "force",
            "vm=",
            "vm=x",
            "timeout=",
            "timeout=-3",
            "nowait=1",
            "name",
            "99999999999999999999T",
            "disk-1",
            "\u{fc}ber",
        ];
        match self.below(4) {
            0 => (0..self.below(12)).map(|_| self.below(256) as u8).collect(),
            _ => WORDS[self.below(WORDS.len())].into(),
        }
    }

    /// Never a well-formed command: its last word is none of any grammar.
    fn command(&mut self) -> Vec<u8> {
        let mut text = Vec::new();
        for _ in 0..self.below(6) {
            text.extend(self.word());
            text.push(b" \t\n"[self.below(3)]);
        }
        text.extend(*b"no=such=key\x01");
        if self.below(50) == 0 {
            text.resize(4097 + self.below(3000), b'a');
        }
        text
    }
}

#[test]
fn bad_input_of_thousands_of_malformed_commands_is_einval_and_journals_nothing() {
    let volfs = Volfs::start();
    let uuid = volfs.job("j", &["d"], "1M").remove(0);
    let files = ["control".to_owned(), "jobs/j/control".into(), format!("jobs/j/volumes/{uuid}/control")];
    let history = volfs.read("history").unwrap();
    let mut fuzz = Fuzz(0x5eed_5eed_5eed_5eed);
    for n in 0..3000 {
        let text = fuzz.command();
        let written = rustix_write(&volfs.path(&files[n % 3]), &text);
        assert_eq!(written, libc::EINVAL, "{:?}", String::from_utf8_lossy(&text));
    }
    assert_eq!(volfs.read("history").unwrap(), history);
    assert_eq!(volfs.value(format!("volumes/{uuid}/status")), "detached");
    assert_eq!(fs::read_dir(volfs.path("jobs/j/volumes")).unwrap().count(), 1);
}

fn rustix_write(path: &Path, text: &[u8]) -> i32 {
    use std::io::Write;
    let open = fs::OpenOptions::new().write(true).open(path);
    open.and_then(|mut f| f.write(text)).map_or_else(|e| e.raw_os_error().unwrap_or(-1), |_| 0)
}

#[test]
fn bad_input_as_a_jobs_name_is_refused_by_its_errno() {
    let volfs = Volfs::start();
    let history = volfs.read("history").unwrap();
    let mkdir = |name: &[u8]| {
        let path = volfs.path("jobs").join(std::ffi::OsStr::from_bytes(name));
        fs::create_dir(path).map_or_else(|e| e.raw_os_error().unwrap(), |()| 0)
    };
    let long = [b'a'; 300];
    for name in
        [b"a b".as_slice(), b".hidden", b"new\nline", "\u{fc}ber".as_bytes(), b"tab\t", b"a\xff", &long[..192], b"a:b"]
    {
        assert_eq!(mkdir(name), libc::EINVAL, "{:?}", String::from_utf8_lossy(name));
    }
    assert!([libc::EINVAL, libc::ENAMETOOLONG].contains(&mkdir(&long)));
    assert_eq!(mkdir(b".."), libc::EEXIST);
    assert_eq!(mkdir(b"none/x"), libc::ENOENT);
    assert_eq!(volfs.read("history").unwrap(), history);
    assert_eq!(mkdir(&long[..191]), 0);
}

#[test]
fn bad_input_in_the_configuration_is_said_with_file_and_line() {
    for (text, line, word) in [
        ("reconcile_interval = 0\n", 1, "86400"),
        ("\n\nno_such_key = 1\n", 3, "no_such_key"),
        ("log = \"info\"\nprotect = [\"x\"]\n", 2, "x"),
        ("a = \n", 1, ""),
    ] {
        let mut volfs = Volfs::prepare(&[], text);
        let _ = volfs.try_launch().unwrap_err();
        let file = volfs.scratch("config.toml");
        let log = volfs.log();
        assert!(log.contains(&format!("{}:{line}:", file.display())), "{text}: {log}");
        assert!(log.contains(word) && !volfs.state().exists(), "{text}: {log}");
    }
}

/// Every file below, with its bytes.
fn bytes_below(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(bytes_below(&path));
        } else if path.file_name().unwrap() != "lock" {
            found.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    found
}

fn refused(volfs: &mut Volfs, names: &Path) -> String {
    let before = bytes_below(&volfs.state());
    let words = volfs.try_launch().unwrap_err();
    assert!(words.contains(names.to_str().unwrap()), "{words}");
    assert_eq!(bytes_below(&volfs.state()), before, "a refused record was changed: {words}");
    words
}

#[test]
fn bad_input_as_a_state_directory_that_is_not_ours_is_left_alone() {
    let mut volfs = Volfs::prepare(&[], "");
    fs::create_dir(volfs.state()).unwrap();
    fs::write(volfs.state().join("theirs.txt"), "theirs").unwrap();
    let state = volfs.state();
    let words = refused(&mut volfs, &state);
    assert!(words.contains("theirs.txt"), "{words}");
}

#[test]
fn bad_input_as_a_record_is_refused_by_name_and_left_as_it_was() {
    let mut volfs = Volfs::start();
    volfs.job("j", &["d"], "1M");
    assert_eq!(volfs.terminate().0, 0);
    let db = volfs.state().join("volfs.db");
    let good = fs::read(&db).unwrap();

    let mut newer = good.clone();
    newer[60..64].copy_from_slice(&999u32.to_be_bytes());
    fs::write(&db, &newer).unwrap();
    assert!(refused(&mut volfs, &db).contains("999"));

    fs::write(
        &db,
        b"this is not a database, and much longer than a header of one hundred bytes is, so that it is read whole",
    )
    .unwrap();
    refused(&mut volfs, &db);

    fs::write(&db, &good[..good.len() / 2]).unwrap();
    refused(&mut volfs, &db);

    fs::write(&db, b"").unwrap();
    refused(&mut volfs, &db);

    let mut foreign = good.clone();
    foreign[68..72].copy_from_slice(&7u32.to_be_bytes());
    fs::write(&db, &foreign).unwrap();
    refused(&mut volfs, &db);

    let mut flipped = good.clone();
    let middle = flipped.len() / 2 / 4096 * 4096;
    flipped[middle..middle + 64].fill(0xa5);
    fs::write(&db, &flipped).unwrap();
    refused(&mut volfs, &db);

    fs::write(&db, &good).unwrap();
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(&db, fs::Permissions::from_mode(0o400)).unwrap();
    assert!(refused(&mut volfs, &db).contains("read-only"));

    fs::set_permissions(&db, fs::Permissions::from_mode(0o600)).unwrap();
    volfs.launch();
    assert_eq!(volfs.value("jobs/j/disks/d/status"), "detached");
}

#[test]
fn bad_input_of_a_full_disk_is_enospc_and_nothing_acknowledged_is_lost() {
    let mut volfs = Volfs::prepare(&[], "");
    let small = Tmpfs::mount(&volfs.state(), c"size=4m,mode=700");
    volfs.launch();
    // Sparse, so that the volume itself costs nothing.
    volfs.job("j", &["d"], "1M");
    assert_eq!(volfs.write("jobs/j/control", "attach"), 0);
    let mut ballast = fs::File::create(volfs.state().join("loop/ballast")).unwrap();
    // To the last byte.
    for size in [65536, 4096, 512, 1] {
        let chunk = vec![0u8; size];
        while std::io::Write::write_all(&mut ballast, &chunk).is_ok() {}
    }
    let mut made = Vec::new();
    let mut refused = 0;
    for n in 0..300 {
        let path = volfs.path(format!("jobs/full-{n}"));
        match fs::create_dir(&path) {
            Ok(()) => made.push(path),
            Err(e) => {
                refused += 1;
                assert!(matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EIO)), "{e}");
                assert!(!path.exists(), "refused and there");
            }
        }
    }
    assert!(refused > 0, "the disk was never full");
    let create = volfs.write("jobs/j/control", "create more 1M");
    assert!([libc::ENOSPC, libc::EIO].contains(&create), "errno {create}");
    let error = volfs.value("jobs/j/error");
    assert!(error.contains("create") && error.len() > 30, "{error}");
    assert_eq!(volfs.value("jobs/j/disks/d/status"), "attached");
    assert_ne!(volfs.read("health").unwrap().lines().next(), Some("ok"));
    drop(ballast);
    fs::remove_file(volfs.state().join("loop/ballast")).unwrap();
    // Space is back: the next command works, and health with it.
    assert_eq!(volfs.write("jobs/j/control", "create more 1M"), 0, "{}", volfs.log());
    assert_eq!(volfs.write("jobs/j/control", "detach"), 0, "{}", volfs.log());
    assert_eq!(volfs.read("health").unwrap().lines().next(), Some("ok"));
    volfs.kill();
    volfs.launch();
    assert!(made.iter().all(|p| p.is_dir()), "an acknowledged mkdir is lost");
    volfs.until("settled status", || volfs.value("jobs/j/status") == "idle detached=2");
    let count = fs::read_dir(volfs.path("jobs")).unwrap().count();
    assert_eq!(count, made.len() + 1, "a refused mkdir came back");
    volfs.terminate();
    drop(small);
}
