//! Names of files inside a package: relative, plain, and never a way out.

use std::fmt;

/// The name of a file in a package: relative, with `/` between its parts, none of which is empty, `.` or `..`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberName(String);

/// Why a name is not one of a file in a package.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// No name.
    #[error("the name is empty")]
    Empty,
    /// Longer than any file system allows.
    #[error("the name has {0} bytes, must be at most {MAX}")]
    TooLong(usize),
    /// A path from the root, on one system or another.
    #[error("'{0}' is an absolute path, must be relative")]
    Absolute(String),
    /// A path that leaves the package.
    #[error("'{0}' leads out of the package")]
    Leaves(String),
    /// Bytes that no name has.
    #[error("'{0}' has a backslash or a control character")]
    Character(String),
    /// A place on the network.
    #[error("'{0}' is a URL, must be the name of a file in the package")]
    Url(String),
    /// Not UTF-8.
    #[error("the name is not UTF-8")]
    NotText,
    /// A `%` without two hexadecimal digits, or what they stand for is not UTF-8.
    #[error("'{0}' is not percent-encoded correctly")]
    Encoding(String),
}

/// Bytes in a name.
const MAX: usize = 1024;

impl MemberName {
    /// The name `text`, in which each leading `./` is dropped, as `tar` and some exporters write it.
    pub fn new(text: &str) -> Result<Self, NameError> {
        let mut name = text;
        while let Some(rest) = name.strip_prefix("./") {
            name = rest;
        }
        if name.is_empty() {
            return Err(NameError::Empty);
        }
        if name.len() > MAX {
            return Err(NameError::TooLong(name.len()));
        }
        if name.contains(|char: char| char == '\\' || char.is_control()) {
            return Err(NameError::Character(text.escape_default().to_string()));
        }
        let bytes = name.as_bytes();
        let drive = bytes.first().is_some_and(u8::is_ascii_alphabetic) && bytes.get(1) == Some(&b':');
        if name.starts_with('/') || drive {
            return Err(NameError::Absolute(text.to_owned()));
        }
        if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(NameError::Leaves(text.to_owned()));
        }
        Ok(Self(name.to_owned()))
    }

    /// The file that `href` of an OVF descriptor refers to: percent-decoded once, then judged (DSP0243, 7.1).
    pub fn from_href(href: &str) -> Result<Self, NameError> {
        let scheme = href.split_once(':').map(|(scheme, _)| scheme);
        let is_scheme = |text: &str| {
            text.len() > 1
                && text.starts_with(|char: char| char.is_ascii_alphabetic())
                && text
                    .chars()
                    .all(|char| char.is_ascii_alphanumeric() || "+-.".contains(char))
        };
        if scheme.is_some_and(is_scheme) {
            return Err(NameError::Url(href.to_owned()));
        }
        Self::new(&decoded(href).ok_or_else(|| NameError::Encoding(href.to_owned()))?)
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its last part: what it is called in its directory.
    #[must_use]
    pub fn base(&self) -> Self {
        Self(self.0.rsplit('/').next().unwrap_or_default().to_owned())
    }

    /// What it is without its last extension.
    pub fn stem(&self) -> &str {
        self.0.rsplit_once('.').map_or(&self.0, |(stem, _)| stem)
    }

    /// Whether it ends in `.` and `extension`, in any case.
    pub fn has_extension(&self, extension: &str) -> bool {
        self.0
            .rsplit_once('.')
            .is_some_and(|(_, own)| own.eq_ignore_ascii_case(extension))
    }
}

impl fmt::Display for MemberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `text` with each `%XX` replaced by its byte.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        if *first == b'%' {
            let (digits, behind) = behind.split_at_checked(2)?;
            let digits = std::str::from_utf8(digits).ok()?;
            if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return None;
            }
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = behind;
        } else {
            bytes.push(*first);
            rest = behind;
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names_stay_and_a_leading_dot_goes() {
        for (text, name) in [
            ("disk.vmdk", "disk.vmdk"),
            ("./disk.vmdk", "disk.vmdk"),
            ("././a/b.vmdk", "a/b.vmdk"),
            ("..disk", "..disk"),
            ("with space", "with space"),
        ] {
            assert_eq!(MemberName::new(text).unwrap().as_str(), name);
        }
    }

    #[test]
    fn no_name_leads_out() {
        for text in [
            "",
            "./",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a/..",
            "a//b",
            "a/./b",
            "C:\\x",
            "C:x",
            "\\\\srv\\x",
            "a\0b",
            "a\nb",
        ] {
            assert!(MemberName::new(text).is_err(), "{text:?}");
            assert!(MemberName::from_href(text).is_err(), "{text:?}");
        }
        for href in [
            "%2e%2e/x",
            "a/%2E%2e/x",
            "%2fetc%2fpasswd",
            "file:///etc/passwd",
            "http://x/y",
            "nbd:x",
            "%5cx",
            "a%00",
            "%",
            "%zz",
            "%ff",
        ] {
            assert!(MemberName::from_href(href).is_err(), "{href:?}");
        }
    }

    #[test]
    fn an_href_is_decoded_once() {
        assert_eq!(MemberName::from_href("a%20b%2ec").unwrap().as_str(), "a b.c");
        assert_eq!(MemberName::from_href("a%252e").unwrap().as_str(), "a%2e");
    }
}
