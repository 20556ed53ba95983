use std::ffi::OsString;
use std::fmt::Write as _;

use clap::Args;
use diskmill::ops::check::{CheckUnsupported, Checked, Reach, repair, run};
use diskmill_core::{CheckReport, FindingKind, Format, Repair};

use super::{LookArgs, Run, package};
use crate::error::{Failure, Frame};
use crate::exit::Exit;
use crate::json::Json;
use crate::progress::{Progress, Style};
use crate::ui::Ui;

/// Check whether an image is sound
#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes: 0 sound, 1 not checked, 2 corrupt, 3 leaks space, 63 the format has nothing to check"
)]
#[command(override_usage = "diskmill check [OPTIONS] FILENAME")]
pub struct CheckArgs {
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Cache mode of the image (default: writeback)
    #[arg(short = 'T', long, value_name = "CACHE")]
    cache: Option<String>,
    /// Put right what is found: only space that leaks (leaks), or everything (all)
    #[arg(short, long, value_name = "leaks|all")]
    repair: Option<String>,
    #[command(flatten)]
    look: LookArgs,
    /// The image
    #[arg(value_name = "FILENAME", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
}

impl Run for CheckArgs {
    const NAME: &'static str = "check";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.look.wants_json(ui)?;
        let what = match self.repair.as_deref() {
            None => None,
            Some("leaks") => Some(Repair::Leaks),
            Some("all") => Some(Repair::All),
            Some(other) => {
                return Err(Failure::usage_help(format!(
                    "--repair (-r) expects 'leaks' or 'all' not '{other}'"
                )));
            }
        };
        let [name] = self.names.as_slice() else {
            return Err(Failure::usage_help("Expecting one image file name"));
        };
        let request = self.look.request(ui, name, self.cache.as_deref())?;
        if self.repair.is_none()
            && let Some(package) = package::look(ui, name, &request)?
        {
            return package::check(&package, name, json, self.quiet, ui);
        }
        let progress = Progress::begin(ui, Style::None)?;
        let reach = match ui.drop_in() {
            true => Reach::QemuImg,
            false => Reach::Ours,
        };
        let checked = match what {
            None => run(&request, reach, progress.job()),
            Some(what) => repair(&request, what, reach, progress.job()),
        };
        progress.signals().die_if_cancelled(&checked);
        let checked = match checked {
            Ok(checked) => checked,
            Err(error) if error.find::<CheckUnsupported>().is_some() => {
                return Err(unsupported(ui, error));
            }
            // Opening is over by then: it is the work on the tables that failed.
            Err(error) if error.context().op == Some("repair") => {
                return Err(Failure::library(error, Frame::Text("Check failed".to_owned())));
            }
            Err(error) => return Err(Failure::open(name, error)),
        };
        let checked = match ui.drop_in() {
            true => as_theirs(checked),
            false => checked,
        };
        ui.note(&findings(&checked.report, ui));
        if json {
            ui.print(to_json(&checked).pretty())?;
        } else if !self.quiet {
            ui.print(fixed_text(&checked.report, ui) + &to_text(&checked.report))?;
        }
        Ok(exit(&checked.report))
    }
}

fn unsupported(ui: &Ui, error: diskmill_core::Error) -> Failure {
    let failure = if ui.drop_in() {
        Failure::refused("This image format does not support checks")
    } else {
        Failure::from(error)
    };
    failure.exit_with(Exit::CHECK_UNSUPPORTED)
}

fn exit(report: &CheckReport) -> Exit {
    match report {
        // What could not be looked at may be worse than what was found.
        report if report.check_errors > 0 => Exit::FAILED,
        report if report.corruptions > 0 => Exit::CHECK_CORRUPT,
        report if report.leaks > 0 => Exit::CHECK_LEAKS,
        _ => Exit::OK,
    }
}

/// What was found, a line each, for standard error. Scripts look for the first word.
fn findings(report: &CheckReport, ui: &Ui) -> String {
    let mut out = String::new();
    for finding in &report.findings {
        let word = match finding.kind {
            _ if finding.fixed => "Repairing",
            FindingKind::Corruption | FindingKind::Error => "ERROR",
            FindingKind::Leak => "Leaked",
            _ => "Note:",
        };
        // A String takes whatever is written to it.
        let _ = writeln!(out, "{word} {}", ui.name(&finding.text));
    }
    out
}

/// What a repair did.
fn fixed_text(report: &CheckReport, ui: &Ui) -> String {
    let (leaks, corruptions) = (report.leaks_fixed, report.corruptions_fixed);
    match (leaks, corruptions) {
        (0, 0) => String::new(),
        _ if ui.drop_in() => format!(
            "The following inconsistencies were found and repaired:\n\n    {leaks} leaked clusters\n    \
             {corruptions} corruptions\n\nDouble checking the fixed image now...\n"
        ),
        _ => format!("Repaired: {corruptions} errors, {leaks} leaked clusters. Checked again after that:\n"),
    }
}

fn to_text(report: &CheckReport) -> String {
    let mut out = String::new();
    let clean = report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0;
    if clean {
        out.push_str("No errors were found on the image.\n");
    }
    // A String takes whatever is written to it.
    if report.corruptions > 0 {
        let _ = write!(
            out,
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
            report.corruptions
        );
    }
    if report.leaks > 0 {
        let _ = write!(
            out,
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            report.leaks
        );
    }
    if report.check_errors > 0 {
        let _ = write!(
            out,
            "\n{} internal errors have occurred during the check.\n",
            report.check_errors
        );
    }
    if report.total_units > 0 && report.allocated_units > 0 {
        let _ = writeln!(
            out,
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            report.allocated_units,
            report.total_units,
            percent(report.allocated_units, report.total_units),
            percent(report.fragmented_units, report.allocated_units),
            percent(report.compressed_units, report.allocated_units)
        );
    }
    if let Some(end) = report.image_end_offset.filter(|end| end.get() > 0) {
        let _ = writeln!(out, "Image end offset: {end}");
    }
    out
}

/// Of vmdk images `qemu-img` counts nothing.
fn as_theirs(mut checked: Checked) -> Checked {
    if checked.format == Format::Vmdk {
        let report = &mut checked.report;
        report.image_end_offset = None;
        (report.total_units, report.allocated_units) = (0, 0);
        (report.fragmented_units, report.compressed_units) = (0, 0);
    }
    checked
}

fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}

fn to_json(checked: &Checked) -> Json {
    let report = &checked.report;
    let mut pairs = vec![
        ("filename", Json::text(&checked.filename)),
        ("format", Json::text(checked.format.name())),
        ("check-errors", Json::Int(report.check_errors)),
    ];
    let optional = [
        (
            "image-end-offset",
            report.image_end_offset.map_or(0, |end| end.get()),
        ),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("total-clusters", report.total_units),
        ("allocated-clusters", report.allocated_units),
        ("fragmented-clusters", report.fragmented_units),
        ("compressed-clusters", report.compressed_units),
    ];
    pairs.extend(
        optional
            .into_iter()
            .filter(|(_, value)| *value > 0)
            .map(|(key, value)| (key, Json::Int(value))),
    );
    Json::object(pairs)
}
