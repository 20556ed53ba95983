use std::sync::Arc;

use diskmill_core::StorageMut;
use diskmill_testkit::contract::storage::{self as contract, pattern};
use diskmill_testkit::host::{Loop, Mount};
use diskmill_testkit::oracle::qemu_io;
use diskmill_testkit::{Run, Scratch};

use super::*;
use crate::AlignedBuf;

const MODES: [CacheMode; 5] = [
    CacheMode::None,
    CacheMode::Writeback,
    CacheMode::Writethrough,
    CacheMode::Directsync,
    CacheMode::Unsafe,
];

fn open(path: impl AsRef<Path>, cache: CacheMode) -> File {
    File::open(path, &FileOptions::write(LockPlan::WRITE).cache(cache)).unwrap()
}

fn at(offset: u64) -> HostOffset {
    HostOffset::new(offset)
}

/// Runs the contract on a new file in `folder`.
fn keeps_the_contract(folder: &Path, cache: CacheMode) {
    let path = folder.join("disk");
    contract::all(&|| {
        std::fs::write(&path, b"").unwrap();
        Arc::new(open(&path, cache))
    });
}

#[test]
fn keeps_the_contract_on_disk() {
    let scratch = Scratch::new();
    for cache in [CacheMode::Writeback, CacheMode::None, CacheMode::Unsafe] {
        keeps_the_contract(scratch.path(), cache);
    }
}

#[test]
fn keeps_the_contract_in_memory() {
    let scratch = Scratch::beneath("/dev/shm");
    for cache in MODES {
        keeps_the_contract(scratch.path(), cache);
    }
}

#[test]
fn keeps_the_contract_when_every_write_is_durable() {
    // On a device of its own that keeps nothing, since each of these writes would wait for the real disk.
    let scratch = Scratch::beneath("/dev/shm");
    let (_device, mount) = file_system(&scratch, &["mkfs.ext4", "-q"]);
    for cache in [CacheMode::Writethrough, CacheMode::Directsync] {
        keeps_the_contract(mount.path(), cache);
    }
}

/// A file system made by `make` on a loop device, mounted.
fn file_system(scratch: &Scratch, make: &[&str]) -> (Loop, Mount) {
    let device = Loop::attach(scratch.hole("device", 64 << 20), 512);
    Run::new(make[0]).args(&make[1..]).arg(device.path()).ok();
    let point = scratch.join("point");
    std::fs::create_dir(&point).unwrap();
    let mount = Mount::new(&point, &[device.path().to_str().unwrap()]);
    (device, mount)
}

#[test]
fn keeps_the_contract_where_the_host_can_do_little() {
    let scratch = Scratch::new();
    let point = scratch.join("ram");
    std::fs::create_dir(&point).unwrap();
    let ram = Mount::new(&point, &["-t", "ramfs", "none"]);
    keeps_the_contract(ram.path(), CacheMode::Writeback);
    // It has no way to punch or reserve; this must be noted, not asked each time.
    let file = open(ram.path().join("disk"), CacheMode::Writeback);
    file.write_at(at(0), &[1; 8192]).unwrap();
    file.zero(at(0)..at(4096), ZeroHow::MayUnmap).unwrap();
    file.zero(at(0)..at(4096), ZeroHow::KeepAllocated).unwrap();
    file.allocate(at(0)..at(10_000)).unwrap();
    for call in [Call::Punch, Call::ZeroRange, Call::Reserve] {
        assert!(file.lacks(call), "{call:?}");
    }
}

#[test]
fn keeps_the_contract_on_blocks_of_1_kib() {
    let scratch = Scratch::new();
    // Without extents the kernel can neither reserve nor zero ranges.
    let (_device, mount) = file_system(
        &scratch,
        &["mkfs.ext4", "-q", "-b", "1024", "-O", "^extent,^64bit"],
    );
    for cache in [CacheMode::Writeback, CacheMode::None] {
        keeps_the_contract(mount.path(), cache);
    }
    assert!(open(mount.path().join("disk"), CacheMode::None).hints().align <= 1024);
}

/// A device that reads as zeros.
fn device(scratch: &Scratch, sector: u32) -> Loop {
    Loop::attach(scratch.hole("device", 1 << 20), sector)
}

#[test]
fn block_devices_keep_the_contract() {
    for sector in [512, 4096] {
        let scratch = Scratch::beneath("/dev/shm");
        let device = device(&scratch, sector);
        for cache in MODES {
            contract::all(&|| {
                let file = open(device.path(), cache);
                assert!(file.is_block_device());
                assert_eq!(file.logical_block_size(), sector);
                assert_eq!(file.len().unwrap(), 1 << 20);
                assert!(file.hints().fixed_len);
                file.zero(at(0)..at(1 << 20), ZeroHow::MayUnmap).unwrap();
                Arc::new(file)
            });
        }
    }
}

