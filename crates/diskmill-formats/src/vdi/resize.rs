//! Changing the size of the disk, and emptying it.
//!
//! The block map is followed by data. Where it must grow and there is no room, the blocks behind it are copied away, the
//! new map is written into their place, and one write of the header shows it: at every moment the header names a whole
//! map, the old one or the new.

use std::sync::atomic::Ordering;

use diskmill_core::{Chain, Error, ErrorKind, GuestOffset, HostOffset, Result, SECTOR, ZeroHow};

use super::layout::BLOCK;
use super::map::{BlockMap, Entry, block_of};
use super::options::{SizeError, blocks};
use super::tables::{Tables, TablesError};
use super::write::Image;
use crate::slots::Slots;

impl Image {
    /// Forgets all data. All blocks are held.
    pub(super) fn clear_held(&self) -> Result<()> {
        let mut tables = self.lock();
        if self.fixed {
            // Its blocks stay where they are.
            let start = HostOffset::new(tables.header.data_offset.into());
            let end = HostOffset::new(tables.header.slot_at(tables.slots.end()));
            return tables.file.zero(start..end, ZeroHow::MayUnmap);
        }
        let stored: Vec<u32> = (0..tables.map.len())
            .filter(|block| tables.map.get(*block) != Entry::Free)
            .collect();
        for block in stored {
            tables.enter(block, Entry::Free);
        }
        tables.settle_for_good()?;
        tables.slots = Slots::default();
        tables.pack().map(drop)
    }

