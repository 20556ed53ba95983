use std::ffi::OsString;

use clap::Args;
use diskmill::ops::create::{CreateRequest, plan};
use diskmill::spec::ImageSpec;
use diskmill_core::Durability;

use super::{DoArgs, Run, creation_options};
use crate::error::{Failure, Frame};
use crate::exit::Exit;
use crate::json::Json;
use crate::keys::NewKeyArgs;
use crate::keyval;
use crate::progress::{Progress, Style};
use crate::ui::Ui;

/// Make a new, empty image
#[derive(Args, Debug)]
#[command(override_usage = "diskmill create [OPTIONS] FILENAME [SIZE]")]
pub struct CreateArgs {
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Format of the new image (default: raw)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Options of the format, name=value,...; 'list' shows them
    #[arg(short, long, value_name = "FMT_OPTS")]
    options: Vec<String>,
    /// Image that the new one shall be backed by
    #[arg(short, long, value_name = "BACKING_FILENAME", value_hint = clap::ValueHint::FilePath)]
    backing: Option<String>,
    /// Format of the backing image
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,
    /// Do not open the backing image
    #[arg(short = 'u', long)]
    backing_unsafe: bool,
    #[command(flatten)]
    how: DoArgs,
    #[command(flatten)]
    new_key: NewKeyArgs,
    /// The new image, and its size with an optional suffix k M G T P E (default: the size of the backing image)
    #[arg(value_name = "FILENAME [SIZE]", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
}

impl Run for CreateArgs {
    const NAME: &'static str = "create";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.how.wants_json(ui)?;
        let format = self.format.as_deref().unwrap_or("raw");
        let Some(mut options) = creation_options(ui, &self.options, format, self.names.first())? else {
            return Ok(Exit::OK);
        };
        self.new_key.imply(ui, format, &mut options)?;
        let (name, size) = match self.names.as_slice() {
            [] => return Err(Failure::usage_help("Expecting image file name")),
            [name] => (name, None),
            [name, size] => (name, Some(keyval::bytes("image size", &size.to_string_lossy())?)),
            [_, _, extra, ..] => {
                let extra = extra.to_string_lossy();
                return Err(Failure::usage_help(format!("Unexpected argument: {extra}")));
            }
        };
        let named = |error| Failure::library(error, Frame::Named(name.to_string_lossy().into_owned()));
        let target = ImageSpec::from_name(name).map_err(named)?;
        let mut request = CreateRequest::new(target, format);
        request.options = options;
        request.size = size;
        request.backing = self.backing;
        request.backing_format = self.backing_format;
        request.unchecked = self.backing_unsafe;
        request.policy = self.how.native.policy(ui);
        request.historic = !ui.drop_in();
        request.secrets = self.how.native.keys.making(ui, Some(&self.new_key))?;
        if ui.drop_in() {
            request.durability = Durability::None;
        }
        let creation = plan(&request).map_err(named)?;
        let shown = creation.shown.clone();
        if ui.drop_in() && !self.quiet {
            ui.print(formatting(&name.to_string_lossy(), format, &shown))?;
        }
        let progress = Progress::begin(ui, Style::None)?;
        let made = creation.run(progress.job());
        progress.signals().die_if_cancelled(&made);
        made.map_err(named)?;
        self.how.native.keys.warn_if_unused(ui);
        if json {
            ui.print(to_json(&name.to_string_lossy(), format, &shown).pretty())?;
        } else if !ui.drop_in() && !self.quiet {
            ui.print(formatting(&name.to_string_lossy(), format, &shown))?;
        }
        Ok(Exit::OK)
    }
}

/// The line scripts see. Values with a comma have it doubled, as on the command line.
fn formatting(name: &str, format: &str, shown: &[(String, String)]) -> String {
    let mut out = format!("Formatting '{name}', fmt={format}");
    for (key, value) in shown {
        out.push_str(&format!(" {key}={}", value.replace(',', ",,")));
    }
    out.push('\n');
    out
}

fn to_json(name: &str, format: &str, shown: &[(String, String)]) -> Json {
    let options = shown.iter().map(|(key, value)| (key.as_str(), Json::text(value)));
    Json::ordered([
        ("filename", Json::text(name)),
        ("format", Json::text(format)),
        ("options", Json::ordered(options)),
    ])
}
