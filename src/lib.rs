//! volfs: one daemon is the single source of truth for every volume, and its interface is a
//! mounted filesystem.

pub mod cloud;
pub mod command;
pub mod devices;
pub mod engine;
pub mod error;
pub mod failpoint;
pub mod fs;
pub mod model;
pub mod store;
pub mod sys;
