//! A raw disk whose format was guessed: its first sector cannot be turned into the header of another format.
//!
//! Otherwise a guest could write such a header, and the next probe would follow the files it names.

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    Chain, Encoder, Error, ErrorKind, Extent, Facts, FileIndex, Format, GuestOffset, HostSpan, Layer,
    LayerMut, Reserve, Result, SECTOR, Sample, Storage, Stored, ZeroHow,
};

use super::OpenError;

/// A layer that stays raw.
#[derive(Debug)]
pub(super) struct Guarded {
    inner: Arc<dyn LayerMut>,
}

impl Guarded {
    pub(super) fn new(inner: Arc<dyn LayerMut>) -> Self {
        Self { inner }
    }

    /// Fails if `buf` at `at` would make the first sector another format's.
    fn check(&self, at: GuestOffset, buf: &[u8]) -> Result<()> {
        if at.get() >= SECTOR || buf.is_empty() {
            return Ok(());
        }
        let mut sector = [0; SECTOR as usize];
        let have = usize::try_from(self.inner.virtual_size())
            .unwrap_or(usize::MAX)
            .min(sector.len());
        if let Some(have) = sector.get_mut(..have) {
            self.inner.read_at(GuestOffset::ZERO, have)?;
        }
        let from = usize::try_from(at.get()).unwrap_or(usize::MAX);
        for (old, new) in sector.iter_mut().skip(from).zip(buf) {
            *old = *new;
        }
        let probed = diskmill_formats::probe(&Sample {
            head: &sector,
            tail: &[],
            len: self.inner.virtual_size(),
            name: None,
        });
        match probed.driver.format() {
            Format::Raw => Ok(()),
            other => Err(Error::new(ErrorKind::Denied, OpenError::WouldChangeFormat(other)).guest(at)),
        }
    }
}

impl Layer for Guarded {
    fn facts(&self) -> &Facts {
        self.inner.facts()
    }

    fn virtual_size(&self) -> u64 {
        self.inner.virtual_size()
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        self.inner.map(at, max)
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        self.inner.read_at(at, buf)
    }

    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>> {
        self.inner.file(index)
    }

    fn content_id(&self) -> Option<u32> {
        self.inner.content_id()
    }

    fn is_hollow(&self) -> Result<bool> {
        self.inner.is_hollow()
    }

    fn kept(&self, at: GuestOffset, max: u64) -> Result<(Option<HostSpan>, u64)> {
        self.inner.kept(at, max)
    }
}

impl LayerMut for Guarded {
    fn write_at(&self, at: GuestOffset, buf: &[u8], below: &Chain) -> Result<()> {
        self.check(at, buf)?;
        self.inner.write_at(at, buf, below)
    }

    fn write_encoded(&self, at: GuestOffset, unit: Stored<'_>, below: &Chain) -> Result<()> {
        if let Stored::Plain(bytes) = unit {
            self.check(at, bytes)?;
        }
        self.inner.write_encoded(at, unit, below)
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        self.inner.encoder()
    }

    fn zero(&self, range: Range<GuestOffset>, how: ZeroHow, below: &Chain) -> Result<()> {
        self.inner.zero(range, how, below)
    }

    fn discard(&self, range: Range<GuestOffset>) -> Result<()> {
        self.inner.discard(range)
    }

    fn clear(&self) -> Result<()> {
        self.inner.clear()
    }

    fn resize(&self, size: u64, below: &Chain) -> Result<()> {
        self.inner.resize(size, below)
    }

    fn reserve(&self, range: Range<GuestOffset>, how: Reserve) -> Result<()> {
        self.inner.reserve(range, how)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }
}
