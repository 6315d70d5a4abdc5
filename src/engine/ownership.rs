//! Create, claim, release, move and rename: who owns a volume, and by what mark.
//!
//! A new mark is journaled (its epoch is part of the operation) before it is set, and set as
//! compare-and-set, so a crash at any instruction leaves either the old mark or the new one, and
//! recovery reads which.

use std::sync::Arc;

use super::Engine;
use super::inflight::Live;
use super::jobs::in_flight;
use super::operation::{Acted, Done, Fail, LOOK_AGAIN, cloud_fail};
use super::volume::{facts, show_facts};
use super::world::{Snapshots, Times, Volume};
use crate::cloud::{Call, CloudError, CloudVolume, Label, NewVolume, Refusal};
use crate::command::Action;
use crate::error::Error;
use crate::failpoint;
use crate::model::{DiskName, DiskRow, JobId, JobRow, Mark, RecordId, Status, VolumeId};
use crate::store::Change;

impl Engine {
    pub(super) fn job_of(&self, row: JobRow) -> Result<JobId, Fail> {
        self.core.lock().job_name(row).ok_or_else(|| Fail::clean(Error::Stale))
    }

    /// C1.
    pub(super) async fn create(self: &Arc<Self>, live: &Live, row: JobRow) -> Acted {
        let new = self.new_volume(live, row)?;
        let (disk, size) = (new.label.disk.clone(), new.size);
        let what = format!("create of disk {disk} in job {}", new.label.job);
        let call = self.call(live);
        self.step(live, "the cloud creates it")?;
        failpoint::reach("create.before-call").await;
        let made = match self.patiently(live, &what, None, || self.cloud.create(&call, &new)).await {
            Ok(made) => made,
            Err(fail) if fail.ambiguous => self.made_after_all(live, &what, &call, &new, fail).await?,
            // A refusal may have come after the volume was made: of its mark, say.
            Err(fail) if !matches!(fail.error, Error::CloudUnreachable { .. }) => {
                match self.cloud.find_created(live.fence).await {
                    Ok(None) => return Err(fail),
                    Ok(Some(_)) | Err(_) => self.made_after_all(live, &what, &call, &new, fail).await?,
                }
            }
            Err(fail) => return Err(fail),
        };
        failpoint::reach("create.after-call").await;
        self.created(live, row, &disk, size, made)
    }

    /// What a create is to make.
    pub(super) fn new_volume(&self, live: &Live, row: JobRow) -> Result<NewVolume, Fail> {
        let Action::Create { disk, size, offering, zone, name } = &live.action else {
            return Err(Fail::clean(Error::Internal { what: "create without its arguments".into() }));
        };
        let job = self.job_of(row)?;
        Ok(NewVolume {
            size: *size,
            name: name.clone().unwrap_or_else(|| format!("{job}-{disk}")),
            offering: offering.clone(),
            zone: zone.clone(),
            label: Label { mark: Mark { record: self.record, epoch: live.epoch }, job, disk: disk.clone() },
        })
    }

