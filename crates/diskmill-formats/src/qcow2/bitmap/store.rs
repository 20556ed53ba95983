//! The bitmaps of an image that is being written.
//!
//! Changes of guest data are noted in memory, as runs of bytes and once for all enabled bitmaps. They reach the bits
//! when the image is flushed, or before if there are many:
//!
//! 1. before the first change, all enabled bitmaps are marked as in use, which is made durable;
//! 2. now that nobody trusts them, bits are set where they are, in new clusters where there were none;
//! 3. new clusters are counted, then entered into the tables;
//! 4. once all that is durable, the marks are taken back.
//!
//! A power cut leaves bitmaps that are in use, and so can only be removed, but never one that lacks a change.

use std::collections::BTreeMap;
use std::ops::Range;

use diskmill_core::{BitmapFacts, HostOffset, Limits, Result};

use super::changed::Changed;
use super::table::{self, Bits, TableError};
use super::{Bitmap, Shape, directory};
use crate::qcow2::extension::BitmapsExtension;
use crate::qcow2::fence::Part;
use crate::qcow2::header::Header;
use crate::qcow2::tables::Tables;

/// Bytes of a sector, which the host does not tear.
const SECTOR: usize = 512;
/// New table entries kept in memory.
const MAX_PENDING: usize = 4096;

/// The bitmaps of an image that is being written.
#[derive(Debug)]
pub(crate) struct Store {
    pub(super) bitmaps: Vec<Bitmap>,
    /// Where the directory is.
    pub(super) place: Option<BitmapsExtension>,
    pub(super) disk_size: u64,
    cluster_bits: u32,
    /// Enabled bitmaps are marked as in use on disk.
    marked: bool,
    changed: Changed,
    /// Table entries that are not written yet, by bitmap and entry.
    pending: BTreeMap<(usize, u64), Bits>,
}

/// The bits of one cluster, while they are being set.
#[derive(Debug)]
struct Window {
    entry: u64,
    at: HostOffset,
    bits: Vec<u8>,
    dirty: Range<usize>,
}

impl Store {
    /// Reads the directory of the image with header `header`, and protects what it names. The tables of bitmaps that
    /// changes will be recorded in are checked.
    pub(crate) fn load(tables: &mut Tables, header: &Header, limits: &Limits) -> Result<Self> {
        let file = tables.fence.file().clone();
        let store = Self {
            bitmaps: directory::read_directory(file.as_ref(), header, limits)?,
            place: header.bitmaps(),
            disk_size: header.virtual_size(),
            cluster_bits: header.cluster_bits.get(),
            marked: false,
            changed: Changed::default(),
            pending: BTreeMap::new(),
        };
        let cluster_size = header.cluster_bits.cluster_size();
        for bitmap in store.bitmaps.iter().filter(|bitmap| bitmap.records()) {
            table::check(file.as_ref(), bitmap, cluster_size)?;
        }
        store.protect(tables);
        Ok(store)
    }

    /// Protects the directory and the tables. That of an inconsistent bitmap may be anywhere.
    pub(super) fn protect(&self, tables: &mut Tables) {
        if let Some(place) = self.place {
            let at = place.directory_offset.get();
            let end = at.saturating_add(place.directory_size);
            tables.fence.protect(at..end, Part::BitmapDirectory);
        }
        for bitmap in self.bitmaps.iter().filter(|bitmap| !bitmap.in_use) {
            let range = table_range(bitmap);
            tables.fence.protect(range, Part::BitmapTable);
        }
    }

    /// Ends what [`protect`](Self::protect) began.
    pub(super) fn unprotect(&self, tables: &mut Tables) {
        if let Some(place) = self.place {
            tables.fence.unprotect(place.directory_offset.get());
        }
        for bitmap in self.bitmaps.iter().filter(|bitmap| !bitmap.in_use) {
            tables.fence.unprotect(bitmap.table_offset.get());
        }
    }

    pub(super) fn shape(&self, bitmap: &Bitmap) -> Shape {
        bitmap.shape(self.cluster_bits, self.disk_size)
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether enabled bitmaps are marked as in use on disk.
    pub(crate) fn is_marked(&self) -> bool {
        self.marked
    }

    /// What there are.
    pub(crate) fn facts(&self) -> Vec<BitmapFacts> {
        self.bitmaps.iter().map(Bitmap::facts).collect()
    }

    /// Whether there are bitmaps at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.bitmaps.is_empty()
    }

    /// Notes that the disk has `size` bytes. There are no bitmaps, or they have its size already.
    pub(crate) fn set_disk_size(&mut self, size: u64) {
        self.disk_size = size;
    }

