use std::ffi::OsString;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use diskmill::open;
use diskmill::ops::convert::{
    BitmapNotCopied, ConvertError, ExistingImage, Input, NewImage, Output, Plan, Summary, run,
};
use diskmill::ops::create::CreateError;
use diskmill::spec::ImageSpec;
use diskmill_core::{Compression, Durability, ErrorKind, OptionError, Options, WhichSnapshot};
use diskmill_formats::qcow2::EncryptionError;
use diskmill_storage::CacheMode;

use super::package::{self, Making};
use super::{DiskArgs, DoArgs, NATIVE, Run, Source, creation_options};
use crate::error::{Failure, Frame};
use crate::exit::Exit;
use crate::json::Json;
use crate::keys::NewKeyArgs;
use crate::keyval;
use crate::progress::{Progress, Style};
use crate::ui::Ui;

/// Copy images into a new one of any format
#[derive(Args, Clone, Debug)]
#[command(override_usage = "diskmill convert [OPTIONS] SRC_FILENAME... TGT_FILENAME")]
pub struct ConvertArgs {
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Show progress
    ///
    /// HOW is auto (the default: a bar on a terminal, lines elsewhere), bar, plain, json or none.
    #[arg(short, long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "auto")]
    progress: Option<String>,
    /// Format of the sources, instead of finding it out
    #[arg(short = 'f', long, value_name = "SRC_FMT")]
    source_format: Option<String>,
    /// The sources are lists of options (driver=...,file.filename=...), not names; also --image-opts
    #[arg(long, alias = "image-opts")]
    source_image_opts: bool,
    /// Copy this snapshot inside the source
    #[arg(short = 'l', long, alias = "snapshot", value_name = "SNAPSHOT_PARAMS")]
    source_snapshot: Option<String>,
    /// Cache mode of the sources (default: writeback)
    #[arg(short = 'T', long, value_name = "SRC_CACHE")]
    source_cache: Option<String>,
    /// Format of the target (default: raw)
    #[arg(short = 'O', long, alias = "output-format", value_name = "TGT_FMT")]
    target_format: Option<String>,
    /// The target is a list of options, not a name
    #[arg(long)]
    target_image_opts: bool,
    /// Options of the target's format, name=value,...; 'list' shows them
    #[arg(short = 'o', long, alias = "options", value_name = "TGT_OPTS")]
    target_options: Vec<String>,
    /// Compress the target's data
    #[arg(short, long)]
    compress: bool,
    /// Cache mode of the target: all but unsafe make it durable
    #[arg(short = 't', long, alias = "output-cache", value_name = "TGT_CACHE")]
    target_cache: Option<String>,
    /// Store only what differs from this image, and back the target by it
    #[arg(short = 'B', long, value_name = "BACKING_FILENAME", value_hint = clap::ValueHint::FilePath)]
    backing: Option<String>,
    /// Format of the backing image
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,
    /// Write into an image that exists already
    #[arg(short, long)]
    no_create: bool,
    /// The existing target reads as zeros, so zeros need not be written
    #[arg(long)]
    target_is_zero: bool,
    /// Leave out runs of zeros from this size on (default: 4k; 0 stores everything)
    #[arg(short = 'S', long, value_name = "SPARSE_SIZE")]
    sparse_size: Option<String>,
    /// Copy dirty bitmaps too
    #[arg(long)]
    bitmaps: bool,
    /// Leave out dirty bitmaps that are not in order
    #[arg(long)]
    skip_broken_bitmaps: bool,
    /// Read the sources even while another process writes them
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Write this many bytes a second at most
    #[arg(short, long, value_name = "RATE")]
    rate: Option<String>,
    /// Threads to use at most (default: one for each core)
    #[arg(short = 'm', long, value_name = "NUM")]
    parallel: Option<String>,
    /// Let the kernel copy data that need not be looked at
    #[arg(short = 'C', long)]
    copy_range_offloading: bool,
    /// Store zeros for what cannot be read, and go on
    #[arg(long)]
    salvage: bool,
    /// Taken for compatibility: data is written in parallel in any case
    #[arg(short = 'W', long)]
    oob_writes: bool,
    #[command(flatten)]
    how: DoArgs,
    #[command(flatten)]
    which: DiskArgs,
    #[command(flatten)]
    new_key: NewKeyArgs,
    /// The images to copy, one behind the other, and the target; '-' is standard input or output
    #[arg(value_name = "SRC_FILENAME... TGT_FILENAME", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
    /// How hard to compress: 1 to 12 for zlib, 1 to 22 for zstd
    #[arg(long, value_name = "LEVEL", help_heading = NATIVE)]
    compress_level: Option<i32>,
    /// Carry all snapshots inside the source into the target, a new qcow2 image
    #[arg(long, help_heading = NATIVE)]
    keep_snapshots: bool,
}

