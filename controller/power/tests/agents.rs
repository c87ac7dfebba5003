//! Real agent programs: a script that misbehaves as it is told, and `fence_dummy` of the package
//! fence-agents where that is installed.

#![allow(clippy::unwrap_used, reason = "all of it is a test")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bellwether_power::metadata::Problem;
use bellwether_power::outcome::Failure;
use bellwether_power::parameters::Parameters;
use bellwether_power::{PowerError, PowerState, Switch, SwitchConfig};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn running() -> Self {
        let host = Self { dir: tempfile::tempdir().unwrap() };
        std::fs::write(host.plug(), "on").unwrap();
        host
    }

    fn plug(&self) -> PathBuf {
        self.dir.path().join("plug")
    }

    fn is_off(&self) -> bool {
        std::fs::read_to_string(self.plug()).unwrap().trim() == "off"
    }

    fn config(&self, manner: &str) -> SwitchConfig {
        let agent = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/agents/fence_test");
        let plug = self.plug();
        let parameters =
            [("plug", plug.to_str().unwrap()), ("manner", manner), ("password", "hunter22")];
        SwitchConfig {
            agent: agent.to_str().unwrap().to_owned(),
            off_ms: 2_000,
            status_ms: 2_000,
            confirm_ms: 1_200,
            parameters: Parameters::new(parameters),
        }
    }

    fn switch(&self, manner: &str) -> Switch {
        Switch::new(self.config(manner)).unwrap().0
    }

    fn failure(&self, manner: &str) -> (&'static str, Failure, String) {
        match self.switch(manner).off().unwrap_err() {
            PowerError::Failed { action, source, said, .. } => (action, source, said),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn off_and_then_a_status_of_off_is_the_proof() {
    let host = Host::running();
    let switch = host.switch("well");
    assert_eq!(switch.status().unwrap(), PowerState::On);
    let proof = switch.off().unwrap();
    assert!(host.is_off() && proof.confirmed() >= proof.off());
    assert_eq!(switch.status().unwrap(), PowerState::Off);
    switch.on().unwrap();
    assert_eq!(switch.status().unwrap(), PowerState::On);
}

#[test]
fn a_host_that_takes_a_moment_is_waited_for() {
    let host = Host::running();
    host.switch("slow").off().unwrap();
    assert!(host.is_off());
}

#[test]
fn an_agent_that_lies_proves_nothing() {
    let host = Host::running();
    let refused = host.switch("lie").off().unwrap_err();
    assert!(matches!(refused, PowerError::StillOn { .. }), "{refused}");
    assert!(!host.is_off());
}

#[test]
fn an_agent_that_fails_proves_nothing_even_if_the_host_is_off() {
    let host = Host::running();
    let (action, source, _) = host.failure("fail-but-off");
    assert_eq!((action, source), ("off", Failure::Code { code: 1, meaning: "the agent failed" }));
}

#[test]
fn a_timeout_is_a_failure() {
    let host = Host::running();
    let started = Instant::now();
    assert_eq!(host.failure("hang").1, Failure::Timeout);
    assert!(started.elapsed() < Duration::from_secs(30), "it is not waited for");
}

/// Whether a process is gone, or ends within ten seconds: a signal needs a moment to arrive.
fn ends(pid: i32) -> bool {
    let Ok(process) = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()) else {
        return true;
    };
    let at_most = Timespec { tv_sec: 10, tv_nsec: 0 };
    poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&at_most)).unwrap() > 0
}

#[test]
fn whatever_an_agent_started_ends_with_it() {
    for manner in ["hang-in-child", "leave-child"] {
        let host = Host::running();
        let _ = host.switch(manner).off();
        let pid = std::fs::read_to_string(host.plug().with_extension("child")).unwrap();
        assert!(ends(pid.trim().parse().unwrap()), "{manner}: process {pid} goes on");
    }
}

#[test]
fn an_agent_that_never_stops_talking_is_stopped() {
    let host = Host::running();
    assert_eq!(host.failure("shout").1, Failure::Timeout);
}

#[test]
fn a_status_that_hangs_dies_or_contradicts_itself_is_no_proof() {
    for (manner, expected) in [
        ("hang-later", Failure::Timeout),
        ("confused", Failure::Contradiction { code: "off", printed: "ON".into() }),
        ("killed", Failure::Signal(15)),
    ] {
        let host = Host::running();
        let (action, source, _) = host.failure(manner);
        assert_eq!((action, source), ("status", expected));
    }
}

