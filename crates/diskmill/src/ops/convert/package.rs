//! Disks into an OVA: compressed in parallel straight into the archive, whose descriptor and manifest are filled in
//! last.
//!
//! ```text
//! header, NAME.ovf      as long as it can become; blanks at its end make up for shorter numbers
//! header, NAME.mf       a digest has a fixed length
//! header, NAME-disk1.vmdk   from here on in one pass
//! ...
//! two empty blocks
//! ```

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskmill_core::{
    Compression, CreateSpec, Durability, Error, ErrorKind, Format, HostOffset, Job, Observer, Options,
    OutputSpec, Result, Role, Storage, StorageMut,
};
use diskmill_formats::ova::manifest::{Entry, Manifest};
use diskmill_formats::ova::{Algorithm, Hasher, Machine, MemberName, PackedDisk, Profile, descriptor, pack};
use diskmill_storage::{CacheMode, File, Window};

use super::input::{self, Opened};
use super::new::fill_from;
use super::{ConvertError, Input, Output, Plan};
use crate::open::OpenRequest;
use crate::ops::create;
use crate::package::digest;
use crate::policy::References;
use crate::target::Target;

/// A package to be made.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PackagePlan {
    /// The disks, in the order of their numbers: at least one.
    pub disks: Vec<OpenRequest>,
    /// Where to put it; `None` is standard output.
    pub target: Option<PathBuf>,
    /// What its files are called, without extensions.
    pub stem: String,
    /// The machine it describes.
    pub machine: Machine,
    /// Who it is for.
    pub profile: Profile,
    /// When its files were changed last: seconds since 1970.
    pub time: u64,
    /// How hard to compress.
    pub compression: Compression,
    /// Threads to use at most; `None` means one for each core.
    pub workers: Option<NonZeroUsize>,
    /// How writes pass the host's cache.
    pub cache: CacheMode,
    /// What must hold when it is done.
    pub durability: Durability,
}

impl PackagePlan {
    /// One disk in a package at `target`, described as `machine`.
    pub fn new(
        disk: OpenRequest,
        target: Option<PathBuf>,
        stem: impl Into<String>,
        machine: Machine,
    ) -> Self {
        Self {
            disks: vec![disk],
            target,
            stem: stem.into(),
            machine,
            profile: Profile::default(),
            time: 0,
            compression: Compression::default(),
            workers: None,
            cache: CacheMode::Writeback,
            durability: Durability::Synced,
        }
    }
}

/// What making a package did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Packed {
    /// The disks of the package.
    pub disks: Vec<PackedDisk>,
    /// Bytes of the archive.
    pub len: u64,
    /// Why the target was written in place instead of being replaced when complete, if that is not what it is for.
    pub in_place: Option<super::InPlace>,
}

/// Makes a package. The target is absent, or as it was, if this fails.
pub fn run_package(plan: &PackagePlan, job: Job<'_>) -> Result<Packed> {
    let path = plan.target.as_deref().unwrap_or(Path::new("standard output"));
    run_at(plan, job).map_err(|error| error.op("create").path(path))
}

