//! Headers of extent files: bytes to header and back, no I/O.

use diskmill_core::{Error, ErrorKind, Format, SECTOR};
use zerocopy::{FromBytes, IntoBytes};

use super::layout::{
    CHECK_BYTES, COWD_GTES, COWD_MAGIC, CowdHeader, DEFLATE, GD_AT_END, MOST_TABLES, SESPARSE_GRAIN,
    SESPARSE_GTES, SESPARSE_MAGIC, SESPARSE_TABLE, SESPARSE_VERSION, SESPARSE_VOLATILE_MAGIC, SPARSE_MAGIC,
    SeSparseHeader, SeSparseVolatile, SparseHeader,
};

/// Why a header is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Fewer bytes than a header.
    #[error("the file has {0} bytes, fewer than a header")]
    Short(usize),
    /// Another magic number.
    #[error("the magic number is another format's")]
    Magic,
    /// A version that is not known.
    #[error("version is {0}, must be 1 to 3")]
    Version(u32),
    /// Flags that change what the file means.
    #[error("flags are {0:#x}, of which bits {1:#x} are not known")]
    Flags(u32, u32),
    /// Grains are said to be compressed in one place and not in another, or in a way nobody writes.
    #[error("flags {flags:#x} and compressAlgorithm {algorithm} do not go together")]
    Compression {
        /// The flags.
        flags: u32,
        /// The algorithm.
        algorithm: u16,
    },
    /// The line ends were changed.
    #[error("the check bytes are {0:02x?}: the file was transferred as text and is damaged")]
    CheckBytes([u8; 4]),
    /// A field with a value that is not allowed.
    #[error("{field} is {value}, must be {allowed}")]
    Range {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What is allowed.
        allowed: &'static str,
    },
    /// The journal holds what the tables do not.
    #[error("the journal must be replayed by the hypervisor first")]
    Journal,
}

impl From<HeaderError> for Error {
    fn from(error: HeaderError) -> Self {
        let kind = match error {
            HeaderError::Short(_) | HeaderError::Magic => ErrorKind::NotThisFormat,
            HeaderError::Version(_) | HeaderError::Flags(..) | HeaderError::Journal => ErrorKind::Unsupported,
            _ => ErrorKind::Malformed,
        };
        Error::new(kind, error).format(Format::Vmdk)
    }
}

fn range(field: &'static str, value: u64, allowed: &'static str) -> HeaderError {
    HeaderError::Range {
        field,
        value,
        allowed,
    }
}

/// The flags of a hosted sparse extent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(pub u32);

impl Flags {
    /// The check bytes are there.
    pub const CHECKED: u32 = 1;
    /// There is a redundant grain directory.
    pub const REDUNDANT: u32 = 1 << 1;
    /// A grain table entry of 1 means zeros.
    pub const ZERO_GRAIN: u32 = 1 << 2;
    /// Grains are compressed.
    pub const COMPRESSED: u32 = 1 << 16;
    /// Markers say what is where.
    pub const MARKERS: u32 = 1 << 17;
    /// Bits that a reader must know.
    const INCOMPATIBLE: u32 = 0xffff_0000;

    /// Whether all of `bits` are set.
    pub const fn has(self, bits: u32) -> bool {
        self.0 & bits == bits
    }
}

/// The size of a grain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grain(u64);

impl Grain {
    /// The usual one: 64 KiB.
    pub const USUAL: Self = Self(128);

    /// A grain of so many sectors: a power of two from 8 to 131072.
    pub const fn new(sectors: u64) -> Result<Self, HeaderError> {
        if sectors.is_power_of_two() && sectors >= 8 && sectors <= 131_072 {
            Ok(Self(sectors))
        } else {
            Err(HeaderError::Range {
                field: "grainSize",
                value: sectors,
                allowed: "a power of two from 8 to 131072",
            })
        }
    }

    /// Its size in sectors.
    pub const fn sectors(self) -> u64 {
        self.0
    }

    /// Its size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0.saturating_mul(SECTOR)
    }
}

/// Sectors of a disk: fewer than 2^54, so that their bytes are a number.
fn capacity(field: &'static str, sectors: u64) -> Result<u64, HeaderError> {
    if sectors < 1 << 54 {
        Ok(sectors)
    } else {
        Err(range(field, sectors, "below 2^54"))
    }
}

/// Takes `count` tables from the `room` that all extents of a disk have together.
pub(super) fn take_tables(room: &mut u64, count: u64) -> Result<(), HeaderError> {
    let left = room.checked_sub(count).ok_or_else(|| {
        let all = MOST_TABLES.saturating_sub(*room).saturating_add(count);
        range(
            "the number of grain tables of all extents",
            all,
            "at most 33554432",
        )
    })?;
    *room = left;
    Ok(())
}

