//! Why a command ends without success, and how each front end says so.

use std::error::Error as _;
use std::ffi::OsStr;
use std::io;

use diskmill_core::{Error, ErrorKind, SecretError};
use diskmill_formats::crypt::luks::LuksError;

use crate::compat::reason;
use crate::exit::Exit;
use crate::ui::{Ui, escape};

/// The end of a command that did not succeed.
#[derive(Debug)]
pub struct Failure {
    cause: Cause,
    exit: Exit,
}

#[derive(Debug)]
enum Cause {
    /// The command line makes no sense.
    Usage { text: String, try_help: bool },
    /// What is asked for is understood and not done.
    Refused(String),
    /// A library call failed; the frame says how `qemu-img` would introduce it.
    Library { error: Error, frame: Frame },
    /// All has been said.
    Said,
    /// Nobody reads our output any more.
    Unheard,
}

/// What `qemu-img` puts in front of a reason.
#[derive(Debug)]
pub enum Frame {
    /// Nothing.
    Plain,
    /// `Could not open 'NAME': `.
    Open(String),
    /// `NAME: `.
    Named(String),
    /// `NAME: error while converting FORMAT: `.
    Converting {
        /// The target.
        name: String,
        /// Its format.
        format: String,
    },
    /// This text and a colon.
    Text(String),
}

impl Failure {
    /// A command line that makes no sense.
    pub fn usage(text: impl Into<String>) -> Self {
        Self {
            cause: Cause::Usage {
                text: text.into(),
                try_help: false,
            },
            exit: Exit::FAILED,
        }
    }

    /// The same, with a pointer to `--help`.
    pub fn usage_help(text: impl Into<String>) -> Self {
        Self {
            cause: Cause::Usage {
                text: text.into(),
                try_help: true,
            },
            exit: Exit::FAILED,
        }
    }

    /// A request that is understood and not done; the text says what to do instead, if anything.
    pub fn refused(text: impl Into<String>) -> Self {
        Self {
            cause: Cause::Refused(text.into()),
            exit: Exit::FAILED,
        }
    }

    /// A library call that failed.
    pub fn library(error: Error, frame: Frame) -> Self {
        Self {
            cause: Cause::Library { error, frame },
            exit: Exit::FAILED,
        }
    }

    /// An image that did not open.
    pub fn open(name: &OsStr, error: Error) -> Self {
        Self::library(error, Frame::Open(name.to_string_lossy().into_owned()))
    }

    /// The source of a copy cannot be read from byte `at` on.
    pub fn reading(at: u64, error: Error) -> Self {
        Self::library(error, Frame::Text(format!("error while reading at byte {at}")))
    }

    /// All has been said; only the exit code is left.
    pub fn said(exit: Exit) -> Self {
        Self {
            cause: Cause::Said,
            exit,
        }
    }

    /// Standard output did not take what was written.
    pub fn output(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self {
                cause: Cause::Unheard,
                exit: Exit::FAILED,
            }
        } else {
            Self::from(Error::from(error).op("write to standard output"))
        }
    }

    /// The same failure with another exit code.
    #[must_use]
    pub fn exit_with(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    /// The same failure, naming a file if no inner call has done so.
    #[must_use]
    pub fn path(mut self, path: &OsStr) -> Self {
        if let Cause::Library { error, frame } = self.cause {
            let error = error.path(path);
            self.cause = Cause::Library { error, frame };
        }
        self
    }

    /// The exit code.
    pub fn exit(&self) -> Exit {
        self.exit
    }

    /// Whether the reader of standard output has gone.
    pub fn is_unheard(&self) -> bool {
        matches!(self.cause, Cause::Unheard)
    }

    /// Says why, in the words of the front end.
    pub fn report(&self, ui: &Ui) {
        match &self.cause {
            Cause::Usage { text, try_help } => self.report_usage(ui, text, *try_help),
            Cause::Refused(text) if ui.drop_in() => ui.note(&format!("qemu-img: {text}\n")),
            Cause::Refused(text) => ui.note(&format!("diskmill: error: {}\n", escape(text))),
            Cause::Library { error, frame } if ui.drop_in() => {
                ui.note(&format!("qemu-img: {}\n", drop_in_text(error, frame)));
            }
            Cause::Library { error, .. } => {
                ui.note(&format!("diskmill: error: {}\n", chain(error)));
                if let Some(hint) = hint(error) {
                    ui.note(&format!("  hint: {hint}\n"));
                }
            }
            Cause::Said | Cause::Unheard => {}
        }
    }

    fn report_usage(&self, ui: &Ui, text: &str, try_help: bool) {
        let command = match ui.command {
            "" => String::new(),
            name => format!(" {name}"),
        };
        if ui.drop_in() {
            ui.note(&format!("qemu-img: {text}\n"));
            if try_help {
                ui.note(&format!("Try 'qemu-img{command} --help' for more info\n"));
            }
        } else {
            // Further lines are the real tool's second thoughts.
            let first = text.lines().next().unwrap_or_default();
            ui.note(&format!(
                "diskmill: error: {}\n",
                escape(first.trim_end_matches('.'))
            ));
            ui.note(&format!(
                "  hint: 'diskmill{command} --help' lists what can be given\n"
            ));
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::library(error, Frame::Plain)
    }
}

fn drop_in_text(error: &Error, frame: &Frame) -> String {
    match frame {
        Frame::Plain => reason::text(error, None),
        Frame::Open(name) => format!("Could not open '{name}': {}", reason::text(error, Some(name))),
        Frame::Named(name) => format!("{name}: {}", reason::text(error, Some(name))),
        Frame::Converting { name, format } => {
            format!(
                "{name}: error while converting {format}: {}",
                reason::text(error, Some(name))
            )
        }
        Frame::Text(text) => format!("{text}: {}", reason::text(error, None)),
    }
}

/// The error and all that is behind it, on one line.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = match source.downcast_ref::<io::Error>() {
            Some(io) => reason::os_text(io),
            None => source.to_string(),
        };
        // An error that only passes another on says the same.
        if !more.is_empty() && !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = source.source();
    }
    escape(&reason::unsupported(error.kind(), text)).into_owned()
}

/// What a person could do about it.
fn hint(error: &Error) -> Option<&'static str> {
    if let Some(SecretError::Missing(_)) = error.find() {
        return Some(
            "give its passphrase by --passphrase-file FILE, that of a new image by --new-passphrase-file",
        );
    }
    if let Some(LuksError::Password) = error.find() {
        return Some(
            "a passphrase file is taken to its last byte but for one line end; 'diskmill info' lists the slots",
        );
    }
    Some(match error.kind() {
        ErrorKind::Locked => {
            "stop the virtual machine that uses it; to read it nevertheless, at your own risk, add --force-share"
        }
        ErrorKind::NotFound => {
            "check the name; relative names inside images start at the image's own directory"
        }
        ErrorKind::Denied => {
            "check the file's permissions; files that an image names elsewhere need --allow-ref DIRECTORY"
        }
        ErrorKind::NotThisFormat => "leave --format out to have the format found",
        ErrorKind::Malformed | ErrorKind::Corrupt => {
            "'diskmill check' tells more; a copy of the file is the safest start of any repair"
        }
        ErrorKind::NoSpace => "'diskmill measure' tells how much space an image will take",
        _ => return None,
    })
}
