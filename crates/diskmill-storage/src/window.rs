//! A part of another storage.
#![deny(clippy::missing_trait_methods)]

use std::io::{ErrorKind as IoErrorKind, IoSlice};
use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    Error, ErrorKind, Hints, HostOffset, HostRun, RawFile, Result, Storage, StorageMut, ZeroHow,
};

use crate::CannotGrow;

/// The bytes of another storage from some offset on: a fixed number of them, or all there are and will be.
#[derive(Debug)]
pub struct Window<S: ?Sized> {
    inner: Arc<S>,
    start: HostOffset,
    len: Option<u64>,
}

impl<S: Storage + ?Sized> Window<S> {
    /// The `len` bytes of `inner` from `start`, or all from there on, growing and shrinking with it, if `None`.
    ///
    /// An error of kind [`ErrorKind::Usage`] if `inner` does not have that many.
    pub fn new(inner: Arc<S>, start: HostOffset, len: Option<u64>) -> Result<Self> {
        let whole = inner.len()?;
        let end = start.get().checked_add(len.unwrap_or(0));
        match end.filter(|end| *end <= whole) {
            Some(_) => Ok(Self { inner, start, len }),
            None => {
                let len = len.unwrap_or(0);
                let text = format!("{len} bytes from offset {start} are not within {whole} bytes");
                Err(Error::new(ErrorKind::Usage, text))
            }
        }
    }

    /// Where `at` is in the inner storage, `len` bytes of which are about to be used.
    fn place(&self, at: HostOffset, len: u64, outside: IoErrorKind) -> Result<HostOffset> {
        let end = at.plus(len)?;
        if self.len.is_some_and(|own| end.get() > own) {
            return Err(Error::from(std::io::Error::from(outside)).host(at));
        }
        let from = self.start.plus(at.get())?;
        from.plus(len)?;
        Ok(from)
    }

    fn place_range(&self, range: &Range<HostOffset>) -> Result<Range<HostOffset>> {
        let from = self.place(
            range.start,
            range.end.since(range.start),
            IoErrorKind::StorageFull,
        )?;
        Ok(from..from.plus(range.end.since(range.start))?)
    }
}

impl<S: Storage + ?Sized> Storage for Window<S> {
    fn len(&self) -> Result<u64> {
        match self.len {
            Some(len) => Ok(len),
            None => Ok(self.inner.len()?.saturating_sub(self.start.get())),
        }
    }

    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    fn hints(&self) -> Hints {
        let mut hints = self.inner.hints();
        if !self.start.is_aligned(u64::from(hints.align)) {
            // No request can be aligned in both; the inner storage takes the detour.
            hints.align = 1;
        }
        hints.fixed_len |= self.len.is_some();
        hints
    }

    fn read_at(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        let from = self.place(at, buf.len() as u64, IoErrorKind::UnexpectedEof)?;
        self.inner.read_at(from, buf)
    }

    fn run_at(&self, at: HostOffset) -> Result<HostRun> {
        let endless = HostRun::Hole((u64::MAX - at.get()).max(1));
        if at.get() >= self.len()? {
            return Ok(endless);
        }
        let room = self.len.map_or(u64::MAX, |len| len.saturating_sub(at.get()));
        Ok(
            match self
                .inner
                .run_at(self.place(at, 0, IoErrorKind::UnexpectedEof)?)?
            {
                HostRun::Data(len) => HostRun::Data(len.min(room)),
                HostRun::Hole(len) => HostRun::Hole(len.min(room)),
                other => other,
            },
        )
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn raw_file(&self) -> Option<RawFile<'_>> {
        let inner = self.inner.raw_file()?;
        let start = self.start.get();
        Some(RawFile {
            fd: inner.fd,
            base: inner.base.checked_add(start)?,
            len: inner.len.checked_sub(start)?.min(self.len.unwrap_or(u64::MAX)),
        })
    }

    fn read_padded(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        let room = self.len.map_or(u64::MAX, |len| len.saturating_sub(at.get()));
        let own = usize::try_from(room).unwrap_or(usize::MAX).min(buf.len());
        let (inside, outside) = buf.split_at_mut(own);
        outside.fill(0);
        if inside.is_empty() {
            return Ok(());
        }
        self.inner.read_padded(self.start.plus(at.get())?, inside)
    }
}

impl<S: StorageMut + ?Sized> StorageMut for Window<S> {
    fn write_at(&self, at: HostOffset, buf: &[u8]) -> Result<()> {
        let from = self.place(at, buf.len() as u64, IoErrorKind::StorageFull)?;
        self.inner.write_at(from, buf)
    }

    fn write_vectored_at(&self, at: HostOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        let len = bufs.iter().map(|buf| buf.len() as u64).sum();
        let from = self.place(at, len, IoErrorKind::StorageFull)?;
        self.inner.write_vectored_at(from, bufs)
    }

    fn zero(&self, range: Range<HostOffset>, how: ZeroHow) -> Result<()> {
        self.inner.zero(self.place_range(&range)?, how)
    }

    fn discard(&self, range: Range<HostOffset>) -> Result<()> {
        let end = HostOffset::new(range.end.get().min(self.len()?));
        if range.start >= end {
            return Ok(());
        }
        self.inner.discard(self.place_range(&(range.start..end))?)
    }

    fn allocate(&self, range: Range<HostOffset>) -> Result<()> {
        self.inner.allocate(self.place_range(&range)?)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        match self.len {
            None => self.inner.set_len(self.start.plus(len)?.get()),
            Some(own) if len <= own => Ok(()),
            Some(own) => Err(CannotGrow::error(own, len)),
        }
    }

    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }
}
