//! One client of a soak: what it asks for, and what it knows of its sandboxes.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kelvin_api::id::{SandboxId, Token};
use kelvin_api::sandbox::{ForkSandbox, NewSandbox, Sandbox};
use kelvin_client::{Client, Error};

use super::book::{Shared, Up};
use super::seed::Seed;
use crate::{LIMIT, shell};

/// Sandboxes that a client keeps at once.
const KEPT: usize = 3;
/// Seconds that a sandbox lives which nobody ends.
const LIFE_S: u64 = 7200;

/// What a client believes of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Belief {
    Runs,
    IsPaused,
    /// Something was asked for and its answer never came.
    Unsure {
        /// Whether that was its end.
        killed: bool,
    },
    /// Its time is over at this instant.
    Ends(Instant),
}

/// A sandbox that is kept beyond one operation.
#[derive(Debug)]
pub struct Kept {
    pub id: SandboxId,
    token: Option<Token>,
    /// What only its memory holds.
    secret: String,
    pub belief: Belief,
}

/// A client and what it has.
#[derive(Debug)]
pub struct Worker {
    number: u64,
    seed: Seed,
    pub kept: Vec<Kept>,
    /// What it has killed and was told so, in this round.
    pub killed: Vec<SandboxId>,
    made: u64,
}

fn body(template: &str) -> NewSandbox {
    NewSandbox { template_id: template.to_owned(), timeout: Some(LIFE_S), ..NewSandbox::default() }
}

/// Runs a shell command in a sandbox; what it printed.
async fn run_in(
    client: &Client,
    id: &SandboxId,
    token: Option<Token>,
    script: &str,
) -> Result<String, Error> {
    let agent = client.agent(id, token, None)?;
    let (_, stdout, _) = agent.run(&shell(script), 4096).await?;
    Ok(String::from_utf8_lossy(&stdout).trim().to_owned())
}

/// Whether the memory of a sandbox is its own.
pub async fn is_itself(client: &Client, kept: &Kept) -> Result<bool, Error> {
    let found = run_in(client, &kept.id, kept.token.clone(), "cat /dev/shm/secret").await?;
    Ok(found == kept.secret)
}

impl Worker {
    /// A client that has nothing.
    pub fn new(number: u64) -> Self {
        Self { number, seed: Seed::of(&[]), kept: Vec::new(), killed: Vec::new(), made: 0 }
    }

    /// Which one it is.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Begins a round with these choices.
    pub fn begin(&mut self, seed: Seed) {
        self.seed = seed;
        self.killed.clear();
    }

    /// Everything that it has was ended.
    pub fn forget(&mut self) {
        self.kept.clear();
    }

    /// Works until it is time, and ends what it is doing.
    pub async fn work(mut self, shared: Arc<Shared>, until: Instant) -> Self {
        while Instant::now() < until {
            let up = shared.up().await;
            self.step(&shared, &up).await;
        }
        self
    }

    async fn step(&mut self, shared: &Shared, up: &Up) {
        match self.seed.below(100) {
            0..8 if self.kept.len() < KEPT => self.keep(shared, up).await,
            8..13 => self.end(shared, up).await,
            13..22 => self.pause_or_resume(shared, up).await,
            22..27 => self.fork(shared, up).await,
            27..31 => self.snapshot(shared, up).await,
            31..33 => self.expire(shared, up).await,
            33..50 => self.cut(shared, up).await,
            _ => self.brief(shared, up).await,
        }
    }

    /// A kept sandbox of which it knows that it is `wanted`; the place in the list.
    fn some(&mut self, wanted: &[Belief]) -> Option<usize> {
        let fit: Vec<usize> =
            (0..self.kept.len()).filter(|&at| wanted.contains(&self.kept[at].belief)).collect();
        (!fit.is_empty()).then(|| fit[self.seed.below(fit.len() as u64) as usize])
    }

    /// Kills one that only this operation knew.
    async fn kill(&mut self, shared: &Shared, up: &Up, id: &SandboxId) {
        if answered(shared, up, "kill", up.client.kill(id)).await.is_some() {
            self.killed.push(id.clone());
        }
    }

