//! Commit and rebase: the same steps by both tools on two copies of a chain end in the same disks and the same
//! descriptions, and both checkers find nothing; killed at any moment, nothing is lost and the same command does the rest.

use std::path::Path;
use std::time::Duration;

use diskmill_testkit::random::{seed, soak};
use diskmill_testkit::sparse_random::{SparseRandom, mix};
use diskmill_testkit::{Finished, Scratch, oracle};
use serde_json::Value;

use crate::disk::Loop;
use crate::tools::{native, ours, same_json, theirs};

const SIZE: u64 = 3 << 20;

/// A chain of images: each with its format, the options it is made with and its size, the base first.
#[derive(Clone, Copy)]
struct Layer {
    name: &'static str,
    format: &'static str,
    /// Flags of `convert` for the base, options of `create` for overlays.
    options: &'static str,
    size: &'static str,
}

const fn layer(name: &'static str, format: &'static str, options: &'static str, size: &'static str) -> Layer {
    Layer {
        name,
        format,
        options,
        size,
    }
}

const RAW: Layer = layer("base", "raw", "", "3M");
const PLAIN: Layer = layer("base", "qcow2", "", "3M");
const MID: Layer = layer("mid", "qcow2", "", "");
const TOP: Layer = layer("top", "qcow2", "", "");

/// The chains that are merged, by what is special about them.
const CHAINS: &[(&str, &[Layer])] = &[
    ("raw", &[RAW, TOP]),
    ("qcow2", &[PLAIN, MID, TOP]),
    (
        "compressed zstd",
        &[
            layer("base", "qcow2", "-c -o compression_type=zstd", "3M"),
            MID,
            TOP,
        ],
    ),
    (
        "version 2",
        &[
            layer("base", "qcow2", "-o compat=0.10", "3M"),
            layer("mid", "qcow2", "compat=0.10", ""),
            layer("top", "qcow2", "compat=0.10", ""),
        ],
    ),
    (
        "small over large clusters",
        &[
            layer("base", "qcow2", "-o cluster_size=2M", "3M"),
            layer("mid", "qcow2", "cluster_size=512", ""),
            layer("top", "qcow2", "cluster_size=4k", ""),
        ],
    ),
    (
        "large over small clusters",
        &[
            layer("base", "qcow2", "-o cluster_size=512", "3M"),
            layer("mid", "qcow2", "cluster_size=64k", ""),
            layer("top", "qcow2", "cluster_size=2M", ""),
        ],
    ),
    (
        "subclusters",
        &[
            layer("base", "qcow2", "-o extended_l2=on,cluster_size=128k", "3M"),
            layer("mid", "qcow2", "extended_l2=on", ""),
            layer("top", "qcow2", "extended_l2=on,cluster_size=16k", ""),
        ],
    ),
    (
        "longer overlay",
        &[
            layer("base", "raw", "", "1M"),
            layer("mid", "qcow2", "", "2M"),
            layer("top", "qcow2", "", "3M"),
        ],
    ),
    (
        "shorter overlay",
        &[
            RAW,
            layer("mid", "qcow2", "", "1M"),
            layer("top", "qcow2", "", "2560k"),
        ],
    ),
    (
        "short in the middle",
        &[
            PLAIN,
            layer("mid", "qcow2", "", "1M"),
            layer("top", "qcow2", "", "3M"),
        ],
    ),
    (
        "data file",
        &[RAW, layer("top", "qcow2", "data_file=top.data", "")],
    ),
    (
        "odd sizes",
        &[
            layer("base", "raw", "", "1049088"),
            layer("mid", "qcow2", "cluster_size=4k", "1572352"),
            layer("top", "qcow2", "", "1573376"),
        ],
    ),
];

impl Layer {
    fn file(self) -> String {
        format!("{}.{}", self.name, self.format)
    }
}

/// Two folders with the same chain: ours and theirs.
struct Twins {
    ours: Scratch,
    theirs: Scratch,
    chain: &'static [Layer],
}

