//! vmdk: VMware's virtual disks, in all the ways they are kept.
//!
//! ```text
//! descriptor  text: what the disk is, and its extents in order, each with its file
//! FLAT, VMFS  the bytes as they are
//! SPARSE      header | descriptor | redundant directory, tables | directory, tables | grains
//!             guest offset = directory entry . table entry . byte in grain; sectors of 512 bytes throughout
//! stream      header | descriptor | per table: marker and zlib stream of each grain, marker, table |
//!             marker, directory | marker, footer | marker of the end
//! VMFSSPARSE  header of 2048 bytes | directory | tables of 4096 entries | grains
//! SESPARSE    headers | journal | directory | tables | ... | grains of 4 KiB; 64-bit entries
//! ```
//!
//! A descriptor is a file of its own, or inside of the one SPARSE file it is about. All integers are little-endian.

mod check;
mod compact;
mod create;
pub mod descriptor;
mod facts;
mod grains;
pub mod header;
mod layer;
pub mod layout;
pub mod map;
mod measure;
pub mod options;
mod parts;
mod resize;
mod sparse;
mod tables;
mod write;

pub use layer::VmdkLayer;
pub use sparse::PlaceError;
pub use tables::TableError;

use std::sync::Arc;

use diskmill_core::{
    BackingName, Builder, CheckReport, CompactReport, CompactSpec, CreateSpec, DataRuns, Driver, Error,
    ErrorKind, Facts, FileIndex, Files, FilesMut, Format, HostOffset, Job, Layer, LayerMut, Match, Measure,
    OpenSpec, OptionError, OptionSpec, OutputSpec, Parsed, Reference, Repair, Result, Role, SECTOR, Sample,
    Storage,
};

use descriptor::{Descriptor, DescriptorError};
use header::Header;
use layout::{COWD_MAGIC, MOST_TEXT, SPARSE_MAGIC};

/// The driver of vmdk.
pub static DRIVER: Vmdk = Vmdk;

/// The driver of vmdk.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Vmdk;

fn unsupported(what: &'static str) -> Error {
    Error::new(ErrorKind::Unsupported, what).format(Format::Vmdk)
}

fn refuse_snapshot(how: &OpenSpec) -> Result<()> {
    match how.snapshot {
        Some(_) => Err(unsupported("a vmdk image has no internal snapshots")),
        None => Ok(()),
    }
}

/// Whether a file of its own is a descriptor, judged as QEMU does: comments and lines of blanks, then its version.
fn is_text(head: &[u8]) -> bool {
    for line in head.split_inclusive(|byte| *byte == b'\n') {
        let Some(text) = line.strip_suffix(b"\n") else {
            return false;
        };
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let blank = !text.is_empty() && text.iter().all(|byte| *byte == b' ');
        if !blank && !text.starts_with(b"#") {
            return [&b"version=1"[..], b"version=2", b"version=3"].contains(&text);
        }
    }
    false
}

impl Driver for Vmdk {
    fn format(&self) -> Format {
        Format::Vmdk
    }

    fn probe(&self, sample: &Sample<'_>) -> Match {
        let head = sample.head;
        let magic = head.starts_with(&SPARSE_MAGIC) || head.starts_with(&COWD_MAGIC);
        if magic || layer::is_se_sparse(head) || is_text(head) {
            Match::ByMagic
        } else {
            Match::No
        }
    }

    fn parse(&self, main: Arc<dyn Storage>, how: &OpenSpec) -> Result<Box<dyn Parsed>> {
        if let Some((name, _)) = how.options.iter().next() {
            return Err(OptionError::Unknown(name.to_owned()).into());
        }
        Ok(Box::new(VmdkImage::parse(&*main)?))
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
        measure::measure(spec, data)
    }
}

/// How the files of a disk belong together.
#[derive(Debug)]
enum Shape {
    /// One sparse file with the descriptor in it.
    Embedded {
        /// The header, or the footer in its place.
        header: Box<Header>,
    },
    /// A descriptor that names the rest.
    Text {
        /// For each extent the file that has it, if one does.
        files: Vec<Option<FileIndex>>,
    },
}

/// Where a descriptor is.
#[derive(Clone, Copy, Debug)]
struct TextPlace {
    /// Its first byte.
    at: HostOffset,
    /// Bytes it may take; `None` for a file of its own.
    room: Option<u64>,
}

/// A disk whose descriptor and, if it is in the same file, header have been understood.
#[derive(Debug)]
pub struct VmdkImage {
    facts: Facts,
    references: Vec<Reference>,
    descriptor: Descriptor,
    text: TextPlace,
    shape: Shape,
}

/// A part of a disk was named in place of the disk.
fn alone(what: &'static str) -> Error {
    let text = format!("it is {what}, one part of a disk: open the descriptor file that names it");
    Error::new(ErrorKind::Unsupported, text).format(Format::Vmdk)
}

