//! What the node has of a machine: calls, and connections to its guest.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use kelvin_host::process::Process;
use tokio::io::DuplexStream;

use super::guest;
use super::machine::Machine;
use super::script::Call;
use crate::control::{Control, Dial, Dialed};
use crate::stream::GuestStream;
use crate::{Error, GuestEnd, Handle, Saved};

/// Bytes that a connection takes which nobody reads, each way.
const CONNECTION: usize = 64 << 10;

/// Makes connections to a machine's guest.
#[derive(Debug)]
struct Dialer(Arc<Machine>);

#[async_trait]
impl Dial for Dialer {
    async fn dial(&self) -> Result<Dialed, Error> {
        self.0.step(Call::Control).await?;
        let (host, guest) = pair();
        tokio::spawn(guest::serve_control(Arc::clone(&self.0), guest));
        Ok(Dialed { stream: host, greets: false })
    }

    async fn connect(&self) -> Result<GuestStream, Error> {
        self.0.step(Call::Connect).await?;
        let (host, guest) = pair();
        tokio::spawn(guest::serve_http(Arc::clone(&self.0), guest));
        Ok(host)
    }
}

fn pair() -> (GuestStream, DuplexStream) {
    let (host, guest) = tokio::io::duplex(CONNECTION);
    (GuestStream::Memory(host), guest)
}

/// What a driver does to a machine.
pub(super) struct FakeHandle {
    machine: Arc<Machine>,
    process: Process,
}

impl FakeHandle {
    /// The one of `machine`.
    pub fn of(machine: Arc<Machine>) -> Box<Self> {
        Box::new(Self { process: Process::fake(Arc::clone(&machine.process)), machine })
    }
}

#[async_trait]
impl Handle for FakeHandle {
    fn process(&self) -> &Process {
        &self.process
    }

    async fn load(&self, state: &Path) -> Result<(), Error> {
        self.machine.step(Call::Load).await?;
        self.machine.load(state)
    }

    async fn resume(&self) -> Result<(), Error> {
        self.machine.step(Call::Resume).await?;
        self.machine.resume();
        Ok(())
    }

    async fn pause(&self) -> Result<(), Error> {
        self.machine.step(Call::Pause).await?;
        self.machine.state.send_modify(|state| state.running = false);
        Ok(())
    }

    async fn park(&self) -> Result<(), Error> {
        self.machine.step(Call::Park).await?;
        self.machine.state.send_modify(|state| state.running = false);
        Ok(())
    }

    async fn go_on(&self) -> Result<(), Error> {
        self.machine.step(Call::GoOn).await
    }

    async fn begin_save(&self, memory: &Path) -> Result<(), Error> {
        self.machine.step(Call::BeginSave).await?;
        std::fs::write(memory, "begun").map_err(|source| Error::Io { what: "beginning to save", source })
    }

    async fn save(&self, memory: &Path, state: &Path) -> Result<Saved, Error> {
        self.machine.step(Call::Save).await?;
        self.machine.save(memory, state)
    }

    async fn control(&self) -> Result<Control, Error> {
        Control::open(self.dialer()).await
    }

    fn dialer(&self) -> Arc<dyn Dial> {
        Arc::new(Dialer(Arc::clone(&self.machine)))
    }

    async fn console(&self) -> Result<String, Error> {
        self.machine.step(Call::Console).await?;
        Ok(format!("{} says nothing\n", self.machine.vm))
    }

    fn stderr(&self) -> String {
        String::new()
    }

    async fn guest_ended(&self) -> GuestEnd {
        let mut state = self.machine.state.subscribe();
        let ended = state.wait_for(|state| state.ended.is_some()).await.ok().and_then(|state| state.ended);
        match ended {
            Some(end) => end,
            None => std::future::pending().await,
        }
    }
}
