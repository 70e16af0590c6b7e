//! Warm machines: restored, activated to a neutral state, and answering; parked until somebody claims one.
//!
//! ```text
//! prepare ─> load ─> activate (as nobody) ─> a first command ─> at rest ─> vCPUs stopped: parked
//! parked ──claim──> activate (as somebody) ─> a sandbox
//!    └── too old, no longer wanted, of another identity, over budget, dead: ended
//! ```
//!
//! A claim is one round trip: what an emulator has to translate for it has run once before. A parked machine is of
//! exactly one snapshot, and belongs to that snapshot's pool; whatever differs is cloned. Its vCPUs stand still, so
//! it costs the pages it has written and nothing else; its token is random and known to nobody.
//!
//! One task refills for all pools, one machine at a time, and only while no create is under way. Who writes: the
//! ledger, as for every machine. A crash leaves machines that no sandbox owns; the next start removes them.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use kelvin_api::error::chain;
use kelvin_api::guest::{Activation, Request};
use kelvin_api::id::{TemplateName, Token};
use kelvin_api::sandbox::{EnvVars, PoolInfo, SetPool};
use kelvin_host::clock::Clock;
use kelvin_host::descriptors::{Budget, MACHINE};
use kelvin_host::net::Slot;
use kelvin_vmm::Paused;
use kelvin_vmm::control::Control;
use tokio::time::Instant;

use crate::capacity::Amount;
use crate::error::Error;
use crate::machine::resources::MachineResources;
use crate::pool::policy::{Claim, Demand, Rule, share};
use crate::pool::{PATIENCE, Pool, Ready, manifest_shape};
use crate::snapshots::Lease;
use crate::start::bake::{quiesce, warm_up};
use crate::start::{random_bytes, wall_clock_ns};
use crate::{Inner, Node, lock};

/// How often targets are looked at when nothing happens: demand fades, machines age and die.
const TICK: Duration = Duration::from_secs(1);
/// Run before a machine is parked, as the default user: what it translates is there for the first real command.
const FIRST: [&str; 1] = ["true"];

/// A machine that waits for a claim.
pub struct Parked {
    /// Its resources.
    pub home: MachineResources,
    /// Its VMM, vCPUs stopped.
    pub paused: Paused,
    /// Its guest's control port.
    pub control: Control,
    /// Keeps its snapshot.
    pub lease: Option<Lease>,
    /// The hardware address of its link.
    pub mac: Option<[u8; 6]>,
    since: Instant,
}

/// What a pool knows of its warm machines.
pub struct Warm {
    parked: VecDeque<Parked>,
    demand: Demand,
    /// How many there should be; `None` until that was looked at, and nobody knows what a new pool lacks.
    target: Option<u32>,
    filling: bool,
    hits: u64,
    misses: u64,
    wasted: u64,
    /// When the next try is worth it, after one that failed.
    not_before: Option<Instant>,
}

impl Default for Warm {
    fn default() -> Self {
        Self {
            parked: VecDeque::new(),
            demand: Demand::new(Instant::now()),
            target: None,
            filling: false,
            hits: 0,
            misses: 0,
            wasted: 0,
            not_before: None,
        }
    }
}

impl Pool {
    fn warm(&self) -> MutexGuard<'_, Warm> {
        self.warm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the newest machine that is alive: it is the likeliest to be in the host's caches. Those that died are
    /// returned to be released.
    pub fn take_warm(&self) -> (Option<Parked>, Vec<Parked>) {
        let mut dead = Vec::new();
        let mut warm = self.warm();
        loop {
            match warm.parked.pop_back() {
                Some(candidate) if candidate.paused.is_over() => {
                    warm.wasted += 1;
                    dead.push(candidate);
                }
                taken => return (taken, dead),
            }
        }
    }

    /// Notes that somebody wanted a machine, and whether one was there.
    pub fn wanted(&self, hit: bool) {
        let mut warm = self.warm();
        warm.demand.arrive(Instant::now());
        if hit { warm.hits += 1 } else { warm.misses += 1 }
    }

    /// Notes that a machine was taken that did not answer.
    pub fn spoilt(&self) {
        self.warm().wasted += 1;
    }

    /// How many are parked.
    pub fn parked(&self) -> u32 {
        u32::try_from(self.warm().parked.len()).unwrap_or(u32::MAX)
    }

    /// Whether it is known how many there should be, there are as many, and none is on its way.
    pub fn is_warm(&self) -> bool {
        let warm = self.warm();
        !warm.filling
            && warm
                .target
                .is_some_and(|target| u32::try_from(warm.parked.len()).is_ok_and(|parked| parked >= target))
    }

    /// Everything that is parked, to be released.
    pub fn drain_warm(&self) -> Vec<Parked> {
        let mut warm = self.warm();
        warm.target = Some(0);
        warm.parked.drain(..).collect()
    }

