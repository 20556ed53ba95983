//! `qemu-img measure --output=json`.

use diskmill::ops::measure::{self, Source};
use diskmill_core::{CreateSpec, Measure, Options};
use diskmill_formats::registry;
use diskmill_testkit::process::Run;
use diskmill_testkit::{Scratch, oracle};

use crate::gallery;

fn theirs(run: Run) -> (u64, u64) {
    let value = run.ok().json();
    (
        value["required"].as_u64().unwrap(),
        value["fully-allocated"].as_u64().unwrap(),
    )
}

fn ours(format: &str, options: &str, source: Source<'_>) -> (u64, u64) {
    let mut spec = CreateSpec::new(0);
    spec.options = Options::parse(options);
    let Measure {
        required,
        fully_allocated,
        ..
    } = measure::run(registry::by_name(format).unwrap(), &spec, source).unwrap();
    (required, fully_allocated)
}

const TARGETS: [(&str, &str); 6] = [
    ("raw", ""),
    ("qcow2", ""),
    ("qcow2", "cluster_size=512"),
    ("qcow2", "cluster_size=2M"),
    ("qcow2", "extended_l2=on,cluster_size=16k"),
    ("qcow2", "refcount_bits=64,preallocation=falloc"),
];

fn command(format: &str, options: &str) -> Run {
    let run = oracle::qemu_img().args(["measure", "--output=json", "-O", format]);
    match options {
        "" => run,
        options => run.args(["-o", options]),
    }
}

#[test]
fn of_a_size() {
    for (format, options) in TARGETS {
        for size in [0_u64, 1, 512, 1000, 1 << 20, (1 << 30) + 512, 100 << 30] {
            let theirs = theirs(command(format, options).args(["--size", &size.to_string()]));
            let ours = ours(format, options, Source::Size(size));
            assert_eq!(ours, theirs, "{format} {options} {size}");
        }
    }
}

#[test]
fn of_images() {
    let scratch = Scratch::new();
    let mut pictures = gallery::singles(&scratch, 21);
    pictures.extend(gallery::chains(&scratch, 22, 8));
    for picture in pictures {
        let image = gallery::opened(&picture);
        for (format, options) in TARGETS {
            let theirs = theirs(
                command(format, options)
                    .args(["-f", picture.format])
                    .arg(&picture.path),
            );
            let ours = ours(format, options, Source::Image(&image));
            assert_eq!(ours, theirs, "{format} {options} {picture:?}");
        }
    }
}
