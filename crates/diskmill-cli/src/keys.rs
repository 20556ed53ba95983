//! The keys of encrypted images, from the command line, from files and from a terminal.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use clap::Args;
use diskmill::open::{self, OpenRequest};
use diskmill_core::{Ask, Error, ErrorKind, Format, Options, Result, Secret, Secrets};

use crate::commands::NATIVE;
use crate::error::Failure;
use crate::object;
use crate::prompt;
use crate::ui::{Ui, escape};

/// Options that say what the keys of images are.
#[derive(Args, Clone)]
pub struct KeyArgs {
    /// A secret or another object that options refer to
    #[arg(long, value_name = "OBJDEF")]
    object: Vec<String>,
    /// Passphrase of encrypted images: what is in this file, without the line end of its line; '-' is standard input
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath, help_heading = NATIVE)]
    passphrase_file: Option<PathBuf>,
    /// What they come to, once that is known: a pipe can be read once.
    #[arg(skip)]
    read: OnceLock<Given>,
}

/// An option that says what the key of a new image, or a new key, is.
#[derive(Args, Clone, Debug)]
pub struct NewKeyArgs {
    /// Passphrase of what is made, in the same way: qcow2 is encrypted then (default: that of --passphrase-file)
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath, help_heading = NATIVE)]
    pub new_passphrase_file: Option<PathBuf>,
    /// What is in it, once that is known: a pipe can be read once.
    #[arg(skip)]
    read: OnceLock<Secret>,
}

/// What options say of keys.
#[derive(Clone, Debug)]
struct Given {
    named: Secrets,
    asker: Option<Arc<Asker>>,
}

// No derived one: an argument may hold a secret.
impl fmt::Debug for KeyArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyArgs(..)")
    }
}

impl KeyArgs {
    /// The secrets for images that are opened. Nobody is asked yet; files are read.
    pub fn opening(&self, ui: &Ui) -> Result<Secrets, Failure> {
        let given = self.given(ui)?;
        let mut secrets = given.named;
        if let Some(asker) = given.asker {
            secrets.set_ask(asker);
        }
        Ok(secrets)
    }

    /// The secrets for an image that is made, and for a key that is added.
    pub fn making(&self, ui: &Ui, new: Option<&NewKeyArgs>) -> Result<Secrets, Failure> {
        let given = self.given(ui)?;
        let mut secrets = given.named;
        let path = new.and_then(|new| new.new_passphrase_file.as_deref());
        if path == Some(Path::new("-")) && self.passphrase_file.as_deref() == path {
            return Err(Failure::usage(
                "only one passphrase can come through standard input",
            ));
        }
        let asker = match new.map(NewKeyArgs::passphrase).transpose()?.flatten() {
            Some(passphrase) => Some(Arc::new(Asker::of(passphrase))),
            None => match given.asker.filter(|asker| asker.passphrase.is_some()) {
                Some(asker) => Some(asker),
                None => can_ask(ui).then(|| Arc::new(Asker::terminal(true))),
            },
        };
        if let Some(asker) = asker {
            secrets.set_ask(asker);
        }
        Ok(secrets)
    }

    /// Fails if a passphrase comes through standard input, which something else is wanted of.
    pub fn leave_stdin(&self, ui: &Ui, new: Option<&NewKeyArgs>) -> Result<(), Failure> {
        let new = new.and_then(|new| new.new_passphrase_file.as_deref());
        let mut paths = [self.passphrase_file.as_deref(), new].into_iter().flatten();
        match paths.any(|path| path == Path::new("-")) && !ui.drop_in() {
            true => Err(Failure::usage(
                "standard input cannot be both a disk and a passphrase",
            )),
            false => Ok(()),
        }
    }

    /// Warns if a passphrase was given that nothing needed: somebody may believe that something is encrypted.
    pub fn warn_if_unused(&self, ui: &Ui) {
        let asker = self.read.get().and_then(|given| given.asker.as_ref());
        if asker.is_some_and(|asker| asker.passphrase.is_some() && !asker.used.load(Ordering::Relaxed)) {
            ui.warn("nothing is encrypted: the passphrase of --passphrase-file was not used");
        }
    }

    fn given(&self, ui: &Ui) -> Result<Given, Failure> {
        if let Some(given) = self.read.get() {
            return Ok(given.clone());
        }
        let asker = match &self.passphrase_file {
            Some(path) => Some(Asker::of(passphrase(path)?)),
            None => (can_ask(ui) && READING.contains(&ui.command)).then(|| Asker::terminal(false)),
        };
        let given = Given {
            named: object::secrets(&self.object, ui)?,
            asker: asker.map(Arc::new),
        };
        Ok(self.read.get_or_init(|| given).clone())
    }
}

