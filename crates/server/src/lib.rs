//! Roles in one process: a node, the control plane over it, and the gateway into its sandboxes.
//!
//! Writes nothing of its own: each part says what it writes, and what a crash leaves. Absent on purpose: listeners,
//! arguments and signals, which are the program's.

use std::convert::Infallible;
use std::sync::Arc;

use async_trait::async_trait;
use axum::body::Body;
use axum::response::Response;
use http::Request;
use http_body_util::BodyExt;
use kelvin_api::ENVD_VERSION;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::{SandboxId, SnapshotId, TemplateName};
use kelvin_api::network::{NetworkState, Policy};
use kelvin_api::node::{Changes, Child, ConsoleLine, Create, Created, Forked, Live, Route, Source};
use kelvin_api::phase::Timings;
use kelvin_api::sandbox::{
    BakeTemplate, Capture, GuestMetrics, NodeInfo, PauseMode, PoolInfo, SetPool, SnapshotInfo,
    SnapshotVerification, Template,
};
use kelvin_api::signature::Signature;
use kelvin_api::units::MemoryMib;
use kelvin_control::{ApiKey, Control, unknown_template};
use kelvin_gateway::{Gateway, Inbound, Io, Outbound, Sandboxes};
use kelvin_node::Node;
use tower::service_fn;

/// A node with its control plane and its gateway; cheap to clone.
#[derive(Clone)]
pub struct Server {
    node: Node,
    control: Control,
    gateway: Gateway,
}

impl Server {
    /// Joins a control plane and a gateway to `node`. `key`: the server's own; `domain`: told to clients, which reach
    /// ports as its hosts.
    ///
    /// # Errors
    /// When the database of the control plane or the node cannot be used.
    pub async fn open(node: Node, key: ApiKey, domain: Option<&str>) -> Result<Self, Failure> {
        let local = Arc::new(Local(node.clone()));
        let as_node = Arc::clone(&local) as Arc<dyn kelvin_control::Node>;
        let (domain_told, clock) = (domain.map(str::to_owned), node.clock().clone());
        let control = Control::open(node.data_dir(), as_node, key, domain_told, clock).await?;
        let owners = control.downgrade();
        node.ask_before_waking(Box::new(move |id| {
            let owners = owners.clone();
            Box::pin(async move {
                let owners = owners.upgrade().ok_or_else(stopping)?;
                let permit = owners.may_wake(&id).await?;
                Ok(Box::new(permit) as Box<dyn std::any::Any + Send>)
            })
        }));
        let gateway = Gateway::new(local, domain.unwrap_or("localhost"));
        Ok(Self { node, control, gateway })
    }

    /// What answers requests: those for a sandbox go to it, all others to the control API.
    pub fn service(
        &self,
    ) -> impl tower::Service<
        Request<Body>,
        Response = Response,
        Error = Infallible,
        Future = impl Future<Output = Result<Response, Infallible>> + Send + use<>,
    > + Clone
    + Send
    + use<> {
        let (router, gateway) = (self.control.router(), self.gateway.clone());
        service_fn(move |request: Request<Body>| {
            let (router, gateway) = (router.clone(), gateway.clone());
            async move {
                match gateway.forward(request).await {
                    Ok(reply) => Ok::<Response, Infallible>(reply),
                    Err(request) => tower::ServiceExt::oneshot(router, request).await,
                }
            }
        })
    }

    /// Stops all parts, from the outside to the inside: requests that are under way end, sandboxes keep running.
    pub async fn stop(&self) {
        self.gateway.stop().await;
        // Side by side: a request that waits for a silent guest ends when the node gives that guest up.
        futures::join!(self.control.stop(), self.node.stop());
    }
}

/// A node in this process, as control plane and gateway see one.
struct Local(Node);

fn stopping() -> Failure {
    Failure::new(ErrorCode::NodeStopping, "the server is stopping", "try again when the server is back")
}

fn no_snapshot(text: &str) -> Failure {
    let shown: String = text.chars().take(80).collect();
    Failure::new(
        ErrorCode::SnapshotNotFound,
        format!("no snapshot {shown:?}"),
        "`kelvin snapshot list` shows what there is",
    )
}

#[async_trait]
impl kelvin_control::Node for Local {
    async fn create(&self, request: Create) -> Result<Created, Failure> {
        Ok(self.0.create(request).await?)
    }

    async fn kill(&self, id: &SandboxId) -> Result<(), Failure> {
        Ok(self.0.kill(id).await?)
    }

    async fn set_deadline(&self, id: &SandboxId, ends_at: jiff::Timestamp) -> Result<(), Failure> {
        Ok(self.0.set_deadline(id, ends_at).await?)
    }

    async fn set_policy(&self, id: &SandboxId, policy: Policy) -> Result<(), Failure> {
        Ok(self.0.set_policy(id, policy).await?)
    }

    async fn network(&self, id: &SandboxId) -> Result<NetworkState, Failure> {
        Ok(self.0.network(id).await?)
    }

    async fn metrics(&self, id: &SandboxId) -> Result<GuestMetrics, Failure> {
        Ok(self.0.guest_metrics(id).await?)
    }

    async fn console(&self, id: &SandboxId) -> Result<Vec<ConsoleLine>, Failure> {
        Ok(self.0.console(id).await?)
    }

