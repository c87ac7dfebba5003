//! Work at a rate: a bucket that each tick fills with its share.

use crate::pages::PAGE_BYTES;

const NS_PER_S: u128 = 1_000_000_000;
/// After a long pause the guest does not catch up on all of it.
const CREDIT_NS_MAX: u64 = 100_000_000;

/// A rate in MiB/s, and what of it has not been spent.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    mib_s: u64,
    /// In byte-nanoseconds, so that slow rates lose nothing to rounding.
    credit: u128,
}

impl Budget {
    pub fn new(mib_s: u64) -> Self {
        Self { mib_s, credit: 0 }
    }

    pub fn mib_s(&self) -> u64 {
        self.mib_s
    }

    pub fn set_mib_s(&mut self, mib_s: u64) {
        *self = Self::new(mib_s);
    }

    /// Adds the share of the time that has passed.
    pub fn accrue(&mut self, elapsed_ns: u64) {
        let rate = u128::from(self.mib_s) << 20;
        let most = (rate * u128::from(CREDIT_NS_MAX)).max(2 * PAGE_COST);
        self.credit = (self.credit + rate * u128::from(elapsed_ns)).min(most);
    }

    /// Takes one page's worth, if there is that much.
    pub fn take_page(&mut self) -> bool {
        let affordable = self.has_page();
        if affordable {
            self.credit -= PAGE_COST;
        }
        affordable
    }

    pub fn has_page(&self) -> bool {
        self.credit >= PAGE_COST
    }
}

const PAGE_COST: u128 = PAGE_BYTES as u128 * NS_PER_S;
