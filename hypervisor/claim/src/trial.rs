//! A trial of the storage: whether what one host writes and locks is what another one reads and finds
//! locked.
//!
//! Marks and mount options say what a storage should be. A copy of it, or a mount whose locks stay on
//! its host, is found out only by two hosts that try.
//!
//! ```text
//! host A   begin: a new file, its word, flushed, locked                    end: unlocked
//! host B                                        look: the word, locked                look: not locked; removed
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use crate::ofd::{self, Mode};

/// What the names of trial files begin with.
const PREFIX: &str = "trial-";
/// A trial takes seconds: what is this old was left by hosts that died.
const LEFT_BEHIND: Duration = Duration::from_secs(3600);

/// Where the file of a trial is: beside the claims, on the same mount.
pub fn trial_path(storage: &Path, trial: Uuid) -> PathBuf {
    storage.join("claims").join(format!("{PREFIX}{trial}"))
}

/// A trial file that is locked until this is dropped or the process ends. It stays for the others to
/// look at: whoever is last removes it.
#[derive(Debug)]
pub struct Trial {
    _locked: File,
}

/// What a look at a trial file shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sight {
    pub word: Uuid,
    /// Somebody else holds its lock.
    pub locked: bool,
}

impl Trial {
    /// Makes the file, with `word` in it, durable, and locks it.
    ///
    /// # Errors
    /// Those of the storage. [`io::ErrorKind::WouldBlock`]: the new file is locked already.
    pub fn begin(path: &Path, word: Uuid) -> io::Result<Self> {
        let mut file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(word.as_bytes())?;
        file.sync_all()?;
        match ofd::try_lock(&file, Mode::Write)? {
            true => Ok(Self { _locked: file }),
            false => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

/// Looks at a trial file, and tries its lock for an instant.
pub fn look(path: &Path) -> io::Result<Sight> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let locked = !ofd::try_lock(&file, Mode::Write)?;
    let mut word = [0; 16];
    file.read_exact_at(&mut word, 0)?;
    Ok(Sight { word: Uuid::from_bytes(word), locked })
}

/// Removes the trial files of hosts that died in the middle. A file that cannot be removed, or is
/// removed by another host at this moment, takes up a block and no more.
pub fn sweep(storage: &Path, now: SystemTime) -> io::Result<()> {
    for entry in fs::read_dir(storage.join("claims"))? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let written = entry.metadata().and_then(|it| it.modified());
        let age = written.ok().and_then(|written| now.duration_since(written).ok());
        if age.is_some_and(|age| age > LEFT_BEHIND) {
            let _stays = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_open_file_sees_the_word_and_the_lock_until_it_ends() {
        let storage = tempfile::tempdir().unwrap();
        fs::create_dir(storage.path().join("claims")).unwrap();
        let (path, word) = (trial_path(storage.path(), Uuid::from_u128(1)), Uuid::from_u128(7));
        let trial = Trial::begin(&path, word).unwrap();
        assert_eq!(look(&path).unwrap(), Sight { word, locked: true });
        assert!(Trial::begin(&path, word).is_err(), "a trial has a file of its own");
        drop(trial);
        assert_eq!(look(&path).unwrap(), Sight { word, locked: false });
    }

    #[test]
    fn only_what_hosts_left_behind_is_swept() {
        let storage = tempfile::tempdir().unwrap();
        let claims = storage.path().join("claims");
        fs::create_dir(&claims).unwrap();
        let path = trial_path(storage.path(), Uuid::from_u128(1));
        drop(Trial::begin(&path, Uuid::nil()).unwrap());
        fs::write(claims.join("vm.claim"), b"").unwrap();
        sweep(storage.path(), SystemTime::now()).unwrap();
        assert!(path.exists());
        sweep(storage.path(), SystemTime::now() + 2 * LEFT_BEHIND).unwrap();
        assert!(!path.exists() && claims.join("vm.claim").exists());
    }
}
