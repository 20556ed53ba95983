//! Every command that writes, stopped half way: no data is lost, whichever command, whichever way and moment.

mod full;
mod kill;

use std::time::{Duration, Instant};

use diskmill_testkit::crash::{Effect, Picture, Tolerance, explains};
use diskmill_testkit::scratch::patch;
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Run, Scratch, oracle};

use crate::tools::{native, ours};

/// A command to be stopped. It works in a folder in which `image` is what it changes.
struct Victim {
    name: &'static str,
    /// Makes the folder.
    make: fn(&Scratch),
    words: &'static str,
    leaves: Leaves,
}

/// What a command leaves when it is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaves {
    /// `new` in this format, complete; or what was there before.
    New(&'static str),
    /// `image`, which reads as before, as after, or, if it settles, as a mix of both. Flags of who shares what may lag
    /// where snapshots are changed.
    Image(Effect),
    /// `image`, which was damaged and reads the same all the time.
    Damaged,
}

impl Victim {
    /// Whether only we have the command, so that the name qemu-img does not.
    fn is_native(&self) -> bool {
        self.words.starts_with("compact")
    }

    fn command(&self, scratch: &Scratch) -> Run {
        let run = if self.is_native() {
            native(scratch)
        } else {
            ours(scratch)
        };
        run.words(self.words)
    }
}

const SIZE: u64 = 12 << 20;

fn disk(scratch: &Scratch) {
    SparseRandom::new(8, SIZE).write_raw(scratch.join("disk.raw"));
}

/// `image`, made of `disk.raw`.
fn image(scratch: &Scratch, options: &str) {
    disk(scratch);
    let extra = ["-o", options];
    let (disk, image) = (scratch.join("disk.raw"), scratch.join("image"));
    oracle::convert(extra, disk, "raw", image, "qcow2");
}

/// As `image`, with two snapshots.
fn kept(scratch: &Scratch, options: &str) {
    image(scratch, options);
    let image = scratch.join("image");
    for (name, step) in [("one", "write -P 3 1M 2M"), ("two", "write -P 4 2M 5M")] {
        oracle::qemu_img().args(["snapshot", "-c", name]).arg(&image).ok();
        oracle::io(&image, "qcow2", [step]);
    }
}

/// `image` over `base`, and `other`, which could be its base too.
fn overlay(scratch: &Scratch) {
    image(scratch, "cluster_size=64k");
    let [image, base, other] = ["image", "base", "other"].map(|name| scratch.join(name));
    std::fs::rename(&image, &base).expect("rename");
    oracle::create(&other, "qcow2", "", "12M");
    oracle::io(&other, "qcow2", ["write -P 9 1M 6M"]);
    oracle::create_overlay(&image, "cluster_size=4k", "base", "qcow2", None);
    oracle::io(
        &image,
        "qcow2",
        ["write -P 3 1M 2M", "write -z 4M 1M", "write -P 4 7M 4M"],
    );
}

const VICTIMS: &[Victim] = &[
    Victim {
        name: "create",
        make: |_| {},
        words: "create -q -f qcow2 -o preallocation=full,cluster_size=4k new 12M",
        leaves: Leaves::New("qcow2"),
    },
    Victim {
        name: "convert, in place",
        make: |scratch| {
            image(scratch, "cluster_size=4k");
            SparseRandom::new(9, SIZE).write_raw(scratch.join("other.raw"));
        },
        words: "convert -n -f raw -O qcow2 other.raw image",
        leaves: Leaves::Image(Effect::Settles),
    },
    Victim {
        name: "resize, growing",
        make: |scratch| image(scratch, "cluster_size=4k"),
        words: "resize -f qcow2 --preallocation=metadata image 100M",
        leaves: Leaves::Image(Effect::Switches),
    },
    Victim {
        name: "resize, shrinking",
        make: |scratch| image(scratch, "cluster_size=4k"),
        words: "resize -f qcow2 --shrink image 5M",
        leaves: Leaves::Image(Effect::Settles),
    },
    Victim {
        name: "snapshot, making",
        make: |scratch| kept(scratch, "cluster_size=4k"),
        words: "snapshot -c three image",
        leaves: Leaves::Image(Effect::Switches),
    },
    Victim {
        name: "snapshot, applying",
        make: |scratch| kept(scratch, "cluster_size=2k,lazy_refcounts=on"),
        words: "snapshot -a one image",
        leaves: Leaves::Image(Effect::Switches),
    },
    Victim {
        name: "snapshot, deleting",
        make: |scratch| kept(scratch, "cluster_size=16k,extended_l2=on"),
        words: "snapshot -d one image",
        leaves: Leaves::Image(Effect::Switches),
    },
    Victim {
        name: "amend, the width of refcounts",
        make: |scratch| kept(scratch, "cluster_size=1k"),
        words: "amend -f qcow2 -o refcount_bits=64 image",
        leaves: Leaves::Image(Effect::Switches),
    },
    Victim {
        name: "amend, the version",
        make: |scratch| image(scratch, "cluster_size=4k,lazy_refcounts=on"),
        words: "amend -f qcow2 -o compat=0.10 image",
        leaves: Leaves::Image(Effect::Switches),
    },
    Victim {
        name: "compact",
        make: |scratch| {
            kept(scratch, "cluster_size=2k");
            oracle::io(
                scratch.join("image"),
                "qcow2",
                ["discard 0 1M", "discard 4M 3M", "write -P 0 9M 1M"],
            );
        },
        words: "compact -f qcow2 image",
        leaves: Leaves::Image(Effect::Switches),
    },
    Victim {
        name: "commit",
        make: |scratch| overlay(scratch),
        words: "commit -q -f qcow2 image",
        leaves: Leaves::Image(Effect::Settles),
    },
    Victim {
        name: "rebase",
        make: |scratch| overlay(scratch),
        words: "rebase -f qcow2 -F qcow2 -b other image",
        leaves: Leaves::Image(Effect::Settles),
    },
    Victim {
        name: "check, repairing",
        make: |scratch| {
            kept(scratch, "cluster_size=1k");
            // The refcount table is at cluster 1 of a new image: all counts are gone.
            patch(scratch.join("image"), 1024, &[0; 1024]);
        },
        words: "check -q -f qcow2 -r all image",
        leaves: Leaves::Damaged,
    },
    Victim {
        name: "dd",
        make: |scratch| image(scratch, "cluster_size=4k"),
        words: "dd -f qcow2 -O qcow2 bs=64k if=image of=new",
        leaves: Leaves::New("qcow2"),
    },
    Victim {
        name: "bitmap",
        make: |scratch| {
            image(scratch, "cluster_size=512");
            let image = scratch.join("image");
            oracle::qemu_img()
                .words("bitmap --add -g 512")
                .arg(&image)
                .arg("one")
                .ok();
            oracle::io(&image, "qcow2", ["write -P 1 1M 4M", "write -P 2 8M 1M"]);
        },
        words: "bitmap --add --merge one -g 1024 image two",
        leaves: Leaves::Image(Effect::Flows),
    },
];

