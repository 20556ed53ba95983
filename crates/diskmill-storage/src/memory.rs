//! Bytes in memory.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use diskmill_core::{
    Error, ErrorKind, Hints, HostOffset, HostRun, RawFile, Result, Storage, StorageMut, ZeroHow,
};

/// Bytes in a page.
const PAGE: u64 = 4096;

type Page = Box<[u8; PAGE as usize]>;

/// A storage in memory. Only pages that were written take space, so it may be terabytes long.
#[derive(Default)]
pub struct Memory {
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    len: u64,
    /// By number. Bytes past `len` are zeros.
    pages: BTreeMap<u64, Page>,
}

impl Memory {
    /// An empty storage.
    pub fn new() -> Self {
        Self::default()
    }

    /// A storage of `len` zeros.
    pub fn zeroed(len: u64) -> Self {
        Self {
            state: RwLock::new(State {
                len,
                pages: BTreeMap::new(),
            }),
        }
    }

    /// All its bytes. An error of kind [`ErrorKind::NoSpace`] if they do not fit in memory.
    pub fn to_vec(&self) -> Result<Vec<u8>> {
        let state = self.read();
        let mut bytes = Vec::new();
        let len = usize::try_from(state.len).map_err(|error| Error::new(ErrorKind::NoSpace, error))?;
        bytes
            .try_reserve_exact(len)
            .map_err(|error| Error::new(ErrorKind::NoSpace, error))?;
        bytes.resize(len, 0);
        state.copy_out(0, &mut bytes);
        Ok(bytes)
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<Vec<u8>> for Memory {
    fn from(bytes: Vec<u8>) -> Self {
        Self::from(bytes.as_slice())
    }
}

impl From<&[u8]> for Memory {
    fn from(bytes: &[u8]) -> Self {
        let mut state = State {
            len: bytes.len() as u64,
            pages: BTreeMap::new(),
        };
        state.copy_in(0, bytes);
        Self {
            state: RwLock::new(state),
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.read();
        f.debug_struct("Memory")
            .field("len", &state.len)
            .field("pages", &state.pages.len())
            .finish()
    }
}

impl State {
    fn copy_out(&self, at: u64, buf: &mut [u8]) {
        each_page(at, buf.len(), |number, within, part| {
            let to = &mut buf[part];
            match self.pages.get(&number) {
                Some(page) => to.copy_from_slice(&page[within]),
                None => to.fill(0),
            }
        });
    }

    fn copy_in(&mut self, at: u64, buf: &[u8]) {
        each_page(at, buf.len(), |number, within, part| {
            let page = self
                .pages
                .entry(number)
                .or_insert_with(|| Box::new([0; PAGE as usize]));
            page[within].copy_from_slice(&buf[part]);
        });
    }

    /// Zeros what there is in `range`, dropping whole pages.
    fn clear(&mut self, range: &Range<u64>) {
        let first = range.start.div_ceil(PAGE);
        let end = range.end / PAGE;
        let partial = |number: u64, pages: &mut BTreeMap<u64, Page>| {
            if let Some(page) = pages.get_mut(&number) {
                let base = number * PAGE;
                let from = range.start.max(base) - base;
                let to = range.end.min(base.saturating_add(PAGE)) - base;
                page[from as usize..to as usize].fill(0);
            }
        };
        if first > end {
            partial(end, &mut self.pages);
            return;
        }
        if !range.start.is_multiple_of(PAGE) {
            partial(first - 1, &mut self.pages);
        }
        if !range.end.is_multiple_of(PAGE) {
            partial(end, &mut self.pages);
        }
        let doomed: Vec<u64> = self.pages.range(first..end).map(|(number, _)| *number).collect();
        for number in doomed {
            self.pages.remove(&number);
        }
    }
}

/// Calls `each` with page number, place in the page and place in the request for `len` bytes from `at`.
fn each_page(at: u64, len: usize, mut each: impl FnMut(u64, Range<usize>, Range<usize>)) {
    let mut done = 0;
    while done < len {
        let pos = at + done as u64;
        let within = (pos % PAGE) as usize;
        let count = (PAGE as usize - within).min(len - done);
        each(pos / PAGE, within..within + count, done..done + count);
        done += count;
    }
}

fn end_of(at: HostOffset, len: u64) -> Result<u64> {
    at.get()
        .checked_add(len)
        .filter(|end| i64::try_from(*end).is_ok())
        .ok_or_else(|| Error::from(std::io::Error::from(std::io::ErrorKind::FileTooLarge)).host(at))
}

impl Storage for Memory {
    fn len(&self) -> Result<u64> {
        Ok(self.read().len)
    }

    fn hints(&self) -> Hints {
        Hints::default()
    }

    fn read_at(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        let end = end_of(at, buf.len() as u64)?;
        let state = self.read();
        if end > state.len {
            return Err(
                Error::from(std::io::Error::from(std::io::ErrorKind::UnexpectedEof))
                    .op("read")
                    .host(at),
            );
        }
        state.copy_out(at.get(), buf);
        Ok(())
    }

    fn run_at(&self, at: HostOffset) -> Result<HostRun> {
        let at = at.get();
        let state = self.read();
        if at >= state.len {
            return Ok(HostRun::Hole((u64::MAX - at).max(1)));
        }
        let mut number = at / PAGE;
        let mut next = state.pages.range(number..).map(|(number, _)| *number).peekable();
        if next.peek() != Some(&number) {
            let end = next.peek().map_or(state.len, |page| page * PAGE);
            return Ok(HostRun::Hole(end.min(state.len) - at));
        }
        while next.next() == Some(number) {
            number += 1;
        }
        Ok(HostRun::Data((number * PAGE).min(state.len) - at))
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(Some(self.read().pages.len() as u64 * PAGE))
    }

    fn raw_file(&self) -> Option<RawFile<'_>> {
        None
    }
}

impl StorageMut for Memory {
    fn write_at(&self, at: HostOffset, buf: &[u8]) -> Result<()> {
        let end = end_of(at, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        let mut state = self.write();
        state.copy_in(at.get(), buf);
        state.len = state.len.max(end);
        Ok(())
    }

    fn zero(&self, range: Range<HostOffset>, how: ZeroHow) -> Result<()> {
        let (start, end) = (range.start.get(), end_of(range.end, 0)?);
        if start >= end {
            return Ok(());
        }
        let mut state = self.write();
        // Keeping space allocated has no meaning where space is not promised in the first place.
        let (ZeroHow::KeepAllocated | ZeroHow::MayUnmap) = how;
        state.clear(&(start..end));
        state.len = state.len.max(end);
        Ok(())
    }

    fn discard(&self, range: Range<HostOffset>) -> Result<()> {
        let mut state = self.write();
        let range = range.start.get()..range.end.get().min(state.len);
        if !range.is_empty() {
            state.clear(&range);
        }
        Ok(())
    }

    fn allocate(&self, range: Range<HostOffset>) -> Result<()> {
        let end = end_of(range.end, 0)?;
        if range.start < range.end {
            let mut state = self.write();
            state.len = state.len.max(end);
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        end_of(HostOffset::new(len), 0)?;
        let mut state = self.write();
        if len < state.len {
            let gone = len..state.len.next_multiple_of(PAGE);
            state.clear(&gone);
        }
        state.len = len;
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}
