//! The two commands, side by side.

use std::path::PathBuf;
use std::time::Duration;

use diskmill_testkit::{Finished, Run, Scratch};

/// Other things may be running: only a hang takes this long.
const PATIENCE: Duration = Duration::from_secs(120);

/// The binary under test.
pub fn binary() -> PathBuf {
    std::env::var_os("DISKMILL_BIN").map_or_else(|| env!("CARGO_BIN_EXE_diskmill").into(), PathBuf::from)
}

/// Our command under the name `qemu-img`, in the folder of the test.
pub fn ours(scratch: &Scratch) -> Run {
    Run::new(binary())
        .named("qemu-img")
        .dir(scratch.path())
        .patience(PATIENCE)
}

/// Our command under its own name.
pub fn native(scratch: &Scratch) -> Run {
    Run::new(binary())
        .named("diskmill")
        .dir(scratch.path())
        .patience(PATIENCE)
}

/// The real `qemu-img`, in the folder of the test.
pub fn theirs(scratch: &Scratch) -> Run {
    Run::new("qemu-img")
        .named("qemu-img")
        .dir(scratch.path())
        .patience(PATIENCE)
}

/// Runs the same words with both; demands the same exit code, standard output and standard error.
pub fn same(scratch: &Scratch, words: &str) -> (Finished, Finished) {
    let our = ours(scratch).words(words).finish();
    let their = theirs(scratch).words(words).finish();
    assert!(
        our.code == their.code && our.out() == their.out() && our.err() == their.err(),
        "not the same\n--- ours\n{our}\n--- qemu-img's\n{their}"
    );
    (our, their)
}

/// Runs words that both must refuse: the same exit code and standard output, and an error in each one's own words.
pub fn refused(scratch: &Scratch, words: &str) -> Finished {
    let our = ours(scratch).words(words).finish();
    let their = theirs(scratch).words(words).finish();
    assert!(
        our.code == their.code
            && our.code != Some(0)
            && our.out() == their.out()
            && our.err().starts_with("qemu-img"),
        "not refused alike\n--- ours\n{our}\n--- qemu-img's\n{their}"
    );
    our
}

/// Runs the same words with both; demands the same exit code and, as JSON, the same standard output.
pub fn same_json(scratch: &Scratch, words: &str) -> serde_json::Value {
    let our = ours(scratch).words(words).finish();
    let their = theirs(scratch).words(words).finish();
    assert!(
        our.code == their.code,
        "not the same code\n--- ours\n{our}\n--- qemu-img's\n{their}"
    );
    let (left, right) = (our.json(), their.json());
    assert!(
        left == right,
        "not the same\n--- ours\n{our}\n--- qemu-img's\n{their}"
    );
    assert!(
        our.out() == their.out(),
        "other text\n--- ours\n{our}\n--- qemu-img's\n{their}"
    );
    left
}
