//! Making holes where a file holds zeros.

use std::ops::Range;

use diskmill_core::{HostOffset, HostRun, Job, Result, Storage, StorageMut, ZeroHow};

use crate::codec::is_zero;

/// What the host gives back at the least.
const BLOCK: u64 = 4096;
/// Bytes looked at together.
const PIECE: u64 = 1 << 20;

/// Makes holes of the blocks in `range` that hold zeros; with `dry`, only looks. Returns the bytes given back. What can be
/// read of the file stays the same, at every moment.
///
/// Blocks are 4 KiB, at multiples of that.
pub fn punch_zeros(file: &dyn StorageMut, range: Range<u64>, dry: bool, job: Job<'_>) -> Result<u64> {
    let mut punched = 0_u64;
    let mut bytes = Vec::new();
    each_run(file, range, |run, is_data| {
        if !is_data {
            // Space may be reserved where the host sees a hole; how much, it does not tell.
            return punch(file, Some(run), dry).map(|_| ());
        }
        let mut at = run.start;
        while at < run.end {
            job.check()?;
            let piece_end = (at / PIECE).saturating_add(1).saturating_mul(PIECE).min(run.end);
            bytes.resize(usize::try_from(piece_end - at).unwrap_or(0), 0);
            file.read_at(HostOffset::new(at), &mut bytes)?;
            job.observer.advance(piece_end - at);
            let mut zeros: Option<Range<u64>> = None;
            let mut from = at;
            while from < piece_end {
                let to = (from / BLOCK)
                    .saturating_add(1)
                    .saturating_mul(BLOCK)
                    .min(piece_end);
                let start = usize::try_from(from - at).unwrap_or(usize::MAX);
                let end = usize::try_from(to - at).unwrap_or(usize::MAX);
                if bytes.get(start..end).is_some_and(is_zero) {
                    zeros = Some(zeros.map_or(from, |zeros| zeros.start)..to);
                } else {
                    punched = punched.saturating_add(punch(file, zeros.take(), dry)?);
                }
                from = to;
            }
            punched = punched.saturating_add(punch(file, zeros, dry)?);
            at = piece_end;
        }
        Ok(())
    })?;
    Ok(punched)
}

/// Makes a hole of `range`, whatever it holds; with `dry`, only says how many bytes that would give back.
pub fn punch_all(file: &dyn StorageMut, range: Range<u64>, dry: bool, job: Job<'_>) -> Result<u64> {
    let mut punched = 0_u64;
    each_run(file, range, |run, is_data| {
        job.check()?;
        let given_back = punch(file, Some(run), dry)?;
        if is_data {
            punched = punched.saturating_add(given_back);
        }
        Ok(())
    })?;
    Ok(punched)
}

fn punch(file: &dyn StorageMut, zeros: Option<Range<u64>>, dry: bool) -> Result<u64> {
    let Some(zeros) = zeros else {
        return Ok(0);
    };
    // The host gives back whole blocks only, at the end of the file too.
    let start = zeros.start.next_multiple_of(BLOCK);
    let end = zeros.end - zeros.end % BLOCK;
    if start >= end {
        return Ok(0);
    }
    let zeros = start..end;
    if !dry {
        file.zero(
            HostOffset::new(zeros.start)..HostOffset::new(zeros.end),
            ZeroHow::MayUnmap,
        )?;
    }
    Ok(zeros.end - zeros.start)
}

/// Calls `each` with the runs of `range`, and whether one may hold anything but zeros.
fn each_run(
    file: &dyn Storage,
    range: Range<u64>,
    mut each: impl FnMut(Range<u64>, bool) -> Result<()>,
) -> Result<()> {
    let end = range.end.min(file.len()?);
    let mut at = range.start;
    while at < end {
        let (run, is_data) = match file.run_at(HostOffset::new(at))? {
            HostRun::Data(run) => (run, true),
            HostRun::Hole(run) => (run, false),
            _ => (1, true),
        };
        let run_end = at.saturating_add(run.max(1)).min(end);
        each(at..run_end, is_data)?;
        at = run_end;
    }
    Ok(())
}