impl VmdkImage {
    /// Understands the image in `main`.
    pub fn parse(main: &dyn Storage) -> Result<Self> {
        let head = layer::head(main)?;
        if head.starts_with(&COWD_MAGIC) {
            return Err(alone("a vmfsSparse extent"));
        }
        if layer::is_se_sparse(&head) {
            return Err(alone("a seSparse extent"));
        }
        if !head.starts_with(&SPARSE_MAGIC) {
            let len = main.len()?;
            if len > MOST_TEXT {
                return Err(Error::bare(ErrorKind::NotThisFormat).format(Format::Vmdk));
            }
            let text = TextPlace {
                at: HostOffset::ZERO,
                room: None,
            };
            let descriptor = Descriptor::parse(&read_text(main, text.at, len)?, false)?;
            return Self::of_text(descriptor, text);
        }
        let header = sparse::read_header(main)?;
        let Some((offset, size)) = header.descriptor else {
            return Err(alone("a sparse extent without a descriptor"));
        };
        let at = map::sector(offset);
        let room = size
            .saturating_mul(SECTOR)
            .min(main.len()?.saturating_sub(at.get()));
        let bytes = read_text(main, at, room.min(MOST_TEXT))?;
        if bytes.first().is_none_or(|byte| *byte == 0) {
            return Err(alone("a sparse extent with an empty descriptor"));
        }
        if bytes.len() as u64 == MOST_TEXT && !bytes.contains(&0) {
            return Err(DescriptorError::TooLong(room).into());
        }
        let descriptor = Descriptor::parse(&bytes, true)?;
        let text = TextPlace { at, room: Some(room) };
        if header.capacity == 0 {
            return Self::of_text(descriptor, text);
        }
        let mut facts = facts::of_descriptor(&descriptor, header.capacity.saturating_mul(SECTOR));
        facts::fill(&mut facts, &descriptor, &[facts::Listed::embedded(&header)]);
        Ok(Self {
            references: backing_reference(&facts).into_iter().collect(),
            facts,
            descriptor,
            text,
            shape: Shape::Embedded {
                header: Box::new(header),
            },
        })
    }

    fn of_text(descriptor: Descriptor, text: TextPlace) -> Result<Self> {
        if descriptor.extents.is_empty() {
            return Err(DescriptorError::NoExtents.into());
        }
        let facts = facts::of_descriptor(&descriptor, descriptor.disk_len());
        let mut references: Vec<Reference> = Vec::new();
        let mut files = Vec::with_capacity(descriptor.extents.len());
        for extent in &descriptor.extents {
            if extent.name.is_empty() {
                files.push(None);
                continue;
            }
            let known = references
                .iter()
                .position(|reference| reference.name.name == extent.name);
            let index = known.unwrap_or(references.len());
            let number = u16::try_from(index).map_err(|_| DescriptorError::TooManyExtents)?;
            if known.is_none() {
                references.push(Reference {
                    role: Role::Extent(number),
                    name: BackingName {
                        name: extent.name.clone(),
                        format: None,
                    },
                });
            }
            files.push(Some(FileIndex(number.saturating_add(1))));
        }
        references.extend(backing_reference(&facts));
        Ok(Self {
            facts,
            references,
            descriptor,
            text,
            shape: Shape::Text { files },
        })
    }
}

fn backing_reference(facts: &Facts) -> Option<Reference> {
    facts.backing.clone().map(|name| Reference {
        role: Role::Backing,
        name,
    })
}

fn read_text(main: &dyn Storage, at: HostOffset, len: u64) -> Result<Vec<u8>> {
    // At most MOST_TEXT.
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
    main.read_at(at, &mut bytes)?;
    Ok(bytes)
}

impl Parsed for VmdkImage {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn references(&self) -> &[Reference] {
        &self.references
    }

    fn attach(self: Box<Self>, files: Files, how: &OpenSpec) -> Result<Arc<dyn Layer>> {
        Ok(Arc::new(layer::attach(*self, files, how)?))
    }

    fn attach_mut(self: Box<Self>, files: FilesMut, how: &OpenSpec) -> Result<Arc<dyn LayerMut>> {
        Ok(Arc::new(write::attach(*self, files, how)?))
    }

    fn check(self: Box<Self>, files: Files, _how: &OpenSpec, job: Job<'_>) -> Result<CheckReport> {
        check::check(&self, files, job)
    }

    fn repair(
        self: Box<Self>,
        files: FilesMut,
        _how: &OpenSpec,
        what: Repair,
        job: Job<'_>,
    ) -> Result<CheckReport> {
        check::repair(&self, files, what, job)
    }

    fn compact(
        self: Box<Self>,
        files: FilesMut,
        how: &OpenSpec,
        spec: &CompactSpec,
        job: Job<'_>,
    ) -> Result<CompactReport> {
        refuse_snapshot(how)?;
        compact::run(&self, files, spec, job)
    }

    fn plan_compact(
        self: Box<Self>,
        files: Files,
        how: &OpenSpec,
        spec: &CompactSpec,
        job: Job<'_>,
    ) -> Result<CompactReport> {
        refuse_snapshot(how)?;
        compact::plan(&self, files, spec, job)
    }
}
