//! Signals: stop cleanly, then die the way the sender expects.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGPIPE, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::{flag, low_level};

/// What signals have asked for.
#[derive(Clone, Debug, Default)]
pub struct Signals {
    cancel: Arc<AtomicBool>,
    which: Arc<AtomicUsize>,
    report: Arc<AtomicBool>,
}

impl Signals {
    /// From here on INT, TERM and HUP set a flag instead of killing, but a second one kills at once; USR1 asks for a
    /// line of progress.
    pub fn watch() -> io::Result<Self> {
        let signals = Self::default();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // Order matters: the first signal finds the flag clear here and sets it below.
            flag::register_conditional_default(signal, Arc::clone(&signals.cancel))?;
            flag::register(signal, Arc::clone(&signals.cancel))?;
            let number = usize::try_from(signal).unwrap_or_default();
            flag::register_usize(signal, Arc::clone(&signals.which), number)?;
        }
        flag::register(SIGUSR1, Arc::clone(&signals.report))?;
        Ok(signals)
    }

    /// Set once the operation should stop.
    pub fn cancel(&self) -> &AtomicBool {
        &self.cancel
    }

    /// Whether a line of progress has been asked for since the last call.
    pub fn take_report(&self) -> bool {
        self.report.load(Ordering::Relaxed) && self.report.swap(false, Ordering::Relaxed)
    }

    /// If a signal stopped the operation: dies by it, now that all is cleaned up.
    pub fn die(&self) {
        let signal = self.which.load(Ordering::Relaxed);
        if let (true, Ok(signal)) = (signal != 0, i32::try_from(signal)) {
            // Returns only if the signal has no default action that ends us; then the exit code has to tell.
            let _ = low_level::emulate_default_handler(signal);
        }
    }
}

/// From here on a write past the limit on the size of files (`ulimit -f`) is an error like any other, with a message,
/// instead of a signal that kills.
pub fn outlive_size_limit() -> io::Result<()> {
    flag::register(SIGXFSZ, Arc::default())?;
    Ok(())
}

/// Dies as a program does whose reader has gone.
pub fn die_of_pipe() {
    let _ = low_level::emulate_default_handler(SIGPIPE);
}

impl Signals {
    /// If `result` is that somebody asked us to stop: dies by the signal, now that all is cleaned up.
    pub fn die_if_cancelled<T>(&self, result: &diskmill_core::Result<T>) {
        if matches!(result, Err(error) if error.kind() == diskmill_core::ErrorKind::Cancelled) {
            self.die();
        }
    }
}
