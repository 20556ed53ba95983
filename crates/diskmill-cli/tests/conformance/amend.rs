//! Changing options: the same wish by both tools on equal images ends in the same disk, the same snapshots and the same
//! facts, or is refused in the same words.

use diskmill_testkit::{Run, Scratch, oracle};

use crate::tools::{ours, same, theirs};

/// What is done to a new image before its options are changed.
pub type Setup = &'static [&'static str];

/// Two folders, the first for us and the second for the real tool, with equal images.
pub struct Pair {
    ours: Scratch,
    theirs: Scratch,
}

pub const IMAGE: &str = "image.qcow2";

impl Pair {
    pub fn new(create: &str, setup: Setup) -> Self {
        let pair = Self {
            ours: Scratch::new(),
            theirs: Scratch::new(),
        };
        for scratch in [&pair.ours, &pair.theirs] {
            let base = scratch.file("base.raw", &[3; 1 << 20]);
            oracle::io(&base, "raw", ["write -P 4 100k 300k"]);
            theirs(scratch)
                .words(&format!("create -q -f qcow2 {create}"))
                .ok();
            for step in setup {
                match step.strip_prefix("img ") {
                    Some(words) => drop(theirs(scratch).words(words).ok()),
                    None => oracle::io(scratch.join(IMAGE), "qcow2", [step]),
                }
            }
        }
        pair
    }

    /// Wishes the same of both and demands the same outcome.
    fn amend(&self, wish: &str) {
        self.both(&format!("amend -f qcow2 {wish} {IMAGE}"));
    }

    /// Runs the same words with both and demands the same outcome. What is refused must change nothing.
    pub fn both(&self, words: &str) {
        let before = std::fs::read(self.ours.join(IMAGE)).unwrap();
        let our = ours(&self.ours).words(words).finish();
        let their = theirs(&self.theirs).words(words).finish();
        assert!(
            (our.code, our.out(), our.err()) == (their.code, their.out(), their.err()),
            "{words}\n--- ours\n{our}\n--- qemu-img's\n{their}"
        );
        if our.code != Some(0) {
            let now = std::fs::read(self.ours.join(IMAGE)).unwrap();
            assert!(
                now == before,
                "{words}: refused, and the image is not what it was"
            );
        }
        self.assert_alike(words);
    }

    fn assert_alike(&self, wish: &str) {
        let both = [&self.ours, &self.theirs];
        for run in [ours(&self.ours), theirs(&self.ours)] {
            let check = run.words(&format!("check -q -f qcow2 {IMAGE}")).finish();
            assert_eq!(check.code, Some(0), "{wish}\n{check}");
        }
        let facts = both.map(|scratch| {
            let info = |run: Run| {
                let mut json = run
                    .words(&format!("info --output=json -f qcow2 {IMAGE}"))
                    .ok()
                    .json();
                let map = json.as_object_mut().unwrap();
                map.retain(|name, _| !matches!(name.as_str(), "actual-size" | "children"));
                for snapshot in map
                    .get_mut("snapshots")
                    .into_iter()
                    .flat_map(|list| list.as_array_mut().unwrap())
                {
                    // The setup made each at its own time.
                    snapshot
                        .as_object_mut()
                        .unwrap()
                        .retain(|name, _| !name.starts_with("date"));
                }
                json
            };
            assert_eq!(info(ours(scratch)), info(theirs(scratch)), "{wish}");
            info(theirs(scratch))
        });
        assert_eq!(facts[0], facts[1], "{wish}");
        let names = facts[0]["snapshots"].as_array().cloned().unwrap_or_default();
        let names = names.iter().map(|snapshot| snapshot["id"].as_str().unwrap());
        for from in names.map(|id| format!("-l {id}")).chain([String::new()]) {
            let [first, second] = both.map(|scratch| {
                theirs(scratch)
                    .words(&format!("convert {from} -f qcow2 -O raw {IMAGE} flat.raw"))
                    .ok();
                std::fs::read(scratch.join("flat.raw")).unwrap()
            });
            assert!(first == second, "{wish}: {from} reads as something else");
        }
    }
}

/// Each wish on an image of its own.
fn each(create: &str, setup: Setup, wishes: &[&str]) {
    for wish in wishes {
        Pair::new(create, setup).amend(&format!("-o {wish}"));
    }
}

#[test]
fn amend__plain_images() {
    each(
        "image.qcow2 8M",
        &["write -P 1 0 1M", "write -z 2M 1M"],
        &[
            "refcount_bits=64",
            "refcount_bits=1",
            "refcount_bits=2,lazy_refcounts=on",
            "lazy_refcounts=on",
            "compat=0.10",
            "compat=v2",
            "compat=v3",
            "compat=0.10,compat=1.1",
            "size=0",
            "size=4M",
            "size=80M",
            "size=100M,refcount_bits=1",
            "data_file_raw=off",
        ],
    );
}

