use std::ffi::OsString;
use std::fmt::Write as _;

use clap::Args;
use diskmill::open;
use diskmill::ops::map::{MapEntry, walk};
use diskmill_core::{Error, ErrorKind};

use super::{LookArgs, Run};
use crate::error::{Failure, Frame};
use crate::exit::Exit;
use crate::keyval;
use crate::ui::Ui;

/// Text is handed on once there is this much of it, so that a long map needs no memory.
const BATCH: usize = 64 << 10;

/// Show where the data of an image is
#[derive(Args, Debug)]
#[command(override_usage = "diskmill map [OPTIONS] FILENAME")]
pub struct MapArgs {
    /// Where to start in the virtual disk
    #[arg(short, long, value_name = "OFFSET")]
    start_offset: Option<String>,
    /// How much of the virtual disk to show
    #[arg(short = 'l', long, value_name = "LENGTH")]
    max_length: Option<String>,
    #[command(flatten)]
    look: LookArgs,
    /// The image
    #[arg(value_name = "FILENAME", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
}

impl Run for MapArgs {
    const NAME: &'static str = "map";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.look.wants_json(ui)?;
        let start = match &self.start_offset {
            Some(text) => keyval::bytes("start offset", text)?,
            None => 0,
        };
        let max = match &self.max_length {
            Some(text) => Some(keyval::bytes("max length", text)?),
            None => None,
        };
        let [name] = self.names.as_slice() else {
            return Err(Failure::usage_help("Expecting one image file name"));
        };
        let request = self.look.request(ui, name, None)?;
        let image = open::image(&request).map_err(|error| Failure::open(name, error))?;
        let mut printer = Printer::new(ui, json);
        let walked = walk(&image, start, max, &mut |entry| printer.entry(&entry));
        printer.end(start, walked.map_err(|error| error.op("map").path(name)))?;
        Ok(Exit::OK)
    }
}

struct Printer<'a> {
    ui: &'a Ui,
    json: bool,
    out: String,
    any: bool,
    failure: Option<Failure>,
}

impl<'a> Printer<'a> {
    fn new(ui: &'a Ui, json: bool) -> Self {
        let out = if json {
            String::from("[")
        } else {
            format!("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File")
        };
        Self {
            ui,
            json,
            out,
            any: false,
            failure: None,
        }
    }

    fn entry(&mut self, entry: &MapEntry) -> diskmill_core::Result<()> {
        if self.json {
            if self.any {
                self.out.push_str(",\n");
            }
            self.json_entry(entry);
        } else if entry.data && !entry.zero {
            self.human_entry(entry)?;
        }
        self.any = true;
        if self.out.len() >= BATCH {
            let printed = self.ui.print(std::mem::take(&mut self.out));
            self.stop_on(printed)?;
        }
        Ok(())
    }

    fn json_entry(&mut self, entry: &MapEntry) {
        // A String takes whatever is written to it.
        let _ = write!(
            self.out,
            "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": {}",
            entry.start, entry.length, entry.depth, entry.present, entry.zero, entry.data, entry.compressed
        );
        if let Some(offset) = entry.offset {
            let _ = write!(self.out, ", \"offset\": {offset}");
        }
        self.out.push('}');
    }

    fn human_entry(&mut self, entry: &MapEntry) -> diskmill_core::Result<()> {
        let place = match entry.offset {
            Some(offset) => hex(offset),
            None if self.ui.drop_in() => {
                return self.stop_on(Err(Failure::usage(
                    "File contains external, encrypted or compressed clusters.",
                )));
            }
            None if entry.compressed => "compressed".to_owned(),
            None => "encrypted".to_owned(),
        };
        let file = entry.filename.as_deref().unwrap_or_default();
        // A String takes whatever is written to it.
        let _ = writeln!(
            self.out,
            "{:<16}{:<16}{place:<16}{}",
            hex(entry.start.get()),
            hex(entry.length),
            self.ui.name(file)
        );
        Ok(())
    }

    /// Ends the walk with a failure of our own.
    fn stop_on(&mut self, result: Result<(), Failure>) -> diskmill_core::Result<()> {
        match result {
            Ok(()) => Ok(()),
            Err(failure) => {
                self.failure = Some(failure);
                Err(Error::bare(ErrorKind::Cancelled))
            }
        }
    }

    fn end(mut self, start: u64, walked: diskmill_core::Result<()>) -> Result<(), Failure> {
        if walked.is_ok() && self.json {
            if !self.any {
                let _ = write!(
                    self.out,
                    "{{ \"start\": {start}, \"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \"data\": false, \"compressed\": false}}"
                );
            }
            self.out.push_str("]\n");
        }
        self.ui.print(&self.out)?;
        match (self.failure, walked) {
            (Some(failure), _) => Err(failure),
            (None, Err(error)) => Err(Failure::library(error, Frame::Plain)),
            (None, Ok(())) => Ok(()),
        }
    }
}

/// As C's `%#x`: without `0x` for 0.
fn hex(number: u64) -> String {
    match number {
        0 => "0".to_owned(),
        number => format!("{number:#x}"),
    }
}
