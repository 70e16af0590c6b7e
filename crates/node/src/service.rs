//! A node as control plane and gateway see one: [`Node`] itself, its errors as failures.

use async_trait::async_trait;
use http::{Request, Response};
use http_body_util::BodyExt;
use kelvin_api::ENVD_VERSION;
use kelvin_api::account::Project;
use kelvin_api::error::Failure;
use kelvin_api::id::{BuildId, FilesHash, SandboxId, SnapshotId, TemplateName, TemplateVersion, Token};
use kelvin_api::network::{NetworkState, Policy};
use kelvin_api::sandbox::{
    GuestMetrics, NodeInfo, PauseMode, PoolInfo, SetPool, SnapshotInfo, SnapshotVerification, Template,
    VersionInfo,
};
use kelvin_api::signature::Signature;
use kelvin_node_api::{
    Bake, Build, BuildFailure, BuildTold, Built, Changes, Child, ConsoleLine, Create, Created, FilesContent,
    Forked, Garbage, Import, ImportTold, Inbound, Io, Live, NodeService, Outbound, Paused, Route,
    SandboxTraffic, Source, Taken, Unanswered,
};

use crate::Node;
use crate::build::entry::Made;
use crate::inspect::Known;

/// A version of a template as the public API tells of it: a template with one version, whose tags are not the node's to know.
fn shown(known: Known) -> Template {
    let Known { template, created, snapshots, image_bytes: (image_bytes, image_disk_bytes), memory_bytes } =
        known;
    let version = VersionInfo {
        build_id: template.build.clone(),
        tags: Vec::new(),
        image: template.image.clone(),
        image_bytes,
        image_disk_bytes,
        memory_disk_bytes: memory_bytes,
        kernel: template.kernel.clone(),
        created_at: created,
        from_digest: template.built.as_ref().and_then(|built| built.from_digest.clone()),
    };
    Template {
        template_id: template.name.to_string(),
        build_id: template.build.as_ref().map_or_else(|| template.image.clone(), ToString::to_string),
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
        versions: vec![version],
    }
}

// What is called here are the node's own methods of the same names: those of a type come before those of its traits.
#[async_trait]
impl NodeService for Node {
    async fn create(&self, request: Create) -> Result<Created, Failure> {
        Ok(self.create(request).await?)
    }

    async fn kill(&self, id: &SandboxId) -> Result<(), Failure> {
        Ok(self.kill(id).await?)
    }

    async fn set_deadline(&self, id: &SandboxId, ends_at: jiff::Timestamp) -> Result<(), Failure> {
        Ok(self.set_deadline(id, ends_at).await?)
    }

    async fn set_policy(&self, id: &SandboxId, policy: Policy) -> Result<(), Failure> {
        Ok(self.set_policy(id, policy).await?)
    }

    async fn network(&self, id: &SandboxId) -> Result<NetworkState, Failure> {
        Ok(self.network(id).await?)
    }

    async fn metrics(&self, id: &SandboxId) -> Result<GuestMetrics, Failure> {
        Ok(self.guest_metrics(id).await?)
    }

    async fn console(&self, id: &SandboxId) -> Result<Vec<ConsoleLine>, Failure> {
        Ok(self.console(id).await?)
    }

    async fn source(&self, text: &str) -> Result<Option<Source>, Failure> {
        Ok(self.source(text).await?)
    }

    async fn pause(&self, id: &SandboxId, mode: PauseMode, healthy: bool) -> Result<Paused, Failure> {
        let (capture, timings) = self.pause(id, mode, healthy).await?;
        Ok(Paused { capture, timings })
    }

    async fn resume(
        &self,
        id: &SandboxId,
        ends_at: Option<jiff::Timestamp>,
        mode: PauseMode,
    ) -> Result<Created, Failure> {
        Ok(self.resume(id, ends_at, mode).await?)
    }

    async fn snapshot(
        &self,
        id: &SandboxId,
        snapshot: SnapshotId,
        name: Option<TemplateName>,
        mode: PauseMode,
    ) -> Result<Taken, Failure> {
        let (snapshot, capture, timings) = self.snapshot(id, snapshot, name, mode).await?;
        Ok(Taken { snapshot, capture, timings })
    }

    async fn fork(&self, source: &SandboxId, children: Vec<Child>) -> Result<Forked, Failure> {
        Ok(self.fork(source, children).await?)
    }

    async fn snapshots(&self) -> Result<Vec<SnapshotInfo>, Failure> {
        Ok(self.snapshots().await?)
    }

