//! The tree in front of real shells and utilities: R2, R5, and the test list of
//! reference/control-filesystems.md (its numbers in comments as W1, W2, …).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use crate::common::{SHELLS, Said, Volfs};

/// A job `a` with disk `on` attached and disk `off` detached; their uuids.
pub fn two_disks(volfs: &Volfs) -> (String, String) {
    let made = volfs.job("a", &["on", "off"], "4M");
    assert_eq!(volfs.write("jobs/a/disks/on/control", "attach"), 0, "{}", volfs.log());
    (made[0].clone(), made[1].clone())
}

/// Runs a python script, its words after it.
pub fn python(volfs: &Volfs, script: &str, words: &str) -> Said {
    let mut file = tempfile::Builder::new().suffix(".py").tempfile_in(volfs.root().parent().unwrap()).unwrap();
    std::io::Write::write_all(&mut file, script.as_bytes()).unwrap();
    volfs.sh(&format!("/usr/bin/python3 {} {words}", file.path().display()))
}

/// Every path below `dir` with type, length, inode and time, and each symlink's target.
fn listing(dir: &Path, into: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let found = fs::symlink_metadata(&path).unwrap();
        let link = fs::read_link(&path).map(|t| t.display().to_string()).unwrap_or_default();
        let text = format!(
            "{:o} {} {} {}.{} {link}",
            found.mode(),
            found.len(),
            found.ino(),
            found.mtime(),
            found.mtime_nsec()
        );
        into.insert(path.display().to_string(), text);
        if found.is_dir() {
            listing(&path, into);
        }
    }
}

/// All that a generic command must not change: the record as it is shown, the namespace, the loop
/// devices, the provider's files. Rows of `history` about `vm_name` and `hold` are left out.
#[derive(Debug, PartialEq)]
struct Everything {
    table: String,
    history: Vec<String>,
    names: Vec<String>,
    loops: Vec<String>,
    provider: BTreeMap<String, String>,
}

fn everything(volfs: &Volfs) -> Everything {
    let history = volfs.read("history").unwrap();
    let rows = history.lines().filter(|l| l.split('\t').nth(1) != Some("set")).map(str::to_owned).collect();
    let mut provider = BTreeMap::new();
    listing(&volfs.state().join("loop"), &mut provider);
    let mut names: Vec<String> = volfs.ok("cd $R; find . -printf '%p %y %l\\n'").lines().map(str::to_owned).collect();
    names.sort();
    let mut loops = volfs.loops();
    loops.sort();
    Everything { table: volfs.read("table").unwrap(), history: rows, names, loops, provider }
}

#[test]
fn r2_the_write_is_the_command_and_its_exit_status_the_outcome_in_every_shell() {
    let volfs = Volfs::start();
    let (on, _) = two_disks(&volfs);
    for shell in SHELLS {
        let run = |script: &str| volfs.sh_in(shell, script);
        let said = run("echo attach > $R/jobs/a/disks/off/control; echo $?; cat $R/jobs/a/disks/off/status");
        assert_eq!(said.out, "0\nattached\n", "{shell:?} {said:?}");
        let said = run("set -e; echo detach > $R/jobs/a/disks/off/control; cat $R/jobs/a/disks/off/status");
        assert_eq!((said.status, &*said.out), (0, "detached\n"), "{shell:?} {said:?}");

        let said = run(&format!("set -e; echo 'delete {on}' > $R/jobs/a/disks/on/control; echo went on"));
        assert_ne!(said.status, 0, "{shell:?} {said:?}");
        assert_eq!(said.out, "", "{shell:?}: set -e did not stop the script");
        assert!(!said.err.is_empty(), "{shell:?} said nothing");
        // dash calls every failed write an I/O error: `error` is what its user has.
        if shell[0] != "dash" {
            assert!(said.err.contains("Device or resource busy"), "{shell:?} {said:?}");
        }
        let error = volfs.value("jobs/a/disks/on/error");
        assert!(error.contains(" delete pid ") && error.contains("EBUSY") && error.contains(&on), "{error}");

        // A success of another verb leaves the sentence, one of the same verb takes it away.
        assert_eq!(run("echo reconcile > $R/jobs/a/disks/on/control").status, 0);
        assert_eq!(volfs.value("jobs/a/disks/on/error"), error);
        let said = run("echo bad > $R/jobs/a/control; test -s $R/jobs/a/error && cat $R/jobs/a/error");
        assert!(said.out.contains(" bad pid ") && said.out.contains("EINVAL"), "{shell:?} {said:?}");
    }
    assert_eq!(volfs.write("jobs/a/disks/off/control", "resize 1"), libc::EINVAL);
    assert!(volfs.value("jobs/a/disks/off/error").contains("resize"));
    assert_eq!(volfs.write("jobs/a/disks/off/control", "resize 8M"), 0);
    assert_eq!(volfs.read("jobs/a/disks/off/error").as_deref(), Ok("\n"), "W5: a success empties it");
}

