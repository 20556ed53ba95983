//! What all parts of compacting share: the file, its refcounts, and the order in which changes reach the disk.

use std::sync::Arc;

use diskmill_core::{CompactReport, HostOffset, Job, Limits, Result, StorageMut, ZeroHow};

use super::super::crypto::Sealing;
use super::super::fence::{Fence, Part};
use super::super::header::Header;
use super::super::map::{Geometry, L1Entry, L2Entry, Subclusters};
use super::super::refcount::Refcounts;
use super::super::run::split_entry;
use super::super::snapshot::{self, Snapshot};
use super::super::tables::protect_encryption;
use crate::codec::is_zero;

/// Bytes copied between two flushes.
const BATCH_BYTES: u64 = 32 << 20;
/// References switched between two flushes.
const BATCH_SWITCHES: usize = 1 << 18;
/// Zeros in pieces of this are holes in a copy.
const HOLE: usize = 4096;
/// Where the header keeps the offset of the active L1 table.
const HEADER_L1_OFFSET_AT: u64 = 40;

/// An image that is being compacted.
///
/// Changes come in batches. A batch copies to places that nothing refers to and notes which 8-byte fields are to refer to
/// them. [`commit`](Self::commit) makes the copies and their counts durable, then the fields, and only then lowers the
/// counts of the old places, so that a power cut leaks at worst.
pub(super) struct Work<'a> {
    pub(super) header: Header,
    pub(super) geometry: Geometry,
    pub(super) main: Arc<dyn StorageMut>,
    pub(super) data: Option<Arc<dyn StorageMut>>,
    pub(super) sealing: Sealing,
    pub(super) fence: Fence,
    pub(super) refcounts: Refcounts,
    /// Nothing but tables is written: the file is a sketch.
    pub(super) dry: bool,
    pub(super) job: Job<'a>,
    pub(super) report: CompactReport,
    /// Fields of the file, and what they are to hold.
    switches: Vec<(u64, u64)>,
    /// References that end with this batch: clusters, and how many each.
    drops: Vec<(u64, u64)>,
    /// References that end once all that share a cluster have been switched.
    late: Vec<(u64, u64)>,
    /// Counts that were raised for this batch.
    fresh: Vec<(u64, u64)>,
    copied: u64,
    buffer: Vec<u8>,
    /// A count came down to something that is not zero: COPIED flags may have to follow.
    pub(super) uneven: bool,
}

/// What is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Copied {
    /// Tables.
    Tables,
    /// Bits of a bitmap.
    Bits,
    /// What is stored of the disk.
    Data,
}

/// An L1 table.
#[derive(Clone, Debug)]
pub(super) struct L1Table {
    pub(super) at: u64,
    pub(super) entries: u32,
    /// The fields that name it: one, or several where snapshots share it.
    pub(super) named_at: Vec<u64>,
}

impl L1Table {
    /// How often each of its entries counts.
    pub(super) fn weight(&self) -> u64 {
        self.named_at.len() as u64
    }
}

/// An entry of an L2 table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// Where in the file it is.
    pub(super) at: u64,
    pub(super) word: L2Entry,
    pub(super) subclusters: Subclusters,
}

impl<'a> Work<'a> {
    pub(super) fn new(
        header: Header,
        main: Arc<dyn StorageMut>,
        data: Option<Arc<dyn StorageMut>>,
        sealing: Sealing,
        dry: bool,
        job: Job<'a>,
    ) -> Result<Self> {
        let geometry = header.geometry();
        let mut fence = Fence::new(Arc::clone(&main), data.clone(), geometry.cluster_bits().get());
        fence.protect(0..geometry.cluster_size(), Part::Header);
        protect_encryption(&mut fence, &header);
        let refcounts = Refcounts::load(
            &mut fence,
            header.refcount_order.get(),
            header.refcount_table_offset.get(),
            header.refcount_table_clusters,
        )?;
        let mut report = CompactReport::default();
        report.len_before = main.len()?;
        report.fixed_len = main.hints().fixed_len;
        Ok(Self {
            geometry,
            header,
            main,
            data,
            sealing,
            fence,
            refcounts,
            dry,
            job,
            report,
            switches: Vec::new(),
            drops: Vec::new(),
            late: Vec::new(),
            fresh: Vec::new(),
            copied: 0,
            buffer: Vec::new(),
            uneven: false,
        })
    }

