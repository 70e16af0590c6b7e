//! Faults that the harness finds and that are not mended yet.
//!
//! Whoever mends one takes its line out: as long as it is here, a violation of its kind is counted and printed, and does
//! not fail the run. A line that matches nothing any more fails the run, so that none is forgotten.

use crate::case::{Again, Case, Scenario};
use crate::check::Violation;
use crate::faults::What;

/// A fault that is known.
pub struct Known {
    /// Its number in issue 17.
    pub number: u32,
    /// What it is.
    pub what: &'static str,
    /// Whether a violation is of it.
    pub is: fn(&Case, &Violation) -> bool,
}

/// Those that are known.
pub const KNOWN: &[Known] = &[
    Known {
        number: 9,
        what: "a silent or slow guest holds up another project's clone",
        is: |_, violation| violation.rule == "slow neighbour",
    },
    Known {
        number: 9,
        what: "a silent or slow guest holds up the end of its sandbox",
        is: |case, violation| {
            matches!(violation.rule, "deadline" | "slow kill")
                && matches!(case.plan.what, What::Silence | What::Slow(_))
        },
    },
    Known {
        number: 4,
        what: "a snapshot whose files cannot be removed is forgotten, and there again after a restart",
        is: |case, violation| {
            case.scenario == Scenario::DeleteSnapshot
                && matches!(violation.rule, "snapshot" | "left")
                && matches!(case.plan.what, What::Fail | What::Crash)
        },
    },
    Known {
        number: 12,
        what: "a graceful stop removes what a resumed or forked sandbox runs from",
        is: |_, violation| violation.rule == "probe" && violation.text.contains("no snapshot"),
    },
    Known {
        number: 13,
        what: "a restart ends a sandbox whose guest does not answer",
        is: |case, violation| {
            violation.rule == "lost"
                && matches!(case.plan.what, What::Silence | What::Slow(_))
                && (case.scenario.is_start() || case.again != Again::No)
        },
    },
];
