//! A sandbox's console, line by line, with when each was seen.
//!
//! A console has no clock: a line's time is when it was first read. Kept in memory, as much as the VMM keeps; a daemon
//! that starts anew begins with what the VMM still has.

use std::collections::VecDeque;

use kelvin_node_api::ConsoleLine;

/// Lines that are kept, bytes of all of them, and bytes of one: a guest may print without an end of line.
const LINES: usize = 2000;
const BYTES: usize = 256 << 10;
const LINE: usize = 8 << 10;
/// How much of the end of one reading is looked for in the next, in bytes.
const SEAM: usize = 512;

/// What was seen of it.
#[derive(Debug, Clone, Default)]
pub struct Console {
    last: String,
    lines: VecDeque<ConsoleLine>,
    /// Whether the last line has no end yet.
    is_open: bool,
}

/// What of `now` is new, when `last` was read before: both are the end of the same text.
fn fresh<'a>(last: &str, now: &'a str) -> &'a str {
    if let Some(rest) = now.strip_prefix(last) {
        return rest;
    }
    // The beginning was lost meanwhile. All of it, when what was read is not there any more.
    let from = (last.len().saturating_sub(SEAM)..=last.len()).find(|at| last.is_char_boundary(*at));
    let seam = &last[from.unwrap_or(last.len())..];
    if last.len() > SEAM {
        return match now.rfind(seam) {
            Some(at) => &now[at + seam.len()..],
            None => now,
        };
    }
    let kept =
        (0..last.len()).filter(|at| last.is_char_boundary(*at)).find(|at| now.starts_with(&last[*at..]));
    kept.map_or(now, |at| &now[last.len() - at..])
}

impl Console {
    /// Takes a reading of the whole console at `at`; all lines that are kept.
    pub fn read(&mut self, now: String, at: jiff::Timestamp) -> Vec<ConsoleLine> {
        for piece in fresh(&self.last, &now).split_inclusive('\n') {
            let text: String = piece.chars().filter(|c| !c.is_control() || *c == '\t').collect();
            match self.lines.back_mut() {
                Some(line) if self.is_open && line.text.len() + text.len() <= LINE => {
                    line.text.push_str(&text)
                }
                _ => self.lines.push_back(ConsoleLine { at, text }),
            }
            self.is_open = !piece.ends_with('\n');
        }
        let mut bytes: usize = self.lines.iter().map(|line| line.text.len()).sum();
        while self.lines.len() > LINES || bytes > BYTES {
            bytes -= self.lines.pop_front().map_or(0, |line| line.text.len());
        }
        self.last = now;
        self.lines()
    }

    /// The lines that were seen, oldest first.
    pub fn lines(&self) -> Vec<ConsoleLine> {
        self.lines.iter().cloned().collect()
    }

    /// The same on another machine, whose console begins anew.
    pub fn on_another_machine(&self) -> Self {
        Self { last: String::new(), lines: self.lines.clone(), is_open: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_has_one_time() {
        let at = |second| jiff::Timestamp::from_second(second).unwrap();
        let mut console = Console::default();
        let shown = |lines: Vec<ConsoleLine>| {
            lines.into_iter().map(|line| (line.at.as_second(), line.text)).collect::<Vec<_>>()
        };
        let line = |second: i64, text: &str| (second, text.to_owned());
        assert_eq!(shown(console.read("one\r\ntw".into(), at(1))), [line(1, "one"), line(1, "tw")]);
        assert_eq!(
            shown(console.read("one\r\ntwo\nthree\n".into(), at(2))),
            [line(1, "one"), line(1, "two"), line(2, "three")]
        );
        assert_eq!(shown(console.read("one\r\ntwo\nthree\n".into(), at(3))).len(), 3);
        // The VMM has dropped the beginning.
        assert_eq!(shown(console.read("wo\nthree\nfour\n".into(), at(4)))[3..], [line(4, "four")]);
    }

    #[test]
    fn a_flood_is_bounded() {
        let mut console = Console::default();
        let text = "x\n".repeat(3 * LINES);
        assert_eq!(console.read(text, jiff::Timestamp::UNIX_EPOCH).len(), LINES);
        // Without an end of line, again and again.
        for round in 0..100 {
            let lines = console.read(format!("{round}{}", "y".repeat(64 << 10)), jiff::Timestamp::UNIX_EPOCH);
            assert!(lines.iter().map(|line| line.text.len()).sum::<usize>() <= BYTES);
        }
    }
}
