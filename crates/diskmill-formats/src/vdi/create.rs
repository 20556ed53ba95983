//! New images, filled in guest order.

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    Builder, CreateSpec, DataRuns, Durability, Encoder, Error, ErrorKind, FileIndex, FilesMut, Finish,
    Format, GuestOffset, HostOffset, HostSpan, Measure, OutputSpec, Result, Run, SECTOR, StorageMut, Stored,
    Writes, ZeroHow,
};

use super::header::ImageType;
use super::layout::{BLOCK, FREE};
use super::map::{BlockMap, Entry, block_of};
use super::options::{Plan, blocks};
use crate::codec::UnitEncoder;
use crate::preallocation::{Preallocation, write_zeros};

/// The step in which data is taken: a page, so that zeros within a block become holes.
const UNIT: u64 = 4096;

/// Entries of the map that are written at once.
const PIECE: u32 = 256 << 10;

/// See [`Driver::outputs`](diskmill_core::Driver::outputs).
pub(super) fn outputs(spec: &CreateSpec) -> Result<Vec<OutputSpec>> {
    Plan::new(spec)?;
    Ok(vec![OutputSpec::main()])
}

/// See [`Driver::measure`](diskmill_core::Driver::measure).
pub(super) fn measure(spec: &CreateSpec, data: Option<&mut dyn DataRuns>) -> Result<Measure> {
    let plan = Plan::new(spec)?;
    let all = plan.header.blocks;
    let mut needed = 0_u32;
    if plan.header.image_type == ImageType::Fixed {
        needed = all;
    } else if let Some(runs) = data {
        let mut next = 0;
        while let Some(run) = runs.next_run()? {
            if run.start >= run.end {
                continue;
            }
            let first = block_of(run.start).max(next);
            let end = blocks(run.end.get())?;
            needed = needed.saturating_add(end.saturating_sub(first));
            next = next.max(end);
        }
    }
    Ok(Measure {
        required: plan.end(needed.min(all)).get(),
        fully_allocated: plan.end(all).get(),
        bitmaps: None,
    })
}

/// See [`Driver::build`](diskmill_core::Driver::build).
pub(super) fn build(spec: &CreateSpec, files: FilesMut) -> Result<Box<dyn Builder>> {
    let plan = Plan::new(spec)?;
    let files: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
    let [file] = files.as_slice() else {
        let text = format!("a vdi image has 1 file, got {}", files.len());
        return Err(Error::new(ErrorKind::Usage, text).format(Format::Vdi));
    };
    let hints = file.hints();
    if hints.append_only {
        let text = "vdi cannot be written to a pipe: its map comes before the data it tells of";
        return Err(Error::new(ErrorKind::Unsupported, text).format(Format::Vdi));
    }
    let room = match hints.fixed_len {
        true => file.len()?,
        false => u64::MAX,
    };
    let start = plan.end(if plan.header.image_type == ImageType::Fixed {
        plan.header.blocks
    } else {
        0
    });
    if start.get() > room {
        return Err(full(room, start.get()));
    }
    if hints.fixed_len {
        // An old header must not make an image of a half-written map.
        file.zero(HostOffset::ZERO..HostOffset::new(SECTOR), ZeroHow::KeepAllocated)?;
    } else if plan.preallocation == Preallocation::Falloc {
        file.allocate(HostOffset::ZERO..start)?;
    }
    Ok(Box::new(VdiBuilder {
        unit: if plan.header.is_diff() { BLOCK } else { UNIT },
        stale: hints.fixed_len,
        room,
        placed: GuestOffset::ZERO,
        map: BlockMap::default(),
        slots: 0,
        cleared: None,
        files,
        plan,
    }))
}

fn full(have: u64, need: u64) -> Error {
    let text = format!("the device has {have} bytes, the image needs {need}");
    Error::new(ErrorKind::NoSpace, text).format(Format::Vdi)
}

#[derive(Debug)]
struct VdiBuilder {
    plan: Plan,
    files: Vec<Arc<dyn StorageMut>>,
    unit: u64,
    /// Whether the storage may hold old bytes where nothing is written.
    stale: bool,
    /// Bytes the file can have.
    room: u64,
    /// All guest bytes below are placed.
    placed: GuestOffset,
    /// Blocks placed so far, up to the last that is not free. Not used in fixed images.
    map: BlockMap,
    /// Slots given out.
    slots: u32,
    /// On stale storage: the block of the last slot, and how far into it zeros or data have been put.
    cleared: Option<(u32, u64)>,
}

