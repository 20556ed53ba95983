//! A folder of images, what can be read of them, and operations that are recorded or disturbed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use diskmill::open::{self, Around, OpenRequest};
use diskmill::ops::check;
use diskmill::policy::References;
use diskmill::spec::ImageSpec;
use diskmill_core::{CheckReport, GuestOffset, Job, Result, StorageMut};
use diskmill_testkit::crash::{Effect, INCONSISTENT, Picture, Subject, Tolerance};
use diskmill_testkit::fault::{Faults, Journal};
use diskmill_testkit::{Scratch, model, oracle};

/// Images in a folder, in memory as far as the host lets us.
#[derive(Debug)]
pub struct World {
    pub scratch: Scratch,
    /// Put around every file that operations open.
    pub around: Option<Arc<dyn Around>>,
}

/// Something that is done to images in a folder. The image it changes is called `image`; its backing image, if it has
/// one, lies beside it.
pub struct Operation {
    pub name: &'static str,
    /// Makes the images.
    pub make: fn(&Scratch),
    /// Does it.
    pub run: fn(&World) -> Result<()>,
    /// What comes of it.
    pub outcome: Outcome,
}

/// What comes of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A new image called `new`, or one in place of an old file of that name. Nothing else changes.
    New,
    /// `image` is changed in place. What can be read of it gets from what it was to what it is then like this.
    InPlace(Effect),
    /// `image` is changed in place, at once, and flags of who shares what follow.
    Sharing,
    /// `image` is damaged and put right.
    Repair,
}

impl Outcome {
    /// How what can be read of `image` changes.
    pub fn effect(self) -> Option<Effect> {
        match self {
            Self::New => None,
            Self::InPlace(effect) => Some(effect),
            Self::Sharing | Self::Repair => Some(Effect::Switches),
        }
    }

    /// What may be wrong with `image` on the way.
    pub fn tolerance(self) -> Tolerance {
        match self {
            Self::New | Self::InPlace(_) => Tolerance::Leaks,
            Self::Sharing => Tolerance::LaggingFlags,
            Self::Repair => Tolerance::Damage,
        }
    }
}

impl World {
    /// The folder as `make` fills it.
    pub fn new(make: &dyn Fn(&Scratch)) -> Self {
        let scratch = Scratch::beneath("/dev/shm");
        make(&scratch);
        Self {
            scratch,
            around: None,
        }
    }

    /// A folder with the files of `files`.
    pub fn of(files: &BTreeMap<String, Vec<u8>>) -> Self {
        let world = Self::new(&|_| {});
        for (name, bytes) in files {
            world.scratch.file(name, bytes);
        }
        world
    }

    /// All files, by name.
    pub fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let read = |name: String| {
            let bytes = std::fs::read(self.scratch.join(&name)).expect("read a file");
            (name, bytes)
        };
        self.scratch.names().into_iter().map(read).collect()
    }

    /// A request for the image `name`, with what is to be put around its files.
    pub fn request(&self, name: &str) -> OpenRequest {
        let mut request = OpenRequest::new(ImageSpec::from_path(self.scratch.join(name)));
        request.format = Some(self.format(name).to_owned());
        request.policy = References::Beneath { allow: Vec::new() };
        request.around.clone_from(&self.around);
        request
    }

    /// The format of the image `name`.
    fn format(&self, name: &str) -> &'static str {
        if name.ends_with("raw") {
            return "raw";
        }
        match std::fs::read(self.scratch.join(name)).unwrap_or_default() {
            bytes if bytes.starts_with(b"OOOM") => "cow",
            bytes if bytes.starts_with(b"QFI\xfb\0\0\0\x01") => "qcow",
            _ => "qcow2",
        }
    }

    /// What can be read of `image`.
    pub fn look(&self) -> Result<Picture> {
        let read = |snapshot: Option<String>| -> Result<(Vec<u8>, open::Image)> {
            let mut request = self.request("image");
            request.snapshot = snapshot.map(Into::into);
            let image = open::image(&request)?;
            let mut bytes = vec![0; usize::try_from(image.chain.virtual_size()).expect("a small disk")];
            image.chain.read_at(GuestOffset::ZERO, &mut bytes)?;
            Ok((bytes, image))
        };
        let (disk, image) = read(None)?;
        let facts = &image.nodes[0].facts;
        let mut picture = Picture::of(disk);
        for snapshot in &facts.snapshots {
            let (bytes, _) = read(Some(snapshot.id.clone()))?;
            picture.snapshots.insert(snapshot.name.clone(), bytes);
        }
        for bitmap in facts.bitmaps.iter().flatten() {
            let text = match (bitmap.inconsistent, bitmap.enabled) {
                (true, _) => INCONSISTENT.to_owned(),
                (_, true) => format!("on {}", dirty(&image, &bitmap.name)?),
                (_, false) => format!("off {}", dirty(&image, &bitmap.name)?),
            };
            picture.traits.insert(format!("bitmap {}", bitmap.name), text);
        }
        Ok(picture)
    }

    /// What our check finds in every qcow2 image of the folder, taken together.
    pub fn check(&self) -> Result<CheckReport> {
        let mut all = CheckReport::default();
        for name in self.scratch.names() {
            if name.ends_with("raw") || name.ends_with("data") {
                continue;
            }
            let report = check::run(&self.request(&name), check::Reach::Ours, Job::silent())?.report;
            all.check_errors += report.check_errors;
            all.corruptions += report.corruptions;
            all.leaks += report.leaks;
            all.findings.extend(report.findings);
        }
        Ok(all)
    }
}

