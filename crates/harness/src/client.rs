//! Requests as clients send them: through the router, with an API key; each is written down with its answer.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::{Method, Request};
use http_body_util::BodyExt;
use kelvin_server::Server;
use serde_json::Value;

use crate::faults::Faults;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum Who {
    /// The server's own key, of project `default`.
    Admin,
    /// A key of project `blue`, with a limit of [`BLUES`] sandboxes.
    Blue,
    /// A key of project `green`.
    Green,
}

/// Sandboxes that `blue` may have run at one time.
pub const BLUES: usize = 3;

impl Who {
    /// Everybody.
    pub const ALL: [Self; 3] = [Self::Admin, Self::Blue, Self::Green];

    /// Its project.
    pub fn project(self) -> &'static str {
        match self {
            Self::Admin => "default",
            Self::Blue => "blue",
            Self::Green => "green",
        }
    }
}

/// The keys of everybody, in the order of [`Who::ALL`].
pub type Keys = [String; 3];

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its body; null when there is none.
    pub body: Value,
    /// How long it took.
    pub took: Duration,
}

impl Answer {
    /// Whether it is the one that was hoped for.
    pub fn is_good(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// A text of its body.
    pub fn text(&self, field: &str) -> String {
        self.body[field].as_str().unwrap_or_default().to_owned()
    }
}

/// How a request ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// It is under way, or the daemon died meanwhile.
    Open,
    /// Its client hung up.
    HungUp,
    /// It was answered.
    Answered(Arc<Answer>),
}

/// A request that was sent.
#[derive(Debug, Clone)]
pub struct Sent {
    /// Who asked.
    pub who: Who,
    /// Method and route, as the audit log has it.
    pub action: String,
    /// The sandbox or snapshot that it is about.
    pub target: String,
    /// In which life of the daemon.
    pub life: u32,
    /// How it ended.
    pub outcome: Outcome,
}

impl Sent {
    /// Its answer.
    pub fn answer(&self) -> Option<&Answer> {
        match &self.outcome {
            Outcome::Answered(answer) => Some(answer),
            Outcome::Open | Outcome::HungUp => None,
        }
    }
}

/// Everything that was asked in a case.
#[derive(Debug, Clone, Default)]
pub struct Book(Arc<Mutex<Vec<Arc<Sent>>>>);

impl Book {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Sent>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All requests, in the order in which they were sent.
    pub fn all(&self) -> Vec<Arc<Sent>> {
        self.lock().clone()
    }
}

/// A request.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Its method.
    pub method: Method,
    /// Its route, with `{}` for what it is about.
    pub route: &'static str,
    /// What it is about.
    pub target: String,
    /// Its body; null for none.
    pub body: Value,
    /// Headers beside the key.
    pub headers: Vec<(&'static str, String)>,
}

impl Ask {
    /// Method and route, as the audit log has them.
    pub fn action(&self) -> String {
        let id = if self.route.starts_with("/snapshots") { "{name}" } else { "{id}" };
        format!("{} {}", self.method, self.route.replace("{}", id))
    }

    /// A request without a body.
    pub fn new(method: Method, route: &'static str, target: &str) -> Self {
        Self { method, route, target: target.to_owned(), body: Value::Null, headers: Vec::new() }
    }

    /// A `POST` with a body.
    pub fn post(route: &'static str, target: &str, body: Value) -> Self {
        Self { body, ..Self::new(Method::POST, route, target) }
    }
}

type Replying = Pin<Box<dyn Future<Output = Response> + Send>>;
type Service = dyn Fn(Request<Body>) -> Replying + Send + Sync;

/// What requests are sent to: one life of a server.
#[derive(Clone)]
pub struct Client {
    service: Arc<Service>,
    keys: Arc<Keys>,
    book: Book,
    faults: Arc<Faults>,
    life: u32,
}

impl Client {
    /// A client of `server`, in its `life`.
    pub fn new(server: &Server, keys: Arc<Keys>, book: Book, faults: Arc<Faults>, life: u32) -> Self {
        let service = server.service();
        let service = move |request| -> Replying {
            let service = service.clone();
            Box::pin(async move {
                match tower::ServiceExt::oneshot(service, request).await {
                    Ok(response) => response,
                    Err(never) => match never {},
                }
            })
        };
        Self { service: Arc::new(service), keys, book, faults, life }
    }

    /// Sends a request and waits for its answer, or until `hang_up` ends.
    pub async fn ask_until(
        &self,
        who: Who,
        ask: Ask,
        hang_up: impl Future<Output = ()>,
    ) -> Option<Arc<Answer>> {
        let path = ask.route.replace("{}", &ask.target);
        let index = {
            let mut book = self.book.lock();
            let action = ask.action();
            let sent =
                Sent { who, action, target: ask.target.clone(), life: self.life, outcome: Outcome::Open };
            book.push(Arc::new(sent));
            book.len() - 1
        };
        self.faults.note(|| format!("#{index} {} {path} by {who:?}", ask.method));
        let key = Who::ALL.iter().position(|known| *known == who).map_or("", |at| &self.keys[at]);
        let mut request = Request::builder().method(ask.method).uri(path).header("x-api-key", key);
        for (name, value) in ask.headers {
            request = request.header(name, value);
        }
        let body = if ask.body.is_null() { Body::empty() } else { Body::from(ask.body.to_string()) };
        let Ok(request) = request.body(body) else { return None };
        let began = self.faults.now();
        let answering = async {
            let response = (self.service)(request).await;
            let status = response.status().as_u16();
            let body = response.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
        };
        let outcome = tokio::select! {
            biased;
            // First: a request is begun before its client can hang up.
            (status, body) = answering => {
                Outcome::Answered(Arc::new(Answer { status, body, took: self.faults.now() - began }))
            }
            () = hang_up => Outcome::HungUp,
        };
        self.faults.note(|| match &outcome {
            Outcome::Answered(answer) => {
                let told = answer.body["error_code"].as_str().unwrap_or_default();
                format!("#{index} -> {} {told}", answer.status)
            }
            _ => format!("#{index} -> hung up"),
        });
        Arc::make_mut(&mut self.book.lock()[index]).outcome = outcome.clone();
        match outcome {
            Outcome::Answered(answer) => Some(answer),
            Outcome::Open | Outcome::HungUp => None,
        }
    }

    /// Sends a request and waits for its answer.
    pub async fn ask(&self, who: Who, ask: Ask) -> Arc<Answer> {
        let never = || Arc::new(Answer { status: 0, body: Value::Null, took: Duration::ZERO });
        self.ask_until(who, ask, std::future::pending()).await.unwrap_or_else(never)
    }

    /// What a `GET` says.
    pub async fn get(&self, who: Who, route: &'static str) -> Value {
        self.ask(who, Ask::new(Method::GET, route, "")).await.body.clone()
    }

    /// What was asked.
    pub fn book(&self) -> &Book {
        &self.book
    }
}
