//! A size that an image cannot get in place: it is written anew, and the old file is there until the new one is whole.

use std::collections::BTreeMap;
use std::sync::Arc;

use diskmill::open::{self, OpenRequest};
use diskmill::ops::check;
use diskmill::ops::convert::{self, Input, NewImage, Output, Plan};
use diskmill::ops::resize::{self, NewSize, Preallocation, ResizeRequest};
use diskmill::spec::ImageSpec;
use diskmill_core::{ErrorKind, GuestOffset, Job, Result};
use diskmill_testkit::Scratch;
use diskmill_testkit::fault::{Failure, Faults, Lasting};

use super::world::{Disturber, World};

const SMALL: u64 = 300 << 10;
const LARGE: u64 = 9 << 20;

/// `image`, a cow image with data, over `base.raw`, which is longer.
pub fn make(scratch: &Scratch) {
    make_in(scratch, "cow");
}

/// The same in another format.
pub fn make_in(scratch: &Scratch, format: &str) {
    let bytes: Vec<u8> = (0..SMALL + 4096).map(|at| (at / 700 % 250) as u8 + 1).collect();
    scratch.file("base.raw", &bytes);
    let mut new = bytes[..SMALL as usize].to_vec();
    new[20_000..70_300].fill(7);
    new[130_000..150_000].fill(0);
    scratch.file("new.raw", &new);
    let raw = ImageSpec::from_path(scratch.join("new.raw"));
    let mut source = OpenRequest::new(raw);
    source.format = Some("raw".to_owned());
    let mut image = NewImage::new(ImageSpec::from_path(scratch.join("image")), format);
    image.backing = Some("base.raw".to_owned());
    image.backing_format = Some("raw".to_owned());
    let plan = Plan::new(Input::Image(Box::new(source)), Output::New(image));
    convert::run(&plan, Job::silent()).expect("an overlay");
    std::fs::remove_file(scratch.join("new.raw")).expect("remove");
}

fn resize(world: &World) -> Result<()> {
    let request = ResizeRequest::new(world.request("image"), NewSize::To(LARGE));
    resize::run(&request, &mut |_| {}).map(drop)
}

fn disk(world: &World) -> Vec<u8> {
    let image = open::image(&world.request("image")).expect("open");
    let mut bytes = vec![0; image.chain.virtual_size() as usize];
    image.chain.read_at(GuestOffset::ZERO, &mut bytes).expect("read");
    let report = check::run(&world.request("image"), check::Reach::Ours, Job::silent())
        .expect("check")
        .report;
    assert_eq!(report.corruptions + report.leaks + report.check_errors, 0);
    bytes
}

#[test]
fn a_call_that_fails_while_an_image_is_written_anew_leaves_the_old_one() {
    let first: BTreeMap<String, Vec<u8>> = World::new(&make).files();
    let mut expected = disk(&World::of(&first));
    expected.resize(LARGE as usize, 0);
    let attempt = |faults: &Arc<Faults>| {
        let mut world = World::of(&first);
        world.around = Some(Arc::new(Disturber(Arc::clone(faults))));
        let done = resize(&world);
        world.around = None;
        (world, done)
    };
    let calls = {
        let faults = Faults::new();
        let (world, done) = attempt(&faults);
        done.expect("it can be done");
        assert!(disk(&world) == expected, "what is below and new is hidden");
        assert_eq!(world.scratch.names(), ["base.raw", "image"]);
        faults.calls()
    };
    let mut failed = 0;
    for number in 0..calls {
        for (failure, lasting) in [(Failure::Io, Lasting::Once), (Failure::NoSpace, Lasting::ForGood)] {
            let faults = Faults::new();
            faults.fail_at(number, failure, lasting);
            let (world, done) = attempt(&faults);
            assert_eq!(world.scratch.names(), ["base.raw", "image"], "call {number}");
            match done {
                Ok(()) => assert!(disk(&world) == expected, "call {number}"),
                Err(_) => {
                    assert!(world.files() == first, "call {number}: nothing has changed");
                    failed += 1;
                }
            }
        }
    }
    assert!(
        failed > calls / 2,
        "{failed} of {calls} calls that failed were noticed"
    );
}

#[test]
fn an_image_that_is_in_use_is_not_written_anew() {
    let world = World::new(&make);
    let before = world.files();
    let user = open::image(&world.request("image")).expect("somebody reads it");
    assert_eq!(resize(&world).unwrap_err().kind(), ErrorKind::Locked);
    drop(user);
    let mut wanted = ResizeRequest::new(world.request("image"), NewSize::To(LARGE));
    wanted.preallocation = Preallocation::Falloc;
    assert_eq!(
        resize::run(&wanted, &mut |_| {}).unwrap_err().kind(),
        ErrorKind::Usage
    );
    assert!(world.files() == before);
    resize(&world).expect("now it is free");
}
