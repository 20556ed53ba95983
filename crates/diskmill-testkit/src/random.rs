//! Chance in tests: the same every time, so that what passes once passes always, unless a soak wants other choices.

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use proptest::test_runner::{Config, RngAlgorithm, RngSeed, TestRng, TestRunner};

use crate::sparse_random::mix;

/// A number the environment may hold.
fn from_environment(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is {value:?}, must be a number")),
    )
}

/// What random choices are made from: `DISKMILL_SEED`, or 1. In a soak without it, another in each process, which is
/// printed.
#[allow(clippy::print_stderr, reason = "the output of tests")]
pub fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| {
        if let Some(seed) = from_environment("DISKMILL_SEED") {
            return seed;
        }
        if std::env::var_os("DISKMILL_SOAK").is_none() {
            return 1;
        }
        let age = SystemTime::now().duration_since(UNIX_EPOCH);
        let seed = mix(age.map_or(1, |age| age.as_nanos() as u64)) >> 32;
        eprintln!("DISKMILL_SEED={seed}");
        seed
    })
}

/// How many times the usual work is wanted: `DISKMILL_SOAK`, or 1.
pub fn soak() -> u32 {
    from_environment("DISKMILL_SOAK").map_or(1, |times| times as u32)
}

/// What the properties of a `proptest!` are tested with: `cases` of them, more in a soak.
///
/// ```
/// use diskmill_testkit::random;
/// use proptest::prelude::*;
///
/// proptest! {
///     #![proptest_config(random::config(40))]
///     fn random_numbers_are_numbers(number: u8) {
///         prop_assert!(u64::from(number) < 256);
///     }
/// }
/// random_numbers_are_numbers();
/// ```
pub fn config(cases: u32) -> Config {
    Config {
        cases: cases.saturating_mul(soak()),
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(seed()),
        ..Config::default()
    }
}

/// A runner of `cases` cases. `salt` keeps tests from making the same choices.
pub fn runner(cases: u32, salt: u64) -> TestRunner {
    let config = Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 1000,
        ..Config::default()
    };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed().to_le_bytes());
    bytes[8..16].copy_from_slice(&salt.to_le_bytes());
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

/// Numbers to begin `count` rounds of something random with, more in a soak. `salt` keeps tests from making the same
/// choices.
pub fn rounds(salt: u64, count: u64) -> impl Iterator<Item = u64> {
    let mut dice = Dice::new(salt);
    (0..count.saturating_mul(soak().into())).map(move |_| dice.next())
}

/// Random numbers for what needs no shrinking.
#[derive(Clone, Debug)]
pub struct Dice {
    state: u64,
}

impl Dice {
    /// Dice thrown from [`seed`]. `salt` keeps tests from making the same choices.
    pub fn new(salt: u64) -> Self {
        Self {
            state: mix(seed() ^ salt << 32),
        }
    }

    /// The next number.
    #[allow(clippy::should_implement_trait, reason = "dice never end")]
    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(1);
        mix(self.state)
    }

    /// The next number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// One of `all`, which are not none.
    pub fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dice_fall_alike_from_the_same_salt_only() {
        let throw = |salt| {
            let mut dice = Dice::new(salt);
            [dice.next(), dice.next(), dice.below(10)]
        };
        assert_eq!(throw(1), throw(1));
        assert_ne!(throw(1)[..2], throw(2)[..2]);
        assert!(throw(1)[2] < 10);
    }
}