    pub(super) fn bits(&self) -> u32 {
        self.geometry.cluster_bits().get()
    }

    pub(super) fn cluster(&self) -> u64 {
        self.geometry.cluster_size()
    }

    pub(super) fn count(&mut self, cluster: u64) -> Result<u64> {
        self.refcounts.get(&mut self.fence, cluster)
    }

    /// Has the 8 bytes at `at` hold `value` from the next commit on.
    pub(super) fn switch(&mut self, at: u64, value: u64) {
        self.switches.push((at, value));
    }

    /// Ends `count` references to a cluster with the next commit.
    pub(super) fn drop_with_batch(&mut self, cluster: u64, count: u64) {
        self.drops.push((cluster, count));
    }

    /// Ends `count` references to a cluster with the next [`settle`](Self::settle).
    pub(super) fn drop_late(&mut self, cluster: u64, count: u64) {
        self.late.push((cluster, count));
    }

    /// Notes that the count of a cluster was raised for this batch.
    pub(super) fn note_fresh(&mut self, cluster: u64, count: u64) {
        self.fresh.push((cluster, count));
    }

    /// Notes that something on disk may refer to what was taken for this batch, from now on.
    pub(super) fn keep_fresh(&mut self) {
        self.fresh.clear();
    }

    /// Takes a run of free clusters below `limit` for this batch.
    pub(super) fn take_run(&mut self, len: u64, count: u64, limit: u64) -> Result<Option<u64>> {
        let taken = self.refcounts.take_run(&mut self.fence, len, count, limit)?;
        if let Some(first) = taken {
            for cluster in first..first.saturating_add(len) {
                self.note_fresh(cluster, count);
            }
        }
        Ok(taken)
    }

    /// Copies `len` clusters. What is zero becomes a hole. In a sketch data is not copied: nobody will look at it again.
    /// Encrypted data is encrypted anew for its new place.
    pub(super) fn copy(&mut self, what: Copied, from: u64, to: u64, len: u64) -> Result<()> {
        let bits = self.bits();
        for step in 0..len {
            let at = to.saturating_add(step) << bits;
            self.note_copied(self.cluster());
            if self.dry && what != Copied::Tables {
                self.reach(at.saturating_add(self.cluster()))?;
                continue;
            }
            let mut buffer = std::mem::take(&mut self.buffer);
            buffer.resize(self.geometry.cluster_bits().cluster_len(), 0);
            let old = HostOffset::new(from.saturating_add(step) << bits);
            let done = self.main.read_padded(old, &mut buffer).and_then(|()| match what {
                Copied::Data if self.sealing.is_encrypted() => {
                    self.sealing.renew(old, HostOffset::new(at), &mut buffer)?;
                    self.main.write_at(HostOffset::new(at), &buffer)
                }
                _ => write_sparse(self.main.as_ref(), at, &buffer),
            });
            self.buffer = buffer;
            done?;
        }
        self.job.observer.advance(len << bits);
        self.report.moved = self.report.moved.saturating_add(len << bits);
        Ok(())
    }

    /// Notes that bytes were written which must be durable before anything refers to them.
    pub(super) fn note_copied(&mut self, len: u64) {
        self.fence.note_copied();
        self.copied = self.copied.saturating_add(len);
    }

    /// Makes a sketch as long as the file would be with bytes written up to `end`.
    pub(super) fn reach(&self, end: u64) -> Result<()> {
        if self.main.len()? < end {
            self.main.set_len(end)?;
        }
        Ok(())
    }

    /// Commits if there is much to commit.
    pub(super) fn commit_if_many(&mut self) -> Result<()> {
        if self.copied >= BATCH_BYTES
            || self.switches.len() >= BATCH_SWITCHES
            || self.drops.len() >= BATCH_SWITCHES
        {
            self.commit()
        } else {
            Ok(())
        }
    }

