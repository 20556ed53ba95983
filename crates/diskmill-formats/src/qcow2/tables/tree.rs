//! All that an L1 table refers to, taken together: counted once more for a snapshot, once less without it.

use diskmill_core::{Error, ErrorKind, GuestOffset, HostOffset, Result};

use super::super::extension::BitmapsExtension;
use super::super::fence::Part;
use super::super::map::L1Entry;
use super::super::slot::{Place, Slot};
use super::super::snapshot::check_l1;
use super::{Reclaim, Tables, past_end};

/// What is wrong with an L1 table that is not the active one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TreeError {
    #[error("cluster {cluster:#x} is referred to and its refcount is 0")]
    Uncounted { cluster: u64 },
}

type Visit<'a> = &'a mut dyn FnMut(&mut Tables, u64, u64) -> Result<()>;

impl Tables {
    /// The entries of the active L1 table.
    pub(crate) fn l1(&self) -> &[L1Entry] {
        &self.l1
    }

    /// Reads an L1 table that is not the active one, for a disk that needs `needed` entries.
    pub(crate) fn read_l1(&mut self, at: HostOffset, entries: u32, needed: u64) -> Result<Vec<L1Entry>> {
        check_l1(self.geometry, at, entries, needed)?;
        let bytes = u64::from(entries) * 8;
        let len = self.fence.file().len()?;
        if at.saturating_add(bytes).get() > len {
            return Err(past_end("the l1 table of a snapshot", at.get(), len));
        }
        let mut raw = vec![0; usize::try_from(bytes).unwrap_or(0)];
        self.fence.file().read_at(at, &mut raw)?;
        Ok(raw
            .as_chunks::<8>()
            .0
            .iter()
            .map(|entry| L1Entry(u64::from_be_bytes(*entry)))
            .collect())
    }

    /// Writes an L1 table that is not the active one to new clusters, without any COPIED flag.
    pub(crate) fn write_new_l1(&mut self, l1: &[L1Entry]) -> Result<HostOffset> {
        if l1.is_empty() {
            return Ok(HostOffset::ZERO);
        }
        let cluster = self.geometry.cluster_size();
        let clusters = (l1.len() as u64 * 8).div_ceil(cluster);
        let (first, _) = self.allocate(clusters, clusters)?;
        let at = first << self.geometry.cluster_bits().get();
        let mut raw: Vec<u8> = l1
            .iter()
            .flat_map(|entry| L1Entry::new(entry.offset(), false).0.to_be_bytes())
            .collect();
        raw.resize(usize::try_from(clusters * cluster).unwrap_or(0), 0);
        match self.fence.write(Part::InactiveL1, at, &raw) {
            Ok(()) => Ok(HostOffset::new(at)),
            Err(error) => {
                // The write is what the caller must hear of; what cannot be given back leaks.
                let _ = self.release(first, clusters);
                Err(error)
            }
        }
    }

    /// Calls `visit` with each run of clusters that `l1` refers to, tables before what they refer to.
    fn visit_tree(&mut self, l1: &[L1Entry], visit: Visit<'_>) -> Result<()> {
        let geometry = self.geometry;
        for entry in l1 {
            let Some(table_at) = entry.table(geometry)? else {
                continue;
            };
            // Read before it is visited: a visit may give the table's cluster back.
            let slots = self.slots(table_at)?;
            visit(self, table_at.get() >> geometry.cluster_bits().get(), 1)?;
            for slot in slots {
                let (first, count) = self.host_clusters(slot);
                if count > 0 {
                    visit(self, first, count)?;
                }
            }
        }
        Ok(())
    }

    /// The slots of an L2 table, whoever it belongs to. Images with snapshots have no data file, so that no slot
    /// depends on where in the disk it is.
    pub(super) fn slots(&mut self, table_at: HostOffset) -> Result<Vec<Slot>> {
        let geometry = self.geometry;
        let step = geometry.entry_len() / 8;
        let table = self.table(table_at)?;
        table
            .words
            .chunks(step)
            .map(|words| {
                let words = (
                    words.first().copied().unwrap_or(0),
                    if step > 1 {
                        words.get(1).copied().unwrap_or(0)
                    } else {
                        0
                    },
                );
                Slot::decode(words, geometry, GuestOffset::ZERO)
                    .map_err(|error| Error::from(error).host(table_at))
            })
            .collect()
    }

    /// Counts all that `l1` refers to once more. If that fails, nothing is counted more than before.
    pub(crate) fn raise_tree(&mut self, l1: &[L1Entry]) -> Result<()> {
        let mut raised = 0_u64;
        let result = self.visit_tree(l1, &mut |tables, first, count| {
            for cluster in first..first.saturating_add(count) {
                if tables.refcounts.get(&mut tables.fence, cluster)? == 0 {
                    return Err(Error::new(ErrorKind::Corrupt, TreeError::Uncounted { cluster }));
                }
                tables.refcounts.raise(&mut tables.fence, cluster)?;
                raised += 1;
            }
            Ok(())
        });
        if result.is_err() {
            // The same walk again, as far as it came. What cannot be lowered leaks.
            let _ = self.visit_tree(l1, &mut |tables, first, count| {
                for cluster in first..first.saturating_add(count) {
                    if raised == 0 {
                        return Err(Error::bare(ErrorKind::Cancelled));
                    }
                    tables.refcounts.lower(&mut tables.fence, cluster)?;
                    raised -= 1;
                }
                Ok(())
            });
        }
        result
    }

