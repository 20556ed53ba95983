//! The historical cow format: images of its time read as they did then; and since no program that is left knows it, the
//! data of our own held against QEMU's tools as a raw disk behind an offset, both ways.

use std::path::Path;
use std::time::Instant;

use diskmill_testkit::golden::relics;
use diskmill_testkit::scratch::{allocated, len, patch, peek};
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, hash, oracle};

use crate::tools::{native, ours, same, theirs};

/// A bit over 5 MiB, of whole sectors: 10281 of them.
const SIZE: u64 = (5 << 20) + 41 * 512;
/// Where the data of such a disk is: behind 1056 bytes of header and 1286 of bitmap.
const DATA_AT: u64 = 2560;

fn make(seed: u64) -> (Scratch, String) {
    let scratch = Scratch::new();
    SparseRandom::new(seed, SIZE).write_raw(scratch.join("disk.raw"));
    let digest = hash::sha256_file(scratch.join("disk.raw"));
    (scratch, digest)
}

/// The disk in `name`, as we read it.
fn reads(scratch: &Scratch, name: &str) -> String {
    native(scratch)
        .words(&format!("convert -O raw {name} read.raw"))
        .ok();
    hash::sha256_file(scratch.join("read.raw"))
}

/// Demands that a check finds nothing.
fn sound(scratch: &Scratch, name: &str) {
    let report = native(scratch)
        .words(&format!("check --output=json {name}"))
        .ok()
        .json();
    for counter in ["corruptions", "leaks", "check-errors"] {
        assert!(report[counter].as_u64().unwrap_or(0) == 0, "{report:#}");
    }
}

#[test]
fn cow__images_of_its_time_read_as_they_did() {
    let scratch = Scratch::new();
    for relic in relics("cow", &scratch) {
        let name = relic.name.as_str();
        assert_eq!(hash::sha256_file(scratch.join(name)), relic.sha256, "{name}");
        if name == "bad-version.cow" {
            let done = native(&scratch).words(&format!("info {name}")).finish().expect(1);
            assert!(
                done.err().contains("version is 3 (User-Mode Linux), must be 2"),
                "{done}"
            );
            continue;
        }
        let info = native(&scratch)
            .words(&format!("info --output=json {name}"))
            .ok()
            .json();
        let format = if name.ends_with(".cow") {
            "cow"
        } else {
            Path::new(name).extension().unwrap().to_str().unwrap()
        };
        assert_eq!(info["format"], format, "{name}");
        assert_eq!(info["virtual-size"], relic.virtual_size, "{name}");
        assert_eq!(
            info["backing-filename"].as_str(),
            relic.backing.as_deref(),
            "{name}"
        );
        match &relic.guest_sha256 {
            Some(digest) => assert_eq!(&reads(&scratch, name), digest, "{name}"),
            // Behind the end of a shorter base there are zeros.
            None => {
                native(&scratch)
                    .words(&format!("convert -O raw {name} read.raw"))
                    .ok();
                let bytes = std::fs::read(scratch.join("read.raw")).unwrap();
                assert!(bytes == plain_read(&scratch, name), "{name}");
            }
        }
        if name.ends_with(".cow") {
            let code = if name == "short-data.cow" { 2 } else { 0 };
            native(&scratch)
                .words(&format!("check {name}"))
                .finish()
                .expect(code);
            native(&scratch).words(&format!("map --output=json {name}")).ok();
            // Written anew it says the same.
            native(&scratch)
                .words(&format!("convert -O cow {name} new.cow"))
                .ok();
            native(&scratch).words(&format!("compare {name} new.cow")).ok();
        }
        assert_eq!(
            hash::sha256_file(scratch.join(name)),
            relic.sha256,
            "{name} was only read"
        );
    }
    // What is missing is put there as zeros.
    std::fs::copy(scratch.join("short-data.cow"), scratch.join("short.cow")).unwrap();
    let digest = reads(&scratch, "short.cow");
    native(&scratch).words("check -r all short.cow").ok();
    sound(&scratch, "short.cow");
    assert_eq!(reads(&scratch, "short.cow"), digest);
}

/// Another reader, a few lines long, of an image in the 64-bit layout and the raw image below it.
fn plain_read(scratch: &Scratch, name: &str) -> Vec<u8> {
    let file = std::fs::read(scratch.join(name)).unwrap();
    let size = u64::from_be_bytes(file[1040..1048].try_into().unwrap()) as usize;
    let data = (1056 + (size / 512).div_ceil(8)).next_multiple_of(512);
    let end = file[8..].iter().position(|byte| *byte == 0).unwrap();
    let base = std::str::from_utf8(&file[8..8 + end]).unwrap();
    let below = if base.is_empty() {
        Vec::new()
    } else {
        std::fs::read(scratch.join(base)).unwrap()
    };
    let mut disk = vec![0; size];
    for (sector, bytes) in disk.chunks_mut(512).enumerate() {
        let stored = file[1056 + sector / 8] >> (sector % 8) & 1 != 0;
        let (from, at) = if stored {
            (&file, data + sector * 512)
        } else {
            (&below, sector * 512)
        };
        let have = &from[at.min(from.len())..(at + 512).min(from.len())];
        bytes[..have.len()].copy_from_slice(have);
    }
    disk
}

