//! Ways in for the fuzz targets (`crates/fuzz`): conversations with a VMM whose end the caller has.

use http::Method;
use serde_json::json;
use tokio::net::UnixStream;

use crate::firecracker::api::Api;
use crate::firecracker::config::Call;
use crate::qemu::qmp::Qmp;

/// A conversation with QEMU: a command, and a wait for an event.
pub async fn qmp(stream: UnixStream) {
    if let Ok(mut qmp) = Qmp::open(stream).await {
        let _ = qmp.call("query-status", json!({})).await;
        let _ = qmp.event("MIGRATION", |data| data["status"].as_str().map(str::to_owned)).await;
    }
}

/// Two commands to Firecracker.
pub async fn firecracker(stream: UnixStream) {
    if let Ok(api) = Api::open(stream).await {
        for method in [Method::PATCH, Method::GET] {
            let _ = api.call(Call { name: "fuzz", method, path: "/vm", body: json!({}) }).await;
        }
    }
}

/// A line of what Firecracker counts.
pub fn firecracker_metrics(line: &[u8]) {
    let _ = crate::firecracker::metrics::failures(line);
}
