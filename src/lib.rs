//! volfs: one daemon is the single source of truth for every volume, and its interface is a
//! mounted filesystem.
//!
//! # The map
//! ```text
//!  sh, cat, ls, nbdkit …
//!        │ VFS, FUSE
//!  ┌─────▼─────┐ command, caller  ┌────────────────────────┐
//!  │ fs        │ ───────────────► │ engine                 │
//!  │           │ ◄─────────────── │ admission · operations │
//!  └───────────┘ Ticket, World    │ reconcile · recovery   │
//!                                 └──┬────────┬─────────┬──┘
//!                            trait Store  trait Cloud  trait Devices
//!                                    │        │         │
//!                                 SQLite   loopdev   sysfs, uevents, /proc
//! ```
//! | module | what it is | may import |
//! |---|---|---|
//! | [`model`] | names, ids, statuses, marks: pure data | nothing of ours |
//! | [`error`] | failures with their sentence, and the one table to errnos | `model` |
//! | [`command`] | the bytes of one write, as a command; pure | `model`, `error` |
//! | [`engine`] | admission, operations, reconciling; publishes the [`engine::World`] that reads are answered from | `model`, `error`, `command`, the traits |
//! | [`store`] | the record and journal: trait and SQLite | `model`, `error` |
//! | [`cloud`] | the provider: trait, loop devices as a provider, and CloudStack's API | `model`, `error`, `sys` |
//! | [`devices`] | what the kernel has: trait, sysfs, uevents, holders | `model`, `error`, `sys` |
//! | [`fs`] | the tree: node ids, rendering, handles, waiting, the mount; alone knows `fuser` | `engine`, `command`, `model`, `error`, `kept` |
//! | [`kept`] | what outlives a daemon: its callers' requests, handles and events in a memfd | nothing of ours |
//! | [`sys`] | ioctls without a wrapper | nothing of ours |
//! | [`failpoint`] | named points for tests; empty in a release build | nothing of ours |
//! | [`import`] | the dump of the database before volfs: read, decided, told; writes nothing | `model`, `store` |
//! | [`keeper`], [`handover`], [`upgrade`] | the process that holds the mount, and how daemons follow one another | `config`, `fs`, `kept`, `start` |
//! | [`binding`] | what a record is bound to beside itself: provider, machine, its own past | `config`, `model`, `store` |
//! | [`config`], [`daemon`], [`start`], [`check`], [`upkeep`], [`demo`] | the program around it: the only place that knows every layer | everything |
//!
//! `tests/layers.rs` holds the `use` lines against this table.
//!
//! # How a command goes
//! A WRITE to `control` is parsed by [`command`], admitted by the engine's pure table, journaled in
//! the [`store`], done step by step through [`cloud`] and [`devices`], proved by both, recorded,
//! published, and answered. The request is parked meanwhile as a value in `fs::waiters`: no thread
//! waits for it, and a signal of its caller ends the wait, not the operation.
//!
//! # When a daemon dies
//! [`keeper`] holds the FUSE connection and the memory in [`kept`], and starts the next daemon. The
//! kernel sends it every request that was not answered; `fs::before` knows by the fence that each
//! command's request has chosen what became of its operation, and the journal knows the rest.
//!
//! # How a read goes
//! From the published snapshot, and for `device`, `block`, `incarnation` and exports from the
//! kernel's memory at that moment: a pinned descriptor's `diskseq`. No lock of an operation, no SQL,
//! no call of the cloud.

pub mod binding;
pub mod check;
pub mod cloud;
pub mod command;
pub mod config;
pub mod daemon;
pub mod demo;
pub mod devices;
pub mod engine;
pub mod error;
pub mod failpoint;
pub mod fs;
pub mod handover;
pub mod import;
pub mod keeper;
pub mod kept;
pub mod model;
pub mod start;
pub mod store;
pub mod sys;
pub mod upgrade;
pub mod upkeep;

#[cfg(test)]
#[path = "../tests/corpus/fuzz.rs"]
mod fuzz;
