//! Which distribution this machine has, and what things are called there.
//!
//! | | Debian 12, 13 | Ubuntu 24.04, 26.04 | Ubuntu 22.04 |
//! |---|---|---|---|
//! | run by CI | yes | no | no |
//! | kernel of the guest | `linux-image-cloud-amd64` | `linux-image-virtual` | the same |
//! | its modules | plain, `.ko.xz` | `.ko.zst`, in `linux-modules-*` | the same |
//! | QEMU | 7.2, 10.0 | 8.2 and newer | 6.2: too old |

use std::fmt;

use crate::{Result, files as fs};

/// Which family: what packages are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Debian itself.
    Debian,
    /// Ubuntu.
    Ubuntu,
}

/// One release of a distribution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Distribution {
    /// As in `ID`: `debian`.
    pub id: String,
    /// As in `VERSION_ID`: `12`; empty where there is none (Debian's testing).
    pub version: String,
    /// As in `VERSION_CODENAME`: `bookworm`.
    pub codename: String,
}

/// What is known of a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// CI runs everything on it.
    Tested,
    /// It should work; nobody has tried.
    Untested,
    /// Its QEMU is older than 7.2.
    OldQemu,
    /// Not looked at.
    Unknown,
}

impl Distribution {
    /// Reads the text of an `os-release` file. Source: os-release(5).
    pub fn parse(text: &str) -> Self {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            line.unwrap_or_default().trim_matches(['"', '\'']).to_owned()
        };
        Self { id: field("ID"), version: field("VERSION_ID"), codename: field("VERSION_CODENAME") }
    }

    /// This machine's.
    pub fn here() -> Result<Self> {
        Ok(Self::parse(&fs::read_to_string("/etc/os-release")?))
    }

    /// What packages are called here.
    pub fn family(&self) -> Family {
        if self.id == "ubuntu" { Family::Ubuntu } else { Family::Debian }
    }

    /// What is known of it.
    pub fn support(&self) -> Support {
        match (self.id.as_str(), self.version.as_str()) {
            ("debian", "12" | "13") => Support::Tested,
            ("ubuntu", "24.04" | "26.04") => Support::Untested,
            ("ubuntu", "22.04") => Support::OldQemu,
            _ => Support::Unknown,
        }
    }
}

impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = if self.version.is_empty() { &self.codename } else { &self.version };
        write!(f, "{} {version}", if self.id.is_empty() { "an unnamed distribution" } else { &self.id })
    }
}

impl Family {
    /// The origin of its sources, as apt names it.
    pub fn origin(self) -> &'static str {
        match self {
            Self::Debian => "Debian",
            Self::Ubuntu => "Ubuntu",
        }
    }

    /// The package whose keys its sources are signed with.
    pub fn keyring(self) -> &'static str {
        match self {
            Self::Debian => "debian-archive-keyring",
            Self::Ubuntu => "ubuntu-keyring",
        }
    }

    /// The kernel of guests, a meta package.
    pub fn guest_kernel(self) -> &'static str {
        match self {
            Self::Debian => "linux-image-cloud-amd64",
            Self::Ubuntu => "linux-image-virtual",
        }
    }

    /// The kernel of the emulated KVM host, a meta package: more drivers.
    pub fn host_kernel(self) -> &'static str {
        match self {
            Self::Debian => "linux-image-amd64",
            Self::Ubuntu => "linux-image-generic",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_told_apart() {
        let of = |id: &str, version: &str| Distribution {
            id: id.to_owned(),
            version: version.to_owned(),
            codename: "name".to_owned(),
        };
        let read = "PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\nNAME=\"Debian GNU/Linux\"\nVERSION_ID=\"13\"\n\
                    VERSION_CODENAME=trixie\nID=debian\n";
        let read = Distribution::parse(read);
        assert_eq!((read.to_string().as_str(), read.codename.as_str()), ("debian 13", "trixie"));
        for (id, version, family, support) in [
            ("debian", "12", Family::Debian, Support::Tested),
            ("debian", "13", Family::Debian, Support::Tested),
            ("debian", "11", Family::Debian, Support::Unknown),
            ("debian", "", Family::Debian, Support::Unknown),
            ("ubuntu", "22.04", Family::Ubuntu, Support::OldQemu),
            ("ubuntu", "24.04", Family::Ubuntu, Support::Untested),
            ("ubuntu", "26.04", Family::Ubuntu, Support::Untested),
            ("fedora", "44", Family::Debian, Support::Unknown),
        ] {
            let found = of(id, version);
            assert_eq!((found.family(), found.support()), (family, support), "{found}");
        }
    }
}
