//! `bell` against a server over mutual TLS: results, exit codes, and which controller is asked.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::{Conduct, Lab};
use tonic::Status;

#[test]
fn tables_and_json_go_to_standard_output_alone() {
    let (lab, _) = Lab::with(Conduct::Serve);
    let table = lab.bell("vm list");
    assert_eq!((table.code, table.stderr.as_str()), (0, ""));
    assert!(table.stdout.starts_with("NAME   STATE    WANTED   NODE"), "{}", table.stdout);
    let json = lab.bell("-o json vm list").json();
    assert_eq!(json[0]["spec"]["memory_mib"], 256);
    assert_eq!(lab.bell("node list -o json").json()[1]["name"], "n2");
    assert_eq!(lab.bell("cluster status -o json").json()["name"], "lab");
    let token = lab.bell("cluster join-token --role agent --ttl 30m");
    assert_eq!(token.stdout, "bw1.secret.sum\n");
    assert!(token.stderr.contains("bellwether-agent join"), "{}", token.stderr);
}

#[test]
fn a_validation_shows_each_check_and_fails_with_one_of_them() {
    let (lab, _) = Lab::with(Conduct::Serve);
    let told = lab.bell("cluster validate");
    assert_eq!(told.code, 1, "{told:?}");
    let lines: Vec<_> = told.stdout.lines().collect();
    assert_eq!(
        lines,
        [
            "ok      n1          storage   storage was tried",
            "off     n1          watchdog  watchdog was tried",
            "FAILED  n1          power     power was tried",
        ]
    );
    assert!(told.stderr.contains("1 of 3 checks failed"), "{}", told.stderr);
    let json = lab.bell("cluster validate -o json");
    assert_eq!(json.code, 1);
    assert_eq!(
        (&json.json()["ok"], &json.json()["findings"][2]["verdict"]),
        (&false.into(), &"failed".into())
    );
}

#[test]
fn a_verb_waits_shows_the_steps_and_says_what_it_cost() {
    let (lab, calls) = Lab::with(Conduct::Serve);
    let moved = lab.bell("vm migrate web-1");
    assert_eq!(moved.code, 0, "{moved:?}");
    assert_eq!(moved.stdout, "VM web-1 migrated n1 -> n2: outage 18.2 ms\n  stop 1.2 ms\n");
    let steps: Vec<_> = moved.stderr.lines().collect();
    assert_eq!(
        steps,
        [
            "task 12 migrate web-1: prepare",
            "task 12 migrate web-1: seal",
            "task 12 migrate web-1: done"
        ]
    );
    assert_eq!(*calls.lock().unwrap(), ["migrate web-1", "watch 12", "get web-1"]);
    let json = lab.bell("vm migrate web-1 -o json").json();
    assert_eq!((&json["task_id"], &json["task"]["outcome"]), (&12.into(), &"done".into()));
}

#[test]
fn a_verb_that_does_not_wait_prints_the_number_of_the_task() {
    let (lab, calls) = Lab::with(Conduct::Serve);
    let ran = lab.bell("vm migrate web-1 --no-wait");
    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (0, "12\n", ""));
    assert_eq!(*calls.lock().unwrap(), ["migrate web-1"]);
    assert_eq!(lab.bell("node drain n1 --no-wait").stdout, "7\n8\n");
    assert_eq!(lab.bell("node resume n1").stdout, "node n1 is online\n");
    let json = lab.bell("vm start web-1 --no-wait -o json").json();
    assert_eq!((&json["task_id"], &json["task"]), (&12.into(), &serde_json::Value::Null));
}

#[test]
fn questions_about_what_would_happen_and_why() {
    let (lab, calls) = Lab::with(Conduct::Serve);
    let told = lab.bell("what-if node-down n1 --and n2");
    assert!(told.stdout.contains("Comes up elsewhere or anew: 1 VM."), "{told:?}");
    assert_eq!(lab.bell("what-if drain n1 -o json").json()["moves"][0]["to"], "n2");
    assert_eq!(lab.bell("what-if add-vm big --memory 1G --kernel /k").code, 0);
    let vm = lab.bell("explain vm web-1");
    for said in ["n1 had room", "n1    could not      the VM runs there now", "n2    could take it"]
    {
        assert!(vm.stdout.contains(said), "{said}: {vm:?}");
    }
    let task = lab.bell("explain task 12");
    assert!(task.stdout.contains("n1 is not heard from"), "{task:?}");
    let asked = [
        "what-if [\"n1\", \"n2\"] [] ",
        "what-if [] [\"n1\"] ",
        "what-if [] [] big",
        "explain web-1",
        "explain-task 12",
    ];
    assert_eq!(*calls.lock().unwrap(), asked);
}

