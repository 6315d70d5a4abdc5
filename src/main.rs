//! The volfs program.

fn main() {}
