//! A sparse extent open for reading, whichever of the three kinds it is.

use std::sync::{Arc, Mutex, PoisonError};

use diskmill_core::{
    Error, ErrorKind, Extent, FileIndex, Format, HostOffset, HostRun, HostSpan, Result, SECTOR, State,
    Storage,
};
use zerocopy::FromBytes;

use super::header::{Cowd, Header, SeSparse};
use super::layout::{
    COWD_GTES, GRAIN_MARKER_LEN, MARKER_EOS, MARKER_FOOTER, Marker, SESPARSE_GRAIN, SESPARSE_GTES,
    SESPARSE_TABLE,
};
use super::map::{Geometry, Kind, TableCache, scan, sector};
use crate::codec::Decoder;

/// What is wrong with a place a table or a header points to, or with what is there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// A structure that does not lie in the file.
    #[error("{what} at {at:#x} with {len} bytes runs past the end of the file at {file_len:#x}")]
    PastEnd {
        /// What it is.
        what: &'static str,
        /// Where it starts.
        at: u64,
        /// Its length.
        len: u64,
        /// The length of the file.
        file_len: u64,
    },
    /// A file that ends before its first grain.
    #[error("file truncated, expecting at least {0} bytes")]
    Truncated(u64),
    /// The last sectors are not those of a stream.
    #[error("invalid footer: {0}")]
    Footer(&'static str),
    /// An entry that is none.
    #[error("{what} is {value:#x}, which is not allowed")]
    Entry {
        /// What it is.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A compressed grain that belongs elsewhere.
    #[error("the grain is marked as that of sector {found}, must be {wanted}")]
    Sector {
        /// The sector in the marker.
        found: u64,
        /// The sector it should be.
        wanted: u64,
    },
    /// A compressed grain of a size that no grain has.
    #[error("the compressed grain has {found} bytes, must have 1 to {most}")]
    Size {
        /// Its bytes.
        found: u64,
        /// The most it may have.
        most: u64,
    },
    /// A compressed grain that holds too little.
    #[error("the compressed grain holds {found} bytes, must hold {wanted}")]
    Short {
        /// Bytes it holds.
        found: u64,
        /// Bytes it must hold.
        wanted: u64,
    },
}

impl From<PlaceError> for Error {
    fn from(error: PlaceError) -> Self {
        let kind = match error {
            PlaceError::Truncated(_) | PlaceError::Footer(_) => ErrorKind::Malformed,
            _ => ErrorKind::Corrupt,
        };
        Error::new(kind, error).format(Format::Vmdk)
    }
}

/// Fails if `len` bytes at `at` are not within the file.
pub(super) fn within(what: &'static str, at: HostOffset, len: u64, file_len: u64) -> Result<()> {
    match at.checked_add(len) {
        Some(end) if end.get() <= file_len => Ok(()),
        _ => Err(PlaceError::PastEnd {
            what,
            at: at.get(),
            len,
            file_len,
        }
        .into()),
    }
}

/// Reads the header of a hosted sparse extent, or its footer where that is what counts.
pub(super) fn read_header(storage: &dyn Storage) -> Result<Header> {
    let len = storage.len()?;
    let mut bytes = [0; 512];
    let have = usize::try_from(len).unwrap_or(usize::MAX).min(bytes.len());
    storage.read_at(HostOffset::ZERO, bytes.get_mut(..have).unwrap_or_default())?;
    let header = Header::parse(bytes.get(..have).unwrap_or_default())?;
    if header.gd.is_some() || header.capacity == 0 {
        return Ok(header);
    }
    let mut tail = [0; 3 * 512];
    let at = footer_at(storage, len)?
        .checked_sub(SECTOR)
        .filter(|at| *at >= SECTOR && at.saturating_add(tail.len() as u64) <= len)
        .ok_or(PlaceError::Footer("the file does not end with one"))?;
    storage.read_at(HostOffset::new(at), &mut tail)?;
    let (marker, rest) = tail.split_at(512);
    let (footer, end) = rest.split_at(512);
    let is = |bytes: &[u8], val: u64, kind: u32| {
        Marker::ref_from_prefix(bytes).is_ok_and(|(marker, _)| {
            marker.val.get() == val && marker.size.get() == 0 && marker.kind.get() == kind
        })
    };
    if !is(marker, 1, MARKER_FOOTER) {
        return Err(PlaceError::Footer("its marker is not where it must be").into());
    }
    if !is(end, 0, MARKER_EOS) {
        return Err(PlaceError::Footer("the stream does not end behind it").into());
    }
    let footer = Header::parse(footer).map_err(|_| PlaceError::Footer("it is no header"))?;
    if footer.gd.is_none() {
        return Err(PlaceError::Footer("it does not say where the grain directory is").into());
    }
    if (footer.capacity, footer.grain, footer.gtes) != (header.capacity, header.grain, header.gtes) {
        return Err(PlaceError::Footer("it contradicts the header").into());
    }
    Ok(footer)
}

/// Bytes of zeros that may follow a stream. Some transfers fill the last block.
const PADDING: u64 = 1 << 20;

/// Where the footer of a stream of `len` bytes is, if it has one: the sector that ends it, and what may follow, is zeros.
fn footer_at(storage: &dyn Storage, len: u64) -> Result<u64> {
    let mut at = len;
    let mut piece = vec![0; 64 << 10];
    while at > 0 && len.saturating_sub(at) < PADDING {
        let have = usize::try_from(at).unwrap_or(usize::MAX).min(piece.len());
        let start = at.saturating_sub(have as u64);
        let bytes = piece.get_mut(..have).unwrap_or_default();
        storage.read_at(HostOffset::new(start), bytes)?;
        if let Some(last) = bytes.iter().rposition(|byte| *byte != 0) {
            return Ok(start.saturating_add(last as u64) / SECTOR * SECTOR);
        }
        at = start;
    }
    Ok(0)
}

/// Which kind of sparse extent it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// "KDMV".
    Hosted {
        /// Whether an entry of 1 means zeros.
        zero_grain: bool,
        /// Whether grains are compressed.
        packed: bool,
    },
    /// "COWD".
    Cowd,
    /// seSparse.
    Se {
        /// Where the tables are.
        tables: HostOffset,
        /// Where the grains are.
        grains: HostOffset,
    },
}

