//! Traffic into sandboxes, and what they may reach themselves.
//!
//! Who comes to a paused sandbox is told that it sleeps, where its owner wants it to resume by traffic, once it has shown
//! what a running one would ask for: the gateway then has it woken up, and comes again.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use kelvin_api::id::{SandboxId, Token};
use kelvin_api::network::{NetworkState, Policy};
use kelvin_api::sandbox::GuestMetrics;
use kelvin_api::signature::Signature;
use kelvin_node_api::Route;

use crate::Node;
use crate::error::Error;
use crate::link::{Stream, Tunnel};
use crate::machine::agent::{Body, SendError};
use crate::sandbox::handle::{Command, Sandbox};

/// How long it may take to say what it uses: less than its caller waits.
const METRICS: Duration = Duration::from_secs(4);
/// What a guest may say of itself, in bytes.
const MAX_METRICS: usize = 16 << 10;

/// How long an agent may take to connect to a port of its guest: a little longer than it waits itself.
const TUNNEL: Duration = Duration::from_secs(12);

/// Has the agent of a sandbox connect to a port.
///
/// # Errors
/// `PortClosed` when nobody listens, or the agent is of a build that cannot; `PortSilent`, `Agent`.
async fn tunnel(id: &SandboxId, sandbox: &Sandbox, port: u16) -> Result<Tunnel, Error> {
    let failed = |source: SendError| Error::Agent { sandbox: id.to_string(), source };
    let mut request = Request::builder().method(Method::CONNECT).uri(format!("localhost:{port}"));
    if let Some(token) = &sandbox.access_token {
        request = request.header("x-access-token", token.expose());
    }
    let empty = http_body_util::Empty::new().map_err(|never| match never {}).boxed_unsync();
    let request = request.body(empty).map_err(|error| failed(error.into()))?;
    let opening = async {
        let response = sandbox.request(request).await.map_err(failed)?;
        match response.status() {
            StatusCode::OK => {
                hyper::upgrade::on(response).await.map(TokioIo::new).map_err(|error| failed(error.into()))
            }
            StatusCode::GATEWAY_TIMEOUT => {
                Err(Error::PortSilent { sandbox: id.to_string(), port, after: TUNNEL })
            }
            status => {
                let source = std::io::Error::other(format!("the agent says {status}"));
                Err(Error::PortClosed { sandbox: id.to_string(), port, source })
            }
        }
    };
    let silent = |_| Err(Error::PortSilent { sandbox: id.to_string(), port, after: TUNNEL });
    tokio::time::timeout(TUNNEL, opening).await.unwrap_or_else(silent)
}

