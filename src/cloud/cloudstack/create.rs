//! Making a volume, so that one whose answer was lost is found again: created under the operation's
//! own name, then marked, then renamed.

use uuid::Uuid;

use super::super::{Call, CloudError, CloudVolume, NewVolume};
use super::jobs::{End, Repeat};
use super::marks::another;
use super::provider::{CloudStack, GIB, no_such, other, said};
use super::rows::{OfferingRow, TAG_MADE_BY, VolumeRow, ZoneRow};
use crate::failpoint;
use crate::model::{Fence, VolumeId};

/// The name that a volume has until it is marked.
fn first_name(fence: Fence) -> String {
    format!("volfs-{fence}")
}

/// A failure after the volume was made: that nothing was started is not true any more.
fn unfinished(volume: VolumeId, error: CloudError) -> CloudError {
    match error {
        CloudError::Unreachable { words } => {
            CloudError::Ambiguous { words: format!("volume {volume} was made, and not marked: {words}") }
        }
        error => error,
    }
}

impl CloudStack {
    /// The volume that a creation with this fence made: by the name it was given first, or by the tag.
    pub(super) async fn made_by(&self, fence: Fence) -> Result<Option<VolumeRow>, CloudError> {
        let (name, tag) = (first_name(fence), fence.to_string());
        let mut found = self.list(&[("name", &name)]).await.map_err(said)?;
        found.retain(|row| row.name == name && !row.gone());
        if found.is_empty() {
            found = self.list(&[("tags[0].key", TAG_MADE_BY), ("tags[0].value", &tag)]).await.map_err(said)?;
            found.retain(|row| row.tag(TAG_MADE_BY) == Some(&tag) && !row.gone());
        }
        // A late twin: the one that was marked is the one that was made; the other is nobody's.
        let marked = found.iter().position(|row| row.mark().is_some());
        Ok(found.into_iter().nth(marked.unwrap_or(0)))
    }

    pub(super) async fn make(&self, call: &Call, new: &NewVolume) -> Result<CloudVolume, CloudError> {
        let made = match self.made_by(call.fence()).await? {
            Some(row) => row,
            None => self.allocate(call, new).await?,
        };
        let volume = VolumeId(made.id);
        if let Some(found) = made.mark().filter(|found| *found != new.label.mark) {
            // It was given to somebody else since.
            return Err(another(volume, Some(found)));
        }
        failpoint::reach("cloudstack.allocated").await;
        let marked = self.exchange(call, volume, made.mark(), Some(&new.label)).await;
        marked.map_err(|error| unfinished(volume, error))?;
        failpoint::reach("cloudstack.marked").await;
        if made.name != new.name {
            self.rename(call, volume, &new.name).await;
        }
        let row = self.row_when(volume, |row| row.mark() == Some(new.label.mark)).await;
        let row = row.map_err(|error| unfinished(volume, error))?.ok_or_else(|| unfinished(volume, no_such(volume)))?;
        Ok(self.shown(&row))
    }

    async fn allocate(&self, call: &Call, new: &NewVolume) -> Result<VolumeRow, CloudError> {
        let offering = self.offering(new.offering.as_deref()).await?;
        let zone = self.zone(new.zone.as_deref()).await?;
        let gib = new.size.div_ceil(GIB);
        let fixed = offering.disksize.filter(|_| !offering.iscustomized);
        if let Some(has) = fixed
            && has < gib
        {
            return Err(other(format!(
                "disk offering {} ({}) makes volumes of {has} GiB, {gib} GiB were asked for: take a custom one",
                offering.id, offering.name
            )));
        }
        let (name, offering, zone, gib) =
            (first_name(call.fence()), offering.id.to_string(), zone.to_string(), gib.to_string());
        let mut params = vec![("name", name.as_str()), ("diskofferingid", &offering), ("zoneid", &zone)];
        if fixed.is_none() {
            params.push(("size", &gib));
        }
        if let Some(project) = &self.options.project {
            params.push(("projectid", project));
        }
        match self.jobs.run(call, "createVolume", &params, Repeat::Never).await {
            Ok(_) => {}
            // The name decides, as after an answer that never came.
            Err(End::Refused(error)) => {
                return self.made_by(call.fence()).await?.ok_or(error);
            }
            Err(End::NotStarted(error)) => return Err(error),
            Err(End::NoResult(words) | End::Unknown(words)) => {
                return match self.made_by(call.fence()).await {
                    Ok(Some(row)) => Ok(row),
                    _ => Err(CloudError::Ambiguous { words }),
                };
            }
        }
        let made = self.made_by(call.fence()).await;
        let missing = || CloudError::Ambiguous { words: format!("the cloud says created, and shows no volume {name}") };
        made.map_err(|_| missing())?.ok_or_else(missing)
    }

