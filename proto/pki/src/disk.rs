//! How certificates and keys lie on disk: each file whole or not at all, keys for their owner only.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use zeroize::Zeroizing;

use crate::files::FilesError;
use crate::identity::PeerError;

pub(crate) const CA_CERT: &str = "ca.pem";
pub(crate) const CA_KEY: &str = "ca-key.pem";
pub(crate) const CERT: &str = "cert.pem";
pub(crate) const KEY: &str = "key.pem";

/// No file of ours has more; a device or a log file given by mistake must not fill the memory.
const FILE_LEN_MAX: u64 = 64 * 1024;

/// Makes the directory, closed to others. One that exists keeps its mode: it may be an
/// administrator's, and the keys are guarded by their own modes.
pub(crate) fn ensure_dir(dir: &Path) -> Result<(), FilesError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|source| FilesError::io("create the directory", dir, source))
}

pub(crate) fn exists(dir: &Path, name: &str) -> bool {
    dir.join(name).symlink_metadata().is_ok()
}

/// Reads a file that anybody may read.
pub(crate) fn read_text(dir: &Path, name: &'static str) -> Result<String, FilesError> {
    let (file, _) = open(dir, name)?;
    Ok(std::mem::take(&mut *read_bounded(dir, name, file)?))
}

/// Reads a key, and refuses one that anybody but its owner could have read.
pub(crate) fn read_secret(dir: &Path, name: &'static str) -> Result<Zeroizing<String>, FilesError> {
    let (file, mode) = open(dir, name)?;
    if mode & 0o077 != 0 {
        return Err(FilesError::Permissions { path: dir.join(name), mode: mode & 0o777 });
    }
    read_bounded(dir, name, file)
}

fn open(dir: &Path, name: &str) -> Result<(File, u32), FilesError> {
    let path = dir.join(name);
    let file = File::open(&path).map_err(|source| match source.kind() {
        ErrorKind::NotFound => FilesError::Missing { path: path.clone() },
        _ => FilesError::io("open", &path, source),
    })?;
    // The open file is asked, not the path: the path may mean another file by now.
    let meta = file.metadata().map_err(|source| FilesError::io("examine", &path, source))?;
    Ok((file, meta.mode()))
}

fn read_bounded(dir: &Path, name: &str, file: File) -> Result<Zeroizing<String>, FilesError> {
    let path = dir.join(name);
    // The room is reserved at once, because growing would leave copies of a key behind.
    let mut text = Zeroizing::new(String::with_capacity(8 * 1024));
    file.take(FILE_LEN_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|source| FilesError::io("read", &path, source))?;
    if text.len() as u64 > FILE_LEN_MAX {
        return Err(FilesError::TooLong { path });
    }
    Ok(text)
}

/// Refuses to replace a file by one with other contents.
pub(crate) fn refuse_other(
    dir: &Path,
    name: &'static str,
    contents: &str,
) -> Result<(), FilesError> {
    match read_text(dir, name) {
        Err(FilesError::Missing { .. }) => Ok(()),
        Ok(there) if there.trim() == contents.trim() => Ok(()),
        Ok(_) => Err(FilesError::AlreadyThere { path: dir.join(name) }),
        Err(other) => Err(other),
    }
}

pub(crate) fn write_public(dir: &Path, name: &str, contents: &str) -> Result<(), FilesError> {
    write_atomic(dir, name, contents.as_bytes(), 0o644)
}

pub(crate) fn write_secret(dir: &Path, name: &str, contents: &str) -> Result<(), FilesError> {
    write_atomic(dir, name, contents.as_bytes(), 0o600)
}

/// Temporary file, fsync, rename, fsync of the directory: after a power cut the name means the old
/// file or the new one, never a part of one.
fn write_atomic(dir: &Path, name: &str, contents: &[u8], mode: u32) -> Result<(), FilesError> {
    let target = dir.join(name);
    // One fixed name, so that crashes leave at most one such file, which the next attempt removes.
    let tmp = dir.join(format!(".{name}.tmp"));
    if let Err(source) = std::fs::remove_file(&tmp)
        && source.kind() != ErrorKind::NotFound
    {
        return Err(FilesError::io("remove", &tmp, source));
    }
    let fail = |source| {
        // The first error is the one to report; a file that stays is removed by the next attempt.
        let _ = std::fs::remove_file(&tmp);
        FilesError::io("write", &target, source)
    };
    write_new(&tmp, contents, mode).map_err(fail)?;
    std::fs::rename(&tmp, &target).map_err(fail)?;
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|source| FilesError::io("sync the directory", dir, source))
}

fn write_new(path: &Path, contents: &[u8], mode: u32) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(contents)?;
    file.sync_all()
}

/// Parses a PEM text that holds exactly one certificate.
pub(crate) fn one_certificate(pem: &str) -> Result<CertificateDer<'static>, PeerError> {
    let mut certificates = CertificateDer::pem_slice_iter(pem.as_bytes());
    match (certificates.next(), certificates.next()) {
        (Some(Ok(certificate)), None) => Ok(certificate),
        (None, _) => Err(PeerError::NoCertificate),
        _ => Err(PeerError::Malformed),
    }
}

/// Writes a certificate as RFC 7468 wants it: base64 in lines of 64.
pub(crate) fn certificate_to_pem(certificate: &CertificateDer<'_>) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(certificate);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}
