//! The templates of a node, as they were read last.

use std::collections::BTreeMap;
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
}

impl Templates {
    /// None is known yet.
    pub fn new(store: Store) -> Self {
        Self { store, known: Mutex::default() }
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