impl Dialect {
    /// What the bytes of an entry say.
    pub(super) fn kind(self, entry: &[u8]) -> Result<Kind> {
        let word = |entry: &[u8]| entry.first_chunk().copied().map(u32::from_le_bytes).unwrap_or(0);
        Ok(match self {
            Self::Hosted { zero_grain, packed } => match word(entry) {
                0 => Kind::Absent,
                1 if zero_grain => Kind::Zero,
                at if packed => Kind::Packed(sector(at.into())),
                at => Kind::Data(sector(at.into())),
            },
            Self::Cowd => match word(entry) {
                0 => Kind::Absent,
                at => Kind::Data(sector(at.into())),
            },
            Self::Se { grains, .. } => {
                let value = entry.first_chunk().copied().map(u64::from_le_bytes).unwrap_or(0);
                let bad = || PlaceError::Entry {
                    what: "a grain table entry",
                    value,
                };
                match value >> 60 {
                    0 if value == 0 => Kind::Absent,
                    1 | 2 => Kind::Zero,
                    3 => {
                        let index = (value >> 48 & 0xfff) | (value & 0xffff_ffff_ffff) << 12;
                        let into = index.checked_mul(SESPARSE_GRAIN * SECTOR).ok_or_else(bad)?;
                        Kind::Data(grains.plus(into)?)
                    }
                    _ => return Err(bad().into()),
                }
            }
        })
    }
}

/// A sparse extent open for reading.
#[derive(Debug)]
pub(super) struct Sparse {
    pub(super) file: FileIndex,
    pub(super) storage: Arc<dyn Storage>,
    pub(super) file_len: u64,
    pub(super) geometry: Geometry,
    pub(super) dialect: Dialect,
    /// For each table the sector where it is; 0 if there is none. For seSparse, its number and 1.
    pub(super) directory: Vec<u32>,
    cache: TableCache,
    idle: Mutex<Vec<Scratch>>,
}

