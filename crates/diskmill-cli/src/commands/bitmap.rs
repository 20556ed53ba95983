use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::path::Path;

use clap::builder::ValueParser;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use diskmill::ops::bitmap::{Action, BitmapFailure, BitmapRequest, Export, change};
use diskmill_core::{BitmapFacts, Error};

use super::resize::tell;
use super::{DoArgs, NATIVE, Run, Source};
use crate::error::{Failure, Frame};
use crate::exit::Exit;
use crate::json::Json;
use crate::keyval;
use crate::progress::{Progress, Style};
use crate::size::human;
use crate::ui::Ui;

/// Make, change or remove dirty bitmaps of an image, or export what one says is dirty
#[derive(Args, Debug)]
#[command(
    override_usage = "diskmill bitmap (--merge SOURCE | --add | --remove | --clear | --enable | --disable)... [OPTIONS] FILENAME BITMAP\n       \
                      diskmill bitmap export [--copy OUT [-O FMT]] [OPTIONS] FILENAME BITMAP",
    after_help = "Actions are done in the order in which they are given. 'export' prints the dirty ranges; --copy also \
                  stores them, and nothing else, as the body of an incremental backup. A raw copy is sparse and as large \
                  as the disk; a qcow2 copy is an overlay that names no backing image: give it one with \
                  'qemu-img rebase -u'."
)]
pub struct BitmapArgs {
    /// Format of the image, instead of finding it out
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options (driver=...,file.filename=...), not a name
    #[arg(long)]
    image_opts: bool,
    #[command(flatten)]
    actions: Actions,
    /// Granularity of the bitmap to add, in bytes: a power of two, 512 to 2G (default: the cluster size within 4k to 64k)
    #[arg(short, long, value_name = "GRANULARITY")]
    granularity: Option<String>,
    /// The image with the bitmap to merge, if it is another one
    #[arg(short = 'b', long, value_name = "SOURCE_FILE", value_hint = clap::ValueHint::FilePath)]
    source_file: Option<OsString>,
    /// Format of that image, instead of finding it out
    #[arg(short = 'F', long, value_name = "SOURCE_FMT")]
    source_format: Option<String>,
    #[command(flatten)]
    how: DoArgs,
    /// The image, and the name of the bitmap
    #[arg(value_name = "FILENAME BITMAP", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
    /// With export: store the dirty ranges in this new file
    #[arg(long, value_name = "OUT", value_hint = clap::ValueHint::FilePath, help_heading = NATIVE)]
    copy: Option<OsString>,
    /// With export --copy: the format of the new file, raw (the default) or qcow2
    #[arg(short = 'O', long, value_name = "FMT", help_heading = NATIVE)]
    copy_format: Option<String>,
    /// With export: read the image even while another process writes it
    #[arg(short = 'U', long, help_heading = NATIVE)]
    force_share: bool,
    /// With export: print nothing but errors
    #[arg(short, long, help_heading = NATIVE)]
    quiet: bool,
}

/// What is to be done, in the order of the command line.
#[derive(Debug)]
struct Actions(Vec<Action>);

/// The actions without a value.
const PLAIN: [(&str, Action, &str); 5] = [
    (
        "add",
        Action::Add,
        "Make the bitmap; changes of the disk are recorded in it from then on",
    ),
    ("remove", Action::Remove, "Remove the bitmap"),
    ("clear", Action::Clear, "Make nothing dirty in it"),
    ("enable", Action::Enable, "Record changes of the disk in it"),
    ("disable", Action::Disable, "Stop recording changes in it"),
];

