//! What the library says of images is what the installed `qemu-img` says of them, field by field.

mod check;
mod compare;
mod gallery;
mod info;
mod map;
mod measure;
mod opening;
mod resize;
