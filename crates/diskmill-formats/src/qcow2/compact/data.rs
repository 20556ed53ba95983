//! Holes in an external data file.

use std::ops::Range;

use diskmill_core::Result;

use super::super::header::Autoclear;
use super::super::map::ClusterKind;
use super::work::Work;
use crate::sparse;

impl Work<'_> {
    /// Gives the host back what an external data file holds of zeros, and of clusters that nothing refers to.
    pub(super) fn sweep_data(&mut self) -> Result<()> {
        let Some(data) = self.data.clone() else {
            return Ok(());
        };
        let len = data.len()?;
        let mut punched = 0;
        let mut next = 0;
        for mapped in self.mapped(len)? {
            punched += sparse::punch_all(data.as_ref(), next..mapped.start, self.dry, self.job)?;
            next = mapped.end;
            punched += sparse::punch_zeros(data.as_ref(), mapped, self.dry, self.job)?;
        }
        punched += sparse::punch_all(data.as_ref(), next..len, self.dry, self.job)?;
        self.report.punched = self.report.punched.saturating_add(punched);
        if !self.dry {
            data.sync()?;
        }
        Ok(())
    }

    /// The parts of the data file, which has `len` bytes, that something refers to. Only images without snapshots have
    /// one: their tables come in guest order, each once.
    fn mapped(&mut self, len: u64) -> Result<Vec<Range<u64>>> {
        let whole = 0..len;
        if self.header.autoclear.has(Autoclear::RAW_DATA_FILE) {
            return Ok(vec![whole]);
        }
        let mut mapped: Vec<Range<u64>> = Vec::new();
        let mut entries = Vec::new();
        for (number, table) in self.l2_tables()? {
            let guest = self.geometry.l1_start(number).get();
            self.read_l2(table, &mut entries)?;
            for (index, entry) in entries.drain(..) {
                if !matches!(entry.word.kind(self.geometry)?, ClusterKind::Normal(_)) {
                    continue;
                }
                let at = guest.saturating_add(index << self.bits()).min(len);
                let end = at.saturating_add(self.cluster()).min(len);
                match mapped.last_mut() {
                    Some(last) if last.end == at => last.end = end,
                    _ if at < end => mapped.push(at..end),
                    _ => {}
                }
            }
        }
        Ok(mapped)
    }
}
