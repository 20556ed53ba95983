//! LUKS version 2: read only.
//!
//! ```text
//! 0         binary header, 4096 bytes, and JSON up to copy_len (16 KiB to 4 MiB)
//! copy_len  the same again, with another magic number
//! ...       key material, where the JSON says
//! ...       the encrypted disk, where the JSON says
//! ```
//!
//! Each copy has a checksum and a number that rises; the newest good one counts. The JSON is as hostile as any header:
//! its size is bounded by the copy's, every number is checked before it is used, and what a passphrase may cost in time
//! and memory is capped.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod describe;
mod layout;
mod metadata;
mod unlock;

use diskmill_core::{Error, ErrorKind, Format, HostOffset, Result, Storage, Value};
use zerocopy::FromBytes;

use super::luks::Place;
use super::{CryptError, HashAlg};
use layout::{BINARY_LEN, COPY_LENS, MAGIC, RawHeader, SECOND_MAGIC};
use metadata::{Metadata, Segment};

/// More memory than this, in KiB, is refused to Argon2: what cryptsetup itself takes unless told otherwise.
pub const MAX_MEMORY: u64 = 1 << 20;
/// More KiB in all passes of Argon2 together are refused: about two minutes of one core.
pub const MAX_WORK: u64 = 64 << 20;
/// Most lanes of Argon2.
pub const MAX_LANES: u64 = 64;

/// What is wrong with a LUKS2 header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Luks2Error {
    /// Neither copy is one.
    #[error("both copies of the LUKS2 header are damaged: their checksums do not match")]
    NoCopy,
    /// The metadata is no JSON, or none of the right shape.
    #[error("the metadata of the LUKS2 header is malformed: {0}")]
    Json(String),
    /// A value that is not allowed.
    #[error("{field} of the LUKS2 header is {value}, must be {allowed}")]
    Field {
        /// Which, as a path.
        field: String,
        /// What it is.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// Something that is not there.
    #[error("{0} is missing in the LUKS2 header")]
    Missing(String),
    /// Something valid that cannot be read here.
    #[error("LUKS2 with {0} is not supported")]
    Unsupported(String),
    /// The file ends too early.
    #[error("{what} of the LUKS2 volume ends at byte {end}, but the file has only {have}")]
    Truncated {
        /// Which part.
        what: String,
        /// Where it should end.
        end: u64,
        /// Where the file does.
        have: u64,
    },
    /// There is not that much memory.
    #[error("the {0} KiB of memory that this passphrase takes are not there")]
    Memory(u64),
    /// A cipher or hash that is not known.
    #[error(transparent)]
    Crypt(#[from] CryptError),
}

impl From<Luks2Error> for Error {
    fn from(error: Luks2Error) -> Self {
        let kind = match &error {
            Luks2Error::Unsupported(_) => ErrorKind::Unsupported,
            Luks2Error::NoCopy => ErrorKind::Corrupt,
            Luks2Error::Memory(_) => ErrorKind::NoSpace,
            Luks2Error::Crypt(error) => error.kind(),
            _ => ErrorKind::Malformed,
        };
        Error::new(kind, error).format(Format::Luks)
    }
}

/// A LUKS2 header that has been understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume2 {
    sequence: u64,
    label: String,
    subsystem: String,
    uuid: String,
    metadata: Metadata,
}

/// A copy whose checksum matches.
struct Copy {
    raw: RawHeader,
    json: Vec<u8>,
}