    async fn source(&self, text: &str) -> Result<Source, Failure> {
        self.0.source(text).await?.ok_or_else(|| unknown_template(text))
    }

    async fn pause(
        &self,
        id: &SandboxId,
        mode: PauseMode,
        healthy: bool,
    ) -> Result<(Capture, Timings), Failure> {
        Ok(self.0.pause(id, mode, healthy).await?)
    }

    async fn resume(
        &self,
        id: &SandboxId,
        ends_at: Option<jiff::Timestamp>,
        mode: PauseMode,
    ) -> Result<Created, Failure> {
        Ok(self.0.resume(id, ends_at, mode).await?)
    }

    async fn snapshot(
        &self,
        id: &SandboxId,
        snapshot: SnapshotId,
        name: Option<TemplateName>,
        mode: PauseMode,
    ) -> Result<(SnapshotInfo, Capture, Timings), Failure> {
        Ok(self.0.snapshot(id, snapshot, name, mode).await?)
    }

    async fn fork(&self, source: &SandboxId, children: Vec<Child>) -> Result<Forked, Failure> {
        Ok(self.0.fork(source, children).await?)
    }

    async fn snapshots(&self) -> Result<Vec<SnapshotInfo>, Failure> {
        Ok(self.0.snapshots().await?)
    }

    async fn remove_snapshot(&self, text: &str, cascade: bool) -> Result<(), Failure> {
        let id = text.parse().map_err(|_| no_snapshot(text))?;
        Ok(self.0.remove_snapshot(&id, cascade).await?)
    }

    async fn verify_snapshot(&self, text: &str) -> Result<SnapshotVerification, Failure> {
        let id = text.parse().map_err(|_| no_snapshot(text))?;
        Ok(self.0.verify_snapshot(&id).await?)
    }

    async fn pools(&self) -> Result<Vec<PoolInfo>, Failure> {
        Ok(self.0.pools())
    }

    async fn set_pool(&self, template: &TemplateName, wanted: SetPool) -> Result<(), Failure> {
        Ok(self.0.set_pool(template, wanted).await?)
    }

    async fn one(&self, id: &SandboxId) -> Result<Option<Live>, Failure> {
        Ok(self.0.one(id))
    }

    async fn live(&self) -> Result<Vec<Live>, Failure> {
        Ok(self.0.live())
    }

    async fn changes(&self, generation: u64) -> Result<Changes, Failure> {
        Ok(self.0.changes(generation).await)
    }

    async fn templates(&self) -> Result<Vec<Template>, Failure> {
        let templates = self.0.templates().await?;
        Ok(templates
            .into_iter()
            .map(|(template, created, snapshots)| Template {
                template_id: template.name.to_string(),
                build_id: template.image.clone(),
                cpu_count: template.shape.vcpus,
                memory_mb: template.shape.memory_mib.0,
                disk_size_mb: template.shape.disk_mib.0,
                public: false,
                aliases: vec![template.name.to_string()],
                names: vec![template.name.to_string()],
                created_at: created,
                updated_at: created,
                created_by: None,
                last_spawned_at: None,
                spawn_count: 0,
                build_count: 1,
                envd_version: ENVD_VERSION.to_owned(),
                build_status: "ready".to_owned(),
                snapshots,
            })
            .collect())
    }

    async fn bake(&self, template: &TemplateName, request: BakeTemplate) -> Result<String, Failure> {
        let memory = match request.memory_mb.map(u32::try_from) {
            None => None,
            Some(Ok(memory)) => Some(MemoryMib(memory)),
            Some(Err(_)) => {
                return Err(Failure::new(
                    ErrorCode::InvalidShape,
                    "memoryMB is outside every range",
                    "ask for less memory",
                ));
            }
        };
        let (vcpus, waiting, network) = (request.cpu_count, request.waiting_vmms, request.network);
        Ok(self.0.bake(template, vcpus, memory, waiting, network).await?.to_string())
    }

    async fn info(&self) -> Result<NodeInfo, Failure> {
        Ok(self.0.info().await?)
    }

    async fn collect(&self, dry_run: bool) -> Result<serde_json::Value, Failure> {
        let garbage = self.0.collect(dry_run).await?;
        serde_json::to_value(garbage).map_err(|error| {
            Failure::new(ErrorCode::Encoding, "the result cannot be written", "report this")
                .with_cause(&error)
        })
    }
}

#[async_trait]
impl Sandboxes for Local {
    async fn send(
        &self,
        sandbox: &SandboxId,
        request: Request<Inbound>,
    ) -> Result<Response<Outbound>, Failure> {
        let response = self.0.send(sandbox, request).await?;
        Ok(response.map(|body| body.map_err(std::io::Error::other).boxed_unsync()))
    }

    async fn route(&self, sandbox: &SandboxId) -> Result<Route, Failure> {
        Ok(self.0.route(sandbox)?)
    }

    async fn dial(&self, sandbox: &SandboxId, port: u16) -> Result<Box<dyn Io>, Failure> {
        Ok(Box::new(self.0.dial(sandbox, port).await?))
    }

    async fn signer(&self, signature: &Signature) -> Option<SandboxId> {
        self.0.signer(signature)
    }

    async fn holder(&self, token: &str) -> Option<SandboxId> {
        self.0.holder(token)
    }

    async fn ended(&self, sandbox: &SandboxId) -> Option<String> {
        self.0.ended(sandbox)
    }
}
