//! Making a new, empty image.

use std::path::Path;
use std::sync::Arc;

use diskmill_core::{
    BackingName, CreateSpec, Driver, Durability, Error, ErrorKind, Facts, Finish, Format, GuestOffset, Job,
    Limits, OptionError, OptionKind, Options, Result, Run, SECTOR, Secrets,
};
use diskmill_formats::registry;
use diskmill_storage::{CacheMode, random_u32};

use crate::open::{self, Around, Image, OpenRequest};
use crate::policy::References;
use crate::spec::ImageSpec;
use crate::target::Target;

/// A new, empty image that is wanted.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CreateRequest {
    /// Where to put it.
    pub target: ImageSpec,
    /// Its format by name.
    pub format: String,
    /// The options of the format (`-o`), in the order given. `size`, `backing_file` and `backing_fmt` may be among
    /// them; the fields below come first.
    pub options: Options,
    /// The size of the disk in bytes, or that of the backing image.
    pub size: Option<u64>,
    /// The name of its backing image, as it is to be written into the image.
    pub backing: Option<String>,
    /// The format of its backing image.
    pub backing_format: Option<String>,
    /// Do not open the backing image (`-u`).
    pub unchecked: bool,
    /// Which files the backing image may name.
    pub policy: References,
    /// Caps on what the backing image may ask for.
    pub limits: Limits,
    /// The secrets its options name, and the passphrase it is to have if they name none.
    pub secrets: Secrets,
    /// What must hold when it is done.
    pub durability: Durability,
    /// As in [`OpenRequest::historic`], for the backing image.
    pub historic: bool,
    /// What is put around each file that is made.
    pub around: Option<Arc<dyn Around>>,
}

impl CreateRequest {
    /// An image of `format` at `target`, with nothing said about it.
    pub fn new(target: ImageSpec, format: impl Into<String>) -> Self {
        Self {
            target,
            format: format.into(),
            options: Options::new(),
            size: None,
            backing: None,
            backing_format: None,
            unchecked: false,
            policy: References::Any,
            limits: Limits::default(),
            secrets: Secrets::new(),
            durability: Durability::Synced,
            historic: false,
            around: None,
        }
    }
}

/// Why an image cannot be made. The source of an [`Error`] from [`plan`], [`Creation::run`] and
/// [`convert`](super::convert).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// No format has this name.
    #[error("unknown file format '{0}'")]
    UnknownFormat(String),
    /// The format cannot be made.
    #[error("format '{0}' cannot be created")]
    NotCreatable(String),
    /// The format has no backing images.
    #[error("format '{0}' has no backing images")]
    NoBacking(String),
    /// A backing image whose name is empty.
    #[error("the name of the backing file is empty")]
    BackingEmpty,
    /// A backing image without its format: guessing it at every opening would let a guest choose.
    #[error("backing file given without its format")]
    BackingFormatMissing {
        /// The format it seems to have, if it was opened.
        detected: Option<String>,
    },
    /// A format of a backing image that is not given.
    #[error("backing format given without a backing file")]
    BackingFormatAlone,
    /// The backing image did not open.
    #[error("backing image not opened")]
    Backing(#[source] Error),
    /// An image cannot be its own backing image.
    #[error("the backing file is the image itself")]
    BackedByItself,
    /// Neither a size nor a backing image that has one.
    #[error("a size is needed")]
    SizeMissing,
    /// The size is given as an option and by itself.
    #[error("the size is given twice")]
    SizeTwice,
    /// No file can be so large.
    #[error("the image size of {0} bytes is too large")]
    SizeTooLarge(u64),
}

impl CreateError {
    pub(crate) fn usage(self) -> Error {
        Error::new(ErrorKind::Usage, self)
    }
}

/// An image that can be made: everything has been checked that can be before its driver looks at it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Creation {
    /// The format's name.
    pub format: String,
    /// The size of the disk in bytes, as given: not yet rounded up to a sector.
    pub virtual_size: u64,
    /// What it will be: option names and values in the order of `qemu-img create`'s `Formatting` line, without the
    /// format.
    pub shown: Vec<(String, String)>,
    driver: &'static dyn Driver,
    target: ImageSpec,
    options: Options,
    backing: Option<String>,
    backing_format: Option<String>,
    backing_facts: Option<Box<Facts>>,
    durability: Durability,
    around: Option<Arc<dyn Around>>,
    policy: References,
    secrets: Secrets,
}

