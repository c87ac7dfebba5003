//! Rules that an administrator gives for a running cluster: where a VM had better be, what it must
//! not share a node with, when it may start, how often it is restarted; and what the cluster holds
//! back. All of them can be changed while the VM runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{NodeId, VmId};
use crate::spec::{NAME_LEN_MAX, RestartPolicy};

/// The most groups that one VM can be in.
pub const GROUPS_MAX: usize = 8;
/// The most VMs that one VM can wait for.
pub const START_AFTER_MAX: usize = 16;
/// The most restarts that a limit can allow.
pub const RESTARTS_MAX: u32 = 100;
/// The longest period of a restart limit, and of a quarantine: a week.
pub const PERIOD_S_MAX: u64 = 7 * 24 * 3_600;
/// The longest downtime that a VM can ask for: a minute.
pub const DOWNTIME_MS_MAX: u32 = 60_000;

/// When a VM that the cluster had to put elsewhere goes back to a node that it prefers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Failback {
    #[default]
    Never,
    Immediately,
    /// From the beginning of one hour of the day to the beginning of another, UTC.
    Within {
        from: u8,
        to: u8,
    },
}

impl Failback {
    /// Whether a VM may go back now, by a clock in milliseconds since 1970.
    pub fn allows(self, now_ms: u64) -> bool {
        let hour = now_ms / 3_600_000 % 24;
        match self {
            Self::Never => false,
            Self::Immediately => true,
            Self::Within { from, to } if from < to => {
                (u64::from(from)..u64::from(to)).contains(&hour)
            }
            Self::Within { from, to } => hour >= u64::from(from) || hour < u64::from(to),
        }
    }

    /// `never`, `immediately`, or hours of the day in UTC like `22-6`.
    pub fn from_word(word: &str) -> Option<Self> {
        match word {
            "never" => return Some(Self::Never),
            "immediately" => return Some(Self::Immediately),
            _ => {}
        }
        let (from, to) = word.split_once('-')?;
        let (from, to) = (from.parse().ok()?, to.parse().ok()?);
        let is_hour = |hour: u8| hour < 24;
        (is_hour(from) && is_hour(to) && from != to).then_some(Self::Within { from, to })
    }
}

impl fmt::Display for Failback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("never"),
            Self::Immediately => f.write_str("immediately"),
            Self::Within { from, to } => write!(f, "{from}-{to}"),
        }
    }
}

/// How much a rule weighs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strength {
    /// Kept as long as there is another way.
    Soft,
    /// Kept even if the VM cannot run then.
    Hard,
}

impl Strength {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Soft => "soft",
            Self::Hard => "hard",
        }
    }

    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Soft, Self::Hard].into_iter().find(|strength| strength.as_str() == word)
    }
}

/// What follows when the memory of a VM that is moved or saved changes faster than it is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PreCopy {
    /// The guest is stopped for as long as was predicted.
    #[default]
    Finish,
    /// The move ends with an error; the guest has noticed nothing.
    GiveUp,
    /// Memory is written with the guest stopped, always.
    Never,
}

impl PreCopy {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Finish => "finish",
            Self::GiveUp => "give-up",
            Self::Never => "never",
        }
    }

    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Finish, Self::GiveUp, Self::Never].into_iter().find(|one| one.as_str() == word)
    }
}

/// At most so many restarts by the cluster within a period; then the VM waits for a person.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RestartLimit {
    pub times: u32,
    pub period_s: u64,
}

/// The rules of one VM beyond its specification.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct VmRules {
    /// Nodes that suit it best, the best one first. Any other possible owner still will do.
    pub preferred_owners: Vec<NodeId>,
    pub failback: Failback,
    /// Groups whose members are kept on different nodes.
    pub anti_affinity: BTreeMap<String, Strength>,
    /// It is started only while all of these run.
    pub start_after: BTreeSet<VmId>,
    pub restart_limit: Option<RestartLimit>,
    pub pre_copy: PreCopy,
    /// How long its guest may stand still in a move, milliseconds; 0 leaves it to the VMM (50).
    pub downtime_ms: u32,
}

