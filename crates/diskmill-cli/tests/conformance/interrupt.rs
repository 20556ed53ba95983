//! Conversions that are killed, stopped or run out of space leave the target absent or as it was.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use diskmill_testkit::random::{seed, soak};
use diskmill_testkit::sparse_random::{SparseRandom, mix};
use diskmill_testkit::{Run, Scratch, hash, oracle};

use crate::tools::{binary, native, ours, theirs};

const SIZE: u64 = 24 << 20;

fn with_disk() -> Scratch {
    let scratch = Scratch::new();
    SparseRandom::new(8, SIZE).write_raw(scratch.join("disk.raw"));
    scratch
}

/// The targets: how to convert, and to which name.
const TARGETS: [(&str, &str); 4] = [
    ("-f raw -O qcow2", "qcow2"),
    ("-c -f raw -O qcow2", "qcow2"),
    ("-f raw -O raw", "raw"),
    ("-f raw -O qcow2 -o preallocation=metadata", "qcow2"),
];

/// Sends a signal.
pub fn signal(child: &Child, name: &str) {
    Run::new("sh")
        .args(["-c", &format!("kill -{name} {}", child.id())])
        .finish();
}

/// Stops conversions at moments a seed chooses. The old target must be there unchanged or the new one complete; an
/// absent target must stay absent or be complete. Nothing else may be left in the folder.
fn interrupted(name: &str, number: i32, may_leave_parts: bool) {
    let scratch = with_disk();
    let mut state = seed() ^ number as u64;
    let mut stopped = 0;
    let rounds = 10 * u64::from(soak());
    for round in 0..rounds * TARGETS.len() as u64 {
        let (flags, format) = TARGETS[(round % TARGETS.len() as u64) as usize];
        let old = round % 3 != 0;
        let target = scratch.join("target");
        if old {
            scratch.file("target", b"precious");
        }
        state = mix(state);
        let wait = Duration::from_micros(state % 80_000);
        // A limited rate makes sure that most are stopped half way.
        let mut child = ours(&scratch)
            .words(&format!("convert -r 100M {flags} disk.raw target"))
            .spawn();
        std::thread::sleep(wait);
        signal(&child, name);
        let status = child.wait().unwrap();
        let seen = format!(
            "{name} after {wait:?}, {flags}, seed {}, round {round}: {status}",
            seed()
        );
        if status.success() {
            assert_complete(&scratch, &target, format, &seen);
        } else {
            assert_eq!(status.signal(), Some(number), "{seen}");
            stopped += 1;
            match std::fs::read(&target) {
                Ok(bytes) if bytes == b"precious" && old => {}
                Ok(_) => assert_complete(&scratch, &target, format, &seen),
                Err(error) => {
                    assert!(
                        !old && error.kind() == std::io::ErrorKind::NotFound,
                        "{seen}: {error}"
                    );
                }
            }
        }
        let _ = std::fs::remove_file(&target);
        let names = scratch.names();
        assert!(may_leave_parts || names == ["disk.raw"], "{seen}: left {names:?}");
        for part in names.iter().filter(|name| *name != "disk.raw") {
            assert!(part.starts_with('.'), "{seen}: left {names:?}");
            std::fs::remove_file(scratch.join(part)).unwrap();
        }
    }
    assert!(stopped > 0, "no conversion was stopped half way");
}

fn assert_complete(scratch: &Scratch, target: &Path, format: &str, seen: &str) {
    assert!(
        oracle::identical(scratch.join("disk.raw"), "raw", target, format),
        "{seen}: neither the old target nor a complete new one"
    );
}

#[test]
fn convert__killed_at_random() {
    // Between making a name for the finished file and renaming it over the target a kill may leave a hidden part.
    interrupted("KILL", 9, true);
}

#[test]
fn convert__terminated_at_random() {
    interrupted("TERM", 15, false);
}

#[test]
fn convert__interrupted_at_random() {
    interrupted("INT", 2, false);
}

