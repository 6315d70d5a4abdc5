//! What CloudStack answers, as we read it. Everything optional is: absent is not zero.

use serde::{Deserialize, Deserializer};
use uuid::Uuid;

use super::super::{Attachment, CloudSnapshot, CloudVolume};
use crate::model::{Mark, RecordId, SnapshotId, Timestamp, VmId, VolumeId};

/// The tag that is the mark, and those beside it.
pub(super) const TAG: &str = "volfs";
/// The job's name, for people and for rebuilding.
pub(super) const TAG_JOB: &str = "volfs-job";
/// The disk's name.
pub(super) const TAG_DISK: &str = "volfs-disk";
/// The record alone: one request lists all of a record's volumes by it.
pub(super) const TAG_RECORD: &str = "volfs-record";
/// The operation that made the volume, until its owner first changes: its repeat finds it by this.
pub(super) const TAG_MADE_BY: &str = "volfs-made-by";
/// All of them.
pub(super) const TAGS: [&str; 5] = [TAG, TAG_JOB, TAG_DISK, TAG_RECORD, TAG_MADE_BY];

/// A row of listVolumes.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct VolumeRow {
    pub id: Uuid,
    #[serde(default)]
    pub name: String,
    #[serde(default, deserialize_with = "number")]
    pub size: Option<u64>,
    #[serde(default)]
    pub state: String,
    #[serde(default, deserialize_with = "number")]
    pub deviceid: Option<u64>,
    pub virtualmachineid: Option<Uuid>,
    pub jobid: Option<String>,
    #[serde(default)]
    pub tags: Vec<Tag>,
}

/// A tag of a resource.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Tag {
    pub key: String,
    #[serde(default)]
    pub value: String,
}

/// A row of listVirtualMachines.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct VmRow {
    pub id: Uuid,
    #[serde(default)]
    pub state: String,
    pub zoneid: Option<Uuid>,
}

/// A row of listZones.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct ZoneRow {
    pub id: Uuid,
    #[serde(default)]
    pub name: String,
}

/// A row of listDiskOfferings.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct OfferingRow {
    pub id: Uuid,
    #[serde(default)]
    pub name: String,
    /// GiB.
    #[serde(default, deserialize_with = "number")]
    pub disksize: Option<u64>,
    #[serde(default)]
    pub iscustomized: bool,
}

/// A row of listSnapshots.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct SnapshotRow {
    pub id: Uuid,
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub state: String,
    #[serde(default, deserialize_with = "number")]
    pub virtualsize: Option<u64>,
    pub created: Option<String>,
}

