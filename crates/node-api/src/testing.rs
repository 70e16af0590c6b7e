//! What every node keeps to, whoever asks it how: one function for each promise, to be run against a node with one template
//! that is baked, room for a few machines of it, and nothing on it.
//!
//! A function panics when a promise is broken; it leaves nothing behind when it is kept.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use kelvin_api::account::Project;
use kelvin_api::error::{ErrorCode, Failure, Kind};
use kelvin_api::id::{BuildId, FilesHash, SandboxId, SnapshotId, TemplateName, TemplateVersion, Token};
use kelvin_api::import::ImportStage;
use kelvin_api::network::{Policy, Wanted};
use kelvin_api::sandbox::{Lifecycle, PauseMode, SandboxState, SetPool, StartPath};
use kelvin_api::units::MemoryMib;
use tokio::sync::watch;

use crate::{Bake, Base, Child, Create, Import, Inbound, NodeService, SandboxTraffic, Unanswered};

/// The answer of a node that makes no builds.
const NO_BUILDS: (Kind, ErrorCode) = (Kind::Conflict, ErrorCode::BuildUnsupported);
/// How long something may take that is told later.
const SOON: Duration = Duration::from_secs(30);
/// How long the sandboxes of the suite live: longer than it takes.
const LONG: jiff::SignedDuration = jiff::SignedDuration::from_hours(2);

/// A node to be tested.
#[derive(Clone)]
pub struct Subject {
    /// What changes and tells.
    pub node: Arc<dyn NodeService>,
    /// The way in.
    pub traffic: Arc<dyn SandboxTraffic>,
    /// The template that is there.
    pub template: TemplateName,
    /// What it was imported with.
    pub imported: Import,
    /// What time it is there.
    pub now: Arc<dyn Fn() -> jiff::Timestamp + Send + Sync>,
}

/// Every promise, one after the other.
pub async fn all(subject: &Subject) {
    a_sandbox_lives_from_its_create_to_its_kill(subject).await;
    a_failure_says_what_and_why(subject).await;
    a_pause_keeps_a_sandbox_until_it_is_resumed(subject).await;
    a_snapshot_outlives_its_sandbox(subject).await;
    children_of_a_fork_are_made_each_for_itself(subject).await;
    what_sleeps_is_reached_once_it_was_woken_up(subject).await;
    what_carries_a_secret_alone_finds_its_sandbox(subject).await;
    resources_are_told(subject).await;
    a_template_is_imported_while_the_node_runs(subject).await;
}

async fn soon<T>(what: &str, waiting: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, waiting).await.unwrap_or_else(|_| panic!("{what} takes longer than {SOON:?}"))
}

fn code<T: std::fmt::Debug>(result: Result<T, Failure>) -> (Kind, ErrorCode) {
    let failure = result.expect_err("a refusal");
    assert!(!failure.message.is_empty() && !failure.remediation.is_empty(), "{failure:?}");
    (failure.kind, failure.error_code)
}

impl Subject {
    fn create(&self) -> Create {
        Create {
            sandbox: SandboxId::random(),
            project: Project::default(),
            base: Base::Template(self.template.clone().into()),
            vcpus: None,
            memory_mib: None,
            env_vars: [("KELVIN".to_owned(), "contract".to_owned())].into(),
            access_token: Some(Token::random()),
            ends_at: (self.now)() + LONG,
            start_path: Some(StartPath::Clone),
            probe_tcp: false,
            network: Wanted::None,
            lifecycle: Lifecycle::default(),
            timeout: Duration::from_secs(600),
        }
    }

    /// A sandbox that runs, and its access token.
    async fn made(&self, lifecycle: Lifecycle) -> (SandboxId, Token) {
        let request = Create { lifecycle, ..self.create() };
        let (id, token) = (request.sandbox.clone(), request.access_token.clone());
        self.node.create(request).await.expect("a sandbox");
        (id, token.expect("it was given one"))
    }
}

