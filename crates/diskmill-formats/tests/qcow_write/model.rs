//! Random operations, each image against a vector of bytes and against QEMU.

use std::sync::Arc;

use diskmill_core::{BackingName, Chain, ErrorKind, GuestOffset, Layer, LayerMut, Stored, ZeroHow};
use diskmill_formats::qcow;
use diskmill_testkit::contract;
use diskmill_testkit::model::{self, Model, Op};
use diskmill_testkit::random::{Dice, soak};

use super::images::{self, Image, K, KINDS, Kind};
use super::support::disk;

/// `count` operations on an image of `kind`, some of which store a compressed cluster.
pub fn ops(kind: &Kind, salt: u64, count: u64) -> Vec<Op> {
    let mut dice = Dice::new(salt ^ 0x9ac);
    let mut ops = model::random::ops(kind.size, kind.cluster(), salt, count);
    for op in &mut ops {
        if let Op::Write { at, fill, .. } = *op
            && dice.below(4) == 0
        {
            *op = Op::Packed { at, fill };
        }
    }
    ops
}

fn open(disk: &Arc<dyn diskmill_core::StorageMut>) -> Arc<dyn LayerMut> {
    disk::open(&qcow::DRIVER, disk).expect("open")
}

fn follow(image: &Image, ops: &[Op]) {
    let disk = disk::memory(&image.file);
    let mut layer = open(&disk);
    let mut model = Model::new(image.start.clone());
    for op in ops {
        if *op == Op::Reopen {
            drop(layer);
            layer = open(&disk);
        }
        let pack = disk::pack(&layer);
        model
            .apply(op, &layer, &image.below, image.kind.cluster(), &pack)
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
    let bytes = disk::bytes(&disk);
    image.assert_good(&bytes, model.bytes());
    let layer = disk::read_only(&qcow::DRIVER, &bytes).expect("open to read");
    contract::layer::all(&layer, &image.below, model.bytes());
}

#[test]
fn random_operations_follow_the_model() {
    for kind in &KINDS {
        let image = kind.make();
        follow(&image, &[]);
        for salt in 0..2 * u64::from(soak()) {
            follow(&image, &ops(kind, salt, 30));
        }
    }
}

/// QEMU loses what is below where it writes a cluster of more than 512 bytes in part: it gets whole ones there.
#[test]
fn what_qemu_writes_is_read() {
    for kind in &KINDS {
        let image = kind.make();
        let step = match kind.below {
            Some(_) => kind.cluster(),
            None => 512,
        };
        let mut dice = Dice::new(31);
        let mut expected = image.start.clone();
        let mut commands = Vec::new();
        for _ in 0..12 {
            let at = dice.below(kind.size / step) * step;
            let len = (step * (1 + dice.below(4))).min(kind.size - at) / step * step;
            if len == 0 {
                continue;
            }
            let fill = dice.next() as u8;
            commands.push(format!("write -q -P {fill} {at} {len}"));
            expected[at as usize..(at + len) as usize].fill(fill);
        }
        assert!(
            image.after_qemu(&image.file, &commands) == expected,
            "{}",
            kind.name
        );
    }
}

#[test]
fn a_cluster_written_in_part_keeps_what_is_below() {
    let image = images::named("largest").make();
    let disk = disk::memory(&image.file);
    let layer = open(&disk);
    // The fourth cluster is not there yet.
    let at = 3 * 64 * K + 1000;
    layer
        .write_at(GuestOffset::new(at), &[9], &image.below)
        .expect("write");
    layer.flush().expect("flush");
    drop(layer);
    let mut expected = image.start.clone();
    expected[at as usize] = 9;
    assert!(
        expected[3 * 65_536..4 * 65_536]
            .iter()
            .filter(|byte| **byte != 0)
            .count()
            > 65_000
    );
    image.assert_good(&disk::bytes(&disk), &expected);
}

#[test]
fn a_disk_that_grows_again_shows_nothing_old() {
    for kind in &KINDS {
        let image = kind.make();
        let disk = disk::memory(&image.file);
        let layer = open(&disk);
        let mut model = Model::new(image.start.clone());
        let sizes = [100 * K + 512, 512, 900 * K, 700 * K + 1024, 3000 * K];
        for (step, size) in sizes.into_iter().enumerate() {
            let end = Op::Write {
                at: size - 300,
                len: 300,
                fill: step as u8,
            };
            for op in [Op::Resize { size }, end] {
                model
                    .apply(&op, &layer, &image.below, kind.cluster(), &|_| None)
                    .unwrap_or_else(|error| panic!("{}, {size}: {error:?}", kind.name));
                model.assert_reads(&layer, &image.below);
            }
        }
        assert_eq!(
            layer.resize(0, &image.below).unwrap_err().kind(),
            ErrorKind::Unsupported
        );
        assert_eq!(
            layer.resize(1 << 62, &image.below).unwrap_err().kind(),
            ErrorKind::Unsupported
        );
        layer.flush().expect("flush");
        drop(layer);
        image.assert_good(&disk::bytes(&disk), model.bytes());
    }
}

#[test]
fn zeros_take_room_only_where_something_shows_through() {
    let image = images::named("plain").make();
    let disk = disk::memory(&image.file);
    let layer = open(&disk);
    let at = GuestOffset::new;
    layer
        .zero(at(0)..at(image.kind.size), ZeroHow::MayUnmap, &image.below)
        .expect("zero");
    layer.flush().expect("flush");
    drop(layer);
    let bytes = disk::bytes(&disk);
    assert_eq!(bytes.len(), image.file.len());
    image.assert_good(&bytes, &vec![0; image.start.len()]);

    let image = images::named("over longer").make();
    let disk = disk::memory(&image.file);
    let layer = open(&disk);
    layer
        .zero(at(1000)..at(200_000), ZeroHow::MayUnmap, &image.below)
        .expect("zero");
    layer.flush().expect("flush");
    drop(layer);
    let mut expected = image.start.clone();
    expected[1000..200_000].fill(0);
    let bytes = disk::bytes(&disk);
    assert!(bytes.len() > image.file.len());
    image.assert_good(&bytes, &expected);
}

#[test]
fn an_emptied_image_is_as_short_as_a_new_one() {
    let image = images::named("overlay").make();
    let disk = disk::memory(&image.file);
    let layer = open(&disk);
    layer.clear().expect("clear");
    layer.flush().expect("flush");
    drop(layer);
    let bytes = disk::bytes(&disk);
    // Header, name and one entry: what QEMU leaves.
    assert_eq!(bytes.len(), 56 + 8);
    assert_eq!(disk::check(&qcow::DRIVER, &bytes).expect("check").leaks, 0);
    let mut below = vec![0; image.start.len()];
    image.below.read_at(GuestOffset::ZERO, &mut below).expect("read");
    image.assert_good(&bytes, &below);
}

#[test]
fn the_name_of_the_backing_file_changes() {
    let image = images::named("overlay").make();
    let disk = disk::memory(&image.file);
    let layer = open(&disk);
    let name = |name: &str| BackingName {
        name: name.to_owned(),
        format: Some("raw".to_owned()),
    };
    let long = "n".repeat(1023);
    for wanted in ["other.raw", &long, "base.raw"] {
        layer.set_backing(Some(&name(wanted))).expect("a name");
        let found = disk::read_only(&qcow::DRIVER, &disk::bytes(&disk)).expect("open");
        let backing = found.facts().backing.clone().expect("a backing file");
        assert_eq!((backing.name.as_str(), backing.format), (wanted, None));
    }
    for wrong in ["", &"n".repeat(1024)] {
        let error = layer.set_backing(Some(&name(wrong))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error:?}");
    }
    layer
        .write_at(GuestOffset::ZERO, &[7; 4096], &image.below)
        .expect("write");
    layer.flush().expect("flush");
    drop(layer);
    let mut expected = image.start.clone();
    expected[..4096].fill(7);
    image.assert_good(&disk::bytes(&disk), &expected);
    let layer = open(&disk);
    layer.set_backing(None).expect("no name");
    drop(layer);
    let alone = disk::read_only(&qcow::DRIVER, &disk::bytes(&disk)).expect("open");
    assert!(alone.facts().backing.is_none());
}

#[test]
fn compressed_clusters_that_cannot_be_are_refused() {
    let image = images::named("packed").make();
    let disk = disk::memory(&image.file);
    let layer = open(&disk);
    for (at, len) in [(0, 0), (0, 4096), (512, 100), (400 * K, 100)] {
        let bytes = vec![1; len];
        let error = layer
            .write_encoded(GuestOffset::new(at), Stored::Packed(&bytes), &Chain::default())
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error:?}");
    }
    drop(layer);
    assert!(disk::bytes(&disk) == image.file);
}

/// Tables may be anywhere; what no power cut may tear is moved where none can.
#[test]
fn tables_at_odd_places_move_when_they_change() {
    for (l1_at, l2_at) in [(48, 0x2003), (61, 0x1000), (61, 0x2003)] {
        let kind = images::named("plain");
        let mut file = kind.make().file;
        let word = |file: &[u8], at: usize| u64::from_be_bytes(file[at..at + 8].try_into().expect("8 bytes"));
        let old = word(&file, 48) as usize;
        let table = file[old..old + 4096].to_vec();
        file.resize(file.len() + 0x10000, 0);
        let end = (file.len() & !0xfff) - 0x8000;
        file[end + l2_at..end + l2_at + 4096].copy_from_slice(&table);
        file[48..56].fill(0);
        file[l1_at..l1_at + 8].copy_from_slice(&((end + l2_at) as u64).to_be_bytes());
        file[40..48].copy_from_slice(&(l1_at as u64).to_be_bytes());
        let mut image = kind.make();
        image.file = file;
        image.assert_good(&image.file, &image.start);
        let ops = [
            Op::Write {
                at: 13_000,
                len: 9000,
                fill: 3,
            },
            Op::Flush,
        ];
        follow(&image, &ops);
    }
}
