//! What is said to Firecracker: one function for each command, each field of every command here and nowhere else.
//!
//! Source: Firecracker, `src/firecracker/swagger/firecracker.yaml`. Paths are the jail's.

use std::num::NonZeroU32;
use std::path::Path;
use std::str::FromStr;

use http::Method;
use kelvin_api::units::Shape;
use serde_json::{Value, json};

use super::version::Version;

/// Where things are in a jail.
pub const DISK: &str = "disk";
/// The API's socket.
pub const API_SOCKET: &str = "run/api.sock";
/// The vsock device's socket.
pub const VSOCK: &str = "run/vsock.sock";
/// The guest's directory, while it boots.
pub const GUEST: &str = "guest";
/// The snapshot's directory, for a clone.
pub const SNAPSHOT: &str = "snapshot";
/// The path of the command that takes a snapshot.
pub const SNAPSHOT_CREATE: &str = "/snapshot/create";
/// The address of every guest on its vsock.
const GUEST_CID: u32 = 3;

/// A request.
#[derive(Debug, Clone)]
pub struct Call {
    /// For errors.
    pub name: &'static str,
    /// Method.
    pub method: Method,
    /// Path.
    pub path: &'static str,
    /// Body.
    pub body: Value,
}

fn put(name: &'static str, path: &'static str, body: Value) -> Call {
    Call { name, method: Method::PUT, path, body }
}

/// How the guest's memory is backed; part of every identity.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Pages of 4 KiB.
    #[default]
    None,
    /// Whatever the kernel finds, with `madvise`. From 1.17 on.
    Transparent,
}

impl FromStr for HugePages {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "transparent" => Ok(Self::Transparent),
            // Firecracker restores them through a page fault handler alone, never from a file.
            "2M" | "2m" => {
                Err("huge pages of 2M cannot be restored from a file: transparent or none".to_owned())
            }
            other => Err(format!("unknown huge pages {other:?}: none or transparent")),
        }
    }
}

/// What an operator can choose.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// Part of every identity.
    pub huge_pages: HugePages,
    /// A static CPU template of Firecracker's, which hides what differs between hosts; part of every identity.
    pub cpu_template: Option<String>,
    /// Bytes per second to and from one machine's disk.
    pub disk_bytes_per_s: Option<u64>,
    /// The same in operations.
    pub disk_ops_per_s: Option<NonZeroU32>,
    /// Whether a restored machine's monotonic clock has gone on while it was frozen. Its wall clock is right in any
    /// case.
    pub clock_goes_on: bool,
}

/// Static CPU templates of x86-64. Source: Firecracker, `docs/cpu_templates/cpu-templates.md`.
const CPU_TEMPLATES: [&str; 5] = ["C3", "T2", "T2S", "T2CL", "T2A"];

impl Options {
    /// Whether `version` can do what is wanted.
    ///
    /// # Errors
    /// In words, what it cannot.
    pub fn check(&self, version: Version) -> Result<(), String> {
        if self.huge_pages == HugePages::Transparent && !version.has_huge_pages_at_load() {
            return Err(format!("version {version} has no transparent huge pages: 1.17 has"));
        }
        match &self.cpu_template {
            Some(name) if !CPU_TEMPLATES.contains(&name.as_str()) => {
                Err(format!("unknown CPU template {name:?}: {}", CPU_TEMPLATES.join(", ")))
            }
            _ => Ok(()),
        }
    }
}

/// `PUT /machine-config`.
pub fn machine(shape: Shape, options: &Options) -> Call {
    let mut body = json!({
        "vcpu_count": shape.vcpus,
        "mem_size_mib": shape.memory_mib.0,
        "smt": false,
        "track_dirty_pages": false,
    });
    if options.huge_pages == HugePages::Transparent {
        body["huge_pages"] = json!("Transparent");
    }
    if let Some(name) = &options.cpu_template {
        body["cpu_template"] = json!(name);
    }
    put("PUT /machine-config", "/machine-config", body)
}

/// `PUT /boot-source`.
pub fn boot_source(command_line: &str) -> Call {
    let body = json!({
        "kernel_image_path": format!("{GUEST}/{}", super::kernel::NAME),
        "initrd_path": format!("{GUEST}/initrd"),
        "boot_args": command_line,
    });
    put("PUT /boot-source", "/boot-source", body)
}

/// `PUT /drives/root`.
pub fn drive(options: &Options) -> Call {
    let mut body = json!({
        "drive_id": "root",
        "path_on_host": DISK,
        "is_root_device": false,
        "is_read_only": false,
        // Writeback: a guest's flush reaches the file, as the disk that it sees promises.
        "cache_type": "Writeback",
        "io_engine": "Sync",
    });
    if let Some(limiter) = disk_limiter(options) {
        body["rate_limiter"] = limiter;
    }
    put("PUT /drives/root", "/drives/root", body)
}

