use std::cell::Cell;
use std::ffi::OsString;

use clap::Args;
use diskmill::open;
use diskmill::ops::compare::{CompareError, CompareOptions, Difference, Side, Verdict, run};
use diskmill::package::PackageError;
use diskmill_core::Error;

use super::{DiskArgs, DoArgs, Run, Source};
use crate::error::{Failure, Frame};
use crate::exit::Exit;
use crate::json::Json;
use crate::progress::{Progress, Style};
use crate::ui::Ui;

/// Tell whether two images hold the same
#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes: 0 the same, 1 different, 2 not opened, 3 map not readable, 4 data not readable"
)]
#[command(override_usage = "diskmill compare [OPTIONS] FILENAME1 FILENAME2")]
pub struct CompareArgs {
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Show progress
    ///
    /// HOW is auto (the default: a bar on a terminal, lines elsewhere), bar, plain, json or none.
    #[arg(short, long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "auto")]
    progress: Option<String>,
    /// Format of the first image
    #[arg(short = 'f', long, value_name = "FMT")]
    a_format: Option<String>,
    /// Format of the second image
    #[arg(short = 'F', long, value_name = "FMT")]
    b_format: Option<String>,
    /// The file names are lists of options, not names
    #[arg(long)]
    image_opts: bool,
    /// Sizes and what is allocated must be the same too
    #[arg(short, long)]
    strict: bool,
    /// Cache mode of both images (default: writeback)
    #[arg(short = 'T', long, value_name = "CACHE_MODE")]
    cache: Option<String>,
    /// Read them even while another process writes them
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    how: DoArgs,
    #[command(flatten)]
    which: DiskArgs,
    /// The two images
    #[arg(value_name = "FILENAME1 FILENAME2", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
}

impl Run for CompareArgs {
    const NAME: &'static str = "compare";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let [first, second] = self.names.as_slice() else {
            let failure = Failure::usage_help("Expecting two image file names");
            // 1 means "different"; the real tool says so here nevertheless.
            return Err(failure.exit_with(if ui.drop_in() {
                Exit::FAILED
            } else {
                Exit::COMPARE_OPEN
            }));
        };
        self.compare(ui, first, second)
    }
}

/// Whether a disk was to be chosen of something that is no package.
fn is_no_package(error: &diskmill_core::Error) -> bool {
    matches!(error.find::<PackageError>(), Some(PackageError::NotAPackage(_)))
}

impl CompareArgs {
    fn compare(&self, ui: &Ui, first: &OsString, second: &OsString) -> Result<Exit, Failure> {
        let not_open = |failure: Failure| failure.exit_with(Exit::COMPARE_OPEN);
        let json = self.how.wants_json(ui).map_err(not_open)?;
        let style = Style::choose(ui, self.quiet, self.progress.as_deref(), self.how.native.json)
            .map_err(not_open)?;
        let attempt = |name: &OsString, format: Option<&str>, disk: Option<String>| {
            let source = Source {
                format,
                image_opts: self.image_opts,
                share: self.force_share,
                cache: self.cache.as_deref(),
                snapshot: None,
                disk,
            };
            let request = source.request(name, &self.how.native, ui)?;
            Ok::<_, Failure>(open::image(&request))
        };
        // A disk is chosen of whichever of the two is a package.
        let packages = Cell::new(0);
        let open = |name: &OsString, format: Option<&str>| {
            let opened = match attempt(name, format, self.which.disk.clone())? {
                Err(error) if is_no_package(&error) => attempt(name, format, None)?,
                opened => {
                    packages.set(packages.get() + 1);
                    opened
                }
            };
            opened.map_err(|error| Failure::open(name, error))
        };
        let one = open(first, self.a_format.as_deref()).map_err(not_open)?;
        let two = open(second, self.b_format.as_deref()).map_err(not_open)?;
        if let (0, Some(disk)) = (packages.get(), &self.which.disk) {
            return Err(not_open(Failure::usage(format!(
                "neither image is an OVF package, so --disk '{disk}' makes no sense"
            ))));
        }
        let shorter = one.chain.virtual_size().min(two.chain.virtual_size());
        let progress = Progress::begin(ui, style)?;
        let options = CompareOptions {
            strict: self.strict,
            threads: 0,
        };
        let verdict = run(&one, &two, options, progress.job());
        progress.signals().die_if_cancelled(&verdict);
        let end = match verdict {
            Ok(verdict) => self.tell(ui, &progress, verdict, shorter, json),
            Err(error) => Err(failed(error, first, second)),
        };
        progress.end();
        end
    }

    fn tell(
        &self,
        ui: &Ui,
        progress: &Progress,
        verdict: Verdict,
        shorter: u64,
        json: bool,
    ) -> Result<Exit, Failure> {
        if json {
            ui.print(to_json(verdict).pretty())?;
        } else if !self.quiet {
            // It is noticed where the shorter image ends, so not if they differ before.
            let noticed = match verdict.difference {
                Some(Difference::Size) => false,
                Some(Difference::Content { offset } | Difference::Allocation { offset }) => offset >= shorter,
                _ => true,
            };
            if verdict.sizes_differ && noticed {
                ui.print("Warning: Image size mismatch!\n")?;
            }
            if verdict.difference.is_none() {
                progress.complete_once();
            }
            ui.print(to_text(verdict))?;
        }
        Ok(match verdict.difference {
            None => Exit::OK,
            Some(_) => Exit::COMPARE_DIFFERS,
        })
    }
}

fn to_text(verdict: Verdict) -> String {
    match verdict.difference {
        None => "Images are identical.\n".to_owned(),
        Some(Difference::Size) => "Strict mode: Image size mismatch!\n".to_owned(),
        Some(Difference::Allocation { offset }) => {
            format!("Strict mode: Offset {offset} block status mismatch!\n")
        }
        Some(Difference::Content { offset }) => format!("Content mismatch at offset {offset}!\n"),
        Some(other) => format!("The images differ: {other:?}\n"),
    }
}

fn to_json(verdict: Verdict) -> Json {
    let mut pairs = vec![
        ("identical", Json::Bool(verdict.difference.is_none())),
        ("sizes-differ", Json::Bool(verdict.sizes_differ)),
    ];
    match verdict.difference {
        Some(Difference::Size) => pairs.push(("difference", Json::text("size"))),
        Some(Difference::Allocation { offset }) => {
            pairs.push(("difference", Json::text("allocation")));
            pairs.push(("offset", Json::Int(offset)));
        }
        Some(Difference::Content { offset }) => {
            pairs.push(("difference", Json::text("content")));
            pairs.push(("offset", Json::Int(offset)));
        }
        _ => {}
    }
    Json::ordered(pairs)
}

/// Names the image and the place.
fn failed(error: Error, first: &OsString, second: &OsString) -> Failure {
    let (side, offset, source, what, exit) = match error.find::<CompareError>() {
        Some(CompareError::Map { side, offset, source }) => {
            (side, offset, source, "the map at offset", Exit::COMPARE_MAP)
        }
        Some(CompareError::Read { side, offset, source }) => {
            (side, offset, source, "offset", Exit::COMPARE_READ)
        }
        _ => return Failure::from(error).exit_with(Exit::COMPARE_READ),
    };
    let name = match side {
        Side::First => first,
        Side::Second => second,
    };
    // The layer that failed knows the place better than the one who asked for a whole chunk.
    let at = source.context().guest.map_or(*offset, |at| at.get());
    let frame = Frame::Text(format!(
        "Error while reading {what} {at} of {}",
        name.to_string_lossy()
    ));
    Failure::library(error.op("read").path(name), frame).exit_with(exit)
}
