//! Checking: are all references counted, and is everything that is counted referred to?
//!
//! 1. Everything that refers to clusters of the file is walked: header, L1 and L2 tables of the active state and of
//!    snapshots, snapshot table, bitmaps, refcount table and blocks. A table that is referred to several times is read
//!    once and counts several times, so tables that share their parts cost no more than others.
//! 2. The counts are compared with the refcount blocks.
//! 3. The COPIED flags of the active state are compared with the refcounts.

mod refcounts;
mod refs;
mod tables;

use std::collections::HashMap;

use diskmill_core::{
    CheckReport, Error, ErrorKind, Files, Finding, FindingKind, GuestOffset, HostOffset, HostRun, Job,
    OpenSpec, Result, Storage,
};

use super::bitmap;
use super::header::Header;
use super::layout::{BITMAP_TABLE_RESERVED, L1_BYTES_MAX, OFFSET_MASK};
use super::map::Geometry;
use super::snapshot;
use refs::References;
use tables::TableUse;

/// Looks for contradictions and leaks in the image `files` starts with.
pub(super) fn run(header: &Header, files: &Files, how: &OpenSpec, job: Job<'_>) -> Result<CheckReport> {
    let (_, main) = files
        .first()
        .ok_or_else(|| Error::new(ErrorKind::Usage, "an image needs a file"))?;
    let mut check = Check::new(header, main.as_ref(), how, job)?;
    job.observer.total(header.virtual_size());
    check.refer("the header", HostOffset::ZERO, check.cluster_size, 1, None);
    check.active_tables()?;
    check.snapshots(how)?;
    check.walk_tables()?;
    check.encryption();
    check.bitmaps(how)?;
    let disk = check.refcounts()?;
    check.copied(&disk)?;
    Ok(check.report)
}

struct Check<'a> {
    header: &'a Header,
    geometry: Geometry,
    cluster_size: u64,
    main: &'a dyn Storage,
    file_len: u64,
    /// Clusters of the file, the last one perhaps not whole.
    clusters: u64,
    references: References,
    tables: HashMap<u64, TableUse>,
    /// Bytes of L1 tables that may still be read.
    l1_budget: u64,
    report: CheckReport,
    job: Job<'a>,
}

impl<'a> Check<'a> {
    fn new(header: &'a Header, main: &'a dyn Storage, how: &OpenSpec, job: Job<'a>) -> Result<Self> {
        let file_len = main.len()?;
        let mut report = CheckReport::default();
        report.total_units = header.cluster_bits.clusters(header.virtual_size());
        Ok(Self {
            header,
            geometry: header.geometry(),
            cluster_size: header.cluster_bits.cluster_size(),
            main,
            file_len,
            clusters: header.cluster_bits.clusters(file_len),
            references: References::default(),
            tables: HashMap::new(),
            l1_budget: how.limits.metadata_bytes,
            report,
            job,
        })
    }

    /// Adds a finding that counts `count` times. The text is only made if it is kept.
    fn find(
        &mut self,
        kind: FindingKind,
        count: u64,
        host: Option<HostOffset>,
        guest: Option<GuestOffset>,
        text: impl FnOnce() -> String,
    ) {
        let kept = self.report.findings.len() < CheckReport::KEPT;
        let finding = Finding {
            kind,
            text: if kept { text() } else { String::new() },
            host,
            guest,
            fixed: false,
        };
        self.report.add(finding, count);
    }

    fn corruption(
        &mut self,
        count: u64,
        host: HostOffset,
        guest: Option<GuestOffset>,
        text: impl FnOnce() -> String,
    ) {
        self.find(FindingKind::Corruption, count, Some(host), guest, text);
    }

    /// Counts `weight` references to every cluster that the bytes touch. What lies a cluster or more behind the end of
    /// the file is a corruption instead.
    fn refer(
        &mut self,
        what: &str,
        at: HostOffset,
        len: u64,
        weight: u64,
        guest: Option<GuestOffset>,
    ) -> bool {
        if len == 0 || weight == 0 {
            return true;
        }
        let bits = self.header.cluster_bits.get();
        let end = at.checked_add(len).map(HostOffset::get);
        match end {
            Some(end) if end.saturating_sub(self.file_len) < self.cluster_size => {
                let last = end.saturating_sub(1) >> bits;
                let clusters = (at.get() >> bits)..last.saturating_add(1);
                self.references.add(clusters, weight);
                true
            }
            _ => {
                let file_len = self.file_len;
                self.corruption(weight, at, guest, || {
                    format!("{what} of {len} bytes at {at:#x} runs past the end of the file at {file_len:#x}")
                });
                false
            }
        }
    }

    /// Whether the host knows, without reading, that the bytes are zeros.
    fn is_hole(&self, at: HostOffset, len: u64) -> bool {
        matches!(self.main.run_at(at), Ok(HostRun::Hole(hole)) if hole >= len)
    }

