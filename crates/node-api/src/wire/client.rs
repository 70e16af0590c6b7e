//! A node that is elsewhere.

use async_trait::async_trait;
use buffa::view::{MessageView, OwnedView};
use connectrpc::ConnectError;
use connectrpc::client::{ClientBody, ClientConfig, ServiceTransport, UnaryResponse};
use http::{Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kelvin_api::account::Project;
use kelvin_api::error::Failure;
use kelvin_api::id::{BuildId, FilesHash, SandboxId, SnapshotId, TemplateName, TemplateVersion, Token};
use kelvin_api::network::{NetworkState, Policy};
use kelvin_api::sandbox::{
    GuestMetrics, NodeInfo, PauseMode, PoolInfo, SetPool, SnapshotInfo, SnapshotVerification, Template,
};
use kelvin_api::signature::Signature;

use super::convert::{self, json, read, text, time};
use super::failure::refused;
use super::generated::pb;
use super::limits::{CONNECTION_WINDOW, KEEP_ALIVE, MAX_MESSAGE, STREAM_WINDOW, VERSION_HEADER};
use super::{build, import, stream};
use crate::{
    Bake, Build, BuildFailure, BuildTold, Built, Changes, Child, ConsoleLine, Create, Created, FilesContent,
    Forked, Garbage, Import, ImportTold, Inbound, Io, Live, NodeService, Outbound, Paused, Route,
    SandboxTraffic, Source, Taken, Unanswered, VERSION,
};

pub(super) type Transport = ServiceTransport<Client<HttpConnector, ClientBody>>;

/// The node that listens at an address; cheap to clone. It connects when it is asked, and again when that broke.
#[derive(Clone)]
pub struct Remote {
    node: pb::NodeServiceClient<Transport>,
    traffic: pb::SandboxTrafficClient<Transport>,
}

impl Remote {
    /// The node at `address`, as `http://host:port`.
    pub fn new(address: Uri) -> Self {
        Self::of_version(address, VERSION)
    }

    /// The same, asked in messages that are said to be of `version`.
    pub(crate) fn of_version(address: Uri, version: u32) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .http2_only(true)
            .http2_initial_stream_window_size(STREAM_WINDOW)
            .http2_initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .http2_keep_alive_timeout(KEEP_ALIVE)
            .build(connector);
        let transport = ServiceTransport::new(client);
        let config = ClientConfig::new(address)
            .with_default_max_message_size(MAX_MESSAGE)
            .with_default_header(VERSION_HEADER, version.to_string());
        Self {
            node: pb::NodeServiceClient::new(transport.clone(), config.clone()),
            traffic: pb::SandboxTrafficClient::new(transport, config),
        }
    }
}

/// A reply as an owned message.
fn owned<V>(reply: Result<UnaryResponse<OwnedView<V>>, ConnectError>) -> Result<V::Owned, Failure>
where
    V: MessageView<'static> + buffa::view::ViewReborrow,
{
    reply.map(UnaryResponse::into_owned).map_err(|error| refused(&error))
}

fn sandbox(id: &SandboxId) -> pb::Sandbox {
    pb::Sandbox { id: id.to_string(), ..Default::default() }
}

fn kept(id: &SnapshotId) -> pb::KeptSnapshot {
    pb::KeptSnapshot { id: id.to_string(), ..Default::default() }
}

fn nothing() -> pb::Nothing {
    pb::Nothing::default()
}

#[async_trait]
impl NodeService for Remote {
    async fn create(&self, request: Create) -> Result<Created, Failure> {
        convert::to_created(owned(self.node.create(convert::create(request)?).await)?)
    }

    async fn kill(&self, id: &SandboxId) -> Result<(), Failure> {
        owned(self.node.kill(sandbox(id)).await).map(drop)
    }

    async fn set_deadline(&self, id: &SandboxId, ends_at: jiff::Timestamp) -> Result<(), Failure> {
        let request = pb::SetDeadlineRequest {
            sandbox: id.to_string(),
            ends_at: time(ends_at).into(),
            ..Default::default()
        };
        owned(self.node.set_deadline(request).await).map(drop)
    }

    async fn set_policy(&self, id: &SandboxId, policy: Policy) -> Result<(), Failure> {
        let request =
            pb::SandboxResource { sandbox: id.to_string(), json: json(&policy)?, ..Default::default() };
        owned(self.node.set_policy(request).await).map(drop)
    }

