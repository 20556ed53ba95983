//! Changing cow images in place: against a model of the disk, through power cuts and failures; damage, and its repair.

mod crash;
mod damage;
mod images;
mod model;
#[path = "../support/mod.rs"]
mod support;
