//! What can be done with bitmaps.

use diskmill_core::{BitmapError, BitmapFacts, Bitmaps, DirtyRuns, HostOffset, NewBitmap, Result};

use super::resize::Prepared;
use super::store::{Store, set_bits};
use super::table::{self, Bits};
use super::{Bitmap, directory, find, find_sound, refuse};
use crate::flight::Hold;
use crate::qcow2::extension::BitmapsExtension;
use crate::qcow2::fence::Part;
use crate::qcow2::header::Version;
use crate::qcow2::layout::{BITMAP_ENTRY_MAX, BITMAP_NAME_MAX, BITMAPS_MAX};
use crate::qcow2::tables::{HeaderRoom, Tables};
use crate::qcow2::write::Image;

/// Bytes a bit may stand for.
const GRANULARITY: std::ops::RangeInclusive<u64> = 512..=1 << 31;
/// Bytes a bit stands for if nobody says: a cluster, but within these.
const USUAL_GRANULARITY: (u64, u64) = (4 << 10, 64 << 10);

/// Clusters in a row.
pub(super) type Clusters = (u64, u64);

impl Store {
    /// Puts `bitmaps`, whose tables have been written, in the place of what there is, and has the
    /// header name them. When this returns they are durable, and `garbage` is free. `fresh` is what was taken for them: it is
    /// given back if nothing can have come to refer to it.
    pub(super) fn replace(
        &mut self,
        tables: &mut Tables,
        bitmaps: Vec<Bitmap>,
        mut fresh: Vec<Clusters>,
        garbage: Vec<Clusters>,
    ) -> Result<()> {
        match self.write_new_directory(tables, &bitmaps, &mut fresh) {
            Ok(place) => {
                let prepared = Prepared {
                    bitmaps,
                    place,
                    fresh,
                    garbage,
                    disk_size: self.disk_size,
                };
                self.show(tables, prepared)
            }
            Err(error) => {
                give_back(tables, &fresh);
                Err(error)
            }
        }
    }

    /// Writes a directory of `bitmaps` to new clusters.
    pub(super) fn write_new_directory(
        &self,
        tables: &mut Tables,
        bitmaps: &[Bitmap],
        fresh: &mut Vec<Clusters>,
    ) -> Result<Option<BitmapsExtension>> {
        if bitmaps.is_empty() {
            return Ok(None);
        }
        let bytes = directory::to_bytes(bitmaps, self.is_marked());
        let (count, len) = (bitmaps.len() as u64, bytes.len() as u64);
        let (max_count, max_bytes) = (u64::from(BITMAPS_MAX), u64::from(BITMAPS_MAX) * BITMAP_ENTRY_MAX);
        if count > max_count || len > max_bytes {
            return Err(refuse(BitmapError::TooMany {
                count,
                bytes: len,
                max_count,
                max_bytes,
            }));
        }
        let at = self.write_new(tables, Part::BitmapDirectory, &bytes, fresh)?;
        Ok(Some(BitmapsExtension {
            nb_bitmaps: u32::try_from(count).unwrap_or(u32::MAX),
            directory_size: len,
            directory_offset: at,
        }))
    }

