//! `diskmill demo`: the main job on a small disk, verified at every step.

mod disk;

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use diskmill::open::{self, OpenRequest};
use diskmill::ops::convert::{self, Input, NewImage, Output, Plan};
use diskmill::spec::ImageSpec;
use diskmill_core::{Compression, Durability, Error, ErrorKind, GuestOffset, Job, Secret, Secrets};
use sha2::{Digest, Sha256};

use crate::error::Failure;
use crate::progress::{Progress, Style, duration};
use crate::size::human;
use crate::ui::Ui;

/// Guest bytes hashed at a time.
const CHUNK: usize = 1 << 20;

/// What one step made.
struct Row {
    what: &'static str,
    path: PathBuf,
    took: Duration,
}

/// A conversion of the demonstration.
struct Step {
    what: &'static str,
    file: &'static str,
    format: &'static str,
    compress: bool,
}

const STEPS: [Step; 8] = [
    Step {
        what: "raw -> qcow2",
        file: "disk.qcow2",
        format: "qcow2",
        compress: false,
    },
    Step {
        what: "qcow2 -> compressed qcow2",
        file: "compressed.qcow2",
        format: "qcow2",
        compress: true,
    },
    Step {
        what: "compressed qcow2 -> vdi",
        file: "disk.vdi",
        format: "vdi",
        compress: false,
    },
    Step {
        what: "vdi -> vmdk",
        file: "disk.vmdk",
        format: "vmdk",
        compress: false,
    },
    Step {
        what: "vmdk -> compressed qcow",
        file: "disk.qcow",
        format: "qcow",
        compress: true,
    },
    Step {
        what: "compressed qcow -> cow",
        file: "disk.cow",
        format: "cow",
        compress: false,
    },
    Step {
        what: "cow -> encrypted luks",
        file: "disk.luks",
        format: "luks",
        compress: false,
    },
    Step {
        what: "encrypted luks -> raw",
        file: "back.raw",
        format: "raw",
        compress: false,
    },
];

/// Runs the demonstration in `dir`, where its files stay, or in a temporary directory.
pub fn run(ui: &Ui, dir: Option<&Path>) -> Result<(), Failure> {
    let progress = Progress::begin(ui, Style::None)?;
    let done = match dir {
        Some(dir) => fs::create_dir_all(dir)
            .map_err(|error| Error::from(error).op("create").path(dir))
            .and_then(|()| steps(ui, dir, progress.job())),
        None => tempfile::Builder::new()
            .prefix("diskmill-demo-")
            .tempdir()
            .map_err(|error| Error::from(error).op("create a temporary directory"))
            .and_then(|dir| steps(ui, dir.path(), progress.job())),
    };
    progress.signals().die_if_cancelled(&done);
    let rows = done?;
    ui.print(table(&rows))?;
    match dir {
        Some(dir) => ui.print(format!("The files are in {}.\n", ui.name(&dir.to_string_lossy()))),
        None => ui.print("All files have been removed; --dir DIR keeps them.\n"),
    }
}

/// Sizes are read here already, since a temporary directory goes with the caller's.
fn steps(ui: &Ui, dir: &Path, job: Job<'_>) -> diskmill_core::Result<Vec<(Row, [u64; 2])>> {
    let mut rows = Vec::new();
    let began = Instant::now();
    let original = disk::make().map_err(Error::from)?;
    let whole = Sha256::digest(&original.bytes);
    let first = dir.join("disk.raw");
    write_sparse(&first, &original.bytes).map_err(|error| Error::from(error).op("write").path(&first))?;
    rows.push(measured(Row {
        what: "make a disk with files",
        path: first.clone(),
        took: began.elapsed(),
    })?);
    let _ = ui.print(format!(
        "{} files on a FAT16 partition of a disk of {}, sha256 {}...\n\n",
        original.files.len(),
        human(original.bytes.len() as u64),
        hex(&whole[..8])
    ));
    let mut source = (first, "raw");
    for step in &STEPS {
        let path = dir.join(step.file);
        let began = Instant::now();
        convert::run(&plan(&source.0, source.1, &path, step)?, job)?;
        let took = began.elapsed();
        if hash(&path, step.format, job)? != whole.as_slice() {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "the image does not hold what was put in: this is a defect of diskmill, please report it",
            )
            .op("verify")
            .path(&path));
        }
        rows.push(measured(Row {
            what: step.what,
            path: path.clone(),
            took,
        })?);
        source = (path, step.format);
    }
    verify_files(&source.0, &original)?;
    Ok(rows)
}

