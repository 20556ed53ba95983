//! New qcow2 images before the real tools: clean, identical, no larger, and what the tools would have made.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskmill_core::{
    BackingName, Compression, CreateSpec, Driver, Durability, EncodedKind, Finish, GuestOffset, Options,
    OutputName, Run, StorageMut, Stored, Writes,
};
use diskmill_formats::qcow2::DRIVER;
use diskmill_storage::{File, FileOptions, LockPlan, Memory};
use diskmill_testkit::contract::builder::{self, Guest, Image};
use diskmill_testkit::sparse_random::SparseRandom;
use diskmill_testkit::{Scratch, oracle, scratch};

fn memory() -> Arc<dyn StorageMut> {
    Arc::new(Memory::new())
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

fn over(mut spec: CreateSpec, backing: &Path) -> CreateSpec {
    spec.backing = Some(BackingName {
        name: backing.to_str().unwrap().to_owned(),
        format: Some("raw".to_owned()),
    });
    spec
}

/// QEMU takes the name of a data file as relative to where it runs.
fn absolute(options: &str, dir: &Scratch) -> String {
    options.replace("d.raw", dir.join("d.raw").to_str().unwrap())
}

/// Puts an image that was built in memory into files, as sparse as it is.
fn store(spec: &CreateSpec, image: &Image, dir: &Scratch, name: &str) -> PathBuf {
    for (output, file) in DRIVER.outputs(spec).unwrap().iter().zip(image) {
        let name = match &output.name {
            OutputName::Main => name,
            OutputName::Named(name) | OutputName::Beside(name) => name,
        };
        let path = dir.file(name, &[]);
        let file_out = std::fs::File::options().write(true).open(&path).unwrap();
        file_out.set_len(file.len().unwrap()).unwrap();
        let bytes = builder::bytes(&**file);
        for (index, page) in bytes.chunks(4096).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                std::os::unix::fs::FileExt::write_all_at(&file_out, page, index as u64 * 4096).unwrap();
            }
        }
    }
    dir.join(name)
}

/// An image of `disk`, in files.
fn filled(spec: &CreateSpec, disk: &dyn Guest, dir: &Scratch, name: &str) -> PathBuf {
    let image = builder::fill(&DRIVER, spec, &memory, disk, 2, 16);
    store(spec, &image, dir, name)
}

/// An image with nothing in it.
fn empty(spec: &CreateSpec) -> Image {
    let (mut builder, image) = builder::start(&DRIVER, spec, &memory);
    let all = GuestOffset::ZERO..GuestOffset::new(spec.virtual_size);
    builder.fill(all, Run::Absent).unwrap();
    builder.finish(Finish::new(Durability::None)).unwrap();
    image
}

const MIB: u64 = 1 << 20;

#[test]
fn an_empty_image_is_the_one_qemu_makes() {
    let dir = Scratch::new();
    let mut cases: Vec<(u64, String)> = Vec::new();
    for cluster_bits in 9..=21 {
        for version in ["1.1", "0.10"] {
            cases.push((
                64 * MIB,
                format!("compat={version},cluster_size={}", 1 << cluster_bits),
            ));
        }
    }
    for order in 0..=6 {
        cases.push((MIB, format!("refcount_bits={}", 1 << order)));
    }
    for options in [
        "lazy_refcounts=on",
        "compression_type=zstd",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "preallocation=metadata",
        "preallocation=metadata,extended_l2=on,lazy_refcounts=on",
        "preallocation=metadata,compat=0.10,cluster_size=128k",
        "data_file=d.raw",
        "data_file=d.raw,data_file_raw=on",
        "data_file=d.raw,preallocation=metadata,extended_l2=on",
    ] {
        cases.push((8 * MIB, options.to_owned()));
    }
    for size in [0, 512, 65_536, 66_048, 1 << 40] {
        cases.push((size, "compat=1.1".to_owned()));
    }
    for (size, options) in cases {
        let theirs = dir.join("theirs.qcow2");
        let with_dir = absolute(&options, &dir);
        oracle::create(&theirs, "qcow2", &with_dir, &size.to_string());
        let spec = spec(size, &with_dir);
        let image = empty(&spec);
        let ours = builder::bytes(&*image[0]);
        let theirs = std::fs::read(&theirs).unwrap();
        let at = ours.iter().zip(&theirs).position(|(a, b)| a != b);
        assert_eq!((ours.len(), at), (theirs.len(), None), "{size} {options}");
        if let Some(data) = image.get(1) {
            assert_eq!(data.len().unwrap(), size, "{options}");
        }
    }
}