impl Run for ConvertArgs {
    const NAME: &'static str = "convert";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let sources = self.names.split_last().map_or(&[][..], |(_, sources)| sources);
        if sources.iter().any(|name| name == "-") {
            self.how.native.keys.leave_stdin(ui, Some(&self.new_key))?;
        }
        let json = self.how.wants_json(ui)?;
        let style = Style::choose(ui, self.quiet, self.progress.as_deref(), self.how.native.json)?;
        let format = self.format();
        if format == "ova" && !ui.drop_in() {
            return self.fill_package(ui, style, json);
        }
        let target = self.names.last().filter(|_| self.names.len() > 1);
        let Some(mut options) = creation_options(ui, &self.target_options, format, target)? else {
            return Ok(Exit::OK);
        };
        if !self.no_create {
            self.new_key.imply(ui, format, &mut options)?;
        } else if self.new_key.new_passphrase_file.is_some() {
            return Err(Failure::usage(
                "--new-passphrase-file makes no sense with -n: nothing is made",
            ));
        }
        let mut settings = self.settings(ui, options, format)?;
        (settings.style, settings.json) = (style, json);
        let (target, sources) = match self.names.split_last() {
            Some((target, sources)) if !sources.is_empty() => (target, sources),
            _ => return Err(Failure::usage("Must specify image file name")),
        };
        if !ui.drop_in() && !self.no_create && Path::new(target).is_dir() {
            return self.fill_directory(ui, Path::new(target), sources, &settings);
        }
        let plan = self.plan(ui, target, sources, format, &settings)?;
        self.convert(ui, &plan, target, sources, &settings)
    }
}

/// Threads that can be asked for under our own name.
const MOST_THREADS: u64 = 256;

/// What the options come to, apart from names.
struct Settings {
    options: Options,
    cache: Option<CacheMode>,
    sparse: u64,
    workers: Option<NonZeroUsize>,
    rate: Option<NonZeroU64>,
    snapshot: Option<WhichSnapshot>,
    style: Style,
    json: bool,
}

impl ConvertArgs {
    fn format(&self) -> &str {
        self.target_format.as_deref().unwrap_or("raw")
    }

    /// Copies, and tells how it went.
    fn convert(
        &self,
        ui: &Ui,
        plan: &Plan,
        target: &OsString,
        sources: &[OsString],
        settings: &Settings,
    ) -> Result<Exit, Failure> {
        let format = self.format();
        let name = target.to_string_lossy();
        let progress = Progress::begin(ui, settings.style)?;
        let began = Instant::now();
        let summary = run(plan, progress.job());
        progress.signals().die_if_cancelled(&summary);
        if summary.is_ok() {
            progress.complete();
        }
        progress.end();
        let summary = summary.map_err(|error| self.failed(error, target, sources, format))?;
        if let (Some(why), false) = (&summary.in_place, ui.drop_in()) {
            ui.warn(&format!("'{}' was written in place: {why}", ui.name(&name)));
        }
        let dropped = summary.snapshots_dropped;
        if dropped > 0 && self.source_snapshot.is_none() && !ui.drop_in() && !self.quiet {
            let (s, are) = if dropped == 1 { ("", "is") } else { ("s", "are") };
            ui.warn(&format!(
                "{dropped} snapshot{s} inside the source {are} not in '{}' (--keep-snapshots carries them into qcow2)",
                ui.name(&name)
            ));
        }
        self.how.native.keys.warn_if_unused(ui);
        if settings.json && !matches!(plan.output, Output::Stdout) {
            ui.print(to_json(&name, format, &summary, began).pretty())?;
        }
        Ok(Exit::OK)
    }

