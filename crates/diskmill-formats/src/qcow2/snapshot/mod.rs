//! The table of internal snapshots.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

pub(super) mod write;

use diskmill_core::{
    Error, ErrorKind, Format, HostOffset, Limits, Result, SECTOR, SnapshotFacts, Storage, WhichSnapshot,
};
use zerocopy::{FromBytes, IntoBytes, big_endian};

use super::header::{Header, Version};
use super::layout::{
    L1_BYTES_MAX, RawSnapshot, RawSnapshotExtra, SNAPSHOT_EXTRA_MAX, SNAPSHOT_TABLE_BYTES_MAX, SNAPSHOTS_MAX,
};
use super::map::Geometry;

/// An entry of the snapshot table.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Where its L1 table is, as stored: not checked.
    pub l1_table_offset: HostOffset,
    /// Entries of its L1 table, as stored: not checked.
    pub l1_size: u32,
    /// Its id, as stored: in theory any bytes.
    pub id: Vec<u8>,
    /// Its name, as stored: in theory any bytes.
    pub name: Vec<u8>,
    /// What people see of it.
    pub facts: SnapshotFacts,
    /// Its extra data, known and unknown.
    pub extra: Vec<u8>,
}

/// What is wrong with the snapshot table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The table runs past the end of the file.
    #[error("snapshot table entry {index} of {count} at {at:#x} runs past the end of the file")]
    PastEnd {
        /// Which entry.
        index: u32,
        /// Of how many.
        count: u32,
        /// Where it starts.
        at: u64,
    },
    /// Too much of it.
    #[error("snapshot table has more than {0} bytes")]
    TooLong(u64),
    /// More snapshots than the caller allows.
    #[error("nb_snapshots is {count}, must be at most {limit}")]
    TooMany {
        /// How many there are.
        count: u32,
        /// How many there may be.
        limit: u32,
    },
    /// An L1 table that cannot be.
    #[error(
        "l1 table of a snapshot at {at:#x} has {entries} entries, must start on a cluster and have {needed} to 4194304"
    )]
    L1 {
        /// Where it starts.
        at: u64,
        /// Entries it is said to have.
        entries: u64,
        /// Entries its disk needs.
        needed: u64,
    },
    /// A size no disk has.
    #[error("disk_size of snapshot '{id}' is {size}, must be below 2^63")]
    DiskSize {
        /// The snapshot.
        id: String,
        /// The size.
        size: u64,
    },
    /// There is no such snapshot.
    #[error("there is no snapshot with {0}")]
    NotFound(WhichSnapshot),
    /// More extra data than is allowed.
    #[error("snapshot {index} has {len} bytes of extra data, must be {low} to 1024")]
    Extra {
        /// Which entry.
        index: u32,
        /// Bytes there are.
        len: u32,
        /// Bytes there must be.
        low: u32,
    },
}

impl From<SnapshotError> for Error {
    fn from(error: SnapshotError) -> Self {
        Error::new(ErrorKind::Malformed, error).format(Format::Qcow2)
    }
}

/// What is done about an entry that can be read and breaks the rules: fail, or note it and go on.
pub type OnProblem<'a> = &'a mut dyn FnMut(SnapshotError) -> Result<()>;

/// Reads the snapshot table. Also says where it ends.
pub fn read_table(
    main: &dyn Storage,
    header: &Header,
    limits: &Limits,
) -> Result<(Vec<Snapshot>, HostOffset)> {
    read_table_with(main, header, limits, &mut |problem| Err(problem.into()))
}

/// As [`read_table`], but lets the caller pass over an entry's problem.
pub fn read_table_with(
    main: &dyn Storage,
    header: &Header,
    limits: &Limits,
    on_problem: OnProblem<'_>,
) -> Result<(Vec<Snapshot>, HostOffset)> {
    let count = header.nb_snapshots;
    let mut cursor = Cursor::new(main, header.snapshots_offset, limits)?;
    let limit = limits.snapshots.min(SNAPSHOTS_MAX);
    if count > limit {
        on_problem(SnapshotError::TooMany { count, limit })?;
    }
    let mut snapshots = Vec::new();
    for index in 0..count.min(limit) {
        let at = cursor.at;
        let trouble = match read_entry(&mut cursor, header, index, on_problem) {
            Ok(Some(entry)) => {
                snapshots.push(entry);
                continue;
            }
            Ok(None) => SnapshotError::PastEnd {
                index,
                count,
                at: at.get(),
            },
            Err(error) => match error.find::<SnapshotError>() {
                Some(SnapshotError::TooLong(most)) => SnapshotError::TooLong(*most),
                _ => return Err(error),
            },
        };
        on_problem(trouble)?;
        return Ok((snapshots, at));
    }
    Ok((snapshots, cursor.at))
}