fn run_at(plan: &PackagePlan, job: Job<'_>) -> Result<Packed> {
    job.check()?;
    let mut sources = Vec::with_capacity(plan.disks.len());
    for request in &plan.disks {
        match input::open(&[Input::Image(Box::new(request.clone()))], job)? {
            Opened::Disks(source) => sources.push(source),
            Opened::Stream(_) => return Err(ConvertError::StdinNotAlone.usage()),
        }
    }
    if sources.is_empty() {
        return Err(ConvertError::NoSource.usage());
    }
    let names = Names::of(plan)?;
    let mut disks = Vec::with_capacity(sources.len());
    for (file, source) in names.disks.iter().zip(&sources) {
        disks.push(PackedDisk::new(
            file.clone(),
            create::whole_sectors(source.size())?,
        ));
    }
    // Refuses what cannot be described before anything is compressed.
    let layout = Layout::plan(plan, &names, &disks)?;
    let out = Out::start(plan)?;
    let total = sources.iter().map(super::source::Source::size).sum();
    job.observer.total(total);
    let inner = Relay(job.observer);
    let job = Job {
        observer: &inner,
        cancel: job.cancel,
    };
    let mut at = layout.first;
    let mut starts = Vec::with_capacity(disks.len());
    for (disk, source) in disks.iter_mut().zip(&sources) {
        let start = at.saturating_add(pack::BLOCK);
        out.storage.set_len(start)?;
        let window = Arc::new(Window::new(
            Arc::clone(&out.storage),
            HostOffset::new(start),
            None,
        )?);
        disk.populated = compress(
            plan,
            disk,
            Arc::clone(&window) as Arc<dyn StorageMut>,
            source,
            job,
        )?;
        disk.len = window.len()?;
        starts.push((at, window));
        at = start
            .saturating_add(disk.len)
            .checked_next_multiple_of(pack::BLOCK)
            .ok_or_else(|| Error::bare(ErrorKind::NoSpace))?;
    }
    let mut manifest = Manifest::default();
    let text = layout.padded(descriptor(&plan.machine, plan.profile, &disks)?);
    let algorithm = plan.profile.digest();
    let mut hasher = Hasher::new(algorithm);
    hasher.update(text.as_bytes());
    let mut list = |name: &MemberName, digest: String| {
        manifest.push(Entry {
            name: name.clone(),
            algorithm,
            digest,
        });
    };
    list(&names.descriptor, hasher.finish());
    for (disk, (start, window)) in disks.iter().zip(&starts) {
        list(&disk.file, digest(window.as_ref(), algorithm, job)?);
        out.put(*start, &pack::header(&disk.file, disk.len, plan.time)?)?;
    }
    let manifest = manifest.to_string();
    out.member(0, &names.descriptor, text.as_bytes(), plan.time)?;
    out.member(layout.manifest, &names.manifest, manifest.as_bytes(), plan.time)?;
    let len = at.saturating_add(pack::end(at));
    out.storage.set_len(len)?;
    let in_place = out.finish(plan, len, job)?;
    Ok(Packed { disks, len, in_place })
}

/// Compresses one disk to where it belongs, and tells how many bytes of it hold data.
fn compress(
    plan: &PackagePlan,
    disk: &PackedDisk,
    file: Arc<dyn StorageMut>,
    source: &super::source::Source,
    job: Job<'_>,
) -> Result<u64> {
    let driver = create::creatable(Format::Vmdk.name())?;
    let mut spec = CreateSpec::new(disk.capacity);
    let mut options = Options::new();
    options.set("subformat", "streamOptimized");
    spec.options = options;
    spec.compression = Some(plan.compression);
    create::name_it(&mut spec, Path::new(disk.file.as_str()));
    spec.content_id = Some(content_id(plan, disk));
    driver.outputs(&spec)?;
    let builder = driver.build(&spec, vec![(Role::Main, file)])?;
    let mut how = Plan::new(Input::Stdin, Output::Stdout);
    how.compress = Some(plan.compression);
    how.workers = plan.workers;
    // What is durable is the archive as a whole.
    how.durability = Durability::None;
    let stored = fill_from(&how, builder, source, job)?.stored;
    // The last unit of a disk may be cut short.
    Ok(stored.min(disk.capacity))
}

/// What tells this disk from others: not random, so that the same request gives the same bytes.
fn content_id(plan: &PackagePlan, disk: &PackedDisk) -> u32 {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    hasher.update(format!("{}\n{}\n{}\n", disk.file, disk.capacity, plan.time).as_bytes());
    let digest = hasher.finish();
    // The two highest mean that there is none, and that there is no parent.
    let id = digest
        .get(..8)
        .and_then(|digits| u32::from_str_radix(digits, 16).ok());
    id.unwrap_or_default().min(0xffff_fffd)
}

/// What the members are called.
struct Names {
    descriptor: MemberName,
    manifest: MemberName,
    disks: Vec<MemberName>,
}

impl Names {
    fn of(plan: &PackagePlan) -> Result<Self> {
        let name = |text: String| MemberName::new(&text).map_err(|error| Error::new(ErrorKind::Usage, error));
        let disks = (1..=plan.disks.len()).map(|number| name(format!("{}-disk{number}.vmdk", plan.stem)));
        Ok(Self {
            descriptor: name(format!("{}.ovf", plan.stem))?,
            manifest: name(format!("{}.mf", plan.stem))?,
            disks: disks.collect::<Result<_>>()?,
        })
    }
}

