//! The namespace, pure: what stands where, with which type, mode and time. Everything comes from
//! one [`World`], but for devices, which the kernel is asked about at each question.

use std::sync::Arc;

use super::core::Core;
use super::node::{Hash40, JobFile, MapFile, Node, RootFile, UnclaimedFile, VolumeFile};
use crate::engine::world::{Job, Snapshot, Unclaimed, VmView, Volume, World};
use crate::engine::{DeviceNow, Target};
use crate::error::Errno;
use crate::model::{DevNo, DiskName, DiskRow, JobId, JobRow, MapRow, OpId, SnapshotName, Timestamp, VmId, VolumeId};

/// What a question is answered from.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub world: &'a World,
    pub core: &'a dyn Core,
    pub exports: &'a ExportNames,
}

/// How volumes are called in `exports/`: a text around the UUID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportNames {
    before: String,
    after: String,
}

impl ExportNames {
    /// Reads a template with one `{uuid}`, e.g. `{uuid}` or `vol-{uuid}.raw`.
    pub fn parse(template: &str) -> Result<Self, String> {
        let bad = |why: &str| Err(format!("export template {template:?}: {why}"));
        let Some((before, after)) = template.split_once("{uuid}") else {
            return bad("it must hold {uuid}");
        };
        let ok = |b: u8| b.is_ascii_graphic() && !matches!(b, b'/' | b'{' | b'}');
        if !before.bytes().chain(after.bytes()).all(ok) {
            return bad("only printable ASCII but blanks, slashes and braces, and one {uuid}");
        }
        if before.starts_with('.') {
            return bad("it must not start with a dot");
        }
        if template.len() > 200 {
            return bad("it is longer than 200 bytes");
        }
        Ok(Self { before: before.into(), after: after.into() })
    }

    fn name(&self, volume: VolumeId) -> String {
        format!("{}{volume}{}", self.before, self.after)
    }

    fn volume(&self, name: &str) -> Option<VolumeId> {
        VolumeId::parse(name.strip_prefix(self.before.as_str())?.strip_suffix(self.after.as_str())?).ok()
    }
}

/// The type of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Dir,
    File,
    Link,
    Block,
}

impl Node {
    /// The node's type.
    pub fn kind(self) -> Kind {
        match self {
            Node::Root(
                RootFile::Dir
                | RootFile::Events
                | RootFile::Jobs
                | RootFile::Volumes
                | RootFile::Devices
                | RootFile::Exports
                | RootFile::Vms
                | RootFile::Operations
                | RootFile::Unclaimed,
            ) => Kind::Dir,
            Node::Job(_, JobFile::Dir | JobFile::Disks | JobFile::Volumes) => Kind::Dir,
            Node::Volume(_, VolumeFile::Dir | VolumeFile::Snapshots) => Kind::Dir,
            Node::Unclaimed(_, UnclaimedFile::Dir) | Node::Vm(_) => Kind::Dir,
            Node::Volume(_, VolumeFile::DiskLink | VolumeFile::UuidLink) => Kind::Link,
            Node::Unclaimed(_, UnclaimedFile::UuidLink | UnclaimedFile::DeviceLink) => Kind::Link,
            Node::Mapping(_, MapFile::DeviceLink) | Node::VmLink(_) => Kind::Link,
            Node::Mapping(_, MapFile::Block | MapFile::Export) => Kind::Block,
            _ => Kind::File,
        }
    }

    /// Permission bits.
    pub fn mode(self) -> u16 {
        match (self.kind(), self) {
            (_, Node::Root(RootFile::Jobs)) => 0o775,
            (Kind::Dir, _) => 0o755,
            (Kind::Link, _) => 0o777,
            (Kind::Block, _) => 0o660,
            (_, Node::Control(..) | Node::Job(_, JobFile::VmName | JobFile::Hold)) => 0o664,
            _ => 0o444,
        }
    }
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub node: Node,
}