impl VdiBuilder {
    fn is_fixed(&self) -> bool {
        self.plan.header.image_type == ImageType::Fixed
    }

    /// Moves on over `range`, if it is the next.
    fn advance(&mut self, range: &Range<GuestOffset>) -> Result<()> {
        if range.start != self.placed || range.end < range.start || !range.start.is_aligned(self.unit) {
            let text = format!(
                "bytes {} to {} are placed, must start at {} and at a multiple of {}",
                range.start, range.end, self.placed, self.unit
            );
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Vdi));
        }
        self.placed = range.end;
        Ok(())
    }

    /// The slot of a block, which gets the next if it has none.
    fn slot(&mut self, block: u32, writes: &mut Writes<'_>) -> Result<u32> {
        if self.is_fixed() {
            return Ok(block);
        }
        if let Entry::Slot(slot) = self.map.get(block) {
            return Ok(slot);
        }
        let slot = self.slots;
        let end = self.plan.end(slot.saturating_add(1)).get();
        if end > self.room {
            return Err(full(self.room, end));
        }
        self.clear_rest(writes)?;
        self.slots = slot.saturating_add(1);
        self.set(block, Entry::Slot(slot));
        self.cleared = Some((block, 0));
        Ok(slot)
    }

    fn set(&mut self, block: u32, entry: Entry) {
        if self.map.len() <= block {
            self.map.resize(block.saturating_add(1));
        }
        self.map.set(block, entry);
    }

    /// Where the bytes from `at` on go; those of one plain run lie in a row.
    fn host(&mut self, at: GuestOffset, writes: &mut Writes<'_>) -> Result<HostOffset> {
        let slot = self.slot(block_of(at), writes)?;
        HostOffset::new(self.plan.header.slot_at(slot)).plus(at.within(BLOCK))
    }

    /// Gives all blocks of `range` their slots. Returns where the first byte goes; the others follow.
    fn take(&mut self, range: &Range<GuestOffset>, writes: &mut Writes<'_>) -> Result<HostOffset> {
        let start = self.host(range.start, writes)?;
        let mut at = range.start;
        while at < range.end {
            let end = at.align_down(BLOCK).saturating_add(BLOCK).min(range.end);
            let host = self.host(at, writes)?;
            self.fill_to(at, end, host, writes)?;
            at = end;
        }
        Ok(start)
    }

    /// On stale storage, zeros what of a block lies between the last data in it and the bytes of `at` to `end`.
    fn fill_to(
        &mut self,
        at: GuestOffset,
        end: GuestOffset,
        host: HostOffset,
        writes: &mut Writes<'_>,
    ) -> Result<()> {
        if !self.stale || self.is_fixed() {
            return Ok(());
        }
        let block = block_of(at);
        let within = at.within(BLOCK);
        if let Some((known, done)) = self.cleared
            && known == block
            && done < within
        {
            let start = HostOffset::new(host.get().saturating_sub(within)).plus(done)?;
            writes.push_zero(FileIndex::MAIN, start..host, ZeroHow::KeepAllocated);
        }
        self.cleared = Some((block, within.saturating_add(end.since(at))));
        Ok(())
    }

    /// On stale storage, zeros the rest of the last block that got a slot.
    fn clear_rest(&mut self, writes: &mut Writes<'_>) -> Result<()> {
        if let Some((_, done)) = self.cleared.take()
            && self.stale
            && done < BLOCK
            && let Some(last) = self.slots.checked_sub(1)
        {
            let end = self.plan.end(self.slots);
            let start = self.plan.end(last).plus(done)?;
            writes.push_zero(FileIndex::MAIN, start..end, ZeroHow::KeepAllocated);
        }
        Ok(())
    }

    /// Makes a run of a fixed image read as zeros.
    fn zeros_of_fixed(&self, range: &Range<GuestOffset>, writes: &mut Writes<'_>) -> Result<()> {
        let host = HostOffset::new(self.plan.header.data_offset.into());
        let range = host.plus(range.start.get())?..host.plus(range.end.get())?;
        if self.plan.preallocation == Preallocation::Full {
            write_zeros(FileIndex::MAIN, range, writes);
        } else if self.stale && range.start < range.end {
            writes.push_zero(FileIndex::MAIN, range, ZeroHow::MayUnmap);
        }
        Ok(())
    }
}

