//! What a build begins with, as a request has it: checked before anything is started.

use std::net::IpAddr;
use std::path::PathBuf;

use kelvin_api::build::{RegistryLogin, StartBuild, TemplateStage};
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_node_api::{BuildFrom, RegistryCredentials, RegistryReach};

use crate::accounts::Account;
use crate::admission::not_an_admin;

/// Stages of one build, beside its own steps.
const MOST_STAGES: usize = 64;
/// Bytes of an image's reference.
const MOST_REFERENCE: usize = 512;
/// Bytes of a start or a ready command.
const MOST_COMMAND: usize = 64 << 10;
/// Who pulls with a key of a service account. Source: Google's Artifact Registry.
const GCP_USER: &str = "_json_key";

/// What a request begins with; a template by the name that was given, which somebody has yet to look up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum From {
    Node(BuildFrom),
    Template(String),
}

fn refuse<T>(text: impl Into<String>, remedy: &str) -> Result<T, Failure> {
    Err(Failure::new(ErrorCode::InvalidImage, text, remedy))
}

/// The host of a reference, without its port: none of one that names no registry.
fn host(reference: &str) -> Option<&str> {
    let (first, _) = reference.split_once('/')?;
    if let Some(inside) = first.strip_prefix('[') {
        return Some(inside.split_once(']').map_or(inside, |(address, _)| address));
    }
    let is_host = first.contains(['.', ':']) || first.eq_ignore_ascii_case("localhost");
    is_host.then(|| first.split_once(':').map_or(first, |(host, _)| host))
}

/// Whether a host is this machine, or on its link, as the metadata of clouds are. What a name resolves to is for who connects.
fn is_of_this_machine(host: &str) -> bool {
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    if name == "localhost" || name.ends_with(".localhost") {
        return true;
    }
    match name.parse::<IpAddr>().map(|address| address.to_canonical()) {
        Ok(IpAddr::V4(address)) => {
            address.is_loopback() || address.is_link_local() || address.octets()[0] == 0
        }
        Ok(IpAddr::V6(address)) => {
            address.is_loopback() || address.is_unspecified() || address.is_unicast_link_local()
        }
        // `127.1`, `0x7f.1`: what the C library takes for an address, and no name of a registry.
        Err(_) => name
            .rsplit('.')
            .next()
            .is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()) || last.starts_with("0x")),
    }
}

fn reference(caller: &Account, text: &str) -> Result<String, Failure> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_graphic()) && !text.starts_with(['/', '-', '.']);
    if text.is_empty() || text.len() > MOST_REFERENCE || !is_plain || text.contains("://") {
        let shown: String = text.chars().take(80).collect();
        return refuse(
            format!("fromImage {shown:?} is no reference of an image"),
            "for example python:3.12, or host:5000/team/app:1",
        );
    }
    if host(text).is_some_and(is_of_this_machine) && !caller.is_admin {
        return Err(not_an_admin());
    }
    Ok(text.to_owned())
}

fn credentials(login: RegistryLogin) -> Result<RegistryCredentials, Failure> {
    match login {
        RegistryLogin::Registry { username, password } => Ok(RegistryCredentials { username, password }),
        RegistryLogin::Gcp { service_account_json: password } => {
            let is_json =
                serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(password.expose());
            if is_json.is_err() {
                let text = "serviceAccountJson is no JSON object";
                return Err(Failure::new(ErrorCode::InvalidRequest, text, "send the key's file as it is"));
            }
            Ok(RegistryCredentials { username: GCP_USER.to_owned(), password })
        }
        RegistryLogin::Aws { .. } => Err(Failure::new(
            ErrorCode::UnsupportedField,
            "fromImageRegistry of type aws is not supported by this version",
            "get a password with `aws ecr get-login-password`, and use type registry with the username AWS",
        )),
    }
}

fn local(caller: &Account, field: &str, text: &str) -> Result<PathBuf, Failure> {
    if !caller.is_admin {
        return Err(not_an_admin());
    }
    let path = PathBuf::from(text);
    if path.is_absolute() && !text.contains('\0') {
        return Ok(path);
    }
    let shown: String = text.chars().take(80).collect();
    let text = format!("{field} {shown:?} is not an absolute path");
    Err(Failure::new(ErrorCode::InvalidFile, text, "name a file or directory on the server's machine"))
}

