//! What every storage must do.
//!
//! A storage's tests call [`all`] with a function that makes an empty one, or with a fixed length one that holds only
//! zeros; [`Memory`-like](StorageMut) models are plain vectors here. Storages that can only append call
//! [`append_only`], those that can only be read call [`reads`].

use std::io::{ErrorKind as IoErrorKind, IoSlice};
use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{ErrorKind, HostOffset, HostRun, Result, Storage, StorageMut, ZeroHow};

use crate::sparse_random::mix;

/// Both ways to make zeros.
const WAYS: [ZeroHow; 2] = [ZeroHow::KeepAllocated, ZeroHow::MayUnmap];

/// Everything below that suits what `make` makes: a storage of length 0, or one of fixed length, at least 256 KiB,
/// that reads as zeros.
pub fn all(make: &dyn Fn() -> Arc<dyn StorageMut>) {
    let fixed = make().hints().fixed_len;
    hints(&*make());
    reads_what_was_written(&*make());
    writes_vectors(&*make());
    zeroes(&*make());
    discards(&*make());
    allocates(&*make());
    finds_holes(&*make());
    reads_padded(&*make());
    serves_many_threads(&*make());
    follows_the_model(&*make(), 1, 400);
    if fixed {
        keeps_its_length(&*make());
    } else {
        grows(&*make());
        resizes(&*make());
        refuses_what_no_file_can_have(&*make());
    }
    make().sync().expect("sync");
}

/// Hints that callers can work with.
pub fn hints(storage: &dyn Storage) {
    let hints = storage.hints();
    assert!(
        hints.align.is_power_of_two(),
        "align is {}, must be a power of two",
        hints.align
    );
    assert!(
        hints.request >= hints.align,
        "a request of {} is less than align",
        hints.request
    );
    assert!(hints.parallel >= 1);
}

/// Bytes come back from where they were put, at any offset and of any length.
pub fn reads_what_was_written(storage: &dyn StorageMut) {
    let cases = [
        (0, 1),
        (511, 2),
        (4095, 2),
        (4096, 4096),
        (8191, 4098),
        (13, 70_000),
        (65_536, 65_536),
    ];
    for (round, (at, len)) in cases.into_iter().enumerate() {
        let bytes = pattern(round as u64, len);
        storage.write_at(HostOffset::new(at), &bytes).expect("write");
        same(&read(storage, at, len), &bytes, &format!("{len} bytes at {at}"));
    }
    storage
        .read_at(HostOffset::new(0), &mut [])
        .expect("read nothing");
    storage.write_at(HostOffset::new(0), &[]).expect("write nothing");
    same(
        &read(storage, 65_536, 65_536),
        &pattern(6, 65_536),
        "an empty write",
    );
}

/// A vectored write is its slices one behind the other, however many and however small.
pub fn writes_vectors(storage: &dyn StorageMut) {
    let bytes = pattern(7, 40_000);
    let mut slices = vec![IoSlice::new(&[])];
    slices.extend(bytes.chunks(17).map(IoSlice::new));
    assert!(slices.len() > 2048, "more than one system call takes");
    storage
        .write_vectored_at(HostOffset::new(777), &slices)
        .expect("write");
    same(&read(storage, 777, bytes.len()), &bytes, "many slices");
    storage
        .write_vectored_at(HostOffset::new(9), &[])
        .expect("write nothing");
    let whole = [IoSlice::new(&bytes[..4096]), IoSlice::new(&bytes[4096..8192])];
    storage
        .write_vectored_at(HostOffset::new(4096), &whole)
        .expect("write");
    same(&read(storage, 4096, 8192), &bytes[..8192], "whole blocks");
}

