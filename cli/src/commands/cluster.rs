//! `bell cluster …`.

use std::time::Duration;

use bellwether_member::{InitOptions, InitReport, MemberError, Ports, init_cluster};
use bellwether_proto::v1;
use serde_json::json;

use super::Session;
use crate::args::{ClusterCommand, ClusterSet, InitArgs, JoinRole};
use crate::client::Cluster;
use crate::contexts::{Context, ContextFile};
use crate::exit::{Exit, Failure, Subject};
use crate::output::{ToJson, cluster_status as status_sheet, coarse, finding_line, now_ms};

pub async fn run(session: &Session<'_>, command: ClusterCommand) -> Result<(), Failure> {
    match command {
        ClusterCommand::Init(args) => init(session, args),
        ClusterCommand::JoinToken { role, ttl } => join_token(session, role, ttl).await,
        ClusterCommand::Set(args) => set(session, &args).await,
        ClusterCommand::Validate => validate(session).await,
        ClusterCommand::Status => status(session).await,
    }
}

fn init(session: &Session<'_>, args: InitArgs) -> Result<(), Failure> {
    let file = session.contexts()?;
    let context = session.global.context.clone().unwrap_or_else(|| args.cluster_name.clone());
    // Before anything is made: a cluster without a context would be a nuisance to clean up.
    if file.load()?.contexts.contains_key(&context) {
        return Err(Failure::new(
            Exit::Conflict,
            format!("the context `{context}` exists already in {}", file.path().display()),
        )
        .remedy("name the new one with --context NAME, or forget the old one with `bell context remove`"));
    }
    let report = init_cluster(InitOptions {
        name: args.name.map_or_else(host_name, Ok)?,
        data_dir: args.data_dir,
        cluster_name: args.cluster_name,
        address: args.address,
        ports: Ports {
            api: args.api_port,
            raft: args.raft_port,
            join: args.join_port,
            ..Ports::default()
        },
        storage: args.storage,
        context_dir: file.dir().to_path_buf(),
        admin_name: "admin".to_owned(),
    })
    .map_err(|error| init_failure(&error))?;
    add_context(&file, &context, &report)?;
    show_init(session, &file, &context, &report)
}

fn init_failure(error: &MemberError) -> Failure {
    let exit = match error {
        MemberError::AlreadyAMember { .. }
        | MemberError::DataDirNotEmpty { .. }
        | MemberError::Storage { .. }
        | MemberError::StorageTaken { .. } => Exit::Conflict,
        MemberError::Refused(_) => Exit::Usage,
        _ => Exit::Refused,
    };
    let failure = Failure::new(exit, error.to_string());
    match error.remedy() {
        Some(remedy) => failure.remedy(remedy),
        None => failure,
    }
}

fn add_context(file: &ContextFile, name: &str, report: &InitReport) -> Result<(), Failure> {
    let context = Context { endpoints: vec![report.endpoint], identity: report.admin.dir.clone() };
    file.change(|all| {
        all.contexts.insert(name.to_owned(), context);
        all.current = Some(name.to_owned());
        Ok(())
    })
    .map_err(|failure| {
        let message = format!("the cluster was made, but not its context: {}", failure.message);
        Failure::new(failure.exit, message).remedy(format!(
            "bell context add {name} --endpoint {} --identity {} --use",
            report.endpoint,
            report.admin.dir.display()
        ))
    })
}

fn show_init(
    session: &Session<'_>,
    file: &ContextFile,
    context: &str,
    report: &InitReport,
) -> Result<(), Failure> {
    let next = format!("bellwether-controller run --data-dir {}", report.data_dir.display());
    let config = &report.config;
    let json = json!({
        "cluster_id": report.cluster_id.to_string(), "cluster_name": config.cluster_name,
        "id": config.id.0, "name": config.name, "data_dir": report.data_dir,
        "endpoint": report.endpoint.to_string(), "storage": config.storage,
        "identity": report.admin.dir, "context": context, "config": file.path(), "next": next,
    });
    session.output.result(&json, || {
        format!(
            "Made the cluster {} ({}).\n\
             \x20 first controller  {} at {}, files in {}\n\
             \x20 storage           {}\n\
             \x20 administrator     {}\n\
             \x20 context           {context}, now the current one, in {}\n\
             \n\
             Start the controller:  {next}\n\
             Then let hosts join:   bell cluster join-token --role agent",
            config.cluster_name,
            report.cluster_id,
            config.name,
            report.endpoint,
            report.data_dir.display(),
            config.storage.display(),
            report.admin.dir.display(),
            file.path().display(),
        )
    })
}

