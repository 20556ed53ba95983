//! What every implementation of a trait must do, as functions that its tests call.

pub mod builder;
pub mod layer;
pub mod storage;
