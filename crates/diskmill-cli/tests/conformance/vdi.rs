//! VirtualBox's format: every type and option both ways with QEMU's tools, and read by programs that are neither.

use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, hash, oracle, scratch};

use crate::agree::assert_agree;
use crate::readers::{dissect_vdi, seven_zip};
use crate::tools::{native, ours, refused, theirs};

/// A bit over 5 MiB.
const SIZE: u64 = (5 << 20) + 4096 + 512;

/// What `qemu-io` does to an image: new blocks, blocks in part, zeros, discards.
const CHANGES: [&str; 7] = [
    "write -P 1 0 512",
    "write -P 2 100k 70k",
    "write -P 3 1023k 2k",
    "write -z 200k 64k",
    "write -z -u 2M 1M",
    "discard 1536k 128k",
    "write -P 6 5242880 4k",
];

fn make(seed: u64) -> (Scratch, SparseRandom, String) {
    let scratch = Scratch::new();
    let disk = SparseRandom::new(seed, SIZE);
    disk.write_raw(scratch.join("disk.raw"));
    let digest = hash::sha256_file(scratch.join("disk.raw"));
    (scratch, disk, digest)
}

/// The disk in `name`, as we read it.
fn ours_reads(scratch: &Scratch, name: &str) -> String {
    native(scratch)
        .words(&format!("convert -f vdi -O raw {name} read.raw"))
        .ok();
    hash::sha256_file(scratch.join("read.raw"))
}

/// Everybody reads the same from an image without a parent.
fn all_read(scratch: &Scratch, name: &str, digest: &str) {
    assert_eq!(ours_reads(scratch, name), digest, "we");
    assert_eq!(oracle::guest_sha256(scratch.join(name), "vdi"), digest, "QEMU");
    assert_eq!(seven_zip(scratch, name, "VDI"), digest, "7-Zip");
    assert_eq!(dissect_vdi(scratch, &[name]), digest, "dissect");
}

fn cell(options: &str, theirs_too: bool) {
    let (scratch, disk, digest) = make(options.len() as u64);
    let with = if options.is_empty() {
        String::new()
    } else {
        format!("-o {options}")
    };
    let convert = |target: &str| format!("convert -f raw -O vdi {with} disk.raw {target}");
    ours(&scratch).words(&convert("ours.vdi")).ok();
    all_read(&scratch, "ours.vdi", &digest);
    assert_agree(&scratch, "ours.vdi", "vdi");
    oracle::io(scratch.join("ours.vdi"), "vdi", CHANGES);
    assert_agree(&scratch, "ours.vdi", "vdi");
    let changed = oracle::guest_sha256(scratch.join("ours.vdi"), "vdi");
    all_read(&scratch, "ours.vdi", &changed);

    if theirs_too {
        theirs(&scratch).words(&convert("theirs.vdi")).ok();
        all_read(&scratch, "theirs.vdi", &digest);
        assert_agree(&scratch, "theirs.vdi", "vdi");
        oracle::io(scratch.join("theirs.vdi"), "vdi", CHANGES);
        assert_agree(&scratch, "theirs.vdi", "vdi");
        ours(&scratch)
            .words("compare -f vdi -F vdi ours.vdi theirs.vdi")
            .ok();
        let create = |name: &str| format!("create -f vdi {with} {name} {SIZE}");
        let our = ours(&scratch).words(&create("empty-ours.vdi")).ok();
        let their = theirs(&scratch).words(&create("empty-theirs.vdi")).ok();
        assert_eq!(our.out().replace("-ours", ""), their.out().replace("-theirs", ""));
        assert_eq!(
            scratch::len(scratch.join("empty-ours.vdi")),
            scratch::len(scratch.join("empty-theirs.vdi"))
        );
    }

    // In place: all of it over what was there, grown and shrunk.
    ours(&scratch)
        .words("convert -n -f raw -O vdi disk.raw ours.vdi")
        .ok();
    all_read(&scratch, "ours.vdi", &digest);
    ours(&scratch).words("resize -q -f vdi ours.vdi +200M").ok();
    oracle::assert_clean(scratch.join("ours.vdi"), "vdi");
    oracle::io(scratch.join("ours.vdi"), "vdi", ["write -P 9 150M 64k"]);
    ours(&scratch)
        .words(&format!("resize -q --shrink -f vdi ours.vdi {SIZE}"))
        .ok();
    assert_agree(&scratch, "ours.vdi", "vdi");
    all_read(&scratch, "ours.vdi", &digest);
    assert_eq!(disk.size(), SIZE);
}