/// Zeroed ranges read as zeros to the byte, in either way, and nothing else changes.
pub fn zeroes(storage: &dyn StorageMut) {
    let size = 200_000_usize;
    for how in WAYS {
        for range in [
            0..1_u64,
            1..4095,
            4096..8192,
            5000..150_000,
            65_536..131_072,
            199_999..200_000,
            7..7,
        ] {
            let mut model = pattern(3, size);
            storage.write_at(HostOffset::ZERO, &model).expect("write");
            storage.zero(host(&range), how).expect("zero");
            model[range.start as usize..range.end as usize].fill(0);
            same(&read(storage, 0, size), &model, &format!("{range:?} {how:?}"));
        }
    }
}

/// A discard leaves everything outside its range as it was, and the length too.
pub fn discards(storage: &dyn StorageMut) {
    let model = pattern(4, 150_000);
    storage.write_at(HostOffset::ZERO, &model).expect("write");
    let len = storage.len().expect("len");
    storage.discard(host(&(10_000..100_001))).expect("discard");
    storage.discard(host(&(5..5))).expect("discard nothing");
    storage
        .discard(host(&(len..len + 100_000)))
        .expect("discard past the end");
    assert_eq!(storage.len().expect("len"), len);
    same(&read(storage, 0, 10_000), &model[..10_000], "before the discard");
    same(
        &read(storage, 100_001, 49_999),
        &model[100_001..],
        "behind the discard",
    );
}

/// Reserving space changes no byte.
pub fn allocates(storage: &dyn StorageMut) {
    let bytes = pattern(5, 10_000);
    storage.write_at(HostOffset::new(50_000), &bytes).expect("write");
    storage.allocate(host(&(0..100_000))).expect("allocate");
    assert!(storage.len().expect("len") >= 100_000);
    let mut model = vec![0; 100_000];
    model[50_000..60_000].copy_from_slice(&bytes);
    same(&read(storage, 0, 100_000), &model, "after allocate");
}

/// What is called a hole reads as zeros, runs tile the storage, and past the end there is one hole that never ends.
pub fn finds_holes(storage: &dyn StorageMut) {
    let size = 262_144_u64;
    if !storage.hints().fixed_len {
        storage.set_len(size).expect("set the length");
    }
    check_runs(storage);
    storage
        .write_at(HostOffset::new(131_072), &pattern(8, 4096))
        .expect("write");
    check_runs(storage);
    // An answer must not outlive a write into what it called a hole.
    assert!(matches!(
        storage.run_at(HostOffset::new(65_536)),
        Ok(HostRun::Hole(_) | HostRun::Data(_))
    ));
    storage
        .write_at(HostOffset::new(65_536), &pattern(9, 100))
        .expect("write");
    assert!(matches!(
        storage.run_at(HostOffset::new(65_536)),
        Ok(HostRun::Data(_))
    ));
    check_runs(storage);
    storage.zero(host(&(0..size)), ZeroHow::MayUnmap).expect("zero");
    check_runs(storage);
    let end = storage.len().expect("len");
    for at in [end, end + 1, u64::MAX - 1] {
        assert_eq!(
            storage.run_at(HostOffset::new(at)).expect("run past the end"),
            HostRun::Hole(u64::MAX - at)
        );
    }
}

/// A padded read is what there is and zeros behind it.
pub fn reads_padded(storage: &dyn StorageMut) {
    let fixed = storage.hints().fixed_len;
    let end = if fixed {
        storage.len().expect("len")
    } else {
        100_001
    };
    let bytes = pattern(10, 1000);
    storage
        .write_at(HostOffset::new(end - 1000), &bytes)
        .expect("write");
    let mut buf = vec![0xee; 3000];
    storage
        .read_padded(HostOffset::new(end - 500), &mut buf)
        .expect("read");
    assert_eq!(buf[..500], bytes[500..]);
    assert!(buf[500..].iter().all(|byte| *byte == 0));
    for at in [end, end + 1, end + (1 << 40)] {
        buf.fill(0xee);
        storage
            .read_padded(HostOffset::new(at), &mut buf)
            .expect("read past the end");
        assert!(buf.iter().all(|byte| *byte == 0), "at {at}");
    }
}

