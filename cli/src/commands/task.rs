//! `bell task …`.

use bellwether_proto::v1;

use super::Session;
use crate::args::TaskCommand;
use crate::exit::{Failure, Subject};
use crate::output::{ToJson, now_ms, task as task_sheet, tasks as tasks_table};

pub async fn run(session: &Session<'_>, command: TaskCommand) -> Result<(), Failure> {
    let cluster = session.cluster()?;
    match command {
        TaskCommand::List { all } => {
            let reply = cluster
                .ask("list the tasks", &Subject::Cluster, async |mut client| {
                    client.list_tasks(v1::ListTasksRequest { all }).await
                })
                .await?;
            let empty = "no task is under way; `bell task list --all` shows the ended ones";
            let table = tasks_table(&reply.tasks, now_ms());
            session.output.table(&reply.tasks.to_json(), &table, empty)
        }
        TaskCommand::Show { id } => {
            let task = cluster
                .ask(&format!("show task {id}"), &Subject::Task(id), async |mut client| {
                    client.get_task(v1::TaskRequest { id }).await
                })
                .await?;
            session.output.result(&task.to_json(), || task_sheet(&task, now_ms()))
        }
    }
}
