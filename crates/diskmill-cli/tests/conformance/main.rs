//! The command held against the real tools, both ways, cell by cell of a matrix.
//!
//! A test's name is its cell: format, feature, what is done. `DISKMILL_BIN` runs another binary instead of the one
//! just built: with `/usr/bin/qemu-img` in it, the tests test themselves.
#![allow(non_snake_case, reason = "a double underscore parts the dimensions of a cell")]

mod agree;
mod amend;
mod chains;
mod compact;
mod cow;
mod devices;
mod disk;
mod encrypted;
mod golden;
mod guest;
mod hostile;
mod interrupt;
mod locks;
mod luks;
mod machines;
mod matrix;
mod merging;
mod options;
mod ova;
mod parts;
mod qcow;
mod qcow2_encrypted;
mod readers;
mod repair;
mod resizing;
mod safety;
mod sizes;
mod snapshots;
mod tools;
mod vdi;
mod vmdk;
