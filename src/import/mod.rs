//! The old database's dump, read: [`source`] unpacks, [`lexer`] and [`dump`] read the rows that
//! matter as a stream, [`decide`] says what becomes of them, [`report`] tells. Writes nothing.

mod decide;
mod dump;
mod lexer;
mod report;
mod source;

pub use decide::{JobBy, NewJob, NewVolume, Plan, Unended, decide};
pub use dump::{Choice, Dump, Refused, Tables, read};
pub use report::{Doubt, Kind, Report};
pub use source::Source;

#[cfg(test)]
mod tests;