    /// Writes a table to new clusters.
    pub(super) fn write_new_table(
        &self,
        tables: &mut Tables,
        entries: &[Bits],
        fresh: &mut Vec<Clusters>,
    ) -> Result<HostOffset> {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|bits| bits.encode().to_be_bytes())
            .collect();
        self.write_new(tables, Part::BitmapTable, &bytes, fresh)
    }

    /// Writes bytes to new clusters, which are filled up with zeros.
    pub(super) fn write_new(
        &self,
        tables: &mut Tables,
        part: Part,
        bytes: &[u8],
        fresh: &mut Vec<Clusters>,
    ) -> Result<HostOffset> {
        let cluster = self.cluster_size();
        let clusters = (bytes.len() as u64).div_ceil(cluster).max(1);
        let (first, _) = tables.allocate(clusters, clusters)?;
        fresh.push((first, clusters));
        let mut whole = bytes.to_vec();
        whole.resize(usize::try_from(clusters * cluster).unwrap_or(0), 0);
        let at = first * cluster;
        tables.fence.write(part, at, &whole)?;
        Ok(HostOffset::new(at))
    }

    /// Has the header name what was prepared.
    pub(super) fn show(&mut self, tables: &mut Tables, prepared: Prepared) -> Result<()> {
        let switched = tables.rewrite_header(|header| {
            header.set_bitmaps(prepared.place);
            if header.virtual_size() != prepared.disk_size {
                header.size = prepared.disk_size;
            }
            Ok(())
        });
        if let Err(error) = switched {
            if error.find::<HeaderRoom>().is_some() {
                give_back(tables, &prepared.fresh);
            } else {
                // Nobody knows which directory the header names now.
                tables.fence.set_adrift();
            }
            return Err(error);
        }
        self.shown(tables, prepared)
    }

    /// Goes on with what was prepared, now that the header durably names it. What it replaced is free.
    pub(crate) fn shown(&mut self, tables: &mut Tables, prepared: Prepared) -> Result<()> {
        let Prepared {
            bitmaps,
            place,
            mut garbage,
            disk_size,
            ..
        } = prepared;
        self.unprotect(tables);
        if let Some(old) = self.place {
            let cluster = self.cluster_size();
            garbage.push((
                old.directory_offset.get() / cluster,
                old.directory_size.div_ceil(cluster),
            ));
        }
        self.bitmaps = bitmaps;
        self.place = place;
        self.disk_size = disk_size;
        self.protect(tables);
        give_back(tables, &garbage);
        tables.write_back(true)
    }

    /// The clusters of a bitmap: its table, and its bits as far as the table can be read.
    fn clusters_of(&self, tables: &Tables, bitmap: &Bitmap) -> Vec<Clusters> {
        let cluster = self.cluster_size();
        let Ok(entries) = table::read_all(tables.fence.file().as_ref(), bitmap, cluster) else {
            // Who knows whose they are: they leak.
            return Vec::new();
        };
        let mut clusters = vec![self.table_clusters(bitmap)];
        clusters.extend(entries.into_iter().filter_map(|bits| match bits {
            Bits::At(at) => Some((at.get() / cluster, 1)),
            _ => None,
        }));
        clusters
    }

    pub(super) fn table_clusters(&self, bitmap: &Bitmap) -> Clusters {
        let cluster = self.cluster_size();
        let bytes = u64::from(bitmap.table_entries) * table::ENTRY_LEN;
        (bitmap.table_offset.get() / cluster, bytes.div_ceil(cluster))
    }

    fn add(&mut self, tables: &mut Tables, new: &NewBitmap) -> Result<BitmapFacts> {
        let name = new.name.as_bytes();
        if name.is_empty() || name.len() > BITMAP_NAME_MAX.into() {
            return Err(refuse(BitmapError::Name(name.len())));
        }
        let (least, most) = USUAL_GRANULARITY;
        let granularity = new.granularity.unwrap_or(self.cluster_size().clamp(least, most));
        if !granularity.is_power_of_two() || !GRANULARITY.contains(&granularity) {
            return Err(refuse(BitmapError::Granularity(granularity)));
        }
        if find(&self.bitmaps, &new.name).is_ok() {
            return Err(refuse(BitmapError::Exists(new.name.clone())));
        }
        if tables.geometry.version() == Version::V2 {
            return Err(refuse(BitmapError::OldVersion));
        }
        let mut bitmap = Bitmap {
            table_offset: HostOffset::ZERO,
            table_entries: 0,
            in_use: false,
            auto: new.enabled,
            granularity_bits: u8::try_from(granularity.trailing_zeros()).unwrap_or(0),
            name: new.name.clone(),
            raw_name: name.to_vec(),
        };
        let shape = self.shape(&bitmap);
        shape.check(&new.name)?;
        bitmap.table_entries = u32::try_from(shape.entries()).unwrap_or(u32::MAX);
        let mut fresh = Vec::new();
        let empty = vec![Bits::Clear; usize::try_from(shape.entries()).unwrap_or(0)];
        match self.write_new_table(tables, &empty, &mut fresh) {
            Ok(at) => bitmap.table_offset = at,
            Err(error) => {
                give_back(tables, &fresh);
                return Err(error);
            }
        }
        let facts = bitmap.facts();
        let mut bitmaps = self.bitmaps.clone();
        bitmaps.push(bitmap);
        self.replace(tables, bitmaps, fresh, Vec::new())?;
        Ok(facts)
    }

    fn remove(&mut self, tables: &mut Tables, name: &str) -> Result<()> {
        let (index, bitmap) = find(&self.bitmaps, name)?;
        let garbage = self.clusters_of(tables, bitmap);
        let mut bitmaps = self.bitmaps.clone();
        bitmaps.remove(index);
        self.replace(tables, bitmaps, Vec::new(), garbage)
    }

    /// Gives all of them up.
    pub(crate) fn remove_all(&mut self, tables: &mut Tables) -> Result<()> {
        if self.bitmaps.is_empty() {
            return Ok(());
        }
        self.flush(tables)?;
        let clusters = self
            .bitmaps
            .iter()
            .flat_map(|bitmap| self.clusters_of(tables, bitmap));
        let garbage = clusters.collect();
        self.replace(tables, Vec::new(), Vec::new(), garbage)
    }

    fn set_auto(&mut self, tables: &mut Tables, name: &str, auto: bool) -> Result<()> {
        let (index, _) = find_sound(&self.bitmaps, name)?;
        let mut bitmaps = self.bitmaps.clone();
        if let Some(bitmap) = bitmaps.get_mut(index) {
            bitmap.auto = auto;
            let file = tables.fence.file().clone();
            table::check(file.as_ref(), bitmap, self.cluster_size())?;
        }
        self.write_flags(tables, bitmaps)
    }

    /// Gives a sound bitmap a table of `entries`; `garbage` is what no entry refers to any more.
    fn change_table(
        &mut self,
        tables: &mut Tables,
        index: usize,
        entries: &[Bits],
        mut fresh: Vec<Clusters>,
        mut garbage: Vec<Clusters>,
    ) -> Result<()> {
        let at = match self.write_new_table(tables, entries, &mut fresh) {
            Ok(at) => at,
            Err(error) => {
                give_back(tables, &fresh);
                return Err(error);
            }
        };
        let mut bitmaps = self.bitmaps.clone();
        if let Some(bitmap) = bitmaps.get_mut(index) {
            garbage.push(self.table_clusters(bitmap));
            bitmap.table_offset = at;
        }
        self.replace(tables, bitmaps, fresh, garbage)
    }

    fn clear(&mut self, tables: &mut Tables, name: &str) -> Result<()> {
        let (index, bitmap) = find_sound(&self.bitmaps, name)?;
        let cluster = self.cluster_size();
        let old = table::read_all(tables.fence.file().as_ref(), bitmap, cluster)?;
        if old.iter().all(|bits| *bits == Bits::Clear) {
            return Ok(());
        }
        let garbage = old.iter().filter_map(|bits| match bits {
            Bits::At(at) => Some((at.get() / cluster, 1)),
            _ => None,
        });
        let garbage = garbage.collect();
        self.change_table(tables, index, &vec![Bits::Clear; old.len()], Vec::new(), garbage)
    }

    fn merge(&mut self, tables: &mut Tables, name: &str, from: &mut dyn DirtyRuns) -> Result<()> {
        let (index, bitmap) = find_sound(&self.bitmaps, name)?;
        if from.disk_size() != self.disk_size {
            return Err(refuse(BitmapError::Sizes {
                to: self.disk_size,
                from: from.disk_size(),
            }));
        }
        let mut merge = Merge {
            store: self,
            entries: table::read_all(tables.fence.file().as_ref(), bitmap, self.cluster_size())?,
            fresh: Vec::new(),
            garbage: Vec::new(),
            open: None,
        };
        let merged = merge.run(tables, bitmap, from);
        let Merge {
            entries,
            fresh,
            garbage,
            ..
        } = merge;
        match merged {
            Err(error) => {
                give_back(tables, &fresh);
                Err(error)
            }
            Ok(false) => Ok(()),
            Ok(true) => self.change_table(tables, index, &entries, fresh, garbage),
        }
    }
}