#[test]
fn a_secret_goes_to_standard_input_only() {
    let host = Host::running();
    let (_, source, said) = host.failure("fail");
    assert_eq!(source, Failure::Code { code: 3, meaning: "the login was denied" });
    assert_eq!(said, "login with [secret] was refused");
    let log = std::fs::read_to_string(host.plug().with_extension("log")).unwrap();
    assert_eq!(log, "off 0 0\n", "no argument, nothing in the environment");
    let shown = format!("{:?}", host.config("fail"));
    assert!(!shown.contains("hunter22"), "{shown}");
}

#[test]
fn settings_that_the_agent_does_not_take_are_refused_before_anything_runs() {
    let host = Host::running();
    let mut config = host.config("well");
    config.parameters = Parameters::new([("plugg", "1")]);
    let PowerError::Settings(problems) = Switch::new(config).unwrap_err() else { panic!() };
    let unknown = |problem: &Problem| matches!(problem, Problem::Unknown { hint: Some(it), .. } if it == "plug");
    assert!(problems.iter().any(unknown), "{problems:?}");
    assert!(problems.iter().any(|problem| matches!(problem, Problem::Missing { .. })));
    assert!(!host.plug().with_extension("log").exists());
}

#[test]
fn what_is_no_agent_is_named() {
    let host = Host::running();
    for (agent, part) in [
        ("/nowhere/fence_none", "install fence-agents"),
        ("/bin/true", "no XML"),
        ("/bin/false", "`metadata` of fence agent `/bin/false`: exit status 1"),
    ] {
        let config = SwitchConfig { agent: agent.into(), ..host.config("well") };
        let refused = Switch::new(config).unwrap_err().to_string();
        assert!(refused.contains(part), "{agent}: {refused}");
    }
}

/// The package's own agent, in Python, over the library that nearly all agents share.
#[test]
fn fence_dummy_of_the_distribution() {
    let agent = Path::new("/usr/sbin/fence_dummy");
    if !agent.exists() {
        eprintln!("not run: apt-get install fence-agents, for /usr/sbin/fence_dummy");
        return;
    }
    let host = Host::running();
    let plug = host.plug();
    let mut config = SwitchConfig {
        agent: "fence_dummy".into(),
        off_ms: 30_000,
        status_ms: 30_000,
        parameters: Parameters::new([("status_file", plug.to_str().unwrap())]),
        ..host.config("well")
    };
    let (switch, metadata) = Switch::new(config.clone()).unwrap();
    assert_eq!(metadata.name, "fence_dummy");
    assert_eq!(switch.status().unwrap(), PowerState::On);
    switch.off().unwrap();
    assert!(host.is_off());

    // It fails on purpose.
    config.parameters = Parameters::new([("type", "fail"), ("plug", "1")]);
    let failed = Switch::new(config.clone()).and_then(|(switch, _)| switch.off());
    assert!(failed.is_err(), "{failed:?}");
    config.parameters = Parameters::new([("status_fil", "x")]);
    assert!(matches!(Switch::new(config).unwrap_err(), PowerError::Settings(_)));
}

/// The metadata of every agent that is installed here is understood.
#[test]
fn the_metadata_of_installed_agents_is_read() {
    for name in ["fence_ipmilan", "fence_redfish", "fence_apc", "fence_virsh", "fence_scsi"] {
        let agent = Path::new("/usr/sbin").join(name);
        if !agent.exists() {
            eprintln!("not run: {name} is not installed");
            continue;
        }
        let metadata = bellwether_power::agent::describe(&agent).unwrap();
        assert_eq!(metadata.name, name);
        assert!(metadata.actions.contains("status") && metadata.parameters.len() > 10);
    }
}

#[test]
fn the_command_tells_a_proof_from_a_failure() {
    let host = Host::running();
    let settings = host.dir.path().join("n2.toml");
    let agent = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/agents/fence_test");
    let text = format!("agent = {agent:?}\n[parameters]\nplug = {:?}\n", host.plug());
    std::fs::write(&settings, text).unwrap();
    let run = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bellwether-power"));
        command.args(words).arg(&settings).output().unwrap()
    };
    let exposed = run(&["check"]);
    assert!(String::from_utf8_lossy(&exposed.stderr).contains("chmod 600"));
    std::fs::set_permissions(&settings, std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .unwrap();
    let check: serde_json::Value =
        serde_json::from_slice(&run(&["check", "--json"]).stdout).unwrap();
    assert_eq!(check["state"], "on");
    let off: serde_json::Value =
        serde_json::from_slice(&run(&["off", "--yes", "--json"]).stdout).unwrap();
    assert_eq!(off["proof"], "power");
    assert!(host.is_off());
}
