//! Generates messages, server traits and clients from `proto/node.proto`, with a compiler written in Rust so that a build
//! needs no `protoc`.

#[cfg(not(feature = "wire"))]
fn main() {}

#[cfg(feature = "wire")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use std::{env, fs, path::PathBuf};

    let root = PathBuf::from("../../proto");
    let file = root.join("node.proto");
    println!("cargo:rerun-if-changed={}", file.display());
    let set = protox::Compiler::new([&root])?
        .include_imports(true)
        .include_source_info(true)
        .open_files([&file])?
        .encode_file_descriptor_set();
    let path = PathBuf::from(env::var("OUT_DIR")?).join("node.binpb");
    fs::write(&path, set)?;
    connectrpc_build::Config::new()
        .files(&["node.proto"])
        .descriptor_set(&path)
        .include_file("_connectrpc.rs")
        .emit_rerun_directives(false)
        .compile()?;
    Ok(())
}
