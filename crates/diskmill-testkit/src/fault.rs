//! Storages that fail on demand, and storages that remember what was done to them.
//!
//! [`Faults`] gives every I/O call a number. A test runs an operation once to learn how many there are, then once for
//! each number with that call failing:
//!
//! ```
//! use std::sync::Arc;
//! use diskmill_core::{HostOffset, StorageMut};
//! use diskmill_testkit::fault::{Failure, Faults, Lasting};
//!
//! fn operation(disk: &dyn StorageMut) -> diskmill_core::Result<()> {
//!     disk.write_at(HostOffset::ZERO, b"header")?;
//!     disk.sync()
//! }
//!
//! let disk = || -> Arc<dyn StorageMut> { Arc::new(diskmill_storage::Memory::new()) };
//! let calls = {
//!     let faults = Faults::new();
//!     operation(&*faults.wrap(disk())).unwrap();
//!     faults.calls()
//! };
//! assert_eq!(calls, 2);
//! for number in 0..calls {
//!     for lasting in [Lasting::Once, Lasting::ForGood] {
//!         let faults = Faults::new();
//!         faults.fail_at(number, Failure::Io, lasting);
//!         operation(&*faults.wrap(disk())).unwrap_err();
//!         assert!(faults.struck() > 0);
//!     }
//! }
//! ```
//!
//! [`Journal`] notes every change and every flush, and can make the bytes that a power cut might have left.
#![deny(clippy::missing_trait_methods)]

mod cuts;
mod journal;

use std::io::{Error as IoError, IoSlice};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use diskmill_core::{Error, Hints, HostOffset, HostRun, RawFile, Result, Storage, StorageMut, ZeroHow};

pub use cuts::{Bounds, Cut, Loss};
pub use journal::{Change, Journal};

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// `EIO`.
    Io,
    /// `ENOSPC`.
    NoSpace,
    /// `EDQUOT`.
    Quota,
    /// The first half of a write is made, then `ENOSPC`. Other calls fail with `EIO`.
    ShortWrite,
}

impl Failure {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Io, Self::NoSpace, Self::Quota, Self::ShortWrite];

    fn error(self, call: Call) -> Error {
        // The numbers of Linux, so that errors are those a host would give.
        let errno = match self {
            Self::Io => 5,
            Self::ShortWrite if call != Call::Write => 5,
            Self::NoSpace | Self::ShortWrite => 28,
            Self::Quota => 122,
        };
        Error::from(IoError::from_raw_os_error(errno)).op(call.verb())
    }
}

/// How long a failure lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasting {
    /// One call fails, the next works again.
    Once,
    /// It and every later call fail.
    ForGood,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Read,
    Write,
    Zero,
    Discard,
    Allocate,
    SetLen,
    Sync,
}

impl Call {
    const fn verb(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Zero => "zero",
            Self::Discard => "discard",
            Self::Allocate => "allocate",
            Self::SetLen => "resize",
            Self::Sync => "sync",
        }
    }
}

/// Counts the I/O calls of all storages it wraps, and fails the one it is told to.
#[derive(Debug, Default)]
pub struct Faults {
    calls: AtomicU64,
    struck: AtomicU64,
    plan: Mutex<Option<(u64, Failure, Lasting)>>,
}

impl Faults {
    /// Counts and fails nothing yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Fails call `number`, counted from 0.
    pub fn fail_at(&self, number: u64, failure: Failure, lasting: Lasting) {
        *self.plan.lock().unwrap_or_else(PoisonError::into_inner) = Some((number, failure, lasting));
    }

    /// Calls made so far: reads, writes, zeroing, discards, reservations, changes of length, flushes. Asking for the
    /// length or a run is not I/O.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// Calls that were made to fail so far.
    pub fn struck(&self) -> u64 {
        self.struck.load(Ordering::SeqCst)
    }

    /// `inner`, its calls counted here.
    pub fn wrap(self: &Arc<Self>, inner: Arc<dyn StorageMut>) -> Arc<dyn StorageMut> {
        Arc::new(Faulty {
            faults: Arc::clone(self),
            inner,
            path: None,
        })
    }

    /// The file `inner`, its calls counted here. Errors name it, as those of a file do.
    pub fn wrap_file(self: &Arc<Self>, path: &Path, inner: Arc<dyn StorageMut>) -> Arc<dyn StorageMut> {
        Arc::new(Faulty {
            faults: Arc::clone(self),
            inner,
            path: Some(path.to_owned()),
        })
    }

    fn count(&self, call: Call) -> Option<Failure> {
        let number = self.calls.fetch_add(1, Ordering::SeqCst);
        let plan = *self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, failure, lasting) = plan?;
        let strikes = number == at || (number > at && lasting == Lasting::ForGood);
        // Nobody has to carry out a discard, so nobody has to notice that it failed.
        if !strikes || call == Call::Discard {
            return None;
        }
        self.struck.fetch_add(1, Ordering::SeqCst);
        Some(failure)
    }
}

fn joined(bufs: &[IoSlice<'_>]) -> Vec<u8> {
    bufs.iter().flat_map(|buf| buf.iter().copied()).collect()
}

#[derive(Debug)]
struct Faulty {
    faults: Arc<Faults>,
    inner: Arc<dyn StorageMut>,
    path: Option<PathBuf>,
}

impl Faulty {
    fn pass(&self, call: Call) -> Result<()> {
        match self.faults.count(call) {
            Some(failure) => Err(self.error(failure, call)),
            None => Ok(()),
        }
    }

    fn error(&self, failure: Failure, call: Call) -> Error {
        let error = failure.error(call);
        match &self.path {
            Some(path) => error.path(path),
            None => error,
        }
    }
}

impl Storage for Faulty {
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn is_empty(&self) -> Result<bool> {
        self.inner.is_empty()
    }

    fn hints(&self) -> Hints {
        self.inner.hints()
    }

    fn read_at(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.pass(Call::Read)?;
        self.inner.read_at(at, buf)
    }

    fn run_at(&self, at: HostOffset) -> Result<HostRun> {
        self.inner.run_at(at)
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.inner.allocated()
    }

    fn raw_file(&self) -> Option<RawFile<'_>> {
        None
    }

    fn read_padded(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.pass(Call::Read)?;
        self.inner.read_padded(at, buf)
    }
}