macro_rules! cells {
    ($($name:ident: $options:expr, $theirs:expr;)*) => {$(
        #[test]
        fn $name() {
            cell($options, $theirs);
        }
    )*};
}

cells! {
    vdi__dynamic: "", true;
    vdi__static: "static=on", true;
    vdi__align_1m: "align=1M", false;
    vdi__static__align_1m: "static=on,align=1M", false;
    vdi__preallocation_metadata: "preallocation=metadata", false;
    vdi__preallocation_falloc: "preallocation=falloc", false;
    vdi__preallocation_full: "preallocation=full", false;
}

#[test]
fn vdi__workers_change_no_byte() {
    let (scratch, ..) = make(3);
    let uuid = "-o uuid=01234567-89ab-cdef-0123-456789abcdef";
    for workers in [1, 4, 16] {
        ours(&scratch)
            .words(&format!(
                "convert -m {workers} -f raw -O vdi {uuid} disk.raw {workers}.vdi"
            ))
            .ok();
    }
    let digest = hash::sha256_file(scratch.join("1.vdi"));
    assert_eq!(hash::sha256_file(scratch.join("4.vdi")), digest);
    assert_eq!(hash::sha256_file(scratch.join("16.vdi")), digest);
    let info = native(&scratch).words("info --output=json 1.vdi").ok().json();
    assert_eq!(info["details"]["uuid"], "01234567-89ab-cdef-0123-456789abcdef");
    assert_eq!(info["details"]["image-type"], "dynamic");
    assert_eq!(info["details"]["block-size"], 1 << 20);
}

#[test]
fn vdi__what_both_refuse() {
    let (scratch, ..) = make(3);
    ours(&scratch)
        .words("convert -f raw -O vdi disk.raw disk.vdi")
        .ok();
    for words in [
        "create -f vdi -o cluster_size=1M x.vdi 1M",
        "create -f vdi x.vdi 600T",
        "convert -c -f raw -O vdi disk.raw x.vdi",
        "snapshot -c one disk.vdi",
        "info -f vdi disk.raw",
    ] {
        refused(&scratch, words);
    }
}

/// Three generations, which only VirtualBox, dissect and we read.
#[test]
fn vdi__differencing() {
    let (scratch, _, digest) = make(11);
    let run = |words: &str| native(&scratch).words(words);
    run("convert -f raw -O vdi disk.raw base.vdi").ok();
    run("create -f vdi -b base.vdi -F vdi child.vdi").ok();
    run("create -f vdi -b child.vdi -F vdi grand.vdi").ok();
    assert_eq!(ours_reads(&scratch, "grand.vdi"), digest);
    assert_eq!(
        dissect_vdi(&scratch, &["base.vdi", "child.vdi", "grand.vdi"]),
        digest
    );
    let chain = run("info --output=json --backing-chain grand.vdi").ok().json();
    assert_eq!(chain.as_array().map(Vec::len), Some(3));
    assert_eq!(chain[0]["details"]["uuid-parent"], chain[1]["details"]["uuid"]);

    // What is new goes into the youngest; zeros hide what is below, and a part of a block keeps the rest of it.
    std::fs::copy(scratch.join("disk.raw"), scratch.join("new.raw")).unwrap();
    oracle::io(
        scratch.join("new.raw"),
        "raw",
        ["write -P 7 300k 3k", "write -z 1M 1M", "write -P 8 4M 1k"],
    );
    let new = hash::sha256_file(scratch.join("new.raw"));
    let base = hash::sha256_file(scratch.join("base.vdi"));
    run("convert -f raw -O vdi -B child.vdi -F vdi new.raw other.vdi").ok();
    run("convert -n -f raw -O vdi new.raw grand.vdi").ok();
    for name in ["grand.vdi", "other.vdi"] {
        assert_eq!(ours_reads(&scratch, name), new, "{name}");
        assert_eq!(
            dissect_vdi(&scratch, &["base.vdi", "child.vdi", name]),
            new,
            "{name}"
        );
        run(&format!("check {name}")).ok();
    }
    assert_eq!(
        hash::sha256_file(scratch.join("base.vdi")),
        base,
        "what is below is not touched"
    );
    // QEMU's tools know no parents.
    theirs(&scratch).words("info -f vdi grand.vdi").finish().expect(1);
}

