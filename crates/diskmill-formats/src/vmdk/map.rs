//! Grain tables: where things are is told in sectors.

use diskmill_core::{HostOffset, SECTOR};

pub use crate::tree::{Geometry, Kind, TableCache, scan, up};

/// The byte a sector starts at.
pub fn sector(sector: u64) -> HostOffset {
    HostOffset::new(sector.saturating_mul(SECTOR))
}