    fn surplus(&self, rule: Rule) -> Vec<Parked> {
        let mut warm = self.warm();
        let oldest = Duration::from_secs(rule.max_age_s);
        let (mut gone, mut kept) = (Vec::new(), VecDeque::new());
        for parked in std::mem::take(&mut warm.parked) {
            if parked.paused.is_over() || parked.since.elapsed() > oldest {
                gone.push(parked);
            } else {
                kept.push_back(parked);
            }
        }
        while u32::try_from(kept.len()).is_ok_and(|count| count > warm.target.unwrap_or(0)) {
            gone.extend(kept.pop_front());
        }
        warm.parked = kept;
        warm.wasted += gone.len() as u64;
        gone
    }
}

impl Inner {
    /// What is wanted of the pools of a template.
    pub fn rule(&self, pool: &Pool) -> Rule {
        let rules = lock(&self.rules);
        rules.get(&pool.snapshot.manifest.template).copied().unwrap_or(self.options.warm)
    }

    /// Sets every pool's target and returns the machines that have to go.
    fn plan(&self) -> Vec<Parked> {
        let pools: Vec<Arc<Pool>> = lock(&self.pools).values().cloned().collect();
        let now = Instant::now();
        let usable =
            |pool: &Pool| pool.refusal().is_none() && self.is_usable(&pool.snapshot.manifest.identity);
        let claims: Vec<Claim> = pools
            .iter()
            .map(|pool| {
                let (rule, demand) = (self.rule(pool), pool.warm().demand);
                let on = usable(pool) && !self.stop.is_cancelled();
                Claim {
                    target: if on { demand.target(rule, now) } else { 0 },
                    min: if on { rule.min.min(rule.max) } else { 0 },
                    memory_mib: Amount::machine(manifest_shape(&pool.snapshot.manifest)).memory_mib(),
                    rate: demand.rate(now),
                    parked: pool.parked(),
                }
            })
            .collect();
        let granted = share(&claims, u64::from(self.options.warm_memory.0));
        let mut surplus = Vec::new();
        for (pool, target) in pools.iter().zip(granted) {
            pool.warm().target = Some(target);
            surplus.extend(pool.surplus(self.rule(pool)));
        }
        surplus
    }

    /// The pool that lacks a machine most, marked as being filled.
    fn neediest(&self) -> Option<Arc<Pool>> {
        let pools: Vec<Arc<Pool>> = lock(&self.pools).values().cloned().collect();
        let now = Instant::now();
        let lack = |pool: &Arc<Pool>| {
            let warm = pool.warm();
            let ready = warm.not_before.is_none_or(|at| now >= at);
            let parked = u32::try_from(warm.parked.len()).unwrap_or(u32::MAX);
            let target = warm.target.filter(|target| ready && parked < *target)?;
            Some(f64::from(target - parked) / f64::from(target))
        };
        let worst = pools.iter().filter_map(|pool| Some((lack(pool)?, pool)));
        let (_, pool) = worst.max_by(|a, b| a.0.total_cmp(&b.0))?;
        pool.warm().filling = true;
        Some(Arc::clone(pool))
    }

    /// Keeps warm machines as demand and rules want them, until the node stops.
    pub async fn govern(self: Arc<Self>) {
        let stop = self.stop.clone();
        while !stop.is_cancelled() {
            for parked in self.plan() {
                self.discard_parked(parked).await;
            }
            let Some(pool) = self.neediest() else {
                self.settled.notify_waiters();
                let _ =
                    stop.run_until_cancelled(tokio::time::timeout(TICK, self.warm_wanted.notified())).await;
                continue;
            };
            // Requests first.
            let _ = stop.run_until_cancelled(tokio::time::timeout(PATIENCE, self.quiet())).await;
            let filled = if stop.is_cancelled() { Ok(()) } else { self.fill_warm(&pool).await };
            let mut warm = pool.warm();
            warm.filling = false;
            match filled {
                Ok(()) => warm.not_before = None,
                Err(error) => {
                    tracing::warn!(snapshot = %pool.snapshot_id(), error = chain(&error), "no warm machine could be made");
                    // The cause is outside, and there is no event to wait for.
                    warm.not_before = Some(Instant::now() + crate::pool::RETRY);
                }
            }
            drop(warm);
            self.settled.notify_waiters();
        }
    }

