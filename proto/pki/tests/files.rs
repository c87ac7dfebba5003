//! The identity on disk: what is refused, and that the refusal names the file and the remedy.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::SystemTime;

use bellwether_pki::{
    Ca, CaError, FilesError, IdentityFiles, KeyAndCsr, Role, Validity, VerifiedCsr,
};
use common::*;

fn controller(ca: &Ca) -> IdentityFiles {
    let key = KeyAndCsr::generate("node1").unwrap();
    let validity = Validity::days(SystemTime::now(), 1);
    let issued = issue(ca, &identity(ca, Role::Controller, 1), &key, validity);
    let ca_key = ca.key_pem();
    IdentityFiles::from_pem(ca.certificate_pem(), &issued, &key.key_pem(), Some(&ca_key)).unwrap()
}

fn mode(dir: &Path, name: &str) -> u32 {
    std::fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777
}

fn refusal(dir: &Path, file: &str, remedy: &str) {
    let error = IdentityFiles::load(dir).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(file) && text.contains(remedy), "{text}");
}

#[test]
fn what_is_saved_is_loaded() {
    let (ca, dir) = (new_ca(), tempfile::tempdir().unwrap());
    let dir = dir.path().join("new/pki");
    let saved = controller(&ca);
    saved.save(&dir).unwrap();
    let loaded = IdentityFiles::load(&dir).unwrap();
    assert_eq!(loaded.identity(), saved.identity());
    assert_eq!(loaded.ca_pin(), ca.pin());
    assert_eq!(loaded.ca().unwrap().pin(), ca.pin());
    assert_eq!(loaded.cluster_name(), "lab");
    assert_eq!((mode(&dir, "key.pem"), mode(&dir, "ca-key.pem")), (0o600, 0o600));
    assert_eq!((mode(&dir, "cert.pem"), mode(&dir, "ca.pem")), (0o644, 0o644));
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 4, "a temporary file stayed");
    // The loaded CA issues as the first one did.
    member(loaded.ca().unwrap(), Role::Agent);
}

#[test]
fn each_missing_file_is_named() {
    let ca = new_ca();
    for file in ["ca.pem", "cert.pem", "key.pem"] {
        let dir = tempfile::tempdir().unwrap();
        controller(&ca).save(dir.path()).unwrap();
        std::fs::remove_file(dir.path().join(file)).unwrap();
        refusal(dir.path(), &format!("{file}` is missing"), "bell cluster init");
    }
}

#[test]
fn keys_that_others_can_read_are_refused() {
    let ca = new_ca();
    for file in ["key.pem", "ca-key.pem"] {
        for open in [0o640, 0o604, 0o660, 0o601] {
            let dir = tempfile::tempdir().unwrap();
            controller(&ca).save(dir.path()).unwrap();
            let path = dir.path().join(file);
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(open)).unwrap();
            refusal(dir.path(), file, "chmod 600");
        }
    }
}

#[test]
fn an_interrupted_set_up_is_not_taken_and_can_be_repeated() {
    let (ca, dir) = (new_ca(), tempfile::tempdir().unwrap());
    let member = controller(&ca);
    member.save(dir.path()).unwrap();
    std::fs::remove_file(dir.path().join("cert.pem")).unwrap();
    std::fs::write(dir.path().join(".cert.pem.tmp"), "-----BEGIN CERT").unwrap();
    assert!(!IdentityFiles::exist(dir.path()));
    refusal(dir.path(), "cert.pem` is missing", "interrupted");
    controller(&ca).save(dir.path()).unwrap();
    IdentityFiles::load(dir.path()).unwrap();
}

#[test]
fn a_torn_file_is_refused_by_its_name() {
    let ca = new_ca();
    for file in ["ca.pem", "cert.pem", "key.pem", "ca-key.pem"] {
        for keep in [0, 1, 40, 150] {
            let dir = tempfile::tempdir().unwrap();
            controller(&ca).save(dir.path()).unwrap();
            let path = dir.path().join(file);
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, &text[..keep]).unwrap();
            refusal(dir.path(), file, "restore");
        }
    }
}

#[test]
fn parts_of_different_identities_do_not_mix() {
    let (ca, other) = (new_ca(), new_ca());
    let dir = tempfile::tempdir().unwrap();
    let foreign = tempfile::tempdir().unwrap();
    let same = tempfile::tempdir().unwrap();
    controller(&other).save(foreign.path()).unwrap();
    controller(&ca).save(same.path()).unwrap();
    let check = |from: &Path, file: &str, expected: fn(&FilesError) -> bool| {
        let _ = std::fs::remove_dir_all(dir.path());
        controller(&ca).save(dir.path()).unwrap();
        std::fs::copy(from.join(file), dir.path().join(file)).unwrap();
        let error = IdentityFiles::load(dir.path()).unwrap_err();
        assert!(expected(&error), "{file}: {error}");
    };
    check(same.path(), "key.pem", |e| matches!(e, FilesError::KeyMismatch { .. }));
    check(same.path(), "cert.pem", |e| matches!(e, FilesError::KeyMismatch { .. }));
    check(foreign.path(), "cert.pem", |e| matches!(e, FilesError::OtherCa { .. }));
    check(foreign.path(), "ca.pem", |e| matches!(e, FilesError::OtherCa { .. }));
    check(foreign.path(), "ca-key.pem", |e| matches!(e, FilesError::OtherCaKey { .. }));
}

