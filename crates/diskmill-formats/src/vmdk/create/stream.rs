//! streamOptimized: compressed grains in rising order, each table behind its grains, the directory and a footer at the
//! end. This is the layout that VMware itself writes and that every reader takes; nothing in it points back to be
//! filled in, so it goes down a pipe.

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    Builder, EncodedKind, Encoder, Error, ErrorKind, FileIndex, Finish, Format, GuestOffset, HostOffset,
    HostSpan, Result, Run, SECTOR, StorageMut, Stored, Writes,
};
use zerocopy::IntoBytes;

use super::sparse::{TABLE_SECTORS, TEXT_SECTORS};
use super::{Placed, sync_all, text};
use crate::codec::UnitEncoder;
use crate::preallocation::zeros;
use crate::vmdk::header::{Flags, Grain, Header, table_count};
use crate::vmdk::layout::{MARKER_EOS, MARKER_FOOTER, MARKER_GD, MARKER_GT, Marker};
use crate::vmdk::map::sector;
use crate::vmdk::options::{GRAIN, Plan};

/// Entries of a grain table.
const GTES: u32 = 512;
/// Sectors of the disk that a table covers.
const COVERS: u64 = Grain::USUAL.sectors() * GTES as u64;

pub(super) struct StreamBuilder {
    plan: Plan,
    files: Vec<Arc<dyn StorageMut>>,
    placed: Placed,
    /// The sector behind the last that is written.
    next: u64,
    directory: Vec<u32>,
    /// The table that is being filled.
    index: u64,
    table: Vec<u32>,
    /// For what nobody has compressed before.
    encoder: UnitEncoder,
    /// A grain of zeros, compressed.
    zero: Option<Vec<u8>>,
}

impl StreamBuilder {
    pub(super) fn new(plan: Plan, files: Vec<Arc<dyn StorageMut>>) -> Result<Self> {
        let unsupported = |text: &str| Err(Error::new(ErrorKind::Unsupported, text).format(Format::Vmdk));
        let [file] = files.as_slice() else {
            return unsupported("a stream has one file");
        };
        if file.hints().fixed_len {
            return unsupported("a stream ends with its footer, so it cannot be written to a device");
        }
        let tables = table_count(plan.size / SECTOR, COVERS)?;
        let header = Self::header(&plan, None);
        let text = text::render(&plan);
        let front = header.overhead.saturating_mul(SECTOR);
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        if bytes.len() as u64 > TEXT_SECTORS.saturating_add(1).saturating_mul(SECTOR) {
            let text = "the descriptor has no room: the name of the backing file is too long";
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Vmdk));
        }
        bytes.resize(usize::try_from(front).unwrap_or(usize::MAX), 0);
        // Without its footer it is no image yet.
        file.write_at(HostOffset::ZERO, &bytes)?;
        Ok(Self {
            encoder: UnitEncoder::new(Some(plan.codec))?,
            next: header.overhead,
            directory: vec![0; usize::try_from(tables).unwrap_or(usize::MAX)],
            index: 0,
            table: vec![0; GTES as usize],
            zero: None,
            placed: Placed::default(),
            plan,
            files,
        })
    }

    fn header(plan: &Plan, gd: Option<u64>) -> Header {
        Header {
            version: 3,
            flags: Flags(Flags::CHECKED | Flags::COMPRESSED | Flags::MARKERS),
            capacity: plan.size / SECTOR,
            grain: Grain::USUAL,
            descriptor: Some((1, TEXT_SECTORS)),
            gtes: GTES,
            rgd: None,
            gd,
            overhead: Grain::USUAL.sectors(),
            unclean: false,
        }
    }

    /// The next `sectors` sectors.
    fn take(&mut self, sectors: u64) -> Result<(u32, HostOffset)> {
        let at = self.next;
        self.next = at.saturating_add(sectors);
        match u32::try_from(self.next) {
            // What is left is for the tables at the end.
            Ok(next) if next < u32::MAX - (1 << 24) => Ok((u32::try_from(at).unwrap_or(next), sector(at))),
            _ => Err(super::sparse::full()),
        }
    }

    /// Queues a sector that says what follows.
    fn mark(&mut self, kind: u32, sectors: u64, writes: &mut Writes<'_>) -> Result<()> {
        let (_, at) = self.take(1)?;
        writes.push(FileIndex::MAIN, at, marker(kind, sectors));
        Ok(())
    }

    /// Queues the table that is full, for table number `index`.
    fn turn_to(&mut self, index: u64, writes: &mut Writes<'_>) -> Result<()> {
        if index == self.index {
            return Ok(());
        }
        if self.table.iter().any(|entry| *entry != 0) {
            self.mark(MARKER_GT, TABLE_SECTORS, writes)?;
            let (number, at) = self.take(TABLE_SECTORS)?;
            let bytes: Vec<u8> = self.table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            writes.push(FileIndex::MAIN, at, bytes);
            let slot = usize::try_from(self.index).unwrap_or(usize::MAX);
            if let Some(entry) = self.directory.get_mut(slot) {
                *entry = number;
            }
            self.table.fill(0);
        }
        self.index = index;
        Ok(())
    }

    /// Queues the grain of byte `at`, which `stream` holds compressed.
    fn grain<'b>(
        &mut self,
        at: GuestOffset,
        stream: std::borrow::Cow<'b, [u8]>,
        writes: &mut Writes<'b>,
    ) -> Result<()> {
        let lba = at.get() / SECTOR;
        self.turn_to(lba / COVERS, writes)?;
        let size = u32::try_from(stream.len()).map_err(|_| super::sparse::full())?;
        let head = [&lba.to_le_bytes()[..], &size.to_le_bytes()].concat();
        let len = (head.len() as u64).saturating_add(stream.len() as u64);
        let sectors = len.div_ceil(SECTOR);
        let (number, host) = self.take(sectors)?;
        let slot = usize::try_from(lba % COVERS / Grain::USUAL.sectors()).unwrap_or(usize::MAX);
        if let Some(entry) = self.table.get_mut(slot) {
            *entry = number;
        }
        let body = host.plus(head.len() as u64)?;
        writes.push(FileIndex::MAIN, host, head);
        writes.push(FileIndex::MAIN, body, stream);
        let pad = sectors.saturating_mul(SECTOR).saturating_sub(len);
        if pad > 0 {
            writes.push(FileIndex::MAIN, host.plus(len)?, zeros(pad));
        }
        Ok(())
    }

    /// `unit` compressed here and now.
    fn pack(&mut self, unit: &[u8]) -> Result<Vec<u8>> {
        let mut whole = unit.to_vec();
        whole.resize(usize::try_from(GRAIN).unwrap_or(usize::MAX), 0);
        let mut scratch = Vec::new();
        match self.encoder.pack(&whole, &mut scratch)? {
            EncodedKind::Packed { len } => {
                scratch.truncate(len);
                Ok(scratch)
            }
            _ => Err(Error::new(ErrorKind::Usage, "the encoder does not compress")),
        }
    }
}

