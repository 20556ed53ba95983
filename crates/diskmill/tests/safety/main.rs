//! Nothing is ever lost: whole operations through power cuts and failing calls.
//!
//! An operation is an [`Operation`](world::Operation): how its images are made, what it does, and whether what can be
//! read changes. That is all it takes to put one under both tests.

mod cuts;
mod failing;
mod operations;
mod rewrite;
mod world;
