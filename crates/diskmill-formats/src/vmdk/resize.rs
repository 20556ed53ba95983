//! Making a disk larger, smaller or empty.
//!
//! Growing: room and tables first, then the header, then the descriptor. Shrinking: the other way round, and what is
//! behind the new end is forgotten only when nothing leads there any more.

use diskmill_core::{
    Chain, Error, ErrorKind, Format, HostOffset, HostRun, LayerMut, Result, SECTOR, ZeroHow,
};

use super::create::{cylinders, full};
use super::descriptor::{Access, with_extent_len, with_key};
use super::grains::zero_from;
use super::layout::COWD_NEXT_FREE;
use super::map::{Kind, sector, up};
use super::options::SPLIT;
use super::parts::{BodyMut, PartMut, tables_of};
use super::sparse::Dialect;
use super::tables::Tables;
use super::unsupported;
use super::write::Image;

/// Empties an extent: no grain is left, and the file ends behind its tables.
pub(super) fn clear(tables: &mut Tables) -> Result<()> {
    let len = tables.geometry.table_len() as u64;
    let copies = [
        Some(&tables.directory),
        tables.redundant.as_ref().map(|(_, list)| list),
    ];
    for at in copies.into_iter().flatten().flatten().filter(|at| **at != 0) {
        let at = sector((*at).into());
        match tables.storage.run_at(at)? {
            HostRun::Hole(hole) if hole >= len => {}
            _ => tables.storage.zero(at..at.plus(len)?, ZeroHow::KeepAllocated)?,
        }
    }
    tables.storage.sync()?;
    tables.forget();
    let grain = (tables.geometry.grain / SECTOR).max(1);
    tables.next = up(tables.tables_end(), grain);
    if tables.dialect == Dialect::Cowd {
        let next = u32::try_from(tables.next).map_err(|_| full())?;
        tables
            .storage
            .write_at(HostOffset::new(COWD_NEXT_FREE), &next.to_le_bytes())?;
    }
    let end = tables.next.saturating_mul(SECTOR);
    if !tables.storage.hints().fixed_len && tables.storage.len()? > end {
        tables.storage.set_len(end)?;
    }
    tables.storage.sync()
}

/// See [`LayerMut::resize`].
pub(super) fn resize(image: &Image, size: u64, below: &Chain) -> Result<()> {
    let size = size
        .checked_next_multiple_of(SECTOR)
        .filter(|size| (1..=i64::MAX as u64).contains(size))
        .ok_or_else(|| {
            let text = format!("size is {size}, must be above 0 and below 2^63");
            Error::new(ErrorKind::Usage, text).format(Format::Vmdk)
        })?;
    {
        let mut parts = image.alone();
        let count = parts.len();
        image.touch(&parts)?;
        let split = image.text().descriptor.kind.starts_with("twoGb");
        let Some(last) = parts.last_mut() else {
            return Err(unsupported("a disk without extents keeps its size"));
        };
        let old = last.start.saturating_add(last.len);
        if size == old {
            return Ok(());
        }
        if last.access != Access::ReadWrite {
            return Err(unsupported("the last extent may not be written"));
        }
        if size <= last.start {
            return Err(unsupported(
                "the new size would leave whole extents over; convert the disk instead",
            ));
        }
        if matches!(last.body, BodyMut::Sparse { .. }) && last.header.is_none() {
            return Err(unsupported("vmfsSparse extents keep their size"));
        }
        let len = size.saturating_sub(last.start);
        if size > old && split && len > SPLIT {
            return Err(unsupported(
                "the last extent of a split disk has at most 2 GiB; convert the disk to make it larger",
            ));
        }
        let index = count.saturating_sub(1);
        if size > old {
            grow(last, len, below)?;
            describe(image, index, len, size)?;
        } else {
            // An embedded descriptor repeats what the header says, which is what counts.
            if !image.is_embedded() {
                describe(image, index, len, size)?;
            }
            shrink(last, len)?;
            if image.is_embedded() {
                describe(image, index, len, size)?;
            }
        }
        last.len = len;
    }
    image.flush()
}

fn describe(image: &Image, index: usize, len: u64, size: u64) -> Result<()> {
    let mut text = image.text();
    let new = with_extent_len(&text.descriptor.text, index, len / SECTOR);
    let adapter = text
        .descriptor
        .ddb("adapterType")
        .unwrap_or("ide")
        .to_ascii_lowercase();
    let count = format!("\"{}\"", cylinders(size, &adapter));
    let new = match text.descriptor.ddb("geometry.cylinders") {
        Some(_) => with_key(&new, "ddb.geometry.cylinders", Some(&count), ""),
        None => new,
    };
    image.write_text(&mut text, new)
}

