//! The descriptor of a new disk.

use std::fmt::Write as _;

use diskmill_core::SECTOR;

use crate::vmdk::descriptor::NO_PARENT;
use crate::vmdk::options::Plan;

/// Cylinders that VMware counts at most, and the heads it takes, for a controller.
const fn limits(adapter: &str) -> (u64, u64) {
    match adapter.as_bytes() {
        b"ide" => (16_383, 16),
        _ => (65_535, 255),
    }
}

/// Sectors of a track.
const TRACK: u64 = 63;

/// The cylinders of a disk of `size` bytes on a controller.
pub(in crate::vmdk) fn cylinders(size: u64, adapter: &str) -> u64 {
    let (most, heads) = limits(adapter);
    let cylinder = TRACK.saturating_mul(heads).saturating_mul(SECTOR);
    size.checked_div(cylinder).unwrap_or(0).min(most)
}

/// The text. Some readers want a comment right before the extents, and no empty line among them; libvmdk wants the one
/// before the disk data base.
pub(super) fn render(plan: &Plan) -> String {
    let mut text = String::from("# Disk DescriptorFile\nversion=1\n");
    let ascii = plan.extents.iter().all(|extent| extent.name.is_ascii())
        && plan.parent.as_ref().is_none_or(|parent| parent.name.is_ascii());
    // A String takes whatever is written to it.
    if !ascii {
        text.push_str("encoding=\"UTF-8\"\n");
    }
    let parent = plan.parent.as_ref().map_or(NO_PARENT, |parent| parent.cid);
    let _ = writeln!(text, "CID={:08x}\nparentCID={parent:08x}", plan.cid);
    let _ = writeln!(text, "createType=\"{}\"", plan.subformat.name());
    if let Some(parent) = &plan.parent {
        let _ = writeln!(text, "parentFileNameHint=\"{}\"", parent.name);
    }
    text.push_str("\n# Extent description\n");
    for extent in &plan.extents {
        let sectors = extent.len / SECTOR;
        let _ = if plan.subformat.is_flat() {
            writeln!(text, "RW {sectors} FLAT \"{}\" 0", extent.name)
        } else {
            writeln!(text, "RW {sectors} SPARSE \"{}\"", extent.name)
        };
    }
    let (_, heads) = limits(plan.adapter);
    let _ = writeln!(
        text,
        "\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"{}\"\nddb.geometry.cylinders = \"{}\"\n\
         ddb.geometry.heads = \"{heads}\"\nddb.geometry.sectors = \"{TRACK}\"\nddb.adapterType = \"{}\"\n\
         ddb.toolsVersion = \"{}\"",
        plan.hardware,
        cylinders(plan.size, plan.adapter),
        plan.adapter,
        plan.tools,
    );
    text
}
