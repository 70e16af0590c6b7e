//! Pseudo-terminals. The kernel owns both ends; a crash of the agent hangs the terminal up.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use kelvin_api::envd::process::PTY;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::users::User;

/// The size of a terminal that nobody gave one.
const DEFAULT: Winsize = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };

/// The group of terminals in every distribution, and the mode that lets its members write messages to one.
/// Source: Linux, Documentation/filesystems/devpts.
const TTY: (u32, u32) = (5, 0o620);

/// A new terminal of `user`'s own: our end, that does not block, and the process's end.
///
/// # Errors
/// When the machine has no terminal left.
pub fn open(size: Winsize, user: &User) -> io::Result<(OwnedFd, OwnedFd)> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let theirs = ioctl_tiocgptpeer(&ours, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    std::os::unix::fs::fchown(&theirs, Some(user.uid), Some(TTY.0))?;
    rustix::fs::fchmod(&theirs, TTY.1.into())?;
    tcsetwinsize(&theirs, size)?;
    Ok((ours, theirs))
}

/// Changes the size of the terminal behind `fd`; its foreground processes are told (SIGWINCH).
///
/// # Errors
/// When it hung up.
pub fn resize(fd: impl AsFd, size: Winsize) -> io::Result<()> {
    Ok(tcsetwinsize(fd, size)?)
}

/// The size that a request asks for, in characters.
///
/// # Errors
/// A text for the caller.
pub fn size(pty: &PTY) -> Result<Winsize, String> {
    let Some(size) = pty.size.as_option() else {
        return Ok(DEFAULT);
    };
    let side = |name: &str, value: u32, default: u16| match u16::try_from(value) {
        Ok(0) => Ok(default),
        Ok(value) => Ok(value),
        Err(_) => Err(format!("pty.size.{name} is {value}, more than {}", u16::MAX)),
    };
    Ok(Winsize {
        ws_row: side("rows", size.rows, DEFAULT.ws_row)?,
        ws_col: side("cols", size.cols, DEFAULT.ws_col)?,
        ..DEFAULT
    })
}
