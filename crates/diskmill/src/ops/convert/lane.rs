//! Workers: scoped threads that claim chunks in order and hand them to the sink.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use diskmill_core::{Builder, Chain, Error, ForwardSource, Job, Result};

use diskmill_storage::RateLimit;

use super::sink::Sink;
use super::source::{Chunk, Cut, Scanner, Segment, Source, to_usize};
use super::work::{Buffer, Worker};

/// Where chunks come from.
pub(super) enum Feed<'a> {
    /// A source that is mapped.
    Scan(Scanner<'a>),
    /// A stream, read while it is claimed.
    Stream(Stream<'a>),
}

/// A source that only comes in order.
pub(super) struct Stream<'a> {
    source: &'a mut dyn ForwardSource,
    chunk: usize,
    at: u64,
    turn: u64,
    ended: bool,
}

impl<'a> Stream<'a> {
    pub(super) fn new(source: &'a mut dyn ForwardSource, cut: Cut) -> Self {
        Self {
            source,
            chunk: to_usize(cut.chunk),
            at: 0,
            turn: 0,
            ended: false,
        }
    }

    fn next(&mut self, chunk: &mut Chunk, buffer: &mut Buffer) -> Result<bool> {
        chunk.segments.clear();
        chunk.pieces.clear();
        chunk.bytes = self.chunk;
        let buf = buffer.sized(self.chunk);
        let mut have = 0;
        while have < buf.len() && !self.ended {
            let read = self.source.next(buf.get_mut(have..).unwrap_or_default())?;
            self.ended = read == 0;
            have += read;
        }
        if have == 0 {
            return Ok(false);
        }
        buf.get_mut(have..).unwrap_or_default().fill(0);
        // A disk is whole sectors; what the last one lacks is zeros.
        let end = (self.at + have as u64).next_multiple_of(diskmill_core::SECTOR);
        chunk.range = self.at..end;
        chunk.turn = self.turn;
        chunk.segments.push(Segment::Units {
            range: chunk.range.clone(),
            pieces: 0..0,
            offset: 0,
        });
        self.at = end;
        self.turn += 1;
        Ok(true)
    }
}

/// Everything the workers of one conversion share.
pub(super) struct Lane<'a> {
    pub(super) feed: Mutex<Feed<'a>>,
    pub(super) source: &'a Source,
    pub(super) sink: Sink<'a>,
    pub(super) cut: Cut,
    /// What absent parts of a unit read as.
    pub(super) below: Option<&'a Chain>,
    /// Steps that read the same here are left alone.
    pub(super) unless: Option<&'a Chain>,
    /// Units are encoded, not only tested for zeros.
    pub(super) pack: bool,
    pub(super) pace: Option<RateLimit>,
    pub(super) job: Job<'a>,
    pub(super) counters: Counters,
    stop: AtomicBool,
    failure: Mutex<Option<Error>>,
}

/// What has been done so far.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) read: AtomicU64,
    pub(super) stored: AtomicU64,
    pub(super) end: AtomicU64,
}

impl<'a> Lane<'a> {
    pub(super) fn new(
        feed: Mutex<Feed<'a>>,
        source: &'a Source,
        sink: Sink<'a>,
        cut: Cut,
        job: Job<'a>,
    ) -> Self {
        Self {
            feed,
            source,
            sink,
            cut,
            below: None,
            unless: None,
            pack: false,
            pace: None,
            job,
            counters: Counters::default(),
            stop: AtomicBool::new(false),
            failure: Mutex::new(None),
        }
    }

    /// Runs up to `workers` workers until the feed is empty. Returns how many there were.
    pub(super) fn run(&self, workers: NonZeroUsize) -> Result<usize> {
        let mut count = 1;
        thread::scope(|scope| {
            for _ in 1..workers.get() {
                // A thread that the system does not give us is a worker fewer, not a failure.
                let spawned = thread::Builder::new()
                    .stack_size(STACK)
                    .spawn_scoped(scope, || self.work());
                if spawned.is_err() {
                    break;
                }
                count += 1;
            }
            self.work();
        });
        match lock(&self.failure).take() {
            Some(error) => Err(error),
            None => Ok(count),
        }
    }

    /// The builder of a new image, when all is placed.
    pub(super) fn into_builder(self) -> Option<Box<dyn Builder>> {
        match self.sink {
            Sink::New(ordered) => Some(ordered.into_builder()),
            Sink::Existing(_) => None,
        }
    }

    fn work(&self) {
        let guard = StopOnPanic(self);
        if let Err(error) = Worker::new(self).and_then(Worker::run) {
            self.fail(error);
        }
        drop(guard);
    }

    /// Claims the next chunk; false at the end, or once somebody has failed.
    pub(super) fn claim(&self, chunk: &mut Chunk, buffer: &mut Buffer) -> Result<bool> {
        if self.stopped() {
            return Ok(false);
        }
        self.job.check()?;
        match &mut *lock(&self.feed) {
            Feed::Scan(scanner) => scanner.next(chunk),
            Feed::Stream(stream) => stream.next(chunk, buffer),
        }
    }

    /// Whether somebody has failed.
    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn fail(&self, error: Error) {
        lock(&self.failure).get_or_insert(error);
        self.halt();
    }

    fn halt(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.sink.wake_all();
    }
}

/// A worker that panics would leave the others waiting for its turn.
struct StopOnPanic<'a, 'b>(&'a Lane<'b>);

impl Drop for StopOnPanic<'_, '_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.halt();
        }
    }
}

/// Bytes of stack a worker gets: codecs keep their state on the heap, and address space may be limited.
const STACK: usize = 512 << 10;

/// Waits until `limit` lets `bytes` through, or somebody has failed.
pub(super) fn keep_pace(limit: &RateLimit, bytes: u64, lane: &Lane<'_>) -> Result<()> {
    let start = Instant::now();
    let pause = limit.take(bytes, start);
    loop {
        let left = pause.saturating_sub(start.elapsed());
        if left.is_zero() || lane.stopped() {
            return Ok(());
        }
        lane.job.check()?;
        thread::sleep(left.min(Duration::from_millis(50)));
    }
}

/// Locks, also after another thread has panicked: the panic itself is passed on when the threads are joined.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
