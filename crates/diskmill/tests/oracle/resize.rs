//! `qemu-img resize`.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use diskmill::open::OpenWarning;
use diskmill::ops::resize::{NewSize, Preallocation, ResizeError, ResizeRequest, Resized, run};
use diskmill_core::{Error, Result};
use diskmill_testkit::host::Loop;
use diskmill_testkit::{Scratch, oracle};

use serde_json::{Value, json};

use crate::gallery::{Picture, request};

fn resize(picture: &Picture, size: NewSize, shrink: bool, preallocation: Preallocation) -> Result<Resized> {
    let mut request = ResizeRequest::new(request(picture), size);
    request.shrink = shrink;
    request.preallocation = preallocation;
    run(&request, &mut |warning| panic!("{warning:?}"))
}

fn why(error: &Error) -> &ResizeError {
    error.find().unwrap_or_else(|| panic!("{error:?}"))
}

#[test]
fn raw_grows_and_shrinks_to_the_byte() {
    let scratch = Scratch::new();
    let picture = Picture {
        path: scratch.hole("x.raw", 1 << 20),
        format: "raw",
    };
    let len = || std::fs::metadata(&picture.path).unwrap().len();
    resize(&picture, NewSize::To(1000), true, Preallocation::Off).unwrap();
    assert_eq!(len(), 1000);
    resize(&picture, NewSize::To(5000), false, Preallocation::Off).unwrap();
    assert_eq!(len(), 5000);
    let done = resize(&picture, NewSize::Grow(512), false, Preallocation::Off).unwrap();
    assert_eq!((done.from, done.to, len()), (5120, 5632, 5632));
    resize(&picture, NewSize::Shrink(632), true, Preallocation::Off).unwrap();
    assert_eq!(len(), 5000);
}

