//! Reconciling, the part that looks: a round over everything, one volume, and the kernel's events.
//!
//! Nothing here starts anything that takes away (rule R10): it looks, records and publishes.

use std::collections::{BTreeSet, HashMap};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::Instant;

use super::Engine;
use super::core::Core;
use super::reconcile::{CloudView, Finding, Recorded, Rules, settle};
use super::volume::{Unmapped, facts, mapping_row, show_facts};
use super::world::{Component, Mapping, Volume, World};
use crate::cloud::{CloudError, CloudVolume, Survey};
use crate::devices::DevicesError;
use crate::error::Error;
use crate::failpoint;
use crate::model::{Disk, DiskRow, Status, Timestamp, VmId, VolumeId};
use crate::store::{Change, MappingRow};

/// What looking at one volume has found, not yet recorded.
struct Settled {
    before: Arc<Volume>,
    finding: Finding,
    seen: Option<CloudVolume>,
    mapping: Option<Arc<Mapping>>,
    changes: Vec<Change>,
}

/// How long a round waits for the cloud at least, however short the interval.
const LEAST_PATIENCE: Duration = Duration::from_secs(10);
/// Intervals without an answer of the cloud, after which its last one is no truth any more.
pub(super) const VIEW_LIVES: u32 = 3;

fn not_settled(volume: &Volume) -> Error {
    let why = volume.why.as_deref().unwrap_or("nobody can tell").into();
    Error::NotSettled { volume: volume.uuid, status: volume.base, why }
}

impl Engine {
    fn rules(&self) -> Rules {
        Rules { host: self.host, exact_size: self.exact_size }
    }

    /// How far apart two looks must be before a volume's absence is believed (row V6).
    pub(super) fn absence_gap(&self) -> Duration {
        if failpoint::hit("reconcile.no-gap") { Duration::ZERO } else { self.absence_gap }
    }

    /// Whether the credentials see our own VM: those that do not, see no volume either (row V6).
    pub(super) async fn sees_us(&self) -> bool {
        matches!(self.cloud.vm(self.host).await, Ok(Some(_)))
    }

