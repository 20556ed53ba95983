//! Internal snapshots of an image that is open for changing.

use crate::{Result, SnapshotFacts};

/// A snapshot to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name, for people. Names need not be unique.
    pub name: String,
    /// When it is made: seconds since 1970.
    pub date_sec: u64,
    /// And nanoseconds.
    pub date_nsec: u32,
}

/// States of the disk that an image keeps beside the active one.
///
/// Every call returns when its outcome is durable. A power cut in between leaves the snapshots as they were before or
/// as they are after; space may leak.
pub trait Snapshots {
    /// The snapshots there are, oldest first.
    fn list(&self) -> Vec<SnapshotFacts>;

    /// Keeps the active state, which includes all that was written before the call.
    fn create(&self, new: &NewSnapshot) -> Result<SnapshotFacts>;

    /// Makes the state of a snapshot the active one, its disk size included. `which` is an id or else a name. An error
    /// of kind [`NotFound`](crate::ErrorKind::NotFound) if there is none.
    fn apply(&self, which: &str) -> Result<()>;

    /// Gives up a snapshot. `which` is an id or else a name. An error of kind
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is none.
    fn delete(&self, which: &str) -> Result<()>;
}
