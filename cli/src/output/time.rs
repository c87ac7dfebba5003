//! Points in time and durations as people read them.

use std::time::{SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// Milliseconds since 1970 on this machine's clock.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// `12 s ago`, `3 min ago`. A clock that is behind the cluster's reads as `now`.
pub fn ago(at_ms: u64, now_ms: u64) -> String {
    match now_ms.saturating_sub(at_ms) {
        0..1000 => "now".to_owned(),
        passed => format!("{} ago", coarse(passed)),
    }
}

/// A duration in its largest unit.
pub fn coarse(ms: u64) -> String {
    match ms / 1000 {
        0 => format!("{ms} ms"),
        s @ 1..120 => format!("{s} s"),
        s @ 120..7200 => format!("{} min", s / 60),
        s @ 7200..172_800 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86_400),
    }
}

/// A measured duration, with the digits that tell something: `18.2 ms`, `1.30 s`.
pub fn duration_us(us: u64) -> String {
    match us {
        0..1000 => format!("{us} us"),
        1000..1_000_000 => format!("{}.{} ms", us / 1000, us % 1000 / 100),
        _ => format!("{}.{:02} s", us / 1_000_000, us % 1_000_000 / 10_000),
    }
}

/// A point in time in the local time zone.
pub fn local(at_ms: u64) -> String {
    let point = i64::try_from(at_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    match point {
        Some(point) => point.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        None => format!("{at_ms} ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        assert_eq!(ago(5_000, 5_400), "now");
        assert_eq!(ago(9_000, 5_000), "now");
        assert_eq!(ago(0, 12_345), "12 s ago");
        assert_eq!(ago(0, 200_000), "3 min ago");
        assert_eq!(coarse(9_000_000), "2 h");
        assert_eq!(coarse(400_000_000), "4 d");
        assert_eq!(duration_us(730), "730 us");
        assert_eq!(duration_us(18_260), "18.2 ms");
        assert_eq!(duration_us(1_305_000), "1.30 s");
        assert_eq!(local(u64::MAX), format!("{} ms", u64::MAX));
    }
}