/// What a request begins with.
///
/// # Errors
/// `InvalidImage` for none, several or one that is no reference, `NotAnAdmin` for what is this machine's own,
/// `UnsupportedField`, `InvalidFile`.
pub(super) fn from(caller: &Account, body: &mut StartBuild) -> Result<From, Failure> {
    let texts = [&body.from_image, &body.from_template, &body.from_layout, &body.from_archive];
    let others = [body.from_stage.is_some(), body.scratch == Some(true)];
    let given = texts.into_iter().map(Option::is_some).chain(others);
    if given.filter(|is_given| *is_given).count() != 1 {
        return refuse(
            "a build, or a stage, begins with exactly one of fromImage, fromTemplate, fromLayout, fromArchive, fromStage \
             and scratch",
            "name one",
        );
    }
    let login = body.from_image_registry.take();
    if login.is_some() && body.from_image.is_none() {
        return refuse("fromImageRegistry says who pulls fromImage, and there is none", "leave it out");
    }
    if let Some(text) = &body.from_image {
        let reference = reference(caller, text)?;
        let credentials = login.map(credentials).transpose()?;
        // What a name resolves to, and where a registry sends a pull, is judged by who connects.
        let reach = if caller.is_admin { RegistryReach::Any } else { RegistryReach::Public };
        return Ok(From::Node(BuildFrom::Image { reference, credentials, reach }));
    }
    if let Some(text) = &body.from_layout {
        return Ok(From::Node(BuildFrom::Layout(local(caller, "fromLayout", text)?)));
    }
    if let Some(text) = &body.from_archive {
        return Ok(From::Node(BuildFrom::Archive(local(caller, "fromArchive", text)?)));
    }
    if let Some(stage) = body.from_stage {
        return Ok(From::Node(BuildFrom::Stage(stage)));
    }
    if body.scratch == Some(true) {
        return Ok(From::Node(BuildFrom::Scratch));
    }
    Ok(From::Template(body.from_template.take().unwrap_or_default()))
}

/// What a build begins with, and each of its stages, in their order, the build itself last.
///
/// # Errors
/// As of [`from`], and `InvalidStep` for too many stages and one that names no earlier one.
pub(super) fn all_from(caller: &Account, body: &mut StartBuild) -> Result<Vec<From>, Failure> {
    if body.stages.len() > MOST_STAGES {
        let text = format!("a build has at most {MOST_STAGES} stages, this one has {}", body.stages.len());
        return Err(Failure::new(ErrorCode::InvalidStep, text, "leave out what is not needed"));
    }
    let mut all = Vec::new();
    for stage in &mut body.stages {
        let TemplateStage {
            from_image, from_image_registry, from_template, from_layout, from_archive, ..
        } = stage;
        let mut one = StartBuild {
            from_image: from_image.take(),
            from_image_registry: from_image_registry.take(),
            from_template: from_template.take(),
            from_layout: from_layout.take(),
            from_archive: from_archive.take(),
            from_stage: stage.from_stage,
            scratch: stage.scratch,
            ..StartBuild::default()
        };
        all.push(from(caller, &mut one)?);
    }
    all.push(from(caller, body)?);
    for (at, from) in all.iter().enumerate() {
        if let From::Node(BuildFrom::Stage(stage)) = from
            && usize::try_from(*stage).is_ok_and(|stage| stage >= at)
        {
            let text = format!("stage {at} begins with stage {stage}, which is no earlier one");
            return Err(Failure::new(
                ErrorCode::InvalidStep,
                text,
                "stages are counted from 0, the build's own is last",
            ));
        }
    }
    Ok(all)
}

/// The kernel that a build asks for.
///
/// # Errors
/// `NotAnAdmin` for a caller to whom files of this machine are none of their business, `InvalidFile`.
pub(super) fn kernel(caller: &Account, text: Option<&str>) -> Result<Option<PathBuf>, Failure> {
    text.map(|text| local(caller, "kernel", text)).transpose()
}

