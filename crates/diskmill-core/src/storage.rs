//! Host bytes: the bottom of every stack.

use std::fmt::Debug;
use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::{HostOffset, Result};

/// What suits a storage. Callers should follow; only `align` is a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Hints {
    /// Requests at multiples of this are served without a detour, in bytes. 1 for buffered files.
    pub align: u32,
    /// A good size for one request, in bytes.
    pub request: u32,
    /// How many requests at once are worth having.
    pub parallel: u16,
    /// Writes must come in rising order without gaps (a pipe).
    pub append_only: bool,
    /// A fixed length: [`StorageMut::set_len`] cannot grow it (a block device).
    pub fixed_len: bool,
}

impl Default for Hints {
    fn default() -> Self {
        Self {
            align: 1,
            request: 1 << 20,
            parallel: 1,
            append_only: false,
            fixed_len: false,
        }
    }
}

/// A run of host bytes, as far as the host can tell without reading them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostRun {
    /// Stored bytes, or bytes the host knows nothing of.
    Data(u64),
    /// A hole: reads as zeros. From the end of the file on, `u64::MAX` minus the offset.
    Hole(u64),
}

/// How zeros may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroHow {
    /// The space stays allocated.
    KeepAllocated,
    /// The space may be given back.
    MayUnmap,
}

/// A plain file under a storage, for `copy_file_range` and reflink only.
#[derive(Clone, Copy, Debug)]
pub struct RawFile<'a> {
    /// The open file.
    pub fd: BorrowedFd<'a>,
    /// The file's offset of the storage's byte 0.
    pub base: u64,
    /// Bytes of the file the storage may touch, from `base`.
    pub len: u64,
}

/// Host bytes that can be read: positional, exact, never a cursor.
///
/// Implementations retry interrupted and short reads themselves. All methods may be called from many threads at once.
pub trait Storage: Send + Sync + Debug {
    /// The length in bytes, as it is now.
    fn len(&self) -> Result<u64>;

    /// Whether there are no bytes at all.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// What suits this storage.
    fn hints(&self) -> Hints;

    /// Fills all of `buf` from `at`, or fails. A read that runs past the end is an error of kind
    /// [`Io`](crate::ErrorKind::Io) whose source is an `io::Error` of kind `UnexpectedEof`.
    fn read_at(&self, at: HostOffset, buf: &mut [u8]) -> Result<()>;

    /// What the host knows of the bytes at `at`, without reading them. A run has at least one byte.
    fn run_at(&self, at: HostOffset) -> Result<HostRun>;

    /// Bytes this storage occupies on the host, if it can tell.
    fn allocated(&self) -> Result<Option<u64>>;

    /// The plain file underneath, if there is one. Wrappers other than a window answer `None`.
    fn raw_file(&self) -> Option<RawFile<'_>>;

    /// Fills what there is of `buf` from `at` and zeros the rest: how formats read a last, partial unit.
    fn read_padded(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        let have = self.len()?.saturating_sub(at.get());
        let have = usize::try_from(have).unwrap_or(usize::MAX).min(buf.len());
        let (stored, rest) = buf.split_at_mut(have);
        rest.fill(0);
        if stored.is_empty() {
            Ok(())
        } else {
            self.read_at(at, stored)
        }
    }
}

/// Host bytes that can be changed.
///
/// Writing past the end grows the storage, and the gap reads as zeros. Nothing is durable before [`sync`](Self::sync).
pub trait StorageMut: Storage {
    /// Writes all of `buf` at `at`, or fails.
    fn write_at(&self, at: HostOffset, buf: &[u8]) -> Result<()>;

    /// Writes `bufs` one behind the other from `at`, or fails.
    fn write_vectored_at(&self, at: HostOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        let mut at = at;
        for buf in bufs {
            self.write_at(at, buf)?;
            at = at.plus(buf.len() as u64)?;
        }
        Ok(())
    }

    /// Makes `range` read as zeros, growing the storage if it ends past the end.
    fn zero(&self, range: Range<HostOffset>, how: ZeroHow) -> Result<()>;

    /// Tells the host that the bytes of `range` are not needed. What they read as afterwards is undefined; doing
    /// nothing is allowed.
    fn discard(&self, range: Range<HostOffset>) -> Result<()>;

    /// Reserves space for `range` without changing what it reads as, growing the storage if it ends past the end.
    fn allocate(&self, range: Range<HostOffset>) -> Result<()>;

    /// Sets the length; new bytes read as zeros. A storage of fixed length accepts any length up to its own and keeps it.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Returns when all that was written is durable. Once it has failed it fails for good, since the host forgets
    /// which pages it lost.
    fn sync(&self) -> Result<()>;
}

/// A source that only comes in order and whose length is not known (stdin).
pub trait ForwardSource: Send {
    /// Fills as much of `buf` as there is; 0 only at the end.
    fn next(&mut self, buf: &mut [u8]) -> Result<usize>;
}
