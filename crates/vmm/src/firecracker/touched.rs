//! The pages that a restored guest writes first, learned from the first machine of each snapshot.
//!
//! A page of a snapshot that a guest reads and then writes costs three exits to the host: one that maps the file's page,
//! one that copies it, and one more because the copy made KVM forget the mapping. A third of all exits between a resume
//! and the agent's answer are these, and the pages are the same in every machine of a snapshot. They are copied before
//! the guest runs, all at once.
//!
//! In memory alone: a daemon that starts again learns again. What is learned are places, never contents.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::pages;

/// Pages of one snapshot at the most: 8 MiB for each machine.
const MOST: usize = 2048;
/// Snapshots at the most; a snapshot that is gone is forgotten when there are as many.
const SNAPSHOTS: usize = 1024;

/// By the path of the memory; empty while it is being learned.
type Known = BTreeMap<PathBuf, Arc<[u64]>>;

/// What is known of all snapshots. A cheap handle.
#[derive(Debug, Clone, Default)]
pub struct Touched(Arc<Mutex<Known>>);

impl Touched {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Places of the pages in the file `memory` that its machines write first; none before one has.
    pub fn of(&self, memory: &Path) -> Arc<[u64]> {
        self.known().get(memory).cloned().unwrap_or_default()
    }

    /// Looks, beside what is going on, at what the machine `pid` of `memory` has written until now, unless that is known.
    pub fn learn(&self, pid: i32, memory: &Path) {
        let mut known = self.known();
        if known.contains_key(memory) {
            return;
        }
        if known.len() >= SNAPSHOTS {
            known.retain(|memory, _| memory.exists());
        }
        if known.len() >= SNAPSHOTS {
            known.pop_first();
        }
        known.insert(memory.to_owned(), Arc::default());
        drop(known);
        let (touched, memory) = (self.clone(), memory.to_owned());
        tokio::task::spawn_blocking(move || match pages::list_own(pid, &memory, MOST) {
            Ok(found) => {
                tracing::debug!(memory = %memory.display(), pages = found.len(), "learned what is written first");
                touched.known().insert(memory, found.into());
            }
            // The machine has ended already; the next one tells.
            Err(_) => {
                touched.known().remove(&memory);
            }
        });
    }
}
