//! How long each test takes: read off what the test programs print, kept in `target/test-times.json`.
//!
//! The stable test program tells a test's end and not its time (`--report-time` is for nightly compilers). Two sources
//! are honest all the same:
//!
//! - end-to-end tests say it of themselves (`NAME took 12.3 s`: `Ground` in `crates/e2e/src/ground.rs`);
//! - a test program takes its tests in the order of their names, as many at once as it has threads, and begins the next one
//!   when one has ended. So the moments at which the ends are printed give each beginning: the first ones begin with
//!   the program, number `threads + n` when the n-th has ended. Where output is mixed in and a line is missing, none of
//!   that program is told. Source: `run_tests` in the Rust library's `test` crate.
//!
//! Who writes the file: the run that ends; a run of a part replaces what it has run.

use std::collections::BTreeMap;
use std::io::{PipeReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use crate::{Result, files as fs, root, say};

/// How many of the slowest are shown.
const SHOWN: usize = 10;
/// How often a command that says nothing is looked after.
const LOOK: Duration = Duration::from_millis(200);
/// Parts of the output between who reads and who understands it.
const QUEUE: usize = 64;

/// What test programs have told.
#[derive(Debug, Default)]
pub struct Times {
    /// Seconds, by program and test.
    seconds: BTreeMap<String, f64>,
    /// Tests that were begun.
    pub begun: u64,
}

impl Times {
    /// Runs `command`, whose test programs have `threads` threads; its output goes where ours goes, its errors with it.
    ///
    /// # Errors
    /// When it cannot be started, or fails; what was told until then is kept.
    pub fn run(&mut self, command: &mut Command, threads: usize) -> Result<()> {
        let status = self.watch(command, threads, std::io::stdout())?;
        if status.success() { Ok(()) } else { Err(format!("{}: {status}", crate::shown(command)).into()) }
    }

    fn watch(
        &mut self,
        command: &mut Command,
        threads: usize,
        out: impl Write + Send + 'static,
    ) -> Result<ExitStatus> {
        // One pipe for both: cargo names the program on one, and that tells its tests on the other.
        let (reader, writer) = std::io::pipe().map_err(|error| format!("making a pipe: {error}"))?;
        let other = writer.try_clone().map_err(|error| format!("sharing a pipe: {error}"))?;
        command.stdout(writer).stderr(other);
        let started = crate::spawn(command);
        // Ends for writing that are ours would keep it open.
        command.stdout(Stdio::inherit()).stderr(Stdio::inherit());
        let mut child = started?;
        let (sender, receiver) = mpsc::sync_channel(QUEUE);
        std::thread::spawn(move || forward(reader, out, &sender));
        let (mut told, mut line) = (Reader::new(threads), Vec::new());
        loop {
            match receiver.recv_timeout(LOOK) {
                Ok((now, part)) => {
                    for byte in part {
                        if byte == b'\n' {
                            told.line(&String::from_utf8_lossy(&line), now, self);
                            line.clear();
                        } else {
                            line.push(byte);
                        }
                    }
                }
                // What a failed test has left running may hold the pipe: nobody waits for that.
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(status) = ended_child(&mut child)? {
                        return Ok(status);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Ok(child.wait().map_err(|error| format!("waiting for tests: {error}"))?);
                }
            }
        }
    }

    /// Prints the slowest, and keeps all: `whole`, in place of what was kept.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn keep(&self, whole: bool) -> Result<()> {
        if self.seconds.is_empty() {
            return Ok(());
        }
        let mut slowest: Vec<_> = self.seconds.iter().collect();
        slowest.sort_by(|one, other| other.1.total_cmp(one.1));
        say("the slowest tests:");
        for (name, seconds) in slowest.into_iter().take(SHOWN) {
            say(&format!("{seconds:8.1} s  {name}"));
        }
        let path = path();
        let mut all = BTreeMap::new();
        if !whole && let Ok(text) = fs::read_to_string(&path) {
            all = parsed(&text);
        }
        all.extend(self.seconds.clone());
        fs::create_dir_all(path.parent().unwrap_or(&path))?;
        let fresh = path.with_extension("json.new");
        fs::write(&fresh, written(&all))?;
        Ok(fs::rename(fresh, path)?)
    }
}

