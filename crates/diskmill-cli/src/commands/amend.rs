use std::ffi::{OsStr, OsString};

use clap::Args;
use diskmill::open;
use diskmill::ops::amend::{AmendRequest, AmendUnsupported, run};
use diskmill_core::Error;

use super::resize::tell;
use super::{DoArgs, Run, Source, driver};
use crate::error::{Failure, Frame};
use crate::exit::Exit;
use crate::json::Json;
use crate::keys::NewKeyArgs;
use crate::keyval::{self, OptionList};
use crate::progress::{Progress, Style};
use crate::ui::Ui;

/// Change options that an image was made with
#[derive(Args, Debug)]
#[command(override_usage = "diskmill amend [OPTIONS] -o AMEND_OPTS FILENAME")]
pub struct AmendArgs {
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
    /// What to change, name=value,...; 'list' shows what can be changed
    #[arg(short = 'o', long, value_name = "AMEND_OPTS")]
    options: Vec<String>,
    /// Do what could make an encrypted image unreadable
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    how: DoArgs,
    #[command(flatten)]
    new_key: NewKeyArgs,
    /// The image
    #[arg(value_name = "FILENAME", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
}

impl Run for AmendArgs {
    const NAME: &'static str = "amend";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.how.wants_json(ui)?;
        let style = Style::choose(ui, self.quiet, self.progress.as_deref(), self.how.native.json)?;
        if self.options.is_empty() && self.new_key.new_passphrase_file.is_none() {
            return Err(Failure::usage_help("Must specify options (-o)"));
        }
        let wanted = keyval::option_list(&self.options)?;
        if let (OptionList::Help, Some(format)) = (&wanted, self.format.as_deref()) {
            return print_options(ui, driver(format)?);
        }
        let [name] = self.names.as_slice() else {
            return Err(Failure::usage("Expecting one image file name"));
        };
        let source = Source {
            format: self.format.as_deref(),
            image_opts: self.image_opts,
            ..Source::default()
        };
        let mut request = source.request(name, &self.how.native, ui)?;
        if let Some(mode) = &self.cache {
            request.cache = keyval::cache_mode("cache", mode)?;
        }
        let mut options = match wanted {
            OptionList::Pairs(options) => options,
            OptionList::Help => {
                request.backing = false;
                let image = open::image(&request).map_err(|error| Failure::open(name, error))?;
                let top = image.chain.layers().first();
                let format = top.map_or("raw", |top| top.facts().format.name());
                return print_options(ui, driver(format)?);
            }
        };
        self.new_key.add(&mut request, &mut options)?;
        let mut request = AmendRequest::new(request, options);
        request.force = self.force;
        let quiet = self.quiet;
        let progress = Progress::begin(ui, style)?;
        let done = run(
            &request,
            &mut |warning| {
                if !quiet || ui.drop_in() {
                    tell(ui, warning);
                }
            },
            progress.job(),
        );
        progress.signals().die_if_cancelled(&done);
        if done.is_ok() {
            progress.complete();
        }
        progress.end();
        done.map_err(|error| failed(ui, name, error))?;
        if json {
            let changed = request.options.iter();
            let changed = changed.map(|(option, value)| (option.to_owned(), Json::text(value)));
            let result = Json::ordered([
                ("filename".to_owned(), Json::text(name.to_string_lossy())),
                ("amended".to_owned(), Json::ordered(changed)),
            ]);
            ui.print(result.pretty())?;
        }
        Ok(Exit::OK)
    }
}

fn print_options(ui: &Ui, driver: &dyn diskmill_core::Driver) -> Result<Exit, Failure> {
    let format = driver.format();
    if driver.amend_options().is_empty() {
        return Err(failed(
            ui,
            OsStr::new(""),
            Error::new(diskmill_core::ErrorKind::Unsupported, AmendUnsupported(format)).op("amend"),
        ));
    }
    keyval::print_amend_options(ui, driver)?;
    Ok(Exit::OK)
}

fn failed(ui: &Ui, name: &OsStr, error: Error) -> Failure {
    match error.find::<AmendUnsupported>() {
        Some(AmendUnsupported(format)) if ui.drop_in() => Failure::refused(format!(
            "Format driver '{format}' does not support option amendment"
        )),
        _ if error.context().op == Some("amend") => Failure::library(error, Frame::Plain),
        _ => Failure::open(name, error),
    }
}