impl<'a> View<'a> {
    pub fn job(&self, row: JobRow) -> Result<&'a Arc<Job>, Errno> {
        self.world.jobs.get(&row).ok_or(Errno::ESTALE)
    }

    pub fn volume(&self, row: DiskRow) -> Result<&'a Arc<Volume>, Errno> {
        self.world.volumes.get(&row).ok_or(Errno::ESTALE)
    }

    /// The unclaimed volume of that hash; none if two have it.
    pub fn unclaimed(&self, hash: Hash40) -> Result<(VolumeId, &'a Arc<Unclaimed>), Errno> {
        let found = self.world.unclaimed.iter().filter(|(id, _)| Hash40::of(id.0) == hash);
        only(found).map(|(id, u)| (*id, u))
    }

    /// The snapshot that a node names; none if two foreign ones have one hash.
    pub fn snapshot(&self, node: Node) -> Result<&'a Snapshot, Errno> {
        let of = |row: &DiskRow, is: &dyn Fn(&Snapshot) -> bool| {
            self.volume(*row)?.snapshots.iter().find(|s| is(s)).ok_or(Errno::ESTALE)
        };
        match node {
            Node::Snapshot(row) => of(self.world.snapshots.get(&row).ok_or(Errno::ESTALE)?, &|s| s.row == Some(row)),
            Node::ForeignSnapshot(hash) => {
                let all = self.world.foreign_snapshots.iter();
                let (id, row) = only(all.filter(|(id, _)| Hash40::of(id.0) == hash))?;
                of(row, &|s| s.id == *id)
            }
            _ => Err(Errno::ESTALE),
        }
    }

    pub fn vm(&self, hash: Hash40) -> Result<(VmId, &'a Arc<VmView>), Errno> {
        only(self.world.vms.iter().filter(|(id, _)| Hash40::of(id.0) == hash)).map(|(id, v)| (*id, v))
    }

    fn vm_volume(&self, hash: Hash40) -> Result<VolumeId, Errno> {
        let all = self.world.vms.values().flat_map(|vm| vm.volumes.iter().copied());
        let mut found: Vec<VolumeId> = all.filter(|id| Hash40::of(id.0) == hash).collect();
        found.sort_unstable();
        found.dedup();
        only(found.into_iter())
    }

    /// What the cloud says is attached to that VM: EHOSTUNREACH when its word is too old.
    fn vm_volumes(&self, hash: Hash40) -> Result<&'a [VolumeId], Errno> {
        let (_, vm) = self.vm(hash)?;
        if vm.stale || vm.seen.is_none() { Err(Errno::EHOSTUNREACH) } else { Ok(&vm.volumes) }
    }

    /// The device of a volume, if it is served and the kernel says so now.
    fn device_of(&self, row: DiskRow) -> Option<DeviceNow> {
        self.volume(row).ok()?.device()?;
        self.core.device(row).ok()
    }

    /// The device of a mapping, if it is served and the kernel says so now.
    fn mapped(&self, row: MapRow) -> Result<DeviceNow, Errno> {
        let volume = self.disk_of_mapping(row).map_err(|_| Errno::ENODEV)?;
        volume.device().filter(|m| m.row == row).ok_or(Errno::ENODEV)?;
        self.core.mapped(row).map_err(|_| Errno::ENODEV)
    }

    fn disk_of_mapping(&self, row: MapRow) -> Result<&'a Arc<Volume>, Errno> {
        let disk = self.world.by_mapping.get(&row).ok_or(Errno::ESTALE)?;
        self.volume(*disk)
    }
}

fn only<T>(mut found: impl Iterator<Item = T>) -> Result<T, Errno> {
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        _ => Err(Errno::ESTALE),
    }
}

/// The node of that name in the directory. ENOENT, ENOTDIR, ESTALE, EHOSTUNREACH.
pub fn lookup(view: &View<'_>, parent: Node, name: &str) -> Result<Node, Errno> {
    find(view, parent, name)?.ok_or(Errno::ENOENT)
}