#[test]
fn r2_every_way_to_write_one_line_is_one_command() {
    if !crate::common::have(&["/usr/bin/python3"]) {
        return;
    }
    let volfs = Volfs::start();
    two_disks(&volfs);
    // Each command is a rename, so that doing it twice, or not at all, shows.
    let mut name = "off".to_owned();
    let ways = [
        "echo disk NEW > CONTROL",
        "echo disk NEW >> CONTROL",
        "printf 'disk NEW' > CONTROL",
        "echo disk NEW | tee CONTROL > OUT",
        "echo disk NEW | tee -a CONTROL > OUT",
        "echo disk NEW > FILE; cp FILE CONTROL",
        "echo disk NEW > FILE; cat FILE > CONTROL",
        "echo disk NEW | dd of=CONTROL status=none",
        "echo disk NEW | dd of=CONTROL conv=notrunc status=none",
        "{ echo disk NEW; } > CONTROL",
        // W2: the descriptor is duplicated and one closed before anything is written.
        "exec 3> CONTROL; exec 4>&3; exec 4>&-; echo disk NEW >&3",
        "python3 -c 'open(\"CONTROL\",\"w\").write(\"disk NEW\\n\")'",
    ];
    let scratch = volfs.scratch("file").display().to_string();
    for (i, way) in ways.iter().enumerate() {
        for (k, shell) in SHELLS.iter().enumerate() {
            let new = format!("d{i}-{k}");
            let control = format!("$R/jobs/a/disks/{name}/control");
            // In python's string the shell has no say.
            let control = if way.contains("python3") {
                volfs.path(format!("jobs/a/disks/{name}/control")).display().to_string()
            } else {
                control
            };
            let script = way
                .replace("CONTROL", &control)
                .replace("FILE", &scratch)
                .replace("OUT", "/dev/null")
                .replace("NEW", &new);
            let said = volfs.sh_in(shell, &script);
            assert_eq!(said.status, 0, "{shell:?} `{script}`: {said:?}");
            assert!(volfs.path(format!("jobs/a/disks/{new}")).symlink_metadata().is_ok(), "{shell:?} `{script}`");
            assert!(volfs.path(format!("jobs/a/disks/{name}")).symlink_metadata().is_err(), "{shell:?} `{script}`");
            name = new;
        }
    }
    let renames = volfs.read("history").unwrap().lines().filter(|l| l.split('\t').nth(1) == Some("disk")).count();
    assert_eq!(renames, ways.len() * SHELLS.len());
}

