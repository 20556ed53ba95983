//! A disk open for changing in place.
//!
//! Order of what reaches the files: first, once, a new content id, so that overlays notice; then data; then tables, see
//! [`tables`](super::tables). A grain that is written for the first time in part is filled from below.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use diskmill_core::{
    BackingName, Chain, Error, ErrorKind, Extent, Facts, FileIndex, FilesMut, Format, GuestOffset, HostSpan,
    Layer, LayerMut, OpenSpec, Result, State, Storage, StorageMut, Stored, ZeroHow,
};

use super::descriptor::{Access, Descriptor, NO_PARENT, is_writable, with_key};
use super::grains::{write_grains, zero_sparse};
use super::layer::{in_common, open_parts};
use super::layout::MOST_TEXT;
use super::map::Kind;
use super::options::{content_id, mix};
use super::parts::{
    BodyMut, PartMut, Piece, demand_writable, lock, look, pieces, read_piece, to_mut, to_usize, write_back,
};
use super::tables::Tables;
use super::{Shape, TextPlace, VmdkImage, facts, unsupported};

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
    if let Some(text) = in_common(&parts) {
        return Err(Error::new(ErrorKind::Corrupt, text).format(Format::Vmdk));
    }
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
