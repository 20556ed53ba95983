//! Images that somebody holds: QEMU's processes and ours keep out of each other's way.

use std::io::{BufRead, BufReader};

use diskmill_testkit::oracle::Holder;
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, hash, oracle};

use crate::tools::{ours, same, theirs};

fn with_images() -> Scratch {
    let scratch = Scratch::new();
    SparseRandom::new(3, 1 << 20).write_raw(scratch.join("disk.raw"));
    theirs(&scratch)
        .words("convert -f raw -O qcow2 disk.raw held.qcow2")
        .ok();
    theirs(&scratch)
        .words("create -q -f qcow2 -b held.qcow2 -F qcow2 overlay.qcow2")
        .ok();
    scratch
}

/// Commands on an image, read-only ones first.
const READERS: [&str; 6] = [
    "info -f qcow2 held.qcow2",
    "check -f qcow2 held.qcow2",
    "map -f qcow2 held.qcow2",
    "compare -f qcow2 -F raw held.qcow2 disk.raw",
    "convert -f qcow2 -O raw held.qcow2 out.raw",
    "measure -f qcow2 -O qcow2 held.qcow2",
];

const WRITERS: [&str; 4] = [
    "resize -f qcow2 held.qcow2 +1M",
    "create -f qcow2 held.qcow2 1M",
    "convert -f raw -O qcow2 disk.raw held.qcow2",
    "convert -n -f raw -O qcow2 disk.raw held.qcow2",
];

/// Each command against a holder: both front ends must say the same, and the image stays as it is.
fn against(scratch: &Scratch, holder: &Holder, commands: &[&str]) {
    let before = hash::sha256_file(scratch.join("held.qcow2"));
    for words in commands {
        same(scratch, words);
        let _ = std::fs::remove_file(scratch.join("out.raw"));
        assert_eq!(before, hash::sha256_file(scratch.join("held.qcow2")), "{words}");
    }
    assert!(holder.memory().is_some(), "the holder is alive");
}

#[test]
fn lock__qemu_io_writes() {
    let scratch = with_images();
    let holder = Holder::qemu_io(scratch.join("held.qcow2"), "qcow2", &[]);
    against(&scratch, &holder, &READERS);
    against(&scratch, &holder, &WRITERS);
    let done = ours(&scratch).words(READERS[0]).finish().expect(1);
    assert!(
        done.err().contains("Failed to get shared \"write\" lock"),
        "{done}"
    );
    assert!(
        done.err()
            .contains("Is another process using the image [held.qcow2]?"),
        "{done}"
    );
    same(&scratch, "compare -f raw -F qcow2 disk.raw held.qcow2");
}

#[test]
fn lock__qemu_io_reads() {
    let scratch = with_images();
    let holder = Holder::qemu_io(scratch.join("held.qcow2"), "qcow2", &["-r"]);
    for words in READERS {
        ours(&scratch).words(words).ok();
    }
    against(&scratch, &holder, &WRITERS);
    let done = ours(&scratch).words(WRITERS[0]).finish().expect(1);
    assert!(done.err().contains("Failed to get \"write\" lock"), "{done}");
}

#[test]
fn lock__qemu_nbd_serves() {
    let scratch = with_images();
    let holder = Holder::qemu_nbd(scratch.join("held.qcow2"), "qcow2", &[]);
    against(&scratch, &holder, &READERS);
    against(&scratch, &holder, &WRITERS);
    drop(holder);
    let holder = Holder::qemu_nbd(scratch.join("held.qcow2"), "qcow2", &["-r"]);
    for words in READERS {
        ours(&scratch).words(words).ok();
    }
    against(&scratch, &holder, &WRITERS);
}

#[test]
fn lock__forced_share_reads_what_is_held() {
    let scratch = with_images();
    let _holder = Holder::qemu_io(scratch.join("held.qcow2"), "qcow2", &[]);
    for words in [
        "info -U -f qcow2 held.qcow2",
        "check -U -f qcow2 held.qcow2",
        "map -U -f qcow2 held.qcow2",
        "compare -U -f qcow2 -F raw held.qcow2 disk.raw",
        "measure -U -f qcow2 -O qcow2 held.qcow2",
    ] {
        same(&scratch, words);
    }
    ours(&scratch)
        .words("convert -U -f qcow2 -O raw held.qcow2 out.raw")
        .ok();
    assert_eq!(
        hash::sha256_file(scratch.join("out.raw")),
        hash::sha256_file(scratch.join("disk.raw"))
    );
}

