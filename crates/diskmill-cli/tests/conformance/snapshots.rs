//! Internal snapshots: the same steps by both tools end in the same disk, and each goes on where the other stopped.

use diskmill_testkit::{Scratch, oracle};

use crate::tools::{native, ours, theirs};

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
    for options in &KINDS[..4] {
        life(options);
    }
}

#[test]
fn snapshot__live_as_the_real_ones_do_2() {
    for options in &KINDS[4..] {
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
fn snapshot__read_at_the_size_of_now() {
    let scratch = Scratch::new();
    scratch.file("base.raw", &[7; 4 << 20]);
    for options in ["cluster_size=512", "cluster_size=64k -b base.raw -F raw"] {
        theirs(&scratch)
            .words(&format!("create -q -f qcow2 -o {options} image.qcow2 1M"))
            .ok();
        oracle::io(scratch.join("image.qcow2"), "qcow2", ["write -P 9 0 1000k"]);
        theirs(&scratch).words("snapshot -c one image.qcow2").ok();
        for size in ["300k", "3M"] {
            theirs(&scratch)
                .words(&format!("resize -q --shrink image.qcow2 {size}"))
                .ok();
            crate::tools::same(&scratch, "measure -O qcow2 -l one image.qcow2");
            let flat = [ours(&scratch), theirs(&scratch), native(&scratch)].map(|run| {
                run.words("convert -l one -O raw image.qcow2 flat.raw").ok();
                std::fs::read(scratch.join("flat.raw")).unwrap()
            });
            assert!(flat[0] == flat[1], "{options} {size}");
            // Under our own name a snapshot keeps its size, and so loses nothing.
            assert_eq!(flat[2].len(), 1 << 20);
            assert!(
                flat[2][..1000 << 10].iter().all(|byte| *byte == 9),
                "{options} {size}"
            );
        }
    }
}

#[test]
fn snapshot__deleted_by_name_where_names_are_ids() {
    let scratch = Scratch::new();
    for (run, image) in [(ours(&scratch), "ours.qcow2"), (theirs(&scratch), "theirs.qcow2")] {
        theirs(&scratch)
            .words(&format!("create -q -f qcow2 {image} 1M"))
            .ok();
        for name in ["2", "1", "1", "third"] {
            theirs(&scratch)
                .words(&format!("snapshot -c {name} {image}"))
                .ok();
        }
        let left = |words: &str, code: i32| -> String {
            run.clone()
                .words(&format!("snapshot {words} {image}"))
                .finish()
                .expect(code);
            let info = theirs(&scratch)
                .words(&format!("info --output=json {image}"))
                .ok()
                .json();
            let all = info["snapshots"].as_array().unwrap().clone();
            let ids = all
                .iter()
                .map(|snapshot| snapshot["id"].as_str().unwrap().to_owned());
            ids.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(left("-d 4", 1), "1 2 3 4", "{image}");
        assert_eq!(left("-a 4", 0), "1 2 3 4", "{image}");
        assert_eq!(left("-d 1", 0), "1 3 4", "{image}");
        assert_eq!(left("-d 1", 0), "1 4", "{image}");
        assert_eq!(left("-d third", 0), "1", "{image}");
    }
    native(&scratch).words("snapshot -d 1 ours.qcow2").ok();
    assert_eq!(native(&scratch).words("snapshot -l ours.qcow2").ok().out(), "");
}

#[test]
fn snapshot__meant_by_id_and_name() {
    let scratch = Scratch::new();
    theirs(&scratch).words("create -q -f qcow2 image.qcow2 1M").ok();
    for (pattern, name) in [(1, "2"), (2, "1"), (3, "2")] {
        oracle::io(
            scratch.join("image.qcow2"),
            "qcow2",
            [&*format!("write -P {pattern} 0 64k")],
        );
        theirs(&scratch)
            .words(&format!("snapshot -c {name} image.qcow2"))
            .ok();
    }
    for which in [
        "2",
        "3",
        "4",
        "snapshot.id=2",
        "snapshot.name=2",
        "snapshot.name=3",
        "snapshot.id=3,snapshot.name=2",
        "snapshot.id=3,snapshot.name=1",
        "snapshot.id=",
    ] {
        let flat = [(ours(&scratch), "ours.raw"), (theirs(&scratch), "theirs.raw")].map(|(run, flat)| {
            let done = run
                .words(&format!("convert -l {which} -O raw image.qcow2 {flat}"))
                .finish();
            (done.code, std::fs::read(scratch.join(flat)).ok())
        });
        assert!(flat[0] == flat[1], "{which}: {:?}, {:?}", flat[0].0, flat[1].0);
        let _ = ["ours.raw", "theirs.raw"].map(|flat| std::fs::remove_file(scratch.join(flat)));
    }
}

#[test]
fn snapshot__names_that_are_empty_or_too_long() {
    let scratch = Scratch::new();
    let long = "é".repeat(200);
    for (run, image) in [(ours(&scratch), "ours.qcow2"), (theirs(&scratch), "theirs.qcow2")] {
        theirs(&scratch)
            .words(&format!("create -q -f qcow2 {image} 1M"))
            .ok();
        for name in ["", &long] {
            run.clone()
                .args(["snapshot", "-c", name, image])
                .finish()
                .expect(0);
        }
        run.words(&format!("snapshot -U -c shared {image}"))
            .finish()
            .expect(1);
    }
    oracle::assert_clean(scratch.join("ours.qcow2"), "qcow2");
    let names = |image: &str| {
        let info = native(&scratch)
            .words(&format!("info --output=json {image}"))
            .ok()
            .json();
        let all = info["snapshots"].as_array().unwrap().clone();
        all.iter()
            .map(|snapshot| snapshot["name"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    // The real tool cuts in the middle of a letter.
    assert_eq!(names("ours.qcow2"), ["".to_owned(), "é".repeat(127)]);
    assert_eq!(
        names("theirs.qcow2"),
        ["".to_owned(), "é".repeat(127) + "\u{fffd}"]
    );
    native(&scratch)
        .words("convert --keep-snapshots -O qcow2 ours.qcow2 kept.qcow2")
        .ok();
    assert_eq!(names("kept.qcow2"), names("ours.qcow2"));
    let refused = native(&scratch)
        .args(["snapshot", "-c", &long, "ours.qcow2"])
        .finish()
        .expect(1);
    assert!(
        refused.err().contains("400 bytes, must have at most 255"),
        "{refused}"
    );
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
