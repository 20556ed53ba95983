//! How far the same state goes: joins the entries of L2 tables into runs. No I/O.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use diskmill_core::{GuestOffset, HostOffset};

use super::map::{ClusterKind, Geometry, L2Entry, MapError, SUBCLUSTERS, SubclusterKind, Subclusters};

/// What a run of guest bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// Nothing: ask below.
    Absent,
    /// Zeros; with the place that is kept for the first of them, if there is one.
    Zero(Option<HostOffset>),
    /// Stored, the first byte here.
    Data(HostOffset),
    /// Stored compressed, somewhere in this range of the file.
    Compressed {
        /// The lowest byte.
        low: HostOffset,
        /// The byte behind the highest.
        high: HostOffset,
    },
}

/// A run being put together: entries are fed in rising guest order until one does not belong.
#[derive(Clone, Debug)]
pub struct Scan {
    geometry: Geometry,
    start: u64,
    cursor: u64,
    end: u64,
    kind: Option<RunKind>,
    done: bool,
}

impl Scan {
    /// A run that starts at `at` and has at most `max` bytes.
    pub const fn new(geometry: Geometry, at: GuestOffset, max: u64) -> Self {
        Self {
            geometry,
            start: at.get(),
            cursor: at.get(),
            end: at.get().saturating_add(max),
            kind: None,
            done: max == 0,
        }
    }

    /// The first guest byte that is not in the run yet.
    pub const fn cursor(&self) -> GuestOffset {
        GuestOffset::new(self.cursor)
    }

    /// Whether the run is over.
    pub const fn is_done(&self) -> bool {
        self.done || self.cursor >= self.end
    }

    /// The run, if it has any bytes: what it is, and how many.
    pub fn finish(self) -> Option<(RunKind, u64)> {
        let len = self.cursor.saturating_sub(self.start);
        self.kind.filter(|_| len > 0).map(|kind| (kind, len))
    }

    /// Feeds an L1 entry without a table: nothing is allocated up to the end of what it covers.
    pub fn feed_no_table(&mut self) {
        let covers = self.geometry.l1_entry_covers();
        let into = GuestOffset::new(self.cursor).within(covers);
        self.join(RunKind::Absent, covers.saturating_sub(into));
    }

    /// Feeds L2 entries, of which the first is the cursor's. An error that an entry causes is returned when the
    /// run has no bytes; otherwise the run ends before the entry, and the next one meets the error.
    pub fn feed(&mut self, entries: &[u8]) -> Result<(), MapError> {
        let fed = if self.geometry.extended_l2() {
            self.feed_extended(entries)
        } else {
            self.feed_standard(entries)
        };
        match fed {
            Err(error) if self.cursor == self.start => Err(error),
            Err(_) => {
                self.done = true;
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn feed_standard(&mut self, entries: &[u8]) -> Result<(), MapError> {
        let cluster_size = self.geometry.cluster_size();
        for entry in entries.as_chunks::<8>().0 {
            if self.is_done() {
                break;
            }
            let into = GuestOffset::new(self.cursor).within(cluster_size);
            let kind = L2Entry(u64::from_be_bytes(*entry)).kind(self.geometry)?;
            let run = self.place(kind, into)?;
            self.join(run, cluster_size.saturating_sub(into));
        }
        Ok(())
    }

    fn feed_extended(&mut self, entries: &[u8]) -> Result<(), MapError> {
        for entry in entries.as_chunks::<16>().0 {
            let (entry, bitmap) = split_entry(entry);
            let kind = entry.kind(self.geometry)?;
            bitmap.check(kind)?;
            let mut index = self.geometry.subcluster(GuestOffset::new(self.cursor));
            while index < SUBCLUSTERS && !self.is_done() {
                let into = GuestOffset::new(self.cursor).within(self.geometry.cluster_size());
                let (what, count) = if matches!(kind, ClusterKind::Compressed(_)) {
                    (SubclusterKind::Allocated, SUBCLUSTERS.saturating_sub(index))
                } else {
                    bitmap.run(index)
                };
                let run = match (what, kind) {
                    (SubclusterKind::Unallocated, _) => RunKind::Absent,
                    (SubclusterKind::Zero, ClusterKind::Normal(host)) => {
                        self.place(ClusterKind::ZeroAllocated(host), into)?
                    }
                    (SubclusterKind::Zero, _) => RunKind::Zero(None),
                    (SubclusterKind::Allocated, kind) => self.place(kind, into)?,
                };
                let end = u64::from(index.saturating_add(count)) << self.geometry.granule_bits();
                self.join(run, end.saturating_sub(into));
                index = index.saturating_add(count);
            }
            if self.is_done() {
                break;
            }
        }
        Ok(())
    }

    /// What the byte `into` a cluster is.
    fn place(&self, kind: ClusterKind, into: u64) -> Result<RunKind, MapError> {
        Ok(match kind {
            ClusterKind::Unallocated => RunKind::Absent,
            ClusterKind::ZeroPlain => RunKind::Zero(None),
            ClusterKind::Normal(host) => RunKind::Data(self.host(host, into)?),
            ClusterKind::ZeroAllocated(host) => RunKind::Zero(Some(self.host(host, into)?)),
            ClusterKind::Compressed(span) => RunKind::Compressed {
                low: span.at,
                high: span.end(),
            },
        })
    }

    fn host(&self, host: HostOffset, into: u64) -> Result<HostOffset, MapError> {
        let guest = self.cursor.saturating_sub(into);
        if self.geometry.data_file() && host.get() != guest {
            return Err(MapError::DataFileOffset {
                host: host.get(),
                guest,
            });
        }
        Ok(host.saturating_add(into))
    }

    /// Adds `len` bytes if they belong to the run, as many as are wanted.
    fn join(&mut self, next: RunKind, len: u64) {
        let sofar = self.cursor.saturating_sub(self.start);
        let joined = match (self.kind, next) {
            (None, next) => Some(next),
            (Some(RunKind::Absent), RunKind::Absent) => Some(RunKind::Absent),
            (Some(RunKind::Zero(None)), RunKind::Zero(None)) => Some(RunKind::Zero(None)),
            (Some(RunKind::Zero(Some(host))), RunKind::Zero(Some(at)))
                if host.saturating_add(sofar) == at =>
            {
                self.kind
            }
            (Some(RunKind::Data(host)), RunKind::Data(at)) if host.saturating_add(sofar) == at => self.kind,
            (Some(RunKind::Compressed { low, high }), RunKind::Compressed { low: at, high: end }) => {
                Some(RunKind::Compressed {
                    low: low.min(at),
                    high: high.max(end),
                })
            }
            _ => None,
        };
        match joined {
            Some(kind) => {
                self.kind = Some(kind);
                self.cursor = self.cursor.saturating_add(len).min(self.end);
            }
            None => self.done = true,
        }
    }
}

/// The two words of an extended L2 entry.
pub fn split_entry(entry: &[u8; 16]) -> (L2Entry, Subclusters) {
    let both = u128::from_be_bytes(*entry);
    // The halves of 128 bits.
    (
        L2Entry(u64::try_from(both >> 64).unwrap_or(u64::MAX)),
        Subclusters(u64::try_from(both & u128::from(u64::MAX)).unwrap_or(u64::MAX)),
    )
}