impl Twins {
    fn make(chain: &'static [Layer]) -> Self {
        let (mine, other) = (Scratch::new(), Scratch::new());
        let mut state = seed();
        let mut below: Option<Layer> = None;
        for layer in chain {
            let file = layer.file();
            match below {
                None => {
                    let size = diskmill_core::parse_size(layer.size).unwrap();
                    SparseRandom::new(7, size).write_raw(mine.join("disk.raw"));
                    theirs(&mine)
                        .words(&format!(
                            "convert {} -f raw -O {} disk.raw {file}",
                            layer.options, layer.format
                        ))
                        .ok();
                    std::fs::remove_file(mine.join("disk.raw")).unwrap();
                }
                Some(below) => {
                    let options = match layer.options {
                        "" => String::new(),
                        options => format!("-o {options}"),
                    };
                    theirs(&mine)
                        .words(&format!(
                            "create -q -f qcow2 {options} -b {} -F {} {file} {}",
                            below.file(),
                            below.format,
                            layer.size
                        ))
                        .ok();
                    change(&mine.join(&file), &mut state);
                }
            }
            below = Some(*layer);
        }
        let twins = Self {
            ours: mine,
            theirs: other,
            chain,
        };
        twins.again();
        twins
    }

    /// Gives the real tool a fresh copy of our files.
    fn again(&self) {
        for name in self.ours.names() {
            std::fs::copy(self.ours.join(&name), self.theirs.join(&name)).unwrap();
        }
    }

    fn top(&self) -> String {
        self.chain[self.chain.len() - 1].file()
    }

    /// Both do the same, with the same words and the same exit code.
    fn both(&self, words: &str) -> Finished {
        let our = ours(&self.ours).words(words).finish();
        let their = theirs(&self.theirs).words(words).finish();
        assert!(
            our.code == their.code && our.out() == their.out() && our.err() == their.err(),
            "not the same\n--- ours\n{our}\n--- qemu-img's\n{their}"
        );
        our
    }

    /// All images, or only those in `some`, read the same, are described the same and are sound.
    fn assert_alike(&self, what: &str, some: &[&str]) {
        for layer in self.chain {
            let file = layer.file();
            if !some.is_empty() && !some.contains(&file.as_str()) {
                continue;
            }
            assert!(
                oracle::identical(
                    self.ours.join(&file),
                    layer.format,
                    self.theirs.join(&file),
                    layer.format
                ),
                "{what}: {file} differs"
            );
            assert_eq!(
                described(&self.ours.join(&file), layer.format),
                described(&self.theirs.join(&file), layer.format),
                "{what}: {file}"
            );
            if layer.format == "qcow2" {
                oracle::assert_clean(self.ours.join(&file), "qcow2");
                ours(&self.ours).words(&format!("check -q -f qcow2 {file}")).ok();
            }
        }
    }
}

/// What `info` says, apart from how much room things take.
fn described(path: &Path, format: &str) -> Value {
    let mut info = oracle::info(path, format, false);
    for key in ["actual-size", "children", "filename", "full-backing-filename"] {
        info.as_object_mut().unwrap().remove(key);
    }
    info
}

/// Writes data, zeros and discards at places a seed chooses.
fn change(path: &Path, state: &mut u64) {
    let size = oracle::info(path, "qcow2", false)["virtual-size"]
        .as_u64()
        .unwrap();
    let mut commands = Vec::new();
    for index in 0..8 {
        *state = mix(*state);
        let at = *state % (size - 512) / 512 * 512;
        let len = (1 + (*state >> 32) % 400) * 512;
        let len = len.min(size - at);
        commands.push(match index {
            2 => format!("write -z {at} {len}"),
            5 => format!("write -z -u {at} {len}"),
            6 => format!("discard {at} {len}"),
            _ => format!("write -P {} {at} {len}", 1 + *state % 250),
        });
    }
    oracle::io(path, "qcow2", commands);
}

#[test]
fn commit__ends_as_the_real_one_does() {
    let ways = ["commit -f qcow2", "commit -f qcow2 -d", "commit -f qcow2 -t none"];
    for (index, (what, chain)) in CHAINS.iter().enumerate() {
        let words = ways[index % 3];
        let twins = Twins::make(chain);
        let top = twins.top();
        let before = oracle::guest_sha256(twins.ours.join(&top), "qcow2");
        let done = twins.both(&format!("{words} {top}"));
        assert_eq!(done.out(), "Image committed.\n", "{done}");
        twins.assert_alike(what, &[]);
        assert_eq!(
            before,
            oracle::guest_sha256(twins.ours.join(&top), "qcow2"),
            "{what}, {words}"
        );
        same_json(&twins.ours, &format!("map --output=json -f qcow2 {top}"));
    }
}

