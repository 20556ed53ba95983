//! Images in memory, of any format with one file, and random work on them.

use std::sync::Arc;

use diskmill_core::{
    Chain, CheckReport, Driver, GuestOffset, Job, Layer, LayerMut, OpenSpec, Repair, Result, Role, Storage,
    StorageMut, ZeroHow,
};
use diskmill_storage::Memory;
use diskmill_testkit::model::Op;
use diskmill_testkit::sparse_random::mix;

/// How many times the usual work `cargo xtask soak` wants.
pub fn soak() -> u32 {
    std::env::var("DISKMILL_SOAK").map_or(1, |times| times.parse().expect("a number"))
}

/// What random choices are made from.
pub fn seed() -> u64 {
    std::env::var("DISKMILL_SEED").map_or(1, |seed| seed.parse().expect("a number"))
}

/// A fresh storage that holds `bytes`.
pub fn memory(bytes: &[u8]) -> Arc<dyn StorageMut> {
    Arc::new(Memory::from(bytes))
}

/// The bytes of a storage.
pub fn bytes(disk: &Arc<dyn StorageMut>) -> Vec<u8> {
    let mut bytes = vec![0; disk.len().expect("length") as usize];
    disk.read_at(Default::default(), &mut bytes).expect("read");
    bytes
}

/// How the tests open images.
pub fn how() -> OpenSpec {
    let mut how = OpenSpec::default();
    how.unmap = true;
    how
}

/// Opens an image for writing.
pub fn open(driver: &dyn Driver, disk: &Arc<dyn StorageMut>) -> Result<Arc<dyn LayerMut>> {
    let parsed = driver.parse(Arc::clone(disk) as Arc<dyn Storage>, &how())?;
    parsed.attach_mut(vec![(Role::Main, Arc::clone(disk))], &how())
}

/// Opens an image for reading.
pub fn read_only(driver: &dyn Driver, bytes: &[u8]) -> Result<Arc<dyn Layer>> {
    let disk: Arc<dyn Storage> = Arc::new(Memory::from(bytes));
    let parsed = driver.parse(Arc::clone(&disk), &how())?;
    parsed.attach(vec![(Role::Main, disk)], &how())
}

/// What the image in `bytes` over `below` shows.
pub fn read(driver: &dyn Driver, bytes: &[u8], below: &Chain) -> Result<Vec<u8>> {
    let top = read_only(driver, bytes)?;
    let mut disk = vec![0xa5; top.virtual_size() as usize];
    let mut layers = vec![top];
    layers.extend(below.layers().iter().cloned());
    Chain::new(layers).read_at(GuestOffset::ZERO, &mut disk)?;
    Ok(disk)
}

/// What our own check finds.
pub fn check(driver: &dyn Driver, bytes: &[u8]) -> Result<CheckReport> {
    let disk: Arc<dyn Storage> = Arc::new(Memory::from(bytes));
    let parsed = driver.parse(Arc::clone(&disk), &how())?;
    parsed.check(vec![(Role::Main, disk)], &how(), Job::silent())
}

/// Repairs an image.
pub fn repair(driver: &dyn Driver, disk: &Arc<dyn StorageMut>, what: Repair) -> Result<CheckReport> {
    let parsed = driver.parse(Arc::clone(disk) as Arc<dyn Storage>, &how())?;
    parsed.repair(vec![(Role::Main, Arc::clone(disk))], &how(), what, Job::silent())
}

/// `count` operations on a disk of `size` bytes, many of them about as large as `unit`.
pub fn ops(size: u64, unit: u64, salt: u64, count: u64) -> Vec<Op> {
    (0..count)
        .map(|step| {
            let random = |which: u64| mix(mix(seed() ^ salt << 32) ^ step << 8 ^ which);
            let at = match random(0) % 3 {
                0 => random(1) % (size / unit + 1) * unit,
                1 => random(1) % (size / 512) * 512,
                _ => random(1) % size,
            };
            let len = match random(2) % 4 {
                0 => 1 + random(3) % 5000,
                1 => 512 * (1 + random(3) % 8),
                2 => unit,
                _ => 1 + random(3) % (2 * unit),
            };
            let how = [ZeroHow::KeepAllocated, ZeroHow::MayUnmap][(random(4) % 2) as usize];
            let fill = random(6) as u8;
            match random(5) % 16 {
                0..=5 => Op::Write { at, len, fill },
                6 => Op::Packed { at, fill },
                7..=9 => Op::Zero { at, len, how },
                10 | 11 => Op::Discard { at, len },
                12 => Op::Flush,
                13 => Op::Resize {
                    size: (1 + random(7) % (size * 5 / 4 / 512)) * 512,
                },
                14 => Op::Reopen,
                _ if random(8) % 3 == 0 => Op::Clear,
                _ => Op::Flush,
            }
        })
        .collect()
}