/// Header and length are those of the images of its time.
#[test]
fn cow__new_images_are_those_of_its_time() {
    let scratch = Scratch::new();
    relics("cow", &scratch);
    native(&scratch).words("create -f cow new.cow 10M").ok();
    let (ours, theirs) = (scratch.join("new.cow"), scratch.join("empty-10m.cow"));
    assert_eq!(hash::sha256_file(ours), hash::sha256_file(theirs));
    // With a backing file all but the time that was last changed, which nobody looks at.
    native(&scratch)
        .words("create -f cow -b base10m.raw -F raw over.cow")
        .ok();
    let header = |name: &str| peek(scratch.join(name), 0, 1056);
    let (mut old, new) = (header("back-raw.cow"), header("over.cow"));
    old[1032..1036].fill(0);
    assert!(old == new);
    assert_eq!(len(scratch.join("over.cow")), 3616);
}

/// A fully written image is a raw disk behind an offset, to QEMU's tools as well; and the other way round.
#[test]
fn cow__data_is_where_qemu_finds_it() {
    let (scratch, digest) = make(1);
    let view = |name: &str| format!("driver=raw,offset={DATA_AT},size={SIZE},file.filename={name}");
    // All of it, zeros too, is stored.
    native(&scratch)
        .words("convert -f raw -O cow -S 0 disk.raw ours.cow")
        .ok();
    oracle::io(scratch.join("disk.raw"), "raw", ["read 0 512"]);
    let stored = peek(scratch.join("ours.cow"), 1056, 1286);
    assert!(stored[..1285].iter().all(|byte| *byte == 0xff) && stored[1285] == 1);
    theirs(&scratch)
        .args([
            "compare",
            "--image-opts",
            &view("ours.cow"),
            "driver=raw,file.filename=disk.raw",
        ])
        .ok();

    // Their bytes under our bitmap of ones.
    native(&scratch)
        .words(&format!("create -f cow theirs.cow {SIZE}"))
        .ok();
    std::fs::File::options()
        .write(true)
        .open(scratch.join("theirs.cow"))
        .unwrap()
        .set_len(DATA_AT + SIZE)
        .unwrap();
    theirs(&scratch)
        .args([
            "convert",
            "-n",
            "-f",
            "raw",
            "disk.raw",
            "--target-image-opts",
            &view("theirs.cow"),
        ])
        .ok();
    let mut ones = vec![0xff; 1285];
    ones.push(1);
    patch(scratch.join("theirs.cow"), 1056, &ones);
    sound(&scratch, "theirs.cow");
    assert_eq!(reads(&scratch, "theirs.cow"), digest);
    native(&scratch).words("compare theirs.cow ours.cow").ok();
}

/// The same bytes, whoever writes them; and as small as what is in them.
#[test]
fn cow__workers_change_no_byte() {
    let (scratch, digest) = make(2);
    for workers in [1, 4, 16] {
        ours(&scratch)
            .words(&format!(
                "convert -m {workers} -f raw -O cow disk.raw {workers}.cow"
            ))
            .ok();
    }
    let first = hash::sha256_file(scratch.join("1.cow"));
    assert_eq!(hash::sha256_file(scratch.join("4.cow")), first);
    assert_eq!(hash::sha256_file(scratch.join("16.cow")), first);
    assert_eq!(reads(&scratch, "1.cow"), digest);
    sound(&scratch, "1.cow");
    assert!(plain_read(&scratch, "1.cow") == std::fs::read(scratch.join("disk.raw")).unwrap());
    let measured = native(&scratch)
        .words("measure --output=json -f raw -O cow disk.raw")
        .ok()
        .json();
    assert_eq!(measured["required"], len(scratch.join("1.cow")));
    assert_eq!(measured["fully-allocated"], DATA_AT + SIZE);
}

