//! `qemu-img compare`: verdict, offset and exit code.

use diskmill::ops::compare::{CompareOptions, Difference, Verdict, run};
use diskmill_core::Job;
use diskmill_testkit::{Scratch, oracle};

use crate::gallery::{self, Dice, Picture, opened, scribble};

/// What `qemu-img compare` prints for a verdict, and its exit code.
fn text(verdict: Verdict) -> (String, i32) {
    let mut text = String::new();
    if verdict.sizes_differ && verdict.difference != Some(Difference::Size) {
        text.push_str("Warning: Image size mismatch!\n");
    }
    match verdict.difference {
        None => text.push_str("Images are identical.\n"),
        Some(Difference::Content { offset }) => {
            text.push_str(&format!("Content mismatch at offset {offset}!\n"));
        }
        Some(Difference::Size) => text.push_str("Strict mode: Image size mismatch!\n"),
        Some(Difference::Allocation { offset }) => {
            text.push_str(&format!("Strict mode: Offset {offset} block status mismatch!\n"));
        }
        Some(other) => panic!("{other:?}"),
    }
    (text, i32::from(verdict.difference.is_some()))
}

fn agree(a: &Picture, b: &Picture, strict: bool) -> String {
    let mut command = oracle::qemu_img().args(["compare", "-f", a.format, "-F", b.format]);
    if strict {
        command = command.arg("-s");
    }
    let done = command.arg(&a.path).arg(&b.path).finish();
    // It warns of sizes before it has compared anything or after, as the difference lies.
    let theirs = (done.out(), done.code.unwrap());
    for threads in [1, 4] {
        let options = CompareOptions { strict, threads };
        let verdict = run(&opened(a), &opened(b), options, Job::silent()).unwrap();
        let mut ours = text(verdict);
        if !theirs.0.starts_with("Warning") {
            ours.0 = ours
                .0
                .trim_start_matches("Warning: Image size mismatch!\n")
                .to_owned();
        }
        assert_eq!(ours, theirs, "{a:?} {b:?} strict: {strict}, threads: {threads}");
    }
    theirs.0
}

#[test]
fn an_image_and_what_it_converts_to() {
    let scratch = Scratch::new();
    let mut pictures = gallery::chains(&scratch, 41, 6);
    pictures.extend(gallery::singles(&scratch, 42).into_iter().step_by(3));
    for (index, picture) in pictures.iter().enumerate() {
        let (format, extra) = [("raw", None), ("qcow2", None), ("qcow2", Some("-c"))][index % 3];
        let path = scratch.join(format!("converted-{index}"));
        oracle::convert(extra, &picture.path, picture.format, &path, format);
        let copy = Picture { path, format };
        assert_eq!(agree(picture, &copy, false), "Images are identical.\n");
        agree(picture, &copy, true);
        agree(&copy, picture, true);
        agree(picture, picture, true);
    }
}

#[test]
fn an_image_and_one_that_was_changed() {
    let scratch = Scratch::new();
    let mut dice = Dice::new(43);
    let pictures = gallery::chains(&scratch, 44, 12);
    for (index, picture) in pictures.iter().enumerate() {
        let format = ["raw", "qcow2"][index % 2];
        let path = scratch.join(format!("changed-{index}"));
        oracle::convert(None::<&str>, &picture.path, picture.format, &path, format);
        scribble(&path, format, 1 << 20, &mut dice, None);
        let changed = Picture { path, format };
        agree(picture, &changed, false);
        agree(&changed, picture, false);
        agree(picture, &changed, true);
    }
}

#[test]
fn images_of_different_sizes() {
    let scratch = Scratch::new();
    let small = Picture {
        path: scratch.hole("small.raw", 1 << 20),
        format: "raw",
    };
    for (index, command) in [
        "write -z 2M 64k",
        "write -P 1 3000000 1",
        "write -P 0 2M 64k",
        "write -P 1 1048576 1",
    ]
    .into_iter()
    .enumerate()
    {
        for format in ["raw", "qcow2"] {
            let path = scratch.join(format!("large-{index}.{format}"));
            oracle::create(&path, format, "", "4M");
            oracle::io(&path, format, [command]);
            let large = Picture { path, format };
            for strict in [false, true] {
                agree(&small, &large, strict);
                agree(&large, &small, strict);
            }
        }
    }
}

#[test]
fn the_first_of_many_differences_is_told() {
    let scratch = Scratch::new();
    let path = scratch.join("a.raw");
    oracle::create(&path, "raw", "", "64M");
    let writes: Vec<String> = (3..60)
        .map(|mib| format!("write -P 1 {} 4k", (mib << 20) + 12_345))
        .collect();
    oracle::io(&path, "raw", writes);
    let a = Picture { path, format: "raw" };
    let b = Picture {
        path: scratch.hole("b.raw", 64 << 20),
        format: "raw",
    };
    for _ in 0..8 {
        agree(&a, &b, false);
    }
}

#[test]
fn empty_images_of_all_layouts() {
    let scratch = Scratch::new();
    let mut pictures = Vec::new();
    for (index, options) in ["", "cluster_size=4k", "extended_l2=on", "compat=0.10"]
        .into_iter()
        .enumerate()
    {
        let path = scratch.join(format!("{index}.qcow2"));
        oracle::create(&path, "qcow2", options, "2M");
        pictures.push(Picture {
            path,
            format: "qcow2",
        });
    }
    for a in &pictures {
        for b in &pictures {
            assert_eq!(agree(a, b, true), "Images are identical.\n");
        }
    }
}
