//! Changing more of the header than one write can: extensions and the name of the backing file.
//!
//! The first sector says where the extensions and the name are, and the host does not tear it. So whatever else
//! changes is written where the old header does not look, made durable, and shown by one write of the first sector:
//!
//! ```text
//! old      | fields a | extensions a | name a |
//! hop      | fields b'| (old)        | (old)  |   | extensions b | name b |     only if a and b overlap
//! new      | fields b | extensions b | name b |
//! ```
//!
//! At every moment the header is the old one or the new one, if a sector at a time reaches the disk.

use std::ops::Range;

use diskmill_core::{Error, ErrorKind, HostOffset, Result};

use super::Tables;
use crate::qcow2::fence::Part;
use crate::qcow2::header::{Header, Version};

/// What the host writes whole or not at all, in bytes.
const SECTOR: usize = 512;
/// Where the header keeps the offset of the backing file's name.
const BACKING_OFFSET: Range<usize> = 8..16;
/// Where a version 3 header keeps its length.
const HEADER_LENGTH: Range<usize> = 100..104;

/// There is no room for what the header is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the header with its extensions and the backing file's name has {len} bytes, must be at most {room}")]
pub(crate) struct HeaderRoom {
    len: u64,
    room: u64,
}

impl Tables {
    /// Changes the header as it is on disk, after everything else has been written back. When this returns the change
    /// is durable. An error of kind [`ErrorKind::NoSpace`] if the new header does not fit into its cluster.
    pub(crate) fn rewrite_header(&mut self, edit: impl FnOnce(&mut Header) -> Result<()>) -> Result<()> {
        self.write_back(true)?;
        let mut old = vec![0; self.geometry.cluster_bits().cluster_len()];
        self.fence.file().read_padded(HostOffset::ZERO, &mut old)?;
        let mut header = Header::parse(&old)?;
        // The end mark of the extensions, and often their last bytes, are zeros.
        let in_use = usize::try_from(header.total_len()).unwrap_or(old.len());
        let in_use = used(&old).max(in_use);
        edit(&mut header)?;
        let room = self.geometry.cluster_size();
        let len = header.total_len();
        if len > room {
            return Err(Error::new(ErrorKind::NoSpace, HeaderRoom { len, room }));
        }
        let mut new = header.to_bytes()?;
        let new_len = new.len();
        new.resize(old.len(), 0);
        if changed(&old, &new, 0).len() <= SECTOR {
            self.write_sectors(&old, &new, 0)?;
            return self.fence.sync();
        }
        if !overlaps(&old, &new, in_use) {
            return self.switch_header(&old, &new);
        }
        match hop(&header, &old, &new, in_use.max(new_len), new_len) {
            Some(hop) => {
                self.switch_header(&old, &hop)?;
                self.switch_header(&hop, &beside(&new, &hop, new_len))?;
                // Nothing looks there any more.
                self.write_sectors(&hop, &new, SECTOR)
            }
            // A small cluster without room for both: at most eight sectors, in one write.
            None => self.write_sectors(&old, &new, 0).and_then(|()| self.fence.sync()),
        }
    }

    /// Puts `new` in the place of `old`: the first sector last, once the others are durable.
    fn switch_header(&mut self, old: &[u8], new: &[u8]) -> Result<()> {
        self.write_sectors(old, new, SECTOR)?;
        self.fence.barrier()?;
        if let (Some(was), Some(is)) = (first(old), first(new))
            && was != is
        {
            self.write_header_part(0, is)?;
        }
        self.fence.sync()
    }

    /// Writes the sectors of `new` from byte `from` on that are not those of `old`.
    fn write_sectors(&mut self, old: &[u8], new: &[u8], from: usize) -> Result<()> {
        let changed = changed(old, new, from);
        match new.get(changed.clone()) {
            Some(bytes) if !bytes.is_empty() => self.write_header_part(changed.start, bytes),
            _ => Ok(()),
        }
    }

    fn write_header_part(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        let written = self.fence.write(Part::Header, at as u64, bytes);
        if written.is_err() {
            self.fence.set_adrift();
        }
        written
    }
}

fn first(bytes: &[u8]) -> Option<&[u8]> {
    bytes.get(..SECTOR)
}

/// Bytes up to the last one that is not zero.
fn used(bytes: &[u8]) -> usize {
    bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last.saturating_add(1))
}

/// Whole sectors from byte `from` on that hold all differences between `old` and `new`, which are equally long.
fn changed(old: &[u8], new: &[u8], from: usize) -> Range<usize> {
    let pairs = || old.iter().zip(new).enumerate().skip(from);
    let differs = |(index, (old, new)): (usize, (&u8, &u8))| (old != new).then_some(index);
    let start = pairs().find_map(differs);
    let end = pairs().filter_map(differs).next_back();
    match (start, end) {
        (Some(start), Some(end)) => {
            start / SECTOR * SECTOR..(end / SECTOR).saturating_add(1).saturating_mul(SECTOR)
        }
        _ => from..from,
    }
}

/// Whether putting `new` in place changes sectors, other than the first, that `old` uses: it does up to `in_use`.
fn overlaps(old: &[u8], new: &[u8], in_use: usize) -> bool {
    let beyond = changed(old, new, SECTOR);
    !beyond.is_empty() && beyond.start < in_use
}

/// The header `new` with its extensions and its name behind `end`, and up to there what `old` has behind its
/// first sector; `None` if they do not fit.
fn hop(header: &Header, old: &[u8], new: &[u8], end: usize, new_len: usize) -> Option<Vec<u8>> {
    let at = end.next_multiple_of(SECTOR);
    let name = usize::try_from(header.name_at()).ok()?;
    // Version 2 has no field that says where the extensions are: only the name can move.
    let moved = match header.version {
        Version::V2 => name,
        Version::V3 => usize::try_from(header.header_length()).ok()?,
    };
    if moved > SECTOR {
        return None;
    }
    let mut hop = old.to_vec();
    hop.get_mut(..SECTOR)?.fill(0);
    hop.get_mut(..moved)?.copy_from_slice(new.get(..moved)?);
    let len = new_len.checked_sub(moved)?;
    hop.get_mut(at..at.checked_add(len)?)?
        .copy_from_slice(new.get(moved..new_len)?);
    if header.backing_name.is_some() {
        let offset = at.checked_add(name.checked_sub(moved)?)? as u64;
        hop.get_mut(BACKING_OFFSET)?
            .copy_from_slice(&offset.to_be_bytes());
    }
    if header.version == Version::V3 {
        hop.get_mut(HEADER_LENGTH)?
            .copy_from_slice(&u32::try_from(at).ok()?.to_be_bytes());
    }
    Some(hop)
}

/// `new`, but with what `hop` has behind its end.
fn beside(new: &[u8], hop: &[u8], new_len: usize) -> Vec<u8> {
    let start = new_len.next_multiple_of(SECTOR);
    let mut both = new.get(..start.min(new.len())).unwrap_or_default().to_vec();
    both.extend_from_slice(hop.get(start..).unwrap_or_default());
    both
}
