//! The virtual machine monitor: one process, one VM.

fn main() {}
