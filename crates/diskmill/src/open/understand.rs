//! One file opened and its header understood; nothing it names is opened.

use std::sync::Arc;

use diskmill_core::{
    Access, Driver, Error, ErrorKind, Format, HostOffset, OpenSpec, Parsed, Result, Sample, SecretError,
    Storage,
};
use diskmill_formats::ova::MemberName;
use diskmill_formats::{ForeignKind, registry};
use diskmill_storage::{CacheMode, File, FileOptions, LockPlan};

use super::{OpenError, OpenRequest};
use crate::package::{self, Package, PackageError};
use crate::spec::{FileSpec, ImageSpec, SpecError, driver_error};

/// An image whose header has been understood.
#[derive(Debug)]
pub(crate) struct Understood {
    /// The name it is shown by.
    pub(crate) shown: String,
    /// Its file.
    pub(crate) file: Arc<File>,
    /// The part of the file that it is, where it is not all of it: a disk in a package.
    pub(crate) part: Option<Arc<dyn Storage>>,
    /// The file with its header, where that is apart.
    pub(crate) header: Option<Arc<File>>,
    /// Its format.
    pub(crate) driver: &'static dyn Driver,
    /// Whether the caller asked for the file itself (`driver=file`): there is no format then.
    pub(crate) bare: bool,
    /// What its header says.
    pub(crate) parsed: Box<dyn Parsed>,
    /// How it is to be attached.
    pub(crate) how: OpenSpec,
    /// Whether its format was guessed.
    pub(crate) probed: bool,
    /// What else it looks like.
    pub(crate) looks_like: Option<&'static str>,
}

/// What a file is to the disk that is being opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The image the user asked for.
    Top(Access),
    /// An image below it.
    Backing,
    /// An image below it that is to be changed.
    Base,
}

