//! Internal snapshots of an image that is open for changing.

use std::fmt;

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

/// Which internal snapshot is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhichSnapshot {
    /// The one with this id, or else the first with this name.
    Either(String),
    /// The first with this id and this name, as far as they are given.
    Exact {
        /// Its id.
        id: Option<String>,
        /// Its name.
        name: Option<String>,
    },
}

impl<T: Into<String>> From<T> for WhichSnapshot {
    fn from(which: T) -> Self {
        Self::Either(which.into())
    }
}

impl WhichSnapshot {
    /// The place of the snapshot that is meant among `all`, which are pairs of an id and a name.
    pub fn find<'a>(&self, all: impl Iterator<Item = (&'a [u8], &'a [u8])> + Clone) -> Option<usize> {
        match self {
            Self::Either(which) => {
                let mut same_id = all.clone();
                same_id
                    .position(|(id, _)| id == which.as_bytes())
                    .or_else(|| all.clone().position(|(_, name)| name == which.as_bytes()))
            }
            Self::Exact { id, name } => {
                let is = |wanted: &Option<String>, value: &[u8]| {
                    wanted.as_ref().is_none_or(|wanted| wanted.as_bytes() == value)
                };
                let mut all = all;
                all.position(|(one, called)| is(id, one) && is(name, called))
            }
        }
    }
}

impl fmt::Display for WhichSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Either(which) => write!(f, "id or name '{which}'"),
            Self::Exact { id: None, name: None } => f.write_str("any id or name"),
            Self::Exact {
                id: Some(id),
                name: None,
            } => write!(f, "id '{id}'"),
            Self::Exact {
                id: None,
                name: Some(name),
            } => write!(f, "name '{name}'"),
            Self::Exact {
                id: Some(id),
                name: Some(name),
            } => write!(f, "id '{id}' and name '{name}'"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_before_names_and_both_can_be_demanded() {
        let all: [(&[u8], &[u8]); 3] = [(b"1", b"2"), (b"2", b"1"), (b"3", b"2")];
        let exact = |id: Option<&str>, name: Option<&str>| WhichSnapshot::Exact {
            id: id.map(str::to_owned),
            name: name.map(str::to_owned),
        };
        for (which, place) in [
            (WhichSnapshot::from("2"), Some(1)),
            ("3".into(), Some(2)),
            ("4".into(), None),
            (exact(Some("2"), None), Some(1)),
            (exact(None, Some("2")), Some(0)),
            (exact(Some("3"), Some("2")), Some(2)),
            (exact(Some("3"), Some("1")), None),
            (exact(None, Some("3")), None),
        ] {
            assert_eq!(which.find(all.iter().copied()), place, "{which}");
        }
    }
}
