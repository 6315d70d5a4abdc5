//! One call of the API: keys, signature, tries and the deadline (page 8).

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use serde_json::Value;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::answer::{self, Again, ApiError, Failure, plain};
use super::credentials::{Credentials, Environment};
use super::list;
use super::secret::Keys;
use super::sign::{self, Algorithm, Signature};
use super::transport::Transport;
use crate::model::Timestamp;

/// A call's deadline where nothing else is configured.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// Asks for nothing, needs no right but being known, and proves a signature (page 2.15).
const PROBE: &str = "listCapabilities";
/// Tries to connect: a dead server is reported soon, a restarted one not missed.
const CONNECTS: u32 = 3;
/// Tries that a 401 gets: it is seen to pass by itself around restarts (page 1.7).
const SIGNINGS: u32 = 4;

/// How a [`Client`] is made.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// The API's address, where the source of the keys does not name it.
    pub endpoint: Option<String>,
    /// A file with `key` and `secret`.
    pub credentials: Option<PathBuf>,
    /// A PEM file: the only certificate authorities taken.
    pub ca: Option<PathBuf>,
    /// Which hash signs.
    pub signature: Signature,
    /// A call's deadline, all tries together. A read's single try has a third of it, connecting a sixth.
    pub timeout: Duration,
    /// Where variables are looked up.
    pub environment: Environment,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            endpoint: None,
            credentials: None,
            ca: None,
            signature: Signature::Auto,
            timeout: DEFAULT_TIMEOUT,
            environment: Environment::default(),
        }
    }
}

/// The API of one cloud. Clones share connections, keys and the rate limit's gate.
#[derive(Debug, Clone)]
pub struct Client(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    transport: Transport,
    credentials: Credentials,
    signature: Signature,
    /// What `auto` found out.
    proven: Mutex<Option<Algorithm>>,
    probing: tokio::sync::Mutex<()>,
    gate: Gate,
    timeout: Duration,
    page: AtomicUsize,
    pace: Pace,
    /// Seconds by which the server's clock was ahead when an answer last said its time.
    ahead: Mutex<Option<i64>>,
}

/// Pauses between tries.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// After the first failure; doubled for each further one.
    first: Duration,
    /// The longest.
    most: Duration,
    /// The same for a 401.
    signing: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { first: Duration::from_millis(250), most: Duration::from_secs(5), signing: Duration::from_millis(700) }
    }
}

impl Pace {
    fn pause(&self, failures: u32) -> Duration {
        jitter(doubled(self.first, failures).min(self.most))
    }
}

fn doubled(first: Duration, failures: u32) -> Duration {
    first.saturating_mul(1 << failures.saturating_sub(1).min(16))
}

/// Half of it, and a random part of the other half: callers that failed together come back apart.
fn jitter(most: Duration) -> Duration {
    let part = uuid::Uuid::new_v4().as_bytes()[0];
    most / 2 + most / 2 * u32::from(part) / 255
}

/// Closed by a 429 for all calls of this client, since the limit is the account's.
#[derive(Debug, Default)]
struct Gate(Mutex<Option<Instant>>);

impl Gate {
    fn close(&self, until: Instant) {
        let mut now = self.0.lock();
        *now = now.map_or(Some(until), |known| Some(known.max(until)));
    }

