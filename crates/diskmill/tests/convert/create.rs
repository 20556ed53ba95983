//! Making empty images.

use std::path::Path;

use diskmill::ops::create::{self, CreateError, CreateRequest};
use diskmill::spec::ImageSpec;
use diskmill_core::{ErrorKind, Job, Options};
use diskmill_testkit::scratch::len;
use diskmill_testkit::{Scratch, oracle};

fn request(path: &Path, format: &str, options: &str, size: Option<u64>) -> CreateRequest {
    let mut request = CreateRequest::new(ImageSpec::from_path(path), format);
    request.options = Options::parse(options);
    request.size = size;
    request
}

/// The line `qemu-img create` prints for it.
fn line(name: &str, request: &CreateRequest) -> String {
    let plan = create::plan(request).unwrap_or_else(|error| panic!("{error:?}"));
    let mut line = format!("Formatting '{name}', fmt={}", plan.format);
    for (name, value) in &plan.shown {
        line.push_str(&format!(" {name}={value}"));
    }
    line.push('\n');
    line
}

#[test]
fn images_are_those_of_qemu() {
    let scratch = Scratch::new();
    for (format, options, size) in [
        ("raw", "", "1000"),
        ("raw", "preallocation=falloc", "1M"),
        ("raw", "preallocation=full,extent_size_hint=1M", "1M"),
        ("qcow2", "", "1000"),
        ("qcow2", "", "0"),
        ("qcow2", "cluster_size=512,refcount_bits=1,lazy_refcounts", "10M"),
        ("qcow2", "extended_l2=on,compression_type=zstd,nocow=off", "3T"),
        ("qcow2", "compat=0.10,preallocation=metadata", "64M"),
        (
            "qcow2",
            "data_file=data,data_file_raw=on,preallocation=full",
            "1M",
        ),
    ] {
        let (ours, theirs) = (scratch.join("ours"), scratch.join("theirs"));
        let bytes = diskmill_core::parse_size(size).unwrap();
        let request = request(&ours, format, options, Some(bytes));
        let mut real = oracle::qemu_img().args(["create", "-f", format]);
        if !options.is_empty() {
            real = real.args(["-o", options]);
        }
        // Names in options are relative to the folder the tool runs in.
        let printed = real.args(["theirs", size]).dir(scratch.path()).ok();
        assert_eq!(line("theirs", &request), printed.out());
        create::run(&request, Job::silent()).unwrap_or_else(|error| panic!("{error:?}"));
        if format == "qcow2" {
            oracle::assert_clean(&ours, format);
        }
        oracle::assert_identical(&ours, format, &theirs, format);
        let facts = |path: &Path| {
            let info = oracle::info(path, format, false);
            (
                info["virtual-size"].clone(),
                info["cluster-size"].clone(),
                info["format-specific"].clone(),
            )
        };
        assert_eq!(facts(&ours), facts(&theirs), "{format} {options}");
        assert_eq!(len(&ours), len(&theirs), "{format} {options}");
    }
    assert_eq!(scratch.names(), ["data", "ours", "theirs"]);
}

#[test]
fn an_overlay_has_the_size_of_its_backing_image() {
    let scratch = Scratch::new();
    let base = scratch.join("base");
    oracle::create(&base, "qcow2", "", "5M");
    oracle::io(&base, "qcow2", ["write -P 4 1M 1M"]);
    let top = scratch.join("top");
    let mut request = request(&top, "qcow2", "", None);
    request.backing = Some("base".to_owned());
    request.backing_format = Some("qcow2".to_owned());
    create::run(&request, Job::silent()).unwrap();
    oracle::assert_identical(&base, "qcow2", &top, "qcow2");
    assert_eq!(oracle::info(&top, "qcow2", false)["backing-filename"], "base");
    // A machine that runs on the backing image is no obstacle.
    let _holder = oracle::Holder::qemu_io(&base, "qcow2", &[]);
    create::run(&request, Job::silent()).unwrap();
}

#[test]
fn what_cannot_be_made_is_refused_and_touches_nothing() {
    let scratch = Scratch::new();
    let base = scratch.join("base");
    oracle::create(&base, "qcow2", "", "1M");
    let out = scratch.file("out", b"old");
    let fails = |change: &dyn Fn(&mut CreateRequest)| {
        let mut request = request(&out, "qcow2", "", Some(1 << 20));
        change(&mut request);
        let error = create::run(&request, Job::silent()).unwrap_err();
        assert_eq!(std::fs::read(&out).unwrap(), b"old");
        assert_eq!(scratch.names(), ["base", "out"]);
        error
    };
    let cause = |error: &diskmill_core::Error| format!("{:?}", error.find::<CreateError>());
    let error = fails(&|request| request.size = None);
    assert!(cause(&error).contains("SizeMissing"), "{error:?}");
    let error = fails(&|request| request.options = Options::parse("size=2M"));
    assert!(cause(&error).contains("SizeTwice"), "{error:?}");
    let error = fails(&|request| request.format = "foo".to_owned());
    assert!(cause(&error).contains("UnknownFormat"), "{error:?}");
    let error = fails(&|request| request.backing = Some("base".to_owned()));
    assert!(cause(&error).contains("qcow2"), "{error:?}");
    let error = fails(&|request| {
        request.backing = Some("base".to_owned());
        request.unchecked = true;
    });
    assert!(cause(&error).contains("detected: None"), "{error:?}");
    let error = fails(&|request| {
        request.backing = Some("none".to_owned());
        request.backing_format = Some("raw".to_owned());
    });
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = fails(&|request| request.backing_format = Some("raw".to_owned()));
    assert!(cause(&error).contains("BackingFormatAlone"), "{error:?}");
    let error = fails(&|request| {
        request.format = "raw".to_owned();
        request.backing = Some("base".to_owned());
    });
    assert!(cause(&error).contains("NoBacking"), "{error:?}");
    for options in [
        "cluster_size=1000",
        "foo=1",
        "lazy_refcounts=maybe",
        "preallocation=never",
    ] {
        let error = fails(&|request| request.options = Options::parse(options));
        assert_eq!(error.kind(), ErrorKind::Usage, "{options}: {error:?}");
    }
    let mut same = request(&out, "qcow2", "", Some(512));
    same.backing = Some(out.to_str().unwrap().to_owned());
    same.backing_format = Some("raw".to_owned());
    assert!(cause(&create::run(&same, Job::silent()).unwrap_err()).contains("BackedByItself"));
    let _holder = oracle::Holder::qemu_io(&base, "qcow2", &[]);
    let error = create::run(&request(&base, "qcow2", "", Some(512)), Job::silent()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
}