/// What is to be changed of a VM's rules; what is not named stays.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct VmPatch {
    pub possible_owners: Option<BTreeSet<NodeId>>,
    pub priority: Option<u32>,
    pub restart: Option<RestartPolicy>,
    pub preferred_owners: Option<Vec<NodeId>>,
    pub failback: Option<Failback>,
    pub anti_affinity: Option<BTreeMap<String, Strength>>,
    pub start_after: Option<BTreeSet<VmId>>,
    /// `Some(None)` takes the limit away.
    pub restart_limit: Option<Option<RestartLimit>>,
    pub pre_copy: Option<PreCopy>,
    pub downtime_ms: Option<u32>,
}

/// What an administrator sets for the cluster as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClusterSettings {
    /// A person's start is refused when the loss of so many nodes could not be taken any more.
    pub reserve_nodes: u32,
    /// A node that was lost so often within the window is put into quarantine; 0 never does.
    pub quarantine_exits: u32,
    pub quarantine_window_s: u64,
    /// How long a quarantine lasts.
    pub quarantine_s: u64,
    /// What all pre-copies from one node may write a second together, MiB; 0 sets no limit.
    pub pre_copy_mib_s: u32,
}

impl Default for ClusterSettings {
    fn default() -> Self {
        Self {
            reserve_nodes: 0,
            quarantine_exits: 3,
            quarantine_window_s: 3_600,
            quarantine_s: 3_600,
            pre_copy_mib_s: 0,
        }
    }
}

/// What is to be changed of the settings; what is not named stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ClusterPatch {
    pub reserve_nodes: Option<u32>,
    pub quarantine_exits: Option<u32>,
    pub quarantine_window_s: Option<u64>,
    pub quarantine_s: Option<u64>,
    pub pre_copy_mib_s: Option<u32>,
}

/// Why rules are refused. The text is for the administrator.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RuleError {
    #[error("the group `{0}`: use 1 to {NAME_LEN_MAX} letters, digits and hyphens")]
    Group(String),
    #[error("{0} anti-affinity groups; at most {GROUPS_MAX} fit")]
    TooManyGroups(usize),
    #[error("node {0} is given twice among the preferred owners")]
    PreferredTwice(NodeId),
    #[error("{0} VMs to start after; at most {START_AFTER_MAX} fit")]
    TooManyDependencies(usize),
    #[error("{0} restarts; give 1 to {RESTARTS_MAX}, or no limit")]
    Restarts(u32),
    #[error("a period of {0} s; give 1 s to 7 days")]
    Period(u64),
    #[error("the hours {from} to {to}; give two different hours from 0 to 23")]
    Hours { from: u8, to: u8 },
    #[error("a downtime of {0} ms; give 1 to {DOWNTIME_MS_MAX}, or 0 for the default")]
    Downtime(u32),
    #[error("{0} node losses before a quarantine; at most {RESTARTS_MAX}, or 0 for no quarantine")]
    Exits(u32),
}

impl VmRules {
    /// Checks everything that can be known without the cluster.
    pub fn validate(&self) -> Result<(), RuleError> {
        if self.anti_affinity.len() > GROUPS_MAX {
            return Err(RuleError::TooManyGroups(self.anti_affinity.len()));
        }
        if let Some(group) = self.anti_affinity.keys().find(|group| !is_group(group)) {
            return Err(RuleError::Group(group.clone()));
        }
        let preferred = &self.preferred_owners;
        let twice = preferred.iter().enumerate().find(|(i, node)| preferred[..*i].contains(node));
        if let Some((_, node)) = twice {
            return Err(RuleError::PreferredTwice(*node));
        }
        if self.start_after.len() > START_AFTER_MAX {
            return Err(RuleError::TooManyDependencies(self.start_after.len()));
        }
        match self.failback {
            Failback::Within { from, to } if from > 23 || to > 23 || from == to => {
                return Err(RuleError::Hours { from, to });
            }
            _ => {}
        }
        if self.downtime_ms > DOWNTIME_MS_MAX {
            return Err(RuleError::Downtime(self.downtime_ms));
        }
        self.restart_limit.map_or(Ok(()), RestartLimit::validate)
    }

