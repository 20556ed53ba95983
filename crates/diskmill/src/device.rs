//! A disk that is read and written at the same time by several threads.

use diskmill_core::Chain;

/// A chain of images whose top one may be written.
#[derive(Debug)]
pub struct Device {
    below: Chain,
}

impl Device {
    /// The chain under the layer that is written.
    pub fn below(&self) -> &Chain {
        &self.below
    }
}
