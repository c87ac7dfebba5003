//! What was seen of a VM, and what follows from it.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::lines::Line;
use crate::vmm::Incarnation;

/// A line that a VMM had printed before it was killed may be read a little later than the first
/// line of its successor.
const DRAIN: Duration = Duration::from_millis(500);

/// One line of the guest.
#[derive(Clone, Debug)]
pub struct Heard {
    /// When it arrived here.
    pub at: Instant,
    /// The index of the incarnation that printed it.
    pub who: usize,
    pub line: Line,
}

/// A tick with both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Tick {
    pub at: Instant,
    pub who: usize,
    pub number: u64,
    pub ns: u64,
}

/// A time without ticks.
#[derive(Clone, Copy, Debug)]
pub struct Gap {
    /// By the guest's own clock.
    pub inside: Duration,
    /// Between the arrivals of the same two ticks.
    pub outside: Duration,
    /// The incarnations before and after it.
    pub from: usize,
    pub to: usize,
}

/// One VMM process.
#[derive(Clone, Debug)]
pub struct Seen {
    pub incarnation: Incarnation,
    /// When an answer that said "running" had arrived for the first time.
    first_running: Option<Instant>,
    /// When a question that was answered with "running" was asked for the last time.
    last_running: Option<Instant>,
}

/// Everything seen of one VM.
#[derive(Default, Debug)]
pub struct Record {
    pub incarnations: Vec<Seen>,
    pub lines: Vec<Heard>,
}

impl Record {
    /// The index of an incarnation, and whether it is new.
    pub(super) fn enter(&mut self, incarnation: &Incarnation) -> (usize, bool) {
        let known = self.incarnations.iter().position(|seen| seen.incarnation == *incarnation);
        if let Some(index) = known {
            return (index, false);
        }
        let incarnation = incarnation.clone();
        self.incarnations.push(Seen { incarnation, first_running: None, last_running: None });
        (self.incarnations.len() - 1, true)
    }

    pub(super) fn hear(&mut self, who: usize, text: &str) {
        self.lines.push(Heard { at: Instant::now(), who, line: Line::parse(text) });
    }

    /// The vCPUs ran at some moment between the question and its answer.
    pub(super) fn saw_running(&mut self, who: usize, asked: Instant, answered: Instant) {
        let seen = &mut self.incarnations[who];
        seen.first_running.get_or_insert(answered);
        seen.last_running = Some(asked);
    }

    pub fn ticks(&self, mark: usize) -> impl Iterator<Item = Tick> {
        self.lines[mark.min(self.lines.len())..].iter().filter_map(|heard| match heard.line {
            Line::Tick { number, ns } => Some(Tick { at: heard.at, who: heard.who, number, ns }),
            _ => None,
        })
    }

    /// Journal numbers go on over boots, so the highest is the newest.
    pub fn acknowledged(&self) -> u64 {
        let numbers = self.lines.iter().filter_map(|heard| match heard.line {
            Line::Journal(number) => Some(number),
            _ => None,
        });
        numbers.max().unwrap_or(0)
    }

    pub fn boots(&self) -> usize {
        self.lines.iter().filter(|heard| heard.line == Line::Boot).count()
    }

    pub fn node_of(&self, who: usize) -> usize {
        self.incarnations[who].incarnation.node
    }

    /// All times between two ticks.
    fn gaps(&self, mark: usize) -> Vec<Gap> {
        let ticks: Vec<Tick> = self.ticks(mark).collect();
        let gap = |pair: &[Tick]| Gap {
            inside: Duration::from_nanos(pair[1].ns.saturating_sub(pair[0].ns)),
            outside: pair[1].at.saturating_duration_since(pair[0].at),
            from: pair[0].who,
            to: pair[1].who,
        };
        ticks.windows(2).map(gap).collect()
    }

    pub fn largest_gap(&self, mark: usize) -> Option<Gap> {
        self.gaps(mark).into_iter().max_by_key(|gap| gap.inside)
    }

    /// The time between the last tick of one incarnation and the first of the next.
    pub fn gap_at_move(&self, mark: usize) -> Option<Gap> {
        self.gaps(mark).into_iter().find(|gap| gap.from != gap.to)
    }

    /// The last lines, for reports.
    pub fn tail(&self, count: usize) -> String {
        let first = self.lines.len().saturating_sub(count);
        let lines: Vec<String> =
            self.lines[first..].iter().map(|heard| format!("{:?}", heard.line)).collect();
        lines.join(", ")
    }