fn grow(part: &mut PartMut, len: u64, below: &Chain) -> Result<()> {
    let old = part.len;
    if let BodyMut::Flat { storage, at, .. } = &part.body {
        let end = at.plus(len)?.get();
        let have = storage.len()?;
        if end > have {
            if storage.hints().fixed_len {
                let text = format!("the device has {have} bytes, the extent would end at {end}");
                return Err(Error::new(ErrorKind::NoSpace, text).format(Format::Vmdk));
            }
            storage.set_len(end)?;
        }
        // The file may have had more than the disk.
        let known = at.plus(old)?;
        if known.get() < have {
            storage.zero(known..HostOffset::new(have.min(end)), ZeroHow::MayUnmap)?;
        }
        return storage.sync();
    }
    let Some(mut tables) = tables_of(part) else {
        return Ok(());
    };
    let Some(mut header) = part.header.clone() else {
        return Ok(());
    };
    // What lies behind the old end, of an earlier and larger size, say, must not come back.
    forget_behind(&mut tables, old)?;
    let into = old & tables.geometry.grain.saturating_sub(1);
    if into != 0
        && let (_, Kind::Data(host)) = tables.kind(old.saturating_sub(into))?
    {
        let end = host.plus(tables.geometry.grain)?;
        tables
            .storage
            .zero(host.plus(into)?..end, ZeroHow::KeepAllocated)?;
    }
    tables.write_back()?;
    let covers = tables.geometry.table_covers().max(1);
    let count = usize::try_from(len.div_ceil(covers)).map_err(|_| full())?;
    tables.add_empty(count)?;
    tables.geometry.disk = len;
    drop(tables);
    part.len = len;
    // What the backing image has there is not to come to light.
    zero_from(part, old, below)?;
    let Some(mut tables) = tables_of(part) else {
        return Ok(());
    };
    tables.write_back()?;
    header.capacity = header.capacity.max(len / SECTOR);
    header.gd = Some(tables.directory_at);
    header.rgd = tables.redundant.as_ref().map(|(at, _)| *at);
    tables.storage.write_at(HostOffset::ZERO, &header.to_bytes())?;
    tables.storage.sync()?;
    drop(tables);
    part.header = Some(header);
    Ok(())
}

fn shrink(part: &mut PartMut, len: u64) -> Result<()> {
    if let BodyMut::Flat { storage, at, .. } = &part.body {
        let end = at.plus(len)?.get();
        let known = at.plus(part.len)?.get();
        // Others may have what follows in the same file.
        if !storage.hints().fixed_len && storage.len()? == known {
            storage.set_len(end)?;
        }
        return storage.sync();
    }
    let Some(mut tables) = tables_of(part) else {
        return Ok(());
    };
    let Some(mut header) = part.header.clone() else {
        return Ok(());
    };
    tables.write_back()?;
    header.capacity = len / SECTOR;
    tables.storage.write_at(HostOffset::ZERO, &header.to_bytes())?;
    tables.storage.sync()?;
    forget_behind(&mut tables, len)?;
    tables.write_back()?;
    let count = usize::try_from(header.tables()).map_err(|_| full())?;
    tables.directory.truncate(count);
    if let Some((_, list)) = &mut tables.redundant {
        list.truncate(count);
    }
    tables.geometry.disk = len;
    cut_tail(&mut tables)?;
    drop(tables);
    part.header = Some(header);
    Ok(())
}

/// Cuts off what lies behind the last grain and the last table.
fn cut_tail(tables: &mut Tables) -> Result<()> {
    tables.forget();
    tables.find_ranges();
    let grain = (tables.geometry.grain / SECTOR).max(1);
    tables.next = up(tables.tables_end(), grain);
    tables.demand_sound()?;
    let end = tables.next.saturating_mul(SECTOR);
    if !tables.storage.hints().fixed_len && tables.storage.len()? > end {
        tables.storage.set_len(end)?;
        tables.storage.sync()?;
    }
    Ok(())
}

/// Empties all entries of grains that start at `end` or behind, and gives their space back.
fn forget_behind(tables: &mut Tables, end: u64) -> Result<()> {
    let grain = tables.geometry.grain;
    let mut at = end.checked_next_multiple_of(grain).unwrap_or(u64::MAX);
    let limit = tables
        .geometry
        .table_covers()
        .saturating_mul(tables.directory.len() as u64);
    let mut free = Vec::new();
    while at < limit {
        let (index, _) = tables.geometry.locate(at);
        if tables.is_blank(index, at)? {
            let covers = tables.geometry.table_covers().max(1);
            at = at.saturating_add(covers.saturating_sub(at.checked_rem(covers).unwrap_or(0)));
            continue;
        }
        let (entry, kind) = tables.kind(at)?;
        if entry != 0 {
            tables.set(at, 0)?;
            if let Kind::Data(host) = kind {
                free.push(host);
            }
        }
        at = at.saturating_add(grain);
        if tables.is_full() {
            let_go(tables, &mut free)?;
        }
    }
    let_go(tables, &mut free)
}

/// Gives grains back that no table names any more, once that is durable.
fn let_go(tables: &mut Tables, free: &mut Vec<HostOffset>) -> Result<()> {
    tables.write_back()?;
    for host in free.drain(..) {
        let end = host.plus(tables.geometry.grain)?;
        tables.storage.discard(host..end)?;
    }
    Ok(())
}
