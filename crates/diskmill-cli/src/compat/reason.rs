//! Why something failed, in the words of `qemu-img`.

use std::error::Error as StdError;
use std::io;

use diskmill::open::OpenError;
use diskmill::spec::SpecError;
use diskmill_core::{Error, ErrorKind};

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
    if let Some(text) = known_text(error) {
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
        OpenError::NotInFormat(format) => format!("Image is not in {format} format"),
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
        SpecError::NeitherDriverNorFile => "Must specify either driver or file".to_owned(),
        SpecError::NoSuchNode(node) => format!("Cannot find device='{node}' nor node-name='{node}'"),
        SpecError::Json(why) => format!("Could not parse the JSON options: JSON parse error, {why}"),
        SpecError::UnknownOption { driver, option } => {
            format!("Block format '{driver}' does not support the option '{option}'")
        }
        other => capital(&other.to_string()),
    }
}

/// Texts that scripts look for, from the typed errors of operations.
fn known_text(error: &Error) -> Option<String> {
    use diskmill::ops::convert::ConvertError;
    use diskmill::ops::create::CreateError;
    use diskmill::ops::resize::ResizeError;

    if let Some(create) = error.find::<CreateError>() {
        return Some(match create {
            CreateError::UnknownFormat(format) => format!("Unknown file format '{format}'"),
            CreateError::NotCreatable(format) => {
                format!("Format driver '{format}' does not support image creation")
            }
            CreateError::NoBacking(format) => {
                format!("Backing file not supported for file format '{format}'")
            }
            CreateError::BackingFormatMissing => "Backing file specified without backing format".to_owned(),
            CreateError::UnknownBackingFormat(format) => {
                format!("Unknown driver '{format}'\nCould not open backing image.")
            }
            CreateError::BackedByItself => {
                "Error: Trying to create an image with the same filename as the backing file".to_owned()
            }
            CreateError::SizeMissing => "Image creation needs a size parameter".to_owned(),
            other => capital(&other.to_string()),
        });
    }
    if let Some(convert) = error.find::<ConvertError>() {
        return Some(match convert {
            ConvertError::NoCompression(_) => "Compression not supported for this file format".to_owned(),
            ConvertError::TargetTooSmall { .. } => "output file is smaller than input file".to_owned(),
            other => capital(&other.to_string()),
        });
    }
    if let Some(resize) = error.find::<ResizeError>() {
        return Some(match resize {
            ResizeError::NotPositive => "New image size must be positive".to_owned(),
            ResizeError::PreallocationOnShrink => {
                "Preallocation can only be used for growing images".to_owned()
            }
            ResizeError::Preallocation(mode) => format!("Unsupported preallocation mode: {mode}"),
            other => capital(&other.to_string()),
        });
    }
    None
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
        (Some(op), _) => format!("Could not {op}: {os}"),
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
    match parts.as_slice() {
        [] => capital(&error.to_string()),
        parts => capital(&parts.join(": ")),
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

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().chain(chars).collect(),
        None => String::new(),
    }
}
