//! What people and programs see: tables, JSON, errors, progress.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kelvin_api::boot::BootStages;
use kelvin_api::error::{Failure, chain};
use kelvin_api::network::{NetworkState, Traffic};
use kelvin_api::phase::Phase;
use kelvin_api::sandbox::{NodeInfo, OnTimeout, PoolInfo, SandboxDetail, SandboxState};
use kelvin_client::Error;
use serde::Serialize;

use crate::args::Output;

/// An error with what can be done about it.
#[derive(Debug)]
pub struct Failed {
    message: String,
    remediation: Option<String>,
    /// What the program ends with.
    code: u8,
}

impl Failed {
    /// With a remedy.
    pub fn new(message: String, remediation: &str) -> Self {
        Self { message, remediation: Some(remediation.to_owned()), code: 1 }
    }

    /// Without one.
    pub fn other(error: &dyn std::error::Error) -> Self {
        Self { message: chain(error), remediation: None, code: 1 }
    }

    /// With another exit code than 1.
    pub fn with_code(self, code: u8) -> Self {
        Self { code, ..self }
    }

    /// What went wrong.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What the program ends with.
    pub fn code(&self) -> ExitCode {
        ExitCode::from(self.code)
    }

    /// Prints it on standard error.
    pub fn print(&self) {
        let (red, dim, reset) = if colour() { ("\x1b[31m", "\x1b[2m", "\x1b[0m") } else { ("", "", "") };
        let mut stderr = std::io::stderr().lock();
        let _ = writeln!(stderr, "{red}error{reset}: {}", self.message);
        if let Some(remediation) = &self.remediation {
            let _ = writeln!(stderr, "{dim}  try{reset}: {remediation}");
        }
    }
}

fn colour() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) && std::io::stderr().is_terminal()
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        let message =
            [Some(failure.message), failure.cause].into_iter().flatten().collect::<Vec<_>>().join(": ");
        Self { message, remediation: Some(failure.remediation), code: 1 }
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        let remediation = match &error {
            Error::Refused(refused) => refused.remediation.clone(),
            Error::Unreachable { .. } => {
                Some("start it with `kelvin serve`, or name another with --api-url".to_owned())
            }
            _ => None,
        };
        Self { message: chain(&error), remediation, code: 1 }
    }
}

/// Prints `value` as JSON, or as the table that `table` makes of it.
pub fn print<T: Serialize>(output: Output, value: &T, table: impl FnOnce(&T) -> Table) {
    let text = match output {
        Output::Json => serde_json::to_string_pretty(value).unwrap_or_default(),
        Output::Table => table(value).to_string(),
    };
    line(&text);
}

/// Prints one line; a reader that has gone away is no error.
pub fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// An empty table with headings.
pub fn table(headings: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if !headings.is_empty() {
        table.set_header(headings.iter().map(|heading| heading.to_uppercase()));
    }
    table
}

/// A table of names and what they stand for.
pub fn pairs(rows: Vec<(&str, String)>) -> Table {
    let mut table = table(&[]);
    for (name, value) in rows {
        table.add_row([name.to_owned(), value]);
    }
    table
}

/// How long ago something was, or how soon it is.
pub fn ago(time: jiff::Timestamp) -> String {
    let seconds = jiff::Timestamp::now().duration_since(time).as_secs();
    let text = |seconds: i64| match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        _ => format!("{}h", seconds / 3600),
    };
    if seconds < 0 { format!("in {}", text(-seconds)) } else { format!("{} ago", text(seconds)) }
}

fn labels(metadata: &BTreeMap<String, String>) -> String {
    metadata.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

/// `running` or `paused`.
pub fn state_name(state: SandboxState) -> &'static str {
    match state {
        SandboxState::Running => "running",
        SandboxState::Paused => "paused",
    }
}

fn ends(sandbox: &SandboxDetail) -> String {
    match (sandbox.state, sandbox.lifecycle.on_timeout) {
        (SandboxState::Paused, _) => "never: paused".to_owned(),
        (_, OnTimeout::Kill) => ago(sandbox.end_at),
        (_, OnTimeout::Pause) => format!("{}, by a pause", ago(sandbox.end_at)),
    }
}

