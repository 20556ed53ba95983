use std::ffi::OsString;

use clap::Args;
use diskmill::ops::rebase::{RebaseError, RebaseRequest, Rebased, run};
use diskmill_core::{Error, ErrorKind};

use super::resize::tell;
use super::{DoArgs, Run, Source};
use crate::compat::reason;
use crate::error::Failure;
use crate::exit::Exit;
use crate::json::Json;
use crate::keyval;
use crate::progress::{Progress, Style};
use crate::ui::Ui;

/// Change the image that an image is backed by
#[derive(Args, Debug)]
#[command(override_usage = "diskmill rebase [OPTIONS] FILENAME")]
pub struct RebaseArgs {
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Show progress
    ///
    /// HOW is auto (the default: a bar on a terminal, lines elsewhere), bar, plain, json or none.
    #[arg(short, long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "auto")]
    progress: Option<String>,
    /// Format of the image, instead of finding it out
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options (driver=...,file.filename=...), not a name
    #[arg(long)]
    image_opts: bool,
    /// Cache mode of the image (default: writeback)
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
    /// The new backing image; an empty name for none
    #[arg(short, long, value_name = "BACKING_FILENAME", value_hint = clap::ValueHint::FilePath)]
    backing: Option<OsString>,
    /// Format of the new backing image
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,
    /// Cache mode of the new backing image (default: writeback)
    #[arg(short = 'T', long, value_name = "BACKING_CACHE")]
    backing_cache: Option<String>,
    /// Only change the name: the new image is known to read as the old one did
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    /// Compress what is written into the image
    #[arg(short, long)]
    compress: bool,
    /// Read the new backing image even while another process writes it
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    how: DoArgs,
    /// The image
    #[arg(value_name = "FILENAME", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
}

impl Run for RebaseArgs {
    const NAME: &'static str = "rebase";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.how.wants_json(ui)?;
        let style = Style::choose(ui, self.quiet, self.progress.as_deref(), self.how.native.json)?;
        let [name] = self.names.as_slice() else {
            return Err(Failure::usage_help("Expecting one image file name"));
        };
        if !self.backing_unsafe && self.backing.is_none() {
            return Err(Failure::usage_help(
                "Must specify backing file (-b) or use unsafe mode (-u)",
            ));
        }
        let backing = match &self.backing {
            None => None,
            Some(backing) => match backing.to_str() {
                Some(text) => Some(text.to_owned()),
                None => {
                    let name = backing.to_string_lossy();
                    return Err(Failure::usage(format!("'{name}' is not UTF-8")));
                }
            },
        };
        let source = Source {
            format: self.format.as_deref(),
            image_opts: self.image_opts,
            ..Source::default()
        };
        let mut request = RebaseRequest::new(source.request(name, &self.how.native, ui)?);
        if let Some(mode) = &self.cache {
            request.open.cache = keyval::cache_mode("cache", mode)?;
        }
        if let Some(mode) = &self.backing_cache {
            request.cache = keyval::cache_mode("source cache", mode)?;
        }
        request.backing = backing;
        request.format = self.backing_format;
        request.share = self.force_share;
        request.unchecked = self.backing_unsafe;
        request.compress = self.compress;
        let progress = Progress::begin(ui, style)?;
        let done = run(&request, &mut |warning| tell(ui, warning), progress.job());
        progress.signals().die_if_cancelled(&done);
        if done.is_ok() {
            progress.complete();
        }
        progress.end();
        let done = done.map_err(|error| failed(ui, name, error))?;
        if json {
            ui.print(to_json(name, &done).pretty())?;
        }
        Ok(Exit::OK)
    }
}

/// The failure as `qemu-img` words it.
fn failed(ui: &Ui, name: &OsString, error: Error) -> Failure {
    let native = !ui.drop_in();
    let text = match error.find::<RebaseError>() {
        None if error.context().op == Some("rebase") => return Failure::from(error),
        None => return Failure::open(name, error),
        Some(_) if native => return Failure::from(error),
        Some(RebaseError::UnknownFormat(format)) => format!("Invalid format name: '{format}'"),
        Some(RebaseError::FormatMissing(name)) => {
            format!("Could not change the backing file to '{name}': backing format must be specified")
        }
        Some(RebaseError::Change { name, source }) => {
            let why = match source.kind() {
                ErrorKind::NoSpace if source.io_error().is_none() => {
                    "No space left in the file header".to_owned()
                }
                ErrorKind::Usage => "Invalid argument".to_owned(),
                ErrorKind::Unsupported => "Operation not supported".to_owned(),
                _ => reason::text(source, None),
            };
            format!("Could not change the backing file to '{name}': {why}")
        }
        Some(RebaseError::NewBacking { name, source }) => {
            let why = reason::text(source, None);
            format!("Could not open new backing file '{name}': {why}")
        }
        Some(_) => return Failure::from(error),
    };
    Failure::refused(text)
}

fn to_json(name: &OsString, done: &Rebased) -> Json {
    Json::ordered([
        ("filename", Json::text(name.to_string_lossy())),
        ("bytes-read", Json::Int(done.read)),
        ("bytes-stored", Json::Int(done.stored)),
    ])
}
