//! What an administrator says about a VM, and the checks that need no host.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ids::NodeId;
use crate::nic::{INTERFACE_LEN_MAX, Mac, NicSpec, is_interface_name};

/// The most vCPUs that one VM can have.
pub const VCPUS_MAX: u32 = 64;
/// Guest memory is given in steps of a large page.
pub const MEMORY_STEP_MIB: u64 = 2;
/// The longest VM name, so that it fits host names, file names and unit names.
pub const NAME_LEN_MAX: usize = 63;
/// The longest kernel command line (`COMMAND_LINE_SIZE` of x86 Linux).
pub const CMDLINE_LEN_MAX: usize = 2048;
/// The most disks of one VM: PCI slots 1 to 16 behind the host bridge.
pub const DISKS_MAX: usize = 16;
/// The most network cards of one VM: PCI slots 18 and up.
pub const NICS_MAX: usize = 8;

/// How the bytes of a disk image are to be read. Formats are given, never guessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Sector n of the guest is at byte 512 n of the file.
    Raw,
}

/// One virtual disk.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskSpec {
    /// The image, absolute, on storage that every possible owner reaches under this path.
    pub path: PathBuf,
    pub format: DiskFormat,
    pub read_only: bool,
}

/// What the cluster does when the VM's runner is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RestartPolicy {
    /// Restart it: on another node when the node is gone, or where it was when only the VMM died.
    #[default]
    Restart,
    /// Leave it stopped and say so in an event.
    Never,
}

/// The specification of a VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VmSpec {
    /// Unique in the cluster: letters, digits and hyphens.
    pub name: String,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// A bzImage, or an ELF image with a PVH entry, absolute.
    pub kernel: PathBuf,
    /// The initial RAM disk that the kernel is given, absolute.
    pub initrd: Option<PathBuf>,
    pub cmdline: String,
    pub disks: Vec<DiskSpec>,
    pub nics: Vec<NicSpec>,
    /// Nodes that may run it; empty means every node.
    pub possible_owners: BTreeSet<NodeId>,
    /// Higher is restarted first.
    pub priority: u32,
    pub restart: RestartPolicy,
}

/// Why a specification is refused. The text is for the administrator.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SpecError {
    #[error(
        "VM name `{0}`: use 1 to {NAME_LEN_MAX} letters, digits and hyphens, starting with a letter or digit"
    )]
    Name(String),
    #[error("VM {name}: {vcpus} vCPUs; give 1 to {VCPUS_MAX}")]
    Vcpus { name: String, vcpus: u32 },
    #[error(
        "VM {name}: {memory_mib} MiB of memory; give a multiple of {MEMORY_STEP_MIB} MiB, at least {MEMORY_STEP_MIB}"
    )]
    Memory { name: String, memory_mib: u64 },
    #[error("VM {name}: {what} `{path}` is not an absolute path")]
    RelativePath { name: String, what: &'static str, path: String },
    #[error("VM {name}: the disk `{path}` is given twice")]
    DiskTwice { name: String, path: String },
    #[error("VM {name}: {count} disks; at most {DISKS_MAX} fit")]
    TooManyDisks { name: String, count: usize },
    #[error("VM {name}: {count} network cards; at most {NICS_MAX} fit")]
    TooManyNics { name: String, count: usize },
    #[error(
        "VM {name}: no bridge has the name `{bridge}`; give 1 to {INTERFACE_LEN_MAX} characters without `/`, `:`, `%` and spaces"
    )]
    Bridge { name: String, bridge: String },
    #[error("VM {name}: the address {mac} is given to two network cards")]
    MacTwice { name: String, mac: Mac },
    #[error("VM {name}: the command line has {len} bytes; at most {CMDLINE_LEN_MAX} fit")]
    CmdlineTooLong { name: String, len: usize },
    #[error("VM {name}: the command line contains a NUL byte")]
    CmdlineNul { name: String },
}

