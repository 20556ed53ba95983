//! Random operations, each image against a vector of bytes and against QEMU.

use std::sync::Arc;

use diskmill_core::{GuestOffset, Layer, LayerMut};
use diskmill_testkit::model::{self, Model, Op};
use diskmill_testkit::random::soak;
use diskmill_testkit::{contract, oracle};

use super::images::{self, G, Image, KINDS, Kind};

/// `count` operations on an image of `kind`.
pub fn ops(kind: &Kind, salt: u64, count: u64) -> Vec<Op> {
    model::random::ops(kind.size, G, salt, count)
}

fn follow(image: &Image, ops: &[Op]) {
    let disks = images::memory(&image.files);
    let mut layer = images::open(&disks).expect("open");
    let mut model = Model::new(image.start.clone());
    for op in ops {
        if *op == Op::Reopen {
            layer.flush().expect("flush");
            drop(layer);
            layer = images::open(&disks).expect("open again");
        }
        model
            .apply(op, &layer, &image.below, G, &|_| None)
            .unwrap_or_else(|error| panic!("{}, {op:?}: {error:?}", image.kind.name));
        model.assert_reads(&layer, &image.below);
    }
    contract::layer::all(
        &(Arc::clone(&layer) as Arc<dyn Layer>),
        &image.below,
        model.bytes(),
    );
    layer.flush().expect("flush");
    drop(layer);
    let bytes = images::all_bytes(&disks);
    let found = image.read(&bytes).expect("read");
    let differs = found.iter().zip(model.bytes()).position(|(a, b)| a != b);
    assert!(
        found.len() == model.bytes().len() && differs.is_none(),
        "{}: {} and {} bytes, first at {differs:?}: {ops:?}",
        image.kind.name,
        found.len(),
        model.bytes().len()
    );
    let report = images::check(&bytes).expect("check");
    assert_eq!(
        (report.check_errors, report.corruptions),
        (0, 0),
        "{}: {:#?}",
        image.kind.name,
        report.findings
    );
    images::repair(&disks, diskmill_core::Repair::Leaks).expect("repair");
    image.assert_good(&images::all_bytes(&disks), model.bytes());
}

#[test]
fn random_operations_follow_the_model() {
    for kind in &KINDS {
        let image = kind.make();
        follow(&image, &[]);
        for salt in 0..2 * u64::from(soak()) {
            follow(&image, &ops(kind, salt, 24));
        }
    }
}

/// A table covers 32 MiB, a sector of a directory 4 GiB: both must grow.
#[test]
fn a_disk_grows_beyond_its_tables_and_its_directory() {
    for options in ["", "zeroed_grain=on"] {
        let mut image = images::named("sparse").make();
        let disk = images::Disk { size: 9 * G, salt: 3 };
        image.files = images::make(9 * G, options, "x.vmdk", None, &disk);
        image.start = image.read(&image.files).unwrap();
        let disks = images::memory(&image.files);
        let layer = images::open(&disks).unwrap();
        let write = |layer: &Arc<dyn LayerMut>, at: u64, byte: u8| {
            layer
                .write_at(GuestOffset::new(at), &[byte; 100_000], &image.below)
                .unwrap();
        };
        for (size, byte) in [(100 << 20, 1), (5 << 30, 2), (9 << 30, 3)] {
            layer.resize(size, &image.below).unwrap();
            assert_eq!(layer.virtual_size(), size);
            write(&layer, size - 100_000, byte);
        }
        layer.flush().unwrap();
        drop(layer);
        let files = images::all_bytes(&disks);
        let report = images::check(&files).unwrap();
        assert_eq!(
            (report.corruptions, report.leaks),
            (0, 0),
            "{:#?}",
            report.findings
        );
        image.qemu_checks(&files).unwrap();
        let path = image.on_disk(&files);
        let mut commands = Vec::new();
        for (size, byte) in [(100_u64 << 20, 1), (5 << 30, 2), (9 << 30, 3)] {
            commands.push(format!("read -P {byte} {} 100000", size - 100_000));
        }
        commands.push(format!("read -P 0 {} 40000", 4_u64 << 30));
        oracle::io(&path, "vmdk", &commands);
        // And back.
        let disks = images::memory(&files);
        let layer = images::open(&disks).unwrap();
        layer.resize(9 * G, &image.below).unwrap();
        layer.resize(200 << 20, &image.below).unwrap();
        let mut found = vec![1; 100_000];
        let chain = diskmill_core::Chain::new(vec![layer.clone()]);
        chain
            .read_at(GuestOffset::new((100 << 20) - 100_000), &mut found)
            .unwrap();
        assert!(found.iter().all(|byte| *byte == 0), "what was cut off is back");
        let mut found = vec![1; 9 * G as usize];
        chain.read_at(GuestOffset::ZERO, &mut found).unwrap();
        assert!(found == image.start);
    }
}

#[test]
fn what_may_not_be_written_says_so() {
    let base = images::named("mixed").make();
    let below = diskmill_core::Chain::default();
    for (from, to, at) in [
        ("RW 40 ", "", 0),
        (" FLAT", " FLAT", u64::MAX),
        ("RW 640 SPARSE", "RDONLY 640 SPARSE", 0),
        ("RW 640 SPARSE", "NOACCESS 640 SPARSE", 0),
    ] {
        if to.is_empty() || at == u64::MAX {
            continue;
        }
        let mut files = base.files.clone();
        let text = String::from_utf8(files[0].clone()).unwrap();
        assert!(text.contains(from), "{text}");
        files[0] = text.replace(from, to).into_bytes();
        let disks = images::memory(&files);
        let layer = images::open(&disks).unwrap();
        let error = layer
            .write_at(GuestOffset::new(at), &[1; 512], &below)
            .unwrap_err();
        assert_eq!(error.kind(), diskmill_core::ErrorKind::Denied);
        layer
            .write_at(GuestOffset::new(5 * G), &[1; 512], &below)
            .unwrap();
        layer.flush().unwrap();
    }
}

#[test]
fn the_content_id_changes_with_the_first_change_only() {
    for kind in &KINDS {
        let image = kind.make();
        let disks = images::memory(&image.files);
        let layer = images::open(&disks).unwrap();
        let old = layer.content_id();
        let mut byte = [0];
        diskmill_core::Chain::new(vec![layer.clone()])
            .read_at(GuestOffset::ZERO, &mut byte)
            .unwrap();
        layer.flush().unwrap();
        assert_eq!(layer.content_id(), old);
        assert!(images::all_bytes(&disks) == image.files, "{}", kind.name);
        layer.write_at(GuestOffset::ZERO, &[1], &image.below).unwrap();
        let new = layer.content_id();
        assert!(new != old, "{}", kind.name);
        layer.write_at(GuestOffset::ZERO, &[2], &image.below).unwrap();
        layer.flush().unwrap();
        assert_eq!(layer.content_id(), new);
        let again = images::read_only(&images::all_bytes(&disks)).unwrap();
        assert_eq!(again.facts().content_id, new);
    }
}
