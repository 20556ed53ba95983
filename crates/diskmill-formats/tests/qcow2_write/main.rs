//! Writing qcow2 images in place: against a model of the disk, against QEMU's tools, through power cuts and failures.

mod amend;
mod backing;
mod bitmaps;
mod compact;
mod crash;
mod encryption;
mod hostile;
mod images;
mod model;
mod refuse;
mod subject;
mod threads;
