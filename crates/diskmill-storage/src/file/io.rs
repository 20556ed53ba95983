//! Reading and writing at a position, through the page cache.

use std::io::IoSlice;
use std::os::fd::AsFd;

use diskmill_core::Result;
use rustix::io::{Errno, pread, pwrite, pwritev, retry_on_intr};

use super::{File, end_of};

/// Slices the kernel takes in one vectored call (`IOV_MAX`).
const VECTOR: usize = 1024;

impl File {
    /// Fills `buf` from `at` as far as the file goes, and answers how far that was.
    pub(super) fn read_some(&self, at: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        match &self.direct {
            Some(direct) => direct.read(self.as_fd(), at, buf),
            None => read_full(self.as_fd(), at, buf),
        }
    }

    pub(super) fn write_all(&self, at: u64, buf: &[u8]) -> Result<()> {
        let end = end_of(at, buf.len() as u64).map_err(|errno| self.fail("write", Some(at), errno))?;
        let answer = match &self.direct {
            Some(direct) => direct.write(self, at, &[IoSlice::new(buf)]),
            None => write_full(self, at, buf),
        };
        self.written(at, end, answer)
    }

    pub(super) fn write_all_vectored(&self, at: u64, bufs: &[IoSlice<'_>]) -> Result<()> {
        let len = bufs.iter().map(|buf| buf.len() as u64).sum();
        let end = end_of(at, len).map_err(|errno| self.fail("write", Some(at), errno))?;
        if len == 0 {
            return Ok(());
        }
        let answer = self.write_slices(at, bufs);
        self.written(at, end, answer)
    }

    /// Writes, and leaves what follows from it to the caller but for the length.
    pub(super) fn write_slices(&self, at: u64, bufs: &[IoSlice<'_>]) -> Result<(), Errno> {
        let len = bufs.iter().map(|buf| buf.len() as u64).sum();
        let end = end_of(at, len)?;
        match &self.direct {
            Some(direct) => direct.write(self, at, bufs)?,
            None => write_full_vectored(self, at, bufs)?,
        }
        self.grown(end);
        Ok(())
    }

    fn written(&self, at: u64, end: u64, answer: Result<(), Errno>) -> Result<()> {
        match answer {
            Ok(()) => {
                self.grown(end);
                self.changed();
                Ok(())
            }
            Err(errno) => {
                // Part of it may be there.
                self.refresh()?;
                Err(self.fail("write", Some(at), errno))
            }
        }
    }
}

/// Reads until `buf` is full or the file ends.
pub(super) fn read_full(fd: impl AsFd, at: u64, buf: &mut [u8]) -> Result<usize, Errno> {
    let mut done = 0;
    while done < buf.len() {
        let at = end_of(at, done as u64)?;
        match retry_on_intr(|| pread(&fd, &mut buf[done..], at))? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

pub(super) fn write_full(fd: impl AsFd, mut at: u64, mut buf: &[u8]) -> Result<(), Errno> {
    while !buf.is_empty() {
        let count = progress(retry_on_intr(|| pwrite(&fd, buf, at))?)?;
        buf = &buf[count..];
        at += count as u64;
    }
    Ok(())
}

pub(super) fn write_full_vectored(fd: impl AsFd, mut at: u64, bufs: &[IoSlice<'_>]) -> Result<(), Errno> {
    for group in bufs.chunks(VECTOR) {
        let len: usize = group.iter().map(|buf| buf.len()).sum();
        if len == 0 {
            continue;
        }
        let mut count = progress(retry_on_intr(|| pwritev(&fd, group, at))?)?;
        at += count as u64;
        // What a short write left over goes slice by slice: it is rare, and the slices are not ours to advance.
        for buf in group {
            let skip = count.min(buf.len());
            count -= skip;
            write_full(&fd, at, &buf[skip..])?;
            at += (buf.len() - skip) as u64;
        }
    }
    Ok(())
}

/// A write that takes nothing and says nothing would be tried for ever.
fn progress(count: usize) -> Result<usize, Errno> {
    if count == 0 { Err(Errno::IO) } else { Ok(count) }
}