#[test]
fn devices_give_space_back_and_reserve_it() {
    let scratch = Scratch::new();
    let device = device(&scratch, 512);
    let used = || diskmill_testkit::scratch::allocated(scratch.join("device"));
    for cache in [CacheMode::Writeback, CacheMode::None] {
        let file = open(device.path(), cache);
        let bytes = pattern(1, 1 << 20);
        file.write_at(at(0), &bytes).unwrap();
        file.sync().unwrap();
        assert_eq!(used(), 1 << 20);
        file.zero(at(1000)..at(500_000), ZeroHow::MayUnmap).unwrap();
        file.sync().unwrap();
        assert!(used() < 600_000, "{} bytes are used", used());
        file.zero(at(0)..at(1 << 20), ZeroHow::KeepAllocated).unwrap();
        file.write_at(at(0), &bytes).unwrap();
        file.sync().unwrap();
        file.discard(at(100)..at(1 << 20)).unwrap();
        file.sync().unwrap();
        assert!(used() < 8192, "{} bytes are used", used());
        let mut back = vec![0; 512];
        file.read_at(at(0), &mut back).unwrap();
        assert_eq!(back[..100], bytes[..100]);
    }
}

#[test]
fn a_device_in_use_can_be_refused() {
    let scratch = Scratch::new();
    let (device, _mount) = file_system(&scratch, &["mkfs.ext4", "-q"]);
    let options = FileOptions::write(LockPlan::WRITE);
    File::open(device.path(), &options).unwrap();
    let error = File::open(device.path(), &options.exclusive()).unwrap_err();
    let busy = error.io_error().unwrap().raw_os_error();
    assert_eq!(busy, Some(Errno::BUSY.raw_os_error()), "{error:?}");
}

#[test]
fn a_device_has_one_identity_under_any_name() {
    let scratch = Scratch::new();
    let device = device(&scratch, 512);
    let other = scratch.join("node");
    std::os::unix::fs::symlink(device.path(), &other).unwrap();
    let read = FileOptions::read(LockPlan::READ);
    let one = File::open(device.path(), &read).unwrap();
    let two = File::open(&other, &read).unwrap();
    assert_eq!(one.identity(), two.identity());
    let file = File::open(scratch.join("device"), &read).unwrap();
    assert_ne!(one.identity(), file.identity());
}

#[test]
fn direct_requests_that_suit_take_no_detour() {
    let scratch = Scratch::new();
    let file = open(scratch.file("disk", b""), CacheMode::None);
    let align = u64::from(file.hints().align);
    assert!(align >= 512, "the disk's file system knows direct I/O");
    let mut buffer = AlignedBuf::new(1 << 20);
    buffer.copy_from_slice(&pattern(1, 1 << 20));
    file.write_at(at(align), &buffer).unwrap();
    file.write_vectored_at(
        at(align),
        &[IoSlice::new(&buffer[..4096]), IoSlice::new(&buffer[4096..])],
    )
    .unwrap();
    let mut back = AlignedBuf::new(1 << 20);
    file.read_at(at(align), &mut back).unwrap();
    assert_eq!(*back, *buffer);
    let direct = file.direct.as_ref().unwrap();
    assert!(!direct.has_carried(), "nothing was carried");
    file.read_at(at(align + 1), &mut back[..100]).unwrap();
    assert!(direct.has_carried());
    assert_eq!(back[..100], buffer[1..101]);
}

#[test]
fn direct_writes_of_odd_ends_grow_the_file_by_no_more() {
    for cache in [CacheMode::None, CacheMode::Directsync] {
        let scratch = Scratch::new();
        let path = scratch.file("disk", b"");
        let mut model = Vec::new();
        let file = open(&path, cache);
        for (round, (offset, len)) in [
            (0, 1),
            (1, 4096),
            (4097, 10),
            (100, 9000),
            (20_000, 3),
            (3_000_000, 2_500_001),
            (5, 4_000_000),
        ]
        .into_iter()
        .enumerate()
        {
            let bytes = pattern(round as u64, len);
            file.write_at(at(offset as u64), &bytes).unwrap();
            model.resize(model.len().max(offset + len), 0);
            model[offset..offset + len].copy_from_slice(&bytes);
            assert_eq!(file.len().unwrap(), model.len() as u64);
            contract::reads(&file, &model);
        }
        file.sync().unwrap();
        drop(file);
        assert!(std::fs::read(&path).unwrap() == model);
        contract::reads(
            &File::open(&path, &FileOptions::read(LockPlan::READ)).unwrap(),
            &model,
        );
        let read = FileOptions::read(LockPlan::READ).cache(CacheMode::None);
        contract::reads(&File::open(&path, &read).unwrap(), &model);
    }
}

