//! What a create starts from, resolved once: whoever has one has all that it names.

use std::sync::Arc;

use kelvin_api::id::SandboxId;
use kelvin_api::sandbox::PauseMode;
use kelvin_store::image::Template;
use kelvin_store::snapshot::Snapshot;

use crate::sandbox::paused::Paused;

/// What a machine is made of.
#[derive(Clone)]
pub enum StartSource {
    /// A template: a pool's snapshot, or its kernel.
    Template(Arc<Template>),
    /// What a sandbox was.
    Snapshot(FromSnapshot),
}

/// What a sandbox was, and what becomes of it.
#[derive(Clone)]
pub struct FromSnapshot {
    /// It.
    pub image: Arc<Snapshot>,
    /// Whether its memory goes on.
    pub way: Way,
    /// Whose machine it becomes.
    pub who: Who,
}

/// How a machine is made of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Its memory goes on.
    Restore,
    /// It has none, or its disk alone is wanted: it boots.
    Boot,
}

/// Who a machine of a snapshot is.
#[derive(Clone)]
pub enum Who {
    /// Another sandbox. With the one that it is forked from.
    Another(Option<SandboxId>),
    /// The sandbox that was paused in it: it goes on as who it is.
    Itself(Arc<Paused>),
}

impl StartSource {
    /// Another sandbox from `image`, forked from `parent`.
    pub fn another(image: Arc<Snapshot>, parent: Option<SandboxId>) -> Self {
        let way = if image.manifest.mode.is_full() { Way::Restore } else { Way::Boot };
        Self::Snapshot(FromSnapshot { image, way, who: Who::Another(parent) })
    }

    /// `paused` again, from the `image` that it is frozen in. With `Filesystem` it boots, whatever else was kept.
    pub fn resume(paused: Arc<Paused>, image: Arc<Snapshot>, mode: PauseMode) -> Self {
        let goes_on = image.manifest.mode.is_full() && mode != PauseMode::Filesystem;
        let way = if goes_on { Way::Restore } else { Way::Boot };
        Self::Snapshot(FromSnapshot { image, way, who: Who::Itself(paused) })
    }

    /// What it is of, when it is of no template.
    pub fn image(&self) -> Option<&Arc<Snapshot>> {
        match self {
            Self::Template(_) => None,
            Self::Snapshot(from) => Some(&from.image),
        }
    }

    /// The sandbox that goes on, when one does.
    pub fn resumed(&self) -> Option<&Arc<Paused>> {
        match self {
            Self::Snapshot(FromSnapshot { who: Who::Itself(paused), .. }) => Some(paused),
            Self::Template(_) | Self::Snapshot(_) => None,
        }
    }
}
