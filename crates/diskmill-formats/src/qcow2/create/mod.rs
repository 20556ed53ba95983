//! New qcow2 images, filled in guest order.

mod clusters;
mod tables;

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    Builder, CreateSpec, Durability, Encoder, Error, ErrorKind, FileIndex, FilesMut, Finish, Format,
    GuestOffset, HostOffset, HostSpan, Job, OutputName, OutputSpec, Result, Role, Run, SECTOR, Sealer,
    Secrets, StorageMut, Stored, Writes, ZeroHow,
};

pub use clusters::FullError;
use tables::Tables;

use super::crypto::Sealing;
use super::header::Version;
use super::map::{ClusterKind, L2Entry, SUBCLUSTERS, SubclusterKind, Subclusters};
use super::measure;
use super::options::{Encryption, Plan};
use crate::codec::UnitEncoder;
use crate::preallocation::{Preallocation, write_zeros, zeros};

/// Where guest data goes if there is a data file.
const DATA_FILE: FileIndex = FileIndex(1);

/// See [`Driver::outputs`](diskmill_core::Driver::outputs).
pub(super) fn outputs(spec: &CreateSpec) -> Result<Vec<OutputSpec>> {
    let plan = Plan::new(spec)?;
    plan.encryption.check(&spec.secrets)?;
    let mut main = OutputSpec::main();
    main.nocow = plan.nocow;
    main.extent_size_hint = plan.extent_size_hint;
    let mut outputs = vec![main];
    if let Some(name) = plan.data_file {
        let mut data = OutputSpec::main();
        data.role = Role::Data;
        data.name = OutputName::Named(name);
        outputs.push(data);
    }
    Ok(outputs)
}

/// See [`Driver::build`](diskmill_core::Driver::build).
pub(super) fn build(spec: &CreateSpec, files: FilesMut) -> Result<Box<dyn Builder>> {
    let plan = Plan::new(spec)?;
    let files: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
    let (main, data) = match (files.as_slice(), &plan.data_file) {
        ([main], None) => (main, main),
        ([main, data], Some(_)) => (main, data),
        _ => {
            let expected = if plan.data_file.is_some() { 2 } else { 1 };
            let text = format!("this qcow2 image has {expected} files, got {}", files.len());
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Qcow2));
        }
    };
    if files.iter().any(|file| file.hints().append_only) {
        let text = "qcow2 cannot be written to a pipe: its tables point forwards and backwards";
        return Err(Error::new(ErrorKind::Unsupported, text).format(Format::Qcow2));
    }
    let have = match main.hints().fixed_len {
        true => Some(main.len()?),
        false => None,
    };
    let tables = Tables::new(&plan, have)?;
    if have.is_some() {
        // An old header must not make an image of half-written tables.
        let header = HostOffset::ZERO..HostOffset::new(plan.cluster_bits.cluster_size());
        main.zero(header, ZeroHow::KeepAllocated)?;
    }
    let disk = plan.virtual_size;
    if plan.preallocation == Preallocation::Falloc && !data.hints().fixed_len && disk > 0 {
        let end = match plan.data_file {
            Some(_) => disk,
            None => measure::table_bytes(&plan)
                .saturating_add(measure::encryption_bytes(&plan))
                .saturating_add(disk),
        };
        data.allocate(HostOffset::ZERO..HostOffset::new(end))?;
    }
    let unit = match (plan.extended_l2, plan.codec) {
        (true, None) => plan.cluster_bits.cluster_size() / u64::from(SUBCLUSTERS),
        _ => plan.cluster_bits.cluster_size(),
    };
    let sealing = encrypt(&plan, &tables, main.as_ref(), &spec.secrets)?;
    let sealer = sealing
        .cipher()?
        .map(|cipher| Arc::new(cipher.clone()) as Arc<dyn Sealer>);
    Ok(Box::new(Qcow2Builder {
        sealer,
        unit,
        stale: data.hints().fixed_len,
        placed: GuestOffset::ZERO,
        tables,
        files,
        plan,
    }))
}

/// Makes a key for the image, and writes the header that keeps it if there is one.
fn encrypt(plan: &Plan, tables: &Tables, main: &dyn StorageMut, secrets: &Secrets) -> Result<Sealing> {
    match (&plan.encryption, tables.encryption_at()) {
        (Encryption::None, _) => Ok(Sealing::Plain),
        (Encryption::Luks(luks), Some(at)) => {
            let passphrase = plan.encryption.passphrase(secrets)?;
            let volume = luks.make(passphrase.as_bytes(), Job::silent())?;
            let len = measure::encryption_bytes(plan);
            main.zero(at..at.plus(len)?, ZeroHow::KeepAllocated)?;
            volume.write_material(main, at)?;
            volume.write_header(main, at)?;
            Sealing::luks(volume.key().clone())
        }
        _ => Sealing::aes(&plan.encryption.passphrase(secrets)?),
    }
}

