//! The bare sequence in Firecracker, with this platform's machine.
//!
//! Spawn, `PUT /snapshot/load` that resumes too, connect, activate: no jail, no checks, no user of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kelvin_api::guest::CONTROL_VSOCK;
use kelvin_host::net::ns;
use serde_json::{Value, json};

use crate::restore::{Error, LIMIT, Network, activate, at, clone_disk, connect};

/// The binary that the server uses: its own copy.
fn binary(data_dir: &Path) -> Result<PathBuf, Error> {
    let names = std::fs::read_dir(data_dir.join("run")).map_err(at("looking for firecracker"))?;
    let mut found =
        names.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("firecracker-"));
    let none = || Error::Refused("the server has no firecracker".to_owned());
    found.next().map(|entry| entry.path()).ok_or_else(none)
}

/// One restore of `snapshot`, from nothing to the agent's reply; milliseconds. Nothing is left of it. `network`: the
/// machine's, if it has one.
///
/// # Errors
/// The step that failed.
pub fn restore(data_dir: &Path, snapshot: &Path, network: Option<&Network>) -> Result<f64, Error> {
    let binary = binary(data_dir)?;
    let directory = data_dir.join(format!("staging/bare-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(directory.join("run")).map_err(at("making a directory"))?;
    // A VMM starts in the namespace of the thread that starts it.
    let result = std::thread::scope(|scope| {
        let sequence = scope.spawn(|| {
            if let Some(network) = network {
                ns::enter(network.namespace.as_fd()).map_err(at("entering a namespace"))?;
            }
            let mut child = None;
            let result = sequence(&binary, snapshot, &directory, &mut child);
            if let Some(mut child) = child {
                let _ = child.kill();
                let _ = child.wait();
            }
            result
        });
        sequence.join().unwrap_or_else(|_| Err(Error::Refused("a restore panicked".to_owned())))
    });
    let _ = std::fs::remove_dir_all(&directory);
    result
}

fn sequence(
    binary: &Path,
    snapshot: &Path,
    directory: &Path,
    child: &mut Option<Child>,
) -> Result<f64, Error> {
    let started = Instant::now();
    clone_disk(snapshot, directory)?;
    let spawned = Command::new(binary)
        .args(["--id", "bare", "--api-sock", "run/api.sock", "--level", "Error"])
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(at("starting firecracker"))?;
    *child = Some(spawned);
    let mut api = connect(&directory.join("run/api.sock"))?;
    let load = json!({
        "snapshot_path": snapshot.join("state"),
        "mem_backend": { "backend_type": "File", "backend_path": snapshot.join("memory") },
        "resume_vm": true,
    });
    put(&mut api, "/snapshot/load", &load)?;
    let vsock = directory.join("run/vsock.sock");
    loop {
        let mut control = connect(&vsock)?;
        let greeted = greet(&mut control);
        match greeted.and_then(|()| activate(&mut control)) {
            Ok(()) => return Ok(started.elapsed().as_secs_f64() * 1e3),
            // As the prototype does: the guest may still be resetting what it had.
            Err(Error::Io { .. }) if started.elapsed() < LIMIT => {
                std::thread::sleep(Duration::from_millis(1))
            }
            Err(error) => return Err(error),
        }
    }
}

fn greet(stream: &mut UnixStream) -> Result<(), Error> {
    stream.write_all(format!("CONNECT {CONTROL_VSOCK}\n").as_bytes()).map_err(at("asking for the guest"))?;
    let mut byte = [0];
    while byte[0] != b'\n' {
        stream.read_exact(&mut byte).map_err(at("waiting for the guest"))?;
    }
    Ok(())
}

fn put(stream: &mut UnixStream, path: &str, body: &Value) -> Result<(), Error> {
    let body = body.to_string();
    let request = format!(
        "PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).map_err(at("writing to firecracker"))?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map_err(at("reading from firecracker"))?;
    match line.split_whitespace().nth(1) {
        Some("204") => Ok(()),
        _ => Err(Error::Refused(format!("{path}: firecracker said {:?}", line.trim()))),
    }
}
