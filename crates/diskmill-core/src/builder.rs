//! Filling a new image: encode in parallel, place in order, write in parallel.
//!
//! A new image is never written through [`LayerMut`](crate::LayerMut). Each unit is *encoded* (zero test, compression:
//! pure CPU, any thread, any order), *placed* (given its host offset and entered into the tables: in memory, in rising
//! guest order) and *written* (any thread, any order). Only placing needs order, so the bytes of the file do not
//! depend on how many threads there are.

use std::borrow::Cow;
use std::fmt::Debug;
use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;

use crate::{Error, ErrorKind, FileIndex, GuestOffset, HostOffset, HostSpan, Result, StorageMut, ZeroHow};

/// What an [`Encoder`] made of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncodedKind {
    /// All zeros: nothing to store.
    Zero,
    /// To be stored as it is.
    Plain,
    /// To be stored as the first `len` bytes of the scratch buffer.
    Packed {
        /// Bytes of it.
        len: usize,
    },
}

/// Turns units into what is stored. Each worker has its own.
pub trait Encoder: Send {
    /// Encodes one unit, which is whole: the last of a disk is padded with zeros. A packed unit is left at the start
    /// of `scratch`, which the encoder sizes as it needs.
    fn encode(&mut self, unit: &[u8], scratch: &mut Vec<u8>) -> Result<EncodedKind>;

    /// Encodes one unit that is to be stored even if it is all zeros: never [`EncodedKind::Zero`].
    fn pack(&mut self, unit: &[u8], scratch: &mut Vec<u8>) -> Result<EncodedKind>;
}

/// Bytes to store for guest data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored<'a> {
    /// Guest bytes as they are: whole units, one or several; only the last of the disk may be cut short.
    Plain(&'a [u8]),
    /// One unit, compressed.
    Packed(&'a [u8]),
}

/// A run of guest bytes that needs no stored data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Reads as zeros whatever is below.
    Zero,
    /// Left to the layer below.
    Absent,
}

/// Encrypts bytes on their way into a file.
pub trait Sealer: Send + Sync + Debug {
    /// Encrypts `bytes`, those of the disk from `guest` on, which are about to be written at `host`. Their number is a
    /// multiple of [`SECTOR`](crate::SECTOR).
    fn seal(&self, guest: GuestOffset, host: HostOffset, bytes: &mut [u8]) -> Result<()>;
}

/// One change to a file, waiting to be made.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum QueuedWrite<'a> {
    /// Write bytes: borrowed guest data, or a table that is done.
    Bytes {
        /// In which file.
        file: FileIndex,
        /// Where.
        at: HostOffset,
        /// What.
        bytes: Cow<'a, [u8]>,
    },
    /// Write guest data that is encrypted first, by the thread that writes.
    Sealed {
        /// In which file.
        file: FileIndex,
        /// Where.
        at: HostOffset,
        /// Where in the disk the bytes belong.
        guest: GuestOffset,
        /// What, as the guest sees it.
        bytes: Cow<'a, [u8]>,
        /// Encrypts it.
        sealer: Arc<dyn Sealer>,
    },
    /// Make a range read as zeros.
    Zero {
        /// In which file.
        file: FileIndex,
        /// Where.
        range: Range<HostOffset>,
        /// How.
        how: ZeroHow,
    },
}

impl QueuedWrite<'_> {
    fn position(&self) -> (FileIndex, HostOffset) {
        match self {
            Self::Bytes { file, at, .. } | Self::Sealed { file, at, .. } => (*file, *at),
            Self::Zero { file, range, .. } => (*file, range.start),
        }
    }
}

/// Changes that [`Builder::place`] asked for. They touch disjoint bytes, so their order does not matter.
#[derive(Debug, Default)]
pub struct Writes<'a> {
    queue: Vec<QueuedWrite<'a>>,
}

/// Slices the kernel takes in one vectored write.
const VECTOR: usize = 1024;

impl<'a> Writes<'a> {
    /// An empty queue.
    pub fn new() -> Self {
        Self::default()
    }

