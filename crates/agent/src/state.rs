//! What the agent knows of the sandbox it serves: set by activation, read by every request.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use connectrpc::ConnectError;
use http::HeaderMap;
use kelvin_api::guest::Activation;
use kelvin_api::id::same_secret;
use kelvin_api::sandbox::EnvVars;
use tokio::sync::Notify;

use crate::users::User;

/// The user whom requests mean that name none. Source: E2B's clients, envd 0.4.0.
const DEFAULT_USER: &str = "user";

/// Settings of the sandbox. Written by the control thread and by `/init`.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The sandbox, for its processes' environment.
    pub sandbox_id: String,
    /// Its template, for the same.
    pub template: String,
    /// What callers must show; empty asks for none.
    pub access_token: String,
    /// Environment of every new process.
    pub env_vars: EnvVars,
    /// The user of requests that name none, when it is not [`DEFAULT_USER`].
    pub default_user: Option<String>,
    /// The working directory of processes that name none, when it is not the home directory.
    pub default_workdir: Option<String>,
}

impl Settings {
    /// The environment of a new process: what the platform says, then what the sandbox's owner says.
    pub fn environment(&self) -> EnvVars {
        let mut all: EnvVars = [
            ("E2B_SANDBOX", "true"),
            ("E2B_SANDBOX_ID", &self.sandbox_id),
            ("E2B_TEMPLATE_ID", &self.template),
            ("KELVIN_SANDBOX_ID", &self.sandbox_id),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
        all.extend(self.env_vars.clone());
        all
    }
}

/// Shared between the control thread and the HTTP side.
#[derive(Debug, Default)]
pub struct State {
    settings: Mutex<Settings>,
    /// Whether the HTTP port has no connection and waits for one.
    http_waiting: Mutex<bool>,
    http_changed: Condvar,
    /// Told when the connection on the HTTP port is one of a former VMM.
    pub hang_up: Notify,
    /// Told when programs of the image may have to make themselves distinct.
    pub restored: Notify,
}

impl State {
    /// The settings, locked; hold it for a few reads or writes, never across a wait.
    pub fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves the sandbox of `activation` from now on.
    pub fn become_sandbox(&self, activation: Activation) {
        let mut settings = self.settings();
        settings.sandbox_id = activation.sandbox_id;
        settings.template = activation.template;
        settings.env_vars = activation.env_vars;
        settings.access_token = activation.access_token;
    }

    /// Says whether the HTTP port waits for a connection.
    pub fn set_http_waiting(&self, waiting: bool) {
        let mut is = self.http_waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if *is && !waiting {
            // A connection that ended by itself in the instant of a hang-up leaves the word behind: it is not the next
            // connection's.
            let _ = std::pin::pin!(self.hang_up.notified()).enable();
        }
        *is = waiting;
        self.http_changed.notify_all();
    }

    /// Whether the HTTP port waits for a connection.
    pub fn is_http_waiting(&self) -> bool {
        *self.http_waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the HTTP port's connection and waits, for `limit` at the most, until the port is at rest.
    pub fn end_http(&self, limit: Duration) {
        let waiting = self.http_waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if *waiting {
            return;
        }
        // Under the lock: told only while a connection is served, never while the port waits.
        self.hang_up.notify_one();
        let _ = self.http_changed.wait_timeout_while(waiting, limit, |waiting| !*waiting);
    }

    /// Whether the caller may speak to the agent at all.
    pub fn admits(&self, headers: &HeaderMap) -> bool {
        let settings = self.settings();
        settings.access_token.is_empty()
            || headers
                .get("x-access-token")
                .is_some_and(|token| same_secret(token.as_bytes(), settings.access_token.as_bytes()))
    }

    /// The user called `name`, or the default one.
    ///
    /// # Errors
    /// The text that clients look for when the image has no such user.
    pub fn user(&self, name: Option<&str>) -> Result<User, String> {
        let default = self.settings().default_user.clone();
        let name = name.filter(|name| !name.is_empty()).or(default.as_deref()).unwrap_or(DEFAULT_USER);
        User::find(name).ok_or_else(|| format!("invalid username: '{name}'"))
    }

    /// The user that a request names by Basic authentication, or the default one.
    ///
    /// # Errors
    /// `Unauthenticated` for a header that is not Basic or a user that is not there.
    pub fn user_of(&self, headers: &HeaderMap) -> Result<User, ConnectError> {
        let name = match headers.get("authorization") {
            None => None,
            Some(value) => Some(
                value
                    .to_str()
                    .ok()
                    .and_then(|text| text.strip_prefix("Basic "))
                    .and_then(|encoded| base64::engine::general_purpose::STANDARD.decode(encoded).ok())
                    .and_then(|bytes| String::from_utf8(bytes).ok())
                    .and_then(|pair| pair.split(':').next().map(str::to_owned))
                    .ok_or_else(|| ConnectError::unauthenticated("authorization has to be Basic user:"))?,
            ),
        };
        self.user(name.as_deref()).map_err(ConnectError::unauthenticated)
    }
}