/// Both buckets of a drive, or none when nothing is limited.
fn disk_limiter(options: &Options) -> Option<Value> {
    // Refilled once a second: what a second may have.
    let bucket = |size: u64| json!({ "size": size, "refill_time": 1000 });
    let mut limiter = json!({});
    if let Some(bytes) = options.disk_bytes_per_s {
        limiter["bandwidth"] = bucket(bytes);
    }
    if let Some(ops) = options.disk_ops_per_s {
        limiter["ops"] = bucket(u64::from(ops.get()));
    }
    limiter.as_object().is_some_and(|limiter| !limiter.is_empty()).then_some(limiter)
}

/// `PATCH /drives/root`: the limits of this machine instead of those that were baked. A bucket of no size is none.
pub fn patch_drive(options: &Options) -> Call {
    let none = json!({ "size": 0, "refill_time": 0 });
    let mut limiter = json!({ "bandwidth": none, "ops": none });
    if let Some(Value::Object(wanted)) = disk_limiter(options) {
        for (name, bucket) in wanted {
            limiter[name] = bucket;
        }
    }
    Call {
        name: "PATCH /drives/root",
        method: Method::PATCH,
        path: "/drives/root",
        body: json!({ "drive_id": "root", "rate_limiter": limiter }),
    }
}

/// `PUT /network-interfaces/net`.
pub fn network() -> Call {
    let body = json!({ "iface_id": "net", "guest_mac": mac(), "host_dev_name": kelvin_host::net::TAP });
    put("PUT /network-interfaces/net", "/network-interfaces/net", body)
}

fn mac() -> String {
    kelvin_host::net::GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":")
}

/// `PUT /vsock`.
pub fn vsock() -> Call {
    put("PUT /vsock", "/vsock", json!({ "guest_cid": GUEST_CID, "uds_path": VSOCK }))
}

/// `PUT /entropy`.
pub fn entropy() -> Call {
    put("PUT /entropy", "/entropy", json!({}))
}

/// `PUT /actions`: starts the vCPUs.
pub fn start() -> Call {
    put("PUT /actions InstanceStart", "/actions", json!({ "action_type": "InstanceStart" }))
}

fn state(name: &'static str, state: &str) -> Call {
    Call { name, method: Method::PATCH, path: "/vm", body: json!({ "state": state }) }
}

/// `PATCH /vm`: stops the vCPUs.
pub fn pause() -> Call {
    state("PATCH /vm Paused", "Paused")
}

/// `PATCH /vm`: starts them again.
pub fn resume() -> Call {
    state("PATCH /vm Resumed", "Resumed")
}

/// `GET /`: what it is and does.
pub fn instance() -> Call {
    Call { name: "GET /", method: Method::GET, path: "/", body: Value::Null }
}

/// `PUT /snapshot/create`. `diff`: only the pages that were written since it was loaded or since the last one; they
/// are laid over what the file at `memory` holds.
pub fn create_snapshot(memory: &Path, state: &Path, diff: bool) -> Call {
    let body = json!({
        "snapshot_type": if diff { "Diff" } else { "Full" },
        "snapshot_path": state,
        "mem_file_path": memory,
    });
    put("PUT /snapshot/create", SNAPSHOT_CREATE, body)
}

/// `PUT /snapshot/load`; vCPUs stay stopped.
pub fn load_snapshot(state: &Path, network: bool, options: &Options, version: Version) -> Call {
    let mut body = json!({
        "snapshot_path": state,
        "mem_backend": { "backend_type": "File", "backend_path": format!("{SNAPSHOT}/memory") },
        // What a later snapshot of this machine costs follows the pages that it writes.
        "track_dirty_pages": true,
        // Never before its files are known to be its own.
        "resume_vm": false,
        "vsock_override": { "uds_path": VSOCK },
        "clock_realtime": options.clock_goes_on,
    });
    if network {
        body["network_overrides"] = json!([{ "iface_id": "net", "host_dev_name": kelvin_host::net::TAP }]);
    }
    if version.has_huge_pages_at_load() {
        let name = match options.huge_pages {
            HugePages::None => "None",
            HugePages::Transparent => "Transparent",
        };
        body["huge_pages"] = json!(name);
    }
    put("PUT /snapshot/load", "/snapshot/load", body)
}

/// Every command that configures a machine to boot, in order: also the layout that a snapshot has baked in.
pub fn boot(shape: Shape, with_network: bool, command_line: &str, options: &Options) -> Vec<Call> {
    let mut calls = vec![machine(shape, options), boot_source(command_line), drive(options)];
    calls.extend(with_network.then(network));
    calls.extend([vsock(), entropy()]);
    calls
}