    /// Queues a write.
    pub fn push(&mut self, file: FileIndex, at: HostOffset, bytes: impl Into<Cow<'a, [u8]>>) {
        self.queue.push(QueuedWrite::Bytes {
            file,
            at,
            bytes: bytes.into(),
        });
    }

    /// Queues a write of guest data from `guest` on that is encrypted first. The number of bytes is a multiple of
    /// [`SECTOR`](crate::SECTOR).
    pub fn push_sealed(
        &mut self,
        file: FileIndex,
        at: HostOffset,
        guest: GuestOffset,
        bytes: impl Into<Cow<'a, [u8]>>,
        sealer: &Arc<dyn Sealer>,
    ) {
        self.queue.push(QueuedWrite::Sealed {
            file,
            at,
            guest,
            bytes: bytes.into(),
            sealer: Arc::clone(sealer),
        });
    }

    /// Queues zeros.
    pub fn push_zero(&mut self, file: FileIndex, range: Range<HostOffset>, how: ZeroHow) {
        self.queue.push(QueuedWrite::Zero { file, range, how });
    }

    /// Whether nothing is queued.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// What is queued, in order.
    pub fn queued(&self) -> &[QueuedWrite<'a>] {
        &self.queue
    }

    /// Makes all changes, in rising order and writes that follow one another joined, and empties the queue. What is to be
    /// encrypted is, a piece at a time.
    pub fn perform(&mut self, files: &[Arc<dyn StorageMut>]) -> Result<()> {
        let mut queue = std::mem::take(&mut self.queue);
        queue.sort_by_key(QueuedWrite::position);
        let mut start: Option<(FileIndex, HostOffset)> = None;
        let mut end = HostOffset::ZERO;
        let mut slices: Vec<IoSlice<'_>> = Vec::new();
        let mut sealed = Sealed::default();
        for write in &queue {
            match write {
                QueuedWrite::Bytes { file, at, bytes } => {
                    let joins = start.is_some_and(|(known, _)| known == *file && end == *at);
                    if !joins || slices.len() >= VECTOR {
                        flush_slices(files, start, &mut slices)?;
                        start = Some((*file, *at));
                    }
                    slices.push(IoSlice::new(bytes));
                    end = at.plus(bytes.len() as u64)?;
                }
                QueuedWrite::Sealed {
                    file,
                    at,
                    guest,
                    bytes,
                    sealer,
                } => {
                    let (mut at, mut guest) = (*at, *guest);
                    for piece in bytes.chunks(SEALED) {
                        sealed.add(files, (*file, at), guest, piece, sealer.as_ref())?;
                        at = at.plus(piece.len() as u64)?;
                        guest = guest.plus(piece.len() as u64)?;
                    }
                }
                QueuedWrite::Zero { file, range, how } => {
                    flush_slices(files, start.take(), &mut slices)?;
                    find(files, *file)?.zero(range.clone(), *how)?;
                }
            }
        }
        flush_slices(files, start, &mut slices)?;
        sealed.flush(files)
    }
}

/// Bytes that are encrypted and written at once: they stay in the processor's cache from the one to the other.
const SEALED: usize = 256 << 10;

/// Encrypted bytes on their way into a file.
#[derive(Debug, Default)]
struct Sealed {
    start: Option<(FileIndex, HostOffset)>,
    bytes: Vec<u8>,
}

impl Sealed {
    /// Encrypts `piece`, at most [`SEALED`] bytes, and keeps it for the next write, which is made now unless the piece
    /// follows what is there.
    fn add(
        &mut self,
        files: &[Arc<dyn StorageMut>],
        place: (FileIndex, HostOffset),
        guest: GuestOffset,
        piece: &[u8],
        sealer: &dyn Sealer,
    ) -> Result<()> {
        let known = self.bytes.len();
        let follows = self
            .start
            .is_some_and(|(file, at)| place.0 == file && at.checked_add(known as u64) == Some(place.1));
        if !follows || known.saturating_add(piece.len()) > SEALED {
            self.flush(files)?;
            self.start = Some(place);
        }
        let known = self.bytes.len();
        self.bytes.extend_from_slice(piece);
        match self.bytes.get_mut(known..) {
            Some(added) => sealer.seal(guest, place.1, added),
            None => Ok(()),
        }
    }

