//! Tables of two levels, as vmdk and qcow have them: from a byte of the disk to what its entry says. A *grain* is what
//! an entry tells of.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use diskmill_core::{Chain, GuestOffset, HostOffset, Result, State};

/// What an entry says of a grain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ask below.
    Absent,
    /// Zeros.
    Zero,
    /// Stored as it is, from here.
    Data(HostOffset),
    /// Stored compressed, from here.
    Packed(HostOffset),
}

/// How the grains of an extent are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a grain: a power of two.
    pub grain: u64,
    /// Entries of a table: a power of two.
    pub entries: u32,
    /// Bytes of an entry.
    pub entry_len: usize,
    /// Bytes of the disk, or of the part of it that the tables are about.
    pub disk: u64,
}

impl Geometry {
    /// Bytes of the disk that a table covers.
    pub const fn table_covers(&self) -> u64 {
        self.grain.saturating_mul(self.entries as u64)
    }

    /// Bytes of a table.
    pub const fn table_len(&self) -> usize {
        self.entry_len.saturating_mul(self.entries as usize)
    }

    /// The table and the entry in it that say where byte `at` is.
    pub fn locate(&self, at: u64) -> (usize, usize) {
        let grain = at.checked_div(self.grain).unwrap_or(0);
        let table = grain.checked_div(u64::from(self.entries)).unwrap_or(0);
        let entry = grain.checked_rem(u64::from(self.entries)).unwrap_or(0);
        (
            usize::try_from(table).unwrap_or(usize::MAX),
            usize::try_from(entry).unwrap_or(usize::MAX),
        )
    }
}

/// Tables without anything that one look-up steps over.
const EMPTY_TABLES: usize = 64 << 10;

/// What the bytes from `at` are, and for how many of `max` that holds: grains that follow one another are one run.
///
/// `table` gives the bytes of a table, or `None` where there is none; `kind` reads an entry of one.
pub fn scan(
    geometry: &Geometry,
    at: u64,
    max: u64,
    table: &mut dyn FnMut(usize) -> Result<Option<Arc<[u8]>>>,
    kind: &dyn Fn(&[u8]) -> Result<Kind>,
) -> Result<(Kind, u64)> {
    let grain = geometry.grain;
    let mut run: Option<(Kind, u64)> = None;
    for _ in 0..EMPTY_TABLES {
        let len = run.map_or(0, |(_, len)| len);
        let next = at.saturating_add(len);
        if len >= max {
            break;
        }
        let (index, first) = geometry.locate(next);
        let found = match table(index) {
            Ok(found) => found,
            Err(error) if run.is_none() => return Err(error),
            Err(_) => break,
        };
        let Some(bytes) = found else {
            let covers = geometry.table_covers();
            let rest = covers.saturating_sub(next.checked_rem(covers).unwrap_or(0));
            match &mut run {
                None => run = Some((Kind::Absent, rest)),
                Some((Kind::Absent, len)) => *len = len.saturating_add(rest),
                Some(_) => break,
            }
            continue;
        };
        let mut ended = false;
        for entry in bytes.chunks_exact(geometry.entry_len).skip(first) {
            let found = match kind(entry) {
                Ok(found) => found,
                Err(error) if run.is_none() => return Err(error),
                // What comes before an entry that cannot be read can be told all the same.
                Err(_) => {
                    ended = true;
                    break;
                }
            };
            match &mut run {
                None => {
                    let into = next & grain.saturating_sub(1);
                    let start = match found {
                        Kind::Data(host) => Kind::Data(host.plus(into)?),
                        other => other,
                    };
                    run = Some((start, grain.saturating_sub(into)));
                }
                Some((start, len)) if continues(*start, *len, found) => *len = len.saturating_add(grain),
                Some(_) => {
                    ended = true;
                    break;
                }
            }
            if run.is_some_and(|(_, len)| len >= max) {
                break;
            }
        }
        // A run with data is long enough for anybody by the end of a table.
        if ended || !matches!(run, Some((Kind::Absent | Kind::Zero, _))) {
            break;
        }
    }
    let (kind, len) = run.unwrap_or((Kind::Absent, max));
    Ok((kind, len.min(max).max(1)))
}

fn continues(start: Kind, len: u64, next: Kind) -> bool {
    match (start, next) {
        (Kind::Data(first), Kind::Data(next)) => first.checked_add(len) == Some(next),
        (Kind::Absent, Kind::Absent) | (Kind::Zero, Kind::Zero) | (Kind::Packed(_), Kind::Packed(_)) => true,
        _ => false,
    }
}

/// The multiple of `step` at or above `value`, or the last number there is.
pub fn up(value: u64, step: u64) -> u64 {
    value.checked_next_multiple_of(step).unwrap_or(u64::MAX)
}

/// Bytes of tables that are held at most.
const CACHE_BYTES: usize = 8 << 20;

/// Tables by their number: each has one slot it may be in.
#[derive(Debug)]
pub struct TableCache {
    slots: Box<[Slot]>,
}

type Slot = Mutex<Option<(usize, Arc<[u8]>)>>;

impl TableCache {
    /// A cache for `count` tables of `len` bytes.
    pub fn new(count: usize, len: usize) -> Self {
        Self::among(count, len, 1)
    }

    /// The same for one of `parts` of a disk, which hold together what one would.
    pub fn among(count: usize, len: usize, parts: usize) -> Self {
        let most = CACHE_BYTES.checked_div(len.saturating_mul(parts)).unwrap_or(1);
        let slots = most.clamp(1, count.max(1));
        Self {
            slots: (0..slots).map(|_| Mutex::default()).collect(),
        }
    }

    /// Table number `index`, which `load` reads if it is not held. No lock is held meanwhile.
    pub fn get(&self, index: usize, load: impl FnOnce() -> Result<Arc<[u8]>>) -> Result<Arc<[u8]>> {
        let Some(slot) = index
            .checked_rem(self.slots.len())
            .and_then(|at| self.slots.get(at))
        else {
            return load();
        };
        if let Some((known, bytes)) = &*slot.lock().unwrap_or_else(PoisonError::into_inner)
            && *known == index
        {
            return Ok(Arc::clone(bytes));
        }
        let bytes = load()?;
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some((index, Arc::clone(&bytes)));
        Ok(bytes)
    }
}

/// Whether the chain reads as zeros in all of `range`, by its map.
pub fn reads_zero(below: &Chain, range: Range<u64>) -> Result<bool> {
    let mut at = range.start;
    while at < range.end.min(below.virtual_size()) {
        let run = below.map(GuestOffset::new(at), range.end.saturating_sub(at))?;
        match run.state {
            State::Zero { .. } | State::Absent => at = at.saturating_add(run.len),
            _ => return Ok(false),
        }
    }
    Ok(true)
}
