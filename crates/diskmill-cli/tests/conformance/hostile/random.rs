//! Valid images with bytes of their tables changed at random.
//!
//! Besides surviving, ours must never read what `qemu-img` refuses to read, nor read it otherwise.

use diskmill_testkit::random::{seed, soak};
use diskmill_testkit::sparse_random::mix;
use diskmill_testkit::{Scratch, hash};

use super::image::{BASES, Base, Image};
use super::run;
use crate::tools::theirs;

/// Numbers that are on the edge of something.
const EDGES: [u64; 12] = [
    0,
    1,
    0x1ff,
    0x200,
    0xffff,
    0x10000,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 62,
    (1 << 62) | 0x50000,
    1 << 63,
    u64::MAX,
];

fn mutated(base: Base) {
    let scratch = Scratch::new();
    let good = Image::make(&scratch, base);
    let areas = [
        0,
        0,
        good.l1(),
        good.l2(),
        good.refcount_table(),
        good.refcount_block(),
        good.get64(64),
    ];
    let mut state = mix(seed() ^ base as u64);
    let mut next = |below: u64| {
        state = mix(state);
        state % below
    };
    for round in 0..25 * soak() {
        let mut image = good.clone();
        for _ in 0..=next(3) {
            let area = areas[next(areas.len() as u64) as usize];
            let at = (area + next(if area == 0 { 64 } else { 24 }) * 4).min(image.bytes.len() as u64 - 8);
            match next(4) {
                0 => image.put64(at, EDGES[next(EDGES.len() as u64) as usize]),
                1 => image.put32(at, EDGES[next(EDGES.len() as u64) as usize] as u32),
                2 => {
                    let old = image.get64(at);
                    image.put64(at, old ^ (1 << next(64)));
                }
                _ => image.put(at, &[next(256) as u8]),
            }
        }
        if next(10) == 0 {
            let len = next(image.bytes.len() as u64);
            image.bytes.truncate(len as usize);
        }
        image.write(scratch.join("bad.qcow2"));
        let seen = format!("{base:?}, seed {}, round {round}", seed());
        hold_against(&scratch, &seen);
    }
}

fn hold_against(scratch: &Scratch, seen: &str) {
    for words in [
        "info -f qcow2 bad.qcow2",
        "check -f qcow2 bad.qcow2",
        "map -f qcow2 bad.qcow2",
    ] {
        run(scratch, &["qemu-img"], words);
    }
    let info = run(scratch, &["qemu-img"], "info --output=json -f qcow2 bad.qcow2");
    // A size that a bit made huge would only measure how fast holes are written.
    if info.code == Some(0)
        && info.json()["virtual-size"]
            .as_u64()
            .is_some_and(|size| size <= 64 << 20)
    {
        let our = run(scratch, &["qemu-img"], "convert -f qcow2 -O raw bad.qcow2 ours");
        let their = theirs(scratch)
            .words("convert -f qcow2 -O raw bad.qcow2 theirs")
            .finish();
        if our.code == Some(0) {
            assert_eq!(
                their.code,
                Some(0),
                "{seen}: read what QEMU does not\n{our}\n{their}"
            );
            assert_eq!(
                hash::sha256_file(scratch.join("ours")),
                hash::sha256_file(scratch.join("theirs")),
                "{seen}: read otherwise"
            );
        }
        let _ = std::fs::remove_file(scratch.join("ours"));
        let _ = std::fs::remove_file(scratch.join("theirs"));
        std::fs::copy(scratch.join("bad.qcow2"), scratch.join("grown.qcow2")).unwrap();
        run(scratch, &["qemu-img"], "resize -f qcow2 grown.qcow2 +1M");
    }
}

#[test]
fn random__mutated_tables() {
    for base in BASES {
        mutated(base);
    }
}
