//! New images, filled in guest order: a table goes in front of the first cluster it tells of, as QEMU has it.

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    Builder, CreateSpec, DataRuns, Durability, Encoder, Error, ErrorKind, FileIndex, FilesMut, Finish,
    Format, GuestOffset, HostOffset, HostSpan, Measure, OutputSpec, Result, Run, SECTOR, Sealer, StorageMut,
    Stored, Writes, ZeroHow,
};

use super::header::check_size;
use super::map::{Geometry, L2Entry};
use super::options::Plan;
use crate::codec::{PackedSpan, UnitEncoder};
use crate::preallocation::{write_zeros, zeros};
use crate::tree::up;

/// See [`Driver::outputs`](diskmill_core::Driver::outputs).
pub(super) fn outputs(spec: &CreateSpec) -> Result<Vec<OutputSpec>> {
    Plan::new(spec)?;
    Ok(vec![OutputSpec::main()])
}

/// See [`Driver::measure`](diskmill_core::Driver::measure). Nobody knows how well data will compress: what is said is
/// enough in any case.
pub(super) fn measure(spec: &CreateSpec, data: Option<&mut dyn DataRuns>) -> Result<Measure> {
    let plan = Plan::new(spec)?;
    let geometry = plan.header.geometry;
    let (mut clusters, mut tables) = (0_u64, 0_u64);
    if let Some(runs) = data {
        let (mut next_cluster, mut next_table) = (0, 0);
        while let Some(run) = runs.next_run()? {
            if run.start >= run.end {
                continue;
            }
            let count = |unit: u64, counted: &mut u64, next: &mut u64| {
                let (first, end) = (run.start.get() / unit, run.end.get().div_ceil(unit));
                *counted = counted.saturating_add(end.saturating_sub(first.max(*next)));
                *next = end.max(*next);
            };
            count(geometry.cluster_size(), &mut clusters, &mut next_cluster);
            count(geometry.covers(), &mut tables, &mut next_table);
        }
    }
    let front = up(plan.front_end(), geometry.cluster_size());
    let table = up(geometry.l2_len(), geometry.cluster_size());
    let bytes = |clusters: u64, tables: u64| match clusters {
        0 => plan.front_end(),
        _ => front
            .saturating_add(clusters.saturating_mul(geometry.cluster_size()))
            .saturating_add(tables.saturating_mul(table)),
    };
    let size = plan.header.virtual_size();
    Ok(Measure {
        required: bytes(clusters, tables),
        fully_allocated: bytes(size.div_ceil(geometry.cluster_size()), plan.header.l1_entries()),
        bitmaps: None,
    })
}

/// See [`Driver::build`](diskmill_core::Driver::build).
pub(super) fn build(spec: &CreateSpec, files: FilesMut) -> Result<Box<dyn Builder>> {
    let plan = Plan::new(spec)?;
    let files: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
    let [file] = files.as_slice() else {
        let text = format!("a qcow image has 1 file, got {}", files.len());
        return Err(Error::new(ErrorKind::Usage, text).format(Format::Qcow));
    };
    let hints = file.hints();
    if hints.append_only {
        let text = "qcow cannot be written to a pipe: its tables come before the data they tell of";
        return Err(Error::new(ErrorKind::Unsupported, text).format(Format::Qcow));
    }
    let room = match hints.fixed_len {
        true => file.len()?,
        false => u64::MAX,
    };
    let start = plan.front_end();
    if start > room {
        return Err(full(room, start));
    }
    if hints.fixed_len {
        // An old header must not make an image of half-written tables.
        file.zero(HostOffset::ZERO..HostOffset::new(start), ZeroHow::KeepAllocated)?;
    }
    let l1_len = usize::try_from(plan.header.l1_entries()).unwrap_or(usize::MAX);
    Ok(Box::new(QcowBuilder {
        geometry: plan.header.geometry,
        sealer: plan.cipher.clone().map(|cipher| cipher as Arc<dyn Sealer>),
        stale: hints.fixed_len,
        room,
        placed: GuestOffset::ZERO,
        l1: vec![0; l1_len],
        index: None,
        table: Vec::new(),
        next: start,
        files,
        plan,
    }))
}