    /// Fails if the guest found anything wrong, or if two incarnations ever ran together.
    pub fn check(&self) -> Result<()> {
        for heard in &self.lines {
            match &heard.line {
                Line::Fatal(text) => bail!("on node{}: FATAL {text}", self.node_of(heard.who)),
                Line::Disk { bad, .. } if *bad > 0 => bail!("the guest found {bad} bad records"),
                _ => {}
            }
        }
        self.check_one_runner()
    }

    /// An incarnation that was followed by another never runs again: in the order of epochs, the
    /// times in which incarnations ran lie one behind the other.
    fn check_one_runner(&self) -> Result<()> {
        let mut order: Vec<usize> = (0..self.incarnations.len()).collect();
        order.sort_by_key(|who| self.incarnations[*who].incarnation.home);
        for (position, &later) in order.iter().enumerate() {
            for &earlier in &order[..position] {
                self.check_pair(earlier, later)?;
            }
        }
        Ok(())
    }

    fn check_pair(&self, earlier: usize, later: usize) -> Result<()> {
        let (one, two) = (&self.incarnations[earlier], &self.incarnations[later]);
        let names = || {
            let name = |seen: &Seen| {
                format!("epoch {} on node{}", seen.incarnation.home, seen.incarnation.node)
            };
            format!("{} and {}", name(one), name(two))
        };
        if let (Some(last), Some(first)) = (one.last_running, two.first_running)
            && last > first
        {
            bail!("two VMMs ran at once: {}, by {:?}", names(), last - first);
        }
        let ticks = |who: usize| self.ticks(0).filter(move |tick| tick.who == who);
        let (Some(last), Some(first)) = (ticks(earlier).last(), ticks(later).next()) else {
            return Ok(());
        };
        if last.at > first.at + DRAIN {
            bail!("two VMMs printed at once: {}, by {:?}", names(), last.at - first.at);
        }
        if !self.booted(later)
            && !self.booted_between(earlier, later)
            && first.number <= last.number
        {
            bail!(
                "the guest lived the same time twice: {}, ticks {} and {}",
                names(),
                last.number,
                first.number
            );
        }
        Ok(())
    }

    /// Whether an incarnation began with a cold boot: then its ticks count from 1 again.
    fn booted(&self, who: usize) -> bool {
        self.lines.iter().any(|heard| heard.who == who && heard.line == Line::Boot)
    }

    fn booted_between(&self, earlier: usize, later: usize) -> bool {
        let home = |who: usize| self.incarnations[who].incarnation.home;
        (0..self.incarnations.len())
            .filter(|who| home(earlier) < home(*who) && home(*who) < home(later))
            .any(|who| self.booted(who))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(incarnations: &[(usize, u64)]) -> Record {
        let mut record = Record::default();
        for &(node, home) in incarnations {
            let socket = format!("/nowhere/{node}.{home}").into();
            record.enter(&Incarnation { node, vm_id: "vm".into(), home, socket });
        }
        record
    }

    #[test]
    fn a_migration_and_a_failover_are_fine() {
        let mut record = record(&[(1, 1), (2, 2), (3, 3)]);
        let said = [
            (0, "boot x"),
            (0, "tick 1 10 1"),
            (1, "tick 2 20 1"),
            (2, "boot x"),
            (2, "tick 1 9 1"),
        ];
        said.iter().for_each(|(who, text)| record.hear(*who, text));
        record.check().unwrap();
        assert_eq!(record.boots(), 2);
        let gap = record.largest_gap(1).unwrap();
        assert_eq!((gap.inside, gap.from, gap.to), (Duration::from_nanos(10), 0, 1));
    }

    #[test]
    fn the_same_tick_twice_is_found() {
        let mut record = record(&[(1, 1), (2, 2)]);
        for (who, text) in
            [(0, "boot x"), (0, "tick 1 10 1"), (0, "tick 2 20 1"), (1, "tick 2 20 1")]
        {
            record.hear(who, text);
        }
        let wrong = record.check().unwrap_err().to_string();
        assert!(wrong.contains("same time twice"), "{wrong}");
    }

    #[test]
    fn two_that_were_seen_running_at_once_are_found() {
        let mut record = record(&[(1, 1), (2, 2)]);
        let (t0, ms) = (Instant::now(), Duration::from_millis);
        record.saw_running(0, t0, t0 + ms(1));
        record.saw_running(1, t0 + ms(10), t0 + ms(11));
        record.check().unwrap();
        record.saw_running(0, t0 + ms(20), t0 + ms(21));
        let wrong = record.check().unwrap_err().to_string();
        assert!(wrong.contains("ran at once") && wrong.contains("node2"), "{wrong}");
    }

    #[test]
    fn what_the_guest_found_is_told() {
        let mut record = record(&[(1, 1)]);
        record.hear(0, "FATAL memory address=0x1");
        assert!(record.check().unwrap_err().to_string().contains("FATAL memory"));
    }
}
