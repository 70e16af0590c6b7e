//! Why a machine ended, in words for its owner: from how its VMM tells it and from what its console showed last.
//!
//! The console is the guest's own: a guest that lies, lies about itself. Source of the lines: Linux,
//! `kernel/panic.c`, `kernel/reboot.c`, `mm/oom_kill.c`.

use crate::{GuestEnd, MachineEnd};

/// What a kernel says when it gives up.
const PANIC: &str = "Kernel panic - not syncing: ";
/// What it says of that when memory is the reason.
const MEMORY: [&str; 2] = ["Out of memory", "System is deadlocked on memory"];
/// What it says when it stops its processors for good, which no VMM tells.
const HALTED: &str = "reboot: System halted";
const POWER_DOWN: &str = "reboot: Power down";
const RESTART: &str = "reboot: Restarting system";
/// Lines of VMMs that mean nothing: a state without a description is what we save.
const HARMLESS: [&str; 2] = ["Expected vmdescription section", "info: QEMU waiting for connection on"];
/// What is told of a line, in characters.
const TOLD: usize = 200;

/// The lines of what a VMM said that tell why something went wrong.
pub(crate) fn telling(said: &str) -> impl Iterator<Item = &str> {
    said.lines().filter(|line| !line.trim().is_empty() && HARMLESS.iter().all(|text| !line.contains(text)))
}

fn shortened(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(TOLD).collect::<String>().trim().to_owned()
}

/// The last of those lines of `console` that end a machine.
fn last_words(console: &str) -> Option<&str> {
    let ends = [PANIC, HALTED, POWER_DOWN, RESTART];
    console.lines().rev().find(|line| ends.iter().any(|end| line.contains(end)))
}

/// Whether the guest has stopped its processors without a word to its VMM: it will never answer again.
pub fn is_halted(console: &str) -> bool {
    last_words(console).is_some_and(|line| line.contains(HALTED))
}

/// Why a machine ended. `console` and `stderr`: the last of each, as far as they are known.
pub fn reason(end: MachineEnd, console: &str, stderr: &str) -> String {
    let line = last_words(console).unwrap_or_default();
    if let Some((_, said)) = line.split_once(PANIC) {
        let said = shortened(said);
        return match MEMORY.iter().any(|text| said.contains(text)) {
            true => format!("the guest ran out of memory: kernel panic: {said}"),
            false => format!("the guest's kernel panicked: {said}"),
        };
    }
    match end {
        MachineEnd::Guest(GuestEnd::Panic) => "the guest's kernel panicked".to_owned(),
        MachineEnd::Guest(GuestEnd::PowerOff) => "the guest shut down".to_owned(),
        _ if line.contains(HALTED) => "the guest halted".to_owned(),
        MachineEnd::Guest(GuestEnd::Reset) => "the guest rebooted, which ends a sandbox".to_owned(),
        MachineEnd::Vmm if line.contains(POWER_DOWN) => "the guest shut down".to_owned(),
        MachineEnd::Vmm if line.contains(RESTART) => "the guest rebooted, which ends a sandbox".to_owned(),
        MachineEnd::Vmm => {
            let said: Vec<String> = telling(stderr).map(shortened).collect();
            match said.as_slice() {
                [] => "its VMM ended without a word: it was killed, or it crashed".to_owned(),
                [.., last] => format!("its VMM ended: {last}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_apart() {
        let vmdescription = "qemu-system-x86_64: Expected vmdescription section, but got 0\n";
        for (end, console, stderr, told) in [
            (MachineEnd::Guest(GuestEnd::PowerOff), "[1] reboot: Power down\n", "", "the guest shut down"),
            (
                MachineEnd::Guest(GuestEnd::Reset),
                "[1] reboot: Restarting system\n",
                "",
                "the guest rebooted, which ends a sandbox",
            ),
            (MachineEnd::Guest(GuestEnd::Reset), "", "", "the guest rebooted, which ends a sandbox"),
            (
                MachineEnd::Guest(GuestEnd::Reset),
                "x\n[ 1.5] Kernel panic - not syncing: sysrq triggered crash\r\n[ 1.6] CPU: 0\n",
                vmdescription,
                "the guest's kernel panicked: sysrq triggered crash",
            ),
            (
                MachineEnd::Vmm,
                "[ 1.5] Kernel panic - not syncing: System is deadlocked on memory\n",
                "",
                "the guest ran out of memory: kernel panic: System is deadlocked on memory",
            ),
            (
                MachineEnd::Vmm,
                "[1] reboot: Restarting system\n",
                "",
                "the guest rebooted, which ends a sandbox",
            ),
            (
                MachineEnd::Vmm,
                "login:\n",
                vmdescription,
                "its VMM ended without a word: it was killed, or it crashed",
            ),
            (
                MachineEnd::Vmm,
                "",
                "qemu: info: QEMU waiting for connection on: disconnected:unix:a\nqemu: fatal: no\n\n",
                "its VMM ended: qemu: fatal: no",
            ),
        ] {
            assert_eq!(reason(end, console, stderr), told, "{end:?} {console:?}");
        }
    }

    #[test]
    fn a_halt_is_the_last_word() {
        assert!(is_halted("[ 9.1] reboot: System halted\n"));
        assert!(!is_halted("echo\n"));
        // Somebody wrote it there before the machine went on to something else.
        assert!(!is_halted("reboot: System halted\nreboot: Restarting system\n"));
    }
}
