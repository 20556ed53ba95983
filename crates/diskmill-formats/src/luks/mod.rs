//! luks: a raw disk, encrypted, behind the header that keeps its key (LUKS version 1).
//!
//! ```text
//! 0              header and key slots, see [`crate::crypt::luks`]
//! payload_offset sector 0 of the disk | sector 1 | ...
//! ```
//!
//! Sectors have 512 bytes and are numbered from the start of the payload. The disk is as long as the file has bytes
//! behind the header; nothing says so. There are no tables: all of the disk is stored, and a hole of the host reads as
//! what the cipher makes of zeros. The header may be in a file of its own ([`Role::Header`]); `payload_offset` is 0
//! then, as a rule, but is added all the same if it is not.

mod amend;
mod check;
mod create;
mod layer;
mod map;
mod options;
mod v2;
mod write;

pub use layer::LuksLayer;

use std::sync::Arc;

use diskmill_core::{
    Builder, CheckReport, CreateSpec, DataRuns, Driver, Error, ErrorKind, Facts, Files, FilesMut, Format,
    HostOffset, Job, Layer, LayerMut, Match, Measure, OpenSpec, OptionError, OptionSpec, OutputSpec, Parsed,
    Reference, Repair, Result, Role, SECTOR, Sample, Storage, Value,
};

use crate::crypt::luks::{LuksError, MAGIC, Place, Volume, VolumeKey};
use crate::crypt::{DataCipher, Numbering};
use map::Payload;

/// The option that names the secret with the passphrase.
const KEY_SECRET: &str = "key-secret";

/// The driver of luks.
pub static DRIVER: Luks = Luks;

/// The driver of luks.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Luks;

fn unsupported(what: &'static str) -> Error {
    Error::new(ErrorKind::Unsupported, what).format(Format::Luks)
}

impl Driver for Luks {
    fn format(&self) -> Format {
        Format::Luks
    }

    fn probe(&self, sample: &Sample<'_>) -> Match {
        match sample.head.strip_prefix(&MAGIC) {
            Some([0, 1, ..]) => Match::ByMagic,
            _ => Match::No,
        }
    }

    fn parse(&self, main: Arc<dyn Storage>, how: &OpenSpec) -> Result<Box<dyn Parsed>> {
        if let Some((name, _)) = how.options.iter().find(|(name, _)| *name != KEY_SECRET) {
            return Err(OptionError::Unknown(name.to_owned()).into());
        }
        match LuksImage::parse(main.as_ref(), how) {
            Ok(image) => Ok(Box::new(image)),
            // Never probed as ours, as qemu-img does not either; but who says that it is one may read it.
            Err(error) if error.find() == Some(&LuksError::Version(2)) => {
                Ok(Box::new(v2::Luks2Image::parse(main.as_ref(), how)?))
            }
            Err(error) => Err(error),
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        options::OPTIONS
    }

    fn amend_options(&self) -> &'static [OptionSpec] {
        amend::OPTIONS
    }

    fn outputs(&self, spec: &CreateSpec) -> Result<Vec<OutputSpec>> {
        create::outputs(spec)
    }

    fn build(&self, spec: &CreateSpec, files: FilesMut) -> Result<Box<dyn Builder>> {
        create::build(spec, files)
    }

    fn measure(&self, spec: &CreateSpec, data: Option<&mut dyn DataRuns>) -> Result<Measure> {
        create::measure(spec, data)
    }
}

/// An image whose header has been understood.
#[derive(Debug)]
pub struct LuksImage {
    volume: Volume,
    facts: Facts,
}

