//! What an image says about the processes in it.
//!
//! Source: OCI image specification, `config.md`; `Shell` and `Healthcheck` are Docker's.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::digest::Digest;
use crate::error::Refusal;
use crate::limits::Limits;
use crate::manifest::json;

/// The configuration of an image. What it does not say is empty.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    /// Variables, in their order; of two of one name the later.
    pub env: Vec<(String, String)>,
    /// The working directory.
    pub workdir: String,
    /// `user`, `uid`, `user:group`, `uid:gid`.
    pub user: String,
    /// What is run.
    pub entrypoint: Vec<String>,
    /// Its arguments, or what is run when there is no entry point.
    pub cmd: Vec<String>,
    /// `80/tcp`.
    pub exposed_ports: Vec<String>,
    /// `SIGTERM`.
    pub stop_signal: Option<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Paths of volumes.
    pub volumes: Vec<String>,
    /// What runs a RUN in shell form.
    pub shell: Vec<String>,
    /// How a container is asked whether it is well.
    pub healthcheck: Option<Healthcheck>,
}

/// How a container is asked whether it is well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Healthcheck {
    /// `["NONE"]`, `["CMD", …]` or `["CMD-SHELL", command]`.
    pub test: Vec<String>,
    /// Between two times.
    pub interval: Option<Duration>,
    /// Of one.
    pub timeout: Option<Duration>,
    /// Before the first one counts.
    pub start_period: Option<Duration>,
    /// How many may fail in a row.
    pub retries: Option<u32>,
}

/// A configuration with what binds it to its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) config: Config,
    /// Digests of the layers' tar archives, lowest first.
    pub(crate) diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct RawFile {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    config: Option<RawConfig>,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(default)]
    diff_ids: Option<Vec<String>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    exposed_ports: Option<BTreeMap<String, IgnoredAny>>,
    stop_signal: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    volumes: Option<BTreeMap<String, IgnoredAny>>,
    shell: Option<Vec<String>>,
    healthcheck: Option<RawHealthcheck>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawHealthcheck {
    #[serde(default)]
    test: Option<Vec<String>>,
    /// Durations are nanoseconds; 0 is "inherit".
    #[serde(default)]
    interval: u64,
    #[serde(default)]
    timeout: u64,
    #[serde(default)]
    start_period: u64,
    #[serde(default)]
    retries: u32,
}

fn environment(lines: Vec<String>) -> Vec<(String, String)> {
    let mut variables: Vec<(String, String)> = Vec::new();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for line in lines {
        // A name without a value is what Docker unsets.
        let Some((name, value)) = line.split_once('=') else { continue };
        if name.is_empty() || line.contains('\0') {
            continue;
        }
        match places.get(name) {
            Some(&place) => value.clone_into(&mut variables[place].1),
            None => {
                places.insert(name.to_owned(), variables.len());
                variables.push((name.to_owned(), value.to_owned()));
            }
        }
    }
    variables
}

fn healthcheck(raw: RawHealthcheck) -> Option<Healthcheck> {
    let duration = |nanoseconds| (nanoseconds > 0).then(|| Duration::from_nanos(nanoseconds));
    let test = raw.test.filter(|test| !test.is_empty())?;
    Some(Healthcheck {
        test,
        interval: duration(raw.interval),
        timeout: duration(raw.timeout),
        start_period: duration(raw.start_period),
        retries: (raw.retries > 0).then_some(raw.retries),
    })
}

