//! Which crate may use what. The lists are in this file, so that a change of them is seen in review.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::command::{cargo, options, output};
use crate::source;

const HELP: &str = "\
Check which crate may use what, and where unsafe code may be.

Usage: cargo xtask check-deps

- The pure crates (bellwether-core, bellwether-agent-core, bellwether-types) depend only on what
  their allow-list names, and their source names no file system, network, clock or chance.
- Controllers and agents meet only in proto; the VMM knows nothing of clusters.
- Every crate forbids unsafe code but those that must have it.
- There is one version each of the crates whose types cross crate boundaries.";

/// The pure crates, and all that they may depend upon.
const PURE: [(&str, &[&str]); 3] = [
    ("bellwether-types", &["serde", "thiserror", "uuid"]),
    ("bellwether-core", &["bellwether-types", "serde", "thiserror"]),
    ("bellwether-agent-core", &["bellwether-types", "serde", "thiserror"]),
];

/// What the source of a pure crate may not name: time and chance are arguments there.
const IMPURE: [&str; 17] = [
    "std::fs",
    "std::net",
    "std::os",
    "std::process",
    "std::env",
    "std::thread",
    "std::time::Instant",
    "std::time::SystemTime",
    "std::time::UNIX_EPOCH",
    "tokio",
    "tonic",
    "prost",
    "openraft",
    "rand",
    "getrandom",
    "Uuid::new_v4",
    "Uuid::now_v7",
];

/// Who must not know whom.
const STRANGERS: [(&str, &[&str]); 4] = [
    (
        "bellwether-vmm",
        &[
            "bellwether-core",
            "bellwether-raft",
            "bellwether-agent-core",
            "bellwether-member",
            "bellwether-pki",
            "openraft",
        ],
    ),
    (
        "bellwether-agent",
        &["bellwether-controller", "bellwether-core", "bellwether-raft", "openraft"],
    ),
    (
        "bellwether-controller",
        &["bellwether-agent", "bellwether-agent-core", "bellwether-vmm", "kvm-ioctls"],
    ),
    ("bell", &["bellwether-controller", "bellwether-agent", "bellwether-core", "bellwether-raft"]),
];

/// Where unsafe code may be.
const MAY_BE_UNSAFE: [&str; 5] = [
    "bellwether-memory",
    "bellwether-vmm",
    "bellwether-claim",
    "bellwether-lease",
    "bellwether-fencer-kernel",
];

/// Their types go from crate to crate, so that two versions would not fit together.
const ONE_VERSION: [&str; 6] = ["vm-memory", "kvm-bindings", "tonic", "prost", "rustls", "zstd"];

pub fn run(arguments: &[&str]) -> Result<()> {
    if !options(arguments, &[], HELP)? {
        return Ok(());
    }
    let text = output(&mut cargo(&["metadata", "--format-version", "1", "--locked"]))?;
    let metadata: Value = serde_json::from_str(&text).context("read cargo's metadata")?;
    let workspace = Workspace::read(&metadata)?;
    let mut problems = workspace.forbidden_edges();
    problems.extend(workspace.double_versions());
    problems.extend(workspace.missing_forbids()?);
    problems.extend(workspace.impure_sources()?);
    match problems.is_empty() {
        true => {
            eprintln!("check-deps: {} crates keep the rules", workspace.members.len());
            Ok(())
        }
        false => bail!(
            "the rules of `cargo xtask check-deps --help` are broken:\n  {}",
            problems.join("\n  ")
        ),
    }
}

/// What matters of a crate of the workspace.
struct Member {
    name: String,
    directory: PathBuf,
    /// Normal ones; tests may use what they like.
    dependencies: BTreeSet<String>,
    /// The root files of its libraries and programs.
    roots: Vec<PathBuf>,
}

struct Workspace {
    members: Vec<Member>,
    versions: BTreeMap<String, BTreeSet<String>>,
}

impl Workspace {
    fn read(metadata: &Value) -> Result<Self> {
        let ids: BTreeSet<&str> =
            array(&metadata["workspace_members"]).iter().filter_map(Value::as_str).collect();
        let packages = array(&metadata["packages"]);
        let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for package in packages {
            versions.entry(text(&package["name"])).or_default().insert(text(&package["version"]));
        }
        let is_ours = |package: &&Value| package["id"].as_str().is_some_and(|id| ids.contains(id));
        let members: Vec<Member> = packages.iter().filter(is_ours).map(Member::read).collect();
        match members.is_empty() {
            true => bail!("cargo's metadata has no workspace members"),
            false => Ok(Self { members, versions }),
        }
    }

    fn forbidden_edges(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for member in &self.members {
            let name = member.name.as_str();
            let allowed = PURE.iter().find(|(pure, _)| *pure == name).map(|(_, allowed)| allowed);
            let strangers = STRANGERS.iter().find(|(who, _)| *who == name).map(|(_, whom)| whom);
            for dependency in &member.dependencies {
                if allowed.is_some_and(|allowed| !allowed.contains(&dependency.as_str())) {
                    problems.push(format!("{name} is pure and depends on {dependency}"));
                }
                if strangers.is_some_and(|strangers| strangers.contains(&dependency.as_str())) {
                    problems.push(format!("{name} must not know {dependency}"));
                }
            }
        }
        for (pure, _) in PURE {
            if !self.members.iter().any(|member| member.name == pure) {
                problems.push(format!("{pure} is not in the workspace any more; correct the list"));
            }
        }
        problems
    }