#[test]
fn vdi__commit() {
    let (scratch, _, _) = make(14);
    let run = |words: &str| native(&scratch).words(words);
    run("convert -f raw -O vdi disk.raw base.vdi").ok();
    run("create -f vdi -b base.vdi -F vdi child.vdi").ok();
    oracle::io(
        scratch.join("disk.raw"),
        "raw",
        ["write -P 7 300k 3k", "write -z 1M 1M"],
    );
    let new = hash::sha256_file(scratch.join("disk.raw"));
    run("convert -n -f raw -O vdi disk.raw child.vdi").ok();
    run("commit -f vdi child.vdi").ok();
    // It has nothing of its own, and goes on being a child of the new state.
    assert_eq!(scratch::len(scratch.join("child.vdi")), 1024);
    assert_eq!(ours_reads(&scratch, "child.vdi"), new);
    all_read(&scratch, "base.vdi", &new);
}

#[test]
fn vdi__rebase() {
    let (scratch, _, digest) = make(15);
    let run = |words: &str| native(&scratch).words(words);
    run("convert -f raw -O vdi disk.raw base.vdi").ok();
    oracle::io(
        scratch.join("disk.raw"),
        "raw",
        ["write -P 7 300k 3k", "write -z 1M 1M"],
    );
    run("convert -f raw -O vdi disk.raw new.vdi").ok();
    run("create -f vdi -b base.vdi -F vdi child.vdi").ok();
    run("rebase -b new.vdi -F vdi child.vdi").ok();
    assert_eq!(ours_reads(&scratch, "child.vdi"), digest);
    assert_eq!(dissect_vdi(&scratch, &["new.vdi", "child.vdi"]), digest);
    run("rebase -b disk.raw -F raw child.vdi").finish().expect(1);
    assert_eq!(ours_reads(&scratch, "child.vdi"), digest);
    // A parent that was changed, and fits all the same by the user's word.
    run("resize -q new.vdi +1M").ok();
    run("map child.vdi").finish().expect(1);
    run("rebase -u -b new.vdi -F vdi child.vdi").ok();
    assert_eq!(ours_reads(&scratch, "child.vdi"), digest);
    run("rebase -b base.vdi -F vdi child.vdi").ok();
    assert_eq!(ours_reads(&scratch, "child.vdi"), digest);
    native(&scratch).args(["rebase", "-b", "", "child.vdi"]).ok();
    all_read(&scratch, "child.vdi", &digest);
    oracle::assert_clean(scratch.join("child.vdi"), "vdi");
}

