//! `bell what-if …` and `bell explain …`: questions that change nothing.

use bellwether_proto::v1;
use bellwether_types::NodeId;

use super::{Session, node};
use crate::args::{CreateArgs, ExplainCommand, WhatIfCommand};
use crate::client::Cluster;
use crate::exit::{Failure, Subject};
use crate::output::{ToJson, forecast, task_explanation, vm_explanation};
use crate::spec_file::{draft, owner_numbers};

pub async fn what_if(session: &Session<'_>, command: WhatIfCommand) -> Result<(), Failure> {
    let cluster = session.cluster()?;
    let request = match command {
        WhatIfCommand::NodeDown(nodes) => {
            v1::WhatIfRequest { nodes_down: nodes.all(), ..Default::default() }
        }
        WhatIfCommand::Drain(nodes) => {
            v1::WhatIfRequest { drain: nodes.all(), ..Default::default() }
        }
        WhatIfCommand::AddVm(args) => {
            let add_vm = Some(new_vm(&cluster, &args).await?);
            v1::WhatIfRequest { add_vm, ..Default::default() }
        }
    };
    let told = cluster
        .ask("look ahead", &Subject::Cluster, async |mut client| {
            client.what_if(request.clone()).await
        })
        .await?;
    session.output.result(&told.to_json(), || forecast(&told))
}

async fn new_vm(cluster: &Cluster, args: &CreateArgs) -> Result<v1::CreateVmRequest, Failure> {
    let mut draft = draft(args)?;
    if !draft.owners.is_empty() {
        let numbers = owner_numbers(&draft.owners, &node::all(cluster).await?)?;
        draft.spec.possible_owners = numbers.into_iter().map(NodeId).collect();
    }
    let spec = Some(v1::VmSpec::from(&draft.spec));
    Ok(v1::CreateVmRequest { spec, start: true, rules: Some(draft.rules), ..Default::default() })
}

pub async fn explain(session: &Session<'_>, command: ExplainCommand) -> Result<(), Failure> {
    let cluster = session.cluster()?;
    match command {
        ExplainCommand::Vm { vm } => {
            let request = v1::VmRequest { vm: vm.clone() };
            let what = format!("explain VM {vm}");
            let told = cluster
                .ask(&what, &Subject::Vm(vm), async |mut client| {
                    client.explain_vm(request.clone()).await
                })
                .await?;
            session.output.result(&told.to_json(), || vm_explanation(&told))
        }
        ExplainCommand::Task { id } => {
            let told = cluster
                .ask(&format!("explain task {id}"), &Subject::Task(id), async |mut client| {
                    client.explain_task(v1::TaskRequest { id }).await
                })
                .await?;
            session.output.result(&told.to_json(), || task_explanation(&told))
        }
    }
}
