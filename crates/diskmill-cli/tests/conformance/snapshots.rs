//! Internal snapshots: the same steps by both tools end in the same disk, and each goes on where the other stopped.

use diskmill_testkit::{Scratch, oracle};

use crate::tools::{ours, theirs};

const KINDS: [&str; 8] = [
    "compat=1.1",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=2M",
    "extended_l2=on,cluster_size=128k",
    "refcount_bits=64",
    "lazy_refcounts=on",
    "compression_type=zstd",
];

/// Two equal images with some data, the first for us and the second for the real tool.
fn pair(scratch: &Scratch, options: &str) {
    for name in ["ours.qcow2", "theirs.qcow2"] {
        let path = scratch.join(name);
        oracle::create(&path, "qcow2", options, "64M");
        oracle::io(
            &path,
            "qcow2",
            ["write -P 1 0 1M", "write -P 2 5M 100k", "write -z 8M 1M"],
        );
    }
}

fn both_snapshot(scratch: &Scratch, words: &str) {
    ours(scratch).words(&format!("snapshot {words} ours.qcow2")).ok();
    theirs(scratch)
        .words(&format!("snapshot {words} theirs.qcow2"))
        .ok();
    assert_alike(scratch);
}

fn both_write(scratch: &Scratch, command: &str) {
    for name in ["ours.qcow2", "theirs.qcow2"] {
        oracle::io(scratch.join(name), "qcow2", [command]);
    }
    assert_alike(scratch);
}

fn assert_alike(scratch: &Scratch) {
    oracle::assert_clean(scratch.join("ours.qcow2"), "qcow2");
    ours(scratch).words("check -q -f qcow2 ours.qcow2").ok();
    oracle::assert_identical(
        scratch.join("ours.qcow2"),
        "qcow2",
        scratch.join("theirs.qcow2"),
        "qcow2",
    );
}

/// Both tools read snapshot `which` of both images to the same bytes.
fn assert_same_snapshot(scratch: &Scratch, which: &str) {
    let read = |run: diskmill_testkit::process::Run, image: &str, raw: &str| {
        run.words(&format!("convert -l {which} -f qcow2 -O raw {image} {raw}"))
            .ok();
        std::fs::read(scratch.join(raw)).unwrap()
    };
    let expected = read(theirs(scratch), "theirs.qcow2", "1.raw");
    assert!(
        read(theirs(scratch), "ours.qcow2", "2.raw") == expected,
        "{which}: theirs of ours"
    );
    assert!(
        read(ours(scratch), "ours.qcow2", "3.raw") == expected,
        "{which}: ours of ours"
    );
    assert!(
        read(ours(scratch), "theirs.qcow2", "4.raw") == expected,
        "{which}: ours of theirs"
    );
}

fn life(options: &str) {
    let scratch = Scratch::new();
    pair(&scratch, options);
    both_snapshot(&scratch, "-c one");
    both_write(&scratch, "write -P 3 512k 2M");
    both_snapshot(&scratch, "-c two");
    assert_same_snapshot(&scratch, "one");
    assert_same_snapshot(&scratch, "snapshot.name=two");
    both_write(&scratch, "write -P 7 0 6M");
    both_snapshot(&scratch, "-a one");
    both_write(&scratch, "write -P 8 700k 64k");
    assert_same_snapshot(&scratch, "one");
    both_snapshot(&scratch, "-d one");
    both_write(&scratch, "discard 0 2M");
    both_snapshot(&scratch, "-a 2");
    both_snapshot(&scratch, "-d two");
    let list = ours(&scratch).words("snapshot -l ours.qcow2").ok();
    assert_eq!(list.out(), "");
}

#[test]
fn snapshot__live_as_the_real_ones_do() {
    for options in KINDS {
        life(options);
    }
}

#[test]
fn snapshot__of_another_size_brings_its_size_back() {
    let scratch = Scratch::new();
    pair(&scratch, "compat=1.1");
    both_snapshot(&scratch, "-c small");
    for (run, name) in [(ours(&scratch), "ours"), (theirs(&scratch), "theirs")] {
        run.words(&format!("resize -q {name}.qcow2 20G")).ok();
    }
    both_write(&scratch, "write -P 9 19G 64k");
    both_snapshot(&scratch, "-c large");
    both_snapshot(&scratch, "-a small");
    both_snapshot(&scratch, "-a large");
    both_snapshot(&scratch, "-d small");
}

#[test]
fn snapshot__listed_as_the_real_tool_lists_them() {
    let scratch = Scratch::new();
    pair(&scratch, "compat=1.1");
    ours(&scratch).words("snapshot -c first ours.qcow2").ok();
    theirs(&scratch).words("snapshot -c second ours.qcow2").ok();
    crate::tools::same(&scratch, "snapshot -l ours.qcow2");
    crate::tools::same(&scratch, "snapshot ours.qcow2");
    crate::tools::same_json(&scratch, "info --output=json ours.qcow2");
    crate::tools::same(&scratch, "measure -O qcow2 -l first ours.qcow2");
}

#[test]
fn snapshot__refused_changes_nothing() {
    let scratch = Scratch::new();
    pair(&scratch, "refcount_bits=1");
    let path = scratch.join("ours.qcow2");
    let before = std::fs::read(&path).unwrap();
    for words in ["-c full", "-a none", "-d none"] {
        let done = ours(&scratch)
            .words(&format!("snapshot {words} ours.qcow2"))
            .finish();
        assert_eq!(done.code, Some(1), "{words}\n{done}");
        assert!(
            std::fs::read(&path).unwrap() == before,
            "{words} changed the image"
        );
    }
}
