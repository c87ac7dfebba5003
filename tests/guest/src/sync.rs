//! A lock for the few things that a panic must reach, too.

use core::cell::UnsafeCell;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering};

/// A spin lock. With one processor it is never contended: interrupt handlers take no locks.
pub struct Lock<T> {
    held: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `with` gives one holder at a time access to the value.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    pub const fn new(value: T) -> Self {
        Self { held: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    pub fn with<R>(&self, body: impl FnOnce(&mut T) -> R) -> R {
        while self.held.swap(true, Ordering::Acquire) {
            spin_loop();
        }
        // SAFETY: the flag was clear and is ours now.
        let result = body(unsafe { &mut *self.value.get() });
        self.held.store(false, Ordering::Release);
        result
    }

    /// Breaks the lock: for the report of a fatal error, after which nobody goes on.
    pub fn seize(&self) {
        self.held.store(false, Ordering::Release);
    }
}
