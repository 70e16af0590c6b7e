//! The pools of a node, and what operators want of them.
//!
//! Who writes: `pools.json`, whole, by one rename. A crash leaves the old one or the new one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kelvin_api::id::TemplateName;
use kelvin_api::sandbox::SetPool;
use kelvin_store::Store;
use kelvin_store::identity::Identity;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::error::Error;
use crate::pool::policy::Rule;
use crate::pool::shelf::Pool;

/// What operators want of pools, below the data directory.
const RULES: &str = "pools.json";
/// Warm machines of one template.
const MAX_WARM: u32 = 1000;

/// What operators wanted when the last daemon ended.
///
/// # Errors
/// `Store` when it cannot be read: rules that were set are not forgotten silently.
pub fn read_rules(root: &Path) -> Result<BTreeMap<TemplateName, Rule>, Error> {
    match kelvin_store::read_json(&root.join(RULES)) {
        Ok(rules) => Ok(rules),
        Err(kelvin_store::Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(BTreeMap::new())
        }
        Err(error) => Err(error.into()),
    }
}

/// Every pool there is. Locks are held for a few instructions, never across a wait.
pub struct Pools {
    /// By identity digest.
    by_identity: Mutex<BTreeMap<String, Arc<Pool>>>,
    /// What operators want of warm machines, by template.
    rules: Mutex<BTreeMap<TemplateName, Rule>>,
    /// What holds where they want nothing else.
    usual: Rule,
    /// Held while rules are changed and written.
    writing: tokio::sync::Mutex<()>,
    /// Told when a target may have changed.
    wanted: Notify,
}

impl Pools {
    /// None yet.
    pub fn new(rules: BTreeMap<TemplateName, Rule>, usual: Rule) -> Self {
        Self {
            by_identity: Mutex::default(),
            rules: Mutex::new(rules),
            usual,
            writing: tokio::sync::Mutex::default(),
            wanted: Notify::new(),
        }
    }

    fn by_identity(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Pool>>> {
        self.by_identity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rules(&self) -> MutexGuard<'_, BTreeMap<TemplateName, Rule>> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Pool>> {
        self.by_identity().values().cloned().collect()
    }

    /// Adds `pool`; one of the same identity is replaced.
    pub fn insert(&self, digest: String, pool: Arc<Pool>) {
        self.by_identity().insert(digest, pool);
    }

    /// Forgets those that `keep` does not want.
    pub fn retain(&self, keep: impl Fn(&Pool) -> bool) {
        self.by_identity().retain(|_, pool| keep(pool));
    }

    /// The pool of exactly `identity`, or why there is none for this `template`.
    pub fn find(&self, identity: &Identity, template: &TemplateName) -> Result<Arc<Pool>, String> {
        let pools = self.by_identity();
        if let Some(pool) = pools.get(&identity.digest()) {
            return match pool.refusal() {
                None => Ok(Arc::clone(pool)),
                Some(reason) => Err(reason),
            };
        }
        // Say what the nearest one differs in.
        let nearest = pools
            .values()
            .filter(|pool| pool.snapshot.manifest.template == *template)
            .map(|pool| pool.snapshot.manifest.identity.differences(identity))
            .min_by_key(Vec::len);
        Err(match nearest {
            Some(fields) => format!("no snapshot for identity ({} differs)", fields.join(", ")),
            None => format!("no snapshot of template {template}"),
        })
    }

    /// What is wanted of the pools of a template.
    pub fn rule(&self, pool: &Pool) -> Rule {
        let rules = self.rules();
        rules.get(&pool.snapshot.manifest.template).copied().unwrap_or(self.usual)
    }

    /// Says that targets may have changed.
    pub fn look(&self) {
        self.wanted.notify_one();
    }

    /// Resolves when targets may have changed.
    pub fn looked_at(&self) -> Notified<'_> {
        self.wanted.notified()
    }

    /// See `Node::set_pool`.
    pub async fn set_rule(
        &self,
        store: &Store,
        template: TemplateName,
        wanted: SetPool,
    ) -> Result<(), Error> {
        if !store.has_template(&template)? {
            return Err(kelvin_store::Error::Missing { kind: "template", name: template.to_string() }.into());
        }
        // One after another: each writes the whole file.
        let _writing = self.writing.lock().await;
        let mut rules = self.rules().clone();
        let mut rule = rules.get(&template).copied().unwrap_or(self.usual);
        rule.min = wanted.min.unwrap_or(rule.min);
        rule.max = wanted.max.unwrap_or(rule.max.max(rule.min));
        rule.max_age_s = wanted.max_age_s.unwrap_or(rule.max_age_s);
        if rule.min > rule.max || rule.max > MAX_WARM || rule.max_age_s == 0 {
            return Err(Error::Rule { min: rule.min, max: rule.max, most: MAX_WARM });
        }
        rules.insert(template, rule);
        let (path, all) = (store.root().join(RULES), rules.clone());
        let written = kelvin_host::blocking::spawn(move || kelvin_store::write_json(&path, &all)).await;
        written.map_err(|error| Error::Io {
            what: "remembering what is wanted of a pool",
            source: std::io::Error::other(error),
        })??;
        *self.rules() = rules;
        self.look();
        Ok(())
    }
}