/// A sandbox is told of from its create to its end, and its end with a reason.
pub async fn a_sandbox_lives_from_its_create_to_its_kill(subject: &Subject) {
    let node = &subject.node;
    let before = node.changes(u64::MAX).await.expect("a node tells what it has").generation;
    let request = subject.create();
    let id = request.sandbox.clone();
    let created = node.create(request.clone()).await.expect("a sandbox");
    assert_eq!(created.start_path, StartPath::Clone);
    assert!(created.timings.iter().count() > 0 && !created.reason.is_empty(), "{created:?}");
    let live = node.one(&id).await.expect("it is told of").expect("it is there");
    assert_eq!(
        (live.state, live.shape, live.start_path),
        (SandboxState::Running, created.shape, StartPath::Clone)
    );
    assert!(node.live().await.expect("all are told of").contains(&live));
    // Its id is the key of its create: there is no second one.
    assert_eq!(code(node.create(request).await), (Kind::Conflict, ErrorCode::SandboxExists));
    let later = (subject.now)() + LONG + LONG;
    node.set_deadline(&id, later).await.expect("a later deadline");
    let moved = node.one(&id).await.expect("it is told of").expect("it is there").ends_at;
    assert!(moved.duration_since(later).abs() < jiff::SignedDuration::from_secs(2), "{moved} and {later}");
    node.console(&id).await.expect("a console");
    node.metrics(&id).await.expect("what its guest uses");
    node.kill(&id).await.expect("its end");
    assert_eq!(node.one(&id).await.expect("it is told of"), None);
    let changes = soon("its end", node.changes(before)).await.expect("changes");
    assert!(changes.generation > before && changes.ended.contains_key(&id), "{changes:?}");
    let reason = subject.traffic.ended(&id).await.expect("why it ended");
    assert_eq!(reason.as_ref(), changes.ended.get(&id));
}

/// A failure comes with its kind, its code and what to do, whatever was asked.
pub async fn a_failure_says_what_and_why(subject: &Subject) {
    let (node, nobody) = (&subject.node, SandboxId::random());
    let gone = (Kind::NotFound, ErrorCode::SandboxNotFound);
    assert_eq!(code(node.kill(&nobody).await), gone);
    assert_eq!(code(node.pause(&nobody, PauseMode::Full, false).await), gone);
    assert_eq!(code(node.resume(&nobody, None, PauseMode::Full).await), gone);
    assert_eq!(code(node.console(&nobody).await), gone);
    assert_eq!(code(node.fork(&nobody, Vec::new()).await), gone);
    assert_eq!(code(subject.traffic.route(&nobody).await), gone);
    let refused = subject.traffic.dial(&nobody, 80).await.err().expect("nobody is there");
    assert_eq!((refused.kind, refused.error_code), gone);
    assert_eq!(subject.traffic.ended(&nobody).await.expect("nothing is known of it"), None);
    assert_eq!(node.source("nothing-of-that-name").await.expect("a look"), None);
    let kept = SnapshotId::random();
    assert_eq!(code(node.verify_snapshot(&kept).await), (Kind::NotFound, ErrorCode::NotFound));
    // What a node without builds says of all of them.
    let said = code(node.cancel_build(&BuildId::random()).await);
    assert!([(Kind::NotFound, ErrorCode::BuildNotFound), NO_BUILDS].contains(&said), "{said:?}");
    let unknown: TemplateVersion = "nothing-of-that-name".parse().expect("a name");
    let said = code(node.remove_template(&unknown).await);
    assert!([(Kind::NotFound, ErrorCode::TemplateNotFound), NO_BUILDS].contains(&said), "{said:?}");
    let version = TemplateVersion::of(subject.template.clone(), BuildId::random());
    assert_eq!(node.source(&version.to_string()).await.expect("a look"), None, "there is no such version");
    for said in [code(node.remove_template(&version).await), code(node.prefer_template(&version).await)] {
        assert!([(Kind::NotFound, ErrorCode::TemplateNotFound), NO_BUILDS].contains(&said), "{said:?}");
    }
    let hash: FilesHash = "ab".repeat(32).parse().expect("a hash");
    match node.has_files(&Project::default(), &hash).await {
        Ok(has) => assert!(!has, "nobody has uploaded them"),
        refused => assert_eq!(code(refused), NO_BUILDS),
    }
    let unknown = Base::Template("nothing-of-that-name".parse().expect("a name"));
    let request = Create { base: unknown, ..subject.create() };
    let failure = node.create(request).await.expect_err("no such template");
    assert_eq!((failure.kind, failure.error_code), (Kind::NotFound, ErrorCode::NotFound));
    let large = Create { memory_mib: Some(MemoryMib(u32::MAX)), start_path: None, ..subject.create() };
    assert_eq!(code(node.create(large.clone()).await), (Kind::Invalid, ErrorCode::InvalidShape));
    assert_eq!(node.one(&large.sandbox).await.expect("a look"), None, "nothing of it is left");
    let rule = SetPool { min: Some(2), max: Some(1), max_age_s: None };
    let refused = node.set_pool(&subject.template, rule).await;
    assert_eq!(code(refused), (Kind::Invalid, ErrorCode::InvalidPool));
}

