//! Jobs: submitting, their turn, their moments, their end (section 3).

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::answer::{Failure, Refusal};
use crate::api::Call;
use crate::core::Core;
use crate::fault::{Kind, Moment};
use crate::options::uuid;
use crate::state::{Event, Job, World};
use crate::time;
use crate::work::Work;

/// Why a job ends early.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The cloud ends: nobody will ask.
    Ending,
    /// Its management server ended.
    Restarted,
    /// It failed.
    Failed(Failure),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Stop::Failed(failure)
    }
}

/// A job about to be accepted.
pub(crate) struct Submission {
    pub command: String,
    /// Empty for an admin of the tests.
    pub account: String,
    /// `Volume` or `Snapshot`, and the id.
    pub instance: Option<(String, String)>,
    /// The VM in whose queue it goes.
    pub queue: Option<String>,
    pub work: Result<Work, Failure>,
    pub custom: Option<String>,
    pub kinds: Vec<Kind>,
}

/// A job that runs.
pub(crate) struct Run {
    pub core: Arc<Core>,
    pub id: String,
    pub command: String,
    pub by_admin: bool,
    kinds: Vec<Kind>,
    queue: Option<String>,
}

impl Call<'_> {
    /// Accepts a job for this call; the answer's `jobid`.
    pub fn submit(
        &self,
        world: &mut World,
        instance: Option<(&str, &str)>,
        queue: Option<String>,
        work: Result<Work, Failure>,
    ) -> Result<String, Refusal> {
        let taken = self.core.rules.custom_job_ids && !self.has(|k| matches!(k, Kind::OwnJobId));
        let custom = self.params.get("customjobid").filter(|_| taken).map(str::to_owned);
        let instance = instance.map(|(kind, id)| (kind.to_owned(), id.to_owned()));
        submit(
            self.core,
            world,
            Submission {
                command: self.command.to_owned(),
                account: self.account.name.clone(),
                instance,
                queue,
                work,
                custom,
                kinds: self.kinds.to_vec(),
            },
        )
    }
}

/// Accepts a job: in its VM's queue at once, in the order of acceptance.
pub(crate) fn submit(core: &Arc<Core>, world: &mut World, new: Submission) -> Result<String, Refusal> {
    if let Some(id) = &new.custom {
        custom_id(world, id)?;
    }
    let id = new.custom.unwrap_or_else(uuid);
    let failed = new.work.as_ref().err().cloned();
    let job = Job {
        id: id.clone(),
        command: new.command.clone(),
        account: new.account.clone(),
        status: 0,
        code: 0,
        result: None,
        instance: new.instance,
        queue: new.queue.clone(),
        lost: new.kinds.iter().any(|k| matches!(k, Kind::JobLost)),
        created: time::now(),
        completed: None,
    };
    world.jobs.insert(id.clone(), job);
    event(world, &id, "INFO", "Scheduled");
    match (new.work, failed) {
        (_, Some(failure)) => close(world, &id, Err(Stop::Failed(failure))),
        (Ok(work), None) => {
            if let Some(vm) = &new.queue {
                world.queues.entry(vm.clone()).or_default().push_back(id.clone());
            }
            let run = Run {
                core: Arc::clone(core),
                id: id.clone(),
                by_admin: new.account.is_empty(),
                command: new.command,
                kinds: new.kinds,
                queue: new.queue,
            };
            core.spawn("fakecloud-job", move || run.go(&work));
        }
        (Err(_), None) => {}
    }
    core.tell(world);
    Ok(id)
}

