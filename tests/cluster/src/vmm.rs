//! VMM processes as they are: asked one by one on their own sockets, past all controllers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use bellwether_proto::v1;
use bellwether_proto::v1::vmm_client::VmmClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

/// A VMM that is well answers in microseconds; one that is being killed never does.
const ANSWER: Duration = Duration::from_secs(2);

/// One incarnation of a VM on one node: a VMM process, or what is left of it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Incarnation {
    pub node: usize,
    pub vm_id: String,
    /// The epoch under which it was prepared.
    pub home: u64,
    pub socket: PathBuf,
}

/// The directories of all incarnations of a VM, by the agents' layout `vms/<vm>.<epoch>`.
pub fn incarnations(runtime_dirs: &[(usize, PathBuf)], vm_id: &str) -> Vec<Incarnation> {
    let mut found: Vec<Incarnation> =
        runtime_dirs.iter().flat_map(|(node, dir)| of_node(*node, dir, vm_id)).collect();
    found.sort_by_key(|incarnation| incarnation.home);
    found
}

fn of_node(node: usize, runtime_dir: &Path, vm_id: &str) -> Vec<Incarnation> {
    let Ok(entries) = std::fs::read_dir(runtime_dir.join("vms")) else { return Vec::new() };
    let one = |entry: std::io::Result<std::fs::DirEntry>| {
        let dir = entry.ok()?.path();
        let (vm, home) = dir.file_name()?.to_str()?.rsplit_once('.')?;
        let socket = dir.join("api.sock");
        let home = home.parse().ok()?;
        (vm == vm_id).then(|| Incarnation { node, vm_id: vm.to_owned(), home, socket })
    };
    entries.filter_map(one).collect()
}

/// Connects to a VMM.
pub async fn connect(socket: &Path) -> Result<VmmClient<Channel>> {
    let path = socket.to_owned();
    let connector = service_fn(move |_uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://vmm.internal")
        .connect_with_connector(connector)
        .await
        .with_context(|| format!("connect to {}", socket.display()))?;
    Ok(VmmClient::new(channel))
}

/// What a VMM says of itself.
pub async fn status(socket: &Path) -> Result<v1::VmmStatus> {
    let ask = async {
        let reply = connect(socket).await?.status(v1::StatusRequest {}).await?;
        anyhow::Ok(reply.into_inner())
    };
    tokio::time::timeout(ANSWER, ask).await.context("the VMM does not answer")?
}