    /// After an unclear answer to a create: it ends only when the cloud shows the volume, or two looks
    /// [`About::late`](crate::cloud::About::late) apart show none. Ended sooner, the same command again would make a second one.
    async fn made_after_all(
        self: &Arc<Self>,
        live: &Live,
        what: &str,
        call: &Call,
        new: &NewVolume,
        fail: Fail,
    ) -> Result<CloudVolume, Fail> {
        let mut none_since = None;
        loop {
            self.step(live, "no clear answer: look for what it made").map_err(|f| Fail::ambiguous(f.error))?;
            let running = self.cloud.running(live.fence).await;
            match (running, self.cloud.find_created(live.fence).await) {
                (_, Ok(Some(made))) if made.mark == Some(new.label.mark) && made.name == new.name => return Ok(made),
                // Said again: it goes on with what is there.
                (_, Ok(Some(_))) => match self.cloud.create(call, new).await {
                    Ok(made) => return Ok(made),
                    Err(CloudError::Refused { why, words }) if why != Refusal::Passing => {
                        let error = CloudError::Refused { why, words };
                        // It stays, and is shown in unclaimed/.
                        self.core.lock().twins.push((live.fence, (self.clock)()));
                        return Err(Fail::ambiguous(cloud_fail(what, None, None, self.about.name, error).error));
                    }
                    Err(error) => tracing::warn!(operation = %live.id, "not finished yet: {error}"),
                },
                (Ok(None), Ok(None)) => {
                    let first = *none_since.get_or_insert_with(tokio::time::Instant::now);
                    if first.elapsed() >= self.about.late {
                        // It may come to light all the same, and is shown in unclaimed/ then.
                        self.core.lock().twins.push((live.fence, (self.clock)()));
                        return Err(fail);
                    }
                }
                (Ok(Some(_)), Ok(None)) => none_since = None,
                (Err(error), _) | (_, Err(error)) => {
                    tracing::warn!(operation = %live.id, "not known yet what it made: {error}");
                }
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// What the record learns of a volume that was made by this operation, now or before a crash.
    pub(super) fn created(&self, live: &Live, job: JobRow, disk: &DiskName, size: u64, made: CloudVolume) -> Acted {
        if made.size < size {
            let words =
                format!("it made {} bytes, {size} were asked for; the volume {} is in unclaimed/", made.size, made.id);
            return Err(Fail::ambiguous(Error::CloudRefused { what: format!("create of disk {disk}"), words }));
        }
        Ok(self.owning(live, job, disk.clone(), made, Status::Detached))
    }

    /// The record's and the world's part of taking a volume into a job.
    fn owning(&self, live: &Live, job: JobRow, disk: DiskName, seen: CloudVolume, status: Status) -> Done {
        let at = (self.clock)();
        let (row, volume_row) = {
            let mut core = self.core.lock();
            (core.next_disk(), core.volume_row(seen.id))
        };
        let id = live.id;
        let epoch = live.epoch;
        let changes = vec![
            Change::VolumeAdd { row: volume_row, volume: seen.id, name: seen.name.clone(), size: seen.size, at },
            Change::OpVolume { id, volume: seen.id },
            Change::DiskAdd { row, job, disk: disk.clone(), volume: seen.id, epoch, at },
            facts(&seen, ""),
            Change::VolumeStatus { volume: seen.id, status, at },
        ];
        Done {
            changes,
            note: String::new(),
            look: (status == Status::Unknown).then_some(row),
            apply: Some(Box::new(move |core, at| {
                core.op_volume(id, seen.id);
                let mut volume = blank(row, seen.id, job, disk, epoch, status);
                volume.times =
                    Times { owned: at, status: at, device: at, facts: at, error: at, history: at, snapshots: at };
                if status == Status::Unknown {
                    volume.why = Some("it was just claimed".into());
                }
                show_facts(&mut volume, &seen);
                core.put_volume(volume, at);
            })),
        }
    }

    /// C2.
    pub(super) async fn claim(
        self: &Arc<Self>,
        live: &Live,
        row: JobRow,
        volume: VolumeId,
        disk: Option<DiskName>,
        from: Option<RecordId>,
    ) -> Acted {
        let job = self.job_of(row)?;
        let disk = match disk {
            Some(disk) => disk,
            None => DiskName::parse(&volume.to_string()).map_err(|e| Fail::clean(e.into()))?,
        };
        let what = format!("claim of volume {volume}");
        self.step(live, "look at the volume in the cloud")?;
        let seen = self
            .patiently(live, &what, Some(volume), || self.cloud.find(volume))
            .await
            .map_err(|f| Fail::clean(f.error))?;
        let Some(seen) = seen else { return Err(Fail::clean(Error::NoSuchVolume { volume })) };
        if let Some(why) = seen.carries_host {
            return Err(Fail::clean(Error::Protected { volume, why }));
        }
        self.held_against(std::slice::from_ref(&seen));
        self.refusing()?;
        let mark = Mark { record: self.record, epoch: live.epoch };
        match seen.mark {
            // Our own mark on a volume in no job: released while the cloud was not there, or left by a crash.
            Some(found) if found.record != self.record && from != Some(found.record) => {
                return Err(Fail::clean(Error::OwnedByRecord { volume, owner: found.to_string() }));
            }
            Some(found) if found.record == self.record => {
                let core = self.core.lock();
                if let Some(other) = core.live.values().find(|l| l.epoch == found.epoch && l.id != live.id) {
                    let object = format!("volume {volume}");
                    return Err(Fail::clean(in_flight(&core, other.id, object)));
                }
            }
            None | Some(_) => {}
        }
        let telling = |e: crate::devices::DevicesError| Fail::clean(Error::CannotTell { why: e.to_string() });
        let candidates = self.candidates(volume).await.map_err(telling)?;
        if let Some(why) = self.carries_host(&candidates).await? {
            return Err(Fail::clean(Error::Protected { volume, why }));
        }
        let label = Label { mark, job, disk: disk.clone() };
        self.step(live, "put our mark on it")?;
        failpoint::reach("claim.before-mark").await;
        self.set_mark(live, &what, volume, seen.mark, Some(&label)).await?;
        failpoint::reach("claim.after-mark").await;
        let seen = CloudVolume { mark: Some(mark), carries_host: None, ..seen };
        Ok(self.owning(live, row, disk, seen, Status::Unknown))
    }

    /// Sets or clears a mark as compare-and-set; an unclear answer is settled by looking.
    pub(super) async fn set_mark(
        &self,
        live: &Live,
        what: &str,
        volume: VolumeId,
        expect: Option<Mark>,
        new: Option<&Label>,
    ) -> Result<(), Fail> {
        // Recovery comes here without a step, after looks in which it may have been abandoned.
        if live.stopping() {
            return Err(Fail::clean(Error::Cancelled));
        }
        let call = self.call(live);
        let answer = self.retrying(live, what, || self.cloud.exchange_mark(&call, volume, expect, new)).await;
        match answer {
            Ok(()) => Ok(()),
            Err(CloudError::Refused { why: Refusal::Mark(found), .. }) if found == new.map(|l| l.mark) => Ok(()),
            Err(error) => {
                let fail = cloud_fail(what, Some(volume), expect, self.about.name, error);
                if !fail.ambiguous {
                    return Err(fail);
                }
                match self.look_after(live, volume).await {
                    Ok(Some(seen)) if seen.mark == new.map(|l| l.mark) => Ok(()),
                    Ok(Some(seen)) if seen.mark == expect => Err(Fail::clean(fail.error)),
                    _ => Err(fail),
                }
            }
        }
    }

    /// C8. The volume's data is not touched, nor is it detached from where it is.
    pub(super) async fn release(self: &Arc<Self>, live: &Live, row: DiskRow) -> Acted {
        let volume = self.owned(row)?;
        let what = format!("release of volume {}", volume.uuid);
        let note = match volume.base {
            Status::Missing => "it is missing in the cloud",
            Status::Unknown => "its mark stays: the cloud was not asked",
            Status::Conflict => "its mark was not touched",
            _ => {
                self.step(live, "look at the volume in the cloud")?;
                let seen = self.look_before(live, &volume, &what).await?;
                if seen.attached.is_some_and(|a| a.vm == self.host) && volume.base != Status::Lost {
                    let way_out = "the cloud says it is attached here: reconcile, then detach it";
                    return Err(Fail::clean(Error::WrongStatus { volume: volume.uuid, status: volume.base, way_out }));
                }
                self.step(live, "clear our mark")?;
                failpoint::reach("release.before-mark").await;
                self.set_mark(live, &what, volume.uuid, Some(self.mark(&volume)), None).await?;
                failpoint::reach("release.after-mark").await;
                ""
            }
        };
        Ok(self.released(&volume, note.into()))
    }

    /// The record's end of an ownership whose volume lives on.
    pub(super) fn released(&self, volume: &Volume, note: String) -> Done {
        let (row, uuid) = (volume.row, volume.uuid);
        let mut changes = vec![Change::MappingEnd { volume: uuid }, Change::DiskEnd { row }];
        if volume.base == Status::Missing {
            changes.push(Change::VolumeGone { volume: uuid, at: (self.clock)() });
        }
        let known = volume.base != Status::Missing;
        let wake = self.round_wanted.clone();
        Done {
            changes,
            note,
            look: None,
            apply: Some(Box::new(move |core, at| {
                if let Some(volume) = core.drop_volume(row, at, known)
                    && let Some(mapping) = &volume.mapping
                {
                    core.released.push(mapping.pin.clone());
                }
                // It shows in unclaimed/ as soon as the next look at the cloud has it.
                wake.notify_one();
            })),
        }
    }

    /// C9. Attached or in use is fine: the device stays where it is, only the owner changes.
    pub(super) async fn move_volume(self: &Arc<Self>, live: &Live, row: DiskRow, to: &JobId) -> Acted {
        let volume = self.owned(row)?;
        let what = format!("move of volume {} to job {to}", volume.uuid);
        let target = self.world().job_rows.get(to).copied();
        let Some(target) = target else { return Err(Fail::clean(Error::NoSuchJob { job: to.clone() })) };
        let mark = Mark { record: self.record, epoch: live.epoch };
        if volume.base != Status::Missing {
            self.step(live, "look at the volume in the cloud")?;
            self.look_before(live, &volume, &what).await?;
            let label = Label { mark, job: to.clone(), disk: volume.disk.clone() };
            self.step(live, "put the new mark on it")?;
            failpoint::reach("move.before-mark").await;
            self.set_mark(live, &what, volume.uuid, Some(self.mark(&volume)), Some(&label)).await?;
            failpoint::reach("move.after-mark").await;
        }
        Ok(self.moved(live, &volume, target))
    }

    /// The record's part of a move: a new ownership row, so that what pointed at the old one is stale.
    pub(super) fn moved(&self, live: &Live, volume: &Volume, target: JobRow) -> Done {
        let at = (self.clock)();
        let (old, uuid, disk) = (volume.row, volume.uuid, volume.disk.clone());
        // An imported one that is missing has got no mark, and gets one if it comes back.
        let epoch = if volume.imported() { 0 } else { live.epoch };
        let row = self.core.lock().next_disk();
        let changes =
            vec![Change::DiskEnd { row: old }, Change::DiskAdd { row, job: target, disk, volume: uuid, epoch, at }];
        let mark = Mark { record: self.record, epoch }.to_string();
        Done {
            changes,
            note: String::new(),
            look: None,
            apply: Some(Box::new(move |core, at| {
                let Some(volume) = core.drop_volume(old, at, false) else { return };
                let mut volume = (*volume).clone();
                volume.row = row;
                volume.job = target;
                volume.epoch = epoch;
                volume.running = None;
                volume.error = None;
                if volume.base != Status::Missing {
                    volume.owner = mark.into();
                }
                volume.times.owned = at;
                core.put_volume(volume, at);
            })),
        }
    }

    /// C10.
    pub(super) async fn rename(self: &Arc<Self>, live: &Live, row: DiskRow, to: &DiskName) -> Acted {
        let volume = self.owned(row)?;
        let what = format!("rename of disk {} to {to}", volume.disk);
        let job = self.job_of(volume.job)?;
        if volume.base != Status::Missing {
            // Its mark alone would not tell that it is protected.
            self.step(live, "look at the volume in the cloud")?;
            self.look_before(live, &volume, &what).await?;
            self.step(live, "tell the cloud the disk's name")?;
            let mark = self.mark(&volume);
            let label = Label { mark, job, disk: to.clone() };
            self.set_mark(live, &what, volume.uuid, Some(mark), Some(&label)).await?;
        }
        let at = (self.clock)();
        let to = to.clone();
        Ok(Done {
            changes: vec![Change::DiskRename { row, disk: to.clone(), at }],
            note: format!("from {}", volume.disk),
            look: None,
            apply: Some(Box::new(move |core, at| core.rename_disk(row, to, at))),
        })
    }
}

/// A volume of which nothing is known but whose it is.
pub(super) fn blank(row: DiskRow, uuid: VolumeId, job: JobRow, disk: DiskName, epoch: u64, status: Status) -> Volume {
    Volume {
        row,
        uuid,
        job,
        disk,
        epoch,
        base: status,
        recorded: status,
        running: None,
        mapping: None,
        vm: None,
        device_id: None,
        name: Arc::default(),
        size: 0,
        serial: Arc::default(),
        cloud_state: Arc::default(),
        owner: Arc::default(),
        snapshots: Snapshots::default(),
        why: None,
        error: None,
        history: Arc::default(),
        times: Times::default(),
    }
}
