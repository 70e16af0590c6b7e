//! What a guest has written, as people may be shown it: lines without control characters, none too long.

/// What is kept of a line, in bytes.
const LINE: usize = 4096;

/// Takes control characters out of a line, and the sequences of terminals whole. A carriage return begins the line anew, as on a
/// terminal: of a progress bar its last state is left.
pub fn plain(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim_end_matches('\r');
    let text = text.rsplit('\r').next().unwrap_or_default();
    let (mut kept, mut letters) = (String::with_capacity(text.len().min(LINE)), text.chars());
    while let Some(letter) = letters.next() {
        match letter {
            '\x1b' => skip_sequence(&mut letters),
            '\t' => kept.push(' '),
            letter if letter.is_control() => {}
            letter if kept.len() + letter.len_utf8() > LINE => {
                kept.push('…');
                break;
            }
            letter => kept.push(letter),
        }
    }
    kept
}

/// Skips what belongs to an escape character. Source: ECMA-48, 5.4 and 5.6.
fn skip_sequence(letters: &mut std::str::Chars<'_>) {
    match letters.next() {
        Some('[') => while letters.next().is_some_and(|letter| !('@'..='~').contains(&letter)) {},
        Some(']' | 'P' | '^' | '_' | 'X') => {
            while letters.next().is_some_and(|l| l != '\x07' && l != '\x1b') {}
        }
        _ => {}
    }
}

/// The last `most` lines of an output that are not empty, as one text.
pub fn last_lines(bytes: &[u8], most: usize) -> String {
    let lines: Vec<String> =
        bytes.split(|byte| *byte == b'\n').map(plain).filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(most)..].join("\n")
}

/// Cuts a stream of bytes into lines. What is kept of one that has no end is bounded.
#[derive(Debug, Default)]
pub struct Lines {
    rest: Vec<u8>,
    /// Whether more of the line has come than is kept.
    is_cut: bool,
}

impl Lines {
    /// The lines that end in `bytes`.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut found = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ends) = match piece.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (piece, false),
            };
            // Twice of what is shown: sequences of terminals are in it. Of a line that is drawn again and again its end counts.
            self.rest.extend_from_slice(text);
            if self.rest.len() > 2 * LINE {
                match self.rest.iter().rposition(|byte| *byte == b'\r') {
                    Some(at) if at + 1 < self.rest.len() => drop(self.rest.drain(..=at)),
                    _ => {}
                }
                self.is_cut |= self.rest.len() > 2 * LINE;
                self.rest.truncate(2 * LINE);
            }
            if ends {
                found.extend(self.finish());
            }
        }
        found
    }

    /// The line that has no end, when the stream has.
    pub fn finish(&mut self) -> Option<String> {
        let (rest, is_cut) = (std::mem::take(&mut self.rest), std::mem::take(&mut self.is_cut));
        let mut line = plain(&rest);
        if is_cut && !line.ends_with('…') {
            line.push('…');
        }
        Some(line).filter(|line| !line.trim().is_empty())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_terminals_read_is_taken_out() {
        for (written, shown) in [
            ("plain", "plain"),
            ("\x1b[1;32mgreen\x1b[0m", "green"),
            ("\x1b]0;title\x07text\x1b", "text"),
            (" 10%\r 50%\r100%\r", "100%"),
            ("a\tb\x00\x07\u{9b}c", "a bc"),
        ] {
            assert_eq!(plain(written.as_bytes()), shown, "{written:?}");
        }
        assert_eq!(plain(&[0xff, b'a']), "\u{fffd}a");
    }

    #[test]
    fn lines_are_whole_wherever_they_are_cut() {
        let text = "one\ntwo\r\n\n\x1b[1mthree\x1b[0m\nrest";
        for at in 0..text.len() {
            let mut lines = Lines::default();
            let (a, b) = text.as_bytes().split_at(at);
            let mut found = lines.take(a);
            found.extend(lines.take(b));
            found.extend(lines.finish());
            assert_eq!(found, ["one", "two", "three", "rest"]);
        }
        assert_eq!(last_lines(text.as_bytes(), 2), "three\nrest");
        assert_eq!(last_lines(b"", 2), "");
    }

    #[test]
    fn a_line_without_an_end_is_bounded() {
        let mut lines = Lines::default();
        for _ in 0..100 {
            assert!(lines.take(&[b'x'; 64 << 10]).is_empty());
            assert!(lines.rest.len() <= 2 * LINE);
        }
        let line = lines.take(b"\nnext\n");
        assert_eq!((line[0].chars().count(), line[0].ends_with('…'), &*line[1]), (LINE + 1, true, "next"));
    }

    proptest! {
        #[test]
        fn nothing_that_a_terminal_acts_on_is_left(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut lines = Lines::default();
            for line in lines.take(&bytes).into_iter().chain(lines.finish()) {
                prop_assert!(!line.chars().any(char::is_control));
            }
        }
    }
}
