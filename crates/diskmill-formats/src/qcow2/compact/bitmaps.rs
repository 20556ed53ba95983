//! Where the parts of dirty bitmaps are, and which fields name them.

use diskmill_core::{HostOffset, Result};
use zerocopy::{FromBytes, big_endian};

use super::super::layout::{EXT_BITMAPS, EXT_END, OFFSET_MASK, RawBitmap};
use super::work::Work;

/// The table of a bitmap.
#[derive(Clone, Copy, Debug)]
pub(super) struct BitmapTable {
    pub(super) at: u64,
    pub(super) entries: u32,
    /// The field that names it.
    pub(super) named_at: u64,
    /// What it says is not to be trusted; it stays what it is.
    pub(super) in_use: bool,
}

impl Work<'_> {
    /// The directory of bitmaps: the field that names it, where it is and its bytes.
    pub(super) fn bitmap_directory(&self) -> Result<Option<(u64, u64, u64)>> {
        let Some(place) = self.header.bitmaps() else {
            return Ok(None);
        };
        let mut area = vec![0; self.geometry.cluster_bits().cluster_len()];
        self.main.read_padded(HostOffset::ZERO, &mut area)?;
        let mut at = usize::try_from(self.header.header_length()).unwrap_or(usize::MAX);
        loop {
            let Some(Ok((head, _))) = area.get(at..).map(<[big_endian::U32; 2]>::read_from_prefix) else {
                return Ok(None);
            };
            let [kind, len] = head.map(big_endian::U32::get);
            match kind {
                EXT_END => return Ok(None),
                // Its last 8 bytes are the directory's offset.
                EXT_BITMAPS => {
                    let named_at = (at as u64).saturating_add(8 + 16);
                    return Ok(Some((
                        named_at,
                        place.directory_offset.get(),
                        place.directory_size,
                    )));
                }
                _ => {
                    let len = usize::try_from(len).unwrap_or(usize::MAX);
                    at = at.saturating_add(8).saturating_add(len).saturating_add(7) & !7;
                }
            }
        }
    }

    /// The tables of all bitmaps.
    pub(super) fn bitmap_tables(&self) -> Result<Vec<BitmapTable>> {
        let Some((_, at, len)) = self.bitmap_directory()? else {
            return Ok(Vec::new());
        };
        // At most 64 MiB: the extension has been checked.
        let mut directory = vec![0; usize::try_from(len).unwrap_or(0)];
        self.main.read_padded(HostOffset::new(at), &mut directory)?;
        let mut tables = Vec::new();
        let mut from = 0_usize;
        while let Some(Ok((raw, _))) = directory.get(from..).map(RawBitmap::read_from_prefix) {
            tables.push(BitmapTable {
                at: raw.table_offset.get(),
                entries: raw.table_size.get(),
                named_at: at.saturating_add(from as u64),
                in_use: raw.flags.get() & 1 != 0,
            });
            let name = u64::from(raw.name_len.get()).saturating_add(raw.extra_len.get().into());
            let entry = (size_of::<RawBitmap>() as u64)
                .saturating_add(name)
                .next_multiple_of(8);
            from = from.saturating_add(usize::try_from(entry).unwrap_or(usize::MAX));
        }
        Ok(tables)
    }

    /// Calls `each` with every entry of a bitmap's table that names a cluster: where the entry is, and the cluster's
    /// offset.
    pub(super) fn each_bitmap_entry(
        &mut self,
        table: &BitmapTable,
        mut each: impl FnMut(&mut Self, u64, u64) -> Result<()>,
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
                let host = u64::from_be_bytes(*entry) & OFFSET_MASK;
                if host != 0 {
                    each(self, table.at.saturating_add(number * 8), host)?;
                }
            }
            done += piece_len;
        }
        Ok(())
    }
}
