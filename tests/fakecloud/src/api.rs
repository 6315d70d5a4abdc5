//! From a request to its answer: faults, who asks, which command.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::answer::{Refusal, key, keyed};
use crate::commands::{self, Command};
use crate::core::Core;
use crate::fault::Kind;
use crate::http::{Answer, End};
use crate::options::Account;
use crate::params::Params;
use crate::sign;
use crate::state::Request;
use crate::time;

/// The window of the rate limit (1.8).
const WINDOW: Duration = Duration::from_secs(1);
/// How far ahead `expires` may be under enforcement (1.3), seconds.
const FURTHEST: i64 = 15 * 60;

/// A request of a known account.
pub(crate) struct Call<'a> {
    pub core: &'a Arc<Core>,
    pub account: Account,
    pub command: &'a str,
    pub params: &'a Params,
    pub kinds: &'a [Kind],
}

/// Answers one request.
pub(crate) fn handle(core: &Arc<Core>, method: &str, params: Params) -> Answer {
    let command = params.get("command").unwrap_or_default().to_owned();
    let (at, kinds) = {
        let mut world = core.world.lock();
        let taken = world.faults.iter_mut().find_map(|f| f.takes(&command).then(|| f.kind.clone()));
        world.faults.retain(|f| f.times > 0);
        let shown = |(name, value): &(String, String)| {
            let secret = ["apikey", "signature", "command"].iter().any(|s| name.eq_ignore_ascii_case(s));
            (!secret).then(|| (name.clone(), value.clone()))
        };
        world.requests.push(Request {
            method: method.to_owned(),
            command: command.clone(),
            params: params.raw.iter().filter_map(shown).collect::<BTreeMap<_, _>>(),
            at: Instant::now(),
            status: 0,
        });
        core.tell(&mut world);
        (world.requests.len() - 1, taken.map(|k| k.flat()).unwrap_or_default())
    };
    let answer = answer(core, method, &command, &params, &kinds);
    // A log that was cleared meanwhile has no such line.
    let mut world = core.world.lock();
    if let Some(request) = world.requests.get_mut(at).filter(|r| r.command == command) {
        request.status = answer.status;
    }
    core.tell(&mut world);
    answer
}

fn answer(core: &Arc<Core>, method: &str, command: &str, params: &Params, kinds: &[Kind]) -> Answer {
    for kind in kinds {
        let refusal = match kind {
            Kind::DropBefore => return Answer::dropped(),
            Kind::DelayBefore(time) => {
                core.wait(&mut core.world.lock(), *time);
                continue;
            }
            Kind::Html { status, acted: false } => return Answer::html(*status),
            Kind::Maintenance => Refusal::new(
                503,
                9999,
                "Maintenance or shutdown has been initiated on this management server. Can not accept new jobs",
            ),
            Kind::Unauthorized => Refusal::signature(),
            Kind::RateLimited(ms) => limited(*ms),
            Kind::Error { code, cs, text } => Refusal::new(*code, *cs, text.clone()),
            _ => continue,
        };
        return refused(command, &refusal);
    }
    let result = authenticate(core, method, command, params)
        .and_then(|(account, found)| (found.run)(&Call { core, account, command, params, kinds }));
    let mut answer = match result {
        Ok(inner) => Answer::json(200, &keyed(&key(command), inner)),
        Err(refusal) => refused(command, &refusal),
    };
    for kind in kinds {
        match kind {
            Kind::DropAfter => answer.end = End::Dropped,
            Kind::DelayAfter(time) => {
                core.wait(&mut core.world.lock(), *time);
            }
            Kind::Html { status, acted: true } => return Answer::html(*status),
            Kind::Truncated => answer.end = End::Truncated,
            Kind::Garbage => answer.body = b"{\"this is no JSON".to_vec(),
            _ => {}
        }
    }
    answer
}

fn refused(command: &str, refusal: &Refusal) -> Answer {
    Answer::json(u16::try_from(refusal.code).unwrap_or(530), &refusal.body(command))
}

