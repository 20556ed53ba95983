//! Images in memory, of any format with one file.

use std::sync::Arc;

use diskmill_core::{
    Chain, CheckReport, Driver, ErrorKind, GuestOffset, Job, Layer, LayerMut, OpenSpec, Repair, Result, Role,
    Storage, StorageMut,
};
use diskmill_storage::Memory;
use diskmill_testkit::crash::{self, Effect, Picture, Tale};
use diskmill_testkit::fault::{Failure, Faults, Journal, Lasting};
use diskmill_testkit::model::{self, Model, Op};

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

/// An image to play with.
#[derive(Clone, Copy, Debug)]
pub struct Stage<'a> {
    pub driver: &'a dyn Driver,
    /// The bytes of its file.
    pub file: &'a [u8],
    /// What it shows.
    pub start: &'a [u8],
    /// What it is over.
    pub below: &'a Chain,
    /// The step it allocates in.
    pub unit: u64,
}

impl Stage<'_> {
    /// Does `ops` to the image, with what reaches the file recorded. Flushes settle, and so does another size; all else
    /// flows.
    pub fn play(&self, name: String, ops: &[Op], journal: &Arc<Journal>) -> Tale {
        let disk = journal.record(memory(self.file));
        let mut layer = open(self.driver, &disk).expect("open");
        let mut model = Model::new(self.start.to_vec());
        let mut tale = Tale::new(name, journal, Picture::of(self.start.to_vec()));
        for op in ops {
            let mark = tale.mark();
            let through = crash::given_up(op, model.bytes(), self.below);
            if *op == Op::Reopen {
                drop(layer);
                layer = open(self.driver, &disk).expect("open again");
            }
            model
                .apply(op, &layer, self.below, self.unit, &|_| None)
                .unwrap_or_else(|error| panic!("{op:?}: {error:?}"));
            let after = Picture::of(model.bytes().to_vec());
            let effect = match op {
                Op::Flush => Effect::Settles,
                Op::Resize { .. } if tale.now().disk.len() != after.disk.len() => Effect::Settles,
                _ => Effect::Flows,
            };
            tale.note_through(mark, format!("{op:?}"), effect, through, after);
        }
        tale
    }

    /// Does `ops` to the image with one call that fails, for about 20 of the calls there are: nothing gets corrupt, and
    /// somebody notices.
    pub fn fail(&self, name: &str, ops: &[Op]) {
        let attempt = |faults: &Arc<Faults>| {
            let inner = memory(self.file);
            let disk = faults.wrap(Arc::clone(&inner));
            let mut failed = None;
            match open(self.driver, &disk) {
                Err(error) => failed = Some(error),
                Ok(layer) => {
                    let mut model = Model::new(self.start.to_vec());
                    for op in ops {
                        if let Err(error) = model.apply(op, &layer, self.below, self.unit, &|_| None) {
                            failed = Some(error);
                            break;
                        }
                    }
                    // Whoever does not give up at once must do no harm either, and learns it again.
                    let more = layer.write_at(GuestOffset::ZERO, &[1; 512], self.below);
                    failed = failed.or(more.err());
                    failed = failed.or(layer.flush().err());
                }
            }
            (bytes(&inner), failed)
        };
        let calls = {
            let faults = Faults::new();
            let failed = attempt(&faults).1;
            assert!(failed.is_none(), "{failed:?}");
            faults.calls()
        };
        for number in (0..calls).step_by(calls.div_ceil(20).max(1) as usize) {
            for (failure, lasting) in [
                (Failure::Io, Lasting::Once),
                (Failure::ShortWrite, Lasting::ForGood),
            ] {
                let faults = Faults::new();
                faults.fail_at(number, failure, lasting);
                let (file, failed) = attempt(&faults);
                if faults.struck() > 0 && lasting == Lasting::ForGood {
                    let error = failed.unwrap_or_else(|| panic!("{name}, call {number}: nobody noticed"));
                    assert_ne!(
                        error.kind(),
                        ErrorKind::Corrupt,
                        "{name}, call {number}: {error:?}"
                    );
                }
                let report = check(self.driver, &file).expect("check");
                assert_eq!(
                    (report.check_errors, report.corruptions),
                    (0, 0),
                    "{name}, call {number}, {failure:?} {lasting:?}: {:#?}",
                    report.findings
                );
            }
        }
    }

    /// The file after all of the disk in `file` was overwritten and flushed.
    pub fn overwrite(&self, file: &[u8]) -> Result<Vec<u8>> {
        let disk = memory(file);
        let layer = open(self.driver, &disk)?;
        let new: Vec<u8> = (0..layer.virtual_size())
            .map(|at| model::pattern(0x5b, at))
            .collect();
        layer.write_at(GuestOffset::ZERO, &new, self.below)?;
        layer.flush()?;
        drop(layer);
        Ok(bytes(&disk))
    }
}
