//! Every scenario file does what it says, and the format refuses what it does not understand.

use std::fs;
use std::path::{Path, PathBuf};

use bellwether_simulation::script::{Script, with_log};
use bellwether_simulation::{Event, Scenario};

fn files() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let entries = fs::read_dir(directory).expect("read the golden scenarios");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths
}

/// `cargo xtask sim --golden` plays all of them, optimised; here it is some, and all are read.
const PLAYED: usize = 10;

#[test]
fn golden_scenarios_are_as_their_files_say() {
    let files = files();
    assert!(files.len() >= 60, "{} scenarios", files.len());
    for (number, path) in files.iter().enumerate() {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(path).unwrap();
        let script = Script::parse(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(!script.title.is_empty(), "{name} has no title");
        assert!(!script.expectations.is_empty(), "{name} says nothing about what it is about");
        assert!(script.recorded.is_some(), "{name}: `cargo xtask sim --bless` records its log");
        if number.is_multiple_of(files.len() / PLAYED) {
            let played = script.play();
            let found = (&played.broken, &played.unmet, &played.differs);
            assert!(played.held(), "{name}: {found:?}");
            assert_eq!(with_log(&text, &played.log), text, "{name} is not as blessing writes it");
        }
    }
}

#[test]
fn one_file_is_one_run_bit_for_bit() {
    let text = "vm web on n1\nat 5s power off n1\nexpect web runs on n2,n3 by 50s\n";
    let script = Script::parse(text).unwrap();
    let (one, other) = (script.play(), script.play());
    assert!(one.held());
    assert_eq!(one, other);
}

#[test]
fn an_expectation_and_a_log_can_fail() {
    let expects = |line: &str| {
        let text = format!("vm web on n1\nat 5s power off n1\n{line}\n");
        Script::parse(&text).unwrap().play()
    };
    for line in [
        "expect web runs on n1 by 40s",
        "expect web never on n2,n3",
        "expect web down at most 5s",
        "expect web keeps its memory",
        "expect web boots 0 times",
        "expect n1 is online",
        "expect web runs from 0s to 20s",
        "expect no log n1 is not heard from",
        "expect log n2 is not heard from",
        "expect web is stopped",
    ] {
        let played = expects(line);
        assert_eq!(played.unmet.len(), 1, "{line}");
        assert_eq!((played.unmet[0].line, played.unmet[0].expected.as_str()), (3, line));
    }
    let good = expects("");
    let text = with_log("vm web on n1\nat 5s power off n1\n", &good.log);
    assert!(Script::parse(&text).unwrap().play().held());
    let other = text.replace("n1 is not heard from", "n1 is on holiday");
    let differs = Script::parse(&other).unwrap().play().differs.unwrap();
    assert!(differs.recorded.unwrap().contains("holiday"));
    assert!(differs.now.unwrap().contains("not heard from"));
}

#[test]
fn what_is_wrong_with_a_file_is_told_with_its_line_and_the_remedy() {
    for (text, line, remedy) in [
        ("vm web\nvmm db", 2, "a line begins with title, nodes"),
        ("at 10s power off n4", 1, "the nodes are n1 to n3"),
        ("\n\nat 10s bell vm start web", 3, "define it with a line `vm web memory 1G`"),
        ("at 10 power off n1", 1, "write it like 500ms"),
        ("vm web memory 2", 1, "write it like 512M or 2G"),
        ("vm web\nvm web", 2, "give this one another name"),
        ("vm web\nat 5s explode", 2, "write one of: bell"),
        ("vm web apart db", 1, "like web:hard or web:soft"),
        ("vm web colour red", 1, "besides them: memory"),
        ("nodes 3\ncontrollers 2", 2, "an odd number of at most 3"),
        ("vm web\nat 5s bell vm console web", 2, "is not simulated; these are"),
        ("vm web\nexpect web flies", 2, "expect NAME runs"),
        ("vm web\nexpect web runs on n1 by 40s please", 2, "`please` is too much"),
        ("until 10s\nat 20s power off n1", 2, "raise `until`"),
        ("vm web\nnodes 5", 2, "move this line up"),
        ("storage tape", 1, "`nfs lease 10s` or `one-kernel`"),
        ("at 5s cut n1 n2", 1, "cut n1 from n2"),
    ] {
        let error = Script::parse(text).unwrap_err();
        assert_eq!(error.line, line, "{text}: {error}");
        assert!(error.to_string().contains(remedy), "{text}: {error}");
    }
}

/// What a seed was minimised to can be pasted into a file.
#[test]
fn the_events_of_a_seed_are_lines_of_a_scenario() {
    for seed in 1..=200 {
        let random = Scenario::random(seed);
        let mut text = format!("nodes {}\n", random.cluster.nodes);
        random.cluster.vms.iter().for_each(|vm| text.push_str(&format!("vm {}\n", vm.name)));
        random.events.iter().for_each(|timed| text.push_str(&format!("{timed}\n")));
        text.push_str("until 10m\n");
        let read =
            Script::parse(&text).unwrap_or_else(|error| panic!("seed {seed}: {error}\n{text}"));
        let wanted: Vec<Event> = random.events.iter().map(|timed| timed.event.clone()).collect();
        let found: Vec<Event> = read.scenario.events.into_iter().map(|it| it.event).collect();
        assert_eq!(found, wanted, "seed {seed}");
    }
}