impl StorageMut for Faulty {
    fn write_at(&self, at: HostOffset, buf: &[u8]) -> Result<()> {
        self.write_vectored_at(at, &[IoSlice::new(buf)])
    }

    fn write_vectored_at(&self, at: HostOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        let Some(failure) = self.faults.count(Call::Write) else {
            return self.inner.write_vectored_at(at, bufs);
        };
        if failure == Failure::ShortWrite {
            let bytes = joined(bufs);
            self.inner.write_at(at, &bytes[..bytes.len() / 2])?;
        }
        Err(self.error(failure, Call::Write).host(at))
    }

    fn zero(&self, range: Range<HostOffset>, how: ZeroHow) -> Result<()> {
        self.pass(Call::Zero)?;
        self.inner.zero(range, how)
    }

    fn discard(&self, range: Range<HostOffset>) -> Result<()> {
        self.pass(Call::Discard)?;
        self.inner.discard(range)
    }

    fn allocate(&self, range: Range<HostOffset>) -> Result<()> {
        self.pass(Call::Allocate)?;
        self.inner.allocate(range)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.pass(Call::SetLen)?;
        self.inner.set_len(len)
    }

    fn sync(&self) -> Result<()> {
        self.pass(Call::Sync)?;
        self.inner.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract;
    use diskmill_core::ErrorKind;
    use diskmill_storage::Memory;

    fn disk() -> Arc<dyn StorageMut> {
        Arc::new(Memory::new())
    }

    #[test]
    fn wrappers_are_storages() {
        contract::storage::all(&|| Faults::new().wrap(disk()));
        contract::storage::all(&|| Journal::new().record(disk()));
    }

    #[test]
    fn the_chosen_call_fails_and_no_other() {
        let faults = Faults::new();
        faults.fail_at(1, Failure::NoSpace, Lasting::Once);
        let storage = faults.wrap(disk());
        storage.write_at(HostOffset::ZERO, b"abcd").unwrap();
        let error = storage.write_at(HostOffset::ZERO, b"efgh").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        storage.sync().unwrap();
        assert_eq!((faults.calls(), faults.struck()), (3, 1));
        faults.fail_at(3, Failure::ShortWrite, Lasting::ForGood);
        storage.write_at(HostOffset::ZERO, b"ijkl").unwrap_err();
        let error = storage.sync().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        faults.fail_at(u64::MAX, Failure::Io, Lasting::Once);
        let mut bytes = [0; 4];
        storage.read_at(HostOffset::ZERO, &mut bytes).unwrap();
        assert_eq!(&bytes, b"ijcd");
    }

    #[test]
    fn a_crash_keeps_what_was_flushed_and_may_lose_the_rest() {
        let journal = Journal::new();
        let storage = journal.record(Arc::new(Memory::from(vec![1; 2048])));
        storage.write_at(HostOffset::ZERO, &[2; 1024]).unwrap();
        storage.sync().unwrap();
        storage.write_at(HostOffset::new(1024), &[3; 2048]).unwrap();
        assert_eq!(journal.len(), 3);
        assert_eq!(journal.prefix(0), [vec![1; 2048]]);
        let whole = [vec![2; 1024], vec![3; 2048]].concat();
        assert_eq!(journal.prefix(3), std::slice::from_ref(&whole));
        let mut seen = std::collections::BTreeSet::new();
        let bounds = Bounds {
            prefixes: 10,
            singles: 10,
            random: 50,
            seed: 1,
        };
        let cuts = journal.cuts(bounds);
        for cut in cuts.iter().filter(|cut| cut.count == 3) {
            let files = journal.state(cut);
            assert_eq!(files[0][..1024], [2; 1024]);
            for sector in files[0][1024..].chunks(512) {
                assert!(sector.iter().all(|byte| *byte == sector[0]));
            }
            seen.insert(files[0].clone());
        }
        assert!(seen.contains(&whole), "all of it may be there");
        assert!(
            seen.contains(&[vec![2; 1024], vec![1; 1024]].concat()),
            "or nothing"
        );
        assert!(seen.len() > 3, "or some of it");
        for count in 0..=3 {
            let loss = Loss::Nothing;
            assert!(cuts.contains(&Cut { count, loss }), "{count}");
        }
    }

    #[test]
    fn of_several_changes_one_may_be_lost_or_left() {
        let journal = Journal::new();
        let storage = journal.record(Arc::new(Memory::from(vec![0; 4096])));
        for at in 0..4 {
            storage.write_at(HostOffset::new(at * 512), &[1; 512]).unwrap();
        }
        let bounds = Bounds {
            prefixes: 1,
            singles: 4,
            random: 0,
            seed: 1,
        };
        let sectors = |files: &[Vec<u8>]| files[0].chunks(512).filter(|sector| sector[0] == 1).count();
        let states: Vec<usize> = journal
            .cuts(bounds)
            .iter()
            .filter(|cut| cut.count == 4 && cut.loss != Loss::Nothing)
            .map(|cut| sectors(&journal.state(cut)))
            .collect();
        assert_eq!(states, [0, 3, 1, 3, 1, 3, 1, 3, 1]);
    }
}
