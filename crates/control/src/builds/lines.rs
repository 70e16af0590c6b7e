//! What a build says, on its way into the database: bounded, in batches.

use kelvin_api::error::chain;
use kelvin_api::id::BuildId;
use kelvin_api::sandbox::LogLevel;
use kelvin_node_api::{BuildEvent, BuildLevel};

use crate::database::{BuildLine, Database};

/// What is kept of one build: lines, and bytes of them.
const MOST_LINES: u64 = 20_000;
const MOST_BYTES: usize = 5 << 20;
/// Bytes of one line.
const LINE_BYTES: usize = 16 << 10;

/// The log of one build.
pub(super) struct Book {
    database: Database,
    build: BuildId,
    lines: u64,
    bytes: usize,
    /// Nothing more is written: it is full, or the database has failed.
    is_closed: bool,
}

pub(super) fn level(level: BuildLevel) -> LogLevel {
    match level {
        BuildLevel::Debug => LogLevel::Debug,
        BuildLevel::Info => LogLevel::Info,
        BuildLevel::Warn => LogLevel::Warn,
        BuildLevel::Error => LogLevel::Error,
    }
}

/// A guest has written it: nothing that a terminal obeys, and not longer than a line may be.
fn clean(text: &str) -> String {
    let mut cleaned = String::with_capacity(text.len().min(LINE_BYTES));
    for letter in text.chars() {
        if cleaned.len() + letter.len_utf8() > LINE_BYTES {
            cleaned.push_str(" …");
            break;
        }
        if letter == '\t' || !letter.is_control() {
            cleaned.push(letter);
        }
    }
    cleaned
}

impl Book {
    pub fn new(database: Database, build: BuildId) -> Self {
        Self { database, build, lines: 0, bytes: 0, is_closed: false }
    }

    /// Writes what was told, as far as there is room; the first line that finds none is said to be the last.
    pub async fn write(&mut self, events: &mut Vec<BuildEvent>) {
        let mut batch = Vec::new();
        for event in events.drain(..) {
            if self.is_closed {
                continue;
            }
            let mut message = clean(&event.message);
            if self.lines + batch.len() as u64 + 1 >= MOST_LINES || self.bytes + message.len() > MOST_BYTES {
                self.is_closed = true;
                message = format!(
                    "the log ends here: {MOST_LINES} lines or {} MiB are kept; the build goes on",
                    MOST_BYTES >> 20
                );
            }
            self.bytes += message.len();
            batch.push(BuildLine { at: event.at, level: level(event.level), step: event.step, message });
        }
        if batch.is_empty() {
            return;
        }
        let first = self.lines;
        self.lines += batch.len() as u64;
        if let Err(error) = self.database.add_build_lines(&self.build, first, batch).await {
            self.is_closed = true;
            tracing::error!(build = %self.build, error = chain(&error), "what a build says is not kept any more");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_shown_and_not_obeyed() {
        assert_eq!(clean("a\x1b[31mb\r\n\tc\u{9b}d"), "a[31mb\tcd");
        let long = clean(&"ä".repeat(LINE_BYTES));
        assert!(long.len() <= LINE_BYTES + " …".len() && long.ends_with(" …"));
        assert_eq!(clean(&"x".repeat(LINE_BYTES)).len(), LINE_BYTES);
    }
}