#[test]
fn amend__refused() {
    let pair = Pair::new("image.qcow2 8M", &["write -P 1 0 1M"]);
    for wish in [
        "cluster_size=32k",
        "preallocation=full",
        "encryption=on",
        "encrypt.format=luks",
        "encrypt.state=active",
        "compression_type=zstd",
        "extended_l2=on",
        "nocow=on",
        "extent_size_hint=1M",
        "nonesuch=1",
        "nonesuch=1,size=abc",
        "size=abc,nonesuch=1",
        "size=abc",
        "size=1000",
        "refcount_bits=0",
        "refcount_bits=3",
        "refcount_bits=128",
        "refcount_bits=x",
        "refcount_bits=8,compat=v2",
        "lazy_refcounts=maybe",
        "lazy_refcounts=on,compat=v2",
        "compat=7",
        "data_file=foo",
        "data_file=",
        "data_file_raw=on",
        "backing_file=x",
        "backing_fmt=raw",
        "size=16M,backing_file=",
    ] {
        pair.amend(&format!("-o {wish}"));
    }
    for words in ["", "-t bogus -o size=4M", "-o a=b,", "-o , "] {
        pair.amend(words);
    }
    for words in [
        "amend -o size=4M",
        "amend -o size=4M a b",
        "amend -o size=4M absent.qcow2",
        "amend -f vmdk -o help",
    ] {
        let done = same(&pair.ours, words);
        assert_eq!(done.0.code, Some(1), "{words}");
    }
    pair.ours.file("disk.raw", &[0; 4096]);
    for words in ["amend -f raw -o help", "amend -f raw -o size=8k disk.raw"] {
        same(&pair.ours, words);
    }
}

#[test]
fn amend__version_2() {
    each(
        "-o compat=0.10 image.qcow2 8M",
        &[
            "write -P 1 0 1M",
            "img snapshot -c one image.qcow2",
            "write -P 2 512k 1M",
        ],
        &[
            "lazy_refcounts=on",
            "lazy_refcounts=off",
            "refcount_bits=8",
            "compat=v3,refcount_bits=8,lazy_refcounts=on",
            "compat=1.1",
            "compat=0.10",
            "size=16M",
            "size=4M",
            "compat=1.1,size=16M",
        ],
    );
}

#[test]
fn amend__to_version_2() {
    each(
        "-o lazy_refcounts=on image.qcow2 8M",
        &[],
        &["compat=v2", "compat=v2,lazy_refcounts=on", "lazy_refcounts=off"],
    );
    each(
        "-o refcount_bits=8 image.qcow2 8M",
        &[],
        &[
            "compat=v2",
            "compat=v2,refcount_bits=16",
            "compat=v2,refcount_bits=8",
        ],
    );
    each(
        "-o extended_l2=on image.qcow2 8M",
        &["write -z 64k 4k"],
        &["compat=v2", "refcount_bits=1"],
    );
    each("-o compression_type=zstd image.qcow2 8M", &[], &["compat=v2"]);
    each(
        "-o compression_type=zstd image.qcow2 8M",
        &["write -c 0 64k"],
        &["compat=v2"],
    );
    each(
        "-o preallocation=metadata image.qcow2 8M",
        &["write -z 3M 1M"],
        &["compat=v2"],
    );
    let resized: Setup = &["img snapshot -c one image.qcow2", "img resize -q image.qcow2 16M"];
    each(
        "image.qcow2 8M",
        resized,
        &["compat=v2", "compat=v2,size=8M", "size=4M"],
    );
}

#[test]
fn amend__with_snapshots() {
    let setup: Setup = &[
        "write -P 3 0 1M",
        "write -z 3k 100k",
        "img snapshot -c one image.qcow2",
        "write -P 9 0 3k",
        "img snapshot -c two image.qcow2",
        "write -P 8 2k 3k",
        "img snapshot -c three image.qcow2",
    ];
    each(
        "-o cluster_size=512 image.qcow2 2M",
        setup,
        &[
            "compat=v2",
            "refcount_bits=1",
            "refcount_bits=2",
            "refcount_bits=4",
            "refcount_bits=64",
            "refcount_bits=8,size=4M,lazy_refcounts=on",
        ],
    );
    let packed: Setup = &[
        "write -c 0 64k",
        "img snapshot -c one image.qcow2",
        "write -c 64k 64k",
        "write -z 0 64k",
    ];
    each(
        "image.qcow2 8M",
        packed,
        &["compat=v2", "refcount_bits=4", "refcount_bits=1"],
    );
}

