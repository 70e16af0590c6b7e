//! Which Firecracker it is, and what that one understands: unknown fields are refused by it, so each is gated.

use std::fmt;

/// A version, as `firecracker --version` prints it: a build between two releases is the next one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Major, minor, patch.
    pub numbers: (u32, u32, u32),
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor, patch) = self.numbers;
        write!(f, "{major}.{minor}.{patch}")
    }
}

/// The oldest that is used. 1.16.0 leaves vsock dead after a restore. Source: Firecracker, CHANGELOG.md, 1.16.1.
pub const MINIMUM: Version = Version { numbers: (1, 16, 1) };

impl Version {
    /// Reads what `firecracker --version` prints. Example: `Firecracker v1.16.1`.
    pub fn parse(text: &str) -> Option<Self> {
        let word = text.lines().next()?.strip_prefix("Firecracker v")?.split_whitespace().next()?;
        let numbers = word.split(['-', '+']).next()?;
        let mut parts = numbers.split('.').map(|part| part.parse::<u32>().ok());
        let found = (parts.next()??, parts.next()??, parts.next()??);
        parts.next().is_none().then_some(Self { numbers: found })
    }

    /// Whether it can be used.
    ///
    /// # Errors
    /// In words, why not.
    pub fn check(self) -> Result<(), String> {
        if self < MINIMUM {
            return Err(format!(
                "version {self} is older than {MINIMUM}: before it, vsock is dead after a restore"
            ));
        }
        Ok(())
    }

    fn is(self, major: u32, minor: u32) -> bool {
        self.numbers >= (major, minor, 0)
    }

    /// `huge_pages` of `PUT /snapshot/load`, and its value `Transparent`.
    pub fn has_huge_pages_at_load(self) -> bool {
        self.is(1, 17)
    }

    /// Whether vsock outlives a pause without a snapshot. Before, the device waits for the guest to acknowledge a
    /// reset that nobody sent. Source: Firecracker, pull request 6100.
    pub fn keeps_vsock_over_a_pause(self) -> bool {
        self.is(1, 17)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_gated() {
        let read = |text| Version::parse(text).unwrap();
        let old = read("Firecracker v1.15.1\n\nmore");
        assert!(old.check().unwrap_err().contains("1.15.1 is older than 1.16.1"));
        assert!(read("Firecracker v1.16.0").check().is_err());
        let minimum = read("Firecracker v1.16.1\n");
        assert!(minimum.check().is_ok() && !minimum.has_huge_pages_at_load());
        let next = read("Firecracker v1.17.0-dev");
        assert!(next.has_huge_pages_at_load() && next.keeps_vsock_over_a_pause());
        for bad in
            ["", "Firecracker", "Firecracker v1.16", "Firecracker v1.16.x", "QEMU emulator version 7.2"]
        {
            assert_eq!(Version::parse(bad), None, "{bad}");
        }
    }
}