impl Builder for VdiBuilder {
    fn unit(&self) -> u64 {
        self.unit
    }

    fn files(&self) -> &[Arc<dyn StorageMut>] {
        &self.files
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(UnitEncoder::new(None)?))
    }

    fn place<'b>(&mut self, at: GuestOffset, stored: Stored<'b>, writes: &mut Writes<'b>) -> Result<()> {
        let Stored::Plain(bytes) = stored else {
            return Err(Error::new(ErrorKind::Usage, "vdi images hold no packed units").format(Format::Vdi));
        };
        let range = at..at.plus(bytes.len() as u64)?;
        self.advance(&range)?;
        if !bytes.is_empty() {
            let host = self.take(&range, writes)?;
            writes.push(FileIndex::MAIN, host, bytes);
        }
        Ok(())
    }

    fn place_run<'b>(&mut self, range: Range<GuestOffset>, what: Run, writes: &mut Writes<'b>) -> Result<()> {
        self.advance(&range)?;
        if self.is_fixed() {
            return self.zeros_of_fixed(&range, writes);
        }
        if what == Run::Zero && self.plan.header.is_diff() && range.start < range.end {
            // Such a builder takes whole blocks.
            for block in block_of(range.start)..blocks(range.end.get())? {
                self.set(block, Entry::Zero);
            }
        }
        Ok(())
    }

    fn reserve<'b>(
        &mut self,
        range: Range<GuestOffset>,
        writes: &mut Writes<'b>,
    ) -> Result<Option<HostSpan>> {
        if range.is_empty() {
            return Ok(None);
        }
        self.advance(&range)?;
        Ok(Some(HostSpan {
            file: FileIndex::MAIN,
            at: self.take(&range, writes)?,
            len: range.end.since(range.start),
        }))
    }

    fn finish(mut self: Box<Self>, end: Finish) -> Result<()> {
        let mut writes = Writes::new();
        self.clear_rest(&mut writes)?;
        writes.perform(&self.files)?;
        let Self {
            mut plan,
            files,
            placed,
            map,
            slots,
            ..
        } = *self;
        let header = &mut plan.header;
        if let Some(size) = end.final_size {
            let size = size.checked_next_multiple_of(SECTOR).unwrap_or(size);
            if blocks(size)? > header.blocks {
                let text = format!(
                    "a disk of {size} bytes was announced as one of {}",
                    header.disk_size
                );
                return Err(Error::new(ErrorKind::Usage, text).format(Format::Vdi));
            }
            header.disk_size = size;
        }
        if placed.get() < header.disk_size {
            let text = format!(
                "the image ends at {placed}, must be filled up to {}",
                header.disk_size
            );
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Vdi));
        }
        let fixed = header.image_type == ImageType::Fixed;
        header.blocks_allocated = if fixed { header.blocks } else { slots };
        let header = plan.header.clone();
        for file in &files {
            let mut block = 0;
            while block < header.blocks {
                let count = header.blocks.saturating_sub(block).min(PIECE);
                let at = HostOffset::new(header.blocks_offset.into()).plus(u64::from(block) * 4)?;
                let bytes = if fixed {
                    (block..block.saturating_add(count))
                        .flat_map(u32::to_le_bytes)
                        .collect()
                } else {
                    map.bytes(block, usize::try_from(count).unwrap_or(usize::MAX))
                };
                file.write_at(at, &bytes)?;
                block = block.saturating_add(count);
            }
            // What the map does not fill up to the data is zeros, as QEMU has it; in a new file it is.
            let map_end = HostOffset::new(header.blocks_offset.into()).plus(header.map_len())?;
            if file.hints().fixed_len {
                let data = HostOffset::new(header.data_offset.into());
                if map_end < data {
                    file.zero(map_end..data, ZeroHow::KeepAllocated)?;
                }
            } else {
                let len = plan.end(header.blocks_allocated).get();
                if file.len()? != len {
                    file.set_len(len)?;
                }
            }
            if end.durability == Durability::Synced {
                file.sync()?;
            }
            file.write_at(HostOffset::ZERO, &header.to_bytes())?;
            if end.durability == Durability::Synced {
                file.sync()?;
            }
        }
        Ok(())
    }
}

const _: () = assert!(FREE == u32::MAX, "bytes of 0xff are free entries");