/// Under the name qemu-img a cow image is raw unless it is said to be one, as there; saying so is what we add.
#[test]
fn cow__under_the_name_qemu_img() {
    let scratch = Scratch::new();
    relics("cow", &scratch);
    for words in [
        "info plain-10m.cow",
        "info -f raw plain-10m.cow",
        "map bad-version.cow",
        "measure -O qcow2 zeros-1m.cow",
    ] {
        same(&scratch, words);
    }
    theirs(&scratch)
        .words("create -f cow x.cow 1M")
        .finish()
        .expect(1);
    theirs(&scratch)
        .words("info -f cow plain-10m.cow")
        .finish()
        .expect(1);
    let run = |words: &str| ours(&scratch).words(words).ok();
    let info = run("info --output=json -f cow back-chain.cow").json();
    assert_eq!(
        (&info["format"], &info["virtual-size"]),
        (&"cow".into(), &(10 << 20).into())
    );
    assert!(info.get("details").is_none() && info.get("format-specific").is_none());
    let created = run("create -f cow x.cow 1M");
    assert_eq!(created.out(), "Formatting 'x.cow', fmt=cow size=1048576\n");
    // What a cow image is backed by may be one: it was made when that was known.
    run("convert -f cow -O raw back-chain.cow chain.raw");
    assert_eq!(
        hash::sha256_file(scratch.join("chain.raw")),
        "7f5967b3a8b09b6c32abe482ba0dce9107cfe900211421d4949086f965591036"
    );
    ours(&scratch)
        .words("compare -f cow -F raw back-chain.cow chain.raw")
        .ok();
}

#[test]
fn cow__overlays() {
    let (scratch, digest) = make(3);
    let run = |words: &str| native(&scratch).words(words);
    run("convert -f raw -O cow disk.raw base.cow").ok();
    run("create -f cow -b base.cow -F cow top.cow").ok();
    assert_eq!(len(scratch.join("top.cow")), 1056 + 1286);
    assert_eq!(reads(&scratch, "top.cow"), digest);
    // What is new goes into the overlay, zeros hide what is below, and a part of a sector keeps the rest of it.
    std::fs::copy(scratch.join("disk.raw"), scratch.join("new.raw")).unwrap();
    let changes = [
        "write -P 7 300k 3k",
        "write -z 1M 1M",
        "write -P 8 4M 700",
        "write -P 9 5261823 1",
    ];
    oracle::io(scratch.join("new.raw"), "raw", changes);
    let new = hash::sha256_file(scratch.join("new.raw"));
    let base = hash::sha256_file(scratch.join("base.cow"));
    run("convert -n -f raw -O cow new.raw top.cow").ok();
    run("convert -f raw -O cow -B base.cow -F cow new.raw other.cow").ok();
    for name in ["top.cow", "other.cow"] {
        assert_eq!(reads(&scratch, name), new, "{name}");
        sound(&scratch, name);
    }
    assert_eq!(
        hash::sha256_file(scratch.join("base.cow")),
        base,
        "what is below is not touched"
    );
    assert!(
        allocated(scratch.join("other.cow")) < SIZE,
        "what is the same stays below"
    );

    // Rebased to another file, to none, and committed.
    oracle::io(scratch.join("disk.raw"), "raw", ["write -P 3 2M 100k"]);
    run("convert -f raw -O qcow2 disk.raw next.qcow2").ok();
    run("rebase -b next.qcow2 -F qcow2 other.cow").ok();
    assert_eq!(reads(&scratch, "other.cow"), new);
    native(&scratch).args(["rebase", "-b", "", "other.cow"]).ok();
    assert_eq!(reads(&scratch, "other.cow"), new);
    let info = run("info --output=json other.cow").ok().json();
    assert_eq!(info.get("backing-filename"), None);
    run("rebase -b base.cow -F cow other.cow").ok();
    assert_eq!(reads(&scratch, "other.cow"), new);
    std::fs::remove_file(scratch.join("read.raw")).unwrap();
    run("commit top.cow").ok();
    assert_eq!(
        len(scratch.join("top.cow")),
        1056 + 1286,
        "it is as when it was new"
    );
    assert_eq!(reads(&scratch, "base.cow"), new);
    assert_eq!(reads(&scratch, "top.cow"), new);
    sound(&scratch, "base.cow");
}

