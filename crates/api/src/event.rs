//! What became of sandboxes, as the server tells it.

use serde::{Deserialize, Serialize};

use crate::account::Project;
use crate::id::SandboxId;
use crate::sandbox::StartPath;

/// What became of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "kind", rename_all = "kebab-case", rename_all_fields = "camelCase")]
pub enum Happened {
    /// It can be used.
    Created {
        /// How it started.
        start_path: StartPath,
        /// What it was forked from.
        #[serde(rename = "parentID", default, skip_serializing_if = "Option::is_none")]
        parent: Option<SandboxId>,
    },
    /// It was paused.
    Paused,
    /// It runs again.
    Resumed,
    /// It was given another deadline.
    DeadlineSet {
        /// Which one.
        end_at: jiff::Timestamp,
    },
    /// What it may reach was changed.
    NetworkSet,
    /// It is no more.
    Ended {
        /// Why, in words of the node or of who ended it.
        reason: String,
    },
}

impl Happened {
    /// Its kind, as it is written.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Created { .. } => "created",
            Self::Paused => "paused",
            Self::Resumed => "resumed",
            Self::DeadlineSet { .. } => "deadline-set",
            Self::NetworkSet => "network-set",
            Self::Ended { .. } => "ended",
        }
    }
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// Its number: grows, and is never given twice.
    pub id: i64,
    /// When it was recorded.
    pub at: jiff::Timestamp,
    /// Of which sandbox.
    #[serde(rename = "sandboxID")]
    pub sandbox: SandboxId,
    /// Whose it was.
    pub project: Project,
    /// What it was made of.
    #[serde(rename = "templateID")]
    pub template: String,
    /// What became of it.
    #[serde(flatten)]
    pub what: Happened,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_object_with_its_kind() {
        let event = Event {
            id: 3,
            at: jiff::Timestamp::UNIX_EPOCH,
            sandbox: SandboxId::random(),
            project: Project::default(),
            template: "base".to_owned(),
            what: Happened::Created { start_path: StartPath::Warm, parent: None },
        };
        let written = serde_json::to_value(&event).unwrap();
        assert_eq!((&written["kind"], &written["startPath"]), (&"created".into(), &"warm".into()));
        assert_eq!(serde_json::from_value::<Event>(written).unwrap(), event);
        let ended = Happened::Ended { reason: "killed".to_owned() };
        for what in [ended, Happened::Paused, Happened::DeadlineSet { end_at: event.at }] {
            assert_eq!(serde_json::to_value(&what).unwrap()["kind"], what.kind());
        }
    }
}
