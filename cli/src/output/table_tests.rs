use super::*;

fn lines(text: &str) -> Vec<&str> {
    text.lines().map(str::trim_end).collect()
}

fn node_of(name: &str, phase: &str, heard_ms_ago: Option<u64>) -> v1::Node {
    v1::Node {
        id: 1,
        name: name.into(),
        address: "10.0.0.1".into(),
        phase: phase.into(),
        memory_mib: 8192,
        memory_used_mib: 256,
        vcpus: 8,
        vcpus_used: 1,
        vms: vec!["web-1".into()],
        heard_ms_ago,
        ..Default::default()
    }
}

fn vm_of(name: &str, state: &str, node: &str) -> v1::Vm {
    v1::Vm {
        spec: Some(v1::VmSpec {
            name: name.into(),
            vcpus: 1,
            memory_mib: 256,
            ..Default::default()
        }),
        desired: "running".into(),
        state: state.into(),
        node: node.into(),
        ..Default::default()
    }
}

#[test]
fn nodes_fit_eighty_columns() {
    let table = nodes(&[node_of("n1", "online", Some(300)), node_of("n2", "unknown", None)]);
    let text = table.render(Some(80));
    assert_eq!(
        lines(&text),
        [
            "NAME  ID  PHASE    ADDRESS   MEMORY   VCPUS  VMS  HEARD",
            "n1    1   online   10.0.0.1  256M/8G  1/8    1    now",
            "n2    1   unknown  10.0.0.1  256M/8G  1/8    1    never",
        ]
    );
}

#[test]
fn vms_say_what_keeps_them() {
    let waiting =
        v1::Vm { pending: "no node has 256 MiB left".into(), ..vm_of("b", "stopped", "") };
    let moving = v1::Vm { task: 7, ..vm_of("a", "running", "n1") };
    assert_eq!(
        lines(&vms(&[moving, waiting]).render(Some(80))),
        [
            "NAME  STATE    WANTED   NODE  MEMORY  VCPUS  NOTE",
            "a     running  running  n1    256M    1      task 7",
            "b     stopped  running  -     256M    1      no node has 256 MiB left",
        ]
    );
}

#[test]
fn a_long_note_is_folded_at_a_terminal_and_whole_for_a_program() {
    let pending = "n1: 128 MiB left, 256 wanted; n2: draining; n3: unknown since 12:00; ".repeat(3);
    let vms = vms(&[v1::Vm { pending: pending.clone(), ..vm_of("web-1", "stopped", "") }]);
    let folded = vms.render(Some(80));
    assert!(folded.lines().all(|line| line.chars().count() <= 80), "{folded}");
    assert_eq!(vms.render(None).lines().count(), 2);
}

fn moved() -> v1::Task {
    v1::Task {
        id: 12,
        kind: "migrate".into(),
        vm_name: "web-1".into(),
        step: "resumed".into(),
        outcome: "done".into(),
        source: "n1".into(),
        destination: "n2".into(),
        created_at_ms: 60_000,
        ended_at_ms: 61_500,
        measures: [
            ("outage_us", 18_260),
            ("resume_us", 900),
            ("stop_us", 1_200),
            ("commit_us", 4_000),
            ("memory_bytes", 69_730_304),
            ("seal_order_us", 9_100),
            ("pages", 12),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into(),
        ..Default::default()
    }
}

#[test]
fn a_migration_shows_its_outage_and_the_parts_in_order() {
    assert_eq!(
        migration(&moved()),
        "VM web-1 migrated n1 -> n2: outage 18.2 ms\n  \
         stop 1.2 ms, commit 4.0 ms, resume 900 us, memory 66.5 MiB, pages 12, seal order 9.1 ms"
    );
}

#[test]
fn a_measure_is_shown_in_the_unit_of_its_key() {
    for (key, value, shown) in [
        ("wait_ns", 2_500_000, ("wait", "2.5 ms")),
        ("wait_us", 61_250_000, ("wait", "61.25 s")),
        ("wait_ms", 20, ("wait", "20.0 ms")),
        ("memory_bytes", 4_096, ("memory", "0.0 MiB")),
        ("memory_bytes", 3 << 29, ("memory", "1536 MiB")),
        ("pages", 12, ("pages", "12")),
    ] {
        assert_eq!(measure(key, value), (shown.0, shown.1.to_owned()));
    }
}

#[test]
fn tasks_are_dated_from_now() {
    let failed = v1::Task { outcome: "failed".into(), error: "n2 is gone".into(), ..moved() };
    assert_eq!(
        lines(&tasks(&[failed], 90_000).render(Some(80))),
        [
            "ID  KIND     VM     STEP     OUTCOME  STARTED   TOOK  ERROR",
            "12  migrate  web-1  resumed  failed   30 s ago  1 s   n2 is gone",
        ]
    );
}

#[test]
fn a_sheet_leaves_out_what_is_empty() {
    let text = vm(&vm_of("web-1", "running", "n1"));
    assert!(text.contains("State     running\n"), "{text}");
    assert!(text.contains("Owners    every node\n"), "{text}");
    assert!(!text.contains("Pending") && !text.contains("State file"), "{text}");
}

#[test]
fn the_cluster_shows_who_leads_and_who_lags() {
    let controller = |name: &str, leader, matched| v1::ControllerStatus {
        member: Some(v1::Member {
            id: 1,
            name: name.into(),
            address: "10.0.0.1".into(),
            ports: None,
        }),
        leader,
        voter: true,
        matched,
    };
    let status = v1::ClusterStatus {
        name: "lab".into(),
        cluster_id: "id".into(),
        last_applied: 40,
        controllers: vec![
            controller("a", true, 40),
            controller("b", false, 38),
            controller("c", false, 0),
        ],
        ..Default::default()
    };
    let text = cluster_status(&status);
    for line in [
        "Leader   a",
        "CONTROLLER  ID  ADDRESS   ROLE      LOG",
        "a           1   10.0.0.1  leader    40",
        "b           1   10.0.0.1  follower  38 (2 behind)",
        "c           1   10.0.0.1  follower  not heard from",
    ] {
        assert!(lines(&text).contains(&line), "{line}\n{text}");
    }
}

#[test]
fn an_event_is_one_line() {
    let event = v1::Event {
        seq: 4,
        level: "warn".into(),
        vm: "web-1".into(),
        task: 3,
        text: "restarted".into(),
        ..Default::default()
    };
    let line = event_line(&event);
    assert!(line.starts_with("    4  "), "{line}");
    assert!(line.ends_with("  warn   vm=web-1 task=3 restarted"), "{line}");
}