#[test]
fn rules_and_settings_are_changed_by_what_is_named() {
    let (lab, calls) = Lab::with(Conduct::Serve);
    let set = lab.bell("vm set web-1 --prefer n2,n1 --failback 22-6 --apart web:hard -o json");
    assert_eq!(set.json()["rules"]["anti_affinity"]["web"], "hard", "{set:?}");
    assert_eq!(
        lab.bell("cluster set --reserve-nodes 1 -o json").json()["settings"]["reserve_nodes"],
        1
    );
    assert_eq!(lab.bell("node unquarantine n1").stdout, "node n1 is online\n");
    let asked = ["set web-1 [\"n2\", \"n1\"] 22-6", "set-cluster 1", "unquarantine n1"];
    assert_eq!(*calls.lock().unwrap(), asked);
    for nothing in ["vm set web-1", "cluster set"] {
        let refused = lab.bell(nothing);
        assert_eq!(refused.code, 2, "{refused:?}");
        assert!(refused.stderr.contains("nothing is to be changed"), "{refused:?}");
    }
    assert_eq!(lab.bell("vm set web-1 --apart web").code, 2);
}

#[test]
fn a_drain_waits_until_the_node_is_empty() {
    let (lab, calls) = Lab::with(Conduct::Serve);
    let drained = lab.bell("node drain n1");
    assert_eq!((drained.code, drained.stdout.as_str()), (0, "node n1 is in maintenance\n"));
    let progress = "node n1 is draining, still there: web-1; its VMs are moving away\n";
    assert_eq!(drained.stderr, progress);
    assert_eq!(*calls.lock().unwrap(), ["drain n1", "node n1", "node n1"]);

    let json = lab.bell("node drain n1 -o json").json();
    assert_eq!((&json["node"]["phase"], &json["tasks"]), (&"maintenance".into(), &().into()));
    assert_eq!(json["task_ids"], serde_json::json!([7, 8]));

    calls.lock().unwrap().clear();
    assert_eq!(lab.bell("node drain empty").stdout, "node empty is in maintenance\n");
    assert_eq!(*calls.lock().unwrap(), ["drain empty"]);
}

#[test]
fn a_drain_that_cannot_end_says_why_and_goes_on_without_its_watcher() {
    let (lab, _) = Lab::with(Conduct::Serve);
    let late = lab.bell("node drain n2 --timeout 2s");
    assert_eq!((late.code, late.stdout.as_str()), (6, ""), "{late:?}");
    for said in [
        "node n2 is draining, still there: web-1; web-1: n1 has 128 MiB left, 256 wanted\n",
        "error: time ran out; the drain of node n2 goes on by itself",
        "remedy: see how far it is with `bell node show n2`; `bell node resume n2` calls it off",
    ] {
        assert!(late.stderr.contains(said), "{said}\n{late:?}");
    }
    let resumed = lab.bell("node drain resumed");
    assert_eq!(resumed.code, 4, "{resumed:?}");
    assert!(resumed.stderr.contains("was resumed"), "{resumed:?}");
}

#[test]
fn who_stops_waiting_does_not_stop_the_task() {
    // The one controller goes away while the task is watched, and none comes back.
    let (lab, _) = Lab::with(Conduct::BreakWatching);
    let mut child = lab.command("vm migrate web-1").stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    stderr.read_line(&mut said).unwrap();
    assert_eq!(said, "task 12 migrate web-1: prepare\n");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    stderr.read_to_string(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(6));
    assert!(said.contains("task 12 goes on by itself"), "{said}");

    let (lab, _) = Lab::with(Conduct::BreakWatching);
    let late = lab.bell("vm migrate web-1 --timeout 2s");
    assert_eq!(late.code, 6, "{late:?}");
    assert!(late.stderr.contains("remedy: see how it ended with `bell task show 12`"), "{late:?}");
    assert_eq!(lab.bell("--wait vm start web-1 --no-wait").code, 2);
}

#[test]
fn a_failed_task_is_code_1_with_its_reason() {
    let (lab, _) = Lab::with(Conduct::Serve);
    let failed = lab.bell("vm migrate web-1 --to n2 -o json");
    assert_eq!(failed.code, 1);
    assert_eq!(failed.json()["task"]["outcome"], "failed");
    assert!(
        failed
            .stderr
            .contains("error: the migrate of VM web-1 failed (task 13): n2 has no memory left"),
        "{}",
        failed.stderr
    );
    assert!(failed.stderr.contains("remedy: see each step with `bell task show 13`"));
}