fn find(view: &View<'_>, parent: Node, name: &str) -> Result<Option<Node>, Errno> {
    let world = view.world;
    let volume_row = |text: &str| Some(*world.by_uuid.get(&VolumeId::parse(text).ok()?)?);
    let job_row = |text: &str| Some(*world.job_rows.get(&JobId::parse(text).ok()?)?);
    let unclaimed = |text: &str| {
        let id = VolumeId::parse(text).ok()?;
        let hash = Hash40::of(id.0);
        world.unclaimed.get(&id)?;
        view.unclaimed(hash).ok()?;
        Some(hash)
    };
    Ok(match parent {
        Node::Root(RootFile::Dir) => RootFile::named(name).map(|f| match f {
            RootFile::Control => Node::Control(Target::Root, 0),
            f => Node::Root(f),
        }),
        Node::Root(RootFile::Events) if name == "all" => Some(Node::Root(RootFile::EventsAll)),
        Node::Root(RootFile::Events) => job_row(name).map(|r| Node::Job(r, JobFile::Events)),
        Node::Root(RootFile::Jobs) => job_row(name).map(|r| Node::Job(r, JobFile::Dir)),
        Node::Root(RootFile::Volumes) => volume_row(name)
            .map(|r| Node::Volume(r, VolumeFile::UuidLink))
            .or_else(|| unclaimed(name).map(|h| Node::Unclaimed(h, UnclaimedFile::UuidLink))),
        Node::Root(RootFile::Devices) => device_link(view, name),
        Node::Root(RootFile::Exports) => view
            .exports
            .volume(name)
            .and_then(|id| view.device_of(*world.by_uuid.get(&id)?))
            .map(|d| Node::Mapping(d.mapping, MapFile::Export)),
        Node::Root(RootFile::Vms) => VmId::parse(name)
            .ok()
            .filter(|id| world.vms.contains_key(id))
            .map(|id| Hash40::of(id.0))
            .filter(|hash| view.vm(*hash).is_ok())
            .map(Node::Vm),
        Node::Root(RootFile::Operations) => name
            .parse()
            .ok()
            .map(OpId)
            .filter(|id| world.operations.contains_key(id) && id.to_string() == name)
            .map(Node::Operation),
        Node::Root(RootFile::Unclaimed) => unclaimed(name).map(|h| Node::Unclaimed(h, UnclaimedFile::Dir)),
        Node::Job(row, JobFile::Dir) => {
            view.job(row)?;
            JobFile::named(name).map(|f| match f {
                JobFile::Control => Node::Control(Target::Job(row), 0),
                f => Node::Job(row, f),
            })
        }
        Node::Job(row, JobFile::Disks) => {
            let disks = &view.job(row)?.disks;
            let row = DiskName::parse(name).ok().and_then(|name| disks.get(&name));
            row.map(|r| Node::Volume(*r, VolumeFile::DiskLink))
        }
        Node::Job(row, JobFile::Volumes) => {
            view.job(row)?;
            volume_row(name)
                .filter(|r| view.volume(*r).is_ok_and(|v| v.job == row))
                .map(|r| Node::Volume(r, VolumeFile::Dir))
        }
        Node::Volume(row, VolumeFile::Dir) => {
            view.volume(row)?;
            if MapFile::named(name) == Some(MapFile::Block) {
                view.device_of(row).map(|d| Node::Mapping(d.mapping, MapFile::Block))
            } else {
                VolumeFile::named(name).map(|f| match f {
                    VolumeFile::Control => Node::Control(Target::Volume(row), 0),
                    f => Node::Volume(row, f),
                })
            }
        }
        Node::Volume(row, VolumeFile::Snapshots) => {
            let all = &view.volume(row)?.snapshots;
            let found = SnapshotName::parse(name).ok().and_then(|name| all.get(&name));
            found.map(snapshot_node).filter(|node| view.snapshot(*node).is_ok())
        }
        Node::Unclaimed(hash, UnclaimedFile::Dir) => {
            view.unclaimed(hash)?;
            UnclaimedFile::named(name).map(|f| Node::Unclaimed(hash, f))
        }
        Node::Vm(hash) => {
            let volumes = view.vm_volumes(hash)?;
            let id = VolumeId::parse(name).ok().filter(|id| volumes.contains(id));
            id.map(|id| Hash40::of(id.0)).filter(|h| view.vm_volume(*h).is_ok()).map(Node::VmLink)
        }
        _ => return Err(Errno::ENOTDIR),
    })
}

