//! What a build tells while it runs: lines, bounded in length and number. A reader that is slow slows the build down; one that has
//! gone changes nothing. Nothing is written; a crash leaves nothing.

use std::collections::VecDeque;

use kelvin_host::clock::Clock;
use kelvin_node_api::{BuildEvent, BuildLevel, BuildTold};
use tokio_util::sync::CancellationToken;

use crate::machine::text::{Lines, plain};

/// Lines of commands in one build, and bytes of them.
const LINES: u32 = 50_000;
const BYTES: usize = 16 << 20;
/// What of an output is cut into lines at once, in bytes.
const PORTION: usize = 64 << 10;
/// Lines that a failure is told with, and bytes of them.
const TAIL_LINES: usize = 20;
const TAIL_BYTES: usize = 4 << 10;

/// The log of one build.
pub struct Log {
    told: BuildTold,
    clock: Clock,
    /// The build is given up: nothing is waited for.
    stop: CancellationToken,
    step: Option<u32>,
    lines_left: u32,
    bytes_left: usize,
    /// Of the command that runs.
    lines: Lines,
    tail: VecDeque<String>,
}

fn one_line(text: &str) -> String {
    plain(text.replace(['\n', '\r'], " ").as_bytes())
}

impl Log {
    /// Nothing is told yet.
    pub fn new(told: BuildTold, clock: Clock, stop: CancellationToken) -> Self {
        let (lines, tail) = (Lines::default(), VecDeque::new());
        Self { told, clock, stop, step: None, lines_left: LINES, bytes_left: BYTES, lines, tail }
    }

    /// What comes is of this step, or of none.
    pub fn begin(&mut self, step: Option<u32>) {
        self.step = step;
        self.lines = Lines::default();
        self.tail.clear();
    }

    /// Of which step it is now.
    pub fn step(&self) -> Option<u32> {
        self.step
    }

    async fn tell(&self, level: BuildLevel, message: String) {
        let event = BuildEvent { at: self.clock.wall(), level, step: self.step, message };
        // Nobody listens any more: the build goes on.
        let _ = self.stop.run_until_cancelled(self.told.send(event)).await;
    }

    /// Tells how the build goes.
    pub async fn note(&self, text: &str) {
        self.tell(BuildLevel::Info, one_line(text)).await;
    }

    /// Tells that it goes on, but not as asked.
    pub async fn warn(&self, text: &str) {
        self.tell(BuildLevel::Warn, one_line(text)).await;
    }

    /// Takes what a command has written.
    pub async fn output(&mut self, bytes: &[u8]) {
        // A message of a guest may be nothing but line ends: what becomes of it is held a portion at a time.
        for portion in bytes.chunks(PORTION) {
            for line in self.lines.take(portion) {
                self.line(line).await;
            }
        }
    }

    /// The command has ended.
    pub async fn end(&mut self) {
        if let Some(line) = self.lines.finish() {
            self.line(line).await;
        }
    }

    async fn line(&mut self, line: String) {
        self.tail.push_back(line.clone());
        if self.tail.len() > TAIL_LINES {
            self.tail.pop_front();
        }
        if self.lines_left == 0 {
            return;
        }
        self.lines_left -= 1;
        match self.bytes_left.checked_sub(line.len()) {
            Some(left) if self.lines_left > 0 => {
                self.bytes_left = left;
                self.tell(BuildLevel::Info, line).await;
            }
            _ => {
                self.lines_left = 0;
                self.warn("what commands write from here on is left out: it is too much").await;
            }
        }
    }

    /// The last lines of the command, when it has written any.
    pub fn last_lines(&self) -> Option<String> {
        let mut bytes = 0;
        let kept = self.tail.iter().rev().take_while(|line| {
            bytes += line.len() + 1;
            bytes <= TAIL_BYTES
        });
        let mut kept: Vec<&str> = kept.map(String::as_str).collect();
        kept.reverse();
        (!kept.is_empty()).then(|| kept.join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    fn log(room: usize) -> (Log, mpsc::Receiver<BuildEvent>) {
        let (told, events) = mpsc::channel(room);
        (Log::new(told, Clock::system().unwrap(), CancellationToken::new()), events)
    }

    #[tokio::test]
    async fn lines_are_of_their_step_and_the_last_ones_are_kept() {
        let (mut log, mut events) = log(1000);
        log.begin(Some(3));
        for at in 0..100 {
            log.output(format!("\x1b[1mline {at}\n").as_bytes()).await;
        }
        log.output(b"no end").await;
        log.end().await;
        let tail = log.last_lines().unwrap();
        assert_eq!((tail.lines().count(), tail.lines().last()), (TAIL_LINES, Some("no end")));
        log.begin(None);
        assert_eq!(log.last_lines(), None);
        log.note("over\nand done").await;
        let mut all = Vec::new();
        while let Ok(event) = events.try_recv() {
            all.push((event.step, event.message));
        }
        assert_eq!(all.len(), 102);
        assert_eq!(all[7], (Some(3), "line 7".to_owned()));
        assert_eq!(all[101], (None, "over and done".to_owned()));
    }

    #[tokio::test]
    async fn a_flood_is_bounded_and_its_end_is_still_known() {
        let (mut log, mut events) = log(LINES as usize + 10);
        for _ in 0..5 {
            log.output(&b"y\n".repeat(LINES as usize / 2)).await;
        }
        log.output(b"the cause\n").await;
        log.end().await;
        let mut count = 0;
        let mut last = None;
        while let Ok(event) = events.try_recv() {
            count += 1;
            last = Some(event);
        }
        assert_eq!(count, LINES);
        assert_eq!(last.unwrap().level, BuildLevel::Warn);
        assert!(log.last_lines().unwrap().ends_with("the cause"));
        // Somebody who does not read holds up nobody who gives the build up.
        let (told, held) = mpsc::channel(1);
        let mut full = Log { told, ..log };
        full.note("fits").await;
        full.stop.cancel();
        full.output(b"does not\n").await;
        drop(held);
        let log = full;
        // Nobody listens.
        drop(events);
        log.note("goes on").await;
    }
}
