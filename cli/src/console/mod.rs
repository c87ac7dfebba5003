//! The serial console of a VM, at a terminal or through pipes.
//!
//! ```text
//!  stdin --reader thread--> channel --> request stream --> controller --> agent --> guest
//!  guest --> ... --> response stream --> stdout, and the search for --until
//! ```
//!
//! The end of standard input ends only the input: what the guest prints goes on, until its console
//! ends, the text is seen, the time has passed, or a person types Ctrl-].

mod search;
mod terminal;

use std::io::{IsTerminal, Read};
use std::time::Duration;

use bellwether_member::CallFailure;
use bellwether_proto::v1;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::args::ConsoleArgs;
use crate::client::{Cluster, unreachable};
use crate::commands::Session;
use crate::exit::{Exit, Failure, Subject};
use search::Search;
use terminal::RawTerminal;

/// Ctrl-], as telnet and virsh have it.
const LEAVE: u8 = 0x1d;
/// Chunks of typed or piped input that wait for the network.
const INPUT_MAX: usize = 16;

/// How long one controller may take to find the VM's console.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the copying ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// The text of `--until` has appeared.
    Found,
    /// The time of `--for` has passed.
    Passed,
    /// A person typed Ctrl-].
    Left,
    /// The guest's console has ended.
    Closed,
}

/// What the reader of standard input saw.
enum Input {
    Bytes(Vec<u8>),
    Leave,
}

pub async fn run(
    session: &Session<'_>,
    cluster: &Cluster,
    args: &ConsoleArgs,
) -> Result<(), Failure> {
    let (frames, output) = open(cluster, &args.vm).await?;
    let at_terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    if at_terminal {
        session.output.note(&format!("Console of VM {}; Ctrl-] leaves.", args.vm));
    }
    let raw = if at_terminal { Some(RawTerminal::enter()?) } else { None };
    let ended = copy(session, cluster, args, frames, output, at_terminal).await;
    // Before anything is printed, so that lines are lines again.
    drop(raw);
    verdict(args, ended?)
}

fn verdict(args: &ConsoleArgs, end: End) -> Result<(), Failure> {
    match (end, &args.until) {
        (End::Found | End::Left, _) | (End::Passed | End::Closed, None) => Ok(()),
        (End::Passed, Some(text)) => {
            Err(Failure::new(Exit::Unknown, format!("`{text}` did not appear in time")))
        }
        (End::Closed, Some(text)) => {
            Err(Failure::new(Exit::Refused, format!("the console ended before `{text}` appeared")))
        }
    }
}

type Frames = mpsc::Sender<v1::ConsoleInputFrame>;

/// Opens the console at the first controller that serves it. Opening it changes nothing.
async fn open(
    cluster: &Cluster,
    vm: &str,
) -> Result<(Frames, Streaming<v1::ConsoleOutputFrame>), Failure> {
    let what = format!("open the console of VM {vm}");
    let mut reasons = Vec::new();
    for &endpoint in cluster.endpoints() {
        let (frames, requests) = mpsc::channel(INPUT_MAX);
        let first = v1::ConsoleInputFrame { vm: vm.to_owned(), data: Vec::new() };
        // The channel is empty and its receiver is here, so that this cannot fail.
        let _ = frames.try_send(first);
        let mut client = cluster.client(endpoint);
        let answer = client.console(ReceiverStream::new(requests));
        let Ok(answer) = timeout(OPEN_TIMEOUT, answer).await else {
            reasons.push((endpoint, "no answer".to_owned()));
            continue;
        };
        match answer {
            Ok(reply) => return Ok((frames, reply.into_inner())),
            Err(status) => match CallFailure::of(&status) {
                CallFailure::NotConnected(reason)
                | CallFailure::ServerRefused(reason)
                | CallFailure::ClientRefused(reason)
                | CallFailure::NotStarted(reason)
                | CallFailure::Lost(reason) => reasons.push((endpoint, reason)),
                CallFailure::Answered if status.code() == Code::Unavailable => {
                    reasons.push((endpoint, status.message().to_owned()));
                }
                CallFailure::Answered => {
                    return Err(Failure::from_status(&what, &Subject::Vm(vm.to_owned()), &status));
                }
            },
        }
    }
    Err(unreachable(&what, &reasons))
}

