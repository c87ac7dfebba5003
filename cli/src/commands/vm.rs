//! `bell vm …`.

use bellwether_proto::v1;
use bellwether_types::NodeId;
use serde_json::json;
use tonic::{Response, Status};

use super::{Session, check_tasks, node};
use crate::args::{CreateArgs, OnNode, SetArgs, StopArgs, VmCommand};
use crate::client::{Client, Cluster};
use crate::console;
use crate::exit::{Failure, Subject};
use crate::output::{ToJson, migration, vm as vm_sheet, vms as vms_table};
use crate::spec_file::{draft, owner_numbers};

pub async fn run(session: &Session<'_>, command: VmCommand) -> Result<(), Failure> {
    // A specification that cannot be is refused before anybody is asked.
    if let VmCommand::Create(args) = command {
        return create(session, &args).await;
    }
    if let VmCommand::Set(args) = command {
        return set(session, &args).await;
    }
    let cluster = session.cluster()?;
    match command {
        VmCommand::List => list(session, &cluster).await,
        VmCommand::Show(name) => {
            let vm = get(&cluster, &name.vm).await?;
            session.output.result(&vm.to_json(), || vm_sheet(&vm))
        }
        VmCommand::Console(args) => console::run(session, &cluster, &args).await,
        VmCommand::Delete(name) => delete(session, &cluster, name.vm).await,
        other => {
            let reply = change(session, &cluster, other).await?;
            finish(session, &cluster, reply).await
        }
    }
}

/// The verbs that change a VM's state. Each is one request, sent once.
async fn change(
    session: &Session<'_>,
    cluster: &Cluster,
    command: VmCommand,
) -> Result<v1::VmReply, Failure> {
    let plain = |name: crate::args::VmName| v1::VmRequest { vm: name.vm };
    match command {
        VmCommand::Start(args) => {
            act(cluster, "start", &args.vm.clone(), placed(args), async |mut c, r| {
                c.start_vm(r).await
            })
            .await
        }
        VmCommand::Restore(args) => {
            act(cluster, "restore", &args.vm.clone(), placed(args), async |mut c, r| {
                c.restore_vm(r).await
            })
            .await
        }
        VmCommand::Migrate { vm, to } => {
            let request = v1::MigrateVmRequest { vm: vm.clone(), node: to.unwrap_or_default() };
            act(cluster, "migrate", &vm, request, async |mut c, r| c.migrate_vm(r).await).await
        }
        VmCommand::Shutdown(name) => {
            let request = v1::StopVmRequest { vm: name.vm.clone() };
            act(cluster, "shut down", &name.vm, request, async |mut c, r| c.shutdown_vm(r).await)
                .await
        }
        VmCommand::Stop(args) => {
            confirm_stop(session, &args)?;
            let request = v1::StopVmRequest { vm: args.vm.clone() };
            act(cluster, "stop", &args.vm, request, async |mut c, r| c.stop_vm(r).await).await
        }
        VmCommand::Pause(name) => {
            act(cluster, "pause", &name.vm.clone(), plain(name), async |mut c, r| {
                c.pause_vm(r).await
            })
            .await
        }
        VmCommand::Resume(name) => {
            act(cluster, "resume", &name.vm.clone(), plain(name), async |mut c, r| {
                c.resume_vm(r).await
            })
            .await
        }
        VmCommand::Save(name) => {
            act(cluster, "save", &name.vm.clone(), plain(name), async |mut c, r| c.save_vm(r).await)
                .await
        }
        VmCommand::Create(_)
        | VmCommand::Set(_)
        | VmCommand::List
        | VmCommand::Show(_)
        | VmCommand::Console(_)
        | VmCommand::Delete(_) => Err(Failure::usage("this verb does not change the VM's state")),
    }
}

fn placed(args: OnNode) -> v1::StartVmRequest {
    v1::StartVmRequest { vm: args.vm, node: args.on.unwrap_or_default() }
}

async fn act<R: Clone>(
    cluster: &Cluster,
    verb: &str,
    vm: &str,
    request: R,
    call: impl AsyncFn(Client, R) -> Result<Response<v1::VmReply>, Status>,
) -> Result<v1::VmReply, Failure> {
    let what = format!("{verb} VM {vm}");
    cluster
        .act(&what, &Subject::Vm(vm.to_owned()), async |client| call(client, request.clone()).await)
        .await
}

fn confirm_stop(session: &Session<'_>, args: &StopArgs) -> Result<(), Failure> {
    if args.yes {
        return Ok(());
    }
    let question = format!(
        "Switch VM {} off without asking the guest? What it has not written is lost. [y/N]",
        args.vm
    );
    match session.output.question(&question).as_deref() {
        Some("y" | "Y" | "yes") => Ok(()),
        Some(_) => Err(Failure::usage("nothing was done")
            .remedy(format!("`bell vm shutdown {}` asks the guest", args.vm))),
        None => {
            Err(Failure::usage(format!("VM {} is not stopped without a confirmation", args.vm))
                .remedy(format!("bell vm stop {} --yes", args.vm)))
        }
    }
}