#[test]
fn commit__down_to_an_image_further_below() {
    for (index, (what, chain)) in CHAINS
        .iter()
        .enumerate()
        .filter(|(_, (_, chain))| chain.len() == 3)
    {
        let bases = [format!("./{}", chain[0].file()), chain[1].file(), chain[0].file()];
        let more = if soak() > 1 { &bases[..] } else { &[] };
        for base in [&bases[index % 3]].into_iter().chain(more) {
            let twins = Twins::make(chain);
            let top = twins.top();
            let before = std::fs::read(twins.ours.join(&top)).unwrap();
            twins.both(&format!("commit -f qcow2 -b {base} {top}"));
            assert!(
                std::fs::read(twins.ours.join(&top)).unwrap() == before,
                "{what}: the overlay was touched"
            );
            twins.assert_alike(what, &[]);
        }
    }
}

/// A name that is right from the working directory, and not from that of the image, names no base.
#[test]
fn commit__takes_the_name_of_a_base_from_where_the_image_is() {
    let twins = Twins::make(CHAINS[0].1);
    for scratch in [&twins.ours, &twins.theirs] {
        std::fs::create_dir(scratch.join("sub")).unwrap();
        for name in ["base.raw", "top.qcow2"] {
            std::fs::rename(scratch.join(name), scratch.join("sub").join(name)).unwrap();
        }
    }
    assert_eq!(twins.both("commit -b sub/base.raw sub/top.qcow2").code, Some(1));
    assert_eq!(twins.both("commit -b base.raw sub/top.qcow2").code, Some(0));
}

#[test]
fn commit__refuses_what_the_real_one_refuses() {
    let twins = Twins::make(CHAINS[1].1);
    for words in [
        "commit",
        "commit a b",
        "commit missing",
        "commit -f qcow2 -b nope top.qcow2",
        "commit -b top.qcow2 top.qcow2",
        "commit -f qcow2 base.qcow2",
        "commit -f raw top.qcow2",
        "commit -f nofmt top.qcow2",
        "commit -t bogus top.qcow2",
        "commit -r x top.qcow2",
        "commit -r -1 top.qcow2",
        "commit -Z top.qcow2",
        "commit -q -d top.qcow2",
    ] {
        twins.both(words);
    }
    twins.assert_alike("refusals", &[]);
    let done = native(&twins.ours).words("commit --output=json top.qcow2").ok();
    assert_eq!(done.json()["emptied"], true, "{done}");
}

/// Makes another image to be backed by: some of it like the base, some not, and of another size.
fn other(twins: &Twins, format: &str, flags: &str, size: u64) {
    let mut bytes = vec![0; size as usize];
    let base = twins.chain[0];
    oracle::convert(
        ["-S", "4k"],
        twins.ours.join(base.file()),
        base.format,
        twins.ours.join("x.raw"),
        "raw",
    );
    let known = std::fs::read(twins.ours.join("x.raw")).unwrap();
    for (index, (to, from)) in bytes.chunks_mut(50_000).zip(known.chunks(50_000)).enumerate() {
        match index % 3 {
            0 => to.copy_from_slice(
                &from[..to.len().min(from.len())]
                    .iter()
                    .copied()
                    .chain(std::iter::repeat(9))
                    .take(to.len())
                    .collect::<Vec<u8>>(),
            ),
            1 => to.fill(index as u8),
            _ => {}
        }
    }
    std::fs::write(twins.ours.join("x.raw"), &bytes).unwrap();
    theirs(&twins.ours)
        .words(&format!(
            "convert {flags} -f raw -O {format} x.raw other.{format}"
        ))
        .ok();
    std::fs::remove_file(twins.ours.join("x.raw")).unwrap();
    twins.again();
}

