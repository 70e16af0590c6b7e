//! The machine of a sandbox: it runs, or it stands still.
//!
//! ```text
//! Away ──taken over──> Running ──stop──> Stopped
//!                         ^──────go_on─────┘         each of the two that fails leaves it as it was
//! ```

use kelvin_api::guest::Request;
use kelvin_host::clock::Clock;
use kelvin_vmm::control::{Asked, Control};
use kelvin_vmm::{Paused, Running};

use crate::error::Error;
use crate::machine::clock::wake;

/// A machine, in the hands of the task that owns it.
pub enum LiveMachine {
    /// Its VMM is still being taken over, or it is on its way between the other two.
    Away,
    /// Its vCPUs run.
    Running(Running, Guest),
    /// Its vCPUs stand still.
    Stopped(Paused, Guest),
}

/// The conversation with its agent.
pub struct Guest {
    /// The control port: held open, because a guest without its host end has to poll.
    pub control: Control,
    /// A wake-up that was not answered yet.
    pub posted: Option<Asked>,
}

impl Guest {
    /// Nothing was said yet.
    pub fn new(control: Control) -> Self {
        Self { control, posted: None }
    }
}

impl LiveMachine {
    /// It, while its vCPUs run.
    pub fn running(&self) -> Option<&Running> {
        match self {
            Self::Running(running, _) => Some(running),
            Self::Away | Self::Stopped(..) => None,
        }
    }

    /// It, while they stand still.
    pub fn stopped(&self) -> Option<&Paused> {
        match self {
            Self::Stopped(paused, _) => Some(paused),
            Self::Away | Self::Running(..) => None,
        }
    }

    /// The conversation with its agent; none while its VMM is taken over.
    pub fn guest(&mut self) -> Option<&mut Guest> {
        match self {
            Self::Running(_, guest) | Self::Stopped(_, guest) => Some(guest),
            Self::Away => None,
        }
    }

    /// Stops its vCPUs; `None` when they do not run.
    ///
    /// Not cancel-safe: what is dropped on the way has no machine any more.
    pub async fn stop(&mut self) -> Option<Result<(), kelvin_vmm::Error>> {
        let (running, guest) = match std::mem::replace(self, Self::Away) {
            Self::Running(running, guest) => (running, guest),
            other => {
                *self = other;
                return None;
            }
        };
        match running.pause().await {
            Ok(paused) => {
                *self = Self::Stopped(paused, guest);
                Some(Ok(()))
            }
            Err((running, error)) => {
                *self = Self::Running(running, guest);
                Some(Err(error))
            }
        }
    }

    /// Lets vCPUs that stand still go on; its agent is told to wake up, and has not answered yet.
    ///
    /// Not cancel-safe, as [`LiveMachine::stop`].
    ///
    /// # Errors
    /// As the VMM gives them; then they stand still.
    pub async fn go_on(&mut self, clock: &Clock) -> Result<(), Error> {
        let (paused, mut guest) = match std::mem::replace(self, Self::Away) {
            Self::Stopped(paused, guest) => (paused, guest),
            other => {
                *self = other;
                return Ok(());
            }
        };
        // Posted while the vCPUs stand still: the guest wakes up once.
        guest.posted = match wake(clock, false) {
            Ok(wake) => guest.control.post(&Request::Wake(wake)).await.ok(),
            Err(_) => None,
        };
        match paused.resume().await {
            Ok(running) => {
                *self = Self::Running(running, guest);
                Ok(())
            }
            Err((paused, error)) => {
                *self = Self::Stopped(paused, guest);
                Err(error.into())
            }
        }
    }
}
