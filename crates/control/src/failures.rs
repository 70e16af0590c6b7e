//! Failures that more than one file says, in the same words.

use kelvin_api::error::{ErrorCode, Failure};

use crate::database::{self, Exceeded, Limited};

/// What is said when a limit would be exceeded.
pub(crate) fn exceeded(Exceeded { what, of_project, limit, used }: Exceeded) -> Failure {
    let whose = if of_project { "this project" } else { "this API key" };
    let (code, text, remedy) = match what {
        Limited::Sandboxes => (
            ErrorCode::TooManySandboxes,
            format!("{used} of the {limit} sandboxes that {whose} may have run already"),
            "end or pause one",
        ),
        Limited::Creating => (
            ErrorCode::TooManyCreates,
            format!("{used} of the {limit} sandboxes that {whose} may make at one time are being made"),
            "wait until one is there",
        ),
        Limited::Paused => (
            ErrorCode::TooManyPaused,
            format!("{used} of the {limit} sandboxes that {whose} may pause are paused"),
            "end or resume one",
        ),
        Limited::Snapshots => (
            ErrorCode::TooManySnapshots,
            format!("{used} of the {limit} snapshots that {whose} may keep are kept"),
            "delete one",
        ),
        Limited::Disk => (
            ErrorCode::TooMuchDisk,
            format!("{used} MiB of the {limit} MiB of disk that {whose} may take are in use"),
            "delete snapshots, or end sandboxes",
        ),
    };
    let remedy = format!(
        "{remedy}, or ask the operator for another limit (`kelvin key create`, `kelvin project limit`)"
    );
    Failure::new(code, text, remedy)
}

pub(crate) fn database_failed(error: database::Error) -> Failure {
    match error {
        database::Error::Full(_) => Failure::new(
            ErrorCode::DiskFull,
            "the database cannot be written: the disk is full",
            "free space on the data directory's file system, `kelvin gc` removes what nothing needs",
        ),
        database::Error::Fenced => Failure::new(
            ErrorCode::SandboxChanging,
            "the sandbox was given to another node meanwhile",
            "try again",
        ),
        database::Error::Failed(_) => {
            let remedy = "check the disk of the data directory";
            Failure::new(ErrorCode::Database, "the database cannot be used", remedy).with_cause(&error)
        }
    }
}

pub(crate) fn sandbox_not_found(id: &str) -> Failure {
    // The same words whether it never existed, has ended, or is no id at all.
    Failure::new(
        ErrorCode::SandboxNotFound,
        format!("sandbox {} was not found", id.chars().take(80).collect::<String>()),
        "`kelvin sandbox list` shows what runs",
    )
}

/// What is said of a `templateID` that names nothing.
pub(crate) fn unknown_template(name: &str) -> Failure {
    let shown: String = name.chars().take(80).collect();
    Failure::new(
        ErrorCode::TemplateNotFound,
        format!("no template {shown:?}"),
        "`kelvin template list` and `kelvin snapshot list` show what there is",
    )
}