/// A merge under way: bits that change go to new clusters.
struct Merge<'a> {
    store: &'a Store,
    entries: Vec<Bits>,
    fresh: Vec<Clusters>,
    garbage: Vec<Clusters>,
    /// The bits of one table entry, and whether some were set.
    open: Option<(u64, Vec<u8>, bool)>,
}

impl Merge<'_> {
    /// Sets all bits that `from` asks for. Returns whether any was not set before.
    fn run(&mut self, tables: &mut Tables, bitmap: &Bitmap, from: &mut dyn DirtyRuns) -> Result<bool> {
        let shape = self.store.shape(bitmap);
        let mut changed = false;
        while let Some(run) = from.next_run()? {
            let bits = shape.touched(&(run.start.get()..run.end.get()));
            let mut at = bits.start;
            while at < bits.end {
                let entry = shape.entry_of(at);
                let covers = shape.bits_of(entry);
                let part = at..bits.end.min(covers.end);
                at = part.end;
                if self.open.as_ref().is_none_or(|(open, ..)| *open != entry) {
                    changed |= self.close(tables)?;
                    let all = part == covers && shape.is_whole(entry);
                    changed |= self.open(tables, entry, all)?;
                }
                if let Some((_, bytes, dirty)) = &mut self.open {
                    let within = part.start - covers.start..part.end - covers.start;
                    *dirty |= !set_bits(bytes, within).is_empty();
                }
            }
        }
        Ok(self.close(tables)? || changed)
    }

    /// Opens the bits of an entry, unless they are all set; with `all` they are to be. Returns whether that took a
    /// change of the entry.
    fn open(&mut self, tables: &mut Tables, entry: u64, all: bool) -> Result<bool> {
        let Some(known) = usize::try_from(entry)
            .ok()
            .and_then(|entry| self.entries.get_mut(entry))
        else {
            return Ok(false);
        };
        let mut bytes = vec![0; usize::try_from(self.store.cluster_size()).unwrap_or(0)];
        match *known {
            Bits::Set => return Ok(false),
            Bits::Clear if all => {
                *known = Bits::Set;
                return Ok(true);
            }
            Bits::Clear => {}
            Bits::At(at) => tables.fence.file().read_padded(at, &mut bytes)?,
        }
        self.open = Some((entry, bytes, false));
        Ok(false)
    }

    /// Writes the open bits to a new cluster if they were changed. Returns whether they were.
    fn close(&mut self, tables: &mut Tables) -> Result<bool> {
        let Some((entry, bytes, true)) = self.open.take() else {
            return Ok(false);
        };
        let at = self
            .store
            .write_new(tables, Part::Data, &bytes, &mut self.fresh)?;
        if let Some(known) = usize::try_from(entry)
            .ok()
            .and_then(|entry| self.entries.get_mut(entry))
        {
            if let Bits::At(old) = known {
                self.garbage.push((old.get() / self.store.cluster_size(), 1));
            }
            *known = Bits::At(at);
        }
        Ok(true)
    }
}

