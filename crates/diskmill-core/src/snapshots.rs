//! Internal snapshots of an image that is open for changing.

use crate::{Result, SnapshotFacts};

/// A snapshot to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NewSnapshot {
    /// Its identifier; `None` for the next number. One that another snapshot has is refused.
    pub id: Option<String>,
    /// Its name, for people. Names need not be unique.
    pub name: String,
    /// When it is made: seconds since 1970.
    pub date_sec: u64,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// Bytes of machine state kept with it: all of them have gone through
    /// [`Snapshots::write_machine_state`] since the last snapshot was made.
    pub vm_state_size: u64,
    /// How long the machine had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instructions executed, where that was counted.
    pub icount: Option<u64>,
}

impl NewSnapshot {
    /// A snapshot of a disk without a machine, as `qemu-img` makes it.
    pub fn new(name: impl Into<String>, date_sec: u64, date_nsec: u32) -> Self {
        Self {
            id: None,
            name: name.into(),
            date_sec,
            date_nsec,
            vm_state_size: 0,
            vm_clock_nsec: 0,
            icount: Some(0),
        }
    }
}

/// States of the disk that an image keeps beside the active one.
///
/// Every call returns when its outcome is durable. A power cut in between leaves the snapshots as they were before or
/// as they are after; space may leak.
pub trait Snapshots {
    /// The snapshots there are, oldest first.
    fn list(&self) -> Vec<SnapshotFacts>;

    /// Writes machine state, which the next snapshot that is made will keep. Until then it lies behind the disk and
    /// takes space; nothing else shows it.
    fn write_machine_state(&self, at: u64, bytes: &[u8]) -> Result<()>;

    /// Keeps the active state, which includes all that was written before the call.
    fn create(&self, new: &NewSnapshot) -> Result<SnapshotFacts>;

    /// Makes the state of a snapshot the active one, its disk size included. `which` is an id or else a name. An error
    /// of kind [`NotFound`](crate::ErrorKind::NotFound) if there is none.
    fn apply(&self, which: &str) -> Result<()>;

    /// Gives up a snapshot. `which` is an id or else a name. An error of kind
    /// [`NotFound`](crate::ErrorKind::NotFound) if there is none.
    fn delete(&self, which: &str) -> Result<()>;
}
