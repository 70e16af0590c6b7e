//! An agent that is a hostile peer of HTTP/2: whatever it answers to a request, the request comes to an end.

#![no_main]

// The file alone: of the node nothing else is needed here, and all of it would be compiled once more.
#[allow(dead_code, reason = "the node uses all of it")]
#[path = "../../node/src/machine/agent.rs"]
mod agent;

use http::Request;
use http_body_util::{BodyExt, Empty, Limited};
use kelvin_fuzz::{block_on, peer_that_said};
use libfuzzer_sys::fuzz_target;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Settings, and that ours were read: what every agent begins with. Source: RFC 9113, 3.4.
const BEGIN: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 4, 1, 0, 0, 0, 0];

fuzz_target!(|bytes: &[u8]| {
    block_on(async {
        let (ours, _theirs) = peer_that_said(&[BEGIN, bytes]);
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let agent = agent::Agent::over(ours.into(), tasks.clone(), stop.clone());
        let nothing = Empty::new().map_err(|never| match never {}).boxed_unsync();
        let request = Request::get("http://agent/metrics").body(nothing).expect("a request");
        let gone = || std::future::ready(Err("there is one connection".into()));
        if let Ok(reply) = agent.send(request, gone).await {
            let _ = Limited::new(reply.into_body(), 16 << 10).collect().await;
        }
        stop.cancel();
        tasks.close();
        tasks.wait().await;
    });
});