#[test]
fn convert__out_of_space() {
    for (flags, _) in TARGETS {
        for old in [false, true] {
            let scratch = with_disk();
            if old {
                scratch.file("target", b"precious");
            }
            // The limit on file size stands for a full disk; SIGXFSZ is ignored or handled by the command.
            let done = Run::new("sh")
                .dir(scratch.path())
                .args(["-c", "trap '' XFSZ; ulimit -f 2048; exec \"$@\"", "sh"])
                .arg(binary())
                .args(binary_words())
                .words(&format!("convert {flags} disk.raw target"))
                .finish()
                .expect(1);
            assert!(done.err().contains("File too large"), "{done}");
            assert_eq!(done.err().lines().count(), 1, "{done}");
            assert_left(&scratch, old);
        }
    }
}

/// What makes the binary behave as `qemu-img` where its name cannot be set.
pub fn binary_words() -> &'static [&'static str] {
    if std::env::var_os("DISKMILL_BIN").is_some() {
        &[]
    } else {
        &["qemu-img"]
    }
}

fn assert_left(scratch: &Scratch, old: bool) {
    if old {
        assert_eq!(std::fs::read(scratch.join("target")).unwrap(), b"precious");
        assert_eq!(scratch.names(), ["disk.raw", "target"]);
    } else {
        assert_eq!(scratch.names(), ["disk.raw"]);
    }
}

#[test]
fn convert__a_bad_source_leaves_the_target() {
    let scratch = with_disk();
    theirs(&scratch)
        .words("convert -c -f raw -O qcow2 disk.raw bad.qcow2")
        .ok();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(scratch.join("bad.qcow2"))
        .unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    // Half the streams are gone: garbage in their place makes reading fail whatever past-the-end reads as.
    let len = file.metadata().unwrap().len();
    diskmill_testkit::scratch::patch(scratch.join("bad.qcow2"), len - 100_000, &[0xff; 200_000]);
    for format in ["raw", "qcow2"] {
        scratch.file("target", b"precious");
        ours(&scratch)
            .words(&format!("convert -f qcow2 -O {format} bad.qcow2 target"))
            .finish()
            .expect(1);
        assert_eq!(std::fs::read(scratch.join("target")).unwrap(), b"precious");
        native(&scratch)
            .words(&format!("convert -f qcow2 -O {format} bad.qcow2 target"))
            .finish()
            .expect(1);
        assert_eq!(std::fs::read(scratch.join("target")).unwrap(), b"precious");
        assert_eq!(scratch.names(), ["bad.qcow2", "disk.raw", "target"]);
    }
}

#[test]
fn convert__onto_its_own_source_is_refused() {
    let scratch = with_disk();
    let before = hash::sha256_file(scratch.join("disk.raw"));
    std::fs::hard_link(scratch.join("disk.raw"), scratch.join("same.raw")).unwrap();
    std::os::unix::fs::symlink("disk.raw", scratch.join("link.raw")).unwrap();
    for target in ["disk.raw", "same.raw", "link.raw"] {
        for format in ["raw", "qcow2"] {
            ours(&scratch)
                .words(&format!("convert -f raw -O {format} disk.raw {target}"))
                .finish()
                .expect(1);
            assert_eq!(before, hash::sha256_file(scratch.join("disk.raw")), "{target}");
        }
    }
}

#[test]
fn convert__keeps_links_modes_and_names_of_the_target() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = with_disk();
    scratch.file("real", b"old");
    std::fs::set_permissions(scratch.join("real"), std::fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink("real", scratch.join("link")).unwrap();
    ours(&scratch).words("convert -f raw -O qcow2 disk.raw link").ok();
    assert!(scratch.join("link").is_symlink());
    oracle::assert_identical(scratch.join("disk.raw"), "raw", scratch.join("real"), "qcow2");
    assert_eq!(
        scratch.join("real").metadata().unwrap().permissions().mode() & 0o777,
        0o640
    );
    assert_eq!(scratch.names(), ["disk.raw", "link", "real"]);

    scratch.file("one", b"old");
    std::fs::hard_link(scratch.join("one"), scratch.join("two")).unwrap();
    ours(&scratch).words("convert -f raw -O qcow2 disk.raw one").ok();
    oracle::assert_identical(scratch.join("one"), "qcow2", scratch.join("two"), "qcow2");
}
