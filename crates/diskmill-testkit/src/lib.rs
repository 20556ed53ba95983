//! What diskmill's tests share: the real tools as oracles, disks made from a seed, contracts, models and faults.
//!
//! Everything here fails loudly. A peer that is not installed makes a test fail, never skip, because a skipped proof
//! is no proof. Panics are the way to fail: this crate is for tests only.
#![forbid(unsafe_code)]

pub mod contract;
pub mod crash;
pub mod ext4;
pub mod fault;
pub mod figures;
pub mod golden;
pub mod hash;
pub mod host;
pub mod model;
pub mod oracle;
pub mod process;
pub mod random;
pub mod scratch;
pub mod sparse_random;
pub mod vmware;

pub use process::{Finished, Run};
pub use scratch::Scratch;
