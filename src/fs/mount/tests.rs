use super::*;

const INFO: &str = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n\
    90 22 0:50 / /mnt/my\\040dir rw,nosuid shared:2 master:3 - fuse.volfs volfs rw,user_id=0\n\
    91 22 0:51 / /mnt/my\\040dir rw - tmpfs none rw\n\
    92 22 0:52 /sub /mnt/other rw - fuse.sshfs me@there: rw\n";

#[test]
fn mountinfo_is_read_with_its_escapes_and_the_topmost_mount_counts() {
    let top = mounted_at(INFO, Path::new("/mnt/my dir")).unwrap();
    assert_eq!((top.device.as_str(), top.fstype.as_str(), top.source.as_str()), ("0:51", "tmpfs", "none"));
    assert_eq!(mounted_at(INFO, Path::new("/mnt/other")).unwrap().fstype, "fuse.sshfs");
    assert_eq!(mounted_at(INFO, Path::new("/mnt")), None);
    assert_eq!(mounted_at(INFO, Path::new("/")).unwrap().device, "8:1");
}

#[test]
fn a_mount_point_must_be_a_directory_by_its_absolute_path() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    std::os::unix::fs::symlink(dir.path(), dir.path().join("link")).unwrap();
    let deep = dir.path().join("missing/too");
    for bad in [Path::new("relative"), Path::new("/"), &file, &dir.path().join("link"), &deep] {
        assert!(matches!(prepare(bad), Err(MountError::Mountpoint { .. })), "{}", bad.display());
    }
    assert_eq!(prepare(dir.path()).unwrap(), dir.path().canonicalize().unwrap());
    let made = dir.path().join("made");
    assert!(prepare(&made).is_ok() && made.is_dir(), "the last directory of the path is made");
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = detach(&self.0);
    }
}

#[test]
fn another_filesystem_at_the_mount_point_is_refused_and_stays() {
    let dir = tempfile::tempdir().unwrap();
    rustix::mount::mount("volfs-test", dir.path(), "tmpfs", MountFlags::empty(), None).unwrap();
    let _guard = Unmount(dir.path().into());
    let error = prepare(dir.path()).unwrap_err();
    assert!(matches!(&error, MountError::Occupied { fstype, .. } if fstype == "tmpfs"), "{error}");
    assert!(mounted_at(&mountinfo().unwrap(), dir.path()).is_some());
}

#[test]
fn dead_mounts_of_a_predecessor_are_cleared_away() {
    let dir = tempfile::tempdir().unwrap();
    let _guards = [Unmount(dir.path().into()), Unmount(dir.path().into())];
    for _ in 0..2 {
        // Nobody answers INIT and the descriptor goes: as after a SIGKILL.
        let fuse = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        mount(&fuse, dir.path()).unwrap();
    }
    assert_eq!(prepare(dir.path()).unwrap(), dir.path());
    assert!(mounted_at(&mountinfo().unwrap(), dir.path()).is_none());
}

#[test]
fn a_live_volfs_at_the_mount_point_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let serving = serve(
        crate::fs::testing::Fake::new(),
        Options { mountpoint: dir.path().into(), ..Options::default() },
        None,
        None,
    );
    let serving = serving.unwrap();
    let _guard = Unmount(dir.path().into());
    let error = prepare(dir.path()).unwrap_err();
    assert!(matches!(error, MountError::Alive { .. }), "{error}");
    serving.stop();
    assert_eq!(prepare(dir.path()).unwrap(), dir.path());
}

#[test]
fn waits_end_below_an_administrators_request_timeout() {
    let dir = tempfile::tempdir().unwrap();
    let set = |name: &str, value: &str| std::fs::write(dir.path().join(name), value).unwrap();
    assert_eq!(request_timeout(dir.path()), None);
    set("default_request_timeout", "0\n");
    set("max_request_timeout", "0\n");
    assert_eq!(request_timeout(dir.path()), None);
    set("max_request_timeout", "300\n");
    assert_eq!(request_timeout(dir.path()), Some(Duration::from_secs(300)));
    set("default_request_timeout", "20\n");
    assert_eq!(request_timeout(dir.path()), Some(Duration::from_secs(20)));
    for seconds in [1, 2, 15, 300] {
        let limit = Duration::from_secs(seconds);
        assert!(below(limit) < limit && below(limit) >= limit / 2);
    }
}