/// Tables that a directory must have for a disk of `capacity` sectors; each covers `covers` sectors.
pub(super) fn table_count(capacity: u64, covers: u64) -> Result<u64, HeaderError> {
    match capacity.div_ceil(covers.max(1)) {
        count if count <= MOST_TABLES => Ok(count),
        count => Err(range(
            "the number of grain tables",
            count,
            "at most 33554432: the disk is too large for its grains",
        )),
    }
}

/// The header of a hosted sparse extent. Offsets and sizes are in sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 1 to 3.
    pub version: u32,
    /// The flags; those that must be known are.
    pub flags: Flags,
    /// The size of the disk; 0 if the file only holds a descriptor.
    pub capacity: u64,
    /// The size of a grain.
    pub grain: Grain,
    /// Where the descriptor is and how much room it has.
    pub descriptor: Option<(u64, u64)>,
    /// Entries of a grain table: a power of two up to 512.
    pub gtes: u32,
    /// Where the redundant grain directory is.
    pub rgd: Option<u64>,
    /// Where the grain directory is; `None` if the footer knows.
    pub gd: Option<u64>,
    /// Where the first grain may be.
    pub overhead: u64,
    /// Whether a writer did not close it.
    pub unclean: bool,
}

impl Header {
    /// Reads the first 512 bytes of a file.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        if !bytes.starts_with(&SPARSE_MAGIC) {
            return Err(HeaderError::Magic);
        }
        let Ok((raw, _)) = SparseHeader::ref_from_prefix(bytes) else {
            return Err(HeaderError::Short(bytes.len()));
        };
        let version = raw.version.get();
        if !(1..=3).contains(&version) {
            return Err(HeaderError::Version(version));
        }
        let flags = Flags(raw.flags.get());
        let unknown = flags.0 & Flags::INCOMPATIBLE & !(Flags::COMPRESSED | Flags::MARKERS);
        if unknown != 0 {
            return Err(HeaderError::Flags(flags.0, unknown));
        }
        if flags.has(Flags::CHECKED) && raw.check != CHECK_BYTES {
            return Err(HeaderError::CheckBytes(raw.check));
        }
        let algorithm = raw.compress_algorithm.get();
        let packed = flags.has(Flags::COMPRESSED);
        if packed != (algorithm == DEFLATE) || packed != flags.has(Flags::MARKERS) || algorithm > DEFLATE {
            return Err(HeaderError::Compression {
                flags: flags.0,
                algorithm,
            });
        }
        let (offset, size) = (raw.descriptor_offset.get(), raw.descriptor_size.get());
        if offset != 0 && size == 0 {
            return Err(range("descriptorSize", 0, "above 0 where there is a descriptor"));
        }
        let capacity = capacity("capacity", raw.capacity.get())?;
        let container = capacity == 0 && offset != 0;
        let gtes = raw.gtes_per_gt.get();
        let (grain, gtes) = if container {
            (Grain::USUAL, 512)
        } else if gtes.is_power_of_two() && gtes <= 512 {
            (Grain::new(raw.grain_size.get())?, gtes)
        } else {
            return Err(range("numGTEsPerGT", gtes.into(), "a power of two up to 512"));
        };
        table_count(capacity, u64::from(gtes).saturating_mul(grain.sectors()))?;
        Ok(Self {
            version,
            flags,
            capacity,
            grain,
            descriptor: (offset != 0).then_some((offset, size)),
            gtes,
            rgd: flags.has(Flags::REDUNDANT).then_some(raw.rgd_offset.get()),
            gd: Some(raw.gd_offset.get()).filter(|at| *at != GD_AT_END),
            overhead: raw.overhead.get(),
            unclean: raw.unclean_shutdown != 0,
        })
    }

    /// Its 512 bytes.
    pub fn to_bytes(&self) -> [u8; 512] {
        let (offset, size) = self.descriptor.unwrap_or_default();
        let raw = SparseHeader {
            magic: SPARSE_MAGIC,
            version: self.version.into(),
            flags: self.flags.0.into(),
            capacity: self.capacity.into(),
            grain_size: self.grain.sectors().into(),
            descriptor_offset: offset.into(),
            descriptor_size: size.into(),
            gtes_per_gt: self.gtes.into(),
            rgd_offset: self.rgd.unwrap_or(0).into(),
            gd_offset: self.gd.unwrap_or(GD_AT_END).into(),
            overhead: self.overhead.into(),
            unclean_shutdown: self.unclean.into(),
            check: CHECK_BYTES,
            compress_algorithm: if self.is_packed() { DEFLATE } else { 0 }.into(),
            pad: [0; 433],
        };
        let mut bytes = [0; 512];
        // The structure has exactly that size.
        let _ = raw.write_to(&mut bytes);
        bytes
    }

    /// Whether grains are compressed.
    pub const fn is_packed(&self) -> bool {
        self.flags.has(Flags::COMPRESSED)
    }

    /// Sectors of the disk that one grain table covers.
    pub fn table_covers(&self) -> u64 {
        u64::from(self.gtes).saturating_mul(self.grain.sectors())
    }

    /// Tables of its directory.
    pub fn tables(&self) -> u64 {
        self.capacity.div_ceil(self.table_covers().max(1))
    }
}