/// The passphrase of the encrypted image.
const PASSPHRASE: &[u8] = b"diskmill";

fn secrets() -> Secrets {
    let mut secrets = Secrets::new();
    secrets.set_passphrase(Secret::new(PASSPHRASE.to_vec()));
    secrets
}

fn request(image: &Path, format: &str) -> OpenRequest {
    let mut request = OpenRequest::new(ImageSpec::from_path(image));
    request.format = Some(format.to_owned());
    request.secrets = secrets();
    request
}

fn plan(source: &Path, source_format: &str, target: &Path, step: &Step) -> diskmill_core::Result<Plan> {
    let request = request(source, source_format);
    let mut new = NewImage::new(ImageSpec::from_path(target), step.format);
    if step.format == "luks" {
        new.secrets = secrets();
        // It is no secret: nobody has to be kept from guessing it.
        new.options.set("iter-time", "10");
    }
    let mut plan = Plan::new(Input::Image(Box::new(request)), Output::New(new));
    plan.compress = step.compress.then(Compression::default);
    plan.durability = Durability::None;
    Ok(plan)
}

/// The hash of all guest bytes of an image.
fn hash(path: &Path, format: &str, job: Job<'_>) -> diskmill_core::Result<Vec<u8>> {
    let image = open::image(&request(path, format))?;
    let size = image.chain.virtual_size();
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut at = GuestOffset::ZERO;
    while at.get() < size {
        job.check()?;
        let len = usize::try_from(size - at.get()).unwrap_or(CHUNK).min(CHUNK);
        let now = &mut buffer[..len];
        image.chain.read_at(at, now)?;
        hasher.update(now);
        at = at.plus(len as u64)?;
    }
    Ok(hasher.finalize().to_vec())
}

/// Each file must be where it was, byte for byte.
fn verify_files(path: &Path, original: &disk::DemoDisk) -> diskmill_core::Result<()> {
    let failed = |error: std::io::Error| Error::from(error).op("read").path(path);
    let back = File::open(path).map_err(failed)?;
    for file in &original.files {
        let mut bytes = vec![0; file.place.len()];
        back.read_exact_at(&mut bytes, file.place.start as u64)
            .map_err(failed)?;
        if Sha256::digest(&bytes) != Sha256::digest(&original.bytes[file.place.clone()]) {
            let text = format!("the file {} on it has changed", file.name);
            return Err(Error::new(ErrorKind::Corrupt, text).op("verify").path(path));
        }
    }
    Ok(())
}

/// Writes a file with holes where there are only zeros.
fn write_sparse(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.set_len(bytes.len() as u64)?;
    for (index, chunk) in bytes.chunks(64 << 10).enumerate() {
        if chunk.iter().any(|byte| *byte != 0) {
            file.write_all_at(chunk, (index * (64 << 10)) as u64)?;
        }
    }
    file.flush()
}

/// The length of a file and the bytes it takes on the host.
fn measured(row: Row) -> diskmill_core::Result<(Row, [u64; 2])> {
    let data = fs::metadata(&row.path).map_err(|error| Error::from(error).op("look at").path(&row.path))?;
    let sizes = [data.len(), data.blocks().saturating_mul(512)];
    Ok((row, sizes))
}

fn table(rows: &[(Row, [u64; 2])]) -> String {
    let mut out = format!(
        "{:<28}{:<20}{:>11}{:>11}{:>9}  {}\n",
        "Step", "File", "Length", "On disk", "Time", "Verified"
    );
    for (index, (row, [len, allocated])) in rows.iter().enumerate() {
        let name = row.path.file_name().unwrap_or(OsStr::new("")).to_string_lossy();
        // A String takes whatever is written to it.
        let _ = writeln!(
            out,
            "{:<28}{name:<20}{:>11}{:>11}{:>9}  {}",
            row.what,
            human(*len),
            human(*allocated),
            duration(row.took),
            if index == 0 { "-" } else { "sha256 equal" }
        );
    }
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        // A String takes whatever is written to it.
        let _ = write!(out, "{byte:02x}");
        out
    })
}
