//! The builders of all formats keep the contract, in files and on devices that hold old data.

use std::io::IoSlice;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use diskmill_core::{
    BackingName, Compression, CreateSpec, Driver, Durability, ErrorKind, Finish, GuestOffset, Hints,
    HostOffset, HostRun, Job, Layer, OpenSpec, Options, QueuedWrite, RawFile, Result, Role, Run, Secret,
    State, Storage, StorageMut, Stored, Writes, ZeroHow,
};
use diskmill_formats::{cow, qcow, qcow2, raw, vmdk};
use diskmill_storage::Memory;
use diskmill_testkit::contract::builder::{builder, fill, open, reads_back};
use diskmill_testkit::oracle::PASSPHRASE;
use diskmill_testkit::sparse_random::SparseRandom;

fn file() -> Arc<dyn StorageMut> {
    Arc::new(Memory::new())
}

/// A device: its length is fixed, and it is full of old bytes.
#[derive(Debug)]
struct Device(Memory);

/// Takes bytes in order and nothing else.
#[derive(Debug, Default)]
struct Pipe(Mutex<Vec<u8>>);

/// Forgets what is written.
#[derive(Debug, Default)]
struct Sink;

fn device() -> Arc<dyn StorageMut> {
    let memory = Memory::new();
    memory.write_at(HostOffset::ZERO, &vec![0xaa; 8 << 20]).unwrap();
    Arc::new(Device(memory))
}

impl Storage for Device {
    fn len(&self) -> Result<u64> {
        self.0.len()
    }

    fn hints(&self) -> Hints {
        let mut hints = self.0.hints();
        hints.fixed_len = true;
        hints
    }

    fn read_at(&self, at: HostOffset, buf: &mut [u8]) -> Result<()> {
        self.0.read_at(at, buf)
    }

    fn run_at(&self, at: HostOffset) -> Result<HostRun> {
        self.0.run_at(at)
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.0.allocated()
    }

    fn raw_file(&self) -> Option<RawFile<'_>> {
        None
    }
}

impl StorageMut for Device {
    fn write_at(&self, at: HostOffset, buf: &[u8]) -> Result<()> {
        assert!(
            at.get() + buf.len() as u64 <= self.0.len()?,
            "past the end of the device"
        );
        self.0.write_at(at, buf)
    }

    fn write_vectored_at(&self, at: HostOffset, bufs: &[IoSlice<'_>]) -> Result<()> {
        let mut at = at;
        for buf in bufs {
            self.write_at(at, buf)?;
            at = at.plus(buf.len() as u64)?;
        }
        Ok(())
    }

    fn zero(&self, range: Range<HostOffset>, how: ZeroHow) -> Result<()> {
        assert!(range.end.get() <= self.0.len()?, "past the end of the device");
        self.0.zero(range, how)
    }

    fn discard(&self, _range: Range<HostOffset>) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, _range: Range<HostOffset>) -> Result<()> {
        panic!("a device cannot allocate")
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        panic!("a device keeps its length")
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

impl Storage for Pipe {
    fn len(&self) -> Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }

    fn hints(&self) -> Hints {
        let mut hints = Hints::default();
        hints.append_only = true;
        hints
    }

    fn read_at(&self, _at: HostOffset, _buf: &mut [u8]) -> Result<()> {
        panic!("a pipe is not read")
    }

    fn run_at(&self, _at: HostOffset) -> Result<HostRun> {
        panic!("a pipe is not read")
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn raw_file(&self) -> Option<RawFile<'_>> {
        None
    }
}

impl StorageMut for Pipe {
    fn write_at(&self, at: HostOffset, buf: &[u8]) -> Result<()> {
        let mut bytes = self.0.lock().unwrap();
        assert_eq!(at.get(), bytes.len() as u64, "a pipe takes bytes in order");
        bytes.extend_from_slice(buf);
        Ok(())
    }

    fn zero(&self, _range: Range<HostOffset>, _how: ZeroHow) -> Result<()> {
        panic!("a pipe has no holes")
    }

    fn discard(&self, _range: Range<HostOffset>) -> Result<()> {
        panic!("a pipe has no holes")
    }

