//! Node ids: an id is an address. It says what it names, so there is no inode table, FORGET has
//! nothing to do, and the next daemon understands every id that the kernel still holds.
//!
//! All but `control` lie below 2^53: 5 bits class, 40 bits row, 8 bits file. A `control` id is
//! bit 62, 2 bits place, 32 bits row, 28 bits of a serial that is new at every LOOKUP: the kernel
//! lets one writer at a time into an inode, and a second one could never be told "busy".

use crate::engine::Target;
use crate::model::{DiskRow, JobRow, MapRow, OpId, SnapRow};
use uuid::Uuid;

macro_rules! files {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $number:literal $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($variant = $number),* }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            fn from_number(number: u8) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// Its name in the directory it always stands in; empty for what is named otherwise.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }

            pub fn named(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|f| !name.is_empty() && f.name() == name)
            }
        }
    };
}

files!(
    /// What stands in the root. The root itself must have id 1.
    RootFile {
        Dir = 1 "",
        Version = 2 "version",
        Health = 3 "health",
        Problems = 4 "problems",
        Control = 5 "control",
        Error = 6 "error",
        Table = 7 "table",
        History = 8 "history",
        Limits = 9 "limits",
        Metrics = 10 "metrics",
        Events = 11 "events",
        Jobs = 12 "jobs",
        Volumes = 13 "volumes",
        Devices = 14 "devices",
        Exports = 15 "exports",
        Vms = 16 "vms",
        Operations = 17 "operations",
        Unclaimed = 18 "unclaimed",
        EventsAll = 19 "",
    }
);

files!(
    /// What stands in a job's directory, and its stream in `events/`.
    JobFile {
        Dir = 1 "",
        Status = 2 "status",
        Control = 3 "control",
        Error = 4 "error",
        Table = 5 "table",
        History = 6 "history",
        VmName = 7 "vm_name",
        Hold = 8 "hold",
        Disks = 9 "disks",
        Volumes = 10 "volumes",
        Events = 11 "",
    }
);

files!(
    /// What stands in a volume's directory, and the symlinks that lead to it.
    VolumeFile {
        Dir = 1 "",
        Status = 2 "status",
        Device = 3 "device",
        Control = 4 "control",
        Error = 5 "error",
        History = 6 "history",
        Name = 7 "name",
        Size = 8 "size",
        Vm = 9 "vm",
        DeviceId = 10 "device_id",
        Serial = 11 "serial",
        CloudState = 12 "cloud_state",
        Owner = 13 "owner",
        Incarnation = 14 "incarnation",
        Holders = 15 "holders",
        Snapshots = 16 "snapshots",
        Info = 17 "info.json",
        DiskLink = 18 "",
        UuidLink = 19 "",
    }
);

files!(
    /// What ends with one incarnation of a disk.
    MapFile {
        Block = 1 "block",
        Export = 2 "",
        DeviceLink = 3 "",
    }
);

files!(
    /// What stands in an unclaimed volume's directory, and the symlinks that lead to it.
    UnclaimedFile {
        Dir = 1 "",
        Name = 2 "name",
        Size = 3 "size",
        Device = 4 "device",
        Serial = 5 "serial",
        Owner = 6 "owner",
        Reason = 7 "reason",
        UuidLink = 8 "",
        DeviceLink = 9 "",
    }
);

/// 40 bits made of a UUID, for objects without a row. Two objects of one hash have no address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hash40(u64);

impl Hash40 {
    pub fn of(id: Uuid) -> Self {
        // Multiply and fold (the finaliser of MurmurHash3), since UUIDs need not be random.
        let (a, b) = id.as_u64_pair();
        let mut h = a ^ b.rotate_left(32) ^ 0x9e37_79b9_7f4a_7c15;
        for m in [0xff51_afd7_ed55_8ccd, 0xc4ce_b9fe_1a85_ec53u64] {
            h = (h ^ (h >> 33)).wrapping_mul(m);
            h ^= b.wrapping_mul(m | 1);
        }
        h ^= h >> 33;
        Self((h >> 24) % NO_ROW)
    }
}

