//! The cloud: calls become jobs that act at once, later, or after their caller has given up or died.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::oneshot;

use super::{Fault, Point, Port, Sim, Vol};
use crate::cloud::{
    About, Attachment, Call, Cloud, CloudError, CloudVolume, Label, NewVolume, Refusal, Survey, VmFacts,
};
use crate::model::{Fence, Mark, Slot, Timestamp, VmId, VolumeId};

/// What a call asks of the cloud.
#[derive(Debug, Clone)]
pub enum Do {
    Create { size: u64, mark: Mark },
    Attach { vm: VmId, slot: u32 },
    Detach { vm: VmId },
    Resize { size: u64 },
    Delete,
    Mark { expect: Option<Mark>, new: Option<Mark> },
}

impl Do {
    pub fn point(&self) -> Point {
        match self {
            Do::Create { .. } => Point::Create,
            Do::Attach { .. } => Point::Attach,
            Do::Detach { .. } => Point::Detach,
            Do::Resize { .. } => Point::Resize,
            Do::Delete => Point::Delete,
            Do::Mark { .. } => Point::Mark,
        }
    }
}

/// What it answers.
type Answer = Result<Option<VolumeId>, CloudError>;

fn refused<T>(why: Refusal, words: &str) -> Result<T, CloudError> {
    Err(CloudError::Refused { why, words: format!("simulated: {words}") })
}

fn unclear<T>() -> Result<T, CloudError> {
    Err(CloudError::Ambiguous { words: "simulated: no answer".into() })
}

fn shown(id: VolumeId, v: &Vol) -> CloudVolume {
    CloudVolume {
        id,
        name: "v".into(),
        size: v.size,
        state: "Ready".into(),
        attached: v.attached.map(|(vm, id)| Attachment { vm, device_id: Some(id) }),
        mark: v.mark,
        carries_host: None,
        pending: v.pending.map(|job| format!("job-{job}")),
    }
}

impl Sim {
    pub fn shown(&self, volume: VolumeId) -> Option<CloudVolume> {
        self.state().sky.volumes.get(&volume).map(|v| shown(volume, v))
    }

    /// Does it, now. What changes is in the book; what is so already is success.
    fn effect(&self, fence: Fence, volume: Option<VolumeId>, what: &Do) -> Answer {
        let host = self.host();
        if self.0.about.detach_wants_sole_opener
            && let (Do::Detach { vm }, Some(volume)) = (what, volume)
            && *vm == host
        {
            let state = self.state();
            let open = |seq: u64| state.kernel.open.get(&seq).is_some_and(|n| *n > 0);
            if state.kernel.disks.iter().any(|p| p.volume == volume && open(p.disk.incarnation.diskseq)) {
                return refused(Refusal::InUse, "open");
            }
        }
        let changed = {
            let mut state = self.state();
            let state = &mut *state;
            let sky = &mut state.sky;
            if let Do::Create { size, mark } = what {
                if let Some(made) = sky.created.get(&fence) {
                    return Ok(Some(*made));
                }
                let made = VolumeId(state.dice.uuid());
                let vol = Vol { size: *size, attached: None, mark: Some(*mark), pending: None, insertion: 0 };
                sky.volumes.insert(made, vol);
                sky.created.insert(fence, made);
                made
            } else {
                let Some(volume) = volume else { return refused(Refusal::Other, "of what?") };
                let Some(v) = sky.volumes.get_mut(&volume) else {
                    return match what {
                        Do::Delete => Ok(None),
                        _ => refused(Refusal::NoVolume, "no such volume"),
                    };
                };
                match what {
                    Do::Attach { vm, slot } => match v.attached {
                        Some((at, _)) if at == *vm => return Ok(None),
                        Some(_) => return refused(Refusal::Conflict, "attached elsewhere"),
                        None => {
                            v.attached = Some((*vm, *slot));
                            v.insertion += 1;
                        }
                    },
                    Do::Detach { vm } => match v.attached {
                        Some((at, _)) if at == *vm => v.attached = None,
                        _ => return Ok(None),
                    },
                    Do::Resize { size } if v.size >= *size => return Ok(None),
                    Do::Resize { size } => v.size = *size,
                    Do::Delete if v.attached.is_some() => return refused(Refusal::Conflict, "attached"),
                    Do::Delete => drop(sky.volumes.remove(&volume)),
                    Do::Mark { new, .. } if v.mark == *new => return Ok(None),
                    Do::Mark { expect, .. } if v.mark != *expect => return refused(Refusal::Mark(v.mark), "its mark"),
                    Do::Mark { new, .. } => v.mark = *new,
                    Do::Create { .. } => return Ok(None),
                }
                volume
            }
        };
        self.took_effect(fence, changed, what);
        if !matches!(what, Do::Mark { .. } | Do::Create { .. }) {
            let after = self.latency(3000);
            self.follow_later(changed, after);
        }
        Ok(Some(changed))
    }

