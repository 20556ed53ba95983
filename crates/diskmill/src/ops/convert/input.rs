//! Opening what is to be read.

use std::io::{self, Seek};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use diskmill_core::{
    Chain, Error, ErrorKind, Format, ForwardSource, HostOffset, Job, OpenSpec, Result, Role, Storage,
    StorageMut,
};
use diskmill_formats::registry;
use diskmill_storage::{File, PipeIn};

use super::source::{Source, to_usize};
use super::work::is_zero;
use super::{ConvertError, Extract, Input};
use crate::open::{self, Image, OpenRequest};
use crate::spec::ImageSpec;

/// What there is to read.
pub(super) enum Opened {
    /// Disks that can be read anywhere.
    Disks(Source),
    /// One that only comes in order.
    Stream(PipeIn),
}

/// Opens all inputs.
pub(super) fn open(inputs: &[Input], job: Job<'_>) -> Result<Opened> {
    let mut disks = Vec::new();
    for input in inputs {
        match input {
            Input::Image(request) => {
                let mut request = (**request).clone();
                request.hold = true;
                disks.push(named(open::image(&request)?));
            }
            Input::Stdin | Input::StdinImage(_) if inputs.len() > 1 => {
                return Err(ConvertError::StdinNotAlone.usage());
            }
            Input::StdinImage(request) => {
                let mut request = (**request).clone();
                request.spec = ImageSpec::from_path("/dev/stdin");
                request.hold = true;
                if stdin_file()?.is_none() {
                    let near = Path::new("/var/tmp/stdin");
                    request.given = Some(spool_file(&mut PipeIn::stdin()?, near, job)?);
                }
                disks.push(named(open::image(&request)?));
            }
            Input::Stdin => match stdin_file()? {
                Some(request) => disks.push(named(open::image(&request)?)),
                None => return Ok(Opened::Stream(PipeIn::stdin()?)),
            },
        }
    }
    if disks.is_empty() {
        return Err(ConvertError::NoSource.usage());
    }
    Ok(Opened::Disks(Source::new(disks)?))
}

pub(super) fn named(image: Image) -> (Chain, Vec<Arc<str>>) {
    let names = image
        .nodes
        .iter()
        .map(|node| Arc::clone(&node.filename))
        .collect();
    (image.chain, names)
}

/// Standard input as a file, if it is one and nobody has read from it: its size is known then, and its holes.
fn stdin_file() -> Result<Option<OpenRequest>> {
    let mut file: std::fs::File = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(Error::from)?
        .into();
    let is_file = file.metadata().is_ok_and(|known| known.is_file());
    if !is_file || file.stream_position().map_err(Error::from)? != 0 {
        return Ok(None);
    }
    let mut request = OpenRequest::new(ImageSpec::from_path("/dev/stdin"));
    request.format = Some(Format::Raw.name().to_owned());
    Ok(Some(request))
}

/// A part of a stream.
pub(super) struct Part<'a> {
    inner: &'a mut dyn ForwardSource,
    skip: u64,
    left: u64,
}

impl<'a> Part<'a> {
    /// The part of `inner` that `extract` says.
    pub(super) fn new(inner: &'a mut dyn ForwardSource, extract: Extract) -> Self {
        Self {
            inner,
            skip: extract.skip,
            left: extract.len.unwrap_or(u64::MAX),
        }
    }
}

impl ForwardSource for Part<'_> {
    fn next(&mut self, buf: &mut [u8]) -> Result<usize> {
        while self.skip > 0 {
            let len = to_usize(self.skip).min(buf.len());
            let read = self.inner.next(buf.get_mut(..len).unwrap_or_default())?;
            if read == 0 {
                return Ok(0);
            }
            self.skip -= read as u64;
        }
        let len = to_usize(self.left).min(buf.len());
        let read = self.inner.next(buf.get_mut(..len).unwrap_or_default())?;
        self.left -= read as u64;
        Ok(read)
    }
}

/// Bytes that are read at once while spooling, and that are zeros or not as a whole.
const SPOOL_CHUNK: usize = 1 << 20;
const SPOOL_STEP: usize = 64 << 10;

/// Keeps a stream in an unnamed file near `near`.
fn spool_file(stream: &mut dyn ForwardSource, near: &Path, job: Job<'_>) -> Result<Arc<File>> {
    let beside = match near.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    // A directory of devices has no room for it.
    let file = File::temporary(beside).or_else(|_| File::temporary("/var/tmp"))?;
    let mut buf = vec![0; SPOOL_CHUNK];
    let mut end: u64 = 0;
    loop {
        job.check()?;
        let have = stream.next(&mut buf)?;
        if have == 0 {
            break;
        }
        for part in buf.get(..have).unwrap_or_default().chunks(SPOOL_STEP) {
            if !is_zero(part) {
                file.write_at(HostOffset::new(end), part)?;
            }
            end += part.len() as u64;
        }
    }
    file.set_len(end)?;
    Ok(Arc::new(file))
}

/// Keeps a raw disk that comes as a stream near `near`, for a target that must know the size first.
pub(super) fn spool(stream: &mut dyn ForwardSource, near: &Path, job: Job<'_>) -> Result<Source> {
    let main: Arc<dyn Storage> = spool_file(stream, near, job)?;
    let driver = registry::by_name(Format::Raw.name()).ok_or_else(|| Error::bare(ErrorKind::Unsupported))?;
    let how = OpenSpec::default();
    let layer = driver
        .parse(Arc::clone(&main), &how)?
        .attach(vec![(Role::Main, main)], &how)?;
    Source::new(vec![(Chain::new(vec![layer]), Vec::new())])
}
