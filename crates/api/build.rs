//! Generates the envd types, server traits and clients from `proto/`, with a compiler written in
//! Rust so that a build needs no `protoc`.

#[cfg(not(feature = "envd"))]
fn main() {}

#[cfg(feature = "envd")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use std::{env, fs, path::PathBuf};

    let root = PathBuf::from("../../proto");
    let files = [root.join("process.proto"), root.join("filesystem.proto")];
    for file in &files {
        println!("cargo:rerun-if-changed={}", file.display());
    }
    let set = protox::Compiler::new([&root])?
        .include_imports(true)
        .include_source_info(true)
        .open_files(&files)?
        .encode_file_descriptor_set();
    let path = PathBuf::from(env::var("OUT_DIR")?).join("envd.binpb");
    fs::write(&path, set)?;
    connectrpc_build::Config::new()
        .files(&["process.proto", "filesystem.proto"])
        .descriptor_set(&path)
        .include_file("_connectrpc.rs")
        .emit_rerun_directives(false)
        .compile()?;
    Ok(())
}
