//! The ways out: power off, reset, crash. Each says so before it goes.

use crate::ports::{inw, outb, outw};
use crate::{console, gates};

/// The ACPI PM1a event block: status, then enable (ACPI 6.5, 4.8.3.1).
const PM1A_STATUS: u16 = 0x600;
const PM1A_ENABLE: u16 = 0x602;
const POWER_BUTTON: u16 = 1 << 8;
/// What reads from a port that nothing answers.
const NO_DEVICE: u16 = 0xffff;
/// The button is looked at this often: a port access costs as much as a small interrupt.
const LOOK_NS: u64 = 100_000_000;

/// The ACPI power button, polled.
pub struct PowerButton {
    next_look_ns: u64,
}

impl PowerButton {
    /// None where there is no such hardware.
    pub fn find() -> Option<Self> {
        // SAFETY: reading the status has no effect, and the enable bit only lets the button show.
        unsafe {
            if inw(PM1A_STATUS) == NO_DEVICE {
                return None;
            }
            outw(PM1A_ENABLE, POWER_BUTTON);
        }
        Some(Self { next_look_ns: 0 })
    }

    /// Whether somebody has pressed it.
    pub fn is_pressed(&mut self, now_ns: u64) -> bool {
        if now_ns < self.next_look_ns {
            return false;
        }
        self.next_look_ns = now_ns + LOOK_NS;
        // SAFETY: reading the status has no effect.
        unsafe { inw(PM1A_STATUS) & POWER_BUTTON != 0 }
    }
}

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