/// Sandboxes.
pub fn sandbox_table(sandboxes: &Vec<SandboxDetail>) -> Table {
    let mut table =
        table(&["id", "template", "state", "cpu", "memory", "start", "started", "ends", "metadata"]);
    for sandbox in sandboxes {
        table.add_row([
            sandbox.sandbox_id.to_string(),
            sandbox.template_id.clone(),
            state_name(sandbox.state).to_owned(),
            sandbox.cpu_count.to_string(),
            format!("{} MiB", sandbox.memory_mb),
            sandbox.start_path.name().to_owned(),
            ago(sandbox.started_at),
            ends(sandbox),
            labels(&sandbox.metadata),
        ]);
    }
    table
}

/// One sandbox.
pub fn detail_table(sandbox: &SandboxDetail) -> Table {
    pairs(vec![
        ("id", sandbox.sandbox_id.to_string()),
        ("template", sandbox.template_id.clone()),
        ("state", state_name(sandbox.state).to_owned()),
        ("cpus", sandbox.cpu_count.to_string()),
        ("memory", format!("{} MiB", sandbox.memory_mb)),
        ("disk", format!("{} MiB", sandbox.disk_size_mb)),
        ("start path", sandbox.start_path.name().to_owned()),
        ("started", format!("{} ({})", sandbox.started_at, ago(sandbox.started_at))),
        ("ends", ends(sandbox)),
        ("traffic resumes it", if sandbox.lifecycle.auto_resume { "yes" } else { "no" }.to_owned()),
        ("forked from", sandbox.parent_id.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("metadata", labels(&sandbox.metadata)),
    ])
}

/// Pools.
pub fn pool_table(pools: &Vec<PoolInfo>) -> Table {
    let mut table = table(&[
        "template", "cpu", "memory", "network", "warm", "range", "hits", "rate", "arrivals", "refill",
        "oldest", "wasted", "VMMs",
    ]);
    for pool in pools {
        table.add_row([
            pool.template_id.clone(),
            pool.cpu_count.to_string(),
            format!("{} MiB", pool.memory_mb),
            if pool.network { "yes" } else { "no" }.to_owned(),
            format!("{} of {}", pool.ready, pool.target),
            format!("{}..{}", pool.min, pool.max),
            format!("{} of {}", pool.hits, pool.hits + pool.misses),
            pool.hit_rate.map(|rate| format!("{:.0} %", rate * 100.0)).unwrap_or_default(),
            format!("{:.2}/s", pool.arrivals_per_s),
            format!("{:.0} ms", pool.refill_ms),
            pool.oldest_s.map(|age| format!("{age}s")).unwrap_or_default(),
            pool.wasted.to_string(),
            pool.waiting_vmms.to_string(),
        ]);
    }
    table
}

/// The node.
pub fn node_table(node: &NodeInfo) -> Table {
    let unreadable = node.unreadable.iter().map(|record| {
        let sandbox = record.sandbox_id.as_deref().unwrap_or("of a sandbox that it does not say");
        ("unreadable record", format!("{sandbox}, machine {}: {}", record.machine, record.reason))
    });
    let mut rows = vec![
        ("version", node.version.clone()),
        ("vmm", node.vmm.clone()),
        ("accelerator", node.accelerator.clone()),
        ("data directory", node.data_dir.clone()),
        ("reflink", if node.reflink { "yes" } else { "no: every disk is copied" }.to_owned()),
        ("sandboxes", node.sandboxes.to_string()),
        ("paused", node.paused.to_string()),
        ("warm machines", node.warm.to_string()),
        ("waiting VMMs", node.waiting_vmms.to_string()),
        ("memory", format!("{} of {} MiB reserved", node.memory_reserved_mb, node.memory_mb)),
        ("vCPUs", format!("{} of {} reserved", node.vcpus_reserved, node.vcpus)),
        ("disk", format!("{} MiB free", node.disk_free_mb)),
        ("network", network_of(node)),
        ("ledger", format!("{} entries", node.ledger_entries)),
        ("settled", if node.settled { "yes" } else { "no" }.to_owned()),
    ];
    rows.extend(unreadable);
    pairs(rows)
}

fn network_of(node: &NodeInfo) -> String {
    match &node.network {
        Some(network) => format!(
            "{}, uplink {}, {} slots ready, {} used, {} quarantined",
            network.range,
            network.uplink.as_deref().unwrap_or("none"),
            network.slots_ready,
            network.slots_used,
            network.slots_quarantined
        ),
        None => node.no_network.clone().unwrap_or_else(|| "none".to_owned()),
    }
}

/// What a sandbox may reach and what it was refused.
pub fn network_state_table(state: &NetworkState) -> Table {
    let traffic = |traffic: Traffic| format!("{} packets, {} bytes", traffic.packets, traffic.bytes);
    let mut rows = vec![
        ("attached", if state.attached { "yes" } else { "no" }.to_owned()),
        ("allowed", state.allow_out.join("\n")),
        ("denied", state.deny_out.join("\n")),
        ("sent", traffic(state.sent)),
        ("received", traffic(state.received)),
    ];
    let refused: Vec<String> =
        state.denied.iter().map(|(reason, count)| format!("{reason}: {count}")).collect();
    rows.push(("refused", refused.join("\n")));
    // A guest wrote the names in here.
    let clean = |text: &str| text.chars().filter(|c| !c.is_control()).collect::<String>();
    let recent = state.recent.iter().rev().take(10);
    let recent: Vec<String> =
        recent.map(|one| format!("{:.0}  {}  {}", one.at, one.reason, clean(&one.target))).collect();
    rows.push(("last refused", recent.join("\n")));
    pairs(rows)
}

/// What a collection removed.
pub fn garbage_table(garbage: &serde_json::Value) -> Table {
    let mut table = table(&["kind", "name"]);
    for kind in ["snapshots", "images", "guests"] {
        for name in garbage[kind].as_array().into_iter().flatten() {
            table.add_row([kind.to_owned(), name.as_str().unwrap_or_default().to_owned()]);
        }
    }
    table
}

/// How long each phase took, as bars, on standard error.
pub fn waterfall(title: &str, phases: &BTreeMap<Phase, f64>) {
    const WIDTH: f64 = 48.0;
    let total: f64 = phases.values().sum();
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(stderr, "{title}: {total:.1} ms on the server");
    let mut start = 0.0;
    for (phase, ms) in phases {
        let column = |ms: f64| (ms / total.max(f64::MIN_POSITIVE) * WIDTH).round().max(0.0) as usize;
        let (from, length) = (column(start), column(*ms).max(1));
        let _ =
            writeln!(stderr, "  {:<9}{ms:>9.2} ms  {}{}", phase.name(), " ".repeat(from), "#".repeat(length));
        start += ms;
    }
}

/// What a guest has told of its boot, on standard error, below a waterfall.
pub fn boot_stages(stages: Option<BootStages>) {
    let mut stderr = std::io::stderr().lock();
    for (name, ms) in stages.into_iter().flat_map(BootStages::iter) {
        let _ = writeln!(stderr, "    boot: {name:<10}{ms:>9.1} ms");
    }
}

/// A progress bar on standard error; nothing when that is no terminal.
pub fn progress(what: &str, bytes: Option<u64>) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(bytes, target).with_message(what.to_owned());
    let template = if bytes.is_some() {
        "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}"
    } else {
        "{spinner} {msg} {bytes} {elapsed}"
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// A spinner for work of unknown length.
pub fn spinner(what: &str) -> ProgressBar {
    let bar = progress(what, None);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(std::time::Duration::from_millis(120));
    bar
}

/// How often work that is told of in lines is told of.
const LINE_EACH: Duration = Duration::from_secs(5);

/// Work in steps, each of which goes through the same bytes: a bar on a terminal, lines elsewhere; on standard error.
pub struct Steps {
    what: String,
    step: &'static str,
    bar: ProgressBar,
    is_terminal: bool,
    told: Instant,
}

impl Steps {
    /// Nothing of it is done yet.
    pub fn new(what: &str) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let bar = progress(what, Some(0));
        Self { what: what.to_owned(), step: "", bar, is_terminal, told: Instant::now() }
    }

    /// `step` is through with `done` of `total` bytes.
    pub fn at(&mut self, step: &'static str, done: u64, total: u64) {
        let is_new = step != self.step;
        if is_new {
            self.step = step;
            self.bar.reset();
            self.bar.set_message(format!("{}: {step}", self.what));
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
        if !self.is_terminal && (is_new || self.told.elapsed() >= LINE_EACH) {
            self.told = Instant::now();
            let mib = |bytes: u64| bytes >> 20;
            let mut stderr = std::io::stderr().lock();
            let _ = writeln!(stderr, "{}: {step}, {} of {} MiB", self.what, mib(done), mib(total));
        }
    }

    /// It has ended: the bar goes away.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}
