//! A node that others ask: [`NodeService`] and [`SandboxTraffic`] over a listener.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use connectrpc::interceptor::{
    Interceptor, Next, NextStream, PayloadStream, StreamRequest, StreamResponse, UnaryRequest, UnaryResponse,
};
use connectrpc::{
    ConnectError, ConnectRpcService, InboundStream, Limits, RequestContext, Response, Router, ServiceRequest,
    ServiceResult, ServiceStream,
};
use http::HeaderMap;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::Token;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;

use super::convert::{self, json, mode, read, text, timestamp};
use super::failure::refuse;
use super::generated::pb;
use super::limits::{CONNECTION_WINDOW, KEEP_ALIVE, MAX_MESSAGE, STREAM_WINDOW, STREAMS, VERSION_HEADER};
use super::{build, import, stream};
use crate::{NodeService, SandboxTraffic, VERSION};

/// Serves `node` and the way into its sandboxes on `listener` until `stop` is cancelled; calls that are under way end first.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    node: Arc<dyn NodeService>,
    traffic: Arc<dyn SandboxTraffic>,
    stop: CancellationToken,
) -> io::Result<()> {
    let router = Router::new().add_service(Arc::new(Node(node))).add_service(Arc::new(Traffic(traffic)));
    let limits = Limits::default().with_max_message_size(MAX_MESSAGE).with_max_request_body_size(MAX_MESSAGE);
    let service = ConnectRpcService::new(router).with_limits(limits).with_interceptor(OfVersion);
    let connections = TaskTracker::new();
    let ended = loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break Ok(()),
        };
        match accepted {
            Ok((connection, _)) => {
                connections.spawn(speak(connection, service.clone(), stop.clone()));
            }
            Err(error) => break Err(error),
        }
    };
    connections.close();
    connections.wait().await;
    ended
}

