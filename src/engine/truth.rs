//! Is this record the last word on its volumes? A copy that was put back, or a second one of the
//! same record, shows by the marks: one of them carries an epoch that this record never gave.
//!
//! What is found once holds for as long as the daemon runs: every changing command is EROFS from then
//! on. Nothing is changed before somebody has looked.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Engine;
use super::core::Core;
use super::inflight::Live;
use super::operation::{Fail, cloud_fail};
use super::world::Component;
use super::{Action, Target};
use crate::cloud::{CloudVolume, Survey};
use crate::error::Error;
use crate::model::{Status, VolumeId};

/// What is known of it.
#[derive(Debug, Default)]
pub(super) struct Truth {
    /// Why every changing command is refused, if it is. Never taken back.
    refusing: OnceLock<Arc<str>>,
    /// The reason is that the record is a copy, and not only that somebody wants nothing changed.
    copy: AtomicBool,
    /// All marks of this record were looked at since the start.
    looked: AtomicBool,
    /// One first look serves all that wait for it: after a crash, every operation that was in flight.
    first_look: tokio::sync::Mutex<()>,
}

impl Truth {
    /// As the daemon was started: refusing or not, because the record is a copy or not.
    pub(super) fn new(refusing: Option<Arc<str>>, copy: bool) -> Self {
        let truth = Truth { copy: AtomicBool::new(copy), ..Truth::default() };
        if let Some(why) = refusing {
            // It was empty until now.
            let _ = truth.refusing.set(why);
        }
        truth
    }

    /// Why nothing is changed, if so.
    pub(super) fn refusing(&self) -> Option<&Arc<str>> {
        self.refusing.get()
    }

    /// What `health` says of a record that works: it may be a copy all the same.
    pub(super) fn health(&self) -> Component {
        match self.refusing() {
            Some(why) if self.copy.load(Ordering::SeqCst) => Component::Down(why.clone()),
            _ => Component::Ok,
        }
    }
}

impl Core {
    /// The mark among these that this record never gave, in words. Until all marks were looked at,
    /// whatever has begun since the start waits for that, and none of its epochs is on a volume.
    fn not_given(&self, volumes: &[CloudVolume], looked: bool) -> Option<String> {
        let first = if looked { self.next.epoch } else { self.first_epoch };
        let ours = volumes.iter().filter_map(|v| Some((v.id, v.mark.filter(|m| m.record == self.world.record)?)));
        ours.filter(|(volume, mark)| mark.epoch >= first || self.overtaken(*volume, mark.epoch))
            .map(|(volume, mark)| format!("volume {volume} carries the mark {mark}, which this record never gave it"))
            .next()
    }

    /// Whether a volume of ours, with nothing in flight, carries a later mark than the record's, of an
    /// epoch that was given since the start, but not to it: no operation that ended without success can
    /// have left it there. Marks from before the start were judged by then.
    fn overtaken(&self, volume: VolumeId, epoch: u64) -> bool {
        let owned = self.world.by_uuid.get(&volume).and_then(|row| self.world.volumes.get(row));
        epoch >= self.first_epoch
            && owned.is_some_and(|v| v.running.is_none() && epoch > v.epoch)
            && !self.spent.contains(&epoch)
    }
}

impl Engine {
    /// Holds what the cloud has shown against what this record gave; refuses everything from now on
    /// if it is not the last word.
    pub(super) fn held_against(&self, volumes: &[CloudVolume]) {
        if self.truth.refusing().is_some() {
            return;
        }
        let looked = self.truth.looked.load(Ordering::SeqCst);
        let Some(found) = self.core.lock().not_given(volumes, looked) else { return };
        let why: Arc<str> = format!(
            "the record is older than its volumes: {found}. It is a copy that was put back, or another volfs works \
             with one. `volfs adopt --this-host` if this one goes on with its volumes, and no other volfs does; \
             `volfs adopt --new` if another one does: this one then owns nothing"
        )
        .into();
        if self.truth.refusing.set(why.clone()).is_err() {
            return;
        }
        self.truth.copy.store(true, Ordering::SeqCst);
        tracing::error!("{why}; nothing is changed from now on");
        self.publish(|core, at| {
            core.world.read_only = Some(why.clone());
            core.world.health.store = Component::Down(why.clone());
            core.world.health.at = at;
        });
    }

    /// As [`Engine::held_against`], where all marks of this record were asked for.
    pub(super) fn all_held_against(&self, volumes: &[CloudVolume]) {
        self.held_against(volumes);
        self.truth.looked.store(true, Ordering::SeqCst);
    }

    /// Why nothing may be changed, as a failure of what is in flight.
    pub(super) fn refusing(&self) -> Result<(), Fail> {
        match self.truth.refusing() {
            Some(why) => Err(Fail::clean(Error::ReadOnly { why: why.to_string() })),
            None => Ok(()),
        }
    }

    /// Goes on only by a record that is the last word; looks if nobody has. Giving up what nobody can
    /// see asks nobody, and touches nothing outside the record (row X8).
    pub(super) async fn on_true_record(&self, live: &Live) -> Result<(), Fail> {
        let blind = |row| {
            let unseen = |s| matches!(s, Status::Unknown | Status::Missing | Status::Conflict);
            self.world().volumes.get(row).is_some_and(|v| unseen(v.base))
        };
        let asks_nobody =
            matches!((&live.target, &live.action), (Target::Volume(row), Action::Release { .. }) if blind(row));
        if !asks_nobody && !self.truth.looked.load(Ordering::SeqCst) {
            let _one = self.truth.first_look.lock().await;
            if self.truth.looked.load(Ordering::SeqCst) {
                return self.refusing();
            }
            let survey = Survey { record: Some(self.record), ..Survey::default() };
            let seen = self.cloud.survey(&survey).await.map_err(|error| {
                Fail::clean(
                    cloud_fail("looking for later marks of this record", None, None, self.about.name, error).error,
                )
            })?;
            self.all_held_against(&seen);
        }
        self.refusing()
    }
}