#[test]
fn r2_two_lines_in_one_write_are_no_command_and_two_writes_are_two() {
    if !crate::common::have(&["/usr/bin/python3"]) {
        return;
    }
    let volfs = Volfs::start();
    let (_, off) = two_disks(&volfs);
    let before = everything(&volfs);
    let control = format!("jobs/a/volumes/{off}/control");
    for text in ["disk x\ndisk y\n", "disk x\ndisk y", "# disk x\n", "disk x\0", "disk\tx\r\n"] {
        assert_eq!(volfs.write(&control, text), libc::EINVAL, "{text:?}");
    }
    assert_eq!(volfs.write(&control, &format!("disk {}", "x".repeat(5000))), libc::EINVAL);
    assert_eq!(volfs.sh(&format!("printf 'disk x\\ndisk y\\n' > $R/{control}")).status, 1);
    assert_eq!(everything(&volfs), before);
    // W4, W13: as two writes of one open the first is done and the second judged alone.
    let said = volfs.sh(&format!("{{ echo disk x && echo disk '?'; }} > $R/{control}"));
    assert_ne!(said.status, 0);
    assert!(volfs.path("jobs/a/disks/x").symlink_metadata().is_ok());
    let script = "import sys\nf = open(sys.argv[1], 'w')\nf.write('delete nonsense\\n')\ntry:\n  f.close()\nexcept OSError as e: sys.exit(e.errno)\n";
    let said = python(&volfs, script, &format!("$R/{control}"));
    assert_eq!(said.status, libc::EINVAL, "{said:?}");
    assert_eq!(volfs.value(format!("volumes/{off}/status")), "detached");
}

#[test]
fn r2_writing_nothing_does_nothing_and_succeeds() {
    let volfs = Volfs::start();
    two_disks(&volfs);
    let before = everything(&volfs);
    for shell in SHELLS {
        for file in ["control", "jobs/a/control", "jobs/a/disks/on/control"] {
            for way in
                [": > F", ": >> F", "truncate -s 0 F", "touch F", "dd if=/dev/null of=F status=none", "cp /dev/null F"]
            {
                let script = way.replace('F', &format!("$R/{file}"));
                let said = volfs.sh_in(shell, &script);
                assert_eq!(said.status, 0, "W3: {shell:?} `{script}`: {said:?}");
            }
        }
    }
    assert_eq!(everything(&volfs), before);
    assert_eq!(volfs.read("error").as_deref(), Ok("\n"));
}

