use std::ffi::OsString;
use std::num::NonZeroUsize;

use clap::Args;
use diskmill_formats::ova::{Controller, Firmware, Lint, Os, Profile, Severity};

use super::package::{self, Making};
use super::{DoArgs, Run, Source};
use crate::error::Failure;
use crate::exit::Exit;
use crate::json::Json;
use crate::keyval;
use crate::progress::Style;
use crate::ui::Ui;

/// Make OVF packages (.ova) of disks, or say what importers will not like about one
#[derive(Args, Debug)]
#[command(
    override_usage = "diskmill ova create [OPTIONS] SRC_FILENAME... TGT_FILENAME\n       diskmill ova lint [OPTIONS] FILENAME"
)]
#[command(after_help = "'ova lint' exits with 0 if nothing was found but warnings, and with 1 otherwise.")]
pub struct OvaArgs {
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Show progress
    ///
    /// HOW is auto (the default: a bar on a terminal, lines elsewhere), bar, plain, json or none.
    #[arg(short, long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "auto")]
    progress: Option<String>,
    /// Format of the disks, instead of finding it out
    #[arg(short = 'f', long, value_name = "FMT")]
    format: Option<String>,
    /// Read the disks even while another process writes them
    #[arg(short = 'U', long)]
    force_share: bool,
    /// The program the package is for: esxi, workstation, virtualbox or generic (the default)
    ///
    /// It decides about hardware version, controller, network card and digest.
    #[arg(long = "for", value_name = "PROFILE")]
    profile: Option<String>,
    /// Name of the machine (default: the package's)
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// What runs in it (default: other64); 'list' shows what is known
    #[arg(long, value_name = "OS")]
    os: Option<String>,
    /// Its processors (default: 1)
    #[arg(long, value_name = "NUM")]
    cpus: Option<String>,
    /// Its memory, with a suffix as all sizes (default: 1G)
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// A network to put it on; may be repeated, 'none' means no network (default: VM Network)
    #[arg(long, value_name = "NAME")]
    network: Vec<String>,
    /// How it starts: bios (the default) or efi
    #[arg(long, value_name = "FIRMWARE")]
    firmware: Option<String>,
    /// What its disks hang on: lsilogic, lsilogicsas, buslogic, pvscsi, sata or ide
    #[arg(long, value_name = "CONTROLLER")]
    controller: Option<String>,
    /// Threads to use at most (default: one for each core)
    #[arg(short = 'm', long, value_name = "NUM")]
    parallel: Option<String>,
    /// How hard to compress: 1 to 12
    #[arg(long, value_name = "LEVEL")]
    compress_level: Option<i32>,
    /// Cache mode of the package: all but unsafe make it durable
    #[arg(short = 't', long, value_name = "TGT_CACHE")]
    target_cache: Option<String>,
    #[command(flatten)]
    how: DoArgs,
    /// What to do, and the files: disks and the package to make, '-' for standard output; or the package to look over
    #[arg(value_name = "create|lint FILENAME...", value_hint = clap::ValueHint::FilePath)]
    names: Vec<OsString>,
}

impl Run for OvaArgs {
    const NAME: &'static str = "ova";

    fn run(self, ui: &Ui) -> Result<Exit, Failure> {
        let json = self.how.wants_json(ui)?;
        if self.os.as_deref() == Some("list") {
            ui.print(systems(json))?;
            return Ok(Exit::OK);
        }
        let Some((action, names)) = self.names.split_first() else {
            return Err(Failure::usage_help("Expecting 'create' or 'lint'"));
        };
        match action.to_str() {
            Some("create") => self.create(ui, names, json),
            Some("lint") => self.lint(ui, names, json),
            _ => Err(Failure::usage_help(format!(
                "Expecting 'create' or 'lint', not '{}'",
                action.to_string_lossy()
            ))),
        }
    }
}

/// The choice of that name, or what there is to choose from.
fn choice<T: Copy>(option: &str, given: &str, all: &[(&str, T)]) -> Result<T, Failure> {
    let found = all.iter().find(|known| known.0 == given).map(|known| known.1);
    found.ok_or_else(|| {
        let names: Vec<_> = all.iter().map(|known| known.0).collect();
        Failure::usage_help(format!("{option} expects {}, not '{given}'", names.join(", ")))
    })
}

impl OvaArgs {
    fn create(&self, ui: &Ui, names: &[OsString], json: bool) -> Result<Exit, Failure> {
        let (target, sources) = match names.split_last() {
            Some((target, sources)) if !sources.is_empty() => (target, sources),
            _ => {
                return Err(Failure::usage_help(
                    "Expecting at least one disk and the package to make",
                ));
            }
        };
        let style = Style::choose(ui, self.quiet, self.progress.as_deref(), self.how.native.json)?;
        let source = Source {
            format: self.format.as_deref(),
            share: self.force_share,
            ..Source::default()
        };
        let mut disks = Vec::with_capacity(sources.len());
        for name in sources {
            let mut request = source.request(name, &self.how.native, ui)?;
            request.hold = true;
            package::refuse_containers(name, &request)?;
            disks.push(request);
        }
        let mut making = Making::new(disks, target);
        if let Some(profile) = &self.profile {
            making.profile = choice("--for", profile, &Profile::ALL)?;
        }
        self.describe(&mut making)?;
        making.level = self.compress_level;
        if let Some(text) = &self.parallel {
            let number = keyval::number("number of threads", text, 1, 256)?;
            making.workers = usize::try_from(number).ok().and_then(NonZeroUsize::new);
        }
        if let Some(mode) = &self.target_cache {
            making.cache = Some(keyval::cache_mode("cache", mode)?);
        }
        package::make(ui, making, style, json)
    }

