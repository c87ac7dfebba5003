//! Which of two incarnations of one VM a new agent keeps: an agent died while a prepare replaced the
//! one that never ran.

use bellwether_types::Epoch;

/// What the runtime directory and the process table say of one that was left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leftover {
    pub epoch: Epoch,
    /// Its process is there.
    pub lives: bool,
    pub may_have_run: bool,
}

impl Leftover {
    /// The one that may have run stays, else the newer; never one that was released.
    pub fn rank(&self, floor: Epoch) -> impl Ord + use<> {
        (self.epoch > floor, self.lives && self.may_have_run, self.epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_may_have_run_stays() {
        let left =
            |epoch, may_have_run| Leftover { epoch: Epoch(epoch), lives: true, may_have_run };
        let floor = Epoch(1);
        assert!(left(2, true).rank(floor) > left(3, false).rank(floor));
        assert!(left(3, false).rank(floor) > left(2, false).rank(floor));
        assert!(left(2, false).rank(floor) > left(1, true).rank(floor), "1 was released");
    }
}
