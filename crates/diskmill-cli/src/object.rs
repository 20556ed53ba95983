//! `--object`: secrets, and other things that options refer to by their ids.

use std::collections::BTreeMap;

use diskmill::spec::{SpecError, parse_json};
use diskmill_core::{Secret, SecretError, Secrets, decode_base64};
use diskmill_formats::crypt::wrapped::{self, WrapError};

use crate::compat::{reason, texts};
use crate::error::Failure;
use crate::exit::Exit;
use crate::keys;
use crate::ui::Ui;

/// The secrets that `--object` arguments define, in the order given: later ones may be encrypted with earlier ones.
///
/// Other objects that `qemu-img` knows are taken and left alone, since callers pass them beside what needs none.
pub fn secrets(given: &[String], ui: &Ui) -> Result<Secrets, Failure> {
    let mut secrets = Secrets::new();
    let mut known: BTreeMap<String, Option<Secret>> = BTreeMap::new();
    for text in given {
        let mut object = Object::parse(text)?;
        if object.help {
            return Err(help(&object, ui));
        }
        let kind = object.take("qom-type").ok_or_else(|| missing("qom-type"))?;
        if !KINDS.contains(&kind.as_str()) {
            return Err(Failure::usage(format!(
                "Parameter 'qom-type' does not accept value '{kind}'"
            )));
        }
        let id = object.take("id").ok_or_else(|| missing("id"))?;
        let secret = match kind.as_str() {
            "secret" => Some(Parts::take(&mut object)?),
            _ => None,
        };
        if !is_id(&id) {
            return Err(Failure::usage(
                "Parameter 'id' expects an identifier\n\
                 Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
            ));
        }
        if known.contains_key(&id) {
            return Err(Failure::usage(texts::secret_text(&SecretError::Duplicate(id))));
        }
        let Some(parts) = secret else {
            if kind == "secret_keyring" {
                return Err(Failure::refused(
                    "Secrets from the kernel's keyring are not supported yet",
                ));
            }
            known.insert(id, None);
            continue;
        };
        let secret = parts.secret(&known)?;
        // People may use any bytes; under the name qemu-img only text is a passphrase.
        let is_text = std::str::from_utf8(secret.as_bytes()).is_ok_and(|text| !text.contains('\0'));
        if is_text || !ui.drop_in() {
            secrets.add(&id, secret.clone())?;
        } else {
            secrets.add_unfit(&id, SecretError::NotText(id.clone()))?;
        }
        known.insert(id, Some(secret));
    }
    Ok(secrets)
}

/// Whether `id` can name an object.
fn is_id(id: &str) -> bool {
    id.starts_with(|first: char| first.is_ascii_alphabetic())
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

/// The objects `qemu-img` has.
const KINDS: [&str; 12] = [
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "main-loop",
    "pr-manager-helper",
    "secret",
    "secret_keyring",
    "thread-context",
    "throttle-group",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];

/// What a secret can be made of, in the order of the help.
const PARTS: [(&str, &str); 5] = [
    ("data", "string"),
    ("file", "string"),
    ("format", "QCryptoSecretFormat"),
    ("iv", "string"),
    ("keyid", "string"),
];

fn help(object: &Object, ui: &Ui) -> Failure {
    let kind = object.pairs.iter().find(|(name, _)| name == "qom-type");
    let text = if kind.is_some_and(|(_, kind)| kind == "secret") {
        let parts = PARTS.map(|(name, kind)| format!("  {name}=<{kind}>\n"));
        format!("secret options:\n{}", parts.concat())
    } else {
        let kinds = KINDS.map(|kind| format!("  {kind}\n"));
        format!("List of user creatable objects:\n{}", kinds.concat())
    };
    match ui.print(text) {
        Ok(()) => Failure::said(Exit::OK),
        Err(failure) => failure,
    }
}

fn missing(name: &str) -> Failure {
    Failure::usage(format!("Parameter '{name}' is missing"))
}

/// What is said of an object: names and values, none of them looked at.
struct Object {
    pairs: Vec<(String, String)>,
    help: bool,
}

impl Object {
    /// Reads `TYPE,name=value,...` or a JSON object.
    fn parse(text: &str) -> Result<Self, Failure> {
        if text.starts_with('{') {
            return Self::from_json(text);
        }
        let mut object = Self {
            pairs: Vec::new(),
            help: false,
        };
        let mut rest = text;
        let first = text.split(',').next().unwrap_or_default();
        if !first.is_empty() && !first.contains('=') {
            if matches!(first, "help" | "?") {
                object.help = true;
                return Ok(object);
            }
            object.set("qom-type", first.to_owned());
            rest = text.get(first.len() + 1..).unwrap_or_default();
        }
        while !rest.is_empty() {
            let name_len = rest.find(['=', ',']).unwrap_or(rest.len());
            let (name, behind) = rest.split_at(name_len);
            let Some(value) = behind.strip_prefix('=') else {
                if matches!(name, "help" | "?") {
                    object.help = true;
                    return Ok(object);
                }
                return Err(match name {
                    "" => Failure::usage("Invalid parameter ''"),
                    name => object.wrong(name, |name| format!("Expected '=' after parameter '{name}'")),
                });
            };
            if !is_name(name) {
                return Err(object.wrong(name, |name| format!("Invalid parameter '{name}'")));
            }
            let (value, behind) = take_value(value);
            object.set(name, value);
            rest = behind;
        }
        Ok(object)
    }

    fn from_json(text: &str) -> Result<Self, Failure> {
        let json = match parse_json(text) {
            Ok(json) => json,
            Err(SpecError::Json(why)) => return Err(Failure::usage(format!("JSON parse error, {why}"))),
            Err(other) => return Err(Failure::from(diskmill_core::Error::from(other))),
        };
        let fields = json.as_object().into_iter().flatten();
        let mut pairs = Vec::new();
        for (name, value) in fields {
            let Some(value) = value.as_str() else {
                return Err(Failure::usage(format!(
                    "Invalid parameter type for '{name}', expected: string"
                )));
            };
            pairs.push((name.clone(), value.to_owned()));
        }
        Ok(Self { pairs, help: false })
    }

    fn set(&mut self, name: &str, value: String) {
        self.pairs.retain(|(known, _)| known != name);
        self.pairs.push((name.to_owned(), value));
    }

    fn take(&mut self, name: &str) -> Option<String> {
        let index = self.pairs.iter().position(|(known, _)| known == name)?;
        Some(self.pairs.remove(index).1)
    }

    /// What is wrong with a parameter called `name`. Behind `data` that may be a part of the secret, in which a comma was
    /// not doubled: it must not be shown.
    fn wrong(&self, name: &str, text: impl Fn(&str) -> String) -> Failure {
        let known =
            |name: &str| matches!(name, "qom-type" | "id") || PARTS.iter().any(|(part, _)| *part == name);
        if known(name) || !self.pairs.iter().any(|(before, _)| before == "data") {
            return Failure::usage(text(name));
        }
        Failure::usage("Invalid parameter behind 'data': a comma in a value is written twice")
    }
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

/// The value at the start of `text`, in which a doubled comma stands for one, and what is behind the comma that ends it.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let len = rest.find(',').unwrap_or(rest.len());
        let (part, behind) = rest.split_at(len);
        value.push_str(part);
        let behind = behind.strip_prefix(',').unwrap_or_default();
        match behind.strip_prefix(',') {
            Some(more) => {
                value.push(',');
                rest = more;
            }
            None => return (value, behind),
        }
    }
}

