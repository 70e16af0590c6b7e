#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use kelvin_api::account::Project;
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::{BuildId, FilesHash, SandboxId, SnapshotId, TemplateName, TemplateVersion, Token};
use kelvin_api::network::{NetworkState, Policy};
use kelvin_api::sandbox::{
    GuestMetrics, NodeInfo, PauseMode, PoolInfo, SetPool, SnapshotInfo, SnapshotVerification, Template,
};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Remote, serve};
use crate::{
    Bake, Build, BuildEvent, BuildFailure, BuildFrom, BuildLevel, BuildStage, BuildStep, BuildTold, Built,
    Changes, Child, ConsoleLine, Create, Created, FilesContent, Forked, Garbage, Import, ImportTold,
    Instruction, Live, NodeService, Paused, RegistryCredentials, RegistryReach, Source, Taken,
};

/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(30);

async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, work).await.expect("it takes too long")
}

type Asked = (Build, BuildTold, oneshot::Sender<Result<Built, BuildFailure>>);

/// A node that builds what a test says.
struct Builder {
    asked: mpsc::Sender<Asked>,
    uploaded: Mutex<Vec<Result<usize, String>>>,
}

fn unknown(code: ErrorCode) -> Failure {
    Failure::new(code, "it is not here", "look elsewhere").with_cause(&std::io::Error::other("why"))
}

fn nothing<T>() -> Result<T, Failure> {
    Err(unknown(ErrorCode::NodeStopping))
}

#[async_trait]
impl NodeService for Builder {
    async fn build(&self, request: Build, told: BuildTold) -> Result<Built, BuildFailure> {
        let (answer, answered) = oneshot::channel();
        self.asked.send((request, told, answer)).await.unwrap();
        answered.await.unwrap()
    }
    async fn cancel_build(&self, _: &BuildId) -> Result<(), Failure> {
        Err(unknown(ErrorCode::BuildNotFound))
    }
    async fn has_files(&self, project: &Project, hash: &FilesHash) -> Result<bool, Failure> {
        Ok(project.as_str() == "blue" && hash.as_str().starts_with('a'))
    }
    async fn put_files(&self, _: &Project, hash: &FilesHash, content: FilesContent) -> Result<(), Failure> {
        if hash.as_str().starts_with('b') {
            return Err(unknown(ErrorCode::FilesRefused));
        }
        let sizes = content.map(|piece| piece.map(|bytes| bytes.len()).map_err(|error| error.to_string()));
        let sizes: Vec<Result<usize, String>> = sizes.collect().await;
        let whole = sizes.into_iter().sum();
        self.uploaded.lock().await.push(whole);
        Ok(())
    }
    async fn remove_template(&self, version: &TemplateVersion) -> Result<(), Failure> {
        assert!(version.build.is_some(), "{version}");
        Err(unknown(ErrorCode::TemplateNotFound))
    }
    async fn prefer_template(&self, version: &TemplateVersion) -> Result<(), Failure> {
        assert!(version.build.is_none(), "{version}");
        Err(unknown(ErrorCode::TagNotFound))
    }
    async fn create(&self, _: Create) -> Result<Created, Failure> {
        nothing()
    }
    async fn kill(&self, _: &SandboxId) -> Result<(), Failure> {
        nothing()
    }
    async fn set_deadline(&self, _: &SandboxId, _: jiff::Timestamp) -> Result<(), Failure> {
        nothing()
    }
    async fn set_policy(&self, _: &SandboxId, _: Policy) -> Result<(), Failure> {
        nothing()
    }
    async fn network(&self, _: &SandboxId) -> Result<NetworkState, Failure> {
        nothing()
    }
    async fn metrics(&self, _: &SandboxId) -> Result<GuestMetrics, Failure> {
        nothing()
    }
    async fn console(&self, _: &SandboxId) -> Result<Vec<ConsoleLine>, Failure> {
        nothing()
    }
    async fn source(&self, _: &str) -> Result<Option<Source>, Failure> {
        nothing()
    }
    async fn pause(&self, _: &SandboxId, _: PauseMode, _: bool) -> Result<Paused, Failure> {
        nothing()
    }
    async fn resume(
        &self,
        _: &SandboxId,
        _: Option<jiff::Timestamp>,
        _: PauseMode,
    ) -> Result<Created, Failure> {
        nothing()
    }
    async fn snapshot(
        &self,
        _: &SandboxId,
        _: SnapshotId,
        _: Option<TemplateName>,
        _: PauseMode,
    ) -> Result<Taken, Failure> {
        nothing()
    }
    async fn fork(&self, _: &SandboxId, _: Vec<Child>) -> Result<Forked, Failure> {
        nothing()
    }
    async fn snapshots(&self) -> Result<Vec<SnapshotInfo>, Failure> {
        nothing()
    }
    async fn remove_snapshot(&self, _: &SnapshotId, _: bool) -> Result<(), Failure> {
        nothing()
    }
    async fn verify_snapshot(&self, _: &SnapshotId) -> Result<SnapshotVerification, Failure> {
        nothing()
    }
    async fn pools(&self) -> Result<Vec<PoolInfo>, Failure> {
        nothing()
    }
    async fn set_pool(&self, _: &TemplateName, _: SetPool) -> Result<(), Failure> {
        nothing()
    }
    async fn one(&self, _: &SandboxId) -> Result<Option<Live>, Failure> {
        nothing()
    }
    async fn live(&self) -> Result<Vec<Live>, Failure> {
        nothing()
    }
    async fn changes(&self, _: u64) -> Result<Changes, Failure> {
        nothing()
    }
    async fn templates(&self) -> Result<Vec<Template>, Failure> {
        nothing()
    }
    async fn import(&self, _: Import, _: ImportTold) -> Result<Template, Failure> {
        nothing()
    }
    async fn bake(&self, _: Bake) -> Result<SnapshotId, Failure> {
        nothing()
    }
    async fn info(&self) -> Result<NodeInfo, Failure> {
        nothing()
    }
    async fn collect(&self, _: bool) -> Result<Garbage, Failure> {
        nothing()
    }
}

