//! A file that is changed in memory only: what a dry run works on.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskmill_core::{Error, Hints, HostOffset, HostRun, RawFile, Result, Storage, StorageMut, ZeroHow};

/// Bytes in a page.
const PAGE: u64 = 4096;

/// A file, with changes that stay in memory: a page for each that was touched. Only tables are written to it, so that it
/// grows with them and not with the data.
#[derive(Debug)]
pub(crate) struct Sketch {
    base: Arc<dyn Storage>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    len: u64,
    /// How much of the file below still shows.
    base_len: u64,
    pages: BTreeMap<u64, Vec<u8>>,
}

impl Sketch {
    pub(crate) fn new(base: Arc<dyn Storage>) -> Result<Self> {
        let len = base.len()?;
        Ok(Self {
            base,
            state: Mutex::new(State {
                len,
                base_len: len,
                pages: BTreeMap::new(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what the file below has, zeros where it shows no more.
    fn read_base(&self, state: &State, at: u64, buf: &mut [u8]) -> Result<()> {
        let have = usize::try_from(state.base_len.saturating_sub(at)).unwrap_or(usize::MAX);
        let (stored, rest) = buf.split_at_mut(have.min(buf.len()));
        rest.fill(0);
        if stored.is_empty() {
            return Ok(());
        }
        self.base.read_at(HostOffset::new(at), stored)
    }
}

impl Storage for Sketch {
    fn len(&self) -> Result<u64> {
        Ok(self.lock().len)
    }

    fn hints(&self) -> Hints {
        self.base.hints()
    }

    fn read_at(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        let state = self.lock();
        let end = at.plus(buf.len() as u64)?.get();
        if end > state.len {
            let error = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
            return Err(Error::from(error).op("read").host(at));
        }
        self.read_base(&state, at.get(), buf)?;
        for (number, page) in state.pages.range(at.get() / PAGE..end.div_ceil(PAGE)) {
            let start = number * PAGE;
            let from = start.max(at.get());
            let to = (start + PAGE).min(end);
            let (Some(here), Some(there)) = (
                buf.get_mut(index(from - at.get())..index(to - at.get())),
                page.get(index(from - start)..index(to - start)),
            ) else {
                continue;
            };
            here.copy_from_slice(there);
        }
        Ok(())
    }

    fn run_at(&self, at: HostOffset) -> Result<HostRun> {
        self.base.run_at(at)
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.base.allocated()
    }

    fn raw_file(&self) -> Option<RawFile<'_>> {
        None
    }
}

impl StorageMut for Sketch {
    fn write_at(&self, at: HostOffset, buf: &[u8]) -> Result<()> {
        let mut state = self.lock();
        let end = at.plus(buf.len() as u64)?.get();
        let mut from = at.get();
        while from < end {
            let number = from / PAGE;
            let start = number * PAGE;
            let to = (start + PAGE).min(end);
            if !state.pages.contains_key(&number) {
                let mut page = vec![0; index(PAGE)];
                self.read_base(&state, start, &mut page)?;
                state.pages.insert(number, page);
            }
            if let Some(page) = state.pages.get_mut(&number)
                && let (Some(there), Some(here)) = (
                    page.get_mut(index(from - start)..index(to - start)),
                    buf.get(index(from - at.get())..index(to - at.get())),
                )
            {
                there.copy_from_slice(here);
            }
            from = to;
        }
        state.len = state.len.max(end);
        Ok(())
    }

    fn zero(&self, range: Range<HostOffset>, _: ZeroHow) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let len = range.end.since(at).min(PAGE);
            self.write_at(at, &vec![0; index(len)])?;
            at = at.plus(len)?;
        }
        Ok(())
    }

    fn discard(&self, _: Range<HostOffset>) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, range: Range<HostOffset>) -> Result<()> {
        let mut state = self.lock();
        state.len = state.len.max(range.end.get());
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let mut state = self.lock();
        state.base_len = state.base_len.min(len);
        state.pages.split_off(&len.div_ceil(PAGE));
        if let Some(page) = state.pages.get_mut(&(len / PAGE))
            && let Some(rest) = page.get_mut(index(len % PAGE)..)
        {
            rest.fill(0);
        }
        state.len = len;
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

/// A place in a buffer, which is never that long.
fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
