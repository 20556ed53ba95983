//! Places for compressed clusters, which lie back to back without regard to host clusters.

use diskmill_core::{Error, ErrorKind, HostOffset, Result};

use super::Tables;
use crate::qcow2::map::L2Entry;

impl Tables {
    /// Place for `len` bytes of a compressed cluster, at most one cluster: the entry that says so.
    pub(crate) fn allocate_packed(&mut self, len: u64) -> Result<L2Entry> {
        let geometry = self.geometry;
        let bits = geometry.cluster_bits().get();
        let at = match self.packed_place(len)? {
            Some(at) => at,
            None => {
                let (cluster, _) = self.allocate(1, 1)?;
                cluster << bits
            }
        };
        let end = at.saturating_add(len);
        self.packed_at = Some(end).filter(|end| !end.is_multiple_of(geometry.cluster_size()));
        L2Entry::compressed(HostOffset::new(at), len, geometry).ok_or_else(|| {
            Error::new(
                ErrorKind::NoSpace,
                format!("a compressed cluster of {len} bytes at {at:#x} is too far into the file"),
            )
        })
    }

    /// A place that begins in the cluster used last, each cluster it touches counted once more.
    fn packed_place(&mut self, len: u64) -> Result<Option<u64>> {
        let bits = self.geometry.cluster_bits().get();
        let Some(at) = self.packed_at else {
            return Ok(None);
        };
        let first = at >> bits;
        if self.refcounts.get(&mut self.fence, first)? >= self.refcounts.max() {
            return Ok(None);
        }
        let last = at.saturating_add(len).saturating_sub(1) >> bits;
        if last > first {
            // It runs over into the next cluster, which must be the one that is handed out.
            let (next, _) = self.allocate(1, 1)?;
            if next != last {
                self.packed_at = None;
                let end = (next << bits).saturating_add(len);
                self.packed_at = Some(end).filter(|end| !end.is_multiple_of(self.geometry.cluster_size()));
                return Ok(Some(next << bits));
            }
        }
        self.refcounts.raise(&mut self.fence, first)?;
        Ok(Some(at))
    }

    /// Ends packing into `cluster` once it may be handed out again.
    pub(super) fn unpack_from(&mut self, cluster: u64) {
        if self
            .packed_at
            .is_some_and(|at| at >> self.geometry.cluster_bits().get() == cluster)
        {
            self.packed_at = None;
        }
    }
}
