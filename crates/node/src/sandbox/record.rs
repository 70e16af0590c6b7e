//! What the ledger remembers of each machine, and the one state machine of a sandbox.
//!
//! ```text
//! Starting ──ready──> Running ──end──> Stopping ──released──> (gone)
//!     └──────────────end─────────────────^
//! Running ──pause──> Paused ──end──> (gone)
//!     ^──────resume─────┘
//! ```
//!
//! A sandbox that is paused has a record and no machine. One transaction takes the record from the machine to
//! nobody, another from there to the next machine: whichever a crash leaves is the whole truth.

use kelvin_api::account::Project;
use kelvin_api::id::{SandboxId, SnapshotId, TemplateName, Token};
use kelvin_api::network::Attachment;
use kelvin_api::sandbox::{EnvVars, Lifecycle, SandboxState, StartPath};
use kelvin_api::units::Shape;
use kelvin_host::clock::Stamp;
use kelvin_host::ledger::Body;
use kelvin_node_api::Live;
use kelvin_store::identity::Identity;
use serde::{Deserialize, Serialize};

/// The persisted state of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Resources are being made; a crash ends it.
    Starting,
    /// Ready; a restart adopts it.
    Running,
    /// Frozen in its snapshot; no machine.
    Paused,
    /// Being torn down; a restart goes on with it.
    Stopping,
}

/// What can happen to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The agent answered its activation.
    Ready,
    /// Its machine was saved.
    Pause,
    /// A machine was restored from what was saved, and has answered.
    Resume,
    /// A user, a deadline, a failure or the VMM itself ended it.
    End,
}

/// The state after `event`; `None` when it cannot happen.
pub fn next(state: State, event: Event) -> Option<State> {
    match (state, event) {
        (State::Starting, Event::Ready) => Some(State::Running),
        (State::Running, Event::Pause) => Some(State::Paused),
        (State::Paused, Event::Resume) => Some(State::Running),
        (State::Starting | State::Running | State::Paused, Event::End) => Some(State::Stopping),
        (State::Starting | State::Paused | State::Stopping, Event::Pause)
        | (State::Starting | State::Running | State::Stopping, Event::Resume)
        | (State::Running | State::Paused | State::Stopping, Event::Ready)
        | (State::Stopping, Event::End) => None,
    }
}

/// The form of records that this build writes. What was ever written is in `crates/node/tests/records`, and is read by a test:
/// whoever changes a field adds a form there, and raises this where the release before could misunderstand it.
pub const VERSION: u32 = 1;

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
    /// Its template.
    pub template: TemplateName,
    /// Digest of its guest.
    pub guest: String,
    /// What it was restored from; while it is paused, what it is frozen in.
    pub snapshot: Option<SnapshotId>,
    /// The last snapshot in its past that was baked or kept.
    pub lineage: Option<SnapshotId>,
    /// The sandbox it was forked from.
    pub parent: Option<SandboxId>,
    /// How often it was paused.
    pub generation: u64,
    /// What a snapshot of it must be restored as, when it was booted.
    pub identity: Option<Identity>,
    /// How it started.
    pub start_path: StartPath,
    /// When it was ready.
    pub started_at: jiff::Timestamp,
    /// When the node ends it, by the wall clock as it was when that was said: for people, and for what was written
    /// before there was a `deadline`.
    pub ends_at: jiff::Timestamp,
    /// The same on boot time, which is what counts. None of a sandbox that is paused: it has no deadline.
    #[serde(default)]
    pub deadline: Option<Stamp>,
    /// Whose it is.
    #[serde(default)]
    pub project: Project,
    /// What callers must show: a gateway asks the node.
    pub access_token: Option<Token>,
    /// Environment of its processes, for its forks.
    pub env_vars: EnvVars,
    /// The hardware address of its link, when it is not every clone's.
    pub mac: Option<[u8; 6]>,
    /// Its network.
    pub network: Option<Attachment>,
    /// What happens without being asked for.
    pub lifecycle: Lifecycle,
    /// How long it lives when traffic resumes it, in seconds.
    pub timeout_s: u64,
    /// The guest's machine-id, which a boot from its own disk keeps.
    #[serde(default)]
    pub machine_id: Option<[u8; 16]>,
}

impl SandboxRecord {
    /// It as the ledger keeps it.
    ///
    /// # Errors
    /// As the encoder gives them, which cannot be.
    pub fn body(&self) -> Result<Body, serde_json::Error> {
        Ok(Body { version: VERSION, json: serde_json::to_string(&Record::Sandbox(self.clone()))? })
    }

