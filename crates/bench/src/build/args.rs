//! The options of `kelvin bench build`.

use std::path::PathBuf;

/// What to measure.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The image that is pulled and built on: an OCI image layout on this machine, of a Debian with Python, pip, curl and useradd.
    #[arg(long, value_name = "LAYOUT")]
    pub base: PathBuf,
    /// Rounds of a cold build, one of which nothing has changed, and one whose last line has; 0 measures none.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub builds: u32,
    /// Rounds of ours and of skopeo and umoci; 0 measures none.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub pulls: u32,
    /// Clones of each of the two templates; 0 measures none.
    #[arg(short, long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub n: u32,
    /// The template that the built one is compared with, and whose vCPUs and memory it gets.
    #[arg(long, default_value = "base")]
    pub template: String,
    /// Where images are pulled to and packages are made; the file system decides [default: the system's temporary directory].
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
}
