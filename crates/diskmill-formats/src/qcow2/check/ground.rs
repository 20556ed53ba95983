//! The file that is checked, as far as all parts of a check need it.

use diskmill_core::{
    Error, FindingKind, GuestOffset, HostOffset, HostRun, Job, Limits, OpenSpec, Result, Storage,
};

use super::super::header::Header;
use super::super::map::Geometry;
use super::notes::Notes;
use super::refs::References;

/// The file that is checked.
pub(super) struct Ground<'a> {
    pub(super) header: &'a Header,
    pub(super) geometry: Geometry,
    pub(super) cluster_size: u64,
    pub(super) main: &'a dyn Storage,
    pub(super) file_len: u64,
    /// Clusters of the file, the last one perhaps not whole.
    pub(super) clusters: u64,
    pub(super) limits: Limits,
    pub(super) job: Job<'a>,
}

impl<'a> Ground<'a> {
    pub(super) fn new(
        header: &'a Header,
        main: &'a dyn Storage,
        how: &OpenSpec,
        job: Job<'a>,
    ) -> Result<Self> {
        let file_len = main.len()?;
        Ok(Self {
            header,
            geometry: header.geometry(),
            cluster_size: header.cluster_bits.cluster_size(),
            main,
            file_len,
            clusters: header.cluster_bits.clusters(file_len),
            limits: how.limits,
            job,
        })
    }

    /// Base-2 logarithm of the cluster size.
    pub(super) fn bits(&self) -> u32 {
        self.header.cluster_bits.get()
    }

    /// The cluster a byte is in.
    pub(super) fn cluster(&self, at: HostOffset) -> u64 {
        at.get() >> self.bits()
    }

    /// Whether all but less than a cluster of `len` bytes lies in the file: more may not be missing.
    pub(super) fn holds(&self, at: HostOffset, len: u64) -> bool {
        at.checked_add(len)
            .is_some_and(|end| end.get().saturating_sub(self.file_len) < self.cluster_size)
    }

    /// The clusters that `len` bytes touch.
    pub(super) fn clusters_of(&self, at: HostOffset, len: u64) -> std::ops::Range<u64> {
        if len == 0 {
            return 0..0;
        }
        let last = at.saturating_add(len.saturating_sub(1));
        self.cluster(at)..self.cluster(last).saturating_add(1)
    }

    /// Counts `weight` references to every cluster that the bytes touch. What lies a cluster or more behind the end of
    /// the file is a corruption instead.
    #[expect(
        clippy::too_many_arguments,
        reason = "who refers to what, how often, and where to say so"
    )]
    pub(super) fn refer(
        &self,
        references: &References,
        notes: &mut Notes,
        what: &str,
        at: HostOffset,
        len: u64,
        weight: u64,
        guest: Option<GuestOffset>,
    ) -> bool {
        if len == 0 || weight == 0 {
            return true;
        }
        if self.holds(at, len) {
            references.add(self.clusters_of(at, len), weight);
            return true;
        }
        let file_len = self.file_len;
        notes.corruption(weight, at, guest, || {
            format!("{what} of {len} bytes at {at:#x} runs past the end of the file at {file_len:#x}")
        });
        false
    }

    /// Whether the host knows, without reading, that the bytes are zeros.
    pub(super) fn is_hole(&self, at: HostOffset, len: u64) -> bool {
        matches!(self.main.run_at(at), Ok(HostRun::Hole(hole)) if hole >= len)
    }

    /// Reads a structure, zeros behind the end of the file. If it cannot be read, that is a finding and `false`.
    pub(super) fn read(&self, notes: &mut Notes, what: &str, at: HostOffset, buf: &mut [u8]) -> bool {
        match self.main.read_padded(at, buf) {
            Ok(()) => true,
            Err(error) => {
                notes.find(FindingKind::Error, 1, Some(at), None, || {
                    format!("{what} at {at:#x} cannot be read: {error}")
                });
                false
            }
        }
    }
}

/// The text of what is wrong, without the words around it.
pub(super) fn reason(error: &Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}
