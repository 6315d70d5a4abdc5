//! A record that is not the truth any more: old copies put back, clones, damaged files; and what is
//! done by hand about it. On loop devices and over a fake cloud.
//!
//! `VOLFS_LONG=1` runs the long forms, `VOLFS_SEED` picks the random bytes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]

mod clones;
#[path = "../tree/common.rs"]
mod common;
mod damage;
mod ground;
#[path = "../cloud/site.rs"]
mod site;
mod stale;
mod together;
mod upkeep;
mod verbs;
