use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use clap::Args;
use diskmill::open::{self, OpenRequest};
use diskmill::ops::convert::{ExistingImage, Extract, Input, NewImage, Output, Plan, run};
use diskmill::spec::ImageSpec;
use diskmill_core::Error;
use diskmill_formats::registry;

use super::{DoArgs, Run, Source};
use crate::error::{Failure, Frame};
use crate::exit::Exit;
use crate::json::Json;
use crate::keyval;
use crate::progress::{Progress, Style};
use crate::ui::Ui;

/// Copy a part of an image
#[derive(Args, Debug)]
#[command(
    override_usage = "diskmill dd [OPTIONS] [bs=BLOCK_SIZE] [count=BLOCKS] [skip=BLOCKS] [isize=BYTES] [osize=BYTES] if=INPUT of=OUTPUT"
)]
pub struct DdArgs {
    /// Format of the input, instead of finding it out
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// The input is a list of options (driver=...,file.filename=...), not a name
    #[arg(long)]
    image_opts: bool,
    /// Format of the output (default: raw)
    #[arg(short = 'O', long, value_name = "OUTPUT_FMT")]
    output_format: Option<String>,
    /// Read the input even while another process writes it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Write into an output that exists already
    #[arg(short, long)]
    no_create: bool,
    /// Copy this snapshot inside the input
    #[arg(short = 'l', long, value_name = "SNAPSHOT_PARAMS")]
    snapshot: Option<String>,
    #[command(flatten)]
    how: DoArgs,
    /// if=INPUT, of=OUTPUT, bs=BLOCK_SIZE (default: 512; suffixes k M G T), count=BLOCKS, skip=BLOCKS, isize=BYTES to
    /// read at most, osize=BYTES of the output
    #[arg(value_name = "OPERAND")]
    operands: Vec<OsString>,
}

/// The largest block.
const MOST: u64 = i32::MAX as u64;

/// What the operands come to.
#[derive(Debug)]
struct Operands {
    input: Option<OsString>,
    output: Option<OsString>,
    block: u64,
    count: Option<u64>,
    skip: u64,
    input_size: Option<u64>,
    output_size: Option<u64>,
}

impl Operands {
    fn parse(words: &[OsString]) -> Result<Self, Failure> {
        let mut operands = Self {
            input: None,
            output: None,
            block: 512,
            count: None,
            skip: 0,
            input_size: None,
            output_size: None,
        };
        let most = i64::MAX as u64;
        for word in words {
            let bytes = word.as_bytes();
            let unknown = |name: &[u8]| {
                let name = String::from_utf8_lossy(name);
                Failure::usage(format!("unrecognized operand {name}"))
            };
            let Some(end) = bytes.iter().position(|byte| *byte == b'=') else {
                return Err(unknown(bytes));
            };
            let value = OsStr::from_bytes(&bytes[end + 1..]);
            let text = value.to_string_lossy();
            match &bytes[..end] {
                b"if" => operands.input = Some(value.to_owned()),
                b"of" => operands.output = Some(value.to_owned()),
                b"bs" => operands.block = keyval::number("bs", &text, 1, MOST)?,
                b"count" => operands.count = Some(keyval::plain_number("count", &text, 0, most)?),
                b"skip" => operands.skip = keyval::plain_number("skip", &text, 0, most)?,
                b"isize" => operands.input_size = Some(keyval::bytes("isize", &text)?),
                b"osize" => operands.output_size = Some(keyval::bytes("osize", &text)?),
                name => return Err(unknown(name)),
            }
        }
        Ok(operands)
    }

    /// What is to be copied of an input of `size` bytes, if that is known; and whether it ends before that begins.
    ///
    /// The real tool counts the blocks it skips among those it copies.
    fn extract(&self, size: Option<u64>, counts_skipped: bool) -> (Extract, bool) {
        let skip = self.skip.saturating_mul(self.block);
        let mut len = self.count.map(|count| count.saturating_mul(self.block));
        if let Some(most) = self.input_size {
            len = Some(len.unwrap_or(u64::MAX).min(most));
        }
        let end = size.unwrap_or(u64::MAX).min(match len {
            Some(len) if counts_skipped => len,
            _ => u64::MAX,
        });
        if counts_skipped {
            len = len.map(|len| len.saturating_sub(skip));
        }
        let extract = Extract {
            skip,
            len,
            size: self.output_size,
        };
        (extract, skip > end)
    }
}