#[derive(Debug)]
struct Scratch {
    decoder: Decoder,
    input: Vec<u8>,
    grain: Vec<u8>,
}

impl Sparse {
    /// A hosted sparse extent whose header, or footer, is `header`; `disk` bytes of it count.
    pub(super) fn hosted(
        file: FileIndex,
        storage: Arc<dyn Storage>,
        header: &Header,
        disk: u64,
    ) -> Result<Self> {
        let file_len = storage.len()?;
        let first = header.overhead.saturating_mul(SECTOR);
        if first > file_len {
            return Err(PlaceError::Truncated(first).into());
        }
        let gd = header.gd.ok_or(PlaceError::Footer("there is none"))?;
        let directory = read_directory(&*storage, gd, header.tables(), file_len)?;
        let dialect = Dialect::Hosted {
            zero_grain: header.flags.has(super::header::Flags::ZERO_GRAIN),
            packed: header.is_packed(),
        };
        let geometry = Geometry {
            grain: header.grain.bytes(),
            entries: header.gtes,
            entry_len: 4,
            disk,
        };
        Ok(Self::new(file, storage, file_len, geometry, dialect, directory))
    }

    /// An ESX copy-on-write extent.
    pub(super) fn cowd(file: FileIndex, storage: Arc<dyn Storage>, header: &Cowd, disk: u64) -> Result<Self> {
        let file_len = storage.len()?;
        let directory = read_directory(&*storage, header.gd, header.tables, file_len)?;
        let geometry = Geometry {
            grain: header.grain.saturating_mul(SECTOR),
            entries: COWD_GTES,
            entry_len: 4,
            disk,
        };
        Ok(Self::new(
            file,
            storage,
            file_len,
            geometry,
            Dialect::Cowd,
            directory,
        ))
    }

    /// A space-efficient sparse extent.
    pub(super) fn se(
        file: FileIndex,
        storage: Arc<dyn Storage>,
        header: &SeSparse,
        disk: u64,
    ) -> Result<Self> {
        let file_len = storage.len()?;
        let at = sector(header.gd);
        let len = header.tables.saturating_mul(8);
        within("the grain directory", at, len, file_len)?;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        storage.read_at(at, &mut bytes)?;
        let mut directory = Vec::with_capacity(bytes.len() / 8);
        for entry in bytes.chunks_exact(8) {
            let value = entry.first_chunk().copied().map(u64::from_le_bytes).unwrap_or(0);
            directory.push(match (value >> 32, u32::try_from(value & 0xffff_ffff)) {
                (0, Ok(0)) => 0,
                (0x1000_0000, Ok(index)) if index < u32::MAX => index.saturating_add(1),
                _ => {
                    let what = "a grain directory entry";
                    return Err(PlaceError::Entry { what, value }.into());
                }
            });
        }
        let dialect = Dialect::Se {
            tables: sector(header.tables_at),
            grains: sector(header.grains_at),
        };
        let geometry = Geometry {
            grain: SESPARSE_GRAIN * SECTOR,
            entries: SESPARSE_GTES,
            entry_len: 8,
            disk,
        };
        Ok(Self::new(file, storage, file_len, geometry, dialect, directory))
    }

    fn new(
        file: FileIndex,
        storage: Arc<dyn Storage>,
        file_len: u64,
        geometry: Geometry,
        dialect: Dialect,
        directory: Vec<u32>,
    ) -> Self {
        Self {
            cache: TableCache::new(directory.len(), geometry.table_len()),
            idle: Mutex::default(),
            file,
            storage,
            file_len,
            geometry,
            dialect,
            directory,
        }
    }

    /// The same as one of `extents` of a disk, which hold a number of tables together.
    pub(super) fn among(mut self, extents: usize) -> Self {
        self.cache = TableCache::among(self.directory.len(), self.geometry.table_len(), extents);
        self
    }