/// The next entry, or `None` if the file ends before it does.
fn read_entry(
    cursor: &mut Cursor<'_>,
    header: &Header,
    index: u32,
    on_problem: OnProblem<'_>,
) -> Result<Option<Snapshot>> {
    let Some(head) = cursor.take(size_of::<RawSnapshot>())? else {
        return Ok(None);
    };
    let Ok(raw) = RawSnapshot::read_from_bytes(&head) else {
        return Ok(None);
    };
    let extra_len = raw.extra_len.get();
    let low = match header.version {
        Version::V2 => 0,
        Version::V3 => 16,
    };
    if !(low..=SNAPSHOT_EXTRA_MAX).contains(&extra_len) {
        on_problem(SnapshotError::Extra {
            index,
            len: extra_len,
            low,
        })?;
    }
    let kept_len = extra_len.min(SNAPSHOT_EXTRA_MAX);
    let (Some(extra), Some(id), Some(name)) = (
        cursor.take_and_skip(kept_len, extra_len.saturating_sub(kept_len))?,
        cursor.take(raw.id_len.get().into())?,
        cursor.take(raw.name_len.get().into())?,
    ) else {
        return Ok(None);
    };
    cursor.align();
    // Fields that the entry does not have keep these values.
    let mut padded = [0xff; size_of::<RawSnapshotExtra>()];
    for (to, from) in padded.iter_mut().zip(&extra) {
        *to = *from;
    }
    let known = RawSnapshotExtra::read_from_bytes(&padded).ok();
    let has = |bytes: u32| extra_len >= bytes;
    let facts = SnapshotFacts {
        id: String::from_utf8_lossy(&id).into_owned(),
        name: String::from_utf8_lossy(&name).into_owned(),
        vm_state_size: known
            .filter(|_| has(8))
            .map_or(raw.vm_state_size.get().into(), |known| known.vm_state_size.get()),
        date_sec: raw.date_sec.get().into(),
        date_nsec: raw.date_nsec.get(),
        vm_clock_nsec: raw.vm_clock_nsec.get(),
        icount: known
            .filter(|_| has(24))
            .map(|known| known.icount.get())
            .filter(|count| *count != u64::MAX),
        disk_size: known
            .filter(|_| has(16))
            .map_or(header.virtual_size(), |known| known.disk_size.get()),
    };
    Ok(Some(Snapshot {
        l1_table_offset: HostOffset::new(raw.l1_table_offset.get()),
        l1_size: raw.l1_size.get(),
        id,
        name,
        facts,
        extra,
    }))
}

/// The one of `snapshots` that `which` means.
pub fn find<'a>(snapshots: &'a [Snapshot], which: &WhichSnapshot) -> Result<(usize, &'a Snapshot)> {
    let all = snapshots.iter().map(|snapshot| (&*snapshot.id, &*snapshot.name));
    which
        .find(all)
        .and_then(|index| Some((index, snapshots.get(index)?)))
        .ok_or_else(|| {
            Error::new(ErrorKind::NotFound, SnapshotError::NotFound(which.clone())).format(Format::Qcow2)
        })
}

/// Fails unless an L1 table that is not the active one may be where an entry says, with `entries` of them for a disk
/// that needs `needed`.
pub(super) fn check_l1(geometry: Geometry, at: HostOffset, entries: u32, needed: u64) -> Result<()> {
    let entries = u64::from(entries);
    let placed = at.is_aligned(geometry.cluster_size()) && (entries == 0 || at != HostOffset::ZERO);
    if placed && entries >= needed && entries <= L1_BYTES_MAX / 8 {
        return Ok(());
    }
    let at = at.get();
    Err(SnapshotError::L1 { at, entries, needed }.into())
}

impl Snapshot {
    /// The size of its disk in bytes, if a disk can have it.
    pub(super) fn checked_size(&self) -> Result<u64> {
        let size = self.facts.disk_size;
        match i64::try_from(size) {
            Ok(_) => Ok(size & !(SECTOR.wrapping_sub(1))),
            Err(_) => Err(SnapshotError::DiskSize {
                id: self.facts.id.clone(),
                size,
            }
            .into()),
        }
    }

