//! Changing vmdk images in place: against a model of the disk, against QEMU's tools, through power cuts; damage, and
//! its repair; compacting.

mod compact;
mod crash;
mod damage;
mod images;
mod model;
mod mutated;