#[test]
fn r5_generic_file_commands_change_nothing() {
    if !crate::common::have(&["/usr/bin/python3", "rsync"]) {
        return;
    }
    let volfs = Volfs::start();
    let (on, off) = two_disks(&volfs);
    volfs.job("other", &["d"], "1M");
    volfs.ok("echo 'web 01' > $R/jobs/a/vm_name; echo 1 > $R/jobs/a/hold; printf secret | dd of=$R/jobs/a/disks/on/block conv=fsync status=none");
    volfs.ok(&format!("cp /dev/null {}", volfs.scratch("other").display()));
    let before = everything(&volfs);
    let refused = [
        "rm -rf V",
        "rm -rf $R/jobs/a",
        "rm -rf $R/jobs $R/volumes $R/devices $R/exports $R/unclaimed $R/operations",
        "rm -f V/status",
        "rm -f V/control",
        "rm -f V/block",
        "rm $R/jobs/a/disks/on",
        "rm $R/exports/ON",
        "unlink $R/volumes/ON",
        "find $R/jobs/a -delete",
        "find $R/jobs/a/volumes -mindepth 1 -delete",
        "find $R/jobs/a -type f -exec rm -f {} +",
        "rmdir V",
        "rmdir $R/jobs/a/volumes",
        "rmdir $R/jobs/a",
        "rmdir $R/volumes",
        "mkdir V/new",
        "mkdir $R/jobs/a/volumes/OFF2",
        "mkdir $R/new",
        "mkdir -p $R/jobs/a/disks/new",
        "mv V $R/jobs/other/volumes/",
        "mv V/status V/status2",
        "mv $R/jobs/a $R/jobs/b",
        "mv $R/jobs/a/disks/on $R/jobs/a/disks/on2",
        "mv -f OTHER V/control",
        "mv -f OTHER V/status",
        "mv -T $R/jobs/a/disks/on $R/jobs/a/disks/off",
        "echo x > V/status",
        "echo x > V/device",
        "echo x >> V/error",
        "echo x > $R/table",
        "echo x > $R/jobs/a/history",
        "echo x > V/new",
        "echo x > $R/jobs/new",
        "truncate -s 0 V/status",
        "truncate -s 100 V/info.json",
        "touch V/new",
        "sed -i s/a/b/ V/name",
        "sed -i s/a/b/ V/control",
        "sed -i s/a/b/ $R/jobs/a/vm_name",
        // It says that it cannot, and ends with 0.
        "perl -pi -e s/a/b/ V/status; false",
        "install -m 644 OTHER V/status",
        "install -m 644 OTHER V/control",
        "install -d $R/jobs/a/volumes/x",
        "ln V/status V/status2",
        "ln -s /tmp V/link",
        "ln -sf /dev/null $R/jobs/a/disks/on",
        "ln -sfn /dev/null $R/devices/new",
        "mknod V/node b 7 0",
        "mkfifo V/fifo",
        "cp --remove-destination OTHER V/status",
        "cp OTHER V/",
        "cp -a V $R/jobs/other/volumes/",
        "chmod 777 V/status",
        "chmod -R 777 $R/jobs/a",
        "chmod 666 V/control",
        "chown 1 V/status",
        "chown -R 1:1 $R/jobs",
        "tar xf TAR -C $R/jobs",
        "rsync -a --delete TREE/ $R/jobs/",
        "rsync -a --delete EMPTY/ $R/jobs/",
        "rsync -a --delete EMPTY/ V/",
        "rsync -a --inplace --no-devices --no-specials TREE/ $R/jobs/",
        "cp -a TREE/. $R/jobs/",
        "cp -rf TREE/. $R/jobs/",
        "python3 -c 'import shutil,sys; shutil.rmtree(sys.argv[1])' $R/jobs/a",
        "python3 -c 'import os,sys; os.replace(sys.argv[1],sys.argv[2])' OTHER V/control",
        "python3 -c 'import os,sys; os.unlink(sys.argv[1])' V/device",
        "ed -s V/name < /dev/null && false",
    ];
    // What a copy of the tree takes along: everything but the devices' contents.
    let (tree, tar, empty) = (volfs.scratch("tree"), volfs.scratch("tree.tar"), volfs.scratch("empty"));
    fs::create_dir(&empty).unwrap();
    volfs.sh(&format!("cp -a $R/jobs {}; tar cf {} -C $R/jobs .", tree.display(), tar.display()));
    assert!(tree.join(format!("a/volumes/{on}/status")).is_file() && fs::metadata(&tar).unwrap().len() > 10_000);
    let seen = everything(&volfs);
    assert_eq!(seen, before, "copying out changed something");
    for template in refused {
        let script = template
            .replace("TREE", &tree.display().to_string())
            .replace("TAR", &tar.display().to_string())
            .replace("EMPTY", &empty.display().to_string())
            .replace("OTHER", &volfs.scratch("other").display().to_string())
            .replace("OFF2", &off.replace('a', "b"))
            .replace("ON", &on)
            .replace("V/", &format!("$R/jobs/a/volumes/{on}/"))
            .replace(" V", &format!(" $R/jobs/a/volumes/{on}"));
        let said = volfs.sh_in(&["bash"], &script);
        assert_ne!(said.status, 0, "`{script}` succeeded: {said:?}");
        assert_eq!(everything(&volfs), before, "`{script}`");
    }
    assert_eq!(volfs.value("jobs/a/vm_name"), "web 01");
    assert_eq!(volfs.value("jobs/a/hold"), "1");
    assert_eq!(volfs.ok("head -c 6 $R/jobs/a/disks/on/block"), "secret");
}

