//! The guest's first filesystem: busybox, modules, volfs and its libraries, in one cpio archive.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::KERNEL_DIR;

/// What the guest needs of its kernel, in any order; what these need comes before each.
const MODULES: [&str; 7] = ["virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_net", "fuse", "loop"];
const INIT: &[u8] = include_bytes!("init");

/// A cpio archive in the format `newc`, the one the kernel unpacks
/// (Documentation/driver-api/early-userspace/buffer-format.rst).
struct Archive<W> {
    to: W,
    inode: u32,
    /// Directories that are in it already.
    dirs: HashSet<PathBuf>,
}

const DIR: u32 = 0o040755;
const FILE: u32 = 0o100755;

impl<W: Write> Archive<W> {
    fn new(to: W) -> Self {
        Archive { to, inode: 0, dirs: HashSet::new() }
    }

    /// One entry: six letters, thirteen fields of eight hex digits, the name, the bytes; both of the
    /// last padded with zeroes to a multiple of four.
    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size = |n: usize| u32::try_from(n).map_err(io::Error::other);
        let fields = [self.inode, mode, 0, 0, 1, 0, size(bytes.len())?, 0, 0, 0, 0, size(name.len() + 1)?, 0];
        let mut header = String::from("070701");
        for field in fields {
            header += &format!("{field:08x}");
        }
        header += name;
        header.push('\0');
        let pad = |n: usize| &[0u8; 3][..n.wrapping_neg() % 4];
        self.to.write_all(header.as_bytes())?;
        self.to.write_all(pad(header.len()))?;
        self.to.write_all(bytes)?;
        self.to.write_all(pad(bytes.len()))
    }

    /// A file with the directories above it. `path` is absolute, as the guest is to see it.
    fn file(&mut self, path: &str, bytes: &[u8]) -> io::Result<()> {
        let name = path.trim_start_matches('/');
        let above: Vec<_> = Path::new(name).ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()).collect();
        for dir in above.into_iter().rev() {
            if self.dirs.insert(dir.to_owned()) {
                self.entry(&dir.to_string_lossy(), DIR, &[])?;
            }
        }
        self.entry(name, FILE, bytes)
    }

    fn end(mut self) -> io::Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.to.flush()
    }
}

/// Paths of the modules below the kernel's directory, each after those it needs.
fn modules(dependencies: &str) -> Vec<&str> {
    let mut order: Vec<&str> = Vec::new();
    for wanted in MODULES {
        let line = dependencies.lines().filter_map(|l| l.split_once(':'));
        let mut found = line.filter(|(path, _)| path.rsplit('/').next() == Some(&format!("{wanted}.ko")));
        let (path, needs) = found.next().unwrap_or_else(|| panic!("this kernel has no module {wanted}"));
        // modules.dep(5): to be loaded from the right to the left.
        for path in needs.split_whitespace().rev().chain([path]) {
            if !order.contains(&path) {
                order.push(path);
            }
        }
    }
    order
}

/// The shared libraries of a program and its loader, as this machine resolves them.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let said = Command::new("ldd").arg(program).output().expect("ldd");
    assert!(said.status.success(), "ldd {}: {}", program.display(), String::from_utf8_lossy(&said.stderr));
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// Writes the archive to `to`: `program` is `/bin/volfs` in it.
pub fn write(to: &Path, program: &Path) {
    let read = |path: &Path| fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut archive = Archive::new(io::BufWriter::new(fs::File::create(to).unwrap()));
    archive.file("/init", INIT).unwrap();
    archive.file("/bin/busybox", &read(Path::new("/bin/busybox"))).unwrap();
    archive.file("/bin/volfs", &read(program)).unwrap();
    archive.file("/etc/machine-id", b"0123456789abcdef0123456789abcdef\n").unwrap();
    archive.file("/etc/group", b"root:x:0:\n").unwrap();
    for library in libraries(program) {
        archive.file(&library.to_string_lossy(), &read(&library)).unwrap();
    }
    let dir = Path::new(KERNEL_DIR).join("modules");
    let dependencies = fs::read_to_string(dir.join("modules.dep")).unwrap();
    for (n, module) in modules(&dependencies).into_iter().enumerate() {
        let name = Path::new(module).file_name().unwrap().to_string_lossy().into_owned();
        archive.file(&format!("/modules/{n:02}-{name}"), &read(&dir.join(module))).unwrap();
    }
    archive.end().unwrap();
}

#[test]
fn an_archive_has_each_directory_once_and_before_its_files() {
    let mut bytes = Vec::new();
    let mut archive = Archive::new(&mut bytes);
    archive.file("/a/b/one", b"12345").unwrap();
    archive.file("/a/two", b"").unwrap();
    archive.end().unwrap();
    assert_eq!(bytes.len() % 4, 0);
    let text = String::from_utf8(bytes).unwrap();
    let names: Vec<&str> = text.split("070701").skip(1).map(|e| e[104..].split('\0').next().unwrap()).collect();
    assert_eq!(names, ["a", "a/b", "a/b/one", "a/two", "TRAILER!!!"]);
    assert!(text.contains("one\x00\x00\x0012345\x00\x00\x00070701"), "{text:?}");
}

#[test]
fn modules_come_after_what_they_need_and_once() {
    let all = "k/virtio_pci.ko: k/legacy.ko k/virtio.ko k/ring.ko\nk/virtio_blk.ko: k/virtio.ko k/ring.ko\n\
               k/virtio_scsi.ko: k/scsi_mod.ko k/virtio.ko k/ring.ko\nk/sd_mod.ko: k/scsi_mod.ko\nk/virtio_net.ko: \
               k/virtio.ko k/ring.ko\nk/fuse.ko:\nk/loop.ko:\nk/other.ko: k/fuse.ko\n";
    let order = modules(all).join(" ").replace("k/", "").replace(".ko", "");
    assert_eq!(order, "ring virtio legacy virtio_pci virtio_blk scsi_mod virtio_scsi sd_mod virtio_net fuse loop");
}