/// A sector that says what follows.
fn marker(kind: u32, sectors: u64) -> Vec<u8> {
    let marker = Marker {
        val: sectors.into(),
        size: 0.into(),
        kind: kind.into(),
    };
    let mut bytes = marker.as_bytes().to_vec();
    bytes.resize(512, 0);
    bytes
}

impl Builder for StreamBuilder {
    fn unit(&self) -> u64 {
        GRAIN
    }

    fn files(&self) -> &[Arc<dyn StorageMut>] {
        &self.files
    }

    fn packs(&self) -> bool {
        true
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(UnitEncoder::new(Some(self.plan.codec))?))
    }

    fn place<'b>(&mut self, at: GuestOffset, stored: Stored<'b>, writes: &mut Writes<'b>) -> Result<()> {
        match stored {
            Stored::Packed(bytes) => {
                let end = at.saturating_add(GRAIN).get().min(self.plan.size);
                self.placed.advance(&(at..GuestOffset::new(end)), GRAIN)?;
                self.grain(at, bytes.into(), writes)
            }
            Stored::Plain(bytes) => {
                let mut at = at;
                for unit in bytes.chunks(usize::try_from(GRAIN).unwrap_or(usize::MAX)) {
                    let end = at.plus(unit.len() as u64)?;
                    self.placed.advance(&(at..end), GRAIN)?;
                    let packed = self.pack(unit)?;
                    self.grain(at, packed.into(), writes)?;
                    at = end;
                }
                Ok(())
            }
        }
    }

    fn place_run<'b>(&mut self, range: Range<GuestOffset>, what: Run, writes: &mut Writes<'b>) -> Result<()> {
        self.placed.advance(&range, GRAIN)?;
        if what == Run::Absent || self.plan.parent.is_none() {
            return Ok(());
        }
        // There is no other word for zeros that hide what is below.
        let zero = match self.zero.take() {
            Some(zero) => zero,
            None => self.pack(&[])?,
        };
        let mut at = range.start;
        while at < range.end {
            self.grain(at, zero.clone().into(), writes)?;
            at = at.saturating_add(GRAIN);
        }
        self.zero = Some(zero);
        Ok(())
    }

    fn reserve<'b>(
        &mut self,
        _range: Range<GuestOffset>,
        _writes: &mut Writes<'b>,
    ) -> Result<Option<HostSpan>> {
        Ok(None)
    }

    fn finish(mut self: Box<Self>, end: Finish) -> Result<()> {
        let mut writes = Writes::new();
        self.turn_to(u64::MAX, &mut writes)?;
        let mut bytes: Vec<u8> = self
            .directory
            .iter()
            .flat_map(|entry| entry.to_le_bytes())
            .collect();
        let sectors = (bytes.len() as u64).div_ceil(SECTOR);
        bytes.resize(
            usize::try_from(sectors.saturating_mul(SECTOR)).unwrap_or(usize::MAX),
            0,
        );
        writes.push(FileIndex::MAIN, sector(self.next), marker(MARKER_GD, sectors));
        let gd = self.next.saturating_add(1);
        writes.push(FileIndex::MAIN, sector(gd), bytes);
        let footer = gd.saturating_add(sectors);
        writes.push(FileIndex::MAIN, sector(footer), marker(MARKER_FOOTER, 1));
        let header = Self::header(&self.plan, Some(gd)).to_bytes();
        writes.push(FileIndex::MAIN, sector(footer.saturating_add(1)), header.to_vec());
        writes.push(
            FileIndex::MAIN,
            sector(footer.saturating_add(2)),
            marker(MARKER_EOS, 0),
        );
        writes.perform(&self.files)?;
        sync_all(&self.files, end)
    }
}
