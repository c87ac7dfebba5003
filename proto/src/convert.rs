//! Conversions between wire messages and domain types. Whatever comes from the wire is checked
//! here, once; what passes is a domain type.

use std::path::PathBuf;

use bellwether_types::{
    DiskFormat, DiskSpec, Epoch, Handover, NicSpec, NodeId, Ports, RestartPolicy, SpecError,
    StateFileRef, VmSpec,
};

use crate::v1;

/// Why a message is not what it says it is.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConvertError {
    #[error("the field `{0}` is missing")]
    Missing(&'static str),
    #[error("the field `{field}` has the value `{value}`; {expected}")]
    Invalid { field: &'static str, value: String, expected: &'static str },
    #[error(transparent)]
    Spec(#[from] SpecError),
}

impl From<ConvertError> for tonic::Status {
    fn from(error: ConvertError) -> Self {
        tonic::Status::invalid_argument(error.to_string())
    }
}

impl From<&DiskSpec> for v1::Disk {
    fn from(disk: &DiskSpec) -> Self {
        let DiskFormat::Raw = disk.format;
        Self {
            path: disk.path.display().to_string(),
            format: "raw".into(),
            read_only: disk.read_only,
        }
    }
}

impl From<&NicSpec> for v1::Nic {
    fn from(nic: &NicSpec) -> Self {
        let mac = nic.mac.map(|mac| mac.to_string()).unwrap_or_default();
        Self { bridge: nic.bridge.clone(), mac }
    }
}

impl TryFrom<v1::Nic> for NicSpec {
    type Error = ConvertError;

    fn try_from(nic: v1::Nic) -> Result<Self, ConvertError> {
        let mac = match nic.mac.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| ConvertError::Invalid {
                field: "nics.mac",
                value: text.to_owned(),
                expected: "give an address like 02:00:5e:10:00:01",
            })?),
        };
        Ok(Self { bridge: nic.bridge, mac })
    }
}

impl TryFrom<v1::Disk> for DiskSpec {
    type Error = ConvertError;

    fn try_from(disk: v1::Disk) -> Result<Self, ConvertError> {
        if disk.format != "raw" {
            return Err(ConvertError::Invalid {
                field: "disk.format",
                value: disk.format,
                expected: "the only format of this release is raw",
            });
        }
        Ok(Self {
            path: PathBuf::from(disk.path),
            format: DiskFormat::Raw,
            read_only: disk.read_only,
        })
    }
}

impl From<&VmSpec> for v1::VmSpec {
    fn from(spec: &VmSpec) -> Self {
        Self {
            name: spec.name.clone(),
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            kernel: spec.kernel.display().to_string(),
            initrd: spec.initrd.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
            cmdline: spec.cmdline.clone(),
            disks: spec.disks.iter().map(v1::Disk::from).collect(),
            nics: spec.nics.iter().map(v1::Nic::from).collect(),
            possible_owners: spec.possible_owners.iter().map(|node| node.0).collect(),
            priority: spec.priority,
            restart: match spec.restart {
                RestartPolicy::Restart => "restart".into(),
                RestartPolicy::Never => "never".into(),
            },
        }
    }
}

impl TryFrom<v1::VmSpec> for VmSpec {
    type Error = ConvertError;

    fn try_from(spec: v1::VmSpec) -> Result<Self, ConvertError> {
        let spec = Self {
            name: spec.name,
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            kernel: PathBuf::from(spec.kernel),
            initrd: (!spec.initrd.is_empty()).then(|| PathBuf::from(spec.initrd)),
            cmdline: spec.cmdline,
            disks: spec.disks.into_iter().map(DiskSpec::try_from).collect::<Result<_, _>>()?,
            nics: spec.nics.into_iter().map(NicSpec::try_from).collect::<Result<_, _>>()?,
            possible_owners: spec.possible_owners.into_iter().map(NodeId).collect(),
            priority: spec.priority,
            restart: restart_policy(spec.restart)?,
        };
        spec.validate()?;
        Ok(spec)
    }
}

/// The policy for a word; none is the default.
pub fn restart_policy(word: String) -> Result<RestartPolicy, ConvertError> {
    match word.as_str() {
        "" | "restart" => Ok(RestartPolicy::Restart),
        "never" => Ok(RestartPolicy::Never),
        _ => Err(ConvertError::Invalid {
            field: "restart",
            value: word,
            expected: "give restart or never",
        }),
    }
}

impl From<&StateFileRef> for v1::StateFile {
    fn from(file: &StateFileRef) -> Self {
        Self {
            path: file.path.display().to_string(),
            hash: file.hash.to_vec(),
            epoch: file.epoch.0,
            bytes: file.bytes,
        }
    }
}

impl TryFrom<v1::StateFile> for StateFileRef {
    type Error = ConvertError;

    fn try_from(file: v1::StateFile) -> Result<Self, ConvertError> {
        let hash = hash_of("state_file.hash", &file.hash)?;
        Ok(Self {
            path: PathBuf::from(file.path),
            hash,
            epoch: Epoch(file.epoch),
            bytes: file.bytes,
        })
    }
}

impl From<Handover> for v1::Handover {
    fn from(it: Handover) -> Self {
        let (epoch, hash) = (it.epoch.0, it.hash.to_vec());
        Self { epoch, generation: it.generation, bytes: it.bytes, hash }
    }
}

impl TryFrom<v1::Handover> for Handover {
    type Error = ConvertError;

    fn try_from(it: v1::Handover) -> Result<Self, ConvertError> {
        let hash = hash_of("handover.hash", &it.hash)?;
        Ok(Self { epoch: Epoch(it.epoch), generation: it.generation, bytes: it.bytes, hash })
    }
}

fn hash_of(field: &'static str, bytes: &[u8]) -> Result<[u8; 32], ConvertError> {
    bytes.try_into().map_err(|_| ConvertError::Invalid {
        field,
        value: format!("{} bytes", bytes.len()),
        expected: "a Blake3 hash has 32 bytes",
    })
}

impl From<Ports> for v1::Ports {
    fn from(ports: Ports) -> Self {
        Self {
            api: ports.api.into(),
            raft: ports.raft.into(),
            join: ports.join.into(),
            agent: ports.agent.into(),
        }
    }
}

impl TryFrom<v1::Ports> for Ports {
    type Error = ConvertError;

    fn try_from(ports: v1::Ports) -> Result<Self, ConvertError> {
        Ok(Self {
            api: port("ports.api", ports.api)?,
            raft: port("ports.raft", ports.raft)?,
            join: port("ports.join", ports.join)?,
            agent: port("ports.agent", ports.agent)?,
        })
    }
}

fn port(field: &'static str, value: u32) -> Result<u16, ConvertError> {
    match u16::try_from(value) {
        Ok(0) | Err(_) => Err(ConvertError::Invalid {
            field,
            value: value.to_string(),
            expected: "a port is a number from 1 to 65535",
        }),
        Ok(port) => Ok(port),
    }
}