/// Builds `spec` over a disk of seed-made data and holds it against the tools. `convert` is what makes `qemu-img
/// convert` do the same.
fn prove(dir: &Scratch, spec: &CreateSpec, convert: &[&str], options: &str) {
    let disk = SparseRandom::new(7 + spec.virtual_size, spec.virtual_size);
    let raw = dir.join("disk.raw");
    disk.write_raw(&raw);
    let ours = filled(spec, &disk, dir, "ours.qcow2");
    let what = format!("{spec:?}");
    let (report, code) = oracle::check(&ours, "qcow2");
    assert_eq!(code, 0, "{what}: {report}");
    assert!(oracle::identical(&raw, "raw", &ours, "qcow2"), "{what}");
    let theirs = dir.join("theirs.qcow2");
    let mut extra: Vec<&str> = convert.to_vec();
    // Room for the builder's own unit: what it calls a hole is not up to it.
    extra.extend(["-S", "4k"]);
    if !options.is_empty() {
        extra.extend(["-o", options]);
    }
    oracle::convert(extra, &raw, "raw", &theirs, "qcow2");
    let (our_len, their_len) = (scratch::len(&ours), scratch::len(&theirs));
    // How well made-up data packs says nothing; `real_files_compress_no_worse` looks at that.
    let fits = our_len <= their_len || spec.compression.is_some();
    assert!(fits, "{what}: {our_len} bytes, QEMU makes {their_len}");
}

const SIZE: u64 = 3 * MIB + 5 * 512;

#[test]
fn data_is_clean_identical_and_no_larger_at_every_cluster_size() {
    let dir = Scratch::new();
    for cluster_bits in 9..=21 {
        for version in ["1.1", "0.10"] {
            let options = format!("compat={version},cluster_size={}", 1 << cluster_bits);
            prove(&dir, &spec(SIZE, &options), &[], &options);
            prove(&dir, &compressed(spec(SIZE, &options)), &["-c"], &options);
        }
        let options = format!("compression_type=zstd,cluster_size={}", 1 << cluster_bits);
        prove(&dir, &compressed(spec(SIZE, &options)), &["-c"], &options);
    }
}

#[test]
fn data_is_clean_identical_and_no_larger_at_every_refcount_width() {
    let dir = Scratch::new();
    for order in 0..=6 {
        for cluster_size in ["512", "4k", "64k"] {
            let options = format!("refcount_bits={},cluster_size={cluster_size}", 1 << order);
            prove(&dir, &spec(SIZE, &options), &[], &options);
            prove(&dir, &compressed(spec(SIZE, &options)), &["-c"], &options);
        }
    }
}

#[test]
fn data_is_clean_identical_and_no_larger_with_every_feature() {
    let dir = Scratch::new();
    for options in [
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "preallocation=metadata,compat=0.10,cluster_size=512",
        "preallocation=metadata,cluster_size=512,refcount_bits=64",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "extended_l2=on,cluster_size=2M",
        "extended_l2=on,preallocation=metadata",
        "extended_l2=on,preallocation=falloc",
        "extended_l2=on,preallocation=full",
    ] {
        prove(&dir, &spec(SIZE, options), &[], options);
    }
    for options in [
        "extended_l2=on",
        "extended_l2=on,compression_type=zstd,cluster_size=16k",
    ] {
        prove(&dir, &compressed(spec(SIZE, options)), &["-c"], options);
    }
}

#[test]
fn data_is_clean_and_identical_at_odd_sizes() {
    let dir = Scratch::new();
    for size in [
        512,
        1024,
        65_024,
        65_536,
        66_048,
        131_072,
        2 * MIB - 512,
        2 * MIB + 512,
    ] {
        for options in [
            "",
            "compat=0.10,cluster_size=512",
            "extended_l2=on",
            "cluster_size=2M",
        ] {
            prove(&dir, &spec(size, options), &[], options);
            prove(&dir, &compressed(spec(size, options)), &["-c"], options);
        }
    }
}

