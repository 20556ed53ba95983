//! Whether an image contradicts itself, and putting that right.
//!
//! Each slot belongs to one block at most and is in the file, and `blocks_allocated` is above all slots in use. A
//! number that is larger than need be, and whole blocks behind the last slot, are leaks: a power cut leaves them.

use std::sync::Arc;

use diskmill_core::{
    CheckReport, Finding, FindingKind, GuestOffset, HostOffset, Job, OpenSpec, Repair, Result, Storage,
    StorageMut,
};

use super::header::Header;
use super::layout::{BLOCK, ENTRIES_PER_SECTOR};
use super::map::{BlockMap, Entry};
use super::tables::Tables;
use crate::slots::Slots;

/// What a look at the map found.
#[derive(Debug, Default)]
struct Found {
    findings: Vec<(Finding, u64)>,
    corruptions: u64,
    /// Blocks whose slot cannot be.
    lost: Vec<u32>,
    /// Blocks in a slot that another block before them has.
    shared: Vec<u32>,
}

impl Found {
    fn add(
        &mut self,
        kind: FindingKind,
        count: u64,
        host: u64,
        block: Option<u32>,
        text: impl FnOnce() -> String,
    ) {
        if kind == FindingKind::Corruption {
            self.corruptions = self.corruptions.saturating_add(count);
        }
        if self.findings.len() < CheckReport::KEPT {
            let finding = Finding {
                kind,
                text: text(),
                host: Some(HostOffset::new(host)),
                guest: block.map(|block| GuestOffset::new(u64::from(block) * BLOCK)),
                fixed: false,
            };
            self.findings.push((finding, count));
        } else if let Some((_, last)) = self
            .findings
            .iter_mut()
            .rfind(|(finding, _)| finding.kind == kind)
        {
            // Counted, not kept.
            *last = last.saturating_add(count);
        }
    }

    fn report(&self, fixed: bool) -> CheckReport {
        let mut report = CheckReport::default();
        for (finding, count) in &self.findings {
            let finding = Finding {
                fixed,
                ..finding.clone()
            };
            report.add(finding, *count);
        }
        report
    }
}

/// Where the entry of a block is.
fn entry_at(header: &Header, block: u32) -> u64 {
    u64::from(header.blocks_offset).saturating_add(u64::from(block) * 4)
}

fn look(header: &Header, map: &BlockMap, main: &dyn Storage, job: Job<'_>) -> Result<Found> {
    let mut found = Found::default();
    let file_len = main.len()?;
    let mut slots = Slots::default();
    for (block, slot) in map.slots() {
        if u64::from(block).is_multiple_of(ENTRIES_PER_SECTOR << 10) {
            job.check()?;
        }
        let at = entry_at(header, block);
        if let Err(error) = map.place(block, header, file_len) {
            found.lost.push(block);
            found.add(FindingKind::Corruption, 1, at, Some(block), || error.to_string());
        } else if !slots.add(slot) {
            found.shared.push(block);
            found.add(FindingKind::Corruption, 1, at, Some(block), || {
                format!("block {block} is in slot {slot}, which another block is in")
            });
        }
    }
    let (count, end) = (header.blocks_allocated, slots.end());
    if count < end {
        found.add(FindingKind::Corruption, 1, 388, None, || {
            format!(
                "blocks_allocated is {count}, must be at least {end}: slot {} is in use",
                end.saturating_sub(1)
            )
        });
    }
    let behind = match main.hints().fixed_len {
        true => 0,
        false => file_len.saturating_sub(header.slot_at(count.max(end))) / BLOCK,
    };
    let unused = u64::from(count.max(end).saturating_sub(slots.count()));
    if unused > 0 {
        found.add(FindingKind::Leak, unused, 388, None, || {
            format!(
                "blocks_allocated is {count}, and {} blocks are in slots: {unused} slots hold nothing",
                slots.count()
            )
        });
    }
    if behind > 0 {
        found.add(
            FindingKind::Leak,
            behind,
            header.slot_at(count.max(end)),
            None,
            || format!("{behind} blocks behind the last slot hold nothing"),
        );
    }
    Ok(found)
}

/// Looks for contradictions.
pub(super) fn run(header: &Header, main: &dyn Storage, how: &OpenSpec, job: Job<'_>) -> Result<CheckReport> {
    let map = BlockMap::load(main, header, &how.limits)?;
    Ok(look(header, &map, main, job)?.report(false))
}

/// Puts right what [`run`] finds. A block whose slot is not in the file has lost its data: it is made free. A block that
/// shares its slot gets a copy. Each step is durable before the next relies on it.
pub(super) fn repair(
    header: &Header,
    main: &Arc<dyn StorageMut>,
    how: &OpenSpec,
    what: Repair,
    job: Job<'_>,
) -> Result<CheckReport> {
    let map = BlockMap::load(main.as_ref(), header, &how.limits)?;
    let found = look(header, &map, main.as_ref(), job)?;
    if found.findings.is_empty() || (found.corruptions > 0 && what == Repair::Leaks) {
        // With contradictions about, nobody knows what is a leak.
        return Ok(found.report(false));
    }
    let mut tables = Tables::open_any(header.clone(), map, Arc::clone(main))?;
    if !found.lost.is_empty() {
        tables.touch()?;
        for block in &found.lost {
            tables.enter(*block, Entry::Free);
        }
        tables.settle_for_good()?;
        tables.recount();
    }
    let mut buf = Vec::new();
    for block in &found.shared {
        job.check()?;
        if let Entry::Slot(from) = tables.map.get(*block) {
            let (to, _) = tables.take(0)?;
            tables.copy(from, to, &mut buf)?;
            tables.enter(*block, Entry::Slot(to));
            tables.settle_if_many()?;
        }
    }
    tables.settle_for_good()?;
    tables.pack()?;
    let mut report = found.report(true);
    for (finding, count) in look(&tables.header, &tables.map, main.as_ref(), job)?.findings {
        report.add(finding, count);
    }
    Ok(report)
}
