//! The bytes of one write to a `control` file, as a [`Command`]. Pure.
//!
//! A command is one line: a verb, then words and `key=value` pairs in any order, separated by
//! spaces or tabs. Bare words fill the verb's names first, in the order of its usage line, and are
//! its flags after that; so every name that the contract allows can be said, `force` and `nowait`
//! included. The one exception is the optional DISK of `claim`, where `nowait` is always the flag.

use std::collections::VecDeque;
use std::time::Duration;

use crate::error::Error;
use crate::model::{BadName, DiskName, JobId, OpId, RecordId, Slot, SnapshotName, Verb, VmId, VolumeId};

/// Which `control` file was written: verbs differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// `/control`.
    Root,
    /// `jobs/JOB/control`.
    Job,
    /// `jobs/JOB/volumes/UUID/control`.
    Volume,
}

/// One parsed command: what to do, and how the caller waits for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// What is asked. Two commands are *equal*, and join, when their actions are.
    pub action: Action,
    /// `timeout=`: how long the caller waits; zero is until a signal, `None` the verb's default.
    pub timeout: Option<Duration>,
    /// `nowait`: answer as soon as the operation is journaled.
    pub nowait: bool,
}

/// What a command asks for (rows C1 to C14).
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Action {
    /// C1. `size` in bytes.
    Create {
        disk: DiskName,
        size: u64,
        offering: Option<String>,
        zone: Option<String>,
        name: Option<String>,
    },
    /// C2.
    Claim {
        volume: VolumeId,
        disk: Option<DiskName>,
        from: Option<RecordId>,
    },
    /// C3, C11. `vm` `None`: this host.
    Attach {
        vm: Option<VmId>,
        slot: Option<Slot>,
    },
    /// C4, C11.
    Detach {
        vm: Option<VmId>,
        force: bool,
    },
    /// C5. `size` in bytes.
    Resize {
        size: u64,
    },
    /// C6.
    Snapshot {
        name: SnapshotName,
        crash: bool,
    },
    Revert {
        name: SnapshotName,
    },
    DeleteSnapshot {
        name: SnapshotName,
    },
    /// C7.
    Delete {
        volume: VolumeId,
        expunge: bool,
    },
    /// C8.
    Release {
        volume: VolumeId,
    },
    /// C9.
    Move {
        job: JobId,
    },
    /// C10.
    Disk {
        name: DiskName,
    },
    /// C12.
    Destroy {
        job: JobId,
    },
    /// C13. `vm` only at the root.
    Reconcile {
        vm: Option<VmId>,
    },
    /// C14; at a job (no id) it stops the job's `destroy`.
    Cancel {
        id: Option<OpId>,
    },
    Abandon {
        id: OpId,
    },
}

impl Action {
    /// The verb.
    pub fn verb(&self) -> Verb {
        match self {
            Action::Create { .. } => Verb::Create,
            Action::Claim { .. } => Verb::Claim,
            Action::Attach { .. } => Verb::Attach,
            Action::Detach { .. } => Verb::Detach,
            Action::Resize { .. } => Verb::Resize,
            Action::Snapshot { .. } => Verb::Snapshot,
            Action::Revert { .. } => Verb::Revert,
            Action::DeleteSnapshot { .. } => Verb::DeleteSnapshot,
            Action::Delete { .. } => Verb::Delete,
            Action::Release { .. } => Verb::Release,
            Action::Move { .. } => Verb::Move,
            Action::Disk { .. } => Verb::Disk,
            Action::Destroy { .. } => Verb::Destroy,
            Action::Reconcile { .. } => Verb::Reconcile,
            Action::Cancel { .. } => Verb::Cancel,
            Action::Abandon { .. } => Verb::Abandon,
        }
    }
}

/// Longest write taken as a command, in bytes.
pub const LONGEST: usize = 4096;

/// Longest `timeout=`, in seconds: ten years of 365 days. `timeout=0` waits longer: until a signal.
pub const LONGEST_TIMEOUT: u64 = 10 * 365 * 86_400;

/// Largest SIZE, in bytes: what a file offset, and an SQLite integer, can hold.
pub const LARGEST_SIZE: u64 = i64::MAX as u64;

const BLANKS: [char; 2] = [' ', '\t'];

