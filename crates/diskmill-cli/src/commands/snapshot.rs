use std::ffi::{OsStr, OsString};

use clap::Args;
use diskmill::open::{self, OpenRequest};
use diskmill::ops::snapshot::{Action, change, list};
use diskmill_core::{Error, ErrorKind};

use super::info::{snapshot_json, snapshot_table};
use super::resize::tell;
use super::{DoArgs, Run, Source};
use crate::error::{Failure, Frame};
use crate::exit::Exit;
use crate::json::Json;
use crate::ui::Ui;

/// List the snapshots inside an image, make one, go back to one, or give one up
#[derive(Args, Debug)]
#[command(override_usage = "diskmill snapshot [OPTIONS] [-l | -c|-a|-d SNAPSHOT] FILENAME")]
pub struct SnapshotArgs {
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Format of the image, instead of finding it out
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILENAME is a list of options (driver=...,file.filename=...), not a name
    #[arg(long)]
    image_opts: bool,
    /// Read an image that another process is writing
    #[arg(short = 'U', long)]
    force_share: bool,
    /// List the snapshots: what is done if nothing else is asked for
    #[arg(short, long)]
    list: bool,
    /// Keep the present state under this name
    #[arg(short, long, value_name = "SNAPSHOT")]
    create: Option<String>,
    /// Go back to this snapshot, an id or a name
    #[arg(short, long, value_name = "SNAPSHOT")]
    apply: Option<String>,
    /// Give up this snapshot, an id or a name
    #[arg(short, long, value_name = "SNAPSHOT")]
    delete: Option<String>,
    #[command(flatten)]
    how: DoArgs,
    /// The image
    #[arg(value_name = "FILENAME", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
}

impl Run for SnapshotArgs {
    const NAME: &'static str = "snapshot";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.how.wants_json(ui)?;
        let actions = [
            self.create.map(|name| Action::Create(fitting(ui, name))),
            self.apply.map(Action::Apply),
            // qemu-img looks a snapshot up by id to apply it, and by name only to delete it.
            self.delete.map(match ui.drop_in() {
                true => Action::DeleteNamed,
                false => Action::Delete,
            }),
        ];
        let mut actions = actions.into_iter().flatten();
        let action = actions.next();
        if actions.next().is_some() || (self.list && action.is_some()) {
            return Err(Failure::usage_help("Cannot mix '-l', '-a', '-c', '-d'"));
        }
        let [name] = self.names.as_slice() else {
            return Err(Failure::usage_help("Expecting one image file name"));
        };
        if let (true, Some(_)) = (self.force_share, &action) {
            let text = format!(
                "Could not open '{}': force-share=on can only be used with read-only images",
                name.display()
            );
            return Err(Failure::refused(text));
        }
        let source = Source {
            format: self.format.as_deref(),
            image_opts: self.image_opts,
            share: self.force_share,
            ..Source::default()
        };
        let request = source.request(name, &self.how.native, ui)?;
        match action {
            None => {
                let snapshots = list(&request).map_err(|error| Failure::open(name, error))?;
                if json {
                    let all = snapshots.iter().map(snapshot_json).collect();
                    ui.print(Json::List(all).pretty())?;
                } else if !self.quiet {
                    ui.print(snapshot_table(&snapshots, ui))?;
                }
            }
            Some(action) => {
                refuse_with_bitmaps(ui, name, &request, &action)?;
                let quiet = self.quiet;
                change(&request, &action, &mut |warning| {
                    if !quiet || ui.drop_in() {
                        tell(ui, warning);
                    }
                })
                .map_err(|error| failed(ui, name, &action, error))?;
            }
        }
        Ok(Exit::OK)
    }
}

/// `qemu-img` cuts the names of snapshots that are longer than the format has room for; we refuse them.
fn fitting(ui: &Ui, mut name: String) -> String {
    const MAX: usize = 255;
    if ui.drop_in() && name.len() > MAX {
        let whole = (0..=MAX).rev().find(|end| name.is_char_boundary(*end));
        name.truncate(whole.unwrap_or(0));
    }
    name
}

/// `qemu-img` applies no snapshot to an image with dirty bitmaps. We do, and mark all of the disk in those that are
/// enabled, but not under its name.
fn refuse_with_bitmaps(ui: &Ui, name: &OsStr, request: &OpenRequest, action: &Action) -> Result<(), Failure> {
    let Action::Apply(which) = action else {
        return Ok(());
    };
    if !ui.drop_in() {
        return Ok(());
    }
    let mut request = request.clone();
    request.backing = false;
    let image = open::image(&request).map_err(|error| Failure::open(name, error))?;
    let bitmaps = image.nodes.first().and_then(|node| node.facts.bitmaps.as_ref());
    match bitmaps {
        Some(bitmaps) if !bitmaps.is_empty() => Err(Failure::refused(format!(
            "Could not apply snapshot '{which}': Device has active dirty bitmaps"
        ))),
        _ => Ok(()),
    }
}

/// The failure of an action as `qemu-img` words it: what could not be done, and why.
fn failed(ui: &Ui, name: &OsStr, action: &Action, error: Error) -> Failure {
    if error.context().op != Some("change snapshots") {
        return Failure::open(name, error);
    }
    let (verb, which, missing) = match action {
        Action::Create(which) => ("create", which, ""),
        Action::Apply(which) => (
            "apply",
            which,
            "Failed to load snapshot: No such file or directory",
        ),
        Action::Delete(which) | Action::DeleteNamed(which) => ("delete", which, "snapshot not found"),
        _ => ("change", &String::new(), ""),
    };
    let what = format!("Could not {verb} snapshot '{which}'");
    if ui.drop_in() && error.kind() == ErrorKind::NotFound {
        return Failure::refused(format!("{what}: {missing}"));
    }
    Failure::library(error, Frame::Text(what))
}
