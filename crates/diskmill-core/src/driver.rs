//! A disk image format, as a value.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use crate::{
    BackingName, BitmapFacts, Builder, CheckReport, CompactReport, CompactSpec, Error, ErrorKind, Facts,
    FileIndex, Format, GuestOffset, Job, Layer, LayerMut, Limits, OptionSpec, Options, Repair, Result,
    Secrets, Storage, StorageMut, WhichSnapshot,
};

/// How sure a driver is that bytes are its format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Match {
    /// They are not.
    No,
    /// They might be; nothing speaks against it (raw).
    Possible,
    /// The name says so and the bytes do not contradict.
    ByName,
    /// The magic number says so.
    ByMagic,
}

/// The bytes a probe may look at.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The first bytes: [`Sample::HEAD`] of them, fewer if the file is shorter.
    pub head: &'a [u8],
    /// The last bytes, for formats with a footer: [`Sample::TAIL`] of them, fewer if the file is shorter.
    pub tail: &'a [u8],
    /// The length of the file.
    pub len: u64,
    /// The file's name, if it has one.
    pub name: Option<&'a str>,
}

impl Sample<'_> {
    /// Bytes read from the start: enough for the descriptor of an ISO 9660 image.
    pub const HEAD: usize = 64 << 10;
    /// Bytes read from the end.
    pub const TAIL: usize = 512;
}

/// What a file is to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Role {
    /// The file that was named.
    Main,
    /// Holds all data, apart from the tables.
    Data,
    /// Holds a part of the disk.
    Extent(u16),
    /// Holds the header, apart from the data.
    Header,
    /// The image below. It is opened into the chain, never handed to a format.
    Backing,
}

/// Whether a file is read or also written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and written.
    Write,
}

/// A file that an image names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// What it is to the image.
    pub role: Role,
    /// Its name, as the image writes it: hostile text that only `open` interprets.
    pub name: BackingName,
}

/// Open files of one image, for reading. The first is [`Role::Main`]; their order gives [`FileIndex`].
pub type Files = Vec<(Role, Arc<dyn Storage>)>;

/// Open files of one image, for writing. The first is [`Role::Main`]; their order gives [`FileIndex`].
pub type FilesMut = Vec<(Role, Arc<dyn StorageMut>)>;

/// How to open an image.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct OpenSpec {
    /// Caps on what it may ask for.
    pub limits: Limits,
    /// Open this internal snapshot instead of the active state.
    pub snapshot: Option<WhichSnapshot>,
    /// Of that snapshot open the machine state, as a disk of its length, instead of the disk.
    pub machine_state: bool,
    /// Open the disk of that snapshot at the size the image has now, cut or filled up, instead of the size it had.
    pub present_size: bool,
    /// Run-time options of the format (raw's `offset` and `size`), checked by the driver.
    pub options: Options,
    /// Pass discards on to the files.
    pub unmap: bool,
    /// The number to take when the content is first changed, in formats that keep one; `None` derives it from the
    /// old one.
    pub content_id: Option<u32>,
    /// Open it only to be checked: what a check reports must not keep it from being opened.
    pub for_check: bool,
    /// Where the key of an encrypted image comes from. Without one it opens all the same; its data cannot be read.
    pub secrets: Secrets,
    /// The file that holds the image's header, if the user says that is apart from the data: [`Driver::parse`] reads
    /// the header here, and attaching gets the same file as [`Role::Header`].
    pub header: Option<Arc<dyn Storage>>,
}

/// How to compress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compression {
    /// The codec's level, or `None` for the default.
    pub level: Option<i32>,
}

/// A new image that is wanted.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct CreateSpec {
    /// The size of the disk in bytes, already rounded up to a sector.
    pub virtual_size: u64,
    /// The format's options (`-o`), `size`, `backing_file` and `backing_fmt` taken out.
    pub options: Options,
    /// What it is to be backed by.
    pub backing: Option<BackingName>,
    /// Compress the data.
    pub compression: Option<Compression>,
    /// The name the main file is to have, without its directory: formats of several files name the others after it.
    pub name: Option<String>,
    /// What the backing image says of itself, if it was opened.
    pub backing_facts: Option<Box<Facts>>,
    /// The number that tells the content, in formats that keep one; `None` derives it from the rest.
    pub content_id: Option<u32>,
    /// The secrets its options name, and the passphrase it is to have if they name none.
    pub secrets: Secrets,
}

impl CreateSpec {
    /// A plain image of `virtual_size` bytes.
    pub fn new(virtual_size: u64) -> Self {
        Self {
            virtual_size,
            ..Self::default()
        }
    }
}

/// The name of a file to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutputName {
    /// The name the user gave.
    Main,
    /// Another name, found as names of data files are.
    Named(String),
    /// A name without a directory: the file goes beside the main one.
    Beside(String),
}

/// A file to create for a new image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OutputSpec {
    /// What it is to the image.
    pub role: Role,
    /// What it is called.
    pub name: OutputName,
    /// Ask the file system not to copy on write.
    pub nocow: bool,
    /// Ask the file system to allocate in steps of this.
    pub extent_size_hint: Option<u64>,
}