fn snapshot_node(snapshot: &Snapshot) -> Node {
    match snapshot.row {
        Some(row) => Node::Snapshot(row),
        None => Node::ForeignSnapshot(Hash40::of(snapshot.id.0)),
    }
}

fn device_link(view: &View<'_>, name: &str) -> Option<Node> {
    if let Some(row) = view.world.by_device.get(name) {
        let mapping = view.volume(*row).ok()?.mapping.as_ref()?;
        return Some(Node::Mapping(mapping.row, MapFile::DeviceLink));
    }
    let (id, _) = view.world.unclaimed.iter().find(|(_, u)| u.device.as_deref() == Some(name))?;
    let hash = Hash40::of(id.0);
    view.unclaimed(hash).ok()?;
    Some(Node::Unclaimed(hash, UnclaimedFile::DeviceLink))
}

/// The directory above, for `..`.
fn parent(view: &View<'_>, dir: Node) -> Node {
    match dir {
        Node::Job(_, JobFile::Dir) => Node::Root(RootFile::Jobs),
        Node::Job(row, _) => Node::Job(row, JobFile::Dir),
        Node::Volume(row, VolumeFile::Dir) => {
            view.volume(row).map_or(Node::ROOT, |v| Node::Job(v.job, JobFile::Volumes))
        }
        Node::Volume(row, _) => Node::Volume(row, VolumeFile::Dir),
        Node::Unclaimed(..) => Node::Root(RootFile::Unclaimed),
        Node::Vm(_) => Node::Root(RootFile::Vms),
        _ => Node::ROOT,
    }
}

