//! Which accelerator a VMM can use here.
//!
//! Opening `/dev/kvm` proves nothing: page-table hypervisors offer the device and cannot run an
//! unmodified guest. KVM counts as usable when the processor says that it virtualises *and* the device
//! opens.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How guest instructions are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

impl FromStr for Accelerator {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            other => Err(format!("unknown accelerator {other:?}: kvm or tcg")),
        }
    }
}

/// What was found, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The accelerator to use.
    pub accelerator: Accelerator,
    /// One sentence for `kelvin doctor`.
    pub reason: String,
}

/// Looks at this host.
pub fn detect() -> Finding {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let opens =
        std::fs::File::options().read(true).write(true).open("/dev/kvm").map_err(|error| error.to_string());
    decide(&cpuinfo, opens.map(drop))
}

fn decide(cpuinfo: &str, kvm_opens: Result<(), String>) -> Finding {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let flag = ["vmx", "svm"].into_iter().find(|flag| flags.split_whitespace().any(|word| word == *flag));
    let (accelerator, reason) = match (flag, kvm_opens) {
        (Some(flag), Ok(())) => (Accelerator::Kvm, format!("the processor has {flag} and /dev/kvm opens")),
        (Some(flag), Err(error)) => {
            (Accelerator::Tcg, format!("the processor has {flag}, but /dev/kvm does not open: {error}"))
        }
        (None, Ok(())) => (
            Accelerator::Tcg,
            "/dev/kvm opens, but the processor shows neither vmx nor svm: it cannot run an unmodified guest"
                .to_owned(),
        ),
        (None, Err(_)) => (
            Accelerator::Tcg,
            "the processor shows neither vmx nor svm and there is no usable /dev/kvm".to_owned(),
        ),
    };
    Finding { accelerator, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_device_alone_is_not_kvm() {
        assert_eq!(decide("flags\t: fpu sse\n", Ok(())).accelerator, Accelerator::Tcg);
        assert_eq!(decide("flags\t: fpu vmx_other\n", Ok(())).accelerator, Accelerator::Tcg);
        assert_eq!(decide("flags\t: fpu vmx\n", Ok(())).accelerator, Accelerator::Kvm);
        assert_eq!(decide("flags\t: fpu svm\n", Err("denied".into())).accelerator, Accelerator::Tcg);
    }
}