/// A paused sandbox stays what it was, and each state refuses what belongs to the other.
pub async fn a_pause_keeps_a_sandbox_until_it_is_resumed(subject: &Subject) {
    let node = &subject.node;
    let (id, _) = subject.made(Lifecycle::default()).await;
    let running = node.one(&id).await.expect("a look").expect("it runs");
    assert_eq!(
        code(node.resume(&id, None, PauseMode::Full).await),
        (Kind::Conflict, ErrorCode::SandboxRunning)
    );
    let paused = node.pause(&id, PauseMode::Full, true).await.expect("a pause");
    assert!(paused.timings.iter().count() > 0, "{paused:?}");
    let frozen = node.one(&id).await.expect("a look").expect("it is there");
    assert_eq!(frozen.state, SandboxState::Paused);
    assert!(frozen.rank() > running.rank());
    let refused = (Kind::Conflict, ErrorCode::SandboxPaused);
    assert_eq!(code(node.pause(&id, PauseMode::Full, false).await), refused);
    assert_eq!(code(node.metrics(&id).await), refused);
    let ends_at = (subject.now)() + LONG;
    node.resume(&id, Some(ends_at), PauseMode::Full).await.expect("it goes on");
    let again = node.one(&id).await.expect("a look").expect("it runs");
    assert_eq!((again.state, again.shape), (SandboxState::Running, running.shape));
    assert!(again.rank() > frozen.rank());
    node.pause(&id, PauseMode::Filesystem, false).await.expect("a pause without memory");
    node.kill(&id).await.expect("its end, paused");
    assert_eq!(node.one(&id).await.expect("a look"), None);
}

/// A kept snapshot is there by its id until it is deleted, whatever became of its sandbox.
pub async fn a_snapshot_outlives_its_sandbox(subject: &Subject) {
    let node = &subject.node;
    let (id, _) = subject.made(Lifecycle::default()).await;
    let (kept, name): (_, TemplateName) = (SnapshotId::random(), "kept".parse().expect("a name"));
    let taken = node.snapshot(&id, kept.clone(), Some(name), PauseMode::Full).await.expect("a snapshot");
    assert_eq!(taken.snapshot.snapshot_id, kept.to_string());
    assert_eq!(taken.snapshot.names, ["kept"]);
    node.kill(&id).await.expect("its end");
    let listed = node.snapshots().await.expect("a list");
    assert!(listed.iter().any(|info| info.snapshot_id == kept.to_string()), "{listed:?}");
    let source = node.source(kept.as_str()).await.expect("a look").expect("it can be started from");
    assert_eq!(source.base, Base::Snapshot(kept.clone()));
    let verified = node.verify_snapshot(&kept).await.expect("it is read");
    assert_eq!(verified.snapshot_id, kept.to_string());
    let request = Create { base: source.base, ..subject.create() };
    let child = request.sandbox.clone();
    node.create(request).await.expect("a sandbox of it");
    assert_eq!(code(node.remove_snapshot(&kept, false).await), (Kind::Conflict, ErrorCode::InUse));
    node.kill(&child).await.expect("its end");
    node.remove_snapshot(&kept, false).await.expect("nothing needs it");
    assert_eq!(node.source(kept.as_str()).await.expect("a look"), None);
}

/// Each child of a fork is made, or is a failure in its place.
pub async fn children_of_a_fork_are_made_each_for_itself(subject: &Subject) {
    let node = &subject.node;
    let (id, _) = subject.made(Lifecycle::default()).await;
    let child = |sandbox: SandboxId| Child {
        sandbox,
        project: Project::default(),
        access_token: None,
        traffic_token: None,
        env_vars: [("CHILD".to_owned(), "yes".to_owned())].into(),
        ends_at: (subject.now)() + LONG,
        timeout: Duration::from_secs(60),
    };
    let (good, twice) = (SandboxId::random(), id.clone());
    let forked = node.fork(&id, vec![child(good.clone()), child(twice)]).await.expect("a fork");
    let [made, refused] = &forked.children[..] else { panic!("two were asked for: {forked:?}") };
    assert!(made.is_ok(), "{made:?}");
    // The other has the id of one that runs.
    assert_eq!(code(refused.clone()), (Kind::Conflict, ErrorCode::SandboxExists));
    for id in [good, id] {
        node.kill(&id).await.expect("its end");
    }
}

