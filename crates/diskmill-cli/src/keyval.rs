//! Values on the command line: numbers, option lists, objects.

use std::fmt::Write as _;

use diskmill_core::{Driver, Format, OptionKind, Options, WhichSnapshot, parse_size};
use diskmill_storage::CacheMode;

use crate::error::Failure;
use crate::ui::Ui;

/// A number of bytes (or of anything) from `min` to `max`, called `name` in messages.
pub fn number(name: &str, text: &str, min: u64, max: u64) -> Result<u64, Failure> {
    match parse_size(text) {
        Some(value) if (min..=max).contains(&value) => Ok(value),
        None if !is_out_of_reach(text) => Err(Failure::usage(format!("Invalid {name} specified: '{text}'."))),
        _ => Err(Failure::usage(format!(
            "Invalid {name} specified. Must be between {min} and {max}."
        ))),
    }
}

/// A number from `min` to `max` that counts things and therefore has no suffix. As in C, `0x` begins a hexadecimal one
/// and another `0` an octal one.
pub fn plain_number(name: &str, text: &str, min: u64, max: u64) -> Result<u64, Failure> {
    let invalid = || Failure::usage(format!("Invalid {name} specified: '{text}'."));
    let digits = text.trim_start_matches(|c: char| c.is_ascii_whitespace());
    let digits = digits.strip_prefix('+').unwrap_or(digits);
    let is_hex = digits.starts_with("0x") || digits.starts_with("0X");
    let has_suffix = !is_hex && digits.ends_with(|c: char| c.is_ascii_alphabetic());
    if has_suffix || digits.contains('.') || digits.starts_with('+') {
        return Err(invalid());
    }
    match digits
        .strip_prefix('0')
        .filter(|rest| !is_hex && !rest.is_empty())
    {
        Some(octal) if octal.bytes().all(|digit| matches!(digit, b'0'..=b'7')) => {
            let value = u64::from_str_radix(octal, 8).unwrap_or(u64::MAX);
            number(name, &value.to_string(), min, max)
        }
        Some(_) => Err(invalid()),
        None => number(name, digits, min, max).map_err(|failure| match parse_size(digits) {
            None if !is_out_of_reach(digits) => invalid(),
            _ => failure,
        }),
    }
}

/// A size or offset in bytes.
pub fn bytes(name: &str, text: &str) -> Result<u64, Failure> {
    number(name, text, 0, i64::MAX as u64)
}

/// Whether `text` is a number, only too large or below zero.
fn is_out_of_reach(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let digits = digits
        .strip_suffix(|c: char| "bkKmMgGtTpPeE".contains(c))
        .unwrap_or(digits);
    !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit())
}

/// What repeated `-o` options come to.
#[derive(Debug, PartialEq, Eq)]
pub enum OptionList {
    /// `-o help`: the options are asked for, not given.
    Help,
    /// `name=value` pairs.
    Pairs(Options),
}

/// Joins what was given to repeated `-o`.
pub fn option_list(given: &[String]) -> Result<OptionList, Failure> {
    let mut options = Options::new();
    for text in given {
        if text.split(',').any(|word| matches!(word, "help" | "?")) || text == "list" {
            return Ok(OptionList::Help);
        }
        // A comma at an end would run into the next list.
        if text.is_empty() || text.starts_with(',') || (text.ends_with(',') && !text.ends_with(",,")) {
            return Err(Failure::usage(format!("Invalid option list: {text}")));
        }
        options.parse_more(text);
    }
    Ok(OptionList::Pairs(options))
}

/// What options are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionTarget {
    /// Nothing in particular.
    Unnamed,
    /// A file, which has options of its own.
    File,
    /// A device, which has none.
    Device,
}

/// Prints what `-o` can set for a format put into `target`.
pub fn print_options(ui: &Ui, driver: &dyn Driver, target: OptionTarget) -> Result<(), Failure> {
    let name = driver.format().name();
    let mut lines: Vec<(&str, OptionKind, &str)> = driver
        .options()
        .iter()
        .map(|spec| (spec.name, spec.kind, spec.help))
        .collect();
    lines.push(("size", OptionKind::Size, "size of the virtual disk"));
    if target == OptionTarget::File {
        lines.push(("nocow", OptionKind::Bool, "no copy-on-write for the file (btrfs)"));
        lines.push((
            "extent_size_hint",
            OptionKind::Size,
            "hint for the size of the file's extents, 0 for none",
        ));
    } else {
        // These are the file's; for raw images, encrypted or not, preallocation is too.
        let is_raw = matches!(driver.format(), Format::Raw | Format::Luks);
        lines.retain(|(name, ..)| !matches!(*name, "nocow" | "extent_size_hint"));
        lines.retain(|(name, ..)| !(is_raw && *name == "preallocation"));
    }
    lines.sort_by_key(|(name, ..)| *name);
    lines.dedup_by_key(|(name, ..)| *name);
    let mut out = match target {
        OptionTarget::Unnamed => format!("Supported {name} options:\n"),
        _ => String::from("Supported options:\n"),
    };
    for (name, kind, help) in lines {
        option_line(&mut out, name, kind, help);
    }
    if target == OptionTarget::Unnamed {
        out.push_str("\nThe file may know more options: they are listed if its name is given too.\n");
    }
    ui.print(out)
}

