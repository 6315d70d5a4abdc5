//! The CloudStack provider's options: the table `[cloudstack]`.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::file::Within;
use super::{Picker, Problem, absolute, path_text};
use crate::model::VmId;

/// KVM's limit of data volumes (page 2.3).
const MOST_DISKS: u64 = 32;
/// The cloud's own default before a destroyed volume is expunged: a day (page 2.6), in seconds.
const RECOVERABLE_FOR: u64 = 86_400;
/// Seconds that a call may last.
const TIMEOUT: u64 = 30;
/// Seconds between two looks before an unanswered call is believed to have done nothing (contract,
/// Commands: the end of an operation).
const LATE_ANSWERS: u64 = 60;

/// Which hash signs requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SignatureHash {
    /// Found by asking.
    Auto,
    /// HMAC-SHA1.
    Sha1,
    /// HMAC-SHA512.
    Sha512,
}

impl fmt::Display for SignatureHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SignatureHash::Auto => "auto",
            SignatureHash::Sha1 => "sha1",
            SignatureHash::Sha512 => "sha512",
        })
    }
}

/// Options of the CloudStack provider. Keys are not among them, only where they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloudStackConfig {
    /// The API's address; `None`: where the keys are.
    pub endpoint: Option<String>,
    /// File of the keys; `None`: the environment, a systemd credential, or the file of the tool `cs`.
    pub credentials: Option<PathBuf>,
    /// PEM file of the certificate authorities that are taken instead of the system's.
    pub ca: Option<PathBuf>,
    /// Which hash signs requests.
    pub signature: SignatureHash,
    /// Zone of new volumes, by id or name; `None`: that of this host.
    pub zone: Option<String>,
    /// Disk offering of new volumes, by id; `None`: one that takes any size.
    pub offering: Option<String>,
    /// Project that owns the volumes, by id; `None`: the account itself.
    pub project: Option<String>,
    /// This host's VM; `None`: found.
    pub host: Option<VmId>,
    /// Most volumes attached here at once.
    pub most_disks: u32,
    /// How long the cloud keeps a deleted volume.
    pub recoverable_for: Duration,
    /// Deadline of a call, all its tries together.
    pub timeout: Duration,
    /// How long a call that got no answer may still take effect.
    pub late_answers: Duration,
}

/// `[cloudstack]` as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileCloudStack {
    endpoint: Option<Address>,
    credentials: Option<PathBuf>,
    ca: Option<PathBuf>,
    signature: Option<SignatureHash>,
    zone: Option<Word>,
    offering: Option<Id>,
    project: Option<Id>,
    host: Option<Host>,
    most_disks: Option<Within<1, 256>>,
    recoverable_for: Option<Within<0, 315_360_000>>,
    timeout: Option<Within<3, 600>>,
    late_answers: Option<Within<1, 3600>>,
}

/// An address without user, password and query: it is shown and logged.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct Address(String);

impl TryFrom<String> for Address {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        const LIKE: &str = "the endpoint is a plain address like https://cloud.example/client/api, without user and ?";
        let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).ok_or(LIKE)?;
        let plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b'@' | b'?' | b'#' | b'"' | b'\\');
        if rest.is_empty() || rest.starts_with('/') || !rest.bytes().all(plain) {
            return Err(LIKE);
        }
        Ok(Self(text))
    }
}

/// A name: something on one line.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct Word(String);

impl TryFrom<String> for Word {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        if text.trim().is_empty() || text.chars().any(char::is_control) {
            return Err("this is no name or id: it is empty, or holds control characters");
        }
        Ok(Self(text))
    }
}

/// An id of the cloud.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct Id(String);

impl TryFrom<String> for Id {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match uuid::Uuid::try_parse(&text) {
            Ok(id) if id.hyphenated().to_string() == text => Ok(Self(text)),
            _ => Err(format!("{text:?} is no id: a lower-case UUID with dashes is wanted")),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
struct Host(VmId);

impl TryFrom<String> for Host {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        VmId::parse(&text).map(Self).map_err(|e| e.to_string())
    }
}

impl Picker<'_> {
    /// A value that nothing stands in for: `without` says what happens instead.
    fn optional<T: ToString>(&mut self, name: &'static str, value: Option<T>, without: &str) -> Option<T> {
        let shown = value.as_ref().map(T::to_string);
        self.pick(name, None, shown, without.to_owned(), String::clone);
        value
    }

    fn path(&mut self, name: &'static str, value: Option<PathBuf>, without: &str) -> Result<Option<PathBuf>, Problem> {
        let value = value.map(|path| absolute(&path)).transpose()?;
        self.optional(name, value.as_deref().map(path_text), without);
        Ok(value)
    }
}

impl CloudStackConfig {
    pub(super) fn build(p: &mut Picker<'_>, own: FileCloudStack) -> Result<Self, Problem> {
        let seconds = |n: &u64| format!("{n} s");
        let endpoint = p.optional("cloudstack.endpoint", own.endpoint.map(|a| a.0), "as the source of the keys says");
        let credentials = p.path(
            "cloudstack.credentials",
            own.credentials,
            "CLOUDSTACK_* variables, the systemd credential cloudstack, or the file of cs",
        )?;
        let ca = p.path("cloudstack.ca", own.ca, "the system's")?;
        let signature =
            p.pick("cloudstack.signature", None, own.signature, SignatureHash::Auto, SignatureHash::to_string);
        let zone = p.optional("cloudstack.zone", own.zone.map(|w| w.0), "that of this host");
        let offering = p.optional("cloudstack.offering", own.offering.map(|i| i.0), "one that takes any size");
        let project = p.optional("cloudstack.project", own.project.map(|i| i.0), "none");
        let host = p.optional("cloudstack.host", own.host.map(|h| h.0), "found");
        let most_disks = p.pick("cloudstack.most_disks", None, own.most_disks.map(|n| n.0), MOST_DISKS, u64::to_string);
        let recoverable =
            p.pick("cloudstack.recoverable_for", None, own.recoverable_for.map(|n| n.0), RECOVERABLE_FOR, seconds);
        let timeout = p.pick("cloudstack.timeout", None, own.timeout.map(|n| n.0), TIMEOUT, seconds);
        let late = p.pick("cloudstack.late_answers", None, own.late_answers.map(|n| n.0), LATE_ANSWERS, seconds);
        Ok(Self {
            endpoint,
            credentials,
            ca,
            signature,
            zone,
            offering,
            project,
            host,
            most_disks: u32::try_from(most_disks).unwrap_or(u32::MAX),
            recoverable_for: Duration::from_secs(recoverable),
            timeout: Duration::from_secs(timeout),
            late_answers: Duration::from_secs(late),
        })
    }
}
