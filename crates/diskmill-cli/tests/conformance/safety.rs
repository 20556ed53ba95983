//! Every command that writes, stopped half way: no data is lost, whichever command, whichever way and moment.

mod full;
mod kill;

use std::time::{Duration, Instant};

use diskmill_testkit::crash::{Effect, Picture, explains};
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, oracle};

use crate::tools::ours;

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
fn mend(scratch: &Scratch, may_lag: bool, seen: &str) -> bool {
    let done = ours(scratch).words("check -f qcow2 image").finish();
    match done.code {
        Some(0) => return false,
        Some(3) => {}
        Some(2) if may_lag => {}
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
        ours(&after).words(victim.words).ok();
        let whole = started.elapsed();
        let shown = match victim.leaves {
            Leaves::New(_) => None,
            Leaves::Image(_) => Some((look(&before), look(&after))),
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
            (Leaves::Image(effect), Some((before, after))) => {
                let check = |when: &str| {
                    explains(before, effect, after, &look(work))
                        .unwrap_or_else(|text| panic!("{seen}, {when}: {text}"));
                };
                check("as it was left");
                let mended = mend(work, self.victim.words.starts_with("snapshot"), seen);
                if mended {
                    check("repaired");
                }
                mended
            }
            (Leaves::Image(_), None) => panic!("{seen}: nothing to compare with"),
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
