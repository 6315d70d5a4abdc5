//! What the daemon did to its files, in order: strace's record of each call that writes, names or
//! syncs below one directory.
//!
//! The real daemon over the real record and loop store is recorded, not a copy of its code over a VFS
//! of ours: both halves and the order between them are in one list.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// One change, by absolute path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Opened with O_CREAT or O_TRUNC.
    Open {
        path: String,
        truncate: bool,
    },
    Write {
        path: String,
        at: u64,
        data: Vec<u8>,
    },
    Truncate {
        path: String,
        to: u64,
    },
    Allocate {
        path: String,
        to: u64,
    },
    Sync {
        path: String,
    },
    Rename {
        from: String,
        to: String,
    },
    Unlink {
        path: String,
    },
    Mkdir {
        path: String,
    },
}

/// An event and when its call had returned, in microseconds since 1970.
pub type Timed = (Event, u64);

/// The calls that are recorded.
pub const CALLS: &str = "trace=openat,pwrite64,write,ftruncate,fallocate,fsync,fdatasync,rename,renameat,renameat2,\
                         unlink,unlinkat,mkdir,mkdirat,rmdir,link,linkat,pwritev,copy_file_range,sync_file_range";

fn micros(text: &str) -> u64 {
    let (seconds, rest) = text.split_once('.').unwrap();
    seconds.parse::<u64>().unwrap() * 1_000_000 + rest.parse::<u64>().unwrap()
}

/// `\x2f\x70` to bytes (strace -xx).
fn bytes(hex: &str) -> Vec<u8> {
    let digits = hex.split("\\x").skip(1).map(|d| u8::from_str_radix(&d[..2], 16).unwrap());
    digits.collect()
}

fn text(hex: &str) -> String {
    String::from_utf8(bytes(hex)).unwrap()
}

/// The path of `12<\x2f…>`.
fn path_of(fd: &str) -> Option<String> {
    let (_, rest) = fd.split_once('<')?;
    Some(text(rest.split_once('>')?.0))
}

/// A name argument, below its directory's descriptor if it is relative.
fn named(dir: Option<&str>, name: &str) -> String {
    let name = text(name.trim_matches('"'));
    if name.starts_with('/') {
        return name;
    }
    let dir = dir.and_then(path_of).unwrap_or_default();
    format!("{}/{name}", dir.trim_end_matches('/'))
}

struct Reader {
    /// Where the next write(2) of a file goes.
    places: BTreeMap<String, u64>,
}

impl Reader {
    fn event(&mut self, call: &str, args: &[&str], answer: &str) -> Option<Event> {
        let flags = |text: &str| text.contains("O_CREAT") || text.contains("O_TRUNC");
        Some(match call {
            "openat" => {
                let path = path_of(answer)?;
                self.places.insert(path.clone(), 0);
                if !flags(args[2]) {
                    return None;
                }
                Event::Open { path, truncate: args[2].contains("O_TRUNC") }
            }
            "pwrite64" => {
                let mut data = bytes(args[1]);
                data.truncate(answer.parse().unwrap());
                Event::Write { path: path_of(args[0])?, at: args[3].parse().unwrap(), data }
            }
            "write" => {
                let path = path_of(args[0])?;
                let mut data = bytes(args[1]);
                data.truncate(answer.parse().unwrap());
                let at = self.places.entry(path.clone()).or_default();
                let event = Event::Write { path, at: *at, data };
                *at += answer.parse::<u64>().unwrap();
                event
            }
            "ftruncate" => Event::Truncate { path: path_of(args[0])?, to: args[1].parse().unwrap() },
            "fallocate" => {
                let end = args[2].parse::<u64>().unwrap() + args[3].parse::<u64>().unwrap();
                Event::Allocate { path: path_of(args[0])?, to: end }
            }
            "fsync" | "fdatasync" => Event::Sync { path: path_of(args[0])? },
            "rename" => Event::Rename { from: named(None, args[0]), to: named(None, args[1]) },
            "renameat" | "renameat2" => {
                Event::Rename { from: named(Some(args[0]), args[1]), to: named(Some(args[2]), args[3]) }
            }
            "unlink" | "rmdir" => Event::Unlink { path: named(None, args[0]) },
            "unlinkat" => Event::Unlink { path: named(Some(args[0]), args[1]) },
            "mkdir" => Event::Mkdir { path: named(None, args[0]) },
            "mkdirat" => Event::Mkdir { path: named(Some(args[0]), args[1]) },
            other => panic!("{other} is not known here: {args:?}"),
        })
    }
}

impl Event {
    fn paths(&self) -> Vec<&String> {
        match self {
            Event::Rename { from, to } => vec![from, to],
            Event::Open { path, .. }
            | Event::Write { path, .. }
            | Event::Truncate { path, .. }
            | Event::Allocate { path, .. }
            | Event::Sync { path }
            | Event::Unlink { path }
            | Event::Mkdir { path } => vec![path],
        }
    }
}

/// Reads the files that `strace -ff -ttt -T -y -xx -o PREFIX` has left, one a thread: what happened
/// to `root`'s own names and in its `state`, in the order of the calls' ends, without SQLite's `-shm`, which no crash keeps.
pub fn read(prefix: &Path, root: &str) -> Vec<Timed> {
    let mut lines: Vec<(u64, String)> = Vec::new();
    let name = prefix.file_name().unwrap().to_str().unwrap();
    for entry in fs::read_dir(prefix.parent().unwrap()).unwrap().flatten() {
        if !entry.file_name().to_str().unwrap().starts_with(&format!("{name}.")) {
            continue;
        }
        for line in fs::read_to_string(entry.path()).unwrap().lines() {
            let Some((at, rest)) = line.split_once(' ') else { continue };
            let Some((call, took)) = rest.rsplit_once(" <") else { continue };
            let took = took.trim_end_matches('>');
            if took.contains('.') && call.contains(") = ") && !call.contains(") = -1") {
                lines.push((micros(at) + micros(took), call.to_owned()));
            }
        }
    }
    lines.sort_by_key(|l| l.0);
    let state = format!("{root}/state");
    let mut reader = Reader { places: BTreeMap::new() };
    let mut events = Vec::new();
    for (at, line) in &lines {
        let (call, rest) = line.split_once('(').unwrap();
        let (args, answer) = rest.rsplit_once(") = ").unwrap();
        // Padding of short lines.
        let args: Vec<&str> = args.trim_end().trim_end_matches(')').split(", ").collect();
        let Some(event) = reader.event(call, &args, answer.trim()) else { continue };
        let below =
            |p: &&String| (*p == root || p.starts_with(&state)) && !p.ends_with("-shm") && !p.ends_with(" (deleted)");
        if event.paths().iter().all(below) {
            events.push((event, *at));
        }
    }
    events
}
