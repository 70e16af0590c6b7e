//! A soak: everything that clients, crashes and operators do to one server, at random from a seed, for a while; afterwards
//! all that it held is as it was before.
//!
//! ```text
//! inventory ─> rounds with restarts (graceful, kill -9) ─> rounds of one life ─> all is ended ─> inventory ─> restart ─> inventory
//!                 │ each: four clients at once (`load`), beside them VMMs are killed or the server is
//!                 └ then all stand still: what is listed is compared with what the clients know (`truth`)
//! ```
//!
//! The seed decides which operations follow each other for each client of each round, when a client leaves, and what is
//! killed when; how they meet is the machine's. `cargo xtask soak` runs it, and the suite for two minutes. What a run that
//! was killed leaves is cleared by the next `cargo xtask test` or `soak`.

mod book;
mod inventory;
mod load;
mod seed;
mod truth;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kelvin_api::sandbox::{NodeInfo, SetPool};
use tokio::sync::watch;

use crate::{Ground, LIMIT, Server, new_sandbox};
use book::{Shared, Up};
use inventory::Inventory;
use load::Worker;
use seed::Seed;

/// Clients at once.
const CLIENTS: u64 = 4;
/// How long a round is.
const ROUND: Duration = Duration::from_secs(10);
/// How long a server that stands still may take until it holds what it held before: it looks itself every 30 s.
const QUIET: Duration = Duration::from_secs(40);
/// What a sandbox of `base` takes of it at least.
const MACHINE_MIB: u64 = 256;
/// Room for sandboxes, so that a soak meets full nodes too, and the machine is not its own limit.
const ARGS: [&str; 9] =
    ["--waiting-vmms", "4", "--slots", "4", "--warm-max", "2", "--memory-mib", "6144", "--no-auto-bake"];

/// How long, and from which seed.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How long clients are at work; preparing and clearing away come on top.
    pub duration: Duration,
    /// Where all randomness of the soak comes from.
    pub seed: u64,
}

/// What happens beside the clients of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    Calm,
    VmmsKilled,
    Stopped,
    ServerKilled,
}

impl Round {
    fn name(self) -> &'static str {
        match self {
            Self::Calm => "calm",
            Self::VmmsKilled => "VMMs killed",
            Self::Stopped => "server stopped",
            Self::ServerKilled => "server killed",
        }
    }
}

/// Runs it on a server of its own.
///
/// # Panics
/// When the server does not do what it promises; with all faults that were found and the seed.
pub async fn run(ground: &Ground, options: Options) {
    let Options { duration, seed } = options;
    println!("soak: {} s, seed {seed}", duration.as_secs());
    let mut server = ground.baked("soak", &ARGS, 4).await;
    // As after a while of work: what is opened once is open.
    for _ in 0..4 {
        let sandbox = server.client().create(&new_sandbox(), None).await.expect("a create").sandbox;
        server.client().kill(&sandbox.sandbox_id).await.expect("a kill");
    }
    quiet(&server).await;
    server.terminate().await;
    server.start(&ARGS).await;
    quiet(&server).await;
    let before = Inventory::take(&server).await;

    let shared = Arc::new(Shared { up: watch::Sender::new(None), book: Mutex::default() });
    let mut soak = Soak { shared, seed, life: 0, round: 0, workers: Vec::new(), peaks: [0; 2] };
    soak.workers = (0..CLIENTS).map(Worker::new).collect();
    soak.announce(&server);
    let started = Instant::now();
    while started.elapsed() < duration / 2 {
        let kinds = [Round::Calm, Round::VmmsKilled, Round::Stopped, Round::ServerKilled];
        soak.round(&mut server, &kinds).await;
    }
    // One life, whose memory is watched.
    let mut memory = Vec::new();
    while started.elapsed() < duration {
        soak.round(&mut server, &[Round::Calm, Round::VmmsKilled]).await;
        memory.push((soak.shared.done("create"), inventory::resident_kib(&server)));
    }
    let worked = started.elapsed();
    soak.end_all(&server).await;
    quiet(&server).await;
    let after = soak.as_before(&server, &before, "the same life").await;
    server.terminate().await;
    server.start(&ARGS).await;
    quiet(&server).await;
    let restarted = soak.as_before(&server, &before, "a restart").await;

    inventory::print(&before, &after, &restarted);
    soak.check_memory(&memory);
    soak.report(worked);
    server.stop().await;
}