impl NewKeyArgs {
    /// The passphrase that is given, if one is.
    fn passphrase(&self) -> Result<Option<Secret>, Failure> {
        let Some(path) = &self.new_passphrase_file else {
            return Ok(None);
        };
        if let Some(known) = self.read.get() {
            return Ok(Some(known.clone()));
        }
        let secret = passphrase(path)?;
        Ok(Some(self.read.get_or_init(|| secret).clone()))
    }

    /// What a passphrase for a new image of `format` means beside the `options` it has.
    pub fn imply(&self, ui: &Ui, format: &str, options: &mut Options) -> Result<(), Failure> {
        let aes = options.text("encrypt.format") == Some("aes")
            || matches!(options.bool("encryption"), Ok(Some(true)));
        if aes && !ui.drop_in() {
            ui.warn("the old AES encryption protects little; encrypt.format=luks in qcow2 images, or luks images, do");
        }
        if self.new_passphrase_file.is_none() {
            return Ok(());
        }
        let said = options.text("encrypt.format").is_some() || options.text("encryption").is_some();
        match format {
            "luks" => {}
            "qcow2" | "qcow" if said => {}
            "qcow2" => options.set("encrypt.format", "luks"),
            "qcow" => {
                return Err(Failure::usage(
                    "--new-passphrase-file: qcow images are encrypted with -o encrypt.format=aes only, which protects little",
                ));
            }
            other => {
                return Err(Failure::usage(format!(
                    "--new-passphrase-file: images in {other} format are not encrypted; luks and qcow2 can be"
                )));
            }
        }
        Ok(())
    }
}

impl NewKeyArgs {
    /// Makes of a new passphrase that is given a further key of the image that `request` opens: `options` are those of
    /// `amend`.
    pub fn add(&self, request: &mut OpenRequest, options: &mut Options) -> Result<(), Failure> {
        let Some(passphrase) = self.passphrase()? else {
            return Ok(());
        };
        request.secrets.add(NEW_KEY, passphrase)?;
        let image =
            open::facts(request).map_err(|error| Failure::open(request.spec.text.as_os_str(), error))?;
        let prefix = match image.format {
            Format::Luks => "",
            _ => "encrypt.",
        };
        for (name, value) in [("state", "active"), ("new-secret", NEW_KEY)] {
            let name = format!("{prefix}{name}");
            if options.text(&name).is_none() {
                options.set(&name, value);
            }
        }
        Ok(())
    }
}

/// The id of a key that is added by hand: one that no `--object` can have.
const NEW_KEY: &str = "+new";

/// Commands that read data, and for that need keys; the others look at what is never encrypted.
const READING: [&str; 8] = [
    "convert", "compare", "dd", "commit", "rebase", "bench", "amend", "ova",
];

/// Whether `command` of the native front end opens encrypted images only with a key.
pub fn reads_data(command: &str) -> bool {
    READING.contains(&command)
}

/// Whether somebody sits there who can be asked.
fn can_ask(ui: &Ui) -> bool {
    !ui.drop_in() && io::stdin().is_terminal()
}

/// Gives the passphrase that came from a file, or asks on the terminal, once for each image.
#[derive(Debug)]
struct Asker {
    passphrase: Option<Secret>,
    /// For new images: asked for twice.
    twice: bool,
    told: Mutex<HashMap<String, Secret>>,
    used: AtomicBool,
}

impl Asker {
    fn of(passphrase: Secret) -> Self {
        Self {
            passphrase: Some(passphrase),
            ..Self::terminal(false)
        }
    }

    fn terminal(twice: bool) -> Self {
        Self {
            passphrase: None,
            twice,
            told: Mutex::default(),
            used: AtomicBool::new(false),
        }
    }

    fn prompt(&self, image: &str) -> Result<Secret> {
        let image = escape(image);
        if !self.twice {
            return prompt::read(&format!("Passphrase for '{image}': "));
        }
        let first = prompt::read(&format!("New passphrase for '{image}': "))?;
        if first.as_bytes().is_empty() {
            return Err(Error::new(
                ErrorKind::Usage,
                "an empty passphrase protects nothing",
            ));
        }
        let second = prompt::read("The same again: ")?;
        match first.as_bytes() == second.as_bytes() {
            true => Ok(first),
            false => Err(Error::new(ErrorKind::Usage, "the two passphrases differ")),
        }
    }
}

