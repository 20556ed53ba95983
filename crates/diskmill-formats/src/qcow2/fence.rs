//! The main file of an image that is being written, and the guard around its metadata.
//!
//! Every write of an image open for writing goes through a [`Fence`] or is first asked about here. A write that would
//! land on metadata of another sort is refused: it means that a table or a refcount of the image lies, and carrying it
//! out would destroy the rest.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{Error, ErrorKind, HostOffset, Result, StorageMut};

/// What a part of the main file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Guest data, compressed or not.
    Data,
    /// The first cluster.
    Header,
    /// The active L1 table.
    ActiveL1,
    /// An L2 table of the active state.
    ActiveL2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The snapshot table.
    SnapshotTable,
    /// The L1 table of a snapshot.
    InactiveL1,
    /// The directory of dirty bitmaps.
    BitmapDirectory,
    /// The table of a dirty bitmap.
    BitmapTable,
    /// The header of the encryption, with the key material.
    EncryptionHeader,
}

impl Part {
    const fn name(self) -> &'static str {
        match self {
            Self::Data => "guest data",
            Self::Header => "the header",
            Self::ActiveL1 => "the active L1 table",
            Self::ActiveL2 => "an active L2 table",
            Self::RefcountTable => "the refcount table",
            Self::RefcountBlock => "a refcount block",
            Self::SnapshotTable => "the snapshot table",
            Self::InactiveL1 => "the L1 table of a snapshot",
            Self::BitmapDirectory => "the directory of dirty bitmaps",
            Self::BitmapTable => "the table of a dirty bitmap",
            Self::EncryptionHeader => "the encryption header",
        }
    }
}

/// A write that would have destroyed metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("writing {what} to bytes {start:#x} to {end:#x} would overwrite {over}")]
pub(crate) struct Overlap {
    what: &'static str,
    start: u64,
    end: u64,
    over: &'static str,
}

/// The main file, and where its metadata is.
#[derive(Debug)]
pub(crate) struct Fence {
    file: Arc<dyn StorageMut>,
    data_file: Option<Arc<dyn StorageMut>>,
    cluster_bits: u32,
    /// Regions of any length: few. By start, as (end, part); kept apart from one another.
    regions: BTreeMap<u64, (u64, Part)>,
    /// Tables of one cluster: many. By cluster index; how often they are named, more than once in a corrupt image.
    tables: BTreeMap<u64, (Part, u32)>,
    /// Bytes have been written that metadata must not overtake.
    unsynced: bool,
    /// A switch from old tables to new ones failed half-way.
    adrift: bool,
}

impl Fence {
    /// A fence with no regions yet. `data_file` is the external data file, which is made durable together with `file`.
    pub(crate) fn new(
        file: Arc<dyn StorageMut>,
        data_file: Option<Arc<dyn StorageMut>>,
        cluster_bits: u32,
    ) -> Self {
        Self {
            file,
            data_file,
            cluster_bits,
            regions: BTreeMap::new(),
            tables: BTreeMap::new(),
            unsynced: false,
            adrift: false,
        }
    }

    /// The file itself.
    pub(crate) fn file(&self) -> &Arc<dyn StorageMut> {
        &self.file
    }

    /// Bytes of a cluster.
    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Protects a region. Regions that overlap, which only a corrupt image has, are joined under one name.
    pub(crate) fn protect(&mut self, range: Range<u64>, part: Part) {
        let mut joined = range;
        while let Some((start, end)) = self.region_in(&joined).map(|(start, end, _)| (start, end)) {
            self.regions.remove(&start);
            joined = joined.start.min(start)..joined.end.max(end);
        }
        if joined.start < joined.end {
            self.regions.insert(joined.start, (joined.end, part));
        }
    }

    /// Ends the protection of the region that starts at `start`.
    pub(crate) fn unprotect(&mut self, start: u64) {
        self.regions.remove(&start);
    }

    /// Protects a table of one cluster.
    pub(crate) fn protect_table(&mut self, at: u64, part: Part) {
        let (_, named) = self.tables.entry(at >> self.cluster_bits).or_insert((part, 0));
        *named = named.saturating_add(1);
    }

    /// Ends the protection of a table of one cluster for one that named it. Returns whether nothing else does.
    pub(crate) fn unprotect_table(&mut self, at: u64) -> bool {
        let cluster = at >> self.cluster_bits;
        if let Some((_, named @ 2..)) = self.tables.get_mut(&cluster) {
            *named -= 1;
            false
        } else {
            self.tables.remove(&cluster);
            true
        }
    }

    fn region_in(&self, range: &Range<u64>) -> Option<(u64, u64, Part)> {
        let (start, (end, part)) = self.regions.range(..range.end).next_back()?;
        (*end > range.start).then_some((*start, *end, *part))
    }