    async fn network(&self, id: &SandboxId) -> Result<NetworkState, Failure> {
        read(&owned(self.node.network(sandbox(id)).await)?.json)
    }

    async fn metrics(&self, id: &SandboxId) -> Result<GuestMetrics, Failure> {
        read(&owned(self.node.metrics(sandbox(id)).await)?.json)
    }

    async fn console(&self, id: &SandboxId) -> Result<Vec<ConsoleLine>, Failure> {
        read(&owned(self.node.console(sandbox(id)).await)?.json)
    }

    async fn source(&self, text: &str) -> Result<Option<Source>, Failure> {
        let request = pb::SourceRequest { text: text.to_owned(), ..Default::default() };
        convert::to_source(owned(self.node.source(request).await)?)
    }

    async fn pause(&self, id: &SandboxId, mode: PauseMode, healthy: bool) -> Result<Paused, Failure> {
        let request = pb::PauseRequest {
            sandbox: id.to_string(),
            filesystem_only: !mode.is_full(),
            healthy,
            ..Default::default()
        };
        read(&owned(self.node.pause(request).await)?.json)
    }

    async fn resume(
        &self,
        id: &SandboxId,
        ends_at: Option<jiff::Timestamp>,
        mode: PauseMode,
    ) -> Result<Created, Failure> {
        let request = pb::ResumeRequest {
            sandbox: id.to_string(),
            ends_at: ends_at.map(time).into(),
            filesystem_only: !mode.is_full(),
            ..Default::default()
        };
        convert::to_created(owned(self.node.resume(request).await)?)
    }

    async fn snapshot(
        &self,
        id: &SandboxId,
        snapshot: SnapshotId,
        name: Option<TemplateName>,
        mode: PauseMode,
    ) -> Result<Taken, Failure> {
        let request = pb::SnapshotRequest {
            sandbox: id.to_string(),
            snapshot: snapshot.to_string(),
            name: name.map(String::from),
            filesystem_only: !mode.is_full(),
            ..Default::default()
        };
        read(&owned(self.node.snapshot(request).await)?.json)
    }

    async fn fork(&self, source: &SandboxId, children: Vec<Child>) -> Result<Forked, Failure> {
        let children = children.into_iter().map(convert::child).collect();
        let request = pb::ForkRequest { source: source.to_string(), children, ..Default::default() };
        convert::to_forked(owned(self.node.fork(request).await)?)
    }

    async fn snapshots(&self) -> Result<Vec<SnapshotInfo>, Failure> {
        read(&owned(self.node.snapshots(nothing()).await)?.json)
    }

    async fn remove_snapshot(&self, id: &SnapshotId, cascade: bool) -> Result<(), Failure> {
        let request = pb::RemoveSnapshotRequest { id: id.to_string(), cascade, ..Default::default() };
        owned(self.node.remove_snapshot(request).await).map(drop)
    }

    async fn verify_snapshot(&self, id: &SnapshotId) -> Result<SnapshotVerification, Failure> {
        read(&owned(self.node.verify_snapshot(kept(id)).await)?.json)
    }

    async fn pools(&self) -> Result<Vec<PoolInfo>, Failure> {
        read(&owned(self.node.pools(nothing()).await)?.json)
    }

    async fn set_pool(&self, template: &TemplateName, wanted: SetPool) -> Result<(), Failure> {
        let request =
            pb::SetPoolRequest { template: template.to_string(), json: json(&wanted)?, ..Default::default() };
        owned(self.node.set_pool(request).await).map(drop)
    }

    async fn one(&self, id: &SandboxId) -> Result<Option<Live>, Failure> {
        let mut found = owned(self.node.one(sandbox(id)).await)?;
        found.sandboxes.pop().map(convert::to_live).transpose()
    }

    async fn live(&self) -> Result<Vec<Live>, Failure> {
        owned(self.node.live(nothing()).await)?.sandboxes.into_iter().map(convert::to_live).collect()
    }

    async fn changes(&self, generation: u64) -> Result<Changes, Failure> {
        let request = pb::ChangesRequest { generation, ..Default::default() };
        convert::to_changes(owned(self.node.changes(request).await)?)
    }

    async fn templates(&self) -> Result<Vec<Template>, Failure> {
        read(&owned(self.node.templates(nothing()).await)?.json)
    }

