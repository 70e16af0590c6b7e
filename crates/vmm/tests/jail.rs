//! What a jail leaves when its program cannot be started. In a process of its own: every child of it is looked for.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;

use kelvin_host::jail::Jail;
use kelvin_host::process::{Network, Process, adopt_orphans};

/// It is reaped by whoever tried: nobody else was told its id, to wait for it.
#[tokio::test]
async fn a_jail_that_fails_leaves_no_zombie() {
    let launcher = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/release/kelvin");
    if !launcher.exists() {
        println!("skipped: kelvin is not built");
        return;
    }
    adopt_orphans().unwrap();
    let root = tempfile::tempdir().unwrap();
    let program = root.path().join("no-program");
    fs::write(&program, "not one").unwrap();
    let jail = Jail {
        root: root.path().to_owned(),
        read_only: false,
        program,
        args: Vec::new(),
        env: Vec::new(),
        user: None,
        groups: Vec::new(),
        binds: Vec::new(),
        tun: false,
        kvm: false,
        cgroup: None,
        max_file_bytes: 1 << 20,
        max_descriptors: 64,
        libraries: false,
    };
    let started = Process::spawn_jailed(&launcher, jail, "no-vm".to_owned(), Network::Shared, Vec::new());
    let error = started.await.expect_err("there is no such program").to_string();
    assert!(
        error.contains("Exec format") || error.contains("ermission denied"),
        "the program was tried: {error}"
    );
    let children = rustix::process::wait(rustix::process::WaitOptions::NOHANG);
    assert!(
        matches!(children, Err(rustix::io::Errno::CHILD)),
        "a child of the launcher is left: {children:?}"
    );
}
