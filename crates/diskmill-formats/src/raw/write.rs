//! A raw image open for changing in place.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use diskmill_core::{
    Chain, Error, ErrorKind, Extent, Facts, FileIndex, Format, GuestOffset, HostOffset, Layer, LayerMut,
    Reserve, Result, SECTOR, Storage, StorageMut, Stored, ZeroHow,
};

use super::layer::{View, map};
use crate::preallocation::zeros;

/// Why a raw image cannot be changed as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum WriteError {
    #[error("{len} bytes at {at:#x} are not within the disk of {size} bytes")]
    OutOfBounds { at: u64, len: u64, size: u64 },
    #[error("a raw image cannot hold compressed data")]
    Packed,
    #[error("a raw image cannot be emptied: it has no backing image")]
    Empty,
    #[error("a raw image has no tables to fill in ahead of data")]
    NoTables,
    #[error("the size of a raw image cannot be changed where the option 'size' fixes it")]
    Fixed,
    #[error("size is {size}, must be {own}: a device keeps its size")]
    Device { size: u64, own: u64 },
    #[error("size is {0}, must leave the file below 2^63 bytes")]
    TooLarge(u64),
}

impl From<WriteError> for Error {
    fn from(error: WriteError) -> Self {
        let kind = match error {
            WriteError::OutOfBounds { .. } => ErrorKind::Usage,
            _ => ErrorKind::Unsupported,
        };
        Error::new(kind, error).format(Format::Raw)
    }
}

/// A raw image open for changing in place.
#[derive(Debug)]
pub(super) struct RawLayerMut {
    view: View,
    facts: Facts,
    size: AtomicU64,
    unmap: bool,
    file: Arc<dyn StorageMut>,
    readable: Arc<dyn Storage>,
}

impl RawLayerMut {
    pub(super) fn new(view: View, facts: Facts, file: Arc<dyn StorageMut>, unmap: bool) -> Self {
        Self {
            view,
            facts,
            size: AtomicU64::new(view.size()),
            unmap,
            readable: Arc::clone(&file) as Arc<dyn Storage>,
            file,
        }
    }

    /// The bytes of the file that hold `len` bytes of the disk from `at` on.
    fn host(&self, at: GuestOffset, len: u64) -> Result<Range<HostOffset>> {
        let size = self.virtual_size();
        match at.get().checked_add(len) {
            Some(end) if end <= size => {
                let start = self.view.host(at)?;
                Ok(start..start.plus(len)?)
            }
            _ => Err(WriteError::OutOfBounds {
                at: at.get(),
                len,
                size,
            }
            .into()),
        }
    }
}

impl Layer for RawLayerMut {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        map(self.view, self.virtual_size(), at, max)
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let host = self.host(at, buf.len() as u64)?;
        // The last sector may be there only in part.
        self.file
            .read_padded(host.start, buf)
            .map_err(|error| error.guest(at))
    }

    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>> {
        (index == FileIndex::MAIN).then_some(&self.readable)
    }
}

impl LayerMut for RawLayerMut {
    fn write_at(&self, at: GuestOffset, buf: &[u8], _below: &Chain) -> Result<()> {
        let host = self.host(at, buf.len() as u64)?;
        self.file
            .write_at(host.start, buf)
            .map_err(|error| error.guest(at))
    }

    fn write_encoded(&self, at: GuestOffset, unit: Stored<'_>, below: &Chain) -> Result<()> {
        match unit {
            Stored::Plain(bytes) => self.write_at(at, bytes, below),
            Stored::Packed(_) => Err(WriteError::Packed.into()),
        }
    }

    fn zero(&self, range: Range<GuestOffset>, how: ZeroHow, _below: &Chain) -> Result<()> {
        let host = self.host(range.start, range.end.since(range.start))?;
        if host.is_empty() {
            return Ok(());
        }
        self.file
            .zero(host, how)
            .map_err(|error| error.guest(range.start))
    }

    fn discard(&self, range: Range<GuestOffset>) -> Result<()> {
        let host = self.host(range.start, range.end.since(range.start))?;
        let end = host.end.min(HostOffset::new(self.file.len()?));
        if !self.unmap || host.start >= end {
            return Ok(());
        }
        self.file
            .discard(host.start..end)
            .map_err(|error| error.guest(range.start))
    }

    fn clear(&self) -> Result<()> {
        Err(WriteError::Empty.into())
    }

    /// The file gets exactly `size` bytes behind its offset; the disk is rounded up to a sector.
    fn resize(&self, size: u64, _below: &Chain) -> Result<()> {
        if self.view.is_fixed() {
            return Err(WriteError::Fixed.into());
        }
        let end = self
            .view
            .offset()
            .checked_add(size)
            .filter(|end| *end <= i64::MAX as u64 - SECTOR)
            .ok_or(WriteError::TooLarge(size))?;
        if self.file.hints().fixed_len {
            let own = self.file.len()?.saturating_sub(self.view.offset());
            return if size == own {
                Ok(())
            } else {
                Err(WriteError::Device { size, own }.into())
            };
        }
        self.file.set_len(end)?;
        self.size.store(size.next_multiple_of(SECTOR), Ordering::Release);
        Ok(())
    }

    fn reserve(&self, range: Range<GuestOffset>, how: Reserve) -> Result<()> {
        let host = self.host(range.start, range.end.since(range.start))?;
        match how {
            Reserve::Place => Err(WriteError::NoTables.into()),
            Reserve::Space => self.file.zero(host, ZeroHow::KeepAllocated),
            Reserve::Zeros => {
                let mut at = host.start;
                while at < host.end {
                    let piece = zeros(host.end.since(at));
                    self.file.write_at(at, piece)?;
                    at = at.plus(piece.len() as u64)?;
                }
                Ok(())
            }
        }
    }

    fn flush(&self) -> Result<()> {
        self.file.sync()
    }
}

#[cfg(test)]
mod tests;
