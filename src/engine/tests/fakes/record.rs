//! The record in memory: the schema's refusals and effects, and the script at each commit.

use super::*;

fn constraint<T>(words: impl Into<String>) -> Result<T, StoreError> {
    Err(StoreError::Constraint { words: words.into() })
}

impl Record {
    pub fn used(&mut self, which: usize, row: i64) {
        self.high[which] = self.high[which].max(row);
    }

    fn volume(&mut self, volume: VolumeId) -> Result<&mut Vol, StoreError> {
        match self.volumes.get_mut(&volume) {
            Some(v) => Ok(v),
            None => constraint(format!("no volume {volume}")),
        }
    }

    fn job(&mut self, row: JobRow) -> Result<&mut JobLoaded, StoreError> {
        match self.jobs.get_mut(&row) {
            Some(j) if !j.forgotten => Ok(&mut j.loaded),
            _ => constraint(format!("no job {row}")),
        }
    }

    fn name_free(&self, job: JobRow, disk: &DiskName, but: Option<DiskRow>) -> Result<(), StoreError> {
        match self.owns.iter().find(|(r, o)| o.job == job && o.disk == *disk && Some(**r) != but) {
            Some(_) => constraint(format!("disk {disk} is in job {job} already")),
            None => Ok(()),
        }
    }

