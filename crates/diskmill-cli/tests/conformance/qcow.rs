//! qcow, version 1: both ways with `qemu-img` and `qemu-io`, over every geometry, with and without a backing image,
//! compressed and encrypted.

use diskmill_testkit::scratch::{len, patch};
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Run, Scratch, hash, oracle};

use crate::tools::{native, ours, refused, same, same_json, theirs};

/// A bit over 5 MiB, no multiple of a cluster.
const SIZE: u64 = (5 << 20) + 4096 + 512;

/// What `qemu-io` does to an image: new clusters, clusters in part, zeros.
const CHANGES: [&str; 7] = [
    "write -P 1 0 512",
    "write -P 2 100k 70k",
    "write -P 3 1023k 2k",
    "write -z 200k 64k",
    "write -P 4 210k 1k",
    "write -P 5 3M 1M",
    "write -P 6 5242880 4k",
];

/// The same to an overlay, of which QEMU makes each cluster of 512 bytes durable.
const FEW_CHANGES: [&str; 5] = [
    "write -P 1 0 512",
    "write -P 2 100k 7k",
    "write -P 3 1023k 2k",
    "write -z 200k 4k",
    "write -P 5 3M 16k",
];

const SECRET: &str = "secret,id=s,data=abcdefghijklmnopqrstuvwxyz";
const AES: &str = "encrypt.format=aes,encrypt.key-secret=s";

fn make(seed: u64) -> (Scratch, String) {
    let scratch = Scratch::new();
    SparseRandom::new(seed, SIZE).write_raw(scratch.join("disk.raw"));
    let digest = hash::sha256_file(scratch.join("disk.raw"));
    (scratch, digest)
}

fn digest_of(scratch: &Scratch, run: Run) -> String {
    run.arg("read.raw").ok();
    hash::sha256_file(scratch.join("read.raw"))
}

/// The disk in `name`, as we and as QEMU read it; both must agree.
fn reads(scratch: &Scratch, name: &str) -> String {
    let words = format!("convert -f qcow -O raw {name}");
    let our = digest_of(scratch, ours(scratch).words(&words));
    let their = digest_of(scratch, theirs(scratch).words(&words));
    assert_eq!(our, their, "{name}");
    our
}

/// The same of an encrypted image.
fn reads_secret(scratch: &Scratch, name: &str) -> String {
    let words = format!(
        "convert --object {SECRET} -O raw --image-opts driver=qcow,file.filename={name},encrypt.key-secret=s"
    );
    let our = digest_of(scratch, ours(scratch).words(&words));
    let their = digest_of(scratch, theirs(scratch).words(&words));
    assert_eq!(our, their, "{name}");
    our
}

/// Demands that both say the same of an image.
fn agree(scratch: &Scratch, name: &str) {
    for command in ["info", "map", "check"] {
        same(scratch, &format!("{command} -f qcow {name}"));
    }
    for command in ["info", "map"] {
        same_json(scratch, &format!("{command} --output=json -f qcow {name}"));
    }
    same(scratch, &format!("check --output=json -f qcow {name}"));
    for target in ["raw", "qcow2"] {
        same_json(
            scratch,
            &format!("measure --output=json -f qcow -O {target} {name}"),
        );
    }
}

/// Demands that our own check finds nothing wrong.
fn sound(scratch: &Scratch, name: &str) {
    let report = native(scratch)
        .words(&format!("check --output=json -f qcow {name}"))
        .ok()
        .json();
    for counter in ["corruptions", "leaks", "check-errors"] {
        assert_eq!(report[counter].as_u64().unwrap_or(0), 0, "{report:#}");
    }
}

