//! Where a runner's state file has to be. An agent tells the path in its answer to a seal, and
//! every node that loads the file opens it: so it is checked, and never taken as it comes.

use std::path::{Component, Path};

use bellwether_types::{Handover, StateFileRef, VmId};

use crate::state::Runner;

/// The state file that a runner has handed over.
pub fn handed_over(storage: &Path, vm: VmId, handover: &Handover) -> StateFileRef {
    let Handover { epoch, generation, bytes, hash } = *handover;
    let path = storage.join("state").join(format!("{vm}.{epoch}.{generation}.state"));
    StateFileRef { path, hash, epoch, bytes }
}

/// Checks that a file that a runner has sealed is `<storage>/state/<vm>.<epoch>.<n>.state`.
pub fn check(storage: &Path, vm: VmId, runner: &Runner, file: &StateFileRef) -> Result<(), String> {
    let prefix = format!("{vm}.{}.", runner.epoch);
    let is_number = |text: &str| text.parse::<u64>().is_ok_and(|n| n.to_string() == text);
    let name = file.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let number = name.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix(".state"));
    let plain = file
        .path
        .components()
        .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let expected = storage.join("state");
    let there = file.path.parent() == Some(expected.as_path());
    match file.epoch == runner.epoch && plain && there && number.is_some_and(is_number) {
        true => Ok(()),
        false => Err(format!(
            "node {} sealed epoch {} into {}; a state file of epoch {} is {}/{prefix}<number>.state",
            runner.node,
            file.epoch,
            file.path.display(),
            runner.epoch,
            expected.display()
        )),
    }
}

#[cfg(test)]
mod tests {
    use bellwether_types::{BootId, Epoch, NodeId};
    use uuid::Uuid;

    use super::*;

    #[test]
    fn only_the_runners_own_file_on_the_storage_is_taken() {
        let vm = VmId::from_uuid(Uuid::from_u128(7));
        let boot_id = BootId::from_uuid(Uuid::from_u128(8));
        let runner = Runner { node: NodeId(1), epoch: Epoch(3), boot_id };
        let checked = |path: String, epoch: u64| {
            let file =
                StateFileRef { path: path.into(), hash: [0; 32], epoch: Epoch(epoch), bytes: 1 };
            check(Path::new("/s"), vm, &runner, &file)
        };
        assert_eq!(checked(format!("/s/state/{vm}.3.17.state"), 3), Ok(()));
        let other = VmId::from_uuid(Uuid::from_u128(9));
        for (path, epoch) in [
            (format!("/s/state/{vm}.3.17.state"), 4),
            (format!("/s/state/{vm}.4.17.state"), 3),
            (format!("/s/state/{other}.3.17.state"), 3),
            (format!("/s/state/{vm}.3..state"), 3),
            (format!("/s/state/{vm}.3.+1.state"), 3),
            (format!("/s/state/{vm}.3.1.state.bak"), 3),
            (format!("/s/state/../state/{vm}.3.1.state"), 3),
            (format!("/s/{vm}.3.1.state"), 3),
            (format!("state/{vm}.3.1.state"), 3),
            ("/etc/shadow".to_owned(), 3),
        ] {
            let refused = checked(path.clone(), epoch).unwrap_err();
            assert!(refused.contains(&path) && refused.contains("/s/state/"), "{refused}");
        }
    }
}