#[test]
fn vdi__parents_are_found_by_uuid_and_by_nothing_else() {
    let (scratch, _, digest) = make(12);
    let run = |words: &str| native(&scratch).words(words);
    let fails = |words: &str, text: &str| {
        let done = run(words).finish().expect(1);
        assert!(done.err().contains(text), "{words}: {done}");
    };
    for dir in ["here", "there"] {
        std::fs::create_dir(scratch.join(dir)).unwrap();
    }
    run("convert -f raw -O vdi disk.raw here/base.vdi").ok();
    run("create -f vdi -b base.vdi -F vdi here/child.vdi").ok();
    run("create -f vdi here/other.vdi 1M").ok();
    let read = |words: &str| {
        run(&format!("convert {words} -O raw here/child.vdi read.raw")).ok();
        assert_eq!(hash::sha256_file(scratch.join("read.raw")), digest, "{words}");
    };
    read("");
    // Under any name, in the same directory.
    std::fs::rename(scratch.join("here/base.vdi"), scratch.join("here/renamed.vdi")).unwrap();
    read("");
    fails("map --untrusted here/child.vdi", "--allow-ref");
    read("--untrusted --allow-ref here");
    std::fs::rename(scratch.join("here/renamed.vdi"), scratch.join("there/base.vdi")).unwrap();
    fails("map here/child.vdi", "a differencing image needs its parent");
    fails(
        "map --parent here/other.vdi here/child.vdi",
        "a differencing image needs its parent",
    );
    fails("map --parent disk.raw here/child.vdi", "disk.raw");
    read("--parent there/base.vdi");
    read("--untrusted --parent there/base.vdi");
    run("check here/child.vdi").ok();
    run("info here/child.vdi").ok();
    // Reading it as somebody else's parent changes nothing; writing to it does.
    run("resize there/base.vdi +1M").ok();
    fails(
        "map --parent there/base.vdi here/child.vdi",
        "it was changed since",
    );
    // A child cannot be made of what has no UUID, nor of what was not opened.
    fails(
        "create -f vdi -b ../disk.raw -F raw here/x.vdi",
        "must be a vdi image with a UUID",
    );
    fails(
        "create -f vdi -u -b base.vdi -F vdi there/x.vdi 1M",
        "must be opened",
    );
    // Nobody is his own ancestor.
    std::fs::copy(scratch.join("here/child.vdi"), scratch.join("here/loop.vdi")).unwrap();
    let own = scratch::peek(scratch.join("here/loop.vdi"), 392, 32);
    scratch::patch(scratch.join("here/loop.vdi"), 424, &own);
    fails("map here/loop.vdi", "here");
}

#[test]
fn vdi__compact_and_repair() {
    let (scratch, _, _) = make(13);
    let run = |words: &str| native(&scratch).words(words);
    run("convert -f raw -O vdi -S 0 disk.raw disk.vdi").ok();
    oracle::io(
        scratch.join("disk.vdi"),
        "vdi",
        ["write -P 1 0 5M", "write -z 1M 2M"],
    );
    let before = scratch::len(scratch.join("disk.vdi"));
    let digest = oracle::guest_sha256(scratch.join("disk.vdi"), "vdi");
    run("compact disk.vdi").ok();
    assert_eq!(scratch::len(scratch.join("disk.vdi")), before - (2 << 20));
    oracle::assert_clean(scratch.join("disk.vdi"), "vdi");
    all_read(&scratch, "disk.vdi", &digest);

    // A number of blocks that is too low, and two blocks in one slot.
    let slot = scratch::peek(scratch.join("disk.vdi"), 512, 4);
    scratch::patch(scratch.join("disk.vdi"), 388, &[0; 4]);
    scratch::patch(scratch.join("disk.vdi"), 512 + 4 * 4, &slot);
    for tool in [ours(&scratch), theirs(&scratch)] {
        tool.words("check -f vdi disk.vdi").finish().expect(2);
    }
    let digest = oracle::guest_sha256(scratch.join("disk.vdi"), "vdi");
    run("check -r leaks disk.vdi").finish().expect(2);
    run("check -r all disk.vdi").finish().expect(0);
    oracle::assert_clean(scratch.join("disk.vdi"), "vdi");
    all_read(&scratch, "disk.vdi", &digest);
}
