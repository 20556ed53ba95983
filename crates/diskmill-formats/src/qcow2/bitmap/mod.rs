//! Persistent dirty bitmaps.
//!
//! ```text
//! header extension ──> directory: an entry for each bitmap, 8-byte aligned
//!                         └──> table: u64 for each cluster of bits; offset, or 0 (all clear), or 1 (all set)
//!                                └──> bits: bit n is for the bytes from n << granularity_bits, lowest bits first
//! ```
//!
//! The extension counts only while autoclear bit 0 is set. All changes but that of a flag are made beside what there
//! is: new bits, table and directory first, then one durable switch of the header, then the old ones are given back.
//! `Store` says how changes of guest data get into enabled bitmaps.

mod change;
mod changed;
mod directory;
mod resize;
mod runs;
mod store;
mod table;

pub use directory::{DirectoryError, read_directory};
pub(crate) use runs::Runs;
pub(crate) use store::Store;

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    BitmapError, BitmapFacts, DirtyRuns, Error, ErrorKind, Format, GuestOffset, HostOffset, Limits, Result,
    Storage, Value,
};

use super::header::Header;
use super::layout::BITMAP_BYTES_MAX;

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Bitmap {
    /// Where its table is; cluster aligned.
    pub table_offset: HostOffset,
    /// Entries of its table.
    pub table_entries: u32,
    /// Not closed properly: what it says is not to be trusted.
    pub in_use: bool,
    /// Writes are to be recorded in it.
    pub auto: bool,
    /// Base-2 logarithm of the bytes a bit stands for: 9 to 31.
    pub granularity_bits: u8,
    /// Its name.
    pub name: String,
    /// The bytes of its name, of which `name` may be a rendering.
    raw_name: Vec<u8>,
}

impl Bitmap {
    /// Whether changes of guest data go into it.
    pub(crate) fn records(&self) -> bool {
        self.auto && !self.in_use
    }

    fn granularity(&self) -> u64 {
        1_u64
            .checked_shl(self.granularity_bits.into())
            .unwrap_or(u64::MAX)
    }

    /// How its bits lie for a disk of `disk_size` bytes.
    pub(crate) fn shape(&self, cluster_bits: u32, disk_size: u64) -> Shape {
        Shape {
            cluster_bits,
            granularity_bits: self.granularity_bits.into(),
            disk_size,
        }
    }

    /// What is to be known of it before its bits are read.
    pub fn facts(&self) -> BitmapFacts {
        BitmapFacts {
            name: self.name.clone(),
            granularity: self.granularity(),
            enabled: self.auto,
            inconsistent: self.in_use,
        }
    }

    /// What `info` shows of it.
    pub fn describe(&self) -> Value {
        let flags = [(self.in_use, "in-use"), (self.auto, "auto")];
        let flags = flags.into_iter().filter(|(is_set, _)| *is_set);
        Value::Map(vec![
            (
                "flags",
                Value::List(flags.map(|(_, name)| Value::Text(name.into())).collect()),
            ),
            ("name", Value::Text(self.name.clone())),
            ("granularity", Value::Int(self.granularity())),
        ])
    }
}

/// How bits lie: on the disk, and in clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// 9 to 21.
    cluster_bits: u32,
    /// 9 to 31.
    granularity_bits: u32,
    disk_size: u64,
}

impl Shape {
    /// Bits for the whole disk.
    pub(crate) fn bits(self) -> u64 {
        self.disk_size.div_ceil(1 << self.granularity_bits)
    }

    /// Bits in a cluster, as a base-2 logarithm.
    fn bits_per_entry(self) -> u32 {
        self.cluster_bits.saturating_add(3)
    }

    /// Clusters for all bits: entries of the table.
    pub(crate) fn entries(self) -> u64 {
        self.bits().div_ceil(1 << self.bits_per_entry())
    }

    /// The bits of table entry `entry`.
    fn bits_of(self, entry: u64) -> Range<u64> {
        let shift = self.bits_per_entry();
        let start = entry.saturating_mul(1 << shift);
        let end = start.saturating_add(1 << shift);
        start..end.min(self.bits())
    }

    /// Whether the bits of table entry `entry` fill their cluster.
    fn is_whole(self, entry: u64) -> bool {
        let bits = self.bits_of(entry);
        bits.end.saturating_sub(bits.start) == 1 << self.bits_per_entry()
    }

    /// The table entry that bit `bit` is under.
    fn entry_of(self, bit: u64) -> u64 {
        bit >> self.bits_per_entry()
    }

    /// The bits that guest bytes `range` touch, as far as there are such.
    fn touched(self, range: &Range<u64>) -> Range<u64> {
        let end = range.end.min(self.disk_size).div_ceil(1 << self.granularity_bits);
        (range.start >> self.granularity_bits).min(end)..end
    }

    /// The guest bytes that `bits` are for.
    fn guest(self, bits: Range<u64>) -> Range<GuestOffset> {
        let at =
            |bit: u64| GuestOffset::new(bit.saturating_mul(1 << self.granularity_bits).min(self.disk_size));
        at(bits.start)..at(bits.end)
    }

    /// Fails if bits like these cannot be stored: none, or too many.
    fn check(self, name: &str) -> Result<()> {
        let bytes = self.entries().saturating_mul(1 << self.cluster_bits);
        if (1..=BITMAP_BYTES_MAX).contains(&bytes) {
            return Ok(());
        }
        Err(refuse(BitmapError::Size {
            name: name.to_owned(),
            bytes,
            max: BITMAP_BYTES_MAX,
        }))
    }
}

/// A request that cannot be met.
fn refuse(error: BitmapError) -> Error {
    let kind = match error {
        BitmapError::NotFound(_) => ErrorKind::NotFound,
        BitmapError::Inconsistent(_) | BitmapError::OldVersion => ErrorKind::Unsupported,
        _ => ErrorKind::Usage,
    };
    Error::new(kind, error).format(Format::Qcow2)
}

/// The bitmap called `name` and its place among `bitmaps`.
fn find<'a>(bitmaps: &'a [Bitmap], name: &str) -> Result<(usize, &'a Bitmap)> {
    let mut named = bitmaps.iter().enumerate();
    named
        .find(|(_, bitmap)| bitmap.name == name)
        .ok_or_else(|| refuse(BitmapError::NotFound(name.to_owned())))
}

/// The same, unless it is inconsistent.
fn find_sound<'a>(bitmaps: &'a [Bitmap], name: &str) -> Result<(usize, &'a Bitmap)> {
    match find(bitmaps, name)? {
        (_, bitmap) if bitmap.in_use => Err(refuse(BitmapError::Inconsistent(name.to_owned()))),
        found => Ok(found),
    }
}

/// What bitmap `name` of the image with `header` in `main` says is dirty.
pub(crate) fn dirty(
    main: &Arc<dyn Storage>,
    header: &Header,
    limits: &Limits,
    name: &str,
) -> Result<Box<dyn DirtyRuns>> {
    let bitmaps = read_directory(main.as_ref(), header, limits)?;
    let (_, bitmap) = find_sound(&bitmaps, name)?;
    let shape = bitmap.shape(header.cluster_bits.get(), header.virtual_size());
    Ok(Box::new(Runs::new(Arc::clone(main), bitmap, shape)))
}
