//! `qemu-img map --output=json`.

use diskmill::ops::map::{MapEntry, walk};
use diskmill_testkit::host::Loop;
use diskmill_testkit::{Scratch, oracle};
use serde_json::{Value, json};

use crate::gallery::{self, Picture, opened};

fn to_json(entry: &MapEntry) -> Value {
    let mut value = json!({
        "start": entry.start.get(),
        "length": entry.length,
        "depth": entry.depth,
        "present": entry.present,
        "zero": entry.zero,
        "data": entry.data,
        "compressed": entry.compressed,
    });
    if let Some(offset) = entry.offset {
        value["offset"] = json!(offset);
    }
    value
}

fn ours(picture: &Picture, start: u64, max: Option<u64>) -> Vec<Value> {
    let image = opened(picture);
    let mut entries = Vec::new();
    walk(&image, start, max, &mut |entry| {
        entries.push(to_json(&entry));
        Ok(())
    })
    .unwrap();
    entries
}

fn theirs(picture: &Picture, range: Option<(u64, u64)>) -> Vec<Value> {
    let mut run = oracle::qemu_img().args(["map", "--output=json", "-f", picture.format]);
    if let Some((start, max)) = range {
        run = run
            .arg(format!("--start-offset={start}"))
            .arg(format!("--max-length={max}"));
    }
    let mut entries: Vec<Value> = serde_json::from_value(run.arg(&picture.path).ok().json()).unwrap();
    // For nothing at all it shows an entry without length.
    entries.retain(|entry| entry["length"] != 0);
    entries
}

fn agree(picture: &Picture, range: Option<(u64, u64)>) {
    let (start, max) = range.map_or((0, None), |(start, max)| (start, Some(max)));
    let (ours, theirs) = (ours(picture, start, max), theirs(picture, range));
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs, "{picture:?} {range:?}");
    }
    assert_eq!(ours.len(), theirs.len(), "{picture:?} {range:?}");
}

#[test]
fn single_images() {
    let scratch = Scratch::new();
    for picture in gallery::singles(&scratch, 1) {
        agree(&picture, None);
        agree(&picture, Some((1000, 70_000)));
        agree(&picture, Some((512 << 10, 1 << 40)));
    }
}

#[test]
fn chains() {
    let scratch = Scratch::new();
    for picture in gallery::chains(&scratch, 2, 24) {
        agree(&picture, None);
        agree(&picture, Some((65_536, 1 << 20)));
    }
}

#[test]
fn files_are_named() {
    let scratch = Scratch::new();
    let base = scratch.join("base.raw");
    oracle::create(&base, "raw", "", "1M");
    oracle::io(&base, "raw", ["write 0 64k"]);
    let data = scratch.join("top.data");
    let top = scratch.join("top.qcow2");
    let options = format!("data_file={}", data.display());
    oracle::create_overlay(&top, &options, &base, "raw", None);
    oracle::io(&top, "qcow2", ["write 128k 64k"]);
    let image = opened(&Picture {
        path: top,
        format: "qcow2",
    });
    let mut names = Vec::new();
    walk(&image, 0, None, &mut |entry| {
        names.push(entry.filename.map(|name| name.to_string()));
        Ok(())
    })
    .unwrap();
    assert_eq!(names[0].as_deref(), base.to_str());
    assert!(
        names.iter().any(|name| name.as_deref() == data.to_str()),
        "{names:?}"
    );
}

#[test]
fn block_devices() {
    let scratch = Scratch::new();
    let device = Loop::attach(scratch.hole("disk", 8 << 20), 512);
    let raw = Picture {
        path: device.path().to_owned(),
        format: "raw",
    };
    agree(&raw, None);
    oracle::create(device.path(), "qcow2", "", "4M");
    gallery::scribble(device.path(), "qcow2", 4 << 20, &mut gallery::Dice::new(3), None);
    agree(
        &Picture {
            format: "qcow2",
            ..raw
        },
        None,
    );
}
