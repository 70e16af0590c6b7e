//! A whole server in a test: control plane, node and ledger over the fake driver, in virtual time, on one thread.
//!
//! ```text
//! seed ──> Case: a state, a request, a fault at one step of it, another request beside it
//!            └─ World: requests through the router, as clients send them; lives of a daemon, one after the other
//!                 └─ check: what must hold whenever nothing is under way
//! ```
//!
//! Everything is decided by the seed: time is virtual and moves only when nothing else can, databases and files are
//! used on the reactor's thread, ids follow from the seed. So a case repeats exactly. A fault is one of: the step
//! fails, is slow, the VMM ends, the guest falls silent or powers off, the client hangs up, the daemon is killed, the
//! daemon is stopped. A daemon that is killed loses everything in memory without running to any end; machines, files,
//! ledger and database stay, and the next life finds them.
//!
//! Nothing is written but a directory in memory, which goes with the run. Absent on purpose: networks, and what a real
//! VMM, kernel or disk does: those are tested on real machines, one of each transition.

pub mod case;
pub mod check;
pub mod client;
pub mod course;
pub mod faults;
pub mod known;
pub mod world;

/// Numbers that follow from a seed. Source: Steele et al., "Fast Splittable Pseudorandom Number Generators".
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The numbers of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.draw() % end
    }

    /// One of `choices`.
    pub fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        let at = self.below(choices.len() as u64);
        choices[usize::try_from(at).unwrap_or_default()]
    }
}