/// Waits until the server does nothing by itself, without machines that demand left warm.
async fn quiet(server: &Server) -> NodeInfo {
    let none = SetPool { min: Some(0), max: Some(0), max_age_s: None };
    server.client().set_pool("base", &none).await.expect("a pool");
    server.node_when("quiet", |node| node.settled && node.warm == 0).await
}

struct Soak {
    shared: Arc<Shared>,
    seed: u64,
    life: u32,
    round: u64,
    workers: Vec<Worker>,
    /// The largest write-ahead log of each database, in KiB.
    peaks: [u64; 2],
}

impl Soak {
    fn announce(&mut self, server: &Server) {
        self.life += 1;
        self.shared.up.send_replace(Some(Up { life: self.life, client: server.client() }));
    }

    /// One round: clients at work, something beside them, a look at what is there.
    async fn round(&mut self, server: &mut Server, kinds: &[Round]) {
        self.round += 1;
        let mut seed = Seed::of(&[self.seed, self.round, u64::MAX]);
        let kind = kinds[seed.below(kinds.len() as u64) as usize];
        let demand = SetPool { min: Some(0), max: Some(2), max_age_s: None };
        server.client().set_pool("base", &demand).await.expect("a pool");
        self.shared.book().vmms_die = kind == Round::VmmsKilled;
        let before = self.shared.done("create");
        let until = Instant::now() + ROUND;
        let mut tasks = tokio::task::JoinSet::new();
        for mut worker in self.workers.drain(..) {
            worker.begin(Seed::of(&[self.seed, self.round, worker.number()]));
            tasks.spawn(worker.work(Arc::clone(&self.shared), until));
        }
        // Somewhere in its middle.
        let strike = Instant::now() + ROUND.mul_f64(0.2 + 0.6 * seed.fraction());
        match kind {
            Round::Calm => {}
            Round::VmmsKilled => {
                while Instant::now() < until {
                    self.wait(server, Instant::now() + Duration::from_millis(500 + seed.below(2500))).await;
                    self.kill_a_vmm(server, &mut seed);
                }
            }
            Round::Stopped | Round::ServerKilled => {
                self.wait(server, strike).await;
                self.shared.up.send_replace(None);
                if kind == Round::Stopped {
                    server.terminate().await;
                    self.shared.did("server stopped");
                } else {
                    server.kill_9();
                    self.shared.did("server killed");
                }
                server.start(&ARGS).await;
                self.announce(server);
            }
        }
        self.wait(server, until).await;
        let ended = tokio::time::timeout(LIMIT * 2, async {
            while let Some(worker) = tasks.join_next().await {
                self.workers.push(worker.expect("a client does not panic"));
            }
        });
        ended.await.unwrap_or_else(|_| panic!("seed {}: a client does not come to its end", self.seed));
        self.workers.sort_by_key(Worker::number);
        // A full node looks for room for what is to wait, until what nobody knows any more is killed.
        let has_no_room = |node: &NodeInfo| node.memory_mb - node.memory_reserved_mb < MACHINE_MIB;
        let quiet = |node: &NodeInfo| node.settled || node.adopting == 0 && has_no_room(node);
        let node = server.node_when("quiet", quiet).await;
        let listed = truth::compare(&self.shared, server, &mut self.workers).await;
        println!(
            "round {} ({}): {} creates, {listed} listed, {} ledger entries, server {} MiB",
            self.round,
            kind.name(),
            self.shared.done("create") - before,
            node.ledger_entries,
            inventory::resident_kib(server) >> 10,
        );
    }

