//! The agent with the real VMM and the test guest, under KVM. They fail where one of the
//! three is missing: BELLWETHER_VMM and BELLWETHER_TEST_GUEST name them, else they are looked for
//! where `cargo` builds them.

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use bellwether_agent::runtime_dir::IncarnationRecord;
use bellwether_proto::v1;
use common::{Lab, kill, new_vm, order};
use tonic::Status;

struct Real {
    lab: Lab,
    spec: v1::VmSpec,
    vm: String,
}

/// A part that is missing fails the test: a test that passes without running tells a lie.
fn find(variable: &str, built: PathBuf, remedy: &str) -> PathBuf {
    let path = std::env::var_os(variable).map_or(built, PathBuf::from);
    assert!(path.is_file(), "`{}` is missing: {remedy}, or name it in {variable}", path.display());
    path
}

fn parts() -> (PathBuf, PathBuf) {
    let own = std::env::current_exe().expect("a path");
    let target = own.parent().and_then(Path::parent).expect("target/debug/deps");
    let build = "build it with `cargo build -p bellwether-vmm`";
    let vmm = find("BELLWETHER_VMM", target.join("bellwether-vmm"), build);
    let guests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/guest/target/release");
    let build = "build it with `cargo build --release` in tests/guest";
    let guest = find("BELLWETHER_TEST_GUEST", guests.join("bellwether-guest"), build);
    let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    kvm.expect("/dev/kvm is needed, and the right to open it (often the group kvm)");
    (vmm, guest)
}

impl Real {
    async fn new() -> Self {
        let (vmm, guest) = parts();
        let mut lab = Lab::without_agent(vmm).await;
        lab.start_agent();
        lab.until("registered", |heard| !heard.registrations.is_empty()).await;
        let disk = lab.storage().join("disk.raw");
        let file = std::fs::File::create(&disk).expect("a disk");
        file.set_len(8 << 20).expect("a disk of 8 MiB");
        let spec = v1::VmSpec {
            name: "web-1".into(),
            vcpus: 1,
            memory_mib: 64,
            kernel: guest.canonicalize().expect("a guest").display().to_string(),
            disks: vec![v1::Disk {
                path: disk.display().to_string(),
                format: "raw".into(),
                read_only: false,
            }],
            restart: "restart".into(),
            ..v1::VmSpec::default()
        };
        Self { lab, spec, vm: new_vm() }
    }

    async fn prepare(&mut self, epoch: u64) -> Result<(), Status> {
        let request = v1::PrepareRequest {
            order: order(&self.vm, epoch),
            spec: Some(self.spec.clone()),
            arbiter: "storage".into(),
            storage: self.lab.storage().display().to_string(),
        };
        self.lab.client.prepare(request).await.map(drop)
    }

    /// Waits for a word on the guest's console.
    async fn console_says(&mut self, epoch: u64, word: &str) {
        let hello = v1::ConsoleUp { order: order(&self.vm, epoch), data: vec![] };
        let up = futures::StreamExt::chain(
            tokio_stream::iter([hello]),
            futures::stream::pending::<v1::ConsoleUp>(),
        );
        let mut down = self.lab.client.console(up).await.expect("a console").into_inner();
        let mut text = String::new();
        let read = async {
            while let Some(message) = down.message().await.expect("output") {
                text.push_str(&String::from_utf8_lossy(&message.data));
                if text.contains(word) {
                    return;
                }
            }
        };
        let read = tokio::time::timeout(Duration::from_secs(20), read).await;
        assert!(read.is_ok() && text.contains(word), "no `{word}` on the console: {text}");
    }

    async fn load(&mut self, epoch: u64, file: v1::StateFile) -> Result<(), Status> {
        let request = v1::LoadStateRequest { order: order(&self.vm, epoch), file: Some(file) };
        self.lab.client.load_state(request).await.map(drop)
    }
}