pub(super) fn full(have: u64, need: u64) -> Error {
    let text = format!("the device has {have} bytes, the image needs {need}");
    Error::new(ErrorKind::NoSpace, text).format(Format::Qcow)
}

#[derive(Debug)]
struct QcowBuilder {
    plan: Plan,
    geometry: Geometry,
    sealer: Option<Arc<dyn Sealer>>,
    files: Vec<Arc<dyn StorageMut>>,
    /// Whether the storage may hold old bytes where nothing is written.
    stale: bool,
    /// Bytes the file can have.
    room: u64,
    /// All guest bytes below are placed.
    placed: GuestOffset,
    /// Where tables are, by L1 entry; 0 where there is none.
    l1: Vec<u64>,
    /// Which table is being filled, if it has a place.
    index: Option<usize>,
    /// Its entries.
    table: Vec<u64>,
    /// The byte behind the last that is given out.
    next: u64,
}

/// What the clusters of a run get for entries.
enum Fill {
    /// Places one behind the other.
    Places,
    /// A place for a compressed cluster.
    Packed(u64),
}

impl QcowBuilder {
    /// Moves on over `range`, if it is the next.
    fn advance(&mut self, range: &Range<GuestOffset>) -> Result<()> {
        let unit = self.unit();
        let last = self.plan.header.virtual_size();
        let whole = range.end.is_aligned(unit) || range.end.get() >= last;
        if range.start != self.placed || range.end < range.start || !whole {
            let text = format!(
                "bytes {} to {} are placed, must start at {} and be whole units of {unit}",
                range.start, range.end, self.placed
            );
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Qcow));
        }
        self.placed = range.end;
        Ok(())
    }

    /// Gives out `len` bytes at a multiple of `align`.
    fn take(&mut self, len: u64, align: u64) -> Result<HostOffset> {
        let at = up(self.next, align);
        let end = at.saturating_add(len);
        if end > self.room {
            return Err(full(self.room, end));
        }
        if end > i64::MAX.unsigned_abs() {
            return Err(full(i64::MAX.unsigned_abs(), end));
        }
        self.next = end;
        Ok(HostOffset::new(at))
    }

    /// Lets go of the table at hand, to be written.
    fn put_table(&mut self, writes: &mut Writes<'_>) {
        if let Some(at) = self.index.take().and_then(|index| self.l1.get(index)) {
            let bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            writes.push(FileIndex::MAIN, HostOffset::new(*at), bytes);
        }
    }

    /// Takes the table of byte `at` to hand.
    fn turn_to(&mut self, at: GuestOffset, writes: &mut Writes<'_>) -> Result<()> {
        let covers = self.geometry.covers();
        let index = usize::try_from(at.get() / covers).unwrap_or(usize::MAX);
        if self.index == Some(index) {
            return Ok(());
        }
        self.put_table(writes);
        let place = self.take(self.geometry.l2_len(), self.geometry.cluster_size())?;
        let Some(entry) = self.l1.get_mut(index) else {
            let text = format!("byte {at} is behind the end of the disk");
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Qcow));
        };
        *entry = place.get();
        self.index = Some(index);
        self.table.clear();
        let entries = usize::try_from(self.geometry.l2_entries()).unwrap_or(usize::MAX);
        self.table.resize(entries, 0);
        Ok(())
    }

    /// Gives the clusters of `range` their places and calls `put` for each run of them: where it is in the disk and in
    /// the file, and its bytes in the disk.
    fn enter<'b>(
        &mut self,
        range: &Range<GuestOffset>,
        fill: &Fill,
        writes: &mut Writes<'b>,
        put: &mut dyn FnMut(GuestOffset, HostOffset, u64, &mut Writes<'b>),
    ) -> Result<()> {
        let (cluster_size, covers) = (self.geometry.cluster_size(), self.geometry.covers());
        let mut at = range.start;
        while at < range.end {
            self.turn_to(at, writes)?;
            let end = at.align_down(covers).saturating_add(covers).min(range.end);
            let len = end.since(at);
            let first = usize::try_from(at.within(covers) / cluster_size).unwrap_or(usize::MAX);
            let count = usize::try_from(len.div_ceil(cluster_size)).unwrap_or(usize::MAX);
            let host = match *fill {
                Fill::Places => {
                    let host = self.take(up(len, cluster_size), cluster_size)?;
                    let places = (host.get()..).step_by(usize::try_from(cluster_size).unwrap_or(1));
                    for (entry, place) in self.table.iter_mut().skip(first).take(count).zip(places) {
                        *entry = place;
                    }
                    host
                }
                Fill::Packed(len) => {
                    let host = self.take(len, 1)?;
                    let packed = L2Entry::packed(PackedSpan { at: host, len }, self.geometry)?;
                    if let Some(entry) = self.table.get_mut(first) {
                        *entry = packed.0;
                    }
                    host
                }
            };
            put(at, host, len, writes);
            at = end;
        }
        Ok(())
    }

    /// Where the last cluster of the disk ends in the file, it is filled up with zeros.
    fn pad(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        len: u64,
    ) -> Option<(GuestOffset, Range<HostOffset>)> {
        let whole = up(len, self.geometry.cluster_size());
        let start = host.checked_add(len)?;
        let end = host.checked_add(whole)?;
        (len < whole).then_some((guest.saturating_add(len), start..end))
    }
}

