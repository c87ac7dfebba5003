//! The words of a line, and values with their units.

pub type Result<T> = std::result::Result<T, String>;

/// A duration that does not end while a scenario lasts.
pub const FOREVER_MS: u64 = 1_000_000_000;

/// The words of one line, taken from left to right.
pub struct Words<'a> {
    words: Vec<&'a str>,
    at: usize,
}

impl<'a> Words<'a> {
    pub fn of(line: &'a str) -> Self {
        Self { words: line.split_whitespace().collect(), at: 0 }
    }

    pub fn peek(&self) -> Option<&'a str> {
        self.words.get(self.at).copied()
    }

    pub fn next(&mut self) -> Option<&'a str> {
        let word = self.peek();
        self.at += usize::from(word.is_some());
        word
    }

    /// The next word, or that it is missing.
    pub fn take(&mut self, what: &str) -> Result<&'a str> {
        self.next().ok_or_else(|| format!("the line ends where {what} is expected"))
    }

    /// Takes the next word if it is this one.
    pub fn eat(&mut self, word: &str) -> bool {
        let is_it = self.peek() == Some(word);
        self.at += usize::from(is_it);
        is_it
    }

    /// Takes a word that has to stand here.
    pub fn must(&mut self, word: &str) -> Result<()> {
        match self.eat(word) {
            true => Ok(()),
            false => match self.peek() {
                Some(other) => Err(format!("`{word}` is expected where `{other}` stands")),
                None => Err(format!("the line ends where `{word}` is expected")),
            },
        }
    }

    /// Everything that is left, as one text.
    pub fn rest(&mut self) -> String {
        let rest = self.words[self.at..].join(" ");
        self.at = self.words.len();
        rest
    }

    /// Nothing may be left.
    pub fn end(&self) -> Result<()> {
        match self.peek() {
            None => Ok(()),
            Some(word) => Err(format!("`{word}` is too much on this line; take it away")),
        }
    }

    /// The value behind an optional `for`; without it there is no end.
    pub fn lasting(&mut self) -> Result<u64> {
        match self.eat("for") {
            true => duration_ms(self.take("a duration")?),
            false => Ok(FOREVER_MS),
        }
    }
}

/// Milliseconds from `500ms`, `10s`, `10.5s`, `1m30s`, `2h`.
pub fn duration_ms(text: &str) -> Result<u64> {
    let bad = || format!("`{text}` is not a time; write it like 500ms, 10.5s, 1m30s or 2h");
    let (mut rest, mut total) = (text, 0_u64);
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?;
        let (number, after) = rest.split_at(end);
        let unit_end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, next) = after.split_at(unit_end);
        let factor = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            _ => return Err(bad()),
        };
        let part = decimal(number, factor).ok_or_else(bad)?;
        total = total.checked_add(part).ok_or_else(bad)?;
        rest = next;
    }
    match total {
        0 if text != "0s" => Err(bad()),
        total if total < FOREVER_MS => Ok(total),
        _ => Err(format!("`{text}` is longer than any scenario; at most 240h")),
    }
}

/// A number with up to three digits behind its point, times a factor.
fn decimal(text: &str, factor: u64) -> Option<u64> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    if part.len() > 3 || (part.is_empty() && text.contains('.')) {
        return None;
    }
    let mut thousandths: u64 = if part.is_empty() { 0 } else { part.parse().ok()? };
    for _ in part.len()..3 {
        thousandths *= 10;
    }
    let whole: u64 = whole.parse().ok()?;
    whole.checked_mul(factor)?.checked_add(thousandths.checked_mul(factor)? / 1_000)
}

/// How [`duration_ms`] reads it: `850ms`, `20s`, `10.5s`, `1m30s`.
pub fn duration(ms: u64) -> String {
    let (minutes, seconds, rest) = (ms / 60_000, ms % 60_000 / 1_000, ms % 1_000);
    let fraction = format!("{rest:03}");
    let fraction = fraction.trim_end_matches('0');
    match (minutes, seconds, rest) {
        (0, 0, 0) => "0s".to_owned(),
        (0, 0, _) => format!("{rest}ms"),
        (0, _, 0) => format!("{seconds}s"),
        (0, ..) => format!("{seconds}.{fraction}s"),
        (_, 0, 0) => format!("{minutes}m"),
        (_, _, 0) => format!("{minutes}m{seconds}s"),
        _ => format!("{minutes}m{seconds}.{fraction}s"),
    }
}

/// MiB from `512M`, `2G`, `1200MiB`.
pub fn memory_mib(text: &str) -> Result<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let bad = || format!("`{text}` is not a size; write it like 512M or 2G");
    let factor = match unit.to_ascii_lowercase().as_str() {
        "m" | "mib" => 1,
        "g" | "gib" => 1_024,
        "t" | "tib" => 1_048_576,
        _ => return Err(bad()),
    };
    let number: u64 = number.parse().map_err(|_| bad())?;
    number.checked_mul(factor).filter(|mib| *mib > 0).ok_or_else(bad)
}

/// How [`memory_mib`] reads it.
pub fn memory(mib: u64) -> String {
    match mib % 1_024 {
        0 => format!("{}G", mib / 1_024),
        _ => format!("{mib}M"),
    }
}

/// Thousandths from `5%` or `0.5%`.
pub fn permille(text: &str) -> Result<u32> {
    let bad = || format!("`{text}` is not a share; write it like 5% or 0.5%");
    let number = text.strip_suffix('%').ok_or_else(bad)?;
    let share = decimal(number, 10).filter(|share| *share <= 1_000).ok_or_else(bad)?;
    u32::try_from(share).map_err(|_| bad())
}

pub fn number<T: std::str::FromStr>(text: &str) -> Result<T> {
    text.parse().map_err(|_| format!("`{text}` is not a number that fits here"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_they_are_written() {
        for ms in [0, 1, 850, 1_000, 10_500, 20_000, 59_999, 60_000, 90_000, 61_250] {
            assert_eq!(duration_ms(&duration(ms)), Ok(ms), "{}", duration(ms));
        }
        assert_eq!(duration_ms("2h"), Ok(7_200_000));
        for bad in ["", "5", "s", "1x", "-1s", "1.s", "1.2345s", "0ms", "300h", "1s5"] {
            assert!(duration_ms(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_and_shares_have_units() {
        assert_eq!((memory_mib("2G"), memory_mib("512M")), (Ok(2_048), Ok(512)));
        assert_eq!((memory(2_048), memory(1_500)), ("2G".to_owned(), "1500M".to_owned()));
        assert_eq!((permille("5%"), permille("3.7%")), (Ok(50), Ok(37)));
        assert!(memory_mib("2").is_err() && memory_mib("0G").is_err() && permille("5").is_err());
        assert!(permille("101%").is_err());
    }
}
