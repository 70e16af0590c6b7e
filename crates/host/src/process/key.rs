//! What names a process.

use serde::{Deserialize, Serialize};

/// What names a process beyond the reuse of its pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessKey {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot. Source: proc(5), `stat` field 22.
    pub start_time: u64,
}