/// Threads that keep to their own bytes do not disturb each other, even within one block.
pub fn serves_many_threads(storage: &dyn StorageMut) {
    const THREADS: u64 = 4;
    // Neither a divisor nor a multiple of any block.
    const STEP: u64 = 333;
    const ROUNDS: u64 = 150;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let at = HostOffset::new((round * THREADS + thread) * STEP);
                    let bytes = pattern(round * THREADS + thread, STEP as usize);
                    storage.write_at(at, &bytes).expect("write");
                    let mut back = vec![0; bytes.len()];
                    storage.read_at(at, &mut back).expect("read");
                    same(&back, &bytes, "what a thread wrote itself");
                }
            });
        }
    });
    for number in 0..THREADS * ROUNDS {
        let found = read(storage, number * STEP, STEP as usize);
        same(
            &found,
            &pattern(number, STEP as usize),
            &format!("piece {number}"),
        );
    }
}

/// Writing or zeroing past the end grows a storage and the gap reads as zeros; reading past it is an end of file.
pub fn grows(storage: &dyn StorageMut) {
    assert_eq!(storage.len().expect("len"), 0);
    assert!(storage.is_empty().expect("is empty"));
    end_of_file(storage, 0, 1);
    storage.write_at(HostOffset::new(10_000), b"abc").expect("write");
    assert_eq!(storage.len().expect("len"), 10_003);
    assert!(!storage.is_empty().expect("is empty"));
    assert!(read(storage, 0, 10_000).iter().all(|byte| *byte == 0));
    assert_eq!(read(storage, 10_000, 3), b"abc");
    end_of_file(storage, 10_000, 4);
    end_of_file(storage, 10_003, 1);
    end_of_file(storage, 1 << 40, 512);
    for (how, end) in [(ZeroHow::MayUnmap, 30_001), (ZeroHow::KeepAllocated, 50_001)] {
        storage
            .zero(host(&(end - 10_000..end)), how)
            .expect("zero past the end");
        assert_eq!(storage.len().expect("len"), end, "{how:?}");
        end_of_file(storage, end - 1, 2);
    }
    storage
        .zero(host(&(10_001..60_001)), ZeroHow::MayUnmap)
        .expect("zero over the end");
    assert_eq!(storage.len().expect("len"), 60_001);
    let bytes = read(storage, 0, 60_001);
    assert_eq!(&bytes[9999..10_003], b"\0a\0\0");
    storage.allocate(host(&(60_000..70_001))).expect("allocate");
    assert_eq!(storage.len().expect("len"), 70_001);
    assert!(read(storage, 10_001, 60_000).iter().all(|byte| *byte == 0));
    // A far write costs no more than its bytes.
    storage
        .write_at(HostOffset::new(1 << 33), b"far")
        .expect("write far away");
    assert_eq!(read(storage, (1 << 33) - 1, 4), b"\0far");
    storage.set_len(0).expect("set the length");
}

/// The length follows what is asked, and bytes cut off do not come back.
pub fn resizes(storage: &dyn StorageMut) {
    storage
        .write_at(HostOffset::ZERO, &pattern(11, 20_000))
        .expect("write");
    storage.set_len(10_001).expect("shrink");
    assert_eq!(storage.len().expect("len"), 10_001);
    end_of_file(storage, 10_000, 2);
    storage.set_len(20_000).expect("grow");
    same(
        &read(storage, 0, 10_001),
        &pattern(11, 20_000)[..10_001],
        "what was kept",
    );
    assert!(read(storage, 10_001, 9999).iter().all(|byte| *byte == 0));
    storage.set_len(0).expect("empty");
    assert!(storage.is_empty().expect("is empty"));
}

