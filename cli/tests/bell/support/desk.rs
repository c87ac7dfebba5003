//! What the test server answers.

use std::pin::Pin;
use std::sync::Arc;

use bellwether_proto::v1::admin_server::Admin;
use bellwether_proto::v1::*;
use tokio::sync::Notify;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::{Calls, Conduct};

pub struct Desk {
    pub conduct: Conduct,
    pub calls: Calls,
    pub down: Arc<Notify>,
}

type Answer<T> = Result<Response<T>, Status>;
type Stream_<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn vm(name: &str, state: &str, node: &str) -> Vm {
    Vm {
        id: format!("id-of-{name}"),
        spec: Some(VmSpec { name: name.into(), vcpus: 1, memory_mib: 256, ..Default::default() }),
        desired: "running".into(),
        state: state.into(),
        node: node.into(),
        ..Default::default()
    }
}

fn node(name: &str, id: u64) -> Node {
    let phase = "online".into();
    Node { id, name: name.into(), phase, vms: vec!["web-1".into()], ..Default::default() }
}

fn draining(name: &str, id: u64, reason: &str) -> Node {
    Node { phase: "draining".into(), reason: reason.into(), ..node(name, id) }
}

fn in_maintenance(name: &str, id: u64) -> Node {
    Node { phase: "maintenance".into(), vms: vec![], ..node(name, id) }
}

/// Task 13 fails, all others succeed.
fn task(id: u64, step: &str, outcome: &str) -> Task {
    Task {
        id,
        kind: "migrate".into(),
        vm_name: "web-1".into(),
        step: step.into(),
        outcome: outcome.into(),
        error: if outcome == "failed" { "n2 has no memory left".into() } else { String::new() },
        source: "n1".into(),
        destination: "n2".into(),
        measures: [("outage_us".to_owned(), 18_260), ("stop_us".to_owned(), 1_200)].into(),
        ..Default::default()
    }
}

fn steps(id: u64) -> Vec<Task> {
    let end = if id == 13 { "failed" } else { "done" };
    vec![task(id, "prepare", "running"), task(id, "seal", "running"), task(id, "resume", end)]
}

impl Desk {
    /// Notes the call, and does what the server's conduct demands before any answer.
    async fn enter(&self, call: impl Into<String>) -> Result<(), Status> {
        self.calls.lock().unwrap().push(call.into());
        match self.conduct {
            Conduct::Serve | Conduct::BreakWatching => Ok(()),
            Conduct::Answer(status) => Err(status()),
            Conduct::Silent => std::future::pending().await,
            Conduct::Break => {
                self.down.notify_one();
                std::future::pending().await
            }
        }
    }

    /// How often a node was looked at since the last drain; 0 without one.
    fn looks_since_drain(&self) -> usize {
        let calls = self.calls.lock().unwrap();
        let drained = calls.iter().rposition(|call| call.starts_with("drain "));
        drained.map_or(0, |at| calls[at + 1..].iter().filter(|c| c.starts_with("node ")).count())
    }

    async fn work(&self, call: &str, name: &str, task: u64) -> Answer<VmReply> {
        self.enter(format!("{call} {name}")).await?;
        if name == "gone" {
            return Err(Status::not_found("there is no VM gone"));
        }
        Ok(Response::new(VmReply { vm: Some(vm(name, "running", "n1")), task }))
    }
}

