//! Measuring how fast an image answers.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use diskmill_core::{Error, ErrorKind, GuestOffset, Job, Result};
use diskmill_storage::AlignedBuf;

use crate::device::Device;
use crate::open::{self, OpenRequest, OpenWarning};

/// A measurement that is wanted: requests of one size, one behind the other, so many at a time.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BenchRequest {
    /// The image.
    pub open: OpenRequest,
    /// How many requests.
    pub count: NonZeroU64,
    /// How many at a time, at most.
    pub depth: NonZeroUsize,
    /// Bytes of each.
    pub len: NonZeroUsize,
    /// Bytes from the start of one to the start of the next.
    pub step: u64,
    /// Where the first starts.
    pub offset: u64,
    /// Write this byte instead of reading.
    pub write: Option<u8>,
    /// Flush after so many requests.
    pub flush_interval: Option<NonZeroU64>,
    /// Flush while other requests are under way.
    pub no_drain: bool,
}

impl BenchRequest {
    /// 75000 reads of 4096 bytes, 64 at a time, from the start on.
    pub fn new(open: OpenRequest) -> Self {
        Self {
            open,
            count: NonZeroU64::MIN.saturating_add(74_999),
            depth: NonZeroUsize::MIN.saturating_add(63),
            len: NonZeroUsize::MIN.saturating_add(4095),
            step: 4096,
            offset: 0,
            write: None,
            flush_interval: None,
            no_drain: false,
        }
    }
}

/// Threads at most, however many requests are wanted at a time.
const MOST_THREADS: usize = 256;
/// Bytes all of their buffers may have together, unless one alone has more.
const MOST_BYTES: usize = 1 << 30;
/// Bytes of stack each needs: what formats keep there.
const STACK: usize = 512 << 10;

/// An image that is ready to be measured.
#[derive(Debug)]
pub struct Bench<'a> {
    request: &'a BenchRequest,
    device: Device,
}

impl<'a> Bench<'a> {
    /// Opens the image. Warnings go to `warn`.
    pub fn open(request: &'a BenchRequest, warn: &mut dyn FnMut(&OpenWarning)) -> Result<Self> {
        let device = match request.write {
            None => Device::from(open::image(&request.open)?),
            Some(_) => {
                let image = open::image_mut(&request.open)?;
                image.warnings.iter().for_each(warn);
                Device::from(image)
            }
        };
        Ok(Self { request, device })
    }

    /// Makes all requests and returns how long they took.
    pub fn run(&self, job: Job<'_>) -> Result<Duration> {
        job.observer.total(self.request.count.get());
        let began = Instant::now();
        let count = self.request.count.get();
        match self.request.flush_interval {
            Some(every) if !self.request.no_drain => {
                let mut done = 0;
                while done < count {
                    let end = done.saturating_add(every.get()).min(count);
                    self.requests(done, end, None, job)?;
                    if end - done == every.get() {
                        self.device.flush()?;
                    }
                    done = end;
                }
            }
            every => self.requests(0, count, every, job)?,
        }
        Ok(began.elapsed())
    }

    /// Makes requests `first` to `end`, flushing after each `every` of them.
    fn requests(&self, first: u64, end: u64, every: Option<NonZeroU64>, job: Job<'_>) -> Result<()> {
        let next = AtomicU64::new(first);
        let failure = Mutex::new(None);
        let work = || {
            if let Err(error) = self.work(&next, end, every, job) {
                next.store(end, Ordering::Relaxed);
                let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert(error);
            }
        };
        let wanted = usize::try_from(end - first).unwrap_or(usize::MAX);
        let fitting = (MOST_BYTES / self.request.len.get()).clamp(1, MOST_THREADS);
        let threads = self.request.depth.get().min(wanted).min(fitting);
        thread::scope(|scope| {
            for _ in 1..threads {
                // A thread that the system does not give us is a request fewer at a time.
                let spawned = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work);
                if spawned.is_err() {
                    break;
                }
            }
            work();
        });
        match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn work(&self, next: &AtomicU64, end: u64, every: Option<NonZeroU64>, job: Job<'_>) -> Result<()> {
        let mut buf = AlignedBuf::new(self.request.len.get());
        if let Some(byte) = self.request.write {
            buf.fill(byte);
        }
        loop {
            job.check()?;
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= end {
                return Ok(());
            }
            let at = self.place(index)?;
            match self.request.write {
                None => self.device.read_at(at, &mut buf)?,
                Some(_) => self.device.write_at(at, &buf)?,
            }
            if every.is_some_and(|every| (index + 1).is_multiple_of(every.get())) {
                self.device.flush()?;
            }
            job.observer.advance(1);
        }
    }

    /// Where request `index` starts: behind the end of the disk they go on at its start.
    fn place(&self, index: u64) -> Result<GuestOffset> {
        if index == 0 {
            return Ok(GuestOffset::new(self.request.offset));
        }
        let at = u128::from(self.request.offset) + u128::from(index) * u128::from(self.request.step);
        let at = at.checked_rem(u128::from(self.device.size()));
        at.and_then(|at| u64::try_from(at).ok())
            .map(GuestOffset::new)
            .ok_or_else(|| Error::new(ErrorKind::Usage, "the disk is empty"))
    }
}