    /// What is said of the machine.
    fn describe(&self, making: &mut Making) -> Result<(), Failure> {
        /// Bytes of a MiB.
        const MIB: u64 = 1 << 20;
        making.name.clone_from(&self.name);
        let named = |option: &str, name: &str| {
            if name.trim().is_empty() || name.len() > 255 || name.chars().any(char::is_control) {
                return Err(Failure::usage_help(format!(
                    "{option} expects 1 to 255 bytes without control characters"
                )));
            }
            Ok(())
        };
        if let Some(name) = &self.name {
            named("--name", name)?;
        }
        let os = match &self.os {
            None => None,
            Some(name) => Some(Os::by_name(name).ok_or_else(|| {
                Failure::usage_help(format!(
                    "--os does not know '{name}'; '--os list' shows what it knows"
                ))
            })?),
        };
        let cpus = match &self.cpus {
            None => None,
            Some(text) => u32::try_from(keyval::number("number of processors", text, 1, 768)?).ok(),
        };
        let memory = match &self.memory {
            None => None,
            Some(text) => {
                let bytes = keyval::bytes("memory", text)?;
                if bytes < 4 * MIB || bytes % MIB != 0 || bytes > 24 << 40 {
                    return Err(Failure::usage_help(
                        "--memory expects whole MiB, from 4M to 24T, such as 2G",
                    ));
                }
                Some(bytes / MIB)
            }
        };
        for network in &self.network {
            named("--network", network)?;
        }
        let networks: Option<Vec<String>> = match self.network.as_slice() {
            [] => None,
            [none] if none == "none" => Some(Vec::new()),
            all => Some(all.to_vec()),
        };
        let firmware = match &self.firmware {
            None => None,
            Some(name) => Some(choice("--firmware", name, &Firmware::ALL)?),
        };
        let controller = match &self.controller {
            None => None,
            Some(name) => Some(choice("--controller", name, &Controller::ALL)?),
        };
        making.machine = Box::new(move |machine| {
            machine.os = os.unwrap_or(machine.os);
            machine.cpus = cpus.unwrap_or(machine.cpus);
            machine.memory_mib = memory.unwrap_or(machine.memory_mib);
            machine.firmware = firmware.unwrap_or(machine.firmware);
            machine.controller = controller.unwrap_or(machine.controller);
            if let Some(networks) = &networks {
                machine.networks.clone_from(networks);
            }
        });
        Ok(())
    }

    fn lint(&self, ui: &Ui, names: &[OsString], json: bool) -> Result<Exit, Failure> {
        let [name] = names else {
            return Err(Failure::usage_help("Expecting one OVF package"));
        };
        let request = Source::default().request(name, &self.how.native, ui)?;
        let Some(package) = package::look(ui, name, &request)? else {
            let text = format!("'{}' is no OVF package", name.to_string_lossy());
            return Err(Failure::refused(text));
        };
        let lints = package.lint().map_err(|error| Failure::open(name, error))?;
        if json {
            ui.print(Json::List(lints.iter().map(lint_json).collect()).pretty())?;
        } else if !self.quiet {
            let mut out = String::new();
            for lint in &lints {
                let Lint { rule, text } = lint;
                out.push_str(&format!(
                    "{}: {}: {} ({})\n",
                    rule.severity.name(),
                    rule.name,
                    ui.name(text),
                    rule.who
                ));
            }
            if lints.is_empty() {
                out.push_str("Nothing was found.\n");
            }
            ui.print(out)?;
        }
        let bad = lints.iter().any(|lint| lint.rule.severity == Severity::Error);
        Ok(if bad { Exit::FAILED } else { Exit::OK })
    }
}

fn lint_json(lint: &Lint) -> Json {
    Json::ordered([
        ("rule", Json::text(lint.rule.name)),
        ("severity", Json::text(lint.rule.severity.name())),
        ("who", Json::text(lint.rule.who)),
        ("text", Json::text(&lint.text)),
    ])
}

/// The operating systems that have a name here.
fn systems(json: bool) -> String {
    if json {
        let all = Os::ALL.iter().map(|os| {
            Json::ordered([
                ("name", Json::text(os.name)),
                ("description", Json::text(os.description)),
                ("cim", Json::Int(os.cim.into())),
                ("vmware", Json::text(os.vmware)),
            ])
        });
        return Json::List(all.collect()).pretty();
    }
    Os::ALL
        .iter()
        .map(|os| format!("{:<16} {}\n", os.name, os.description))
        .collect()
}
