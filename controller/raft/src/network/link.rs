//! Connections to other controllers: made once, shared, made again when they break.

use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

use crate::types::ControllerNode;

/// So many calls in a row may time out before the connection is taken for dead. One slow disk must
/// not cost a TLS handshake per heartbeat; a black hole must not be believed in for ever.
const TIMEOUTS_MAX: u32 = 3;

/// Why no connection was made.
pub type ConnectError = Box<dyn Error + Send + Sync>;

/// Makes the connection to a controller. TLS, and the proof that the peer is that controller,
/// belong to whoever implements this. HTTP/2 keep-alive is worth setting there: it finds a dead
/// connection sooner than calls that time out.
pub trait Connect: Send + Sync + 'static {
    /// Connects to controller `id`. The caller bounds the time that this takes.
    fn connect(
        &self,
        id: u64,
        node: ControllerNode,
    ) -> BoxFuture<'static, Result<Channel, ConnectError>>;
}

impl<F, Fut> Connect for F
where
    F: Fn(u64, ControllerNode) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Channel, ConnectError>> + Send + 'static,
{
    fn connect(
        &self,
        id: u64,
        node: ControllerNode,
    ) -> BoxFuture<'static, Result<Channel, ConnectError>> {
        Box::pin(self(id, node))
    }
}

/// One connection, or the attempt to make one.
pub(super) struct Link {
    pub id: u64,
    pub node: ControllerNode,
    connector: Arc<dyn Connect>,
    connect_timeout: Duration,
    state: Mutex<State>,
    timeouts: AtomicU32,
}

enum State {
    Idle,
    Connecting(Attempt),
    Ready { generation: u64, channel: Channel },
}

/// A connection in the making. It outlives the RPC that asked for it, whose time may be shorter
/// than a handshake; the next RPC finds it further on.
struct Attempt {
    generation: u64,
    task: JoinHandle<Result<Channel, String>>,
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A channel, and the connection that it belongs to.
#[derive(Clone)]
pub(super) struct Lease {
    generation: u64,
    pub channel: Channel,
}

impl Link {
    pub fn new(
        id: u64,
        node: ControllerNode,
        connector: Arc<dyn Connect>,
        connect_timeout: Duration,
    ) -> Self {
        let state = Mutex::new(State::Idle);
        Self { id, node, connector, connect_timeout, state, timeouts: AtomicU32::new(0) }
    }

    /// The connection, made now if there is none.
    pub async fn lease(&self) -> Result<Lease, String> {
        let mut state = self.state.lock().await;
        if let State::Idle = *state {
            *state = State::Connecting(self.attempt());
        }
        if let State::Connecting(attempt) = &mut *state {
            let generation = attempt.generation;
            let result = (&mut attempt.task).await;
            match result.unwrap_or_else(|error| Err(error.to_string())) {
                Ok(channel) => *state = State::Ready { generation, channel },
                Err(error) => {
                    *state = State::Idle;
                    return Err(error);
                }
            }
        }
        match &*state {
            State::Ready { generation, channel } => {
                Ok(Lease { generation: *generation, channel: channel.clone() })
            }
            State::Idle | State::Connecting(_) => Err("the connection was not made".into()),
        }
    }

    fn attempt(&self) -> Attempt {
        static GENERATION: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let connecting = self.connector.connect(self.id, self.node.clone());
        let (timeout, peer) = (self.connect_timeout, format!("{} {}", self.id, self.node));
        let task = tokio::spawn(async move {
            match tokio::time::timeout(timeout, connecting).await {
                Ok(result) => result.map_err(|error| format!("connect to {peer}: {error}")),
                Err(_) => Err(format!("connect to {peer}: no connection after {timeout:?}")),
            }
        });
        Attempt { generation: GENERATION.fetch_add(1, Ordering::Relaxed), task }
    }

    /// A call was answered.
    pub fn succeeded(&self) {
        self.timeouts.store(0, Ordering::Relaxed);
    }

    /// A call was not answered in time.
    pub fn timed_out(&self, lease: &Lease) {
        if self.timeouts.fetch_add(1, Ordering::Relaxed) + 1 >= TIMEOUTS_MAX {
            self.broken(lease);
        }
    }

    /// The connection does not work; the next call makes another.
    pub fn broken(&self, lease: &Lease) {
        self.timeouts.store(0, Ordering::Relaxed);
        // Whoever holds the lock is making another connection already.
        let Ok(mut state) = self.state.try_lock() else { return };
        if matches!(&*state, State::Ready { generation, .. } if *generation == lease.generation) {
            *state = State::Idle;
        }
    }
}
