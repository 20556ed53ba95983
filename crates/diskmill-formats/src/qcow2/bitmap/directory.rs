//! The directory: bytes to bitmaps and back.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use diskmill_core::{Error, ErrorKind, Format, HostOffset, Limits, Result, Storage};
use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::{Bitmap, Shape};
use crate::qcow2::header::Header;
use crate::qcow2::layout::{BITMAP_BYTES_MAX, BITMAP_NAME_MAX, BITMAP_TABLE_ENTRIES_MAX, RawBitmap};

/// Flag: not closed properly.
const IN_USE: u32 = 1;
/// Flag: changes are recorded.
const AUTO: u32 = 2;
/// The type of a dirty bitmap.
const DIRTY_TRACKING: u8 = 1;

/// What is wrong with the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// The directory does not lie in the file.
    #[error("bitmap directory of {len} bytes at {at:#x} runs past the end of the file")]
    PastEnd {
        /// Where it starts.
        at: u64,
        /// Its length.
        len: u64,
    },
    /// The directory and its number of entries disagree.
    #[error("bitmap directory of {len} bytes does not hold exactly {count} bitmaps")]
    Count {
        /// Bytes of the directory.
        len: u64,
        /// Bitmaps it should hold.
        count: u32,
    },
    /// More bitmaps than the caller allows.
    #[error("nb_bitmaps is {count}, must be at most {limit}")]
    TooMany {
        /// How many there are.
        count: u32,
        /// How many there may be.
        limit: u32,
    },
    /// A number outside what is allowed.
    #[error("bitmap {index}: {field} is {value}, must be {allowed}")]
    Range {
        /// Which entry.
        index: u32,
        /// The field.
        field: &'static str,
        /// What it is.
        value: u64,
        /// What it may be.
        allowed: &'static str,
    },
    /// A table that does not fit the disk.
    #[error("bitmap {index}: table has {entries} entries, must have {needed}")]
    TableSize {
        /// Which entry.
        index: u32,
        /// Entries it has.
        entries: u32,
        /// Entries it must have.
        needed: u64,
    },
    /// Two bitmaps of the same name.
    #[error("bitmap {index}: there is another of the name '{name}'")]
    Name {
        /// Which entry.
        index: u32,
        /// The name.
        name: String,
    },
}

impl From<DirectoryError> for Error {
    fn from(error: DirectoryError) -> Self {
        Error::new(ErrorKind::Malformed, error).format(Format::Qcow2)
    }
}

/// Reads the directory, if the image has bitmaps that can be trusted. Looks at no bitmap's table.
pub fn read_directory(main: &dyn Storage, header: &Header, limits: &Limits) -> Result<Vec<Bitmap>> {
    let Some(place) = header.bitmaps() else {
        return Ok(Vec::new());
    };
    if place.nb_bitmaps > limits.bitmaps {
        return Err(DirectoryError::TooMany {
            count: place.nb_bitmaps,
            limit: limits.bitmaps,
        }
        .into());
    }
    let past_end = || DirectoryError::PastEnd {
        at: place.directory_offset.get(),
        len: place.directory_size,
    };
    let end = place
        .directory_offset
        .checked_add(place.directory_size)
        .ok_or_else(past_end)?;
    if place.directory_offset == HostOffset::ZERO || end.get() > main.len()? {
        return Err(past_end().into());
    }
    // At most 64 MiB: the extension has been checked.
    let mut directory = vec![0; usize::try_from(place.directory_size).map_err(|_| past_end())?];
    main.read_at(place.directory_offset, &mut directory)?;
    let mut names = std::collections::HashSet::new();
    let mut bitmaps = Vec::new();
    let mut rest = directory.as_slice();
    let wrong_count = || DirectoryError::Count {
        len: place.directory_size,
        count: place.nb_bitmaps,
    };
    for index in 0..place.nb_bitmaps {
        let (bitmap, after) = parse_entry(rest, header, index)?.ok_or_else(wrong_count)?;
        if !names.insert(bitmap.name.clone()) {
            return Err(DirectoryError::Name {
                index,
                name: bitmap.name,
            }
            .into());
        }
        bitmaps.push(bitmap);
        rest = after;
    }
    if !rest.is_empty() {
        return Err(wrong_count().into());
    }
    Ok(bitmaps)
}

