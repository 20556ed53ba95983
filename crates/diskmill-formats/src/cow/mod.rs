//! cow: the first copy-on-write format of QEMU, which took it from User-Mode Linux and dropped it in version 2.2.
//!
//! ```text
//! 0       header       1056 bytes; 1048 where a 32-bit program wrote it
//! 1056    bitmap       a bit for each sector of 512 bytes, the lowest of a byte first; not aligned
//!         padding      up to a multiple of 512
//! data    sector 0 | sector 1 | ...      each has its fixed place
//! ```
//!
//! A sector whose bit is set is in the file; any other is the backing image's, or zeros. There is no table and nothing is
//! allocated: what a file saves, it saves by holes. All integers are big-endian. The header names no format of the backing
//! image, so that is guessed whenever the image is opened.
//!
//! # Changes, and what a power cut leaves
//!
//! A bit is only ever set after the data it shows is durable: data, flush, bits. Bits do not depend on one another, so it
//! does not matter which of them reach the disk first. Bytes of a sector that are not written are copied from below with
//! it, since the bit stands for all of it.
//!
//! Another size means another length of the bitmap, and data starts behind the bitmap. As long as it starts at the same
//! sector, a size is one word in one sector, and a single write switches it: the bits of new sectors are put in order
//! before. Otherwise every sector moves, up by less than the data is long. Nothing in the file says where a sector is but
//! the size itself, so there is no order of writes in place in which each moment is a whole image: the new place of a
//! sector is the old place of another, and the longer bitmap lies where the first sectors were. (Marking the file as being
//! moved and keeping a journal in it would do; but then it would be an image that only one program in the world can
//! read until that has finished.) So such a size is refused here: [`LayerMut::resizes_in_place`] says so beforehand, and
//! whoever has the file's name writes the image anew beside it and renames that over the old one, which stays untouched
//! until then.

mod check;
mod create;
pub mod header;
mod layer;
pub mod layout;
pub mod map;
mod resize;
mod write;

pub use layer::CowLayer;

use std::sync::Arc;

use diskmill_core::{
    BackingName, Builder, CheckReport, CreateSpec, DataRuns, Driver, Error, ErrorKind, Facts, Files,
    FilesMut, Format, HostOffset, Job, Layer, LayerMut, Match, Measure, OpenSpec, OptionError, OptionSpec,
    OutputSpec, Parsed, Reference, Repair, Result, Sample, Storage, Value,
};

use header::Header;
use layout::{LEN_64, MAGIC, MAGIC_SWAPPED};

/// The driver of cow.
pub static DRIVER: Cow = Cow;

/// The driver of cow.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Cow;

impl Driver for Cow {
    fn format(&self) -> Format {
        Format::Cow
    }

    /// All versions, and both orders of bytes: what cannot be read is to be refused by name, not taken for raw.
    fn probe(&self, sample: &Sample<'_>) -> Match {
        let swapped = sample
            .head
            .strip_prefix(&MAGIC_SWAPPED)
            .is_some_and(|rest| rest.starts_with(&1_u32.to_le_bytes()));
        match swapped || sample.head.starts_with(&MAGIC) {
            true => Match::ByMagic,
            false => Match::No,
        }
    }

    fn parse(&self, main: Arc<dyn Storage>, how: &OpenSpec) -> Result<Box<dyn Parsed>> {
        if let Some((name, _)) = how.options.iter().next() {
            return Err(OptionError::Unknown(name.to_owned()).into());
        }
        Ok(Box::new(CowImage::parse(main.as_ref())?))
    }

    fn options(&self) -> &'static [OptionSpec] {
        create::OPTIONS
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
pub struct CowImage {
    header: Header,
    facts: Facts,
}

impl CowImage {
    /// Understands the image in `main`.
    pub fn parse(main: &dyn Storage) -> Result<Self> {
        let len = main.len()?;
        let mut head = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(LEN_64)];
        main.read_at(HostOffset::ZERO, &mut head)
            .map_err(|error| error.op("read the header"))?;
        let header = Header::parse(&head, len)?;
        let mut facts = Facts::new(Format::Cow, header.virtual_size());
        facts.backing = header.backing.as_deref().map(backing_name);
        facts.details = Some(describe(&header));
        Ok(Self { header, facts })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }
}

/// A name that an image has, for whoever opens it. It is a path and nothing else: what would be taken for a protocol is
/// made to look like one.
fn backing_name(name: &[u8]) -> BackingName {
    let text = String::from_utf8_lossy(name);
    BackingName {
        name: match has_protocol(&text) {
            true => format!("./{text}"),
            false => text.into_owned(),
        },
        format: None,
    }
}

/// Whether a name starts like a URL, `json:` or a device: with a colon in front of any slash.
fn has_protocol(name: &str) -> bool {
    name.split('/').next().is_some_and(|first| first.contains(':'))
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
            let text = "a cow image has no internal snapshots";
            Err(Error::new(ErrorKind::Unsupported, text).format(Format::Cow))
        }
        None => Ok(()),
    }
}

impl Parsed for CowImage {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn references(&self) -> &[Reference] {
        &[]
    }

    fn attach(self: Box<Self>, files: Files, how: &OpenSpec) -> Result<Arc<dyn Layer>> {
        refuse_snapshot(how)?;
        let (_, main) = only(files)?;
        Ok(Arc::new(CowLayer::open(&self.header, self.facts, main)?))
    }

    fn attach_mut(self: Box<Self>, files: FilesMut, how: &OpenSpec) -> Result<Arc<dyn LayerMut>> {
        refuse_snapshot(how)?;
        let (_, main) = only(files)?;
        Ok(Arc::new(write::Image::open(self.header, self.facts, main, how)))
    }

    fn check(self: Box<Self>, files: Files, _how: &OpenSpec, job: Job<'_>) -> Result<CheckReport> {
        let (_, main) = only(files)?;
        check::run(&self.header, main.as_ref(), job)
    }

    fn repair(
        self: Box<Self>,
        files: FilesMut,
        _how: &OpenSpec,
        what: Repair,
        job: Job<'_>,
    ) -> Result<CheckReport> {
        let (_, main) = only(files)?;
        check::repair(&self.header, &main, what, job)
    }
}

/// What `info` shows of a cow image alone.
fn describe(header: &Header) -> Value {
    let geometry = header.geometry();
    let mut map = vec![
        ("version", Value::Int(layout::VERSION.into())),
        ("header-layout", Value::Text(header.layout.name().to_owned())),
        ("bitmap-offset", Value::Int(geometry.bitmap_at())),
        ("data-offset", Value::Int(geometry.data_at())),
    ];
    if header.size != header.virtual_size() {
        // A part of a sector that is not part of the disk.
        map.push(("size-in-header", Value::Int(header.size)));
    }
    if header.mtime != 0 {
        map.push(("backing-file-mtime", Value::Int(header.mtime.into())));
    }
    Value::Map(map)
}
