//! Everything there is of some jobs, as one picture: what the tree shows, what the record holds, what
//! the kernel has and what lies in the provider's store. Two pictures are equal, or say what differs.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rusqlite::types::Value;
use rusqlite::{Connection, OpenFlags, params_from_iter};
use serde_json::Value as Json;

use crate::common::{PATIENCE, Volfs};

/// What there is, by where it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Picture(pub BTreeMap<String, String>);

impl Picture {
    /// Of these jobs with these volumes, but for the provider's side of them.
    pub fn of(volfs: &Volfs, jobs: &[&str], uuids: &[String]) -> Self {
        let mut picture = Picture::default();
        for job in jobs {
            picture.walk(&volfs.root(), &volfs.path(format!("jobs/{job}")));
        }
        for index in ["devices", "exports"] {
            picture.links(volfs, index, uuids);
        }
        for uuid in uuids {
            picture.entry(&volfs.root(), &volfs.path(format!("volumes/{uuid}")));
        }
        picture.record(&volfs.state().join("volfs.db"), jobs, uuids);
        picture
    }

    /// The same, with the loop provider's store and devices.
    pub fn with_loops(volfs: &Volfs, jobs: &[&str], uuids: &[String]) -> Self {
        let mut picture = Self::of(volfs, jobs, uuids);
        for uuid in uuids {
            picture.walk(&volfs.state(), &volfs.state().join("loop/volumes").join(uuid));
            picture.loops(uuid, &volfs.state().join("loop/volumes").join(uuid).join("data.img"));
        }
        picture
    }

    pub fn put(&mut self, at: impl Into<String>, what: impl Into<String>) {
        let at = at.into();
        let was = self.0.insert(at.clone(), what.into());
        assert_eq!(was, None, "{at} twice");
    }

    /// Without what lies at places of which `left_out` is true.
    pub fn without(mut self, left_out: impl Fn(&str) -> bool) -> Self {
        self.0.retain(|at, _| !left_out(at));
        self
    }

    /// Every difference, a line each; none is what is wanted.
    #[track_caller]
    pub fn is_still(&self, now: &Picture, after: &str) {
        let places: std::collections::BTreeSet<&String> = self.0.keys().chain(now.0.keys()).collect();
        let differs: Vec<String> = places
            .into_iter()
            .filter(|at| self.0.get(*at) != now.0.get(*at))
            .map(|at| format!("{at}:\n  was {:?}\n  is  {:?}", self.0.get(at), now.0.get(at)))
            .collect();
        assert!(self.0.len() > 15, "that is no picture of anything: {:?}", self.0.keys());
        assert!(differs.is_empty(), "{after}: not as before:\n{}", differs.join("\n"));
    }

    /// A directory with all in it.
    pub fn walk(&mut self, root: &Path, path: &Path) {
        self.entry(root, path);
        if !path.symlink_metadata().is_ok_and(|m| m.is_dir()) {
            return;
        }
        for entry in fs::read_dir(path).unwrap() {
            self.walk(root, &entry.unwrap().path());
        }
    }

    /// One name: kind, mode, owner, and what is in it.
    fn entry(&mut self, root: &Path, path: &Path) {
        let at = path.strip_prefix(root).unwrap().display().to_string();
        let facts = match path.symlink_metadata() {
            Ok(facts) => facts,
            Err(error) => return self.put(at, format!("not there: {error}")),
        };
        let kind = facts.file_type();
        let inside = if kind.is_symlink() {
            format!("to {}", fs::read_link(path).unwrap().display())
        } else if kind.is_block_device() {
            format!("device {:x}", facts.rdev())
        } else if kind.is_dir() {
            String::new()
        } else {
            contents(path)
        };
        let mode = facts.permissions().mode();
        self.put(at, format!("{mode:o} {}:{} inode {} {inside}", facts.uid(), facts.gid(), facts.ino()));
    }