#[test]
fn each_refusal_has_its_exit_code_and_keeps_its_words() {
    for (status, code) in [
        ((|| Status::invalid_argument("the words")) as fn() -> Status, 1),
        (|| Status::resource_exhausted("the words"), 1),
        (|| Status::not_found("the words"), 3),
        (|| Status::already_exists("the words"), 4),
        (|| Status::failed_precondition("the words"), 4),
        (|| Status::permission_denied("the words"), 7),
        (|| Status::deadline_exceeded("the words"), 6),
        (|| Status::unavailable("the words"), 6),
    ] {
        let (lab, calls) = Lab::with(Conduct::Answer(status));
        let refused = lab.bell("vm start web-1");
        assert_eq!(refused.code, code, "{refused:?}");
        assert!(refused.stdout.is_empty() && refused.stderr.contains("the words"), "{refused:?}");
        assert_eq!(calls.lock().unwrap().len(), 1, "no deed is repeated");
    }
}

#[test]
fn questions_go_to_the_next_controller_and_so_do_deeds_that_were_not_begun() {
    let mut lab = Lab::new();
    lab.nobody();
    let electing = lab.serve(Conduct::Answer(|| bellwether_member::not_started("no leader")));
    let serving = lab.serve(Conduct::Serve);
    assert_eq!(lab.bell("vm list").code, 0);
    assert_eq!(lab.bell("vm pause web-1").stdout, "VM web-1 is running on n1\n");
    assert_eq!(*electing.lock().unwrap(), ["vms", "pause web-1"]);
    assert_eq!(*serving.lock().unwrap(), ["vms", "pause web-1"]);
}

#[test]
fn a_deed_of_unknown_outcome_is_never_given_to_another() {
    for broken in [Conduct::Break, Conduct::Silent] {
        let mut lab = Lab::new();
        let asked = lab.serve(broken);
        let second = lab.serve(Conduct::Serve);
        let ran = lab.bell("vm migrate web-1 --timeout 2s");
        assert_eq!(ran.code, 6, "{ran:?}");
        assert!(ran.stderr.contains("outcome unknown, look with `bell task list`"), "{ran:?}");
        assert_eq!(*asked.lock().unwrap(), ["migrate web-1"]);
        assert!(second.lock().unwrap().is_empty());
    }
}

#[test]
fn a_question_survives_a_controller_that_breaks_or_hangs() {
    for broken in [Conduct::Break, Conduct::Silent] {
        let mut lab = Lab::new();
        lab.serve(broken);
        lab.serve(Conduct::Serve);
        let ran = lab.bell("vm list --timeout 8s");
        assert_eq!(ran.code, 0, "{ran:?}");
    }
}

#[test]
fn watching_goes_on_at_another_controller() {
    let mut lab = Lab::new();
    let first = lab.serve(Conduct::BreakWatching);
    let second = lab.serve(Conduct::Serve);
    let moved = lab.bell("vm migrate web-1");
    assert_eq!(moved.code, 0, "{moved:?}");
    assert_eq!(moved.stderr.matches("prepare").count(), 1, "a step is shown once: {moved:?}");
    assert_eq!(*first.lock().unwrap(), ["migrate web-1", "watch 12"]);
    assert_eq!(second.lock().unwrap()[0], "watch 12");
}

#[test]
fn nobody_reachable_is_code_5_and_lists_the_addresses() {
    let mut lab = Lab::new();
    lab.nobody();
    for line in ["vm list", "vm start web-1", "event list", "vm console web-1"] {
        let ran = lab.bell(line);
        assert_eq!(ran.code, 5, "{line}: {ran:?}");
        assert!(ran.stderr.contains("127.0.0.1:1: ") && ran.stderr.contains("remedy: "), "{ran:?}");
    }
}

#[test]
fn only_an_administrator_of_this_cluster_gets_in() {
    let (lab, calls) = Lab::with(Conduct::Serve);
    lab.write_context(&lab.report.data_dir);
    let controller = lab.bell("vm list");
    assert_eq!(controller.code, 7, "{controller:?}");
    assert!(controller.stderr.contains("an admin's is needed"), "{controller:?}");

    let other = Lab::new();
    lab.write_context(&other.report.admin.dir);
    let stranger = lab.bell("vm list");
    assert_eq!(stranger.code, 5, "{stranger:?}");
    assert!(stranger.stderr.contains("certificate was refused"), "{stranger:?}");
    assert!(calls.lock().unwrap().is_empty());

    // The Raft port ends the handshake: nothing was read there, so nothing is unknown.
    let mut wrong_port = Lab::new();
    wrong_port.serve_roles(Conduct::Serve, bellwether_pki::RAFT_PORT_ROLES);
    let refused = wrong_port.bell("vm start web-1");
    assert_eq!(refused.code, 7, "{refused:?}");
    assert!(refused.stderr.contains("refused the role of this certificate"), "{refused:?}");
}