/// In place where the data stays where it is, written anew where it moves: the disk shows the same, and zeros.
#[test]
fn cow__resize() {
    let (scratch, _) = make(4);
    let run = |words: &str| native(&scratch).words(words);
    run("convert -f raw -O cow disk.raw base.cow").ok();
    run(&format!(
        "create -f cow -b base.cow -F cow top.cow {}",
        SIZE - (1 << 20)
    ))
    .ok();
    oracle::io(scratch.join("disk.raw"), "raw", ["write -P 7 1M 300k"]);
    let expected =
        || std::fs::read(scratch.join("disk.raw")).unwrap()[..(SIZE - (1 << 20)) as usize].to_vec();
    std::fs::write(scratch.join("part.raw"), expected()).unwrap();
    run("convert -n -f raw -O cow part.raw top.cow").ok();
    let mut disk = expected();
    let inode = || {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(scratch.join("top.cow")).unwrap().ino()
    };
    for (size, in_place) in [
        ("+300k", true),
        ("+100M", false),
        ("--shrink 3M", false),
        ("--shrink -512", true),
        ("+512", true),
        ("--shrink 512", false),
        ("6000000", false),
    ] {
        let before = inode();
        let (shrink, size) = size
            .split_once(' ')
            .map_or(("", size), |(option, size)| (option, size));
        let done = native(&scratch)
            .args(["resize", "-q"])
            .args((!shrink.is_empty()).then_some(shrink))
            .args(["top.cow", size])
            .ok();
        assert_eq!(inode() == before, in_place, "{size}: {done}");
        let info = run("info --output=json top.cow").ok().json();
        disk.resize(info["virtual-size"].as_u64().unwrap() as usize, 0);
        std::fs::write(scratch.join("expected.raw"), &disk).unwrap();
        assert_eq!(info["backing-filename"], "base.cow");
        assert_eq!(
            reads(&scratch, "top.cow"),
            hash::sha256_file(scratch.join("expected.raw")),
            "{size}"
        );
        sound(&scratch, "top.cow");
    }
    assert_eq!(disk.len(), 6_000_128, "up to a sector");
    // What a file has as holes stays holes, and what it cannot have is refused.
    assert!(allocated(scratch.join("top.cow")) < 6_000_000);
    for (words, text) in [
        ("resize top.cow 9T", "must be 512 to 8796093022208"),
        ("resize --preallocation=full top.cow +1M", "preallocation"),
    ] {
        let done = run(words).finish().expect(1);
        assert!(done.err().contains(text), "{done}");
    }
    // A file of two names cannot be replaced, and its data cannot move.
    std::fs::hard_link(scratch.join("top.cow"), scratch.join("link.cow")).unwrap();
    let before = hash::sha256_file(scratch.join("top.cow"));
    let done = run("resize top.cow +100M").finish().expect(1);
    assert!(done.err().contains("no new file can take its place"), "{done}");
    assert_eq!(hash::sha256_file(scratch.join("top.cow")), before);
    run("resize top.cow +512").ok();
}

/// Killed while it is written anew, an image is the old one or the new one, and nothing lies beside it.
#[test]
fn cow__resize_killed() {
    let (scratch, digest) = make(5);
    native(&scratch)
        .words("convert -f raw -O cow -S 0 disk.raw disk.cow")
        .ok();
    let names = || {
        let mut names = scratch.names();
        names.retain(|name| !name.ends_with("raw"));
        names
    };
    let small = std::fs::read(scratch.join("disk.cow")).unwrap();
    let resize = || native(&scratch).words("resize -q disk.cow 200M");
    let started = Instant::now();
    resize().ok();
    let whole = started.elapsed();
    let mut stopped = 0;
    for round in 0..8 {
        scratch.file("disk.cow", &small);
        let mut child = resize().spawn();
        std::thread::sleep(whole * round / 8);
        child.kill().expect("kill it");
        stopped += u32::from(!child.wait_with_output().expect("wait").status.success());
        let info = native(&scratch).words("info --output=json disk.cow").ok().json();
        let size = info["virtual-size"].as_u64().unwrap();
        assert!(size == SIZE || size == 200 << 20, "{size}");
        assert_eq!(names(), ["disk.cow"]);
        sound(&scratch, "disk.cow");
        native(&scratch)
            .words("resize --shrink -q disk.cow")
            .arg(SIZE.to_string())
            .ok();
        assert_eq!(reads(&scratch, "disk.cow"), digest);
    }
    assert!(stopped > 0);
}

/// The policy for names inside images holds, and a name is a path whatever it looks like.
#[test]
fn cow__names_are_followed_by_policy_only() {
    let (scratch, digest) = make(6);
    let fails = |words: &str, text: &str| {
        let done = native(&scratch).words(words).finish().expect(1);
        assert!(done.err().contains(text), "{words}: {done}");
    };
    native(&scratch)
        .words("create -f cow -b disk.raw -F raw top.cow")
        .ok();
    assert_eq!(reads(&scratch, "top.cow"), digest);
    fails(
        "map --untrusted top.cow",
        "does not name the format of its backing file",
    );
    let rename = |name: &str| {
        let mut field = name.as_bytes().to_vec();
        field.resize(1024, 0);
        patch(scratch.join("top.cow"), 8, &field);
    };
    rename("nbd:localhost:10809");
    for tool in [native(&scratch), ours(&scratch)] {
        let done = tool.words("map -f cow top.cow").finish().expect(1);
        assert!(
            done.err().contains("nbd:localhost:10809': No such file"),
            "{done}"
        );
    }
    std::fs::rename(scratch.join("disk.raw"), scratch.join("nbd:localhost:10809")).unwrap();
    assert_eq!(reads(&scratch, "top.cow"), digest);
    rename("top.cow");
    fails("map top.cow", "among those it is backed by");
    rename("/etc/passwd");
    fails("map top.cow", "--allow-ref");
}
