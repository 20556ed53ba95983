//! Slowing a storage down.
#![deny(clippy::missing_trait_methods)]

use std::io::IoSlice;
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use diskmill_core::{Hints, HostOffset, HostRun, RawFile, Result, Storage, StorageMut, ZeroHow};

/// So many bytes a second, shared by all who take from it.
///
/// Each request is let through at once if those before it have been paid for in time, so the rate holds on average
/// from the first request on and pauses are not saved up.
#[derive(Debug)]
pub struct RateLimit {
    bytes_per_sec: NonZeroU64,
    /// When all that was taken will have been paid for.
    paid: Mutex<Option<Instant>>,
}

impl RateLimit {
    /// A limit of `bytes_per_sec`.
    pub fn new(bytes_per_sec: NonZeroU64) -> Self {
        Self {
            bytes_per_sec,
            paid: Mutex::new(None),
        }
    }

    /// Takes `bytes` at the time `now` and answers how long to wait before using them.
    pub fn take(&self, bytes: u64, now: Instant) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_sec.get());
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let start = paid.map_or(now, |paid| paid.max(now));
        *paid = Some(start.checked_add(cost).unwrap_or(start));
        start - now
    }
}

/// A storage whose writes are limited to a rate. Reading, zeroing without writing and resizing are not.
#[derive(Debug)]
pub struct Throttle {
    inner: Arc<dyn StorageMut>,
    limit: Arc<RateLimit>,
}

impl Throttle {
    /// `inner`, its writes limited by `limit`.
    pub fn new(inner: Arc<dyn StorageMut>, limit: Arc<RateLimit>) -> Self {
        Self { inner, limit }
    }

    fn wait_for(&self, bytes: u64) {
        let pause = self.limit.take(bytes, Instant::now());
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
}

impl Storage for Throttle {
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn is_empty(&self) -> Result<bool> {
        self.inner.is_empty()
    }

    fn hints(&self) -> Hints {
        self.inner.hints()
    }

    fn read_at(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.inner.read_at(at, buf)
    }

    fn run_at(&self, at: HostOffset) -> Result<HostRun> {
        self.inner.run_at(at)
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.inner.allocated()
    }

    /// `None`: what goes by the file underneath is not counted.
    fn raw_file(&self) -> Option<RawFile<'_>> {
        None
    }

    fn read_padded(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.inner.read_padded(at, buf)
    }
}

impl StorageMut for Throttle {
    fn write_at(&self, at: HostOffset, buf: &[u8]) -> Result<()> {
        self.wait_for(buf.len() as u64);
        self.inner.write_at(at, buf)
    }

    fn write_vectored_at(&self, at: HostOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.wait_for(bufs.iter().map(|buf| buf.len() as u64).sum());
        self.inner.write_vectored_at(at, bufs)
    }

    fn zero(&self, range: Range<HostOffset>, how: ZeroHow) -> Result<()> {
        self.inner.zero(range, how)
    }

    fn discard(&self, range: Range<HostOffset>) -> Result<()> {
        self.inner.discard(range)
    }

    fn allocate(&self, range: Range<HostOffset>) -> Result<()> {
        self.inner.allocate(range)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)
    }

    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_pay_for_those_before_them() {
        let limit = RateLimit::new(NonZeroU64::new(1000).unwrap());
        let start = Instant::now();
        assert_eq!(limit.take(500, start), Duration::ZERO);
        assert_eq!(limit.take(1000, start), Duration::from_millis(500));
        assert_eq!(limit.take(1, start), Duration::from_millis(1500));
        // A pause is not saved up.
        let later = start + Duration::from_secs(100);
        assert_eq!(limit.take(500, later), Duration::ZERO);
        assert_eq!(limit.take(1, later), Duration::from_millis(500));
        assert_eq!(
            limit.take(u64::MAX, start + Duration::from_secs(200)),
            Duration::ZERO
        );
    }
}
