//! The suite that every driver must pass, with a real guest.
//!
//! A driver's test makes a [`Bench`] and calls [`run`]; each step fails with what it expected. It uses
//! nothing but the public traits, so that a driver that passes can be used by `kelvin-node` unchanged.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kelvin_api::guest::{Activation, Request, Wake};
use kelvin_api::id::VmId;
use kelvin_api::units::Shape;
use kelvin_host::net::{Slot, Slots};
use kelvin_host::process::{Process, ProcessKey, find_by_marker};

use crate::control::Control;
use crate::{Driver, Error, MachineSpec, Running, made};

/// What the suite needs.
pub struct Bench<'a> {
    /// The driver under test.
    pub driver: &'a dyn Driver,
    /// A data directory, laid out as [`MachineSpec`] says.
    pub data_dir: &'a Path,
    /// The guest's directory, relative to the data directory.
    pub guest: PathBuf,
    /// A root file system to copy for each machine.
    pub rootfs: &'a Path,
    /// The shape of all machines.
    pub shape: Shape,
    /// The user of all VMMs.
    pub user: Option<u32>,
    /// Networks for the machines; `None` makes them without.
    pub slots: Option<&'a Slots>,
    /// Copies a disk, as cheaply as the file system can.
    pub clone_disk: fn(&Path, &Path) -> std::io::Result<()>,
}

/// How long a cold boot may take on a busy machine.
const BOOT: Duration = Duration::from_secs(120);
const ANSWER: Duration = Duration::from_secs(30);
/// How long a parked machine is listened to.
const PARKED: Duration = Duration::from_millis(500);

/// What went wrong, in words.
pub type Outcome = Result<(), Box<dyn std::error::Error>>;

/// A fresh activation for a machine called `name`.
pub fn activation(name: &str) -> Activation {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Activation {
        sandbox_id: name.to_owned(),
        template: "conformance".to_owned(),
        hostname: name.to_owned(),
        machine_id: *b"conformance-suit",
        boot_id: [3; 16],
        mac: [0; 6],
        entropy: [42; 64],
        wall_clock_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        access_token: String::new(),
        env_vars: std::collections::BTreeMap::new(),
    }
}

fn wake(restored: bool) -> Wake {
    let Activation { wall_clock_ns, entropy, .. } = activation("wake");
    Wake { wall_clock_ns, entropy, restored }
}

/// A machine that was baked: paths relative to the data directory.
#[derive(Debug, Clone)]
pub struct Baked {
    /// Its memory.
    pub memory: PathBuf,
    /// Its device state.
    pub state: PathBuf,
    /// Its disk, absolute.
    pub disk: PathBuf,
}

impl Bench<'_> {
    /// Makes the directory of a new machine, with a copy of `disk`, and takes a network for it.
    ///
    /// # Errors
    /// As the file system and the network give them.
    pub async fn spec(&self, disk: &Path) -> Result<MachineSpec, Box<dyn std::error::Error>> {
        let network = match self.slots {
            Some(slots) => Some(slots.claim().await?),
            None => None,
        };
        let spec = MachineSpec {
            vm: VmId::random(),
            data_dir: self.data_dir.to_owned(),
            user: self.user,
            shape: self.shape,
            guest: self.guest.clone(),
            network,
            cgroup: None,
        };
        let directory = spec.absolute();
        std::fs::create_dir_all(&directory)?;
        (self.clone_disk)(disk, &directory.join("disk"))?;
        std::os::unix::fs::chown(directory.join("disk"), self.user, self.user)?;
        Ok(spec)
    }

    /// Boots a machine, bakes it, and sees that it can go on afterwards; then it is killed.
    ///
    /// # Errors
    /// What was expected and did not happen.
    pub async fn bake(&self) -> Result<Baked, Box<dyn std::error::Error>> {
        let spec = self.spec(self.rootfs).await?;
        let running = self.driver.boot(&spec, made()).await?;
        let mut control = running.control().await?;
        control.call("ping", &Request::Ping, BOOT).await?;
        let quiet = wait_quiet(&mut control).await?;
        expect(quiet, "the agent waits on its HTTP port before a snapshot")?;
        let relative = spec.directory().join("baked");
        let baked = self.data_dir.join(&relative);
        std::fs::create_dir(&baked)?;
        let paused = running.pause().await.map_err(|(_, error)| error)?;
        paused.save(&baked.join("memory"), &baked.join("state")).await?;
        (self.clone_disk)(&spec.absolute().join("disk"), &baked.join("disk"))?;
        let running = paused.resume().await.map_err(|(_, error)| error)?;
        control.call("ping", &Request::Ping, ANSWER).await?;
        expect(!running.console().await?.contains("Kernel panic"), "no panic on the console")?;
        running.kill().await?;
        running.kill().await?;
        expect(running.is_over(), "a killed machine is over")?;
        for name in ["memory", "state"] {
            std::fs::set_permissions(baked.join(name), std::os::unix::fs::PermissionsExt::from_mode(0o444))?;
        }
        Ok(Baked { memory: relative.join("memory"), state: relative.join("state"), disk: baked.join("disk") })
    }

    async fn restore(&self, baked: &Baked) -> Result<(Running, Control), Box<dyn std::error::Error>> {
        let (running, control, _) = self.restore_connected(baked).await?;
        Ok((running, control))
    }

    /// Restores `baked` as another machine, which has not been activated.
    ///
    /// # Errors
    /// As the driver gives them.
    pub async fn restore_connected(
        &self,
        baked: &Baked,
    ) -> Result<(Running, Control, MachineSpec), Box<dyn std::error::Error>> {
        let spec = self.spec(&baked.disk).await?;
        let waiting = self.driver.prepare(&spec, &baked.memory).await?;
        let control = waiting.control().await?;
        let paused = waiting.load(&self.data_dir.join(&baked.state)).await.map_err(|(_, error)| error)?;
        let running = paused.resume().await.map_err(|(_, error)| error)?;
        Ok((running, control, spec))
    }
}