/// What a bitmap says, as text that is the same for the same.
fn dirty(image: &open::Image, name: &str) -> Result<String> {
    let mut runs = image.chain.layers()[0].dirty(name)?;
    let mut text = String::new();
    while let Some(run) = runs.next_run()? {
        text += &format!("{run:?} ");
    }
    Ok(text)
}

/// Records what is done to files, by path.
#[derive(Debug, Default)]
pub struct Recorder {
    pub journal: Arc<Journal>,
    paths: Mutex<Vec<PathBuf>>,
}

impl Recorder {
    /// The names of the files, in the order of the journal.
    pub fn names(&self) -> Vec<String> {
        let paths = self.paths.lock().expect("no panic");
        let name = |path: &PathBuf| path.file_name().expect("a name").to_string_lossy().into_owned();
        paths.iter().map(name).collect()
    }
}

impl Around for Recorder {
    fn around(&self, path: &Path, file: Arc<dyn StorageMut>) -> Arc<dyn StorageMut> {
        let mut paths = self.paths.lock().expect("no panic");
        let index = paths.iter().position(|known| known == path).unwrap_or_else(|| {
            paths.push(path.to_owned());
            paths.len() - 1
        });
        self.journal.record_as(index, file)
    }
}

/// Makes calls fail.
#[derive(Debug)]
pub struct Disturber(pub Arc<Faults>);

impl Around for Disturber {
    fn around(&self, path: &Path, file: Arc<dyn StorageMut>) -> Arc<dyn StorageMut> {
        self.0.wrap_file(path, file)
    }
}

/// A folder whose files a journal has, and others that stay as they are.
pub struct Recorded {
    /// Names of the files of the journal, in its order.
    pub names: Vec<String>,
    /// All files as they were at first.
    pub first: BTreeMap<String, Vec<u8>>,
}

impl Recorded {
    fn world(&self, files: &[Vec<u8>]) -> World {
        let mut all = self.first.clone();
        all.extend(self.names.iter().cloned().zip(files.iter().cloned()));
        World::of(&all)
    }

    fn files(&self, world: &World) -> Vec<Vec<u8>> {
        let mut all = world.files();
        let take = |name: &String| all.remove(name).expect("the file is still there");
        self.names.iter().map(take).collect()
    }
}

impl Subject for Recorded {
    fn look(&self, files: &[Vec<u8>]) -> Result<Picture> {
        self.world(files).look()
    }

    fn check(&self, files: &[Vec<u8>]) -> Result<CheckReport> {
        self.world(files).check()
    }

    fn repair(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        let world = self.world(files);
        super::operations::repair(&world)?;
        Ok(self.files(&world))
    }

    fn overwrite(&self, files: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
        let world = self.world(files);
        let image = open::image_mut(&world.request("image"))?;
        let bytes: Vec<u8> = (0..image.top.virtual_size())
            .map(|at| model::pattern(0x5b, at))
            .collect();
        image.top.write_at(GuestOffset::ZERO, &bytes, &image.below)?;
        image.top.flush()?;
        drop(image);
        Ok(self.files(&world))
    }

    fn second_opinion(&self, files: &[Vec<u8>], tolerance: Tolerance) -> std::result::Result<(), String> {
        let world = self.world(files);
        for name in world.scratch.names() {
            // QEMU knows cow no more, and has no check of qcow.
            if name.ends_with("raw") || name.ends_with("data") || world.format(&name) != "qcow2" {
                continue;
            }
            match oracle::check(world.scratch.join(&name), "qcow2") {
                (_, 0 | 3) => {}
                (_, 2) if tolerance == Tolerance::LaggingFlags => {}
                (report, code) => return Err(format!("{name}, code {code}: {report}")),
            }
        }
        Ok(())
    }
}
