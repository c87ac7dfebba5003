//! Commands about the cluster, its controllers and its nodes.

use bellwether_types::{BootId, FenceProof, MemberRole, NodeId, Ports, VmId};

use super::{About, Applied};
use crate::command::{Outcome, Registration, Rejection, RejectionKind};
use crate::fence::{self, NodeWatchdog};
use crate::state::{Cluster, Level, Liveness, Member, Node, State, Token};

/// Used and expired tokens are forgotten this long after they expired, milliseconds.
const TOKEN_MEMORY_MS: u64 = 24 * 3_600 * 1_000;

/// How many ended boots of a node are remembered.
const PAST_BOOTS_MAX: usize = 16;

pub(super) struct Newcomer {
    pub name: String,
    pub address: String,
    pub ports: Ports,
}

impl State {
    pub(super) fn init_cluster(&mut self, at: u64, cluster: Cluster, first: Member) -> Applied {
        if let Some(old) = &self.cluster {
            return match old.id == cluster.id {
                true => Ok(Outcome::Unchanged),
                false => {
                    Err(Rejection::conflict(format!("this is the cluster {} already", old.name)))
                }
            };
        }
        self.next_member = first.id + 1;
        self.controllers.insert(first.id, first);
        let text = format!("cluster {} was made", cluster.name);
        self.cluster = Some(cluster);
        self.event(at, Level::Info, About::default(), text);
        Ok(Outcome::Done)
    }

    pub(super) fn create_token(
        &mut self,
        at: u64,
        hash: [u8; 32],
        role: MemberRole,
        expires_at: u64,
    ) -> Applied {
        self.tokens.retain(|_, token| token.expires_at.saturating_add(TOKEN_MEMORY_MS) > at);
        self.tokens.insert(hash, Token { role, expires_at, used_by: None });
        let text = format!("a join token for one {} was made", role.as_str());
        self.event(at, Level::Info, About::default(), text);
        Ok(Outcome::Done)
    }

    pub(super) fn redeem_token(
        &mut self,
        at: u64,
        hash: [u8; 32],
        role: MemberRole,
        newcomer: Newcomer,
    ) -> Applied {
        self.check_token(at, &hash, role)?;
        self.check_member_name(role, &newcomer.name)?;
        let id = self.member_id(role, &newcomer.name);
        if let Some(token) = self.tokens.get_mut(&hash) {
            token.used_by = Some(newcomer.name.clone());
        }
        let text = format!("{} joins as {}", newcomer.name, role.as_str());
        self.event(at, Level::Info, About::node(&newcomer.name), text);
        let Newcomer { name, address, ports } = newcomer;
        match role {
            MemberRole::Controller => {
                self.controllers.insert(id, Member { id, name, address, ports });
            }
            MemberRole::Agent => {
                let node = Node {
                    id: NodeId(id),
                    name,
                    address,
                    agent_port: ports.agent,
                    liveness: Liveness::Joining,
                    cordoned: false,
                    boot_id: None,
                    past_boots: Vec::new(),
                    memory_mib: 0,
                    vcpus: 0,
                    version: String::new(),
                    losses: Vec::new(),
                    quarantined_until: None,
                    watchdog: None,
                };
                self.nodes.insert(node.id, node);
            }
        }
        Ok(Outcome::Member(id))
    }

    fn check_token(&self, at: u64, hash: &[u8; 32], role: MemberRole) -> Result<(), Rejection> {
        let remedy = "make a new one with `bell cluster join-token`";
        let Some(token) = self.tokens.get(hash) else {
            return Err(Rejection::denied(format!(
                "the join token is not one of this cluster; {remedy}"
            )));
        };
        if let Some(user) = &token.used_by {
            return Err(Rejection::denied(format!(
                "the join token was used already, by {user}; {remedy}"
            )));
        }
        if at >= token.expires_at {
            return Err(Rejection::denied(format!("the join token has expired; {remedy}")));
        }
        if token.role != role {
            return Err(Rejection::denied(format!(
                "the join token is for one {}, not for a {}; {remedy} --role {}",
                token.role.as_str(),
                role.as_str(),
                role.as_str(),
            )));
        }
        Ok(())
    }

