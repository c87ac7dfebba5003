//! PVH's start info (Xen: xen/include/public/arch-x86/hvm/start_info.h, version 1).

use vm_memory::{Bytes, GuestAddress};

use super::initrd::Initrd;
use super::{BootError, e820};
use crate::{GuestMemory, layout};

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

/// Writes start info, memory map and the list of modules; returns the start info's address.
pub fn write(memory: &GuestMemory, initrd: Option<&Initrd>, rsdp: u64) -> Result<u32, BootError> {
    let put = |what, bytes: &[u8], address| {
        memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|source| BootError::Memory { what, source })
    };
    let map = e820::map(memory);
    put("the memory map", &encode_map(&map), layout::MEMORY_MAP)?;
    let modules = initrd.map(|initrd| module(initrd.address, initrd.bytes()));
    if let Some(module) = &modules {
        put("the list of modules", module, layout::MODULES)?;
    }
    let info = start_info(rsdp, map.len() as u32, modules.is_some());
    put("the start info", &info, layout::START_INFO)?;
    Ok(layout::START_INFO as u32)
}

fn encode_map(map: &[e820::Range]) -> Vec<u8> {
    let mut raw = Vec::with_capacity(map.len() * 24);
    for range in map {
        raw.extend(range.address.to_le_bytes());
        raw.extend(range.bytes.to_le_bytes());
        raw.extend((range.kind as u32).to_le_bytes());
        raw.extend([0; 4]);
    }
    raw
}

/// An entry of the module list: address, bytes, no command line of its own, reserved.
fn module(address: u64, bytes: u64) -> Vec<u8> {
    [address, bytes, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn start_info(rsdp: u64, map_entries: u32, has_module: bool) -> Vec<u8> {
    let modules = if has_module { layout::MODULES } else { 0 };
    let mut raw = Vec::with_capacity(56);
    for word in [MAGIC, VERSION, 0, u32::from(has_module)] {
        raw.extend(word.to_le_bytes());
    }
    for address in [modules, layout::CMDLINE, rsdp, layout::MEMORY_MAP] {
        raw.extend(address.to_le_bytes());
    }
    raw.extend(map_entries.to_le_bytes());
    raw.extend([0; 4]);
    raw
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_info_has_the_layout_of_version_1() {
        let raw = start_info(0xe_0000, 3, false);
        assert_eq!(raw.len(), 56);
        assert_eq!(raw[..8], [0x78, 0xc5, 0x6e, 0x33, 1, 0, 0, 0]);
        assert_eq!(raw[12..24], [0; 12]);
        assert_eq!(raw[32..40], 0xe_0000u64.to_le_bytes());
        assert_eq!(raw[48], 3);
    }

    #[test]
    fn an_initrd_is_the_one_module() {
        let raw = start_info(0xe_0000, 3, true);
        assert_eq!((raw[12], &raw[16..24]), (1, &layout::MODULES.to_le_bytes()[..]));
        let module = module(0x3ff_e000, 5000);
        assert_eq!(module.len(), 32);
        assert_eq!(module[..16], [0x3ff_e000u64.to_le_bytes(), 5000u64.to_le_bytes()].concat());
    }
}
