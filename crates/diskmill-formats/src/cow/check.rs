//! Whether an image contradicts itself, and putting that right.
//!
//! There is little that could: sectors have their places, so none is used twice and none is lost. Bits behind the last
//! sector and bytes behind its data are leaks: a resize that is cut short leaves them. A sector whose bit is set and whose
//! place is behind the end of the file has lost its data; it reads as zeros.

use std::sync::Arc;

use diskmill_core::{
    CheckReport, Finding, FindingKind, GuestOffset, HostOffset, Job, Repair, Result, SECTOR, Storage,
    StorageMut,
};

use super::header::Header;
use super::map::{Bitmap, Geometry, PAGE};

/// What a look found.
#[derive(Debug, Default)]
struct Found {
    /// Sectors that are in the file, if their bits are right.
    stored: u64,
    /// Where the last of them ends.
    end: u64,
    /// Bits behind the last sector.
    stray: u64,
    /// Sectors whose data is behind the end of the file, and the first of them.
    lost: u64,
    first_lost: u64,
    /// Bytes of the file.
    file_len: u64,
    /// Sectors behind the disk's.
    behind: u64,
    /// Bytes of the bitmap that the file has not.
    cut: u64,
}

/// The bits of a byte from `from` on, counted from the lowest.
fn from_bit(byte: u8, from: u64) -> u8 {
    match u32::try_from(from) {
        Ok(from) if from < 8 => byte & (u8::MAX << from),
        _ => 0,
    }
}

/// The bytes from the one with the last sector's bit up to the data, without the bits of sectors; and where they are.
fn behind_bitmap(geometry: Geometry, file: &dyn Storage) -> Result<(HostOffset, Vec<u8>)> {
    let whole = geometry.sectors() / 8;
    let at = HostOffset::new(geometry.bitmap_at()).plus(whole)?;
    let end = geometry.data_at().min(file.len()?);
    let mut bytes = vec![0; usize::try_from(end.saturating_sub(at.get())).unwrap_or(0)];
    file.read_padded(at, &mut bytes)?;
    if let Some(first) = bytes.first_mut() {
        *first = from_bit(*first, geometry.sectors() % 8);
    }
    Ok((at, bytes))
}

/// Clears the bits behind those of the disk's sectors.
pub(super) fn clear_stray(geometry: Geometry, file: &dyn StorageMut) -> Result<()> {
    let (at, stray) = behind_bitmap(geometry, file)?;
    if stray.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    let mut bytes = vec![0; stray.len()];
    file.read_at(at, &mut bytes)?;
    for (byte, stray) in bytes.iter_mut().zip(&stray) {
        *byte &= !stray;
    }
    file.write_at(at, &bytes)
}

fn look(geometry: Geometry, file: &dyn Storage, job: Job<'_>) -> Result<Found> {
    let file_len = file.len()?;
    let mut found = Found {
        end: geometry.bitmap_end(),
        file_len,
        cut: geometry.bitmap_end().saturating_sub(file_len),
        ..Found::default()
    };
    let first_lost = file_len.saturating_sub(geometry.data_at()).div_ceil(SECTOR);
    let mut bitmap = Bitmap::new(geometry);
    job.observer.total(geometry.bitmap_len());
    let mut page = 0;
    while page < bitmap.pages() {
        job.check()?;
        let next = bitmap.skip(file, page)?;
        if next > page {
            job.observer
                .advance(next.saturating_sub(page).saturating_mul(PAGE));
            page = next;
            continue;
        }
        let bytes = bitmap.bytes(file, page)?;
        let mut sector = page.saturating_mul(PAGE * 8);
        for byte in bytes {
            let mut byte = *byte;
            let left = geometry.sectors().saturating_sub(sector);
            byte &= !from_bit(u8::MAX, left);
            if byte != 0 {
                found.stored = found.stored.saturating_add(byte.count_ones().into());
                let last = sector.saturating_add(8_u64.saturating_sub(byte.leading_zeros().into()));
                found.end = geometry.host(GuestOffset::new(last.saturating_mul(SECTOR))).get();
                let lost = from_bit(byte, first_lost.saturating_sub(sector));
                if lost != 0 {
                    if found.lost == 0 {
                        found.first_lost = sector.saturating_add(lost.trailing_zeros().into());
                    }
                    found.lost = found.lost.saturating_add(lost.count_ones().into());
                }
            }
            sector = sector.saturating_add(8);
        }
        job.observer.advance(bytes.len() as u64);
        page = page.saturating_add(1);
    }
    let (_, stray) = behind_bitmap(geometry, file)?;
    found.stray = stray.iter().map(|byte| u64::from(byte.count_ones())).sum();
    if !file.hints().fixed_len {
        found.behind = file_len.saturating_sub(geometry.end()).div_ceil(SECTOR);
    }
    Ok(found)
}

