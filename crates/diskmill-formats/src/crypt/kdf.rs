//! PBKDF2 (RFC 8018): keys from passphrases, at a cost.
//!
//! Written here, on the `hmac` crate, because the count of iterations comes from files: it is capped, and whoever
//! waits can stop it.

use std::time::{Duration, Instant};

use diskmill_core::{Job, Result};
use hmac::digest::Mac;
use hmac::{Hmac, KeyInit};
use zeroize::Zeroize;

use super::CryptError;
use super::hash::{HashAlg, with_hash};

/// More iterations than this are refused: a header that asks for them costs more time than any setting that people
/// use (half a minute a slot, where a usual one takes two seconds).
pub const MAX_ITERATIONS: u32 = 100_000_000;
/// Fewer than this are never asked for in a new header.
pub const MIN_ITERATIONS: u32 = 1000;
/// All slots that are tried for one passphrase may take this many iterations together.
const ALL_ITERATIONS: u64 = 2 * MAX_ITERATIONS as u64;
/// Iterations between two looks at whether to stop.
const SLICE: u32 = 1 << 14;

/// What may still be spent on trying a passphrase, whatever number of slots there are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget(u64);

impl Budget {
    /// As many iterations as all slots of a header may take.
    pub(super) fn of_iterations() -> Self {
        Self(ALL_ITERATIONS)
    }

    /// Any other unit.
    pub(super) fn of(units: u64) -> Self {
        Self(units)
    }

    /// Spends `cost`. An error with [`CryptError::Budget`] if that is more than is left: nothing is spent then.
    pub(super) fn spend(&mut self, cost: u64) -> Result<(), CryptError> {
        self.0 = self.0.checked_sub(cost).ok_or(CryptError::Budget)?;
        Ok(())
    }
}

/// Fills `out` with a key from `password` and `salt`.
///
/// An error with [`CryptError::Iterations`] unless there are 1 to [`MAX_ITERATIONS`], or of kind
/// [`Cancelled`](diskmill_core::ErrorKind::Cancelled) once `job` is stopped: `out` is of no use then.
pub fn pbkdf2(
    hash: HashAlg,
    password: &[u8],
    salt: &[u8],
    iterations: u32,
    out: &mut [u8],
    job: Job<'_>,
) -> Result<()> {
    if !(1..=MAX_ITERATIONS).contains(&iterations) {
        return Err(CryptError::Iterations(iterations.into()).into());
    }
    with_hash!(hash, H => derive::<Hmac<H>>(password, salt, iterations, out, job))
}

fn derive<M: Mac + KeyInit + Clone>(
    password: &[u8],
    salt: &[u8],
    iterations: u32,
    out: &mut [u8],
    job: Job<'_>,
) -> Result<()> {
    let keyed = <M as KeyInit>::new_from_slice(password).map_err(|_| CryptError::Password)?;
    for (piece, number) in out.chunks_mut(M::output_size()).zip(1_u32..) {
        job.check()?;
        let first = keyed
            .clone()
            .chain_update(salt)
            .chain_update(number.to_be_bytes());
        let mut link = first.finalize().into_bytes();
        let mut sum = link.clone();
        for round in 1..iterations {
            if round.is_multiple_of(SLICE) {
                job.check()?;
            }
            link = keyed.clone().chain_update(&link).finalize().into_bytes();
            for (byte, other) in sum.iter_mut().zip(&link) {
                *byte ^= other;
            }
        }
        for (byte, value) in piece.iter_mut().zip(&sum) {
            *byte = *value;
        }
        sum.as_mut_slice().zeroize();
        link.as_mut_slice().zeroize();
    }
    Ok(())
}

/// Iterations a second for keys of `out_len` bytes on this machine.
///
/// The quickest of several short runs: what else the machine is doing at the time must not make the key weaker.
pub fn rate(hash: HashAlg, out_len: usize, job: Job<'_>) -> Result<u64> {
    const RUNS: usize = 16;
    const LONG_ENOUGH: Duration = Duration::from_millis(2);
    let mut out = vec![0; out_len];
    let mut iterations = 1 << 10;
    let mut best = 0;
    let mut run = 0;
    while run < RUNS {
        let start = Instant::now();
        pbkdf2(hash, b"password", &[0x55; 32], iterations, &mut out, job)?;
        let took = start.elapsed();
        if took < LONG_ENOUGH && iterations < MAX_ITERATIONS / 2 {
            iterations = iterations.saturating_mul(2);
            continue;
        }
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1);
        best = best.max(u64::from(iterations).saturating_mul(1_000_000_000) / nanos);
        run = run.saturating_add(1);
    }
    Ok(best)
}

/// Iterations that take `millis` milliseconds at `rate` a second: never fewer than [`MIN_ITERATIONS`].
///
/// An error with [`CryptError::IterTime`] if they are more than [`MAX_ITERATIONS`], which nobody could open again.
pub fn iterations(rate: u64, millis: u64) -> Result<u32, CryptError> {
    let wanted = u128::from(rate) * u128::from(millis) / 1000;
    match u32::try_from(wanted) {
        Ok(count) if count <= MAX_ITERATIONS => Ok(count.max(MIN_ITERATIONS)),
        _ => Err(CryptError::IterTime(millis)),
    }
}
