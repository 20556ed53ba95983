//! Reading an image.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskmill_core::{Extent, Facts, FileIndex, GuestOffset, Layer, Result, SECTOR, Storage};

use super::header::Header;
use super::map::{Bitmap, sectors};
use crate::bounds::within;

/// An image, open for reading.
#[derive(Debug)]
pub struct CowLayer {
    facts: Facts,
    size: u64,
    bitmap: Mutex<Bitmap>,
    file: Arc<dyn Storage>,
    file_len: u64,
}

impl CowLayer {
    pub(super) fn open(header: &Header, facts: Facts, file: Arc<dyn Storage>) -> Result<Self> {
        Ok(Self {
            size: header.virtual_size(),
            bitmap: Mutex::new(Bitmap::new(header.geometry())),
            file_len: file.len()?,
            facts,
            file,
        })
    }

    fn bitmap(&self) -> MutexGuard<'_, Bitmap> {
        // A page is there or it is not.
        self.bitmap.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Layer for CowLayer {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn virtual_size(&self) -> u64 {
        self.size
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        self.bitmap().extent(self.file.as_ref(), self.file_len, at, max)
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        within(at, buf.len() as u64, self.size)?;
        read(&self.bitmap, self.file.as_ref(), at, buf)
    }

    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>> {
        (index == FileIndex::MAIN).then_some(&self.file)
    }

    /// Zeros have no mark of their own: they are stored, often as holes.
    fn is_hollow(&self) -> Result<bool> {
        Ok(true)
    }
}

/// Fills `buf` from `at` with what the file has, zeros where it has nothing.
pub(super) fn read(
    bitmap: &Mutex<Bitmap>,
    file: &dyn Storage,
    at: GuestOffset,
    buf: &mut [u8],
) -> Result<()> {
    let (mut at, mut rest) = (at, buf);
    while !rest.is_empty() {
        let range = sectors(at, rest.len() as u64);
        let (stored, count, host) = {
            let mut bitmap = bitmap.lock().unwrap_or_else(PoisonError::into_inner);
            let (stored, count) = bitmap.run(file, range.start, range.end.saturating_sub(range.start))?;
            (stored, count, bitmap.geometry.host(at))
        };
        let end = range.start.saturating_add(count).saturating_mul(SECTOR);
        let len = usize::try_from(end.saturating_sub(at.get()))
            .unwrap_or(usize::MAX)
            .min(rest.len());
        let (now, later) = rest.split_at_mut(len);
        match stored {
            true => file.read_padded(host, now).map_err(|error| error.guest(at))?,
            false => now.fill(0),
        }
        at = at.plus(len as u64)?;
        rest = later;
    }
    Ok(())
}