impl Ask for Asker {
    fn ask(&self, image: &str) -> Result<Option<Secret>> {
        self.used.store(true, Ordering::Relaxed);
        if let Some(passphrase) = &self.passphrase {
            return Ok(Some(passphrase.clone()));
        }
        // Held while somebody types: two questions at once could not be told apart.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(secret) = told.get(image) {
            return Ok(Some(secret.clone()));
        }
        let secret = self.prompt(image)?;
        told.insert(image.to_owned(), secret.clone());
        Ok(Some(secret))
    }
}

/// The passphrase in the file `path`.
fn passphrase(path: &Path) -> Result<Secret, Failure> {
    let secret = if path == Path::new("-") {
        read_all(&mut io::stdin().lock())
    } else {
        read_file(path)
    };
    let failed =
        |error: io::Error| Failure::from(Error::from(error).op("read the passphrase from").path(path));
    let secret = without_line_end(secret.map_err(failed)?);
    match secret.as_bytes().is_empty() {
        true => Err(Failure::usage(format!(
            "there is no passphrase in '{}'",
            path.display()
        ))),
        false => Ok(secret),
    }
}

/// `secret` without the line end of its one line of text. Several lines, and what is no text, are taken as they are:
/// such files are keys, not passphrases somebody typed.
fn without_line_end(secret: Secret) -> Secret {
    let bytes = secret.as_bytes();
    let line = bytes
        .strip_suffix(b"\n")
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    match line {
        Some(line)
            if std::str::from_utf8(line)
                .is_ok_and(|text| !text.contains(|c: char| c.is_control() && c != '\t')) =>
        {
            Secret::new(line.to_vec())
        }
        _ => secret,
    }
}

/// Bytes of a file with a secret at most.
const LARGEST: usize = 8 << 20;

/// All of the file `path`, as a secret.
pub fn read_file(path: &Path) -> io::Result<Secret> {
    read_all(&mut File::open(path)?)
}

/// All there is, in memory that is wiped.
fn read_all(from: &mut dyn Read) -> io::Result<Secret> {
    let mut room = 4096;
    let mut have = 0;
    let mut held = Secret::new(Vec::new());
    loop {
        // Grown by hand: a vector that grows leaves copies behind.
        let mut bytes = Vec::with_capacity(room);
        bytes.extend_from_slice(held.as_bytes());
        let read = from.take((room - have) as u64).read_to_end(&mut bytes);
        held = Secret::new(bytes);
        have = held.as_bytes().len();
        read?;
        if have < room {
            return Ok(held);
        }
        if room >= LARGEST {
            let text = format!("it has more than {LARGEST} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        room *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ui::Mode;

    #[test]
    fn a_line_end_is_no_part_of_a_passphrase_but_of_a_key() {
        let taken = |bytes: &[u8]| without_line_end(Secret::new(bytes.to_vec())).as_bytes().to_vec();
        for (bytes, secret) in [
            (&b"pw"[..], &b"pw"[..]),
            (b"pw\n", b"pw"),
            (b"pw\r\n", b"pw"),
            (b"p w\t\n", b"p w\t"),
            (b"pw\n\n", b"pw\n\n"),
            (b"a\nb\n", b"a\nb\n"),
            (b"\xff\n", b"\xff\n"),
            (b"\0\n", b"\0\n"),
            (b"\n", b""),
        ] {
            assert_eq!(taken(bytes), secret, "{bytes:?}");
        }
    }

    #[test]
    fn files_are_read_whole_up_to_a_limit() {
        for len in [0, 1, 4095, 4096, 4097, 100_000] {
            let bytes = vec![7; len];
            assert_eq!(read_all(&mut bytes.as_slice()).unwrap().as_bytes(), bytes);
        }
        assert!(read_all(&mut io::repeat(1)).is_err());
    }

    #[test]
    fn a_passphrase_for_a_new_image_encrypts_it() {
        let new = NewKeyArgs {
            new_passphrase_file: Some("p".into()),
            read: OnceLock::new(),
        };
        let ui = Ui {
            mode: Mode::Native,
            command: "create",
        };
        let mut options = Options::new();
        new.imply(&ui, "luks", &mut options).unwrap();
        assert!(options.is_empty());
        new.imply(&ui, "qcow2", &mut options).unwrap();
        assert_eq!(options.text("encrypt.format"), Some("luks"));
        let mut legacy = Options::parse("encrypt.format=aes");
        new.imply(&ui, "qcow", &mut legacy).unwrap();
        assert_eq!(legacy.text("encrypt.format"), Some("aes"));
        for format in ["qcow", "raw", "vmdk"] {
            assert!(new.imply(&ui, format, &mut Options::new()).is_err(), "{format}");
        }
    }
}
