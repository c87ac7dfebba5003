//! `bell event …`.
//!
//! Events are numbered in the order of the replicated log, so that a stream which breaks is taken up
//! at another controller after the last number seen: nothing is lost and nothing comes twice.

use std::time::Duration;

use bellwether_member::CallFailure;
use bellwether_proto::v1;
use serde_json::Value;
use tokio::time::{Instant, sleep};
use tonic::{Code, Status};

use super::Session;
use crate::args::{EventCommand, EventList};
use crate::client::{Client, Cluster, ROUND_PAUSE, unreachable};
use crate::exit::{Exit, Failure, Subject};
use crate::output::{ToJson, event_line};
use crate::watch::before;

/// How long a follower tries to find a controller before it says that there is none.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// The same when only what has happened is wanted.
const LIST_SILENCE_MAX: Duration = Duration::from_secs(2);

pub async fn run(session: &Session<'_>, command: EventCommand) -> Result<(), Failure> {
    let EventCommand::List(args) = command;
    let cluster = session.cluster()?;
    let mut reader = Reader { session, seen: args.after, listed: Vec::new(), follow: args.follow };
    match before(cluster.deadline(), read(&cluster, &args, &mut reader)).await {
        Some(done) => done?,
        // A follower that was given a time has done what was asked when it has passed.
        None if args.follow => {}
        None => return Err(Failure::new(Exit::Unknown, "cannot list the events: time ran out")),
    }
    reader.end()
}

/// Takes events in order.
struct Reader<'a> {
    session: &'a Session<'a>,
    seen: u64,
    /// A list in JSON is one array, so that it is kept until its end.
    listed: Vec<v1::Event>,
    follow: bool,
}

impl Reader<'_> {
    fn take(&mut self, event: v1::Event) -> Result<(), Failure> {
        self.seen = self.seen.max(event.seq);
        match (self.session.output.is_json(), self.follow) {
            (true, false) => self.listed.push(event),
            (true, true) => self.session.output.line(&event.to_json().to_string())?,
            (false, _) => self.session.output.line(&event_line(&event))?,
        }
        Ok(())
    }

    fn end(self) -> Result<(), Failure> {
        match (self.session.output.is_json(), self.follow) {
            (true, false) => {
                let all: Value = self.listed.to_json();
                self.session.output.line(&all.to_string())
            }
            _ => Ok(()),
        }
    }
}

async fn read(cluster: &Cluster, args: &EventList, reader: &mut Reader<'_>) -> Result<(), Failure> {
    let silence_max = if args.follow { SILENCE_MAX } else { LIST_SILENCE_MAX };
    let mut heard = Instant::now();
    loop {
        let mut reasons = Vec::new();
        for &endpoint in cluster.endpoints() {
            match stream(cluster.client(endpoint), args.follow, reader, &mut heard).await? {
                Ok(()) if !args.follow => return Ok(()),
                Ok(()) => reasons.push((endpoint, "the controller ended the stream".to_owned())),
                Err(status) => reasons.push((endpoint, retry_reason(&status)?)),
            }
        }
        if heard.elapsed() > silence_max {
            return Err(unreachable("read the events", &reasons));
        }
        sleep(ROUND_PAUSE).await;
    }
}

/// Reads one stream to its end. The outer error is ours, the inner one the stream's.
async fn stream(
    mut client: Client,
    follow: bool,
    reader: &mut Reader<'_>,
    heard: &mut Instant,
) -> Result<Result<(), Status>, Failure> {
    let request = v1::EventsRequest { after: reader.seen, follow };
    let mut stream = match client.list_events(request).await {
        Ok(reply) => reply.into_inner(),
        Err(status) => return Ok(Err(status)),
    };
    loop {
        match stream.message().await {
            Ok(Some(event)) => {
                *heard = Instant::now();
                reader.take(event)?;
            }
            Ok(None) => return Ok(Ok(())),
            Err(status) => {
                // A follower's stream may have been silent for hours before it broke.
                if follow {
                    *heard = Instant::now();
                }
                return Ok(Err(status));
            }
        }
    }
}

fn retry_reason(status: &Status) -> Result<String, Failure> {
    match CallFailure::of(status) {
        CallFailure::NotConnected(reason)
        | CallFailure::ServerRefused(reason)
        | CallFailure::NotStarted(reason)
        | CallFailure::Lost(reason) => Ok(reason),
        CallFailure::ClientRefused(reason) => Err(Failure::new(Exit::Forbidden, reason)),
        CallFailure::Answered if status.code() == Code::Unavailable => {
            Ok(status.message().to_owned())
        }
        CallFailure::Answered => {
            Err(Failure::from_status("read the events", &Subject::Cluster, status))
        }
    }
}