#[test]
fn amend__data_files() {
    each(
        "-o data_file=image.data image.qcow2 8M",
        &["write -P 1 0 1M", "write -z 2M 1M"],
        &[
            "compat=v2",
            "refcount_bits=1",
            "data_file_raw=on",
            "data_file_raw=off",
            "size=16M",
            "size=1M",
        ],
    );
    each(
        "-o data_file=image.data,data_file_raw=on image.qcow2 8M",
        &["write -P 1 0 1M"],
        &[
            "compat=v2",
            "data_file_raw=on",
            "data_file_raw=off",
            "size=4M",
            "size=9M",
        ],
    );
    for name in [
        "b.data",
        "a_longer_name_of_the_data_file_which_makes_the_header_reach_into_its_second_sector.data",
    ] {
        let pair = Pair::new("-o data_file=image.data image.qcow2 8M", &["write -P 1 0 1M"]);
        for scratch in [&pair.ours, &pair.theirs] {
            std::fs::copy(scratch.join("image.data"), scratch.join(name)).unwrap();
        }
        pair.amend(&format!("-o data_file={name}"));
    }
}

#[test]
fn amend__with_bitmaps() {
    each(
        "image.qcow2 8M",
        &[
            "img bitmap --add image.qcow2 on",
            "img bitmap --add --disable -g 4k image.qcow2 off",
            "write -P 1 0 1M",
            "write -z 2M 1M",
        ],
        &[
            "compat=v2",
            "refcount_bits=64",
            "lazy_refcounts=on",
            "size=4M",
            "size=16M",
            "size=200M,refcount_bits=1",
        ],
    );
}

#[test]
fn amend__overlays() {
    each(
        "-b base.raw -F raw image.qcow2 2M",
        &["write -z 0 300k", "write -P 5 1M 100k"],
        &[
            "backing_file=",
            "backing_file=base.raw",
            "backing_file=base.raw,backing_fmt=raw",
            "backing_fmt=raw",
            "compat=v2",
            "refcount_bits=64",
            "size=4M",
        ],
    );
}

/// Where a snapshot shares a cluster that reads as zeros since, the real tool writes zeros over what the snapshot has.
#[test]
fn amend__to_version_2_keeps_what_snapshots_hold() {
    let scratch = Scratch::new();
    scratch.file("base.raw", &[3; 2 << 20]);
    theirs(&scratch)
        .words("create -q -f qcow2 -b base.raw -F raw image.qcow2 2M")
        .ok();
    let image = scratch.join(IMAGE);
    oracle::io(&image, "qcow2", ["write -z 0 1M", "write -P 7 1M 100k"]);
    theirs(&scratch).words("snapshot -c one image.qcow2").ok();
    oracle::io(&image, "qcow2", ["write -z 64k 1M"]);
    let read = |from: &str| {
        theirs(&scratch)
            .words(&format!("convert {from} -f qcow2 -O raw image.qcow2 flat.raw"))
            .ok();
        std::fs::read(scratch.join("flat.raw")).unwrap()
    };
    let before = (read("-l one"), read(""));
    ours(&scratch).words("amend -o compat=0.10 image.qcow2").ok();
    assert!((read("-l one"), read("")) == before);
    oracle::assert_clean(&image, "qcow2");
    ours(&scratch).words("check -q image.qcow2").ok();
}

#[test]
fn amend__each_goes_on_where_the_other_stopped() {
    let pair = Pair::new("image.qcow2 8M", &["write -P 1 0 1M"]);
    let steps = [
        "refcount_bits=64",
        "lazy_refcounts=on,size=16M",
        // From one bit to more the real tool takes half a minute.
        "refcount_bits=8",
        "refcount_bits=16,compat=0.10",
        "compat=1.1,refcount_bits=2",
    ];
    let image = pair.ours.join(IMAGE);
    for (number, wish) in steps.iter().enumerate() {
        let run = if number % 2 == 0 {
            ours(&pair.ours)
        } else {
            theirs(&pair.ours)
        };
        run.words(&format!("amend -o {wish} {IMAGE}")).ok();
        oracle::assert_clean(&image, "qcow2");
        ours(&pair.ours).words(&format!("check -q {IMAGE}")).ok();
        let at = number * 700;
        oracle::io(&image, "qcow2", [format!("write -P {} {at}k 900k", number + 2)]);
    }
    for (number, wish) in steps.iter().enumerate() {
        theirs(&pair.theirs)
            .words(&format!("amend -o {wish} {IMAGE}"))
            .ok();
        let at = number * 700;
        oracle::io(
            pair.theirs.join(IMAGE),
            "qcow2",
            [format!("write -P {} {at}k 900k", number + 2)],
        );
    }
    pair.assert_alike("both by turns");
}

#[test]
fn amend__shows_its_progress() {
    let scratch = Scratch::new();
    theirs(&scratch).words("create -q -f qcow2 image.qcow2 8M").ok();
    // Without work that takes time both show the same.
    same(&scratch, "amend -p -o lazy_refcounts=on image.qcow2");
    same(&scratch, "amend -p -q -o lazy_refcounts=off image.qcow2");
    let done = ours(&scratch)
        .words("amend -p -o refcount_bits=64 image.qcow2")
        .ok();
    assert!(done.out().starts_with("    (0.00/100%)\r"), "{done}");
    assert!(done.out().ends_with("    (100.00/100%)\r\n"), "{done}");
    assert_eq!(done.err(), "");
}
