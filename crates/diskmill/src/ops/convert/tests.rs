//! Pipes, and calls that fail one by one.

use std::io::{Cursor, Write};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, Mutex};

use diskmill_core::{
    Chain, Compression, CreateSpec, GuestOffset, HostOffset, Job, OpenSpec, Result, Role, Storage, StorageMut,
};
use diskmill_formats::registry;
use diskmill_storage::{Memory, PipeIn, PipeOut};
use diskmill_testkit::fault::{Failure, Faults, Lasting};
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, oracle};

use super::lane::Feed;
use super::leave::Leave;
use super::new::{Reading, Start};
use super::source::{Scanner, Source};
use super::{Input, NewImage, Output, Plan, Summary, cut, input, new};
use crate::spec::ImageSpec;
use crate::target::Target;

const SIZE: u64 = (3 << 20) + 512;

fn image(path: &Path, format: &str) -> NewImage {
    NewImage::new(ImageSpec::from_path(path), format)
}

fn plan(workers: usize) -> Plan {
    let mut plan = Plan::new(Input::Stdin, Output::Stdout);
    plan.workers = NonZeroUsize::new(workers);
    plan
}

fn stream(bytes: &[u8]) -> PipeIn {
    PipeIn::new(Cursor::new(bytes.to_vec()))
}

/// A source of one raw disk.
fn raw(storage: Arc<dyn Storage>) -> Result<Source> {
    let driver = registry::by_name("raw").unwrap();
    let how = OpenSpec::default();
    let layer = driver
        .parse(Arc::clone(&storage), &how)?
        .attach(vec![(Role::Main, storage)], &how)?;
    Source::new(vec![(Chain::new(vec![layer]), Vec::new())])
}

fn memory(bytes: &[u8]) -> Arc<dyn StorageMut> {
    let memory = Memory::new();
    memory.write_at(HostOffset::ZERO, bytes).unwrap();
    Arc::new(memory)
}

#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Starts a raw disk of `size` bytes into a pipe.
fn piped(size: u64) -> (Start, Kept) {
    let kept = Kept::default();
    let target = Target::pipe(PipeOut::new(kept.clone()));
    let driver = registry::by_name("raw").unwrap();
    let builder = driver.build(&CreateSpec::new(size), target.files()).unwrap();
    (Start { target, builder }, kept)
}

#[test]
fn a_stream_of_unknown_length_becomes_an_image_of_any_format() {
    let scratch = Scratch::new();
    for len in [0, 1, 513, SIZE as usize, 1_000_001] {
        let mut bytes = SparseRandom::new(len as u64, SIZE).bytes();
        bytes.truncate(len);
        let (as_raw, as_qcow2) = (scratch.join("raw"), scratch.join("qcow2"));
        let how = image(&as_raw, "raw");
        assert!(new::takes_streams(&how));
        let done = new::stream_to_image(&plan(3), &how, &mut stream(&bytes), Job::silent()).unwrap();
        let source = input::spool(&mut stream(&bytes), &as_qcow2, Job::silent()).unwrap();
        new::to_image(&plan(3), &image(&as_qcow2, "qcow2"), &source, Job::silent()).unwrap();
        bytes.resize(len.next_multiple_of(512), 0);
        assert_eq!(done.virtual_size, bytes.len() as u64);
        assert!(std::fs::read(&as_raw).unwrap() == bytes, "{len}");
        oracle::assert_clean(&as_qcow2, "qcow2");
        oracle::assert_identical(&as_raw, "raw", &as_qcow2, "qcow2");
    }
    assert_eq!(scratch.names(), ["qcow2", "raw"]);
}

#[test]
fn a_pipe_gets_every_byte_in_order() {
    let bytes = SparseRandom::new(9, SIZE).bytes();
    for workers in [1, 5] {
        let (start, kept) = piped(SIZE);
        let source = raw(memory(&bytes)).unwrap();
        let plan = plan(workers);
        let cut = cut(&plan, start.builder.unit());
        let reading = Reading {
            source: &source,
            below: None,
            feed: Feed::Scan(Scanner::new(&source, cut, Leave::Nothing)),
            cut,
        };
        start.run(&plan, reading, Job::silent()).unwrap();
        assert!(*kept.0.lock().unwrap() == bytes);

        let (start, kept) = piped(0);
        start
            .run_stream(&plan, &mut stream(&bytes), Job::silent())
            .unwrap();
        assert!(*kept.0.lock().unwrap() == bytes);
    }
}

/// Converts between storages in memory that may fail.
fn through(
    faults: &Arc<Faults>,
    bytes: &[u8],
    workers: usize,
    compress: bool,
) -> Result<(Summary, Arc<dyn StorageMut>)> {
    let source: Arc<dyn Storage> = faults.wrap(memory(bytes));
    let source = raw(source)?;
    let file = memory(&[]);
    let mut plan = plan(workers);
    plan.compress = compress.then(Compression::default);
    let mut spec = CreateSpec::new(source.size());
    spec.compression = plan.compress;
    let driver = registry::by_name("qcow2").unwrap();
    let builder = driver.build(&spec, vec![(Role::Main, faults.wrap(Arc::clone(&file)))])?;
    let cut = cut(&plan, builder.unit());
    let reading = Reading {
        source: &source,
        below: None,
        feed: Feed::Scan(Scanner::new(&source, cut, Leave::Nothing)),
        cut,
    };
    let target = Target::pipe(PipeOut::new(std::io::sink()));
    let done = Start { target, builder }.run(&plan, reading, Job::silent())?;
    Ok((done, file))
}

#[test]
fn whichever_call_fails_the_conversion_fails_and_ends() {
    let bytes = SparseRandom::new(10, SIZE).bytes();
    for (workers, compress) in [(1, false), (4, false), (4, true)] {
        let faults = Faults::new();
        let (_, file) = through(&faults, &bytes, workers, compress).unwrap();
        let calls = faults.calls();
        assert!(calls > 10, "{calls}");
        assert!(file.len().unwrap() > 0);
        for number in 0..calls {
            let faults = Faults::new();
            faults.fail_at(number, Failure::NoSpace, Lasting::ForGood);
            let done = through(&faults, &bytes, workers, compress);
            assert!(faults.struck() > 0, "call {number} of {calls} was not made");
            assert!(done.is_err(), "call {number} of {calls}");
        }
    }
}

#[test]
fn chunks_tile_the_disk_in_steps() {
    let bytes = SparseRandom::new(11, SIZE).bytes();
    let source = raw(memory(&bytes)).unwrap();
    for unit in [512, 4096, 65_536, 2 << 20] {
        let cut = cut(&plan(1), unit);
        let mut scanner = Scanner::new(&source, cut, Leave::Nothing);
        let mut chunk = super::source::Chunk::default();
        let (mut at, mut turn) = (0, 0);
        while scanner.next(&mut chunk).unwrap() {
            assert_eq!((chunk.range.start, chunk.turn), (at, turn));
            assert!(chunk.range.end.is_multiple_of(cut.step) || chunk.range.end == SIZE);
            assert!(chunk.bytes as u64 <= cut.chunk);
            at = chunk.range.end;
            turn += 1;
        }
        assert_eq!(at, SIZE);
    }
    assert!(source.layer(0, 0).is_ok() && source.layer(1, 0).is_err());
    let layer = source.layer(0, 0).unwrap();
    assert!(layer.map(GuestOffset::ZERO, 1).is_ok());
}
