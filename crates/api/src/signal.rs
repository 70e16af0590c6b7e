//! Signals by the words in which envd tells them, which are those of Go's library: clients compare them.

/// Numbers of Linux on x86-64. Source: signal(7), Go's `syscall.Signal.String`.
const WORDS: [(i32, &str); 15] = [
    (1, "hangup"),
    (2, "interrupt"),
    (3, "quit"),
    (4, "illegal instruction"),
    (5, "trace/breakpoint trap"),
    (6, "aborted"),
    (7, "bus error"),
    (8, "floating point exception"),
    (9, "killed"),
    (10, "user defined signal 1"),
    (11, "segmentation fault"),
    (12, "user defined signal 2"),
    (13, "broken pipe"),
    (14, "alarm clock"),
    (15, "terminated"),
];

/// What stands before the words of a signal in the status of a process.
const PREFIX: &str = "signal: ";
/// What stands behind them when it left its memory in a file.
const DUMPED: &str = " (core dumped)";

/// The status of a process that `signal` has ended.
pub fn status(signal: i32, dumped: bool) -> String {
    let words = WORDS.iter().find(|(number, _)| *number == signal);
    let words = words.map_or_else(|| format!("signal {signal}"), |(_, words)| (*words).to_owned());
    format!("{PREFIX}{words}{}", if dumped { DUMPED } else { "" })
}

/// The signal that has ended a process, when its status says that one did. An agent of an older build says the number.
pub fn of_status(status: &str) -> Option<i32> {
    let words = status.strip_prefix(PREFIX)?;
    let words = words.strip_suffix(DUMPED).unwrap_or(words);
    let known = WORDS.iter().find(|(_, known)| *known == words).map(|(number, _)| *number);
    known.or_else(|| words.strip_prefix("signal ").unwrap_or(words).parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_comes_back() {
        for signal in 1..=64 {
            for dumped in [false, true] {
                assert_eq!(of_status(&status(signal, dumped)), Some(signal));
            }
        }
        assert_eq!(status(9, false), "signal: killed");
        assert_eq!(status(11, true), "signal: segmentation fault (core dumped)");
        assert_eq!(status(35, false), "signal: signal 35");
        assert_eq!(of_status("signal: 9"), Some(9));
        assert_eq!(of_status("exit status 9"), None);
    }
}