/// A directory's entries, sorted by name, `.` and `..` first. ENOTDIR, ESTALE, EHOSTUNREACH.
pub fn list(view: &View<'_>, dir: Node) -> Result<Vec<Entry>, Errno> {
    let world = view.world;
    let mut entries = vec![Entry { name: ".".into(), node: dir }, Entry { name: "..".into(), node: parent(view, dir) }];
    let names =
        |names: Vec<&str>| -> Vec<String> { names.into_iter().filter(|n| !n.is_empty()).map(str::to_owned).collect() };
    let own: Vec<String> = match dir {
        Node::Root(RootFile::Dir) => names(RootFile::ALL.iter().map(|f| f.name()).collect()),
        Node::Root(RootFile::Events) => Vec::new(),
        Node::Root(RootFile::Jobs) => world.job_rows.keys().map(JobId::to_string).collect(),
        Node::Root(RootFile::Volumes) => {
            world.by_uuid.keys().chain(world.unclaimed.keys()).map(VolumeId::to_string).collect()
        }
        Node::Root(RootFile::Devices) => {
            let unclaimed = world.unclaimed.values().filter_map(|u| u.device.as_deref());
            world.by_device.keys().map(|n| &**n).chain(unclaimed).map(str::to_owned).collect()
        }
        Node::Root(RootFile::Exports) => {
            let rows = world.by_mapping.values().filter_map(|row| view.volume(*row).ok());
            rows.map(|v| view.exports.name(v.uuid)).collect()
        }
        Node::Root(RootFile::Vms) => world.vms.keys().map(VmId::to_string).collect(),
        Node::Root(RootFile::Operations) => world.operations.keys().map(OpId::to_string).collect(),
        Node::Root(RootFile::Unclaimed) => world.unclaimed.keys().map(VolumeId::to_string).collect(),
        Node::Job(row, JobFile::Dir) => {
            view.job(row)?;
            names(JobFile::ALL.iter().map(|f| f.name()).collect())
        }
        Node::Job(row, JobFile::Disks) => view.job(row)?.disks.keys().map(DiskName::to_string).collect(),
        Node::Job(row, JobFile::Volumes) => {
            let rows = view.job(row)?.disks.values();
            let mut ids: Vec<(VolumeId, DiskRow)> =
                rows.filter_map(|r| view.volume(*r).ok().map(|v| (v.uuid, *r))).collect();
            // Sorted as numbers, which is the order of their texts.
            ids.sort_unstable();
            let volume = |(id, row): (VolumeId, DiskRow)| Entry {
                name: id.to_string(),
                node: Node::Volume(row, VolumeFile::Dir),
            };
            entries.extend(ids.into_iter().map(volume));
            return Ok(entries);
        }
        Node::Volume(row, VolumeFile::Dir) => {
            view.volume(row)?;
            let files = VolumeFile::ALL.iter().map(|f| f.name());
            names(files.chain([MapFile::Block.name()]).collect())
        }
        Node::Volume(row, VolumeFile::Snapshots) => {
            view.volume(row)?.snapshots.iter().map(|s| s.name.to_string()).collect()
        }
        Node::Unclaimed(hash, UnclaimedFile::Dir) => {
            view.unclaimed(hash)?;
            names(UnclaimedFile::ALL.iter().map(|f| f.name()).collect())
        }
        Node::Vm(_) => Vec::new(),
        _ => return Err(Errno::ENOTDIR),
    };
    if let Node::Vm(hash) = dir {
        // Listed even if two had one hash: leaving one out would say that it is not attached.
        let all = view.vm_volumes(hash)?.iter();
        entries.extend(all.map(|id| Entry { name: id.to_string(), node: Node::VmLink(Hash40::of(id.0)) }));
    }
    // Else a name is listed when it is found: what ended meanwhile, or has no address, is not.
    let found = own.into_iter().filter_map(|name| match find(view, dir, &name) {
        Ok(Some(node)) => Some(Entry { name, node }),
        _ => None,
    });
    entries.extend(found);
    let order = |a: &Entry, b: &Entry| match (a.node, b.node) {
        (Node::Operation(a), Node::Operation(b)) => a.cmp(&b),
        _ => a.name.cmp(&b.name),
    };
    entries[2..].sort_by(order);
    entries.dedup_by(|a, b| a.name == b.name);
    Ok(entries)
}

/// A symlink's target. ESTALE when what it led to is gone.
pub fn link(view: &View<'_>, node: Node) -> Result<String, Errno> {
    let owned = |v: &Volume| view.job(v.job).map(|job| format!("jobs/{}/volumes/{}", job.id, v.uuid));
    Ok(match node {
        Node::Volume(row, VolumeFile::DiskLink) => format!("../volumes/{}", view.volume(row)?.uuid),
        Node::Volume(row, VolumeFile::UuidLink) => format!("../{}", owned(view.volume(row)?)?),
        Node::Mapping(row, MapFile::DeviceLink) => format!("../{}", owned(view.disk_of_mapping(row)?)?),
        Node::Unclaimed(hash, UnclaimedFile::UuidLink | UnclaimedFile::DeviceLink) => {
            format!("../unclaimed/{}", view.unclaimed(hash)?.0)
        }
        Node::VmLink(hash) => {
            let id = view.vm_volume(hash)?;
            match view.world.by_uuid.get(&id) {
                Some(row) => format!("../../{}", owned(view.volume(*row)?)?),
                None => format!("../../unclaimed/{id}"),
            }
        }
        _ => return Err(Errno::EINVAL),
    })
}