#[test]
fn raw_preallocates() {
    let scratch = Scratch::new();
    for (name, how) in [("falloc", Preallocation::Falloc), ("full", Preallocation::Full)] {
        let ours = Picture {
            path: scratch.hole(&format!("ours-{name}"), 1 << 20),
            format: "raw",
        };
        let theirs = scratch.hole(&format!("theirs-{name}"), 1 << 20);
        resize(&ours, NewSize::To(3 << 20), false, how).unwrap();
        oracle::qemu_img()
            .args(["resize", "-q", "-f", "raw", "--preallocation", name])
            .arg(&theirs)
            .arg("3M")
            .ok();
        let of = |path: &std::path::Path| {
            let data = std::fs::metadata(path).unwrap();
            (data.len(), data.blocks())
        };
        assert_eq!(of(&ours.path), of(&theirs), "{name}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let scratch = Scratch::new();
    let raw = Picture {
        path: scratch.hole("x.raw", 1 << 20),
        format: "raw",
    };
    let refused = |size, shrink, how| resize(&raw, size, shrink, how).unwrap_err();
    let error = refused(NewSize::To(4096), false, Preallocation::Off);
    assert_eq!(
        *why(&error),
        ResizeError::WouldShrink {
            from: 1 << 20,
            to: 4096
        }
    );
    let error = refused(NewSize::Shrink(1 << 20), true, Preallocation::Off);
    assert_eq!(*why(&error), ResizeError::NotPositive);
    let error = refused(NewSize::To(4096), true, Preallocation::Falloc);
    assert_eq!(*why(&error), ResizeError::PreallocationOnShrink);
    let error = refused(NewSize::To(2 << 20), true, Preallocation::Metadata);
    assert_eq!(*why(&error), ResizeError::Preallocation("metadata"));
    assert_eq!(std::fs::metadata(&raw.path).unwrap().len(), 1 << 20);
}

#[test]
fn a_guess_of_raw_is_warned_of() {
    let scratch = Scratch::new();
    let path = scratch.hole("x.raw", 1 << 20);
    let spec = diskmill::spec::ImageSpec::from_path(&path);
    let request = ResizeRequest::new(diskmill::open::OpenRequest::new(spec), NewSize::Grow(512));
    let mut warnings = Vec::new();
    run(&request, &mut |warning| warnings.push(warning.clone())).unwrap();
    let name = path.to_str().unwrap().to_owned();
    assert_eq!(warnings, [OpenWarning::GuessedRaw { name }]);
}

#[test]
fn qcow2_grows_like_the_real_tool_grows_it() {
    let scratch = Scratch::new();
    for (index, options) in [
        "",
        "cluster_size=512",
        "compat=0.10",
        "extended_l2=on",
        "refcount_bits=64",
    ]
    .into_iter()
    .enumerate()
    {
        let path = scratch.join(format!("{index}.qcow2"));
        oracle::create(&path, "qcow2", options, "1M");
        oracle::io(&path, "qcow2", ["write -P 7 0 1M"]);
        let picture = Picture {
            path,
            format: "qcow2",
        };
        let done = resize(&picture, NewSize::To(300 << 20), false, Preallocation::Off).unwrap();
        assert_eq!((done.from, done.to), (1 << 20, 300 << 20), "{options}");
        oracle::assert_clean(&picture.path, "qcow2");
        oracle::io(
            &picture.path,
            "qcow2",
            ["read -P 7 0 1M", "read -P 0 1M 299M", "write -P 9 299M 1M"],
        );
        oracle::assert_clean(&picture.path, "qcow2");
    }
}

#[test]
fn qcow2_above_a_longer_backing_image_grows_with_zeros() {
    let scratch = Scratch::new();
    let base = scratch.join("base.raw");
    oracle::create(&base, "raw", "", "4M");
    oracle::io(&base, "raw", ["write -P 5 0 4M"]);
    let path = scratch.join("top.qcow2");
    oracle::create_overlay(&path, "", &base, "raw", Some("1M"));
    let picture = Picture {
        path,
        format: "qcow2",
    };
    resize(&picture, NewSize::To(6 << 20), false, Preallocation::Off).unwrap();
    oracle::assert_clean(&picture.path, "qcow2");
    oracle::io(&picture.path, "qcow2", ["read -P 5 0 1M", "read -P 0 1M 5M"]);
}

#[test]
fn a_device_keeps_its_size_and_an_image_on_it_need_not() {
    let scratch = Scratch::new();
    let device = Loop::attach(scratch.hole("disk", 4 << 20), 512);
    let raw = Picture {
        path: device.path().to_owned(),
        format: "raw",
    };
    for size in [1 << 20, 8 << 20] {
        let error = resize(&raw, NewSize::To(size), true, Preallocation::Off).unwrap_err();
        assert_eq!(*why(&error), ResizeError::Device);
    }
    oracle::create(device.path(), "qcow2", "", "1M");
    let image = Picture {
        format: "qcow2",
        ..raw
    };
    resize(&image, NewSize::To(64 << 20), false, Preallocation::Off).unwrap();
    oracle::assert_clean(device.path(), "qcow2");
}

/// What a map says of an image, less where in the file and in how many pieces.
fn states(path: &Path) -> Vec<Value> {
    let entries: Vec<Value> = serde_json::from_value(oracle::map(path, "qcow2")).unwrap();
    let mut joined: Vec<Value> = Vec::new();
    for mut entry in entries {
        let placed = entry.get("offset").is_some();
        entry["offset"] = placed.into();
        let length = entry["length"].take().as_u64().unwrap();
        let start = entry["start"].take();
        match joined.last_mut() {
            Some(last) if last["what"] == entry => {
                last["length"] = (last["length"].as_u64().unwrap() + length).into();
            }
            _ => joined.push(json!({"start": start, "length": length, "what": entry})),
        }
    }
    joined
}

#[test]
fn qcow2_preallocates() {
    let scratch = Scratch::new();
    for options in [
        "",
        "cluster_size=4k",
        "compat=0.10",
        "extended_l2=on",
        "data_file=DATA",
    ] {
        for (name, how) in [
            ("metadata", Preallocation::Metadata),
            ("falloc", Preallocation::Falloc),
            ("full", Preallocation::Full),
        ] {
            let make = |who: &str| {
                let path = scratch.join(format!("{who}-{name}-{options}.qcow2"));
                let data = scratch.join(format!("{who}-{name}.data"));
                // What is left of a cluster in use we call zero in so many words, where they say nothing of subclusters.
                let size = if options.starts_with("extended") {
                    "1M"
                } else {
                    "1000k"
                };
                oracle::create(
                    &path,
                    "qcow2",
                    &options.replace("DATA", data.to_str().unwrap()),
                    size,
                );
                oracle::io(&path, "qcow2", ["write -P 5 0 64k", "write -P 6 960k 40k"]);
                path
            };
            let (ours, theirs) = (make("ours"), make("theirs"));
            let picture = Picture {
                path: ours.clone(),
                format: "qcow2",
            };
            resize(&picture, NewSize::To(5 << 20), false, how).unwrap();
            oracle::qemu_img()
                .args(["resize", "-q", "--preallocation", name])
                .arg(&theirs)
                .arg("5M")
                .ok();
            oracle::assert_clean(&ours, "qcow2");
            let checks = [
                "read -P 5 0 64k",
                "read -P 0 64k 896k",
                "read -P 6 960k 40k",
                "read -P 0 1000k 4120k",
            ];
            oracle::io(&ours, "qcow2", checks);
            assert_eq!(states(&ours), states(&theirs), "{name} {options}");
            let data = |who: &str| match options.starts_with("data_file") {
                true => scratch.join(format!("{who}-{name}.data")),
                false => scratch.join(format!("{who}-{name}-{options}.qcow2")),
            };
            let blocks = |who: &str| std::fs::metadata(data(who)).unwrap().blocks() * 512;
            let (ours, theirs) = (blocks("ours"), blocks("theirs"));
            assert!(
                ours.abs_diff(theirs) <= 128 << 10,
                "{name} {options}: {ours} bytes, they have {theirs}"
            );
        }
    }
}
