//! `qemu-img check --output=json`.

use diskmill::ops::check::{CheckUnsupported, Checked, Reach, run};
use diskmill_core::{ErrorKind, Job};
use diskmill_testkit::{Scratch, oracle};
use serde_json::{Value, json};

use crate::gallery::{self, Picture, request};

fn to_json(checked: &Checked) -> Value {
    let report = &checked.report;
    let mut value = json!({
        "filename": checked.filename,
        "format": checked.format.name(),
        "check-errors": report.check_errors,
    });
    let mut set = |name: &str, count: u64| {
        if count != 0 {
            value[name] = json!(count);
        }
    };
    set(
        "image-end-offset",
        report.image_end_offset.map_or(0, |end| end.get()),
    );
    set("corruptions", report.corruptions);
    set("leaks", report.leaks);
    set("total-clusters", report.total_units);
    set("allocated-clusters", report.allocated_units);
    set("fragmented-clusters", report.fragmented_units);
    set("compressed-clusters", report.compressed_units);
    value
}

#[test]
fn images_of_every_kind() {
    let scratch = Scratch::new();
    let mut pictures = gallery::singles(&scratch, 31);
    pictures.extend(gallery::chains(&scratch, 32, 6));
    for picture in pictures.into_iter().filter(|picture| picture.format == "qcow2") {
        let checked = run(&request(&picture), Reach::Ours, Job::silent()).unwrap();
        let (theirs, _) = oracle::check(&picture.path, "qcow2");
        assert_eq!(to_json(&checked), theirs, "{picture:?}");
    }
}

#[test]
fn raw_has_nothing_to_check() {
    let scratch = Scratch::new();
    let path = scratch.hole("x.raw", 4096);
    let error = run(
        &request(&Picture { path, format: "raw" }),
        Reach::Ours,
        Job::silent(),
    )
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.find::<CheckUnsupported>().is_some());
}

#[test]
fn what_an_image_is_backed_by_must_be_there() {
    let scratch = Scratch::new();
    let path = scratch.join("x.qcow2");
    oracle::qemu_img()
        .args(["create", "-q", "-u", "-f", "qcow2", "-b", "gone.raw", "-F", "raw"])
        .arg(&path)
        .arg("1M")
        .ok();
    let error = run(
        &request(&Picture {
            path,
            format: "qcow2",
        }),
        Reach::Ours,
        Job::silent(),
    )
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}
