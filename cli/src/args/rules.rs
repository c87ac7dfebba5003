//! Rules of VMs and settings of the cluster, as options.

use std::time::Duration;

use bellwether_proto::v1;
use bellwether_types::{Failback, PreCopy, RestartPolicy};
use clap::Args;

use crate::parse;

/// Takes a list of names away.
const NONE: &str = "none";

/// Rules that `create` and `set` take alike.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Rules")]
pub struct RuleArgs {
    /// Nodes that suit it best, the best one first, by name or number
    #[arg(long, value_name = "NODE,..", value_delimiter = ',')]
    pub prefer: Option<Vec<String>>,
    /// When the cluster moves it back to a node that it prefers, after it had to put it elsewhere:
    /// never, immediately, or within hours of the day in UTC like 22-6 [default: never]
    #[arg(long, value_name = "WHEN", value_parser = parse::failback)]
    pub failback: Option<Failback>,
    /// Groups whose VMs are kept on different nodes: `GROUP:hard` always, `GROUP:soft` if possible
    #[arg(long, value_name = "GROUP:HOW,..", value_delimiter = ',', value_parser = parse::apart)]
    pub apart: Option<Vec<(String, String)>>,
    /// VMs that have to run before it is started
    #[arg(long, value_name = "VM,..", value_delimiter = ',')]
    pub after: Option<Vec<String>>,
    /// How often the cluster brings it up again before it leaves it to a person, like 3/10m
    /// [default: no limit]
    #[arg(long, value_name = "N/TIME", value_parser = parse::restarts)]
    pub restarts: Option<(u32, Duration)>,
    /// When its memory changes faster than the storage takes it, a move or a save can `finish` with
    /// the outage that was predicted, or `give-up`; `never` writes all memory with the guest stopped
    /// [default: finish]
    #[arg(long, value_name = "HOW", value_parser = parse::pre_copy)]
    pub pre_copy: Option<PreCopy>,
    /// How long its guest may stand still in a move, milliseconds; 0 for the default [default: 50]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(..=60_000))]
    pub downtime_ms: Option<u32>,
}

impl RuleArgs {
    pub fn changes(&self) -> v1::VmChanges {
        let groups = |list: &Vec<(String, String)>| v1::Groups {
            groups: list.iter().filter(|(group, _)| group != NONE).cloned().collect(),
        };
        v1::VmChanges {
            preferred_owners: self.prefer.as_deref().map(nodes),
            failback: self.failback.map(|failback| failback.to_string()).unwrap_or_default(),
            anti_affinity: self.apart.as_ref().map(groups),
            start_after: self.after.as_deref().map(|vms| v1::VmNames { vms: listed(vms) }),
            restart_limit: self
                .restarts
                .map(|(times, period)| v1::RestartLimit { times, period_s: period.as_secs() }),
            pre_copy: self.pre_copy.map(PreCopy::as_str).unwrap_or_default().to_owned(),
            downtime_ms: self.downtime_ms,
            ..v1::VmChanges::default()
        }
    }
}

fn nodes(names: &[String]) -> v1::NodeNames {
    v1::NodeNames { nodes: listed(names) }
}

/// The names of a list; `none` alone is the empty one.
fn listed(names: &[String]) -> Vec<String> {
    names.iter().filter(|name| *name != NONE).cloned().collect()
}

#[derive(Args, Debug)]
pub struct SetArgs {
    /// Name or id
    pub vm: String,
    /// The nodes that may run it, by name or number; `none` for every node
    #[arg(long = "owner", value_name = "NODE,..", value_delimiter = ',')]
    pub owners: Option<Vec<String>>,
    /// Higher is restarted first
    #[arg(long, value_name = "N")]
    pub priority: Option<u32>,
    /// What to do when its node fails: restart or never
    #[arg(long, value_name = "POLICY", value_parser = parse::restart_policy)]
    pub restart: Option<RestartPolicy>,
    #[command(flatten)]
    pub rules: RuleArgs,
}

impl SetArgs {
    pub fn changes(&self) -> v1::VmChanges {
        let word = |policy| match policy {
            RestartPolicy::Restart => "restart".to_owned(),
            RestartPolicy::Never => "never".to_owned(),
        };
        v1::VmChanges {
            possible_owners: self.owners.as_deref().map(nodes),
            priority: self.priority,
            restart: self.restart.map(word).unwrap_or_default(),
            ..self.rules.changes()
        }
    }
}

#[derive(Args, Debug)]
pub struct ClusterSet {
    /// Refuse to start a VM when the cluster could not take the loss of so many nodes any more;
    /// 0 refuses none
    #[arg(long, value_name = "N")]
    pub reserve_nodes: Option<u32>,
    /// Put a node that is lost so often within the window into quarantine; 0 puts none there
    #[arg(long, value_name = "N")]
    pub quarantine_after: Option<u32>,
    /// The window in which losses of a node are counted
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    pub quarantine_window: Option<Duration>,
    /// How long a node in quarantine gets no new VMs
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    pub quarantine_time: Option<Duration>,
    /// What moves and saves of running VMs may write a second from one node, MiB; each move of a
    /// drain gets its part; 0 sets no limit
    #[arg(long, value_name = "MIB")]
    pub pre_copy_mib_s: Option<u32>,
}

impl ClusterSet {
    pub fn request(&self) -> v1::SetClusterRequest {
        v1::SetClusterRequest {
            reserve_nodes: self.reserve_nodes,
            quarantine_exits: self.quarantine_after,
            quarantine_window_s: self.quarantine_window.map(|time| time.as_secs()),
            quarantine_s: self.quarantine_time.map(|time| time.as_secs()),
            pre_copy_mib_s: self.pre_copy_mib_s,
        }
    }
}
