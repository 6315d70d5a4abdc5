//! Composition root: builds store, cloud, devices, engine and fs; signals; order of start and stop.
//!
//! Start: the state directory's lock first, then the kernel, the provider, the engine, the mount.
//! Stop: no new commands, parked callers answered, the mount away, then the rest. What runs in the
//! provider goes on or is settled at the next start; the journal knows it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{SignalKind, signal};

use crate::binding::{self, Here};
use crate::cloud::Cloud;
use crate::cloud::cloudstack::{self, Client, ClientOptions, CloudStack, Signature, whoami};
use crate::cloud::loopdev::{LoopCloud, LoopOptions};
use crate::config::{CloudStackConfig, Config, Problem, Provider, SignatureHash, SizeCheck};
use crate::devices::{self, Devices, KernelDevices};
use crate::engine::events::{Event, Events};
use crate::engine::{self, Engine};
use crate::failpoint;
use crate::fs::{self, Adopted, Serving};
use crate::handover::Handover;
use crate::keeper::Held;
use crate::kept::{self, Memory};
use crate::model::{BootId, Fence, JobRow, Timestamp, VmId};
use crate::store::{KEEP_OPERATIONS, SqliteStore, Store};

/// How long a start waits for the first look at the cloud before the tree is served without it.
const FIRST_LOOK: Duration = Duration::from_secs(1);
/// Between two looks before a volume's absence is believed (row V6 of the contract).
const ABSENCE_GAP: Duration = Duration::from_secs(10);
/// The same where callers of an earlier daemon wait: a tenth of what is promised to them.
const FIRST_LOOK_ADOPTED: Duration = Duration::from_millis(100);
/// Events kept for slow readers of `events/`.
const EVENTS_KEPT: usize = 4096;
/// How long a stop waits for what still runs on worker threads.
const WORKERS_END: Duration = Duration::from_secs(1);

/// A running daemon.
pub struct Daemon {
    engine: Arc<Engine>,
    serving: Serving,
    runtime: tokio::runtime::Runtime,
    handover: Handover,
}

impl Daemon {
    /// Starts everything; when this returns, the tree answers.
    pub fn start(config: &Config, handover: Handover, held: Option<Held>) -> Result<Self, Problem> {
        match Self::begin(config, &handover, held) {
            Ok((engine, serving, runtime)) => Ok(Daemon { engine, serving, runtime, handover }),
            Err(problem) => {
                handover.problem(&problem);
                Err(problem)
            }
        }
    }

    fn begin(
        config: &Config,
        handover: &Handover,
        held: Option<Held>,
    ) -> Result<(Arc<Engine>, Serving, tokio::runtime::Runtime), Problem> {
        one_heap();
        failpoint::begin();
        failpoint::hit("daemon.start");
        let (memory, adopted) = handover.open(held)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("volfs")
            .enable_all()
            .build()
            .map_err(|e| Problem::with("cannot start worker threads", e))?;
        let _inside = runtime.enter();
        let store = match config.read_only {
            true => SqliteStore::open_read_only(&config.state_dir),
            false => SqliteStore::open_keeping(&config.state_dir, config.history.max(KEEP_OPERATIONS)),
        };
        let store = Arc::new(store.map_err(|e| Problem(e.to_string()))?);
        let mut own_state = vec![config.state_dir.clone()];
        if config.provider == Provider::Loop {
            own_state.push(config.loop_provider.dir.clone());
        }
        let devices = KernelDevices::start(devices::Options {
            own_state,
            keep_open: !config.read_only,
            ..devices::Options::default()
        })
        .map_err(|e| Problem::with("cannot watch block devices", e))?;
        let boot = devices.boot();
        let (cloud, here) = runtime.block_on(provider(config, boot))?;
        let foreign = binding::foreign(config, &here, store.past())?;
        let is_foreign = foreign.is_some();
        let read_only = foreign.or(config.read_only.then(|| "it was started with --read-only".to_owned()));
        let options = engine::Options {
            interval: config.reconcile_interval,
            absence_gap: ABSENCE_GAP,
            exact_size: config.size_check == SizeCheck::Exact,
            read_only,
            foreign: is_foreign,
            history: config.history,
            events: Arc::new(events(memory.as_ref(), adopted.as_ref())),
            asked: adopted.as_ref().map_or(Vec::new(), asked),
            clock: Arc::new(|| Timestamp::from(SystemTime::now())),
        };
        let engine = Engine::start(store, cloud, devices, options, runtime.handle().clone())
            .map_err(|e| Problem::with("the record", e))?;
        // Serving without the first look is right, too: what was not seen is `unknown` until then.
        let most = if adopted.is_some() { FIRST_LOOK_ADOPTED } else { FIRST_LOOK };
        let _ = runtime.block_on(async { tokio::time::timeout(most, engine.first_round()).await });
        give_back_memory();
        let is_adopted = adopted.is_some();
        let serving = fs::serve(
            engine.clone(),
            fs::Options {
                mountpoint: config.mountpoint.clone(),
                gid: config.group.gid,
                export_template: config.export_name.template().to_owned(),
            },
            memory.clone(),
            adopted,
        )
        .map_err(|e| Problem(e.to_string()))?;
        if let Err(problem) = handover.serving(serving.fuse(), memory.as_ref(), is_adopted) {
            serving.stop();
            return Err(problem);
        }
        tracing::info!(at = %config.mountpoint.display(), state = %config.state_dir.display(), "the tree answers");
        drop(_inside);
        Ok((engine, serving, runtime))
    }

