//! How every connection to SQLite is set.

use rusqlite::Connection;
use rusqlite::config::DbConfig;

/// A statement keeps the plan it was compiled with. Without this SQLite compiles one again each time that it is given
/// other values, to look whether they would be worth another plan.
pub fn keep_plans(connection: &Connection) -> Result<(), rusqlite::Error> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true).map(drop)
}