impl Volume2 {
    /// Reads and understands the header at the start of `file`, which is [`Place::Standalone`] or
    /// [`Place::Detached`]. An error with a [`Luks2Error`] if it breaks a rule.
    pub fn load(file: &dyn Storage, place: Place) -> Result<Self> {
        let have = file.len()?;
        let mut newest = read_copy(file, 0, have, MAGIC)?;
        for at in COPY_LENS {
            let second = read_copy(file, at, have, SECOND_MAGIC)?;
            // Of two that are as new the first counts.
            let newer = |copy: &Copy| {
                newest
                    .as_ref()
                    .is_none_or(|known| copy.raw.sequence.get() > known.raw.sequence.get())
            };
            if second.as_ref().is_some_and(newer) {
                newest = second;
            }
        }
        let Copy { raw, json } = newest.ok_or(Luks2Error::NoCopy)?;
        let metadata = Metadata::parse(&json)?;
        let volume = Self {
            sequence: raw.sequence.get(),
            label: text(&raw.label),
            subsystem: text(&raw.subsystem),
            uuid: text(&raw.uuid),
            metadata,
        };
        if place != Place::Detached {
            let segment = &volume.metadata.segment;
            let headers = raw.copy_len.get().saturating_mul(2);
            if segment.offset < headers {
                return Err(Luks2Error::Field {
                    field: "the offset of the segment".to_owned(),
                    value: segment.offset.to_string(),
                    allowed: format!("at least {headers}, behind both copies of the header"),
                }
                .into());
            }
            volume.payload_len(have)?;
        }
        Ok(volume)
    }

    /// Where the encrypted disk starts.
    pub fn payload_offset(&self) -> HostOffset {
        HostOffset::new(self.metadata.segment.offset)
    }

    /// Bytes of the disk, whole sectors, if its file has `file_len`.
    pub fn payload_len(&self, file_len: u64) -> Result<u64, Luks2Error> {
        let Segment {
            offset,
            len,
            spec: _,
            sector_len,
            first_sector: _,
        } = self.metadata.segment;
        let truncated = |end| Luks2Error::Truncated {
            what: "the segment".to_owned(),
            end,
            have: file_len,
        };
        let room = file_len.checked_sub(offset).ok_or(truncated(offset))?;
        match len {
            Some(len) if len > room => Err(truncated(offset.saturating_add(len))),
            Some(len) => Ok(len),
            None => {
                let rest = room.checked_rem(sector_len as u64).unwrap_or(0);
                Ok(room.saturating_sub(rest))
            }
        }
    }

    /// What `info` shows of it.
    pub fn describe(&self) -> Vec<(&'static str, Value)> {
        describe::describe(self)
    }
}

/// The copy at `at`, if there is one and it is whole. An error only if the file cannot be read.
fn read_copy(file: &dyn Storage, at: u64, have: u64, magic: [u8; 6]) -> Result<Option<Copy>> {
    let room = have.saturating_sub(at);
    if room < BINARY_LEN as u64 {
        return Ok(None);
    }
    let at = HostOffset::new(at);
    let mut binary = [0; BINARY_LEN];
    file.read_at(at, &mut binary)?;
    let Ok(mut raw) = RawHeader::read_from_bytes(&binary) else {
        return Ok(None);
    };
    let copy_len = raw.copy_len.get();
    let is_one = raw.magic == magic
        && raw.version.get() == 2
        && raw.at.get() == at.get()
        && COPY_LENS.contains(&copy_len)
        && copy_len <= room
        && (at == HostOffset::ZERO || at.get() == copy_len);
    let (true, Ok(hash)) = (is_one, HashAlg::parse(&text(&raw.checksum_alg))) else {
        return Ok(None);
    };
    let json_len = usize::try_from(copy_len.saturating_sub(BINARY_LEN as u64)).unwrap_or(0);
    let mut json = vec![0; json_len];
    file.read_at(at.plus(BINARY_LEN as u64)?, &mut json)?;
    let checksum = std::mem::replace(&mut raw.checksum, [0; 64]);
    let found = hash.digest(&[zerocopy::IntoBytes::as_bytes(&raw), &json]);
    if !checksum.starts_with(&found) {
        return Ok(None);
    }
    let end = json.iter().position(|byte| *byte == 0).unwrap_or(json_len);
    json.truncate(end);
    Ok(Some(Copy { raw, json }))
}

/// A field padded with NUL, as text.
fn text(field: &[u8]) -> String {
    let field = field.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(field).into_owned()
}
