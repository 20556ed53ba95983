//! What was done to storages, in order, and what a power cut would have left of it.

use std::io::IoSlice;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskmill_core::{Hints, HostOffset, HostRun, RawFile, Result, Storage, StorageMut, ZeroHow};

use super::cuts::{Bounds, Chance, Cut, Fate, Loss, covered, cuts};
use super::joined;

/// Something that was done to a file of a [`Journal`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// Bytes were written.
    Write {
        /// Which file, by the order of [`Journal::record`].
        file: usize,
        /// Where.
        at: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// A range was made to read as zeros.
    Zero {
        /// Which file.
        file: usize,
        /// Which bytes.
        range: Range<u64>,
    },
    /// A range was given up: it may read as anything.
    Discard {
        /// Which file.
        file: usize,
        /// Which bytes.
        range: Range<u64>,
    },
    /// The length was set, or grown by a reservation.
    SetLen {
        /// Which file.
        file: usize,
        /// To how many bytes.
        len: u64,
    },
    /// All changes of the file so far became durable.
    Flush {
        /// Which file.
        file: usize,
    },
}

impl Change {
    /// Which file was changed or flushed.
    pub fn file(&self) -> usize {
        match self {
            Self::Write { file, .. }
            | Self::Zero { file, .. }
            | Self::Discard { file, .. }
            | Self::SetLen { file, .. }
            | Self::Flush { file } => *file,
        }
    }

    /// What it is, in a few words.
    pub fn describe(&self) -> String {
        match self {
            Self::Write { file, at, bytes } => {
                format!("file {file}: write {:#x}..{:#x}", at, at + bytes.len() as u64)
            }
            Self::Zero { file, range } => format!("file {file}: zero {range:#x?}"),
            Self::Discard { file, range } => format!("file {file}: discard {range:#x?}"),
            Self::SetLen { file, len } => format!("file {file}: set the length to {len:#x}"),
            Self::Flush { file } => format!("file {file}: flush"),
        }
    }

    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write {
                at, bytes: written, ..
            } => {
                let range = *at as usize..*at as usize + written.len();
                bytes.resize(bytes.len().max(range.end), 0);
                bytes[range].copy_from_slice(written);
            }
            Self::Zero { range, .. } => {
                bytes.resize(bytes.len().max(range.end as usize), 0);
                bytes[range.start as usize..range.end as usize].fill(0);
            }
            Self::Discard { range, .. } => {
                let end = (range.end as usize).min(bytes.len());
                bytes[(range.start as usize).min(end)..end].fill(0);
            }
            Self::SetLen { len, .. } => bytes.resize(*len as usize, 0),
            Self::Flush { .. } => {}
        }
    }
}

/// Remembers what is done to the storages it is given.
///
/// A change is noted when its call returns without an error; a flush likewise, and it covers what had been noted when
/// it was called.
#[derive(Debug, Default)]
pub struct Journal {
    inside: Mutex<Inside>,
}

#[derive(Debug, Default)]
struct Inside {
    /// What each file held when it was handed over.
    start: Vec<Vec<u8>>,
    changes: Vec<Change>,
}

impl Journal {
    /// An empty journal.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// `inner`, with everything that is done to it noted from here on. The first storage is file 0, the next 1.
    pub fn record(self: &Arc<Self>, inner: Arc<dyn StorageMut>) -> Arc<dyn StorageMut> {
        let file = self.lock().start.len();
        self.record_as(file, inner)
    }

    /// `inner`, noted as file `file`: a new one, or one that was opened again and holds what it held.
    pub fn record_as(self: &Arc<Self>, file: usize, inner: Arc<dyn StorageMut>) -> Arc<dyn StorageMut> {
        let mut inside = self.lock();
        if file == inside.start.len() {
            let mut bytes = vec![0; inner.len().expect("the length") as usize];
            inner
                .read_at(HostOffset::ZERO, &mut bytes)
                .expect("read what is there");
            inside.start.push(bytes);
        }
        assert!(file < inside.start.len(), "files are recorded in order");
        Arc::new(Recorded {
            journal: Arc::clone(self),
            file,
            inner,
        })
    }

    /// All that was noted, in order.
    pub fn changes(&self) -> Vec<Change> {
        self.lock().changes.clone()
    }

    /// How many changes and flushes were noted: a power cut can come after any number of them.
    pub fn len(&self) -> usize {
        self.lock().changes.len()
    }