impl Understood {
    /// Opens and understands `spec`. `format` comes before what `spec` says.
    pub(crate) fn open(
        spec: &ImageSpec,
        format: Option<&str>,
        place: Place,
        request: &OpenRequest,
        for_check: bool,
    ) -> Result<Self> {
        let named = format.or(spec.driver.as_deref());
        let bare = matches!(named, Some("file" | "host_device"));
        let driver = match named {
            None => None,
            Some(package::FORMAT) if request.packages => None,
            Some("file" | "host_device") => Some(by_name("raw")?),
            Some(name) => Some(by_name(name)?),
        };
        let access = match place {
            Place::Top(access) => access,
            Place::Backing => Access::Read,
            Place::Base => Access::Write,
        };
        let mut wanted = spec.file.clone();
        wanted.device |= named == Some("host_device");
        let file = match (&request.given, place) {
            (Some(file), Place::Top(Access::Read)) => Arc::clone(file),
            _ => Arc::new(open_file(&wanted, access, spec, request)?),
        };
        let probed = driver.is_none();
        let inner = match place {
            Place::Top(access) if request.packages && probed => Inner::find(&file, request, access)?,
            _ => None,
        };
        if let (None, Place::Top(_), Some(disk)) = (&inner, place, &request.disk) {
            let error = PackageError::NotAPackage(disk.clone());
            return Err(Error::new(ErrorKind::Usage, error)
                .op("open")
                .path(&spec.file.path));
        }
        if inner.is_none() && request.packages && named == Some(package::FORMAT) {
            let error = Error::new(ErrorKind::NotThisFormat, PackageError::NotOne);
            return Err(error.op("open").path(&spec.file.path));
        }
        let mut looks_like = None;
        let driver = match driver {
            Some(driver) => driver,
            None => {
                let found = match &inner {
                    Some(inner) => probe(inner.storage.as_ref(), Some(inner.name.as_str()))?,
                    None => probe(file.as_ref(), file.path().to_str())?,
                };
                if let Some(foreign) = found.foreign.filter(|foreign| foreign.kind == ForeignKind::Disk) {
                    let text = format!("it is {}, a format that is not supported yet", foreign.name);
                    return Err(Error::new(ErrorKind::Unsupported, text)
                        .op("open")
                        .path(&spec.file.path));
                }
                let foreign = found.foreign.map(|foreign| foreign.name);
                looks_like = foreign.or(found.also.map(|driver| driver.format().name()));
                match found.driver.format() {
                    format if is_historic(format) && !request.historic => by_name("raw")?,
                    _ => found.driver,
                }
            }
        };
        if access == Access::Read && spec.file.lock && !request.share {
            let hold = request.hold || place == Place::Backing || driver.format() != Format::Raw;
            if hold {
                file.relock(LockPlan::READ)?;
            }
        }
        let mut how = OpenSpec::default();
        how.limits = request.limits;
        how.options = spec.options.clone();
        how.unmap = spec.settings.unmap.unwrap_or(request.unmap);
        how.for_check = for_check;
        how.secrets = request.secrets.for_image(&*spec.shown);
        how.content_id = diskmill_storage::random_u32();
        if let Place::Top(_) = place {
            how.snapshot.clone_from(&request.snapshot);
            how.machine_state = request.machine_state;
            how.present_size = request.present_size;
        }
        let main: Arc<dyn Storage> = match &inner {
            Some(inner) => Arc::clone(&inner.storage),
            None => file.clone(),
        };
        let header = match &spec.header {
            Some(header) => Some(Arc::new(open_file(header, access, spec, request)?)),
            None => None,
        };
        how.header = header.clone().map(|header| header as Arc<dyn Storage>);
        fits(spec, driver.format())?;
        let parsed = driver.parse(main, &how).map_err(|error| {
            not_in_format(error, driver.format())
                .op("open")
                .path(&spec.file.path)
        })?;
        if request.needs_keys && parsed.facts().encrypted {
            demand_key(driver.format(), &how)?;
        }
        if let Some(inner) = &inner {
            inner
                .needs_nothing_else(parsed.as_ref())
                .map_err(|error| error.op("open").path(&spec.file.path))?;
        }
        Ok(Self {
            shown: match &inner {
                Some(inner) => format!("{}:{}", spec.shown, inner.name),
                // Which of the two formats that have keys of this name it is shows only now.
                None if spec.driver.is_none() && driver.format() == Format::Qcow => {
                    let said = r#""driver": "qcow2""#;
                    spec.shown.replacen(said, r#""driver": "qcow""#, 1)
                }
                None => spec.shown.clone(),
            },
            part: inner.map(|inner| inner.storage),
            file,
            header,
            driver,
            bare,
            parsed,
            how,
            probed,
            looks_like,
        })
    }
}

/// Fails if `spec` says something of an encrypted image that images of `format`, which may have been found by probing,
/// do not have.
fn fits(spec: &ImageSpec, format: Format) -> Result<()> {
    let mut names = spec.options.iter().map(|(name, _)| name);
    let misfit = names.find(|name| match *name {
        "key-secret" => format != Format::Luks,
        name => name.starts_with("encrypt.") && !matches!(format, Format::Qcow | Format::Qcow2),
    });
    let header = (spec.header.is_some() && format != Format::Luks).then_some("header.filename");
    match header.or(misfit) {
        None => Ok(()),
        Some(option) => Err(SpecError::UnknownOption {
            driver: format.name().to_owned(),
            option: option.to_owned(),
        }
        .into()),
    }
}

/// Fails if nothing says what the key of an encrypted image is. Whether it is the right one is not known yet.
fn demand_key(format: Format, how: &OpenSpec) -> Result<()> {
    let option = match format {
        Format::Luks => "key-secret",
        _ => "encrypt.key-secret",
    };
    match how.options.text(option) {
        Some(id) => how.secrets.named(id).map(drop),
        // Asked for now: later, something else would be on the terminal.
        None => match how.secrets.find(None)? {
            Some(_) => Ok(()),
            None => Err(SecretError::Missing(option).into()),
        },
    }
}

/// A disk in a package.
struct Inner {
    disk: String,
    name: MemberName,
    storage: Arc<dyn Storage>,
}

impl Inner {
    /// The disk of the package that `file` is, or `None` if it is none.
    fn find(file: &Arc<File>, request: &OpenRequest, access: Access) -> Result<Option<Self>> {
        let Some(package) = Package::open(Arc::clone(file))? else {
            return Ok(None);
        };
        let find = || {
            if access == Access::Write {
                return Err(Error::new(ErrorKind::Unsupported, PackageError::ReadOnly));
            }
            let disk = package.choose(request.disk.as_deref())?;
            let (storage, name) = package.storage_once(disk, &request.unpacked)?;
            Ok(Some(Self {
                disk: disk.id.clone(),
                name,
                storage,
            }))
        };
        find().map_err(|error: Error| error.op("open").path(file.path()))
    }

