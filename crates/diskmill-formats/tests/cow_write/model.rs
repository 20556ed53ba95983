//! Random operations, each image against a vector of bytes and a reader of our own that knows nothing of the library's.

use std::sync::Arc;

use diskmill_core::{BackingName, Chain, GuestOffset, Layer, ZeroHow};
use diskmill_formats::cow;
use diskmill_testkit::contract;
use diskmill_testkit::model::{self, Model, Op};
use diskmill_testkit::random::soak;
use diskmill_testkit::sparse_random::mix;

use super::images::{self, FIRST, Image, K, KINDS, LARGE, M, STEP};
use super::support::disk;

fn open(disk: &Arc<dyn diskmill_core::StorageMut>) -> Arc<dyn diskmill_core::LayerMut> {
    disk::open(&cow::DRIVER, disk).expect("open")
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
        model
            .apply(op, &layer, &image.below, 512, &|_| None)
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
    let bytes = disk::bytes(&disk);
    image.assert_good(&bytes, model.bytes());
    let layer = disk::read_only(&cow::DRIVER, &bytes).expect("open to read");
    contract::layer::all(&layer, &image.below, model.bytes());
}

#[test]
fn random_operations_follow_the_model() {
    for kind in KINDS.iter().chain([&LARGE]) {
        let image = kind.make();
        follow(&image, &[]);
        for salt in 0..3 * u64::from(soak()) {
            follow(&image, &model::random::ops(kind.size, STEP, salt, 30));
        }
    }
}

/// Up and down as far as the data can stay where it is; what a larger disk shows is zeros, whatever was there or is below.
#[test]
fn a_disk_that_grows_again_shows_nothing_old() {
    for kind in KINDS.iter().chain([&LARGE]) {
        let image = kind.make();
        let disk = disk::memory(&image.file);
        let layer = open(&disk);
        let mut model = Model::new(image.start.clone());
        let sizes = match kind.size > FIRST {
            true => [FIRST + 900 * K, FIRST + 1024, FIRST + 2 * M, FIRST + 512 * 3],
            false => [100 * K + 512, 512, FIRST, 512 * 8],
        };
        for (step, size) in sizes.into_iter().enumerate() {
            assert!(layer.resizes_in_place(size), "{size}");
            let op = Op::Resize { size };
            model
                .apply(&op, &layer, &image.below, 512, &|_| None)
                .unwrap_or_else(|error| panic!("{}, {size}: {error:?}", kind.name));
            assert_eq!(layer.virtual_size(), size);
            model.assert_reads(&layer, &image.below);
            let op = Op::Write {
                at: size - 300,
                len: 300,
                fill: step as u8,
            };
            model
                .apply(&op, &layer, &image.below, 512, &|_| None)
                .expect("write");
            model.assert_reads(&layer, &image.below);
        }
        layer.flush().expect("flush");
        drop(layer);
        image.assert_good(&disk::bytes(&disk), model.bytes());
    }
}

#[test]
fn a_size_that_moves_the_data_is_refused_and_changes_nothing() {
    let image = LARGE.make();
    let disk = disk::memory(&image.file);
    let layer = open(&disk);
    for size in [512, FIRST, FIRST + 2 * M + 512, 100 * M, 8 << 40] {
        assert!(!layer.resizes_in_place(size));
        let error = layer.resize(size, &image.below).unwrap_err();
        assert_eq!(error.kind(), diskmill_core::ErrorKind::Unsupported);
        assert!(format!("{error:?}").contains("must be written anew"), "{error:?}");
    }
    for size in [0, (8 << 40) + 1, u64::MAX] {
        let error = layer.resize(size, &image.below).unwrap_err();
        assert!(
            format!("{error:?}").contains("must be 512 to 8796093022208"),
            "{error:?}"
        );
    }
    drop(layer);
    assert!(disk::bytes(&disk) == image.file);
}

#[test]
fn a_file_gets_no_longer_than_what_is_in_it() {
    let image = images::named("empty").make();
    assert_eq!(image.file.len(), 1056 + 64);
    let disk = disk::memory(&image.file);
    let layer = open(&disk);
    let at = GuestOffset::new;
    layer
        .zero(at(0)..at(100 * K), ZeroHow::MayUnmap, &image.below)
        .expect("zero");
    layer.flush().expect("flush");
    assert_eq!(disk.len().expect("length"), 1056 + 64, "zeros need nothing");
    layer
        .write_at(at(128 * K + 100), &[7], &image.below)
        .expect("write");
    layer.flush().expect("flush");
    // The sector is copied with it.
    assert_eq!(disk.len().expect("length"), 1536 + 128 * K + 512);
    assert_eq!(images::bits(&disk::bytes(&disk))[32], 1);
    layer.clear().expect("clear");
    layer.flush().expect("flush");
    assert!(disk::bytes(&disk) == image.file);
    // Under a name for what is below, zeros hide that.
    let base = BackingName {
        name: "base.raw".to_owned(),
        format: None,
    };
    layer.set_backing(Some(&base)).expect("a backing file");
    layer
        .zero(at(512)..at(1536), ZeroHow::MayUnmap, &Chain::default())
        .expect("zero");
    layer.flush().expect("flush");
    drop(layer);
    let bytes = disk::bytes(&disk);
    assert_eq!(images::bits(&bytes)[..2], [0b110, 0]);
    assert_eq!(bytes.len(), 1536 + 1536);
    let below: Vec<u8> = vec![9; 256 << 10];
    let shown = images::plain_read(&bytes, &below);
    assert!(shown[..512] == below[..512] && shown[512..1536] == [0; 1024] && shown[1536..] == below[1536..]);
}

/// Each thread has every fourth stretch, none of them of whole sectors, so that all want the same sectors and bytes of
/// the bitmap at the same time.
#[test]
fn threads_that_share_sectors_do_not_lose_writes() {
    const STRETCH: u64 = 700;
    for name in ["empty", "over same", "old"] {
        let image = images::named(name).make();
        let disk = disk::memory(&image.file);
        let layer = open(&disk);
        let stretches = image.kind.size / STRETCH;
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (layer, below) = (&layer, &image.below);
                scope.spawn(move || {
                    for step in (thread..stretches).step_by(4) {
                        let at = step * STRETCH;
                        let bytes: Vec<u8> = (at..at + STRETCH)
                            .map(|at| model::pattern(thread as u8, at))
                            .collect();
                        layer
                            .write_at(GuestOffset::new(at), &bytes, below)
                            .expect("write");
                        if mix(step).is_multiple_of(50) {
                            layer.flush().expect("flush");
                        }
                    }
                });
            }
        });
        layer.flush().expect("flush");
        drop(layer);
        let mut expected = image.start.clone();
        for (at, byte) in (0..stretches * STRETCH).zip(&mut expected) {
            *byte = model::pattern((at / STRETCH % 4) as u8, at);
        }
        image.assert_good(&disk::bytes(&disk), &expected);
    }
}
