//! Imported volumes: a job has them in the record, and none carries a mark of ours yet.
//!
//! ```text
//! epoch 0, `unknown` ── a look shows it ──► no mark, or one that we left there: `claim` by volfs itself
//!                            │                 journal (with the epoch) ─► tag if none ─► look ─► record
//!                            ├── another's mark, or it carries this host: `conflict`, nothing is called
//!                            └── absent twice: `missing`
//! ```
//! Until the record has the epoch, no verb changes such a volume: its mark never equals the record's.
//! Two hosts that import one volume both try, and the tag is there once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::core::Core;
use super::inflight::Live;
use super::operation::{Acted, Done, Fail, LOOK_AGAIN, cloud_fail};
use super::reconcile::Unmarked;
use super::volume::{facts, show_facts};
use super::world::Volume;
use super::{Engine, Target};
use crate::cloud::{CloudVolume, Label};
use crate::command::Action;
use crate::error::Error;
use crate::failpoint;
use crate::model::{Caller, Disk, DiskRow, Fence, Mark, Outcome, Verb, VolumeId};
use crate::store::Change;

/// How long rounds leave a volume alone after its marking failed: twice as long each time.
const AGAIN_FIRST: Duration = Duration::from_secs(30);
const AGAIN_LONGEST: Duration = Duration::from_secs(3600);

/// What is remembered of imported volumes.
#[derive(Debug, Default)]
pub(super) struct Imports {
    /// At the last look nothing was in the way of our mark.
    markable: BTreeSet<DiskRow>,
    tries: BTreeMap<VolumeId, Tries>,
}

/// Operations that were to mark a volume, and did not end as done.
#[derive(Debug, Default)]
struct Tries {
    /// One of these may be on it all the same.
    epochs: BTreeSet<u64>,
    failed: u32,
    not_before: Option<Instant>,
}

impl Imports {
    /// Whether the last look at a volume leaves it to be marked.
    pub fn judged(&mut self, row: DiskRow, markable: bool) {
        match markable {
            true => drop(self.markable.insert(row)),
            false => drop(self.markable.remove(&row)),
        }
    }

    /// An operation of an earlier daemon.
    pub fn tried(&mut self, volume: VolumeId, epoch: u64, outcome: Outcome) {
        if outcome != Outcome::Done && epoch > 0 {
            self.tries.entry(volume).or_default().epochs.insert(epoch);
        }
    }

    /// An operation of this daemon has ended.
    pub fn ended(&mut self, volume: VolumeId, epoch: u64, outcome: Outcome) {
        if outcome == Outcome::Done {
            self.tries.remove(&volume);
            return;
        }
        self.tried(volume, epoch, outcome);
        // A crash is no answer of the cloud.
        if outcome == Outcome::Interrupted {
            return;
        }
        if let Some(tries) = self.tries.get_mut(&volume) {
            let pause = AGAIN_FIRST * 2u32.saturating_pow(tries.failed.min(16));
            tries.not_before = Some(Instant::now() + pause.min(AGAIN_LONGEST));
            tries.failed += 1;
        }
    }

    fn due(&self, volume: VolumeId) -> bool {
        self.tries.get(&volume).and_then(|t| t.not_before).is_none_or(|at| at <= Instant::now())
    }
}

impl Volume {
    /// It was imported, and no mark of ours is known to be on it.
    pub fn imported(&self) -> bool {
        self.epoch == 0
    }
}

impl Core {
    fn unmarkable(&mut self, volume: VolumeId) {
        if let Some(row) = self.world.by_uuid.get(&volume).copied() {
            self.imports.judged(row, false);
        }
    }

    fn to_mark(&self, concerned: &impl Fn(&Volume) -> bool, at_once: bool) -> Vec<Arc<Volume>> {
        let volumes = self.imports.markable.iter().filter_map(|row| self.world.volumes.get(row));
        volumes
            .filter(|v| v.imported() && v.running.is_none() && concerned(v))
            .filter(|v| at_once || self.imports.due(v.uuid))
            .cloned()
            .collect()
    }
}

impl Engine {
    /// What a look at an imported volume is held against.
    pub(super) async fn unmarked(&self, volume: VolumeId, candidates: &[Disk]) -> Option<Unmarked> {
        let tried = {
            let core = self.core.lock();
            core.imports.tries.get(&volume).map(|t| t.epochs.iter().copied().collect()).unwrap_or_default()
        };
        match self.carries_host(candidates).await {
            Ok(carries_host) => Some(Unmarked { tried, carries_host }),
            Err(fail) => {
                tracing::warn!(%volume, "whether it carries this host is not known: {}", fail.error);
                self.core.lock().unmarkable(volume);
                None
            }
        }
    }

    /// Why one of these disks carries this host, if one does.
    pub(super) async fn carries_host(&self, disks: &[Disk]) -> Result<Option<String>, Fail> {
        for disk in disks {
            let disk = disk.clone();
            let asked = self.kernel(move |devices| devices.carries_host(&disk)).await;
            let why = asked.map_err(|e| Fail::clean(Error::CannotTell { why: e.to_string() }))?;
            if why.is_some() {
                return Ok(why);
            }
        }
        Ok(None)
    }

