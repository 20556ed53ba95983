use std::ffi::OsString;

use clap::Args;
use diskmill::open::OpenWarning;
use diskmill::ops::resize::{NewSize, Preallocation, ResizeError, ResizeRequest, run};
use diskmill_core::parse_size;

use super::{DoArgs, Run, Source};
use crate::compat::texts;
use crate::error::{Failure, Frame};
use crate::exit::Exit;
use crate::json::Json;
use crate::ui::Ui;

/// Make the disk of an image larger or smaller
#[derive(Args, Debug)]
#[command(override_usage = "diskmill resize [OPTIONS] FILENAME [+-]SIZE")]
pub struct ResizeArgs {
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Format of the image, instead of finding it out
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options (driver=...,file.filename=...), not a name
    #[arg(long)]
    image_opts: bool,
    /// Losing what is behind the new, smaller size is meant
    #[arg(long)]
    shrink: bool,
    /// How to provide for new space: off, metadata, falloc or full
    #[arg(long, value_name = "PREALLOC")]
    preallocation: Option<String>,
    #[command(flatten)]
    how: DoArgs,
    /// The image, and its new size, or how much to add (+1G) or take away (-1G); suffixes k M G T P E
    #[arg(value_name = "FILENAME [+-]SIZE", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
}

impl Run for ResizeArgs {
    const NAME: &'static str = "resize";
    const NEGATIVE: bool = true;

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.how.wants_json(ui)?;
        let preallocation = match self.preallocation.as_deref() {
            None => Preallocation::Off,
            Some(mode) => Preallocation::parse(mode)
                .ok_or_else(|| Failure::usage(format!("Invalid preallocation mode '{mode}'")))?,
        };
        let (name, size) = match self.names.as_slice() {
            [name, size] => (name, new_size(&size.to_string_lossy())?),
            [_, _, ..] => return Err(Failure::usage_help("Extra argument(s) in command line")),
            _ => return Err(Failure::usage_help("Expecting image file name and size")),
        };
        let source = Source {
            format: self.format.as_deref(),
            image_opts: self.image_opts,
            ..Source::default()
        };
        let mut request = ResizeRequest::new(source.request(name, &self.how.native, ui)?, size);
        request.preallocation = preallocation;
        request.shrink = self.shrink;
        let resized = run(&request, &mut |warning| tell(ui, warning)).map_err(|error| {
            match error.find::<ResizeError>() {
                Some(ResizeError::WouldShrink { .. }) => would_shrink(ui, error),
                Some(_) => Failure::from(error),
                None if error.context().op == Some("resize") => Failure::library(error, Frame::Plain),
                None => Failure::open(name, error),
            }
        })?;
        if json {
            let result = Json::ordered([
                ("filename", Json::text(name.to_string_lossy())),
                ("old-size", Json::Int(resized.from)),
                ("new-size", Json::Int(resized.to)),
            ]);
            ui.print(result.pretty())?;
        } else if !self.quiet {
            ui.print("Image resized.\n")?;
        }
        Ok(Exit::OK)
    }
}

fn new_size(text: &str) -> Result<NewSize, Failure> {
    let (make, digits): (fn(u64) -> NewSize, &str) = match text.as_bytes() {
        [b'+', ..] => (NewSize::Grow, &text[1..]),
        [b'-', ..] => (NewSize::Shrink, &text[1..]),
        _ => (NewSize::To, text),
    };
    parse_size(digits)
        .map(make)
        .ok_or_else(|| Failure::usage(texts::bad_size("size")))
}

/// Says what opening the image made worth saying.
pub(super) fn tell(ui: &Ui, warning: &OpenWarning) {
    match warning {
        OpenWarning::GuessedRaw { name } if ui.drop_in() => ui.note(&format!(
            "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n\
             \x20        Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n\
             \x20        Specify the 'raw' format explicitly to remove the restrictions.\n"
        )),
        OpenWarning::GuessedRaw { name } => ui.warn(&format!(
            "'{}' has no format that could be recognised; it is taken for raw (say --format raw to be sure)",
            ui.name(name)
        )),
        other => ui.warn(&format!("{other:?}")),
    }
}

fn would_shrink(ui: &Ui, error: diskmill_core::Error) -> Failure {
    if ui.drop_in() {
        ui.note("qemu-img: Use the --shrink option to perform a shrink operation.\n");
        ui.warn(
            "Shrinking an image will delete all data beyond the shrunken image's end. \
             Before performing such an operation, make sure there is no important data there.",
        );
        Failure::said(Exit::FAILED)
    } else {
        Failure::from(error)
    }
}