/// What stat shows but the size: for a block node the device's number, verified now (ENODEV when
/// its mapping has ended); the time of the last change, `None` where only the rendering knows it.
pub fn meta(view: &View<'_>, node: Node) -> Result<(Option<Timestamp>, Option<DevNo>), Errno> {
    let world = view.world;
    let time = match node {
        Node::Root(RootFile::Version) => world.started,
        Node::Root(RootFile::Health) => world.health.at,
        Node::Root(RootFile::Problems | RootFile::Table | RootFile::Limits | RootFile::Metrics) => {
            return Ok((None, None));
        }
        Node::Root(RootFile::Error) | Node::Control(Target::Root, _) => {
            world.error.as_ref().map_or(world.started, |e| e.at)
        }
        Node::Root(RootFile::History) => world.history.last().map_or(world.started, |h| h.at),
        Node::Root(RootFile::Events | RootFile::EventsAll | RootFile::Control) => world.started,
        Node::Root(_) => world.listed_at,
        Node::Job(row, file) => job_time(view.job(row)?, view, file),
        Node::Control(Target::Job(row), _) => view.job(row)?.status_at,
        Node::Volume(row, file) => volume_time(view.volume(row)?, file),
        Node::Control(Target::Volume(row), _) => view.volume(row)?.times.status,
        Node::Mapping(row, MapFile::DeviceLink) => view.disk_of_mapping(row)?.times.device,
        Node::Mapping(row, _) => {
            let now = view.mapped(row)?;
            let at = view.disk_of_mapping(row).map_err(|_| Errno::ENODEV)?.times.device;
            return Ok((Some(at), Some(now.dev)));
        }
        Node::Operation(id) => {
            let op = world.operations.get(&id).ok_or(Errno::ESTALE)?;
            op.ended.as_ref().map_or(op.began, |(_, _, at)| *at)
        }
        Node::Unclaimed(hash, _) => view.unclaimed(hash)?.1.since,
        Node::Vm(hash) => view.vm(hash)?.1.seen.unwrap_or(world.started),
        Node::VmLink(hash) => view.vm_volume(hash).map(|_| world.listed_at)?,
        Node::Snapshot(_) | Node::ForeignSnapshot(_) => view.snapshot(node)?.at,
    };
    Ok((Some(time), None))
}

fn job_time(job: &Job, view: &View<'_>, file: JobFile) -> Timestamp {
    let acted = job.history.last().map_or(job.created, |h| h.at);
    match file {
        JobFile::Dir | JobFile::Events => job.created,
        JobFile::Status | JobFile::Control => job.status_at,
        JobFile::Error => job.error.as_ref().map_or(acted, |e| e.at),
        JobFile::History => acted,
        JobFile::VmName => job.vm_name.1,
        JobFile::Hold => job.hold.1,
        JobFile::Disks | JobFile::Volumes => job.listed_at,
        JobFile::Table => {
            let volumes = job.disks.values().filter_map(|r| view.volume(*r).ok());
            volumes.map(|v| row_time(v)).max().unwrap_or(job.listed_at).max(job.listed_at)
        }
    }
}

/// When a volume's row in a `table` last changed.
fn row_time(volume: &Volume) -> Timestamp {
    let t = &volume.times;
    t.owned.max(t.status).max(t.device).max(t.facts)
}

fn volume_time(volume: &Volume, file: VolumeFile) -> Timestamp {
    let t = &volume.times;
    match file {
        VolumeFile::Dir => t.owned.max(t.device),
        VolumeFile::DiskLink | VolumeFile::UuidLink => t.owned,
        VolumeFile::Snapshots => t.snapshots,
        VolumeFile::Status | VolumeFile::Control => t.status,
        VolumeFile::Device | VolumeFile::Incarnation | VolumeFile::Holders => t.device,
        VolumeFile::Error => t.error,
        VolumeFile::History => t.history,
        VolumeFile::Info => row_time(volume).max(t.error).max(t.history).max(t.snapshots),
        VolumeFile::Name
        | VolumeFile::Size
        | VolumeFile::Vm
        | VolumeFile::DeviceId
        | VolumeFile::Serial
        | VolumeFile::CloudState
        | VolumeFile::Owner => t.facts,
    }
}

#[cfg(test)]
mod tests;
