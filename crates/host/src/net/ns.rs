//! Network namespaces without names: held by descriptors, entered by threads of their own.
//!
//! A namespace lives as long as a descriptor or a process holds it. Those that the daemon holds end with it;
//! those with a VMM inside live on. There is nothing to unmount and nothing that a crash could leave.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

/// The namespace of the calling thread.
///
/// # Errors
/// As `/proc` gives them.
pub fn current() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}

/// The namespace of a process, unless it is the caller's own.
///
/// # Errors
/// `NotFound` when the process is gone or has no namespace of its own.
pub fn of_process(pid: i32) -> io::Result<OwnedFd> {
    use std::os::unix::fs::MetadataExt;
    let path = format!("/proc/{pid}/ns/net");
    let file = File::open(Path::new(&path))?;
    if file.metadata()?.ino() == std::fs::metadata("/proc/thread-self/ns/net")?.ino() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the process has no network namespace of its own",
        ));
    }
    Ok(file.into())
}

/// Gives the calling thread a new namespace. The thread must end with its work: nobody else may run on it.
///
/// # Errors
/// As the kernel gives them.
#[allow(unsafe_code)]
pub fn unshare() -> io::Result<()> {
    // SAFETY: a network namespace is shared with nothing that Rust's types speak of; what is unsafe about
    // `unshare` is giving up shared descriptors or memory, which this flag does not.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    Ok(())
}

/// Moves the calling thread into `namespace`.
///
/// # Errors
/// As the kernel gives them.
pub fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
    Ok(())
}

/// Runs `work` on a thread of its own; what it does to its namespace ends with it.
///
/// # Errors
/// Those of `work`, and when no thread can be started.
pub async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("namespace".to_owned()).spawn(move || {
        let _ = sender.send(work());
    })?;
    receiver.await.unwrap_or_else(|_| Err(io::Error::other("a thread in a namespace panicked")))
}

/// Runs `work` in `namespace`, on a thread of its own.
///
/// # Errors
/// Those of `work`, and when the namespace cannot be entered.
pub async fn inside<T: Send + 'static>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let namespace = namespace.try_clone_to_owned()?;
    on_thread(move || {
        enter(namespace.as_fd())?;
        work()
    })
    .await
}
