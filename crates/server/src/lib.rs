//! Roles in one process: a node, the control plane over it, and the gateway into its sandboxes.
//!
//! Writes nothing of its own: each part says what it writes, and what a crash leaves. Absent on purpose: listeners,
//! arguments and signals, which are the program's.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use http::Request;
use kelvin_api::error::Failure;
use kelvin_control::{ApiKey, BuildOptions, Control, OverTls};
use kelvin_gateway::{Gateway, Secure};
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
    /// ports as its hosts; `builds`: what builds may take.
    ///
    /// # Errors
    /// When the database of the control plane or the node cannot be used.
    pub async fn open(
        node: Node,
        key: ApiKey,
        domain: Option<&str>,
        builds: BuildOptions,
    ) -> Result<Self, Failure> {
        let (domain_told, clock) = (domain.map(str::to_owned), node.clock().clone());
        let service = Arc::new(node.clone());
        let control = Control::open(node.data_dir(), service, key, domain_told, clock, builds).await?;
        let (sandboxes, waker) = (Arc::new(node.clone()), Arc::new(control.clone()));
        let gateway = Gateway::new(sandboxes, waker, domain.unwrap_or("localhost"));
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
                    Err(mut request) => {
                        if request.extensions().get::<Secure>().is_some() {
                            request.extensions_mut().insert(OverTls);
                        }
                        tower::ServiceExt::oneshot(router, request).await
                    }
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
