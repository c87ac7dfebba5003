//! `bell cluster validate`: tries what a failover relies on, while nothing has failed.
//!
//! Storage in a ring: each node makes a file and holds its lock, the next one looks. So each node's
//! writes and locks have been seen by another, and all of them see one storage and not copies of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bellwether_core::fence;
use bellwether_core::state::{Node, State};
use bellwether_proto::v1;
use bellwether_types::Arbiter;
use futures::stream;
use tokio::sync::mpsc;
use tonic::{Code, Request, Status};
use uuid::Uuid;

use super::{AdminApi, BoxStream};
use crate::controller::Controller;
use crate::lead::orders::storage;
use crate::lead::power;

/// One question to an agent.
const ASK: Duration = Duration::from_secs(15);
/// How long a lock that was let go may look as if it were held.
const LET_GO: Duration = Duration::from_secs(5);
const PACE: Duration = Duration::from_millis(20);
/// The hosts' wall clocks may differ by so much: a guest's clock goes by them when it moves.
const CLOCK_MS: u64 = 1000;

impl AdminApi {
    /// One finding after the other, as they come.
    pub(super) fn validation(&self) -> BoxStream<v1::Finding> {
        let (tell, findings) = mpsc::channel(16);
        tokio::spawn(Trial { controller: Arc::clone(&self.controller), tell }.run());
        Box::pin(stream::unfold(findings, |mut findings| async move {
            findings.recv().await.map(|finding| (Ok(finding), findings))
        }))
    }
}

struct Trial {
    controller: Arc<Controller>,
    tell: mpsc::Sender<v1::Finding>,
}

/// What is taken from the state at the beginning: trials wait for hosts, and a state is not kept so long.
struct Subject {
    nodes: Vec<Node>,
    storage: String,
    /// A VM under the lease arbiter, if there is one.
    leased: Option<String>,
}

impl Subject {
    fn of(state: &State) -> Self {
        let leased = state.vms.values().find(|vm| vm.arbiter == Arbiter::Lease);
        Self {
            nodes: state.nodes.values().cloned().collect(),
            storage: storage(state),
            leased: leased.map(|vm| vm.spec.name.clone()),
        }
    }
}

/// What the looker saw, and when by this controller's clock.
struct Seen {
    sight: v1::TrialSight,
    wall_offset_ms: i128,
}

impl Trial {
    async fn run(self) {
        let subject = Subject::of(&self.controller.state());
        let (online, silent): (Vec<&Node>, Vec<&Node>) =
            subject.nodes.iter().partition(|node| node.is_online());
        if subject.nodes.is_empty() {
            self.tell("", "agent", failed("the cluster has no nodes")).await;
        }
        for node in silent {
            self.tell(&node.name, "agent", failed("it is not online; nothing else is tried")).await;
        }
        let mut offsets = Vec::new();
        for (index, holder) in online.iter().enumerate() {
            let looker = online[(index + 1) % online.len()];
            let tried = self.try_storage(&subject.storage, holder, looker).await;
            let verdict = tried.map(|(text, offset)| {
                offsets.push((looker.name.clone(), offset));
                text
            });
            self.tell(&holder.name, "storage", verdict).await;
        }
        for (name, verdict) in clocks(&offsets) {
            self.tell(&name, "clock", verdict).await;
        }
        for node in online {
            self.try_proofs(subject.leased.as_deref(), node).await;
        }
    }

    async fn tell(&self, node: &str, check: &str, verdict: Verdict) {
        let (verdict, text) = match verdict {
            Ok(text) => ("ok", text),
            Err(Fault::Failed(text)) => ("failed", text),
            Err(Fault::Off(text)) => ("off", text),
        };
        let finding = v1::Finding {
            node: node.to_owned(),
            check: check.to_owned(),
            verdict: verdict.to_owned(),
            text,
        };
        // Whoever asked may have gone; what is left to try does no harm.
        let _gone = self.tell.send(finding).await;
    }