    /// Whether grains are compressed.
    pub(super) fn is_packed(&self) -> bool {
        matches!(self.dialect, Dialect::Hosted { packed: true, .. })
    }

    /// Where table number `index` is, if there is one.
    pub(super) fn table_at(&self, index: usize) -> Option<HostOffset> {
        let entry = self.directory.get(index).copied().filter(|entry| *entry != 0)?;
        Some(match self.dialect {
            Dialect::Se { tables, .. } => tables.saturating_add(
                u64::from(entry)
                    .saturating_sub(1)
                    .saturating_mul(SESPARSE_TABLE * SECTOR),
            ),
            _ => sector(entry.into()),
        })
    }

    /// The bytes of table number `index`, if there is one that says anything.
    pub(super) fn table(&self, index: usize) -> Result<Option<Arc<[u8]>>> {
        let Some(at) = self.table_at(index) else {
            return Ok(None);
        };
        let len = self.geometry.table_len();
        let bytes = self.cache.get(index, || {
            if is_hole(&*self.storage, at, len, self.file_len)? {
                return Ok(Arc::default());
            }
            let mut bytes = vec![0; len];
            self.storage.read_at(at, &mut bytes)?;
            Ok(bytes.into())
        })?;
        Ok(Some(bytes).filter(|bytes| !bytes.is_empty()))
    }

    fn run(&self, at: u64, max: u64) -> Result<(Kind, u64)> {
        let max = max.min(self.geometry.disk.saturating_sub(at));
        let kind = |entry: &[u8]| self.dialect.kind(entry);
        scan(&self.geometry, at, max, &mut |index| self.table(index), &kind)
    }

    /// See [`diskmill_core::Layer::map`]; `at` counts from the start of the extent.
    pub(super) fn map(&self, at: u64, max: u64) -> Result<Extent> {
        let (kind, len) = self.run(at, max)?;
        let file = self.file;
        let state = match kind {
            Kind::Absent => State::Absent,
            Kind::Zero => State::Zero { reserved: None },
            Kind::Data(at) => State::Data(HostSpan { file, at, len }),
            Kind::Packed(at) => State::Compressed(HostSpan {
                file,
                at,
                len: GRAIN_MARKER_LEN,
            }),
        };
        Ok(Extent { len, state })
    }