/// Prints what `amend -o` can change in images of a format.
pub fn print_amend_options(ui: &Ui, driver: &dyn Driver) -> Result<(), Failure> {
    let mut out = format!("Amend options for '{}':\n", driver.format());
    for spec in driver.amend_options() {
        option_line(&mut out, spec.name, spec.kind, spec.help);
    }
    ui.print(out)
}

fn option_line(out: &mut String, name: &str, kind: OptionKind, help: &str) {
    let kind = match kind {
        OptionKind::Bool => "bool (on/off)",
        OptionKind::Size => "size",
        OptionKind::Number => "num",
        _ => "str",
    };
    // A String takes whatever is written to it.
    let _ = writeln!(out, "  {:<22} - {help}", format!("{name}=<{kind}>"));
}

/// The cache mode called `mode`. `what` is "cache" or "source cache".
pub fn cache_mode(what: &str, mode: &str) -> Result<CacheMode, Failure> {
    CacheMode::parse(mode).ok_or_else(|| Failure::usage(format!("Invalid {what} option: {mode}")))
}

/// The snapshot `-l` means: a name or id alone, or `snapshot.name=` and `snapshot.id=`.
pub fn snapshot(text: &str) -> Result<WhichSnapshot, Failure> {
    if !text.starts_with("snapshot.") {
        return Ok(text.into());
    }
    let mut options = Options::parse(text);
    let id = options.take("snapshot.id");
    let name = options.take("snapshot.name");
    if let Some((unknown, _)) = options.iter().next() {
        return Err(Failure::usage(format!(
            "Invalid parameter '{unknown}'\nqemu-img: Failed in parsing snapshot param '{text}'"
        )));
    }
    match (&id, &name) {
        (None, None) => Err(Failure::usage(format!(
            "Failed in parsing snapshot param '{text}'"
        ))),
        _ => Ok(WhichSnapshot::Exact { id, name }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn option_lists_join_and_help_is_found_anywhere() {
        let given = ["a=1,b".to_owned(), "c=x,,y".to_owned()];
        let OptionList::Pairs(options) = option_list(&given).unwrap() else {
            panic!("help was not asked for");
        };
        let pairs: Vec<_> = options.iter().collect();
        assert_eq!(pairs, [("a", "1"), ("b", "on"), ("c", "x,y")]);
        for help in ["help", "?", "list", "a=1,help", "?,b"] {
            assert_eq!(
                option_list(&[help.to_owned()]).unwrap(),
                OptionList::Help,
                "{help}"
            );
        }
        for bad in ["", ",", "a=1,", ",a"] {
            assert!(option_list(&[bad.to_owned()]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn numbers_too_large_are_told_from_nonsense() {
        assert!(is_out_of_reach("-1"));
        assert!(is_out_of_reach("99999999999999999999999"));
        assert!(is_out_of_reach("16E"));
        assert!(!is_out_of_reach("10kb"));
        assert!(!is_out_of_reach("1e6"));
        assert_eq!(number("n", "16", 1, 16).unwrap(), 16);
        assert!(number("n", "17", 1, 16).is_err());
    }

    #[test]
    fn counts_are_read_as_c_reads_them() {
        let count = |text| plain_number("count", text, 0, 100).ok();
        let read = ["10", "010", "0x10", "0X1f", "00", "0", " 5", "+5"].map(count);
        assert_eq!(read, [10, 8, 16, 31, 0, 0, 5, 5].map(Some));
        for text in [
            "08", "1k", "0x", "5 ", "0b1", "++5", "+-5", "1.5", "-1", "101", "0145", "",
        ] {
            assert_eq!(count(text), None, "{text}");
        }
    }

    #[test]
    fn snapshots_are_named_or_numbered() {
        let said = |text: &str| snapshot(text).unwrap().to_string();
        assert_eq!(said("one"), "id or name 'one'");
        assert_eq!(said("snapshot.name=one"), "name 'one'");
        assert_eq!(said("snapshot.id=1,snapshot.name=one"), "id '1' and name 'one'");
        assert!(snapshot("snapshot.bogus=1").is_err());
    }
}
