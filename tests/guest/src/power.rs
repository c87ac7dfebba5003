//! The ways out: power off, reset, crash. Each says so before it goes.

use crate::ports::{outb, outw};
use crate::{console, gates};

/// The ACPI PM1a control block where QEMU has it, and Bellwether's VMM, too.
const PM1A_CONTROL: u16 = 0x604;
const SLEEP_ENABLE: u16 = 0x2000;
const KEYBOARD_CONTROLLER: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;
const RESET_CONTROL: u16 = 0xcf9;

pub fn off(reason: &str) -> ! {
    say(reason);
    // SAFETY: the machine is meant to stop here.
    unsafe { outw(PM1A_CONTROL, SLEEP_ENABLE) };
    pulse_reset()
}

pub fn reset() -> ! {
    say("reset");
    pulse_reset()
}

pub fn crash() -> ! {
    say("crash");
    gates::triple_fault()
}

fn say(reason: &str) {
    console::line(format_args!("exit {reason}"));
    console::flush();
}

fn pulse_reset() -> ! {
    // SAFETY: the machine is meant to stop here.
    unsafe {
        outb(KEYBOARD_CONTROLLER, PULSE_RESET);
        outb(RESET_CONTROL, 6);
    }
    gates::stop()
}
