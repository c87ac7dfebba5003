//! A network in memory: connections of the product's own gRPC that are slow, cut, and torn.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use super::Chance;
use crate::ConnectError;

const PIPE_BYTES: usize = 64 << 10;
/// What waits for a way to open looks again after this.
const LOOK: Duration = Duration::from_millis(20);

struct Inner {
    inboxes: BTreeMap<u64, mpsc::UnboundedSender<DuplexStream>>,
    /// How often each has been started: a connection of an earlier life is gone.
    lives: BTreeMap<u64, u64>,
    cut: BTreeSet<(u64, u64)>,
    delay_ms_max: u64,
    chance: Chance,
}

#[derive(Clone)]
pub struct Net(Arc<Mutex<Inner>>);

impl Net {
    pub fn new(seed: u64) -> Self {
        let (inboxes, lives, cut) = Default::default();
        let chance = Chance::of(seed, 1);
        Self(Arc::new(Mutex::new(Inner { inboxes, lives, cut, delay_ms_max: 2, chance })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// A controller listens; what listened before under its number does not any more.
    pub fn listen(&self, id: u64) -> mpsc::UnboundedReceiver<DuplexStream> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut inner = self.inner();
        inner.inboxes.insert(id, sender);
        *inner.lives.entry(id).or_default() += 1;
        receiver
    }

    /// The controller is gone, and its connections with it.
    pub fn close(&self, id: u64) {
        let mut inner = self.inner();
        inner.inboxes.remove(&id);
        *inner.lives.entry(id).or_default() += 1;
    }

    /// Nothing goes from one to the other any more.
    pub fn cut(&self, from: u64, to: u64) {
        self.inner().cut.insert((from, to));
    }

    pub fn set_delay_ms_max(&self, delay_ms_max: u64) {
        self.inner().delay_ms_max = delay_ms_max;
    }

    pub fn heal(&self) {
        let mut inner = self.inner();
        inner.cut.clear();
        inner.delay_ms_max = 2;
    }

    fn is_cut(&self, from: u64, to: u64) -> bool {
        self.inner().cut.contains(&(from, to))
    }

    fn lives(&self, ends: [u64; 2]) -> [u64; 2] {
        let inner = self.inner();
        ends.map(|id| inner.lives.get(&id).copied().unwrap_or(0))
    }

    fn delay(&self) -> Duration {
        let mut inner = self.inner();
        let most = inner.delay_ms_max * 1_000;
        Duration::from_micros(inner.chance.below(most.max(1)))
    }

    /// A gRPC channel from one controller to another.
    pub async fn connect(self, from: u64, to: u64) -> Result<Channel, ConnectError> {
        let connector = service_fn(move |_| {
            let net = self.clone();
            async move { net.dial(from, to).await.map(TokioIo::new) }
        });
        Ok(Endpoint::from_static("http://peer").connect_with_connector(connector).await?)
    }

    async fn dial(&self, from: u64, to: u64) -> io::Result<DuplexStream> {
        while self.is_cut(from, to) || self.is_cut(to, from) {
            tokio::time::sleep(LOOK).await;
        }
        let inbox = self.inner().inboxes.get(&to).cloned();
        let inbox = inbox.ok_or(io::ErrorKind::ConnectionRefused)?;
        let (near, near_end) = duplex(PIPE_BYTES);
        let (far, far_end) = duplex(PIPE_BYTES);
        inbox.send(far).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        tokio::spawn(self.clone().carry(from, to, near_end, far_end));
        Ok(near)
    }

    /// Carries bytes both ways until one end is gone.
    async fn carry(self, from: u64, to: u64, near: DuplexStream, far: DuplexStream) {
        let ends = [from, to];
        let life = (ends, self.lives(ends));
        let (near_read, near_write) = tokio::io::split(near);
        let (far_read, far_write) = tokio::io::split(far);
        tokio::select! {
            () = self.copy((from, to), life, near_read, far_write) => {}
            () = self.copy((to, from), life, far_read, near_write) => {}
        }
    }

    async fn copy(
        &self,
        (from, to): (u64, u64),
        (ends, lives): ([u64; 2], [u64; 2]),
        mut reader: impl AsyncRead + Unpin,
        mut writer: impl AsyncWrite + Unpin,
    ) {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(length @ 1..) = reader.read(&mut buffer).await {
            tokio::time::sleep(self.delay()).await;
            while self.is_cut(from, to) {
                // A connection that is cut for long is torn at some time.
                if self.inner().chance.below(100) == 0 {
                    return;
                }
                tokio::time::sleep(LOOK).await;
            }
            let gone = self.lives(ends) != lives;
            if gone || writer.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    }
}
