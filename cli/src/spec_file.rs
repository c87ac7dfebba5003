//! The specification of a VM from a file and from options.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bellwether_proto::v1;
use bellwether_types::{DiskSpec, MacError, NicSpec, RestartPolicy, VmSpec};
use serde::Deserialize;

use crate::args::{CreateArgs, RuleArgs};
use crate::exit::{Exit, Failure};
use crate::parse;

/// A file larger than this is not a specification but something given by mistake.
const FILE_LEN_MAX: u64 = 1 << 20;

/// A specification in which nodes are still the words of the administrator.
#[derive(Clone, PartialEq, Debug)]
pub struct Draft {
    /// Complete but for `possible_owners`.
    pub spec: VmSpec,
    /// Names or numbers.
    pub owners: Vec<String>,
    pub rules: v1::VmChanges,
}

/// What a specification file may say.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct SpecFile {
    name: Option<String>,
    /// With a unit, like on the command line.
    memory: Option<String>,
    /// Or as `bell vm show -o json` prints it.
    memory_mib: Option<u64>,
    vcpus: Option<u32>,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: Option<String>,
    disks: Vec<DiskEntry>,
    nics: Vec<NicEntry>,
    possible_owners: Vec<NodeWord>,
    priority: Option<u32>,
    restart: Option<RestartPolicy>,
    preferred_owners: Option<Vec<NodeWord>>,
    failback: Option<String>,
    /// Groups, each with `hard` or `soft`.
    anti_affinity: Option<BTreeMap<String, String>>,
    start_after: Option<Vec<String>>,
    /// Like on the command line: `3/10m`.
    restarts: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DiskEntry {
    path: PathBuf,
    format: String,
    #[serde(default)]
    read_only: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NicEntry {
    bridge: String,
    /// Empty, as `bell vm show -o json` prints it, means none.
    #[serde(default)]
    mac: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum NodeWord {
    Number(u64),
    Name(String),
}

/// Builds and checks the specification; options go before the file.
pub fn draft(args: &CreateArgs) -> Result<Draft, Failure> {
    let file = match &args.file {
        Some(path) => read(path)?,
        None => SpecFile::default(),
    };
    let rules = rules(&args.rules, &file)?;
    let missing = |what| move || Failure::usage(format!("the VM's {what} is missing"));
    let memory_mib = match (args.memory, &file.memory, file.memory_mib) {
        (Some(mib), _, _) => mib,
        (None, Some(_), Some(_)) => {
            return Err(Failure::usage("the file gives both memory and memory_mib; keep one"));
        }
        (None, Some(text), None) => parse::memory_mib(text).map_err(Failure::usage)?,
        (None, None, mib) => mib.ok_or_else(missing("memory"))?,
    };
    let spec = VmSpec {
        name: args.name.clone().or(file.name).ok_or_else(missing("name"))?,
        vcpus: args.vcpus.or(file.vcpus).unwrap_or(1),
        memory_mib,
        kernel: args.kernel.clone().or(file.kernel).ok_or_else(missing("kernel"))?,
        // Empty is how `bell vm show -o json` prints none.
        initrd: args.initrd.clone().or(file.initrd).filter(|path| !path.as_os_str().is_empty()),
        cmdline: args.cmdline.clone().or(file.cmdline).unwrap_or_default(),
        disks: disks(&args.disks, file.disks)?,
        nics: nics(&args.nics, file.nics)?,
        possible_owners: std::collections::BTreeSet::new(),
        priority: args.priority.or(file.priority).unwrap_or(0),
        restart: args.restart.or(file.restart).unwrap_or_default(),
    };
    // What can be known here is said here, with the exit code for a wrong command line.
    spec.validate().map_err(|error| Failure::usage(error.to_string()))?;
    let owners = match args.owners.is_empty() {
        true => file.possible_owners.iter().map(NodeWord::word).collect(),
        false => args.owners.clone(),
    };
    Ok(Draft { spec, owners, rules })
}

/// The rules of the file in the words of the command line, under the options.
fn rules(args: &RuleArgs, file: &SpecFile) -> Result<v1::VmChanges, Failure> {
    let usage = |reason: String| Failure::usage(reason);
    let apart = |(group, how): (&String, &String)| parse::apart(&format!("{group}:{how}"));
    let from_file = RuleArgs {
        prefer: file.preferred_owners.as_ref().map(|all| all.iter().map(NodeWord::word).collect()),
        failback: file.failback.as_deref().map(parse::failback).transpose().map_err(usage)?,
        apart: file
            .anti_affinity
            .as_ref()
            .map(|groups| groups.iter().map(apart).collect())
            .transpose()
            .map_err(usage)?,
        after: file.start_after.clone(),
        restarts: file.restarts.as_deref().map(parse::restarts).transpose().map_err(usage)?,
        ..RuleArgs::default()
    };
    let (given, file) = (args.changes(), from_file.changes());
    Ok(v1::VmChanges {
        preferred_owners: given.preferred_owners.or(file.preferred_owners),
        failback: if given.failback.is_empty() { file.failback } else { given.failback },
        anti_affinity: given.anti_affinity.or(file.anti_affinity),
        start_after: given.start_after.or(file.start_after),
        restart_limit: given.restart_limit.or(file.restart_limit),
        pre_copy: given.pre_copy,
        downtime_ms: given.downtime_ms,
        ..v1::VmChanges::default()
    })
}

fn disks(given: &[DiskSpec], file: Vec<DiskEntry>) -> Result<Vec<DiskSpec>, Failure> {
    if !given.is_empty() {
        return Ok(given.to_vec());
    }
    file.into_iter()
        .map(|entry| {
            let format = parse::disk_format(&entry.format).map_err(Failure::usage)?;
            Ok(DiskSpec { path: entry.path, format, read_only: entry.read_only })
        })
        .collect()
}

fn nics(given: &[NicSpec], file: Vec<NicEntry>) -> Result<Vec<NicSpec>, Failure> {
    if !given.is_empty() {
        return Ok(given.to_vec());
    }
    file.into_iter()
        .map(|NicEntry { bridge, mac }| {
            let mac = match mac.as_str() {
                "" => None,
                text => Some(
                    text.parse().map_err(|error: MacError| Failure::usage(error.to_string()))?,
                ),
            };
            Ok(NicSpec { bridge, mac })
        })
        .collect()
}

impl NodeWord {
    fn word(&self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Name(name) => name.clone(),
        }
    }
}

fn read(path: &Path) -> Result<SpecFile, Failure> {
    let bad = |reason: String| Failure::usage(format!("{}: {}", path.display(), reason.trim_end()));
    let length = std::fs::metadata(path).map_err(|error| bad(error.to_string()))?.len();
    if length > FILE_LEN_MAX {
        return Err(bad(format!("{length} bytes are too many for a specification")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| bad(error.to_string()))?;
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("toml") => toml::from_str(&text).map_err(|error| bad(error.to_string())),
        Some("json") => serde_json::from_str(&text).map_err(|error| bad(error.to_string())),
        _ => Err(bad("name it .toml or .json, so that it is known what it is".into())),
    }
}

/// Finds the numbers of nodes that are given by name or number.
pub fn owner_numbers(words: &[String], nodes: &[v1::Node]) -> Result<Vec<u64>, Failure> {
    let number = |word: &String| {
        let found = nodes.iter().find(|node| node.name == *word || node.id.to_string() == *word);
        found.map(|node| node.id).ok_or_else(|| {
            Failure::new(Exit::NotFound, format!("there is no node `{word}` to own the VM"))
                .remedy("`bell node list` shows the nodes")
        })
    };
    words.iter().map(number).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command, VmCommand};

    fn create(line: &str) -> CreateArgs {
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        match cli.command {
            Command::Vm(VmCommand::Create(args)) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_make_a_specification() {
        let args = create(
            "bell vm create web --memory 256M --kernel /k --disk path=/d,format=raw,readonly \
             --owner n1 --owner 2 --priority 5 --restart never --cmdline --tick=5 --apart web:hard \
             --initrd /i --nic bridge=br0,mac=02:00:5e:10:00:01",
        );
        let draft = draft(&args).unwrap();
        assert_eq!((draft.spec.memory_mib, draft.spec.vcpus, draft.spec.priority), (256, 1, 5));
        assert!(draft.spec.disks[0].read_only);
        assert_eq!(draft.spec.restart, RestartPolicy::Never);
        assert_eq!(draft.spec.cmdline, "--tick=5");
        assert_eq!(draft.spec.initrd, Some("/i".into()));
        assert_eq!(
            draft.spec.nics,
            ["bridge=br0,mac=02:00:5e:10:00:01".parse::<NicSpec>().unwrap()]
        );
        assert_eq!(draft.owners, ["n1", "2"]);
        assert_eq!(draft.rules.anti_affinity.unwrap().groups["web"], "hard");
    }

    #[test]
    fn a_file_in_either_form_and_an_option_over_it() {
        let dir = tempfile::tempdir().unwrap();
        let (toml, json) = (dir.path().join("w.toml"), dir.path().join("w.json"));
        std::fs::write(
            &toml,
            "name = 'web'\nmemory = '1G'\nkernel = '/k'\npossible_owners = ['n1', 2]\n\
             restarts = '3/10m'\nanti_affinity = { web = 'soft' }\nstart_after = ['db']\n\
             preferred_owners = [2, 'n1']\nfailback = '22-6'\n\
             [[disks]]\npath = '/d'\nformat = 'raw'\n[[nics]]\nbridge = 'br0'\n",
        )
        .unwrap();
        let same = r#"{"name":"web","memory_mib":1024,"kernel":"/k","possible_owners":["n1",2],
            "restarts":"3/10m","anti_affinity":{"web":"soft"},"start_after":["db"],
            "preferred_owners":[2,"n1"],"failback":"22-6",
            "initrd":"","nics":[{"bridge":"br0","mac":""}],
            "disks":[{"path":"/d","format":"raw"}]}"#;
        std::fs::write(&json, same).unwrap();
        let from = |path: &Path, rest: &str| {
            draft(&create(&format!("bell vm create -f {} {rest}", path.display())))
        };
        assert_eq!(from(&toml, "").unwrap(), from(&json, "").unwrap());
        let draft = from(&toml, "other --memory 2G --after none").unwrap();
        assert_eq!(draft.rules.restart_limit.unwrap().period_s, 600);
        assert_eq!(draft.rules.preferred_owners.unwrap().nodes, ["2", "n1"]);
        assert_eq!(draft.rules.start_after.unwrap().vms, [""; 0], "the option goes before");
        assert_eq!((draft.spec.name.as_str(), draft.spec.memory_mib), ("other", 2048));
        assert_eq!(draft.owners, ["n1", "2"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.toml");
        for (text, word) in [
            ("colour = 1", "colour"),
            ("name = 'web'\nkernel = '/k'", "memory is missing"),
            ("name = 'web'\nmemory = '0M'\nkernel = '/k'", "needs memory"),
            ("name = 'web'\nmemory = '3M'\nkernel = '/k'", "multiple of 2"),
            ("name = 'web'\nmemory = '2M'\nkernel = 'k'", "absolute"),
            ("name = 'web'\nmemory = '2M'\nkernel = '/k'\nfailback = 'soon'", "22-6"),
            ("name = 'web'\nmemory = '2M'\nmemory_mib = 2\nkernel = '/k'", "both"),
            (
                "name = 'web'\nmemory = '2M'\nkernel = '/k'\ndisks = [{path='/d', format='qcow2'}]",
                "qcow2",
            ),
        ] {
            std::fs::write(&path, text).unwrap();
            let failure =
                draft(&create(&format!("bell vm create -f {}", path.display()))).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.message.contains(word), "{word}: {}", failure.message);
        }
        let unknown = owner_numbers(&["n9".into()], &[]).unwrap_err();
        assert_eq!(unknown.exit, Exit::NotFound);
    }
}
