use std::ffi::OsString;

use clap::Args;
use diskmill::open;
use diskmill::ops::measure::{Source as Measured, run};
use diskmill_core::{CreateSpec, Error, Format, Measure, OptionError, Options, SecretError, Secrets};

use super::{LookArgs, Run, driver};
use crate::error::Failure;
use crate::exit::Exit;
use crate::json::Json;
use crate::keyval::{self, OptionList};
use crate::ui::Ui;

/// Reckon how much space a new image would take
#[derive(Args, Debug)]
#[command(override_usage = "diskmill measure [OPTIONS] (--size SIZE | FILENAME)")]
pub struct MeasureArgs {
    /// Format of the new image (default: raw)
    #[arg(short = 'O', long, value_name = "FMT")]
    target_format: Option<String>,
    /// Options of the new image
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Measure an empty disk of this size
    #[arg(short, long, value_name = "SIZE")]
    size: Option<String>,
    /// Measure this snapshot inside FILENAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    #[command(flatten)]
    look: LookArgs,
    /// Measure what converting this image would take
    #[arg(value_name = "FILENAME", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
}

impl Run for MeasureArgs {
    const NAME: &'static str = "measure";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.look.wants_json(ui)?;
        let size = match &self.size {
            Some(text) => Some(keyval::bytes("image size", text)?),
            None => None,
        };
        let format = self.target_format.as_deref().unwrap_or("raw");
        let measure = match (self.names.as_slice(), size) {
            ([_, _, ..], _) => return Err(Failure::usage("At most one filename argument is allowed.")),
            ([], _) if self.look.image_opts || self.look.format.is_some() || self.snapshot.is_some() => {
                return Err(Failure::usage(
                    "--image-opts, -f, and -l require a filename argument.",
                ));
            }
            ([], None) => {
                return Err(Failure::usage(
                    "Either --size N or one filename must be specified.",
                ));
            }
            ([_], Some(_)) => {
                return Err(Failure::usage(
                    "--size N cannot be used together with a filename.",
                ));
            }
            ([], Some(size)) => self.measure(ui, format, Measured::Size(size))?,
            ([name], None) => {
                let mut request = self.look.request(ui, name, None)?;
                request.snapshot = self.snapshot.as_deref().map(keyval::snapshot).transpose()?;
                let image = open::image(&request).map_err(|error| Failure::open(name, error))?;
                self.measure(ui, format, Measured::Image(&image))
                    .map_err(|failure| failure.path(name))?
            }
        };
        ui.print(if json {
            to_json(measure).pretty()
        } else {
            to_text(measure)
        })?;
        Ok(Exit::OK)
    }
}

impl MeasureArgs {
    fn measure(&self, ui: &Ui, format: &str, source: Measured<'_>) -> Result<Measure, Failure> {
        let secrets = self.look.native.keys.opening(ui)?;
        let driver = driver(format)?;
        let OptionList::Pairs(options) = keyval::option_list(&self.options)? else {
            return Err(Failure::usage(format!(
                "Invalid parameter 'help'\nqemu-img: Invalid options for file format '{format}'"
            )));
        };
        let mut spec = CreateSpec::default();
        if ui.drop_in() {
            demand_key(format, &options, &secrets)?;
            if driver.format() == Format::Qcow {
                let text = "Block driver 'qcow' does not support size measurement";
                return Err(Failure::refused(text));
            }
        }
        spec.options = options;
        spec.secrets = secrets;
        run(driver, &spec, source).map_err(|error| match error.find::<OptionError>() {
            Some(OptionError::Unknown(name)) => Failure::usage(format!(
                "Invalid parameter '{name}'\nqemu-img: Invalid options for file format '{format}'"
            )),
            _ => Failure::from(error),
        })
    }
}

/// Fails if the key of a new image that is encrypted is not given. Only the real tool needs one to measure it.
fn demand_key(format: &str, options: &Options, secrets: &Secrets) -> Result<(), Failure> {
    let option = match format {
        "luks" => "key-secret",
        "qcow2" if options.text("encrypt.format") == Some("luks") => "encrypt.key-secret",
        _ => return Ok(()),
    };
    match options.text(option) {
        Some(id) => secrets.named(id).map(drop)?,
        None => return Err(Error::from(SecretError::Missing(option)).into()),
    }
    Ok(())
}

fn to_text(measure: Measure) -> String {
    let mut out = format!(
        "required size: {}\nfully allocated size: {}\n",
        measure.required, measure.fully_allocated
    );
    if let Some(bitmaps) = measure.bitmaps {
        out.push_str(&format!("bitmaps size: {bitmaps}\n"));
    }
    out
}

fn to_json(measure: Measure) -> Json {
    let mut pairs = Vec::new();
    if let Some(bitmaps) = measure.bitmaps {
        pairs.push(("bitmaps", Json::Int(bitmaps)));
    }
    pairs.push(("required", Json::Int(measure.required)));
    pairs.push(("fully-allocated", Json::Int(measure.fully_allocated)));
    Json::object(pairs)
}