    /// Refuses an image that names files: nothing in a package is a reason to open anything outside of it.
    fn needs_nothing_else(&self, parsed: &dyn Parsed) -> Result<()> {
        let named = parsed.references().first().map(|reference| &reference.name);
        match named.or(parsed.facts().backing.as_ref()) {
            None => Ok(()),
            Some(name) => {
                let error = PackageError::Refers {
                    disk: self.disk.clone(),
                    name: name.name.clone(),
                };
                Err(Error::new(ErrorKind::Denied, error))
            }
        }
    }
}

/// Opens a file as the image `spec` wants it: with its cache mode and the locks that do not depend on the format.
pub(crate) fn open_file(
    file: &FileSpec,
    access: Access,
    spec: &ImageSpec,
    request: &OpenRequest,
) -> Result<File> {
    let share = spec.settings.share.unwrap_or(request.share);
    let lock = match access {
        _ if !file.lock => LockPlan::NONE,
        Access::Write if share => {
            let text = "force-share=on can only be used with read-only images";
            return Err(Error::new(ErrorKind::Usage, text).op("open").path(&file.path));
        }
        Access::Write => LockPlan::WRITE,
        Access::Read => LockPlan::SHARE,
    };
    let mut options = match access {
        Access::Write => FileOptions::write(lock),
        Access::Read => FileOptions::read(lock),
    };
    options = options.cache(cache_mode(request.cache, spec));
    if file.judged {
        options = options.no_links();
    }
    let opened = File::open(&file.path, &options)?;
    if file.device && !opened.is_block_device() {
        return Err(Error::new(ErrorKind::Usage, OpenError::NotADevice)
            .op("open")
            .path(&file.path));
    }
    Ok(opened)
}

fn cache_mode(asked: CacheMode, spec: &ImageSpec) -> CacheMode {
    let settings = &spec.settings;
    if settings.no_flush == Some(true) {
        return CacheMode::Unsafe;
    }
    match (settings.direct, asked) {
        (Some(true), CacheMode::Writeback | CacheMode::Unsafe) => CacheMode::None,
        (Some(true), CacheMode::Writethrough) => CacheMode::Directsync,
        (Some(false), CacheMode::None) => CacheMode::Writeback,
        (Some(false), CacheMode::Directsync) => CacheMode::Writethrough,
        (_, asked) => asked,
    }
}

/// Whether `qemu-img` had a format once and has it no longer.
pub(super) fn is_historic(format: Format) -> bool {
    format == Format::Cow
}

fn by_name(name: &str) -> Result<&'static dyn Driver> {
    registry::by_name(name).ok_or_else(|| driver_error(name).into())
}

fn probe(file: &dyn Storage, name: Option<&str>) -> Result<diskmill_formats::Probed> {
    let len = file.len()?;
    let mut head = vec![0; Sample::HEAD.min(usize::try_from(len).unwrap_or(usize::MAX))];
    file.read_at(HostOffset::ZERO, &mut head)?;
    let mut tail = [0; Sample::TAIL];
    let tail_len = tail.len().min(head.len());
    let tail = tail.get_mut(..tail_len).unwrap_or_default();
    file.read_at(HostOffset::new(len.saturating_sub(tail_len as u64)), tail)?;
    Ok(diskmill_formats::probe(&Sample {
        head: &head,
        tail,
        len,
        name,
    }))
}

/// The bytes are another format's: says which one was wanted.
fn not_in_format(error: Error, format: Format) -> Error {
    match error.kind() {
        ErrorKind::NotThisFormat => {
            Error::new(ErrorKind::NotThisFormat, OpenError::NotInFormat(format)).op("open")
        }
        _ => error.op("open"),
    }
}
