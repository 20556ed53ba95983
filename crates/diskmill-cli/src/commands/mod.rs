//! One file a command: what it takes, and how it asks the library.

use std::ffi::OsString;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgMatches, Args, Command};
use diskmill::open::OpenRequest;
use diskmill::policy::References;
use diskmill::spec::ImageSpec;
use diskmill_core::{Options, WhichSnapshot};
use diskmill_formats::registry;

use crate::error::Failure;
use crate::exit::Exit;
use crate::keys::{self, KeyArgs};
use crate::keyval::{self, OptionTarget};
use crate::ui::{Mode, Ui};

mod amend;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compact;
mod compare;
mod completions;
mod convert;
mod create;
mod dd;
mod demo;
mod info;
mod man;
mod map;
mod measure;
mod ova;
mod package;
mod rebase;
mod resize;
mod snapshot;

/// The heading of options that `qemu-img` does not have; under its name they do not exist.
pub const NATIVE: &str = "Diskmill options";

/// A command: its options, from which help, manual page and completions are made too, and what it does.
pub trait Run: Args {
    /// Its name.
    const NAME: &'static str;
    /// Whether a word such as `-1G` is a value rather than an option.
    const NEGATIVE: bool = false;

    /// Does it.
    fn run(self, ui: &Ui) -> Result<Exit, Failure>;
}

/// A command, by name.
pub struct Spec {
    /// Its name.
    pub name: &'static str,
    /// Whether a word such as `-1G` is a value rather than an option.
    pub negative: bool,
    /// Whether `qemu-img` has it too.
    pub shared: bool,
    define: fn(Command) -> Command,
    run: fn(&ArgMatches, &Ui) -> Result<Exit, Failure>,
}

impl Spec {
    const fn of<R: Run>(shared: bool) -> Self {
        Self {
            name: R::NAME,
            negative: R::NEGATIVE,
            shared,
            define: R::augment_args,
            run: |matches, ui| {
                let args = R::from_arg_matches(matches).map_err(|error| Failure::usage(error.to_string()))?;
                args.run(ui)
            },
        }
    }

    /// Its clap definition.
    pub fn definition(&self) -> Command {
        (self.define)(Command::new(self.name))
            .infer_long_args(true)
            .args_override_self(true)
    }

    /// Runs it with what clap has read.
    pub fn run(&self, matches: &ArgMatches, ui: &Ui) -> Result<Exit, Failure> {
        (self.run)(matches, ui)
    }
}

/// All commands, in the order of the help.
pub static COMMANDS: &[Spec] = &[
    Spec::of::<create::CreateArgs>(true),
    Spec::of::<info::InfoArgs>(true),
    Spec::of::<convert::ConvertArgs>(true),
    Spec::of::<check::CheckArgs>(true),
    Spec::of::<map::MapArgs>(true),
    Spec::of::<measure::MeasureArgs>(true),
    Spec::of::<compare::CompareArgs>(true),
    Spec::of::<resize::ResizeArgs>(true),
    Spec::of::<snapshot::SnapshotArgs>(true),
    Spec::of::<bitmap::BitmapArgs>(true),
    Spec::of::<amend::AmendArgs>(true),
    Spec::of::<compact::CompactArgs>(false),
    Spec::of::<ova::OvaArgs>(false),
    Spec::of::<commit::CommitArgs>(true),
    Spec::of::<rebase::RebaseArgs>(true),
    Spec::of::<dd::DdArgs>(true),
    Spec::of::<bench::BenchArgs>(true),
    Spec::of::<demo::DemoArgs>(false),
    Spec::of::<completions::CompletionsArgs>(false),
    Spec::of::<man::ManArgs>(false),
];

/// The command called `name`.
pub fn find(name: &str) -> Option<&'static Spec> {
    COMMANDS.iter().find(|spec| spec.name == name)
}

/// Names and descriptions of what `qemu-img` can do, sorted.
pub fn qemu_img_commands() -> Vec<(&'static str, String)> {
    let mut all: Vec<_> = COMMANDS
        .iter()
        .filter(|spec| spec.shared)
        .map(|spec| {
            let about = spec.definition().get_about().map(ToString::to_string);
            (spec.name, about.unwrap_or_default())
        })
        .collect();
    all.sort_unstable();
    all
}

