//! The parts of a disk that is written, and what is done to each.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskmill_core::{
    Error, ErrorKind, FileIndex, Format, GuestOffset, HostOffset, Result, SECTOR, StorageMut,
};

use super::descriptor::Access;
use super::header::{Cowd, Header};
use super::layer::{Body, Part, head, no_access};
use super::map::{Kind, scan};
use super::sparse::{Dialect, Sparse, read_directory};
use super::tables::{Tables, front};
use super::unsupported;

/// Where the bytes of an extent are.
#[derive(Debug)]
pub(super) enum BodyMut {
    /// In a file as they are, from here on.
    Flat {
        /// Which file.
        file: FileIndex,
        /// The file.
        storage: Arc<dyn StorageMut>,
        /// The first byte.
        at: HostOffset,
    },
    /// In a sparse file.
    Sparse {
        /// Which file.
        file: FileIndex,
        /// Its tables.
        tables: Box<Mutex<Tables>>,
    },
    /// Nowhere.
    Zero,
}

/// A part of the disk.
#[derive(Debug)]
pub(super) struct PartMut {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) access: Access,
    pub(super) body: BodyMut,
    /// The header of a hosted sparse file.
    pub(super) header: Option<Header>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn to_mut(part: Part, files: &[Arc<dyn StorageMut>]) -> Result<PartMut> {
    let find = |file: FileIndex| {
        files
            .get(usize::from(file.0))
            .cloned()
            .ok_or_else(|| Error::new(ErrorKind::Usage, "the file of the extent is not there"))
    };
    let body = match part.body {
        Body::Zero => BodyMut::Zero,
        Body::Flat { file, at, .. } => BodyMut::Flat {
            file,
            storage: find(file)?,
            at,
        },
        Body::Sparse(sparse) => {
            let file = sparse.file;
            let tables = tables(*sparse, part.header.as_ref(), find(file)?)?;
            BodyMut::Sparse {
                file,
                tables: Box::new(Mutex::new(tables)),
            }
        }
    };
    Ok(PartMut {
        start: part.start,
        len: part.len,
        access: part.access,
        body,
        header: part.header,
    })
}

pub(super) fn tables(
    sparse: Sparse,
    header: Option<&Header>,
    storage: Arc<dyn StorageMut>,
) -> Result<Tables> {
    let (at, redundant, overhead) = match (sparse.dialect, header) {
        (Dialect::Hosted { packed: true, .. }, _) => {
            return Err(unsupported(
                "streamOptimized images are written once, from front to back",
            ));
        }
        (Dialect::Se { .. }, _) => return Err(unsupported("writing to seSparse extents")),
        (Dialect::Hosted { .. }, Some(header)) => {
            if header.version == 3 {
                return Err(unsupported(
                    "writing to a sparse extent of version 3, whose changes VMware tracks elsewhere",
                ));
            }
            let redundant = match header.rgd {
                Some(at) => {
                    let list = read_directory(&*storage, at, header.tables(), storage.len()?)?;
                    Some((at, list))
                }
                None => None,
            };
            (header.gd.unwrap_or(0), redundant, header.overhead)
        }
        _ => {
            let header = Cowd::parse(&head(&*storage)?)?;
            let end = header
                .gd
                .saturating_add(header.tables.saturating_mul(4).div_ceil(SECTOR));
            (header.gd, None, end)
        }
    };
    let tables = Tables::new(
        storage,
        sparse.geometry,
        sparse.dialect,
        (at, sparse.directory),
        redundant,
        overhead,
        front(header),
    )?;
    tables.demand_tables()?;
    Ok(tables)
}

/// A run of bytes of one part.
pub(super) struct Piece<'a> {
    /// Which part.
    pub(super) index: usize,
    /// The part.
    pub(super) part: &'a PartMut,
    /// The first byte, from the start of the part.
    pub(super) local: u64,
    /// How many.
    pub(super) len: u64,
}

pub(super) fn pieces<'a>(parts: &'a [PartMut], range: &Range<GuestOffset>) -> Result<Vec<Piece<'a>>> {
    let (mut at, end) = (range.start.get(), range.end.get());
    let size = parts.last().map_or(0, |part| part.start.saturating_add(part.len));
    if end > size || at > end {
        let text = format!("bytes {at} to {end} are not within the disk of {size} bytes");
        return Err(Error::new(ErrorKind::Usage, text).format(Format::Vmdk));
    }
    let mut found = Vec::new();
    let first = parts.partition_point(|part| part.start <= at).saturating_sub(1);
    for (index, part) in parts.iter().enumerate().skip(first) {
        if at >= end {
            break;
        }
        let stop = end.min(part.start.saturating_add(part.len));
        if stop <= at {
            continue;
        }
        found.push(Piece {
            index,
            part,
            local: at.saturating_sub(part.start),
            len: stop.saturating_sub(at),
        });
        at = stop;
    }
    Ok(found)
}

pub(super) fn to_usize(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

pub(super) fn look(tables: &Mutex<Tables>, at: u64, max: u64) -> Result<(Kind, u64)> {
    let mut held = lock(tables);
    let (geometry, dialect) = (held.geometry, held.dialect);
    let kind = |entry: &[u8]| dialect.kind(entry);
    scan(&geometry, at, max, &mut |index| held.bytes(index), &kind)
}

pub(super) fn read_piece(piece: &Piece<'_>, buf: &mut [u8]) -> Result<()> {
    match &piece.part.body {
        BodyMut::Zero => buf.fill(0),
        _ if piece.part.access == Access::None => return Err(no_access(piece.index)),
        BodyMut::Flat { storage, at, .. } => storage.read_at(at.plus(piece.local)?, buf)?,
        BodyMut::Sparse { tables, .. } => {
            let mut at = piece.local;
            let mut rest = buf;
            while !rest.is_empty() {
                let (kind, len) = look(tables, at, rest.len() as u64)?;
                let (now, later) = rest.split_at_mut(to_usize(len).min(rest.len()));
                match kind {
                    Kind::Zero => now.fill(0),
                    Kind::Data(host) => {
                        let storage = Arc::clone(&lock(tables).storage);
                        storage.read_at(host, now).map_err(|error| error.host(host))?;
                    }
                    _ => {
                        return Err(Error::new(
                            ErrorKind::Usage,
                            "these bytes are the backing image's",
                        ));
                    }
                }
                at = at.saturating_add(len);
                rest = later;
            }
        }
    }
    Ok(())
}

pub(super) fn demand_writable(piece: &Piece<'_>) -> Result<()> {
    let index = piece.index;
    let text = match piece.part.access {
        Access::ReadWrite => return Ok(()),
        Access::None => return Err(no_access(index)),
        Access::ReadOnly => format!("extent {index} is marked RDONLY: it may only be read"),
    };
    Err(Error::new(ErrorKind::Denied, text).format(Format::Vmdk))
}

pub(super) fn write_back(part: &PartMut) -> Result<()> {
    match &part.body {
        BodyMut::Flat { storage, .. } => storage.sync(),
        BodyMut::Sparse { tables, .. } => lock(tables).write_back(),
        BodyMut::Zero => Ok(()),
    }
}

/// The tables of a part, for whoever has the image alone.
pub(super) fn tables_of(part: &PartMut) -> Option<MutexGuard<'_, Tables>> {
    match &part.body {
        BodyMut::Sparse { tables, .. } => Some(lock(tables)),
        _ => None,
    }
}