#[test]
fn qemu_reads_what_we_write_and_we_what_it_writes() {
    let scratch = Scratch::new();
    for cache in MODES {
        let path = scratch.hole("disk", 1 << 20);
        {
            let file = open(&path, cache);
            file.write_at(at(1000), &[0x5a; 5000]).unwrap();
            file.zero(at(2000)..at(3000), ZeroHow::MayUnmap).unwrap();
            file.sync().unwrap();
        }
        let done = qemu_io()
            .args(["-f", "raw", "-t", cache.name()])
            .args(["-c", "read -P 0x5a 1000 1000", "-c", "read -P 0 2000 1000"])
            .args(["-c", "read -P 0x5a 3000 3000", "-c", "write -P 0x77 5500 100000"])
            .arg(&path)
            .ok();
        assert!(!done.out().contains("failed"), "{done}");
        let file = open(&path, cache);
        let mut bytes = vec![0; 200_000];
        file.read_at(at(0), &mut bytes).unwrap();
        assert!(bytes[3000..5500].iter().all(|byte| *byte == 0x5a));
        assert!(bytes[5500..105_500].iter().all(|byte| *byte == 0x77));
        assert!(bytes[105_500..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn knows_holes_to_the_block() {
    for scratch in [Scratch::new(), Scratch::beneath("/dev/shm")] {
        let file = open(scratch.hole("disk", 1 << 30), CacheMode::Writeback);
        let run = |offset| file.run_at(at(offset)).unwrap();
        assert_eq!(run(0), HostRun::Hole(1 << 30));
        assert_eq!(run(5), HostRun::Hole((1 << 30) - 5));
        file.write_at(at(1 << 20), &[1; 8192]).unwrap();
        assert_eq!(run(0), HostRun::Hole(1 << 20));
        assert_eq!(run(100), HostRun::Hole((1 << 20) - 100));
        assert_eq!(run(1 << 20), HostRun::Data(8192));
        assert_eq!(run((1 << 20) + 8000), HostRun::Data(192));
        assert_eq!(run((1 << 20) + 8192), HostRun::Hole((1 << 30) - (1 << 20) - 8192));
        file.zero(at(1 << 20)..at((1 << 20) + 4096), ZeroHow::MayUnmap)
            .unwrap();
        assert_eq!(run(1 << 20), HostRun::Hole(4096));
        assert_eq!(file.allocated().unwrap(), Some(4096));
        file.discard(at(0)..at(1 << 30)).unwrap();
        assert_eq!(run(0), HostRun::Hole(1 << 30));
        file.set_len(10).unwrap();
        assert_eq!(run(0), HostRun::Hole(10));
        assert_eq!(run(10), HostRun::Hole(u64::MAX - 10));
    }
}

#[test]
fn asks_the_host_once_for_a_run() {
    let scratch = Scratch::new();
    let path = scratch.hole("disk", 1 << 20);
    let file = open(&path, CacheMode::Writeback);
    assert_eq!(file.run_at(at(0)).unwrap(), HostRun::Hole(1 << 20));
    // Somebody else's write, without a lock, goes unseen until we look again.
    let other = File::open(&path, &FileOptions::write(LockPlan::NONE)).unwrap();
    other.write_at(at(0), &[1; 4096]).unwrap();
    assert_eq!(file.run_at(at(4096)).unwrap(), HostRun::Hole((1 << 20) - 4096));
    other.set_len(2 << 20).unwrap();
    assert_eq!(file.len().unwrap(), 1 << 20);
    file.refresh().unwrap();
    assert_eq!(file.len().unwrap(), 2 << 20);
    assert_eq!(file.run_at(at(0)).unwrap(), HostRun::Data(4096));
}

#[test]
fn zeroing_and_reserving_do_to_the_space_what_they_say() {
    for scratch in [Scratch::new(), Scratch::beneath("/dev/shm")] {
        for cache in [CacheMode::Writeback, CacheMode::None] {
            let file = open(scratch.file("disk", &[1; 1 << 20]), cache);
            let used = || file.allocated().unwrap().unwrap();
            assert!(used() >= 1 << 20);
            file.zero(at(0)..at(1 << 20), ZeroHow::KeepAllocated).unwrap();
            assert!(used() >= 1 << 20, "{cache:?}: {}", used());
            file.zero(at(0)..at(1 << 20), ZeroHow::MayUnmap).unwrap();
            assert_eq!(used(), 0, "{cache:?}");
            file.zero(at(1 << 20)..at(3 << 20), ZeroHow::MayUnmap).unwrap();
            assert_eq!(file.len().unwrap(), 3 << 20);
            assert!(used() <= 4096, "{cache:?}: {}", used());
            file.allocate(at(0)..at(2 << 20)).unwrap();
            assert!(used() >= 2 << 20, "{cache:?}: {}", used());
            file.zero(at(3 << 20)..at(4 << 20), ZeroHow::KeepAllocated)
                .unwrap();
            assert!(used() >= 3 << 20, "{cache:?}: {}", used());
            assert_eq!(file.len().unwrap(), 4 << 20);
        }
    }
}

#[test]
fn a_failed_flush_is_for_good() {
    let scratch = Scratch::new();
    let file = open(scratch.file("disk", b""), CacheMode::Writeback);
    file.sync().unwrap();
    file.pretend_sync_failed(Errno::IO);
    for _ in 0..2 {
        let error = file.sync().unwrap_err();
        assert_eq!(error.context().op, Some("sync"));
        assert_eq!(
            error.io_error().unwrap().raw_os_error(),
            Some(Errno::IO.raw_os_error())
        );
    }
    file.sync_all().unwrap_err();
}

#[test]
fn errors_name_file_and_place() {
    let scratch = Scratch::new();
    let path = scratch.file("disk", b"abc");
    let file = open(&path, CacheMode::Writeback);
    let error = file.read_at(at(1), &mut [0; 9]).unwrap_err();
    assert_eq!(error.context().path.as_deref(), Some(path.as_path()));
    assert_eq!(error.context().op, Some("read"));
    assert_eq!(error.context().host, Some(at(3)), "where the file ends");
    let error = File::open(scratch.join("none"), &FileOptions::read(LockPlan::READ)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = File::open("/proc/self/mem", &FileOptions::read(LockPlan::NONE)).unwrap_err();
    assert_eq!(
        error.context().op,
        Some("seek"),
        "made up by the kernel: {error:?}"
    );
    let read_only = File::open(&path, &FileOptions::read(LockPlan::NONE)).unwrap();
    assert!(!read_only.is_writable());
    read_only.write_at(at(0), b"x").unwrap_err();
    read_only.set_len(0).unwrap_err();
    assert_eq!(std::fs::read(&path).unwrap(), b"abc");
}

#[test]
fn where_there_is_no_direct_io_it_is_refused_by_name() {
    let scratch = Scratch::new();
    let point = scratch.join("ram");
    std::fs::create_dir(&point).unwrap();
    let ram = Mount::new(&point, &["-t", "ramfs", "none"]);
    let path = ram.path().join("disk");
    std::fs::write(&path, b"x").unwrap();
    let options = FileOptions::read(LockPlan::READ).cache(CacheMode::None);
    let error = File::open(&path, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
    assert!(error.find::<NoDirect>().is_some());
    let options = crate::StageOptions::new().cache(CacheMode::None);
    let error = crate::Staged::create(ram.path().join("new"), &options).unwrap_err();
    assert!(error.find::<NoDirect>().is_some());
    assert!(!ram.path().join("new").exists());
}

#[test]
fn new_data_is_no_hole_on_ext3() {
    let scratch = Scratch::new();
    let (_device, mount) = file_system(&scratch, &["mkfs.ext3", "-q"]);
    let path = mount.path().join("disk");
    // Somebody else writes it, a moment before we look.
    std::fs::write(&path, vec![1; 100_000]).unwrap();
    let file = File::open(&path, &FileOptions::read(LockPlan::READ)).unwrap();
    assert!(matches!(file.run_at(at(0)).unwrap(), HostRun::Data(_)));
}

#[test]
fn a_path_without_links_is_just_that() {
    let scratch = Scratch::new();
    // The temporary folder itself may be behind a link.
    let dir = scratch.path().canonicalize().unwrap();
    std::fs::create_dir(dir.join("sub")).unwrap();
    std::fs::write(dir.join("sub/x"), [0; 512]).unwrap();
    std::os::unix::fs::symlink("sub", dir.join("link")).unwrap();
    std::os::unix::fs::symlink("sub/x", dir.join("last")).unwrap();
    let options = FileOptions::read(LockPlan::NONE);
    for name in ["sub/x", "link/x", "last"] {
        assert!(File::open(dir.join(name), &options).is_ok(), "{name}");
        let plain = File::open(dir.join(name), &options.no_links()).is_ok();
        assert_eq!(plain, name == "sub/x", "{name}");
    }
}
