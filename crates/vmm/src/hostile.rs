//! What this process reads of guests and VMMs that may lie: how fast, how much, and what of it is shown to people.
//!
//! Every reader bounds the size of one message where it reads it, and the time where it waits. Here is what they share. The
//! tests below are the peers that they are made for.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

/// What is told of a text that a guest or a VMM has chosen, in characters.
const TOLD: usize = 1000;
/// What a peer may say before it has to wait, and how long it waits then: 25 MiB a second at the most.
const BURST: usize = 1 << 20;
const WAIT: Duration = Duration::from_millis(40);
/// What one message costs beside its bytes.
const MESSAGE: usize = 1 << 10;

/// `text` as it may stand in an error or a log: no control characters, and not without end.
pub fn told(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(TOLD).collect()
}

/// Reads the file at `path`, which somebody else can make as long as they like.
///
/// # Errors
/// `FileTooLarge` beyond `most` bytes, and as the file system gives them.
pub fn read_file(path: impl AsRef<Path>, most: u64) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(most + 1).read_to_string(&mut text)?;
    if text.len() as u64 > most {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {most} bytes")));
    }
    Ok(text)
}

/// How fast a peer may speak that nobody has asked: it is read no faster, so it waits, and this process does not work for
/// it without end. Who says no more than a burst at once never waits.
#[derive(Debug)]
pub struct Pace {
    since: Instant,
    said: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self { since: Instant::now(), said: 0 }
    }
}

impl Pace {
    /// Call it after each message, of `bytes`.
    pub async fn after(&mut self, bytes: usize) {
        self.said = self.said.saturating_add(bytes).saturating_add(MESSAGE);
        if self.said < BURST {
            return;
        }
        if self.since.elapsed() < WAIT {
            tokio::time::sleep(WAIT).await;
        }
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;

    #[test]
    fn what_a_guest_says_is_shown_in_part() {
        assert_eq!(told("a\u{1b}[31m\nb"), "a[31mb");
        assert_eq!(told(&"x".repeat(1 << 20)).len(), TOLD);
    }

    #[test]
    fn a_file_of_somebody_else_is_not_read_without_end() {
        assert_eq!(read_file("/dev/zero", 4096).unwrap_err().kind(), ErrorKind::FileTooLarge);
        assert_eq!(read_file("/proc/self/comm", 4096).unwrap().lines().count(), 1);
    }

    #[tokio::test]
    async fn a_flood_waits_and_a_burst_does_not() {
        let began = Instant::now();
        let mut pace = Pace::default();
        for _ in 0..100 {
            pace.after(1000).await;
        }
        assert!(began.elapsed() < WAIT, "{:?}", began.elapsed());
        let mut pace = Pace::default();
        for _ in 0..32 {
            pace.after(256 << 10).await;
        }
        assert!(began.elapsed() >= WAIT * 7, "8 MiB in {:?}", began.elapsed());
    }
}
