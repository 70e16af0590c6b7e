//! The stages of a guest's boot, as its console tells them: a line that the agent writes and people's tools read.
//!
//! The console is the guest's own: a guest that lies, lies about itself. Times are the guest's, from when its kernel's clock
//! began; what a VMM and its firmware did before is in no stage.

use std::time::Duration;

/// What the line begins with.
const BEGINNING: &str = "init: boot in ms: ";
/// The stages, in their order.
const NAMES: [&str; 5] = ["kernel", "root disk", "init", "network", "agent"];
/// The longest stage that is believed, in milliseconds.
const MOST_MS: f64 = 86_400_000.0;

/// How long each stage lasted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BootStages([f64; NAMES.len()]);

impl BootStages {
    /// Of the kernel until init began; then of finding and mounting the root disk, modules included, of configuring the
    /// network, of the rest of init, and of the agent until it could answer.
    pub fn new(
        kernel: Duration,
        root_disk: Duration,
        init: Duration,
        network: Duration,
        agent: Duration,
    ) -> Self {
        Self([kernel, root_disk, init, network, agent].map(|stage| stage.as_secs_f64() * 1e3))
    }

    /// Names and milliseconds, in order.
    pub fn iter(self) -> impl Iterator<Item = (&'static str, f64)> {
        NAMES.into_iter().zip(self.0)
    }

    /// The line, without its end.
    pub fn line(self) -> String {
        let stages: Vec<String> = self.iter().map(|(name, ms)| format!("{name} {ms:.1}")).collect();
        format!("{BEGINNING}{}", stages.join(", "))
    }

    /// What the last such line of a console says; none when there is none, or when it is odd.
    pub fn find<'a>(lines: impl DoubleEndedIterator<Item = &'a str>) -> Option<Self> {
        let rest = lines.rev().find_map(|line| line.trim_end().strip_prefix(BEGINNING))?;
        let mut parts = rest.split(", ");
        let mut stages = [0.0; NAMES.len()];
        for (name, stage) in NAMES.into_iter().zip(&mut stages) {
            let ms: f64 = parts.next()?.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()?;
            *stage = Some(ms).filter(|ms| (0.0..MOST_MS).contains(ms))?;
        }
        parts.next().is_none().then_some(Self(stages))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stages() -> BootStages {
        let ms = Duration::from_millis;
        BootStages::new(ms(812), ms(35), Duration::from_micros(12_340), ms(2), ms(41))
    }

    #[test]
    fn a_line_says_what_it_was_made_of() {
        let line = stages().line();
        assert_eq!(
            line,
            "init: boot in ms: kernel 812.0, root disk 35.0, init 12.3, network 2.0, agent 41.0"
        );
        let console = format!("[ 0.1] x\r\n{line}\r\nlogin:\n");
        let found: Vec<_> = BootStages::find(console.lines()).unwrap().iter().collect();
        assert_eq!(found[1..3], [("root disk", 35.0), ("init", 12.3)]);
    }

    #[test]
    fn odd_lines_are_none() {
        let line = stages().line();
        for odd in [
            String::new(),
            line.replace("init: boot", "boot"),
            line.replace("812.0", "NaN"),
            line.replace("812.0", "inf"),
            line.replace("812.0", "-1"),
            line.replace("812.0", "1e300"),
            line.replace(", agent 41.0", ""),
            format!("{line}, more 1.0"),
        ] {
            assert_eq!(BootStages::find(odd.lines()), None, "{odd}");
        }
    }

    proptest! {
        #[test]
        fn whatever_a_guest_says_is_read_without_a_panic(text in ".{0,200}") {
            let _ = BootStages::find(format!("{BEGINNING}{text}").lines());
        }
    }
}
