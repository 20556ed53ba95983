//! Opening images the short way: no policy, no locks, names relative to the image's directory.
#![allow(dead_code, reason = "not every test binary uses all of it")]

pub mod disk;
pub mod victim;

use std::path::Path;
use std::sync::Arc;

use diskmill_core::{
    Chain, CheckReport, Error, Files, FilesMut, GuestOffset, Job, Layer, OpenSpec, Repair, Result, Role,
    Sample, State, Storage, StorageMut,
};
use diskmill_formats::registry;
use diskmill_storage::{File, FileOptions, LockPlan, Memory};

/// The file at `path`, for reading.
pub fn file(path: impl AsRef<Path>) -> Arc<dyn Storage> {
    let path = path.as_ref();
    let options = FileOptions::read(LockPlan::default());
    match File::open(path, &options) {
        Ok(file) => Arc::new(file),
        Err(error) => panic!("{}: {error:?}", path.display()),
    }
}

/// The image at `path` alone.
pub fn layer(path: impl AsRef<Path>, format: &str, how: &OpenSpec) -> Result<Arc<dyn Layer>> {
    let (parsed, files) = parse(path.as_ref(), format, how)?;
    parsed.attach(files, how)
}

fn parse(path: &Path, format: &str, how: &OpenSpec) -> Result<(Box<dyn diskmill_core::Parsed>, Files)> {
    let driver = registry::by_name(format).unwrap_or_else(|| panic!("no driver of {format}"));
    let main = file(path);
    let parsed = driver.parse(Arc::clone(&main), how)?;
    let mut files: Files = vec![(Role::Main, main)];
    for reference in parsed.references() {
        if reference.role != Role::Backing {
            let named = path.parent().unwrap().join(&reference.name.name);
            files.push((reference.role, file(named)));
        }
    }
    Ok((parsed, files))
}

/// The image at `path` with all it is backed by.
pub fn chain(path: impl AsRef<Path>, format: &str) -> Result<Chain> {
    let mut layers = Vec::new();
    let mut next = Some((path.as_ref().to_owned(), format.to_owned()));
    while let Some((path, format)) = next {
        let layer = layer(&path, &format, &OpenSpec::default())?;
        next = layer.facts().backing.as_ref().map(|backing| {
            let format = backing.format.clone().unwrap_or_else(|| "raw".to_owned());
            (path.parent().unwrap().join(&backing.name), format)
        });
        layers.push(layer);
    }
    Ok(Chain::new(layers))
}

/// All guest bytes, read as a converter does: by chunks, and by what the map says.
pub fn read_all(chain: &Chain) -> Vec<u8> {
    let size = chain.virtual_size();
    let mut bytes = vec![0xee; size as usize];
    let mut at = 0;
    while at < size {
        let run = chain.map(GuestOffset::new(at), (3 << 20) - 512).unwrap();
        assert!(run.len > 0 && at + run.len <= size, "{run:?} at {at}");
        let part = &mut bytes[at as usize..(at + run.len) as usize];
        match run.state {
            State::Zero { .. } | State::Absent => part.fill(0),
            _ => chain.layers()[run.depth]
                .read_at(GuestOffset::new(at), part)
                .unwrap(),
        }
        at += run.len;
    }
    bytes
}

/// What our check says.
pub fn check(path: impl AsRef<Path>) -> Result<CheckReport> {
    let mut how = OpenSpec::default();
    how.for_check = true;
    let (parsed, files) = parse(path.as_ref(), "qcow2", &how)?;
    parsed.check(files, &how, Job::silent())
}

/// What our repair says.
pub fn repair(path: impl AsRef<Path>, what: Repair) -> Result<CheckReport> {
    repair_with(path, what, |file| file)
}

/// As [`repair`], with something put around the main file.
pub fn repair_with(
    path: impl AsRef<Path>,
    what: Repair,
    around: impl FnOnce(Arc<dyn StorageMut>) -> Arc<dyn StorageMut>,
) -> Result<CheckReport> {
    let path = path.as_ref();
    let mut how = OpenSpec::default();
    how.for_check = true;
    let (parsed, files) = parse(path, "qcow2", &how)?;
    let main = File::open(path, &FileOptions::write(LockPlan::default()))?;
    let mut files_mut: FilesMut = vec![(Role::Main, around(Arc::new(main)))];
    for (role, _) in files.iter().skip(1) {
        // A repair does not touch data.
        files_mut.push((*role, Arc::new(Memory::new())));
    }
    parsed.repair(files_mut, &how, what, Job::silent())
}

/// Demands that our check counts what `qemu-img check` counts.
pub fn assert_same_check(path: impl AsRef<Path>) {
    let path = path.as_ref();
    let (theirs, _) = diskmill_testkit::oracle::check(path, "qcow2");
    let ours = check(path).unwrap();
    let number = |name: &str| theirs.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
    for (name, count) in [
        ("corruptions", ours.corruptions),
        ("leaks", ours.leaks),
        ("check-errors", ours.check_errors),
        ("total-clusters", ours.total_units),
        ("allocated-clusters", ours.allocated_units),
        ("fragmented-clusters", ours.fragmented_units),
        ("compressed-clusters", ours.compressed_units),
        ("image-end-offset", ours.image_end_offset.unwrap().get()),
    ] {
        assert_eq!(
            count,
            number(name),
            "{name} of {}\n{theirs:#}\n{ours:#?}",
            path.display()
        );
    }
}

/// The text of an error with all its sources.
pub fn text(error: &Error) -> String {
    format!("{error:?}")
}

/// What a probe may see of a file.
pub fn sample(bytes: &[u8]) -> Sample<'_> {
    Sample {
        head: &bytes[..bytes.len().min(Sample::HEAD)],
        tail: &bytes[bytes.len().saturating_sub(Sample::TAIL)..],
        len: bytes.len() as u64,
        name: None,
    }
}
