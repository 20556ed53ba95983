//! LUKS version 1: the header that keeps the key of an encrypted disk, once for every passphrase.
//!
//! ```text
//! 0     magic, version, cipher name and mode, hash, payload offset, length of the volume key
//! 112   digest of the volume key, its salt and iterations
//! 168   UUID
//! 208   eight key slots of 48 bytes: state, iterations, salt, offset of the key material, stripes
//! 4096  key material of slot 0: the volume key split into 4000 stripes, encrypted with a key made of a passphrase
//! ...   of slots 1 to 7
//!       payload: the encrypted disk, if it is in the same file
//! ```
//!
//! Inside qcow2 the same bytes lie in clusters of their own ([`Place::Embedded`]) and the payload is all over the file.
//!
//! A key slot is added by writing its material, then its entry; it is erased by writing its entry, then wiping its
//! material, each with a flush between: a power cut leaves every other slot as it was.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod create;
mod describe;
mod header;
mod layout;
mod slots;
mod unlock;

use diskmill_core::{Error, ErrorKind, Format, HostOffset, Result, Storage, Value};

use super::CryptError;
pub use create::{NewVolume, Plan};
pub use header::{Header, Slot};
pub use layout::MAGIC;
use layout::{HEADER_LEN, HEADER_SECTORS, STRIPES};
pub use slots::{SlotChange, change_slots};
pub use unlock::VolumeKey;
pub(super) use unlock::same;

/// Where a LUKS header is, and what has to be behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At the start of the file that also holds the encrypted data.
    Standalone,
    /// In a file of its own.
    Detached,
    /// Somewhere in a file of another format.
    Embedded {
        /// Where.
        at: HostOffset,
        /// Bytes there are for it.
        len: u64,
    },
}

impl Place {
    /// Where the header starts.
    pub fn start(self) -> HostOffset {
        match self {
            Self::Standalone | Self::Detached => HostOffset::ZERO,
            Self::Embedded { at, .. } => at,
        }
    }
}

/// What is wrong with a LUKS header, or with what is asked of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LuksError {
    /// The magic number is another's.
    #[error("there is no LUKS header at {0:#x}")]
    Magic(u64),
    /// Another version.
    #[error("LUKS version {0} is not supported, must be 1")]
    Version(u16),
    /// The file, or the room for the header, ends too early.
    #[error("{what} of the LUKS header ends at byte {end}, but there are only {have} bytes")]
    Truncated {
        /// Which part.
        what: String,
        /// Where it should end, counted from the header.
        end: u64,
        /// Bytes there are from the header on.
        have: u64,
    },
    /// A name that fills its field.
    #[error("{0} of the LUKS header is not NUL terminated")]
    Unterminated(&'static str),
    /// The payload lies in the header.
    #[error("payload_offset is {0} sectors, must be at least {min}: the LUKS payload is overlapping with the header",
        min = HEADER_SECTORS)]
    PayloadInHeader(u32),
    /// A digest without cost.
    #[error("the number of iterations of the volume key is 0, must be at least 1")]
    NoIterations,
    /// A slot in no known state.
    #[error("state of LUKS key slot {index} is {state:#010x}, must be 0x00ac71f3 or 0x0000dead")]
    SlotState {
        /// Which slot.
        index: usize,
        /// Its state.
        state: u32,
    },
    /// A slot split in another way.
    #[error("keyslot {index} is corrupted: stripes is {stripes}, must be {STRIPES}")]
    Stripes {
        /// Which slot.
        index: usize,
        /// Its stripes.
        stripes: u32,
    },
    /// An active slot without cost.
    #[error("keyslot {0} is corrupted: iterations is 0, must be at least 1")]
    SlotIterations(usize),
    /// A slot in the header.
    #[error("keyslot {0} is overlapping with the LUKS header")]
    SlotInHeader(usize),
    /// A slot in the data.
    #[error("keyslot {0} is overlapping with the encrypted payload")]
    SlotInPayload(usize),
    /// Two slots in the same place.
    #[error("keyslots {0} and {1} are overlapping in the header")]
    SlotsOverlap(usize, usize),
    /// Names or lengths that no cipher has.
    #[error(transparent)]
    Crypt(#[from] CryptError),
    /// No slot opens with the passphrase.
    #[error("invalid password, cannot unlock any keyslot")]
    Password,
    /// There is no such slot.
    #[error("invalid keyslot {0} specified, must be between 0 and 7")]
    SlotNumber(u64),
    /// The slot that is to be written holds a key.
    #[error("refusing to overwrite active keyslot {0} - please erase it first")]
    SlotInUse(usize),
    /// No slot is free.
    #[error("can't add a keyslot - all keyslots are in use")]
    NoFreeSlot,
    /// The slot that is to be erased holds none.
    #[error("given keyslot {0} is already erased (inactive)")]
    SlotErased(usize),
    /// The slot that is to be erased is another passphrase's.
    #[error("given keyslot {0} doesn't contain the given old password for erase operation")]
    SlotOfAnother(usize),
    /// No slot opens with the passphrase that is to go.
    #[error("no keyslots match given (old) password for erase operation")]
    NoMatch,
    /// The only key would be gone.
    #[error(
        "attempt to erase the only active keyslot {0} which will erase all the data in the image irreversibly - \
         refusing operation"
    )]
    LastSlot(usize),
    /// The only keys would be gone.
    #[error(
        "all the active keyslots match the (old) password that was given and erasing them will erase all the data in \
         the image irreversibly - refusing operation"
    )]
    LastSlots,
}