/// The first label of the host's name, as far as it can be a name here.
fn host_name() -> Result<String, Failure> {
    let system = rustix::system::uname();
    let full = system.nodename().to_string_lossy().into_owned();
    let label = full.split('.').next().unwrap_or_default().to_owned();
    match bellwether_member::check_name(&label) {
        Ok(()) => Ok(label),
        Err(_) => Err(Failure::usage(format!("this host's name `{full}` cannot name a member"))
            .remedy("give one with --name")),
    }
}

async fn join_token(session: &Session<'_>, role: JoinRole, ttl: Duration) -> Result<(), Failure> {
    let cluster = session.cluster()?;
    let role = role.as_str();
    // Seconds on the wire, and half a second of validity would be none.
    let ttl_s = ttl.as_secs().max(1);
    let request = v1::CreateJoinTokenRequest { role: role.to_owned(), ttl_s };
    let reply = cluster
        .act("make a join token", &Subject::Cluster, async |mut client| {
            client.create_join_token(request.clone()).await
        })
        .await?;
    let json = json!({ "token": reply.token, "role": role, "expires_at_ms": reply.expires_at_ms });
    session.output.result(&json, || reply.token.clone())?;
    let left = coarse(reply.expires_at_ms.saturating_sub(now_ms()));
    session
        .output
        .note(&format!("The token admits one {role} and is good for {left}. On the new host:"));
    session.output.note(&format!(
        "  bellwether-{role} join --token TOKEN --data-dir DIR --name NAME --address IP"
    ));
    if role == "controller" {
        session.output.note("and here, when it has joined:\n  bell context refresh");
    }
    Ok(())
}

/// What the cluster says of itself.
pub async fn cluster_status(cluster: &Cluster) -> Result<v1::ClusterStatus, Failure> {
    cluster
        .ask("show the cluster", &Subject::Cluster, async |mut client| {
            client.get_cluster_status(v1::ClusterStatusRequest {}).await
        })
        .await
}

async fn set(session: &Session<'_>, args: &ClusterSet) -> Result<(), Failure> {
    let request = args.request();
    if request == v1::SetClusterRequest::default() {
        return Err(Failure::usage("nothing is to be changed")
            .remedy("`bell cluster set --help` shows the settings"));
    }
    let status = session
        .cluster()?
        .act("change the cluster's settings", &Subject::Cluster, async |mut client| {
            client.set_cluster(request).await
        })
        .await?;
    session.output.result(&status.to_json(), || status_sheet(&status))
}

/// A line as soon as something has been tried; the whole as one JSON object.
async fn validate(session: &Session<'_>) -> Result<(), Failure> {
    let deed = "validate the cluster";
    let mut stream = session
        .cluster()?
        .ask(deed, &Subject::Cluster, async |mut client| {
            client.validate_cluster(v1::ValidateClusterRequest {}).await
        })
        .await?;
    let broken = |status| Failure::from_status(deed, &Subject::Cluster, &status);
    let mut findings = Vec::new();
    while let Some(finding) = stream.message().await.map_err(broken)? {
        if !session.output.is_json() {
            session.output.line(&finding_line(&finding))?;
        }
        findings.push(finding);
    }
    let bad = findings.iter().filter(|finding| finding.verdict == "failed").count();
    let all: Vec<_> = findings.iter().map(ToJson::to_json).collect();
    session.output.result(&json!({ "ok": bad == 0, "findings": all }), String::new)?;
    match bad {
        0 => Ok(()),
        _ => Err(Failure::new(Exit::Refused, format!("{bad} of {} checks failed", findings.len()))),
    }
}

async fn status(session: &Session<'_>) -> Result<(), Failure> {
    let status = cluster_status(&session.cluster()?).await?;
    session.output.result(&status.to_json(), || status_sheet(&status))
}