fn limited(ms: u64) -> Refusal {
    Refusal::new(
        429,
        4545,
        format!("The given user has reached his/her account api limit, please retry after [{ms}] ms."),
    )
}

/// Who asks, if he may (1.1, 1.2, 1.3, 1.7), and the command.
fn authenticate(
    core: &Core,
    method: &str,
    command: &str,
    params: &Params,
) -> Result<(Account, &'static Command), Refusal> {
    if command.is_empty() {
        return Err(Refusal::anonymous(432, "Invalid request, no command sent"));
    }
    let control = |c: char| c.is_ascii_control() && c != '\n' && c != '\r';
    if let Some((name, _)) = params.raw.iter().find(|(_, value)| value.contains(control)) {
        return Err(Refusal::parameter(format!(
            "Received value for parameter {name} is invalid, contains illegal ASCII non-printable characters"
        )));
    }
    // Only these names are taken for reads; the case counts, as for the command itself.
    let read = ["get", "list", "query", "find"].iter().any(|start| command.starts_with(start));
    if core.rules.enforce_post && method != "POST" && !read {
        let text = format!("State changing command {command} needs to be sent using POST request");
        return Err(Refusal::new(400, 9999, text));
    }
    let known = commands::find(command);
    let account = {
        let mut world = core.world.lock();
        let key = params.get("apikey").ok_or_else(Refusal::signature)?;
        let found = world.accounts.iter().find(|a| a.key == key && !a.disabled).cloned();
        let account = found.ok_or_else(Refusal::signature)?;
        if known.is_none() {
            return Err(Refusal { anonymous: true, ..Refusal::signature() });
        }
        if account.forbidden.iter().any(|c| c == command) {
            let text = format!("The given command '{command}' either does not exist, is not available for user.");
            return Err(Refusal::new(401, 9999, text));
        }
        if let Some(most) = core.rules.rate_limit.filter(|_| !account.admin) {
            let window = world.windows.entry(account.name.clone()).or_insert((Instant::now(), 0));
            if window.0.elapsed() >= WINDOW {
                *window = (Instant::now(), 0);
            }
            window.1 += 1;
            if window.1 > most {
                let left = WINDOW.saturating_sub(window.0.elapsed());
                return Err(limited(u64::try_from(left.as_millis()).unwrap_or(1000).max(1)));
            }
        }
        account
    };
    let now = time::now() + core.world.lock().clock;
    expires(params, now, core.rules.enforce_post)?;
    let signature = params.get("signature").ok_or_else(Refusal::signature)?;
    let kind = *core.signatures.lock();
    if params.twice() || !sign::verify(kind, &params.raw, &account.secret, signature) {
        return Err(Refusal::signature());
    }
    match known {
        Some(known) => Ok((account, known)),
        None => Err(Refusal::signature()),
    }
}

/// `expires` counts only with signatureVersion 3 (1.3).
fn expires(params: &Params, now: i64, enforced: bool) -> Result<(), Refusal> {
    if params.get("signatureversion") != Some("3") {
        return if enforced { Err(Refusal::signature()) } else { Ok(()) };
    }
    let until = params.get("expires").and_then(time::parse).ok_or_else(Refusal::signature)?;
    if until < now || (enforced && until > now + FURTHEST) { Err(Refusal::signature()) } else { Ok(()) }
}

impl Call<'_> {
    /// Whether the rule that took this request has such a kind.
    pub fn has(&self, wanted: impl Fn(&Kind) -> bool) -> bool {
        self.kinds.iter().any(wanted)
    }

    /// A parameter that must be there.
    pub fn need(&self, name: &str) -> Result<&str, Refusal> {
        self.params.need(self.command, name)
    }

    /// A list's answer with the page asked for.
    pub fn list(&self, name: &str, all: Vec<Value>) -> Result<Value, Refusal> {
        let most = self.core.rules.page_size;
        Ok(crate::answer::list(name, all, self.params.page(self.command, most)?, most))
    }
}
