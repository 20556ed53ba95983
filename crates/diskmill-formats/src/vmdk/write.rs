//! A disk open for changing in place.
//!
//! Order of what reaches the files: first, once, a new content id, so that overlays notice; then data; then tables, see
//! [`tables`](super::tables). A grain that is written for the first time in part is filled from below.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use diskmill_core::{
    BackingName, Chain, Error, ErrorKind, Extent, Facts, FileIndex, FilesMut, Format, GuestOffset,
    HostOffset, HostSpan, Layer, LayerMut, OpenSpec, Result, SECTOR, State, Storage, StorageMut, Stored,
    ZeroHow,
};

use super::descriptor::{Access, Descriptor, NO_PARENT, is_writable, with_key};
use super::header::{Cowd, Header};
use super::layer::{Body, Part, head, no_access, open_parts};
use super::layout::MOST_TEXT;
use super::map::{Kind, scan, sector};
use super::options::{content_id, mix};
use super::sparse::{Dialect, Sparse, read_directory};
use super::tables::{Tables, front};
use super::{Shape, TextPlace, VmdkImage, facts, unsupported};

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

/// The descriptor.
#[derive(Debug)]
pub(super) struct Text {
    pub(super) descriptor: Descriptor,
    pub(super) place: TextPlace,
    /// The content id the backing image is to have from the next change of its name on.
    expected: Option<Option<u32>>,
}

