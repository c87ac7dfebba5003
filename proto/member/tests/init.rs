//! What `init_cluster` makes, and what it refuses without leaving a trace.

#![allow(clippy::unwrap_used)] // A helper that fails fails its test.

use std::path::Path;

use bellwether_member::{
    InitOptions, MemberConfig, MemberError, MemberRole, Ports, init_cluster, open_member,
    storage_owner,
};
use bellwether_pki::{IdentityFiles, Role};

fn options(base: &Path) -> InitOptions {
    InitOptions {
        data_dir: base.join("data"),
        cluster_name: "lab".into(),
        name: "alpha".into(),
        address: "127.0.0.1".parse().unwrap(),
        ports: Ports::default(),
        storage: base.join("storage"),
        context_dir: base.join("context"),
        admin_name: "admin".into(),
    }
}

fn base() -> tempfile::TempDir {
    let base = tempfile::tempdir().unwrap();
    std::fs::create_dir(base.path().join("storage")).unwrap();
    base
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_new_cluster_has_a_controller_and_an_administrator_of_one_ca() {
    let base = base();
    let report = init_cluster(options(base.path())).unwrap();
    assert_eq!(
        names(&report.data_dir),
        ["ca-key.pem", "ca.pem", "cert.pem", "key.pem", "member.toml"]
    );
    assert_eq!(names(&report.admin.dir), ["ca.pem", "cert.pem", "key.pem"]);

    let config = MemberConfig::load(&report.data_dir).unwrap();
    assert_eq!(config, report.config);
    assert!(config.bootstrap);
    assert_eq!((config.id.0, config.role), (1, MemberRole::Controller));
    assert_eq!(config.controllers, [config.as_controller()]);

    let controller = IdentityFiles::load(&report.data_dir).unwrap();
    let admin = IdentityFiles::load(&report.admin.dir).unwrap();
    assert_eq!((controller.role(), admin.role()), (Role::Controller, Role::Admin));
    assert!(controller.ca().is_some() && admin.ca().is_none());
    assert_eq!(controller.ca_pin(), admin.ca_pin());
    assert_eq!(controller.cluster(), report.cluster_id);
}

#[test]
fn a_configuration_beside_the_identity_of_another_member_is_refused() {
    let base = base();
    let report = init_cluster(options(base.path())).unwrap();
    let (config, files) = open_member(&report.data_dir).unwrap();
    assert_eq!((config.id.0, files.identity().id), (1, 1));
    MemberConfig { name: "beta".into(), ..config }.save(&report.data_dir).unwrap();
    let error = open_member(&report.data_dir).unwrap_err().to_string();
    assert!(error.contains("member.toml") && error.contains("`alpha`"), "{error}");
    std::fs::remove_file(report.data_dir.join("cert.pem")).unwrap();
    assert!(open_member(&report.data_dir).is_err());
}

#[test]
fn an_empty_data_directory_is_taken_and_a_used_one_is_not() {
    let base = base();
    std::fs::create_dir(base.path().join("data")).unwrap();
    let first = init_cluster(options(base.path())).unwrap();

    let again = init_cluster(options(base.path())).unwrap_err();
    assert!(matches!(again, MemberError::AlreadyAMember { .. }), "{again}");
    assert_eq!(MemberConfig::load(&first.data_dir).unwrap(), first.config, "nothing was touched");
    assert_eq!(names(&base.path().join("context")).len(), 1);

    let other = InitOptions { data_dir: base.path().join("full"), ..options(base.path()) };
    std::fs::create_dir(&other.data_dir).unwrap();
    std::fs::write(other.data_dir.join("something"), "").unwrap();
    let full = init_cluster(other).unwrap_err();
    assert!(matches!(full, MemberError::DataDirNotEmpty { .. }), "{full}");
}

#[test]
fn a_storage_belongs_to_one_cluster() {
    let base = base();
    let storage = base.path().join("storage");
    // An administrator's place that cannot be made ends it late, and frees the storage again.
    let late = InitOptions { context_dir: "/dev/null/context".into(), ..options(base.path()) };
    init_cluster(late).unwrap_err();
    assert_eq!(storage_owner(&storage).unwrap(), None);
    let first = init_cluster(options(base.path())).unwrap();
    assert_eq!(storage_owner(&storage).unwrap(), Some(first.cluster_id));
    let second = InitOptions { data_dir: base.path().join("second"), ..options(base.path()) };
    let refused = init_cluster(second).unwrap_err();
    assert!(matches!(&refused, MemberError::StorageTaken { .. }), "{refused}");
    assert!(refused.to_string().contains(&first.cluster_id.to_string()), "{refused}");
    assert_eq!(storage_owner(&storage).unwrap(), Some(first.cluster_id), "nothing was touched");
    assert!(!base.path().join("second").exists());
}

#[test]
fn what_is_refused_leaves_nothing_behind() {
    let base = base();
    let good = options(base.path());
    let refused = [
        (InitOptions { storage: "storage".into(), ..good.clone() }, "absolute"),
        (InitOptions { storage: base.path().join("unmounted"), ..good.clone() }, "is not there"),
        (InitOptions { storage: "/dev/null".into(), ..good.clone() }, "not a directory"),
        (InitOptions { name: "a/b".into(), ..good.clone() }, "a/b"),
        (InitOptions { cluster_name: String::new(), ..good.clone() }, "name"),
        (InitOptions { address: "0.0.0.0".parse().unwrap(), ..good.clone() }, "0.0.0.0"),
        (InitOptions { ports: Ports { raft: 7400, ..Ports::default() }, ..good.clone() }, "7400"),
        // The administrator's place cannot be made: the controller's must not appear either.
        (InitOptions { context_dir: "/dev/null/context".into(), ..good.clone() }, "/dev/null"),
    ];
    for (options, word) in refused {
        let error = init_cluster(options).unwrap_err();
        assert!(error.to_string().contains(word), "{word}: {error}");
        assert_eq!(names(base.path()), ["storage"], "{word}");
    }
    assert!(matches!(
        init_cluster(InitOptions { storage: base.path().join("x"), ..good }).unwrap_err().remedy(),
        Some(remedy) if remedy.contains("mount")
    ));
}
