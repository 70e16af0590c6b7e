//! The data directory's file system: whether it can clone files, and how to make one that can.
//!
//! `kelvin setup` makes a sparse file with an XFS in it and mounts it on the data directory. Who writes:
//! `setup` alone. A crash between its steps leaves a file or a loop device that the next `setup` finds
//! by the file's name and goes on with.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Mode, OFlags};

/// Why setting up failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{what} {path}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A program failed.
    #[error("{program} failed: {output}")]
    Program {
        /// Which.
        program: &'static str,
        /// What it said, shortened.
        output: String,
    },
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

/// Whether files in `directory` can share their blocks (`FICLONE`): tried, not guessed.
///
/// # Errors
/// When the directory cannot be written.
pub fn can_reflink(directory: &Path) -> io::Result<bool> {
    let base = directory.join(format!(".reflink-{}", std::process::id()));
    let clone = base.with_extension("clone");
    let tried = (|| {
        std::fs::write(&base, vec![1; 8192])?;
        let from = std::fs::File::open(&base)?;
        let to = rustix::fs::open(
            &clone,
            OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::RUSR | Mode::WUSR,
        )?;
        Ok(rustix::fs::ioctl_ficlone(&to, &from).is_ok())
    })();
    let _ = std::fs::remove_file(&base);
    let _ = std::fs::remove_file(&clone);
    tried
}

/// Whether a file system is mounted on `directory` itself.
pub fn is_mount_point(directory: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Ok(own) = std::fs::metadata(directory) else {
        return false;
    };
    let parent = directory.canonicalize().ok().and_then(|path| path.parent().map(Path::to_owned));
    parent.and_then(|parent| std::fs::metadata(parent).ok()).is_some_and(|parent| parent.dev() != own.dev())
}

/// The file that holds the file system of `directory`: beside it, with `.xfs` after its name.
pub fn backing_file(directory: &Path) -> PathBuf {
    let mut name = directory.as_os_str().to_owned();
    name.push(".xfs");
    PathBuf::from(name)
}

fn program(name: &'static str, command: &mut Command) -> Result<String, Error> {
    let output =
        command.output().map_err(|source| Error::Io { what: "starting", path: name.into(), source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let mut text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    text.truncate(text.floor_char_boundary(500));
    Err(Error::Program { program: name, output: text })
}

/// Mounts an XFS with reflink on `directory`, from [`backing_file`], which is made with `bytes` (sparse)
/// when it is missing. Does nothing when something is mounted there already.
///
/// # Errors
/// `Program` with what `mkfs.xfs` or `mount` said; `Io` for the file and the directory.
pub fn mount_loop(directory: &Path, bytes: u64) -> Result<(), Error> {
    std::fs::create_dir_all(directory).map_err(io_error("making", directory))?;
    if is_mount_point(directory) {
        return Ok(());
    }
    let image = backing_file(directory);
    if !image.exists() {
        // Made under another name first: a file with the right name is a whole file system.
        let fresh = image.with_extension("xfs.new");
        let file = std::fs::File::create(&fresh).map_err(io_error("making", &fresh))?;
        file.set_len(bytes).map_err(io_error("sizing", &fresh))?;
        program("mkfs.xfs", Command::new("mkfs.xfs").args(["-q", "-f", "-m", "reflink=1"]).arg(&fresh))?;
        std::fs::rename(&fresh, &image).map_err(io_error("naming", &image))?;
    }
    program("mount", Command::new("mount").args(["-o", "loop,noatime"]).arg(&image).arg(directory))?;
    Ok(())
}

/// Unmounts what [`mount_loop`] mounted; the loop device goes with it. Not mounted is fine.
///
/// # Errors
/// `Program` with what `umount` said.
pub fn unmount_loop(directory: &Path) -> Result<(), Error> {
    if is_mount_point(directory) {
        program("umount", Command::new("umount").arg(directory))?;
    }
    Ok(())
}