    async fn import(&self, request: Import, told: ImportTold) -> Result<Template, Failure> {
        let request = pb::Resource { json: json(&request)?, ..Default::default() };
        let mut pieces = self.node.import(request).await.map_err(|error| refused(&error))?;
        loop {
            let piece = pieces.message().await.map_err(|error| refused(&error))?;
            if let Some(template) = import::read_piece(piece.map(|piece| piece.to_owned_message()), &told)? {
                return Ok(template);
            }
        }
    }

    async fn bake(&self, request: Bake) -> Result<SnapshotId, Failure> {
        let request = pb::Resource { json: json(&request)?, ..Default::default() };
        text(&owned(self.node.bake(request).await)?.id)
    }

    async fn build(&self, request: Build, told: BuildTold) -> Result<Built, BuildFailure> {
        let request = pb::Resource { json: json(&request)?, ..Default::default() };
        let mut pieces = self.node.build(request).await.map_err(|error| refused(&error))?;
        loop {
            let piece = pieces.message().await.map_err(|error| refused(&error))?;
            if let Some(built) = build::read_piece(piece.map(|piece| piece.to_owned_message()), &told).await?
            {
                return Ok(built);
            }
        }
    }

    async fn cancel_build(&self, build: &BuildId) -> Result<(), Failure> {
        let request = pb::BuildRequest { id: build.to_string(), ..Default::default() };
        owned(self.node.cancel_build(request).await).map(drop)
    }

    async fn has_files(&self, project: &Project, hash: &FilesHash) -> Result<bool, Failure> {
        Ok(owned(self.node.has_files(build::files(project, hash)).await)?.present)
    }

    async fn put_files(
        &self,
        project: &Project,
        hash: &FilesHash,
        content: FilesContent,
    ) -> Result<(), Failure> {
        let call = self.node.put_files().await.map_err(|error| refused(&error))?;
        build::upload(call, build::files(project, hash), content).await
    }

    async fn remove_template(&self, version: &TemplateVersion) -> Result<(), Failure> {
        let request = pb::TemplateRequest { name: version.to_string(), ..Default::default() };
        owned(self.node.remove_template(request).await).map(drop)
    }

    async fn prefer_template(&self, version: &TemplateVersion) -> Result<(), Failure> {
        let request = pb::TemplateRequest { name: version.to_string(), ..Default::default() };
        owned(self.node.prefer_template(request).await).map(drop)
    }

    async fn info(&self) -> Result<NodeInfo, Failure> {
        read(&owned(self.node.info(nothing()).await)?.json)
    }

    async fn collect(&self, dry_run: bool) -> Result<Garbage, Failure> {
        let request = pb::CollectRequest { dry_run, ..Default::default() };
        read(&owned(self.node.collect(request).await)?.json)
    }
}

#[async_trait]
impl SandboxTraffic for Remote {
    async fn send(
        &self,
        sandbox: &SandboxId,
        request: Request<Inbound>,
    ) -> Result<Response<Outbound>, Unanswered> {
        let call = self.traffic.send().await.map_err(|error| refused(&error))?;
        stream::request(call, sandbox, request).await
    }

    async fn route(&self, id: &SandboxId) -> Result<Route, Failure> {
        let route = owned(self.traffic.route(sandbox(id)).await)?;
        Ok(Route {
            access_token: route.access_token.map(Token::from_secret),
            traffic_token: route.traffic_token.map(Token::from_secret),
            mask_request_host: route.mask_request_host,
        })
    }

    async fn dial(&self, sandbox: &SandboxId, port: u16) -> Result<Box<dyn Io>, Failure> {
        let call = self.traffic.dial().await.map_err(|error| refused(&error))?;
        stream::connect(call, sandbox, port).await
    }

    async fn signer(&self, signature: &Signature) -> Result<Option<SandboxId>, Failure> {
        let request = pb::Resource { json: json(signature)?, ..Default::default() };
        owned(self.traffic.signer(request).await)?.text.as_deref().map(text).transpose()
    }

    async fn holder(&self, token: &Token) -> Result<Option<SandboxId>, Failure> {
        let request = pb::HolderRequest { token: token.expose().to_owned(), ..Default::default() };
        owned(self.traffic.holder(request).await)?.text.as_deref().map(text).transpose()
    }

    async fn ended(&self, id: &SandboxId) -> Result<Option<String>, Failure> {
        Ok(owned(self.traffic.ended(sandbox(id)).await)?.text)
    }
}
