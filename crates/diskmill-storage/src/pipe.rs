//! What can only be read or written in order: standard input, standard output, any pipe.

use std::fmt;
use std::io::{self, ErrorKind as IoErrorKind, IoSlice, Read, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use diskmill_core::{
    Error, ErrorKind, ForwardSource, Hints, HostOffset, HostRun, RawFile, Result, Storage, StorageMut,
    ZeroHow,
};

use crate::buffer::zeros;

/// A target that takes bytes in rising order and keeps none.
///
/// A gap between two writes is filled with zeros, and so is what [`StorageMut::set_len`] promised but nobody wrote:
/// that happens in [`finish`](Self::finish) or [`StorageMut::sync`], one of which must be called at the end. What has
/// gone out cannot be read, changed or taken back.
pub struct PipeOut {
    state: Mutex<State>,
}

struct State {
    to: Box<dyn Write + Send>,
    /// Bytes that have gone out.
    sent: u64,
    /// The length that was promised.
    len: u64,
}

impl PipeOut {
    /// A target that writes to `to`, which should not buffer.
    pub fn new(to: impl Write + Send + 'static) -> Self {
        Self {
            state: Mutex::new(State {
                to: Box::new(to),
                sent: 0,
                len: 0,
            }),
        }
    }

    /// A target that writes to standard output, past the standard library's line buffer.
    pub fn stdout() -> Result<Self> {
        Ok(Self::new(Patient(duplicate(io::stdout())?)))
    }

    /// Sends the zeros that are still owed and passes on what `to` may have buffered.
    pub fn finish(&self) -> Result<()> {
        let mut state = self.lock();
        let end = state.len;
        state.fill_to(end)?;
        state.to.flush().map_err(write_error)
    }

    /// Bytes that have gone out.
    pub fn sent(&self) -> u64 {
        self.lock().sent
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for PipeOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PipeOut")
            .field("sent", &self.lock().sent)
            .finish()
    }
}

impl State {
    fn fill_to(&mut self, end: u64) -> Result<()> {
        let zeros = zeros();
        while self.sent < end {
            let len = usize::try_from(end - self.sent)
                .unwrap_or(usize::MAX)
                .min(zeros.len());
            self.send(&zeros[..len])?;
        }
        Ok(())
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.to.write_all(bytes).map_err(write_error)?;
        self.sent = self.sent.saturating_add(bytes.len() as u64);
        self.len = self.len.max(self.sent);
        Ok(())
    }

    /// Fills the gap up to `at`, or refuses to go back.
    fn advance_to(&mut self, at: HostOffset) -> Result<()> {
        if at.get() < self.sent {
            let text = format!("offset {at} has gone out already: {} bytes have", self.sent);
            return Err(Error::new(ErrorKind::Usage, text).op("write").host(at));
        }
        self.fill_to(at.get())
    }
}

fn write_error(error: io::Error) -> Error {
    Error::from(error).op("write")
}

fn not_readable() -> Error {
    Error::new(ErrorKind::Unsupported, "what has gone into a pipe cannot be read").op("read")
}

impl Storage for PipeOut {
    fn len(&self) -> Result<u64> {
        Ok(self.lock().len)
    }

    fn hints(&self) -> Hints {
        let mut hints = Hints::default();
        hints.append_only = true;
        hints
    }

    fn read_at(&self, _: HostOffset, _: &mut [u8]) -> Result<()> {
        Err(not_readable())
    }

    fn run_at(&self, at: HostOffset) -> Result<HostRun> {
        let len = self.lock().len;
        Ok(match len.checked_sub(at.get()) {
            Some(rest @ 1..) => HostRun::Data(rest),
            _ => HostRun::Hole((u64::MAX - at.get()).max(1)),
        })
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn raw_file(&self) -> Option<RawFile<'_>> {
        None
    }

    fn read_padded(&self, _: HostOffset, _: &mut [u8]) -> Result<()> {
        Err(not_readable())
    }
}

impl StorageMut for PipeOut {
    fn write_at(&self, at: HostOffset, buf: &[u8]) -> Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let mut state = self.lock();
        state.advance_to(at)?;
        state.send(buf)
    }

    fn write_vectored_at(&self, at: HostOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        if bufs.iter().all(|buf| buf.is_empty()) {
            return Ok(());
        }
        let mut state = self.lock();
        state.advance_to(at)?;
        bufs.iter().try_for_each(|buf| state.send(buf))
    }

    fn zero(&self, range: Range<HostOffset>, _: ZeroHow) -> Result<()> {
        if range.start >= range.end {
            return Ok(());
        }
        let mut state = self.lock();
        state.advance_to(range.start)?;
        state.fill_to(range.end.get())
    }

    fn discard(&self, _: Range<HostOffset>) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, range: Range<HostOffset>) -> Result<()> {
        let mut state = self.lock();
        if range.start < range.end {
            state.len = state.len.max(range.end.get());
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let mut state = self.lock();
        if len < state.sent {
            let text = format!(
                "a length of {len} bytes is less than the {} that have gone out",
                state.sent
            );
            return Err(Error::new(ErrorKind::Usage, text).op("resize"));
        }
        state.len = len;
        Ok(())
    }

    /// Sends the zeros that are still owed. What a pipe's reader does with them is not ours to make durable.
    fn sync(&self) -> Result<()> {
        self.finish()
    }
}

