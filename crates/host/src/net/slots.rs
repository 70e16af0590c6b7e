//! The pool of slots: lowest free number first, built ahead, quarantined when a removal fails.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::Ipv4Addr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kelvin_api::id::VmId;
use tokio::sync::Notify;

use super::addresses::{Range, SLOTS};
use super::error::Error;
use super::host::check;
use super::rules::{self, Setting};
use super::slot::Slot;
use super::{link, netfilter, nft, ns};
use crate::ledger::{Ledger, Resource};
use crate::process::ProcessKey;

/// How old the list of the host's addresses may be when a slot is built. The host's own table refuses what
/// came later.
const ADDRESSES: Duration = Duration::from_secs(10);
/// Ranges that are tried when none is given: one for each server on a host.
const RANGES: std::ops::Range<u8> = 213..229;

/// Settings of the pool.
#[derive(Debug, Clone)]
pub struct Options {
    /// Addresses of the slots; `None` takes the first /16 from 10.213.0.0 on that nothing else uses.
    pub range: Option<Range>,
    /// The link that leads out; `None` leads nowhere.
    pub uplink: Option<String>,
    /// How many slots are kept ready.
    pub ready: usize,
    /// Megabits per second of one slot, each way.
    pub bandwidth_mbit: Option<u32>,
    /// Connections out of one slot.
    pub max_connections: u32,
    /// Remembers the range from one start to the next, so that running machines keep their addresses.
    pub range_file: PathBuf,
}

#[derive(Debug, Default)]
struct State {
    /// Whose each number is: a slot that is given back twice must not take its successor with it.
    used: BTreeMap<u16, VmId>,
    ready: VecDeque<Arc<Slot>>,
    /// Numbers whose removal failed: not used again until it succeeds.
    quarantined: BTreeMap<u16, VmId>,
    host: Option<(Instant, Vec<Ipv4Addr>)>,
}

struct Inner {
    options: Options,
    range: Range,
    ledger: Ledger,
    state: Mutex<State>,
    wake: Notify,
    /// Held by one server in this network namespace; the kernel drops it with the process.
    _lock: UnixListener,
}

/// A cheap handle.
#[derive(Clone)]
pub struct Slots(Arc<Inner>);

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

fn lock_range(range: Range) -> io::Result<UnixListener> {
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(format!("kelvin-slots-{range}"))?)
}

/// Takes a range for this server.
async fn take_range(options: &Options) -> Result<(Range, UnixListener), Error> {
    let remembered =
        std::fs::read_to_string(&options.range_file).ok().and_then(|text| text.trim().parse().ok());
    if let Some(range) = options.range.or(remembered) {
        match lock_range(range) {
            Ok(lock) => return Ok((range, lock)),
            Err(_) if options.range.is_none() => {}
            Err(_) => {
                return Err(Error::Options(format!(
                    "another server on this host uses {range}; name another /16 with --slot-range"
                )));
            }
        }
    }
    let routes = link::routes().await.map_err(failed("reading the host's routes"))?;
    for second in RANGES {
        let text = format!("10.{second}.0.0/16");
        let Ok(range) = text.parse::<Range>() else { continue };
        if routes.iter().any(|(address, prefix, _)| range.overlaps(*address, *prefix)) {
            continue;
        }
        if let Ok(lock) = lock_range(range) {
            return Ok((range, lock));
        }
    }
    Err(Error::Unavailable("no free /16 below 10.213.0.0; name one with --slot-range".to_owned()))
}