    /// Waits, and looks at the logs of the databases meanwhile.
    async fn wait(&mut self, server: &Server, until: Instant) {
        while Instant::now() < until {
            for (peak, now) in self.peaks.iter_mut().zip(inventory::logs_kib(server)) {
                *peak = now.max(*peak);
            }
            tokio::time::sleep_until((Instant::now() + Duration::from_millis(100)).min(until).into()).await;
        }
    }

    /// Kills one VMM, of a sandbox or a waiting one.
    fn kill_a_vmm(&self, server: &Server, seed: &mut Seed) {
        let vmms: Vec<i32> = server.vmms().into_iter().collect();
        if vmms.is_empty() {
            return;
        }
        let victim = vmms[seed.below(vmms.len() as u64) as usize];
        if let Some(pid) = rustix::process::Pid::from_raw(victim)
            && rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok()
        {
            self.shared.did("VMM killed");
        }
    }

    /// Ends every sandbox and deletes every snapshot that was kept.
    async fn end_all(&mut self, server: &Server) {
        let client = server.client();
        for sandbox in client.of_project("*").list_all(&[]).await.expect("a list") {
            client.kill(&sandbox.sandbox_id).await.expect("a kill");
        }
        server.settle().await;
        for snapshot in client.snapshots().await.expect("a list") {
            // One that another has taken along is gone already.
            let _ = client.delete_snapshot(&snapshot.snapshot_id, true).await;
        }
        for worker in &mut self.workers {
            worker.forget();
        }
        // With its idle connections.
        self.shared.up.send_replace(None);
    }

    /// Waits until the server holds what it held before; faults for what it holds too much of.
    async fn as_before(&self, server: &Server, before: &Inventory, when: &str) -> Inventory {
        let started = Instant::now();
        loop {
            let now = Inventory::take(server).await;
            let more = now.more_than(before);
            if more.is_empty() {
                return now;
            }
            if started.elapsed() > QUIET {
                for text in more {
                    self.shared.fault(format!("after {when}: {text}"));
                }
                return now;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Whether memory has stopped growing: by the second half of one life.
    fn check_memory(&self, memory: &[(u64, u64)]) {
        /// Source of the limit: what a heap of this size moves by between two looks, four times.
        const GROWTH_KIB: u64 = 16 << 10;
        let [.., (creates, last)] = memory else { return };
        let (from, middle) = memory[memory.len() / 2];
        let per_thousand = last.saturating_sub(middle) as f64 * 1000.0 / (creates - from).max(1) as f64;
        println!(
            "memory of the server in one life: {} KiB, {middle} KiB in its middle, {last} KiB at its end: {per_thousand:.0} KiB for 1,000 creates",
            memory[0].1
        );
        if last.saturating_sub(middle) > GROWTH_KIB {
            self.shared.fault(format!("the server grew by {} KiB in the second half", last - middle));
        }
    }

    /// Prints what was done, and fails with what was wrong.
    fn report(&self, worked: Duration) {
        /// How large a write-ahead log may become while clients never pause, in KiB.
        const LOG_KIB: u64 = 64 << 10;
        for (name, peak) in inventory::DATABASES.iter().zip(self.peaks) {
            println!("largest {name}-wal: {peak} KiB");
            if peak > LOG_KIB {
                self.shared.fault(format!("{name}-wal had {peak} KiB"));
            }
        }
        let book = self.shared.book();
        for (what, count) in &book.done {
            println!("{what}: {count}");
        }
        for (what, count) in &book.excused {
            println!("excused, {what}: {count}");
        }
        let creates = book.done.get("create").copied().unwrap_or_default();
        println!(
            "soak: {creates} creates in {:.0} s, {} rounds, {} lives of the server, seed {}: {}",
            worked.as_secs_f64(),
            self.round,
            self.life,
            self.seed,
            if book.faults.is_empty() { "ok" } else { "FAILED" }
        );
        assert!(creates > 0, "nothing was created");
        assert!(
            book.faults.is_empty(),
            "{} faults, seed {}:\n{}",
            book.faults.len(),
            self.seed,
            book.faults.join("\n")
        );
    }
}