/// The header of an ESX copy-on-write extent. Offsets and sizes are in sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cowd {
    /// The size of the disk.
    pub capacity: u64,
    /// The size of a grain.
    pub grain: u64,
    /// Where the grain directory is.
    pub gd: u64,
    /// Entries of it.
    pub tables: u64,
    /// The sector behind the last that is in use.
    pub next_free: u64,
}

impl Cowd {
    /// Reads the first bytes of a file.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        if !bytes.starts_with(&COWD_MAGIC) {
            return Err(HeaderError::Magic);
        }
        let Ok((raw, _)) = CowdHeader::ref_from_prefix(bytes) else {
            return Err(HeaderError::Short(bytes.len()));
        };
        if raw.version.get() != 1 {
            return Err(HeaderError::Range {
                field: "the version of a COWD extent",
                value: raw.version.get().into(),
                allowed: "1",
            });
        }
        let grain = u64::from(raw.grain_size.get());
        if !grain.is_power_of_two() || grain > 2048 {
            return Err(range("grainSize", grain, "a power of two up to 2048"));
        }
        let capacity = u64::from(raw.capacity.get());
        let needed = capacity.div_ceil(u64::from(COWD_GTES).saturating_mul(grain));
        let tables = u64::from(raw.gd_entries.get());
        if tables < needed {
            return Err(range("numGDEntries", tables, "enough for the disk"));
        }
        Ok(Self {
            capacity,
            grain,
            gd: raw.gd_offset.get().into(),
            tables: needed,
            next_free: raw.next_free.get().into(),
        })
    }
}

/// The headers of a space-efficient sparse extent. Offsets are in sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeSparse {
    /// The size of the disk.
    pub capacity: u64,
    /// Where the grain directory is.
    pub gd: u64,
    /// Entries of it that count.
    pub tables: u64,
    /// Where the grain tables are.
    pub tables_at: u64,
    /// Where the grains are.
    pub grains_at: u64,
    /// Where the volatile header is.
    pub volatile_at: u64,
}

impl SeSparse {
    /// Reads the first 512 bytes of a file.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        let Ok((raw, _)) = SeSparseHeader::ref_from_prefix(bytes) else {
            return Err(HeaderError::Short(bytes.len()));
        };
        if raw.magic.get() != SESPARSE_MAGIC {
            return Err(HeaderError::Magic);
        }
        let exact = [
            (
                "the version of a seSparse extent",
                raw.version.get(),
                SESPARSE_VERSION,
                "0x200000001",
            ),
            ("grainSize", raw.grain_size.get(), SESPARSE_GRAIN, "8"),
            ("grainTableSize", raw.grain_table_size.get(), SESPARSE_TABLE, "64"),
            ("flags", raw.flags.get(), 0, "0"),
        ];
        for (field, value, wanted, allowed) in exact {
            if value != wanted {
                return Err(range(field, value, allowed));
            }
        }
        let capacity = capacity("capacity", raw.capacity.get())?;
        let tables = table_count(capacity, u64::from(SESPARSE_GTES).saturating_mul(SESPARSE_GRAIN))?;
        let room = raw.gd_size.get().saturating_mul(SECTOR / 8);
        if room < tables {
            return Err(range("grainDirSize", raw.gd_size.get(), "enough for the disk"));
        }
        for (field, value) in [
            ("volatileHeaderOffset", raw.volatile_offset.get()),
            ("grainDirOffset", raw.gd_offset.get()),
            ("grainTablesOffset", raw.tables_offset.get()),
            ("grainsOffset", raw.grains_offset.get()),
        ] {
            if value >= 1 << 54 {
                return Err(range(field, value, "below 2^54"));
            }
        }
        Ok(Self {
            capacity,
            gd: raw.gd_offset.get(),
            tables,
            tables_at: raw.tables_offset.get(),
            grains_at: raw.grains_offset.get(),
            volatile_at: raw.volatile_offset.get(),
        })
    }

    /// Fails if the volatile header, whose first bytes are `bytes`, says that the tables are not up to date.
    pub fn check_volatile(bytes: &[u8]) -> Result<(), HeaderError> {
        let Ok((raw, _)) = SeSparseVolatile::ref_from_prefix(bytes) else {
            return Err(HeaderError::Short(bytes.len()));
        };
        if raw.magic.get() != SESPARSE_VOLATILE_MAGIC {
            return Err(range(
                "the magic of the volatile header",
                raw.magic.get(),
                "0xcafecafe",
            ));
        }
        if raw.replay_journal.get() != 0 {
            return Err(HeaderError::Journal);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
