//! The watchdog device.
//!
//! ```text
//!   (not open) --open--> armed --write, once per tick--> armed
//!                          |  \--- no write for Twd ---> the host is reset
//!                          |  \--- close, in any way --> still armed
//!                          \--- write `V`, close ------> (not open), unless it is *nowayout*
//! ```
//!
//! To open it is to arm it. So what it is gets looked up first, in sysfs.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bellwether_fencer_kernel::{get_timeout_s, set_timeout_s, support};
use rustix::fs::{OFlags, major, minor};
use serde::{Deserialize, Serialize};

/// What the kernel's own watchdog calls itself (`softdog`).
const SOFTWARE: &str = "Software Watchdog";
/// The number of `/dev/watchdog`, which is the same device as `/dev/watchdog0`.
const MISC: (u32, u32) = (10, 130);

/// What is known of a watchdog.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WatchdogFacts {
    pub device: PathBuf,
    pub identity: String,
    pub firmware_version: u32,
    /// Twd, as it was read back.
    pub timeout_ms: u64,
    /// Nothing can disarm it; `None` if the kernel does not say.
    pub nowayout: Option<bool>,
    /// It resets the host even when the kernel stands still.
    pub hardware: bool,
}

/// Why there is no watchdog.
#[derive(Debug, thiserror::Error)]
pub enum WatchdogError {
    #[error("{operation} watchdog `{}`: {source}", path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "there is no watchdog `{}`; load its module (for example iTCO_wdt, sp5100_tco, i6300esb, \
         ipmi_watchdog; `modprobe`, then /etc/modules-load.d), or set `watchdog = false` in fencer.toml",
        path.display()
    )]
    Absent { path: PathBuf },
    #[error("`{}` is no character device; set `watchdog_device` in fencer.toml", path.display())]
    NotADevice { path: PathBuf },
    #[error(
        "watchdog `{}` is in use; one process may have it: switch off RuntimeWatchdogSec of systemd \
         (/etc/systemd/system.conf), the watchdog daemon or sbd",
        path.display()
    )]
    Busy { path: PathBuf },
    #[error(
        "watchdog `{}` is the kernel's own ({identity}), which resets nothing when the kernel stands \
         still; load the module of a hardware watchdog, or set `software_watchdog = true` to have \
         it without a fence proof",
        path.display()
    )]
    Software { path: PathBuf, identity: String },
    #[error("watchdog `{}` says that its period is {seconds} s", path.display())]
    Senseless { path: PathBuf, seconds: i32 },
    #[error(
        "watchdog `{}` is nowayout: nothing disarms it before the next reset or boot of this host",
        path.display()
    )]
    NoWayOut { path: PathBuf },
}

/// An armed watchdog.
#[derive(Debug)]
pub struct Watchdog {
    file: File,
    facts: WatchdogFacts,
}

/// What sysfs says about a watchdog that nobody has opened.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Unopened {
    pub identity: Option<String>,
    pub nowayout: Option<bool>,
}

/// Looks a watchdog up without arming it.
pub fn look_up(path: &Path) -> Result<Unopened, WatchdogError> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(WatchdogError::Absent { path: path.into() });
        }
        Err(source) => {
            return Err(WatchdogError::Io { operation: "examine", path: path.into(), source });
        }
    };
    if !metadata.file_type().is_char_device() {
        return Err(WatchdogError::NotADevice { path: path.into() });
    }
    let number = (major(metadata.rdev()), minor(metadata.rdev()));
    let directory = match number == MISC {
        true => PathBuf::from("/sys/class/watchdog/watchdog0"),
        false => format!("/sys/dev/char/{}:{}", number.0, number.1).into(),
    };
    let attribute = |name: &str| std::fs::read_to_string(directory.join(name)).ok();
    Ok(Unopened {
        identity: attribute("identity").map(|text| text.trim().to_owned()),
        nowayout: attribute("nowayout").map(|text| text.trim() != "0"),
    })
}

impl Watchdog {
    /// Arms a watchdog with this period, or with the one that it chooses instead.
    pub fn arm(path: &Path, timeout_s: u32, software: bool) -> Result<Self, WatchdogError> {
        let unopened = look_up(path)?;
        if let Some(identity) = unopened.identity.filter(|it| it == SOFTWARE && !software) {
            return Err(WatchdogError::Software { path: path.into(), identity });
        }
        let failed = |operation| {
            move |source: io::Error| WatchdogError::Io { operation, path: path.into(), source }
        };
        let flags = i32::try_from(OFlags::CLOEXEC.bits()).unwrap_or(0);
        let file = match OpenOptions::new().write(true).custom_flags(flags).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                return Err(WatchdogError::Busy { path: path.into() });
            }
            Err(source) => return Err(failed("open")(source)),
        };
        let info = support(&file).map_err(failed("ask the identity of"))?;
        if info.can_set_timeout {
            let seconds = i32::try_from(timeout_s).unwrap_or(i32::MAX);
            set_timeout_s(&file, seconds).map_err(failed("set the period of"))?;
        }
        let seconds = get_timeout_s(&file).map_err(failed("read the period of"))?;
        let positive = u64::try_from(seconds).ok().filter(|seconds| *seconds > 0);
        let timeout_ms = positive
            .ok_or_else(|| WatchdogError::Senseless { path: path.into(), seconds })?
            .saturating_mul(1000);
        let facts = WatchdogFacts {
            device: path.into(),
            hardware: info.identity != SOFTWARE,
            identity: info.identity,
            firmware_version: info.firmware_version,
            timeout_ms,
            nowayout: unopened.nowayout,
        };
        Ok(Self { file, facts })
    }

    /// Over a file that is open already and takes the bytes of the protocol.
    pub fn over(file: File, facts: WatchdogFacts) -> Self {
        Self { file, facts }
    }

    pub fn facts(&self) -> &WatchdogFacts {
        &self.facts
    }

    /// Starts its period anew. Any byte but `V` does.
    pub fn pet(&self) -> Result<(), rustix::io::Errno> {
        rustix::io::write(&self.file, b".").map(drop)
    }

    /// Whether it can be disarmed at all.
    pub fn may_disarm(&self) -> Result<(), WatchdogError> {
        match self.facts.nowayout {
            Some(true) => Err(WatchdogError::NoWayOut { path: self.facts.device.clone() }),
            _ => Ok(()),
        }
    }

    /// Disarms it: the magic close. After an error it is armed still, and has to be petted.
    pub fn disarm(&self) -> Result<(), WatchdogError> {
        self.may_disarm()?;
        rustix::io::write(&self.file, b"V").map(drop).map_err(|error| {
            let path = self.facts.device.clone();
            WatchdogError::Io { operation: "disarm", path, source: error.into() }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_watchdog_is_never_opened_as_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let refused = Watchdog::arm(&file, 5, false).unwrap_err();
        assert!(matches!(refused, WatchdogError::NotADevice { .. }), "{refused}");
        let refused = Watchdog::arm(&dir.path().join("none"), 5, false).unwrap_err();
        assert!(refused.to_string().contains("modprobe"), "{refused}");
        let refused = Watchdog::arm(Path::new("/dev/null"), 5, false).unwrap_err();
        assert!(refused.to_string().starts_with("ask the identity of"), "{refused}");
    }
}
