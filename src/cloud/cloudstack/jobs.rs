//! The cloud's asynchronous jobs: submitted under an id of our own, followed to their end, and never
//! run twice.
//!
//! ```text
//! id = hash(operation's fence, command, attempt)      in the journal before the call, by the fence
//!        │ submit
//!        ├─ answer with a job id ────────────────► follow: 0 → wait, 1 → done, else → failed
//!        ├─ "that id exists already" ─► ask it ──► still running: follow · final: next attempt
//!        ├─ no answer ────────────────► ask it ──► known: follow · unknown twice: submit again, same id
//!        └─ refused, unreachable ────────────────► said so: nothing was started
//! ```
//! Where the server does not take ids of ours, or creates before it looks at them, an unanswered
//! submit ends as [`End::Unknown`], and only looking decides. Polling begins quick and slows down;
//! [`Call::hurried`] makes it quick again: the kernel shows the effect.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tokio::time::Instant;
use uuid::Uuid;

use super::super::{Call, CloudError};
use super::provider::said;
use super::{ApiError, Client, refusal};
use crate::failpoint;
use crate::model::Fence;

/// Most attempts of one command in one operation that are remembered by their ids.
const ATTEMPTS: u32 = 64;
/// Between two questions about an id that the server does not know yet: a replica may lag.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// How a job did not succeed.
#[derive(Debug)]
pub(super) enum End {
    /// The cloud said no, at once or at the job's end.
    Refused(CloudError),
    /// Nothing reached the cloud.
    NotStarted(CloudError),
    /// The job is final and says nothing, or is known no more: looking decides.
    NoResult(String),
    /// It may have been started, and has no id to ask for: looking decides.
    Unknown(String),
}

/// Whether the server takes job ids of ours.
const UNTRIED: u8 = 0;
const TAKEN: u8 = 1;
const IGNORED: u8 = 2;

/// Submits and follows jobs.
pub(super) struct Jobs {
    client: Client,
    own_ids: AtomicU8,
}

/// What an unanswered submit of a command may be repeated with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    /// The same id: it cannot run twice.
    SameId,
    /// Nothing: the command allocates before it looks at the id.
    Never,
}

#[derive(Debug, Deserialize)]
struct Job {
    #[serde(default)]
    jobstatus: i64,
    jobresult: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Failure {
    errorcode: Option<u16>,
    cserrorcode: Option<u32>,
    errortext: Option<String>,
}

/// The id of one attempt at one command of one operation: lower-case, fixed by its arguments.
fn id_of(fence: Fence, command: &str, attempt: u32) -> Uuid {
    Uuid::new_v5(&fence.0, format!("{command}/{attempt}").as_bytes())
}

/// How long to wait before the next question: quick at first and after a hint, then backing off.
struct Pace {
    pause: Duration,
    quick: u32,
}

impl Pace {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(3);
    const QUICK: Duration = Duration::from_millis(20);
    /// Quick questions after a hint; together with their doubling about a second.
    const QUICK_ONES: u32 = 10;

    fn new() -> Self {
        Pace { pause: Self::FIRST, quick: 0 }
    }

    async fn wait(&mut self, call: &Call) {
        tokio::select! {
            () = call.hurried() => {
                self.quick = Self::QUICK_ONES;
                self.pause = Self::QUICK;
            }
            () = tokio::time::sleep(self.pause) => match self.quick.checked_sub(1) {
                Some(left) => {
                    self.quick = left;
                    self.pause = self.pause.mul_f64(1.3);
                }
                None => self.pause = self.pause.mul_f64(1.5).min(Self::LONGEST),
            },
        }
    }
}

impl Jobs {
    pub fn new(client: Client) -> Self {
        Jobs { client, own_ids: AtomicU8::new(UNTRIED) }
    }

    /// Runs a command to its job's end; answers the job's result.
    pub async fn run(
        &self,
        call: &Call,
        command: &'static str,
        params: &[(&str, &str)],
        repeat: Repeat,
    ) -> Result<Value, End> {
        let job = self.submit(call, command, params, repeat).await?;
        failpoint::reach("cloudstack.submitted").await;
        self.follow(call, command, &job).await
    }

