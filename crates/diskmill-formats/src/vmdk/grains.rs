//! Writing and emptying grains, some of which have no place yet.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use diskmill_core::{Chain, GuestOffset, Result, SECTOR, ZeroHow};

use super::map::{Kind, sector};
use super::parts::{BodyMut, PartMut, lock, look, to_usize};
use super::tables::Tables;
use crate::tree::reads_zero;

/// Bytes of the grains of a part that there are: the last may end with the disk.
pub(super) fn grain_len(part: &PartMut, tables: &Tables, start: u64) -> u64 {
    tables.geometry.grain.min(part.len.saturating_sub(start))
}

/// Writes some of `buf` at `at`, both within a part: as much as can be done at once. Says how much.
pub(super) fn write_grains(
    part: &PartMut,
    tables: &Mutex<Tables>,
    at: u64,
    buf: &[u8],
    below: &Chain,
) -> Result<usize> {
    let mut held = lock(tables);
    let grain = held.geometry.grain;
    let into = at & grain.saturating_sub(1);
    let start = at.saturating_sub(into);
    let whole = grain_len(part, &held, start);
    let (_, kind) = held.kind(start)?;
    if let Kind::Data(host) = kind {
        // As far as the grains follow one another.
        let mut len = grain.saturating_sub(into);
        while len < buf.len() as u64 && at.saturating_add(len) < part.len {
            match held.kind(at.saturating_add(len))? {
                (_, Kind::Data(next))
                    if host.get().checked_add(into.saturating_add(len)) == Some(next.get()) =>
                {
                    len = len.saturating_add(grain);
                }
                _ => break,
            }
        }
        let storage = Arc::clone(&held.storage);
        drop(held);
        let now = buf.get(..to_usize(len).min(buf.len())).unwrap_or_default();
        storage.write_at(host.plus(into)?, now)?;
        return Ok(now.len());
    }
    if into == 0 && buf.len() as u64 >= whole {
        return write_new(part, tables, held, at, buf);
    }
    // In part: the rest comes from below. The lock is held, so that two who write one grain do not both make it.
    let mut bytes = vec![0; to_usize(grain)];
    if kind == Kind::Absent {
        let from = bytes.get_mut(..to_usize(whole)).unwrap_or_default();
        below.read_at(GuestOffset::new(part.start.saturating_add(start)), from)?;
    }
    let len = to_usize(whole.saturating_sub(into)).min(buf.len());
    let first = to_usize(into);
    if let (Some(to), Some(from)) = (bytes.get_mut(first..first.saturating_add(len)), buf.get(..len)) {
        to.copy_from_slice(from);
    }
    let number = held.take(1)?;
    held.storage.write_at(sector(number.into()), &bytes)?;
    held.set(start, number)?;
    Ok(len)
}

/// Gives the whole grains at the start of `buf` that have no place one, and writes them.
pub(super) fn write_new(
    part: &PartMut,
    tables: &Mutex<Tables>,
    mut held: MutexGuard<'_, Tables>,
    at: u64,
    buf: &[u8],
) -> Result<usize> {
    let grain = held.geometry.grain;
    let mut count = 0_u64;
    let mut len = 0_u64;
    let mut old = Vec::new();
    while len < buf.len() as u64 {
        let next = at.saturating_add(len);
        let whole = grain_len(part, &held, next);
        if whole == 0 || (buf.len() as u64).saturating_sub(len) < whole {
            break;
        }
        match held.kind(next)? {
            (_, Kind::Data(_)) => break,
            (entry, _) => old.push(entry),
        }
        count = count.saturating_add(1);
        len = len.saturating_add(whole);
    }
    let first = held.take(count)?;
    let step = u32::try_from(grain / SECTOR).unwrap_or(u32::MAX);
    let mut number = first;
    for index in 0..count {
        held.set(at.saturating_add(index.saturating_mul(grain)), number)?;
        number = number.saturating_add(step);
    }
    let storage = Arc::clone(&held.storage);
    drop(held);
    let now = buf.get(..to_usize(len)).unwrap_or_default();
    let host = sector(first.into());
    let mut done = storage.write_at(host, now);
    let stored = count.saturating_mul(grain);
    if done.is_ok() && len < stored {
        // The last grain of the disk is stored whole.
        done = storage.zero(host.plus(len)?..host.plus(stored)?, ZeroHow::KeepAllocated);
    }
    if let Err(error) = done {
        let mut held = lock(tables);
        for (index, entry) in (0..count).zip(old) {
            held.set(at.saturating_add(index.saturating_mul(grain)), entry)?;
        }
        return Err(error);
    }
    Ok(now.len())
}

/// Makes some bytes from `at` zeros, up to `end`, both within a part: at most a grain. Says how many.
pub(super) fn zero_grain(
    part: &PartMut,
    tables: &Mutex<Tables>,
    at: u64,
    end: u64,
    how: ZeroHow,
    below: &Chain,
) -> Result<u64> {
    let mut held = lock(tables);
    let into = at & held.geometry.grain.saturating_sub(1);
    let start = at.saturating_sub(into);
    let whole = grain_len(part, &held, start);
    let len = whole.saturating_sub(into).min(end.saturating_sub(at));
    match held.kind(start)?.1 {
        Kind::Data(host) => {
            let storage = Arc::clone(&held.storage);
            drop(held);
            let host = host.plus(into)?;
            storage.zero(host..host.plus(len)?, how)?;
        }
        Kind::Zero => {}
        _ => {
            let guest = part.start.saturating_add(start);
            if reads_zero(below, guest..guest.saturating_add(whole))? {
                return Ok(len);
            }
            if len < whole {
                drop(held);
                write_grains(part, tables, at, &vec![0; to_usize(len)], below)?;
            } else if held.marks_zeros() {
                held.set(start, 1)?;
            } else {
                let number = held.take(1)?;
                let (host, grain) = (sector(number.into()), held.geometry.grain);
                held.storage
                    .zero(host..host.plus(grain)?, ZeroHow::KeepAllocated)?;
                held.set(start, number)?;
            }
        }
    }
    Ok(len)
}

/// Makes bytes of a part zeros.
pub(super) fn zero_sparse(
    part: &PartMut,
    tables: &Mutex<Tables>,
    range: Range<u64>,
    how: ZeroHow,
    below: &Chain,
) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let (kind, len) = look(tables, at, range.end.saturating_sub(at))?;
        let guest = part.start.saturating_add(at);
        let nothing = match kind {
            Kind::Zero => true,
            Kind::Absent => reads_zero(below, guest..guest.saturating_add(len))?,
            _ => false,
        };
        at = at.saturating_add(match nothing {
            true => len,
            false => zero_grain(part, tables, at, range.end, how, below)?,
        });
    }
    Ok(())
}

/// Makes all of a part from `at` on zeros, for whoever has the image alone.
pub(super) fn zero_from(part: &PartMut, at: u64, below: &Chain) -> Result<()> {
    let BodyMut::Sparse { tables, .. } = &part.body else {
        return Ok(());
    };
    let step = lock(tables).geometry.table_covers().saturating_mul(64).max(1);
    // What is behind the end of the backing image is zeros anyway.
    let end = part.len.min(below.virtual_size().saturating_sub(part.start));
    let mut at = at;
    while at < end {
        let next = at.saturating_add(step).min(end);
        zero_sparse(part, tables, at..next, ZeroHow::MayUnmap, below)?;
        lock(tables).write_back()?;
        at = next;
    }
    Ok(())
}
