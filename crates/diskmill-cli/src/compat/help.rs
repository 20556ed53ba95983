//! Help in the shape of `qemu-img --help`, from the clap definitions.

use std::fmt::Write as _;

use clap::{Arg, Command};
use diskmill_formats::registry;

use super::VERSION;
use crate::commands::{self, NATIVE};

/// The two lines of `--version`: the first is what scripts read.
pub fn version() -> String {
    format!(
        "qemu-img version {VERSION} (diskmill {ours})\ndiskmill {ours}, a replacement for qemu-img\n",
        ours = env!("CARGO_PKG_VERSION")
    )
}

/// The text of `qemu-img --help`.
pub fn overview() -> String {
    let mut out = version();
    out.push_str(
        "Makes, converts, inspects and checks disk images.  Usage:\n\n\
         \x20 qemu-img [standard options] COMMAND [--help | command options]\n\n\
         Standard options:\n\
         \x20 -h, --help\n     show this text\n\
         \x20 -V, --version\n     show the version\n\
         \x20 -T,--trace TRACE\n     taken for compatibility, without effect\n\n\
         Recognized commands (qemu-img COMMAND --help tells more):\n\n",
    );
    for (name, about) in commands::qemu_img_commands() {
        line(&mut out, format_args!("  {name} - {about}"));
    }
    out.push_str("\nSupported image formats:\n\n");
    let mut names: Vec<&str> = registry::drivers()
        .iter()
        .map(|driver| driver.format().name())
        .collect();
    names.extend(["file", "host_device"]);
    names.sort_unstable();
    line(&mut out, format_args!("  {}", names.join(" ")));
    out
}

/// The text of `qemu-img COMMAND --help`.
pub fn command(command: &Command) -> String {
    let mut out = String::from("Usage:\n");
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    line(&mut out, format_args!("{about}.  Usage:\n"));
    let shown: Vec<&Arg> = command
        .get_arguments()
        .filter(|arg| !arg.is_hide_set() && arg.get_help_heading() != Some(NATIVE))
        .collect();
    let mut usage = format!("  qemu-img {}", command.get_name());
    let mut width = usage.len();
    for arg in &shown {
        let word = usage_word(arg);
        if width + word.len() + 1 > 78 {
            usage.push_str("\n       ");
            width = 7;
        }
        usage.push(' ');
        usage.push_str(&word);
        width += word.len() + 1;
    }
    line(
        &mut out,
        format_args!("{usage}\n\nArguments:\n  -h, --help\n     show this text"),
    );
    for arg in shown {
        line(&mut out, format_args!("  {}", heading(arg)));
        for text in arg
            .get_help()
            .map(ToString::to_string)
            .unwrap_or_default()
            .lines()
        {
            line(&mut out, format_args!("     {text}"));
        }
    }
    out.push('\n');
    out
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // A String takes whatever is written to it.
    let _ = writeln!(out, "{text}");
}

fn value_name(arg: &Arg) -> String {
    arg.get_value_names()
        .and_then(|names| names.first())
        .map_or_else(|| arg.get_id().to_string().to_uppercase(), ToString::to_string)
}

fn takes_value(arg: &Arg) -> bool {
    arg.get_action().takes_values() && arg.get_num_args().is_none_or(|range| range.min_values() > 0)
}

fn usage_word(arg: &Arg) -> String {
    if arg.is_positional() {
        return value_name(arg);
    }
    let name = match (arg.get_short(), arg.get_long()) {
        (Some(short), _) => format!("-{short}"),
        (None, long) => format!("--{}", long.unwrap_or_default()),
    };
    if takes_value(arg) {
        format!("[{name} {}]", value_name(arg))
    } else {
        format!("[{name}]")
    }
}

fn heading(arg: &Arg) -> String {
    if arg.is_positional() {
        return value_name(arg);
    }
    let value = if takes_value(arg) {
        format!(" {}", value_name(arg))
    } else {
        String::new()
    };
    match (arg.get_short(), arg.get_long()) {
        (Some(short), Some(long)) => format!("-{short}, --{long}{value}"),
        (Some(short), None) => format!("-{short}{value}"),
        (None, long) => format!("--{}{value}", long.unwrap_or_default()),
    }
}
