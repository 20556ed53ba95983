//! Host bytes for diskmill: the bottom of every stack.
//!
//! * [`File`]: a regular file or block device, through the page cache or past it, with QEMU's [locks](lock).
//! * [`Staged`]: a new file that takes its name only when it is complete.
//! * [`Memory`]: bytes in memory, sparse.
//! * [`Window`]: a part of another storage. [`Concat`]: several as one. [`RateLimit`]: what writers are held to.
//! * [`PipeOut`] and [`PipeIn`]: what can only be written or read in order.
//!
//! Nothing here knows a disk image format.
#![deny(unsafe_code)]

mod buffer;
mod cache;
mod concat;
mod copy;
mod device;
mod error;
mod file;
pub mod lock;
mod memory;
#[allow(unsafe_code)]
mod os;
mod pipe;
mod random;
mod staged;
mod throttle;
mod window;

pub use buffer::AlignedBuf;
pub use cache::CacheMode;
pub use concat::Concat;
pub use copy::copy_range;
pub use diskmill_core::Durability;
pub use error::{CannotGrow, NoDirect, NotADisk};
pub use file::{File, FileId, FileOptions};
pub use lock::{LockByteError, LockError, LockPlan, Permissions};
pub use memory::Memory;
pub use pipe::{PipeIn, PipeOut};
pub use random::random_u32;
pub use staged::{InPlace, StageOptions, Staged};
pub use throttle::RateLimit;
pub use window::Window;