/// Offsets past what a file can have are an error, not a panic and not a wrap.
pub fn refuses_what_no_file_can_have(storage: &dyn StorageMut) {
    let far = HostOffset::new(i64::MAX as u64);
    let last = HostOffset::new(u64::MAX);
    for at in [far, HostOffset::new(u64::MAX - 1)] {
        storage.write_at(at, b"xy").expect_err("write");
        storage.read_at(at, &mut [0; 2]).expect_err("read");
        storage
            .write_vectored_at(at, &[IoSlice::new(b"x"), IoSlice::new(b"y")])
            .expect_err("write a vector");
        for how in WAYS {
            storage.zero(at..last, how).expect_err("zero");
        }
        storage.allocate(at..last).expect_err("allocate");
    }
    storage.set_len(u64::MAX).expect_err("set the length");
    assert_eq!(storage.len().expect("len"), 0);
}

/// A storage of fixed length takes any shorter length and keeps its own; past the end there is no room.
pub fn keeps_its_length(storage: &dyn StorageMut) {
    let len = storage.len().expect("len");
    storage.set_len(len).expect("the same");
    storage.set_len(0).expect("less");
    assert_eq!(storage.len().expect("len"), len);
    storage.set_len(len + 1).expect_err("more");
    no_space(storage.write_at(HostOffset::new(len), b"x"));
    no_space(storage.write_at(HostOffset::new(len - 1), b"xy"));
    no_space(storage.zero(host(&(len - 1..len + 1)), ZeroHow::MayUnmap));
    no_space(storage.allocate(host(&(0..len + 1))));
    end_of_file(storage, len, 1);
    end_of_file(storage, len - 1, 2);
    assert_eq!(storage.len().expect("len"), len);
}

/// Random requests do to the storage what they do to a plain vector.
pub fn follows_the_model(storage: &dyn StorageMut, seed: u64, steps: u32) {
    let fixed = storage.hints().fixed_len;
    let most = 200_000_u64;
    let mut model = vec![0_u8; if fixed { most as usize } else { 0 }];
    // Bytes whose value a discard has left open.
    let mut known = vec![true; most as usize];
    let mut state = seed;
    let mut next = |below: u64| {
        state = mix(state);
        state % below
    };
    for step in 0..steps {
        let at = next(most);
        let len = match next(3) {
            0 => next(600),
            1 => next(20_000),
            _ => 4096 * next(8),
        };
        let at = if next(3) == 0 { at & !4095 } else { at };
        let end = (at + len).min(most);
        let range = at as usize..end as usize;
        let mut touch = |model: &mut Vec<u8>, byte: Option<u64>| {
            if range.is_empty() {
                return;
            }
            model.resize(model.len().max(range.end), 0);
            known[range.clone()].fill(true);
            match byte {
                Some(seed) => model[range.clone()].copy_from_slice(&pattern(seed, range.len())),
                None => model[range.clone()].fill(0),
            }
        };
        match next(8) {
            0..=3 => {
                storage
                    .write_at(HostOffset::new(at), &pattern(u64::from(step), range.len()))
                    .expect("write");
                touch(&mut model, Some(u64::from(step)));
            }
            4 => {
                storage
                    .zero(host(&(at..end)), WAYS[next(2) as usize])
                    .expect("zero");
                touch(&mut model, None);
            }
            5 => {
                storage.discard(host(&(at..end))).expect("discard");
                known[range].fill(false);
            }
            6 if !fixed => {
                storage.set_len(at).expect("set the length");
                let old = model.len();
                model.resize(at as usize, 0);
                if old < model.len() {
                    known[old..model.len()].fill(true);
                }
            }
            _ => {
                let mut buf = vec![0xaa; range.len()];
                storage.read_padded(HostOffset::new(at), &mut buf).expect("read");
                for (index, byte) in range.zip(buf) {
                    if index < model.len() && known[index] {
                        assert_eq!(byte, model[index], "byte {index} in step {step} of seed {seed}");
                    }
                }
            }
        }
        if !fixed {
            assert_eq!(storage.len().expect("len"), model.len() as u64, "step {step}");
        }
    }
    let found = read(storage, 0, model.len());
    for index in (0..model.len()).filter(|index| known[*index]) {
        assert_eq!(
            found[index], model[index],
            "byte {index} at the end of seed {seed}"
        );
    }
}

