//! From an image to the chain of all it is backed by.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskmill_core::{
    Access, BackingName, Chain, Error, ErrorKind, Files, FilesMut, Format, Layer, LayerMut, Result, Role,
    Storage,
};
use diskmill_storage::{File, FileId, LockPlan};

use super::guard::Guarded;
use super::parent::check_identity;
use super::understand::{Place, is_historic, open_file};
use super::{Image, ImageMut, Node, OpenError, OpenRequest, OpenWarning, Understood, resolve_name};
use crate::policy::References;
use crate::spec::{BackingSpec, ImageSpec, SpecError};

/// Opens the images of one disk.
#[derive(Debug)]
pub(crate) struct Opener<'a> {
    pub(super) request: &'a OpenRequest,
    /// Every image file opened so far: none may come twice.
    seen: Vec<FileId>,
}

/// What an image is backed by, and who says so.
#[derive(Debug)]
pub(crate) struct Backing {
    /// The image.
    pub(crate) spec: ImageSpec,
    /// Its format, if the image above names it.
    pub(crate) format: Option<String>,
    /// Whether the image above has a format that is found only where [`OpenRequest::historic`] says so.
    pub(crate) historic: bool,
}

/// An image that is to be changed, before what it is backed by is opened.
#[derive(Debug)]
pub(super) struct TopMut {
    pub(super) layer: Arc<dyn LayerMut>,
    pub(super) node: Node,
    pub(super) next: Option<Backing>,
    pub(super) warnings: Vec<OpenWarning>,
}

impl<'a> Opener<'a> {
    pub(crate) fn new(request: &'a OpenRequest) -> Self {
        Self {
            request,
            seen: Vec::new(),
        }
    }

    pub(crate) fn image(mut self) -> Result<Image> {
        let top = self.understand_top(Access::Read, false)?;
        let next = self.backing_of(&top, &self.request.spec)?;
        let (layer, node) = self.attach(top)?;
        let mut image = Image {
            chain: Chain::new(vec![layer]),
            nodes: vec![node],
        };
        self.open_below(next, &mut image)?;
        Ok(image)
    }

    pub(crate) fn image_mut(mut self) -> Result<ImageMut> {
        let top = self.top_mut()?;
        let mut below = Image {
            chain: Chain::default(),
            nodes: vec![top.node],
        };
        self.open_below(top.next, &mut below)?;
        Ok(ImageMut {
            top: top.layer,
            below: below.chain,
            nodes: below.nodes,
            warnings: top.warnings,
        })
    }

    /// Opens the image that was asked for for changing in place, and nothing it is backed by.
    pub(super) fn top_mut(&mut self) -> Result<TopMut> {
        let request = self.request;
        let mut warnings = self.warnings();
        if request.spec.settings.read_only == Some(true) {
            let text = "read-only=on, and it is to be written";
            return Err(Error::new(ErrorKind::Usage, text)
                .op("open")
                .path(request.spec.path()));
        }
        let top = self.understand_top(Access::Write, false)?;
        let next = self.backing_of(&top, &request.spec)?;
        let (layer, node) = self.attach_guarded(top, &mut warnings)?;
        Ok(TopMut {
            layer,
            node,
            next,
            warnings,
        })
    }

    /// Opens an image for changing. If its format was guessed to be raw, it stays raw.
    pub(super) fn attach_guarded(
        &self,
        image: Understood,
        warnings: &mut Vec<OpenWarning>,
    ) -> Result<(Arc<dyn LayerMut>, Node)> {
        let guessed = image.probed && image.driver.format() == Format::Raw;
        let (layer, node) = self.attach_mut(image)?;
        if !guessed {
            return Ok((layer, node));
        }
        warnings.push(OpenWarning::GuessedRaw {
            name: node.filename.to_string(),
        });
        Ok((Arc::new(Guarded::new(layer)), node))
    }

    /// What the request itself should be remarked on.
    pub(crate) fn warnings(&self) -> Vec<OpenWarning> {
        match self.request.spec.backing {
            BackingSpec::WithoutByEmptyName => vec![OpenWarning::EmptyBackingName],
            _ => Vec::new(),
        }
    }

    /// Opens the image that was asked for and understands its header.
    pub(crate) fn understand_top(&mut self, access: Access, for_check: bool) -> Result<Understood> {
        let request = self.request;
        let top = Understood::open(
            &request.spec,
            request.format.as_deref(),
            Place::Top(access),
            request,
            for_check,
        )
        .map_err(|error| error.op("open").path(request.spec.path()))?;
        self.seen.push(top.file.identity());
        Ok(top)
    }

