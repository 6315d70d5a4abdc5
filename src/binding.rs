//! What a record is bound to beside itself: a provider's instance, this machine, and its own past.
//!
//! `STATE/provider` remembers the first two: the loop store's id with `machine` and the machine-id
//! below it, or the CloudStack VM. The third is the high-water mark that the store keeps. A record
//! that does not fit is a copy: it is served, and changes nothing.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::config::{Config, Problem};
use crate::model::VmId;
use crate::store::Past;

const MACHINE_ID: &str = "/etc/machine-id";

/// Where this daemon is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Here {
    /// At a loop store, on a machine; `None` where it has no machine-id, and nothing to compare.
    Loop {
        /// The store's own id.
        store: Uuid,
        /// The machine's.
        machine: Option<VmId>,
    },
    /// In a cloud, as this VM.
    Vm(VmId),
}

impl Here {
    /// The first line of the file.
    fn instance(&self) -> String {
        match self {
            Here::Loop { store, .. } => store.to_string(),
            Here::Vm(vm) => format!("cloudstack {vm}"),
        }
    }

    /// What an operation's row names as its host, where that is the same after a reboot.
    fn host(&self) -> Option<VmId> {
        match self {
            Here::Loop { machine, .. } => *machine,
            Here::Vm(vm) => Some(*vm),
        }
    }

    fn text(&self) -> String {
        match self {
            Here::Loop { machine: Some(machine), .. } => format!("{}\n{MACHINE} {machine}\n", self.instance()),
            _ => format!("{}\n", self.instance()),
        }
    }
}

impl fmt::Display for Here {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Here::Loop { machine: Some(machine), .. } => write!(f, "machine {machine}"),
            Here::Loop { machine: None, .. } => f.write_str("this machine"),
            Here::Vm(vm) => write!(f, "VM {vm}"),
        }
    }
}

const MACHINE: &str = "machine";

/// What the file says.
struct Known {
    instance: String,
    machine: Option<String>,
}

fn file(config: &Config) -> PathBuf {
    config.state_dir.join("provider")
}

fn known(path: &Path) -> Result<Option<Known>, Problem> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Problem::with(path.display(), error)),
    };
    let mut lines = text.lines();
    let instance = lines.next().unwrap_or_default().trim_end().to_owned();
    let machine = lines.find_map(|line| line.strip_prefix(MACHINE)).map(|rest| rest.trim().to_owned());
    Ok(Some(Known { instance, machine }))
}

const WAYS_OUT: &str = "`volfs adopt --this-host` if this one goes on with its volumes, and no other volfs does; \
                        `volfs adopt --new` if another one does: this one then owns nothing";

/// Why the record is not this place's own, if so. One that is not bound yet is bound here.
///
/// # Errors
/// Another provider, or another loop store: an empty one below a mount point whose mount is missing
/// would make every volume look gone.
pub fn foreign(config: &Config, here: &Here, past: &Past) -> Result<Option<String>, Problem> {
    let path = file(config);
    let known = known(&path)?;
    if let Some(why) = elsewhere(config, here, past, known.as_ref())? {
        return Ok(Some(format!("{why}. {WAYS_OUT} ({} remembers)", path.display())));
    }
    if past.is_behind() {
        let lost = match past.highest {
            0 => "; or `volfs rebuild`, if volfs.db was lost and this is a new one",
            _ => "",
        };
        return Ok(Some(format!(
            "the record is older than its own past (its last operation is {}, {} beside it says {}): it is a copy that \
             was put back, and does not know what happened since. {WAYS_OUT}{lost}",
            past.highest,
            config.state_dir.join("high-water").display(),
            past.mark
        )));
    }
    let whole =
        known.as_ref().is_some_and(|k| k.machine.is_some() || !matches!(here, Here::Loop { machine: Some(_), .. }));
    if !whole && !config.read_only {
        bind(config, here)?;
    }
    Ok(None)
}

fn elsewhere(config: &Config, here: &Here, past: &Past, known: Option<&Known>) -> Result<Option<String>, Problem> {
    let Some(known) = known else {
        // A record that was carried here without what it was bound to: its journal says where it was.
        let carried = past.last_host.zip(here.host()).filter(|(last, now)| last != now);
        return Ok(carried.map(|(last, _)| {
            format!("the record was made on another host ({last} began its last operation), and this is {here}: it is a copy")
        }));
    };
    if known.instance != here.instance() {
        return match here {
            Here::Vm(vm) if known.instance.starts_with("cloudstack ") => Ok(Some(format!(
                "the record was made on {}, and this host is VM {vm}: it is a copy, and owns nothing here, or \
                 cloudstack.host is wrong",
                known.instance
            ))),
            Here::Vm(_) => Err(Problem(format!(
                "the record in {} was made with the loop provider ({}): take another state directory",
                config.state_dir.display(),
                known.instance
            ))),
            Here::Loop { store, .. } => Err(Problem(format!(
                "{} is another loop store ({store}) than the one this record was made with ({}): is its filesystem not \
                 mounted? ({} remembers)",
                config.loop_provider.dir.display(),
                known.instance,
                file(config).display()
            ))),
        };
    }
    match (here, &known.machine) {
        (Here::Loop { machine: Some(now), .. }, Some(then)) if now.to_string() != *then => Ok(Some(format!(
            "the record was made on machine {then}, and this is machine {now}: it is a copy, and owns nothing here"
        ))),
        _ => Ok(None),
    }
}

/// Whether the record may be bound here: never to another provider or another loop store than its own.
///
/// # Errors
/// As [`foreign`].
pub fn may_be_bound(config: &Config, here: &Here) -> Result<(), Problem> {
    let past = Past { highest: 0, mark: 0, last_host: None };
    elsewhere(config, here, &past, known(&file(config))?.as_ref()).map(drop)
}

/// Binds the record to this place.
///
/// # Errors
/// The file cannot be written.
pub fn bind(config: &Config, here: &Here) -> Result<(), Problem> {
    let path = file(config);
    keep(&path, &here.text()).map_err(|e| Problem::with(format_args!("cannot write {}", path.display()), e))
}

/// Makes a file so that a power cut leaves it whole or not there: an empty one would be another
/// provider's for ever after.
fn keep(path: &Path, text: &str) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut file = File::create(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

/// This machine's id, where it has one.
///
/// # Errors
/// There is one that cannot be read, or is none.
pub fn machine_id() -> Result<Option<VmId>, Problem> {
    match std::fs::read_to_string(MACHINE_ID) {
        Ok(text) if text.trim().is_empty() => Ok(None),
        Ok(text) => Uuid::try_parse(text.trim())
            .map(|id| Some(VmId(id)))
            .map_err(|e| Problem::with(format_args!("{MACHINE_ID} is not 32 hexadecimal digits"), e)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Problem::with(MACHINE_ID, error)),
    }
}
