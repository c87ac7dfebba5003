//! Memory with a content that is known: word N of generation G is a function of seed, G and N.

/// A block of memory that is checked and rewritten a part at a time.
pub struct Pattern {
    seed: u64,
    words: Vec<u64>,
    generation: u64,
}

/// A good mixer of 64 bits (SplitMix64).
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

impl Pattern {
    pub fn new(seed: u64, count: usize) -> Self {
        let mut pattern = Self { seed, words: vec![0; count], generation: 0 };
        for at in 0..count {
            pattern.words[at] = pattern.expected(at, 0);
        }
        pattern
    }

    fn expected(&self, at: usize, generation: u64) -> u64 {
        mix(self.seed << 56 ^ generation << 28 ^ at as u64)
    }

    /// Checks every word, and writes the next generation over it.
    pub fn check_and_advance(&mut self) -> Result<(), String> {
        for at in 0..self.words.len() {
            let (found, wanted) = (self.words[at], self.expected(at, self.generation));
            if found != wanted {
                let generation = self.generation;
                return Err(format!(
                    "word {at} of generation {generation} is {found:#x}, not {wanted:#x}"
                ));
            }
            self.words[at] = self.expected(at, self.generation + 1);
        }
        self.generation += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bit_that_changes_is_found() {
        let mut pattern = Pattern::new(3, 1000);
        assert_eq!(pattern.check_and_advance(), Ok(()));
        assert_eq!(pattern.check_and_advance(), Ok(()));
        pattern.words[777] ^= 1 << 40;
        let wrong = pattern.check_and_advance().unwrap_err();
        assert!(wrong.contains("word 777 of generation 2"), "{wrong}");
    }

    #[test]
    fn a_word_of_an_older_generation_is_found() {
        let mut pattern = Pattern::new(3, 1000);
        let old = pattern.words[5];
        assert_eq!(pattern.check_and_advance(), Ok(()));
        pattern.words[5] = old;
        assert!(pattern.check_and_advance().is_err());
    }
}