    fn allocate(&self, _range: Range<HostOffset>) -> Result<()> {
        panic!("a pipe cannot allocate")
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        panic!("a pipe has no length")
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

impl Storage for Sink {
    fn len(&self) -> Result<u64> {
        Ok(0)
    }

    fn hints(&self) -> Hints {
        Hints::default()
    }

    fn read_at(&self, _at: HostOffset, _buf: &mut [u8]) -> Result<()> {
        panic!("nothing is kept")
    }

    fn run_at(&self, _at: HostOffset) -> Result<HostRun> {
        panic!("nothing is kept")
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn raw_file(&self) -> Option<RawFile<'_>> {
        None
    }
}

impl StorageMut for Sink {
    fn write_at(&self, _at: HostOffset, _buf: &[u8]) -> Result<()> {
        Ok(())
    }

    fn zero(&self, _range: Range<HostOffset>, _how: ZeroHow) -> Result<()> {
        Ok(())
    }

    fn discard(&self, _range: Range<HostOffset>) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, _range: Range<HostOffset>) -> Result<()> {
        Ok(())
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

fn spec(size: u64, options: &str) -> CreateSpec {
    let mut spec = CreateSpec::new(size);
    spec.options = Options::parse(options);
    spec
}

fn compressed(mut spec: CreateSpec) -> CreateSpec {
    spec.compression = Some(Compression::default());
    spec
}

fn encrypted(mut spec: CreateSpec) -> CreateSpec {
    spec.secrets.set_passphrase(Secret::new(PASSPHRASE.into()));
    spec
}

fn overlay(mut spec: CreateSpec) -> CreateSpec {
    spec.backing = Some(BackingName {
        name: "base.raw".to_owned(),
        format: Some("raw".to_owned()),
    });
    spec
}

/// The old AES has the same key for the same password, so that all bytes can be compared.
#[test]
fn encrypted_qcow2() {
    const SMALL: u64 = (1 << 20) + 3 * 512;
    for options in [
        "cluster_size=512",
        "preallocation=full,cluster_size=4k",
        "compat=0.10,preallocation=metadata",
        "extended_l2=on,preallocation=falloc",
    ] {
        let spec = encrypted(spec(SMALL, &format!("encrypt.format=aes,{options}")));
        builder(&qcow2::DRIVER, &spec, &device);
    }
    builder(
        &qcow2::DRIVER,
        &encrypted(overlay(spec(SMALL, "encryption=on"))),
        &file,
    );
    let old = encrypted(overlay(spec(SMALL, "encryption=on,compat=0.10")));
    builder(&qcow2::DRIVER, &old, &device);
    let data = encrypted(spec(SMALL, "encryption=on,data_file=d,data_file_raw=on"));
    builder(&qcow2::DRIVER, &data, &file);
}

/// Each image has a key of its own: what is where must not depend on the threads, and what is read of it.
#[test]
fn qcow2_in_luks_is_laid_out_alike_by_any_number_of_threads() {
    const SIZE: u64 = (1 << 20) + 3 * 512;
    let disk = SparseRandom::new(7, SIZE);
    let places = |layer: &Arc<dyn Layer>| {
        let (mut at, mut places) = (0, Vec::new());
        while at < SIZE {
            let extent = layer.map(GuestOffset::new(at), SIZE - at).unwrap();
            assert!(!matches!(extent.state, State::Data(_)), "{extent:?} in the clear");
            places.push(extent);
            at += extent.len;
        }
        places
    };
    for options in ["cluster_size=4k", "extended_l2=on", "data_file=d"] {
        let luks = "encrypt.format=luks,encrypt.cipher-alg=aes-128,encrypt.iter-time=0";
        let spec = encrypted(spec(SIZE, &format!("{luks},{options}")));
        let alone = fill(&qcow2::DRIVER, &spec, &file, &disk, 1, 1);
        reads_back(&qcow2::DRIVER, &spec, &alone, &disk, 512);
        let many = fill(&qcow2::DRIVER, &spec, &device_or_file(options), &disk, 4, 7);
        reads_back(&qcow2::DRIVER, &spec, &many, &disk, 512);
        let layers = [&alone, &many].map(|image| places(&open(&qcow2::DRIVER, image)));
        assert_eq!(layers[0], layers[1], "{options}");
    }
}

/// Old bytes must not show through.
fn device_or_file(options: &str) -> impl Fn() -> Arc<dyn StorageMut> + use<> {
    // A device of the data is longer than the disk, which is no harm but to those who compare lengths.
    if options.contains("data_file") {
        file
    } else {
        device
    }
}

const SIZE: u64 = (5 << 20) + 3 * 512;

#[test]
fn raw_in_a_file() {
    for options in ["", "preallocation=falloc", "preallocation=full"] {
        for size in [0, 512, 4096, SIZE] {
            builder(&raw::DRIVER, &spec(size, options), &file);
        }
    }
}

#[test]
fn raw_on_a_device() {
    // A device is longer than the image and reads as a longer disk, so its length is made the image's.
    let exact = || -> Arc<dyn StorageMut> {
        let memory = Memory::new();
        memory
            .write_at(HostOffset::ZERO, &vec![0xaa; SIZE as usize])
            .unwrap();
        Arc::new(Device(memory))
    };
    for options in ["", "preallocation=full"] {
        builder(&raw::DRIVER, &spec(SIZE, options), &exact);
    }
}

#[test]
fn raw_into_a_pipe() {
    let pipe = Arc::new(Pipe::default());
    let files = vec![(Role::Main, Arc::clone(&pipe) as Arc<dyn StorageMut>)];
    let mut builder = raw::DRIVER.build(&spec(0, ""), files).unwrap();
    let image = builder.files().to_vec();
    let data = vec![7; 4096];
    let mut writes = Writes::new();
    let at = GuestOffset::new;
    builder.place(at(0), Stored::Plain(&data), &mut writes).unwrap();
    builder
        .place_run(at(4096)..at(300_032), Run::Zero, &mut writes)
        .unwrap();
    assert_eq!(
        builder.reserve(at(300_032)..at(300_544), &mut writes).unwrap(),
        None
    );
    builder
        .place(at(300_032), Stored::Plain(&data[..512]), &mut writes)
        .unwrap();
    writes.perform(&image).unwrap();
    let mut end = Finish::new(Durability::Synced);
    end.final_size = Some(300_544);
    builder.finish(end).unwrap();
    let bytes = pipe.0.lock().unwrap();
    let expected = [&data[..], &[0; 295_936], &data[..512]].concat();
    assert!(*bytes == expected);
    let files = vec![(Role::Main, Arc::clone(&pipe) as Arc<dyn StorageMut>)];
    let error = qcow2::DRIVER.build(&spec(512, ""), files).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn tables_of_a_huge_disk_are_written_as_they_fill() {
    for options in [
        "preallocation=metadata",
        "preallocation=metadata,cluster_size=512",
        "cluster_size=512",
    ] {
        let spec = overlay_if(spec(32 << 30, options), !options.contains("preallocation"));
        let files = vec![(Role::Main, Arc::new(Sink) as Arc<dyn StorageMut>)];
        let mut builder = qcow2::DRIVER.build(&spec, files).unwrap();
        let step = builder.unit() << 17;
        let (mut waiting, mut at) = (0, 0);
        // The rest would be more of the same.
        while at < spec.virtual_size.min(step * 24) {
            let mut writes = Writes::new();
            let range = GuestOffset::new(at)..GuestOffset::new(at + step);
            builder.place_run(range, Run::Zero, &mut writes).unwrap();
            let queued = writes.queued().iter().map(|write| match write {
                QueuedWrite::Bytes { bytes, .. } => bytes.len(),
                _ => 0,
            });
            waiting = waiting.max(queued.sum());
            at += step;
        }
        assert!(
            waiting > 0 && waiting <= 4 << 20,
            "{options}: {waiting} bytes at once"
        );
    }
}

fn overlay_if(spec: CreateSpec, is: bool) -> CreateSpec {
    if is { overlay(spec) } else { spec }
}

#[test]
fn the_size_of_a_qcow2_may_come_last() {
    let files = vec![(Role::Main, file())];
    let image = files[0].1.clone();
    let mut builder = qcow2::DRIVER.build(&spec(0, ""), files).unwrap();
    let data = vec![7; 65_536];
    for (number, len) in [(0, 65_536), (9000, 1000)] {
        let mut writes = Writes::new();
        let at = GuestOffset::new(number * 65_536);
        if number > 0 {
            builder
                .place_run(GuestOffset::new(65_536)..at, Run::Zero, &mut writes)
                .unwrap();
        }
        builder
            .place(at, Stored::Plain(&data[..len]), &mut writes)
            .unwrap();
        writes.perform(std::slice::from_ref(&image)).unwrap();
    }
    let mut end = Finish::new(Durability::None);
    end.final_size = Some(9000 * 65_536 + 1000);
    builder.finish(end).unwrap();
    let layer = open(&qcow2::DRIVER, &vec![image]);
    assert_eq!(layer.virtual_size(), 9000 * 65_536 + 1024);
    let mut found = vec![0; 1024];
    layer
        .read_at(GuestOffset::new(9000 * 65_536), &mut found)
        .unwrap();
    assert_eq!(found, [&data[..1000], &[0; 24]].concat());
}

#[test]
fn qcow2_demands_every_byte_in_order() {
    let build = || {
        qcow2::DRIVER
            .build(&spec(1 << 20, ""), vec![(Role::Main, file())])
            .unwrap()
    };
    let at = GuestOffset::new;
    let mut writes = Writes::new();
    let data = vec![7; 65_536];
    assert!(
        build()
            .place(at(65_536), Stored::Plain(&data), &mut writes)
            .is_err()
    );
    assert!(
        build()
            .place(at(0), Stored::Packed(&data[..10]), &mut writes)
            .is_err()
    );
    let mut builder = build();
    builder.place(at(0), Stored::Plain(&data), &mut writes).unwrap();
    assert!(builder.place(at(0), Stored::Plain(&data), &mut writes).is_err());
    assert!(builder.finish(Finish::new(Durability::None)).is_err());
    let small = Arc::new(Device(Memory::zeroed(256 << 10)));
    let mut builder = qcow2::DRIVER
        .build(&spec(1 << 20, ""), vec![(Role::Main, small)])
        .unwrap();
    let error = builder
        .place(at(0), Stored::Plain(&data), &mut writes)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
}

#[test]
fn qcow2_with_every_cluster_size() {
    for cluster_bits in 9..=21 {
        let options = format!("cluster_size={}", 1_u64 << cluster_bits);
        builder(&qcow2::DRIVER, &spec(SIZE, &options), &file);
        builder(&qcow2::DRIVER, &compressed(spec(SIZE, &options)), &file);
    }
}

#[test]
fn qcow2_with_every_refcount_width() {
    for order in 0..=6 {
        let options = format!("cluster_size=4k,refcount_bits={}", 1 << order);
        builder(&qcow2::DRIVER, &spec(SIZE, &options), &file);
        builder(&qcow2::DRIVER, &compressed(spec(SIZE, &options)), &file);
    }
}

#[test]
fn qcow2_with_every_feature() {
    for options in [
        "compat=0.10",
        "compat=0.10,preallocation=metadata",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "extended_l2=on,cluster_size=2M",
        "extended_l2=on,preallocation=metadata",
        "extended_l2=on,preallocation=full",
        "data_file=d.raw",
        "data_file=d.raw,preallocation=falloc",
        "data_file=d.raw,data_file_raw=on",
        "data_file=d.raw,data_file_raw=on,extended_l2=on",
    ] {
        builder(&qcow2::DRIVER, &spec(SIZE, options), &file);
    }
    for options in [
        "compat=0.10",
        "compression_type=zstd",
        "extended_l2=on",
        "extended_l2=on,compression_type=zstd",
        "refcount_bits=1,compression_type=zstd",
    ] {
        builder(&qcow2::DRIVER, &compressed(spec(SIZE, options)), &file);
    }
}

#[test]
fn qcow2_over_a_backing_image() {
    for options in [
        "",
        "compat=0.10",
        "cluster_size=512",
        "extended_l2=on",
        "extended_l2=on,preallocation=metadata",
        "data_file=d.raw",
    ] {
        builder(&qcow2::DRIVER, &overlay(spec(SIZE, options)), &file);
    }
    for options in ["", "extended_l2=on"] {
        builder(&qcow2::DRIVER, &compressed(overlay(spec(SIZE, options))), &file);
    }
}

#[test]
fn qcow2_of_every_size() {
    for size in [0, 512, 1024, 65_024, 65_536, 66_048, 131_072] {
        for options in [
            "",
            "compat=0.10",
            "cluster_size=512",
            "extended_l2=on,cluster_size=16k",
        ] {
            builder(&qcow2::DRIVER, &spec(size, options), &file);
            builder(&qcow2::DRIVER, &compressed(spec(size, options)), &file);
        }
    }
}

#[test]
fn qcow2_on_a_device() {
    for options in [
        "",
        "compat=0.10",
        "cluster_size=512",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "compat=0.10,preallocation=metadata",
        "extended_l2=on",
        "extended_l2=on,preallocation=metadata",
    ] {
        builder(&qcow2::DRIVER, &spec(SIZE, options), &device);
    }
    builder(&qcow2::DRIVER, &compressed(spec(SIZE, "")), &device);
    for options in ["", "compat=0.10", "extended_l2=on"] {
        builder(&qcow2::DRIVER, &overlay(spec(SIZE, options)), &device);
    }
}

const SUBFORMATS: [&str; 5] = [
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
];

#[test]
fn vmdk_in_files() {
    for subformat in SUBFORMATS {
        for size in [512, 65_536, SIZE, 70 << 20] {
            builder(
                &vmdk::DRIVER,
                &spec(size, &format!("subformat={subformat}")),
                &file,
            );
        }
    }
    for options in [
        "zeroed_grain=on",
        "zeroed_grain=on,subformat=twoGbMaxExtentSparse",
    ] {
        builder(&vmdk::DRIVER, &spec(SIZE, options), &file);
    }
    for options in ["preallocation=falloc", "preallocation=full"] {
        let options = format!("{options},subformat=monolithicFlat");
        builder(&vmdk::DRIVER, &spec(SIZE, &options), &file);
    }
}

#[test]
fn vmdk_overlays() {
    for options in [
        "",
        "zeroed_grain=on",
        "subformat=twoGbMaxExtentSparse",
        "subformat=streamOptimized",
    ] {
        let mut spec = overlay(spec(SIZE, options));
        spec.backing.as_mut().unwrap().name = "base.vmdk".to_owned();
        builder(&vmdk::DRIVER, &spec, &file);
    }
}

#[test]
fn vmdk_on_a_device() {
    for options in ["", "zeroed_grain=on"] {
        builder(&vmdk::DRIVER, &spec(SIZE, options), &device);
        builder(&vmdk::DRIVER, &overlay(spec(SIZE, options)), &device);
    }
    for options in ["subformat=streamOptimized", "subformat=monolithicFlat"] {
        let spec = spec(SIZE, options);
        let outputs = vmdk::DRIVER.outputs(&spec).unwrap();
        let files = outputs.iter().map(|output| (output.role, device())).collect();
        let made = vmdk::DRIVER
            .build(&spec, files)
            .and_then(|builder| builder.finish(Finish::new(Durability::None)));
        assert_eq!(made.unwrap_err().kind(), ErrorKind::Unsupported, "{options}");
    }
}

#[test]
fn a_stream_into_a_pipe_has_the_bytes_of_one_in_a_file() {
    let make = |file: Arc<dyn StorageMut>| {
        let spec = spec(40 << 20, "subformat=streamOptimized");
        let mut builder = vmdk::DRIVER
            .build(&spec, vec![(Role::Main, Arc::clone(&file))])
            .unwrap();
        let files = builder.files().to_vec();
        let data: Vec<u8> = (0..3_u32 << 16).map(|at| (at / 7) as u8).collect();
        for at in [0, 33 << 20] {
            let mut writes = Writes::new();
            let start = GuestOffset::new(at);
            builder.place(start, Stored::Plain(&data), &mut writes).unwrap();
            let rest = at + data.len() as u64;
            let end = if at == 0 { 33 << 20 } else { 40 << 20 };
            builder
                .place_run(
                    GuestOffset::new(rest)..GuestOffset::new(end),
                    Run::Zero,
                    &mut writes,
                )
                .unwrap();
            writes.perform(&files).unwrap();
        }
        builder.finish(Finish::new(Durability::Synced)).unwrap();
    };
    let pipe = Arc::new(Pipe::default());
    make(pipe.clone());
    let plain = file();
    make(plain.clone());
    let mut bytes = vec![0; plain.len().unwrap() as usize];
    plain.read_at(HostOffset::ZERO, &mut bytes).unwrap();
    assert!(*pipe.0.lock().unwrap() == bytes);
    assert_eq!(
        bytes[bytes.len() - 512..],
        [0; 512],
        "the last sector ends the stream"
    );
}

#[test]
fn qcow_plain_and_compressed() {
    for size in [512, 2 << 20, SIZE] {
        builder(&qcow::DRIVER, &spec(size, ""), &file);
        builder(&qcow::DRIVER, &compressed(spec(size, "")), &file);
    }
    const SMALL: u64 = (2 << 20) + 512;
    for spec in [overlay(spec(SMALL, "")), compressed(overlay(spec(SMALL, "")))] {
        builder(&qcow::DRIVER, &spec, &file);
        builder(&qcow::DRIVER, &spec, &device);
    }
    builder(&qcow::DRIVER, &spec(SIZE, ""), &device);
    let small = Arc::new(Device(Memory::zeroed(256)));
    let refused = qcow::DRIVER.build(&spec(SIZE, ""), vec![(Role::Main, small)]);
    assert_eq!(refused.err().unwrap().kind(), ErrorKind::NoSpace);
    let pipe = vec![(Role::Main, Arc::new(Pipe::default()) as Arc<dyn StorageMut>)];
    let refused = qcow::DRIVER.build(&spec(SIZE, ""), pipe);
    assert_eq!(refused.err().unwrap().kind(), ErrorKind::Unsupported);
}

#[test]
fn cow_in_a_file() {
    // The bitmap ends within a sector, with one, and further back.
    for size in [512, 480 * 8 * 512, SIZE] {
        builder(&cow::DRIVER, &spec(size, ""), &file);
    }
    builder(&cow::DRIVER, &overlay(spec(SIZE, "")), &file);
}

/// A page of the bitmap tells of 64 MiB.
#[test]
fn data_across_pages_of_a_cow_bitmap_is_found() {
    const PAGE: u64 = 64 << 20;
    let image = file();
    let spec = overlay(spec(3 * PAGE + 512, ""));
    let mut builder = cow::DRIVER
        .build(&spec, vec![(Role::Main, image.clone())])
        .unwrap();
    let at = GuestOffset::new;
    let data = vec![7; 16_384];
    builder.fill(at(0)..at(PAGE - 8192), Run::Absent).unwrap();
    let mut writes = Writes::new();
    builder
        .place(at(PAGE - 8192), Stored::Plain(&data), &mut writes)
        .unwrap();
    builder
        .place_run(at(PAGE + 8192)..at(2 * PAGE + 4096), Run::Zero, &mut writes)
        .unwrap();
    builder
        .place_run(at(2 * PAGE + 4096)..at(3 * PAGE), Run::Absent, &mut writes)
        .unwrap();
    builder
        .place(at(3 * PAGE), Stored::Plain(&data[..512]), &mut writes)
        .unwrap();
    writes.perform(std::slice::from_ref(&image)).unwrap();
    builder.finish(Finish::new(Durability::None)).unwrap();
    let layer = open(&cow::DRIVER, &vec![image]);
    let (mut runs, mut start) = (Vec::new(), 0);
    while start < spec.virtual_size {
        let extent = layer.map(at(start), u64::MAX).unwrap();
        runs.push((start, extent.len, extent.state != State::Absent));
        start += extent.len;
    }
    let stored = PAGE + 12_288;
    assert_eq!(
        runs,
        [
            (0, PAGE - 8192, false),
            (PAGE - 8192, stored, true),
            (PAGE - 8192 + stored, PAGE - 4096, false),
            (3 * PAGE, 512, true),
        ]
    );
    let mut found = vec![0; 20_000];
    layer.read_at(at(PAGE - 8192), &mut found).unwrap();
    assert!(found[..16_384] == data && found[16_384..].iter().all(|byte| *byte == 0));
}

#[test]
fn cow_on_a_device() {
    builder(&cow::DRIVER, &spec(SIZE, ""), &device);
    builder(&cow::DRIVER, &overlay(spec(SIZE, "")), &device);
    // What the device had between bitmap and data is taken for nothing.
    let main = device();
    let mut empty = cow::DRIVER
        .build(&spec(SIZE, ""), vec![(Role::Main, Arc::clone(&main))])
        .unwrap();
    empty
        .fill(GuestOffset::ZERO..GuestOffset::new(SIZE), Run::Absent)
        .unwrap();
    empty.finish(Finish::new(Durability::None)).unwrap();
    let main: Arc<dyn Storage> = main;
    let how = OpenSpec::default();
    let parsed = cow::DRIVER.parse(Arc::clone(&main), &how).unwrap();
    let report = parsed
        .check(vec![(Role::Main, main)], &how, Job::silent())
        .unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:#?}");
    let small: Arc<dyn StorageMut> = Arc::new(Device(Memory::zeroed(1000)));
    let error = cow::DRIVER
        .build(&spec(SIZE, ""), vec![(Role::Main, small)])
        .err()
        .unwrap();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
}

#[test]
fn cow_images_that_make_no_sense_are_refused() {
    let named = |name: &str| {
        let mut spec = overlay(spec(SIZE, ""));
        spec.backing.as_mut().unwrap().name = name.to_owned();
        spec
    };
    for (spec, text) in [
        (spec(0, ""), "size is 0, must be 512 to 8796093022208"),
        (spec((8 << 40) + 512, ""), "size is 8796093022720"),
        (spec(SIZE, "cluster_size=4k"), "invalid parameter 'cluster_size'"),
        (compressed(spec(SIZE, "")), "cow images are not compressed"),
        (named(&"a".repeat(1024)), "has 1024 bytes, must have 1 to 1023"),
        (named("json:{}"), "must be a plain path"),
    ] {
        let error = format!("{:?}", cow::DRIVER.outputs(&spec).unwrap_err());
        assert!(error.contains(text), "{error}");
    }
    let pipe = vec![(Role::Main, Arc::new(Pipe::default()) as Arc<dyn StorageMut>)];
    let error = cow::DRIVER.build(&spec(SIZE, ""), pipe).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    // Every byte in order, and all of them.
    let build = || {
        cow::DRIVER
            .build(&spec(SIZE, ""), vec![(Role::Main, file())])
            .unwrap()
    };
    let at = GuestOffset::new;
    let mut writes = Writes::new();
    assert!(
        build()
            .place(at(4096), Stored::Plain(&[1; 4096]), &mut writes)
            .is_err()
    );
    assert!(
        build()
            .place(at(0), Stored::Packed(&[1; 10]), &mut writes)
            .is_err()
    );
    assert!(
        build()
            .place_run(at(0)..at(2 * SIZE), Run::Zero, &mut writes)
            .is_err()
    );
    let mut short = build();
    short
        .place(at(0), Stored::Plain(&[1; 4096]), &mut writes)
        .unwrap();
    assert!(short.finish(Finish::new(Durability::None)).is_err());
}

/// The bitmap of 8 TiB is not held in memory.
#[test]
fn a_huge_cow_image_is_made_page_by_page() {
    let mut builder = cow::DRIVER
        .build(&overlay(spec(8 << 40, "")), vec![(Role::Main, Arc::new(Sink))])
        .unwrap();
    builder
        .fill(GuestOffset::ZERO..GuestOffset::new(4 << 40), Run::Absent)
        .unwrap();
    let (mut waiting, step) = (0, builder.unit() << 17);
    for number in 0..8 {
        let mut writes = Writes::new();
        let start = (4 << 40) + number * step;
        let range = GuestOffset::new(start)..GuestOffset::new(start + step);
        builder.place_run(range, Run::Zero, &mut writes).unwrap();
        let queued = writes.queued().iter().map(|write| match write {
            QueuedWrite::Bytes { bytes, .. } => bytes.len(),
            _ => 0,
        });
        waiting = waiting.max(queued.sum());
    }
    assert!(waiting > 0 && waiting <= 256 << 10, "{waiting} bytes at once");
}
