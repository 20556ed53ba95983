//! The only code that prints.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

use crate::error::Failure;

/// Which of the two front ends this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `diskmill`: safe defaults, everything there is.
    Native,
    /// `qemu-img`: what that prints and does.
    DropIn,
}

/// Where output goes, and in whose words.
#[derive(Clone, Copy, Debug)]
pub struct Ui {
    /// Which front end.
    pub mode: Mode,
    /// The command that runs; empty if none does.
    pub command: &'static str,
}

impl Ui {
    /// Whether this is `qemu-img`.
    pub fn drop_in(&self) -> bool {
        self.mode == Mode::DropIn
    }

    /// The name messages start with.
    pub fn program(&self) -> &'static str {
        match self.mode {
            Mode::Native => "diskmill",
            Mode::DropIn => "qemu-img",
        }
    }

    /// Writes results.
    pub fn print(&self, text: impl AsRef<[u8]>) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_ref())
            .and_then(|()| out.flush())
            .map_err(Failure::output)
    }

    /// Writes results from a place that cannot fail (a progress line).
    pub fn print_quietly(&self, text: &str) {
        let mut out = io::stdout().lock();
        // Whoever reads progress may have gone; the work matters more.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }

    /// Writes a message for people. There is nowhere to complain if that fails.
    pub fn note(&self, text: &str) {
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }

    /// Writes a warning.
    pub fn warn(&self, text: &str) {
        self.note(&format!("{}: warning: {text}\n", self.program()));
    }

    /// Whether somebody watches standard error.
    pub fn watched(&self) -> bool {
        io::stderr().is_terminal()
    }

    /// A file name for human eyes. Under the name `diskmill` control characters are escaped, so that a name cannot
    /// talk to the terminal; `qemu-img` passes them on, and so must we under its name.
    pub fn name<'a>(&self, name: &'a str) -> Cow<'a, str> {
        if self.drop_in() {
            Cow::Borrowed(name)
        } else {
            escape(name)
        }
    }
}

/// `text` with control characters written as escapes.
pub fn escape(text: &str) -> Cow<'_, str> {
    if text.chars().any(hostile) {
        let mut out = String::new();
        for c in text.chars() {
            if hostile(c) {
                out.extend(c.escape_default());
            } else {
                out.push(c);
            }
        }
        Cow::Owned(out)
    } else {
        Cow::Borrowed(text)
    }
}

/// Control characters, and those that reorder or hide text.
fn hostile(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_talk_to_the_terminal() {
        assert_eq!(escape("plain é.img"), "plain é.img");
        assert_eq!(escape("a\u{1b}[2Jb\n\u{202e}"), "a\\u{1b}[2Jb\\n\\u{202e}");
    }
}