#[test]
fn a_huge_sparse_disk_is_clean_identical_and_no_larger() {
    let dir = Scratch::new();
    let size = 3 << 40;
    let raw = dir.hole("disk.raw", size);
    let dots = [0, 1_000_000_000, 1 << 40, 2_999_999_999_000].map(|at| at & !((2 * MIB) - 1));
    for at in dots {
        scratch::patch(&raw, at + 4096, b"here");
    }
    for (options, packed) in [
        ("", false),
        ("", true),
        ("compat=0.10", false),
        ("cluster_size=2M,extended_l2=on", false),
        ("cluster_size=1M,refcount_bits=64", true),
        ("cluster_size=16k", false),
    ] {
        let mut spec = spec(size, options);
        let mut extra = vec!["-o", if options.is_empty() { "compat=1.1" } else { options }];
        if packed {
            spec = compressed(spec);
            extra.push("-c");
        }
        let (mut builder, image) = builder::start(&DRIVER, &spec, &memory);
        let mut encoder = builder.encoder().unwrap();
        let unit = builder.unit();
        let mut placed = 0;
        for at in dots.map(|at| (at + 4096) & !(unit - 1)) {
            builder
                .fill(GuestOffset::new(placed)..GuestOffset::new(at), Run::Zero)
                .unwrap();
            let mut data = vec![0; as_len(unit)];
            let within = as_len((at & !(2 * MIB - 1)) + 4096 - at);
            data[within..within + 4].copy_from_slice(b"here");
            let mut scratch = Vec::new();
            let stored = match encoder.encode(&data, &mut scratch).unwrap() {
                EncodedKind::Packed { len } => Stored::Packed(&scratch[..len]),
                _ => Stored::Plain(&data),
            };
            let mut writes = Writes::new();
            builder.place(GuestOffset::new(at), stored, &mut writes).unwrap();
            writes.perform(&image).unwrap();
            placed = at + unit;
        }
        builder
            .fill(GuestOffset::new(placed)..GuestOffset::new(size), Run::Zero)
            .unwrap();
        builder.finish(Finish::new(Durability::None)).unwrap();
        let ours = store(&spec, &image, &dir, "ours.qcow2");
        oracle::assert_clean(&ours, "qcow2");
        oracle::assert_identical(&raw, "raw", &ours, "qcow2");
        let theirs = dir.join("theirs.qcow2");
        oracle::convert(&extra, &raw, "raw", &theirs, "qcow2");
        let (our_len, their_len) = (scratch::len(&ours), scratch::len(&theirs));
        assert!(
            our_len <= their_len,
            "{options}: {our_len} bytes, QEMU makes {their_len}"
        );
    }
}

/// Programs and documents of this machine, one behind the other.
fn real_files(size: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (folder, share) in [("/usr/bin", size / 2), ("/usr/share/doc", size)] {
        let mut waiting = vec![PathBuf::from(folder)];
        while let Some(path) = waiting.pop() {
            if path.is_dir() && !path.is_symlink() {
                let entries = std::fs::read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path());
                waiting.extend(entries);
                waiting.sort();
            } else if let Ok(file) = std::fs::read(&path) {
                bytes.extend(file.iter().take(as_len(MIB)));
                // As file systems do it.
                bytes.resize(bytes.len().next_multiple_of(4096), 0);
            }
            if bytes.len() as u64 >= share {
                break;
            }
        }
    }
    bytes.resize(as_len(size), 0);
    bytes
}

#[test]
fn real_files_compress_no_worse() {
    let dir = Scratch::new();
    let disk = real_files(6 * MIB);
    let raw = dir.file("disk.raw", &disk);
    let zlib = [9, 12, 14, 15, 16, 18, 21].map(|bits| format!("cluster_size={}", 1 << bits));
    let zstd = [12, 16, 21].map(|bits| format!("compression_type=zstd,cluster_size={}", 1 << bits));
    for options in zlib.into_iter().chain(zstd) {
        let spec = compressed(spec(disk.len() as u64, &options));
        let ours = filled(&spec, &disk, &dir, "ours.qcow2");
        let theirs = dir.join("theirs.qcow2");
        oracle::convert(["-c", "-o", &options], &raw, "raw", &theirs, "qcow2");
        let (our_len, their_len) = (scratch::len(&ours), scratch::len(&theirs));
        assert!(
            our_len <= their_len,
            "{options}: {our_len} bytes, QEMU makes {their_len}"
        );
    }
}

