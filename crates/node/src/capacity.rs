//! What the node has, what is held, and who may have more: atomic, typed refusals. What is held is given back when its [`Hold`]
//! is dropped, and in no other way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kelvin_api::units::Shape;

use crate::error::Error;
use crate::options::{MIN_MEMORY, OVERHEAD, Options};

/// The books of one node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Books {
    memory_mib: u64,
    vcpus: u32,
    max_vcpus_each: u32,
    held_memory_mib: u64,
    held_vcpus: u32,
}

/// How much a machine holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Amount {
    memory_mib: u64,
    vcpus: u32,
}

impl Amount {
    /// A machine of `shape`, with its VMM.
    pub fn machine(shape: Shape) -> Self {
        Self { memory_mib: u64::from(shape.memory_mib.0) + u64::from(OVERHEAD.0), vcpus: shape.vcpus }
    }

    /// Its memory, in MiB.
    pub fn memory_mib(self) -> u64 {
        self.memory_mib
    }

    /// A VMM that waits.
    pub fn waiting() -> Self {
        Self { memory_mib: u64::from(OVERHEAD.0), vcpus: 0 }
    }
}

/// A cheap handle of a node's books. Their lock is held for a few instructions; nothing waits for it.
#[derive(Debug, Clone)]
pub struct Capacity(Arc<Mutex<Books>>);

/// What somebody holds of a node, for as long as it lives.
#[must_use = "what is dropped is given back"]
#[derive(Debug)]
pub struct Hold {
    capacity: Capacity,
    amount: Amount,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.capacity.books().release(self.amount);
    }
}

impl Capacity {
    /// Nothing is held.
    pub fn new(options: &Options) -> Self {
        Self(Arc::new(Mutex::new(Books::new(options))))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a machine of this shape could ever run here.
    ///
    /// # Errors
    /// `Shape` with the field and its range.
    pub fn check(&self, shape: Shape) -> Result<(), Error> {
        self.books().check(shape)
    }

    /// Holds `amount`.
    ///
    /// # Errors
    /// `Exhausted` with what is free; then nothing is held.
    pub fn hold(&self, amount: Amount) -> Result<Hold, Error> {
        self.books().hold(amount)?;
        Ok(Hold { capacity: self.clone(), amount })
    }

    /// Holds what an adopted machine has, even when the node was made smaller meanwhile.
    pub fn take(&self, amount: Amount) -> Hold {
        self.books().take(amount);
        Hold { capacity: self.clone(), amount }
    }

    /// `(memory in MiB, held memory, vCPUs, held vCPUs)`.
    pub fn figures(&self) -> (u64, u64, u32, u32) {
        self.books().figures()
    }
}

impl Books {
    fn new(options: &Options) -> Self {
        Self {
            memory_mib: u64::from(options.memory.0),
            vcpus: options.vcpus,
            max_vcpus_each: options.max_vcpus_each,
            held_memory_mib: 0,
            held_vcpus: 0,
        }
    }

    fn check(&self, shape: Shape) -> Result<(), Error> {
        let range = |field, asked: u64, min: u64, max: u64| {
            if (min..=max).contains(&asked) { Ok(()) } else { Err(Error::Shape { field, asked, min, max }) }
        };
        range("cpuCount", shape.vcpus.into(), 1, self.max_vcpus_each.into())?;
        let most = self.memory_mib.saturating_sub(OVERHEAD.0.into());
        range("memoryMB", shape.memory_mib.0.into(), MIN_MEMORY.0.into(), most)
    }

    fn hold(&mut self, amount: Amount) -> Result<(), Error> {
        let free_memory = self.memory_mib.saturating_sub(self.held_memory_mib);
        if amount.memory_mib > free_memory {
            return Err(Error::Exhausted {
                resource: "MiB of memory",
                asked: amount.memory_mib,
                free: free_memory,
            });
        }
        let free_vcpus = self.vcpus.saturating_sub(self.held_vcpus);
        if amount.vcpus > free_vcpus {
            return Err(Error::Exhausted {
                resource: "vCPUs",
                asked: amount.vcpus.into(),
                free: free_vcpus.into(),
            });
        }
        self.held_memory_mib += amount.memory_mib;
        self.held_vcpus += amount.vcpus;
        Ok(())
    }

    fn take(&mut self, amount: Amount) {
        self.held_memory_mib += amount.memory_mib;
        self.held_vcpus += amount.vcpus;
    }

    fn release(&mut self, amount: Amount) {
        self.held_memory_mib = self.held_memory_mib.saturating_sub(amount.memory_mib);
        self.held_vcpus = self.held_vcpus.saturating_sub(amount.vcpus);
    }

    fn figures(&self) -> (u64, u64, u32, u32) {
        (self.memory_mib, self.held_memory_mib, self.vcpus, self.held_vcpus)
    }
}

#[cfg(test)]
mod tests {
    use kelvin_api::units::{DiskMib, MemoryMib};
    use proptest::prelude::*;

    use super::*;

    fn small() -> Capacity {
        let options = Options {
            memory: MemoryMib(4096),
            vcpus: 8,
            max_vcpus_each: 4,
            ..Options::for_host("/x".into())
        };
        Capacity::new(&options)
    }

    fn shape(vcpus: u32, memory: u32) -> Shape {
        Shape { vcpus, memory_mib: MemoryMib(memory), disk_mib: DiskMib(1) }
    }

    #[test]
    fn shapes_outside_the_range_are_named() {
        let capacity = small();
        for (vcpus, memory, field) in
            [(0, 256, "cpuCount"), (5, 256, "cpuCount"), (1, 0, "memoryMB"), (1, u32::MAX, "memoryMB")]
        {
            let refused = capacity.check(shape(vcpus, memory));
            assert!(matches!(refused, Err(Error::Shape { field: named, .. }) if named == field));
        }
        assert!(capacity.check(shape(4, 4048)).is_ok());
    }

    proptest! {
        #[test]
        fn never_more_than_there_is_and_all_comes_back(steps in proptest::collection::vec((1_u32..4, 128_u32..2048, any::<bool>()), 0..60)) {
            let capacity = small();
            let mut held = Vec::new();
            for (vcpus, memory, give_back) in steps {
                let amount = Amount::machine(shape(vcpus, memory));
                let before = capacity.figures();
                match capacity.hold(amount) {
                    Ok(hold) => held.push(hold),
                    Err(_) => prop_assert_eq!(capacity.figures(), before),
                }
                if give_back {
                    drop(held.pop());
                }
                let (memory, held_memory, vcpus, held_vcpus) = capacity.figures();
                prop_assert!(held_memory <= memory && held_vcpus <= vcpus);
            }
            drop(held);
            prop_assert_eq!(capacity.figures(), small().figures());
        }
    }
}
