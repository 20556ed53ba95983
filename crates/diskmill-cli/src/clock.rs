//! Times as `qemu-img` prints them.

/// A moment (seconds since 1970) in the user's time zone: `2026-11-22 19:45:05`.
pub fn local(seconds: u64) -> String {
    let Ok(seconds) = i64::try_from(seconds) else {
        return String::new();
    };
    let zone = zone();
    match tz::DateTime::from_timespec(seconds, 0, zone.as_ref()) {
        Ok(at) => format!(
            "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
            at.year(),
            at.month(),
            at.month_day(),
            at.hour(),
            at.minute(),
            at.second()
        ),
        Err(_) => String::new(),
    }
}

/// The time zone of `TZ` (a name or a rule), or without it the machine's. What cannot be read counts as UTC.
fn zone() -> tz::TimeZone {
    let zone = match std::env::var("TZ") {
        Ok(name) if name.is_empty() => return tz::TimeZone::utc(),
        Ok(name) => tz::TimeZone::from_posix_tz(&name),
        Err(_) => tz::TimeZone::local(),
    };
    zone.unwrap_or_else(|_| tz::TimeZone::utc())
}

/// How long a machine has run: `0001:02:03.004`.
pub fn machine(nanoseconds: u64) -> String {
    let millis = nanoseconds / 1_000_000;
    let seconds = millis / 1000;
    format!(
        "{:04}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        millis % 1000
    )
}

/// The time that files made now are to bear, in seconds since 1970: `SOURCE_DATE_EPOCH` if that is set, so that the
/// same inputs give the same bytes.
pub fn build_time() -> u64 {
    let said = std::env::var("SOURCE_DATE_EPOCH").ok();
    said.and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map(|since| since.as_secs()).unwrap_or(0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_time_counts_hours_without_days() {
        assert_eq!(machine(0), "0000:00:00.000");
        assert_eq!(machine(3_723_004_000_000), "0001:02:03.004");
        assert_eq!(machine(400_000 * 3_600_000_000_000), "400000:00:00.000");
    }
}
