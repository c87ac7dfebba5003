//! Values as people type them: sizes, durations, disks, endpoints.

use std::path::PathBuf;
use std::time::Duration;

use bellwether_types::{Arbiter, DiskFormat, DiskSpec, Failback, PreCopy, RestartPolicy, Strength};

/// Guest memory in MiB from `256M`, `1G`, `1200MiB`.
///
/// The unit is required and binary: a bare number would be taken for bytes by one reader and for
/// MiB by the next.
pub fn memory_mib(text: &str) -> Result<u64, String> {
    let (number, unit) = split_unit(text);
    let number: u64 =
        number.parse().map_err(|_| format!("`{text}` is not a size; write it like 256M or 1G"))?;
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "m" | "mib" => 1,
        "g" | "gib" => 1024,
        "t" | "tib" => 1024 * 1024,
        "" => return Err(format!("`{text}` has no unit; write {number}M or {number}G")),
        "mb" | "gb" | "tb" => {
            return Err(format!("`{text}`: sizes are binary here; write MiB, GiB or TiB"));
        }
        _ => return Err(format!("`{text}`: memory comes in whole MiB; write it like 256M or 1G")),
    };
    match number.checked_mul(factor) {
        Some(0) => Err("a VM needs memory; 0 is none".into()),
        Some(mib) => Ok(mib),
        None => Err(format!("`{text}` is too large")),
    }
}

/// A duration from `500ms`, `30s`, `10m`, `1h`, `2d`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("`{text}` is not a duration; write it like 500ms, 30s, 10m or 1h");
    let (number, unit) = split_unit(text);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let millis: u64 = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(bad()),
    };
    match number.checked_mul(millis) {
        Some(0) => Err(format!("`{text}`: a duration of 0 means nothing here")),
        // Clocks cannot count for ever, and nobody waits for more than ten years.
        Some(total) if total <= 3650 * 86_400_000 => Ok(Duration::from_millis(total)),
        _ => Err(format!("`{text}` is too long; at most 3650d")),
    }
}

fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

/// A disk from `path=/srv/web.raw,format=raw[,readonly]`.
pub fn disk(text: &str) -> Result<DiskSpec, String> {
    let (mut path, mut format, mut read_only) = (None, None, false);
    for part in text.split(',') {
        match part.split_once('=').map_or((part, None), |(key, value)| (key, Some(value))) {
            ("path", Some(value)) if path.is_none() => path = Some(PathBuf::from(value)),
            ("format", Some(value)) if format.is_none() => format = Some(disk_format(value)?),
            ("readonly", None) if !read_only => read_only = true,
            ("path" | "format" | "readonly", _) => {
                return Err(format!("`{part}` is given twice or has the wrong form; {DISK_FORM}"));
            }
            (other, _) => {
                return Err(format!("`{other}` is not a property of a disk; {DISK_FORM}"));
            }
        }
    }
    let path = path.ok_or_else(|| format!("the path is missing; {DISK_FORM}"))?;
    if !path.is_absolute() {
        return Err(format!(
            "the path `{}` is not absolute; the VM may run on any node, so give the path there",
            path.display()
        ));
    }
    let format = format.ok_or_else(|| {
        format!("the format is missing, and formats are never guessed; {DISK_FORM}")
    })?;
    Ok(DiskSpec { path, format, read_only })
}

const DISK_FORM: &str = "write path=/srv/web.raw,format=raw[,readonly]";

/// The word for a disk's format.
pub fn disk_format(word: &str) -> Result<DiskFormat, String> {
    match word {
        "raw" => Ok(DiskFormat::Raw),
        other => {
            Err(format!("the format `{other}` is not known; the only one of this release is raw"))
        }
    }
}

/// What happens to a VM whose node fails.
pub fn restart_policy(word: &str) -> Result<RestartPolicy, String> {
    match word {
        "restart" => Ok(RestartPolicy::Restart),
        "never" => Ok(RestartPolicy::Never),
        _ => Err(format!("`{word}` is not a policy; give restart or never")),
    }
}

/// Who decides whether a VM goes on where its node has lost its lease.
pub fn arbiter(word: &str) -> Result<Arbiter, String> {
    Arbiter::from_word(word)
        .ok_or_else(|| format!("`{word}` is not an arbiter; give storage or lease"))
}