    /// All disks of a package, or the one that was chosen, each into an image of its own in `dir`.
    fn fill_directory(
        &self,
        ui: &Ui,
        dir: &Path,
        sources: &[OsString],
        settings: &Settings,
    ) -> Result<Exit, Failure> {
        let shown = dir.display();
        let [source] = sources else {
            return Err(Failure::usage(format!(
                "'{shown}' is a directory: it takes the disks of one OVF package"
            )));
        };
        let request = self
            .source(settings.snapshot.clone())
            .request(source, &self.how.native, ui)?;
        let package = open::package(&request).map_err(|error| Failure::open(source, error))?;
        let Some(package) = package else {
            let text = format!(
                "'{shown}' is a directory, and '{}' is no OVF package whose disks could go there",
                source.to_string_lossy()
            );
            return Err(Failure::usage(text));
        };
        let format = self.format();
        let disks = match &self.which.disk {
            Some(disk) => {
                let disk = package
                    .choose(Some(disk))
                    .map_err(|error| Failure::open(source, error))?;
                vec![disk]
            }
            None => package
                .envelope()
                .disks
                .iter()
                .filter(|disk| disk.file.is_some() && !disk.is_optical())
                .collect(),
        };
        let mut jobs: Vec<(PathBuf, String)> = Vec::new();
        for disk in disks {
            let file = disk.file.and_then(|file| package.envelope().files.get(file));
            let stem = file.map_or_else(|| disk.id.clone(), |file| file.name.base().stem().to_owned());
            let target = dir.join(format!("{stem}.{format}"));
            if let Some((_, other)) = jobs.iter().find(|(known, _)| *known == target) {
                return Err(Failure::usage(format!(
                    "disks '{other}' and '{}' would both become '{}'",
                    disk.id,
                    target.display()
                )));
            }
            jobs.push((target, disk.id.clone()));
        }
        if jobs.is_empty() {
            return Err(Failure::usage("the package has no disk"));
        }
        let mut one = self.clone();
        for (target, disk) in jobs {
            let target = target.into_os_string();
            one.which.disk = Some(disk);
            let plan = one.plan(ui, &target, sources, format, settings)?;
            one.convert(ui, &plan, &target, sources, settings)?;
        }
        Ok(Exit::OK)
    }

    /// The sources as the disks of a new OVF package, of a machine nothing is known of.
    fn fill_package(&self, ui: &Ui, style: Style, json: bool) -> Result<Exit, Failure> {
        let unfit = [
            (self.no_create, "-n"),
            (self.backing.is_some(), "-B"),
            (!self.target_options.is_empty(), "-o"),
            (
                self.new_key.new_passphrase_file.is_some(),
                "--new-passphrase-file",
            ),
            (self.bitmaps, "--bitmaps"),
            (self.rate.is_some(), "--rate"),
            (self.copy_range_offloading, "-C"),
            (self.salvage, "--salvage"),
        ];
        if let Some((_, option)) = unfit.into_iter().find(|(given, _)| *given) {
            return Err(Failure::usage(format!(
                "{option} makes no sense for an OVF package; 'diskmill ova create' says more of the machine"
            )));
        }
        let settings = self.settings(ui, Options::new(), self.format())?;
        let (target, sources) = match self.names.split_last() {
            Some((target, sources)) if !sources.is_empty() => (target, sources),
            _ => return Err(Failure::usage("Must specify image file name")),
        };
        let mut disks = Vec::with_capacity(sources.len());
        for source in sources {
            match self.input(ui, source, settings.snapshot.clone())? {
                Input::Image(request) => disks.push(*request),
                _ => {
                    return Err(Failure::usage(
                        "standard input cannot be a disk of an OVF package",
                    ));
                }
            }
        }
        let mut making = Making::new(disks, target);
        making.level = self.compress_level;
        making.workers = settings.workers;
        making.cache = settings.cache;
        package::make(ui, making, style, json)
    }