    /// One node writes and locks, another looks: while it is locked, and after it was let go.
    async fn try_storage(
        &self,
        storage: &str,
        holder: &Node,
        looker: &Node,
    ) -> Result<(String, i128), Fault> {
        let (storage, trial) = (storage.to_owned(), Uuid::new_v4().to_string());
        let request = v1::TrialRequest { storage, trial, remove: false };
        let tried = self.hold_and_look(&request, holder, looker).await;
        // Whatever came of it. Where this fails, too, a later trial sweeps the file.
        let _swept_later = self.look(holder, v1::TrialRequest { remove: true, ..request }).await;
        tried
    }

    async fn hold_and_look(
        &self,
        request: &v1::TrialRequest,
        holder: &Node,
        looker: &Node,
    ) -> Result<(String, i128), Fault> {
        let mut agent = self.controller.links.agent(holder).map_err(Fault::Failed)?;
        let by = |node: &Node| {
            let name = node.name.clone();
            move |status: Status| Fault::Failed(format!("{name}: {}", said(&status)))
        };
        let asked = agent.hold_trial(request.clone());
        let mut held = within(asked).await.map_err(by(holder))?.into_inner();
        let first = within(held.message()).await.map_err(by(holder))?;
        let first = first.ok_or_else(|| Fault::Failed(format!("{}: no answer", holder.name)))?;
        let seen = self.look(looker, request.clone()).await;
        judge_held(&holder.name, &looker.name, &first.word, seen.as_ref().map(|it| &it.sight))?;
        let offset = seen.map_err(by(looker))?.wall_offset_ms;
        drop(held);
        let begun = Instant::now();
        while self.look(looker, request.clone()).await.map_err(by(looker))?.sight.locked {
            if begun.elapsed() > LET_GO {
                let (holder, looker) = (&holder.name, &looker.name);
                let text = format!("{holder} let go of its lock, and {looker} still finds it held");
                return Err(Fault::Failed(text));
            }
            tokio::time::sleep(PACE).await;
        }
        let freed_ms = begun.elapsed().as_millis();
        let text = format!(
            "{} wrote, flushed and locked in {:.1} ms; {} read it and found it locked, and free {freed_ms} \
             ms after it was let go",
            holder.name,
            first.took_us as f64 / 1000.0,
            looker.name
        );
        Ok((text, offset))
    }

    async fn look(&self, node: &Node, request: v1::TrialRequest) -> Result<Seen, Status> {
        let mut agent = self.controller.links.agent(node).map_err(Status::unavailable)?;
        let mut request = Request::new(request);
        request.set_timeout(ASK);
        let asked_us = self.controller.clock.now_us();
        let sight = agent.look_at_trial(request).await?.into_inner();
        let middle_us = asked_us.midpoint(self.controller.clock.now_us());
        let wall_offset_ms = i128::from(sight.wall_ms) - i128::from(middle_us / 1000);
        Ok(Seen { sight, wall_offset_ms })
    }

    async fn try_proofs(&self, leased: Option<&str>, node: &Node) {
        let (watchdog, suspect_after_ms) = {
            let suspect_after_ms = self.controller.timing.suspect_after_ms;
            let yields = fence::yields(&self.controller.observed(), node, suspect_after_ms);
            (yields.into_iter().find(|it| it.proof == "watchdog"), suspect_after_ms)
        };
        let watchdog = match watchdog {
            Some(it) if it.after_ms.is_some() => Ok(it.text),
            Some(it) => Err(Fault::Off(it.text)),
            None => Err(Fault::Off(format!("nothing is known of it after {suspect_after_ms} ms"))),
        };
        let power = match power::ask(&self.controller, node.id, &node.name).await {
            None => off(&format!("there is no {}/{}.toml", power::DIRECTORY, node.name)),
            Some(Ok(true)) => Ok("its switch says that the host is on".to_owned()),
            Some(Ok(false)) => {
                failed("its switch says that the host is off, and its agent answers")
            }
            Some(Err(error)) => failed(&error),
        };
        let is_proven = watchdog.is_ok() || power.is_ok();
        self.tell(&node.name, "watchdog", watchdog).await;
        self.tell(&node.name, "power", power).await;
        if let Some(vm) = leased.filter(|_| !is_proven) {
            let text = format!(
                "VM {vm} is under the lease arbiter: if this node falls silent while running it, only a person \
                 can say that it is down"
            );
            self.tell(&node.name, "proof", failed(&text)).await;
        }
    }
}