/// Passes on what comes, as it comes: a test that hangs is seen by its name.
fn forward(mut reader: PipeReader, mut out: impl Write, sender: &SyncSender<(Instant, Vec<u8>)>) {
    let mut part = vec![0; 64 << 10];
    loop {
        let length = match reader.read(&mut part) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => return,
            Ok(length) => length,
        };
        let now = Instant::now();
        let _ = out.write_all(&part[..length]).and_then(|()| out.flush());
        if sender.send((now, part[..length].to_vec())).is_err() {
            return;
        }
    }
}

fn ended_child(child: &mut Child) -> Result<Option<ExitStatus>> {
    Ok(child.try_wait().map_err(|error| format!("waiting for tests: {error}"))?)
}

/// As many threads as test programs have unless they are told.
pub fn threads() -> usize {
    let told = std::env::var("RUST_TEST_THREADS").ok().and_then(|text| text.parse().ok());
    told.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}

fn path() -> PathBuf {
    root().join("target/test-times.json")
}

/// An object with a number for each name, a line each.
fn written(times: &BTreeMap<String, f64>) -> String {
    let escaped = |name: &str| name.replace('\\', "\\\\").replace('"', "\\\"");
    let lines: Vec<_> =
        times.iter().map(|(name, seconds)| format!("  \"{}\": {seconds:.3}", escaped(name))).collect();
    format!("{{\n{}\n}}\n", lines.join(",\n"))
}