/// Where the members are that come before the disks.
struct Layout {
    descriptor_len: usize,
    manifest: u64,
    first: u64,
}

impl Layout {
    fn plan(plan: &PackagePlan, names: &Names, disks: &[PackedDisk]) -> Result<Self> {
        let longest: Vec<_> = disks
            .iter()
            .cloned()
            .map(|mut disk| {
                (disk.len, disk.populated) = (u64::MAX, u64::MAX);
                disk
            })
            .collect();
        let descriptor_len = descriptor(&plan.machine, plan.profile, &longest)?.len();
        let algorithm = plan.profile.digest();
        let mut manifest = Manifest::default();
        for name in std::iter::once(&names.descriptor).chain(&names.disks) {
            manifest.push(Entry {
                name: name.clone(),
                algorithm,
                digest: Hasher::new(algorithm).finish(),
            });
        }
        let behind = |at: u64, len: usize| at + pack::BLOCK + (len as u64).next_multiple_of(pack::BLOCK);
        let manifest_at = behind(0, descriptor_len);
        Ok(Self {
            descriptor_len,
            manifest: manifest_at,
            first: behind(manifest_at, manifest.to_string().len()),
        })
    }

    /// The descriptor with blanks at its end, where XML allows them.
    fn padded(&self, mut text: String) -> String {
        let missing = self.descriptor_len.saturating_sub(text.len());
        text.extend(std::iter::repeat_n('\n', missing));
        text
    }
}

/// The archive being written.
struct Out {
    storage: Arc<dyn StorageMut>,
    target: Option<Target>,
}

impl Out {
    fn start(plan: &PackagePlan) -> Result<Self> {
        let Some(path) = &plan.target else {
            // The sizes come first in the archive and are known last.
            let spool = File::temporary("/var/tmp").or_else(|_| File::temporary("."))?;
            return Ok(Self {
                storage: Arc::new(spool),
                target: None,
            });
        };
        let target = Target::create(path, &[OutputSpec::main()], plan.cache, &References::Any)?;
        let storage = target.files().into_iter().next().map(|(_, file)| file);
        let storage = storage.ok_or_else(|| Error::bare(ErrorKind::Usage))?;
        if storage.hints().append_only {
            return Err(Error::new(
                ErrorKind::Usage,
                "a package is not written from front to back",
            ));
        }
        Ok(Self {
            storage,
            target: Some(target),
        })
    }

    fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.storage.write_at(HostOffset::new(at), bytes)
    }

    fn member(&self, at: u64, name: &MemberName, bytes: &[u8], time: u64) -> Result<()> {
        self.put(at, &pack::header(name, bytes.len() as u64, time)?)?;
        self.put(at + pack::BLOCK, bytes)
    }

    fn finish(self, plan: &PackagePlan, len: u64, job: Job<'_>) -> Result<Option<super::InPlace>> {
        match self.target {
            Some(target) => {
                let in_place = target.in_place();
                target.commit(plan.durability)?;
                Ok(in_place)
            }
            None => {
                let target = Target::stdout()?;
                let out = target.files().into_iter().next().map(|(_, file)| file);
                let out = out.ok_or_else(|| Error::bare(ErrorKind::Usage))?;
                let mut buf = vec![0; 1 << 20];
                let mut at = 0u64;
                while at < len {
                    job.check()?;
                    let have = usize::try_from(len - at).unwrap_or(usize::MAX).min(buf.len());
                    let now = buf.get_mut(..have).unwrap_or_default();
                    self.storage.read_at(HostOffset::new(at), now)?;
                    out.write_at(HostOffset::new(at), now)?;
                    at += have as u64;
                }
                target.commit(Durability::None)?;
                Ok(None)
            }
        }
    }
}

/// Passes on what is done, but not what there is: that has been told for all disks at once.
struct Relay<'a>(&'a dyn Observer);

impl Observer for Relay<'_> {
    fn total(&self, _: u64) {}

    fn advance(&self, bytes: u64) {
        self.0.advance(bytes);
    }

    fn warn(&self, text: &str) {
        self.0.warn(text);
    }
}
