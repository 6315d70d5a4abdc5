//! `volfs demo`: the main job for real, in a temporary place, by shell commands alone.
//!
//! A daemon is started as anybody would start it; everything after that goes through the tree.
//! `Place` takes away whatever is left when it is dropped, on a failure and after Ctrl-C too.

use std::io::Write;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::config::Problem;
use crate::start;

mod place;
mod shell;

use place::Place;
use shell::Shell;

/// Runs it; the error says what was not as it should be. Under five seconds.
pub fn run() -> Result<(), Problem> {
    start::need_root()?;
    let stop = Arc::new(AtomicBool::new(false));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Problem::with("cannot start a runtime", e))?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let handler = |kind| signal(kind).map_err(|e| Problem::with("cannot take signals", e));
        let mut interrupt = handler(SignalKind::interrupt())?;
        let mut terminate = handler(SignalKind::terminate())?;
        let mut hangup = handler(SignalKind::hangup())?;
        let told = stop.clone();
        let mut work = tokio::task::spawn_blocking(move || whole(&told));
        let outcome = tokio::select! {
            outcome = &mut work => outcome,
            _ = interrupt.recv() => { stop.store(true, Ordering::Relaxed); work.await }
            _ = terminate.recv() => { stop.store(true, Ordering::Relaxed); work.await }
            _ = hangup.recv() => { stop.store(true, Ordering::Relaxed); work.await }
        };
        // A panic has unwound through the guard by now.
        outcome.unwrap_or_else(|_| Err(Problem("the demo itself failed".into())))
    })
}

fn whole(stop: &AtomicBool) -> Result<(), Problem> {
    let began = Instant::now();
    let mut place = Place::make()?;
    let done = scene(&mut place, stop);
    let cleaned = place.clear();
    done?;
    cleaned?;
    say(&format!("\nAll as it should be, and nothing is left: {:.1} s.", began.elapsed().as_secs_f64()))
}

/// This program, without the caller's configuration in its environment.
fn volfs() -> Result<Command, Problem> {
    let mut command = Command::new(start::own_program()?);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|n| n.starts_with("VOLFS_") && n != "VOLFS_FAILPOINTS") {
            command.env_remove(name);
        }
    }
    Ok(command)
}

fn say(text: &str) -> Result<(), Problem> {
    writeln!(std::io::stdout(), "{text}").map_err(|e| Problem::with("standard output", e))
}