type Verdict = Result<String, Fault>;

#[derive(Clone, PartialEq, Eq, Debug)]
enum Fault {
    Failed(String),
    /// Not set up, and nothing needs it.
    Off(String),
}

fn failed(text: &str) -> Verdict {
    Err(Fault::Failed(text.to_owned()))
}

fn off(text: &str) -> Verdict {
    Err(Fault::Off(text.to_owned()))
}

async fn within<T>(asked: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_| Status::deadline_exceeded(format!("no answer within {} s", ASK.as_secs()));
    tokio::time::timeout(ASK, asked).await.map_err(late)?
}

fn said(status: &Status) -> String {
    match status.code() {
        Code::Unimplemented => "its agent is of an older release and cannot try".to_owned(),
        _ => status.message().to_owned(),
    }
}

/// What it means that `looker` saw this while `holder` held a file with `word` in it.
fn judge_held(
    holder: &str,
    looker: &str,
    word: &str,
    seen: Result<&v1::TrialSight, &Status>,
) -> Result<(), Fault> {
    let text = match seen {
        Err(status) if status.code() == Code::NotFound => format!(
            "{looker} does not see what {holder} writes ({looker}: {}): these are two storages; mount \
             the same one on both",
            said(status)
        ),
        Err(status) => format!("{looker}: {}", said(status)),
        Ok(sight) if sight.word != word => {
            format!("{looker} reads something else than {holder} has written and flushed")
        }
        Ok(sight) if !sight.locked => format!(
            "{looker} could lock what {holder} holds locked: the locks of this storage do not hold \
             between hosts, and a VM could run twice"
        ),
        Ok(_) => return Ok(()),
    };
    Err(Fault::Failed(text))
}

/// Each node's wall clock against the median of all.
fn clocks(offsets: &[(String, i128)]) -> Vec<(String, Verdict)> {
    let mut sorted: Vec<i128> = offsets.iter().map(|(_, offset)| *offset).collect();
    sorted.sort_unstable();
    let Some(median) = sorted.get((sorted.len().saturating_sub(1)) / 2) else { return Vec::new() };
    let judge = |(name, offset): &(String, i128)| {
        let off_ms = offset - median;
        let verdict = match off_ms.unsigned_abs() <= u128::from(CLOCK_MS) {
            true => {
                Ok(format!("its wall clock is within {} ms of the others", off_ms.abs().max(1)))
            }
            false => failed(&format!(
                "its wall clock is {off_ms} ms off: synchronize it (NTP), a guest's clock jumps by that \
                 when it moves"
            )),
        };
        (name.clone(), verdict)
    };
    offsets.iter().map(judge).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sight(word: &str, locked: bool) -> v1::TrialSight {
        v1::TrialSight { word: word.into(), locked, wall_ms: 0 }
    }

    fn fault(seen: Result<&v1::TrialSight, &Status>) -> String {
        match judge_held("a", "b", "w", seen) {
            Err(Fault::Failed(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_the_word_under_a_lock_is_one_storage() {
        assert_eq!(judge_held("a", "b", "w", Ok(&sight("w", true))), Ok(()));
        assert!(fault(Ok(&sight("w", false))).contains("a VM could run twice"));
        assert!(fault(Ok(&sight("v", true))).contains("something else"));
        let missing = Status::not_found("/s/claims/trial-x: No such file or directory");
        assert!(fault(Err(&missing)).contains("two storages"));
        let other = Status::failed_precondition("it is mounted with \"nolock\"");
        assert!(fault(Err(&other)).contains("nolock"));
    }

    #[test]
    fn a_clock_that_is_off_is_named_and_the_others_are_not() {
        let offsets = [("a".to_owned(), 5), ("b".to_owned(), -3_600_000), ("c".to_owned(), 9)];
        let verdicts: Vec<bool> = clocks(&offsets).iter().map(|(_, it)| it.is_ok()).collect();
        assert_eq!(verdicts, [true, false, true]);
        assert!(clocks(&[]).is_empty());
    }
}
