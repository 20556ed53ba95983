//! What was measured, for people and as JSON.

use std::path::Path;
use std::time::Duration;

use diskmill_testkit::scratch::{allocated, len};
use serde_json::{Value, json};

use super::Measured;
use super::cases::Files;
use crate::command::Failed;

const MIB: f64 = (1 << 20) as f64;

/// Prints text as it is.
pub fn print(text: &str) {
    print!("{text}");
}

/// Says what goes on.
pub fn say(text: &str) {
    eprintln!("bench: {text}");
}

impl Measured {
    /// The median of the ratios of pairs: ours by theirs.
    fn ratio(&self) -> f64 {
        let ratios = self.ours.iter().zip(&self.theirs);
        median(
            ratios
                .map(|(ours, theirs)| ours.as_secs_f64() / theirs.as_secs_f64())
                .collect(),
        )
    }
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let middle = numbers.len() / 2;
    match numbers.len() {
        0 => f64::NAN,
        count if count.is_multiple_of(2) => (numbers[middle - 1] + numbers[middle]) / 2.0,
        _ => numbers[middle],
    }
}

fn seconds(times: &[Duration]) -> f64 {
    median(times.iter().map(Duration::as_secs_f64).collect())
}

/// One case, as soon as it is known.
pub fn line(measured: &Measured) {
    say(&format!(
        "{}: {:.2} of qemu-img's time",
        measured.name,
        measured.ratio()
    ));
}

fn mib(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "-".to_owned(), |bytes| format!("{:.1}", bytes as f64 / MIB))
}

/// All cases as a table.
pub fn table(all: &[Measured], files: &Files) {
    println!(
        "\nsource: ext4, {:.0} MiB, {:.0} MiB of it allocated; {} CPUs; times in seconds, sizes in MiB, medians of {} pairs\n",
        len(&files.source) as f64 / MIB,
        allocated(&files.source) as f64 / MIB,
        std::thread::available_parallelism().map_or(0, usize::from),
        all.first().map_or(0, |measured| measured.ours.len()),
    );
    println!("| case | diskmill | qemu-img | ratio | goal | memory | qemu-img's | output | qemu-img's |");
    println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|");
    for measured in all {
        println!(
            "| {} | {:.3} | {:.3} | {:.2} | {:.1} | {} | {} | {} | {} |",
            measured.name,
            seconds(&measured.ours),
            seconds(&measured.theirs),
            measured.ratio(),
            measured.goal,
            mib(measured.our_memory),
            mib(measured.their_memory),
            mib(measured.our_bytes),
            mib(measured.their_bytes),
        );
    }
    for measured in all.iter().filter(|measured| measured.ratio() > measured.goal) {
        println!(
            "\nmissed: {} takes {:.2}, the goal is {}",
            measured.name,
            measured.ratio(),
            measured.goal
        );
    }
}

/// All cases as JSON, written to `path`.
pub fn json(all: &[Measured], files: &Files, path: &Path) -> Result<(), Failed> {
    let cases: Vec<Value> = all
        .iter()
        .map(|measured| {
            let times = |times: &[Duration]| times.iter().map(Duration::as_secs_f64).collect::<Vec<_>>();
            json!({
                "name": measured.name,
                "goal": measured.goal,
                "ratio": measured.ratio(),
                "ours": {"seconds": times(&measured.ours), "memory": measured.our_memory, "output": measured.our_bytes},
                "qemu-img": {
                    "seconds": times(&measured.theirs),
                    "memory": measured.their_memory,
                    "output": measured.their_bytes,
                },
            })
        })
        .collect();
    let all = json!({
        "source-bytes": len(&files.source),
        "source-allocated": allocated(&files.source),
        "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        "cases": cases,
    });
    std::fs::write(path, format!("{all:#}\n"))?;
    say(&format!("figures are in {}", path.display()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
