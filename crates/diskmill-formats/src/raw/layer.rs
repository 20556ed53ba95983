//! Reading a raw image.

use std::sync::Arc;

use diskmill_core::{
    Error, ErrorKind, Extent, Facts, FileIndex, Format, GuestOffset, HostOffset, HostSpan, Layer, OpenSpec,
    OptionError, Result, SECTOR, State, Storage,
};

/// Why a raw image cannot be opened as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RawError {
    /// The window starts behind the file.
    #[error("offset is {offset}, must be at most {len}, the length of the file")]
    Offset {
        /// Where it starts.
        offset: u64,
        /// The length of the file, in whole sectors.
        len: u64,
    },
    /// The window ends behind the file.
    #[error(
        "size is {size}, must be at most {room}: the file of {len} bytes ends there after offset {offset}"
    )]
    Size {
        /// Bytes of it.
        size: u64,
        /// Where it starts.
        offset: u64,
        /// Bytes there are from there on.
        room: u64,
        /// The length of the file, in whole sectors.
        len: u64,
    },
    /// The window is not of whole sectors.
    #[error("size is {0}, must be a multiple of 512")]
    Sectors(u64),
    /// The file is longer than a disk can be.
    #[error("the file has {0} bytes, must have fewer than 2^63")]
    TooLong(u64),
}

impl From<RawError> for Error {
    fn from(error: RawError) -> Self {
        let kind = match error {
            RawError::TooLong(_) => ErrorKind::Unsupported,
            _ => ErrorKind::Usage,
        };
        Error::new(kind, error).format(Format::Raw)
    }
}

/// The part of the file that is the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    offset: u64,
    size: u64,
    fixed: bool,
    file_len: u64,
}

impl View {
    /// The part of a file of `file_len` bytes that the options `offset` and `size` tell, or all of it. The last
    /// sector counts as whole.
    pub fn new(file_len: u64, how: &OpenSpec) -> Result<Self> {
        let options = &how.options;
        if let Some((name, _)) = options
            .iter()
            .find(|(name, _)| !matches!(*name, "offset" | "size"))
        {
            return Err(OptionError::Unknown(name.to_owned()).into());
        }
        let len = file_len
            .checked_next_multiple_of(SECTOR)
            .filter(|len| *len <= i64::MAX as u64)
            .ok_or(RawError::TooLong(file_len))?;
        let offset = options.size("offset")?.unwrap_or(0);
        let room = len.checked_sub(offset).ok_or(RawError::Offset { offset, len })?;
        match options.size("size")? {
            None => Ok(Self {
                offset,
                size: room.next_multiple_of(SECTOR),
                fixed: false,
                file_len,
            }),
            Some(size) if !size.is_multiple_of(SECTOR) => Err(RawError::Sectors(size).into()),
            Some(size) if size > room => Err(RawError::Size {
                size,
                offset,
                room,
                len,
            }
            .into()),
            Some(size) => Ok(Self {
                offset,
                size,
                fixed: true,
                file_len,
            }),
        }
    }

    /// Where the disk starts in the file, in bytes.
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// Bytes of the disk.
    pub const fn size(self) -> u64 {
        self.size
    }

    /// Whether the caller fixed the size: then it cannot be changed.
    pub const fn is_fixed(self) -> bool {
        self.fixed
    }

    /// The byte of the file that holds a byte of the disk.
    pub fn host(self, at: GuestOffset) -> Result<HostOffset> {
        HostOffset::new(self.offset).plus(at.get())
    }
}

/// A raw image, open for reading.
#[derive(Debug)]
pub struct RawLayer {
    view: View,
    facts: Facts,
    file: Arc<dyn Storage>,
}

impl RawLayer {
    pub(super) fn new(view: View, facts: Facts, file: Arc<dyn Storage>) -> Self {
        Self { view, facts, file }
    }
}

/// All of a raw disk is stored, one run: what the host keeps as holes is for the caller to ask the storage.
pub(super) fn map(view: View, size: u64, at: GuestOffset, max: u64) -> Result<Extent> {
    let left = size.saturating_sub(at.get());
    if left == 0 || max == 0 {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("{max} bytes at {at} are not within the disk of {size} bytes"),
        ));
    }
    let len = max.min(left);
    Ok(Extent {
        len,
        state: State::Data(HostSpan {
            file: FileIndex::MAIN,
            at: view.host(at)?,
            len,
        }),
    })
}

impl Layer for RawLayer {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn virtual_size(&self) -> u64 {
        self.view.size()
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        map(self.view, self.view.size(), at, max)
    }

    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let host = self.view.host(at)?;
        if host.plus(buf.len() as u64)?.get() > self.view.file_len {
            // The rest of a last sector that the file has only a part of.
            return self.file.read_padded(host, buf).map_err(|error| error.guest(at));
        }
        self.file.read_at(host, buf).map_err(|error| error.guest(at))
    }

    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>> {
        (index == FileIndex::MAIN).then_some(&self.file)
    }

    fn is_hollow(&self) -> Result<bool> {
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
