//! How much space a new disk would take.

use diskmill_core::{CreateSpec, DataRuns, Measure, Result, SECTOR};

use super::create::{Front, TEXT_SECTORS};
use super::options::{GRAIN, Plan, Subformat};

/// See [`Driver::measure`](diskmill_core::Driver::measure). Of a stream nobody knows how well it will compress: what is
/// said is enough in any case.
pub(super) fn measure(spec: &CreateSpec, data: Option<&mut dyn DataRuns>) -> Result<Measure> {
    let plan = Plan::new(spec)?;
    let text = 1024_u64;
    if plan.subformat.is_flat() {
        let size = plan.size.saturating_add(text);
        return Ok(Measure {
            required: size,
            fully_allocated: size,
            bitmaps: None,
        });
    }
    let mut tables = 0_u64;
    for extent in &plan.extents {
        tables = tables.saturating_add(Front::new(TEXT_SECTORS.saturating_add(1), extent.len)?.overhead);
    }
    let tables = tables.saturating_mul(SECTOR).saturating_add(text);
    let grain = match plan.subformat {
        Subformat::StreamOptimized => GRAIN.saturating_add(SECTOR),
        _ => GRAIN,
    };
    let grains = match data {
        Some(data) => count(data)?,
        None => 0,
    };
    let bytes = |grains: u64| tables.saturating_add(grains.saturating_mul(grain));
    Ok(Measure {
        required: bytes(grains),
        fully_allocated: bytes(plan.size.div_ceil(GRAIN)),
        bitmaps: None,
    })
}

/// Grains that have some data.
fn count(data: &mut dyn DataRuns) -> Result<u64> {
    let mut grains = 0_u64;
    let mut seen = 0;
    while let Some(run) = data.next_run()? {
        let (first, end) = (run.start.get() / GRAIN, run.end.get().div_ceil(GRAIN));
        grains = grains.saturating_add(end.saturating_sub(first.max(seen)));
        seen = seen.max(end);
    }
    Ok(grains)
}
