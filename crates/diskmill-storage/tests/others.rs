//! The storages that are not files.

use std::io::{Cursor, Read, Write};
use std::sync::{Arc, Mutex};

use diskmill_core::{ErrorKind, ForwardSource, HostOffset, HostRun, Storage, StorageMut, ZeroHow};
use diskmill_storage::{CacheMode, File, FileOptions, LockPlan, Memory, PipeIn, PipeOut, Window, copy_range};
use diskmill_testkit::Scratch;
use diskmill_testkit::contract::storage::{self as contract, pattern};

fn at(offset: u64) -> HostOffset {
    HostOffset::new(offset)
}

fn file(scratch: &Scratch, name: &str, bytes: &[u8]) -> Arc<File> {
    let path = scratch.file(name, bytes);
    Arc::new(File::open(path, &FileOptions::write(LockPlan::WRITE)).unwrap())
}

#[test]
fn memory_keeps_the_contract() {
    contract::all(&|| Arc::new(Memory::new()));
    let bytes = pattern(1, 100_000);
    contract::reads(&Memory::from(bytes.clone()), &bytes);
    assert_eq!(Memory::from(bytes.as_slice()).to_vec().unwrap(), bytes);
    contract::reads(&Memory::zeroed(10_001), &[0; 10_001]);
}

#[test]
fn memory_takes_what_was_written_and_no_more() {
    let memory = Memory::zeroed(1 << 45);
    memory.write_at(at((1 << 44) + 5), b"x").unwrap();
    assert_eq!(memory.allocated().unwrap(), Some(4096));
    assert_eq!(memory.run_at(at(0)).unwrap(), HostRun::Hole(1 << 44));
    assert_eq!(memory.run_at(at(1 << 44)).unwrap(), HostRun::Data(4096));
    memory.zero(at(0)..at(1 << 45), ZeroHow::MayUnmap).unwrap();
    assert_eq!(memory.allocated().unwrap(), Some(0));
    assert_eq!(memory.to_vec().unwrap_err().kind(), ErrorKind::NoSpace);
}

#[test]
fn windows_keep_the_contract() {
    let scratch = Scratch::beneath("/dev/shm");
    for start in [0, 1, 4096, 5000] {
        contract::all(&|| {
            let inner: Arc<dyn StorageMut> = Arc::new(Memory::zeroed(start));
            Arc::new(Window::new(inner, at(start), None).unwrap())
        });
        contract::all(&|| {
            let inner = Arc::new(Memory::zeroed(start + 300_000));
            Arc::new(Window::new(inner, at(start), Some(270_001)).unwrap())
        });
        contract::all(&|| {
            let path = scratch.hole("disk", start + 400_000);
            let options = FileOptions::write(LockPlan::WRITE).cache(CacheMode::None);
            let inner = Arc::new(File::open(path, &options).unwrap());
            let window = Window::new(inner, at(start), Some(270_001)).unwrap();
            assert_eq!(window.hints().align > 1, start % 4096 == 0);
            Arc::new(window)
        });
    }
}

#[test]
fn a_window_touches_nothing_else() {
    let bytes = pattern(2, 10_000);
    let inner = Arc::new(Memory::from(bytes.clone()));
    let window = Window::new(inner.clone(), at(1000), Some(5000)).unwrap();
    contract::reads(&window, &bytes[1000..6000]);
    window.zero(at(0)..at(5000), ZeroHow::MayUnmap).unwrap();
    window.discard(at(0)..at(9000)).unwrap();
    window.set_len(0).unwrap();
    let mut expected = bytes.clone();
    expected[1000..6000].fill(0);
    assert_eq!(inner.to_vec().unwrap(), expected);
    let mut padded = [1; 100];
    window.read_padded(at(4990), &mut padded).unwrap();
    assert_eq!(padded, [0; 100], "not what lies behind the window");
}

#[test]
fn a_window_lies_within() {
    let inner = Arc::new(Memory::zeroed(1000));
    for (start, len) in [
        (0, Some(1001)),
        (1001, None),
        (1, Some(1000)),
        (u64::MAX, Some(1)),
        (5, Some(u64::MAX)),
    ] {
        let error = Window::new(inner.clone(), at(start), len).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
    }
    Window::new(inner.clone(), at(1000), None).unwrap();
    let scratch = Scratch::new();
    let file = file(&scratch, "disk", &[0; 1000]);
    let window = Window::new(Arc::clone(&file), at(100), Some(50)).unwrap();
    let raw = window.raw_file().unwrap();
    assert_eq!((raw.base, raw.len), (100, 50));
}