async fn copy(
    session: &Session<'_>,
    cluster: &Cluster,
    args: &ConsoleArgs,
    frames: Frames,
    mut output: Streaming<v1::ConsoleOutputFrame>,
    at_terminal: bool,
) -> Result<End, Failure> {
    let mut search = args.until.as_ref().map(|text| Search::new(text.as_bytes()));
    let mut input = read_stdin(at_terminal);
    let until = args.duration.map(|time| Instant::now() + time);
    let until = [until, cluster.deadline()].into_iter().flatten().min();
    let mut typing = true;
    let mut signals = terminal::Signals::new()?;
    loop {
        tokio::select! {
            frame = output.message() => match frame {
                Ok(Some(frame)) => {
                    if show(session, &frame, search.as_mut())? {
                        return Ok(End::Found);
                    }
                }
                Ok(None) => return Ok(End::Closed),
                Err(status) => return Err(broken(&args.vm, &status)),
            },
            typed = input.recv(), if typing => match typed {
                Some(Input::Bytes(data)) => {
                    // The stream's own end says why it ended; this only stops the typing.
                    let frame = v1::ConsoleInputFrame { vm: String::new(), data };
                    typing = frames.send(frame).await.is_ok();
                }
                Some(Input::Leave) => return Ok(End::Left),
                None => typing = false,
            },
            () = sleep_until(until) => return Ok(End::Passed),
            signal = signals.next() => return Err(signal),
        }
    }
}

/// Writes what the guest printed; whether the text of `--until` is complete with it.
fn show(
    session: &Session<'_>,
    frame: &v1::ConsoleOutputFrame,
    search: Option<&mut Search>,
) -> Result<bool, Failure> {
    if frame.dropped > 0 {
        session.output.note(&format!("[{} bytes of the console were lost here]\r", frame.dropped));
    }
    session.output.bytes(&frame.data)?;
    Ok(search.is_some_and(|search| search.feed(&frame.data)))
}

fn broken(vm: &str, status: &Status) -> Failure {
    let reason = match CallFailure::of(status) {
        CallFailure::Answered => {
            return Failure::from_status(
                &format!("go on with the console of VM {vm}"),
                &Subject::Vm(vm.to_owned()),
                status,
            );
        }
        CallFailure::NotConnected(reason)
        | CallFailure::ServerRefused(reason)
        | CallFailure::ClientRefused(reason)
        | CallFailure::NotStarted(reason)
        | CallFailure::Lost(reason) => reason,
    };
    Failure::new(Exit::Unreachable, format!("the console of VM {vm} broke off: {reason}"))
        .remedy(format!("open it again with `bell vm console {vm}`"))
}

async fn sleep_until(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// Reads standard input on a thread of its own. A read of a terminal cannot be cancelled, and a
/// thread that is not the runtime's does not keep the process from ending.
fn read_stdin(at_terminal: bool) -> mpsc::Receiver<Input> {
    let (sender, receiver) = mpsc::channel(INPUT_MAX);
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = stdin.read(&mut buffer) {
            let mut typed = &buffer[..length];
            // Only a person leaves by a key; a pipe may carry any byte.
            let leave = typed.iter().position(|byte| at_terminal && *byte == LEAVE);
            if let Some(end) = leave {
                typed = &typed[..end];
            }
            let bytes = Input::Bytes(typed.to_vec());
            if !typed.is_empty() && sender.blocking_send(bytes).is_err() {
                return;
            }
            if leave.is_some() {
                let _ = sender.blocking_send(Input::Leave);
                return;
            }
        }
    });
    receiver
}