fn both_ways(flags: &str) {
    let (scratch, digest) = make(3);
    let convert = |target: &str| format!("convert {flags} -f raw -O qcow disk.raw {target}");
    ours(&scratch).words(&convert("ours.qcow")).ok();
    let made = theirs(&scratch).words(&convert("theirs.qcow")).finish();
    if !flags.is_empty() {
        // It makes the image, and fails without a word once that is done.
        assert_eq!((made.code, made.err().as_str()), (Some(1), ""));
        assert!(len(scratch.join("ours.qcow")) < len(scratch.join("theirs.qcow")));
    } else {
        assert_eq!(
            hash::sha256_file(scratch.join("ours.qcow")),
            hash::sha256_file(scratch.join("theirs.qcow")),
            "byte for byte"
        );
    }
    for name in ["ours.qcow", "theirs.qcow"] {
        sound(&scratch, name);
        agree(&scratch, name);
        assert_eq!(reads(&scratch, name), digest);
        oracle::io(scratch.join(name), "qcow", CHANGES);
        agree(&scratch, name);
        reads(&scratch, name);
        // In place: all of it over what was there, grown and shrunk.
        ours(&scratch)
            .words(&format!("convert -n {flags} -f raw -O qcow disk.raw {name}"))
            .ok();
        assert_eq!(reads(&scratch, name), digest);
        ours(&scratch)
            .words(&format!("resize -q -f qcow {name} +200M"))
            .ok();
        oracle::io(
            scratch.join(name),
            "qcow",
            ["write -P 9 150M 64k", "read -P 9 150M 64k"],
        );
        ours(&scratch)
            .words(&format!("resize -q --shrink -f qcow {name} {SIZE}"))
            .ok();
        assert_eq!(reads(&scratch, name), digest);
        agree(&scratch, name);
    }
}

#[test]
fn qcow__plain() {
    both_ways("");
}

#[test]
fn qcow__compressed() {
    both_ways("-c");
}

#[test]
fn qcow__new_images_are_the_same_byte_for_byte() {
    let (scratch, _) = make(1);
    for words in [
        "1".to_owned(),
        "512".to_owned(),
        "64M".to_owned(),
        "3000000000000".to_owned(),
        "-b disk.raw -F raw".to_owned(),
        "-b disk.raw -F raw 9M".to_owned(),
        format!("-u -b {} -F raw 1M", "n".repeat(1023)),
        format!("--object {SECRET} -o {AES} 1M"),
        format!("--object {SECRET} -o encryption=on,encrypt.key-secret=s -b disk.raw -F raw"),
    ] {
        // Options come before the name, the size after it.
        let (options, size) = match words.rsplit_once(' ') {
            Some((options, size)) if size.ends_with('M') => (options, size),
            None => ("", words.as_str()),
            Some(_) => (words.as_str(), ""),
        };
        let create = |name: &str| format!("create -f qcow {options} {name} {size}");
        let our = ours(&scratch).words(&create("ours")).ok();
        let their = theirs(&scratch).words(&create("theirs")).ok();
        assert_eq!(our.out().replace("ours", "X"), their.out().replace("theirs", "X"));
        assert_eq!(
            std::fs::read(scratch.join("ours")).unwrap(),
            std::fs::read(scratch.join("theirs")).unwrap(),
            "{words}"
        );
    }
}

#[test]
fn qcow__workers_change_no_byte() {
    let (scratch, _) = make(5);
    for flags in ["", "-c", &format!("--object {SECRET} -o {AES}")] {
        let digests = [1, 4, 16].map(|workers| {
            ours(&scratch)
                .words(&format!(
                    "convert -m {workers} {flags} -f raw -O qcow disk.raw {workers}.qcow"
                ))
                .ok();
            hash::sha256_file(scratch.join(format!("{workers}.qcow")))
        });
        assert!(digests.iter().all(|digest| *digest == digests[0]), "{flags}");
    }
}

