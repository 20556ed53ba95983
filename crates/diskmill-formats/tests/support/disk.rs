//! Images in memory, of any format with one file.

use std::sync::Arc;

use diskmill_core::{
    Chain, CheckReport, Driver, GuestOffset, Job, Layer, LayerMut, OpenSpec, Repair, Result, Role, Storage,
    StorageMut,
};
use diskmill_storage::Memory;

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
