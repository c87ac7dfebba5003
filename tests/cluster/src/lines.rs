//! What the test guest prints on its serial port, a line each.

/// One line of the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Line {
    Boot,
    Disk {
        records: u64,
        last: u64,
        bad: u64,
    },
    NoDisk,
    Tick {
        number: u64,
        ns: u64,
    },
    /// The record is on the disk: its flush was acknowledged.
    Journal(u64),
    Pattern {
        verified: u64,
    },
    Filled,
    FillVerified,
    IoError(String),
    Fatal(String),
    Exit(String),
    Other(String),
}

impl Line {
    pub fn parse(text: &str) -> Self {
        Self::recognise(text).unwrap_or_else(|| Self::Other(text.to_owned()))
    }

    fn recognise(text: &str) -> Option<Self> {
        let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
        Some(match word {
            "boot" => Self::Boot,
            "disk" if rest == "none" => Self::NoDisk,
            "disk" => Self::Disk {
                records: value(rest, "records")?.parse().ok()?,
                last: value(rest, "last")?.parse().unwrap_or(0),
                bad: value(rest, "bad")?.parse().ok()?,
            },
            "tick" => {
                let mut numbers = rest.split(' ');
                let number = numbers.next()?.parse().ok()?;
                let ns = numbers.next()?.parse().ok()?;
                // The third number says that all was well; without it the line is torn.
                (numbers.next()? == "1").then_some(Self::Tick { number, ns })?
            }
            "journal" => Self::Journal(rest.parse().ok()?),
            "pattern" => Self::Pattern { verified: value(rest, "verified")?.parse().ok()? },
            "filled" => Self::Filled,
            "verified" => Self::FillVerified,
            "ioerror" => Self::IoError(rest.to_owned()),
            "FATAL" => Self::Fatal(rest.to_owned()),
            "exit" => Self::Exit(rest.to_owned()),
            _ => return None,
        })
    }
}

fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_recognised() {
        for (text, line) in [
            ("boot bellwether-guest 0.1.0 mem_mib=64 clock=kvm cmdline=", Line::Boot),
            (
                "disk sectors=2048 ro=0 records=7 last=7 bad=0",
                Line::Disk { records: 7, last: 7, bad: 0 },
            ),
            (
                "disk sectors=2048 ro=0 records=0 last=none bad=1",
                Line::Disk { records: 0, last: 0, bad: 1 },
            ),
            ("disk none", Line::NoDisk),
            ("tick 12 3456 1", Line::Tick { number: 12, ns: 3456 }),
            ("tick 12 3456", Line::Other("tick 12 3456".into())),
            ("journal 9", Line::Journal(9)),
            ("pattern pages=2048 generation=3 verified=4096", Line::Pattern { verified: 4096 }),
            ("FATAL memory address=0x1", Line::Fatal("memory address=0x1".into())),
            ("exit poweroff", Line::Exit("poweroff".into())),
        ] {
            assert_eq!(Line::parse(text), line, "{text}");
        }
    }
}
