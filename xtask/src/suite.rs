//! Running the tests.

use std::collections::BTreeMap;
use std::ffi::OsString;

use crate::command::{Failed, cargo, look};
use crate::peers::{self, Peers};

/// Every test of the workspace; `filters` are names to run only.
pub fn everything(peers: &Peers, filters: &[String]) -> Result<(), Failed> {
    let mut summaries = Vec::new();
    let mut failed = Vec::new();
    let nextest = look("cargo-nextest").is_some() || nextest_beside_cargo();
    let mut runs = Vec::new();
    if nextest {
        runs.push(vec!["nextest", "run", "--workspace", "--no-fail-fast"]);
        runs.push(vec!["test", "--workspace", "--doc", "--no-fail-fast"]);
    } else {
        runs.push(vec!["test", "--workspace", "--no-fail-fast"]);
    }
    for mut run in runs {
        run.extend(filters.iter().map(String::as_str));
        let line = run.join(" ");
        let (good, lines) = cargo(run).env("DISKMILL_KERNEL", &peers.kernel).run_and_keep()?;
        summaries.push(summary(&lines));
        if !good {
            failed.push(line);
        }
    }
    // The tests proper last, since that is the line people and machines read.
    summaries.reverse();
    for summary in summaries {
        println!("{summary}");
    }
    if failed.is_empty() {
        Ok(())
    } else {
        Err(Failed::new(format!("cargo {}: failed", failed.join(", cargo "))))
    }
}

fn nextest_beside_cargo() -> bool {
    cargo(["nextest", "--version"]).output().is_some()
}

/// The runner's own closing line, or the sum of `cargo test`'s.
fn summary(lines: &[String]) -> String {
    if let Some(line) = lines
        .iter()
        .rev()
        .find(|line| line.trim_start().starts_with("Summary ["))
    {
        return line.trim().to_owned();
    }
    let mut sums = [0u64; 3];
    for line in lines.iter().filter(|line| line.starts_with("test result:")) {
        for (sum, name) in sums.iter_mut().zip([" passed", " failed", " ignored"]) {
            *sum += number_before(line, name);
        }
    }
    let [passed, failed, ignored] = sums;
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    format!("test result: {verdict}. {passed} passed; {failed} failed; {ignored} ignored")
}

fn number_before(line: &str, name: &str) -> u64 {
    line.find(name)
        .and_then(|at| line[..at].rsplit(' ').next()?.parse().ok())
        .unwrap_or(0)
}

/// The tests that hold the command against the real tools.
pub fn conformance(filters: &[String]) -> Result<(), Failed> {
    let peers = peers::install()?;
    let args = ["test", "--package", "diskmill-cli", "--test", "conformance", "--"];
    cargo(args)
        .args(filters)
        .env("DISKMILL_KERNEL", &peers.kernel)
        .run()
}

/// The randomised tests with other seeds until the time is over.
pub fn soak(args: &[String]) -> Result<(), Failed> {
    let mut minutes: u64 = 10;
    let mut seed: u64 = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |age| age.as_secs());
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let value = args.next().and_then(|value| value.parse().ok());
        match (arg.as_str(), value) {
            ("--minutes", Some(value)) => minutes = value,
            ("--seed", Some(value)) => seed = value,
            _ => return Err(Failed::new("usage: soak [--minutes N] [--seed N]")),
        }
    }
    let peers = peers::install()?;
    let started = std::time::Instant::now();
    let mut rounds = 0;
    let mut figures = BTreeMap::new();
    while rounds == 0 || started.elapsed().as_secs() < minutes * 60 {
        eprintln!(
            "soak: round {rounds}, seed {seed}: `cargo xtask soak --minutes 0 --seed {seed}` repeats it"
        );
        let factor = OsString::from("20");
        // Names, not features: what is randomised says so in its name.
        let (good, lines) = cargo(["test", "--workspace", "--release", "--"])
            .args(["random", "--nocapture"])
            .env("DISKMILL_SEED", seed.to_string())
            .env("DISKMILL_SOAK", &factor)
            .env("PROPTEST_RNG_SEED", seed.to_string())
            .env("DISKMILL_KERNEL", &peers.kernel)
            .run_and_keep()?;
        add_figures(&mut figures, &lines);
        if !good {
            return Err(Failed::new(format!("soak: round {rounds}, seed {seed} failed")));
        }
        rounds += 1;
        seed = seed.wrapping_add(1);
    }
    for (what, count) in figures {
        println!("soak: {count} {what}");
    }
    println!("soak: {rounds} rounds without a failure");
    Ok(())
}

/// Adds up the lines `figure: WHAT: COUNT` that tests print.
fn add_figures(figures: &mut BTreeMap<String, u64>, lines: &[String]) {
    // A test's name may stand before it.
    let told = lines.iter().filter_map(|line| line.split_once("figure: "));
    for (what, count) in told.filter_map(|(_, rest)| rest.rsplit_once(": ")) {
        *figures.entry(what.to_owned()).or_default() += count.parse().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_added_up() {
        let lines = [
            "figure: a b: 3",
            "test x ... figure: a b: 4",
            "figure: c: 1",
            "other",
        ]
        .map(str::to_owned);
        let mut figures = BTreeMap::new();
        add_figures(&mut figures, &lines);
        assert_eq!(figures, [("a b".to_owned(), 7), ("c".to_owned(), 1)].into());
    }

    #[test]
    fn the_closing_line_is_the_runners_own_or_the_sum() {
        let lines = [
            "x",
            "     Summary [  72.019s] 240 tests run: 240 passed, 0 skipped",
        ]
        .map(str::to_owned);
        assert_eq!(
            summary(&lines),
            "Summary [  72.019s] 240 tests run: 240 passed, 0 skipped"
        );
        let lines = [
            "test result: ok. 13 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out",
            "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out",
        ]
        .map(str::to_owned);
        assert_eq!(
            summary(&lines),
            "test result: FAILED. 14 passed; 2 failed; 0 ignored"
        );
    }
}