#[tonic::async_trait]
impl Admin for Desk {
    async fn get_cluster_status(&self, _: Request<ClusterStatusRequest>) -> Answer<ClusterStatus> {
        self.enter("status").await?;
        let controller = |id: u64| ControllerStatus {
            member: Some(Member {
                id,
                name: format!("c{id}"),
                address: format!("127.0.0.{id}"),
                ports: Some(Ports { api: 7400, raft: 7401, join: 7402, agent: 7410 }),
            }),
            leader: id == 1,
            ..Default::default()
        };
        let controllers = vec![controller(1), controller(2)];
        let status = ClusterStatus { name: "lab".into(), controllers, ..Default::default() };
        Ok(Response::new(status))
    }
    async fn create_join_token(
        &self,
        request: Request<CreateJoinTokenRequest>,
    ) -> Answer<CreateJoinTokenReply> {
        let request = request.into_inner();
        self.enter(format!("token {} {}", request.role, request.ttl_s)).await?;
        let reply =
            CreateJoinTokenReply { token: "bw1.secret.sum".into(), expires_at_ms: u64::MAX };
        Ok(Response::new(reply))
    }
    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Answer<ListNodesReply> {
        self.enter("nodes").await?;
        Ok(Response::new(ListNodesReply { nodes: vec![node("n1", 1), node("n2", 2)] }))
    }
    async fn get_node(&self, request: Request<NodeRequest>) -> Answer<NodeReply> {
        let name = request.into_inner().node;
        self.enter(format!("node {name}")).await?;
        let looks = self.looks_since_drain();
        let (node, tasks) = match (looks, name.as_str()) {
            (0, _) => (node("n1", 1), vec![]),
            (_, "n2") => (draining("n2", 2, "web-1: n1 has 128 MiB left, 256 wanted"), vec![]),
            (2.., "resumed") => (node("resumed", 3), vec![]),
            (1, name) => (draining(name, 1, "its VMs are moving away"), vec![7]),
            (_, name) => (in_maintenance(name, 1), vec![]),
        };
        Ok(Response::new(NodeReply { node: Some(node), tasks }))
    }
    async fn drain_node(&self, request: Request<NodeRequest>) -> Answer<NodeReply> {
        let name = request.into_inner().node;
        self.enter(format!("drain {name}")).await?;
        let node = match name.as_str() {
            "empty" => in_maintenance("empty", 4),
            name => draining(name, 1, "its VMs are moving away"),
        };
        Ok(Response::new(NodeReply { node: Some(node), tasks: vec![7, 8] }))
    }
    async fn resume_node(&self, request: Request<NodeRequest>) -> Answer<NodeReply> {
        self.enter(format!("resume-node {}", request.get_ref().node)).await?;
        Ok(Response::new(NodeReply { node: Some(node("n1", 1)), tasks: vec![] }))
    }
    async fn confirm_node_down(&self, request: Request<NodeRequest>) -> Answer<NodeReply> {
        self.enter(format!("confirm {}", request.get_ref().confirm)).await?;
        Ok(Response::new(NodeReply { node: Some(node("n1", 1)), tasks: vec![] }))
    }
    async fn create_vm(&self, request: Request<CreateVmRequest>) -> Answer<VmReply> {
        let CreateVmRequest { spec, start, .. } = request.into_inner();
        let spec = spec.unwrap();
        self.enter(format!("create {} {:?} start={start}", spec.name, spec.possible_owners))
            .await?;
        Ok(Response::new(VmReply { vm: Some(vm(&spec.name, "stopped", "")), task: 0 }))
    }
    async fn set_vm(&self, request: Request<SetVmRequest>) -> Answer<VmReply> {
        let SetVmRequest { vm: name, changes } = request.into_inner();
        let changes = changes.unwrap_or_default();
        let prefer = changes.preferred_owners.map(|names| names.nodes).unwrap_or_default();
        self.enter(format!("set {name} {prefer:?} {}", changes.failback)).await?;
        let rules = VmRules {
            failback: changes.failback,
            anti_affinity: changes.anti_affinity.unwrap_or_default().groups,
            ..Default::default()
        };
        let vm = Vm { rules: Some(rules), ..vm(&name, "running", "n1") };
        Ok(Response::new(VmReply { vm: Some(vm), task: 0 }))
    }
    async fn set_cluster(&self, request: Request<SetClusterRequest>) -> Answer<ClusterStatus> {
        let reserve_nodes = request.get_ref().reserve_nodes.unwrap_or_default();
        self.enter(format!("set-cluster {reserve_nodes}")).await?;
        let settings = Some(ClusterSettings { reserve_nodes, ..Default::default() });
        Ok(Response::new(ClusterStatus { name: "lab".into(), settings, ..Default::default() }))
    }
    async fn unquarantine_node(&self, request: Request<NodeRequest>) -> Answer<NodeReply> {
        self.enter(format!("unquarantine {}", request.get_ref().node)).await?;
        Ok(Response::new(NodeReply { node: Some(node("n1", 1)), tasks: vec![] }))
    }
    async fn list_vms(&self, _: Request<ListVmsRequest>) -> Answer<ListVmsReply> {
        self.enter("vms").await?;
        Ok(Response::new(ListVmsReply { vms: vec![vm("web-1", "running", "n1")] }))
    }
    async fn get_vm(&self, request: Request<VmRequest>) -> Answer<VmReply> {
        let name = request.into_inner().vm;
        self.work("get", name.trim_start_matches("id-of-"), 0).await
    }
    async fn start_vm(&self, request: Request<StartVmRequest>) -> Answer<VmReply> {
        self.work("start", &request.get_ref().vm, 12).await
    }
    async fn shutdown_vm(&self, request: Request<StopVmRequest>) -> Answer<VmReply> {
        self.work("shutdown", &request.get_ref().vm, 12).await
    }
    async fn stop_vm(&self, request: Request<StopVmRequest>) -> Answer<VmReply> {
        self.work("stop", &request.get_ref().vm, 12).await
    }
    async fn pause_vm(&self, request: Request<VmRequest>) -> Answer<VmReply> {
        self.work("pause", &request.get_ref().vm, 0).await
    }
    async fn resume_vm(&self, request: Request<VmRequest>) -> Answer<VmReply> {
        self.work("resume", &request.get_ref().vm, 0).await
    }
    async fn migrate_vm(&self, request: Request<MigrateVmRequest>) -> Answer<VmReply> {
        let request = request.into_inner();
        let task = if request.node == "n2" { 13 } else { 12 };
        self.work("migrate", &request.vm, task).await
    }
    async fn save_vm(&self, request: Request<VmRequest>) -> Answer<VmReply> {
        self.work("save", &request.get_ref().vm, 12).await
    }
    async fn restore_vm(&self, request: Request<StartVmRequest>) -> Answer<VmReply> {
        self.work("restore", &request.get_ref().vm, 12).await
    }
    async fn delete_vm(&self, request: Request<VmRequest>) -> Answer<DeleteVmReply> {
        self.work("delete", &request.get_ref().vm, 0).await?;
        Ok(Response::new(DeleteVmReply {}))
    }
    async fn list_tasks(&self, _: Request<ListTasksRequest>) -> Answer<ListTasksReply> {
        self.enter("tasks").await?;
        Ok(Response::new(ListTasksReply { tasks: steps(12) }))
    }
    async fn get_task(&self, request: Request<TaskRequest>) -> Answer<Task> {
        self.enter("task").await?;
        Ok(Response::new(task(request.get_ref().id, "seal", "running")))
    }

