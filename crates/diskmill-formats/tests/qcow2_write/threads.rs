//! Many threads at once.

use diskmill_core::{GuestOffset, Stored, ZeroHow};
use diskmill_testkit::model::{Model, pattern};
use diskmill_testkit::sparse_random::mix;

use super::images;

const THREADS: u64 = 8;

#[test]
fn threads_write_side_by_side() {
    for name in [
        "cluster 512",
        "default",
        "over raw",
        "refcount 8",
        "subclusters over raw",
        "data file",
        "luks over raw",
    ] {
        let image = images::named(name).make();
        let disks = images::memory(&image.files);
        let layer = images::open(&disks).expect("open");
        let size = image.start.len() as u64;
        let (unit, below) = (image.unit, &image.below);
        // Clusters are dealt out like cards: neighbours belong to different threads.
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (layer, image) = (&layer, &image);
                scope.spawn(move || {
                    for cluster in (thread..size.div_ceil(unit)).step_by(THREADS as usize) {
                        let start = cluster * unit;
                        let end = (start + unit).min(size);
                        let at = GuestOffset::new(start);
                        let bytes: Vec<u8> = (start..end).map(|at| pattern(1, at)).collect();
                        match (mix(cluster) % 4, image.pack(layer, &bytes)) {
                            (0, Some(packed)) if end - start == unit => {
                                layer
                                    .write_encoded(at, Stored::Packed(&packed), below)
                                    .expect("write packed");
                            }
                            (1, _) => {
                                let range = at..GuestOffset::new(end);
                                layer.zero(range.clone(), ZeroHow::MayUnmap, below).expect("zero");
                                layer.discard(range).expect("discard");
                                layer.write_at(at, &bytes, below).expect("write");
                            }
                            _ => {
                                for (part, bytes) in (0..).zip(bytes.chunks(700)) {
                                    let at = at.plus(part * 700).expect("an offset");
                                    layer.write_at(at, bytes, below).expect("write");
                                }
                            }
                        }
                        if mix(cluster) % 16 == 5 {
                            layer.flush().expect("flush");
                        }
                        let mut found = vec![0; bytes.len()];
                        layer.read_at(at, &mut found).expect("read");
                        assert!(
                            found == bytes,
                            "{name}: cluster {cluster} reads as something else"
                        );
                    }
                });
            }
        });
        layer.flush().expect("flush");
        let expected: Vec<u8> = (0..size).map(|at| pattern(1, at)).collect();
        Model::new(expected.clone()).assert_reads(&layer, below);
        drop(layer);
        image.assert_good(&images::bytes(&disks), &expected);
    }
}

#[test]
fn threads_write_the_same_cluster_one_after_the_other() {
    let image = images::named("over raw").make();
    let disks = images::memory(&image.files);
    let layer = images::open(&disks).expect("open");
    let below = &image.below;
    // Each thread owns a few bytes of every cluster: a copy-on-write that ran twice would lose some.
    let step = 64;
    let mut expected = image.start.clone();
    let size = expected.len() as u64;
    for (at, byte) in expected.iter_mut().enumerate() {
        if (at as u64 / step) % 16 < THREADS {
            *byte = pattern(9, at as u64);
        }
    }
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (layer, expected) = (&layer, &expected);
            scope.spawn(move || {
                for start in (thread * step..size).step_by(16 * step as usize) {
                    let end = (start + step).min(size);
                    let bytes = &expected[start as usize..end as usize];
                    layer
                        .write_at(GuestOffset::new(start), bytes, below)
                        .expect("write");
                }
            });
        }
    });
    layer.flush().expect("flush");
    drop(layer);
    image.assert_good(&images::bytes(&disks), &expected);
}
