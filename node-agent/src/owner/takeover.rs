//! Takeover: the locks that prove that no other VMM of this VM can write.

use std::time::Duration;

use bellwether_agent_core::Answer;
use bellwether_proto::v1;
use bellwether_types::Handover;
use tonic::Code;

use super::execute::millis;
use super::{Command, Failure, Owner, Reply};
use crate::vmm::{CallError, bounded};

/// What taking the locks takes besides waiting for their holder.
const LOCK_MAX: Duration = Duration::from_secs(10);

impl Owner {
    pub(super) async fn lock(
        &mut self,
        command: &Command,
        wait: Duration,
    ) -> Result<Reply, Failure> {
        let epoch = command.stamped.epoch;
        let mut client = self.client()?;
        let request = v1::LockRequest { epoch: epoch.0, wait_ms: millis(wait) };
        let after = self.node.allow(LOCK_MAX).saturating_add(wait);
        match bounded("lock", after, self.recall(&command.stamped), client.lock(request)).await {
            Ok(status) if status.locked => {
                let handover = status.handover.map(Handover::try_from).transpose();
                let handover = handover.map_err(|error| Failure::internal(error.to_string()))?;
                Ok(Reply::Answer(Answer::TakenOver { handover }))
            }
            Ok(status) => Ok(Reply::NotHeld { holder: status.reason }),
            Err(CallError::Refused(status)) if is_held(status.code()) => {
                Ok(Reply::NotHeld { holder: status.message().to_owned() })
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// The codes with which a VMM says that somebody else holds the claim or a disk.
fn is_held(code: Code) -> bool {
    matches!(code, Code::FailedPrecondition | Code::Aborted)
}
