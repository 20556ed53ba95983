//! Offsets that cannot be mixed, and the names of formats.

use std::fmt;

use crate::{Error, ErrorKind, Result};

/// Bytes in a sector. Every format here counts in it somewhere.
pub const SECTOR: u64 = 512;

macro_rules! offset {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// The first byte.
            pub const ZERO: Self = Self(0);

            /// The offset `bytes` from the start.
            pub const fn new(bytes: u64) -> Self {
                Self(bytes)
            }

            /// The distance from the start, in bytes.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// `self + bytes`, or an error of kind [`ErrorKind::Corrupt`] when that is no offset.
            pub fn plus(self, bytes: u64) -> Result<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Ok(Self(sum)),
                    None => Err(Error::new(
                        ErrorKind::Corrupt,
                        format!(concat!($what, " offset {:#x} plus {:#x} does not fit in 64 bits"), self.0, bytes),
                    )),
                }
            }

            /// `self + bytes`, stopping at the last offset there is.
            #[must_use]
            pub const fn saturating_add(self, bytes: u64) -> Self {
                Self(self.0.saturating_add(bytes))
            }

            /// `self + bytes`, or `None` when that is no offset.
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// Bytes from `earlier` to here; 0 if `earlier` is in fact later.
            #[must_use]
            pub const fn since(self, earlier: Self) -> u64 {
                self.0.saturating_sub(earlier.0)
            }

            /// The multiple of `step` at or below this offset. A `step` of 0 changes nothing.
            #[must_use]
            pub const fn align_down(self, step: u64) -> Self {
                match self.0.checked_rem(step) {
                    Some(rest) => Self(self.0 - rest),
                    None => self,
                }
            }

            /// Bytes past the multiple of `step` at or below this offset.
            #[must_use]
            pub const fn within(self, step: u64) -> u64 {
                match self.0.checked_rem(step) {
                    Some(rest) => rest,
                    None => 0,
                }
            }

            /// Whether this offset is a multiple of `step`.
            #[must_use]
            pub const fn is_aligned(self, step: u64) -> bool {
                self.within(step) == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($what, "@{:#x}"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

offset!(
    /// A byte of the virtual disk, as the guest counts.
    GuestOffset,
    "guest"
);
offset!(
    /// A byte of a storage file, as the host counts.
    HostOffset,
    "host"
);

/// A disk image format, by the names `qemu-img` gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Format {
    /// No format at all: byte N of the disk is byte N of the file.
    Raw,
    /// QEMU copy-on-write, versions 2 and 3.
    Qcow2,
    /// QEMU copy-on-write, version 1.
    Qcow,
    /// User-mode Linux copy-on-write.
    Cow,
    /// VMware virtual disk.
    Vmdk,
    /// VirtualBox disk image.
    Vdi,
    /// Microsoft VHD; `vpc` on the command line.
    Vhd,
    /// Microsoft VHDX.
    Vhdx,
    /// QEMU enhanced disk.
    Qed,
    /// Parallels disk.
    Parallels,
    /// LUKS-encrypted raw disk.
    Luks,
}

impl Format {
    /// The name on the command line and in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Qcow => "qcow",
            Self::Cow => "cow",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhd => "vpc",
            Self::Vhdx => "vhdx",
            Self::Qed => "qed",
            Self::Parallels => "parallels",
            Self::Luks => "luks",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plus_refuses_to_wrap() {
        let error = HostOffset::new(u64::MAX).plus(1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(HostOffset::new(8).plus(1).unwrap(), HostOffset::new(9));
    }

    #[test]
    fn alignment_by_zero_is_harmless() {
        assert_eq!(GuestOffset::new(7).align_down(0), GuestOffset::new(7));
        assert_eq!(GuestOffset::new(7).align_down(4), GuestOffset::new(4));
        assert_eq!(GuestOffset::new(7).within(4), 3);
    }
}