/// When a VM goes back to a node that it prefers.
pub fn failback(word: &str) -> Result<Failback, String> {
    Failback::from_word(word).ok_or_else(|| {
        format!(
            "`{word}` is no time to go back; give never, immediately, or hours in UTC like 22-6"
        )
    })
}

/// What follows when memory changes faster than it is written.
pub fn pre_copy(word: &str) -> Result<PreCopy, String> {
    PreCopy::from_word(word)
        .ok_or_else(|| format!("`{word}` is no way to pre-copy; give finish, give-up or never"))
}

/// A group and how it is kept apart, from `web:hard`, or `none`.
pub fn apart(text: &str) -> Result<(String, String), String> {
    if text == "none" {
        return Ok((text.to_owned(), String::new()));
    }
    let strength = |word| Strength::from_word(word).map(|strength| strength.as_str().to_owned());
    let (group, word) = text.split_once(':').unwrap_or((text, ""));
    match (group, strength(word)) {
        ("", _) | (_, None) => {
            Err(format!("`{text}`: write the group and how, like web:hard or web:soft"))
        }
        (group, Some(strength)) => Ok((group.to_owned(), strength)),
    }
}

/// A number of restarts in a time, from `3/10m`, or `none`.
pub fn restarts(text: &str) -> Result<(u32, Duration), String> {
    if text == "none" {
        return Ok((0, Duration::ZERO));
    }
    let bad = || format!("`{text}` is no limit; write it like 3/10m, or none");
    let (times, period) = text.split_once('/').ok_or_else(bad)?;
    match times.parse() {
        Ok(0) | Err(_) => Err(bad()),
        Ok(times) => Ok((times, duration(period)?)),
    }
}

/// A port that can be listened on.
pub fn port(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err(format!("`{text}` is not a port; give a number from 1 to 65535")),
        Ok(port) => Ok(port),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_need_a_binary_unit_and_some_memory() {
        for (text, mib) in [
            ("256M", 256),
            ("1G", 1024),
            ("1200MiB", 1200),
            ("2gib", 2048),
            ("1T", 1_048_576),
            ("512 M", 512),
        ] {
            assert_eq!(memory_mib(text), Ok(mib), "{text}");
        }
        for (text, word) in [
            ("0", "no unit"),
            ("0M", "needs memory"),
            ("3", "no unit"),
            ("3B", "whole MiB"),
            ("3 bytes", "whole MiB"),
            ("1GB", "binary"),
            ("512K", "whole MiB"),
            ("", "not a size"),
            ("-1G", "not a size"),
            ("1.5G", "whole MiB"),
            ("99999999999999999999G", "not a size"),
            ("18446744073709551615T", "too large"),
        ] {
            let error = memory_mib(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("1h"), Ok(Duration::from_secs(3600)));
        for bad in ["", "5", "0s", "s", "1w", "-1s", "3651d", "18446744073709551615d"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rules_are_written_as_people_say_them() {
        assert_eq!(restarts("3/10m"), Ok((3, Duration::from_secs(600))));
        assert_eq!(restarts("none"), Ok((0, Duration::ZERO)));
        assert_eq!(apart("web:hard"), Ok(("web".into(), "hard".into())));
        for bad in ["3", "0/10m", "x/10m", "3/10", "3/"] {
            assert!(restarts(bad).is_err(), "{bad}");
        }
        for bad in ["", "web", "web:", "web:firm", ":hard"] {
            assert!(apart(bad).is_err(), "{bad}");
        }
        assert!(failback("25-3").unwrap_err().contains("22-6"));
    }

    #[test]
    fn disks_have_a_path_and_a_format() {
        let parsed = disk("path=/srv/a=b.raw,format=raw").unwrap();
        assert_eq!(parsed.path, PathBuf::from("/srv/a=b.raw"));
        assert!(!parsed.read_only);
        assert!(disk("format=raw,readonly,path=/d").unwrap().read_only);
        for (text, word) in [
            ("", "not a property"),
            ("/srv/a.raw", "not a property"),
            ("path=/a", "never guessed"),
            ("format=raw", "path is missing"),
            ("path=a,format=raw", "not absolute"),
            ("path=/a,format=qcow2", "qcow2"),
            ("path=/a,path=/b,format=raw", "twice"),
            ("path=/a,format=raw,readonly=yes", "wrong form"),
            ("path=/a,format=raw,cache=x", "cache"),
        ] {
            let error = disk(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
