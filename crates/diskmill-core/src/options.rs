//! Options of formats: `name=value` text on the way in, typed values on the way out.

use crate::{Error, ErrorKind, Result};

/// What an option's value may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionKind {
    /// Any text.
    Text,
    /// `on` or `off`.
    Bool,
    /// A number of bytes, with an optional suffix.
    Size,
    /// A number.
    Number,
}

/// An option a format understands, in the order `create` lists and prints them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionSpec {
    /// Its name.
    pub name: &'static str,
    /// What its value may be.
    pub kind: OptionKind,
    /// What it is when it is not given, if `create` is to say so.
    pub default: Option<&'static str>,
    /// What it does, for people.
    pub help: &'static str,
}

/// What is wrong with an option.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionError {
    /// No such option.
    #[error("invalid parameter '{0}'")]
    Unknown(String),
    /// A value of the wrong sort.
    #[error("parameter '{name}' expects {expected}, not '{value}'")]
    Value {
        /// The option.
        name: String,
        /// What was given.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A value of the right sort that is not allowed.
    #[error("{name} is {value}, must be {allowed}")]
    Range {
        /// The option.
        name: String,
        /// What was given.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
    /// Two options that exclude each other, or one that needs another.
    #[error("{0}")]
    Conflict(String),
}

impl From<OptionError> for Error {
    fn from(error: OptionError) -> Self {
        let kind = ErrorKind::Usage;
        Error::new(kind, error)
    }
}

/// `name=value` pairs in the order given. The last of a name counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    pairs: Vec<(String, String)>,
}

impl Options {
    /// No options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Splits `a=1,b=2`. A doubled comma stands for one in a value; a name alone means `on`, and `noNAME` alone is a
    /// name like any other.
    pub fn parse(text: &str) -> Self {
        let mut options = Self::new();
        options.parse_more(text);
        options
    }

    /// Adds what [`parse`](Self::parse) finds in `text`.
    pub fn parse_more(&mut self, text: &str) {
        let mut rest = text.chars().peekable();
        while rest.peek().is_some() {
            let mut word = String::new();
            while let Some(c) = rest.next() {
                if c == ',' {
                    if rest.peek() != Some(&',') {
                        break;
                    }
                    rest.next();
                }
                word.push(c);
            }
            match word.split_once('=') {
                Some((name, value)) => self.set(name, value),
                None if word.is_empty() => {}
                None => self.set(&word, "on"),
            }
        }
    }

    /// Adds or replaces an option.
    pub fn set(&mut self, name: &str, value: impl Into<String>) {
        self.pairs.retain(|(known, _)| known != name);
        self.pairs.push((name.to_owned(), value.into()));
    }

    /// Removes an option and returns its value.
    pub fn take(&mut self, name: &str) -> Option<String> {
        let index = self.pairs.iter().position(|(known, _)| known == name)?;
        Some(self.pairs.remove(index).1)
    }

    /// All pairs in the order given.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// The text of an option.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.pairs
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    /// An option that is on or off.
    pub fn bool(&self, name: &str) -> Result<Option<bool>, OptionError> {
        match self.text(name) {
            None => Ok(None),
            Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
            Some("off" | "no" | "false" | "n") => Ok(Some(false)),
            Some(value) => Err(bad(name, value, "'on' or 'off'")),
        }
    }

    /// An option that is a number of bytes.
    pub fn size(&self, name: &str) -> Result<Option<u64>, OptionError> {
        let Some(value) = self.text(name) else {
            return Ok(None);
        };
        match parse_size(value) {
            Some(bytes) => Ok(Some(bytes)),
            None => Err(bad(
                name,
                value,
                "a non-negative number below 2^64, with an optional suffix kMGTPE",
            )),
        }
    }

    /// An option that is a number, decimal or with `0x` hexadecimal.
    pub fn number(&self, name: &str) -> Result<Option<u64>, OptionError> {
        let Some(value) = self.text(name) else {
            return Ok(None);
        };
        let parsed = match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => value.parse(),
        };
        parsed.map(Some).map_err(|_| bad(name, value, "a number"))
    }

    /// Fails on the first option that `specs` does not have.
    pub fn only(&self, specs: &[OptionSpec]) -> Result<(), OptionError> {
        match self
            .pairs
            .iter()
            .find(|(name, _)| !specs.iter().any(|spec| spec.name == name))
        {
            Some((name, _)) => Err(OptionError::Unknown(name.clone())),
            None => Ok(()),
        }
    }
}

fn bad(name: &str, value: &str, expected: &'static str) -> OptionError {
    OptionError::Value {
        name: name.to_owned(),
        value: value.to_owned(),
        expected,
    }
}

/// A size as people and `qemu-img` write it: `512`, `10k`, `1.5G`, `0x1000`; 1024-based suffixes `b k K M G T P E`
/// in either case, bytes without one. `None` if it is none, or above `i64::MAX`.
pub fn parse_size(text: &str) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let bytes = u64::from_str_radix(hex, 16).ok()?;
        return (!hex.starts_with('+')).then_some(bytes);
    }
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at_checked(digits)?;
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') {
        return None;
    }
    let whole: u64 = whole.parse().ok()?;
    let mut bytes = whole.checked_mul(1 << shift)?;
    if !fraction.is_empty() {
        if shift == 0 && fraction.bytes().any(|digit| digit != b'0') {
            return None;
        }
        let part: f64 = format!("0.{fraction}").parse().ok()?;
        // Truncation is meant: qemu-img drops the fraction of a byte too.
        bytes = bytes.checked_add((part * (1u64 << shift) as f64) as u64)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("512", Some(512)),
            ("1k", Some(1024)),
            ("1K", Some(1024)),
            ("1.5G", Some(3 << 29)),
            ("0x100000", Some(1 << 20)),
            ("7E", Some(7 << 60)),
            ("1e6", None),
            ("10kb", None),
            ("1GiB", None),
            ("", None),
            ("-1", None),
            ("+1", None),
            ("1..5", None),
            ("0x+5", None),
            ("99999999999999999999", None),
            ("16E", None),
        ] {
            assert_eq!(parse_size(text), bytes, "{text:?}");
        }
    }

    #[test]
    fn commas_escape_and_bare_names_are_on() {
        let options = Options::parse("backing_file=a,,b,lazy_refcounts,cluster_size=4k");
        assert_eq!(options.text("backing_file"), Some("a,b"));
        assert_eq!(options.bool("lazy_refcounts").unwrap(), Some(true));
        assert_eq!(options.size("cluster_size").unwrap(), Some(4096));
    }

    #[test]
    fn the_last_of_a_name_counts() {
        assert_eq!(Options::parse("a=1,a=2").number("a").unwrap(), Some(2));
    }
}