struct World {
    remote: Remote,
    asked: mpsc::Receiver<Asked>,
    node: Arc<Builder>,
    _stop: DropGuard,
}

async fn world() -> World {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: http::Uri = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    let (asked, there) = mpsc::channel(1);
    let node = Arc::new(Builder { asked, uploaded: Mutex::default() });
    let stop = CancellationToken::new();
    // There are no sandboxes: traffic goes nowhere.
    let traffic = Arc::new(Remote::new(http::Uri::from_static("http://127.0.0.1:1")));
    tokio::spawn(serve(listener, Arc::clone(&node) as _, traffic, stop.clone()));
    World { remote: Remote::new(address), asked: there, node, _stop: stop.drop_guard() }
}

fn build() -> Build {
    let password = Token::from_secret("hush".to_owned());
    Build {
        build: BuildId::random(),
        template: "web".parse().unwrap(),
        project: "blue".parse().unwrap(),
        stages: vec![BuildStage {
            from: BuildFrom::Scratch,
            steps: vec![BuildStep {
                instruction: Instruction::Run {
                    command: String::new(),
                    user: None,
                    argv: Some(vec!["/tool".to_owned(), "-c".to_owned()]),
                },
                force: false,
                shown: "RUN /tool -c".to_owned(),
            }],
        }],
        from: BuildFrom::Image {
            reference: "python:3.12".to_owned(),
            credentials: Some(RegistryCredentials { username: "u".to_owned(), password }),
            reach: RegistryReach::Public,
        },
        steps: vec![BuildStep {
            instruction: Instruction::Run { command: "make".to_owned(), user: None, argv: None },
            force: true,
            shown: "RUN make".to_owned(),
        }],
        force: false,
        start: Some("serve".to_owned()),
        ready: None,
        kernel: Some("/boot/vmlinux".into()),
        vcpus: Some(2),
        memory_mib: None,
        disk_mib: None,
        min_free_mib: None,
        deadline: Duration::from_millis(90_001),
    }
}

fn event(message: &str) -> BuildEvent {
    let at = jiff::Timestamp::from_millisecond(1_700_000_000_123).unwrap();
    BuildEvent { at, level: BuildLevel::Warn, step: Some(1), message: message.to_owned() }
}

fn built() -> Built {
    let template = serde_json::json!({ "templateID": "web", "buildID": "i", "cpuCount": 1, "memoryMB": 2, "diskSizeMB": 3,
        "public": false, "aliases": ["web"], "names": ["web"], "createdAt": "2025-01-01T00:00:00Z",
        "updatedAt": "2025-01-01T00:00:00Z", "createdBy": null, "lastSpawnedAt": null, "spawnCount": 0, "buildCount": 1,
        "envdVersion": "0", "buildStatus": "ready", "snapshots": [] });
    let template = serde_json::from_value(template).unwrap();
    Built { template, from_digest: Some("sha256:aa".to_owned()), cached_steps: 3 }
}