#[tokio::test]
async fn a_real_guest_boots_is_sealed_claimed_back_and_restored() {
    let mut real = Real::new().await;
    let vm = real.vm.clone();
    let storage = real.lab.storage().display().to_string();
    let inspect = v1::InspectRequest { spec: Some(real.spec.clone()), storage };
    let problems = real.lab.client.inspect(inspect).await.expect("inspect").into_inner().problems;
    assert_eq!(problems, Vec::<String>::new());

    real.prepare(1).await.expect("prepare");
    real.lab.activate(&vm, 1).await.expect("activate");
    real.lab.until_state(&vm, "running").await;
    real.console_says(1, "tick").await;

    let sealed = real.lab.seal(&vm, 1).await.expect("seal");
    assert_eq!(real.lab.seal(&vm, 1).await.expect("seal again"), sealed);
    let file = sealed.file.expect("a file");
    let back =
        v1::ClaimBackRequest { order: order(&vm, 2), sealed_epoch: 1, file: Some(file.clone()) };
    real.lab.client.claim_back(back).await.expect("claim back");
    assert!(!Path::new(&file.path).exists());
    real.console_says(2, "tick").await;

    let sealed = real.lab.seal(&vm, 2).await.expect("seal").file.expect("a file");
    assert_eq!(real.lab.release(&vm, 2).await.expect("release").reason, "stopped");
    real.prepare(3).await.expect("prepare to restore");
    real.load(3, sealed.clone()).await.expect("load");
    real.lab.activate_from(&vm, 3, &sealed.hash).await.expect("resume");
    real.console_says(3, "tick").await;
    real.lab.release(&vm, 3).await.expect("release");
}

#[tokio::test]
async fn a_real_vmm_outlives_its_agent() {
    let mut real = Real::new().await;
    let vm = real.vm.clone();
    real.prepare(1).await.expect("prepare");
    real.lab.activate(&vm, 1).await.expect("activate");
    real.lab.until_state(&vm, "running").await;
    let record = std::fs::read(real.lab.home(&vm, 1).join("incarnation.json")).expect("a record");
    let record: IncarnationRecord = serde_json::from_slice(&record).expect("a record");
    assert_eq!(record.pid, real.lab.vmm_pid(&vm, 1));
    real.lab.kill_agent();
    real.lab.restart_agent().await;
    real.lab.until_state(&vm, "running").await;
    real.console_says(1, "tick").await;
    kill(record.pid.expect("a process"));
    assert_eq!(real.lab.until_state(&vm, "failed").await.vms[&vm].reason, "killed");
    real.lab.release(&vm, 1).await.expect("release");
    real.prepare(2).await.expect("prepare");
    let takeover = v1::TakeOverRequest { order: order(&vm, 2), wait_ms: 0 };
    assert!(real.lab.client.take_over(takeover).await.expect("take over").into_inner().held);
    real.lab.activate(&vm, 2).await.expect("activate");
    real.console_says(2, "tick").await;
}

#[tokio::test]
async fn real_mistakes_are_named() {
    let mut real = Real::new().await;
    let vm = real.vm.clone();
    let text = real.lab.dir.path().join("text");
    std::fs::write(&text, "no kernel").expect("a file");
    let kernel = std::mem::replace(&mut real.spec.kernel, text.display().to_string());
    let storage = real.lab.storage().display().to_string();
    let inspect = v1::InspectRequest { spec: Some(real.spec.clone()), storage };
    let problems = real.lab.client.inspect(inspect).await.expect("inspect").into_inner().problems;
    assert!(problems[0].contains("is no kernel"), "{problems:?}");
    // The VMM reads the kernel when it starts.
    real.prepare(1).await.expect("prepare");
    let refused = real.lab.activate(&vm, 1).await.expect_err("no kernel");
    assert_eq!(refused.code(), tonic::Code::Aborted, "{refused}");
    assert!(refused.message().contains(&text.display().to_string()), "{refused}");
    assert_eq!(real.lab.vmm_pid(&vm, 1), None);
    real.spec.kernel = kernel;
    real.prepare(2).await.expect("prepare");
    let path = text.display().to_string();
    let file = v1::StateFile { path, hash: vec![0; 32], epoch: 1, bytes: 9 };
    let refused = real.load(2, file).await.expect_err("no state file");
    assert_eq!(refused.code(), tonic::Code::DataLoss, "{refused}");
}
