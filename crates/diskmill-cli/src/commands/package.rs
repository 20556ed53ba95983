//! OVF packages: what `info` and `check` say of them, and how they are made.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use diskmill::open::{self, OpenRequest};
use diskmill::ops::convert::{PackagePlan, run_package};
use diskmill::package::{FileState, Package, Verified};
use diskmill_core::{Compression, Durability, Format};
use diskmill_formats::ova::{DiskEntry, Machine, Profile, System};
use diskmill_storage::CacheMode;

use crate::clock;
use crate::error::Failure;
use crate::exit::Exit;
use crate::json::Json;
use crate::progress::{Progress, Style};
use crate::size::human;
use crate::ui::Ui;

/// The package called `name`, if it is one and no disk of it was chosen.
pub(super) fn look(ui: &Ui, name: &OsString, request: &OpenRequest) -> Result<Option<Package>, Failure> {
    if ui.drop_in() || request.disk.is_some() {
        return Ok(None);
    }
    open::package(request).map_err(|error| Failure::open(name, error))
}

/// What `info` prints of a package.
pub(super) fn describe(package: &Package, json: bool, ui: &Ui) -> String {
    if json {
        to_json(package).pretty()
    } else {
        to_text(package, ui)
    }
}

fn file_name<'a>(package: &'a Package, disk: &DiskEntry) -> Option<&'a str> {
    let file = package.envelope().files.get(disk.file?)?;
    Some(file.name.as_str())
}

fn to_json(package: &Package) -> Json {
    let envelope = package.envelope();
    let mut pairs = vec![
        (
            "format",
            Json::text(if package.archive().is_some() { "ova" } else { "ovf" }),
        ),
        ("ovf-version", Json::text(envelope.version.name())),
        ("descriptor", Json::text(package.name().as_str())),
        ("manifest", Json::Bool(package.manifest().is_some())),
        ("certificate", Json::Bool(package.certificate().is_some())),
    ];
    let disks = envelope.disks.iter().map(|disk| {
        let mut pairs = vec![("id", Json::text(&disk.id))];
        if let Some(file) = file_name(package, disk) {
            pairs.push(("filename", Json::text(file)));
        }
        pairs.push(("virtual-size", Json::Int(disk.capacity)));
        if let Some(size) = disk.populated {
            pairs.push(("populated-size", Json::Int(size)));
        }
        if let Some(format) = &disk.format {
            pairs.push(("format-uri", Json::text(format)));
        }
        Json::ordered(pairs)
    });
    pairs.push(("disks", Json::List(disks.collect())));
    let networks = envelope.networks.iter().map(Json::text).collect();
    pairs.push(("networks", Json::List(networks)));
    let machines = envelope.systems.iter().map(machine_json).collect();
    pairs.push(("machines", Json::List(machines)));
    Json::ordered(pairs)
}

fn machine_json(system: &System) -> Json {
    let mut pairs = vec![("id", Json::text(&system.id))];
    let texts = [
        ("name", &system.name),
        ("os", &system.os_name),
        ("os-vmware", &system.os_vmware),
        ("hardware", &system.hardware),
    ];
    for (key, text) in texts {
        if let Some(text) = text {
            pairs.push((key, Json::text(text)));
        }
    }
    let numbers = [
        ("os-id", system.os.map(u64::from)),
        ("cpus", system.cpus()),
        ("memory", system.memory()),
    ];
    for (key, number) in numbers {
        if let Some(number) = number {
            pairs.push((key, Json::Int(number)));
        }
    }
    pairs.push(("disks", Json::List(system.disks().map(Json::text).collect())));
    pairs.push(("networks", Json::List(networks(system).map(Json::text).collect())));
    Json::ordered(pairs)
}

/// The networks a machine is on: those of its network cards.
fn networks(system: &System) -> impl Iterator<Item = &str> {
    let cards = system.items.iter().filter(|item| item.resource_type == 10);
    cards.flat_map(|item| item.connections.iter().map(String::as_str))
}