    async fn fill_warm(&self, pool: &Arc<Pool>) -> Result<(), Error> {
        let amount = Amount::machine(manifest_shape(&pool.snapshot.manifest));
        let _descriptors = Budget::of_process().take_spare(MACHINE)?;
        self.capacity().hold(amount)?;
        // Given back until it is parked: a machine that is being made cannot be evicted, and must not be in the way of a
        // request meanwhile.
        self.capacity().release(amount);
        let started = Instant::now();
        let parked = self.park(pool).await?;
        let held = self.capacity().hold(amount);
        if let Err(error) = held {
            let key = parked.paused.key();
            self.allocator.release_or_log(&parked.home.spec, Some(key)).await;
            return Err(error);
        }
        let mut warm = pool.warm();
        warm.demand.refilled(started.elapsed());
        warm.parked.push_back(parked);
        Ok(())
    }

    async fn park(&self, pool: &Arc<Pool>) -> Result<Parked, Error> {
        let own = Slot::random_mac()?;
        // Its own VMM: those that wait are for creates. From here on every error has to release it.
        let Ready { home, waiting, mut control } = self.prepare(pool).await?;
        let key = waiting.key();
        let lease = self.snapshots.lease(&pool.snapshot_id());
        // Known here and nowhere else; the claim replaces it.
        let token = Token::random();
        let mac = home.spec.network.is_some().then_some(own);
        let work = async {
            pool.snapshot.check_seal()?;
            if let (Some(slot), Some(mac)) = (&home.spec.network, mac) {
                slot.set_guest_mac(mac).await?;
            }
            let paused = waiting.load(&pool.snapshot.file("state")).await.map_err(|(_, error)| error)?;
            let asked = control.post(&Request::Activate(nobody(&self.clock, &home, &token, mac)?)).await?;
            let running = paused.resume().await.map_err(|(_, error)| error)?;
            control.wait("activation", asked, self.options.activate_deadline).await?;
            running.learn();
            warm_up(running.connect().await?, &home.spec, &FIRST, Some(&token)).await?;
            quiesce(&mut control).await?;
            Ok::<_, Error>(running.park().await.map_err(|(_, error)| error)?)
        };
        let parked = tokio::select! {
            parked = work => parked,
            // No guest holds up a node that stops.
            () = self.hurry.cancelled() => Err(Error::Stopping),
        };
        match parked {
            Ok(paused) => Ok(Parked { home, paused, control, lease, mac, since: Instant::now() }),
            Err(error) => {
                self.allocator.release_or_log(&home.spec, Some(key)).await;
                Err(error)
            }
        }
    }

    /// Ends a parked machine and releases what it has.
    pub async fn discard_parked(&self, parked: Parked) {
        let (key, shape) = (parked.paused.key(), parked.home.spec.shape);
        self.allocator.release_or_log(&parked.home.spec, Some(key)).await;
        self.capacity().release(Amount::machine(shape));
    }

    /// The same beside what is going on.
    pub fn discard_parked_later(self: &Arc<Self>, parked: Parked) {
        let inner = Arc::clone(self);
        self.begin_teardown();
        self.tasks.spawn(async move {
            inner.discard_parked(parked).await;
            inner.end_teardown();
        });
    }

    /// Gives up one parked machine, of the pool that is used least for its memory: a request needs the room.
    pub fn evict(self: &Arc<Self>) -> bool {
        let pools: Vec<Arc<Pool>> = lock(&self.pools).values().cloned().collect();
        let now = Instant::now();
        let least = pools.iter().filter(|pool| pool.parked() > 0).min_by(|a, b| {
            let worth = |pool: &Pool| {
                let memory = f64::from(pool.snapshot.manifest.identity.memory_mib);
                pool.warm().demand.rate(now) / memory
            };
            worth(a).total_cmp(&worth(b))
        });
        let Some(parked) = least.and_then(|pool| {
            let mut warm = pool.warm();
            warm.wasted += 1;
            warm.parked.pop_front()
        }) else {
            return false;
        };
        let shape = parked.home.spec.shape;
        // Free for the request at once; the machine is ended beside it.
        self.capacity().release(Amount::machine(shape));
        let inner = Arc::clone(self);
        self.begin_teardown();
        self.tasks.spawn(async move {
            inner.allocator.release_or_log(&parked.home.spec, Some(parked.paused.key())).await;
            inner.end_teardown();
        });
        true
    }