    fn check_member_name(&self, role: MemberRole, name: &str) -> Result<(), Rejection> {
        let fits = name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.len() <= bellwether_types::spec::NAME_LEN_MAX
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
            // A node is also found by its number, so a name must not look like one.
            && !name.chars().all(|c| c.is_ascii_digit());
        if !fits {
            return Err(Rejection::invalid(format!(
                "`{name}` cannot name a host: use letters, digits and hyphens, not digits alone"
            )));
        }
        let taken = match role {
            MemberRole::Controller => self.controllers.values().any(|member| member.name == name),
            MemberRole::Agent => self.nodes.values().any(|node| node.name == name),
        };
        match taken {
            true => Err(Rejection::new(
                RejectionKind::AlreadyExists,
                format!("there is a {} named {name} already", role.as_str()),
            )),
            false => Ok(()),
        }
    }

    /// The controller and the agent of one host have the same number when they have the same name.
    fn member_id(&mut self, role: MemberRole, name: &str) -> u64 {
        let twin = match role {
            MemberRole::Agent => self.controllers.values().find(|m| m.name == name).map(|m| m.id),
            MemberRole::Controller => {
                self.nodes.values().find(|n| n.name == name).map(|node| node.id.0)
            }
        };
        twin.unwrap_or_else(|| {
            let id = self.next_member;
            self.next_member += 1;
            id
        })
    }

    pub(super) fn register_node(&mut self, at: u64, new: Registration) -> Applied {
        let Some(node) = self.nodes.get_mut(&new.node) else {
            return Err(Rejection::not_found(format!(
                "node {} is not a member of this cluster; join it again with a new token",
                new.node
            )));
        };
        if node.past_boots.contains(&new.boot_id) {
            return Err(Rejection::conflict(format!(
                "{}: boot {} has ended, a later one registered already. Do two hosts use one identity?",
                node.name, new.boot_id
            )));
        }
        let known = node.boot_id.filter(|known| *known != new.boot_id);
        if known.is_some() && new.replaces != known {
            return Err(Rejection::conflict(format!(
                "{}: another boot has registered, and the registration of boot {} does not name it, \
                 so it may be the older one",
                node.name, new.boot_id
            )));
        }
        if let Some(past) = known {
            node.past_boots.push(past);
            let surplus = node.past_boots.len().saturating_sub(PAST_BOOTS_MAX);
            node.past_boots.drain(..surplus);
        }
        let text = match (&node.liveness, node.boot_id) {
            (Liveness::Online, Some(boot)) if boot == new.boot_id => None,
            (_, Some(boot)) if boot == new.boot_id => Some("is back, in the same boot"),
            (_, Some(_)) => Some("registered with a new boot id: nothing of its old boot runs"),
            (_, None) => Some("registered"),
        };
        node.liveness = Liveness::Online;
        node.boot_id = Some(new.boot_id);
        node.address = new.address;
        node.agent_port = new.agent_port;
        node.memory_mib = new.memory_mib;
        node.vcpus = new.vcpus;
        node.version = new.version;
        let name = node.name.clone();
        if let Some(text) = text {
            self.event(at, Level::Info, About::node(&name), format!("{name} {text}"));
        }
        Ok(Outcome::Done)
    }

    pub(super) fn node_unknown(&mut self, at: u64, id: NodeId, boot_id: BootId) -> Applied {
        let Some(node) = self.nodes.get_mut(&id) else {
            return Ok(Outcome::Unchanged);
        };
        if node.boot_id != Some(boot_id) || node.liveness != Liveness::Online {
            return Ok(Outcome::Unchanged);
        }
        node.liveness = Liveness::Unknown { since: at };
        let name = node.name.clone();
        let text = format!("{name} is not heard from; it may still be running its VMs");
        self.event(at, Level::Warn, About::node(&name), text);
        self.count_loss(at, id);
        Ok(Outcome::Done)
    }

    pub(super) fn node_online(&mut self, at: u64, id: NodeId, boot_id: BootId) -> Applied {
        let Some(node) = self.nodes.get_mut(&id) else {
            return Ok(Outcome::Unchanged);
        };
        let back =
            matches!(node.liveness, Liveness::Unknown { .. }) && node.boot_id == Some(boot_id);
        if !back {
            return Ok(Outcome::Unchanged);
        }
        node.liveness = Liveness::Online;
        let name = node.name.clone();
        self.event(at, Level::Info, About::node(&name), format!("{name} is heard from again"));
        Ok(Outcome::Done)
    }

