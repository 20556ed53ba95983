//! Random operations, each image against a vector of bytes and against QEMU.

use std::sync::Arc;

use diskmill_core::{GuestOffset, Layer, Reserve};
use diskmill_testkit::contract;
use diskmill_testkit::model::{self, Model, Op};
use diskmill_testkit::random::soak;

use super::images::{self, Image, KINDS, Kind, M};

/// `count` operations on an image of `kind`.
pub fn ops(kind: &Kind, salt: u64, count: u64) -> Vec<Op> {
    model::random::ops(kind.size, M, salt, count)
}

fn follow(image: &Image, ops: &[Op]) {
    let disk = images::memory(&image.file);
    let mut layer = images::open(&disk).expect("open");
    let mut model = Model::new(image.start.clone());
    for op in ops {
        if *op == Op::Reopen {
            drop(layer);
            layer = images::open(&disk).expect("open again");
        }
        model
            .apply(op, &layer, &image.below, M, &|_| None)
            .unwrap_or_else(|error| panic!("{op:?}: {error:?}"));
        model.assert_reads(&layer, &image.below);
    }
    contract::layer::all(
        &(Arc::clone(&layer) as Arc<dyn Layer>),
        &image.below,
        model.bytes(),
    );
    layer.flush().expect("flush");
    drop(layer);
    let bytes = images::bytes(&disk);
    assert!(image.read(&bytes).expect("read") == model.bytes());
    image.assert_good(&bytes, model.bytes());
    let (plan, done) = images::compact(&disk).expect("compact");
    assert_eq!((plan.len_after, plan.moved), (done.len_after, done.moved));
    let bytes = images::bytes(&disk);
    assert!(image.read(&bytes).expect("read") == model.bytes());
    image.assert_good(&bytes, model.bytes());
    let again = images::compact(&disk).expect("compact again").1;
    assert_eq!((again.saved(), again.moved), (0, 0));
}

#[test]
fn random_operations_follow_the_model() {
    for kind in &KINDS {
        let image = kind.make();
        follow(&image, &[]);
        for salt in 0..2 * u64::from(soak()) {
            follow(&image, &ops(kind, salt, 14));
        }
    }
}

/// The map of 128 blocks fills a sector; one more, and the data behind it must give way.
#[test]
fn a_disk_grows_beyond_the_room_of_its_map() {
    for (kind, first) in [
        ("dynamic", 129 * M),
        ("fixed", 129 * M + 512),
        ("over same", 129 * M),
    ] {
        let image = images::named(kind).make();
        let disk = images::memory(&image.file);
        let layer = images::open(&disk).expect("open");
        let mut model = Model::new(image.start.clone());
        let sizes = [first, 2 * M + 512, 3 * M];
        let pack = |_: &[u8]| None;
        for size in sizes {
            let op = Op::Resize { size };
            model.apply(&op, &layer, &image.below, M, &pack).expect("resize");
            let end = size - 700.min(size);
            let op = Op::Write {
                at: end,
                len: 500,
                fill: 3,
            };
            model.apply(&op, &layer, &image.below, M, &pack).expect("write");
        }
        model.assert_reads(&layer, &image.below);
        layer.flush().expect("flush");
        drop(layer);
        let bytes = images::bytes(&disk);
        assert!(
            images::word(&bytes, 344) > images::word(&image.file, 344),
            "{kind}: the data has moved"
        );
        image.assert_good(&bytes, model.bytes());
    }
}

#[test]
fn what_a_disk_grows_by_can_be_reserved() {
    for how in [Reserve::Place, Reserve::Space, Reserve::Zeros] {
        let image = images::named("dynamic").make();
        let disk = images::memory(&image.file);
        let layer = images::open(&disk).expect("open");
        let size = 6 * M + 512;
        layer.resize(size, &image.below).expect("resize");
        let at = GuestOffset::new;
        layer
            .reserve(at(image.kind.size)..at(size), how)
            .expect("reserve");
        layer.flush().expect("flush");
        drop(layer);
        let mut expected = image.start.clone();
        expected.resize(size as usize, 0);
        let bytes = images::bytes(&disk);
        assert!(images::entries(&bytes)[4..].iter().all(|entry| *entry < 7));
        image.assert_good(&bytes, &expected);
    }
}

#[test]
fn a_session_that_writes_changes_the_uuid_of_modification_and_nothing_else_of_the_header() {
    let image = images::named("dynamic").make();
    let modified = |bytes: &[u8]| bytes[408..424].to_vec();
    let disk = images::memory(&image.file);
    let layer = images::open(&disk).expect("open");
    layer.flush().expect("flush");
    drop(layer);
    assert!(images::bytes(&disk) == image.file, "nobody wrote");
    let mut file = image.file.clone();
    file[84..90].copy_from_slice(b"a note");
    file[472..480].fill(9);
    let disk = images::memory(&file);
    let layer = images::open(&disk).expect("open");
    layer
        .write_at(GuestOffset::ZERO, &[1; 512], &image.below)
        .expect("write");
    layer.flush().expect("flush");
    drop(layer);
    let mut found = images::bytes(&disk);
    assert_ne!(modified(&found), modified(&file));
    found[408..424].copy_from_slice(&modified(&file));
    assert!(found[..512] == file[..512]);
}
