//! A simulated world: the real engine over a record, a cloud, a kernel and a clock that all obey one
//! seed, with a book of every effect beside it that the engine cannot see.
//!
//! ```text
//! seed ─► plan (steps) ─► play ─► Engine ─► ports: store, sky, kernel ─► State
//!                           │                                             │
//!                           └───────────── oracle: Book ◄─────────────────┘
//! ```
//! One thread, a paused clock, and every id from the seed: a seed is one schedule, always the same.
//! A daemon's death is the end of a *life*: its ports never answer again, and what the cloud has
//! begun goes on. A schedule that fails is shrunk by leaving steps out, and printed as a regression.

mod dice;
mod kernel;
mod oracle;
mod plan;
mod play;
mod regressions;
mod sky;
mod store;
mod suite;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::broadcast;
use tokio::time::Instant;
use uuid::Uuid;

use super::fakes::Record;
use crate::cloud::About;
use crate::devices::DeviceChange;
use crate::model::{BootId, DevNo, Disk, Fence, Mark, RecordId, VmId, VolumeId};
use dice::Dice;
use oracle::Book;

const GIB: u64 = 1 << 30;

/// Where a fault can be armed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Point {
    Begin,
    End,
    Other,
    Find,
    Survey,
    Vm,
    Running,
    FindCreated,
    Create,
    Attach,
    Detach,
    Resize,
    Delete,
    Mark,
}

/// What goes wrong at the next call of a kind. Times in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// No, for good.
    Refuse,
    /// No, for now.
    Busy,
    /// Nothing was started.
    Unreachable,
    /// No clear answer, and nothing happens.
    Lost,
    /// No clear answer, and it happened.
    LostDone,
    /// No clear answer now; the cloud's job acts that much later.
    Straggle(u64),
    /// It happens now, the answer comes that much later.
    LateAnswer(u64),
    /// The cloud's job runs so long, and fails.
    JobFails(u64),
    /// The daemon dies before it happens.
    KillBefore,
    /// It happens, and the daemon dies before it hears so.
    KillAfter,
    /// The daemon dies, and the cloud's job acts that much later.
    KillStraggle(u64),
}

/// A volume in the cloud's books.
#[derive(Debug, Clone)]
struct Vol {
    size: u64,
    attached: Option<(VmId, u32)>,
    mark: Option<Mark>,
    /// The cloud's job on it.
    pending: Option<u64>,
    /// Rises at each attachment: a device of an earlier one is another insertion.
    insertion: u64,
}

struct Sky {
    volumes: BTreeMap<VolumeId, Vol>,
    created: HashMap<Fence, VolumeId>,
    /// Jobs that are not final, and whose.
    jobs: BTreeMap<u64, Fence>,
    next_job: u64,
}

/// A device that the kernel has, and of which attachment.
struct Plugged {
    disk: Disk,
    volume: VolumeId,
    insertion: u64,
}

struct Kernel {
    disks: Vec<Plugged>,
    boot: BootId,
    next_seq: u64,
    /// Devices neither come nor go while set.
    lazy: bool,
    /// No events are sent while set.
    muted: bool,
    /// Somebody has these devices.
    used: Vec<DevNo>,
    /// Our own descriptors by disk sequence number.
    open: BTreeMap<u64, usize>,
}

struct State {
    life: u64,
    dice: Dice,
    record: Record,
    sky: Sky,
    kernel: Kernel,
    armed: Vec<(Point, Fault)>,
    book: Book,
    trace: Option<Vec<String>>,
}

struct Inner {
    state: Mutex<State>,
    events: broadcast::Sender<DeviceChange>,
    about: About,
    record: RecordId,
    /// The other VM.
    other: VmId,
    epoch: Instant,
}

/// One host with its record, cloud and kernel.
#[derive(Clone)]
struct Sim(Arc<Inner>);

impl Sim {
    fn new(seed: u64, traced: bool) -> Self {
        let mut dice = Dice::new(seed);
        let host = VmId(dice.uuid());
        let about = About {
            name: "simulated",
            host,
            most_disks: 20,
            can_force: !seed.is_multiple_of(2),
            snapshots: false,
            detach_wants_sole_opener: seed.is_multiple_of(2),
            size_step: 1,
            late: Duration::from_secs(if seed.is_multiple_of(3) { 0 } else { 5 }),
            prove_host: false,
        };
        let kernel = Kernel {
            disks: Vec::new(),
            boot: BootId(dice.uuid()),
            next_seq: 10,
            lazy: false,
            muted: false,
            used: Vec::new(),
            open: BTreeMap::new(),
        };
        let sky = Sky { volumes: BTreeMap::new(), created: HashMap::new(), jobs: BTreeMap::new(), next_job: 1 };
        let record = RecordId(dice.uuid());
        let other = VmId(dice.uuid());
        let state = State {
            life: 0,
            dice,
            record: Record::default(),
            sky,
            kernel,
            armed: Vec::new(),
            book: Book::default(),
            trace: traced.then(Vec::new),
        };
        let state = Mutex::new(state);
        Sim(Arc::new(Inner { state, events: broadcast::channel(64).0, about, record, other, epoch: Instant::now() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock()
    }

    fn host(&self) -> VmId {
        self.0.about.host
    }

    /// Milliseconds since the world began.
    fn now(&self) -> u64 {
        u64::try_from(self.0.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn say(&self, words: impl FnOnce() -> String) {
        let now = self.now();
        let mut state = self.state();
        let life = state.life;
        if let Some(trace) = &mut state.trace {
            trace.push(format!("{now:>7} ms, life {life}: {}", words()));
        }
    }

    fn violation(&self, words: String) {
        self.say(|| format!("VIOLATION: {words}"));
        self.state().book.violations.push(words);
    }

    /// The fault that is armed for a call of this kind, once.
    fn fault(&self, at: Point) -> Option<Fault> {
        let mut state = self.state();
        let place = state.armed.iter().position(|(point, _)| *point == at)?;
        Some(state.armed.remove(place).1)
    }

    /// How long the next call takes: mostly no time at all.
    fn latency(&self, longest: u64) -> Duration {
        Duration::from_millis(self.state().dice.latency(longest))
    }

    fn kill(&self) {
        self.say(|| "the daemon dies".into());
        self.state().life += 1;
    }
}

/// One life's end of the three traits.
struct Port {
    sim: Sim,
    life: u64,
    /// The record has one writer: batches become durable in the order in which they came.
    writer: tokio::sync::Mutex<()>,
}

impl Port {
    fn dead(&self) -> bool {
        self.sim.state().life != self.life
    }

    async fn never<T>() -> T {
        std::future::pending().await
    }

    async fn alive(&self) {
        if self.dead() {
            Self::never::<()>().await;
        }
    }

    /// Time passes, in which the daemon may die.
    async fn pause(&self, time: Duration) {
        if !time.is_zero() {
            tokio::time::sleep(time).await;
            self.alive().await;
        }
    }

    async fn die<T>(&self) -> T {
        self.sim.kill();
        Self::never().await
    }
}

fn ids(n: u128) -> Uuid {
    Uuid::from_u128(n)
}
