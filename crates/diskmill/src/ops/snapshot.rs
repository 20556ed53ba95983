//! Internal snapshots: listing, making, applying and deleting them.

use std::time::{SystemTime, UNIX_EPOCH};

use diskmill_core::{Error, ErrorKind, NewSnapshot, Result, SnapshotFacts, Snapshots};

use crate::open::{self, ImageMut, OpenRequest, OpenWarning};

/// What to do with the snapshots of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// Keep the active state under this name.
    Create(String),
    /// Make the state of this snapshot, by id or else by name, the active one.
    Apply(String),
    /// Give up this snapshot, by id or else by name.
    Delete(String),
    /// Give up the first snapshot with this name; ids are not looked at.
    DeleteNamed(String),
}

/// The snapshots of an image, oldest first. Its backing image is not opened.
pub fn list(request: &OpenRequest) -> Result<Vec<SnapshotFacts>> {
    let mut request = request.clone();
    request.backing = false;
    let image = open::image(&request)?;
    let top = image.chain.layers().first();
    Ok(top
        .map(|layer| layer.facts().snapshots.clone())
        .unwrap_or_default())
}

/// Changes the snapshots of an image. Warnings of opening it go to `warn` before anything is changed.
///
/// An error of kind [`Unsupported`](ErrorKind::Unsupported) if the format has none, of kind
/// [`NotFound`](ErrorKind::NotFound) if there is no such snapshot; either with the operation "change snapshots".
pub fn change(request: &OpenRequest, action: &Action, warn: &mut dyn FnMut(&OpenWarning)) -> Result<()> {
    let image = open::image_mut(request)?;
    for warning in &image.warnings {
        warn(warning);
    }
    let done = snapshots_of(&image).and_then(|snapshots| match action {
        Action::Create(name) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let new = NewSnapshot::new(name, now.as_secs(), now.subsec_nanos());
            snapshots.create(&new).map(|_| ())
        }
        Action::Apply(which) => snapshots.apply(which),
        Action::Delete(which) => snapshots.delete(which),
        Action::DeleteNamed(name) => {
            let all = snapshots.list();
            let named = all.iter().find(|snapshot| snapshot.name == *name);
            let missing = || {
                Error::new(
                    ErrorKind::NotFound,
                    format!("there is no snapshot with name '{name}'"),
                )
            };
            snapshots.delete(&named.ok_or_else(missing)?.id)
        }
    });
    done.map_err(|error| error.op("change snapshots").path(request.spec.path()))
}

fn snapshots_of(image: &ImageMut) -> Result<&dyn Snapshots> {
    image.top.snapshots().ok_or_else(|| {
        let format = image.top.facts().format;
        Error::new(
            ErrorKind::Unsupported,
            format!("format '{format}' keeps no snapshots"),
        )
    })
}
