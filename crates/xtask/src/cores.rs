//! Processors that this process may use.

use crate::{Result, files as fs};

/// The cores that this process may use, at least one.
pub fn cores() -> Result<Vec<String>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    let cores = listed(allowed.unwrap_or_default());
    if cores.is_empty() { Err("no core is allowed".into()) } else { Ok(cores) }
}

/// The numbers of a list of the kernel's: `0-2,5`.
fn listed(list: &str) -> Vec<String> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<u32>().ok()?..=last.parse().ok()?)
    };
    list.trim().split(',').filter_map(range).flatten().map(|core| core.to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_read_as_the_kernel_lists_them() {
        assert_eq!(listed("\t0-1\n"), ["0", "1"]);
        assert_eq!(listed("3,5-6"), ["3", "5", "6"]);
        assert!(listed("").is_empty());
        assert!(!cores().unwrap().is_empty());
    }
}
