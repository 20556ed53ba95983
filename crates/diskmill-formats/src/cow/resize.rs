//! Changing what the header says: the size of the disk, and the name of the backing file.

use std::sync::atomic::Ordering;

use diskmill_core::{BackingName, Chain, Error, ErrorKind, Format, HostOffset, Result, SECTOR, ZeroHow};

use super::create::{backing, whole_sectors};
use super::header::{Header, name_field};
use super::layout::{MTIME_AT, NAME_AT};
use super::map::{Geometry, fill};
use super::write::Image;

/// Why the header cannot be changed as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum ChangeError {
    #[error(
        "with {size} bytes the disk would start at {new:#x} in the file, not at {old:#x}: the image must be written anew"
    )]
    Moves { size: u64, old: u64, new: u64 },
    #[error(
        "the names of the old and the new backing file both have more than {IN_FIRST} bytes, so that one cannot take the \
         other's place at once"
    )]
    LongNames,
    #[error("the device has {have} bytes, the image needs {need}")]
    Full { have: u64, need: u64 },
}

impl From<ChangeError> for Error {
    fn from(error: ChangeError) -> Self {
        let kind = match error {
            ChangeError::Full { .. } => ErrorKind::NoSpace,
            _ => ErrorKind::Unsupported,
        };
        Error::new(kind, error).format(Format::Cow)
    }
}

/// Bytes of a name, without the NUL, that fit into the first sector of the file.
const IN_FIRST: usize = 503;

impl Image {
    /// The header of the disk with another size, which is rounded up to a sector.
    fn resized(&self, size: u64) -> Result<(Header, Geometry, Geometry)> {
        let mut header = self.header().clone();
        let old = header.geometry();
        header.size = whole_sectors(size)?;
        let new = header.geometry();
        Ok((header, old, new))
    }

    /// Whether sectors stay where they are if the disk gets this size.
    pub(super) fn keeps_places(&self, size: u64) -> bool {
        match self.resized(size) {
            Ok((_, old, new)) => old.data_at() == new.data_at(),
            // That the size cannot be is for whoever tries it to say.
            Err(_) => true,
        }
    }

    /// Gives the disk another size, rounded up to a sector. All sectors are held.
    ///
    /// Bits and data of new sectors are put in order, durably, before the size in the header shows them; what is behind a
    /// smaller disk goes after that.
    pub(super) fn resize_held(&self, size: u64, below: &Chain) -> Result<()> {
        let (header, old, new) = self.resized(size)?;
        if old.data_at() != new.data_at() {
            let (old, new) = (old.data_at(), new.data_at());
            return Err(ChangeError::Moves { size, old, new }.into());
        }
        self.settle_for_good()?;
        if new.size() > old.size() {
            self.prepare(old, new, below)?;
            self.file.sync()?;
        }
        if header.size != self.header().size {
            self.switch(header.layout.size_at(), &header.size.to_be_bytes())?;
        }
        self.bitmap().forget(new);
        *self.header() = header;
        self.size.store(new.size(), Ordering::Release);
        if new.size() < old.size() {
            self.cut(old, new)?;
        }
        Ok(())
    }