    /// Every pool, for people and for placement.
    pub fn pool_infos(&self) -> Vec<PoolInfo> {
        let pools: Vec<Arc<Pool>> = lock(&self.pools).values().cloned().collect();
        let now = Instant::now();
        let mut infos: Vec<PoolInfo> = pools
            .iter()
            // Those of a former agent, kernel or VMM are only waiting to be collected.
            .filter(|pool| pool.parked() > 0 || self.is_usable(&pool.snapshot.manifest.identity))
            .map(|pool| {
                let (rule, manifest) = (self.rule(pool), &pool.snapshot.manifest);
                let warm = pool.warm();
                let asked = warm.hits + warm.misses;
                let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
                PoolInfo {
                    template_id: manifest.template.to_string(),
                    snapshot_id: manifest.id.to_string(),
                    cpu_count: manifest.identity.vcpus,
                    memory_mb: manifest.identity.memory_mib,
                    network: self.has_network(&manifest.identity),
                    min: rule.min,
                    max: rule.max,
                    max_age_s: rule.max_age_s,
                    target: warm.target.unwrap_or(0),
                    ready: count(warm.parked.len()),
                    hits: warm.hits,
                    misses: warm.misses,
                    hit_rate: if asked == 0 { None } else { Some(warm.hits as f64 / asked as f64) },
                    arrivals_per_s: warm.demand.rate(now),
                    refill_ms: warm.demand.refill_s() * 1e3,
                    oldest_s: warm.parked.front().map(|parked| parked.since.elapsed().as_secs()),
                    wasted: warm.wasted,
                    waiting_vmms: pool.count(),
                    refused: pool.refusal(),
                }
            })
            .collect();
        infos.sort_by(|a, b| {
            let key =
                |info: &PoolInfo| (info.template_id.clone(), info.cpu_count, info.memory_mb, info.network);
            key(a).cmp(&key(b))
        });
        infos
    }

    /// Whether no warm machine is missing or on its way.
    pub fn is_warm(&self) -> bool {
        lock(&self.pools).values().all(|pool| pool.is_warm())
    }

    /// Says that targets may have changed.
    pub fn look_at_pools(&self) {
        self.warm_wanted.notify_one();
    }
}

/// As long as a sandbox's id: a host name of another length is one more system call for the claim.
fn nobodys_name(home: &MachineResources) -> String {
    home.spec.vm.to_string()
}

fn nobody(
    clock: &Clock,
    home: &MachineResources,
    token: &Token,
    mac: Option<[u8; 6]>,
) -> Result<Activation, Error> {
    let (machine_id, boot_id, entropy) = (random_bytes()?, random_bytes()?, random_bytes()?);
    Ok(Activation {
        sandbox_id: nobodys_name(home),
        template: String::new(),
        hostname: nobodys_name(home),
        machine_id,
        boot_id,
        mac: mac.unwrap_or_default(),
        entropy,
        access_token: token.expose().to_owned(),
        env_vars: EnvVars::new(),
        wall_clock_ns: wall_clock_ns(clock),
    })
}

impl Node {
    /// Every pool of machines that wait.
    pub fn pools(&self) -> Vec<PoolInfo> {
        self.inner.pool_infos()
    }

    /// Sets what is wanted of the warm machines of a template; what is `None` stays. Remembered across restarts.
    ///
    /// # Errors
    /// `Store` for an unknown template, `Rule` for numbers that contradict each other, `Io`.
    pub async fn set_pool(&self, template: &TemplateName, wanted: SetPool) -> Result<(), Error> {
        let (inner, template) = (Arc::clone(&self.inner), template.clone());
        self.run("setting what is wanted of a pool", async move { inner.set_rule(template, wanted).await })
            .await
    }
}

impl Inner {
    async fn set_rule(&self, template: TemplateName, wanted: SetPool) -> Result<(), Error> {
        self.store.template_stamp(&template)?;
        // One after another: each writes the whole file.
        let _writing = self.writing_rules.lock().await;
        let mut rules = lock(&self.rules).clone();
        let mut rule = rules.get(&template).copied().unwrap_or(self.options.warm);
        rule.min = wanted.min.unwrap_or(rule.min);
        rule.max = wanted.max.unwrap_or(rule.max.max(rule.min));
        rule.max_age_s = wanted.max_age_s.unwrap_or(rule.max_age_s);
        if rule.min > rule.max || rule.max > MAX_WARM || rule.max_age_s == 0 {
            return Err(Error::Rule { min: rule.min, max: rule.max, most: MAX_WARM });
        }
        rules.insert(template, rule);
        let (path, all) = (self.store.root().join(RULES), rules.clone());
        let written = kelvin_host::blocking::spawn(move || kelvin_store::write_json(&path, &all)).await;
        written.map_err(|error| Error::Io {
            what: "remembering what is wanted of a pool",
            source: std::io::Error::other(error),
        })??;
        *lock(&self.rules) = rules;
        self.look_at_pools();
        Ok(())
    }
}

/// What operators want of pools, below the data directory.
const RULES: &str = "pools.json";
/// Warm machines of one template.
const MAX_WARM: u32 = 1000;

/// What operators wanted when the last daemon ended.
///
/// # Errors
/// `Store` when it cannot be read: rules that were set are not forgotten silently.
pub fn read_rules(root: &Path) -> Result<BTreeMap<TemplateName, Rule>, Error> {
    match kelvin_store::read_json(&root.join(RULES)) {
        Ok(rules) => Ok(rules),
        Err(kelvin_store::Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(BTreeMap::new())
        }
        Err(error) => Err(error.into()),
    }
}