    /// Starts a job of the cloud: it acts (or fails) after that time, whoever still listens.
    fn job(
        &self,
        fence: Fence,
        volume: Option<VolumeId>,
        what: Do,
        after: Duration,
        fails: bool,
    ) -> oneshot::Receiver<Answer> {
        let (tell, answer) = oneshot::channel();
        if after.is_zero() && !fails {
            // Nobody waits for what nobody heard.
            let _ = tell.send(self.effect(fence, volume, &what));
            return answer;
        }
        let job = {
            let mut state = self.state();
            let job = state.sky.next_job;
            state.sky.next_job += 1;
            state.sky.jobs.insert(job, fence);
            if let Some(v) = volume.and_then(|volume| state.sky.volumes.get_mut(&volume)) {
                v.pending = Some(job);
            }
            job
        };
        self.say(|| format!("cloud: job {job} runs {} ms: {what:?}", after.as_millis()));
        let sim = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let outcome = match fails {
                true => refused(Refusal::Other, "the job failed"),
                false => sim.effect(fence, volume, &what),
            };
            {
                let mut state = sim.state();
                state.sky.jobs.remove(&job);
                if let Some(v) = volume.and_then(|volume| state.sky.volumes.get_mut(&volume)) {
                    v.pending = None;
                }
            }
            sim.say(|| format!("cloud: job {job} ends: {}", if outcome.is_ok() { "done" } else { "failed" }));
            // Its caller may be dead.
            let _ = tell.send(outcome);
        });
        answer
    }
}

impl Port {
    /// A call that changes something.
    async fn change(&self, fence: Fence, volume: Option<VolumeId>, what: Do) -> Answer {
        self.alive().await;
        let sim = &self.sim;
        let at = what.point();
        let fault = sim.fault(at);
        sim.called(self.life, fence, volume, &what);
        sim.say(|| format!("call {what:?} of {volume:?} {}", fault.map_or(String::new(), |f| format!("with {f:?}"))));
        // One job a volume: the real one queues or refuses.
        let busy = volume.and_then(|v| sim.state().sky.volumes.get(&v).and_then(|v| v.pending)).is_some();
        if busy {
            return refused(Refusal::Passing, "another job is pending");
        }
        let run = match (fault, at) {
            (_, Point::Mark) => Duration::ZERO,
            _ => sim.latency(3000),
        };
        match fault {
            None => {}
            Some(Fault::Refuse) => return refused(Refusal::Other, "no"),
            Some(Fault::Busy) => return refused(Refusal::Passing, "not now"),
            Some(Fault::Unreachable) => return Err(CloudError::Unreachable { words: "simulated: away".into() }),
            Some(Fault::Lost) => return unclear(),
            Some(Fault::LostDone) => {
                drop(sim.job(fence, volume, what, Duration::ZERO, false));
                return unclear();
            }
            Some(Fault::Straggle(ms)) => {
                drop(sim.job(fence, volume, what, Duration::from_millis(ms), false));
                let time = sim.latency(1000);
                self.pause(time).await;
                return unclear();
            }
            Some(Fault::LateAnswer(ms)) => {
                let answer = sim.job(fence, volume, what, Duration::ZERO, false);
                self.pause(Duration::from_millis(ms)).await;
                return answer.await.unwrap_or_else(|_| unclear());
            }
            Some(Fault::JobFails(ms)) => {
                let answer = sim.job(fence, volume, what, Duration::from_millis(ms), true).await;
                self.alive().await;
                return answer.unwrap_or_else(|_| unclear());
            }
            Some(Fault::KillBefore) => return self.die().await,
            Some(Fault::KillAfter) => {
                drop(sim.job(fence, volume, what, Duration::ZERO, false));
                return self.die().await;
            }
            Some(Fault::KillStraggle(ms)) => {
                drop(sim.job(fence, volume, what, Duration::from_millis(ms), false));
                return self.die().await;
            }
        }
        let answer = sim.job(fence, volume, what, run, false).await;
        let time = sim.latency(40);
        self.pause(time).await;
        self.alive().await;
        answer.unwrap_or_else(|_| unclear())
    }

