//! The tree through a real mount, as a user would: real shells, real loop devices.

mod common;
