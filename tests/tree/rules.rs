//! R1, R3, R4, R8 to R10, `hold` and `vm_name` through the mount.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::Path;

use crate::common::{SHELLS, Volfs};
use crate::shells::two_disks;

/// Changes the provider's metadata of a volume behind the daemon's back.
pub fn edit_meta(volfs: &Volfs, uuid: &str, change: impl FnOnce(&mut serde_json::Value)) {
    let path = volfs.state().join("loop/volumes").join(uuid).join("meta.json");
    let mut meta: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut meta);
    let new = path.with_extension("new");
    fs::write(&new, meta.to_string()).unwrap();
    fs::rename(&new, &path).unwrap();
}

/// The id of a VM that is not this one.
pub const OTHER_VM: &str = "11111111-2222-4333-8444-555555555555";

fn rows(text: &str) -> Vec<Vec<&str>> {
    text.lines().map(|l| l.split('\t').collect()).collect()
}

#[test]
fn r1_a_value_is_one_line_and_a_table_keeps_its_columns() {
    let volfs = Volfs::start();
    let (on, off) = two_disks(&volfs);
    assert_eq!(volfs.write("jobs/a/disks/off/control", &format!("attach vm={OTHER_VM}")), 0, "{}", volfs.log());
    let value = |file: &str| volfs.value(file);
    let of = |uuid: &str, file: &str| volfs.value(format!("jobs/a/volumes/{uuid}/{file}"));
    assert_eq!(value("jobs/a/status"), "idle attached=1 remote=1");
    assert_eq!((value("jobs/a/vm_name"), value("jobs/a/hold")), ("".into(), "0".into()));
    assert_eq!((of(&on, "status"), of(&off, "status")), ("attached".into(), "remote".into()));
    assert_eq!(of(&on, "size"), "4194304");
    assert_eq!(of(&on, "name"), "a-on");
    assert_eq!(of(&off, "vm"), OTHER_VM);
    assert_eq!(of(&on, "serial"), format!("volfs:{on}"));
    assert!(of(&on, "owner").contains('/'));
    assert!(of(&on, "device").starts_with("/dev/loop"));
    for file in ["device_id", "size"] {
        assert!(of(&on, file).parse::<u64>().is_ok(), "{file}");
    }
    for file in ["status", "name", "size", "vm", "device_id", "serial", "cloud_state", "owner", "info.json"] {
        for uuid in [&on, &off] {
            let text = volfs.read(format!("jobs/a/volumes/{uuid}/{file}")).unwrap();
            assert_eq!(text.matches('\n').count(), 1, "{file}: {text:?}");
        }
    }
    // No value: an empty line.
    assert_eq!(volfs.write("jobs/a/disks/off/control", &format!("detach vm={OTHER_VM}")), 0);
    for file in ["vm", "device_id"] {
        assert_eq!(volfs.read(format!("jobs/a/volumes/{off}/{file}")).as_deref(), Ok("\n"), "{file}");
    }
    assert_eq!(volfs.read("error").as_deref(), Ok("\n"));
    let info: serde_json::Value =
        serde_json::from_str(&volfs.read(format!("volumes/{on}/info.json")).unwrap()).unwrap();
    assert_eq!((info["uuid"].as_str(), info["status"].as_str()), (Some(&*on), Some("attached")));

    // Tables: a header, tabs, the same columns in each row, no cell empty.
    volfs.write("jobs/a/control", "bad");
    let headers = [
        ("table", "job\tdisk\tuuid\tname\tstatus\tdevice\tvm\tsize"),
        ("jobs/a/table", "job\tdisk\tuuid\tname\tstatus\tdevice\tvm\tsize"),
        ("problems", "object\tsince\twhat\twhy\tremedy"),
        ("limits", "used\tmost"),
        ("history", "time\toperation\tjob\tdisk\tuuid\toutcome\tseconds\tuid\tpid\tcommand"),
        ("jobs/a/history", "time\toperation\tjob\tdisk\tuuid\toutcome\tseconds\tuid\tpid\tcommand"),
        ("jobs/a/disks/on/history", "time\toperation\tjob\tdisk\tuuid\toutcome\tseconds\tuid\tpid\tcommand"),
        ("jobs/a/disks/on/holders", "kind\tpid\tcommand"),
    ];
    for (file, header) in headers {
        let text = volfs.read(file).unwrap();
        assert!(text.starts_with(header) && text.ends_with('\n'), "{file}: {text:?}");
        let rows = rows(&text);
        for row in &rows {
            assert_eq!(row.len(), rows[0].len(), "{file}: {row:?}");
            assert!(row.iter().all(|cell| !cell.is_empty()), "{file}: {row:?}");
        }
    }
    let text = volfs.read("table").unwrap();
    let detached = rows(&text).into_iter().find(|r| r[1] == "off").unwrap();
    assert_eq!((detached[5], detached[6]), ("-", "-"));
    // A table's rows keep their columns in a shell's read.
    for shell in SHELLS {
        let said = volfs.sh_in(
            shell,
            "T=$(printf '\\t'); while IFS=$T read -r job disk uuid name status device vm size; do echo \"$disk $vm $size\"; done < $R/jobs/a/table",
        );
        assert!(said.out.contains("off - 4194304\n"), "{shell:?} {said:?}");
    }
}