async fn list(session: &Session<'_>, cluster: &Cluster) -> Result<(), Failure> {
    let reply = cluster
        .ask("list the VMs", &Subject::Cluster, async |mut client| {
            client.list_vms(v1::ListVmsRequest {}).await
        })
        .await?;
    let empty = "no VMs yet; see `bell vm create --help`";
    session.output.table(&reply.vms.to_json(), &vms_table(&reply.vms), empty)
}

async fn get(cluster: &Cluster, vm: &str) -> Result<v1::Vm, Failure> {
    let request = v1::VmRequest { vm: vm.to_owned() };
    let reply = cluster
        .ask(&format!("show VM {vm}"), &Subject::Vm(vm.to_owned()), async |mut client| {
            client.get_vm(request.clone()).await
        })
        .await?;
    Ok(reply.vm.unwrap_or_default())
}

async fn create(session: &Session<'_>, args: &CreateArgs) -> Result<(), Failure> {
    let mut draft = draft(args)?;
    let cluster = session.cluster()?;
    if !draft.owners.is_empty() {
        let numbers = owner_numbers(&draft.owners, &node::all(&cluster).await?)?;
        draft.spec.possible_owners = numbers.into_iter().map(NodeId).collect();
    }
    let request = v1::CreateVmRequest {
        spec: Some(v1::VmSpec::from(&draft.spec)),
        start: args.start,
        rules: Some(draft.rules),
        arbiter: args.arbiter.map(|arbiter| arbiter.to_string()).unwrap_or_default(),
    };
    let name = draft.spec.name;
    let reply =
        act(&cluster, "create", &name, request, async |mut c, r| c.create_vm(r).await).await?;
    finish(session, &cluster, reply).await
}

async fn set(session: &Session<'_>, args: &SetArgs) -> Result<(), Failure> {
    let changes = args.changes();
    if changes == v1::VmChanges::default() {
        return Err(Failure::usage(format!("nothing is to be changed of VM {}", args.vm))
            .remedy("`bell vm set --help` shows the rules"));
    }
    let cluster = session.cluster()?;
    let request = v1::SetVmRequest { vm: args.vm.clone(), changes: Some(changes) };
    let reply =
        act(&cluster, "change", &args.vm, request, async |mut c, r| c.set_vm(r).await).await?;
    let vm = reply.vm.unwrap_or_default();
    session.output.result(&vm.to_json(), || vm_sheet(&vm))
}

async fn delete(session: &Session<'_>, cluster: &Cluster, vm: String) -> Result<(), Failure> {
    let request = v1::VmRequest { vm: vm.clone() };
    cluster
        .act(&format!("delete VM {vm}"), &Subject::Vm(vm.clone()), async |mut client| {
            client.delete_vm(request.clone()).await
        })
        .await?;
    session.output.result(&json!({ "deleted": vm }), || {
        format!("VM {vm} is no longer in the cluster; its disks are where they were")
    })
}

/// Waits for the task that a verb has started, and shows the VM as it is then.
async fn finish(
    session: &Session<'_>,
    cluster: &Cluster,
    reply: v1::VmReply,
) -> Result<(), Failure> {
    let vm = reply.vm.unwrap_or_default();
    let ids: Vec<u64> = Some(reply.task).filter(|id| *id != 0).into_iter().collect();
    let Some(mut ended) = session.wait(cluster, &ids).await? else {
        let json = json!({ "vm": vm.to_json(), "task_id": reply.task, "task": null });
        let number = || ids.first().map(u64::to_string).unwrap_or_default();
        return session.output.result(&json, number);
    };
    let task = ended.pop();
    // By its id: another VM may have taken the name meanwhile.
    let vm = if task.is_some() { get(cluster, &vm.id).await.unwrap_or(vm) } else { vm };
    let json = json!({ "vm": vm.to_json(), "task_id": reply.task, "task": task.to_json() });
    session.output.result(&json, || summary(&vm, task.as_ref()))?;
    check_tasks(task.as_slice())
}

fn summary(vm: &v1::Vm, task: Option<&v1::Task>) -> String {
    let name = vm.spec.as_ref().map_or("", |spec| spec.name.as_str());
    let place = if vm.node.is_empty() { String::new() } else { format!(" on {}", vm.node) };
    match task {
        // Why is an error, and those go to standard error.
        Some(task) if task.outcome != "done" => String::new(),
        Some(task) if task.kind == "migrate" => migration(task),
        _ => format!("VM {name} is {}{place}", vm.state),
    }
}
