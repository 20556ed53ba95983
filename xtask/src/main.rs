//! Development tasks: `cargo xtask TASK`. CI calls nothing else, so whatever CI does a person can do too.
#![forbid(unsafe_code)]
// A program for people at a terminal: printing is what it is for.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod bench;
mod command;
mod golden;

mod peers;
mod suite;
mod unsafe_blocks;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use command::{Failed, cargo};

const HELP: &str = "\
Usage: cargo xtask TASK

  check        format, clippy and rustdoc with warnings denied, unsafe blocks counted
  test         install or name the peers, then every test
  ci           check, then test: what CI runs
  conformance  the tests against the real tools only; arguments filter by name
  bench        paired runs against qemu-img; --help lists its options
  soak         the randomised tests for longer: [--minutes N] [--seed N]
  peers        install or name the peers only
  golden       make the golden images anew with the installed tools
";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let task = args.next().unwrap_or_default();
    let rest: Vec<String> = args.collect();
    let started = Instant::now();
    let done = match task.as_str() {
        "check" => check(),
        "test" => test(&rest),
        "ci" => check().and_then(|()| test(&rest)),
        "conformance" => suite::conformance(&rest),
        "bench" => bench::run(&rest),
        "soak" => suite::soak(&rest),
        "golden" => golden::make(),
        "peers" => peers::install().map(|_| ()),
        "" | "help" | "-h" | "--help" => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        other => Err(Failed::new(format!("no task '{other}'\n{HELP}"))),
    };
    match done {
        Ok(()) => {
            eprintln!("xtask {task}: done in {:.0} s", started.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Err(failed) => {
            eprintln!("xtask {task}: {failed}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's folder.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// The folder of what is built, `CARGO_TARGET_DIR` respected.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

fn check() -> Result<(), Failed> {
    cargo(["fmt", "--all", "--check"]).run()?;
    cargo([
        "clippy",
        "--workspace",
        "--all-targets",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ])
    .run()?;
    cargo(["doc", "--workspace", "--no-deps", "--quiet"])
        .env("RUSTDOCFLAGS", "-D warnings")
        .run()?;
    unsafe_blocks::check(&root())
}

fn test(filters: &[String]) -> Result<(), Failed> {
    let peers = peers::install()?;
    suite::everything(&peers, filters)
}