    async fn submit(
        &self,
        call: &Call,
        command: &'static str,
        params: &[(&str, &str)],
        repeat: Repeat,
    ) -> Result<String, End> {
        let mut attempt = 0;
        'attempt: loop {
            let id = id_of(call.fence(), command, attempt).hyphenated().to_string();
            let mut all = params.to_vec();
            all.push(("customjobid", &id));
            let mut sent = 0;
            loop {
                sent += 1;
                let error = match self.client.write(command, &all).await {
                    Ok(answer) => return self.accepted(command, &id, &answer),
                    Err(error) => error,
                };
                match error {
                    ApiError::Api { text, .. } if used_already(&text) && attempt < ATTEMPTS => {
                        // An earlier attempt's, or our own whose answer was lost.
                        self.own_ids.store(TAKEN, Ordering::Relaxed);
                        match self.ask(&id).await {
                            Some(job) if job.jobstatus == 0 || sent > 1 => return Ok(id),
                            _ => attempt += 1,
                        }
                        continue 'attempt;
                    }
                    ApiError::Api { code, cs, text } => return Err(End::Refused(refusal::refused(code, cs, &text))),
                    ApiError::Credentials { .. } | ApiError::NotSent { .. } => {
                        return Err(End::NotStarted(said(error)));
                    }
                    ApiError::NoAnswer { words } => {
                        call.step(&format!("no answer to {command}: is job {id} there?"));
                        tracing::warn!(command, job = id, "no answer: {words}");
                        if self.ask(&id).await.is_some() {
                            self.own_ids.store(TAKEN, Ordering::Relaxed);
                            return Ok(id);
                        }
                        if repeat == Repeat::Never || self.own_ids.load(Ordering::Relaxed) != TAKEN {
                            return Err(End::Unknown(words));
                        }
                    }
                }
            }
        }
    }

    /// The job's id of an accepted submit.
    fn accepted(&self, command: &str, id: &str, answer: &Value) -> Result<String, End> {
        match answer.get("jobid").and_then(Value::as_str) {
            Some(given) => {
                self.own_ids.store(if given == id { TAKEN } else { IGNORED }, Ordering::Relaxed);
                Ok(given.to_owned())
            }
            None => Err(End::Unknown(format!("the answer to {command} names no job"))),
        }
    }