    async fn create(&mut self, shared: &Shared, up: &Up, body: &NewSandbox) -> Option<Sandbox> {
        let created = answered(shared, up, "create", up.client.create(body, None)).await?;
        Some(created.sandbox)
    }

    async fn brief(&mut self, shared: &Shared, up: &Up) {
        if let Some(sandbox) = self.create(shared, up, &body("base")).await {
            self.kill(shared, up, &sandbox.sandbox_id).await;
        }
    }

    async fn keep(&mut self, shared: &Shared, up: &Up) {
        let Some(sandbox) = self.create(shared, up, &body("base")).await else { return };
        self.made += 1;
        let secret = format!("{} {} {}", self.number, self.made, sandbox.sandbox_id);
        let (id, token) = (sandbox.sandbox_id, sandbox.envd_access_token);
        let script = format!("echo '{secret}' >/dev/shm/secret");
        match answered(shared, up, "command", run_in(&up.client, &id, token.clone(), &script)).await {
            Some(_) => self.kept.push(Kept { id, token, secret, belief: Belief::Runs }),
            // Without its secret it is of no use; what is not killed by this is found at the end of the round.
            None => self.kill(shared, up, &id).await,
        }
    }

    async fn end(&mut self, shared: &Shared, up: &Up) {
        let Some(at) = self.some(&[Belief::Runs, Belief::IsPaused]) else {
            return self.brief(shared, up).await;
        };
        self.kept[at].belief = Belief::Unsure { killed: true };
        let id = self.kept[at].id.clone();
        if answered(shared, up, "kill", up.client.kill(&id)).await.is_some() {
            self.killed.push(id);
            self.kept.swap_remove(at);
        }
    }

    async fn pause_or_resume(&mut self, shared: &Shared, up: &Up) {
        let Some(at) = self.some(&[Belief::Runs, Belief::IsPaused]) else {
            return self.brief(shared, up).await;
        };
        let (id, was) = (self.kept[at].id.clone(), self.kept[at].belief);
        self.kept[at].belief = Belief::Unsure { killed: false };
        if was == Belief::Runs {
            if answered(shared, up, "pause", up.client.pause(id.as_str())).await.is_some() {
                self.kept[at].belief = Belief::IsPaused;
            }
        } else if answered(shared, up, "resume", up.client.resume(id.as_str(), LIFE_S)).await.is_some() {
            self.kept[at].belief = Belief::Runs;
            if answered(shared, up, "command", is_itself(&up.client, &self.kept[at])).await == Some(false) {
                shared.fault(format!("sandbox {id} was resumed with another memory"));
            }
        }
    }

    async fn fork(&mut self, shared: &Shared, up: &Up) {
        let Some(at) = self.some(&[Belief::Runs]) else { return self.brief(shared, up).await };
        let count = 1 + self.seed.below(2);
        let wanted = ForkSandbox {
            count: Some(u32::try_from(count).expect("one or two")),
            timeout: Some(LIFE_S),
            ..ForkSandbox::default()
        };
        let id = self.kept[at].id.clone();
        self.kept[at].belief = Belief::Unsure { killed: false };
        let Some((results, _)) = answered(shared, up, "fork", up.client.fork(id.as_str(), &wanted)).await
        else {
            return;
        };
        self.kept[at].belief = Belief::Runs;
        let secret = self.kept[at].secret.clone();
        for result in results {
            if let Some(error) = result.error {
                shared.judge("child of a fork", up, &Error::Refused(error));
            }
            let Some(child) = result.sandbox else { continue };
            shared.did("child of a fork");
            let script = "cat /dev/shm/secret";
            let token = child.envd_access_token.clone();
            let found =
                answered(shared, up, "command", run_in(&up.client, &child.sandbox_id, token, script)).await;
            if found.is_some_and(|found| found != secret) {
                shared.fault(format!("a child of {id} has another memory"));
            }
            self.kill(shared, up, &child.sandbox_id).await;
        }
    }

