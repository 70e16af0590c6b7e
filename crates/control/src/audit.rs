//! The entry of the audit log of one request.
//!
//! ```text
//! written, status 0 ──> the change ──> status of the reply ──> the reply
//! ```
//!
//! A create writes both in the transactions that it has anyway; every other change before and after. Nothing is changed
//! when it cannot be written. Who writes: the task of the request. A crash leaves an entry with status 0.

use std::sync::{Mutex, MutexGuard, PoisonError};

use http::StatusCode;
use kelvin_api::account::AuditEntry;
use kelvin_api::error::{Failure, chain};

use crate::accounts::Account;
use crate::database::{Database, Ended};
use crate::failures::database_failed;

/// The entry of a request that may change something.
#[derive(Debug)]
pub(crate) struct Audit {
    entry: AuditEntry,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Its number, once it is written.
    id: Option<i64>,
    /// What the log says of its end.
    ended: Option<(u16, String)>,
    /// The reply begins before the end is known.
    is_late: bool,
}

impl Audit {
    /// Of what `caller` asks `at` that time; not written yet.
    pub fn new(caller: &Account, action: String, target: String, at: jiff::Timestamp) -> Self {
        let entry = AuditEntry {
            id: 0,
            at,
            project: caller.project.to_string(),
            key_id: caller.key.clone(),
            action,
            target,
            status: 0,
        };
        Self { entry, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes it.
    ///
    /// # Errors
    /// When it cannot be written: then nothing may be changed.
    pub async fn begin(&self, database: &Database) -> Result<(), Failure> {
        let id = database.note(self.entry.clone()).await.map_err(database_failed)?;
        self.state().id = Some(id);
        Ok(())
    }

    /// The entry, for a transaction that writes it, about `target`.
    pub fn to_begin(&self, target: &str) -> AuditEntry {
        AuditEntry { target: target.to_owned(), ..self.entry.clone() }
    }

    /// It was written by a transaction.
    pub fn begun(&self, id: Option<i64>) {
        self.state().id = id;
    }

    /// How it ended, for a transaction that writes that.
    pub fn to_end(&self, status: StatusCode, target: &str) -> Option<Ended> {
        let id = self.state().id?;
        Some(Ended { entry: id, status: status.as_u16(), target: target.to_owned() })
    }

    /// That was written.
    pub fn ended(&self, ended: Option<Ended>) {
        if let Some(Ended { status, target, .. }) = ended {
            self.state().ended = Some((status, target));
        }
    }

    /// The reply begins before the change has ended, which is written by [`Audit::end_late`] alone.
    pub fn ends_late(&self) {
        self.state().is_late = true;
    }

    /// Writes how a change ended whose reply has begun already, or is about to.
    pub async fn end_late(&self, database: &Database, status: StatusCode) {
        self.write_end(database, status, self.entry.target.clone()).await;
    }

    /// Writes what is still to be written, before the reply: `target` when it is another than the path says.
    pub async fn end(&self, database: &Database, status: StatusCode, target: Option<String>) {
        if self.state().is_late {
            return;
        }
        self.write_end(database, status, target.unwrap_or_else(|| self.entry.target.clone())).await;
    }

    async fn write_end(&self, database: &Database, status: StatusCode, target: String) {
        let (id, known) = {
            let state = self.state();
            (state.id, state.ended.clone())
        };
        let written = match id {
            Some(_) if known == Some((status.as_u16(), target.clone())) => return,
            Some(entry) => {
                let ended = Ended { entry, status: status.as_u16(), target };
                let written = database.note_end(ended.clone()).await;
                if written.is_ok() {
                    self.ended(Some(ended));
                }
                written
            }
            None => {
                let entry = AuditEntry { status: status.as_u16(), target, ..self.entry.clone() };
                database.note(entry).await.map(drop)
            }
        };
        if let Err(error) = written {
            // The change is done, and its entry is there, with status 0: the log does not say how it ended.
            tracing::error!(error = chain(&error), action = self.entry.action, "the audit log is not whole");
        }
    }
}
