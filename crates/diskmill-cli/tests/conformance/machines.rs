//! Snapshots with the state of a machine: made by QEMU itself, kept through everything, and loaded by it again.

use diskmill_testkit::{Finished, Run, Scratch, oracle};

use crate::tools::{native, ours, same, same_json, theirs};

const IMAGE: &str = "machine.qcow2";

/// Lets a stopped machine with a disk do what the words on its monitor say.
fn machine(scratch: &Scratch, image: &str, monitor: &str) -> Finished {
    let done = Run::new("qemu-system-x86_64")
        .dir(scratch.path())
        .words("-accel tcg -M pc -m 8 -nodefaults -display none -S -monitor stdio -drive")
        .arg(format!("file={image},if=ide,format=qcow2"))
        .input(format!("{monitor}\nquit\n"))
        .ok();
    assert!(!done.out().contains("Error"), "{done}");
    done
}

/// An image with the states of a machine `one` and `three`, and the plain snapshot `two`; each of another size.
fn make(scratch: &Scratch, options: &str) {
    let path = scratch.join(IMAGE);
    oracle::create(&path, "qcow2", options, "16M");
    oracle::io(
        &path,
        "qcow2",
        ["write -P 1 0 3M", "write -z 10M 1M", "write -c 12M 128k"],
    );
    machine(scratch, IMAGE, "savevm one");
    oracle::io(&path, "qcow2", ["write -P 2 1M 3M", "write -P 9 14M 1M"]);
    theirs(scratch).words(&format!("snapshot -c two {IMAGE}")).ok();
    if !options.contains("0.10") {
        theirs(scratch).words(&format!("resize -q {IMAGE} 40M")).ok();
        oracle::io(&path, "qcow2", ["write -P 7 30M 1M"]);
    }
    oracle::io(&path, "qcow2", ["discard 0 1M", "write -c 15M 128k"]);
    machine(scratch, IMAGE, "savevm three");
    oracle::io(&path, "qcow2", ["write -P 8 13M 1M"]);
}

/// QEMU takes up both machines of a copy of the image. What it leaves of the copy may leak: its own images do then.
fn assert_loads(scratch: &Scratch, image: &str) {
    std::fs::copy(scratch.join(image), scratch.join("loaded.qcow2")).unwrap();
    machine(scratch, "loaded.qcow2", "loadvm one\nloadvm three\nloadvm one");
    let (report, code) = oracle::check(scratch.join("loaded.qcow2"), "qcow2");
    assert!(matches!(code, 0 | 3), "{report}");
}

fn list(scratch: &Scratch, image: &str) -> String {
    theirs(scratch).words(&format!("snapshot -l {image}")).ok().out()
}

/// What a snapshot's disk reads as, as we read it: at the size it had.
fn disk(scratch: &Scratch, image: &str, which: &str) -> Vec<u8> {
    ours(scratch)
        .words(&format!("convert {which} -f qcow2 -O raw {image} flat.raw"))
        .ok();
    std::fs::read(scratch.join("flat.raw")).unwrap()
}

fn states(scratch: &Scratch, image: &str) -> Vec<Vec<u8>> {
    ["-l one", "-l two", "-l three", ""]
        .map(|which| disk(scratch, image, which))
        .into()
}

fn assert_clean(scratch: &Scratch, image: &str) {
    oracle::assert_clean(scratch.join(image), "qcow2");
    ours(scratch).words(&format!("check -q -f qcow2 {image}")).ok();
}

#[test]
fn machine__kept_beside_other_snapshots() {
    for options in [
        "compat=1.1",
        "cluster_size=4k",
        "compat=0.10",
        "extended_l2=on,cluster_size=128k",
    ] {
        let scratch = Scratch::new();
        make(&scratch, options);
        same(&scratch, &format!("snapshot -l {IMAGE}"));
        same_json(&scratch, &format!("info --output=json {IMAGE}"));
        let before = states(&scratch, IMAGE);
        // Each tool goes on where the other stopped.
        for (run, words) in [
            (ours(&scratch), "snapshot -c four"),
            (ours(&scratch), "snapshot -a one"),
            (theirs(&scratch), "snapshot -d two"),
            (ours(&scratch), "snapshot -a 3"),
            (ours(&scratch), "snapshot -d four"),
        ] {
            run.words(&format!("{words} {IMAGE}")).ok();
            assert_clean(&scratch, IMAGE);
            assert_loads(&scratch, IMAGE);
        }
        assert!(disk(&scratch, IMAGE, "-l one") == before[0], "{options}");
        assert!(disk(&scratch, IMAGE, "-l three") == before[2], "{options}");
        assert!(
            disk(&scratch, IMAGE, "") == before[2],
            "{options}: the machine has loaded it last"
        );
    }
}

#[test]
fn machine__kept_by_amend() {
    let scratch = Scratch::new();
    make(&scratch, "compat=1.1");
    let (before, known) = (states(&scratch, IMAGE), list(&scratch, IMAGE));
    for wish in [
        "refcount_bits=8",
        "lazy_refcounts=on",
        "refcount_bits=64",
        "size=60M",
        "size=40M,refcount_bits=16",
    ] {
        ours(&scratch).words(&format!("amend -o {wish} {IMAGE}")).ok();
        assert_clean(&scratch, IMAGE);
    }
    assert_eq!(list(&scratch, IMAGE), known);
    assert!(states(&scratch, IMAGE) == before);
    assert_loads(&scratch, IMAGE);
}

