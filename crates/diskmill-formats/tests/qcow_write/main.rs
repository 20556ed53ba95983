//! Changing qcow images in place: against a model of the disk and qemu-img, through power cuts and failures; damage,
//! and its repair.

mod crash;
mod damage;
mod images;
mod keys;
mod model;
#[path = "../support/mod.rs"]
mod support;
mod threads;
