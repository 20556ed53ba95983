//! Encryption shared by formats. So far: what a LUKS header says of itself.

pub mod luks;
