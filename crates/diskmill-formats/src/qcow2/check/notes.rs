//! What a part of a check found.

use diskmill_core::{CheckReport, Finding, FindingKind, GuestOffset, HostOffset};

/// Findings and counters of one worker, or of all of them.
#[derive(Debug, Default)]
pub(super) struct Notes {
    /// Counters only.
    pub(super) counters: CheckReport,
    findings: Vec<(u64, Finding)>,
    /// The item that is being looked at: findings are shown in the order of items.
    pub(super) item: u64,
}

impl Notes {
    /// Adds a finding that counts `count` times. The text is only made if it is kept.
    pub(super) fn find(
        &mut self,
        kind: FindingKind,
        count: u64,
        host: Option<HostOffset>,
        guest: Option<GuestOffset>,
        text: impl FnOnce() -> String,
    ) {
        let counter = match kind {
            FindingKind::Corruption => &mut self.counters.corruptions,
            FindingKind::Leak => &mut self.counters.leaks,
            FindingKind::Error => &mut self.counters.check_errors,
            _ => &mut 0,
        };
        *counter = counter.saturating_add(count);
        if self.findings.len() < CheckReport::KEPT {
            let finding = Finding {
                kind,
                text: text(),
                host,
                guest,
                fixed: false,
            };
            self.findings.push((self.item, finding));
        }
    }

    /// Adds a contradiction at `host` that counts `count` times.
    pub(super) fn corruption(
        &mut self,
        count: u64,
        host: HostOffset,
        guest: Option<GuestOffset>,
        text: impl FnOnce() -> String,
    ) {
        self.find(FindingKind::Corruption, count, Some(host), guest, text);
    }

    /// Whether nothing was found.
    pub(super) fn is_clean(&self) -> bool {
        self.counters.corruptions == 0 && self.counters.leaks == 0 && self.counters.check_errors == 0
    }

    /// Takes what several workers found, each in the order of its items.
    pub(super) fn absorb(&mut self, workers: impl IntoIterator<Item = Self>) {
        let mut found = Vec::new();
        for worker in workers {
            for (sum, more) in [
                (&mut self.counters.corruptions, worker.counters.corruptions),
                (&mut self.counters.leaks, worker.counters.leaks),
                (&mut self.counters.check_errors, worker.counters.check_errors),
                (
                    &mut self.counters.allocated_units,
                    worker.counters.allocated_units,
                ),
                (
                    &mut self.counters.fragmented_units,
                    worker.counters.fragmented_units,
                ),
                (
                    &mut self.counters.compressed_units,
                    worker.counters.compressed_units,
                ),
            ] {
                *sum = sum.saturating_add(more);
            }
            found.extend(worker.findings);
        }
        found.sort_by_key(|(item, _)| *item);
        let room = CheckReport::KEPT.saturating_sub(self.findings.len());
        self.findings.extend(found.into_iter().take(room));
    }

    /// Counters and findings.
    pub(super) fn into_report(self) -> CheckReport {
        let mut report = self.counters;
        report.findings = self.findings.into_iter().map(|(_, finding)| finding).collect();
        report
    }
}
