//! The fake cloud as a program.

fn main() {}
