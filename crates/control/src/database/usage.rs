//! What sandboxes and projects used, over time.

use async_trait::async_trait;
use kelvin_api::account::Project;
use kelvin_api::id::SandboxId;
use kelvin_api::sandbox::{ProjectMetric, SandboxMetric};

use super::Error;

/// Measurements go with their sandbox; those of projects after 30 days.
#[async_trait]
pub trait Usage: Send + Sync {
    /// Writes down measurements of sandboxes that are there, and how many of each project run and were started within
    /// the last `span_s` seconds.
    async fn add_metrics(
        &self,
        metrics: Vec<(SandboxId, SandboxMetric)>,
        started: Vec<(Project, u32)>,
        span_s: i64,
    ) -> Result<(), Error>;
    /// Measurements of one sandbox from `start` to `end`, in seconds since 1970; the newest `most`, oldest first.
    async fn metrics(
        &self,
        id: &SandboxId,
        start: i64,
        end: i64,
        most: u32,
    ) -> Result<Vec<SandboxMetric>, Error>;
    /// What a project used from `start` to `end`, in seconds since 1970; oldest first.
    async fn project_metrics(
        &self,
        project: &Project,
        start: i64,
        end: i64,
    ) -> Result<Vec<ProjectMetric>, Error>;
}