    /// Counts all that `l1` refers to once less. Nothing durable may name `l1` any more, and no dropped reference may
    /// be waiting for its own durability.
    pub(crate) fn drop_tree(&mut self, l1: &[L1Entry]) -> Result<()> {
        self.visit_tree(l1, &mut |tables, first, count| {
            tables.drop_clusters(first, count, Reclaim::Always);
            if tables.dropped.len() > super::order::MAX_DROPPED {
                tables.settle()
            } else {
                Ok(())
            }
        })?;
        self.settle()?;
        let bits = self.geometry.cluster_bits().get();
        for entry in l1.iter().filter(|entry| entry.offset() != HostOffset::ZERO) {
            // A table that is free now may be handed out as something else: it must not stay in memory as what it was.
            if self
                .refcounts
                .get(&mut self.fence, entry.offset().get() >> bits)?
                == 0
            {
                self.l2.remove(&entry.offset().get());
            }
        }
        Ok(())
    }

    /// Sets the COPIED flag of each entry of the active state to what refcounts say.
    pub(crate) fn refresh_copied(&mut self) -> Result<()> {
        let geometry = self.geometry;
        let bits = geometry.cluster_bits().get();
        for index in 0..self.l1.len() {
            let entry = self.l1.get(index).copied().unwrap_or_default();
            let Some(table_at) = entry.table(geometry)? else {
                continue;
            };
            let own = self.refcounts.get(&mut self.fence, table_at.get() >> bits)? == 1;
            for (number, slot) in self.slots(table_at)?.into_iter().enumerate() {
                let Place::At { host, own: copied } = slot.place else {
                    continue;
                };
                let alone = own && self.refcounts.get(&mut self.fence, host.get() >> bits)? == 1;
                if alone != copied {
                    let slot = Slot {
                        place: Place::At { host, own: alone },
                        ..slot
                    };
                    self.rewrite(table_at, number, slot)?;
                }
            }
            if entry.copied() != own {
                self.set_l1(index, L1Entry::new(table_at, own));
            }
        }
        Ok(())
    }

    /// Changes an entry of an L2 table where it is, shared or not: the entry must mean the same as before.
    pub(super) fn rewrite(&mut self, table_at: HostOffset, number: usize, slot: Slot) -> Result<()> {
        let step = self.geometry.entry_len() / 8;
        let (word, _) = slot.encode(self.geometry);
        let at = number * step;
        let table = self.table(table_at)?;
        if let Some(known) = table.words.get_mut(at) {
            *known = word;
        }
        table.mark(at..at + 1);
        Ok(())
    }

    /// Makes `l1` the active L1 table of a disk of `size` bytes and returns the old one, whose references are the
    /// caller's to drop. All changes must have been written back. With `bitmaps`, their directory is there from the same
    /// moment on, or there are none.
    pub(crate) fn switch_l1(
        &mut self,
        l1: Vec<L1Entry>,
        size: u64,
        bitmaps: Option<Option<BitmapsExtension>>,
    ) -> Result<Vec<L1Entry>> {
        let cluster = self.geometry.cluster_size();
        let bits = self.geometry.cluster_bits().get();
        let l1: Vec<L1Entry> = l1
            .into_iter()
            .map(|entry| L1Entry::new(entry.offset(), false))
            .collect();
        let at = self.write_new_l1(&l1)?;
        // Without bitmaps, what changes lies in one sector.
        self.rewrite_header(|header| {
            header.size = size;
            header.l1_size = u32::try_from(l1.len()).unwrap_or(u32::MAX);
            header.l1_table_offset = at;
            if let Some(place) = bitmaps {
                header.set_bitmaps(place);
            }
            Ok(())
        })?;

        let old_at = std::mem::replace(&mut self.l1_at, at);
        let old = std::mem::replace(&mut self.l1, l1);
        self.dirty_l1.clear();
        self.fence.unprotect(old_at.get());
        self.fence
            .protect(at.get()..at.get() + self.l1.len() as u64 * 8, Part::ActiveL1);
        for entry in old.iter().filter(|entry| entry.offset() != HostOffset::ZERO) {
            self.fence.unprotect_table(entry.offset().get());
        }
        for entry in self.l1.iter().filter(|entry| entry.offset() != HostOffset::ZERO) {
            self.fence.protect_table(entry.offset().get(), Part::ActiveL2);
        }
        let clusters = (old.len() as u64 * 8).div_ceil(cluster);
        self.drop_clusters(old_at.get() >> bits, clusters, Reclaim::Always);
        self.settle()?;
        Ok(old)
    }
}