impl Slots {
    /// Looks at the host, takes a range and makes the host's table of rules.
    ///
    /// # Errors
    /// `Unavailable` with what is missing, `Io`.
    pub async fn open(options: Options, ledger: Ledger) -> Result<Self, Error> {
        check().await?;
        if let Some(name) = &options.uplink {
            link::index(name).map_err(|_| {
                Error::Options(format!("there is no link {name:?} to be the uplink; see `ip link`"))
            })?;
            link::forward_from(name).map_err(failed("letting the uplink forward"))?;
        }
        let (range, lock) = take_range(&options).await?;
        crate::file::write_durably(&options.range_file, range.to_string().as_bytes())
            .map_err(failed("remembering the range"))?;
        let user = rustix::process::geteuid().as_raw();
        let rules = rules::host(range, options.uplink.as_deref(), user);
        ns::on_thread(move || nft::run(&rules)).await.map_err(failed("making the host's rules"))?;
        Ok(Self(Arc::new(Inner {
            options,
            range,
            ledger,
            state: Mutex::default(),
            wake: Notify::new(),
            _lock: lock,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The addresses of all slots.
    pub fn range(&self) -> Range {
        self.0.range
    }

    /// The link that leads out.
    pub fn uplink(&self) -> Option<&str> {
        self.0.options.uplink.as_deref()
    }

    /// Slots that wait.
    pub fn ready(&self) -> usize {
        self.state().ready.len()
    }

    /// Whether as many wait as should.
    pub fn is_full(&self) -> bool {
        self.ready() >= self.0.options.ready
    }

    /// Slots in use: ready, claimed or quarantined; and how many of them are quarantined.
    pub fn used(&self) -> (usize, usize) {
        let state = self.state();
        (state.used.len(), state.quarantined.len())
    }

    /// Waits until a slot was taken.
    pub async fn taken(&self) {
        self.0.wake.notified().await;
    }

    /// Takes a slot from the pool, or builds one when the pool is empty. Its policy is the default.
    ///
    /// # Errors
    /// `Full`, `Io`, `Ledger`.
    pub async fn claim(&self) -> Result<Arc<Slot>, Error> {
        let taken = self.state().ready.pop_front();
        self.0.wake.notify_one();
        match taken {
            Some(slot) => Ok(slot),
            None => self.build().await,
        }
    }

    /// Adds one slot to the pool.
    ///
    /// # Errors
    /// As [`Slots::claim`].
    pub async fn add(&self) -> Result<(), Error> {
        let slot = self.build().await?;
        self.state().ready.push_back(slot);
        Ok(())
    }

    fn take_number(&self, owner: &VmId) -> Result<u16, Error> {
        let mut state = self.state();
        let number = (0..SLOTS).find(|number| !state.used.contains_key(number)).ok_or(Error::Full)?;
        state.used.insert(number, owner.clone());
        Ok(number)
    }

    async fn host_addresses(&self) -> Result<Vec<Ipv4Addr>, Error> {
        if let Some((since, known)) = &self.state().host
            && since.elapsed() < ADDRESSES
        {
            return Ok(known.clone());
        }
        let range: ipnet::Ipv4Net = self.0.range.into();
        let own: Vec<Ipv4Addr> = link::addresses()
            .await
            .map_err(failed("reading the host's addresses"))?
            .into_iter()
            .filter(|address| !range.contains(address))
            .collect();
        self.state().host = Some((Instant::now(), own.clone()));
        Ok(own)
    }

    fn setting(&self, number: u16, host: Vec<Ipv4Addr>) -> Setting {
        Setting {
            range: self.0.range,
            number,
            host,
            has_uplink: self.0.options.uplink.is_some(),
            bandwidth_mbit: self.0.options.bandwidth_mbit,
            max_connections: self.0.options.max_connections,
        }
    }

    async fn build(&self) -> Result<Arc<Slot>, Error> {
        let setting = self.setting(0, self.host_addresses().await?);
        let owner = VmId::random();
        let number = self.take_number(&owner)?;
        let resource = Resource::Slot { number, range: self.0.range };
        if let Err(error) = self.0.ledger.declare(&owner, &[resource]).await {
            self.state().used.remove(&number);
            return Err(error.into());
        }
        let setting = Setting { number, ..setting };
        let building = setting.clone();
        let built = ns::on_thread(move || link::build(&building)).await;
        match built {
            Ok(link::Built { namespace, tap, sockets }) => Ok(Arc::new(Slot {
                number,
                owner,
                setting,
                namespace,
                tap: Mutex::new(Some(tap)),
                sockets: Mutex::new(Some(sockets)),
            })),
            Err(source) => {
                self.remove(number, &owner).await?;
                Err(Error::Io { what: "building a network slot", source })
            }
        }
    }

    /// Takes over the slot of a machine that a former daemon started.
    ///
    /// # Errors
    /// `Io` when the machine has no network namespace of its own.
    pub fn adopt(&self, number: u16, owner: VmId, process: ProcessKey) -> Result<Arc<Slot>, Error> {
        let namespace = ns::of_process(process.pid).map_err(failed("finding a machine's namespace"))?;
        // The host's addresses are in the slot's rules already.
        let setting = self.setting(number, Vec::new());
        self.state().used.insert(number, owner.clone());
        Ok(Arc::new(Slot {
            number,
            owner,
            setting,
            namespace,
            tap: Mutex::default(),
            sockets: Mutex::default(),
        }))
    }

    /// Removes a slot and frees its number. Its VMM and everything that speaks to it has ended before.
    ///
    /// # Errors
    /// `Io` when the kernel refuses: then the number stays in quarantine and [`Slots::retry`] tries again.
    pub async fn release(&self, slot: &Slot) -> Result<(), Error> {
        drop((slot.take_tap(), slot.take_sockets()));
        self.remove(slot.number, &slot.owner).await
    }

    /// Removes what may be left of slot `number` of `owner`. Gone already is fine, also when the number is another's
    /// by now.
    ///
    /// # Errors
    /// As [`Slots::release`].
    pub async fn remove(&self, number: u16, owner: &VmId) -> Result<(), Error> {
        if self.state().used.entry(number).or_insert_with(|| owner.clone()) != owner {
            return Ok(());
        }
        let address = self.0.range.address(number);
        let removed = async {
            link::remove(&self.0.range.link(number)).await.map_err(failed("removing a slot's link"))?;
            ns::on_thread(move || netfilter::forget(address.into()))
                .await
                .map_err(failed("forgetting a slot's connections"))?;
            self.0.ledger.strike_all(owner).await?;
            Ok(())
        };
        let result = removed.await;
        let mut state = self.state();
        match &result {
            Ok(()) => {
                state.used.remove(&number);
                state.quarantined.remove(&number);
            }
            Err(_) => {
                state.quarantined.insert(number, owner.clone());
            }
        }
        result
    }

    /// Tries to remove the slots in quarantine, each once.
    pub async fn retry(&self) {
        let tried = self.state().quarantined.clone();
        for (number, owner) in tried {
            if let Err(error) = self.remove(number, &owner).await {
                tracing::error!(
                    number,
                    error = kelvin_api::error::chain(&error),
                    "a network slot stays in quarantine"
                );
            }
        }
    }

    /// Removes the slots that wait; for the end of the daemon.
    ///
    /// # Errors
    /// The last that failed; the others are gone.
    pub async fn drain(&self) -> Result<(), Error> {
        let waiting: Vec<_> = self.state().ready.drain(..).collect();
        let mut result = Ok(());
        for slot in waiting {
            result = self.release(&slot).await.and(result);
        }
        result
    }

    /// Removes the host's table, when no slot is left.
    ///
    /// # Errors
    /// `Io` with what nftables said.
    pub async fn close(&self) -> Result<(), Error> {
        if self.state().used.is_empty() {
            let rules = rules::host_gone(self.0.range);
            ns::on_thread(move || nft::run(&rules)).await.map_err(failed("removing the host's rules"))?;
        }
        Ok(())
    }
}