    /// Opens an image that another one is backed by and understands its header.
    pub(crate) fn understand_backing(&mut self, backing: &Backing, place: Place) -> Result<Understood> {
        let path = backing.spec.path();
        if self.seen.len() >= self.request.limits.chain_depth {
            let error = OpenError::TooDeep(self.request.limits.chain_depth);
            return Err(Error::new(ErrorKind::Unsupported, error).op("open").path(path));
        }
        let historic;
        let request = match backing.historic && !self.request.historic {
            true => {
                historic = OpenRequest {
                    historic: true,
                    ..self.request.clone()
                };
                &historic
            }
            false => self.request,
        };
        let next = Understood::open(&backing.spec, backing.format.as_deref(), place, request, false)
            .map_err(|error| error.op("open").path(path))?;
        let id = next.file.identity();
        if self.seen.contains(&id) {
            let error = OpenError::Loop(next.shown.clone());
            return Err(Error::new(ErrorKind::Malformed, error).op("open").path(path));
        }
        self.seen.push(id);
        Ok(next)
    }

    /// What `image` is backed by: what the user said of it in `said`, else what it says itself.
    pub(crate) fn backing_of(&self, image: &Understood, said: &ImageSpec) -> Result<Option<Backing>> {
        match &said.backing {
            BackingSpec::Without | BackingSpec::WithoutByEmptyName => Ok(None),
            // The user's own word needs no policy.
            BackingSpec::Other(spec) => Ok(Some(Backing {
                spec: spec.as_ref().clone(),
                format: None,
                historic: false,
            })),
            BackingSpec::Own => self.own_backing(image),
            BackingSpec::OwnWith(how) => match self.own_backing(image)? {
                Some(mut backing) => {
                    backing.format = how.driver.clone().or(backing.format);
                    backing.spec.open_as(how.as_ref().clone());
                    Ok(Some(backing))
                }
                None if !self.request.backing => Ok(None),
                None => {
                    let error = Error::from(SpecError::NeitherDriverNorFile);
                    Err(Error::new(error.kind(), OpenError::Backing(error))
                        .op("open")
                        .path(image.file.path()))
                }
            },
        }
    }

    /// What `image` says itself that it is backed by.
    fn own_backing(&self, image: &Understood) -> Result<Option<Backing>> {
        let facts = image.parsed.facts();
        match (&facts.backing, facts.parent) {
            _ if !self.request.backing => Ok(None),
            (Some(name), _) => self.named(image, name).map(Some),
            (None, Some(parent)) => self.parent(image, parent).map(Some),
            (None, None) => Ok(None),
        }
    }

    /// What `image` means by `name`, if the policy lets it.
    fn named(&self, image: &Understood, name: &BackingName) -> Result<Backing> {
        let from = image.file.path();
        let policy = &self.request.policy;
        let format = name.format.clone().filter(|format| !format.is_empty());
        let failed = |error: Error| {
            Error::new(error.kind(), OpenError::Backing(error))
                .op("open")
                .path(from)
        };
        if format.is_none() && !policy.may_probe() {
            let error = OpenError::BackingFormatMissing(name.name.clone());
            return Err(failed(
                Error::new(ErrorKind::Denied, error).op("open").path(&name.name),
            ));
        }
        let spec = self.permitted(from, &name.name).map_err(failed)?;
        Ok(Backing {
            spec,
            format,
            historic: is_historic(image.driver.format()),
        })
    }

    /// The spec of a name found in the image in the file `from`.
    fn permitted(&self, from: &Path, name: &str) -> Result<ImageSpec> {
        let policy = &self.request.policy;
        if ImageSpec::has_protocol(name) {
            return match policy {
                References::Any => ImageSpec::from_name(name),
                _ => {
                    let error = OpenError::NotPlain(name.to_owned());
                    Err(Error::new(ErrorKind::Denied, error).op("open").path(name))
                }
            };
        }
        self.permitted_path(resolve_name(from, OsStr::from_bytes(name.as_bytes())), name)
    }

    /// The spec of the path `path`, which an image calls `name`.
    pub(super) fn permitted_path(&self, path: PathBuf, name: &str) -> Result<ImageSpec> {
        let policy = &self.request.policy;
        let path = policy.permit(self.request.spec.path(), path, name)?;
        let mut spec = ImageSpec::from_path(path);
        spec.file.judged = *policy != References::Any;
        Ok(spec)
    }