    /// The place of a node in the order of preference; lower is better.
    pub fn preference(&self, node: NodeId) -> usize {
        let preferred = &self.preferred_owners;
        preferred.iter().position(|one| *one == node).unwrap_or(preferred.len())
    }

    /// Takes over what a patch names of these rules.
    pub fn change(&mut self, patch: VmPatch) {
        let VmPatch { preferred_owners, failback, anti_affinity, start_after, .. } = patch;
        replace(&mut self.preferred_owners, preferred_owners);
        replace(&mut self.failback, failback);
        replace(&mut self.anti_affinity, anti_affinity);
        replace(&mut self.start_after, start_after);
        replace(&mut self.restart_limit, patch.restart_limit);
        replace(&mut self.pre_copy, patch.pre_copy);
        replace(&mut self.downtime_ms, patch.downtime_ms);
    }
}

impl RestartLimit {
    fn validate(self) -> Result<(), RuleError> {
        match (self.times, self.period_s) {
            (1..=RESTARTS_MAX, 1..=PERIOD_S_MAX) => Ok(()),
            (1..=RESTARTS_MAX, period) => Err(RuleError::Period(period)),
            (times, _) => Err(RuleError::Restarts(times)),
        }
    }
}

impl ClusterSettings {
    pub fn validate(&self) -> Result<(), RuleError> {
        if self.quarantine_exits > RESTARTS_MAX {
            return Err(RuleError::Exits(self.quarantine_exits));
        }
        let periods = [self.quarantine_window_s, self.quarantine_s];
        match periods.into_iter().find(|period| !(1..=PERIOD_S_MAX).contains(period)) {
            Some(period) => Err(RuleError::Period(period)),
            None => Ok(()),
        }
    }

    /// Takes over what a patch names.
    pub fn change(&mut self, patch: ClusterPatch) {
        replace(&mut self.reserve_nodes, patch.reserve_nodes);
        replace(&mut self.quarantine_exits, patch.quarantine_exits);
        replace(&mut self.quarantine_window_s, patch.quarantine_window_s);
        replace(&mut self.quarantine_s, patch.quarantine_s);
        replace(&mut self.pre_copy_mib_s, patch.pre_copy_mib_s);
    }
}

fn replace<T>(old: &mut T, new: Option<T>) {
    if let Some(new) = new {
        *old = new;
    }
}

fn is_group(text: &str) -> bool {
    (1..=NAME_LEN_MAX).contains(&text.len())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_may_span_midnight() {
        let at = |hour: u64| (19_000 * 24 + hour) * 3_600_000;
        let night = Failback::from_word("22-6").unwrap();
        for (hour, allowed) in [(21, false), (22, true), (0, true), (5, true), (6, false)] {
            assert_eq!(night.allows(at(hour)), allowed, "{hour}");
        }
        assert!(Failback::from_word("9-17").unwrap().allows(at(9)));
        assert!(!Failback::from_word("9-17").unwrap().allows(at(17)));
        for bad in ["", "24-3", "3-3", "3", "-", "a-b", "sometimes"] {
            assert_eq!(Failback::from_word(bad), None, "{bad}");
        }
        for word in ["never", "immediately", "22-6"] {
            assert_eq!(Failback::from_word(word).unwrap().to_string(), word);
        }
    }

    #[test]
    fn bounds_are_checked() {
        let limit = |times, period_s| VmRules {
            restart_limit: Some(RestartLimit { times, period_s }),
            ..VmRules::default()
        };
        assert_eq!(limit(3, 600).validate(), Ok(()));
        assert_eq!(limit(0, 600).validate(), Err(RuleError::Restarts(0)));
        assert_eq!(limit(3, 0).validate(), Err(RuleError::Period(0)));
        let twice = VmRules { preferred_owners: vec![NodeId(1), NodeId(1)], ..VmRules::default() };
        assert_eq!(twice.validate(), Err(RuleError::PreferredTwice(NodeId(1))));
        let group = VmRules {
            anti_affinity: [("a b".into(), Strength::Hard)].into(),
            ..VmRules::default()
        };
        assert_eq!(group.validate(), Err(RuleError::Group("a b".into())));
    }
}
