//! Images in memory, of any format with one file.

use std::sync::{Arc, Mutex};

use diskmill_core::{
    Chain, CheckReport, Driver, EncodedKind, ErrorKind, GuestOffset, Job, Layer, LayerMut, OpenSpec, Repair,
    Result, Role, Secret, Storage, StorageMut, ZeroHow,
};
use diskmill_storage::Memory;
use diskmill_testkit::crash::{self, Effect, Picture, Tale};
use diskmill_testkit::fault::{Failure, Faults, Journal, Lasting};
use diskmill_testkit::model::{self, Model, Op};
use diskmill_testkit::sparse_random::mix;

/// The password of images that are encrypted.
pub const PASSPHRASE: &[u8] = b"twelve words";

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
    how.secrets.set_passphrase(Secret::new(PASSPHRASE.to_vec()));
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

/// What compresses units for `layer`: nothing, if it stores none compressed.
pub fn pack(layer: &Arc<dyn LayerMut>) -> impl Fn(&[u8]) -> Option<Vec<u8>> + use<> {
    let encoder = Mutex::new(layer.encoder().ok());
    move |unit| {
        let mut scratch = Vec::new();
        let mut encoder = encoder.lock().expect("one thread");
        match encoder.as_mut()?.pack(unit, &mut scratch).expect("compress") {
            EncodedKind::Packed { len } => Some(scratch[..len].to_vec()),
            _ => None,
        }
    }
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
                .apply(op, &layer, self.below, self.unit, &pack(&layer))
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
                        if let Err(error) = model.apply(op, &layer, self.below, self.unit, &pack(&layer)) {
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

    /// Has `threads` threads write to the image, each every so many-th stretch of `step` bytes, so that all of them want
    /// the same units at the same time. Returns the file, and what it must show.
    pub fn share(&self, threads: u64, step: u64) -> (Vec<u8>, Vec<u8>) {
        let disk = memory(self.file);
        let layer = open(self.driver, &disk).expect("open");
        let size = self.start.len() as u64;
        let pieces = size.div_ceil(step);
        let piece = |number: u64| number * step..((number + 1) * step).min(size);
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (layer, piece) = (&layer, &piece);
                scope.spawn(move || {
                    for number in (thread..pieces).step_by(threads as usize) {
                        let range = piece(number);
                        let start = GuestOffset::new(range.start);
                        let bytes: Vec<u8> =
                            range.clone().map(|at| model::pattern(thread as u8, at)).collect();
                        layer.write_at(start, &bytes, self.below).expect("write");
                        if mix(number).is_multiple_of(5) {
                            layer.flush().expect("flush");
                        }
                        if mix(number).is_multiple_of(7) {
                            let end = GuestOffset::new(range.start + (range.end - range.start) / 2);
                            layer
                                .zero(start..end, ZeroHow::MayUnmap, self.below)
                                .expect("zero");
                        }
                    }
                });
            }
        });
        layer.flush().expect("flush");
        drop(layer);
        let mut expected = Vec::with_capacity(self.start.len());
        for number in 0..pieces {
            let range = piece(number);
            let zeros = match mix(number).is_multiple_of(7) {
                true => range.start + (range.end - range.start) / 2,
                false => range.start,
            };
            expected.extend(range.map(|at| match at < zeros {
                true => 0,
                false => model::pattern((number % threads) as u8, at),
            }));
        }
        (bytes(&disk), expected)
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
