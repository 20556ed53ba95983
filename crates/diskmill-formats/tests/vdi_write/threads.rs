//! Many threads on one image.

use diskmill_core::{GuestOffset, ZeroHow};
use diskmill_testkit::model;
use diskmill_testkit::sparse_random::mix;

use super::images;

/// Each thread has every fourth stretch of 64 KiB, so that all of them want the same blocks at the same time.
#[test]
fn threads_that_share_blocks_do_not_lose_writes() {
    const STRETCH: u64 = 64 << 10;
    for name in ["empty", "over same", "fixed"] {
        let image = images::named(name).make();
        let disk = images::memory(&image.file);
        let layer = images::open(&disk).expect("open");
        let stretches = image.kind.size / STRETCH;
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (layer, below) = (&layer, &image.below);
                scope.spawn(move || {
                    for step in (thread..stretches).step_by(4) {
                        let at = step * STRETCH;
                        let start = GuestOffset::new(at);
                        let bytes: Vec<u8> = (at..at + STRETCH)
                            .map(|at| model::pattern(thread as u8, at))
                            .collect();
                        layer.write_at(start, &bytes, below).expect("write");
                        if mix(step).is_multiple_of(5) {
                            layer.flush().expect("flush");
                        }
                        if mix(step).is_multiple_of(7) {
                            let end = GuestOffset::new(at + STRETCH / 2);
                            layer.zero(start..end, ZeroHow::MayUnmap, below).expect("zero");
                        }
                    }
                });
            }
        });
        layer.flush().expect("flush");
        drop(layer);
        let mut expected = image.start.clone();
        for step in 0..stretches {
            let at = step * STRETCH;
            for (place, byte) in (at..at + STRETCH).zip(&mut expected[at as usize..]) {
                let zero = mix(step).is_multiple_of(7) && place < at + STRETCH / 2;
                *byte = if zero {
                    0
                } else {
                    model::pattern((step % 4) as u8, place)
                };
            }
        }
        let bytes = images::bytes(&disk);
        assert!(image.read(&bytes).expect("read") == expected, "{name}");
        image.assert_good(&bytes, &expected);
    }
}
