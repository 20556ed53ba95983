//! Which guest clusters are being worked on: the one thing that orders threads where no lock is held.
//!
//! Tables are changed under a lock, data is read and written without it. In between, a thread holds the clusters it
//! works on here: shared for bytes that stay where they are, alone where a cluster gets a new place, new flags or is
//! given back. Two threads that allocate the same cluster therefore come one after the other, and no cluster is freed
//! under a write that is under way. Formats without tables count in steps of their own.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// How clusters are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// With others that hold them shared.
    Shared,
    /// By nobody else.
    Alone,
}

#[derive(Debug, Default)]
struct Held {
    next: u64,
    ranges: Vec<(u64, Range<u64>, Hold)>,
}

/// The guest clusters that are being worked on.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    held: Mutex<Held>,
    landed: Condvar,
}

/// Clusters held until this is dropped.
#[derive(Debug)]
pub(crate) struct Flight<'a> {
    flights: &'a Flights,
    id: u64,
}

impl Flights {
    fn lock(&self) -> MutexGuard<'_, Held> {
        // A panic cannot leave the list half changed.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds `clusters`, waiting for others that are in the way. A thread holds one range at a time.
    pub(crate) fn hold(&self, clusters: Range<u64>, hold: Hold) -> Flight<'_> {
        let mut held = self.lock();
        while held.ranges.iter().any(|(_, range, other)| {
            range.start < clusters.end
                && clusters.start < range.end
                && (hold == Hold::Alone || *other == Hold::Alone)
        }) {
            held = self.landed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        let id = held.next;
        held.next = held.next.wrapping_add(1);
        held.ranges.push((id, clusters, hold));
        Flight { flights: self, id }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.flights.lock().ranges.retain(|(id, _, _)| *id != self.id);
        self.flights.landed.notify_all();
    }
}