fn scene(place: &mut Place, stop: &AtomicBool) -> Result<(), Problem> {
    let tree = place.tree();
    let (state, log, config) = (place.path("state"), place.path("log"), place.path("config.toml"));
    // Its own, empty: nothing of this machine's configuration takes part.
    std::fs::write(&config, "").map_err(|e| Problem::with(config.display(), e))?;
    let log_file = std::fs::File::create(&log).map_err(|e| Problem::with(log.display(), e))?;
    say(&format!("$ volfs mount --background {} --state-dir {}", tree.display(), state.display()))?;
    let mut command = volfs()?;
    command.arg("mount").arg(&tree).arg("--state-dir").arg(&state).arg("--config").arg(&config).stderr(log_file);
    place.daemon(start::spawn(command)?);
    say(&format!("$ cd {}", tree.display()))?;
    let sh = Shell::new(&tree, stop);

    sh.gives("head -1 health", &["ok"])?;
    first_use(&sh)?;
    bytes_come_back(&sh)?;
    jobs_do_not_touch_each_other(&sh)?;
    in_use_is_not_detached(&sh, &place.path("mnt"))?;

    note("The job goes, with all that is its own.")?;
    sh.gives(r#"echo "destroy demo" > jobs/demo/control"#, &[])?;
    sh.nothing("ls jobs volumes devices | grep -v :")?;
    sh.gives("tail -3 history", &["destroy"])?;

    say(&format!("\n$ cd /; volfs unmount {}", tree.display()))?;
    place.end_daemon()
}

fn note(text: &str) -> Result<(), Problem> {
    say(&format!("\n# {text}"))
}

fn first_use(sh: &Shell<'_>) -> Result<(), Problem> {
    note("A job with two disks.")?;
    sh.gives("mkdir jobs/demo", &[])?;
    sh.gives(r#"echo "create disk-2000 64M" > jobs/demo/control"#, &[])?;
    sh.gives(r#"echo "create disk-2001 32M name=second disk" > jobs/demo/control"#, &[])?;
    sh.gives("echo attach > jobs/demo/control", &[])?;
    sh.gives("ls jobs/demo jobs/demo/disks/disk-2000/", &["disks", "volumes", "block", "device", "status"])?;
    sh.gives("cat jobs/demo/status", &["attached=2"])?;
    sh.gives("cat table", &["disk-2000\t", "disk-2001\t", "\t67108864", "\t33554432", "\tattached\t/dev/loop"])?;
    sh.gives("cat jobs/demo/disks/disk-2000/device", &["/dev/loop"])?;
    let volume = sh.value("basename $(readlink jobs/demo/disks/disk-2000)")?;
    let device = sh.value("basename $(cat jobs/demo/disks/disk-2000/device)")?;
    sh.gives(&format!("readlink devices/{device}"), &[&volume])
}

fn bytes_come_back(sh: &Shell<'_>) -> Result<(), Problem> {
    note("Bytes written through `block` are on that disk, whatever device it is on later.")?;
    let block = |disk: &str| format!("jobs/demo/disks/{disk}/block");
    for disk in ["disk-2000", "disk-2001"] {
        sh.gives(&format!("printf 'I am {disk}' | dd of={} conv=fsync status=none", block(disk)), &[])?;
    }
    sh.gives("echo detach > jobs/demo/control", &[])?;
    sh.fails("cat jobs/demo/disks/disk-2000/device", &["No such device"])?;
    // The other way round, so that the devices' names can change places.
    sh.gives("echo attach > jobs/demo/disks/disk-2001/control", &[])?;
    sh.gives("echo attach > jobs/demo/disks/disk-2000/control", &[])?;
    for disk in ["disk-2000", "disk-2001"] {
        sh.gives(&format!("cat jobs/demo/disks/{disk}/device"), &["/dev/loop"])?;
        sh.gives(&format!("head -c 14 {}; echo", block(disk)), &[&format!("I am {disk}")])?;
    }
    Ok(())
}

fn jobs_do_not_touch_each_other(sh: &Shell<'_>) -> Result<(), Problem> {
    note("Another job cannot claim them, and its end leaves them alone.")?;
    sh.gives("mkdir jobs/other", &[])?;
    let volume = sh.value("basename $(readlink jobs/demo/disks/disk-2000)")?;
    sh.fails(&format!(r#"echo "claim {volume}" | tee jobs/other/control"#), &["Device or resource busy"])?;
    sh.gives("cat jobs/other/error", &[&volume, "belongs to job demo"])?;
    sh.gives(r#"echo "create spare 8M" > jobs/other/control"#, &[])?;
    sh.gives(r#"echo "destroy other" > jobs/other/control"#, &[])?;
    sh.gives("ls jobs", &["demo"])?;
    sh.gives("cat jobs/demo/status", &["attached=2"])?;
    sh.gives("cut -f1-2,5 table", &["demo\tdisk-2000\tattached", "demo\tdisk-2001\tattached"])
}

fn in_use_is_not_detached(sh: &Shell<'_>, mount_point: &std::path::Path) -> Result<(), Problem> {
    note("A device in use stays, and `error` says whose use it is.")?;
    const DISK: &str = "jobs/demo/disks/disk-2001";
    let at = mount_point.display().to_string();
    std::fs::create_dir(mount_point).map_err(|e| Problem::with(&at, e))?;
    // Without e2fsprogs there is nothing to mount; an open descriptor is a use as well.
    let mounts = sh.value("command -v mkfs.ext4").is_ok();
    let (begin, user, kind, end) = if mounts {
        (format!("mkfs.ext4 -q {DISK}/block && mount {DISK}/block {at}"), at.clone(), "mount", format!("umount {at}"))
    } else {
        let begin = format!("sleep 60 3< {DISK}/block > /dev/null 2>&1 & echo $! > {at}/pid");
        (
            begin,
            "sleep (pid".into(),
            "open",
            format!("P=$(cat {at}/pid); kill $P; while [ -d /proc/$P/fd/3 ]; do :; done"),
        )
    };
    sh.gives(&begin, &[])?;
    sh.fails(&format!("echo detach | tee {DISK}/control"), &["Device or resource busy"])?;
    sh.gives(&format!("cat {DISK}/error"), &[&user])?;
    sh.gives(&format!("cat {DISK}/holders"), &[kind])?;
    sh.gives(&format!("cat {DISK}/status"), &["attached"])?;
    sh.gives(&end, &[])?;
    sh.gives(&format!("echo detach > {DISK}/control"), &[])?;
    sh.gives(&format!("cat {DISK}/status"), &["detached"])
}
