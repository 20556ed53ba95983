//! An image together with an image it is backed by, both to be changed.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskmill_core::{Chain, Error, ErrorKind, Layer, LayerMut, Result};

use super::chain::{Backing, Opener, check_below, in_chain};
use super::understand::Place;
use super::{Image, Node, OpenError, OpenRequest, OpenWarning, resolve_name};
use crate::spec::ImageSpec;

/// Which of the images that another one is backed by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Base {
    /// The one it names itself.
    #[default]
    Next,
    /// The first of this name. A relative name starts at the directory of the image that names it.
    Named(OsString),
}

impl Base {
    /// Whether it is `backing`, which the image in the file `from` names.
    fn is(&self, backing: &Backing, from: &Path) -> bool {
        let Self::Named(name) = self else {
            return true;
        };
        if ImageSpec::has_protocol(name) && backing.spec.text == *name {
            return true;
        }
        let wanted = resolve_name(from, name);
        let path = backing.spec.path();
        let real = |path: &Path| path.canonicalize().ok();
        wanted == path || real(path).is_some_and(|path| real(&wanted) == Some(path))
    }

    fn missing(&self, path: &Path) -> Error {
        let error = match self {
            Self::Next => OpenError::NoBacking,
            Self::Named(name) => OpenError::NotInChain {
                name: name.to_string_lossy().into_owned(),
                image: path.display().to_string(),
            },
        };
        Error::new(ErrorKind::Usage, error).path(path)
    }
}

/// A disk of which the top image and one further down are open for changing.
#[derive(Debug)]
#[non_exhaustive]
pub struct ChainMut {
    /// The image on top.
    pub top: Arc<dyn LayerMut>,
    /// It and all between it and the base, overlay first.
    pub upper: Chain,
    /// The image further down.
    pub base: Arc<dyn LayerMut>,
    /// What that is backed by.
    pub below: Chain,
    /// What is known of each layer, overlay first.
    pub nodes: Vec<Node>,
    /// What the user should be told.
    pub warnings: Vec<OpenWarning>,
}

/// Opens an image and, of those it is backed by, `base` for changing in place, and the others for reading.
pub fn chain_mut(request: &OpenRequest, base: &Base) -> Result<ChainMut> {
    Opener::new(request).chain_mut(base)
}

impl Opener<'_> {
    fn chain_mut(mut self, wanted: &Base) -> Result<ChainMut> {
        let path = self.request.spec.path();
        let mut opened = self.top_mut()?;
        let mut from: PathBuf = path.to_owned();
        let mut upper: Vec<Arc<dyn Layer>> = vec![opened.layer.clone()];
        let mut nodes = vec![opened.node];
        let mut next = opened.next.take();
        loop {
            let backing = next.ok_or_else(|| wanted.missing(path))?;
            if wanted.is(&backing, &from) {
                let base = self.understand_backing(&backing, Place::Base).and_then(|base| {
                    let next = self.backing_of(&base, &backing.spec)?;
                    let (layer, node) = self.attach_guarded(base, &mut opened.warnings)?;
                    let seen: Arc<dyn Layer> = layer.clone();
                    check_below(nodes.last(), &seen, &node)
                        .map_err(|error| error.op("open").path(backing.spec.path()))?;
                    Ok((layer, node, next))
                });
                let (base, node, next) = base.map_err(|error| in_chain(error, &nodes))?;
                nodes.push(node);
                let mut rest = Image {
                    chain: Chain::default(),
                    nodes,
                };
                self.open_below(next, &mut rest)?;
                return Ok(ChainMut {
                    top: opened.layer,
                    upper: Chain::new(upper),
                    base,
                    below: rest.chain,
                    nodes: rest.nodes,
                    warnings: opened.warnings,
                });
            }
            from = backing.spec.path().to_owned();
            let between = self.open_backing(&backing, nodes.last());
            let (layer, node, further) = between.map_err(|error| in_chain(error, &nodes))?;
            upper.push(layer);
            nodes.push(node);
            next = further;
        }
    }
}

/// What `name`, given by a user who stands in the working directory, is to [`Base::Named`]: the file of that name if
/// there is one.
pub fn base_from_here(name: &OsStr) -> Base {
    let here = Path::new(name).canonicalize();
    Base::Named(here.map_or_else(|_| name.to_owned(), PathBuf::into_os_string))
}
