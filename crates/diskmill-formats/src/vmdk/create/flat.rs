//! Disks whose bytes are kept as they are, in one file or in several.

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    Builder, Encoder, Error, ErrorKind, FileIndex, Finish, Format, GuestOffset, HostOffset, HostSpan, Result,
    Run, StorageMut, Stored, Writes, ZeroHow,
};

use super::{Placed, sync_all, write_text};
use crate::codec::UnitEncoder;
use crate::preallocation::{Preallocation, write_zeros};
use crate::vmdk::options::Plan;

/// Bytes that are data or not as a whole: a page, below which no file system keeps holes.
const UNIT: u64 = 4096;

#[derive(Debug)]
pub(super) struct FlatBuilder {
    plan: Plan,
    /// The descriptor, then the extents.
    files: Vec<Arc<dyn StorageMut>>,
    placed: Placed,
}

impl FlatBuilder {
    pub(super) fn new(plan: Plan, files: Vec<Arc<dyn StorageMut>>) -> Result<Self> {
        for (file, extent) in files.iter().skip(1).zip(&plan.extents) {
            let fixed = file.hints().fixed_len;
            if fixed && file.len()? < extent.len {
                let text = format!(
                    "the device has {} bytes, the extent needs {}",
                    file.len()?,
                    extent.len
                );
                return Err(Error::new(ErrorKind::NoSpace, text).format(Format::Vmdk));
            }
            if plan.preallocation == Preallocation::Falloc && !fixed {
                file.allocate(HostOffset::ZERO..HostOffset::new(extent.len))?;
            }
        }
        Ok(Self {
            plan,
            files,
            placed: Placed::default(),
        })
    }

    /// The parts of `range` in each file: the file, where in it, and how many bytes.
    fn pieces(&self, range: &Range<GuestOffset>) -> Vec<(FileIndex, HostOffset, u64)> {
        let (start, end) = (range.start.get(), range.end.get());
        let first = self
            .plan
            .extents
            .partition_point(|extent| extent.start.saturating_add(extent.len) <= start);
        let mut pieces = Vec::new();
        for (index, extent) in self.plan.extents.iter().enumerate().skip(first) {
            if extent.start >= end {
                break;
            }
            let from = start.max(extent.start);
            let to = end.min(extent.start.saturating_add(extent.len));
            let file = FileIndex(u16::try_from(index.saturating_add(1)).unwrap_or(u16::MAX));
            let at = HostOffset::new(from.saturating_sub(extent.start));
            pieces.push((file, at, to.saturating_sub(from)));
        }
        pieces
    }
}

impl Builder for FlatBuilder {
    fn unit(&self) -> u64 {
        UNIT
    }

    fn files(&self) -> &[Arc<dyn StorageMut>] {
        &self.files
    }

    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        Ok(Box::new(UnitEncoder::new(None)?))
    }

    fn place<'b>(&mut self, at: GuestOffset, stored: Stored<'b>, writes: &mut Writes<'b>) -> Result<()> {
        let Stored::Plain(bytes) = stored else {
            return Err(Error::new(ErrorKind::Usage, "flat images hold no packed units"));
        };
        let range = at..at.plus(bytes.len() as u64)?;
        self.placed.advance(&range, UNIT)?;
        let mut rest = bytes;
        for (file, at, len) in self.pieces(&range) {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at_checked(len).unwrap_or((rest, &[]));
            writes.push(file, at, now);
            rest = later;
        }
        Ok(())
    }

    fn place_run<'b>(
        &mut self,
        range: Range<GuestOffset>,
        _what: Run,
        writes: &mut Writes<'b>,
    ) -> Result<()> {
        self.placed.advance(&range, UNIT)?;
        for (file, at, len) in self.pieces(&range) {
            let host = at..at.plus(len)?;
            let stale = self
                .files
                .get(usize::from(file.0))
                .is_some_and(|file| file.hints().fixed_len);
            if self.plan.preallocation == Preallocation::Full {
                write_zeros(file, host, writes);
            } else if stale {
                writes.push_zero(file, host, ZeroHow::MayUnmap);
            }
        }
        Ok(())
    }

    fn fill(&mut self, range: Range<GuestOffset>, what: Run) -> Result<()> {
        // There are no tables whose memory steps would bound.
        let mut writes = Writes::new();
        self.place_run(range, what, &mut writes)?;
        writes.perform(&self.files)
    }

    fn reserve<'b>(
        &mut self,
        range: Range<GuestOffset>,
        _writes: &mut Writes<'b>,
    ) -> Result<Option<HostSpan>> {
        match self.pieces(&range).as_slice() {
            [(file, at, len)] => {
                self.placed.advance(&range, UNIT)?;
                Ok(Some(HostSpan {
                    file: *file,
                    at: *at,
                    len: *len,
                }))
            }
            _ => Ok(None),
        }
    }

    fn finish(self: Box<Self>, end: Finish) -> Result<()> {
        for (file, extent) in self.files.iter().skip(1).zip(&self.plan.extents) {
            if !file.hints().fixed_len && file.len()? != extent.len {
                file.set_len(extent.len)?;
            }
        }
        if let Some(main) = self.files.first() {
            write_text(&self.plan, main)?;
        }
        sync_all(&self.files, end)
    }
}
