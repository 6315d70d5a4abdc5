//! A disk that loses power: what was synced is there, what was not is there in part, in any order, and
//! torn at 512 bytes.
//!
//! Names are durable once their directory was synced; a rename is there whole or not at all. A new
//! file's name is not made durable by syncing the file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use super::Dice;
use super::trace::Event;

const SECTOR: u64 = 512;

type Sector = [u8; SECTOR as usize];

/// A file's bytes; a sector that is not there is a hole.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Bytes {
    pub size: u64,
    sectors: BTreeMap<u64, Sector>,
}

impl Bytes {
    fn cut(&mut self, size: u64) {
        self.size = size;
        self.sectors.retain(|n, _| n * SECTOR < size);
        if let Some(last) = self.sectors.get_mut(&(size / SECTOR)) {
            last[(size % SECTOR) as usize..].fill(0);
        }
    }

    /// As one piece.
    pub fn all(&self) -> Vec<u8> {
        let mut all = vec![0; self.size as usize];
        for (n, sector) in &self.sectors {
            let at = (n * SECTOR) as usize;
            let end = all.len().min(at + sector.len());
            all[at..end].copy_from_slice(&sector[..end - at]);
        }
        all
    }
}

#[derive(Debug, Default)]
struct File {
    now: Bytes,
    durable: Bytes,
    /// What each sector has been since the last sync, and the sizes.
    since: BTreeMap<u64, Vec<Sector>>,
    sizes: Vec<u64>,
}

impl File {
    fn resize(&mut self, size: u64) {
        let dropped: Vec<u64> = self.now.sectors.range(size / SECTOR..).map(|(n, _)| *n).collect();
        self.now.cut(size);
        self.sizes.push(size);
        for n in dropped {
            let sector = self.now.sectors.get(&n).copied().unwrap_or([0; SECTOR as usize]);
            self.since.entry(n).or_default().push(sector);
        }
    }

    fn write(&mut self, at: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let (n, from) = ((at + done as u64) / SECTOR, ((at + done as u64) % SECTOR) as usize);
            let count = (SECTOR as usize - from).min(data.len() - done);
            let sector = self.now.sectors.entry(n).or_insert([0; SECTOR as usize]);
            sector[from..from + count].copy_from_slice(&data[done..done + count]);
            self.since.entry(n).or_default().push(*sector);
            done += count;
        }
        if at + data.len() as u64 > self.now.size {
            self.now.size = at + data.len() as u64;
            self.sizes.push(self.now.size);
        }
    }

    fn sync(&mut self) {
        self.durable = self.now.clone();
        self.since.clear();
        self.sizes.clear();
    }

    fn crashed(&self, dice: &mut Dice, luck: &Luck) -> Bytes {
        let mut left = self.durable.clone();
        for (n, versions) in &self.since {
            if let Some(sector) = luck.one(dice, versions) {
                left.sectors.insert(*n, *sector);
            }
        }
        let size = luck.one(dice, &self.sizes).copied().unwrap_or(self.durable.size);
        left.cut(size);
        left
    }
}

/// How much of what was not synced survives.
pub enum Luck {
    Nothing,
    Everything,
    /// Of each sector and each name, in percent; of several versions any.
    Some(usize),
}

impl Luck {
    fn one<'a, T>(&self, dice: &mut Dice, versions: &'a [T]) -> Option<&'a T> {
        match self {
            Luck::Nothing => None,
            Luck::Everything => versions.last(),
            Luck::Some(_) if versions.is_empty() => None,
            Luck::Some(percent) if dice.below(100) < *percent => Some(dice.one(versions)),
            Luck::Some(_) => None,
        }
    }
}

#[derive(Debug, Clone)]
enum Naming {
    Link { dir: usize, name: String, node: usize },
    Unlink { dir: usize, name: String },
    Rename { from: (usize, String), to: (usize, String) },
}

impl Naming {
    fn dirs(&self) -> Vec<usize> {
        match self {
            Naming::Link { dir, .. } | Naming::Unlink { dir, .. } => vec![*dir],
            Naming::Rename { from, to } => vec![from.0, to.0],
        }
    }
}

#[derive(Debug)]
enum Node {
    Dir,
    File(File),
}

type Names = BTreeMap<usize, BTreeMap<String, usize>>;

/// The disk: the root is there from the start.
pub struct Disk {
    root: String,
    nodes: Vec<Node>,
    names: Names,
    /// In order; the flag says that it is durable.
    namings: Vec<(Naming, bool)>,
}

/// What is left of it: by path below the root; a directory has no bytes.
pub type Image = BTreeMap<String, Option<Bytes>>;

fn apply(names: &mut Names, naming: &Naming) {
    match naming {
        Naming::Link { dir, name, node } => drop(names.entry(*dir).or_default().insert(name.clone(), *node)),
        Naming::Unlink { dir, name } => drop(names.entry(*dir).or_default().remove(name)),
        Naming::Rename { from, to } => {
            if let Some(node) = names.entry(from.0).or_default().remove(&from.1) {
                names.entry(to.0).or_default().insert(to.1.clone(), node);
            }
        }
    }
}