    /// Begins to mark those that a look has left to it; rounds leave out what failed a short time ago.
    pub(super) fn mark_imported(&self, concerned: impl Fn(&Volume) -> bool, at_once: bool) {
        let Some(engine) = self.me.upgrade() else { return };
        if self.changing().is_err() || self.contradicted().is_some() {
            return;
        }
        if self.core.lock().to_mark(&concerned, at_once).is_empty() {
            return;
        }
        let caller = Arc::new(Caller::daemon());
        let begun = self.publish(|core, at| {
            let volumes = core.to_mark(&concerned, at_once);
            let begin = |v: Arc<Volume>| {
                core.imports.markable.remove(&v.row);
                let action = Action::Claim { volume: v.uuid, disk: Some(v.disk.clone()), from: None };
                core.begin(Target::Volume(v.row), action, caller.clone(), Fence::random(), None, at)
            };
            volumes.into_iter().map(begin).collect::<Vec<_>>()
        });
        for live in begun {
            self.runtime.spawn(engine.clone().drive(live));
        }
    }

    /// Waits for the marking that is in flight; the first failure among them.
    pub(super) async fn marking(&self, concerned: impl Fn(&Volume) -> bool) -> Result<(), Error> {
        let tickets: Vec<_> = {
            let core = self.core.lock();
            let of = |live: &&Live| match live.target {
                Target::Volume(row) if live.action.verb() == Verb::Claim => {
                    core.world.volumes.get(&row).is_some_and(|v| concerned(v))
                }
                _ => false,
            };
            core.live.values().filter(of).map(|live| live.ticket.clone()).collect()
        };
        let mut outcome = Ok(());
        for ticket in tickets {
            outcome = outcome.and(ticket.wait().await);
        }
        outcome
    }

    /// Puts our mark on an imported volume that carries none, or one that an earlier try left there.
    pub(super) async fn claim_imported(self: &Arc<Self>, live: &Live, row: DiskRow) -> Acted {
        let volume = self.owned(row)?;
        let what = format!("claim of volume {}, which was imported", volume.uuid);
        if !volume.imported() {
            return Err(Fail::clean(Error::LeftBehind { what }));
        }
        let job = self.job_of(volume.job)?;
        let mark = Mark { record: self.record, epoch: live.epoch };
        self.step(live, "look at the volume in the cloud")?;
        let find = || self.cloud.find(volume.uuid);
        let seen = self.patiently(live, &what, Some(volume.uuid), find).await.map_err(|f| Fail::clean(f.error))?;
        let Some(seen) = seen else { return Err(Fail::clean(Error::NoSuchVolume { volume: volume.uuid })) };
        self.held_against(std::slice::from_ref(&seen));
        self.refusing()?;
        let candidates =
            self.candidates(volume.uuid).await.map_err(|e| Fail::clean(Error::CannotTell { why: e.to_string() }))?;
        let carries = match seen.carries_host.clone() {
            Some(why) => Some(why),
            None => self.carries_host(&candidates).await?,
        };
        if let Some(why) = carries {
            return Err(Fail::clean(Error::Protected { volume: volume.uuid, why }));
        }
        let left = |m: &Mark| {
            let core = self.core.lock();
            core.imports.tries.get(&volume.uuid).is_some_and(|t| t.epochs.contains(&m.epoch))
        };
        match seen.mark {
            Some(found) if found == mark => {}
            // It was there when recovery looked.
            _ if live.recovering => return Err(Fail::ambiguous(Error::LeftBehind { what })),
            Some(found) if found.record == self.record && !left(&found) => {
                let why = format!("it was imported, and carries the mark {found} from before");
                return Err(Fail::clean(Error::Contradiction { volume: volume.uuid, why }));
            }
            Some(found) if found.record != self.record => {
                let owner = found.to_string();
                return Err(Fail::clean(Error::OwnedByRecord { volume: volume.uuid, owner }));
            }
            Some(_) | None => {}
        }
        let label = Label { mark, job, disk: volume.disk.clone() };
        self.step(live, "put our mark on it")?;
        failpoint::reach("imported.before-mark").await;
        self.set_mark(live, &what, volume.uuid, seen.mark, Some(&label)).await?;
        failpoint::reach("imported.after-mark").await;
        let seen = self.see_mark(&volume, mark, &what).await?;
        Ok(Done {
            changes: vec![Change::DiskMarked { row, epoch: mark.epoch }, facts(&seen, &volume.serial)],
            note: "it was imported".into(),
            look: Some(row),
            apply: Some(Box::new(move |core, at| {
                core.with_volume(row, at, |v| {
                    v.epoch = mark.epoch;
                    show_facts(v, &seen);
                    v.why = Some("it was just claimed".into());
                });
            })),
        })
    }

    /// The volume with our new mark, once the cloud shows it: its books may lag behind.
    async fn see_mark(&self, volume: &Volume, mark: Mark, what: &str) -> Result<CloudVolume, Fail> {
        let began = Instant::now();
        loop {
            let looked = self.cloud.find(volume.uuid).await;
            let looked = looked.map_err(|error| {
                Fail::ambiguous(cloud_fail(what, Some(volume.uuid), None, self.about.name, error).error)
            })?;
            match looked {
                Some(seen) if mark.is_on(seen.mark) => return Ok(seen),
                Some(_) if began.elapsed() < self.about.late => tokio::time::sleep(LOOK_AGAIN).await,
                Some(seen) => {
                    let found = seen.mark.map_or_else(|| "nobody's".into(), |m| m.to_string());
                    let expected = mark.to_string();
                    return Err(Fail::ambiguous(Error::NotOurs { volume: volume.uuid, found, expected }));
                }
                None => return Err(Fail::ambiguous(Error::NoSuchVolume { volume: volume.uuid })),
            }
        }
    }
}
