//! Pre-copy at either side of a move. The owner of the VM admits the order; the work itself takes
//! long and is done beside it, so that whatever else the VM needs does not wait (ADR 0013).

use std::time::Duration;

use bellwether_agent_core::Order;
use bellwether_proto::v1;
use tonic::{Status, Streaming};

use super::{AgentService, unexpected};
use crate::owner::{Details, Failure, Reply};
use crate::storage;
use crate::vmm::{CallError, Vmm, bounded};

/// A VM that was restored a moment ago is copied when its memory is here.
const BEGIN_MAX: Duration = Duration::from_secs(60);
/// Reading what one order names, on storage that is slow.
const LOAD_MAX: Duration = Duration::from_secs(60);

impl AgentService {
    pub(super) async fn start_pre_copy(
        &self,
        request: v1::StartPreCopyRequest,
    ) -> Result<Streaming<v1::PreCopyProgress>, Status> {
        let generation = request.order.as_ref().map_or(0, |order| order.task);
        let directory = storage::state_dir(request.storage.as_ref()).display().to_string();
        let details = Details::PreCopy { storage: request.storage.into() };
        let vmm = self.connection(request.order, Order::PreCopy, details).await?;
        let asked = v1::PreCopyRequest {
            directory,
            generation,
            downtime_ms: request.downtime_ms,
            finish_anyway: request.finish_anyway,
            rate_bytes_per_s: request.rate_bytes_per_s,
            tell_pieces: request.tell_pieces,
            ..v1::PreCopyRequest::default()
        };
        let mut client = vmm.client();
        bounded("pre-copy", BEGIN_MAX, None, client.pre_copy(asked)).await.map_err(status)
    }

    pub(super) async fn load_pieces(
        &self,
        request: v1::LoadPiecesRequest,
    ) -> Result<v1::LoadAheadReply, Status> {
        let v1::LoadPiecesRequest { order, path, epoch, generation, pieces } = request;
        let vmm = self.connection(order, Order::LoadAhead, Details::Plain).await?;
        if pieces.is_empty() {
            return Ok(v1::LoadAheadReply::default());
        }
        let asked = v1::LoadAheadRequest { path, epoch, generation, pieces };
        let mut client = vmm.client();
        bounded("load ahead", LOAD_MAX, None, client.load_ahead(asked)).await.map_err(status)
    }

    async fn connection(
        &self,
        order: Option<v1::Order>,
        what: Order,
        details: Details,
    ) -> Result<Vmm, Status> {
        match self.order(order, what, details).await? {
            Reply::Connection(vmm) => Ok(vmm),
            other => Err(unexpected(&other)),
        }
    }
}

fn status(error: CallError) -> Status {
    Failure::from(error).status
}
