//! Reading and writing at a position, through the page cache.

use std::io::IoSlice;
use std::os::fd::AsFd;

use diskmill_core::Result;
use rustix::io::{Errno, pread, pwrite, pwritev};

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
    fill(at, buf, |rest, at| pread(&fd, rest, at))
}

pub(super) fn write_full(fd: impl AsFd, at: u64, buf: &[u8]) -> Result<(), Errno> {
    drain(at, buf, |rest, at| pwrite(&fd, rest, at))
}

pub(super) fn write_full_vectored(fd: impl AsFd, at: u64, bufs: &[IoSlice<'_>]) -> Result<(), Errno> {
    drain_vectored(at, bufs, |bufs, at| pwritev(&fd, bufs, at))
}

/// Calls `read` until `buf` is full or it answers 0, and says how much there was.
fn fill(
    at: u64,
    buf: &mut [u8],
    mut read: impl FnMut(&mut [u8], u64) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    let mut done = 0;
    while done < buf.len() {
        match read(&mut buf[done..], end_of(at, done as u64)?) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

/// Calls `write` until all of `buf` is gone.
fn drain(
    mut at: u64,
    mut buf: &[u8],
    mut write: impl FnMut(&[u8], u64) -> Result<usize, Errno>,
) -> Result<(), Errno> {
    while !buf.is_empty() {
        match write(buf, at) {
            // A write that takes nothing and says nothing would be tried for ever.
            Ok(0) => return Err(Errno::IO),
            Ok(count) => {
                buf = &buf[count..];
                at += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Calls `write` until all of `bufs` is gone.
fn drain_vectored(
    mut at: u64,
    bufs: &[IoSlice<'_>],
    mut write: impl FnMut(&[IoSlice<'_>], u64) -> Result<usize, Errno>,
) -> Result<(), Errno> {
    for group in bufs.chunks(VECTOR) {
        if group.iter().all(|buf| buf.is_empty()) {
            continue;
        }
        let mut count = loop {
            match write(group, at) {
                Ok(0) => return Err(Errno::IO),
                Ok(count) => break count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        };
        at += count as u64;
        // What a short write left over goes slice by slice: it is rare, and the slices are not ours to advance.
        for buf in group {
            let skip = count.min(buf.len());
            count -= skip;
            let rest = &buf[skip..];
            drain(at, rest, |rest, at| write(&[IoSlice::new(rest)], at))?;
            at += rest.len() as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers as a host that is interrupted every other time and does at most `most` bytes at once.
    fn reluctant(most: usize) -> impl FnMut(usize) -> Result<usize, Errno> {
        let mut calls = 0;
        move |len| {
            calls += 1;
            if calls % 2 == 1 {
                Err(Errno::INTR)
            } else {
                Ok(len.min(most))
            }
        }
    }

    #[test]
    fn short_and_interrupted_calls_are_carried_on() {
        let bytes: Vec<u8> = (0..200).collect();
        for most in [1, 7, 64, 199, 200, 300] {
            let mut found = vec![0; 300];
            let mut answer = reluctant(most);
            let read = |rest: &mut [u8], at: u64| {
                let from = &bytes[(at as usize - 1000).min(200)..];
                let count = answer(rest.len().min(from.len()))?;
                rest[..count].copy_from_slice(&from[..count]);
                Ok(count)
            };
            assert_eq!(fill(1000, &mut found, read), Ok(200));
            assert_eq!(found[..200], bytes);

            let mut file = vec![0; 1300];
            let mut answer = reluctant(most);
            drain(1000, &bytes, |rest, at| {
                let count = answer(rest.len())?;
                file[at as usize..at as usize + count].copy_from_slice(&rest[..count]);
                Ok(count)
            })
            .unwrap();
            assert_eq!(file[1000..1200], bytes);

            let mut file = vec![0; 1300];
            let mut answer = reluctant(most);
            let slices: Vec<_> = [&bytes[..0], &bytes[..50], &[], &bytes[50..51], &bytes[51..]]
                .into_iter()
                .map(IoSlice::new)
                .collect();
            drain_vectored(1000, &slices, |bufs, at| {
                let joined: Vec<u8> = bufs.iter().flat_map(|buf| buf.to_vec()).collect();
                let count = answer(joined.len())?;
                file[at as usize..at as usize + count].copy_from_slice(&joined[..count]);
                Ok(count)
            })
            .unwrap();
            assert_eq!(file[1000..1200], bytes);
            assert!(file[..1000].iter().chain(&file[1200..]).all(|byte| *byte == 0));
        }
    }

    #[test]
    fn a_write_that_takes_nothing_is_an_error() {
        assert_eq!(drain(0, b"x", |_, _| Ok(0)), Err(Errno::IO));
        assert_eq!(
            drain_vectored(0, &[IoSlice::new(b"x")], |_, _| Ok(0)),
            Err(Errno::IO)
        );
        assert_eq!(drain(0, b"x", |_, _| Err(Errno::NOSPC)), Err(Errno::NOSPC));
    }
}