    /// Opens all that `top` is backed by and lets go of it: whether it is there.
    pub(crate) fn demand_backing(&mut self, top: &Understood) -> Result<()> {
        if top.parsed.facts().parent.is_some() && self.request.spec.backing == BackingSpec::Own {
            // It has no name that could be wrong.
            return Ok(());
        }
        let next = self.backing_of(top, &self.request.spec)?;
        let mut node = top.node(&[]);
        // Whether it is the right one is not what is asked.
        node.facts.backing_content_id = None;
        node.facts.parent = None;
        let mut image = Image {
            chain: Chain::default(),
            nodes: vec![node],
        };
        self.open_below(next, &mut image)
    }

    /// Opens what is below the last layer of `image` and appends it.
    pub(super) fn open_below(&mut self, first: Option<Backing>, image: &mut Image) -> Result<()> {
        let mut layers: Vec<Arc<dyn Layer>> = image.chain.layers().to_vec();
        let mut next = first;
        while let Some(backing) = next {
            let opened = self.open_backing(&backing, image.nodes.last());
            let (layer, node, further) = opened.map_err(|error| in_chain(error, &image.nodes))?;
            layers.push(layer);
            image.nodes.push(node);
            next = further;
        }
        image.chain = Chain::new(layers);
        Ok(())
    }

    /// Opens what `above` is backed by, for reading, and says what that is backed by.
    pub(super) fn open_backing(
        &mut self,
        backing: &Backing,
        above: Option<&Node>,
    ) -> Result<(Arc<dyn Layer>, Node, Option<Backing>)> {
        let understood = self.understand_backing(backing, Place::Backing)?;
        let next = self.backing_of(&understood, &backing.spec)?;
        let (layer, node) = self.attach(understood)?;
        check_below(above, &layer, &node).map_err(|error| error.op("open").path(backing.spec.path()))?;
        Ok((layer, node, next))
    }

    fn attach(&self, image: Understood) -> Result<(Arc<dyn Layer>, Node)> {
        let data = self.data_files(&image, Access::Read)?;
        self.attach_with(image, &data)
    }

    /// Opens `image` for reading with its further files, which [`data_files`](Self::data_files) opened.
    pub(crate) fn attach_with(
        &self,
        image: Understood,
        data: &[(Role, Arc<File>)],
    ) -> Result<(Arc<dyn Layer>, Node)> {
        let files = self.readable(&image, data);
        let mut node = image.node(data);
        let path = image.file.path().to_owned();
        let layer = image
            .parsed
            .attach(files, &image.how)
            .map_err(|error| error.op("open").path(path))?;
        node.facts = layer.facts().clone();
        Ok((layer, node))
    }

    fn attach_mut(&self, image: Understood) -> Result<(Arc<dyn LayerMut>, Node)> {
        let data = self.data_files(&image, Access::Write)?;
        let files = self.hosts(&image, &data);
        let mut node = image.node(&data);
        let path = image.file.path().to_owned();
        let layer = image
            .parsed
            .attach_mut(files, &image.how)
            .map_err(|error| error.op("open").path(path))?;
        node.facts = layer.facts().clone();
        Ok((layer, node))
    }

    /// The files of an image for reading, the main one first: of a disk in a package, the part it is.
    pub(crate) fn readable(&self, image: &Understood, data: &[(Role, Arc<File>)]) -> Files {
        if let Some(part) = &image.part {
            return vec![(Role::Main, Arc::clone(part))];
        }
        let files = self.hosts(image, data).into_iter();
        files
            .map(|(role, file)| (role, file as Arc<dyn Storage>))
            .collect()
    }

    /// The files of an image, the main one first, with what the request puts around them.
    pub(crate) fn hosts(&self, image: &Understood, data: &[(Role, Arc<File>)]) -> FilesMut {
        let mut files = vec![(Role::Main, self.request.host(&image.file))];
        files.extend(data.iter().map(|(role, file)| (*role, self.request.host(file))));
        if let Some(header) = &image.header {
            files.push((Role::Header, self.request.host(header)));
        }
        files
    }

    /// Fails if the key that is given is not that of `image`, where that can be told and the request cares.
    pub(crate) fn try_key(&self, image: &Understood, data: &[(Role, Arc<File>)]) -> Result<()> {
        if !self.request.needs_keys || !image.parsed.facts().encrypted {
            return Ok(());
        }
        let main: Arc<dyn Storage> = image.file.clone();
        image
            .driver
            .parse(main, &image.how)?
            .attach(self.readable(image, data), &image.how)
            .map(drop)
    }

