//! Reading a disk: extents one behind the other, each in a file or in none.

use std::sync::Arc;

use diskmill_core::{
    Error, ErrorKind, Extent, Facts, FileIndex, Files, Format, GuestOffset, HostOffset, HostSpan, Layer,
    OpenSpec, Result, SECTOR, State, Storage,
};
use zerocopy::FromBytes;
use zerocopy::byteorder::little_endian::U64;

use super::descriptor::{Access, ExtentKind, ExtentLine};
use super::header::{Cowd, Header, SeSparse, take_tables};
use super::layout::{MOST_TABLES, SESPARSE_MAGIC};
use super::map::sector;
use super::sparse::{PlaceError, Sparse, read_header};
use super::{Shape, VmdkImage, facts};

/// Where the bytes of an extent are.
#[derive(Debug)]
pub(super) enum Body {
    /// In a file as they are, from here on.
    Flat {
        /// Which file.
        file: FileIndex,
        /// The file.
        storage: Arc<dyn Storage>,
        /// The first byte.
        at: HostOffset,
    },
    /// In a sparse file.
    Sparse(Box<Sparse>),
    /// Nowhere.
    Zero,
}

/// A part of the disk.
#[derive(Debug)]
pub(super) struct Part {
    /// Its first byte.
    pub(super) start: u64,
    /// Its bytes.
    pub(super) len: u64,
    /// What may be done with it.
    pub(super) access: Access,
    /// Where it is.
    pub(super) body: Body,
    /// How it is kept, as a descriptor names it; empty if it is in one file with its descriptor.
    pub(super) kind: &'static str,
    /// The header of a hosted sparse file.
    pub(super) header: Option<Header>,
}

/// Opens the extents of `image`; `files` are the main one and those its references name.
pub(super) fn open_parts(image: &VmdkImage, files: &[Arc<dyn Storage>]) -> Result<Vec<Part>> {
    let main = files
        .first()
        .ok_or_else(|| Error::new(ErrorKind::Usage, "an image needs a file"))?;
    match &image.shape {
        Shape::Embedded { header, .. } => {
            let len = header.capacity.saturating_mul(SECTOR);
            let sparse = Sparse::hosted(FileIndex::MAIN, Arc::clone(main), header, len)?;
            Ok(vec![Part {
                start: 0,
                len,
                access: Access::ReadWrite,
                body: Body::Sparse(Box::new(sparse)),
                kind: "",
                header: Some((**header).clone()),
            }])
        }
        Shape::Text { files: indices } => {
            let mut parts = Vec::with_capacity(image.descriptor.extents.len());
            let mut start = 0_u64;
            // A file may be that of many extents, each with a directory in memory.
            let mut room = MOST_TABLES;
            let count = image.descriptor.extents.len();
            for (index, line) in image.descriptor.extents.iter().enumerate() {
                let file = indices.get(index).copied().flatten();
                let storage = file.and_then(|file| files.get(usize::from(file.0)));
                let mut part = open_part(line, start, file.zip(storage.cloned()), &mut room)
                    .map_err(|error| named(error, index, line))?;
                if let Body::Sparse(sparse) = part.body {
                    part.body = Body::Sparse(Box::new(sparse.among(count)));
                }
                start = start.saturating_add(part.len);
                parts.push(part);
            }
            Ok(parts)
        }
    }
}

/// Says which extent an error is about.
fn named(error: Error, index: usize, line: &ExtentLine) -> Error {
    let text = format!("extent {index} in '{}': {}", line.name, explain(&error));
    Error::new(error.kind(), text).format(Format::Vmdk)
}

fn explain(error: &Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

fn open_part(
    line: &ExtentLine,
    start: u64,
    file: Option<(FileIndex, Arc<dyn Storage>)>,
    room: &mut u64,
) -> Result<Part> {
    let len = line.sectors.saturating_mul(SECTOR);
    let mut header = None;
    let body = match (line.kind, file) {
        (ExtentKind::Zero, _) => Body::Zero,
        (_, None) => {
            return Err(Error::new(
                ErrorKind::Usage,
                "the file of the extent is not there",
            ));
        }
        (ExtentKind::Flat | ExtentKind::Vmfs, Some((file, storage))) => {
            let at = sector(line.offset);
            let have = storage.len()?;
            if at.plus(len)?.get() > have {
                return Err(PlaceError::PastEnd {
                    what: "the extent",
                    at: at.get(),
                    len,
                    file_len: have,
                }
                .into());
            }
            Body::Flat { file, storage, at }
        }
        (ExtentKind::Sparse, Some((file, storage))) => {
            let found = read_header(&*storage)?;
            if found.capacity < line.sectors {
                return Err(too_small(found.capacity, line.sectors));
            }
            take_tables(room, found.tables())?;
            let sparse = Sparse::hosted(file, storage, &found, len)?;
            header = Some(found);
            Body::Sparse(Box::new(sparse))
        }
        (ExtentKind::VmfsSparse, Some((file, storage))) => {
            let found = Cowd::parse(&head(&*storage)?)?;
            if found.capacity < line.sectors {
                return Err(too_small(found.capacity, line.sectors));
            }
            take_tables(room, found.tables)?;
            Body::Sparse(Box::new(Sparse::cowd(file, storage, &found, len)?))
        }
        (ExtentKind::SeSparse, Some((file, storage))) => {
            let found = SeSparse::parse(&head(&*storage)?)?;
            if found.capacity < line.sectors {
                return Err(too_small(found.capacity, line.sectors));
            }
            take_tables(room, found.tables)?;
            let mut volatile = [0; 512];
            storage.read_at(sector(found.volatile_at), &mut volatile)?;
            SeSparse::check_volatile(&volatile)?;
            Body::Sparse(Box::new(Sparse::se(file, storage, &found, len)?))
        }
    };
    Ok(Part {
        start,
        len,
        access: line.access,
        body,
        kind: line.kind.name(),
        header,
    })
}

fn too_small(found: u64, wanted: u64) -> Error {
    let text = format!("its header says {found} sectors, the descriptor {wanted}");
    Error::new(ErrorKind::Malformed, text).format(Format::Vmdk)
}

/// Says which two extents have bytes of a file in common, if any do. What is written to one would change the other, and
/// each would take the same room for its grains.
pub(super) fn in_common(parts: &[Part]) -> Option<String> {
    let mut ranges = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        let (file, start, len) = match &part.body {
            Body::Flat { file, at, .. } => (*file, at.get(), part.len),
            Body::Sparse(sparse) => (sparse.file, 0, u64::MAX),
            Body::Zero => continue,
        };
        ranges.push((file.0, start, start.saturating_add(len), index));
    }
    ranges.sort_unstable();
    ranges.windows(2).find_map(|pair| match pair {
        [(file, _, end, first), (other, start, _, second)] if file == other && start < end => Some(format!(
            "extents {first} and {second} are in the same bytes of one file: the image contradicts itself and is only read"
        )),
        _ => None,
    })
}