/// A disk open for changing in place.
#[derive(Debug)]
pub(super) struct Image {
    facts: Facts,
    readable: Vec<Arc<dyn Storage>>,
    pub(super) main: Arc<dyn StorageMut>,
    /// Held by all that read or write, and by nobody else while tables are written back.
    parts: RwLock<Vec<PartMut>>,
    text: Mutex<Text>,
    touched: AtomicBool,
    fresh: Option<u32>,
    unmap: bool,
    /// Whether the descriptor is in the file it is about.
    embedded: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens a disk for changing it.
pub(super) fn attach(image: VmdkImage, files: FilesMut, how: &OpenSpec) -> Result<Image> {
    super::refuse_snapshot(how)?;
    let files: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
    let readable: Vec<Arc<dyn Storage>> = files
        .iter()
        .map(|file| file.clone() as Arc<dyn Storage>)
        .collect();
    let main = files
        .first()
        .cloned()
        .ok_or_else(|| Error::new(ErrorKind::Usage, "an image needs a file"))?;
    let parts = open_parts(&image, &readable)?;
    let facts = facts::of_parts(&image, &parts);
    if image.descriptor.tracked {
        return Err(unsupported(
            "writing to a disk whose changes VMware tracks in a further file: it would miss them",
        ));
    }
    let parts = parts
        .into_iter()
        .map(|part| to_mut(part, &files))
        .collect::<Result<Vec<_>>>()?;
    Ok(Image {
        embedded: matches!(image.shape, Shape::Embedded { .. }),
        facts,
        readable,
        main,
        parts: RwLock::new(parts),
        text: Mutex::new(Text {
            descriptor: image.descriptor,
            place: image.text,
            expected: None,
        }),
        touched: AtomicBool::new(false),
        fresh: how.content_id,
        unmap: how.unmap,
    })
}

fn to_mut(part: Part, files: &[Arc<dyn StorageMut>]) -> Result<PartMut> {
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

fn tables(sparse: Sparse, header: Option<&Header>, storage: Arc<dyn StorageMut>) -> Result<Tables> {
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
struct Piece<'a> {
    index: usize,
    part: &'a PartMut,
    /// The first byte, from the start of the part.
    local: u64,
    len: u64,
}

fn pieces<'a>(parts: &'a [PartMut], range: &Range<GuestOffset>) -> Result<Vec<Piece<'a>>> {
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

fn to_usize(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

impl Image {
    pub(super) fn shared(&self) -> RwLockReadGuard<'_, Vec<PartMut>> {
        self.parts.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn alone(&self) -> RwLockWriteGuard<'_, Vec<PartMut>> {
        self.parts.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn text(&self) -> MutexGuard<'_, Text> {
        lock(&self.text)
    }

    /// Whether the descriptor is in the file it is about.
    pub(super) fn is_embedded(&self) -> bool {
        self.embedded
    }

    /// Before the first change: the image must be sound, and its content is another one from now on.
    pub(super) fn touch(&self, parts: &[PartMut]) -> Result<()> {
        if self.touched.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut text = self.text();
        if self.touched.load(Ordering::Acquire) {
            return Ok(());
        }
        for part in parts {
            if let BodyMut::Sparse { tables, .. } = &part.body {
                lock(tables).demand_sound()?;
            }
        }
        let old = text.descriptor.cid;
        let derived = u32::try_from(mix(u64::from(old).wrapping_add(1)) >> 32).unwrap_or(1);
        let mut new = content_id(self.fresh.unwrap_or(derived));
        if new == old {
            new = content_id(new ^ 1);
        }
        let changed = with_key(
            &text.descriptor.text,
            "CID",
            Some(&format!("{new:08x}")),
            "version",
        );
        self.write_text(&mut text, changed)?;
        text.descriptor.cid = new;
        self.touched.store(true, Ordering::Release);
        Ok(())
    }

    /// Puts `new` in place of the descriptor and makes it durable. Only what differs is written.
    pub(super) fn write_text(&self, text: &mut Text, new: Vec<u8>) -> Result<()> {
        let room = text.place.room.unwrap_or(MOST_TEXT);
        if new.len() as u64 > room {
            let text = format!(
                "the descriptor would have {} bytes, there is room for {room}",
                new.len()
            );
            return Err(Error::new(ErrorKind::NoSpace, text).format(Format::Vmdk));
        }
        let old = &text.descriptor.text;
        let mut bytes = new.clone();
        bytes.resize(new.len().max(old.len()), 0);
        let differs =
            |index: &usize| old.get(*index).copied().unwrap_or(0) != bytes.get(*index).copied().unwrap_or(0);
        let first = (0..bytes.len()).find(differs);
        let last = (0..bytes.len()).rev().find(differs);
        if let (Some(first), Some(last)) = (first, last) {
            let part = bytes.get(first..=last).unwrap_or_default();
            self.main.write_at(text.place.at.plus(first as u64)?, part)?;
            if text.place.room.is_none() && new.len() < old.len() {
                self.main.set_len(new.len() as u64)?;
            }
            self.main.sync()?;
        }
        text.descriptor.text = new;
        Ok(())
    }

    fn write_sparse(
        &self,
        piece: &Piece<'_>,
        tables: &Mutex<Tables>,
        buf: &[u8],
        below: &Chain,
    ) -> Result<()> {
        let mut at = piece.local;
        let mut rest = buf;
        while !rest.is_empty() {
            let len = write_grains(piece.part, tables, at, rest, below)?;
            rest = rest.get(len..).unwrap_or_default();
            at = at.saturating_add(len as u64);
        }
        Ok(())
    }

    /// Writes tables back if many have changed.
    fn relieve(&self) -> Result<()> {
        let full = self.shared().iter().any(|part| match &part.body {
            BodyMut::Sparse { tables, .. } => lock(tables).is_full(),
            _ => false,
        });
        if full { self.flush() } else { Ok(()) }
    }
}

/// Bytes of the grains of a part that there are: the last may end with the disk.
fn grain_len(part: &PartMut, tables: &Tables, start: u64) -> u64 {
    tables.geometry.grain.min(part.len.saturating_sub(start))
}

/// Writes some of `buf` at `at`, both within a part: as much as can be done at once. Says how much.
fn write_grains(part: &PartMut, tables: &Mutex<Tables>, at: u64, buf: &[u8], below: &Chain) -> Result<usize> {
    let mut held = lock(tables);
    let grain = held.geometry.grain;
    let into = at & grain.saturating_sub(1);
    let start = at.saturating_sub(into);
    let whole = grain_len(part, &held, start);
    let (_, kind) = held.kind(start)?;
    if let Kind::Data(host) = kind {
        // As far as the grains follow one another.
        let mut len = grain.saturating_sub(into);
        while len < buf.len() as u64 && at.saturating_add(len) < part.len {
            match held.kind(at.saturating_add(len))? {
                (_, Kind::Data(next))
                    if host.get().checked_add(into.saturating_add(len)) == Some(next.get()) =>
                {
                    len = len.saturating_add(grain);
                }
                _ => break,
            }
        }
        let storage = Arc::clone(&held.storage);
        drop(held);
        let now = buf.get(..to_usize(len).min(buf.len())).unwrap_or_default();
        storage.write_at(host.plus(into)?, now)?;
        return Ok(now.len());
    }
    if into == 0 && buf.len() as u64 >= whole {
        return write_new(part, tables, held, at, buf);
    }
    // In part: the rest comes from below. The lock is held, so that two who write one grain do not both make it.
    let mut bytes = vec![0; to_usize(grain)];
    if kind == Kind::Absent {
        let from = bytes.get_mut(..to_usize(whole)).unwrap_or_default();
        below.read_at(GuestOffset::new(part.start.saturating_add(start)), from)?;
    }
    let len = to_usize(whole.saturating_sub(into)).min(buf.len());
    let first = to_usize(into);
    if let (Some(to), Some(from)) = (bytes.get_mut(first..first.saturating_add(len)), buf.get(..len)) {
        to.copy_from_slice(from);
    }
    let number = held.take(1)?;
    held.storage.write_at(sector(number.into()), &bytes)?;
    held.set(start, number)?;
    Ok(len)
}

/// Gives the whole grains at the start of `buf` that have no place one, and writes them.
fn write_new(
    part: &PartMut,
    tables: &Mutex<Tables>,
    mut held: MutexGuard<'_, Tables>,
    at: u64,
    buf: &[u8],
) -> Result<usize> {
    let grain = held.geometry.grain;
    let mut count = 0_u64;
    let mut len = 0_u64;
    let mut old = Vec::new();
    while len < buf.len() as u64 {
        let next = at.saturating_add(len);
        let whole = grain_len(part, &held, next);
        if whole == 0 || (buf.len() as u64).saturating_sub(len) < whole {
            break;
        }
        match held.kind(next)? {
            (_, Kind::Data(_)) => break,
            (entry, _) => old.push(entry),
        }
        count = count.saturating_add(1);
        len = len.saturating_add(whole);
    }
    let first = held.take(count)?;
    let step = u32::try_from(grain / SECTOR).unwrap_or(u32::MAX);
    let mut number = first;
    for index in 0..count {
        held.set(at.saturating_add(index.saturating_mul(grain)), number)?;
        number = number.saturating_add(step);
    }
    let storage = Arc::clone(&held.storage);
    drop(held);
    let now = buf.get(..to_usize(len)).unwrap_or_default();
    let host = sector(first.into());
    let mut done = storage.write_at(host, now);
    let stored = count.saturating_mul(grain);
    if done.is_ok() && len < stored {
        // The last grain of the disk is stored whole.
        done = storage.zero(host.plus(len)?..host.plus(stored)?, ZeroHow::KeepAllocated);
    }
    if let Err(error) = done {
        let mut held = lock(tables);
        for (index, entry) in (0..count).zip(old) {
            held.set(at.saturating_add(index.saturating_mul(grain)), entry)?;
        }
        return Err(error);
    }
    Ok(now.len())
}

/// Whether the chain reads as zeros in all of `range`, by its map.
fn reads_zero(below: &Chain, range: Range<u64>) -> Result<bool> {
    let mut at = range.start;
    while at < range.end.min(below.virtual_size()) {
        let run = below.map(GuestOffset::new(at), range.end.saturating_sub(at))?;
        match run.state {
            State::Zero { .. } | State::Absent => at = at.saturating_add(run.len),
            _ => return Ok(false),
        }
    }
    Ok(true)
}

/// Makes some bytes from `at` zeros, up to `end`, both within a part: at most a grain. Says how many.
fn zero_grain(
    part: &PartMut,
    tables: &Mutex<Tables>,
    at: u64,
    end: u64,
    how: ZeroHow,
    below: &Chain,
) -> Result<u64> {
    let mut held = lock(tables);
    let into = at & held.geometry.grain.saturating_sub(1);
    let start = at.saturating_sub(into);
    let whole = grain_len(part, &held, start);
    let len = whole.saturating_sub(into).min(end.saturating_sub(at));
    match held.kind(start)?.1 {
        Kind::Data(host) => {
            let storage = Arc::clone(&held.storage);
            drop(held);
            let host = host.plus(into)?;
            storage.zero(host..host.plus(len)?, how)?;
        }
        Kind::Zero => {}
        _ => {
            let guest = part.start.saturating_add(start);
            if reads_zero(below, guest..guest.saturating_add(whole))? {
                return Ok(len);
            }
            if len < whole {
                drop(held);
                write_grains(part, tables, at, &vec![0; to_usize(len)], below)?;
            } else if held.marks_zeros() {
                held.set(start, 1)?;
            } else {
                let number = held.take(1)?;
                let (host, grain) = (sector(number.into()), held.geometry.grain);
                held.storage
                    .zero(host..host.plus(grain)?, ZeroHow::KeepAllocated)?;
                held.set(start, number)?;
            }
        }
    }
    Ok(len)
}

/// Makes bytes of a part zeros.
fn zero_sparse(
    part: &PartMut,
    tables: &Mutex<Tables>,
    range: Range<u64>,
    how: ZeroHow,
    below: &Chain,
) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let (kind, len) = look(tables, at, range.end.saturating_sub(at))?;
        let guest = part.start.saturating_add(at);
        let nothing = match kind {
            Kind::Zero => true,
            Kind::Absent => reads_zero(below, guest..guest.saturating_add(len))?,
            _ => false,
        };
        at = at.saturating_add(match nothing {
            true => len,
            false => zero_grain(part, tables, at, range.end, how, below)?,
        });
    }
    Ok(())
}

