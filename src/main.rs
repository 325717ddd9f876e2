//! The thenar command.
fn main() {}
