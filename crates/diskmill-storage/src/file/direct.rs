//! Reading and writing past the page cache.
//!
//! Offset, length and memory address must suit the file system, so requests that do not are carried in aligned buffers,
//! and blocks that a write covers in part are read, changed and written back. Such a block must not be written by
//! somebody else meanwhile: every write says which bytes it is about and waits for those that overlap.
//!
//! The last block of a file whose length is no multiple of the block cannot be written this way without growing the
//! file, so that block alone goes through the page cache, by a second descriptor of the same file.

use std::fmt;
use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};

use rustix::fs::OFlags;
use rustix::io::{Errno, pread, retry_on_intr};

use super::io::{write_full, write_full_vectored};
use super::{File, Kind};
use crate::buffer::{self, AlignedBuf};
use crate::os;

/// Bytes carried at once in an aligned buffer.
const BOUNCE: usize = 1 << 20;

pub(super) struct Direct {
    /// Alignment in memory.
    memory: u32,
    /// Alignment in the file.
    block: u32,
    busy: Busy,
    buffered: OnceLock<OwnedFd>,
    spare: Mutex<Vec<AlignedBuf>>,
}

impl fmt::Debug for Direct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Direct")
            .field("memory", &self.memory)
            .field("block", &self.block)
            .finish_non_exhaustive()
    }
}

impl Direct {
    pub(super) fn new(fd: BorrowedFd<'_>, kind: Kind) -> Self {
        let usable = |align: &u32| align.is_power_of_two() && (*align as usize) <= AlignedBuf::ALIGN;
        let asked = os::direct_align(fd).filter(|(memory, block)| usable(memory) && usable(block));
        // Without an answer: a device's own sector, and for files what suits any.
        let (memory, block) = asked.unwrap_or(match kind {
            Kind::Device { sector } if usable(&sector) => (sector, sector),
            _ => (AlignedBuf::ALIGN as u32, AlignedBuf::ALIGN as u32),
        });
        Self {
            memory,
            // A read that cannot be cut below a sector suits everybody, even where the host would take single bytes.
            block: block.max(512),
            busy: Busy::default(),
            buffered: OnceLock::new(),
            spare: Mutex::new(Vec::new()),
        }
    }

    pub(super) fn align(&self) -> u32 {
        self.block
    }

