//! queryAsyncJobResult and listAsyncJobs (section 3).

use serde_json::Value;

use crate::answer::Refusal;
use crate::api::Call;
use crate::params::invalid;
use crate::run::shown;

/// 3.1, 3.5.
pub(super) fn query(call: &Call<'_>) -> Result<Value, Refusal> {
    let id = call.need("jobid")?;
    let world = call.core.world.lock();
    let job = world.jobs.get(id).filter(|job| !job.lost).ok_or_else(|| invalid(call.command, "jobid", id))?;
    if job.account != call.account.name && !call.account.admin {
        return Err(Refusal::denied(format!("User is not authorized to view job {id}")));
    }
    Ok(shown(&world, job))
}

/// Pending jobs only (#4792).
pub(super) fn list(call: &Call<'_>) -> Result<Value, Refusal> {
    let world = call.core.world.lock();
    let mine = |account: &str| account == call.account.name || (call.account.admin && call.params.flag("listall"));
    let open: Vec<_> = world.jobs.values().filter(|job| !job.done() && !job.lost && mine(&job.account)).collect();
    call.list("asyncjobs", open.into_iter().map(|job| shown(&world, job)).collect())
}
