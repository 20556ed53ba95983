//! Converting, and what it leaves behind when it fails.

use std::path::Path;

use diskmill::open::OpenRequest;
use diskmill::ops::convert::{self, Input, NewImage, Output, Plan};
use diskmill::spec::ImageSpec;
use diskmill_core::{Compression, Job, Options};
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, oracle};

fn input(path: &Path, format: &str) -> Input {
    let mut request = OpenRequest::new(ImageSpec::from_path(path));
    request.format = Some(format.to_owned());
    Input::Image(Box::new(request))
}

fn new(path: &Path, format: &str, options: &str) -> NewImage {
    let mut image = NewImage::new(ImageSpec::from_path(path), format);
    image.options = Options::parse(options);
    image
}

fn plan(from: &Path, from_format: &str, to: &Path, to_format: &str, options: &str) -> Plan {
    Plan::new(input(from, from_format), Output::New(new(to, to_format, options)))
}

fn run(plan: &Plan) -> convert::Summary {
    convert::run(plan, Job::silent()).unwrap_or_else(|error| panic!("{error:?}"))
}

const SIZE: u64 = (24 << 20) + 512 * 3;

#[test]
fn every_way_there_and_back_gives_the_same_bytes() {
    let scratch = Scratch::new();
    let raw = scratch.join("raw");
    let disk = SparseRandom::new(1, SIZE);
    disk.write_raw(&raw);
    for (options, compress) in [
        ("", false),
        ("cluster_size=512", false),
        ("cluster_size=2M", false),
        ("compat=0.10", false),
        ("extended_l2=on,cluster_size=16k", false),
        ("preallocation=metadata", false),
        ("", true),
        ("cluster_size=4k", true),
        ("compression_type=zstd", true),
        ("extended_l2=on,compression_type=zstd", true),
    ] {
        let (there, back) = (scratch.join("there"), scratch.join("back"));
        let mut plan_there = plan(&raw, "raw", &there, "qcow2", options);
        plan_there.compress = compress.then(Compression::default);
        run(&plan_there);
        oracle::assert_clean(&there, "qcow2");
        oracle::assert_identical(&raw, "raw", &there, "qcow2");
        run(&plan(&there, "qcow2", &back, "raw", ""));
        disk.assert_raw(&back);
    }
    assert_eq!(scratch.names(), ["back", "raw", "there"]);
}
