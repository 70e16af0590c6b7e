//! Ways in for the fuzz targets (`crates/fuzz`): what guests and resolvers send, to a slot that may reach every name and a host
//! that leads nowhere.

use std::sync::Arc;

use kelvin_api::network::Policy;
use tokio::io::AsyncWriteExt;

use crate::slot::{Shared, Slot};
use crate::{Options, dns, proxy};

fn slot(policy: Policy) -> Arc<Slot> {
    Arc::new(Slot::new(0, policy, 10, Shared::new(1024)))
}

fn nowhere() -> Options {
    Options { uplink: None, resolver: None, max_connections: 10, build: String::new() }
}

/// A guest's question, and the same bytes as a resolver's answer.
///
/// # Panics
/// When an answer is not one.
pub async fn dns(bytes: &[u8]) {
    let lists = (["*.example.com".to_owned()], ["0.0.0.0/0".to_owned()]);
    let named = Policy::parse(&lists.0, &lists.1, None).unwrap_or_default();
    for policy in [Policy::default(), named] {
        if let Some(mut answer) = dns::answer(&slot(policy), bytes, &nowhere()).await {
            assert_eq!(answer.first_chunk::<2>(), bytes.first_chunk(), "the answer is another question's");
            dns::truncate(&mut answer);
        }
    }
    dns::read_answer(bytes);
}

/// The beginning of a guest's TLS connection.
///
/// # Panics
/// When what is handed on is not what came.
pub async fn client_hello(bytes: &[u8]) {
    if let Ok((read, _name)) = proxy::read_hello(&mut &bytes[..]).await {
        assert_eq!(read, bytes[..read.len()], "the server gets what the guest has sent");
    }
}

/// A guest's connection in the clear.
pub async fn http(bytes: &[u8]) {
    let (ours, mut theirs) = tokio::io::duplex(64 << 10);
    if theirs.write_all(bytes).await.is_ok() && theirs.shutdown().await.is_ok() {
        let _ = proxy::plain(&slot(Policy::default()), ours, 80, &Arc::new(nowhere())).await;
    }
}
