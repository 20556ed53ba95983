//! Guest bytes of one image.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use crate::{
    BackingName, BitmapError, Bitmaps, Chain, DirtyRuns, Encoder, Error, ErrorKind, Extent, Facts, FileIndex,
    GuestOffset, HostSpan, Identity, Job, Options, Result, Snapshots, Storage, Stored, ZeroHow,
};

/// One image, open for reading. It answers for itself alone: what is absent is for the [`Chain`] to ask below.
pub trait Layer: Send + Sync + Debug {
    /// What the image said of itself when it was opened.
    fn facts(&self) -> &Facts;

    /// The size of the virtual disk as it is now, in bytes.
    fn virtual_size(&self) -> u64;

    /// The state of the bytes from `at`: `0 < len <= max`. Reads metadata only and opens nothing.
    ///
    /// `at` must be below the virtual size and `max` above 0; a run ends at the virtual size at the latest.
    fn map(&self, at: GuestOffset, max: u64) -> Result<Extent>;

    /// Fills `buf` from `at`. All of it must lie within one extent that [`map`](Self::map) gave and that is not
    /// absent.
    fn read_at(&self, at: GuestOffset, buf: &mut [u8]) -> Result<()>;

    /// The storage a [`HostSpan`](crate::HostSpan) of this layer speaks of.
    fn file(&self, index: FileIndex) -> Option<&Arc<dyn Storage>>;

    /// The number that tells the content, as it is now, where the format keeps one.
    fn content_id(&self) -> Option<u32> {
        self.facts().content_id
    }

    /// Which image it is and in which state it is now, where its format says so.
    fn identity(&self) -> Option<Identity> {
        self.facts().identity
    }

    /// Whether what is stored may well be holes of the host, so that a map should ask the storage for them.
    fn is_hollow(&self) -> Result<bool> {
        Ok(false)
    }

    /// The place that is kept for absent bytes at `at`, if there is one, and for how many of `max` bytes that answer
    /// holds: at least 1.
    fn kept(&self, at: GuestOffset, max: u64) -> Result<(Option<HostSpan>, u64)> {
        let _ = at;
        Ok((None, max))
    }

    /// What the dirty bitmap `name` says is dirty. An error with a [`BitmapError`] if there is none, or if it is
    /// inconsistent.
    fn dirty(&self, name: &str) -> Result<Box<dyn DirtyRuns>> {
        let _ = name;
        Err(Error::new(
            ErrorKind::Unsupported,
            BitmapError::Unsupported(self.facts().format),
        ))
    }
}

/// What is taken for bytes before there is data for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserve {
    /// A place in the file.
    Place,
    /// A place, and host space for it.
    Space,
    /// A place, and zeros written to it.
    Zeros,
}

/// A change of options that an image was made with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Amendment {
    /// What is to be changed.
    pub options: Options,
    /// Do also what could make an encrypted image unreadable for good.
    pub force: bool,
}

impl Amendment {
    /// A change of `options` that does no harm.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            force: false,
        }
    }
}

/// One image, open for changing in place.
///
/// Every method leaves an image that a power cut cannot corrupt: space may leak, data that was flushed is there.
/// `below` is the chain under this layer; copy-on-write reads it.
pub trait LayerMut: Layer {
    /// Writes `buf` at `at`.
    fn write_at(&self, at: GuestOffset, buf: &[u8], below: &Chain) -> Result<()>;

