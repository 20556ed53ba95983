//! The builders of all formats keep the contract, in files and on devices that hold old data.

use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    BackingName, Compression, CreateSpec, Hints, HostOffset, HostRun, Options, RawFile, Result, Storage,
    StorageMut, ZeroHow,
};
use diskmill_formats::{qcow2, raw};
use diskmill_storage::Memory;
use diskmill_testkit::contract::builder::builder;

fn file() -> Arc<dyn StorageMut> {
    Arc::new(Memory::new())
}

/// A device: its length is fixed, and it is full of old bytes.
#[derive(Debug)]
struct Device(Memory);

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

fn spec(size: u64, options: &str) -> CreateSpec {
    let mut spec = CreateSpec::new(size);
    spec.options = Options::parse(options);
    spec
}

fn compressed(mut spec: CreateSpec) -> CreateSpec {
    spec.compression = Some(Compression::default());
    spec
}

fn overlay(mut spec: CreateSpec) -> CreateSpec {
    spec.backing = Some(BackingName {
        name: "base.raw".to_owned(),
        format: Some("raw".to_owned()),
    });
    spec
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