impl LuksError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Version(_) => ErrorKind::Unsupported,
            Self::Crypt(error) => error.kind(),
            Self::Password => ErrorKind::Denied,
            Self::SlotNumber(_)
            | Self::SlotInUse(_)
            | Self::NoFreeSlot
            | Self::SlotErased(_)
            | Self::SlotOfAnother(_)
            | Self::NoMatch
            | Self::LastSlot(_)
            | Self::LastSlots => ErrorKind::Usage,
            _ => ErrorKind::Malformed,
        }
    }
}

impl From<LuksError> for Error {
    fn from(error: LuksError) -> Self {
        Error::new(error.kind(), error).format(Format::Luks)
    }
}

/// A LUKS header that has been understood, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    header: Header,
    place: Place,
}

impl Volume {
    /// Reads and understands the header at `place`.
    ///
    /// An error with a [`LuksError`] if it breaks a rule, also if there are fewer bytes than it says. Nothing that it
    /// says is used before it is checked; iterations are when a slot is tried.
    pub fn load(file: &dyn Storage, place: Place) -> Result<Self> {
        let at = place.start();
        let file_room = file.len()?.saturating_sub(at.get());
        let have = match place {
            Place::Standalone | Place::Detached => file_room,
            Place::Embedded { len, .. } => len.min(file_room),
        };
        let mut bytes = [0; HEADER_LEN];
        file.read_padded(at, &mut bytes)?;
        Header::check_magic(&bytes, at)?;
        let demand = |what: &dyn Fn() -> String, end: u64| {
            if end > have {
                let what = what();
                return Err(LuksError::Truncated { what, end, have });
            }
            Ok(())
        };
        demand(&|| "the fixed part".to_owned(), HEADER_LEN as u64)?;
        let header = Header::parse(&bytes, place)?;
        for (index, slot) in header.slots.iter().enumerate() {
            if slot.active {
                let end = slot.key_offset().saturating_add(header.material_len());
                demand(&|| format!("the material of keyslot {index}"), end)?;
            }
        }
        if place == Place::Standalone {
            demand(
                &|| "the area in front of the payload".to_owned(),
                header.payload_offset(),
            )?;
        }
        Ok(Self { header, place })
    }

    /// What the header says.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where it is.
    pub fn place(&self) -> Place {
        self.place
    }

    /// What `info` shows of it.
    pub fn describe(&self) -> Vec<(&'static str, Value)> {
        describe::describe(&self.header, self.place)
    }
}

/// What the header at `place` says, as `info` shows it.
pub fn describe(file: &dyn Storage, place: Place) -> Result<Vec<(&'static str, Value)>> {
    Ok(Volume::load(file, place)?.describe())
}