/// The entry at the start of `bytes` and what follows it, or `None` if the bytes end before it does.
fn parse_entry<'a>(
    bytes: &'a [u8],
    header: &Header,
    index: u32,
) -> Result<Option<(Bitmap, &'a [u8])>, DirectoryError> {
    let Ok((raw, after)) = RawBitmap::read_from_prefix(bytes) else {
        return Ok(None);
    };
    let range = |field, value: u64, allowed| DirectoryError::Range {
        index,
        field,
        value,
        allowed,
    };
    let flags = raw.flags.get();
    if flags & !(IN_USE | AUTO) != 0 {
        return Err(range("flags", flags.into(), "at most 3"));
    }
    if raw.kind != DIRTY_TRACKING {
        return Err(range("type", raw.kind.into(), "1"));
    }
    if !(9..=31).contains(&raw.granularity_bits) {
        return Err(range("granularity_bits", raw.granularity_bits.into(), "9 to 31"));
    }
    let name_len = raw.name_len.get();
    if !(1..=BITMAP_NAME_MAX).contains(&name_len) {
        return Err(range("name_size", name_len.into(), "1 to 1023"));
    }
    let extra_len = raw.extra_len.get();
    if extra_len != 0 {
        return Err(range("extra_data_size", extra_len.into(), "0"));
    }
    let table_entries = raw.table_size.get();
    if !(1..=BITMAP_TABLE_ENTRIES_MAX).contains(&table_entries) {
        return Err(range("bitmap_table_size", table_entries.into(), "1 to 134217728"));
    }
    let cluster_size = header.cluster_bits.cluster_size();
    if u64::from(table_entries).saturating_mul(cluster_size) > BITMAP_BYTES_MAX {
        return Err(range(
            "bitmap_table_size",
            table_entries.into(),
            "at most 512 MiB in clusters",
        ));
    }
    let table_offset = HostOffset::new(raw.table_offset.get());
    if table_offset == HostOffset::ZERO || !table_offset.is_aligned(cluster_size) {
        return Err(range(
            "bitmap_table_offset",
            table_offset.get(),
            "a multiple of the cluster size above 0",
        ));
    }
    let in_use = flags & IN_USE != 0;
    let shape = Shape {
        cluster_bits: header.cluster_bits.get(),
        granularity_bits: raw.granularity_bits.into(),
        disk_size: header.virtual_size(),
    };
    let needed = shape.entries();
    if !in_use && u64::from(table_entries) != needed {
        return Err(DirectoryError::TableSize {
            index,
            entries: table_entries,
            needed,
        });
    }
    let Some((name, after)) = after.split_at_checked(name_len.into()) else {
        return Ok(None);
    };
    let padding = (size_of::<RawBitmap>().saturating_add(name.len())).wrapping_neg() & 7;
    let Some(after) = after.get(padding..) else {
        return Ok(None);
    };
    Ok(Some((
        Bitmap {
            table_offset,
            table_entries,
            in_use,
            auto: flags & AUTO != 0,
            granularity_bits: raw.granularity_bits,
            name: String::from_utf8_lossy(name).into_owned(),
            raw_name: name.to_vec(),
        },
        after,
    )))
}

/// The bytes of a directory of `bitmaps`. With `recording`, those that changes are recorded in are marked as in use.
pub(super) fn to_bytes(bitmaps: &[Bitmap], recording: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    for bitmap in bitmaps {
        let in_use = bitmap.in_use || recording && bitmap.records();
        let flags = if in_use { IN_USE } else { 0 } | if bitmap.auto { AUTO } else { 0 };
        let raw = RawBitmap {
            table_offset: U64::new(bitmap.table_offset.get()),
            table_size: U32::new(bitmap.table_entries),
            flags: U32::new(flags),
            kind: DIRTY_TRACKING,
            granularity_bits: bitmap.granularity_bits,
            name_len: U16::new(u16::try_from(bitmap.raw_name.len()).unwrap_or(u16::MAX)),
            extra_len: U32::new(0),
        };
        bytes.extend_from_slice(raw.as_bytes());
        bytes.extend_from_slice(&bitmap.raw_name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}
