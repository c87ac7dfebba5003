//! `bell context …`.

use std::net::SocketAddr;

use bellwether_member::KnownController;
use bellwether_proto::v1;
use serde_json::{Value, json};

use super::Session;
use super::cluster::cluster_status;
use crate::args::{ContextAdd, ContextCommand};
use crate::client::Cluster;
use crate::contexts::{Context, Contexts};
use crate::exit::{Exit, Failure};
use crate::output::contexts as contexts_table;

pub async fn run(session: &Session<'_>, command: ContextCommand) -> Result<(), Failure> {
    match command {
        ContextCommand::List => list(session),
        ContextCommand::Use { name } => use_context(session, &name),
        ContextCommand::Show { name } => show(session, name.as_deref()),
        ContextCommand::Add(args) => add(session, args),
        ContextCommand::Refresh { name } => refresh(session, name.as_deref()).await,
        ContextCommand::Remove { name } => remove(session, &name),
    }
}

fn to_json(all: &Contexts, name: &str, context: &Context) -> Value {
    let endpoints: Vec<_> = context.endpoints.iter().map(ToString::to_string).collect();
    json!({
        "name": name, "current": all.current.as_deref() == Some(name),
        "endpoints": endpoints, "identity": context.identity,
    })
}

fn list(session: &Session<'_>) -> Result<(), Failure> {
    let all = session.contexts()?.load()?;
    let json = all.contexts.iter().map(|(name, context)| to_json(&all, name, context)).collect();
    session.output.table(
        &json,
        &contexts_table(&all),
        "there are no contexts; see `bell context add --help`",
    )
}

fn use_context(session: &Session<'_>, name: &str) -> Result<(), Failure> {
    session.contexts()?.change(|all| {
        all.choose(Some(name))?;
        all.current = Some(name.to_owned());
        Ok(())
    })?;
    show(session, Some(name))
}

fn show(session: &Session<'_>, name: Option<&str>) -> Result<(), Failure> {
    let all = session.contexts()?.load()?;
    let (name, context) = all.choose(name.or(session.global.context.as_deref()))?;
    let only = Contexts {
        current: all.current.clone(),
        contexts: [(name.to_owned(), context.clone())].into(),
    };
    session.output.table(&to_json(&all, name, context), &contexts_table(&only), "")
}

fn add(session: &Session<'_>, args: ContextAdd) -> Result<(), Failure> {
    let identity = std::path::absolute(&args.identity).map_err(|error| {
        Failure::usage(format!("--identity {}: {error}", args.identity.display()))
    })?;
    let context = Context { endpoints: args.endpoints, identity };
    // Read it now: a wrong identity is better noticed here than at the next outage.
    Cluster::open(&args.name, &context, None)?;
    session.contexts()?.change(|all| {
        all.contexts.insert(args.name.clone(), context);
        if args.r#use || all.current.is_none() {
            all.current = Some(args.name.clone());
        }
        Ok(())
    })?;
    show(session, Some(&args.name))
}

async fn refresh(session: &Session<'_>, name: Option<&str>) -> Result<(), Failure> {
    let file = session.contexts()?;
    let all = file.load()?;
    let (name, context) = all.choose(name.or(session.global.context.as_deref()))?;
    let cluster = Cluster::open(name, context, session.global.timeout)?;
    let status = cluster_status(&cluster).await?;
    let endpoints = status.controllers.into_iter().filter_map(|it| it.member).map(endpoint);
    let endpoints = endpoints.collect::<Result<Vec<_>, _>>()?;
    if endpoints.is_empty() {
        return Err(Failure::new(Exit::Refused, "the cluster named no controllers"));
    }
    file.change(|all| {
        let context = all.contexts.get_mut(name);
        context.ok_or_else(|| gone(name)).map(|context| context.endpoints = endpoints)
    })?;
    show(session, Some(name))
}

fn endpoint(member: v1::Member) -> Result<SocketAddr, Failure> {
    let (id, name) = (member.id, member.name.clone());
    let known = KnownController::try_from(member).map_err(|error| {
        Failure::new(Exit::Refused, format!("controller {name} (number {id}): {error}"))
    })?;
    Ok(known.api_addr())
}

fn gone(name: &str) -> Failure {
    Failure::new(Exit::NotFound, format!("there is no context `{name}`"))
        .remedy("`bell context list` shows those that exist")
}

fn remove(session: &Session<'_>, name: &str) -> Result<(), Failure> {
    session.contexts()?.change(|all| {
        if all.contexts.remove(name).is_none() {
            return Err(gone(name));
        }
        all.current.take_if(|current| current == name);
        Ok(())
    })?;
    session.output.result(&json!({ "removed": name }), || format!("context {name} removed"))
}
