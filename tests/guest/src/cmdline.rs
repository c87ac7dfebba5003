//! The parameters: `key=value` words of the kernel command line, and of the `rate` command.

/// What the guest was told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    pub tick_ms: u64,
    pub mem_mib: u64,
    pub dirty_mib_s: u64,
    pub verify_mib_s: u64,
    pub journal_ms: u64,
    pub journal_sectors: u64,
    pub seed: u64,
    /// Percent of the RAM that is left.
    pub fill: u64,
    /// Accepted for later: other processors stay parked.
    pub cpus: u64,
    pub power_off_on_fatal: bool,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            tick_ms: 10,
            mem_mib: 16,
            dirty_mib_s: 8,
            verify_mib_s: 64,
            journal_ms: 50,
            journal_sectors: 8192,
            seed: 1,
            fill: 0,
            cpus: 1,
            power_off_on_fatal: false,
        }
    }
}

/// Why a word of the command line was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    Unknown,
    Value,
}

impl Params {
    /// Takes each word; `refused` hears of those that were not taken.
    pub fn parse<'a>(cmdline: &'a str, mut refused: impl FnMut(&'a str, Refused)) -> Self {
        let mut params = Self::default();
        for word in cmdline.split_ascii_whitespace() {
            if let Err(why) = params.set(word) {
                refused(word, why);
            }
        }
        params
    }

    /// Takes one `key=value`; on an error nothing is changed.
    pub fn set(&mut self, word: &str) -> Result<(), Refused> {
        let (key, value) = word.split_once('=').ok_or(Refused::Unknown)?;
        if key == "on_fatal" {
            self.power_off_on_fatal = match value {
                "halt" => false,
                "poweroff" => true,
                _ => return Err(Refused::Value),
            };
            return Ok(());
        }
        let (field, range) = self.number(key).ok_or(Refused::Unknown)?;
        let number = parse_u64(value).filter(|n| range.contains(n)).ok_or(Refused::Value)?;
        *field = number;
        Ok(())
    }

    fn number(&mut self, key: &str) -> Option<(&mut u64, core::ops::RangeInclusive<u64>)> {
        const MINUTE_MS: u64 = 60_000;
        const MIB_MAX: u64 = 1 << 24;
        Some(match key {
            "tick_ms" => (&mut self.tick_ms, 1..=MINUTE_MS),
            "mem_mib" => (&mut self.mem_mib, 0..=MIB_MAX),
            "dirty_mib_s" => (&mut self.dirty_mib_s, 0..=MIB_MAX),
            "verify_mib_s" => (&mut self.verify_mib_s, 0..=MIB_MAX),
            "journal_ms" => (&mut self.journal_ms, 0..=MINUTE_MS),
            "journal_sectors" => (&mut self.journal_sectors, 1..=1 << 40),
            "seed" => (&mut self.seed, 0..=u64::MAX),
            "fill" => (&mut self.fill, 0..=100),
            "cpus" => (&mut self.cpus, 1..=1024),
            _ => return None,
        })
    }
}

fn parse_u64(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}
