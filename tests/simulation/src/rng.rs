//! Chance: one small generator per purpose, all of them drawn from the seed.

/// SplitMix64 (Steele, Lea, Flood 2014): small, fast, and every seed is a good one.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of one purpose. What is drawn for one purpose never moves another.
    pub fn of(seed: u64, purpose: &str) -> Self {
        let mut rng = Self(seed ^ 0x9E37_79B9_7F4A_7C15);
        for byte in purpose.bytes() {
            rng.0 ^= u64::from(byte);
            rng.0 = rng.next();
        }
        rng
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 when there is none.
    pub fn below(&mut self, n: u64) -> u64 {
        let wide = u128::from(self.next()) * u128::from(n);
        u64::try_from(wide >> 64).unwrap_or(0)
    }

    /// A number of the range, both ends included.
    pub fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low) + 1)
    }

    /// True in so many of a thousand cases.
    pub fn permille(&mut self, chance: u32) -> bool {
        self.below(1_000) < u64::from(chance)
    }

    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        match from.is_empty() {
            true => None,
            false => from.get(self.index(from.len())),
        }
    }

    pub fn uuid(&mut self) -> uuid::Uuid {
        uuid::Uuid::from_u64_pair(self.next(), self.next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_sequence_and_purposes_are_apart() {
        let draw = |purpose| {
            let mut rng = Rng::of(7, purpose);
            [rng.next(), rng.next(), rng.below(10)]
        };
        assert_eq!(draw("net"), draw("net"));
        assert_ne!(draw("net"), draw("disk"));
        let mut rng = Rng::of(1, "x");
        assert!((0..1_000).all(|_| (3..=5).contains(&rng.within(3, 5))));
    }
}