/// The first sector of a file.
pub(super) fn head(storage: &dyn Storage) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(storage.len()?).unwrap_or(usize::MAX).min(512)];
    storage.read_at(HostOffset::ZERO, &mut bytes)?;
    Ok(bytes)
}

/// Whether `head` is that of a space-efficient sparse extent.
pub(super) fn is_se_sparse(head: &[u8]) -> bool {
    U64::read_from_prefix(head).is_ok_and(|(magic, _)| magic.get() == SESPARSE_MAGIC)
}

/// The part that has byte `at` of the disk.
pub(super) fn find_part(parts: &[Part], at: u64) -> Result<(usize, &Part)> {
    let index = parts.partition_point(|part| part.start <= at).saturating_sub(1);
    // An empty extent has no bytes and is passed over, since the next starts where it does.
    match parts.get(index) {
        Some(part) if at.saturating_sub(part.start) < part.len => Ok((index, part)),
        _ => Err(Error::new(
            ErrorKind::Usage,
            format!("byte {at} is not within the disk"),
        )),
    }
}

/// A disk open for reading.
#[derive(Debug)]
pub struct VmdkLayer {
    facts: Facts,
    files: Vec<Arc<dyn Storage>>,
    parts: Vec<Part>,
    size: u64,
}

/// Opens a disk for reading.
pub(super) fn attach(image: VmdkImage, files: Files, how: &OpenSpec) -> Result<VmdkLayer> {
    super::refuse_snapshot(how)?;
    let files: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
    let parts = open_parts(&image, &files)?;
    let size = parts.iter().fold(0_u64, |sum, part| sum.saturating_add(part.len));
    Ok(VmdkLayer {
        facts: facts::of_parts(&image, &parts),
        files,
        parts,
        size,
    })
}

impl Layer for VmdkLayer {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn virtual_size(&self) -> u64 {
        self.size
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        if max == 0 {
            return Err(Error::new(ErrorKind::Usage, "0 bytes have no state"));
        }
        let (_, part) = find_part(&self.parts, at.get())?;
        let local = at.get().saturating_sub(part.start);
        let max = max.min(part.len.saturating_sub(local));
        match &part.body {
            Body::Zero => Ok(Extent {
                len: max,
                state: State::Zero { reserved: None },
            }),
            Body::Flat { file, at, .. } => Ok(Extent {
                len: max,
                state: State::Data(HostSpan {
                    file: *file,
                    at: at.plus(local)?,
                    len: max,
                }),
            }),
            Body::Sparse(sparse) => sparse.map(local, max).map_err(|error| error.guest(at)),
        }
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let mut next = at.get();
        let mut rest = buf;
        while !rest.is_empty() {
            let (index, part) = find_part(&self.parts, next)?;
            let local = next.saturating_sub(part.start);
            let len = usize::try_from(part.len.saturating_sub(local))
                .unwrap_or(usize::MAX)
                .min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            read_part(index, part, local, now).map_err(|error| error.guest(GuestOffset::new(next)))?;
            next = next.saturating_add(len as u64);
            rest = later;
        }
        Ok(())
    }

    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>> {
        self.files.get(usize::from(index.0))
    }

    fn is_hollow(&self) -> Result<bool> {
        Ok(self
            .parts
            .iter()
            .any(|part| matches!(part.body, Body::Flat { .. })))
    }
}

/// Fills `buf` from byte `local` of a part on.
fn read_part(index: usize, part: &Part, local: u64, buf: &mut [u8]) -> Result<()> {
    match &part.body {
        Body::Zero => {
            buf.fill(0);
            Ok(())
        }
        _ if part.access == Access::None => Err(no_access(index)),
        Body::Flat { storage, at, .. } => storage.read_at(at.plus(local)?, buf),
        Body::Sparse(sparse) => sparse.read_at(local, buf),
    }
}

pub(super) fn no_access(index: usize) -> Error {
    let text = format!("extent {index} is marked NOACCESS: nobody may read or write it");
    Error::new(ErrorKind::Denied, text).format(Format::Vmdk)
}
