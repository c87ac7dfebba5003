//! The step pre-copy: follows what the source writes while its guest runs, passes on to the
//! destination what is complete, and says when the guest may be stopped (ADR 0013).

use std::collections::VecDeque;
use std::future::{Future, pending};
use std::pin::Pin;
use std::time::Duration;

use bellwether_core::answer::Failure;
use bellwether_core::state::Runner;
use bellwether_core::task::{Measures, Retry};
use bellwether_core::{Attempt, StepEvent};
use bellwether_proto::v1;
use bellwether_proto::v1::MemoryPiece;
use tokio::time::{Instant, timeout_at};
use tonic::Streaming;

use super::orders::{Orders, Result};

/// Pieces of one order: at most 64 MiB of memory, so that the destination answers again and again.
const PIECES_MAX: usize = 64;
/// So long a source that is ready waits for a destination that lags behind; what it has not read by
/// then comes on demand. One that has not answered for so long is not worth stopping the guest for.
const LAG_MAX: Duration = Duration::from_secs(5);
/// A source that has nothing to tell for so long is asked again: its agent may be gone.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Who is told how it goes.
pub type OnProgress<'a> = &'a (dyn Fn(Measures) + Send + Sync);

/// A pre-copy that the leader follows.
pub struct PreCopy<'a> {
    orders: &'a Orders<'a>,
    load_at: Option<Attempt>,
    on_progress: OnProgress<'a>,
    /// The last message, without its pieces.
    last: v1::PreCopyProgress,
    /// Told by the source, and not asked of the destination yet.
    waiting: VecDeque<MemoryPiece>,
    ready_since: Option<Instant>,
    /// When the destination was asked for what it has not answered yet.
    asked_at: Option<Instant>,
    left_out: u64,
}

type Load<'a> = Pin<Box<dyn Future<Output = Result<v1::LoadAheadReply>> + Send + 'a>>;

impl<'a> PreCopy<'a> {
    pub fn new(
        orders: &'a Orders<'a>,
        load_at: Option<Attempt>,
        on_progress: OnProgress<'a>,
    ) -> Self {
        let (last, waiting) = (v1::PreCopyProgress::default(), VecDeque::new());
        let (ready_since, asked_at) = (None, None);
        Self { orders, load_at, on_progress, last, waiting, ready_since, asked_at, left_out: 0 }
    }

    /// Follows until the guest may be stopped. A side that does not know how leaves all to the seal.
    pub async fn follow(mut self, source: &Runner) -> Result<StepEvent> {
        let plain = StepEvent::PreCopied { measures: Measures::new() };
        if let Some(attempt) = self.load_at
            && !self.orders.can_load_ahead(attempt).await?
        {
            return Ok(plain);
        }
        let Some(mut stream) = self.orders.pre_copy(source, self.load_at.is_some()).await? else {
            return Ok(plain);
        };
        let mut load: Option<Load<'a>> = None;
        while !self.is_done(load.is_some()) {
            if load.is_none() {
                load = self.next_load();
            }
            let in_time = timeout_at(self.until(), self.hear(&mut stream, &mut load));
            match in_time.await {
                Ok(heard) => heard?,
                Err(_) if self.ready_since.is_some() => break,
                Err(_) => return Err(Failure::Unknown("the source says nothing".into())),
            }
        }
        self.check_destination()?;
        Ok(StepEvent::PreCopied { measures: self.measures() })
    }

    /// The source is ready, and the destination has all that it was told.
    fn is_done(&self, is_loading: bool) -> bool {
        self.ready_since.is_some() && self.waiting.is_empty() && !is_loading
    }

    /// Before the guest is stopped for it.
    fn check_destination(&self) -> Result<()> {
        match self.asked_at.is_some_and(|asked| asked.elapsed() >= LAG_MAX) {
            true => Err(Failure::Refused {
                error: format!("the destination gives no answer for {} s", LAG_MAX.as_secs()),
                retry: Retry::OtherNode,
            }),
            false => Ok(()),
        }
    }

    /// How long the next word may take.
    fn until(&self) -> Instant {
        match self.ready_since {
            Some(since) => since + LAG_MAX,
            None => Instant::now() + SILENCE_MAX,
        }
    }

    /// Waits for the source or the destination, whichever speaks first.
    async fn hear(
        &mut self,
        stream: &mut Streaming<v1::PreCopyProgress>,
        load: &mut Option<Load<'a>>,
    ) -> Result<()> {
        let loaded = async {
            match load {
                Some(load) => load.await,
                None => pending().await,
            }
        };
        tokio::select! {
            message = stream.message() => self.take(message),
            loaded = loaded => {
                (*load, self.asked_at) = (None, None);
                self.left_out += loaded?.left_out;
                Ok(())
            }
        }
    }

    fn take(
        &mut self,
        message: std::result::Result<Option<v1::PreCopyProgress>, tonic::Status>,
    ) -> Result<()> {
        let message = message.map_err(|status| Failure::Unknown(status.message().into()))?;
        let broken = || Failure::Unknown("the source has ended its report".into());
        let mut message = message.ok_or_else(broken)?;
        self.waiting.extend(std::mem::take(&mut message.pieces));
        self.last = message;
        (self.on_progress)(self.measures());
        match self.last.phase.as_str() {
            "copying" => {}
            "ready" => self.ready_since = self.ready_since.or_else(|| Some(Instant::now())),
            // It was sealed for this very task, on the word of an earlier leader.
            "saving" => {
                self.waiting.clear();
                self.ready_since = Some(Instant::now());
            }
            _ => {
                let error = self.last.reason.clone();
                return Err(Failure::Refused { error, retry: Retry::OtherNode });
            }
        }
        Ok(())
    }

    /// The next order to the destination, with all that waits for it.
    fn next_load(&mut self) -> Option<Load<'a>> {
        let attempt = self.load_at.filter(|_| !self.waiting.is_empty())?;
        let count = self.waiting.len().min(PIECES_MAX);
        let pieces = self.waiting.drain(..count).collect();
        let v1::PreCopyProgress { path, epoch, generation, .. } = self.last.clone();
        let orders = self.orders;
        self.asked_at = Some(Instant::now());
        Some(Box::pin(async move {
            let request = v1::LoadPiecesRequest { order: None, path, epoch, generation, pieces };
            orders.load_ahead(attempt, request).await
        }))
    }

    fn measures(&self) -> Measures {
        let last = &self.last;
        let parts = [
            ("precopy_rounds", u64::from(last.round) + 1),
            ("precopy_bytes", last.bytes_written),
            ("precopy_us", last.elapsed_us),
            ("residue_bytes", last.residue_bytes),
            ("dirty_bytes_per_s", last.dirty_bytes_per_s),
            ("bandwidth_bytes_per_s", last.bandwidth_bytes_per_s),
            ("predicted_outage_us", last.outage_us),
            ("pieces_left_out", self.left_out),
        ];
        parts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}