#[tokio::test]
async fn a_build_is_told_of_line_by_line_and_ends_whole() {
    let mut world = world().await;
    let failure = BuildFailure { step: Some(4), failure: unknown(ErrorCode::BuildStepFailed) };
    for end in [Ok(built()), Err(failure)] {
        let (told, mut events) = mpsc::channel(1);
        let (request, remote) = (build(), world.remote.clone());
        let building = tokio::spawn({
            let request = request.clone();
            async move { remote.build(request, told).await }
        });
        let (asked, tell, answer) = soon(world.asked.recv()).await.unwrap();
        assert_eq!(asked, request);
        // More than anything holds: they come as they are read.
        let telling = tokio::spawn(async move {
            for number in 0..500 {
                tell.send(event(&format!("line {number}"))).await.unwrap();
            }
        });
        for number in 0..500 {
            assert_eq!(soon(events.recv()).await, Some(event(&format!("line {number}"))));
        }
        soon(telling).await.unwrap();
        assert!(!building.is_finished());
        answer.send(end.clone()).unwrap();
        assert_eq!(soon(building).await.unwrap(), end);
        assert_eq!(soon(events.recv()).await, None);
    }
}

#[tokio::test]
async fn a_build_goes_on_when_nobody_reads_it() {
    let mut world = world().await;
    let (told, mut events) = mpsc::channel(1);
    let remote = world.remote.clone();
    let building = tokio::spawn(async move { remote.build(build(), told).await });
    let (_, tell, mut answer) = soon(world.asked.recv()).await.unwrap();
    tell.send(event("one")).await.unwrap();
    assert_eq!(soon(events.recv()).await, Some(event("one")));
    // Who reads has gone: nothing changes.
    drop(events);
    for _ in 0..200 {
        tell.send(event("unread")).await.unwrap();
    }
    building.abort();
    soon(tell.closed()).await;
    assert!(futures::poll!(std::pin::pin!(answer.closed())).is_pending(), "it was given up");
    answer.send(Ok(built())).unwrap();
    // One that the node never heard of.
    let refused = soon(world.remote.cancel_build(&BuildId::random())).await.unwrap_err();
    assert_eq!(refused, unknown(ErrorCode::BuildNotFound));
    let web: TemplateName = "web".parse().unwrap();
    let version = TemplateVersion::of(web.clone(), BuildId::random());
    let refused = soon(world.remote.remove_template(&version)).await.unwrap_err();
    assert_eq!(refused, unknown(ErrorCode::TemplateNotFound));
    let refused = soon(world.remote.prefer_template(&web.into())).await.unwrap_err();
    assert_eq!(refused, unknown(ErrorCode::TagNotFound));
}

#[tokio::test]
async fn an_upload_is_whole_or_is_not_one() {
    let (world, blue) = (world().await, "blue".parse::<Project>().unwrap());
    let hash = |digit: char| digit.to_string().repeat(64).parse::<FilesHash>().unwrap();
    assert!(soon(world.remote.has_files(&blue, &hash('a'))).await.unwrap());
    assert!(!soon(world.remote.has_files(&Project::default(), &hash('a'))).await.unwrap());
    let piece = || Ok(Bytes::from(vec![7; 1 << 20]));
    // More than is on its way at one time.
    for count in [0, 1, 4] {
        let content = stream::iter((0..count).map(move |_| piece()));
        soon(world.remote.put_files(&blue, &hash('a'), Box::pin(content))).await.unwrap();
        assert_eq!(world.node.uploaded.lock().await.pop(), Some(Ok(count << 20)));
    }
    // What is refused is refused in the middle, with the reason.
    let content = stream::iter((0..4).map(move |_| piece()));
    let refused = soon(world.remote.put_files(&blue, &hash('b'), Box::pin(content))).await.unwrap_err();
    assert_eq!(refused, unknown(ErrorCode::FilesRefused));
    let cut = stream::iter([piece(), Err(std::io::ErrorKind::ConnectionReset.into())]);
    let refused = soon(world.remote.put_files(&blue, &hash('a'), Box::pin(cut))).await.unwrap_err();
    assert_eq!(refused.error_code, ErrorCode::BodyCut);
    assert!(world.node.uploaded.lock().await.pop().unwrap().is_err(), "it was taken for a whole one");
    // A caller that goes away in the middle, once the node has begun.
    let (remote, (begun, mut has_begun)) = (world.remote.clone(), mpsc::channel(1));
    let endless = stream::unfold(begun, |begun| async move {
        let _ = begun.send(()).await;
        Some((Ok(Bytes::from(vec![7; 1 << 20])), begun))
    });
    let leaving = tokio::spawn(async move { remote.put_files(&blue, &hash('a'), Box::pin(endless)).await });
    for _ in 0..3 {
        soon(has_begun.recv()).await.unwrap();
    }
    leaving.abort();
    let seen = soon(async {
        loop {
            if let Some(seen) = world.node.uploaded.lock().await.pop() {
                return seen;
            }
            tokio::task::yield_now().await;
        }
    });
    assert!(seen.await.is_err(), "it was taken for a whole one");
}