    /// Whether nothing was noted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the files would hold after a power cut behind the first `count` changes, if the host had written all of
    /// them in order.
    pub fn prefix(&self, count: usize) -> Vec<Vec<u8>> {
        self.state(&Cut {
            count,
            loss: Loss::Nothing,
        })
    }

    /// What the files might hold after a power cut behind the first `count` changes: of what was not flushed `seed`
    /// decides what is there.
    pub fn crash(&self, count: usize, seed: u64) -> Vec<Vec<u8>> {
        self.state(&Cut {
            count,
            loss: Loss::Random { seed },
        })
    }

    /// What the files hold after `cut`. What was flushed is there.
    pub fn state(&self, cut: &Cut) -> Vec<Vec<u8>> {
        let inside = self.lock();
        let mut files = inside.start.clone();
        let changes = inside.changes.get(..cut.count).expect("a cut of this journal");
        let covered = covered(changes, files.len());
        let mut chance = cut.chance();
        for (index, change) in changes.iter().enumerate() {
            let file = change.file();
            let fate = if index < covered[file] {
                Fate::Whole
            } else {
                cut.fate(index, &mut chance)
            };
            match (fate, change) {
                (Fate::Whole, _) => change.apply(&mut files[file]),
                (Fate::Torn, Change::Write { at, bytes, .. }) => {
                    torn(*at, bytes, &mut chance, |at, part| {
                        let bytes = part.to_vec();
                        Change::Write { file, at, bytes }.apply(&mut files[file]);
                    });
                }
                _ => {}
            }
        }
        files
    }

    /// Power cuts to try, seeded and bounded: in each stretch between flushes the prefixes, and where the most is under
    /// way the loss of all, of one and of all but one of the changes, one torn, and random ones.
    pub fn cuts(&self, bounds: Bounds) -> Vec<Cut> {
        let inside = self.lock();
        cuts(&inside.changes, inside.start.len(), bounds)
    }

    fn note(&self, change: Change) {
        self.lock().changes.push(change);
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hands on some of a write's sectors.
fn torn(at: u64, bytes: &[u8], chance: &mut Chance, mut each: impl FnMut(u64, &[u8])) {
    const SECTOR: u64 = 512;
    let end = at + bytes.len() as u64;
    let mut pos = at;
    while pos < end {
        let next = (pos - pos % SECTOR + SECTOR).min(end);
        if chance.one_in(2) {
            each(pos, &bytes[(pos - at) as usize..(next - at) as usize]);
        }
        pos = next;
    }
}

#[derive(Debug)]
struct Recorded {
    journal: Arc<Journal>,
    file: usize,
    inner: Arc<dyn StorageMut>,
}

impl Storage for Recorded {
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
        self.inner.read_padded(at, buf)
    }
}

impl StorageMut for Recorded {
    fn write_at(&self, at: HostOffset, buf: &[u8]) -> Result<()> {
        self.write_vectored_at(at, &[IoSlice::new(buf)])
    }

    fn write_vectored_at(&self, at: HostOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        self.inner.write_vectored_at(at, bufs)?;
        let bytes = joined(bufs);
        if !bytes.is_empty() {
            let (file, at) = (self.file, at.get());
            self.journal.note(Change::Write { file, at, bytes });
        }
        Ok(())
    }

    fn zero(&self, range: Range<HostOffset>, how: ZeroHow) -> Result<()> {
        self.inner.zero(range.clone(), how)?;
        if range.start < range.end {
            self.journal.note(Change::Zero {
                file: self.file,
                range: range.start.get()..range.end.get(),
            });
        }
        Ok(())
    }

    fn discard(&self, range: Range<HostOffset>) -> Result<()> {
        self.inner.discard(range.clone())?;
        if range.start < range.end {
            self.journal.note(Change::Discard {
                file: self.file,
                range: range.start.get()..range.end.get(),
            });
        }
        Ok(())
    }

    fn allocate(&self, range: Range<HostOffset>) -> Result<()> {
        let before = self.inner.len()?;
        self.inner.allocate(range)?;
        let len = self.inner.len()?;
        if len != before {
            self.journal.note(Change::SetLen { file: self.file, len });
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.inner.set_len(len)?;
        let len = self.inner.len()?;
        self.journal.note(Change::SetLen { file: self.file, len });
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        // What is noted between the call and its return is not covered, so the place is taken before.
        let place = self.journal.len();
        self.inner.sync()?;
        let file = self.file;
        self.journal.lock().changes.insert(place, Change::Flush { file });
        Ok(())
    }
}
