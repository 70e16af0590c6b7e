//! The first commands in a guest, so that what they touch is there for the next, and its rest after them.
//!
//! Nothing is written; a crash leaves nothing.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use kelvin_api::envd::process::{
    __buffa::oneof::process_event::Event, ProcessClient, ProcessConfig, StartRequest,
};
use kelvin_api::guest::Request;
use kelvin_api::id::Token;
use kelvin_vmm::MachineSpec;
use kelvin_vmm::control::Control;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::Error;
use crate::machine::agent::Agent;

const WARM_UP_LIMIT: Duration = Duration::from_secs(120);
const QUIESCE_LIMIT: Duration = Duration::from_secs(60);

/// Flushes the guest and waits until its agent's HTTP port is at rest.
pub async fn quiesce(control: &mut Control) -> Result<(), Error> {
    let deadline = tokio::time::Instant::now() + QUIESCE_LIMIT;
    while !control.call("quiesce", &Request::Quiesce, QUIESCE_LIMIT).await?.http_waiting {
        if tokio::time::Instant::now() > deadline {
            return Err(kelvin_vmm::Error::Deadline {
                what: "quiescing",
                after: QUIESCE_LIMIT,
                detail: "the agent's HTTP port did not come to rest".to_owned(),
            }
            .into());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// Sends generated clients' requests over a guest's connection.
#[derive(Clone)]
struct Transport(Arc<Agent>);

impl connectrpc::client::ClientTransport for Transport {
    type ResponseBody = hyper::body::Incoming;
    type Error = std::io::Error;

    fn send(
        &self,
        request: http::Request<connectrpc::client::ClientBody>,
    ) -> connectrpc::client::BoxFuture<'static, Result<http::Response<Self::ResponseBody>, Self::Error>> {
        let agent = Arc::clone(&self.0);
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let bytes = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
            let body = Full::<Bytes>::from(bytes).map_err(|never| match never {}).boxed_unsync();
            let gone = || std::future::ready(Err("the guest's connection broke".into()));
            agent.send(http::Request::from_parts(parts, body), gone).await.map_err(std::io::Error::other)
        })
    }
}

/// Runs `commands` in the guest, one after the other, and closes the connection.
pub async fn warm_up(
    http: kelvin_vmm::stream::GuestStream,
    spec: &MachineSpec,
    commands: &[&str],
    token: Option<&Token>,
) -> Result<(), Error> {
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let agent = Arc::new(Agent::over(http, tasks.clone(), stop.clone()));
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| Error::Agent {
        sandbox: spec.vm.to_string(),
        source,
    };
    let uri = http::Uri::from_static("http://agent");
    let mut config = connectrpc::client::ClientConfig::new(uri);
    if let Some(token) = token {
        config = config.with_default_header("x-access-token", token.expose());
    }
    let client = ProcessClient::new(Transport(agent), config);
    let work = async {
        for command in commands {
            let process = ProcessConfig {
                cmd: "/bin/bash".to_owned(),
                args: ["-l", "-c", *command].map(str::to_owned).to_vec(),
                ..Default::default()
            };
            let request = StartRequest { process: process.into(), stdin: Some(false), ..Default::default() };
            let mut stream = client.start(request).await?;
            while let Some(message) = stream.message().await? {
                if let Some(Event::End(end)) =
                    message.to_owned_message().event.into_option().and_then(|event| event.event)
                {
                    tracing::debug!(command, exit_code = end.exit_code, "warmed up");
                }
            }
        }
        Ok::<_, connectrpc::ConnectError>(())
    };
    let result = tokio::time::timeout(WARM_UP_LIMIT, work).await;
    stop.cancel();
    tasks.close();
    tasks.wait().await;
    match result {
        Ok(result) => result.map_err(|error| failed(error.into())),
        Err(elapsed) => Err(failed(elapsed.into())),
    }
}