/// The guest's own kernel refuses a connection to a port where nobody listens: the way in and the way back
/// work. Without a network there is nothing to reach.
///
/// # Errors
/// When it is not.
pub async fn is_reachable(slot: Option<Arc<Slot>>) -> Outcome {
    let Some(slot) = slot else {
        return Ok(());
    };
    let tried = tokio::time::timeout(ANSWER, tokio::net::TcpStream::connect((slot.address(), 1))).await?;
    let refused = matches!(&tried, Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused);
    expect(refused, &format!("a guest answers over its network: {tried:?}"))
}

fn expect(condition: bool, what: &str) -> Outcome {
    if condition { Ok(()) } else { Err(what.to_owned().into()) }
}

/// Runs every step; the first that fails ends it. No VMM is left either way. The process must be one that has called
/// [`kelvin_host::process::adopt_orphans`], as a daemon has.
///
/// # Errors
/// What was expected and did not happen.
pub async fn run(bench: &Bench<'_>) -> Outcome {
    let outcome = steps(bench).await;
    end_all(bench).await?;
    outcome
}

/// Kills every VMM of the bench.
///
/// # Errors
/// When one cannot be killed.
pub async fn end_all(bench: &Bench<'_>) -> Outcome {
    for entry in std::fs::read_dir(bench.data_dir.join("sandboxes"))?.flatten() {
        for key in find_by_marker(&format!("kelvin-{}", entry.file_name().to_string_lossy()))? {
            if let Ok(process) = Process::adopt(key) {
                process.kill()?;
                process.ended().await;
            }
        }
    }
    Ok(())
}

