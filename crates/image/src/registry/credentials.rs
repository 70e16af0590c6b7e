//! Credentials of a registry: of the request, or of Docker's configuration and its helpers.
//!
//! The configuration is read anew each time, so that `docker login` counts at once. Nothing of it, and nothing that a helper
//! prints, stands in an error.
//!
//! Source: docker/cli `cli/config/configfile`, docker/docker-credential-helpers.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kelvin_api::id::Token;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::error::Error;

/// A user and its password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user; `<token>` when the password is an identity token.
    pub username: String,
    /// Its password, or a token.
    pub password: Token,
}

/// Bytes of the configuration.
const MAX_CONFIG: u64 = 1 << 20;
/// Bytes that a helper prints.
const MAX_ANSWER: u64 = 64 << 10;
/// How long a helper may take.
const HELPER: Duration = Duration::from_secs(30);
/// What Docker calls its own registry there.
const HUB: &str = "https://index.docker.io/v1/";
/// The user name that says that the password is an identity token.
pub(super) const IDENTITY: &str = "<token>";

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct DockerConfig {
    auths: BTreeMap<String, Auth>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Auth {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "Username")]
    username: String,
    #[serde(rename = "Secret")]
    secret: String,
}

/// `key` of the configuration, without what may stand around a host.
fn host_of_key(key: &str) -> &str {
    let bare = key.trim_start_matches("https://").trim_start_matches("http://");
    bare.split('/').next().unwrap_or(bare)
}

impl Auth {
    fn read(&self) -> Option<Credentials> {
        let of = |username: &str, secret: &str| Credentials {
            username: username.to_owned(),
            password: Token::from_secret(secret.to_owned()),
        };
        if !self.identitytoken.is_empty() {
            return Some(of(IDENTITY, &self.identitytoken));
        }
        if !self.auth.is_empty() {
            let text = String::from_utf8(STANDARD.decode(self.auth.trim()).ok()?).ok()?;
            let (username, password) = text.split_once(':')?;
            return Some(of(username, password.trim_end_matches('\0')));
        }
        (!self.username.is_empty()).then(|| of(&self.username, &self.password))
    }
}

/// The credentials that the configuration at `path` has for the registry at `authority`, a host with an optional port; none
/// when it has none, or when there is no such file.
///
/// # Errors
/// `Denied` when the configuration cannot be read, or a helper fails.
pub(super) async fn look_up(path: &Path, authority: &str) -> Result<Option<Credentials>, Error> {
    let denied = |reason: String| Error::Denied { registry: authority.to_owned(), reason };
    let text = match read(path).await {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(denied(format!("the configuration of Docker cannot be read: {}", error.kind())));
        }
    };
    // serde_json's own text could quote the file.
    let config: DockerConfig = serde_json::from_slice(&text).map_err(|error| {
        denied(format!("the configuration of Docker is not understood, line {}", error.line()))
    })?;
    let is_hub = matches!(authority, "registry-1.docker.io" | "index.docker.io" | "docker.io");
    let server = if is_hub { HUB } else { authority };
    let names: &[&str] = match is_hub {
        true => &[HUB, "docker.io", "index.docker.io", "registry-1.docker.io"],
        false => &[authority],
    };
    let helper = names.iter().find_map(|name| config.cred_helpers.get(*name)).or(config.creds_store.as_ref());
    if let Some(helper) = helper
        && let Some(found) = ask(helper, server).await.map_err(denied)?
    {
        return Ok(Some(found));
    }
    let fits = |key: &str| names.contains(&key) || names.contains(&host_of_key(key));
    Ok(config.auths.iter().filter(|(key, _)| fits(key)).find_map(|(_, auth)| auth.read()))
}

async fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let file = tokio::fs::File::open(path).await?;
    file.take(MAX_CONFIG + 1).read_to_end(&mut text).await?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(std::io::ErrorKind::FileTooLarge.into());
    }
    Ok(text)
}

/// Asks `docker-credential-NAME`, which is looked for in `PATH`, for `server`.
async fn ask(name: &str, server: &str) -> Result<Option<Credentials>, String> {
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
        return Err("the name of a credential helper is none".to_owned());
    }
    let program = format!("docker-credential-{name}");
    let failed = |why: &str| format!("{program} {why}");
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(&format!("cannot be started: {}", error.kind())))?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let talk = async {
        if let Some(mut stdin) = stdin {
            // One that does not read has ended, or answers without.
            let _ = stdin.write_all(format!("{server}\n").as_bytes()).await;
        }
        let mut answer = Vec::new();
        if let Some(stdout) = stdout {
            stdout.take(MAX_ANSWER + 1).read_to_end(&mut answer).await?;
        }
        std::io::Result::Ok((answer, child.wait().await?))
    };
    let (answer, status) = tokio::time::timeout(HELPER, talk)
        .await
        .map_err(|_| failed("did not answer for 30 s"))?
        .map_err(|error| failed(&format!("failed: {}", error.kind())))?;
    if answer.len() as u64 > MAX_ANSWER {
        return Err(failed("printed too much"));
    }
    if !status.success() {
        // What they all print, with exit code 1, for a server that they do not know.
        let says = String::from_utf8_lossy(&answer).to_lowercase();
        return if says.contains("credentials not found") { Ok(None) } else { Err(failed("failed")) };
    }
    let answer: Answer = serde_json::from_slice(&answer).map_err(|_| failed("printed no credentials"))?;
    Ok((!answer.secret.is_empty())
        .then(|| Credentials { username: answer.username, password: Token::from_secret(answer.secret) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn found(config: &str, authority: &str) -> Option<(String, String)> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        std::fs::write(&path, config).unwrap();
        let found = look_up(&path, authority).await.unwrap()?;
        Some((found.username, found.password.expose().to_owned()))
    }

    #[tokio::test]
    async fn auths_are_found_by_host() {
        let auth = STANDARD.encode("me:pa:ss");
        let config = format!(
            r#"{{"auths":{{"{HUB}":{{"auth":"{auth}"}},"https://host:5000/v2/":{{"auth":"{auth}"}},
            "ghcr.io":{{"identitytoken":"it"}},"empty.example":{{}}}},"other":1}}"#
        );
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(found(&config, "registry-1.docker.io").await, pair("me", "pa:ss"));
        assert_eq!(found(&config, "host:5000").await, pair("me", "pa:ss"));
        assert_eq!(found(&config, "ghcr.io").await, pair("<token>", "it"));
        for other in ["host", "host:5001", "empty.example", "evil.example"] {
            assert_eq!(found(&config, other).await, None, "{other}");
        }
        assert_eq!(look_up(Path::new("/no/such/file"), "x").await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_configuration_that_is_none_is_an_error_without_its_text() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        for (text, why) in [
            (r#"{"auths": "sesame"}"#, "line 1"),
            (r#"{"credsStore": "../sesame"}"#, "none"),
            (r#"{"credsStore": "no-such-helper-sesame"}"#, "cannot be started"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = look_up(&path, "x.example").await.unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
            assert!(!error.contains("\"sesame"), "{error}");
        }
    }
}
