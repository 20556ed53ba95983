//! Asking on the terminal for what nobody else should see.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::mem;

use diskmill_core::{Error, ErrorKind, Result, Secret};
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::SIGINT;
use signal_hook::low_level;
use zeroize::Zeroizing;

/// Bytes of a line at most.
const LONGEST: usize = 4096;

/// Shows `question` on the terminal and returns the line that is typed, which does not show.
///
/// An error of kind [`ErrorKind::Cancelled`] if that is broken off, after the signal for it has been raised.
pub fn read(question: &str) -> Result<Secret> {
    let failed = |error: io::Error| Error::from(error).op("ask on the terminal");
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/tty")
        .map_err(failed)?;
    let mut tty = &opened;
    let silent = Silent::begin(&opened).map_err(failed)?;
    let line = tty.write_all(question.as_bytes()).and_then(|()| line(&mut tty));
    let ended = tty.write_all(b"\n");
    drop(silent);
    match line.and_then(|line| ended.map(|()| line)).map_err(failed)? {
        Line::Typed(secret) => Ok(secret),
        Line::Ended => Err(Error::new(ErrorKind::Usage, "no passphrase was typed")),
        Line::Broken => {
            low_level::raise(SIGINT).map_err(failed)?;
            Err(Error::bare(ErrorKind::Cancelled))
        }
    }
}

/// What came of a question.
enum Line {
    Typed(Secret),
    /// The end of input instead of an answer.
    Ended,
    /// Control-C.
    Broken,
}

/// Reads signs up to the end of the line, as a terminal without a line editor hands them over.
fn line(from: &mut dyn Read) -> io::Result<Line> {
    // Never grows, so that no copy stays behind.
    let mut typed = Zeroizing::new(Vec::with_capacity(LONGEST));
    loop {
        let mut sign = [0];
        let read = match from.read(&mut sign) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        match (read, sign) {
            (0, _) if typed.is_empty() => return Ok(Line::Ended),
            (0, _) | (_, [b'\n' | b'\r']) => return Ok(Line::Typed(Secret::new(mem::take(&mut typed)))),
            (_, [CONTROL_C]) => return Ok(Line::Broken),
            (_, [CONTROL_D]) if typed.is_empty() => return Ok(Line::Ended),
            (_, [CONTROL_U]) => typed.clear(),
            (_, [BACKSPACE | CONTROL_H]) => {
                // A character may be several bytes.
                while typed.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {}
            }
            (_, [sign]) if typed.len() < LONGEST => typed.push(sign),
            _ => {
                let text = format!("the line has more than {LONGEST} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        }
    }
}

const CONTROL_C: u8 = 3;
const CONTROL_D: u8 = 4;
const CONTROL_H: u8 = 8;
const CONTROL_U: u8 = 21;
const BACKSPACE: u8 = 127;

/// A terminal that shows nothing of what is typed, hands over each sign, and sends no signals; until this is dropped.
struct Silent<'a> {
    tty: &'a File,
    before: Termios,
}

impl<'a> Silent<'a> {
    fn begin(tty: &'a File) -> io::Result<Self> {
        let before = tcgetattr(tty)?;
        let mut silent = before.clone();
        silent
            .local_modes
            .remove(LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::ISIG);
        silent.special_codes[SpecialCodeIndex::VMIN] = 1;
        silent.special_codes[SpecialCodeIndex::VTIME] = 0;
        // What was typed before the question was not meant for it.
        tcsetattr(tty, OptionalActions::Flush, &silent)?;
        Ok(Self { tty, before })
    }
}

impl Drop for Silent<'_> {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _ = tcsetattr(self.tty, OptionalActions::Flush, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(bytes: &[u8]) -> Option<Vec<u8>> {
        match line(&mut &*bytes).unwrap() {
            Line::Typed(secret) => Some(secret.as_bytes().to_vec()),
            Line::Ended | Line::Broken => None,
        }
    }

    #[test]
    fn a_line_is_edited_and_ends() {
        for (bytes, secret) in [
            (&b"pw\nmore"[..], &b"pw"[..]),
            (b"pw\r", b"pw"),
            (b"pw", b"pw"),
            (b"px\x7fw\n", b"pw"),
            (b"p\xc3\xa9\x08w\n", b"pw"),
            (b"\x7fpw\n", b"pw"),
            (b"wrong\x15pw\n", b"pw"),
            (b"\n", b""),
        ] {
            assert_eq!(typed(bytes).as_deref(), Some(secret), "{bytes:?}");
        }
        for bytes in [&b""[..], b"\x04", b"pw\x03\n"] {
            assert_eq!(typed(bytes), None, "{bytes:?}");
        }
        assert!(line(&mut io::repeat(b'a')).is_err());
    }
}
