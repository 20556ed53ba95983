//! What every [`Builder`] must do.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use diskmill_core::{
    Builder, Chain, CreateSpec, Driver, Durability, EncodedKind, Encoder, Finish, GuestOffset, Layer,
    OpenSpec, Role, Run, Secret, State, Storage, StorageMut, Stored, Writes,
};

use crate::sparse_random::{GRAIN, Kind, SparseRandom};

/// Makes an empty storage.
pub type NewFile<'a> = &'a dyn Fn() -> Arc<dyn StorageMut>;

/// The files of an image, the main one first.
pub type Image = Vec<Arc<dyn StorageMut>>;

/// Guest bytes to build an image of.
pub trait Guest: Sync {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Fills `buf` from `at`, all of which is within the disk.
    fn read_at(&self, at: u64, buf: &mut [u8]);

    /// Whether nothing was ever written to the `len` bytes from `at`: an overlay leaves them to the layer below.
    fn is_hole(&self, at: u64, len: u64) -> bool;
}

impl Guest for SparseRandom {
    fn size(&self) -> u64 {
        Self::size(self)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) {
        Self::read_at(self, at, buf);
    }

    fn is_hole(&self, at: u64, len: u64) -> bool {
        let end = (at + len).min(self.size());
        let first = at - at % GRAIN;
        (first..end)
            .step_by(as_len(GRAIN))
            .all(|grain| self.kind(grain) == Kind::Hole)
    }
}

impl Guest for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) {
        buf.copy_from_slice(&self[as_len(at)..][..buf.len()]);
    }

    fn is_hole(&self, _at: u64, _len: u64) -> bool {
        false
    }
}

/// Builds disks as `spec` asks, in files of `new_file`, and panics where the contract is broken:
///
/// * the unit is a power of two of at least 512;
/// * nothing opens as an image before `finish`, if the format has a magic number;
/// * every byte reads back, zeros hide what is below, and what is absent does not;
/// * the bytes of the files do not depend on threads, on how many units are placed at once, nor on who writes them.
pub fn builder(driver: &dyn Driver, spec: &CreateSpec, new_file: NewFile<'_>) {
    let disk = SparseRandom::new(spec.virtual_size ^ 0x5eed, spec.virtual_size);
    let alone = fill(driver, spec, new_file, &disk, 1, 1);
    let unit = start(driver, spec, new_file).0.unit();
    reads_back(driver, spec, &alone, &disk, unit);
    for (threads, units) in [(1, 7), (4, 3), (3, 64)] {
        let many = fill(driver, spec, new_file, &disk, threads, units);
        assert_same(
            &alone,
            &many,
            &format!("{spec:?}: {threads} threads, {units} units at once"),
        );
    }
    let spliced = splice(driver, spec, new_file, &disk);
    reads_back(driver, spec, &spliced, &disk, unit);
    unfinished(driver, spec, new_file, &disk);
    empty(driver, spec, new_file);
}

/// Starts an image as `spec` asks.
pub fn start(driver: &dyn Driver, spec: &CreateSpec, new_file: NewFile<'_>) -> (Box<dyn Builder>, Image) {
    let outputs = driver.outputs(spec).expect("the files of the image");
    assert_eq!(outputs.first().map(|output| output.role), Some(Role::Main));
    let files: Vec<_> = outputs.iter().map(|output| (output.role, new_file())).collect();
    let image = files.iter().map(|(_, file)| Arc::clone(file)).collect();
    let builder = driver.build(spec, files).expect("a builder");
    let unit = builder.unit();
    assert!(unit.is_power_of_two() && unit >= 512, "the unit is {unit}");
    (builder, image)
}

/// Fills an image with `disk`, `units` of them a chunk, with as many `threads`.
pub fn fill(
    driver: &dyn Driver,
    spec: &CreateSpec,
    new_file: NewFile<'_>,
    disk: &dyn Guest,
    threads: usize,
    units: u64,
) -> Image {
    let (builder, image) = start(driver, spec, new_file);
    let lane = Lane {
        chunk: builder.unit() * units,
        unit: builder.unit(),
        overlay: spec.backing.is_some(),
        disk,
        claimed: AtomicU64::new(0),
        turn: Mutex::new((0, builder)),
        passed: Condvar::new(),
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| lane.run());
        }
    });
    let (_, builder) = lane.turn.into_inner().expect("no worker panicked");
    builder
        .finish(Finish::new(Durability::Synced))
        .expect("a finished image");
    image
}

/// The bytes of one of an image's files.
pub fn bytes(file: &dyn Storage) -> Vec<u8> {
    let len = usize::try_from(file.len().expect("a length")).expect("a small file");
    let mut bytes = vec![0; len];
    file.read_at(diskmill_core::HostOffset::ZERO, &mut bytes)
        .expect("its bytes");
    bytes
}

