//! The bitmap: which sectors are in the file.
//!
//! It is as long as the header says, up to 2 GiB, however short the file is. So it is never read whole: pages of 16 KiB
//! come in as they are asked for, a bounded number of them is kept, and what the host knows to be a hole is not read.

use std::collections::BTreeMap;
use std::ops::Range;

use diskmill_core::{
    Error, ErrorKind, Extent, FileIndex, GuestOffset, HostOffset, HostRun, HostSpan, Result, SECTOR, State,
    Storage, StorageMut,
};

use super::header::Layout;
use crate::bounds::within;

/// Bytes of the bitmap in a page: 64 MiB of the disk.
pub(super) const PAGE: u64 = 16 << 10;
/// Sectors a page tells of.
const PAGE_SECTORS: u64 = PAGE * 8;
/// Pages that are kept.
const KEPT: usize = 64;
/// Pages that are read for one answer.
const READ_AT_ONCE: u32 = 64;

/// Where bitmap and data are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    header_len: u64,
    sectors: u64,
}

impl Geometry {
    /// That of a disk of `size` bytes, at most [`SIZE_MAX`](super::layout::SIZE_MAX).
    pub fn new(layout: Layout, size: u64) -> Self {
        Self {
            header_len: layout.header_len(),
            sectors: size / SECTOR,
        }
    }

    /// Sectors of the disk.
    pub fn sectors(self) -> u64 {
        self.sectors
    }

    /// Bytes of the disk.
    pub fn size(self) -> u64 {
        self.sectors.saturating_mul(SECTOR)
    }

    /// Where the bitmap starts: right behind the header.
    pub fn bitmap_at(self) -> u64 {
        self.header_len
    }

    /// Bytes of the bitmap.
    pub fn bitmap_len(self) -> u64 {
        self.sectors.div_ceil(8)
    }

    /// Where the bitmap ends.
    pub fn bitmap_end(self) -> u64 {
        self.header_len.saturating_add(self.bitmap_len())
    }

    /// Where the first sector of the disk is: a multiple of 512.
    pub fn data_at(self) -> u64 {
        self.bitmap_end().next_multiple_of(SECTOR)
    }

    /// Where a byte of the disk is, if its sector is in the file.
    pub fn host(self, at: GuestOffset) -> HostOffset {
        HostOffset::new(self.data_at()).saturating_add(at.get())
    }

    /// Where the last sector of the disk ends.
    pub fn end(self) -> u64 {
        self.data_at().saturating_add(self.size())
    }
}

/// The sectors that `len` bytes from `at` on touch.
pub(super) fn sectors(at: GuestOffset, len: u64) -> Range<u64> {
    at.get() / SECTOR..at.get().saturating_add(len).div_ceil(SECTOR)
}

#[derive(Debug)]
struct Page {
    bits: Vec<u8>,
    /// Bytes that differ from those in the file, or may.
    dirty: Option<Range<usize>>,
    used: u64,
}

/// The bitmap of an image.
#[derive(Debug)]
pub(super) struct Bitmap {
    pub(super) geometry: Geometry,
    pages: BTreeMap<u64, Page>,
    clock: u64,
}

