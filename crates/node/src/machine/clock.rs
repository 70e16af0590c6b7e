//! What a guest is told that wakes up, and its wall clock then.
//!
//! Nothing is written here; a crash leaves a guest whose clock is wrong by what its agent took to answer. Who adopts it
//! sets it again.

use std::time::Duration;

use kelvin_api::guest::{Request, Wake};
use kelvin_host::clock::Clock;
use kelvin_vmm::control::{Control, Done};

use crate::error::Error;

/// How wrong it may be: half of what is promised.
const WRONG: Duration = Duration::from_millis(500);
/// How often it is set for that: each takes as long as the guest takes to answer.
const TRIES: u32 = 3;

/// Sets the guest's clock until it is right: the time in a frame is old when a busy guest comes to read it. `done` is
/// the answer to that frame; it says what the clock showed then, which is earlier than now: the error is seen too large.
/// `limit`: for each answer.
///
/// # Errors
/// When the guest does not answer.
pub async fn sync_clock(
    clock: &Clock,
    control: &mut Control,
    done: Done,
    limit: Duration,
) -> Result<(), Error> {
    let mut shown = done.wall_clock_ns;
    // What a guest says may be a lie: then this ends all the same.
    for _ in 0..TRIES {
        if u128::from(wall_clock_ns(clock).abs_diff(shown)) < WRONG.as_nanos() {
            return Ok(());
        }
        shown = control
            .call("setting the clock", &Request::Wake(wake(clock, false)?), limit)
            .await?
            .wall_clock_ns;
    }
    tracing::warn!("a guest is too busy to say that its clock is right");
    Ok(())
}

/// From the kernel.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], Error> {
    let mut random = [0; N];
    getrandom::fill(&mut random).map_err(|error| Error::Io {
        what: "reading random bytes",
        source: std::io::Error::other(error.to_string()),
    })?;
    Ok(random)
}

/// As it is told to guests.
pub fn wall_clock_ns(clock: &Clock) -> u64 {
    u64::try_from(clock.wall().as_nanosecond()).unwrap_or(0)
}

/// What a machine that goes on as who it is is told. The clock is read last: the frame leaves at once.
pub fn wake(clock: &Clock, restored: bool) -> Result<Wake, Error> {
    let entropy = random_bytes()?;
    Ok(Wake { entropy, restored, wall_clock_ns: wall_clock_ns(clock) })
}
