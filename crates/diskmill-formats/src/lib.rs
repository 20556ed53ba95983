//! Disk image formats, one folder a format, above any [`Storage`](diskmill_core::Storage).
//!
//! A format is a [`Driver`](diskmill_core::Driver), and [`registry`] lists them all. Nothing in this crate opens a
//! file or sees a path: an image that needs further files says so, and gets them handed.
//!
//! Every folder has the same files, as far as the format has something to put there: `mod` (the driver), `layout`
//! (on-disk structures), `header` (bytes to header and back), `map` (tables), `layer` (reading), `write` (changing in
//! place), `create` (new images), `check`.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::cast_possible_truncation,
        clippy::panic
    )
)]

mod bounds;
pub mod codec;
pub mod cow;
pub mod crypt;
mod flight;
pub mod luks;
pub mod ova;
pub mod preallocation;
pub mod probe;
pub mod qcow;
pub mod qcow2;
pub mod raw;
pub mod registry;
mod sketch;
mod slots;
mod sparse;
mod tree;
pub mod vdi;
pub mod vmdk;

pub use probe::{Foreign, ForeignKind, Probed, probe, recognise};