/// What a node id names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Node {
    Root(RootFile),
    Job(JobRow, JobFile),
    Volume(DiskRow, VolumeFile),
    Mapping(MapRow, MapFile),
    Operation(OpId),
    Unclaimed(Hash40, UnclaimedFile),
    /// `vms/VM`.
    Vm(Hash40),
    /// `vms/VM/UUID`, by the volume.
    VmLink(Hash40),
    /// `snapshots/NAME`, one of ours.
    Snapshot(SnapRow),
    /// `snapshots/NAME`, one that the record does not have, by the cloud's id.
    ForeignSnapshot(Hash40),
    /// `control`, by its serial.
    Control(Target, u32),
}

const ROW_BITS: u32 = 40;
/// The row of what has none that fits: such an id is nobody's.
const NO_ROW: u64 = (1 << ROW_BITS) - 1;

const CONTROL: u64 = 1 << 62;
const CONTROL_NO_ROW: u64 = (1 << 32) - 1;
/// Serials of `control` wrap here.
pub const SERIAL_MASK: u32 = (1 << 28) - 1;

fn pack(class: u64, row: u64, file: u8) -> u64 {
    class << 48 | row.min(NO_ROW) << 8 | u64::from(file)
}

fn row(row: i64) -> u64 {
    u64::try_from(row).unwrap_or(NO_ROW)
}

impl Node {
    pub const ROOT: Node = Node::Root(RootFile::Dir);

    /// The id.
    pub fn id(self) -> u64 {
        match self {
            Node::Root(f) => pack(0, 0, f as u8),
            Node::Job(r, f) => pack(1, row(r.0), f as u8),
            Node::Volume(r, f) => pack(2, row(r.0), f as u8),
            Node::Mapping(r, f) => pack(3, row(r.0), f as u8),
            Node::Operation(r) => pack(4, row(r.0), 1),
            Node::Unclaimed(h, f) => pack(5, h.0, f as u8),
            Node::Vm(h) => pack(6, h.0, 1),
            Node::VmLink(h) => pack(7, h.0, 1),
            Node::Snapshot(r) => pack(8, row(r.0), 1),
            Node::ForeignSnapshot(h) => pack(9, h.0, 1),
            Node::Control(target, serial) => {
                let (place, r) = match target {
                    Target::Root => (0, 0),
                    Target::Job(r) => (1, row(r.0)),
                    Target::Volume(r) => (2, row(r.0)),
                };
                CONTROL | place << 60 | r.min(CONTROL_NO_ROW) << 28 | u64::from(serial & SERIAL_MASK)
            }
        }
    }

    /// What stat shows as inode number: the id, but constant for a `control`, or `cp control x`
    /// refuses the file as replaced while it was copied.
    pub fn ino(self) -> u64 {
        match self {
            Node::Control(Target::Root, _) => Node::Root(RootFile::Control).id(),
            Node::Control(Target::Job(r), _) => Node::Job(r, JobFile::Control).id(),
            Node::Control(Target::Volume(r), _) => Node::Volume(r, VolumeFile::Control).id(),
            other => other.id(),
        }
    }