impl Node {
    /// The sandbox that a request with this head is for, when it runs.
    ///
    /// # Errors
    /// `Unknown`; `Paused` when it is and would refuse the request, or does not resume by traffic; else `Asleep`.
    pub(crate) fn admit(
        &self,
        id: &SandboxId,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Result<Arc<Sandbox>, Error> {
        if let Some(paused) = self.inner.paused(id)
            && let Some(token) = &paused.record.access_token
        {
            // Its agent would refuse: a stranger must not wake it up to hear that.
            let shown = headers.get("x-access-token").and_then(|value| value.to_str().ok());
            let admitted = match shown {
                Some(shown) => token.matches(shown),
                None => Signature::of(method, uri)
                    .is_some_and(|signature| signature.signed().check(token.expose()).is_ok()),
            };
            if !admitted {
                return Err(Error::Paused(id.to_string()));
            }
        }
        self.ensure_running(id)
    }

    /// Sends an HTTP request to the agent of `sandbox`, which is called `id`.
    ///
    /// # Errors
    /// `Agent` when its guest does not answer.
    pub(crate) async fn send_to(
        &self,
        id: &SandboxId,
        sandbox: &Sandbox,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, Error> {
        let sent = sandbox.request(request).await;
        if sent.is_err() {
            sandbox.is_silent();
        }
        sent.map_err(|source| Error::Agent { sandbox: id.to_string(), source })
    }

    /// Whose token signed a URL that does not name its sandbox. Looks through all of them: a signature is the only
    /// thing that such a URL carries.
    pub fn signer(&self, signature: &Signature) -> Option<SandboxId> {
        let signed = signature.signed();
        let is_of = |token: Option<&Token>| token.is_some_and(|token| signed.is_of(token.expose()));
        let running: Vec<_> = {
            let sandboxes = self.inner.sandboxes.running();
            sandboxes.iter().map(|(id, sandbox)| (id.clone(), Arc::clone(sandbox))).collect()
        };
        let found = running.into_iter().find(|(_, sandbox)| is_of(sandbox.access_token.as_ref()));
        found.map(|(id, _)| id).or_else(|| {
            let paused: Vec<_> = self.inner.sandboxes.paused().values().cloned().collect();
            let found = paused.into_iter().find(|paused| is_of(paused.record.access_token.as_ref()));
            found.map(|paused| paused.record.sandbox.clone())
        })
    }

    /// Whose access token `token` is. Looks through all of them: such a request carries nothing else.
    pub fn holder(&self, token: &str) -> Option<SandboxId> {
        let is_it = |own: Option<&Token>| own.is_some_and(|own| own.matches(token));
        let running = {
            let sandboxes = self.inner.sandboxes.running();
            let found = sandboxes.iter().find(|(_, sandbox)| is_it(sandbox.access_token.as_ref()));
            found.map(|(id, _)| id.clone())
        };
        running.or_else(|| {
            let paused = self.inner.sandboxes.paused();
            let found = paused.values().find(|paused| is_it(paused.record.access_token.as_ref()));
            found.map(|paused| paused.record.sandbox.clone())
        })
    }

    /// What the guest of a running sandbox says that it uses. One that is paused is not woken up for it.
    ///
    /// # Errors
    /// `Unknown`, `Paused`, `Agent` when it does not answer, or not with that.
    pub async fn guest_metrics(&self, id: &SandboxId) -> Result<GuestMetrics, Error> {
        let sandbox = self.find(id)?;
        let failed = |source: SendError| Error::Agent { sandbox: id.to_string(), source };
        let mut request = Request::get("http://agent/metrics");
        if let Some(token) = &sandbox.access_token {
            request = request.header("x-access-token", token.expose());
        }
        let empty = http_body_util::Empty::new().map_err(|never| match never {}).boxed_unsync();
        let request = request.body(empty).map_err(|error| failed(error.into()))?;
        let answer = async {
            let response = sandbox.request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_METRICS).collect().await?;
            Ok::<_, SendError>((status, body))
        };
        let silent = |_| Err(format!("no answer within {METRICS:?}").into());
        let answered = tokio::time::timeout(METRICS, answer).await.unwrap_or_else(silent);
        if answered.is_err() {
            sandbox.is_silent();
        }
        let (status, body) = answered.map_err(failed)?;
        if !status.is_success() {
            return Err(failed(format!("it answered {status}").into()));
        }
        serde_json::from_slice(&body.to_bytes()).map_err(|error| failed(error.into()))
    }

    /// Connects to a port of a sandbox, whatever address it is listened on there. The connection is cut when the
    /// sandbox ends.
    ///
    /// # Errors
    /// `Unknown`, `Paused`, `Asleep`, `NoNetwork`, `Busy`, `PortClosed`, `PortSilent`.
    pub async fn dial(&self, id: &SandboxId, port: u16) -> Result<Stream, Error> {
        match self.dial_once(id, port).await {
            // It was being paused: who wants it back hears that it sleeps.
            Err(Error::Unknown(_)) => self.dial_once(id, port).await,
            other => other,
        }
    }

    async fn dial_once(&self, id: &SandboxId, port: u16) -> Result<Stream, Error> {
        let sandbox = self.ensure_running(id)?;
        let no_network = || Error::NoNetwork { what: format!("sandbox {id}"), reason: None };
        let network = sandbox.network.as_ref().ok_or_else(no_network)?;
        match network.dial(id.as_str(), port).await {
            // Nobody listens on its own address: loopback and everything else is seen from inside only.
            Err(closed @ Error::PortClosed { .. }) => {
                match network.tunnel(id.as_str(), tunnel(id, &sandbox, port)).await {
                    Err(Error::PortClosed { .. }) => Err(closed),
                    other => other,
                }
            }
            other => other,
        }
    }

    /// What a gateway has to know of a sandbox.
    ///
    /// # Errors
    /// `Unknown` when it does not run.
    pub fn route(&self, id: &SandboxId) -> Result<Route, Error> {
        // Looked at before it is woken up: who must not reach it must not wake it either.
        if let Some(paused) = self.inner.paused(id).filter(|paused| paused.record.lifecycle.auto_resume) {
            let attachment = paused.record.network.clone().unwrap_or_default();
            return Ok(Route {
                access_token: paused.record.access_token.clone(),
                traffic_token: attachment.traffic_token,
                mask_request_host: attachment.mask_request_host,
            });
        }
        let sandbox = self.find(id)?;
        let (traffic_token, mask_request_host) =
            sandbox.network.as_ref().map(|network| network.way_in()).unwrap_or_default();
        Ok(Route { access_token: sandbox.access_token.clone(), traffic_token, mask_request_host })
    }

    /// Why a sandbox ended, when that is not long ago.
    pub fn ended(&self, id: &SandboxId) -> Option<String> {
        self.inner.changes.why(id)
    }

    /// Replaces the egress policy of a sandbox. Connections that it no longer allows are cut.
    ///
    /// # Errors
    /// `Unknown`, `NoNetwork`, `Network`.
    pub async fn set_policy(&self, id: &SandboxId, policy: Policy) -> Result<(), Error> {
        self.find(id)?.ask(|done| Command::SetPolicy(policy, done)).await?
    }

    /// What a sandbox may reach and what it was refused.
    ///
    /// # Errors
    /// `Unknown`, `Network`.
    pub async fn network(&self, id: &SandboxId) -> Result<NetworkState, Error> {
        let sandbox = self.find(id)?;
        let (Some(network), Some(networks)) = (&sandbox.network, &self.inner.allocator.networks) else {
            return Ok(NetworkState::default());
        };
        let counters = network.slot.counters().await?;
        let by_name = networks.refused(&network.slot).await?;
        let policy = network.attachment().policy;
        let mut denied = counters.denied;
        for (reason, count) in by_name.denied {
            *denied.entry(reason).or_default() += count;
        }
        let mut recent = network.recent();
        recent.extend(by_name.recent);
        recent.sort_by_key(|refusal| refusal.at);
        let allowed = policy.allow.iter().map(ToString::to_string);
        Ok(NetworkState {
            attached: true,
            allow_out: allowed.chain(policy.domains.iter().map(ToString::to_string)).collect(),
            deny_out: policy.deny.iter().map(ToString::to_string).collect(),
            sent: counters.sent,
            received: counters.received,
            denied,
            recent,
        })
    }
}