/// Makes all of a part from `at` on zeros, for whoever has the image alone.
pub(super) fn zero_from(part: &PartMut, at: u64, below: &Chain) -> Result<()> {
    let BodyMut::Sparse { tables, .. } = &part.body else {
        return Ok(());
    };
    let step = lock(tables).geometry.table_covers().saturating_mul(64).max(1);
    let mut at = at;
    while at < part.len {
        let end = at.saturating_add(step).min(part.len);
        zero_sparse(part, tables, at..end, ZeroHow::MayUnmap, below)?;
        lock(tables).write_back()?;
        at = end;
    }
    Ok(())
}

impl Layer for Image {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn virtual_size(&self) -> u64 {
        self.shared()
            .last()
            .map_or(0, |part| part.start.saturating_add(part.len))
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let parts = self.shared();
        let end = at.saturating_add(1);
        let found = pieces(&parts, &(at..end))?;
        let Some(piece) = found.first().filter(|_| max > 0) else {
            return Err(Error::new(ErrorKind::Usage, "0 bytes have no state"));
        };
        let max = max.min(piece.part.len.saturating_sub(piece.local));
        match &piece.part.body {
            BodyMut::Zero => Ok(Extent {
                len: max,
                state: State::Zero { reserved: None },
            }),
            BodyMut::Flat { file, at, .. } => Ok(Extent {
                len: max,
                state: State::Data(HostSpan {
                    file: *file,
                    at: at.plus(piece.local)?,
                    len: max,
                }),
            }),
            BodyMut::Sparse { file, tables } => {
                let (kind, len) = look(tables, piece.local, max).map_err(|error| error.guest(at))?;
                let file = *file;
                let state = match kind {
                    Kind::Absent => State::Absent,
                    Kind::Zero => State::Zero { reserved: None },
                    Kind::Data(at) | Kind::Packed(at) => State::Data(HostSpan { file, at, len }),
                };
                Ok(Extent { len, state })
            }
        }
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let parts = self.shared();
        let range = at..at.plus(buf.len() as u64)?;
        let mut rest = buf;
        for piece in pieces(&parts, &range)? {
            let (now, later) = rest.split_at_mut(to_usize(piece.len).min(rest.len()));
            read_piece(&piece, now).map_err(|error| error.guest(at))?;
            rest = later;
        }
        Ok(())
    }

    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>> {
        self.readable.get(usize::from(index.0))
    }