    /// Its name for people. A server that renames nothing (before 4.16) leaves it as it was made.
    async fn rename(&self, call: &Call, volume: VolumeId, name: &str) {
        let id = volume.to_string();
        let renamed = |row: Option<&VolumeRow>| row.is_some_and(|row| row.name == name);
        if let Err(error) = self.carry_out(call, volume, "updateVolume", &[("id", &id), ("name", name)], renamed).await
        {
            tracing::warn!(%volume, "it keeps the name it was made with: {error}");
        }
    }

    /// The zone of a new volume for which none is asked for.
    pub async fn default_zone(&self) -> Result<Uuid, CloudError> {
        self.zone(None).await
    }

    /// The offering of a new volume for which none is asked for, in words.
    pub async fn default_offering(&self) -> Result<String, CloudError> {
        let row = self.offering(None).await?;
        let size = match row.disksize.filter(|_| !row.iscustomized) {
            Some(gib) => format!("volumes of {gib} GiB and no other size"),
            None => "any size".into(),
        };
        Ok(format!("{} ({}), {size}", row.id, row.name))
    }

    /// The offering that was asked for, or configured, or the only one that takes any size.
    async fn offering(&self, wanted: Option<&str>) -> Result<OfferingRow, CloudError> {
        let wanted = wanted.or(self.options.offering.as_deref());
        let filter: Vec<_> = wanted.map(|id| ("id", id)).into_iter().collect();
        let mut found: Vec<OfferingRow> =
            self.client.list("listDiskOfferings", &filter, "diskoffering").await.map_err(said)?;
        if let Some(id) = wanted {
            let found = found.into_iter().find(|row| row.id.to_string() == id);
            return found.ok_or_else(|| other(format!("the cloud shows no disk offering {id}")));
        }
        found.retain(|row| row.iscustomized);
        match (found.pop(), found.pop()) {
            (Some(one), None) => Ok(one),
            (None, _) => Err(other("no disk offering takes any size: give offering=UUID, or set cloudstack.offering")),
            (Some(one), Some(two)) => Err(other(format!(
                "several disk offerings take any size, {} ({}) and {} ({}) among them: give offering=UUID, or set \
                 cloudstack.offering",
                one.id, one.name, two.id, two.name
            ))),
        }
    }

    /// The zone that was asked for, by id or name, or configured, or that of this host.
    async fn zone(&self, wanted: Option<&str>) -> Result<Uuid, CloudError> {
        let Some(wanted) = wanted.or(self.options.zone.as_deref()) else {
            let host = self.vm_row(self.options.host).await?.and_then(|vm| vm.zoneid);
            return host
                .ok_or_else(|| other("the cloud does not show this host's zone: give zone=, or set cloudstack.zone"));
        };
        let zones: Vec<ZoneRow> =
            self.client.list("listZones", &[("available", "true")], "zone").await.map_err(said)?;
        let by_id = zones.iter().find(|zone| zone.id.to_string() == wanted);
        let mut named = zones.iter().filter(|zone| zone.name == wanted);
        match (by_id, named.next(), named.next()) {
            (Some(zone), _, _) | (None, Some(zone), None) => Ok(zone.id),
            (None, Some(one), Some(two)) => {
                Err(other(format!("two zones are named {wanted}: {} and {}; give the id", one.id, two.id)))
            }
            (None, None, _) => Err(other(format!("the cloud shows no zone {wanted}"))),
        }
    }
}