impl VmSpec {
    /// Checks everything that can be known without a host.
    pub fn validate(&self) -> Result<(), SpecError> {
        let name = || self.name.clone();
        if !is_name(&self.name) {
            return Err(SpecError::Name(name()));
        }
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            return Err(SpecError::Vcpus { name: name(), vcpus: self.vcpus });
        }
        if self.memory_mib == 0 || !self.memory_mib.is_multiple_of(MEMORY_STEP_MIB) {
            return Err(SpecError::Memory { name: name(), memory_mib: self.memory_mib });
        }
        if self.cmdline.len() > CMDLINE_LEN_MAX {
            return Err(SpecError::CmdlineTooLong { name: name(), len: self.cmdline.len() });
        }
        if self.cmdline.contains('\0') {
            return Err(SpecError::CmdlineNul { name: name() });
        }
        self.validate_nics()?;
        self.validate_paths()
    }

    fn validate_nics(&self) -> Result<(), SpecError> {
        let name = || self.name.clone();
        if self.nics.len() > NICS_MAX {
            return Err(SpecError::TooManyNics { name: name(), count: self.nics.len() });
        }
        let mut seen = BTreeSet::new();
        for nic in &self.nics {
            if !is_interface_name(&nic.bridge) {
                return Err(SpecError::Bridge { name: name(), bridge: nic.bridge.clone() });
            }
            if let Some(mac) = nic.mac.filter(|mac| !seen.insert(*mac)) {
                return Err(SpecError::MacTwice { name: name(), mac });
            }
        }
        Ok(())
    }

    fn validate_paths(&self) -> Result<(), SpecError> {
        let absolute = |what, path: &PathBuf| match path.is_absolute() {
            true => Ok(()),
            false => Err(SpecError::RelativePath {
                name: self.name.clone(),
                what,
                path: path.display().to_string(),
            }),
        };
        absolute("kernel", &self.kernel)?;
        self.initrd.iter().try_for_each(|initrd| absolute("initrd", initrd))?;
        if self.disks.len() > DISKS_MAX {
            return Err(SpecError::TooManyDisks {
                name: self.name.clone(),
                count: self.disks.len(),
            });
        }
        let mut seen = BTreeSet::new();
        for disk in &self.disks {
            absolute("disk", &disk.path)?;
            if !seen.insert(&disk.path) {
                return Err(SpecError::DiskTwice {
                    name: self.name.clone(),
                    path: disk.path.display().to_string(),
                });
            }
        }
        Ok(())
    }
}

fn is_name(text: &str) -> bool {
    let mut chars = text.chars();
    text.len() <= NAME_LEN_MAX
        && chars.next().is_some_and(|c| c.is_ascii_alphanumeric())
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            name: "web-1".into(),
            vcpus: 1,
            memory_mib: 256,
            kernel: "/guests/kernel".into(),
            initrd: None,
            cmdline: String::new(),
            disks: vec![],
            nics: vec![],
            possible_owners: BTreeSet::new(),
            priority: 0,
            restart: RestartPolicy::Restart,
        }
    }

    #[test]
    fn bounds_are_checked() {
        assert_eq!(spec().validate(), Ok(()));
        for bad in ["", "-a", "a b", "ä"] {
            assert!(matches!(
                VmSpec { name: bad.into(), ..spec() }.validate(),
                Err(SpecError::Name(_))
            ));
        }
        for memory_mib in [0, 3] {
            let refused = VmSpec { memory_mib, ..spec() }.validate();
            assert!(matches!(refused, Err(SpecError::Memory { .. })));
        }
        for vcpus in [0, 65] {
            let refused = VmSpec { vcpus, ..spec() }.validate();
            assert!(matches!(refused, Err(SpecError::Vcpus { .. })));
        }
    }

    #[test]
    fn network_cards_have_a_bridge_and_an_address_of_their_own() {
        let mac: Mac = "02:00:5e:10:00:01".parse().unwrap();
        let nic = NicSpec { bridge: "br0".into(), mac: Some(mac) };
        let with = |nics: Vec<NicSpec>| VmSpec { nics, ..spec() }.validate();
        assert_eq!(with(vec![nic.clone(), NicSpec { mac: None, ..nic.clone() }]), Ok(()));
        assert!(matches!(with(vec![nic.clone(), nic.clone()]), Err(SpecError::MacTwice { .. })));
        assert!(matches!(
            with(vec![NicSpec { mac: None, ..nic.clone() }; 9]),
            Err(SpecError::TooManyNics { .. })
        ));
        let nameless = NicSpec { bridge: String::new(), ..nic };
        assert!(matches!(with(vec![nameless]), Err(SpecError::Bridge { .. })));
    }

    #[test]
    fn paths_are_absolute_and_disks_distinct() {
        let relative = VmSpec { kernel: "kernel".into(), ..spec() };
        assert!(matches!(relative.validate(), Err(SpecError::RelativePath { what: "kernel", .. })));
        let relative = VmSpec { initrd: Some("initrd".into()), ..spec() };
        assert!(matches!(relative.validate(), Err(SpecError::RelativePath { what: "initrd", .. })));
        let disk = DiskSpec { path: "/d.raw".into(), format: DiskFormat::Raw, read_only: false };
        let twice = VmSpec { disks: vec![disk.clone(), disk], ..spec() };
        assert!(matches!(twice.validate(), Err(SpecError::DiskTwice { .. })));
    }
}
