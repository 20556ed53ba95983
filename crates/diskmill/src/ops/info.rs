//! What an image says of itself.

use std::ffi::OsStr;

use diskmill_core::{Access, Error, Reference, Result, Role, SECTOR, SnapshotFacts, Storage, Value};
use diskmill_storage::File;

use crate::open::{OpenError, OpenRequest, Opener, Place, Understood, resolve_name};
use crate::spec::ImageSpec;

/// What `info` shows of one image, or of one of its files.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageInfo {
    /// The name it is shown by.
    pub filename: String,
    /// Its format; `file` or `host_device` for a file.
    pub format: String,
    /// The size of the virtual disk in bytes; for a file its length, rounded up to a sector.
    pub virtual_size: u64,
    /// Bytes it takes on the host, if the host can tell.
    pub actual_size: Option<u64>,
    /// Whether it was not closed properly.
    pub dirty: bool,
    /// The step in which it allocates.
    pub cluster_size: Option<u64>,
    /// Whether guest data is encrypted.
    pub encrypted: bool,
    /// Whether all data is stored compressed: only shown when true.
    pub compressed: bool,
    /// The name of its backing image, as the image writes it.
    pub backing_filename: Option<String>,
    /// The same, resolved against the image's directory.
    pub full_backing_filename: Option<String>,
    /// The format its backing image is said to have.
    pub backing_filename_format: Option<String>,
    /// Its internal snapshots.
    pub snapshots: Vec<SnapshotFacts>,
    /// What only its format has: its type and its data.
    pub format_specific: Option<(String, Value)>,
    /// What `qemu-img` does not show of it, for people and tools that want to know.
    pub details: Option<Value>,
    /// A container or a further format that the bytes look like, for people: `qemu-img` does not say it.
    pub looks_like: Option<&'static str>,
    /// Its files.
    pub children: Vec<Child>,
}

/// A file of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Child {
    /// What it is to the image: `file`, `data-file`.
    pub name: String,
    /// What is known of it.
    pub info: ImageInfo,
}

/// What an image says of itself: one element, or with `backing_chain` one for each image of the chain, overlay first.
///
/// Without `backing_chain` no other file is opened than the one that was named and those that hold parts of its disk.
/// The request's `backing` is ignored.
/// An error is that of the image it names: it does not say which images led there.
pub fn gather(request: &OpenRequest, backing_chain: bool) -> Result<Vec<ImageInfo>> {
    let mut opener = Opener::new(request);
    let mut image = opener.understand_top(Access::Read, false)?;
    let mut infos = Vec::new();
    loop {
        // What the user says it is backed by does not count here: each image speaks for itself.
        let own = ImageSpec::from_path(image.file.path());
        let next = match backing_chain {
            true => opener.backing_of(&image, &own).map_err(without_overlay)?,
            false => None,
        };
        infos.push(describe(&opener, image)?);
        image = match next {
            Some(backing) => opener.understand_backing(&backing, Place::Backing)?,
            None => return Ok(infos),
        };
    }
}

/// The error of the backing image alone.
fn without_overlay(error: Error) -> Error {
    let kind = error.kind();
    match error.into_source() {
        Some(source) => match source.downcast::<OpenError>() {
            Ok(backing) => match *backing {
                OpenError::Backing(inner) => inner,
                other => Error::new(kind, other),
            },
            Err(source) => Error::new(kind, source),
        },
        None => Error::bare(kind),
    }
}

fn describe(opener: &Opener<'_>, image: Understood) -> Result<ImageInfo> {
    let file = describe_file(&image.file)?;
    if image.bare {
        return Ok(file);
    }
    let (shown, driver, looks_like) = (image.shown.clone(), image.driver, image.looks_like);
    let path = image.file.path().to_owned();
    let header = image.header.as_deref().map(describe_file).transpose()?;
    let is_extent = |reference: &Reference| matches!(reference.role, Role::Extent(_));
    let mut names = vec![file.filename.clone()];
    let mut children = Vec::new();
    let mut actual_size = file.actual_size;
    // What is known of a disk in several files depends on them all.
    let facts = if image.parsed.references().iter().any(is_extent) {
        let files = opener.data_files(&image, Access::Read)?;
        for (index, (_, extent)) in files.iter().enumerate() {
            let info = describe_file(extent)?;
            names.push(info.filename.clone());
            actual_size = actual_size
                .zip(info.actual_size)
                .map(|(sum, more)| sum.saturating_add(more));
            // The last comes first, as in QEMU's list.
            children.insert(
                0,
                Child {
                    name: format!("extents.{index}"),
                    info,
                },
            );
        }
        opener.attach_with(image, &files)?.0.facts().clone()
    } else {
        image.parsed.facts().clone()
    };
    if let Some(header) = &header {
        let more = header.actual_size;
        actual_size = actual_size.zip(more).map(|(sum, more)| sum.saturating_add(more));
    }
    children.extend(header.map(|info| Child {
        name: "header".to_owned(),
        info,
    }));
    children.push(Child {
        name: "file".to_owned(),
        info: file,
    });
    let backing = facts.backing.as_ref();
    let named = |value: &Option<Value>| value.clone().map(|value| with_names(value, &names));
    Ok(ImageInfo {
        filename: shown,
        format: driver.format().name().to_owned(),
        virtual_size: facts.virtual_size,
        actual_size,
        dirty: facts.dirty,
        cluster_size: facts.unit,
        encrypted: facts.encrypted,
        compressed: facts.compressed == Some(true),
        backing_filename: backing.map(|backing| backing.name.clone()),
        full_backing_filename: backing.map(|backing| {
            resolve_name(&path, OsStr::new(&backing.name))
                .to_string_lossy()
                .into_owned()
        }),
        backing_filename_format: backing.and_then(|backing| backing.format.clone()),
        snapshots: facts.snapshots.clone(),
        format_specific: named(&facts.specific).map(|data| (driver.format().name().to_owned(), data)),
        details: named(&facts.details),
        looks_like,
        children,
    })
}

/// `value` with the names of files in place of their numbers.
fn with_names(value: Value, names: &[String]) -> Value {
    match value {
        Value::File(index) => Value::Text(names.get(usize::from(index.0)).cloned().unwrap_or_default()),
        Value::List(values) => {
            Value::List(values.into_iter().map(|value| with_names(value, names)).collect())
        }
        Value::Map(pairs) => Value::Map(
            pairs
                .into_iter()
                .map(|(key, value)| (key, with_names(value, names)))
                .collect(),
        ),
        other => other,
    }
}

fn describe_file(file: &File) -> Result<ImageInfo> {
    let len = file.len()?;
    let device = file.is_block_device();
    Ok(ImageInfo {
        filename: file.path().to_string_lossy().into_owned(),
        format: if device { "host_device" } else { "file" }.to_owned(),
        virtual_size: len.checked_next_multiple_of(SECTOR).unwrap_or(len),
        // A device's node takes no space of its own.
        actual_size: if device { Some(0) } else { file.allocated()? },
        dirty: false,
        cluster_size: None,
        encrypted: false,
        compressed: false,
        backing_filename: None,
        full_backing_filename: None,
        backing_filename_format: None,
        snapshots: Vec::new(),
        format_specific: Some(("file".to_owned(), Value::Map(Vec::new()))),
        details: None,
        looks_like: None,
        children: Vec::new(),
    })
}
