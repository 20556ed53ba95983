//! New images.

use diskmill_core::{Compression, Hints, HostRun, RawFile, Run, Writes, ZeroHow};
use diskmill_testkit::contract::builder::builder;

use super::*;

#[test]
fn the_builder_keeps_the_contract() {
    for size in [0, 512, 4096, 4608, SIZE, LONG] {
        builder(Keyed::quick(), &spec(size, QUICK), &file);
    }
    for options in ["preallocation=falloc", "preallocation=full"] {
        builder(Keyed::quick(), &spec(SIZE, &format!("{QUICK},{options}")), &file);
    }
}

#[test]
fn every_mode_of_a_cipher_goes_in_and_out() {
    for options in [
        "",
        "cipher-mode=ctr,ivgen-alg=plain",
        "cipher-mode=ecb,cipher-alg=aes-192",
    ] {
        builder(&Keyed::new(options), &spec(SIZE, options), &file);
    }
}

/// Old bytes all over, and a length that stays.
#[derive(Debug)]
struct Device(Memory);

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
        assert!(at.get() + buf.len() as u64 <= self.0.len()?, "past the end");
        self.0.write_at(at, buf)
    }

    fn zero(&self, range: std::ops::Range<HostOffset>, how: ZeroHow) -> Result<()> {
        assert!(range.end.get() <= self.0.len()?, "past the end");
        self.0.zero(range, how)
    }

    fn discard(&self, _range: std::ops::Range<HostOffset>) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, _range: std::ops::Range<HostOffset>) -> Result<()> {
        panic!("a device cannot allocate")
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        panic!("a device keeps its length")
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}

#[test]
fn a_device_is_filled_and_keeps_no_old_keys() {
    let quick = Keyed::quick();
    let start = quick.volume.header().payload_offset();
    let len = usize::try_from(start + SIZE).unwrap();
    let device = || -> Arc<dyn StorageMut> { Arc::new(Device(Memory::from(vec![0xaa; len]))) };
    for options in ["", "preallocation=full"] {
        builder(quick, &spec(SIZE, &format!("{QUICK},{options}")), &device);
    }
    let image = fill(quick, &spec(SIZE, QUICK), &device, &disk(SIZE), 1, 16);
    let slots = &bytes(&*image[0])[592..usize::try_from(start).unwrap()];
    assert!(!slots.windows(16).any(|bytes| bytes == [0xaa; 16]));
    let one_more = spec(SIZE + 512, QUICK);
    let refused = quick.build(&one_more, vec![(Role::Main, device())]);
    assert_eq!(refused.err().unwrap().kind(), ErrorKind::NoSpace);
}

#[test]
fn a_new_disk_takes_no_space_until_it_is_written() {
    let quick = Keyed::quick();
    let start = quick.volume.header().payload_offset();
    for (options, least) in [("", 0), ("preallocation=full", 8 << 20)] {
        let file: Arc<dyn StorageMut> = Arc::new(Memory::new());
        let spec = spec(8 << 20, &format!("{QUICK},{options}"));
        let builder = quick.build(&spec, vec![(Role::Main, Arc::clone(&file))]);
        let builder = builder.expect("a builder");
        builder
            .finish(diskmill_core::Finish::new(Durability::None))
            .expect("finish");
        assert_eq!(file.len().unwrap(), start + (8 << 20));
        let taken = file.allocated().unwrap().expect("a count");
        assert!((least..=least + start).contains(&taken), "{options}: {taken}");
        let layer = quick.read_only(file).expect("it opens");
        assert_eq!(layer.virtual_size(), 8 << 20);
    }
}

#[test]
fn every_byte_is_demanded_in_order() {
    let quick = Keyed::quick();
    let build = || {
        quick
            .build(&spec(SIZE, QUICK), vec![(Role::Main, file())])
            .expect("a builder")
    };
    let mut writes = Writes::new();
    let data = [7; 4096];
    let place = |builder: &mut Box<dyn Builder>, start, writes: &mut Writes<'_>| {
        builder.place_run(at(start)..at(start + 4096), Run::Zero, writes)
    };
    assert!(place(&mut build(), 4096, &mut writes).is_err());
    let mut builder = build();
    place(&mut builder, 0, &mut writes).expect("a place");
    assert!(place(&mut builder, 0, &mut writes).is_err());
    let packed = diskmill_core::Stored::Packed(&data);
    assert!(builder.place(at(4096), packed, &mut Writes::new()).is_err());
    assert!(
        builder
            .finish(diskmill_core::Finish::new(Durability::None))
            .is_err()
    );
}

#[test]
fn what_makes_no_sense_is_refused() {
    let refused = |spec: &CreateSpec| text(&DRIVER.outputs(spec).unwrap_err());
    for (options, expected) in [
        ("cluster_size=1M", "invalid parameter 'cluster_size'"),
        ("cipher-alg=des", "cipher-alg"),
        ("cipher-alg=cast5-128", "cipher mode xts needs blocks of 16 bytes"),
        ("preallocation=some", "off, metadata, falloc or full"),
        ("key-secret=none", "no secret with id 'none'"),
    ] {
        let found = refused(&spec(SIZE, options));
        assert!(found.contains(expected), "{options}: {found}");
    }
    let mut packed = spec(SIZE, "");
    packed.compression = Some(Compression::default());
    assert!(refused(&packed).contains("not compressed"));
    let mut backed = spec(SIZE, "");
    backed.backing = Some(diskmill_core::BackingName {
        name: "x".to_owned(),
        format: None,
    });
    assert!(refused(&backed).contains("no backing file"));
    assert!(refused(&spec(i64::MAX as u64 - 511, "")).contains("below 2^63"));
    let mut nobody = spec(SIZE, "");
    nobody.secrets = Secrets::new();
    let missing = DRIVER.build(&nobody, vec![(Role::Main, file())]);
    assert!(text(&missing.err().unwrap()).contains("key-secret"));
}

#[test]
fn a_measure_is_what_an_image_takes() {
    for options in ["", QUICK, "cipher-mode=cbc"] {
        let measure = DRIVER.measure(&spec(SIZE, options), None).unwrap();
        let image = fill(
            &Keyed::new(options),
            &spec(SIZE, options),
            &file,
            &disk(SIZE),
            1,
            16,
        );
        assert_eq!(measure.required, image[0].len().unwrap(), "{options}");
        assert_eq!(measure.fully_allocated, measure.required);
    }
}