/// Reads the configuration of an image for linux/amd64 with `layers` layers.
///
/// # Errors
/// `Limit`, `Json`, `Platform`, `Algorithm`, `Ambiguous` when it has another number of layers.
pub(crate) fn read(bytes: &[u8], layers: usize, limits: &Limits) -> Result<Read, Refusal> {
    if bytes.len() as u64 > limits.config_bytes {
        return Err(Refusal::Limit { what: "bytes of the configuration", limit: limits.config_bytes });
    }
    let raw: RawFile = json(bytes)?;
    if (raw.os.as_str(), raw.architecture.as_str()) != ("linux", "amd64") {
        let other = format!("{}/{}", raw.os, raw.architecture);
        return Err(Refusal::Platform(crate::error::shown(other.as_bytes())));
    }
    let diff_ids = raw.rootfs.diff_ids.unwrap_or_default();
    if diff_ids.len() != layers {
        return Err(Refusal::Ambiguous("manifest and configuration have different numbers of layers"));
    }
    let diff_ids = diff_ids.iter().map(|id| Digest::parse(id)).collect::<Result<_, _>>()?;
    let raw = raw.config.unwrap_or_default();
    let config = Config {
        env: environment(raw.env.unwrap_or_default()),
        workdir: raw.working_dir.unwrap_or_default(),
        user: raw.user.unwrap_or_default(),
        entrypoint: raw.entrypoint.unwrap_or_default(),
        cmd: raw.cmd.unwrap_or_default(),
        exposed_ports: raw.exposed_ports.unwrap_or_default().into_keys().collect(),
        stop_signal: raw.stop_signal.filter(|signal| !signal.is_empty()),
        labels: raw.labels.unwrap_or_default(),
        volumes: raw.volumes.unwrap_or_default().into_keys().collect(),
        shell: raw.shell.unwrap_or_default(),
        healthcheck: raw.healthcheck.and_then(healthcheck),
    };
    Ok(Read { config, diff_ids })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_is_honoured_is_read() {
        let id = Digest::of(b"x");
        let text = format!(
            r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":["{id}"]}},"config":{{
            "Env":["A=1","B=x=y","A=2","C","=d"],"WorkingDir":"/app","User":"1000:1000","Entrypoint":["/e"],
            "Cmd":null,"ExposedPorts":{{"80/tcp":{{}}}},"StopSignal":"SIGINT","Labels":{{"l":"v"}},
            "Volumes":{{"/data":{{}}}},"Shell":["/bin/bash","-c"],"OnBuild":[],
            "Healthcheck":{{"Test":["CMD-SHELL","x"],"Interval":1000000000,"Retries":3}}}}}}"#
        );
        let Read { config, diff_ids } = read(text.as_bytes(), 1, &Limits::default()).unwrap();
        assert_eq!(diff_ids, [id]);
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(config.env, [pair("A", "2"), pair("B", "x=y")]);
        assert_eq!((config.workdir.as_str(), config.user.as_str()), ("/app", "1000:1000"));
        assert_eq!((config.entrypoint, config.cmd), (vec!["/e".to_owned()], Vec::new()));
        assert_eq!((config.exposed_ports, config.volumes), (vec!["80/tcp".into()], vec!["/data".into()]));
        let health = config.healthcheck.unwrap();
        assert_eq!((health.interval, health.timeout), (Some(Duration::from_secs(1)), None));
        assert_eq!(health.retries, Some(3));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let limits = Limits { config_bytes: 1000, ..Limits::default() };
        let refused = |text: &str| read(text.as_bytes(), 0, &limits).unwrap_err();
        let ours = r#""os":"linux","architecture":"amd64""#;
        assert!(read(format!("{{{ours},\"rootfs\":{{}}}}").as_bytes(), 0, &limits).is_ok());
        for bad in [
            "{}".to_owned(),
            format!("{{{ours}}}"),
            format!("{{{ours},{ours},\"rootfs\":{{}}}}"),
            format!(r#"{{{ours},"rootfs":{{}},"config":{{"Cmd":"x"}}}}"#),
            format!(r#"{{{ours},"rootfs":{{}},"config":{{"Healthcheck":{{"Interval":-1}}}}}}"#),
        ] {
            assert!(matches!(refused(&bad), Refusal::Json(_)), "{bad}");
        }
        let arm = r#"{"os":"linux","architecture":"arm64","rootfs":{}}"#;
        assert!(matches!(refused(arm), Refusal::Platform(other) if other == "linux/arm64"));
        let more = format!(r#"{{{ours},"rootfs":{{"diff_ids":["x"]}}}}"#);
        assert!(matches!(refused(&more), Refusal::Ambiguous(_)));
        assert!(matches!(refused(&" ".repeat(1001)), Refusal::Limit { .. }));
    }
}
