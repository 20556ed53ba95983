//! Images made to do harm.
//!
//! Valid images have fields patched, one a case, and are given to every command that opens images, under both
//! names. Whatever the case: no signal, no panic, no hang, no memory without bound, and nothing but the command's own
//! output is touched. Where the image must be refused, the message names the file and the field.

mod cases;
mod image;
mod names;
mod qcow;
mod random;
mod vmdk;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use diskmill_testkit::{Finished, Run, Scratch, hash};

use crate::tools::binary;

/// No command may take longer on any of these images.
const PATIENCE: Duration = Duration::from_secs(60);

/// No command may need more memory, in bytes, whatever an image says.
const MEMORY: u64 = 512 << 20;

/// What must become of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Every command refuses to open it; the message has these words.
    Refused(&'static [&'static str]),
    /// The same, but `check` may look at it and objects.
    RefusedButChecked(&'static [&'static str]),
    /// Every command that needs its data refuses to open it; `info` and `check` may look at it.
    DataRefused(&'static [&'static str]),
    /// What reads data is refused for want of a key, with these words; what reads tables may work.
    Locked(&'static [&'static str]),
    /// It opens, but reading its data fails or `check` objects; neither is demanded of a certain command.
    Damaged,
    /// It is odd, but good.
    Opens,
}

/// The commands, by what they are given: `IN` is the image, `OUT` a free name.
const COMMANDS: [&str; 7] = [
    "info -f FORMAT IN",
    "info --backing-chain --output=json -f FORMAT IN",
    "check -f FORMAT IN",
    "map -f FORMAT --output=json IN",
    "convert -f FORMAT -O raw IN OUT",
    "compare -f FORMAT -F raw IN other.raw",
    "resize -f FORMAT IN +64k",
];

/// Runs every command on the image `name` in `scratch`, which holds whatever else the case needs. Returns what they
/// said. The image is put back after each.
pub fn run_all(scratch: &Scratch, name: &str, format: &str) -> Vec<(String, Finished)> {
    let before = digests(scratch.path());
    let keep = Scratch::new();
    // What a command that writes may change: the image, and the data file it names, if it does.
    let may_change: Vec<&str> = [name, "ext.data", "other.raw"]
        .into_iter()
        .filter(|file| scratch.join(file).is_file())
        .collect();
    for file in may_change.iter().filter(|file| !file.starts_with('/')) {
        copy_sparse(&scratch.join(file), &keep.join(file));
    }
    let mut all = Vec::new();
    for front in [&["qemu-img"][..], &[][..]] {
        for command in COMMANDS {
            let words = command
                .replace("FORMAT", format)
                .replace("IN", name)
                .replace("OUT", "out");
            let done = run(scratch, front, &words);
            let _ = std::fs::remove_file(scratch.join("out"));
            if command.starts_with("resize") {
                for file in may_change.iter().filter(|file| !file.starts_with('/')) {
                    copy_sparse(&keep.join(file), &scratch.join(file));
                }
            }
            assert_eq!(before, digests(scratch.path()), "something was touched\n{done}");
            all.push((words, done));
        }
    }
    all
}

/// Runs one command under watch.
pub fn run(scratch: &Scratch, front: &[&str], words: &str) -> Finished {
    let done = Run::new(binary())
        .args(front)
        .words(words)
        .dir(scratch.path())
        .patience(PATIENCE)
        .limit("--as=4294967296")
        .watch_memory()
        .finish();
    assert!(!done.timed_out, "it hangs\n{done}");
    assert_eq!(done.signal, None, "it died\n{done}");
    assert_ne!(done.code, Some(101), "it panicked\n{done}");
    assert!(!done.err().contains("panicked at"), "it panicked\n{done}");
    assert!(
        done.peak_memory.unwrap_or(0) < MEMORY,
        "{:?} bytes\n{done}",
        done.peak_memory
    );
    assert!(
        done.code == Some(0) || !done.err().trim().is_empty() || done.code == Some(1),
        "{done}"
    );
    assert!(
        !done.err().contains('\x1b'),
        "an escape reached the terminal\n{done}"
    );
    done
}

/// Demands the fate of the image `name`.
pub fn assert_fate(scratch: &Scratch, name: &str, format: &str, fate: Fate) {
    let all = run_all(scratch, name, format);
    for (words, done) in &all {
        match fate {
            Fate::RefusedButChecked(_) if words.starts_with("check") => {
                assert_ne!(done.code, Some(0), "{done}")
            }
            Fate::DataRefused(_) if words.starts_with("check") || words.starts_with("info") => {}
            Fate::Locked(_) if !words.starts_with("convert") && !words.starts_with("compare") => {}
            Fate::Refused(says)
            | Fate::RefusedButChecked(says)
            | Fate::DataRefused(says)
            | Fate::Locked(says) => {
                assert_refused(name, words, done, says);
            }
            Fate::Damaged => {}
            Fate::Opens => {
                let good = match done.code {
                    Some(0) => true,
                    Some(1) => words.starts_with("compare"),
                    // `qemu-img` has no check of the format.
                    Some(63) => words.starts_with("check"),
                    _ => false,
                };
                assert!(good, "refused\n{done}");
            }
        }
    }
    if fate == Fate::Damaged {
        let objects = all.iter().any(|(_, done)| done.code != Some(0));
        assert!(objects, "nothing objects to this image");
    }
}

fn assert_refused(name: &str, words: &str, done: &Finished, says: &[&str]) {
    let code = if words.starts_with("compare") { 2 } else { 1 };
    assert_eq!(done.code, Some(code), "not refused\n{done}");
    assert!(done.err().contains(name), "does not name the file\n{done}");
    let native = !done.to_string().contains(" qemu-img ");
    for word in says.iter().filter(|_| native) {
        assert!(done.err().contains(word), "does not say '{word}'\n{done}");
    }
}

fn copy_sparse(from: &Path, to: &Path) {
    Run::new("cp")
        .args(["--sparse=always", "--reflink=auto"])
        .arg(from)
        .arg(to)
        .ok();
}

fn digests(dir: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(dir).expect("list the folder") {
        let entry = entry.expect("an entry");
        let small = entry
            .metadata()
            .is_ok_and(|meta| meta.is_file() && meta.len() < 64 << 20);
        let digest = if small {
            hash::sha256_file(entry.path())
        } else {
            String::new()
        };
        all.insert(entry.file_name().to_string_lossy().into_owned(), digest);
    }
    all
}
