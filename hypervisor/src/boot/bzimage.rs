//! A kernel as a bzImage (Linux: Documentation/arch/x86/boot.rst), entered in long mode.
//!
//! ```text
//! 0x000  real-mode code, of which only the setup header from 0x1f1 on matters here
//! N      the 64-bit kernel, N = (setup_sects + 1) * 512; its 64-bit entry is 0x200 behind
//! ```

use super::BootError;
use super::bytes::{u16_at, u32_at, u64_at};
use super::source::Source;
use crate::{GuestMemory, layout};

const SECTOR: u64 = 512;
/// The setup header ends before this, in the file as in `boot_params`.
const HEADER_END: usize = 0x290;

/// Offsets in the file, and in `boot_params`, into which the header is copied.
pub const SETUP_HEADER: usize = 0x1f1;
const SYSTEM_SIZE: usize = 0x1f4;
const JUMP_OFFSET: usize = 0x201;
const MAGIC: usize = 0x202;
const PROTOCOL: usize = 0x206;
const INITRD_ADDRESS_MAX: usize = 0x22c;
const XLOAD_FLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PREFERRED_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;

/// The first protocol with a 64-bit entry.
const PROTOCOL_MIN: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// An opened and checked bzImage.
pub struct Image {
    source: Source,
    /// The file up to the end of the setup header.
    head: [u8; HEADER_END],
    body_at: u64,
    body_bytes: u64,
}

impl Image {
    /// Whether a file that begins with these bytes is meant to be one.
    pub fn is_one(head: &[u8]) -> bool {
        head.get(MAGIC..MAGIC + 4) == Some(b"HdrS")
    }

    pub fn new(source: Source) -> Result<Self, BootError> {
        let mut head = [0; HEADER_END];
        source.read(&mut head, 0)?;
        let path = source.path();
        let refuse = |why| Err(BootError::BadBzImage { path, why });
        if u16_at(&head, PROTOCOL) < PROTOCOL_MIN || u16_at(&head, XLOAD_FLAGS) & XLF_KERNEL_64 == 0
        {
            return refuse(
                "it has no 64-bit entry point; give a 64-bit kernel, Linux 3.8 or newer",
            );
        }
        let sectors = match head[SETUP_HEADER] {
            0 => 4,
            sectors => u64::from(sectors),
        };
        let body_at = (sectors + 1) * SECTOR;
        // What follows, such as a signature, is not part of the kernel.
        let body_bytes = u64::from(u32_at(&head, SYSTEM_SIZE)) * 16;
        if body_bytes <= ENTRY_64 {
            return refuse("its header names no kernel behind it");
        }
        let body_bytes = body_bytes.min(source.bytes().saturating_sub(body_at));
        if body_bytes + 16 <= u64::from(u32_at(&head, SYSTEM_SIZE)) * 16 {
            return Err(BootError::Truncated { what: "kernel", path: source.path() });
        }
        Ok(Self { source, head, body_at, body_bytes })
    }

    /// The kernel unpacks itself where it prefers to be. Returns where what it needs for that ends.
    pub fn check_fits(&self, memory_end: u64) -> Result<u64, BootError> {
        let address = self.address();
        let path = self.source.path();
        if address < layout::HIGH_START {
            return Err(BootError::TooLow { path, address });
        }
        let bytes = u64::from(u32_at(&self.head, INIT_SIZE)).max(self.body_bytes);
        let end = address.checked_add(bytes).filter(|&end| end <= memory_end);
        end.ok_or(BootError::TooLarge { path, address, bytes, end: memory_end })
    }

    /// The kernel reads a command line of at most so many bytes.
    pub fn check_cmdline(&self, bytes: usize) -> Result<(), BootError> {
        let max = u32_at(&self.head, CMDLINE_SIZE);
        match bytes as u64 <= u64::from(max) {
            true => Ok(()),
            false => Err(BootError::CmdlineTooLong { path: self.source.path(), bytes, max }),
        }
    }

    pub fn load(&self, memory: &GuestMemory) -> Result<(), BootError> {
        self.source.copy(memory, self.body_at, self.body_bytes, self.address())
    }