    /// Waits until nobody writes in `range`, and keeps others out of it.
    pub(super) fn hold(&self, range: &Range<u64>) -> Held<'_> {
        // A page at least: the write of a last, partial block makes the kernel write back the whole page.
        let step = u64::from(self.block).max(rustix::param::page_size() as u64);
        let start = range.start - range.start % step;
        let end = range.end.checked_next_multiple_of(step).unwrap_or(u64::MAX);
        self.busy.hold(start..end)
    }

    pub(super) fn read(&self, fd: BorrowedFd<'_>, at: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let end = super::end_of(at, buf.len() as u64)?;
        if self.suits(at, buf) {
            return self.read_blocks(fd, at, buf);
        }
        let block = u64::from(self.block);
        let mut carrier = self.carrier();
        let mut pos = at - at % block;
        let mut done = 0;
        while pos < end {
            let window = window_len(pos, end, block);
            let found = self.read_blocks(fd, pos, &mut carrier[..window])?;
            let skip = usize::try_from(at.saturating_sub(pos)).map_err(|_| Errno::FBIG)?;
            let count = found.saturating_sub(skip).min(buf.len() - done);
            buf[done..done + count].copy_from_slice(&carrier[skip..skip + count]);
            done += count;
            if found < window {
                break;
            }
            pos += window as u64;
        }
        self.give_back(carrier);
        Ok(done)
    }

    pub(super) fn write(&self, file: &File, at: u64, bufs: &[IoSlice<'_>]) -> Result<(), Errno> {
        let len = bufs.iter().map(|buf| buf.len() as u64).sum();
        let end = super::end_of(at, len)?;
        let _held = self.hold(&(at..end));
        if at.is_multiple_of(u64::from(self.block))
            && bufs
                .iter()
                .all(|buf| buffer::is_aligned(buf, self.memory) && buffer::is_aligned_len(buf, self.block))
        {
            return match bufs {
                [one] => write_full(file, at, one),
                many => write_full_vectored(file, at, many),
            };
        }
        let mut carrier = self.carrier();
        let answer = self.write_carried(file, at..end, bufs, &mut carrier);
        self.give_back(carrier);
        answer
    }

    /// Writes through the page cache, for what direct I/O cannot do.
    pub(super) fn write_buffered(&self, file: &File, at: u64, buf: &[u8]) -> Result<(), Errno> {
        write_full(self.buffered(file)?, at, buf)
    }

    fn suits(&self, at: u64, buf: &[u8]) -> bool {
        at.is_multiple_of(u64::from(self.block))
            && buffer::is_aligned(buf, self.memory)
            && buffer::is_aligned_len(buf, self.block)
    }

    /// Reads whole blocks until `buf` is full or the file ends, be it within a block.
    fn read_blocks(&self, fd: BorrowedFd<'_>, at: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let mut done = 0;
        while done < buf.len() {
            let count = retry_on_intr(|| pread(fd, &mut buf[done..], at + done as u64))?;
            done += count;
            if count == 0 || !done.is_multiple_of(self.block as usize) {
                break;
            }
        }
        Ok(done)
    }

    fn write_carried(
        &self,
        file: &File,
        range: Range<u64>,
        bufs: &[IoSlice<'_>],
        carrier: &mut [u8],
    ) -> Result<(), Errno> {
        let block = u64::from(self.block);
        let mut source = Gather::new(bufs);
        let mut pos = range.start - range.start % block;
        while pos < range.end {
            let window = window_len(pos, range.end, block);
            let stop = pos + window as u64;
            let from = range.start.max(pos);
            let to = range.end.min(stop);
            let last = stop - block;
            // A partial last block that the file does not have in full must not be written in full.
            let cut = to < stop && stop > file.current_len();
            let direct_end = if cut { last.max(from) } else { to };
            if from > pos && !(cut && last == pos) {
                self.read_old(file, pos, &mut carrier[..self.block as usize])?;
            }
            let tail = offset(last, pos);
            if to < stop && !cut && !(last == pos && from > pos) {
                self.read_old(file, last, &mut carrier[tail..window])?;
            }
            source.copy(&mut carrier[offset(from, pos)..offset(direct_end, pos)]);
            if cut {
                if last > pos {
                    write_full(file, pos, &carrier[..tail])?;
                }
                let rest = &mut carrier[..offset(to, direct_end)];
                source.copy(rest);
                self.write_buffered(file, direct_end, rest)?;
            } else {
                write_full(file, pos, &carrier[..window])?;
            }
            pos = stop;
        }
        Ok(())
    }

    /// What a block holds now; zeros past the end of the file.
    fn read_old(&self, file: &File, at: u64, block: &mut [u8]) -> Result<(), Errno> {
        let found = self.read_blocks(file.as_fd(), at, block)?;
        block[found..].fill(0);
        Ok(())
    }

    fn buffered(&self, file: &File) -> Result<BorrowedFd<'_>, Errno> {
        if let Some(fd) = self.buffered.get() {
            return Ok(fd.as_fd());
        }
        let through = if file.cache.is_through() {
            OFlags::DSYNC
        } else {
            OFlags::empty()
        };
        let fd = os::reopen(file.as_fd(), OFlags::RDWR | through)?;
        Ok(self.buffered.get_or_init(|| fd).as_fd())
    }

    /// Whether any request has needed an aligned buffer.
    #[cfg(test)]
    pub(super) fn has_carried(&self) -> bool {
        !self
            .spare
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_empty()
    }

    fn carrier(&self) -> AlignedBuf {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        spare.unwrap_or_else(|| AlignedBuf::new(BOUNCE))
    }

    fn give_back(&self, carrier: AlignedBuf) {
        self.spare
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(carrier);
    }
}

/// Bytes of whole blocks from `pos` that hold the bytes up to `end`, at most one carrier full.
fn window_len(pos: u64, end: u64, block: u64) -> usize {
    let stop = end.checked_next_multiple_of(block).unwrap_or(end);
    usize::try_from(stop - pos).unwrap_or(BOUNCE).min(BOUNCE)
}

/// Where `at` is in a carrier that starts at `base`. Both are within one window.
fn offset(at: u64, base: u64) -> usize {
    usize::try_from(at.saturating_sub(base))
        .unwrap_or(BOUNCE)
        .min(BOUNCE)
}

/// Takes bytes from slices in order.
struct Gather<'a> {
    bufs: &'a [IoSlice<'a>],
    skip: usize,
}

impl<'a> Gather<'a> {
    fn new(bufs: &'a [IoSlice<'a>]) -> Self {
        Self { bufs, skip: 0 }
    }

    fn copy(&mut self, mut to: &mut [u8]) {
        while let ([first, rest @ ..], false) = (self.bufs, to.is_empty()) {
            let from = &first[self.skip..];
            let count = from.len().min(to.len());
            let (now, later) = to.split_at_mut(count);
            now.copy_from_slice(&from[..count]);
            to = later;
            self.skip += count;
            if self.skip == first.len() {
                self.bufs = rest;
                self.skip = 0;
            }
        }
    }
}

/// Ranges that somebody is writing.
#[derive(Default)]
struct Busy {
    held: Mutex<Vec<Range<u64>>>,
    freed: Condvar,
}

impl Busy {
    fn hold(&self, range: Range<u64>) -> Held<'_> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        while held
            .iter()
            .any(|other| other.start < range.end && range.start < other.end)
        {
            held = self.freed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        held.push(range.clone());
        Held { busy: self, range }
    }
}

/// Keeps others out of a range until it is dropped.
pub(super) struct Held<'a> {
    busy: &'a Busy,
    range: Range<u64>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut held = self.busy.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = held.iter().position(|range| *range == self.range) {
            held.swap_remove(index);
        }
        drop(held);
        self.busy.freed.notify_all();
    }
}