    /// Fails if writing `what` to `range` would overwrite metadata of another sort.
    pub(crate) fn check(&self, what: Part, range: Range<u64>) -> Result<()> {
        let over = match self.region_in(&range) {
            Some((_, _, part)) if part != what || what == Part::Data => Some(part),
            _ => {
                let first = range.start >> self.cluster_bits;
                let last = range.end.saturating_sub(1).max(range.start) >> self.cluster_bits;
                self.tables
                    .range(first..=last)
                    .map(|(_, (part, _))| *part)
                    .find(|part| *part != what || what == Part::Data)
            }
        };
        match over {
            None => Ok(()),
            Some(part) => Err(Error::new(
                ErrorKind::Corrupt,
                Overlap {
                    what: what.name(),
                    start: range.start,
                    end: range.end,
                    over: part.name(),
                },
            )
            .host(HostOffset::new(range.start))),
        }
    }

    /// Writes metadata that later metadata will rely on.
    pub(crate) fn write(&mut self, what: Part, at: u64, bytes: &[u8]) -> Result<()> {
        self.check(what, at..at.saturating_add(bytes.len() as u64))?;
        self.unsynced = true;
        self.file.write_at(HostOffset::new(at), bytes)
    }

    /// Changes header fields from byte `at` on: one write of the first sector, which the host does not tear.
    pub(crate) fn write_header(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        let mut sector = [0; 512];
        self.file.read_padded(HostOffset::ZERO, &mut sector)?;
        if let Some(field) = sector.get_mut(at..at.saturating_add(bytes.len())) {
            field.copy_from_slice(bytes);
        }
        let written = self.write(Part::Header, 0, &sector);
        if written.is_err() {
            self.set_adrift();
        }
        written
    }

    /// Notes that nobody knows which tables the file names now.
    pub(crate) fn set_adrift(&mut self) {
        self.adrift = true;
    }

    /// Whether nobody knows which tables the file names. What is on disk is one of two consistent states; nothing that
    /// builds on either may be written.
    pub(crate) fn is_adrift(&self) -> bool {
        self.adrift
    }

    /// Notes that guest data was written which must be durable before the table entry that shows it.
    pub(crate) fn note_copied(&mut self) {
        self.unsynced = true;
    }

    /// Makes all that was written durable, the external data file first.
    pub(crate) fn sync(&mut self) -> Result<()> {
        if let Some(data) = &self.data_file {
            data.sync()?;
        }
        self.file.sync()?;
        self.unsynced = false;
        Ok(())
    }

    /// Makes what later writes rely on durable, if there is anything.
    pub(crate) fn barrier(&mut self) -> Result<()> {
        if self.unsynced { self.sync() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use diskmill_storage::Memory;

    use super::*;

    fn fence() -> Fence {
        let mut fence = Fence::new(Arc::new(Memory::new()), None, 9);
        fence.protect(0..512, Part::Header);
        fence.protect(1024..4096, Part::RefcountTable);
        fence.protect_table(8192, Part::ActiveL2);
        fence
    }

    #[test]
    fn data_stays_clear_of_metadata() {
        let fence = fence();
        for free in [512..1024, 4096..8192, 8704..1 << 40] {
            fence.check(Part::Data, free).unwrap();
        }
        for hit in [
            0..1,
            511..513,
            1000..1025,
            4095..4096,
            2000..2001,
            0..1 << 40,
            8703..8704,
            4096..8193,
        ] {
            let error = fence.check(Part::Data, hit.clone()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{hit:?}");
            assert!(error.find::<Overlap>().is_some());
        }
    }

    #[test]
    fn metadata_may_be_written_where_it_is_and_nowhere_else() {
        let mut fence = fence();
        fence.write(Part::RefcountTable, 1536, &[1; 512]).unwrap();
        fence.write(Part::ActiveL2, 8192, &[1; 512]).unwrap();
        fence.write(Part::ActiveL2, 1536, &[1; 512]).unwrap_err();
        fence.write(Part::RefcountBlock, 8192, &[1; 512]).unwrap_err();
        fence.write(Part::Header, 8192, &[1; 512]).unwrap_err();
    }

    #[test]
    fn protection_ends_with_the_last_that_names_it() {
        let mut fence = fence();
        fence.protect_table(8192, Part::ActiveL2);
        assert!(!fence.unprotect_table(8192));
        fence.check(Part::Data, 8192..8193).unwrap_err();
        assert!(fence.unprotect_table(8192));
        fence.check(Part::Data, 8192..8193).unwrap();
        fence.unprotect(1024);
        fence.check(Part::Data, 1024..4096).unwrap();
    }

    #[test]
    fn regions_that_overlap_are_guarded_as_one() {
        let mut fence = fence();
        fence.protect(3000..9000, Part::ActiveL1);
        fence.protect(5000..5001, Part::SnapshotTable);
        for byte in [1024, 3500, 5000, 8999] {
            fence.check(Part::Data, byte..byte + 1).unwrap_err();
        }
        fence.check(Part::Data, 9216..9300).unwrap();
    }
}