#[test]
fn qcow__encrypted() {
    let (scratch, digest) = make(7);
    let convert =
        |target: &str| format!("convert --object {SECRET} -f raw -O qcow -o {AES} disk.raw {target}");
    ours(&scratch).words(&convert("ours.qcow")).ok();
    theirs(&scratch).words(&convert("theirs.qcow")).ok();
    let bytes = |name: &str| hash::sha256_file(scratch.join(name));
    assert_eq!(bytes("ours.qcow"), bytes("theirs.qcow"), "byte for byte");
    let options = "driver=qcow,file.filename=ours.qcow,encrypt.key-secret=s";
    for words in ["map --output=json", "info", "info --output=json"] {
        same(
            &scratch,
            &format!("{words} --object {SECRET} --image-opts {options}"),
        );
    }
    for words in ["info", "map", "check", "measure -O raw", "compare disk.raw"] {
        same(&scratch, &format!("{words} ours.qcow"));
    }
    assert_eq!(reads_secret(&scratch, "ours.qcow"), digest);
    // Whatever part of a cluster is written, the rest of it is zeros under the cipher.
    let io = |steps: &[&str]| {
        let mut run = Run::new("qemu-io").dir(scratch.path()).args(["--object", SECRET]);
        for step in steps {
            run = run.args(["-c", step]);
        }
        let done = run.args(["--image-opts", options]).ok();
        assert!(!done.out().contains("failed"), "{done}");
    };
    io(&CHANGES);
    let changed = reads_secret(&scratch, "ours.qcow");
    let mut copy = std::fs::read(scratch.join("disk.raw")).unwrap();
    copy[70_000] ^= 0xff;
    copy[3_000_000..3_000_300].fill(0x77);
    copy.resize(SIZE as usize, 0);
    scratch.file("disk.raw", &copy);
    ours(&scratch)
        .words(&format!(
            "convert -n --object {SECRET} -f raw --target-image-opts disk.raw {options}"
        ))
        .ok();
    assert_eq!(
        reads_secret(&scratch, "ours.qcow"),
        hash::sha256_file(scratch.join("disk.raw"))
    );
    assert_ne!(changed, digest);
    // People give a passphrase.
    scratch.file("word", b"abcdefghijklmnopqrstuvwxyz");
    let read = native(&scratch).words("convert --passphrase-file word -f qcow -O raw ours.qcow");
    assert_eq!(
        digest_of(&scratch, read),
        hash::sha256_file(scratch.join("disk.raw"))
    );
}

/// Images of every size of clusters and tables, empty ones with the bytes of the header changed.
#[test]
fn qcow__every_geometry() {
    let scratch = Scratch::new();
    let size = (1 << 20) + 1536;
    let disk = SparseRandom::new(9, size);
    disk.write_raw(scratch.join("disk.raw"));
    let digest = hash::sha256_file(scratch.join("disk.raw"));
    for (cluster_bits, l2_bits) in (9..=16).flat_map(|bits| [6, 9 + bits % 4, 13].map(|l2| (bits, l2))) {
        // As long an L1 table as any of these needs.
        let empty = |name: &str| {
            oracle::create(scratch.join(name), "qcow", "", "160M");
            patch(scratch.join(name), 24, &size.to_be_bytes());
            patch(scratch.join(name), 32, &[cluster_bits, l2_bits]);
        };
        empty("theirs.qcow");
        theirs(&scratch)
            .words("convert -n -f raw -O qcow disk.raw theirs.qcow")
            .ok();
        let words = "convert -f qcow -O raw theirs.qcow";
        assert_eq!(
            digest_of(&scratch, ours(&scratch).words(words)),
            digest,
            "{cluster_bits} {l2_bits}"
        );
        same_json(&scratch, "map --output=json -f qcow theirs.qcow");
        for flags in ["", "-c"] {
            empty("ours.qcow");
            ours(&scratch)
                .words(&format!("convert -n {flags} -f raw -O qcow disk.raw ours.qcow"))
                .ok();
            oracle::assert_identical(scratch.join("disk.raw"), "raw", scratch.join("ours.qcow"), "qcow");
            sound(&scratch, "ours.qcow");
        }
        same_json(&scratch, "map --output=json -f qcow ours.qcow");
    }
}