    /// A snapshot, a sandbox from it, and both are gone again.
    async fn snapshot(&mut self, shared: &Shared, up: &Up) {
        let Some(at) = self.some(&[Belief::Runs, Belief::IsPaused]) else {
            return self.brief(shared, up).await;
        };
        let (id, was) = (self.kept[at].id.clone(), self.kept[at].belief);
        self.kept[at].belief = Belief::Unsure { killed: false };
        let taken = answered(shared, up, "snapshot", up.client.snapshot(id.as_str(), None)).await;
        let Some((info, _)) = taken else { return };
        self.kept[at].belief = was;
        if let Some(made) = self.create(shared, up, &body(&info.snapshot_id)).await {
            self.kill(shared, up, &made.sandbox_id).await;
        }
        // Its sandbox may still be on its way out: then it is deleted at the end of the round.
        let deleted = tokio::time::timeout(LIMIT, up.client.delete_snapshot(&info.snapshot_id, false)).await;
        match deleted {
            Ok(Ok(())) => shared.did("delete snapshot"),
            Ok(Err(Error::Refused(refused))) if refused.code == 409 => shared.did("delete snapshot, in use"),
            Ok(Err(error)) => shared.judge("delete snapshot", up, &error),
            Err(_) => shared.fault(format!("delete snapshot: no answer within {LIMIT:?}")),
        }
    }

    /// A sandbox that ends by itself.
    async fn expire(&mut self, shared: &Shared, up: &Up) {
        if self.kept.len() >= KEPT {
            return self.brief(shared, up).await;
        }
        let short = NewSandbox { timeout: Some(1), ..body("base") };
        if let Some(sandbox) = self.create(shared, up, &short).await {
            let belief = Belief::Ends(Instant::now() + Duration::from_secs(1));
            let (id, token) = (sandbox.sandbox_id, sandbox.envd_access_token);
            self.kept.push(Kept { id, token, secret: String::new(), belief });
        }
    }

    /// A request whose client leaves at some instant.
    async fn cut(&mut self, shared: &Shared, up: &Up) {
        let after = Duration::from_micros(self.seed.below(90_000));
        let choice = self.seed.below(8);
        let wanted: &[Belief] = if choice == 2 { &[Belief::IsPaused] } else { &[Belief::Runs] };
        let Some(at) = self.some(wanted).filter(|_| choice < 6) else {
            // Nobody knows its id then: it is found at the end of the round.
            match tokio::time::timeout(after, up.client.create(&body("base"), None)).await {
                Err(_) => shared.did("client left: create"),
                Ok(Ok(created)) => {
                    shared.did("create");
                    self.kill(shared, up, &created.sandbox.sandbox_id).await;
                }
                Ok(Err(error)) => shared.judge("create", up, &error),
            }
            return;
        };
        let id = self.kept[at].id.clone();
        self.kept[at].belief = Belief::Unsure { killed: choice == 0 };
        let client = &up.client;
        let fork = ForkSandbox { count: Some(2), timeout: Some(LIFE_S), ..ForkSandbox::default() };
        let (name, left) = match choice {
            0 => ("client left: kill", left(after, client.kill(&id)).await),
            1 | 3 => ("client left: pause", left(after, client.pause(id.as_str())).await),
            2 => ("client left: resume", left(after, client.resume(id.as_str(), LIFE_S)).await),
            4 => ("client left: fork", left(after, client.fork(id.as_str(), &fork)).await),
            _ => ("client left: snapshot", left(after, client.snapshot(id.as_str(), None)).await),
        };
        match left {
            None => shared.did(name),
            // It was there to the end; what became of its sandbox is looked at with the others.
            Some(Ok(())) => shared.did("client nearly left"),
            Some(Err(error)) => shared.judge(name, up, &error),
        }
    }
}

/// How a call ended for a client that leaves after a while; `None` when it left before.
async fn left<T>(after: Duration, call: impl Future<Output = Result<T, Error>>) -> Option<Result<(), Error>> {
    tokio::time::timeout(after, call).await.ok().map(|result| result.map(drop))
}

/// The answer of a call that has to be answered; an error is judged.
async fn answered<T>(
    shared: &Shared,
    up: &Up,
    what: &'static str,
    call: impl Future<Output = Result<T, Error>>,
) -> Option<T> {
    match tokio::time::timeout(LIMIT, call).await {
        Ok(Ok(value)) => {
            shared.did(what);
            Some(value)
        }
        Ok(Err(error)) => {
            shared.judge(what, up, &error);
            None
        }
        Err(_) => {
            shared.fault(format!("{what}: no answer within {LIMIT:?}"));
            None
        }
    }
}
