//! The replicated controller of a Bellwether cluster.

fn main() {}
