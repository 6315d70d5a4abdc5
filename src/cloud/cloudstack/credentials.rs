//! Where endpoint and keys come from, and reading them again when their file changes (page 7.1).
//!
//! Of the environment, a systemd credential and a file named in the configuration there may be one:
//! with two, which cloud is used would depend on who started the daemon. Only where none of them is
//! given, the files of the tool `cs` are looked for.

use std::ffi::OsString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use zeroize::Zeroizing;

use super::secret::{Keys, Secret};

const ENDPOINT: &str = "CLOUDSTACK_ENDPOINT";
const KEY: &str = "CLOUDSTACK_KEY";
const SECRET: &str = "CLOUDSTACK_SECRET";
/// The section where keys are, unless `CLOUDSTACK_REGION` names another for the files of `cs`.
const SECTION: &str = "cloudstack";
/// No file of keys is longer.
const LONGEST: u64 = 64 << 10;
/// A file changed so shortly before it was read may change again without its time telling.
const SETTLED: Duration = Duration::from_secs(2);

type Variables = dyn Fn(&str) -> Option<OsString> + Send + Sync;

/// Looks up a variable. Tests give their own; the environment of a process is shared.
#[derive(Clone)]
pub struct Environment(Arc<Variables>);

impl Environment {
    /// Variables as this function tells them.
    pub fn from_fn(get: impl Fn(&str) -> Option<OsString> + Send + Sync + 'static) -> Self {
        Self(Arc::new(get))
    }

    /// No variables.
    pub fn empty() -> Self {
        Self::from_fn(|_| None)
    }

    fn get(&self, name: &str) -> Option<OsString> {
        (self.0)(name).filter(|value| !value.is_empty())
    }

    fn text(&self, name: &str) -> Result<Option<Zeroizing<String>>, String> {
        let text = |value: OsString| value.into_string().map_err(|_| format!("{name} is not UTF-8"));
        self.get(name).map(|value| text(value).map(Zeroizing::new)).transpose()
    }
}

impl Default for Environment {
    /// The variables of this process.
    fn default() -> Self {
        Self::from_fn(|name| std::env::var_os(name))
    }
}

impl fmt::Debug for Environment {
    /// Nothing of it: it holds secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Environment")
    }
}

/// Where the keys are.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    /// `CLOUDSTACK_ENDPOINT`, `CLOUDSTACK_KEY` and `CLOUDSTACK_SECRET`.
    Environment,
    /// `$CREDENTIALS_DIRECTORY/cloudstack`, which systemd keeps from others.
    Systemd(PathBuf),
    /// A file named in the configuration.
    File(PathBuf),
    /// A file of the tool `cs`, and its section.
    Tool(PathBuf, String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Environment => write!(f, "the environment ({ENDPOINT}, {KEY}, {SECRET})"),
            Source::Systemd(path) => write!(f, "the systemd credential {}", path.display()),
            Source::File(path) => write!(f, "{} (named in the configuration)", path.display()),
            Source::Tool(path, section) => write!(f, "{} (section {section})", path.display()),
        }
    }
}

/// What a source says.
#[derive(Debug)]
struct Found {
    endpoint: Option<String>,
    keys: Keys,
}

/// Tells one content of a file from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, i64),
    /// A chmod that cures a refusal changes only this.
    ctime: (i64, i64),
}