    /// Serves until SIGTERM, SIGINT, or until the mount is gone.
    pub fn run_until_signal(self) -> Result<(), Problem> {
        let mut ended = self.serving.ended();
        let given_up = self.serving.given_up();
        let why = self.runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate()).map_err(|e| Problem::with("cannot hear SIGTERM", e))?;
            let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| Problem::with("cannot hear SIGINT", e))?;
            let mut kept = true;
            let mut given_up = std::pin::pin!(given_up);
            loop {
                break Ok::<_, Problem>(Some(tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                    _ = ended.wait_for(Option::is_some) => "the mount is gone",
                    () = &mut given_up => return Ok(None),
                    () = self.handover.ended(), if kept => {
                        kept = false;
                        self.engine.nobody_follows();
                        continue;
                    }
                }));
            }
        })?;
        let Some(why) = why else { return Err(self.give_up()) };
        tracing::info!("stopping: {why}");
        self.stop();
        Ok(())
    }

    /// Ends this connection for a new one: the next daemon adopts nothing, and mounts.
    fn give_up(self) -> Problem {
        let why = "requests were left that nobody would answer, the tree is mounted anew";
        let problem = Problem(why.to_owned());
        self.handover.problem(&problem);
        if let Err(problem) = self.handover.forget() {
            tracing::error!("{problem}");
        }
        // Were it not aborted, it would end with the last descriptor, which is this process's.
        if let Err(error) = self.serving.abort() {
            tracing::error!("the connection cannot be aborted: {error}");
        }
        self.stop();
        problem
    }

    /// Ends it: parked callers are answered, the mount is taken away.
    pub fn stop(self) {
        let Daemon { engine, serving, runtime, handover } = self;
        handover.stopping();
        engine.shut_down();
        serving.stop();
        drop(engine);
        runtime.shutdown_timeout(WORKERS_END);
    }
}

/// The event stream, going on from the daemon before, and kept for the next one.
fn events(memory: Option<&Arc<Memory>>, adopted: Option<&Adopted>) -> Events {
    let Some(memory) = memory.cloned() else { return Events::new(EVENTS_KEPT) };
    let event = |e: &kept::KeptEvent| Event { seq: e.seq, job: e.job.map(JobRow), line: e.line.as_str().into() };
    let earlier = adopted.map_or(Vec::new(), |a| a.left.events.iter().map(event).collect());
    let keep = move |event: &Event| memory.event(event.seq, event.job.map(|job| job.0), &event.line);
    Events::continued(EVENTS_KEPT, earlier, Some(Box::new(keep)))
}