/// Checks a request and opens the backing image. Touches nothing.
pub fn plan(request: &CreateRequest) -> Result<Creation> {
    check(request).map_err(|error| error.path(request.target.path()))
}

fn check(request: &CreateRequest) -> Result<Creation> {
    let driver = creatable(&request.format)?;
    let mut options = request.options.clone();
    check_options(driver, &options)?;
    let size_option = options.size("size")?;
    options.take("size");
    if size_option.is_some() && request.size.is_some() {
        return Err(CreateError::SizeTwice.usage());
    }
    let (backing, backing_format) = take_backing(
        &mut options,
        request.backing.as_deref(),
        request.backing_format.as_deref(),
    );
    let mut size = request.size.or(size_option);
    let mut backing_facts = None;
    if let Some(name) = &backing {
        check_backing(driver, &request.target, name)?;
        // An overlay that tells its backing image by what is in it cannot do without.
        let detected = if request.unchecked && driver.format() != Format::Vmdk {
            None
        } else {
            let like = OpenRequest {
                policy: request.policy.clone(),
                limits: request.limits,
                secrets: request.secrets.only_named(),
                // Nothing is read but the size, so a running machine is no obstacle.
                share: true,
                historic: request.historic || driver.format() == Format::Cow,
                ..OpenRequest::new(request.target.clone())
            };
            let image = open_backing(&request.target, name, backing_format.as_deref(), &like)?;
            size = size.or_else(|| Some(image.chain.virtual_size()));
            let node = image.nodes.first();
            backing_facts = node.map(|node| Box::new(node.facts.clone()));
            node.map(|node| node.facts.format.name().to_owned())
        };
        if backing_format.is_none() {
            return Err(CreateError::BackingFormatMissing { detected }.usage());
        }
    }
    let virtual_size = size.ok_or_else(|| CreateError::SizeMissing.usage())?;
    let mut creation = Creation {
        format: request.format.clone(),
        virtual_size,
        shown: Vec::new(),
        driver,
        target: request.target.clone(),
        options,
        backing,
        backing_format,
        backing_facts,
        durability: request.durability,
        around: request.around.clone(),
        policy: request.policy.clone(),
        secrets: request.secrets.clone(),
    };
    creation.shown = creation.show()?;
    Ok(creation)
}

impl Creation {
    /// Makes the image. An old file at the target stays as it was if this fails.
    pub fn run(self, job: Job<'_>) -> Result<()> {
        let path = self.target.path().to_owned();
        self.make(job).map_err(|error| error.op("create").path(path))
    }

    fn make(self, job: Job<'_>) -> Result<()> {
        job.check()?;
        // Where it is not kept it only says what a name means.
        let keeps_format = self.driver.format() != Format::Qcow;
        if self.backing.is_none() && self.backing_format.is_some() && keeps_format {
            return Err(CreateError::BackingFormatAlone.usage());
        }
        let mut spec = CreateSpec::new(whole_sectors(self.virtual_size)?);
        spec.options = self.options;
        spec.secrets = self.secrets.for_image(&*self.target.shown);
        spec.backing = self.backing.map(|name| BackingName {
            name,
            format: self.backing_format,
        });
        spec.backing_facts = self.backing_facts;
        name_it(&mut spec, self.target.path());
        let outputs = self.driver.outputs(&spec)?;
        let path = self.target.path();
        let mut target = Target::create(path, &outputs, CacheMode::Writeback, &self.policy)?;
        target.surround(path, self.around.as_ref());
        let files = target.files();
        // A raw image is the device itself: what is on it stays, as with `qemu-img`, and so it does where to make it
        // zeros would be to write all of it.
        let device =
            self.driver.format() == Format::Raw && files.iter().any(|(_, file)| file.hints().fixed_len);
        let mut builder = self.driver.build(&spec, files)?;
        let keep = device || builder.stores_zeros();
        if !keep {
            let what = if spec.backing.is_some() {
                Run::Absent
            } else {
                Run::Zero
            };
            builder.fill(GuestOffset::ZERO..GuestOffset::new(spec.virtual_size), what)?;
        }
        job.check()?;
        builder.finish(Finish::new(self.durability))?;
        target.commit(self.durability)
    }