    /// As the schema would have it: the same refusals, the same effects.
    fn apply(&mut self, change: &Change) -> Result<(), StoreError> {
        match change.clone() {
            Change::JobAdd { row, id, at } => {
                if self.jobs.contains_key(&row) || self.jobs.values().any(|j| !j.forgotten && j.loaded.id == id) {
                    return constraint(format!("job {id} is there"));
                }
                self.used(0, row.0);
                let loaded = JobLoaded {
                    row,
                    id,
                    vm_name: String::new(),
                    hold: false,
                    created: at,
                    vm_name_at: at,
                    hold_at: at,
                };
                self.jobs.insert(row, Job { loaded, forgotten: false });
            }
            Change::JobForget { row, .. } => {
                if self.owns.values().any(|o| o.job == row) {
                    return constraint(format!("job {row} still owns a volume"));
                }
                self.job(row)?;
                self.jobs.get_mut(&row).unwrap().forgotten = true;
            }
            Change::JobVmName { row, vm_name, at } => {
                let job = self.job(row)?;
                (job.vm_name, job.vm_name_at) = (vm_name, at);
            }
            Change::JobHold { row, hold, at } => {
                let job = self.job(row)?;
                (job.hold, job.hold_at) = (hold, at);
            }
            Change::VolumeAdd { row, volume, name, size, at } => {
                self.used(1, row.0);
                let row = self.volumes.get(&volume).map_or(row, |v| v.row);
                self.volumes.insert(
                    volume,
                    Vol {
                        row,
                        name,
                        size,
                        serial: String::new(),
                        cloud_state: String::new(),
                        device_id: None,
                        status: Status::Unknown,
                        status_at: at,
                        gone: false,
                    },
                );
            }
            Change::VolumeFacts { volume, name, size, serial, cloud_state, device_id } => {
                let v = self.volume(volume)?;
                (v.name, v.size, v.serial, v.cloud_state, v.device_id) = (name, size, serial, cloud_state, device_id);
            }
            Change::VolumeStatus { volume, status, at } => {
                let v = self.volume(volume)?;
                (v.status, v.status_at) = (status, at);
            }
            Change::VolumeGone { volume, .. } => self.volume(volume)?.gone = true,
            Change::DiskAdd { row, job, disk, volume, epoch, at } => {
                self.job(job)?;
                self.name_free(job, &disk, None)?;
                if self.volume(volume)?.gone {
                    return constraint(format!("volume {volume} is gone"));
                }
                if self.owns.values().any(|o| o.volume == volume) || self.rows.insert(row).is_some() {
                    return constraint(format!("volume {volume} has an owner, or row {row} was used"));
                }
                self.used(2, row.0);
                self.epoch = self.epoch.max(epoch);
                self.owns.insert(row, Own { job, disk, volume, epoch, at });
            }
            Change::DiskMarked { row, epoch } => match self.owns.get_mut(&row) {
                Some(own) if own.epoch == 0 && epoch > 0 => {
                    own.epoch = epoch;
                    self.epoch = self.epoch.max(epoch);
                }
                _ => return constraint(format!("no ownership {row} without a mark")),
            },
            Change::DiskRename { row, disk, at } => {
                let Some(job) = self.owns.get(&row).map(|o| o.job) else { return constraint("no ownership") };
                self.name_free(job, &disk, Some(row))?;
                let own = self.owns.get_mut(&row).unwrap();
                (own.disk, own.at) = (disk, at);
            }
            Change::DiskEnd { row } => {
                if self.owns.remove(&row).is_none() {
                    return constraint(format!("no ownership {row}"));
                }
            }
            Change::MappingSet(mapping) => {
                self.volume(mapping.volume)?;
                self.used(3, mapping.row.0);
                if self.mappings.values().any(|m| m.row == mapping.row && m.volume != mapping.volume) {
                    return constraint(format!("mapping {} is another volume's", mapping.row));
                }
                self.mappings.insert(mapping.volume, mapping);
            }
            Change::MappingEnd { volume } => drop(self.mappings.remove(&volume)),
            Change::SnapshotAdd { row, volume, snapshot, name, size, created } => {
                self.volume(volume)?;
                let clash = |s: &Snap| {
                    let l = &s.loaded;
                    l.row == row || l.snapshot == snapshot || (l.volume == volume && l.name == name && !s.gone)
                };
                if self.snapshots.values().any(clash) {
                    return constraint(format!("snapshot {name} is there"));
                }
                self.used(5, row.0);
                let loaded = SnapshotLoaded { row, volume, snapshot, name, size, created };
                self.snapshots.insert(row, Snap { loaded, gone: false });
            }
            Change::SnapshotGone { row, .. } => match self.snapshots.get_mut(&row) {
                Some(snapshot) => snapshot.gone = true,
                None => return constraint(format!("no snapshot {row}")),
            },
            Change::OpBegin(op) => {
                if self.ops.contains_key(&op.id) || op.volume.is_some_and(|v| !self.volumes.contains_key(&v)) {
                    return constraint(format!("operation {} twice, or of no volume", op.id));
                }
                self.used(4, op.id.0);
                self.ops.insert(op.id, *op);
            }
            Change::OpStep { id, step, detail } => match self.ops.get_mut(&id) {
                Some(op) if op.ended.is_none() => (op.step, op.detail) = (step, detail),
                _ => return constraint(format!("no operation {id}")),
            },
            Change::OpEnd { id, outcome, sentence, at } => match self.ops.get_mut(&id) {
                Some(op) if op.ended.is_none() => op.ended = Some((outcome, sentence, at)),
                _ => return constraint(format!("operation {id} is not there or has ended")),
            },
            Change::OpVolume { id, volume } => {
                self.volume(volume)?;
                match self.ops.get_mut(&id) {
                    Some(op) => op.volume = Some(volume),
                    None => return constraint(format!("no operation {id}")),
                }
            }
        }
        Ok(())
    }

