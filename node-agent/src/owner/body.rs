//! The process of an incarnation, its directory and its connection.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bellwether_agent_core::{Incarnation, SealedState};
use bellwether_types::{Arbiter, BootId, Epoch, VmId};

use crate::process::{self, Process};
use crate::runtime_dir::{Home, IncarnationRecord, RuntimeError};
use crate::vmm::Vmm;

/// How long one try to connect to an adopted VMM may hold up its owner.
const RECONNECT_MAX: Duration = Duration::from_millis(500);

/// What an incarnation consists of on this host.
#[derive(Debug)]
pub struct Body {
    home: Home,
    record: IncarnationRecord,
    process: Option<Process>,
    vmm: Option<Vmm>,
    /// The state file that its guest comes from, while it may still be read.
    pub loaded_file: Option<PathBuf>,
}

impl Body {
    /// A new one, without a process. Its directory exists and its record is written when this
    /// returns.
    pub fn create(
        home: Home,
        vm_id: VmId,
        boot_id: BootId,
        epoch: Epoch,
        arbiter: Arbiter,
    ) -> Result<Self, RuntimeError> {
        let record = IncarnationRecord {
            vm_id,
            home: epoch,
            epoch,
            arbiter,
            boot_id,
            pid: None,
            start_ticks: None,
            loaded: None,
            loading: None,
            loaded_file: None,
            load_us: 0,
            may_have_run: false,
            claiming: None,
            claimed_from: None,
            prepare_us: 0,
            sealed: None,
        };
        home.create()?;
        home.write_record(&record)?;
        Ok(Self { home, record, process: None, vmm: None, loaded_file: None })
    }

    /// One that an earlier agent left. The process is taken only if it is the one that was started
    /// for this directory.
    pub fn adopt(home: Home, record: IncarnationRecord) -> std::io::Result<Self> {
        let socket = home.socket();
        let process = match find_process(&record, &socket) {
            Some(process) => Some(process),
            None => process::find_by_socket(&socket)?
                .into_iter()
                .find_map(|pid| open_checked(pid, &socket)),
        };
        let loaded_file = record.loaded_file.clone();
        Ok(Self { home, record, process, vmm: None, loaded_file })
    }

    pub fn home(&self) -> &Home {
        &self.home
    }
    pub fn home_epoch(&self) -> Epoch {
        self.record.home
    }
    pub fn record(&self) -> &IncarnationRecord {
        &self.record
    }
    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }
    pub fn vmm(&self) -> Option<&Vmm> {
        self.vmm.as_ref()
    }

    /// Why the VMM ended.
    pub fn exit_reason(&self) -> String {
        self.home.exit_reason()
    }

    /// The process is gone and reaped.
    pub fn forget_process(&mut self) {
        self.process = None;
        self.vmm = None;
    }

    /// Notes the process that was just started.
    pub fn started(&mut self, process: Process) -> Result<(), RuntimeError> {
        self.record.pid = Some(process.pid());
        self.record.start_ticks = Some(process.start_ticks());
        self.process = Some(process);
        self.home.write_record(&self.record)
    }

    pub fn set_vmm(&mut self, vmm: Vmm) {
        self.vmm = Some(vmm);
    }

    /// The connection, made now if it is not there. None while the VMM cannot be reached.
    pub async fn connected(&mut self) -> Option<&Vmm> {
        if self.vmm.is_none() {
            let process = self.process.as_ref()?;
            let socket = self.home.socket();
            let connect = Vmm::connect(&socket, process);
            match tokio::time::timeout(RECONNECT_MAX, connect).await {
                Ok(Ok(vmm)) => self.vmm = Some(vmm),
                Ok(Err(error)) => tracing::debug!(%error, "cannot reach the VMM"),
                Err(_) => tracing::debug!("the VMM has not opened its socket yet"),
            }
        }
        self.vmm.as_ref()
    }

    /// Writes the record, if the incarnation has changed in what a later agent has to know.
    pub fn save_record(&mut self, current: &Incarnation) -> Result<(), RuntimeError> {
        let record = IncarnationRecord {
            epoch: current.epoch,
            loaded: current.loaded,
            loading: current.loading,
            loaded_file: self.loaded_file.clone(),
            load_us: current.load_us,
            may_have_run: current.may_have_run,
            claiming: current.claiming,
            claimed_from: current.claimed_from,
            prepare_us: current.prepare_us,
            sealed: current.sealed.as_ref().map(|sealed| sealed.file.clone()),
            ..self.record.clone()
        };
        if record != self.record {
            self.home.write_record(&record)?;
            self.record = record;
        }
        Ok(())
    }

    /// The incarnation as far as the record tells; the VMM's status tells the rest.
    pub fn incarnation(&self) -> Incarnation {
        let record = &self.record;
        let mut found = Incarnation::preparing(record.epoch, record.arbiter);
        found.loaded = record.loaded;
        found.loading = record.loading;
        found.load_us = record.load_us;
        found.may_have_run = record.may_have_run;
        found.claiming = record.claiming;
        found.claimed_from = record.claimed_from;
        found.prepare_us = record.prepare_us;
        found.sealed = record.sealed.clone().map(SealedState::told_again);
        found.uncertain = true;
        if self.process.is_none() {
            found.end(&self.exit_reason());
        }
        found
    }
}

fn find_process(record: &IncarnationRecord, socket: &Path) -> Option<Process> {
    let process = open_checked(record.pid?, socket)?;
    (Some(process.start_ticks()) == record.start_ticks).then_some(process)
}

/// The pidfd comes first: what is checked afterwards cannot change its meaning any more.
fn open_checked(pid: u32, socket: &Path) -> Option<Process> {
    let process = Process::open(pid).ok()?;
    process::serves_socket(pid, socket).then_some(process)
}

/// Ends when the process of the incarnation has ended; never, if there is none.
pub async fn exit_of(body: Option<&Body>) {
    match body.and_then(Body::process) {
        Some(process) => {
            if let Err(error) = process.exited().await {
                tracing::error!(%error, pid = process.pid(), "cannot wait for the VMM");
                std::future::pending::<()>().await;
            }
        }
        None => std::future::pending().await,
    }
}