/// Queues zeros of the disk from `guest` on.
fn push_zeros(
    guest: GuestOffset,
    range: Range<HostOffset>,
    sealer: Option<&Arc<dyn Sealer>>,
    writes: &mut Writes<'_>,
) {
    let Some(sealer) = sealer else {
        return write_zeros(FileIndex::MAIN, range, writes);
    };
    let (mut guest, mut at) = (guest, range.start);
    while at < range.end {
        let piece = zeros(range.end.since(at));
        writes.push_sealed(FileIndex::MAIN, at, guest, piece, sealer);
        guest = guest.saturating_add(piece.len() as u64);
        at = at.saturating_add(piece.len() as u64);
    }
}

impl Builder for QcowBuilder {
    fn unit(&self) -> u64 {
        self.geometry.cluster_size()
    }

    fn files(&self) -> &[Arc<dyn StorageMut>] {
        &self.files
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(UnitEncoder::new(self.plan.codec)?))
    }

    fn place<'b>(&mut self, at: GuestOffset, stored: Stored<'b>, writes: &mut Writes<'b>) -> Result<()> {
        let size = self.plan.header.virtual_size();
        let (bytes, len, fill) = match stored {
            Stored::Plain(bytes) => (bytes, bytes.len() as u64, Fill::Places),
            Stored::Packed(bytes) => {
                if self.plan.codec.is_none() {
                    let text = "this image holds no packed units";
                    return Err(Error::new(ErrorKind::Usage, text).format(Format::Qcow));
                }
                let len = self.unit().min(size.saturating_sub(at.get()));
                (bytes, len, Fill::Packed(bytes.len() as u64))
            }
        };
        // The last unit may come with the zeros it was padded with.
        let end = at.plus(len)?;
        let range = at..end;
        self.advance(&range)?;
        let sealer = self.sealer.clone();
        let (mut rest, mut tails) = (bytes, Vec::new());
        let packed = matches!(fill, Fill::Packed(_));
        self.enter(&range, &fill, writes, &mut |guest, host, len, writes| {
            if packed {
                writes.push(FileIndex::MAIN, host, rest);
                return;
            }
            let count = usize::try_from(len).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at_checked(count).unwrap_or((rest, &[]));
            match &sealer {
                Some(sealer) => writes.push_sealed(FileIndex::MAIN, host, guest, now, sealer),
                None => writes.push(FileIndex::MAIN, host, now),
            }
            tails.push((guest, host, len));
            rest = later;
        })?;
        for (guest, host, len) in tails {
            if let Some((guest, range)) = self.pad(guest, host, len) {
                push_zeros(guest, range, self.sealer.as_ref(), writes);
            }
        }
        Ok(())
    }

    fn place_run<'b>(&mut self, range: Range<GuestOffset>, what: Run, writes: &mut Writes<'b>) -> Result<()> {
        self.advance(&range)?;
        if what == Run::Absent || self.plan.header.backing.is_none() {
            return Ok(());
        }
        // There is no mark for zeros: to hide what is below they need a place. In a new file that is a hole.
        let mut places = Vec::new();
        self.enter(&range, &Fill::Places, writes, &mut |guest, host, len, _| {
            places.push((guest, host, len));
        })?;
        for (guest, host, len) in places {
            let end = host.plus(up(len, self.unit()))?;
            if self.sealer.is_some() {
                push_zeros(guest, host..end, self.sealer.as_ref(), writes);
            } else if self.stale {
                writes.push_zero(FileIndex::MAIN, host..end, ZeroHow::KeepAllocated);
            }
        }
        Ok(())
    }

    fn reserve<'b>(
        &mut self,
        range: Range<GuestOffset>,
        writes: &mut Writes<'b>,
    ) -> Result<Option<HostSpan>> {
        let covers = self.geometry.covers();
        let one_table = range.end.get() <= range.start.align_down(covers).get().saturating_add(covers);
        if range.is_empty() || self.sealer.is_some() || !one_table {
            return Ok(None);
        }
        self.advance(&range)?;
        let mut span = None;
        self.enter(&range, &Fill::Places, writes, &mut |guest, at, len, _| {
            let file = FileIndex::MAIN;
            span = Some((guest, HostSpan { file, at, len }));
        })?;
        if let Some((guest, span)) = span
            && let Some((guest, tail)) = self.pad(guest, span.at, span.len)
        {
            push_zeros(guest, tail, None, writes);
        }
        Ok(span.map(|(_, span)| span))
    }

    fn finish(mut self: Box<Self>, end: Finish) -> Result<()> {
        let mut writes = Writes::new();
        self.put_table(&mut writes);
        writes.perform(&self.files)?;
        let Self {
            mut plan,
            files,
            placed,
            mut l1,
            next,
            ..
        } = *self;
        let header = &mut plan.header;
        if let Some(size) = end.final_size {
            let size = size.checked_next_multiple_of(SECTOR).unwrap_or(size).max(SECTOR);
            check_size(size, header.geometry)?;
            if header.geometry.l1_entries(size) > l1.len() as u64 {
                let text = format!("a disk of {size} bytes was announced as one of {}", header.size);
                return Err(Error::new(ErrorKind::Usage, text).format(Format::Qcow));
            }
            header.size = size;
        } else if placed.get() < header.size {
            let text = format!("the image ends at {placed}, must be filled up to {}", header.size);
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Qcow));
        }
        // The sectors of the table are written whole.
        let sector = usize::try_from(SECTOR / 8).unwrap_or(1);
        l1.resize(l1.len().next_multiple_of(sector), 0);
        let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        for file in &files {
            if !file.hints().fixed_len && file.len()? != next {
                file.set_len(next)?;
            }
            file.write_at(plan.header.l1_table_offset, &bytes)?;
            if let Some((at, _)) = plan.header.backing {
                file.write_at(at, &plan.name)?;
            }
            if end.durability == Durability::Synced {
                file.sync()?;
            }
            file.write_at(HostOffset::ZERO, &plan.header.to_bytes())?;
            if end.durability == Durability::Synced {
                file.sync()?;
            }
        }
        Ok(())
    }
}
