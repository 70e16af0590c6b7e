//! The templates of a node, as they were read last.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kelvin_api::id::TemplateName;
use kelvin_store::Store;
use kelvin_store::image::{Template, TemplateStamp};

use crate::error::Error;

/// With what the file system said of the file when it was read.
type Known = BTreeMap<TemplateName, (TemplateStamp, Arc<Template>)>;

/// The templates of a store.
pub struct Templates {
    store: Store,
    known: Mutex<Known>,
    importing: Arc<Mutex<BTreeSet<TemplateName>>>,
}

/// An import that is under way, until it is dropped.
pub struct Importing {
    all: Arc<Mutex<BTreeSet<TemplateName>>>,
    name: TemplateName,
}

impl Drop for Importing {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

impl Templates {
    /// None is known yet.
    pub fn new(store: Store) -> Self {
        Self { store, known: Mutex::default(), importing: Arc::default() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that are known.
    pub fn all(&self) -> Vec<Arc<Template>> {
        self.known().values().map(|(_, template)| Arc::clone(template)).collect()
    }

    /// The template called `name`, from memory; from the disk when its file is another than last time, as
    /// after an import (one `stat`).
    pub async fn get(&self, name: &TemplateName) -> Result<Arc<Template>, Error> {
        let stamp = self.store.template_stamp(name)?;
        if let Some((known, template)) = self.known().get(name)
            && *known == stamp
        {
            return Ok(Arc::clone(template));
        }
        let (store, wanted) = (self.store.clone(), name.clone());
        let template =
            kelvin_host::blocking::spawn(move || store.template(&wanted)).await.map_err(|error| {
                Error::Io { what: "reading a template", source: std::io::Error::other(error) }
            })??;
        let template = Arc::new(template);
        self.known().insert(name.clone(), (stamp, Arc::clone(&template)));
        Ok(template)
    }

    /// Begins an import of `name`: the only one.
    ///
    /// # Errors
    /// `Importing` when there is another.
    pub fn begin_import(&self, name: &TemplateName) -> Result<Importing, Error> {
        if !self.importing.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone()) {
            return Err(Error::Importing(name.to_string()));
        }
        Ok(Importing { all: Arc::clone(&self.importing), name: name.clone() })
    }

    /// Takes over a template that was written just now. One look at the file system; when that fails, it is read when it is asked
    /// for.
    pub fn know_one(&self, template: &Template) {
        if let Ok(stamp) = self.store.template_stamp(&template.name) {
            self.known().insert(template.name.clone(), (stamp, Arc::new(template.clone())));
        }
    }

    /// Forgets a template that was removed.
    pub fn forget(&self, name: &TemplateName) {
        self.known().remove(name);
    }

    /// Takes over templates that were all read anew.
    pub fn know(&self, templates: &[Template]) {
        let known = templates
            .iter()
            .filter_map(|template| {
                let stamp = self.store.template_stamp(&template.name).ok()?;
                Some((template.name.clone(), (stamp, Arc::new(template.clone()))))
            })
            .collect();
        *self.known() = known;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_import_of_a_name_is_under_way_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let templates = Templates::new(Store::open(directory.path(), true).unwrap());
        let (base, other) = ("base".parse().unwrap(), "other".parse().unwrap());
        let first = templates.begin_import(&base).unwrap();
        drop(templates.begin_import(&other).unwrap());
        assert!(matches!(templates.begin_import(&base), Err(Error::Importing(name)) if name == "base"));
        drop(first);
        drop(templates.begin_import(&base).unwrap());
    }
}