/// The other end of a pipe.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        // As a pipe may, it takes less than it is given.
        let count = buf.len().min(1000);
        self.0.lock().unwrap().extend(&buf[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_pipe_takes_bytes_in_order() {
    let sink = Sink::default();
    let pipe = PipeOut::new(sink.clone());
    contract::append_only(&pipe, &|| sink.0.lock().unwrap().clone());
    assert_eq!(pipe.sent(), 12);
    let sink = Sink::default();
    let pipe = PipeOut::new(sink.clone());
    pipe.set_len(300_000).unwrap();
    pipe.write_at(at(100_000), &pattern(1, 50_000)).unwrap();
    pipe.finish().unwrap();
    let mut expected = vec![0; 300_000];
    expected[100_000..150_000].copy_from_slice(&pattern(1, 50_000));
    assert!(*sink.0.lock().unwrap() == expected);
}

#[test]
fn a_reader_that_goes_away_is_an_error() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let pipe = PipeOut::new(writer);
    let error = pipe.write_at(at(0), &[1; 100]).unwrap_err();
    assert_eq!(error.io_error().unwrap().kind(), std::io::ErrorKind::BrokenPipe);
}

/// Gives a byte or two at a time.
struct Trickle(Cursor<Vec<u8>>);

impl Read for Trickle {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let count = buf.len().min(7);
        self.0.read(&mut buf[..count])
    }
}

#[test]
fn a_source_fills_the_buffer_until_it_ends() {
    let bytes = pattern(3, 1000);
    let mut source = PipeIn::new(Trickle(Cursor::new(bytes.clone())));
    let mut buf = [0; 300];
    let mut found: Vec<u8> = Vec::new();
    for expected in [300, 300, 300, 100, 0, 0] {
        let count = source.next(&mut buf).unwrap();
        assert_eq!(count, expected);
        found.extend(&buf[..count]);
    }
    assert_eq!(found, bytes);
}

#[test]
fn copies_within_the_kernel() {
    for scratch in [Scratch::new(), Scratch::beneath("/dev/shm")] {
        let bytes = pattern(4, 1_000_000);
        let source = file(&scratch, "source", &bytes);
        let target = file(&scratch, "target", b"");
        assert_eq!(target.run_at(at(0)).unwrap(), HostRun::Hole(u64::MAX));
        let copied = copy_range(&*source, at(1000), &*target, at(5000), 900_000).unwrap();
        assert_eq!(copied, 900_000);
        // Length and holes are known anew.
        assert_eq!(target.len().unwrap(), 905_000);
        assert!(matches!(target.run_at(at(5000)).unwrap(), HostRun::Data(_)));
        let mut found = vec![0; 900_000];
        target.read_at(at(5000), &mut found).unwrap();
        assert!(found == bytes[1000..901_000]);
        // The source's end ends it.
        let copied = copy_range(&*source, at(999_000), &*target, at(0), 5000).unwrap();
        assert_eq!(copied, 1000);
        assert_eq!(
            copy_range(&*source, at(1_000_000), &*target, at(0), 5000).unwrap(),
            0
        );
        // A window's end too.
        let window = Window::new(Arc::clone(&target), at(100), Some(50)).unwrap();
        assert_eq!(copy_range(&*source, at(0), &window, at(10), 5000).unwrap(), 40);
        let mut found = [0; 41];
        target.read_at(at(110), &mut found).unwrap();
        assert_eq!(found[..40], bytes[..40]);
        assert_eq!(found[40], bytes[999_150]);
    }
}

#[test]
fn what_cannot_be_copied_within_the_kernel_is_left_to_the_caller() {
    let scratch = Scratch::new();
    let source = file(&scratch, "source", &[1; 1000]);
    assert_eq!(
        copy_range(&*source, at(0), &Memory::new(), at(0), 1000).unwrap(),
        0
    );
    assert_eq!(
        copy_range(&Memory::zeroed(1000), at(0), &*source, at(0), 1000).unwrap(),
        0
    );
    // The same file, overlapping.
    assert_eq!(copy_range(&*source, at(0), &*source, at(10), 100).unwrap(), 0);
}
