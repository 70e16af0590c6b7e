//! The ways to one guest: its control port, and conversations with its agent. Nothing is written.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use kelvin_api::guest::CONTROL_VSOCK;

use super::conversation;
use super::dialer::Dialer;
use crate::Error;
use crate::control::{Dial, Dialed};
use crate::stream::GuestStream;

/// How long a guest may take to accept a connection: its agent may just be starting again.
const CONNECT: Duration = Duration::from_secs(10);

/// The ways to one guest, for whoever wants one.
#[derive(Debug)]
pub(super) struct Guest(pub(super) Arc<Dialer>);

#[async_trait]
impl Dial for Guest {
    async fn dial(&self) -> Result<Dialed, Error> {
        Ok(Dialed { stream: self.0.ask(CONTROL_VSOCK).await?.into(), greets: true })
    }

    async fn connect(&self) -> Result<GuestStream, Error> {
        let connect = async {
            loop {
                match conversation::begin(&self.0).await {
                    // Nobody listens: an agent that is started again does soon, and nothing tells when.
                    Err(_) if !self.0.process.is_over() => tokio::time::sleep(Duration::from_millis(5)).await,
                    begun => return begun,
                }
            }
        };
        match tokio::time::timeout(CONNECT, connect).await {
            Ok(result) => result.map(GuestStream::from),
            Err(_) => Err(Error::Deadline {
                what: "connecting to the guest",
                after: CONNECT,
                detail: "nobody listens in the guest".to_owned(),
            }),
        }
    }

    fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::Relaxed)
    }
}
