//! `kelvin bench slots`: what a claim costs, what a build costs, and that nothing is left of many.
//!
//! Runs in a network namespace of its own, with a ledger of its own: no link, rule or connection of the host is
//! touched. Each slot is used as a VMM would use it: its tap is taken, a packet goes in, the refusal comes out.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use kelvin_host::ledger::Ledger;
use kelvin_host::net::{self, Options, Slot, Slots, link, netfilter, ns};
use serde::Serialize;

use crate::Percentiles;

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Claims from a full pool, and builds on demand, each.
    #[arg(short = 'n', long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub claims: u32,
    /// Slots that are built, used and removed altogether.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=16_000))]
    pub count: u32,
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
#[allow(missing_docs)]
pub struct Report {
    /// From a pool that is full: what a machine waits for.
    pub claim_ms: Percentiles,
    /// From an empty pool.
    pub build_ms: Percentiles,
    /// Link, connections and ledger entry removed.
    pub release_ms: Percentiles,
    pub slots: u32,
    pub seconds: f64,
    /// What is left of all of them: links, connections, rules, ledger entries.
    pub links_left: usize,
    pub connections_left: u32,
    pub rules_left: usize,
    pub ledger_left: u32,
}

impl Report {
    /// For people.
    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["MS", "P50", "P95", "P99"]);
        let rows =
            [("claim", self.claim_ms), ("build on demand", self.build_ms), ("release", self.release_ms)];
        for (name, values) in rows {
            let cell = |value: f64| if value < 0.001 { "<0.001".to_owned() } else { format!("{value:.3}") };
            table.add_row([name.to_owned(), cell(values.p50), cell(values.p95), cell(values.p99)]);
        }
        let text = format!(
            "{} slots built, used and removed in {:.1} s; left: {} links, {} connections, {} rules, {} ledger entries",
            self.slots,
            self.seconds,
            self.links_left,
            self.connections_left,
            self.rules_left,
            self.ledger_left
        );
        table.add_row([text]);
        table
    }
}

/// Runs it on a thread with a namespace of its own.
///
/// # Errors
/// When slots cannot be had here, with what is missing.
pub async fn run(args: Args) -> io::Result<Report> {
    ns::on_thread(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        if rustix::process::geteuid().is_root() {
            ns::unshare()?;
        }
        runtime.block_on(measure(&args)).map_err(io::Error::other)
    })
    .await
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// A SYN of the guest to the metadata service: refused by the slot's own rules.
fn packet() -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0];
    ip.extend(net::GUEST.octets());
    ip.extend([169, 254, 169, 254]);
    let sum = |bytes: &[u8], start: u32| {
        let pairs = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
        let mut sum: u32 = start + pairs.sum::<u32>();
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (!sum & 0xffff) as u16
    };
    let check = sum(&ip, 0).to_be_bytes();
    ip[10..12].copy_from_slice(&check);
    ip.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
    let check = sum(&ip[12..], 6 + 20).to_be_bytes();
    ip[36..38].copy_from_slice(&check);
    [&[0; 10][..], &net::TAP_MAC, &net::GUEST_MAC, &[8, 0], &ip].concat()
}

fn use_it(slot: &Slot, packet: &[u8]) -> io::Result<()> {
    let mut tap = File::from(slot.take_tap().ok_or_else(|| io::Error::other("the tap is gone"))?);
    tap.write_all(packet)?;
    let mut answer = [0; 256];
    tap.read(&mut answer).map(drop)
}

async fn measure(args: &Args) -> Result<Report, Box<dyn std::error::Error + Send + Sync>> {
    let directory = tempfile::tempdir()?;
    let ledger = Ledger::open(&directory.path().join("ledger.db"))?;
    let options = Options {
        range: None,
        uplink: None,
        ready: 0,
        bandwidth_mbit: None,
        max_connections: 4096,
        range_file: directory.path().join("range"),
    };
    let slots = Slots::open(options, ledger.clone()).await?;
    let packet = packet();
    let started = Instant::now();
    let (mut claims, mut builds, mut releases) = (Vec::new(), Vec::new(), Vec::new());
    let mut held: VecDeque<Arc<Slot>> = VecDeque::new();
    for _ in 0..args.claims {
        slots.add().await?;
    }
    for _ in 0..args.claims {
        let since = Instant::now();
        held.push_back(slots.claim().await?);
        claims.push(ms(since));
    }
    let mut made = args.claims;
    while made < args.count.max(args.claims * 2) {
        let since = Instant::now();
        held.push_back(slots.claim().await?);
        builds.push(ms(since));
        made += 1;
    }
    for slot in held {
        use_it(&slot, &packet)?;
        // Nobody answers; what counts is that this host's own table knows the connection.
        let _ = TcpStream::connect_timeout(&(slot.address(), 1).into(), Duration::from_millis(1));
        let since = Instant::now();
        slots.release(&slot).await?;
        releases.push(ms(since));
    }
    let (links, range) = (slots.range().links(), slots.range().into());
    slots.close().await?;
    let seconds = started.elapsed().as_secs_f64();
    let rules = ns::on_thread(|| net::nft::run("list tables")).await?;
    let connections = ns::on_thread(move || netfilter::forget(range)).await?;
    let none = Percentiles { p50: 0.0, p95: 0.0, p99: 0.0 };
    Ok(Report {
        claim_ms: Percentiles::of(&claims).unwrap_or(none),
        build_ms: Percentiles::of(&builds).unwrap_or(none),
        release_ms: Percentiles::of(&releases).unwrap_or(none),
        slots: made,
        seconds: (seconds * 10.0).round() / 10.0,
        links_left: link::names(&links).await?.len(),
        connections_left: connections,
        rules_left: rules.matches("kelvin").count(),
        ledger_left: ledger.count().await?,
    })
}
