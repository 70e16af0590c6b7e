//! Builds the shim that opens guest RAM read-only for VMMs that cannot be told to; see
//! `src/qemu/ro_ram.c`.

use std::{env, path::Path, process::Command};

fn main() {
    let source = "src/qemu/ro_ram.c";
    println!("cargo:rerun-if-changed={source}");
    let out = env::var("OUT_DIR").unwrap_or_else(|_| ".".to_owned());
    let status = Command::new(env::var("CC").unwrap_or_else(|_| "cc".to_owned()))
        .args(["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o"])
        .arg(Path::new(&out).join("ro_ram.so"))
        .arg(source)
        .status();
    assert!(matches!(status, Ok(status) if status.success()), "cc {source}: {status:?}");
}
