//! New images.
//!
//! All of the disk is stored: zeros are encrypted like data, by the threads that write. What is never placed reads as
//! what the cipher makes of the zeros of a new file, which is how `create` leaves a whole disk, as QEMU does.

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    Builder, CreateSpec, DataRuns, Durability, Encoder, Error, ErrorKind, FileIndex, FilesMut, Finish,
    Format, GuestOffset, HostOffset, HostSpan, Job, Measure, OutputSpec, Result, Run, Sealer, StorageMut,
    Stored, Writes, ZeroHow,
};

use super::options::Plan;
use crate::codec::UnitEncoder;
use crate::crypt::luks::NewVolume;
use crate::crypt::{DataCipher, Numbering};
use crate::preallocation::{Preallocation, write_zeros, zeros};

/// The step in which data is taken: a page.
const UNIT: u64 = 4096;

/// Bytes of zeros that are encrypted at once.
const STEP: u64 = 4 << 20;

/// See [`Driver::outputs`](diskmill_core::Driver::outputs).
pub(super) fn outputs(spec: &CreateSpec) -> Result<Vec<OutputSpec>> {
    let plan = Plan::new(spec)?;
    if let Some(id) = plan.header.key_secret() {
        spec.secrets.named(id)?;
    }
    let mut main = OutputSpec::main();
    main.nocow = plan.nocow;
    main.extent_size_hint = plan.extent_size_hint;
    Ok(vec![main])
}

/// See [`Driver::measure`](diskmill_core::Driver::measure).
pub(super) fn measure(spec: &CreateSpec, _data: Option<&mut dyn DataRuns>) -> Result<Measure> {
    // As in QEMU, a disk that is no whole number of sectors is not rounded up here.
    let end = Plan::new(spec)?
        .header
        .header_len()
        .saturating_add(spec.virtual_size);
    Ok(Measure {
        required: end,
        fully_allocated: end,
        bitmaps: None,
    })
}

/// See [`Driver::build`](diskmill_core::Driver::build).
pub(super) fn build(spec: &CreateSpec, files: FilesMut) -> Result<Box<dyn Builder>> {
    let plan = Plan::new(spec)?;
    let passphrase = plan.passphrase(spec)?;
    let volume = plan.header.make(passphrase.as_bytes(), Job::silent())?;
    Ok(Box::new(LuksBuilder::start(&plan, volume, files)?))
}

/// A new image that is being filled.
#[derive(Debug)]
pub(super) struct LuksBuilder {
    files: Vec<Arc<dyn StorageMut>>,
    volume: NewVolume,
    sealer: Arc<dyn Sealer>,
    /// Where the disk begins.
    start: HostOffset,
    size: u64,
    preallocation: Preallocation,
    /// Whether the file takes the length it is given.
    sized: bool,
    /// All guest bytes below are placed.
    placed: GuestOffset,
}

impl LuksBuilder {
    /// Starts the image of `plan` with the keys of `volume`.
    pub(super) fn start(plan: &Plan, volume: NewVolume, files: FilesMut) -> Result<Self> {
        let files: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
        let [file] = files.as_slice() else {
            let text = format!("a luks image has 1 file, got {}", files.len());
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Luks));
        };
        let hints = file.hints();
        if hints.append_only {
            let text = "luks cannot be written to a pipe: its header comes last";
            return Err(Error::new(ErrorKind::Unsupported, text).format(Format::Luks));
        }
        let start = HostOffset::new(volume.header().payload_offset());
        if hints.fixed_len {
            let have = file.len()?;
            if have < plan.end {
                let text = format!("the device has {have} bytes, the image needs {}", plan.end);
                return Err(Error::new(ErrorKind::NoSpace, text).format(Format::Luks));
            }
            // Neither an old header nor old keys must stay.
            file.zero(HostOffset::ZERO..start, ZeroHow::KeepAllocated)?;
        } else if plan.preallocation == Preallocation::Falloc {
            file.allocate(HostOffset::ZERO..HostOffset::new(plan.end))?;
        }
        let cipher = Arc::new(volume.key().cipher()?);
        Ok(Self {
            sealer: Arc::new(DataCipher::new(cipher, Numbering::Host(start))),
            volume,
            start,
            size: plan.size,
            preallocation: plan.preallocation,
            sized: !hints.fixed_len,
            placed: GuestOffset::ZERO,
            files,
        })
    }

    /// Moves on over `range`, if it is the next. Returns where it goes in the file.
    fn advance(&mut self, range: &Range<GuestOffset>) -> Result<HostOffset> {
        if range.start != self.placed || range.end < range.start || !range.start.is_aligned(UNIT) {
            let text = format!(
                "bytes {} to {} are placed, must start at {} and at a multiple of {UNIT}",
                range.start, range.end, self.placed
            );
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Luks));
        }
        self.placed = range.end;
        self.start.plus(range.start.get())
    }
}

