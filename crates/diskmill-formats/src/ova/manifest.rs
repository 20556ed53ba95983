//! The manifest of a package: one digest a file (DSP0243, 6.2).
//!
//! ```text
//! SHA256(appliance.ovf)= 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
//! ```

use std::fmt;

use sha1::Sha1;
use sha2::{Digest as _, Sha256, Sha512};

use super::name::{MemberName, NameError};

/// Bytes of a manifest that are read.
pub const MAX_LEN: u64 = 4 << 20;

/// How a digest is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Algorithm {
    /// SHA-1: what OVF 1.x asks for.
    Sha1,
    /// SHA-256: what OVF 2.x asks for.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Algorithm {
    /// What a manifest calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "SHA1",
            Self::Sha256 => "SHA256",
            Self::Sha512 => "SHA512",
        }
    }

    /// The algorithm of that name. Some exporters put a hyphen into it.
    pub fn by_name(name: &str) -> Option<Self> {
        [Self::Sha1, Self::Sha256, Self::Sha512]
            .into_iter()
            .find(|known| known.name().eq_ignore_ascii_case(&name.replacen('-', "", 1)))
    }

    const fn digits(self) -> usize {
        match self {
            Self::Sha1 => 40,
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A digest being made.
#[derive(Clone, Debug)]
pub struct Hasher(State);

#[derive(Clone, Debug)]
enum State {
    Sha1(Sha1),
    Sha256(Sha256),
    Sha512(Box<Sha512>),
}

impl Hasher {
    /// One that has seen nothing.
    pub fn new(algorithm: Algorithm) -> Self {
        Self(match algorithm {
            Algorithm::Sha1 => State::Sha1(Sha1::new()),
            Algorithm::Sha256 => State::Sha256(Sha256::new()),
            Algorithm::Sha512 => State::Sha512(Box::new(Sha512::new())),
        })
    }

    /// Takes further bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Sha1(hasher) => hasher.update(bytes),
            State::Sha256(hasher) => hasher.update(bytes),
            State::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// The digest, in lower-case hexadecimal digits.
    pub fn finish(self) -> String {
        let bytes = match self.0 {
            State::Sha1(hasher) => hasher.finalize().to_vec(),
            State::Sha256(hasher) => hasher.finalize().to_vec(),
            State::Sha512(hasher) => hasher.finalize().to_vec(),
        };
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// What a manifest says of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which file.
    pub name: MemberName,
    /// How its digest is made.
    pub algorithm: Algorithm,
    /// The digest, in lower-case hexadecimal digits.
    pub digest: String,
}

/// What is wrong with a manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Too long to be one.
    #[error("the manifest has {0} bytes, must be at most {MAX_LEN}")]
    TooLong(u64),
    /// Not text.
    #[error("the manifest is not UTF-8")]
    NotText,
    /// A line that is none of a manifest.
    #[error("line {0} is not ALGORITHM(FILE)= DIGEST")]
    Line(usize),
    /// A digest nobody here makes.
    #[error("line {line} names the algorithm '{name}', must be SHA1, SHA256 or SHA512")]
    Algorithm {
        /// The line, from 1.
        line: usize,
        /// What it names.
        name: String,
    },
    /// A digest of the wrong length, or not hexadecimal.
    #[error("line {line} has a digest of {found} characters, must be {wanted} hexadecimal digits")]
    Digest {
        /// The line, from 1.
        line: usize,
        /// Its characters.
        found: usize,
        /// How many the algorithm has.
        wanted: usize,
    },
    /// A file that is not one of a package.
    #[error("line {line} names a file that cannot be in the package")]
    Name {
        /// The line, from 1.
        line: usize,
        /// Why.
        #[source]
        source: NameError,
    },
    /// Two lines for one file.
    #[error("the manifest has two lines for '{0}'")]
    Twice(String),
}

/// The digests of a package's files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    entries: Vec<Entry>,
}

impl Manifest {
    /// Reads the text of a manifest. Blanks around `=`, CRLF and upper-case digits are common and do no harm.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() as u64 > MAX_LEN {
            return Err(ManifestError::TooLong(bytes.len() as u64));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| ManifestError::NotText)?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut entries: Vec<Entry> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for (index, line) in text.lines().enumerate() {
            let number = index.saturating_add(1);
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            let entry = entry(line, number)?;
            if !seen.insert(entry.name.clone()) {
                return Err(ManifestError::Twice(entry.name.as_str().to_owned()));
            }
            entries.push(entry);
        }
        Ok(Self { entries })
    }

    /// Its lines, in their order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// What it says of a file.
    pub fn find(&self, name: &MemberName) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == *name)
    }

    /// Adds a line. The file must not be there yet.
    pub fn push(&mut self, entry: Entry) {
        self.entries.push(entry);
    }
}