    /// Checks what can be checked without looking at files, in the order the real tool does.
    fn settings(&self, ui: &Ui, options: Options, format: &str) -> Result<Settings, Failure> {
        let snapshot = self
            .source_snapshot
            .as_deref()
            .map(keyval::snapshot)
            .transpose()?;
        let sparse = match &self.sparse_size {
            None => 4096,
            Some(text) => sparse_size(text)?,
        };
        let workers = match &self.parallel {
            None => None,
            Some(text) => {
                let most = if ui.drop_in() { 16 } else { MOST_THREADS };
                let number = keyval::number("number of coroutines", text, 1, most)?;
                usize::try_from(number).ok().and_then(NonZeroUsize::new)
            }
        };
        let rate = match &self.rate {
            None => None,
            Some(text) => NonZeroU64::new(keyval::bytes("rate limit", text)?),
        };
        let by_option = options.text("backing_file").is_some() && options.text("backing_fmt").is_none();
        let conflict = [
            (
                self.skip_broken_bitmaps && !self.bitmaps,
                "Use of --skip-broken-bitmaps requires --bitmaps",
            ),
            (
                self.copy_range_offloading && self.sparse_size.is_some(),
                "Cannot enable copy offloading when -S is used",
            ),
            (
                self.copy_range_offloading && self.compress,
                "Cannot enable copy offloading when -c is used",
            ),
            (
                self.target_is_zero && !self.no_create,
                "--target-is-zero requires use of -n flag",
            ),
            (
                self.target_image_opts && !self.no_create,
                "--target-image-opts requires use of -n flag",
            ),
            (
                self.target_image_opts && self.target_format.is_some(),
                "--image-opts and --format are mutually exclusive",
            ),
            (
                self.backing_format.is_some() && self.backing.is_none() && format == "raw" && !self.no_create,
                "Backing file format not supported for file format 'raw'",
            ),
            (
                self.no_create && !options.is_empty(),
                "-o has no effect when skipping image creation",
            ),
            (
                (self.backing.is_some() || by_option) && self.backing_format.is_none() && !self.no_create,
                "Use of backing file requires explicit backing format",
            ),
        ];
        if let Some((_, text)) = conflict.into_iter().find(|(is_so, _)| *is_so) {
            return Err(Failure::usage(text));
        }
        let cache = match &self.target_cache {
            Some(mode) => Some(keyval::cache_mode("cache", mode)?),
            None => None,
        };
        Ok(Settings {
            cache,
            options,
            sparse,
            workers,
            rate,
            snapshot,
            style: Style::None,
            json: false,
        })
    }

    fn plan(
        &self,
        ui: &Ui,
        target: &OsString,
        sources: &[OsString],
        format: &str,
        settings: &Settings,
    ) -> Result<Plan, Failure> {
        let mut inputs = Vec::with_capacity(sources.len());
        for name in sources {
            inputs.push(self.input(ui, name, settings.snapshot.clone())?);
        }
        let output = self.output(ui, target, format, settings)?;
        let mut inputs = inputs.into_iter();
        let Some(first) = inputs.next() else {
            return Err(Failure::usage("Must specify image file name"));
        };
        let mut plan = Plan::new(first, output);
        plan.inputs.extend(inputs);
        plan.compress = (self.compress || self.compress_level.is_some()).then_some(Compression {
            level: self.compress_level,
        });
        plan.sparse = settings.sparse;
        plan.workers = settings.workers;
        plan.offload = self.copy_range_offloading;
        plan.salvage = self.salvage;
        plan.rate = settings.rate;
        plan.bitmaps = self.bitmaps;
        plan.keep_snapshots = self.keep_snapshots;
        plan.skip_broken_bitmaps = self.skip_broken_bitmaps;
        plan.durability = match settings.cache {
            Some(CacheMode::Unsafe) => Durability::None,
            None if ui.drop_in() => Durability::None,
            _ => Durability::Synced,
        };
        Ok(plan)
    }

