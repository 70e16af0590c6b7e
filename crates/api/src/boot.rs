//! The stages of a guest's boot, as its console tells them: a line that the agent writes and people's tools read.
//!
//! The console is the guest's own: a guest that lies, lies about itself. Times are the guest's, from when its kernel's clock
//! began; what a VMM and its firmware did before is in no stage.

use std::time::Duration;

/// What the line begins with.
const BEGINNING: &str = "init: boot in ms: ";
/// The longest stage that is believed, in milliseconds.
const MOST_MS: f64 = 86_400_000.0;

/// How long each stage lasted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BootStages {
    /// The kernel's, until init began.
    pub kernel: Duration,
    /// Of mounting what a kernel shows, loading modules, and finding and mounting the root disk.
    pub root_disk: Duration,
    /// The rest of init.
    pub init: Duration,
    /// Of configuring the network.
    pub network: Duration,
    /// The agent's, until it could answer.
    pub agent: Duration,
}

impl BootStages {
    /// Names and milliseconds, in the order in which they happen but for the network, which is a part of init.
    pub fn iter(self) -> impl Iterator<Item = (&'static str, f64)> {
        let Self { kernel, root_disk, init, network, agent } = self;
        let all = [
            ("kernel", kernel),
            ("root disk", root_disk),
            ("init", init),
            ("network", network),
            ("agent", agent),
        ];
        all.into_iter().map(|(name, stage)| (name, stage.as_secs_f64() * 1e3))
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
        let mut stage = |name: &str| {
            let ms: f64 = parts.next()?.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()?;
            (0.0..MOST_MS).contains(&ms).then(|| Duration::from_secs_f64(ms / 1e3))
        };
        let found = Self {
            kernel: stage("kernel")?,
            root_disk: stage("root disk")?,
            init: stage("init")?,
            network: stage("network")?,
            agent: stage("agent")?,
        };
        parts.next().is_none().then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stages() -> BootStages {
        let ms = Duration::from_millis;
        let init = Duration::from_micros(12_340);
        BootStages { kernel: ms(812), root_disk: ms(35), init, network: ms(2), agent: ms(41) }
    }

    #[test]
    fn a_line_says_what_it_was_made_of() {
        let line = stages().line();
        assert_eq!(
            line,
            "init: boot in ms: kernel 812.0, root disk 35.0, init 12.3, network 2.0, agent 41.0"
        );
        // The agent of a machine that was told twice; the last counts.
        let former = BootStages::default().line();
        let console = format!("[ 0.1] x\r\n{former}\r\n{line}\r\nlogin:\n");
        assert_eq!(BootStages::find(console.lines()).unwrap().line(), line);
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