#[test]
fn machine__carried_into_a_new_image() {
    for (from, to) in [
        ("compat=1.1", "-o compat=1.1"),
        ("compat=1.1", "-c"),
        ("cluster_size=4k", "-o cluster_size=64k"),
        ("compat=1.1", "-c -o cluster_size=4k,compression_type=zstd"),
        ("compat=0.10", "-o compat=0.10"),
        ("compat=0.10", "-S 0 -o extended_l2=on,cluster_size=32k"),
        (
            "extended_l2=on,cluster_size=128k",
            "-o cluster_size=512,refcount_bits=4",
        ),
        ("compat=1.1", "-o cluster_size=2M,lazy_refcounts=on"),
    ] {
        let scratch = Scratch::new();
        make(&scratch, from);
        let done = native(&scratch)
            .words(&format!(
                "convert -q --keep-snapshots -O qcow2 {to} {IMAGE} copy.qcow2"
            ))
            .ok();
        assert_eq!((done.out(), done.err()), (String::new(), String::new()));
        assert_clean(&scratch, "copy.qcow2");
        assert_eq!(
            list(&scratch, "copy.qcow2"),
            list(&scratch, IMAGE),
            "{from}, {to}"
        );
        let snapshots = |image: &str| {
            let info = theirs(&scratch)
                .words(&format!("info --output=json {image}"))
                .ok()
                .json();
            info["snapshots"].clone()
        };
        assert_eq!(snapshots("copy.qcow2"), snapshots(IMAGE), "{from}, {to}");
        assert!(
            states(&scratch, "copy.qcow2") == states(&scratch, IMAGE),
            "{from}, {to}"
        );
        // QEMU reads a snapshot at the size the disk has now.
        oracle::assert_identical(scratch.join("copy.qcow2"), "qcow2", scratch.join(IMAGE), "qcow2");
        if from == "compat=1.1" && to == "-o compat=1.1" {
            let len = |image: &str| std::fs::metadata(scratch.join(image)).unwrap().len();
            assert!(
                len("copy.qcow2") <= len(IMAGE),
                "what states share is stored once"
            );
        }
        assert_loads(&scratch, "copy.qcow2");
    }
}

#[test]
fn machine__carried_over_a_backing_image() {
    let scratch = Scratch::new();
    scratch.file("base.raw", &[5; 3 << 20]);
    theirs(&scratch)
        .words("create -q -f qcow2 -b base.raw -F raw machine.qcow2 4M")
        .ok();
    let path = scratch.join(IMAGE);
    oracle::io(&path, "qcow2", ["write -P 1 100k 1M", "write -z 2M 300k"]);
    theirs(&scratch).words("snapshot -c one machine.qcow2").ok();
    oracle::io(
        &path,
        "qcow2",
        ["write -z 0 200k", "write -P 5 2M 300k", "discard 1M 100k"],
    );
    native(&scratch)
        .words("convert --keep-snapshots -O qcow2 machine.qcow2 copy.qcow2")
        .ok();
    assert_clean(&scratch, "copy.qcow2");
    for which in ["-l one", ""] {
        let [first, second] = [IMAGE, "copy.qcow2"].map(|image| {
            theirs(&scratch)
                .words(&format!("convert {which} -O raw {image} flat.raw"))
                .ok();
            std::fs::read(scratch.join("flat.raw")).unwrap()
        });
        assert!(first == second, "{which}");
    }
}

#[test]
fn machine__not_carried_is_said() {
    let scratch = Scratch::new();
    make(&scratch, "compat=1.1");
    let said = |words: &str| {
        native(&scratch)
            .words(&format!("{words} {IMAGE} copy"))
            .ok()
            .err()
    };
    let warning = said("convert -O qcow2");
    assert!(
        warning.contains("3 snapshots") && warning.contains("--keep-snapshots"),
        "{warning}"
    );
    assert_eq!(said("convert -q -O qcow2"), "");
    assert_eq!(said("convert -l one -O qcow2"), "");
    same(&scratch, &format!("convert -O qcow2 {IMAGE} copy"));
    for words in [
        "convert --keep-snapshots -O raw",
        "convert --keep-snapshots -O qcow2 -o data_file=copy.data",
        "convert --keep-snapshots -O qcow2 -l one",
        "convert --keep-snapshots -O qcow2 -n",
        "convert --keep-snapshots -O qcow2 -o compat=0.10",
        "convert --keep-snapshots -O qcow2 -o refcount_bits=1",
        "convert --keep-snapshots -O qcow2 machine.qcow2",
    ] {
        std::fs::remove_file(scratch.join("copy")).ok();
        let done = native(&scratch).words(&format!("{words} {IMAGE} copy")).finish();
        assert_eq!(done.code, Some(1), "{words}\n{done}");
        assert!(!scratch.join("copy").exists(), "{words} left something behind");
    }
    // The real tool has no such option.
    let done = ours(&scratch)
        .words(&format!("convert --keep-snapshots -O qcow2 {IMAGE} copy"))
        .finish();
    assert_eq!(done.code, Some(1), "{done}");
    assert!(done.err().contains("unrecognized option"), "{done}");
}
