//! Snapshots of volumes: taken under a name that holds the operation's fence, so that one whose
//! answer was lost is found again.

use tokio::time::Instant;

use super::super::{Call, CloudError, CloudSnapshot};
use super::jobs::{End, Repeat};
use super::provider::{CloudStack, LOOK_AGAIN, no_such, other, said, while_passing};
use super::rows::SnapshotRow;
use super::{ApiError, refusal};
use crate::model::{Fence, SnapshotId, SnapshotName, VmId, VolumeId};

/// The cloud's name of a snapshot: the operation's, then the user's.
fn cloud_name(fence: Fence, name: &SnapshotName) -> String {
    format!("volfs-{fence}-{name}")
}

impl CloudStack {
    pub(super) async fn snapshot_rows(&self, volume: VolumeId) -> Result<Vec<SnapshotRow>, CloudError> {
        let id = volume.to_string();
        let mut params = vec![("volumeid", id.as_str())];
        match &self.options.project {
            Some(project) => params.push(("projectid", project)),
            None => params.push(("listall", "true")),
        }
        match self.client.list("listSnapshots", &params, "snapshot").await {
            Ok(rows) => Ok(rows),
            Err(ApiError::Api { code, text, .. }) if refusal::unknown_entity(code, &text) => Ok(Vec::new()),
            Err(error) => Err(said(error)),
        }
    }

    /// The snapshot that an operation took, complete or not.
    pub(super) async fn snapshot_by(&self, volume: VolumeId, fence: Fence) -> Result<Option<SnapshotRow>, CloudError> {
        let mark = format!("volfs-{fence}-");
        let rows = self.snapshot_rows(volume).await?;
        Ok(rows.into_iter().find(|row| row.name.starts_with(&mark) && row.lives()))
    }

    pub(super) async fn take_snapshot(
        &self,
        call: &Call,
        volume: VolumeId,
        name: &SnapshotName,
    ) -> Result<CloudSnapshot, CloudError> {
        let row = self.row(volume).await?.ok_or_else(|| no_such(volume))?;
        // An attached volume's snapshot goes through its VM's queue.
        let _turn = match row.virtualmachineid {
            Some(vm) => self.turn(call, VmId(vm)).await,
            None => None,
        };
        if self.snapshot_by(volume, call.fence()).await?.is_none() {
            let (id, name) = (volume.to_string(), cloud_name(call.fence(), name));
            let params = [("volumeid", id.as_str()), ("name", name.as_str())];
            match self.jobs.run(call, "createSnapshot", &params, Repeat::Never).await {
                Ok(_) => {}
                Err(End::NotStarted(error)) => return Err(error),
                Err(End::Refused(error)) => {
                    return match self.complete(call, volume).await? {
                        Some(done) => Ok(done),
                        None => Err(while_passing(self.row(volume).await?.as_ref(), error)),
                    };
                }
                Err(End::NoResult(words) | End::Unknown(words)) => {
                    return match self.complete(call, volume).await? {
                        Some(done) => Ok(done),
                        None => Err(CloudError::Ambiguous { words }),
                    };
                }
            }
        }
        let missing = || other("the cloud says the snapshot is taken, and shows none: it has failed");
        self.complete(call, volume).await?.ok_or_else(missing)
    }

    /// Waits until the snapshot that this operation took is complete; `None` if there is none.
    async fn complete(&self, call: &Call, volume: VolumeId) -> Result<Option<CloudSnapshot>, CloudError> {
        loop {
            let Some(row) = self.snapshot_by(volume, call.fence()).await? else { return Ok(None) };
            let shown = row.shown();
            if shown.ready {
                return Ok(Some(shown));
            }
            call.step(&format!("the cloud's snapshot {} is {}", shown.id, shown.state));
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    pub(super) async fn revert_to(
        &self,
        call: &Call,
        volume: VolumeId,
        snapshot: SnapshotId,
    ) -> Result<(), CloudError> {
        let id = snapshot.to_string();
        match self.jobs.run(call, "revertSnapshot", &[("id", &id)], Repeat::SameId).await {
            Ok(_) => Ok(()),
            Err(End::NotStarted(error)) => Err(error),
            Err(End::Refused(error)) => Err(while_passing(self.row(volume).await?.as_ref(), error)),
            // Nothing that a look shows tells whether the bytes went back.
            Err(End::NoResult(words) | End::Unknown(words)) => Err(CloudError::Ambiguous {
                words: format!("{words}: whether volume {volume} was reverted cannot be seen; revert it again"),
            }),
        }
    }

    pub(super) async fn drop_snapshot(
        &self,
        call: &Call,
        volume: VolumeId,
        snapshot: SnapshotId,
    ) -> Result<(), CloudError> {
        let there = async || -> Result<bool, CloudError> {
            let rows = self.snapshot_rows(volume).await?;
            Ok(rows.iter().any(|row| row.id == snapshot.0 && row.lives()))
        };
        if !there().await? {
            return Ok(());
        }
        let id = snapshot.to_string();
        let end = match self.jobs.run(call, "deleteSnapshot", &[("id", &id)], Repeat::SameId).await {
            Ok(_) => return Ok(()),
            Err(end) => end,
        };
        let (error, words) = match end {
            End::NotStarted(error) => return Err(error),
            End::Refused(error) => (Some(error), String::new()),
            End::NoResult(words) | End::Unknown(words) => (None, words),
        };
        let began = Instant::now();
        loop {
            match (there().await, &error) {
                (Ok(false), _) => return Ok(()),
                (Ok(true), Some(error)) => return Err(error.clone()),
                (Ok(true), None) if began.elapsed() >= self.options.late => return Err(other(words)),
                (Ok(true), None) => {}
                (Err(error), _) => tracing::warn!(%volume, "not known yet whether the snapshot is gone: {error}"),
            }
            tokio::time::sleep(LOOK_AGAIN.min(self.options.late)).await;
        }
    }
}