fn ask(token: Option<&Token>, body: &'static [u8]) -> Request<Inbound> {
    let mut request = Request::builder().method(Method::GET).uri("http://agent/metrics");
    if let Some(token) = token {
        request = request.header("x-access-token", token.expose());
    }
    let body = Full::new(Bytes::from_static(body)).map_err(|never| match never {}).boxed_unsync();
    request.version(http::Version::HTTP_2).body(body).expect("a request")
}

/// A visitor of a sandbox that sleeps gets its request back, whole, to send it again; a stranger does not hear that it would
/// wake up.
pub async fn what_sleeps_is_reached_once_it_was_woken_up(subject: &Subject) {
    let (node, traffic) = (&subject.node, &subject.traffic);
    let (id, token) = subject.made(Lifecycle { auto_resume: true, ..Lifecycle::default() }).await;
    let answer = traffic.send(&id, ask(Some(&token), b"")).await.expect("it runs");
    assert_eq!(answer.status(), StatusCode::OK);
    let body = answer.into_body().collect().await.expect("a whole body").to_bytes();
    assert!(body.starts_with(b"{"), "{body:?}");
    node.pause(&id, PauseMode::Full, false).await.expect("a pause");
    let route = traffic.route(&id).await.expect("what to check first");
    assert!(route.access_token == Some(token.clone()));
    let Unanswered { failure, .. } = traffic.send(&id, ask(None, b"")).await.expect_err("a stranger");
    assert_eq!(failure.error_code, ErrorCode::SandboxPaused);
    let refused = traffic.send(&id, ask(Some(&token), b"a body")).await.expect_err("it sleeps");
    assert_eq!(
        (refused.failure.kind, refused.failure.error_code),
        (Kind::Conflict, ErrorCode::SandboxAsleep)
    );
    let dialled = traffic.dial(&id, 80).await.err().expect("it sleeps");
    assert_eq!(dialled.error_code, ErrorCode::SandboxAsleep);
    assert_eq!(node.one(&id).await.expect("a look").map(|live| live.state), Some(SandboxState::Paused));
    let request = *refused.unsent.expect("nothing was sent of it");
    assert_eq!(request.headers()["x-access-token"], token.expose());
    node.resume(&id, None, PauseMode::Full).await.expect("somebody wakes it up");
    let answer = traffic.send(&id, request).await.expect("the same request again");
    assert_eq!(answer.status(), StatusCode::OK);
    answer.into_body().collect().await.expect("a whole body");
    node.kill(&id).await.expect("its end");
    // Only its owner wakes this one.
    let (id, token) = subject.made(Lifecycle::default()).await;
    node.pause(&id, PauseMode::Full, false).await.expect("a pause");
    let refused = traffic.send(&id, ask(Some(&token), b"")).await.expect_err("it is paused");
    assert_eq!(refused.failure.error_code, ErrorCode::SandboxPaused);
    assert_eq!(code(traffic.route(&id).await), (Kind::Conflict, ErrorCode::SandboxPaused));
    node.kill(&id).await.expect("its end");
}

/// A token, or a signature that was made with it, is enough to find a sandbox.
pub async fn what_carries_a_secret_alone_finds_its_sandbox(subject: &Subject) {
    use kelvin_api::signature::{Operation, Signature, sign};
    let (id, token) = subject.made(Lifecycle::default()).await;
    let traffic = &subject.traffic;
    assert_eq!(traffic.holder(&token).await.expect("a look"), Some(id.clone()));
    assert_eq!(traffic.holder(&Token::random()).await.expect("a look"), None);
    for (secret, found) in [(&token, Some(&id)), (&Token::random(), None)] {
        let text = sign("/a", Operation::Read, "", secret.expose(), None).replace('+', "%2B");
        let uri = format!("/files?path=/a&signature={text}").parse().expect("a path");
        let signature = Signature::of(&Method::GET, &uri).expect("it is signed");
        assert_eq!(traffic.signer(&signature).await.expect("a look").as_ref(), found);
    }
    subject.node.kill(&id).await.expect("its end");
}

