//! What the kernel might say: no text of its files and no message panics a reader.

use std::fs;

use super::super::{identity, sysfs, uevent, walk};
use crate::fuzz::fuzz;
use crate::model::DiskIdentity;

#[test]
fn any_message_is_a_disk_by_a_plain_name_or_none() {
    fuzz("uevent", 20_000, |bytes| match uevent::parse(bytes) {
        Some(change) => {
            let plain = |s: &str| !s.is_empty() && s.len() < 256 && s.bytes().all(|b| b.is_ascii_graphic());
            assert!(plain(&change.name) && plain(&change.action), "{change:?}");
            assert!(!change.name.contains('/') && !matches!(&*change.name, "." | ".."), "{change:?}");
            true
        }
        None => false,
    });
}

#[test]
fn any_attribute_is_a_clean_identity_or_none() {
    let dir = tempfile::tempdir().unwrap();
    for disk in ["vda", "sda"] {
        fs::create_dir_all(dir.path().join(disk).join("device")).unwrap();
    }
    fuzz("vpd", 1_000, |bytes| {
        let mut taken = false;
        for file in ["vda/serial", "sda/device/vpd_pg80", "sda/device/vpd_pg83", "sda/device/serial", "sda/wwid"] {
            let path = dir.path().join(file);
            fs::write(&path, bytes).unwrap();
            match identity::read(&dir.path().join(&file[..3])).unwrap() {
                DiskIdentity::None => {}
                told => {
                    let text = told.text().to_owned();
                    let clean = text.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
                    assert!(!text.is_empty() && text.len() <= 2 * 255 && clean, "{told:?}");
                    taken = true;
                }
            }
            fs::remove_file(&path).unwrap();
        }
        taken
    });
}

#[test]
fn any_text_of_proc_and_sysfs_is_read_or_left() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("block/vdb");
    fs::create_dir_all(&disk).unwrap();
    let tree = sysfs::Sysfs::new(dir.path().to_owned());
    fuzz("proc", 1_000, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let mounts = text.lines().filter(|l| walk::parse_mount(l).is_some()).count();
        let swaps = walk::parse_swaps(&text).count();
        let _ = walk::unescape(&text);
        if let Some(dev) = sysfs::parse_dev(&text) {
            assert_eq!(sysfs::parse_dev(&dev.to_string()), Some(dev));
        }
        for file in ["size", "diskseq", "dev", "hidden"] {
            fs::write(disk.join(file), bytes).unwrap();
        }
        let told = [tree.size("vdb").is_ok(), tree.dev("vdb").is_ok(), tree.hidden("vdb").is_ok()];
        if let Ok(seq) = tree.diskseq("vdb") {
            assert_eq!(seq, text.trim_ascii().parse().ok(), "{text}");
        }
        mounts + swaps > 0 || told.contains(&true)
    });
}