    /// What the ledger keeps, of this release or a former one.
    ///
    /// # Errors
    /// In words, why it cannot be read.
    pub fn read(body: &Body) -> Result<Self, String> {
        if body.version > VERSION {
            return Err(format!(
                "it has form {} of a newer release, and this one reads up to {VERSION}",
                body.version
            ));
        }
        match serde_json::from_str(&body.json) {
            Ok(Record::Sandbox(record)) => Ok(record),
            Err(error) => Err(format!("it does not parse: {error}")),
        }
    }

    /// What the control plane is told.
    pub fn live(&self) -> Live {
        let paused = self.state == State::Paused;
        Live {
            sandbox: self.sandbox.clone(),
            ends_at: self.ends_at,
            shape: self.shape,
            start_path: self.start_path,
            started_at: self.started_at,
            state: if paused { SandboxState::Paused } else { SandboxState::Running },
            generation: self.generation,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What was written before there were pauses says too little to go on with.
    const TOO_OLD: [&str; 2] = ["0-9d4e3d5", "0-abe75ef"];

    /// Every form, by its name.
    fn forms() -> Vec<(String, Body)> {
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/records");
        let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let forms = files.filter(|path| path.extension().is_some_and(|kind| kind == "json")).map(|path| {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            let version = name.split('-').next().unwrap().parse().unwrap();
            (name, Body { version, json: std::fs::read_to_string(path).unwrap() })
        });
        forms.collect()
    }

    #[test]
    fn every_form_is_read_or_told_apart() {
        let forms = forms();
        assert!(forms.len() >= 7, "{forms:?}");
        for (name, body) in forms {
            match SandboxRecord::read(&body) {
                Ok(record) => {
                    assert!(!TOO_OLD.contains(&&*name), "{name}");
                    assert_eq!(SandboxRecord::read(&record.body().unwrap()).unwrap(), record, "{name}");
                }
                Err(why) => {
                    assert!(TOO_OLD.contains(&&*name), "{name}: {why}");
                    let (told, snapshot) =
                        crate::sandbox::unreadable::read_some(&body, true).expect("which sandbox it is");
                    assert_eq!(snapshot.expect("its snapshot").as_str(), "wg5fw3gs3abzrxfseo4v");
                    assert_eq!(told.sandbox.as_str(), "5qkeyzyj2echyrly4mop");
                    assert_eq!((told.shape.vcpus, told.shape.memory_mib.0), (1, 256));
                }
            }
        }
    }

    /// A field that is new, gone or renamed is another form.
    #[test]
    fn what_is_written_has_the_newest_form() {
        fn names(value: &serde_json::Value, path: &str, into: &mut std::collections::BTreeSet<String>) {
            let serde_json::Value::Object(fields) = value else { return };
            for (name, value) in fields {
                let path = format!("{path}.{name}");
                names(value, &path, into);
                into.insert(path);
            }
        }
        let newest = VERSION.to_string();
        let (_, body) =
            forms().into_iter().find(|(name, _)| *name == newest).expect("a file of the newest form");
        let written = SandboxRecord::read(&body).unwrap().body().unwrap();
        let [golden, now] = [&body.json, &written.json].map(|json| {
            let mut all = std::collections::BTreeSet::new();
            names(&serde_json::from_str(json).unwrap(), "", &mut all);
            all
        });
        assert_eq!(now, golden);
    }

    #[test]
    fn what_is_newer_or_damaged_is_not_guessed_at() {
        let (_, body) = forms().into_iter().find(|(name, _)| *name == VERSION.to_string()).unwrap();
        let newer = Body { version: VERSION + 1, ..body.clone() };
        assert!(SandboxRecord::read(&newer).unwrap_err().contains("a newer release"));
        let more =
            Body { json: body.json.replacen("\"state\"", "\"zone\": 1, \"state\"", 1), ..body.clone() };
        assert!(SandboxRecord::read(&more).unwrap_err().contains("unknown field `zone`"));
        for json in ["", "{", "null", "{\"sandbox\": 7}", &body.json[..body.json.len() / 2]] {
            let damaged = Body { json: json.to_owned(), ..body.clone() };
            SandboxRecord::read(&damaged).unwrap_err();
            assert!(crate::sandbox::unreadable::read_some(&damaged, true).is_none());
        }
    }

    proptest! {
        #[test]
        fn every_life_ends_and_none_comes_back(events in proptest::collection::vec(prop_oneof![Just(Event::Ready), Just(Event::Pause), Just(Event::Resume), Just(Event::End)], 0..20)) {
            let mut state = State::Starting;
            let mut ended = false;
            for event in events {
                match next(state, event) {
                    Some(new) => {
                        prop_assert!(!ended, "nothing follows an end");
                        ended = new == State::Stopping;
                        state = new;
                    }
                    None => prop_assert!(ended || event != Event::End, "what lives can end"),
                }
            }
            prop_assert_eq!(ended, state == State::Stopping);
        }
    }
}
