//! Which server, which key: flags, environment, configuration file.

use std::path::{Path, PathBuf};

use kelvin_api::id::Token;
use kelvin_client::Client;
use serde::Deserialize;

use crate::args::{Connection, data_dir};
use crate::output::Failed;

const DEFAULT_URL: &str = "http://127.0.0.1:7400";

/// `~/.config/kelvin/config.toml`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    api_url: Option<String>,
    api_key: Option<String>,
}

fn config_file() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config")))?;
    Some(base.join("kelvin/config.toml"))
}

fn read_file() -> Result<File, Failed> {
    let Some(path) = config_file() else {
        return Ok(File::default());
    };
    match std::fs::read_to_string(&path) {
        Ok(text) => toml::from_str(&text).map_err(|error| {
            Failed::new(
                format!("{} does not parse: {error}", path.display()),
                "it may have api_url and api_key",
            )
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(File::default()),
        Err(error) => Err(Failed::new(format!("{}: {error}", path.display()), "make it readable")),
    }
}

fn variable(names: [&str; 2]) -> Option<String> {
    names.into_iter().find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

fn read_key(path: &Path) -> Result<String, Failed> {
    std::fs::read_to_string(path).map(|text| text.trim().to_owned()).map_err(|error| {
        Failed::new(format!("{}: {error}", path.display()), "name a file that holds the API key")
    })
}

/// The client that `connection` and the environment describe.
pub fn client(connection: &Connection) -> Result<Client, Failed> {
    let file = read_file()?;
    let url = connection
        .api_url
        .clone()
        .or_else(|| variable(["KELVIN_API_URL", "E2B_API_URL"]))
        .or(file.api_url)
        .unwrap_or_else(|| DEFAULT_URL.to_owned());
    let key = match (&connection.api_key, &connection.api_key_file) {
        (Some(key), _) => Some(key.clone()),
        (None, Some(path)) => Some(read_key(path)?),
        (None, None) => variable(["KELVIN_API_KEY", "E2B_API_KEY"]).or(file.api_key),
    };
    let key = match key {
        Some(key) => key,
        // On the server's own machine its key is at hand for whoever may read it.
        None if url == DEFAULT_URL => read_key(&data_dir(None).join("api-key")).map_err(|_| no_key())?,
        None => return Err(no_key()),
    };
    Client::new(&url, Token::from_secret(key)).map_err(Failed::from)
}

/// A client of the server at `url` whose data directory is on this machine.
pub fn client_of(url: &str, data_dir: &Path) -> Result<Client, Failed> {
    let key = read_key(&data_dir.join("api-key"))?;
    Client::new(url, Token::from_secret(key)).map_err(Failed::from)
}

fn no_key() -> Failed {
    Failed::new(
        "there is no API key".to_owned(),
        "set KELVIN_API_KEY, or api_key in ~/.config/kelvin/config.toml; the server keeps it in <data-dir>/api-key",
    )
}
