//! Reading a command line the way C's `getopt_long` does, from the clap definition of the command.
//!
//! Both front ends use it: options may follow file names, long options may be cut short as long as they stay
//! unambiguous, a value may start with a dash, `-ofoo` is `-o foo`, and `--` ends the options. What comes out is the
//! same command line in one spelling, which clap then turns into values.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::{Arg, ArgAction, Command};

use crate::commands::NATIVE;
use crate::ui::Mode;

/// Documented names of `convert` that the real tool does not know. They are understood in full, but a shortened name
/// must keep its meaning, so they never make one ambiguous.
const WHOLE_ONLY: [&str; 8] = [
    "progress",
    "compress",
    "no-create",
    "target-format",
    "target-options",
    "target-cache",
    "source-snapshot",
    "repair-all",
];

/// What a command line turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// `-h` or `--help`, in front of anything that is wrong.
    Help,
    /// The same command line, options first and spelled out, `--`, then the rest.
    Line(Vec<OsString>),
}

/// What is wrong with a command line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GetoptError {
    /// No such long option.
    #[error("unrecognized option '{0}'")]
    Unrecognized(String),
    /// No such short option.
    #[error("invalid option -- '{0}'")]
    Invalid(char),
    /// A long option that is cut too short.
    #[error("option '{given}' is ambiguous; possibilities: {}", quoted(candidates))]
    Ambiguous {
        /// What was given.
        given: String,
        /// The options it may stand for.
        candidates: Vec<String>,
    },
    /// A long option without its value.
    #[error("option '--{0}' requires an argument")]
    LongNeedsValue(String),
    /// A short option without its value.
    #[error("option requires an argument -- '{0}'")]
    ShortNeedsValue(char),
    /// A value for an option that takes none.
    #[error("option '--{0}' doesn't allow an argument")]
    TakesNoValue(String),
}

fn quoted(names: &[String]) -> String {
    let names: Vec<_> = names.iter().map(|name| format!("'--{name}'")).collect();
    names.join(" ")
}

/// Whether an option takes a value.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Takes {
    Nothing,
    Perhaps,
    Value,
}

fn takes(arg: &Arg, mode: Mode) -> Takes {
    if !arg.get_action().takes_values() {
        return Takes::Nothing;
    }
    match arg.get_num_args() {
        Some(range) if range.min_values() == 0 && mode == Mode::DropIn => Takes::Nothing,
        Some(range) if range.min_values() == 0 => Takes::Perhaps,
        _ => Takes::Value,
    }
}

struct Reader<'a> {
    options: Vec<&'a Arg>,
    mode: Mode,
    line: Vec<OsString>,
    rest: Vec<OsString>,
}

/// Reads `args`, the words behind the command's name, as options of `command`.
///
/// With `negative`, words such as `-1G` are no options (the size of `resize`).
pub fn read(command: &Command, args: &[OsString], mode: Mode, negative: bool) -> Result<Read, GetoptError> {
    let options = command
        .get_arguments()
        .filter(|arg| !arg.is_positional())
        .filter(|arg| mode == Mode::Native || arg.get_help_heading() != Some(NATIVE))
        .collect();
    let mut reader = Reader {
        options,
        mode,
        line: Vec::new(),
        rest: Vec::new(),
    };
    let mut words = args.iter();
    while let Some(word) = words.next() {
        let bytes = word.as_bytes();
        let help = match bytes {
            b"--" => {
                reader.rest.extend(words.cloned());
                break;
            }
            [b'-', b'-', name @ ..] => reader.long(name, &mut words)?,
            [b'-', digit, ..] if negative && digit.is_ascii_digit() => {
                reader.rest.push(word.clone());
                false
            }
            [b'-', letters @ ..] if !letters.is_empty() => reader.short(letters, &mut words)?,
            _ => {
                reader.rest.push(word.clone());
                false
            }
        };
        if help {
            return Ok(Read::Help);
        }
    }
    let Reader { mut line, rest, .. } = reader;
    line.push("--".into());
    line.extend(rest);
    Ok(Read::Line(line))
}

