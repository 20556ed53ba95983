use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::Path;

use clap::Args;
use diskmill::open::OpenError;
use diskmill::ops::info::{ImageInfo, gather};
use diskmill_core::{Error, SnapshotFacts, Value};

use super::{LookArgs, Run, package};
use crate::clock;
use crate::error::Failure;
use crate::exit::Exit;
use crate::json::Json;
use crate::size::human;
use crate::ui::Ui;

/// Show what an image says of itself
#[derive(Args, Debug)]
#[command(override_usage = "diskmill info [OPTIONS] FILENAME")]
pub struct InfoArgs {
    /// Also show the images it is backed by
    #[arg(short, long)]
    backing_chain: bool,
    #[command(flatten)]
    look: LookArgs,
    /// The image
    #[arg(value_name = "FILENAME", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
}

impl Run for InfoArgs {
    const NAME: &'static str = "info";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.look.wants_json(ui)?;
        let [name] = self.names.as_slice() else {
            return Err(Failure::usage_help("Expecting one image file name"));
        };
        let mut request = self.look.request(ui, name, None)?;
        request.needs_keys = false;
        if let Some(package) = package::look(ui, name, &request)? {
            ui.print(package::describe(&package, json, ui))?;
            return Ok(Exit::OK);
        }
        let infos =
            gather(&request, self.backing_chain).map_err(|error| failed(name, request.spec.path(), error))?;
        let text = match (json, infos.as_slice()) {
            (true, [only]) if !self.backing_chain => to_json(only, ui).pretty(),
            (true, all) => Json::List(all.iter().map(|info| to_json(info, ui)).collect()).pretty(),
            (false, all) => {
                let texts: Vec<_> = all.iter().map(|info| to_text(info, ui)).collect();
                texts.join("\n")
            }
        };
        ui.print(text)?;
        Ok(Exit::OK)
    }
}

/// Names the image of the chain that did not open: `name`, whose file is `file`, or one below it.
fn failed(name: &OsString, file: &Path, error: Error) -> Failure {
    if matches!(error.find::<OpenError>(), Some(OpenError::Loop(_))) {
        return Failure::from(error);
    }
    match &error.context().path {
        Some(path) if path != file => {
            let path = path.clone().into_os_string();
            Failure::open(&path, error)
        }
        _ => Failure::open(name, error),
    }
}

/// What `info --output=json` shows of an image or file.
fn to_json(info: &ImageInfo, ui: &Ui) -> Json {
    let mut pairs = vec![
        ("filename", Json::text(&info.filename)),
        ("format", Json::text(&info.format)),
        ("dirty-flag", Json::Bool(info.dirty)),
    ];
    if let Some(size) = info.actual_size {
        pairs.push(("actual-size", Json::Int(size)));
    }
    pairs.push(("virtual-size", Json::Int(info.virtual_size)));
    if let Some(size) = info.cluster_size {
        pairs.push(("cluster-size", Json::Int(size)));
    }
    if info.encrypted {
        pairs.push(("encrypted", Json::Bool(true)));
    }
    if info.compressed {
        pairs.push(("compressed", Json::Bool(true)));
    }
    for (key, name) in [
        ("backing-filename", &info.backing_filename),
        ("full-backing-filename", &info.full_backing_filename),
        ("backing-filename-format", &info.backing_filename_format),
    ] {
        if let Some(name) = name {
            pairs.push((key, Json::text(name)));
        }
    }
    if !info.snapshots.is_empty() {
        let snapshots = info.snapshots.iter().map(snapshot_json).collect();
        pairs.push(("snapshots", Json::List(snapshots)));
    }
    if let Some((kind, data)) = &info.format_specific {
        let specific = Json::object([("type", Json::text(kind)), ("data", value_json(data))]);
        pairs.push(("format-specific", specific));
    }
    if let (Some(details), false) = (&info.details, ui.drop_in()) {
        pairs.push(("details", details_json(details)));
    }
    let children = info
        .children
        .iter()
        .map(|child| {
            Json::object([
                ("name", Json::text(&child.name)),
                ("info", to_json(&child.info, ui)),
            ])
        })
        .collect();
    pairs.push(("children", Json::List(children)));
    if let (Some(name), false) = (info.looks_like, ui.drop_in()) {
        pairs.push(("looks-like", Json::text(name)));
    }
    Json::object(pairs)
}

pub(super) fn snapshot_json(snapshot: &SnapshotFacts) -> Json {
    let mut pairs = vec![
        ("id", Json::text(&snapshot.id)),
        ("name", Json::text(&snapshot.name)),
        ("vm-state-size", Json::Int(snapshot.vm_state_size)),
        ("date-sec", Json::Int(snapshot.date_sec)),
        ("date-nsec", Json::Int(snapshot.date_nsec.into())),
        ("vm-clock-sec", Json::Int(snapshot.vm_clock_nsec / 1_000_000_000)),
        ("vm-clock-nsec", Json::Int(snapshot.vm_clock_nsec % 1_000_000_000)),
    ];
    if let Some(icount) = snapshot.icount {
        pairs.push(("icount", Json::Int(icount)));
    }
    Json::object(pairs)
}

fn value_json(value: &Value) -> Json {
    match value {
        Value::Bool(value) => Json::Bool(*value),
        Value::Int(value) => Json::Int(*value),
        Value::List(values) => Json::List(values.iter().map(value_json).collect()),
        Value::Map(pairs) => Json::object(pairs.iter().map(|(key, value)| (*key, value_json(value)))),
        Value::Text(text) => Json::text(text),
        other => Json::text(format!("{other:?}")),
    }
}