#[test]
fn a_directory_that_holds_an_identity_is_not_overwritten() {
    let (ca, dir) = (new_ca(), tempfile::tempdir().unwrap());
    let first = controller(&ca);
    first.save(dir.path()).unwrap();
    first.save(dir.path()).unwrap();
    let refused = controller(&ca).save(dir.path());
    assert!(matches!(refused, Err(FilesError::AlreadyThere { .. })));
    let refused = new_ca().save(dir.path());
    assert!(matches!(refused, Err(FilesError::AlreadyThere { .. })));
    assert_eq!(IdentityFiles::load(dir.path()).unwrap().certificate_pem(), first.certificate_pem());
}

#[test]
fn a_certificate_out_of_its_time_is_refused() {
    let cluster = new_ca().cluster();
    let ca = Ca::create_at(cluster, "lab", validity_at(-30).0).unwrap();
    for (days, remedy) in [(-10, "join again"), (10, "clock")] {
        let dir = tempfile::tempdir().unwrap();
        let key = KeyAndCsr::generate("node1").unwrap();
        let certificate = issue(&ca, &identity(&ca, Role::Agent, 1), &key, validity_at(days).1);
        let files = [
            ("ca.pem", ca.certificate_pem()),
            ("cert.pem", certificate.as_str()),
            ("key.pem", &key.key_pem()),
        ];
        write_raw(dir.path(), &files);
        refusal(dir.path(), "cert.pem", remedy);
    }
}

#[test]
fn a_renewed_certificate_replaces_the_old_one() {
    let (ca, dir) = (new_ca(), tempfile::tempdir().unwrap());
    let member = controller(&ca);
    member.save(dir.path()).unwrap();
    let validity = Validity::days(SystemTime::now(), 90);
    let newer = ca.renew(&member.certificate_pem(), validity).unwrap();
    let renewed = IdentityFiles::renew(dir.path(), newer.pem()).unwrap();
    assert_eq!(renewed.identity(), member.identity());
    assert!(renewed.expires_at().unwrap() > member.expires_at().unwrap());

    // A certificate for another identity, or for another key, is no renewal.
    let csr = VerifiedCsr::parse(KeyAndCsr::generate("x").unwrap().csr_pem()).unwrap();
    let other = ca.issue(&identity(&ca, Role::Controller, 1), &csr, validity).unwrap();
    IdentityFiles::renew(dir.path(), other.pem()).unwrap_err();
    assert!(new_ca().renew(&member.certificate_pem(), validity).is_err());
    assert_eq!(
        IdentityFiles::load(dir.path()).unwrap().certificate_pem(),
        newer.pem().replace("\r\n", "\n")
    );
}

#[test]
fn the_ca_issues_only_for_its_own_cluster_and_for_good_names() {
    let ca = new_ca();
    let key = KeyAndCsr::generate("x").unwrap();
    let csr = VerifiedCsr::parse(key.csr_pem()).unwrap();
    let validity = Validity::days(SystemTime::now(), 1);
    let foreign = identity(&new_ca(), Role::Agent, 1);
    let refused = ca.issue(&foreign, &csr, validity);
    assert!(matches!(refused, Err(CaError::OtherCluster { .. })));
    for (role, id, name) in [
        (Role::Agent, 0, "a"),
        (Role::Admin, 1, "a"),
        (Role::Agent, 1, ""),
        (Role::Agent, 1, "a/b"),
        (Role::Agent, 1, "-a"),
        (Role::Agent, 1, "ä"),
    ] {
        let bad = bellwether_pki::Identity { name: name.into(), ..identity(&ca, role, id) };
        assert!(matches!(ca.issue(&bad, &csr, validity), Err(CaError::Identity(_))), "{bad:?}");
    }
}

#[test]
fn a_ca_survives_its_files() {
    let (ca, dir) = (new_ca(), tempfile::tempdir().unwrap());
    ca.save(dir.path()).unwrap();
    let loaded = Ca::load(dir.path()).unwrap();
    assert_eq!((loaded.pin(), loaded.cluster(), loaded.name()), (ca.pin(), ca.cluster(), "lab"));
    assert_eq!(ca.pin().to_string().parse(), Ok(ca.pin()));
    std::fs::remove_file(dir.path().join("ca.pem")).unwrap();
    assert!(matches!(Ca::load(dir.path()), Err(FilesError::Missing { .. })));
}

#[test]
fn nothing_that_is_printed_holds_a_key() {
    let ca = new_ca();
    let member = controller(&ca);
    let key = KeyAndCsr::generate("x").unwrap();
    let printed = format!("{ca:?} {member:?} {key:?}");
    for pem in [ca.key_pem(), key.key_pem()] {
        let secret = pem.lines().nth(1).unwrap();
        assert!(!printed.contains(secret) && !printed.contains("PRIVATE"), "{printed}");
    }
}
