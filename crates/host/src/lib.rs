//! What Kelvin has of the host: processes, networks, the data directory's file system, the ledger, SQLite.
//!
//! Ownership: every host resource is declared in the [`ledger`] before it exists and released there
//! after it is gone; `kelvin-node` decides when. A crash leaves resources that the ledger names, and the
//! next start reaps or adopts exactly those. `unsafe` is allowed here, each with its reason.

pub mod accel;
pub mod blocking;
pub mod cgroup;
pub mod clock;
pub mod cpu;
pub mod datadir;
pub mod db;
pub mod descriptors;
pub mod file;
pub mod jail;
pub mod kvm;
pub mod ledger;
pub mod memory;
pub mod net;
pub mod process;
mod sqlite;
#[cfg(feature = "testing")]
pub mod testing;