struct Lane<'a> {
    chunk: u64,
    unit: u64,
    overlay: bool,
    disk: &'a dyn Guest,
    claimed: AtomicU64,
    turn: Mutex<(u64, Box<dyn Builder>)>,
    passed: Condvar,
}

impl Lane<'_> {
    fn run(&self) {
        let mut encoder = self
            .turn
            .lock()
            .expect("the builder")
            .1
            .encoder()
            .expect("an encoder");
        loop {
            let number = self.claimed.fetch_add(1, Ordering::Relaxed);
            let start = number * self.chunk;
            if start >= self.disk.size() {
                return;
            }
            let range = start..(start + self.chunk).min(self.disk.size());
            self.copy(number, range, &mut *encoder);
        }
    }

    fn copy(&self, number: u64, range: Range<u64>, encoder: &mut dyn Encoder) {
        let mut data = vec![0; as_len(range.end - range.start)];
        self.disk.read_at(range.start, &mut data);
        let units: Vec<_> = data
            .chunks(as_len(self.unit))
            .zip(0..)
            .map(|(unit, index)| {
                let at = range.start + index * self.unit;
                if self.overlay && self.disk.is_hole(at, self.unit) {
                    return Piece::Run(Run::Absent);
                }
                let mut whole = unit.to_vec();
                whole.resize(as_len(self.unit), 0);
                let mut scratch = Vec::new();
                match encoder.encode(&whole, &mut scratch).expect("an encoded unit") {
                    EncodedKind::Zero => Piece::Run(Run::Zero),
                    EncodedKind::Plain => Piece::Plain,
                    EncodedKind::Packed { len } => {
                        scratch.truncate(len);
                        Piece::Packed(scratch)
                    }
                }
            })
            .collect();
        let mut guard = self.turn.lock().expect("the builder");
        while guard.0 != number {
            guard = self.passed.wait(guard).expect("the builder");
        }
        let mut writes = Writes::new();
        let mut from = 0;
        while from < units.len() {
            // Like pieces go together, but packed ones.
            let same = units[from..]
                .iter()
                .take_while(|piece| piece.joins(&units[from]))
                .count()
                .max(1);
            let at = range.start + from as u64 * self.unit;
            let end = (at + same as u64 * self.unit).min(range.end);
            let (at, stop) = (GuestOffset::new(at), GuestOffset::new(end));
            let builder = &mut guard.1;
            match &units[from] {
                Piece::Run(what) => builder.place_run(at..stop, *what, &mut writes),
                Piece::Plain => {
                    let plain = &data[as_len(at.get() - range.start)..as_len(end - range.start)];
                    builder.place(at, Stored::Plain(plain), &mut writes)
                }
                Piece::Packed(bytes) => builder.place(at, Stored::Packed(bytes), &mut writes),
            }
            .expect("a place");
            from += same;
        }
        let files = guard.1.files().to_vec();
        guard.0 += 1;
        self.passed.notify_all();
        drop(guard);
        writes.perform(&files).expect("written");
    }
}

enum Piece {
    Run(Run),
    Plain,
    Packed(Vec<u8>),
}

impl Piece {
    fn joins(&self, other: &Self) -> bool {
        match (self, other) {
            (Piece::Run(a), Piece::Run(b)) => a == b,
            (Piece::Plain, Piece::Plain) => true,
            _ => false,
        }
    }
}

/// Fills an image and writes data itself wherever the builder lets it.
fn splice(driver: &dyn Driver, spec: &CreateSpec, new_file: NewFile<'_>, disk: &SparseRandom) -> Image {
    let (mut builder, image) = start(driver, spec, new_file);
    let mut encoder = builder.encoder().expect("an encoder");
    let unit = builder.unit();
    let mut at = 0;
    while at < disk.size() {
        let end = (at + unit).min(disk.size());
        let range = GuestOffset::new(at)..GuestOffset::new(end);
        let mut data = vec![0; as_len(unit)];
        disk.read_at(at, &mut data[..as_len(end - at)]);
        let mut writes = Writes::new();
        let mut scratch = Vec::new();
        let kind = encoder.encode(&data, &mut scratch).expect("an encoded unit");
        data.truncate(as_len(end - at));
        if spec.backing.is_some() && disk.is_hole(at, unit) {
            builder
                .place_run(range, Run::Absent, &mut writes)
                .expect("a place");
        } else if kind == EncodedKind::Zero {
            builder.place_run(range, Run::Zero, &mut writes).expect("a place");
        } else if let Some(span) = builder.reserve(range.clone(), &mut writes).expect("a place") {
            assert_eq!(span.len, end - at);
            image[usize::from(span.file.0)]
                .write_at(span.at, &data)
                .expect("written");
        } else {
            let stored = match kind {
                EncodedKind::Packed { len } => Stored::Packed(&scratch[..len]),
                _ => Stored::Plain(&data),
            };
            builder.place(range.start, stored, &mut writes).expect("a place");
        }
        writes.perform(&image).expect("written");
        at = end;
    }
    builder
        .finish(Finish::new(Durability::None))
        .expect("a finished image");
    image
}