    /// Waits while it is closed; `false` where that would last beyond `end`.
    async fn pass(&self, end: Instant) -> bool {
        loop {
            let until = *self.0.lock();
            match until {
                Some(until) if until > Instant::now() => {
                    if until >= end {
                        return false;
                    }
                    // All who wait wake at once: apart by some ms each, they fit into the next window.
                    sleep_until(until).await;
                    sleep(jitter(Duration::from_millis(100))).await;
                }
                _ => return true,
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
}

/// Failures of one call so far, by what they allow.
#[derive(Debug, Default)]
struct Failures {
    all: u32,
    connecting: u32,
    signing: u32,
}

impl Client {
    /// Finds the keys, reads the CA, and prepares; sends nothing. The error is a sentence.
    pub fn new(options: ClientOptions) -> Result<Self, String> {
        Self::with_pace(options, Pace::default())
    }

    fn with_pace(options: ClientOptions, pace: Pace) -> Result<Self, String> {
        let credentials =
            Credentials::find(options.credentials.as_deref(), options.endpoint.as_deref(), &options.environment)?;
        let transport = Transport::new(credentials.endpoint(), options.ca.as_deref(), options.timeout / 6)?;
        if transport.is_open() {
            tracing::warn!("{} is not TLS: others on the way can read and change what is said", transport.endpoint());
        }
        Ok(Self(Arc::new(Inner {
            transport,
            credentials,
            signature: options.signature,
            proven: Mutex::new(None),
            probing: tokio::sync::Mutex::new(()),
            gate: Gate::default(),
            timeout: options.timeout,
            page: AtomicUsize::new(list::PAGE),
            pace,
            ahead: Mutex::new(None),
        })))
    }

    /// The API's address.
    pub fn endpoint(&self) -> &str {
        self.0.transport.endpoint()
    }

    /// Whether others on the way can read and change what is said: HTTP to another machine.
    pub fn is_open(&self) -> bool {
        self.0.transport.is_open()
    }

    /// Seconds by which the server's clock was ahead of this one when it last said its time; `None`
    /// if it never did: most servers send no `Date` (page 1.3).
    pub fn clock_ahead(&self) -> Option<i64> {
        *self.0.ahead.lock()
    }

    /// Where the keys come from, in words.
    pub fn source(&self) -> String {
        self.0.credentials.source()
    }

    /// Asks. May be sent several times: lost answers and 5xx of a proxy are tried again until the
    /// deadline. Answers the object inside the one key.
    pub async fn read(&self, command: &str, params: &[(&str, &str)]) -> Result<Value, ApiError> {
        self.call(command, params, Kind::Read).await
    }

    /// Changes something. Sent again only where nothing was started for certain: no connection, 401,
    /// 429, and 503 in the cloud's own words. [`ApiError::NoAnswer`] leaves open whether it was done.
    /// The one try that is answered late has all the time that is left.
    pub async fn write(&self, command: &str, params: &[(&str, &str)]) -> Result<Value, ApiError> {
        self.call(command, params, Kind::Write).await
    }

    pub(super) fn page_size(&self) -> usize {
        self.0.page.load(Ordering::Relaxed)
    }

    pub(super) fn set_page_size(&self, size: usize) {
        self.0.page.store(size, Ordering::Relaxed);
    }

    async fn call(&self, command: &str, params: &[(&str, &str)], kind: Kind) -> Result<Value, ApiError> {
        let begun = Instant::now();
        let end = begun + self.0.timeout;
        let mut failures = Failures::default();
        let mut last = None;
        loop {
            let failure = match self.once(command, params, kind, end).await {
                Ok(answer) => return Ok(answer),
                Err(late) if late.again == Again::Late => {
                    return Err(self.said(command, last.unwrap_or(late), &failures, begun));
                }
                Err(failure) => failure,
            };
            failures.all += 1;
            tracing::debug!(command, tries = failures.all, again = ?failure.again, "CloudStack: {}", failure.error);
            match self.pause(&failure, &mut failures, kind) {
                Some(pause) if Instant::now() + pause < end => sleep(pause).await,
                _ => return Err(self.said(command, failure, &failures, begun)),
            }
            last = Some(failure);
        }
    }

    /// How long to wait before the next try; `None` where there is none.
    fn pause(&self, failure: &Failure, failures: &mut Failures, kind: Kind) -> Option<Duration> {
        let pace = &self.0.pace;
        match failure.again {
            Again::Never | Again::Late => None,
            Again::Lost => (kind == Kind::Read).then(|| pace.pause(failures.all)),
            Again::Clean => Some(pace.pause(failures.all)),
            Again::Connect => {
                failures.connecting += 1;
                (failures.connecting < CONNECTS).then(|| pace.pause(failures.connecting))
            }
            Again::Keys => {
                failures.signing += 1;
                self.0.credentials.keys_again();
                // One alone may be a passing one: what was proven is not given up for it.
                if failures.signing > 1 {
                    *self.0.proven.lock() = None;
                }
                (failures.signing < SIGNINGS).then(|| jitter(doubled(pace.signing, failures.signing)))
            }
            Again::After(wait) => {
                self.0.gate.close(Instant::now() + wait);
                // The gate has this caller wait with all others, or sends it away where that is too long.
                Some(Duration::ZERO)
            }
        }
    }

    /// One try, with a signature of its own.
    async fn once(&self, command: &str, params: &[(&str, &str)], kind: Kind, end: Instant) -> Result<Value, Failure> {
        if !self.0.gate.pass(end).await {
            return Err(late("the account's rate limit lasts longer than the deadline"));
        }
        let algorithm = match timeout_at(end, self.algorithm(end)).await {
            Ok(found) => found?,
            Err(_) => return Err(late("the deadline passed before it was known how to sign")),
        };
        let left = end.saturating_duration_since(Instant::now());
        let limit = match kind {
            // Without the time to connect, an unsent request could not be told from a lost one.
            _ if left < self.0.timeout / 5 => return Err(late("the deadline is too near to send it")),
            Kind::Read => left.min(self.0.timeout / 3),
            Kind::Write => left,
        };
        self.send(command, params, algorithm, limit, kind).await
    }

    async fn send(
        &self,
        command: &str,
        params: &[(&str, &str)],
        algorithm: Algorithm,
        limit: Duration,
        kind: Kind,
    ) -> Result<Value, Failure> {
        let keys = self.0.credentials.keys();
        let expires = sign::expires(Timestamp::from(SystemTime::now()));
        let mut all = params.to_vec();
        all.extend([
            ("command", command),
            ("apiKey", keys.api_key.expose()),
            ("response", "json"),
            ("signatureVersion", "3"),
            ("expires", expires.as_str()),
        ]);
        let signature = sign::signature(&all, keys.secret.expose(), algorithm);
        let reply = self.0.transport.post(sign::body(&all, &signature), limit, kind == Kind::Write).await;
        let result = reply.and_then(|reply| {
            let date = reply.date.clone();
            if let Some(there) = date.as_deref().and_then(sent_at) {
                *self.0.ahead.lock() = Some((there - Timestamp::from(SystemTime::now()).0) / 1000);
            }
            answer::read(reply).map_err(|failure| dated(failure, date.as_deref()))
        });
        result.map_err(|f| Failure { error: f.error.with_words(|w| hide(w, &keys, &signature)), again: f.again })
    }

    /// The hash to sign with. `auto` asks once, with a read: SHA-1 first, since every released server
    /// takes it and a wrong guess is a failed login in somebody's log; SHA-512 where that is refused.
    async fn algorithm(&self, end: Instant) -> Result<Algorithm, Failure> {
        match self.0.signature {
            Signature::Sha1 => return Ok(Algorithm::Sha1),
            Signature::Sha512 => return Ok(Algorithm::Sha512),
            Signature::Auto => {}
        }
        let known = || *self.0.proven.lock();
        if let Some(algorithm) = known() {
            return Ok(algorithm);
        }
        let _one = self.0.probing.lock().await;
        if let Some(algorithm) = known() {
            return Ok(algorithm);
        }
        let mut refused = None;
        for algorithm in [Algorithm::Sha1, Algorithm::Sha512] {
            let left = end.saturating_duration_since(Instant::now());
            match self.send(PROBE, &[], algorithm, left.min(self.0.timeout / 3), Kind::Read).await {
                Ok(_) => {
                    tracing::debug!("{} takes {algorithm}", self.endpoint());
                    *self.0.proven.lock() = Some(algorithm);
                    return Ok(algorithm);
                }
                Err(failure) if failure.again == Again::Keys => refused = Some(failure),
                // The role forbids the probe, and said so before it looked at the signature.
                Err(Failure { error: ApiError::Api { code: 401, .. }, .. }) => return Ok(Algorithm::Sha1),
                Err(failure) => return Err(of_probe(failure)),
            }
        }
        Err(refused.unwrap_or_else(|| Failure::not_sent("no way to sign was tried", Again::Never)))
    }

    /// The last failure, in words for those who were not there.
    fn said(&self, command: &str, failure: Failure, failures: &Failures, begun: Instant) -> ApiError {
        let tries = match failures.all {
            1 => String::new(),
            n => format!(" ({n} tries in {:.1} s)", begun.elapsed().as_secs_f64()),
        };
        match failure.error {
            ApiError::Api { code: 401, text, .. } if failure.again == Again::Keys => {
                let trouble = self.0.credentials.trouble().map(|t| format!("; {t}")).unwrap_or_default();
                ApiError::Credentials {
                    words: format!(
                        "{command} at {}: {text}{tries}. Either the keys from {} are wrong or switched off{trouble}, or \
                         the clock here ({}) or there is wrong by more than {} minutes, or the cloud has no {command}",
                        self.endpoint(),
                        self.source(),
                        Timestamp::from(SystemTime::now()),
                        sign::LIFETIME.as_secs() / 60,
                    ),
                }
            }
            // Its words are the cloud's own; the rest is added by who knows what was wanted.
            api @ ApiError::Api { .. } => api,
            other => other.with_words(|words| format!("{command} at {}: {words}{tries}", self.endpoint())),
        }
    }
}

/// Of the call itself nothing was sent yet: what is in doubt is the probe alone.
fn of_probe(failure: Failure) -> Failure {
    let before = |words| format!("{PROBE} before it: {words}");
    match failure {
        Failure { error: ApiError::NoAnswer { words }, again: Again::Lost } => {
            Failure::not_sent(before(words), Again::Clean)
        }
        Failure { error: ApiError::NoAnswer { words }, again } => Failure::not_sent(before(words), again),
        Failure { error, again } => Failure { error: error.with_words(before), again },
    }
}

fn late(words: &str) -> Failure {
    Failure::not_sent(words, Again::Late)
}

/// The header `Date`, in ms since 1970: the middle of the second that it names.
fn sent_at(date: &str) -> Option<i64> {
    let parsed = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(date).ok()?;
    Some(parsed.as_millisecond() + 500)
}

/// A 401 with the server's time, where a reply has one: a clock that is wrong is seen at once.
fn dated(failure: Failure, date: Option<&str>) -> Failure {
    match (failure.again, date) {
        (Again::Keys, Some(date)) => {
            let error = failure.error.with_words(|w| format!("{w} [Date there: {}]", plain(date)));
            Failure { error, again: failure.again }
        }
        _ => failure,
    }
}

/// Pages of proxies and texts of servers may repeat what was sent.
fn hide(words: String, keys: &Keys, signature: &str) -> String {
    let escaped = |text: &str| {
        let mut out = String::new();
        sign::escape(&mut out, text);
        out
    };
    let (api_key, sent) = (keys.api_key.expose(), escaped(signature));
    let hidden = [keys.secret.expose(), &escaped(api_key), api_key, &sent, signature, "signature="];
    hidden.iter().filter(|s| !s.is_empty()).fold(words, |text, secret| text.replace(secret, "…"))
}

#[cfg(test)]
mod tests;
