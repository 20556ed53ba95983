//! Writing an image anew under its own name, where its format offers no way to change it in place.
//!
//! The new file is complete before it takes the name, so that whatever stops this leaves the old image as it was.

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    Builder, CreateSpec, Durability, Error, ErrorKind, Finish, GuestOffset, HostOffset, HostRun, Layer,
    Result, Role, Run, SECTOR, State, StorageMut, Writes,
};
use diskmill_formats::registry;
use diskmill_storage::{StageOptions, Staged};

use super::create::name_it;
use crate::open::{self, OpenRequest};

/// Bytes copied at a time.
const PIECE: usize = 1 << 20;

/// Writes the image of `request` anew as a disk of `size` bytes. What it leaves to the image below stays so, and new bytes
/// read as zeros. Returns the size it has then.
pub(super) fn resize(request: &OpenRequest, size: u64) -> Result<u64> {
    let path = request.spec.path();
    let options = StageOptions::new().cache(request.cache).beside();
    // With the locks on the old file, which stays what it is from here on.
    let staged = Staged::create(path, &options)?;
    let mut source = request.clone();
    source.spec.file.lock = false;
    let image = open::image(&source)?;
    let top = image
        .chain
        .layers()
        .first()
        .ok_or_else(|| Error::bare(ErrorKind::Usage))?;
    let below = image.chain.below().virtual_size();
    let facts = top.facts();
    let driver = registry::by_name(facts.format.name()).ok_or_else(|| Error::bare(ErrorKind::Usage))?;
    let size = super::create::whole_sectors(size)?;
    let mut spec = CreateSpec::new(size);
    spec.backing.clone_from(&facts.backing);
    if let Some(backing) = &spec.backing
        && backing.name.contains(char::REPLACEMENT_CHARACTER)
    {
        let text = format!(
            "the name of the backing file, '{}', is not UTF-8 and cannot be written anew",
            backing.name
        );
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    name_it(&mut spec, path);
    let mut file = staged.storage();
    if let Some(around) = &request.around {
        file = around.around(path, file);
    }
    let mut builder = driver.build(&spec, vec![(Role::Main, Arc::clone(&file))])?;
    let old = top.virtual_size().min(size);
    copy(top.as_ref(), old, builder.as_mut(), file.as_ref())?;
    // What is below and was hidden by the end of the disk stays hidden.
    let hidden = below.clamp(old, size);
    let at = GuestOffset::new;
    for (range, what) in [(old..hidden, Run::Zero), (hidden..size, Run::Absent)] {
        if !range.is_empty() {
            builder.fill(at(range.start)..at(range.end), what)?;
        }
    }
    builder.finish(Finish::new(Durability::Synced))?;
    staged.commit(Durability::Synced)?;
    Ok(size)
}

/// Copies what `top` says of its first `end` bytes.
fn copy(top: &dyn Layer, end: u64, builder: &mut dyn Builder, file: &dyn StorageMut) -> Result<()> {
    let mut at = GuestOffset::ZERO;
    while at.get() < end {
        let extent = top.map(at, end.saturating_sub(at.get()))?;
        let run = at..at.plus(extent.len)?;
        match extent.state {
            State::Absent => builder.fill(run.clone(), Run::Absent)?,
            State::Zero { .. } => builder.fill(run.clone(), Run::Zero)?,
            _ => copy_stored(top, run.clone(), builder, file)?,
        }
        at = run.end;
    }
    Ok(())
}

/// Copies bytes that are stored. What the host has as holes becomes zeros, sector by sector.
fn copy_stored(
    top: &dyn Layer,
    range: Range<GuestOffset>,
    builder: &mut dyn Builder,
    file: &dyn StorageMut,
) -> Result<()> {
    let mut at = range.start;
    let mut buf = Vec::new();
    while at < range.end {
        let left = range.end.since(at);
        let (is_hole, run) = host_run(top, at, left)?;
        if is_hole {
            let end = at.plus(run)?;
            builder.fill(at..end, Run::Zero)?;
            at = end;
            continue;
        }
        let len = usize::try_from(run).unwrap_or(usize::MAX).min(PIECE);
        let end = at.plus(len as u64)?;
        buf.resize(len, 0);
        top.read_at(at, &mut buf)?;
        let mut writes = Writes::new();
        let span = builder.reserve(at..end, &mut writes)?;
        writes.perform(builder.files())?;
        let span = span.ok_or_else(|| Error::bare(ErrorKind::Unsupported))?;
        file.write_at(span.at, &buf)?;
        at = end;
    }
    Ok(())
}

/// Whether the host has the bytes from `at` on, which are stored, as a hole, and for how many of `max` that holds: whole
/// sectors.
fn host_run(top: &dyn Layer, at: GuestOffset, max: u64) -> Result<(bool, u64)> {
    let State::Data(span) = top.map(at, max)?.state else {
        return Ok((false, max));
    };
    let Some(file) = top.file(span.file) else {
        return Ok((false, max));
    };
    if span.at >= HostOffset::new(file.len()?) {
        return Ok((false, max));
    }
    let max = max.min(span.len);
    Ok(match file.run_at(span.at)? {
        HostRun::Hole(len) if len.min(max) >= SECTOR => (true, len.min(max) / SECTOR * SECTOR),
        HostRun::Hole(_) => (false, SECTOR.min(max)),
        HostRun::Data(len) => (false, len.next_multiple_of(SECTOR).min(max)),
        _ => (false, max),
    })
}