    /// Stores whole units as an [`Encoder`] made them, in place of what they were.
    fn write_encoded(&self, at: GuestOffset, unit: Stored<'_>, below: &Chain) -> Result<()>;

    /// An encoder of what [`write_encoded`](Self::write_encoded) takes. An error of kind
    /// [`Unsupported`](crate::ErrorKind::Unsupported) if this image stores nothing compressed.
    fn encoder(&self) -> Result<Box<dyn Encoder>> {
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("format '{}' stores nothing compressed", self.facts().format),
        ))
    }

    /// Whether zeros take as much as data, since there is no other way to store them.
    fn stores_zeros(&self) -> bool {
        false
    }

    /// Makes `range` read as zeros.
    fn zero(&self, range: Range<GuestOffset>, how: ZeroHow, below: &Chain) -> Result<()>;

    /// Tells the image that the bytes of `range` are not needed. Only whole units are given back.
    fn discard(&self, range: Range<GuestOffset>) -> Result<()>;

    /// Gives all data back, so that the layer below shows through everywhere. That layer is taken to hold the same
    /// by now, so that nothing counts as changed in dirty bitmaps.
    fn clear(&self) -> Result<()>;

    /// Changes the virtual size. New bytes read as zeros, but where [`stores_zeros`](Self::stores_zeros): as anything.
    fn resize(&self, size: u64, below: &Chain) -> Result<()>;

    /// Whether [`resize`](Self::resize) can give the disk this size. If not it refuses, and the image has to be written
    /// anew: its file offers no way there on which every moment is a whole image.
    fn resizes_in_place(&self, size: u64) -> bool {
        let _ = size;
        true
    }

    /// Takes room for bytes that read as zeros because nothing was ever written there: what a disk has grown by. They
    /// go on reading as zeros. An error of kind [`ErrorKind::Unsupported`] if the format has no such thing.
    fn reserve(&self, range: Range<GuestOffset>, how: Reserve) -> Result<()> {
        let _ = (range, how);
        Err(Error::new(
            ErrorKind::Unsupported,
            "the format cannot take room ahead of data",
        ))
    }

    /// Changes what the image says it is backed by, and nothing else; `None` means nothing. When this returns the change
    /// and all that was written before it are durable; a power cut leaves the old name or the new one.
    ///
    /// An error of kind [`ErrorKind::Usage`] if the image cannot have this name, of kind [`ErrorKind::NoSpace`] if there
    /// is no room for it, of kind [`ErrorKind::Unsupported`] if the format has no backing images.
    fn set_backing(&self, backing: Option<&BackingName>) -> Result<()> {
        let _ = backing;
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("format '{}' cannot change its backing image", self.facts().format),
        ))
    }

    /// Changes options the image was made with: those of [`Driver::amend_options`](crate::Driver::amend_options). All
    /// are looked at before anything is changed, and each is then changed in a step that a power cut leaves done or
    /// undone. An error of kind [`ErrorKind::Unsupported`] if the format has no such thing.
    fn amend(&self, wish: &Amendment, below: &Chain, job: Job<'_>) -> Result<()> {
        let _ = (wish, below, job);
        Err(Error::new(
            ErrorKind::Unsupported,
            "the format has no options that could be changed",
        ))
    }

    /// Tells an image that knows its backing image by its content which content that has now; it counts from the next
    /// [`set_backing`](Self::set_backing) on, which need not change the name. Others need not know.
    fn expect_backing(&self, content_id: Option<u32>) {
        let _ = content_id;
    }

    /// Tells an image that knows its backing image by identity which one that is to be; it counts from the next
    /// [`set_backing`](Self::set_backing) on. Others need not know.
    fn expect_parent(&self, parent: Option<Identity>) {
        let _ = parent;
    }

    /// Takes a new content id now instead of at the first change, durably, where the format keeps one.
    fn renew_content_id(&self) -> Result<()> {
        Ok(())
    }

    /// Takes note that the image it is backed by is in another state now, and fits all the same. All zeros: in any
    /// state. Durable on return. Nothing to do in formats that do not tell.
    fn set_parent_state(&self, state: [u8; 16]) -> Result<()> {
        let _ = state;
        Ok(())
    }

    /// Its internal snapshots, if the format has them.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }

    /// Its dirty bitmaps, if the format has them.
    fn bitmaps(&self) -> Option<&dyn Bitmaps> {
        None
    }

    /// Returns when all that was written is durable and reachable, and recorded in dirty bitmaps.
    fn flush(&self) -> Result<()>;
}
