//! What every layer must do.
//!
//! A layer's tests call [`all`] with a layer, the chain below it, and the bytes the disk must read as.

use std::sync::Arc;

use diskmill_core::{Chain, ErrorKind, Extent, GuestOffset, HostSpan, Layer, State};

use crate::sparse_random::mix;

/// Everything below.
pub fn all(layer: &Arc<dyn Layer>, below: &Chain, expected: &[u8]) {
    assert_eq!(
        layer.virtual_size(),
        expected.len() as u64,
        "the size of the disk"
    );
    let extents = tiles_the_disk(&**layer);
    means_the_same_from_anywhere(&**layer, &extents, 200);
    bounds_a_run(&**layer, 100);
    refuses_what_is_outside(&**layer);
    reads_what_it_maps(&**layer, below, &extents, expected);
    reads_through_the_chain(layer, below, expected, 200);
}

fn at(byte: u64) -> GuestOffset {
    GuestOffset::new(byte)
}

/// Runs follow one another without gap or overlap, from the first byte of the disk to its last. Returns them.
pub fn tiles_the_disk(layer: &dyn Layer) -> Vec<(u64, Extent)> {
    let size = layer.virtual_size();
    let mut extents = Vec::new();
    let mut next = 0;
    while next < size {
        let extent = layer
            .map(at(next), size - next)
            .unwrap_or_else(|error| panic!("map {next:#x}: {error:?}"));
        assert!(extent.len > 0, "an empty run at {next:#x}");
        assert!(extent.len <= size - next, "a run at {next:#x} ends past the disk");
        extents.push((next, extent));
        next += extent.len;
    }
    extents
}

/// The state of byte `offset` of an extent, as one byte.
fn byte(state: State, offset: u64) -> State {
    let one = |span: HostSpan| HostSpan {
        file: span.file,
        at: span.at.saturating_add(offset),
        len: 1,
    };
    // Where compressed bytes are is said for whole units, and a run may join several.
    let nowhere = |span: HostSpan| HostSpan {
        at: Default::default(),
        len: 0,
        ..span
    };
    match state {
        State::Data(span) => State::Data(one(span)),
        State::Encrypted(span) => State::Encrypted(nowhere(span)),
        State::Compressed(span) => State::Compressed(nowhere(span)),
        State::Zero { reserved } => State::Zero {
            reserved: reserved.map(one),
        },
        other => other,
    }
}

/// A byte has the same state whichever run it is found in.
pub fn means_the_same_from_anywhere(layer: &dyn Layer, extents: &[(u64, Extent)], tries: u64) {
    let size = layer.virtual_size();
    for seed in 0..tries.min(size) {
        let offset = mix(seed) % size;
        let (start, whole) = extents
            .iter()
            .rfind(|(start, _)| *start <= offset)
            .expect("the runs tile the disk");
        let max = 1 + mix(seed ^ 0xabc) % (size - offset);
        let extent = layer.map(at(offset), max).expect("map");
        assert_eq!(
            byte(extent.state, 0),
            byte(whole.state, offset - start),
            "the state of byte {offset:#x}"
        );
    }
}

/// A run is at least one byte and at most what was asked for.
pub fn bounds_a_run(layer: &dyn Layer, tries: u64) {
    let size = layer.virtual_size();
    for seed in 0..tries.min(size) {
        let offset = mix(seed ^ 0x77) % size;
        for max in [1, 511, 512, 513, size, u64::MAX] {
            let extent = layer.map(at(offset), max).expect("map");
            let most = max.min(size - offset);
            assert!(
                (1..=most).contains(&extent.len),
                "{} bytes at {offset:#x}, must be 1 to {most}",
                extent.len
            );
            if let State::Data(span)
            | State::Zero {
                reserved: Some(span), ..
            } = extent.state
            {
                assert_eq!(span.len, extent.len, "the span of the run at {offset:#x}");
            }
        }
    }
}

/// There is nothing behind the end of the disk.
pub fn refuses_what_is_outside(layer: &dyn Layer) {
    let size = layer.virtual_size();
    for offset in [size, size + 1, u64::MAX] {
        let error = layer.map(at(offset), 1).expect_err("map past the end");
        assert_eq!(error.kind(), ErrorKind::Usage, "map at {offset:#x}: {error:?}");
    }
}

/// What a run says of its bytes is true: stored bytes are where it says, zeros are zeros, and the rest is below.
pub fn reads_what_it_maps(layer: &dyn Layer, below: &Chain, extents: &[(u64, Extent)], expected: &[u8]) {
    for (start, extent) in extents {
        let range = *start as usize..(start + extent.len) as usize;
        let expected = &expected[range];
        let mut found = vec![0xa5; expected.len()];
        match extent.state {
            State::Absent => below.read_at(at(*start), &mut found).expect("read below"),
            _ => layer
                .read_at(at(*start), &mut found)
                .unwrap_or_else(|error| panic!("read {start:#x}: {error:?}")),
        }
        same(*start, expected, &found);
        match extent.state {
            State::Zero { .. } => assert!(expected.iter().all(|byte| *byte == 0), "zeros at {start:#x}"),
            State::Data(span) => {
                let file = layer.file(span.file).expect("the file of a span");
                file.read_padded(span.at, &mut found).expect("read the span");
                same(*start, expected, &found);
            }
            _ => {}
        }
    }
}

/// Bytes come back from any offset, of any length, through the chain.
pub fn reads_through_the_chain(layer: &Arc<dyn Layer>, below: &Chain, expected: &[u8], tries: u64) {
    let mut layers = vec![Arc::clone(layer)];
    layers.extend(below.layers().iter().cloned());
    let chain = Chain::new(layers);
    for seed in 0..tries {
        let offset = mix(seed ^ 0x5eed) % (expected.len() as u64 + 1);
        let len = mix(seed) % (expected.len() as u64 - offset + 1);
        let len = if seed % 2 == 0 { len.min(5000) } else { len };
        let mut found = vec![0xa5; len as usize];
        chain.read_at(at(offset), &mut found).expect("read");
        same(
            offset,
            &expected[offset as usize..(offset + len) as usize],
            &found,
        );
    }
}

/// Panics with the first byte that differs.
#[track_caller]
pub fn same(start: u64, expected: &[u8], found: &[u8]) {
    assert_eq!(expected.len(), found.len());
    if expected == found {
        return;
    }
    if let Some(index) = expected.iter().zip(found).position(|(a, b)| a != b) {
        let differ = expected.iter().zip(found).filter(|(a, b)| a != b).count();
        panic!(
            "byte {:#x} is {:#04x}, must be {:#04x} ({differ} bytes differ)",
            start + index as u64,
            found[index],
            expected[index]
        );
    }
}
