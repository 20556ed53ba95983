//! The `diskmill` command, which is also `qemu-img` when it is called by that name.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;

use clap::error::ErrorKind;

mod clock;
mod commands;
mod compat;
mod demo;
mod error;
mod exit;
mod json;
mod keys;
mod keyval;
mod object;
mod progress;
mod prompt;
mod signals;
mod size;
mod ui;

use compat::getopt::{self, Read};
use error::Failure;
use exit::Exit;
use ui::{Mode, Ui};

fn main() -> ExitCode {
    open_many_files();
    let mut args = std::env::args_os();
    let program = args.next().unwrap_or_default();
    let mut args: Vec<OsString> = args.collect();
    let mut mode = match program.as_bytes().rsplit(|byte| *byte == b'/').next() {
        Some(b"qemu-img") => Mode::DropIn,
        _ => Mode::Native,
    };
    if mode == Mode::Native && args.first().is_some_and(|first| first == "qemu-img") {
        mode = Mode::DropIn;
        args.remove(0);
    }
    // Where a handler cannot be set the limit kills, as it would without us.
    let _ = signals::outlive_size_limit();
    let mut ui = Ui { mode, command: "" };
    let result = match mode {
        Mode::DropIn => drop_in(&mut ui, &args),
        Mode::Native => native(&mut ui, &args),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(failure) => {
            if failure.is_unheard() {
                signals::die_of_pipe();
            }
            failure.report(&ui);
            failure.exit().into()
        }
    }
}

/// Lets as many files be open as the host allows: a split disk has one for each 2 GiB. Where that fails the usual number
/// has to do.
fn open_many_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    _ = setrlimit(Resource::Nofile, limit);
}

/// `qemu-img`: options of its own, a command, and that command's options.
fn drop_in(ui: &mut Ui, args: &[OsString]) -> Result<Exit, Failure> {
    let mut rest = args;
    let (name, words) = loop {
        let Some((word, more)) = rest.split_first() else {
            return Err(Failure::usage_help("Not enough arguments"));
        };
        if !getopt::is_option(word) {
            break (word, more);
        }
        match word.as_bytes() {
            b"--" => match more.split_first() {
                Some((word, more)) => break (word, more),
                None => return Err(Failure::usage_help("Not enough arguments")),
            },
            b"-T" | b"--trace" => match more.split_first() {
                Some((_, more)) => rest = more,
                None if word == "-T" => {
                    return Err(Failure::usage_help("option requires an argument -- 'T'"));
                }
                None => return Err(Failure::usage_help("option '--trace' requires an argument")),
            },
            [b'-', b'T', ..] => rest = more,
            bytes if bytes.starts_with(b"--trace=") => rest = more,
            [b'-', b'V', ..] => return print(ui, &compat::help::version()),
            [b'-', b'h', ..] => return print(ui, &compat::help::overview()),
            [b'-', b'-', long @ ..] if !long.is_empty() && b"version".starts_with(long) => {
                return print(ui, &compat::help::version());
            }
            [b'-', b'-', long @ ..] if !long.is_empty() && b"help".starts_with(long) => {
                return print(ui, &compat::help::overview());
            }
            [b'-', b'-', ..] => {
                let option = word.to_string_lossy();
                return Err(Failure::usage_help(format!("unrecognized option '{option}'")));
            }
            bytes => {
                let letter = bytes.get(1).copied().map(char::from).unwrap_or_default();
                return Err(Failure::usage_help(format!("invalid option -- '{letter}'")));
            }
        }
    };
    let text = name.to_string_lossy();
    let Some(spec) = commands::find(&text).filter(|spec| spec.shared) else {
        return Err(Failure::usage_help(format!("Command not found: {text}")));
    };
    ui.command = spec.name;
    let definition = spec.definition();
    match getopt::read(&definition, words, ui.mode, spec.negative) {
        Ok(Read::Help) => print(ui, &compat::help::command(&definition)),
        Ok(Read::Line(line)) => {
            let matches = definition
                .no_binary_name(true)
                .try_get_matches_from(line)
                .map_err(|error| Failure::usage_help(error.kind().to_string()))?;
            spec.run(&matches, ui)
        }
        Err(error) => {
            // The C library puts the name of the command in front of these.
            ui.note(&format!("qemu-img {}: {error}\n", spec.name));
            ui.note(&format!("Try 'qemu-img {} --help' for more info\n", spec.name));
            Err(Failure::said(Exit::FAILED))
        }
    }
}

/// `diskmill`: clap's help and errors, the same habits of reading.
fn native(ui: &mut Ui, args: &[OsString]) -> Result<Exit, Failure> {
    let command = args.iter().position(|word| !getopt::is_option(word));
    let spec = match command {
        Some(0) => args
            .first()
            .and_then(|name| commands::find(&name.to_string_lossy())),
        _ => None,
    };
    let Some(spec) = spec else {
        let program = commands::program();
        let words = std::iter::once(OsString::from("diskmill")).chain(args.iter().cloned());
        return match program.try_get_matches_from(words) {
            Ok(_) => Err(Failure::usage("a command is needed")),
            Err(error) => clap_end(ui, &error, Exit::FAILED),
        };
    };
    ui.command = spec.name;
    let usage_exit = match spec.name {
        "compare" => Exit::COMPARE_OPEN,
        _ => Exit::FAILED,
    };
    let words = &args[1..];
    let definition = spec.definition().bin_name(format!("diskmill {}", spec.name));
    let line = match getopt::read(&definition, words, ui.mode, spec.negative) {
        Ok(Read::Line(line)) => line,
        // Clap words these more helpfully, from what was typed.
        Ok(Read::Help) | Err(_) => words.to_vec(),
    };
    match definition.clone().no_binary_name(true).try_get_matches_from(line) {
        Ok(matches) => match getopt::read(&definition, words, ui.mode, spec.negative) {
            Err(error) => Err(Failure::usage_help(error.to_string()).exit_with(usage_exit)),
            Ok(_) => spec.run(&matches, ui),
        },
        Err(error) => clap_end(ui, &error, usage_exit),
    }
}

fn print(ui: &Ui, text: &str) -> Result<Exit, Failure> {
    ui.print(text)?;
    Ok(Exit::OK)
}

/// Prints what clap has to say: help and version to standard output, errors to standard error.
fn clap_end(ui: &Ui, error: &clap::Error, exit: Exit) -> Result<Exit, Failure> {
    let text = error.render();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => print(ui, &text.to_string()),
        _ => {
            ui.note(&format!("diskmill: {text}"));
            Err(Failure::said(exit))
        }
    }
}
