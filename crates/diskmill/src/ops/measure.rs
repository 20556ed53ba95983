//! How much space an image would take.

use diskmill_core::{CreateSpec, Driver, Measure, Result};

use crate::open::Image;

/// What is to be measured.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// An empty disk of this many bytes.
    Size(u64),
    /// A disk with data.
    Image(&'a Image),
}

/// The space a new image in the format of `driver` would take for `source`. `spec` carries the format's options; its
/// virtual size is set from the source.
pub fn run(driver: &dyn Driver, spec: &CreateSpec, source: Source<'_>) -> Result<Measure> {
    let size = match source {
        Source::Size(bytes) => bytes,
        Source::Image(image) => image.chain.virtual_size(),
    };
    let mut spec = spec.clone();
    spec.virtual_size = size;
    driver.measure(&spec, None)
}
