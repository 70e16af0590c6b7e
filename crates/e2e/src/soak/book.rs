//! What clients and the main loop of a soak tell each other: where the server is, what was done, what was wrong.

use std::collections::BTreeMap;
use std::sync::Mutex;

use kelvin_client::{Client, Error};
use tokio::sync::watch;

/// How the server can be reached now; `None` while there is none.
#[derive(Clone)]
pub(super) struct Up {
    /// Counts restarts.
    pub(super) life: u32,
    pub(super) client: Client,
}

/// What clients and the main loop tell each other.
pub(super) struct Shared {
    pub(super) up: watch::Sender<Option<Up>>,
    pub(super) book: Mutex<Book>,
}

/// What was done and what was wrong.
#[derive(Debug, Default)]
pub(super) struct Book {
    /// How often each operation was done, by its name.
    pub(super) done: BTreeMap<&'static str, u64>,
    /// How often each was answered by an error that is to be expected: operation and why.
    pub(super) excused: BTreeMap<String, u64>,
    /// Whether this is a round in which VMMs are killed: their sandboxes are gone, and nobody is told which.
    pub(super) vmms_die: bool,
    pub(super) faults: Vec<String>,
}

impl Shared {
    pub(super) fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.book.lock().expect("no panic while it is held")
    }

    pub(super) fn did(&self, what: &'static str) {
        *self.book().done.entry(what).or_default() += 1;
    }

    pub(super) fn done(&self, what: &str) -> u64 {
        self.book().done.get(what).copied().unwrap_or_default()
    }

    pub(super) fn fault(&self, text: String) {
        println!("FAULT: {text}");
        self.book().faults.push(text);
    }

    /// The server, as soon as there is one.
    pub(super) async fn up(&self) -> Up {
        let mut seen = self.up.subscribe();
        let found = seen.wait_for(Option::is_some).await.expect("the main loop holds the sender");
        found.clone().expect("there is one")
    }

    /// Judges an error of `what`, which was asked of `asked`: to be expected (and why), or a fault.
    pub(super) fn judge(&self, what: &str, asked: &Up, error: &Error) {
        let now = self.up.borrow().as_ref().map(|up| up.life);
        let why = if now != Some(asked.life) {
            "the server went away".to_owned()
        } else if let Error::Refused(refused) = error
            && matches!(refused.code, 429 | 503)
        {
            format!("{} {}", refused.code, refused.error_code.as_deref().unwrap_or("no code"))
        } else if self.book().vmms_die {
            "beside killed VMMs".to_owned()
        } else {
            self.fault(format!("{what}: {}", kelvin_api::error::chain(error)));
            return;
        };
        *self.book().excused.entry(format!("{what}: {why}")).or_default() += 1;
    }
}