/// Gives back clusters that nothing refers to. What looks like something else leaks, and so does what fails.
pub(super) fn give_back(tables: &mut Tables, clusters: &[Clusters]) {
    let bits = tables.geometry.cluster_bits().get();
    for (first, count) in clusters {
        let range = (*first << bits)..(first.saturating_add(*count) << bits);
        if tables.fence.check(Part::Data, range).is_ok() {
            let _ = tables.release(*first, *count);
        }
    }
}

impl Image {
    /// Changes bitmaps while nothing else is under way and all that went before is recorded in them.
    fn change_bitmaps<T>(&self, change: impl FnOnce(&mut Tables, &mut Store) -> Result<T>) -> Result<T> {
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        self.with_bitmaps(|tables, store| {
            store.flush(tables)?;
            change(tables, store)
        })
    }

    /// What bitmap `name` says is dirty by now.
    pub(crate) fn dirty_runs(&self, name: &str) -> Result<Box<dyn DirtyRuns>> {
        self.with_bitmaps(|tables, store| {
            store.flush(tables)?;
            let (_, bitmap) = find_sound(&store.bitmaps, name)?;
            let file = tables.fence.file().clone();
            Ok(Box::new(super::Runs::new(file, bitmap, store.shape(bitmap))) as Box<dyn DirtyRuns>)
        })
    }
}

impl Bitmaps for Image {
    fn list(&self) -> Vec<BitmapFacts> {
        self.bitmap_facts()
    }

    fn add(&self, new: &NewBitmap) -> Result<BitmapFacts> {
        self.change_bitmaps(|tables, store| store.add(tables, new))
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.change_bitmaps(|tables, store| store.remove(tables, name))
    }

    fn clear(&self, name: &str) -> Result<()> {
        self.change_bitmaps(|tables, store| store.clear(tables, name))
    }

    fn enable(&self, name: &str) -> Result<()> {
        self.change_bitmaps(|tables, store| store.set_auto(tables, name, true))
    }

    fn disable(&self, name: &str) -> Result<()> {
        self.change_bitmaps(|tables, store| store.set_auto(tables, name, false))
    }

    fn merge(&self, name: &str, from: &mut dyn DirtyRuns) -> Result<()> {
        self.change_bitmaps(|tables, store| store.merge(tables, name, from))
    }
}
