//! What a patterned page holds: the generation, the page's number, and a stream that depends on both.
//!
//! Every byte can be told from the key alone, so a page that is stale, torn, shifted or another page's
//! is found at the first byte that differs. The stream does not compress.

pub const WORDS: usize = 512;

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// Which contents: the seed of the run, the number of the page, and how often it was rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    pub seed: u64,
    pub page: u64,
    pub generation: u32,
}

/// The finalizer of SplitMix64: each output bit depends on each input bit.
pub const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Key {
    /// The 512 little-endian words of the page.
    pub fn words(self) -> impl Iterator<Item = u64> {
        let base = mix(self.seed ^ mix(self.page ^ mix(u64::from(self.generation))));
        let head = [u64::from(self.generation), self.page];
        let stream = (2..WORDS as u64).map(move |i| mix(base.wrapping_add(i.wrapping_mul(GAMMA))));
        head.into_iter().chain(stream)
    }
}