impl Stamp {
    fn of(meta: &std::fs::Metadata) -> Self {
        Self {
            dev: meta.dev(),
            ino: meta.ino(),
            size: meta.size(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

#[derive(Debug)]
struct State {
    keys: Arc<Keys>,
    /// Of the content that was read last; `None` where it may still be changing.
    stamp: Option<Stamp>,
    /// Why the file as it is now was not taken.
    trouble: Option<String>,
}

/// Endpoint and keys, with the file they come from.
#[derive(Debug)]
pub struct Credentials {
    source: Source,
    endpoint: String,
    /// What the source itself said at start.
    said_endpoint: Option<String>,
    state: Mutex<State>,
}

impl Credentials {
    /// Finds the one source. `named` is a file, and `endpoint` an address, from the configuration.
    /// The error is a sentence: no source, two of them, or one that cannot be used.
    pub fn find(named: Option<&Path>, endpoint: Option<&str>, environment: &Environment) -> Result<Self, String> {
        let source = the_one(named, environment)?;
        let (found, stamp) = match source.path() {
            None => (from_environment(environment)?, None),
            Some(_) => from_file(&source)?,
        };
        let said = found.endpoint.map(|e| e.trim_end_matches('/').to_owned());
        let endpoint = match (endpoint.map(|e| e.trim_end_matches('/')), said.as_deref()) {
            (Some(a), Some(b)) if a != b => {
                return Err(format!(
                    "two CloudStack endpoints: {a} in the configuration, and {b} in {source}: keep one"
                ));
            }
            (Some(one), _) | (None, Some(one)) => one.to_owned(),
            (None, None) => {
                return Err(format!(
                    "no CloudStack endpoint: set endpoint in [cloudstack] of the configuration, or in {source}"
                ));
            }
        };
        let state = Mutex::new(State { keys: Arc::new(found.keys), stamp, trouble: None });
        Ok(Self { source, endpoint, said_endpoint: said, state })
    }

    /// The API's address. It stays the same while the daemon runs: another one is another cloud.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Where the keys come from, in words.
    pub fn source(&self) -> String {
        self.source.to_string()
    }

    /// The keys as they are now: one stat, and the file again if it changed. One that cannot be used
    /// leaves the keys as they were, with a warning in the log.
    pub fn keys(&self) -> Arc<Keys> {
        self.look(false)
    }

    /// As [`Credentials::keys`], but reads the file whether it changed or not.
    pub fn keys_again(&self) -> Arc<Keys> {
        self.look(true)
    }

    /// Why the file as it is now was not taken, if so.
    pub fn trouble(&self) -> Option<String> {
        self.state.lock().trouble.clone()
    }

    fn look(&self, anyway: bool) -> Arc<Keys> {
        let mut state = self.state.lock();
        let Some(path) = self.source.path() else { return state.keys.clone() };
        let now = std::fs::metadata(path).map(|meta| Stamp::of(&meta)).ok();
        if !anyway && now.is_some() && now == state.stamp {
            return state.keys.clone();
        }
        match from_file(&self.source).and_then(|found| self.same_endpoint(found)) {
            Ok((keys, stamp)) => {
                if *state.keys != keys {
                    tracing::info!("the CloudStack keys in {} changed and are used from now on", self.source);
                    state.keys = Arc::new(keys);
                }
                state.stamp = stamp;
                state.trouble = None;
            }
            Err(words) => {
                // The file is looked at again at each call: it is hardly meant to stay so.
                state.stamp = None;
                if state.trouble.as_ref() != Some(&words) {
                    tracing::warn!("the CloudStack keys stay as they were: {words}");
                    state.trouble = Some(words);
                }
            }
        }
        state.keys.clone()
    }

    fn same_endpoint(&self, (found, stamp): (Found, Option<Stamp>)) -> Result<(Keys, Option<Stamp>), String> {
        let said = found.endpoint.as_deref().map(|e| e.trim_end_matches('/'));
        match said {
            Some(now) if Some(now) != self.said_endpoint.as_deref() && now != self.endpoint => Err(format!(
                "{} names another endpoint ({now}) than at start ({}): restart volfs to use another cloud",
                self.source, self.endpoint
            )),
            _ => Ok((found.keys, stamp)),
        }
    }
}

impl Source {
    fn path(&self) -> Option<&Path> {
        match self {
            Source::Environment => None,
            Source::Systemd(path) | Source::File(path) | Source::Tool(path, _) => Some(path),
        }
    }
}

fn the_one(named: Option<&Path>, environment: &Environment) -> Result<Source, String> {
    let mut sources = Vec::new();
    let (there, missing): (Vec<_>, Vec<_>) =
        [ENDPOINT, KEY, SECRET].into_iter().partition(|name| environment.get(name).is_some());
    match (there.is_empty(), missing.is_empty()) {
        (true, _) => {}
        (false, true) => sources.push(Source::Environment),
        (false, false) => {
            let list = |names: &[&str]| names.join(" and ");
            return Err(format!("{} is set, but not {}: set all three or none", list(&there), list(&missing)));
        }
    }
    if let Some(dir) = environment.get("CREDENTIALS_DIRECTORY") {
        let path = Path::new(&dir).join("cloudstack");
        if path.exists() {
            sources.push(Source::Systemd(path));
        }
    }
    sources.extend(named.map(|path| Source::File(path.to_owned())));
    match sources.as_slice() {
        [] => tool_file(environment),
        [_] => sources.pop().ok_or_else(|| "no source of CloudStack keys".into()),
        [first, second, ..] => Err(format!(
            "there are two sources of CloudStack keys, {first} and {second}: keep one, so that it is certain which \
             cloud is used"
        )),
    }
}

/// Where `cs` looks, but for its file in the working directory: a daemon has no such place.
fn tool_file(environment: &Environment) -> Result<Source, String> {
    let section = environment.text("CLOUDSTACK_REGION")?.map_or_else(|| SECTION.to_owned(), |name| name.to_string());
    if let Some(path) = environment.get("CLOUDSTACK_CONFIG") {
        return Ok(Source::Tool(path.into(), section));
    }
    if let Some(home) = environment.get("HOME") {
        let path = Path::new(&home).join(".cloudstack.ini");
        if path.exists() {
            return Ok(Source::Tool(path, section));
        }
    }
    Err(format!(
        "there are no CloudStack keys: name a file by credentials in [cloudstack] of the configuration, give a systemd \
         credential cloudstack, set {ENDPOINT}, {KEY} and {SECRET}, or write ~/.cloudstack.ini"
    ))
}

fn from_environment(environment: &Environment) -> Result<Found, String> {
    let text = |name: &str| environment.text(name)?.ok_or_else(|| format!("{name} is not set"));
    let secret = |name: &str| plausible(name, &text(name)?).map(|text| Secret::new(text.to_owned()));
    let keys = Keys { api_key: secret(KEY)?, secret: secret(SECRET)? };
    Ok(Found { endpoint: Some(text(ENDPOINT)?.trim().to_owned()), keys })
}

/// Keys go into forms and HMACs as they are; a blank or control character in one is a mistake.
fn plausible<'a>(name: &str, text: &'a str) -> Result<&'a str, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err(format!("{name} is empty"));
    }
    if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(format!("{name} has a blank or control character inside"));
    }
    Ok(text)
}