    /// Makes what becomes a part of the disk read as zeros: whatever is behind the old end of the file's data is dropped,
    /// and where the image below is longer than this one was, zeros hide what it has.
    fn prepare(&self, old: Geometry, new: Geometry, below: &Chain) -> Result<()> {
        let file = &self.file;
        let (start, end) = (HostOffset::new(old.end()), HostOffset::new(new.end()));
        let have = file.len()?;
        let fixed = file.hints().fixed_len;
        let hidden = below.virtual_size().min(new.size()) / SECTOR;
        let need = match hidden > old.sectors() {
            true => new.data_at().saturating_add(hidden.saturating_mul(SECTOR)),
            false => new.bitmap_end(),
        };
        if fixed && have < need {
            return Err(ChangeError::Full { have, need }.into());
        }
        if fixed {
            let end = end.min(HostOffset::new(have));
            if start < end {
                file.zero(start..end, ZeroHow::MayUnmap)?;
            }
        } else {
            if have > start.get() {
                file.set_len(start.get())?;
            }
            if file.len()? < need {
                file.set_len(need)?;
            }
        }
        // Less than a sector of bits changes its meaning, and the padding with it.
        let from = old.sectors() / 8;
        let at = HostOffset::new(old.bitmap_at()).plus(from)?;
        let room = new.data_at().saturating_sub(at.get());
        let mut bits = vec![0; usize::try_from(room).unwrap_or(0)];
        if let Some(first) = bits.get_mut(..1) {
            file.read_padded(at, first)?;
            for byte in first {
                *byte &= !(u8::MAX << (old.sectors() % 8));
            }
        }
        let base = from.saturating_mul(8);
        fill(
            &mut bits,
            old.sectors().saturating_sub(base)..hidden.max(old.sectors()).saturating_sub(base),
        );
        if bits.is_empty() {
            return Ok(());
        }
        let len = usize::try_from(new.bitmap_end().saturating_sub(at.get())).unwrap_or(0);
        let len = match file.len()? > new.bitmap_end() {
            true => bits.len(),
            // A file that has no data ends with its bitmap.
            false => len,
        };
        file.write_at(at, bits.get(..len).unwrap_or(&bits))
    }

    /// Drops what is behind the disk, which was longer.
    fn cut(&self, old: Geometry, new: Geometry) -> Result<()> {
        let file = &self.file;
        if file.hints().fixed_len {
            let end = old.end().min(file.len()?);
            if new.end() < end {
                file.zero(
                    HostOffset::new(new.end())..HostOffset::new(end),
                    ZeroHow::MayUnmap,
                )?;
            }
        } else if file.len()? > new.end() {
            file.set_len(new.end())?;
        }
        super::check::clear_stray(new, file.as_ref())?;
        file.sync()
    }

    /// Changes the name of the backing file. All sectors are held.
    ///
    /// The name lies in three sectors of the file, and whether its second part counts is said by the NUL that the first
    /// may have: so that part is written while nobody looks at it, and the first sector switches.
    pub(super) fn change_backing(&self, wanted: Option<&BackingName>) -> Result<()> {
        let name = backing(wanted)?;
        self.settle_for_good()?;
        let mut header = self.header().clone();
        let mut now = header.to_bytes();
        self.file.read_at(HostOffset::ZERO, &mut now)?;
        let field = name_field(name.as_deref());
        let (first, rest) = field
            .split_at_checked(IN_FIRST.saturating_add(1))
            .unwrap_or((&field, &[]));
        // With the time the backing file was changed, which is that of another file now.
        let rest = [rest, &[0; 4]].concat();
        let rest_at = usize::try_from(SECTOR).unwrap_or(usize::MAX);
        let old_rest = now
            .get(rest_at..rest_at.saturating_add(rest.len()))
            .unwrap_or_default();
        let old_first = now.get(8..rest_at).unwrap_or_default();
        let is_long = |name: Option<&[u8]>| name.is_some_and(|name| name.len() > IN_FIRST);
        let same_rest =
            old_rest.get(..rest.len().saturating_sub(4)) == rest.get(..rest.len().saturating_sub(4));
        match (is_long(header.backing.as_deref()), is_long(name.as_deref())) {
            (true, true) if !same_rest => return Err(ChangeError::LongNames.into()),
            (true, true) => self.switch(NAME_AT, first)?,
            (false, true) => {
                self.file.write_at(HostOffset::new(SECTOR), &rest)?;
                self.file.sync()?;
                self.switch(NAME_AT, first)?;
            }
            (_, false) => {
                if old_first != first {
                    self.switch(NAME_AT, first)?;
                }
                if old_rest != rest {
                    self.file.write_at(HostOffset::new(SECTOR), &rest)?;
                    self.file.sync()?;
                }
            }
        }
        header.backing = name;
        header.mtime = 0;
        self.backed.store(header.backing.is_some(), Ordering::Release);
        *self.header() = header;
        Ok(())
    }
}

const _: () = assert!(NAME_AT + IN_FIRST as u64 + 1 == SECTOR, "a NUL ends the sector");
const _: () = assert!(MTIME_AT == 2 * SECTOR + 8, "the time follows the name");
