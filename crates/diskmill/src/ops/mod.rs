//! What can be done with images. Each operation is one function over plain values.

pub mod amend;
pub mod bench;
pub mod bitmap;
pub mod check;
pub mod commit;
pub mod compact;
pub mod compare;
pub mod convert;
pub mod create;
pub mod info;
pub mod map;
pub mod measure;
pub mod rebase;
pub mod resize;
mod rewrite;
pub mod snapshot;
