//! Why something failed, in the words of `qemu-img`.

use std::error::Error as StdError;
use std::io;

use diskmill::open::OpenError;
use diskmill::ops::create::CreateError;
use diskmill::spec::SpecError;
use diskmill_core::{Error, ErrorKind, OptionError};
use diskmill_storage::NotADisk;

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
        SpecError::NotAnObject => "Invalid JSON object given".to_owned(),
        SpecError::UnknownOption { driver, option } => {
            format!("Block format '{driver}' does not support the option '{option}'")
        }
        other => capital(&other.to_string()),
    }
}

/// Texts that scripts look for, from the typed errors of operations.
fn known_text(error: &Error) -> Option<String> {
    use diskmill::ops::convert::ConvertError;
    use diskmill::ops::resize::ResizeError;

    if let Some(create) = error.find::<CreateError>() {
        return Some(create_text(create));
    }
    if let Some(convert) = error.find::<ConvertError>() {
        return Some(match convert {
            ConvertError::NoCompression(_) => "Compression not supported for this file format".to_owned(),
            ConvertError::TargetTooSmall { .. } => "output file is smaller than input file".to_owned(),
            other => capital(&other.to_string()),
        });
    }
    if let Some(option) = error.find::<OptionError>() {
        return Some(option_text(option));
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

fn create_text(create: &CreateError) -> String {
    match create {
        CreateError::UnknownFormat(format) => format!("Unknown file format '{format}'"),
        CreateError::NotCreatable(format) => {
            format!("Format driver '{format}' does not support image creation")
        }
        CreateError::NoBacking(format) => format!("Backing file not supported for file format '{format}'"),
        CreateError::BackingFormatMissing { detected } => {
            let more = match detected {
                Some(format) => format!("\nDetected format of {format}."),
                None => String::new(),
            };
            format!("Backing file specified without backing format{more}")
        }
        CreateError::Backing(inner) => format!("{}\nCould not open backing image.", text(inner, None)),
        CreateError::BackedByItself => {
            "Error: Trying to create an image with the same filename as the backing file".to_owned()
        }
        CreateError::SizeMissing => "Image creation needs a size parameter".to_owned(),
        CreateError::SizeTwice => "The image size must be specified only once".to_owned(),
        other => capital(&other.to_string()),
    }
}

fn option_text(option: &OptionError) -> String {
    match option {
        OptionError::Unknown(name) => format!("Invalid parameter '{name}'"),
        OptionError::Range { name, .. } if name == "cluster_size" => {
            "Cluster size must be a power of two between 512 and 2048k".to_owned()
        }
        OptionError::Value { name, expected, .. } if *expected == "'on' or 'off'" => {
            format!("Parameter '{name}' expects 'on' or 'off'")
        }
        OptionError::Value { name, expected, .. } if expected.contains("suffix") => bad_size(name),
        OptionError::Value { name, value, .. } => {
            let name = if name == "compat" { "version" } else { name };
            format!("Parameter '{name}' does not accept value '{value}'")
        }
        other => capital(&other.to_string()),
    }
}

/// What is said of a size that is none.
pub fn bad_size(name: &str) -> String {
    format!(
        "Parameter '{name}' expects a non-negative number below 2^64\n\
         Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
         and exabytes, respectively."
    )
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

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_uppercase().chain(chars).collect(),
        None => String::new(),
    }
}
