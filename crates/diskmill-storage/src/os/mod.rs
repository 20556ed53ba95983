//! What the operating system does beyond reading and writing at a position.
//!
//! The only module of the workspace with `unsafe` code: the few calls rustix has no safe form for. Each platform file
//! has the same functions; where a platform lacks one it answers [`Errno::NOSYS`](rustix::io::Errno::NOSYS), which
//! callers treat as "not supported, use another way".

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
pub(crate) use linux::*;

#[cfg(not(target_os = "linux"))]
mod other;
#[cfg(not(target_os = "linux"))]
pub(crate) use other::*;
