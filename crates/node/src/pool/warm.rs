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

use std::sync::Arc;
use std::time::Duration;

use kelvin_api::error::chain;
use kelvin_api::guest::{Activation, Request};
use kelvin_api::id::Token;
use kelvin_api::sandbox::{EnvVars, PoolInfo};
use kelvin_host::clock::Clock;
use kelvin_host::descriptors::{Budget, MACHINE};
use kelvin_host::net::Slot;
use tokio::time::Instant;

use crate::capacity::{Amount, Hold};
use crate::error::Error;
use crate::machine::clock::{random_bytes, wall_clock_ns};
use crate::machine::resources::MachineResources;
use crate::machine::warm_up::{quiesce, warm_up_once};
use crate::pool::filler::{PATIENCE, RETRY};
use crate::pool::policy::{Claim, share};
use crate::pool::shelf::{Parked, Pool, Ready, manifest_shape};
use crate::state::Inner;

/// How often targets are looked at when nothing happens: demand fades, machines age and die.
const TICK: Duration = Duration::from_secs(1);
/// Run before a machine is parked, as the default user: what it translates is there for the first real command.
const FIRST: [&str; 1] = ["true"];

impl Inner {
    /// Sets every pool's target and returns the machines that have to go.
    fn plan(&self) -> Vec<Parked> {
        let pools: Vec<Arc<Pool>> = self.pools.all();
        let now = Instant::now();
        let waited_for = self.templates.waited_for();
        let usable = |pool: &Pool| {
            pool.refusal().is_none() && self.is_one_of(&waited_for, &pool.snapshot.manifest.identity)
        };
        let claims: Vec<Claim> = pools
            .iter()
            .map(|pool| {
                let (rule, demand) = (self.pools.rule(pool), pool.warm().demand);
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
            surplus.extend(pool.surplus(self.pools.rule(pool)));
        }
        surplus
    }

    /// The pool that lacks a machine most, marked as being filled.
    fn neediest(&self) -> Option<Arc<Pool>> {
        let pools: Vec<Arc<Pool>> = self.pools.all();
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
                self.activity.changed();
                let _ = stop.run_until_cancelled(tokio::time::timeout(TICK, self.pools.looked_at())).await;
                continue;
            };
            // Requests first.
            let _ = stop.run_until_cancelled(tokio::time::timeout(PATIENCE, self.activity.quiet())).await;
            let filled = if stop.is_cancelled() { Ok(()) } else { self.fill_warm(&pool).await };
            let mut warm = pool.warm();
            warm.filling = false;
            match filled {
                Ok(()) => warm.not_before = None,
                Err(error) => {
                    tracing::warn!(snapshot = %pool.snapshot_id(), error = chain(&error), "no warm machine could be made");
                    // The cause is outside, and there is no event to wait for.
                    warm.not_before = Some(Instant::now() + RETRY);
                }
            }
            drop(warm);
            self.activity.changed();
        }
    }

    async fn fill_warm(&self, pool: &Arc<Pool>) -> Result<(), Error> {
        let amount = Amount::machine(manifest_shape(&pool.snapshot.manifest));
        let _descriptors = Budget::of_process().take_spare(MACHINE)?;
        // Given back until it is parked: a machine that is being made cannot be evicted, and must not be in the way of a
        // request meanwhile.
        drop(self.capacity.hold(amount)?);
        let started = Instant::now();
        let parked = self.park(pool, amount).await?;
        let mut warm = pool.warm();
        warm.demand.refilled(started.elapsed());
        warm.parked.push_back(parked);
        Ok(())
    }

    async fn park(&self, pool: &Arc<Pool>, amount: Amount) -> Result<Parked, Error> {
        let own = Slot::random_mac()?;
        // Its own VMM: those that wait are for creates. From here on every error has to release it.
        let Ready { home, waiting, mut control, .. } = self.prepare(pool, None).await?;
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
            warm_up_once(running.connect().await?, &home.spec, &FIRST, Some(&token)).await?;
            quiesce(&mut control).await?;
            Ok::<_, Error>(running.park().await.map_err(|(_, error)| error)?)
        };
        let parked = tokio::select! {
            parked = work => parked,
            // No guest holds up a node that stops.
            () = self.hurry.cancelled() => Err(Error::Stopping),
        };
        match parked.and_then(|paused| Ok((paused, self.capacity.hold(amount)?))) {
            Ok((paused, hold)) => {
                Ok(Parked { home, paused, control, lease, mac, hold, since: Instant::now() })
            }
            Err(error) => {
                self.allocator.release_or_log(&home.spec, Some(key)).await;
                Err(error)
            }
        }
    }

    /// Ends a parked machine and releases what it has.
    pub async fn discard_parked(&self, parked: Parked) {
        let key = parked.paused.key();
        self.allocator.release_or_log(&parked.home.spec, Some(key)).await;
        drop(parked);
    }

    /// The same beside what is going on.
    pub fn discard_parked_later(self: &Arc<Self>, parked: Parked) {
        let inner = Arc::clone(self);
        let teardown = self.activity.teardown();
        self.tasks.spawn(async move {
            inner.discard_parked(parked).await;
            drop(teardown);
        });
    }

    /// Holds what somebody asks for: machines that nobody has asked for make room for it.
    ///
    /// # Errors
    /// `Exhausted` when that is not enough.
    pub fn make_room(self: &Arc<Self>, amount: Amount) -> Result<Hold, Error> {
        loop {
            match self.capacity.hold(amount) {
                Err(_) if self.evict() => {}
                held => return held,
            }
        }
    }

    /// Gives up one parked machine, of the pool that is used least for its memory: a request needs the room.
    pub fn evict(self: &Arc<Self>) -> bool {
        let pools: Vec<Arc<Pool>> = self.pools.all();
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
        let Parked { home, paused, lease, hold, .. } = parked;
        // Free for the request at once; the machine is ended beside it.
        drop(hold);
        let inner = Arc::clone(self);
        let teardown = self.activity.teardown();
        self.tasks.spawn(async move {
            inner.allocator.release_or_log(&home.spec, Some(paused.key())).await;
            drop(lease);
            drop(teardown);
        });
        true
    }

    /// Every pool, for people and for placement.
    pub fn pool_infos(&self) -> Vec<PoolInfo> {
        let pools: Vec<Arc<Pool>> = self.pools.all();
        let now = Instant::now();
        let mut infos: Vec<PoolInfo> = pools
            .iter()
            // Those of a former agent, kernel or VMM are only waiting to be collected.
            .filter(|pool| pool.parked() > 0 || self.is_usable(&pool.snapshot.manifest.identity))
            .map(|pool| {
                let (rule, manifest) = (self.pools.rule(pool), &pool.snapshot.manifest);
                let warm = pool.warm();
                let asked = warm.hits + warm.misses;
                let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
                PoolInfo {
                    template_id: manifest.template.to_string(),
                    snapshot_id: manifest.id.to_string(),
                    cpu_count: manifest.identity.vcpus,
                    memory_mb: manifest.identity.memory_mib,
                    network: self.identities.has_network(&manifest.identity),
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
        self.pools.all().iter().all(|pool| pool.is_warm())
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