impl Place {
    /// The verbs that this `control` takes, in the contract's order.
    pub fn verbs(self) -> &'static [Verb] {
        match self {
            Place::Root => &[Verb::Reconcile, Verb::Cancel, Verb::Abandon],
            Place::Job => &[
                Verb::Create,
                Verb::Claim,
                Verb::Attach,
                Verb::Detach,
                Verb::Snapshot,
                Verb::Revert,
                Verb::DeleteSnapshot,
                Verb::Move,
                Verb::Destroy,
                Verb::Cancel,
            ],
            Place::Volume => &[
                Verb::Attach,
                Verb::Detach,
                Verb::Resize,
                Verb::Snapshot,
                Verb::Revert,
                Verb::DeleteSnapshot,
                Verb::Delete,
                Verb::Release,
                Verb::Move,
                Verb::Disk,
                Verb::Reconcile,
            ],
        }
    }

    fn file(self) -> &'static str {
        match self {
            Place::Root => "the root's control",
            Place::Job => "a job's control",
            Place::Volume => "a volume's control",
        }
    }

    /// How a verb is written here, without `timeout=` and `nowait`, which every verb takes;
    /// `None` where the verb is not taken.
    pub fn usage(self, verb: Verb) -> Option<&'static str> {
        Some(match (self, verb) {
            (Place::Root, Verb::Reconcile) => "reconcile [vm=UUID]",
            (Place::Root, Verb::Cancel) => "cancel ID",
            (Place::Root, Verb::Abandon) => "abandon ID",
            (Place::Job, Verb::Create) => "create DISK SIZE [offering=UUID] [zone=UUID or name] [name=...]",
            (Place::Job, Verb::Claim) => "claim UUID [DISK] [from=RECORD]",
            (Place::Job, Verb::Attach) => "attach [vm=UUID]",
            (Place::Job, Verb::Detach) => "detach [vm=UUID]",
            (Place::Job, Verb::Destroy) => "destroy JOB",
            (Place::Job, Verb::Cancel) => "cancel",
            (Place::Volume, Verb::Attach) => "attach [vm=UUID] [root | device_id=N]",
            (Place::Volume, Verb::Detach) => "detach [vm=UUID] [force]",
            (Place::Volume, Verb::Resize) => "resize SIZE",
            (Place::Volume, Verb::Delete) => "delete UUID [expunge]",
            (Place::Volume, Verb::Release) => "release UUID",
            (Place::Volume, Verb::Disk) => "disk NAME",
            (Place::Volume, Verb::Reconcile) => "reconcile",
            (Place::Job | Place::Volume, Verb::Snapshot) => "snapshot NAME [crash]",
            (Place::Job | Place::Volume, Verb::Revert) => "revert NAME",
            (Place::Job | Place::Volume, Verb::DeleteSnapshot) => "delete-snapshot NAME",
            (Place::Job | Place::Volume, Verb::Move) => "move JOB",
            _ => return None,
        })
    }
}

/// Parses one write. Nothing is done on an error, which names the word that is wrong and what
/// would be right; each is EINVAL.
pub fn parse(bytes: &[u8], place: Place) -> Result<Command, Error> {
    let line = one_line(bytes)?;
    let (first, rest) = line.split_once(BLANKS).unwrap_or((line, ""));
    let verb = find_verb(first, place)?;
    let usage = place.usage(verb).unwrap_or_default();
    let mut words = Words::split(rest, verb, usage)?;

    let action = match verb {
        Verb::Create => Action::Create {
            disk: words.name("DISK", DiskName::parse)?,
            size: size(&words.required("SIZE")?)?,
            offering: words.key("offering").map(|v| uuid("offering", v)).transpose()?,
            zone: words.key("zone"),
            name: words.key("name"),
        },
        Verb::Claim => Action::Claim {
            volume: words.name("UUID", VolumeId::parse)?,
            disk: match words.optional_unless("nowait") {
                Some(word) => Some(DiskName::parse(&word).map_err(short)?),
                None => None,
            },
            from: words.parsed_key("from", RecordId::parse)?,
        },
        Verb::Attach => {
            let vm = words.parsed_key("vm", VmId::parse)?;
            let slot = if place == Place::Volume { slot(&mut words, vm)? } else { None };
            Action::Attach { vm, slot }
        }
        Verb::Detach => Action::Detach {
            vm: words.parsed_key("vm", VmId::parse)?,
            force: place == Place::Volume && words.flag("force"),
        },
        Verb::Resize => Action::Resize { size: size(&words.required("SIZE")?)? },
        Verb::Snapshot => {
            Action::Snapshot { name: words.name("NAME", SnapshotName::parse)?, crash: words.flag("crash") }
        }
        Verb::Revert => Action::Revert { name: words.name("NAME", SnapshotName::parse)? },
        Verb::DeleteSnapshot => Action::DeleteSnapshot { name: words.name("NAME", SnapshotName::parse)? },
        Verb::Delete => Action::Delete { volume: words.name("UUID", VolumeId::parse)?, expunge: words.flag("expunge") },
        Verb::Release => Action::Release { volume: words.name("UUID", VolumeId::parse)? },
        Verb::Move => Action::Move { job: words.name("JOB", JobId::parse)? },
        Verb::Disk => Action::Disk { name: words.name("NAME", DiskName::parse)? },
        Verb::Destroy => Action::Destroy { job: words.name("JOB", JobId::parse)? },
        Verb::Reconcile => {
            Action::Reconcile { vm: if place == Place::Root { words.parsed_key("vm", VmId::parse)? } else { None } }
        }
        Verb::Cancel => {
            Action::Cancel { id: if place == Place::Root { Some(op_id(&words.required("ID")?)?) } else { None } }
        }
        Verb::Abandon => Action::Abandon { id: op_id(&words.required("ID")?)? },
        Verb::Mkdir | Verb::Rmdir | Verb::Set => return Err(unknown_verb(first, place)),
    };
    let timeout = words.key("timeout").map(|v| timeout(&v)).transpose()?;
    let nowait = words.flag("nowait");
    words.nothing_left()?;
    Ok(Command { action, timeout, nowait })
}

