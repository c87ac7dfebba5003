//! Parameters and commands.

use bellwether_guest_checks::cmdline::{Params, Refused};
use bellwether_guest_checks::command::{Command, LineReader};

fn parse(cmdline: &str) -> (Params, Vec<(&str, Refused)>) {
    let mut refused = Vec::new();
    let params = Params::parse(cmdline, |word, why| refused.push((word, why)));
    (params, refused)
}

#[test]
fn nothing_given_means_defaults() {
    let (params, refused) = parse("  ");
    assert_eq!(params, Params::default());
    assert_eq!((params.tick_ms, params.mem_mib, params.journal_sectors), (10, 16, 8192));
    assert!(refused.is_empty());
}

#[test]
fn every_key_is_taken() {
    let (params, refused) = parse(
        "tick_ms=1 mem_mib=2 dirty_mib_s=3 verify_mib_s=4 journal_ms=5 journal_sectors=6 seed=0x7f \
         fill=80 cpus=9 on_fatal=poweroff",
    );
    let expected = Params {
        tick_ms: 1,
        mem_mib: 2,
        dirty_mib_s: 3,
        verify_mib_s: 4,
        journal_ms: 5,
        journal_sectors: 6,
        seed: 0x7f,
        fill: 80,
        cpus: 9,
        power_off_on_fatal: true,
    };
    assert_eq!(params, expected);
    assert!(refused.is_empty());
}

#[test]
fn what_is_not_taken_is_reported_and_changes_nothing() {
    let words =
        ["console=ttyS0", "quiet", "tick_ms=0", "fill=101", "seed=", "seed=-1", "on_fatal=x"];
    let (params, refused) =
        parse("console=ttyS0 quiet tick_ms=0 fill=101 seed= seed=-1 on_fatal=x");
    assert_eq!(params, Params::default());
    let unknown = |word: &str| word.starts_with("console") || word == "quiet";
    let expected = words.map(|w| (w, if unknown(w) { Refused::Unknown } else { Refused::Value }));
    assert_eq!(refused, expected);
}

#[test]
fn commands_are_recognised() {
    assert_eq!(Command::parse("ping"), Command::Ping);
    assert_eq!(Command::parse(" stats "), Command::Stats);
    assert_eq!(Command::parse("rate dirty_mib_s=9"), Command::Rate("dirty_mib_s=9"));
    assert_eq!(Command::parse("verify-fill"), Command::VerifyFill);
    assert_eq!(Command::parse("crash"), Command::Crash);
    assert_eq!(Command::parse("reset"), Command::Reset);
    assert_eq!(Command::parse("poweroff"), Command::PowerOff);
    assert_eq!(Command::parse("halt"), Command::Unknown("halt"));
}

#[test]
fn lines_end_with_either_character_and_are_cut_at_their_limit() {
    let mut reader = LineReader::default();
    let mut lines = Vec::new();
    let long = format!("ping\r\n\n  \nstats\n{}\nping\n", "x".repeat(1000));
    for byte in long.bytes() {
        lines.extend(reader.push(byte, str::to_owned));
    }
    assert_eq!(lines, ["ping".to_owned(), "stats".to_owned(), "x".repeat(256), "ping".to_owned()]);
}

#[test]
fn a_line_of_garbage_is_survived() {
    let mut reader = LineReader::default();
    let lines: Vec<_> =
        [0xff, 0xfe, b'\n'].into_iter().filter_map(|b| reader.push(b, str::to_owned)).collect();
    assert_eq!(lines, ["?"]);
}