/// The whole program, for help, manual page and completions.
pub fn program() -> Command {
    Command::new("diskmill")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Makes, converts, inspects and checks disk images")
        .after_help(
            "'diskmill qemu-img ...', or a link to diskmill called qemu-img, behaves as qemu-img does.",
        )
        .subcommand_required(true)
        .subcommands(
            COMMANDS
                .iter()
                .map(|spec| spec.definition().mut_args(with_values)),
        )
}

/// Tells completions what an option can be. The commands themselves check values in words of their own.
fn with_values(arg: Arg) -> Arg {
    let values = match arg.get_id().as_str() {
        "output" => &["human", "json"][..],
        "cache" | "source_cache" | "target_cache" => {
            &["none", "writeback", "writethrough", "directsync", "unsafe"]
        }
        "preallocation" => &["off", "metadata", "falloc", "full"],
        "progress" => &["auto", "bar", "plain", "json", "none"],
        "repair" => &["leaks", "all"],
        "firmware" => &["bios", "efi"],
        "format" | "source_format" | "target_format" | "backing_format" | "a_format" | "b_format" => {
            let formats = registry::drivers().iter().map(|driver| driver.format().name());
            return arg.value_parser(PossibleValuesParser::new(formats));
        }
        _ => return arg,
    };
    arg.value_parser(PossibleValuesParser::new(values))
}

/// Options that `qemu-img` does not have, and those that give keys.
#[derive(Args, Clone, Debug)]
pub struct NativeArgs {
    #[command(flatten)]
    pub keys: KeyArgs,
    /// JSON results on standard output, and where there is progress, JSON events on standard error
    #[arg(long, help_heading = NATIVE)]
    pub json: bool,
    /// Follow names inside images into this directory too (default: only beneath the image's own directory)
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath, help_heading = NATIVE)]
    pub allow_ref: Vec<PathBuf>,
    /// Parent of a differencing image; by default it is looked for, by its UUID, in the image's directory
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath, help_heading = NATIVE)]
    pub parent: Vec<PathBuf>,
    /// Trust nothing an image says: follow no name in it except into --allow-ref (also: DISKMILL_UNTRUSTED=1)
    #[arg(long, help_heading = NATIVE)]
    pub untrusted: bool,
}

impl NativeArgs {
    /// Which files an image may name.
    pub fn policy(&self, ui: &Ui) -> References {
        let allow = self.allow_ref.clone();
        let untrusted = || std::env::var_os("DISKMILL_UNTRUSTED").is_some_and(|value| value == "1");
        match ui.mode {
            Mode::DropIn => References::Any,
            Mode::Native if self.untrusted || untrusted() => References::None { allow },
            Mode::Native => References::Beneath { allow },
        }
    }

    /// Whether results are JSON, from `--output` and `--json`.
    pub fn wants_json(&self, output: Option<&str>) -> Result<bool, Failure> {
        match output {
            _ if self.json => Ok(true),
            None | Some("human") => Ok(false),
            Some("json") => Ok(true),
            Some(other) => Err(Failure::usage_help(format!(
                "--output expects 'human' or 'json' not '{other}'"
            ))),
        }
    }
}

/// Which disk of an OVF package is meant.
#[derive(Args, Clone, Debug)]
pub struct DiskArgs {
    /// The disk of an OVF package (.ova, .ovf) to take: its id, its file or its number from 1
    #[arg(long, value_name = "DISK", help_heading = NATIVE)]
    pub disk: Option<String>,
}

/// Options of the commands that look at one image.
#[derive(Args, Clone, Debug)]
pub struct LookArgs {
    /// Format of the image, instead of finding it out
    #[arg(short, long, value_name = "FMT")]
    pub format: Option<String>,
    /// FILENAME is a list of options (driver=...,file.filename=...), not a name
    #[arg(long)]
    pub image_opts: bool,
    /// Read it even while another process writes it
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// How to print: human (the default) or json
    #[arg(long, value_name = "human|json")]
    output: Option<String>,
    #[command(flatten)]
    pub native: NativeArgs,
    #[command(flatten)]
    which: DiskArgs,
}

impl LookArgs {
    /// Reads `--object`, and says whether results are JSON.
    pub fn wants_json(&self, ui: &Ui) -> Result<bool, Failure> {
        self.native.keys.opening(ui)?;
        self.native.wants_json(self.output.as_deref())
    }

