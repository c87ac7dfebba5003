//! How a command ends: the exit code, what is wrong, and what to do.

use std::process::ExitCode;

use tonic::{Code, Status};

/// Shown under `bell --help`; `cli/README.md` repeats it and a test compares the two.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  the cluster refused, or the task failed
  2  the command line is wrong
  3  there is no such VM, node, task or context
  4  it conflicts with what is there or with its state
  5  no controller can be reached
  6  the outcome is unknown, or time ran out; look with `bell task list`
  7  not permitted";

/// The exit codes. Scripts rely on them, so they never change their meaning.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    Done = 0,
    Refused = 1,
    Usage = 2,
    NotFound = 3,
    Conflict = 4,
    Unreachable = 5,
    Unknown = 6,
    Forbidden = 7,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command did not do what was asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    pub exit: Exit,
    pub message: String,
    pub remedy: Option<String>,
}

impl Failure {
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), remedy: None }
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// The reader of our output has closed it, as `head` does. That is no error and says nothing.
    pub fn output_closed() -> Self {
        Self::new(Exit::Done, "")
    }

    /// The request may have been carried out; repeating it might do it twice.
    pub fn outcome_unknown(what: &str, reason: &str) -> Self {
        Self::new(Exit::Unknown, format!("cannot tell whether this was done: {what}: {reason}"))
            .remedy("outcome unknown, look with `bell task list` before you repeat it")
    }

    /// A refusal in the cluster's own words.
    pub fn from_status(what: &str, subject: &Subject, status: &Status) -> Self {
        let exit = exit_of(status.code());
        let said = match status.message() {
            "" => status.code().description(),
            message => message,
        };
        match exit {
            Exit::Unknown => Self::outcome_unknown(what, said),
            _ => Self {
                exit,
                message: format!("cannot {what}: {said}"),
                remedy: remedy(status.code(), subject),
            },
        }
    }
}

/// What a command is about, so that a remedy can name the next command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Subject {
    Cluster,
    Node(String),
    Vm(String),
    Task(u64),
}

/// The exit code for a gRPC code.
pub const fn exit_of(code: Code) -> Exit {
    match code {
        Code::Ok => Exit::Done,
        Code::NotFound => Exit::NotFound,
        Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => Exit::Conflict,
        Code::PermissionDenied | Code::Unauthenticated => Exit::Forbidden,
        Code::Unavailable => Exit::Unreachable,
        // None of these says whether the thing was done.
        Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => Exit::Unknown,
        Code::InvalidArgument
        | Code::OutOfRange
        | Code::ResourceExhausted
        | Code::Unimplemented
        | Code::Internal
        | Code::DataLoss => Exit::Refused,
    }
}

fn remedy(code: Code, subject: &Subject) -> Option<String> {
    let text = match (code, subject) {
        (Code::NotFound, Subject::Vm(_)) => {
            "`bell vm list` and `bell node list` show what there is".into()
        }
        (Code::NotFound, Subject::Node(_)) => "`bell node list` shows the nodes".into(),
        (Code::NotFound, Subject::Task(_)) => "`bell task list --all` shows the tasks".into(),
        (Code::AlreadyExists, Subject::Vm(name)) => {
            format!("give another name, or look at the one that exists with `bell vm show {name}`")
        }
        (Code::FailedPrecondition, Subject::Vm(name)) => {
            format!("see its state and its task with `bell vm show {name}`")
        }
        (Code::FailedPrecondition, Subject::Node(name)) => {
            format!("see its phase with `bell node show {name}`")
        }
        (Code::ResourceExhausted, _) => "`bell node list` shows what each node has left".into(),
        (Code::PermissionDenied | Code::Unauthenticated, _) => {
            "use a context with an administrator's identity; `bell context list` shows yours".into()
        }
        (Code::Unavailable, _) => {
            "`bell cluster status` shows whether the cluster has a leader".into()
        }
        (Code::Unimplemented, _) => {
            "this `bell` and the controllers are of different releases".into()
        }
        (Code::Internal, _) => "the controller's log says more".into(),
        _ => return None,
    };
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_the_wire_has_its_exit_code() {
        for (code, exit) in [
            (Code::Ok, 0),
            (Code::InvalidArgument, 1),
            (Code::OutOfRange, 1),
            (Code::ResourceExhausted, 1),
            (Code::Unimplemented, 1),
            (Code::Internal, 1),
            (Code::DataLoss, 1),
            (Code::NotFound, 3),
            (Code::AlreadyExists, 4),
            (Code::FailedPrecondition, 4),
            (Code::Unavailable, 5),
            (Code::DeadlineExceeded, 6),
            (Code::Cancelled, 6),
            (Code::Unknown, 6),
            (Code::Aborted, 4),
            (Code::PermissionDenied, 7),
            (Code::Unauthenticated, 7),
        ] {
            assert_eq!(exit_of(code) as u8, exit, "{code:?}");
        }
    }

    #[test]
    fn a_refusal_names_the_deed_the_reason_and_the_next_command() {
        let status = Status::failed_precondition("VM web-1 is already on node n1");
        let failure =
            Failure::from_status("migrate VM web-1", &Subject::Vm("web-1".into()), &status);
        assert_eq!(failure.message, "cannot migrate VM web-1: VM web-1 is already on node n1");
        assert!(failure.remedy.unwrap().contains("bell vm show web-1"));
    }

    #[test]
    fn a_timeout_is_unknown_and_never_a_failure() {
        let status = Status::deadline_exceeded("the leader did not answer");
        let failure = Failure::from_status("stop VM a", &Subject::Vm("a".into()), &status);
        assert_eq!(failure.exit, Exit::Unknown);
        assert!(failure.remedy.unwrap().contains("bell task list"));
    }

    #[test]
    fn the_readme_has_the_same_exit_codes() {
        assert!(include_str!("../README.md").contains(EXIT_CODES));
    }
}