impl Args for Actions {
    fn augment_args(command: Command) -> Command {
        let plain = PLAIN.iter().map(|(name, _, help)| {
            Arg::new(*name)
                .long(*name)
                .help(*help)
                .action(ArgAction::Append)
                .num_args(0)
                .default_missing_value("")
        });
        let merge = Arg::new("merge")
            .long("merge")
            .value_name("SOURCE")
            .help("Make dirty in it what is dirty in the bitmap SOURCE")
            .action(ArgAction::Append)
            .value_parser(ValueParser::string());
        command.args(plain).arg(merge)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Actions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut actions: Vec<(usize, Action)> = Vec::new();
        for (name, action, _) in &PLAIN {
            let places = matches.indices_of(name).into_iter().flatten();
            actions.extend(places.map(|place| (place, action.clone())));
        }
        let sources = matches.get_many::<String>("merge").into_iter().flatten();
        let places = matches.indices_of("merge").into_iter().flatten();
        actions.extend(
            places
                .zip(sources)
                .map(|(place, source)| (place, Action::Merge(source.clone()))),
        );
        actions.sort_by_key(|(place, _)| *place);
        Ok(Self(actions.into_iter().map(|(_, action)| action).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Run for BitmapArgs {
    const NAME: &'static str = "bitmap";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.how.wants_json(ui)?;
        if let (false, [word, names @ ..]) = (ui.drop_in(), self.names.as_slice())
            && word == "export"
            && (names.len() == 2 || self.actions.0.is_empty())
        {
            return self.export(ui, names, json);
        }
        let merges = self
            .actions
            .0
            .iter()
            .any(|action| matches!(action, Action::Merge(_)));
        let granularity = match self.granularity.as_deref() {
            None => None,
            Some(text) => Some(keyval::bytes("granularity", text)?),
        };
        let native_only = self.copy.is_some() || self.copy_format.is_some() || self.force_share || self.quiet;
        let wrong = [
            (
                self.actions.0.is_empty(),
                "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
            ),
            (
                granularity.is_some() && !self.actions.0.contains(&Action::Add),
                "granularity only supported with --add",
            ),
            (
                self.source_format.is_some() && self.source_file.is_none(),
                "-F only supported with -b",
            ),
            (
                self.source_file.is_some() && !merges,
                "Merge bitmap source file only supported with --merge",
            ),
            (
                native_only,
                "--copy, --copy-format, --force-share and --quiet are for 'bitmap export' only",
            ),
        ];
        if let Some((_, text)) = wrong.into_iter().find(|(is_so, _)| *is_so) {
            return Err(Failure::usage(text));
        }
        let [name, bitmap] = self.names.as_slice() else {
            return Err(Failure::usage("Expecting filename and bitmap name"));
        };
        let bitmap = bitmap.to_string_lossy().into_owned();
        let source = Source {
            format: self.format.as_deref(),
            image_opts: self.image_opts,
            ..Source::default()
        };
        let open = source.request(name, &self.how.native, ui)?;
        let mut request = BitmapRequest::new(open, bitmap, self.actions.0);
        // 0 is as good as nothing said.
        request.granularity = granularity.filter(|bytes| *bytes != 0);
        if let Some(name) = &self.source_file {
            let source = Source {
                format: self.source_format.as_deref(),
                ..Source::default()
            };
            request.source = Some(source.request(name, &self.how.native, ui)?);
        }
        let listed = change(&request, &mut |warning| tell(ui, warning))
            .map_err(|error| failed(name, self.source_file.as_deref(), error))?;
        if json {
            let all = listed.iter().map(to_json).collect();
            let result = Json::ordered([
                ("filename", Json::text(name.to_string_lossy())),
                ("bitmaps", Json::List(all)),
            ]);
            ui.print(result.pretty())?;
        }
        Ok(Exit::OK)
    }
}

impl BitmapArgs {
    fn export(&self, ui: &Ui, names: &[OsString], json: bool) -> Result<Exit, Failure> {
        let wrong = [
            (
                !self.actions.0.is_empty() || self.granularity.is_some(),
                "export changes nothing: it takes no --add, --remove, --clear, --enable, --disable, --merge or --granularity",
            ),
            (
                self.source_file.is_some() || self.source_format.is_some(),
                "export takes no --source-file and no --source-format",
            ),
            (
                self.copy_format.is_some() && self.copy.is_none(),
                "--copy-format only makes sense with --copy",
            ),
            (
                self.copy.as_deref() == Some(OsStr::new("-")),
                "a copy cannot go to standard output: it is written back and forth",
            ),
        ];
        if let Some((_, text)) = wrong.into_iter().find(|(is_so, _)| *is_so) {
            return Err(Failure::usage(text));
        }
        let [name, bitmap] = names else {
            return Err(Failure::usage_help(
                "export expects a file name and the name of a bitmap",
            ));
        };
        let source = Source {
            format: self.format.as_deref(),
            image_opts: self.image_opts,
            share: self.force_share,
            ..Source::default()
        };
        let request = source.request(name, &self.how.native, ui)?;
        let bitmap = bitmap.to_string_lossy();
        let export = Export::open(&request, &bitmap).map_err(|error| Failure::open(name, error))?;
        if let Some(out) = &self.copy {
            let format = self.copy_format.as_deref().unwrap_or("raw");
            let style = Style::choose(ui, self.quiet, None, self.how.native.json)?;
            let progress = Progress::begin(ui, style)?;
            let copied = export.copy(Path::new(out), format, progress.job());
            progress.signals().die_if_cancelled(&copied);
            if copied.is_ok() {
                progress.complete();
            }
            progress.end();
            copied?;
        }
        if !self.quiet || json {
            let mut list = List::new(ui, json, name, &export);
            list.print(&export)?;
        }
        Ok(Exit::OK)
    }
}

/// The failure of a change as `qemu-img` words it.
fn failed(name: &OsStr, source: Option<&OsStr>, error: Error) -> Failure {
    match error.find::<BitmapFailure>() {
        Some(BitmapFailure::Action { action, name, .. }) => {
            let frame = Frame::Text(format!("Operation {action} on bitmap {name} failed"));
            Failure::library(error, frame)
        }
        Some(BitmapFailure::Source(_)) => match error.into_source().map(|source| source.downcast()) {
            Some(Ok(failure)) => match *failure {
                BitmapFailure::Source(inner) => Failure::open(source.unwrap_or(name), inner),
                other => Failure::refused(other.to_string()),
            },
            _ => Failure::refused("the source of the merge did not open"),
        },
        _ => Failure::open(name, error),
    }
}

fn to_json(facts: &BitmapFacts) -> Json {
    Json::ordered([
        ("name", Json::text(facts.name.as_str())),
        ("granularity", Json::Int(facts.granularity)),
        ("enabled", Json::Bool(facts.enabled)),
        ("inconsistent", Json::Bool(facts.inconsistent)),
    ])
}

/// Bytes of output that are printed at once.
const BATCH: usize = 64 << 10;

/// Prints dirty ranges, of which there can be more than fit in memory.
struct List<'a> {
    ui: &'a Ui,
    json: bool,
    out: String,
}

impl<'a> List<'a> {
    fn new(ui: &'a Ui, json: bool, name: &OsStr, export: &Export) -> Self {
        let facts = export.facts();
        let out = if json {
            let text = |text: &str| Json::text(text).line();
            format!(
                "{{\n    \"filename\": {},\n    \"bitmap\": {},\n    \"granularity\": {},\n    \"virtual-size\": {},\n    \"ranges\": [",
                text(&name.to_string_lossy()).trim_end(),
                text(&facts.name).trim_end(),
                facts.granularity,
                export.disk_size(),
            )
        } else {
            format!("{:<20}{}\n", "Offset", "Length")
        };
        Self { ui, json, out }
    }

    fn print(&mut self, export: &Export) -> Result<(), Failure> {
        let (mut count, mut dirty) = (0_u64, 0);
        let mut runs = export.runs()?;
        while let Some(run) = runs.next_run()? {
            let (offset, length) = (run.start.get(), run.end.since(run.start));
            // A String takes whatever is written to it.
            let _ = if self.json {
                let comma = if count > 0 { "," } else { "" };
                write!(
                    self.out,
                    "{comma}\n        {{ \"offset\": {offset}, \"length\": {length} }}"
                )
            } else {
                writeln!(self.out, "{:<20}{length:#x}", format!("{offset:#x}"))
            };
            count += 1;
            dirty += length;
            if self.out.len() >= BATCH {
                self.ui.print(std::mem::take(&mut self.out))?;
            }
        }
        let _ = if self.json {
            let end = if count > 0 { "\n    " } else { "" };
            writeln!(self.out, "{end}],\n    \"dirty\": {dirty}\n}}")
        } else {
            let size = export.disk_size();
            writeln!(
                self.out,
                "{count} dirty ranges, {} ({dirty} bytes) of {}",
                human(dirty),
                human(size)
            )
        };
        self.ui.print(&self.out)
    }
}