/// What [`written`] wrote; a line that it did not write is left out.
fn parsed(text: &str) -> BTreeMap<String, f64> {
    let line = |line: &str| {
        let (name, seconds) = line.trim().trim_end_matches(',').rsplit_once("\": ")?;
        let name = name.strip_prefix('"')?.replace("\\\"", "\"").replace("\\\\", "\\");
        Some((name, seconds.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// Follows the output of test programs.
struct Reader {
    threads: usize,
    /// Whose tests are told.
    program: String,
    begun: Option<Instant>,
    /// How many it has said that it runs.
    expected: usize,
    /// Names, as they ended.
    ended: Vec<(String, Instant)>,
}

impl Reader {
    fn new(threads: usize) -> Self {
        let program = String::new();
        Self { threads: threads.max(1), program, begun: None, expected: 0, ended: Vec::new() }
    }

    fn line(&mut self, line: &str, now: Instant, times: &mut Times) {
        if let Some(program) = program_of(line) {
            self.program = program;
        } else if let Some(count) = line.strip_prefix("running ").and_then(|rest| rest.split_once(" test")) {
            self.expected = count.0.parse().unwrap_or(0);
            (self.begun, self.ended) = (Some(now), Vec::new());
            times.begun += self.expected as u64;
        } else if let Some((name, seconds)) = own_time(line) {
            times.seconds.insert(name, seconds);
        } else if line.starts_with("test result: ") {
            self.tell(times);
        } else if let Some(name) = ended(line) {
            self.ended.push((name, now));
        }
    }

    /// The program has ended.
    fn tell(&mut self, times: &mut Times) {
        let (Some(begun), ends) = (self.begun.take(), std::mem::take(&mut self.ended)) else { return };
        if ends.len() != self.expected {
            return;
        }
        let moments: Vec<Instant> = ends.iter().map(|(_, end)| *end).collect();
        let mut order: Vec<usize> = (0..ends.len()).collect();
        order.sort_by(|one, other| ends[*one].0.cmp(&ends[*other].0));
        for (place, index) in order.into_iter().enumerate() {
            let began = place.checked_sub(self.threads).map_or(begun, |before| moments[before]);
            let (name, end) = &ends[index];
            let seconds = end.saturating_duration_since(began).as_secs_f64();
            // Those of end-to-end tests are their own.
            if !name.starts_with("e2e::") {
                times.seconds.insert(format!("{} {name}", self.program).trim_start().to_owned(), seconds);
            }
        }
    }
}

/// The program that cargo says it runs now: `Running unittests src/lib.rs (target/…/kelvin_api-0123)`, `Doc-tests kelvin_api`.
fn program_of(line: &str) -> Option<String> {
    let line = line.trim_start();
    if let Some(package) = line.strip_prefix("Doc-tests ") {
        return Some(format!("{package} (documentation)"));
    }
    let path = line.strip_prefix("Running ")?.strip_suffix(')')?.rsplit_once('(')?.1;
    let name = path.rsplit('/').next()?;
    Some(name.rsplit_once('-').map_or(name, |(name, _hash)| name).to_owned())
}

/// Whose end a line tells: `test NAME ... ok`.
fn ended(line: &str) -> Option<String> {
    let (name, how) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    let is_end = how == "ok" || how == "FAILED" || how.starts_with("ignored");
    is_end.then(|| name.trim_end_matches(" - should panic").to_owned())
}

/// What an end-to-end test says of itself, behind whatever stands before it on the line.
fn own_time(line: &str) -> Option<(String, f64)> {
    let (before, seconds) = line.strip_suffix(" s")?.rsplit_once(" took ")?;
    let name = before.get(before.rfind("e2e::")?..)?;
    let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_:".contains(&byte));
    Some((is_name.then(|| name.to_owned())?, seconds.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `lines`, each with its moment in milliseconds, come to.
    fn read(threads: usize, lines: &[(u64, &str)]) -> Times {
        let (began, mut reader, mut times) = (Instant::now(), Reader::new(threads), Times::default());
        for (ms, line) in lines {
            reader.line(line, began + Duration::from_millis(*ms), &mut times);
        }
        times
    }

    #[test]
    fn the_order_of_ends_gives_each_test_its_time() {
        let running = "     Running unittests src/lib.rs (target/release/deps/kelvin_api-0123abcd)";
        let one = read(
            1,
            &[
                (0, running),
                (100, "running 2 tests"),
                (400, "test a::b ... ok"),
                (1100, "test c ... FAILED"),
                (1100, "test result: FAILED. 1 passed"),
            ],
        );
        assert_eq!(
            (one.begun, &one.seconds["kelvin_api a::b"], &one.seconds["kelvin_api c"]),
            (2, &0.3, &0.7)
        );
        // Two at once: c begins when b has ended, d when a has.
        let two = read(
            2,
            &[
                (0, running),
                (0, "running 4 tests"),
                (200, "test b ... ok"),
                (500, "test a ... ok"),
                (900, "test d - should panic ... ok"),
                (1000, "test c ... ok"),
                (1000, "test result: ok."),
            ],
        );
        let all: Vec<_> = two.seconds.iter().map(|(name, s)| (name.as_str(), (s * 10.0).round())).collect();
        let names = ["kelvin_api a", "kelvin_api b", "kelvin_api c", "kelvin_api d"];
        assert_eq!(all, names.into_iter().zip([5.0, 2.0, 8.0, 4.0]).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_not_known_is_not_told() {
        let mixed = read(
            2,
            &[
                (0, "running 2 tests"),
                (5, "test a ... printed"),
                (9, "test b ... ok"),
                (9, "test result: ok."),
            ],
        );
        assert!(mixed.seconds.is_empty() && mixed.begun == 2, "{mixed:?}");
        let own = read(
            2,
            &[
                (0, "running 1 test"),
                (1, "test e2e::speed::x ... clone, try 1e2e::speed::x took 12.5 s"),
                (2, "ok"),
                (3, "e2e::z: 1 MiB took 3 s"),
            ],
        );
        assert_eq!(own.seconds, BTreeMap::from([("e2e::speed::x".to_owned(), 12.5)]));
    }

    #[test]
    fn a_program_is_watched_to_its_end_and_not_longer() {
        let mut times = Times::default();
        let script = "echo 'running 1 test'; sleep 30 & echo 'test a ... ok'; echo 'test result: ok'; exit 3";
        let began = Instant::now();
        // Said to nobody: whoever watches this program would take it for its own.
        let status = times.watch(Command::new("sh").args(["-c", script]), 1, std::io::sink()).unwrap();
        assert_eq!(status.code(), Some(3));
        assert!(began.elapsed() < Duration::from_secs(20), "it waited for what was left");
        assert!(times.seconds.contains_key("a"), "{times:?}");
    }

    #[test]
    fn what_was_kept_is_read_again() {
        let times = BTreeMap::from([("a \"b\" \\c".to_owned(), 1.5), ("d: e".to_owned(), 0.125)]);
        assert_eq!(parsed(&written(&times)), times);
        assert!(parsed("{\n}\n").is_empty());
    }
}