#[test]
fn a_data_file_holds_the_disk() {
    let dir = Scratch::new();
    let disk = SparseRandom::new(3, SIZE);
    disk.write_raw(dir.join("disk.raw"));
    for options in [
        "",
        ",data_file_raw=on",
        ",extended_l2=on",
        ",preallocation=metadata",
        ",preallocation=full",
    ] {
        let options = absolute(&format!("data_file=d.raw{options}"), &dir);
        let spec = spec(SIZE, &options);
        let ours = filled(&spec, &disk, &dir, "ours.qcow2");
        oracle::assert_clean(&ours, "qcow2");
        oracle::assert_identical(dir.join("disk.raw"), "raw", &ours, "qcow2");
        assert_eq!(scratch::len(dir.join("d.raw")), SIZE, "{options}");
        if options.contains("data_file_raw") {
            oracle::assert_identical(dir.join("disk.raw"), "raw", dir.join("d.raw"), "raw");
        }
    }
}

#[test]
fn an_overlay_hides_and_shows_what_is_below() {
    let dir = Scratch::new();
    let base = dir.file("base.raw", &vec![0x5a; SIZE as usize]);
    let disk = SparseRandom::new(11, SIZE);
    for options in [
        "",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "extended_l2=on,preallocation=metadata",
        "data_file=d.raw",
    ] {
        for packed in [false, true] {
            let mut spec = over(spec(SIZE, &absolute(options, &dir)), &base);
            if packed {
                if options.contains("data_file") || options.contains("preallocation") {
                    continue;
                }
                spec = compressed(spec);
            }
            let unit = as_len(builder::start(&DRIVER, &spec, &memory).0.unit());
            let mut expected = disk.bytes();
            for (part, at) in expected.chunks_mut(unit).zip((0..).step_by(unit)) {
                if disk.is_hole(at, unit as u64) {
                    part.fill(0x5a);
                }
            }
            let raw = dir.file("expected.raw", &expected);
            let ours = filled(&spec, &disk, &dir, "ours.qcow2");
            oracle::assert_clean(&ours, "qcow2");
            oracle::assert_identical(&raw, "raw", &ours, "qcow2");
        }
    }
}

/// A place in a file system for an image that is not staged.
fn on_disk(spec: &CreateSpec, dir: &Scratch, name: &str) -> PathBuf {
    let mut names = DRIVER
        .outputs(spec)
        .unwrap()
        .into_iter()
        .map(|output| match output.name {
            OutputName::Main => dir.file(name, &[]),
            OutputName::Named(name) | OutputName::Beside(name) => dir.file(&name, &[]),
        });
    let names: Vec<_> = names.by_ref().collect();
    let next = std::cell::Cell::new(0);
    let open = || -> Arc<dyn StorageMut> {
        let path = &names[next.replace(next.get() + 1)];
        Arc::new(File::open(path, &FileOptions::write(LockPlan::NONE)).unwrap())
    };
    let (mut builder, _) = builder::start(&DRIVER, spec, &open);
    let all = GuestOffset::ZERO..GuestOffset::new(spec.virtual_size);
    builder.fill(all, Run::Absent).unwrap();
    builder.finish(Finish::new(Durability::None)).unwrap();
    names[0].clone()
}