/// The stamp is that of the content which was read, and `None` while the file is too young to tell.
fn from_file(source: &Source) -> Result<(Found, Option<Stamp>), String> {
    let (path, section, guarded) = match source {
        Source::Environment => return Err("the environment is no file".into()),
        Source::Systemd(path) => (path, SECTION, true),
        Source::File(path) => (path, SECTION, false),
        Source::Tool(path, section) => (path, section.as_str(), false),
    };
    let shown = path.display();
    let failed = |e: std::io::Error| format!("{shown} with the CloudStack keys cannot be read: {e}");
    // Not blocking: a FIFO in its place would hang every call.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() {
        return Err(format!("{shown} with the CloudStack keys is no regular file"));
    }
    // systemd's own directory keeps others out, and shows an access list's mask as the group's bits.
    if !guarded {
        private(path, &meta)?;
    }
    let text = read_text(&file, meta.size()).map_err(|e| format!("{shown} with the CloudStack keys: {e}"))?;
    let found = parse(&text, section, !matches!(source, Source::Tool(..)));
    let found = found.map_err(|words| format!("{shown}: {words}"))?;
    let young = meta.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
    let settled = young.is_some_and(|age| age > SETTLED);
    Ok((found, settled.then(|| Stamp::of(&meta))))
}

fn private(path: &Path, meta: &std::fs::Metadata) -> Result<(), String> {
    let shown = path.display();
    if meta.mode() & 0o077 != 0 {
        return Err(format!(
            "{shown} with the CloudStack keys can be read by others (mode {:04o}): chmod 600 {shown}",
            meta.mode() & 0o7777
        ));
    }
    let us = rustix::process::geteuid().as_raw();
    if meta.uid() != 0 && meta.uid() != us {
        return Err(format!(
            "{shown} with the CloudStack keys belongs to user {}, who could change it: chown root {shown}, and chmod 600",
            meta.uid()
        ));
    }
    Ok(())
}

fn read_text(file: &File, size: u64) -> Result<Zeroizing<String>, String> {
    if size > LONGEST {
        return Err(format!("{size} bytes are too many for a file of keys"));
    }
    // Enough room from the first: a buffer that grows leaves pieces of the secret behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(LONGEST + 1).unwrap_or(usize::MAX)));
    file.take(LONGEST).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    let text = std::str::from_utf8(&bytes).map_err(|_| "is not UTF-8".to_owned())?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// Reads `endpoint`, `key` and `secret` of one section as Python's ConfigParser does: `=` or `:`,
/// comments only on lines of their own, names in any case. Not by a crate: those keep copies of the
/// secret that nobody erases, and take a second section of the name without a word.
fn parse(text: &str, section: &str, or_top: bool) -> Result<Found, String> {
    let sections = |line: &str| line.strip_prefix('[').and_then(|l| l.strip_suffix(']')).map(|n| n.trim().to_owned());
    let lines = || text.lines().map(str::trim).enumerate().filter(|(_, l)| !l.is_empty() && !l.starts_with(['#', ';']));
    let there = lines().filter(|(_, l)| sections(l).as_deref() == Some(section)).count();
    match there {
        0 if or_top && lines().all(|(_, l)| !l.starts_with('[')) => {}
        0 => return Err(format!("it has no section [{section}]")),
        1 => {}
        _ => return Err(format!("it has the section [{section}] twice")),
    }
    let mut inside = there == 0;
    let (mut endpoint, mut key, mut secret) = (None, None, None);
    for (number, line) in lines() {
        let number = number + 1;
        if line.starts_with('[') {
            let name = sections(line).ok_or_else(|| format!("line {number}: a section's name ends with ]"))?;
            inside = name == section;
            continue;
        }
        if !inside {
            continue;
        }
        let Some((name, value)) = line.split_once(['=', ':']) else {
            return Err(format!("line {number} is neither name = value, nor a section, nor a comment"));
        };
        let place = match name.trim().to_ascii_lowercase().as_str() {
            "endpoint" => &mut endpoint,
            "key" => &mut key,
            "secret" => &mut secret,
            // `cs` keeps its time-outs and the like in the same section.
            _ => continue,
        };
        if place.replace(value.trim()).is_some() {
            return Err(format!("line {number} gives {} a second time", name.trim().to_ascii_lowercase()));
        }
    }
    let needed = |name: &str, value: Option<&str>| match value {
        Some(value) => plausible(name, value).map(|v| Secret::new(v.to_owned())),
        None => Err(format!("it has no {name}")),
    };
    let keys = Keys { api_key: needed("key", key)?, secret: needed("secret", secret)? };
    Ok(Found { endpoint: endpoint.filter(|e| !e.is_empty()).map(str::to_owned), keys })
}

#[cfg(test)]
mod tests;