/// What a secret is made of.
struct Parts {
    data: Option<String>,
    file: Option<String>,
    base64: bool,
    keyid: Option<String>,
    iv: Option<String>,
}

impl Parts {
    /// Takes all that there may be out of `object`.
    fn take(object: &mut Object) -> Result<Self, Failure> {
        let base64 = match object.take("format").as_deref() {
            None | Some("raw") => false,
            Some("base64") => true,
            Some(_) if object.pairs.iter().any(|(name, _)| name == "data") => {
                return Err(Failure::usage("Parameter 'format' must be 'raw' or 'base64'"));
            }
            Some(other) => {
                return Err(Failure::usage(format!(
                    "Parameter 'format' does not accept value '{other}'"
                )));
            }
        };
        if let Some((name, _)) = object
            .pairs
            .iter()
            .find(|(name, _)| !PARTS.iter().any(|(part, _)| part == name))
        {
            return Err(object.wrong(name, |name| format!("Parameter '{name}' is unexpected")));
        }
        Ok(Self {
            data: object.take("data"),
            file: object.take("file"),
            base64,
            keyid: object.take("keyid"),
            iv: object.take("iv"),
        })
    }

    /// The secret, decrypted if one of `known` is its key.
    fn secret(self, known: &BTreeMap<String, Option<Secret>>) -> Result<Secret, Failure> {
        let bytes = match (self.data, self.file) {
            (Some(_), Some(_)) => return Err(Failure::usage("'file' and 'data' are mutually exclusive")),
            (None, None) => return Err(Failure::usage("Either 'file' or 'data' must be provided")),
            (Some(data), None) => data.into_bytes(),
            (None, Some(path)) => keys::read_file(path.as_ref())
                .map_err(|error| Failure::usage(unreadable(&path, &error)))?
                .as_bytes()
                .to_vec(),
        };
        let Some(keyid) = self.keyid else {
            return plain(bytes, self.base64);
        };
        let Some(Some(key)) = known.get(&keyid) else {
            return Err(Failure::usage(texts::secret_text(&SecretError::Unknown(keyid))));
        };
        if key.as_bytes().len() != 32 {
            return Err(wrap_failure(&WrapError::KeyLen(key.as_bytes().len())));
        }
        let iv = self
            .iv
            .ok_or_else(|| Failure::usage("IV is required to decrypt secret"))?;
        let iv = from_base64(iv.as_bytes())?;
        let wrapped = plain(bytes, self.base64)?;
        wrapped::unwrap(key.as_bytes(), iv.as_bytes(), wrapped.as_bytes().to_vec())
            .map_err(|error| wrap_failure(&error))
    }
}

fn plain(bytes: Vec<u8>, is_base64: bool) -> Result<Secret, Failure> {
    let given = Secret::new(bytes);
    match is_base64 {
        true => from_base64(given.as_bytes()),
        false => Ok(given),
    }
}

fn from_base64(text: &[u8]) -> Result<Secret, Failure> {
    decode_base64(text).map_err(|error| Failure::usage(error.to_string()))
}

fn unreadable(path: &str, error: &std::io::Error) -> String {
    let why = reason::os_text(error);
    match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::PermissionDenied => {
            format!("Unable to read {path}: Failed to open file \u{201c}{path}\u{201d}: {why}")
        }
        _ => format!("Unable to read {path}: Error reading file \u{201c}{path}\u{201d}: {why}"),
    }
}

fn wrap_failure(error: &WrapError) -> Failure {
    Failure::usage(match error {
        WrapError::KeyLen(_) => "Key should be 32 bytes in length".to_owned(),
        WrapError::IvLen(len) => format!("IV should be 16 bytes in length not {len}"),
        WrapError::Len(len) => format!("Length {len} must be a multiple of block size 16"),
        WrapError::Padding(len) => {
            format!("Incorrect number of padding bytes ({len}) found on decrypted data")
        }
        other => reason::capital(&other.to_string()),
    })
}

#[cfg(test)]
mod tests;
