//! The schema of `kelvin.db`: element n of the migrations leads from version n to n + 1.

pub(super) const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE sandboxes (
        id TEXT PRIMARY KEY,
        state TEXT NOT NULL CHECK (state IN ('creating', 'running')),
        template TEXT NOT NULL,
        metadata TEXT NOT NULL,
        access_token TEXT,
        allow_internet INTEGER,
        vcpus INTEGER NOT NULL DEFAULT 0,
        memory_mib INTEGER NOT NULL DEFAULT 0,
        disk_mib INTEGER NOT NULL DEFAULT 0,
        start_path TEXT NOT NULL DEFAULT 'cold',
        started_ms INTEGER NOT NULL,
        ends_ms INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX sandboxes_by_start ON sandboxes (started_ms, id);
    CREATE TABLE idempotency (
        key TEXT PRIMARY KEY,
        fingerprint TEXT NOT NULL,
        sandbox TEXT NOT NULL,
        reply TEXT,
        created_ms INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX idempotency_by_sandbox ON idempotency (sandbox);
    CREATE INDEX idempotency_by_age ON idempotency (created_ms);
",
    "
    ALTER TABLE sandboxes ADD COLUMN traffic_token TEXT;
",
    // A constraint cannot be changed in place.
    "
    CREATE TABLE sandboxes_3 (
        id TEXT PRIMARY KEY,
        state TEXT NOT NULL CHECK (state IN ('creating', 'running', 'paused')),
        template TEXT NOT NULL,
        metadata TEXT NOT NULL,
        access_token TEXT,
        allow_internet INTEGER,
        vcpus INTEGER NOT NULL DEFAULT 0,
        memory_mib INTEGER NOT NULL DEFAULT 0,
        disk_mib INTEGER NOT NULL DEFAULT 0,
        start_path TEXT NOT NULL DEFAULT 'cold',
        started_ms INTEGER NOT NULL,
        ends_ms INTEGER NOT NULL,
        traffic_token TEXT,
        rank INTEGER NOT NULL DEFAULT 0,
        on_timeout TEXT NOT NULL DEFAULT 'kill' CHECK (on_timeout IN ('kill', 'pause')),
        auto_resume INTEGER NOT NULL DEFAULT 0,
        parent TEXT
    ) WITHOUT ROWID;
    INSERT INTO sandboxes_3 (id, state, template, metadata, access_token, allow_internet, vcpus, memory_mib, disk_mib,
        start_path, started_ms, ends_ms, traffic_token)
        SELECT id, state, template, metadata, access_token, allow_internet, vcpus, memory_mib, disk_mib, start_path,
        started_ms, ends_ms, traffic_token FROM sandboxes;
    DROP TABLE sandboxes;
    ALTER TABLE sandboxes_3 RENAME TO sandboxes;
    CREATE INDEX sandboxes_by_start ON sandboxes (started_ms, id);
",
    "
    ALTER TABLE sandboxes ADD COLUMN pause_memory INTEGER NOT NULL DEFAULT 1;
",
    // What was there before there were projects is of the default one. A snapshot without a row is too.
    "
    ALTER TABLE sandboxes ADD COLUMN project TEXT NOT NULL DEFAULT 'default';
    ALTER TABLE sandboxes ADD COLUMN key TEXT NOT NULL DEFAULT '';
    CREATE INDEX sandboxes_by_project ON sandboxes (project, started_ms, id);
    CREATE INDEX sandboxes_by_key ON sandboxes (key, state);
    CREATE TABLE keys (
        id TEXT PRIMARY KEY,
        hash TEXT NOT NULL UNIQUE,
        project TEXT NOT NULL,
        name TEXT NOT NULL,
        mask TEXT NOT NULL,
        created_ms INTEGER NOT NULL,
        used_ms INTEGER,
        max_sandboxes INTEGER,
        requests_per_s INTEGER
    ) WITHOUT ROWID;
    CREATE TABLE audit (
        id INTEGER PRIMARY KEY,
        at_ms INTEGER NOT NULL,
        project TEXT NOT NULL,
        key TEXT NOT NULL,
        action TEXT NOT NULL,
        target TEXT NOT NULL,
        status INTEGER NOT NULL
    );
    CREATE TABLE snapshots (
        id TEXT PRIMARY KEY,
        project TEXT NOT NULL,
        name TEXT,
        created_ms INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX snapshots_by_name ON snapshots (project, name, created_ms);
    CREATE TABLE tags (
        project TEXT NOT NULL,
        template TEXT NOT NULL,
        tag TEXT NOT NULL,
        build TEXT NOT NULL,
        created_ms INTEGER NOT NULL,
        PRIMARY KEY (project, template, tag)
    ) WITHOUT ROWID;
    CREATE TABLE spawns (
        template TEXT PRIMARY KEY,
        count INTEGER NOT NULL,
        last_ms INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE metrics (
        sandbox TEXT NOT NULL,
        at_s INTEGER NOT NULL,
        cpu_count INTEGER NOT NULL,
        cpu_pct REAL NOT NULL,
        mem_used INTEGER NOT NULL,
        mem_total INTEGER NOT NULL,
        mem_cache INTEGER NOT NULL,
        disk_used INTEGER NOT NULL,
        disk_total INTEGER NOT NULL,
        PRIMARY KEY (sandbox, at_s)
    ) WITHOUT ROWID;
    CREATE TABLE project_metrics (
        project TEXT NOT NULL,
        at_s INTEGER NOT NULL,
        running INTEGER NOT NULL,
        started INTEGER NOT NULL,
        span_s INTEGER NOT NULL,
        PRIMARY KEY (project, at_s)
    ) WITHOUT ROWID;
",
    // Limits of keys and projects; idempotency of every change; whose a snapshot is before it is there.
    "
    ALTER TABLE sandboxes ADD COLUMN claims INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE sandboxes ADD COLUMN pausing INTEGER NOT NULL DEFAULT 0;
    DROP INDEX sandboxes_by_key;
    CREATE INDEX sandboxes_by_key ON sandboxes (key, state, claims, pausing);
    CREATE INDEX sandboxes_by_project_state ON sandboxes (project, state, claims, pausing);
    ALTER TABLE snapshots ADD COLUMN key TEXT NOT NULL DEFAULT '';
    ALTER TABLE snapshots ADD COLUMN mib INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE snapshots ADD COLUMN state TEXT NOT NULL DEFAULT 'kept';
    ALTER TABLE snapshots ADD COLUMN wanted TEXT;
    CREATE INDEX snapshots_by_key ON snapshots (key);
    ALTER TABLE keys ADD COLUMN max_creating INTEGER;
    ALTER TABLE keys ADD COLUMN max_paused INTEGER;
    ALTER TABLE keys ADD COLUMN max_snapshots INTEGER;
    ALTER TABLE keys ADD COLUMN max_disk_mib INTEGER;
    CREATE TABLE projects (
        name TEXT PRIMARY KEY,
        limits TEXT NOT NULL
    ) WITHOUT ROWID;
    ALTER TABLE idempotency ADD COLUMN subjects TEXT NOT NULL DEFAULT '[]';
    CREATE TABLE facts (
        name TEXT PRIMARY KEY
    ) WITHOUT ROWID;
",
    // Idempotency keys age on boot time, in milliseconds since the one boot in `boot`.
    "
    CREATE TABLE boot (
        id TEXT PRIMARY KEY
    ) WITHOUT ROWID;
    ALTER TABLE idempotency ADD COLUMN boot_ms INTEGER;
    DROP INDEX idempotency_by_age;
    CREATE INDEX idempotency_by_age ON idempotency (boot_ms);
",
    // What was there before there were nodes is on the one that there was.
    "
    ALTER TABLE sandboxes ADD COLUMN node TEXT NOT NULL DEFAULT 'local';
    ALTER TABLE sandboxes ADD COLUMN epoch INTEGER NOT NULL DEFAULT 1;
    ALTER TABLE snapshots ADD COLUMN node TEXT NOT NULL DEFAULT 'local';
",
    // Grows with each change of keys and limits: what is cached of them asks for it.
    "
    CREATE TABLE revisions (
        name TEXT PRIMARY KEY,
        number INTEGER NOT NULL
    ) WITHOUT ROWID;
    INSERT INTO revisions (name, number) VALUES ('accounts', 0);
",
    // Measurements that are too old are looked for every few seconds.
    "CREATE INDEX project_metrics_at ON project_metrics (at_s);",
    // Templates that were built are a project's; one without a row is everybody's.
    "
    CREATE TABLE templates (
        name TEXT PRIMARY KEY,
        project TEXT NOT NULL,
        public INTEGER NOT NULL DEFAULT 0,
        created_ms INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX templates_by_project ON templates (project);
    CREATE TABLE builds (
        id TEXT PRIMARY KEY,
        template TEXT NOT NULL,
        project TEXT NOT NULL,
        node TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('requested', 'waiting', 'building', 'ready', 'error')),
        wanted TEXT NOT NULL,
        created_ms INTEGER NOT NULL,
        updated_ms INTEGER NOT NULL,
        ended_ms INTEGER,
        image TEXT,
        error TEXT,
        disk_mib INTEGER
    ) WITHOUT ROWID;
    CREATE INDEX builds_by_template ON builds (template, created_ms, id);
    CREATE INDEX builds_by_project ON builds (project, state);
    CREATE TABLE build_lines (
        build TEXT NOT NULL,
        n INTEGER NOT NULL,
        at_ms INTEGER NOT NULL,
        level INTEGER NOT NULL,
        step INTEGER,
        message TEXT NOT NULL,
        PRIMARY KEY (build, n)
    ) WITHOUT ROWID;
",
    // What a project's builds said is bounded; a start looks for builds that were under way.
    "
    ALTER TABLE builds ADD COLUMN log_bytes INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX builds_under_way ON builds (node) WHERE state IN ('waiting', 'building');
",
    // What became of sandboxes. A number is never given twice: who reads goes on behind the last one that it has seen.
    "
    CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at_ms INTEGER NOT NULL,
        sandbox TEXT NOT NULL,
        project TEXT NOT NULL,
        template TEXT NOT NULL,
        what TEXT NOT NULL
    );
    CREATE INDEX events_by_sandbox ON events (sandbox, id);
    CREATE INDEX events_by_project ON events (project, id);
",
    // Each build is a version; one that no tag names any more stays for a while.
    "
    ALTER TABLE builds ADD COLUMN untagged_ms INTEGER;
",
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kelvin_host::clock::Clock;
    use rusqlite::Connection;

    use super::*;
    use crate::database::{Database, Filter};
    use crate::placement::Placement;

    /// The schema of before there were nodes, with something in it.
    fn before_nodes(path: &Path) {
        let connection = Connection::open(path).unwrap();
        for sql in &MIGRATIONS[..7] {
            connection.execute_batch(sql).unwrap();
        }
        connection.pragma_update(None, "user_version", 7).unwrap();
        connection
            .execute_batch(
                "INSERT INTO sandboxes (id, state, template, metadata, started_ms, ends_ms, project, key, rank) VALUES \
                 ('sbx0000000000000000r', 'running', 'base', '{\"a\":\"b\"}', 1000, 2000, 'blue', 'ci', 3), \
                 ('sbx0000000000000000c', 'creating', 'base', '{}', 1000, 2000, 'blue', 'ci', 0), \
                 ('sbx0000000000000000p', 'paused', 'base', '{}', 1000, 2000, 'blue', 'ci', 2); \
                 INSERT INTO snapshots (id, project, name, created_ms, state) VALUES \
                 ('s1', 'blue', 'ready', 1, 'kept'), ('s2', 'blue', NULL, 1, 'taking');",
            )
            .unwrap();
    }

    #[tokio::test]
    async fn what_was_there_before_there_were_nodes_is_on_the_one_that_there_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kelvin.db");
        before_nodes(&path);
        let here = Placement::local();
        // Twice: it is migrated once.
        for _ in 0..2 {
            let database = Database::open(&path, Clock::system().unwrap()).unwrap();
            assert_eq!(database.all(&here).await.unwrap().len(), 3);
            let rows = database.list(Filter { limit: 10, ..Filter::default() }).await.unwrap();
            assert_eq!(rows.len(), 2);
            assert!(rows.iter().all(|row| row.placement == here && row.project.as_str() == "blue"));
            assert!(rows.iter().any(|row| row.metadata.get("a").is_some_and(|value| value == "b")));
            assert_eq!(database.unfinished_snapshots(&here.node).await.unwrap(), ["s2"]);
            let owners = database.snapshot_owners().await.unwrap();
            assert_eq!(owners["s1"].name.as_deref(), Some("ready"));
        }
        let database = Database::open(&path, Clock::system().unwrap()).unwrap();
        let rows = database.list(Filter { limit: 10, ..Filter::default() }).await.unwrap();
        for row in rows {
            database.end(&here, &row.id, "killed").await.unwrap();
        }
        assert_eq!(database.all(&here).await.unwrap().len(), 1);
    }
}
