//! New disks, filled in guest order.

mod flat;
mod sparse;
mod stream;
mod text;

use std::ops::Range;
use std::sync::Arc;

use diskmill_core::{
    Builder, CreateSpec, Durability, Error, ErrorKind, FilesMut, Finish, Format, GuestOffset, HostOffset,
    OutputName, OutputSpec, Result, Role, StorageMut,
};

use super::options::{Plan, Subformat};
pub(super) use sparse::{Front, TEXT_SECTORS, full};
pub(super) use text::cylinders;

/// See [`Driver::outputs`](diskmill_core::Driver::outputs).
pub(super) fn outputs(spec: &CreateSpec) -> Result<Vec<OutputSpec>> {
    let plan = Plan::new(spec)?;
    let mut main = OutputSpec::main();
    main.nocow = plan.nocow;
    main.extent_size_hint = plan.extent_size_hint;
    let mut outputs = vec![main];
    if !plan.subformat.is_one_file() {
        for (index, extent) in plan.extents.iter().enumerate() {
            let mut output = OutputSpec::main();
            output.role = Role::Extent(u16::try_from(index).unwrap_or(u16::MAX));
            output.name = OutputName::Beside(extent.name.clone());
            output.nocow = plan.nocow;
            output.extent_size_hint = plan.extent_size_hint;
            outputs.push(output);
        }
    }
    Ok(outputs)
}

/// See [`Driver::build`](diskmill_core::Driver::build).
pub(super) fn build(spec: &CreateSpec, files: FilesMut) -> Result<Box<dyn Builder>> {
    let plan = Plan::new(spec)?;
    let files: Vec<_> = files.into_iter().map(|(_, file)| file).collect();
    let expected = match plan.subformat.is_one_file() {
        true => 1,
        false => plan.extents.len().saturating_add(1),
    };
    if files.len() != expected {
        let text = format!("this vmdk image has {expected} files, got {}", files.len());
        return Err(Error::new(ErrorKind::Usage, text).format(Format::Vmdk));
    }
    if plan.subformat == Subformat::StreamOptimized {
        return Ok(Box::new(stream::StreamBuilder::new(plan, files)?));
    }
    if files.iter().any(|file| file.hints().append_only) {
        let text = "only the subformat streamOptimized can be written to a pipe";
        return Err(Error::new(ErrorKind::Unsupported, text).format(Format::Vmdk));
    }
    if plan.subformat.is_flat() {
        return Ok(Box::new(flat::FlatBuilder::new(plan, files)?));
    }
    Ok(Box::new(sparse::SparseBuilder::new(plan, files)?))
}

/// All guest bytes below are placed: every byte once, in rising order.
#[derive(Debug, Default)]
struct Placed(GuestOffset);

impl Placed {
    /// Moves on over `range`, if it is the next and starts at a multiple of `unit`.
    fn advance(&mut self, range: &Range<GuestOffset>, unit: u64) -> Result<()> {
        if range.start != self.0 || range.end < range.start || !range.start.is_aligned(unit) {
            let text = format!(
                "bytes {} to {} are placed, must start at {} and at a multiple of {unit}",
                range.start, range.end, self.0
            );
            return Err(Error::new(ErrorKind::Usage, text).format(Format::Vmdk));
        }
        self.0 = range.end;
        Ok(())
    }
}

/// Writes the descriptor into a file of its own, when all it names is there.
fn write_text(plan: &Plan, main: &Arc<dyn StorageMut>) -> Result<()> {
    let text = text::render(plan);
    if main.hints().fixed_len {
        let text = "a descriptor in a file of its own cannot be written to a device";
        return Err(Error::new(ErrorKind::Unsupported, text).format(Format::Vmdk));
    }
    main.write_at(HostOffset::ZERO, text.as_bytes())
}

fn sync_all(files: &[Arc<dyn StorageMut>], end: Finish) -> Result<()> {
    if end.durability == Durability::Synced {
        for file in files {
            file.sync()?;
        }
    }
    Ok(())
}
