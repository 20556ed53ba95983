//! Whether the header makes sense. What is encrypted cannot be told from noise, so there is nothing else to look at.

use diskmill_core::{CheckReport, Finding, FindingKind, HostOffset, Result, SECTOR, Storage};

use crate::crypt::luks::Volume;

/// Looks the image in `main` over. Whatever breaks a rule of the header has kept it from being opened.
pub(super) fn run(volume: &Volume, main: &dyn Storage) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let header = volume.header();
    if !header.slots().iter().any(|slot| slot.is_active()) {
        let text = "no key slot is active: no passphrase opens the image";
        report.add(finding(FindingKind::Corruption, text, None), 1);
    }
    let len = main.len()?;
    if !len.is_multiple_of(SECTOR) {
        let text = "the last sector is cut short: it cannot be decrypted";
        report.add(finding(FindingKind::Note, text, Some(HostOffset::new(len))), 1);
    }
    report.image_end_offset = Some(HostOffset::new(len));
    Ok(report)
}

fn finding(kind: FindingKind, text: &str, host: Option<HostOffset>) -> Finding {
    Finding {
        kind,
        text: text.to_owned(),
        host,
        guest: None,
        fixed: false,
    }
}