/// What of it has been put right.
#[derive(Clone, Copy, Debug, Default)]
struct Fixed {
    leaks: bool,
    all: bool,
}

impl Found {
    fn report(&self, geometry: Geometry, fixed: Fixed) -> CheckReport {
        let mut report = CheckReport::default();
        report.total_units = geometry.sectors();
        report.allocated_units = self.stored;
        report.image_end_offset = Some(HostOffset::new(self.end));
        let mut add = |kind, count: u64, host: u64, guest: Option<u64>, fixed, text: String| {
            if count > 0 {
                let finding = Finding {
                    kind,
                    text,
                    host: Some(HostOffset::new(host)),
                    guest: guest.map(GuestOffset::new),
                    fixed,
                };
                report.add(finding, count);
            }
        };
        add(
            FindingKind::Corruption,
            u64::from(self.cut > 0),
            self.file_len,
            None,
            fixed.all,
            format!(
                "the bitmap ends at {:#x}, behind the end of the file at {:#x}",
                geometry.bitmap_end(),
                self.file_len
            ),
        );
        let first_lost = self.first_lost.saturating_mul(SECTOR);
        add(
            FindingKind::Corruption,
            self.lost,
            self.file_len,
            Some(first_lost),
            fixed.all,
            format!(
                "{} sectors are said to be stored behind the end of the file at {:#x}, the first at {first_lost}: they read \
                 as zeros",
                self.lost, self.file_len
            ),
        );
        add(
            FindingKind::Leak,
            self.stray,
            geometry.bitmap_at().saturating_add(geometry.sectors() / 8),
            None,
            fixed.leaks,
            format!("{} bits behind that of the last sector are set", self.stray),
        );
        add(
            FindingKind::Leak,
            self.behind,
            geometry.end(),
            None,
            fixed.leaks,
            format!(
                "the file goes on behind the last sector, by {} sectors",
                self.behind
            ),
        );
        report
    }
}

/// Looks for contradictions.
pub(super) fn run(header: &Header, main: &dyn Storage, job: Job<'_>) -> Result<CheckReport> {
    let geometry = header.geometry();
    Ok(look(geometry, main, job)?.report(geometry, Fixed::default()))
}

/// Puts right what [`run`] finds. Data that is lost stays so: the zeros that it reads as are put in its place.
pub(super) fn repair(
    header: &Header,
    main: &Arc<dyn StorageMut>,
    what: Repair,
    job: Job<'_>,
) -> Result<CheckReport> {
    let geometry = header.geometry();
    let found = look(geometry, main.as_ref(), job)?;
    let mut fixed = Fixed {
        leaks: true,
        all: false,
    };
    if found.stray > 0 {
        clear_stray(geometry, main.as_ref())?;
    }
    if found.behind > 0 {
        main.set_len(geometry.end())?;
    }
    if what == Repair::All && !main.hints().fixed_len {
        if found.end > found.file_len {
            main.set_len(found.end)?;
        }
        fixed.all = true;
    }
    main.sync()?;
    Ok(found.report(geometry, fixed))
}
