//! What the power-cut tests need to know of qcow2.

use std::sync::Arc;

use diskmill_core::{Chain, CheckReport, GuestOffset, Job, Layer, Repair, Result, Storage};
use diskmill_formats::registry;
use diskmill_storage::Memory;
use diskmill_testkit::crash::{Picture, Subject, Tolerance};
use diskmill_testkit::{model, oracle};

use super::images::{self, Disks, Image};

/// What the files show: the disk over `below`, and each snapshot.
pub fn picture(files: &[Vec<u8>], below: &Chain) -> Result<Picture> {
    let top = attach(files, None)?;
    let mut picture = Picture::of(read(&top, below)?);
    for facts in &top.facts().snapshots {
        let layer = attach(files, Some(&facts.id))?;
        picture.snapshots.insert(facts.name.clone(), read(&layer, below)?);
    }
    Ok(picture)
}

/// The image alone, or one of its snapshots.
pub fn attach(files: &[Vec<u8>], snapshot: Option<&str>) -> Result<Arc<dyn Layer>> {
    let disks: Vec<Arc<dyn Storage>> = files
        .iter()
        .map(|bytes| Arc::new(Memory::from(bytes.as_slice())) as Arc<dyn Storage>)
        .collect();
    let mut how = images::how();
    how.snapshot = snapshot.map(Into::into);
    let driver = registry::by_name("qcow2").expect("a driver");
    let parsed = driver.parse(Arc::clone(&disks[0]), &how)?;
    parsed.attach(images::ROLES.into_iter().zip(disks).collect(), &how)
}

fn read(layer: &Arc<dyn Layer>, below: &Chain) -> Result<Vec<u8>> {
    let mut layers = vec![Arc::clone(layer)];
    layers.extend(below.layers().iter().cloned());
    let mut bytes = vec![0xa5; usize::try_from(layer.virtual_size()).expect("a small disk")];
    Chain::new(layers).read_at(GuestOffset::ZERO, &mut bytes)?;
    Ok(bytes)
}

/// The files after a repair of everything.
pub fn repair(files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
    let disks = images::memory(files);
    let mut how = images::how();
    how.for_check = true;
    let driver = registry::by_name("qcow2").expect("a driver");
    let parsed = driver.parse(Arc::clone(&disks[0]) as Arc<dyn Storage>, &how)?;
    let roles = images::ROLES.into_iter().zip(disks.iter().cloned()).collect();
    parsed.repair(roles, &how, Repair::All, Job::silent())?;
    Ok(images::bytes(&disks))
}

impl Subject for Image {
    fn look(&self, files: &[Vec<u8>]) -> Result<Picture> {
        picture(files, &self.below)
    }

    fn check(&self, files: &[Vec<u8>]) -> Result<CheckReport> {
        images::check(files)
    }

    fn repair(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        repair(files)
    }

    fn overwrite(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        let disks: Disks = images::memory(files);
        let layer = images::open(&disks)?;
        let bytes: Vec<u8> = (0..layer.virtual_size())
            .map(|at| model::pattern(0x5b, at))
            .collect();
        layer.write_at(GuestOffset::ZERO, &bytes, &self.below)?;
        layer.flush()?;
        drop(layer);
        Ok(images::bytes(&disks))
    }

    fn second_opinion(&self, files: &[Vec<u8>], tolerance: Tolerance) -> Result<(), String> {
        let path = self.dump(files);
        let format = self.kind.format();
        match oracle::check(&path, format) {
            (_, 0 | 3) => Ok(()),
            (_, 2) if tolerance == Tolerance::LaggingFlags => {
                // It calls flags that lag corrupt. Its repair must then find nothing to be lost.
                oracle::repair(&path, format);
                oracle::assert_clean(&path, format);
                let mut repaired = vec![std::fs::read(&path).expect("read")];
                repaired.extend(files.iter().skip(1).cloned());
                let look = |files: &[Vec<u8>]| self.look(files).map_err(|error| format!("{error:?}"));
                if look(files)? == look(&repaired)? {
                    Ok(())
                } else {
                    Err("what it repaired reads as something else".to_owned())
                }
            }
            (report, code) => Err(format!("code {code}: {report}")),
        }
    }
}
