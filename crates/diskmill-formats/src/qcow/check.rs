//! Whether an image contradicts itself, and putting that right.
//!
//! Tables, header and name each have a place of their own in the file, and so has every cluster that is stored as it is:
//! it is written in place. Compressed clusters may share bytes, since nobody changes them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use diskmill_core::{
    CheckReport, Finding, FindingKind, GuestOffset, HostOffset, Job, OpenSpec, Repair, Result, SECTOR,
    Storage, StorageMut,
};

use super::header::Header;
use super::layer::{read_l1, table_place};
use super::layout::HEADER_LEN;
use super::map::{L2Entry, MapError};
use super::tables::Tables;
use crate::tree::{Kind, up};

/// Sectors of a file, held in proportion to those that are in the set.
#[derive(Debug, Default)]
struct Sectors(BTreeMap<u64, [u64; 64]>);

/// Bytes of the file that an entry of [`Sectors`] is about: whole clusters of any size.
const PAGE: u64 = 4096 * SECTOR;

impl Sectors {
    fn place(sector: u64) -> (u64, usize, u64) {
        let word = usize::try_from(sector / 64 % 64).unwrap_or(0);
        (sector / 4096, word, 1 << (sector % 64))
    }

    /// Adds the sectors that bytes `start` to `end` touch; whether one was there.
    fn add(&mut self, start: u64, end: u64) -> bool {
        let mut known = false;
        for sector in start / SECTOR..end.div_ceil(SECTOR) {
            let (page, word, bit) = Self::place(sector);
            if let Some(word) = self.0.entry(page).or_insert([0; 64]).get_mut(word) {
                known |= *word & bit != 0;
                *word |= bit;
            }
        }
        known
    }

    /// Whether one of the sectors that bytes `start` to `end` touch is there.
    fn has(&self, start: u64, end: u64) -> bool {
        (start / SECTOR..end.div_ceil(SECTOR)).any(|sector| {
            let (page, word, bit) = Self::place(sector);
            let words = self.0.get(&page).and_then(|words| words.get(word));
            words.is_some_and(|word| word & bit != 0)
        })
    }
}

/// What a look at the tables found.
#[derive(Debug, Default)]
struct Found {
    report: CheckReport,
    /// Tables that are not in the file.
    lost_tables: Vec<usize>,
    /// Clusters whose entry cannot be, by the byte of the disk.
    lost: Vec<u64>,
    /// Clusters stored where another one before them is.
    shared: Vec<u64>,
    /// Contradictions that nobody can put right.
    hopeless: u64,
    /// Where all ends that is referred to.
    end: u64,
    plain: Sectors,
    packed: Sectors,
    tables: Sectors,
    /// Tables, header and name: first byte and the one behind the last.
    ranges: BTreeMap<u64, u64>,
}

impl Found {
    fn corrupt(&mut self, error: &MapError, host: u64, guest: Option<u64>) {
        let finding = Finding {
            kind: FindingKind::Corruption,
            text: error.to_string(),
            host: Some(HostOffset::new(host)),
            guest: guest.map(GuestOffset::new),
            fixed: false,
        };
        self.report.add(finding, 1);
    }

    /// Takes note of a structure; says whether it is in the place of another.
    fn structure(&mut self, start: u64, end: u64) -> bool {
        let before = self.ranges.range(..end).next_back();
        let clash = before.is_some_and(|(_, other)| *other > start);
        if !clash {
            self.ranges.insert(start, end);
            self.tables.add(start, end);
        }
        self.end = self.end.max(end);
        clash
    }

    fn hits_tables(&self, start: u64, end: u64) -> bool {
        let before = self.ranges.range(..end).next_back();
        before.is_some_and(|(_, other)| *other > start)
    }
}

