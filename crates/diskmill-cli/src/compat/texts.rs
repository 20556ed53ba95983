//! The words of `qemu-img` for what operations refuse: scripts look for some of them.

use diskmill::ops::compare::CompareError;
use diskmill::ops::convert::{BitmapNotCopied, ConvertError};
use diskmill::ops::create::CreateError;
use diskmill::ops::resize::{Preallocation, ResizeError};
use diskmill_core::{BitmapError, Error, OptionError, SecretError};
use diskmill_formats::crypt::luks::LuksError;
use diskmill_formats::qcow::header::HeaderError;
use diskmill_formats::{qcow, qcow2};

use super::reason::{capital, text};

/// Texts that scripts look for, from the typed errors of operations.
pub fn of(error: &Error) -> Option<String> {
    if let Some(CompareError::Map { source, .. } | CompareError::Read { source, .. }) = error.find() {
        return Some(text(source, None));
    }
    if let Some(create) = error.find::<CreateError>() {
        return Some(create_text(create));
    }
    if let Some(convert) = error.find::<ConvertError>() {
        return Some(match convert {
            ConvertError::CompressionAndEncryption => {
                "Compression and encryption not supported at the same time".to_owned()
            }
            ConvertError::NoCompression(_) => "Compression not supported for this file format".to_owned(),
            ConvertError::BackingWithSeveral => {
                "Having a backing file for the target makes no sense when concatenating multiple input images"
                    .to_owned()
            }
            ConvertError::TargetTooSmall { .. } => "output file is smaller than input file".to_owned(),
            ConvertError::BitmapsOfSeveral => "Copying bitmaps only possible with single source".to_owned(),
            ConvertError::NoBitmaps => "Source lacks bitmap support".to_owned(),
            ConvertError::TargetKeepsNoBitmaps(format) => {
                format!("Format driver '{format}' does not support bitmaps")
            }
            ConvertError::BrokenBitmap(name) => format!(
                "Cannot copy inconsistent bitmap '{name}'\nTry --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
            ),
            other => capital(&other.to_string()),
        });
    }
    if let Some(not_copied) = error.find::<BitmapNotCopied>() {
        let BitmapNotCopied {
            what, name, source, ..
        } = not_copied;
        return Some(format!("Failed to {what} bitmap {name}: {}", text(source, None)));
    }
    if let Some(bitmap) = error.find::<BitmapError>() {
        return Some(bitmap_text(bitmap));
    }
    if let Some(HeaderError::Version(version)) = error.find() {
        return Some(format!(
            "qcow (v1) does not support qcow version {version}\nTry the 'qcow2' driver instead."
        ));
    }
    if let Some(qcow) = error.find::<qcow::CreateError>() {
        return Some(qcow_text(qcow));
    }
    if let Some(encryption) = error.find::<qcow2::EncryptionError>() {
        return Some(encryption_text(encryption));
    }
    if let Some(qcow2) = error.find::<qcow2::options::CreateError>() {
        return Some(qcow2_text(qcow2));
    }
    if let Some(qcow2::ResizeError::OldSnapshots) = error.find() {
        return Some("Can't resize a v2 image which has snapshots".to_owned());
    }
    if let Some(amend) = error.find::<qcow2::amend::AmendError>() {
        return Some(amend_text(amend));
    }
    if let Some(qcow2::amend::TooNarrow { at, count, bits, .. }) = error.find() {
        return Some(format!(
            "Cannot decrease refcount entry width to {bits} bits: Cluster at offset {at:#x} has a refcount of {count}"
        ));
    }
    if let Some(luks) = error.find::<LuksError>() {
        return luks_text(luks);
    }
    if let Some(secret) = error.find::<SecretError>() {
        return Some(secret_text(secret));
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
            ResizeError::Unaligned(_) => "The new size must be a multiple of 512".to_owned(),
            ResizeError::Device => "Cannot resize device files".to_owned(),
            ResizeError::Preallocation(mode) => format!("Unsupported preallocation mode: {mode}"),
            other => capital(&other.to_string()),
        });
    }
    None
}

