//! The agent of one Bellwether node.

fn main() {}