impl OutputSpec {
    /// The one file of an image that has only one.
    pub fn main() -> Self {
        Self {
            role: Role::Main,
            name: OutputName::Main,
            nocow: false,
            extent_size_hint: None,
        }
    }
}

/// The space an image would take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// Bytes of the file for the data there is.
    pub required: u64,
    /// Bytes of the file once all of the disk is written.
    pub fully_allocated: u64,
    /// Bytes for dirty bitmaps that could be copied.
    pub bitmaps: Option<u64>,
}

/// A disk image format.
pub trait Driver: Sync + Debug {
    /// Which one.
    fn format(&self) -> Format;

    /// Whether `sample` is of this format. Looks at nothing else.
    fn probe(&self, sample: &Sample<'_>) -> Match;

    /// Understands the header of `main` and says what else the image needs. Opens nothing.
    ///
    /// An error of kind [`NotThisFormat`](crate::ErrorKind::NotThisFormat) if the magic number is another's.
    fn parse(&self, main: Arc<dyn Storage>, how: &OpenSpec) -> Result<Box<dyn Parsed>>;

    /// The options [`build`](Self::build) knows, in the order `create` shows them. Empty: cannot be created.
    fn options(&self) -> &'static [OptionSpec];

    /// The options [`LayerMut::amend`] can change in an image that exists, sorted by name. Empty: none.
    fn amend_options(&self) -> &'static [OptionSpec] {
        &[]
    }

    /// The files a new image consists of, [`Role::Main`] first. Checks all of `spec`.
    fn outputs(&self, spec: &CreateSpec) -> Result<Vec<OutputSpec>>;

    /// Starts a new image in `files`, which are those of [`outputs`](Self::outputs), empty, in that order.
    fn build(&self, spec: &CreateSpec, files: FilesMut) -> Result<Box<dyn Builder>>;

    /// The space a new image would take. `data` yields, in rising order, the runs of the source that hold data;
    /// `None` means a disk of `spec`'s size with nothing in it.
    fn measure(&self, spec: &CreateSpec, data: Option<&mut dyn DataRuns>) -> Result<Measure>;
}

/// Runs of guest bytes that hold data, in rising order.
pub trait DataRuns {
    /// The next run, or `None` at the end.
    fn next_run(&mut self) -> Result<Option<Range<GuestOffset>>>;

    /// The dirty bitmaps that could be copied with the data, or `None` where the source keeps none at all.
    fn bitmaps(&self) -> Option<&[BitmapFacts]>;
}

/// An image whose header has been understood. It says what it needs and has opened nothing.
pub trait Parsed: Debug + Send {
    /// What the image says of itself.
    fn facts(&self) -> &Facts;

    /// The files it names, in the order [`Files`] wants them behind the main one, and its backing image.
    fn references(&self) -> &[Reference];

    /// Opens it for reading.
    fn attach(self: Box<Self>, files: Files, how: &OpenSpec) -> Result<Arc<dyn Layer>>;

    /// Opens it for changing in place.
    fn attach_mut(self: Box<Self>, files: FilesMut, how: &OpenSpec) -> Result<Arc<dyn LayerMut>>;

    /// Looks for contradictions and leaks. An error of kind [`Unsupported`](crate::ErrorKind::Unsupported) if the
    /// format has nothing to check.
    fn check(self: Box<Self>, files: Files, how: &OpenSpec, job: Job<'_>) -> Result<CheckReport>;

    /// Puts right what a check finds.
    fn repair(
        self: Box<Self>,
        files: FilesMut,
        how: &OpenSpec,
        what: Repair,
        job: Job<'_>,
    ) -> Result<CheckReport>;

    /// Makes the image's file as small as what it holds, in place: gives back space that nothing refers to or that holds
    /// only zeros, and moves what is behind it down. What can be read of the image, its snapshots and its bitmaps stays
    /// the same.
    ///
    /// A power cut at any moment leaves an image that reads the same; space may leak. An error of kind
    /// [`Corrupt`](ErrorKind::Corrupt) if the image contradicts itself: nothing has been changed then.
    fn compact(
        self: Box<Self>,
        files: FilesMut,
        how: &OpenSpec,
        spec: &CompactSpec,
        job: Job<'_>,
    ) -> Result<CompactReport> {
        let _ = (files, how, spec, job);
        Err(cannot_compact(self.facts().format))
    }

    /// What [`compact`](Self::compact) would do. Nothing is changed.
    fn plan_compact(
        self: Box<Self>,
        files: Files,
        how: &OpenSpec,
        spec: &CompactSpec,
        job: Job<'_>,
    ) -> Result<CompactReport> {
        let _ = (files, how, spec, job);
        Err(cannot_compact(self.facts().format))
    }

    /// The file a reference belongs to, given its place among the references that are not the backing image.
    fn file_index(&self, reference: usize) -> FileIndex {
        FileIndex(u16::try_from(reference.saturating_add(1)).unwrap_or(u16::MAX))
    }
}

fn cannot_compact(format: Format) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("images in {format} format cannot be compacted"),
    )
    .format(format)
}
