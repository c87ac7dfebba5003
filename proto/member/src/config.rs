//! `member.toml`: who this member is and how it reaches the others.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use bellwether_pki::{IdentityFiles, Role};
use bellwether_types::spec::NAME_LEN_MAX;
use bellwether_types::{ClusterId, MemberRole, NodeId, Ports};
use serde::{Deserialize, Serialize};

use crate::MemberError;
use crate::files::write_atomic;

/// The name of the configuration in a data directory.
pub const MEMBER_FILE: &str = "member.toml";

/// A controller that this member knows and can turn to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownController {
    pub id: NodeId,
    pub name: String,
    pub address: IpAddr,
    #[serde(default)]
    pub ports: Ports,
}

impl KnownController {
    /// Where it serves administrators and nodes.
    pub const fn api_addr(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.ports.api)
    }

    /// Where it serves the other controllers.
    pub const fn raft_addr(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.ports.raft)
    }

    /// Where it serves newcomers.
    pub const fn join_addr(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.ports.join)
    }
}

/// What a member knows at start-up, before it has talked to anyone.
///
/// The replicated state is the truth about the cluster; this is only enough to find it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberConfig {
    pub cluster_id: ClusterId,
    pub cluster_name: String,
    /// The number of the host. A controller and an agent on one host share it.
    pub id: NodeId,
    pub name: String,
    pub role: MemberRole,
    /// Where the others reach this host, and what it listens on.
    pub address: IpAddr,
    /// The cluster's shared storage, absolute, the same path on every host.
    pub storage: PathBuf,
    /// The first controller of a new cluster: it may start Raft with itself as the only voter.
    #[serde(default)]
    pub bootstrap: bool,
    #[serde(default)]
    pub ports: Ports,
    /// The controllers known when this was written; a controller may find itself among them.
    #[serde(default)]
    pub controllers: Vec<KnownController>,
}

impl MemberConfig {
    /// Reads and checks `member.toml` of a data directory.
    pub fn load(data_dir: &Path) -> Result<Self, MemberError> {
        let path = data_dir.join(MEMBER_FILE);
        let text = std::fs::read_to_string(&path).map_err(|source| {
            match source.kind() == std::io::ErrorKind::NotFound {
                true => MemberError::NotAMember { data_dir: data_dir.to_path_buf() },
                false => MemberError::io("read", &path, source),
            }
        })?;
        let config: Self = toml::from_str(&text).map_err(|error| MemberError::BadConfig {
            path: path.clone(),
            reason: error.to_string().trim_end().to_owned(),
        })?;
        match config.problem() {
            Some(reason) => Err(MemberError::BadConfig { path, reason }),
            None => Ok(config),
        }
    }

    /// Writes `member.toml` so that a crash leaves the old file or the new one, never a part.
    pub fn save(&self, data_dir: &Path) -> Result<(), MemberError> {
        write_atomic(&data_dir.join(MEMBER_FILE), self.to_toml()?.as_bytes(), 0o600)
    }

    /// This member as the others know it.
    pub fn as_controller(&self) -> KnownController {
        KnownController {
            id: self.id,
            name: self.name.clone(),
            address: self.address,
            ports: self.ports,
        }
    }

    /// Where this member serves administrators and nodes (controllers).
    pub const fn api_addr(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.ports.api)
    }

    /// Where this member serves the other controllers (controllers).
    pub const fn raft_addr(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.ports.raft)
    }

    /// Where this member serves newcomers (controllers).
    pub const fn join_addr(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.ports.join)
    }

    /// Where this member takes orders of the leader (agents).
    pub const fn agent_addr(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.ports.agent)
    }

    pub(crate) fn to_toml(&self) -> Result<String, MemberError> {
        let body = toml::to_string(self).map_err(|error| MemberError::Internal {
            what: "encode member.toml",
            reason: error.to_string(),
        })?;
        Ok(format!(
            "# Written by Bellwether when this host became a member; see docs/formats.md.\n{body}"
        ))
    }

    /// What makes this unusable, in words for the administrator.
    pub(crate) fn problem(&self) -> Option<String> {
        if self.id.0 == 0 {
            return Some("id is 0; members are numbered from 1".into());
        }
        if let Err(reason) = check_name(&self.name) {
            return Some(reason);
        }
        if !self.storage.is_absolute() {
            return Some(format!("storage `{}` is not an absolute path", self.storage.display()));
        }
        if self.bootstrap && self.role != MemberRole::Controller {
            return Some("bootstrap is set, but only a controller can start a cluster".into());
        }
        if self.controllers.is_empty() {
            return Some("controllers is empty, so this member could not find its cluster".into());
        }
        address_problem(self.address).or_else(|| self.ports.problem())
    }
}