/// The command in its canonical spelling, as the journal and `operations/` show it; [`parse`] reads it back.
pub fn spell(action: &Action) -> String {
    let mut words = vec![action.verb().to_string()];
    let mut pair = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            words.push(if key.is_empty() { value } else { format!("{key}={value}") });
        }
    };
    match action {
        Action::Create { disk, size, offering, zone, name } => {
            pair("", Some(disk.to_string()));
            pair("", Some(size.to_string()));
            pair("offering", offering.clone());
            pair("zone", zone.clone());
            pair("name", name.clone());
        }
        Action::Claim { volume, disk, from } => {
            pair("", Some(volume.to_string()));
            pair("", disk.as_ref().map(DiskName::to_string));
            pair("from", from.map(|r| r.to_string()));
        }
        Action::Attach { vm, slot } => {
            pair("vm", vm.map(|v| v.to_string()));
            match slot {
                Some(Slot::Root) => pair("", Some("root".into())),
                Some(Slot::Id(n)) => pair("device_id", Some(n.to_string())),
                None => {}
            }
        }
        Action::Detach { vm, force } => {
            pair("vm", vm.map(|v| v.to_string()));
            pair("", force.then(|| "force".into()));
        }
        Action::Resize { size } => pair("", Some(size.to_string())),
        Action::Snapshot { name, crash } => {
            pair("", Some(name.to_string()));
            pair("", crash.then(|| "crash".into()));
        }
        Action::Revert { name } | Action::DeleteSnapshot { name } => pair("", Some(name.to_string())),
        Action::Delete { volume, expunge } => {
            pair("", Some(volume.to_string()));
            pair("", expunge.then(|| "expunge".into()));
        }
        Action::Release { volume } => pair("", Some(volume.to_string())),
        Action::Move { job } | Action::Destroy { job } => pair("", Some(job.to_string())),
        Action::Disk { name } => pair("", Some(name.to_string())),
        Action::Reconcile { vm } => pair("vm", vm.map(|v| v.to_string())),
        Action::Cancel { id } => pair("", id.map(|i| i.to_string())),
        Action::Abandon { id } => pair("", Some(id.to_string())),
    }
    words.join(" ")
}

fn malformed(what: String) -> Error {
    Error::Malformed { what }
}

/// Foreign text in a sentence: escaped, and cut where it is long.
fn quote(text: &str) -> String {
    const MOST: usize = 80;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("`{}...`", text[..end].escape_debug()),
        None => format!("`{}`", text.escape_debug()),
    }
}

/// A name that is wrong because it is long would fill `error` with itself.
fn short(mut bad: BadName) -> Error {
    const MOST: usize = 200;
    // As long as it is shown: escaped.
    let shown = |room: &mut usize, (at, c): (usize, char)| {
        *room = room.saturating_sub(c.escape_debug().len());
        Some((at, *room))
    };
    if let Some((end, _)) = bad.text.char_indices().scan(MOST + 1, shown).find(|(_, room)| *room == 0) {
        bad.text.truncate(end);
        bad.text.push_str("...");
    }
    Error::BadName(bad)
}

