//! How a cloud is set up.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use uuid::Uuid;

use crate::hypervisor::{BooksOnly, Hypervisor};
use crate::loops::LoopHypervisor;
use crate::sign::Signatures;

/// A zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zone {
    /// Its UUID.
    pub id: String,
    /// Its name.
    pub name: String,
    /// `Enabled` or `Disabled`.
    pub state: String,
}

impl Zone {
    /// An enabled zone of this name.
    pub fn new(name: &str) -> Self {
        Zone { id: uuid(), name: name.to_owned(), state: "Enabled".into() }
    }
}

/// A disk offering.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offering {
    /// Its UUID.
    pub id: String,
    /// Its name.
    pub name: String,
    /// GiB of a fixed offering; `None` for a customised one.
    pub size: Option<u64>,
    /// `shared` or `local`.
    pub storage: String,
    /// Volumes of it keep their size.
    pub strict: bool,
}

impl Offering {
    /// One whose size is chosen at creation.
    pub fn custom(name: &str) -> Self {
        Offering { id: uuid(), name: name.to_owned(), size: None, storage: "shared".into(), strict: false }
    }

    /// One of a fixed size in GiB.
    pub fn fixed(name: &str, gib: u64) -> Self {
        Offering { size: Some(gib), ..Offering::custom(name) }
    }
}

/// An account with a pair of keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Its UUID.
    pub id: String,
    /// Its name.
    pub name: String,
    /// `apiKey`.
    pub key: String,
    /// What signs.
    pub secret: String,
    /// A root admin: sees all with `listall`, and more fields.
    pub admin: bool,
    /// Disabled or locked: 401.
    pub disabled: bool,
    /// Ids of projects it is a member of.
    pub projects: Vec<String>,
    /// Commands that its role forbids.
    pub forbidden: Vec<String>,
    /// Most volumes it may have; `None` for no limit.
    pub most_volumes: Option<usize>,
}

impl Account {
    /// A plain user's account with new keys.
    pub fn new(name: &str) -> Self {
        Account {
            id: uuid(),
            name: name.to_owned(),
            // Characters of base64url, as the real keys have.
            key: format!("K-{}_{}", Uuid::new_v4().simple(), Uuid::new_v4().simple()),
            secret: format!("S-{}_{}", Uuid::new_v4().simple(), Uuid::new_v4().simple()),
            admin: false,
            disabled: false,
            projects: Vec::new(),
            forbidden: Vec::new(),
            most_volumes: None,
        }
    }
}

/// A VM besides the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVm {
    /// Its UUID.
    pub id: String,
    /// Its host name.
    pub name: String,
    /// `Running`, `Stopped`, …
    pub state: String,
    /// `KVM`, `VMware`, `XenServer`.
    pub hypervisor: String,
    /// The zone's id; `None` for the first zone.
    pub zone: Option<String>,
    /// The owning account's name; `None` for the first account.
    pub account: Option<String>,
    /// Whether it has a root disk.
    pub root_disk: bool,
    /// Most data disks.
    pub most_disks: u32,
}

impl NewVm {
    /// A running VM on KVM with a root disk of 1 GiB.
    pub fn new(name: &str) -> Self {
        NewVm {
            id: uuid(),
            name: name.to_owned(),
            state: "Running".into(),
            hypervisor: "KVM".into(),
            zone: None,
            account: None,
            root_disk: true,
            most_disks: 32,
        }
    }

    /// The same, stopped.
    pub fn stopped(name: &str) -> Self {
        NewVm { state: "Stopped".into(), ..NewVm::new(name) }
    }
}

/// How a cloud is set up. All of it has defaults that make a small working cloud: one zone, one
/// account, a customised and a fixed offering of 5 GiB, and the host's VM.
pub struct Options {
    /// Where it listens.
    pub listen: String,
    /// Where volumes' files are; `None` for a temporary directory.
    pub dir: Option<PathBuf>,
    /// The VM that the tests play: made first, running.
    pub host: NewVm,
    /// Bytes of each root disk.
    pub root_disk: u64,
    /// Further VMs.
    pub vms: Vec<NewVm>,
    /// The zones; VMs and volumes are in the first unless they say otherwise.
    pub zones: Vec<Zone>,
    /// The disk offerings.
    pub offerings: Vec<Offering>,
    /// The accounts; the first one owns the VMs.
    pub accounts: Vec<Account>,
    /// Which disks are real.
    pub hypervisor: Box<dyn Hypervisor>,
    /// How long a job takes in its turn.
    pub job_delay: Duration,
    /// The same for single commands.
    pub delays: HashMap<String, Duration>,
    /// Which signatures are taken.
    pub signatures: Signatures,
    /// `enforce.post.requests.and.timestamps`.
    pub enforce_post: bool,
    /// Calls of a plain user's account in one second; `None` for no limit.
    pub rate_limit: Option<u32>,
    /// `default.page.size`.
    pub page_size: usize,
    /// Whether `customjobid` is taken.
    pub custom_job_ids: bool,
    /// Whether listVolumes changes the order of volumes made in one second from call to call: the
    /// real one promises none.
    pub unstable_order: bool,
    /// Bytes a volume gets more than asked for: storage that rounds up.
    pub extra_bytes: u64,
    /// `cloudstackversion`.
    pub version: String,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            listen: "127.0.0.1:0".into(),
            dir: None,
            host: NewVm::new("migration-host"),
            root_disk: 1 << 30,
            vms: Vec::new(),
            zones: vec![Zone::new("zone-1")],
            offerings: vec![Offering::custom("custom"), Offering::fixed("5 GiB", 5)],
            accounts: vec![Account::new("migration")],
            hypervisor: Box::new(BooksOnly),
            job_delay: Duration::from_millis(20),
            delays: HashMap::new(),
            signatures: Signatures::Sha1,
            enforce_post: false,
            rate_limit: None,
            page_size: 500,
            custom_job_ids: true,
            unstable_order: false,
            extra_bytes: 0,
            version: "4.22.0.0".into(),
        }
    }
}

impl Options {
    /// The defaults, with loop devices of this machine as the host VM's disks. Needs root.
    pub fn with_loops() -> Self {
        Options::default().loops()
    }

    /// Has the host VM's disks be loop devices of this machine; `host` must be final.
    pub fn loops(mut self) -> Self {
        self.hypervisor = Box::new(LoopHypervisor::new([self.host.id.clone()]));
        self
    }
}

/// A random UUID as CloudStack writes them.
pub(crate) fn uuid() -> String {
    Uuid::new_v4().to_string()
}
