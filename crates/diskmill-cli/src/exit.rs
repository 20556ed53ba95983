//! What the shell is told.

use std::process::ExitCode;

/// An exit code. The numbers of `check` and `compare` are those of `qemu-img`; all other commands know 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit(pub u8);

impl Exit {
    /// It worked.
    pub const OK: Self = Self(0);
    /// It did not.
    pub const FAILED: Self = Self(1);
    /// `check`: the image is corrupt.
    pub const CHECK_CORRUPT: Self = Self(2);
    /// `check`: the image is sound but leaks space.
    pub const CHECK_LEAKS: Self = Self(3);
    /// `check`: the format has nothing to check.
    pub const CHECK_UNSUPPORTED: Self = Self(63);
    /// `compare`: the images differ.
    pub const COMPARE_DIFFERS: Self = Self(1);
    /// `compare`: an image did not open.
    pub const COMPARE_OPEN: Self = Self(2);
    /// `compare`: what is allocated could not be told.
    pub const COMPARE_MAP: Self = Self(3);
    /// `compare`: data could not be read.
    pub const COMPARE_READ: Self = Self(4);
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.0)
    }
}