/// A storage, of whatever kind, that holds exactly `expected`.
pub fn reads(storage: &dyn Storage, expected: &[u8]) {
    hints(storage);
    let len = expected.len() as u64;
    assert_eq!(storage.len().expect("len"), len);
    same(&read(storage, 0, expected.len()), expected, "all of it");
    for at in [0, 1, 511, 512, 4095, len.saturating_sub(1)] {
        for wanted in [0, 1, 512, 5000_u64] {
            let (start, end) = (at.min(len), (at + wanted).min(len));
            let found = read(storage, start, (end - start) as usize);
            same(&found, &expected[start as usize..end as usize], "a part");
        }
    }
    end_of_file(storage, len, 1);
    check_runs(storage);
}

/// A storage that can only append: `written` tells what has come out at the other end.
pub fn append_only(storage: &dyn StorageMut, written: &dyn Fn() -> Vec<u8>) {
    assert!(storage.hints().append_only);
    storage.write_at(HostOffset::ZERO, b"ab").expect("write");
    storage.write_at(HostOffset::new(5), b"f").expect("skip");
    storage
        .write_vectored_at(HostOffset::new(6), &[IoSlice::new(b"g"), IoSlice::new(b"h")])
        .expect("write a vector");
    assert_eq!(written(), b"ab\0\0\0fgh");
    storage.zero(host(&(8..10)), ZeroHow::MayUnmap).expect("zero");
    assert_eq!(written(), b"ab\0\0\0fgh\0\0");
    let error = storage.write_at(HostOffset::new(9), b"x").expect_err("go back");
    assert_eq!(error.kind(), ErrorKind::Usage);
    storage.set_len(12).expect("promise a length");
    assert_eq!(storage.len().expect("len"), 12);
    storage.sync().expect("sync");
    assert_eq!(written(), b"ab\0\0\0fgh\0\0\0\0");
    storage.set_len(3).expect_err("take back what has gone out");
    storage.read_at(HostOffset::ZERO, &mut [0; 2]).expect_err("read");
}

/// Bytes that are nowhere zero and differ between seeds.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = mix(seed ^ 0x5eed);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = mix(state);
        bytes.extend((state | 0x0101_0101_0101_0101).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Demands equal bytes, and says where they differ instead of what they all are.
fn same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    if let Some(at) = (0..found.len()).find(|at| found[*at] != expected[*at]) {
        let count = (at..found.len()).filter(|at| found[*at] != expected[*at]).count();
        panic!(
            "{what}: byte {at} is {}, should be {}, and {count} differ in all",
            found[at], expected[at]
        );
    }
}

fn read(storage: &dyn Storage, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    storage.read_at(HostOffset::new(at), &mut bytes).expect("read");
    bytes
}

fn host(range: &Range<u64>) -> Range<HostOffset> {
    HostOffset::new(range.start)..HostOffset::new(range.end)
}

fn check_runs(storage: &dyn Storage) {
    let end = storage.len().expect("len");
    let mut at = 0;
    while at < end {
        let len = match storage.run_at(HostOffset::new(at)).expect("run") {
            HostRun::Data(len) => len,
            HostRun::Hole(len) => {
                let count = len.min(end - at) as usize;
                let bytes = read(storage, at, count);
                assert!(bytes.iter().all(|byte| *byte == 0), "hole of {len} bytes at {at}");
                len
            }
            other => panic!("{other:?} at {at}"),
        };
        assert!(len > 0, "an empty run at {at}");
        at = at.saturating_add(len);
    }
}

fn end_of_file(storage: &dyn Storage, at: u64, len: usize) {
    let error = storage
        .read_at(HostOffset::new(at), &mut vec![0; len])
        .expect_err("read past the end");
    assert_eq!(error.kind(), ErrorKind::Io, "{error:?}");
    let source = error.io_error().expect("an error of the host");
    assert_eq!(source.kind(), IoErrorKind::UnexpectedEof, "{len} bytes at {at}");
}

fn no_space(answer: Result<()>) {
    let error = answer.expect_err("there is no room");
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
}
