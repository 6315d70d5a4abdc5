//! A CloudStack look-alike for tests: real HTTP on loopback, signed requests, async jobs, states,
//! refusals, and every fault that a client must live with. What it does follows
//! `reference/cloudstack-api.md`, whose sections the comments name.
//!
//! It shares no code with volfs: what is wrong in both would be seen by neither.
//!
//! ```no_run
//! use fakecloud::{FakeCloud, Fault, Kind, Moment, Options};
//! # fn main() -> std::io::Result<()> {
//! let cloud = FakeCloud::start(Options::with_loops())?;
//! cloud.fault(Fault::new("attachVolume", Kind::ServerRestart(Moment::Done)));
//! println!("{} {} {}", cloud.endpoint(), cloud.key(), cloud.secret());
//! # Ok(())
//! # }
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`options`] | how a cloud is set up |
//! | [`cloud`], [`admin`] | the handle: looking, waiting, faults, actions behind the client's back |
//! | [`fault`] | what can go wrong |
//! | [`state`] | what the cloud knows |
//! | [`hypervisor`], [`loops`] | devices: the trait, and loop devices of this machine |
//! | [`sign`] | signatures |
//! | `http`, `api`, `params`, `answer` | from the socket to a command and back |
//! | `commands`, `run`, `work`, `tagging` | the commands, their jobs, what these do |
//! | `core`, `device`, `storage`, `time` | what all of them share |

pub mod admin;
mod answer;
mod api;
pub mod cloud;
mod commands;
mod core;
mod device;
pub mod fault;
mod http;
pub mod hypervisor;
pub mod loops;
pub mod options;
mod params;
mod run;
pub mod sign;
pub mod state;
mod storage;
mod tagging;
mod time;
mod work;

pub use cloud::FakeCloud;
pub use fault::{DeviceFault, Fault, Kind, Moment, View};
pub use hypervisor::{BooksOnly, Hypervisor, Identity, Plug};
pub use loops::LoopHypervisor;
pub use options::{Account, NewVm, Offering, Options, Zone};
pub use sign::Signatures;
pub use state::{Done, Effect, GIB, Job, Request, Snapshot, Vm, Volume};
