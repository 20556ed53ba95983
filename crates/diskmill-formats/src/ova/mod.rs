//! OVF packages: a descriptor, an optional manifest and certificate, and disks, in a directory or in one tar archive
//! (OVA).
//!
//! ```text
//! appliance.ova = tar of  appliance.ovf        the descriptor (XML): files, disks, networks, machines
//!                         appliance.mf         one digest a file
//!                         appliance.cert       a signature of the manifest
//!                         appliance-disk1.vmdk
//! ```
//!
//! A package is not a disk image: it holds some. So it is no [`Driver`](diskmill_core::Driver); what opens images finds
//! a disk in it and hands the bytes of that member to a driver. Nothing here opens a file.
//!
//! Source: DMTF DSP0243 (OVF) 1.1 and 2.1.

pub mod archive;
pub mod compose;
pub mod envelope;
pub mod lint;
pub mod machine;
pub mod manifest;
pub mod name;
pub mod pack;
pub mod units;

pub use archive::{Archive, ArchiveError, Member, Unusual};
pub use compose::{PackedDisk, descriptor};
pub use envelope::{Compression, DiskEntry, Envelope, EnvelopeError, FileEntry, Item, System, Version};
pub use lint::{Lint, Rule, Severity};
pub use machine::{Controller, Firmware, Machine, Os, Profile};
pub use manifest::{Algorithm, Hasher, Manifest, ManifestError};
pub use name::{MemberName, NameError};

/// Whether `head`, the start of a file, can be that of a descriptor: XML whose root element is an envelope.
pub fn is_descriptor(head: &[u8]) -> bool {
    crate::probe::root_element(head) == Some(b"Envelope")
}

#[cfg(test)]
mod tests;