impl LuksImage {
    /// Understands the image in `main`, whose header is there too unless `how` says where.
    fn parse(main: &dyn Storage, how: &OpenSpec) -> Result<Self> {
        let loaded = match &how.header {
            Some(header) => Volume::load(header.as_ref(), Place::Detached),
            None => Volume::load(main, Place::Standalone),
        };
        let volume = loaded.map_err(|error| match error.find::<LuksError>() {
            Some(LuksError::Magic(_)) => {
                let kind = ErrorKind::NotThisFormat;
                match error.into_source() {
                    Some(source) => Error::new(kind, source).format(Format::Luks),
                    None => Error::bare(kind),
                }
            }
            _ => error.op("read the header"),
        })?;
        let (start, len) = (volume.header().payload_offset(), main.len()?);
        let size = len
            .checked_sub(start)
            .and_then(|size| size.checked_next_multiple_of(SECTOR))
            .filter(|size| *size <= i64::MAX as u64)
            .ok_or(SizeError { start, len })?;
        let mut facts = Facts::new(Format::Luks, size);
        facts.encrypted = true;
        facts.specific = Some(Value::Map(volume.describe()));
        Ok(Self { volume, facts })
    }

    /// The key of the disk, if there is a passphrase. An error if it is the wrong one.
    fn key(&self, header: &dyn Storage, how: &OpenSpec) -> Result<Option<VolumeKey>> {
        match how.secrets.find(how.options.text(KEY_SECRET))? {
            None => Ok(None),
            Some(passphrase) => {
                let key = self.volume.unlock(header, passphrase.as_bytes(), Job::silent());
                key.map(Some)
            }
        }
    }

    /// Where the disk is. Without a key it is locked.
    fn payload(&self, key: Option<&VolumeKey>) -> Result<Payload> {
        let start = HostOffset::new(self.volume.header().payload_offset());
        let cipher = match key {
            None => None,
            Some(key) => Some(DataCipher::new(Arc::new(key.cipher()?), Numbering::Host(start))),
        };
        Ok(Payload::new(start, cipher))
    }
}

/// The file ends before the disk begins, or is too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the file has {len} bytes, must have {start} in front of the encrypted data and fewer than 2^63")]
struct SizeError {
    start: u64,
    len: u64,
}

impl From<SizeError> for Error {
    fn from(error: SizeError) -> Self {
        Error::new(ErrorKind::Malformed, error).format(Format::Luks)
    }
}

/// The main file of an image, and the one with its header, if that is another.
fn take<T>(files: Vec<(Role, T)>) -> Result<(T, Option<T>)> {
    let mut header = None;
    let mut main = None;
    for (role, file) in files {
        match role {
            Role::Header => header = Some(file),
            _ => main = main.or(Some(file)),
        }
    }
    match main {
        Some(main) => Ok((main, header)),
        None => Err(Error::new(ErrorKind::Usage, "an image needs a file")),
    }
}

fn refuse_snapshot(how: &OpenSpec) -> Result<()> {
    match how.snapshot {
        Some(_) => Err(unsupported("a luks image has no internal snapshots")),
        None => Ok(()),
    }
}

impl Parsed for LuksImage {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn references(&self) -> &[Reference] {
        &[]
    }

    fn attach(self: Box<Self>, files: Files, how: &OpenSpec) -> Result<Arc<dyn Layer>> {
        refuse_snapshot(how)?;
        let (main, header) = take(files)?;
        let key = self.key(header.as_ref().unwrap_or(&main).as_ref(), how)?;
        let payload = self.payload(key.as_ref())?;
        Ok(Arc::new(LuksLayer::new(self.facts, payload, main)))
    }

    fn attach_mut(self: Box<Self>, files: FilesMut, how: &OpenSpec) -> Result<Arc<dyn LayerMut>> {
        refuse_snapshot(how)?;
        let (main, header) = take(files)?;
        let key = self.key(header.as_ref().unwrap_or(&main).as_ref(), how)?;
        let payload = self.payload(key.as_ref())?;
        let secrets = how.secrets.clone();
        Ok(Arc::new(write::Image::new(
            self.facts, payload, key, main, header, secrets,
        )))
    }

    fn check(self: Box<Self>, files: Files, _how: &OpenSpec, _job: Job<'_>) -> Result<CheckReport> {
        let (main, _) = take(files)?;
        check::run(&self.volume, main.as_ref())
    }

    fn repair(
        self: Box<Self>,
        _files: FilesMut,
        _how: &OpenSpec,
        _what: Repair,
        _job: Job<'_>,
    ) -> Result<CheckReport> {
        Err(unsupported("a luks image has nothing that could be repaired"))
    }
}

#[cfg(test)]
mod tests;