#[test]
fn r5_the_refusals_of_the_namespace_are_eperm_and_eacces() {
    if !crate::common::have(&["/usr/bin/python3"]) {
        return;
    }
    let volfs = Volfs::start();
    let (on, _) = two_disks(&volfs);
    let at = |below: &str| volfs.path(format!("jobs/a/volumes/{on}/{below}"));
    let errno = |outcome: std::io::Result<()>| outcome.err().and_then(|e| e.raw_os_error()).unwrap_or(0);
    assert_eq!(errno(fs::remove_file(at("status"))), libc::EPERM);
    assert_eq!(errno(fs::remove_file(at("block"))), libc::EPERM);
    assert_eq!(errno(fs::remove_dir(at(""))), libc::EPERM);
    assert_eq!(errno(fs::remove_dir(volfs.path("jobs/a"))), libc::ENOTEMPTY);
    assert_eq!(errno(fs::rename(at("status"), at("other"))), libc::EPERM);
    assert_eq!(errno(fs::rename(volfs.path("jobs/a"), volfs.path("jobs/b"))), libc::EPERM);
    assert_eq!(errno(fs::create_dir(at("new"))), libc::EPERM);
    assert_eq!(errno(fs::hard_link(at("status"), at("other"))), libc::EPERM);
    assert_eq!(errno(std::os::unix::fs::symlink("/tmp", at("other"))), libc::EPERM);
    assert_eq!(errno(fs::write(at("other"), "x")), libc::EPERM);
    // Root, too: the kernel lets it pass the mode bits, volfs does not.
    assert_eq!(errno(fs::write(at("status"), "x")), libc::EACCES);
    assert_eq!(errno(fs::OpenOptions::new().append(true).open(at("info.json")).map(drop)), libc::EACCES);
    assert_eq!(errno(fs::OpenOptions::new().read(true).write(true).open(at("name")).map(drop)), libc::EACCES);
    assert_eq!(errno(fs::set_permissions(at("status"), fs::Permissions::from_mode(0o777))), libc::EPERM);
    assert_eq!(errno(std::os::unix::fs::chown(at("status"), Some(1), None)), libc::EPERM);
    // rename is refused whatever its flags.
    let exchange = "import ctypes,os,sys\nl=ctypes.CDLL(None,use_errno=True)\nr=l.renameat2(-100,sys.argv[1].encode(),-100,sys.argv[2].encode(),int(sys.argv[3]))\nsys.exit(ctypes.get_errno())\n";
    for flags in [0, 1, 2] {
        let said = python(&volfs, exchange, &format!("$R/jobs/a/disks/on $R/jobs/a/disks/off {flags}"));
        let expected = if flags == 1 { [libc::EEXIST, libc::EPERM] } else { [libc::EPERM, libc::EPERM] };
        assert!(expected.contains(&said.status), "flags {flags}: {said:?}");
    }
}

#[test]
fn r5_a_copy_changes_vm_name_and_hold_alone() {
    let volfs = Volfs::start();
    two_disks(&volfs);
    let before = everything(&volfs);
    volfs.ok("echo web02 > $R/jobs/a/vm_name");
    let copy = volfs.scratch("copy").display().to_string();
    volfs.ok(&format!("echo db03 > {copy}; cp {copy} $R/jobs/a/vm_name"));
    assert_eq!(volfs.value("jobs/a/vm_name"), "db03");
    volfs.ok("echo 1 > $R/jobs/a/hold");
    assert_eq!(volfs.value("jobs/a/hold"), "1");
    let now = everything(&volfs);
    assert_eq!(
        (now.table, now.history, now.loops, now.provider),
        (before.table, before.history, before.loops, before.provider)
    );
}

#[test]
fn r5_what_control_shows_is_no_command_when_it_is_written_back() {
    let volfs = Volfs::start();
    let (on, off) = two_disks(&volfs);
    let before = everything(&volfs);
    for control in [
        "control".into(),
        "jobs/a/control".into(),
        format!("jobs/a/volumes/{on}/control"),
        format!("jobs/a/volumes/{off}/control"),
    ] {
        let text = volfs.read(&control).unwrap();
        assert_eq!(volfs.write(&control, &text), libc::EINVAL, "{control}");
        for line in text.lines() {
            assert_eq!(volfs.write(&control, line), libc::EINVAL, "{control}: {line}");
        }
        // vim writes the whole buffer back.
        let said = volfs.sh(&format!("vim -u NONE -es -c 'wq!' $R/{control} < /dev/null"));
        assert_ne!(said.status, 0, "{said:?}");
    }
    assert_eq!(everything(&volfs), before);
}