fn to_text(package: &Package, ui: &Ui) -> String {
    let envelope = package.envelope();
    let mut out = String::new();
    // A String takes whatever is written to it.
    let mut line = |text: std::fmt::Arguments<'_>| _ = writeln!(out, "{text}");
    let kind = if package.archive().is_some() { "OVA" } else { "OVF" };
    line(format_args!("package: {}", ui.name(package.name().as_str())));
    line(format_args!("file format: {kind} {}", envelope.version.name()));
    line(format_args!(
        "manifest: {}",
        if package.manifest().is_some() { "yes" } else { "no" }
    ));
    let signed = if package.certificate().is_some() {
        "yes (not verified)"
    } else {
        "no"
    };
    line(format_args!("certificate: {signed}"));
    line(format_args!("disks:"));
    for (number, disk) in (1..).zip(&envelope.disks) {
        let file = file_name(package, disk).unwrap_or("none: to be made empty");
        line(format_args!(
            "    {number}: {}: {} ({} bytes), file {}",
            ui.name(&disk.id),
            human(disk.capacity),
            disk.capacity,
            ui.name(file)
        ));
    }
    for system in &envelope.systems {
        let name = system.name.as_deref().unwrap_or(&system.id);
        line(format_args!("machine: {}", ui.name(name)));
        let os = match (&system.os_name, &system.os_vmware, system.os) {
            (Some(name), Some(vmware), _) => Some(format!("{name} ({vmware})")),
            (Some(name), None, _) => Some(name.clone()),
            (None, Some(vmware), _) => Some(vmware.clone()),
            (None, None, number) => number.map(|number| format!("number {number}")),
        };
        let networks: Vec<_> = networks(system).collect();
        let disks: Vec<_> = system.disks().collect();
        let join = |names: Vec<&str>| (!names.is_empty()).then(|| names.join(", "));
        for (key, value) in [
            ("operating system", os),
            ("hardware", system.hardware.clone()),
            ("CPUs", system.cpus().map(|cpus| cpus.to_string())),
            ("memory", system.memory().map(human)),
            ("disks", join(disks)),
            ("networks", join(networks)),
        ] {
            if let Some(value) = value {
                line(format_args!("    {key}: {}", ui.name(&value)));
            }
        }
    }
    out
}

/// `check` of a package: its files against the manifest.
pub(super) fn check(
    package: &Package,
    name: &OsString,
    json: bool,
    quiet: bool,
    ui: &Ui,
) -> Result<Exit, Failure> {
    let progress = Progress::begin(ui, Style::None)?;
    let verified = package.verify(progress.job());
    progress.signals().die_if_cancelled(&verified);
    let verified = verified.map_err(|error| Failure::open(name, error))?;
    if json {
        ui.print(verified_json(name, &verified).pretty())?;
    } else if !quiet {
        ui.print(verified_text(&verified, ui))?;
    }
    Ok(if verified.is_bad() {
        Exit::CHECK_CORRUPT
    } else {
        Exit::OK
    })
}

/// What is known of a file, in a word for programs and in words for people.
fn state(state: &FileState) -> (&'static str, String) {
    match state {
        FileState::Good(algorithm) => ("good", format!("OK ({algorithm})")),
        FileState::Differs {
            algorithm,
            said,
            found,
        } => (
            "differs",
            format!("DIFFERS: {algorithm} is {found}, the manifest says {said}"),
        ),
        FileState::NotListed => (
            "not-listed",
            "not verified: the manifest does not list it".to_owned(),
        ),
        FileState::Missing => ("missing", "MISSING".to_owned()),
        FileState::NotReferred => (
            "not-referred",
            "not part of the package: nothing refers to it".to_owned(),
        ),
        FileState::Broken(why) => ("broken", format!("BROKEN: {why}")),
        other => ("unknown", format!("{other:?}")),
    }
}

fn verified_json(name: &OsString, verified: &Verified) -> Json {
    let files = verified.files.iter().map(|file| {
        let (word, text) = state(&file.state);
        Json::ordered([
            ("filename", Json::text(file.name.as_str())),
            ("state", Json::text(word)),
            ("detail", Json::text(text)),
        ])
    });
    Json::ordered([
        ("filename", Json::text(name.to_string_lossy())),
        ("format", Json::text("ova")),
        ("manifest", Json::Bool(verified.manifest)),
        ("certificate", Json::Bool(verified.certificate.is_some())),
        ("certificate-verified", Json::Bool(false)),
        ("bad", Json::Bool(verified.is_bad())),
        ("files", Json::List(files.collect())),
    ])
}

fn verified_text(verified: &Verified, ui: &Ui) -> String {
    let mut out = String::new();
    // A String takes whatever is written to it.
    let mut line = |text: std::fmt::Arguments<'_>| _ = writeln!(out, "{text}");
    for file in &verified.files {
        line(format_args!(
            "{}: {}",
            ui.name(file.name.as_str()),
            state(&file.state).1
        ));
    }
    if !verified.manifest {
        line(format_args!("There is no manifest: nothing could be verified."));
    }
    if let Some(name) = &verified.certificate {
        line(format_args!(
            "The package is signed ('{}'). The signature was not verified.",
            ui.name(name.as_str())
        ));
    }
    line(format_args!(
        "{}",
        if verified.is_bad() {
            "The package is damaged."
        } else {
            "No errors were found in the package."
        }
    ));
    out
}