impl Disk {
    /// An empty one, mounted at `root`.
    pub fn new(root: &str) -> Disk {
        Disk { root: root.to_owned(), nodes: vec![Node::Dir], names: Names::new(), namings: Vec::new() }
    }

    fn find(&self, path: &str) -> Option<usize> {
        let below = path.strip_prefix(&self.root)?;
        let mut words = below.split('/').filter(|w| !w.is_empty());
        words.try_fold(0, |dir, name| self.names.get(&dir)?.get(name).copied())
    }

    fn place(&self, path: &str) -> Option<(usize, String)> {
        let (dir, name) = path.rsplit_once('/')?;
        Some((self.find(dir)?, name.to_owned()))
    }

    fn name(&mut self, naming: Naming) {
        apply(&mut self.names, &naming);
        self.namings.push((naming, false));
    }

    fn make(&mut self, path: &str, node: Node) {
        let (dir, name) = self.place(path).unwrap_or_else(|| panic!("no directory for {path}"));
        self.nodes.push(node);
        self.name(Naming::Link { dir, name, node: self.nodes.len() - 1 });
    }

    fn file(&mut self, path: &str) -> Option<&mut File> {
        match self.find(path).map(|n| &mut self.nodes[n]) {
            Some(Node::File(file)) => Some(file),
            _ => None,
        }
    }

    /// Does what the daemon did.
    pub fn happen(&mut self, event: &Event) {
        match event {
            Event::Open { path, truncate } => {
                if self.find(path).is_none() {
                    self.make(path, Node::File(File::default()));
                } else if let (true, Some(file)) = (*truncate, self.file(path)) {
                    file.resize(0);
                }
            }
            Event::Write { path, at, data } => {
                if let Some(file) = self.file(path) {
                    file.write(*at, data);
                }
            }
            Event::Truncate { path, to } => {
                if let Some(file) = self.file(path) {
                    file.resize(*to);
                }
            }
            Event::Allocate { path, to } => {
                if let Some(file) = self.file(path)
                    && file.now.size < *to
                {
                    file.resize(*to);
                }
            }
            Event::Sync { path } => match self.find(path) {
                Some(n) if matches!(self.nodes[n], Node::Dir) => self.sync_names(n),
                Some(_) => self.file(path).unwrap().sync(),
                None => {}
            },
            Event::Rename { from, to } => {
                let (from, to) = (self.place(from).unwrap(), self.place(to).unwrap());
                self.name(Naming::Rename { from, to });
            }
            Event::Unlink { path } => {
                let (dir, name) = self.place(path).unwrap();
                self.name(Naming::Unlink { dir, name });
            }
            Event::Mkdir { path } => self.make(path, Node::Dir),
        }
    }

    /// Makes a directory's names durable, and with them what they depend on.
    fn sync_names(&mut self, dir: usize) {
        let mut dirs = BTreeSet::from([dir]);
        for (naming, durable) in self.namings.iter_mut().rev() {
            if naming.dirs().iter().any(|d| dirs.contains(d)) {
                *durable = true;
                dirs.extend(naming.dirs());
            }
        }
    }

    fn image(&self, names: &Names, bytes: &mut dyn FnMut(&File) -> Bytes) -> Image {
        let mut image = Image::new();
        let mut open = vec![(0, String::new())];
        while let Some((dir, path)) = open.pop() {
            for (name, node) in names.get(&dir).into_iter().flatten() {
                let path = format!("{path}/{name}");
                match &self.nodes[*node] {
                    Node::Dir => {
                        image.insert(path.clone(), None);
                        open.push((*node, path));
                    }
                    Node::File(file) => drop(image.insert(path, Some(bytes(file)))),
                }
            }
        }
        image
    }

    /// Everything, as if it were synced now.
    pub fn clean(&self) -> Image {
        self.image(&self.names, &mut |file| file.now.clone())
    }

    /// What a power cut now leaves.
    pub fn crashed(&self, dice: &mut Dice, luck: &Luck) -> Image {
        let mut names = Names::new();
        // Where one naming is lost, what came after it in the same directory is lost, too.
        let mut lost = BTreeSet::new();
        for (naming, durable) in &self.namings {
            let dirs = naming.dirs();
            let survives = *durable || luck.one(dice, &[()]).is_some();
            if survives && dirs.iter().all(|d| !lost.contains(d)) {
                apply(&mut names, naming);
            } else {
                lost.extend(dirs);
            }
        }
        self.image(&names, &mut |file| file.crashed(dice, luck))
    }
}

/// Writes an image below an existing directory.
pub fn write(image: &Image, dir: &Path) {
    for (path, bytes) in image {
        let path = dir.join(path.trim_start_matches('/'));
        match bytes {
            None => {
                use std::os::unix::fs::DirBuilderExt;
                fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
            }
            Some(bytes) => {
                use std::os::unix::fs::OpenOptionsExt;
                let mut file = fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(&path).unwrap();
                for (n, sector) in &bytes.sectors {
                    file.seek(SeekFrom::Start(n * SECTOR)).unwrap();
                    file.write_all(sector).unwrap();
                }
                file.set_len(bytes.size).unwrap();
            }
        }
    }
}
