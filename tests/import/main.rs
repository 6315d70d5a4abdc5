//! `volfs import`, on dumps that a real MariaDB server made.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]

#[path = "../tree/common.rs"]
mod common;
mod dumps;
mod incident;
mod record;
mod server;