/// A source that is read in order.
pub struct PipeIn {
    from: Box<dyn Read + Send>,
}

impl PipeIn {
    /// A source that reads from `from`.
    pub fn new(from: impl Read + Send + 'static) -> Self {
        Self { from: Box::new(from) }
    }

    /// A source that reads standard input, past the standard library's buffer.
    pub fn stdin() -> Result<Self> {
        Ok(Self::new(Patient(duplicate(io::stdin())?)))
    }
}

impl fmt::Debug for PipeIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PipeIn")
    }
}

impl ForwardSource for PipeIn {
    /// Fills all of `buf` unless the source ends.
    fn next(&mut self, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.from.read(&mut buf[done..]) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == IoErrorKind::Interrupted => {}
                Err(error) => return Err(Error::from(error).op("read")),
            }
        }
        Ok(done)
    }
}

fn duplicate(stream: impl AsFd) -> Result<std::fs::File> {
    Ok(stream.as_fd().try_clone_to_owned().map_err(Error::from)?.into())
}

/// A stream that waits where it could not: whoever started us may have set the other end not to block.
struct Patient(std::fs::File);

impl Patient {
    fn retry<T>(
        &mut self,
        ready: rustix::event::PollFlags,
        mut call: impl FnMut(&mut std::fs::File) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match call(&mut self.0) {
                Err(error) if error.kind() == IoErrorKind::WouldBlock => {
                    let mut wait = [rustix::event::PollFd::new(&self.0, ready)];
                    rustix::io::retry_on_intr(|| rustix::event::poll(&mut wait, None))?;
                }
                answer => return answer,
            }
        }
    }
}

impl Read for Patient {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.retry(rustix::event::PollFlags::IN, |file| file.read(buf))
    }
}

impl Write for Patient {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.retry(rustix::event::PollFlags::OUT, |file| file.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::fs::{OFlags, fcntl_setfl};

    use super::*;

    #[test]
    fn a_stream_that_does_not_block_is_waited_for() {
        let (reader, writer) = io::pipe().unwrap();
        for end in [reader.as_fd(), writer.as_fd()] {
            fcntl_setfl(end, OFlags::NONBLOCK).unwrap();
        }
        let [reader, writer] = [OwnedFd::from(reader), OwnedFd::from(writer)].map(|end| Patient(end.into()));
        // More than a pipe holds, so that each side has to wait for the other.
        let bytes: Vec<u8> = (0..1_000_000_u32).map(|number| (number % 251) as u8).collect();
        let mut found = vec![0; bytes.len() + 1];
        let count = std::thread::scope(|scope| {
            scope.spawn(|| PipeOut::new(writer).write_at(HostOffset::ZERO, &bytes).unwrap());
            PipeIn::new(reader).next(&mut found).unwrap()
        });
        assert_eq!(count, bytes.len());
        assert!(found[..count] == bytes);
    }
}
