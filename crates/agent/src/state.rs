//! What the agent knows of the sandbox it serves: set by activation, read by every request.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use base64::Engine as _;
use connectrpc::ConnectError;
use http::HeaderMap;
use kelvin_api::guest::Activation;
use kelvin_api::id::same_secret;
use kelvin_api::image::{ImageDefaults, USER_HEADER};
use kelvin_api::sandbox::EnvVars;
use tokio::sync::Notify;

use crate::defaults::Defaults;
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
    /// What the image says, where nobody else says anything.
    pub image: ImageDefaults,
}

impl Settings {
    /// The environment of a new process: what the image says, then what the platform says, then what the sandbox's owner
    /// says.
    pub fn environment(&self) -> EnvVars {
        let mut all = self.image.env.clone();
        all.extend(
            [
                ("E2B_SANDBOX", "true"),
                ("E2B_SANDBOX_ID", &self.sandbox_id),
                ("E2B_TEMPLATE_ID", &self.template),
                ("KELVIN_SANDBOX_ID", &self.sandbox_id),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        all.extend(self.env_vars.clone());
        all
    }

    /// The working directory of a process that names none, when it is not the home directory.
    pub fn workdir(&self) -> Option<&str> {
        self.default_workdir.as_deref().or(self.image.workdir.as_deref())
    }
}

/// Shared between the control thread and the HTTP side.
#[derive(Debug, Default)]
pub struct State {
    settings: Mutex<Settings>,
    /// The file that [`Settings::image`] is of.
    defaults: Mutex<Defaults>,
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

    /// Takes what the image says of its processes, when that has changed. One system call when it has not.
    pub fn look_at_image(&self) {
        let mut defaults = match self.defaults.try_lock() {
            Ok(defaults) => defaults,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            // Another look is stuck at a file system that does not answer.
            Err(TryLockError::WouldBlock) => return,
        };
        if let Some(found) = defaults.look() {
            self.settings().image = found;
        }
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
        let default = {
            let settings = self.settings();
            settings.default_user.clone().or_else(|| settings.image.user.clone())
        };
        let name = name.filter(|name| !name.is_empty()).or(default.as_deref()).unwrap_or(DEFAULT_USER);
        User::find(name).ok_or_else(|| format!("invalid username: '{name}'"))
    }

    /// The user that a request names by Basic authentication or by [`USER_HEADER`], or the default one.
    ///
    /// # Errors
    /// `Unauthenticated` for a header that is not Basic or a user that is not there.
    pub fn user_of(&self, headers: &HeaderMap) -> Result<User, ConnectError> {
        let name = match headers.get("authorization") {
            None => headers
                .get(USER_HEADER)
                .map(|value| value.to_str().map(str::to_owned))
                .transpose()
                .map_err(|_| ConnectError::unauthenticated(format!("{USER_HEADER} has to name a user")))?,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn vars(pairs: &[(&str, &str)]) -> EnvVars {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn what_the_sandbox_says_wins_over_what_the_image_says() {
        let image = vars(&[("PATH", "/opt/bin"), ("A", "image"), ("B", "image"), ("E2B_SANDBOX", "no")]);
        let mut settings = Settings {
            sandbox_id: "i1".to_owned(),
            env_vars: vars(&[("B", "sandbox")]),
            image: ImageDefaults { env: image, workdir: Some("/app".to_owned()), user: None },
            ..Settings::default()
        };
        let all = settings.environment();
        for (name, value) in [("PATH", "/opt/bin"), ("A", "image"), ("B", "sandbox"), ("E2B_SANDBOX", "true")]
        {
            assert_eq!(all.get(name).map(String::as_str), Some(value));
        }
        assert_eq!(settings.workdir(), Some("/app"));
        settings.default_workdir = Some("/set".to_owned());
        assert_eq!(settings.workdir(), Some("/set"));
    }

    #[test]
    fn the_images_user_is_who_is_meant_when_nobody_is_named() {
        let state = State::default();
        state.settings().image.user = Some("4000000:4000001".to_owned());
        let of = |pairs: &[(&str, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(name.parse::<http::HeaderName>().unwrap(), value.parse().unwrap());
            }
            state.user_of(&headers).map(|user| (user.uid, user.gid))
        };
        assert_eq!(of(&[]).unwrap(), (4_000_000, 4_000_001));
        assert_eq!(of(&[("x-kelvin-user", "4000002:4000003")]).unwrap(), (4_000_002, 4_000_003));
        // `0:`
        let root = ("authorization", "Basic MDo=");
        assert_eq!(of(&[root, ("x-kelvin-user", "4000002")]).unwrap(), (0, 0));
        assert!(of(&[("x-kelvin-user", "no such user")]).is_err());
        assert!(of(&[("authorization", "Bearer x")]).is_err());
        state.settings().default_user = Some("0".to_owned());
        assert_eq!(of(&[]).unwrap(), (0, 0), "what was set wins over the image");
    }
}
