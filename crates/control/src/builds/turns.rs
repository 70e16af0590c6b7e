//! How many uploads of a project run at one time. In memory alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use kelvin_api::account::Project;
use tokio::sync::Semaphore;

/// Uploads of a project that run at one time: each takes as much of the disk as one may have, beside what is kept.
pub(super) const AT_ONCE: usize = 4;

/// Uploads that are under way, by project.
#[derive(Debug, Default)]
pub(crate) struct Uploading(Mutex<HashMap<Project, Arc<Semaphore>>>);

impl Uploading {
    /// What an upload of `project` has to have. One for each project that ever uploaded: keys make those, not requests.
    pub(super) fn turns(&self, project: &Project) -> Arc<Semaphore> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(all.entry(project.clone()).or_insert_with(|| Arc::new(Semaphore::new(AT_ONCE))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_uploads_of_a_project_run_at_one_time() {
        let (uploading, blue) = (Uploading::default(), "blue".parse().unwrap());
        let turns = uploading.turns(&blue);
        let _held: Vec<_> = (0..AT_ONCE).map(|_| turns.try_acquire().unwrap()).collect();
        assert!(uploading.turns(&blue).try_acquire().is_err());
        assert!(uploading.turns(&"green".parse().unwrap()).try_acquire().is_ok());
    }
}