    /// Gives the disk another size, rounded up to a sector. All blocks are held.
    pub(super) fn resize_held(&self, size: u64, below: &Chain) -> Result<()> {
        let old = self.size.load(Ordering::Acquire);
        let size = size
            .checked_next_multiple_of(SECTOR)
            .ok_or_else(|| Error::new(ErrorKind::Unsupported, SizeError(size)))?;
        let count = blocks(size)?;
        if size > old {
            self.grow(old, size, count, below)?;
        } else if size < old {
            self.shrink(old, size, count)?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn grow(&self, old: u64, size: u64, count: u32, below: &Chain) -> Result<()> {
        self.clear_edge(old, below)?;
        let mut tables = self.lock();
        tables.settle_for_good()?;
        let first = tables.header.blocks;
        if count > first {
            tables.make_room(count)?;
            tables.map.resize(count);
            self.fill_new(&mut tables, first, count, old, below)?;
            tables.write_map(first..count)?;
        }
        tables.file.sync()?;
        tables.header.blocks = count.max(first);
        tables.header.disk_size = size;
        tables.header.blocks_allocated = tables.header.blocks_allocated.max(tables.slots.end());
        tables.switch_header()
    }

    /// Makes what the last block holds behind the end of the disk zeros.
    fn clear_edge(&self, old: u64, below: &Chain) -> Result<()> {
        let at = GuestOffset::new(old);
        if at.is_aligned(BLOCK) {
            return Ok(());
        }
        let block = block_of(at);
        let (entry, host) = {
            let tables = self.lock();
            let entry = tables.map.get(block);
            let host = match entry {
                Entry::Slot(slot) => Some(HostOffset::new(tables.header.slot_at(slot))),
                _ => None,
            };
            (entry, host)
        };
        match (entry, host) {
            (_, Some(host)) => {
                let end = host.plus(BLOCK)?;
                // The file may end with the disk.
                self.lock().grow_file(end.get())?;
                self.file
                    .zero(host.plus(at.within(BLOCK))?..end, ZeroHow::KeepAllocated)
            }
            (Entry::Free, None) if self.is_diff() && below.virtual_size() > old => {
                self.write_new(block, at.align_down(BLOCK), &[], below)
            }
            _ => Ok(()),
        }
    }

    /// Decides where the new blocks from `first` on are.
    fn fill_new(&self, tables: &mut Tables, first: u32, count: u32, old: u64, below: &Chain) -> Result<()> {
        if self.fixed {
            for block in first..count {
                let (slot, fresh) = tables.take(0)?;
                if !fresh {
                    let (start, end) = (
                        tables.header.slot_at(slot),
                        tables.header.slot_at(slot.saturating_add(1)),
                    );
                    let range = HostOffset::new(start)..HostOffset::new(end);
                    tables.file.zero(range, ZeroHow::MayUnmap)?;
                }
                tables.map.set(block, Entry::Slot(slot));
            }
        } else if self.is_diff() && below.virtual_size() > old {
            // Nothing of what is below behind the old end may come to light.
            let end = blocks(below.virtual_size()).unwrap_or(count).min(count);
            for block in first..end {
                tables.map.set(block, Entry::Zero);
            }
        }
        Ok(())
    }

    fn shrink(&self, old: u64, size: u64, count: u32) -> Result<()> {
        let mut tables = self.lock();
        // Other programs may take the rest of the last block for zeros when they grow the disk.
        let edge = GuestOffset::new(size);
        if !edge.is_aligned(BLOCK)
            && let Entry::Slot(slot) = tables.map.get(block_of(edge))
        {
            let at = HostOffset::new(tables.header.slot_at(slot));
            let end = at.plus(old.saturating_sub(edge.align_down(BLOCK).get()).min(BLOCK))?;
            tables
                .file
                .zero(at.plus(edge.within(BLOCK))?..end, ZeroHow::KeepAllocated)?;
        }
        let gone = if self.is_diff() { Entry::Zero } else { Entry::Free };
        let behind: Vec<(u32, u32)> = tables.map.slots().filter(|(block, _)| *block >= count).collect();
        for (block, _) in &behind {
            tables.enter(*block, gone);
        }
        tables.settle_for_good()?;
        for (_, slot) in behind {
            tables.slots.remove(slot);
        }
        tables.pack()?;
        tables.map.resize(count);
        tables.header.blocks = count;
        tables.header.disk_size = size;
        tables.switch_header()
    }
}

impl Tables {
    /// Makes room for a map of `count` entries.
    fn make_room(&mut self, count: u32) -> Result<()> {
        let needed = u64::from(count) * 4;
        let (map, data) = (self.header.blocks_offset, self.header.data_offset);
        if u64::from(map).saturating_add(needed) <= data.into() {
            return Ok(());
        }
        let moved = u32::try_from(needed.div_ceil(BLOCK)).unwrap_or(u32::MAX);
        let new_data = self.header.slot_at(moved);
        let data_offset = u32::try_from(new_data).map_err(|_| TablesError::DataOffset(new_data))?;
        // What is in the way gets a place behind it, in the old map.
        let mut buf = Vec::new();
        let in_the_way: Vec<(u32, u32)> = self.map.slots().filter(|(_, slot)| *slot < moved).collect();
        for (block, from) in &in_the_way {
            let (to, _) = self.take(moved)?;
            self.copy(*from, to, &mut buf)?;
            self.enter(*block, Entry::Slot(to));
        }
        self.settle_for_good()?;
        for (_, slot) in in_the_way {
            self.slots.remove(slot);
        }
        // The new map goes there; its entries count from the new start of the data.
        let mut entries = BlockMap::default();
        entries.resize(self.map.len());
        let mut slots = Slots::default();
        for block in 0..self.map.len() {
            let entry = match self.map.get(block) {
                Entry::Slot(slot) => Entry::Slot(slot.saturating_sub(moved)),
                entry => entry,
            };
            if let Entry::Slot(slot) = entry {
                slots.add(slot);
            }
            entries.set(block, entry);
        }
        self.grow_file(new_data)?;
        let old = (self.header.clone(), std::mem::replace(&mut self.map, entries));
        self.header.blocks_offset = data;
        self.header.data_offset = data_offset;
        self.header.blocks_allocated = slots.end();
        let written = self.write_map(0..self.map.len()).and_then(|()| self.file.sync());
        if let Err(error) = written {
            // Nobody looks there yet.
            (self.header, self.map) = old;
            return Err(error);
        }
        self.slots = slots;
        self.switch_header()
    }
}