#[test]
fn a_context_learns_of_the_controllers_that_joined_later() {
    let (lab, _) = Lab::with(Conduct::Serve);
    let fresh = lab.bell("context refresh -o json");
    assert_eq!(fresh.code, 0, "{fresh:?}");
    let endpoints = &fresh.json()["endpoints"];
    assert_eq!(*endpoints, serde_json::json!(["127.0.0.1:7400", "127.0.0.2:7400"]));
}

#[test]
fn a_vm_is_created_from_words() {
    let (lab, calls) = Lab::with(Conduct::Serve);
    let line =
        "vm create web --memory 256M --kernel /k --disk path=/d,format=raw --owner n2 --start";
    let made = lab.bell(line);
    assert_eq!((made.code, made.stdout.as_str()), (0, "VM web is stopped\n"), "{made:?}");
    assert_eq!(*calls.lock().unwrap(), ["nodes", "create web [2] start=true"]);
    assert_eq!(lab.bell(&line.replace("n2", "n9")).code, 3);
    assert_eq!(lab.bell(&line.replace("256M", "3M")).code, 2);
    assert_eq!(lab.bell(&line.replace("256M", "256")).code, 2);
    assert_eq!(calls.lock().unwrap().len(), 3, "what cannot be is not sent");
}

#[test]
fn dangerous_verbs_want_a_word_for_it() {
    let (lab, calls) = Lab::with(Conduct::Serve);
    let unconfirmed = lab.bell("vm stop web-1");
    assert_eq!(unconfirmed.code, 2);
    assert!(unconfirmed.stderr.contains("remedy: bell vm stop web-1 --yes"), "{unconfirmed:?}");
    assert!(calls.lock().unwrap().is_empty());

    let asserted = lab.bell("node confirm-down n1");
    assert_eq!(asserted.code, 2);
    assert!(asserted.stderr.contains("switched off"), "{asserted:?}");
    assert_eq!(lab.bell("node confirm-down n1 --confirm n2").code, 2);
    assert_eq!(*calls.lock().unwrap(), ["node n1", "node n1"]);
    assert_eq!(lab.bell("node confirm-down 1 --confirm n1").code, 0);
    assert_eq!(calls.lock().unwrap().last().unwrap(), "confirm n1");
}

#[test]
fn events_are_an_array_or_a_line_each() {
    let (lab, calls) = Lab::with(Conduct::Serve);
    let all = lab.bell("event list --after 3 -o json").json();
    assert_eq!(all.as_array().unwrap().len(), 2);
    assert_eq!(all[0]["seq"], 4);
    calls.lock().unwrap().clear();

    let followed = lab.bell("event list --follow --timeout 1s -o json");
    assert_eq!(followed.code, 0, "{followed:?}");
    let numbers: Vec<u64> = followed
        .stdout
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["seq"].as_u64().unwrap()
        })
        .collect();
    assert!(
        numbers.len() > 2 && numbers.iter().copied().eq(1..=numbers.len() as u64),
        "{numbers:?}"
    );
    assert_eq!(calls.lock().unwrap()[1], "events 2", "taken up after the last one seen");
}

#[test]
fn the_console_ends_by_text_or_time() {
    let (lab, calls) = Lab::with(Conduct::Serve);
    let tick = lab.bell("vm console web-1 --until tick --for 9s");
    assert_eq!((tick.code, tick.stdout.starts_with("tick 1\n")), (0, true), "{tick:?}");
    let echoed = lab.bell_with_input("vm console web-1 --until there --for 9s", "hello there\n");
    assert_eq!(echoed.code, 0, "{echoed:?}");
    assert!(echoed.stdout.ends_with("hello there\n"), "{echoed:?}");
    let began = Instant::now();
    let timed = lab.bell("vm console web-1 --for 300ms");
    assert_eq!((timed.code, timed.stdout.as_str()), (0, "tick 1\ntick 2\n"));
    assert!(began.elapsed() >= Duration::from_millis(300));
    assert_eq!(lab.bell("vm console web-1 --until never --for 300ms").code, 6);
    assert_eq!(calls.lock().unwrap()[0], "console web-1");
}

#[test]
fn a_closed_pipe_is_no_error() {
    let (lab, _) = Lab::with(Conduct::Serve);
    lab.bell("vm list");
    let shell = std::process::Command::new("sh")
        .args(["-c", &format!("{} event list; echo $? >&2", env!("CARGO_BIN_EXE_bell"))])
        .env("BELLWETHER_CONFIG", lab.config())
        .stdout(closed_pipe())
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&shell.stderr), "0\n");
}

/// The writing end of a pipe that nobody reads.
fn closed_pipe() -> std::io::PipeWriter {
    std::io::pipe().unwrap().1
}
