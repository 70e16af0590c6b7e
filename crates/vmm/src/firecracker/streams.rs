//! The host's ends of the connections to one guest, to tell all who have one that it is of no more use.
//!
//! Bounded: a guest, or a VMM that it has taken over, may end a connection and keep its own end open, again and again.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

/// The most that are known; a guest has one for its control port and a few for HTTP. Beyond it the oldest is closed.
const MOST: usize = 32;

/// Duplicates of them.
#[derive(Debug, Default)]
pub struct Streams(Mutex<VecDeque<OwnedFd>>);

impl Streams {
    /// Adds one; forgets those that are over.
    pub fn add(&self, stream: OwnedFd) {
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        streams.retain(|stream| !has_hung_up(stream));
        if streams.len() == MOST
            && let Some(oldest) = streams.pop_front()
        {
            close(&oldest);
        }
        streams.push_back(stream);
    }

    /// Closes all, whoever else has them.
    pub fn close(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).drain(..).for_each(|stream| close(&stream));
    }
}

fn close(stream: &OwnedFd) {
    let _ = rustix::net::shutdown(stream, rustix::net::Shutdown::Both);
}

fn has_hung_up(stream: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    fds[0].revents().intersects(PollFlags::HUP | PollFlags::RDHUP)
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_guest_that_keeps_its_ends_open_does_not_take_all_descriptors() {
        let streams = Streams::default();
        let mut theirs = Vec::new();
        for _ in 0..MOST * 3 {
            let (ours, guests) = UnixStream::pair().unwrap();
            streams.add(ours.into());
            theirs.push(guests);
        }
        let open = |guests: &mut UnixStream| {
            guests.set_nonblocking(true).unwrap();
            guests.read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
        };
        let still_open = theirs.iter_mut().filter_map(|guests| open(guests).then_some(())).count();
        assert_eq!(still_open, MOST);
        // Half of an end is enough to be over.
        for guests in &theirs {
            let _ = guests.shutdown(Shutdown::Write);
        }
        let (ours, mut last) = UnixStream::pair().unwrap();
        streams.add(ours.into());
        assert_eq!(streams.0.lock().unwrap().len(), 1);
        streams.close();
        assert!(!open(&mut last));
    }
}