/// 3.2: pattern, then uniqueness, which the table keeps when the first one is completed.
fn custom_id(world: &World, id: &str) -> Result<(), Refusal> {
    let shape = |(n, part): (usize, &str)| {
        part.len() == [8, 4, 4, 4, 12][n.min(4)] && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    if id.split('-').count() != 5 || !id.split('-').enumerate().all(shape) {
        return Err(Refusal::parameter(format!(
            "UUID: {id} is not a valid UUID: should be in lower case and of the form 8-4-4-4-12"
        )));
    }
    match world.jobs.get(id) {
        None => Ok(()),
        Some(job) if !job.done() => {
            Err(Refusal::parameter(format!("UUID: {id} already exists so can't create/update with custom id")))
        }
        Some(_) => Err(Refusal::internal("Unable to schedule async job: duplicate entry for key uc_async__uuid")),
    }
}

/// Ends a job in the record.
fn close(world: &mut World, id: &str, outcome: Result<Value, Stop>) {
    let Some(job) = world.jobs.get_mut(id) else { return };
    job.completed = Some(time::now());
    let level = match outcome {
        Ok(result) => {
            (job.status, job.code, job.result) = (1, 0, Some(result));
            "INFO"
        }
        Err(Stop::Failed(failure)) => {
            (job.status, job.code, job.result) = (2, failure.code, Some(failure.result()));
            "ERROR"
        }
        Err(Stop::Restarted | Stop::Ending) => {
            (job.status, job.code, job.result) = (2, 530, None);
            "ERROR"
        }
    };
    let queue = job.queue.clone();
    if let Some(queue) = queue.and_then(|vm| world.queues.get_mut(&vm)) {
        queue.retain(|waiting| waiting != id);
    }
    event(world, id, level, "Completed");
}

/// Leaves an entry of listEvents for the commands that have a type there.
fn event(world: &mut World, job: &str, level: &'static str, stage: &str) {
    let Some(job) = world.jobs.get(job) else { return };
    let kind = match job.command.as_str() {
        "attachVolume" => "VOLUME.ATTACH",
        "detachVolume" => "VOLUME.DETACH",
        "createVolume" => "VOLUME.CREATE",
        "destroyVolume" => "VOLUME.DESTROY",
        "resizeVolume" => "VOLUME.RESIZE",
        "createSnapshot" => "SNAPSHOT.CREATE",
        "deleteSnapshot" => "SNAPSHOT.DELETE",
        "revertSnapshot" => "SNAPSHOT.REVERT",
        _ => return,
    };
    let words = match level {
        "ERROR" => format!("Error while {kind}"),
        _ => format!("{stage} {kind}"),
    };
    let resource = job.instance.as_ref().map(|(_, id)| id.clone()).unwrap_or_default();
    let (account, created) = (job.account.clone(), time::now());
    world.events.push(Event { id: uuid(), kind, level, words, resource, account, created });
}

impl Run {
    fn go(&self, work: &Work) {
        let outcome = self.turn().and_then(|()| work.steps(self));
        let mut world = self.core.world.lock();
        if let Err(stop) = &outcome {
            // At the end of the cloud there is nobody to show it to.
            if !matches!(stop, Stop::Ending) {
                work.reset(&mut world);
            }
        }
        world.killed.retain(|id| *id != self.id);
        world.held.retain(|id| *id != self.id);
        close(&mut world, &self.id, outcome);
        self.core.tell(&mut world);
    }

    /// Waits for the head of the VM's queue.
    fn turn(&self) -> Result<(), Stop> {
        let mut world = self.core.world.lock();
        let mine = |world: &World| {
            let queue = self.queue.as_ref().and_then(|vm| world.queues.get(vm));
            queue.is_none_or(|queue| queue.front() == Some(&self.id))
        };
        while !mine(&world) && self.alive(&world).is_ok() {
            self.core.changed.wait(&mut world);
        }
        self.alive(&world)?;
        drop(world);
        self.at(Moment::Queued)
    }

    fn alive(&self, world: &World) -> Result<(), Stop> {
        if world.ending {
            return Err(Stop::Ending);
        }
        if world.killed.contains(&self.id) { Err(Stop::Restarted) } else { Ok(()) }
    }

    /// A moment is reached: what the rule says of it happens.
    pub fn at(&self, moment: Moment) -> Result<(), Stop> {
        let mut world = self.core.world.lock();
        self.core.tell(&mut world);
        self.alive(&world)?;
        for kind in &self.kinds {
            match kind {
                Kind::JobHangs(at) if *at == moment => {
                    world.held.push(self.id.clone());
                    self.core.tell(&mut world);
                    while world.held.contains(&self.id) && self.alive(&world).is_ok() {
                        self.core.changed.wait(&mut world);
                    }
                    self.alive(&world)?;
                }
                Kind::JobFails { at, code, text } if *at == moment => {
                    return Err(Failure { code: *code, text: text.clone() }.into());
                }
                Kind::ServerRestart(at) if *at == moment => return Err(Stop::Restarted),
                _ => {}
            }
        }
        Ok(())
    }

    /// The work lasts as long as the options say, or `part` of it.
    pub fn last(&self, part: f64) -> Result<(), Stop> {
        let mut world = self.core.world.lock();
        let time: Duration = world.delay(&self.command).mul_f64(part);
        self.core.wait_unless(&mut world, time, |world| world.ending || world.killed.contains(&self.id));
        self.alive(&world)
    }
}

/// The command's Java class, as jobs show it.
fn class(command: &str) -> String {
    let package = ["Snapshot", "Tag"].into_iter().find(|word| command.contains(word)).unwrap_or("Volume");
    let (first, rest) = command.split_at(1);
    format!("org.apache.cloudstack.api.command.user.{}.{}{rest}Cmd", package.to_lowercase(), first.to_uppercase())
}

/// What queryAsyncJobResult answers (3.1).
pub(crate) fn shown(world: &World, job: &Job) -> Value {
    let account = world.accounts.iter().find(|a| a.name == job.account);
    let id = account.map(|a| a.id.clone()).unwrap_or_default();
    let mut shown = json!({
        "accountid": id,
        "userid": id,
        "cmd": class(&job.command),
        "jobid": job.id,
        "jobstatus": job.status,
        "jobprocstatus": 0,
        "jobresultcode": job.code,
        "created": time::text(job.created),
        "managementserverid": "00000000-0000-4000-8000-000000000001",
    });
    if let Some(result) = &job.result {
        shown["jobresult"] = result.clone();
        shown["jobresulttype"] = "object".into();
    }
    if let Some(completed) = job.completed {
        shown["completed"] = time::text(completed).into();
    }
    if let Some((kind, id)) = &job.instance {
        shown["jobinstancetype"] = kind.as_str().into();
        shown["jobinstanceid"] = id.as_str().into();
    }
    shown
}