impl<'a> Reader<'a> {
    /// Reads `--name` or `--name=value`; true if it asks for help.
    fn long(&mut self, text: &[u8], words: &mut std::slice::Iter<'_, OsString>) -> Result<bool, GetoptError> {
        let (name, value) = match text.iter().position(|byte| *byte == b'=') {
            Some(at) => (&text[..at], Some(&text[at + 1..])),
            None => (text, None),
        };
        let name = String::from_utf8_lossy(name).into_owned();
        let given = || format!("--{}", String::from_utf8_lossy(text));
        let Some((arg, long)) = self.find(&name, given)? else {
            return match value {
                Some(_) => Err(GetoptError::TakesNoValue("help".to_owned())),
                None => Ok(true),
            };
        };
        let takes = takes(arg, self.mode);
        match (takes, value) {
            (Takes::Nothing, Some(_)) => Err(GetoptError::TakesNoValue(long)),
            (Takes::Nothing | Takes::Perhaps, None) => {
                self.push(arg, None);
                Ok(false)
            }
            (_, Some(value)) => {
                self.push(arg, Some(value));
                Ok(false)
            }
            (Takes::Value, None) => match words.next() {
                Some(value) => {
                    self.push(arg, Some(value.as_bytes()));
                    Ok(false)
                }
                None => Err(GetoptError::LongNeedsValue(long)),
            },
        }
    }

