//! `qemu-img info --output=json`.

use diskmill::ops::info::{ImageInfo, gather};
use diskmill_core::{SnapshotFacts, Value as Facts};
use diskmill_testkit::host::Loop;
use diskmill_testkit::{Scratch, oracle};
use serde_json::{Map, Value, json};

use crate::gallery::{self, Picture, request};

fn facts(value: &Facts) -> Value {
    match value {
        Facts::Bool(value) => json!(value),
        Facts::Int(value) => json!(value),
        Facts::Text(text) => json!(text),
        Facts::List(list) => list.iter().map(facts).collect(),
        Facts::Map(map) => map
            .iter()
            .map(|(name, value)| ((*name).to_owned(), facts(value)))
            .collect::<Map<_, _>>()
            .into(),
        other => panic!("{other:?}"),
    }
}

fn snapshot(facts: &SnapshotFacts) -> Value {
    let mut value = json!({
        "id": facts.id,
        "name": facts.name,
        "vm-state-size": facts.vm_state_size,
        "date-sec": facts.date_sec,
        "date-nsec": facts.date_nsec,
        "vm-clock-sec": facts.vm_clock_nsec / 1_000_000_000,
        "vm-clock-nsec": facts.vm_clock_nsec % 1_000_000_000,
    });
    if let Some(icount) = facts.icount {
        value["icount"] = json!(icount);
    }
    value
}

fn to_json(info: &ImageInfo) -> Value {
    let children: Vec<Value> = info
        .children
        .iter()
        .map(|child| json!({"name": child.name, "info": to_json(&child.info)}))
        .collect();
    let mut value = json!({
        "children": children,
        "filename": info.filename,
        "format": info.format,
        "virtual-size": info.virtual_size,
        "dirty-flag": info.dirty,
    });
    let mut set = |name: &str, field: Option<Value>| {
        if let Some(field) = field {
            value[name] = field;
        }
    };
    set("actual-size", info.actual_size.map(Into::into));
    set("cluster-size", info.cluster_size.map(Into::into));
    set("encrypted", info.encrypted.then_some(true.into()));
    set("compressed", info.compressed.then_some(true.into()));
    set("backing-filename", info.backing_filename.clone().map(Into::into));
    set(
        "full-backing-filename",
        info.full_backing_filename.clone().map(Into::into),
    );
    set(
        "backing-filename-format",
        info.backing_filename_format.clone().map(Into::into),
    );
    let snapshots: Vec<Value> = info.snapshots.iter().map(snapshot).collect();
    set("snapshots", (!snapshots.is_empty()).then(|| snapshots.into()));
    set(
        "format-specific",
        info.format_specific
            .as_ref()
            .map(|(name, data)| json!({"type": name, "data": facts(data)})),
    );
    value
}

fn agree(picture: &Picture) {
    let one = gather(&request(picture), false).unwrap();
    assert_eq!(one.len(), 1);
    assert_eq!(
        to_json(&one[0]),
        oracle::info(&picture.path, picture.format, false),
        "{picture:?}"
    );
    let chain = gather(&request(picture), true).unwrap();
    let chain: Vec<Value> = chain.iter().map(to_json).collect();
    let theirs = oracle::info(&picture.path, picture.format, true);
    assert_eq!(Value::from(chain), theirs, "{picture:?}");
}

#[test]
fn single_images() {
    let scratch = Scratch::new();
    for picture in gallery::singles(&scratch, 11) {
        agree(&picture);
    }
}

#[test]
fn chains() {
    let scratch = Scratch::new();
    for picture in gallery::chains(&scratch, 12, 8) {
        agree(&picture);
    }
}

#[test]
fn snapshots_and_bitmaps() {
    let scratch = Scratch::new();
    let path = scratch.join("x.qcow2");
    oracle::create(&path, "qcow2", "", "8M");
    oracle::io(&path, "qcow2", ["write -P 1 0 1M"]);
    oracle::qemu_img()
        .args(["snapshot", "-c", "first"])
        .arg(&path)
        .ok();
    oracle::io(&path, "qcow2", ["write -P 2 512k 1M"]);
    oracle::qemu_img()
        .args(["snapshot", "-c", "second one"])
        .arg(&path)
        .ok();
    oracle::qemu_img()
        .args(["bitmap", "--add", "-g", "64k"])
        .arg(&path)
        .arg("b0")
        .ok();
    oracle::qemu_img()
        .args(["bitmap", "--add", "--disable"])
        .arg(&path)
        .arg("b1")
        .ok();
    agree(&Picture {
        path,
        format: "qcow2",
    });
}

#[test]
fn nothing_but_the_image_is_opened() {
    let scratch = Scratch::new();
    let path = scratch.join("x.qcow2");
    oracle::create(
        &path,
        "qcow2",
        &format!("data_file={}", scratch.join("gone.data").display()),
        "1M",
    );
    std::fs::remove_file(scratch.join("gone.data")).unwrap();
    let overlay = scratch.join("overlay.qcow2");
    oracle::qemu_img()
        .args(["create", "-q", "-u", "-f", "qcow2", "-b", "gone.raw", "-F", "raw"])
        .arg(&overlay)
        .arg("1M")
        .ok();
    for path in [path, overlay] {
        let picture = Picture {
            path,
            format: "qcow2",
        };
        let infos = gather(&request(&picture), false).unwrap();
        assert_eq!(to_json(&infos[0]), oracle::info(&picture.path, "qcow2", false));
    }
}

#[test]
fn trees_and_parts_of_files() {
    let scratch = Scratch::new();
    let path = scratch.hole("x.raw", 1 << 20);
    let path = path.to_str().unwrap();
    for name in [
        format!(
            r#"json:{{"driver":"raw","size":1024,"offset":512,"file":{{"driver":"file","filename":"{path}"}}}}"#
        ),
        format!(r#"json:{{"driver":"raw","offset":"4k","file.filename":"{path}"}}"#),
        format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{path}"}}}}"#),
        format!(r#"json:{{"driver":"file","filename":"{path}"}}"#),
        format!("file:{path}"),
    ] {
        let spec = diskmill::spec::ImageSpec::from_name(&name).unwrap();
        let ours = gather(&diskmill::open::OpenRequest::new(spec), false).unwrap();
        let theirs = oracle::qemu_img()
            .args(["info", "--output=json", &name])
            .ok()
            .json();
        assert_eq!(to_json(&ours[0]), theirs, "{name}");
    }
}

#[test]
fn block_devices() {
    let scratch = Scratch::new();
    let device = Loop::attach(scratch.hole("disk", 4 << 20), 512);
    let raw = Picture {
        path: device.path().to_owned(),
        format: "raw",
    };
    agree(&raw);
    oracle::create(device.path(), "qcow2", "", "1M");
    agree(&Picture {
        format: "qcow2",
        ..raw
    });
}