/// A start or a ready command; an empty one is none.
///
/// # Errors
/// `InvalidStep` for what no command can be.
pub(super) fn command(field: &str, text: Option<String>) -> Result<Option<String>, Failure> {
    let text = text.filter(|text| !text.trim().is_empty());
    match &text {
        Some(command) if command.contains('\0') || command.len() > MOST_COMMAND => Err(Failure::new(
            ErrorCode::InvalidStep,
            format!("{field} has a NUL byte, or more than {MOST_COMMAND} bytes"),
            "keep it in a file of the template",
        )),
        _ => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(is_admin: bool) -> Account {
        Account::for_test(is_admin)
    }

    fn secret(from: &From) -> Option<(&str, &str)> {
        match from {
            From::Node(BuildFrom::Image { credentials: Some(of), .. }) => {
                Some((&of.username, of.password.expose()))
            }
            _ => None,
        }
    }

    fn image(text: &str) -> StartBuild {
        StartBuild { from_image: Some(text.to_owned()), ..StartBuild::default() }
    }

    #[test]
    fn a_registry_of_this_machine_is_the_operators() {
        for (text, is_ours) in [
            ("ubuntu", false),
            ("python:3.12", false),
            ("library/ubuntu", false),
            ("example.org/a/b@sha256:aa", false),
            ("example.org:5000/a", false),
            ("127.0.0.1.example.org/a", false),
            ("localhost/a", true),
            ("LOCALHOST:5000/a", true),
            ("registry.localhost:5000/a", true),
            ("127.0.0.1:5000/a", true),
            ("127.9.9.9/a", true),
            ("0.0.0.0:80/a", true),
            ("[::1]:5000/a", true),
            ("[::ffff:127.0.0.1]/a", true),
            ("127.1:80/a", true),
            ("169.254.169.254/a", true),
            ("[fe80::1]:80/a", true),
            ("[::ffff:169.254.169.254]/a", true),
            ("0x7f.1/a", true),
            ("2130706433:80/a", true),
        ] {
            assert!(from(&caller(true), &mut image(text)).is_ok(), "{text}");
            let refused = from(&caller(false), &mut image(text)).err().map(|failure| failure.error_code);
            assert_eq!(refused, is_ours.then_some(ErrorCode::NotAnAdmin), "{text}");
        }
    }

    #[test]
    fn the_operator_alone_pulls_from_every_address() {
        for (is_admin, expected) in [(false, RegistryReach::Public), (true, RegistryReach::Any)] {
            let found = from(&caller(is_admin), &mut image("example.org/a")).unwrap();
            assert!(
                matches!(found, From::Node(BuildFrom::Image { reach, .. }) if reach == expected),
                "{found:?}"
            );
        }
    }

    #[test]
    fn what_a_build_begins_with_is_one_thing() {
        let one = |text: &str| Some(text.to_owned());
        let base = StartBuild::default();
        for (mut body, code) in [
            (base.clone(), ErrorCode::InvalidImage),
            (StartBuild { from_template: one("base"), ..image("a") }, ErrorCode::InvalidImage),
            (image(""), ErrorCode::InvalidImage),
            (image("-a"), ErrorCode::InvalidImage),
            (image("/etc/passwd"), ErrorCode::InvalidImage),
            (image("a b"), ErrorCode::InvalidImage),
            (image("https://example.org/a"), ErrorCode::InvalidImage),
            (image(&"a".repeat(MOST_REFERENCE + 1)), ErrorCode::InvalidImage),
            (StartBuild { from_layout: one("a"), ..base.clone() }, ErrorCode::InvalidFile),
            (StartBuild { from_archive: one("/a\0"), ..base.clone() }, ErrorCode::InvalidFile),
        ] {
            let shown = format!("{body:?}");
            assert_eq!(from(&caller(true), &mut body).unwrap_err().error_code, code, "{shown}");
        }
        for mut body in [
            StartBuild { from_layout: one("/a"), ..base.clone() },
            StartBuild { from_archive: one("/a"), ..base.clone() },
        ] {
            assert_eq!(from(&caller(false), &mut body).unwrap_err().error_code, ErrorCode::NotAnAdmin);
            assert!(matches!(
                from(&caller(true), &mut body),
                Ok(From::Node(BuildFrom::Layout(_) | BuildFrom::Archive(_)))
            ));
        }
    }

    #[test]
    fn who_pulls_is_told_in_each_of_e2bs_ways() {
        let with = |login: &str| {
            let text = format!(r#"{{"fromImage": "example.org/a", "fromImageRegistry": {login}}}"#);
            from(&caller(false), &mut serde_json::from_str(&text).unwrap())
        };
        let general = with(r#"{"type": "registry", "username": "u", "password": "p"}"#).unwrap();
        assert_eq!(secret(&general), Some(("u", "p")));
        let google = with(r#"{"type": "gcp", "serviceAccountJson": "{\"a\": 1}"}"#).unwrap();
        assert_eq!(secret(&google), Some((GCP_USER, "{\"a\": 1}")));
        assert_eq!(
            with(r#"{"type": "gcp", "serviceAccountJson": "x"}"#).unwrap_err().error_code,
            ErrorCode::InvalidRequest
        );
        let amazon =
            r#"{"type": "aws", "awsAccessKeyId": "a", "awsSecretAccessKey": "hush", "awsRegion": "r"}"#;
        let refused = with(amazon).unwrap_err();
        assert_eq!(refused.error_code, ErrorCode::UnsupportedField);
        assert!(refused.remediation.contains("aws ecr get-login-password"));
        assert!(!format!("{general:?}{google:?}{refused:?}").contains("hush"));
        assert!(!format!("{general:?}").contains("\"p\""));
    }

    #[test]
    fn an_empty_command_is_none() {
        let of = |text: &str| command("startCmd", Some(text.to_owned()));
        assert_eq!(of(" \n"), Ok(None));
        assert_eq!(of("a b"), Ok(Some("a b".to_owned())));
        assert!(of("a\0").is_err() && of(&"a".repeat(MOST_COMMAND + 1)).is_err());
    }
}