    /// The request to open `name`, with the cache mode of `-T`.
    pub fn request(&self, ui: &Ui, name: &OsString, cache: Option<&str>) -> Result<OpenRequest, Failure> {
        let source = Source {
            format: self.format.as_deref(),
            image_opts: self.image_opts,
            share: self.force_share,
            cache,
            snapshot: None,
            disk: self.which.disk.clone(),
        };
        source.request(name, &self.native, ui)
    }
}

/// Options of the commands whose real counterparts print no JSON.
#[derive(Args, Clone, Debug)]
pub struct DoArgs {
    /// How to print: human (the default) or json
    #[arg(long, value_name = "human|json", help_heading = NATIVE)]
    output: Option<String>,
    #[command(flatten)]
    pub native: NativeArgs,
}

impl DoArgs {
    /// Reads `--object`, and says whether results are JSON.
    pub fn wants_json(&self, ui: &Ui) -> Result<bool, Failure> {
        self.native.keys.opening(ui)?;
        self.native.wants_json(self.output.as_deref())
    }
}

/// How one image to open is described on the command line.
#[derive(Clone, Debug, Default)]
pub struct Source<'a> {
    /// `-f`.
    pub format: Option<&'a str>,
    /// `--image-opts`.
    pub image_opts: bool,
    /// `-U`.
    pub share: bool,
    /// `-T`.
    pub cache: Option<&'a str>,
    /// `-l`.
    pub snapshot: Option<WhichSnapshot>,
    /// `--disk`.
    pub disk: Option<String>,
}

impl Source<'_> {
    /// The request to open `name`.
    pub fn request(&self, name: &OsString, native: &NativeArgs, ui: &Ui) -> Result<OpenRequest, Failure> {
        let spec = self.spec(name)?;
        let mut request = OpenRequest::new(spec);
        if let Some(mode) = self.cache {
            request.cache = keyval::cache_mode("source cache", mode)?;
        }
        request.format = self.format.map(str::to_owned);
        request.share = self.share;
        request.policy = native.policy(ui);
        request.parents.clone_from(&native.parent);
        request.snapshot = self.snapshot.clone();
        request.present_size = ui.drop_in();
        request.packages = !ui.drop_in();
        request.historic = !ui.drop_in();
        request.secrets = native.keys.opening(ui)?;
        request.needs_keys = ui.drop_in() || keys::reads_data(ui.command);
        request.disk = self.disk.clone();
        Ok(request)
    }

    fn spec(&self, name: &OsString) -> Result<ImageSpec, Failure> {
        if self.image_opts && self.format.is_some() {
            return Err(Failure::usage("--image-opts and --format are mutually exclusive"));
        }
        let spec = if self.image_opts {
            let text = name
                .to_str()
                .ok_or_else(|| Failure::usage(format!("'{}' is not UTF-8", name.to_string_lossy())))?;
            ImageSpec::from_options(text)
        } else {
            ImageSpec::from_name(name)
        };
        spec.map_err(|error| Failure::open(name, error))
    }
}

/// The options given to `-o`, or `None` once help has been printed instead: it depends on what `target` is.
pub fn creation_options(
    ui: &Ui,
    given: &[String],
    format: &str,
    target: Option<&OsString>,
) -> Result<Option<Options>, Failure> {
    match keyval::option_list(given)? {
        keyval::OptionList::Pairs(options) => Ok(Some(options)),
        keyval::OptionList::Help => {
            let driver = driver(format)?;
            let target = match target {
                None => OptionTarget::Unnamed,
                Some(name) if is_device(name) => OptionTarget::Device,
                Some(_) => OptionTarget::File,
            };
            keyval::print_options(ui, driver, target)?;
            Ok(None)
        }
    }
}

fn is_device(name: &OsString) -> bool {
    std::fs::metadata(name).is_ok_and(|data| {
        let kind = data.file_type();
        kind.is_block_device() || kind.is_char_device()
    })
}

/// The driver of the format called `name`.
pub fn driver(name: &str) -> Result<&'static dyn diskmill_core::Driver, Failure> {
    registry::by_name(name).ok_or_else(|| Failure::usage(format!("Unknown file format '{name}'")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definitions_are_sound() {
        program().debug_assert();
    }

    #[test]
    fn every_option_has_a_long_name_and_a_help_text() {
        for spec in COMMANDS {
            for arg in spec.definition().get_arguments() {
                assert!(
                    arg.is_positional() || arg.get_long().is_some(),
                    "{} {arg}",
                    spec.name
                );
                assert!(arg.get_help().is_some(), "{} {arg}", spec.name);
            }
        }
    }
}