/// A number, as such or as text.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(u64),
        Text(String),
    }
    match Option::<Either>::deserialize(from)? {
        None => Ok(None),
        Some(Either::Number(n)) => Ok(Some(n)),
        Some(Either::Text(text)) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

impl VolumeRow {
    /// Whether it is on its way out or gone: to be recovered perhaps, but no volume to work with.
    pub fn gone(&self) -> bool {
        matches!(self.state.as_str(), "Destroy" | "Expunging" | "Expunged")
    }

    /// Whether its state is one that passes by itself (page 4.1): a refusal meanwhile is none for good.
    pub fn in_passing(&self) -> bool {
        const PASSING: [&str; 9] = [
            "Creating",
            "Attaching",
            "Snapshotting",
            "RevertSnapshotting",
            "Resizing",
            "Migrating",
            "Copying",
            "Restoring",
            "Expunging",
        ];
        PASSING.contains(&self.state.as_str())
    }

    /// A tag's value.
    pub fn tag(&self, key: &str) -> Option<&str> {
        self.tags.iter().find(|tag| tag.key == key).map(|tag| tag.value.as_str())
    }

    /// Whose it is. A mark that cannot be read is somebody's all the same: of a record that nobody has.
    pub fn mark(&self) -> Option<Mark> {
        let unreadable = Mark { record: RecordId(Uuid::nil()), epoch: 0 };
        self.tag(TAG).map(|text| Mark::parse(text).unwrap_or(unreadable))
    }

    /// As the engine sees it; `host` and `protected` decide what must never be claimed.
    pub fn shown(&self, host: VmId, protected: &[VolumeId]) -> CloudVolume {
        let id = VolumeId(self.id);
        let device_id = self.deviceid.and_then(|n| u32::try_from(n).ok());
        let attached = self.virtualmachineid.map(|vm| Attachment { vm: VmId(vm), device_id });
        let root_of_host = attached.is_some_and(|a| a.vm == host && a.device_id == Some(0));
        let carries_host = match (root_of_host, protected.contains(&id)) {
            (true, _) => Some("it is this host's root disk: device id 0 of its VM".to_owned()),
            (_, true) => Some("protected by configuration".to_owned()),
            _ => None,
        };
        CloudVolume {
            id,
            name: self.name.clone(),
            size: self.size.unwrap_or(0),
            state: self.state.clone(),
            attached,
            mark: self.mark(),
            carries_host,
            pending: self.jobid.clone(),
        }
    }
}

impl SnapshotRow {
    /// As the engine sees it.
    pub fn shown(&self) -> CloudSnapshot {
        CloudSnapshot {
            id: SnapshotId(self.id),
            name: self.name.clone(),
            state: self.state.clone(),
            ready: matches!(self.state.as_str(), "BackedUp"),
            size: self.virtualsize.unwrap_or(0),
            created: self.created.as_deref().and_then(moment),
        }
    }

    /// Whether it is there, or still comes.
    pub fn lives(&self) -> bool {
        !matches!(self.state.as_str(), "Destroying" | "Destroyed" | "Error")
    }
}

/// `2022-06-24T07:46:36+0000`: whole seconds, with the server's offset.
fn moment(text: &str) -> Option<Timestamp> {
    let parsed = jiff::fmt::strtime::parse("%Y-%m-%dT%H:%M:%S%z", text).ok()?;
    parsed.to_timestamp().ok().map(|at| Timestamp(at.as_millisecond()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ID: &str = "3c9a6f0e-5b7d-4e1a-8f22-0a1b2c3d4e5f";
    const VM: &str = "8f1f4c3e-2f0b-4a57-9d0e-1c2b3a4d5e6f";

    fn row(value: serde_json::Value) -> VolumeRow {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn an_absent_device_id_is_not_the_root_disks() {
        let host = VmId::parse(VM).unwrap();
        let plain = row(json!({"id": ID, "virtualmachineid": VM, "surprise": [1, 2]})).shown(host, &[]);
        assert_eq!(plain.attached, Some(Attachment { vm: host, device_id: None }));
        assert_eq!(plain.carries_host, None);
        let root = row(json!({"id": ID, "virtualmachineid": VM, "deviceid": 0})).shown(host, &[]);
        assert!(root.carries_host.unwrap().contains("root disk"));
        let other = VmId::random();
        assert_eq!(row(json!({"id": ID, "virtualmachineid": VM, "deviceid": 0})).shown(other, &[]).carries_host, None);
        let protected = VolumeId::parse(ID).unwrap();
        assert!(row(json!({"id": ID})).shown(host, &[protected]).carries_host.unwrap().contains("configuration"));
    }

    #[test]
    fn numbers_come_as_numbers_and_as_text() {
        assert_eq!(row(json!({"id": ID, "size": 1u64 << 40})).size, Some(1 << 40));
        assert_eq!(row(json!({"id": ID, "size": "1099511627776", "deviceid": "4"})).size, Some(1 << 40));
        assert!(serde_json::from_value::<VolumeRow>(json!({"id": ID, "size": "much"})).is_err());
        assert!(serde_json::from_value::<VolumeRow>(json!({"id": "17"})).is_err());
    }

    #[test]
    fn states_on_the_way_to_another_pass() {
        let state = |word: &str| row(json!({"id": ID, "state": word}));
        for word in ["Attaching", "Snapshotting", "Migrating"] {
            assert!(state(word).in_passing() && !state(word).gone(), "{word}");
        }
        for word in ["Ready", "Allocated", "Uploaded", "Destroy", "", "SomethingNew"] {
            assert!(!state(word).in_passing(), "{word}");
        }
    }

    #[test]
    fn a_mark_that_cannot_be_read_is_somebodys() {
        assert_eq!(row(json!({"id": ID})).mark(), None);
        let garbled = row(json!({"id": ID, "tags": [{"key": "volfs", "value": "mine"}]})).mark().unwrap();
        assert_eq!(garbled.record, RecordId(Uuid::nil()));
        let text = format!("{VM}/7");
        let mark = row(json!({"id": ID, "tags": [{"key": "volfs", "value": text}]})).mark().unwrap();
        assert_eq!((mark.record.to_string().as_str(), mark.epoch), (VM, 7));
    }

    #[test]
    fn a_moment_is_read_in_the_servers_zone() {
        let utc = moment("2022-06-24T07:46:36+0000").unwrap();
        assert_eq!(utc.to_string(), "2022-06-24T07:46:36Z");
        assert_eq!(moment("2022-06-24T09:16:36+0130"), Some(utc));
        assert_eq!(moment("2022-06-24T02:46:36-0500"), Some(utc));
        for bad in ["", "2022-06-24", "2022-13-24T07:46:36+0000", "2022-06-24T07:46+0000", "x-y-zT1:2:3Z"] {
            assert_eq!(moment(bad), None, "{bad}");
        }
    }
}
