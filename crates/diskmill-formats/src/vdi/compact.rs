//! Making the file smaller: blocks of zeros give up their slots, the last blocks move into free ones, and the file ends
//! behind the last. A fixed image keeps its length; its zeros become holes of the host.

use std::sync::Arc;

use diskmill_core::{
    CompactReport, CompactSpec, Error, ErrorKind, Format, HostOffset, HostRun, Job, OpenSpec, Result,
    Storage, StorageMut, ZeroHow,
};

use super::header::{Header, ImageType};
use super::layout::BLOCK;
use super::map::{BlockMap, Entry};
use super::tables::{Tables, shared};
use crate::codec::is_zero;
use crate::slots::Slots;

/// Host bytes at most that a block of zeros may keep: the pages at its edges, which it shares with its neighbours.
const EDGES: u64 = 16 << 10;

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// Zeros, for which the host stores this many bytes.
    Zeros(u64),
    Data,
}

fn refuse_compression(spec: &CompactSpec) -> Result<()> {
    match spec.compress {
        Some(_) => {
            let text = "a vdi image stores nothing compressed";
            Err(Error::new(ErrorKind::Unsupported, text).format(Format::Vdi))
        }
        None => Ok(()),
    }
}

fn content(main: &dyn Storage, at: u64, buf: &mut Vec<u8>) -> Result<Content> {
    let start = HostOffset::new(at);
    let end = start.plus(BLOCK)?;
    let (mut next, mut stored) = (start, 0_u64);
    while next < end {
        let left = end.since(next);
        let len = match main.run_at(next)? {
            HostRun::Hole(len) => len.clamp(1, left),
            HostRun::Data(len) => {
                stored = stored.saturating_add(len.clamp(1, left));
                len.clamp(1, left)
            }
            _ => {
                stored = stored.saturating_add(left);
                left
            }
        };
        next = next.plus(len)?;
    }
    if stored > 0 {
        buf.resize(usize::try_from(BLOCK).unwrap_or(0), 0);
        main.read_padded(start, buf)?;
        if !is_zero(buf) {
            return Ok(Content::Data);
        }
    }
    Ok(Content::Zeros(stored))
}

/// What can be saved.
#[derive(Debug)]
struct Savings {
    report: CompactReport,
    /// Blocks that hold zeros, with their slots.
    zeros: Vec<(u32, u32)>,
}

fn look(header: &Header, map: &BlockMap, main: &dyn Storage, job: Job<'_>) -> Result<Savings> {
    let mut report = CompactReport::default();
    let file_len = main.len()?;
    report.len_before = file_len;
    report.fixed_len = main.hints().fixed_len;
    let fixed = header.image_type == ImageType::Fixed;
    job.observer.total(u64::from(map.len()) * BLOCK);
    let (mut slots, mut kept) = (Slots::default(), Slots::default());
    let mut zeros = Vec::new();
    let mut buf = Vec::new();
    for (block, slot) in map.slots() {
        job.check()?;
        map.place(block, header, file_len)?;
        if !slots.add(slot) {
            return Err(shared(map).into());
        }
        match content(main, header.slot_at(slot), &mut buf)? {
            Content::Data => {
                kept.add(slot);
            }
            Content::Zeros(stored) if fixed => {
                if stored > EDGES {
                    report.punched = report.punched.saturating_add(stored);
                    zeros.push((block, slot));
                }
                kept.add(slot);
            }
            Content::Zeros(_) => {
                report.zeros = report.zeros.saturating_add(BLOCK);
                zeros.push((block, slot));
            }
        }
        job.observer.advance(BLOCK);
    }
    let end = header.slot_at(slots.end());
    let unused = u64::from(slots.end().saturating_sub(slots.count())) * BLOCK;
    let behind = if report.fixed_len {
        0
    } else {
        file_len.saturating_sub(end)
    };
    report.leaked = unused.saturating_add(behind);
    let moved = kept.above(kept.count());
    report.moved = u64::from(moved) * BLOCK;
    report.len_after = header.slot_at(kept.count()).min(file_len);
    Ok(Savings { report, zeros })
}

/// What [`run`] would do.
pub(super) fn plan(
    header: &Header,
    main: &dyn Storage,
    how: &OpenSpec,
    spec: &CompactSpec,
    job: Job<'_>,
) -> Result<CompactReport> {
    refuse_compression(spec)?;
    let map = BlockMap::load(main, header, &how.limits)?;
    Ok(look(header, &map, main, job)?.report)
}

/// Makes the file smaller. What the image reads as stays the same, and so does its UUID of modification.
pub(super) fn run(
    header: Header,
    main: Arc<dyn StorageMut>,
    how: &OpenSpec,
    spec: &CompactSpec,
    job: Job<'_>,
) -> Result<CompactReport> {
    refuse_compression(spec)?;
    let map = BlockMap::load(main.as_ref(), &header, &how.limits)?;
    let Savings { mut report, zeros } = look(&header, &map, main.as_ref(), job)?;
    let fixed = header.image_type == ImageType::Fixed;
    // Over a parent a free block would show what is below.
    let empty = if header.is_diff() {
        Entry::Zero
    } else {
        Entry::Free
    };
    let mut tables = Tables::open(header, map, Arc::clone(&main))?;
    for (block, slot) in &zeros {
        if fixed {
            let at = tables.header.slot_at(*slot);
            let end = at.saturating_add(BLOCK).min(tables.file_len);
            main.zero(HostOffset::new(at)..HostOffset::new(end), ZeroHow::MayUnmap)?;
        } else {
            tables.enter(*block, empty);
        }
    }
    tables.settle_for_good()?;
    if !fixed {
        for (_, slot) in zeros {
            tables.slots.remove(slot);
        }
    }
    job.check()?;
    tables.pack()?;
    main.sync()?;
    report.len_after = if report.fixed_len {
        tables.header.slot_at(tables.slots.end())
    } else {
        main.len()?
    };
    Ok(report)
}