impl Bitmap {
    pub(super) fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            pages: BTreeMap::new(),
            clock: 0,
        }
    }

    fn page_at(&self, index: u64) -> HostOffset {
        HostOffset::new(self.geometry.bitmap_at()).saturating_add(index.saturating_mul(PAGE))
    }

    /// The page with this index, read if it has to be.
    fn page(&mut self, file: &dyn Storage, index: u64) -> Result<&mut Page> {
        self.clock = self.clock.wrapping_add(1);
        let used = self.clock;
        if !self.pages.contains_key(&index) {
            let start = index.saturating_mul(PAGE);
            let len = self.geometry.bitmap_len().saturating_sub(start).min(PAGE);
            let mut bits = vec![0; usize::try_from(len).unwrap_or(0)];
            file.read_padded(self.page_at(index), &mut bits)
                .map_err(|error| error.op("read the bitmap"))?;
            if self.pages.len() >= KEPT {
                self.drop_oldest();
            }
            self.pages.insert(
                index,
                Page {
                    bits,
                    dirty: None,
                    used,
                },
            );
        }
        let page = self.pages.entry(index).or_insert_with(|| Page {
            bits: Vec::new(),
            dirty: None,
            used,
        });
        page.used = used;
        Ok(page)
    }

    /// Forgets the page that was not asked for for longest, among those that are as in the file.
    fn drop_oldest(&mut self) {
        let clean = self.pages.iter().filter(|(_, page)| page.dirty.is_none());
        let oldest = clean.min_by_key(|(_, page)| page.used).map(|(index, _)| *index);
        if let Some(index) = oldest {
            self.pages.remove(&index);
        }
    }

    /// Whether `sector` is in the file, and for how many sectors from there on the answer is the same: at least 1, at
    /// most `max`. Not all of a long run is always found at once.
    pub(super) fn run(&mut self, file: &dyn Storage, sector: u64, max: u64) -> Result<(bool, u64)> {
        let end = sector.saturating_add(max).min(self.geometry.sectors());
        let mut known = None;
        let mut at = sector;
        let mut read = 0;
        while at < end {
            let index = at / PAGE_SECTORS;
            let page_end = index.saturating_add(1).saturating_mul(PAGE_SECTORS).min(end);
            if !self.pages.contains_key(&index) {
                let empty = self.hole(file, index, end)?;
                if empty > at {
                    if known.get_or_insert(false) != &false {
                        break;
                    }
                    at = empty;
                    continue;
                }
                if read == READ_AT_ONCE {
                    break;
                }
                read = read.saturating_add(1);
            }
            let page = self.page(file, index)?;
            let value = *known.get_or_insert_with(|| bit(&page.bits, at % PAGE_SECTORS));
            let first = at % PAGE_SECTORS;
            let last = first.saturating_add(page_end.saturating_sub(at));
            let alike = alike(&page.bits, first..last, value);
            at = at.saturating_add(alike);
            if at < page_end {
                break;
            }
        }
        Ok((known.unwrap_or(false), at.saturating_sub(sector).max(1)))
    }

    /// Up to which sector no bit can be set from page `index` on, since the host has a hole there or the file ends. Pages
    /// that are kept count for themselves.
    fn hole(&self, file: &dyn Storage, index: u64, end: u64) -> Result<u64> {
        let start = self.page_at(index);
        let first = index.saturating_mul(PAGE_SECTORS);
        let len = match file.len()?.checked_sub(start.get()) {
            None | Some(0) => u64::MAX,
            Some(_) => match file.run_at(start)? {
                HostRun::Hole(len) => len,
                _ => return Ok(first),
            },
        };
        let end = first.saturating_add(len.saturating_mul(8)).min(end);
        let kept = self.pages.range(index..).next();
        let kept = kept.map_or(u64::MAX, |(index, _)| index.saturating_mul(PAGE_SECTORS));
        Ok(end.min(kept))
    }

    /// Whether all of `sectors` are in the file.
    pub(super) fn all(&mut self, file: &dyn Storage, sectors: Range<u64>) -> Result<bool> {
        let mut at = sectors.start;
        while at < sectors.end {
            match self.run(file, at, sectors.end.saturating_sub(at))? {
                (true, len) => at = at.saturating_add(len),
                (false, _) => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Says that `sectors` are in the file, in memory: [`write_back`](Self::write_back) writes it.
    pub(super) fn set(&mut self, file: &dyn Storage, sectors: Range<u64>) -> Result<()> {
        let mut at = sectors.start;
        while at < sectors.end {
            let index = at / PAGE_SECTORS;
            let page_end = index
                .saturating_add(1)
                .saturating_mul(PAGE_SECTORS)
                .min(sectors.end);
            let page = self.page(file, index)?;
            let first = at % PAGE_SECTORS;
            let range = first..first.saturating_add(page_end.saturating_sub(at));
            if let Some(changed) = fill(&mut page.bits, range) {
                page.dirty = Some(match page.dirty.take() {
                    Some(old) => old.start.min(changed.start)..old.end.max(changed.end),
                    None => changed,
                });
            }
            at = page_end;
        }
        Ok(())
    }

    /// Whether something waits to be written.
    pub(super) fn is_dirty(&self) -> bool {
        self.pages.values().any(|page| page.dirty.is_some())
    }

    /// Whether much waits to be written.
    pub(super) fn is_full(&self) -> bool {
        self.pages.len() > KEPT / 2
            && self.pages.values().filter(|page| page.dirty.is_some()).count() > KEPT / 2
    }

    /// Writes what waits.
    pub(super) fn write_back(&mut self, file: &dyn StorageMut) -> Result<()> {
        let base = HostOffset::new(self.geometry.bitmap_at());
        for (index, page) in &mut self.pages {
            if let Some(range) = &page.dirty {
                let at = base.plus(index.saturating_mul(PAGE).saturating_add(range.start as u64))?;
                file.write_at(at, page.bits.get(range.clone()).unwrap_or_default())
                    .map_err(|error| error.op("write the bitmap"))?;
                page.dirty = None;
            }
        }
        Ok(())
    }

    /// Forgets what was read, and what waits.
    pub(super) fn forget(&mut self, geometry: Geometry) {
        self.geometry = geometry;
        self.pages.clear();
    }

    /// What the bytes from `at` on are, in a file of `file_len` bytes. What is said to be in the file and is behind its
    /// end reads as zeros.
    pub(super) fn extent(
        &mut self,
        file: &dyn Storage,
        file_len: u64,
        at: GuestOffset,
        max: u64,
    ) -> Result<Extent> {
        let size = self.geometry.size();
        within(at, 1, size)?;
        if max == 0 {
            return Err(Error::new(ErrorKind::Usage, "0 bytes have no state"));
        }
        let max = max.min(size.saturating_sub(at.get()));
        let range = sectors(at, max);
        let (stored, count) = self.run(file, range.start, range.end.saturating_sub(range.start))?;
        let run_end = range.start.saturating_add(count).saturating_mul(SECTOR);
        let len = run_end.saturating_sub(at.get()).min(max);
        let host = self.geometry.host(at);
        let file_end = file_len.next_multiple_of(SECTOR);
        let (len, state) = match stored {
            false => (len, State::Absent),
            true if host.get() >= file_end => (len, State::Zero { reserved: None }),
            true => {
                let len = len.min(file_end.saturating_sub(host.get()));
                let file = FileIndex::MAIN;
                (len, State::Data(HostSpan { file, at: host, len }))
            }
        };
        Ok(Extent { len, state })
    }

    /// The bytes of page `index` of the bitmap, for whoever wants to see all of them.
    pub(super) fn bytes(&mut self, file: &dyn Storage, index: u64) -> Result<&[u8]> {
        Ok(&self.page(file, index)?.bits)
    }

    /// Up to which page nothing is set from page `index` on.
    pub(super) fn skip(&self, file: &dyn Storage, index: u64) -> Result<u64> {
        let pages = self.pages();
        let empty = self.hole(file, index, self.geometry.sectors())?;
        match empty >= self.geometry.sectors() {
            true => Ok(pages),
            false => Ok(empty / PAGE_SECTORS),
        }
    }

    /// How many pages there are.
    pub(super) fn pages(&self) -> u64 {
        self.geometry.bitmap_len().div_ceil(PAGE)
    }
}

fn bit(bits: &[u8], sector: u64) -> bool {
    let byte = usize::try_from(sector / 8).ok().and_then(|index| bits.get(index));
    byte.is_some_and(|byte| byte >> (sector % 8) & 1 != 0)
}

/// How many bits of `range` from its start on are `value`.
fn alike(bits: &[u8], range: Range<u64>, value: bool) -> u64 {
    let whole: u8 = if value { 0xff } else { 0 };
    let mut at = range.start;
    while at < range.end {
        if at.is_multiple_of(8) && range.end.saturating_sub(at) >= 8 {
            let rest = usize::try_from(at / 8).ok().and_then(|index| bits.get(index..));
            let most = usize::try_from(range.end.saturating_sub(at) / 8).unwrap_or(usize::MAX);
            let same = rest.unwrap_or_default().iter().take(most);
            let same = same.take_while(|byte| **byte == whole).count() as u64;
            if same > 0 {
                at = at.saturating_add(same.saturating_mul(8));
                continue;
            }
        }
        if bit(bits, at) != value {
            break;
        }
        at = at.saturating_add(1);
    }
    at.saturating_sub(range.start)
}

/// Sets the bits of `range`. Returns the bytes that has changed.
pub(super) fn fill(bits: &mut [u8], range: Range<u64>) -> Option<Range<usize>> {
    let mut changed: Option<Range<usize>> = None;
    let mut at = range.start;
    while at < range.end {
        let first = at % 8;
        let count = range.end.saturating_sub(at).min(8_u64.saturating_sub(first));
        let ones = (0xff_u64 << first) & !(u64::MAX << first.saturating_add(count));
        let index = usize::try_from(at / 8).unwrap_or(usize::MAX);
        if let (Some(byte), Ok(ones)) = (bits.get_mut(index), u8::try_from(ones))
            && *byte & ones != ones
        {
            *byte |= ones;
            let start = changed.map_or(index, |changed| changed.start);
            changed = Some(start..index.saturating_add(1));
        }
        at = at.saturating_add(count);
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_those_of_the_old_program() {
        let geometry = Geometry::new(Layout::Bits64, 1 << 20);
        let places = [geometry.bitmap_at(), geometry.bitmap_end(), geometry.data_at()];
        assert_eq!(places, [1056, 1312, 1536]);
        let geometry = Geometry::new(Layout::Bits32, 1 << 20);
        let places = [geometry.bitmap_at(), geometry.bitmap_end(), geometry.data_at()];
        assert_eq!(places, [1048, 1304, 1536]);
        // Header and bitmap end with a sector.
        let geometry = Geometry::new(Layout::Bits64, 480 * 8 * 512);
        assert_eq!((geometry.bitmap_end(), geometry.data_at()), (1536, 1536));
    }

    #[test]
    fn bits_are_filled_and_counted_from_the_lowest() {
        for (start, end) in [(0, 1), (3, 5), (0, 8), (7, 9), (5, 40), (8, 16), (13, 13)] {
            let mut bits = [0; 5];
            let changed = fill(&mut bits, start..end);
            for sector in 0..40 {
                assert_eq!(bit(&bits, sector), (start..end).contains(&sector), "{sector}");
            }
            assert_eq!(changed.is_some(), start < end);
            assert_eq!(alike(&bits, start..40, true), end - start);
            assert_eq!(alike(&bits, 0..40, false), if start < end { start } else { 40 });
            assert_eq!(fill(&mut bits, start..end), None);
        }
    }
}
