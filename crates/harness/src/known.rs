//! Faults that the harness finds and that are not mended yet.
//!
//! Whoever mends one takes its line out: as long as it is here, a violation of its kind is counted and printed, and does
//! not fail the run. A line that matches nothing any more fails the run, so that none is forgotten.

use crate::case::Case;
use crate::check::Violation;

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
pub const KNOWN: &[Known] = &[];