    /// The step in which changes are noted: the finest of the bitmaps that record them, if any does.
    fn step(&self) -> Option<u64> {
        let recording = self.bitmaps.iter().filter(|bitmap| bitmap.records());
        recording.map(Bitmap::granularity).min()
    }

    /// Notes that guest bytes `range` are about to be changed. When this returns, a power cut will not leave a bitmap
    /// that is trusted and lacks the change. An empty range notes nothing, but has bitmaps distrusted.
    pub(crate) fn mark(&mut self, tables: &mut Tables, range: &Range<u64>) -> Result<()> {
        let Some(step) = self.step() else {
            return Ok(());
        };
        if !self.marked {
            self.write_directory(tables, &self.bitmaps, true)?;
            self.marked = true;
        }
        self.changed.add(range, step);
        if self.changed.is_full() {
            self.spill(tables)?;
        }
        Ok(())
    }

    /// Makes all that was written durable, and the bitmaps true and trusted.
    pub(crate) fn flush(&mut self, tables: &mut Tables) -> Result<()> {
        if !self.marked {
            return tables.flush();
        }
        self.spill(tables)?;
        tables.flush()?;
        self.write_pending(tables)?;
        tables.fence.barrier()?;
        self.write_directory(tables, &self.bitmaps, false)?;
        self.marked = false;
        Ok(())
    }

    /// Puts `bitmaps`, which differ in flags at most, in the place of the directory, and makes it durable. With
    /// `recording`, those that record changes are marked as in use.
    fn write_directory(&self, tables: &mut Tables, bitmaps: &[Bitmap], recording: bool) -> Result<()> {
        let Some(place) = self.place else {
            return Ok(());
        };
        let mut old = directory::to_bytes(&self.bitmaps, self.marked);
        let mut new = directory::to_bytes(bitmaps, recording);
        // Whole sectors; the rest of the last cluster is the directory's own.
        old.resize(old.len().next_multiple_of(SECTOR), 0);
        new.resize(new.len().next_multiple_of(SECTOR), 0);
        let sectors = old.chunks(SECTOR).zip(new.chunks(SECTOR)).enumerate();
        for (index, (_, sector)) in sectors.filter(|(_, (old, new))| old != new) {
            let at = place.directory_offset.saturating_add((index * SECTOR) as u64);
            tables.fence.write(Part::BitmapDirectory, at.get(), sector)?;
        }
        tables.fence.barrier()
    }

    /// Changes flags of bitmaps. No changes of guest data may be noted.
    pub(super) fn write_flags(&mut self, tables: &mut Tables, bitmaps: Vec<Bitmap>) -> Result<()> {
        self.write_directory(tables, &bitmaps, self.marked)?;
        self.bitmaps = bitmaps;
        Ok(())
    }

    /// Sets the bits of all changes that are noted.
    fn spill(&mut self, tables: &mut Tables) -> Result<()> {
        for index in 0..self.bitmaps.len() {
            self.record(tables, index)?;
        }
        self.changed.clear();
        Ok(())
    }

    /// Sets the bits of all changes that are noted in one bitmap.
    fn record(&mut self, tables: &mut Tables, index: usize) -> Result<()> {
        let Some(bitmap) = self.bitmaps.get(index).filter(|bitmap| bitmap.records()).cloned() else {
            return Ok(());
        };
        let shape = self.shape(&bitmap);
        let runs: Vec<_> = self.changed.runs().map(|run| shape.touched(&run)).collect();
        let mut window: Option<Window> = None;
        for run in runs {
            let mut at = run.start;
            while at < run.end {
                let entry = shape.entry_of(at);
                let covers = shape.bits_of(entry);
                let bits = at..run.end.min(covers.end);
                at = bits.end;
                if window.as_ref().is_none_or(|window| window.entry != entry) {
                    close(tables, window.take())?;
                    let all = bits == covers && shape.is_whole(entry);
                    window = self.open(tables, index, &bitmap, entry, all)?;
                }
                if let Some(window) = &mut window {
                    window.set(bits.start - covers.start..bits.end - covers.start);
                }
            }
        }
        close(tables, window)
    }

