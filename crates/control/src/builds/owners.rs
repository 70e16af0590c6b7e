//! Whose templates are, in memory: every create asks, and none of them the database for it.
//!
//! Who writes: whoever has written it to the database just before. This process is the only one that writes there.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use kelvin_api::account::Project;

use crate::database::TemplateOwner;

/// The owners of templates. One without is everybody's.
#[derive(Debug, Default)]
pub(crate) struct Owners(RwLock<HashMap<String, TemplateOwner>>);

impl Owners {
    /// As the database has them.
    pub fn new(known: HashMap<String, TemplateOwner>) -> Self {
        Self(RwLock::new(known))
    }

    fn known(&self) -> RwLockReadGuard<'_, HashMap<String, TemplateOwner>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose a template is.
    pub fn of(&self, template: &str) -> Option<TemplateOwner> {
        self.known().get(template).cloned()
    }

    /// Whether a template is `project`'s own.
    pub fn is_own(&self, project: &Project, template: &str) -> bool {
        self.known().get(template).is_some_and(|owner| owner.project == project.as_str())
    }

    /// Whether `project` may see and start a template.
    pub fn may_use(&self, project: &Project, template: &str) -> bool {
        let known = self.known();
        known.get(template).is_none_or(|owner| owner.public || owner.project == project.as_str())
    }

    pub fn set(&self, template: &str, owner: TemplateOwner) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(template.to_owned(), owner);
    }

    pub fn forget(&self, template: &str) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(template);
    }
}