#[test]
fn r1_a_hostile_name_is_one_line_with_octal_escapes() {
    let volfs = Volfs::start();
    let (_, off) = two_disks(&volfs);
    // A command cannot hold it …
    assert_eq!(volfs.write("jobs/a/control", "create x 1M name=a\x1b[31m"), libc::EINVAL);
    assert_eq!(volfs.write("jobs/a/control", "create x 1M name=a = b  c"), 0);
    assert_eq!(volfs.value("jobs/a/disks/x/name"), "a = b  c");
    // … the cloud can.
    edit_meta(&volfs, &off, |meta| meta["name"] = "a\tb\nc\x1b[31m\\d\u{85}é".into());
    assert_eq!(volfs.write("jobs/a/disks/off/control", "reconcile"), 0);
    let shown = "a\\011b\\012c\\033[31m\\134d\\302\\205é";
    assert_eq!(volfs.value("jobs/a/disks/off/name"), shown);
    for table in ["table", "jobs/a/table"] {
        let text = volfs.read(table).unwrap();
        let row = rows(&text).into_iter().find(|r| r[1] == "off").unwrap();
        assert_eq!((row.len(), row[3]), (8, shown), "{table}");
    }
    assert_eq!(
        volfs.ok("printf \"$(cat $R/jobs/a/disks/off/name)\" | od -An -c | tr -d ' \\n' | cut -c1-10"),
        "a\\tb\\nc033"
    );
    let info: serde_json::Value =
        serde_json::from_str(&volfs.read(format!("volumes/{off}/info.json")).unwrap()).unwrap();
    assert_eq!(info["name"].as_str(), Some("a\tb\nc\x1b[31m\\d\u{85}é"));
}

#[test]
fn r1_r9_what_cannot_be_told_is_enodata_and_never_an_empty_value() {
    let mut volfs = Volfs::start();
    let made = volfs.job("a", &["d"], "1M");
    volfs.terminate();
    volfs.set_env(&[("VOLFS_FAILPOINTS", "loop.unreachable=fail")]);
    volfs.launch();
    assert_eq!(volfs.value("jobs/a/disks/d/status"), "unknown");
    // "Attached nowhere" and "nobody has it" would be guesses.
    for file in ["vm", "device_id", "holders"] {
        assert_eq!(volfs.read(format!("volumes/{}/{file}", made[0])), Err(libc::ENODATA), "{file}");
        assert!(fs::symlink_metadata(volfs.path(format!("volumes/{}/{file}", made[0]))).is_ok(), "{file}");
    }
    assert_eq!(volfs.read("jobs/a/disks/d/device"), Err(libc::ENODEV));
    for shell in SHELLS {
        let said = volfs.sh_in(shell, "x=$(cat $R/jobs/a/disks/d/vm) || echo \"no: [$x]\"");
        assert_eq!(said.out, "no: []\n", "{shell:?} {said:?}");
    }
}

