//! The phases of a create, a pause, a snapshot and a fork: one name each, the same in spans, `Server-Timing`, the bench and replies.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// One phase, in the order in which they happen on the create path, then on that of a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Intent is recorded and one node's capacity is held.
    Reserve,
    /// Waiting for one of the places in which restores run (see `NodeOptions::concurrent_restores`).
    Queue,
    /// A waiting VMM is taken, or one is started.
    Vmm,
    /// The machine is declared and its disk cloned; only on paths where that was not done ahead. A cold create does it
    /// beside [`Phase::Vmm`]: the two overlap.
    Disk,
    /// Device state is loaded; vCPUs are still stopped.
    Load,
    /// The sandbox's own network rules replace the slot's; only when it has some.
    Network,
    /// The vCPUs are started.
    Resume,
    /// Kernel start to the agent's first answer; only when cold.
    Boot,
    /// Kernel start to the first answer of the guest's kernel to a TCP connection; beside [`Phase::Boot`] and
    /// [`Phase::Activate`], to compare, and only when asked for.
    Tcp,
    /// One round trip: identity, environment, clock, entropy.
    Activate,
    /// The sandbox is owned and visible.
    Commit,
    /// The guest writes back and freezes its file system; what can be copied ahead is.
    Quiesce,
    /// The vCPUs are stopped and outstanding disk writes are done.
    Pause,
    /// Memory, device state and disk of the frozen instant are copied.
    Save,
    /// The copies get their name: from here on they can be restored from.
    Publish,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 15] = [
        Self::Reserve,
        Self::Queue,
        Self::Vmm,
        Self::Disk,
        Self::Load,
        Self::Network,
        Self::Resume,
        Self::Boot,
        Self::Tcp,
        Self::Activate,
        Self::Commit,
        Self::Quiesce,
        Self::Pause,
        Self::Save,
        Self::Publish,
    ];

    /// The name as it appears everywhere.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reserve => "reserve",
            Self::Queue => "queue",
            Self::Vmm => "vmm",
            Self::Disk => "disk",
            Self::Load => "load",
            Self::Network => "network",
            Self::Resume => "resume",
            Self::Boot => "boot",
            Self::Tcp => "tcp",
            Self::Activate => "activate",
            Self::Commit => "commit",
            Self::Quiesce => "quiesce",
            Self::Pause => "pause",
            Self::Save => "save",
            Self::Publish => "publish",
        }
    }
}

/// How long each phase of one create lasted. A phase that happens twice (in two parts of the
/// platform) is summed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(transparent)]
pub struct Timings(Vec<(Phase, f64)>);

impl Timings {
    /// Adds `duration` to `phase`.
    pub fn add(&mut self, phase: Phase, duration: Duration) {
        let ms = duration.as_secs_f64() * 1e3;
        match self.0.iter_mut().find(|(known, _)| *known == phase) {
            Some((_, sum)) => *sum += ms,
            None => self.0.push((phase, ms)),
        }
    }

    /// Adds the time since `*since` to `phase` and moves `*since` to now.
    pub fn lap(&mut self, phase: Phase, since: &mut Instant) {
        let now = Instant::now();
        self.add(phase, now - *since);
        *since = now;
    }

    /// Phases with their durations in milliseconds, in path order.
    pub fn iter(&self) -> impl Iterator<Item = (Phase, f64)> {
        Phase::ALL.into_iter().filter_map(|phase| self.0.iter().find(|(known, _)| *known == phase).copied())
    }

    /// The value of a `Server-Timing` header. Source: W3C Server Timing, `server-timing-param`.
    pub fn server_timing(&self, total: Duration) -> String {
        let mut text = String::new();
        for (phase, ms) in self.iter() {
            text.push_str(&format!("{};dur={ms:.3}, ", phase.name()));
        }
        text.push_str(&format!("total;dur={:.3}", total.as_secs_f64() * 1e3));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_appear_in_path_order_and_sum_up() {
        let mut timings = Timings::default();
        timings.add(Phase::Commit, Duration::from_millis(2));
        timings.add(Phase::Reserve, Duration::from_millis(1));
        timings.add(Phase::Commit, Duration::from_millis(3));
        assert_eq!(
            timings.server_timing(Duration::from_millis(7)),
            "reserve;dur=1.000, commit;dur=5.000, total;dur=7.000"
        );
    }
}