    fn content_id(&self) -> Option<u32> {
        Some(self.text().descriptor.cid)
    }
}

fn look(tables: &Mutex<Tables>, at: u64, max: u64) -> Result<(Kind, u64)> {
    let mut held = lock(tables);
    let (geometry, dialect) = (held.geometry, held.dialect);
    let kind = |entry: &[u8]| dialect.kind(entry);
    scan(&geometry, at, max, &mut |index| held.bytes(index), &kind)
}

fn read_piece(piece: &Piece<'_>, buf: &mut [u8]) -> Result<()> {
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

fn demand_writable(piece: &Piece<'_>) -> Result<()> {
    let index = piece.index;
    let text = match piece.part.access {
        Access::ReadWrite => return Ok(()),
        Access::None => return Err(no_access(index)),
        Access::ReadOnly => format!("extent {index} is marked RDONLY: it may only be read"),
    };
    Err(Error::new(ErrorKind::Denied, text).format(Format::Vmdk))
}

impl LayerMut for Image {
    fn write_at(&self, at: GuestOffset, buf: &[u8], below: &Chain) -> Result<()> {
        let parts = self.shared();
        let found = pieces(&parts, &(at..at.plus(buf.len() as u64)?))?;
        for piece in &found {
            demand_writable(piece)?;
        }
        self.touch(&parts)?;
        let mut rest = buf;
        for piece in &found {
            let (now, later) = rest.split_at_checked(to_usize(piece.len)).unwrap_or((rest, &[]));
            let done = match &piece.part.body {
                BodyMut::Flat { storage, at, .. } => storage.write_at(at.plus(piece.local)?, now),
                BodyMut::Sparse { tables, .. } => self.write_sparse(piece, tables, now, below),
                BodyMut::Zero if now.iter().all(|byte| *byte == 0) => Ok(()),
                BodyMut::Zero => Err(unsupported(
                    "writing to a part of the disk that is kept nowhere (ZERO)",
                )),
            };
            done.map_err(|error| error.guest(at))?;
            rest = later;
        }
        drop(found);
        drop(parts);
        self.relieve()
    }

    fn write_encoded(&self, at: GuestOffset, unit: Stored<'_>, below: &Chain) -> Result<()> {
        match unit {
            Stored::Plain(bytes) => self.write_at(at, bytes, below),
            Stored::Packed(_) => Err(unsupported("writing compressed grains to an image that exists")),
        }
    }

    fn zero(&self, range: Range<GuestOffset>, how: ZeroHow, below: &Chain) -> Result<()> {
        let parts = self.shared();
        let found = pieces(&parts, &range)?;
        for piece in &found {
            demand_writable(piece)?;
        }
        self.touch(&parts)?;
        for piece in &found {
            match &piece.part.body {
                BodyMut::Flat { storage, at, .. } => {
                    let host = at.plus(piece.local)?;
                    storage.zero(host..host.plus(piece.len)?, how)?;
                }
                BodyMut::Sparse { tables, .. } => {
                    let end = piece.local.saturating_add(piece.len);
                    zero_sparse(piece.part, tables, piece.local..end, how, below)?;
                }
                BodyMut::Zero => {}
            }
        }
        drop(found);
        drop(parts);
        self.relieve()
    }

    fn discard(&self, range: Range<GuestOffset>) -> Result<()> {
        let parts = self.shared();
        let found = pieces(&parts, &range)?;
        if !self.unmap || self.text().descriptor.parent.is_some() {
            return Ok(());
        }
        self.touch(&parts)?;
        for piece in found
            .iter()
            .filter(|piece| piece.part.access == Access::ReadWrite)
        {
            match &piece.part.body {
                BodyMut::Flat { storage, at, .. } => {
                    let host = at.plus(piece.local)?;
                    storage.discard(host..host.plus(piece.len)?)?;
                }
                BodyMut::Sparse { tables, .. } => {
                    let end = piece.local.saturating_add(piece.len);
                    let mut at = piece.local;
                    while at < end {
                        let (kind, len) = look(tables, at, end.saturating_sub(at))?;
                        if let Kind::Data(host) = kind {
                            let storage = Arc::clone(&lock(tables).storage);
                            storage.zero(host..host.plus(len)?, ZeroHow::MayUnmap)?;
                        }
                        at = at.saturating_add(len);
                    }
                }
                BodyMut::Zero => {}
            }
        }
        Ok(())
    }

    fn clear(&self) -> Result<()> {
        let parts = self.alone();
        if parts
            .iter()
            .any(|part| !matches!(part.body, BodyMut::Sparse { .. }))
        {
            return Err(unsupported("a disk with flat extents cannot be emptied"));
        }
        for part in parts.iter() {
            if let BodyMut::Sparse { tables, .. } = &part.body {
                super::resize::clear(&mut lock(tables))?;
            }
        }
        Ok(())
    }

    fn resize(&self, size: u64, below: &Chain) -> Result<()> {
        super::resize::resize(self, size, below)
    }

    fn set_backing(&self, backing: Option<&BackingName>) -> Result<()> {
        let parts = self.alone();
        let flat = parts.iter().any(|part| matches!(part.body, BodyMut::Flat { .. }));
        let usage = |text: &str| Err(Error::new(ErrorKind::Usage, text).format(Format::Vmdk));
        if let Some(backing) = backing {
            if flat {
                return usage("a flat image cannot have a backing file");
            }
            if !is_writable(&backing.name) {
                return usage("the name of the backing file cannot be written into a descriptor");
            }
            if backing
                .format
                .as_deref()
                .is_some_and(|format| format != Format::Vmdk.name())
            {
                return usage("the backing file of a vmdk image must be vmdk");
            }
        }
        // What was written before is to be there when the new name is.
        for part in parts.iter() {
            write_back(part)?;
        }
        let mut text = self.text();
        let cid = match (backing, text.expected.take()) {
            (None, _) => NO_PARENT,
            (Some(_), Some(expected)) => expected.unwrap_or(NO_PARENT),
            (Some(_), None) => text.descriptor.parent_cid,
        };
        let hint = backing.map(|backing| format!("\"{}\"", backing.name));
        let new = with_key(
            &text.descriptor.text,
            "parentCID",
            Some(&format!("{cid:08x}")),
            "CID",
        );
        let new = with_key(&new, "parentFileNameHint", hint.as_deref(), "createType");
        self.write_text(&mut text, new)?;
        text.descriptor.parent_cid = cid;
        text.descriptor.parent = backing.map(|backing| backing.name.clone());
        Ok(())
    }

    fn expect_backing(&self, content_id: Option<u32>) {
        self.text().expected = Some(content_id);
    }

    fn renew_content_id(&self) -> Result<()> {
        let parts = self.shared();
        self.touch(&parts)
    }

    fn flush(&self) -> Result<()> {
        let parts = self.alone();
        for part in parts.iter() {
            write_back(part)?;
        }
        Ok(())
    }
}

fn write_back(part: &PartMut) -> Result<()> {
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
