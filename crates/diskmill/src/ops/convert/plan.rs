//! What is to be converted, into what, and how.

use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::Arc;

use diskmill_core::{Compression, Durability, OpenSpec, Options, Secrets};
use diskmill_storage::CacheMode;

use crate::open::{Around, OpenRequest};
use crate::spec::ImageSpec;

/// A conversion: some disks, one behind the other, become one image.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Plan {
    /// What is read: at least one.
    pub inputs: Vec<Input>,
    /// What is written.
    pub output: Output,
    /// Compress the data (`-c`).
    pub compress: Option<Compression>,
    /// Runs of zeros at least this long are not stored, in bytes: a multiple of 512 (`-S`). 0 stores all of the disk,
    /// zeros too.
    pub sparse: u64,
    /// Threads to use at most (`-m`); `None` means one for each core.
    pub workers: Option<NonZeroUsize>,
    /// Let the kernel copy data that need not be looked at (`-C`).
    pub offload: bool,
    /// Store zeros in place of what cannot be read, with a warning each (`--salvage`).
    pub salvage: bool,
    /// Bytes to write a second at most (`-r`).
    pub rate: Option<NonZeroU64>,
    /// What must hold when it is done.
    pub durability: Durability,
    /// Copy only this of the one source there is (`dd`).
    pub extract: Option<Extract>,
    /// Copy dirty bitmaps too (`--bitmaps`).
    pub bitmaps: bool,
    /// Carry all internal snapshots of the source: it must be one image, and the target a new qcow2 image.
    pub keep_snapshots: bool,
    /// Leave out, with a warning each, those that are inconsistent (`--skip-broken-bitmaps`).
    pub skip_broken_bitmaps: bool,
}

impl Plan {
    /// One image into another, with the defaults of `qemu-img convert`, but durable.
    pub fn new(input: Input, output: Output) -> Self {
        Self {
            inputs: vec![input],
            output,
            compress: None,
            sparse: 4096,
            workers: None,
            offload: false,
            salvage: false,
            rate: None,
            extract: None,
            durability: Durability::Synced,
            bitmaps: false,
            keep_snapshots: false,
            skip_broken_bitmaps: false,
        }
    }
}

/// A part of a disk that is to be copied as a disk of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extract {
    /// Bytes to leave out at the start.
    pub skip: u64,
    /// Bytes to copy at most; `None` for all there are.
    pub len: Option<u64>,
    /// Bytes of the new disk: what is not copied is zeros, and what does not fit is left out. `None` for as many as are
    /// copied.
    pub size: Option<u64>,
}

/// Where data comes from.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Input {
    /// An image.
    Image(Box<OpenRequest>),
    /// A raw disk that comes through standard input. It must be the only input.
    Stdin,
    /// An image of any format, or a package, that comes through standard input. It must be the only input, and is kept
    /// in an unnamed file, since it is read back and forth. The request's `spec` is not looked at.
    StdinImage(Box<OpenRequest>),
}

/// Where data goes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Output {
    /// A new image, in place of what is there. Block devices and pipes are written in place.
    New(NewImage),
    /// An image that exists and keeps its format and size (`-n`).
    Existing(ExistingImage),
    /// A raw disk through standard output.
    Stdout,
}

/// An image to make.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NewImage {
    /// Where to put it.
    pub target: ImageSpec,
    /// Its format by name.
    pub format: String,
    /// The options of the format (`-o`).
    pub options: Options,
    /// The name of its backing image (`-B`). Only what the source's top layer holds is stored then; the rest is
    /// taken to be in the backing image already.
    pub backing: Option<String>,
    /// The format of its backing image (`-F`).
    pub backing_format: Option<String>,
    /// How writes pass the host's cache (`-t`).
    pub cache: CacheMode,
    /// The secrets its options name, and the passphrase it is to have if they name none.
    pub secrets: Secrets,
    /// What is put around each file that is made.
    pub around: Option<Arc<dyn Around>>,
}

impl NewImage {
    /// A plain image of `format` at `target`.
    pub fn new(target: ImageSpec, format: impl Into<String>) -> Self {
        Self {
            target,
            format: format.into(),
            options: Options::new(),
            backing: None,
            backing_format: None,
            cache: CacheMode::Writeback,
            secrets: Secrets::new(),
            around: None,
        }
    }

    /// How the image is opened again once it is made: with the same key.
    pub(crate) fn reopening(&self) -> OpenSpec {
        let mut how = OpenSpec::default();
        how.secrets = self.secrets.for_image(&*self.target.shown);
        for name in KEY_OPTIONS {
            if let Some(id) = self.options.text(name) {
                how.options.set(name, id);
            }
        }
        how
    }
}

/// Options of new images that name a secret, and are called the same when the image is opened.
const KEY_OPTIONS: [&str; 2] = ["encrypt.key-secret", "key-secret"];

/// An image to overwrite.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ExistingImage {
    /// Which one, and how to open it.
    pub open: OpenRequest,
    /// It is known to read as zeros (`--target-is-zero`): zeros need not be written.
    pub is_zero: bool,
    /// Its backing image holds what the source's top layer does not (`-B`).
    pub backing: Option<String>,
}

impl ExistingImage {
    /// The image `open` asks for, with unknown contents.
    pub fn new(open: OpenRequest) -> Self {
        Self {
            open,
            is_zero: false,
            backing: None,
        }
    }
}
