//! volfs over a fake CloudStack: real HTTP on loopback, and real loop devices as what is attached.
//!
//! Names begin with a rule's number of the contract, `predecessor_NN_`, or the suite's word.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]

mod answers;
mod check;
#[path = "../tree/common.rs"]
mod common;
mod destroy;
mod drift;
mod failover;
mod faults;
mod identity;
mod import;
mod killed;
mod lane;
mod main_job;
mod predecessor;
mod scripts;
mod secrets;
mod side_by_side;
mod site;
mod snapshots;
mod two;
#[path = "../tree/whole.rs"]
mod whole;