    /// Bytes of its entry of the table, padded. Extra data must have an allowed length.
    pub(super) fn len(&self) -> u64 {
        let parts = [&self.extra, &self.id, &self.name].map(|part| part.len() as u64);
        let len = parts.iter().fold(size_of::<RawSnapshot>() as u64, |sum, part| {
            sum.saturating_add(*part)
        });
        len.next_multiple_of(8)
    }

    /// Its entry of the table, padded.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let facts = &self.facts;
        // More than 32 bits of machine state, and dates past 2106, do not fit the old fields.
        let narrow = |value: u64| big_endian::U32::new(u32::try_from(value).unwrap_or(0));
        let short = |bytes: &[u8]| big_endian::U16::new(u16::try_from(bytes.len()).unwrap_or(u16::MAX));
        let raw = RawSnapshot {
            l1_table_offset: self.l1_table_offset.get().into(),
            l1_size: self.l1_size.into(),
            id_len: short(&self.id),
            name_len: short(&self.name),
            date_sec: narrow(facts.date_sec),
            date_nsec: facts.date_nsec.into(),
            vm_clock_nsec: facts.vm_clock_nsec.into(),
            vm_state_size: narrow(facts.vm_state_size),
            extra_len: narrow(self.extra.len() as u64),
        };
        let mut bytes = [raw.as_bytes(), &self.extra, &self.id, &self.name].concat();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// Its extra data with what version 3 wants to be there, and whatever else there was.
    pub(super) fn complete_extra(&mut self) {
        let known = RawSnapshotExtra {
            vm_state_size: self.facts.vm_state_size.into(),
            disk_size: self.facts.disk_size.into(),
            icount: self.facts.icount.unwrap_or(u64::MAX).into(),
        };
        let known = known.as_bytes();
        if let Some(missing) = known.get(self.extra.len()..) {
            self.extra.extend_from_slice(missing);
        }
    }
}

/// Reads a table whose entries have no fixed length, a piece at a time.
struct Cursor<'a> {
    main: &'a dyn Storage,
    file_len: u64,
    start: HostOffset,
    at: HostOffset,
    most: u64,
    piece: Vec<u8>,
    piece_at: HostOffset,
}

/// Bytes read at once.
const PIECE: u64 = 64 << 10;

impl<'a> Cursor<'a> {
    fn new(main: &'a dyn Storage, start: HostOffset, limits: &Limits) -> Result<Self> {
        Ok(Self {
            main,
            file_len: main.len()?,
            start,
            at: start,
            most: SNAPSHOT_TABLE_BYTES_MAX.min(limits.snapshot_table_bytes),
            piece: Vec::new(),
            piece_at: start,
        })
    }

    /// The next `len` bytes, or `None` if the file ends before. `len` is at most 64 KiB.
    fn take(&mut self, len: usize) -> Result<Option<Vec<u8>>> {
        let Some(end) = self.at.checked_add(len as u64) else {
            return Ok(None);
        };
        if end.get() > self.file_len {
            return Ok(None);
        }
        if end.since(self.start) > self.most {
            return Err(SnapshotError::TooLong(self.most).into());
        }
        if end.since(self.piece_at) > self.piece.len() as u64 {
            let left = self.file_len.saturating_sub(self.at.get());
            let piece_len = PIECE.max(len as u64).min(left);
            self.piece.resize(usize::try_from(piece_len).unwrap_or(0), 0);
            self.main.read_at(self.at, &mut self.piece)?;
            self.piece_at = self.at;
        }
        let from = usize::try_from(self.at.since(self.piece_at)).unwrap_or(usize::MAX);
        let bytes = self
            .piece
            .get(from..)
            .and_then(|rest| rest.get(..len))
            .map(<[u8]>::to_vec);
        self.at = end;
        Ok(bytes)
    }

    /// The next `len` bytes; what follows them is skipped.
    fn take_and_skip(&mut self, len: u32, skip: u32) -> Result<Option<Vec<u8>>> {
        let bytes = self.take(usize::try_from(len).unwrap_or(usize::MAX))?;
        if skip > 0 {
            self.at = self.at.saturating_add(skip.into());
            self.piece.clear();
            self.piece_at = self.at;
        }
        Ok(bytes)
    }

    /// Skips to the next multiple of 8.
    fn align(&mut self) {
        self.at = self.at.saturating_add(self.at.get().wrapping_neg() & 7);
    }
}