#[test]
fn rebase__ends_as_the_real_one_does() {
    let targets = [
        ("raw", "", SIZE),
        ("qcow2", "-c", SIZE),
        ("raw", "", 700_416),
        ("qcow2", "-o cluster_size=512", 5 << 20),
    ];
    for (index, (what, chain)) in CHAINS.iter().enumerate() {
        let (format, flags, size) = targets[index % 4];
        let twins = Twins::make(chain);
        let top = twins.top();
        other(&twins, format, flags, size);
        let before = oracle::guest_sha256(twins.ours.join(&top), "qcow2");
        let what = format!("{what} to {format} {flags} of {size}");
        twins.both(&format!("rebase -f qcow2 -b other.{format} -F {format} {top}"));
        twins.assert_alike(&what, &[&top]);
        assert_eq!(
            before,
            oracle::guest_sha256(twins.ours.join(&top), "qcow2"),
            "{what}"
        );
        if index % 3 != 0 && soak() == 1 {
            continue;
        }
        // And to nothing.
        twins.both(&format!("rebase -f qcow2 -b  {top}").replace("-b  ", "--backing= "));
        twins.assert_alike(&what, &[&top]);
        assert_eq!(
            before,
            oracle::guest_sha256(twins.ours.join(&top), "qcow2"),
            "{what}, to nothing"
        );
        // From nothing, zeros must hide what the new image has.
        twins.both(&format!("rebase -f qcow2 -b other.{format} -F {format} {top}"));
        twins.assert_alike(&what, &[&top]);
        assert_eq!(
            before,
            oracle::guest_sha256(twins.ours.join(&top), "qcow2"),
            "{what}, from nothing"
        );
    }
}

#[test]
fn rebase__past_an_image_between_copies_only_what_that_has() {
    for (what, chain) in CHAINS.iter().filter(|(_, chain)| chain.len() == 3) {
        let twins = Twins::make(chain);
        let (base, top) = (chain[0], twins.top());
        let before = oracle::guest_sha256(twins.ours.join(&top), "qcow2");
        twins.both(&format!(
            "rebase -f qcow2 -b {} -F {} {top}",
            base.file(),
            base.format
        ));
        twins.assert_alike(what, &[&top]);
        assert_eq!(
            before,
            oracle::guest_sha256(twins.ours.join(&top), "qcow2"),
            "{what}"
        );
        let allocated = |scratch: &Scratch| {
            let (report, _) = oracle::check(scratch.join(&top), "qcow2");
            report["allocated-clusters"].as_u64().unwrap_or(0)
        };
        assert!(
            allocated(&twins.ours) <= allocated(&twins.theirs),
            "{what}: more was copied"
        );
    }
}

#[test]
fn rebase__compresses_what_it_writes() {
    for (what, chain) in CHAINS.iter().filter(|(what, _)| *what != "data file") {
        let twins = Twins::make(chain);
        let top = twins.top();
        other(&twins, "raw", "", SIZE);
        let before = oracle::guest_sha256(twins.ours.join(&top), "qcow2");
        ours(&twins.ours)
            .words(&format!("rebase -c -f qcow2 -b other.raw -F raw {top}"))
            .ok();
        assert_eq!(
            before,
            oracle::guest_sha256(twins.ours.join(&top), "qcow2"),
            "{what}"
        );
        oracle::assert_clean(twins.ours.join(&top), "qcow2");
        let (report, _) = oracle::check(twins.ours.join(&top), "qcow2");
        // Elsewhere it holds all of its few clusters itself.
        let has_room = *what != "large over small clusters";
        assert!(
            !has_room || report["compressed-clusters"].as_u64() > Some(0),
            "{what}: nothing is compressed"
        );
    }
}

#[test]
fn rebase__by_name_only() {
    let twins = Twins::make(CHAINS[1].1);
    for words in [
        "rebase -u -b nowhere -F raw top.qcow2",
        "rebase -u -b nowhere-at-all -F vhdx top.qcow2",
        "rebase -u top.qcow2",
        "rebase -u -b base.qcow2 -F qcow2 top.qcow2",
        "rebase -u --backing= -F raw top.qcow2",
        "rebase -u -c -p -b mid.qcow2 -F qcow2 top.qcow2",
    ] {
        twins.both(words);
        assert_eq!(
            described(&twins.ours.join("top.qcow2"), "qcow2"),
            described(&twins.theirs.join("top.qcow2"), "qcow2"),
            "{words}"
        );
    }
    twins.assert_alike("by name only", &[]);
}

