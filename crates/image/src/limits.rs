//! How much an image may be, and how long a registry may take.

use std::time::Duration;

/// Limits of one image. All of them are refusals with a name, not truncations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a manifest or an index.
    pub manifest_bytes: u64,
    /// Bytes of an image's configuration.
    pub config_bytes: u64,
    /// Layers.
    pub layers: usize,
    /// Bytes of one layer, compressed.
    pub layer_bytes: u64,
    /// Bytes of all layers, decompressed.
    pub uncompressed_bytes: u64,
    /// Entries of all layers.
    pub entries: u64,
    /// Directories below each other.
    pub depth: usize,
    /// Bytes of a path.
    pub path_bytes: usize,
    /// Bytes of memory that names, attributes and directories may take, estimated; file contents are never held. Reached
    /// before `entries` when there are many directories: each takes a block until the file is written.
    pub memory_bytes: u64,
    /// How long a registry may say nothing.
    pub idle: Duration,
    /// How long an answer that is no blob may take as a whole: a manifest, a token, an error.
    pub document: Duration,
    /// Bytes of a blob that have to come in a second, on the average of `idle`.
    pub slowest: u64,
    /// How often something is asked of a registry at most.
    pub tries: u32,
    /// The wait before the second try; it doubles.
    pub backoff: Duration,
    /// The longest wait that a registry may ask for.
    pub retry_after: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            manifest_bytes: 4 << 20,
            config_bytes: 8 << 20,
            layers: 512,
            layer_bytes: 16 << 30,
            uncompressed_bytes: 32 << 30,
            entries: 1_000_000,
            depth: 128,
            path_bytes: 4096,
            memory_bytes: 208 << 20,
            idle: Duration::from_secs(30),
            document: Duration::from_secs(60),
            slowest: 16 << 10,
            tries: 5,
            backoff: Duration::from_millis(500),
            retry_after: Duration::from_secs(60),
        }
    }
}