/// What QEMU reads of `image`: the disk, and all snapshots.
fn look(scratch: &Scratch) -> Picture {
    let (path, raw) = (scratch.join("image"), scratch.join("seen.raw"));
    let read = |extra: &[&str]| {
        oracle::convert(extra, &path, "qcow2", &raw, "raw");
        let bytes = std::fs::read(&raw).expect("read");
        std::fs::remove_file(&raw).expect("remove");
        bytes
    };
    let mut picture = Picture::of(read(&[]));
    let info = oracle::info(&path, "qcow2", false);
    for snapshot in info["snapshots"].as_array().into_iter().flatten() {
        let name = snapshot["name"].as_str().expect("a name");
        picture.snapshots.insert(name.to_owned(), read(&["-l", name]));
    }
    for bitmap in info["format-specific"]["data"]["bitmaps"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let name = bitmap["name"].as_str().expect("a name");
        picture
            .traits
            .insert(name.to_owned(), bitmap["flags"].to_string());
    }
    picture
}

fn copy(from: &Scratch) -> Scratch {
    let to = Scratch::beneath("/dev/shm");
    for name in from.names() {
        std::fs::copy(from.join(&name), to.join(&name)).expect("copy");
    }
    to
}

/// Demands that the image of the folder is sound, or is once it is repaired. Returns whether it was repaired.
fn mend(scratch: &Scratch, tolerance: Tolerance, seen: &str) -> bool {
    let done = ours(scratch).words("check -f qcow2 image").finish();
    match done.code {
        Some(0) => return false,
        Some(3) => {}
        Some(2) if tolerance != Tolerance::Leaks => {}
        Some(1) if tolerance == Tolerance::Damage => {}
        _ => panic!("{seen}: {done}"),
    }
    ours(scratch).words("check -q -f qcow2 -r all image").finish();
    ours(scratch).words("check -f qcow2 image").ok();
    oracle::assert_clean(scratch.join("image"), "qcow2");
    true
}

/// A command about to be stopped: its folder before and, had it been left alone, after, and what was to be seen then.
struct Case {
    victim: &'static Victim,
    before: Scratch,
    after: Scratch,
    shown: Option<(Picture, Picture)>,
    /// How long it takes.
    whole: Duration,
}

impl Case {
    fn new(victim: &'static Victim) -> Self {
        let before = Scratch::beneath("/dev/shm");
        (victim.make)(&before);
        let after = copy(&before);
        let started = Instant::now();
        victim.command(&after).ok();
        let whole = started.elapsed();
        let shown = match victim.leaves {
            Leaves::New(_) => None,
            Leaves::Image(_) | Leaves::Damaged => Some((look(&before), look(&after))),
        };
        Self {
            victim,
            before,
            after,
            shown,
            whole,
        }
    }

    /// Demands that what the command left in the folder `work` is whole. Returns whether it had to be repaired.
    fn judge(&self, work: &Scratch, seen: &str) -> bool {
        match (self.victim.leaves, &self.shown) {
            (leaves @ (Leaves::Image(_) | Leaves::Damaged), Some((before, after))) => {
                let (effect, tolerance) = match leaves {
                    Leaves::Image(effect) if self.victim.words.starts_with("snapshot") => {
                        (effect, Tolerance::LaggingFlags)
                    }
                    Leaves::Image(effect) => (effect, Tolerance::Leaks),
                    _ => (Effect::Switches, Tolerance::Damage),
                };
                let check = |when: &str| {
                    explains(before, effect, after, &look(work))
                        .unwrap_or_else(|text| panic!("{seen}, {when}: {text}"));
                };
                check("as it was left");
                let mended = mend(work, tolerance, seen);
                if mended {
                    check("repaired");
                }
                mended
            }
            (Leaves::Image(_) | Leaves::Damaged, None) => panic!("{seen}: nothing to compare with"),
            (Leaves::New(format), _) => {
                match std::fs::read(work.join("new")) {
                    Ok(bytes) if bytes == b"precious" => {}
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Ok(_) => {
                        oracle::assert_identical(work.join("new"), format, self.after.join("new"), format)
                    }
                    Err(error) => panic!("{seen}: {error}"),
                }
                false
            }
        }
    }
}
