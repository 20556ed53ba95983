//! What an image says of itself.

use crate::{FileIndex, Format};

/// A value of a format's own, in the order it is shown.
///
/// Front ends print a tree of these without knowing the format: `Map` keys are written as in JSON, with dashes, and
/// read with spaces by people.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Value {
    /// Yes or no.
    Bool(bool),
    /// A number.
    Int(u64),
    /// Text.
    Text(String),
    /// The name of one of the image's own files, which only who opened it knows.
    File(FileIndex),
    /// Several values.
    List(Vec<Value>),
    /// Named values.
    Map(Vec<(&'static str, Value)>),
}

/// The name of a backing image, as an image writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// The name, in the bytes of the file.
    pub name: String,
    /// The format it is said to have.
    pub format: Option<String>,
}

/// What an image lists of an internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotFacts {
    /// Its identifier, unique in the image.
    pub id: String,
    /// Its name, for people.
    pub name: String,
    /// Bytes of machine state kept with it.
    pub vm_state_size: u64,
    /// When it was made: seconds since 1970.
    pub date_sec: u64,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// How long the machine had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instructions executed, where that was counted.
    pub icount: Option<u64>,
    /// The size of the disk when it was made, in bytes.
    pub disk_size: u64,
}

/// What an image lists of a dirty bitmap it keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapFacts {
    /// Its name.
    pub name: String,
    /// The guest bytes a bit stands for.
    pub granularity: u64,
    /// Whether changes are recorded in it.
    pub enabled: bool,
    /// It was not closed properly and may lack changes: it can only be removed.
    pub inconsistent: bool,
}

/// Which image it is, and in which state: for formats that link images by identity instead of by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The image: kept for good.
    pub image: [u8; 16],
    /// Its content: another whenever that has changed. All zeros where nobody knows.
    pub state: [u8; 16],
}

/// What an image says of itself when it is opened. Nothing in it changes afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Facts {
    /// Its format.
    pub format: Format,
    /// The size of the virtual disk when it was opened, in bytes.
    pub virtual_size: u64,
    /// The step in which it allocates (cluster, grain, block), if it has one.
    pub unit: Option<u64>,
    /// The step in which it tells what it holds from what it leaves to the layer below, if that is less than `unit`.
    pub granule: Option<u64>,
    /// Whether guest data is encrypted.
    pub encrypted: bool,
    /// Whether all data is stored compressed (`None`: not known without looking).
    pub compressed: Option<bool>,
    /// Whether it was not closed properly.
    pub dirty: bool,
    /// Whether it marks itself as corrupt: then it may be read but not written.
    pub corrupt: bool,
    /// What it is backed by.
    pub backing: Option<BackingName>,
    /// Its internal snapshots.
    pub snapshots: Vec<SnapshotFacts>,
    /// The dirty bitmaps it keeps, or `None` where its format, or version of it, has none.
    pub bitmaps: Option<Vec<BitmapFacts>>,
    /// What only its format has: `format-specific` in the JSON of `info`.
    pub specific: Option<Value>,
    /// What `qemu-img` does not show of it, for front ends that do: a `Map`.
    pub details: Option<Value>,
    /// A number that changes when the disk's content does, where the format keeps one.
    pub content_id: Option<u32>,
    /// The number its backing image must have, if the image says.
    pub backing_content_id: Option<u32>,
    /// Which image it is, if its format says so.
    pub identity: Option<Identity>,
    /// The image it is backed by, where that is known by its identity only.
    pub parent: Option<Identity>,
}

impl Facts {
    /// Facts of an image with nothing special about it.
    pub fn new(format: Format, virtual_size: u64) -> Self {
        Self {
            format,
            virtual_size,
            unit: None,
            granule: None,
            encrypted: false,
            compressed: None,
            dirty: false,
            corrupt: false,
            backing: None,
            snapshots: Vec::new(),
            bitmaps: None,
            specific: None,
            details: None,
            content_id: None,
            backing_content_id: None,
            identity: None,
            parent: None,
        }
    }
}
