//! Settings of a host's kernel that cost every start of a virtual machine something.
//!
//! They are the operator's: `kelvin doctor` shows them, `kelvin setup --tune` changes those that can be changed while
//! the host runs. Nothing here outlives a reboot. Source: Linux, Documentation/admin-guide/hw-vuln/multihit,
//! cgroup-v2 (`favordynmods`), RCU's `rcu_expedited`.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

/// One setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Its name.
    pub name: &'static str,
    /// How it is.
    pub found: String,
    /// What it costs as it is; `None` when it is well.
    pub cost: Option<&'static str>,
    change: Option<Change>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Change {
    Write(&'static str, &'static str),
    Remount,
}

const NX: &str = "/sys/module/kvm/parameters/nx_huge_pages";
const EXPEDITED: &str = "/sys/kernel/rcu_expedited";
/// From here on a slot of guest memory that is set after the interrupt controller waits for a grace period.
const WAITS: (u32, u32) = (6, 18);

/// All of them, on this host.
pub fn settings() -> Vec<Setting> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let config = fs::read_to_string(format!("/boot/config-{release}")).unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    vec![
        grace(&release, &config, read(EXPEDITED).as_deref()),
        nx_huge_pages(read(NX).as_deref()),
        favordynmods(&mounts),
    ]
}

/// `major.minor` of a kernel's release.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn grace(release: &str, config: &str, expedited: Option<&str>) -> Setting {
    let hz = config.lines().find_map(|line| line.strip_prefix("CONFIG_HZ=")).unwrap_or("unknown");
    let waits = version(release) >= WAITS && expedited != Some("1") && hz != "1000";
    Setting {
        name: "RCU grace period",
        found: format!("Linux {release}, HZ {hz}, rcu_expedited {}", expedited.unwrap_or("unknown")),
        cost: waits.then_some("each machine waits for grace periods as long as a tick: 7 ms instead of 0.2"),
        change: waits.then_some(Change::Write(EXPEDITED, "1")),
    }
}

fn nx_huge_pages(found: Option<&str>) -> Setting {
    let on = matches!(found, Some("Y" | "1" | "force"));
    Setting {
        name: "nx_huge_pages",
        found: found.unwrap_or("no KVM module").to_owned(),
        cost: on.then_some("each machine starts a recovery thread, and its huge pages are split"),
        change: on.then_some(Change::Write(NX, "never")),
    }
}

fn favordynmods(mounts: &str) -> Setting {
    let options = mounts
        .lines()
        .find(|line| line.split_whitespace().nth(2) == Some("cgroup2"))
        .and_then(|line| line.split_whitespace().nth(3));
    let (found, cost) = match options {
        None => ("no cgroup version 2", None),
        Some(options) if options.split(',').any(|option| option == "favordynmods") => ("on", None),
        Some(_) => ("off", Some("to put a VMM into its control group waits for a grace period")),
    };
    let change = cost.map(|_| Change::Remount);
    Setting { name: "favordynmods", found: found.to_owned(), cost, change }
}

impl Setting {
    /// Changes it, until the next reboot. One that is well stays as it is.
    ///
    /// # Errors
    /// As the kernel gives them; `nx_huge_pages` cannot become `never` while machines run.
    pub fn tune(&self) -> io::Result<()> {
        match &self.change {
            None => Ok(()),
            Some(Change::Write(path, value)) => fs::write(Path::new(path), value),
            Some(Change::Remount) => {
                let status = Command::new("mount")
                    .args(["-o", "remount,favordynmods", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"])
                    .status()?;
                if status.success() { Ok(()) } else { Err(io::Error::other(format!("mount: {status}"))) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cost_are_told() {
        assert!(grace("6.18.3-cloud", "CONFIG_HZ=250\n", Some("0")).cost.is_some());
        for (release, config, expedited) in [
            ("6.17.0", "CONFIG_HZ=250", "0"),
            ("6.18.0", "CONFIG_HZ=1000", "0"),
            ("7.0.1", "CONFIG_HZ=250", "1"),
        ] {
            assert_eq!(grace(release, config, Some(expedited)).cost, None, "{release}");
        }
        assert!(nx_huge_pages(Some("Y")).cost.is_some());
        assert_eq!(nx_huge_pages(Some("never")).cost, None);
        assert!(favordynmods("cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n").cost.is_some());
        assert_eq!(favordynmods("cgroup2 /sys/fs/cgroup cgroup2 rw,favordynmods 0 0\n").cost, None);
        assert_eq!(favordynmods("").found, "no cgroup version 2");
    }
}