fn look(header: &Header, main: &dyn Storage, how: &OpenSpec, job: Job<'_>) -> Result<Found> {
    let mut found = Found::default();
    let geometry = header.geometry;
    let (file_len, cluster_size) = (main.len()?, geometry.cluster_size());
    let l1 = read_l1(header, main, how)?;
    let l1_at = header.l1_table_offset.get();
    found.structure(0, HEADER_LEN);
    found.structure(l1_at, l1_at.saturating_add(header.l1_len()));
    if let Some((at, len)) = header.backing {
        found.structure(at.get(), at.saturating_add(len.into()).get());
    }
    // Tables that share their place with something else, by L1 entry.
    let mut clashing = BTreeSet::new();
    for (index, entry) in l1.iter().enumerate() {
        let guest = (index as u64).saturating_mul(geometry.covers());
        let entry_at = l1_at.saturating_add((index as u64).saturating_mul(8));
        let place = match table_place(*entry, geometry, file_len) {
            Ok(place) => place,
            Err(error) => {
                found.lost_tables.push(index);
                found.corrupt(&error, entry_at, Some(guest));
                None
            }
        };
        let clashes = place.filter(|at| {
            let end = at.saturating_add(geometry.l2_len());
            found.structure(at.get(), end.get())
        });
        if let Some(at) = clashes {
            found.hopeless = found.hopeless.saturating_add(1);
            let error = MapError::Overlap {
                what: "an L2 table",
                at: at.get(),
                other: "another table, the header or the name of the backing file",
            };
            found.corrupt(&error, entry_at, Some(guest));
            clashing.insert(index);
        }
    }
    let mut bytes = vec![0; usize::try_from(geometry.l2_len()).unwrap_or(0)];
    let mut last_end = 0;
    for (index, entry) in l1.iter().enumerate() {
        job.check()?;
        let (false, Ok(Some(at))) = (clashing.contains(&index), table_place(*entry, geometry, file_len))
        else {
            continue;
        };
        main.read_at(at, &mut bytes)?;
        let start = (index as u64).saturating_mul(geometry.covers());
        for (slot, entry) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let entry = L2Entry(u64::from_be_bytes(*entry));
            let guest = start.saturating_add((slot as u64).saturating_mul(cluster_size));
            if entry == L2Entry::ABSENT || guest >= header.virtual_size() {
                continue;
            }
            let entry_at = at.saturating_add((slot as u64).saturating_mul(8)).get();
            let span = match one(&mut found, header, entry, file_len, guest) {
                Ok(span) => span,
                Err(error) => {
                    found.corrupt(&error, entry_at, Some(guest));
                    continue;
                }
            };
            let report = &mut found.report;
            report.allocated_units = report.allocated_units.saturating_add(1);
            if last_end != 0 && span.0 != last_end {
                report.fragmented_units = report.fragmented_units.saturating_add(1);
            }
            last_end = span.1;
            found.end = found.end.max(span.1);
        }
    }
    found.report.total_units = header.virtual_size().div_ceil(cluster_size);
    found.report.image_end_offset = Some(HostOffset::new(found.end));
    leaks(&mut found, header, main, job)?;
    Ok(found)
}

/// Takes note of a cluster: where it is in the file.
fn one(
    found: &mut Found,
    header: &Header,
    entry: L2Entry,
    file_len: u64,
    guest: u64,
) -> Result<(u64, u64), MapError> {
    let geometry = header.geometry;
    let kind = entry.kind(geometry).inspect_err(|_| found.lost.push(guest))?;
    let (what, start, end) = match kind {
        Kind::Packed(_) => {
            let span = entry.span(geometry);
            ("a compressed cluster", span.at.get(), span.end().get())
        }
        Kind::Data(at) => {
            let end = at.saturating_add(geometry.cluster_size());
            ("a data cluster", at.get(), end.get())
        }
        Kind::Absent | Kind::Zero => return Ok((0, 0)),
    };
    // The file may end within the last cluster, if that is where clusters usually are.
    let whole = match kind {
        Kind::Data(_) => file_len.checked_next_multiple_of(geometry.cluster_size()),
        _ => Some(file_len),
    };
    if end > whole.unwrap_or(u64::MAX) {
        found.lost.push(guest);
        return Err(MapError::PastEnd {
            what,
            at: start,
            len: end.saturating_sub(start),
            file_len,
        });
    }
    if found.hits_tables(start, end) {
        found.lost.push(guest);
        return Err(MapError::InTables(start));
    }
    let shared = match kind {
        Kind::Data(_) => found.plain.add(start, end) || found.packed.has(start, end),
        _ => {
            found.packed.add(start, end);
            found.report.compressed_units = found.report.compressed_units.saturating_add(1);
            found.plain.has(start, end)
        }
    };
    if shared {
        found.shared.push(guest);
        return Err(MapError::Shared(start));
    }
    Ok((start, end))
}