    /// A job as the server knows it; asked until it answers, and twice where it knows none.
    async fn ask(&self, id: &str) -> Option<Job> {
        let mut noes = 0;
        loop {
            match self.client.read("queryAsyncJobResult", &[("jobid", id)]).await {
                Ok(answer) => match serde_json::from_value(answer) {
                    Ok(job) => return Some(job),
                    Err(error) => tracing::warn!(job = id, "an answer about it makes no sense: {error}"),
                },
                Err(ApiError::Api { code, text, .. }) if refusal::unknown_entity(code, &text) => {
                    noes += 1;
                    if noes == 2 {
                        return None;
                    }
                }
                Err(error) => tracing::warn!(job = id, "not known yet whether it was started: {}", error),
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// Follows a job to its end. A failed question is not a failed job: it is asked again for as
    /// long as it takes.
    pub async fn follow(&self, call: &Call, command: &str, job: &str) -> Result<Value, End> {
        call.step(&in_words(job, command));
        let mut pace = Pace::new();
        let mut unknown_since: Option<Instant> = None;
        let mut silent = false;
        loop {
            match self.client.read("queryAsyncJobResult", &[("jobid", job)]).await {
                Ok(answer) => {
                    if silent {
                        silent = false;
                        call.step(&in_words(job, command));
                    }
                    unknown_since = None;
                    match serde_json::from_value::<Job>(answer) {
                        Ok(Job { jobstatus: 0, .. }) => {}
                        Ok(Job { jobstatus: 1, jobresult }) => return Ok(jobresult.unwrap_or(Value::Null)),
                        Ok(Job { jobresult, .. }) => return Err(failed(command, job, jobresult)),
                        Err(error) => tracing::warn!(job, "an answer about it makes no sense: {error}"),
                    }
                }
                Err(ApiError::Api { code, text, .. }) if refusal::unknown_entity(code, &text) => {
                    // A replica may lag: asked twice before it is believed.
                    match unknown_since {
                        Some(since) if since.elapsed() >= ASK_AGAIN => {
                            return Err(End::NoResult(format!("the cloud knows its job {job} ({command}) no more")));
                        }
                        Some(_) => {}
                        None => unknown_since = Some(Instant::now()),
                    }
                }
                Err(error) => {
                    tracing::warn!(job, "asking about it failed: {}", error);
                    if !silent {
                        silent = true;
                        call.step(&format!("the cloud's job {job} ({command}), about which it does not answer now"));
                    }
                }
            }
            pace.wait(call).await;
        }
    }

    /// Whether a job that this operation started is not final yet, in words.
    pub async fn running(&self, fence: Fence, commands: &[&str]) -> Result<Option<String>, CloudError> {
        #[derive(Deserialize)]
        struct Pending {
            jobid: Uuid,
            #[serde(default)]
            jobstatus: i64,
        }
        let pending: Vec<Pending> = match self.client.list("listAsyncJobs", &[], "asyncjobs").await {
            Ok(pending) => pending,
            // A role may forbid it: each id that there can be is asked for instead.
            Err(ApiError::Api { .. } | ApiError::Credentials { .. }) => {
                return self.running_by_id(fence, commands).await;
            }
            Err(error) => return Err(said(error)),
        };
        for job in pending.iter().filter(|job| job.jobstatus == 0) {
            for command in commands {
                if (0..ATTEMPTS).any(|attempt| id_of(fence, command, attempt) == job.jobid) {
                    return Ok(Some(in_words(&job.jobid.to_string(), command)));
                }
            }
        }
        Ok(None)
    }

    async fn running_by_id(&self, fence: Fence, commands: &[&str]) -> Result<Option<String>, CloudError> {
        for command in commands {
            for attempt in 0..ATTEMPTS {
                let id = id_of(fence, command, attempt).hyphenated().to_string();
                match self.client.read("queryAsyncJobResult", &[("jobid", &id)]).await {
                    Ok(answer) => match serde_json::from_value::<Job>(answer) {
                        Ok(Job { jobstatus: 0, .. }) => return Ok(Some(in_words(&id, command))),
                        Ok(_) => {}
                        Err(error) => {
                            let words = format!("an answer about job {id} makes no sense: {error}");
                            return Err(CloudError::Unreachable { words });
                        }
                    },
                    // Attempts follow one another: there is no later one.
                    Err(ApiError::Api { code, text, .. }) if refusal::unknown_entity(code, &text) => break,
                    Err(error) => return Err(said(error)),
                }
            }
        }
        Ok(None)
    }
}

fn in_words(job: &str, command: &str) -> String {
    format!("the cloud's job {job} ({command})")
}

/// "UUID: … already exists so can't create/update with custom id", and the database's own words.
fn used_already(text: &str) -> bool {
    text.contains("already exists so can't create/update with custom id") || text.contains("Duplicate entry")
}

fn failed(command: &str, job: &str, result: Option<Value>) -> End {
    let Some(result) = result else {
        // As after a restart of its management server.
        return End::NoResult(format!("the cloud's job {job} ({command}) ended without a result"));
    };
    match serde_json::from_value::<Failure>(result.clone()) {
        Ok(Failure { errorcode, cserrorcode, errortext: Some(text) }) => {
            End::Refused(refusal::refused(errorcode.unwrap_or(530), cserrorcode, &text))
        }
        _ => match result.as_str() {
            Some(text) => End::Refused(refusal::refused(530, None, text)),
            None => End::NoResult(format!("the cloud's job {job} ({command}) failed with what is no error: {result}")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_has_one_id_for_ever_and_no_other_attempt_has_it() {
        let fence = Fence::parse("11111111-2222-4333-8444-555566667777").unwrap();
        let id = id_of(fence, "attachVolume", 0);
        // Fixed: a restarted daemon must find what an earlier one started.
        assert_eq!(id.to_string(), "9fc7d53f-b898-5e26-bba6-b7bd22309190");
        assert_ne!(id, id_of(fence, "attachVolume", 1));
        assert_ne!(id, id_of(fence, "detachVolume", 0));
        assert_ne!(id, id_of(Fence::random(), "attachVolume", 0));
    }

    #[test]
    fn a_failed_job_without_a_result_has_no_outcome() {
        assert!(matches!(failed("attachVolume", "j", None), End::NoResult(_)));
        assert!(matches!(failed("attachVolume", "j", Some(serde_json::json!({}))), End::NoResult(_)));
        let full = serde_json::json!({"errorcode": 535, "errortext": "amount of resources exceeded"});
        let End::Refused(CloudError::Refused { why, .. }) = failed("attachVolume", "j", Some(full)) else { panic!() };
        assert_eq!(why, super::super::super::Refusal::Quota);
        assert!(matches!(failed("attachVolume", "j", Some("some text".into())), End::Refused(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn polling_slows_down_and_a_hint_makes_it_quick() {
        let call = Call::new(Fence::random(), |_| ());
        let mut pace = Pace::new();
        let began = Instant::now();
        for _ in 0..20 {
            pace.wait(&call).await;
        }
        assert!(began.elapsed() > Duration::from_secs(20) && pace.pause == Pace::LONGEST);
        call.hurry();
        let hinted = Instant::now();
        pace.wait(&call).await;
        assert_eq!(hinted.elapsed(), Duration::ZERO);
        for _ in 0..4 {
            pace.wait(&call).await;
        }
        assert!(hinted.elapsed() < Duration::from_millis(150), "{:?}", hinted.elapsed());
    }
}