/// Opens an image for reading.
pub fn open(driver: &dyn Driver, image: &Image) -> Arc<dyn Layer> {
    let mut how = OpenSpec::default();
    // For images that are encrypted.
    how.secrets
        .set_passphrase(Secret::new(crate::oracle::PASSPHRASE.into()));
    let main: Arc<dyn Storage> = image[0].clone();
    let parsed = driver.parse(main.clone(), &how).expect("an image");
    let mut files = vec![(Role::Main, main)];
    let named = parsed
        .references()
        .iter()
        .filter(|reference| reference.role != Role::Backing);
    for (reference, file) in named.zip(&image[1..]) {
        files.push((reference.role, file.clone()));
    }
    assert_eq!(files.len(), image.len(), "the image names all its files");
    parsed.attach(files, &how).expect("an open image")
}

/// Demands that an image reads as `disk`.
pub fn reads_back(driver: &dyn Driver, spec: &CreateSpec, image: &Image, disk: &SparseRandom, unit: u64) {
    let layer = open(driver, image);
    assert_eq!(layer.virtual_size(), disk.size());
    let facts = layer.facts();
    match facts.parent {
        // Such a format has no names.
        Some(_) => assert!(facts.backing.is_none() && spec.backing.is_some()),
        None => assert_eq!(
            facts.backing.as_ref().map(|backing| &backing.name),
            spec.backing.as_ref().map(|backing| &backing.name)
        ),
    }
    let chain = Chain::new(vec![layer.clone()]);
    let mut at = 0;
    let mut found = vec![0; 1 << 20];
    while at < disk.size() {
        let len = as_len((disk.size() - at).min(found.len() as u64));
        chain
            .read_at(GuestOffset::new(at), &mut found[..len])
            .expect("guest bytes");
        if let Err(mismatch) = disk.verify(at, &found[..len]) {
            panic!("{spec:?}: {mismatch:?}");
        }
        at += len as u64;
    }
    if spec.backing.is_some() {
        for at in (0..disk.size()).step_by(as_len(unit)) {
            let extent = layer.map(GuestOffset::new(at), unit).expect("a state");
            let absent = extent.state == State::Absent;
            assert_eq!(absent, disk.is_hole(at, unit), "{spec:?}: {at} is {extent:?}");
        }
    }
}

fn unfinished(driver: &dyn Driver, spec: &CreateSpec, new_file: NewFile<'_>, disk: &SparseRandom) {
    let (mut builder, image) = start(driver, spec, new_file);
    let unit = builder.unit();
    let end = unit.min(disk.size());
    let data = vec![1; as_len(end)];
    if !data.is_empty() {
        let mut writes = Writes::new();
        builder
            .place(GuestOffset::ZERO, Stored::Plain(&data), &mut writes)
            .expect("a place");
        writes.perform(&image).expect("written");
    }
    drop(builder);
    let has_magic = driver.format() != diskmill_core::Format::Raw;
    if has_magic {
        let parsed = driver.parse(image[0].clone(), &OpenSpec::default());
        assert!(parsed.is_err(), "{spec:?}: opens before it is finished");
    }
}

fn empty(driver: &dyn Driver, spec: &CreateSpec, new_file: NewFile<'_>) {
    let (mut builder, image) = start(driver, spec, new_file);
    let all = GuestOffset::ZERO..GuestOffset::new(spec.virtual_size);
    builder.fill(all, Run::Absent).expect("a run");
    builder
        .finish(Finish::new(Durability::None))
        .expect("a finished image");
    let chain = Chain::new(vec![open(driver, &image)]);
    let mut found = vec![1; as_len(spec.virtual_size.min(1 << 20))];
    chain.read_at(GuestOffset::ZERO, &mut found).expect("guest bytes");
    assert!(
        found.iter().all(|byte| *byte == 0),
        "{spec:?}: a new disk is not empty"
    );
}

/// Panics unless both images have the same bytes.
pub fn assert_same(a: &Image, b: &Image, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (number, (a, b)) in a.iter().zip(b).enumerate() {
        let (a, b) = (bytes(&**a), bytes(&**b));
        if a == b {
            continue;
        }
        let at = a.iter().zip(&b).position(|(a, b)| a != b);
        panic!(
            "{what}: file {number} differs: {} and {} bytes, first at {at:?}",
            a.len(),
            b.len()
        );
    }
}

fn as_len(count: u64) -> usize {
    usize::try_from(count).expect("a length in memory")
}