/// The text of the file: no blank before the parenthesis, which VMware's readers refuse.
impl fmt::Display for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Entry {
            name,
            algorithm,
            digest,
        } in &self.entries
        {
            writeln!(f, "{algorithm}({name})= {digest}")?;
        }
        Ok(())
    }
}

fn entry(line: &str, number: usize) -> Result<Entry, ManifestError> {
    let bad = || ManifestError::Line(number);
    // A name may have parentheses and equals signs of its own: the digest is behind the last.
    let (left, digest) = line.rsplit_once('=').ok_or_else(bad)?;
    let (algorithm, name) = left
        .trim_end()
        .strip_suffix(')')
        .and_then(|left| left.split_once('('))
        .ok_or_else(bad)?;
    let algorithm = Algorithm::by_name(algorithm.trim()).ok_or_else(|| ManifestError::Algorithm {
        line: number,
        name: algorithm.trim().to_owned(),
    })?;
    let digest = digest.trim();
    if digest.len() != algorithm.digits() || !digest.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Err(ManifestError::Digest {
            line: number,
            found: digest.chars().count(),
            wanted: algorithm.digits(),
        });
    }
    let name = MemberName::new(name).map_err(|source| ManifestError::Name { line: number, source })?;
    Ok(Entry {
        name,
        algorithm,
        digest: digest.to_ascii_lowercase(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "a9993e364706816aba3e25717850c26c9cd0d89d";

    #[test]
    fn what_exporters_write_is_read() {
        let text = format!(
            "SHA1(a.ovf)= {ONE}\r\nSHA-1 (b (1).vmdk) = {}\n\nsha1(./c)={ONE}",
            ONE.to_uppercase()
        );
        let manifest = Manifest::parse(text.as_bytes()).unwrap();
        let names: Vec<_> = manifest
            .entries()
            .iter()
            .map(|entry| entry.name.as_str())
            .collect();
        assert_eq!(names, ["a.ovf", "b (1).vmdk", "c"]);
        assert!(manifest.entries().iter().all(|entry| entry.digest == ONE));
    }

    #[test]
    fn what_is_written_has_no_blank_before_the_parenthesis() {
        let text = format!("SHA1(a.ovf)= {ONE}\n");
        assert_eq!(Manifest::parse(text.as_bytes()).unwrap().to_string(), text);
    }

    #[test]
    fn bad_lines_are_named() {
        for (text, error) in [
            ("x".to_owned(), "line 1 is not ALGORITHM(FILE)= DIGEST"),
            (
                format!("MD5(a)= {ONE}"),
                "line 1 names the algorithm 'MD5', must be SHA1, SHA256 or SHA512",
            ),
            (
                format!("SHA256(a)= {ONE}"),
                "line 1 has a digest of 40 characters, must be 64 hexadecimal digits",
            ),
            (
                format!("\nSHA1(../a)= {ONE}"),
                "line 2 names a file that cannot be in the package",
            ),
            (
                format!("SHA1(a)= {ONE}\nSHA1(./a)= {ONE}"),
                "the manifest has two lines for 'a'",
            ),
        ] {
            assert_eq!(Manifest::parse(text.as_bytes()).unwrap_err().to_string(), error);
        }
    }

    #[test]
    fn digests_are_those_of_the_standards() {
        for (algorithm, digest) in [
            (Algorithm::Sha1, ONE),
            (
                Algorithm::Sha256,
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
        ] {
            let mut hasher = Hasher::new(algorithm);
            hasher.update(b"a");
            hasher.update(b"bc");
            assert_eq!(hasher.finish(), digest);
        }
    }
}