    /// A look: what it shows is of the moment it was asked for, however late it comes.
    async fn look<T>(&self, at: Point, see: impl FnOnce(&Sim) -> T + Send) -> Result<T, CloudError>
    where
        T: Send,
    {
        self.alive().await;
        let sim = &self.sim;
        let seen = see(sim);
        let fault = sim.fault(at);
        if let Some(fault) = fault {
            sim.say(|| format!("{fault:?} at {at:?}"));
        }
        match fault {
            None => {
                let time = sim.latency(40);
                self.pause(time).await;
                Ok(seen)
            }
            Some(Fault::LateAnswer(ms) | Fault::Straggle(ms)) => {
                self.pause(Duration::from_millis(ms)).await;
                Ok(seen)
            }
            Some(Fault::Busy) => refused(Refusal::Passing, "not now"),
            Some(Fault::Refuse | Fault::JobFails(_)) => refused(Refusal::Other, "no"),
            Some(Fault::Lost | Fault::LostDone) => unclear(),
            Some(Fault::Unreachable) => Err(CloudError::Unreachable { words: "simulated: away".into() }),
            Some(Fault::KillBefore | Fault::KillAfter | Fault::KillStraggle(_)) => self.die().await,
        }
    }
}

#[async_trait]
impl Cloud for Port {
    fn about(&self) -> &About {
        &self.sim.0.about
    }

    async fn find(&self, volume: VolumeId) -> Result<Option<CloudVolume>, CloudError> {
        let see = |sim: &Sim| {
            let seen = sim.shown(volume);
            sim.absence(volume, seen.is_some());
            seen
        };
        let seen = self.look(Point::Find, see).await?;
        self.sim.looked(volume, seen.as_ref());
        Ok(seen)
    }

    async fn running(&self, fence: Fence) -> Result<Option<String>, CloudError> {
        let one = |sim: &Sim| sim.state().sky.jobs.iter().find(|(_, f)| **f == fence).map(|(job, _)| *job);
        Ok(self.look(Point::Running, one).await?.map(|job| format!("job-{job}")))
    }

    async fn find_created(&self, fence: Fence) -> Result<Option<CloudVolume>, CloudError> {
        self.look(Point::FindCreated, |sim| {
            let made = sim.state().sky.created.get(&fence).copied();
            made.and_then(|made| sim.shown(made))
        })
        .await
    }

    async fn survey(&self, survey: &Survey) -> Result<Vec<CloudVolume>, CloudError> {
        self.look(Point::Survey, |sim| {
            for volume in &survey.volumes {
                sim.absence(*volume, sim.shown(*volume).is_some());
            }
            let state = sim.state();
            let wanted = |(id, v): &(&VolumeId, &Vol)| {
                survey.volumes.contains(id)
                    || v.attached.is_some_and(|(vm, _)| survey.vms.contains(&vm))
                    || v.mark.is_some_and(|m| Some(m.record) == survey.record)
                    || survey.fences.iter().any(|f| state.sky.created.get(f) == Some(*id))
            };
            state.sky.volumes.iter().filter(wanted).map(|(id, v)| shown(*id, v)).collect()
        })
        .await
    }

    async fn create(&self, call: &Call, new: &NewVolume) -> Result<CloudVolume, CloudError> {
        let made = self.change(call.fence(), None, Do::Create { size: new.size, mark: new.label.mark }).await?;
        match made.and_then(|made| self.sim.shown(made)) {
            Some(seen) => Ok(CloudVolume { name: new.name.clone(), ..seen }),
            None => refused(Refusal::NoVolume, "it went at once"),
        }
    }

    async fn attach(&self, call: &Call, volume: VolumeId, vm: VmId, slot: Option<Slot>) -> Result<(), CloudError> {
        // Sometimes the cloud gives another place than was asked for.
        let slot = match slot {
            Some(slot) if self.sim.state().dice.roll(4) > 0 => slot.number(),
            _ => 1,
        };
        self.change(call.fence(), Some(volume), Do::Attach { vm, slot }).await.map(drop)
    }

    async fn detach(&self, call: &Call, volume: VolumeId, vm: VmId, _force: bool) -> Result<(), CloudError> {
        self.change(call.fence(), Some(volume), Do::Detach { vm }).await.map(drop)
    }

    async fn resize(&self, call: &Call, volume: VolumeId, size: u64) -> Result<u64, CloudError> {
        self.change(call.fence(), Some(volume), Do::Resize { size }).await.map(|_| size)
    }

    async fn delete(&self, call: &Call, volume: VolumeId, _expunge: bool) -> Result<Option<Timestamp>, CloudError> {
        self.change(call.fence(), Some(volume), Do::Delete).await.map(|_| Some(Timestamp(0)))
    }

    async fn exchange_mark(
        &self,
        call: &Call,
        volume: VolumeId,
        expect: Option<Mark>,
        new: Option<&Label>,
    ) -> Result<(), CloudError> {
        let what = Do::Mark { expect, new: new.map(|l| l.mark) };
        self.change(call.fence(), Some(volume), what).await.map(drop)
    }

    async fn vm(&self, vm: VmId) -> Result<Option<VmFacts>, CloudError> {
        let facts = self.look(Point::Vm, |sim| {
            (vm == sim.host())
                .then_some(VmFacts { running: true, has_root: true })
                .or((vm == sim.0.other).then_some(VmFacts { running: false, has_root: false }))
        });
        facts.await
    }
}
