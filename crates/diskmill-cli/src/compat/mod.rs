//! What makes this `qemu-img`: its habits in reading a command line, its help, its words.

pub mod getopt;
pub mod help;
pub mod reason;
pub mod texts;

/// The release of `qemu-img` whose behaviour is followed.
pub const VERSION: &str = "10.0.2";