/// The same in the order of the format.
fn details_json(value: &Value) -> Json {
    match value {
        Value::List(values) => Json::List(values.iter().map(details_json).collect()),
        Value::Map(pairs) => Json::ordered(pairs.iter().map(|(key, value)| (*key, details_json(value)))),
        other => value_json(other),
    }
}

/// What `info` prints of an image.
fn to_text(info: &ImageInfo, ui: &Ui) -> String {
    let mut out = Text::default();
    out.line(0, format_args!("image: {}", ui.name(&info.filename)));
    match info.looks_like {
        Some(name) if !ui.drop_in() => {
            out.line(
                0,
                format_args!("file format: {}, but it looks like {name}", info.format),
            );
        }
        _ => out.line(0, format_args!("file format: {}", info.format)),
    }
    out.line(
        0,
        format_args!(
            "virtual size: {} ({} bytes)",
            human(info.virtual_size),
            info.virtual_size
        ),
    );
    out.line(0, format_args!("disk size: {}", disk_size(info)));
    if info.encrypted {
        out.line(0, format_args!("encrypted: yes"));
    }
    if let Some(size) = info.cluster_size {
        out.line(0, format_args!("cluster_size: {size}"));
    }
    if info.dirty {
        out.line(0, format_args!("cleanly shut down: no"));
    }
    if let Some(backing) = &info.backing_filename {
        let shown = ui.name(backing);
        match &info.full_backing_filename {
            None => out.line(
                0,
                format_args!("backing file: {shown} (cannot determine actual path)"),
            ),
            Some(full) if full != backing => {
                out.line(
                    0,
                    format_args!("backing file: {shown} (actual path: {})", ui.name(full)),
                );
            }
            Some(_) => out.line(0, format_args!("backing file: {shown}")),
        }
        if let Some(format) = &info.backing_filename_format {
            out.line(0, format_args!("backing file format: {}", ui.name(format)));
        }
    }
    out.0.push_str(&snapshot_table(&info.snapshots, ui));
    specific(&mut out, 0, info, ui);
    if let (Some(details), false) = (&info.details, ui.drop_in()) {
        out.line(0, format_args!("Details:"));
        values(&mut out, 4, &details_json(details), ui);
    }
    for child in &info.children {
        let node = &child.info;
        out.line(0, format_args!("Child node '/{}':", child.name));
        out.line(4, format_args!("filename: {}", ui.name(&node.filename)));
        out.line(4, format_args!("protocol type: {}", node.format));
        out.line(
            4,
            format_args!(
                "file length: {} ({} bytes)",
                human(node.virtual_size),
                node.virtual_size
            ),
        );
        out.line(4, format_args!("disk size: {}", disk_size(node)));
        specific(&mut out, 4, node, ui);
    }
    out.0
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn line(&mut self, indent: usize, text: std::fmt::Arguments<'_>) {
        // A String takes whatever is written to it.
        let _ = writeln!(self.0, "{:indent$}{text}", "");
    }
}

fn disk_size(info: &ImageInfo) -> String {
    info.actual_size.map_or_else(|| "unavailable".to_owned(), human)
}

/// The table of snapshots, or nothing if there are none.
pub(super) fn snapshot_table(snapshots: &[SnapshotFacts], ui: &Ui) -> String {
    let mut out = Text(String::new());
    if snapshots.is_empty() {
        return out.0;
    }
    out.line(0, format_args!("Snapshot list:"));
    let row = |out: &mut Text, [id, tag, size, date, clock, icount]: [&str; 6]| {
        out.line(
            0,
            format_args!("{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}"),
        );
    };
    row(&mut out, ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    for snapshot in snapshots {
        row(
            &mut out,
            [
                &ui.name(&snapshot.id),
                &ui.name(&snapshot.name),
                &human(snapshot.vm_state_size),
                &clock::local(snapshot.date_sec),
                &clock::machine(snapshot.vm_clock_nsec),
                &snapshot
                    .icount
                    .map_or_else(|| "--".to_owned(), |count| count.to_string()),
            ],
        );
    }
    out.0
}

/// The lines of `format-specific`; none at all if there is nothing in it.
fn specific(out: &mut Text, indent: usize, info: &ImageInfo, ui: &Ui) {
    let Some((_, data)) = &info.format_specific else {
        return;
    };
    if matches!(data, Value::Map(pairs) if pairs.is_empty()) {
        return;
    }
    out.line(indent, format_args!("Format specific information:"));
    values(out, indent + 4, &value_json(data), ui);
}

/// QEMU prints these by walking the same tables it makes JSON from, so their order is that of the JSON.
fn values(out: &mut Text, indent: usize, value: &Json, ui: &Ui) {
    match value {
        Json::Object(pairs) => {
            for (key, value) in pairs {
                entry(out, indent, &key.replace('-', " "), value, ui);
            }
        }
        Json::List(list) => {
            for (index, value) in list.iter().enumerate() {
                entry(out, indent, &format!("[{index}]"), value, ui);
            }
        }
        _ => {}
    }
}

fn entry(out: &mut Text, indent: usize, key: &str, value: &Json, ui: &Ui) {
    match value {
        Json::Object(_) | Json::List(_) => {
            out.line(indent, format_args!("{key}:"));
            values(out, indent + 4, value, ui);
        }
        Json::Text(text) => out.line(indent, format_args!("{key}: {}", ui.name(text))),
        plain => out.line(indent, format_args!("{key}: {}", plain.line())),
    }
}
