//! Whether two disks hold the same.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use diskmill_core::{Chain, Error, GuestOffset, Job, Result};
use diskmill_formats::codec::is_zero;

use super::map::{Status, Walker};
use crate::open::Image;

/// Which of the two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The first.
    First,
    /// The second.
    Second,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::First => "first",
            Self::Second => "second",
        })
    }
}

/// What a comparison found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verdict {
    /// Whether the disks differ in size. Not a difference by itself unless in strict mode: the longer one may end in
    /// zeros.
    pub sizes_differ: bool,
    /// The first difference, if there is one.
    pub difference: Option<Difference>,
}

/// The first difference of two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Difference {
    /// Bytes differ.
    Content {
        /// Where, as exactly as `qemu-img` says it.
        offset: u64,
    },
    /// The sizes differ (strict mode).
    Size,
    /// One has data stored where the other has none (strict mode).
    Allocation {
        /// Where.
        offset: u64,
    },
}

/// What kept a comparison from being finished. The source of an [`Error`] from [`run`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// The map of a disk could not be read (exit code 3 of `qemu-img`).
    #[error("cannot tell what is allocated at offset {offset} of the {side} image")]
    Map {
        /// Of which disk.
        side: Side,
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: Error,
    },
    /// Bytes of a disk could not be read (exit code 4 of `qemu-img`).
    #[error("cannot read offset {offset} of the {side} image")]
    Read {
        /// Of which disk.
        side: Side,
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: Error,
    },
}

/// How two disks are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompareOptions {
    /// Also compare sizes and what is allocated.
    pub strict: bool,
    /// Threads to use at most; 0 means one for each core.
    pub threads: usize,
}

