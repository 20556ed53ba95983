//! Commands that are killed at any moment.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use diskmill_testkit::figures::tell;
use diskmill_testkit::random::{seed, soak};
use diskmill_testkit::sparse_random::mix;

use super::{Case, Leaves, VICTIMS, copy};
use crate::interrupt::signal;

/// Kills each command some times with signal `name`.
fn killed(name: &str, number: i32) {
    let mut state = seed() ^ number as u64;
    let (mut runs, mut stopped, mut mended) = (0, 0, 0);
    for victim in VICTIMS {
        let case = Case::new(victim);
        let whole = case.whole;
        for round in 0..2 * soak() {
            let work = copy(&case.before);
            if round % 2 == 1 && matches!(victim.leaves, Leaves::New(_)) {
                work.file("new", b"precious");
            }
            state = mix(state);
            let wait = Duration::from_micros(state % (whole.as_micros() as u64 + 1));
            let child = victim.command(&work).spawn();
            std::thread::sleep(wait);
            signal(&child, name);
            // Read what it prints: with a full pipe it would never end.
            let status = child.wait_with_output().expect("wait").status;
            let seen = format!(
                "{}, SIG{name} after {wait:?} of {whole:?}, DISKMILL_SEED={}, round {round}: {status}",
                victim.name,
                seed()
            );
            assert!(status.success() || status.signal() == Some(number), "{seen}");
            runs += 1;
            stopped += u64::from(!status.success());
            mended += u64::from(case.judge(&work, &seen));
        }
    }
    tell("commands sent a signal", runs);
    tell("commands stopped half way", stopped);
    tell("images repaired after a signal", mended);
    assert!(stopped > 0, "no command was stopped half way");
}

#[test]
fn every_command__killed_at_random() {
    killed("KILL", 9);
}

#[test]
fn every_command__terminated_at_random() {
    killed("TERM", 15);
}

#[test]
fn every_command__interrupted_at_random() {
    killed("INT", 2);
}