/// Where our text says more than the real tool's, which is cut off there.
fn luks_text(error: &LuksError) -> Option<String> {
    Some(match error {
        LuksError::Version(version) => format!("LUKS version {version} is not supported"),
        LuksError::PayloadInHeader(_) => "LUKS payload is overlapping with the header".to_owned(),
        LuksError::SlotErased(slot) => format!("Given keyslot {slot} is already erased (inactive) "),
        _ => return None,
    })
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
        CreateError::BackingFormatAlone => "Backing format cannot be used without backing file".to_owned(),
        CreateError::SizeTooLarge(_) => "Could not resize file: Invalid argument".to_owned(),
        other => capital(&other.to_string()),
    }
}

fn qcow_text(error: &qcow::CreateError) -> String {
    use qcow::CreateError;
    match error {
        CreateError::Empty => "Image size is too small, cannot be zero length".to_owned(),
        CreateError::EncryptionFormat(_) => "Unsupported encryption format".to_owned(),
        CreateError::EncryptionFormatMissing => "Parameter 'encrypt.format' is missing".to_owned(),
        CreateError::EncryptionTwice => {
            "'encrypt.format' and its alias 'encryption' can't be used at the same time".to_owned()
        }
        other => capital(&other.to_string()),
    }
}

fn encryption_text(error: &qcow2::EncryptionError) -> String {
    use qcow2::EncryptionError;
    match error {
        EncryptionError::OtherFormat { found, asked } => {
            format!("Header reported '{found}' encryption format but options specify '{asked}'")
        }
        EncryptionError::NotEncrypted(asked) => {
            format!("No encryption in image header, but options specified format '{asked}'")
        }
        EncryptionError::Compressed => COMPRESSED_AND_ENCRYPTED.to_owned(),
        other => capital(&other.to_string()),
    }
}

const COMPRESSED_AND_ENCRYPTED: &str = "Compression and encryption not supported at the same time";

/// The real tool's words where its text names one rule; ours, which name the value too, elsewhere.
fn qcow2_text(error: &qcow2::options::CreateError) -> String {
    use qcow2::options::CreateError;
    match error {
        CreateError::ClusterSize(_) => "Cluster size must be a power of two between 512 and 2048k".to_owned(),
        CreateError::SubclusterSize(_) => {
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes".to_owned()
        }
        CreateError::Compat(value) => format!("Parameter 'version' does not accept value '{value}'"),
        CreateError::CompressionType(value) => {
            format!("Parameter 'compression-type' does not accept value '{value}'")
        }
        CreateError::RefcountBits(_) => {
            "Refcount width must be a power of two and may not exceed 64 bits".to_owned()
        }
        CreateError::TooLarge { .. } => {
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)".to_owned()
        }
        CreateError::NoEncryptFormat(_) => "Parameter 'encrypt.format' is missing".to_owned(),
        CreateError::NotOfAes(name) => format!("Parameter '{name}' is unexpected"),
        CreateError::EncryptionTwice => {
            "'encrypt.format' and its alias 'encryption' can't be used at the same time".to_owned()
        }
        CreateError::Exclude("compression", "encryption") => COMPRESSED_AND_ENCRYPTED.to_owned(),
        other => capital(&other.to_string()),
    }
}