fn one_line(bytes: &[u8]) -> Result<&str, Error> {
    if bytes.len() > LONGEST {
        return Err(malformed(format!("a command has at most {LONGEST} bytes, this write has {}", bytes.len())));
    }
    let text = std::str::from_utf8(bytes).map_err(|e| {
        malformed(format!("a command is UTF-8 text, but byte {} of this one is not", e.valid_up_to() + 1))
    })?;
    let mut lines = text.split('\n').map(|l| l.trim_matches(BLANKS)).filter(|l| !l.is_empty());
    let Some(line) = lines.next() else {
        return Err(malformed("an empty write is no command: write a verb, see `cat control`".into()));
    };
    if let Some(second) = lines.next() {
        return Err(malformed(format!("one command a write, but {} follows on a second line", quote(second))));
    }
    if let Some(c) = line.chars().find(|c| c.is_control() && *c != '\t') {
        let hint = if c == '\r' { "end the line with a newline alone" } else { "a command is printable text" };
        return Err(malformed(format!("the command holds the control character {}: {hint}", quote(&c.to_string()))));
    }
    if line.starts_with('#') {
        return Err(malformed("a comment is no command: a write starts with its verb".into()));
    }
    Ok(line)
}

fn find_verb(word: &str, place: Place) -> Result<Verb, Error> {
    match Verb::parse(word) {
        Some(verb) if place.verbs().contains(&verb) => Ok(verb),
        _ => Err(unknown_verb(word, place)),
    }
}

fn unknown_verb(word: &str, place: Place) -> Error {
    let here: Vec<&str> = place.verbs().iter().map(|v| v.as_str()).collect();
    let hint = match Verb::parse(&word.to_ascii_lowercase()) {
        Some(verb) if place.verbs().contains(&verb) => format!("write it as `{verb}`"),
        Some(verb) => match [Place::Root, Place::Job, Place::Volume].into_iter().find(|p| p.verbs().contains(&verb)) {
            Some(other) => format!("it belongs into {}; here are {}", other.file(), here.join(", ")),
            None => format!("here are {}", here.join(", ")),
        },
        None => format!("here are {}", here.join(", ")),
    };
    malformed(format!("{} is no verb of {}: {hint}", quote(word), place.file()))
}

/// What follows the verb, taken apart; what the verb does not take stays behind and is refused.
struct Words {
    bare: VecDeque<String>,
    keys: Vec<(String, String)>,
    usage: &'static str,
}

impl Words {
    fn split(mut rest: &str, verb: Verb, usage: &'static str) -> Result<Self, Error> {
        let mut words = Words { bare: VecDeque::new(), keys: Vec::new(), usage };
        loop {
            rest = rest.trim_start_matches(BLANKS);
            if rest.is_empty() {
                return Ok(words);
            }
            if let Some(name) = rest.strip_prefix("name=").filter(|_| verb == Verb::Create) {
                // A tab may separate words, but a name that holds one would break every table.
                if name.contains('\t') {
                    return Err(malformed("`name=` holds a tab: a name is printable text".into()));
                }
                words.push_key("name", name.trim_matches(BLANKS))?;
                return Ok(words);
            }
            let (word, after) = rest.split_once(BLANKS).unwrap_or((rest, ""));
            rest = after;
            match word.split_once('=') {
                Some((key, value)) => words.push_key(key, value)?,
                None => words.bare.push_back(word.to_owned()),
            }
        }
    }

    fn push_key(&mut self, key: &str, value: &str) -> Result<(), Error> {
        if value.is_empty() {
            return Err(malformed(format!("{} has no value: {}", quote(&format!("{key}=")), self.takes())));
        }
        if self.keys.iter().any(|(k, _)| k == key) {
            return Err(malformed(format!("{} is given twice", quote(&format!("{key}=")))));
        }
        self.keys.push((key.to_owned(), value.to_owned()));
        Ok(())
    }

    fn takes(&self) -> String {
        format!("it is `{}`, and timeout=SECONDS and nowait as always", self.usage)
    }

    fn required(&mut self, what: &str) -> Result<String, Error> {
        self.bare.pop_front().ok_or_else(|| malformed(format!("{what} is missing: {}", self.takes())))
    }

