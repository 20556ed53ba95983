//! The operations that are put to the test.

use diskmill::open::{self, Base, OpenRequest};
use diskmill::ops::amend::{self, AmendRequest};
use diskmill::ops::check;
use diskmill::ops::commit::{self, CommitRequest};
use diskmill::ops::compact;
use diskmill::ops::convert::{self, ExistingImage, Input, NewImage, Output, Plan};
use diskmill::ops::create::{self, CreateRequest};
use diskmill::ops::rebase::{self, RebaseRequest};
use diskmill::ops::resize::{self, NewSize, Preallocation, ResizeRequest};
use diskmill::ops::snapshot::{self, Action};
use diskmill::spec::ImageSpec;
use diskmill_core::{
    Bitmaps, CompactSpec, Compression, Error, ErrorKind, GuestOffset, Job, NewBitmap, Options, Repair, Result,
};
use diskmill_testkit::crash::Effect;
use diskmill_testkit::scratch::{patch, peek};
use diskmill_testkit::{Scratch, oracle};

use super::rewrite;
use super::world::{Operation, Outcome, World};

/// Repairs everything in every image.
pub fn repair(world: &World) -> Result<()> {
    for name in world.scratch.names() {
        if !name.ends_with("raw") && !name.ends_with("data") {
            let report = check::repair(
                &world.request(&name),
                Repair::All,
                check::Reach::Ours,
                Job::silent(),
            )?
            .report;
            if report.check_errors + report.corruptions + report.leaks > 0 {
                // What could not be done is in the report, from which the command makes its exit code.
                let text = format!("{:?}", report.findings.first());
                return Err(Error::new(ErrorKind::Io, text).path(world.scratch.join(name)));
            }
        }
    }
    Ok(())
}

/// A raw disk of 300 KiB called `disk.raw`.
fn disk(scratch: &Scratch) {
    let bytes: Vec<u8> = (0..300_u64 << 10).map(|at| (at / 700 % 250) as u8 + 1).collect();
    scratch.file("disk.raw", &bytes);
}

/// A disk with data, zeros and holes called `image`.
fn used(scratch: &Scratch, options: &str) {
    let image = scratch.join("image");
    oracle::create(&image, "qcow2", options, "300k");
    let steps = [
        "write -P 1 20k 60k",
        "write -P 2 130k 512",
        "write -z 150k 40k",
        "discard 40k 8k",
    ];
    oracle::io(&image, "qcow2", steps);
}

/// As `used`, with two snapshots that share some of it.
fn kept(scratch: &Scratch, options: &str) {
    used(scratch, options);
    let image = scratch.join("image");
    for (name, step) in [("one", "write -P 3 70k 40k"), ("two", "write -P 4 10k 30k")] {
        oracle::qemu_img().args(["snapshot", "-c", name]).arg(&image).ok();
        oracle::io(&image, "qcow2", [step]);
    }
}

fn create(world: &World, options: &str) -> Result<()> {
    let mut request = CreateRequest::new(ImageSpec::from_path(world.scratch.join("new")), "qcow2");
    request.size = Some(1 << 20);
    request.options = Options::parse(options);
    request.around.clone_from(&world.around);
    create::plan(&request)?.run(Job::silent())
}

fn convert(world: &World, source: &str, format: &str, change: impl Fn(&mut Plan)) -> Result<()> {
    let mut new = NewImage::new(ImageSpec::from_path(world.scratch.join("new")), format);
    new.options = Options::parse(if format == "qcow2" { "cluster_size=4k" } else { "" });
    new.around.clone_from(&world.around);
    let input = Input::Image(Box::new(world.request(source)));
    let mut plan = Plan::new(input, Output::New(new));
    change(&mut plan);
    convert::run(&plan, Job::silent()).map(drop)
}

fn resize(world: &World, size: u64, preallocation: Preallocation) -> Result<()> {
    let mut request = ResizeRequest::new(world.request("image"), NewSize::To(size));
    request.preallocation = preallocation;
    request.shrink = true;
    resize::run(&request, &mut |_| {}).map(drop)
}

