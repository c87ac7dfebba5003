//! Port I/O from ring 3, allowed by the I/O permission bitmap of the TSS.

use core::arch::asm;

macro_rules! port {
    ($read:ident, $write:ident, $ty:ty, $register:tt) => {
        /// # Safety
        /// Reading the port must not disturb what the guest relies on.
        pub unsafe fn $read(port: u16) -> $ty {
            let value;
            // SAFETY: the caller vouches for the port.
            unsafe {
                asm!(concat!("in ", $register, ", dx"), in("dx") port, out($register) value,
                     options(nostack, preserves_flags));
            };
            value
        }

        /// # Safety
        /// Writing the port must not disturb what the guest relies on.
        pub unsafe fn $write(port: u16, value: $ty) {
            // SAFETY: the caller vouches for port and value.
            unsafe {
                asm!(concat!("out dx, ", $register), in("dx") port, in($register) value,
                     options(nostack, preserves_flags));
            };
        }
    };
}

port!(inb, outb, u8, "al");
port!(inw, outw, u16, "ax");
port!(inl, outl, u32, "eax");
