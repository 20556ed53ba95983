//! Raw images: whole, through a window, odd, huge and cut short.

mod support;

use std::sync::Arc;

use diskmill_core::{
    Chain, Driver, ErrorKind, GuestOffset, Layer, OpenSpec, Result, Role, Storage, StorageMut,
};
use diskmill_formats::raw;
use diskmill_storage::Memory;
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, contract, oracle};
use support::{file, read_all, text};

fn open(main: Arc<dyn Storage>, options: &str) -> Result<Arc<dyn Layer>> {
    let mut how = OpenSpec::default();
    how.options.parse_more(options);
    let parsed = raw::DRIVER.parse(Arc::clone(&main), &how)?;
    parsed.attach(vec![(Role::Main, main)], &how)
}

/// The sizes are QEMU's. The bytes are the file's: where a window does not start on a sector, `qemu-img convert` takes
/// data beside a hole for zeros.
#[test]
fn windows_have_the_size_of_qemu_and_the_bytes_of_the_file() {
    let dir = Scratch::new();
    let path = dir.join("disk.raw");
    SparseRandom::new(1, 3_000_001).write_raw(&path);
    let bytes = std::fs::read(&path).unwrap();
    for (offset, options) in [
        (0, ""),
        (512, "offset=512"),
        (1000, "offset=1000"),
        (0, "size=1M"),
        (65_537, "offset=65537,size=1M"),
        (2_999_808, "offset=2999808"),
    ] {
        let spec = format!("driver=raw,file.filename={},{options}", path.display());
        let info = oracle::qemu_img()
            .args([
                "info",
                "--output=json",
                "--image-opts",
                spec.trim_end_matches(','),
            ])
            .ok()
            .json();
        let layer = open(file(&path), options).unwrap();
        assert_eq!(
            Some(layer.virtual_size()),
            info["virtual-size"].as_u64(),
            "{options:?}"
        );
        let mut expected = bytes[offset..].to_vec();
        expected.resize(layer.virtual_size() as usize, 0);
        assert!(
            read_all(&Chain::new(vec![Arc::clone(&layer)])) == expected,
            "{options:?}"
        );
        contract::layer::all(&layer, &Chain::default(), &expected);
    }
}

#[test]
fn the_largest_disk_is_one_run() {
    let len = (i64::MAX as u64) & !511;
    let layer = open(Arc::new(Memory::zeroed(len)), "").unwrap();
    let extent = layer.map(GuestOffset::ZERO, u64::MAX).unwrap();
    assert_eq!((layer.virtual_size(), extent.len), (len, len));
    let mut buf = [1; 512];
    layer.read_at(GuestOffset::new(len - 512), &mut buf).unwrap();
    assert_eq!(buf, [0; 512]);
}

#[test]
fn a_file_that_is_cut_while_open_is_noticed() {
    let memory = Arc::new(Memory::from(vec![7; 4096]));
    let layer = open(Arc::clone(&memory) as Arc<dyn Storage>, "").unwrap();
    memory.set_len(1024).unwrap();
    let error = layer.read_at(GuestOffset::ZERO, &mut [0; 4096]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "{error:?}");
    let source = error.io_error().unwrap();
    assert_eq!(source.kind(), std::io::ErrorKind::UnexpectedEof);
}

#[test]
fn what_raw_has_not_is_refused_by_name() {
    let memory: Arc<dyn Storage> = Arc::new(Memory::from(vec![7; 4096]));
    let mut how = OpenSpec::default();
    how.snapshot = Some("one".into());
    let parsed = raw::DRIVER.parse(Arc::clone(&memory), &how).unwrap();
    let error = parsed
        .attach(vec![(Role::Main, Arc::clone(&memory))], &how)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(text(&error).contains("no internal snapshots"), "{error:?}");
    let parsed = raw::DRIVER
        .parse(Arc::clone(&memory), &OpenSpec::default())
        .unwrap();
    let checked = parsed.check(
        vec![(Role::Main, memory)],
        &OpenSpec::default(),
        diskmill_core::Job::silent(),
    );
    assert_eq!(checked.unwrap_err().kind(), ErrorKind::Unsupported);
}

/// The guest wrote a header of another format: whoever says raw gets the bytes.
#[test]
fn a_header_inside_a_raw_disk_is_data() {
    let dir = Scratch::new();
    let path = dir.join("trap.raw");
    oracle::create(&path, "qcow2", "", "1G");
    let bytes = std::fs::read(&path).unwrap();
    let layer = open(file(&path), "").unwrap();
    let mut head = [0; 4];
    layer.read_at(GuestOffset::ZERO, &mut head).unwrap();
    assert_eq!(head, bytes[..4]);
    assert_eq!(layer.virtual_size(), (bytes.len() as u64).next_multiple_of(512));
    assert_eq!(file(&path).len().unwrap(), bytes.len() as u64);
}
