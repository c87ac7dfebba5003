//! What the agent wrote about a VMM, read without allocating: a few fields of `incarnation.json`.
//!
//! The agent writes it with one serializer, compact, without nested objects, and with no text of
//! anybody else in it. So a field is found by its quoted name and colon, which no value can contain.

/// What matters of one incarnation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// Process number and start time, which together name one process; `None` before its start.
    pub process: Option<(u32, u64)>,
    /// Its arbiter is the lease.
    pub lease: bool,
    /// A start has been sent.
    pub may_have_run: bool,
}

/// Reads a record; `None` if it is not one.
pub fn parse(json: &[u8]) -> Option<Record> {
    if json.first() != Some(&b'{') || json.last() != Some(&b'}') {
        return None;
    }
    let process = match (value(json, b"\"pid\":")?, value(json, b"\"start_ticks\":")?) {
        (b"null", _) | (_, b"null") => None,
        (pid, start_ticks) => Some((u32::try_from(number(pid)?).ok()?, number(start_ticks)?)),
    };
    let lease = match value(json, b"\"arbiter\":")? {
        b"\"lease\"" => true,
        b"\"storage\"" => false,
        _ => return None,
    };
    let may_have_run = match value(json, b"\"may_have_run\":")? {
        b"true" => true,
        b"false" => false,
        _ => return None,
    };
    Some(Record { process, lease, may_have_run })
}

/// The text between a name and the next comma or the end.
fn value<'a>(json: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let at = json.windows(name.len()).position(|window| window == name)?;
    let rest = &json[at + name.len()..];
    let end = rest.iter().position(|byte| matches!(byte, b',' | b'}'))?;
    Some(&rest[..end])
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Field 22 of `/proc/<pid>/stat`, when the process started. The fields are counted behind the name,
/// which may hold anything.
pub fn start_ticks(stat: &[u8]) -> Option<u64> {
    let behind = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = stat[behind + 1..].split(u8::is_ascii_whitespace).filter(|f| !f.is_empty());
    number(fields.nth(19)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bellwether_agent::runtime_dir::{IncarnationRecord, RuntimeDir};
    use bellwether_types::{Arbiter, BootId, Epoch, VmId};
    use proptest::prelude::*;
    use uuid::Uuid;

    fn incarnation(arbiter: Arbiter, pid: Option<u32>) -> IncarnationRecord {
        IncarnationRecord {
            vm_id: VmId::from_uuid(Uuid::from_u128(9)),
            home: Epoch(3),
            epoch: Epoch(4),
            arbiter,
            boot_id: BootId::from_uuid(Uuid::from_u128(1)),
            pid,
            start_ticks: pid.map(|_| 987_654),
            loaded: Some([255; 32]),
            loading: Some([1; 32]),
            loaded_file: Some("/s/state/a.state".into()),
            load_us: 6,
            may_have_run: true,
            claiming: None,
            claimed_from: None,
            prepare_us: 5,
            sealed: None,
        }
    }

    /// The agent's own writer, so that a change of the format is noticed here.
    fn written(record: &IncarnationRecord) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::open(dir.path()).unwrap();
        let home = runtime.home(record.vm_id, record.home);
        home.create().unwrap();
        home.write_record(record).unwrap();
        std::fs::read(home.dir().join("incarnation.json")).unwrap()
    }

    #[test]
    fn what_the_agent_writes_is_read() {
        let json = written(&incarnation(Arbiter::Lease, Some(4711)));
        let process = Some((4711, 987_654));
        assert_eq!(parse(&json), Some(Record { process, lease: true, may_have_run: true }));
        let json = written(&incarnation(Arbiter::Storage, None));
        let expected = Record { process: None, lease: false, may_have_run: true };
        assert_eq!(parse(&json), Some(expected));
    }

    #[test]
    fn what_is_no_record_is_none() {
        let json = written(&incarnation(Arbiter::Lease, Some(1)));
        let text = String::from_utf8(json.clone()).unwrap();
        for broken in [
            text.replace("\"lease\"", "\"other\""),
            text.replace("987654", "-1"),
            text.replace("\"pid\"", "\"qid\""),
            String::new(),
        ] {
            assert_eq!(parse(broken.as_bytes()), None, "{broken}");
        }
        assert_eq!(parse(&json[..json.len() - 1]), None, "cut off");
    }

    #[test]
    fn the_start_of_this_process_is_found() {
        let stat = std::fs::read("/proc/self/stat").unwrap();
        assert!(start_ticks(&stat).unwrap() > 0);
        assert_eq!(start_ticks(b"1 (a) b) S 1 2"), None);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = (parse(&bytes), start_ticks(&bytes));
        }
    }
}
