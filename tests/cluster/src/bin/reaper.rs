//! Waits for the harness to end, and then ends and removes what it left of a cluster.
#![forbid(unsafe_code)]

use std::io::Read;
use std::path::Path;

use bellwether_cluster_tests::process::{DISMISSED, kill_all_of, remove_root};

fn main() {
    let Some(root) = std::env::args_os().nth(1) else { return };
    let mut words = Vec::new();
    // The pipe ends when the harness does, however it ends.
    let read = std::io::stdin().read_to_end(&mut words);
    if read.is_ok() && words != DISMISSED {
        kill_all_of(Path::new(&root));
        remove_root(Path::new(&root));
    }
}
