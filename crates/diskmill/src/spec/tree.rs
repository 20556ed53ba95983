//! The tree behind `json:` and `--image-opts`, flattened to dotted names as `qemu-img` does.

use diskmill_core::{Options, parse_size};
use serde_json::Value as Json;

use super::{BackingSpec, FileSpec, ImageSpec, Opening, Settings, SpecError, driver_error};

/// Images within images. No chain written out by hand or by a tool comes near it.
const NESTING: usize = 256;

/// A value at the end of a branch.
#[derive(Clone, Debug, PartialEq)]
enum Leaf {
    Text(String),
    Number(String),
    Bool(bool),
    Null,
}

/// Dotted names and their values, in the order given. The last of a name counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Tree {
    leaves: Vec<(String, Leaf)>,
}

/// Options of qcow2 that tune caches or add checks, and change nothing that is read or written.
const QCOW2_TUNING: [&str; 11] = [
    "overlap-check",
    "discard-no-unref",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
];

/// Options of any image that mean nothing to a command that runs once.
const IDLE: [&str; 4] = ["node-name", "detect-zeroes", "auto-read-only", "active"];

/// Options of files that tune how the host is asked.
const FILE_TUNING: [&str; 6] = [
    "aio",
    "aio-max-batch",
    "drop-cache",
    "pr-manager",
    "x-check-cache-dropped",
    "dynamic-auto-read-only",
];

impl Tree {
    /// The tree of a JSON object.
    pub(super) fn from_json(text: &str) -> Result<Self, SpecError> {
        let Json::Object(fields) = super::parse_json(text)? else {
            return Err(SpecError::NotAnObject);
        };
        let mut tree = Self::default();
        for (name, value) in fields {
            tree.flatten(name, value);
        }
        Ok(tree)
    }

    /// The tree of `a.b=c,d=e`; a first word without `=` names a node.
    pub(super) fn from_key_values(text: &str) -> Result<Self, SpecError> {
        let first = text.split(',').next().unwrap_or_default();
        if !first.contains('=') {
            return Err(SpecError::NoSuchNode(first.to_owned()));
        }
        let leaves = Options::parse(text)
            .iter()
            .map(|(name, value)| (name.to_owned(), Leaf::Text(value.to_owned())))
            .collect();
        Ok(Self { leaves })
    }

    // Depth is bounded: serde_json refuses more than 128 levels.
    fn flatten(&mut self, name: String, value: Json) {
        let leaf = match value {
            Json::Object(fields) => {
                for (inner, value) in fields {
                    self.flatten(format!("{name}.{inner}"), value);
                }
                return;
            }
            Json::Array(items) => {
                for (index, value) in items.into_iter().enumerate() {
                    self.flatten(format!("{name}.{index}"), value);
                }
                return;
            }
            Json::Null => Leaf::Null,
            Json::Bool(value) => Leaf::Bool(value),
            Json::Number(value) => Leaf::Number(value.to_string()),
            Json::String(value) => Leaf::Text(value),
        };
        self.leaves.retain(|(known, _)| *known != name);
        self.leaves.push((name, leaf));
    }

    fn take(&mut self, name: &str) -> Option<Leaf> {
        let index = self.leaves.iter().position(|(known, _)| known == name)?;
        Some(self.leaves.remove(index).1)
    }

    /// Text; a value of another sort counts as absent, as in `qemu-img`.
    fn take_text(&mut self, name: &str) -> Option<String> {
        match self.take(name)? {
            Leaf::Text(text) => Some(text),
            _ => None,
        }
    }