/// Runs python as another user; its exit status.
fn python_as(volfs: &Volfs, uid: u32, gid: u32, script: &str) -> Said {
    use std::os::unix::process::CommandExt;
    let mut command = std::process::Command::new("/usr/bin/python3");
    command.arg("-c").arg(script).current_dir("/").env("R", volfs.root()).uid(uid).gid(gid);
    crate::common::said_of(command.output().unwrap())
}

const NOBODY: u32 = 65534;
const STRANGER: u32 = 65533;

/// A volfs of group 65534 below a directory that everybody may enter.
fn with_group() -> Volfs {
    let volfs = Volfs::start_with(&[], "group = \"65534\"\n");
    fs::set_permissions(volfs.root().parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
    volfs
}

#[test]
fn e6_modes_and_owners_are_those_of_the_page() {
    let volfs = with_group();
    let (on, _) = two_disks(&volfs);
    let volume = format!("jobs/a/volumes/{on}");
    let mut wrong = Vec::new();
    for path in volfs.ok("cd $R; find . -mindepth 1 -printf '%P\\n'").lines() {
        let found = fs::symlink_metadata(volfs.path(path)).unwrap();
        let name = path.rsplit('/').next().unwrap();
        let expected = match path {
            "jobs" => 0o40775,
            _ if name == "control" || path == "jobs/a/vm_name" || path == "jobs/a/hold" => 0o100664,
            _ if name == "block" || path.starts_with("exports/") => 0o60660,
            _ if found.is_dir() => 0o40755,
            _ if found.is_symlink() => 0o120777,
            _ => 0o100444,
        };
        if (found.mode(), found.uid(), found.gid()) != (expected, 0, NOBODY) {
            wrong.push(format!("{path} {:o} {} {}", found.mode(), found.uid(), found.gid()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(volfs.path(format!("{volume}/block")).symlink_metadata().is_ok());
    assert!(volfs.path(format!("exports/{on}")).symlink_metadata().is_ok());
}

#[test]
fn e6_a_stranger_reads_and_does_nothing() {
    if !crate::common::have(&["/usr/bin/python3"]) {
        return;
    }
    let volfs = with_group();
    let (on, off) = two_disks(&volfs);
    let before = everything(&volfs);
    for (file, text) in [
        ("control".to_owned(), "reconcile".to_owned()),
        ("jobs/a/control".into(), "attach".into()),
        ("jobs/a/vm_name".into(), "x".into()),
        ("jobs/a/hold".into(), "1".into()),
        (format!("jobs/a/volumes/{off}/control"), "attach".into()),
        (format!("jobs/a/volumes/{off}/status"), "x".into()),
        (format!("jobs/a/volumes/{on}/block"), "x".into()),
        (format!("exports/{on}"), "x".into()),
    ] {
        assert_eq!(volfs.write_as(STRANGER, STRANGER, &file, &text), libc::EACCES, "{file}");
    }
    let errno = |what: &str| {
        python_as(
            &volfs,
            STRANGER,
            STRANGER,
            &format!("import os,sys\nR=os.environ['R']\ntry: {what}\nexcept OSError as e: sys.exit(e.errno)"),
        )
        .status
    };
    assert_eq!(errno("os.mkdir(R+'/jobs/b')"), libc::EACCES);
    assert_eq!(errno("os.rmdir(R+'/jobs/a')"), libc::EACCES);
    assert_eq!(errno(&format!("open(R+'/jobs/a/volumes/{on}/block','rb')")), libc::EACCES);
    assert_eq!(errno(&format!("open(R+'/jobs/a/volumes/{on}/device').read()")), 0);
    assert_eq!(errno("open(R+'/table').read()"), 0);
    assert_eq!(errno("open(R+'/events/all')"), 0);
    assert_eq!(everything(&volfs), before);
}

#[test]
fn e6_the_group_commands_and_root_alone_does_what_is_rooted() {
    if !crate::common::have(&["/usr/bin/python3"]) {
        return;
    }
    let volfs = with_group();
    let (on, off) = two_disks(&volfs);
    let as_group = |file: &str, text: &str| volfs.write_as(NOBODY, NOBODY, file, text);
    let errno = |what: &str| {
        python_as(
            &volfs,
            NOBODY,
            NOBODY,
            &format!("import os,sys\nR=os.environ['R']\ntry: {what}\nexcept OSError as e: sys.exit(e.errno)"),
        )
        .status
    };
    assert_eq!(errno("os.mkdir(R+'/jobs/mine')"), 0);
    assert_eq!(as_group("jobs/mine/control", "create d 1M"), 0);
    assert_eq!(as_group("jobs/mine/control", "attach"), 0);
    assert_eq!(as_group("jobs/mine/vm_name", "web"), 0);
    assert_eq!(errno("os.close(os.open(R+'/jobs/mine/disks/d/block', os.O_RDWR))"), 0);
    assert_eq!(errno("open(R+'/jobs/mine/disks/d/status','w')"), libc::EACCES);
    let row = volfs.read("jobs/mine/history").unwrap();
    assert!(row.lines().any(|l| l.contains("\tattach\t") && l.contains("\t65534\t")), "who: {row}");

    let on_control = format!("jobs/a/volumes/{on}/control");
    let off_control = format!("jobs/a/volumes/{off}/control");
    let other = "00000000-0000-4000-8000-000000000001";
    let before = everything(&volfs);
    assert_eq!(as_group(&on_control, "detach force"), libc::EPERM);
    assert!(
        volfs.value(format!("jobs/a/volumes/{on}/error")).contains("root only"),
        "{}",
        volfs.value(format!("jobs/a/volumes/{on}/error"))
    );
    assert_eq!(as_group(&off_control, &format!("delete {off} expunge")), libc::EPERM);
    assert_eq!(as_group("jobs/a/control", &format!("claim {other} x from={other}")), libc::EPERM);
    assert_eq!(as_group("control", "abandon 1"), libc::EPERM);
    assert!(volfs.value("error").contains("root only"));
    assert_eq!(everything(&volfs), before);

    // Raising hold is for the group, lowering it for root.
    assert_eq!(as_group("jobs/a/hold", "1\n"), 0);
    assert_eq!(as_group("jobs/a/hold", "1\n"), 0);
    assert_eq!(as_group("jobs/a/hold", "0\n"), libc::EPERM);
    assert!(volfs.value("jobs/a/error").contains("root only"), "{}", volfs.value("jobs/a/error"));
    assert_eq!(volfs.value("jobs/a/hold"), "1");
    assert_eq!(volfs.write("jobs/a/hold", "0\n"), 0);
}

#[test]
fn r7_extended_attributes_locks_and_other_questions_are_answered_plainly() {
    if !crate::common::have(&["/usr/bin/python3"]) {
        return;
    }
    let volfs = Volfs::start();
    two_disks(&volfs);
    let script = "import os,sys,mmap,fcntl\nR=os.environ['R']\np=R+'/jobs/a/disks/on/status'\n\
        def errno(f):\n  try: f(); return 0\n  except OSError as e: return e.errno\n\
        print(errno(lambda: os.getxattr(p,'user.x')), errno(lambda: os.setxattr(p,'user.x',b'1')), errno(lambda: os.removexattr(p,'user.x')))\n\
        fd=os.open(p,os.O_RDONLY)\n\
        print(errno(lambda: fcntl.flock(fd,fcntl.LOCK_SH)), errno(lambda: os.lseek(fd,0,os.SEEK_END)), os.isatty(fd))\n\
        print(errno(lambda: os.fsync(fd)), os.statvfs(R).f_blocks)\n";
    let said = python(&volfs, script, "");
    assert_eq!(said.status, 0, "{said:?}");
    let lines: Vec<&str> = said.out.lines().collect();
    assert_eq!(lines[0], format!("{0} {0} {0}", libc::EOPNOTSUPP));
    assert_eq!(lines[1], "0 0 False");
    assert_eq!(lines[2], "0 0");
    assert_eq!(volfs.value("jobs/a/disks/on/status"), "attached");
}
