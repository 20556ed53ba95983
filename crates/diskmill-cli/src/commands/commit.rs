use std::ffi::OsString;
use std::num::NonZeroU64;

use clap::Args;
use diskmill::open::{Base, OpenError, base_from_here};
use diskmill::ops::commit::{CommitRequest, Committed, run};
use diskmill_core::Error;

use super::resize::tell;
use super::{DoArgs, Run, Source};
use crate::error::{Failure, Frame};
use crate::exit::Exit;
use crate::json::Json;
use crate::keyval;
use crate::progress::{Progress, Style};
use crate::ui::Ui;

/// Merge an overlay into the image it is backed by
#[derive(Args, Debug)]
#[command(override_usage = "diskmill commit [OPTIONS] FILENAME")]
pub struct CommitArgs {
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Show progress
    ///
    /// HOW is auto (the default: a bar on a terminal, lines elsewhere), bar, plain, json or none.
    #[arg(short, long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "auto")]
    progress: Option<String>,
    /// Format of the overlay, instead of finding it out
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options (driver=...,file.filename=...), not a name
    #[arg(long)]
    image_opts: bool,
    /// Cache mode of the images (default: writeback)
    #[arg(short = 't', long, value_name = "CACHE_MODE")]
    cache: Option<String>,
    /// Leave the overlay as it is instead of emptying it
    #[arg(short, long)]
    drop: bool,
    /// Merge into this image further down the chain, and leave the overlay as it is
    #[arg(short, long, value_name = "BASE_IMG", value_hint = clap::ValueHint::FilePath)]
    base: Option<OsString>,
    /// Write this many bytes a second at most
    #[arg(short, long, value_name = "RATE")]
    rate: Option<String>,
    #[command(flatten)]
    how: DoArgs,
    /// The overlay
    #[arg(value_name = "FILENAME", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
}

impl Run for CommitArgs {
    const NAME: &'static str = "commit";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.how.wants_json(ui)?;
        let style = Style::choose(ui, self.quiet, self.progress.as_deref(), self.how.native.json)?;
        let rate = match &self.rate {
            None => None,
            Some(text) => NonZeroU64::new(keyval::bytes("rate limit", text)?),
        };
        let [name] = self.names.as_slice() else {
            return Err(Failure::usage_help("Expecting one image file name"));
        };
        let source = Source {
            format: self.format.as_deref(),
            image_opts: self.image_opts,
            ..Source::default()
        };
        let mut request = CommitRequest::new(source.request(name, &self.how.native, ui)?);
        if let Some(mode) = &self.cache {
            request.open.cache = keyval::cache_mode("cache", mode)?;
        }
        request.rate = rate;
        request.keep = self.drop || self.base.is_some();
        request.base = match &self.base {
            None => Base::Next,
            Some(base) if ui.drop_in() => Base::Named(base.clone()),
            Some(base) => base_from_here(base),
        };
        let progress = Progress::begin(ui, style)?;
        let done = run(&request, &mut |warning| tell(ui, warning), progress.job());
        progress.signals().die_if_cancelled(&done);
        if done.is_ok() {
            progress.complete();
        }
        progress.end();
        let done = done.map_err(|error| failed(name, error))?;
        if json {
            ui.print(to_json(name, &done).pretty())?;
        } else if !self.quiet {
            ui.print("Image committed.\n")?;
        }
        Ok(Exit::OK)
    }
}

fn failed(name: &OsString, error: Error) -> Failure {
    match (error.find::<OpenError>(), error.context().op) {
        (Some(OpenError::NoBacking | OpenError::NotInChain { .. }), _) => Failure::from(error),
        (_, Some("commit to" | "empty")) => Failure::library(error, Frame::Plain),
        _ => Failure::open(name, error),
    }
}

fn to_json(name: &OsString, done: &Committed) -> Json {
    Json::ordered([
        ("filename", Json::text(name.to_string_lossy())),
        ("base", Json::text(&*done.base)),
        ("old-base-size", Json::Int(done.from)),
        ("new-base-size", Json::Int(done.to)),
        ("bytes-read", Json::Int(done.read)),
        ("bytes-stored", Json::Int(done.stored)),
        ("emptied", Json::Bool(done.emptied)),
    ])
}
