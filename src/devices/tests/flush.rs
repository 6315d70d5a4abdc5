//! A flush before a snapshot: writers are in the way, readers are not, and nothing is held after it.

use super::*;

fn child_with(file: File) -> (Reaped, i32) {
    let child = Reaped(Command::new("sleep").arg("600").stdin(file).spawn().unwrap());
    let pid = i32::try_from(child.0.id()).unwrap();
    (child, pid)
}

/// What was written is in the backing file.
fn written(device: &Loop, byte: u8) {
    let mut node = File::options().write(true).open(device.node()).unwrap();
    node.write_all(&[byte; 4096]).unwrap();
}

#[test]
fn c6_a_flush_takes_readers_for_no_users_and_names_who_can_write() {
    let devices = devices();
    let device = Loop::bind(1 << 20);
    let seen = disk(&devices, &device);
    let _pin = devices.pin(&seen).unwrap();
    let reader = child_with(File::open(device.node()).unwrap());
    devices.flush(&seen, false).unwrap();
    for options in [File::options().write(true), File::options().read(true).write(true)] {
        let (writer, pid) = child_with(options.open(device.node()).unwrap());
        match devices.flush(&seen, false) {
            Err(DevicesError::InUse { holders, .. }) => {
                assert_eq!(holders, [holder(HolderKind::Open, Some(pid), "sleep")], "the reader is not among them");
            }
            other => panic!("{other:?}"),
        }
        devices.flush(&seen, true).unwrap();
        drop(writer);
        devices.flush(&seen, false).unwrap();
    }
    drop(reader);
    // Nothing is held: another may have it exclusively.
    drop(devices.hold(&seen).unwrap());
}

#[test]
fn c6_a_passing_writer_is_waited_for() {
    let devices = devices();
    let device = Loop::bind(1 << 20);
    let seen = disk(&devices, &device);
    let file = File::options().write(true).open(device.node()).unwrap();
    let _child = Reaped(Command::new("sleep").arg("0.3").stdin(file).spawn().unwrap());
    devices.flush(&seen, false).unwrap();
}

#[test]
fn c6_a_mounted_disk_is_flushed_only_with_crash() {
    let devices = devices();
    let device = Loop::bind(4 << 20);
    let seen = disk(&devices, &device);
    let dir = tempfile::tempdir().unwrap();
    let mounted = mount(&device, dir.path());
    match devices.flush(&seen, false) {
        Err(DevicesError::InUse { holders, .. }) => {
            let here = holder(HolderKind::Mount, None, dir.path().to_str().unwrap());
            assert!(holders.contains(&here), "{holders:?}");
        }
        other => panic!("{other:?}"),
    }
    devices.flush(&seen, true).unwrap();
    drop(mounted);
}

#[test]
fn c6_a_flush_brings_what_was_written_to_the_disk() {
    let devices = devices();
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    for (crash, byte) in [(false, 0x5a), (true, 0xa5)] {
        let both = File::options().read(true).write(true).open(file.path()).unwrap();
        let device = Loop::over(&both, &DiskIdentity::loop_tag(VolumeId::random()));
        let seen = disk(&devices, &device);
        // The pin keeps the last close of the writer from flushing for us.
        let pin = devices.pin(&seen).unwrap();
        written(&device, byte);
        devices.flush(&seen, crash).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[..4096], [byte; 4096], "crash: {crash}");
        pin.release();
    }
}

#[test]
fn c6_a_flush_of_a_disk_that_is_gone_or_cannot_be_written_says_so() {
    let devices = devices();
    let device = Loop::bind(1 << 20);
    let seen = disk(&devices, &device);
    device.clear();
    for crash in [false, true] {
        assert!(matches!(devices.flush(&seen, crash), Err(DevicesError::Gone { .. })), "crash: {crash}");
    }
    let dir = tempfile::tempdir().unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=1m", "volfs-test", dir.path().to_str().unwrap()]);
    let _mounted = Undo("umount", vec!["-l".into(), dir.path().to_str().unwrap().into()]);
    let file = File::options().read(true).write(true).create_new(true).open(dir.path().join("full")).unwrap();
    file.set_len(8 << 20).unwrap();
    for crash in [false, true] {
        let device = Loop::over(&file, &DiskIdentity::loop_tag(VolumeId::random()));
        let seen = disk(&devices, &device);
        let _pin = devices.pin(&seen).unwrap();
        run("dd", &["if=/dev/urandom", &format!("of={}", device.node()), "bs=1M", "count=4", "conv=notrunc"]);
        let result = devices.flush(&seen, crash);
        assert!(matches!(&result, Err(DevicesError::Flush { .. })), "crash: {crash}: {result:?}");
    }
}