/// Reads a member's configuration and its identity, and checks that they are of one member.
pub fn open_member(data_dir: &Path) -> Result<(MemberConfig, IdentityFiles), MemberError> {
    let config = MemberConfig::load(data_dir)?;
    let files =
        IdentityFiles::load(data_dir).map_err(MemberError::pki("read the member's identity"))?;
    let holder = files.identity();
    let written = (config.cluster_id, Role::from(config.role), config.id.0, config.name.as_str());
    if (holder.cluster, holder.role, holder.id, holder.name.as_str()) != written {
        return Err(MemberError::BadConfig {
            path: data_dir.join(MEMBER_FILE),
            reason: format!(
                "it is of {} `{}` with number {}, but the certificate beside it is of {holder} with \
                 number {}",
                config.role, config.name, config.id, holder.id
            ),
        });
    }
    Ok((config, files))
}

/// Checks the name of a host or a cluster, which becomes part of certificates and file names.
pub fn check_name(name: &str) -> Result<(), String> {
    let mut chars = name.chars();
    let good = name.len() <= NAME_LEN_MAX
        && chars.next().is_some_and(|c| c.is_ascii_alphanumeric())
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '-')
        && !name.chars().all(|c| c.is_ascii_digit());
    match good {
        true => Ok(()),
        // A name of digits only would be taken for a node's number.
        false => Err(format!(
            "the name `{name}` will not do; use 1 to {NAME_LEN_MAX} letters, digits and hyphens, \
             starting with a letter or digit, not digits alone"
        )),
    }
}

/// Others must be able to reach the address, so "any" and groups are of no use.
pub(crate) fn address_problem(address: IpAddr) -> Option<String> {
    (address.is_unspecified() || address.is_multicast()).then(|| {
        format!("the address {address} is not one that other hosts can reach; give this host's own")
    })
}

pub(crate) fn check_place(name: &str, address: IpAddr, ports: &Ports) -> Result<(), MemberError> {
    check_name(name).map_err(MemberError::Refused)?;
    match address_problem(address).or_else(|| ports.problem()) {
        Some(reason) => Err(MemberError::Refused(reason)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn config() -> MemberConfig {
        let controller = KnownController {
            id: NodeId(1),
            name: "alpha".into(),
            address: "10.0.0.1".parse().unwrap(),
            ports: Ports::default(),
        };
        MemberConfig {
            cluster_id: "01890a5d-ac96-774b-bcce-b302099a8057".parse().unwrap(),
            cluster_name: "lab".into(),
            id: NodeId(2),
            name: "beta".into(),
            role: MemberRole::Agent,
            address: "10.0.0.2".parse().unwrap(),
            storage: "/srv/bellwether".into(),
            bootstrap: false,
            ports: Ports::default(),
            controllers: vec![controller],
        }
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        config().save(dir.path()).unwrap();
        assert_eq!(MemberConfig::load(dir.path()).unwrap(), config());
        let names: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["member.toml"], "no temporary file stays behind");
    }

    #[test]
    fn a_missing_file_says_how_to_become_a_member() {
        let dir = tempfile::tempdir().unwrap();
        let error = MemberConfig::load(dir.path()).unwrap_err();
        assert!(matches!(error, MemberError::NotAMember { .. }));
        assert!(error.to_string().contains(&dir.path().display().to_string()));
        assert!(error.remedy().is_some());
    }

    #[test]
    fn unknown_keys_and_impossible_values_are_refused_by_file_and_field() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(MEMBER_FILE);
        let good = config().to_toml().unwrap();
        for (bad, word) in [
            (format!("colour = 1\n{good}"), "colour"),
            (good.replace("id = 2", "id = 0"), "id is 0"),
            (good.replace("/srv/bellwether", "srv"), "absolute"),
            (good.replace("role = \"agent\"", "role = \"admin\""), "admin"),
            (good.replace("bootstrap = false", "bootstrap = true"), "bootstrap"),
            (good.replace("agent = 7410", "agent = 7400"), "7400"),
            (good.replace("agent = 7410", "agent = 0"), "port is 0"),
            (good.replace("10.0.0.2", "0.0.0.0"), "0.0.0.0"),
            (good.replace("\"beta\"", "\"../x\""), "../x"),
            (good.replace("\"beta\"", "\"17\""), "17"),
        ] {
            assert_ne!(bad, good, "{word}");
            std::fs::write(&path, bad).unwrap();
            let text = MemberConfig::load(dir.path()).unwrap_err().to_string();
            assert!(text.contains("member.toml") && text.contains(word), "{word}: {text}");
        }
    }
}