    fn source(&self, snapshot: Option<WhichSnapshot>) -> Source<'_> {
        Source {
            format: self.source_format.as_deref(),
            image_opts: self.source_image_opts,
            share: self.force_share,
            cache: self.source_cache.as_deref(),
            snapshot,
            disk: self.which.disk.clone(),
        }
    }

    fn input(&self, ui: &Ui, name: &OsString, snapshot: Option<WhichSnapshot>) -> Result<Input, Failure> {
        if !ui.drop_in() && name == "-" {
            return match self.source_format.as_deref() {
                None | Some("raw") => Ok(Input::Stdin),
                Some(_) => {
                    let request = self.source(snapshot).request(name, &self.how.native, ui)?;
                    Ok(Input::StdinImage(Box::new(request)))
                }
            };
        }
        let mut request = self.source(snapshot).request(name, &self.how.native, ui)?;
        request.hold = true;
        if !ui.drop_in() {
            package::refuse_containers(name, &request)?;
        }
        Ok(Input::Image(Box::new(request)))
    }

    fn output(
        &self,
        ui: &Ui,
        target: &OsString,
        format: &str,
        settings: &Settings,
    ) -> Result<Output, Failure> {
        let streams = format == "vmdk" && settings.options.text("subformat") == Some("streamOptimized");
        let stdout = OsString::from("/dev/stdout");
        let target = match !ui.drop_in() && streams && target == "-" {
            true => &stdout,
            false => target,
        };
        if !ui.drop_in() && target == "-" {
            return match format {
                "raw" => Ok(Output::Stdout),
                format => Err(Failure::usage(format!(
                    "standard output can only be raw or streamOptimized vmdk, since {format} is not written from front to \
                     back otherwise"
                ))),
            };
        }
        if self.no_create {
            let source = Source {
                format: (!self.target_image_opts).then_some(format),
                image_opts: self.target_image_opts,
                ..Source::default()
            };
            let mut request = source.request(target, &self.how.native, ui)?;
            if let Some(cache) = settings.cache {
                request.cache = cache;
            }
            let mut existing = ExistingImage::new(request);
            existing.is_zero = self.target_is_zero;
            existing.backing = self.backing.clone();
            return Ok(Output::Existing(existing));
        }
        let spec = ImageSpec::from_name(target).map_err(|error| converting(error, target, format))?;
        let mut new = NewImage::new(spec, format);
        new.options = settings.options.clone();
        new.secrets = self.how.native.keys.making(ui, Some(&self.new_key))?;
        new.backing = self.backing.clone();
        if self.backing.is_some() || !ui.drop_in() {
            new.backing_format = self.backing_format.clone();
        }
        if let Some(cache) = settings.cache {
            new.cache = cache;
        }
        Ok(Output::New(new))
    }

    /// Introduces an error by the file it is about, as the real tool does.
    fn failed(
        &self,
        error: diskmill_core::Error,
        target: &OsString,
        sources: &[OsString],
        format: &str,
    ) -> Failure {
        let path = error.context().path.clone();
        let is = |name: &OsString| {
            let listed = || {
                let spec = ImageSpec::from_options(name.to_str()?).ok()?;
                Some(spec.path().to_owned())
            };
            path.as_deref().is_some_and(|path| {
                let by_options = self.source_image_opts || self.target_image_opts;
                path == Path::new(name) || by_options && listed().is_some_and(|listed| listed == path)
            })
        };
        // A table that is read whole is read while opening.
        let op = error.context().op.unwrap_or_default();
        let opening = op == "open" || op.starts_with("read the ") || error.kind() == ErrorKind::Locked;
        if is_about_the_request(&error) {
            return Failure::from(error);
        }
        if let ("read", Some(at)) = (op, error.context().guest) {
            return Failure::reading(at.get(), error);
        }
        match sources.iter().find(|name| is(name)) {
            Some(name) if opening && !is(target) => Failure::open(name, error),
            _ if opening && self.no_create && is(target) => Failure::open(target, error),
            _ if is(target) => converting(error, target, format),
            Some(name) if opening => Failure::open(name, error),
            // What names the file may be a list of options, of which the file is one.
            _ => match sources {
                [one] if opening && self.source_image_opts && !self.target_image_opts => {
                    Failure::open(one, error)
                }
                _ => Failure::from(error),
            },
        }
    }
}

/// Whether what was asked for makes no sense, whatever the files hold.
fn is_about_the_request(error: &diskmill_core::Error) -> bool {
    let create = matches!(
        error.find::<CreateError>(),
        Some(
            CreateError::UnknownFormat(_)
                | CreateError::NotCreatable(_)
                | CreateError::NoBacking(_)
                | CreateError::BackingFormatMissing { .. }
        )
    );
    create
        || error.find::<ConvertError>().is_some()
        || error.find::<BitmapNotCopied>().is_some()
        || matches!(error.find(), Some(EncryptionError::Compressed))
        || matches!(error.find::<OptionError>(), Some(OptionError::Unknown(_)))
}

fn converting(error: diskmill_core::Error, target: &OsString, format: &str) -> Failure {
    let frame = Frame::Converting {
        name: target.to_string_lossy().into_owned(),
        format: format.to_owned(),
    };
    Failure::library(error, frame)
}

fn sparse_size(text: &str) -> Result<u64, Failure> {
    const NAME: &str = "buffer size for sparse output";
    let largest = 16 << 20;
    match keyval::bytes(NAME, text)? {
        size if size % 512 == 0 && size <= largest => Ok(size),
        _ => Err(Failure::usage(format!(
            "Invalid {NAME} specified. Valid sizes are multiples of 512 up to {largest}. Select 0 to disable sparse detection (fully allocates output)."
        ))),
    }
}

fn to_json(name: &str, format: &str, summary: &Summary, began: Instant) -> Json {
    let seconds = (began.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
    let mut pairs = vec![
        ("filename", Json::text(name)),
        ("format", Json::text(format)),
        ("virtual-size", Json::Int(summary.virtual_size)),
        ("bytes-read", Json::Int(summary.read)),
        ("bytes-stored", Json::Int(summary.stored)),
        ("threads", Json::Int(summary.workers as u64)),
        ("seconds", Json::Real(seconds)),
    ];
    if let Some(why) = &summary.in_place {
        pairs.push(("written-in-place", Json::text(why.to_string())));
    }
    Json::ordered(pairs)
}
