//! Who owns a data directory: one process at a time, a server or an import without one.
//!
//! ```text
//! run/lock          held by its owner; the kernel drops it with the process
//! run/server.json   pid and URL of a server, once it answers; a crash leaves it, and then its pid is not the owner's
//! ```
//!
//! Who writes in a data directory holds the lock first. Absent on purpose: what is done with it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::process::{Flock, FlockType, fcntl_getlk};
use serde::Deserialize;
use tokio::time::Instant;

use crate::output::Failed;

/// How long an owner that is no server that answers is waited for: it starts, stops or imports.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// A data directory that is this process's until it is dropped.
#[derive(Debug)]
pub struct DataDirLock {
    data_dir: PathBuf,
    _file: File,
}

/// Whose a data directory is.
#[derive(Debug)]
pub enum Owner {
    /// This process's.
    Us(DataDirLock),
    /// That of a server that answers at this URL.
    Server(String),
}

#[derive(Debug, Deserialize)]
struct Announcement {
    pid: u32,
    url: String,
}

fn announcement(data_dir: &Path) -> PathBuf {
    data_dir.join("run/server.json")
}

fn failed(data_dir: &Path) -> impl Fn(io::Error) -> Failed {
    move |error| {
        Failed::new(
            format!("{}: {error}", data_dir.display()),
            "name a directory that can be written with --data-dir",
        )
    }
}

/// The lock, or the process that has it.
fn try_take(data_dir: &Path) -> io::Result<Result<DataDirLock, Option<u32>>> {
    std::fs::create_dir_all(data_dir.join("run"))?;
    let file = File::options().create(true).truncate(false).write(true).open(data_dir.join("run/lock"))?;
    // A record lock: with `flock`, a child between `fork` and `exec` would hold it for a server that has just died. It
    // ends when any descriptor of the file is closed: who has it never comes here again.
    match rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Ok(DataDirLock { data_dir: data_dir.to_owned(), _file: file })),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS) => {
            let holder = fcntl_getlk(&file, &Flock::from(FlockType::WriteLock))?;
            let pid = holder.and_then(|holder| holder.pid);
            Ok(Err(pid.and_then(|pid| pid.as_raw_nonzero().get().try_into().ok())))
        }
        Err(error) => Err(error.into()),
    }
}

/// Takes the data directory for this process alone; none when it is another's.
///
/// # Errors
/// When it cannot be written.
pub fn take(data_dir: &Path) -> Result<Option<DataDirLock>, Failed> {
    try_take(data_dir).map(Result::ok).map_err(failed(data_dir))
}

/// Takes the data directory, or says which server has it. Others are waited for, for a while.
///
/// # Errors
/// When it cannot be written, or its owner does not say where it can be asked.
pub async fn take_or_ask(data_dir: &Path) -> Result<Owner, Failed> {
    take_or_ask_within(data_dir, PATIENCE).await
}

async fn take_or_ask_within(data_dir: &Path, patience: Duration) -> Result<Owner, Failed> {
    let until = Instant::now() + patience;
    loop {
        let holder = match try_take(data_dir).map_err(failed(data_dir))? {
            Ok(lock) => return Ok(Owner::Us(lock)),
            Err(holder) => holder,
        };
        let told = std::fs::read(announcement(data_dir)).ok();
        let told: Option<Announcement> = told.and_then(|text| serde_json::from_slice(&text).ok());
        if let Some(server) = told.filter(|server| Some(server.pid) == holder) {
            return Ok(Owner::Server(server.url));
        }
        if Instant::now() >= until {
            let who = holder.map_or_else(|| "a process".to_owned(), |pid| format!("process {pid}"));
            return Err(Failed::new(
                format!("{who} uses {} and does not say where it can be asked", data_dir.display()),
                "leave out --data-dir and name the server with --api-url, or try again when that process has ended",
            ));
        }
        tokio::time::sleep(LOOK).await;
    }
}

impl DataDirLock {
    /// Tells others where this server is, once it answers.
    ///
    /// # Errors
    /// As the file system gives them.
    pub fn announce(&self, address: &str) -> io::Result<()> {
        let path = announcement(&self.data_dir);
        let fresh = path.with_extension("new");
        let body = serde_json::json!({ "pid": std::process::id(), "url": format!("http://{address}") });
        std::fs::write(&fresh, body.to_string())?;
        std::fs::rename(fresh, path)
    }

    /// Lets go of it, as a server that told where it is.
    pub fn release(self) {
        let _ = std::fs::remove_file(announcement(&self.data_dir));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    use super::*;

    const HELD: &str = "KELVIN_TEST_HELD";

    /// Another process that has the lock of `data_dir`: a lock of this one would not be in its own way.
    fn holder(data_dir: &Path, announces: &str) -> Child {
        let mut holder = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "lock::tests::holds_what_another_test_asks_for", "--nocapture"])
            .env(HELD, data_dir)
            .env("KELVIN_TEST_ANNOUNCES", announces)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(holder.stdout.as_mut().unwrap()).lines();
        assert!(lines.map_while(Result::ok).any(|line| line.ends_with("held")));
        holder
    }

    #[test]
    fn holds_what_another_test_asks_for() {
        let Some(data_dir) = std::env::var_os(HELD) else { return };
        let lock = take(Path::new(&data_dir)).unwrap().unwrap();
        let address = std::env::var("KELVIN_TEST_ANNOUNCES").unwrap();
        if !address.is_empty() {
            lock.announce(&address).unwrap();
        }
        println!("held");
        // Until that test closes it, or ends.
        let _ = io::stdin().read_line(&mut String::new());
    }

    #[tokio::test]
    async fn a_data_directory_has_one_owner_and_a_server_is_asked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data");
        // What a server left that was killed: nobody listens there.
        std::fs::create_dir_all(path.join("run")).unwrap();
        std::fs::write(path.join("run/server.json"), r#"{"pid":1,"url":"http://127.0.0.1:9"}"#).unwrap();
        let mut silent = holder(&path, "");
        assert!(take(&path).unwrap().is_none());
        let refused = take_or_ask_within(&path, LOOK).await.unwrap_err();
        assert!(format!("{refused:?}").contains(&format!("process {} uses", silent.id())), "{refused:?}");
        silent.kill().unwrap();
        silent.wait().unwrap();
        let mut server = holder(&path, "127.0.0.1:7400");
        let Owner::Server(url) = take_or_ask_within(&path, LOOK).await.unwrap() else { panic!("it is free") };
        assert_eq!(url, "http://127.0.0.1:7400");
        server.kill().unwrap();
        server.wait().unwrap();
        assert!(matches!(take_or_ask_within(&path, LOOK).await.unwrap(), Owner::Us(_)));
    }

    #[tokio::test]
    async fn who_ends_meanwhile_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let mut importing = holder(directory.path(), "");
        let path = directory.path().to_owned();
        let taking = tokio::spawn(async move { take_or_ask_within(&path, Duration::from_secs(30)).await });
        tokio::time::sleep(LOOK * 2).await;
        assert!(!taking.is_finished());
        drop(importing.stdin.take());
        assert!(matches!(taking.await.unwrap().unwrap(), Owner::Us(_)));
        importing.wait().unwrap();
    }
}
