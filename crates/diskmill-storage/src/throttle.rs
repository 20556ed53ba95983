//! Holding writers to a rate.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

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