    /// Reads a structure, zeros behind the end of the file. If it cannot be read, that is a finding and `false`.
    fn read(&mut self, what: &str, at: HostOffset, buf: &mut [u8]) -> bool {
        match self.main.read_padded(at, buf) {
            Ok(()) => true,
            Err(error) => {
                self.find(FindingKind::Error, 1, Some(at), None, || {
                    format!("{what} at {at:#x} cannot be read: {error}")
                });
                false
            }
        }
    }

    fn snapshots(&mut self, how: &OpenSpec) -> Result<()> {
        if self.header.nb_snapshots == 0 {
            return Ok(());
        }
        let table_at = self.header.snapshots_offset;
        if self.header.has_data_file() {
            let count = self.header.nb_snapshots;
            self.corruption(1, table_at, None, || {
                format!("there are {count} snapshots, must be none with an external data file")
            });
        }
        let mut problems = Vec::new();
        let read = snapshot::read_table_with(self.main, self.header, &how.limits, &mut |problem| {
            problems.push(problem.to_string());
            Ok(())
        });
        for problem in problems {
            self.corruption(1, table_at, None, || problem);
        }
        let (snapshots, end) = match read {
            Ok(read) => read,
            Err(error) => {
                let text =
                    std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                self.corruption(1, table_at, None, || {
                    format!("the snapshot table cannot be read: {text}")
                });
                return Ok(());
            }
        };
        self.refer("the snapshot table", table_at, end.since(table_at), 1, None);
        // Snapshots that share one L1 table count it several times and read it once.
        let mut places: HashMap<(HostOffset, u32), u64> = HashMap::new();
        for snapshot in &snapshots {
            let at = snapshot.l1_table_offset;
            let bytes = u64::from(snapshot.l1_size).saturating_mul(8);
            if !at.is_aligned(self.cluster_size) {
                self.corruption(1, at, None, || {
                    format!(
                        "l1 table of snapshot {:?} is at {at:#x}, must start on a cluster",
                        snapshot.facts.id
                    )
                });
            } else if bytes > L1_BYTES_MAX {
                self.corruption(1, at, None, || {
                    format!(
                        "l1 table of snapshot {:?} has {} entries, must have at most {}",
                        snapshot.facts.id,
                        snapshot.l1_size,
                        L1_BYTES_MAX / 8
                    )
                });
            } else {
                let weight = places.entry((at, snapshot.l1_size)).or_default();
                *weight = weight.saturating_add(1);
            }
        }
        let mut places: Vec<_> = places.into_iter().collect();
        places.sort_unstable();
        for ((at, entries), weight) in places {
            self.job.check()?;
            self.l1_table("l1 table of a snapshot", at, entries, weight, false)?;
        }
        Ok(())
    }

    fn encryption(&mut self) {
        if let Some(place) = self.header.encryption() {
            self.refer("the encryption header", place.offset, place.length, 1, None);
        }
    }

    fn bitmaps(&mut self, how: &OpenSpec) -> Result<()> {
        let Some(place) = self.header.bitmaps() else {
            return Ok(());
        };
        let at = place.directory_offset;
        self.refer("the bitmap directory", at, place.directory_size, 1, None);
        let bitmaps = match bitmap::read_directory(self.main, self.header, &how.limits) {
            Ok(bitmaps) => bitmaps,
            Err(error) => {
                let text =
                    std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                self.corruption(1, at, None, || {
                    format!("the bitmap directory cannot be read: {text}")
                });
                return Ok(());
            }
        };
        for bitmap in bitmaps {
            self.job.check()?;
            let at = bitmap.table_offset;
            let len = u64::from(bitmap.table_entries).saturating_mul(8);
            if !self.refer("a bitmap table", at, len, 1, None) {
                continue;
            }
            // At most 8 MiB: the directory has been checked.
            let mut table = vec![0; usize::try_from(len).unwrap_or(0)];
            if !self.read("a bitmap table", at, &mut table) {
                continue;
            }
            for entry in table.as_chunks::<8>().0 {
                let entry = u64::from_be_bytes(*entry);
                let offset = HostOffset::new(entry & OFFSET_MASK);
                let reserved = match offset {
                    // Without a cluster the lowest bit says whether all bits are set.
                    HostOffset::ZERO => entry & BITMAP_TABLE_RESERVED & !1,
                    _ => entry & BITMAP_TABLE_RESERVED,
                };
                if reserved != 0 || !offset.is_aligned(self.cluster_size) {
                    self.corruption(1, at, None, || {
                        format!("bitmap {:?} has the table entry {entry:#018x}", bitmap.name)
                    });
                } else if offset != HostOffset::ZERO {
                    self.refer("bitmap data", offset, self.cluster_size, 1, None);
                }
            }
        }
        Ok(())
    }
}
