//! The templates of a node, as they were read last, and which version of each machines wait for.
//!
//! Tags are the control plane's: it says which version most creates will ask for. What it said is in memory alone; until it says
//! it again after a start, that is the newest one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kelvin_api::id::{TemplateName, TemplateVersion};
use kelvin_store::Store;
use kelvin_store::image::{Template, TemplateStamp};

use crate::error::Error;

/// With what the file system said of the file when it was read.
type Known = BTreeMap<TemplateVersion, (TemplateStamp, Arc<Template>)>;

/// The templates of a store.
pub struct Templates {
    store: Store,
    known: Mutex<Known>,
    importing: Arc<Mutex<BTreeSet<TemplateVersion>>>,
    preferred: Mutex<BTreeMap<TemplateName, TemplateVersion>>,
}

/// A version that is being written or removed, until this is dropped.
pub struct Importing {
    all: Arc<Mutex<BTreeSet<TemplateVersion>>>,
    version: TemplateVersion,
}

impl Drop for Importing {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.version);
    }
}

impl Templates {
    /// None is known yet.
    pub fn new(store: Store) -> Self {
        Self { store, known: Mutex::default(), importing: Arc::default(), preferred: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that are known.
    pub fn all(&self) -> Vec<Arc<Template>> {
        self.known().values().map(|(_, template)| Arc::clone(template)).collect()
    }

    /// Has machines wait for this version of its name.
    pub fn prefer(&self, version: &TemplateVersion) {
        let mut preferred = self.preferred.lock().unwrap_or_else(PoisonError::into_inner);
        preferred.insert(version.name.clone(), version.clone());
    }

    /// Of each name the version that machines wait for: the one that was chosen, while it is there, or the newest.
    pub fn waited_for(&self) -> Vec<Arc<Template>> {
        let preferred = self.preferred.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found: BTreeMap<TemplateName, Arc<Template>> = BTreeMap::new();
        let rank = |template: &Template| {
            let is_chosen = preferred.get(&template.name) == Some(&template.version());
            (is_chosen, template.built.as_ref().map(|built| built.at), template.build.clone())
        };
        for template in self.all() {
            let best = found.entry(template.name.clone()).or_insert_with(|| Arc::clone(&template));
            if rank(&template) > rank(best) {
                *best = template;
            }
        }
        found.into_values().collect()
    }

    /// A version of a template, from memory; from the disk when its file is another than last time, as
    /// after an import (one `stat`).
    pub async fn get(&self, version: &TemplateVersion) -> Result<Arc<Template>, Error> {
        let stamp = self.store.template_stamp(version)?;
        if let Some((known, template)) = self.known().get(version)
            && *known == stamp
        {
            return Ok(Arc::clone(template));
        }
        let (store, wanted) = (self.store.clone(), version.clone());
        let template =
            kelvin_host::blocking::spawn(move || store.template(&wanted)).await.map_err(|error| {
                Error::Io { what: "reading a template", source: std::io::Error::other(error) }
            })??;
        let template = Arc::new(template);
        let mut known = self.known();
        // It may have been removed meanwhile: whoever removes the file forgets it afterwards, under this lock.
        if self.store.template_stamp(version).is_ok_and(|now| now == stamp) {
            known.insert(version.clone(), (stamp, Arc::clone(&template)));
        }
        drop(known);
        Ok(template)
    }

    /// Begins to write or to remove a version: nobody else does.
    ///
    /// # Errors
    /// `Importing` when somebody does.
    pub fn begin_import(&self, version: &TemplateVersion) -> Result<Importing, Error> {
        if !self.importing.lock().unwrap_or_else(PoisonError::into_inner).insert(version.clone()) {
            return Err(Error::Importing(version.to_string()));
        }
        Ok(Importing { all: Arc::clone(&self.importing), version: version.clone() })
    }

    /// Takes over a template that was written just now. One look at the file system; when that fails, it is read when it is asked
    /// for.
    pub fn know_one(&self, template: &Template) {
        let version = template.version();
        if let Ok(stamp) = self.store.template_stamp(&version) {
            self.known().insert(version, (stamp, Arc::new(template.clone())));
        }
    }

    /// Forgets a version that was removed.
    pub fn forget(&self, version: &TemplateVersion) {
        self.known().remove(version);
    }

    /// Takes over templates that were all read anew.
    pub fn know(&self, templates: &[Template]) {
        let mut known = self.known();
        let mut fresh: Known = templates
            .iter()
            .filter_map(|template| {
                let version = template.version();
                let stamp = self.store.template_stamp(&version).ok()?;
                Some((version, (stamp, Arc::new(template.clone()))))
            })
            .collect();
        // What was published since they were listed stays known.
        for (version, entry) in std::mem::take(&mut *known) {
            if !fresh.contains_key(&version)
                && self.store.template_stamp(&version).is_ok_and(|now| now == entry.0)
            {
                fresh.insert(version, entry);
            }
        }
        *known = fresh;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_wait_for_the_version_that_was_chosen_or_the_newest() {
        use kelvin_api::id::BuildId;
        use kelvin_api::units::{DiskMib, MemoryMib, Shape};
        use kelvin_store::image::{BuiltFrom, Guest};

        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path(), true).unwrap();
        let (templates, name) = (Templates::new(store.clone()), "web".parse::<TemplateName>().unwrap());
        let guest = Guest { digest: "g".into(), kernel: "k".into(), initrd: "a".into() };
        let shape = Shape { vcpus: 1, memory_mib: MemoryMib(1), disk_mib: DiskMib(1) };
        let plain = Template::plain(name.clone(), "i".into(), guest, shape);
        let built = |second: i64| {
            let at = jiff::Timestamp::from_second(second).unwrap();
            let built = Some(BuiltFrom { at, ..BuiltFrom::default() });
            Template { build: Some(BuildId::random()), built, ..plain.clone() }
        };
        // Written in no order.
        let all = [built(2), built(3), plain.clone(), built(1)];
        for template in &all {
            let path = directory.path().join("templates").join(format!("{}.json", template.version()));
            kelvin_store::write_json(&path, template).unwrap();
        }
        templates.know(&store.templates().unwrap());
        let waited_for = || {
            let found: Vec<TemplateVersion> =
                templates.waited_for().iter().map(|one| one.version()).collect();
            <[TemplateVersion; 1]>::try_from(found).unwrap()
        };
        assert_eq!(waited_for(), [all[1].version()]);
        for chosen in [&all[3], &plain, &all[0]] {
            templates.prefer(&chosen.version());
            assert_eq!(waited_for(), [chosen.version()]);
        }
        // One that is removed is waited for no more.
        templates.forget(&all[0].version());
        assert_eq!(waited_for(), [all[1].version()]);
    }

    #[test]
    fn one_import_of_a_name_is_under_way_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let templates = Templates::new(Store::open(directory.path(), true).unwrap());
        let (base, other) = ("base".parse().unwrap(), "other".parse::<TemplateVersion>().unwrap());
        let first = templates.begin_import(&base).unwrap();
        drop(templates.begin_import(&other).unwrap());
        assert!(matches!(templates.begin_import(&base), Err(Error::Importing(name)) if name == "base"));
        drop(first);
        drop(templates.begin_import(&base).unwrap());
    }
}
