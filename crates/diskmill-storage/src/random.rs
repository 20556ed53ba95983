//! Chance.

use rustix::io::retry_on_intr;
use rustix::rand::{GetRandomFlags, getrandom};

/// A number that nobody can foretell, or `None` where the host has no chance to give.
pub fn random_u32() -> Option<u32> {
    let mut bytes = [0; 4];
    let got = retry_on_intr(|| getrandom(&mut bytes[..], GetRandomFlags::empty())).ok()?;
    (got == bytes.len()).then(|| u32::from_ne_bytes(bytes))
}