    type WatchTaskStream = Stream_<Task>;
    async fn watch_task(&self, request: Request<TaskRequest>) -> Answer<Self::WatchTaskStream> {
        let id = request.get_ref().id;
        self.enter(format!("watch {id}")).await?;
        if matches!(self.conduct, Conduct::BreakWatching) {
            let (sender, receiver) = tokio::sync::mpsc::channel(1);
            sender.send(Ok(steps(id).remove(0))).await.unwrap();
            let down = Arc::clone(&self.down);
            // The connection must carry the first update before it breaks.
            tokio::spawn(async move {
                sender.reserve().await.unwrap();
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                down.notify_one();
            });
            let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
            return Ok(Response::new(Box::pin(stream)));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(steps(id).into_iter().map(Ok)))))
    }

    async fn what_if(&self, request: Request<WhatIfRequest>) -> Answer<Forecast> {
        let WhatIfRequest { nodes_down, drain, add_vm } = request.into_inner();
        let vm = add_vm.and_then(|new| new.spec).map(|spec| spec.name).unwrap_or_default();
        self.enter(format!("what-if {nodes_down:?} {drain:?} {vm}")).await?;
        let to = ForecastMove { vm: "web-1".into(), to: "n2".into(), ..Default::default() };
        Ok(Response::new(Forecast { moves: vec![to], finished: true, ..Default::default() }))
    }
    async fn explain_vm(&self, request: Request<VmRequest>) -> Answer<VmExplanation> {
        let vm = request.into_inner().vm;
        self.enter(format!("explain {vm}")).await?;
        let placed =
            Placement { node: "n1".into(), why: "n1 had room".into(), ..Default::default() };
        let verdict = |node: &str, reason: &str| NodeVerdict {
            node: node.into(),
            could_take_it: reason.is_empty(),
            reason: reason.into(),
            ..Default::default()
        };
        let nodes = vec![verdict("n1", "the VM runs there now"), verdict("n2", "")];
        Ok(Response::new(VmExplanation { vm, placed: Some(placed), nodes, ..Default::default() }))
    }
    async fn explain_task(&self, request: Request<TaskRequest>) -> Answer<TaskExplanation> {
        let id = request.get_ref().id;
        self.enter(format!("explain-task {id}")).await?;
        let event = Event { seq: 4, text: "n1 is not heard from".into(), ..Default::default() };
        let task = Some(task(id, "prepare", "running"));
        Ok(Response::new(TaskExplanation { task, events: vec![event] }))
    }

    type ValidateClusterStream = Stream_<Finding>;
    async fn validate_cluster(
        &self,
        _: Request<ValidateClusterRequest>,
    ) -> Answer<Self::ValidateClusterStream> {
        self.enter("validate").await?;
        let finding = |check: &str, verdict: &str| Finding {
            node: "n1".into(),
            check: check.into(),
            verdict: verdict.into(),
            text: format!("{check} was tried"),
        };
        let found =
            [finding("storage", "ok"), finding("watchdog", "off"), finding("power", "failed")];
        Ok(Response::new(Box::pin(tokio_stream::iter(found.map(Ok)))))
    }

    type ListEventsStream = Stream_<Event>;
    async fn list_events(&self, request: Request<EventsRequest>) -> Answer<Self::ListEventsStream> {
        let EventsRequest { after, follow } = request.into_inner();
        self.enter(format!("events {after}")).await?;
        let event = |seq| Event {
            seq,
            level: "info".into(),
            text: format!("event {seq}"),
            ..Default::default()
        };
        // A follower's stream ends early here, to be taken up again.
        let end = if follow { after + 2 } else { 5 };
        let events: Vec<_> = (after + 1..=end).map(|seq| Ok(event(seq))).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(events))))
    }

    type ConsoleStream = Stream_<ConsoleOutputFrame>;
    async fn console(
        &self,
        request: Request<Streaming<ConsoleInputFrame>>,
    ) -> Answer<Self::ConsoleStream> {
        let mut input = request.into_inner();
        let first = input.message().await?.unwrap_or_default();
        self.enter(format!("console {}", first.vm)).await?;
        let frame = |data: &[u8]| ConsoleOutputFrame { data: data.to_vec(), dropped: 0 };
        let greeting = tokio_stream::iter([Ok(frame(b"tick 1\ntick")), Ok(frame(b" 2\n"))]);
        // The guest echoes, and its console never ends by itself.
        let echo = input.map(move |typed| typed.map(|typed| frame(&typed.data)));
        Ok(Response::new(Box::pin(greeting.chain(echo).chain(tokio_stream::pending()))))
    }
}