    /// What the id names; `None` for an id that nothing has.
    pub fn parse(id: u64) -> Option<Node> {
        if id & CONTROL != 0 {
            let r = id >> 28 & CONTROL_NO_ROW;
            let signed = i64::try_from(r).ok().filter(|_| r != CONTROL_NO_ROW)?;
            let target = match id >> 60 {
                0b0100 if r == 0 => Target::Root,
                0b0101 => Target::Job(JobRow(signed)),
                0b0110 => Target::Volume(DiskRow(signed)),
                _ => return None,
            };
            return Some(Node::Control(target, u32::try_from(id & u64::from(SERIAL_MASK)).ok()?));
        }
        let (class, r, file) = (id >> 48, id >> 8 & NO_ROW, u8::try_from(id & 0xff).ok()?);
        if r == NO_ROW {
            return None;
        }
        let signed = i64::try_from(r).ok()?;
        let node = match class {
            0 if r == 0 => Node::Root(RootFile::from_number(file)?),
            1 => Node::Job(JobRow(signed), JobFile::from_number(file)?),
            2 => Node::Volume(DiskRow(signed), VolumeFile::from_number(file)?),
            3 => Node::Mapping(MapRow(signed), MapFile::from_number(file)?),
            4 if file == 1 => Node::Operation(OpId(signed)),
            5 => Node::Unclaimed(Hash40(r), UnclaimedFile::from_number(file)?),
            6 if file == 1 => Node::Vm(Hash40(r)),
            7 if file == 1 => Node::VmLink(Hash40(r)),
            8 if file == 1 => Node::Snapshot(SnapRow(signed)),
            9 if file == 1 => Node::ForeignSnapshot(Hash40(r)),
            _ => return None,
        };
        // The constant inode number of a control is no address.
        let constant = matches!(
            node,
            Node::Root(RootFile::Control) | Node::Job(_, JobFile::Control) | Node::Volume(_, VolumeFile::Control)
        );
        if constant { None } else { Some(node) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_node(row: i64) -> Vec<Node> {
        let hash = Hash40::of(Uuid::from_u128(row as u128));
        let mut nodes = vec![Node::Operation(OpId(row)), Node::Vm(hash), Node::VmLink(hash)];
        nodes.extend([Node::Snapshot(SnapRow(row)), Node::ForeignSnapshot(hash)]);
        nodes.extend(RootFile::ALL.iter().map(|f| Node::Root(*f)));
        nodes.extend(JobFile::ALL.iter().map(|f| Node::Job(JobRow(row), *f)));
        nodes.extend(VolumeFile::ALL.iter().map(|f| Node::Volume(DiskRow(row), *f)));
        nodes.extend(MapFile::ALL.iter().map(|f| Node::Mapping(MapRow(row), *f)));
        nodes.extend(UnclaimedFile::ALL.iter().map(|f| Node::Unclaimed(hash, *f)));
        nodes.retain(|n| {
            !matches!(
                n,
                Node::Root(RootFile::Control) | Node::Job(_, JobFile::Control) | Node::Volume(_, VolumeFile::Control)
            )
        });
        nodes
    }

    #[test]
    fn an_id_reads_back_as_what_it_names_and_no_two_are_equal() {
        let mut seen = std::collections::HashMap::new();
        for row in [1, 2, 77, (1 << 40) - 2] {
            for node in every_node(row) {
                let id = node.id();
                assert_eq!(Node::parse(id), Some(node), "{node:?}");
                assert!(id != 0 && id < 1 << 53, "{node:?}");
                assert_eq!(*seen.entry(id).or_insert(node), node);
            }
        }
        assert_eq!(Node::ROOT.id(), 1);
    }

    #[test]
    fn a_control_has_a_new_id_and_one_inode_number() {
        for target in [Target::Root, Target::Job(JobRow(9)), Target::Volume(DiskRow(9))] {
            let (a, b) = (Node::Control(target, 1), Node::Control(target, SERIAL_MASK));
            assert_ne!(a.id(), b.id());
            assert_eq!(a.ino(), b.ino());
            assert_eq!(Node::parse(a.id()), Some(a));
            assert_eq!(Node::parse(b.id()), Some(b));
            assert!(a.id() >= 1 << 62 && a.id() < 1 << 63);
            assert_eq!(Node::parse(a.ino()), None, "the constant number is no address");
        }
        assert_ne!(Node::Control(Target::Job(JobRow(9)), 1).ino(), Node::Control(Target::Job(JobRow(8)), 1).ino());
    }

    #[test]
    fn an_id_of_nothing_names_nothing() {
        for id in [0, 20, 1 << 8 | 1, 1 << 48 | 255, 31 << 48 | 1, 1 << 53, 1 << 63, 0b0111 << 60, CONTROL | 1 << 28] {
            assert_eq!(Node::parse(id), None, "{id:#x}");
        }
        // A row that does not fit has no address, rather than another object's.
        for node in [
            Node::Job(JobRow(1 << 40), JobFile::Dir),
            Node::Volume(DiskRow(-1), VolumeFile::Dir),
            Node::Snapshot(SnapRow(1 << 40)),
            Node::Control(Target::Volume(DiskRow(1 << 32)), 5),
        ] {
            assert_eq!(Node::parse(node.id()), None, "{node:?}");
        }
    }
}