    fn name<T>(&mut self, what: &str, parse: impl FnOnce(&str) -> Result<T, BadName>) -> Result<T, Error> {
        parse(&self.required(what)?).map_err(short)
    }

    fn optional_unless(&mut self, flag: &str) -> Option<String> {
        if self.bare.front()? == flag { None } else { self.bare.pop_front() }
    }

    fn flag(&mut self, flag: &str) -> bool {
        let found = self.bare.iter().position(|w| w == flag);
        found.and_then(|i| self.bare.remove(i)).is_some()
    }

    fn key(&mut self, key: &str) -> Option<String> {
        let found = self.keys.iter().position(|(k, _)| k == key)?;
        Some(self.keys.remove(found).1)
    }

    fn parsed_key<T>(&mut self, key: &str, parse: impl FnOnce(&str) -> Result<T, BadName>) -> Result<Option<T>, Error> {
        self.key(key).map(|v| parse(&v).map_err(short)).transpose()
    }

    fn nothing_left(self) -> Result<(), Error> {
        if let Some((key, _)) = self.keys.first() {
            return Err(malformed(format!("{} is not taken here: {}", quote(&format!("{key}=")), self.takes())));
        }
        if let Some(word) = self.bare.front() {
            return Err(malformed(format!("{} is not taken here: {}", quote(word), self.takes())));
        }
        Ok(())
    }
}

/// A plain decimal number: no sign, no blanks, as `u64`.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().ok())?
}

/// SIZE: bytes, or a number with K, M, G or T (powers of 1024); 1 to [`LARGEST_SIZE`] bytes.
pub fn size(text: &str) -> Result<u64, Error> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        Some(b'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let rule = "a size is bytes, or a number with K, M, G or T (powers of 1024)";
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if !plain {
        return Err(malformed(format!("{} is no size: {rule}", quote(text))));
    }
    let bytes = number(digits).and_then(|n| n.checked_mul(1 << shift)).filter(|n| *n <= LARGEST_SIZE);
    match bytes {
        Some(0) => Err(malformed(format!("{} is no size: a volume has at least one byte", quote(text)))),
        Some(bytes) => Ok(bytes),
        None => Err(malformed(format!("{} is too large: at most {LARGEST_SIZE} bytes", quote(text)))),
    }
}

fn uuid(key: &str, text: String) -> Result<String, Error> {
    // Offerings have no type of their own; the spelling rule is that of every id.
    match VolumeId::parse(&text) {
        Ok(_) => Ok(text),
        Err(_) => Err(malformed(format!("`{key}=` takes a lower-case UUID with dashes, not {}", quote(&text)))),
    }
}

fn slot(words: &mut Words, vm: Option<VmId>) -> Result<Option<Slot>, Error> {
    let id = words.key("device_id");
    if words.flag("root") {
        if id.is_some() {
            return Err(malformed("`root` is device id 0: give it or `device_id=`, not both".into()));
        }
        return match vm {
            Some(_) => Ok(Some(Slot::Root)),
            None => Err(malformed("`root` needs `vm=UUID`, a stopped VM without a root disk".into())),
        };
    }
    let Some(id) = id else { return Ok(None) };
    match number(&id).and_then(|n| u32::try_from(n).ok()) {
        Some(0) => Err(malformed("`device_id=0` is the root disk: say `root`, with `vm=UUID`".into())),
        Some(3) => Err(malformed("`device_id=3` is kept for the CD drive: take another number".into())),
        Some(n) => Ok(Some(Slot::Id(n))),
        None => Err(malformed(format!("`device_id=` takes a number above 0, not {}", quote(&id)))),
    }
}

fn op_id(text: &str) -> Result<OpId, Error> {
    number(text).and_then(|n| i64::try_from(n).ok()).filter(|n| *n > 0).map(OpId).ok_or_else(|| {
        malformed(format!("{} is no operation: an ID is a number above 0, see `ls operations`", quote(text)))
    })
}

fn timeout(text: &str) -> Result<Duration, Error> {
    number(text).filter(|n| *n <= LONGEST_TIMEOUT).map(Duration::from_secs).ok_or_else(|| {
        malformed(format!(
            "`timeout=` takes whole seconds from 0 (until a signal) to {LONGEST_TIMEOUT}, not {}",
            quote(text)
        ))
    })
}

#[cfg(test)]
mod tests;
