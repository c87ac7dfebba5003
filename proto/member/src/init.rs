//! The first controller of a new cluster.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bellwether_pki::{Ca, CaPin, Identity, IdentityFiles, KeyAndCsr, Role, Validity, VerifiedCsr};
use bellwether_types::{ClusterId, NodeId};
use rustix::fs::Access;
use uuid::Uuid;

use crate::config::check_place;
use crate::files::{StagedDir, check_data_dir_free};
use crate::storage::{Mark, check_unowned};
use crate::{KnownController, MemberConfig, MemberError, MemberRole, Ports, check_name};

/// How long certificates last. Nothing renews them by itself in this release, so that a short time
/// would be a date on which the cluster stops.
pub const CERTIFICATE_DAYS: u64 = 5 * 365;

/// What the administrator says about a new cluster.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// The first controller's data directory: empty or not there yet.
    pub data_dir: PathBuf,
    pub cluster_name: String,
    /// The name of this host.
    pub name: String,
    pub address: IpAddr,
    pub ports: Ports,
    /// The cluster's shared storage: absolute, there already, the same path on every host.
    pub storage: PathBuf,
    /// Below it the administrator's identity gets a directory named by the cluster's id, so that
    /// it never meets the one of another cluster.
    pub context_dir: PathBuf,
    /// The administrator's name, as it will stand in the audit log.
    pub admin_name: String,
}

/// The administrator's identity, for `bell`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AdminFiles {
    /// Holds `ca.pem`, `cert.pem` and `key.pem`: an argument of [`IdentityFiles::load`].
    pub dir: PathBuf,
    pub name: String,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct InitReport {
    pub cluster_id: ClusterId,
    pub data_dir: PathBuf,
    pub config: MemberConfig,
    pub ca_pin: CaPin,
    pub admin: AdminFiles,
    /// Where `bell` finds the first controller once it runs.
    pub endpoint: SocketAddr,
}

/// Makes a new cluster: its CA, its first controller (number 1), and an administrator.
///
/// Everything appears at once or not at all. The storage is looked at and never created: an
/// unmounted mount point would otherwise be taken for the cluster's storage on one host.
pub fn init_cluster(options: InitOptions) -> Result<InitReport, MemberError> {
    let data_dir = absolute(&options.data_dir)?;
    let context_dir = absolute(&options.context_dir)?;
    check_place(&options.name, options.address, &options.ports)?;
    check_name(&options.cluster_name).map_err(MemberError::Refused)?;
    check_name(&options.admin_name).map_err(MemberError::Refused)?;
    check_storage(&options.storage)?;
    check_data_dir_free(&data_dir)?;
    check_unowned(&options.storage)?;
    make_storage_dirs(&options.storage)?;

    let cluster_id = ClusterId::from_uuid(Uuid::now_v7());
    let ca = Ca::create(cluster_id, &options.cluster_name)
        .map_err(MemberError::pki("make the cluster's certificate authority"))?;
    let config = first_member(&options, cluster_id);

    let member = StagedDir::new(&data_dir)?;
    save_identity(member.path(), &ca, Role::Controller, config.id.0, &config.name)?;
    config.save(member.path())?;

    let admin_dir = context_dir.join(cluster_id.to_string());
    let admin = StagedDir::new(&admin_dir)?;
    save_identity(admin.path(), &ca, Role::Admin, 0, &options.admin_name)?;
    // The cluster exists from the moment its data directory does, so that comes last. An identity
    // that a crash leaves behind between the two belongs to no cluster and meets no other.
    let mark = Mark::set(&options.storage, cluster_id)?;
    admin.publish()?;
    member.publish().inspect_err(|_| {
        let _ = std::fs::remove_dir_all(&admin_dir);
    })?;
    mark.keep();

    Ok(InitReport {
        cluster_id,
        data_dir,
        endpoint: config.api_addr(),
        config,
        ca_pin: ca.pin(),
        admin: AdminFiles { dir: admin_dir, name: options.admin_name },
    })
}

fn first_member(options: &InitOptions, cluster_id: ClusterId) -> MemberConfig {
    let itself = KnownController {
        id: NodeId(1),
        name: options.name.clone(),
        address: options.address,
        ports: options.ports,
    };
    MemberConfig {
        cluster_id,
        cluster_name: options.cluster_name.clone(),
        id: itself.id,
        name: itself.name.clone(),
        role: MemberRole::Controller,
        address: itself.address,
        storage: options.storage.clone(),
        bootstrap: true,
        ports: itself.ports,
        controllers: vec![itself],
    }
}

/// Issues a certificate and writes it with its key. Only a controller gets the CA's key with it.
fn save_identity(dir: &Path, ca: &Ca, role: Role, id: u64, name: &str) -> Result<(), MemberError> {
    let key = KeyAndCsr::generate(name).map_err(MemberError::pki("make a key"))?;
    let request = VerifiedCsr::parse(key.csr_pem()).map_err(MemberError::pki("make a key"))?;
    let identity = Identity { cluster: ca.cluster(), role, id, name: name.to_owned() };
    let certificate = ca
        .issue(&identity, &request, Validity::days(SystemTime::now(), CERTIFICATE_DAYS))
        .map_err(MemberError::pki("issue a certificate"))?;
    let ca_key = (role == Role::Controller).then(|| ca.key_pem());
    let ca_key = ca_key.as_ref().map(|text| text.as_str());
    IdentityFiles::from_pem(ca.certificate_pem(), certificate.pem(), &key.key_pem(), ca_key)
        .and_then(|files| files.save(dir))
        .map_err(MemberError::pki("write an identity"))
}

fn check_storage(path: &Path) -> Result<(), MemberError> {
    let bad = |problem: &str| {
        Err(MemberError::Storage { path: path.to_path_buf(), problem: problem.to_owned() })
    };
    if !path.is_absolute() {
        return bad("is not an absolute path");
    }
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return bad("is not there"),
        Err(error) => return bad(&format!("cannot be used: {error}")),
        Ok(found) if !found.is_dir() => return bad("is not a directory"),
        Ok(_) => {}
    }
    match rustix::fs::access(path, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => Ok(()),
        Err(error) => bad(&format!("cannot be written to: {error}")),
    }
}

/// Makes what agents look for on the storage: they refuse one without it as not mounted.
fn make_storage_dirs(storage: &Path) -> Result<(), MemberError> {
    for name in ["claims", "state", "heartbeats"] {
        let path = storage.join(name);
        match std::fs::DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => {}
            made => made.map_err(|source| MemberError::io("create", &path, source))?,
        }
    }
    Ok(())
}

/// The path without reference to the current directory, which a service does not share.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, MemberError> {
    std::path::absolute(path).map_err(|source| MemberError::io("find", path, source))
}