    async fn remove_snapshot(&self, id: &SnapshotId, cascade: bool) -> Result<(), Failure> {
        Ok(self.remove_snapshot(id, cascade).await?)
    }

    async fn verify_snapshot(&self, id: &SnapshotId) -> Result<SnapshotVerification, Failure> {
        Ok(self.verify_snapshot(id).await?)
    }

    async fn pools(&self) -> Result<Vec<PoolInfo>, Failure> {
        Ok(self.pools())
    }

    async fn set_pool(&self, template: &TemplateName, wanted: SetPool) -> Result<(), Failure> {
        Ok(self.set_pool(template, wanted).await?)
    }

    async fn one(&self, id: &SandboxId) -> Result<Option<Live>, Failure> {
        Ok(self.one(id))
    }

    async fn live(&self) -> Result<Vec<Live>, Failure> {
        Ok(self.live())
    }

    async fn changes(&self, generation: u64) -> Result<Changes, Failure> {
        Ok(self.changes(generation).await)
    }

    async fn templates(&self) -> Result<Vec<Template>, Failure> {
        Ok(self.templates().await?.into_iter().map(shown).collect())
    }

    async fn import(&self, request: Import, told: ImportTold) -> Result<Template, Failure> {
        Ok(shown(self.import(request, told).await?))
    }

    async fn bake(&self, request: Bake) -> Result<SnapshotId, Failure> {
        let Bake { template, vcpus, memory_mib, waiting_vmms, network } = request;
        Ok(self.bake(&template, vcpus, memory_mib, waiting_vmms, network).await?)
    }

    async fn build(&self, request: Build, told: BuildTold) -> Result<Built, BuildFailure> {
        let (known, made) = self.build(request, told).await?;
        let Made { from_digest, cached_steps, .. } = made;
        Ok(Built { template: shown(known), from_digest, cached_steps })
    }

    async fn cancel_build(&self, build: &BuildId) -> Result<(), Failure> {
        Ok(self.cancel_build(build).await?)
    }

    async fn has_files(&self, project: &Project, hash: &FilesHash) -> Result<bool, Failure> {
        Ok(self.has_files(project, hash).await?)
    }

    async fn put_files(
        &self,
        project: &Project,
        hash: &FilesHash,
        content: FilesContent,
    ) -> Result<(), Failure> {
        Ok(self.put_files(project, hash, content).await?)
    }

    async fn remove_template(&self, version: &TemplateVersion) -> Result<(), Failure> {
        Ok(self.remove_template(version).await?)
    }

    async fn prefer_template(&self, version: &TemplateVersion) -> Result<(), Failure> {
        Ok(self.prefer_template(version).await?)
    }

    async fn info(&self) -> Result<NodeInfo, Failure> {
        Ok(self.info().await?)
    }

    async fn collect(&self, dry_run: bool) -> Result<Garbage, Failure> {
        let kelvin_store::gc::Garbage { snapshots, images, guests } = self.collect(dry_run).await?;
        Ok(Garbage { snapshots, images, guests })
    }
}

#[async_trait]
impl SandboxTraffic for Node {
    async fn send(
        &self,
        sandbox: &SandboxId,
        request: Request<Inbound>,
    ) -> Result<Response<Outbound>, Unanswered> {
        let admitted = match self.admit(sandbox, request.method(), request.uri(), request.headers()) {
            Ok(admitted) => admitted,
            Err(error) => {
                return Err(Unanswered { failure: error.into(), unsent: Some(Box::new(request)) });
            }
        };
        let response = self.send_to(sandbox, &admitted, request).await.map_err(Failure::from)?;
        Ok(response.map(|body| body.map_err(std::io::Error::other).boxed_unsync()))
    }

    async fn route(&self, sandbox: &SandboxId) -> Result<Route, Failure> {
        Ok(self.route(sandbox)?)
    }

    async fn dial(&self, sandbox: &SandboxId, port: u16) -> Result<Box<dyn Io>, Failure> {
        Ok(Box::new(self.dial(sandbox, port).await?))
    }

    async fn signer(&self, signature: &Signature) -> Result<Option<SandboxId>, Failure> {
        Ok(self.signer(signature))
    }

    async fn holder(&self, token: &Token) -> Result<Option<SandboxId>, Failure> {
        Ok(self.holder(token.expose()))
    }

    async fn ended(&self, sandbox: &SandboxId) -> Result<Option<String>, Failure> {
        Ok(self.ended(sandbox))
    }
}