/// An archive or a compressed file taken for a raw disk gives a disk of rubbish: say so instead.
pub(super) fn refuse_containers(name: &OsString, request: &OpenRequest) -> Result<(), Failure> {
    if request.format.is_some() || request.spec.driver.is_some() {
        return Ok(());
    }
    let mut request = request.clone();
    request.backing = false;
    request.hold = false;
    let image = open::image(&request).map_err(|error| Failure::open(name, error))?;
    match image.nodes.first() {
        Some(node) if node.facts.format == Format::Raw => match node.looks_like {
            Some(what) => Err(Failure::refused(format!(
                "'{}' looks like {what}, not a disk image; say --source-format raw to copy it as it is",
                name.to_string_lossy()
            ))),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

/// A package to be made, as options say it.
pub(super) struct Making {
    disks: Vec<OpenRequest>,
    target: OsString,
    /// What it is for.
    pub(super) profile: Profile,
    /// The machine's name; the target's if not said.
    pub(super) name: Option<String>,
    /// Changes the machine that the profile suggests.
    pub(super) machine: Box<dyn Fn(&mut Machine)>,
    /// How hard to compress.
    pub(super) level: Option<i32>,
    /// Threads to use at most.
    pub(super) workers: Option<NonZeroUsize>,
    /// How writes pass the host's cache.
    pub(super) cache: Option<CacheMode>,
}

impl Making {
    /// A package of `disks` called `target`; `-` is standard output.
    pub(super) fn new(disks: Vec<OpenRequest>, target: &OsStr) -> Self {
        Self {
            disks,
            target: target.to_owned(),
            profile: Profile::default(),
            name: None,
            machine: Box::new(|_| {}),
            level: None,
            workers: None,
            cache: None,
        }
    }
}

/// Makes a package, and tells how it went.
pub(super) fn make(ui: &Ui, making: Making, style: Style, json: bool) -> Result<Exit, Failure> {
    let target = (making.target != "-").then(|| PathBuf::from(&making.target));
    let stem = target
        .as_deref()
        .and_then(Path::file_stem)
        .map(|stem| stem.to_string_lossy().into_owned());
    let name = making
        .name
        .clone()
        .or_else(|| stem.clone())
        .unwrap_or_else(|| "disk".to_owned());
    let stem = stem.unwrap_or_else(|| name.replace(['/', '\\'], "-"));
    let mut machine = Machine::new(name, making.profile);
    (making.machine)(&mut machine);
    let mut disks = making.disks.into_iter();
    let Some(first) = disks.next() else {
        return Err(Failure::usage("Must specify image file name"));
    };
    let mut plan = PackagePlan::new(first, target.clone(), stem, machine);
    plan.disks.extend(disks);
    plan.profile = making.profile;
    plan.time = clock::build_time();
    plan.compression = Compression { level: making.level };
    plan.workers = making.workers;
    if let Some(cache) = making.cache {
        plan.cache = cache;
        if cache == CacheMode::Unsafe {
            plan.durability = Durability::None;
        }
    }
    let progress = Progress::begin(ui, style)?;
    let packed = run_package(&plan, progress.job());
    progress.signals().die_if_cancelled(&packed);
    if packed.is_ok() {
        progress.complete();
    }
    progress.end();
    let packed = packed.map_err(Failure::from)?;
    let shown = making.target.to_string_lossy();
    if let Some(why) = &packed.in_place {
        ui.warn(&format!("'{}' was written in place: {why}", ui.name(&shown)));
    }
    if json && target.is_some() {
        let disks = packed.disks.iter().map(|disk| {
            Json::ordered([
                ("filename", Json::text(disk.file.as_str())),
                ("virtual-size", Json::Int(disk.capacity)),
                ("populated-size", Json::Int(disk.populated)),
                ("file-size", Json::Int(disk.len)),
            ])
        });
        let summary = Json::ordered([
            ("filename", Json::text(shown)),
            ("format", Json::text("ova")),
            ("size", Json::Int(packed.len)),
            ("disks", Json::List(disks.collect())),
        ]);
        ui.print(summary.pretty())?;
    }
    Ok(Exit::OK)
}
