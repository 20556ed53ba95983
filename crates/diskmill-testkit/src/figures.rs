//! How much a randomised test has tried. `cargo xtask soak` adds these lines up.

use crate::crash::Figures;

/// Prints that `count` of `what` were tried. A test's output is shown if it fails or if it is asked for.
#[allow(clippy::print_stderr, reason = "the output of tests")]
pub fn tell(what: &str, count: u64) {
    eprintln!("figure: {what}: {count}");
}

/// Prints what was tried of power cuts.
pub fn tell_cuts(figures: &Figures) {
    tell("operations cut short", figures.steps);
    tell("power-cut states checked and compared", figures.states);
    tell("power-cut states with leaks", figures.leaking);
    tell("power-cut states written to again", figures.overwritten);
    tell("power-cut states repaired", figures.repaired);
    tell("power-cut states judged by qemu-img", figures.judged);
}