    /// What a renewal said of its node's watchdog.
    pub(super) fn note_watchdog(&mut self, at: u64, id: NodeId, said: NodeWatchdog) -> Applied {
        let Some(node) = self.nodes.get_mut(&id) else {
            return Ok(Outcome::Unchanged);
        };
        let boot = node.boot_id == Some(said.boot_id);
        if !boot || !fence::is_news(node, said.boot_id, said.nonce, &said.promise) {
            return Ok(Outcome::Unchanged);
        }
        let name = node.name.clone();
        let (level, text) = match &said.promise {
            Ok(bound) => (
                Level::Info,
                format!(
                    "{name} has armed its watchdog, which resets it after {} ms",
                    bound.watchdog_ms
                ),
            ),
            Err(reason) => (Level::Warn, format!("{name} promises no watchdog any more: {reason}")),
        };
        node.watchdog = Some(said);
        self.event(at, level, About::node(&name), text);
        Ok(Outcome::Done)
    }

    pub(super) fn cordon(&mut self, at: u64, id: NodeId, cordoned: bool) -> Applied {
        let Some(node) = self.nodes.get_mut(&id) else {
            return Err(Rejection::not_found(format!("there is no node {id}")));
        };
        if node.cordoned == cordoned {
            return Ok(Outcome::Unchanged);
        }
        node.cordoned = cordoned;
        let name = node.name.clone();
        if !cordoned {
            self.forget_stays(id);
        }
        let text = match cordoned {
            true => format!("{name} drains: its VMs move away and no VM is placed there"),
            false => format!("{name} takes VMs again"),
        };
        self.event(at, Level::Info, About::node(&name), text);
        Ok(Outcome::Done)
    }

    /// Says once that a VM stays where everything is to leave, and why. The VM is pending meanwhile.
    pub(super) fn stays(&mut self, at: u64, id: VmId, node: NodeId, why: &str) -> Applied {
        let leaves = self.nodes.get(&node).filter(|node| node.cordoned && node.is_online());
        let (Some(leaves), Some(vm)) = (leaves, self.vms.get_mut(&id)) else {
            return Ok(Outcome::Unchanged);
        };
        let here = vm.place.runner().is_some_and(|runner| runner.node == node);
        if !here || vm.task.is_some() || vm.pending.is_some() {
            return Ok(Outcome::Unchanged);
        }
        let stays = format!("stays on {}, which is drained: {why}", leaves.name);
        let text = format!("VM {} {stays}", vm.spec.name);
        vm.pending = Some(stays);
        self.event(at, Level::Warn, About::vm(id), text);
        Ok(Outcome::Done)
    }

    /// What runs on a node that takes VMs again may stay there.
    fn forget_stays(&mut self, node: NodeId) {
        let here: Vec<VmId> = self.vms_of(node).map(|vm| vm.id).collect();
        for id in here {
            if let Some(vm) = self.vms.get_mut(&id).filter(|vm| vm.task.is_none()) {
                vm.pending = None;
            }
        }
    }

    /// A word about a boot that is over, or about a node that is heard from after all, is no proof.
    pub(super) fn switched_off(
        &mut self,
        at: u64,
        id: NodeId,
        boot_id: BootId,
        device: String,
    ) -> Applied {
        let Some(node) = self.nodes.get_mut(&id) else {
            return Ok(Outcome::Unchanged);
        };
        let is_silent = matches!(node.liveness, Liveness::Unknown { .. });
        if !is_silent || node.boot_id != Some(boot_id) {
            return Ok(Outcome::Unchanged);
        }
        let (name, text) = (node.name.clone(), format!("{device} has switched {} off", node.name));
        node.liveness = Liveness::Fenced { proof: FenceProof::Power { device } };
        self.event(at, Level::Warn, About::node(&name), text);
        Ok(Outcome::Done)
    }

    pub(super) fn confirm_down(&mut self, at: u64, id: NodeId, who: String) -> Applied {
        let Some(node) = self.nodes.get_mut(&id) else {
            return Err(Rejection::not_found(format!("there is no node {id}")));
        };
        if node.is_online() {
            return Err(Rejection::conflict(format!(
                "{} is online: the cluster hears from it. To empty it, use `bell node drain {0}`",
                node.name
            )));
        }
        let proof = FenceProof::Operator { who: who.clone() };
        node.liveness = Liveness::Fenced { proof };
        let name = node.name.clone();
        let text =
            format!("{who} asserted that {name} is down; its VMs start elsewhere on that word");
        self.event(at, Level::Warn, About::node(&name), text);
        Ok(Outcome::Done)
    }
}
