//! The highest term of a leader that this node has heard of, from orders about any VM and from
//! renewals. A leader of a lower term is deposed, and its orders, however late, are not obeyed.
//!
//! A term is durable before anything is done under it, so that a later agent refuses the same.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bellwether_agent_core::Terms as Known;
use bellwether_types::ClusterId;

use crate::runtime_dir::{RuntimeDir, RuntimeError};

/// The terms of this node's cluster.
#[derive(Debug)]
pub struct Terms {
    runtime: Arc<RuntimeDir>,
    cluster: ClusterId,
    known: Mutex<Known>,
}

impl Terms {
    /// Goes on where an earlier agent ended.
    pub fn open(runtime: Arc<RuntimeDir>, cluster: ClusterId) -> Result<Self, RuntimeError> {
        let saved = runtime.term(cluster)?;
        Ok(Self { runtime, cluster, known: Mutex::new(Known::new(saved)) })
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a term, and gives the highest, which is durable then. On an error it counts for
    /// as long as this agent lives, and is written at the next call.
    pub fn hear(&self, term: u64) -> Result<u64, RuntimeError> {
        let mut known = self.lock();
        if let Some(highest) = known.hear(term) {
            self.runtime.save_term(self.cluster, highest)?;
            known.note(highest);
        }
        Ok(known.highest())
    }

    /// The highest term that was heard of.
    pub fn highest(&self) -> u64 {
        self.lock().highest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(number: u128) -> ClusterId {
        ClusterId::from_uuid(uuid::Uuid::from_u128(number))
    }

    #[test]
    fn terms_only_grow_and_outlive_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let open = |number| {
            let runtime = Arc::new(RuntimeDir::open(dir.path()).unwrap());
            Terms::open(runtime, cluster(number)).unwrap()
        };
        let terms = open(1);
        assert_eq!(terms.hear(5).unwrap(), 5);
        let file = dir.path().join(format!("term.{}.json", cluster(1)));
        std::fs::remove_file(&file).unwrap();
        assert_eq!(terms.hear(4).unwrap(), 5);
        assert!(!file.exists(), "written only when it grows");
        assert_eq!(terms.hear(6).unwrap(), 6);
        drop(terms);
        assert_eq!(open(1).highest(), 6);
        assert_eq!(open(2).highest(), 0, "another cluster has terms of its own");
    }

    #[test]
    fn a_term_that_cannot_be_written_counts_and_is_written_later() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = Arc::new(RuntimeDir::open(dir.path()).unwrap());
        let terms = Terms::open(runtime, cluster(1)).unwrap();
        let file = dir.path().join(format!("term.{}.json", cluster(1)));
        std::fs::create_dir(&file).unwrap();
        terms.hear(5).unwrap_err();
        assert_eq!(terms.highest(), 5);
        std::fs::remove_dir(&file).unwrap();
        assert_eq!(terms.hear(1).unwrap(), 5);
        assert!(file.is_file());
    }
}