/// What a node has is told as the public API tells it.
pub async fn resources_are_told(subject: &Subject) {
    let (node, name) = (&subject.node, subject.template.to_string());
    let info = node.info().await.expect("what runs");
    assert!(info.memory_mb > 0 && !info.version.is_empty(), "{info:?}");
    let templates = node.templates().await.expect("templates");
    assert_eq!(templates.iter().map(|template| &template.template_id).collect::<Vec<_>>(), [&name]);
    let source = node.source(&name).await.expect("a look").expect("it is a template");
    assert_eq!(source.base, Base::Template(subject.template.clone().into()));
    let bake = Bake {
        template: subject.template.clone().into(),
        vcpus: None,
        memory_mib: None,
        waiting_vmms: None,
        network: Some(false),
    };
    let baked = node.bake(bake).await.expect("it is baked already");
    let known: BTreeSet<_> =
        templates[0].snapshots.iter().map(|snapshot| snapshot.snapshot_id.clone()).collect();
    assert!(known.contains(baked.as_str()), "{baked} of {known:?}");
    let rule = SetPool { min: Some(0), max: Some(0), max_age_s: Some(60) };
    node.set_pool(&subject.template, rule).await.expect("no warm machines");
    let pools = node.pools().await.expect("pools");
    assert!(pools.iter().any(|pool| pool.template_id == name && pool.max_age_s == 60), "{pools:?}");
    let garbage = node.collect(true).await.expect("what nothing needs");
    assert!(!garbage.snapshots.contains(&baked.to_string()), "{garbage:?}");
    let (id, _) = subject.made(Lifecycle::default()).await;
    assert!(!node.network(&id).await.expect("its network").attached);
    let refused = node.set_policy(&id, Policy::default()).await;
    assert_eq!(code(refused), (Kind::Conflict, ErrorCode::NoNetwork));
    node.kill(&id).await.expect("its end");
}

/// An import tells how far it is, and goes on when its caller leaves; creates find what it made. One that fails changes nothing.
pub async fn a_template_is_imported_while_the_node_runs(subject: &Subject) {
    let (node, name) = (&subject.node, subject.template.as_str());
    let has = async || node.source(name).await.expect("a look").expect("it is a template").shape.memory_mib;
    let with = |memory_mib| Import { memory_mib, ..subject.imported.clone() };
    let before = has().await;
    let (other, third) = (MemoryMib(before.0 + 1), MemoryMib(before.0 + 2));
    let (told, progress) = watch::channel(None);
    let odd = Import { kernel: subject.imported.kernel.join("below"), ..with(other) };
    assert_eq!(code(node.import(odd, told).await), (Kind::Invalid, ErrorCode::InvalidFile));
    let (told, nothing) = watch::channel(None);
    let none = with(MemoryMib(0));
    assert_eq!(code(node.import(none, told).await), (Kind::Invalid, ErrorCode::InvalidShape));
    assert_eq!((has().await, *progress.borrow(), *nothing.borrow()), (before, None, None));

    let (told, progress) = watch::channel(None);
    let template = node.import(with(other), told).await.expect("an import");
    assert_eq!((template.template_id.as_str(), template.memory_mb), (name, other.0));
    assert_eq!(has().await, other, "it is there when its import returns");
    assert!(node.templates().await.expect("templates").contains(&template));
    let last = progress.borrow().expect("it was told of");
    assert_eq!((last.stage, last.done_bytes), (ImportStage::Publishing, last.total_bytes));

    // A caller that leaves once it has begun.
    let (told, mut progress) = watch::channel(None);
    tokio::select! {
        imported = node.import(with(third), told) => drop(imported.expect("an import")),
        begun = progress.wait_for(Option::is_some) => drop(begun.expect("it is told of")),
    }
    let ended = async {
        while has().await != third {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    soon("an import without its caller", ended).await;
    let again = async {
        loop {
            match node.import(with(before), watch::channel(None).0).await {
                // It is seen before it has ended.
                Err(failure) if failure.error_code == ErrorCode::TemplateImporting => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                imported => return imported.expect("an import"),
            }
        }
    };
    soon("another import", again).await;
    assert_eq!(has().await, before);
}
