//! Random operations, each image against a vector of bytes and against QEMU.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use diskmill_core::{Layer, ZeroHow};
use diskmill_testkit::model::{BitmapAction, Model, Op};
use diskmill_testkit::random::{runner, seed, soak};
use diskmill_testkit::sparse_random::mix;
use diskmill_testkit::{contract, figures};
use proptest::prelude::*;

use super::images::{self, Image, KINDS, Kind, Setup};
use super::subject;

/// Operations on a disk of up to `size` bytes, in steps of `unit`.
pub fn ops(kind: Kind, unit: u64) -> impl Strategy<Value = Vec<Op>> {
    let size = kind.size;
    // Places are random to the sector or on a cluster; lengths from a sector to several clusters.
    let place = prop_oneof![
        (0..size / 512).prop_map(|sector| sector * 512),
        (0..size.div_ceil(unit)).prop_map(move |cluster| cluster * unit),
        0..size,
    ];
    let len = prop_oneof![
        1..5000_u64,
        (1..8_u64).prop_map(|sectors| sectors * 512),
        (1..6_u64).prop_map(move |clusters| clusters * unit),
        unit..unit * 3,
    ];
    let how = prop_oneof![Just(ZeroHow::KeepAllocated), Just(ZeroHow::MayUnmap)];
    let fixed_size = kind.setup == Setup::Snapshot && kind.options.contains("0.10");
    let resize = (1..size * 5 / 4 / 512).prop_map(move |sectors| Op::Resize {
        size: if fixed_size { size } else { sectors * 512 },
    });
    let number = 0..3_u8;
    let action = prop_oneof![
        5 => (9..17_u8).prop_map(BitmapAction::Add),
        2 => (0..3_u8).prop_map(BitmapAction::Merge),
        1 => Just(BitmapAction::Remove),
        1 => Just(BitmapAction::Clear),
        1 => Just(BitmapAction::Enable),
        1 => Just(BitmapAction::Disable),
    ];
    let op = prop_oneof![
        12 => (place.clone(), len.clone(), any::<u8>()).prop_map(|(at, len, fill)| Op::Write { at, len, fill }),
        4 => (place.clone(), any::<u8>()).prop_map(|(at, fill)| Op::Packed { at, fill }),
        5 => (place.clone(), len.clone(), how).prop_map(|(at, len, how)| Op::Zero { at, len, how }),
        4 => (place, len).prop_map(|(at, len)| Op::Discard { at, len }),
        3 => Just(Op::Flush),
        2 => Just(Op::Reopen),
        2 => resize,
        1 => Just(Op::Clear),
        2 => number.clone().prop_map(|number| Op::Snapshot { number }),
        1 => number.clone().prop_map(|number| Op::Apply { number }),
        1 => number.clone().prop_map(|number| Op::Delete { number }),
        4 => (number, action).prop_map(|(number, action)| Op::Bitmap { number, action }),
    ];
    proptest::collection::vec(op, 4..40)
}

/// Does `ops` to the image, comparing after each, and hands the result to both checkers.
fn follow(image: &Image, ops: &[Op]) {
    let disks = images::memory(&image.files);
    let mut layer = images::open(&disks).expect("open");
    let start = subject::picture(&image.files, &image.below).expect("look");
    let mut model = Model::with_snapshots(image.start.clone(), start.snapshots);
    for (step, op) in ops.iter().enumerate() {
        if !image.can(op) {
            continue;
        }
        if *op == Op::Reopen {
            layer.flush().expect("flush");
            drop(layer);
            let files = images::bytes(&disks);
            images::assert_clean(&files);
            let seen = subject::picture(&files, &image.below).expect("look");
            assert!(seen.snapshots == *model.snapshots(), "step {step}: the snapshots");
            layer = images::open(&disks).expect("open again");
        }
        model
            .apply(op, &layer, &image.below, image.unit, &|unit| {
                image.pack(&layer, unit)
            })
            .unwrap_or_else(|error| panic!("step {step}, {op:?}: {error:?}"));
        model.assert_reads(&layer, &image.below);
        model.assert_bitmaps(layer.as_ref());
    }
    contract::layer::all(
        &(Arc::clone(&layer) as Arc<dyn Layer>),
        &image.below,
        model.bytes(),
    );
    layer.flush().expect("flush");
    drop(layer);
    let files = images::bytes(&disks);
    let seen = subject::picture(&files, &image.below).expect("look");
    assert!(seen.snapshots == *model.snapshots(), "the snapshots");
    model.assert_bitmaps(subject::attach(&files, None).expect("open").as_ref());
    image.assert_good(&files, model.bytes());
}

/// Follows random operations on `image`, and adds their number to `steps`.
fn follow_random(image: &Image, cases: u32, salt: u64, steps: &AtomicU64) {
    let kind = image.kind;
    runner(cases, salt)
        .run(&ops(kind, image.unit), |ops| {
            follow(image, &ops);
            steps.fetch_add(ops.len() as u64, Ordering::Relaxed);
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{kind:?} (DISKMILL_SEED={}): {error}", seed()));
}

#[test]
fn random_operations_follow_the_model() {
    let steps = AtomicU64::new(0);
    for (salt, kind) in (0..).zip(KINDS) {
        let image = kind.make();
        follow(&image, &[]);
        let cases = if kind.size > 1 << 20 { 2 } else { 5 };
        follow_random(&image, cases * soak(), salt, &steps);
    }
    figures::tell("model steps", steps.into_inner());
}

#[test]
fn random_images_follow_the_model() {
    let steps = AtomicU64::new(0);
    for number in 0..12 * u64::from(soak()) {
        let image = Kind::random(mix(seed()) ^ number).make();
        follow_random(&image, 2 * soak().min(3), number, &steps);
    }
    figures::tell("model steps", steps.into_inner());
}
