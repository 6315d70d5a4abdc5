//! Looks before calls, and calls said again: what every step that changes a volume goes through.

use std::time::Duration;

use super::Engine;
use super::inflight::Live;
use super::operation::{Fail, LOOK_AGAIN, changed, cloud_fail, may_change};
use super::world::Volume;
use crate::cloud::{Call, CloudError, CloudVolume, Refusal};
use crate::error::Error;
use crate::model::VolumeId;

/// The first pause before the cloud is asked again what it shows after a call.
const LAG: Duration = Duration::from_millis(50);
/// First and longest pause before a passing refusal is tried again.
pub(super) const PASSING_FIRST: Duration = Duration::from_millis(250);
pub(super) const PASSING_LONGEST: Duration = Duration::from_secs(10);
/// How long a passing refusal is retried in all.
const PASSING_IN_ALL: Duration = Duration::from_secs(300);

impl Engine {
    /// Looks at the volume in the cloud, and goes on only if it carries our mark: in the same
    /// answer that shows its state, directly before the call (contract, Ownership).
    pub(super) async fn look_ours(&self, volume: &Volume, what: &str) -> Result<CloudVolume, Fail> {
        // Looking changes nothing, however it fails.
        let looked = self.cloud.find(volume.uuid).await;
        let looked = looked
            .map_err(|error| Fail::clean(cloud_fail(what, Some(volume.uuid), None, self.about.name, error).error))?;
        self.ours(volume, looked)
    }

    /// The same after a call that changed something: until the cloud shows it `so`, for as long as an
    /// answer may come from a copy of its books that lags behind.
    pub(super) async fn look_until(
        &self,
        volume: &Volume,
        what: &str,
        so: impl Fn(&CloudVolume) -> bool,
    ) -> Result<CloudVolume, Fail> {
        let began = tokio::time::Instant::now();
        let mut pause = LAG;
        loop {
            let seen = self.look_ours(volume, what).await.map_err(|f| Fail::ambiguous(f.error))?;
            if so(&seen) || began.elapsed() >= self.about.late {
                return Ok(seen);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOOK_AGAIN);
        }
    }

    /// The same before a call that changes something: a job of the cloud that is still pending on the
    /// volume is waited for, so that there is never more than one, and none comes late.
    pub(super) async fn look_before(&self, live: &Live, volume: &Volume, what: &str) -> Result<CloudVolume, Fail> {
        self.guarded(live, volume, what, None, |seen| async { Ok(seen) }).await.map_err(|fail| Fail::clean(fail.error))
    }

    /// A call that changes a volume. Before each try, the tries after a passing refusal among them,
    /// the volume is looked at, and the call made only if it carries our mark and nothing is pending
    /// on it; `fresh` is a look from directly before the first one.
    pub(super) async fn guarded<T, F>(
        &self,
        live: &Live,
        volume: &Volume,
        what: &str,
        fresh: Option<CloudVolume>,
        call: impl Fn(CloudVolume) -> F,
    ) -> Result<T, Fail>
    where
        F: Future<Output = Result<T, CloudError>>,
    {
        let fresh = parking_lot::Mutex::new(fresh);
        let expected = self.mark(volume);
        // The inner failure is our own: it was stopped, or abandoned, during the look.
        let attempt = || async {
            let looked = fresh.lock().take();
            let seen = match looked {
                Some(seen) => Some(seen),
                None => self.cloud.find(volume.uuid).await?,
            };
            if let Some(seen) = &seen {
                self.held_against(std::slice::from_ref(seen));
            }
            let seen = may_change(seen, expected)?;
            if live.stopping() {
                return Ok(Err(Fail::clean(Error::Cancelled)));
            }
            call(seen).await.map(Ok)
        };
        let answer = self.retrying(live, what, attempt).await;
        // A record that is found out is the reason, whatever its mark was compared with.
        match (answer, self.refusing()) {
            (Ok(done), _) => done,
            (Err(CloudError::Refused { .. }), Err(stale)) => Err(stale),
            (Err(error), _) => Err(cloud_fail(what, Some(volume.uuid), Some(expected), self.about.name, error)),
        }
    }