    /// What a start finds.
    pub fn load(&self, record: RecordId, history: usize) -> Loaded {
        let r = self;
        let jobs: Vec<JobLoaded> = r.jobs.values().filter(|j| !j.forgotten).map(|j| j.loaded.clone()).collect();
        let disks = r
            .owns
            .iter()
            .map(|(row, own)| {
                let v = &r.volumes[&own.volume];
                DiskLoaded {
                    row: *row,
                    job: own.job,
                    disk: own.disk.clone(),
                    epoch: own.epoch,
                    at: own.at,
                    volume: own.volume,
                    name: v.name.clone(),
                    size: v.size,
                    serial: v.serial.clone(),
                    cloud_state: v.cloud_state.clone(),
                    device_id: v.device_id,
                    status: v.status,
                    status_at: v.status_at,
                    mapping: r.mappings.get(&own.volume).cloned(),
                }
            })
            .collect();
        let owned = |id: &VolumeId| r.owns.values().any(|o| o.volume == *id);
        let loose = r.volumes.iter().filter(|(id, v)| !v.gone && !owned(id)).map(|(id, _)| *id).collect();
        let ended: Vec<(OpRow, Option<JobId>)> = r
            .ops
            .values()
            .filter(|o| o.ended.is_some())
            .map(|o| (o.clone(), o.job.map(|row| r.jobs[&row].loaded.id.clone())))
            .collect();
        let skip = ended.len().saturating_sub(history);
        Loaded {
            record,
            jobs,
            disks,
            snapshots: r.snapshots.values().filter(|s| !s.gone).map(|s| s.loaded.clone()).collect(),
            loose,
            volume_rows: r.volumes.iter().map(|(id, v)| (*id, v.row)).collect(),
            unfinished: r.ops.values().filter(|o| o.ended.is_none()).cloned().collect(),
            history: ended.into_iter().skip(skip).collect(),
            next: Next {
                job: r.high[0] + 1,
                volume: r.high[1] + 1,
                disk: r.high[2] + 1,
                mapping: r.high[3] + 1,
                operation: r.high[4] + 1,
                snapshot: r.high[5] + 1,
                epoch: r.epoch + 1,
            },
        }
    }

    fn tables(&mut self) -> Record {
        let batches = std::mem::take(&mut self.batches);
        let tables = self.clone();
        self.batches = batches;
        tables
    }

    pub fn take(&mut self, batch: &[Change]) -> Result<(), StoreError> {
        // Tables share their structure: a batch that is refused half way leaves them as they were.
        let mut after = self.tables();
        for change in batch {
            after.apply(change)?;
        }
        after.batches = std::mem::take(&mut self.batches);
        after.batches.push(batch.to_vec());
        *self = after;
        Ok(())
    }
}

#[async_trait]
impl Store for Fake {
    async fn commit(&self, batch: Vec<Change>) -> Result<(), StoreError> {
        self.alive().await;
        let mut at = At::Other;
        let mut words = "commit".to_owned();
        for change in &batch {
            match change {
                Change::OpBegin(op) if op.ended.is_none() => {
                    at = At::Begin;
                    words = format!("begin {}", op.verb);
                }
                Change::OpEnd { id, outcome, .. } => {
                    at = At::End;
                    let verb = self.lab.state().record.ops.get(id).map_or(Verb::Set, |o| o.verb);
                    words = format!("end {verb} {}", outcome.as_str());
                }
                _ => {}
            }
        }
        let take = |lab: &Lab| {
            let outcome = lab.state().record.take(&batch);
            match &outcome {
                Ok(()) => lab.say(words.clone()),
                Err(error) => lab.say(format!("refused {words}: {error}")),
            }
            outcome
        };
        let failed = || Err(StoreError::Failed { words: "fake: disk I/O error".into() });
        let act = self.next(at);
        let broken = self.lab.state().record.broken;
        match act {
            None if broken => {
                self.lab.say(format!("broken {words}"));
                failed()
            }
            None => take(&self.lab),
            Some(Act::HoldBefore) => {
                self.lab.say(format!("held {words}"));
                self.pass(at).await;
                take(&self.lab)
            }
            Some(Act::HoldAfter) => {
                let outcome = take(&self.lab);
                self.pass(at).await;
                outcome
            }
            Some(Act::KillBefore) => {
                self.lab.kill();
                Fake::never().await
            }
            Some(Act::KillAfter) => {
                take(&self.lab)?;
                self.lab.kill();
                Fake::never().await
            }
            Some(_) => {
                self.lab.say(format!("failed {words}"));
                failed()
            }
        }
    }

    fn load(&self, history: usize) -> Result<Loaded, StoreError> {
        Ok(self.lab.state().record.load(self.lab.record_id(), history))
    }
}