async fn steps(bench: &Bench<'_>) -> Outcome {
    let baked = bench.bake().await?;

    // Clone twice at once; neither writes the memory file.
    let before = std::fs::read(bench.data_dir.join(&baked.memory))?;
    let (first, mut first_control, spec) = bench.restore_connected(&baked).await?;
    let slot = spec.network.clone();
    let (second, mut second_control) = bench.restore(&baked).await?;
    for control in [&mut first_control, &mut second_control] {
        let asked = activation("clone");
        let done = control.call("activate", &Request::Activate(asked.clone()), ANSWER).await?;
        expect(done.wall_clock_ns.abs_diff(asked.wall_clock_ns) < 1_000_000_000, "the clock is within 1 s")?;
    }
    is_reachable(slot.clone()).await?;
    // A machine can have a hardware address of its own.
    if let Some(slot) = &slot {
        let mac = Slot::random_mac()?;
        slot.set_guest_mac(mac).await?;
        let renamed = Activation { mac, ..activation("clone") };
        first_control.call("activate", &Request::Activate(renamed), ANSWER).await?;
    }
    is_reachable(slot).await?;

    // Parked: what it is asked waits until it runs on.
    let parked = second.park().await.map_err(|(_, error)| error)?;
    let asked = second_control.post(&Request::Ping).await?;
    let early = second_control.wait("ping", asked, PARKED).await;
    expect(
        matches!(early, Err(Error::Deadline { .. })),
        &format!("a parked machine does nothing: {early:?}"),
    )?;
    let second = parked.resume().await.map_err(|(_, error)| error)?;
    second_control.call("ping", &Request::Ping, ANSWER).await?;
    // One that is killed as it stands is gone.
    let (third, _) = bench.restore(&baked).await?;
    let third = third.park().await.map_err(|(_, error)| error)?;
    third.kill().await?;
    expect(third.is_over(), "a parked machine can be killed")?;

    // A snapshot of a running clone costs its written pages, and restores with what the clone knew.
    let saved_dir = first_dir(&first, bench)?;
    first_control.call("freeze", &Request::Freeze, ANSWER).await?;
    first.begin_save(&saved_dir.join("memory")).await?;
    let paused = first.pause().await.map_err(|(_, error)| error)?;
    let saved = paused.save(&saved_dir.join("memory"), &saved_dir.join("state")).await?;
    let all = bench.shape.memory_mib.bytes() / 4096;
    let dirty = saved.dirty_pages.ok_or("a clone shares its parent's memory")?;
    expect(dirty > 0 && dirty < all / 4, &format!("{dirty} of {all} pages were copied"))?;
    let first = paused.resume().await.map_err(|(_, error)| error)?;
    let wake = wake(false);
    let done = first_control.call("wake", &Request::Wake(wake.clone()), ANSWER).await?;
    expect(done.wall_clock_ns.abs_diff(wake.wall_clock_ns) < 1_000_000_000, "the clock is within 1 s")?;
    std::fs::set_permissions(saved_dir.join("memory"), std::os::unix::fs::PermissionsExt::from_mode(0o444))?;
    let saved_relative = saved_dir.strip_prefix(bench.data_dir)?.to_owned();
    let kept = Baked {
        memory: saved_relative.join("memory"),
        state: saved_relative.join("state"),
        disk: baked.disk.clone(),
    };
    let (third, mut third_control) = bench.restore(&kept).await?;
    let done = third_control.call("wake", &Request::Wake(self::wake(true)), ANSWER).await?;
    expect(done.http_waiting, "a restored machine's HTTP port waits")?;

    // A former daemon's machine is adopted; a process that is gone is not.
    drop(second_control);
    let key = second.key();
    let adopted_spec = find_spec(bench, &spec, key)?;
    drop(second);
    let adopted = bench.driver.adopt(&adopted_spec, key).await?;
    let mut control = adopted.control().await?;
    control.call("ping", &Request::Ping, ANSWER).await?;
    adopted.kill().await?;
    let gone = bench.driver.adopt(&adopted_spec, key).await;
    expect(matches!(gone, Err(Error::Io { .. })), "a dead VMM is not adopted")?;

    // Device state that is not one is refused, and the VMM can be ended.
    let spec = bench.spec(&baked.disk).await?;
    let waiting = bench.driver.prepare(&spec, &baked.memory).await?;
    let garbage = spec.absolute().join("garbage");
    std::fs::write(&garbage, vec![0x55; 4096])?;
    let (waiting, _error) = match waiting.load(&garbage).await {
        Err(refused) => refused,
        Ok(_) => return Err("garbage was loaded as device state".into()),
    };
    waiting.kill().await?;
    for machine in [first, third] {
        machine.kill().await?;
    }
    expect(
        std::fs::read(bench.data_dir.join(&baked.memory))? == before,
        "no clone has written the memory file",
    )
}

async fn wait_quiet(control: &mut Control) -> Result<bool, Error> {
    let deadline = tokio::time::Instant::now() + ANSWER;
    loop {
        if control.call("quiesce", &Request::Quiesce, ANSWER).await?.http_waiting {
            return Ok(true);
        }
        if tokio::time::Instant::now() > deadline {
            return Ok(false);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn machine_of(data_dir: &Path, pid: i32) -> Result<VmId, Box<dyn std::error::Error>> {
    for entry in std::fs::read_dir(data_dir.join("sandboxes"))?.flatten() {
        if let Some(vm) = entry.file_name().to_str().and_then(|name| name.parse::<VmId>().ok())
            && find_by_marker(&format!("kelvin-{vm}"))?.iter().any(|key| key.pid == pid)
        {
            return Ok(vm);
        }
    }
    Err(format!("no directory belongs to process {pid}").into())
}

fn first_dir(running: &Running, bench: &Bench<'_>) -> Result<PathBuf, Box<dyn std::error::Error>> {
    let vm = machine_of(bench.data_dir, running.key().pid)?;
    let directory = bench.data_dir.join("sandboxes").join(vm.as_str());
    let saved = directory.join("saved");
    std::fs::create_dir(&saved)?;
    Ok(saved)
}

fn find_spec(
    bench: &Bench<'_>,
    like: &MachineSpec,
    key: ProcessKey,
) -> Result<MachineSpec, Box<dyn std::error::Error>> {
    Ok(MachineSpec { vm: machine_of(bench.data_dir, key.pid)?, ..like.clone() })
}