    /// Looks after a call that got no clear answer: not before the cloud's job on the volume is final,
    /// because until then no look is the call's outcome. An operation that was asked to stop gets none.
    pub(super) async fn look_after(&self, live: &Live, volume: VolumeId) -> Result<Option<CloudVolume>, CloudError> {
        loop {
            let looked = self.cloud.find(volume).await?;
            let pending = match &looked {
                Some(seen) => seen.pending.clone(),
                // A volume that is not there shows no job: it is asked for by the operation's own identity.
                None => self.cloud.running(live.fence).await?,
            };
            let Some(job) = pending else { return Ok(looked) };
            let words = format!("no clear answer: the cloud's job {job} is still pending");
            if live.stopping() {
                return Err(CloudError::Ambiguous { words });
            }
            self.publish(|core, _| core.step(live.id, &words));
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// A volume as seen, if it is one that this record may change.
    fn ours(&self, volume: &Volume, seen: Option<CloudVolume>) -> Result<CloudVolume, Fail> {
        let Some(seen) = seen else {
            return Err(Fail::clean(Error::NoSuchVolume { volume: volume.uuid }));
        };
        self.held_against(std::slice::from_ref(&seen));
        self.refusing()?;
        if let Some(why) = &seen.carries_host {
            return Err(Fail::clean(Error::Protected { volume: volume.uuid, why: why.clone() }));
        }
        let expected = self.mark(volume);
        if !expected.is_on(seen.mark) {
            let found = seen.mark.map_or_else(|| "nobody's".into(), |m| m.to_string());
            return Err(Fail::clean(Error::NotOurs { volume: volume.uuid, found, expected: expected.to_string() }));
        }
        Ok(seen)
    }

    /// Calls the cloud, and again while it refuses with what passes by itself; says so meanwhile.
    pub(super) async fn retrying<T, F>(&self, live: &Live, what: &str, call: impl Fn() -> F) -> Result<T, CloudError>
    where
        F: Future<Output = Result<T, CloudError>>,
    {
        let began = tokio::time::Instant::now();
        let mut pause = PASSING_FIRST;
        loop {
            match call().await {
                Err(error @ CloudError::Refused { why: Refusal::Passing, .. })
                    if began.elapsed() < PASSING_IN_ALL && !live.stopping() =>
                {
                    let words = error.to_string();
                    tracing::info!(what, "the cloud refuses for now: {words}");
                    self.publish(|core, _| {
                        core.step(live.id, &format!("the cloud refuses for now, tried again: {words}"))
                    });
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PASSING_LONGEST);
                    if live.stopping() {
                        return Err(error);
                    }
                }
                answer => return answer,
            }
        }
    }

    /// As [`Engine::retrying`], with the error in words of the contract.
    pub(super) async fn patiently<T, F>(
        &self,
        live: &Live,
        what: &str,
        volume: Option<VolumeId>,
        call: impl Fn() -> F,
    ) -> Result<T, Fail>
    where
        F: Future<Output = Result<T, CloudError>>,
    {
        let answer = self.retrying(live, what, call).await;
        answer.map_err(|error| cloud_fail(what, volume, None, self.about.name, error))
    }

    /// Runs a call that is to bring a volume's disk here, or to take it away: as soon as the kernel
    /// shows that, the cloud is asked at once.
    pub(super) async fn watched<T>(
        &self,
        call: &Call,
        volume: VolumeId,
        here: bool,
        run: impl Future<Output = T>,
    ) -> T {
        let mut changes = self.devices.changes();
        let watch = async {
            loop {
                changed(&mut changes).await;
                if self.candidates(volume).await.is_ok_and(|disks| disks.is_empty() != here) {
                    call.hurry();
                }
            }
        };
        tokio::select! {
            answer = run => answer,
            () = watch => unreachable!("a watch never ends"),
        }
    }
}