    /// The option called `name` and its full name, or `None` for help.
    fn find(&self, name: &str, given: impl Fn() -> String) -> Result<Option<(&'a Arg, String)>, GetoptError> {
        if name == "help" {
            return Ok(None);
        }
        let mut begins: Vec<(Option<&'a Arg>, String)> = Vec::new();
        for arg in self.options.iter().copied() {
            for long in longs(arg) {
                if long == name {
                    return Ok(Some((arg, long.to_owned())));
                }
                if long.starts_with(name) && !WHOLE_ONLY.contains(&long) {
                    begins.push((Some(arg), long.to_owned()));
                }
            }
        }
        if "help".starts_with(name) {
            begins.push((None, "help".to_owned()));
        }
        let same = |a: Option<&Arg>, b: Option<&Arg>| a.map(Arg::get_id) == b.map(Arg::get_id);
        match begins.as_slice() {
            [] => Err(GetoptError::Unrecognized(format!("--{name}"))),
            [(first, _), more @ ..] if more.iter().all(|(other, _)| same(*first, *other)) => {
                let (arg, long) = begins.swap_remove(0);
                Ok(arg.map(|arg| (arg, long)))
            }
            _ => Err(GetoptError::Ambiguous {
                given: given(),
                candidates: begins.into_iter().map(|(_, long)| long).collect(),
            }),
        }
    }

    /// Reads a group of letters; true if one asks for help.
    fn short(
        &mut self,
        letters: &[u8],
        words: &mut std::slice::Iter<'_, OsString>,
    ) -> Result<bool, GetoptError> {
        let mut letters = letters;
        while let [letter, more @ ..] = letters {
            let letter = char::from(*letter);
            let arg = self
                .options
                .iter()
                .copied()
                .find(|arg| arg.get_short() == Some(letter));
            let Some(arg) = arg else {
                return match letter {
                    'h' => Ok(true),
                    _ => Err(GetoptError::Invalid(letter)),
                };
            };
            if takes(arg, self.mode) == Takes::Value {
                let value = match more {
                    [] => words
                        .next()
                        .map(|word| word.as_bytes())
                        .ok_or(GetoptError::ShortNeedsValue(letter))?,
                    more => more,
                };
                self.push(arg, Some(value));
                return Ok(false);
            }
            self.push(arg, None);
            letters = more;
        }
        Ok(false)
    }

    fn push(&mut self, arg: &Arg, value: Option<&[u8]>) {
        let mut word = b"--".to_vec();
        word.extend_from_slice(arg.get_long().unwrap_or_default().as_bytes());
        if let Some(value) = value {
            word.push(b'=');
            word.extend_from_slice(value);
        }
        let word = OsString::from_vec(word);
        // A switch given twice is a switch; clap would ask for a counter.
        if matches!(arg.get_action(), ArgAction::SetTrue) && self.line.contains(&word) {
            return;
        }
        self.line.push(word);
    }
}

/// All long names of an option.
fn longs(arg: &Arg) -> impl Iterator<Item = &str> {
    arg.get_long()
        .into_iter()
        .chain(arg.get_all_aliases().unwrap_or_default())
}

/// Whether `word` could be the name of a command rather than an option.
pub fn is_option(word: &OsStr) -> bool {
    word.as_bytes().len() > 1 && word.as_bytes().starts_with(b"-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands;

    fn words(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(OsString::from).collect()
    }

    fn run(command: &str, text: &str, mode: Mode) -> Result<Read, GetoptError> {
        let spec = commands::find(command).unwrap();
        read(&spec.definition(), &words(text), mode, spec.negative)
    }

    fn line(command: &str, text: &str) -> String {
        match run(command, text, Mode::DropIn).unwrap() {
            Read::Help => "help".to_owned(),
            Read::Line(words) => words.join(OsStr::new(" ")).into_string().unwrap(),
        }
    }

    #[test]
    fn options_may_follow_names_and_stick_to_their_values() {
        assert_eq!(
            line("create", "-f raw x 1M -oa=b -o c"),
            "--format=raw --options=a=b --options=c -- x 1M"
        );
        assert_eq!(
            line("convert", "-pqOqcow2 a b"),
            "--progress --quiet --target-format=qcow2 -- a b"
        );
        assert_eq!(
            line("info", "x --force-share --output=json"),
            "--force-share --output=json -- x"
        );
        assert_eq!(line("info", "x -- -f"), "-- x -f");
        assert_eq!(line("create", "-o -x y"), "--options=-x -- y");
        assert_eq!(line("resize", "--shrink x -1G"), "--shrink -- x -1G");
        assert_eq!(line("info", "-U -U x"), "--force-share -- x");
    }

    #[test]
    fn long_names_may_be_cut_while_unambiguous() {
        assert_eq!(
            line("info", "--ba --out json x"),
            "--backing-chain --output=json -- x"
        );
        assert_eq!(line("info", "--he x"), "help");
        assert_eq!(line("convert", "--source-i a b"), "--source-image-opts -- a b");
        assert_eq!(
            run("info", "--o=json x", Mode::DropIn).unwrap_err(),
            GetoptError::Ambiguous {
                given: "--o=json".to_owned(),
                candidates: vec!["output".to_owned(), "object".to_owned()],
            }
        );
        // The real tool does not know --compress, so there --co can only mean this.
        assert_eq!(line("convert", "--co a b"), "--copy-range-offloading -- a b");
        assert_eq!(line("convert", "--compress a b"), "--compress -- a b");
    }

    #[test]
    fn errors_are_worded_as_the_c_library_words_them() {
        for (command, text, message) in [
            ("info", "--bogus x", "unrecognized option '--bogus'"),
            ("info", "-Zq x", "invalid option -- 'Z'"),
            ("info", "-f", "option requires an argument -- 'f'"),
            ("info", "--output", "option '--output' requires an argument"),
            (
                "info",
                "--backing-chain=x y",
                "option '--backing-chain' doesn't allow an argument",
            ),
            ("info", "--help=x", "option '--help' doesn't allow an argument"),
            (
                "convert",
                "--progress=json a b",
                "option '--progress' doesn't allow an argument",
            ),
            ("convert", "--untrusted a b", "unrecognized option '--untrusted'"),
        ] {
            assert_eq!(run(command, text, Mode::DropIn).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn the_native_front_end_has_more_options() {
        let Read::Line(words) = run("convert", "--progress=json --untrusted a b", Mode::Native).unwrap()
        else {
            panic!("not a command line");
        };
        assert_eq!(words.join(OsStr::new(" ")), "--progress=json --untrusted -- a b");
    }
}