fn change(world: &World, action: Action) -> Result<()> {
    let request: OpenRequest = world.request("image");
    snapshot::change(&request, &action, &mut |_| {})
}

fn amend(world: &World, options: &str) -> Result<()> {
    let request = AmendRequest::new(world.request("image"), Options::parse(options));
    amend::run(&request, &mut |_| {}, Job::silent())
}

/// `image`, with data, zeros and holes, over an image of this format with data.
fn overlay(scratch: &Scratch, options: &str, format: &str) {
    let base = if format == "raw" { "base.raw" } else { "base" };
    let path = scratch.join(base);
    oracle::create(&path, format, "", "300k");
    oracle::io(&path, format, ["write -P 5 0 90k", "write -P 6 160k 100k"]);
    let image = scratch.join("image");
    oracle::create_overlay(&image, options, base, format, None);
    let steps = [
        "write -P 1 20k 60k",
        "write -P 2 130k 512",
        "write -z 150k 40k",
        "write -z 4k 4k",
    ];
    oracle::io(&image, "qcow2", steps);
}

/// `image`, with a bitmap that is on and one that is off.
fn marked(scratch: &Scratch) {
    used(scratch, "cluster_size=4k");
    let image = scratch.join("image");
    for words in [&["--add", "-g", "4k"][..], &["--add", "--disable", "-g", "512"]] {
        let name = if words.len() == 3 { "one" } else { "two" };
        oracle::qemu_img()
            .arg("bitmap")
            .args(words)
            .arg(&image)
            .arg(name)
            .ok();
    }
    oracle::io(&image, "qcow2", ["write -P 3 70k 40k"]);
}

fn bitmaps(world: &World, change: impl Fn(&dyn Bitmaps) -> Result<()>) -> Result<()> {
    let path = world.scratch.join("image");
    let image = open::image_mut(&world.request("image"))?;
    change(image.top.bitmaps().expect("bitmaps")).map_err(|error| error.path(path))
}

fn commit(world: &World, base: Base) -> Result<()> {
    let mut request = CommitRequest::new(world.request("image"));
    request.base = base;
    commit::run(&request, &mut |_| {}, Job::silent()).map(drop)
}

fn rebase(world: &World, backing: Option<&str>) -> Result<()> {
    let mut request = RebaseRequest::new(world.request("image"));
    request.backing = backing.map(str::to_owned);
    request.format = backing.map(|_| "qcow2".to_owned());
    rebase::run(&request, &mut |_| {}, Job::silent()).map(drop)
}

/// Changes the entry of 16 bits that counts each of these clusters in `image`, which has one refcount block.
fn recount(scratch: &Scratch, clusters: impl IntoIterator<Item = u64>, change: fn(u16) -> u16) {
    let image = scratch.join("image");
    let number = |at| {
        let bytes: [u8; 8] = peek(&image, at, 8).try_into().expect("8 bytes");
        u64::from_be_bytes(bytes)
    };
    // The offset of the refcount table is at byte 48.
    let block = number(number(48));
    for cluster in clusters {
        let at = block + cluster * 2;
        let count: [u8; 2] = peek(&image, at, 2).try_into().expect("2 bytes");
        patch(&image, at, &change(u16::from_be_bytes(count)).to_be_bytes());
    }
}

/// Leaves room at the start of `image`, and space that nothing refers to.
fn scatter(scratch: &Scratch) {
    let steps = [
        "write -P 7 200k 90k",
        "discard 16k 48k",
        "discard 128k 32k",
        "write -P 0 232k 16k",
        "write -P 8 256k 8k",
    ];
    oracle::io(scratch.join("image"), "qcow2", steps);
}

fn scattered(scratch: &Scratch, options: &str) {
    used(scratch, options);
    scatter(scratch);
}

fn compact(world: &World, compress: Option<Compression>) -> Result<()> {
    let mut spec = CompactSpec::default();
    spec.compress = compress;
    compact::run(&world.request("image"), &spec, false, Job::silent()).map(drop)
}

const SWITCHES: Outcome = Outcome::InPlace(Effect::Switches);
const SETTLES: Outcome = Outcome::InPlace(Effect::Settles);

