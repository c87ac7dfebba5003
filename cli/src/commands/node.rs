//! `bell node …`.

mod drain;

use bellwether_proto::v1;
use serde_json::json;

use super::{Session, check_tasks};
use crate::args::{ConfirmDown, NodeCommand};
use crate::client::Cluster;
use crate::exit::{Failure, Subject};
use crate::output::{ToJson, node as node_sheet, nodes as nodes_table};

pub async fn run(session: &Session<'_>, command: NodeCommand) -> Result<(), Failure> {
    let cluster = session.cluster()?;
    match command {
        NodeCommand::List => list(session, &cluster).await,
        NodeCommand::Show(name) => {
            let node = get(&cluster, &name.node).await?;
            session.output.result(&node.to_json(), || node_sheet(&node))
        }
        NodeCommand::Drain(name) => {
            let request = v1::NodeRequest { node: name.node, confirm: String::new() };
            let reply = act(&cluster, "drain", &request, async |mut client, request| {
                client.drain_node(request).await
            });
            let reply = reply.await?;
            match session.global.no_wait {
                true => finish(session, &cluster, reply).await,
                false => drain::wait(session, &cluster, reply).await,
            }
        }
        NodeCommand::Resume(name) => {
            let request = v1::NodeRequest { node: name.node, confirm: String::new() };
            let reply = act(&cluster, "resume", &request, async |mut client, request| {
                client.resume_node(request).await
            });
            finish(session, &cluster, reply.await?).await
        }
        NodeCommand::Unquarantine(name) => {
            let request = v1::NodeRequest { node: name.node, confirm: String::new() };
            let reply = act(&cluster, "end the quarantine of", &request, async |mut c, request| {
                c.unquarantine_node(request).await
            });
            finish(session, &cluster, reply.await?).await
        }
        NodeCommand::ConfirmDown(args) => confirm_down(session, &cluster, args).await,
    }
}

pub async fn all(cluster: &Cluster) -> Result<Vec<v1::Node>, Failure> {
    let reply = cluster
        .ask("list the nodes", &Subject::Cluster, async |mut client| {
            client.list_nodes(v1::ListNodesRequest {}).await
        })
        .await?;
    Ok(reply.nodes)
}

async fn list(session: &Session<'_>, cluster: &Cluster) -> Result<(), Failure> {
    let nodes = all(cluster).await?;
    session.output.table(
        &nodes.to_json(),
        &nodes_table(&nodes),
        "no nodes yet; make a token for one with `bell cluster join-token --role agent`",
    )
}

async fn get(cluster: &Cluster, node: &str) -> Result<v1::Node, Failure> {
    Ok(look(cluster, node).await?.node.unwrap_or_default())
}

/// The node, and the tasks that are moving its VMs.
async fn look(cluster: &Cluster, node: &str) -> Result<v1::NodeReply, Failure> {
    let request = v1::NodeRequest { node: node.to_owned(), confirm: String::new() };
    cluster
        .ask(&format!("show node {node}"), &Subject::Node(node.to_owned()), async |mut client| {
            client.get_node(request.clone()).await
        })
        .await
}

async fn act(
    cluster: &Cluster,
    verb: &str,
    request: &v1::NodeRequest,
    call: impl AsyncFn(
        crate::client::Client,
        v1::NodeRequest,
    ) -> Result<tonic::Response<v1::NodeReply>, tonic::Status>,
) -> Result<v1::NodeReply, Failure> {
    let what = format!("{verb} node {}", request.node);
    cluster
        .act(&what, &Subject::Node(request.node.clone()), async |client| {
            call(client, request.clone()).await
        })
        .await
}

/// Waits for what the verb has started, and shows the node as it is then.
async fn finish(
    session: &Session<'_>,
    cluster: &Cluster,
    reply: v1::NodeReply,
) -> Result<(), Failure> {
    let node = reply.node.unwrap_or_default();
    let Some(ended) = session.wait(cluster, &reply.tasks).await? else {
        let json = json!({ "node": node.to_json(), "task_ids": reply.tasks, "tasks": null });
        let numbers = || reply.tasks.iter().map(|id| format!("{id}\n")).collect();
        return session.output.result(&json, numbers);
    };
    let node = if ended.is_empty() { node } else { get(cluster, &node.name).await? };
    let json = json!({ "node": node.to_json(), "task_ids": reply.tasks, "tasks": ended.to_json() });
    session.output.result(&json, || {
        let done = ended.iter().filter(|task| task.outcome == "done").count();
        match ended.len() {
            0 => format!("node {} is {}", node.name, node.phase),
            all => format!("node {} is {}; {done} of {all} tasks succeeded", node.name, node.phase),
        }
    })?;
    check_tasks(&ended)
}

async fn confirm_down(
    session: &Session<'_>,
    cluster: &Cluster,
    args: ConfirmDown,
) -> Result<(), Failure> {
    let node = get(cluster, &args.node).await?;
    let typed = match args.confirm {
        Some(name) => name,
        None => ask_for_name(session, &node)?,
    };
    if typed != node.name {
        return Err(Failure::usage(format!(
            "`{typed}` is not the name of node {}; nothing was done",
            node.name
        ))
        .remedy(format!("type `{}` if you are certain that it is off", node.name)));
    }
    let request = v1::NodeRequest { node: args.node, confirm: typed };
    let reply = act(cluster, "confirm the end of", &request, async |mut client, request| {
        client.confirm_node_down(request).await
    });
    finish(session, cluster, reply.await?).await
}

fn ask_for_name(session: &Session<'_>, node: &v1::Node) -> Result<String, Failure> {
    let vms = if node.vms.is_empty() { "none".to_owned() } else { node.vms.join(", ") };
    session.output.warning(&format!(
        "You assert that node {} is switched off and cannot write to any disk.",
        node.name
    ));
    session.output.note(&format!(
        "The cluster cannot check this. On your word it starts the node's VMs elsewhere ({vms}).\n\
         A runner that still lives keeps the locks of its disks, and the start waits for it.\n\
         Assert it only when the node is really off.\n\
         The assertion goes into the log with your name."
    ));
    session
        .output
        .question(&format!("Type the node's name ({}) to assert it:", node.name))
        .ok_or_else(|| {
            Failure::usage("there is no terminal to ask at")
                .remedy(format!("bell node confirm-down {0} --confirm {0}", node.name))
        })
}
