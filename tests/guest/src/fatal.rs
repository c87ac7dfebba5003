//! The end of a guest that found something wrong: one line, and then nothing that could hide it.

use crate::{console, gates, power};
use core::fmt;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

static POWER_OFF: AtomicBool = AtomicBool::new(false);

/// Makes a fatal error power the machine off rather than halt it (parameter `on_fatal=poweroff`).
pub fn power_off_on_fatal(yes: bool) {
    POWER_OFF.store(yes, Ordering::Relaxed);
}

pub fn stop(args: fmt::Arguments) -> ! {
    console::last_line(format_args!("FATAL {args}"));
    if POWER_OFF.load(Ordering::Relaxed) {
        power::off("fatal")
    }
    gates::stop()
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    match info.location() {
        Some(at) => stop(format_args!("panic {}:{} {}", at.file(), at.line(), info.message())),
        None => stop(format_args!("panic {}", info.message())),
    }
}

#[macro_export]
macro_rules! fatal {
    ($($arg:tt)*) => { $crate::fatal::stop(format_args!($($arg)*)) };
}