fn amend_text(error: &qcow2::amend::AmendError) -> String {
    use qcow2::amend::AmendError;
    match error {
        AmendError::CreationOnly(name) => {
            format!("Invalid parameter '{name}'\nThis option is only supported for image creation")
        }
        AmendError::Compat(value) => format!("Unknown compatibility level {value}"),
        AmendError::RefcountBits(_) => {
            "Refcount width must be a power of two and may not exceed 64 bits".to_owned()
        }
        AmendError::RefcountBitsNeedVersion3 => {
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
                .to_owned()
        }
        AmendError::LazyNeedsVersion3 => {
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
                .to_owned()
        }
        AmendError::Size(_) => "The new size must be a multiple of 512".to_owned(),
        AmendError::NoDataFile => {
            "data-file can only be set for images that use an external data file".to_owned()
        }
        AmendError::DataFileRaw => "data-file-raw cannot be set on existing images".to_owned(),
        AmendError::Backing => "Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.".to_owned(),
        AmendError::NotEncrypted => {
            "Can't amend encryption options - encryption not present".to_owned()
        }
        AmendError::OldEncryption => "Only LUKS encryption options can be amended".to_owned(),
        AmendError::OldDataFile => "Cannot downgrade an image with a data file".to_owned(),
        AmendError::OldRefcountBits => "compat=0.10 requires refcount_bits=16".to_owned(),
        AmendError::OldSnapshots => "Internal snapshots prevent downgrade of image".to_owned(),
        AmendError::OldFeatures(bits) => {
            format!("Cannot downgrade an image with incompatible features {bits:#x} set")
        }
        AmendError::OldZstd => {
            "Cannot downgrade an image with zstd compression type and existing compressed clusters".to_owned()
        }
        other => capital(&other.to_string()),
    }
}

/// What is said of a secret that is not there or no good.
pub fn secret_text(secret: &SecretError) -> String {
    match secret {
        SecretError::Unknown(id) => format!("No secret with id '{id}'"),
        SecretError::Duplicate(id) => {
            format!("attempt to add duplicate property '{id}' to object (type 'container')")
        }
        SecretError::Missing(option) => format!("Parameter '{option}' is required for cipher"),
        SecretError::NotText(id) => format!("Data from secret {id} is not valid UTF-8"),
        other => capital(&other.to_string()),
    }
}

fn bitmap_text(bitmap: &BitmapError) -> String {
    match bitmap {
        BitmapError::Exists(name) => format!("Bitmap already exists: {name}"),
        BitmapError::NotFound(name) => format!("Dirty bitmap '{name}' not found"),
        BitmapError::Inconsistent(name) => format!(
            "Bitmap '{name}' is inconsistent and cannot be used\nTry block-dirty-bitmap-remove to delete this bitmap from disk"
        ),
        BitmapError::OldVersion => "Cannot store dirty bitmaps in qcow2 v2 files".to_owned(),
        BitmapError::Name(0) => "Bitmap name cannot be empty".to_owned(),
        BitmapError::Name(_) => "Name length exceeds maximum (1023 characters)".to_owned(),
        BitmapError::Granularity(_) => "Granularity must be power of 2 and at least 512".to_owned(),
        BitmapError::Size { .. } => {
            "Too much space will be occupied by the bitmap. Use larger granularity".to_owned()
        }
        BitmapError::Sizes { to, from } => format!(
            "Bitmaps are of different sizes (destination size is {to}, source size is {from}) and can't be merged"
        ),
        BitmapError::Unsupported(_) => "Operation not supported".to_owned(),
        other => capital(&other.to_string()),
    }
}

fn option_text(option: &OptionError) -> String {
    match option {
        OptionError::Unknown(name) => format!("Invalid parameter '{name}'"),
        OptionError::Value { name, expected, .. } if *expected == "'on' or 'off'" => {
            format!("Parameter '{name}' expects 'on' or 'off'")
        }
        OptionError::Value { name, expected, .. } if expected.contains("suffix") => bad_size(name),
        OptionError::Value { name, expected, .. } if *expected == "a number" => {
            format!("Parameter '{name}' expects a number")
        }
        OptionError::Value { name, value, .. } | OptionError::Range { name, value, .. } => {
            // A mode there is, only not here: callers try another when they read this.
            if name == "preallocation" && Preallocation::parse(value).is_some() {
                return format!("Unsupported preallocation mode: {value}");
            }
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
