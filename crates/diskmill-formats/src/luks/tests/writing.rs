//! Changes in place, against a vector of bytes.

use diskmill_core::{Chain, Reserve, ZeroHow};
use diskmill_testkit::model::{Model, Op, pattern};
use diskmill_testkit::random::soak;
use diskmill_testkit::{contract, model};

use super::*;

/// `count` operations on a disk of [`SIZE`] bytes, which never grows: what is new could read as anything.
pub(super) fn ops(salt: u64, count: u64) -> Vec<Op> {
    let mut size = SIZE;
    let mut ops = model::random::ops(SIZE, 16 << 10, salt, count);
    for op in &mut ops {
        if let Op::Resize { size: wanted } = op {
            size = (size / 512 * 3 / 4 + 1) * 512;
            *wanted = size;
        }
    }
    ops
}

#[test]
fn random_operations_follow_the_model() {
    let quick = Keyed::quick();
    let below = Chain::default();
    for salt in 0..8 * u64::from(soak()) {
        let file = memory(&quick.image(&disk(SIZE)));
        let mut layer = quick.open(&file).expect("open");
        let mut model = Model::new(disk(SIZE));
        for op in ops(salt, 16) {
            if op == Op::Reopen {
                drop(layer);
                layer = quick.open(&file).expect("open again");
            }
            model
                .apply(&op, &layer, &below, 512, &|_| None)
                .unwrap_or_else(|error| panic!("{op:?}: {error:?}"));
            model.assert_reads(&layer, &below);
        }
        layer.flush().expect("flush");
        drop(layer);
        let again = quick.read_only(Arc::clone(&file) as _).expect("open");
        contract::layer::all(&again, &below, model.bytes());
    }
}

#[test]
fn a_disk_that_grows_keeps_what_it_had() {
    let quick = Keyed::quick();
    let below = Chain::default();
    let file = memory(&quick.image(&disk(LONG)));
    let layer = quick.open(&file).expect("open");
    let start = quick.volume.header().payload_offset();
    layer.resize(2 * LONG + 100, &below).expect("resize");
    assert_eq!(layer.virtual_size(), 2 * LONG + 512);
    assert_eq!(file.len().expect("a length"), start + 2 * LONG + 100);
    let new = at(LONG)..at(2 * LONG);
    let refused = layer.reserve(new.clone(), Reserve::Place).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    layer.reserve(new.clone(), Reserve::Zeros).expect("reserve");
    layer.reserve(new, Reserve::Space).expect("reserve");
    let mut found = vec![0; usize::try_from(2 * LONG).unwrap()];
    layer.read_at(at(0), &mut found).expect("read");
    assert!(found[..LONG as usize] == disk(LONG));
    let all = at(0)..at(2 * LONG + 512);
    layer.zero(all, ZeroHow::MayUnmap, &below).expect("zero");
    assert_eq!(file.len().expect("a length"), start + 2 * LONG + 512);
    layer.read_at(at(0), &mut found).expect("read");
    assert!(found.iter().all(|byte| *byte == 0));
    let refused = layer.resize(u64::MAX - 4096, &below).unwrap_err();
    assert!(text(&refused).contains("below 2^63"));
    assert!(layer.write_at(at(2 * LONG + 511), &[1; 2], &below).is_err());
}

/// Each thread has every fourth stretch of 300 bytes, so that all of them want the same sectors at the same time.
#[test]
fn threads_that_share_sectors_lose_no_writes() {
    const STRETCH: u64 = 300;
    let quick = Keyed::quick();
    let size = 64 << 10;
    let file = memory(&quick.image(&disk(size)));
    let layer = quick.open(&file).expect("open");
    let below = Chain::default();
    let stretches = size / STRETCH;
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (layer, below) = (&layer, &below);
            scope.spawn(move || {
                for step in (thread..stretches).step_by(4) {
                    let start = step * STRETCH;
                    let bytes: Vec<u8> = (start..start + STRETCH)
                        .map(|at| pattern(thread as u8, at))
                        .collect();
                    layer.write_at(at(start), &bytes, below).expect("write");
                    let mut found = vec![0; bytes.len()];
                    layer.read_at(at(start), &mut found).expect("read");
                    assert!(found == bytes, "stretch {step}");
                }
            });
        }
    });
    let mut expected = disk(size);
    for step in 0..stretches {
        let start = step * STRETCH;
        for (place, byte) in (start..start + STRETCH).zip(&mut expected[start as usize..]) {
            *byte = pattern((step % 4) as u8, place);
        }
    }
    assert!(quick.contents(&bytes(&*file)).expect("read") == expected);
}