/// All of them.
pub const OPERATIONS: &[Operation] = &[
    Operation {
        name: "create",
        make: |_| {},
        run: |world| create(world, ""),
        outcome: Outcome::New,
    },
    Operation {
        name: "create, preallocated",
        make: |_| {},
        run: |world| create(world, "preallocation=full,cluster_size=4k"),
        outcome: Outcome::New,
    },
    Operation {
        name: "convert to qcow2",
        make: disk,
        run: |world| convert(world, "disk.raw", "qcow2", |_| {}),
        outcome: Outcome::New,
    },
    Operation {
        name: "convert to qcow2, compressed",
        make: disk,
        run: |world| {
            convert(world, "disk.raw", "qcow2", |plan| {
                plan.compress = Some(Compression::default());
            })
        },
        outcome: Outcome::New,
    },
    Operation {
        name: "convert to raw",
        make: |scratch| used(scratch, "cluster_size=4k"),
        run: |world| convert(world, "image", "raw", |_| {}),
        outcome: Outcome::New,
    },
    Operation {
        name: "convert into an existing image",
        make: |scratch| {
            disk(scratch);
            used(scratch, "cluster_size=4k");
        },
        run: |world| {
            let input = Input::Image(Box::new(world.request("disk.raw")));
            let existing = ExistingImage::new(world.request("image"));
            convert::run(&Plan::new(input, Output::Existing(existing)), Job::silent()).map(drop)
        },
        outcome: SETTLES,
    },
    Operation {
        name: "grow",
        make: |scratch| used(scratch, "cluster_size=512"),
        run: |world| resize(world, 9 << 20, Preallocation::Off),
        outcome: SWITCHES,
    },
    Operation {
        name: "grow, preallocated",
        make: |scratch| used(scratch, "cluster_size=4k"),
        run: |world| resize(world, 600 << 10, Preallocation::Full),
        outcome: SWITCHES,
    },
    Operation {
        name: "make a snapshot",
        make: |scratch| kept(scratch, "cluster_size=4k"),
        run: |world| change(world, Action::Create("three".to_owned())),
        outcome: Outcome::Sharing,
    },
    Operation {
        name: "apply a snapshot",
        make: |scratch| kept(scratch, "cluster_size=4k,lazy_refcounts=on"),
        run: |world| change(world, Action::Apply("one".to_owned())),
        outcome: Outcome::Sharing,
    },
    Operation {
        name: "delete a snapshot",
        make: |scratch| kept(scratch, "cluster_size=16k,extended_l2=on"),
        run: |world| change(world, Action::Delete("one".to_owned())),
        outcome: Outcome::Sharing,
    },
    Operation {
        name: "amend to wider refcounts",
        make: |scratch| kept(scratch, "cluster_size=512,refcount_bits=8"),
        run: |world| amend(world, "refcount_bits=64"),
        outcome: SWITCHES,
    },
    Operation {
        name: "amend to narrower refcounts",
        make: |scratch| kept(scratch, "cluster_size=4k,extended_l2=off"),
        run: |world| amend(world, "refcount_bits=2"),
        outcome: SWITCHES,
    },
    Operation {
        name: "amend to version 2",
        make: |scratch| used(scratch, "cluster_size=4k,lazy_refcounts=on,refcount_bits=32"),
        run: |world| amend(world, "compat=0.10,lazy_refcounts=off,refcount_bits=16"),
        outcome: SWITCHES,
    },
    Operation {
        name: "amend to version 3",
        make: |scratch| kept(scratch, "cluster_size=2k,compat=0.10"),
        run: |world| amend(world, "compat=1.1,lazy_refcounts=on,refcount_bits=4"),
        outcome: SWITCHES,
    },
    Operation {
        name: "amend the size",
        make: |scratch| used(scratch, "cluster_size=512"),
        run: |world| amend(world, "size=9M"),
        outcome: SWITCHES,
    },
    Operation {
        name: "compact",
        make: |scratch| scattered(scratch, "cluster_size=4k"),
        run: |world| compact(world, None),
        outcome: SWITCHES,
    },
    Operation {
        name: "compact, small clusters with lazy refcounts",
        make: |scratch| scattered(scratch, "cluster_size=512,lazy_refcounts=on,refcount_bits=64"),
        run: |world| compact(world, None),
        outcome: SWITCHES,
    },
    Operation {
        name: "compact with snapshots",
        make: |scratch| {
            kept(scratch, "cluster_size=2k");
            scatter(scratch);
        },
        run: |world| compact(world, None),
        outcome: SWITCHES,
    },
    Operation {
        name: "compact subclusters",
        make: |scratch| scattered(scratch, "cluster_size=16k,extended_l2=on"),
        run: |world| compact(world, None),
        outcome: SWITCHES,
    },
    Operation {
        name: "compact version 2, compressing",
        make: |scratch| {
            kept(scratch, "compat=0.10,cluster_size=4k");
            scatter(scratch);
        },
        run: |world| compact(world, Some(Compression::default())),
        outcome: SWITCHES,
    },
    Operation {
        name: "compact, compressing with zstd",
        make: |scratch| scattered(scratch, "cluster_size=4k,compression_type=zstd"),
        run: |world| compact(world, Some(Compression::default())),
        outcome: SWITCHES,
    },
    Operation {
        name: "compact compressed clusters",
        make: |scratch| {
            disk(scratch);
            let (disk, image) = (scratch.join("disk.raw"), scratch.join("image"));
            oracle::convert(["-c", "-o", "cluster_size=4k"], disk, "raw", image, "qcow2");
            scatter(scratch);
        },
        run: |world| compact(world, Some(Compression::default())),
        outcome: SWITCHES,
    },
    Operation {
        name: "grow a cow image where it is",
        make: rewrite::make,
        run: |world| resize(world, 900 << 10, Preallocation::Off),
        outcome: SWITCHES,
    },
    Operation {
        name: "commit a cow image",
        make: rewrite::make,
        run: |world| commit(world, Base::Next),
        outcome: SETTLES,
    },
    Operation {
        name: "rebase a cow image to nothing",
        make: rewrite::make,
        run: |world| rebase(world, None),
        outcome: SETTLES,
    },
    Operation {
        name: "convert to qcow, compressed",
        make: disk,
        run: |world| {
            convert(world, "disk.raw", "qcow", |plan| {
                plan.compress = Some(Compression::default());
            })
        },
        outcome: Outcome::New,
    },
    Operation {
        name: "grow a qcow image",
        make: |scratch| rewrite::make_in(scratch, "qcow"),
        run: |world| resize(world, 900 << 10, Preallocation::Off),
        outcome: SWITCHES,
    },
    Operation {
        name: "commit a qcow image",
        make: |scratch| rewrite::make_in(scratch, "qcow"),
        run: |world| commit(world, Base::Next),
        outcome: SETTLES,
    },
    Operation {
        name: "rebase a qcow image to nothing",
        make: |scratch| rewrite::make_in(scratch, "qcow"),
        run: |world| rebase(world, None),
        outcome: SETTLES,
    },
    Operation {
        name: "repair leaks",
        make: |scratch| {
            kept(scratch, "cluster_size=4k");
            recount(scratch, 3..20, |count| count + 1);
        },
        run: repair,
        outcome: Outcome::Repair,
    },
    Operation {
        name: "repair counts that are too low",
        make: |scratch| {
            kept(scratch, "cluster_size=4k");
            recount(scratch, (0..30).step_by(3), |count| count.saturating_sub(1));
        },
        run: repair,
        outcome: Outcome::Repair,
    },
    Operation {
        name: "rebuild refcounts",
        make: |scratch| {
            kept(scratch, "cluster_size=512");
            let image = scratch.join("image");
            // The refcount table is at cluster 1 of a new image.
            patch(&image, 512, &[0; 512]);
        },
        run: repair,
        outcome: Outcome::Repair,
    },
    Operation {
        name: "repair a dirty image",
        make: |scratch| {
            used(scratch, "cluster_size=16k,extended_l2=on,lazy_refcounts=on");
            recount(scratch, 4..9, |_| 0);
            // Incompatible features: dirty.
            patch(
                scratch.join("image"),
                79,
                &[peek(scratch.join("image"), 79, 1)[0] | 1],
            );
        },
        run: repair,
        outcome: Outcome::Repair,
    },
    Operation {
        name: "commit",
        make: |scratch| overlay(scratch, "cluster_size=4k", "qcow2"),
        run: |world| commit(world, Base::Next),
        outcome: SETTLES,
    },
    Operation {
        name: "commit to a raw image that is shorter",
        make: |scratch| {
            overlay(scratch, "cluster_size=16k,extended_l2=on", "raw");
            oracle::qemu_img()
                .args(["resize", "-q", "-f", "qcow2"])
                .arg(scratch.join("image"))
                .arg("400k")
                .ok();
            oracle::io(scratch.join("image"), "qcow2", ["write -P 9 350k 30k"]);
        },
        run: |world| commit(world, Base::Next),
        outcome: SETTLES,
    },
    Operation {
        name: "commit over an image between",
        make: |scratch| {
            overlay(scratch, "cluster_size=4k", "qcow2");
            std::fs::rename(scratch.join("image"), scratch.join("between")).expect("rename");
            oracle::create_overlay(scratch.join("image"), "cluster_size=4k", "between", "qcow2", None);
            oracle::io(
                scratch.join("image"),
                "qcow2",
                ["write -P 9 150k 50k", "write -z 20k 10k"],
            );
        },
        run: |world| commit(world, Base::Named("base".into())),
        outcome: SETTLES,
    },
    Operation {
        name: "rebase",
        make: |scratch| {
            overlay(scratch, "cluster_size=4k", "qcow2");
            oracle::create(scratch.join("other"), "qcow2", "", "200k");
            oracle::io(scratch.join("other"), "qcow2", ["write -P 77 30k 100k"]);
        },
        run: |world| rebase(world, Some("other")),
        outcome: SETTLES,
    },
    Operation {
        name: "rebase to nothing",
        make: |scratch| overlay(scratch, "cluster_size=4k,lazy_refcounts=on", "raw"),
        run: |world| rebase(world, None),
        outcome: SETTLES,
    },
    Operation {
        name: "add a bitmap",
        make: |scratch| marked(scratch),
        run: |world| {
            bitmaps(world, |bitmaps| {
                let new = NewBitmap {
                    name: "three".to_owned(),
                    granularity: None,
                    enabled: true,
                };
                bitmaps.add(&new).map(drop)
            })
        },
        outcome: SWITCHES,
    },
    Operation {
        name: "remove a bitmap",
        make: |scratch| marked(scratch),
        run: |world| bitmaps(world, |bitmaps| bitmaps.remove("one")),
        outcome: SWITCHES,
    },
    Operation {
        name: "clear a bitmap",
        make: |scratch| marked(scratch),
        run: |world| bitmaps(world, |bitmaps| bitmaps.clear("one")),
        outcome: SWITCHES,
    },
    Operation {
        name: "turn a bitmap off",
        make: |scratch| marked(scratch),
        run: |world| bitmaps(world, |bitmaps| bitmaps.disable("one")),
        outcome: SWITCHES,
    },
    Operation {
        name: "write what bitmaps record",
        make: |scratch| marked(scratch),
        run: |world| {
            let image = open::image_mut(&world.request("image"))?;
            image
                .top
                .write_at(GuestOffset::new(5000), &[0x77; 60_000], &image.below)?;
            image.top.flush()
        },
        outcome: Outcome::InPlace(Effect::Records),
    },
    Operation {
        name: "grow with a data file",
        make: |scratch| used(scratch, "cluster_size=4k,data_file=image.data"),
        run: |world| resize(world, 9 << 20, Preallocation::Metadata),
        outcome: SWITCHES,
    },
    Operation {
        name: "commit from a data file",
        make: |scratch| overlay(scratch, "cluster_size=4k,data_file=image.data", "qcow2"),
        run: |world| commit(world, Base::Next),
        outcome: SETTLES,
    },
    Operation {
        name: "repair with a data file",
        make: |scratch| {
            used(scratch, "cluster_size=4k,data_file=image.data");
            recount(scratch, 2..5, |_| 0);
        },
        run: repair,
        outcome: Outcome::Repair,
    },
];
