//! The engine against scripted fakes of its traits. Names are promises; a name that begins with a
//! rule's number of the contract (`x1_`, `v6_`, `c4_`, `d3_`, `r10_`) tests that rule.

mod admission;
mod cloud;
mod devices;
mod fakes;
mod imported;
mod jobs;
mod model;
mod operations;
mod ownership;

mod recovery;
mod search;
mod settle;
mod snapshot_sets;
mod snapshots;
mod world;