    /// Whether an absence seen now is confirmed by an earlier one. An absence that means nothing is no look.
    fn absent(&self, volume: VolumeId, looked: Instant, sees_us: bool) -> CloudView<'static> {
        if !sees_us {
            return CloudView::Absent { confirmed: false };
        }
        // What was asked for at `looked` was so at some moment until now: the second look is asked for
        // a whole gap after the first one was answered, however late that was.
        let first = *self.core.lock().absent.entry(volume).or_insert_with(Instant::now);
        let confirmed = looked.saturating_duration_since(first) >= self.absence_gap() && looked > first;
        CloudView::Absent { confirmed }
    }

    /// Compares one volume's three views; `None` when nothing has changed.
    async fn compare(&self, before: Arc<Volume>, cloud: &CloudView<'_>, disks: &[Disk]) -> Option<Settled> {
        let candidates: Vec<Disk> = disks.iter().filter(|d| d.identity.names(before.uuid)).cloned().collect();
        let unmarked = match before.imported() {
            true => Some(self.unmarked(before.uuid, &candidates).await?),
            false => None,
        };
        let recorded = Recorded {
            status: before.base,
            vm: before.vm,
            mapped: before.mapping.as_ref().map(|m| m.incarnation),
            size: before.size,
            mark: self.mark(&before),
            unmarked,
        };
        let mut finding = settle(&recorded, cloud, &candidates, self.rules());
        if before.imported() {
            self.core.lock().imports.judged(before.row, finding.markable);
        }
        if finding.status == Status::Conflict {
            // Without a mapping nothing else ties these names to the volume.
            // Volumes that share a serial contend for the same disk.
            let mut core = self.core.lock();
            for disk in &candidates {
                core.contenders.entry(disk.name.clone()).or_default().insert(before.row);
            }
        }
        let mut mapping = None;
        if let Some(disk) = &finding.device {
            match self.map(&before, disk).await {
                Ok(made) => mapping = Some(made),
                Err(Unmapped::Devices(DevicesError::Gone { .. })) => return None,
                Err(error) => {
                    let status = match error {
                        Unmapped::Impostor(_) => Status::Conflict,
                        _ => Status::Unknown,
                    };
                    finding = Finding { status, device: None, why: Some(error.to_string()), ..finding };
                }
            }
        }
        let seen = match cloud {
            CloudView::Seen(seen) => Some((*seen).clone()),
            _ => None,
        };
        let same_facts = seen.as_ref().is_none_or(|seen| {
            let mut shown = (*before).clone();
            show_facts(&mut shown, seen);
            shown.size == before.size
                && shown.name == before.name
                && shown.cloud_state == before.cloud_state
                && shown.owner == before.owner
                && shown.device_id == before.device_id
        });
        let same_mapping = match (&before.mapping, &mapping) {
            (None, None) => true,
            (Some(a), Some(b)) => a.row == b.row && Arc::ptr_eq(&a.pin, &b.pin) && a.size == b.size,
            _ => false,
        };
        let same =
            finding.status == before.base && finding.vm == before.vm && finding.why.as_deref() == before.why.as_deref();
        let known = before.recorded == before.base || finding.status == Status::Unknown;
        if same && same_facts && same_mapping && known {
            return None;
        }
        let at = (self.clock)();
        let mut changes = Vec::new();
        if let Some(seen) = &seen
            && !same_facts
        {
            changes.push(facts(seen, &before.serial));
        }
        match (&mapping, finding.status) {
            // A commit that failed left the record without what the world shows.
            (Some(mapping), _) if !same_mapping || before.recorded != Status::Attached => {
                changes.push(Change::MappingSet(mapping_row(&before, mapping, self.host)))
            }
            (None, Status::Remote) if finding.vm != before.vm || before.recorded != Status::Remote => {
                if let Some(vm) = finding.vm {
                    let row = self.core.lock().next_mapping();
                    changes.push(Change::MappingSet(MappingRow { row, volume: before.uuid, vm, device: None, at }));
                }
            }
            (None, Status::Detached | Status::Missing | Status::Lost) if finding.status != before.recorded => {
                changes.push(Change::MappingEnd { volume: before.uuid });
            }
            _ => {}
        }
        // `unknown` for want of a look is not written over what the record knew.
        if finding.status != before.recorded && !(finding.status == Status::Unknown && seen.is_none()) {
            changes.push(Change::VolumeStatus { volume: before.uuid, status: finding.status, at });
        }
        Some(Settled { before, finding, seen, mapping, changes })
    }

    /// Records and publishes what was found, but for volumes that something has happened to since.
    async fn apply(&self, settled: Vec<Settled>) {
        if settled.is_empty() {
            return;
        }
        let still = |core: &Core, s: &Settled| {
            core.world.volumes.get(&s.before.row).is_some_and(|now| Arc::ptr_eq(now, &s.before))
        };
        let settled: Vec<Settled> = {
            let core = self.core.lock();
            settled.into_iter().filter(|s| still(&core, s)).collect()
        };
        let at = (self.clock)();
        let mut changes: Vec<Change> = settled.iter().flat_map(|s| s.changes.iter().cloned()).collect();
        changes.iter_mut().for_each(|change| change.date(at));
        let mut recorded = true;
        if !changes.is_empty() && self.truth.refusing().is_none() {
            let outcome = self.store.commit(changes).await;
            recorded = outcome.is_ok();
            let failed = outcome
                .err()
                .map(|e| Error::NotRecorded { what: "what reconciling found".into(), words: e.to_string() });
            self.store_health(failed.as_ref());
        }
        self.publish_at(at, |core, at| {
            for s in settled {
                match still(core, &s) {
                    true => core.show(s, recorded, at),
                    // Something has happened to it since, but the record has this now: the next look
                    // writes what is shown.
                    false if recorded => core.recorded(&s, at),
                    false => {}
                }
            }
        });
    }

    /// Looks at one volume: kernel at once, then the cloud, then both together.
    pub(super) async fn look_at(&self, row: DiskRow) {
        for _ in 0..3 {
            let Some(before) = self.idle(row) else { return };
            let Ok(disks) = self.candidates(before.uuid).await else { return };
            if before.mapping.as_ref().is_some_and(|m| !m.pin.alive()) {
                if let Some(s) = self.compare(before, &CloudView::Unseen, &disks).await {
                    self.apply(vec![s]).await;
                }
                continue;
            }
            let looked = Instant::now();
            let answer = self.cloud.find(before.uuid).await;
            let Ok(disks) = self.candidates(before.uuid).await else { return };
            let view = match &answer {
                Ok(Some(seen)) => {
                    self.held_against(std::slice::from_ref(seen));
                    self.core.lock().absent.remove(&before.uuid);
                    CloudView::Seen(seen)
                }
                Ok(None) => self.absent(before.uuid, looked, self.sees_us().await),
                Err(_) => CloudView::Unseen,
            };
            self.cloud_health(answer.as_ref().err());
            match self.compare(before.clone(), &view, &disks).await {
                None => return,
                Some(s) => self.apply(vec![s]).await,
            }
            if self.idle(row).is_none_or(|now| !Arc::ptr_eq(&now, &before)) {
                return;
            }
        }
    }

    /// The volume, if no operation is on it: an operation settles its volume itself.
    fn idle(&self, row: DiskRow) -> Option<Arc<Volume>> {
        self.world().volumes.get(&row).filter(|v| v.running.is_none()).cloned()
    }

    /// `reconcile` on a volume: looks until it is settled, twice where one look is not believed.
    pub(super) async fn settle_volume(&self, row: DiskRow) -> Result<(), Error> {
        self.settle_place(row).await?;
        self.settle_snapshots(&[row]).await
    }

    async fn settle_place(&self, row: DiskRow) -> Result<(), Error> {
        let this = |v: &Volume| v.row == row;
        // Its outcome is what the look finds.
        let _ = self.marking(this).await;
        self.look_at(row).await;
        let volume = self.world().volumes.get(&row).cloned().ok_or(Error::Departed)?;
        let waits_for_second_look =
            volume.base == Status::Unknown && self.core.lock().absent.contains_key(&volume.uuid);
        if waits_for_second_look {
            tokio::time::sleep(self.absence_gap()).await;
            self.look_at(row).await;
        }
        self.mark_imported(this, true);
        let marked = self.marking(this).await;
        let volume = self.world().volumes.get(&row).cloned().ok_or(Error::Departed)?;
        match volume.base {
            Status::Unknown | Status::Conflict if volume.running.is_none() => Err(match marked {
                Err(error) if volume.base == Status::Unknown => Error::NotSettled {
                    volume: volume.uuid,
                    status: volume.base,
                    why: format!("it was imported, and our mark could not be put on it: {error}"),
                },
                _ => not_settled(&volume),
            }),
            _ => Ok(()),
        }
    }

    /// `reconcile` at the root: success only if all is settled afterwards, or with a VM: if what is
    /// attached to it was told, and no volume of ours that may be there is in doubt.
    pub(super) async fn settle_all(&self, vm: Option<VmId>) -> Result<(), Error> {
        self.round().await?;
        let concerned = |v: &Volume| vm.is_none() || v.vm == vm;
        let waits_for_second_look = {
            let core = self.core.lock();
            let absent = |v: &Arc<Volume>| v.base == Status::Unknown && core.absent.contains_key(&v.uuid);
            core.world.volumes.values().any(|v| concerned(v) && absent(v))
        };
        if waits_for_second_look {
            tokio::time::sleep(self.absence_gap()).await;
            self.round().await?;
        }
        self.mark_imported(concerned, true);
        // Each volume says for itself whether it is settled now.
        let _ = self.marking(concerned).await;
        let rows: Vec<DiskRow> = self.world().volumes.values().filter(|v| concerned(v)).map(|v| v.row).collect();
        self.settle_snapshots(&rows).await?;
        let world = self.world();
        let doubt = |v: &&Arc<Volume>| v.running.is_none() && matches!(v.base, Status::Unknown | Status::Conflict);
        match world.volumes.values().filter(|v| concerned(v)).find(doubt) {
            Some(volume) => Err(not_settled(volume)),
            None => Ok(()),
        }
    }

    fn cloud_health(&self, failed: Option<&CloudError>) {
        let now = match (failed, self.contradicted()) {
            (_, Some(why)) => Component::Down(format!("this host is not proved: {why}").into()),
            (None, None) => Component::Ok,
            (Some(error), None) => Component::Degraded(error.to_string().into()),
        };
        if self.world().health.cloud != now {
            self.publish(|core, at| {
                core.world.health.cloud = now;
                core.world.health.at = at;
            });
        }
    }

    fn devices_health(&self, failed: Option<&DevicesError>) {
        let now = match failed {
            None => Component::Ok,
            Some(error) => Component::Down(error.to_string().into()),
        };
        if self.world().health.devices != now {
            self.publish(|core, at| {
                core.world.health.devices = now;
                core.world.health.at = at;
            });
        }
    }

    /// One round over everything: one survey, one scan, one commit, one publish.
    pub(super) async fn round(&self) -> Result<(), Error> {
        let _one_at_a_time = self.rounds.lock().await;
        let world = self.world();
        let looked = Instant::now();
        let fences = self.core.lock().late_twins((self.clock)());
        let survey = Survey { volumes: Vec::new(), vms: vec![self.host], record: Some(self.record), fences };
        // A cloud that keeps its answer for itself is away: `health` says so before the next round is due.
        // A short interval must not make a slow cloud look like a silent one.
        let patience = self.interval.max(LEAST_PATIENCE);
        let surveyed = tokio::time::timeout(patience, self.cloud.survey(&survey)).await;
        let mut answer = surveyed.unwrap_or_else(|_| {
            Err(CloudError::Unreachable { words: format!("no answer in {} s", patience.as_secs()) })
        });
        let mut unseen = BTreeSet::new();
        if let Ok(volumes) = &mut answer {
            self.ask_for_the_rest(&world, volumes, &mut unseen).await;
        }
        let disks = self.kernel(|devices| devices.disks()).await;
        if let Ok(volumes) = &answer {
            self.all_held_against(volumes);
        }
        if let (Ok(volumes), Ok(disks)) = (&answer, &disks) {
            self.seen_host(volumes, disks);
            *self.cloud_seen.lock() = looked;
        }
        self.cloud_health(answer.as_ref().err());
        self.devices_health(disks.as_ref().err());
        let disks = disks.map_err(|e| Error::CannotTell { why: e.to_string() })?;
        let by_id: Option<HashMap<VolumeId, &CloudVolume>> =
            answer.as_ref().ok().map(|v| v.iter().map(|c| (c.id, c)).collect());
        let mut by_volume: HashMap<VolumeId, Vec<Disk>> = HashMap::new();
        for disk in &disks {
            for volume in world.named_by(&disk.identity) {
                by_volume.entry(volume.uuid).or_default().push(disk.clone());
            }
        }
        let any_absent = by_id.as_ref().is_some_and(|map| world.by_uuid.keys().any(|volume| !map.contains_key(volume)));
        let sees_us = any_absent && self.sees_us().await;
        // Rule R3: what the cloud said once is not served for ever.
        let unseen_view = match self.cloud_seen.lock().elapsed() > self.interval * VIEW_LIVES {
            true => CloudView::Stale,
            false => CloudView::Unseen,
        };
        let mut settled = Vec::new();
        for before in world.volumes.values().filter(|v| v.running.is_none()) {
            let view = match &by_id {
                None => unseen_view.clone(),
                Some(map) => match map.get(&before.uuid) {
                    Some(seen) => CloudView::Seen(seen),
                    None if unseen.contains(&before.uuid) => CloudView::Unseen,
                    None => self.absent(before.uuid, looked, sees_us),
                },
            };
            let own = by_volume.get(&before.uuid).map_or(&[][..], Vec::as_slice);
            if let Some(s) = self.compare(before.clone(), &view, own).await {
                settled.push(s);
            }
        }
        if let Some(map) = &by_id {
            let mut core = self.core.lock();
            let Core { absent, world, .. } = &mut *core;
            absent.retain(|volume, _| !map.contains_key(volume) && world.by_uuid.contains_key(volume));
        }
        self.apply(settled).await;
        let answer = match answer {
            Ok(volumes) => {
                self.mark_imported(|_| true, false);
                Some(volumes)
            }
            Err(error) => {
                self.publish(|core, at| core.age_views(at, self.interval));
                return Err(Error::CloudUnreachable { what: "reconciling".into(), words: error.to_string() });
            }
        };
        let host = self.host;
        let record = self.record;
        // A survey of its own: what fails for another VM says nothing about our volumes.
        let on_vms = self.on_named_vms(&world).await;
        let listed = on_vms.as_ref().map(|_| ()).map_err(|e| Error::CloudUnreachable {
            what: "listing the volumes of other VMs".into(),
            words: e.to_string(),
        });
        self.publish(|core, at| {
            core.world.counters.reconciles += 1;
            core.world.health.reconciler = Component::Ok;
            let mut volumes = answer.unwrap_or_default();
            match on_vms {
                Ok((told, on_vms)) => {
                    core.show_vms(&told, &on_vms, at);
                    let known: BTreeSet<VolumeId> = volumes.iter().map(|v| v.id).collect();
                    volumes.extend(on_vms.into_iter().filter(|v| !known.contains(&v.id)));
                }
                Err(error) => tracing::warn!("the volumes of other VMs could not be listed: {error}"),
            }
            core.show_unclaimed(volumes, &disks, host, record, at);
            core.age_views(at, self.interval);
        });
        listed
    }

    /// Volumes that carry no mark of ours any more, or are in no job: asked for together, and one by
    /// one where that fails, so that one the cloud cannot tell of hides no other.
    async fn ask_for_the_rest(&self, world: &World, volumes: &mut Vec<CloudVolume>, unseen: &mut BTreeSet<VolumeId>) {
        let seen: BTreeSet<VolumeId> = volumes.iter().map(|v| v.id).collect();
        let loose: Vec<VolumeId> = self.core.lock().loose.iter().copied().collect();
        let rest: Vec<VolumeId> = world.by_uuid.keys().copied().chain(loose).filter(|v| !seen.contains(v)).collect();
        if rest.is_empty() {
            return;
        }
        let survey = Survey { volumes: rest.clone(), ..Survey::default() };
        match self.cloud.survey(&survey).await {
            Ok(found) => return volumes.extend(found),
            Err(error) => tracing::debug!("{} volumes are asked for one by one: {error}", rest.len()),
        }
        for volume in rest {
            match self.cloud.find(volume).await {
                Ok(found) => volumes.extend(found),
                Err(error) => {
                    tracing::warn!(%volume, "the cloud does not tell: {error}");
                    unseen.insert(volume);
                }
            }
        }
    }

    /// Rounds at start, when asked, and every interval; ends when the engine shuts down.
    pub(super) async fn rounds(self: Arc<Self>) {
        loop {
            // A defect in one round ends neither the daemon nor reconciling: `health` says that there was one.
            let round = async {
                let outcome = self.round().await;
                self.look_at_next_snapshots().await;
                outcome
            };
            match AssertUnwindSafe(round).catch_unwind().await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!("reconcile round: {error}"),
                Err(_) => {
                    tracing::error!("reconcile round: a defect stopped it");
                    self.publish(|core, at| {
                        core.world.health.reconciler =
                            Component::Degraded("a defect stopped a round: see the log".into());
                        core.world.health.at = at;
                    });
                }
            }
            self.rounds_ended.send_modify(|ended| *ended += 1);
            let second_look = self.core.lock().absent.values().min().copied();
            let gap = self.absence_gap() + Duration::from_millis(100);
            let pause = match second_look {
                Some(first) if first.elapsed() < gap => self.interval.min(gap),
                _ => self.interval,
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.round_wanted.notified() => {}
                () = self.closing.notified() => return,
            }
        }
    }

    /// Follows the kernel's events: a volume whose disk came, changed or went is looked at at once.
    pub(super) async fn follow(self: Arc<Self>) {
        use tokio::sync::broadcast::error::RecvError;
        let mut changes = self.devices.changes();
        loop {
            match changes.recv().await {
                Ok(change) if &*change.name == "*" => self.round_wanted.notify_one(),
                Ok(change) => self.changed(&change.name).await,
                Err(RecvError::Lagged(_)) => self.round_wanted.notify_one(),
                Err(RecvError::Closed) => {
                    let words = "the kernel's events ended: changes are seen at the interval only";
                    self.publish(|core, at| {
                        core.world.health.devices = Component::Degraded(words.into());
                        core.world.health.at = at;
                    });
                    return;
                }
            }
        }
    }

    async fn changed(self: &Arc<Self>, name: &Arc<str>) {
        let world = self.world();
        let asked = name.clone();
        let disk = match self.kernel(move |devices| devices.disk(&asked)).await {
            Ok(disk) => disk,
            Err(error) => {
                tracing::debug!(%name, "a changed device could not be looked at: {error}");
                None
            }
        };
        let mut rows = BTreeSet::new();
        rows.extend(world.by_device.get(name).copied());
        rows.extend(self.core.lock().contenders.remove(name).unwrap_or_default());
        if let Some(disk) = &disk {
            let mapped = |v: &Volume| {
                v.mapping.as_ref().is_some_and(|m| m.incarnation == disk.incarnation && m.size == disk.size)
            };
            rows.extend(world.named_by(&disk.identity).filter(|v| !mapped(v)).map(|v| v.row));
        }
        for row in rows {
            self.look_soon(row);
        }
    }

    /// One look at a time a volume, and one more if something happened during it: however fast
    /// devices come and go on this machine, looks do not pile up.
    fn look_soon(self: &Arc<Self>, row: DiskRow) {
        if self.idle(row).is_none() || self.core.lock().looking.insert(row, true).is_some() {
            return;
        }
        let engine = self.clone();
        self.runtime.spawn(async move {
            loop {
                if let Some(again) = engine.core.lock().looking.get_mut(&row) {
                    *again = false;
                }
                engine.look_at(row).await;
                let mut core = engine.core.lock();
                if core.looking.get(&row) != Some(&true) {
                    core.looking.remove(&row);
                    return;
                }
            }
        });
    }
}

