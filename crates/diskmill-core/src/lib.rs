//! Words and contracts of diskmill.
//!
//! This crate does no I/O. It holds the vocabulary every other crate speaks and the traits they meet at:
//!
//! * [`GuestOffset`] and [`HostOffset`]: a byte in the virtual disk, a byte in a storage file. They cannot be mixed.
//! * [`Storage`] and [`StorageMut`]: host bytes, by position.
//! * [`Layer`] and [`LayerMut`]: guest bytes of one image, answering for itself alone.
//! * [`Chain`]: an overlay and all it is backed by, resolved to a flat list.
//! * [`Driver`], [`Parsed`] and [`Builder`]: a format, an image of it that has been understood, a new one being filled.
//!
//! Data flows one way: storage, then format layer, then chain, then operation, then front end.
#![forbid(unsafe_code)]

mod base64;
mod bitmaps;
mod builder;
mod chain;
mod compact;
mod driver;
mod error;
mod extent;
mod facts;
mod layer;
mod limits;
mod options;
mod progress;
mod report;
mod secret;
mod snapshots;
mod storage;
mod units;

pub use base64::{Base64Error, decode_base64};
pub use bitmaps::{BitmapError, Bitmaps, DirtyRuns, NewBitmap};
pub use builder::{
    Builder, Durability, EncodedKind, Encoder, Finish, QueuedWrite, Run, Sealer, Stored, Writes,
};
pub use chain::{Chain, Resolved};
pub use compact::{CompactReport, CompactSpec};
pub use driver::{
    Access, Compression, CreateSpec, DataRuns, Driver, Files, FilesMut, Match, Measure, OpenSpec, OutputName,
    OutputSpec, Parsed, Reference, Role, Sample,
};
pub use error::{Context, Error, ErrorKind, Result};
pub use extent::{Extent, FileIndex, HostSpan, State};
pub use facts::{BackingName, BitmapFacts, Facts, Identity, SnapshotFacts, Value};
pub use layer::{Amendment, Layer, LayerMut, Reserve};
pub use limits::Limits;
pub use options::{OptionError, OptionKind, OptionSpec, Options, parse_size};
pub use progress::{Job, Observer, Silent};
pub use report::{CheckReport, Finding, FindingKind, Repair};
pub use secret::{Ask, Secret, SecretError, Secrets};
pub use snapshots::{NewSnapshot, Snapshots, WhichSnapshot};
pub use storage::{ForwardSource, Hints, HostRun, RawFile, Storage, StorageMut, ZeroHow};
pub use units::{Format, GuestOffset, HostOffset, SECTOR};
