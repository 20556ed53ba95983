//! The files of a new image: staged beside their target, or written in place where that is what they are for.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskmill_core::{
    Durability, Error, ErrorKind, FilesMut, LayerMut, OpenSpec, OutputName, OutputSpec, Result, Role,
    Storage, StorageMut,
};
use diskmill_storage::{
    CacheMode, File, FileOptions, InPlace, LockPlan, NotADisk, PipeOut, StageOptions, Staged,
};

use crate::open::Around;
use crate::ops::create::creatable;
use crate::policy::References;

/// The files a new image is written to. Unless [`commit`](Self::commit) is called, the target stays as it was.
#[derive(Debug)]
pub(crate) struct Target {
    files: FilesMut,
    /// In the order of `files`.
    staged: Vec<Staged>,
    pipe: Option<Arc<PipeOut>>,
}

impl Target {
    /// Starts the files `outputs` asks for, the main one to be called `path`.
    ///
    /// Others are named as [`open`](crate::open) will look for them under `policy`.
    pub(crate) fn create(
        path: &Path,
        outputs: &[OutputSpec],
        cache: CacheMode,
        policy: &References,
    ) -> Result<Self> {
        if is_stdout(path) {
            return Self::stdout();
        }
        let mut target = Self {
            files: Vec::new(),
            staged: Vec::new(),
            pipe: None,
        };
        for output in outputs {
            let options = StageOptions::new().cache(cache).for_output(output);
            let staged = Staged::create(output_path(path, &output.name, policy), &options)?;
            target.files.push((output.role, staged.storage()));
            target.staged.push(staged);
        }
        Ok(target)
    }

    /// Standard output: from its start if it is an empty file or a block device, else in order.
    pub(crate) fn stdout() -> Result<Self> {
        let opened = File::open("/dev/stdout", &FileOptions::write(LockPlan::WRITE));
        match opened {
            Ok(file) if file.is_block_device() || file.len()? == 0 => {
                Ok(Self::in_order(Arc::new(file), None))
            }
            Err(error) if error.find::<NotADisk>().is_none() && error.find::<io::Error>().is_none() => {
                Err(error)
            }
            _ => Ok(Self::pipe(PipeOut::stdout()?)),
        }
    }

    /// A pipe.
    pub(crate) fn pipe(pipe: PipeOut) -> Self {
        let pipe = Arc::new(pipe);
        Self::in_order(Arc::clone(&pipe) as Arc<dyn StorageMut>, Some(pipe))
    }

    fn in_order(main: Arc<dyn StorageMut>, pipe: Option<Arc<PipeOut>>) -> Self {
        Self {
            files: vec![(Role::Main, main)],
            staged: Vec::new(),
            pipe,
        }
    }

    /// Puts something around the files of the image that is to be called `path`.
    pub(crate) fn surround(&mut self, path: &Path, around: Option<&Arc<dyn Around>>) {
        if let Some(around) = around {
            for (_, file) in &mut self.files {
                *file = around.around(path, Arc::clone(file));
            }
        }
    }

    /// The files, in the order they were asked for.
    pub(crate) fn files(&self) -> FilesMut {
        self.files.clone()
    }

    /// Opens the image of format `format` that the files hold by now, to go on changing it.
    pub(crate) fn reopen(&self, format: &str, how: &OpenSpec) -> Result<Arc<dyn LayerMut>> {
        let driver = creatable(format)?;
        let main = self
            .files
            .first()
            .map(|(_, file)| Arc::clone(file) as Arc<dyn Storage>);
        let main = main.ok_or_else(|| Error::bare(ErrorKind::Usage))?;
        driver.parse(main, how)?.attach_mut(self.files(), how)
    }

    /// Why a target that could have been replaced when complete is written in place.
    pub(crate) fn in_place(&self) -> Option<InPlace> {
        self.staged
            .iter()
            .filter_map(Staged::in_place)
            .find(|reason| *reason != InPlace::Device)
    }

    /// Gives the files their names, now that they are complete.
    pub(crate) fn commit(self, durability: Durability) -> Result<()> {
        if let Some(pipe) = self.pipe {
            pipe.finish()?;
        }
        // The main file names the others: it comes last.
        let mut set = self.staged;
        set.reverse();
        Staged::commit_all(set, durability)
    }
}

/// Whether `path` is one of the names for what the shell has opened for us.
fn is_stdout(path: &Path) -> bool {
    ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"]
        .iter()
        .any(|name| path == Path::new(name))
}

/// Where a file of the image `main` belongs.
fn output_path(main: &Path, name: &OutputName, policy: &References) -> PathBuf {
    match (name, main.parent(), policy) {
        (OutputName::Main, ..) => main.to_owned(),
        (OutputName::Beside(name), Some(dir), _) => dir.join(name),
        (OutputName::Named(name), Some(dir), References::Beneath { .. } | References::None { .. }) => {
            dir.join(name)
        }
        (OutputName::Named(name) | OutputName::Beside(name), ..) => name.into(),
    }
}
