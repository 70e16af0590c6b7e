//! Where images come from: what a build needs of the crate that makes file systems of them, and no more.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::sandbox::EnvVars;
use kelvin_node_api::{RegistryCredentials, RegistryReach};

use crate::build::plan::{BuildState, ImageFacts};

/// Hears how far something is, a line at a time. It does not wait.
pub type Told = dyn Fn(&str) + Send + Sync;

/// Which image.
#[derive(Debug)]
pub enum ImageSource<'a> {
    /// One of a registry.
    Registry {
        /// As in `docker pull`.
        reference: &'a str,
        /// Who pulls.
        credentials: Option<&'a RegistryCredentials>,
        /// Where the registry may be.
        reach: RegistryReach,
    },
    /// An OCI image layout.
    Layout(&'a Path),
    /// What `docker save` has written.
    Archive(&'a Path),
    /// The one without a file and without a setting.
    Scratch,
}

/// What an image says of processes, and what nothing here acts on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// Variables, the last of a name counts.
    pub env: Vec<(String, String)>,
    /// Where its processes begin; empty when it does not say.
    pub workdir: String,
    /// Whose they are; empty when it does not say.
    pub user: String,
    /// The rest.
    pub facts: ImageFacts,
}

/// How large a disk is made of an image, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskSize {
    /// So large, or it is refused.
    Exactly(u64),
    /// Large enough for the image and for that much beside it, and no smaller than `least`.
    Room {
        /// The usual size.
        least: u64,
        /// What has to be free.
        free: u64,
    },
}

impl DiskSize {
    /// As part of a layer's key.
    pub fn key(self) -> String {
        match self {
            Self::Exactly(bytes) => format!("exactly {bytes}"),
            Self::Room { least, free } => format!("at least {least}, {free} free"),
        }
    }
}

/// An image that was found; nothing of it has to be here yet. Dropping what it does leaves nothing.
#[async_trait]
pub trait BaseImage: Send + Sync {
    /// Over everything that decides what the file system holds.
    fn key(&self) -> String;
    /// What it says.
    fn config(&self) -> ImageConfig;
    /// Writes its file system, ext4, to the file `target`, which does not exist; of that size.
    async fn make(&self, target: &Path, size: DiskSize, told: &Told) -> Result<(), Failure>;
}

/// Finds images.
#[async_trait]
pub trait BaseImages: Send + Sync + 'static {
    /// Finds one: what a tag means now.
    async fn resolve(&self, source: ImageSource<'_>, told: &Told) -> Result<Arc<dyn BaseImage>, Failure>;
}

/// Of a node that knows no images but its templates'.
#[derive(Debug)]
pub struct NoImages;

#[async_trait]
impl BaseImages for NoImages {
    async fn resolve(&self, _: ImageSource<'_>, _: &Told) -> Result<Arc<dyn BaseImage>, Failure> {
        Err(Failure::new(
            ErrorCode::BuildUnsupported,
            "this node makes no templates of images",
            "begin with a template that it has",
        ))
    }
}

/// What a build on an image begins with.
pub fn state_of(config: ImageConfig) -> BuildState {
    let ImageConfig { env, workdir, user, facts } = config;
    let env: EnvVars = env.into_iter().filter(|(name, _)| !name.is_empty() && !name.contains('=')).collect();
    // Every image that BuildKit has made says `/` when its file does not.
    let workdir = Some(workdir).filter(|workdir| workdir.starts_with('/') && workdir != "/");
    let user = Some(user).filter(|user| !user.is_empty());
    BuildState { env, workdir, user, image: facts }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_says_is_what_a_build_begins_with() {
        let config = |workdir: &str, user: &str| ImageConfig {
            env: vec![("A".into(), "1".into()), ("A".into(), "2".into()), (String::new(), "x".into())],
            workdir: workdir.to_owned(),
            user: user.to_owned(),
            facts: ImageFacts::default(),
        };
        let state = state_of(config("/app", "1000:1000"));
        assert_eq!(state.env, EnvVars::from([("A".to_owned(), "2".to_owned())]));
        assert_eq!((state.user(), state.cwd()), ("1000:1000", Some("/app")));
        for silent in ["", "/"] {
            let state = state_of(config(silent, ""));
            assert_eq!((state.user(), state.cwd()), ("user", Some("/home/user")));
        }
    }
}
