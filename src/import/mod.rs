//! The old database's dump, read: `source` unpacks, `lexer` and `dump` read the `rows` that
//! matter as a stream, `decide` says what becomes of them `against` a record, `report` tells.
//! Writes nothing.

mod against;
mod decide;
mod dump;
mod lexer;
mod report;
mod rows;
mod source;

pub use decide::{JobBy, NewJob, NewVolume, Plan, Unended, decide};
pub use dump::{Choice, Dump, Refused, read};
pub use report::{Doubt, Kind, Report};
pub use rows::Tables;
pub use source::Source;

#[cfg(test)]
mod tests;