impl Run for DdArgs {
    const NAME: &'static str = "dd";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.how.wants_json(ui)?;
        let operands = Operands::parse(&self.operands)?;
        let format = self.output_format.as_deref().unwrap_or("raw");
        // Sizes that the real tool does not know are what callers give who mean standard input or output.
        let streams = !ui.drop_in() || operands.input_size.or(operands.output_size).is_some();
        if !streams && (operands.input.is_none() || operands.output.is_none()) {
            return Err(Failure::usage("Must specify both input and output files"));
        }
        if registry::by_name(format).is_none() {
            return Err(Failure::usage("Unknown file format"));
        }
        let standard = |name: &OsString| !ui.drop_in() && name == "-";
        let input = operands.input.as_ref().filter(|name| !standard(name));
        let output = operands.output.as_ref().filter(|name| !standard(name));
        let mut size = None;
        let source = match input {
            None => {
                self.how.native.keys.leave_stdin(ui, None)?;
                Input::Stdin
            }
            Some(name) => {
                let request = self.source(ui, name)?;
                let image = open::image(&request).map_err(|error| Failure::open(name, error))?;
                size = Some(image.chain.virtual_size());
                Input::Image(Box::new(request))
            }
        };
        let (extract, too_short) = operands.extract(size, ui.drop_in());
        if let (true, Some(name)) = (too_short, input) {
            let name = name.to_string_lossy();
            ui.note(&format!(
                "{}: {}: cannot skip to specified offset\n",
                ui.program(),
                ui.name(&name)
            ));
        }
        let target = self.target(ui, output, format)?;
        let to_stdout = matches!(target, Output::Stdout);
        let mut plan = Plan::new(source, target);
        plan.extract = Some(extract);
        let progress = Progress::begin(ui, Style::None)?;
        let done = run(&plan, progress.job());
        progress.signals().die_if_cancelled(&done);
        let summary = done.map_err(|error| failed(error, input, output))?;
        if json && !to_stdout {
            let result = Json::ordered([
                ("virtual-size", Json::Int(summary.virtual_size)),
                ("bytes-read", Json::Int(summary.read)),
                ("bytes-stored", Json::Int(summary.stored)),
            ]);
            ui.print(result.pretty())?;
        }
        Ok(Exit::OK)
    }
}

impl DdArgs {
    fn source(&self, ui: &Ui, name: &OsString) -> Result<OpenRequest, Failure> {
        let snapshot = self.snapshot.as_deref().map(keyval::snapshot).transpose()?;
        let source = Source {
            format: self.format.as_deref(),
            image_opts: self.image_opts,
            share: self.force_share,
            snapshot,
            ..Source::default()
        };
        source.request(name, &self.how.native, ui)
    }

    fn target(&self, ui: &Ui, output: Option<&OsString>, format: &str) -> Result<Output, Failure> {
        let Some(name) = output else {
            return match format {
                "raw" => Ok(Output::Stdout),
                format => Err(Failure::usage(format!(
                    "standard output can only be raw, since {format} is not written from front to back"
                ))),
            };
        };
        if self.no_create {
            let source = Source {
                format: Some(format),
                ..Source::default()
            };
            let request = source.request(name, &self.how.native, ui)?;
            return Ok(Output::Existing(ExistingImage::new(request)));
        }
        let spec = ImageSpec::from_name(name).map_err(|error| creating(error, name))?;
        let mut new = NewImage::new(spec, format);
        new.secrets = self.how.native.keys.making(ui, None)?;
        Ok(Output::New(new))
    }
}

fn creating(error: Error, name: &OsStr) -> Failure {
    let name = name.to_string_lossy();
    Failure::library(
        error,
        Frame::Text(format!("{name}: error while creating output image")),
    )
}

/// Introduces an error by the file it is about, as the real tool does.
fn failed(error: Error, input: Option<&OsString>, output: Option<&OsString>) -> Failure {
    let path = error.context().path.clone().map(OsString::from);
    let is = |name: &&OsString| path.as_ref() == Some(*name);
    if let (Some("read"), Some(at)) = (error.context().op, error.context().guest) {
        return Failure::reading(at.get(), error);
    }
    if let Some(name) = output.filter(is) {
        return creating(error, name);
    }
    match input.filter(is) {
        Some(name) => Failure::open(name, error),
        None => Failure::from(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extract(text: &str, size: u64, counts_skipped: bool) -> (u64, Option<u64>, bool) {
        let words: Vec<OsString> = text.split_whitespace().map(OsString::from).collect();
        let operands = Operands::parse(&words).unwrap_or_else(|_| panic!("{text}"));
        let (extract, too_short) = operands.extract(Some(size), counts_skipped);
        (extract.skip, extract.len, too_short)
    }

    #[test]
    fn blocks_are_counted_from_the_start_by_the_real_tool_and_from_what_is_skipped_by_ours() {
        assert_eq!(
            extract("bs=1k skip=2 count=3", 10240, true),
            (2048, Some(1024), false)
        );
        assert_eq!(
            extract("bs=1k skip=2 count=3", 10240, false),
            (2048, Some(3072), false)
        );
        assert_eq!(
            extract("bs=1k skip=5 count=3", 10240, true),
            (5120, Some(0), true)
        );
        assert_eq!(extract("bs=1k skip=20", 10240, false), (20480, None, true));
        assert_eq!(extract("skip=20", 10240, true), (10240, None, false));
        let huge = "bs=2G skip=9223372036854775807";
        assert_eq!(
            extract(huge.replace("2G", "1G").as_str(), 10240, true),
            (u64::MAX, None, true)
        );
    }

    #[test]
    fn operands_that_make_no_sense_are_refused() {
        for text in [
            "seek=1", "bogus", "bs=0", "bs=3G", "bs=x", "count=1k", "count=-1", "skip=1k", "isize=x",
        ] {
            assert!(Operands::parse(&[text.into()]).is_err(), "{text}");
        }
    }
}
