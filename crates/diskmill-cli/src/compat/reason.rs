//! Why something failed, in the words of `qemu-img`.

use std::error::Error as StdError;
use std::io;

use diskmill::open::OpenError;
use diskmill::spec::SpecError;
use diskmill_core::{Error, ErrorKind, Format};
use diskmill_storage::NotADisk;

use super::texts;

/// The reason behind `error`. `name` is what the message has already named: the user's word for the image.
pub fn text(error: &Error, name: Option<&str>) -> String {
    if let Some(open) = open_error(error) {
        return open_text(open, name);
    }
    if let Some(spec) = error
        .source()
        .and_then(|source| source.downcast_ref::<SpecError>())
    {
        return spec_text(spec);
    }
    if error.kind() == ErrorKind::Locked {
        return lock_text(error, name);
    }
    if error.find::<NotADisk>().is_some() {
        return format!(
            "'file' driver requires '{}' to be a regular file",
            name.unwrap_or_default()
        );
    }
    if let Some(text) = texts::of(error) {
        return text;
    }
    if let Some(io) = error.io_error() {
        return io_text(error, io, name);
    }
    plain_text(error)
}

fn open_error(error: &Error) -> Option<&OpenError> {
    error.source()?.downcast_ref()
}

fn open_text(open: &OpenError, name: Option<&str>) -> String {
    match open {
        OpenError::Backing(inner) => format!("Could not open backing file: {}", text(inner, None)),
        OpenError::DataFile(inner) => text(inner, None),
        OpenError::NotInFormat(Format::Qcow) => "Image not in qcow format".to_owned(),
        OpenError::NotInFormat(Format::Luks) => "Volume is not in LUKS format".to_owned(),
        OpenError::NotInFormat(format) => format!("Image is not in {format} format"),
        OpenError::NoBacking => "Image does not have a backing file".to_owned(),
        OpenError::NotInChain { name, image } => {
            format!("Did not find '{name}' in the backing chain of '{image}'")
        }
        OpenError::Loop(file) => format!("Backing file '{file}' creates an infinite loop."),
        OpenError::NotADevice => {
            let name = name.unwrap_or_default();
            format!("'host_device' driver requires '{name}' to be either a character or block device")
        }
        other => capital(&other.to_string()),
    }
}

fn spec_text(spec: &SpecError) -> String {
    match spec {
        SpecError::NoFileName { driver } => {
            format!("The '{driver}' block driver requires a file name")
        }
        SpecError::NoFile(_) => "A block device must be specified for \"file\"".to_owned(),
        SpecError::NeitherDriverNorFile => "Must specify either driver or file".to_owned(),
        SpecError::NoSuchNode(node) => format!("Cannot find device='{node}' nor node-name='{node}'"),
        SpecError::Json(why) => format!("Could not parse the JSON options: JSON parse error, {why}"),
        SpecError::NotAnObject => "Invalid JSON object given".to_owned(),
        SpecError::UnknownOption { driver, option } => {
            format!("Block format '{driver}' does not support the option '{option}'")
        }
        other => capital(&other.to_string()),
    }
}

fn lock_text(error: &Error, name: Option<&str>) -> String {
    let what = deepest(error);
    let path = error
        .context()
        .path
        .as_ref()
        .map(|path| path.to_string_lossy().into_owned());
    let name = name.map(str::to_owned).or(path).unwrap_or_default();
    format!("{}\nIs another process using the image [{name}]?", capital(&what))
}

fn io_text(error: &Error, io: &io::Error, name: Option<&str>) -> String {
    let os = os_text(io);
    let context = error.context();
    let path = context
        .path
        .as_ref()
        .map(|path| path.to_string_lossy().into_owned());
    match (context.op, path.as_deref().or(name)) {
        (Some("open") | None, Some(path)) => format!("Could not open '{path}': {os}"),
        (Some("create"), Some(path)) => format!("Could not create '{path}': {os}"),
        (Some("resize"), _) => format!("Could not resize file: {os}"),
        (Some(op), Some(path)) => format!("Could not {op} '{path}': {os}"),
        (Some(op), None) => format!("Could not {op}: {os}"),
        (None, None) => os,
    }
}

/// What the operating system calls it, without the number Rust adds.
pub fn os_text(error: &io::Error) -> String {
    let text = error.to_string();
    match (error.raw_os_error(), text.find(" (os error ")) {
        (Some(_), Some(end)) => text[..end].to_owned(),
        _ => text,
    }
}

/// What the innermost source says, where a reader can do without the frames around it.
fn plain_text(error: &Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next = error.source();
    while let Some(source) = next {
        parts.push(source.to_string());
        next = source.source();
    }
    let text = match parts.as_slice() {
        [] => error.to_string(),
        parts => parts.join(": "),
    };
    capital(&unsupported(error.kind(), text))
}

/// `text`, saying so where it only names what is not supported.
pub fn unsupported(kind: ErrorKind, text: String) -> String {
    if kind == ErrorKind::Unsupported && !text.contains("support") {
        format!("not supported yet: {text}")
    } else {
        text
    }
}

fn deepest(error: &Error) -> String {
    let mut last: &(dyn StdError + 'static) = match error.source() {
        Some(source) => source,
        None => return error.to_string(),
    };
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// `text` with a capital letter, unless it starts with the name of an option.
pub fn capital(text: &str) -> String {
    if text
        .split(' ')
        .next()
        .is_some_and(|word| word.contains(['_', '.', '=']))
    {
        return text.to_owned();
    }
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().chain(chars).collect(),
        None => String::new(),
    }
}
