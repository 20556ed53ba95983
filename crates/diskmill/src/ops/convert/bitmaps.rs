//! Copying dirty bitmaps along with the disk.

use diskmill_core::{
    BitmapError, BitmapFacts, Error, ErrorKind, Format, Job, Layer, LayerMut, NewBitmap, Result,
};

use super::{ConvertError, Output, Plan};

/// A dirty bitmap that could not be copied. The source of an [`Error`] from [`run`](super::run).
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} dirty bitmap '{name}'")]
#[non_exhaustive]
pub struct BitmapNotCopied {
    /// What was being done: "create" or "populate".
    pub what: &'static str,
    /// The bitmap.
    pub name: String,
    /// Why.
    #[source]
    pub source: Error,
}

/// Refuses what can be told before anything is written, and warns of what is left out.
pub(super) fn check(plan: &Plan, layer: &dyn Layer, job: Job<'_>) -> Result<()> {
    if !plan.bitmaps {
        return Ok(());
    }
    if plan.inputs.len() > 1 {
        return Err(ConvertError::BitmapsOfSeveral.usage());
    }
    let bitmaps = layer
        .facts()
        .bitmaps
        .as_ref()
        .ok_or_else(|| ConvertError::NoBitmaps.unsupported())?;
    // Last first, as QEMU looks at them.
    for bitmap in bitmaps.iter().rev().filter(|bitmap| bitmap.inconsistent) {
        if !plan.skip_broken_bitmaps {
            return Err(ConvertError::BrokenBitmap(bitmap.name.clone()).unsupported());
        }
        job.observer
            .warn(&format!("Skipping inconsistent bitmap '{}'", bitmap.name));
    }
    let format = match &plan.output {
        Output::New(image) => Some(image.format.as_str()),
        Output::Stdout => Some(Format::Raw.name()),
        Output::Existing(_) => None,
    };
    if let Some(format) = format
        && format != Format::Qcow2.name()
    {
        return Err(ConvertError::TargetKeepsNoBitmaps(format.to_owned()).unsupported());
    }
    Ok(())
}

/// Makes the sound bitmaps of `layer`, the top of the source, in `target` too, if that is asked for.
pub(super) fn copy(plan: &Plan, layer: &dyn Layer, target: &dyn LayerMut) -> Result<()> {
    if !plan.bitmaps {
        return Ok(());
    }
    let sound = |bitmap: &&BitmapFacts| !bitmap.inconsistent;
    let bitmaps: Vec<&BitmapFacts> = layer.facts().bitmaps.iter().flatten().filter(sound).collect();
    let format = target.facts().format.name();
    let keeper = match target.bitmaps() {
        Some(keeper) if target.facts().bitmaps.is_some() => keeper,
        _ => return Err(ConvertError::TargetKeepsNoBitmaps(format.to_owned()).unsupported()),
    };
    let known = keeper.list();
    if let Some(twice) = bitmaps
        .iter()
        .rev()
        .find(|bitmap| known.iter().any(|known| known.name == bitmap.name))
    {
        let error = BitmapError::Exists(twice.name.clone());
        return Err(failed("create", &twice.name, Error::new(ErrorKind::Usage, error)));
    }
    if let Some(last) = bitmaps.last()
        && target.virtual_size() != layer.dirty(&last.name)?.disk_size()
    {
        let sizes = BitmapError::Sizes {
            to: target.virtual_size(),
            from: layer.dirty(&last.name)?.disk_size(),
        };
        return Err(failed(
            "populate",
            &last.name,
            Error::new(ErrorKind::Usage, sizes),
        ));
    }
    for bitmap in bitmaps {
        let new = NewBitmap {
            name: bitmap.name.clone(),
            granularity: Some(bitmap.granularity),
            enabled: bitmap.enabled,
        };
        keeper
            .add(&new)
            .map_err(|error| failed("create", &bitmap.name, error))?;
        layer
            .dirty(&bitmap.name)
            .and_then(|mut runs| keeper.merge(&bitmap.name, &mut *runs))
            .map_err(|error| failed("populate", &bitmap.name, error))?;
    }
    Ok(())
}

fn failed(what: &'static str, name: &str, source: Error) -> Error {
    let kind = source.kind();
    let name = name.to_owned();
    Error::new(kind, BitmapNotCopied { what, name, source })
}