async fn speak(connection: TcpStream, service: ConnectRpcService, stop: CancellationToken) {
    let _ = connection.set_nodelay(true);
    let answer = service_fn(move |request: http::Request<Incoming>| {
        let mut service = service.clone();
        async move { Ok::<_, Infallible>(service.call(request).await.unwrap_or_else(|never| match never {})) }
    });
    let speaking = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(STREAMS)
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .serve_connection(TokioIo::new(connection), answer);
    tokio::pin!(speaking);
    let mut stopping = false;
    loop {
        tokio::select! {
            ended = speaking.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a peer went away");
                }
                return;
            }
            () = stop.cancelled(), if !stopping => {
                stopping = true;
                speaking.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Refuses requests of another version, by name.
struct OfVersion;

fn check(headers: &HeaderMap) -> Result<(), ConnectError> {
    let theirs = headers.get(VERSION_HEADER).and_then(|value| value.to_str().ok()).unwrap_or("none");
    if theirs.parse() == Ok(VERSION) {
        return Ok(());
    }
    Err(refuse(Failure::new(
        ErrorCode::UnknownVersion,
        format!("version {theirs:?} of the node's API was asked for, this node speaks {VERSION}"),
        "run control plane, gateway and node of one version",
    )))
}

#[connectrpc::async_trait]
impl Interceptor for OfVersion {
    async fn intercept_unary(
        &self,
        request: UnaryRequest,
        next: Next<'_>,
    ) -> Result<UnaryResponse, ConnectError> {
        check(request.ctx.headers())?;
        next.run(request).await
    }

    async fn intercept_streaming(
        &self,
        request: StreamRequest,
        inbound: PayloadStream,
        next: NextStream<'_>,
    ) -> Result<StreamResponse, ConnectError> {
        check(request.ctx.headers())?;
        next.run(request, inbound).await
    }
}

struct Node(Arc<dyn NodeService>);
struct Traffic(Arc<dyn SandboxTraffic>);

/// Unary calls: what is asked, as an owned message, and what comes of it.
macro_rules! calls {
    ($($name:ident($node:ident, $request:pat, $In:ident) -> $Out:ident $body:block)*) => {
        $(async fn $name(
            &self,
            _: RequestContext,
            request: ServiceRequest<'_, pb::$In>,
        ) -> ServiceResult<pb::$Out> {
            let ($node, $request) = (&self.0, request.to_owned_message());
            let done: Result<pb::$Out, Failure> = async move { $body }.await;
            match done {
                Ok(reply) => Response::ok(reply),
                Err(failure) => Err(refuse(failure)),
            }
        })*
    };
}

/// The same for what changes something: on a task of its own, so that it comes to its end when its caller goes away.
macro_rules! changes {
    ($($name:ident($node:ident, $request:pat, $In:ident) -> $Out:ident $body:block)*) => {
        calls! {
            $($name(node, request, $In) -> $Out {
                let ($node, $request) = (Arc::clone(node), request);
                let changing: tokio::task::JoinHandle<Result<pb::$Out, Failure>> =
                    tokio::spawn(async move { $body });
                changing.await.unwrap_or_else(|error| {
                    let text = "what was asked for was given up";
                    Err(Failure::new(ErrorCode::Aborted, text, "look at the node's log").with_cause(&error))
                })
            })*
        }
    };
}

fn done() -> Result<pb::Done, Failure> {
    Ok(pb::Done::default())
}

fn resource(value: &impl serde::Serialize) -> Result<pb::Resource, Failure> {
    Ok(pb::Resource { json: json(value)?, ..Default::default() })
}

fn kept(id: &kelvin_api::id::SnapshotId) -> pb::KeptSnapshot {
    pb::KeptSnapshot { id: id.to_string(), ..Default::default() }
}

fn found(text: Option<String>) -> pb::Found {
    pb::Found { text, ..Default::default() }
}

#[allow(refining_impl_trait)] // a service names its reply types
impl pb::NodeService for Node {
    changes! {
        create(node, request, CreateRequest) -> Created {
            Ok(convert::created(&node.create(convert::to_create(request)?).await?))
        }
        kill(node, request, Sandbox) -> Done {
            node.kill(&text(&request.id)?).await?;
            done()
        }
        set_deadline(node, request, SetDeadlineRequest) -> Done {
            node.set_deadline(&text(&request.sandbox)?, timestamp(request.ends_at.into_option())?).await?;
            done()
        }
        set_policy(node, request, SandboxResource) -> Done {
            node.set_policy(&text(&request.sandbox)?, read(&request.json)?).await?;
            done()
        }
        pause(node, request, PauseRequest) -> Resource {
            let mode = mode(request.filesystem_only);
            resource(&node.pause(&text(&request.sandbox)?, mode, request.healthy).await?)
        }
        resume(node, request, ResumeRequest) -> Created {
            let ends_at = request.ends_at.into_option().map(|at| timestamp(Some(at))).transpose()?;
            let resumed =
                node.resume(&text(&request.sandbox)?, ends_at, mode(request.filesystem_only)).await?;
            Ok(convert::created(&resumed))
        }
        snapshot(node, request, SnapshotRequest) -> Resource {
            let (sandbox, snapshot) = (text(&request.sandbox)?, text(&request.snapshot)?);
            let name = request.name.as_deref().map(text).transpose()?;
            resource(&node.snapshot(&sandbox, snapshot, name, mode(request.filesystem_only)).await?)
        }
        fork(node, request, ForkRequest) -> ForkResponse {
            let children = request.children.into_iter().map(convert::to_child).collect::<Result<_, _>>()?;
            convert::forked(node.fork(&text(&request.source)?, children).await?)
        }
        remove_snapshot(node, request, RemoveSnapshotRequest) -> Done {
            node.remove_snapshot(&text(&request.id)?, request.cascade).await?;
            done()
        }
        set_pool(node, request, SetPoolRequest) -> Done {
            node.set_pool(&text(&request.template)?, read(&request.json)?).await?;
            done()
        }
        bake(node, request, Resource) -> KeptSnapshot { Ok(kept(&node.bake(read(&request.json)?).await?)) }
        cancel_build(node, request, BuildRequest) -> Done {
            node.cancel_build(&text(&request.id)?).await?;
            done()
        }
        remove_template(node, request, TemplateRequest) -> Done {
            node.remove_template(&text(&request.name)?).await?;
            done()
        }
        prefer_template(node, request, TemplateRequest) -> Done {
            node.prefer_template(&text(&request.name)?).await?;
            done()
        }
        collect(node, request, CollectRequest) -> Resource { resource(&node.collect(request.dry_run).await?) }
    }
    calls! {
        network(node, request, Sandbox) -> Resource { resource(&node.network(&text(&request.id)?).await?) }
        metrics(node, request, Sandbox) -> Resource { resource(&node.metrics(&text(&request.id)?).await?) }
        console(node, request, Sandbox) -> Resource { resource(&node.console(&text(&request.id)?).await?) }
        source(node, request, SourceRequest) -> SourceResponse {
            Ok(convert::source(node.source(&request.text).await?))
        }
        snapshots(node, _, Nothing) -> Resource { resource(&node.snapshots().await?) }
        verify_snapshot(node, request, KeptSnapshot) -> Resource {
            resource(&node.verify_snapshot(&text(&request.id)?).await?)
        }
        pools(node, _, Nothing) -> Resource { resource(&node.pools().await?) }
        one(node, request, Sandbox) -> LiveResponse {
            let found = node.one(&text(&request.id)?).await?;
            Ok(pb::LiveResponse { sandboxes: found.iter().map(convert::live).collect(), ..Default::default() })
        }
        live(node, _, Nothing) -> LiveResponse {
            let all = node.live().await?;
            Ok(pb::LiveResponse { sandboxes: all.iter().map(convert::live).collect(), ..Default::default() })
        }
        changes(node, request, ChangesRequest) -> ChangesResponse {
            Ok(convert::changes(node.changes(request.generation).await?))
        }
        templates(node, _, Nothing) -> Resource { resource(&node.templates().await?) }
        info(node, _, Nothing) -> Resource { resource(&node.info().await?) }
        has_files(node, request, FilesRequest) -> HasFilesResponse {
            let present = node.has_files(&text(&request.project)?, &text(&request.hash)?).await?;
            Ok(pb::HasFilesResponse { present, ..Default::default() })
        }
    }

    async fn import(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, pb::Resource>,
    ) -> ServiceResult<ServiceStream<pb::ImportPiece>> {
        let request = read(&request.to_owned_message().json).map_err(refuse)?;
        Response::stream_ok(import::pieces(Arc::clone(&self.0), request))
    }

    async fn build(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, pb::Resource>,
    ) -> ServiceResult<ServiceStream<pb::BuildPiece>> {
        let request = read(&request.to_owned_message().json).map_err(refuse)?;
        Response::stream_ok(build::pieces(Arc::clone(&self.0), request))
    }

    async fn put_files(
        &self,
        _: RequestContext,
        requests: InboundStream<pb::FilesPiece>,
    ) -> ServiceResult<ServiceStream<pb::Done>> {
        Response::stream_ok(build::receive(Arc::clone(&self.0), requests).await.map_err(refuse)?)
    }
}

#[allow(refining_impl_trait)] // a service names its reply types
impl pb::SandboxTraffic for Traffic {
    calls! {
        route(traffic, request, Sandbox) -> RouteResponse {
            let route = traffic.route(&text(&request.id)?).await?;
            let secret = |token: Option<Token>| token.map(|token| token.expose().to_owned());
            Ok(pb::RouteResponse {
                access_token: secret(route.access_token),
                traffic_token: secret(route.traffic_token),
                mask_request_host: route.mask_request_host,
                ..Default::default()
            })
        }
        signer(traffic, request, Resource) -> Found {
            let signer = traffic.signer(&read(&request.json)?).await?;
            Ok(found(signer.map(String::from)))
        }
        holder(traffic, request, HolderRequest) -> Found {
            let holder = traffic.holder(&Token::from_secret(request.token)).await?;
            Ok(found(holder.map(String::from)))
        }
        ended(traffic, request, Sandbox) -> Found { Ok(found(traffic.ended(&text(&request.id)?).await?)) }
    }

    async fn send(
        &self,
        _: RequestContext,
        requests: InboundStream<pb::SendPiece>,
    ) -> ServiceResult<ServiceStream<pb::SendPiece>> {
        Response::stream_ok(stream::send(Arc::clone(&self.0), requests).await.map_err(refuse)?)
    }

    async fn dial(
        &self,
        _: RequestContext,
        requests: InboundStream<pb::DialPiece>,
    ) -> ServiceResult<ServiceStream<pb::DialPiece>> {
        Response::stream_ok(stream::dial(Arc::clone(&self.0), requests).await.map_err(refuse)?)
    }
}