#[test]
fn qcow__over_a_backing_image() {
    let (scratch, digest) = make(11);
    for (flags, key) in [("", ""), ("-c", ""), (AES, ",encrypt.key-secret=s")] {
        let options = if key.is_empty() {
            String::new()
        } else {
            format!("--object {SECRET} -o {AES}")
        };
        let compress = if flags == "-c" { "-c" } else { "" };
        let read = |name: &str| match key {
            "" => reads(&scratch, name),
            _ => reads_secret(&scratch, name),
        };
        ours(&scratch)
            .words(&format!(
                "create -q {options} -f qcow -b disk.raw -F raw top.qcow"
            ))
            .ok();
        assert_eq!(read("top.qcow"), digest);
        let mut io = Run::new("qemu-io").dir(scratch.path()).args(["--object", SECRET]);
        for step in FEW_CHANGES {
            io = io.args(["-c", step]);
        }
        io.args([
            "--image-opts",
            &format!("driver=qcow,file.filename=top.qcow{key}"),
        ])
        .ok();
        let changed = read("top.qcow");
        assert_ne!(changed, digest);
        // A copy of what differs only.
        std::fs::rename(scratch.join("read.raw"), scratch.join("full.raw")).unwrap();
        ours(&scratch)
            .words(&format!(
                "convert {compress} {options} -f raw -O qcow -B disk.raw -F raw full.raw twin.qcow"
            ))
            .ok();
        assert_eq!(read("twin.qcow"), changed);
        // What was changed goes down; the image is as short as a new one then.
        std::fs::copy(scratch.join("disk.raw"), scratch.join("keep.raw")).unwrap();
        ours(&scratch)
            .words(&format!(
                "commit -q --object {SECRET} --image-opts driver=qcow,file.filename=top.qcow{key}"
            ))
            .ok();
        assert_eq!(hash::sha256_file(scratch.join("disk.raw")), changed);
        assert_eq!(len(scratch.join("top.qcow")), 56 + 3 * 8);
        assert_eq!(read("top.qcow"), changed);
        std::fs::rename(scratch.join("keep.raw"), scratch.join("disk.raw")).unwrap();
    }
}

#[test]
fn qcow__another_backing_image() {
    let (scratch, digest) = make(13);
    SparseRandom::new(14, SIZE).write_raw(scratch.join("other.raw"));
    ours(&scratch)
        .words("create -q -f qcow -b disk.raw -F raw top.qcow")
        .ok();
    native(&scratch)
        .words("rebase -f qcow -b other.raw -F raw top.qcow")
        .ok();
    assert_eq!(reads(&scratch, "top.qcow"), digest);
    sound(&scratch, "top.qcow");
    native(&scratch)
        .args(["rebase", "-f", "qcow", "-b", "", "top.qcow"])
        .ok();
    std::fs::remove_file(scratch.join("other.raw")).unwrap();
    assert_eq!(reads(&scratch, "top.qcow"), digest);
    native(&scratch)
        .words("rebase -u -f qcow -b disk.raw -F raw top.qcow")
        .ok();
    assert_eq!(
        oracle::info(scratch.join("top.qcow"), "qcow", false)["backing-filename"],
        "disk.raw"
    );
}

#[test]
fn qcow__what_both_refuse() {
    let (scratch, _) = make(3);
    theirs(&scratch)
        .words("convert -f raw -O qcow disk.raw disk.qcow")
        .ok();
    theirs(&scratch).words("create -q -f qcow2 new.qcow2 1M").ok();
    for words in [
        "create -f qcow x 0".to_owned(),
        "create -f qcow -o cluster_size=4k x 1M".to_owned(),
        "create -f qcow -o encrypt.format=aes x 1M".to_owned(),
        "create -f qcow -o encryption=on x 1M".to_owned(),
        format!("create --object {SECRET} -f qcow -o encrypt.format=luks,encrypt.key-secret=s x 1M"),
        format!("create --object {SECRET} -f qcow -o encrypt.key-secret=s x 1M"),
        format!("create --object {SECRET} -f qcow -o encryption=on,{AES} x 1M"),
        format!("convert --object {SECRET} -c -f raw -O qcow -o {AES} disk.raw x"),
        "check disk.qcow".to_owned(),
        "check -r all disk.qcow".to_owned(),
        "measure -O qcow --size 1M".to_owned(),
        "measure -O qcow disk.qcow".to_owned(),
        "amend -o size=1M disk.qcow".to_owned(),
        "info -f qcow disk.raw".to_owned(),
        "info -f qcow new.qcow2".to_owned(),
    ] {
        same(&scratch, &words);
        // What QEMU leaves of it.
        let _ = std::fs::remove_file(scratch.join("x"));
    }
    for words in [
        "snapshot -c one disk.qcow",
        "snapshot -d one disk.qcow",
        "bitmap --add disk.qcow b",
    ] {
        refused(&scratch, words);
    }
    let help = ours(&scratch).words("create -f qcow -o help").ok();
    let names = |text: String| -> Vec<String> {
        let options = text.lines().filter_map(|line| line.trim().split_once('='));
        options.map(|(name, _)| name.to_owned()).collect()
    };
    let theirs = theirs(&scratch).words("create -f qcow -o help").ok();
    assert_eq!(names(help.out()), names(theirs.out()));
}
