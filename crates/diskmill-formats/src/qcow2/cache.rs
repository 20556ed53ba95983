//! Parts of L2 tables held in memory.
//!
//! A table may be 2 MiB, so what is held is a slice of it. The cache is a number of small sets, each under its own
//! lock, which is held for the look-up alone and never while a slice is read: two threads that miss at the same time
//! both read.

use std::sync::{Arc, Mutex, PoisonError};

use diskmill_core::{HostOffset, Result};

/// Most bytes of a slice.
pub const SLICE_BYTES: usize = 64 << 10;
/// Bytes that are held at most.
const CAPACITY: usize = 16 << 20;
/// Slices in a set.
const WAYS: usize = 8;

/// Slices of L2 tables by their place in the file.
#[derive(Debug)]
pub struct SliceCache {
    sets: Box<[Mutex<Set>]>,
    slice_bits: u32,
}

#[derive(Debug, Default)]
struct Set {
    slots: Vec<Slot>,
    clock: u64,
}

#[derive(Debug)]
struct Slot {
    at: HostOffset,
    used: u64,
    bytes: Arc<[u8]>,
}

impl SliceCache {
    /// A cache for slices of `slice_len` bytes: a power of two, at least 512.
    pub fn new(slice_len: usize) -> Self {
        let sets = (CAPACITY / WAYS / slice_len.max(512)).max(1);
        Self {
            sets: (0..sets).map(|_| Mutex::default()).collect(),
            slice_bits: slice_len.max(512).ilog2(),
        }
    }

    /// The slice at `at`, which `load` reads if it is not held.
    pub fn get(&self, at: HostOffset, load: impl FnOnce() -> Result<Arc<[u8]>>) -> Result<Arc<[u8]>> {
        let Some(set) = self.set(at) else {
            return load();
        };
        // A set is whole after every statement, so a panic elsewhere leaves nothing to distrust.
        if let Some(bytes) = set.lock().unwrap_or_else(PoisonError::into_inner).find(at) {
            return Ok(bytes);
        }
        let bytes = load()?;
        set.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(at, Arc::clone(&bytes));
        Ok(bytes)
    }

    fn set(&self, at: HostOffset) -> Option<&Mutex<Set>> {
        // Tables are often laid out at regular distances: spread them over the sets all the same.
        let mixed = (at.get() >> self.slice_bits).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let index = mixed.checked_rem(self.sets.len() as u64)?;
        self.sets.get(usize::try_from(index).ok()?)
    }
}

impl Set {
    fn find(&mut self, at: HostOffset) -> Option<Arc<[u8]>> {
        self.clock = self.clock.saturating_add(1);
        let slot = self.slots.iter_mut().find(|slot| slot.at == at)?;
        slot.used = self.clock;
        Some(Arc::clone(&slot.bytes))
    }

    fn insert(&mut self, at: HostOffset, bytes: Arc<[u8]>) {
        self.clock = self.clock.saturating_add(1);
        let slot = Slot {
            at,
            used: self.clock,
            bytes,
        };
        if let Some(known) = self.slots.iter_mut().find(|known| known.at == at) {
            *known = slot;
        } else if self.slots.len() < WAYS {
            self.slots.push(slot);
        } else if let Some(oldest) = self.slots.iter_mut().min_by_key(|slot| slot.used) {
            *oldest = slot;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_is_held_is_not_loaded_again() {
        let cache = SliceCache::new(512);
        let loads = Cell::new(0);
        for _ in 0..3 {
            let bytes = cache.get(HostOffset::new(512), || {
                loads.set(loads.get() + 1);
                Ok(Arc::from([1_u8; 512]))
            });
            assert_eq!(bytes.unwrap()[0], 1);
        }
        assert_eq!(loads.get(), 1);
    }

    #[test]
    fn memory_is_bounded_whatever_is_asked_for() {
        let cache = SliceCache::new(SLICE_BYTES);
        for index in 0..10_000_u64 {
            let at = HostOffset::new(index * SLICE_BYTES as u64);
            let bytes = cache
                .get(at, || Ok(Arc::from(index.to_be_bytes().as_slice())))
                .unwrap();
            assert_eq!(*bytes, index.to_be_bytes());
        }
        let held: usize = cache.sets.iter().map(|set| set.lock().unwrap().slots.len()).sum();
        assert_eq!(held, CAPACITY / SLICE_BYTES);
    }

    #[test]
    fn a_failed_load_is_not_held() {
        let cache = SliceCache::new(512);
        let at = HostOffset::new(0);
        let failed = cache.get(at, || {
            Err(diskmill_core::Error::bare(diskmill_core::ErrorKind::Io))
        });
        assert!(failed.is_err());
        assert!(cache.get(at, || Ok(Arc::from([0_u8; 1]))).is_ok());
    }
}