/// Counts the clusters of the file in which nothing is. Behind all else they leak; in between they are a fact of life:
/// nothing in this format is ever moved or given out again.
fn leaks(found: &mut Found, header: &Header, main: &dyn Storage, job: Job<'_>) -> Result<()> {
    if main.hints().fixed_len || found.hopeless > 0 {
        return Ok(());
    }
    let cluster_size = header.geometry.cluster_size();
    let end = main.len()? / cluster_size * cluster_size;
    let used_end = up(found.end, cluster_size).min(end);
    // A sparse file may have far more clusters than anything refers to: only those that something does are looked at.
    let kinds = [&found.plain, &found.packed, &found.tables];
    let pages: BTreeSet<u64> = kinds
        .iter()
        .flat_map(|sectors| sectors.0.keys().copied())
        .collect();
    let mut used = 0_u64;
    for page in pages {
        job.check()?;
        let mut at = page.saturating_mul(PAGE);
        let page_end = at.saturating_add(PAGE).min(used_end);
        while at < page_end {
            let next = at.saturating_add(cluster_size);
            used = used.saturating_add(kinds.iter().any(|sectors| sectors.has(at, next)).into());
            at = next;
        }
    }
    let unused = (used_end / cluster_size).saturating_sub(used);
    let behind = end.saturating_sub(used_end) / cluster_size;
    for (kind, count, text) in [
        (FindingKind::Leak, behind, "behind all else"),
        (FindingKind::Note, unused, "in between"),
    ] {
        if count > 0 {
            let finding = Finding {
                kind,
                text: format!("{count} clusters of the file, {text}, hold nothing that anything refers to"),
                host: (kind == FindingKind::Leak).then_some(HostOffset::new(used_end)),
                guest: None,
                fixed: false,
            };
            found.report.add(finding, count);
        }
    }
    Ok(())
}

/// Looks for contradictions.
pub(super) fn run(header: &Header, main: &dyn Storage, how: &OpenSpec, job: Job<'_>) -> Result<CheckReport> {
    Ok(look(header, main, how, job)?.report)
}

/// Puts right what [`run`] finds. A cluster whose entry cannot be has lost its data: it is left to the layer below. A
/// cluster that shares its place gets a copy. What leaks is cut off. Tables in one place cannot be told apart, and nothing is changed then.
pub(super) fn repair(
    header: Header,
    main: &Arc<dyn StorageMut>,
    how: &OpenSpec,
    what: Repair,
    job: Job<'_>,
) -> Result<CheckReport> {
    let found = look(&header, main.as_ref() as &dyn Storage, how, job)?;
    let before = &found.report;
    if found.hopeless > 0 || (before.corruptions > 0 && what == Repair::Leaks) {
        return Ok(found.report);
    }
    if before.corruptions > 0 {
        mend(&found, &header, main, how, job)?;
    }
    let after = look(&header, main.as_ref() as &dyn Storage, how, job)?;
    if !main.hints().fixed_len && after.end < main.len()? {
        main.set_len(after.end)?;
        main.sync()?;
    }
    let mut report = look(&header, main.as_ref() as &dyn Storage, how, job)?.report;
    report.corruptions_fixed = before.corruptions.saturating_sub(report.corruptions);
    report.leaks_fixed = before.leaks.saturating_sub(report.leaks);
    for finding in &before.findings {
        let leak = finding.kind == FindingKind::Leak && report.leaks_fixed > 0;
        if finding.kind == FindingKind::Corruption || leak {
            report.findings.push(Finding {
                fixed: true,
                ..finding.clone()
            });
        }
    }
    Ok(report)
}

fn mend(
    found: &Found,
    header: &Header,
    main: &Arc<dyn StorageMut>,
    how: &OpenSpec,
    job: Job<'_>,
) -> Result<()> {
    let mut tables = Tables::open_any(header.clone(), Arc::clone(main), how)?;
    for index in &found.lost_tables {
        tables.drop_table(*index)?;
    }
    for guest in &found.lost {
        tables.set(*guest, L2Entry::ABSENT)?;
        tables.relieve()?;
    }
    // Before a copy is put where one of these was said to be.
    tables.settle()?;
    let mut cluster = vec![0; usize::try_from(header.geometry.cluster_size()).unwrap_or(0)];
    for guest in &found.shared {
        job.check()?;
        let entry = tables.entry(*guest)?;
        match entry.kind(header.geometry)? {
            Kind::Data(from) => {
                let to = tables.take_clusters(1)?;
                main.read_padded(from, &mut cluster)?;
                main.write_at(to, &cluster)?;
                tables.set(*guest, L2Entry::data(to))?;
            }
            // A stream in which data was written.
            Kind::Packed(_) => tables.set(*guest, L2Entry::ABSENT)?,
            Kind::Absent | Kind::Zero => {}
        }
        tables.relieve()?;
    }
    tables.settle()
}
