//! Changing what an image is backed by.

use std::sync::atomic::Ordering;

use diskmill_core::{BackingName, Error, ErrorKind, Format, Result};

use super::extension::Extension;
use super::flight::Hold;
use super::header::Header;
use super::layout::{BACKING_FORMAT_MAX, BACKING_NAME_MAX};
use super::write::Image;

/// Why an image cannot be backed by something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BackingError {
    #[error("the name of the backing file has {0} bytes, must have 1 to 1023")]
    Name(usize),
    #[error("the name of the backing format has {0} bytes, must have at most 15")]
    Format(usize),
    #[error("an image whose data file is a raw image cannot have a backing file")]
    RawDataFile,
}

fn refuse(error: BackingError) -> Error {
    Error::new(ErrorKind::Usage, error).format(Format::Qcow2)
}

/// Enters `backing` into `header`.
pub(crate) fn enter(header: &mut Header, backing: Option<&BackingName>) -> Result<()> {
    let name = backing.map(|backing| backing.name.as_bytes().to_vec());
    if let Some(name) = &name
        && (name.is_empty() || name.len() as u64 > BACKING_NAME_MAX.into())
    {
        return Err(refuse(BackingError::Name(name.len())));
    }
    let format = backing.and_then(|backing| backing.format.as_ref());
    if let Some(format) = format
        && format.len() as u64 > BACKING_FORMAT_MAX.into()
    {
        return Err(refuse(BackingError::Format(format.len())));
    }
    header.backing_name = name;
    header
        .extensions
        .retain(|extension| !matches!(extension, Extension::BackingFormat(_)));
    if let Some(format) = format.filter(|format| !format.is_empty()) {
        let format = Extension::BackingFormat(format.as_bytes().to_vec());
        header.extensions.insert(0, format);
    }
    Ok(())
}

impl Image {
    /// Changes what the image says it is backed by.
    pub(super) fn change_backing(&self, backing: Option<&BackingName>) -> Result<()> {
        if self.raw_data_file && backing.is_some() {
            return Err(refuse(BackingError::RawDataFile));
        }
        let _flight = self.flights.hold(0..u64::MAX, Hold::Alone);
        self.change(|tables| tables.rewrite_header(|header| enter(header, backing)))?;
        self.backed.store(backing.is_some(), Ordering::Release);
        Ok(())
    }
}