    /// Makes the batch durable, in order.
    pub(super) fn commit(&mut self) -> Result<()> {
        self.job.check()?;
        self.refcounts.write_blocks(&mut self.fence)?;
        if self.refcounts.table_is_dirty() {
            self.fence.barrier()?;
            // From here on the table on disk may name what is fresh.
            self.keep_fresh();
            self.refcounts.write_table(&mut self.fence)?;
        }
        self.fence.barrier()?;
        self.keep_fresh();
        let switches = std::mem::take(&mut self.switches);
        if !switches.is_empty() {
            self.apply(switches)?;
            self.fence.sync()?;
        }
        for (cluster, count) in std::mem::take(&mut self.drops) {
            if self.refcounts.sub(&mut self.fence, cluster, count)? > 0 {
                self.uneven = true;
            }
        }
        self.copied = 0;
        Ok(())
    }

    /// Commits, and ends the references that waited for others to be switched.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.commit()?;
        for (cluster, count) in std::mem::take(&mut self.late) {
            self.drops.push((cluster, count));
        }
        // Several references to one cluster may end: only what is left in the end tells.
        let drops = std::mem::take(&mut self.drops);
        let mut touched: Vec<u64> = drops.iter().map(|(cluster, _)| *cluster).collect();
        for (cluster, count) in drops {
            self.refcounts.sub(&mut self.fence, cluster, count)?;
        }
        touched.sort_unstable();
        touched.dedup();
        for cluster in touched {
            self.uneven |= self.count(cluster)? > 0;
        }
        Ok(())
    }

    /// Writes fields, a cluster of them at a time. Each lies in one sector, which the host does not tear.
    fn apply(&mut self, mut switches: Vec<(u64, u64)>) -> Result<()> {
        switches.sort_by_key(|(at, _)| *at);
        let bits = self.bits();
        let mut bytes = Vec::new();
        for group in switches.chunk_by(|(one, _), (other, _)| one >> bits == other >> bits) {
            let (Some((first, _)), Some((last, _))) = (group.first(), group.last()) else {
                continue;
            };
            let start = first & !511;
            let end = last.saturating_add(8);
            bytes.resize(usize::try_from(end - start).unwrap_or(0), 0);
            self.main.read_padded(HostOffset::new(start), &mut bytes)?;
            for (at, value) in group {
                let from = usize::try_from(at - start).unwrap_or(usize::MAX);
                if let Some(field) = bytes.get_mut(from..from.saturating_add(8)) {
                    field.copy_from_slice(&value.to_be_bytes());
                }
            }
            self.fence.note_copied();
            self.main.write_at(HostOffset::new(start), &bytes)?;
        }
        Ok(())
    }

    /// After a failure: gives back what was taken for a batch that nothing refers to. What cannot be leaks.
    pub(super) fn abandon(&mut self) {
        if self.fence.is_adrift() {
            return;
        }
        for (cluster, count) in std::mem::take(&mut self.fresh) {
            if self.refcounts.sub(&mut self.fence, cluster, count).is_err() {
                return;
            }
        }
        let _ = self
            .refcounts
            .write_blocks(&mut self.fence)
            .and_then(|()| self.fence.sync());
    }

    /// Reads the header again, after fields of it were switched.
    pub(super) fn reload(&mut self) -> Result<()> {
        self.header = super::super::read_header(self.main.as_ref())?;
        Ok(())
    }

    /// The snapshots, and where their table ends.
    fn snapshots(&self) -> Result<(Vec<Snapshot>, u64)> {
        if self.header.nb_snapshots == 0 {
            return Ok((Vec::new(), self.header.snapshots_offset.get()));
        }
        let (snapshots, end) = snapshot::read_table(self.main.as_ref(), &self.header, &Limits::default())?;
        Ok((snapshots, end.get()))
    }

    /// Bytes of the snapshot table.
    pub(super) fn snapshot_table_len(&self) -> Result<u64> {
        let (_, end) = self.snapshots()?;
        Ok(end.saturating_sub(self.header.snapshots_offset.get()))
    }

    /// All L1 tables, the active one first.
    pub(super) fn l1_tables(&self) -> Result<Vec<L1Table>> {
        let mut tables = Vec::new();
        let mut entry_at = self.header.snapshots_offset.get();
        for snapshot in self.snapshots()?.0 {
            tables.push(L1Table {
                at: snapshot.l1_table_offset.get(),
                entries: snapshot.l1_size,
                // It begins with the table's offset.
                named_at: vec![entry_at],
            });
            entry_at = entry_at.saturating_add(snapshot.len());
        }
        tables.sort_by_key(|table| (table.at, table.entries));
        tables.dedup_by(|next, table| {
            let same = (next.at, next.entries) == (table.at, table.entries);
            if same {
                table.named_at.append(&mut next.named_at);
            }
            same
        });
        let active = L1Table {
            at: self.header.l1_table_offset.get(),
            entries: self.header.l1_size,
            named_at: vec![HEADER_L1_OFFSET_AT],
        };
        tables.insert(0, active);
        Ok(tables)
    }

    /// Calls `each` with every entry of an L1 table that names an L2 table: where the entry is, its number, and it.
    pub(super) fn each_l1_entry(
        &mut self,
        table: &L1Table,
        mut each: impl FnMut(&mut Self, u64, u64, L1Entry) -> Result<()>,
    ) -> Result<()> {
        const PIECE: u64 = 64 << 10;
        let len = u64::from(table.entries) * 8;
        let mut piece = Vec::new();
        let mut done = 0;
        while done < len {
            let piece_len = PIECE.min(len - done);
            piece.resize(usize::try_from(piece_len).unwrap_or(0), 0);
            self.main
                .read_padded(HostOffset::new(table.at.saturating_add(done)), &mut piece)?;
            for (number, entry) in (done / 8..).zip(piece.as_chunks::<8>().0) {
                let entry = L1Entry(u64::from_be_bytes(*entry));
                if entry.offset() != HostOffset::ZERO {
                    each(self, table.at.saturating_add(number * 8), number, entry)?;
                }
            }
            done += piece_len;
        }
        Ok(())
    }

    /// All L2 tables, each once: the L1 entry that names it first, and where it is. In guest order.
    pub(super) fn l2_tables(&mut self) -> Result<Vec<(u64, u64)>> {
        let mut tables = Vec::new();
        for l1 in self.l1_tables()? {
            self.each_l1_entry(&l1, |_, _, number, entry| {
                tables.push((entry.offset().get(), number));
                Ok(())
            })?;
        }
        tables.sort_unstable();
        tables.dedup_by_key(|(at, _)| *at);
        for table in &mut tables {
            *table = (table.1, table.0);
        }
        tables.sort_unstable();
        Ok(tables)
    }

    /// Reads the L2 table at `at` into `entries`, without what is empty.
    pub(super) fn read_l2(&self, at: u64, entries: &mut Vec<(u64, Entry)>) -> Result<()> {
        let mut table = vec![0; self.geometry.cluster_bits().cluster_len()];
        self.main.read_padded(HostOffset::new(at), &mut table)?;
        entries.clear();
        let step = self.geometry.entry_len();
        for (number, words) in (0_u64..).zip(table.chunks_exact(step)) {
            let (word, subclusters) = match (words.first_chunk::<16>(), words.first_chunk::<8>()) {
                (Some(words), _) => split_entry(words),
                (None, Some(word)) => (L2Entry(u64::from_be_bytes(*word)), Subclusters(0)),
                (None, None) => continue,
            };
            if word.0 != 0 || subclusters.0 != 0 {
                let at = at.saturating_add(number * step as u64);
                entries.push((
                    number,
                    Entry {
                        at,
                        word,
                        subclusters,
                    },
                ));
            }
        }
        Ok(())
    }
}

/// Writes `bytes` to a place that may hold anything; pieces that are zero are made holes.
fn write_sparse(file: &dyn StorageMut, at: u64, bytes: &[u8]) -> Result<()> {
    let mut at = HostOffset::new(at);
    let mut rest = bytes;
    while !rest.is_empty() {
        let piece_is_zero = |piece: &&[u8]| is_zero(piece);
        let zeros = rest.chunks(HOLE).take_while(piece_is_zero).map(<[u8]>::len).sum();
        let (hole, behind) = rest.split_at(zeros);
        if !hole.is_empty() {
            file.zero(at..at.plus(hole.len() as u64)?, ZeroHow::MayUnmap)?;
            at = at.plus(hole.len() as u64)?;
        }
        let stored = behind
            .chunks(HOLE)
            .take_while(|piece| !piece_is_zero(piece))
            .map(<[u8]>::len)
            .sum();
        let (stored, after) = behind.split_at(stored);
        if !stored.is_empty() {
            file.write_at(at, stored)?;
            at = at.plus(stored.len() as u64)?;
        }
        rest = after;
    }
    Ok(())
}
