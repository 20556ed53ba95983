use std::ffi::OsString;
use std::fmt::Write as _;

use clap::Args;
use diskmill::ops::compact::{Compacted, run};
use diskmill_core::{CompactSpec, Compression};

use super::{DoArgs, Run, Source};
use crate::error::Failure;
use crate::exit::Exit;
use crate::json::Json;
use crate::progress::{Progress, Style};
use crate::size::human;
use crate::ui::Ui;

/// Make the file of an image as small as what it holds, in place
#[derive(Args, Debug)]
#[command(
    after_help = "Space that leaks, and data that is all zeros, goes back to the host; what lies behind is moved down \
                  and the file is cut. Snapshots and bitmaps are kept. If it is interrupted, by a power cut too, \
                  nothing is lost: run it again."
)]
#[command(override_usage = "diskmill compact [OPTIONS] FILENAME")]
pub struct CompactArgs {
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Show progress: auto (bar on a terminal, else lines), bar, plain, json or none
    #[arg(
        short,
        long,
        value_name = "HOW",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "auto"
    )]
    progress: Option<String>,
    /// Format of the image, instead of finding it out
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options (driver=...,file.filename=...), not a name
    #[arg(long)]
    image_opts: bool,
    /// Cache mode of the image (default: writeback)
    #[arg(short = 'T', long, value_name = "CACHE_MODE")]
    cache: Option<String>,
    /// Say what would be saved; change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Compress data that is stored plain, where that saves space
    #[arg(short, long)]
    compress: bool,
    #[command(flatten)]
    how: DoArgs,
    /// The image
    #[arg(value_name = "FILENAME", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
}

impl Run for CompactArgs {
    const NAME: &'static str = "compact";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.how.wants_json(ui)?;
        let [name] = self.names.as_slice() else {
            return Err(Failure::usage_help("Expecting one image file name"));
        };
        let source = Source {
            format: self.format.as_deref(),
            image_opts: self.image_opts,
            cache: self.cache.as_deref(),
            ..Source::default()
        };
        let request = source.request(name, &self.how.native, ui)?;
        let mut spec = CompactSpec::default();
        spec.compress = self.compress.then(Compression::default);
        let style = Style::choose(ui, self.quiet, self.progress.as_deref(), self.how.native.json)?;
        let progress = Progress::begin(ui, style)?;
        let compacted = run(&request, &spec, self.dry_run, progress.job());
        progress.signals().die_if_cancelled(&compacted);
        if compacted.is_ok() {
            progress.complete();
        }
        progress.end();
        let compacted = compacted?;
        if json {
            ui.print(to_json(&compacted, self.dry_run).pretty())?;
        } else if !self.quiet {
            ui.print(to_text(&compacted, self.dry_run))?;
        }
        Ok(Exit::OK)
    }
}

fn to_text(compacted: &Compacted, dry_run: bool) -> String {
    let report = &compacted.report;
    let would = if dry_run { "would be " } else { "" };
    let mut out = String::new();
    let size = |bytes: u64| format!("{} ({bytes} bytes)", human(bytes));
    // A String takes whatever is written to it.
    let _ = match report.saved() {
        0 => writeln!(out, "Nothing to save."),
        saved => writeln!(out, "{} {would}saved.", size(saved)),
    };
    let what = if report.fixed_len {
        "end of the image"
    } else {
        "file length"
    };
    if report.len_before != report.len_after {
        let _ = writeln!(
            out,
            "{what}: {} -> {}",
            size(report.len_before),
            size(report.len_after)
        );
    }
    if report.fixed_len {
        let _ = writeln!(out, "The image is on a device, which keeps its length.");
    }
    for (bytes, text) in [
        (report.leaked, "leaked"),
        (report.zeros, "zeros, or tables of nothing"),
        (report.punched, "made holes of"),
        (report.moved, "moved"),
    ] {
        if bytes > 0 {
            let _ = writeln!(out, "{text}: {}", size(bytes));
        }
    }
    if report.compressed_units > 0 {
        let _ = writeln!(out, "clusters {would}compressed: {}", report.compressed_units);
    }
    if let Some((before, after)) = compacted.allocated.filter(|_| !dry_run) {
        let _ = writeln!(out, "disk usage: {} -> {}", human(before), human(after));
    }
    out
}

fn to_json(compacted: &Compacted, dry_run: bool) -> Json {
    let report = &compacted.report;
    let mut pairs = vec![
        ("filename", Json::text(&compacted.filename)),
        ("format", Json::text(compacted.format.name())),
        ("dry-run", Json::Bool(dry_run)),
        ("saved", Json::Int(report.saved())),
        ("length-before", Json::Int(report.len_before)),
        ("length-after", Json::Int(report.len_after)),
        ("fixed-length", Json::Bool(report.fixed_len)),
        ("leaked", Json::Int(report.leaked)),
        ("zeros", Json::Int(report.zeros)),
        ("punched", Json::Int(report.punched)),
        ("moved", Json::Int(report.moved)),
        ("compressed-clusters", Json::Int(report.compressed_units)),
    ];
    if let Some((before, after)) = compacted.allocated {
        pairs.push(("actual-size-before", Json::Int(before)));
        if !dry_run {
            pairs.push(("actual-size-after", Json::Int(after)));
        }
    }
    Json::ordered(pairs)
}
