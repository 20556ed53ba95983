//! Bitmaps of a disk that gets another size.

use diskmill_core::{BitmapError, Result};

use super::change::{Clusters, give_back};
use super::store::Store;
use super::table::{self, Bits};
use super::{Bitmap, Shape, refuse};
use crate::qcow2::extension::BitmapsExtension;
use crate::qcow2::fence::Part;
use crate::qcow2::tables::Tables;

/// Bitmaps that have been written and that the header does not name yet.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(super) bitmaps: Vec<Bitmap>,
    /// Where their directory is.
    pub(crate) place: Option<BitmapsExtension>,
    /// What was taken for them.
    pub(super) fresh: Vec<Clusters>,
    /// What nothing refers to once the header names them.
    pub(super) garbage: Vec<Clusters>,
    /// The size of their disk, in bytes.
    pub(super) disk_size: u64,
}

impl Store {
    /// Fails if some bitmap does not let the disk have `size` bytes.
    pub(crate) fn check_resize(&self, size: u64) -> Result<()> {
        for bitmap in &self.bitmaps {
            if bitmap.in_use {
                return Err(refuse(BitmapError::Inconsistent(bitmap.name.clone())));
            }
            self.shape_for(bitmap, size).check(&bitmap.name)?;
        }
        Ok(())
    }

    /// Gives the disk `size` bytes, in the header and in all bitmaps at once. What it grows by is clean.
    pub(crate) fn resize(&mut self, tables: &mut Tables, size: u64) -> Result<()> {
        let prepared = self.prepare_resize(tables, size)?;
        self.show(tables, prepared)
    }

    /// Writes the bitmaps for a disk of `size` bytes. Inconsistent ones stay as they are.
    pub(crate) fn prepare_resize(&mut self, tables: &mut Tables, size: u64) -> Result<Prepared> {
        let (mut fresh, mut garbage) = (Vec::new(), Vec::new());
        let mut bitmaps = self.bitmaps.clone();
        let written = bitmaps
            .iter_mut()
            .filter(|bitmap| !bitmap.in_use)
            .try_for_each(|bitmap| self.fit(tables, bitmap, size, &mut fresh, &mut garbage))
            .and_then(|()| self.write_new_directory(tables, &bitmaps, &mut fresh));
        match written {
            Ok(place) => Ok(Prepared {
                bitmaps,
                place,
                fresh,
                garbage,
                disk_size: size,
            }),
            Err(error) => {
                give_back(tables, &fresh);
                Err(error)
            }
        }
    }

    fn shape_for(&self, bitmap: &Bitmap, size: u64) -> Shape {
        Shape {
            disk_size: size,
            ..self.shape(bitmap)
        }
    }

    /// Gives a bitmap the bits for a disk of `size` bytes. What is changed goes to new clusters.
    fn fit(
        &self,
        tables: &mut Tables,
        bitmap: &mut Bitmap,
        size: u64,
        fresh: &mut Vec<Clusters>,
        garbage: &mut Vec<Clusters>,
    ) -> Result<()> {
        let (old, new) = (self.shape(bitmap), self.shape_for(bitmap, size));
        if old.bits() == new.bits() {
            return Ok(());
        }
        let cluster = self.cluster_size();
        let known = table::read_all(tables.fence.file().as_ref(), bitmap, cluster)?;
        let mut entries = known.clone();
        // Behind the end of the smaller disk no bit may be left that the larger one would show.
        let kept = old.bits().min(new.bits());
        let edge = old.entry_of(kept);
        let within = kept - old.bits_of(edge).start.min(kept);
        if within > 0
            && let Some(bits) = usize::try_from(edge).ok().and_then(|edge| entries.get_mut(edge))
        {
            *bits = self.cut(tables, *bits, within, fresh, garbage)?;
        }
        let count = usize::try_from(new.entries()).unwrap_or(usize::MAX);
        for bits in entries.get(count..).unwrap_or_default() {
            if let Bits::At(at) = bits {
                garbage.push((at.get() / cluster, 1));
            }
        }
        entries.resize(count, Bits::Clear);
        if entries != known {
            garbage.push(self.table_clusters(bitmap));
            bitmap.table_offset = self.write_new_table(tables, &entries, fresh)?;
            bitmap.table_entries = u32::try_from(count).unwrap_or(u32::MAX);
        }
        Ok(())
    }

    /// The first `kept` bits of a cluster of bits, and clear ones behind.
    fn cut(
        &self,
        tables: &mut Tables,
        bits: Bits,
        kept: u64,
        fresh: &mut Vec<Clusters>,
        garbage: &mut Vec<Clusters>,
    ) -> Result<Bits> {
        let cluster = self.cluster_size();
        let mut bytes = vec![0xff; usize::try_from(cluster).unwrap_or(0)];
        match bits {
            Bits::Clear => return Ok(bits),
            Bits::Set => {}
            Bits::At(at) => tables.fence.file().read_padded(at, &mut bytes)?,
        }
        let before = bytes.clone();
        let edge = usize::try_from(kept / 8).unwrap_or(usize::MAX);
        if let Some(byte) = bytes.get_mut(edge) {
            *byte &= !(u8::MAX << (kept % 8));
        }
        if let Some(behind) = bytes.get_mut(edge.saturating_add(1)..) {
            behind.fill(0);
        }
        if bytes == before {
            return Ok(bits);
        }
        if let Bits::At(at) = bits {
            garbage.push((at.get() / cluster, 1));
        }
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(Bits::Clear);
        }
        self.write_new(tables, Part::Data, &bytes, fresh).map(Bits::At)
    }
}