/// What clusters that get a place are to read as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fill {
    /// What is written there.
    Data,
    /// What is there; with extended L2 entries, what is below.
    Kept,
    /// Zeros, by word of the table.
    Zero,
}

#[derive(Debug)]
struct Qcow2Builder {
    plan: Plan,
    /// Encrypts data, if it is to be.
    sealer: Option<Arc<dyn Sealer>>,
    files: Vec<Arc<dyn StorageMut>>,
    tables: Tables,
    unit: u64,
    /// Whether the storage of data may hold old bytes where nothing is written.
    stale: bool,
    /// All guest bytes below are placed.
    placed: GuestOffset,
}

impl Qcow2Builder {
    fn cluster_size(&self) -> u64 {
        self.plan.cluster_bits.cluster_size()
    }

    fn data_file(&self) -> FileIndex {
        if self.plan.data_file.is_some() {
            DATA_FILE
        } else {
            FileIndex::MAIN
        }
    }

    /// Moves on over `range`, if it is the next.
    fn advance(&mut self, range: &Range<GuestOffset>) -> Result<()> {
        if range.start != self.placed || range.end < range.start || !range.start.is_aligned(self.unit) {
            let text = format!(
                "bytes {} to {} are placed, must start at {} and at a multiple of {}",
                range.start, range.end, self.placed, self.unit
            );
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Qcow2));
        }
        self.placed = range.end;
        Ok(())
    }

    /// A place for the bytes of `range`, and how many of them it has in a row.
    fn locate(&mut self, range: &Range<GuestOffset>, writes: &mut Writes<'_>) -> Result<(HostOffset, u64)> {
        let len = range.end.since(range.start);
        if self.plan.data_file.is_some() {
            return Ok((HostOffset::new(range.start.get()), len));
        }
        // Tables may be placed between the data of one L2 table and the next, never within.
        let covers = self.plan.geometry().l1_entry_covers();
        let len = len.min(covers.saturating_sub(range.start.within(covers)));
        let cluster_size = self.cluster_size();
        let within = range.start.within(cluster_size);
        if within > 0
            && let (entry, _) = self.tables.get(range.start)
            && let ClusterKind::Normal(at) = entry.kind(self.plan.geometry())?
        {
            return Ok((at.plus(within)?, len.min(cluster_size.saturating_sub(within))));
        }
        let clusters = self.plan.cluster_bits.clusters(within.saturating_add(len));
        let at = self.tables.take(range.start, clusters, writes)?;
        Ok((at.plus(within)?, len))
    }

    /// Enters the clusters of `range`, which lie in a row with `host` for the first byte.
    fn enter(
        &mut self,
        range: &Range<GuestOffset>,
        host: HostOffset,
        fill: Fill,
        writes: &mut Writes<'_>,
    ) -> Result<()> {
        let cluster_size = self.cluster_size();
        let mut cluster = range.start.align_down(cluster_size);
        let mut place = host.align_down(cluster_size);
        while cluster < range.end {
            let next = cluster.plus(cluster_size)?;
            let part = range.start.max(cluster)..range.end.min(next);
            if self.plan.extended_l2 {
                let kind = match fill {
                    Fill::Data => Some(SubclusterKind::Allocated),
                    Fill::Kept => None,
                    Fill::Zero => Some(SubclusterKind::Zero),
                };
                let subclusters = self.subclusters(&part, kind);
                self.tables
                    .put(cluster, L2Entry::normal(place, true), subclusters, writes)?;
            } else {
                let entry = match fill {
                    Fill::Data | Fill::Kept => L2Entry::normal(place, true),
                    Fill::Zero => L2Entry::zero_allocated(place, true),
                };
                self.tables.put(cluster, entry, Subclusters::default(), writes)?;
            }
            cluster = next;
            place = place.plus(cluster_size)?;
        }
        if self.plan.data_file.is_none() {
            let end = host.plus(range.end.since(range.start))?;
            // A cluster is whole in the file, unless its subclusters say which parts are used.
            self.tables.reaches(up(end, self.unit)?);
        }
        Ok(())
    }

    /// The subclusters of one cluster, those of `part` set to `kind`.
    fn subclusters(&self, part: &Range<GuestOffset>, kind: Option<SubclusterKind>) -> Subclusters {
        let (_, known) = self.tables.get(part.start);
        let Some(kind) = kind else { return known };
        let first = self.plan.geometry().subcluster(part.start);
        let size = self.cluster_size() / u64::from(SUBCLUSTERS);
        let count = part.end.since(part.start).div_ceil(size);
        known.with(first, u32::try_from(count).unwrap_or(SUBCLUSTERS), kind)
    }

    /// Gives all of `range` a place without bytes of its own.
    fn keep(&mut self, range: Range<GuestOffset>, fill: Fill, writes: &mut Writes<'_>) -> Result<()> {
        let mut rest = range;
        while rest.start < rest.end {
            let (host, len) = self.locate(&rest, writes)?;
            let part = rest.start..rest.start.plus(len)?;
            self.enter(&part, host, fill, writes)?;
            let mut end = host.plus(len)?;
            if self.plan.data_file.is_none() {
                end = up(end, self.unit)?;
            }
            if self.reads_what_is_there(fill)
                && let Some(sealer) = &self.sealer
            {
                // Zeros as they are would not read as such.
                let (mut guest, mut at) = (rest.start, host);
                while at < end {
                    let piece = zeros(end.since(at));
                    writes.push_sealed(self.data_file(), at, guest, piece, sealer);
                    let len = piece.len() as u64;
                    (guest, at) = (guest.plus(len)?, at.plus(len)?);
                }
            } else if self.plan.preallocation == Preallocation::Full {
                write_zeros(self.data_file(), host..end, writes);
            } else if self.stale && fill == Fill::Kept && (!self.plan.extended_l2 || self.plan.data_file_raw)
            {
                writes.push_zero(self.data_file(), host..end, ZeroHow::KeepAllocated);
            }
            rest.start = part.end;
        }
        Ok(())
    }

    /// Whether clusters with such a filling are read from the file, whatever is there.
    fn reads_what_is_there(&self, fill: Fill) -> bool {
        fill == Fill::Kept && !self.plan.extended_l2
    }

    /// Queues the write of guest bytes at `guest` to `host`.
    fn write<'b>(
        &self,
        guest: GuestOffset,
        host: HostOffset,
        bytes: &'b [u8],
        writes: &mut Writes<'b>,
    ) -> Result<()> {
        let Some(sealer) = &self.sealer else {
            writes.push(self.data_file(), host, bytes);
            return self.clear_tail(host.plus(bytes.len() as u64)?, writes);
        };
        // The rest of a unit that the disk ends in is zeros too, should the disk grow: QEMU leaves it as it is.
        let step = match self.plan.data_file {
            Some(_) => SECTOR,
            None => self.unit,
        };
        let len = usize::try_from((bytes.len() as u64).next_multiple_of(step)).unwrap_or(bytes.len());
        if len == bytes.len() {
            writes.push_sealed(self.data_file(), host, guest, bytes, sealer);
        } else {
            let mut whole = bytes.to_vec();
            whole.resize(len, 0);
            writes.push_sealed(self.data_file(), host, guest, whole, sealer);
        }
        Ok(())
    }

    /// Enters `range` as zeros that take no space.
    fn zeros(&mut self, range: &Range<GuestOffset>, writes: &mut Writes<'_>) -> Result<()> {
        let cluster_size = self.cluster_size();
        let mut cluster = range.start.align_down(cluster_size);
        while cluster < range.end {
            let next = cluster.plus(cluster_size)?;
            if self.plan.extended_l2 {
                let part = range.start.max(cluster)..range.end.min(next);
                let (entry, _) = self.tables.get(part.start);
                let subclusters = self.subclusters(&part, Some(SubclusterKind::Zero));
                self.tables.put(cluster, entry, subclusters, writes)?;
            } else {
                self.tables
                    .put(cluster, L2Entry::ZERO_PLAIN, Subclusters::default(), writes)?;
            }
            cluster = next;
        }
        Ok(())
    }

    /// Old bytes behind data that ends within a unit must not come to light when the disk grows.
    fn clear_tail(&self, end: HostOffset, writes: &mut Writes<'_>) -> Result<()> {
        let whole = up(end, self.unit)?;
        if self.stale && self.plan.data_file.is_none() && end < whole {
            writes.push_zero(FileIndex::MAIN, end..whole, ZeroHow::KeepAllocated);
        }
        Ok(())
    }
}