#[test]
fn lock__a_held_base_holds_the_chain() {
    let scratch = with_images();
    let _holder = Holder::qemu_io(scratch.join("held.qcow2"), "qcow2", &[]);
    for words in [
        "info -f qcow2 overlay.qcow2",
        "info --backing-chain -f qcow2 overlay.qcow2",
        "map -f qcow2 overlay.qcow2",
        "check -f qcow2 overlay.qcow2",
        "convert -f qcow2 -O raw overlay.qcow2 out.raw",
        "compare -f qcow2 -F raw overlay.qcow2 disk.raw",
    ] {
        same(&scratch, words);
        let _ = std::fs::remove_file(scratch.join("out.raw"));
    }
    ours(&scratch)
        .words("create -f qcow2 -b held.qcow2 -F qcow2 second.qcow2")
        .ok();
}

#[test]
fn lock__a_held_overlay_holds_the_base_from_writers() {
    let scratch = with_images();
    let _holder = Holder::qemu_io(scratch.join("overlay.qcow2"), "qcow2", &[]);
    for words in WRITERS {
        same(&scratch, words);
    }
    ours(&scratch).words(READERS[0]).ok();
    oracle::assert_clean(scratch.join("held.qcow2"), "qcow2");
}

#[test]
fn lock__raw_images() {
    let scratch = with_images();
    let before = hash::sha256_file(scratch.join("disk.raw"));
    let _holder = Holder::qemu_nbd(scratch.join("disk.raw"), "raw", &[]);
    for words in [
        "convert -f qcow2 -O raw held.qcow2 disk.raw",
        "convert -n -f qcow2 -O raw held.qcow2 disk.raw",
        "resize -f raw disk.raw 2M",
        "create -f raw disk.raw 3M",
        "convert -f raw -O qcow2 disk.raw out.qcow2",
    ] {
        let done = ours(&scratch).words(words).finish().expect(1);
        assert!(done.err().contains("lock"), "{done}");
        assert_eq!(before, hash::sha256_file(scratch.join("disk.raw")), "{words}");
        let _ = std::fs::remove_file(scratch.join("out.qcow2"));
    }
}

/// A conversion of ours at a slow rate holds its source and its target.
#[test]
fn lock__our_conversion_keeps_qemu_out() {
    let scratch = with_images();
    oracle::io(scratch.join("held.qcow2"), "qcow2", ["write -P 7 0 1M"]);
    theirs(&scratch).words("create -q -f qcow2 target.qcow2 1M").ok();
    theirs(&scratch).words("create -q -f raw target.raw 1M").ok();
    for format in ["qcow2", "raw"] {
        let name = format!("target.{format}");
        let mut slow = ours(&scratch)
            .words(&format!(
                "convert -p -n -r 2k -f qcow2 -O {format} held.qcow2 {name}"
            ))
            .spawn();
        // Once progress is shown a second time, something was written: everything is open.
        let stdout = slow.stdout.as_mut().expect("a pipe");
        for _ in 0..2 {
            BufReader::with_capacity(1, &mut *stdout)
                .read_until(b'(', &mut Vec::new())
                .expect("progress");
        }
        for words in [
            format!("resize -f {format} {name} +1M"),
            "resize -f qcow2 held.qcow2 +1M".to_owned(),
            format!("convert -n -f raw -O {format} disk.raw {name}"),
        ] {
            // For raw QEMU itself would let a second writer in: ours keeps QEMU's and our own out.
            for other in [ours(&scratch), theirs(&scratch)] {
                let done = other.words(&words).finish();
                let ended = slow.try_wait().expect("the conversion");
                assert!(
                    ended.is_none(),
                    "the conversion ended too soon to tell: {ended:?}\n{done}"
                );
                assert!(done.code == Some(1) && done.err().contains("lock"), "{done}");
            }
        }
        slow.kill().expect("kill the conversion");
        slow.wait().expect("wait for the conversion");
        theirs(&scratch).words(&format!("info -f {format} {name}")).ok();
    }
}