    /// The files that an image consists of beside its main one.
    pub(crate) fn data_files(&self, image: &Understood, access: Access) -> Result<Vec<(Role, Arc<File>)>> {
        let mut files = Vec::new();
        for reference in image.parsed.references() {
            if reference.role == Role::Backing {
                continue;
            }
            let file = self
                .data_file(image, reference.role, &reference.name.name, access)
                .map_err(|error| {
                    let error_of = match reference.role {
                        Role::Extent(_) => OpenError::ExtentFile,
                        _ => OpenError::DataFile,
                    };
                    Error::new(error.kind(), error_of(error))
                        .op("open")
                        .path(image.file.path())
                })?;
            files.push((reference.role, Arc::new(file)));
        }
        Ok(files)
    }

    fn data_file(&self, image: &Understood, role: Role, name: &str, access: Access) -> Result<File> {
        let extent = matches!(role, Role::Extent(_));
        let said = match self.seen.len() {
            ..=1 if !extent => self.request.spec.data_file.as_ref(),
            _ => None,
        };
        let (spec, file) = match said {
            Some(file) => (self.request.spec.clone(), file.clone()),
            None if extent => {
                let spec = self.permitted_path(beside(image.file.path(), name), name)?;
                let file = spec.file.clone();
                (spec, file)
            }
            None => {
                // QEMU takes the name of a data file as one its caller could have typed.
                let from = match self.request.policy {
                    References::Any => Path::new(""),
                    _ => image.file.path(),
                };
                let spec = self.permitted(from, name)?;
                let file = spec.file.clone();
                (spec, file)
            }
        };
        let opened = open_file(&file, access, &spec, self.request)?;
        if self.seen.contains(&opened.identity()) {
            let error = OpenError::DataFileIsImage(opened.path().display().to_string());
            return Err(Error::new(ErrorKind::Malformed, error)
                .op("open")
                .path(opened.path()));
        }
        if access == Access::Read && file.lock && !self.request.share {
            opened.relock(LockPlan::READ)?;
        }
        Ok(opened)
    }
}

impl Understood {
    fn node(&self, data: &[(Role, Arc<File>)]) -> Node {
        let name = |file: &File| Arc::from(file.path().to_string_lossy().as_ref());
        // Offsets in a disk of a package are not those of the package's file.
        let main = match self.part {
            Some(_) => Arc::from(self.shown.as_str()),
            None => name(&self.file),
        };
        let mut files = vec![main];
        files.extend(data.iter().map(|(_, file)| name(file)));
        files.extend(self.header.iter().map(|header| name(header)));
        Node {
            filename: Arc::from(self.shown.as_str()),
            files,
            id: self.file.identity(),
            facts: self.parsed.facts().clone(),
            probed: self.probed,
            looks_like: self.looks_like,
        }
    }
}

/// Whether `below` has the content that the image `above` was made for, where both keep count of that.
fn check_content(above: Option<&Node>, below: &Arc<dyn Layer>) -> Result<()> {
    let wanted = above.and_then(|node| node.facts.backing_content_id);
    match (wanted, below.content_id()) {
        (Some(wanted), Some(found)) if wanted != found => Err(Error::new(
            ErrorKind::Corrupt,
            OpenError::BackingChanged { wanted, found },
        )),
        _ => Ok(()),
    }
}

/// The path of an extent file, which is no name anybody types: nothing in it is a protocol.
fn beside(from: &Path, name: &str) -> PathBuf {
    match from.parent() {
        Some(dir) => dir.join(name),
        None => name.into(),
    }
}

/// Fails if `layer` is not the image that the one above it was made over.
pub(super) fn check_below(above: Option<&Node>, layer: &Arc<dyn Layer>, node: &Node) -> Result<()> {
    check_content(above, layer).and_then(|()| check_identity(above, node))
}

/// Says of an error with a backing image which images it kept from being opened: `above`, overlay first.
pub(super) fn in_chain(error: Error, above: &[Node]) -> Error {
    above.iter().rev().fold(error, |error, node| {
        let path = node
            .files
            .first()
            .map(|name| PathBuf::from(name.as_ref()))
            .unwrap_or_default();
        Error::new(error.kind(), OpenError::Backing(error))
            .op("open")
            .path(path)
    })
}
