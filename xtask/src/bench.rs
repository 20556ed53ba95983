//! Paired runs against `qemu-img` with its best flags.
//!
//! One after the other, the order alternating, on the same files in memory: what disturbs the machine disturbs both.
//! The figure that counts is the median of the ratios of pairs. Every output is compared with the source before its
//! time is believed.

mod cases;
mod report;

use std::path::{Path, PathBuf};
use std::time::Duration;

use diskmill_testkit::{Run, Scratch, ext4, oracle, process};

use crate::command::{Failed, cargo};
use cases::{Case, Files};

const HELP: &str = "\
Usage: cargo xtask bench [OPTIONS]

  --quick        256 MiB and 3 pairs
  --mib N        size of the files on the disk (default 1280)
  --pairs N      pairs a case (default 7)
  --only TEXT    only cases whose name contains TEXT
  --dir DIR      where sources and outputs go (default /dev/shm)
  --source FILE  a raw disk to use instead of one made from this machine's files
  --ours FILE    the binary to measure (default: built in release mode)
  --json FILE    write the figures here too (default target/bench.json)
";

/// What to measure.
#[derive(Debug)]
struct Plan {
    mib: u64,
    pairs: usize,
    only: String,
    dir: PathBuf,
    source: Option<PathBuf>,
    ours: Option<PathBuf>,
    json: PathBuf,
}

/// What was measured of one case.
#[derive(Debug)]
struct Measured {
    name: &'static str,
    goal: f64,
    ours: Vec<Duration>,
    theirs: Vec<Duration>,
    our_memory: Option<u64>,
    their_memory: Option<u64>,
    our_bytes: Option<u64>,
    their_bytes: Option<u64>,
}

/// Runs the benchmark.
pub fn run(args: &[String]) -> Result<(), Failed> {
    if args.iter().any(|arg| arg == "--help" || arg == "-h") {
        report::print(HELP);
        return Ok(());
    }
    let plan = parse(args)?;
    let ours = match &plan.ours {
        Some(path) => path.clone(),
        None => {
            cargo(["build", "--release", "--quiet", "--package", "diskmill-cli"]).run()?;
            crate::target().join("release/diskmill")
        }
    };
    if process::look("qemu-img").is_none() {
        return Err(Failed::new("qemu-img is not installed: `cargo xtask peers`"));
    }
    let scratch = Scratch::beneath(&plan.dir);
    let source = scratch.join("source.raw");
    match &plan.source {
        Some(path) => std::fs::copy(path, &source).map(|_| ())?,
        None => make_source(&source, &scratch, plan.mib),
    }
    let files = Files::prepare(&scratch, source);
    let mut all = Vec::new();
    for case in cases::all(&files) {
        if case.name.contains(&plan.only) {
            let measured = measure(&case, &ours, &files, plan.pairs);
            report::line(&measured);
            all.push(measured);
        }
    }
    report::table(&all, &files);
    report::json(&all, &files, &plan.json)?;
    Ok(())
}

fn parse(args: &[String]) -> Result<Plan, Failed> {
    let mut plan = Plan {
        mib: 1280,
        pairs: 7,
        only: String::new(),
        dir: PathBuf::from("/dev/shm"),
        source: None,
        ours: None,
        json: crate::target().join("bench.json"),
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        if arg == "--quick" {
            (plan.mib, plan.pairs) = (256, 3);
            continue;
        }
        let bad = || Failed::new(format!("bench: {arg}: see --help"));
        let value = args.next().ok_or_else(bad)?;
        match arg.as_str() {
            "--mib" => plan.mib = value.parse().map_err(|_| bad())?,
            "--pairs" => plan.pairs = value.parse::<usize>().map_err(|_| bad())?.max(1),
            "--only" => plan.only.clone_from(value),
            "--dir" => plan.dir = value.into(),
            "--source" => plan.source = Some(value.into()),
            "--ours" => plan.ours = Some(value.into()),
            "--json" => plan.json = value.into(),
            _ => return Err(bad()),
        }
    }
    Ok(plan)
}

/// An ext4 disk with `mib` MiB of this machine's own files and a quarter free.
fn make_source(image: &Path, scratch: &Scratch, mib: u64) {
    report::say(&format!(
        "making an ext4 disk of {mib} MiB of this machine's files"
    ));
    let tree = scratch.join("tree");
    let roots = [
        "/usr/share",
        "/usr/lib",
        "/usr/bin",
        "/usr/local",
        "/usr/include",
        "/opt",
    ]
    .map(Path::new);
    let copied = ext4::copy_tree(&roots, &tree, mib << 20);
    // Small files and tables take more room than their bytes.
    let size = (copied + copied / 2 + (64 << 20)).next_multiple_of(1 << 20);
    ext4::make(image, &tree, size);
    let _ = std::fs::remove_dir_all(&tree);
}

fn measure(case: &Case, ours: &Path, files: &Files, pairs: usize) -> Measured {
    let our_run = Run::new(ours)
        .args(&case.ours)
        .patience(Duration::from_secs(3600));
    let their_run = Run::new("qemu-img")
        .args(&case.theirs)
        .patience(Duration::from_secs(3600));
    // The first of each is not counted: it warms the caches, shows the memory and proves the output.
    let remembered = |run: &Run| {
        files.clear_output();
        (case.setup)(files);
        let done = run.clone().watch_memory().ok();
        let bytes = case.output_format.map(|_| files.output_bytes());
        if let Some(format) = case.output_format {
            files.prove_output(format);
            if format == "qcow2" {
                oracle::assert_clean(&files.output, format);
            }
        }
        (done.peak_memory, bytes)
    };
    let (their_memory, their_bytes) = remembered(&their_run);
    let (our_memory, our_bytes) = remembered(&our_run);
    let mut measured = Measured {
        name: case.name,
        goal: case.goal,
        ours: Vec::new(),
        theirs: Vec::new(),
        our_memory,
        their_memory,
        our_bytes,
        their_bytes,
    };
    for pair in 0..pairs {
        let mut timed = |ours_now: bool| {
            let run = if ours_now { &our_run } else { &their_run };
            let mut sum = Duration::ZERO;
            for _ in 0..case.repeat {
                files.clear_output();
                (case.setup)(files);
                sum += run.ok().took;
            }
            let times = if ours_now {
                &mut measured.ours
            } else {
                &mut measured.theirs
            };
            times.push(sum / case.repeat);
        };
        let first = pair.is_multiple_of(2);
        timed(first);
        timed(!first);
    }
    files.clear_output();
    measured
}