/// `at` up to a multiple of `step`.
fn up(at: HostOffset, step: u64) -> Result<HostOffset> {
    match at.within(step) {
        0 => Ok(at),
        within => at.plus(step.saturating_sub(within)),
    }
}

impl Builder for Qcow2Builder {
    fn unit(&self) -> u64 {
        self.unit
    }

    fn files(&self) -> &[Arc<dyn StorageMut>] {
        &self.files
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(UnitEncoder::new(self.plan.codec)?))
    }

    fn place<'b>(&mut self, at: GuestOffset, stored: Stored<'b>, writes: &mut Writes<'b>) -> Result<()> {
        match stored {
            Stored::Plain(bytes) => {
                let mut rest = at..at.plus(bytes.len() as u64)?;
                self.advance(&rest)?;
                let mut bytes = bytes;
                while rest.start < rest.end {
                    let (host, len) = self.locate(&rest, writes)?;
                    let part = rest.start..rest.start.plus(len)?;
                    let (now, later) =
                        bytes.split_at(usize::try_from(len).unwrap_or(usize::MAX).min(bytes.len()));
                    self.write(rest.start, host, now, writes)?;
                    self.enter(&part, host, Fill::Data, writes)?;
                    bytes = later;
                    rest.start = part.end;
                }
            }
            Stored::Packed(bytes) => {
                let len = bytes.len() as u64;
                if self.plan.codec.is_none() || len == 0 || len >= self.cluster_size() {
                    let text = format!("a packed unit of {len} bytes cannot be placed in this image");
                    return Err(Error::new(ErrorKind::Usage, text).format(Format::Qcow2));
                }
                self.advance(&(at..at.plus(self.unit)?))?;
                let host = self.tables.pack(at, len, writes)?;
                let entry = L2Entry::compressed(host, len, self.plan.geometry())
                    .ok_or_else(|| FullError::Offset(host.get()))?;
                self.tables.put(at, entry, Subclusters::default(), writes)?;
                let end = host.plus(len)?;
                self.tables.reaches(up(end, SECTOR)?);
                writes.push(FileIndex::MAIN, host, bytes);
            }
        }
        Ok(())
    }

    fn place_run<'b>(&mut self, range: Range<GuestOffset>, what: Run, writes: &mut Writes<'b>) -> Result<()> {
        self.advance(&range)?;
        let plan = &self.plan;
        let hides = what == Run::Zero && plan.backing.is_some();
        if plan.preallocates() {
            // Subclusters show what is below until they are said to be zeros. So do encrypted clusters show anything.
            let encrypted = self.sealer.is_some();
            let stale = self.stale && !plan.data_file_raw || encrypted;
            let fill = match (plan.extended_l2, stale) {
                (true, _) if hides => Fill::Zero,
                (false, true) if plan.version == Version::V3 => Fill::Zero,
                _ => Fill::Kept,
            };
            self.keep(range, fill, writes)?;
        } else if hides && plan.version == Version::V2 {
            // Version 2 cannot say "zeros".
            self.keep(range, Fill::Kept, writes)?;
        } else if hides {
            self.zeros(&range, writes)?;
        }
        Ok(())
    }

    fn reserve<'b>(
        &mut self,
        range: Range<GuestOffset>,
        writes: &mut Writes<'b>,
    ) -> Result<Option<HostSpan>> {
        // What lies within one table, and in one cluster if that is begun, lies in a row.
        let step = if range.start.is_aligned(self.cluster_size()) {
            self.plan.geometry().l1_entry_covers()
        } else {
            self.cluster_size()
        };
        let row = range.start.align_down(step).saturating_add(step);
        let split = self.plan.data_file.is_none() && range.end > row;
        if split || self.plan.codec.is_some() || self.sealer.is_some() || range.is_empty() {
            return Ok(None);
        }
        self.advance(&range)?;
        let (host, len) = self.locate(&range, writes)?;
        self.enter(&range, host, Fill::Data, writes)?;
        self.clear_tail(host.plus(len)?, writes)?;
        Ok(Some(HostSpan {
            file: self.data_file(),
            at: host,
            len,
        }))
    }

    fn finish(self: Box<Self>, end: Finish) -> Result<()> {
        let Self {
            mut plan,
            files,
            mut tables,
            placed,
            unit,
            ..
        } = *self;
        if let Some(size) = end.final_size {
            plan.virtual_size = size.checked_next_multiple_of(SECTOR).unwrap_or(size);
            tables.covers(plan.virtual_size)?;
        }
        // The last unit, and in a stream the last sector, may be cut short.
        let whole = |bytes| up(HostOffset::new(bytes), unit);
        if whole(placed.get())? != whole(plan.virtual_size)? {
            let text = format!("{placed} bytes are placed of a disk of {}", plan.virtual_size);
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Qcow2));
        }
        let mut header = plan.header();
        let mut writes = Writes::new();
        let file_end = tables.finish(&mut header, &mut writes)?;
        writes.perform(&files)?;
        let mut header = header.to_bytes()?;
        header.resize(plan.cluster_bits.cluster_len(), 0);
        let ends = [file_end, HostOffset::new(plan.virtual_size)];
        for (file, end) in files.iter().zip(ends) {
            if !file.hints().fixed_len && file.len()? != end.get() {
                file.set_len(end.get())?;
            }
        }
        let synced = end.durability == Durability::Synced;
        let Some(main) = files.first() else { return Ok(()) };
        if synced && main.hints().fixed_len {
            // In place nothing but this order keeps a power cut from leaving a header over missing tables.
            for file in &files {
                file.sync()?;
            }
        }
        main.write_at(HostOffset::ZERO, &header)?;
        if synced {
            for file in &files {
                file.sync()?;
            }
        }
        Ok(())
    }
}
