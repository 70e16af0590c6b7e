//! The builds that wait or run, and how each is told to give up.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kelvin_api::error::ErrorCode;
use kelvin_api::id::{BuildId, TemplateName};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

/// What builds may take.
#[derive(Debug, Clone, Copy)]
pub struct BuildOptions {
    /// Builds that run at one time; at least one.
    pub max_builds: usize,
    /// The largest upload, in bytes.
    pub max_upload_bytes: u64,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self { max_builds: 2, max_upload_bytes: 4 << 30 }
    }
}

/// One build that waits or runs.
#[derive(Debug)]
pub(crate) struct Running {
    pub build: BuildId,
    pub template: TemplateName,
    /// Why it is to be given up.
    why: watch::Sender<Option<ErrorCode>>,
    /// Cancelled when it has ended and that is written down.
    pub over: CancellationToken,
}

impl Running {
    /// Has it given up; the first reason is the one that is told.
    pub fn give_up(&self, why: ErrorCode) {
        self.why.send_if_modified(|known| {
            let is_first = known.is_none();
            known.get_or_insert(why);
            is_first
        });
    }

    /// Why it is to be given up, when it is.
    pub fn why(&self) -> Option<ErrorCode> {
        *self.why.borrow()
    }

    /// Returns once it is to be given up.
    pub async fn given_up(&self) {
        // The sender is part of this.
        let _ = self.why.subscribe().wait_for(Option::is_some).await;
    }
}

/// All of them.
#[derive(Debug)]
pub(crate) struct UnderWay {
    /// Who has one runs.
    pub turns: Semaphore,
    /// Held while what is written down of builds and of templates' owners, and what is here, change together.
    pub changing: tokio::sync::Mutex<()>,
    all: Mutex<HashMap<BuildId, Arc<Running>>>,
    /// Names that imports make templates of, once for each import.
    imports: Arc<Mutex<Vec<TemplateName>>>,
}

/// An import that is under way: until it is dropped, no project builds a template of its name.
#[derive(Debug)]
pub(crate) struct Importing {
    imports: Arc<Mutex<Vec<TemplateName>>>,
    template: TemplateName,
}

impl Drop for Importing {
    fn drop(&mut self) {
        let mut imports = self.imports.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = imports.iter().position(|name| *name == self.template) {
            imports.swap_remove(at);
        }
    }
}

impl UnderWay {
    pub fn new(options: BuildOptions) -> Self {
        Self {
            turns: Semaphore::new(options.max_builds.clamp(1, Semaphore::MAX_PERMITS)),
            changing: tokio::sync::Mutex::default(),
            all: Mutex::default(),
            imports: Arc::default(),
        }
    }

    /// An import that begins; asked for while `changing` is held, by who has seen that no project has the name.
    pub fn import(&self, template: TemplateName) -> Importing {
        self.imports.lock().unwrap_or_else(PoisonError::into_inner).push(template.clone());
        Importing { imports: Arc::clone(&self.imports), template }
    }

    /// Whether an import makes a template of that name.
    pub fn is_imported(&self, template: &TemplateName) -> bool {
        self.imports.lock().unwrap_or_else(PoisonError::into_inner).contains(template)
    }

    fn all(&self) -> MutexGuard<'_, HashMap<BuildId, Arc<Running>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A build that begins to wait.
    pub fn begin(&self, build: BuildId, template: TemplateName) -> Arc<Running> {
        let running = Arc::new(Running {
            build: build.clone(),
            template,
            why: watch::Sender::new(None),
            over: CancellationToken::new(),
        });
        self.all().insert(build, Arc::clone(&running));
        running
    }

    /// One of them.
    pub fn find(&self, build: &BuildId) -> Option<Arc<Running>> {
        self.all().get(build).cloned()
    }

    /// Those of one template: the newest, and former ones that are about to end.
    pub fn of(&self, template: &TemplateName) -> Vec<Arc<Running>> {
        self.all().values().filter(|running| running.template == *template).cloned().collect()
    }

    /// It has ended.
    pub fn end(&self, running: &Running) {
        self.all().remove(&running.build);
        running.over.cancel();
    }
}
