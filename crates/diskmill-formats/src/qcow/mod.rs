//! qcow: QEMU copy-on-write, version 1.
//!
//! ```text
//! 0         header                                     48 bytes
//!           name of the backing file | L1 table        where the header says
//!           L2 table | cluster | cluster | ... | L2 table | cluster | stream | stream | ...
//!           guest offset = L1 index . L2 index . byte in cluster
//! L2 entry  0                                          ask below
//!           byte offset, a multiple of 512             the cluster
//!           1 | compressed bytes | byte offset         a raw deflate stream, at any byte
//! ```
//!
//! A file only grows: there are no reference counts, no mark for zeros and no snapshots. Clusters have 512 bytes to
//! 64 KiB. All integers are big-endian.

mod check;
mod create;
pub mod header;
mod key;
mod layer;
pub mod layout;
pub mod map;
mod options;
mod resize;
mod tables;
mod write;

pub use layer::QcowLayer;
pub use options::CreateError;

use std::sync::Arc;

use diskmill_core::{
    BackingName, Builder, CheckReport, CreateSpec, DataRuns, Driver, Error, ErrorKind, Facts, Files,
    FilesMut, Format, HostOffset, Job, Layer, LayerMut, Match, Measure, OpenSpec, OptionSpec, OutputSpec,
    Parsed, Reference, Repair, Result, Role, Sample, Storage,
};

use header::{CryptMethod, Header};
use layout::{HEADER_LEN, MAGIC, VERSION};

/// The driver of qcow.
pub static DRIVER: Qcow = Qcow;

/// The driver of qcow.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Qcow;

impl Driver for Qcow {
    fn format(&self) -> Format {
        Format::Qcow
    }

    fn probe(&self, sample: &Sample<'_>) -> Match {
        let rest = sample.head.strip_prefix(&MAGIC.to_be_bytes());
        match rest.is_some_and(|rest| rest.starts_with(&VERSION.to_be_bytes())) {
            true => Match::ByMagic,
            false => Match::No,
        }
    }

    fn parse(&self, main: Arc<dyn Storage>, how: &OpenSpec) -> Result<Box<dyn Parsed>> {
        key::check_options(&how.options)?;
        Ok(Box::new(QcowImage::parse(main.as_ref())?))
    }

    fn options(&self) -> &'static [OptionSpec] {
        options::OPTIONS
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
pub struct QcowImage {
    header: Header,
    facts: Facts,
    references: Vec<Reference>,
}

impl QcowImage {
    /// Understands the image in `main`.
    pub fn parse(main: &dyn Storage) -> Result<Self> {
        let header = read_header(main)?;
        let mut facts = Facts::new(Format::Qcow, header.virtual_size());
        facts.unit = Some(header.geometry.cluster_size());
        facts.encrypted = header.crypt != CryptMethod::None;
        facts.backing = read_name(&header, main)?;
        let references = facts.backing.iter().cloned().map(|name| Reference {
            role: Role::Backing,
            name,
        });
        Ok(Self {
            references: references.collect(),
            header,
            facts,
        })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }
}

/// Reads and understands the header.
pub fn read_header(main: &dyn Storage) -> Result<Header> {
    let len = main.len()?;
    let have = usize::try_from(len.min(HEADER_LEN)).unwrap_or(0);
    let mut head = vec![0; have];
    main.read_at(HostOffset::ZERO, &mut head)
        .map_err(|error| error.op("read the header"))?;
    Ok(Header::parse(&head, len)?)
}

/// The name of the backing file: up to a NUL, if there is one in it.
fn read_name(header: &Header, main: &dyn Storage) -> Result<Option<BackingName>> {
    let Some((at, len)) = header.backing else {
        return Ok(None);
    };
    let mut name = vec![0; usize::try_from(len).unwrap_or(0)];
    main.read_at(at, &mut name)
        .map_err(|error| error.op("read the name of the backing file"))?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok((!name.is_empty()).then(|| BackingName {
        name: String::from_utf8_lossy(name).into_owned(),
        format: None,
    }))
}

/// The only file of an image.
fn only<T>(files: Vec<T>) -> Result<T> {
    match files.into_iter().next() {
        Some(file) => Ok(file),
        None => Err(Error::new(ErrorKind::Usage, "an image needs a file")),
    }
}

fn refuse_snapshot(how: &OpenSpec) -> Result<()> {
    match how.snapshot {
        Some(_) => {
            let text = "a qcow image has no internal snapshots";
            Err(Error::new(ErrorKind::Unsupported, text).format(Format::Qcow))
        }
        None => Ok(()),
    }
}

impl Parsed for QcowImage {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn references(&self) -> &[Reference] {
        &self.references
    }

    fn attach(self: Box<Self>, files: Files, how: &OpenSpec) -> Result<Arc<dyn Layer>> {
        refuse_snapshot(how)?;
        let (_, main) = only(files)?;
        Ok(Arc::new(QcowLayer::open(&self.header, self.facts, main, how)?))
    }

    fn attach_mut(self: Box<Self>, files: FilesMut, how: &OpenSpec) -> Result<Arc<dyn LayerMut>> {
        refuse_snapshot(how)?;
        let (_, main) = only(files)?;
        Ok(Arc::new(write::Image::open(self.header, self.facts, main, how)?))
    }

    fn check(self: Box<Self>, files: Files, how: &OpenSpec, job: Job<'_>) -> Result<CheckReport> {
        let (_, main) = only(files)?;
        check::run(&self.header, main.as_ref(), how, job)
    }

    fn repair(
        self: Box<Self>,
        files: FilesMut,
        how: &OpenSpec,
        what: Repair,
        job: Job<'_>,
    ) -> Result<CheckReport> {
        let (_, main) = only(files)?;
        check::repair(self.header, &main, how, what, job)
    }
}
