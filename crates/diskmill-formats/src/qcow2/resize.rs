//! Changing the size of the disk.

use std::sync::atomic::Ordering;

use diskmill_core::{Chain, Error, ErrorKind, Format, GuestOffset, HostOffset, Result, SECTOR, ZeroHow};

use super::header::Version;
use super::layout::L1_BYTES_MAX;
use super::slot::{Place, Slot};
use super::tables::Reclaim;
use super::write::Image;

/// Where the header keeps the size of the disk.
const HEADER_SIZE_AT: usize = 24;

/// Why an image cannot have another size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResizeError {
    /// A snapshot of version 2 does not say how large its disk is.
    #[error("resizing a version 2 image with snapshots is not supported")]
    OldSnapshots,
    /// More than the tables can describe.
    #[error("a disk of {size} bytes needs an l1 table of {entries} entries, must be at most {max}")]
    TooLarge {
        /// Bytes that were asked for.
        size: u64,
        /// L1 entries they need.
        entries: u64,
        /// L1 entries there may be.
        max: u64,
    },
}

fn refuse(error: ResizeError) -> Error {
    Error::new(ErrorKind::Unsupported, error).format(Format::Qcow2)
}

impl Image {
    /// Gives the disk another size, rounded up to a sector. All of its clusters are held.
    pub(super) fn resize_held(&self, size: u64, below: &Chain) -> Result<()> {
        let old = self.size.load(Ordering::Acquire);
        if !self.snapshot_facts().is_empty() && self.version() == Version::V2 {
            return Err(refuse(ResizeError::OldSnapshots));
        }
        if size.checked_next_multiple_of(SECTOR) == Some(old) {
            return Ok(());
        }
        let max = L1_BYTES_MAX / 8;
        let rounded = size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
        let entries = self.geometry.l1_entries(rounded);
        if entries > max || rounded > i64::MAX as u64 {
            return Err(refuse(ResizeError::TooLarge { size, entries, max }));
        }
        self.with_bitmaps(|tables, bitmaps| {
            bitmaps.check_resize(rounded)?;
            bitmaps.flush(tables)?;
            // Until the size says so, what goes away is a change that bitmaps do not know of.
            if rounded < old {
                bitmaps.mark(tables, &(0..0))
            } else {
                Ok(())
            }
        })?;
        if rounded > old {
            self.grow(old, rounded, entries, below)
        } else {
            self.shrink(old, rounded, below)
        }
    }

    fn grow(&self, old: u64, size: u64, entries: u64, below: &Chain) -> Result<()> {
        // Whatever was left behind the end of the disk must not come to light.
        self.empty_behind(old.next_multiple_of(self.geometry.cluster_size()))?;
        self.change(|tables| {
            if tables.l1_len() < entries {
                tables.grow_l1(entries)?;
            }
            Ok(())
        })?;
        if self.geometry.data_file() && self.data.len()? < size && !self.data.hints().fixed_len {
            self.data.set_len(size)?;
        }
        // All below happens past the end of the disk as it is on the host: nobody sees it before the size says so.
        let cluster = self.geometry.cluster_size();
        let edge = old.next_multiple_of(cluster).min(size);
        if old < edge {
            self.zero_held(old..edge, ZeroHow::KeepAllocated, below)?;
        }
        let shown = below.virtual_size().min(size);
        if edge < shown {
            self.zero_held(edge..shown, ZeroHow::MayUnmap, below)?;
        }
        if self.raw_data_file {
            self.map_data_file(edge, size)?;
        }
        self.set_size(size)
    }

    fn shrink(&self, old: u64, size: u64, below: &Chain) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let edge = size.next_multiple_of(cluster);
        if size < edge.min(old) {
            // What is left of the last cluster must be zeros if the disk grows again.
            self.zero_held(size..edge.min(old), ZeroHow::KeepAllocated, below)?;
        }
        self.empty_behind(edge)?;
        self.set_size(size)?;
        if self.geometry.data_file() && !self.data.hints().fixed_len {
            self.data.set_len(size)?;
        }
        self.change(|tables| tables.truncate())
    }

    /// Gives back all clusters from `edge` on.
    fn empty_behind(&self, edge: u64) -> Result<()> {
        let covers = self.geometry.l1_entry_covers();
        let mut at = edge;
        let end = edge.next_multiple_of(covers);
        let known = self.look(|tables| Ok(tables.l1_len().saturating_mul(covers)))?;
        while at < end.min(known) && self.look(|tables| tables.has_l2(GuestOffset::new(at)))? {
            let start = GuestOffset::new(at);
            self.change(|tables| {
                let slot = tables.slot(start)?;
                if slot != Slot::ABSENT {
                    tables.set_slot(start, Slot::ABSENT)?;
                    tables.drop_slot(slot, Reclaim::Always);
                }
                tables.settle_if_many()
            })?;
            at += self.geometry.cluster_size();
        }
        self.drop_from(GuestOffset::new(end))
    }

    /// Writes everything back, then the size.
    fn set_size(&self, size: u64) -> Result<()> {
        self.with_bitmaps(|tables, bitmaps| {
            tables.write_back(true)?;
            if bitmaps.is_empty() {
                tables.write_header(HEADER_SIZE_AT, &size.to_be_bytes())?;
                bitmaps.set_disk_size(size);
                Ok(())
            } else {
                bitmaps.resize(tables, size)?;
                bitmaps.flush(tables)
            }
        })?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Enters the clusters from `start` to `end` as stored in the external data file, which is a raw image.
    fn map_data_file(&self, start: u64, end: u64) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let mut at = start;
        while at < end {
            let slot = Slot {
                place: Place::At {
                    host: HostOffset::new(at),
                    own: true,
                },
                stored: super::slot::all(self.geometry),
                zero: 0,
            };
            self.change(|tables| tables.set_slot(GuestOffset::new(at), slot))?;
            at = at
                .checked_add(cluster)
                .ok_or_else(|| Error::bare(ErrorKind::Usage))?;
        }
        Ok(())
    }
}
