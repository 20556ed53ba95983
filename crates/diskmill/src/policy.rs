//! Which files an image may name.
//!
//! An image is hostile text that names other files: a backing image, a data file. Whether such a name is followed is
//! one value, made by the front end and asked only by [`open`](crate::open).

use std::path::PathBuf;

/// What is done with a file name found inside an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum References {
    /// Followed wherever it leads: plain paths, `file:` names and `json:` trees of file and format drivers. Regular
    /// files and block devices only, as everywhere. What `qemu-img` does, less the protocols.
    #[default]
    Any,
    /// Plain paths are followed inside the directory tree of the image the user named and inside `allow`.
    Beneath {
        /// More directories whose trees may be used.
        allow: Vec<PathBuf>,
    },
    /// Nothing is followed but plain paths inside `allow`, without symbolic links; what has no backing format is
    /// never probed.
    None {
        /// Directories whose trees may be used.
        allow: Vec<PathBuf>,
    },
}