#[test]
fn preallocation_takes_the_space_qemu_takes() {
    let dir = Scratch::new();
    for mode in ["off", "metadata", "falloc", "full"] {
        for options in ["", ",extended_l2=on", ",data_file=d.raw"] {
            let options = absolute(&format!("preallocation={mode}{options}"), &dir);
            let spec = spec(16 * MIB, &options);
            let files = ["ours.qcow2", "d.raw"].map(|name| dir.join(name));
            let sizes = |main: &Path| {
                [main, &files[1]]
                    .iter()
                    .filter(|path| path.exists())
                    .map(|path| (scratch::len(path), scratch::allocated(path)))
                    .collect::<Vec<_>>()
            };
            let ours = sizes(&on_disk(&spec, &dir, "ours.qcow2"));
            let theirs = dir.join("theirs.qcow2");
            oracle::create(&theirs, "qcow2", &options, &(16 * MIB).to_string());
            let theirs = sizes(&theirs);
            oracle::assert_clean(&files[0], "qcow2");
            for ((our_len, ours), (their_len, theirs)) in ours.into_iter().zip(theirs) {
                assert_eq!(our_len, their_len, "{options}");
                // A page here and there, and the rest of the L1 table's cluster.
                let close = ours.abs_diff(theirs) <= 64 << 10;
                assert!(close, "{options}: {ours} bytes taken, QEMU takes {theirs}");
            }
            for path in files {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

#[test]
fn measured_sizes_are_those_of_qemu() {
    let sizes = [
        0,
        1,
        511,
        513,
        65_535,
        65_536,
        65_537,
        64 * MIB,
        (5 << 30) + 1,
        3 << 40,
    ];
    let mut cases = 0;
    for options in [
        "cluster_size=64k",
        "cluster_size=4k",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k,refcount_bits=32",
        "compat=0.10",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "compression_type=zstd,lazy_refcounts=on",
        "data_file=d.raw",
        "data_file=d.raw,data_file_raw=on",
        "cluster_size=512",
    ] {
        for size in sizes {
            let theirs = oracle::qemu_img()
                .args(["measure", "--output=json", "-O", "qcow2", "-o", options])
                .args(["--size", &size.to_string()])
                .finish();
            let whole = u64::next_multiple_of(size, 512);
            let ours = DRIVER.measure(&spec(whole, options), None);
            if theirs.code != Some(0) {
                assert!(ours.is_err(), "{options} {size}: {theirs}");
                continue;
            }
            let (ours, theirs) = (ours.unwrap(), theirs.json());
            assert_eq!(theirs["required"], ours.required, "{options} {size}");
            assert_eq!(
                theirs["fully-allocated"], ours.fully_allocated,
                "{options} {size}"
            );
            cases += 1;
        }
    }
    assert!(cases > 100, "{cases} cases");
}

#[test]
fn qemu_writes_into_what_was_built() {
    let dir = Scratch::new();
    let disk = SparseRandom::new(5, SIZE);
    for options in [
        "",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "cluster_size=512,refcount_bits=64",
        "refcount_bits=1",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full,cluster_size=4k",
        "extended_l2=on",
        "extended_l2=on,preallocation=metadata",
        "data_file=d.raw,data_file_raw=on",
    ] {
        for packed in [false, true] {
            let mut spec = spec(SIZE, &absolute(options, &dir));
            if packed {
                if options.contains("preallocation") || options.contains("data_file") {
                    continue;
                }
                spec = compressed(spec);
            }
            let ours = filled(&spec, &disk, &dir, "ours.qcow2");
            oracle::io(
                &ours,
                "qcow2",
                [
                    "write -P 0x11 0 64k",
                    "write -P 0x22 100k 3k",
                    "write -z 512k 300k",
                    "write -P 0x33 1M 1M",
                    "discard 2M 128k",
                    "write -P 0x44 2500k 572k",
                ],
            );
            oracle::assert_clean(&ours, "qcow2");
            let mut expected = disk.bytes();
            for (byte, at, len) in [
                (0x11, 0, 64),
                (0x22, 100, 3),
                (0, 512, 300),
                (0x33, 1024, 1024),
                (0x44, 2500, 572),
            ] {
                expected[at << 10..(at + len) << 10].fill(byte);
            }
            // What was discarded may read as anything old or as zeros: ask.
            let read = dir.join("read.raw");
            oracle::convert::<&str>([], &ours, "qcow2", &read, "raw");
            let found = std::fs::read(&read).unwrap();
            for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let discarded = (2048 << 10..2176 << 10).contains(&at);
                assert!(discarded || found == expected, "{options} {packed}: byte {at}");
            }
        }
    }
}

fn as_len(count: u64) -> usize {
    usize::try_from(count).unwrap()
}