    fn flush(&mut self, files: &[Arc<dyn StorageMut>]) -> Result<()> {
        if let Some((file, at)) = self.start.take() {
            find(files, file)?.write_at(at, &self.bytes)?;
        }
        self.bytes.clear();
        Ok(())
    }
}

fn flush_slices(
    files: &[Arc<dyn StorageMut>],
    start: Option<(FileIndex, HostOffset)>,
    slices: &mut Vec<IoSlice<'_>>,
) -> Result<()> {
    if let Some((file, at)) = start {
        let storage = find(files, file)?;
        match slices.as_slice() {
            [] => {}
            [one] => storage.write_at(at, one)?,
            many => storage.write_vectored_at(at, many)?,
        }
    }
    slices.clear();
    Ok(())
}

fn find(files: &[Arc<dyn StorageMut>], index: FileIndex) -> Result<&Arc<dyn StorageMut>> {
    files
        .get(usize::from(index.0))
        .ok_or_else(|| Error::new(ErrorKind::Usage, format!("there is no file number {}", index.0)))
}

/// What must hold when a new image is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// The host writes it back when it likes.
    None,
    /// It is on stable storage.
    Synced,
}

/// How to finish a new image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finish {
    /// What must hold afterwards.
    pub durability: Durability,
    /// The size of the disk, where it was not known before (a stream).
    pub final_size: Option<u64>,
}

impl Finish {
    /// A finish with `durability` and the size that was planned.
    pub fn new(durability: Durability) -> Self {
        Self {
            durability,
            final_size: None,
        }
    }
}

/// A new image being filled.
///
/// Every guest byte is placed exactly once, in rising order, by [`place`](Self::place), [`place_run`](Self::place_run)
/// or [`reserve`](Self::reserve). Nothing opens as an image before [`finish`](Self::finish): the header is last.
pub trait Builder: Send {
    /// The step in which it takes data, in bytes: a power of two, at least 512.
    fn unit(&self) -> u64;

    /// The files it writes, by [`FileIndex`].
    fn files(&self) -> &[Arc<dyn StorageMut>];

    /// Whether data must come through an [`encoder`](Self::encoder), since it is only stored compressed.
    fn packs(&self) -> bool {
        false
    }

    /// Whether zeros take as much as data, since there is no other way to store them: whoever has them as data, which
    /// many threads can encode, had better place them as such. What is not placed at all reads as anything.
    fn stores_zeros(&self) -> bool {
        false
    }

    /// An encoder for one worker.
    fn encoder(&self) -> Result<Box<dyn Encoder>>;

    /// Gives stored units their place. No I/O: what must be written is added to `writes`.
    fn place<'b>(&mut self, at: GuestOffset, stored: Stored<'b>, writes: &mut Writes<'b>) -> Result<()>;

    /// Places a run without data, whole units except at the end of the disk, in a time that depends on tables, not
    /// on bytes.
    fn place_run<'b>(&mut self, range: Range<GuestOffset>, what: Run, writes: &mut Writes<'b>) -> Result<()>;

    /// Places a run of any length and makes the changes it asks for, in steps that bound the memory their tables take.
    fn fill(&mut self, range: Range<GuestOffset>, what: Run) -> Result<()> {
        /// Units a step: a table of 8-byte entries for them is 1 MiB.
        const STEP: u64 = 1 << 17;
        let step = self.unit().saturating_mul(STEP);
        let files = self.files().to_vec();
        let mut at = range.start;
        while at < range.end {
            let end = at.align_down(step).saturating_add(step).min(range.end);
            let mut writes = Writes::new();
            self.place_run(at..end, what, &mut writes)?;
            writes.perform(&files)?;
            at = end;
        }
        Ok(())
    }

    /// Places plain units whose bytes the caller will put at the span itself (`copy_file_range`), or `None` if the
    /// builder must see the bytes.
    fn reserve<'b>(&mut self, range: Range<GuestOffset>, writes: &mut Writes<'b>)
    -> Result<Option<HostSpan>>;

    /// Writes the tables that remain, then the header, then makes it durable if asked.
    fn finish(self: Box<Self>, end: Finish) -> Result<()>;
}
