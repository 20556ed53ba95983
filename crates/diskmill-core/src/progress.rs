//! How a long operation is watched and stopped.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, ErrorKind, Result};

/// Told how far an operation is. Calls come from any thread, in no order, and must be cheap.
pub trait Observer: Sync {
    /// The work there is, in bytes of guest disk. Called once, first.
    fn total(&self, bytes: u64);
    /// `bytes` more are done.
    fn advance(&self, bytes: u64);
    /// Something the user should know that does not stop the operation (salvage, a dirty bit).
    fn warn(&self, text: &str);
}

/// An observer that looks away.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn total(&self, _: u64) {}
    fn advance(&self, _: u64) {}
    fn warn(&self, _: &str) {}
}

/// Who watches an operation, and the flag that stops it.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// Told of progress.
    pub observer: &'a dyn Observer,
    /// Once true, the operation ends with [`ErrorKind::Cancelled`] and cleans up.
    pub cancel: &'a AtomicBool,
}

impl Job<'_> {
    /// A job nobody watches and nobody stops.
    pub fn silent() -> Job<'static> {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Job {
            observer: &Silent,
            cancel: &NEVER,
        }
    }

    /// An error of kind [`ErrorKind::Cancelled`] once somebody has asked for it.
    pub fn check(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) {
            Err(Error::bare(ErrorKind::Cancelled))
        } else {
            Ok(())
        }
    }
}