    /// Of an index of all volumes, what is about these.
    fn links(&mut self, volfs: &Volfs, index: &str, uuids: &[String]) {
        for entry in fs::read_dir(volfs.path(index)).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let to = fs::read_link(entry.path()).map(|to| to.display().to_string()).unwrap_or(name);
            if uuids.iter().any(|uuid| to.contains(uuid.as_str())) {
                self.entry(&volfs.root(), &entry.path());
            }
        }
    }

    /// Every row about them.
    fn record(&mut self, db: &Path, jobs: &[&str], uuids: &[String]) {
        let record = Connection::open_with_flags(db, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
        record.busy_timeout(PATIENCE).unwrap();
        let quoted = |all: &mut dyn Iterator<Item = &str>| all.map(|t| format!("'{t}'")).collect::<Vec<_>>().join(",");
        let jobs = quoted(&mut jobs.iter().copied());
        let uuids = quoted(&mut uuids.iter().map(String::as_str));
        let ids = format!("(SELECT id FROM jobs WHERE name IN ({jobs}))");
        for (table, of) in [
            ("jobs", format!("name IN ({jobs})")),
            ("vm_disks", format!("job_id IN {ids}")),
            ("ossea_volumes", format!("volume_id IN ({uuids})")),
            ("device_mappings", format!("volume_uuid IN ({uuids})")),
            ("volume_operations", format!("job_id IN {ids} OR volume_uuid IN ({uuids})")),
            ("volume_snapshots", format!("volume_uuid IN ({uuids})")),
        ] {
            let mut rows = record.prepare(&format!("SELECT * FROM {table} WHERE {of} ORDER BY id")).unwrap();
            let names: Vec<String> = rows.column_names().iter().map(|n| n.to_string()).collect();
            let row = |row: &rusqlite::Row<'_>| {
                (0..names.len()).map(|n| row.get::<_, Value>(n)).collect::<Result<Vec<_>, _>>()
            };
            for row in rows.query_map(params_from_iter(std::iter::empty::<Value>()), row).unwrap() {
                let row = row.unwrap();
                let words: Vec<String> = names.iter().zip(&row).map(|(n, v)| format!("{n}={v:?}")).collect();
                self.put(format!("record {table} {:?}", row[0]), words.join(" "));
            }
        }
    }

    /// The loop devices with this backing file: which, in which incarnation, and how they are bound.
    pub fn loops(&mut self, uuid: &str, file: &Path) {
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/block").unwrap() {
            let dir = entry.unwrap().path();
            let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default().trim_end().to_owned();
            if Path::new(&read("loop/backing_file")) == file {
                let facts =
                    ["diskseq", "size", "ro", "dev", "loop/offset", "loop/sizelimit", "loop/autoclear"].map(read);
                found.push(format!("{} {facts:?}", dir.display()));
            }
        }
        self.put(format!("kernel {uuid}"), found.join("\n"));
    }
}

/// A file's text, or for what is no text its sum; where it cannot be read, why.
pub fn contents(path: &Path) -> String {
    let mut bytes = Vec::new();
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    if let Err(error) = file.and_then(|mut file| file.read_to_end(&mut bytes)) {
        return format!("unreadable: {error}");
    }
    let text = || String::from_utf8(bytes.clone()).unwrap();
    match path.file_name().and_then(|name| name.to_str()) {
        Some("info.json") => {
            let mut info: Json = serde_json::from_slice(&bytes).unwrap();
            // When it was looked at last, also first after a start, and the number of the snapshot that answered.
            for moment in ["seen", "version", "status_since"] {
                info.as_object_mut().unwrap().remove(moment).unwrap();
            }
            // How long things took is measured anew from the record after a start.
            for row in info["history"].as_array_mut().unwrap() {
                row.as_object_mut().unwrap().remove("milliseconds").unwrap();
            }
            return info.to_string();
        }
        Some("history") => {
            let but_seconds = |line: &str| {
                line.split('\t').enumerate().filter(|(n, _)| *n != 6).map(|(_, w)| w).collect::<Vec<_>>().join(" ")
            };
            return text().lines().map(but_seconds).collect::<Vec<_>>().join("\n");
        }
        // A child of this process that has not begun its program yet has copies of all descriptors.
        Some("holders") => {
            let own = std::process::id().to_string();
            return text().lines().filter(|line| line.split('\t').nth(1) == Some(&own)).collect::<Vec<_>>().join("\n");
        }
        // What a move could do now is about the jobs that it would go to.
        Some("control") => {
            return text().lines().filter(|line| !line.starts_with("move:")).collect::<Vec<_>>().join("\n");
        }
        _ => {}
    }
    match String::from_utf8(bytes) {
        Ok(text) if text.len() < 65536 => text,
        Ok(text) => sum(text.as_bytes()),
        Err(error) => sum(error.as_bytes()),
    }
}

fn sum(bytes: &[u8]) -> String {
    format!("{} bytes, {:?}", bytes.len(), ring::digest::digest(&ring::digest::SHA256, bytes))
}
