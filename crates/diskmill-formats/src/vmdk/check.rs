//! Looking for contradictions in tables, and putting right what can be.
//!
//! The primary directory and its tables are what readers use: where the redundant copy differs it is made the same,
//! and where a primary table is lost the redundant one takes its place.

use std::sync::Arc;

use diskmill_core::{
    CheckReport, Error, ErrorKind, Files, FilesMut, Finding, FindingKind, GuestOffset, HostOffset, Job,
    Repair, Result, SECTOR, Storage, StorageMut,
};

use super::VmdkImage;
use super::header::Header;
use super::layer::{Body, in_common, open_parts};
use super::layout::GRAIN_MARKER_LEN;
use super::map::{Kind, sector, up};
use super::sparse::{Dialect, Sparse, is_hole, read_directory, words};
use super::tables::{Seen, front, overlap};

/// See [`diskmill_core::Parsed::check`].
pub(super) fn check(image: &VmdkImage, files: Files, job: Job<'_>) -> Result<CheckReport> {
    let files: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
    look(image, &files, job)
}

/// The same; `files` are the main one and those its references name.
pub(super) fn look(image: &VmdkImage, files: &[Arc<dyn Storage>], job: Job<'_>) -> Result<CheckReport> {
    run(image, files, None, job)
}

/// See [`diskmill_core::Parsed::repair`].
pub(super) fn repair(image: &VmdkImage, files: FilesMut, what: Repair, job: Job<'_>) -> Result<CheckReport> {
    let writable: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
    let readable: Vec<Arc<dyn Storage>> = writable
        .iter()
        .map(|file| Arc::clone(file) as Arc<dyn Storage>)
        .collect();
    run(image, &readable, Some((&writable, what)), job)
}

type Fix<'a> = Option<(&'a [Arc<dyn StorageMut>], Repair)>;

fn run(image: &VmdkImage, files: &[Arc<dyn Storage>], fix: Fix<'_>, job: Job<'_>) -> Result<CheckReport> {
    let parts = open_parts(image, files)?;
    let mut report = CheckReport::default();
    let common = in_common(&parts);
    let fix = if common.is_some() { None } else { fix };
    if let Some(text) = common {
        let finding = Finding {
            kind: FindingKind::Corruption,
            text,
            host: None,
            guest: None,
            fixed: false,
        };
        report.add(finding, 1);
    }
    for part in &parts {
        if let Body::Sparse(sparse) = &part.body {
            let storage = match fix {
                Some((files, Repair::All)) => files.get(usize::from(sparse.file.0)),
                _ => None,
            };
            let tail = match fix {
                Some((files, _)) => files.get(usize::from(sparse.file.0)),
                None => None,
            };
            let mut check = Check {
                sparse,
                header: part.header.as_ref(),
                start: part.start,
                fix: storage,
                any_fix: tail,
                report: &mut report,
            };
            check.run(job)?;
        }
    }
    Ok(report)
}

struct Check<'a> {
    sparse: &'a Sparse,
    header: Option<&'a Header>,
    /// The first byte of the disk that the extent has.
    start: u64,
    /// Where to put right what is wrong.
    fix: Option<&'a Arc<dyn StorageMut>>,
    /// The same, also if only what is harmless is to be put right.
    any_fix: Option<&'a Arc<dyn StorageMut>>,
    report: &'a mut CheckReport,
}

