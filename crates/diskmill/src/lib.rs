//! Convert, inspect, check and change disk images: the library behind the `diskmill` command.
//!
//! An image is named by a [`spec::ImageSpec`], opened under a [`policy::References`] by [`open`], and handed to one of
//! the operations in [`ops`]. Nothing here prints, exits, reads the environment or keeps global state; what a person
//! should know comes back as a value or goes to a [`Job`](diskmill_core::Job)'s observer.
#![forbid(unsafe_code)]

pub mod device;
pub mod open;
pub mod ops;
pub mod package;
pub mod policy;
pub mod spec;
mod target;
