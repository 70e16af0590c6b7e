//! Measurements in SQLite.

use async_trait::async_trait;
use kelvin_api::account::Project;
use kelvin_api::id::SandboxId;
use kelvin_api::sandbox::{ProjectMetric, SandboxMetric};

use super::{Sqlite, bad};
use crate::database::{Error, Usage};

/// Measurements of a project that are given at once: the newest.
const ROWS: i64 = 10_000;
/// How long what a project used is kept, in seconds: 30 days.
const PROJECT_LIFE_S: i64 = 30 * 24 * 60 * 60;

fn second(at: i64) -> Result<jiff::Timestamp, rusqlite::Error> {
    jiff::Timestamp::from_second(at).map_err(|error| bad(error.into()))
}

#[async_trait]
impl Usage for Sqlite {
    async fn add_metrics(
        &self,
        metrics: Vec<(SandboxId, SandboxMetric)>,
        started: Vec<(Project, u32)>,
        span_s: i64,
    ) -> Result<(), Error> {
        let now = self.clock.wall().as_second();
        self.db
            .call(move |connection| {
                let transaction = connection.transaction()?;
                for (id, metric) in &metrics {
                    transaction
                        .prepare_cached(
                            "INSERT OR REPLACE INTO metrics SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9 \
                             WHERE EXISTS (SELECT 1 FROM sandboxes WHERE id = ?1)",
                        )?
                        .execute((
                            id.as_str(),
                            metric.timestamp_unix,
                            metric.cpu_count,
                            metric.cpu_used_pct,
                            metric.mem_used,
                            metric.mem_total,
                            metric.mem_cache,
                            metric.disk_used,
                            metric.disk_total,
                        ))?;
                }
                if span_s > 0 {
                    transaction
                        .prepare_cached(
                            "INSERT OR REPLACE INTO project_metrics SELECT project, ?1, COUNT(*), 0, ?2 \
                             FROM sandboxes WHERE state = 'running' GROUP BY project",
                        )?
                        .execute((now, span_s))?;
                    for (project, count) in &started {
                        transaction
                            .prepare_cached(
                                "INSERT INTO project_metrics VALUES (?1, ?2, 0, ?3, ?4) \
                                 ON CONFLICT (project, at_s) DO UPDATE SET started = ?3",
                            )?
                            .execute((project.as_str(), now, count, span_s))?;
                    }
                    transaction
                        .prepare_cached("DELETE FROM project_metrics WHERE at_s < ?1")?
                        .execute([now - PROJECT_LIFE_S])?;
                }
                transaction.commit()
            })
            .await
    }

    async fn metrics(
        &self,
        id: &SandboxId,
        start: i64,
        end: i64,
        most: u32,
    ) -> Result<Vec<SandboxMetric>, Error> {
        let id = id.to_string();
        self.db
            .call(move |connection| {
                let mut found: Vec<SandboxMetric> = connection
                    .prepare_cached(
                        "SELECT at_s, cpu_count, cpu_pct, mem_used, mem_total, mem_cache, disk_used, disk_total \
                         FROM metrics WHERE sandbox = ?1 AND at_s BETWEEN ?2 AND ?3 ORDER BY at_s DESC LIMIT ?4",
                    )?
                    .query_map((id, start, end, most), |row| {
                        let at: i64 = row.get(0)?;
                        Ok(SandboxMetric {
                            timestamp: second(at)?,
                            timestamp_unix: at,
                            cpu_count: row.get(1)?,
                            cpu_used_pct: row.get(2)?,
                            mem_used: row.get(3)?,
                            mem_total: row.get(4)?,
                            mem_cache: row.get(5)?,
                            disk_used: row.get(6)?,
                            disk_total: row.get(7)?,
                        })
                    })?
                    .collect::<Result<_, _>>()?;
                found.reverse();
                Ok(found)
            })
            .await
    }

    async fn project_metrics(
        &self,
        project: &Project,
        start: i64,
        end: i64,
    ) -> Result<Vec<ProjectMetric>, Error> {
        let project = project.to_string();
        self.db
            .call(move |connection| {
                let mut found: Vec<ProjectMetric> = connection
                    .prepare_cached(
                        "SELECT at_s, running, started * 1.0 / span_s FROM project_metrics \
                         WHERE project = ?1 AND at_s BETWEEN ?2 AND ?3 ORDER BY at_s DESC LIMIT ?4",
                    )?
                    .query_map((project, start, end, ROWS), |row| {
                        let at: i64 = row.get(0)?;
                        Ok(ProjectMetric {
                            timestamp: second(at)?,
                            timestamp_unix: at,
                            concurrent_sandboxes: row.get(1)?,
                            sandbox_start_rate: row.get(2)?,
                        })
                    })?
                    .collect::<Result<_, _>>()?;
                found.reverse();
                Ok(found)
            })
            .await
    }
}
