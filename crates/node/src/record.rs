//! What the ledger remembers of each machine, and the one state machine of a sandbox.
//!
//! ```text
//! Starting ──ready──> Running ──end──> Stopping ──released──> (gone)
//!     └──────────────end─────────────────^
//! ```

use kelvin_api::id::{SandboxId, SnapshotId, Token};
use kelvin_api::network::Attachment;
use kelvin_api::sandbox::StartPath;
use kelvin_api::units::Shape;
use serde::{Deserialize, Serialize};

/// The persisted state of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Resources are being made; a crash ends it.
    Starting,
    /// Ready; a restart adopts it.
    Running,
    /// Being torn down; a restart goes on with it.
    Stopping,
}

/// What can happen to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The agent answered its activation.
    Ready,
    /// A user, a deadline, a failure or the VMM itself ended it.
    End,
}

/// The state after `event`; `None` when it cannot happen.
pub fn next(state: State, event: Event) -> Option<State> {
    match (state, event) {
        (State::Starting, Event::Ready) => Some(State::Running),
        (State::Starting | State::Running, Event::End) => Some(State::Stopping),
        (State::Running, Event::Ready) | (State::Stopping, Event::Ready | Event::End) => None,
    }
}

/// One machine in the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Record {
    /// It belongs to a sandbox.
    Sandbox(SandboxRecord),
}

/// What has to be known to adopt a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxRecord {
    /// Which one.
    pub sandbox: SandboxId,
    /// Where it is in its life.
    pub state: State,
    /// What it has.
    pub shape: Shape,
    /// Digest of its guest.
    pub guest: String,
    /// What it was restored from.
    pub snapshot: Option<SnapshotId>,
    /// How it started.
    pub start_path: StartPath,
    /// When it was ready.
    pub started_at: jiff::Timestamp,
    /// When the node ends it.
    pub ends_at: jiff::Timestamp,
    /// What callers must show: a gateway asks the node, and the node may have to activate again.
    #[serde(default)]
    pub access_token: Option<Token>,
    /// Its network.
    #[serde(default)]
    pub network: Option<Attachment>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_life_ends_and_none_comes_back(events in proptest::collection::vec(prop_oneof![Just(Event::Ready), Just(Event::End)], 0..20)) {
            let mut state = State::Starting;
            let mut ended = false;
            for event in events {
                match next(state, event) {
                    Some(new) => {
                        prop_assert!(!ended, "nothing follows an end");
                        ended = new == State::Stopping;
                        state = new;
                    }
                    None => prop_assert!(ended || (state == State::Running && event == Event::Ready)),
                }
            }
            prop_assert_eq!(ended, state == State::Stopping);
        }
    }
}