    fn double_versions(&self) -> Vec<String> {
        let found = ONE_VERSION.iter().filter_map(|name| Some((name, self.versions.get(*name)?)));
        found
            .filter(|(_, versions)| versions.len() > 1)
            .map(|(name, versions)| format!("{name} is there in several versions: {versions:?}"))
            .collect()
    }

    fn missing_forbids(&self) -> Result<Vec<String>> {
        let mut problems = Vec::new();
        let bound = self.members.iter().filter(|m| !MAY_BE_UNSAFE.contains(&m.name.as_str()));
        for root in bound.flat_map(|member| &member.roots) {
            if !read(root)?.contains("#![forbid(unsafe_code)]") {
                problems.push(format!("{} lacks #![forbid(unsafe_code)]", root.display()));
            }
        }
        Ok(problems)
    }

    fn impure_sources(&self) -> Result<Vec<String>> {
        let mut problems = Vec::new();
        for member in &self.members {
            if PURE.iter().any(|(pure, _)| *pure == member.name) {
                for file in rust_files(&member.directory.join("src"))? {
                    let found = impurities(&read(&file)?);
                    problems.extend(
                        found.iter().map(|path| format!("{} names {path}", file.display())),
                    );
                }
            }
        }
        Ok(problems)
    }
}

impl Member {
    fn read(package: &Value) -> Self {
        let manifest = PathBuf::from(text(&package["manifest_path"]));
        let normal = |dependency: &&Value| dependency["kind"].is_null();
        let is_root = |target: &&Value| {
            array(&target["kind"]).iter().any(|kind| matches!(kind.as_str(), Some("lib" | "bin")))
        };
        Self {
            name: text(&package["name"]),
            directory: manifest.parent().unwrap_or(Path::new(".")).to_owned(),
            dependencies: array(&package["dependencies"])
                .iter()
                .filter(normal)
                .map(|dependency| text(&dependency["name"]))
                .collect(),
            roots: array(&package["targets"])
                .iter()
                .filter(is_root)
                .map(|target| PathBuf::from(text(&target["src_path"])))
                .collect(),
        }
    }
}

/// What a pure source names and must not name.
fn impurities(source: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let firsts: BTreeSet<&str> = IMPURE.iter().filter_map(|path| path.split("::").next()).collect();
    for first in firsts {
        for path in source::paths(source, first) {
            let is_below = |impure: &str| {
                path.strip_prefix(impure)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
            };
            if IMPURE.iter().any(|impure| is_below(impure)) {
                found.insert(path);
            }
        }
    }
    found
}

fn rust_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let entries = std::fs::read_dir(directory);
    for entry in entries.with_context(|| format!("read {}", directory.display()))? {
        let path = entry?.path();
        // Tests may read a seed from the environment, or the clock.
        if path.file_stem().is_some_and(|stem| stem == "tests") {
            continue;
        }
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(files)
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn workspace(name: &str, dependencies: &[&str], versions: &[(&str, &str)]) -> Workspace {
        let deps: Vec<Value> =
            dependencies.iter().map(|name| json!({ "name": name, "kind": null })).collect();
        let dev = json!({ "name": "proptest", "kind": "dev" });
        let mut packages = vec![json!({
            "id": "ours", "name": name, "version": "0.1.0", "manifest_path": "/nowhere/Cargo.toml",
            "dependencies": deps.into_iter().chain([dev]).collect::<Vec<_>>(), "targets": [],
        })];
        packages.extend(
            versions
                .iter()
                .map(|(name, version)| json!({ "id": name, "name": name, "version": version })),
        );
        Workspace::read(&json!({ "workspace_members": ["ours"], "packages": packages })).unwrap()
    }

    #[test]
    fn a_pure_crate_with_a_runtime_is_found() {
        let problems = workspace("bellwether-core", &["serde", "tokio"], &[]).forbidden_edges();
        assert!(
            problems.contains(&"bellwether-core is pure and depends on tokio".to_owned()),
            "{problems:?}"
        );
        assert!(
            !problems
                .iter()
                .any(|problem| problem.contains("serde") || problem.contains("proptest"))
        );
    }

    #[test]
    fn strangers_and_double_versions_are_found() {
        let workspace =
            workspace("bellwether-vmm", &["openraft"], &[("tonic", "0.13.0"), ("tonic", "0.14.0")]);
        assert!(
            workspace
                .forbidden_edges()
                .contains(&"bellwether-vmm must not know openraft".to_owned())
        );
        assert_eq!(workspace.double_versions().len(), 1);
    }

    #[test]
    fn clocks_and_chance_in_a_source_are_found() {
        let source = "use std::time::{Duration, Instant};\nuse std::collections::BTreeMap;\nlet id = Uuid::new_v4();";
        let found: Vec<String> = impurities(source).into_iter().collect();
        assert_eq!(found, ["Uuid::new_v4", "std::time::Instant"]);
        assert!(impurities("use uuid::Uuid;\nlet d = std::time::Duration::ZERO;").is_empty());
    }
}
