//! Just enough of ACPI's machine language (ACPI 6.5, chapter 20) for the DSDT of [`super::acpi`].

/// `Name (path, value)`
pub fn name(path: [u8; 4], value: &[u8]) -> Vec<u8> {
    [&[0x08], &path[..], value].concat()
}

/// `Device (path) { body }`
pub fn device(path: [u8; 4], body: &[Vec<u8>]) -> Vec<u8> {
    [&[0x5b, 0x82], &package_length(&[&path[..], &body.concat()].concat())[..]].concat()
}

/// `Scope (\path) { body }`
pub fn scope(path: [u8; 4], body: &[Vec<u8>]) -> Vec<u8> {
    let content = [b"\\", &path[..], &body.concat()].concat();
    [&[0x10], &package_length(&content)[..]].concat()
}

/// An integer of 32 bits.
pub fn dword(value: u32) -> Vec<u8> {
    [&[0x0c], &value.to_le_bytes()[..]].concat()
}

/// A small integer.
pub const fn byte(value: u8) -> [u8; 2] {
    [0x0a, value]
}

/// `Package { elements }` of small integers.
pub fn package(elements: &[u8]) -> Vec<u8> {
    let mut content = vec![elements.len() as u8];
    content.extend(elements.iter().flat_map(|&element| byte(element)));
    [&[0x12], &package_length(&content)[..]].concat()
}

/// `ResourceTemplate { descriptors }`, with its end tag.
pub fn resources(descriptors: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = descriptors.concat();
    bytes.extend([0x79, 0]);
    let content = [&[0x0a, bytes.len() as u8], &bytes[..]].concat();
    [&[0x11], &package_length(&content)[..]].concat()
}

/// `EisaId ("PNPxxxx")`
pub fn pnp_id(number: u16) -> Vec<u8> {
    let [high, low] = number.to_be_bytes();
    dword(u32::from_le_bytes([0x41, 0xd0, high, low]))
}

/// `IO (Decode16, port, port, 1, count)`
pub fn io(port: u16, count: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x47, 1, low, high, low, high, 1, count]
}

/// `IRQNoFlags () { irq }`
pub fn irq(irq: u32) -> Vec<u8> {
    let [low, high] = (1u16 << irq).to_le_bytes();
    vec![0x22, low, high]
}

/// `WordBusNumber` (kind 2) or `WordIO` (kind 1) of a bridge's window.
pub fn word_range(kind: u8, flags: u8, first: u16, last: u16) -> Vec<u8> {
    let mut raw = vec![0x88, 0x0d, 0, kind, 0x0c, flags];
    for word in [0, first, last, 0, last.wrapping_sub(first).wrapping_add(1)] {
        raw.extend(word.to_le_bytes());
    }
    raw
}

/// `DWordMemory` of a bridge's window, not cacheable, read and write.
pub fn dword_memory(first: u32, last: u32) -> Vec<u8> {
    let mut raw = vec![0x87, 0x17, 0, 0, 0x0c, 1];
    for word in [0, first, last, 0, last - first + 1] {
        raw.extend(word.to_le_bytes());
    }
    raw
}

/// Prefixes `content` with its length, which counts the length's own bytes as well.
fn package_length(content: &[u8]) -> Vec<u8> {
    let mut raw = if content.len() + 1 < 64 {
        vec![(content.len() + 1) as u8]
    } else {
        let length = content.len() + 2;
        vec![0x40 | (length & 0xf) as u8, (length >> 4) as u8]
    };
    raw.extend(content);
    raw
}