    /// Fills `buf` from `at`, which counts from the start of the extent. What is absent is an error.
    pub(super) fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let (kind, len) = self.run(at, rest.len() as u64)?;
            let len = usize::try_from(len).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            match kind {
                Kind::Zero => now.fill(0),
                Kind::Data(host) => self
                    .storage
                    .read_at(host, now)
                    .map_err(|error| error.host(host))?,
                Kind::Packed(_) => self.read_packed(at, now)?,
                Kind::Absent => {
                    return Err(Error::new(
                        ErrorKind::Usage,
                        "these bytes are the backing image's",
                    ));
                }
            }
            at = at.saturating_add(len as u64);
            rest = later;
        }
        Ok(())
    }

    /// Fills `buf` from `at` on, all of which is compressed.
    fn read_packed(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut scratch = idle.unwrap_or_else(|| Scratch {
            decoder: Decoder::zlib(),
            input: Vec::new(),
            grain: Vec::new(),
        });
        let done = self.unpack(at, buf, &mut scratch);
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(scratch);
        done
    }

    fn unpack(&self, at: u64, buf: &mut [u8], scratch: &mut Scratch) -> Result<()> {
        let grain = self.geometry.grain;
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let into = at & grain.saturating_sub(1);
            let start = at.saturating_sub(into);
            let len = usize::try_from(grain.saturating_sub(into))
                .unwrap_or(usize::MAX)
                .min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            let (Kind::Packed(host), _) = self.run(start, 1)? else {
                return Err(Error::new(ErrorKind::Usage, "these bytes are not compressed"));
            };
            self.unpack_grain(host, start, into, now, scratch)
                .map_err(|error| error.host(host))?;
            at = at.saturating_add(len as u64);
            rest = later;
        }
        Ok(())
    }

    /// Decodes the grain of byte `start` that is at `host`, and puts what it has from `into` on into `piece`.
    fn unpack_grain(
        &self,
        host: HostOffset,
        start: u64,
        into: u64,
        piece: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let grain = self.geometry.grain;
        // A stream that does not shrink takes a sector more than its grain at most; others take less and are read whole.
        let likely = grain
            .saturating_add(SECTOR)
            .min(self.file_len.saturating_sub(host.get()));
        within("a compressed grain", host, GRAIN_MARKER_LEN, self.file_len)?;
        let to_usize = |len: u64| usize::try_from(len).unwrap_or(usize::MAX);
        scratch.input.resize(to_usize(likely), 0);
        self.storage.read_at(host, &mut scratch.input)?;
        let (wanted, size) = match scratch.input.split_at_checked(to_usize(GRAIN_MARKER_LEN)) {
            Some((marker, _)) => {
                let (lba, size) = marker.split_at_checked(8).unwrap_or_default();
                let number = |bytes: &[u8]| bytes.first_chunk().copied().map(u32::from_le_bytes);
                (
                    lba.first_chunk().copied().map(u64::from_le_bytes).unwrap_or(0),
                    u64::from(number(size).unwrap_or(0)),
                )
            }
            None => (0, 0),
        };
        if wanted != start / SECTOR {
            return Err(PlaceError::Sector {
                found: wanted,
                wanted: start / SECTOR,
            }
            .into());
        }
        let most = grain.saturating_mul(2);
        if size == 0 || size > most {
            return Err(PlaceError::Size { found: size, most }.into());
        }
        let end = GRAIN_MARKER_LEN.saturating_add(size);
        within("a compressed grain", host, end, self.file_len)?;
        if end > likely {
            scratch.input.resize(to_usize(end), 0);
            self.storage.read_at(host, &mut scratch.input)?;
        }
        let stream = scratch
            .input
            .get(to_usize(GRAIN_MARKER_LEN)..to_usize(end))
            .unwrap_or_default();
        let damaged = |error| Error::new(ErrorKind::Corrupt, error).format(Format::Vmdk);
        // The last grain may end with the disk.
        let least = grain.min(self.geometry.disk.saturating_sub(start));
        let direct = piece.len() as u64 == grain;
        let have = if direct {
            scratch.decoder.decode_some(stream, piece).map_err(damaged)?
        } else {
            scratch.grain.resize(to_usize(grain), 0);
            let have = scratch
                .decoder
                .decode_some(stream, &mut scratch.grain)
                .map_err(damaged)?;
            let part = scratch.grain.get(to_usize(into)..).unwrap_or_default();
            for (to, from) in piece.iter_mut().zip(part) {
                *to = *from;
            }
            have
        };
        if (have as u64) < least {
            return Err(PlaceError::Short {
                found: have as u64,
                wanted: least,
            }
            .into());
        }
        Ok(())
    }
}

/// Whether the host knows the table of `len` bytes at `at` as a hole, as it does with most of those of a large disk. Fails
/// if the table is not within the file.
pub(super) fn is_hole(storage: &dyn Storage, at: HostOffset, len: usize, file_len: u64) -> Result<bool> {
    within("a grain table", at, len as u64, file_len)?;
    Ok(matches!(storage.run_at(at)?, HostRun::Hole(hole) if hole >= len as u64))
}

/// Reads a directory of `count` sectors at sector `at`.
pub(super) fn read_directory(storage: &dyn Storage, at: u64, count: u64, file_len: u64) -> Result<Vec<u32>> {
    let (at, len) = (sector(at), count.saturating_mul(4));
    within("the grain directory", at, len, file_len)?;
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
    storage.read_at(at, &mut bytes)?;
    Ok(words(&bytes))
}

/// The little-endian words of a table.
pub(super) fn words(bytes: &[u8]) -> Vec<u32> {
    bytes
        .chunks_exact(4)
        .map(|word| word.first_chunk().copied().map(u32::from_le_bytes).unwrap_or(0))
        .collect()
}