    fn take_bool(&mut self, name: &str) -> Result<Option<bool>, SpecError> {
        match self.take(name) {
            None => Ok(None),
            Some(Leaf::Bool(value)) => Ok(Some(value)),
            Some(Leaf::Text(text)) => match text.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Some(true)),
                "off" | "no" | "false" | "n" => Ok(Some(false)),
                _ => Err(bad(name, "'on' or 'off'")),
            },
            Some(_) => Err(bad(name, "'on' or 'off'")),
        }
    }

    /// What is below `name.`, with that taken off.
    fn take_branch(&mut self, name: &str) -> Self {
        let mut branch = Self::default();
        self.leaves.retain_mut(|(key, leaf)| {
            match key.strip_prefix(name).and_then(|key| key.strip_prefix('.')) {
                Some(inner) => {
                    branch
                        .leaves
                        .push((inner.to_owned(), std::mem::replace(leaf, Leaf::Null)));
                    false
                }
                None => true,
            }
        });
        branch
    }

    fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    /// What the tree says of an image.
    pub(super) fn into_spec(mut self, depth: usize) -> Result<ImageSpec, SpecError> {
        if depth > NESTING {
            return Err(SpecError::TooDeep(NESTING));
        }
        let driver = self.take_text("driver");
        if let Some(name @ ("file" | "host_device")) = driver.as_deref() {
            let file = self.take_file(name)?;
            self.nothing_left(name)?;
            let mut spec = ImageSpec::from_path(&file.path);
            spec.driver = driver;
            spec.file = file;
            return Ok(spec);
        }
        if let Some(name) = &driver
            && !known_format(name)
        {
            return Err(driver_error(name));
        }
        if let Some(Leaf::Text(node)) = self.take("file") {
            return Err(SpecError::NoSuchNode(node));
        }
        let mut file_branch = self.take_branch("file");
        let name = match (&driver, file_branch.is_empty()) {
            (None, true) => return Err(SpecError::NeitherDriverNorFile),
            (Some(driver), true) => return Err(SpecError::NoFile(driver.clone())),
            (driver, false) => driver.clone().unwrap_or_default(),
        };
        let file_driver = file_branch
            .take_text("driver")
            .unwrap_or_else(|| "file".to_owned());
        if !matches!(file_driver.as_str(), "file" | "host_device") {
            return Err(match known_format(&file_driver) {
                true => SpecError::UnsupportedDriver(file_driver),
                false => driver_error(&file_driver),
            });
        }
        let file = file_branch.take_file(&file_driver)?;
        file_branch.nothing_left(&file_driver)?;

        let mut spec = ImageSpec::from_path(&file.path);
        spec.file = file;
        let (opening, shown) = self.take_opening(driver, &name, depth)?;
        if let Some(shown) = shown {
            spec.shown = shown.of(&name, &file_driver, &spec);
        }
        spec.open_as(opening);
        Ok(spec)
    }

    /// What the tree says of how an image is opened. Nothing is left in it then.
    fn take_opening(
        &mut self,
        driver: Option<String>,
        name: &str,
        depth: usize,
    ) -> Result<(Opening, Option<Shown>), SpecError> {
        let mut opening = Opening {
            driver,
            settings: self.take_settings()?,
            backing: self.take_backing(depth)?,
            data_file: self.take_child_file("data-file")?,
            ..Opening::default()
        };
        let mut shown = None;
        if matches!(name, "raw" | "") {
            shown = self.take_window(&mut opening.options)?;
        }
        if matches!(name, "qcow2" | "") {
            self.take_branch("overlap-check");
            self.leaves
                .retain(|(name, _)| !QCOW2_TUNING.contains(&name.as_str()));
        }
        if matches!(name, "qcow2" | "qcow" | "") {
            shown = self.take_encryption(&mut opening.options)?.or(shown);
        }
        if matches!(name, "luks" | "") {
            opening.header = self.take_child_file("header")?;
            let key = self.take_key("key-secret", &mut opening.options)?;
            shown = key.map(|key| Shown::Luks(key, opening.header.clone())).or(shown);
        }
        self.nothing_left(name)?;
        Ok((opening, shown))
    }

    fn take_file(&mut self, driver: &str) -> Result<FileSpec, SpecError> {
        let name = self.take_text("filename").filter(|name| !name.is_empty());
        let Some(name) = name else {
            return Err(SpecError::NoFileName {
                driver: driver.to_owned(),
            });
        };
        let mut file = FileSpec::new(name);
        file.device = driver == "host_device";
        match self.take("locking") {
            Some(Leaf::Text(mode)) if mode == "off" => file.lock = false,
            Some(Leaf::Text(mode)) if mode == "on" || mode == "auto" => {}
            Some(_) => return Err(bad("locking", "'on', 'off' or 'auto'")),
            None => {}
        }
        self.take_settings()?;
        self.leaves
            .retain(|(name, _)| !FILE_TUNING.contains(&name.as_str()));
        Ok(file)
    }

    fn take_settings(&mut self) -> Result<Settings, SpecError> {
        let settings = Settings {
            direct: self.take_bool("cache.direct")?,
            no_flush: self.take_bool("cache.no-flush")?,
            read_only: self.take_bool("read-only")?,
            share: self.take_bool("force-share")?,
            unmap: match self.take_text("discard").as_deref() {
                None => None,
                Some("unmap" | "on") => Some(true),
                Some("ignore" | "off") => Some(false),
                Some(_) => return Err(bad("discard", "'ignore' or 'unmap'")),
            },
        };
        self.leaves.retain(|(name, _)| !IDLE.contains(&name.as_str()));
        Ok(settings)
    }

    fn take_backing(&mut self, depth: usize) -> Result<BackingSpec, SpecError> {
        match self.take("backing") {
            Some(Leaf::Null) => return Ok(BackingSpec::Without),
            Some(Leaf::Text(name)) if name.is_empty() => return Ok(BackingSpec::WithoutByEmptyName),
            Some(Leaf::Text(node)) => return Err(SpecError::NoSuchNode(node)),
            Some(_) => return Err(bad("backing", "an image or null")),
            None => {}
        }
        let mut branch = self.take_branch("backing");
        if branch.is_empty() {
            return Ok(BackingSpec::Own);
        }
        if branch.names_a_file() {
            return Ok(BackingSpec::Other(Box::new(branch.into_spec(depth + 1)?)));
        }
        if depth >= NESTING {
            return Err(SpecError::TooDeep(NESTING));
        }
        let driver = branch.take_text("driver");
        if let Some(name) = driver.as_deref().filter(|name| !known_format(name)) {
            return Err(driver_error(name));
        }
        let name = driver.clone().unwrap_or_default();
        let (opening, _) = branch.take_opening(driver, &name, depth + 1)?;
        Ok(BackingSpec::OwnWith(Box::new(opening)))
    }

    /// Whether it says which file it is about, and not only how that is opened.
    fn names_a_file(&self) -> bool {
        self.leaves.iter().any(|(name, leaf)| match name.as_str() {
            "file" | "filename" => true,
            "driver" => {
                matches!(leaf, Leaf::Text(driver) if matches!(driver.as_str(), "file" | "host_device"))
            }
            name => name.starts_with("file."),
        })
    }

    /// The further file of an image that is called `name`.
    fn take_child_file(&mut self, name: &str) -> Result<Option<FileSpec>, SpecError> {
        if let Some(Leaf::Text(node)) = self.take(name) {
            return Err(SpecError::NoSuchNode(node));
        }
        let mut branch = self.take_branch(name);
        if branch.is_empty() {
            return Ok(None);
        }
        let mut driver = branch.take_text("driver").unwrap_or_else(|| "file".to_owned());
        if driver == "raw" {
            // A raw image that is all of a file.
            branch.nothing_left_but("file.", &driver)?;
            branch = branch.take_branch("file");
            driver = branch.take_text("driver").unwrap_or_else(|| "file".to_owned());
        }
        if !matches!(driver.as_str(), "file" | "host_device") {
            return Err(driver_error(&driver));
        }
        let file = branch.take_file(&driver)?;
        branch.nothing_left(&driver)?;
        Ok(Some(file))
    }

    /// `encrypt.format` and `encrypt.key-secret`, of which the latter shows in the image's name.
    fn take_encryption(&mut self, options: &mut Options) -> Result<Option<Shown>, SpecError> {
        if let Some(format) = self.take_text("encrypt.format") {
            options.set("encrypt.format", format);
        }
        let key = self.take_key("encrypt.key-secret", options)?;
        let mut names = self.leaves.iter();
        match names.find_map(|(name, _)| name.strip_prefix("encrypt.")) {
            Some(name) => Err(SpecError::Unexpected(name.to_owned())),
            None => Ok(key.map(Shown::Encrypted)),
        }
    }

    /// The name of a secret.
    fn take_key(&mut self, name: &str, options: &mut Options) -> Result<Option<String>, SpecError> {
        let key = match self.take(name) {
            None => return Ok(None),
            Some(Leaf::Text(key) | Leaf::Number(key)) => key,
            Some(_) => return Err(bad(name, "the id of a secret")),
        };
        options.set(name, key.clone());
        Ok(Some(key))
    }

    /// raw's `offset` and `size`, which also show in the image's name.
    fn take_window(&mut self, options: &mut Options) -> Result<Option<Shown>, SpecError> {
        let mut shown = [None, None];
        for (name, shown) in ["offset", "size"].into_iter().zip(&mut shown) {
            let (text, written) = match self.take(name) {
                None => continue,
                Some(Leaf::Number(text)) => (text.clone(), text),
                Some(Leaf::Text(text)) => (text.clone(), Json::String(text).to_string()),
                Some(_) => return Err(bad(name, SIZE)),
            };
            if parse_size(&text).is_none() {
                return Err(bad(name, SIZE));
            }
            options.set(name, text);
            *shown = Some(format!("\"{name}\": {written}, "));
        }
        let [offset, size] = shown.map(Option::unwrap_or_default);
        Ok((!offset.is_empty() || !size.is_empty()).then_some(Shown::Window { offset, size }))
    }

    fn nothing_left_but(&self, prefix: &str, driver: &str) -> Result<(), SpecError> {
        match self.leaves.iter().find(|(name, _)| !name.starts_with(prefix)) {
            None => Ok(()),
            Some((option, _)) => Err(SpecError::UnknownOption {
                driver: driver.to_owned(),
                option: option.clone(),
            }),
        }
    }

    fn nothing_left(&self, driver: &str) -> Result<(), SpecError> {
        match self.leaves.first() {
            None => Ok(()),
            Some((option, _)) => Err(SpecError::UnknownOption {
                driver: driver.to_owned(),
                option: option.clone(),
            }),
        }
    }
}