/// Binds another file under a read-only loop device: its disk is another one from then on.
fn change_disk(device: &Path, file: &fs::File) {
    use std::os::fd::AsRawFd;
    const LOOP_CHANGE_FD: libc::c_ulong = 0x4C06;
    let node = fs::File::open(device).unwrap();
    // SAFETY: LOOP_CHANGE_FD takes a descriptor number as its argument.
    let done = unsafe { libc::ioctl(node.as_raw_fd(), LOOP_CHANGE_FD as _, file.as_raw_fd()) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn r3_d2_a_device_that_becomes_another_disk_is_enodev_at_the_next_open() {
    let mut volfs = Volfs::start();
    let made = volfs.job("a", &["d"], "1M");
    assert_eq!(volfs.write("jobs/a/control", "attach"), 0);
    // A live loop device can be exchanged behind everybody's back if it is read-only: so is this one,
    // bound anew while no daemon runs.
    volfs.kill();
    for name in volfs.loops() {
        assert!(
            std::process::Command::new("losetup").args(["-d", &format!("/dev/{name}")]).status().unwrap().success()
        );
    }
    let data = volfs.state().join("loop/volumes").join(&made[0]).join("data.img");
    let bound = std::process::Command::new("losetup").args(["-r", "-f", "--show"]).arg(&data).output().unwrap();
    let node = String::from_utf8(bound.stdout).unwrap().trim_end().to_owned();
    let tagged = fs::File::open(&node).unwrap();
    let mut info = volfs::sys::loop_status(tagged.as_fd()).unwrap();
    info.set_file_name(&format!("volfs:{}", made[0]));
    volfs::sys::loop_set_status(tagged.as_fd(), &info).unwrap();
    drop(tagged);
    volfs.launch();
    volfs.until("attached again", || volfs.value("jobs/a/disks/d/status") == "attached");
    assert_eq!(volfs.value("jobs/a/disks/d/device"), node);
    let was = volfs.value("jobs/a/disks/d/incarnation");
    let mut held = fs::File::open(volfs.path("jobs/a/disks/d/device")).unwrap();
    let mut text = String::new();
    held.read_to_string(&mut text).unwrap();
    assert_eq!(text, format!("{node}\n"));
    let block = fs::File::options().read(true).custom_path(&volfs.path("jobs/a/disks/d/block"));

    // Another disk of the same size under the same number, with no tag of ours.
    let mut untagged = volfs::sys::loop_status(fs::File::open(&node).unwrap().as_fd()).unwrap();
    untagged.set_file_name("somebody's");
    let other = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .read(true)
        .open(volfs.scratch("other.img"))
        .unwrap();
    other.set_len(1 << 20).unwrap();
    volfs::sys::loop_set_status(fs::File::open(&node).unwrap().as_fd(), &untagged).unwrap();
    change_disk(Path::new(&node), &other);

    // The next open, not a later one.
    assert_eq!(volfs.read("jobs/a/disks/d/device"), Err(libc::ENODEV));
    assert_eq!(volfs.read("jobs/a/disks/d/incarnation"), Err(libc::ENODEV));
    assert_eq!(fs::File::open(volfs.path("jobs/a/disks/d/block")).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    assert_eq!(
        fs::File::open(volfs.path(format!("exports/{}", made[0]))).unwrap_err().raw_os_error(),
        Some(libc::ENOENT)
    );
    held.seek(SeekFrom::Start(0)).unwrap();
    assert_eq!(held.read_to_string(&mut text).unwrap_err().raw_os_error(), Some(libc::ENODEV));
    // A path to the node that was taken before does not lead to the other disk either.
    assert_eq!(block.reopen(), Err(libc::ENODEV));
    volfs.until("lost", || volfs.value("jobs/a/disks/d/status") == "lost");
    assert_ne!(was, "");
    for shell in SHELLS {
        for script in [
            "x=$(cat $R/jobs/a/disks/d/device)",
            "read -r x < $R/jobs/a/disks/d/device",
            "set -e; d=$(cat $R/jobs/a/disks/d/device); true",
        ] {
            assert_ne!(volfs.sh_in(shell, script).status, 0, "W7: {shell:?} `{script}`");
        }
    }
    for script in ["x=$(<$R/jobs/a/disks/d/device)", "mapfile -t x < $R/jobs/a/disks/d/device"] {
        assert_ne!(volfs.sh_in(&["bash"], script).status, 0, "W7: `{script}`");
    }
}

/// A node held by O_PATH, as a bind mount or a standing process holds it.
struct Held(fs::File);

trait HoldPath {
    fn custom_path(&mut self, path: &Path) -> Held;
}

impl HoldPath for fs::OpenOptions {
    fn custom_path(&mut self, path: &Path) -> Held {
        use std::os::unix::fs::OpenOptionsExt;
        Held(self.custom_flags(libc::O_PATH).open(path).unwrap())
    }
}

impl Held {
    /// Opens the very node again; the errno if that fails.
    fn reopen(&self) -> Result<(), i32> {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        fs::File::open(path).map(drop).map_err(|e| e.raw_os_error().unwrap_or(0))
    }
}

#[test]
fn r3_a_changed_value_is_seen_by_the_next_read_and_by_a_reread_from_the_start() {
    let volfs = Volfs::start();
    two_disks(&volfs);
    let mut status = fs::File::open(volfs.path("jobs/a/disks/off/status")).unwrap();
    let mut table = fs::File::open(volfs.path("jobs/a/table")).unwrap();
    let mut again = |text: &str, change: &str| {
        assert_eq!(volfs.write("jobs/a/disks/off/control", change), 0);
        assert_eq!(volfs.value("jobs/a/disks/off/status"), text);
        let (mut now, mut rows) = (String::new(), String::new());
        status.seek(SeekFrom::Start(0)).unwrap();
        status.read_to_string(&mut now).unwrap();
        table.seek(SeekFrom::Start(0)).unwrap();
        table.read_to_string(&mut rows).unwrap();
        assert_eq!(now, format!("{text}\n"));
        assert!(rows.lines().any(|l| l.contains("\toff\t") && l.contains(&format!("\t{text}\t"))), "{rows}");
    };
    for _ in 0..3 {
        again("attached", "attach");
        again("detached", "detach");
    }
}

#[test]
fn r4_who_stands_in_a_directory_that_is_released_or_moved_gets_estale() {
    let volfs = Volfs::start();
    for (i, shell) in SHELLS.iter().enumerate() {
        for verb in ["release", "move", "delete"] {
            let (job, next) = (format!("{verb}{i}"), format!("next-{verb}{i}"));
            let uuid = volfs.job(&job, &["d"], "1M").remove(0);
            volfs.job(&next, &["other"], "1M");
            let word = if verb == "move" { &next } else { &uuid };
            let script = format!(
                "cd $R/jobs/{job}/volumes/{uuid} && echo '{verb} {word}' > control && sleep 0\n\
                 cat status; echo $?; ls . ; echo attach > control; echo $?"
            );
            let said = volfs.sh_in(shell, &script);
            assert!(said.err.contains("Stale file handle"), "{shell:?} {verb}: {said:?}");
            let lines: Vec<&str> = said.out.lines().collect();
            assert_eq!(lines[0], "1", "{shell:?} {verb}: {said:?}");
            assert_ne!(lines[1], "0", "{shell:?} {verb}: {said:?}");
            // By its path it is where it belongs, and nothing was attached.
            if verb == "move" {
                assert_eq!(volfs.value(format!("jobs/{next}/volumes/{uuid}/status")), "detached");
            }
            assert_eq!(volfs.read(format!("jobs/{job}/volumes/{uuid}/status")), Err(libc::ENOENT));
        }
        let said = volfs.sh_in(shell, "mkdir $R/jobs/gone; cd $R/jobs/gone; rmdir $R/jobs/gone; mkdir $R/jobs/gone; cat status; echo create x 1M > control; echo $?");
        assert!(said.err.contains("Stale file handle") && !said.out.ends_with("0\n"), "{shell:?} {said:?}");
        assert_eq!(volfs.ok("ls $R/jobs/gone/disks; rmdir $R/jobs/gone"), "");
    }
    assert!(volfs.loops().is_empty());
}

#[test]
fn r4_a_control_held_open_is_enodev_once_its_object_is_released_moved_or_forgotten() {
    let volfs = Volfs::start();
    volfs.job("next", &[], "1M");
    for verb in ["release", "move", "delete"] {
        let uuid = volfs.job("a", &["d"], "1M").remove(0);
        let open = |path: String| fs::OpenOptions::new().write(true).open(volfs.path(path)).unwrap();
        let mut control = open(format!("jobs/a/volumes/{uuid}/control"));
        let word = if verb == "move" { "next" } else { &uuid };
        assert_eq!(volfs.write(format!("volumes/{uuid}/control"), &format!("{verb} {word}")), 0, "{}", volfs.log());
        for text in ["attach", "disk x", &format!("delete {uuid}")] {
            assert_eq!(
                control.write(text.as_bytes()).unwrap_err().raw_os_error(),
                Some(libc::ENODEV),
                "{verb}: {text}"
            );
        }
        let mut job = open("jobs/a/control".into());
        let mut hold = open("jobs/a/hold".into());
        assert_eq!(volfs.ok("rmdir $R/jobs/a; mkdir $R/jobs/a"), "");
        assert_eq!(job.write(b"create x 1M").unwrap_err().raw_os_error(), Some(libc::ENODEV));
        assert_eq!(hold.write(b"1").unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }
    assert_eq!(volfs.value("jobs/next/status"), "idle detached=1");
    assert_eq!(volfs.ok("ls $R/jobs/a/disks"), "");
}

#[test]
fn r4_no_path_in_one_job_leads_to_another_jobs_volume() {
    let volfs = Volfs::start();
    let a = volfs.job("a", &["d"], "1M").remove(0);
    let b = volfs.job("b", &["d"], "1M").remove(0);
    for below in ["volumes/UUID/status", "volumes/UUID/control", "disks/UUID", "volumes/UUID/../../control"] {
        let path = format!("jobs/a/{}", below.replace("UUID", &b));
        assert_eq!(volfs.read(&path), Err(libc::ENOENT), "{path}");
    }
    assert_eq!(volfs.write(format!("jobs/a/volumes/{a}/control"), &format!("delete {b}")), libc::EINVAL);
    assert_eq!(volfs.write(format!("jobs/a/volumes/{a}/control"), &format!("release {b}")), libc::EINVAL);
    assert_eq!(volfs.write("jobs/a/control", "destroy b"), libc::EINVAL);
    assert_eq!(volfs.write("jobs/a/control", &format!("claim {b}")), libc::EBUSY);
    assert_eq!(volfs.write("jobs/a/control", "attach"), 0);
    assert_eq!(volfs.write("jobs/a/control", "destroy a"), 0);
    assert_eq!(volfs.value("jobs/b/status"), "idle detached=1");
    assert_eq!(volfs.value(format!("jobs/b/volumes/{b}/status")), "detached");
}

#[test]
fn r8_every_refusal_names_the_object_in_the_way_and_the_way_out() {
    let volfs = Volfs::start();
    let (on, off) = two_disks(&volfs);
    let theirs = volfs.job("b", &["d"], "1M").remove(0);
    let unknown = "99999999-1111-4222-8333-444444444444";
    let device = volfs.value(format!("volumes/{on}/device"));
    let held = fs::File::open(volfs.path(format!("volumes/{on}/block"))).unwrap();
    let pid = std::process::id().to_string();
    let (on_control, off_control) = (format!("jobs/a/volumes/{on}/control"), format!("jobs/a/volumes/{off}/control"));
    let job = "jobs/a/control".to_owned();
    let cases: &[(&String, String, i32, &[&str])] = &[
        (&job, format!("claim {theirs}"), libc::EBUSY, &["claim", &theirs, "belongs to job b"]),
        (&job, format!("claim {unknown}"), libc::ENOENT, &["claim", unknown]),
        (&job, "create on 1M".into(), libc::EEXIST, &["create", "disk on", "job a"]),
        (&job, "create new 1M offering=x".into(), libc::EINVAL, &["create", "offering"]),
        (&job, "destroy b".into(), libc::EINVAL, &["destroy", "another object", "a"]),
        (&job, "move nowhere".into(), libc::ENOENT, &["no job nowhere", "mkdir"]),
        (&job, "frobnicate".into(), libc::EINVAL, &["frobnicate"]),
        (&on_control, "detach".into(), libc::EBUSY, &["detach", &device, &pid, "end that use first"]),
        (&on_control, format!("delete {on}"), libc::EBUSY, &["delete", &on, "attached", "detach"]),
        (&on_control, format!("release {on}"), libc::EBUSY, &["release", &on, "detach"]),
        (&on_control, format!("attach vm={OTHER_VM}"), libc::EBUSY, &["attach", &on, "detach"]),
        (&on_control, "resize 1M".into(), libc::EINVAL, &["resize", &on, "4194304"]),
        (&job, "create new 1M zone=z".into(), libc::EOPNOTSUPP, &["create", "loop"]),
        (&on_control, "revert x".into(), libc::EBUSY, &["revert", &on, "detach"]),
        (&off_control, "revert x".into(), libc::ENOENT, &["revert", &off, "no snapshot x"]),
        (&on_control, "attach vm=x".into(), libc::EINVAL, &["attach", "x"]),
        (&off_control, format!("delete {on}"), libc::EINVAL, &["delete", &on, &off, "own name"]),
        (&off_control, "disk on".into(), libc::EEXIST, &["disk on", "job a"]),
        (&off_control, "attach device_id=3".into(), libc::EINVAL, &["attach", "3"]),
    ];
    for (control, text, errno, words) in cases {
        assert_eq!(
            volfs.write(control, text),
            *errno,
            "`{text}`: {}",
            volfs.value(control.replace("control", "error"))
        );
        let error = volfs.value(control.replace("control", "error"));
        let fields: Vec<&str> = error.split(' ').collect();
        assert!(fields[0].ends_with('Z') && fields[0].len() >= 20, "a line starts with the time: {error}");
        assert_eq!(fields[1], text.split(' ').next().unwrap(), "{error}");
        assert_eq!((fields[2], fields[3]), ("pid", &*gettid_of_writer(&error)), "{error}");
        for word in *words {
            assert!(error.contains(word), "`{text}`: no {word:?} in {error}");
        }
        let sentence = error.split_once(": ").unwrap().1;
        assert!(sentence.len() > 15, "{error}");
        assert!(volfs.log().contains(sentence), "not in the log: {sentence}");
    }
    drop(held);
    // rmdir and mkdir have no control beside them: the sentence is the job's, or the root's.
    assert_eq!(fs::remove_dir(volfs.path("jobs/a")).unwrap_err().raw_os_error(), Some(libc::ENOTEMPTY));
    assert!(volfs.value("jobs/a/error").contains("still owns 2 volume(s)"), "{}", volfs.value("jobs/a/error"));
    assert_eq!(fs::create_dir(volfs.path("jobs/a?b")).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    assert!(volfs.value("error").contains("A-Z a-z 0-9"), "{}", volfs.value("error"));
}

/// The pid in the line; it must be a thread of ours.
fn gettid_of_writer(error: &str) -> String {
    let pid = error.split(' ').nth(3).unwrap_or_default();
    assert!(Path::new(&format!("/proc/self/task/{pid}")).exists(), "{error}");
    pid.into()
}

#[test]
fn r9_doubt_is_shown_as_doubt_and_never_cleaned_up() {
    let mut volfs = Volfs::start();
    let (on, off) = two_disks(&volfs);
    // Another owner's mark: a contradiction.
    edit_meta(&volfs, &off, |meta| meta["mark"] = format!("{OTHER_VM}/7").into());
    assert_ne!(volfs.write(format!("volumes/{off}/control"), "reconcile"), 0);
    assert_eq!(volfs.value(format!("volumes/{off}/status")), "conflict");
    assert_eq!(volfs.value(format!("volumes/{off}/owner")), format!("{OTHER_VM}/7"));
    assert_eq!(volfs.value("jobs/a/status"), "degraded attached=1 conflict=1");
    assert!(volfs.read("problems").unwrap().contains("conflict"));
    assert_eq!(volfs.read(format!("volumes/{off}/device")), Err(libc::ENODEV));
    for text in ["attach", "detach", "resize 8M", &format!("delete {off}"), "move a", "disk x"] {
        assert_ne!(volfs.write(format!("volumes/{off}/control"), text), 0, "{text}");
    }
    assert_ne!(volfs.write("jobs/a/control", "destroy a"), 0);
    assert_eq!(volfs.ok("ls $R/jobs/a/disks"), "off\non", "nothing was deleted");
    assert_eq!(volfs.value(format!("volumes/{on}/status")), "attached");
    assert!(volfs.state().join("loop/volumes").join(&off).join("data.img").exists());
    // Damaged metadata: nobody can tell.
    volfs.terminate();
    let meta = volfs.state().join("loop/volumes").join(&on).join("meta.json");
    let sound = fs::read(&meta).unwrap();
    fs::write(&meta, "{").unwrap();
    for name in volfs.loops() {
        std::process::Command::new("losetup").args(["-d", &format!("/dev/{name}")]).status().unwrap();
    }
    volfs.launch();
    assert!(["unknown", "lost"].contains(&&*volfs.value(format!("volumes/{on}/status"))), "{}", volfs.value("table"));
    assert_eq!(volfs.read(format!("volumes/{on}/device")), Err(libc::ENODEV));
    assert_eq!(volfs.write(format!("volumes/{on}/control"), &format!("delete {on}")), libc::EHOSTUNREACH);
    assert!(volfs.read("problems").unwrap().contains(&on));
    assert_eq!(volfs.ok("ls $R/jobs/a/disks"), "off\non");
    fs::write(&meta, sound).unwrap();
}

#[test]
fn r10_recovery_and_reconciling_start_nothing_that_takes_away() {
    for (verb, status) in
        [("detach", "attached"), ("delete", "detached"), ("resize", "detached"), ("destroy", "detached")]
    {
        let point = format!("{verb}.journaled=kill");
        let mut volfs = Volfs::start();
        let (on, off) = two_disks(&volfs);
        volfs.terminate();
        volfs.set_env(&[("VOLFS_FAILPOINTS", &point)]);
        volfs.launch();
        let (control, text) = match verb {
            "detach" => (format!("volumes/{on}/control"), "detach".to_owned()),
            "delete" => (format!("volumes/{off}/control"), format!("delete {off}")),
            "resize" => (format!("volumes/{off}/control"), "resize 64M".to_owned()),
            _ => ("jobs/a/control".into(), "destroy a".to_owned()),
        };
        assert_ne!(volfs.write(&control, &text), 0, "{verb}");
        assert_eq!(volfs.wait(), -libc::SIGKILL, "{verb}: the failpoint was not reached");
        volfs.set_env(&[]);
        volfs.launch();
        volfs.until("the end of what was left", || volfs.read("history").unwrap().contains(&format!("\t{verb}\t")));
        let history = volfs.read("history").unwrap();
        let row = history.lines().find(|l| l.split('\t').nth(1) == Some(verb)).unwrap();
        assert_eq!(row.split('\t').nth(5), Some("interrupted"), "{row}");
        assert_eq!(volfs.write("control", "reconcile"), 0);
        let of = if verb == "detach" { &on } else { &off };
        assert_eq!(volfs.value(format!("volumes/{of}/status")), status, "{verb}");
        assert_eq!(volfs.value(format!("volumes/{off}/size")), "4194304", "{verb}");
        assert_eq!(volfs.value(format!("volumes/{on}/status")), "attached", "{verb}");
        assert_eq!(volfs.loops().len(), 1, "{verb}");
        // The caller's own command, again, does it.
        volfs.until("idle", || !volfs.value("jobs/a/status").starts_with("busy"));
        assert_eq!(volfs.write(&control, &text), 0, "{verb}: {}", volfs.log());
    }
}

#[test]
fn r5_hold_stops_what_takes_away_and_nothing_else() {
    let mut volfs = Volfs::start();
    let (_, off) = two_disks(&volfs);
    volfs.job("b", &[], "1M");
    let control = format!("volumes/{off}/control");
    assert_eq!(volfs.write("jobs/a/hold", "1\n"), 0);
    assert_eq!(volfs.write("jobs/a/hold", "1"), 0, "again is success");
    for (at, text) in [
        (&control, format!("delete {off}")),
        (&control, format!("release {off}")),
        (&control, "move b".into()),
        (&control, "revert x".into()),
        (&"jobs/a/control".into(), "destroy a".into()),
        (&"jobs/a/control".into(), "move b".into()),
        (&"jobs/a/control".into(), "revert x".into()),
    ] {
        assert_eq!(volfs.write(at, &text), libc::EPERM, "`{text}`");
        assert!(
            volfs.value(at.replace("control", "error")).contains("held"),
            "{text}: {}",
            volfs.value(at.replace("control", "error"))
        );
    }
    for text in ["attach", "detach", "resize 8M", "disk off2", "disk off", "reconcile"] {
        assert_eq!(volfs.write(&control, text), 0, "`{text}`");
    }
    assert_eq!(volfs.write("jobs/a/control", "create third 1M"), 0);
    for bad in ["2", "", "yes", "01", "1\n1\n", "-1", " 1"] {
        if !bad.is_empty() {
            assert_eq!(volfs.write("jobs/a/hold", bad), libc::EINVAL, "{bad:?}");
        }
    }
    // It is in the record.
    assert_eq!(volfs.terminate().0, 0);
    volfs.launch();
    assert_eq!(volfs.value("jobs/a/hold"), "1");
    assert_eq!(volfs.write("jobs/a/control", "destroy a"), libc::EPERM);
    assert_eq!(volfs.write("jobs/a/hold", "0"), 0);
    assert_eq!(volfs.write("jobs/a/control", "destroy a"), 0, "{}", volfs.log());
}

#[test]
fn r5_vm_name_takes_one_line_of_text_and_keeps_it() {
    let mut volfs = Volfs::start();
    volfs.job("a", &[], "1M");
    for (given, kept) in [("web 01\n", "web 01"), ("Ünïcode #1", "Ünïcode #1"), ("\n", ""), ("x", "x")] {
        assert_eq!(volfs.write("jobs/a/vm_name", given), 0, "{given:?}");
        assert_eq!(volfs.value("jobs/a/vm_name"), kept);
    }
    for bad in ["a\nb\n", "a\tb", "\x1b", &"x".repeat(256)] {
        assert_eq!(volfs.write("jobs/a/vm_name", bad), libc::EINVAL, "{bad:?}");
        assert_eq!(volfs.value("jobs/a/vm_name"), "x");
    }
    assert!(volfs.value("jobs/a/error").contains("vm_name"));
    assert_eq!(volfs.write("jobs/a/vm_name", &"é".repeat(127)), 0);
    assert_eq!(volfs.terminate().0, 0);
    volfs.launch();
    assert_eq!(volfs.value("jobs/a/vm_name"), "é".repeat(127));
}