    /// The first address behind all that an initrd may use.
    pub fn initrd_end(&self) -> u64 {
        u64::from(u32_at(&self.head, INITRD_ADDRESS_MAX)) + 1
    }

    /// Where the kernel is entered in long mode.
    pub fn entry(&self) -> u64 {
        self.address() + ENTRY_64
    }

    /// The setup header, which begins at [`SETUP_HEADER`] and says by itself how long it is.
    pub fn setup_header(&self) -> &[u8] {
        let end = MAGIC + usize::from(self.head[JUMP_OFFSET]);
        &self.head[SETUP_HEADER..end.min(HEADER_END)]
    }

    fn address(&self) -> u64 {
        u64_at(&self.head, PREFERRED_ADDRESS)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use proptest::prelude::*;

    pub const ADDRESS: u64 = 0x100_0000;

    /// A file with the header of a current kernel, and a body of `body` bytes.
    pub fn file_bytes(body: usize) -> Vec<u8> {
        let mut raw = vec![0; 2 * SECTOR as usize + body];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        put(SETUP_HEADER, &[1]);
        put(SYSTEM_SIZE, &(body.div_ceil(16) as u32).to_le_bytes());
        put(JUMP_OFFSET, &[0x6a]);
        put(MAGIC, b"HdrS");
        put(PROTOCOL, &0x20fu16.to_le_bytes());
        put(INITRD_ADDRESS_MAX, &0x7fff_ffffu32.to_le_bytes());
        put(XLOAD_FLAGS, &XLF_KERNEL_64.to_le_bytes());
        put(CMDLINE_SIZE, &2047u32.to_le_bytes());
        put(PREFERRED_ADDRESS, &ADDRESS.to_le_bytes());
        put(INIT_SIZE, &0x40_0000u32.to_le_bytes());
        raw
    }

    pub fn image_of(bytes: &[u8]) -> Result<Image, BootError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        Image::new(Source::open("kernel", file.path()).unwrap())
    }

    #[test]
    fn a_kernel_is_where_its_header_says() {
        let image = image_of(&file_bytes(8000)).unwrap();
        assert_eq!(image.entry(), ADDRESS + 0x200);
        assert_eq!(image.initrd_end(), 0x8000_0000);
        assert_eq!(image.setup_header().len(), 0x26c - 0x1f1);
        // It needs more to unpack itself than it has.
        assert_eq!(image.check_fits(1 << 30).unwrap(), ADDRESS + 0x40_0000);
        let refused = image.check_fits(ADDRESS + 0x3f_ffff).unwrap_err().to_string();
        assert!(refused.contains("more memory"), "{refused}");
        assert!(image.check_cmdline(2047).is_ok() && image.check_cmdline(2048).is_err());
    }

    #[test]
    fn what_is_not_a_whole_64_bit_kernel_is_refused() {
        let refused = |bytes: &[u8]| image_of(bytes).err().unwrap().to_string();
        let whole = file_bytes(8000);
        assert!(refused(&whole[..7000]).contains("ends in the middle"));
        assert!(refused(&whole[..0x210]).contains("ends in the middle"));
        let mut old = whole.clone();
        old[PROTOCOL] = 0x0b;
        assert!(refused(&old).contains("64-bit"));
        let mut narrow = whole.clone();
        narrow[XLOAD_FLAGS] = 0;
        assert!(refused(&narrow).contains("64-bit"));
        let mut empty = whole;
        empty[SYSTEM_SIZE..SYSTEM_SIZE + 4].fill(0);
        assert!(refused(&empty).contains("no kernel behind it"));
    }

    proptest! {
        #[test]
        fn any_header_is_survived(head in proptest::collection::vec(any::<u8>(), 0..0x80)) {
            let mut bytes = file_bytes(2000);
            bytes[SETUP_HEADER..SETUP_HEADER + head.len()].copy_from_slice(&head);
            if let Ok(image) = image_of(&bytes) {
                let _end = image.check_fits(1 << 30);
                let _header = image.setup_header();
            }
        }
    }
}
