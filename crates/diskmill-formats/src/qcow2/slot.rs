//! A guest cluster as a writer sees it: where it is, and what each part of it is.
//!
//! A cluster without subclusters is treated as one with a single subcluster, so that there is one way of writing for
//! both kinds of L2 entry.

use diskmill_core::{GuestOffset, HostOffset};

use super::map::{ClusterKind, CompressedSpan, Geometry, L2Entry, MapError, Subclusters};

/// Where a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It has no place.
    Nowhere,
    /// In a host cluster.
    At {
        /// The host cluster.
        host: HostOffset,
        /// Whether nothing else refers to it, so that it may be overwritten.
        own: bool,
    },
    /// Compressed; the entry says where.
    Packed(L2Entry),
}

/// A guest cluster. A subcluster that is neither stored nor zero is left to the layer below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Where it is.
    pub(crate) place: Place,
    /// Which subclusters are stored at the place: bit i is subcluster i. Not used for a packed cluster, which is
    /// stored as a whole.
    pub(crate) stored: u32,
    /// Which subclusters read as zeros.
    pub(crate) zero: u32,
}

/// The mask of all subclusters of a cluster.
pub(crate) const fn all(geometry: Geometry) -> u32 {
    if geometry.extended_l2() { u32::MAX } else { 1 }
}

/// The mask of the subclusters from `first` to `last`, both within a cluster.
pub(crate) const fn mask(first: u32, last: u32) -> u32 {
    let (first, last) = (first & 31, last & 31);
    (u32::MAX << first) & (u32::MAX >> (31 - last))
}

impl Slot {
    /// A cluster that is left to the layer below.
    pub(crate) const ABSENT: Self = Self {
        place: Place::Nowhere,
        stored: 0,
        zero: 0,
    };

    /// Reads the words of an L2 entry: the second is 0 if entries have one. `at` is the cluster's first guest byte.
    pub(crate) fn decode(words: (u64, u64), geometry: Geometry, at: GuestOffset) -> Result<Self, MapError> {
        let (entry, bitmap) = (L2Entry(words.0), Subclusters(words.1));
        let kind = entry.kind(geometry)?;
        bitmap.check(kind)?;
        let place = |host| Place::At {
            host,
            own: entry.copied(),
        };
        let (place, mut stored, mut zero) = match kind {
            ClusterKind::Unallocated => (Place::Nowhere, 0, 0),
            ClusterKind::ZeroPlain => (Place::Nowhere, 0, 1),
            ClusterKind::Normal(host) => (place(host), 1, 0),
            ClusterKind::ZeroAllocated(host) => (place(host), 0, 1),
            ClusterKind::Compressed(_) => (Place::Packed(entry), 0, 0),
        };
        if geometry.extended_l2() {
            [stored, zero] = halves(bitmap.0);
        }
        if let Place::At { host, .. } = place
            && geometry.data_file()
            && host.get() != at.get()
        {
            return Err(MapError::DataFileOffset {
                host: host.get(),
                guest: at.get(),
            });
        }
        Ok(Self { place, stored, zero })
    }

    /// The words of its L2 entry.
    pub(crate) fn encode(self, geometry: Geometry) -> (u64, u64) {
        let bitmap = u64::from(self.zero) << 32 | u64::from(self.stored);
        let zero = self.zero != 0;
        let entry = match self.place {
            Place::Packed(entry) => return (entry.0, 0),
            Place::Nowhere if zero && !geometry.extended_l2() => L2Entry::ZERO_PLAIN,
            Place::Nowhere => L2Entry::UNALLOCATED,
            Place::At { host, own } if zero && !geometry.extended_l2() => L2Entry::zero_allocated(host, own),
            Place::At { host, own } => L2Entry::normal(host, own),
        };
        (entry.0, if geometry.extended_l2() { bitmap } else { 0 })
    }

    /// The host cluster that may be overwritten, if there is one.
    pub(crate) fn own(self) -> Option<HostOffset> {
        match self.place {
            Place::At { host, own: true } => Some(host),
            _ => None,
        }
    }

    /// The place of a packed cluster.
    pub(crate) fn packed(self, geometry: Geometry) -> Option<CompressedSpan> {
        match self.place {
            Place::Packed(entry) => Some(entry.span(geometry)),
            _ => None,
        }
    }
}

fn halves(bitmap: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = bitmap.to_be_bytes();
    [u32::from_be_bytes([e, f, g, h]), u32::from_be_bytes([a, b, c, d])]
}