#[test]
fn rebase__refuses_what_the_real_one_refuses() {
    let twins = Twins::make(CHAINS[1].1);
    other(&twins, "raw", "", SIZE);
    let long = "x".repeat(1024);
    let too_long = format!("rebase -u -b {long} -F raw top.qcow2");
    for words in [
        "rebase",
        "rebase top.qcow2",
        "rebase -b other.raw",
        "rebase -F raw top.qcow2",
        "rebase -b nosuch -F raw top.qcow2",
        "rebase -b sub/../nosuch -F raw top.qcow2",
        "rebase -b other.raw -F nofmt top.qcow2",
        "rebase -u -b other.raw -F nofmt top.qcow2",
        "rebase -u -b other.raw top.qcow2",
        "rebase -b base.qcow2 -F qcow2 -f raw other.raw",
        "rebase -u -b x -F raw -f raw other.raw",
        "rebase -b other.raw -F qcow2 top.qcow2",
        "rebase -b top.qcow2 -F qcow2 top.qcow2",
        "rebase -B other.raw -F raw top.qcow2",
        "rebase -t bogus -b other.raw -F raw top.qcow2",
        "rebase -T bogus -b other.raw -F raw top.qcow2",
        &too_long,
    ] {
        let done = twins.both(words);
        assert_eq!(done.code, Some(1), "{done}");
    }
    twins.assert_alike("refusals", &[]);
}

#[test]
fn merging__on_a_block_device() {
    let twins = Twins::make(&[RAW, TOP]);
    let devices = [&twins.ours, &twins.theirs].map(|scratch| {
        let device = Loop::attach(&scratch.join("base.raw"));
        let over = format!("rebase -u -b {} -F raw top.qcow2", device.0);
        theirs(scratch).words(&over).ok();
        device
    });
    let before = oracle::guest_sha256(twins.ours.join("top.qcow2"), "qcow2");
    twins.both("commit -f qcow2 top.qcow2");
    assert_eq!(
        before,
        oracle::guest_sha256(twins.ours.join("top.qcow2"), "qcow2")
    );
    oracle::assert_identical(&devices[0].0, "raw", &devices[1].0, "raw");
    oracle::assert_clean(twins.ours.join("top.qcow2"), "qcow2");
    // A device does not grow.
    for scratch in [&twins.ours, &twins.theirs] {
        theirs(scratch).words("resize -q -f qcow2 top.qcow2 +1M").ok();
        oracle::io(scratch.join("top.qcow2"), "qcow2", ["write -P 5 3M 64k"]);
    }
    let done = ours(&twins.ours)
        .words("commit -f qcow2 top.qcow2")
        .finish()
        .expect(1);
    theirs(&twins.theirs)
        .words("commit -f qcow2 top.qcow2")
        .finish()
        .expect(1);
    assert_eq!(done.out(), "", "{done}");
    oracle::io(twins.ours.join("top.qcow2"), "qcow2", ["read -P 5 3M 64k"]);
    // Away from the device.
    ours(&twins.ours)
        .words("rebase -f qcow2 --backing= top.qcow2")
        .ok();
    oracle::io(twins.ours.join("top.qcow2"), "qcow2", ["read -P 5 3M 64k"]);
    oracle::assert_clean(twins.ours.join("top.qcow2"), "qcow2");
}