    /// The bits of table entry `entry`, in memory; `None` if they are all set. With `all` they are to be.
    fn open(
        &mut self,
        tables: &mut Tables,
        index: usize,
        bitmap: &Bitmap,
        entry: u64,
        all: bool,
    ) -> Result<Option<Window>> {
        let len = 1 << self.cluster_bits;
        let known = match self.pending.get(&(index, entry)) {
            Some(bits) => *bits,
            None => table::read(
                tables.fence.file().as_ref(),
                bitmap,
                self.cluster_size(),
                entry,
                1,
            )?
            .first()
            .copied()
            .unwrap_or(Bits::Clear),
        };
        let mut bits = vec![0; len];
        let (at, dirty) = match known {
            Bits::Set => return Ok(None),
            Bits::At(at) => {
                if tables
                    .refcounts
                    .get(&mut tables.fence, at.get() >> self.cluster_bits)?
                    == 0
                {
                    let name = bitmap.name.clone();
                    return Err(TableError::Uncounted { name, at: at.get() }.into());
                }
                tables.fence.file().read_padded(at, &mut bits)?;
                (at, 0..0)
            }
            Bits::Clear => {
                if self.pending.len() >= MAX_PENDING {
                    tables.write_back(true)?;
                    self.write_pending(tables)?;
                }
                if all {
                    // That takes no cluster.
                    self.pending.insert((index, entry), Bits::Set);
                    return Ok(None);
                }
                let (cluster, _) = tables.allocate(1, 1)?;
                let at = HostOffset::new(cluster << self.cluster_bits);
                self.pending.insert((index, entry), Bits::At(at));
                (at, 0..len)
            }
        };
        Ok(Some(Window {
            entry,
            at,
            bits,
            dirty,
        }))
    }

    /// Enters new clusters into the tables. They and their counts must be durable.
    fn write_pending(&mut self, tables: &mut Tables) -> Result<()> {
        for ((index, entry), bits) in &self.pending {
            if let Some(bitmap) = self.bitmaps.get(*index) {
                let place = bitmap.table_offset.saturating_add(entry * table::ENTRY_LEN);
                let bytes = bits.encode().to_be_bytes();
                tables.fence.write(Part::BitmapTable, place.get(), &bytes)?;
            }
        }
        self.pending.clear();
        Ok(())
    }
}

impl Window {
    fn set(&mut self, range: Range<u64>) {
        let touched = set_bits(&mut self.bits, range);
        self.dirty = match self.dirty.is_empty() {
            true => touched,
            false if touched.is_empty() => self.dirty.clone(),
            false => self.dirty.start.min(touched.start)..self.dirty.end.max(touched.end),
        };
    }
}

/// Writes back what was changed of a window.
fn close(tables: &mut Tables, window: Option<Window>) -> Result<()> {
    let Some(window) = window.filter(|window| !window.dirty.is_empty()) else {
        return Ok(());
    };
    let start = window.dirty.start / SECTOR * SECTOR;
    let end = window.dirty.end.next_multiple_of(SECTOR).min(window.bits.len());
    match window.bits.get(start..end) {
        Some(bytes) => tables
            .fence
            .write(Part::Data, window.at.saturating_add(start as u64).get(), bytes),
        None => Ok(()),
    }
}

/// Sets the bits of `range`, lowest first in each byte. Returns the bytes that were changed, or more.
pub(super) fn set_bits(bytes: &mut [u8], range: Range<u64>) -> Range<usize> {
    let (Ok(start), Ok(end)) = (usize::try_from(range.start), usize::try_from(range.end)) else {
        return 0..0;
    };
    let touched = start / 8..end.div_ceil(8);
    let mut changed: Option<Range<usize>> = None;
    for (index, byte) in bytes.iter_mut().enumerate().take(touched.end).skip(touched.start) {
        let low = start.saturating_sub(index * 8).min(7);
        let high = (end - index * 8).clamp(1, 8);
        let mask = (u8::MAX << low) & (u8::MAX >> (8 - high));
        if *byte & mask != mask {
            *byte |= mask;
            let first = changed.as_ref().map_or(index, |changed| changed.start);
            changed = Some(first..index + 1);
        }
    }
    changed.unwrap_or(0..0)
}

/// The bytes of the file that the table of `bitmap` takes.
fn table_range(bitmap: &Bitmap) -> Range<u64> {
    let at = bitmap.table_offset.get();
    at..at.saturating_add(u64::from(bitmap.table_entries) * table::ENTRY_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_set_from_the_lowest_on() {
        for (range, expected, touched) in [
            (0..1, [1, 0, 0], 0..1),
            (7..9, [0x80, 1, 0], 0..2),
            (3..5, [0x18, 0, 0], 0..1),
            (4..24, [0xf0, 0xff, 0xff], 0..3),
            (8..16, [0, 0xff, 0], 1..2),
            (5..5, [0, 0, 0], 0..0),
        ] {
            let mut bytes = [0; 3];
            assert_eq!(set_bits(&mut bytes, range.clone()), touched, "{range:?}");
            assert_eq!(bytes, expected, "{range:?}");
            assert_eq!(set_bits(&mut bytes, range.clone()), 0..0, "{range:?}");
        }
    }
}
