//! Changing the size of the disk.
//!
//! The L1 table is followed by something else. Where it must grow, a new one is written behind all else, and one write of
//! the header shows table and size together. A disk that gets smaller leaves what it had behind its end where it is;
//! growing again does not bring it back.

use std::ops::Range;
use std::sync::atomic::Ordering;

use diskmill_core::{Chain, Error, ErrorKind, Format, GuestOffset, HostOffset, Result, SECTOR, ZeroHow};

use super::header::check_size;
use super::map::L2Entry;
use super::options::CreateError;
use super::write::Image;
use crate::tree::Kind;

impl Image {
    /// Gives the disk another size, rounded up to a sector. All clusters are held.
    pub(super) fn resize_held(&self, size: u64, below: &Chain) -> Result<()> {
        let old = self.size.load(Ordering::Acquire);
        let size = size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
        if size == 0 {
            return Err(Error::new(ErrorKind::Unsupported, CreateError::Empty).format(Format::Qcow));
        }
        check_size(size, self.geometry)?;
        self.lock().settle()?;
        if size > old {
            self.clear_edge(old)?;
            let grown = self.grow(old..size, below);
            if grown.is_err() {
                // Tables in memory are ahead of those in the file.
                self.lock().set_adrift();
            }
            grown?;
        } else if size < old {
            let mut tables = self.lock();
            tables.resize(size);
            tables.header.size = size;
            tables.switch_header()?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Makes what the last cluster has stored behind the end of the disk zeros.
    fn clear_edge(&self, old: u64) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let into = old % cluster_size;
        if into == 0 {
            return Ok(());
        }
        let start = old.saturating_sub(into);
        let (_, kind) = self.lock().look(start)?;
        if let Kind::Data(host) = kind {
            // All of the cluster is in the file from now on.
            let tail = cluster_size.saturating_sub(into);
            let host = HostOffset::new(host.get().saturating_add(into));
            self.overwrite_zeros(host, GuestOffset::new(old), tail, ZeroHow::KeepAllocated)?;
        }
        Ok(())
    }

    fn grow(&self, new: Range<u64>, below: &Chain) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let moves = {
            let mut tables = self.lock();
            let before = tables.l1.len();
            let first = new.start.next_multiple_of(cluster_size);
            let table_end = (before as u64).saturating_mul(self.geometry.covers());
            tables.resize(new.end);
            // What a larger disk has left in a table we keep.
            let mut at = first;
            while at < table_end.min(new.end) {
                if tables.entry(at)? != L2Entry::ABSENT {
                    tables.set(at, L2Entry::ABSENT)?;
                }
                at = at.saturating_add(cluster_size);
            }
            let moves = tables.l1.len() > before;
            if moves {
                tables.move_l1()?;
            }
            moves
        };
        self.hide(new.clone(), below)?;
        let mut tables = self.lock();
        tables.settle()?;
        tables.header.size = new.end;
        if moves {
            tables.header.l1_table_offset = tables.l1_at;
        }
        tables.switch_header()
    }

    /// Sees to it that nothing of what is below behind the old end comes to light, nor of a compressed cluster.
    fn hide(&self, new: Range<u64>, below: &Chain) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let edge = new.start % cluster_size;
        let start = new.start.saturating_sub(edge);
        let packed = edge > 0 && matches!(self.lock().look(start)?.1, Kind::Packed(_));
        let end = match packed {
            true => start.saturating_add(cluster_size).max(below.virtual_size()),
            false => below.virtual_size(),
        };
        let end = end.min(new.end);
        match new.start < end {
            true => self.zero_held(new.start..end, ZeroHow::MayUnmap, below),
            false => Ok(()),
        }
    }
}