/// What of an image's options shows in its name. The order of the keys there is qemu-img's own.
enum Shown {
    /// A part of a raw file.
    Window { offset: String, size: String },
    /// The key of a qcow or qcow2 image.
    Encrypted(String),
    /// The key of a luks image, and the file with its header.
    Luks(String, Option<FileSpec>),
}

impl Shown {
    /// The name of the image `spec`, whose driver was said to be `driver`, or nothing.
    fn of(&self, driver: &str, file_driver: &str, spec: &ImageSpec) -> String {
        let file = |driver: &str, path: &str| {
            format!("{{\"driver\": \"{driver}\", \"filename\": {}}}", Json::from(path))
        };
        let main = file(file_driver, &spec.shown);
        match self {
            Self::Window { offset, size } => {
                format!("json:{{{offset}\"driver\": \"raw\", {size}\"file\": {main}}}")
            }
            Self::Encrypted(key) => {
                let driver = if driver.is_empty() { "qcow2" } else { driver };
                let key = Json::from(key.as_str());
                format!("json:{{\"encrypt.key-secret\": {key}, \"driver\": \"{driver}\", \"file\": {main}}}")
            }
            Self::Luks(key, header) => {
                let header = header.as_ref().map_or_else(String::new, |header| {
                    let driver = if header.device { "host_device" } else { "file" };
                    format!("\"header\": {}, ", file(driver, &header.path.to_string_lossy()))
                });
                let key = Json::from(key.as_str());
                format!("json:{{{header}\"driver\": \"luks\", \"file\": {main}, \"key-secret\": {key}}}")
            }
        }
    }
}

const SIZE: &str = "a non-negative number below 2^64";

fn bad(name: &str, expected: &'static str) -> SpecError {
    SpecError::Value {
        name: name.to_owned(),
        expected,
    }
}

fn known_format(name: &str) -> bool {
    diskmill_formats::registry::by_name(name).is_some()
}
