//! Zeroing, discarding, reserving and resizing: whatever way the host knows, remembering which it does not.

use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use diskmill_core::{HostRun, Result, ZeroHow};
use rustix::fs::ftruncate;
use rustix::io::{Errno, retry_on_intr};

use super::direct::Held;
use super::io::write_full;
use super::{Call, File, Kind, end_of};
use crate::buffer::zeros;
use crate::{CannotGrow, device, os};

/// Slices of zeros in one write: 1 MiB.
const ZERO_SLICES: usize = 16;

impl File {
    pub(super) fn make_zero(&self, range: Range<u64>, how: ZeroHow) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let answer = match self.kind {
            Kind::Regular => end_of(range.end, 0).and_then(|_| self.zero_file(&range, how)),
            Kind::Device { sector } => self.zero_device(&range, sector, how),
        };
        self.finish_change("zero", &range, answer)
    }

    pub(super) fn give_back(&self, range: Range<u64>) -> Result<()> {
        let range = range.start..range.end.min(self.current_len());
        if range.is_empty() {
            return Ok(());
        }
        let answer = match self.kind {
            Kind::Regular => self.attempt(Call::Punch, &range),
            Kind::Device { sector } => self.attempt(Call::Discard, &device::whole_sectors(&range, sector)),
        };
        self.finish_change("discard", &range, answer.map(drop))
    }

    pub(super) fn reserve(&self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let answer = match self.kind {
            Kind::Regular => end_of(range.end, 0).and_then(|_| self.reserve_file(&range)),
            Kind::Device { .. } if range.end > self.current_len() => Err(Errno::NOSPC),
            Kind::Device { .. } => Ok(()),
        };
        self.finish_change("allocate", &range, answer)
    }

    pub(super) fn resize(&self, len: u64) -> Result<()> {
        if let Kind::Device { .. } = self.kind {
            let own = self.current_len();
            if len <= own {
                return Ok(());
            }
            return Err(CannotGrow::error(own, len).path(&self.path));
        }
        let _held = self.hold(&(0..u64::MAX));
        end_of(len, 0)
            .and_then(|_| retry_on_intr(|| ftruncate(self, len)))
            .map_err(|errno| self.fail("resize", None, errno))?;
        self.len.store(len, Ordering::Release);
        self.changed();
        self.through()
    }

    /// Ends a change that was not a write: the length and what is known of holes follow it.
    fn finish_change(&self, op: &'static str, range: &Range<u64>, answer: Result<(), Errno>) -> Result<()> {
        self.changed();
        if let Err(errno) = answer {
            self.refresh()?;
            return Err(self.fail(op, Some(range.start), errno));
        }
        self.through()
    }

    fn through(&self) -> Result<()> {
        if self.cache.is_through() {
            self.sync_always()
        } else {
            Ok(())
        }
    }

    fn hold(&self, range: &Range<u64>) -> Option<Held<'_>> {
        self.direct.as_ref().map(|direct| direct.hold(range))
    }

    /// One of the calls for a range, unless it is known to be missing. `Ok(false)`: another way must be taken.
    fn attempt(&self, call: Call, range: &Range<u64>) -> Result<bool, Errno> {
        if range.is_empty() {
            return Ok(true);
        }
        if self.lacks(call) {
            return Ok(false);
        }
        let _held = self.hold(range);
        let (fd, at, len) = (self.as_fd(), range.start, range.end - range.start);
        let answer = retry_on_intr(|| match call {
            Call::Punch => os::punch(fd, at, len),
            Call::ZeroRange => os::zero_range(fd, at, len),
            Call::Reserve => os::reserve(fd, at, len),
            Call::Discard => os::device_discard(fd, at, len),
            Call::DeviceZero => os::device_zero(fd, at, len),
            Call::Seek => Err(Errno::NOSYS),
        });
        self.supported(call, answer)
    }

    fn zero_file(&self, range: &Range<u64>, how: ZeroHow) -> Result<(), Errno> {
        let len = self.current_len();
        let inside = range.start.min(len)..range.end.min(len);
        match how {
            ZeroHow::MayUnmap => {
                if range.end > len {
                    self.grow_by_touch(range.end)?;
                    // The block that was touched goes again; where it cannot, it is one block.
                    if self.attempt(Call::Punch, range)? {
                        return Ok(());
                    }
                }
                if self.attempt(Call::Punch, &inside)? || self.attempt(Call::ZeroRange, &inside)? {
                    return Ok(());
                }
                self.write_zeros(&inside)
            }
            ZeroHow::KeepAllocated => {
                if self.attempt(Call::ZeroRange, range)? {
                    self.grown(range.end);
                    return Ok(());
                }
                if self.attempt(Call::Punch, &inside)? && self.attempt(Call::Reserve, range)? {
                    self.grown(range.end);
                    return Ok(());
                }
                self.write_zeros(range)
            }
        }
    }

    fn zero_device(&self, range: &Range<u64>, sector: u32, how: ZeroHow) -> Result<(), Errno> {
        if range.end > self.current_len() {
            return Err(Errno::NOSPC);
        }
        let middle = device::whole_sectors(range, sector);
        let done = match how {
            ZeroHow::MayUnmap => {
                self.attempt(Call::Punch, &middle)? || self.attempt(Call::ZeroRange, &middle)?
            }
            ZeroHow::KeepAllocated => self.attempt(Call::ZeroRange, &middle)?,
        };
        if middle.is_empty() || !(done || self.attempt(Call::DeviceZero, &middle)?) {
            return self.write_zeros(range);
        }
        self.write_zeros(&(range.start..middle.start))?;
        self.write_zeros(&(middle.end..range.end))
    }

    /// Grows the file by a byte written at its new end. Unlike setting the length this cannot cut off what somebody
    /// else has just written behind it.
    fn grow_by_touch(&self, end: u64) -> Result<(), Errno> {
        let last = end - 1;
        match &self.direct {
            Some(direct) => {
                let _held = direct.hold(&(last..end));
                direct.write_buffered(self, last, &[0])?;
            }
            None => write_full(self, last, &[0])?,
        }
        self.grown(end);
        Ok(())
    }

    fn reserve_file(&self, range: &Range<u64>) -> Result<(), Errno> {
        if self.attempt(Call::Reserve, range)? {
            self.grown(range.end);
            return Ok(());
        }
        // The slow way: zeros where the host says there is a hole. A file system that has no holes says data.
        let mut at = range.start;
        while at < range.end {
            let run = self.find_run(at).map_err(|_| Errno::IO)?;
            let (len, hole) = match run {
                HostRun::Hole(len) => (len, true),
                HostRun::Data(len) => (len, false),
                _ => return Err(Errno::OPNOTSUPP),
            };
            let end = at.saturating_add(len).min(range.end);
            if hole {
                self.write_zeros(&(at..end))?;
            }
            at = end;
        }
        Ok(())
    }

    fn write_zeros(&self, range: &Range<u64>) -> Result<(), Errno> {
        let zeros = zeros();
        let mut at = range.start;
        while at < range.end {
            let mut slices = [IoSlice::new(zeros); ZERO_SLICES];
            let mut count = 0;
            let mut next = at;
            for slice in &mut slices {
                let len = usize::try_from(range.end - next)
                    .unwrap_or(usize::MAX)
                    .min(zeros.len());
                if len == 0 {
                    break;
                }
                *slice = IoSlice::new(&zeros[..len]);
                next += len as u64;
                count += 1;
            }
            self.write_slices(at, &slices[..count])?;
            at = next;
        }
        Ok(())
    }
}
