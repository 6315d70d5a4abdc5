//! volfs where it belongs: inside a virtual machine (QEMU without acceleration, Debian's kernel, busybox)
//! whose disks are hot-plugged from outside.

// A test fails by panicking; the lint's own exception covers test functions only, not their helpers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod agent;
mod heard;
mod hypervisor;
mod initramfs;
mod machine;
mod plumbing;
mod qmp;
mod scenarios;
mod site;

use std::io::Write;
use std::path::Path;

/// Where `fetch-kernel` puts the guest's kernel.
const KERNEL_DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/guest");

/// Whether this machine has what a guest is made of; says in one line what is skipped for want of what.
fn have() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = |name: &&str| std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
    let mut missing: Vec<&str> = ["qemu-system-x86_64", "busybox", "ldd", "mkfs.ext4"].into();
    missing.retain(|name| !program(name));
    if !Path::new(KERNEL_DIR).join("modules/modules.dep").is_file() {
        missing.push("target/guest/kernel (tests/guest/fetch-kernel)");
    }
    if missing.is_empty() {
        return true;
    }
    let test = std::thread::current();
    // Straight to the descriptor: the line is to be seen of a test that passes, too.
    let line =
        format!("skipped: {}: this machine lacks {missing:?} (.ci/run installs it)\n", test.name().unwrap_or("a test"));
    let _ = std::io::stderr().write_all(line.as_bytes());
    false
}