impl Builder for LuksBuilder {
    fn unit(&self) -> u64 {
        UNIT
    }

    fn files(&self) -> &[Arc<dyn StorageMut>] {
        &self.files
    }

    fn stores_zeros(&self) -> bool {
        true
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(UnitEncoder::new(None)?))
    }

    fn place<'b>(&mut self, at: GuestOffset, stored: Stored<'b>, writes: &mut Writes<'b>) -> Result<()> {
        let Stored::Plain(bytes) = stored else {
            let text = "luks images hold no packed units";
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Luks));
        };
        let host = self.advance(&(at..at.plus(bytes.len() as u64)?))?;
        writes.push_sealed(FileIndex::MAIN, host, at, bytes, &self.sealer);
        Ok(())
    }

    fn place_run<'b>(
        &mut self,
        range: Range<GuestOffset>,
        _what: Run,
        writes: &mut Writes<'b>,
    ) -> Result<()> {
        let mut host = self.advance(&range)?;
        let mut at = range.start;
        while at < range.end {
            let piece = zeros(range.end.since(at));
            writes.push_sealed(FileIndex::MAIN, host, at, piece, &self.sealer);
            (at, host) = (at.plus(piece.len() as u64)?, host.plus(piece.len() as u64)?);
        }
        Ok(())
    }

    fn fill(&mut self, range: Range<GuestOffset>, what: Run) -> Result<()> {
        let files = self.files.clone();
        let mut at = range.start;
        while at < range.end {
            let end = at.saturating_add(STEP).min(range.end);
            let mut writes = Writes::new();
            self.place_run(at..end, what, &mut writes)?;
            writes.perform(&files)?;
            at = end;
        }
        Ok(())
    }

    /// The builder must see the bytes to encrypt them.
    fn reserve<'b>(
        &mut self,
        _range: Range<GuestOffset>,
        _writes: &mut Writes<'b>,
    ) -> Result<Option<HostSpan>> {
        Ok(None)
    }

    fn finish(self: Box<Self>, end: Finish) -> Result<()> {
        let size = end.final_size.unwrap_or(self.size);
        let empty = self.placed == GuestOffset::ZERO;
        if self.placed.get() != size && !empty {
            let text = format!("{} bytes are placed, must be all {size}", self.placed);
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Luks));
        }
        let stop = self.start.plus(size)?;
        for file in &self.files {
            if self.sized && empty && self.preallocation == Preallocation::Full {
                let mut at = HostOffset::ZERO;
                while at < stop {
                    let next = at.saturating_add(STEP).min(stop);
                    let mut writes = Writes::new();
                    write_zeros(FileIndex::MAIN, at..next, &mut writes);
                    writes.perform(&self.files)?;
                    at = next;
                }
            }
            if self.sized && file.len()? != stop.get() {
                file.set_len(stop.get())?;
            }
            self.volume.write_material(file.as_ref(), HostOffset::ZERO)?;
            if end.durability == Durability::Synced {
                file.sync()?;
            }
            self.volume.write_header(file.as_ref(), HostOffset::ZERO)?;
            if end.durability == Durability::Synced {
                file.sync()?;
            }
        }
        Ok(())
    }
}
