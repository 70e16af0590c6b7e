//! Numbers from a seed: SplitMix64, which is enough to choose by and the same on every machine.
//!
//! Source: <https://prng.di.unimi.it/splitmix64.c>, in the public domain.

/// A stream of numbers.
#[derive(Debug, Clone)]
pub struct Seed(u64);

impl Seed {
    /// The stream of these words: another for each other list.
    pub fn of(words: &[u64]) -> Self {
        let mut seed = Self(0x6b65_6c76_696e);
        for word in words {
            seed.0 = seed.next() ^ word;
        }
        seed
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A number from 0 to 1.
    pub fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_again_and_another_gives_others() {
        let draw = |words: &[u64]| {
            let mut seed = Seed::of(words);
            (0..4).map(|_| seed.below(1000)).collect::<Vec<_>>()
        };
        assert_eq!(draw(&[1, 2, 3]), draw(&[1, 2, 3]));
        assert_ne!(draw(&[1, 2, 3]), draw(&[1, 3, 2]));
        assert_ne!(draw(&[1, 2, 3]), draw(&[2, 2, 3]));
        assert!((0.0..1.0).contains(&Seed::of(&[7]).fraction()));
    }
}
