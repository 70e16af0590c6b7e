//! The process: takes the daemon's commands, one connection at a time.

use std::collections::HashMap;
use std::io;
use std::net::{TcpListener as StdTcpListener, UdpSocket as StdUdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};

use kelvin_api::network::Policy;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, UdpSocket};

use crate::slot::{Shared, Slot};
use crate::wire::{Reply, Request, receive, send};
use crate::{Options, dns, proxy};

struct Server {
    options: Arc<Options>,
    slots: Mutex<HashMap<u16, Arc<Slot>>>,
    shared: Shared,
    runtime: tokio::runtime::Handle,
}

/// Serves the daemon on the listener that is this process's standard input, for ever.
///
/// # Errors
/// When the listener is of no use.
pub fn run(options: Options) -> io::Result<()> {
    // Three descriptors for each slot, two for each proxied connection.
    let most = getrlimit(Resource::Nofile).maximum;
    let _ = setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most });
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let server = Arc::new(Server {
        options: Arc::new(options),
        slots: Mutex::default(),
        shared: Shared::new(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)),
        runtime: runtime.handle().clone(),
    });
    loop {
        let (stream, _) = listener.accept()?;
        let server = Arc::clone(&server);
        // A daemon that was killed may still be connected when the next one comes.
        std::thread::spawn(move || {
            if let Err(error) = server.converse(&stream) {
                tracing::warn!(%error, "the daemon's connection ended");
            }
        });
    }
}

impl Server {
    fn converse(&self, stream: &UnixStream) -> io::Result<()> {
        while let Some((request, fds)) = receive::<Request>(stream)? {
            let reply = self.answer(request, fds).unwrap_or_else(|error| Reply::Failed(error.to_string()));
            send(stream, &reply, &[])?;
        }
        Ok(())
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, HashMap<u16, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, number: u16) -> io::Result<Arc<Slot>> {
        self.slots()
            .get(&number)
            .cloned()
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("slot {number} is not attached")))
    }

    fn answer(&self, request: Request, fds: Vec<OwnedFd>) -> io::Result<Reply> {
        match request {
            Request::Hello => {
                let slots = self.slots().keys().copied().collect();
                Ok(Reply::Hello { options: (*self.options).clone(), slots })
            }
            Request::Attach { slot, policy } => self.attach(slot, policy, fds),
            Request::Policy { slot, policy } => {
                self.slot(slot)?.set_policy(policy);
                Ok(Reply::Done)
            }
            Request::Detach { slot } => {
                let removed = self.slots().remove(&slot);
                if let Some(slot) = removed {
                    slot.gone.cancel();
                }
                Ok(Reply::Done)
            }
            Request::State { slot } => Ok(Reply::State(self.slot(slot)?.state())),
        }
    }

    fn attach(&self, number: u16, policy: Policy, fds: Vec<OwnedFd>) -> io::Result<Reply> {
        let [udp, tcp, listener]: [OwnedFd; 3] =
            fds.try_into().map_err(|_| io::Error::other("three descriptors are needed"))?;
        let udp = StdUdpSocket::from(udp);
        let (tcp, listener) = (StdTcpListener::from(tcp), StdTcpListener::from(listener));
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        listener.set_nonblocking(true)?;
        let _entered = self.runtime.enter();
        let (udp, tcp, listener) =
            (UdpSocket::from_std(udp)?, TcpListener::from_std(tcp)?, TcpListener::from_std(listener)?);
        let slot = Arc::new(Slot::new(number, policy, self.options.max_connections, self.shared.clone()));
        let options = || Arc::clone(&self.options);
        self.runtime.spawn(dns::serve_udp(Arc::clone(&slot), udp, options()));
        self.runtime.spawn(dns::serve_tcp(Arc::clone(&slot), tcp, options()));
        self.runtime.spawn(proxy::serve(Arc::clone(&slot), listener, options()));
        let former = self.slots().insert(number, slot);
        if let Some(former) = former {
            former.gone.cancel();
        }
        Ok(Reply::Done)
    }
}