    fn show(&self) -> Result<Vec<(String, String)>> {
        let mut shown = Vec::new();
        for option in self.driver.options() {
            let value = match option.name {
                "size" => Some(self.virtual_size.to_string()),
                "backing_file" => self.backing.clone(),
                "backing_fmt" => self.backing_format.clone(),
                name => match option.kind {
                    OptionKind::Size => self.options.size(name)?.map(|bytes| bytes.to_string()),
                    OptionKind::Number => self.options.number(name)?.map(|number| number.to_string()),
                    OptionKind::Bool => self
                        .options
                        .bool(name)?
                        .map(|on| (if on { "on" } else { "off" }).to_owned()),
                    _ => self.options.text(name).map(str::to_owned),
                }
                .or_else(|| option.default.map(str::to_owned)),
            };
            if let Some(value) = value {
                shown.push((option.name.to_owned(), value));
            }
        }
        Ok(shown)
    }
}

/// Plans and makes an image.
pub fn run(request: &CreateRequest, job: Job<'_>) -> Result<()> {
    plan(request)?.run(job)
}

/// Tells a driver what the image in the file `path` is to be called, by people and by its overlays.
pub(crate) fn name_it(spec: &mut CreateSpec, path: &Path) {
    spec.name = path.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    spec.content_id = random_u32();
}

/// The driver that makes images of the format called `name`.
pub(crate) fn creatable(name: &str) -> Result<&'static dyn Driver> {
    match registry::by_name(name) {
        Some(driver) if !driver.options().is_empty() => Ok(driver),
        Some(_) => Err(Error::new(
            ErrorKind::Unsupported,
            CreateError::NotCreatable(name.to_owned()),
        )),
        None => Err(CreateError::UnknownFormat(name.to_owned()).usage()),
    }
}

/// Fails on the first option the format does not know, or whose value is not of its kind.
pub(crate) fn check_options(driver: &dyn Driver, options: &Options) -> Result<()> {
    options.only(driver.options())?;
    for option in driver.options() {
        let checked: Result<(), OptionError> = match option.kind {
            OptionKind::Bool => options.bool(option.name).map(drop),
            OptionKind::Size => options.size(option.name).map(drop),
            OptionKind::Number => options.number(option.name).map(drop),
            _ => Ok(()),
        };
        checked?;
    }
    Ok(())
}

/// The backing image and its format: what is given by itself, or else as options, which are removed.
pub(crate) fn take_backing(
    options: &mut Options,
    backing: Option<&str>,
    format: Option<&str>,
) -> (Option<String>, Option<String>) {
    let (named, typed) = (options.take("backing_file"), options.take("backing_fmt"));
    (
        backing.map(str::to_owned).or(named),
        format.map(str::to_owned).or(typed),
    )
}

/// Whether an image of `driver` at `target` may be backed by `name`.
pub(crate) fn check_backing(driver: &dyn Driver, target: &ImageSpec, name: &str) -> Result<()> {
    if !driver
        .options()
        .iter()
        .any(|option| option.name == "backing_file")
    {
        return Err(Error::new(
            ErrorKind::Unsupported,
            CreateError::NoBacking(driver.format().name().to_owned()),
        ));
    }
    if name.is_empty() {
        return Err(CreateError::BackingEmpty.usage());
    }
    if target.text == *name {
        return Err(CreateError::BackedByItself.usage());
    }
    Ok(())
}

/// Opens what an image at `target` is to be backed by, in the way of `like`.
pub(crate) fn open_backing(
    target: &ImageSpec,
    name: &str,
    format: Option<&str>,
    like: &OpenRequest,
) -> Result<Image> {
    let opened = ImageSpec::from_name(name).and_then(|mut spec| {
        spec.file.path = open::resolve_name(target.path(), spec.file.path.as_os_str());
        let request = OpenRequest {
            format: format.map(str::to_owned),
            backing: true,
            snapshot: None,
            spec,
            ..like.clone()
        };
        open::image(&request)
    });
    opened.map_err(|error| Error::new(error.kind(), CreateError::Backing(error)))
}

/// `size` up to a whole sector.
pub(crate) fn whole_sectors(size: u64) -> Result<u64> {
    match size.checked_next_multiple_of(SECTOR) {
        Some(whole) if i64::try_from(whole).is_ok() => Ok(whole),
        _ => Err(CreateError::SizeTooLarge(size).usage()),
    }
}