impl Check<'_> {
    fn add(
        &mut self,
        kind: FindingKind,
        text: String,
        guest: Option<u64>,
        host: Option<HostOffset>,
        fixed: bool,
    ) {
        let finding = Finding {
            kind,
            text,
            host,
            guest: guest.map(|at| GuestOffset::new(self.start.saturating_add(at))),
            fixed,
        };
        self.report.add(finding, 1);
    }

    fn run(&mut self, job: Job<'_>) -> Result<()> {
        let geometry = self.sparse.geometry;
        let grain = geometry.grain;
        self.report.total_units = self
            .report
            .total_units
            .saturating_add(geometry.disk.div_ceil(grain.max(1)));
        let redundant = self.redundant()?;
        if self.overlaps(redundant.as_ref()) {
            // Whatever was written to one would damage the other.
            (self.fix, self.any_fix) = (None, None);
            let text = "grain tables and directories overlap".to_owned();
            self.add(FindingKind::Corruption, text, None, None, false);
        }
        let mut seen = Seen::new(self.sparse.file_len.div_ceil(SECTOR));
        let ranges = self.table_ranges(redundant.as_ref());
        let mut last: Option<u64> = None;
        for index in 0..self.sparse.directory.len() {
            job.check()?;
            let Some(mut table) = self.table(index, redundant.as_ref())? else {
                continue;
            };
            let first = (index as u64).saturating_mul(geometry.table_covers());
            let mut changed = false;
            for (slot, entry) in table.chunks_exact_mut(geometry.entry_len).enumerate() {
                let at = first.saturating_add((slot as u64).saturating_mul(grain));
                let kind = match self.sparse.dialect.kind(entry) {
                    Ok(kind) => kind,
                    Err(error) => {
                        self.add(FindingKind::Corruption, source(&error), Some(at), None, false);
                        continue;
                    }
                };
                let (Kind::Data(host) | Kind::Packed(host)) = kind else {
                    continue;
                };
                if at >= geometry.disk {
                    // Behind the end of the disk: nobody reads it, but growing would bring it back.
                    continue;
                }
                self.report.allocated_units = self.report.allocated_units.saturating_add(1);
                let packed = matches!(kind, Kind::Packed(_));
                if packed {
                    self.report.compressed_units = self.report.compressed_units.saturating_add(1);
                }
                let place = host.get() / SECTOR;
                if last.is_some_and(|last| last != place) && !packed {
                    self.report.fragmented_units = self.report.fragmented_units.saturating_add(1);
                }
                last = Some(place.saturating_add(grain / SECTOR));
                if let Some(text) = self.wrong(at, host, packed, &ranges, &mut seen) {
                    // Only what cannot be read at all is given up; who shares a grain keeps it.
                    let lost = self.fix.is_some()
                        && !packed
                        && matches!(self.sparse.dialect, Dialect::Hosted { .. } | Dialect::Cowd)
                        && host.get() >= self.sparse.file_len;
                    if lost {
                        entry.fill(0);
                        changed = true;
                    }
                    self.add(FindingKind::Corruption, text, Some(at), Some(host), lost);
                }
            }
            if let (true, Some(storage)) = (changed, self.fix) {
                self.write_table(storage, index, redundant.as_ref(), &table)?;
            }
        }
        self.report.image_end_offset = Some(HostOffset::new(self.sparse.file_len));
        self.leaks(&seen, &ranges)?;
        if let Some(storage) = self.any_fix {
            storage.sync()?;
        }
        Ok(())
    }

    /// The redundant directory, if there is one.
    fn redundant(&mut self) -> Result<Option<Vec<u32>>> {
        let Some((header, at)) = self.header.and_then(|header| Some((header, header.rgd?))) else {
            return Ok(None);
        };
        match read_directory(&*self.sparse.storage, at, header.tables(), self.sparse.file_len) {
            Ok(list) => Ok(Some(list)),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                let text = format!("the redundant copy: {}", source(&error));
                self.add(FindingKind::Corruption, text, None, Some(sector(at)), false);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Table `index`, both copies compared. `None` if there is none to look at.
    fn table(&mut self, index: usize, redundant: Option<&Vec<u32>>) -> Result<Option<Vec<u8>>> {
        let len = self.sparse.geometry.table_len();
        let at = (index as u64).saturating_mul(self.sparse.geometry.table_covers());
        let copy_at = redundant.and_then(|list| list.get(index)).copied();
        let listed = self.sparse.table_at(index);
        if self.is_untouched(listed, copy_at)? {
            return Ok(None);
        }
        let primary = match listed {
            Some(place) => self.read(place, len)?,
            None => None,
        };
        let copy = match copy_at {
            Some(place) if place != 0 => self.read(sector(place.into()), len)?,
            _ => None,
        };
        match (&primary, &copy, listed, copy_at) {
            (Some(primary_bytes), Some(copy_bytes), Some(_), Some(copy_at)) => {
                if listed == Some(sector(copy_at.into())) {
                    let text = format!("both copies of grain table {index} are at the same place");
                    self.add(FindingKind::Corruption, text, Some(at), listed, false);
                } else if primary_bytes != copy_bytes {
                    if let Some(storage) = self.any_fix {
                        storage.write_at(sector(copy_at.into()), primary_bytes)?;
                    }
                    // A cut between the two leaves them so, and no data depends on it.
                    let text = format!("the redundant copy of grain table {index} is out of date");
                    let fixed = self.any_fix.is_some();
                    self.add(
                        FindingKind::Leak,
                        text,
                        Some(at),
                        Some(sector(copy_at.into())),
                        fixed,
                    );
                }
                Ok(primary)
            }
            (None, Some(copy_bytes), _, Some(copy_at)) => {
                // The directory names the copy from now on, and the next check will say that there is one only.
                let text = format!("grain table {index} cannot be found where the directory has it");
                let fixed = match (self.fix, self.header.and_then(|header| header.gd)) {
                    (Some(storage), Some(gd)) => {
                        let mut copy = copy_bytes.clone();
                        copy.resize(len.next_multiple_of(512), 0);
                        let end = up(storage.len()?, self.sparse.geometry.grain.max(SECTOR));
                        let number = u32::try_from(end / SECTOR).map_err(|_| super::create::full())?;
                        storage.write_at(HostOffset::new(end), &copy)?;
                        storage.sync()?;
                        let into = (index as u64).saturating_mul(4);
                        storage.write_at(sector(gd).plus(into)?, &number.to_le_bytes())?;
                        true
                    }
                    _ => false,
                };
                let host = Some(sector(copy_at.into()));
                self.add(FindingKind::Corruption, text, Some(at), host, fixed);
                Ok(copy)
            }
            (None, _, Some(place), _) => {
                let text = format!("grain table {index} lies past the end of the file");
                self.add(FindingKind::Corruption, text, Some(at), Some(place), false);
                Ok(None)
            }
            (Some(_), None, _, Some(_)) => {
                let text = format!("grain table {index} has no redundant copy");
                self.add(FindingKind::Corruption, text, Some(at), None, false);
                Ok(primary)
            }
            _ => Ok(primary),
        }
    }

    /// Whether a table and its copy, if there are copies, are in two places that nobody has written to yet.
    fn is_untouched(&self, listed: Option<HostOffset>, copy: Option<u32>) -> Result<bool> {
        let copy = copy.map(|at| sector(at.into()));
        let len = self.sparse.geometry.table_len();
        for at in [listed.or(Some(HostOffset::ZERO)), copy].into_iter().flatten() {
            let there = at != HostOffset::ZERO && at.saturating_add(len as u64).get() <= self.sparse.file_len;
            if !there || !is_hole(&*self.sparse.storage, at, len, self.sparse.file_len)? {
                return Ok(false);
            }
        }
        Ok(copy != listed)
    }

    /// Whether two tables, or a table and a directory or the header, have a sector in common.
    fn overlaps(&self, redundant: Option<&Vec<u32>>) -> bool {
        if matches!(self.sparse.dialect, Dialect::Se { .. }) {
            return false;
        }
        let sectors = (self.sparse.directory.len() as u64)
            .saturating_mul(4)
            .div_ceil(SECTOR);
        let mut fixed = front(self.header);
        if let Some(header) = self.header {
            let places = [header.gd, header.rgd.filter(|_| redundant.is_some())];
            let ranges = places.into_iter().flatten();
            fixed.extend(ranges.map(|at| (at, at.saturating_add(sectors))));
        }
        let lists = [Some(&self.sparse.directory), redundant];
        overlap(
            lists.into_iter().flatten(),
            (self.sparse.geometry.table_len() as u64).div_ceil(SECTOR),
            fixed,
        )
    }

    fn read(&self, at: HostOffset, len: usize) -> Result<Option<Vec<u8>>> {
        if at.saturating_add(len as u64).get() > self.sparse.file_len {
            return Ok(None);
        }
        let mut bytes = vec![0; len];
        self.sparse.storage.read_at(at, &mut bytes)?;
        Ok(Some(bytes))
    }

    fn write_table(
        &self,
        storage: &Arc<dyn StorageMut>,
        index: usize,
        redundant: Option<&Vec<u32>>,
        bytes: &[u8],
    ) -> Result<()> {
        let copy = redundant
            .and_then(|list| list.get(index))
            .copied()
            .filter(|at| *at != 0);
        for at in [self.sparse.table_at(index), copy.map(|at| sector(at.into()))]
            .into_iter()
            .flatten()
        {
            if at.saturating_add(bytes.len() as u64).get() <= self.sparse.file_len {
                storage.write_at(at, bytes)?;
            }
        }
        Ok(())
    }

    /// What is wrong with a grain.
    fn wrong(
        &self,
        at: u64,
        host: HostOffset,
        packed: bool,
        ranges: &[(u64, u64)],
        seen: &mut Seen,
    ) -> Option<String> {
        let geometry = self.sparse.geometry;
        let place = host.get() / SECTOR;
        let needed = match packed {
            true => GRAIN_MARKER_LEN,
            false => geometry.grain.min(geometry.disk.saturating_sub(at)),
        };
        if host.saturating_add(needed).get() > self.sparse.file_len {
            return Some("a grain runs past the end of the file".to_owned());
        }
        let mut len = geometry.grain / SECTOR;
        if packed {
            let mut marker = [0; 12];
            if let Err(error) = self.sparse.storage.read_at(host, &mut marker) {
                return Some(source(&error));
            }
            let list = words(&marker);
            let word = |index: usize| u64::from(list.get(index).copied().unwrap_or(0));
            let (lba, size) = (word(0) | word(1) << 32, word(2));
            if lba != at / SECTOR {
                return Some(format!("the grain is marked as that of sector {lba}"));
            }
            if size == 0 || size > geometry.grain.saturating_mul(2) {
                return Some(format!("the compressed grain has {size} bytes"));
            }
            len = GRAIN_MARKER_LEN.saturating_add(size).div_ceil(SECTOR);
        }
        let end = place.saturating_add(len);
        let index = ranges.partition_point(|range| range.1 <= place);
        if ranges.get(index).is_some_and(|range| range.0 < end) {
            return Some("a grain lies in the tables".to_owned());
        }
        if !packed && !seen.add(place, len) {
            return Some("a grain is used twice".to_owned());
        }
        None
    }

    /// Sectors of tables and directories, sorted.
    fn table_ranges(&self, redundant: Option<&Vec<u32>>) -> Vec<(u64, u64)> {
        let len = (self.sparse.geometry.table_len() as u64).div_ceil(SECTOR);
        let overhead = match self.sparse.dialect {
            Dialect::Hosted { packed: true, .. } => 1,
            _ => self.header.map_or(4, |header| header.overhead.max(1)),
        };
        let mut ranges = vec![(0, overhead)];
        let count = self.sparse.directory.len();
        let own = (0..count).filter_map(|index| Some(self.sparse.table_at(index)?.get() / SECTOR));
        let copies = redundant.into_iter().flatten().map(|at| u64::from(*at));
        let tables = own.chain(copies.filter(|at| *at != 0));
        ranges.extend(
            tables
                .filter(|at| at.saturating_add(len) > overhead)
                .map(|at| (at, at.saturating_add(len))),
        );
        if let Some(header) = self.header {
            let sectors = header.tables().saturating_mul(4).div_ceil(SECTOR);
            let places = [header.gd, header.rgd].into_iter().flatten();
            ranges.extend(places.map(|at| (at, at.saturating_add(sectors))));
        }
        ranges.sort_unstable();
        ranges.dedup_by(|next, last| {
            let joins = next.0 <= last.1;
            if joins {
                last.1 = last.1.max(next.1);
            }
            joins
        });
        ranges
    }

    /// Room at the end of the file that nothing names; cut off if that is asked for.
    fn leaks(&mut self, seen: &Seen, ranges: &[(u64, u64)]) -> Result<()> {
        let Dialect::Hosted { packed: false, .. } = self.sparse.dialect else {
            return Ok(());
        };
        let grain = self.sparse.geometry.grain;
        let tables = ranges.last().map_or(0, |range| range.1);
        let end = up(seen.end.max(tables).saturating_mul(SECTOR), grain);
        let leaked = self.sparse.file_len.saturating_sub(end) / grain;
        if leaked == 0 || self.sparse.storage.hints().fixed_len {
            return Ok(());
        }
        let fixed = match self.any_fix {
            // A repair may have put a table there just now.
            Some(storage) if storage.len()? == self.sparse.file_len && self.report.corruptions == 0 => {
                storage.set_len(end)?;
                true
            }
            _ => false,
        };
        let finding = Finding {
            kind: FindingKind::Leak,
            text: format!("{leaked} grains at the end of the file are not in use"),
            host: Some(HostOffset::new(end)),
            guest: None,
            fixed,
        };
        self.report.add(finding, leaked);
        Ok(())
    }
}

fn source(error: &Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}
