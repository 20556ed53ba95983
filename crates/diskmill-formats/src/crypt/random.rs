//! Chance for keys and salts.
//!
//! The one place where this crate asks the operating system for anything. A hook for callers to fill would be a way to
//! make weak keys by mistake; the `getrandom` crate has no state and no seed, only the system's generator.

use std::io;

use diskmill_core::{Error, Result};

/// Fills `bytes` with what nobody can foretell, or fails with an error of kind [`Io`](diskmill_core::ErrorKind::Io).
pub fn fill(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|error| Error::from(io::Error::from(error)).op("make random bytes"))
}
