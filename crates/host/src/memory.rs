//! Memory of another process.
//!
//! Who writes: nobody changes what another process holds; its pages become its own. A crash leaves some that have and
//! some that have not, which is the same to it.

use std::io;

use libc::{c_ulong, iovec};

/// Addresses in one call. Source: Linux, `linux/uio.h`, `UIO_MAXIOV`.
const IOV_MAX: usize = 1024;

/// Gives `pid`, which stands still, pages of its own at `addresses`, one in each: a byte is read there and written back.
/// A private mapping of a file is copied there, page by page, as if the process had written it.
///
/// # Errors
/// `UnexpectedEof` or `EFAULT` where nothing is mapped, `EPERM` for a process that is not this one's to change, `ESRCH`
/// when it is gone. Pages before that are its own already.
pub fn own_pages(pid: i32, addresses: &[usize]) -> io::Result<()> {
    for some in addresses.chunks(IOV_MAX) {
        let mut held = vec![0; some.len()];
        transfer(pid, some, &mut held, Direction::From)?;
        transfer(pid, some, &mut held, Direction::To)?;
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Direction {
    From,
    To,
}

/// Moves one byte at each address of `pid`, 1024 at the most, between there and `held`. Source: process_vm_readv(2).
#[allow(unsafe_code)]
fn transfer(pid: i32, addresses: &[usize], held: &mut [u8], direction: Direction) -> io::Result<()> {
    let byte = |address: &usize| iovec { iov_base: std::ptr::without_provenance_mut(*address), iov_len: 1 };
    let far: Vec<iovec> = addresses.iter().map(byte).collect();
    let near = iovec { iov_base: held.as_mut_ptr().cast(), iov_len: held.len() };
    let count = far.len() as c_ulong;
    // SAFETY: `near` is all of `held`, which is borrowed for the call. The addresses of `far` are the other process's,
    // and the kernel checks them.
    let moved = unsafe {
        match direction {
            Direction::From => libc::process_vm_readv(pid, &near, 1, far.as_ptr(), count, 0),
            Direction::To => libc::process_vm_writev(pid, &near, 1, far.as_ptr(), count, 0),
        }
    };
    match usize::try_from(moved) {
        Ok(moved) if moved == held.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