/// The operations that callers of the daemon before still wait for.
fn asked(adopted: &Adopted) -> Vec<Fence> {
    adopted.left.requests.iter().filter_map(|(_, asked)| asked.fence.map(Fence)).collect()
}

/// Whether this program reads the record that another daemon has open; changes nothing.
pub fn readable(config: &Config) -> Result<(), Problem> {
    SqliteStore::open_read_only(&config.state_dir)
        .and_then(|store| store.load(0))
        .map(drop)
        .map_err(|e| Problem::with("this version cannot take over", e))
}

/// One heap for all threads: the worker threads' own would each keep what a survey of thousands of
/// volumes once needed, and nothing here allocates enough to contend for it.
fn one_heap() {
    // SAFETY: mallopt takes two numbers and changes the allocator's own settings, under its locks.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Loading a large record leaves as much free memory behind as it keeps: the system gets it back.
fn give_back_memory() {
    // SAFETY: malloc_trim only looks at the allocator's own free lists, under its own locks.
    unsafe { libc::malloc_trim(0) };
}

/// The provider that the configuration names, and where that is.
pub(crate) async fn provider(config: &Config, boot: BootId) -> Result<(Arc<dyn Cloud>, Here), Problem> {
    Ok(match config.provider {
        Provider::Loop => {
            let cloud = loop_cloud(config, boot)?;
            let here = Here::Loop { store: cloud.instance(), machine: binding::machine_id()? };
            (cloud, here)
        }
        Provider::Cloudstack => {
            let cloud = cloudstack(config).await?;
            let host = cloud.about().host;
            (cloud, Here::Vm(host))
        }
    })
}

fn loop_cloud(config: &Config, boot: BootId) -> Result<Arc<LoopCloud>, Problem> {
    LoopCloud::open(LoopOptions {
        dir: config.loop_provider.dir.clone(),
        trash_keep: config.loop_provider.trash_keep,
        protect: config.protect.clone(),
        most_disks: config.loop_provider.most_disks,
        capacity: config.loop_provider.capacity,
        boot,
        host: host_id(boot)?,
        read_only: config.read_only,
    })
    .map_err(|e| Problem::with("the loop provider", e))
}

/// The client that the configuration describes.
pub fn cloudstack_client(config: &CloudStackConfig) -> Result<Client, Problem> {
    let options = ClientOptions {
        endpoint: config.endpoint.clone(),
        credentials: config.credentials.clone(),
        ca: config.ca.clone(),
        signature: match config.signature {
            SignatureHash::Auto => Signature::Auto,
            SignatureHash::Sha1 => Signature::Sha1,
            SignatureHash::Sha512 => Signature::Sha512,
        },
        timeout: config.timeout,
        ..ClientOptions::default()
    };
    Client::new(options).map_err(|e| Problem::with("the CloudStack provider", e))
}

async fn cloudstack(config: &Config) -> Result<Arc<CloudStack>, Problem> {
    let client = cloudstack_client(&config.cloudstack)?;
    let host = whoami::find(config.cloudstack.host).await.map_err(Problem)?;
    tracing::info!(endpoint = client.endpoint(), keys = client.source(), %host, "the CloudStack provider");
    Ok(cloudstack_provider(config, client, host.id))
}

/// The provider that the configuration describes, on the VM `host`. Asks nothing.
pub fn cloudstack_provider(config: &Config, client: Client, host: VmId) -> Arc<CloudStack> {
    let own = &config.cloudstack;
    CloudStack::new(
        client,
        cloudstack::Options {
            host,
            zone: own.zone.clone(),
            offering: own.offering.clone(),
            project: own.project.clone(),
            most_disks: own.most_disks,
            recoverable_for: own.recoverable_for,
            protect: config.protect.clone(),
            late: own.late_answers,
        },
    )
}

/// This host as a VM: the machine-id. Without one, this boot: the loop provider's attachments end
/// with the boot anyway.
fn host_id(boot: BootId) -> Result<VmId, Problem> {
    Ok(binding::machine_id()?.unwrap_or(VmId(boot.0)))
}