impl Core {
    /// What the record has of a volume, where something else is shown of it.
    fn recorded(&mut self, s: &Settled, at: Timestamp) {
        if s.changes.iter().any(|c| matches!(c, Change::VolumeStatus { .. })) {
            self.with_volume(s.before.row, at, |v| v.recorded = s.finding.status);
        }
    }

    fn show(&mut self, s: Settled, recorded: bool, at: Timestamp) {
        let Settled { before, finding, seen, mapping, changes } = s;
        if finding.drift {
            self.world.counters.drift += 1;
            tracing::warn!(volume = %before.uuid, from = %before.base, to = %finding.status,
                "changed behind volfs's back: {}", finding.why.as_deref().unwrap_or("no reason known"));
            let fields = serde_json::json!({"event": "drift", "volume": before.uuid, "disk": before.disk.as_str(),
                "from": before.base.as_str(), "to": finding.status.as_str()});
            self.event(Some(before.job), fields);
        }
        if let Some(old) = &before.mapping
            && mapping.as_ref().is_none_or(|new| !Arc::ptr_eq(&new.pin, &old.pin))
        {
            self.released.push(old.pin.clone());
        }
        let status_recorded = changes.iter().any(|c| matches!(c, Change::VolumeStatus { .. })) && recorded;
        self.with_volume(before.row, at, |v| {
            if let Some(seen) = &seen {
                show_facts(v, seen);
            }
            v.base = finding.status;
            v.vm = finding.vm;
            v.why = finding.why.map(Into::into);
            if let Some(disk) = &finding.device {
                v.serial = disk.identity.text().into();
            }
            v.mapping = mapping;
            if status_recorded {
                v.recorded = finding.status;
            }
        });
    }
}