/// Fifty images deep, through every command.
#[test]
fn merging__fifty_images_deep() {
    let scratch = Scratch::new();
    SparseRandom::new(3, SIZE).write_raw(scratch.join("base.raw"));
    let mut below = ("base.raw".to_owned(), "raw");
    for depth in 0..50 {
        let name = format!("{depth}.qcow2");
        let size = if depth % 7 == 3 { "2M" } else { "3M" };
        let options = [
            "cluster_size=64k",
            "cluster_size=4k",
            "extended_l2=on",
            "compat=0.10",
        ][depth % 4];
        theirs(&scratch)
            .words(&format!(
                "create -q -f qcow2 -o {options} -b {} -F {} {name} {size}",
                below.0, below.1
            ))
            .ok();
        oracle::io(
            scratch.join(&name),
            "qcow2",
            [format!("write -P {} {}k 5k", depth + 1, depth * 37)],
        );
        below = (name, "qcow2");
    }
    let top = "49.qcow2";
    let before = oracle::guest_sha256(scratch.join(top), "qcow2");
    same_json(
        &scratch,
        &format!("info --backing-chain --output=json -f qcow2 {top}"),
    );
    same_json(&scratch, &format!("map --output=json -f qcow2 {top}"));
    same_json(&scratch, &format!("check --output=json -f qcow2 {top}"));
    ours(&scratch)
        .words(&format!("convert -f qcow2 -O raw {top} flat.raw"))
        .ok();
    ours(&scratch)
        .words(&format!("compare -f qcow2 -F raw {top} flat.raw"))
        .ok();
    ours(&scratch)
        .words(&format!("dd -f qcow2 -O raw bs=64k skip=3 if={top} of=part.raw"))
        .ok();
    let flat = std::fs::read(scratch.join("flat.raw")).unwrap();
    assert!(std::fs::read(scratch.join("part.raw")).unwrap() == flat[3 << 16..]);
    std::fs::copy(scratch.join(top), scratch.join("kept.qcow2")).unwrap();
    ours(&scratch)
        .words(&format!("rebase -f qcow2 -b 20.qcow2 -F qcow2 {top}"))
        .ok();
    assert_eq!(
        before,
        oracle::guest_sha256(scratch.join(top), "qcow2"),
        "rebased"
    );
    ours(&scratch)
        .words(&format!("commit -q -f qcow2 -b 5.qcow2 {top}"))
        .ok();
    assert_eq!(
        before,
        oracle::guest_sha256(scratch.join(top), "qcow2"),
        "committed"
    );
    oracle::assert_identical(scratch.join("flat.raw"), "raw", scratch.join("5.qcow2"), "qcow2");
    ours(&scratch)
        .words("commit -q -f qcow2 -b base.raw kept.qcow2")
        .ok();
    assert_eq!(before, oracle::guest_sha256(scratch.join("base.raw"), "raw"));
    for depth in [5, 20, 49] {
        oracle::assert_clean(scratch.join(format!("{depth}.qcow2")), "qcow2");
    }
}

/// The overlay reads the same and is sound, if not tidy, whenever the command is stopped; run again it comes to its end.
fn killed(chain: &'static [Layer], words: &str, rounds: u64) {
    let mut state = seed();
    let mut stopped = 0;
    for round in 0..rounds * u64::from(soak()) {
        let twins = Twins::make(chain);
        let (scratch, top) = (&twins.ours, twins.top());
        other(&twins, "raw", "", SIZE);
        let before = oracle::guest_sha256(scratch.join(&top), "qcow2");
        let line = format!("{words} {top}");
        for _ in 0..2 {
            state = mix(state);
            let wait = Duration::from_micros(state % 40_000);
            let mut child = ours(scratch).words(&line).spawn();
            std::thread::sleep(wait);
            child.kill().unwrap();
            let status = child.wait_with_output().unwrap().status;
            stopped += u64::from(!status.success());
            let seen = format!(
                "{line} killed after {wait:?}, seed {}, round {round}: {status}",
                seed()
            );
            assert_eq!(
                before,
                oracle::guest_sha256(scratch.join(&top), "qcow2"),
                "{seen}"
            );
            for layer in chain.iter().filter(|layer| layer.format == "qcow2") {
                let (report, code) = oracle::check(scratch.join(layer.file()), "qcow2");
                assert!(
                    matches!(code, 0 | 3),
                    "{seen}: {} is corrupt: {report}",
                    layer.file()
                );
            }
        }
        ours(scratch).words(&line).ok();
        assert_eq!(
            before,
            oracle::guest_sha256(scratch.join(&top), "qcow2"),
            "{line}, run again"
        );
        theirs(&twins.theirs).words(&line).ok();
        for layer in chain {
            let (file, format) = (layer.file(), layer.format);
            let alike = oracle::identical(scratch.join(&file), format, twins.theirs.join(&file), format);
            assert!(
                alike,
                "{line}: {file} differs from what the real tool makes of it"
            );
        }
    }
    assert!(stopped > 0, "{words} was never stopped half way");
}

#[test]
fn commit__killed_at_random() {
    killed(CHAINS[1].1, "commit -q -r 20M -f qcow2", 6);
    killed(CHAINS[7].1, "commit -q -r 20M -f qcow2", 4);
}

#[test]
fn rebase__killed_at_random() {
    killed(CHAINS[1].1, "rebase -f qcow2 -b other.raw -F raw", 6);
    killed(CHAINS[3].1, "rebase -f qcow2 -b other.raw -F raw", 4);
}