/// Compares two disks. What is reported is what comes first on the disk, whatever the number of threads; where bytes
/// differ that is the sector they are in.
///
/// Errors carry a [`CompareError`] as their source.
pub fn run(first: &Image, second: &Image, options: CompareOptions, job: Job<'_>) -> Result<Verdict> {
    let disks = [&first.chain, &second.chain];
    let sizes = disks.map(Chain::virtual_size);
    let (common, all) = (sizes[0].min(sizes[1]), sizes[0].max(sizes[1]));
    let mut verdict = Verdict {
        sizes_differ: common != all,
        difference: None,
    };
    job.observer.total(all);
    if options.strict && verdict.sizes_differ {
        verdict.difference = Some(Difference::Size);
        return Ok(verdict);
    }
    let shared = Shared {
        disks,
        end: common,
        strict: options.strict,
        claims: Mutex::new(Claims {
            at: 0,
            walkers: disks.map(Walker::new),
        }),
        first_event: AtomicU64::new(u64::MAX),
        event: Mutex::new(None),
        job,
    };
    let chunks = usize::try_from(common.div_ceil(CHUNK)).unwrap_or(usize::MAX);
    let wanted = match options.threads {
        0 => thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    thread::scope(|scope| {
        for _ in 1..wanted.min(chunks) {
            // A thread that cannot be had is one fewer.
            let _ = thread::Builder::new().spawn_scoped(scope, || shared.work());
        }
        shared.work();
    });
    job.check()?;
    let event = shared.event.into_inner().unwrap_or_else(PoisonError::into_inner);
    match event {
        Some((_, Event::Differs(difference))) => verdict.difference = Some(difference),
        Some((_, Event::Failed(error))) => return Err(error),
        None if verdict.sizes_differ => {
            let longer = if sizes[0] > sizes[1] {
                Side::First
            } else {
                Side::Second
            };
            verdict.difference = rest_is_zero(disks[longer.index()], longer, common, job)?;
        }
        None => {}
    }
    Ok(verdict)
}

/// What a thread claims at once, in bytes.
const CHUNK: u64 = 4 << 20;
/// What is read at once, in bytes: both buffers of a thread fit in the cache of a core.
const PIECE: usize = 256 << 10;
/// The step in which differences are reported.
const STEP: usize = 512;

impl Side {
    const fn index(self) -> usize {
        match self {
            Self::First => 0,
            Self::Second => 1,
        }
    }
}

/// What ends a comparison.
enum Event {
    Differs(Difference),
    Failed(Error),
}

/// What is left to claim.
struct Claims<'a> {
    at: u64,
    walkers: [Walker<'a>; 2],
}

struct Shared<'a> {
    disks: [&'a Chain; 2],
    end: u64,
    strict: bool,
    claims: Mutex<Claims<'a>>,
    /// Where the first event known so far is: nothing behind it matters any more.
    first_event: AtomicU64,
    event: Mutex<Option<(u64, Event)>>,
    job: Job<'a>,
}

impl Shared<'_> {
    fn work(&self) {
        let mut buffers = [Vec::new(), Vec::new()];
        let mut walkers = self.disks.map(Walker::new);
        while let Some(range) = self.claim() {
            let len = range.end - range.start;
            if let Err((at, event)) = self.compare_range(range, &mut walkers, &mut buffers) {
                self.note(at, event);
            }
            self.job.observer.advance(len);
        }
    }

    /// The next range that somebody has to look at, in rising order: what is known to be zeros on both sides is not
    /// handed out.
    fn claim(&self) -> Option<Range<u64>> {
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        let Claims { at, walkers } = &mut *claims;
        loop {
            let stopped = *at >= self.first_event.load(Ordering::Acquire);
            if *at >= self.end || stopped || self.job.check().is_err() {
                return None;
            }
            let both = match statuses(walkers, *at, self.end) {
                Ok(both) => both,
                Err((side, source)) => {
                    let offset = *at;
                    self.note(offset, failed(CompareError::Map { side, offset, source }));
                    *at = self.end;
                    return None;
                }
            };
            let [first, second] = &both;
            if self.strict && !self.same_allocation(*at, first, second) {
                self.note(*at, Event::Differs(Difference::Allocation { offset: *at }));
                *at = self.end;
                return None;
            }
            let len = first.len.min(second.len);
            let start = *at;
            if is_skipped(first, second) {
                *at += len;
                self.job.observer.advance(len);
            } else if self.strict {
                *at += len.min(CHUNK);
                return Some(start..*at);
            } else {
                // Chunks start where data does; what else is in them the thread sees for itself.
                *at = (start + CHUNK).min(self.end);
                return Some(start..*at);
            }
        }
    }

    /// Whether both runs say the same. Like `qemu-img`, this also minds whether a run goes to the end of its disk.
    fn same_allocation(&self, at: u64, first: &Status, second: &Status) -> bool {
        let what = |status: &Status| {
            let ends = at + status.len >= self.end;
            let flags = (
                status.present || status.past_end,
                status.zero,
                status.data,
                status.compressed,
            );
            (flags, status.span.is_some() && !status.past_end, ends)
        };
        what(first) == what(second)
    }

    fn compare_range(
        &self,
        range: Range<u64>,
        walkers: &mut [Walker<'_>; 2],
        buffers: &mut [Vec<u8>; 2],
    ) -> Result<(), (u64, Event)> {
        let mut at = range.start;
        while at < range.end {
            if at >= self.first_event.load(Ordering::Acquire) || self.job.check().is_err() {
                return Ok(());
            }
            let [first, second] = statuses(walkers, at, range.end).map_err(|(side, source)| {
                let offset = at;
                (at, failed(CompareError::Map { side, offset, source }))
            })?;
            let len = first.len.min(second.len);
            if !is_skipped(&first, &second) {
                let allocated = [&first, &second].map(|status| status.present || status.past_end);
                match allocated {
                    [true, true] => self.compare_data(at, len, buffers)?,
                    [first, _] => {
                        let side = if first { Side::First } else { Side::Second };
                        let [buffer, _] = buffers;
                        expect_zero(self.disks[side.index()], side, at, len, buffer, self.job)?;
                    }
                }
            }
            at += len;
        }
        Ok(())
    }

    fn compare_data(&self, at: u64, len: u64, buffers: &mut [Vec<u8>; 2]) -> Result<(), (u64, Event)> {
        let mut done = 0;
        while done < len {
            if self.job.check().is_err() {
                return Ok(());
            }
            let piece = usize::try_from(len - done).unwrap_or(PIECE).min(PIECE);
            for side in [Side::First, Side::Second] {
                read(
                    self.disks[side.index()],
                    side,
                    at + done,
                    piece,
                    &mut buffers[side.index()],
                )?;
            }
            let [first, second] = buffers;
            if first != second {
                let same = first
                    .chunks(STEP)
                    .zip(second.chunks(STEP))
                    .take_while(|(first, second)| first == second)
                    .count();
                let offset = at + done + (same * STEP) as u64;
                return Err((offset, Event::Differs(Difference::Content { offset })));
            }
            done += piece as u64;
        }
        Ok(())
    }

    /// Keeps an event if it is the first on the disk.
    fn note(&self, at: u64, event: Event) {
        let mut known = self.event.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_none_or(|(first, _)| at < *first) {
            *known = Some((at, event));
            self.first_event.fetch_min(at, Ordering::AcqRel);
        }
    }
}

/// The runs of both disks at `at`.
fn statuses(walkers: &mut [Walker<'_>; 2], at: u64, end: u64) -> Result<[Status; 2], (Side, Error)> {
    let [first, second] = walkers;
    let (at, max) = (GuestOffset::new(at), end - at);
    Ok([
        first.status(at, max).map_err(|error| (Side::First, error))?,
        second.status(at, max).map_err(|error| (Side::Second, error))?,
    ])
}

/// Whether two runs need not be read: both zeros, or nobody has either.
fn is_skipped(first: &Status, second: &Status) -> bool {
    first.zero && second.zero
}

fn failed(error: CompareError) -> Event {
    let kind = match &error {
        CompareError::Map { source, .. } | CompareError::Read { source, .. } => source.kind(),
    };
    Event::Failed(Error::new(kind, error))
}

fn read(disk: &Chain, side: Side, offset: u64, len: usize, buffer: &mut Vec<u8>) -> Result<(), (u64, Event)> {
    buffer.resize(len, 0);
    disk.read_at(GuestOffset::new(offset), buffer).map_err(|source| {
        let error = CompareError::Read { side, offset, source };
        (offset, failed(error))
    })
}

/// Demands that a run of one disk reads as zeros.
fn expect_zero(
    disk: &Chain,
    side: Side,
    at: u64,
    len: u64,
    buffer: &mut Vec<u8>,
    job: Job<'_>,
) -> Result<(), (u64, Event)> {
    let mut done = 0;
    while done < len && job.check().is_ok() {
        let piece = usize::try_from(len - done).unwrap_or(PIECE).min(PIECE);
        read(disk, side, at + done, piece, buffer)?;
        if !is_zero(buffer) {
            let zeros = buffer.chunks(STEP).take_while(|step| is_zero(step)).count();
            let offset = at + done + (zeros * STEP) as u64;
            return Err((offset, Event::Differs(Difference::Content { offset })));
        }
        done += piece as u64;
    }
    Ok(())
}

/// The first difference between the rest of the longer disk, from `start`, and zeros.
fn rest_is_zero(disk: &Chain, side: Side, start: u64, job: Job<'_>) -> Result<Option<Difference>> {
    let mut walker = Walker::new(disk);
    let mut buffer = Vec::new();
    let mut at = start;
    while at < disk.virtual_size() {
        job.check()?;
        let status = walker
            .status(GuestOffset::new(at), disk.virtual_size() - at)
            .map_err(|source| {
                let offset = at;
                Error::new(source.kind(), CompareError::Map { side, offset, source })
            })?;
        if status.data && !status.zero {
            match expect_zero(disk, side, at, status.len, &mut buffer, job) {
                Ok(()) => job.check()?,
                Err((_, Event::Differs(difference))) => return Ok(Some(difference)),
                Err((_, Event::Failed(error))) => return Err(error),
            }
        }
        job.observer.advance(status.len);
        at += status.len;
    }
    Ok(None)
}
